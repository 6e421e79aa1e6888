// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"encoding/json"
	"regexp"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// harmless are the lines that iptables-restore may be given for a policy: names
// of ours, numbers, addresses, and options that are written in this package. Only
// the name of an interface is somebody else's word.
var harmless = regexp.MustCompile(`^(\*(nat|mangle|raw)|COMMIT|# [][a-z0-9A-Z ,:()./'-]+|-N SHUNT_[A-Z_0-9]+|-A [A-Z_0-9]+( !)?( (-p (tcp|udp)|-[io] [A-Za-z0-9][A-Za-z0-9_.-]{0,14}|-[sd] [0-9a-f.:]+(/[0-9]+)?|-[jgm] [A-Za-z_]+[A-Z_0-9a-z]*|--[a-z-]+( [0-9A-Z,:/xa-f.]+){0,2}|!))*)$`)

// FuzzRender: no annotation can put into the input of iptables-restore what is not
// a rule of ours.
func FuzzRender(f *testing.F) {
	f.Add("10.0.0.0/8", "", "80,443", "", "", "", "eth1", "", "REDIRECT", "true")
	f.Add("*", "::1", "*", "15021", "*", "1-65535", "", "vif0", "TPROXY", "true")
	f.Add("10.0.0.0/8\nCOMMIT\n*filter\n-A INPUT -j DROP", "10.0.0.0/8 -j ACCEPT", "80 -j DROP", "80\n", "--flush", "-F", "eth0 -j ACCEPT", "-F", "TPROXY\n", "x")
	f.Add("", "", "", "", "", "", "-t", "eth0\x00", "", "")
	cfg := redirect.DefaultConfig()
	pod := &testbed.Pod{Name: "a", Namespace: "ns", UID: "0a1b2c3d-0000-4000-8000-000000000001"}
	f.Fuzz(func(t *testing.T, inclCIDR, exclCIDR, inclIn, exclIn, inclOut, exclOut, exclIf, reroute, mode, dns string) {
		const traffic = "traffic.sidecar.istio.io/"
		facts, err := redirect.ParsePod(pod.Injected(
			testbed.Annotate(traffic+"includeOutboundIPRanges", inclCIDR), testbed.Annotate(traffic+"excludeOutboundIPRanges", exclCIDR),
			testbed.Annotate(traffic+"includeInboundPorts", inclIn), testbed.Annotate(traffic+"excludeInboundPorts", exclIn),
			testbed.Annotate(traffic+"includeOutboundPorts", inclOut), testbed.Annotate(traffic+"excludeOutboundPorts", exclOut),
			testbed.Annotate(traffic+"excludeInterfaces", exclIf), testbed.Annotate("istio.io/reroute-virtual-interfaces", reroute),
			testbed.Annotate("sidecar.istio.io/interceptionMode", mode), testbed.ProxyEnv("ISTIO_META_DNS_CAPTURE", dns),
		))
		if err != nil {
			return
		}
		_, policy, err := cfg.Evaluate(facts)
		if err != nil || policy == nil {
			return
		}
		for _, family := range []Family{IPv4, IPv6} {
			for line := range strings.Lines(Render(policy, family)) {
				if line = strings.TrimSuffix(line, "\n"); !harmless.MatchString(line) {
					t.Errorf("%v: a line that is none of ours: %q", family, line)
				}
			}
		}
	})
}

// FuzzSave: what iptables-save says of a pod, whose rules may be its own. What is
// given back to iptables-restore is about our chains, a line a command.
func FuzzSave(f *testing.F) {
	f.Add("*nat\n:SHUNT_OUT - [0:0]\n-A OUTPUT -p tcp -j SHUNT_OUT\n-A SHUNT_OUT -j RETURN\nCOMMIT\n")
	f.Add("*nat\n:SHUNT_X - [0:0]\n:OTHER - [0:0]\n[3:180] -A OTHER -p tcp -j REDIRECT --to-ports 1\n[1:1] -A SHUNT_X -m comment --comment \"-j SHUNT_X\" -g SHUNT_X\nCOMMIT\n")
	f.Add("*nat\n-A -j x -j SHUNT_OUT\n-A  -j SHUNT_OUT\n-A !\t-j -g SHUNT_OUT\nCOMMIT\n")
	f.Add("*\n-A\n-A \n:\n[\n[:] \n*filter\n-N SHUNT_\n-A INPUT -j SHUNT_")
	f.Fuzz(func(t *testing.T, text string) {
		_ = redirecting(text)
		_, packets := uncount(text)
		_ = flows(text, packets)
		x := parse(text)
		_ = differences(x, parse(""))
		for _, out := range []string{x.removal(), mend(nil, x)} {
			for line := range strings.Lines(out) {
				line = strings.TrimSuffix(line, "\n")
				verb, rest, _ := strings.Cut(line, " ")
				_, spec, _ := strings.Cut(rest, " ") // after the name of a chain, whatever that is
				switch {
				case line == "COMMIT", strings.HasPrefix(line, "*"):
				case (verb == "-F" || verb == "-X") && strings.HasPrefix(rest, prefix):
				case verb == "-D" && ours(target(spec)):
				default:
					t.Errorf("%q makes %q", text, line)
				}
			}
		}
	})
}

// FuzzRecord: a record, or what was found of the node's programs.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"ContainerID":"c","IfName":"eth0","Network":"n","Netns":"/run/netns/x","Inode":1,"Cookie":2,"Mode":"nft","IPv4":"*nat\nCOMMIT\n","Sysctls":{"a":"1"},"Done":true}`))
	f.Add([]byte(`{"Asked":"auto","Tools":{"Mode":"nft"},"Files":[{"Dev":1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var r record
		if json.Unmarshal(data, &r) == nil {
			_ = r.families()
			_ = differences(parse(r.IPv4), parse(r.IPv6))
		}
		var c choice
		if json.Unmarshal(data, &c) == nil {
			_ = stamps(&c.Tools)
		}
	})
}
