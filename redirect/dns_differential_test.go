// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

const (
	defaultQueries   = 2000
	queriesPerScene  = 100
	annotExcludePort = "traffic.sidecar.istio.io/excludeOutboundPorts"
	envDNSCapture    = "ISTIO_META_DNS_CAPTURE"
	dnsPort          = 53
	proxyDNSPort     = 15053
)

// patience is how long an answer may take.
const patience = 5 * time.Second

func servesDNS(can flowgen.Features) bool { return can.DNS }

// sockaddrOf gives an address in the form of a socket's family.
func sockaddrOf(ap netip.AddrPort, family int) unix.Sockaddr {
	if family == 4 {
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: ap.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: ap.Addr().As16()}
}

func addrPortOf(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return at(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return at(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

// errno names what the kernel said, "" for nothing.
func errno(err error) string {
	var e unix.Errno
	if errors.As(err, &e) {
		return unix.ErrnoName(e)
	}
	return ""
}

// resolver is a toy: it answers each question with its own name, the address
// that it has seen the question come from, and the question. An answer is from
// the address that was asked, whatever address the socket has.
type resolver struct {
	name string
	fd   int
}

// ring has the toys answer, on one thread: those who ask turn it.
type ring []resolver

func (r ring) close() {
	for _, s := range r {
		unix.Close(s.fd)
	}
}

// add takes over a socket.
func (r *ring) add(t testing.TB, name string, fd, family int) {
	t.Helper()
	*r = append(*r, resolver{name, fd})
	level, option := unix.SOL_IP, unix.IP_PKTINFO
	if family == 6 {
		level, option = unix.SOL_IPV6, unix.IPV6_RECVPKTINFO
	}
	if err := unix.SetsockoptInt(fd, level, option, 1); err != nil {
		t.Fatalf("resolver %s: ask for the destination's address: %v", name, err)
	}
}

// open adds a resolver of an actor's.
func (r *ring) open(t testing.TB, name string, by *testbed.Actor, bind netip.AddrPort) {
	t.Helper()
	spec := testbed.SocketSpec{UDP: true, Bind: bind, V6Only: bind.Addr().Is6()}
	r.add(t, name, by.Take(t, by.Socket(t, spec)), familyOf(bind.Addr()))
}

// worldRing is the resolvers of a world: at every address, on ports 53 and 54.
func worldRing(t testing.TB, w *testbed.World) ring {
	t.Helper()
	var r ring
	t.Cleanup(func() { r.close() })
	for _, wild := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		r.open(t, "world", w.Actor, at(wild, dnsPort))
		r.open(t, "world", w.Actor, at(wild, dnsPort+1))
	}
	return r
}

// podRing is the resolvers of a pod: the app's at its addresses, and the
// proxy's, at loopback as proxies have it.
func podRing(t testing.TB, who func(by string) *testbed.Actor, proxyPort uint16) ring {
	t.Helper()
	var r ring
	t.Cleanup(func() { r.close() })
	for _, wild := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
		r.open(t, "app", who(flowgen.ByApp), at(wild, dnsPort))
		r.open(t, "app", who(flowgen.ByApp), at(wild, dnsPort+1))
	}
	for _, lo := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		r.open(t, "dns", who(flowgen.ByProxy), at(lo, proxyPort))
	}
	return r
}

// vanish closes the socket, and leaves its number to the end of the test.
func (r resolver) vanish(t testing.TB) bool {
	t.Helper()
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Dup3(null, r.fd, unix.O_CLOEXEC)
		unix.Close(null)
	}
	if err != nil {
		t.Fatalf("close the socket of resolver %s: %v", r.name, err)
	}
	return true
}

// answer sees to one question.
func (r resolver) answer() error {
	question, oob := make([]byte, 512), make([]byte, 256)
	n, oobn, _, from, err := unix.Recvmsg(r.fd, question, oob, unix.MSG_DONTWAIT)
	if err != nil {
		return err
	}
	asked, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return err
	}
	var source []byte
	for _, m := range asked {
		switch {
		case m.Header.Level == unix.SOL_IP && m.Header.Type == unix.IP_PKTINFO:
			i := (*unix.Inet4Pktinfo)(unsafe.Pointer(&m.Data[0]))
			source = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: i.Addr})
		case m.Header.Level == unix.SOL_IPV6 && m.Header.Type == unix.IPV6_PKTINFO:
			i := (*unix.Inet6Pktinfo)(unsafe.Pointer(&m.Data[0]))
			source = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: i.Addr})
		}
	}
	reply := fmt.Sprintf("%s to %v: %s", r.name, addrPortOf(from).Addr(), question[:n])
	return unix.Sendmsg(r.fd, []byte(reply), source, from, unix.MSG_DONTWAIT)
}

// turn lets the resolvers answer until fd has something to be received.
func (r ring) turn(t testing.TB, fd int) (ready bool) {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for _, s := range r {
		fds = append(fds, unix.PollFd{Fd: int32(s.fd), Events: unix.POLLIN})
	}
	for until := time.Now().Add(patience); time.Now().Before(until); {
		if _, err := unix.Poll(fds, int(time.Until(until)/time.Millisecond)+1); err != nil && !errors.Is(err, unix.EINTR) {
			t.Fatalf("wait for datagrams: %v", err)
		}
		for i, s := range r {
			if fds[i+1].Revents != 0 {
				// What can't be answered is missed by the one who asked.
				if err := s.answer(); err != nil && !errors.Is(err, unix.EAGAIN) {
					t.Logf("resolver %s: %v", s.name, err)
				}
			}
		}
		if fds[0].Revents != 0 {
			return true
		}
	}
	return false
}

// A client is a UDP socket of some actor in a pod.
type client struct {
	t      testing.TB
	fd     int
	family int
	ring   ring
	log    []string // what has come of it all
}

// newClient opens one. Unless spec says otherwise it is of the app.
func newClient(t testing.TB, r ring, by *testbed.Actor, spec testbed.SocketSpec) *client {
	t.Helper()
	spec.UDP = true
	return &client{t: t, fd: by.Take(t, by.Socket(t, spec)), family: spec.Family, ring: r}
}

func (c *client) note(format string, args ...any) {
	c.log = append(c.log, fmt.Sprintf(format, args...))
}

func (c *client) close() []string {
	unix.Close(c.fd)
	return c.log
}

// connect connects the socket, and notes where it thinks to be.
func (c *client) connect(to netip.AddrPort) bool {
	if err := unix.Connect(c.fd, sockaddrOf(to, c.family)); err != nil {
		c.note("connect: %s", errno(err))
		return false
	}
	if peer, err := unix.Getpeername(c.fd); err != nil {
		c.note("getpeername: %s", errno(err))
	} else {
		c.note("connected to %v", addrPortOf(peer))
	}
	return true
}

// disconnect is connect(AF_UNSPEC).
func (c *client) disconnect() {
	var sa unix.RawSockaddr // the zero family is AF_UNSPEC
	if _, _, e := unix.Syscall(unix.SYS_CONNECT, uintptr(c.fd), uintptr(unsafe.Pointer(&sa)), unsafe.Sizeof(sa)); e != 0 {
		c.note("disconnect: %s", errno(e))
	}
}

// ask sends a question; to nobody in particular where the socket is connected.
func (c *client) ask(question string, to netip.AddrPort) bool {
	var err error
	if to.IsValid() {
		err = unix.Sendto(c.fd, []byte(question), unix.MSG_NOSIGNAL, sockaddrOf(to, c.family))
	} else {
		_, err = unix.Write(c.fd, []byte(question))
	}
	if err != nil {
		c.note("send %q: %s", question, errno(err))
	}
	return err == nil
}

// hear receives n answers, by recvmsg, and notes them in an order of its own:
// questions asked at once may be answered in any.
func (c *client) hear(n int) {
	var heard []string
	for range n {
		if !c.ring.turn(c.t, c.fd) {
			heard = append(heard, "nothing more")
			break
		}
		buf := make([]byte, 512)
		k, _, _, from, err := unix.Recvmsg(c.fd, buf, nil, unix.MSG_DONTWAIT)
		if err != nil {
			heard = append(heard, "receive: "+errno(err))
			break
		}
		heard = append(heard, fmt.Sprintf("%v: %s", addrPortOf(from), buf[:k]))
	}
	slices.Sort(heard)
	c.log = append(c.log, heard...)
}

// mmsghdr is struct mmsghdr.
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
	_   [4]byte
}

// batch is the messages of a sendmmsg or recvmmsg, and what they point to.
type batch struct {
	hdrs []mmsghdr
	iovs []unix.Iovec
	bufs [][]byte
	sas  []unix.RawSockaddrInet6 // which has room for IPv4's
}

func newBatch(bufs [][]byte) *batch {
	b := &batch{make([]mmsghdr, len(bufs)), make([]unix.Iovec, len(bufs)), bufs, make([]unix.RawSockaddrInet6, len(bufs))}
	for i, buf := range bufs {
		b.iovs[i].Base = &buf[0]
		b.iovs[i].SetLen(len(buf))
		b.hdrs[i].hdr.Iov = &b.iovs[i]
		b.hdrs[i].hdr.SetIovlen(1)
	}
	return b
}

func (b *batch) call(number uintptr, fd int, flags int) (int, error) {
	n, _, e := unix.Syscall6(number, uintptr(fd), uintptr(unsafe.Pointer(&b.hdrs[0])), uintptr(len(b.hdrs)), uintptr(flags), 0, 0)
	if e != 0 {
		return 0, e
	}
	return int(n), nil
}

// name points a message's address at its place, filled in where ap is valid.
func (b *batch) name(i int, ap netip.AddrPort, family int) {
	sa := &b.sas[i]
	b.hdrs[i].hdr.Name, b.hdrs[i].hdr.Namelen = (*byte)(unsafe.Pointer(sa)), unix.SizeofSockaddrInet6
	port := ap.Port()<<8 | ap.Port()>>8
	switch {
	case !ap.IsValid():
	case family == 4:
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(sa)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: ap.Addr().As4()}
		b.hdrs[i].hdr.Namelen = unix.SizeofSockaddrInet4
	default:
		*sa = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: ap.Addr().As16()}
	}
}

// from reads the address that the kernel has written.
func (b *batch) from(i int) netip.AddrPort {
	sa := &b.sas[i]
	port := sa.Port<<8 | sa.Port>>8
	if sa.Family == unix.AF_INET {
		return at(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(sa)).Addr), port)
	}
	return at(netip.AddrFrom16(sa.Addr).Unmap(), port)
}

// askMany is sendmmsg: one question to each address, an invalid one being where
// the socket is connected.
func (c *client) askMany(questions []string, to []netip.AddrPort) {
	var bufs [][]byte
	for _, q := range questions {
		bufs = append(bufs, []byte(q))
	}
	b := newBatch(bufs)
	for i, ap := range to {
		if ap.IsValid() {
			b.name(i, ap, c.family)
		}
	}
	if n, err := b.call(unix.SYS_SENDMMSG, c.fd, unix.MSG_NOSIGNAL); err != nil || n != len(questions) {
		c.note("sendmmsg: %d, %s", n, errno(err))
	}
}

// hearMany is recvmmsg, until n answers have come.
func (c *client) hearMany(n int) {
	var heard []string
	for len(heard) < n {
		if !c.ring.turn(c.t, c.fd) {
			heard = append(heard, "nothing more")
			break
		}
		var bufs [][]byte
		for range n {
			bufs = append(bufs, make([]byte, 512))
		}
		b := newBatch(bufs)
		for i := range bufs {
			b.name(i, netip.AddrPort{}, c.family)
		}
		got, err := b.call(unix.SYS_RECVMMSG, c.fd, unix.MSG_DONTWAIT)
		if err != nil {
			heard = append(heard, "recvmmsg: "+errno(err))
			break
		}
		for i := range got {
			heard = append(heard, fmt.Sprintf("%v: %s", b.from(i), bufs[i][:b.hdrs[i].len]))
		}
	}
	slices.Sort(heard)
	c.log = append(c.log, heard...)
}

// Two more of the differences that docs/ARCHITECTURE.md tells of.

// showsLoopback: the proxy sees a query come from loopback. "UDP, connected to a
// resolver, with a port already".
func showsLoopback(n *node, x flowgen.Trial) bool { return n.can.ConnectHooks && hasPort(x) }

// hasPort: connect hooks would bind the socket to the source that the kernel
// chooses towards the resolver, and can't any more.
func hasPort(x flowgen.Trial) bool {
	return x.Want.Verdict == redirect.VerdictDNS && x.Connected &&
		x.Flow.Src.IsValid() && x.Flow.Src.IsUnspecified() && !x.Dst.Addr().IsLoopback()
}

// knowsLastAsked: of several resolvers of a family that a socket has asked, the
// receive hooks know the last, and every answer of the proxy's bears its address.
func knowsLastAsked(n *node) bool { return n.can.ConnectHooks }

// TestPrivilegedDNSDifferential compares the backends that capture DNS over UDP
// with Policy.Decide: random policies, and datagrams of all owners and from all
// addresses to ports 53 and 54, a few at once. It looks at who answers whom, from
// where that comes, and what is counted.
func TestPrivilegedDNSDifferential(t *testing.T) {
	begin(t)
	play(t, nodes(t, servesDNS), defaultQueries, queriesPerScene, []flowgen.Wish{flowgen.DNS}, func(t *testing.T, p *production) (decided []redirect.Decision) {
		rings := make([]ring, len(p.nodes))
		for k, twin := range p.twins {
			rings[k] = append(worldRing(t, twin.World), podRing(t, twin.Who, p.scene.Policy.Proxy.DNSPort)...)
		}
		wrong := 0
		byRule, failures := map[redirect.Rule]int{}, map[bpf.ShuntPlace]int{}
		for i, x := range p.scene.Datagrams(t, queriesPerScene, p.twins[0]) {
			questions := 1 + i%3
			decided = append(decided, x.Want)
			if times := decisions(x, questions); times != 0 {
				byRule[x.Want.Rule] += times
			}
			if hasPort(x) {
				failures[bpf.ShuntPlacePLACE_CONNECT_BIND]++
			}
			var answers strings.Builder
			alike := true
			for k, n := range p.nodes {
				got := query(t, rings[k], p.twins[k], x, questions)
				diff := cmp.Diff(n.wantAnswers(x, questions), got)
				alike = alike && diff == ""
				fmt.Fprintf(&answers, "  %s: %q\n%s", n.name, got, diff)
			}
			if alike {
				continue
			}
			p.disagree(t, x, answers.String())
			if wrong++; wrong == 2 { // what is missing takes its time
				break
			}
		}
		p.tally(t, byRule, failures)
		return decided
	})
}

// decisions says how often eBPF decides, and counts, a query: what a socket sends
// after its connect goes where that went.
func decisions(x flowgen.Trial, questions int) int {
	switch {
	case x.Dst.Port() != dnsPort:
		return 0
	case x.Errno != "":
		return 1 // by connect, or by the first question
	case !x.Connected:
		return questions
	case x.Spec.Family == 6 && x.Dst.Addr().Is4() && x.Want.Verdict == redirect.VerdictDirect:
		return 1 + questions // each is given a destination (udpv6_sendmsg in net/ipv6/udp.c)
	}
	return 1
}

// query tries a flow with some questions at once, and tells what comes of it.
func query(t testing.TB, r ring, p *flowgen.Twin, x flowgen.Trial, questions int) []string {
	t.Helper()
	c := newClient(t, r, p.Who(x.By), x.Spec.SocketSpec)
	to := x.Spec.Dst
	if x.Connected {
		if !c.connect(to) {
			return c.close()
		}
		c.log, to = nil, netip.AddrPort{}
	}
	for i := range questions {
		if !c.ask(fmt.Sprintf("question %d", i), to) {
			return c.close()
		}
	}
	c.hear(questions)
	return c.close()
}

// wantAnswers says what query must tell.
func (n *node) wantAnswers(x flowgen.Trial, questions int) (log []string) {
	if e := errnoFor(n, x); e != "" {
		if x.Connected {
			return []string{"connect: " + e}
		}
		return []string{`send "question 0": ` + e}
	}
	from := x.From
	if showsLoopback(n, x) {
		from = netip.IPv6Loopback()
		if x.Dst.Addr().Is4() {
			from = netip.MustParseAddr("127.0.0.1")
		}
	}
	for i := range questions {
		log = append(log, fmt.Sprintf("%v: %s to %v: question %d", x.Dst, x.Listener, from, i))
	}
	return log
}

// cluster is three of a cluster's resolvers.
type cluster struct{ one, two, three netip.AddrPort }

// dnsPod is a pod that a scenario is played in.
type dnsPod struct {
	*pod
	t    testing.TB
	ring ring
	own  netip.Addr
	cluster
	lastAsked bool // see knowsLastAsked
}

// client opens an unbound socket. One of IPv6 serves IPv4 too.
func (p *dnsPod) client(by string, family int) *client {
	return newClient(p.t, p.ring, p.who(by), testbed.SocketSpec{Family: family})
}

func (p *dnsPod) family() int { return familyOf(p.own) }

// none is where a connected socket sends to.
var none netip.AddrPort

// musl resolves a name as musl's res_msend does: one unconnected socket asks
// all nameservers for A and AAAA, and takes no answer but from one it has asked.
func (p *dnsPod) musl(family int, servers ...netip.AddrPort) []string {
	c := p.client(flowgen.ByApp, family)
	for _, q := range []string{"A", "AAAA"} {
		for _, s := range servers {
			c.ask(q, s)
		}
	}
	c.hear(2 * len(servers))
	log := c.close()
	for i, line := range log {
		if !slices.ContainsFunc(servers, func(s netip.AddrPort) bool { return strings.HasPrefix(line, s.String()+": ") }) {
			log[i] = "rejected: " + line
		}
	}
	return log
}

// heard gives answers as hear notes them. Each is three: from where, by whom,
// to which question.
func (p *dnsPod) heard(answers ...any) (log []string) {
	for i := 0; i < len(answers); i += 3 {
		log = append(log, fmt.Sprintf("%v: %v to %v: %v", answers[i], answers[i+1], p.own, answers[i+2]))
	}
	slices.Sort(log)
	return log
}

// heardAtOnce gives the same of questions that were all asked, in this order,
// before an answer was received. Of one family: with lastAsked the proxy's answers
// bear the address of the last resolver whose question it got.
func (p *dnsPod) heardAtOnce(answers ...any) []string {
	if p.lastAsked {
		var last any
		for i := 0; i < len(answers); i += 3 {
			if answers[i+1] == "dns" {
				last = answers[i]
			}
		}
		for i := 0; i < len(answers); i += 3 {
			if answers[i+1] == "dns" {
				answers[i] = last
			}
		}
	}
	return p.heard(answers...)
}

// connected is what connect notes.
func connected(to netip.AddrPort) []string { return []string{fmt.Sprintf("connected to %v", to)} }

// dnsScenarios are what resolvers do. Each tells what has come of it and what
// should have, which is alike on all backends but for heardAtOnce.
var dnsScenarios = []struct {
	name     string
	excluded bool // port 53 is in excludeOutboundPorts
	play     func(p *dnsPod) (got, want []string)
}{
	{"glibc", false, func(p *dnsPod) (got, want []string) {
		// Connected; both questions by one sendmmsg.
		c := p.client(flowgen.ByApp, p.family())
		c.connect(p.one)
		c.askMany([]string{"A", "AAAA"}, []netip.AddrPort{none, none})
		c.hear(2)
		return c.close(), append(connected(p.one), p.heard(p.one, "dns", "A", p.one, "dns", "AAAA")...)
	}},
	{"glibc, the next server", false, func(p *dnsPod) (got, want []string) {
		// Without an answer, it connects the same socket to the next.
		c := p.client(flowgen.ByApp, p.family())
		for _, s := range []netip.AddrPort{p.one, p.two, p.one} {
			c.connect(s)
			c.ask("A", none)
			c.hear(1)
			want = slices.Concat(want, connected(s), p.heard(s, "dns", "A"))
		}
		return c.close(), want
	}},
	{"musl", false, func(p *dnsPod) (got, want []string) {
		return p.musl(p.family(), p.one, p.two, p.three), p.heardAtOnce(
			p.one, "dns", "A", p.two, "dns", "A", p.three, "dns", "A",
			p.one, "dns", "AAAA", p.two, "dns", "AAAA", p.three, "dns", "AAAA")
	}},
	{"musl, by a socket for both families", false, func(p *dnsPod) (got, want []string) {
		return p.musl(6, p.one, p.two), p.heardAtOnce(p.one, "dns", "A", p.two, "dns", "A", p.one, "dns", "AAAA", p.two, "dns", "AAAA")
	}},
	{"one socket, several resolvers in turn", false, func(p *dnsPod) (got, want []string) {
		c := p.client(flowgen.ByApp, p.family())
		for i, s := range []netip.AddrPort{p.one, p.two, p.one, p.three, p.one} {
			c.ask(fmt.Sprint(i), s)
			c.hear(1)
			want = append(want, p.heard(s, "dns", i)...)
		}
		return c.close(), want
	}},
	{"many at once", false, func(p *dnsPod) (got, want []string) {
		c := p.client(flowgen.ByApp, p.family())
		var questions []string
		var to []netip.AddrPort
		var answers []any
		for i := range 32 {
			questions, to = append(questions, fmt.Sprint(i)), append(to, []netip.AddrPort{p.one, p.two, p.three}[i%3])
			answers = append(answers, to[i], "dns", i)
		}
		c.askMany(questions, to)
		c.hearMany(len(questions))
		return c.close(), p.heardAtOnce(answers...)
	}},
	{"captured, and not, by one socket", false, func(p *dnsPod) (got, want []string) {
		c := p.client(flowgen.ByApp, p.family())
		other := at(p.one.Addr(), dnsPort+1)
		c.askMany([]string{"a", "b", "c"}, []netip.AddrPort{p.one, other, p.two})
		c.hearMany(3)
		return c.close(), p.heardAtOnce(p.one, "dns", "a", other, "world", "b", p.two, "dns", "c")
	}},
	{"connected, then not", false, func(p *dnsPod) (got, want []string) {
		// To the same: an IPv6 socket goes on to hear nobody else
		// (__udp_disconnect in net/ipv4/udp.c leaves sk_v6_daddr).
		c := p.client(flowgen.ByApp, p.family())
		c.connect(p.one)
		c.ask("a", none)
		c.hear(1)
		c.disconnect()
		c.ask("b", p.one)
		c.hear(1)
		return c.close(), slices.Concat(connected(p.one), p.heard(p.one, "dns", "a"), p.heard(p.one, "dns", "b"))
	}},
	{"the proxy's own", false, func(p *dnsPod) (got, want []string) {
		for _, by := range []string{flowgen.ByProxy, flowgen.ByUIDOnly} {
			for _, connected := range []bool{false, true} {
				c, to := p.client(by, p.family()), p.one
				if connected {
					c.connect(to)
					c.log, to = nil, none
				}
				c.ask(by, to)
				c.hear(1)
				got, want = append(got, c.close()...), append(want, p.heard(p.one, "world", by)...)
			}
		}
		return got, want
	}},
	{"of the proxy's group alone", false, func(p *dnsPod) (got, want []string) {
		c := p.client(flowgen.ByGIDOnly, p.family())
		c.ask("a", p.one)
		c.hear(1)
		return c.close(), p.heard(p.one, "dns", "a")
	}},
	{"the proxy, from the app's port", false, func(p *dnsPod) (got, want []string) {
		// The app has asked the same from the same port a moment ago.
		for _, x := range []struct{ by, answers string }{{flowgen.ByApp, "dns"}, {flowgen.ByProxy, "world"}, {flowgen.ByApp, "dns"}} {
			c := newClient(p.t, p.ring, p.who(x.by), testbed.SocketSpec{Family: p.family(), Bind: at(p.own, 5555)})
			c.ask(x.by, p.one)
			c.hear(1)
			got, want = append(got, c.close()...), append(want, p.heard(p.one, x.answers, x.by)...)
		}
		return got, want
	}},
	{"over TCP", false, func(p *dnsPod) (got, want []string) {
		for _, x := range []struct{ by, answers string }{
			{flowgen.ByApp, "dns"}, {flowgen.ByProxy, "world"}, {flowgen.ByUIDOnly, "world"}, {flowgen.ByGIDOnly, "world"},
		} {
			r := p.who(x.by).Connect(p.t, testbed.ConnectSpec{Dst: p.one, Abort: true})
			line := fmt.Sprintf("%s: %s %s, at %s", x.by, r.Errno, r.Listener(), plain(r.Peer))
			if r.Listener() == "dns" {
				line += " for " + r.Served.OrigDst().Addr.String()
			}
			got = append(got, line)
			line = fmt.Sprintf("%s:  %s, at %v", x.by, x.answers, p.one)
			if x.answers == "dns" {
				line += " for " + p.one.String()
			}
			want = append(want, line)
		}
		return got, want
	}},
	{"port 53 excluded", true, func(p *dnsPod) (got, want []string) {
		c := p.client(flowgen.ByApp, p.family())
		c.connect(p.one)
		c.ask("A", none)
		c.hear(1)
		got = append(c.close(), p.musl(p.family(), p.one, p.two)...)
		r := p.who(flowgen.ByApp).Connect(p.t, testbed.ConnectSpec{Dst: p.one, Abort: true})
		return append(got, "TCP: "+r.Errno+r.Listener()), slices.Concat(connected(p.one), p.heard(p.one, "world", "A"),
			p.heard(p.one, "world", "A", p.two, "world", "A", p.one, "world", "AAAA", p.two, "world", "AAAA"), []string{"TCP: world"})
	}},
	// Last: it takes the proxy's resolvers away.
	{"nobody at the proxy's port", false, func(p *dnsPod) (got, want []string) {
		p.ring = slices.DeleteFunc(slices.Clone(p.ring), func(r resolver) bool { return r.name == "dns" && r.vanish(p.t) })
		c := p.client(flowgen.ByApp, p.family())
		other := at(p.one.Addr(), dnsPort+1)
		// Had the first gone around the proxy, its answer would come first.
		c.ask("a", p.one)
		c.ask("b", other)
		c.hear(1)
		return c.close(), p.heard(other, "world", "b")
	}},
}

// TestPrivilegedDNSResolvers has resolvers of all makes ask, in both families.
func TestPrivilegedDNSResolvers(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, servesDNS) {
		world := worldRing(t, n.world)
		for _, family := range []int{4, 6} {
			pods := map[bool]*dnsPod{}
			for _, excluded := range []bool{false, true} {
				mutators := []testbed.PodMutator{testbed.ProxyEnv(envDNSCapture, "true")}
				if excluded {
					mutators = append(mutators, testbed.Annotate(annotExcludePort, "53"))
				}
				p := n.pod(t, mutators)
				d := &dnsPod{pod: p, own: p.Addr4(), lastAsked: knowsLastAsked(n), cluster: cluster{ap("10.99.0.53:53"), ap("10.99.0.54:53"), ap("10.98.0.53:53")}}
				if family == 6 {
					d.own, d.cluster = p.Addr6(), cluster{ap("[fd99::53]:53"), ap("[fd99::54]:53"), ap("[fd98::53]:53")}
				}
				d.ring = slices.Concat(world, podRing(t, p.who, proxyDNSPort))
				pods[excluded] = d
			}
			for _, sc := range dnsScenarios {
				t.Run(fmt.Sprintf("%s/IPv%d/%s", n.name, family, sc.name), func(t *testing.T) {
					p := pods[sc.excluded]
					p.t = t
					got, want := sc.play(p)
					if diff := cmp.Diff(want, got); diff != "" {
						t.Errorf("(-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}
