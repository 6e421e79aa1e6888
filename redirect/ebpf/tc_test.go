// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// wireClient gives the client on the wire that has the family of a.
func wireClient(a netip.Addr) netip.Addr {
	if a.Is4() {
		return wireClient4
	}
	return wireClient6
}

// dialogueTo begins a connection by hand.
func (w *wire) dialogueTo(dst netip.AddrPort, port uint16) *dialogue {
	return &dialogue{wire: w, src: at(wireClient(dst.Addr()), port), dst: dst, seq: 1000}
}

// wrappings are the ways in which a segment may come that must make no
// difference.
var wrappings = []struct {
	name string
	ipv6 bool
	wrap wrapping
}{
	{name: "plain", wrap: wrapping{}},
	{name: "padded", wrap: wrapping{padding: make([]byte, 20)}},
	{name: "priority tag", wrap: wrapping{vlan: []uint16{0x6000}}},
	{name: "IPv4 options", wrap: wrapping{options: []byte{1, 1, 1, 0}}},
	{name: "all of the IPv4 options", wrap: wrapping{options: append(slices.Repeat([]byte{1}, 39), 0)}},
	{name: "options and a tag", wrap: wrapping{vlan: []uint16{0}, options: []byte{1, 1, 1, 0}}},
	{name: "plain", ipv6: true},
	{name: "priority tag", ipv6: true, wrap: wrapping{vlan: []uint16{0}}},
	{name: "hop-by-hop options", ipv6: true, wrap: wrapping{headers: []header{{kind: unix.IPPROTO_HOPOPTS}}}},
	{name: "destination options", ipv6: true, wrap: wrapping{headers: []header{{kind: unix.IPPROTO_DSTOPTS}}}},
	{name: "long destination options", ipv6: true, wrap: wrapping{headers: []header{{kind: unix.IPPROTO_DSTOPTS, body: append([]byte{0x1e, 60}, make([]byte, 60)...)}}}},
	{name: "an atomic fragment", ipv6: true, wrap: wrapping{headers: []header{{kind: unix.IPPROTO_FRAGMENT, body: []byte{0, 0, 0, 0, 0, 9}}}}},
	{name: "several headers", ipv6: true, wrap: wrapping{vlan: []uint16{0}, headers: []header{
		{kind: unix.IPPROTO_HOPOPTS}, {kind: unix.IPPROTO_DSTOPTS}, {kind: unix.IPPROTO_FRAGMENT, body: []byte{0, 0, 0, 0, 0, 9}}, {kind: unix.IPPROTO_DSTOPTS},
	}}},
}

// TestPrivilegedWrappings: however a connection's packets are wrapped, it reaches
// the proxy; if that does not listen, it is refused at once. It never reaches the
// app: not by SYN cookies either.
func TestPrivilegedWrappings(t *testing.T) {
	begin(t)
	eachHook(t, func(t *testing.T, n *node) {
		for cookies, value := range map[string]string{"no cookies": "1", "SYN cookies": "2"} {
			p := n.redirect(t, testbed.NewPod(t, testbed.Sysctl("net.ipv4.tcp_syncookies", value)), twinPolicy...)
			p.StartApp(t, 8080, 8081)
			w := newWire(t, p)
			port := uint16(7000)
			each := func(what string, fn func(t *testing.T, d *dialogue)) {
				for _, x := range wrappings {
					own := p.Addr4()
					if x.ipv6 {
						own = p.Addr6()
					}
					port++
					d := w.dialogueTo(at(own, 8080), port)
					d.wrap = x.wrap
					t.Run(fmt.Sprintf("%s/%s/%v %s", cookies, what, own, x.name), func(t *testing.T) {
						w.t, d.wire.t = t, t
						fn(t, d)
					})
				}
			}
			each("nobody listens", func(t *testing.T, d *dialogue) {
				d.send(d.segment(syn, ""))
				r, ok := d.receive(patience, between(d.src, d.dst, 0))
				if !ok || r.flags != rst|ack || r.ack != d.seq+1 || r.seq != 0 || !r.valid || len(r.data) > 0 || len(r.wrap.options) > 0 {
					t.Errorf("a SYN was answered by %+v, %v", r, ok)
				}
				// A cookie of nobody's.
				d.ack = 4242
				d.send(d.segment(ack, "hello"))
				r, ok = d.receive(patience, between(d.src, d.dst, 0))
				if !ok || r.flags != rst || r.seq != d.ack || !r.valid {
					t.Errorf("an ACK was answered by %+v, %v", r, ok)
				}
			})
			proxy := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
			each("the proxy listens", func(t *testing.T, d *dialogue) {
				s, err := d.shake()
				if err != nil || s.Listener != "in" || s.OrigDst().Addr != d.dst || s.Peer.Addr().Unmap() != d.src.Addr() {
					t.Errorf("served by %+v, %v", s, err)
				}
				d.abort()
			})
			each("not redirected", func(t *testing.T, d *dialogue) {
				d.dst = at(d.dst.Addr(), 8081)
				if s, err := d.shake(); err != nil || s.Listener != "app" {
					t.Errorf("served by %+v, %v", s, err)
				}
				d.abort()
			})
			p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
			proxy.Stop(t)
		}
	})
}

// TestPrivilegedRefusedOptions: what a kernel sends with IP options, and leaves the
// checksum to hardware, is refused at once.
func TestPrivilegedRefusedOptions(t *testing.T) {
	begin(t)
	eachHook(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		p.StartApp(t, 8080)
		for _, options := range []int{0, 0x00010101} { // three of no meaning, and the end
			sock := p.World.Socket(t, testbed.SocketSpec{Family: 4})
			if errno := p.World.SetsockoptInt(t, sock, unix.SOL_IP, unix.IP_OPTIONS, options); errno != "" {
				t.Fatal(errno)
			}
			r := p.World.Connect(t, testbed.ConnectSpec{Sock: sock, Dst: at(p.Addr4(), 8080), Keep: true})
			expect(t, fmt.Sprintf("options %#x", options), r, want{errno: "ECONNREFUSED"})
			p.World.Close(t, sock)
		}
		p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
	})
}

// TestPrivilegedSYNFlood: while SYNs that nobody follows up pour in, others are
// served, and none by the app.
func TestPrivilegedSYNFlood(t *testing.T) {
	begin(t)
	eachHook(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		app := p.StartApp(t, 8080)
		proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: ap("[::]:15006"), Backlog: 16})
		w := newWire(t, p)
		for _, own := range p.AllAddrs() {
			for port := range 500 {
				d := w.dialogueTo(at(own, 8080), uint16(10000+port))
				d.send(d.segment(syn, ""))
			}
			for range 20 {
				r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(own, 8080), Abort: true})
				if r.Listener() != "in" {
					t.Fatalf("%v: %+v", own, see(r))
				}
			}
		}
		if tcpCount(t, p.Pod, "SyncookiesSent") == 0 {
			t.Error("no SYN cookie was sent")
		}
		for _, l := range app.Listeners[8080] {
			if got := l.Accepted(t); len(got) > 0 {
				t.Errorf("the app has accepted %d connections", len(got))
			}
		}
		p.expectFailures(t)
	})
}

// TestPrivilegedTaggedReset: the answer to a tagged frame has its tag.
func TestPrivilegedTaggedReset(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		w := newWire(t, p)
		for _, own := range p.AllAddrs() {
			d := w.dialogueTo(at(own, 8080), 7777)
			d.wrap.vlan = []uint16{5}
			d.send(d.segment(syn, ""))
			if r, ok := d.receive(patience, between(d.src, d.dst, rst)); !ok || r.vlan != 5 || !r.valid {
				t.Errorf("%v: answered by %+v, %v", own, r, ok)
			}
		}
		p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
	})
}

// TestPrivilegedExcludedTagged: where eth0 is excluded, a frame with another
// network's tag is not eth0's; a priority tag, and none at all, are.
func TestPrivilegedExcludedTagged(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), append(slices.Clone(twinPolicy), testbed.Annotate(excludeInterfaces, "eth0"))...)
		p.StartApp(t, 8080)
		w := newWire(t, p)
		port := uint16(7000)
		for _, own := range p.AllAddrs() {
			for _, tags := range [][]uint16{nil, {0}, {0x6000}} {
				port++
				d := w.dialogueTo(at(own, 8080), port)
				d.wrap.vlan = tags
				if s, err := d.shake(); err != nil || s.Listener != "app" {
					t.Errorf("%v, tags %v: served by %+v, %v", own, tags, s, err)
				}
				d.abort()
			}
			for _, tags := range [][]uint16{{5}, {0x6005}} {
				port++
				d := w.dialogueTo(at(own, 8080), port)
				d.wrap.vlan = tags
				d.send(d.segment(syn, ""))
				if r, ok := d.receive(patience, between(d.src, d.dst, rst)); !ok || !r.valid {
					t.Errorf("%v, tags %v: answered by %+v, %v", own, tags, r, ok)
				}
			}
		}
		p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
		if n := p.rules(t)[redirect.RuleInExcludeInterface]; n != 6 {
			t.Errorf("%d connections were counted as excluded, want 6", n)
		}
	})
}

// TestPrivilegedFragments: a SYN in fragments does not reach the app, whatever
// they hide; sk_lookup serves it. Fragments of a connection's later segments are
// put together as ever.
func TestPrivilegedFragments(t *testing.T) {
	begin(t)
	eachHook(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		c := newCast(t, p, []uint16{8080, 8081})
		w := newWire(t, p)
		mss := []byte{2, 4, 5, 0xb4, 1, 1, 1, 1, 1, 1, 1, 0}
		port := uint16(7000)
		for _, own := range p.AllAddrs() {
			for _, x := range []struct {
				name string
				wrap wrapping
				want bpf.ShuntPlace
			}{
				{"ports only", wrapping{cuts: []int{8}}, bpf.ShuntPlacePLACE_TC_UNREADABLE},
				{"half a header", wrapping{cuts: []int{16}}, bpf.ShuntPlacePLACE_TC_UNREADABLE},
				{"a whole header", wrapping{cuts: []int{24}}, bpf.ShuntPlacePLACE_TC_FRAGMENT},
				{"ports only, and a false header behind", wrapping{cuts: []int{8}, padding: slices.Repeat([]byte{ack}, 40)}, bpf.ShuntPlacePLACE_TC_UNREADABLE},
			} {
				port++
				before := p.failures(t)[x.want]
				d := w.dialogueTo(at(own, 8080), port)
				d.wrap, d.options = x.wrap, mss
				d.send(d.segment(syn, ""))
				r, ok := d.receive(patience, between(d.src, d.dst, 0))
				if n.hook != redirect.HookTC {
					// The kernel takes no IPv6 fragment with half
					// a header first (RFC 8200, 4.5).
					if half := x.want == bpf.ShuntPlacePLACE_TC_UNREADABLE; half && own.Is6() {
						continue
					}
					if !ok || r.flags != syn|ack {
						t.Errorf("%v, %s: answered by %+v, %v", own, x.name, r, ok)
					}
					continue
				}
				if ok {
					t.Errorf("%v, %s: answered by %+v", own, x.name, r)
				}
				if p.failures(t)[x.want] != before+1 {
					t.Errorf("%v, %s: not counted", own, x.name)
				}
			}
			for _, to := range []uint16{8080, 8081} {
				port++
				d := w.dialogueTo(at(own, to), port)
				s, err := d.shake()
				if err != nil {
					t.Fatal(err)
				}
				d.wrap.cuts = []int{24, 48, 72}
				text := strings.Repeat("0123456789", 10) + "\n"
				d.send(d.segment(ack, text))
				r, ok := d.receive(patience, func(r received) bool { return between(d.src, d.dst, 0)(r) && len(r.data) > 0 })
				if !ok || string(r.data) != text {
					t.Errorf("%v: %s has sent back %q, %v", own, s.Listener, r.data, ok)
				}
				d.wrap = wrapping{}
				d.abort()
			}
		}
		for _, l := range c.app.Listeners[8080] {
			for _, a := range l.Accepted(t) {
				t.Errorf("the app has accepted %v", a.Peer)
			}
		}
	})
}

// TestPrivilegedHiddenHeader: behind more extension headers than are followed
// nothing reaches the app.
func TestPrivilegedHiddenHeader(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		newCast(t, p, []uint16{8080})
		d := newWire(t, p).dialogueTo(at(p.Addr6(), 8080), 7777)
		d.wrap.headers = slices.Repeat([]header{{kind: unix.IPPROTO_DSTOPTS}}, 12)
		d.send(d.segment(syn, ""))
		if r, ok := d.receive(patience, between(d.src, d.dst, 0)); ok {
			t.Errorf("answered by %+v", r)
		}
		p.expectFailures(t, bpf.ShuntPlacePLACE_TC_UNREADABLE)
	})
}

// TestPrivilegedSYNHits: a SYN that hits a connection never opens one with the
// app: an older one than that in TIME_WAIT, one that hits a living connection, a
// handshake, or a handshake whose listener has closed.
func TestPrivilegedSYNHits(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		p.StartApp(t, 8080, 8081)
		proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		spec := testbed.ListenSpec{Name: "in", Addr: ap("[::]:15006"), CloseFirst: true}
		l := proxy.Listen(t, spec)
		w := newWire(t, p)
		for _, own := range p.AllAddrs() {
			d := w.dialogueTo(at(own, 8080), 7777)
			d.seq = 1 << 20
			if _, err := d.shake(); err != nil {
				t.Fatal(err)
			}
			d.end()
			inTimeWait(t, proxy, ":1E61 06 ")
			older := *d
			older.seq = 1 << 10
			older.send(older.segment(syn, ""))
			if r, ok := d.receive(patience, func(r received) bool {
				return between(d.src, d.dst, ack)(r) && r.flags&(syn|fin) == 0 && r.ack == d.seq
			}); !ok {
				t.Errorf("%v: an old SYN for a connection in TIME_WAIT was answered by %+v, %v", own, r, ok)
			}
			newer := dialogue{wire: w, src: d.src, dst: d.dst, seq: 1 << 22}
			newer.send(newer.segment(syn, ""))
			if r, ok := d.receive(patience, between(d.src, d.dst, syn|ack)); !ok || r.ack != newer.seq+1 {
				t.Errorf("%v: a new SYN for a connection in TIME_WAIT was answered by %+v, %v", own, r, ok)
			}
			// A handshake is under way now, and its listener closes.
			l.Close(t)
			newer.send(newer.segment(syn, ""))
			d.receive(patience/4, func(received) bool { return false })
			newer.send(newer.segment(syn, ""))
			if r, ok := d.receive(patience, between(d.src, d.dst, rst|ack)); !ok || r.ack != newer.seq+1 {
				t.Errorf("%v: a SYN after the listener has closed was answered by %+v, %v", own, r, ok)
			}
			l = proxy.Listen(t, spec)
			if s, err := newer.shake(); err != nil || s.Listener != "in" {
				t.Errorf("%v: served by %+v, %v", own, s, err)
			}
			newer.abort()
			alive := w.dialogueTo(at(own, 8081), 7779)
			if _, err := alive.shake(); err != nil {
				t.Fatal(err)
			}
			again := *alive
			again.seq = 1 << 30
			again.send(again.segment(syn, ""))
			if r, ok := w.receive(patience, between(alive.src, alive.dst, ack)); !ok || r.flags != ack || r.ack != alive.seq {
				t.Errorf("%v: a SYN for a living connection was answered by %+v, %v", own, r, ok)
			}
			alive.abort()
		}
		p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
	})
}

func inTimeWait(t *testing.T, a *testbed.Actor, line string) {
	t.Helper()
	testbed.Eventually(t, "TIME_WAIT in the pod", func() bool {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp6", a.PID))
		return err == nil && strings.Contains(string(b), line)
	})
}

// TestPrivilegedTimeWaitStamps: of two connections by one port the later is known by
// its time, whatever its sequence numbers are.
func TestPrivilegedTimeWaitStamps(t *testing.T) {
	begin(t)
	stamp := func(at uint32) []byte {
		return append(binary.BigEndian.AppendUint32([]byte{2, 4, 5, 0xb4, 1, 1, 8, 10}, at), 0, 0, 0, 0)
	}
	eachHook(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		c := newCast(t, p, []uint16{8080}, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.CloseFirst = true }))
		w := newWire(t, p)
		port := uint16(7000)
		for _, own := range p.AllAddrs() {
			for _, x := range []struct {
				name  string
				seq   uint32
				stamp uint32
				opens bool
			}{
				{"later", 1 << 22, 2000, true},
				{"later, lower number", 1 << 10, 2000, true},
				{"earlier", 1 << 10, 500, false},
				{"earlier, higher number", 1 << 22, 500, false},
				{"same time, higher number", 1 << 22, 1000, true},
				{"same time, lower number", 1 << 10, 1000, false},
			} {
				port++
				d := w.dialogueTo(at(own, 8080), port)
				d.seq, d.options = 1<<20, stamp(1000)
				if _, err := d.shake(); err != nil {
					t.Fatal(err)
				}
				d.end()
				inTimeWait(t, c.proxy.Actor, fmt.Sprintf(":%04X 06 ", port))
				next := w.dialogueTo(d.dst, port)
				next.seq, next.options = x.seq, stamp(x.stamp)
				next.send(next.segment(syn, ""))
				r, ok := next.receive(patience, func(r received) bool {
					return between(next.src, next.dst, ack)(r) && r.flags&fin == 0 && len(r.data) == 0 && (r.flags&syn != 0 || r.ack == d.seq)
				})
				if opens := r.flags&syn != 0; !ok || opens != x.opens {
					t.Errorf("%v: %s: answered by %+v, %v", own, x.name, r, ok)
				}
				next.seq++
				next.abort()
			}
		}
	})
}

// TestPrivilegedTimeWaitKept: where the kernel keeps connections in TIME_WAIT from
// being reset (net.ipv4.tcp_rfc1337), a client that reuses its port has to wait.
func TestPrivilegedTimeWaitKept(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t, testbed.Sysctl("net.ipv4.tcp_rfc1337", "1")), twinPolicy...)
		c := newCast(t, p, []uint16{8080}, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.CloseFirst = true }))
		d := newWire(t, p).dialogueTo(at(p.Addr4(), 8080), 7777)
		if _, err := d.shake(); err != nil {
			t.Fatal(err)
		}
		d.end()
		inTimeWait(t, c.proxy.Actor, ":1E61 06 ")
		d.seq = 1 << 20
		d.send(d.segment(syn, ""))
		if r, ok := d.receive(patience, between(d.src, d.dst, syn)); ok {
			t.Errorf("answered by %+v", r)
		}
		p.expectFailures(t, bpf.ShuntPlacePLACE_TC_REOPEN)
	})
}

// TestPrivilegedTCTransfer: what a connection carries passes whole, in segments
// that the kernel joins and cuts.
func TestPrivilegedTCTransfer(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		newCast(t, p, []uint16{8080})
		for _, a := range p.AllAddrs() {
			r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080), Keep: true})
			if r.Listener() != "in" {
				t.Fatalf("%v: %+v", a, see(r))
			}
			line, lines := strings.Repeat("x", 1000), 100
			if errno := p.World.Send(t, r.Sock, strings.Repeat(line+"\n", lines)); errno != "" {
				t.Fatal(errno)
			}
			for i := range lines {
				if got, errno := p.World.RecvLine(t, r.Sock, 0); strings.TrimSuffix(got, "\n") != line || errno != "" {
					t.Fatalf("%v: line %d: %d bytes came back, %q", a, i, len(got), errno)
				}
			}
			p.World.Close(t, r.Sock)
		}
		p.expectFailures(t)
	})
}

// TestPrivilegedTCAddressLater: an address and a route that come after ADD are
// served, and what the pod only passes on is left alone.
func TestPrivilegedTCAddressLater(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t, testbed.Interface("net1", []string{"10.245.0.1"}, nil)), twinPolicy...)
		newCast(t, p, []uint16{8080})
		eth0, err := p.Netlink().LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		for _, later := range []string{"10.244.9.9/32", "fd10:44:9::9/128"} {
			a, err := netlink.ParseAddr(later)
			if err != nil {
				t.Fatal(err)
			}
			a.Flags = unix.IFA_F_NODAD
			if err := p.Netlink().AddrAdd(eth0, a); err != nil {
				t.Fatal(err)
			}
			prefix := netip.MustParsePrefix(later)
			p.World.Route(t, prefix, p.Pod, "eth0")
			d := newWire(t, p).dialogueTo(at(prefix.Addr(), 8080), 7777)
			testbed.Eventually(t, "the address", func() bool {
				s, err := d.shake()
				return err == nil && s.Listener == "in"
			})
			d.abort()
		}
		for _, a := range p.AllAddrs() {
			if r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)}); r.Listener() != "in" {
				t.Errorf("%v: %+v", a, see(r))
			}
		}
		p.Sysctl(t, "net.ipv4.ip_forward", "1")
		before := p.rules(t)
		d := newWire(t, p).dialogueTo(ap("10.99.7.7:8080"), 7778)
		d.send(d.segment(syn, ""))
		d.receive(patience, between(d.src, d.dst, rst))
		if d := p.rules(t).since(before); len(d) != 0 {
			t.Errorf("a packet that passes through was decided: %v", d)
		}
		p.expectFailures(t)
	})
}

// hooksAt counts the TC programs at a pod's interfaces: ours, and all.
func hooksAt(t *testing.T, p *testbed.Pod) (links, filters map[string]int) {
	t.Helper()
	links, filters = map[string]int{}, map[string]int{}
	for _, i := range p.Interfaces {
		l, err := p.Netlink().LinkByName(i.Name)
		if err != nil {
			t.Fatal(err)
		}
		err = p.Do(func() error {
			r, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: ebpf.AttachTCXIngress})
			if err == nil && len(r.Programs) > 0 {
				links[i.Name] = len(r.Programs)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		list, err := p.Netlink().FilterList(l, netlink.HANDLE_MIN_INGRESS)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) > 0 {
			filters[i.Name] = len(list)
		}
	}
	return links, filters
}

func expectHooks(t *testing.T, what string, p *testbed.Pod, links, filters map[string]int) {
	t.Helper()
	gotLinks, gotFilters := hooksAt(t, p)
	if diff := cmp.Diff([]map[string]int{links, filters}, []map[string]int{gotLinks, gotFilters}); diff != "" {
		t.Errorf("%s: links and filters (-want +got):\n%s", what, diff)
	}
}

// TestPrivilegedTCAttachments: the program is once at every interface but lo; what
// is missing is found by Check and mended by Apply; a pod may change its hook; and
// what is other people's stays.
func TestPrivilegedTCAttachments(t *testing.T) {
	begin(t)
	pass, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "other", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer pass.Close()
	none, both := map[string]int{}, map[string]int{"eth0": 1, "net1": 1}
	eachTC(t, func(t *testing.T, n *node) {
		filters := n.opts.NoTCX
		expectOurs := func(what string, p *testbed.Pod, ours map[string]int) {
			t.Helper()
			if filters {
				expectHooks(t, what, p, none, ours)
			} else {
				expectHooks(t, what, p, ours, none)
			}
		}
		p := n.redirect(t, testbed.NewPod(t, testbed.Interface("net1", []string{"10.245.0.1", "fd10:45::1"}, nil)), twinPolicy...)
		newCast(t, p, []uint16{8080})
		works := func(what string) {
			t.Helper()
			for _, a := range p.AllAddrs() {
				if r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(a, 8080)}); r.Listener() != "in" {
					t.Errorf("%s: %v: %+v", what, a, see(r))
				}
			}
			if err := n.Check(t.Context(), p.target); err != nil {
				t.Errorf("%s: check: %v", what, err)
			}
		}
		expectOurs("at first", p.Pod, both)
		works("at first")
		apply := func(b *Backend) {
			t.Helper()
			if err := b.Apply(t.Context(), p.target, p.policy); err != nil {
				t.Fatal(err)
			}
		}
		apply(n.Backend)
		expectOurs("again", p.Pod, both)

		eth0, err := p.Netlink().LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		if filters {
			list, err := p.Netlink().FilterList(eth0, netlink.HANDLE_MIN_INGRESS)
			if err != nil || len(list) != 1 {
				t.Fatal(list, err)
			}
			if err := p.Netlink().FilterDel(list[0]); err != nil {
				t.Fatal(err)
			}
		} else {
			pin := filepath.Join(n.opts.BPFDir, "netns", fmt.Sprint(p.cookie), fmt.Sprint("tc-", eth0.Attrs().Index))
			if err := os.Remove(pin); err != nil {
				t.Fatal(err)
			}
		}
		testbed.Eventually(t, "the removal", func() bool {
			err := n.Check(t.Context(), p.target)
			return err != nil && strings.Contains(err.Error(), "eth0")
		})
		apply(n.Backend)
		expectOurs("mended", p.Pod, both)
		works("mended")

		// To the other hook and back, and to the other way of the same.
		p.target.Hook = redirect.HookSkLookup
		apply(n.Backend)
		p.target.Hook = redirect.HookTC
		expectHooks(t, "sk_lookup", p.Pod, none, none)
		works("sk_lookup")
		apply(n.Backend)
		expectOurs("back", p.Pod, both)
		works("back")
		other := *n.Backend
		other.opts.NoTCX = !filters
		apply(&other)
		filters = !filters
		expectOurs("the other way", p.Pod, both)
		works("the other way")
		apply(n.Backend)
		filters = !filters
		expectOurs("the first way", p.Pod, both)
		works("the first way")

		// Other people's, behind and before ours.
		var link1 link.Link
		err = p.Do(func() error {
			link1, err = link.AttachTCX(link.TCXOptions{Interface: eth0.Attrs().Index, Program: pass, Attach: ebpf.AttachTCXIngress})
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer link1.Close()
		if !filters {
			if err := p.Netlink().QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
				LinkIndex: eth0.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
			}}); err != nil && !os.IsExist(err) {
				t.Fatal(err)
			}
		}
		for _, priority := range []uint16{1, 7} {
			if err := p.Netlink().FilterAdd(&netlink.BpfFilter{
				FilterAttrs: netlink.FilterAttrs{LinkIndex: eth0.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Handle: 1, Priority: priority, Protocol: unix.ETH_P_ALL},
				Fd:          pass.FD(), Name: "other", DirectAction: true,
			}); err != nil {
				t.Fatal(err)
			}
		}
		works("with others")
		apply(n.Backend)
		works("with others, again")
		p.remove(t)
		p.remove(t)
		expectHooks(t, "in the end", p.Pod, map[string]int{"eth0": 1}, map[string]int{"eth0": 2})
		if r := p.World.Connect(t, testbed.ConnectSpec{Dst: at(p.Addr4(), 8080)}); r.Listener() != "app" {
			t.Errorf("in the end: %+v", see(r))
		}
	})
}

// TestPrivilegedTCNetnsGone: a pod whose netns has gone before it is removed.
func TestPrivilegedTCNetnsGone(t *testing.T) {
	begin(t)
	eachTC(t, func(t *testing.T, n *node) {
		p := n.redirect(t, testbed.NewPod(t), twinPolicy...)
		p.gone = true
		p.Destroy(t)
		if err := n.Check(context.Background(), p.target); err == nil {
			t.Error("check finds nothing wrong")
		}
		p.remove(t)
	})
}
