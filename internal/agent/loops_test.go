// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

// TestLoops: a loop that fails is started again, with pauses that grow; one that
// is told to end is not.
func TestLoops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		l := &loops{log: logTo(&out)}
		ctx, cancel := context.WithCancel(t.Context())
		var starts atomic.Int32
		began := time.Now()
		one := l.startOther(ctx, "flaky", func(ctx context.Context) error {
			if starts.Add(1) < 4 {
				return errors.New("boom")
			}
			<-ctx.Done()
			return ctx.Err()
		})
		synctest.Wait()
		if err := one.failure(); err == nil || err.Error() != "boom" {
			t.Errorf("while it waits: %v", err)
		}
		time.Sleep(time.Minute) //nolint:forbidigo // the bubble's clock
		if n, err := starts.Load(), one.failure(); n != 4 || err != nil {
			t.Errorf("started %d times in %v: %v", n, time.Since(began), err)
		}
		if n := strings.Count(out.String(), "part=flaky error=boom in="); n != 3 || !strings.Contains(out.String(), "in=4s") {
			t.Errorf("logged %s", out.String())
		}
		cancel()
		if !l.wait(time.Second) {
			t.Error("it does not end")
		}
	})
}

// TestLoopEndsByItself: that is a failure, even without an error.
func TestLoopEndsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &loops{log: logTo(new(bytes.Buffer))}
		ctx, cancel := context.WithCancel(t.Context())
		one := l.startOther(ctx, "short", func(context.Context) error { return nil })
		synctest.Wait()
		if err := one.failure(); err == nil {
			t.Error("no failure")
		}
		cancel()
		l.wait(time.Second)
	})
}

// TestHealth: /healthz fails when a loop is stuck, and only then; /readyz has
// each condition in words.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &loops{log: logTo(new(bytes.Buffer))}
		ctx, cancel := context.WithCancel(t.Context())
		hang := make(chan struct{})
		n := 0
		l.start(ctx, "sweep", func(ctx context.Context, beat func()) error {
			return every(ctx, time.Second, beat, func(context.Context) {
				if n++; n == 100 {
					<-hang
				}
			})
		})
		l.startOther(ctx, "without a beat", func(ctx context.Context) error { <-ctx.Done(); return nil })
		ready := false
		h := &health{loops: l, conditions: []condition{
			{name: "netconf", check: func() (bool, string) { return true, "is in force" }},
			{name: "install", check: func() (bool, string) { return ready, "two\nlines" }},
			{name: "redirection", check: func() (bool, string) { return !ready, "one pod" }, told: true},
		}}
		expectMetric := func(want string) {
			t.Helper()
			const head = "# HELP shunt_ready 1 while a condition of the agent's readiness holds, 0 while not; /readyz says why.\n# TYPE shunt_ready gauge\n"
			if err := testutil.CollectAndCompare(h, strings.NewReader(head+want)); err != nil {
				t.Error(err)
			}
		}
		get := func(path string) (int, string) {
			w := httptest.NewRecorder()
			h.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
			body, _ := io.ReadAll(w.Body)
			return w.Code, string(body)
		}
		expect := func(path string, code int, want string) {
			t.Helper()
			if got, body := get(path); got != code || body != want {
				t.Errorf("%s: %d %q, want %d %q", path, got, body, code, want)
			}
		}
		expect("/healthz", 200, "ok\n")
		expect("/readyz", 503, "[ok ] netconf: is in force\n[NOT] install: two; lines\n[ok ] redirection: one pod\n")
		expectMetric("shunt_ready{condition=\"install\"} 0\nshunt_ready{condition=\"netconf\"} 1\n")
		ready = true
		// What is wrong with pods is told, and no reason not to be ready.
		expect("/readyz", 200, "[ok ] netconf: is in force\n[ok ] install: two; lines\n[see] redirection: one pod\n")
		expectMetric("shunt_ready{condition=\"install\"} 1\nshunt_ready{condition=\"netconf\"} 1\n")
		time.Sleep(99*time.Second + stuckAfter) //nolint:forbidigo // the bubble's clock
		expect("/healthz", 200, "ok\n")
		time.Sleep(time.Second) //nolint:forbidigo // the bubble's clock
		expect("/healthz", 500, "stuck: sweep (for 2m1s)\n")
		close(hang)
		time.Sleep(2 * time.Second) //nolint:forbidigo // the bubble's clock
		expect("/healthz", 200, "ok\n")
		cancel()
		l.wait(time.Second)
	})
}
