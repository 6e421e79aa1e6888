// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// TestPrivilegedBindToDevice: a socket that is bound to an interface goes where it
// goes behind iptables, be it a client's or the proxy's listener.
func TestPrivilegedBindToDevice(t *testing.T) {
	begin(t)
	n := newNode(t)
	x := newTwins(t, n).withCast(t)
	for _, device := range []string{"eth0", "lo"} {
		for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80", "10.97.1.1:80", "[fd97::5]:80", "A4:8080", "[A6]:8080", "127.0.0.1:8080"} {
			compare(t, x, device+" to "+dst, func(t *testing.T, p *twin) seen {
				a := p.Actor(t, "bound", testbed.AppUID, testbed.AppGID, testbed.WithCaps(unix.CAP_NET_RAW))
				defer a.Stop(t)
				spec := testbed.ConnectSpec{Dst: expand(p.Pod, dst), Timeout: 300 * time.Millisecond, Abort: true, SocketSpec: testbed.SocketSpec{Device: device}}
				s := likeness(spec, a.Connect(t, spec))
				// Redirected or not, it gets nowhere.
				if s.Errno == testbed.ErrnoTimeout || s.Errno == "ENETUNREACH" || s.Errno == "EHOSTUNREACH" || s.Errno == "EINVAL" {
					s.Errno = "nowhere"
				}
				return s
			})
		}
	}
	for _, device := range []string{"eth0", "lo"} {
		y := newTwins(t, n).withCast(t,
			testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_RAW)),
			testbed.ShapeListeners(func(l *testbed.ListenSpec) {
				if l.Name == "in" {
					l.Device = device
				}
			}))
		for _, dst := range []string{"A4:8080", "[A6]:8080"} {
			got := compare(t, y, "the proxy listens on "+device+", to "+dst, func(t *testing.T, p *twin) seen {
				spec := testbed.ConnectSpec{Dst: expand(p.Pod, dst)}
				return likeness(spec, p.World.Connect(t, spec))
			})
			if want := map[string]string{"eth0": "in", "lo": ""}[device]; got.Listener != want {
				t.Errorf("the proxy listens on %s, to %s: served by %q, want %q", device, dst, got.Listener, want)
			}
		}
	}
}

// TestPrivilegedNestedNetns: what a process of the pod does in a network namespace
// of its own is not the pod's: it goes where it asks, as behind iptables.
func TestPrivilegedNestedNetns(t *testing.T) {
	begin(t)
	d := newDNSPod(t, newNode(t), testbed.NewPod(t))
	before := d.ebpf.rules(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	nested := &dnsPod{Pod: testbed.NewPod(t, testbed.SandboxOf(d.Pod), testbed.InWorld(w))}
	nested.start(t)
	for _, form := range forms {
		x := nested.args(form)
		for _, a := range []answer{x.socket(t, nested.app).ask("q", x.dst[0]), x.socket(t, nested.app).askConnected("q", x.dst[0])} {
			if a.Data != fmt.Sprintf("world: q from %v", x.own) || a.From != x.dst[0].String() {
				t.Errorf("%s: DNS: %+v", form, a)
			}
		}
	}
	for _, dst := range []string{"10.99.1.1:80", "[fd99::5]:80"} {
		from := nested.Addr4()
		if ap(dst).Addr().Is6() {
			from = nested.Addr6()
		}
		expect(t, "outbound", nested.app.Dial(t, dst), want{listener: "world", dst: ap(dst), from: from})
	}
	if got := d.ebpf.rules(t).since(before); len(got) != 0 {
		t.Errorf("the pod has decided %v", got)
	}
}

// TestPrivilegedAtOnce: thousands of connections at once, in both directions, each
// with its own destination.
func TestPrivilegedAtOnce(t *testing.T) {
	begin(t)
	n := newNode(t)
	const actors, each = 4, 750
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), twinPolicy...)
	p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Backlog, l.Forget = 4096, true }))
	var wg sync.WaitGroup
	check := func(a *testbed.Actor, listener string, specs []testbed.ConnectSpec) {
		wg.Go(func() {
			failed := 0
			for i, r := range a.ConnectBatch(t, specs) {
				dst := specs[i].Dst
				o := ""
				if r.Served != nil {
					o = plain(r.Served.OrigDst().Addr)
				}
				if r.Listener() != listener || o != dst.String() {
					if failed++; failed < 5 {
						t.Errorf("to %v: %s %s, by %q, for %s", dst, r.Errno, r.Step, r.Listener(), o)
					}
				}
			}
		})
	}
	for i := range actors {
		out, in := make([]testbed.ConnectSpec, each), make([]testbed.ConnectSpec, each)
		for k := range each {
			to := netip.AddrFrom4([4]byte{10, 98, byte(i), byte(k)})
			if k%2 == 1 {
				to = netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x98, 14: byte(i), 15: byte(k)})
			}
			out[k] = testbed.ConnectSpec{Dst: at(to, uint16(1000+k)), Abort: true}
			own := p.Addr4()
			if k%2 == 1 {
				own = p.Addr6()
			}
			in[k] = testbed.ConnectSpec{Dst: at(own, uint16(9000+k)), Abort: true}
		}
		check(p.Actor(t, fmt.Sprintf("app-%d", i), testbed.AppUID, testbed.AppGID), "out", out)
		check(w.Actor, "in", in)
	}
	wg.Wait()
	testbed.Eventually(t, "every handshake to end", func() bool { return p.state(t).Inflight == 0 })
	p.expectFailures(t)
}

// synFlood sends SYNs from ever other addresses to a port, until stop is closed,
// and counts them.
func synFlood(t testing.TB, w *testbed.World, dst netip.AddrPort, stop <-chan struct{}, count *atomic.Int64) {
	t.Helper()
	fd := -1
	if err := w.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	}); err != nil {
		t.Error(err)
		return
	}
	defer unix.Close(fd)
	sum := func(b []byte) uint16 {
		var s uint32
		for i := 0; i < len(b); i += 2 {
			s += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		for s > 0xffff {
			s = s>>16 + s&0xffff
		}
		return ^uint16(s)
	}
	to := dst.Addr().As4()
	for {
		select {
		case <-stop:
			return
		default:
		}
		sent := count.Add(1)
		from := [4]byte{198, 51, byte(sent >> 8), byte(sent)}
		pkt := make([]byte, 40)
		pkt[0], pkt[8], pkt[9] = 0x45, 64, unix.IPPROTO_TCP
		binary.BigEndian.PutUint16(pkt[2:], 40)
		copy(pkt[12:], from[:])
		copy(pkt[16:], to[:])
		tcp := pkt[20:]
		binary.BigEndian.PutUint16(tcp, uint16(1024+sent%60000))
		binary.BigEndian.PutUint16(tcp[2:], dst.Port())
		binary.BigEndian.PutUint32(tcp[4:], uint32(sent))
		tcp[12], tcp[13] = 5<<4, 2 // SYN
		binary.BigEndian.PutUint16(tcp[14:], 65535)
		pseudo := append(append(append([]byte(nil), from[:]...), to[:]...), 0, unix.IPPROTO_TCP, 0, 20)
		binary.BigEndian.PutUint16(tcp[16:], sum(append(pseudo, tcp...)))
		_ = unix.Sendto(fd, pkt, 0, &unix.SockaddrInet4{Addr: to}) // some find no room
	}
}

// tcpCount is one of the counters that the kernel has of TCP in a network
// namespace.
func tcpCount(t testing.TB, in interface{ Do(func() error) error }, name string) int {
	t.Helper()
	var stat []byte
	if err := in.Do(func() (err error) {
		stat, err = os.ReadFile("/proc/thread-self/net/netstat")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	names, values, _ := strings.Cut(string(stat), "\n")
	values, _, _ = strings.Cut(values, "\n")
	i := slices.Index(strings.Fields(names), name)
	if i < 0 {
		t.Fatalf("the kernel has no counter %s", name)
	}
	n, err := strconv.Atoi(strings.Fields(values)[i])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestPrivilegedSYNFloodUnderWay: under a flood of SYNs to a redirected port clients still
// reach the proxy, by SYN cookies, and nothing reaches the app.
func TestPrivilegedSYNFloodUnderWay(t *testing.T) {
	begin(t)
	n := newNode(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w), testbed.Sysctl("net.ipv4.tcp_max_syn_backlog", "16")), twinPolicy...)
	p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Backlog = 16 }))
	app := p.StartApp(t, 8080)
	// Nobody answers for the flood's addresses, not even by a RST.
	w.Command(t, "ip", "route", "add", "blackhole", "198.51.0.0/16", "table", "local")
	stop, ended := make(chan struct{}), make(chan struct{})
	var sent atomic.Int64
	go func() {
		defer close(ended)
		synFlood(t, w, at(p.Addr4(), 8080), stop, &sent)
	}()
	tried, served := 0, 0
	for ; tried < 20 || sent.Load() < 5000; tried++ {
		r := w.Connect(t, testbed.ConnectSpec{Dst: at(p.Addr4(), 8080), Abort: true, Timeout: 5 * time.Second})
		switch r.Listener() {
		case "in":
			served++
			if o := r.Served.OrigDst().Addr; plain(o) != at(p.Addr4(), 8080).String() {
				t.Errorf("original destination %v", o)
			}
		case "":
			t.Logf("%s at %s", r.Errno, r.Step)
		default:
			t.Errorf("served by %s", r.Listener())
		}
	}
	close(stop)
	<-ended
	cookies := tcpCount(t, p.Pod, "SyncookiesSent")
	t.Logf("%d SYNs, %d cookies, %d clients", sent.Load(), cookies, tried)
	if cookies == 0 {
		t.Error("the flood was none")
	}
	if served < tried*9/10 {
		t.Errorf("%d of %d clients were served", served, tried)
	}
	for _, l := range app.Listeners[8080] {
		if got := l.Accepted(t); len(got) > 0 {
			t.Errorf("the app was reached by %v", got[0].Peer)
		}
	}
}
