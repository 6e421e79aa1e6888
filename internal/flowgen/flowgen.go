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

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// Features are what a backend can do beyond TCP, ports and prefixes.
type Features struct {
	Interfaces bool // excluded and rerouted ones, in any pod
	Excluded   bool // excluded ones that are there, in a pod that has one besides lo
	TProxy     bool
	DNS        bool // captured over UDP
	// ConnectHooks: it decides before the kernel looks for a route. No scene
	// needs that.
	ConnectHooks bool
}

// Serve reports whether a backend with these features serves a scene.
func (f Features) Serve(s *Scene) bool {
	n := s.Needs
	return (f.Interfaces || !n.Interfaces) && (f.Excluded || f.Interfaces || !n.Excluded) && (f.TProxy || !n.TProxy) && (f.DNS || !n.DNS)
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
	invalidDropEnv    = "INVALID_DROP"
)

// Ids that are neither the proxy's nor the app's.
const (
	bogusUID = 4321
	bogusGID = 4322
)

// A Scene is one random policy, and what the pod that is to have it is like.
// It is a value: the pods are made by Twin, as many as there are backends.
type Scene struct {
	Policy *redirect.Policy
	Annots map[string]string
	Env    map[string]string
	Addrs  []netip.Addr // of the pod, those of eth0 first
	Closed string       // the proxy's listener that there is none of, or ""
	Needs  Features

	rand       *rand.Rand
	number     int
	pod        []testbed.Option
	interfaces map[netip.Addr]string // that hold the pod's addresses
	split      bool                  // the proxy has a listener for each family
	ports      []uint16              // that flows are to
	silent     []uint16              // those of them that the app does not listen on
	addrs      []netip.Addr          // that outbound flows are to
	sources    map[netip.Addr]route
}

// route is what the kernel says of the way to a destination.
type route struct {
	src   netip.Addr
	iface string
}

// A Wish narrows what a scene may be.
type Wish func(*Scene)

// TProxy wishes for interception mode TPROXY.
func TProxy(s *Scene) { s.Annots[interceptionMode] = "TPROXY" }

// DNS wishes for DNS capture, over UDP too.
func DNS(s *Scene) { s.Env[dnsCaptureEnv], s.Needs.DNS = "true", true }

// New makes a scene. The same seed, number and wishes give the same one. Its
// pods have addresses that pods of other numbers don't have.
func New(t testing.TB, seed int64, number int, wishes ...Wish) *Scene {
	t.Helper()
	s := &Scene{
		rand: rand.New(rand.NewPCG(uint64(seed), uint64(number))), number: number,
		Annots: map[string]string{}, Env: map[string]string{},
		interfaces: map[netip.Addr]string{}, sources: map[netip.Addr]route{},
	}
	second := s.randomPod()
	cfg := redirect.DefaultConfig()
	if s.rand.IntN(4) == 0 {
		cfg.Proxy.OutboundPort, cfg.Proxy.InboundPort = 16001, 16006
		cfg.Proxy.TunnelPort, cfg.Proxy.DNSPort = 16008, 16053
	}
	s.randomPolicy(second)
	uid, gid := pick(s.rand, []int64{1337, 1337, 101, testbed.AppUID, 70000}), pick(s.rand, []int64{1337, 1337, 102, 2000, 70001})
	for _, wish := range wishes {
		wish(s)
	}
	facts, err := redirect.ParsePod(new(testbed.Pod).Injected(func(k *testbed.KubePod) {
		for key, v := range s.Annots {
			testbed.Annotate(key, v)(k)
		}
		for key, v := range s.Env {
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
	s.Policy = policy
	there := func(name string) bool { return name == "lo" || name == "eth0" }
	s.Needs.Excluded = len(policy.ExcludeInterfaces) > 0
	s.Needs.Interfaces = len(policy.RerouteInterfaces) > 0 ||
		s.Needs.Excluded && (second || slices.ContainsFunc(policy.ExcludeInterfaces, func(name string) bool { return !there(name) }))
	s.Needs.TProxy = policy.Mode == redirect.ModeTProxy
	s.split = s.rand.IntN(3) == 0
	if s.rand.IntN(5) == 0 && !s.Needs.TProxy { // which drops what nobody listens for
		s.Closed = pick(s.rand, []string{"out", "in", "dns"})
	}
	s.collectPorts()
	s.collectAddrs()
	return s
}

// randomPod says what the pod is like, and whether it has a second interface.
func (s *Scene) randomPod() (second bool) {
	hold := func(iface string, addrs ...string) []string {
		for _, a := range addrs {
			s.Addrs = append(s.Addrs, netip.MustParseAddr(a))
			s.interfaces[netip.MustParseAddr(a)] = iface
		}
		return addrs
	}
	high, low := 1+s.number/250, 1+s.number%250
	four, six := fmt.Sprintf("10.244.%d.%d", high, low), fmt.Sprintf("fd10:44::%x", 0x100+s.number)
	switch s.rand.IntN(6) {
	case 0:
		s.pod = append(s.pod, testbed.V4Only(), testbed.Addrs(hold("eth0", four)...))
	case 1:
		s.pod = append(s.pod, testbed.V6Only(), testbed.Addrs(hold("eth0", six)...))
	case 2, 3: // a second interface, and a network that goes by it
		second = true
		s.pod = append(s.pod, testbed.Addrs(hold("eth0", four, six)...), testbed.Interface("net1",
			hold("net1", fmt.Sprintf("10.245.%d.%d", high, low), fmt.Sprintf("fd11:44::%x", 0x100+s.number)),
			[]string{"10.96.0.0/13", "2001:db8:1::/48"}))
	default:
		s.pod = append(s.pod, testbed.Addrs(hold("eth0", four, six)...))
	}
	return second
}

// has says whether the pod has an address of a family.
func (s *Scene) has(family int) bool {
	return slices.ContainsFunc(s.Addrs, func(a netip.Addr) bool { return a.Is4() == (family == 4) })
}

func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }

// some gives up to most calls' worth of items, joined as a list.
func (s *Scene) some(most int, item func() string) string {
	var items []string
	for range s.rand.IntN(most + 1) {
		items = append(items, item())
	}
	return strings.Join(items, pick(s.rand, []string{",", ", "}))
}

// interesting prefixes, near which flows go, nested in each other.
var interesting = []string{
	"10.96.0.0/12", "10.96.0.0/16", "10.96.8.0/21", "10.96.8.8/32", "10.97.0.0/16", "10.0.0.0/8", "0.0.0.0/1", "128.0.0.0/1",
	"8.8.8.0/24", "8.8.8.8/31", "192.0.2.128/25", "100.64.0.0/10", "1.0.0.0/9",
	"fd96::/16", "fd96:1::/32", "fd96:1:2::/47", "2001:db8::/32", "2001:db8:1::/48", "2001:db8:1:2::/64", "2001:db8:1:2::8/127",
	"2000::/3", "fc00::/7", "2600::/12", "2001:db8:1:2::9/128",
}

func (s *Scene) prefix() string {
	switch s.rand.IntN(20) {
	case 0:
		return pick(s.rand, []string{"127.0.0.0/8", "127.0.0.1", "127.0.0.4/30", "::1", "127.128.0.0/9"})
	case 1:
		return pick(s.rand, []string{"0.0.0.0/0", "::/0", "::ffff:0:0/96", "::/1"})
	case 2: // around the pod's own addresses
		return pick(s.rand, []string{"10.244.0.0/16", "fd10:44::/32", "10.245.0.0/16", "fd10::/15"})
	case 3, 4, 5, 6: // any length, with host bits
		p := netip.MustParsePrefix(pick(s.rand, interesting))
		return netip.PrefixFrom(p.Addr(), p.Bits()+s.rand.IntN(p.Addr().BitLen()-p.Bits()+1)).String()
	}
	return pick(s.rand, interesting)
}

func (s *Scene) portRange() string {
	first := pick(s.rand, []int{80, 443, 1, 53, 8000, 8080, 15001, 15006, 15008, 65535, 1 + s.rand.IntN(65535)})
	switch s.rand.IntN(3) {
	case 0:
		return fmt.Sprintf("%d-%d", first, min(65535, first+pick(s.rand, []int{0, 1, 7, 100, 1000, 30000})))
	default:
		return fmt.Sprint(first)
	}
}

func (s *Scene) randomPolicy(secondInterface bool) {
	if s.rand.IntN(4) > 0 {
		s.Annots[includeRanges] = s.some(8, s.prefix)
	} else if s.rand.IntN(2) == 0 {
		s.Annots[includeRanges] = "*"
	}
	if s.rand.IntN(3) > 0 {
		s.Annots[excludeRanges] = s.some(6, s.prefix)
	}
	switch s.rand.IntN(8) {
	case 0:
		s.Annots[includePorts] = "*"
	case 1, 2, 3:
		s.Annots[includePorts] = s.some(5, s.portRange)
	}
	if s.rand.IntN(2) == 0 {
		s.Annots[excludePorts] = s.some(5, s.portRange)
	}
	switch s.rand.IntN(4) {
	case 0:
		s.Annots[includeInbound] = "*"
	case 1, 2:
		s.Annots[includeInbound] = s.some(5, s.portRange)
	}
	if s.rand.IntN(2) == 0 {
		s.Annots[excludeInbound] = s.some(5, s.portRange)
	}
	if s.rand.IntN(3) == 0 {
		s.Env[dnsCaptureEnv] = "true"
	}
	if s.rand.IntN(8) == 0 {
		s.Env[invalidDropEnv] = "true" // which changes no verdict
	}
	if s.rand.IntN(5) == 0 {
		TProxy(s)
	}
	if secondInterface && s.rand.IntN(2) == 0 || s.rand.IntN(16) == 0 {
		switch s.rand.IntN(3) {
		case 0:
			s.Annots[excludeInterfaces] = pick(s.rand, []string{"net1", "eth0", "net1,eth0", "lo", "other"})
		case 1:
			s.Annots[rerouteInterfaces] = pick(s.rand, []string{"net1", "eth0", "net1,eth0", "other"})
		case 2:
			s.Annots[excludeInterfaces], s.Annots[rerouteInterfaces] = pick(s.rand, []string{"net1", "eth0"}), pick(s.rand, []string{"net1", "eth0"})
		}
	}
	if !secondInterface && s.rand.IntN(4) == 0 {
		s.Annots[excludeInterfaces] = pick(s.rand, []string{"eth0", "lo", "eth0", "lo", "eth0,lo"})
		delete(s.Annots, rerouteInterfaces)
	}
}

// collectPorts gathers ports at and beside the edges of every range. On some of
// them no app listens.
func (s *Scene) collectPorts() {
	x := s.Policy.Proxy
	edges := []int{80, 8080, 53, int(x.OutboundPort), int(x.InboundPort), int(x.TunnelPort), int(x.DNSPort), 15021}
	for _, list := range [][]redirect.PortRange{
		s.Policy.IncludeOutboundPorts.Ranges, s.Policy.ExcludeOutboundPorts,
		s.Policy.IncludeInboundPorts.Ranges, s.Policy.ExcludeInboundPorts,
	} {
		for _, r := range list {
			edges = append(edges, int(r.First)-1, int(r.First), int(r.Last), int(r.Last)+1)
		}
	}
	for _, e := range edges {
		if e > 0 && e < 65536 && !slices.Contains(s.ports, uint16(e)) {
			s.ports = append(s.ports, uint16(e))
			if s.rand.IntN(10) == 0 {
				s.silent = append(s.silent, uint16(e))
			}
		}
	}
}

// collectAddrs gathers addresses at and beside the edges of every prefix.
func (s *Scene) collectAddrs() {
	all := slices.Concat(s.Policy.IncludeOutbound.List, s.Policy.ExcludeOutbound)
	for _, prefix := range interesting {
		if s.rand.IntN(3) == 0 {
			all = append(all, netip.MustParsePrefix(prefix))
		}
	}
	for _, p := range all {
		first, last := p.Masked().Addr(), lastOf(p)
		for _, a := range []netip.Addr{first.Prev(), first, first.Next(), last.Prev(), last, last.Next()} {
			// An IPv4-mapped address is IPv4, whatever form it has here.
			if a.IsValid() && !a.Is4In6() && s.reachable(a) {
				s.addrs = append(s.addrs, a)
			}
		}
	}
	for _, example := range []string{"203.0.113.9", "223.255.255.254", "2001:db8:ffff::1", "fd99::1", "3fff::1"} {
		if a := netip.MustParseAddr(example); s.reachable(a) {
			s.addrs = append(s.addrs, a)
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
func (s *Scene) reachable(a netip.Addr) bool {
	if a.Is4() {
		b := a.As4()
		return s.has(4) && b[0] >= 1 && b[0] < 224 && b[0] != 127 && !a.IsLinkLocalUnicast() && !s.ofPods(a)
	}
	for _, p := range []string{"2000::/3", "fc00::/7"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return s.has(6) && !s.ofPods(a)
		}
	}
	return false
}

// ofPods: other pods of the world lie there, or lay there.
func (s *Scene) ofPods(a netip.Addr) bool {
	for _, p := range []string{"10.244.0.0/15", "fd10:44::/32", "fd11:44::/32"} {
		if netip.MustParsePrefix(p).Contains(a) {
			return true
		}
	}
	return false
}
