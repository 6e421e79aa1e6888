// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

var update = flag.Bool("update", false, "write the golden files in testdata")

// The keys that tests set.
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

// A ruleCase is a pod, as far as its rules depend on it.
type ruleCase struct {
	name     string
	mutators []testbed.PodMutator
	config   func(*redirect.Config)
}

// annotated is a case with annotations: key, value, key, value …
func annotated(name string, pairs ...string) ruleCase {
	return ruleCase{name: name, mutators: annotations(pairs...)}
}

func annotations(pairs ...string) (out []testbed.PodMutator) {
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, testbed.Annotate(pairs[i], pairs[i+1]))
	}
	return out
}

func (c ruleCase) with(m ...testbed.PodMutator) ruleCase {
	c.mutators = append(slices.Clone(c.mutators), m...)
	return c
}

func (c ruleCase) tproxy() ruleCase {
	return c.with(testbed.Annotate(interceptionMode, "TPROXY"))
}

func (c ruleCase) dns() ruleCase { return c.with(testbed.ProxyEnv(dnsCaptureEnv, "true")) }

// manyCIDRs are 300 of each family.
func manyCIDRs() string {
	var out []string
	for i := range 300 {
		out = append(out, fmt.Sprintf("10.%d.%d.0/24", 128+i/100, i%100), fmt.Sprintf("fd00:%x::/32", i))
	}
	return strings.Join(out, ",")
}

func manyPorts() string {
	var out []string
	for i := range 40 {
		out = append(out, fmt.Sprint(2000+10*i))
		if i%3 == 0 {
			out = append(out, fmt.Sprintf("%d-%d", 2003+10*i, 2006+10*i))
		}
	}
	return strings.Join(out, ",")
}

func ruleCases() []ruleCase {
	everything := []string{
		includeRanges, "10.0.0.0/8,fd00::/8,127.0.0.1", excludeRanges, "10.96.0.0/12,fd96::/16", includePorts, "80,8000-8100",
		excludePorts, "22,5432,9000-9010", includeInbound, "*", excludeInbound, "8081,9100-9200", excludeInterfaces, "net1", rerouteInterfaces, "vif0,vif1",
	}
	return []ruleCase{
		annotated("default"),
		annotated("outbound-none", includeRanges, ""),
		annotated("outbound-star", includeRanges, "*"),
		annotated("outbound-ipv4", includeRanges, "10.0.0.0/8,192.168.1.7"),
		annotated("outbound-ipv6", includeRanges, "fd00::/8,2001:db8::1"),
		annotated("outbound-both-families", includeRanges, "fd00::/8,10.0.0.0/8"),
		annotated("outbound-host-bits", includeRanges, "10.1.2.3/16,fd00::5/64"),
		annotated("outbound-all-of-ipv4", includeRanges, "0.0.0.0/0"),
		annotated("outbound-all-of-ipv6", includeRanges, "::/0"),
		annotated("outbound-mapped", includeRanges, "::ffff:10.0.0.0/104"),
		annotated("outbound-ipv4-compatible", includeRanges, "::1.2.3.4,::102:0/112"),
		annotated("outbound-loopback", includeRanges, "127.0.0.0/8"),
		annotated("outbound-loopback-part", includeRanges, "127.0.0.2,10.0.0.0/8"),
		annotated("outbound-loopback-ipv6", includeRanges, "::1"),
		annotated("outbound-many", includeRanges, manyCIDRs()),
		annotated("outbound-exclude", excludeRanges, "10.96.0.0/12,fd96::/16"),
		annotated("outbound-exclude-ipv4", excludeRanges, "169.254.169.254"),
		annotated("outbound-exclude-all", excludeRanges, "0.0.0.0/0,::/0"),
		annotated("outbound-exclude-wins", includeRanges, "10.96.1.0/24", excludeRanges, "10.96.0.0/12"),
		annotated("outbound-exclude-many", excludeRanges, manyCIDRs()),
		annotated("outbound-port", includeRanges, "", includePorts, "443"),
		annotated("outbound-ports", includeRanges, "", includePorts, "80,443,8000-8100"),
		annotated("outbound-ports-star", includeRanges, "", includePorts, "*"),
		annotated("outbound-ports-many", includeRanges, "", includePorts, manyPorts()),
		annotated("outbound-ports-and-ranges", includeRanges, "10.0.0.0/8", includePorts, "443", excludeRanges, "10.5.0.0/16"),
		annotated("outbound-exclude-port", excludePorts, "22"),
		annotated("outbound-exclude-range", excludePorts, "9000-9010"),
		annotated("outbound-exclude-every-port", excludePorts, "1-65535"),
		annotated("outbound-exclude-ports-many", excludePorts, manyPorts()),
		annotated("inbound-none", includeInbound, ""),
		annotated("inbound-star", includeInbound, "*"),
		annotated("inbound-port", includeInbound, "80"),
		annotated("inbound-ports", includeInbound, "80,443,8000-8100"),
		annotated("inbound-many", includeInbound, manyPorts()),
		annotated("inbound-exclude", includeInbound, "*", excludeInbound, "8081,9100-9200"),
		annotated("inbound-exclude-unused", includeInbound, "80", excludeInbound, "80"),
		{name: "inbound-default-star", config: func(c *redirect.Config) { c.IncludeInboundPortsDefault = redirect.InboundAll }},
		{name: "inbound-default-star-nothing-excluded", config: func(c *redirect.Config) {
			c.IncludeInboundPortsDefault, c.ProxyExcludeInboundPorts = redirect.InboundAll, nil
		}},
		annotated("interfaces-exclude", excludeInterfaces, "net1,eth1.100"),
		annotated("interfaces-reroute", rerouteInterfaces, "vif0"),
		annotated("interfaces-reroute-ranges", rerouteInterfaces, "vif0,vif1", includeRanges, "10.0.0.0/8,fd00::/8"),
		annotated("interfaces-reroute-none", rerouteInterfaces, "vif0", includeRanges, ""),
		annotated("interfaces-both", rerouteInterfaces, "vif0", excludeInterfaces, "net1", includeInbound, "*"),
		annotated("dns").dns(),
		annotated("dns-port-excluded", excludePorts, "50-60").dns(),
		annotated("dns-loopback", includeRanges, "127.0.0.0/8").dns(),
		annotated("dns-interfaces", excludeInterfaces, "net1", rerouteInterfaces, "vif0").dns(),
		{name: "dns-other-port", config: func(c *redirect.Config) { c.Proxy.DNSPort = 5300 }, mutators: []testbed.PodMutator{testbed.ProxyEnv(dnsCaptureEnv, "1")}},
		annotated("invalid-drop").with(testbed.ProxyEnv(invalidDropEnv, "true")),
		annotated("proxy-ids").with(testbed.ProxyIDs(2102, 2103)),
		annotated("proxy-root").with(testbed.ProxyIDs(0, 0)),
		{name: "proxy-ports", config: func(c *redirect.Config) {
			c.Proxy.OutboundPort, c.Proxy.InboundPort, c.Proxy.TunnelPort, c.Proxy.DNSPort = 16001, 16006, 16008, 16053
		}},
		annotated("tproxy").tproxy(),
		annotated("tproxy-star", includeInbound, "*").tproxy(),
		annotated("tproxy-none", includeInbound, "").tproxy(),
		annotated("tproxy-ports", includeInbound, "80,443,8000-8100").tproxy(),
		annotated("tproxy-exclude", includeInbound, "*", excludeInbound, "8081").tproxy(),
		annotated("tproxy-interfaces", rerouteInterfaces, "vif0", excludeInterfaces, "net1").tproxy(),
		annotated("tproxy-dns").tproxy().dns(),
		annotated("tproxy-proxy-ids").tproxy().with(testbed.ProxyIDs(2102, 2103)),
		annotated("tproxy-invalid-drop").tproxy().with(testbed.ProxyEnv(invalidDropEnv, "true")),
		annotated("everything", everything...).dns().with(testbed.ProxyEnv(invalidDropEnv, "true"), testbed.ProxyIDs(2102, 2103)),
		annotated("everything-tproxy", everything...).tproxy().dns().with(testbed.ProxyEnv(invalidDropEnv, "true")),
	}
}

func (c ruleCase) policy(t testing.TB, p *testbed.Pod) *redirect.Policy {
	t.Helper()
	cfg := redirect.DefaultConfig()
	if c.config != nil {
		c.config(&cfg)
	}
	return evaluate(t, cfg, p, c.mutators...)
}

// TestRender compares the rules of every case with its golden file.
func TestRender(t *testing.T) {
	p := &testbed.Pod{Name: "pod", Namespace: "shop", UID: "1"}
	seen := map[string]bool{}
	for _, c := range ruleCases() {
		t.Run(c.name, func(t *testing.T) {
			policy := c.policy(t, p)
			var got strings.Builder
			for _, f := range []Family{IPv4, IPv6} {
				fmt.Fprintf(&got, "#### %v\n%s", f, Render(policy, f))
			}
			file := filepath.Join("testdata", c.name+".rules")
			if seen[file] {
				t.Fatalf("%s is another case's", file)
			}
			seen[file] = true
			if *update {
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got.String()); diff != "" {
				t.Errorf("%s (-want +got):\n%s", file, diff)
			}
		})
	}
	files, err := filepath.Glob(filepath.Join("testdata", "*.rules"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if !seen[file] {
			t.Errorf("%s belongs to no case", file)
		}
	}
	if len(seen) < 40 {
		t.Errorf("only %d cases", len(seen))
	}
}

// TestRenderFamilies: no address of one family is in the other's rules.
func TestRenderFamilies(t *testing.T) {
	p := &testbed.Pod{Name: "pod", Namespace: "shop", UID: "1"}
	for _, c := range ruleCases() {
		policy := c.policy(t, p)
		for line := range strings.Lines(Render(policy, IPv4)) {
			if !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, ":") && strings.Contains(line, "::") {
				t.Errorf("%s: IPv6 in IPv4's rules: %s", c.name, line)
			}
		}
		for line := range strings.Lines(Render(policy, IPv6)) {
			for _, word := range strings.Fields(line) {
				if strings.Count(word, ".") == 3 && !strings.HasPrefix(line, "#") {
					t.Errorf("%s: IPv4 in IPv6's rules: %s", c.name, line)
				}
			}
		}
	}
}

// TestPrivilegedCases applies each case in a namespace, twice; the second time
// changes nothing. What iptables-save then gives is what was rendered, and
// after the removal it gives nothing.
func TestPrivilegedCases(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		w := testbed.NewWorld(t)
		p := testbed.NewPod(t, testbed.InWorld(w))
		target := targetOf(p)
		for _, c := range ruleCases() {
			t.Run(c.name, func(t *testing.T) {
				policy := c.policy(t, p)
				before := n.children.Load()
				if err := n.Apply(t.Context(), target, policy); err != nil {
					t.Fatalf("apply: %v", err)
				}
				if k := n.children.Load() - before; k > 4 {
					t.Errorf("applying took %d programs", k)
				}
				first := save(t, n.opts.Mode, p)
				if err := n.Check(t.Context(), target); err != nil {
					t.Errorf("check: %v", err)
				}
				before = n.children.Load()
				if err := n.Apply(t.Context(), target, policy); err != nil {
					t.Fatalf("apply again: %v", err)
				}
				if k := n.children.Load() - before; k != 2 {
					t.Errorf("applying again took %d programs; reading takes 2", k)
				}
				if diff := cmp.Diff(first, save(t, n.opts.Mode, p)); diff != "" {
					t.Errorf("applying again has changed something (-before +after):\n%s", diff)
				}
				if err := n.Remove(t.Context(), target.Attachment); err != nil {
					t.Errorf("remove: %v", err)
				}
				if left := residue(t, n.opts.Mode, p); left != "" {
					t.Errorf("left behind:\n%s", left)
				}
				if err := n.Remove(t.Context(), target.Attachment); err != nil {
					t.Errorf("remove again: %v", err)
				}
			})
		}
	})
}
