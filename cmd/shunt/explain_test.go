// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"shunt.dev/shunt/redirect"
)

// explain runs `shunt explain -o json` on a pod, which edit may change.
func explain(t *testing.T, file string, edit func(pod map[string]any), args ...string) explanation {
	t.Helper()
	out, errs, exit := explainText(t, file, edit, append(args, "-o", "json")...)
	if exit != 0 {
		t.Fatalf("explain %s %q: exit status %d: %s", file, args, exit, errs)
	}
	var e explanation
	dec := json.NewDecoder(strings.NewReader(out))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e); err != nil {
		t.Fatal(err)
	}
	return e
}

func explainText(t *testing.T, file string, edit func(pod map[string]any), args ...string) (stdout, stderr string, exit int) {
	t.Helper()
	f, err := os.Open(pods + "/" + file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := readPod("-", f)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(got.Pod)
	if err != nil {
		t.Fatal(err)
	}
	var pod map[string]any
	if err := json.Unmarshal(data, &pod); err != nil {
		t.Fatal(err)
	}
	var ips []map[string]string
	for _, ip := range got.IPs {
		ips = append(ips, map[string]string{"ip": ip.String()})
	}
	pod["status"] = map[string]any{"podIPs": ips}
	if edit != nil {
		edit(pod)
	}
	if data, err = json.Marshal(pod); err != nil {
		t.Fatal(err)
	}
	var out, errs strings.Builder
	exit = run(t.Context(), append([]string{"explain", "--pod", "-"}, args...), strings.NewReader(string(data)), &out, &errs)
	return out.String(), errs.String(), exit
}

func annotate(key, value string) func(map[string]any) {
	return func(pod map[string]any) {
		pod["metadata"].(map[string]any)["annotations"].(map[string]any)[key] = value
	}
}

// TestSettings: every key of section 2 is in the policy, with its value, and
// where it comes from is told.
func TestSettings(t *testing.T) {
	for _, tc := range []struct{ key, in, row, value string }{
		{keyMode, "TPROXY", "", ""},
		{keyIncludeOutboundRanges, "10.0.0.0/8, fd00::/8", "", "10.0.0.0/8,fd00::/8"},
		{keyIncludeOutboundRanges, "", "", ""},
		{keyExcludeOutboundRanges, "10.1.2.3", "", "10.1.2.3/32"},
		{keyIncludeOutboundPorts, "*", "", ""},
		{keyExcludeOutboundPorts, "1,3,2,8000-8100", "", "1-3,8000-8100"},
		{keyIncludeInboundPorts, "80", "", ""},
		{keyExcludeInboundPorts, "80", "", "-"},
		{keyExcludeInterfaces, "net2,net1", "", "net1,net2"},
		{keyRerouteInterfaces, "tap0", "", ""},
		{keyKubevirtInterfaces, "tap0", "", ""},
	} {
		e := explain(t, "meshed.yaml", annotate(tc.key, tc.in))
		want := setting{tc.key, tc.value, fromAnnotation}
		switch tc.value {
		case "":
			want.Value = tc.in
		case "-":
			want.Value = ""
		}
		if !slices.Contains(e.Policy, want) {
			t.Errorf("%s %q: no %+v in %+v", tc.key, tc.in, want, e.Policy)
		}
	}
	e := explain(t, "tproxy.yaml", nil)
	if want := (setting{keyExcludeInboundPorts, "9000-9010,15020-15021,15090", "annotation and default"}); !slices.Contains(e.Policy, want) {
		t.Errorf("no %+v in %+v", want, e.Policy)
	}
}

// TestBecause: every rule that can decide is explained.
func TestBecause(t *testing.T) {
	for _, r := range redirect.AllRules() {
		if because[r] == "" {
			t.Errorf("rule %v has no explanation", r)
		}
	}
}

// TestFlows asks about connections, one for each way that an answer can take.
func TestFlows(t *testing.T) {
	for _, tc := range []struct {
		pod  string
		args string
		want string // verdict rule
		so   string // a part of it
		assu string // a part of what is assumed; -: nothing
	}{
		{"meshed.yaml", "--to 10.1.2.3:443", "OUT out-include-cidr", "127.0.0.1:15001; the proxy gets 10.1.2.3:443 as", "uid 1000, gid 1000: any that is not"},
		{"meshed.yaml", "--to [fd99::1]:443 --uid 1000 --gid 1000", "OUT out-include-cidr", "[::1]:15001; the proxy gets [fd99::1]:443 as", "-"},
		{"meshed.yaml", "--to [::ffff:10.1.2.3]:443 --uid 0", "OUT out-include-cidr", "127.0.0.1:15001; the proxy gets 10.1.2.3:443 as", "gid 1000"},
		{"meshed.yaml", "--to 10.1.2.3:443 --uid 1337", "direct out-proxy", "it is not redirected", ""},
		{"meshed.yaml", "--to 10.1.2.3:443 --gid 1337", "direct out-proxy-gid", "it is not redirected", "uid 1000"},
		{"meshed.yaml", "--to 10.96.0.1:443", "direct out-exclude-cidr", "it is not redirected", ""},
		{"meshed.yaml", "--to 10.244.1.17:9080 --uid 1337", "IN out-proxy-to-self", "inbound listener, 127.0.0.1:15006; the proxy gets 10.244.1.17:9080", ""},
		{"meshed.yaml", "--to 10.244.1.17:9080", "direct out-local", "", ""},
		{"meshed.yaml", "--to 10.244.1.17:9080 --pod-ip 10.244.1.99,fd00::1", "OUT out-include-cidr", "", ""},
		{"meshed.yaml", "--to 127.0.0.1:80 --from 127.0.0.6 --uid 1337", "direct out-passthrough", "", ""},
		{"invalid-drop.yaml", "--to 10.244.1.17:9080 --gid 1 --uid 1", "OUT out-include-cidr", "", "10.244.1.17 is not the pod's own: its addresses are not known (no status.podIPs, no --pod-ip). If it is, the verdict is direct by out-local"},
		{"dns.yaml", "--to 10.96.0.10:53 --proto udp", "DNS out-dns", "DNS listener, 127.0.0.1:15053; the answer comes from 10.96.0.10:53", ""},
		{"dns.yaml", "--to 10.96.0.10:54 --proto udp", "direct out-default", "", ""},
		{"meshed.yaml", "--inbound 9080", "IN in-include", "port 15006; the proxy gets 10.244.1.17:9080", "by eth0"},
		{"meshed.yaml", "--inbound 9080 --from fd00::99 --interface eth0", "IN in-include", "the proxy gets [fd00:10:244:1::11]:9080", "-"},
		{"meshed.yaml", "--inbound 9999", "direct in-default", "", ""},
		{"meshed.yaml", "--inbound 15008", "direct in-tunnel", "", ""},
		{"meshed.yaml", "--inbound 9080 --interface lo", "direct in-default", "", ""},
		{"invalid-drop.yaml", "--inbound 8080", "IN in-include", "the proxy gets the address and port that were dialled as", ""},
		{"tproxy.yaml", "--inbound 80", "IN in-include", "(TPROXY)", ""},
		{"tproxy.yaml", "--inbound 9001", "direct in-exclude-port", "", ""},
		{"vm.yaml", "--inbound 80 --interface k6t-eth0", "OUT in-reroute", "outbound listener, port 15001; the proxy gets 10.244.1.18:80", "a guest sends elsewhere"},
		{"plain.yaml", "--to 10.1.2.3:443", "untouched P8", "Shunt does nothing", ""},
		{"hostnetwork.yaml", "--inbound 443", "untouched P6a", "Shunt does nothing", ""},
	} {
		f := explain(t, tc.pod, nil, strings.Fields(tc.args)...).Flow
		if got := f.Verdict + " " + f.Rule; got != tc.want || !strings.Contains(f.So, tc.so) || f.Because == "" {
			t.Errorf("%s %s: %+v; want %s: %s", tc.pod, tc.args, f, tc.want, tc.so)
		}
		if assumed := strings.Join(f.Assumed, "\n"); tc.assu == "-" && assumed != "" || tc.assu != "-" && !strings.Contains(assumed, tc.assu) {
			t.Errorf("%s %s: assumed %q; want %q", tc.pod, tc.args, assumed, tc.assu)
		}
	}
	// An app that runs as the proxy's user is taken for the proxy: that must show.
	asProxy := func(pod map[string]any) {
		pod["spec"].(map[string]any)["securityContext"] = map[string]any{"runAsUser": 1337}
	}
	if f := explain(t, "meshed.yaml", asProxy, "--to", "10.1.2.3:80").Flow; *f.UID != 1337 || f.Rule != "out-proxy" || !strings.Contains(f.Assumed[0], "by the app's securityContext") {
		t.Errorf("an app as the proxy's user: %+v", f)
	}
	if f := explain(t, "vm.yaml", func(pod map[string]any) { delete(pod, "status") }, "--inbound", "80").Flow; f.PodIPs == nil || len(f.PodIPs) != 0 {
		t.Errorf("unknown addresses: %v, want an empty list", f.PodIPs)
	}
	if _, errs, exit := explainText(t, "vm.yaml", func(pod map[string]any) { delete(pod, "status") }, "--inbound", "80", "--interface", "k6t-eth0"); exit != exitUsage || !strings.Contains(errs, "give --pod-ip") {
		t.Errorf("a rerouted interface without addresses: %d, %q", exit, errs)
	}
}

// TestNotes: what the policy does not show is said.
func TestNotes(t *testing.T) {
	for _, tc := range []struct{ pod, key, value, want string }{
		{"invalid-drop.yaml", "a", "", "INVALID_DROP has no effect by eBPF, where no packet has a conntrack state to be invalid; it takes effect if iptables takes over"},
		{"invalid-drop.yaml", redirect.KeyDatapath, "ebpf", "INVALID_DROP has no effect by eBPF, where no packet has a conntrack state to be invalid"},
		{"invalid-drop.yaml", redirect.KeyDatapath, "iptables", ""},
		{"dns.yaml", "a", "", "INVALID_DROP has no effect by eBPF"},
		{"meshed.yaml", keyExcludeInboundPorts, "80", keyExcludeInboundPorts + " is not used: it counts only where all inbound ports are included"},
		{"tproxy.yaml", keyExcludeInboundPorts, "80", ""},
		{"vm.yaml", keyKubevirtInterfaces, "a", keyKubevirtInterfaces + " is not used"},
		{"meshed.yaml", keyIncludeOutboundRanges, "127.1.0.0/16", "a part of loopback is included"},
		{"meshed.yaml", "shunt.dev/datapth", "", "annotation shunt.dev/datapth is not used: no such key is known"},
		{"meshed.yaml", "example.com/x", "", ""},
		{"meshed.yaml", keyExcludeInterfaces, "eth0", "it has one interface besides lo; otherwise iptables takes over (exclude-interfaces)"},
	} {
		notes := explain(t, tc.pod, annotate(tc.key, tc.value)).Notes
		// The misspelt key of its own is another line's.
		notes = slices.DeleteFunc(notes, func(s string) bool { return strings.Contains(s, "excludeOutboundPort is") })
		if tc.want == "" && len(notes) > 0 || tc.want != "" && (len(notes) != 1 || !strings.Contains(notes[0], tc.want)) {
			t.Errorf("%s with %s %q: notes %q, want %q", tc.pod, tc.key, tc.value, notes, tc.want)
		}
	}
	nameless := func(pod map[string]any) { pod["metadata"].(map[string]any)["namespace"] = "" }
	if e := explain(t, "meshed.yaml", nameless); e.Pod.Namespace != "default" || len(e.Notes) != 1 || !e.Redirected {
		t.Errorf("a pod without a namespace: %+v", e)
	}
}
