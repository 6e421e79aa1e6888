// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// The annotations that tests set.
const (
	includeRanges  = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	excludeRanges  = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	includePorts   = "traffic.sidecar.istio.io/includeOutboundPorts"
	excludePorts   = "traffic.sidecar.istio.io/excludeOutboundPorts"
	includeInbound = "traffic.sidecar.istio.io/includeInboundPorts"
	excludeInbound = "traffic.sidecar.istio.io/excludeInboundPorts"

	excludeInterfaces = "traffic.sidecar.istio.io/excludeInterfaces"

	dnsCaptureEnv   = "ISTIO_META_DNS_CAPTURE"
	dnsPort         = 15053
	tunnelPort      = 15008
	bogusUID        = 4321
	bogusGID        = 4322
	outOfNoListener = "ECONNREFUSED"
)

// cast is who acts in a pod: the proxy with all its listeners, and an app that
// listens on ports.
type cast struct {
	proxy   *testbed.Proxy
	app     *testbed.App
	uidOnly *testbed.Actor // the proxy's uid, another gid
	gidOnly *testbed.Actor // the proxy's gid, another uid
}

func newCast(t testing.TB, p *pod, appPorts []uint16, opts ...testbed.ProxyOption) *cast {
	t.Helper()
	x := p.policy.Proxy
	uid, gid := int(x.UID), int(x.GID)
	c := &cast{
		proxy:   p.StartProxy(t, uid, gid, append([]testbed.ProxyOption{testbed.ProxyPorts(x.OutboundPort, x.InboundPort)}, opts...)...),
		app:     p.StartApp(t, appPorts...),
		uidOnly: p.Actor(t, "uid-only", uid, bogusGID),
		gidOnly: p.Actor(t, "gid-only", bogusUID, gid),
	}
	c.proxy.Listen(t, testbed.ListenSpec{Name: "dns", Addr: at(netip.IPv6Unspecified(), x.DNSPort)})
	c.proxy.Listen(t, testbed.ListenSpec{Name: "tunnel", Addr: at(netip.IPv6Unspecified(), x.TunnelPort)})
	return c
}

func (c *cast) who(name string) *testbed.Actor {
	switch name {
	case "proxy":
		return c.proxy.Actor
	case "uid-only":
		return c.uidOnly
	case "gid-only":
		return c.gidOnly
	}
	return c.app.Actor
}

// TestRuleNumbers: the programs count by the numbers of redirect.Rule.
func TestRuleNumbers(t *testing.T) {
	numbers := map[bpf.ShuntRule]redirect.Rule{
		bpf.ShuntRuleRULE_OUT_EXCLUDE_INTERFACE: redirect.RuleOutExcludeInterface,
		bpf.ShuntRuleRULE_OUT_EXCLUDE_PORT:      redirect.RuleOutExcludePort,
		bpf.ShuntRuleRULE_OUT_PASSTHROUGH:       redirect.RuleOutPassthrough,
		bpf.ShuntRuleRULE_OUT_PROXY_TO_SELF:     redirect.RuleOutProxyToSelf,
		bpf.ShuntRuleRULE_OUT_LOCAL:             redirect.RuleOutLocal,
		bpf.ShuntRuleRULE_OUT_PROXY:             redirect.RuleOutProxy,
		bpf.ShuntRuleRULE_OUT_PROXY_GID_TO_SELF: redirect.RuleOutProxyGIDToSelf,
		bpf.ShuntRuleRULE_OUT_PROXY_GID_LOCAL:   redirect.RuleOutProxyGIDLocal,
		bpf.ShuntRuleRULE_OUT_PROXY_GID:         redirect.RuleOutProxyGID,
		bpf.ShuntRuleRULE_OUT_DNS:               redirect.RuleOutDNS,
		bpf.ShuntRuleRULE_OUT_LOOPBACK:          redirect.RuleOutLoopback,
		bpf.ShuntRuleRULE_OUT_EXCLUDE_CIDR:      redirect.RuleOutExcludeCIDR,
		bpf.ShuntRuleRULE_OUT_INCLUDE_PORT:      redirect.RuleOutIncludePort,
		bpf.ShuntRuleRULE_OUT_INCLUDE_CIDR:      redirect.RuleOutIncludeCIDR,
		bpf.ShuntRuleRULE_OUT_DEFAULT:           redirect.RuleOutDefault,
		bpf.ShuntRuleRULE_IN_REROUTE:            redirect.RuleInReroute,
		bpf.ShuntRuleRULE_IN_EXCLUDE_INTERFACE:  redirect.RuleInExcludeInterface,
		bpf.ShuntRuleRULE_IN_TUNNEL:             redirect.RuleInTunnel,
		bpf.ShuntRuleRULE_IN_EXCLUDE_PORT:       redirect.RuleInExcludePort,
		bpf.ShuntRuleRULE_IN_INCLUDE:            redirect.RuleInInclude,
		bpf.ShuntRuleRULE_IN_DEFAULT:            redirect.RuleInDefault,
	}
	for inKernel, rule := range numbers {
		if uint32(inKernel) != uint32(rule) {
			t.Errorf("%v is %d in the programs and %d in package redirect", rule, inKernel, rule)
		}
	}
	all := redirect.AllRules()
	if len(numbers) != len(all) {
		t.Errorf("%d rules are compared of %d", len(numbers), len(all))
	}
	if n := len(bpf.ShuntPodState{}.Rules); n != len(all)+1 || n != int(bpf.ShuntRuleRULE_COUNT) {
		t.Errorf("the programs have %d counters for %d rules", n, len(all))
	}
}

// ruleCase is a flow that a rule decides, in the forms of both families. POD
// stands for the pod's address. Without from, the source is the pod's address.
type ruleCase struct {
	rule         redirect.Rule
	who          string // of cast; inbound, "world"
	dst4, dst6   string
	bind4, bind6 string
	from4, from6 string
	listener     string
}

// ruleCases are by policy: sets of annotations, and environment of the proxy.
var ruleCases = []struct {
	name     string
	mutators []testbed.PodMutator
	cases    []ruleCase
}{
	{
		"lists",
		[]testbed.PodMutator{
			testbed.Annotate(includeRanges, "10.96.0.0/12,fd96::/16"),
			testbed.Annotate(excludeRanges, "10.97.0.0/16,fd96:1::/32"),
			testbed.Annotate(includePorts, "9000-9009"),
			testbed.Annotate(excludePorts, "7000-7010"),
			testbed.Annotate(includeInbound, "*"),
			testbed.Annotate(excludeInbound, "8081"),
			testbed.ProxyEnv(dnsCaptureEnv, "true"),
		},
		[]ruleCase{
			{rule: redirect.RuleOutExcludePort, dst4: "10.96.0.1:7000", dst6: "[fd96::1]:7010", listener: "world"},
			{rule: redirect.RuleOutPassthrough, who: "proxy", dst4: "POD:8080", dst6: "[POD]:8080", bind4: "127.0.0.6:0", bind6: "[::6]:0", from4: "127.0.0.6", from6: "::6", listener: "app"},
			{rule: redirect.RuleOutPassthrough, dst4: "127.0.0.1:8080", dst6: "[::1]:8080", bind4: "127.0.0.6:0", bind6: "[::6]:0", from4: "127.0.0.6", from6: "::6", listener: "app"},
			{rule: redirect.RuleOutPassthrough, dst6: "[::6]:8080", from6: "::6", listener: "app"},
			{rule: redirect.RuleOutProxyToSelf, who: "proxy", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleOutProxyToSelf, who: "uid-only", dst4: "127.0.0.2:8080", from4: "127.0.0.1", listener: "in"},
			{rule: redirect.RuleOutLocal, dst4: "POD:8080", dst6: "[POD]:8080", listener: "app"},
			{rule: redirect.RuleOutLocal, dst4: "127.0.0.1:8080", dst6: "[::1]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutLocal, who: "gid-only", dst4: "POD:8080", dst6: "[POD]:8080", listener: "app"},
			{rule: redirect.RuleOutLocal, dst4: "0.0.0.0:8080", dst6: "[::]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutLocal, dst4: "127.0.0.1:15001", dst6: "[::1]:15001", from4: "127.0.0.1", from6: "::1", listener: "out"},
			{rule: redirect.RuleOutProxy, who: "proxy", dst4: "10.96.0.1:80", dst6: "[fd96::1]:80", listener: "world"},
			{rule: redirect.RuleOutProxy, who: "proxy", dst4: "127.0.0.1:8080", dst6: "[::1]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutProxy, who: "proxy", dst4: "POD:15008", dst6: "[POD]:15008", listener: "tunnel"},
			{rule: redirect.RuleOutProxy, who: "uid-only", dst4: "10.96.0.1:53", dst6: "[fd96::1]:53", listener: "world"},
			{rule: redirect.RuleOutProxyGID, who: "gid-only", dst4: "10.96.0.1:80", dst6: "[fd96::1]:80", listener: "world"},
			{rule: redirect.RuleOutProxyGID, who: "gid-only", dst4: "10.96.0.1:53", dst6: "[fd96::1]:53", listener: "world"},
			{rule: redirect.RuleOutDNS, dst4: "10.97.0.1:53", dst6: "[fd99::1]:53", listener: "dns"},
			{rule: redirect.RuleOutDNS, dst4: "127.0.0.53:53", dst6: "[::1]:53", from4: "127.0.0.1", from6: "::1", listener: "dns"},
			{rule: redirect.RuleOutDNS, dst4: "POD:53", dst6: "[POD]:53", listener: "dns"},
			{rule: redirect.RuleOutExcludeCIDR, dst4: "10.97.0.0:9000", dst6: "[fd96:1::]:9000", listener: "world"},
			{rule: redirect.RuleOutExcludeCIDR, dst4: "10.97.255.255:80", dst6: "[fd96:1:ffff:ffff:ffff:ffff:ffff:ffff]:80", listener: "world"},
			{rule: redirect.RuleOutIncludePort, dst4: "8.8.8.8:9000", dst6: "[2001:db8::8]:9009", listener: "out"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "10.96.255.255:80", dst6: "[fd96:2::]:80", listener: "out"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "10.98.0.0:80", dst6: "[fd96:0:ffff::1]:80", listener: "out"},
			{rule: redirect.RuleOutDefault, dst4: "10.112.0.0:80", dst6: "[fd97::]:80", listener: "world"},
			{rule: redirect.RuleOutDefault, dst4: "10.95.255.255:8999", dst6: "[fd95:ffff::1]:9010", listener: "world"},

			{rule: redirect.RuleInTunnel, who: "world", dst4: "POD:15008", dst6: "[POD]:15008", listener: "tunnel"},
			{rule: redirect.RuleInExcludePort, who: "world", dst4: "POD:8081", dst6: "[POD]:8081", listener: "app"},
			{rule: redirect.RuleInExcludePort, who: "world", dst4: "POD:15021", dst6: "[POD]:15021", listener: "app"},
			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:15001", dst6: "[POD]:15006", listener: "in"},
			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:1", dst6: "[POD]:65535", bind4: "203.0.113.7:4000", bind6: "[2001:db8::7]:4000", from4: "203.0.113.7", from6: "2001:db8::7", listener: "in"},
		},
	},
	{
		// An include within loopback: no out-local rules, for both families.
		"loopback included",
		[]testbed.PodMutator{
			testbed.Annotate(includeRanges, "127.0.0.8/29,::1/128,10.244.0.0/16,fd10::/16"),
			testbed.Annotate(includeInbound, "8080,8090-8099"),
		},
		[]ruleCase{
			{rule: redirect.RuleOutProxyGIDToSelf, who: "gid-only", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleOutProxyGIDToSelf, who: "gid-only", dst4: "127.0.0.2:8080", from4: "127.0.0.1", listener: "in"},
			{rule: redirect.RuleOutProxyGID, who: "gid-only", dst4: "127.0.0.1:8080", dst6: "[::1]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutProxyGID, who: "gid-only", dst4: "POD:15008", dst6: "[POD]:15008", listener: "tunnel"},
			{rule: redirect.RuleOutProxyToSelf, who: "proxy", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleOutLoopback, dst4: "127.0.0.1:8080", dst6: "[::1]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutLoopback, dst4: "0.0.0.0:8080", dst6: "[::]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "127.0.0.9:8080", from4: "127.0.0.1", listener: "out"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "POD:8080", dst6: "[POD]:8080", listener: "out"},
			{rule: redirect.RuleOutDefault, dst4: "127.0.0.2:8080", from4: "127.0.0.1", listener: "app"},
			{rule: redirect.RuleOutDefault, dst4: "10.96.0.1:53", dst6: "[fd96::1]:53", listener: "world"},

			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:8090", dst6: "[POD]:8099", listener: "in"},
			{rule: redirect.RuleInTunnel, who: "world", dst4: "POD:15008", dst6: "[POD]:15008", listener: "tunnel"},
			{rule: redirect.RuleInDefault, who: "world", dst4: "POD:8081", dst6: "[POD]:8081", listener: "app"},
			{rule: redirect.RuleInDefault, who: "world", dst4: "POD:15001", dst6: "[POD]:15001", listener: "out"},
		},
	},
	{
		"defaults",
		nil,
		[]ruleCase{
			{rule: redirect.RuleOutIncludeCIDR, dst4: "10.96.0.1:80", dst6: "[fd96::1]:80", listener: "out"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "8.8.8.8:53", dst6: "[2001:db8::8]:53", listener: "out"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "1.2.3.4:15001", dst6: "[2001:db8::8]:15006", listener: "out"},
			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleInDefault, who: "world", dst4: "POD:15006", dst6: "[POD]:15006", listener: "in"},
			{rule: redirect.RuleInDefault, who: "world", dst4: "POD:8081", dst6: "[POD]:8081", listener: "app"},
		},
	},
	{
		"eth0 excluded",
		[]testbed.PodMutator{testbed.Annotate(excludeInterfaces, "eth0")},
		[]ruleCase{
			{rule: redirect.RuleOutExcludeInterface, dst4: "10.96.0.1:80", dst6: "[fd96::1]:80", listener: "world"},
			{rule: redirect.RuleOutExcludeInterface, who: "proxy", dst4: "10.96.0.1:80", dst6: "[fd96::1]:80", listener: "world"},
			{rule: redirect.RuleOutProxyToSelf, who: "proxy", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
			{rule: redirect.RuleOutLocal, dst4: "POD:8080", dst6: "[POD]:8080", listener: "app"},
			{rule: redirect.RuleInExcludeInterface, who: "world", dst4: "POD:8080", dst6: "[POD]:8080", listener: "app"},
			{rule: redirect.RuleInExcludeInterface, who: "world", dst4: "POD:15008", dst6: "[POD]:15008", listener: "tunnel"},
		},
	},
	{
		"lo excluded",
		[]testbed.PodMutator{testbed.Annotate(excludeInterfaces, "lo")},
		[]ruleCase{
			{rule: redirect.RuleOutExcludeInterface, who: "proxy", dst4: "POD:8080", dst6: "[POD]:8080", listener: "app"},
			{rule: redirect.RuleOutExcludeInterface, dst4: "127.0.0.1:8080", dst6: "[::1]:8080", from4: "127.0.0.1", from6: "::1", listener: "app"},
			{rule: redirect.RuleOutExcludeInterface, dst4: "POD:15001", dst6: "[POD]:15001", listener: "out"},
			{rule: redirect.RuleOutExcludeInterface, dst4: "POD:15006", dst6: "[POD]:15006", listener: "in"},
			{rule: redirect.RuleOutIncludeCIDR, dst4: "10.96.0.1:80", dst6: "[fd96::1]:80", listener: "out"},
			{rule: redirect.RuleInInclude, who: "world", dst4: "POD:8080", dst6: "[POD]:8080", listener: "in"},
		},
	},
	{
		"nothing captured",
		[]testbed.PodMutator{testbed.Annotate(includeRanges, ""), testbed.Annotate(includeInbound, ""), testbed.Annotate(includePorts, "*")},
		[]ruleCase{
			{rule: redirect.RuleOutIncludePort, dst4: "8.8.8.8:1", dst6: "[2001:db8::8]:65535", listener: "out"},
			{rule: redirect.RuleInDefault, who: "world", dst4: "POD:8080", dst6: "[POD]:8080", listener: "app"},
		},
	},
}

// notServed are the rules that eBPF does not serve, or that nothing reaches.
var notServed = []redirect.Rule{redirect.RuleInReroute, redirect.RuleOutProxyGIDLocal}

// TestPrivilegedRules has a flow for every rule of sections 4 and 5, and looks
// at all that can be seen of it, down to the rule's counter.
func TestPrivilegedRules(t *testing.T) {
	begin(t)
	eachHook(t, testRules)
}

func testRules(t *testing.T, n *node) {
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	reached := map[redirect.Rule]bool{}
	for _, policy := range ruleCases {
		p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), policy.mutators...)
		c := newCast(t, p, []uint16{53, 8080, 8081, 15021})
		for _, rc := range policy.cases {
			reached[rc.rule] = true
			for _, form := range []string{"IPv4", "mapped", "IPv6"} {
				if rc.who == "world" && form == "mapped" {
					continue // there is no such packet
				}
				if form == "IPv6" && rc.dst6 == "" || form != "IPv6" && rc.dst4 == "" {
					continue // the rule has no such flow
				}
				t.Run(fmt.Sprintf("%s/%v/%s to %s%s/%s", policy.name, rc.rule, rc.who, rc.dst4, rc.dst6, form), func(t *testing.T) {
					rc.test(t, p, c, form)
				})
			}
		}
		p.expectFailures(t)
	}
	for _, r := range redirect.AllRules() {
		if !reached[r] && !slices.Contains(notServed, r) {
			t.Errorf("no flow for rule %v", r)
		}
	}
}

func (rc ruleCase) test(t *testing.T, p *pod, c *cast, form string) {
	dst, bind, from, own := rc.dst4, rc.bind4, rc.from4, p.Addr4()
	if form == "IPv6" {
		dst, bind, from, own = rc.dst6, rc.bind6, rc.from6, p.Addr6()
	}
	spec := testbed.ConnectSpec{Dst: ap(strings.ReplaceAll(dst, "POD", own.String())), Abort: true}
	if bind != "" {
		spec.Bind, spec.ReuseAddr = ap(bind), true
	}
	if form == "mapped" {
		spec.Family = 6
	}
	flow := redirect.Flow{Dst: spec.Dst, Src: spec.Bind.Addr(), PodAddrs: p.AllAddrs()}
	if rc.listener == "world" {
		flow.Interface = "eth0"
	}
	x := want{listener: rc.listener, dst: spec.Dst, from: own}
	if rc.who == "world" {
		flow.Direction, flow.Interface = redirect.Inbound, "eth0"
		if x.from = testbed.WorldAddr4; form == "IPv6" {
			x.from = testbed.WorldAddr6
		}
		flow.Src = x.from
	}
	if from != "" {
		x.from = netip.MustParseAddr(from)
	}
	switch {
	case spec.Dst.Addr() == netip.IPv4Unspecified():
		x.dst = at(netip.MustParseAddr("127.0.0.1"), spec.Dst.Port())
	case spec.Dst.Addr() == netip.IPv6Unspecified():
		x.dst = at(netip.IPv6Loopback(), spec.Dst.Port())
	}

	actor := p.World.Actor
	if rc.who != "world" {
		actor = c.who(rc.who)
		flow.UID, flow.GID = uint32(actor.UID), uint32(actor.GID)
	}
	if d := p.policy.Decide(flow); d.Rule != rc.rule {
		t.Errorf("Decide says %v by %v", d.Verdict, d.Rule)
	}
	before := p.rules(t)
	r := actor.Connect(t, spec)
	if diff := cmp.Diff(x.outcome(r), see(r)); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(tally{rc.rule: 1}, p.rules(t).since(before)); diff != "" {
		t.Errorf("counters (-want +got):\n%s", diff)
	}
}
