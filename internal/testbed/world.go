// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// WorldAddr4 and WorldAddr6 are the world's source addresses where a test names
// none. As destinations they are examples: the world holds every address that
// no pod of its has.
var (
	WorldAddr4 = netip.MustParseAddr("10.99.0.1")
	WorldAddr6 = netip.MustParseAddr("fd99::1")
)

// The next hops of a pod's default routes.
var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fe80::1")
)

// World is everything outside of the pods: a namespace that holds every
// address (but the pods', 127.0.0.0/8 and ::1), so that it can answer wherever
// a pod connects to, and connect from wherever a test likes. Pods of one world
// reach each other through it.
//
// Where nothing listens, the world refuses at once.
//
// Its own sockets, by the methods of [Actor], are the test process's, and may
// be bound to any address.
type World struct {
	*Actor
	*namespace
	engine *engine

	mu      sync.Mutex
	pods    int
	links   int
	catcher *catcher
}

// NewWorld makes a world that ends with the test.
func NewWorld(t testing.TB) *World {
	t.Helper()
	w := &World{namespace: newNamespace(t, 0)}
	for _, s := range [][2]string{
		{"net.ipv4.ip_forward", "1"},
		{"net.ipv4.conf.all.rp_filter", "0"},
		{"net.ipv4.conf.default.rp_filter", "0"},
		{"net.ipv4.conf.default.send_redirects", "0"},
		{"net.ipv4.conf.all.send_redirects", "0"},
		// A client may have any address, and every address is local here.
		{"net.ipv4.conf.all.accept_local", "1"},
		{"net.ipv4.conf.default.accept_local", "1"},
		// Refusals come in any number.
		{"net.ipv4.icmp_ratelimit", "0"},
	} {
		if err := w.sysctl(s[0], s[1]); err != nil {
			t.Fatal(err)
		}
	}
	if ipv6Available() {
		quietIPv6(t, w.namespace)
		if err := w.sysctl("net.ipv6.conf.all.forwarding", "1"); err != nil {
			t.Fatal(err)
		}
	}
	lo, err := w.nl.LinkByName("lo")
	if err != nil {
		t.Fatalf("find lo in the world: %v", err)
	}
	own := []netip.Addr{WorldAddr4}
	if ipv6Available() {
		own = append(own, WorldAddr6)
	}
	for _, a := range own {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := w.nl.AddrAdd(lo, addr); err != nil {
			t.Fatalf("add address %s to the world: %v", a, err)
		}
	}
	awaitAddresses(t, w.namespace, lo)
	// In table local, not main: a source address is checked against that
	// table, so resets from such an address would not leave otherwise.
	w.addRoute(t, netlink.Route{Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Dst: ipNet(netip.MustParsePrefix("0.0.0.0/0"))}, "lo")
	if ipv6Available() {
		w.addRoute(t, netlink.Route{Type: unix.RTN_LOCAL, Dst: ipNet(netip.MustParsePrefix("::/0"))}, "lo")
	}
	e, err := newEngine("world", -1)
	if err != nil {
		t.Fatal(err)
	}
	w.engine = e
	w.Actor = &Actor{Name: "world", wire: &local{e: e, ns: w.namespace}}
	t.Cleanup(e.close)
	return w
}

// addRoute adds a route by an interface to the world's local table.
func (w *World) addRoute(t testing.TB, r netlink.Route, dev string) {
	t.Helper()
	l, err := w.nl.LinkByName(dev)
	if err != nil {
		t.Fatalf("find %s in the world: %v", dev, err)
	}
	r.LinkIndex, r.Table = l.Attrs().Index, unix.RT_TABLE_LOCAL
	if err := w.nl.RouteReplace(&r); err != nil {
		t.Fatalf("add route to %v by %s in the world: %v", r.Dst, dev, err)
	}
}

// Route sends a prefix to a pod by the interface of its named iface, for
// addresses that the pod gets later.
func (w *World) Route(t testing.TB, prefix netip.Prefix, p *Pod, iface string) {
	t.Helper()
	dev, ok := p.outside[iface]
	if !ok {
		t.Fatalf("pod %s has no interface %s", p.Name, iface)
	}
	r := netlink.Route{Dst: ipNet(prefix.Masked()), Scope: netlink.SCOPE_LINK, Src: WorldAddr4.AsSlice()}
	if prefix.Addr().Is6() {
		r.Scope, r.Src = netlink.SCOPE_UNIVERSE, WorldAddr6.AsSlice()
	}
	w.addRoute(t, r, dev)
}

// Do runs f on a thread in the world's namespace. f must not end the test.
func (w *World) Do(f func() error) error { return w.namespace.do(f) }

// NetnsPath gives the file that the namespace is mounted at.
func (w *World) NetnsPath() string { return w.path }

// Command runs a program in the world's namespace, as root in the test's own
// cgroup, to its end, and gives its output; an exit status other than 0 ends
// the test.
func (w *World) Command(t testing.TB, argv ...string) string {
	t.Helper()
	return runIn(t, w.namespace, ProcessSpec{Argv: argv})
}

// ServeAll answers, as the listener "world", connections to every address of
// the world and every port but those named, and but those of listeners that
// the world opened by [World.Listen]. What the accepted socket says of itself
// is the address and port that were dialled.
func (w *World) ServeAll(t testing.TB, except ...uint16) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.catcher != nil {
		t.Fatal("the world serves all already")
	}
	var c *catcher
	err := w.Do(func() (err error) {
		c, err = newCatcher(int(w.file.Fd()), w.engine.server)
		return err
	})
	if err != nil {
		t.Fatalf("serve every port of the world: %v", err)
	}
	w.catcher = c
	// Before the engine closes, which owns the socket.
	t.Cleanup(c.close)
	for _, port := range except {
		if err := c.spare(port); err != nil {
			t.Fatal(err)
		}
	}
}

// Listen opens a listener in the world; see [Actor.Listen]. It may be at any
// address.
func (w *World) Listen(t testing.TB, spec ListenSpec) *Listener {
	t.Helper()
	l := w.Actor.Listen(t, spec)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.catcher != nil {
		if err := w.catcher.spare(l.Addr.Port()); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

// catcher hands every new connection of a namespace to one listener, whatever
// its destination port is. It is an sk_lookup program, because this does
// nothing to packets that are only forwarded, needs no conntrack, and lets the
// accepted socket keep the address that was dialled.
type catcher struct {
	socks, spared *ebpf.Map
	prog          *ebpf.Program
	link          *link.NetNsLink
}

// newCatcher is called on a thread in the namespace.
func newCatcher(netns int, s *server) (c *catcher, err error) {
	spec := ListenSpec{Name: "world", Addr: netip.MustParseAddrPort("[::]:0"), Transparent: true, Forget: true, Backlog: 4096, FastOpen: 1024}
	if !ipv6Available() {
		spec.Addr = netip.MustParseAddrPort("0.0.0.0:0")
	}
	fd, err := openListener(spec)
	if err != nil {
		return nil, fmt.Errorf("open listener: %w", err)
	}
	if err := s.add(fd, spec); err != nil {
		unix.Close(fd)
		return nil, err
	}
	c = new(catcher)
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	c.socks, err = ebpf.NewMap(&ebpf.MapSpec{Name: "bed_socks", Type: ebpf.SockMap, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return c, fmt.Errorf("create socket map: %w", err)
	}
	if err := c.socks.Put(uint32(0), uint32(fd)); err != nil {
		return c, fmt.Errorf("register listener: %w", err)
	}
	c.spared, err = ebpf.NewMap(&ebpf.MapSpec{Name: "bed_spared", Type: ebpf.Hash, KeySize: 4, ValueSize: 1, MaxEntries: 4096})
	if err != nil {
		return c, fmt.Errorf("create port map: %w", err)
	}
	const ( // struct bpf_sk_lookup
		ctxProtocol  = 12
		ctxLocalPort = 60 // host byte order
		skPass       = 1
	)
	c.prog, err = ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "bed_catch", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.Mov.Reg(asm.R6, asm.R1),
			asm.LoadMem(asm.R2, asm.R6, ctxProtocol, asm.Word),
			asm.JNE.Imm(asm.R2, unix.IPPROTO_TCP, "pass"),

			asm.LoadMem(asm.R2, asm.R6, ctxLocalPort, asm.Word),
			asm.StoreMem(asm.RFP, -4, asm.R2, asm.Word),
			asm.LoadMapPtr(asm.R1, c.spared.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JNE.Imm(asm.R0, 0, "pass"),

			asm.StoreImm(asm.RFP, -4, 0, asm.Word),
			asm.LoadMapPtr(asm.R1, c.socks.FD()),
			asm.Mov.Reg(asm.R2, asm.RFP),
			asm.Add.Imm(asm.R2, -4),
			asm.FnMapLookupElem.Call(),
			asm.JEq.Imm(asm.R0, 0, "pass"),

			asm.Mov.Reg(asm.R7, asm.R0),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Mov.Reg(asm.R2, asm.R7),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnSkAssign.Call(),
			asm.Mov.Reg(asm.R1, asm.R7),
			asm.FnSkRelease.Call(),

			asm.Mov.Imm(asm.R0, skPass).WithSymbol("pass"),
			asm.Return(),
		},
	})
	if err != nil {
		return c, fmt.Errorf("load sk_lookup program: %w", err)
	}
	if c.link, err = link.AttachNetNs(netns, c.prog); err != nil {
		return c, fmt.Errorf("attach sk_lookup program: %w", err)
	}
	return c, nil
}

// spare leaves a port to the listeners that are bound to it.
func (c *catcher) spare(port uint16) error {
	if err := c.spared.Put(uint32(port), uint8(1)); err != nil {
		return fmt.Errorf("spare port %d: %w", port, err)
	}
	return nil
}

func (c *catcher) close() {
	if c.link != nil {
		c.link.Close()
	}
	if c.prog != nil {
		c.prog.Close()
	}
	if c.spared != nil {
		c.spared.Close()
	}
	if c.socks != nil {
		c.socks.Close()
	}
}

// quietIPv6 makes addresses usable at once and silences what nobody answers.
func quietIPv6(t testing.TB, n *namespace) {
	t.Helper()
	for _, conf := range []string{"all", "default"} {
		for _, s := range [][2]string{
			{"accept_dad", "0"},
			{"dad_transmits", "0"},
			{"accept_ra", "0"},
			{"autoconf", "0"},
			{"router_solicitations", "0"},
		} {
			if err := n.sysctl("net/ipv6/conf/"+conf+"/"+s[0], s[1]); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// ipNet converts a prefix, host bits and all.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
