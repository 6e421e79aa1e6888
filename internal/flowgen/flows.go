// SPDX-License-Identifier: Apache-2.0

//go:build linux

package flowgen

import (
	"net/netip"
	"slices"
	"testing"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// A Trial is a flow that is about to be tried, and what must come of it.
type Trial struct {
	By        string // an actor of each twin
	Spec      testbed.ConnectSpec
	Connected bool // of UDP: connect, then send
	Flow      redirect.Flow
	Want      redirect.Decision

	Listener string         // who serves it: "out", "in", "dns", "tunnel", "app" or "world"
	Errno    string         // of the connect, where nobody does
	Dst      netip.AddrPort // what it asks for, as the kernel understands it
	From     netip.Addr     // its source address
	// FromLoopback: it leaves the pod, from an address of 127.0.0.0/8. The
	// kernel has no such route (__mkroute_output in net/ipv4/route.c): EINVAL,
	// before any packet is made. Connect hooks come before that.
	FromLoopback bool
}

// Trials makes n TCP flows, a quarter of them inbound, in a twin that has been
// programmed; they are the same in each.
func (s *Scene) Trials(t testing.TB, n int, in *Twin) (trials []Trial) {
	t.Helper()
	for len(trials) < n {
		if len(trials)%4 == 0 {
			trials = append(trials, s.inbound())
		} else if x, ok := s.outbound(t, in, redirect.TCP); ok {
			trials = append(trials, x)
		}
	}
	return trials
}

// Datagrams makes n outbound UDP flows to ports 53 and 54, as Trials does.
func (s *Scene) Datagrams(t testing.TB, n int, in *Twin) (trials []Trial) {
	t.Helper()
	for len(trials) < n {
		if x, ok := s.outbound(t, in, redirect.UDP); ok {
			x.Connected = s.rand.IntN(2) == 0
			trials = append(trials, x)
		}
	}
	return trials
}

// destination gives a random one, and the family of its socket.
func (s *Scene) destination() (dst netip.AddrPort, family int) {
	var local []netip.Addr
	if s.has(6) {
		local = append(local, netip.MustParseAddr("::6"))
	}
	for _, a := range []string{"127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.6", "127.0.0.7", "127.128.0.0", "127.255.255.254", "0.0.0.0", "::1", "::1", "::"} {
		local = append(local, netip.MustParseAddr(a))
	}
	for range 4 {
		local = append(local, s.Addrs...)
	}
	a := pick(s.rand, s.addrs)
	if s.rand.IntN(4) == 0 {
		a = pick(s.rand, local)
	}
	family = 4
	if a.Is6() || s.rand.IntN(3) == 0 {
		family = 6
	}
	return at(a, pick(s.rand, s.ports)), family
}

// binding gives an address to bind to before connecting to dst, or none.
func (s *Scene) binding(dst netip.Addr) (netip.Addr, bool) {
	if s.rand.IntN(3) > 0 {
		return netip.Addr{}, false
	}
	four := dst.Is4()
	list := []netip.Addr{}
	for _, text := range []string{"127.0.0.6", "127.0.0.6", "0.0.0.0", "127.0.0.1", "127.0.0.9", "::6", "::6", "::", "::1"} {
		a := netip.MustParseAddr(text)
		if a.Is4() == four && (a != netip.MustParseAddr("::6") || s.has(6)) {
			list = append(list, a)
		}
	}
	for _, a := range s.Addrs {
		if a.Is4() == four {
			list = append(list, a, a)
		}
	}
	return pick(s.rand, list), true
}

// owner gives an actor, and the ids of its socket.
func (s *Scene) owner(spec *testbed.SocketSpec) (by string, uid, gid int) {
	proxyUID, proxyGID := int(s.Policy.Proxy.UID), int(s.Policy.Proxy.GID)
	if s.rand.IntN(4) == 0 {
		uid = pick(s.rand, []int{0, proxyUID, testbed.AppUID, bogusUID})
		gid = pick(s.rand, []int{0, proxyGID, testbed.AppGID, bogusGID})
		spec.FSUID, spec.FSGID = &uid, &gid
		return ByRoot, uid, gid
	}
	switch by = pick(s.rand, []string{ByApp, ByApp, ByApp, ByApp, ByProxy, ByUIDOnly, ByGIDOnly}); by {
	case ByProxy:
		return by, proxyUID, proxyGID
	case ByUIDOnly:
		return by, proxyUID, bogusGID
	case ByGIDOnly:
		return by, bogusUID, proxyGID
	}
	return by, testbed.AppUID, testbed.AppGID
}

// outbound makes a random outbound flow; ok is false for one that can't be had
// without redirection, of which nothing can be told.
func (s *Scene) outbound(t testing.TB, in *Twin, proto redirect.Proto) (x Trial, ok bool) {
	t.Helper()
	dst, family := s.destination()
	src, bound := s.binding(dst.Addr())
	x.Spec = testbed.ConnectSpec{SocketSpec: testbed.SocketSpec{Family: family}, Abort: true}
	if bound {
		x.Spec.Bind = at(src, 0)
	}
	if proto == redirect.UDP {
		dst = at(dst.Addr(), pick(s.rand, []uint16{53, 53, 53, 54}))
		x.Spec.UDP = true
	} else {
		// Only there: of UDP sockets that all have it, the kernel gives two the
		// same port by and by, and an answer goes to the wrong one.
		x.Spec.ReuseAddr = bound
		x.Spec.BindNoPort = bound && s.rand.IntN(2) == 0
		x.Spec.Nonblock = s.rand.IntN(4) == 0
	}
	x.Spec.Dst = dst
	by, uid, gid := s.owner(&x.Spec.SocketSpec)
	x.By = by

	// What the kernel makes of it, redirection apart.
	effective, from := dst.Addr(), src
	if bound && src.IsUnspecified() {
		from = netip.Addr{}
	}
	switch {
	case effective == netip.IPv4Unspecified() && from.IsValid():
		effective = from
	case effective == netip.IPv4Unspecified():
		effective = netip.MustParseAddr("127.0.0.1")
	case effective == netip.IPv6Unspecified():
		effective = netip.IPv6Loopback()
	}
	way := s.route(t, in, effective)
	if !from.IsValid() {
		from = way.src
	}

	x.Flow = redirect.Flow{Proto: proto, Src: src, Dst: dst, UID: uint32(uid), GID: uint32(gid), Interface: way.iface, PodAddrs: s.Addrs}
	if family == 6 && dst.Addr().Is4() {
		x.Flow.Dst = at(netip.AddrFrom16(dst.Addr().As16()), dst.Port())
	}
	x.FromLoopback = from.Is4() && from.IsLoopback() && way.iface != "lo"
	s.expect(&x, at(effective, dst.Port()), from)
	if x.Want.Verdict == redirect.VerdictDirect && x.Listener == "world" {
		if x.FromLoopback {
			x.Errno = "EINVAL"
		}
		// IPv6 does send from loopback, and nobody answers.
		return x, from != netip.IPv6Loopback() && from != netip.MustParseAddr("::6")
	}
	// The reset that the pod's address sends to ::1 does not arrive.
	lost := x.Want.Verdict == redirect.VerdictDirect && x.Errno != "" && from == netip.IPv6Loopback() && effective != from
	return x, !lost
}

// route asks the kernel of a twin for the way it takes to a.
func (s *Scene) route(t testing.TB, in *Twin, a netip.Addr) route {
	t.Helper()
	if r, ok := s.sources[a]; ok {
		return r
	}
	routes, err := in.Netlink().RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		t.Fatalf("route to %v: %v, %v", a, routes, err)
	}
	link, err := in.Netlink().LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		t.Fatalf("route to %v: %v", a, err)
	}
	src, _ := netip.AddrFromSlice(routes[0].Src)
	s.sources[a] = route{src.Unmap(), link.Attrs().Name}
	return s.sources[a]
}

// expect says what must come of a flow.
func (s *Scene) expect(x *Trial, dst netip.AddrPort, from netip.Addr) {
	x.Want = s.Policy.Decide(x.Flow)
	x.Dst, x.From, x.Listener = dst, from, s.listener(x.Want.Verdict, dst)
	if x.Flow.Proto == redirect.TCP && (x.Listener == s.Closed || x.Listener == "app" && slices.Contains(s.silent, dst.Port())) {
		x.Listener, x.Errno = "", "ECONNREFUSED"
	}
}

// listener says who is to serve a flow.
func (s *Scene) listener(v redirect.Verdict, dst netip.AddrPort) string {
	x, a := s.Policy.Proxy, dst.Addr()
	if v == redirect.VerdictDirect {
		if !a.IsLoopback() && a != netip.MustParseAddr("::6") && !slices.Contains(s.Addrs, a) {
			return "world"
		}
		switch dst.Port() {
		case x.OutboundPort:
			v = redirect.VerdictOutbound
		case x.InboundPort:
			v = redirect.VerdictInbound
		case x.DNSPort:
			v = redirect.VerdictDNS
		case x.TunnelPort:
			return "tunnel"
		default:
			return "app"
		}
	}
	return map[redirect.Verdict]string{redirect.VerdictOutbound: "out", redirect.VerdictInbound: "in", redirect.VerdictDNS: "dns"}[v]
}

// ofProxy says whether the proxy listens on a port, or would.
func (s *Scene) ofProxy(port uint16) bool {
	x := s.Policy.Proxy
	return slices.Contains([]uint16{x.OutboundPort, x.InboundPort, x.TunnelPort, x.DNSPort}, port)
}

// inbound makes a random flow from the world. It comes by the interface that
// has the address.
func (s *Scene) inbound() (x Trial) {
	dst := at(pick(s.rand, s.Addrs), pick(s.rand, s.ports))
	list := []string{"10.99.0.1", "8.8.8.8", "203.0.113.77", "192.168.1.1"}
	if dst.Addr().Is6() {
		list = []string{"fd99::1", "2001:db8::5", "fd99::7777", "2600::1"}
	}
	src := netip.MustParseAddr(pick(s.rand, list))
	x.By = ByWorld
	x.Spec = testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(src, 0), ReuseAddr: true}}
	x.Flow = redirect.Flow{Direction: redirect.Inbound, Src: src, Dst: dst, Interface: s.interfaces[dst.Addr()], PodAddrs: s.Addrs}
	s.expect(&x, dst, src)
	return x
}
