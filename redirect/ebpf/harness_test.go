// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
)

// leftTime is how long what has ended may take to go.
const leftTime = 10 * time.Second

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

// node is a node's datapath, with a bpffs and a run directory of its own. When
// the test ends, nothing of any pod may be left in it.
type node struct {
	*Backend
	hook redirect.Hook // of its pods
}

func newNode(t testing.TB, edit ...func(*loader.Options)) *node {
	t.Helper()
	opts := loader.Options{BPFDir: testbed.BPFFS(t) + "/shunt", RunDir: t.TempDir(), Programs: programs.New()}
	for _, e := range edit {
		e(&opts)
	}
	n := &node{Backend: New(opts)}
	t.Cleanup(func() { n.checkEmpty(t) })
	return n
}

// inboundHooks are the ways in which a pod's inbound connections are turned.
var inboundHooks = []struct {
	name string
	hook redirect.Hook
	edit func(*loader.Options)
}{
	{"sk_lookup", redirect.HookSkLookup, func(*loader.Options) {}},
	{"tcx", redirect.HookTC, func(*loader.Options) {}},
	{"clsact", redirect.HookTC, func(o *loader.Options) { o.NoTCX = true }},
}

// eachHook runs a test on a node of each inbound hook.
func eachHook(t *testing.T, fn func(t *testing.T, n *node)) {
	onHooks(t, fn, redirect.HookSkLookup, redirect.HookTC)
}

// eachTC runs a test on a node of each way to attach TC programs.
func eachTC(t *testing.T, fn func(t *testing.T, n *node)) {
	onHooks(t, fn, redirect.HookTC)
}

func onHooks(t *testing.T, fn func(t *testing.T, n *node), hooks ...redirect.Hook) {
	for _, h := range inboundHooks {
		if !slices.Contains(hooks, h.hook) {
			continue
		}
		t.Run(h.name, func(t *testing.T) {
			n := newNode(t, h.edit)
			n.hook = h.hook
			fn(t, n)
		})
	}
}

// pinned opens a pinned map of the datapath; nil when none is loaded.
func (n *node) pinned(t testing.TB, name string) *ebpf.Map {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(n.opts.BPFDir, "datapath-*", name))
	if err != nil || len(paths) > 1 {
		t.Fatalf("pins of map %s: %q, %v", name, paths, err)
	}
	if len(paths) == 0 {
		return nil
	}
	m, err := ebpf.LoadPinnedMap(paths[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// keys lists the keys of a map, as raw bytes.
func (n *node) keys(t testing.TB, name string) [][]byte {
	t.Helper()
	m := n.pinned(t, name)
	if m == nil {
		return nil
	}
	defer m.Close()
	var keys [][]byte
	for key, err := m.NextKeyBytes(nil); key != nil || err != nil; key, err = m.NextKeyBytes(key) {
		if err != nil {
			t.Fatalf("list the keys of map %s: %v", name, err)
		}
		keys = append(keys, key)
	}
	return keys
}

// checkEmpty fails the test if something of a pod is left.
func (n *node) checkEmpty(t testing.TB) {
	t.Helper()
	for _, name := range []string{bpf.ShuntMapPods, bpf.ShuntMapStates, bpf.ShuntMapDests, bpf.ShuntMapPorts, bpf.ShuntMapInflight, bpf.ShuntMapListeners} {
		// The kernel destroys a closed listener in its own time.
		if !testbed.Poll(leftTime, func() bool { return len(n.keys(t, name)) == 0 }) {
			t.Errorf("map %s has %d entries at the end", name, len(n.keys(t, name)))
		}
	}
	for _, dir := range []string{n.opts.BPFDir, n.opts.RunDir} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			switch {
			case err != nil:
				return err
			case d.IsDir() && filepath.Dir(path) == n.opts.BPFDir && match("datapath-*", d.Name()):
				return fs.SkipDir
			case !d.IsDir() && path != filepath.Join(n.opts.RunDir, "lock"):
				t.Errorf("left behind: %s", path)
			case d.IsDir() && match("*[0-9]", d.Name()) && dir == n.opts.BPFDir:
				t.Errorf("left behind: %s", path)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
	}
	if left, err := n.Attachments(context.Background(), ""); len(left) > 0 || err != nil {
		t.Errorf("attachments at the end: %v, %v", left, err)
	}
}

func match(pattern, name string) bool {
	ok, _ := filepath.Match(pattern, name) // the patterns are constant
	return ok
}

// pod is a pod that is redirected by eBPF.
type pod struct {
	*testbed.Pod
	node   *node
	policy *redirect.Policy
	target redirect.Target
	cookie uint64
	gone   bool   // removed, or about to be by the test itself
	works  func() // of a test's own
}

// redirect has the backend program a pod, by facts that mutators may change.
func (n *node) redirect(t testing.TB, p *testbed.Pod, mutators ...testbed.PodMutator) *pod {
	t.Helper()
	return n.redirectBy(t, redirect.DefaultConfig(), p, mutators...)
}

// redirectBy is redirect with a configuration. When the test ends, the pod's
// processes being gone, so must be all its handshakes.
func (n *node) redirectBy(t testing.TB, cfg redirect.Config, p *testbed.Pod, mutators ...testbed.PodMutator) *pod {
	t.Helper()
	facts, err := redirect.ParsePod(p.Injected(mutators...))
	if err != nil {
		t.Fatal(err)
	}
	outcome, policy, err := cfg.Evaluate(facts)
	if err != nil || policy == nil {
		t.Fatalf("the pod is not to be redirected: %+v, %v", outcome, err)
	}
	x := &pod{Pod: p, node: n, policy: policy, cookie: p.NetnsCookie(t)}
	x.target = redirect.Target{
		Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
		Netns:      p.NetnsPath(), Cgroup: p.CgroupPath(),
		Pod:   redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		Addrs: p.AllAddrs(), Hook: n.hook,
	}
	if err := n.Apply(t.Context(), x.target, policy); err != nil {
		t.Fatalf("apply: %v", err)
	}
	t.Cleanup(func() {
		if x.gone {
			return
		}
		if !testbed.Poll(leftTime, func() bool { return x.state(t).Inflight == 0 }) {
			t.Errorf("%d handshakes are under way at the end", x.state(t).Inflight)
		}
		x.remove(t)
	})
	if err := n.Check(t.Context(), x.target); err != nil {
		t.Fatalf("check: %v", err)
	}
	return x
}

// remove undoes redirect. It may be repeated.
func (p *pod) remove(t testing.TB) {
	t.Helper()
	p.gone = true
	// Not the test's context, which has ended when the clean-up runs.
	if err := p.node.Remove(context.Background(), p.target.Attachment); err != nil {
		t.Errorf("remove: %v", err)
	}
}

// state reads what the programs keep of the pod.
func (p *pod) state(t testing.TB) bpf.ShuntPodState {
	t.Helper()
	m := p.node.pinned(t, bpf.ShuntMapStates)
	defer m.Close()
	var s bpf.ShuntPodState
	if err := m.Lookup(p.cookie, &s); err != nil {
		t.Fatalf("look up the pod's state: %v", err)
	}
	return s
}

// tally counts decisions by rule.
type tally map[redirect.Rule]int

// rules reads how many flows each rule has decided.
func (p *pod) rules(t testing.TB) tally {
	t.Helper()
	c := tally{}
	for r, n := range p.state(t).Rules {
		if n != 0 {
			c[redirect.Rule(r)] = int(n)
		}
	}
	return c
}

// since gives what was decided after before.
func (c tally) since(before tally) tally {
	d := tally{}
	for r, n := range c {
		if n != before[r] {
			d[r] = n - before[r]
		}
	}
	return d
}

// failures reads how often helpers failed for this pod, by place.
func (p *pod) failures(t testing.TB) map[bpf.ShuntPlace]int {
	t.Helper()
	m := p.node.pinned(t, bpf.ShuntMapErrors)
	defer m.Close()
	var key bpf.ShuntErrorKey
	var n uint64
	found := map[bpf.ShuntPlace]int{}
	it := m.Iterate()
	for it.Next(&key, &n) {
		if key.Cookie == p.cookie {
			found[bpf.ShuntPlace(key.Place)] += int(n)
		}
	}
	if err := it.Err(); err != nil {
		t.Fatalf("read map errors: %v", err)
	}
	return found
}

// expectFailures fails the test unless exactly these helpers' failures were
// counted, any number of times each.
func (p *pod) expectFailures(t testing.TB, places ...bpf.ShuntPlace) {
	t.Helper()
	got := slices.Sorted(maps.Keys(p.failures(t)))
	slices.Sort(places)
	if !slices.Equal(got, places) {
		t.Errorf("failures were counted at places %v, want %v", got, places)
	}
}

// want is what a flow must come to.
type want struct {
	errno    string         // of the connect; nothing else is looked at then
	listener string         // who serves it
	dst      netip.AddrPort // what it asked for, as the kernel understands it
	from     netip.Addr     // its source address
}

// seen is a flow's outcome, in one form for all families.
type seen struct {
	Errno, Step string
	Listener    string
	ServerPeer  string // the client, as the server sees it
	ClientLocal string // what it calls itself
	ClientPeer  string // what the client thinks it is connected to
	Original4   string // SO_ORIGINAL_DST of the server's socket at SOL_IP
	Original6   string // and at SOL_IPV6
}

// plain writes an address as it is spoken of, mapped or not.
func plain(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

func see(r testbed.ConnectResult) seen {
	s := seen{Errno: r.Errno, Step: r.Step, Listener: r.Listener(), ClientPeer: plain(r.Peer), ClientLocal: plain(r.Local)}
	if r.Served == nil {
		return s
	}
	s.ServerPeer = plain(r.Served.Peer)
	original := func(o testbed.OrigDst, size int) string {
		switch {
		case !o.OK():
			return "error"
		case o.Len != size:
			return "wrong length"
		}
		return o.Addr.String()
	}
	s.Original4, s.Original6 = original(r.Served.OrigDst4, 16), original(r.Served.OrigDst6, 28)
	return s
}

// outcome says what see must show of a flow whose client has the given local
// address. A listener that is in the pod gives every connection's original
// destination, redirected or not.
func (w want) outcome(r testbed.ConnectResult) seen {
	if w.errno != "" {
		return seen{Errno: w.errno, Step: testbed.StepConnect}
	}
	from := netip.AddrPortFrom(w.from, r.Local.Port()).String()
	s := seen{Listener: w.listener, ServerPeer: from, ClientLocal: from, ClientPeer: w.dst.String()}
	if w.listener == "world" {
		s.Original4, s.Original6 = "error", "error"
		return s
	}
	v4Socket := r.Served != nil && r.Served.Peer.Addr().Is4()
	if w.dst.Addr().Is4() {
		s.Original4, s.Original6 = w.dst.String(), mapped4(w.dst).String()
		if v4Socket {
			s.Original6 = "error" // there is no such level
		}
	} else {
		s.Original4, s.Original6 = "error", w.dst.String()
	}
	return s
}

// mapped4 writes an IPv4 address in its IPv6 form.
func mapped4(ap netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom16(ap.Addr().As16()), ap.Port())
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
