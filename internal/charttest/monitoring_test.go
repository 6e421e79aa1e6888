// SPDX-License-Identifier: Apache-2.0

package charttest

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/install"
	"shunt.dev/shunt/internal/found"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
)

// What Prometheus' operator and Prometheus itself read.
type (
	ruleGroups struct {
		Groups []struct {
			Name  string  `json:"name"`
			Rules []alert `json:"rules"`
		} `json:"groups"`
	}
	alert struct {
		Alert       string            `json:"alert"`
		Expr        string            `json:"expr"`
		For         string            `json:"for"`
		Labels      map[string]string `json:"labels"`
		Annotations map[string]string `json:"annotations"`
	}
	relabeling struct {
		SourceLabels []string `json:"sourceLabels"`
		TargetLabel  string   `json:"targetLabel"`
	}
	dashboard struct {
		Title  string `json:"title"`
		Panels []struct {
			ID      int    `json:"id"`
			Title   string `json:"title"`
			Targets []struct {
				Expr string `json:"expr"`
			} `json:"targets"`
		} `json:"panels"`
		Templating struct {
			List []struct {
				Name  string          `json:"name"`
				Query json.RawMessage `json:"query"`
			} `json:"list"`
		} `json:"templating"`
	}
)

// monitored is the rendering with all of it.
func monitored(t *testing.T) *objects {
	t.Helper()
	return decode(t, render(t, values{
		"prometheus": values{"podMonitor": true, "rules": true, "labels": values{"release": "kps"}, "runbookURL": "https://example.org/OPERATIONS.md"},
		"grafana":    values{"dashboard": true},
	}).Manifest)
}

func rulesFile(t *testing.T) (r ruleGroups) {
	t.Helper()
	readYAML(t, filepath.Join(chartDir, "files", "alerts.yaml"), &r)
	if len(r.Groups) != 1 || len(r.Groups[0].Rules) < 10 {
		t.Fatalf("%d groups of alerts", len(r.Groups))
	}
	return r
}

func dashboardFile(t *testing.T) (d dashboard) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(chartDir, "files", "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestMonitoring: the chart brings what the files have, unchanged but for links.
func TestMonitoring(t *testing.T) {
	o := monitored(t)
	if o.Rules == nil || o.Monitor == nil || o.Dashboard == nil {
		t.Fatal("PrometheusRule, PodMonitor or the dashboard's ConfigMap is missing")
	}
	want := rulesFile(t)
	for i, r := range want.Groups[0].Rules {
		_, anchor, _ := strings.Cut(r.Annotations["runbook"], "#")
		want.Groups[0].Rules[i].Annotations["runbook_url"] = "https://example.org/OPERATIONS.md#" + anchor
	}
	if diff := cmp.Diff(want, o.Rules.Spec); diff != "" {
		t.Errorf("alerts (-file +chart):\n%s", diff)
	}
	for _, labels := range []map[string]string{o.Rules.Labels, o.Monitor.Labels} {
		if labels["release"] != "kps" {
			t.Errorf("labels %v", labels)
		}
	}

	file, err := os.ReadFile(filepath.Join(chartDir, "files", "dashboard.json"))
	if err != nil {
		t.Fatal(err)
	}
	if got := o.Dashboard.Data["shunt.json"]; strings.TrimSpace(got) != strings.TrimSpace(string(file)) {
		t.Errorf("the dashboard (-file +chart):\n%s", cmp.Diff(string(file), got))
	}
	if o.Dashboard.Labels["grafana_dashboard"] != "1" || o.Dashboard.Name == o.ConfigMap.Name {
		t.Errorf("the dashboard is %s, with labels %v", o.Dashboard.Name, o.Dashboard.Labels)
	}

	// What is to be scraped are ports that the pods have.
	pods := o.DaemonSet.Spec.Template
	for key, value := range o.Monitor.Spec.Selector.MatchLabels {
		if pods.Labels[key] != value {
			t.Errorf("the PodMonitor selects %s=%s, the pods have %q", key, value, pods.Labels[key])
		}
	}
	var ports []string
	for _, e := range o.Monitor.Spec.PodMetricsEndpoints {
		ports = append(ports, e.Port)
		if len(e.Relabelings) != 1 || e.Relabelings[0].TargetLabel != "node" {
			t.Errorf("port %s: relabelings %v", e.Port, e.Relabelings)
		}
	}
	if diff := cmp.Diff([]string{"metrics", "repair-metrics"}, ports); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
	for _, port := range ports {
		there := false
		for _, c := range pods.Spec.Containers {
			for _, p := range c.Ports {
				there = there || p.Name == port
			}
		}
		if !there {
			t.Errorf("no container has the port %s", port)
		}
	}
	plain := decode(t, render(t, values{"prometheus": values{"podMonitor": true, "rules": true}, "repair": values{"enabled": false}}).Manifest)
	if n := len(plain.Monitor.Spec.PodMetricsEndpoints); n != 1 {
		t.Errorf("without repair %d ports are scraped", n)
	}
	if diff := cmp.Diff(rulesFile(t), plain.Rules.Spec); diff != "" {
		t.Errorf("alerts without links (-file +chart):\n%s", diff)
	}
}

// selector and parsed are those of tools/promql.
type (
	selector struct {
		Metric   string
		Matchers []struct{ Label, Type, Value string }
	}
	parsed struct {
		Error     string
		Selectors []selector
		Labels    []string
	}
)

// parsePromQL has Prometheus' own parser take expressions apart.
func parsePromQL(t *testing.T, exprs []string) (out []parsed) {
	t.Helper()
	var in, stderr bytes.Buffer
	for _, e := range exprs {
		if err := json.NewEncoder(&in).Encode(e); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "run", ".")
	cmd.Dir = "../../tools/promql"
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-buildvcs=false")
	cmd.Stdin, cmd.Stderr = &in, &stderr
	data, err := cmd.Output()
	if err != nil {
		t.Fatalf("run tools/promql: %v\n%s", err, &stderr)
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	for range exprs {
		var p parsed
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		out = append(out, p)
	}
	return out
}

// documented are the metrics that docs/OPERATIONS.md has, with their labels: what
// the agent and the repair container export, by tests of theirs.
func documented(t *testing.T) map[string][]string {
	t.Helper()
	docs, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	all := map[string][]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(shunt_[a-z_]+)(?:\\{([a-z,]+)\\})?` \\|").FindAllStringSubmatch(string(docs), -1) {
		all[m[1]] = slices.DeleteFunc(strings.Split(m[2], ","), func(l string) bool { return l == "" })
	}
	if len(all) < 9 {
		t.Fatalf("docs/OPERATIONS.md has the metrics %v", all)
	}
	return all
}

// labelValues are those that metrics' labels can have, as far as they are known.
func labelValues() map[string][]string {
	v := map[string][]string{
		"backend":   {"ebpf", "iptables", "none"},
		"direction": {"outbound", "inbound"},
		"condition": {"netconf", "install", "datapath", "pods"},
		"type":      {"repair", "delete", "label", "lost", "wrong"},
		"result": {
			"ok", "failed", "already", "skipped", "found",
			install.ResultInstalled, install.ResultUpdated, install.ResultHealed, install.ResultWaiting, install.ResultFight,
		},
		"problem": {found.Problem, backends.ProblemNoListener, backends.ProblemHookMissing},
	}
	for _, reason := range redirect.FallbackReasons() {
		v["reason"] = append(v["reason"], string(reason))
	}
	for place := range bpf.ShuntPlace(64) {
		e := loader.ErrorCount{Place: place, Errno: 1}
		v["program"] = append(v["program"], e.Program())
		v["error"] = append(v["error"], e.Name())
	}
	return v
}

// TestQueries: each query of alerts and dashboard parses, and asks for metrics,
// labels and values that there are.
func TestQueries(t *testing.T) {
	metrics, known := documented(t), labelValues()
	targets := []string{"node", "instance"} // that a target has
	var exprs, names []string
	for _, r := range rulesFile(t).Groups[0].Rules {
		exprs, names = append(exprs, r.Expr), append(names, r.Alert)
	}
	fill := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*")
	for _, p := range dashboardFile(t).Panels {
		if len(p.Targets) == 0 {
			t.Errorf("panel %q asks nothing", p.Title)
		}
		for _, q := range p.Targets {
			exprs, names = append(exprs, fill.Replace(q.Expr)), append(names, "panel "+p.Title)
		}
	}
	used := map[string]bool{}
	for i, p := range parsePromQL(t, exprs) {
		if p.Error != "" {
			t.Errorf("%s: %s: %s", names[i], exprs[i], p.Error)
			continue
		}
		if len(p.Selectors) == 0 {
			t.Errorf("%s: no metric is asked for", names[i])
		}
		all := slices.Clone(targets)
		for _, s := range p.Selectors {
			base := s.Metric
			var own []string
			for _, suffix := range []string{"_bucket", "_count", "_sum"} {
				if _, ok := metrics[strings.TrimSuffix(base, suffix)]; ok && strings.HasSuffix(base, suffix) {
					base = strings.TrimSuffix(base, suffix)
					own = []string{"le"}
				}
			}
			labels, ok := metrics[base]
			if !ok {
				t.Errorf("%s: nobody exports %s", names[i], s.Metric)
				continue
			}
			used[base] = true
			own = append(own, labels...)
			all = append(all, own...)
			for _, m := range s.Matchers {
				if !slices.Contains(own, m.Label) && !slices.Contains(targets, m.Label) {
					t.Errorf("%s: %s has no label %s", names[i], s.Metric, m.Label)
				}
				pattern := m.Value
				if strings.HasSuffix(m.Type, "~") {
					pattern = "(" + pattern + ")"
				} else {
					pattern = regexp.QuoteMeta(pattern)
				}
				re := regexp.MustCompile("^" + pattern + "$")
				if !slices.Contains(targets, m.Label) && !slices.ContainsFunc(known[m.Label], re.MatchString) {
					t.Errorf("%s: %s%s%q matches no value that %s can have", names[i], m.Label, m.Type, m.Value, m.Label)
				}
			}
		}
		for _, l := range p.Labels {
			if !slices.Contains(all, l) {
				t.Errorf("%s: groups by %s, which nothing in it has", names[i], l)
			}
		}
	}
	for name := range metrics {
		if !used[name] {
			t.Errorf("%s is in no alert and no panel", name)
		}
	}
}

// TestAlerts: each says how bad it is and what to do, in a section of the
// documentation that there is.
func TestAlerts(t *testing.T) {
	docs, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(docs), -1) {
		sections[slug(m[1])] = true
	}
	variable := regexp.MustCompile(`\$labels\.(\w+)`)
	seen := map[string]bool{}
	rules := rulesFile(t).Groups[0].Rules
	parts := parsePromQL(t, func() (exprs []string) {
		for _, r := range rules {
			exprs = append(exprs, r.Expr)
		}
		return exprs
	}())
	for i, r := range rules {
		if seen[r.Alert] || !strings.HasPrefix(r.Alert, "Shunt") {
			t.Errorf("%s: its name is taken, or not Shunt's", r.Alert)
		}
		seen[r.Alert] = true
		if s := r.Labels["severity"]; s != "critical" && s != "warning" {
			t.Errorf("%s: severity %q", r.Alert, s)
		}
		if r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s: summary or description is missing", r.Alert)
		}
		file, anchor, _ := strings.Cut(r.Annotations["runbook"], "#")
		if file != "docs/OPERATIONS.md" || !sections[anchor] {
			t.Errorf("%s: its runbook is %s: no such section", r.Alert, r.Annotations["runbook"])
		}
		// Labels that an aggregation drops would be told as nothing.
		if len(parts[i].Labels) == 0 {
			continue
		}
		for _, m := range variable.FindAllStringSubmatch(r.Annotations["summary"]+r.Annotations["description"], -1) {
			if !slices.Contains(parts[i].Labels, m[1]) {
				t.Errorf("%s: names the label %s, which its expression drops", r.Alert, m[1])
			}
		}
	}
}

// slug is how a heading is linked to.
func slug(heading string) string {
	heading = strings.ToLower(heading)
	heading = regexp.MustCompile(`[^a-z0-9 _-]`).ReplaceAllString(heading, "")
	return strings.ReplaceAll(heading, " ", "-")
}

// TestDocsLinks: links within docs/OPERATIONS.md lead somewhere.
func TestDocsLinks(t *testing.T) {
	for _, name := range []string{"../../docs/OPERATIONS.md", "../../docs/INSTALL.md", "../../docs/ARCHITECTURE.md", "../../docs/CLI.md", "../../README.md"} {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\]\(([^)# ]*)(?:#([^) ]+))?\)`).FindAllStringSubmatch(string(data), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file := name
			if m[1] != "" {
				file = filepath.Join(filepath.Dir(name), m[1])
			}
			text, err := os.ReadFile(file)
			if st, err2 := os.Stat(file); err != nil && (err2 != nil || !st.IsDir()) {
				t.Errorf("%s: %s leads nowhere: %v", name, m[0], err)
				continue
			}
			there := m[2] == ""
			for _, h := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(string(text), -1) {
				there = there || slug(h[1]) == m[2]
			}
			if !there {
				t.Errorf("%s: %s leads to no section", name, m[0])
			}
		}
	}
}
