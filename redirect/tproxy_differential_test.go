// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

const defaultTProxyFlows = 1500

func servesTProxy(can flowgen.Features) bool { return can.TProxy }

// TestPrivilegedTProxyDifferential compares the backends that serve TPROXY:
// random policies and flows in that mode. Of what is for the proxy's inbound
// port, the accepted socket must have both addresses as they were.
func TestPrivilegedTProxyDifferential(t *testing.T) {
	begin(t)
	play(t, nodes(t, servesTProxy), defaultTProxyFlows, flowsPerScene, []flowgen.Wish{flowgen.TProxy}, func(t *testing.T, p *production) []redirect.Decision {
		return compare(t, p, p.scene.Trials(t, flowsPerScene, p.twins[0]))
	})
}

// TestPrivilegedTProxyClients: the proxy connects to its app from the address,
// and the port, of a client whose connection it has; both go on.
func TestPrivilegedTProxyClients(t *testing.T) {
	begin(t)
	const marked = iptables.Mark
	dialogues := map[string][]string{} // of the first backend
	for _, n := range nodes(t, servesTProxy) {
		p := n.pod(t, []testbed.PodMutator{
			testbed.Annotate("sidecar.istio.io/interceptionMode", "TPROXY"),
			testbed.Annotate("traffic.sidecar.istio.io/includeInboundPorts", "*"),
			testbed.Annotate("traffic.sidecar.istio.io/excludeInboundPorts", "8081"),
		}, testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
			testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = l.Name == "in" }))
		for _, own := range p.AllAddrs() {
			family := fmt.Sprintf("IPv%d", familyOf(own))
			t.Run(n.name+"/"+family, func(t *testing.T) {
				source, lo, out := ap("203.0.113.77:40404"), netip.MustParseAddr("127.0.0.1"), ap("10.99.1.1:80")
				if own.Is6() {
					source, lo, out = ap("[2001:db8::77]:40404"), netip.IPv6Loopback(), ap("[fd99::5]:80")
				}
				spec := func(dst netip.AddrPort, mark int) testbed.ConnectSpec {
					return testbed.ConnectSpec{Dst: dst, Keep: true, SocketSpec: testbed.SocketSpec{Bind: source, ReuseAddr: true, Transparent: true, Mark: mark}}
				}
				var got []string
				// Each connection says who has it, and is used.
				use := func(what, by string, s testbed.ConnectSpec) testbed.ConnectResult {
					t.Helper()
					r := p.who(by).Connect(t, s)
					line := fmt.Sprintf("%s: %s %s", what, r.Errno, r.Listener())
					if r.Served != nil {
						line += fmt.Sprintf(", from %s to %s", plain(r.Served.Peer), plain(r.Served.Local))
						if r.Listener() == "in" {
							line += ", for " + r.Served.OrigDst().Addr.String()
						}
						line += say(t, p.who(by), r.Sock)
					}
					got = append(got, line)
					return r
				}
				leave := func(by string, r testbed.ConnectResult) {
					if r.Served != nil {
						p.who(by).Linger0(t, r.Sock)
					}
					p.who(by).Close(t, r.Sock)
				}
				ended := func(what, by string, s testbed.ConnectSpec) { leave(by, use(what, by, s)) }

				client := use("client", flowgen.ByWorld, spec(at(own, 8080), 0))
				ended("client, excluded port", flowgen.ByWorld, spec(at(own, 8081), 0))
				ended("proxy to its app", flowgen.ByProxy, spec(at(lo, 8080), 0))
				ended("proxy to its app, marked", flowgen.ByProxy, spec(at(lo, 8080), marked))
				ended("proxy to its app's address, marked", flowgen.ByProxy, spec(at(own, 8081), marked))
				ended("proxy to a closed port", flowgen.ByProxy, spec(at(lo, 9), 0))
				ended("proxy to a closed port, marked", flowgen.ByProxy, spec(at(own, 9), marked))
				got = append(got, "client, still:"+say(t, p.who(flowgen.ByWorld), client.Sock))
				leave(flowgen.ByWorld, client)
				// From the port that the proxy has used meanwhile.
				client = use("client, again", flowgen.ByWorld, spec(at(own, 8080), 0))
				leave(flowgen.ByWorld, client)
				for _, by := range []string{flowgen.ByApp, flowgen.ByProxy} {
					r := p.who(by).Connect(t, testbed.ConnectSpec{Dst: out, Abort: true})
					got = append(got, fmt.Sprintf("%s, outbound: %s %s at %s, %s", by, r.Errno, r.Listener(), plain(r.Peer), addr(r.Served.Peer)))
				}

				through := func(who, to, orig string) string {
					line := fmt.Sprintf("%s, from %v to %s", who, source, to)
					if orig != "" {
						line += ", for " + orig
					}
					return line + ", answered, answered, answered"
				}
				service, other, local := at(own, 8080).String(), at(own, 8081).String(), at(lo, 8080).String()
				want := []string{
					"client:  " + through("in", service, service),
					"client, excluded port:  " + through("app", other, ""),
					"proxy to its app:  " + through("app", local, ""),
					"proxy to its app, marked:  " + through("app", local, ""),
					"proxy to its app's address, marked:  " + through("app", other, ""),
					"proxy to a closed port: ECONNREFUSED ",
					"proxy to a closed port, marked: ECONNREFUSED ",
					"client, still:, answered, answered, answered",
					"client, again:  " + through("in", service, service),
					fmt.Sprintf("app, outbound:  out at %v, %v", out, own),
					fmt.Sprintf("proxy, outbound:  world at %v, %v", out, own),
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if first, ok := dialogues[family]; !ok {
					dialogues[family] = got
				} else if diff := cmp.Diff(first, got); diff != "" {
					t.Errorf("(-another backend +this one):\n%s", diff)
				}
			})
		}
	}
}

// say sends three lines, which are sent back, and tells what has come.
func say(t testing.TB, by *testbed.Actor, sock int) (log string) {
	t.Helper()
	for i := range 3 {
		line := fmt.Sprintf("line %d", i)
		errno := by.Send(t, sock, line+"\n")
		back := ""
		if errno == "" {
			back, errno = by.RecvLine(t, sock, 0)
		}
		if back == line && errno == "" {
			log += ", answered"
		} else {
			log += fmt.Sprintf(", %q (%s)", back, errno)
		}
	}
	return log
}
