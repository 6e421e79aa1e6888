// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	app   = 1000 // a uid, or gid, that is not the proxy's
	proxy = 1337
)

var podAddrs = []netip.Addr{netip.MustParseAddr("10.1.1.1"), netip.MustParseAddr("fd00::1")}

// out is a TCP connect of the app's.
func out(dst string, edits ...func(*Flow)) Flow {
	f := Flow{Dst: netip.MustParseAddrPort(dst), UID: app, GID: app, PodAddrs: podAddrs}
	for _, edit := range edits {
		edit(&f)
	}
	return f
}

// in is a TCP connection that arrives by eth0.
func in(dst string, edits ...func(*Flow)) Flow {
	return out(dst, append([]func(*Flow){func(f *Flow) {
		f.Direction, f.Interface, f.Src = Inbound, "eth0", netip.MustParseAddr("10.9.9.9")
	}}, edits...)...)
}

func uid(id uint32) func(*Flow)    { return func(f *Flow) { f.UID = id } }
func gid(id uint32) func(*Flow)    { return func(f *Flow) { f.GID = id } }
func by(name string) func(*Flow)   { return func(f *Flow) { f.Interface = name } }
func from(addr string) func(*Flow) { return func(f *Flow) { f.Src = netip.MustParseAddr(addr) } }
func udp(f *Flow)                  { f.Proto = UDP }
func dns(p *Policy)                { p.DNSCapture = true }
func captureNone(p *Policy)        { p.IncludeOutbound = Prefixes{} }
func inboundAll(p *Policy) {
	p.IncludeInboundPorts = Ports{All: true}
	p.ExcludeInboundPorts = ports(15020, 15021)
}

func include(l ...string) func(*Policy) {
	return func(p *Policy) { p.IncludeOutbound = Prefixes{List: prefixes(l...)} }
}

func exclude(l ...string) func(*Policy) {
	return func(p *Policy) { p.ExcludeOutbound = prefixes(l...) }
}

func includePorts(l ...uint16) func(*Policy) {
	return func(p *Policy) { p.IncludeOutboundPorts = Ports{Ranges: ports(l...)} }
}

func excludePorts(l ...uint16) func(*Policy) {
	return func(p *Policy) { p.ExcludeOutboundPorts = ports(l...) }
}
func excludeIf(l ...string) func(*Policy) { return func(p *Policy) { p.ExcludeInterfaces = l } }
func reroute(l ...string) func(*Policy)   { return func(p *Policy) { p.RerouteInterfaces = l } }

func TestDecide(t *testing.T) {
	const (
		direct = VerdictDirect
		OUT    = VerdictOutbound
		IN     = VerdictInbound
		DNS    = VerdictDNS
	)
	both := func(edits ...func(*Policy)) *Policy { return defaults(edits...) }
	plainPolicy := both()

	for _, tc := range []struct {
		name    string
		policy  *Policy
		flow    Flow
		verdict Verdict
		rule    Rule
	}{
		// The ordinary cases.
		{"out 4", plainPolicy, out("192.0.2.1:80"), OUT, RuleOutIncludeCIDR},
		{"out 6", plainPolicy, out("[2001:db8::1]:80"), OUT, RuleOutIncludeCIDR},
		{"out mapped", plainPolicy, out("[::ffff:192.0.2.1]:80"), OUT, RuleOutIncludeCIDR},
		{"out by root", plainPolicy, out("192.0.2.1:80", uid(0), gid(0)), OUT, RuleOutIncludeCIDR},
		{"out by nobody", plainPolicy, out("192.0.2.1:80", uid(NoOwner), gid(NoOwner)), OUT, RuleOutIncludeCIDR},
		{"out default 4", both(captureNone), out("192.0.2.1:80"), direct, RuleOutDefault},
		{"out default 6", both(captureNone), out("[2001:db8::1]:80"), direct, RuleOutDefault},

		// [out-exclude-interface]
		{"interface", both(excludeIf("eth1", "eth2")), out("192.0.2.1:80", by("eth2")), direct, RuleOutExcludeInterface},
		{"interface 6", both(excludeIf("eth1")), out("[2001:db8::1]:80", by("eth1")), direct, RuleOutExcludeInterface},
		{"interface, another", both(excludeIf("eth1")), out("192.0.2.1:80", by("eth0")), OUT, RuleOutIncludeCIDR},
		{"interface, unknown", both(excludeIf("eth1")), out("192.0.2.1:80"), OUT, RuleOutIncludeCIDR},
		{"interface before port", both(excludeIf("eth1"), excludePorts(80, 80)), out("192.0.2.1:80", by("eth1")), direct, RuleOutExcludeInterface},
		{"interface lo is where local ones leave", both(excludeIf("lo")), out("10.1.1.1:80", uid(proxy)), direct, RuleOutExcludeInterface},
		{"interface lo and not local", both(excludeIf("lo")), out("192.0.2.1:80"), OUT, RuleOutIncludeCIDR},

		// [out-exclude-port]
		{"port", both(excludePorts(80, 90)), out("192.0.2.1:90"), direct, RuleOutExcludePort},
		{"port 6", both(excludePorts(80, 90)), out("[2001:db8::1]:80"), direct, RuleOutExcludePort},
		{"port, beside", both(excludePorts(80, 90)), out("192.0.2.1:91"), OUT, RuleOutIncludeCIDR},
		{"port before the proxy's rules", both(excludePorts(80, 80)), out("10.1.1.1:80", uid(proxy)), direct, RuleOutExcludePort},
		{"port before its include", both(excludePorts(80, 80), includePorts(80, 80)), out("192.0.2.1:80"), direct, RuleOutExcludePort},

		// [out-passthrough]
		{"passthrough 4", plainPolicy, out("10.1.1.1:80", uid(proxy), from("127.0.0.6")), direct, RuleOutPassthrough},
		{"passthrough 6", plainPolicy, out("[fd00::1]:80", uid(proxy), from("::6")), direct, RuleOutPassthrough},
		{"passthrough mapped", plainPolicy, out("[::ffff:10.1.1.1]:80", uid(proxy), from("::ffff:127.0.0.6")), direct, RuleOutPassthrough},
		{"passthrough of anyone", plainPolicy, out("127.0.0.1:80", from("127.0.0.6")), direct, RuleOutPassthrough},
		{"passthrough, not local", plainPolicy, out("192.0.2.1:80", uid(proxy), from("127.0.0.6")), direct, RuleOutProxy},
		{"passthrough, not local, app", plainPolicy, out("192.0.2.1:80", from("127.0.0.6")), OUT, RuleOutIncludeCIDR},
		{"passthrough, not S6", plainPolicy, out("10.1.1.1:80", uid(proxy), from("127.0.0.7")), IN, RuleOutProxyToSelf},
		{"unbound to S6, 6: goes from S6", plainPolicy, out("[::6]:80", uid(proxy)), direct, RuleOutPassthrough},
		{"bound to ::, to S6", plainPolicy, out("[::6]:80", uid(proxy), from("::")), direct, RuleOutPassthrough},
		{"bound, to S6", plainPolicy, out("[::6]:80", uid(proxy), from("fd00::1")), IN, RuleOutProxyToSelf},
		{"unbound to S6, 4: goes from 127.0.0.1", plainPolicy, out("127.0.0.6:80", uid(proxy)), IN, RuleOutProxyToSelf},

		// [out-proxy-to-self]
		{"to self 4", plainPolicy, out("10.1.1.1:80", uid(proxy)), IN, RuleOutProxyToSelf},
		{"to self 6", plainPolicy, out("[fd00::1]:80", uid(proxy)), IN, RuleOutProxyToSelf},
		{"to self mapped", plainPolicy, out("[::ffff:10.1.1.1]:80", uid(proxy)), IN, RuleOutProxyToSelf},
		{"to self with both ids", plainPolicy, out("10.1.1.1:80", uid(proxy), gid(proxy)), IN, RuleOutProxyToSelf},
		{"to self by 127.0.0.2", plainPolicy, out("127.0.0.2:80", uid(proxy)), IN, RuleOutProxyToSelf},
		{"to self, LO 4", plainPolicy, out("127.0.0.1:80", uid(proxy)), direct, RuleOutProxy},
		{"to self, LO 6", plainPolicy, out("[::1]:80", uid(proxy)), direct, RuleOutProxy},
		{"to self, LO mapped", plainPolicy, out("[::ffff:127.0.0.1]:80", uid(proxy)), direct, RuleOutProxy},
		{"to self, TUN", plainPolicy, out("10.1.1.1:15008", uid(proxy)), direct, RuleOutProxy},
		{"to self, 53", plainPolicy, out("10.1.1.1:53", uid(proxy)), IN, RuleOutProxyToSelf},
		{"to self, 53 with DNS", both(dns), out("10.1.1.1:53", uid(proxy)), direct, RuleOutProxy},
		{"to self, 80 with DNS", both(dns), out("10.1.1.1:80", uid(proxy)), IN, RuleOutProxyToSelf},
		{"to self, another's address", plainPolicy, out("10.1.1.2:80", uid(proxy)), direct, RuleOutProxy},
		{"to self, pod address mapped", plainPolicy, out("10.1.1.1:80", uid(proxy), func(f *Flow) {
			f.PodAddrs = []netip.Addr{netip.MustParseAddr("::ffff:10.1.1.1")}
		}), IN, RuleOutProxyToSelf},
		{"to self, link-local with zone", plainPolicy, out("[fe80::1%eth0]:80", uid(proxy), func(f *Flow) {
			f.PodAddrs = []netip.Addr{netip.MustParseAddr("fe80::1")}
		}), IN, RuleOutProxyToSelf},

		// [out-local]
		{"local 4", plainPolicy, out("10.1.1.1:80"), direct, RuleOutLocal},
		{"local 6", plainPolicy, out("[fd00::1]:80"), direct, RuleOutLocal},
		{"local mapped", plainPolicy, out("[::ffff:127.0.0.1]:80"), direct, RuleOutLocal},
		{"local LO 4", plainPolicy, out("127.0.0.1:80"), direct, RuleOutLocal},
		{"local LO 6", plainPolicy, out("[::1]:80"), direct, RuleOutLocal},
		{"local 127.9.9.9", plainPolicy, out("127.9.9.9:80"), direct, RuleOutLocal},
		{"local with the gid alone", plainPolicy, out("10.1.1.1:80", gid(proxy)), direct, RuleOutLocal},
		{"local of nobody", plainPolicy, out("10.1.1.1:80", uid(NoOwner), gid(NoOwner)), direct, RuleOutLocal},
		{"local, TUN", plainPolicy, out("10.1.1.1:15008"), direct, RuleOutLocal},
		{"local, 53 with DNS", both(dns), out("10.1.1.1:53"), DNS, RuleOutDNS},
		{"local, 80 with DNS", both(dns), out("10.1.1.1:80"), direct, RuleOutLocal},
		{"local before include port", both(includePorts(80, 80)), out("10.1.1.1:80"), direct, RuleOutLocal},

		// [out-local] is absent
		{"absent 4 for 4", both(include("127.0.0.0/8")), out("127.0.0.2:80"), OUT, RuleOutIncludeCIDR},
		{"absent 4 for a part", both(include("127.0.0.2/32")), out("127.0.0.2:80"), OUT, RuleOutIncludeCIDR},
		{"absent 4 for the pod's address", both(include("127.0.0.2/32", "10.0.0.0/8")), out("10.1.1.1:80"), OUT, RuleOutIncludeCIDR},
		{"absent 4 for 6", both(include("127.0.0.0/8", "::/0")), out("[fd00::1]:80"), OUT, RuleOutIncludeCIDR},
		{"absent 6 for 4", both(include("::1/128", "10.0.0.0/8")), out("10.1.1.1:80"), OUT, RuleOutIncludeCIDR},
		{"absent, and not included", both(include("::1/128")), out("10.1.1.1:80"), direct, RuleOutDefault},
		{"absent, LO stays", both(include("127.0.0.0/8")), out("127.0.0.1:80"), direct, RuleOutLoopback},
		{"absent, LO 6 stays", both(include("::1/128")), out("[::1]:80"), direct, RuleOutLoopback},
		{"present for 0.0.0.0/0", both(include("0.0.0.0/0", "::/0")), out("127.0.0.2:80"), direct, RuleOutLocal},
		{"present for 126.0.0.0/7", both(include("126.0.0.0/7")), out("127.0.0.2:80"), direct, RuleOutLocal},
		{"present for ::/127", both(include("::/127")), out("[::1]:80"), direct, RuleOutLocal},

		// [out-proxy] and the gid's rules
		{"proxy 4", plainPolicy, out("192.0.2.1:80", uid(proxy)), direct, RuleOutProxy},
		{"proxy 6", plainPolicy, out("[2001:db8::1]:80", uid(proxy)), direct, RuleOutProxy},
		{"proxy before DNS", both(dns), out("192.0.2.1:53", uid(proxy)), direct, RuleOutProxy},
		{"gid 4", plainPolicy, out("192.0.2.1:80", gid(proxy)), direct, RuleOutProxyGID},
		{"gid 6", plainPolicy, out("[2001:db8::1]:80", gid(proxy)), direct, RuleOutProxyGID},
		{"gid before DNS", both(dns), out("192.0.2.1:53", gid(proxy)), direct, RuleOutProxyGID},
		{"gid to self, where [out-local] is absent", both(include("127.0.0.0/8")), out("10.1.1.1:80", gid(proxy)), IN, RuleOutProxyGIDToSelf},
		{"gid to self 6", both(include("::1/128")), out("[fd00::1]:80", gid(proxy)), IN, RuleOutProxyGIDToSelf},
		{"gid to self, LO", both(include("127.0.0.0/8")), out("127.0.0.1:80", gid(proxy)), direct, RuleOutProxyGID},
		{"gid to self, TUN", both(include("127.0.0.0/8")), out("10.1.1.1:15008", gid(proxy)), direct, RuleOutProxyGID},
		{"gid local with DNS", both(dns), out("10.1.1.1:53", gid(proxy)), direct, RuleOutProxyGID},

		// [out-dns]
		{"DNS 4", both(dns), out("192.0.2.1:53"), DNS, RuleOutDNS},
		{"DNS 6", both(dns), out("[2001:db8::1]:53"), DNS, RuleOutDNS},
		{"DNS by LO", both(dns), out("127.0.0.1:53"), DNS, RuleOutDNS},
		{"DNS before excluded CIDR", both(dns, exclude("192.0.2.0/24")), out("192.0.2.1:53"), DNS, RuleOutDNS},
		{"DNS, excluded port", both(dns, excludePorts(53, 53)), out("192.0.2.1:53"), direct, RuleOutExcludePort},
		{"DNS off", plainPolicy, out("192.0.2.1:53"), OUT, RuleOutIncludeCIDR},

		// CIDRs and ports
		{"exclude CIDR", both(exclude("192.0.2.0/24")), out("192.0.2.1:80"), direct, RuleOutExcludeCIDR},
		{"exclude CIDR 6", both(exclude("2001:db8::/32")), out("[2001:db8::1]:80"), direct, RuleOutExcludeCIDR},
		{"exclude CIDR mapped", both(exclude("192.0.2.0/24")), out("[::ffff:192.0.2.1]:80"), direct, RuleOutExcludeCIDR},
		{"exclude ::/0 says nothing of mapped", both(exclude("::/0")), out("[::ffff:192.0.2.1]:80"), OUT, RuleOutIncludeCIDR},
		{"exclude link-local with zone", both(exclude("fe80::/10")), out("[fe80::2%eth0]:80"), direct, RuleOutExcludeCIDR},
		{"exclude wins over a longer include", both(exclude("10.0.0.0/8"), include("10.2.3.4/32")), out("10.2.3.4:80"), direct, RuleOutExcludeCIDR},
		{"exclude wins over a port", both(exclude("10.0.0.0/8"), includePorts(80, 80)), out("10.2.3.4:80"), direct, RuleOutExcludeCIDR},
		{"include port", both(captureNone, includePorts(80, 80)), out("192.0.2.1:80"), OUT, RuleOutIncludePort},
		{"include port 6", both(captureNone, includePorts(80, 80)), out("[2001:db8::1]:80"), OUT, RuleOutIncludePort},
		{"include port before CIDR", both(includePorts(80, 80)), out("192.0.2.1:80"), OUT, RuleOutIncludePort},
		{"include port *", both(captureNone, func(p *Policy) { p.IncludeOutboundPorts = Ports{All: true} }), out("192.0.2.1:7"), OUT, RuleOutIncludePort},
		{"include CIDR", both(include("192.0.2.0/24")), out("192.0.2.1:80"), OUT, RuleOutIncludeCIDR},
		{"include CIDR 6", both(include("2001:db8::/32")), out("[2001:db8::1]:80"), OUT, RuleOutIncludeCIDR},
		{"include CIDR mapped", both(include("192.0.2.0/24")), out("[::ffff:192.0.2.1]:80"), OUT, RuleOutIncludeCIDR},
		{"include CIDR, beside", both(include("192.0.2.0/24")), out("192.0.3.1:80"), direct, RuleOutDefault},
		{"include CIDR, other family", both(include("0.0.0.0/0")), out("[2001:db8::1]:80"), direct, RuleOutDefault},

		// Unspecified destinations
		{"0.0.0.0", plainPolicy, out("0.0.0.0:80"), direct, RuleOutLocal},
		{"::", plainPolicy, out("[::]:80"), direct, RuleOutLocal},
		{"::ffff:0.0.0.0", plainPolicy, out("[::ffff:0.0.0.0]:80"), direct, RuleOutLocal},
		{"0.0.0.0 of the proxy is LO", plainPolicy, out("0.0.0.0:80", uid(proxy)), direct, RuleOutProxy},
		{"0.0.0.0 of the proxy, bound to none", plainPolicy, out("0.0.0.0:80", uid(proxy), from("0.0.0.0")), direct, RuleOutProxy},
		{"0.0.0.0 of the proxy, bound", plainPolicy, out("0.0.0.0:80", uid(proxy), from("10.1.1.1")), IN, RuleOutProxyToSelf},
		{"::ffff:0.0.0.0 of the proxy, bound", plainPolicy, out("[::ffff:0.0.0.0]:80", uid(proxy), from("::ffff:10.1.1.1")), IN, RuleOutProxyToSelf},
		{"0.0.0.0, bound to S6", plainPolicy, out("0.0.0.0:80", uid(proxy), from("127.0.0.6")), direct, RuleOutPassthrough},
		{":: of the proxy, bound: ::1 all the same", plainPolicy, out("[::]:80", uid(proxy), from("fd00::1")), direct, RuleOutProxy},
		{"0.0.0.0 where [out-local] is absent", both(include("127.0.0.0/8")), out("0.0.0.0:80"), direct, RuleOutLoopback},

		// UDP
		{"UDP DNS 4", both(dns), out("192.0.2.1:53", udp), DNS, RuleOutDNS},
		{"UDP DNS 6", both(dns), out("[2001:db8::1]:53", udp), DNS, RuleOutDNS},
		{"UDP DNS mapped", both(dns), out("[::ffff:192.0.2.1]:53", udp), DNS, RuleOutDNS},
		{"UDP DNS by LO", both(dns), out("127.0.0.1:53", udp), DNS, RuleOutDNS},
		{"UDP DNS excluded port", both(dns, excludePorts(53, 53)), out("192.0.2.1:53", udp), direct, RuleOutExcludePort},
		{"UDP DNS excluded interface", both(dns, excludeIf("eth1"), excludePorts(53, 53)), out("192.0.2.1:53", udp, by("eth1")), direct, RuleOutExcludeInterface},
		{"UDP DNS passthrough", both(dns), out("10.1.1.1:53", udp, from("127.0.0.6")), direct, RuleOutPassthrough},
		{"UDP DNS proxy", both(dns), out("192.0.2.1:53", udp, uid(proxy)), direct, RuleOutProxy},
		{"UDP DNS with the gid alone", both(dns), out("192.0.2.1:53", udp, gid(proxy)), DNS, RuleOutDNS},
		{"UDP DNS excluded CIDR", both(dns, exclude("192.0.2.0/24")), out("192.0.2.1:53", udp), DNS, RuleOutDNS},
		{"UDP 53, no capture", plainPolicy, out("192.0.2.1:53", udp), direct, RuleOutDefault},
		{"UDP 53 local, no capture", plainPolicy, out("10.1.1.1:53", udp), direct, RuleOutDefault},
		{"UDP else", both(dns, excludePorts(80, 80), includePorts(81, 81)), out("192.0.2.1:80", udp), direct, RuleOutDefault},
		{"UDP else, included", both(dns, includePorts(81, 81)), out("192.0.2.1:81", udp), direct, RuleOutDefault},
		{"UDP else, proxy to self", both(dns), out("10.1.1.1:80", udp, uid(proxy)), direct, RuleOutDefault},
		{"another protocol", both(dns), out("192.0.2.1:53", func(f *Flow) { f.Proto = 7 }), direct, RuleOutDefault},

		// Inbound
		{"in 4", plainPolicy, in("10.1.1.1:8080"), IN, RuleInInclude},
		{"in 6", plainPolicy, in("[fd00::1]:8080"), IN, RuleInInclude},
		{"in another port", plainPolicy, in("10.1.1.1:8081"), direct, RuleInDefault},
		{"in 6 another port", plainPolicy, in("[fd00::1]:8081"), direct, RuleInDefault},
		{"in *", both(inboundAll), in("10.1.1.1:8081"), IN, RuleInInclude},
		{"in * 6", both(inboundAll), in("[fd00::1]:8081"), IN, RuleInInclude},
		{"in excluded", both(inboundAll), in("10.1.1.1:15021"), direct, RuleInExcludePort},
		{"in excluded 6", both(inboundAll), in("[fd00::1]:15020"), direct, RuleInExcludePort},
		{"in excluded, without *", both(func(p *Policy) { p.ExcludeInboundPorts = ports(8080, 8080) }), in("10.1.1.1:8080"), IN, RuleInInclude},
		{"in tunnel", both(inboundAll), in("10.1.1.1:15008"), direct, RuleInTunnel},
		{"in tunnel 6, listed", both(func(p *Policy) { p.IncludeInboundPorts = Ports{Ranges: ports(1, 65535)} }), in("[fd00::1]:15008"), direct, RuleInTunnel},
		{"in tunnel, another port", both(inboundAll, func(p *Policy) { p.Proxy.TunnelPort = 1 }), in("10.1.1.1:15008"), IN, RuleInInclude},
		{"in interface", both(inboundAll, excludeIf("net1")), in("10.1.1.1:15008", by("net1")), direct, RuleInExcludeInterface},
		{"in interface, another", both(inboundAll, excludeIf("net1")), in("10.1.1.1:80"), IN, RuleInInclude},
		{"in interface, unknown", both(inboundAll, excludeIf("net1")), in("10.1.1.1:80", by("")), IN, RuleInInclude},
		{"in reroute *", both(reroute("vif0")), in("192.0.2.1:80", by("vif0")), OUT, RuleInReroute},
		{"in reroute * 6", both(reroute("vif0")), in("[2001:db8::1]:80", by("vif0")), OUT, RuleInReroute},
		{"in reroute, CIDR", both(reroute("vif0"), include("192.0.2.0/24")), in("192.0.2.1:80", by("vif0")), OUT, RuleInReroute},
		{"in reroute, no CIDR", both(reroute("vif0"), include("192.0.2.0/24"), inboundAll), in("192.0.3.1:80", by("vif0")), direct, RuleInReroute},
		{"in reroute, excludes are not asked", both(reroute("vif0"), exclude("192.0.2.0/24"), excludePorts(80, 80)), in("192.0.2.1:80", by("vif0")), OUT, RuleInReroute},
		{"in reroute before interface, tunnel", both(reroute("vif0"), excludeIf("vif0")), in("192.0.2.1:15008", by("vif0")), OUT, RuleInReroute},
		{"in by lo", both(inboundAll), in("10.1.1.1:80", by("lo")), direct, RuleInDefault},
		{"in by lo, rerouted", both(reroute("lo"), inboundAll), in("10.1.1.1:80", by("lo")), direct, RuleInDefault},
		{"in from the proxy's ids", both(inboundAll), in("10.1.1.1:80", uid(proxy), gid(proxy)), IN, RuleInInclude},
		{"in UDP", both(inboundAll, dns), in("10.1.1.1:53", udp), direct, RuleInDefault},
		{"in TPROXY", both(inboundAll, func(p *Policy) { p.Mode = ModeTProxy }), in("10.1.1.1:80"), IN, RuleInInclude},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := Decision{tc.verdict, tc.rule}
			got := tc.policy.Decide(tc.flow)
			if got != want {
				t.Errorf("Decide = %v by [%v], want %v by [%v]", got.Verdict, got.Rule, want.Verdict, want.Rule)
			}
		})
	}
}

func TestRules(t *testing.T) {
	// The numbers are an interface: to change a line here is to change the
	// BPF programs and the counters.
	want := []string{
		1: "outbound out-exclude-interface", 2: "outbound out-exclude-port", 3: "outbound out-passthrough",
		4: "outbound out-proxy-to-self", 5: "outbound out-local", 6: "outbound out-proxy",
		7: "outbound out-proxy-gid-to-self", 8: "outbound out-proxy-gid-local", 9: "outbound out-proxy-gid",
		10: "outbound out-dns", 11: "outbound out-loopback", 12: "outbound out-exclude-cidr",
		13: "outbound out-include-port", 14: "outbound out-include-cidr", 15: "outbound out-default",
		16: "inbound in-reroute", 17: "inbound in-exclude-interface", 18: "inbound in-tunnel",
		19: "inbound in-exclude-port", 20: "inbound in-include", 21: "inbound in-default",
	}
	got := make([]string, 1)
	for i, r := range AllRules() {
		if int(r) != i+1 {
			t.Errorf("rule %v has number %d, want %d", r, r, i+1)
		}
		got = append(got, fmt.Sprintf("%v %v", r.Direction(), r))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("rules (-want +got):\n%s", diff)
	}

	// The evaluator's tables are in that order too, and complete.
	var rows []Rule
	for _, r := range outbound {
		rows = append(rows, r.rule)
	}
	rows = append(rows, RuleOutDefault)
	for _, r := range inbound {
		rows = append(rows, r.rule)
	}
	rows = append(rows, RuleInDefault)
	if diff := cmp.Diff(AllRules(), slices.Compact(rows)); diff != "" {
		t.Errorf("tables (-want +got):\n%s", diff)
	}
}

func TestNames(t *testing.T) {
	got := []string{
		VerdictDirect.String(), VerdictOutbound.String(), VerdictInbound.String(), VerdictDNS.String(),
		Verdict(0).String(), Verdict(9).String(), Rule(0).String(), ruleEnd.String(), TCP.String(), UDP.String(),
	}
	want := []string{"direct", "OUT", "IN", "DNS", "verdict(0)", "verdict(9)", "rule(0)", "rule(22)", "tcp", "udp"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}

// random is a source of policies and flows from small sets, so that they meet.
type random struct{ *rand.Rand }

func pick[T any](r random, of ...T) T { return of[r.IntN(len(of))] }

func some[T any](r random, of ...T) []T {
	var out []T
	for _, v := range of {
		if r.IntN(4) == 0 {
			out = append(out, v)
		}
	}
	return out
}

var (
	somePorts    = []uint16{0, 1, 53, 80, 8080, 15001, 15006, 15008, 15020, 65535}
	someAddrs    = []string{"127.0.0.1", "127.0.0.6", "127.0.0.2", "10.1.1.1", "10.2.2.2", "192.0.2.1", "0.0.0.0", "::", "::1", "::6", "fd00::1", "2001:db8::1", "fe80::1"}
	somePrefixes = []string{"0.0.0.0/0", "10.0.0.0/8", "10.1.1.0/24", "127.0.0.0/8", "127.0.0.1/32", "192.0.2.1/32", "::/0", "::1/128", "::/120", "fd00::/8", "2001:db8::/32"}
	someNames    = []string{"lo", "eth0", "net1"}
)

func (r random) policy() *Policy {
	ranges := func() []PortRange {
		var out []PortRange
		for _, p := range some(r, somePorts...) {
			out = append(out, PortRange{p, p})
		}
		return out
	}
	return defaults(func(p *Policy) {
		p.IncludeOutbound = Prefixes{All: r.IntN(2) == 0, List: prefixes(some(r, somePrefixes...)...)}
		p.ExcludeOutbound = prefixes(some(r, somePrefixes...)...)
		p.IncludeInboundPorts = Ports{All: r.IntN(2) == 0, Ranges: ranges()}
		p.ExcludeInboundPorts = ranges()
		p.IncludeOutboundPorts = Ports{All: r.IntN(4) == 0, Ranges: ranges()}
		p.ExcludeOutboundPorts = ranges()
		p.ExcludeInterfaces = some(r, someNames...)
		p.RerouteInterfaces = some(r, someNames...)
		p.DNSCapture = r.IntN(2) == 0
	})
}

func (r random) addr() netip.Addr {
	a := netip.MustParseAddr(pick(r, someAddrs...))
	switch r.IntN(6) {
	case 0:
		if a.Is4() {
			return netip.AddrFrom16(a.As16())
		}
		return a.WithZone("eth0")
	case 1:
		if r.IntN(4) == 0 {
			return netip.Addr{}
		}
	}
	return a
}

func (r random) flow() Flow {
	return Flow{
		Direction: pick(r, Outbound, Inbound),
		Proto:     pick(r, TCP, TCP, TCP, UDP, Proto(2)),
		Src:       pick(r, netip.Addr{}, r.addr()),
		Dst:       netip.AddrPortFrom(r.addr(), pick(r, somePorts...)),
		UID:       pick[uint32](r, app, proxy, NoOwner),
		GID:       pick[uint32](r, app, proxy, NoOwner),
		Interface: pick(r, append(someNames, "", "")...),
		PodAddrs:  pick(r, nil, podAddrs),
	}
}

// TestDecideProperties checks what holds of every flow under every policy.
func TestDecideProperties(t *testing.T) {
	verdicts := map[Rule][]Verdict{
		RuleOutProxyToSelf: {VerdictInbound}, RuleOutProxyGIDToSelf: {VerdictInbound},
		RuleOutDNS:         {VerdictDNS},
		RuleOutIncludePort: {VerdictOutbound}, RuleOutIncludeCIDR: {VerdictOutbound},
		RuleInReroute: {VerdictOutbound, VerdictDirect},
		RuleInInclude: {VerdictInbound},
	}
	udpRules := []Rule{RuleOutExcludeInterface, RuleOutExcludePort, RuleOutPassthrough, RuleOutProxy, RuleOutDNS, RuleOutDefault, RuleInDefault}
	seen := map[Rule]bool{RuleOutProxyGIDLocal: true} // which is never reached

	r := random{rand.New(rand.NewPCG(1, 2))}
	for range 20_000 {
		p, f := r.policy(), r.flow()
		d := p.Decide(f)
		seen[d.Rule] = true
		allowed, ok := verdicts[d.Rule]
		if !ok {
			allowed = []Verdict{VerdictDirect}
		}
		mapped := f
		if f.Dst.Addr().Is4() {
			mapped.Dst = netip.AddrPortFrom(netip.AddrFrom16(f.Dst.Addr().As16()), f.Dst.Port())
		}
		var broken string
		switch {
		case d.Rule == 0 || d.Rule >= ruleEnd:
			broken = "there is no such rule"
		case d.Rule.Direction() != f.Direction:
			broken = "the rule is of the other direction"
		case !slices.Contains(allowed, d.Verdict):
			broken = "the rule does not give that verdict"
		case d.Rule != RuleInReroute && d.Verdict != d.Rule.Verdict():
			broken = fmt.Sprintf("the rule says its verdict is %v", d.Rule.Verdict())
		case d.Rule == RuleOutProxyGIDLocal:
			broken = "[out-local] comes before its twin"
		case f.Proto != TCP && !slices.Contains(udpRules, d.Rule):
			broken = "the rule is not for UDP"
		case f.Proto != TCP && d.Verdict != VerdictDirect && (f.Proto != UDP || f.Dst.Port() != 53 || !p.DNSCapture):
			broken = "only captured DNS is touched"
		case f.Direction == Outbound && f.UID == proxy && d.Verdict != VerdictDirect && d.Verdict != VerdictInbound:
			broken = "the proxy is sent to itself: a loop"
		case f.Direction == Outbound && f.Proto == TCP && f.GID == proxy && (d.Verdict == VerdictOutbound || d.Verdict == VerdictDNS):
			broken = "the proxy is sent to itself: a loop"
		case f.Direction == Inbound && f.Interface == "lo" && d.Verdict != VerdictDirect:
			broken = "what arrives by lo is not inbound"
		case p.Decide(mapped) != d:
			broken = "an IPv4-mapped destination follows the IPv4 rules"
		}
		if broken != "" {
			t.Fatalf("%s: Decide = %v by [%v]\nflow %+v\npolicy %+v", broken, d.Verdict, d.Rule, f, p)
		}
	}
	for _, rule := range AllRules() {
		if !seen[rule] {
			t.Errorf("no random flow met [%v]: the test is blind there", rule)
		}
	}
}
