// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Package flowgen makes random policies, and flows near their edges, for tests
// that compare what a backend does with what Policy.Decide says.
package flowgen

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// Features are what a backend can do beyond ports and prefixes.
type Features struct {
	Interfaces bool // excluded and rerouted ones
	TProxy     bool
	// ConnectHooks: it decides before the kernel looks for a route.
	ConnectHooks bool
}

// The keys of what a policy is made of.
const (
	interceptionMode  = "sidecar.istio.io/interceptionMode"
	includeRanges     = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	excludeRanges     = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	includePorts      = "traffic.sidecar.istio.io/includeOutboundPorts"
	excludePorts      = "traffic.sidecar.istio.io/excludeOutboundPorts"
	includeInbound    = "traffic.sidecar.istio.io/includeInboundPorts"
	excludeInbound    = "traffic.sidecar.istio.io/excludeInboundPorts"
	excludeInterfaces = "traffic.sidecar.istio.io/excludeInterfaces"
	rerouteInterfaces = "istio.io/reroute-virtual-interfaces"
	dnsCaptureEnv     = "ISTIO_META_DNS_CAPTURE"
)

// Ids that are neither the proxy's nor the app's.
const (
	bogusUID = 4321
	bogusGID = 4322
)

// A Scene is one random policy, and the pod that is to have it.
type Scene struct {
	*testbed.Pod
	Policy *redirect.Policy
	Annots map[string]string
	Env    map[string]string

	can     Features
	rand    *rand.Rand
	actors  []*testbed.Actor // outbound clients
	root    *testbed.Actor   // may create sockets for anyone
	ports   []uint16         // that flows are to
	addrs   []netip.Addr     // that outbound flows are to
	sources map[netip.Addr]route
}

// route is what the kernel says of the way to a destination.
type route struct {
	src   netip.Addr
	iface string
}

// New makes the pod numbered number of a world, and its policy. The world must
// serve all.
func New(t testing.TB, w *testbed.World, r *rand.Rand, number int, can Features) *Scene {
	t.Helper()
	d := &Scene{can: can, rand: r, Annots: map[string]string{}, Env: map[string]string{}, sources: map[netip.Addr]route{}}
	opts := []testbed.Option{testbed.InWorld(w)}
	four, six := fmt.Sprintf("10.244.%d.%d", 1+number/250, 1+number%250), fmt.Sprintf("fd10:44::%x", 0x100+number)
	second := false
	switch kind := d.rand.IntN(6); {
	case kind == 0:
		opts = append(opts, testbed.V4Only(), testbed.Addrs(four))
	case kind == 1:
		opts = append(opts, testbed.V6Only(), testbed.Addrs(six))
	case kind == 2, can.Interfaces && kind == 3: // a second interface, and a network that goes by it
		second = true
		opts = append(opts, testbed.Addrs(four, six), testbed.Interface("net1",
			[]string{fmt.Sprintf("10.245.%d.%d", 1+number/250, 1+number%250), fmt.Sprintf("fd11:44::%x", 0x100+number)},
			[]string{"10.96.0.0/13", "2001:db8:1::/48"}))
	default:
		opts = append(opts, testbed.Addrs(four, six))
	}
	d.Pod = testbed.NewPod(t, opts...)

	cfg := redirect.DefaultConfig()
	if d.rand.IntN(4) == 0 {
		cfg.Proxy.OutboundPort, cfg.Proxy.InboundPort = 16001, 16006
		cfg.Proxy.TunnelPort, cfg.Proxy.DNSPort = 16008, 16053
	}
	d.randomPolicy()
	if can.Interfaces && (second || d.rand.IntN(8) == 0) {
		switch d.rand.IntN(4) {
		case 0:
			d.Annots[excludeInterfaces] = pick(d.rand, []string{"net1", "eth0", "net1,eth0", "lo", "other"})
		case 1:
			d.Annots[rerouteInterfaces] = pick(d.rand, []string{"net1", "eth0", "net1,eth0", "other"})
		case 2:
			d.Annots[excludeInterfaces], d.Annots[rerouteInterfaces] = pick(d.rand, []string{"net1", "eth0"}), pick(d.rand, []string{"net1", "eth0"})
		}
	}
	if can.TProxy && d.rand.IntN(3) == 0 {
		d.Annots[interceptionMode] = "TPROXY"
	}
	uid, gid := pick(d.rand, []int64{1337, 1337, 101, testbed.AppUID, 70000}), pick(d.rand, []int64{1337, 1337, 102, 2000, 70001})
	facts, err := redirect.ParsePod(d.Injected(func(k *testbed.KubePod) {
		for key, v := range d.Annots {
			testbed.Annotate(key, v)(k)
		}
		for key, v := range d.Env {
			testbed.ProxyEnv(key, v)(k)
		}
		testbed.ProxyIDs(uid, gid)(k)
	}))
	if err != nil {
		t.Fatal(err)
	}
	outcome, policy, err := cfg.Evaluate(facts)
	if err != nil || policy == nil {
		t.Fatalf("the pod is not to be redirected: %+v, %v", outcome, err)
	}
	d.Policy = policy
	d.collectPorts()
	d.collectAddrs()
	return d
}

// Start has the proxy and the apps listen. The pod must have been programmed.
func (d *Scene) Start(t testing.TB) {
	t.Helper()
	x := d.Policy.Proxy
	var shape []testbed.ProxyOption
	if d.rand.IntN(3) == 0 {
		shape = append(shape, testbed.SplitFamilies())
	}
	if d.Policy.Mode == redirect.ModeTProxy {
		shape = append(shape, testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
			testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = l.Name == "in" }))
	}
	uid, gid := int(x.UID), int(x.GID)
	proxy := d.StartProxy(t, uid, gid, append(shape, testbed.ProxyPorts(x.OutboundPort, x.InboundPort))...)
	proxy.Listen(t, testbed.ListenSpec{Name: "dns", Addr: at(netip.IPv6Unspecified(), x.DNSPort)})
	proxy.Listen(t, testbed.ListenSpec{Name: "tunnel", Addr: at(netip.IPv6Unspecified(), x.TunnelPort)})
	app := d.StartApp(t)
	for _, port := range d.ports {
		if !slices.Contains([]uint16{x.OutboundPort, x.InboundPort, x.TunnelPort, x.DNSPort}, port) {
			app.Listen(t, testbed.ListenSpec{Name: "app", Addr: at(netip.IPv6Unspecified(), port), Forget: true})
		}
	}
	d.actors = []*testbed.Actor{
		app.Actor, app.Actor, app.Actor, app.Actor, proxy.Actor,
		d.Actor(t, "uid-only", uid, bogusGID), d.Actor(t, "gid-only", bogusUID, gid),
	}
	d.root = d.Actor(t, "root", 0, 0)
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// some gives up to most calls' worth of items, joined as a list.
func (d *Scene) some(most int, item func() string) string {
	var items []string
	for range d.rand.IntN(most + 1) {
		items = append(items, item())
	}
	return strings.Join(items, pick(d.rand, []string{",", ", "}))
}

// interesting prefixes, near which flows go, nested in each other.
var interesting = []string{
	"10.96.0.0/12", "10.96.0.0/16", "10.96.8.0/21", "10.96.8.8/32", "10.97.0.0/16", "10.0.0.0/8", "0.0.0.0/1", "128.0.0.0/1",
	"8.8.8.0/24", "8.8.8.8/31", "192.0.2.128/25", "100.64.0.0/10", "1.0.0.0/9",
	"fd96::/16", "fd96:1::/32", "fd96:1:2::/47", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/64", "2001:db8:1:2::8/127",
	"2000::/3", "fc00::/7", "2600::/12", "2001:db8:1:2::9/128",
}

func (d *Scene) prefix() string {
	switch d.rand.IntN(20) {
	case 0:
		return pick(d.rand, []string{"127.0.0.0/8", "127.0.0.1", "127.0.0.4/30", "::1", "127.128.0.0/9"})
	case 1:
		return pick(d.rand, []string{"0.0.0.0/0", "::/0", "::ffff:0:0/96", "::/1"})
	case 2: // around the pod's own addresses
		return pick(d.rand, []string{"10.244.0.0/16", "fd10:44::/32", "10.245.0.0/16", "fd10::/15"})
	case 3, 4, 5, 6: // any length, with host bits
		p := netip.MustParsePrefix(pick(d.rand, interesting))
		return netip.PrefixFrom(p.Addr(), p.Bits()+d.rand.IntN(p.Addr().BitLen()-p.Bits()+1)).String()
	}
	return pick(d.rand, interesting)
}

func (d *Scene) portRange() string {
	first := pick(d.rand, []int{80, 443, 1, 53, 8000, 8080, 15001, 15006, 15008, 65535, 1 + d.rand.IntN(65535)})
	switch d.rand.IntN(3) {
	case 0:
		return fmt.Sprintf("%d-%d", first, min(65535, first+pick(d.rand, []int{0, 1, 7, 100, 1000, 30000})))
	default:
		return fmt.Sprint(first)
	}
}

func (d *Scene) randomPolicy() {
	if d.rand.IntN(4) > 0 {
		d.Annots[includeRanges] = d.some(8, d.prefix)
	} else if d.rand.IntN(2) == 0 {
		d.Annots[includeRanges] = "*"
	}
	if d.rand.IntN(3) > 0 {
		d.Annots[excludeRanges] = d.some(6, d.prefix)
	}
	switch d.rand.IntN(8) {
	case 0:
		d.Annots[includePorts] = "*"
	case 1, 2, 3:
		d.Annots[includePorts] = d.some(5, d.portRange)
	}
	if d.rand.IntN(2) == 0 {
		d.Annots[excludePorts] = d.some(5, d.portRange)
	}
	switch d.rand.IntN(4) {
	case 0:
		d.Annots[includeInbound] = "*"
	case 1, 2:
		d.Annots[includeInbound] = d.some(5, d.portRange)
	}
	if d.rand.IntN(2) == 0 {
		d.Annots[excludeInbound] = d.some(5, d.portRange)
	}
	if d.rand.IntN(3) == 0 {
		d.Env[dnsCaptureEnv] = "true"
	}
}

// collectPorts gathers ports at and beside the edges of every range.
func (d *Scene) collectPorts() {
	x := d.Policy.Proxy
	edges := []int{80, 8080, 53, int(x.OutboundPort), int(x.InboundPort), int(x.TunnelPort), int(x.DNSPort), 15021}
	for _, list := range [][]redirect.PortRange{
		d.Policy.IncludeOutboundPorts.Ranges, d.Policy.ExcludeOutboundPorts,
		d.Policy.IncludeInboundPorts.Ranges, d.Policy.ExcludeInboundPorts,
	} {
		for _, r := range list {
			edges = append(edges, int(r.First)-1, int(r.First), int(r.Last), int(r.Last)+1)
		}
	}
	for _, e := range edges {
		if e > 0 && e < 65536 && !slices.Contains(d.ports, uint16(e)) {
			d.ports = append(d.ports, uint16(e))
		}
	}
}

// collectAddrs gathers addresses at and beside the edges of every prefix.
func (d *Scene) collectAddrs() {
	all := slices.Concat(d.Policy.IncludeOutbound.List, d.Policy.ExcludeOutbound)
	for _, s := range interesting {
		if d.rand.IntN(3) == 0 {
			all = append(all, netip.MustParsePrefix(s))
		}
	}
	for _, p := range all {
		first, last := p.Masked().Addr(), lastOf(p)
		for _, a := range []netip.Addr{first.Prev(), first, first.Next(), last.Prev(), last, last.Next()} {
			// An IPv4-mapped address is IPv4, whatever form it has here.
			if a.IsValid() && !a.Is4In6() && d.reachable(a) {
				d.addrs = append(d.addrs, a)
			}
		}
	}
	for _, s := range []string{"203.0.113.9", "223.255.255.254", "2001:db8:ffff::1", "fd99::1", "3fff::1"} {
		if a := netip.MustParseAddr(s); d.reachable(a) {
			d.addrs = append(d.addrs, a)
		}
	}
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// reachable says whether the pod has a route to an address that the world
// answers at. Loopback and the pod's own addresses are added by themselves.
func (d *Scene) reachable(a netip.Addr) bool {
	if a.Is4() {
		b := a.As4()
		return d.Addr4().IsValid() && b[0] >= 1 && b[0] < 224 && b[0] != 127 && !a.IsLinkLocalUnicast() && !d.ofPods(a)
	}
	for _, p := range []string{"2000::/3", "fc00::/7"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return d.Addr6().IsValid() && !d.ofPods(a)
		}
	}
	return false
}

// ofPods: other pods of the world lie there, or lay there.
func (d *Scene) ofPods(a netip.Addr) bool {
	for _, p := range []string{"10.244.0.0/15", "fd10:44::/32", "fd11:44::/32"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return true
		}
	}
	return false
}

// destination gives a random one, and the family of its socket.
func (d *Scene) destination() (dst netip.AddrPort, family int) {
	var local []netip.Addr
	if d.Addr6().IsValid() {
		local = append(local, netip.MustParseAddr("::6"))
	}
	for _, s := range []string{"127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.6", "127.0.0.7", "127.128.0.0", "127.255.255.254", "0.0.0.0", "::1", "::1", "::"} {
		local = append(local, netip.MustParseAddr(s))
	}
	for range 4 {
		local = append(local, d.AllAddrs()...)
	}
	a := pick(d.rand, d.addrs)
	if d.rand.IntN(4) == 0 {
		a = pick(d.rand, local)
	}
	family = 4
	if a.Is6() || d.rand.IntN(3) == 0 {
		family = 6
	}
	return at(a, pick(d.rand, d.ports)), family
}

// binding gives an address to bind to before connecting to dst, or none.
func (d *Scene) binding(dst netip.Addr) (netip.Addr, bool) {
	if d.rand.IntN(3) > 0 {
		return netip.Addr{}, false
	}
	four := dst.Is4()
	list := []netip.Addr{}
	for _, s := range []string{"127.0.0.6", "127.0.0.6", "0.0.0.0", "127.0.0.1", "127.0.0.9", "::6", "::6", "::", "::1"} {
		a := netip.MustParseAddr(s)
		if a.Is4() == four && (a != netip.MustParseAddr("::6") || d.Addr6().IsValid()) {
			list = append(list, a)
		}
	}
	for _, a := range d.AllAddrs() {
		if a.Is4() == four {
			list = append(list, a, a)
		}
	}
	return pick(d.rand, list), true
}

// A Trial is a flow that is about to be tried, and what must come of it.
type Trial struct {
	Actor *testbed.Actor
	Spec  testbed.ConnectSpec
	Flow  redirect.Flow
	Want  redirect.Decision

	Listener string         // who serves it: "out", "in", "dns", "tunnel", "app" or "world"
	Dst      netip.AddrPort // what it asks for, as the kernel understands it
	From     netip.Addr     // its source address
}

// Trials makes n flows, a quarter of them inbound.
func (d *Scene) Trials(t testing.TB, n int) (trials []Trial) {
	t.Helper()
	for len(trials) < n {
		x, ok := d.outbound(t)
		if len(trials)%4 == 0 {
			x, ok = d.inbound(), true
		}
		if ok {
			trials = append(trials, x)
		}
	}
	return trials
}

// Run tries flows, and gives the results in their order.
func (d *Scene) Run(t testing.TB, trials []Trial) []testbed.ConnectResult {
	t.Helper()
	byActor := map[*testbed.Actor][]int{}
	for i, x := range trials {
		byActor[x.Actor] = append(byActor[x.Actor], i)
	}
	results := make([]testbed.ConnectResult, len(trials))
	for actor, list := range byActor {
		specs := make([]testbed.ConnectSpec, len(list))
		for j, i := range list {
			specs[j] = trials[i].Spec
		}
		for j, r := range actor.ConnectBatch(t, specs) {
			results[list[j]] = r
		}
	}
	return results
}

// outbound makes a random outbound flow; ok is false for one that can't be had
// without redirection, of which nothing can be told.
func (d *Scene) outbound(t testing.TB) (x Trial, ok bool) {
	t.Helper()
	dst, family := d.destination()
	x.Spec = testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Family: family}}
	src, bound := d.binding(dst.Addr())
	if bound {
		x.Spec.Bind, x.Spec.ReuseAddr = at(src, 0), true
		x.Spec.BindNoPort = d.rand.IntN(2) == 0
	}
	x.Spec.Nonblock = d.rand.IntN(4) == 0

	x.Actor = pick(d.rand, d.actors)
	uid, gid := x.Actor.UID, x.Actor.GID
	if d.rand.IntN(4) == 0 {
		x.Actor = d.root
		uid = pick(d.rand, []int{0, int(d.Policy.Proxy.UID), testbed.AppUID, bogusUID})
		gid = pick(d.rand, []int{0, int(d.Policy.Proxy.GID), testbed.AppGID, bogusGID})
		x.Spec.FSUID, x.Spec.FSGID = &uid, &gid
	}

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
	way := d.route(t, effective)
	if !from.IsValid() {
		from = way.src
	}

	x.Flow = redirect.Flow{Src: src, Dst: dst, UID: uint32(uid), GID: uint32(gid), Interface: way.iface, PodAddrs: d.AllAddrs()}
	if family == 6 && dst.Addr().Is4() {
		x.Flow.Dst = netip.AddrPortFrom(netip.AddrFrom16(dst.Addr().As16()), dst.Port())
	}
	x.Want = d.Policy.Decide(x.Flow)
	x.Listener, x.Dst, x.From = d.listener(x.Want.Verdict, effective, dst.Port()), at(effective, dst.Port()), from
	// IPv4 has no route from loopback out of the pod (__mkroute_output), and
	// says so before any packet is made. Connect hooks come before that.
	if x.Listener != "app" && from.Is4() && from.IsLoopback() && way.iface != "lo" && !d.can.ConnectHooks {
		return x, false
	}
	// From loopback nothing leaves the pod.
	loopback := from.IsLoopback() || from == netip.MustParseAddr("::6")
	return x, !(x.Want.Verdict == redirect.VerdictDirect && loopback && x.Listener == "world")
}

// route asks the kernel for the way it takes to a.
func (d *Scene) route(t testing.TB, a netip.Addr) route {
	t.Helper()
	if r, ok := d.sources[a]; ok {
		return r
	}
	routes, err := d.Netlink().RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		t.Fatalf("route to %v: %v, %v", a, routes, err)
	}
	link, err := d.Netlink().LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		t.Fatalf("route to %v: %v", a, err)
	}
	src, _ := netip.AddrFromSlice(routes[0].Src)
	d.sources[a] = route{src.Unmap(), link.Attrs().Name}
	return d.sources[a]
}

// listener says who serves a flow.
func (d *Scene) listener(v redirect.Verdict, dst netip.Addr, port uint16) string {
	x := d.Policy.Proxy
	if v == redirect.VerdictDirect {
		if !dst.IsLoopback() && dst != netip.MustParseAddr("::6") && !slices.Contains(d.AllAddrs(), dst) {
			return "world"
		}
		switch port {
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

// inbound makes a random flow from the world.
func (d *Scene) inbound() (x Trial) {
	dst := at(pick(d.rand, d.AllAddrs()), pick(d.rand, d.ports))
	list := []string{"10.99.0.1", "8.8.8.8", "203.0.113.77", "192.168.1.1"}
	if dst.Addr().Is6() {
		list = []string{"fd99::1", "2001:db8::5", "fd99::7777", "2600::1"}
	}
	src := netip.MustParseAddr(pick(d.rand, list))
	x.Actor = d.World.Actor
	x.Spec = testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(src, 0), ReuseAddr: true}}
	x.Flow = redirect.Flow{Direction: redirect.Inbound, Src: src, Dst: dst, Interface: d.holds(dst.Addr()), PodAddrs: d.AllAddrs()}
	x.Want = d.Policy.Decide(x.Flow)
	x.Listener, x.Dst, x.From = d.listener(x.Want.Verdict, dst.Addr(), dst.Port()), dst, src
	return x
}

// holds names the interface that has an address, which is that by which a
// packet to it comes.
func (d *Scene) holds(a netip.Addr) string {
	for _, i := range d.Interfaces {
		if slices.ContainsFunc(i.Addrs, func(p netip.Prefix) bool { return p.Addr() == a }) {
			return i.Name
		}
	}
	return "eth0"
}
