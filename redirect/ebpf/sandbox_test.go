// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"shunt.dev/shunt/internal/testbed"
)

// attached counts the programs at each hook of the pod's cgroup that every pod
// has.
func attached(t *testing.T, p *testbed.Pod) map[ebpf.AttachType]int {
	t.Helper()
	return attachedAt(t, p, []ebpf.AttachType{
		ebpf.AttachCGroupSockOps, ebpf.AttachCGroupGetsockopt,
		ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
		ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
	})
}

func attachedAt(t *testing.T, p *testbed.Pod, types []ebpf.AttachType) map[ebpf.AttachType]int {
	t.Helper()
	dir, err := os.Open(p.CgroupPath())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	found := map[ebpf.AttachType]int{}
	for _, a := range types {
		progs, err := link.QueryPrograms(link.QueryOptions{Target: int(dir.Fd()), Attach: a})
		if err != nil {
			t.Fatalf("query %v: %v", a, err)
		}
		found[a] = len(progs.Programs)
	}
	return found
}

func expectAttached(t *testing.T, p *testbed.Pod, want int) {
	t.Helper()
	for a, n := range attached(t, p) {
		if n != want {
			t.Errorf("%d programs at %v, want %d", n, a, want)
		}
	}
}

// TestPrivilegedSandbox: a sandbox is recreated on the same pod cgroup, and its
// predecessor is removed before, after, twice, or only in the end.
func TestPrivilegedSandbox(t *testing.T) {
	begin(t)
	const (
		removeOld = "remove old"
		removeNew = "remove new"
		applyNew  = "apply new"
		reapply   = "apply new again"
	)
	for _, c := range []struct {
		name  string
		steps []string
	}{
		{"in order", []string{removeOld, applyNew, removeNew}},
		{"late", []string{applyNew, removeOld, removeNew}},
		{"late, twice", []string{applyNew, removeOld, removeOld, removeNew}},
		{"before and late", []string{removeOld, applyNew, removeOld, removeNew}},
		{"after the new one's own", []string{applyNew, removeNew, removeOld}},
		{"each twice", []string{applyNew, removeOld, removeNew, removeOld, removeNew}},
		{"in between", []string{applyNew, reapply, removeOld, reapply, removeNew}},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			w := testbed.NewWorld(t)
			w.ServeAll(t)
			old := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), twinPolicy...)
			expectAttached(t, old.Pod, 1)
			oldCast := newCast(t, old, []uint16{8080, 8081})
			expect(t, "in the old sandbox", oldCast.app.Dial(t, "10.99.1.1:80"), want{listener: "out", dst: ap("10.99.1.1:80"), from: old.Addr4()})
			for _, a := range []*testbed.Actor{oldCast.app.Actor, oldCast.proxy.Actor, oldCast.uidOnly, oldCast.gidOnly} {
				a.Stop(t)
			}
			old.gone = true // from here on the steps say what is removed
			old.Destroy(t)

			var p *pod
			oldThere, newThere := true, false
			for _, s := range c.steps {
				switch s {
				case removeOld:
					old.remove(t)
				case removeNew:
					p.remove(t)
				case reapply:
					if err := n.Apply(t.Context(), p.target, p.policy); err != nil {
						t.Fatal(err)
					}
				case applyNew:
					p = n.redirect(t, testbed.NewPod(t, testbed.SandboxOf(old.Pod)), twinPolicy...)
					x := newCast(t, p, []uint16{8080, 8081})
					defer x.app.Stop(t)
					p.works = func() {
						t.Helper()
						before := p.rules(t)
						for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:443"} {
							from := p.Addr4()
							if ap(dst).Addr().Is6() {
								from = p.Addr6()
							}
							// Aborted: no late packet of it is looked up, and counted, again.
							expect(t, "in the new sandbox", x.app.Connect(t, testbed.ConnectSpec{Dst: ap(dst), Abort: true}), want{listener: "out", dst: ap(dst), from: from})
						}
						for _, a := range p.AllAddrs() {
							from := testbed.WorldAddr4
							if a.Is6() {
								from = testbed.WorldAddr6
							}
							expect(t, "into the new sandbox", w.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080), Abort: true}), want{listener: "in", dst: at(a, 8080), from: from})
						}
						total := 0
						for _, n := range p.rules(t).since(before) {
							total += n
						}
						if total != 4 {
							t.Errorf("4 connections were decided %d times", total)
						}
					}
				}
				// The hooks stay for as long as either of the two is attached.
				switch s {
				case removeOld:
					oldThere = false
				case removeNew:
					newThere = false
				default:
					newThere = true
				}
				want := 0
				if oldThere || newThere {
					want = 1
				}
				expectAttached(t, old.Pod, want)
				if p != nil && !p.gone {
					p.works()
					if err := n.Check(t.Context(), p.target); err != nil {
						t.Errorf("after %q: check: %v", s, err)
					}
				}
			}
		})
	}
}

// TestPrivilegedRepeat: each call of the backend may be repeated.
func TestPrivilegedRepeat(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	for range 3 {
		if err := n.Apply(t.Context(), p.target, p.policy); err != nil {
			t.Fatal(err)
		}
		if err := n.Check(t.Context(), p.target); err != nil {
			t.Error(err)
		}
		expectAttached(t, p.Pod, 1)
		before := p.rules(t)
		expect(t, "outbound", c.app.Dial(t, "10.99.1.1:80"), want{listener: "out", dst: ap("10.99.1.1:80"), from: p.Addr4()})
		expect(t, "inbound", p.World.Connect(t, testbed.ConnectSpec{Dst: at(p.Addr4(), 8080)}), want{listener: "in", dst: at(p.Addr4(), 8080), from: testbed.WorldAddr4})
		if d := p.rules(t).since(before); len(d) != 2 {
			t.Errorf("counted %v", d)
		}
	}
	p.remove(t)
	p.remove(t)
	expectAttached(t, p.Pod, 0)
	// What has been taken off is as if it had never been.
	expect(t, "outbound", c.app.Dial(t, "10.99.1.1:80"), want{listener: "world", dst: ap("10.99.1.1:80"), from: p.Addr4()})
}

// TestPrivilegedRemoveUnderWay: a pod that is removed while its handshakes with
// the proxy are under way leaves none of them in the maps.
func TestPrivilegedRemoveUnderWay(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	c.proxy.Out[0].Close(t)
	c.proxy.Listen(t, testbed.ListenSpec{Name: "frozen", Addr: ap("[::]:15001"), NoAccept: true, Backlog: 1})
	specs := make([]testbed.ConnectSpec, 6)
	for i := range specs {
		specs[i] = testbed.ConnectSpec{Dst: ap("10.99.1.1:80"), Nonblock: true, Keep: true, NoGreeting: true, Timeout: 1}
	}
	c.app.ConnectBatch(t, specs)
	if p.state(t).Inflight == 0 {
		t.Fatal("no handshake is under way")
	}
	p.remove(t)
}
