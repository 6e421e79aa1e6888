// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// Environment of the differential test.
const (
	envSeed   = "SHUNT_SEED"   // a number; the time else
	envFlows  = "SHUNT_FLOWS"  // how many flows at least
	envPolicy = "SHUNT_POLICY" // the number of the only policy to try
)

const (
	defaultFlows   = 9000
	flowsPerPolicy = 150
)

func numberFrom(t testing.TB, env string, byDefault int64) int64 {
	t.Helper()
	s := os.Getenv(env)
	if s == "" {
		return byDefault
	}
	n, err := strconv.ParseInt(s, 0, 64)
	if err != nil {
		t.Fatalf("%s: %v", env, err)
	}
	return n
}

// TestPrivilegedDifferential compares the kernel with Policy.Decide: random
// policies, random flows, no disagreement.
func TestPrivilegedDifferential(t *testing.T) {
	begin(t)
	seed := numberFrom(t, envSeed, time.Now().UnixNano())
	flows := int(numberFrom(t, envFlows, defaultFlows))
	only := int(numberFrom(t, envPolicy, -1))
	policies := max((flows+flowsPerPolicy-1)/flowsPerPolicy, only+1)
	t.Logf("%s=%d, %d policies of %d flows", envSeed, seed, policies, flowsPerPolicy)

	n := newNode(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	start, tried, verdicts := time.Now(), 0, map[string]int{}
	for i := range policies {
		if only >= 0 && i != only {
			continue
		}
		ok := t.Run(fmt.Sprint("policy", i), func(t *testing.T) {
			d := newDifferential(t, n, w, rand.New(rand.NewPCG(uint64(seed), uint64(i))), i)
			d.repeat = fmt.Sprintf("%s=%d %s=%d go test ./redirect/ebpf -run '^TestPrivilegedDifferential$' -count=1 -v", envSeed, seed, envPolicy, i)
			d.run(t, verdicts)
			tried += flowsPerPolicy
		})
		if !ok && t.Failed() && i > only+3 {
			break // enough to look at
		}
	}
	t.Logf("%d flows in %v, by rule and verdict: %v", tried, time.Since(start).Round(time.Millisecond), verdicts)
	if only < 0 && tried < flows && !t.Failed() {
		t.Errorf("only %d flows were tried", tried)
	}
}

// differential is one random policy in one pod.
type differential struct {
	*pod
	rand   *rand.Rand
	repeat string // a command
	annots map[string]string
	env    map[string]string

	actors  []*testbed.Actor // outbound clients
	root    *testbed.Actor   // may create sockets for anyone
	ports   []uint16         // that flows are to
	addrs   []netip.Addr     // that outbound flows are to
	sources map[netip.Addr]netip.Addr
}

func newDifferential(t *testing.T, n *node, w *testbed.World, r *rand.Rand, number int) *differential {
	d := &differential{rand: r, annots: map[string]string{}, env: map[string]string{}, sources: map[netip.Addr]netip.Addr{}}
	opts := []testbed.Option{testbed.InWorld(w)}
	four, six := fmt.Sprintf("10.244.%d.%d", 1+number/250, 1+number%250), fmt.Sprintf("fd10:44::%x", 0x100+number)
	switch d.rand.IntN(6) {
	case 0:
		opts = append(opts, testbed.V4Only(), testbed.Addrs(four))
	case 1:
		opts = append(opts, testbed.V6Only(), testbed.Addrs(six))
	case 2: // a second interface, and a network that goes by it
		opts = append(opts, testbed.Addrs(four, six), testbed.Interface("net1",
			[]string{fmt.Sprintf("10.245.%d.%d", 1+number/250, 1+number%250), fmt.Sprintf("fd11:44::%x", 0x100+number)},
			[]string{"10.96.0.0/13", "2001:db8:1::/48"}))
	default:
		opts = append(opts, testbed.Addrs(four, six))
	}
	p := testbed.NewPod(t, opts...)

	cfg := redirect.DefaultConfig()
	if d.rand.IntN(4) == 0 {
		cfg.Proxy.OutboundPort, cfg.Proxy.InboundPort = 16001, 16006
		cfg.Proxy.TunnelPort, cfg.Proxy.DNSPort = 16008, 16053
	}
	d.randomPolicy()
	uid, gid := pick(d.rand, []int64{1337, 1337, 101, testbed.AppUID, 70000}), pick(d.rand, []int64{1337, 1337, 102, 2000, 70001})
	d.pod = n.redirectBy(t, cfg, p, func(k *testbed.KubePod) {
		for key, v := range d.annots {
			testbed.Annotate(key, v)(k)
		}
		for key, v := range d.env {
			testbed.ProxyEnv(key, v)(k)
		}
		testbed.ProxyIDs(uid, gid)(k)
	})
	d.collectPorts()
	d.collectAddrs()

	var shape []testbed.ProxyOption
	if d.rand.IntN(3) == 0 {
		shape = append(shape, testbed.SplitFamilies())
	}
	c := newCast(t, d.pod, nil, shape...)
	for _, port := range d.ports {
		x := d.policy.Proxy
		if !slices.Contains([]uint16{x.OutboundPort, x.InboundPort, x.TunnelPort, x.DNSPort}, port) {
			c.app.Listen(t, testbed.ListenSpec{Name: "app", Addr: at(netip.IPv6Unspecified(), port), Forget: true})
		}
	}
	d.actors = []*testbed.Actor{c.app.Actor, c.app.Actor, c.app.Actor, c.app.Actor, c.proxy.Actor, c.uidOnly, c.gidOnly}
	d.root = p.Actor(t, "root", 0, 0)
	return d
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

// some gives n to m random elements' worth of calls, joined as a list.
func (d *differential) some(least, most int, item func() string) string {
	var items []string
	for range least + d.rand.IntN(most-least+1) {
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

func (d *differential) prefix() string {
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

func (d *differential) portRange() string {
	first := pick(d.rand, []int{80, 443, 1, 53, 8000, 8080, 15001, 15006, 15008, 65535, 1 + d.rand.IntN(65535)})
	switch d.rand.IntN(3) {
	case 0:
		return fmt.Sprintf("%d-%d", first, min(65535, first+pick(d.rand, []int{0, 1, 7, 100, 1000, 30000})))
	default:
		return fmt.Sprint(first)
	}
}

func (d *differential) randomPolicy() {
	if d.rand.IntN(4) > 0 {
		d.annots[includeRanges] = d.some(0, 8, d.prefix)
	} else if d.rand.IntN(2) == 0 {
		d.annots[includeRanges] = "*"
	}
	if d.rand.IntN(3) > 0 {
		d.annots[excludeRanges] = d.some(0, 6, d.prefix)
	}
	switch d.rand.IntN(8) {
	case 0:
		d.annots[includePorts] = "*"
	case 1, 2, 3:
		d.annots[includePorts] = d.some(0, 5, d.portRange)
	}
	if d.rand.IntN(2) == 0 {
		d.annots[excludePorts] = d.some(0, 5, d.portRange)
	}
	switch d.rand.IntN(4) {
	case 0:
		d.annots[includeInbound] = "*"
	case 1, 2:
		d.annots[includeInbound] = d.some(0, 5, d.portRange)
	}
	if d.rand.IntN(2) == 0 {
		d.annots[excludeInbound] = d.some(0, 5, d.portRange)
	}
	if d.rand.IntN(3) == 0 {
		d.env[dnsCaptureEnv] = "true"
	}
}

// collectPorts gathers ports at and beside the edges of every range.
func (d *differential) collectPorts() {
	x := d.policy.Proxy
	edges := []int{80, 8080, 53, int(x.OutboundPort), int(x.InboundPort), int(x.TunnelPort), int(x.DNSPort), 15021}
	for _, list := range [][]redirect.PortRange{
		d.policy.IncludeOutboundPorts.Ranges, d.policy.ExcludeOutboundPorts,
		d.policy.IncludeInboundPorts.Ranges, d.policy.ExcludeInboundPorts,
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
func (d *differential) collectAddrs() {
	all := slices.Concat(d.policy.IncludeOutbound.List, d.policy.ExcludeOutbound)
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
func (d *differential) reachable(a netip.Addr) bool {
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
func (d *differential) ofPods(a netip.Addr) bool {
	for _, p := range []string{"10.244.0.0/15", "fd10:44::/32", "fd11:44::/32"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return true
		}
	}
	return false
}

// destination gives a random one, and the family of its socket.
func (d *differential) destination() (dst netip.AddrPort, family int) {
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
func (d *differential) binding(dst netip.Addr) (netip.Addr, bool) {
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

// trial is a flow that is about to be tried.
type trial struct {
	actor *testbed.Actor
	spec  testbed.ConnectSpec
	flow  redirect.Flow
	want  redirect.Decision
	sees  want
}

func (d *differential) run(t *testing.T, verdicts map[string]int) {
	t.Helper()
	var trials []trial
	expect := tally{}
	for len(trials) < flowsPerPolicy {
		x, ok := d.outbound(t)
		if len(trials)%4 == 0 {
			x, ok = d.inbound(), true
		}
		if !ok {
			continue
		}
		trials = append(trials, x)
		expect[x.want.Rule]++
		verdicts[fmt.Sprintf("%v %v", x.want.Rule, x.want.Verdict)]++
	}

	byActor := map[*testbed.Actor][]int{}
	for i, x := range trials {
		byActor[x.actor] = append(byActor[x.actor], i)
	}
	results := make([]testbed.ConnectResult, len(trials))
	before := d.rules(t)
	for actor, list := range byActor {
		specs := make([]testbed.ConnectSpec, len(list))
		for j, i := range list {
			specs[j] = trials[i].spec
		}
		for j, r := range actor.ConnectBatch(t, specs) {
			results[list[j]] = r
		}
	}
	counted := d.rules(t).since(before)

	for i, x := range trials {
		if diff := cmp.Diff(x.sees.outcome(results[i]), see(results[i])); diff != "" {
			d.disagree(t, x, diff)
		}
	}
	if diff := cmp.Diff(expect, counted); diff != "" {
		d.describe(t)
		t.Errorf("flows by rule (-Decide +kernel):\n%s", diff)
	}
	if f := d.failures(t); len(f) > 0 {
		d.describe(t)
		t.Errorf("helpers failed, by place: %v", f)
	}
}

func (d *differential) disagree(t *testing.T, x trial, diff string) {
	t.Helper()
	d.describe(t)
	spec, _ := json.Marshal(x.spec)
	t.Errorf("disagreement\n  flow: %+v\n  by %s (uid %d, gid %d): %s\n  Decide: %v by %v\n  outcome (-want +got):\n%s",
		x.flow, x.actor.Name, x.flow.UID, x.flow.GID, spec, x.want.Verdict, x.want.Rule, diff)
}

func (d *differential) describe(t *testing.T) {
	t.Helper()
	if d.repeat == "" {
		return // once is enough
	}
	annots, _ := json.MarshalIndent(d.annots, "    ", "  ")
	t.Logf("\n  repeat: %s\n  pod: %v\n  annotations: %s\n  environment: %v\n  policy: %+v", d.repeat, d.AllAddrs(), annots, d.env, *d.policy)
	d.repeat = ""
}

// outbound makes a random outbound flow; ok is false for one that can't be had
// without redirection, of which nothing can be told.
func (d *differential) outbound(t *testing.T) (x trial, ok bool) {
	t.Helper()
	dst, family := d.destination()
	x.spec = testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Family: family}}
	src, bound := d.binding(dst.Addr())
	if bound {
		x.spec.Bind, x.spec.ReuseAddr = at(src, 0), true
		x.spec.BindNoPort = d.rand.IntN(2) == 0
	}
	x.spec.Nonblock = d.rand.IntN(4) == 0

	x.actor = pick(d.rand, d.actors)
	uid, gid := x.actor.UID, x.actor.GID
	if d.rand.IntN(4) == 0 {
		x.actor = d.root
		uid = pick(d.rand, []int{0, int(d.policy.Proxy.UID), testbed.AppUID, bogusUID})
		gid = pick(d.rand, []int{0, int(d.policy.Proxy.GID), testbed.AppGID, bogusGID})
		x.spec.FSUID, x.spec.FSGID = &uid, &gid
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
	if !from.IsValid() {
		from = d.source(t, effective)
	}

	x.flow = redirect.Flow{Src: src, Dst: dst, UID: uint32(uid), GID: uint32(gid), PodAddrs: d.AllAddrs()}
	if family == 6 && dst.Addr().Is4() {
		x.flow.Dst = mapped4(dst)
	}
	x.want = d.policy.Decide(x.flow)
	x.sees = want{listener: d.listener(x.want.Verdict, effective, dst.Port()), dst: at(effective, dst.Port()), from: from}
	// From loopback nothing leaves the pod.
	loopback := from.IsLoopback() || from == netip.MustParseAddr("::6")
	return x, !(x.want.Verdict == redirect.VerdictDirect && loopback && x.sees.listener == "world")
}

// source asks the kernel for the source address it takes towards a.
func (d *differential) source(t *testing.T, a netip.Addr) netip.Addr {
	t.Helper()
	if src, ok := d.sources[a]; ok {
		return src
	}
	routes, err := d.Netlink().RouteGet(a.AsSlice())
	if err != nil || len(routes) == 0 {
		t.Fatalf("route to %v: %v, %v", a, routes, err)
	}
	src, _ := netip.AddrFromSlice(routes[0].Src)
	d.sources[a] = src.Unmap()
	return d.sources[a]
}

// listener says who serves a flow.
func (d *differential) listener(v redirect.Verdict, dst netip.Addr, port uint16) string {
	x := d.policy.Proxy
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
func (d *differential) inbound() (x trial) {
	dst := at(pick(d.rand, d.AllAddrs()), pick(d.rand, d.ports))
	list := []string{"10.99.0.1", "8.8.8.8", "203.0.113.77", "192.168.1.1"}
	if dst.Addr().Is6() {
		list = []string{"fd99::1", "2001:db8::5", "fd99::7777", "2600::1"}
	}
	src := netip.MustParseAddr(pick(d.rand, list))
	x.actor = d.World.Actor
	x.spec = testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(src, 0), ReuseAddr: true}}
	x.flow = redirect.Flow{Direction: redirect.Inbound, Src: src, Dst: dst, Interface: "eth0", PodAddrs: d.AllAddrs()}
	x.want = d.policy.Decide(x.flow)
	x.sees = want{listener: d.listener(x.want.Verdict, dst.Addr(), dst.Port()), dst: dst, from: src}
	return x
}
