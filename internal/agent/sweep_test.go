// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"shunt.dev/shunt/internal/found"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
)

// sweepBed is a sweeper that is told what the node's pods are.
type sweepBed struct {
	*sweeper
	out    bytes.Buffer
	status []backends.Status
	err    error
}

func newSweepBed(t *testing.T, runDir string) *sweepBed {
	b := &sweepBed{}
	b.sweeper = newSweeper(nil, runDir, newMetrics(func() bool { return true }), logTo(&b.out))
	b.sweeper.status = func(context.Context, *config) ([]backends.Status, error) { return b.status, b.err }
	return b
}

func (b *sweepBed) again(t *testing.T, err error, pods ...backends.Status) (logged string) {
	b.status, b.err = pods, err
	b.out.Reset()
	b.sweep(t.Context(), &config{Config: netconf.Default()})
	return b.out.String()
}

func podStatus(name string, d redirect.Datapath, out uint64, problems ...backends.Problem) backends.Status {
	return backends.Status{
		Attachment: redirect.Attachment{ContainerID: "c-" + name, IfName: "eth0"},
		Pod:        redirect.PodRef{Namespace: "shop", Name: name},
		Datapath:   d,
		Flows:      []backends.Flow{{Direction: "outbound", Rule: "out-include-cidr", Count: out}},
		Errors:     []backends.ErrorCount{{Program: "connect", Error: "EPERM", Count: out / 2}},
		Problems:   problems,
	}
}

// TestSweep: pods are counted, their counters added up, their problems told once.
func TestSweep(t *testing.T) {
	dir := t.TempDir()
	b := newSweepBed(t, dir)
	mptcp := backends.Problem{Name: backends.ProblemListener, Text: "the listener could not be registered", Remedy: "annotate the pod with shunt.dev/inbound-hook: tc"}
	expect := func(what, want string) {
		t.Helper()
		err := testutil.GatherAndCompare(b.metrics.registry, strings.NewReader(want), "shunt_pods", "shunt_flows_total", "shunt_datapath_errors_total")
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	const head = `
# HELP shunt_pods Pods of this node that are redirected, by what redirects them.
# TYPE shunt_pods gauge
shunt_pods{backend="ebpf"} `
	text := func(ebpf, iptables, flows, errs string) string {
		return head + ebpf + "\nshunt_pods{backend=\"iptables\"} " + iptables + `
# HELP shunt_flows_total Connections of this node's pods that a rule has decided (eBPF only).
# TYPE shunt_flows_total counter
shunt_flows_total{direction="outbound",rule="out-include-cidr"} ` + flows + `
# HELP shunt_datapath_errors_total What the eBPF programs of this node's pods could not do.
# TYPE shunt_datapath_errors_total counter
shunt_datapath_errors_total{error="EPERM",program="connect"} ` + errs + "\n"
	}

	logged := b.again(t, nil, podStatus("a", redirect.EBPF, 10, mptcp), podStatus("b", redirect.EBPF, 4), podStatus("c", redirect.Iptables, 0))
	expect("three pods", text("2", "1", "14", "7"))
	if !strings.Contains(logged, `level=WARN msg="a pod has a problem" pod=shop/a problem=listener-refused`) || !strings.Contains(logged, "shunt.dev/inbound-hook: tc") || strings.Count(logged, "\n") != 1 {
		t.Errorf("logged %s", logged)
	}
	if logged := b.again(t, nil, podStatus("a", redirect.EBPF, 10, mptcp), podStatus("b", redirect.EBPF, 5, mptcp)); strings.Count(logged, "\n") != 1 || !strings.Contains(logged, "pod=shop/b") {
		t.Errorf("logged again: %s", logged)
	}
	expect("one goes, one grows", text("2", "0", "15", "7"))
	if logged := b.again(t, errors.New("a record can't be parsed"), podStatus("a", redirect.EBPF, 11, mptcp)); !strings.Contains(logged, "a record can't be parsed") || strings.Contains(logged, "pod=") {
		t.Errorf("logged %s", logged)
	}
	expect("not all could be read", text("1", "0", "16", "7"))
	if logged := b.again(t, errors.New("a record can't be parsed")); logged != "" {
		t.Errorf("the same error is logged again: %s", logged)
	}
	b.again(t, nil)
	expect("none", text("0", "0", "16", "7"))
	if logged := b.again(t, nil, podStatus("d", redirect.Iptables, 0, backends.Problem{Name: backends.ProblemStale})); logged != "" {
		t.Errorf("what the agent can't see is logged: %s", logged)
	}
	if logged := b.again(t, nil, podStatus("a", redirect.EBPF, 1, mptcp)); !strings.Contains(logged, "pod=shop/a") {
		t.Errorf("another pod of that name: logged %s", logged)
	}
	expect("another pod", text("1", "0", "17", "7"))

	b = newSweepBed(t, dir)
	b.again(t, nil, podStatus("a", redirect.EBPF, 3))
	expect("another agent", text("1", "0", "19", "8"))
}

// TestSweepTells: /readyz and shunt_pod_problems say of the pods what the agent can
// tell, with those that repair has found to have nothing.
func TestSweepTells(t *testing.T) {
	dir := t.TempDir()
	b := newSweepBed(t, dir)
	problem := func(name string) backends.Problem { return backends.Problem{Name: name} }
	expect := func(ok bool, says, metrics string) {
		t.Helper()
		if got, text := b.condition(); got != ok || text != says {
			t.Errorf("%v, %s\nwant %v, %s", got, text, ok, says)
		}
		if metrics != "" {
			metrics = "# HELP shunt_pod_problems Pods of this node that have a problem now, by problem; the log and `shunt status` say which, and what mends it.\n# TYPE shunt_pod_problems gauge\n" + metrics
		}
		if err := testutil.GatherAndCompare(b.metrics.registry, strings.NewReader(metrics), "shunt_pod_problems"); err != nil {
			t.Error(err)
		}
	}
	expect(true, "the node's pods have not been looked at yet", "")

	b.again(t, nil, podStatus("a", redirect.EBPF, 1), podStatus("b", redirect.Iptables, 0, problem(backends.ProblemRules)))
	expect(true, "1 pods by ebpf, 1 by iptables", "") // rules are not for the agent to judge

	if err := found.Write(dir, []redirect.PodRef{{Namespace: "shop", Name: "a"}, {Namespace: "shop", Name: "lost"}}); err != nil {
		t.Fatal(err)
	}
	b.again(t, nil, podStatus("a", redirect.EBPF, 1, problem(backends.ProblemNoListener)), podStatus("b", redirect.EBPF, 1, problem(backends.ProblemNoListener)))
	expect(false, "2 pods by ebpf, 0 by iptables; 2 with problem no-listener (shop/a …); 1 with problem not-redirected (shop/lost): `shunt status` on the node says more",
		"shunt_pod_problems{problem=\"no-listener\"} 2\nshunt_pod_problems{problem=\"not-redirected\"} 1\n")

	if err := found.Write(dir, nil); err != nil {
		t.Fatal(err)
	}
	b.again(t, errors.New("a record can't be parsed"), podStatus("a", redirect.EBPF, 1))
	expect(false, "1 pods by ebpf, 0 by iptables; not all can be told: a record can't be parsed", "")
	b.again(t, nil)
	expect(true, "0 pods by ebpf, 0 by iptables", "")
}

// TestMetricsDocumented: docs/OPERATIONS.md has each metric with its labels. The
// tests of alerts and dashboard go by that.
func TestMetricsDocumented(t *testing.T) {
	docs, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	m := newMetrics(func() bool { return true })
	m.pods.WithLabelValues("ebpf")
	m.problems.WithLabelValues("no-listener")
	m.flows.WithLabelValues("outbound", "out-include-cidr")
	m.errors.WithLabelValues("connect", "EPERM")
	m.installs.WithLabelValues("installed")
	m.registry.MustRegister(&health{conditions: []condition{{name: "install", check: func() (bool, string) { return true, "" }}}})
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	own := 0
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "shunt_") {
			continue
		}
		own++
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		row := regexp.MustCompile("(?m)^\\| `" + f.GetName() + "(?:\\{([a-z,]+)\\})?` \\|").FindStringSubmatch(string(docs))
		if row == nil {
			t.Errorf("%s is not in docs/OPERATIONS.md", f.GetName())
			continue
		}
		got := strings.Split(row[1], ",")
		slices.Sort(got)
		if strings.Join(got, ",") != strings.Join(labels, ",") {
			t.Errorf("%s has the labels %v, in docs/OPERATIONS.md %v", f.GetName(), labels, got)
		}
	}
	if own != 9 {
		t.Errorf("%d metrics: some were not asked for", own)
	}
}

// TestMetricsLint: the metrics are named as Prometheus wants it.
func TestMetricsLint(t *testing.T) {
	m := newMetrics(func() bool { return true })
	m.setup.WithLabelValues("ebpf", "ok").Observe(1)
	m.pods.WithLabelValues("ebpf").Set(1)
	m.problems.WithLabelValues("no-listener").Set(1)
	m.fallbacks.WithLabelValues("no-cgroup2").Inc()
	m.flows.WithLabelValues("outbound", "out-include-cidr").Inc()
	m.errors.WithLabelValues("connect", "EPERM").Inc()
	m.installs.WithLabelValues("ok").Inc()
	problems, err := testutil.GatherAndLint(m.registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	names := map[string]bool{}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		names[f.GetName()] = true
	}
	for _, want := range []string{
		"shunt_pod_setup_seconds", "shunt_pods", "shunt_fallback_total", "shunt_flows_total", "shunt_datapath_errors_total",
		"shunt_install_total", "shunt_install_ready", "go_goroutines", "process_cpu_seconds_total",
	} {
		if !names[want] {
			t.Errorf("%s is missing", want)
		}
	}
}
