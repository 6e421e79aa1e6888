// SPDX-License-Identifier: Apache-2.0

//go:build linux

package podfacts

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"
	"unicode/utf8"

	"shunt.dev/shunt/redirect"
)

// listenAgent makes the agent's socket.
func listenAgent(t *testing.T, dir string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, "agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// serveAgent lets h be the agent.
func serveAgent(t *testing.T, dir string, h http.HandlerFunc) {
	t.Helper()
	s := &http.Server{Handler: h}
	l := listenAgent(t, dir)
	done := make(chan struct{})
	go func() { _ = s.Serve(l); close(done) }()
	t.Cleanup(func() { s.Close(); <-done })
}

// ask asks the agent of dir alone, once.
func ask(t *testing.T, dir string) (*redirect.Pod, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), callTimeout)
	defer cancel()
	return NewAgent(dir).Pod(ctx, "ns", "p", "right/&")
}

func pod(uid string) *redirect.Pod {
	return &redirect.Pod{
		ObjectMeta: redirect.ObjectMeta{Namespace: "ns", Name: "p", UID: uid},
		PodSpec:    redirect.PodSpec{Containers: []redirect.Container{{Name: "app"}}},
	}
}

// TestAgent: what the agent answers, and what comes of it.
func TestAgent(t *testing.T) {
	status := func(code int, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if len(header) > 0 {
				w.Header().Set(header[0], header[1])
			}
			w.WriteHeader(code)
			_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "message": "why"})
		}
	}
	body := func(b []byte) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(len(b)))
			_, _ = w.Write(b)
		}
	}
	for _, tc := range []struct {
		name      string
		answer    http.HandlerFunc
		want      string
		permanent bool
		after     time.Duration
	}{
		{name: "fine", answer: func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/v1/pods/ns/p" || r.URL.Query().Get("uid") != "right/&" || r.Method != http.MethodGet {
				t.Errorf("asked %s %s", r.Method, r.URL)
			}
			_ = json.NewEncoder(w).Encode(pod("right"))
		}},
		{name: "404", answer: status(404), want: "404 Not Found: why"},
		{name: "503", answer: status(503), want: "503 Service Unavailable: why"},
		{name: "429", answer: status(429, "Retry-After", "7"), want: "429 Too Many Requests: why", after: 7 * time.Second},
		{name: "403", answer: status(403), want: "service account", after: hungFor},
		{name: "400", answer: status(400), want: "400 Bad Request: why", permanent: true},
		{name: "not JSON", answer: body([]byte("<html>")), want: "parse pod"},
		{name: "too big", answer: body(make([]byte, maxAnswer+1)), want: "larger than"},
		{name: "cut off", answer: func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "100")
			_, _ = w.Write([]byte("{"))
		}, want: "unexpected EOF"},
		{name: "hung up on", answer: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, want: "EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			serveAgent(t, dir, tc.answer)
			got, err := ask(t, dir)
			if tc.want == "" {
				if err != nil || got.UID != "right" {
					t.Errorf("got %v, %v", got, err)
				}
				return
			}
			var permanent permanentError
			var later retryAfterError
			errors.As(err, &later)
			if err == nil || !strings.Contains(err.Error(), tc.want) || errors.As(err, &permanent) != tc.permanent || later.after != tc.after {
				t.Errorf("got %v, after %v; want %q, after %v, permanent: %v", err, later.after, tc.want, tc.after, tc.permanent)
			}
		})
	}
}

// TestNoAgent: at once, and to be asked again.
func TestNoAgent(t *testing.T) {
	dir := t.TempDir()
	if _, err := ask(t, dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	l := listenAgent(t, dir).(*net.UnixListener)
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := ask(t, dir); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("a dead agent's socket: %v", err)
	}
	if _, err := ask(t, "/"+strings.Repeat("x", 200)); err == nil {
		t.Error("a path that no socket can have")
	}
}

// TestHangingAgent: one that does not accept, does not answer, or does so byte
// by byte holds up the API server's answer by agentTimeout, once.
func TestHangingAgent(t *testing.T) {
	drip := make(chan struct{})
	defer close(drip)
	for name, start := range map[string]func(t *testing.T, dir string){
		"not accepting": func(t *testing.T, dir string) { listenAgent(t, dir) },
		"not answering": func(t *testing.T, dir string) {
			serveAgent(t, dir, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
		},
		"dripping": func(t *testing.T, dir string) {
			serveAgent(t, dir, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Length", "1000000")
				for {
					if _, err := w.Write([]byte(" ")); err != nil {
						return
					}
					w.(http.Flusher).Flush()
					select {
					case <-time.After(agentTimeout / 10):
					case <-r.Context().Done():
						return
					case <-drip:
						return
					}
				}
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			start(t, dir)
			down := answer{err: errDown}
			api := newFake(t, "the API server", down, down, down, answer{uid: "right"})
			began := time.Now()
			got, err := fetcher(30*time.Second, NewAgent(dir), api).Pod(t.Context(), "ns", "p", "right")
			if err != nil || got.UID != "right" {
				t.Errorf("got %v, %v", got, err)
			}
			if len(api.asked) != 4 {
				t.Errorf("the API server was asked %d times, want 4", len(api.asked))
			}
			// And the agent but once.
			if took := time.Since(began); took < agentTimeout || took > agentTimeout+3*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

// TestAgentFirst: with its answer nobody asks the API server; without it the API
// server is asked; and where both fail the error names both.
func TestAgentFirst(t *testing.T) {
	dir := t.TempDir()
	none := newFake(t, "the API server by none", answer{err: Permanent(fs.ErrNotExist)})
	config := newFake(t, "the API server", answer{uid: "right"})

	if _, err := fetcher(30*time.Second, NewAgent(dir), config).Pod(t.Context(), "ns", "p", "right"); err != nil || len(config.asked) != 1 {
		t.Errorf("without an agent: %v", err)
	}
	var asked atomic.Int32
	var old atomic.Bool
	serveAgent(t, dir, func(w http.ResponseWriter, _ *http.Request) {
		asked.Add(1)
		uid := "right"
		if old.Load() {
			uid = "old"
		}
		_ = json.NewEncoder(w).Encode(pod(uid))
	})
	if _, err := fetcher(30*time.Second, NewAgent(dir), none).Pod(t.Context(), "ns", "p", "right"); err != nil || asked.Load() != 1 {
		t.Errorf("with an agent, and without a kubeconfig: %v", err)
	}
	old.Store(true) // it has another pod by that name
	if _, err := fetcher(30*time.Second, NewAgent(dir), config).Pod(t.Context(), "ns", "p", "right"); err != nil || len(config.asked) != 2 {
		t.Errorf("with an agent that is behind: %v", err)
	}
	_, err := fetcher(2*time.Second, NewAgent(dir), none).Pod(t.Context(), "ns", "p", "right")
	for _, want := range []string{"the node agent by " + dir + "/agent.sock: asked ", "has not the uid right", "the API server by none: asked 1 time", os.ErrNotExist.Error()} {
		if err == nil || !strings.Contains(err.Error(), want) || !errors.Is(err, os.ErrNotExist) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
}

// TestReadAnswer: what is taken for an answer, byte for byte, and in however many
// pieces it comes; and that no error is longer than an event's message.
func TestReadAnswer(t *testing.T) {
	const body = `{"spec":{"containers":[{"name":"app"}]}}`
	whole := func(headers, body string) string { return "HTTP/1.1 200 OK\r\n" + headers + "\r\n" + body }
	length := fmt.Sprintf("Content-Length: %d\r\n", len(body))
	long := strings.Repeat("\x01\xff", 1<<20)
	for name, tc := range map[string]struct {
		answer string
		want   string // empty: a pod
	}{
		"pod":                         {whole(length, body), ""},
		"other headers, other case":   {whole("Date: today\r\nCONTENT-LENGTH:"+strconv.Itoa(len(body))+" \t\r\nX\r\n", body), ""},
		"HTTP/1.0":                    {strings.Replace(whole(length, body), "1.1", "1.0", 1), ""},
		"no phrase":                   {strings.Replace(whole(length, body), " OK", "", 1), ""},
		"something behind it":         {whole(length, body) + "HTTP/1.1 500 x\r\n", ""},
		"nothing":                     {"", "unexpected EOF"},
		"half a head":                 {"HTTP/1.1 200 OK\r\n" + length, "unexpected EOF"},
		"no body":                     {whole(length, ""), "unexpected EOF"},
		"cut short":                   {whole(length, body[:len(body)-1]), "unexpected EOF"},
		"one byte more than is there": {whole(fmt.Sprintf("Content-Length: %d\r\n", len(body)+1), body), "unexpected EOF"},
		"no length":                   {whole("", body), "no Content-Length"},
		"two lengths":                 {whole(length+length, body), "Content-Length is no length"},
		"a negative length":           {whole("Content-Length: -1\r\n", body), "Content-Length is no length"},
		"too large":                   {whole("Content-Length: 8388609\r\n", body), "larger than 8388608 bytes"},
		"chunked":                     {whole("Transfer-Encoding: chunked\r\n", "0\r\n\r\n"), "Transfer-Encoding"},
		"both":                        {whole(length+"Transfer-Encoding: chunked\r\n", body), "Transfer-Encoding"},
		"HTTP/2":                      {"HTTP/2.0 200 OK\r\n" + length + "\r\n" + body, "not HTTP/1.1"},
		"a code of four digits":       {"HTTP/1.1 2000 OK\r\n" + length + "\r\n" + body, "not HTTP/1.1"},
		"a negative code":             {"HTTP/1.1 -20 OK\r\n" + length + "\r\n" + body, "not HTTP/1.1"},
		"an endless head":             {"HTTP/1.1 200 " + long, "head is larger than"},
		"an endless phrase":           {"HTTP/1.1 503 " + long[:4000] + "\r\nContent-Length: 0\r\n\r\n", "503 \x01"},
		"an endless message":          {"HTTP/1.1 403 x\r\nContent-Length: 100014\r\n\r\n{\"message\":\"" + strings.Repeat("é", 50000) + "\"}", "403 x: éé"},
		"an endless kind":             {whole("Content-Length: 100011\r\n", `{"kind":"`+strings.Repeat("x", 100000)+`"}`), "is of kind"},
		"an endless version":          {whole("Content-Length: 100017\r\n", `{"apiVersion":"`+strings.Repeat("x", 100000)+`"}`), "is of apiVersion"},
		"an endless number":           {whole("Content-Length: 100009\r\n", `{"kind":`+strings.Repeat("1", 100000)+`}`), "parse pod"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(tc.answer), iotest.OneByteReader(strings.NewReader(tc.answer)), iotest.DataErrReader(strings.NewReader(tc.answer))} {
				pod, err := readPod(r)
				if tc.want == "" {
					if err != nil || len(pod.Containers) != 1 {
						t.Errorf("got %v, %v", pod, err)
					}
					continue
				}
				if err == nil || !strings.Contains(err.Error(), tc.want) || len(err.Error()) > 1<<10 || !utf8.ValidString(err.Error()) {
					t.Errorf("got %v, %q; want %q", pod, err, tc.want)
				}
			}
		})
	}
}
