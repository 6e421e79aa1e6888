// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// transparentProxy starts a proxy that may take and give any address.
func transparentProxy(t testing.TB, p *pod, opts ...testbed.ProxyOption) *testbed.Proxy {
	t.Helper()
	return p.StartProxy(t, int(p.policy.Proxy.UID), int(p.policy.Proxy.GID), append(opts,
		testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
		testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = l.Name == "in" }))...)
}

// TestPrivilegedTProxy: inbound connections keep both addresses, and those
// that the proxy makes to its app from the client's address work.
func TestPrivilegedTProxy(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		w := testbed.NewWorld(t)
		w.ServeAll(t)
		p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), annotations(interceptionMode, "TPROXY", includeInbound, "*", excludeInbound, "8081")...)
		proxy := transparentProxy(t, p)
		app := p.StartApp(t, 8080, 8081)
		for _, f := range []Family{IPv4, IPv6} {
			client, own, lo, out := netip.MustParseAddr("203.0.113.77"), p.Addr4(), netip.MustParseAddr("127.0.0.1"), "10.99.1.1:80"
			if f == IPv6 {
				client, own, lo, out = netip.MustParseAddr("2001:db8::77"), p.Addr6(), netip.IPv6Loopback(), "[fd99::5]:80"
			}
			t.Run(f.String(), func(t *testing.T) {
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
				for i := range 5 {
					line := fmt.Sprintf("line %d", i)
					if errno := w.Send(t, k.Sock, line+"\n"); errno != "" {
						t.Fatalf("send: %s", errno)
					}
					if got, errno := w.RecvLine(t, k.Sock, 0); got != line || errno != "" {
						t.Fatalf("received %q, %s", got, errno)
					}
				}
				// With the client's own port, while that connection lives.
				port := k.Local.Port()
				spoof := func(mark int, dst netip.AddrPort) testbed.ConnectResult {
					t.Helper()
					spec := from(port, dst)
					spec.Transparent, spec.Mark = true, mark
					return proxy.Connect(t, spec)
				}
				expect(t, "the proxy to the app at loopback", spoof(0, at(lo, 8080)), want{listener: "app", dst: at(lo, 8080), from: client})
				expect(t, "the same, marked", spoof(Mark, at(lo, 8080)), want{listener: "app", dst: at(lo, 8080), from: client})
				expect(t, "the proxy to its own service", spoof(0, at(own, 8081)), want{listener: "in", dst: at(own, 8081), from: client})
				expect(t, "the proxy to the app at the pod's address, marked", spoof(Mark, at(own, 8081)), want{listener: "app", dst: at(own, 8081), from: client})
				for _, dst := range []netip.AddrPort{at(lo, 9), at(own, 9)} {
					r := spoof(Mark, dst)
					if r.Errno != "ECONNREFUSED" || !r.AtOnce() {
						t.Errorf("the proxy to a closed port %v: %s after %v", dst, r.Errno, r.Elapsed)
					}
				}
				if errno := w.Send(t, k.Sock, "still\n"); errno != "" {
					t.Errorf("the client's connection: send: %s", errno)
				}
				if got, errno := w.RecvLine(t, k.Sock, 0); got != "still" || errno != "" {
					t.Errorf("the client's connection: received %q, %s", got, errno)
				}
				w.Close(t, k.Sock)
			})
		}
	})
}

// TestPrivilegedTProxyTimeWait: a client that uses its port again while the
// proxy's side is in TIME_WAIT is accepted at once.
func TestPrivilegedTProxyTimeWait(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		for _, mode := range []string{"REDIRECT", "TPROXY"} {
			p := n.redirect(t, testbed.NewPod(t), annotations(interceptionMode, mode, includeInbound, "*")...)
			p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
				testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.CloseFirst, l.Transparent = true, mode == "TPROXY" && l.Name == "in" }))
			for i := range 3 {
				r := p.World.Connect(t, testbed.ConnectSpec{
					Dst: at(p.Addr4(), 8080), AwaitClose: true,
					SocketSpec: testbed.SocketSpec{Bind: ap("203.0.113.7:40404"), ReuseAddr: true},
				})
				if r.Errno != "" || r.Listener() != "in" || !r.AtOnce() {
					t.Errorf("%s: connection %d: %s at %s, by %q after %v", mode, i, r.Errno, r.Step, r.Listener(), r.Elapsed)
				}
			}
		}
	})
}
