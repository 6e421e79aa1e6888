// SPDX-License-Identifier: Apache-2.0

//go:build linux

package apiserver

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

func fetcher(timeout time.Duration, source podfacts.Source) *podfacts.Fetcher {
	return &podfacts.Fetcher{Sources: []podfacts.Source{source}, Timeout: timeout, Log: slog.New(slog.DiscardHandler)}
}

func pod(uid string) *redirect.Pod {
	return &redirect.Pod{
		ObjectMeta: redirect.ObjectMeta{Namespace: "ns", Name: "p", UID: uid},
		PodSpec:    redirect.PodSpec{Containers: []redirect.Container{{Name: "app"}}},
	}
}

func named(name string) *redirect.Pod {
	p := pod("right")
	p.Name = name
	return p
}

// oneAnswer is within which an answer comes, by TLS, under -race and on a machine
// that is busy. Each test that has it takes as long.
const oneAnswer = 2 * time.Second

// TestAPIServer: what the server answers, and what comes of it.
func TestAPIServer(t *testing.T) {
	type fault = testbed.APIFault
	always := func(f fault) []fault {
		fs := make([]fault, 1000)
		for i := range fs {
			fs[i] = f
		}
		return fs
	}
	for _, tc := range []struct {
		name     string
		faults   []fault
		timeout  time.Duration
		requests int // 0: any number above 1
		want     []string
	}{
		{name: "fine", requests: 1},
		{name: "500, then fine", faults: []fault{{Status: 500}, {Status: 503}}, requests: 3},
		{name: "404, then fine", faults: []fault{{Status: 404, Message: "not found"}}, requests: 2},
		{name: "429, then fine", faults: []fault{{Status: 429}}, requests: 2},
		{name: "dropped, then fine", faults: []fault{{Drop: true}}},
		{name: "wrong uid, then right", faults: []fault{{Pod: pod("old")}, {Pod: pod("old")}}, requests: 3},
		{name: "another pod, then the pod", faults: []fault{{Pod: named("q")}}, requests: 2},
		{name: "malformed, then fine", faults: []fault{{Body: []byte(`{"metadata":`)}, {Body: []byte(`{"kind":"Node"}`)}}, requests: 3},
		{name: "500", faults: always(fault{Status: 500, Message: "etcd is down"}), timeout: oneAnswer, want: []string{"500 Internal Server Error: etcd is down", "the API server by "}},
		{name: "404", faults: always(fault{Status: 404}), timeout: oneAnswer, want: []string{"404 Not Found"}},
		{name: "wrong uid", faults: always(fault{Pod: pod("old")}), timeout: oneAnswer, want: []string{"has not the uid right"}},
		{name: "hanging", faults: always(fault{Hang: true}), timeout: 500 * time.Millisecond, requests: 1, want: []string{"asked 1 time", "deadline exceeded"}},
		{name: "too long to wait", faults: always(fault{Status: 429, RetryAfter: 60}), requests: 1, want: []string{"429 Too Many Requests"}},
		{name: "401", faults: always(fault{Status: 401}), requests: 1, want: []string{"401 Unauthorized", "credentials are not valid"}},
		{name: "403", faults: always(fault{Status: 403, Message: `pods "p" is forbidden`}), requests: 1, want: []string{`403 Forbidden: pods "p" is forbidden`, "allow the kubeconfig's user to get pods"}},
		{name: "400", faults: always(fault{Status: 400}), requests: 1, want: []string{"400 Bad Request"}},
		{name: "redirected", faults: always(fault{Status: 301}), requests: 1, want: []string{"301 Moved Permanently"}},
		{name: "too big", faults: always(fault{Body: make([]byte, 8<<20+1)}), timeout: 2 * oneAnswer, want: []string{"larger than 8388608 bytes"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := testbed.NewAPIServer(t)
			s.SetPod(t, "ns", "p", pod("right"))
			s.Fail(tc.faults...)
			timeout := tc.timeout
			if timeout == 0 {
				timeout = 30 * time.Second
			}
			start := time.Now()
			got, err := fetcher(timeout, New(s.WriteKubeconfig(t, t.TempDir()), "test")).Pod(t.Context(), "ns", "p", "right")
			// The bound is kept; what a busy machine adds is generous.
			if took := time.Since(start); tc.timeout != 0 && took > timeout+5*time.Second {
				t.Errorf("took %v of %v", took, timeout)
			}
			if len(tc.want) == 0 && (err != nil || got.UID != "right") {
				t.Errorf("got %v, %v", got, err)
			}
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want %q", err, want)
				}
			}
			if n := len(s.Requests()); tc.requests != 0 && n != tc.requests || tc.requests == 0 && n < 2 && tc.timeout == 0 {
				t.Errorf("%d requests, want %d", n, tc.requests)
			}
		})
	}
}

// TestNoServer: nothing listens there.
func TestNoServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	config := `{"current-context":"x","contexts":[{"name":"x","context":{"cluster":"c"}}],"clusters":[{"name":"c","cluster":{"server":"https://127.0.0.1:1"}}]}`
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := fetcher(oneAnswer, New(path, "test")).Pod(t.Context(), "ns", "p", "u")
	var e *podfacts.Error
	if !errors.As(err, &e) || e.Tries[0].Count < 2 || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
}

// TestKubeconfigErrors: at once, with what to do about it.
func TestKubeconfigErrors(t *testing.T) {
	dir := t.TempDir()
	malformed := filepath.Join(dir, "malformed")
	if err := os.WriteFile(malformed, []byte(": ["), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "none"): "the node agent writes it",
		malformed:                  "mend the file",
		dir:                        "is not a regular file",
	} {
		_, err := fetcher(time.Hour, New(path, "test")).Pod(t.Context(), "ns", "p", "u")
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "asked 1 time,") {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
}
