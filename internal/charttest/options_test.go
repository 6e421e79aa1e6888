// SPDX-License-Identifier: Apache-2.0

package charttest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/diff"
	"sigs.k8s.io/yaml"
)

// options has for each option of values.yaml at least one value other than its
// default, and lines of the rendering that are there because of it. The whole
// of what it changes is in testdata/options.
var options = []struct {
	name   string
	values values
	want   []string
}{
	// Those that Istio CNI has too.
	{"hub", values{"hub": "registry.example:5000/mesh"}, []string{"image: registry.example:5000/mesh/shunt-node:0.1.0"}},
	{"tag", values{"tag": "1.2.3"}, []string{"image: localhost/shunt/shunt-node:1.2.3"}},
	{"tag-digest", values{"tag": "1.2.3@sha256:" + strings.Repeat("0123456789abcdef", 4)}, []string{"image: localhost/shunt/shunt-node:1.2.3@sha256:" + strings.Repeat("0123456789abcdef", 4)}},
	{"pullPolicy", values{"pullPolicy": "Always"}, []string{"imagePullPolicy: Always"}},
	{"logLevel", values{"logLevel": "debug"}, []string{`"logLevel": "debug",`}},
	{"excludeNamespaces", values{"excludeNamespaces": []string{"a", "b"}}, []string{`"a",`, `"b"`}},
	{"excludeNamespaces-none", values{"excludeNamespaces": []string{}}, []string{`"excludeNamespaces": [],`}},
	{"cniBinDir", values{"cniBinDir": "/srv/bin"}, []string{"hostPath: {path: /srv/bin, type: DirectoryOrCreate}"}},
	{"cniConfDir", values{"cniConfDir": "/srv/conf"}, []string{"hostPath: {path: /srv/conf, type: DirectoryOrCreate}"}},
	{"cniCacheDir", values{"cniCacheDir": "/srv/cni"}, []string{"hostPath: {path: /srv/cni, type: DirectoryOrCreate}"}},
	{"cniConfFileName", values{"cniConfFileName": "10-calico.conflist"}, []string{"- --cni-conf-file-name=10-calico.conflist"}},
	{"chained", values{"chained": false, "cniConfFileName": "shunt-cni.conf"}, []string{"- --chained=false", `"name": "shunt-cni",`, `"cniVersion": "1.0.0",`}},
	{"psp_cluster_role", values{"psp_cluster_role": "psp:privileged"}, []string{"name: shunt-node-psp", "name: psp:privileged"}},
	{"podAnnotations", values{"podAnnotations": values{"example.org/a": "b"}}, []string{"example.org/a: b"}},
	{"repair.enabled", values{"repair": values{"enabled": false}}, nil},
	{"repair.hub", values{"repair": values{"hub": "registry.example/repair"}}, []string{"image: registry.example/repair/shunt-node:0.1.0"}},
	{"repair.tag", values{"repair": values{"tag": "9"}}, []string{"image: localhost/shunt/shunt-node:9"}},
	{"repair.initContainerName", values{"repair": values{"initContainerName": "check"}}, []string{"- --init-container-name=check"}},
	{"repair.labelPods", values{"repair": values{"labelPods": false}}, []string{"- --label-pods=false"}},
	{"repair.deletePods", values{"repair": values{"deletePods": false}}, []string{"- --delete-pods=false", "verbs: [patch]"}},
	{"repair.brokenPodLabelKey", values{"repair": values{"brokenPodLabelKey": "example.org/broken"}}, []string{"- --broken-pod-label-key=example.org/broken"}},
	{"repair.brokenPodLabelValue", values{"repair": values{"brokenPodLabelValue": "yes"}}, []string{"- --broken-pod-label-value=yes"}},
	{"repair.repairPods", values{"repair": values{"repairPods": false}}, []string{"- --repair-pods=false"}},

	// Shunt's own.
	{"platform", values{"platform": "k3s"}, []string{"hostPath: {path: /var/lib/rancher/k3s/data/cni, type: DirectoryOrCreate}"}},
	{"datapath", values{"datapath": "iptables"}, []string{`"datapath": "iptables",`}},
	{"inboundHook", values{"inboundHook": "tc"}, []string{`"inboundHook": "tc",`}},
	{"iptablesBackend", values{"iptablesBackend": "legacy"}, []string{`"iptablesBackend": "legacy",`}},
	{"includeInboundPortsDefault", values{"includeInboundPortsDefault": "*"}, []string{`"includeInboundPortsDefault": "*",`}},
	{"nativeRuntimeClasses", values{"nativeRuntimeClasses": []string{"nvidia"}}, []string{`"nvidia"`}},
	{"podFactsTimeout", values{"podFactsTimeout": "1m30s"}, []string{`"podFactsTimeout": "1m30s",`}},
	{"proxy.containerName", values{"proxy": values{"containerName": "envoy"}}, []string{`"containerName": "envoy",`}},
	{"proxy.uid", values{"proxy": values{"uid": 4294967294}}, []string{`"uid": 4294967294`}},
	{"proxy.gid", values{"proxy": values{"gid": 2102}}, []string{`"gid": 2102,`}},
	{"proxy.outboundPort", values{"proxy": values{"outboundPort": 4140}}, []string{`"outboundPort": 4140,`}},
	{"proxy.inboundPort", values{"proxy": values{"inboundPort": 4143}}, []string{`"inboundPort": 4143,`}},
	{"proxy.tunnelPort", values{"proxy": values{"tunnelPort": 4144}}, []string{`"tunnelPort": 4144,`}},
	{"proxy.dnsPort", values{"proxy": values{"dnsPort": 4145}}, []string{`"dnsPort": 4145,`}},
	{"proxy.excludeInboundPorts", values{"proxy": values{"excludeInboundPorts": []int{4190}}}, []string{`4190`}},
	{"runDir", values{"runDir": "/srv/run"}, []string{`"runDir": "/srv/run",`, "- --run-dir=/srv/run", "hostPath: {path: /srv/run, type: DirectoryOrCreate}", "- {name: run, mountPath: /srv/run}"}},
	{"bpfDir", values{"bpfDir": "/sys/fs/bpf/mesh/shunt"}, []string{`"bpfDir": "/sys/fs/bpf/mesh/shunt",`}},
	{"bpfDir-elsewhere", values{"bpfDir": "/srv/bpffs/shunt"}, []string{"hostPath: {path: /srv/bpffs}", "- {name: bpffs, mountPath: /srv/bpffs, mountPropagation: HostToContainer}"}},
	{"cgroupRoot", values{"cgroupRoot": "/sys/fs/cgroup/unified"}, []string{`"cgroupRoot": "/sys/fs/cgroup/unified",`}},
	{"cgroupRoot-elsewhere", values{"cgroupRoot": "/srv/cgroup2"}, []string{"hostPath: {path: /srv/cgroup2}", "- {name: cgroup, mountPath: /srv/cgroup2, mountPropagation: HostToContainer, readOnly: true}"}},
	{"agentLogLevel", values{"agentLogLevel": "debug"}, []string{"- --log-level=debug"}},
	{"repair.respectDisruptionBudgets", values{"repair": values{"respectDisruptionBudgets": true}}, []string{"- --respect-disruption-budgets=true", "resources: [pods/eviction]"}},
	{"repair.criSocket", values{"repair": values{"criSocket": "/run/crio/crio.sock"}}, []string{"- --cri-socket=/host/cri/crio.sock", "hostPath: {path: /run/crio}"}},
	{"repair.netnsDir", values{"repair": values{"netnsDir": "/run/docker/netns"}}, []string{"hostPath: {path: /run/docker/netns, type: DirectoryOrCreate}"}},
	{"repair.resources", values{"repair": values{"resources": values{"limits": values{"memory": "77Mi"}}}}, []string{"memory: 77Mi"}},
	{"prometheus.scrape", values{"prometheus": values{"scrape": false}}, nil},
	{"prometheus.podMonitor", values{"prometheus": values{"podMonitor": true, "labels": values{"release": "kps"}}}, []string{"kind: PodMonitor", "- port: repair-metrics", "release: kps"}},
	{"prometheus.rules", values{"prometheus": values{"rules": true, "runbookURL": "https://example.org/OPERATIONS.md"}}, []string{"kind: PrometheusRule", "- alert: ShuntNotInstalled", "runbook_url: https://example.org/OPERATIONS.md#pods-do-not-start"}},
	{"grafana.dashboard", values{"grafana": values{"dashboard": true, "labels": values{"my_dashboard": "yes"}}}, []string{"name: shunt-node-dashboard", `grafana_dashboard: "1"`, `my_dashboard: "yes"`, "shunt.json: |"}},
	{"podLabels", values{"podLabels": values{"team": "mesh"}}, []string{"team: mesh"}},
	{"imagePullSecrets", values{"imagePullSecrets": []values{{"name": "pull"}}}, []string{"- name: pull"}},
	{"resources", values{"resources": values{"limits": values{"memory": "1Gi"}}}, []string{"memory: 1Gi"}},
	{"tolerations", values{"tolerations": []values{{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}}}, []string{"key: gpu"}},
	{"nodeSelector", values{"nodeSelector": values{"mesh": "true"}}, []string{`mesh: "true"`}},
	{"affinity", values{"affinity": values{"nodeAffinity": values{"requiredDuringSchedulingIgnoredDuringExecution": values{"nodeSelectorTerms": []values{
		{"matchExpressions": []values{{"key": "virtual", "operator": "DoesNotExist"}}},
	}}}}}, []string{"- key: virtual"}},
	{"priorityClassName", values{"priorityClassName": "mine"}, []string{"priorityClassName: mine"}},
	{"updateStrategy", values{"updateStrategy": values{"rollingUpdate": values{"maxUnavailable": "10%"}}}, []string{"maxUnavailable: 10%"}},
	{"updateStrategy-OnDelete", values{"updateStrategy": values{"type": "OnDelete"}}, []string{"type: OnDelete"}},
	{"terminationGracePeriodSeconds", values{"terminationGracePeriodSeconds": 70}, []string{"terminationGracePeriodSeconds: 70"}},
	{"hostNetwork", values{"hostNetwork": true}, []string{"hostNetwork: true", "dnsPolicy: ClusterFirstWithHostNet"}},
	{"seccompProfile", values{"seccompProfile": values{"type": "Unconfined"}}, []string{"type: Unconfined"}},
	{"seLinuxOptions", values{"seLinuxOptions": values{"type": "spc_t"}}, []string{"type: spc_t"}},
	{"appArmorProfile", values{"appArmorProfile": values{"type": "Localhost", "localhostProfile": "shunt"}}, []string{"localhostProfile: shunt", "type: Localhost"}},
	{"extraCapabilities", values{"extraCapabilities": []string{"DAC_OVERRIDE", "NET_ADMIN"}}, []string{"- DAC_OVERRIDE"}},
	{"resourceQuota", values{"resourceQuota": values{"enabled": true, "pods": 10}}, []string{`pods: "10"`, "values: [system-node-critical]"}},
}

// TestOptions shows the effect of each option: the lines of the table are
// there, and the change as a whole is the one of testdata/options.
func TestOptions(t *testing.T) {
	dir := filepath.Join("testdata", "options")
	before := render(t, nil).Manifest
	if *update {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var files []string
	for _, o := range options {
		files = append(files, o.name+".diff")
		t.Run(o.name, func(t *testing.T) {
			after := render(t, o.values).Manifest
			if after == before {
				t.Fatal("it changes nothing")
			}
			old, lines := strings.Fields(""), strings.Split(after, "\n")
			for line := range strings.SplitSeq(before, "\n") {
				old = append(old, strings.TrimSpace(line))
			}
			for i, line := range lines {
				lines[i] = strings.TrimSpace(line)
			}
			for _, want := range o.want {
				if count(lines, want) <= count(old, want) {
					t.Errorf("no line %q came to be", want)
				}
			}
			golden(t, filepath.Join(dir, o.name+".diff"), diff.Diff("default", []byte(before), o.name, []byte(after)))
		})
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains(files, e.Name()) {
			t.Errorf("%s is of no case", filepath.Join(dir, e.Name()))
		}
	}
}

func count(lines []string, line string) (n int) {
	for _, l := range lines {
		if l == line {
			n++
		}
	}
	return n
}

// golden compares with a file, or with -update writes it.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v (make manifests writes it)", err)
	}
	if string(got) != string(want) {
		t.Errorf("not what is in %s (make manifests writes it):\n%s", file, diff.Diff("want", want, "got", got))
	}
}

// TestOptionsAreComplete holds values.yaml, its schema, the cases above and the
// documentation together.
func TestOptionsAreComplete(t *testing.T) {
	var defaults, schema values
	readYAML(t, filepath.Join(chartDir, "values.yaml"), &defaults)
	readYAML(t, filepath.Join(chartDir, "values.schema.json"), &schema)
	docs, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(docs), "\n## The chart\n")
	section, _, _ = strings.Cut(section, "\n## ")

	names := leaves("", defaults)
	for _, name := range names {
		tested := slices.ContainsFunc(options, func(o struct {
			name   string
			values values
			want   []string
		},
		) bool {
			return slices.ContainsFunc(leaves("", o.values), func(l string) bool {
				return l == name || strings.HasPrefix(l, name+".") || strings.HasPrefix(name, l+".")
			})
		})
		if !tested {
			t.Errorf("%s: no case of TestOptions sets it", name)
		}
		if !strings.Contains(section, "`"+name+"`") {
			t.Errorf("%s: not in docs/OPERATIONS.md, \"The chart\"", name)
		}
	}
	known := schemaNames("", schema)
	for _, name := range known {
		if name != "global" && !slices.Contains(names, name) && !slices.ContainsFunc(names, func(n string) bool {
			return strings.HasPrefix(n, name+".") || strings.HasPrefix(name, n+".")
		}) {
			t.Errorf("%s: in the schema, but not in values.yaml", name)
		}
	}
	for _, name := range names {
		if !slices.Contains(known, name) {
			t.Errorf("%s: in values.yaml, but not in the schema", name)
		}
	}
}

// deep are the maps whose keys are options; other maps are values.
var deep = []string{"proxy", "repair", "prometheus", "grafana"}

func leaves(prefix string, v values) (names []string) {
	for key, value := range v {
		if sub, ok := value.(values); ok && prefix == "" && slices.Contains(deep, key) {
			names = append(names, leaves(key+".", sub)...)
			continue
		}
		names = append(names, prefix+key)
	}
	slices.Sort(names)
	return names
}

func schemaNames(prefix string, schema values) (names []string) {
	properties, _ := schema["properties"].(values)
	for key, value := range properties {
		if sub, ok := value.(values); ok && prefix == "" && slices.Contains(deep, key) {
			names = append(names, schemaNames(key+".", sub)...)
			continue
		}
		names = append(names, prefix+key)
	}
	slices.Sort(names)
	return names
}

func readYAML(t *testing.T, file string, into any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}
