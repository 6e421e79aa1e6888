// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// udp is a UDP socket of an actor's, in the test's hands.
type udp struct {
	t testing.TB
	f *os.File
}

// udpSocket has an actor open a socket. Calls on it wait for 2 s at most.
func udpSocket(t testing.TB, a *testbed.Actor, spec testbed.SocketSpec) *udp {
	t.Helper()
	spec.UDP = true
	sock := a.Socket(t, spec)
	u := &udp{t, a.TakeSocket(t, sock)}
	a.Close(t, sock)
	if err := unix.SetsockoptTimeval(u.fd(), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 1}); err != nil {
		t.Fatal(err)
	}
	return u
}

func (u *udp) fd() int { return int(u.f.Fd()) }

func (u *udp) close() { u.f.Close() }

// family is the socket's own, 4 or 6.
func (u *udp) family() int {
	domain, err := unix.GetsockoptInt(u.fd(), unix.SOL_SOCKET, unix.SO_DOMAIN)
	if err != nil {
		u.t.Fatal(err)
	}
	if domain == unix.AF_INET {
		return 4
	}
	return 6
}

func (u *udp) sockaddr(ap netip.AddrPort) unix.Sockaddr {
	if u.family() == 4 {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func addrPort(sa unix.Sockaddr) string {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)).String()
	case *unix.SockaddrInet6:
		return plain(netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port)))
	}
	return ""
}

// errno names an error; "" for none.
func errno(err error) string {
	var e unix.Errno
	if errors.As(err, &e) {
		return unix.ErrnoName(e)
	}
	if err != nil {
		return err.Error()
	}
	return ""
}

func (u *udp) connect(to netip.AddrPort) string { return errno(unix.Connect(u.fd(), u.sockaddr(to))) }

func (u *udp) disconnect() {
	u.t.Helper()
	sa := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(u.fd()), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa)); e != 0 {
		u.t.Fatalf("connect to AF_UNSPEC: %v", e)
	}
}

// send sends to an address, or to where the socket is connected.
func (u *udp) send(data string, to netip.AddrPort) string {
	if to.IsValid() {
		return errno(unix.Sendto(u.fd(), []byte(data), 0, u.sockaddr(to)))
	}
	_, err := unix.Write(u.fd(), []byte(data))
	return errno(err)
}

// recv receives a datagram: what it says, and from whom.
func (u *udp) recv() (data, from string, err error) {
	buf := make([]byte, 512)
	for {
		n, sa, err := unix.Recvfrom(u.fd(), buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return "", "", err
		}
		return string(buf[:n]), addrPort(sa), nil
	}
}

// peer and own are getpeername and getsockname.
func (u *udp) peer() string {
	sa, err := unix.Getpeername(u.fd())
	if err != nil {
		return errno(err)
	}
	return addrPort(sa)
}

func (u *udp) own() string {
	sa, err := unix.Getsockname(u.fd())
	if err != nil {
		return errno(err)
	}
	return host(addrPort(sa))
}

// A responder answers every question with "<its name>: <question> from <who
// asks>", by the address that was asked.
type responder struct {
	name string
	u    *udp
	done chan struct{}
}

func respond(t testing.TB, name string, a *testbed.Actor, spec testbed.SocketSpec) *responder {
	t.Helper()
	spec.ReuseAddr = true
	r := &responder{name, udpSocket(t, a, spec), make(chan struct{})}
	go func() {
		defer close(r.done)
		buf := make([]byte, 512)
		for {
			n, sa, err := unix.Recvfrom(r.u.fd(), buf, 0)
			switch {
			case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EINTR):
				continue
			case err != nil || n == 0: // shut down
				return
			}
			_ = unix.Sendto(r.u.fd(), []byte(fmt.Sprintf("%s: %s from %s", r.name, buf[:n], host(addrPort(sa)))), 0, sa)
		}
	}()
	t.Cleanup(r.stop)
	return r
}

// stop ends it and waits for that.
func (r *responder) stop() {
	select {
	case <-r.done:
		return
	default:
	}
	// An unconnected socket is shut down too, though the call says otherwise.
	_ = unix.Shutdown(r.u.fd(), unix.SHUT_RDWR)
	<-r.done
	r.u.close()
}

// dnsPod is a pod with DNS capture, its proxy's resolver at loopback, resolvers in
// the world.
type dnsPod struct {
	*testbed.Pod
	app, proxy, uidOnly, gidOnly *testbed.Actor
	listeners                    []*responder
	ebpf                         *pod       // nil behind iptables
	t                            testing.TB // whose the pod is
}

var dnsPolicy = []testbed.PodMutator{testbed.ProxyEnv(dnsCaptureEnv, "true")}

// Resolvers in the world, by what they are asked for.
var (
	resolvers4 = []netip.AddrPort{ap("10.99.0.53:53"), ap("10.99.0.54:53"), ap("10.98.0.53:53")}
	resolvers6 = []netip.AddrPort{ap("[fd99::53]:53"), ap("[fd99::54]:53"), ap("[fd98::53]:53")}
)

func (d *dnsPod) start(t testing.TB) {
	t.Helper()
	d.t = t
	p := d.World
	for _, r := range append(append([]netip.AddrPort{ap("10.99.0.53:54"), ap("[fd99::53]:54")}, resolvers4...), resolvers6...) {
		respond(t, "world", p.Actor, testbed.SocketSpec{Bind: r})
	}
	d.app = d.Actor(t, "app", testbed.AppUID, testbed.AppGID)
	d.proxy = d.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
	d.uidOnly = d.Actor(t, "uid-only", testbed.ProxyUID, bogusGID)
	d.gidOnly = d.Actor(t, "gid-only", bogusUID, testbed.ProxyGID)
	d.serve(t)
}

// serve starts the proxy's resolvers.
func (d *dnsPod) serve(t testing.TB) {
	t.Helper()
	for _, a := range []string{"127.0.0.1:15053", "[::1]:15053"} {
		d.listeners = append(d.listeners, respond(t, "proxy", d.proxy, testbed.SocketSpec{Bind: ap(a)}))
	}
}

func (d *dnsPod) stopServing() {
	for _, r := range d.listeners {
		r.stop()
	}
	d.listeners = nil
}

// dnsTwins are two equal pods, one behind eBPF, one behind the iptables backend.
func dnsTwins(t *testing.T, mutators ...testbed.PodMutator) (behindEBPF, behindIPTables *dnsPod) {
	t.Helper()
	mutators = append(append([]testbed.PodMutator(nil), dnsPolicy...), mutators...)
	behindEBPF = &dnsPod{Pod: testbed.NewPod(t)}
	behindEBPF.ebpf = newNode(t).redirect(t, behindEBPF.Pod, mutators...)
	behindEBPF.start(t)
	behindIPTables = &dnsPod{Pod: testbed.NewPod(t)}
	target := behindEBPF.ebpf.target
	target.ContainerID, target.Netns, target.Cgroup = "twin", behindIPTables.NetnsPath(), ""
	b := iptables.New(iptables.Options{RunDir: t.TempDir(), Mode: iptables.NFT})
	if err := b.Apply(t.Context(), target, behindEBPF.ebpf.policy); err != nil {
		t.Fatal(err)
	}
	behindIPTables.start(t)
	return behindEBPF, behindIPTables
}

// answer is what came of a question.
type answer struct {
	Connect, Send, Recv string // errors
	Data                string // what was answered
	From                string // by whom, as the socket's owner sees it
	Peer, Own           string // getpeername, getsockname
}

// receive completes an answer.
func (u *udp) receive(a answer) answer {
	data, from, err := u.recv()
	a.Data, a.From, a.Recv = data, from, errno(err)
	a.Peer, a.Own = u.peer(), u.own()
	return a
}

// ask sends a question to an address and receives the answer.
func (u *udp) ask(q string, to netip.AddrPort) answer {
	if s := u.send(q, to); s != "" {
		return answer{Send: s}
	}
	return u.receive(answer{})
}

// askConnected does the same by connect and send.
func (u *udp) askConnected(q string, to netip.AddrPort) answer {
	if s := u.connect(to); s != "" {
		return answer{Connect: s}
	}
	return u.ask(q, netip.AddrPort{})
}

// A dnsCase is something that a test does with sockets in a pod. dst are three
// resolvers of one family, own the pod's address.
type dnsCase struct {
	name string
	run  func(t *testing.T, d *dnsPod, x dnsArgs) []answer
	// Differs says why the backends may differ; "": they may not.
	differs string
}

type dnsArgs struct {
	form   string // IPv4, mapped, IPv6
	family int    // of the sockets
	dst    []netip.AddrPort
	own    netip.Addr
	lo, s6 netip.Addr
	any    netip.Addr // the unspecified address, as a destination
}

func (x dnsArgs) socket(t testing.TB, a *testbed.Actor) *udp {
	t.Helper()
	return udpSocket(t, a, testbed.SocketSpec{Family: x.family})
}

// bound opens a socket that is bound to an address.
func (x dnsArgs) bound(t testing.TB, a *testbed.Actor, bind netip.AddrPort) *udp {
	t.Helper()
	if x.form == "mapped" {
		bind = at(netip.AddrFrom16(bind.Addr().As16()), bind.Port())
	}
	return udpSocket(t, a, testbed.SocketSpec{Family: x.family, Bind: bind, ReuseAddr: true})
}

var dnsCases = []dnsCase{
	{name: "connected", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		a := []answer{u.askConnected("q", x.dst[0])}
		a = append(a, u.ask("again", netip.AddrPort{}))
		return a
	}},
	{name: "connected, each call that receives", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		a := answer{Connect: u.connect(x.dst[0]), Send: u.send("q", netip.AddrPort{})}
		buf := make([]byte, 512)
		n, err := unix.Read(u.fd(), buf)
		a.Data, a.Recv, a.Peer, a.Own = string(buf[:max(n, 0)]), errno(err), u.peer(), u.own()
		return []answer{a}
	}},
	{name: "unconnected", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		return []answer{x.socket(t, d.app).ask("q", x.dst[0])}
	}},
	{name: "one after the other", run: func(t *testing.T, d *dnsPod, x dnsArgs) (out []answer) {
		u := x.socket(t, d.app)
		for _, r := range append(x.dst, x.dst...) {
			out = append(out, u.ask("q", r))
		}
		return out
	}},
	{name: "connected, then to another", run: func(t *testing.T, d *dnsPod, x dnsArgs) (out []answer) {
		u := x.socket(t, d.app)
		for _, r := range x.dst {
			out = append(out, u.askConnected("q", r))
		}
		return out
	}},
	{name: "connected, disconnected, connected", run: func(t *testing.T, d *dnsPod, x dnsArgs) (out []answer) {
		u := x.socket(t, d.app)
		for _, r := range []netip.AddrPort{x.dst[0], at(x.dst[0].Addr(), 54), x.dst[1], at(x.lo, 53), x.dst[2]} {
			out = append(out, u.askConnected("q", r))
			u.disconnect()
			out = append(out, answer{Peer: u.peer()})
		}
		return out
	}},
	{name: "connected, disconnected, unconnected", differs: "the kernel lets an IPv6 socket hear its last peer only, which here is the proxy", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		out := []answer{u.askConnected("q", x.dst[0])}
		u.disconnect()
		a, b := u.ask("captured", x.dst[1]), u.ask("direct", at(x.dst[0].Addr(), 54))
		a.Own, b.Own = "", "" // ours stays where the kernel's would not
		return append(out, a, b)
	}},
	{name: "direct, then connected to a resolver", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		return []answer{u.askConnected("direct", at(x.dst[0].Addr(), 54)), u.askConnected("q", x.dst[0]), u.askConnected("direct", at(x.dst[0].Addr(), 54))}
	}},
	{name: "bound to the pod's address", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u, c := x.bound(t, d.app, at(x.own, 5555)), x.bound(t, d.app, at(x.own, 5556))
		return []answer{u.ask("q", x.dst[0]), c.askConnected("c", x.dst[1])}
	}},
	{name: "bound to the wildcard and a port", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.bound(t, d.app, at(x.any, 5557))
		return []answer{u.ask("q", x.dst[0]), u.ask("r", x.dst[1])}
	}},
	{name: "bound to the wildcard and a port, connected", differs: "the proxy sees 127.0.0.1: the socket can't be bound again", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		return []answer{x.bound(t, d.app, at(x.any, 5558)).askConnected("q", x.dst[0])}
	}},
	{name: "unconnected, then connected", differs: "the proxy sees 127.0.0.1: the socket can't be bound again", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		return []answer{u.ask("q", x.dst[0]), u.askConnected("c", x.dst[1])}
	}},
	{name: "to the pod itself", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		return []answer{
			x.socket(t, d.app).ask("q", at(x.own, 53)), x.socket(t, d.app).askConnected("c", at(x.own, 53)),
			x.socket(t, d.app).ask("q", at(x.lo, 53)), x.socket(t, d.app).askConnected("c", at(x.lo, 53)),
		}
	}},
	{name: "to the unspecified address", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		return []answer{
			x.socket(t, d.app).ask("q", at(x.any, 53)), x.socket(t, d.app).askConnected("c", at(x.any, 53)),
			x.bound(t, d.app, at(x.own, 5559)).ask("b", at(x.any, 53)),
		}
	}},
	{name: "from S6", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		respond(t, "app", d.app, testbed.SocketSpec{Bind: at(x.s6, 53)})
		return []answer{x.bound(t, d.app, at(x.s6, 7777)).ask("q", at(x.s6, 53)), x.bound(t, d.app, at(x.s6, 7778)).askConnected("c", at(x.s6, 53))}
	}},
	{name: "by owner", run: func(t *testing.T, d *dnsPod, x dnsArgs) (out []answer) {
		for _, a := range []*testbed.Actor{d.proxy, d.uidOnly, d.gidOnly} {
			out = append(out, x.socket(t, a).ask("q", x.dst[0]), x.socket(t, a).askConnected("c", x.dst[0]))
		}
		return out
	}},
	{name: "passed on", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		var out []answer
		for _, from := range []*testbed.Actor{d.proxy, d.app} {
			sock := from.Socket(t, testbed.SocketSpec{Family: x.family, UDP: true})
			to := d.gidOnly
			there := from.PassSocket(t, sock, to)
			from.Close(t, sock)
			u := &udp{t, to.TakeSocket(t, there)}
			_ = unix.SetsockoptTimeval(u.fd(), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2})
			to.Close(t, there)
			out = append(out, u.ask("q", x.dst[0]))
		}
		return out
	}},
	{name: "another port", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		other := at(x.dst[0].Addr(), 54)
		u := x.socket(t, d.app)
		return []answer{u.ask("q", other), x.socket(t, d.app).askConnected("c", other), u.ask("53", x.dst[0]), u.ask("54", other)}
	}},
	{name: "the proxy under its own address", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		return []answer{u.ask("q", x.dst[0]), u.ask("own", at(x.lo, 15053)), u.ask("q", x.dst[1]), x.socket(t, d.app).askConnected("own", at(x.lo, 15053))}
	}},
	{name: "connected to one, sent to another", differs: "the socket gets the answer, by the resolver's address; else the kernel keeps it back", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		return []answer{{Connect: u.connect(x.dst[0])}, u.ask("q", x.dst[1])}
	}},
	{name: "nobody listens", differs: "the error comes back to the socket; behind iptables it is lost", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		d.stopServing()
		defer d.serve(d.t)
		u, c := x.socket(t, d.app), x.socket(t, d.app)
		_ = unix.SetsockoptTimeval(u.fd(), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100000})
		_ = unix.SetsockoptTimeval(c.fd(), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 300000})
		return []answer{u.ask("q", x.dst[0]), c.askConnected("c", x.dst[0])}
	}},
	{name: "by an interface that IP_PKTINFO names", differs: "the interface is fixed before the hook", run: func(t *testing.T, d *dnsPod, x dnsArgs) []answer {
		u := x.socket(t, d.app)
		_ = unix.SetsockoptTimeval(u.fd(), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 500000})
		oob := unix.PktInfo4(&unix.Inet4Pktinfo{Ifindex: int32(eth0(t, d))})
		if x.form == "IPv6" {
			oob = unix.PktInfo6(&unix.Inet6Pktinfo{Ifindex: uint32(eth0(t, d))})
		}
		if x.form == "mapped" {
			return nil // there is no such datagram
		}
		if err := unix.Sendmsg(u.fd(), []byte("q"), oob, u.sockaddr(x.dst[0]), 0); err != nil {
			return []answer{{Send: errno(err)}}
		}
		return []answer{u.receive(answer{})}
	}},
	{name: "bound to a device", run: func(t *testing.T, d *dnsPod, x dnsArgs) (out []answer) {
		for _, connected := range []bool{false, true} {
			root := d.Actor(t, "root", 0, 0, testbed.WithCaps(unix.CAP_NET_RAW))
			u := udpSocket(t, root, testbed.SocketSpec{Family: x.family, Device: "eth0"})
			_ = unix.SetsockoptTimeval(u.fd(), unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 500000})
			if connected {
				out = append(out, u.askConnected("c", x.dst[0]))
			} else {
				out = append(out, u.ask("q", x.dst[0]))
			}
			root.Stop(t)
		}
		return out
	}},
}

func (d *dnsPod) args(form string) dnsArgs {
	a := dnsArgs{form: form, family: 4, dst: resolvers4, own: d.Addr4(), lo: netip.MustParseAddr("127.0.0.1"), s6: netip.MustParseAddr("127.0.0.6"), any: netip.IPv4Unspecified()}
	switch form {
	case "mapped":
		a.family = 6
	case "IPv6":
		a = dnsArgs{form: form, family: 6, dst: resolvers6, own: d.Addr6(), lo: netip.IPv6Loopback(), s6: netip.MustParseAddr("::6"), any: netip.IPv6Unspecified()}
	}
	return a
}

// eth0 gives the index of the pod's interface.
func eth0(t testing.TB, d *dnsPod) (index int) {
	t.Helper()
	if err := d.Do(func() error {
		i, err := net.InterfaceByName("eth0")
		if err == nil {
			index = i.Index
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return index
}

var forms = []string{"IPv4", "mapped", "IPv6"}

// TestPrivilegedDNS: DNS over UDP does what it does behind iptables, whatever is
// done with the sockets.
func TestPrivilegedDNS(t *testing.T) {
	begin(t)
	x, y := dnsTwins(t)
	differ := map[string]bool{}
	for _, form := range forms {
		for _, c := range dnsCases {
			t.Run(c.name+"/"+form, func(t *testing.T) {
				diff := cmp.Diff(c.run(t, y, y.args(form)), c.run(t, x, x.args(form)))
				if diff != "" && c.differs == "" {
					t.Errorf("(-iptables +ebpf):\n%s", diff)
				}
				differ[c.name] = differ[c.name] || diff != ""
			})
		}
	}
	for _, c := range dnsCases {
		if c.differs != "" && !differ[c.name] {
			t.Errorf("%s: no difference, although %s", c.name, c.differs)
		}
	}
	x.ebpf.expectFailures(t, bpf.ShuntPlacePLACE_CONNECT_BIND)
}

// newDNSPod makes a pod with DNS capture behind eBPF.
func newDNSPod(t *testing.T, n *node, k *testbed.Pod, mutators ...testbed.PodMutator) *dnsPod {
	t.Helper()
	d := &dnsPod{Pod: k}
	d.ebpf = n.redirect(t, k, append(append([]testbed.PodMutator(nil), dnsPolicy...), mutators...)...)
	d.start(t)
	return d
}

// TestPrivilegedDNSRules: each question is counted by its rule, a connected
// socket's once, and Decide says the same.
func TestPrivilegedDNSRules(t *testing.T) {
	begin(t)
	n := newNode(t)
	captured, excluded := newDNSPod(t, n, testbed.NewPod(t)), newDNSPod(t, n, testbed.NewPod(t), testbed.Annotate(excludePorts, "50-60"))
	for _, form := range forms {
		for _, c := range []struct {
			d    *dnsPod
			who  *testbed.Actor
			rule redirect.Rule
			by   string
		}{
			{captured, captured.app, redirect.RuleOutDNS, "proxy"},
			{captured, captured.gidOnly, redirect.RuleOutDNS, "proxy"},
			{captured, captured.uidOnly, redirect.RuleOutProxy, "world"},
			{captured, captured.proxy, redirect.RuleOutProxy, "world"},
			{excluded, excluded.app, redirect.RuleOutExcludePort, "world"},
			{excluded, excluded.proxy, redirect.RuleOutExcludePort, "world"},
		} {
			x := c.d.args(form)
			flow := redirect.Flow{Proto: redirect.UDP, Dst: x.dst[0], UID: uint32(c.who.UID), GID: uint32(c.who.GID), PodAddrs: c.d.AllAddrs()}
			if got := c.d.ebpf.policy.Decide(flow); got.Rule != c.rule {
				t.Errorf("Decide says %v", got.Rule)
			}
			before := c.d.ebpf.rules(t)
			u, v := x.socket(t, c.who), x.socket(t, c.who)
			want := answer{Data: fmt.Sprintf("%s: q from %v", c.by, x.own), From: x.dst[0].String(), Peer: x.dst[0].String(), Own: x.own.String()}
			if diff := cmp.Diff(want, u.askConnected("q", x.dst[0])); diff != "" {
				t.Errorf("%s, %s by %v, connected (-want +got):\n%s", form, c.who.Name, c.rule, diff)
			}
			got := v.ask("q", x.dst[0])
			want.Peer, got.Own, want.Own = "ENOTCONN", "", ""
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, %s by %v (-want +got):\n%s", form, c.who.Name, c.rule, diff)
			}
			n := 2
			if form == "mapped" && c.rule != redirect.RuleOutDNS {
				n = 3 // the kernel gives each datagram of a connected one a destination
			}
			if d := c.d.ebpf.rules(t).since(before); len(d) != 1 || d[c.rule] != n {
				t.Errorf("%s, %s: counted %v, want %v %d times", form, c.who.Name, d, c.rule, n)
			}
		}
	}
	captured.ebpf.expectFailures(t)
	excluded.ebpf.expectFailures(t)
}

// TestPrivilegedDNSSeveral: one socket asks several resolvers at once, by sendmmsg
// and one by one, from several threads. Each answer is there, and bears the
// address of one that was asked.
func TestPrivilegedDNSSeveral(t *testing.T) {
	begin(t)
	d := newDNSPod(t, newNode(t), testbed.NewPod(t))
	for _, form := range forms {
		x := d.args(form)
		asked := map[string]bool{}
		for _, r := range x.dst {
			asked[r.String()] = true
		}
		collect := func(u *udp, n int) {
			t.Helper()
			got := map[string]int{}
			for _, a := range u.recvmmsg(n) {
				if !asked[a.From] {
					t.Errorf("%s: an answer from %s", form, a.From)
				}
				got[a.Data]++
			}
			for i := range n {
				if q := fmt.Sprintf("proxy: %d from %v", i, x.own); got[q] != 1 {
					t.Errorf("%s: %q came %d times", form, q, got[q])
				}
			}
		}
		u := x.socket(t, d.app)
		for i := range 30 {
			if e := u.send(fmt.Sprint(i), x.dst[i%3]); e != "" {
				t.Fatal(e)
			}
		}
		collect(u, 30)
		u.sendmmsg(x.dst, 30)
		collect(u, 30)
		done := make(chan string)
		for k := range 3 {
			go func() {
				e := ""
				for i := k; i < 30 && e == ""; i += 3 {
					e = u.send(fmt.Sprint(i), x.dst[k])
				}
				done <- e
			}()
		}
		for range 3 {
			if e := <-done; e != "" {
				t.Error(e)
			}
		}
		collect(u, 30)
		// Of several, the last; of both families, each its own.
		if form != "IPv4" {
			u.ask("q", x.dst[0])
			other := d.args(map[string]string{"mapped": "IPv6", "IPv6": "mapped"}[form])
			u.send("other", other.dst[2])
			if a := u.receive(answer{}); a.From != other.dst[2].String() {
				t.Errorf("%s: from %s", form, a.From)
			}
			u.send("q", x.dst[1])
			u.send("other", other.dst[0])
			from := map[string]bool{}
			for _, a := range u.recvmmsg(2) {
				from[a.From] = true
			}
			if !from[x.dst[1].String()] || !from[other.dst[0].String()] {
				t.Errorf("%s: answers of two families are from %v", form, from)
			}
		}
		u.close()
	}
	d.ebpf.expectFailures(t)
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   uint32
}

// sendmmsg sends the numbers from 0 on, to one after the other.
func (u *udp) sendmmsg(to []netip.AddrPort, n int) {
	u.t.Helper()
	msgs := make([]mmsghdr, n)
	for i := range msgs {
		data := []byte(fmt.Sprint(i))
		iov := &unix.Iovec{Base: &data[0]}
		iov.SetLen(len(data))
		name := rawSockaddr(to[i%len(to)], u.family())
		msgs[i].hdr = unix.Msghdr{Name: &name[0], Namelen: uint32(len(name)), Iov: iov}
		msgs[i].hdr.SetIovlen(1)
	}
	sent, _, e := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(u.fd()), uintptr(unsafe.Pointer(&msgs[0])), uintptr(n), 0, 0, 0)
	if e != 0 || int(sent) != n {
		u.t.Fatalf("sendmmsg: %d sent, %v", sent, e)
	}
}

// recvmmsg receives n answers.
func (u *udp) recvmmsg(n int) (out []answer) {
	u.t.Helper()
	for len(out) < n {
		msgs := make([]mmsghdr, n)
		data, names := make([][512]byte, n), make([]unix.RawSockaddrInet6, n)
		for i := range msgs {
			iov := &unix.Iovec{Base: &data[i][0]}
			iov.SetLen(len(data[i]))
			msgs[i].hdr = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&names[i])), Namelen: unix.SizeofSockaddrInet6, Iov: iov}
			msgs[i].hdr.SetIovlen(1)
		}
		got, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(u.fd()), uintptr(unsafe.Pointer(&msgs[0])), uintptr(n), unix.MSG_WAITFORONE, 0, 0)
		if e != 0 {
			u.t.Errorf("recvmmsg after %d answers: %v", len(out), e)
			return out
		}
		for i := range int(got) {
			out = append(out, answer{Data: string(data[i][:msgs[i].len]), From: rawAddrPort(&names[i])})
		}
	}
	return out
}

func rawSockaddr(ap netip.AddrPort, family int) []byte {
	port := binary.BigEndian.AppendUint16(nil, ap.Port())
	if family == 4 {
		b := make([]byte, unix.SizeofSockaddrInet4)
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		a := ap.Addr().As4()
		copy(b[2:], port)
		copy(b[4:], a[:])
		return b
	}
	b := make([]byte, unix.SizeofSockaddrInet6)
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	a := ap.Addr().As16()
	copy(b[2:], port)
	copy(b[8:], a[:])
	return b
}

func rawAddrPort(sa *unix.RawSockaddrInet6) string {
	b := (*[unix.SizeofSockaddrInet6]byte)(unsafe.Pointer(sa))
	port := binary.BigEndian.Uint16(b[2:])
	if sa.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port).String()
	}
	return plain(netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), port))
}

// TestPrivilegedDNSFamilies: pods with one family, with several addresses, and
// resolvers that are known by an interface.
func TestPrivilegedDNSFamilies(t *testing.T) {
	begin(t)
	n := newNode(t)
	for _, c := range []struct {
		name string
		opts []testbed.Option
		has  map[string]bool
	}{
		{"IPv4 only", []testbed.Option{testbed.V4Only()}, map[string]bool{"IPv4": true, "mapped": true}},
		{"IPv6 only", []testbed.Option{testbed.V6Only()}, map[string]bool{"IPv6": true}},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDNSPod(t, n, testbed.NewPod(t, c.opts...))
			for _, form := range forms {
				x := d.args(form)
				for _, a := range []answer{x.socket(t, d.app).ask("q", x.dst[0]), x.socket(t, d.app).askConnected("q", x.dst[0])} {
					switch {
					case c.has[form] && (a.From != x.dst[0].String() || a.Data != fmt.Sprintf("proxy: q from %v", x.own)):
						t.Errorf("%s: %+v", form, a)
					case !c.has[form] && a.Send+a.Connect != "ENETUNREACH":
						t.Errorf("%s without an address: %+v", form, a)
					}
				}
				if a := x.socket(t, d.app).ask("q", at(x.lo, 53)); a.From != at(x.lo, 53).String() {
					t.Errorf("%s, loopback: %+v", form, a)
				}
			}
		})
	}
	t.Run("several addresses", func(t *testing.T) {
		d := newDNSPod(t, n, testbed.NewPod(t, testbed.Interface("net1", []string{"10.77.0.9/16", "fd77::9/64"}, nil)))
		for to, from := range map[string]string{"10.77.0.53:53": "10.77.0.9", "[fd77::53]:53": "fd77::9"} {
			u := udpSocket(t, d.app, testbed.SocketSpec{Family: familyOf(ap(to).Addr())})
			if a := u.ask("q", ap(to)); a.Data != "proxy: q from "+from || a.From != to {
				t.Errorf("to %s: %+v", to, a)
			}
			v := udpSocket(t, d.app, testbed.SocketSpec{Family: familyOf(ap(to).Addr())})
			if a := v.askConnected("q", ap(to)); a.Data != "proxy: q from "+from || a.From != to || a.Own != from {
				t.Errorf("to %s, connected: %+v", to, a)
			}
		}
	})
	t.Run("link-local", func(t *testing.T) {
		d := newDNSPod(t, n, testbed.NewPod(t))
		sa := &unix.SockaddrInet6{Port: 53, Addr: netip.MustParseAddr("fe80::53").As16(), ZoneId: uint32(eth0(t, d))}
		for _, connected := range []bool{false, true} {
			u := udpSocket(t, d.app, testbed.SocketSpec{Family: 6})
			var err error
			if connected {
				if err = unix.Connect(u.fd(), sa); err == nil {
					_, err = unix.Write(u.fd(), []byte("q"))
				}
			} else {
				err = unix.Sendto(u.fd(), []byte("q"), 0, sa)
			}
			if !connected {
				if !errors.Is(err, unix.ENETUNREACH) {
					t.Errorf("unconnected: %v", err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			if a := u.receive(answer{}); a.From != "[fe80::53]:53" {
				t.Errorf("connected %v: %+v", connected, a)
			}
		}
	})
}

// TestPrivilegedDNSLinks: only pods with DNS capture have programs for datagrams,
// and only for as long as they do.
func TestPrivilegedDNSLinks(t *testing.T) {
	begin(t)
	n := newNode(t)
	d := newDNSPod(t, n, testbed.NewPod(t))
	p := d.ebpf
	links := func(want int) {
		t.Helper()
		expectAttached(t, p.Pod, 1)
		for a, n := range attachedAt(t, p.Pod, dnsAttachTypes) {
			if n != want {
				t.Errorf("%d programs at %v, want %d", n, a, want)
			}
		}
		if err := n.Check(t.Context(), p.target); err != nil {
			t.Error(err)
		}
	}
	apply := func(capture bool) {
		t.Helper()
		policy := *p.policy
		policy.DNSCapture = capture
		if err := n.Apply(t.Context(), p.target, &policy); err != nil {
			t.Fatal(err)
		}
	}
	x := d.args("IPv4")
	asks := func(want string) {
		t.Helper()
		if a := x.socket(t, d.app).ask("q", x.dst[0]); a.Data != fmt.Sprintf("%s: q from %v", want, x.own) {
			t.Errorf("%+v, want it from %s", a, want)
		}
	}
	links(1)
	asks("proxy")
	apply(false)
	links(0)
	asks("world")
	apply(true)
	links(1)
	asks("proxy")
	// A link that is gone is missed, and mended.
	if err := os.Remove(filepath.Join(n.opts.BPFDir, "cgroups", cgroupID(t, p.Pod), bpf.ShuntProgShuntSendmsg4)); err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), p.target); err == nil {
		t.Error("check misses nothing")
	}
	apply(true)
	links(1)
	p.remove(t)
	for a, n := range attachedAt(t, p.Pod, dnsAttachTypes) {
		if n != 0 {
			t.Errorf("%d programs at %v are left", n, a)
		}
	}
}

// TestPrivilegedDNSSandbox: of two sandboxes of one cgroup one has DNS capture.
func TestPrivilegedDNSSandbox(t *testing.T) {
	begin(t)
	n := newNode(t)
	for _, newDNS := range []bool{false, true} {
		for _, oldFirst := range []bool{false, true} {
			old := n.redirect(t, testbed.NewPod(t), testbed.ProxyEnv(dnsCaptureEnv, fmt.Sprint(!newDNS)))
			old.Destroy(t)
			next := n.redirect(t, testbed.NewPod(t, testbed.SandboxOf(old.Pod)), testbed.ProxyEnv(dnsCaptureEnv, fmt.Sprint(newDNS)))
			first, last := next, old
			if oldFirst {
				first, last = old, next
			}
			first.remove(t)
			if last == next {
				if err := n.Check(t.Context(), next.target); err != nil {
					t.Error(err)
				}
			}
			last.remove(t)
			for a, n := range attachedAt(t, next.Pod, dnsAttachTypes) {
				if n != 0 {
					t.Errorf("%d programs at %v are left", n, a)
				}
			}
		}
	}
}

var dnsAttachTypes = []ebpf.AttachType{
	ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCGroupUDP4Recvmsg, ebpf.AttachCGroupUDP6Recvmsg,
}

func cgroupID(t testing.TB, p *testbed.Pod) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(p.CgroupPath(), &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(st.Ino)
}
