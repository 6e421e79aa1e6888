// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"shunt.dev/shunt/internal/spool"
	"shunt.dev/shunt/redirect"
)

// TestRelayLine: the plugin's lines are in the agent's log as they were, with
// level and fields, whatever the agent's own level is.
func TestRelayLine(t *testing.T) {
	var out bytes.Buffer
	r := &relay{log: slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelError}), metrics: newMetrics(func() bool { return false })}
	for in, want := range map[string]string{
		`{"time":"2026-01-02T03:04:05.000000006Z","level":"DEBUG","msg":"pod is left alone","pod":"ns/p","rule":"P8","took":1200,"all":true,"x":null,"o":{"a":[1],"b":{"c":"d"}},"e":{}}`: `time=2026-01-02T03:04:05.000Z level=DEBUG msg="pod is left alone" pod=ns/p rule=P8 took=1200 all=true x=null o.a=[1] o.b="{\"c\":\"d\"}" from=shunt-cni` + "\n",
		`{"level":"WARN","msg":"no time","z":"1","a":"2"}`: `level=WARN msg="no time" z=1 a=2 from=shunt-cni` + "\n",
		`{"level":"ERROR+4","msg":"x"}`:                    `level=ERROR+4 msg=x from=shunt-cni` + "\n",
	} {
		out.Reset()
		r.line(t.Context(), []byte(in))
		if got := out.String(); got != want {
			t.Errorf("%s\ngot  %s\nwant %s", in, got, want)
		}
	}
	for _, in := range []string{``, `half a li`, `[]`, `{"level":"loud","msg":"x"}`, `{"time":5,"msg":"x"}`, `{"msg":"x"`, `{"a":"no message"}`, "\x00\xff"} {
		out.Reset()
		r.line(t.Context(), []byte(in))
		if got := out.String(); !strings.Contains(got, `level=WARN msg="a line of the plugin's log can't be read"`) || strings.Count(got, "\n") != 1 {
			t.Errorf("%q: %s", in, got)
		}
	}
}

// TestRelaySetup: what became of a pod is counted, and told at the agent's level.
func TestRelaySetup(t *testing.T) {
	dir := t.TempDir()
	var out bytes.Buffer
	m := newMetrics(func() bool { return false })
	r := &relay{runDir: dir, log: slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelWarn}), metrics: m}
	w := slog.New(slog.NewJSONHandler(spool.Open(dir), nil))
	for _, s := range []spool.Setup{
		{Backend: "ebpf", Result: spool.ResultOK, Reason: "served", Seconds: .004},
		{Backend: "ebpf", Result: spool.ResultOK, Reason: "served", Seconds: .02},
		{Backend: "iptables", Result: spool.ResultOK, Reason: "no-cgroup2", Fallback: true, Seconds: .02},
		{Backend: "iptables", Result: spool.ResultOK, Reason: "annotation", Seconds: .02},
	} {
		w.Info("pod was set up", spool.SetupKey, s)
	}
	w.Error("pod was not set up", spool.SetupKey, spool.Setup{Result: spool.ResultFailed, Seconds: 30})
	r.drain(t.Context())
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `level=ERROR msg="pod was not set up" setup.backend=""`) {
		t.Errorf("logged %s", got)
	}
	// Failures are there from the beginning.
	if n := testutil.CollectAndCount(m.setup); n != 5 {
		t.Errorf("%d histograms, want those of ebpf and iptables, and the failed ones of ebpf, iptables and none", n)
	}
	if n := testutil.CollectAndCount(m.fallbacks); n != len(redirect.FallbackReasons()) {
		t.Errorf("%d reasons", n)
	}
	for _, reason := range redirect.FallbackReasons() {
		want := 0.0
		if reason == redirect.ReasonNoCgroup2 {
			want = 1
		}
		if got := testutil.ToFloat64(m.fallbacks.WithLabelValues(string(reason))); got != want {
			t.Errorf("fallbacks because of %s: %v, want %v", reason, got, want)
		}
	}
	out.Reset()
	r.drain(t.Context())
	if out.Len() > 0 {
		t.Errorf("logged again: %s", out.String())
	}
	if err := os.Remove(spool.Path(dir)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(spool.Path(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		r.drain(t.Context())
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "what the plugin has logged can't be read") {
		t.Errorf("logged %s", got)
	}
}

func FuzzParseLine(f *testing.F) {
	f.Add([]byte(`{"time":"2026-01-02T03:04:05Z","level":"INFO","msg":"m","a":1,"b":"c","d":[{}]}`))
	f.Add([]byte(`{"msg":"m"}{"msg":"n"}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, line []byte) {
		var out bytes.Buffer
		if record, ok := parseLine(line); ok {
			if err := slog.NewTextHandler(&out, nil).Handle(t.Context(), record); err != nil || strings.Count(out.String(), "\n") != 1 {
				t.Errorf("%q: %v, written as %q", line, err, out.String())
			}
		}
	})
}
