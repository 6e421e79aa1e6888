// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range list {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

// ports makes ranges of pairs of first and last.
func ports(pairs ...uint16) []PortRange {
	var out []PortRange
	for pair := range slices.Chunk(pairs, 2) {
		out = append(out, PortRange{pair[0], pair[1]})
	}
	return out
}

// defaults is the Policy of meshed().
func defaults(edits ...func(*Policy)) *Policy {
	p := &Policy{
		Mode:                ModeRedirect,
		Proxy:               DefaultConfig().Proxy,
		IncludeOutbound:     Prefixes{All: true},
		IncludeInboundPorts: Ports{Ranges: ports(8080, 8080)},
		HostUsers:           true,
	}
	for _, edit := range edits {
		edit(p)
	}
	return p
}

func TestPolicy(t *testing.T) {
	own := ports(15020, 15021, 15090, 15090)
	for _, tc := range []struct {
		name string
		edit func(*Pod)
		want func(*Policy)
	}{
		{"defaults", func(*Pod) {}, func(*Policy) {}},
		{"mode REDIRECT", annotate(keyMode, "REDIRECT"), func(*Policy) {}},
		{"mode TPROXY", annotate(keyMode, "TPROXY"), func(p *Policy) { p.Mode = ModeTProxy }},

		{"include CIDR *", annotate(keyIncludeOutboundRanges, " * "), func(*Policy) {}},
		{"include CIDR empty", annotate(keyIncludeOutboundRanges, ""), func(p *Policy) { p.IncludeOutbound = Prefixes{} }},
		{"include CIDR spaces", annotate(keyIncludeOutboundRanges, "  "), func(p *Policy) { p.IncludeOutbound = Prefixes{} }},
		{"include CIDR forms", annotate(keyIncludeOutboundRanges, "fd00::7/8, 10.1.2.3/8 ,10.0.0.0/8,192.0.2.1,2001:db8::1,::/0,0.0.0.0/0"), func(p *Policy) {
			p.IncludeOutbound = Prefixes{List: prefixes("0.0.0.0/0", "10.0.0.0/8", "192.0.2.1/32", "::/0", "2001:db8::1/128", "fd00::/8")}
		}},
		{"include CIDR mapped", annotate(keyIncludeOutboundRanges, "::ffff:10.1.2.3/104,::ffff:192.0.2.1,::ffff:0:0/96,::ffff:10.0.0.0/104"), func(p *Policy) {
			p.IncludeOutbound = Prefixes{List: prefixes("0.0.0.0/0", "10.0.0.0/8", "192.0.2.1/32")}
		}},
		{"include CIDR shorter than mapped", annotate(keyIncludeOutboundRanges, "::ffff:0:0/95"), func(p *Policy) {
			p.IncludeOutbound = Prefixes{List: prefixes("::fffe:0:0/95")}
		}},
		{"exclude CIDR", annotate(keyExcludeOutboundRanges, "10.0.0.1"), func(p *Policy) { p.ExcludeOutbound = prefixes("10.0.0.1/32") }},
		{"exclude CIDR empty", annotate(keyExcludeOutboundRanges, ""), func(*Policy) {}},

		{"inbound *", annotate(keyIncludeInboundPorts, "*"), func(p *Policy) {
			p.IncludeInboundPorts, p.ExcludeInboundPorts = Ports{All: true}, own
		}},
		{"inbound empty", annotate(keyIncludeInboundPorts, ""), func(p *Policy) { p.IncludeInboundPorts = Ports{} }},
		{"inbound list", annotate(keyIncludeInboundPorts, "443, 80,8000-8100 ,81-90,8050-8200,1,65535"), func(p *Policy) {
			p.IncludeInboundPorts = Ports{Ranges: ports(1, 1, 80, 90, 443, 443, 8000, 8200, 65535, 65535)}
		}},
		{"inbound all by range is no *", annotate(keyIncludeInboundPorts, "2-65535,1"), func(p *Policy) {
			p.IncludeInboundPorts = Ports{Ranges: ports(1, 65535)}
		}},
		{"inbound exclude without *", annotate(keyExcludeInboundPorts, "8080"), func(*Policy) {}},
		{"inbound exclude with *", func(p *Pod) {
			annotate(keyIncludeInboundPorts, "*")(p)
			annotate(keyExcludeInboundPorts, "22,15019,15022-15030")(p)
		}, func(p *Policy) {
			p.IncludeInboundPorts, p.ExcludeInboundPorts = Ports{All: true}, ports(22, 22, 15019, 15030, 15090, 15090)
		}},

		{"containerPorts", func(p *Pod) {
			p.Containers[0].Ports = []ContainerPort{{9090, "TCP"}, {9091, ""}, {53, "UDP"}, {54, "SCTP"}}
			initContainers(Container{Name: "log", RestartPolicy: "Always", Ports: []ContainerPort{{7000, ""}}},
				Container{Name: "setup", Ports: []ContainerPort{{7001, ""}}})(p)
		}, func(p *Policy) { p.IncludeInboundPorts = Ports{Ranges: ports(7000, 7000, 9090, 9091)} }},
		{"containerPorts beside a native sidecar", nativeSidecar, func(*Policy) {}},
		{"no containerPorts", func(p *Pod) { p.Containers[0].Ports = nil }, func(p *Policy) { p.IncludeInboundPorts = Ports{} }},

		{"outbound ports", annotate(keyIncludeOutboundPorts, "3306"), func(p *Policy) { p.IncludeOutboundPorts = Ports{Ranges: ports(3306, 3306)} }},
		{"outbound ports *", annotate(keyIncludeOutboundPorts, "*"), func(p *Policy) { p.IncludeOutboundPorts = Ports{All: true} }},
		{"outbound ports empty", annotate(keyIncludeOutboundPorts, ""), func(*Policy) {}},
		{"exclude outbound ports", annotate(keyExcludeOutboundPorts, "1-65535"), func(p *Policy) { p.ExcludeOutboundPorts = ports(1, 65535) }},

		{"interfaces", annotate(keyExcludeInterfaces, "eth1, net1.100 ,eth1,0_a-b,abcdefghijklmno"), func(p *Policy) {
			p.ExcludeInterfaces = []string{"0_a-b", "abcdefghijklmno", "eth1", "net1.100"}
		}},
		{"interfaces empty", annotate(keyExcludeInterfaces, ""), func(*Policy) {}},
		{"reroute", annotate(keyRerouteInterfaces, "vif0"), func(p *Policy) { p.RerouteInterfaces = []string{"vif0"} }},
		{"kubevirt", annotate(keyKubevirtInterfaces, "vif1"), func(p *Policy) { p.RerouteInterfaces = []string{"vif1"} }},
		{"reroute before kubevirt", func(p *Pod) {
			annotate(keyRerouteInterfaces, "vif0")(p)
			annotate(keyKubevirtInterfaces, "vif1")(p)
		}, func(p *Policy) { p.RerouteInterfaces = []string{"vif0"} }},
		{"reroute, empty, before kubevirt", func(p *Pod) {
			annotate(keyRerouteInterfaces, "")(p)
			annotate(keyKubevirtInterfaces, "vif1")(p)
		}, func(*Policy) {}},

		{"DNS capture", proxyEnv(keyDNSCapture, "true"), func(p *Policy) { p.DNSCapture = true }},
		{"DNS capture off", proxyEnv(keyDNSCapture, "0"), func(*Policy) {}},
		{"DNS capture by valueFrom", proxyEnv(keyDNSCapture, ""), func(*Policy) {}},
		{"DNS capture of the app", func(p *Pod) { p.Containers[0].Env = []EnvVar{{keyDNSCapture, "true"}} }, func(*Policy) {}},
		{"invalid drop", proxyEnv(keyInvalidDrop, "1"), func(p *Policy) { p.InvalidDrop = true }},
		{"of a native sidecar", func(p *Pod) {
			proxyEnv(keyDNSCapture, "t")(p)
			p.Containers[1].SecurityContext = &SecurityContext{RunAsUser: ptr[int64](7)}
			nativeSidecar(p)
		}, func(p *Policy) { p.DNSCapture, p.Proxy.UID = true, 7 }},

		{"ids", func(p *Pod) {
			p.Containers[1].SecurityContext = &SecurityContext{RunAsUser: ptr[int64](1500), RunAsGroup: ptr[int64](1<<32 - 2)}
		}, func(p *Policy) { p.Proxy.UID, p.Proxy.GID = 1500, 1<<32-2 }},
		{"ids of zero", func(p *Pod) {
			p.Containers[1].SecurityContext = &SecurityContext{RunAsUser: ptr[int64](0), RunAsGroup: ptr[int64](0)}
		}, func(*Policy) {}},
		{"ids of none", func(p *Pod) { p.Containers[1].SecurityContext = &SecurityContext{} }, func(*Policy) {}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := DefaultConfig()
			checkEvaluate(t, &c, meshed(tc.edit))
			_, got, err := c.Evaluate(meshed(tc.edit))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(defaults(tc.want), got, netips); diff != "" {
				t.Errorf("Evaluate (-want +got):\n%s", diff)
			}
		})
	}
}

func TestPolicyFromConfig(t *testing.T) {
	c := DefaultConfig()
	c.IncludeInboundPortsDefault = InboundAll
	c.ProxyExcludeInboundPorts = []uint16{9, 8, 65535}
	c.Proxy = Proxy{UID: 1, GID: 2, OutboundPort: 3, InboundPort: 4, TunnelPort: 5, DNSPort: 6}
	_, got, err := c.Evaluate(meshed())
	if err != nil {
		t.Fatal(err)
	}
	want := defaults(func(p *Policy) {
		p.Proxy = c.Proxy
		p.IncludeInboundPorts, p.ExcludeInboundPorts = Ports{All: true}, ports(8, 9, 65535, 65535)
	})
	if diff := cmp.Diff(want, got, netips); diff != "" {
		t.Errorf("Evaluate (-want +got):\n%s", diff)
	}

	// One Config serves many pods: it must not be written to.
	if diff := cmp.Diff([]uint16{9, 8, 65535}, c.ProxyExcludeInboundPorts); diff != "" {
		t.Errorf("Evaluate changed the Config (-want +got):\n%s", diff)
	}
}

// TestInputErrors holds the texts that operators see.
func TestInputErrors(t *testing.T) {
	const (
		port  = "to be a port (1-65535) or a range such as 8000-8100"
		cidr  = "to be a CIDR such as 10.0.0.0/8 or fd00::/8, or an IP address"
		iface = "to be an interface name (1-15 letters, digits, _ . -, a letter or digit first)"
		star  = "; or a lone *"
		pre   = "traffic.sidecar.istio.io/"
	)
	long := strings.Repeat("1,", 100) + "x"
	ids := func(uid, gid *int64) func(*Pod) {
		return func(p *Pod) { p.Containers[1].SecurityContext = &SecurityContext{uid, gid} }
	}
	for _, tc := range []struct {
		edit func(*Pod)
		want string
	}{
		{annotate(keyMode, ""), `sidecar.istio.io/interceptionMode: value "": expected REDIRECT, TPROXY or NONE`},
		{annotate(keyMode, "none"), `sidecar.istio.io/interceptionMode: value "none": expected REDIRECT, TPROXY or NONE`},

		{annotate(keyIncludeInboundPorts, ","), pre + `includeInboundPorts: value ",": expected item 1, "", ` + port + star},
		{annotate(keyIncludeInboundPorts, "80,"), pre + `includeInboundPorts: value "80,": expected item 2, "", ` + port + star},
		{annotate(keyIncludeInboundPorts, "80,*"), pre + `includeInboundPorts: value "80,*": expected item 2, "*", ` + port + star},
		{annotate(keyIncludeInboundPorts, "**"), pre + `includeInboundPorts: value "**": expected item 1, "**", ` + port + star},
		{annotate(keyExcludeInboundPorts, "*"), pre + `excludeInboundPorts: value "*": expected item 1, "*", ` + port},
		{annotate(keyExcludeInboundPorts, "80,,81"), pre + `excludeInboundPorts: value "80,,81": expected item 2, "", ` + port},
		{annotate(keyIncludeOutboundPorts, "0"), pre + `includeOutboundPorts: value "0": expected item 1, "0", ` + port + star},
		{annotate(keyExcludeOutboundPorts, "65536"), pre + `excludeOutboundPorts: value "65536": expected item 1, "65536", ` + port},
		{annotate(keyExcludeOutboundPorts, "99999999999999999999"), pre + `excludeOutboundPorts: value "99999999999999999999": expected item 1, "99999999999999999999", ` + port},
		{annotate(keyExcludeOutboundPorts, "*"), pre + `excludeOutboundPorts: value "*": expected item 1, "*", ` + port},
		{annotate(keyExcludeOutboundPorts, "080"), pre + `excludeOutboundPorts: value "080": expected item 1, "080", ` + port},
		{annotate(keyExcludeOutboundPorts, "+80"), pre + `excludeOutboundPorts: value "+80": expected item 1, "+80", ` + port},
		{annotate(keyExcludeOutboundPorts, "-80"), pre + `excludeOutboundPorts: value "-80": expected item 1, "-80", ` + port},
		{annotate(keyExcludeOutboundPorts, "80-"), pre + `excludeOutboundPorts: value "80-": expected item 1, "80-", ` + port},
		{annotate(keyExcludeOutboundPorts, "8 0"), pre + `excludeOutboundPorts: value "8 0": expected item 1, "8 0", ` + port},
		{annotate(keyExcludeOutboundPorts, "1_0"), pre + `excludeOutboundPorts: value "1_0": expected item 1, "1_0", ` + port},
		{annotate(keyExcludeOutboundPorts, "80 81"), pre + `excludeOutboundPorts: value "80 81": expected item 1, "80 81", ` + port},
		{annotate(keyExcludeOutboundPorts, "80\n"), pre + `excludeOutboundPorts: value "80\n": expected item 1, "80\n", ` + port},
		{annotate(keyExcludeOutboundPorts, "80 - 90"), pre + `excludeOutboundPorts: value "80 - 90": expected item 1, "80 - 90", ` + port},
		{annotate(keyExcludeOutboundPorts, "90-80"), pre + `excludeOutboundPorts: value "90-80": expected item 1, "90-80", ` + port},
		{annotate(keyExcludeOutboundPorts, "1-2-3"), pre + `excludeOutboundPorts: value "1-2-3": expected item 1, "1-2-3", ` + port},
		{annotate(keyExcludeOutboundPorts, "0-80"), pre + `excludeOutboundPorts: value "0-80": expected item 1, "0-80", ` + port},
		{annotate(keyExcludeOutboundPorts, "http"), pre + `excludeOutboundPorts: value "http": expected item 1, "http", ` + port},
		{annotate(keyExcludeOutboundPorts, "٨٠"), pre + `excludeOutboundPorts: value "٨٠": expected item 1, "٨٠", ` + port},
		{annotate(keyExcludeOutboundPorts, long), pre + `excludeOutboundPorts: value "` + long[:128] + `"... (201 bytes): expected item 101, "x", ` + port},

		{annotate(keyIncludeOutboundRanges, "10.0.0.0/33"), pre + `includeOutboundIPRanges: value "10.0.0.0/33": expected item 1, "10.0.0.0/33", ` + cidr + star},
		{annotate(keyIncludeOutboundRanges, "*,10.0.0.0/8"), pre + `includeOutboundIPRanges: value "*,10.0.0.0/8": expected item 1, "*", ` + cidr + star},
		{annotate(keyExcludeOutboundRanges, "*"), pre + `excludeOutboundIPRanges: value "*": expected item 1, "*", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "10.0.0.0/8,,"), pre + `excludeOutboundIPRanges: value "10.0.0.0/8,,": expected item 2, "", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "10.0.0.0/08"), pre + `excludeOutboundIPRanges: value "10.0.0.0/08": expected item 1, "10.0.0.0/08", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "10.0.0/8"), pre + `excludeOutboundIPRanges: value "10.0.0/8": expected item 1, "10.0.0/8", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "010.0.0.1"), pre + `excludeOutboundIPRanges: value "010.0.0.1": expected item 1, "010.0.0.1", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "10.0.0.0 /8"), pre + `excludeOutboundIPRanges: value "10.0.0.0 /8": expected item 1, "10.0.0.0 /8", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "fe80::1%eth0"), pre + `excludeOutboundIPRanges: value "fe80::1%eth0": expected item 1, "fe80::1%eth0", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "fe80::1%eth0/64"), pre + `excludeOutboundIPRanges: value "fe80::1%eth0/64": expected item 1, "fe80::1%eth0/64", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "::1/129"), pre + `excludeOutboundIPRanges: value "::1/129": expected item 1, "::1/129", ` + cidr},
		{annotate(keyExcludeOutboundRanges, "example.com"), pre + `excludeOutboundIPRanges: value "example.com": expected item 1, "example.com", ` + cidr},

		{annotate(keyExcludeInterfaces, "*"), pre + `excludeInterfaces: value "*": expected item 1, "*", ` + iface},
		{annotate(keyExcludeInterfaces, "eth0,"), pre + `excludeInterfaces: value "eth0,": expected item 2, "", ` + iface},
		{annotate(keyExcludeInterfaces, "-j"), pre + `excludeInterfaces: value "-j": expected item 1, "-j", ` + iface},
		{annotate(keyExcludeInterfaces, "eth+"), pre + `excludeInterfaces: value "eth+": expected item 1, "eth+", ` + iface},
		{annotate(keyExcludeInterfaces, ".."), pre + `excludeInterfaces: value "..": expected item 1, "..", ` + iface},
		{annotate(keyExcludeInterfaces, "abcdefghijklmnop"), pre + `excludeInterfaces: value "abcdefghijklmnop": expected item 1, "abcdefghijklmnop", ` + iface},
		{annotate(keyExcludeInterfaces, "eth0 -j"), pre + `excludeInterfaces: value "eth0 -j": expected item 1, "eth0 -j", ` + iface},
		{annotate(keyExcludeInterfaces, "eth0\n"), pre + `excludeInterfaces: value "eth0\n": expected item 1, "eth0\n", ` + iface},
		{annotate(keyExcludeInterfaces, "ethé"), pre + `excludeInterfaces: value "ethé": expected item 1, "ethé", ` + iface},
		{annotate(keyRerouteInterfaces, "a/b"), `istio.io/reroute-virtual-interfaces: value "a/b": expected item 1, "a/b", ` + iface},
		{annotate(keyKubevirtInterfaces, "!a"), pre + `kubevirtInterfaces: value "!a": expected item 1, "!a", ` + iface},
		{func(p *Pod) { // unused, and wrong all the same
			annotate(keyRerouteInterfaces, "a")(p)
			annotate(keyKubevirtInterfaces, "!a")(p)
		}, pre + `kubevirtInterfaces: value "!a": expected item 1, "!a", ` + iface},

		{proxyEnv(keyDNSCapture, "yes"), `ISTIO_META_DNS_CAPTURE: value "yes": expected true or false, in the environment of container "istio-proxy"`},
		{proxyEnv(keyInvalidDrop, "$(X)"), `INVALID_DROP: value "$(X)": expected true or false, in the environment of container "istio-proxy"`},
		{ids(ptr[int64](-1), nil), `securityContext.runAsUser: value "-1": expected 0 to 4294967294, in container "istio-proxy"`},
		{ids(nil, ptr[int64](1<<32-1)), `securityContext.runAsGroup: value "4294967295": expected 0 to 4294967294, in container "istio-proxy"`},
		{func(p *Pod) { p.Containers[0].Ports = []ContainerPort{{70000, ""}} }, `containerPort: value "70000": expected 1 to 65535, in container "app"`},

		{func(p *Pod) { // the first in the table's order
			annotate(keyExcludeInterfaces, "*")(p)
			annotate(keyExcludeOutboundRanges, "x")(p)
			proxyEnv(keyDNSCapture, "x")(p)
		}, pre + `excludeOutboundIPRanges: value "x": expected item 1, "x", ` + cidr},
	} {
		c := DefaultConfig()
		_, p, err := c.Evaluate(meshed(tc.edit))
		var input *InputError
		if p != nil || !errors.As(err, &input) {
			t.Errorf("Evaluate = %+v, %v; want: %s", p, err, tc.want)
			continue
		}
		if diff := cmp.Diff(tc.want, err.Error()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}

	c := DefaultConfig()
	c.IncludeInboundPortsDefault = "all"
	_, _, err := c.Evaluate(meshed())
	if diff := cmp.Diff(&InputError{Key: "includeInboundPortsDefault", Value: "all", Want: "containerPorts or *"}, err); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// fuzzList checks that what is accepted comes out the same when it is written
// again, and that what is refused names its key.
func fuzzList[T comparable](f *testing.F, g grammar[T], format func(T) string, seeds ...string) {
	for _, s := range append(seeds, "", " ", ",", ",,", "*", " * ", "*,*", "\x00", "a,b") {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		list, all, err := parseList("key", value, g, withWildcard)
		if err != nil {
			var input *InputError
			if !errors.As(err, &input) || input.Key != "key" || input.Value != value || input.Want == "" || list != nil || all {
				t.Fatalf("parseList(%q) = %v, %v, %v", value, list, all, err)
			}
			return
		}
		if all {
			if list != nil || strings.Trim(value, " ") != "*" {
				t.Fatalf("parseList(%q) = %v, all", value, list)
			}
			return
		}
		var text []string
		for _, v := range list {
			text = append(text, format(v))
		}
		again, _, err := parseList("key", strings.Join(text, " , "), g, noWildcard)
		if err != nil || !slices.Equal(list, again) {
			t.Fatalf("parseList(%q) = %v, written again %v, %v", value, list, again, err)
		}
	})
}

func FuzzPorts(f *testing.F) {
	fuzzList(f, portList, func(r PortRange) string {
		checked := mergeRanges([]PortRange{r, {1, 1}})
		if !containsPort(checked, r.First) || !containsPort(checked, r.Last) || r.First == 0 {
			return "lost"
		}
		return strings.Join([]string{itoa(r.First), itoa(r.Last)}, "-")
	}, "80", "80,443", "8000-8100", "1-65535", "08", "+1", "1-", "65536")
}

func FuzzPrefixes(f *testing.F) {
	fuzzList(f, prefixList, func(p netip.Prefix) string {
		if p != p.Masked() || p.Addr().Is4In6() && p.Bits() >= 96 || p.Addr().Zone() != "" {
			return "not normal"
		}
		return p.String()
	}, "10.0.0.0/8", "10.1.2.3/8,fd00::1", "::ffff:1.2.3.4/120", "::ffff:0:0/95", "fe80::1%eth0", "0.0.0.0/0,::/0")
}

func FuzzInterfaces(f *testing.F) {
	fuzzList(f, interfaceList, func(s string) string {
		if len(s) == 0 || len(s) > 15 || strings.ContainsAny(s, " ,\t\n\x00/:*+!\"'\\;&|$`") || strings.ContainsAny(s[:1], "-._") {
			return "not a name\n"
		}
		return s
	}, "eth0", "eth0,net1.100", "-j", "..", "a_b-c", "0123456789abcde", "0123456789abcdef")
}

func itoa(n uint16) string { return strconv.Itoa(int(n)) }
