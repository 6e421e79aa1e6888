// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
)

// A Direction says which table a flow is looked up in.
type Direction uint8

// The directions, as the pod sees them.
const (
	Outbound Direction = iota // a connect from inside the pod (section 4)
	Inbound                   // a connection that arrives at the pod (section 5)
)

// String returns "outbound" or "inbound".
func (d Direction) String() string {
	if d == Inbound {
		return "inbound"
	}
	return "outbound"
}

// A Proto is a transport protocol.
type Proto uint8

// The protocols that have rules. Everything else is never touched.
const (
	TCP Proto = iota
	UDP
)

// String returns "tcp" or "udp".
func (p Proto) String() string {
	if p == UDP {
		return "udp"
	}
	return "tcp"
}

// NoOwner is the UID and GID of a flow without an owner, such as a socket of
// the kernel's own: iptables' owner match takes it for "not the proxy".
const NoOwner uint32 = math.MaxUint32

// A Flow is a connection, or a datagram, as the pod's kernel sees it before
// anything was redirected.
type Flow struct {
	Direction Direction
	Proto     Proto

	// Src is, outbound, the address the socket is bound to, or invalid or
	// unspecified where it is bound to none; inbound, the client's address.
	Src netip.Addr
	// Dst is the destination, its port in host byte order. An IPv4-mapped
	// address follows the IPv4 rules; an unspecified one is where the kernel
	// takes it.
	Dst netip.AddrPort

	// UID and GID are the owner's (section 3), outbound, as numbered in the
	// pod's own user namespace; NoOwner where there is none.
	UID, GID uint32

	// Interface is, outbound, the one it leaves by, or empty where that is
	// not known (lo is then taken for what is local to the pod); inbound, the
	// one it arrives by.
	Interface string

	// PodAddrs are the addresses of the pod.
	PodAddrs []netip.Addr
}

// A Verdict says where a flow goes.
type Verdict uint8

// The verdicts of sections 4 and 5. Zero is none of them: a verdict that was
// forgotten must not read as direct.
const (
	VerdictDirect   Verdict = iota + 1 // untouched
	VerdictOutbound                    // OUT: Proxy.OutboundPort
	VerdictInbound                     // IN: Proxy.InboundPort
	VerdictDNS                         // DNS: Proxy.DNSPort
)

// String returns the name that the tables of sections 4 and 5 use.
func (v Verdict) String() string {
	names := [...]string{VerdictDirect: "direct", VerdictOutbound: "OUT", VerdictInbound: "IN", VerdictDNS: "DNS"}
	if v == 0 || int(v) >= len(names) {
		return fmt.Sprintf("verdict(%d)", uint8(v))
	}
	return names[v]
}

// A Rule is a row of the tables in sections 4 and 5. The numbers are an
// interface: the BPF programs count by them. They are in the tables' order and
// start at 1; 0 is no rule.
type Rule uint8

// The rules of sections 4 and 5.
const (
	RuleOutExcludeInterface Rule = iota + 1
	RuleOutExcludePort
	RuleOutPassthrough
	RuleOutProxyToSelf
	RuleOutLocal
	RuleOutProxy
	RuleOutProxyGIDToSelf
	RuleOutProxyGIDLocal // never reached: where RuleOutLocal does not match, neither does this
	RuleOutProxyGID
	RuleOutDNS
	RuleOutLoopback
	RuleOutExcludeCIDR
	RuleOutIncludePort
	RuleOutIncludeCIDR
	RuleOutDefault

	RuleInReroute
	RuleInExcludeInterface
	RuleInTunnel
	RuleInExcludePort
	RuleInInclude
	RuleInDefault

	ruleEnd
)

var ruleNames = [ruleEnd]string{
	RuleOutExcludeInterface: "out-exclude-interface",
	RuleOutExcludePort:      "out-exclude-port",
	RuleOutPassthrough:      "out-passthrough",
	RuleOutProxyToSelf:      "out-proxy-to-self",
	RuleOutLocal:            "out-local",
	RuleOutProxy:            "out-proxy",
	RuleOutProxyGIDToSelf:   "out-proxy-gid-to-self",
	RuleOutProxyGIDLocal:    "out-proxy-gid-local",
	RuleOutProxyGID:         "out-proxy-gid",
	RuleOutDNS:              "out-dns",
	RuleOutLoopback:         "out-loopback",
	RuleOutExcludeCIDR:      "out-exclude-cidr",
	RuleOutIncludePort:      "out-include-port",
	RuleOutIncludeCIDR:      "out-include-cidr",
	RuleOutDefault:          "out-default",
	RuleInReroute:           "in-reroute",
	RuleInExcludeInterface:  "in-exclude-interface",
	RuleInTunnel:            "in-tunnel",
	RuleInExcludePort:       "in-exclude-port",
	RuleInInclude:           "in-include",
	RuleInDefault:           "in-default",
}

// String returns the rule's name without the brackets, "rule(N)" for a number
// that is none.
func (r Rule) String() string {
	if r == 0 || r >= ruleEnd {
		return fmt.Sprintf("rule(%d)", uint8(r))
	}
	return ruleNames[r]
}

// Direction returns the table the rule belongs to.
func (r Rule) Direction() Direction {
	if r >= RuleInReroute {
		return Inbound
	}
	return Outbound
}

// Verdict returns what the rule says of a flow; 0 for RuleInReroute, which asks
// for its destination too.
func (r Rule) Verdict() Verdict {
	if r == RuleInReroute {
		return 0
	}
	for _, row := range slices.Concat(outbound, inbound) {
		if row.rule == r {
			return row.verdict
		}
	}
	return VerdictDirect // the defaults
}

// AllRules returns every rule, in the tables' order.
func AllRules() []Rule {
	rules := make([]Rule, 0, ruleEnd-1)
	for r := Rule(1); r < ruleEnd; r++ {
		rules = append(rules, r)
	}
	return rules
}

// A Decision is a verdict, and the rule that gave it.
type Decision struct {
	Verdict Verdict
	Rule    Rule
}

// Addresses of section 3.
var (
	loopback4 = netip.MustParseAddr("127.0.0.1")
	loopback6 = netip.IPv6Loopback()
	source4   = netip.MustParseAddr("127.0.0.6") // S6
	source6   = netip.MustParseAddr("::6")

	loopbackNet4 = netip.MustParsePrefix("127.0.0.0/8")
)

const dnsPort = 53

// facts are what the rules ask of a flow. Addresses are unmapped, have no
// zone, and are those of the packets.
type facts struct {
	src, dst           netip.Addr
	port               uint16
	iface              string
	local              bool // "by lo"
	proxyUID, proxyGID bool
}

func plain(a netip.Addr) netip.Addr { return a.Unmap().WithZone("") }

func (p *Policy) facts(f *Flow) facts {
	n := facts{
		src:      plain(f.Src),
		dst:      plain(f.Dst.Addr()),
		port:     f.Dst.Port(),
		iface:    f.Interface,
		proxyUID: f.UID == p.Proxy.UID,
		proxyGID: f.GID == p.Proxy.GID,
	}
	if f.Direction == Inbound {
		return n
	}

	// An unspecified destination is loopback. IPv4 takes the address the
	// socket is bound to before 127.0.0.1 (ip_route_output_key_hash_rcu);
	// IPv6 takes ::1 (tcp_v6_connect), or 127.0.0.1 on a socket bound to an
	// IPv4-mapped address, which no rule tells apart.
	bound := n.src.IsValid() && !n.src.IsUnspecified()
	switch n.dst {
	case netip.IPv4Unspecified():
		n.dst = loopback4
		if bound {
			n.dst = n.src
		}
	case netip.IPv6Unspecified():
		n.dst = loopback6
	case source6:
		// RFC 6724 rule 1: to one of its own addresses, IPv6 goes from that
		// very address. IPv4 goes from 127.0.0.1 to all of 127.0.0.0/8.
		if !bound {
			n.src = source6
		}
	}

	n.local = loopbackNet4.Contains(n.dst) || n.dst == loopback6 || n.dst == source6 || // S6 is put on lo
		slices.ContainsFunc(f.PodAddrs, func(a netip.Addr) bool { return plain(a) == n.dst })
	if n.iface == "" && n.local {
		n.iface = "lo"
	}
	return n
}

// A row is one line of a table. Those with udp apply to UDP port 53 as well.
type row struct {
	rule    Rule
	verdict Verdict
	udp     bool
	match   func(p *Policy, f facts) bool
}

var outbound = []row{
	{RuleOutExcludeInterface, VerdictDirect, true, func(p *Policy, f facts) bool {
		return slices.Contains(p.ExcludeInterfaces, f.iface)
	}},
	{RuleOutExcludePort, VerdictDirect, true, func(p *Policy, f facts) bool {
		return containsPort(p.ExcludeOutboundPorts, f.port)
	}},
	{RuleOutPassthrough, VerdictDirect, true, func(_ *Policy, f facts) bool {
		return f.local && (f.src == source4 || f.src == source6)
	}},

	{RuleOutProxyToSelf, VerdictInbound, false, func(p *Policy, f facts) bool { return f.proxyUID && p.toSelf(f) }},
	{RuleOutLocal, VerdictDirect, false, func(p *Policy, f facts) bool { return !f.proxyUID && p.localDirect(f) }},
	{RuleOutProxy, VerdictDirect, true, func(_ *Policy, f facts) bool { return f.proxyUID }},

	{RuleOutProxyGIDToSelf, VerdictInbound, false, func(p *Policy, f facts) bool { return f.proxyGID && p.toSelf(f) }},
	{RuleOutProxyGIDLocal, VerdictDirect, false, func(p *Policy, f facts) bool { return !f.proxyGID && p.localDirect(f) }},
	{RuleOutProxyGID, VerdictDirect, false, func(_ *Policy, f facts) bool { return f.proxyGID }},

	{RuleOutDNS, VerdictDNS, true, func(p *Policy, f facts) bool { return p.capturesDNS(f) }},
	{RuleOutLoopback, VerdictDirect, false, func(_ *Policy, f facts) bool { return f.loopback() }},
	{RuleOutExcludeCIDR, VerdictDirect, false, func(p *Policy, f facts) bool {
		return containsAddr(p.ExcludeOutbound, f.dst)
	}},
	{RuleOutIncludePort, VerdictOutbound, false, func(p *Policy, f facts) bool {
		return p.IncludeOutboundPorts.Contains(f.port)
	}},
	{RuleOutIncludeCIDR, VerdictOutbound, false, func(p *Policy, f facts) bool {
		return p.IncludeOutbound.Contains(f.dst)
	}},
}

var inbound = []row{
	{RuleInReroute, VerdictOutbound, false, func(p *Policy, f facts) bool {
		return slices.Contains(p.RerouteInterfaces, f.iface) && p.IncludeOutbound.Contains(f.dst)
	}},
	{RuleInReroute, VerdictDirect, false, func(p *Policy, f facts) bool {
		return slices.Contains(p.RerouteInterfaces, f.iface)
	}},
	{RuleInExcludeInterface, VerdictDirect, false, func(p *Policy, f facts) bool {
		return slices.Contains(p.ExcludeInterfaces, f.iface)
	}},
	{RuleInTunnel, VerdictDirect, false, func(p *Policy, f facts) bool { return f.port == p.Proxy.TunnelPort }},
	{RuleInExcludePort, VerdictDirect, false, func(p *Policy, f facts) bool {
		return p.IncludeInboundPorts.All && containsPort(p.ExcludeInboundPorts, f.port)
	}},
	{RuleInInclude, VerdictInbound, false, func(p *Policy, f facts) bool {
		return p.IncludeInboundPorts.Contains(f.port)
	}},
}

// loopback reports whether the destination is LO.
func (f facts) loopback() bool { return f.dst == loopback4 || f.dst == loopback6 }

func (p *Policy) capturesDNS(f facts) bool { return p.DNSCapture && f.port == dnsPort }

// toSelf is [out-proxy-to-self] but for the owner.
func (p *Policy) toSelf(f facts) bool {
	return f.local && !f.loopback() && f.port != p.Proxy.TunnelPort && !p.capturesDNS(f)
}

// localDirect is [out-local] but for the owner.
func (p *Policy) localDirect(f facts) bool {
	return f.local && !p.capturesDNS(f) && !p.IncludesLoopback()
}

// Decide returns the verdict on a flow, and the rule that gave it, by sections
// 4 and 5. It is the reference that every backend is tested against. What the
// sections don't speak of (UDP other than to port 53, what arrives by lo) is
// direct by the direction's default rule.
func (p *Policy) Decide(f Flow) Decision {
	table, byDefault := outbound, Decision{VerdictDirect, RuleOutDefault}
	if f.Direction == Inbound {
		table, byDefault = inbound, Decision{VerdictDirect, RuleInDefault}
		if f.Interface == "lo" {
			return byDefault
		}
	}
	n := p.facts(&f)
	for _, r := range table {
		applies := f.Proto == TCP || f.Proto == UDP && r.udp && n.port == dnsPort
		if applies && r.match(p, n) {
			return Decision{r.verdict, r.rule}
		}
	}
	return byDefault
}
