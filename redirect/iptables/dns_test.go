// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// udp is a UDP socket of the test's own, in some namespace and of some owner.
type udp struct {
	t  testing.TB
	fd int
}

// udpSocket opens a socket in a namespace, bound to an address.
func udpSocket(t testing.TB, in func(func() error) error, uid, gid int, bind netip.AddrPort) *udp {
	t.Helper()
	u := &udp{t, -1}
	err := in(func() (err error) {
		// in has locked the thread.
		_, _ = unix.SetfsgidRetGid(gid)
		_, _ = unix.SetfsuidRetUid(uid)
		domain := unix.AF_INET
		if bind.Addr().Is6() {
			domain = unix.AF_INET6
		}
		u.fd, err = unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		_, _ = unix.SetfsuidRetUid(0)
		_, _ = unix.SetfsgidRetGid(0)
		if err != nil {
			return err
		}
		options := [][2]int{{unix.SOL_IP, unix.IP_TRANSPARENT}}
		if bind.Port() != 0 {
			// Only there: of sockets that all have it, the kernel gives two
			// the same port by and by, and an answer goes to the wrong one.
			options = append(options, [2]int{unix.SOL_SOCKET, unix.SO_REUSEADDR})
		}
		for _, o := range options {
			if err := unix.SetsockoptInt(u.fd, o[0], o[1], 1); err != nil {
				return err
			}
		}
		if err := unix.SetsockoptTimeval(u.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}); err != nil {
			return err
		}
		return unix.Bind(u.fd, sockaddr(bind))
	})
	if err != nil {
		t.Fatalf("open UDP socket at %v: %v", bind, err)
	}
	t.Cleanup(u.close)
	return u
}

func sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if ap.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func (u *udp) close() {
	if u.fd >= 0 {
		unix.Close(u.fd)
	}
	u.fd = -1
}

func (u *udp) connect(to netip.AddrPort) {
	u.t.Helper()
	if err := unix.Connect(u.fd, sockaddr(to)); err != nil {
		u.t.Fatalf("connect to %v: %v", to, err)
	}
}

// send sends to an address, or to where the socket is connected.
func (u *udp) send(data string, to netip.AddrPort) {
	u.t.Helper()
	var err error
	if to.IsValid() {
		err = unix.Sendto(u.fd, []byte(data), 0, sockaddr(to))
	} else {
		_, err = unix.Write(u.fd, []byte(data))
	}
	if err != nil {
		u.t.Fatalf("send %q to %v: %v", data, to, err)
	}
}

// recv receives what is to come.
func (u *udp) recv() (string, netip.AddrPort) {
	u.t.Helper()
	buf := make([]byte, 512)
	for {
		n, sa, err := unix.Recvfrom(u.fd, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			u.t.Errorf("receive: %v", err)
			return "", netip.AddrPort{}
		}
		var from netip.AddrPort
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			from = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			from = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
		}
		return string(buf[:n]), from
	}
}

// answer receives a question, and answers it with "re: " before it.
func (u *udp) answer(question string) {
	u.t.Helper()
	got, from := u.recv()
	if got != question {
		u.t.Fatalf("received %q, want %q", got, question)
	}
	u.send("re: "+got, from)
}

func (u *udp) expect(data string, from netip.AddrPort) {
	u.t.Helper()
	if got, sender := u.recv(); got != data || sender != from {
		u.t.Errorf("received %q from %v, want %q from %v", got, sender, data, from)
	}
}

// TestPrivilegedDNS: DNS over UDP, rule by rule, and the answers.
func TestPrivilegedDNS(t *testing.T) {
	begin(t)
	const proxyUID, appUID, other = testbed.ProxyUID, testbed.AppUID, 4321
	modes(t, func(t *testing.T, n *node) {
		w := testbed.NewWorld(t)
		pods := map[bool]*pod{}
		for _, excluded := range []bool{false, true} {
			mutators := []testbed.PodMutator{testbed.ProxyEnv(dnsCaptureEnv, "true")}
			if excluded {
				mutators = append(mutators, annotations(excludePorts, "53")...)
			} else {
				mutators = append(mutators, annotations(excludeInterfaces, "net1")...)
			}
			pods[excluded] = n.redirect(t, testbed.NewPod(t, testbed.InWorld(w), testbed.Interface("net1", nil, []string{"10.77.0.0/16", "fd77::/16"})), mutators...)
		}
		p := pods[false]
		for _, f := range []Family{IPv4, IPv6} {
			t.Run(f.String(), func(t *testing.T) {
				own, wild, s6, lo := p.Addr4(), netip.IPv4Unspecified(), "127.0.0.6", "127.0.0.1"
				one, two, three, byNet1 := ap("10.99.0.53:53"), ap("10.99.0.54:53"), ap("10.98.0.53:53"), ap("10.77.0.53:53")
				if f == IPv6 {
					own, wild, s6, lo = p.Addr6(), netip.IPv6Unspecified(), "::6", "::1"
					one, two, three, byNet1 = ap("[fd99::53]:53"), ap("[fd99::54]:53"), ap("[fd98::53]:53"), ap("[fd77::53]:53")
				}
				resolver := func(at netip.AddrPort) *udp { return udpSocket(t, w.Do, 0, 0, at) }
				r1, r2, rNet1 := resolver(one), resolver(two), resolver(byNet1)
				// At loopback, as proxies do: an answer of a socket at the
				// wildcard would be from another address than was asked.
				proxy := udpSocket(t, p.Do, proxyUID, proxyUID, at(netip.MustParseAddr(lo), 15053))
				client := func(uid, gid int, bind netip.AddrPort) *udp { return udpSocket(t, p.Do, uid, gid, bind) }
				fresh := at(wild, 0)
				none := netip.AddrPort{}

				// Connected, and not; several at once.
				c := client(appUID, appUID, fresh)
				c.connect(one)
				c.send("connected", none)
				proxy.answer("connected")
				c.expect("re: connected", one)

				u := client(appUID, appUID, fresh)
				u.send("first", one)
				u.send("second", one)
				proxy.answer("first")
				proxy.answer("second")
				u.expect("re: first", one)
				u.expect("re: second", one)
				// One socket, several resolvers.
				for i, at := range []netip.AddrPort{one, two, three} {
					q := string(rune('a' + i))
					u.send(q, at)
					proxy.answer(q)
					u.expect("re: "+q, at)
				}
				// A resolver in the pod.
				l := client(appUID, appUID, fresh)
				l.send("local", at(netip.MustParseAddr(lo), 53))
				proxy.answer("local")
				l.expect("re: local", at(netip.MustParseAddr(lo), 53))
				// The group alone is nobody, for UDP.
				g := client(other, proxyUID, fresh)
				g.send("group", one)
				proxy.answer("group")
				g.expect("re: group", one)

				// The proxy's own go out, whatever port they come from, a
				// port that an app has just asked the same from too.
				direct := func(name string, u *udp, to netip.AddrPort, r *udp) {
					t.Helper()
					u.send(name, to)
					r.answer(name)
					u.expect("re: "+name, to)
				}
				direct("the proxy", client(proxyUID, proxyUID, fresh), one, r1)
				direct("the user alone", client(proxyUID, other, fresh), two, r2)
				a := client(appUID, appUID, at(own, 5555))
				a.send("from 5555", one)
				proxy.answer("from 5555")
				a.expect("re: from 5555", one)
				a.close()
				direct("the proxy, from 5555", client(proxyUID, proxyUID, at(own, 5555)), one, r1)
				b := client(proxyUID, proxyUID, at(own, 5556))
				direct("the proxy, from 5556", b, one, r1)
				b.close()
				a = client(appUID, appUID, at(own, 5556))
				a.send("from 5556", one)
				proxy.answer("from 5556")
				a.expect("re: from 5556", one)

				// By an excluded interface; from S6; other ports.
				direct("an excluded interface", client(appUID, appUID, fresh), byNet1, rNet1)
				at54 := netip.AddrPortFrom(one.Addr(), 54)
				direct("another port", client(appUID, appUID, fresh), at54, resolver(at54))
				local := at(netip.MustParseAddr(s6), 53)
				direct("from S6", client(appUID, appUID, at(netip.MustParseAddr(s6), 7777)), local, udpSocket(t, p.Do, appUID, appUID, local))

				// With port 53 excluded.
				q := pods[true]
				direct("an excluded port", udpSocket(t, q.Do, appUID, appUID, fresh), one, r1)
			})
		}
	})
}

// TestPrivilegedDNSZones: without the zones, the proxy's question from a port
// that an app has asked from comes back to the proxy. This is what the table
// raw is for, and shows that TestPrivilegedDNS would see it.
func TestPrivilegedDNSZones(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		w := testbed.NewWorld(t)
		p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), testbed.ProxyEnv(dnsCaptureEnv, "true"))
		restore(t, n.opts.Mode, p.Pod, "iptables", "*raw\n-F SHUNT_ZONE_OUT\n-F SHUNT_ZONE_IN\nCOMMIT\n")
		proxy := udpSocket(t, p.Do, testbed.ProxyUID, testbed.ProxyGID, ap("127.0.0.1:15053"))
		a := udpSocket(t, p.Do, testbed.AppUID, testbed.AppGID, at(p.Addr4(), 5555))
		a.send("app", ap("10.99.0.53:53"))
		proxy.answer("app")
		a.expect("re: app", ap("10.99.0.53:53"))
		a.close()
		udpSocket(t, p.Do, testbed.ProxyUID, testbed.ProxyGID, at(p.Addr4(), 5555)).send("proxy", ap("10.99.0.53:53"))
		if got, _ := proxy.recv(); got != "proxy" {
			t.Errorf("received %q: the test of the zones shows nothing", got)
		}
	})
}
