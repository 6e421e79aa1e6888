// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/loader/trace"
	"shunt.dev/shunt/redirect"
	ebpfbackend "shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// kinds are the backends that must agree. A scene is played by those that serve
// it; one that learns more has its Features widened here.
var kinds = []struct {
	name string
	hook redirect.Hook // of eBPF
	can  flowgen.Features
	open func(t testing.TB, n *node)
}{
	{"ebpf", redirect.HookSkLookup, flowgen.Features{ConnectHooks: true, Excluded: true, TProxy: true, DNS: true}, openEBPF(nil)},
	{"ebpf-tc", redirect.HookTC, flowgen.Features{ConnectHooks: true, Excluded: true, TProxy: true, DNS: true}, openEBPF(nil)},
	{"iptables-nft", "", flowgen.Features{Interfaces: true, TProxy: true, DNS: true}, openIPTables(iptables.NFT)},
	{"iptables-legacy", "", flowgen.Features{Interfaces: true, TProxy: true, DNS: true}, openIPTables(iptables.Legacy)},
}

// openEBPF opens a node's eBPF backend, by options that edit may change.
func openEBPF(edit func(*loader.Options)) func(t testing.TB, n *node) {
	return func(t testing.TB, n *node) {
		t.Helper()
		opts := loader.Options{BPFDir: testbed.BPFFS(t) + "/shunt", RunDir: t.TempDir(), Programs: programs.New()}
		if edit != nil {
			edit(&opts)
		}
		n.Backend, n.bpfDir, n.runDir = ebpfbackend.New(opts), opts.BPFDir, opts.RunDir
	}
}

func openIPTables(m iptables.Mode) func(t testing.TB, n *node) {
	return func(t testing.TB, n *node) {
		t.Helper()
		n.Backend = iptables.New(iptables.Options{RunDir: t.TempDir(), Mode: m})
	}
}

func TestMain(m *testing.M) {
	// A process with the race detector sleeps for a second before it exits,
	// and the tests wait for many actors.
	if os.Getenv("GORACE") == "" {
		_ = os.Setenv("GORACE", "atexit_sleep_ms=0") // fails on malformed names only
	}
	testbed.Main(m)
}

// begin is the first line of a privileged test.
func begin(t *testing.T) {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
}

// node is a node with one backend, and a world for its pods alone: other nodes'
// have the same addresses.
type node struct {
	redirect.Backend
	name  string
	hook  redirect.Hook
	can   flowgen.Features
	world *testbed.World

	bpfDir, runDir string // of eBPF
}

// nodes gives one of each kind that has what is needed.
func nodes(t testing.TB, need func(can flowgen.Features) bool) (all []*node) {
	t.Helper()
	for _, k := range kinds {
		if !need(k.can) {
			continue
		}
		n := &node{name: k.name, hook: k.hook, can: k.can, world: testbed.NewWorld(t)}
		n.world.ServeAll(t)
		k.open(t, n)
		all = append(all, n)
	}
	return all
}

// anyone is for scenes of all kinds.
func anyone(flowgen.Features) bool { return true }

func target(p *testbed.Pod) redirect.Target {
	return redirect.Target{
		Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
		Network:    "shunt", Netns: p.NetnsPath(), Cgroup: p.CgroupPath(),
		Pod:   redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		Addrs: p.AllAddrs(),
	}
}

// settled is how long what has ended may take to go.
const settled = 10 * time.Second

// apply has the backend program a pod until the test ends.
func (n *node) apply(t testing.TB, p *testbed.Pod, policy *redirect.Policy) {
	t.Helper()
	to := target(p)
	to.Hook = n.hook
	if err := n.Apply(t.Context(), to, policy); err != nil {
		t.Fatalf("%s: apply: %v", n.name, err)
	}
	t.Cleanup(func() {
		// The pod's processes are gone, so must be all its handshakes.
		if n.bpfDir != "" && !testbed.Poll(settled, func() bool { return n.state(t, p).Inflight == 0 }) {
			t.Errorf("%s: %d handshakes are under way at the end", n.name, n.state(t, p).Inflight)
		}
		// Not the test's context, which has ended when the clean-up runs.
		if err := n.Remove(context.Background(), to.Attachment); err != nil {
			t.Errorf("%s: remove: %v", n.name, err)
		}
	})
	if err := n.Check(t.Context(), to); err != nil {
		t.Fatalf("%s: check: %v", n.name, err)
	}
}

// pod is a pod that is programmed, and who acts in it.
type pod struct {
	*testbed.Pod
	actors map[string]*testbed.Actor
}

// pod makes one, of a policy by facts that mutators change. The same pods, made
// in the same order, have the same addresses on all nodes. The app listens on
// 8080 and 8081.
func (n *node) pod(t testing.TB, mutators []testbed.PodMutator, opts ...testbed.ProxyOption) *pod {
	t.Helper()
	return n.podBy(t, func(*testbed.Pod) {}, mutators, opts...)
}

// podBy is pod, with something done to it before it is programmed.
func (n *node) podBy(t testing.TB, before func(*testbed.Pod), mutators []testbed.PodMutator, opts ...testbed.ProxyOption) *pod {
	t.Helper()
	p := &pod{Pod: testbed.NewPod(t, testbed.InWorld(n.world))}
	before(p.Pod)
	policy := n.policy(t, p.Pod, mutators...)
	n.apply(t, p.Pod, policy)
	proxy := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, opts...)
	proxy.Listen(t, testbed.ListenSpec{Name: "dns", Addr: at(netip.IPv6Unspecified(), policy.Proxy.DNSPort)})
	const other = 4321
	p.actors = map[string]*testbed.Actor{
		flowgen.ByProxy: proxy.Actor, flowgen.ByApp: p.StartApp(t, 8080, 8081).Actor, flowgen.ByWorld: n.world.Actor,
		flowgen.ByUIDOnly: p.Actor(t, flowgen.ByUIDOnly, testbed.ProxyUID, other),
		flowgen.ByGIDOnly: p.Actor(t, flowgen.ByGIDOnly, other, testbed.ProxyGID),
	}
	return p
}

// policy is that of a pod by facts that mutators change.
func (*node) policy(t testing.TB, p *testbed.Pod, mutators ...testbed.PodMutator) *redirect.Policy {
	t.Helper()
	facts, err := redirect.ParsePod(p.Injected(mutators...))
	if err != nil {
		t.Fatal(err)
	}
	cfg := redirect.DefaultConfig()
	outcome, policy, err := cfg.Evaluate(facts)
	if err != nil || policy == nil {
		t.Fatalf("the pod is not to be redirected: %+v, %v", outcome, err)
	}
	return policy
}

func (p *pod) who(by string) *testbed.Actor { return p.actors[by] }

// pinned opens a map of the eBPF datapath.
func (n *node) pinned(t testing.TB, name string) *ebpf.Map {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.bpfDir, "datapath-*", name))
	if err != nil || len(paths) != 1 {
		t.Fatalf("pins of map %s: %q, %v", name, paths, err)
	}
	m, err := ebpf.LoadPinnedMap(paths[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// state reads what the eBPF programs keep of a pod.
func (n *node) state(t testing.TB, p *testbed.Pod) (s bpf.ShuntPodState) {
	t.Helper()
	m := n.pinned(t, bpf.ShuntMapStates)
	defer m.Close()
	if err := m.Lookup(p.NetnsCookie(t), &s); err != nil {
		t.Fatalf("look up the pod's state: %v", err)
	}
	return s
}

// counted reads how many flows each rule has decided.
func (n *node) counted(t testing.TB, p *testbed.Pod) map[redirect.Rule]int {
	t.Helper()
	c := map[redirect.Rule]int{}
	for r, count := range n.state(t, p).Rules {
		if count != 0 {
			c[redirect.Rule(r)] = int(count)
		}
	}
	return c
}

// failed reads how often helpers failed for a pod, by place.
func (n *node) failed(t testing.TB, p *testbed.Pod) map[bpf.ShuntPlace]int {
	t.Helper()
	m := n.pinned(t, bpf.ShuntMapErrors)
	defer m.Close()
	var key bpf.ShuntErrorKey
	var count uint64
	cookie, found := p.NetnsCookie(t), map[bpf.ShuntPlace]int{}
	it := m.Iterate()
	for it.Next(&key, &count) {
		if key.Cookie == cookie {
			found[bpf.ShuntPlace(key.Place)] += int(count)
		}
	}
	if err := it.Err(); err != nil {
		t.Fatalf("read map errors: %v", err)
	}
	return found
}

// Environment of the differential tests.
const (
	envSeed  = "SHUNT_SEED"  // a number; the time else
	envFlows = "SHUNT_FLOWS" // how many flows at least, for each backend
	envScene = "SHUNT_SCENE" // the number of the only scene to play
)

func numberFrom(t testing.TB, env string, byDefault int64) int64 {
	t.Helper()
	s := os.Getenv(env)
	if s == "" {
		return byDefault
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

// play plays scenes of one seed, each on all nodes that serve it, until each
// node has had flows flows, perScene of them a scene.
func play(t *testing.T, on []*node, flows, perScene int, wishes []flowgen.Wish, scene func(t *testing.T, p *production) (verdicts []redirect.Decision)) {
	t.Helper()
	seed := numberFrom(t, envSeed, time.Now().UnixNano())
	flows = int(numberFrom(t, envFlows, int64(flows)))
	only := int(numberFrom(t, envScene, -1))
	t.Logf("%s=%d, scenes of %d flows", envSeed, seed, perScene)
	start, tried, decided, failed := time.Now(), map[string]int{}, map[string]int{}, 0
	wanting := func() (yes bool) {
		for _, n := range on {
			yes = yes || tried[n.name] < flows
		}
		return yes
	}
	for i := max(only, 0); wanting() && failed < 3 && (only < 0 || i == only); i++ {
		s := flowgen.New(t, seed, i, wishes...)
		p := &production{scene: s}
		for _, n := range on {
			if n.can.Serve(s) {
				p.nodes = append(p.nodes, n)
			}
		}
		p.repeat = fmt.Sprintf("%s=%d %s=%d go test ./redirect -run '^%s$' -count=1 -v", envSeed, seed, envScene, i, t.Name())
		ok := t.Run(fmt.Sprint("scene", i), func(t *testing.T) {
			for _, n := range p.nodes {
				p.twins = append(p.twins, s.Twin(t, n.world))
			}
			for k, n := range p.nodes {
				n.apply(t, p.twins[k].Pod, s.Policy)
				p.tracers = append(p.tracers, n.trace(t, p.twins[k].Pod))
				p.twins[k].Start(t)
			}
			for _, d := range scene(t, p) {
				decided[fmt.Sprintf("%v %v", d.Rule, d.Verdict)]++
			}
			for _, n := range p.nodes {
				tried[n.name] += perScene
			}
		})
		if !ok {
			failed++ // three are enough to look at
		}
	}
	t.Logf("flows %v in %v, by rule and verdict: %v", tried, time.Since(start).Round(time.Millisecond), decided)
}

// production is a scene, with the nodes that play it and a twin on each.
type production struct {
	scene *flowgen.Scene
	nodes []*node
	twins []*flowgen.Twin
	// Of eBPF: who looks on, and what each has seen.
	tracers []*trace.Tracer
	traced  [][]trace.Decision
	repeat  string // a command
}

// trace looks on while a pod's flows are decided; nil where eBPF has no part.
func (n *node) trace(t testing.TB, p *testbed.Pod) *trace.Tracer {
	t.Helper()
	if n.bpfDir == "" {
		return nil
	}
	filter := trace.Filter{Rules: []bpf.ShuntRule{bpf.ShuntRuleRULE_NONE}, Pods: []uint64{p.NetnsCookie(t)}}
	for _, r := range redirect.AllRules() {
		filter.Rules = append(filter.Rules, bpf.ShuntRule(r))
	}
	tracer, err := trace.New(loader.Options{BPFDir: n.bpfDir, RunDir: n.runDir}, filter)
	if err != nil {
		t.Fatalf("%s: trace: %v", n.name, err)
	}
	t.Cleanup(func() {
		if err := tracer.Close(); err != nil {
			t.Errorf("%s: end the trace: %v", n.name, err)
		}
	})
	return tracer
}

// look takes what the tracers have seen so far.
func (p *production) look(t testing.TB) {
	t.Helper()
	p.traced = make([][]trace.Decision, len(p.nodes))
	for k, tracer := range p.tracers {
		if tracer == nil {
			continue
		}
		for {
			d, err := tracer.Read(time.Now().Add(10 * time.Millisecond))
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatalf("%s: read a decision: %v", p.nodes[k].name, err)
			}
			p.traced[k] = append(p.traced[k], d)
		}
		if n := tracer.Lost(); n > 0 {
			t.Errorf("%s: %d decisions were lost", p.nodes[k].name, n)
		}
	}
}

// describe says once what the scene is, and how to see it again.
func (p *production) describe(t testing.TB) {
	t.Helper()
	if p.repeat == "" {
		return
	}
	s := p.scene
	annots, _ := json.MarshalIndent(s.Annots, "    ", "  ")
	t.Logf("\n  repeat: %s\n  pod: %v\n  annotations: %s\n  environment: %v\n  closed: %q\n  policy: %+v", p.repeat, s.Addrs, annots, s.Env, s.Closed, *s.Policy)
	p.repeat = ""
}

// disagree reports a flow of which the backends, or a backend and
// Policy.Decide, do not think alike.
func (p *production) disagree(t testing.TB, x flowgen.Trial, what string) {
	t.Helper()
	p.describe(t)
	spec, _ := json.Marshal(x.Spec)
	how := ""
	if x.Connected {
		how = ", connected"
	}
	t.Errorf("disagreement\n  flow: %+v\n  by %s (uid %d, gid %d)%s: %s\n  Decide: %v by %v\n%s",
		x.Flow, x.By, x.Flow.UID, x.Flow.GID, how, spec, x.Want.Verdict, x.Want.Rule, what)
}

// tally compares what the eBPF programs have counted, and shown to who looks on,
// for each twin. A flow counts once by TC too: no SYN passes two interfaces of a
// pod here.
func (p *production) tally(t testing.TB, byRule map[redirect.Rule]int, failures map[bpf.ShuntPlace]int) {
	t.Helper()
	p.look(t)
	for k, n := range p.nodes {
		if n.bpfDir == "" {
			continue
		}
		shown := map[redirect.Rule]int{}
		for _, d := range p.traced[k] {
			shown[redirect.Rule(d.Rule)]++
		}
		if diff := cmp.Diff(byRule, shown); diff != "" {
			p.describe(t)
			t.Errorf("%s: flows traced by rule (-Decide +kernel):\n%s", n.name, diff)
		}
		if diff := cmp.Diff(byRule, n.counted(t, p.twins[k].Pod)); diff != "" {
			p.describe(t)
			t.Errorf("%s: flows by rule (-Decide +kernel):\n%s", n.name, diff)
		}
		if diff := cmp.Diff(failures, n.failed(t, p.twins[k].Pod)); diff != "" {
			p.describe(t)
			t.Errorf("%s: failures by place (-want +kernel):\n%s", n.name, diff)
		}
	}
}

// plain writes an address as it is spoken of, mapped or not.
func plain(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
