// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"shunt.dev/shunt/internal/tproxy"
	"shunt.dev/shunt/redirect"
)

// A Family is an IP version: each has its own programs and its own rules.
type Family int

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// String returns "IPv4" or "IPv6".
func (f Family) String() string { return "IPv" + strconv.Itoa(int(f)) }

// Mark is what TPROXY puts on packets, and what the rule that looks up Table
// asks for: both as a pod's proxy knows them from other redirectors.
const (
	Mark  = tproxy.Mark
	Table = tproxy.Table
)

// prefix begins the names of our chains. Whatever in a pod's namespace begins
// with it is ours to change and to remove.
const prefix = "SHUNT_"

// Our chains.
const (
	chainOut     = prefix + "OUT"      // nat: TCP that the pod sends, section 4
	chainOutUDP  = prefix + "OUT_UDP"  // nat: DNS over UDP that the pod sends
	chainIn      = prefix + "IN"       // nat: TCP that arrives, section 5
	chainTProxy  = prefix + "TPROXY"   // mangle: the same in TPROXY mode
	chainMark    = prefix + "MARK"     // mangle: the proxy's connections from others' addresses
	chainUnmark  = prefix + "UNMARK"   // mangle: what TPROXY has marked
	chainInvalid = prefix + "INVALID"  // mangle: INVALID_DROP
	chainZoneOut = prefix + "ZONE_OUT" // raw: conntrack zones of DNS over UDP
	chainZoneIn  = prefix + "ZONE_IN"
)

// The conntrack zones of DNS over UDP. A datagram belongs to whatever earlier
// one has its addresses and ports, whoever sent that; so the proxy that asks
// from a port which an app has asked from would have its question sent back to
// itself, if both were in one zone.
const (
	zoneProxy = "1"
	zoneApp   = "2"
)

const (
	mark     = "0x539"
	fullMark = mark + "/0xffffffff"
	// notSYN matches everything that doesn't ask for a connection.
	notSYN = "-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN"
)

// Render gives the rules of a policy for a family as iptables-restore reads
// them, with --noflush. It only adds, and only in a namespace that has none of
// our chains: -N fails otherwise, and with it the table.
//
// Names are numbers, except those of interfaces. Each rule has the form in
// which iptables-save gives it back.
//
// # The order of tables
//
// iptables-restore commits table by table, and can end between any two. What
// is there then must not let a connection go around the proxy. Thus nat comes
// first: in one commit, it sends to the proxy all that is to go there, in both
// directions and in both modes. What the other tables add never opens a way:
//
//   - mangle has TPROXY hand over inbound connections without a change of
//     address. Until it is there, nat does so with one: nat's inbound chain is
//     the same in both modes, except that in TPROXY mode it lets pass what bears
//     the mark, as all that TPROXY has handed over does.
//   - raw keeps the proxy's questions to resolvers apart from the app's. Until
//     it is there, a question of the proxy's from the port of an app's comes
//     back to the proxy: it fails.
//
// The families are two programs' work, and start at once. A pod with one of them
// done and the other not begun is one whose ADD has failed: nothing runs in it.
//
// Removal goes the other way, nat last. A change goes in this same order, each
// table from the old to the new in one commit.
//
// The routing rule, the table that the mark leads to and the sysctls are there
// before: they do nothing to what isn't marked.
func Render(p *redirect.Policy, f Family) string {
	var b strings.Builder
	for _, t := range build(p, f) {
		t.render(&b)
	}
	return b.String()
}

// A rule is one rule of a chain, after its name, and the row of the semantics
// that it is for.
type rule struct {
	spec string
	why  string
}

type chain struct {
	name  string
	rules []rule
}

// A table is what we have in a table of iptables.
type table struct {
	name   string
	chains []chain
	jumps  []rule // from built-in chains, whose names they begin with
}

// render writes the table.
func (t *table) render(b *strings.Builder) {
	b.WriteString("*" + t.name + "\n")
	for _, c := range t.chains {
		b.WriteString("-N " + c.name + "\n")
	}
	t.renderRules(b)
	b.WriteString("COMMIT\n")
}

func (t *table) renderRules(b *strings.Builder) {
	for _, c := range t.chains {
		why := ""
		for _, r := range c.rules {
			if r.why != why {
				why = r.why
				b.WriteString("# " + why + "\n")
			}
			b.WriteString("-A " + c.name + " " + r.spec + "\n")
		}
	}
	// Last, for those who read it: within a commit there is no order.
	for _, j := range t.jumps {
		b.WriteString("-A " + j.spec + "\n")
	}
}

// builder makes the tables of one family.
type builder struct {
	p *redirect.Policy
	f Family

	lo, s6 string // LO and S6 of section 3
}

func build(p *redirect.Policy, f Family) []table {
	b := &builder{p: p, f: f, lo: "127.0.0.1/32", s6: "127.0.0.6/32"}
	if f == IPv6 {
		b.lo, b.s6 = "::1/128", "::6/128"
	}
	tables := []table{b.nat()}
	if t := b.mangle(); len(t.chains) > 0 {
		tables = append(tables, t)
	}
	if b.dnsUDP() {
		tables = append(tables, b.raw())
	}
	return tables
}

// add appends a rule, its parts joined by blanks; empty parts are left out.
func (c *chain) add(why string, parts ...string) {
	var spec []string
	for _, part := range parts {
		if part != "" {
			spec = append(spec, part)
		}
	}
	c.rules = append(c.rules, rule{strings.Join(spec, " "), why})
}

// bracketed names a row as the semantics do.
func bracketed(r redirect.Rule) string { return "[" + r.String() + "]" }

// What rules are for that no row of the semantics has, though it counts by one.
const (
	whyTProxyHasIt = "TPROXY has it"                                          // in-include
	whyMarked      = "the proxy, from the client's address, marked by itself" // out-passthrough
)

func to(port uint16) string {
	return "-j REDIRECT --to-ports " + strconv.Itoa(int(port))
}

const direct = "-j RETURN"

func (b *builder) nat() table {
	t := table{name: "nat"}
	t.chains = append(t.chains, b.out())
	t.jumps = append(t.jumps, rule{spec: "OUTPUT -p tcp -j " + chainOut})
	if b.dnsUDP() {
		t.chains = append(t.chains, b.outUDP())
		t.jumps = append(t.jumps, rule{spec: "OUTPUT -p udp -m udp --dport 53 -j " + chainOutUDP})
	}
	in := chain{name: chainIn}
	if b.p.Mode == redirect.ModeTProxy {
		in.add(whyTProxyHasIt, "-m mark --mark "+mark, direct)
	}
	b.in(&in, direct, to(b.p.Proxy.OutboundPort), to(b.p.Proxy.InboundPort))
	t.chains = append(t.chains, in)
	t.jumps = append(t.jumps, rule{spec: "PREROUTING ! -i lo -p tcp -j " + chainIn})
	return t
}

// out is section 4 for TCP, row by row. What leaves by lo is what is local to
// the pod: the kernel has routed it before.
func (b *builder) out() chain {
	p, c := b.p, chain{name: chainOut}
	in := to(p.Proxy.InboundPort)
	for _, i := range p.ExcludeInterfaces {
		c.add(bracketed(redirect.RuleOutExcludeInterface), "-o "+i, direct)
	}
	for _, match := range ports(p.ExcludeOutboundPorts) {
		c.add(bracketed(redirect.RuleOutExcludePort), match, direct)
	}
	c.add(bracketed(redirect.RuleOutPassthrough), "-s "+b.s6, "-o lo", direct)
	if p.Mode == redirect.ModeTProxy {
		// Who may set a mark has NET_ADMIN: the proxy. To an address of the
		// pod, and from the client's, it can't say otherwise that it means
		// the app.
		c.add(whyMarked, "-o lo -m mark --mark "+mark, direct)
	}
	// A pod that comes from eBPF has connections to its proxy of which
	// iptables has not seen the beginning: connection tracking takes an answer
	// for one.
	answers := []string{strconv.Itoa(int(p.Proxy.OutboundPort)), strconv.Itoa(int(p.Proxy.InboundPort))}
	if p.DNSCapture {
		answers = append(answers, strconv.Itoa(int(p.Proxy.DNSPort)))
	}
	c.add("the proxy's answers, which begin nothing", "-o lo -p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -m multiport --sports "+strings.Join(answers, ","), direct)
	notToSelf := "-p tcp -m tcp ! --dport " + strconv.Itoa(int(p.Proxy.TunnelPort))
	notDNS := ""
	if p.DNSCapture {
		notToSelf = fmt.Sprintf("-p tcp -m multiport ! --dports 53,%d", p.Proxy.TunnelPort)
		notDNS = "-p tcp -m tcp ! --dport 53"
	}
	for _, o := range []struct {
		owner                string
		toSelf, local, proxy redirect.Rule
	}{
		{"--uid-owner " + number(p.Proxy.UID), redirect.RuleOutProxyToSelf, redirect.RuleOutLocal, redirect.RuleOutProxy},
		{"--gid-owner " + number(p.Proxy.GID), redirect.RuleOutProxyGIDToSelf, redirect.RuleOutProxyGIDLocal, redirect.RuleOutProxyGID},
	} {
		c.add(bracketed(o.toSelf), "! -d "+b.lo, "-o lo", notToSelf, "-m owner "+o.owner, in)
		if !p.IncludesLoopback() {
			c.add(bracketed(o.local), "-o lo", notDNS, "-m owner ! "+o.owner, direct)
		}
		c.add(bracketed(o.proxy), "-m owner "+o.owner, direct)
	}
	if p.DNSCapture {
		c.add(bracketed(redirect.RuleOutDNS), "-p tcp -m tcp --dport 53", to(p.Proxy.DNSPort))
	}
	c.add(bracketed(redirect.RuleOutLoopback), "-d "+b.lo, direct)
	for _, match := range b.dests(p.ExcludeOutbound) {
		c.add(bracketed(redirect.RuleOutExcludeCIDR), match, direct)
	}
	out := to(p.Proxy.OutboundPort)
	if p.IncludeOutboundPorts.All {
		c.add(bracketed(redirect.RuleOutIncludePort), "-p tcp", out)
	}
	for _, match := range ports(p.IncludeOutboundPorts.Ranges) {
		c.add(bracketed(redirect.RuleOutIncludePort), match, out)
	}
	b.included(&c, bracketed(redirect.RuleOutIncludeCIDR), "", out)
	return c // [out-default]: direct
}

// included adds a verdict for the destinations of includeOutboundIPRanges.
func (b *builder) included(c *chain, why, match, verdict string) {
	if b.p.IncludeOutbound.All {
		c.add(why, match, "-p tcp", verdict)
	}
	for _, dst := range b.dests(b.p.IncludeOutbound.List) {
		c.add(why, dst, match, "-p tcp", verdict)
	}
}

// dnsUDP says whether any datagram to port 53 can be captured.
func (b *builder) dnsUDP() bool {
	for _, r := range b.p.ExcludeOutboundPorts {
		if r.Contains(53) {
			return false
		}
	}
	return b.p.DNSCapture
}

// udpDirect are the rows for DNS over UDP that come before the owner's.
func (b *builder) udpDirect(c *chain) {
	for _, i := range b.p.ExcludeInterfaces {
		c.add(bracketed(redirect.RuleOutExcludeInterface), "-o "+i, direct)
	}
	c.add(bracketed(redirect.RuleOutPassthrough), "-s "+b.s6, "-o lo", direct)
}

// outUDP is section 4 for UDP to port 53.
func (b *builder) outUDP() chain {
	c := chain{name: chainOutUDP}
	b.udpDirect(&c)
	c.add(bracketed(redirect.RuleOutProxy), "-m owner --uid-owner "+number(b.p.Proxy.UID), direct)
	c.add(bracketed(redirect.RuleOutDNS), "-p udp", to(b.p.Proxy.DNSPort))
	return c
}

// in is section 5, row by row, with the verdicts of a table: nat's, or those
// of mangle in TPROXY mode, which leaves to nat what is for OUT.
func (b *builder) in(c *chain, pass, out, in string) {
	p := b.p
	for _, i := range p.RerouteInterfaces {
		if out != "" {
			b.included(c, bracketed(redirect.RuleInReroute), "-i "+i, out)
		}
		c.add(bracketed(redirect.RuleInReroute), "-i "+i, pass)
	}
	for _, i := range p.ExcludeInterfaces {
		c.add(bracketed(redirect.RuleInExcludeInterface), "-i "+i, pass)
	}
	c.add(bracketed(redirect.RuleInTunnel), "-p tcp -m tcp --dport "+strconv.Itoa(int(p.Proxy.TunnelPort)), pass)
	if p.IncludeInboundPorts.All {
		for _, match := range ports(p.ExcludeInboundPorts) {
			c.add(bracketed(redirect.RuleInExcludePort), match, pass)
		}
		c.add(bracketed(redirect.RuleInInclude), "-p tcp", in)
	}
	for _, match := range ports(p.IncludeInboundPorts.Ranges) {
		c.add(bracketed(redirect.RuleInInclude), match, in)
	}
	// [in-default]: direct
}

func (b *builder) mangle() table {
	t := table{name: "mangle"}
	if b.p.InvalidDrop {
		c := chain{name: chainInvalid}
		c.add("INVALID_DROP", "-m conntrack --ctstate INVALID", "-j DROP")
		t.chains = append(t.chains, c)
		t.jumps = append(t.jumps, rule{spec: "PREROUTING ! -i lo -j " + chainInvalid})
	}
	if b.p.Mode == redirect.ModeTProxy {
		t.chains = append(t.chains, b.tproxy(), b.unmark(), b.marks())
		t.jumps = append(t.jumps,
			rule{spec: "PREROUTING ! -i lo -p tcp -j " + chainTProxy},
			rule{spec: "INPUT ! -i lo -p tcp -j " + chainUnmark},
			rule{spec: "POSTROUTING -o lo -p tcp -j " + chainMark})
	}
	return t
}

// tproxy sees every packet, not only the first of a connection, and TPROXY
// drops those of sockets other than the proxy's: what belongs to a connection
// that the pod has opened must pass.
func (b *builder) tproxy() chain {
	c := chain{name: chainTProxy}
	c.add("answers to the pod's own connections", "-m conntrack --ctdir REPLY", direct)
	// A packet that conntrack knows nothing of is a stray one of either kind.
	c.add("as nat has it: not a new connection", notSYN, "-m conntrack --ctstate INVALID", direct)
	any4 := "0.0.0.0"
	if b.f == IPv6 {
		any4 = "::"
	}
	// The mark is for nat and, where the destination is no address of the
	// pod's own, for the routing rule.
	b.in(&c, direct, "", fmt.Sprintf("-j TPROXY --on-port %d --on-ip %s --tproxy-mark %s", b.p.Proxy.InboundPort, any4, fullMark))
	return c
}

// marks has answers to connections that the proxy opens to its app from a
// client's address come back to the proxy: without a mark they would leave the
// pod, or find no route. Such a connection goes by lo, and has a source that is
// not the pod's. By its first packet's mark the app's socket has one too, and so
// all that it sends (tcp_fwmark_accept; fwmark_reflect for what comes of no
// socket). The mark is put on after nat, for which it has another meaning.
func (b *builder) marks() chain {
	c := chain{name: chainMark}
	for _, owner := range []string{"--uid-owner " + number(b.p.Proxy.UID), "--gid-owner " + number(b.p.Proxy.GID)} {
		c.add("the proxy, from the client's address", "-m owner "+owner, "-m addrtype ! --src-type LOCAL", "-j MARK --set-xmark "+fullMark)
	}
	return c
}

// unmark takes TPROXY's mark away once routing has seen it, or the proxy's
// sockets would have it, and would answer clients by lo.
func (b *builder) unmark() chain {
	c := chain{name: chainUnmark}
	c.add("TPROXY's mark has done its work", "-m mark --mark "+mark, "-j MARK --set-xmark 0x0/0xffffffff")
	return c
}

// raw puts each datagram into the zone of the one who asks. What comes in from
// outside and is from port 53 answers the proxy: what an app asks stays in the
// pod. Only what is decided here has a zone; where packets go by lo they keep
// what they were given on the way out.
func (b *builder) raw() table {
	out := chain{name: chainZoneOut}
	// First: they go by lo, also where lo is an excluded interface and the
	// question went by another.
	out.add("the proxy's answers to the app", "-o lo -p udp -m udp --sport "+strconv.Itoa(int(b.p.Proxy.DNSPort)), "-j CT --zone "+zoneApp)
	b.udpDirect(&out)
	dns := "-p udp -m udp --dport 53"
	out.add("the proxy's questions", dns, "-m owner --uid-owner "+number(b.p.Proxy.UID), "-j CT --zone "+zoneProxy)
	out.add("the app's questions", dns, "-m owner ! --uid-owner "+number(b.p.Proxy.UID), "-j CT --zone "+zoneApp)
	in := chain{name: chainZoneIn}
	for _, i := range b.p.ExcludeInterfaces {
		in.add(bracketed(redirect.RuleOutExcludeInterface), "-i "+i, direct)
	}
	in.add("answers to the proxy", "-p udp -m udp --sport 53", "-j CT --zone "+zoneProxy)
	return table{
		name:   "raw",
		chains: []chain{out, in},
		jumps: []rule{
			{spec: "OUTPUT -p udp -j " + chainZoneOut},
			{spec: "PREROUTING ! -i lo -p udp -j " + chainZoneIn},
		},
	}
}

// dests gives a match for each prefix of the family; 0 bits match everything,
// and iptables-save says nothing of them.
func (b *builder) dests(list []netip.Prefix) []string {
	var out []string
	for _, p := range list {
		switch {
		case p.Addr().Is4() != (b.f == IPv4):
		case p.Bits() == 0:
			out = append(out, "")
		default:
			out = append(out, "-d "+p.String())
		}
	}
	return out
}

// multiportMax is how many ports -m multiport takes. A range counts twice.
const multiportMax = 15

// ports gives matches of TCP destination ports that together are the list.
func ports(list []redirect.PortRange) []string {
	if len(list) == 1 {
		return []string{"-p tcp -m tcp --dport " + portRange(list[0])}
	}
	var (
		out  []string
		some []string
		size int
	)
	flush := func() {
		if len(some) > 0 {
			out = append(out, "-p tcp -m multiport --dports "+strings.Join(some, ","))
		}
		some, size = nil, 0
	}
	for _, r := range list {
		n := 1
		if r.First != r.Last {
			n = 2
		}
		if size+n > multiportMax {
			flush()
		}
		some, size = append(some, portRange(r)), size+n
	}
	flush()
	return out
}

func portRange(r redirect.PortRange) string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d:%d", r.First, r.Last)
}

func number(id uint32) string { return strconv.FormatUint(uint64(id), 10) }
