// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
)

// patience is the timeout of a connect of which it is not known whether it will
// be answered.
const patience = 400 * time.Millisecond

// expand puts a pod's addresses for A4, A6, B4 and B6: its first and its last
// of each family.
func expand(p *testbed.Pod, s string) netip.AddrPort {
	if s == "" {
		return netip.AddrPort{}
	}
	last := map[bool]netip.Addr{}
	for _, a := range p.AllAddrs() {
		last[a.Is4()] = a
	}
	return ap(strings.NewReplacer("A4", p.Addr4().String(), "A6", p.Addr6().String(),
		"B4", last[true].String(), "B6", last[false].String()).Replace(s))
}

// sourceCases are flows whose source address is to be as behind iptables.
var sourceCases = []struct {
	name, bind, dst string
	family          int
	// The source is a loopback address that nothing leaves the pod from.
	// Over IPv4 the kernel refuses that before iptables sees a packet, where
	// eBPF gives the proxy what the app bound.
	martian bool
}{
	{name: "unbound", dst: "10.99.1.1:80"},
	{name: "unbound", dst: "[fd99::5]:80"},
	{name: "unbound, mapped", dst: "10.99.1.1:80", family: 6},
	{name: "unbound, towards the second network", dst: "10.96.0.1:80"},
	{name: "unbound, towards the second network", dst: "[2001:db8:1::5]:80"},
	{name: "unbound, excluded", dst: "10.97.1.1:80"},
	{name: "unbound, local", dst: "127.0.0.1:8080"},
	{name: "unbound, local", dst: "[::1]:8080"},
	{name: "unbound, local", dst: "127.1.2.3:8080"},
	{name: "unbound, local", dst: "A4:8080"},
	{name: "unbound, local", dst: "[A6]:8080"},
	{name: "unbound, local", dst: "B4:8080"},
	{name: "unbound, local", dst: "[B6]:8080"},
	{name: "unbound, unspecified", dst: "0.0.0.0:8080"},
	{name: "unbound, unspecified", dst: "[::]:8080"},
	{name: "unbound, mapped unspecified", dst: "0.0.0.0:8080", family: 6},
	{name: "address, any port", bind: "A4:0", dst: "10.99.1.1:80"},
	{name: "address, any port", bind: "[A6]:0", dst: "[fd99::5]:80"},
	{name: "address, any port, mapped", bind: "A4:0", dst: "10.99.1.1:80", family: 6},
	{name: "address and port", bind: "A4:5001", dst: "10.99.1.1:80"},
	{name: "address and port", bind: "[A6]:5001", dst: "[fd99::5]:80"},
	{name: "address and port, local", bind: "A4:5002", dst: "A4:8080"},
	{name: "second address", bind: "B4:5003", dst: "10.99.1.1:80"},
	{name: "second address", bind: "[B6]:5003", dst: "[fd99::5]:80"},
	{name: "wildcard and port", bind: "0.0.0.0:5004", dst: "10.99.1.1:80"},
	{name: "wildcard and port", bind: "[::]:5004", dst: "[fd99::5]:80"},
	{name: "wildcard and port, mapped", bind: "[::]:5005", dst: "10.99.1.1:80", family: 6},
	{name: "wildcard and port, mapped wildcard", bind: "0.0.0.0:5006", dst: "10.99.1.1:80", family: 6},
	{name: "wildcard and port, second network", bind: "0.0.0.0:5007", dst: "10.96.0.1:80"},
	{name: "wildcard and port, second network", bind: "[::]:5007", dst: "[2001:db8:1::5]:80"},
	{name: "wildcard and port, local", bind: "0.0.0.0:5008", dst: "127.0.0.1:8080"},
	{name: "wildcard and port, excluded", bind: "0.0.0.0:5009", dst: "10.97.0.1:80"},
	{name: "wildcard, any port", bind: "0.0.0.0:0", dst: "10.99.1.1:80"},
	{name: "wildcard, any port", bind: "[::]:0", dst: "[fd99::5]:80"},
	{name: "loopback", bind: "127.0.0.1:5010", dst: "10.99.1.1:80", martian: true},
	{name: "loopback", bind: "[::1]:5010", dst: "[fd99::5]:80", martian: true},
	{name: "loopback, second", bind: "127.0.0.9:5011", dst: "10.99.1.1:80", martian: true},
	{name: "loopback, mapped", bind: "127.0.0.1:5012", dst: "10.99.1.1:80", family: 6, martian: true},
	{name: "S6", bind: "127.0.0.6:5013", dst: "10.99.1.1:80", martian: true},
	{name: "S6", bind: "[::6]:5013", dst: "[fd99::5]:80", martian: true},
	{name: "S6, local", bind: "127.0.0.6:5014", dst: "A4:8080"},
	{name: "S6, local", bind: "[::6]:5014", dst: "[A6]:8080"},
	{name: "S6, to S6", dst: "[::6]:8080"},
	{name: "unspecified, bound", bind: "A4:5015", dst: "0.0.0.0:8080"},
	{name: "unspecified, bound", bind: "[A6]:5015", dst: "[::]:8080"},
}

// TestPrivilegedSourceAddress: the proxy sees the peer address that it sees
// behind iptables, whatever the socket was bound to before, in pods with one
// address of a family and with several.
func TestPrivilegedSourceAddress(t *testing.T) {
	begin(t)
	n := newNode(t)
	for _, pods := range []struct {
		name string
		opts []testbed.Option
	}{
		{"one address", nil},
		{"two on an interface", []testbed.Option{testbed.Addrs("10.244.3.1", "10.244.3.2", "fd10:3::1", "fd10:3::2")}},
		{"two on an interface, of other networks", []testbed.Option{testbed.Addrs("10.244.3.9", "10.98.3.2", "2001:db8:2::1", "fd99:3::2")}},
		{"one on each of two", []testbed.Option{
			testbed.Addrs("10.244.3.1", "fd10:3::1"),
			testbed.Interface("net1", []string{"10.245.3.2", "fd11:3::2"}, []string{"10.96.0.0/13", "2001:db8:1::/48"}),
		}},
	} {
		t.Run(pods.name, func(t *testing.T) {
			x := newTwins(t, n, pods.opts...).withCast(t)
			for i, c := range sourceCases {
				for _, who := range []string{"app", "proxy"} {
					if c.martian && who == "proxy" {
						continue // direct: nobody answers
					}
					name := fmt.Sprintf("%s/%s/%s to %s by the %s", c.name, map[int]string{0: "own", 6: "mapped"}[c.family], c.bind, c.dst, who)
					compare(t, x, name, func(t *testing.T, p *twin) seen {
						spec := testbed.ConnectSpec{Dst: expand(p.Pod, c.dst), Abort: true, Timeout: patience}
						spec.Family, spec.ReuseAddr, spec.Bind = c.family, true, expand(p.Pod, c.bind)
						if port := spec.Bind.Port(); port != 0 && who == "proxy" {
							spec.Bind = at(spec.Bind.Addr(), port+uint16(1000+i))
						}
						actor := p.app.Actor
						if who == "proxy" {
							actor = p.proxy.Actor
						}
						s := likeness(spec, actor.Connect(t, spec))
						if c.martian && spec.Dst.Addr().Is4() && p.ebpf == nil {
							if diff := cmp.Diff(seen{Errno: "EINVAL", Step: testbed.StepConnect}, s); diff != "" {
								t.Errorf("behind iptables (-want +got):\n%s", diff)
							}
							src := spec.Bind.String()
							s = seen{Listener: "out", ServerPeer: src, ClientLocal: src, ClientPeer: c.dst, Original4: c.dst}
						}
						return s
					})
				}
			}
			x.behindEBPF.ebpf.expectFailures(t)
		})
	}
}

// TestPrivilegedConnectAgain: connect(AF_UNSPEC) and connect again, and a
// connect after one that failed, follow the table each time, and from the same
// source address as behind iptables.
func TestPrivilegedConnectAgain(t *testing.T) {
	begin(t)
	n := newNode(t)
	const (
		redirected, redirected2, second = "10.99.1.1:80", "10.99.2.2:443", "10.96.0.1:80"
		excluded, local, own            = "10.97.1.1:80", "127.0.0.1:8080", "A4:8080"
		redirected6, excluded6, local6  = "[fd99::5]:80", "[fd97::5]:80", "[::1]:8080"
		other6                          = "[2001:db8:1::5]:80"
	)
	x := newTwins(t, n, testbed.Addrs("10.244.3.1", "fd10:3::1"),
		testbed.Interface("net1", []string{"10.245.3.2", "fd11:3::2"}, []string{"10.96.0.0/13", "2001:db8:1::/48"})).withCast(t)
	for _, c := range []struct {
		bind   string
		family int
		dsts   []string
	}{
		{dsts: []string{redirected, redirected2, redirected}},
		{dsts: []string{redirected, excluded, redirected}},
		{dsts: []string{redirected, local, redirected, own, redirected}},
		{dsts: []string{local, redirected, local}},
		{dsts: []string{redirected, second, redirected2, local, second}},
		{dsts: []string{redirected6, excluded6, local6, redirected6, other6, local6}},
		// Not from one family to the other: a socket that was mapped once
		// gets no further over IPv6, whatever lies in between.
		{dsts: []string{redirected, local, redirected2, excluded, redirected}, family: 6},
		{dsts: []string{redirected, "0.0.0.0:8080", redirected}},
		{dsts: []string{redirected, redirected2, local}, bind: "A4:0"},
		{dsts: []string{redirected, redirected2, local}, bind: "A4:5100"},
		{dsts: []string{redirected, local, redirected2, excluded}, bind: "0.0.0.0:5101"},
		{dsts: []string{redirected6, local6, excluded6}, bind: "[::]:5102"},
	} {
		for _, disconnect := range []string{"AF_UNSPEC", "failed"} {
			compare(t, x, fmt.Sprintf("%s/family %d/%s/%s", disconnect, c.family, c.bind, strings.Join(c.dsts, " ")), func(t *testing.T, p *twin) (all []seen) {
				spec := testbed.SocketSpec{Family: c.family, ReuseAddr: true}
				if spec.Family == 0 {
					spec.Family = familyOf(expand(p.Pod, c.dsts[0]).Addr())
				}
				if c.bind != "" {
					spec.Bind = expand(p.Pod, c.bind)
				}
				sock := p.app.Socket(t, spec)
				defer p.app.Close(t, sock)
				for i, dst := range c.dsts {
					if disconnect == "failed" {
						// Nobody listens: the kernel's refusal, or the world's.
						dead := at(expand(p.Pod, dst).Addr(), 1)
						for _, l := range p.proxy.Out {
							l.Close(t)
						}
						r := p.app.Connect(t, testbed.ConnectSpec{Sock: sock, Dst: dead, SocketSpec: spec, Timeout: patience, NoGreeting: true})
						all = append(all, likeness(testbed.ConnectSpec{SocketSpec: spec}, r))
						p.proxy.Out = []*testbed.Listener{p.proxy.Listen(t, testbed.ListenSpec{Name: "out", Addr: ap("[::]:15001")})}
						if r.Errno == "" { // direct to the world, which answers everywhere
							p.app.Disconnect(t, sock)
						}
					}
					last := testbed.ConnectSpec{Sock: sock, Dst: expand(p.Pod, dst), SocketSpec: spec, Timeout: patience}
					r := p.app.Connect(t, last)
					s := likeness(last, r)
					// Connection tracking may change the port, so that two
					// connections of one are still two.
					s.ServerPeer = host(s.ServerPeer)
					all = append(all, s)
					if i < len(c.dsts)-1 {
						if r.Served != nil {
							p.app.Linger0(t, sock)
						}
						if errno := p.app.Disconnect(t, sock); errno != "" {
							all = append(all, seen{Errno: errno, Step: "disconnect"})
						}
					}
				}
				return all
			})
		}
	}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

// TestPrivilegedFamilies: pods of one family. A destination of the other gives
// the error that it gives behind iptables.
func TestPrivilegedFamilies(t *testing.T) {
	begin(t)
	n := newNode(t)
	const redirected6 = "[fd99::5]:80"
	for name, opt := range map[string]testbed.Option{"IPv4": testbed.V4Only(), "IPv6": testbed.V6Only(), "no IPv6": testbed.NoIPv6()} {
		t.Run(name, func(t *testing.T) {
			x := newTwins(t, n, opt).withCast(t)
			outcomes := map[string]seen{}
			for _, c := range []struct {
				dst    string
				family int
			}{
				{"10.99.1.1:80", 4},
				{"10.99.1.1:80", 6},
				{"10.97.1.1:80", 4},
				{redirected6, 6},
				{"[fd97::5]:80", 6},
				{"127.0.0.1:8080", 4},
				{"127.0.0.1:8080", 6},
				{"[::1]:8080", 6},
				{"0.0.0.0:8080", 4},
				{"[::]:8080", 6},
				{"[::6]:8080", 6},
			} {
				for _, bind := range []string{"", "wildcard"} {
					key := fmt.Sprint(c.dst, " ", c.family, bind)
					outcomes[key] = compare(t, x, key, func(t *testing.T, p *twin) seen {
						spec := testbed.ConnectSpec{Dst: ap(c.dst), Abort: true, Timeout: patience}
						spec.Family = c.family
						if bind != "" {
							spec.ReuseAddr = true
							spec.Bind = ap(map[int]string{4: "0.0.0.0:5200", 6: "[::]:5200"}[c.family])
						}
						s := likeness(spec, p.app.Connect(t, spec))
						if name == "no IPv6" && c.dst == redirected6 && s.Errno == "EADDRNOTAVAIL" && p.ebpf == nil {
							// Where IPv6 is switched off, the kernel's own
							// error is another one than without a route;
							// ours is the same in both.
							s.Errno = "ENETUNREACH"
						}
						return s
					})
				}
			}
			switch name {
			case "IPv4":
				if got := outcomes[redirected6+" 6"].Errno; got != "ENETUNREACH" {
					t.Errorf("IPv6 in a pod without gives %q", got)
				}
			case "IPv6":
				if got := outcomes["10.99.1.1:80 4"].Errno; got != "ENETUNREACH" {
					t.Errorf("IPv4 in a pod without gives %q", got)
				}
			}
			for port, listener := range map[uint16]string{8080: "in", 8081: "app"} {
				for _, a := range x.behindEBPF.AllAddrs() {
					got := compare(t, x, fmt.Sprint("inbound ", at(a, port)), func(t *testing.T, p *twin) seen {
						spec := testbed.ConnectSpec{Dst: at(a, port), Abort: true}
						return likeness(spec, p.World.Connect(t, spec))
					})
					if diff := cmp.Diff(listener, got.Listener); diff != "" {
						t.Error(diff)
					}
				}
			}
		})
	}
}
