// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/cni/whole"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/spool"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// serveFacts lets h be the node agent at runDir.
func serveFacts(t *testing.T, runDir string, h http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(runDir, "agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	done := make(chan struct{})
	go func() { _ = s.Serve(l); close(done) }()
	t.Cleanup(func() { s.Close(); <-done })
}

// realFacts are the real sources of facts.
func realFacts(conf *netconf.Config, log *slog.Logger) FactsSource {
	return whole.Facts(conf, log, "test", false)
}

func answerPod(pod *redirect.Pod) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _ = json.NewEncoder(w).Encode(pod) }
}

// setups drains the plugin's log and returns what its Setup lines say, without
// the time, and the other lines.
func setups(t *testing.T, runDir string) (list []spool.Setup, others []string) {
	t.Helper()
	_, err := spool.Drain(runDir, func(line []byte) {
		if !json.Valid(line) {
			t.Errorf("no JSON: %s", line)
		}
		s, ok := spool.ParseSetup(line)
		if !ok {
			others = append(others, string(line))
			return
		}
		if s.Seconds <= 0 || s.Seconds > 60 {
			t.Errorf("took %v s", s.Seconds)
		}
		s.Seconds = 0
		list = append(list, s)
	})
	if err != nil {
		t.Error(err)
	}
	return list, others
}

// TestProcessAgent: ADD with the agent's answer, where there is no kubeconfig
// and no API server.
func TestProcessAgent(t *testing.T) {
	dir := t.TempDir()
	stdin := `{"type":"shunt-cni","name":"n","cniVersion":"1.1.0","runDir":"` + dir + `","bpfDir":"/none/bpf","podFactsTimeout":"500ms",` + prevOf("1.1.0") + `}`
	env := attachment("ADD", "K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_UID="+podUID)
	pod := meshed()
	pod.Labels = map[string]string{"sidecar.istio.io/inject": "false"}
	var asked []string
	answer := answerPod(pod)
	serveFacts(t, dir, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.String())
		answer(w, r)
	})
	if out, exit := run(t, stdin, env...); out != prevBytes("1.1.0") || exit != 0 {
		t.Errorf("a pod that is left alone: exit %d, printed %s", exit, out)
	}
	if diff := cmp.Diff([]string{"/v1/pods/ns/p?uid=" + podUID}, asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	if left, err := filepath.Glob(dir + "/*"); err != nil || len(left) != 1 {
		t.Errorf("in runDir: %q, %v", left, err) // the socket: no log
	}

	answer = answerPod(meshed())
	if out, exit := run(t, stdin, env...); !strings.Contains(out, "/none/such") || exit != 1 {
		t.Errorf("a pod without a netns: exit %d, printed %s", exit, out)
	}
	got, others := setups(t, dir)
	if diff := cmp.Diff([]spool.Setup{{Backend: "ebpf", Result: spool.ResultFailed, Reason: "served"}}, got); diff != "" || len(others) != 0 {
		t.Errorf("told the agent (-want +got):\n%s%q", diff, others)
	}

	// Both are down.
	answer = func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }
	out, exit := run(t, stdin, env...)
	for _, want := range []string{`"code": 11`, "the node agent by " + dir + "/agent.sock", "503", "the API server by " + dir + "/kubeconfig", "no such file"} {
		if !strings.Contains(out, want) || exit != 1 {
			t.Errorf("exit %d, printed %s, want %s", exit, out, want)
		}
	}
	if got, _ := setups(t, dir); len(got) != 1 || got[0] != (spool.Setup{Result: spool.ResultFailed}) {
		t.Errorf("told the agent %+v", got)
	}
}

// TestSpool: what the agent is told of each ADD, at which level.
func TestSpool(t *testing.T) {
	for _, tc := range []struct {
		name   string
		level  string
		pod    *redirect.Pod
		podErr error
		apply  error
		conf   string
		want   []spool.Setup
		lines  int
	}{
		{name: "programmed", level: "fatal", pod: meshed(), want: []spool.Setup{{Backend: "ebpf", Result: "ok", Reason: "served"}}},
		{name: "info", level: "info", pod: meshed(), want: []spool.Setup{{Backend: "ebpf", Result: "ok", Reason: "served"}}, lines: 1},
		{name: "configured", level: "warn", pod: meshed(), conf: `"datapath":"iptables"`, want: []spool.Setup{{Backend: "iptables", Result: "ok", Reason: "configured"}}},
		{
			name: "fallback", level: "warn", conf: `"nativeRuntimeClasses":[]`,
			pod:  func() *redirect.Pod { p := meshed(); p.RuntimeClassName = "gvisor"; return p }(),
			want: []spool.Setup{{Backend: "iptables", Result: "ok", Reason: "runtime-class", Fallback: true}},
		},
		{name: "not programmed", level: "fatal", pod: meshed(), apply: errors.New("EIO"), want: []spool.Setup{{Backend: "ebpf", Result: "failed", Reason: "served"}}},
		{name: "no facts", level: "warn", podErr: errors.New("down"), want: []spool.Setup{{Result: "failed"}}},
		{name: "left alone", level: "info", pod: &redirect.Pod{}, lines: 1},
		{name: "left alone early", level: "warn", conf: `"excludeNamespaces":["ns"]`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			b := newBed(t)
			b.pod, b.podErr, b.backend.applyErr = tc.pod, tc.podErr, tc.apply
			members := []string{prevOf("1.1.0"), `"logLevel":"` + tc.level + `"`}
			if tc.conf != "" {
				members = append(members, tc.conf)
			}
			b.args.StdinData = []byte(b.conf("1.1.0", members...))
			err := b.add(&b.args)
			if (err != nil) != (tc.podErr != nil || tc.apply != nil) {
				t.Errorf("error %v", err)
			}
			got, others := setups(t, b.runDir)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(others) != tc.lines || strings.Count(b.logged.String(), "\n") != tc.lines {
				t.Errorf("other lines %q; on stderr %s", others, &b.logged)
			}
		})
	}
}

// TestSpoolInTheWay: an ADD does not care what the agent's log is.
func TestSpoolInTheWay(t *testing.T) {
	b := newBed(t)
	b.pod = meshed()
	if err := os.Mkdir(spool.Path(b.runDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := b.add(&b.args); err != nil || len(b.backend.applied) != 1 {
		t.Errorf("%v", err)
	}
}

// TestAddAgent: the plugin with its real sources: an agent that hangs costs a
// second, and the API server steps in.
func TestAddAgent(t *testing.T) {
	api := testbed.NewAPIServer(t)
	api.SetPod(t, "ns", "p", meshed())
	kubeconfig := api.WriteKubeconfig(t, t.TempDir())
	for name, tc := range map[string]struct {
		agent http.HandlerFunc
		gets  int
		most  time.Duration
	}{
		"no agent":    {nil, 1, 5 * time.Second},
		"agent":       {answerPod(meshed()), 0, 5 * time.Second},
		"hanging":     {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, 1, 6 * time.Second},
		"another pod": {answerPod(&redirect.Pod{ObjectMeta: redirect.ObjectMeta{Namespace: "ns", Name: "p", UID: "old"}, PodSpec: meshed().PodSpec}), 1, 5 * time.Second},
		"not found":   {http.NotFound, 1, 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBed(t)
			b.facts = realFacts
			if tc.agent != nil {
				serveFacts(t, b.runDir, tc.agent)
			}
			b.args.StdinData = []byte(b.conf("1.1.0", prevOf("1.1.0"), `"kubeconfig":"`+kubeconfig+`"`))
			before, start := len(api.Requests()), time.Now()
			if err := b.add(&b.args); err != nil || len(b.backend.applied) != 1 {
				t.Errorf("error %v", err)
			}
			if took := time.Since(start); took > tc.most {
				t.Errorf("took %v", took)
			}
			if got := len(api.Requests()) - before; got != tc.gets {
				t.Errorf("%d requests to the API server, want %d", got, tc.gets)
			}
		})
	}
}
