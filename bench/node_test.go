// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/podcache"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// A way is one to redirect a pod: a backend, and how it goes about it.
type way struct {
	name string
	hook redirect.Hook // of eBPF
	mode iptables.Mode // of iptables; empty: it is eBPF
}

// ways are all that Shunt has. The first is what a pod gets if nothing is said.
var ways = []way{
	{name: "ebpf-sk_lookup", hook: redirect.HookSkLookup},
	{name: "ebpf-tc", hook: redirect.HookTC},
	{name: "iptables-nft", mode: iptables.NFT},
	{name: "iptables-legacy", mode: iptables.Legacy},
}

func wayOf(name string) way {
	return ways[slices.IndexFunc(ways, func(w way) bool { return w.name == name })]
}

// config is the network configuration that makes the plugin go a way.
func (w way) config() map[string]any {
	if w.mode != "" {
		return map[string]any{"datapath": "iptables", "iptablesBackend": string(w.mode)}
	}
	return map[string]any{"datapath": "ebpf", "inboundHook": string(w.hook)}
}

// A node has everything that the ways need, each in directories of its own:
// what kind of iptables a node has is found out once a directory.
type node struct {
	world  *testbed.World
	bpfDir string
	run    string // a tmpfs, as /run is everywhere
}

// newNode makes a node. As on one in use, each of the ways has redirected a pod
// already: the kernel loads modules for its first iptables rules, patches its
// code when a hook gets its first program, and again when it loses its last.
func newNode(b *testing.B) *node {
	b.Helper()
	n := &node{world: testbed.NewWorld(b), bpfDir: filepath.Join(testbed.BPFFS(b), "shunt"), run: tmpfs(b)}
	for _, w := range ways {
		p := testbed.NewPod(b, testbed.InWorld(n.world))
		if err := n.backend(w).Apply(b.Context(), target(w, p), policy(b, p)); err != nil {
			b.Fatalf("%s: %v", w.name, err)
		}
	}
	return n
}

// runDir is the plugin's, where a way is gone. Both of eBPF's share one.
func (n *node) runDir(w way) string {
	if w.mode != "" {
		return filepath.Join(n.run, string(w.mode))
	}
	return filepath.Join(n.run, "ebpf")
}

func (n *node) ebpf() loader.Options {
	return loader.Options{BPFDir: n.bpfDir, RunDir: filepath.Join(n.run, "ebpf"), Programs: programs.New()}
}

// backend makes a backend, as each process of the plugin does.
func (n *node) backend(w way) redirect.Backend {
	if w.mode != "" {
		return iptables.New(iptables.Options{RunDir: n.runDir(w), Mode: w.mode})
	}
	return ebpf.New(n.ebpf())
}

// target is the pod as the plugin's ADD has it.
func target(w way, p *testbed.Pod) redirect.Target {
	return redirect.Target{
		Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
		Network:    "shunt-test",
		Netns:      p.NetnsPath(), Cgroup: p.CgroupPath(),
		Pod:   redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		Hook:  w.hook,
		Addrs: p.AllAddrs(),
	}
}

// remove undoes a way, in this process.
func (n *node) remove(b *testing.B, w way, p *testbed.Pod) {
	b.Helper()
	if err := n.backend(w).Remove(context.WithoutCancel(b.Context()), target(w, p).Attachment); err != nil {
		b.Fatalf("%s: %v", w.name, err)
	}
}

// join lets the plugin have the agent's answers on all the node's ways: the
// agent's own socket, by other names.
func (n *node) join(b *testing.B, a *agent) {
	b.Helper()
	for _, dir := range []string{"ebpf", string(iptables.NFT), string(iptables.Legacy)} {
		n.link(b, a, filepath.Join(n.run, dir))
	}
}

func (n *node) link(b *testing.B, a *agent, dir string) {
	b.Helper()
	if err := os.Link(a.socket, podcache.SocketPath(dir)); err != nil {
		b.Fatal(err)
	}
}

// hide has the plugin find no agent, where a way is gone, while f runs.
func (n *node) hide(b *testing.B, w way, f func()) {
	b.Helper()
	socket := podcache.SocketPath(n.runDir(w))
	rename(b, socket, socket+".hidden")
	defer rename(b, socket+".hidden", socket)
	f()
}

// cni runs the plugin so that it goes a way.
func (n *node) cni(b *testing.B, w way) *testbed.CNI {
	b.Helper()
	return &testbed.CNI{Plugin: testbed.BuildPlugin(b), CNIVersion: "1.1.0", RunDir: n.runDir(w), BPFDir: n.bpfDir, Config: w.config()}
}

// null runs the null plugin just as the other is run.
func null(b *testing.B) *testbed.CNI {
	b.Helper()
	binary, err := testbed.BuildCommand("shunt.dev/shunt/bench/null", false)
	if err != nil {
		b.Fatal(err)
	}
	return &testbed.CNI{Plugin: binary, CNIVersion: "1.1.0"}
}

// A crowd is pods of one kind.
type crowd struct {
	pods []*testbed.Pod
	opts []testbed.Option
}

func (n *node) crowd(b *testing.B, size int, opts ...testbed.Option) *crowd {
	b.Helper()
	c := &crowd{opts: opts}
	for range size {
		c.pods = append(c.pods, testbed.NewPod(b, append(opts, testbed.InWorld(n.world))...))
	}
	return c
}

// fresh makes new sandboxes of the first pods: what the kernel has of them is as
// new as a new pod's, and ten thousand turns don't fill the machine with cgroups.
// The old ones have gone when it returns.
func (c *crowd) fresh(b *testing.B, size int) []*testbed.Pod {
	b.Helper()
	pods := c.pods[:size]
	testbed.DestroyAll(b, pods...)
	for i, p := range pods {
		pods[i] = testbed.NewPod(b, append(c.opts, testbed.SandboxOf(p))...)
	}
	return pods
}

// policy evaluates the bed's pod as the plugin does.
func policy(tb testing.TB, p *testbed.Pod, mutators ...testbed.PodMutator) *redirect.Policy {
	tb.Helper()
	pod, err := redirect.ParsePod(p.Injected(mutators...))
	if err != nil {
		tb.Fatal(err)
	}
	cfg := redirect.DefaultConfig()
	outcome, pol, err := cfg.Evaluate(pod)
	if err != nil || pol == nil {
		tb.Fatalf("evaluate: %+v, %v", outcome, err)
	}
	return pol
}

// cidrs has a pod's policy include 200 prefixes: half of them IPv6, where the
// pod has that.
func cidrs(families string) testbed.PodMutator {
	var list []string
	for i := range 200 {
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i), 0}), 24)
		if families == "dual" && i%2 == 1 {
			prefix = netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x20, 5: byte(i)}), 48)
		}
		list = append(list, prefix.String())
	}
	return testbed.Annotate("traffic.sidecar.istio.io/includeOutboundIPRanges", strings.Join(list, ","))
}

// tmpfs mounts one, which is what /run is everywhere.
func tmpfs(b *testing.B) string {
	dir := b.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m,mode=0700"); err != nil {
		b.Fatalf("mount a tmpfs: %v", err)
	}
	b.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			b.Errorf("unmount the tmpfs: %v", err)
		}
	})
	return dir
}

// samples are durations of one thing.
type samples []time.Duration

func (s samples) median() time.Duration { return s.quantile(0.5) }

func (s samples) quantile(q float64) time.Duration {
	s = slices.Clone(s)
	slices.Sort(s)
	return s[int(q*float64(len(s)))]
}

// A ledger records samples, and keeps them for the benchmark's own metrics.
type ledger struct {
	*testing.B
	warm bool // until it is set, what is measured warms caches and is forgotten
	kept map[string]samples
}

func newLedger(b *testing.B) *ledger { return &ledger{B: b, kept: map[string]samples{}} }

// add takes a sample in; more is for the record alone.
func (l *ledger) add(name string, d time.Duration, more ...value) {
	l.Helper()
	if !l.warm {
		return
	}
	l.kept[name] = append(l.kept[name], d)
	record(l, name, append([]value{nsPerOp(d)}, more...)...)
}

// ratio reports a quantile of one thing by a quantile of another, if both were
// measured.
func (l *ledger) ratio(unit, num string, of float64, den string, by float64) {
	a, b := l.kept[num], l.kept[den]
	if len(a) > 0 && len(b) > 0 {
		l.ReportMetric(float64(a.quantile(of))/float64(b.quantile(by)), unit)
	}
}

// micros reports the median of a thing.
func (l *ledger) micros(unit, name string) {
	if s := l.kept[name]; len(s) > 0 {
		l.ReportMetric(float64(s.median().Microseconds()), unit+"-µs")
	}
}

// every tells whether a turn of b.Loop is to do what takes as long as n turns
// of other benchmarks, so that one -benchtime serves all. The first does.
func every(n, turn int) bool { return turn%n == 0 }

// progress tells whoever waits what goes on: what a benchmark logs is shown at
// its end only.
func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}
