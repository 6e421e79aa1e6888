// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/internal/tproxy"
	"shunt.dev/shunt/redirect"
)

// tproxyPolicy is TPROXY mode with all ports but one.
var tproxyPolicy = []testbed.PodMutator{
	testbed.Annotate("sidecar.istio.io/interceptionMode", "TPROXY"),
	testbed.Annotate(includeInbound, "*"),
	testbed.Annotate(excludeInbound, "8081"),
}

// transparentProxy starts a proxy that may take and give any address. Its
// listener is transparent, as TPROXY wants it, or not: here it need not be.
func transparentProxy(t testing.TB, p *testbed.Pod, transparent bool) *testbed.Proxy {
	t.Helper()
	return p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID,
		testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
		testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = transparent && l.Name == "in" }))
}

// TestPrivilegedTProxy: inbound connections keep both addresses, and those
// that the proxy makes to its app from the client's address work. It is the
// test of the iptables backend, word by word.
func TestPrivilegedTProxy(t *testing.T) {
	begin(t)
	for _, transparent := range []bool{true, false} {
		t.Run(fmt.Sprintf("transparent listener %v", transparent), func(t *testing.T) {
			n := newNode(t)
			w := testbed.NewWorld(t)
			w.ServeAll(t)
			p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), tproxyPolicy...)
			proxy := transparentProxy(t, p.Pod, transparent)
			app := p.StartApp(t, 8080, 8081)
			for _, family := range []string{"IPv4", "IPv6"} {
				client, own, lo, out := netip.MustParseAddr("203.0.113.77"), p.Addr4(), netip.MustParseAddr("127.0.0.1"), "10.99.1.1:80"
				if family == "IPv6" {
					client, own, lo, out = netip.MustParseAddr("2001:db8::77"), p.Addr6(), netip.IPv6Loopback(), "[fd99::5]:80"
				}
				t.Run(family, func(t *testing.T) {
					from := func(port uint16, dst netip.AddrPort) testbed.ConnectSpec {
						return testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(client, port), ReuseAddr: true}}
					}
					r := w.Connect(t, from(0, at(own, 8080)))
					expect(t, "inbound", r, want{listener: "in", dst: at(own, 8080), from: client})
					if r.Served != nil && (plain(r.Served.Local) != at(own, 8080).String() || plain(r.Served.Peer) != at(client, r.Local.Port()).String()) {
						t.Errorf("the accepted socket has the addresses %v and %v", r.Served.Local, r.Served.Peer)
					}
					expect(t, "inbound to an excluded port", w.Connect(t, from(0, at(own, 8081))), want{listener: "app", dst: at(own, 8081), from: client})
					expect(t, "outbound", app.Dial(t, out), want{listener: "out", dst: ap(out), from: own})
					expect(t, "the proxy, outbound", proxy.Dial(t, out), want{listener: "world", dst: ap(out), from: own})
					// What has been sent is answered, both ways, for a while.
					keep := from(0, at(own, 8080))
					keep.Keep, keep.Abort = true, false
					k := w.Connect(t, keep)
					exchange := func() {
						t.Helper()
						for i := range 5 {
							line := fmt.Sprintf("line %d", i)
							if errno := w.Send(t, k.Sock, line+"\n"); errno != "" {
								t.Fatalf("send: %s", errno)
							}
							if got, errno := w.RecvLine(t, k.Sock, 0); got != line || errno != "" {
								t.Fatalf("received %q, %s", got, errno)
							}
						}
					}
					exchange()
					// With the client's own port, while that connection lives.
					port := k.Local.Port()
					spoof := func(mark int, dst netip.AddrPort) testbed.ConnectSpec {
						spec := from(port, dst)
						spec.Transparent, spec.Mark = true, mark
						return spec
					}
					for _, c := range []struct {
						what     string
						mark     int
						dst      netip.AddrPort
						listener string
						rule     redirect.Rule
					}{
						{"the proxy to the app at loopback", 0, at(lo, 8080), "app", redirect.RuleOutProxy},
						{"the same, marked", tproxy.Mark, at(lo, 8080), "app", redirect.RuleOutPassthrough},
						{"the proxy to its own service", 0, at(own, 8081), "in", redirect.RuleOutProxyToSelf},
						{"the proxy to the app at the pod's address, marked", tproxy.Mark, at(own, 8081), "app", redirect.RuleOutPassthrough},
					} {
						before := p.rules(t)
						expect(t, c.what, proxy.Connect(t, spoof(c.mark, c.dst)), want{listener: c.listener, dst: c.dst, from: client})
						if d := p.rules(t).since(before); len(d) != 1 || d[c.rule] != 1 {
							t.Errorf("%s: decided by %v", c.what, d)
						}
					}
					// From another port to the very port that is redirected: the
					// connection is the app's, though the client's own would be
					// the proxy's.
					spec := spoof(tproxy.Mark, at(own, 8080))
					spec.Bind = at(client, 0)
					expect(t, "the proxy to the app at a redirected port", proxy.Connect(t, spec), want{listener: "app", dst: at(own, 8080), from: client})
					if family == "IPv4" {
						spec.Family = 6
						spec.Bind = at(client, 0)
						expect(t, "the same, mapped", proxy.Connect(t, spec), want{listener: "app", dst: at(own, 8080), from: client})
					}
					for _, dst := range []netip.AddrPort{at(lo, 9), at(own, 9)} {
						r := proxy.Connect(t, spoof(tproxy.Mark, dst))
						if r.Errno != "ECONNREFUSED" || !r.AtOnce() {
							t.Errorf("the proxy to a closed port %v: %s after %v", dst, r.Errno, r.Elapsed)
						}
					}
					// The same socket elsewhere, afterwards: as if nothing had been.
					again := proxy.Socket(t, testbed.SocketSpec{Bind: at(client, 0), Transparent: true})
					for _, dst := range []netip.AddrPort{at(own, 9), at(own, 8081)} {
						r := proxy.Connect(t, testbed.ConnectSpec{Sock: again, Dst: dst, Keep: true})
						if dst.Port() != 9 {
							expect(t, "the proxy to its own service, again", r, want{listener: "in", dst: dst, from: client})
						}
						proxy.Disconnect(t, again)
					}
					if r := proxy.Connect(t, testbed.ConnectSpec{Sock: again, Dst: ap(out)}); r.Errno != "EPERM" {
						t.Errorf("a socket that is bound to lo, to the outside: %+v", see(r))
					}
					proxy.Close(t, again)
					exchange()
					w.Close(t, k.Sock)
				})
			}
			p.expectFailures(t, bpf.ShuntPlacePLACE_CONNECT_TPROXY)
		})
	}
}

// TestPrivilegedTProxyListener: without a listener the client is refused at once.
func TestPrivilegedTProxyListener(t *testing.T) {
	begin(t)
	n := newNode(t)
	p := n.redirect(t, testbed.NewPod(t), tproxyPolicy...)
	p.StartApp(t, 8080)
	for _, a := range p.AllAddrs() {
		r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)})
		if r.Errno != "ECONNREFUSED" || !r.AtOnce() {
			t.Errorf("to %v without a proxy: %s after %v", a, r.Errno, r.Elapsed)
		}
	}
}

// netnsState is all that TPROXY mode changes in a network namespace.
func netnsState(t testing.TB, p *testbed.Pod) string {
	t.Helper()
	var b strings.Builder
	for _, argv := range [][]string{{"ip", "rule"}, {"ip", "-6", "rule"}, {"ip", "route", "show", "table", "all"}, {"ip", "-6", "route", "show", "table", "all"}} {
		for line := range strings.Lines(p.Command(t, argv...)) {
			if !strings.Contains(line, "::6 ") { // S6 stays
				b.WriteString(line)
			}
		}
	}
	err := p.Do(func() error {
		for _, key := range []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"} {
			v, err := os.ReadFile("/proc/sys/net/" + key)
			if err != nil {
				return err
			}
			b.WriteString(key + " " + string(v))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestPrivilegedTProxyNetns: what TPROXY mode changes in the namespace is there
// once, is mended, goes with the mode, and goes with the attachment.
func TestPrivilegedTProxyNetns(t *testing.T) {
	begin(t)
	n := newNode(t)
	k := testbed.NewPod(t, testbed.Sysctl("net.ipv4.fwmark_reflect", "1"))
	before := netnsState(t, k)
	p := n.redirect(t, k, tproxyPolicy...)
	apply := func(mode redirect.Mode) {
		t.Helper()
		policy := *p.policy
		policy.Mode = mode
		if err := n.Apply(t.Context(), p.target, &policy); err != nil {
			t.Fatal(err)
		}
		if err := n.Check(t.Context(), p.target); err != nil {
			t.Error(err)
		}
	}
	with := netnsState(t, k)
	if with == before {
		t.Fatal("nothing has changed")
	}
	apply(redirect.ModeTProxy)
	if got := netnsState(t, k); got != with {
		t.Errorf("applied again:\n%s", got)
	}
	for _, argv := range [][]string{
		{"ip", "rule", "del", "fwmark", "0x539"},
		{"ip", "-6", "route", "flush", "table", "133"},
		{"ip", "rule", "add", "fwmark", "0x539", "table", "133", "pref", "7"},
	} {
		p.Command(t, argv...)
		if err := n.Check(t.Context(), p.target); err == nil {
			t.Errorf("check finds nothing wrong after %q", argv)
		}
		if argv[2] == "add" {
			p.Command(t, "ip", "rule", "del", "pref", "7")
		}
		apply(redirect.ModeTProxy)
		if got := netnsState(t, k); got != with {
			t.Errorf("mended after %q:\n%s", argv, got)
		}
	}
	apply(redirect.ModeRedirect)
	if got := netnsState(t, k); got != before {
		t.Errorf("in another mode:\n%s\nwant\n%s", got, before)
	}
	apply(redirect.ModeTProxy)
	p.remove(t)
	if got := netnsState(t, k); got != before {
		t.Errorf("removed:\n%s\nwant\n%s", got, before)
	}
}
