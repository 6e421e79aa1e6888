// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestChoose(t *testing.T) {
	served := Choice{Datapath: EBPF, Hook: HookSkLookup, Fallback: true, Reasons: Reasons{{ReasonServed, "eBPF serves all that the pod needs"}}}
	ebpf := func(name ReasonName, by string) Choice {
		return Choice{Datapath: EBPF, Hook: HookSkLookup, Reasons: Reasons{{name, by}}}
	}
	iptables := func(name ReasonName, by string) Choice {
		return Choice{Datapath: Iptables, Reasons: Reasons{{name, by}}}
	}
	for _, tc := range []struct {
		name           string
		datapath, hook string   // netconf's; empty: auto
		pod            []string // annotations
		policy         func(*Policy)
		want           Choice
		errors         []string // what the error says
	}{
		{name: "nothing is asked for", want: served},
		{name: "ebpf", datapath: "ebpf", hook: "sk_lookup", want: ebpf(ReasonConfigured, "datapath ebpf (netconf)")},
		{name: "ebpf by annotation", pod: []string{KeyDatapath, "ebpf", KeyInboundHook, "sk_lookup"}, want: ebpf(ReasonAnnotation, "shunt.dev/datapath ebpf (annotation)")},
		{name: "a hook by annotation", pod: []string{KeyInboundHook, "sk_lookup"}, want: Choice{
			Datapath: EBPF, Hook: HookSkLookup, Fallback: true, Reasons: Reasons{{ReasonAnnotation, "shunt.dev/inbound-hook sk_lookup (annotation)"}},
		}},
		{name: "INVALID is no matter", policy: func(p *Policy) { p.InvalidDrop = true }, want: served},
		{name: "TPROXY, DNS and user namespaces are served", policy: func(p *Policy) { p.Mode, p.DNSCapture, p.HostUsers = ModeTProxy, true, false }, want: served},
		{name: "iptables", datapath: "iptables", want: iptables(ReasonConfigured, "datapath iptables (netconf)")},
		{name: "iptables by annotation", pod: []string{KeyDatapath, "iptables"}, want: iptables(ReasonAnnotation, "shunt.dev/datapath iptables (annotation)")},
		{name: "iptables has no hook", datapath: "iptables", hook: "tc", want: iptables(ReasonConfigured, "datapath iptables (netconf)")},
		{name: "iptables serves every need", datapath: "iptables", policy: func(p *Policy) { p.RuntimeClass = "kata" }, want: iptables(ReasonConfigured, "datapath iptables (netconf)")},
		{name: "tc", hook: "tc", want: Choice{Datapath: EBPF, Hook: HookTC, Fallback: true, Reasons: Reasons{{ReasonConfigured, "inboundHook tc (netconf)"}}}},
		{name: "tc by annotation", pod: []string{KeyInboundHook, "tc"}, want: Choice{
			Datapath: EBPF, Hook: HookTC, Fallback: true, Reasons: Reasons{{ReasonAnnotation, "shunt.dev/inbound-hook tc (annotation)"}},
		}},
		// The annotation stands in for auto only.
		{name: "configuration wins", datapath: "ebpf", hook: "sk_lookup", pod: []string{KeyDatapath, "iptables", KeyInboundHook, "tc"}, want: ebpf(ReasonConfigured, "datapath ebpf (netconf)")},
		{name: "malformed", pod: []string{KeyDatapath, "", KeyInboundHook, "auto"}, errors: []string{
			KeyDatapath + `: value "": expected ebpf or iptables`, KeyInboundHook + `: value "auto": expected sk_lookup or tc`,
		}},
		{name: "malformed where the configuration decides", datapath: "iptables", pod: []string{KeyDatapath, "x"}, errors: []string{`value "x"`}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			policy := Policy{Mode: ModeRedirect, HostUsers: true}
			if tc.policy != nil {
				tc.policy(&policy)
			}
			pod := new(Pod)
			pod.Annotations = map[string]string{}
			for i := 0; i+1 < len(tc.pod); i += 2 {
				pod.Annotations[tc.pod[i]] = tc.pod[i+1]
			}
			datapath, hook := tc.datapath, tc.hook
			if datapath == "" {
				datapath = Auto
			}
			if hook == "" {
				hook = Auto
			}
			got, err := Choose(datapath, hook, pod, &policy)
			if (err != nil) != (len(tc.errors) > 0) {
				t.Fatalf("error %v", err)
			}
			for _, want := range tc.errors {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %v, want %q", err, want)
				}
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestChooseNeeds: each need alone, and all together; the names are stable.
func TestChooseNeeds(t *testing.T) {
	needs := []struct {
		name   ReasonName
		text   string
		policy func(*Policy)
	}{
		{"reroute-interfaces", "interfaces are rerouted: r0", func(p *Policy) { p.RerouteInterfaces = []string{"r0"} }},
		{"runtime-class", `runtimeClassName "kata" is not among nativeRuntimeClasses: its containers may not be processes of this kernel`, func(p *Policy) { p.RuntimeClass = "kata" }},
		{"secondary-networks", "further networks are attached after this plugin (annotation k8s.v1.cni.cncf.io/networks)", func(p *Policy) { p.SecondaryNetworks = true }},
	}
	all, every := Policy{Mode: ModeRedirect, HostUsers: true}, Reasons(nil)
	for _, n := range needs {
		policy := Policy{Mode: ModeRedirect, HostUsers: true}
		n.policy(&policy)
		n.policy(&all)
		reason := Reason{n.name, n.text}
		every = append(every, reason)
		got, err := Choose(Auto, Auto, new(Pod), &policy)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(Choice{Datapath: Iptables, Reasons: Reasons{reason}}, got); diff != "" {
			t.Errorf("%s: %s", n.name, diff)
		}
	}
	// Alone it is for the backend, who knows what interfaces the pod has.
	all.ExcludeInterfaces = []string{"e0", "e1"}
	first := Reason{ReasonExcludeInterfaces, "interfaces are excluded, e0, e1, and further ones come after this plugin"}
	every = append(Reasons{first}, every...)
	alone := Policy{Mode: ModeRedirect, HostUsers: true, ExcludeInterfaces: all.ExcludeInterfaces}
	if got, err := Choose(Auto, Auto, new(Pod), &alone); err != nil || got.Datapath != EBPF || !got.Fallback {
		t.Errorf("interfaces are excluded: %+v, %v", got, err)
	}
	_, err := Choose("ebpf", Auto, new(Pod), &all)
	var unserved *UnservedError
	if !errors.As(err, &unserved) {
		t.Fatalf("got %v, want an UnservedError", err)
	}
	if diff := cmp.Diff(every, unserved.Needs); diff != "" {
		t.Error(diff)
	}
	if want := "datapath ebpf (netconf) is asked for and does not serve the pod: " + every.String(); err.Error() != want {
		t.Errorf("got %v\nwant %s", err, want)
	}
}
