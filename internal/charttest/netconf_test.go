// SPDX-License-Identifier: Apache-2.0

package charttest

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
)

// netconfOf reads the rendered entry as the plugin does.
func netconfOf(t *testing.T, o *objects) *netconf.Config {
	t.Helper()
	conf, err := netconf.Parse([]byte(o.ConfigMap.Data["netconf.json"]))
	if err != nil {
		t.Fatalf("the plugin refuses the rendered entry: %v", err)
	}
	return conf
}

func TestNetconfDefaults(t *testing.T) {
	want := netconf.Default()
	want.Type = "shunt-cni"
	want.Redirect.ExcludeNamespaces = []string{"istio-system", "kube-system"}
	got := netconfOf(t, decode(t, render(t, nil).Manifest))
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(netconf.Config{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the chart's defaults (-the plugin's +the chart's):\n%s", diff)
	}
}

// TestNetconfKeys: every key that an operator sets is in the entry, and none
// that is not the operator's.
func TestNetconfKeys(t *testing.T) {
	for _, c := range []struct {
		values values
		more   []string
	}{
		{nil, nil},
		{on("openshift"), []string{"name", "cniVersion"}},
	} {
		var entry map[string]json.RawMessage
		data := decode(t, render(t, c.values).Manifest).ConfigMap.Data
		if len(data) != 1 {
			t.Errorf("the ConfigMap has %d files", len(data))
		}
		if err := json.Unmarshal([]byte(data["netconf.json"]), &entry); err != nil {
			t.Fatal(err)
		}
		want := append([]string{
			"type", "capabilities", "logLevel", "runDir", "bpfDir", "cgroupRoot", "excludeNamespaces", "datapath", "inboundHook",
			"iptablesBackend", "includeInboundPortsDefault", "nativeRuntimeClasses", "podFactsTimeout", "proxy",
		}, c.more...)
		slices.Sort(want)
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(entry))); diff != "" {
			t.Errorf("%v: keys (-want +got):\n%s", c.values, diff)
		}
		if got := string(entry["capabilities"]); !strings.Contains(got, `"cgroupPath": true`) || !strings.Contains(got, `"io.kubernetes.cri.pod-annotations": true`) {
			t.Errorf("capabilities: %s", got)
		}
	}
}

func TestNetconfAllSet(t *testing.T) {
	got := netconfOf(t, decode(t, render(t, values{
		"logLevel": "debug", "runDir": "/srv/run", "bpfDir": "/sys/fs/bpf/other", "cgroupRoot": "/sys/fs/cgroup/unified",
		"excludeNamespaces": []string{"istio-system", "a"}, "datapath": "ebpf", "inboundHook": "tc", "iptablesBackend": "nft",
		"includeInboundPortsDefault": "*", "nativeRuntimeClasses": []string{"nvidia", "crun.v2"}, "podFactsTimeout": "1m30s",
		"proxy": values{
			"containerName": "linkerd-proxy", "uid": 2102, "gid": 4294967294, "outboundPort": 4140, "inboundPort": 4143,
			"tunnelPort": 1, "dnsPort": 65535, "excludeInboundPorts": []int{4190},
		},
	}).Manifest))
	want := &netconf.Config{
		Type: "shunt-cni", LogLevel: "debug", RunDir: "/srv/run", Kubeconfig: "/srv/run/kubeconfig", BPFDir: "/sys/fs/bpf/other",
		CgroupRoot: "/sys/fs/cgroup/unified", Datapath: "ebpf", InboundHook: "tc", IptablesBackend: "nft", PodFactsTimeout: 90 * time.Second,
		Redirect: redirect.Config{
			ExcludeNamespaces:          []string{"istio-system", "a"},
			ProxyContainer:             "linkerd-proxy",
			Proxy:                      redirect.Proxy{UID: 2102, GID: 4294967294, OutboundPort: 4140, InboundPort: 4143, TunnelPort: 1, DNSPort: 65535},
			ProxyExcludeInboundPorts:   []uint16{4190},
			IncludeInboundPortsDefault: "*",
			NativeRuntimeClasses:       []string{"nvidia", "crun.v2"},
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(netconf.Config{})); diff != "" {
		t.Errorf("configuration (-want +got):\n%s", diff)
	}
}

// TestSchemaAgreesWithPlugin: what the schema lets through, the plugin takes;
// what the plugin refuses, the schema has refused before it reaches a node. The
// schema may be the stricter of the two, but not with a value of the ok list.
func TestSchemaAgreesWithPlugin(t *testing.T) {
	names := strings.Repeat("n", 63)
	paths := []any{"", "run", "/", "//", "/a", "/a/", "/a/b", "/a/../b", "/..", "/..a/b", "/a/..b/c", "/a/./b", "/a//b", 5, nil, true, []string{"/a"}}
	for key, c := range map[string]struct{ ok, bad []any }{
		"logLevel":                   {[]any{"panic", "fatal", "error", "warn", "info", "debug"}, []any{"", "WARN", "trace", 1, nil}},
		"datapath":                   {[]any{"auto", "ebpf", "iptables"}, []any{"", "eBPF", "bpf", nil, 1}},
		"inboundHook":                {[]any{"auto", "sk_lookup", "tc"}, []any{"", "sk-lookup", nil}},
		"iptablesBackend":            {[]any{"auto", "nft", "legacy"}, []any{"", "nftables", nil}},
		"includeInboundPortsDefault": {[]any{"containerPorts", "*"}, []any{"", "80", 80, nil}},
		"excludeNamespaces":          {[]any{[]string{}, []string{"a"}, []string{names}, []string{"a-b", "0"}}, []any{"a", []string{""}, []string{"A"}, []string{"a.b"}, []string{names + "n"}, []any{1}, nil, []string{"-a"}, []string{"a-"}}},
		"nativeRuntimeClasses":       {[]any{[]string{}, []string{"nvidia"}, []string{"a.b-c.0"}}, []any{"a", []string{""}, []string{".a"}, []string{"a..b"}, []string{"A"}, []string{"a-.b"}, []string{strings.Repeat("a.", 127) + "a"}, nil}},
		"podFactsTimeout":            {[]any{"1s", "30s", "99s", "100s", "600s", "1m", "9m", "10m", "1m30s", "9m59s", "2m0s"}, []any{"", "0s", "601s", "11m", "10m1s", "-1s", "30", 30, "1h", "1d", nil, "1m60s", "999s", "1.5m", "500ms"}},
		"proxy.containerName":        {[]any{"a", "istio-proxy", names}, []any{"", "A", "a.b", "a_b", names + "n", 1, nil}},
		"proxy.uid":                  {[]any{1, 1337, 2147483648, 4294967294}, []any{0, -1, 4294967295, 4294967296, "1337", 1.5, nil, true}},
		"proxy.gid":                  {[]any{1, 1337, 4294967294}, []any{0, -1, 4294967295, "1337", nil}},
		"proxy.outboundPort":         {[]any{1, 80, 65535}, []any{0, -1, 65536, "80", 1.5, nil, 15006, 15008, 15053}},
		"proxy.inboundPort":          {[]any{1, 65535}, []any{0, 65536, "80", nil, 15001, 15008, 15053}},
		"proxy.tunnelPort":           {[]any{1, 65535}, []any{0, 65536, nil, 15001, 15006, 15053}},
		"proxy.dnsPort":              {[]any{1, 53, 65535}, []any{0, 65536, nil, 15001, 15006, 15008}},
		"proxy.excludeInboundPorts":  {[]any{[]int{}, []int{1, 65535}, []int{15001}}, []any{[]int{0}, []int{65536}, 80, []string{"80"}, nil, "80"}},
		"proxy.other":                {nil, []any{1, "a"}},
		"runDir":                     {[]any{"/run/shunt", "/a/..b", "/.a/b"}, slices.Concat(paths[:5], []any{"/a/", "/a/./b", "/a//b"})},
		"bpfDir":                     {[]any{"/sys/fs/bpf/shunt", "/a/b"}, slices.Concat(paths[:5], []any{"/a/../b"})},
		"cgroupRoot":                 {[]any{"", "/sys/fs/cgroup", "/a"}, []any{"a", "/a/../b", "/..", 5}},
	} {
		t.Run(key, func(t *testing.T) {
			for _, value := range c.ok {
				a := ask(t, request{Values: set(values{}, key, value)})
				if a.Error != "" {
					t.Errorf("%v is refused: %s", value, a.Error)
					continue
				}
				netconfOf(t, decode(t, a.Manifest))
			}
			for _, value := range c.bad {
				a := ask(t, request{Values: set(values{}, key, value)})
				if a.Error == "" {
					t.Errorf("%v is let through", value)
				} else if last := key[strings.LastIndex(key, ".")+1:]; !strings.Contains(a.Error, last) {
					t.Errorf("%v: the error does not name the key: %s", value, a.Error)
				}
			}
			if strings.HasSuffix(key, "Dir") || key == "cgroupRoot" {
				for _, value := range paths {
					if a := ask(t, request{Values: set(values{}, key, value)}); a.Error == "" {
						netconfOf(t, decode(t, a.Manifest))
					}
				}
			}
		})
	}
}

// TestRefusals has what is not of the plugin's configuration.
func TestRefusals(t *testing.T) {
	for key, bad := range map[string][]any{
		"hubb":                          {"a"},
		"cniBindir":                     {"/opt/cni/bin"},
		"repair.delete":                 {true},
		"prometheus.scrape":             {"yes", nil},
		"hub":                           {"", "Has Space", "UPPER", "a/", nil, 1},
		"tag":                           {"a b", 1.5, "a:b", "@sha256:0"},
		"pullPolicy":                    {"", "always", nil},
		"platform":                      {"eks", "GKE", nil},
		"cniBinDir":                     {"opt/cni/bin", "/opt/../bin"},
		"cniConfDir":                    {"etc", "/a/.."},
		"cniConfFileName":               {"a", "/etc/cni/net.d/a.conf", ".a.conf", "a.yaml"},
		"chained":                       {"false", 0},
		"agentLogLevel":                 {"", "trace", "warning"},
		"repair.initContainerName":      {"", "A"},
		"repair.brokenPodLabelKey":      {"", "a b", "/a", "a/", "a/b/c"},
		"repair.brokenPodLabelValue":    {"a b", "-", true},
		"repair.deletePods":             {"true", nil},
		"repair.criSocket":              {"unix:///run/a.sock", "/a.sock", "/run/../a.sock"},
		"repair.netnsDir":               {"netns"},
		"podAnnotations":                {values{"a": 1}, []string{"a"}},
		"tolerations":                   {values{}, []values{{"operators": "Exists"}}, []values{{"operator": "exists"}}},
		"updateStrategy.type":           {"Recreate", nil},
		"updateStrategy.rollingUpdate":  {values{"maxUnavailable": "101%"}, values{"max": 1}},
		"terminationGracePeriodSeconds": {0, 29, "30", -1},
		"hostNetwork":                   {"true"},
		"seccompProfile":                {values{"type": "None"}, values{"type": "Localhost"}},
		"appArmorProfile":               {values{"type": "unconfined"}},
		"extraCapabilities":             {[]string{"CAP_NET_RAW"}, []string{"net_raw"}},
		"resourceQuota.pods":            {0, "5"},
		"imagePullSecrets":              {[]string{"a"}, []values{{"names": "a"}}},
		"affinity":                      {values{"nodeaffinity": values{}}},
		"resources":                     {values{"request": values{}}},
	} {
		for _, value := range bad {
			if a := ask(t, request{Values: set(values{}, key, value)}); a.Error == "" {
				t.Errorf("%s=%v is let through", key, value)
			}
		}
	}
	if a := ask(t, request{Values: values{"chained": false}}); !strings.Contains(a.Error, "cniConfFileName is empty") {
		t.Errorf("chained=false without a file name: %q", a.Error)
	}
	if a := ask(t, request{Values: values{"proxy": values{"dnsPort": 15001}}}); !strings.Contains(a.Error, "proxy.dnsPort: 15001 is not a port of its own: proxy.outboundPort has it too") {
		t.Errorf("a port twice: %q", a.Error)
	}
	if a := ask(t, request{Values: values{"global": values{"anything": fmt.Sprint(1)}}}); a.Error != "" {
		t.Errorf("as part of another chart: %s", a.Error)
	}
}
