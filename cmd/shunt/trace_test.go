// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/trace"
	"shunt.dev/shunt/redirect"
)

var tracedCases = []struct {
	name string
	d    trace.Decision
	pod  *podName
	text string // the columns, without the time
	json string
}{
	{
		"redirected",
		trace.Decision{Rule: bpf.ShuntRule(redirect.RuleOutIncludeCIDR), Protocol: unix.IPPROTO_TCP, Dst: netip.MustParseAddrPort("10.99.3.4:80"), PID: 4711, Command: "curl", UID: 1000, GID: 1001},
		&podName{Namespace: "shop", Name: "reviews", UID: "u"},
		"shop/reviews curl/4711 10.99.3.4:80 OUT out-include-cidr",
		`{"type":"decision","time":"2026-01-02T03:04:05.000006Z","pod":{"namespace":"shop","name":"reviews","uid":"u"},"direction":"outbound","proto":"tcp","process":{"pid":4711,"name":"curl","uid":1000,"gid":1001},"destination":"10.99.3.4:80","verdict":"OUT","rule":"out-include-cidr"}`,
	},
	{
		"a datagram of a pod that no record knows, and of a process with a bold name",
		trace.Decision{Rule: bpf.ShuntRule(redirect.RuleOutDNS), Protocol: unix.IPPROTO_UDP, Dst: netip.MustParseAddrPort("[fd96::10]:53"), PID: 1, Command: "\x1b[2J<é\u009b1m\xff"},
		nil,
		"? ?[2J<é?1m�/1 [fd96::10]:53/udp DNS out-dns",
		`{"type":"decision","time":"2026-01-02T03:04:05.000006Z","direction":"outbound","proto":"udp","process":{"pid":1,"name":"\u001b[2J<é\u009b1m�","uid":0,"gid":0},"destination":"[fd96::10]:53","verdict":"DNS","rule":"out-dns"}`,
	},
	{
		"refused",
		trace.Decision{
			Rule: bpf.ShuntRule(redirect.RuleInInclude), Protocol: unix.IPPROTO_TCP, Dst: netip.MustParseAddrPort("10.244.0.10:8080"), Src: netip.MustParseAddrPort("10.9.9.9:40000"), Interface: 2,
			Failure: &loader.ErrorCount{Place: bpf.ShuntPlacePLACE_LISTENER_NONE, Errno: unix.ENOENT},
		},
		&podName{Namespace: "shop", Name: "reviews"},
		"shop/reviews from 10.9.9.9:40000 10.244.0.10:8080 IN in-include; refused by inbound, listener-none ENOENT: the proxy does not listen on its inbound port: connection refused",
		`{"type":"decision","time":"2026-01-02T03:04:05.000006Z","pod":{"namespace":"shop","name":"reviews"},"direction":"inbound","proto":"tcp","source":"10.9.9.9:40000","interface":2,"destination":"10.244.0.10:8080","verdict":"IN","rule":"in-include","refused":{"program":"inbound","error":"listener-none ENOENT","text":"the proxy does not listen on its inbound port: connection refused"}}`,
	},
	{
		"refused before there was a rule",
		trace.Decision{Protocol: unix.IPPROTO_TCP, Dst: netip.MustParseAddrPort("[fd99::1]:443"), PID: 7, Command: "app", Failure: &loader.ErrorCount{Place: bpf.ShuntPlacePLACE_CONNECT_TPROXY, Errno: unix.EAGAIN}},
		&podName{Namespace: "shop", Name: "reviews"},
		"shop/reviews app/7 [fd99::1]:443 - -; refused by connect, tproxy EAGAIN: the proxy's connection from a client's address could not be kept in the pod: connect denied",
		`{"type":"decision","time":"2026-01-02T03:04:05.000006Z","pod":{"namespace":"shop","name":"reviews"},"direction":"outbound","proto":"tcp","process":{"pid":7,"name":"app","uid":0,"gid":0},"destination":"[fd99::1]:443","refused":{"program":"connect","error":"tproxy EAGAIN","text":"the proxy's connection from a client's address could not be kept in the pod: connect denied"}}`,
	},
}

// TestTraced: a decision for people and for machines.
func TestTraced(t *testing.T) {
	for _, c := range tracedCases {
		t.Run(c.name, func(t *testing.T) {
			c.d.Time = time.Date(2026, 1, 2, 3, 4, 5, 6000, time.UTC)
			x := newTraced(&c.d, c.pod)
			var line, row bytes.Buffer
			if err := (&tracing{out: &line}).line(x); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(c.json+"\n", line.String()); diff != "" {
				t.Errorf("JSON (-want +got):\n%s", diff)
			}
			if err := (&tracing{out: &row}).row(x.cells()); err != nil {
				t.Fatal(err)
			}
			want := c.d.Time.Local().Format("15:04:05.000000") + " " + c.text
			if diff := cmp.Diff(want, strings.Join(strings.Fields(row.String()), " ")); diff != "" {
				t.Errorf("text (-want +got):\n%s", diff)
			}
		})
	}
}

// TestTracedRules: --direct and --redirected part the rules by their verdicts, and
// leave out nothing.
func TestTracedRules(t *testing.T) {
	all, direct, redirected := tracedRules(false, false), tracedRules(true, false), tracedRules(false, true)
	for r := range bpf.ShuntRuleRULE_COUNT {
		in := func(list []bpf.ShuntRule) bool { return slices.Contains(list, r) }
		is := redirect.Rule(r).Verdict() == redirect.VerdictDirect
		if !in(all) || r != bpf.ShuntRuleRULE_NONE && (in(direct) != is || in(redirected) == is) {
			t.Errorf("rule %v: in all: %v, direct: %v, redirected: %v", redirect.Rule(r), in(all), in(direct), in(redirected))
		}
	}
	if direct[0] != bpf.ShuntRuleRULE_NONE || redirected[0] != bpf.ShuntRuleRULE_NONE {
		t.Error("what is refused before there is a rule is left out")
	}
}

// TestTraceUsage: what can't be meant.
func TestTraceUsage(t *testing.T) {
	for _, c := range []struct{ want, args string }{
		{`--pod "reviews": expected NAMESPACE/NAME`, "--pod reviews"},
		{"--direct and --redirected: expected one of them", "--direct --redirected"},
		{"--count -1: expected a positive number", "--count=-1"},
		{"--for -1s: expected a positive time", "--for=-1s"},
		{"expected text or json", "-o table"},
		{"unknown command", "reviews"},
	} {
		var out, errs strings.Builder
		args := append([]string{"trace"}, strings.Fields(c.args)...)
		if exit := run(t.Context(), args, strings.NewReader(""), &out, &errs); exit != exitUsage || !strings.Contains(errs.String(), c.want) || out.Len() > 0 {
			t.Errorf("%q: exit status %d, %q, want %q", args, exit, errs.String(), c.want)
		}
	}
}

// TestTraceNames: a decision right after a look has the name of a pod that has come
// since, whose record is there before its programs are.
func TestTraceNames(t *testing.T) {
	var out bytes.Buffer
	x := &tracing{conf: &netconf.Config{RunDir: t.TempDir()}, out: &out, json: true, tracer: new(trace.Tracer), told: map[string]bool{}}
	records := filepath.Join(x.conf.RunDir, "attachments")
	for cookie, name := range []string{"first", "second", "third"} {
		if cookie == 2 { // long after the one before
			if err := os.Chtimes(records, time.Time{}, time.Now().Add(-time.Hour)); err != nil {
				t.Fatal(err)
			}
		}
		if err := x.look(); err != nil {
			t.Fatal(err)
		}
		record := fmt.Sprintf(`{"ContainerID":%q,"IfName":"eth0","Build":%q,"Pod":{"Namespace":"shop","Name":%q},"Cookie":%d}`, name, loader.ThisBuild(), name, cookie)
		if err := os.MkdirAll(records, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(records, name+"@eth0.json"), []byte(record), 0o600); err != nil {
			t.Fatal(err)
		}
		out.Reset()
		if err := x.show(&trace.Decision{Cookie: uint64(cookie)}); err != nil {
			t.Fatal(err)
		}
		if want := `"pod":{"namespace":"shop","name":"` + name + `"}`; !strings.Contains(out.String(), want) {
			t.Errorf("%s: %q, want it to have %s", name, out.String(), want)
		}
	}
	out.Reset()
	if err := x.show(&trace.Decision{Cookie: 99}); err != nil || strings.Contains(out.String(), `"pod"`) {
		t.Errorf("of a pod that no record knows: %q, %v", out.String(), err)
	}
}

// A traceRun is a running `shunt trace`.
type traceRun struct {
	cmd   *exec.Cmd
	lines chan string // of its standard output; closed at its end
	errs  strings.Builder
}

func (n *node) trace(t *testing.T, args ...string) *traceRun {
	t.Helper()
	x := &traceRun{cmd: exec.CommandContext(t.Context(), n.shunt, append([]string{"trace"}, args...)...), lines: make(chan string, 1000)}
	x.cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	x.cmd.Stdout, x.cmd.Stderr = w, &x.errs
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var read sync.WaitGroup
	read.Go(func() {
		defer close(x.lines)
		defer out.Close()
		for s := bufio.NewScanner(out); s.Scan(); {
			x.lines <- s.Text()
		}
	})
	t.Cleanup(func() {
		_ = x.cmd.Process.Kill() // it may have ended
		_ = x.cmd.Wait()         // likewise
		read.Wait()
	})
	return x
}

// next gives the next line, "" at the end.
func (x *traceRun) next(t *testing.T) string {
	t.Helper()
	select {
	case line := <-x.lines:
		return line
	case <-time.After(20 * time.Second):
		t.Fatal("trace writes nothing")
		return ""
	}
}

// end waits for the end.
func (x *traceRun) end(t *testing.T, exit int) (errs string) {
	t.Helper()
	_ = x.cmd.Wait() // its status is looked at
	if got := x.cmd.ProcessState.ExitCode(); got != exit {
		t.Errorf("trace: exit status %d, want %d\n%s", got, exit, x.errs.String())
	}
	return x.errs.String()
}

// tracing reads who looks on.
func (n *node) tracing(t *testing.T) (v bpf.ShuntTrace) {
	t.Helper()
	paths, err := filepath.Glob(n.bpfDir + "/datapath-*/tracing")
	if err != nil || len(paths) != 1 {
		t.Fatalf("pins %q, %v", paths, err)
	}
	m, err := ebpf.LoadPinnedMap(paths[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := m.Lookup(uint32(0), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestPrivilegedTrace: what trace shows of pods that are there, that come, and that
// it can't see, in text and in JSON; how it ends, and that it is off then.
func TestPrivilegedTrace(t *testing.T) {
	n, p, app := begin(t)
	conf := n.conf(t, "ebpf")
	apply := func(p *testbed.Pod, datapath string) {
		t.Helper()
		n.cgroupRoot = p.CgroupRoot() // each pod has its own
		pod := n.file(t, p.Name+".json", p.Injected(testbed.Annotate(keyExcludeOutboundPorts, "3306")))
		n.want(t, 0, "is redirected", "apply", "--netns", p.NetnsPath(), "--netconf", n.conf(t, datapath), "--pod", pod)
	}
	name := p.Namespace + "/" + p.Name
	next := func(x *traceRun) (got traced) {
		t.Helper()
		line := x.next(t)
		d := json.NewDecoder(strings.NewReader(line))
		d.DisallowUnknownFields()
		if err := d.Decode(&got); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		return got
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", app.PID))
	if err != nil {
		t.Fatal(err)
	}
	want := func(what string, got traced, p *testbed.Pod, a *testbed.App, dst, verdict, rule string) {
		t.Helper()
		x := traced{
			Type: "decision", Time: got.Time, Pod: &podName{p.Namespace, p.Name, p.UID}, Direction: "outbound", Proto: "tcp",
			Process:     &traceProcess{a.PID, strings.TrimSpace(string(comm)), uint32(a.UID), uint32(a.GID)},
			Destination: netip.MustParseAddrPort(dst), Verdict: verdict, Rule: rule,
		}
		if diff := cmp.Diff(x, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}

	// first gives the first decision of a pod's app, to dst. Those of the first pod's
	// earlier connections may come before it.
	first := func(x *traceRun, a *testbed.App, dst string) traced {
		t.Helper()
		for {
			got := next(x)
			switch {
			case got.Process == nil || got.Process.PID != a.PID && got.Process.PID != app.PID:
				t.Errorf("neither of process %d nor of %d: %+v", a.PID, app.PID, got)
			case got.Process.PID == a.PID && got.Destination.String() == dst:
				return got
			case a != app && got.Process.PID == a.PID:
				t.Errorf("to another destination than %s: %+v", dst, got)
			}
		}
	}

	// Nothing is loaded yet, and no pod there.
	x := n.trace(t, "--netconf", conf, "-o", "json")
	named := n.trace(t, "--netconf", conf, "-o", "json", "--pod", name, "--direct")
	for _, x := range []*traceRun{x, named} {
		var notice traceNotice
		if line := x.next(t); json.Unmarshal([]byte(line), &notice) != nil || notice.Type != "notice" || !strings.Contains(notice.Text, "no eBPF datapath of this build is loaded here yet") {
			t.Errorf("on a node without a datapath: %q", line)
		}
	}
	apply(p, "ebpf")
	startProxy(t, p)
	testbed.Eventually(t, "decisions", func() bool {
		expectServed(t, app, "10.99.3.4:80", "out")
		return len(x.lines) > 0
	})
	want("a pod that has come", next(x), p, app, "10.99.3.4:80", "OUT", "out-include-cidr")
	testbed.Eventually(t, "direct decisions", func() bool {
		expectServed(t, app, "10.99.3.4:3306", "world")
		return len(named.lines) > 0
	})
	for _, x := range []*traceRun{x, named} {
		want("direct", first(x, app, "10.99.3.4:3306"), p, app, "10.99.3.4:3306", "direct", "out-exclude-port")
	}
	// A pod comes while somebody looks on, and is named from its first connection on.
	q := testbed.NewPod(t, testbed.InWorld(p.World))
	apply(q, "ebpf")
	later := q.StartApp(t, 8080)
	later.Dial(t, "[fd99::3]:443") // its proxy is not there
	want("a later pod", first(x, later, "[fd99::3]:443"), q, later, "[fd99::3]:443", "OUT", "out-include-cidr")

	// Killed, it is off before long, though nobody has switched it off.
	if err := named.cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	named.end(t, 0)
	for line := range named.lines { // to the last, of earlier connections
		if !strings.Contains(line, `"10.99.3.4:3306"`) || !strings.Contains(line, p.UID) {
			t.Errorf("a trace of the first pod's direct connections shows %s", line)
		}
	}
	if err := x.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	x.end(t, -1)
	if n.tracing(t).On == 0 {
		t.Error("tracing is off at once")
	}
	testbed.Eventually(t, "tracing is off", func() bool {
		expectServed(t, app, "10.99.3.4:80", "out")
		return n.tracing(t).On == 0
	})

	// For people; it ends by itself.
	x = n.trace(t, "--netconf", conf, "--pod", name, "--redirected", "--count", "1")
	if head := strings.Fields(x.next(t)); !slices.Equal(head, strings.Fields("TIME POD PROCESS DESTINATION VERDICT RULE")) {
		t.Errorf("%q", head)
	}
	testbed.Eventually(t, "a decision", func() bool {
		expectServed(t, app, "10.99.3.4:3306", "world")
		expectServed(t, app, "10.99.3.4:80", "out")
		return len(x.lines) > 0
	})
	row := strings.Fields(x.next(t))
	if len(row) != 6 || !slices.Equal(row[1:], []string{name, fmt.Sprintf("%s/%d", strings.TrimSpace(string(comm)), app.PID), "10.99.3.4:80", "OUT", "out-include-cidr"}) {
		t.Errorf("%q", row)
	}
	if errs := x.end(t, 0); errs != "" {
		t.Errorf("%q", errs)
	}

	// What iptables redirects can't be seen, and that is said.
	apply(q, "iptables")
	other := q.Namespace + "/" + q.Name
	n.want(t, 1, "pod "+other+" can't be traced: iptables redirects it", "trace", "--netconf", conf, "--pod", other)
	n.want(t, 0, "shunt: pod "+other+" is not shown: iptables redirects it", "trace", "--netconf", conf, "--for", "100ms")
	n.want(t, 0, "shunt: pod shop/none is not redirected here (yet)", "trace", "--netconf", conf, "--for", "100ms", "--pod", "shop/none")

	for _, p := range []*testbed.Pod{p, q} {
		n.want(t, 0, "removed", "remove", "--netns", p.NetnsPath(), "--netconf", conf)
	}
	if left := n.left(t, p); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// traceWhile runs trace until it ends, while something is done.
func (n *node) traceWhile(t *testing.T, args []string, do func()) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, n.shunt, args...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, "tracing", func() bool {
		seat := n.tracing(t).Tracers[0]
		return seat.Until != 0 && seat.Pods[0] != ^uint64(0) // which is none yet
	})
	do()
	if err := cmd.Wait(); err != nil || errs.Len() > 0 {
		t.Errorf("%q: %v\n%s", args, err, errs.String())
	}
	return out.String()
}

var (
	exampleTime    = regexp.MustCompile(`(?m)^\d\d:\d\d:\d\d\.\d{6}`)
	exampleProcess = regexp.MustCompile(`[^ /]+/\d+ `)
	exampleClient  = regexp.MustCompile(`from \S+ +\S+:`)
)

// compareTraced is compare for what trace shows: times, processes, and the pods'
// and the clients' addresses differ, and so do the columns' widths.
func (e example) compareTraced(t *testing.T, got string) {
	t.Helper()
	plain := func(s string) string {
		s = exampleTime.ReplaceAllString(s, "08:12:01.734206")
		s = exampleProcess.ReplaceAllString(s, "app/4711 ")
		s = exampleClient.ReplaceAllString(s, "from 10.244.2.5:41012 10.244.1.17:")
		var lines []string
		for line := range strings.Lines(s) {
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
		return strings.Join(lines, "\n")
	}
	e.want = strings.Split(plain(strings.Join(e.want, "\n")), "\n")
	e.compare(t, plain(got))
}
