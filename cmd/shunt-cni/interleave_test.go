// SPDX-License-Identifier: Apache-2.0

package main

import (
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/cni"
	"shunt.dev/shunt/internal/testbed"
)

const (
	interleaved   = 200 // commands
	atOnce        = 6   // of them, by as many processes
	killedWithin  = 60  // steps, most of those that a command has
	lifePods      = 12  // pods that commands are for at a time
	sparePods     = 12  // and that take the place of those that are given up
	contendedPods = 2   // pods that several commands may be for at a time
)

// What is known of a pod of the interleavings.
type podState int

const (
	podDown    podState = iota // DEL has succeeded, or nothing was done
	podUp                      // ADD has succeeded
	podUnknown                 // what was done last was killed
)

// An interleavedPod is one pod, and who may be at work on it.
type interleavedPod struct {
	*testbed.Pod
	kind      string // of wishes
	mu        sync.Mutex
	state     podState
	contended bool
	givenUp   bool // its runtime has forgotten it: GC's
}

// wishes are the ways in which the pods are redirected.
var wishes = map[string][]testbed.PodMutator{
	"sk_lookup": nil,
	"tc":        {testbed.Annotate("shunt.dev/inbound-hook", "tc")},
	"iptables":  {testbed.Annotate("shunt.dev/datapath", "iptables")},
	"tproxy": {
		testbed.Annotate("sidecar.istio.io/interceptionMode", "TPROXY"), testbed.ProxyEnv("ISTIO_META_DNS_CAPTURE", "true"),
	},
}

// interleaving is a node at which several processes are at work.
type interleaving struct {
	*node
	mu     sync.Mutex // of what follows
	live   []*interleavedPod
	spares []*interleavedPod
	gone   []*interleavedPod // given up
	rng    *rand.Rand
	left   int // commands to come
	kills  int
	counts map[string]int
}

// TestPrivilegedInterleavings: ADD, DEL, CHECK and GC by several processes at
// once, from a node's boot on, of which many are killed somewhere. A command that
// is not killed succeeds whatever has gone before. In the end the kernel, the
// pins and the records have what the pods have that are up, and nothing else.
func TestPrivilegedInterleavings(t *testing.T) {
	testbed.NeedSteps(t)
	seed := rand.Uint64()
	if s := os.Getenv(seedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s: %v", seedEnv, err)
		}
	}
	t.Logf("seed %d", seed)
	x := &interleaving{
		node: newNode(t, begin(t)), rng: rand.New(rand.NewPCG(seed, 1)), left: interleaved, counts: map[string]int{},
	}
	if raced() && !full() {
		x.left /= 4
	}
	kinds := slices.Sorted(maps.Keys(wishes))
	for i := range lifePods + sparePods {
		p := &interleavedPod{Pod: testbed.NewPod(t, testbed.InWorld(x.world)), kind: kinds[i%len(kinds)], contended: i < contendedPods}
		x.api.SetPod(t, p.Namespace, p.Name, p.Injected(wishes[p.kind]...))
		if i < lifePods {
			x.live = append(x.live, p)
		} else {
			x.spares = append(x.spares, p)
		}
	}
	var wg sync.WaitGroup
	for range atOnce {
		wg.Go(func() {
			for x.one(t) && !t.Failed() {
			}
		})
	}
	wg.Wait()
	t.Logf("%v, %d killed, %d pods given up", x.counts, x.kills, len(x.gone))
	if t.Failed() {
		return
	}
	x.settle(t)
}

// one runs one command, and reports whether there are more to come.
func (x *interleaving) one(t *testing.T) bool {
	x.mu.Lock()
	if x.left == 0 {
		x.mu.Unlock()
		return false
	}
	x.left--
	command := []string{"ADD", "ADD", "ADD", "DEL", "DEL", "CHECK", "GC"}[x.rng.IntN(7)]
	p := x.live[x.rng.IntN(len(x.live))]
	var fault testbed.Fault
	if x.rng.IntN(2) == 0 && command != "CHECK" {
		fault = testbed.Fault{Step: 1 + x.rng.IntN(killedWithin), Kind: testbed.FaultKind(x.rng.IntN(2))}
	}
	forget := x.rng.IntN(2) == 0
	x.counts[command]++
	x.mu.Unlock()

	if command == "GC" {
		x.collect(t, fault)
		return true
	}
	if !p.contended {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.givenUp {
			return true
		}
	}
	r, s, err := x.ExecSteps(command, p.Pod, fault, nil)
	if err != nil {
		t.Errorf("%s of pod %s, %v: %v", command, p.Name, fault, err)
		return false
	}
	killed := s.Hit && r.ExitCode == -1
	switch {
	case r.TimedOut:
		t.Errorf("%s of pod %s (%s), %v: %s", command, p.Name, p.kind, fault, r)
	case p.contended: // what succeeds depends on who comes first
		if !killed && !r.OK() && r.Err == nil {
			t.Errorf("%s of pod %s (%s), %v: %s", command, p.Name, p.kind, fault, r)
		}
		return true
	case killed:
		p.state = podUnknown
		x.killed(p, command == "ADD" && forget)
	case command == "CHECK":
		if p.state == podUp && !r.OK() || p.state == podDown && r.Code() != cni.CodeDiffers {
			t.Errorf("CHECK of pod %s (%s), which is in state %d: %s", p.Name, p.kind, p.state, r)
		}
	case !r.OK():
		t.Errorf("%s of pod %s (%s), which was in state %d: %s", command, p.Name, p.kind, p.state, r)
	case command == "ADD":
		p.state = podUp
	default:
		p.state = podDown
	}
	return true
}

// killed counts, and gives a pod up if that is wished and there is another.
func (x *interleaving) killed(p *interleavedPod, forget bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.kills++
	if !forget || len(x.spares) == 0 {
		return
	}
	p.givenUp = true
	x.gone = append(x.gone, p)
	x.live[slices.Index(x.live, p)] = x.spares[0]
	x.spares = x.spares[1:]
}

// collect runs GC. All but the pods that were given up are valid.
func (x *interleaving) collect(t *testing.T, fault testbed.Fault) {
	x.mu.Lock()
	var valid []map[string]string
	for _, p := range slices.Concat(x.live, x.spares) {
		valid = append(valid, map[string]string{"containerID": p.ContainerID, "ifname": "eth0"})
	}
	x.mu.Unlock()
	r, s, err := x.ExecSteps("GC", nil, fault, nil, testbed.Set("cni.dev/valid-attachments", valid))
	switch {
	case err != nil:
		t.Errorf("GC, %v: %v", fault, err)
	case s.Hit && r.ExitCode == -1:
		x.mu.Lock()
		defer x.mu.Unlock()
		x.kills++
	case !r.OK():
		t.Errorf("GC: %s", r)
	}
}

// settle ends what was cut short, one way or the other, and compares.
func (x *interleaving) settle(t *testing.T) {
	t.Helper()
	x.collect(t, testbed.Fault{})
	for _, p := range x.gone {
		if h := hooksOf(t, p.Pod); len(h) > 0 || ruled(t, p.Pod) {
			t.Errorf("pod %s (%s) was given up, and has %v, rules: %v", p.Name, p.kind, h, ruled(t, p.Pod))
		}
		x.MustDel(t, p.Pod) // which the kubelet does, at the latest when it has started again
	}
	want := map[string]int{"pods": 0, "states": 0, "slots": 0, "netns": 0, "cgroups": 0, "records": 0, "iptables records": 0, "ruled": 0}
	for _, p := range x.live {
		if p.contended || p.state == podUnknown {
			if p.state = podState(x.rng.IntN(2)); p.state == podUp {
				x.MustAdd(t, p.Pod)
			} else {
				x.MustDel(t, p.Pod)
			}
		}
		if p.state == podDown {
			if h := hooksOf(t, p.Pod); len(h) > 0 {
				t.Errorf("pod %s (%s) is down and has %v", p.Name, p.kind, h)
			}
			continue
		}
		x.MustCheck(t, p.Pod)
		switch p.kind {
		case "iptables":
			want["iptables records"]++
			want["ruled"]++
			x.expectRedirected(t, p.Pod)
			continue
		case "tproxy":
			expectHooks(t, p.Pod, dnsHooks...)
			expectMarks(t, p.Pod, true)
		default:
			expectHooks(t, p.Pod)
			x.expectRedirected(t, p.Pod)
		}
		for _, what := range []string{"pods", "states", "slots", "netns", "cgroups", "records"} {
			want[what]++
		}
	}
	got := map[string]int{
		"pods": x.entries(t, bpf.ShuntMapPods), "states": x.entries(t, bpf.ShuntMapStates), "slots": len(x.stamped(t)),
		"netns": len(glob(t, filepath.Join(x.BPFDir, "netns", "*"))), "cgroups": len(glob(t, filepath.Join(x.BPFDir, "cgroups", "*"))),
		"records":          len(glob(t, filepath.Join(x.RunDir, "attachments", "*.json"))),
		"iptables records": len(glob(t, filepath.Join(x.RunDir, "iptables", "*.json"))),
		"ruled":            0,
	}
	var all []*testbed.Pod
	for _, p := range slices.Concat(x.live, x.spares, x.gone) {
		all = append(all, p.Pod)
		if ruled(t, p.Pod) {
			got["ruled"]++
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what is there is not what the pods have that are up (-want +got):\n%s", diff)
	}
	for _, p := range x.live {
		x.MustDel(t, p.Pod)
	}
	x.expectNothing(t, all...)
	for _, p := range all {
		if ruled(t, p) {
			t.Errorf("pod %s: rules are left", p.Name)
		}
	}
}
