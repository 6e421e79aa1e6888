// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// TestPrivilegedTimeWait: a client that reuses its source port while the old
// connection is in TIME_WAIT at the proxy is accepted at once.
func TestPrivilegedTimeWait(t *testing.T) {
	begin(t)
	eachHook(t, testTimeWait)
}

func testTimeWait(t *testing.T, n *node) {
	w := testbed.NewWorld(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), twinPolicy...)
	c := newCast(t, p, []uint16{8080}, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.CloseFirst = true }))
	for _, own := range p.AllAddrs() {
		src := ap("10.99.0.7:7777") // 1E61
		if own.Is6() {
			src = ap("[fd99::7]:7777")
		}
		const n = 4
		waited := 0 // how many were accepted at a second SYN only, which is sent a second later
		for i := range n {
			before := tcpCount(t, w, "TCPSynRetrans")
			r := w.Connect(t, testbed.ConnectSpec{SocketSpec: testbed.SocketSpec{Bind: src, ReuseAddr: true}, Dst: at(own, 8080), Keep: true})
			// Who closes first has the TIME_WAIT: that must be the proxy.
			if _, errno := w.RecvLine(t, r.Sock, 0); errno != testbed.ErrnoEOF {
				t.Fatalf("the proxy has not closed: %q", errno)
			}
			w.Close(t, r.Sock)
			expect(t, fmt.Sprintf("connection %d from %v", i, src), r, want{listener: "in", dst: at(own, 8080), from: src.Addr()})
			if tcpCount(t, w, "TCPSynRetrans") > before {
				t.Logf("connection %d from %v took %v", i, src, r.Elapsed)
				waited++
			}
			testbed.Eventually(t, "TIME_WAIT in the pod", func() bool {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp6", c.proxy.PID))
				return err == nil && strings.Contains(string(b), ":1E61 06 ")
			})
		}
		// One may be the machine's doing, where it is emulated or has others to serve.
		if waited > 1 {
			t.Errorf("from %v: %d of %d connections were not accepted at once", src, waited, n)
		}
	}
	p.expectFailures(t)
}

// TestPrivilegedListenerPlaces: inbound connections reach a listener exactly
// where REDIRECT would find one: at the wildcard or at the pod's first address.
func TestPrivilegedListenerPlaces(t *testing.T) {
	begin(t)
	eachHook(t, testListenerPlaces)
}

func testListenerPlaces(t *testing.T, n *node) {
	v6only := func(l *testbed.ListenSpec) { l.V6Only = true }
	for _, pods := range []struct {
		name string
		opts []testbed.Option
	}{
		{"one address", nil},
		{"two addresses", []testbed.Option{testbed.Addrs("10.244.3.1", "10.244.3.2", "fd10:3::1", "fd10:3::2")}},
	} {
		x := newTwins(t, n, pods.opts...)
		for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
			p.app = p.StartApp(t, 8080, 8081)
		}
		for _, places := range []struct {
			name  string
			addrs []string
			shape func(*testbed.ListenSpec)
		}{
			{"both wildcards in one", []string{"[::]:15006"}, nil},
			{"the wildcard of IPv4", []string{"0.0.0.0:15006"}, nil},
			{"the wildcard of IPv6", []string{"[::]:15006"}, v6only},
			{"both wildcards", []string{"[::]:15006", "0.0.0.0:15006"}, v6only},
			{"the pod's addresses", []string{"A4:15006", "[A6]:15006"}, nil},
			{"the pod's IPv4 address", []string{"A4:15006"}, nil},
			{"the pod's last addresses", []string{"B4:15006", "[B6]:15006"}, nil},
			{"loopback", []string{"127.0.0.1:15006", "[::1]:15006"}, nil},
			{"loopback, and the wildcard of IPv6", []string{"127.0.0.1:15006", "[::]:15006"}, v6only},
			{"mapped wildcard", []string{"[::ffff:0.0.0.0]:15006"}, nil},
			{"mapped address of the pod", []string{"[::ffff:A4]:15006"}, nil},
			{"mapped loopback", []string{"[::ffff:127.0.0.1]:15006"}, nil},
			{"the pod's IPv4 address, then both wildcards", []string{"A4:15006", "[::]:15006"}, nil},
			{"both wildcards, then the pod's IPv6 address", []string{"[::]:15006", "[A6]:15006"}, nil},
			{"another port", []string{"[::]:15007"}, nil},
			{"bound to eth0", []string{"[::]:15006"}, func(l *testbed.ListenSpec) { l.Device = "eth0" }},
			{"bound to lo", []string{"[::]:15006"}, func(l *testbed.ListenSpec) { l.Device = "lo" }},
		} {
			compare(t, x, pods.name+"/"+places.name, func(t *testing.T, p *twin) (all []seen) {
				proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
				defer proxy.Stop(t)
				for i, a := range places.addrs {
					spec := testbed.ListenSpec{Name: fmt.Sprint("listener ", i), Addr: expand(p.Pod, a)}
					if places.shape != nil && spec.Addr.Addr().Is6() {
						places.shape(&spec)
					}
					if _, errno := proxy.TryListen(t, spec); errno != "" {
						all = append(all, seen{Errno: errno, Step: "listen"})
					}
				}
				for _, a := range p.AllAddrs() {
					for _, port := range []uint16{8080, 15006, 8081} {
						r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(a, port)})
						all = append(all, likeness(testbed.ConnectSpec{}, r))
					}
				}
				return all
			})
		}
	}
}

// crowd is the proxy's listeners at 15006, in several processes.
type crowd struct {
	*pod
	workers []*testbed.Actor
	each    int // listeners a process
}

func newCrowd(t *testing.T, n *node, workers, each int, family string) *crowd {
	t.Helper()
	w := testbed.NewWorld(t)
	c := &crowd{pod: n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), twinPolicy...), each: each}
	c.StartApp(t, 8080)
	for i := range workers {
		c.start(t, fmt.Sprint("worker", i), family)
	}
	return c
}

func (c *crowd) start(t *testing.T, name, family string) {
	t.Helper()
	a := c.Actor(t, name, testbed.ProxyUID, testbed.ProxyGID)
	for range c.each {
		if family != "IPv6" {
			a.Listen(t, testbed.ListenSpec{Name: "in", Addr: ap("0.0.0.0:15006"), ReusePort: true})
		}
		if family != "IPv4" {
			a.Listen(t, testbed.ListenSpec{Name: "in", Addr: ap("[::]:15006"), ReusePort: true, V6Only: true})
		}
	}
	c.workers = append(c.workers, a)
}

// check connects to the pod and gives how many connections each process has had.
func (c *crowd) check(t *testing.T, what string, connections int) map[string]int {
	t.Helper()
	served := map[string]int{}
	for _, a := range c.AllAddrs() {
		specs := make([]testbed.ConnectSpec, connections/2)
		for i := range specs {
			specs[i] = testbed.ConnectSpec{Dst: at(a, 8080), Abort: true}
		}
		from := testbed.WorldAddr4
		if a.Is6() {
			from = testbed.WorldAddr6
		}
		for _, r := range c.World.ConnectBatch(t, specs) {
			expect(t, what, r, want{listener: "in", dst: at(a, 8080), from: from})
			if r.Served == nil {
				return served // one is enough to look at
			}
			served[r.Served.Actor]++
		}
	}
	return served
}

// TestPrivilegedReusePort: of listeners with SO_REUSEPORT in several processes
// each gets its share, whoever leaves and in whatever way.
func TestPrivilegedReusePort(t *testing.T) {
	begin(t)
	eachHook(t, testReusePort)
}

func testReusePort(t *testing.T, n *node) {
	leave := map[string]func(*testing.T, *testbed.Actor){
		"stopped": func(t *testing.T, a *testbed.Actor) { a.Stop(t) },
		"killed":  func(t *testing.T, a *testbed.Actor) { a.Kill(t) },
	}
	for how, leave := range leave {
		for _, x := range []struct {
			name          string
			workers, each int
			stay          []int // who stays
			// The datapath knows the first and the last that came, not all:
			// when none of them is left, connections are refused. Not by
			// TC, which finds them by itself.
			unknown bool
		}{
			{"the last to listen leaves", 4, 2, []int{0, 1, 2}, false},
			{"the first leaves", 4, 2, []int{1, 2, 3}, false},
			{"all but the first leave", 4, 2, []int{0}, false},
			{"all but the last leave", 4, 2, []int{3}, false},
			{"all but a middle one leave", 5, 1, []int{2}, false},
			{"70, and most leave", 7, 10, []int{0}, false},
			{"70, and most leave", 7, 10, []int{6}, false},
			{"70, and all but the middle leave", 7, 10, []int{3}, true},
		} {
			t.Run(fmt.Sprintf("%s/%s/%v stay", how, x.name, x.stay), func(t *testing.T) {
				c := newCrowd(t, n, x.workers, x.each, "both")
				served := c.check(t, "all are there", 40*x.workers)
				for _, a := range c.workers {
					// 40 a process on average: less than 8 has a chance of
					// one in ten thousand millions.
					if served[a.Name] < 8 {
						t.Errorf("%s has served %d of %d", a.Name, served[a.Name], 40*x.workers)
					}
				}
				stays := map[int]bool{}
				for _, i := range x.stay {
					stays[i] = true
				}
				for i, a := range c.workers {
					if !stays[i] {
						leave(t, a)
					}
				}
				if x.unknown && n.hook == redirect.HookSkLookup {
					for _, a := range c.AllAddrs() {
						expect(t, "none that is known is left", c.World.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)}), want{errno: "ECONNREFUSED"})
					}
					c.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
				} else {
					served := c.check(t, "some have left", 40*len(x.stay))
					if len(served) != len(x.stay) {
						t.Errorf("%v have served, %v stay", served, x.stay)
					}
					c.expectFailures(t)
				}
				// A new one, as when a proxy is reloaded, and the old ones go.
				c.start(t, "new", "both")
				c.check(t, "a new one has come", 40)
				for _, i := range x.stay {
					leave(t, c.workers[i])
				}
				if served := c.check(t, "only the new one is left", 40); len(served) != 1 || served["new"] != 40 {
					t.Errorf("%v have served", served)
				}
				leave(t, c.workers[len(c.workers)-1])
				for _, a := range c.AllAddrs() {
					expect(t, "nobody is left", c.World.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)}), want{errno: "ECONNREFUSED"})
				}
				c.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
			})
		}
	}
}

// TestPrivilegedHandOver: while the proxy's listener passes from one process to
// another again and again, the next being there before the last goes, and
// connections arrive from all sides, none is refused. A few are reset, behind
// iptables as well: the kernel can't always give what one listener has not
// accepted to another.
func TestPrivilegedHandOver(t *testing.T) {
	begin(t)
	eachHook(t, testHandOver)
}

func testHandOver(t *testing.T, n *node) {
	const connections = 2500
	// Without it a listener that closes resets all that it has not accepted.
	x := newTwins(t, n, testbed.Sysctl("net.ipv4.tcp_migrate_req", "1"))
	var wg sync.WaitGroup
	for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
		p.StartApp(t, 8080)
		workers := []*testbed.Actor{
			p.Actor(t, "even", testbed.ProxyUID, testbed.ProxyGID), p.Actor(t, "odd", testbed.ProxyUID, testbed.ProxyGID),
		}
		spec := testbed.ListenSpec{Name: "in", Addr: ap("[::]:15006"), ReusePort: true, Forget: true}
		last := workers[0].Listen(t, spec)
		done := make(chan struct{})
		handOvers := 0
		wg.Go(func() {
			for ; ; handOvers++ {
				select {
				case <-done:
					return
				default:
				}
				next := workers[(handOvers+1)%2].Listen(t, spec)
				last.Close(t)
				last = next
			}
		})
		var clients sync.WaitGroup
		var mu sync.Mutex
		outcomes := map[string]int{}
		for _, a := range p.AllAddrs() {
			clients.Go(func() {
				specs := make([]testbed.ConnectSpec, connections)
				for j := range specs {
					specs[j] = testbed.ConnectSpec{Dst: at(a, 8080), Abort: true}
				}
				for _, r := range p.World.ConnectBatch(t, specs) {
					mu.Lock()
					outcomes[r.Errno+r.Listener()]++
					mu.Unlock()
				}
			})
		}
		wg.Go(func() {
			clients.Wait()
			close(done)
		})
		defer func() {
			if p.ebpf != nil {
				p.ebpf.expectFailures(t)
			}
			for outcome, count := range outcomes {
				switch outcome {
				case "in", "ECONNRESET", testbed.ErrnoEOF:
				default:
					t.Errorf("%d connections: %s (eBPF: %v)", count, outcome, p.ebpf != nil)
				}
			}
			if outcomes["in"] < connections {
				t.Errorf("of %d connections %d were served", 2*connections, outcomes["in"])
			}
			t.Logf("eBPF: %v: %d hand-overs, %v", p.ebpf != nil, handOvers, outcomes)
		}()
	}
	wg.Wait()
}

// TestPrivilegedMPTCPListener: a listener that the kernel doesn't let into a map is
// refused, counted, and never gone around; TC serves it.
func TestPrivilegedMPTCPListener(t *testing.T) {
	begin(t)
	eachHook(t, testMPTCPListener)
}

func testMPTCPListener(t *testing.T, n *node) {
	w := testbed.NewWorld(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), twinPolicy...)
	p.StartApp(t, 8080)
	proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
	l, errno := proxy.TryListen(t, testbed.ListenSpec{Name: "in", Addr: at(netip.IPv6Unspecified(), 15006), MPTCP: true})
	if errno == "EPROTONOSUPPORT" || errno == "ENOPROTOOPT" {
		t.Skipf("no MPTCP in this kernel: %s", errno)
	}
	if errno != "" {
		t.Fatal(errno)
	}
	served := 0
	for _, a := range p.AllAddrs() {
		r := w.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)})
		switch {
		case r.Listener() == "in":
			served++
		case r.Errno != "ECONNREFUSED":
			t.Errorf("%v: %q, served by %q", a, r.Errno, r.Listener())
		}
	}
	switch {
	case n.hook == redirect.HookTC:
		if served != len(p.AllAddrs()) {
			t.Errorf("%d connections were served", served)
		}
		p.expectFailures(t)
	case served == 0:
		p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_REGISTER, bpf.ShuntPlacePLACE_LISTENER_NONE)
	}
	l.CloseAll(t)
	proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: at(netip.IPv6Unspecified(), 15006)})
	for _, a := range p.AllAddrs() {
		if r := w.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)}); r.Listener() != "in" {
			t.Errorf("%v: %q, served by %q", a, r.Errno, r.Listener())
		}
	}
}
