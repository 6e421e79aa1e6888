// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

const soOriginalDst = 80

// newScene makes the usual: a redirected pod in a world that serves all, with
// a proxy and an app.
func newScene(t testing.TB, n *node, opts ...testbed.Option) (*pod, *cast) {
	t.Helper()
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := n.redirect(t, testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(w)}, opts...)...), twinPolicy...)
	return p, newCast(t, p, []uint16{8080, 8081})
}

// expect fails the test unless a flow came to what is wanted.
func expect(t testing.TB, what string, r testbed.ConnectResult, w want) {
	t.Helper()
	if diff := cmp.Diff(w.outcome(r), see(r)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// accepted takes a copy of a socket that a process of the pod has accepted from
// a client's address and port: the bed's servers keep theirs to themselves.
func accepted(t testing.TB, pid int, client netip.AddrPort) int {
	t.Helper()
	proc, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(proc)
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		link, _ := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "fd", e.Name()))
		if len(link) < 7 || link[:7] != "socket:" {
			continue
		}
		theirs, _ := strconv.Atoi(e.Name())
		fd, err := unix.PidfdGetfd(proc, theirs, 0)
		if err != nil {
			continue // closed meanwhile
		}
		var peer netip.AddrPort
		if sa, err := unix.Getpeername(fd); err == nil {
			switch sa := sa.(type) {
			case *unix.SockaddrInet4:
				peer = at(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
			case *unix.SockaddrInet6:
				peer = at(netip.AddrFrom16(sa.Addr).Unmap(), uint16(sa.Port))
			}
		}
		if peer == client {
			t.Cleanup(func() { unix.Close(fd) })
			return fd
		}
		unix.Close(fd)
	}
	t.Fatalf("process %d has no connection from %v", pid, client)
	return -1
}

// TestPrivilegedOriginalDst: SO_ORIGINAL_DST at both levels, on the accepted and
// the connecting socket, with buffers of every length, on redirected and other
// connections. The proxy asks without any privilege.
func TestPrivilegedOriginalDst(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	if c.proxy.UID == 0 {
		t.Fatal("the proxy is root")
	}
	for _, x := range []struct {
		name, dst, listener string
		who                 *testbed.Actor
		family              int
	}{
		{"redirected", "10.99.1.1:80", "out", c.app.Actor, 4},
		{"redirected, mapped", "10.99.1.1:80", "out", c.app.Actor, 6},
		{"redirected", "[fd99::5]:443", "out", c.app.Actor, 6},
		{"to self", "A4:8080", "in", c.proxy.Actor, 4},
		{"to self", "[A6]:8080", "in", c.proxy.Actor, 6},
		{"direct to a proxy port", "127.0.0.1:15001", "out", c.app.Actor, 4},
		{"direct to a proxy port", "[::1]:15006", "in", c.app.Actor, 6},
		{"direct to a proxy port", "A4:15001", "out", c.app.Actor, 4},
		{"direct to the app", "127.0.0.1:8080", "app", c.app.Actor, 4},
		{"direct to the app", "[A6]:8080", "app", c.app.Actor, 6},
		{"inbound", "A4:8080", "in", p.World.Actor, 4},
		{"inbound", "[A6]:8080", "in", p.World.Actor, 6},
		{"inbound, direct", "A4:8081", "app", p.World.Actor, 4},
		{"inbound, direct", "[A6]:8081", "app", p.World.Actor, 6},
	} {
		t.Run(x.name+" "+x.dst, func(t *testing.T) {
			dst := expand(p.Pod, x.dst)
			r := x.who.Connect(t, testbed.ConnectSpec{SocketSpec: testbed.SocketSpec{Family: x.family}, Dst: dst, Keep: true})
			defer x.who.Close(t, r.Sock)
			if r.Listener() != x.listener {
				t.Fatalf("served by %+v, %s", r.Served, r.Errno)
			}
			server := accepted(t, r.Served.PID, at(r.Local.Addr().Unmap(), r.Local.Port()))
			four := dst.Addr().Is4()
			for _, l := range []struct{ level, need int }{{unix.SOL_IP, 16}, {unix.SOL_IPV6, 28}} {
				for _, size := range []int{0, 1, 8, 15, 16, 27, 28, 64, 128, 4096, 4097, 70000} {
					value, errno := rawGetsockopt(server, l.level, soOriginalDst, size)
					switch {
					case l.level == unix.SOL_IP && !four, size < l.need:
						if errno == 0 {
							t.Errorf("level %d with %d bytes: %x", l.level, size, value)
						}
					case errno != 0:
						t.Errorf("level %d with %d bytes: %v", l.level, size, errno)
					default:
						if diff := cmp.Diff(sockaddrBytes(l.level, dst), value); diff != "" {
							t.Errorf("level %d with %d bytes (-want +got):\n%s", l.level, size, diff)
						}
					}
				}
			}
			// The app's own end tells, too, what it was connected to.
			if x.name == "redirected" || x.name == "to self" {
				if got := r.OrigDst(); !got.OK() || plain(got.Addr) != dst.String() {
					t.Errorf("the connecting end says %+v", got)
				}
			}
			// What is asked beside it is the kernel's alone to answer.
			for _, size := range []int{4, 4096, 5000} {
				if _, errno := rawGetsockopt(server, unix.SOL_TCP, unix.TCP_INFO, size); errno != 0 {
					t.Errorf("TCP_INFO with %d bytes: %v", size, errno)
				}
			}
		})
	}
	sock := c.app.Socket(t, testbed.SocketSpec{Family: 4})
	if v, _, errno := c.app.Getsockopt(t, sock, unix.SOL_IP, soOriginalDst, 16); errno == "" {
		t.Errorf("a socket that is not connected gives %x", v)
	}
	c.app.Close(t, sock)
}

// rawGetsockopt gives what was written, cut at the length that came back.
func rawGetsockopt(fd, level, option, size int) ([]byte, unix.Errno) {
	buf := make([]byte, size+8)
	for i := range buf {
		buf[i] = 0xee
	}
	n := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option), uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return nil, errno
	}
	return buf[:n], 0
}

// sockaddrBytes is an address as the kernel writes it at a level.
func sockaddrBytes(level int, a netip.AddrPort) []byte {
	if level == unix.SOL_IP {
		b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET)
		b = binary.BigEndian.AppendUint16(b, a.Port())
		return append(append(b, a.Addr().AsSlice()...), make([]byte, 8)...)
	}
	b := binary.NativeEndian.AppendUint16(nil, unix.AF_INET6)
	b = binary.BigEndian.AppendUint16(b, a.Port())
	b = append(b, 0, 0, 0, 0)
	as16 := a.Addr().As16()
	return append(append(b, as16[:]...), 0, 0, 0, 0)
}

// TestPrivilegedWaysToConnect: however a socket is connected, the table decides.
func TestPrivilegedWaysToConnect(t *testing.T) {
	begin(t)
	n := newNode(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), twinPolicy...)
	p.EnableFastOpen(t)
	c := newCast(t, p, []uint16{8080}, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.FastOpen = 128 }))
	for _, way := range []struct {
		name  string
		shape func(*testbed.ConnectSpec)
	}{
		{"blocking", func(*testbed.ConnectSpec) {}},
		{"non-blocking", func(s *testbed.ConnectSpec) { s.Nonblock = true }},
		{"io_uring", func(s *testbed.ConnectSpec) { s.IOURing = true }},
		{"MSG_FASTOPEN", func(s *testbed.ConnectSpec) { s.FastOpen, s.Data = true, "hello" }},
		{"TCP_FASTOPEN_CONNECT", func(s *testbed.ConnectSpec) { s.FastOpenConnect, s.Data = true, "hello" }},
	} {
		for _, x := range []struct {
			dst, listener string
			who           *testbed.Actor
			family        int
			from          netip.Addr
		}{
			{"10.99.1.1:80", "out", c.app.Actor, 4, p.Addr4()},
			{"10.99.1.1:80", "out", c.app.Actor, 6, p.Addr4()},
			{"[fd99::5]:80", "out", c.app.Actor, 6, p.Addr6()},
			{"10.97.1.1:80", "world", c.app.Actor, 4, p.Addr4()},
			{"[fd97::5]:80", "world", c.app.Actor, 6, p.Addr6()},
			{"A4:8080", "in", c.proxy.Actor, 4, p.Addr4()},
			{"[A6]:8080", "in", c.proxy.Actor, 6, p.Addr6()},
			{"127.0.0.1:8080", "app", c.app.Actor, 4, netip.MustParseAddr("127.0.0.1")},
			{"A4:8080", "in", w.Actor, 4, testbed.WorldAddr4},
			{"[A6]:8080", "in", w.Actor, 6, testbed.WorldAddr6},
		} {
			t.Run(fmt.Sprintf("%s/%s to %s, family %d", way.name, x.who.Name, x.dst, x.family), func(t *testing.T) {
				spec := testbed.ConnectSpec{Dst: expand(p.Pod, x.dst)}
				spec.Family = x.family
				way.shape(&spec)
				// Twice: the first may only be told that fast open is possible.
				for range 2 {
					r := x.who.Connect(t, spec)
					if spec.IOURing && (r.Errno == "ENOSYS" || r.Errno == "EPERM") {
						t.Skipf("no io_uring here: %s", r.Errno)
					}
					expect(t, spec.Dst.String(), r, want{listener: x.listener, dst: spec.Dst, from: x.from})
					if (spec.FastOpen || spec.FastOpenConnect) && x.listener != "app" && r.Served != nil && r.Served.First != "hello\n" {
						t.Errorf("with the SYN came %q", r.Served.First)
					}
				}
			})
		}
	}
	p.expectFailures(t)
}

// TestPrivilegedHandshakes: the original destination survives every way in
// which a connection may come to be accepted, and those that never are leave
// nothing behind.
func TestPrivilegedHandshakes(t *testing.T) {
	begin(t)
	n := newNode(t)
	for _, x := range []struct {
		name  string
		shape func(*testbed.ListenSpec)
		sys   string
	}{
		{"SYN cookies", nil, "2"},
		{"TCP_DEFER_ACCEPT", func(l *testbed.ListenSpec) { l.DeferAccept = 5 }, "1"},
		{"no SO_REUSEADDR", func(l *testbed.ListenSpec) { l.NoReuseAddr = true }, "1"},
	} {
		t.Run(x.name, func(t *testing.T) {
			w := testbed.NewWorld(t)
			w.ServeAll(t)
			p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w), testbed.Sysctl("net.ipv4.tcp_syncookies", x.sys)), twinPolicy...)
			var opts []testbed.ProxyOption
			if x.shape != nil {
				opts = append(opts, testbed.ShapeListeners(x.shape))
			}
			c := newCast(t, p, []uint16{8080}, opts...)
			for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80"} {
				from := p.Addr4()
				if ap(dst).Addr().Is6() {
					from = p.Addr6()
				}
				for range 5 {
					r := c.app.Connect(t, testbed.ConnectSpec{Dst: ap(dst), Data: "hello"})
					expect(t, dst, r, want{listener: "out", dst: ap(dst), from: from})
				}
				// Gone at once, before anybody has looked.
				gone := make([]testbed.ConnectSpec, 50)
				for i := range gone {
					gone[i] = testbed.ConnectSpec{Dst: ap(dst), NoGreeting: true, Abort: i%2 == 0, Nonblock: i%3 == 0}
				}
				c.app.ConnectBatch(t, gone)
			}
			for _, a := range p.AllAddrs() {
				from := testbed.WorldAddr4
				if a.Is6() {
					from = testbed.WorldAddr6
				}
				r := w.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080), Data: "hello"})
				expect(t, "inbound", r, want{listener: "in", dst: at(a, 8080), from: from})
			}
			testbed.Eventually(t, "every handshake to end", func() bool { return p.state(t).Inflight == 0 })
			p.expectFailures(t)
		})
	}
}

// TestPrivilegedProxyDown: while the proxy does not listen, what is for it is
// refused, and inbound at once; it never goes around the proxy.
func TestPrivilegedProxyDown(t *testing.T) {
	begin(t)
	n := newNode(t)
	for _, cookies := range []string{"1", "2"} {
		t.Run("syncookies "+cookies, func(t *testing.T) {
			x := newTwins(t, n, testbed.Sysctl("net.ipv4.tcp_syncookies", cookies))
			for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
				p.app = p.StartApp(t, 8080, 8081)
			}
			scenario := func(t *testing.T, p *twin) (all []seen) {
				for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80", "127.0.0.1:15001", "127.0.0.1:8080", "10.97.1.1:80"} {
					r := p.app.Dial(t, dst)
					all = append(all, likeness(testbed.ConnectSpec{}, r))
				}
				for _, dst := range []string{"A4:8080", "[A6]:8080", "A4:15006", "A4:8081", "[A6]:8081", "A4:15008"} {
					r := p.World.Connect(t, testbed.ConnectSpec{Dst: expand(p.Pod, dst)})
					if r.Errno == "ECONNREFUSED" && !r.AtOnce() {
						t.Errorf("%s: refused after %v", dst, r.Elapsed)
					}
					all = append(all, likeness(testbed.ConnectSpec{}, r))
				}
				return all
			}
			refusals := func(all []seen) (n int) {
				for _, s := range all {
					if s.Errno == "ECONNREFUSED" {
						n++
					}
				}
				return n
			}
			if all := compare(t, x, "never started", scenario); refusals(all) != 7 {
				t.Errorf("%+v", all)
			}
			for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
				p.proxy = p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
			}
			if all := compare(t, x, "up", scenario); refusals(all) != 1 {
				t.Errorf("%+v", all)
			}
			for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
				p.proxy.Kill(t)
			}
			if all := compare(t, x, "killed", scenario); refusals(all) != 7 {
				t.Errorf("%+v", all)
			}
			for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
				p.proxy = p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
			}
			if all := compare(t, x, "up again", scenario); refusals(all) != 1 {
				t.Errorf("%+v", all)
			}
			x.behindEBPF.ebpf.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
		})
	}
}

// TestPrivilegedOwner: the owner is who created the socket, whoever has it now.
func TestPrivilegedOwner(t *testing.T) {
	begin(t)
	n := newNode(t)
	x := newTwins(t, n).withCast(t)
	uid, gid, other := testbed.ProxyUID, testbed.ProxyGID, bogusUID
	for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80", "A4:8080", "[A6]:8080"} {
		for _, o := range []struct {
			name     string
			uid, gid *int
		}{
			{"root", nil, nil},
			{"fsuid of the proxy", &uid, nil},
			{"fsgid of the proxy", nil, &gid},
			{"both of the proxy", &uid, &gid},
			{"both of another", &other, &other},
		} {
			compare(t, x, o.name+" to "+dst, func(t *testing.T, p *twin) seen {
				root := p.Actor(t, "root", 0, 0)
				defer root.Stop(t)
				spec := testbed.ConnectSpec{Dst: expand(p.Pod, dst), SocketSpec: testbed.SocketSpec{FSUID: o.uid, FSGID: o.gid}}
				return likeness(spec, root.Connect(t, spec))
			})
		}
		compare(t, x, "passed by the proxy to the app, to "+dst, func(t *testing.T, p *twin) seen {
			d := expand(p.Pod, dst)
			sock := p.proxy.Socket(t, testbed.SocketSpec{Family: familyOf(d.Addr())})
			there := p.proxy.PassSocket(t, sock, p.app.Actor)
			p.proxy.Close(t, sock)
			defer p.app.Close(t, there)
			return likeness(testbed.ConnectSpec{}, p.app.Connect(t, testbed.ConnectSpec{Sock: there, Dst: d}))
		})
		compare(t, x, "passed by the app to the proxy, to "+dst, func(t *testing.T, p *twin) seen {
			d := expand(p.Pod, dst)
			sock := p.app.Socket(t, testbed.SocketSpec{Family: familyOf(d.Addr())})
			there := p.app.PassSocket(t, sock, p.proxy.Actor)
			defer p.proxy.Close(t, there)
			defer p.app.Close(t, sock)
			return likeness(testbed.ConnectSpec{}, p.proxy.Connect(t, testbed.ConnectSpec{Sock: there, Dst: d}))
		})
	}
}

// TestPrivilegedRoom: when a pod has too many handshakes with its proxy under
// way, connect fails; when they are gone, there is room again.
func TestPrivilegedRoom(t *testing.T) {
	begin(t)
	const limit = 8
	n := newNode(t, func(o *loader.Options) { o.InflightLimit = limit })
	p, c := newScene(t, n)
	for _, l := range append(c.proxy.Out, c.proxy.In...) {
		l.Close(t)
	}
	frozen := c.proxy.Listen(t, testbed.ListenSpec{Name: "frozen", Addr: ap("[::]:15001"), NoAccept: true, Backlog: 1})

	var stuck []int
	refused := 0
	for i := range 4 * limit {
		dst := at(netip.AddrFrom4([4]byte{10, 99, 1, byte(i)}), 80)
		if i%2 == 1 {
			dst = at(netip.MustParseAddr(fmt.Sprintf("fd99::%x", i+1)), 80)
		}
		// No connect succeeds but those that the backlog takes.
		r := c.app.Connect(t, testbed.ConnectSpec{Dst: dst, Nonblock: true, Keep: true, NoGreeting: true, Timeout: time.Millisecond})
		stuck = append(stuck, r.Sock)
		switch r.Errno {
		case "", testbed.ErrnoTimeout:
		case "EPERM":
			refused++
		default:
			t.Errorf("connect %d: %q", i, r.Errno)
		}
	}
	if got := p.state(t).Inflight; got != limit {
		t.Errorf("%d handshakes are under way, want %d", got, limit)
	}
	if refused < 2*limit {
		t.Errorf("%d of %d were refused", refused, 4*limit)
	}
	// A direct connect to a proxy port needs room as well; no other does.
	for dst, errno := range map[string]string{"127.0.0.1:15001": "EPERM", "127.0.0.1:8080": "", "10.97.1.1:80": "", "[::1]:15006": "EPERM"} {
		if r := c.app.Dial(t, dst); r.Errno != errno {
			t.Errorf("%s: %q, want %q", dst, r.Errno, errno)
		}
	}
	p.expectFailures(t, bpf.ShuntPlacePLACE_CONNECT_ROOM)

	for _, s := range stuck {
		c.app.Close(t, s)
	}
	testbed.Eventually(t, "room", func() bool { return p.state(t).Inflight == 0 })
	frozen.Close(t)
	c.proxy.Listen(t, testbed.ListenSpec{Name: "out", Addr: ap("[::]:15001")})
	for range 2 * limit {
		r := c.app.Dial(t, "10.99.5.5:80")
		expect(t, "with room again", r, want{listener: "out", dst: ap("10.99.5.5:80"), from: p.Addr4()})
	}
	testbed.Eventually(t, "room", func() bool { return p.state(t).Inflight == 0 })
}

// TestPrivilegedUnknownDestination: a connection to the proxy that nobody has
// noted, from a process outside of the pod's cgroup, gives no answer to
// SO_ORIGINAL_DST rather than a wrong one.
func TestPrivilegedUnknownDestination(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	stranger := p.Actor(t, "stranger", 0, 0, testbed.InHostCgroup())
	for _, dst := range []string{"127.0.0.1:15001", "[::1]:15001", "127.0.0.1:15006", "A4:15001", "[A6]:15006"} {
		r := stranger.Connect(t, testbed.ConnectSpec{Dst: expand(p.Pod, dst)})
		if r.Errno != "" || r.Served == nil {
			t.Errorf("%s: %q", dst, r.Errno)
			continue
		}
		if r.Served.OrigDst4.OK() || r.Served.OrigDst6.OK() {
			t.Errorf("%s: the proxy is told %+v, %+v", dst, r.Served.OrigDst4, r.Served.OrigDst6)
		}
	}
	p.expectFailures(t, bpf.ShuntPlacePLACE_ACCEPT_NO_ENTRY, bpf.ShuntPlacePLACE_GETSOCKOPT_LOST)
	// Those in the pod are none the worse for it.
	expect(t, "direct", c.app.Dial(t, "127.0.0.1:15001"), want{listener: "out", dst: ap("127.0.0.1:15001"), from: netip.MustParseAddr("127.0.0.1")})
	expect(t, "redirected", c.app.Dial(t, "10.99.1.1:80"), want{listener: "out", dst: ap("10.99.1.1:80"), from: p.Addr4()})
}

// TestPrivilegedEqualPods: two pods with equal addresses, whose processes use
// equal ports at the same time, have nothing to do with each other.
func TestPrivilegedEqualPods(t *testing.T) {
	begin(t)
	n := newNode(t)
	type one struct {
		*pod
		*cast
		name string
	}
	var pods []one
	for i := range 2 {
		w := testbed.NewWorld(t)
		w.ServeAll(t)
		name := fmt.Sprint("pod", i)
		p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w), testbed.Addrs("10.244.9.9", "fd10:44::99")), twinPolicy...)
		pods = append(pods, one{p, newCast(t, p, []uint16{8080, 8081}, testbed.ProxyName(name)), name})
	}
	// The same ports: the two send the same packets.
	const rounds = 150
	var wg sync.WaitGroup
	for i, p := range pods {
		// Each asks for another address from the same source.
		dst4, dst6 := at(netip.AddrFrom4([4]byte{10, 99, 7, byte(i)}), 80), at(netip.MustParseAddr(fmt.Sprintf("fd99::70%d", i)), 80)
		for _, dst := range []netip.AddrPort{dst4, dst6} {
			own, src := p.Addr4(), testbed.WorldAddr4
			if dst.Addr().Is6() {
				own, src = p.Addr6(), testbed.WorldAddr6
			}
			specs := make([]testbed.ConnectSpec, rounds)
			back := make([]testbed.ConnectSpec, rounds)
			for j := range specs {
				port := uint16(20000 + j)
				specs[j] = testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(own, port), ReuseAddr: true}}
				back[j] = testbed.ConnectSpec{Dst: at(own, 8080), Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(src, port), ReuseAddr: true}}
			}
			wg.Go(func() {
				for _, r := range p.app.ConnectBatch(t, specs) {
					if expect(t, p.name, r, want{listener: "out", dst: dst, from: own}); r.Served != nil && r.Served.Actor != p.name {
						t.Errorf("a connection of %s went to %s", p.name, r.Served.Actor)
					}
				}
			})
			wg.Go(func() {
				for _, r := range p.World.ConnectBatch(t, back) {
					if expect(t, p.name, r, want{listener: "in", dst: at(own, 8080), from: src}); r.Served != nil && r.Served.Actor != p.name {
						t.Errorf("a connection to %s went to %s", p.name, r.Served.Actor)
					}
				}
			})
		}
	}
	wg.Wait()
	for _, p := range pods {
		if diff := cmp.Diff(tally{redirect.RuleOutIncludeCIDR: 2 * rounds, redirect.RuleInInclude: 2 * rounds}, p.rules(t)); diff != "" {
			t.Errorf("%s: counters (-want +got):\n%s", p.name, diff)
		}
		p.expectFailures(t)
	}
}

// TestPrivilegedMPTCP: MPTCP clients follow the table like others.
func TestPrivilegedMPTCP(t *testing.T) {
	begin(t)
	n := newNode(t)
	x := newTwins(t, n).withCast(t)
	spec := testbed.ConnectSpec{SocketSpec: testbed.SocketSpec{MPTCP: true}, Dst: ap("127.0.0.1:8080")}
	if r := x.behindIPTables.app.Connect(t, spec); r.Step == testbed.StepSocket {
		t.Skipf("no MPTCP in this kernel: %s", r.Errno)
	}
	for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80", "10.97.1.1:80", "127.0.0.1:8080", "A4:8080", "[A6]:8080"} {
		for _, who := range []string{"app", "proxy"} {
			compare(t, x, who+" to "+dst, func(t *testing.T, p *twin) seen {
				actor := p.app.Actor
				if who == "proxy" {
					actor = p.proxy.Actor
				}
				s := spec
				s.Dst = expand(p.Pod, dst)
				return likeness(s, actor.Connect(t, s))
			})
		}
	}
}
