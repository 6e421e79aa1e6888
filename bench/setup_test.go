// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package bench measures what Shunt claims, as ratios within one run.
//
// With -short there are fewer cases and fewer rounds, of what claims are made of.
package bench

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

func TestMain(m *testing.M) {
	for env, run := range map[string]func() error{asAgent: runAgent, asTracer: runTracer, asTraffic: runTraffic} {
		if os.Getenv(env) == "" {
			continue
		}
		if err := run(); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", env, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testbed.Main(m)
}

// restore runs an iptables-restore program in the pod's namespace.
func restore(p *testbed.Pod, program, input string) (took time.Duration, err error) {
	err = p.Do(func() error {
		cmd := exec.Command(program, "--noflush")
		cmd.Stdin = strings.NewReader(input)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		start := time.Now()
		err := cmd.Run()
		took = time.Since(start)
		if err != nil {
			return fmt.Errorf("%s: %w: %s", program, err, out.String())
		}
		return nil
	})
	return took, err
}

// A setupCase is a kind of pod that is programmed.
type setupCase struct {
	family, policy string
}

// name is the record's: the operation, the way and the case.
func (c setupCase) name(op string, w way) string {
	return fmt.Sprintf("Setup/op=%s/path=%s/family=%s/policy=%s", op, w.name, c.family, c.policy)
}

func (c setupCase) options() []testbed.Option {
	if c.family == "4" {
		return []testbed.Option{testbed.NoIPv6()}
	}
	return nil
}

func (c setupCase) mutators() []testbed.PodMutator {
	if c.policy == "cidrs200" {
		return []testbed.PodMutator{cidrs(c.family)}
	}
	return nil
}

// BenchmarkKernelProgramming compares, turn by turn, all that has to be done to
// a pod once its facts are known, by each way: Apply, Check and Remove of the
// backends, in this process. Every turn has fresh network namespaces, made before
// anything is measured, and another order.
//
// The metric iptables-nft/ebpf compares our own two backends. iptables/ebpf is
// the older yardstick: one iptables-restore plus one ip6tables-restore of the equal
// rule set, one after the other and nothing around them.
func BenchmarkKernelProgramming(b *testing.B) {
	testbed.Privileged(b)
	n := newNode(b)
	l := newLedger(b)
	dual := setupCase{"dual", "small"}
	cases := []setupCase{dual, {"4", "small"}, {"dual", "cidrs200"}, {"4", "cidrs200"}}
	if testing.Short() {
		cases = cases[:1]
	}
	perFamily := map[string]int{"dual": 2} // for the steps and the floor
	for _, c := range cases {
		perFamily[c.family] += len(ways)
	}
	crowds := map[string]*crowd{}
	for family, size := range perFamily {
		crowds[family] = n.crowd(b, size, setupCase{family: family}.options()...)
	}
	floor := l.newFloor(n)
	turns := 0
	turn := func() {
		pods := map[string][]*testbed.Pod{}
		for family, size := range perFamily {
			pods[family] = crowds[family].fresh(b, size)
		}
		next := func(family string) (p *testbed.Pod) {
			p, pods[family] = pods[family][0], pods[family][1:]
			return p
		}
		for _, c := range cases {
			for i := range ways {
				l.program(n, c, ways[(turns+i)%len(ways)], next(c.family))
			}
		}
		stepwise := next("dual")
		l.steps(n, stepwise)
		l.restore(stepwise)
		l.floor(floor, next("dual"))
		turns++
	}
	turn()
	l.warm = true
	for b.Loop() {
		if every(50, turns-1) {
			progress("kernel programming: turn %d", turns)
		}
		turn()
	}
	b.ReportMetric(0, "ns/op")
	first, nft := dual.name("add", ways[0]), dual.name("add", wayOf("iptables-nft"))
	l.ratio("iptables-nft/ebpf", nft, 0.5, first, 0.5)
	l.ratio("iptables/ebpf", "restore", 0.5, first, 0.5)
	l.ratio("ebpf/floor", first, 0.5, floorName, 0.5)
	for _, w := range ways {
		for _, op := range []string{"add", "check", "del"} {
			l.micros(w.name+"-"+op, dual.name(op, w))
		}
	}
	for _, s := range setupSteps {
		l.micros("step-"+s, stepName(s))
	}
	l.micros("restore", "restore")
	l.micros("floor", floorName)
}

// program does to one pod, by one way, all that can be done.
func (l *ledger) program(n *node, c setupCase, w way, p *testbed.Pod) {
	l.Helper()
	pol, t, backend := policy(l, p, c.mutators()...), target(w, p), n.backend(w)
	for _, x := range []struct {
		op string
		do func() error
	}{
		{"add", func() error { return backend.Apply(l.Context(), t, pol) }},
		{"check", func() error { return backend.Check(l.Context(), t) }},
		{"del", func() error { return backend.Remove(l.Context(), t.Attachment) }},
	} {
		start := time.Now()
		err := x.do()
		took := time.Since(start)
		if err != nil {
			l.Fatalf("%s: %v", c.name(x.op, w), err)
		}
		l.add(c.name(x.op, w), took)
	}
}

// setupSteps are those of the eBPF backend's Apply.
var setupSteps = []string{"netns", "compile", "open", "attach"}

func stepName(step string) string { return "Step/step=" + step + "/path=" + ways[0].name }

// steps programs a pod by the first way, step by step: what the plugin learns in
// the pod's network namespace; its policy as tables; the node's lock and the loaded
// datapath; the record, the maps and the links.
func (l *ledger) steps(n *node, p *testbed.Pod) {
	l.Helper()
	pol := policy(l, p)
	var (
		ns *loader.Netns
		rs loader.Rules
		d  *loader.Datapath
	)
	do := map[string]func() error{
		"netns": func() (err error) { ns, err = loader.OpenNetns(p.NetnsPath()); return err },
		"compile": func() (err error) {
			if rs, err = ebpf.Tables(pol, ebpf.Net{Addrs: p.AllAddrs(), Netns: ns}); err != nil {
				return err
			}
			rs.UID, rs.GID, err = ns.HostIDs(rs.UID, rs.GID, pol.HostUsers)
			return err
		},
		"open": func() (err error) { d, err = loader.Open(l.Context(), n.ebpf()); return err },
		"attach": func() error {
			return d.Attach(loader.Target{
				ID: loader.ID{ContainerID: p.ContainerID, IfName: "eth0"}, Netns: ns, Cgroup: p.CgroupPath(),
				Pod: loader.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID}, InboundHook: loader.InboundHook(ways[0].hook),
			}, rs)
		},
	}
	for _, s := range setupSteps {
		start := time.Now()
		err := do[s]()
		took := time.Since(start)
		if err != nil {
			l.Fatalf("%s: %v", s, err)
		}
		l.add(stepName(s), took)
	}
	d.Close()
	ns.Close()
	n.remove(l.B, ways[0], p)
}

// restore has the node's own programs put the policy's rules into a pod.
func (l *ledger) restore(p *testbed.Pod) {
	l.Helper()
	pol := policy(l, p)
	var both time.Duration
	for _, x := range []struct {
		program string
		family  iptables.Family
	}{{"iptables-restore", iptables.IPv4}, {"ip6tables-restore", iptables.IPv6}} {
		took, err := restore(p, x.program, iptables.Render(pol, x.family))
		if err != nil {
			l.Fatal(err)
		}
		both += took
	}
	if l.warm { // of no record: it is no way of ours
		l.kept["restore"] = append(l.kept["restore"], both)
	}
}
