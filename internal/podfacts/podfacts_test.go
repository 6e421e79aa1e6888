// SPDX-License-Identifier: Apache-2.0

package podfacts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"shunt.dev/shunt/redirect"
)

// An answer is what a fakeSource does at one question.
type answer struct {
	uid  string
	err  error
	hang bool
}

// fakeSource gives its answers in turn, the last of them for ever.
type fakeSource struct {
	t       *testing.T
	name    string
	answers []answer
	asked   []time.Duration // when, since start
	start   time.Time
}

func newFake(t *testing.T, name string, answers ...answer) *fakeSource {
	return &fakeSource{t: t, name: name, answers: answers, start: time.Now()}
}

func (f *fakeSource) String() string { return f.name }

func (f *fakeSource) Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error) {
	if namespace != "ns" || name != "p" {
		f.t.Errorf("asked for pod %s/%s", namespace, name)
	}
	deadline, ok := ctx.Deadline()
	if left := time.Until(deadline); !ok || left <= 0 || left > callTimeout {
		f.t.Errorf("asked with %v to answer", left)
	}
	if len(f.answers) == 0 {
		f.t.Fatalf("%s: asked without an answer to give", f.name)
	}
	f.asked = append(f.asked, time.Since(f.start))
	a := f.answers[0]
	if len(f.answers) > 1 {
		f.answers = f.answers[1:]
	}
	if a.hang {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if a.err != nil {
		return nil, a.err
	}
	return &redirect.Pod{ObjectMeta: redirect.ObjectMeta{UID: a.uid}}, nil
}

func fetcher(timeout time.Duration, sources ...Source) *Fetcher {
	return &Fetcher{Sources: sources, Timeout: timeout, Log: slog.New(slog.DiscardHandler)}
}

var errDown = errors.New("down")

func TestFetch(t *testing.T) {
	down := answer{err: errDown}
	right, wrong := answer{uid: "right"}, answer{uid: "wrong"}
	for _, tc := range []struct {
		name    string
		uid     string
		timeout time.Duration
		sources [][]answer
		asked   []int // how often each source was
		atMost  time.Duration
		atLeast time.Duration
		want    string // error
	}{
		{name: "at once", uid: "right", sources: [][]answer{{right}}, asked: []int{1}},
		{name: "no uid known", uid: "", sources: [][]answer{{wrong}}, asked: []int{1}},
		{name: "first source wins", uid: "right", sources: [][]answer{{right}, {}}, asked: []int{1, 0}},
		{name: "second source steps in", uid: "right", sources: [][]answer{{down}, {right}}, asked: []int{1, 1}},
		{name: "first has an older pod", uid: "right", sources: [][]answer{{wrong}, {right}}, asked: []int{1, 1}},
		{name: "first gone for good", uid: "right", sources: [][]answer{{{err: Permanent(errDown)}}, {down, down, right}}, asked: []int{1, 3}, atMost: 150 * time.Millisecond},
		{name: "down, then up", uid: "right", sources: [][]answer{{down, down, down, right}}, asked: []int{4}, atMost: 350 * time.Millisecond},
		{name: "wrong uid, then right", uid: "right", sources: [][]answer{{wrong, wrong, right}}, asked: []int{3}, atMost: 150 * time.Millisecond},
		{
			name: "hanging once", uid: "right", sources: [][]answer{{{hang: true}, right}}, asked: []int{2},
			atLeast: callTimeout, atMost: callTimeout + firstBackoff,
		},
		{
			name: "asks to wait", uid: "right", sources: [][]answer{{{err: RetryAfter(errDown, 3*time.Second)}, right}}, asked: []int{2},
			atLeast: 3 * time.Second, atMost: 3 * time.Second,
		},
		{ // the other source is not held up
			name: "one asks to wait", uid: "right", sources: [][]answer{{{err: RetryAfter(errDown, 9*time.Second)}}, {down, right}},
			asked: []int{1, 2}, atMost: firstBackoff,
		},
		{
			name: "asks to wait for too long", uid: "right", sources: [][]answer{{{err: RetryAfter(errDown, time.Minute)}}}, asked: []int{1},
			want: "get facts of pod ns/p: gave up after 0s; source 0: asked 1 time, last: down",
		},
		{
			name: "permanent", uid: "right", sources: [][]answer{{{err: Permanent(errDown)}}}, asked: []int{1},
			want: "get facts of pod ns/p: gave up after 0s; source 0: asked 1 time, last: down",
		},
		{
			name: "both permanent", uid: "right", sources: [][]answer{{down, {err: Permanent(errDown)}}, {{err: Permanent(errDown)}}}, asked: []int{2, 1},
			atMost: firstBackoff, want: "; source 1: asked 1 time, last: down",
		},
		{
			name: "hanging for ever", uid: "right", timeout: 12 * time.Second, sources: [][]answer{{{hang: true}}}, asked: []int{3},
			atLeast: 12 * time.Second, atMost: 12 * time.Second,
			want: "get facts of pod ns/p: gave up after 12s; source 0: asked 3 times, last: context deadline exceeded",
		},
		{
			name: "hanging at the end", uid: "right", timeout: time.Second, sources: [][]answer{{wrong, {hang: true}}}, asked: []int{2},
			atLeast: time.Second, atMost: time.Second,
			want: "source 0: asked 2 times, last: the pod of that name has not the uid right that the runtime gave (K8S_POD_UID)",
		},
		{
			name: "second not asked", uid: "right", timeout: time.Second, sources: [][]answer{{{hang: true}}, {}}, asked: []int{1, 0},
			atLeast: time.Second, atMost: time.Second, want: "source 1: not asked",
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var fakes []*fakeSource
				var sources []Source
				for i, a := range tc.sources {
					f := newFake(t, fmt.Sprintf("source %d", i), a...)
					fakes, sources = append(fakes, f), append(sources, f)
				}
				timeout := tc.timeout
				if timeout == 0 {
					timeout = 30 * time.Second
				}
				start := time.Now()
				pod, err := fetcher(timeout, sources...).Pod(t.Context(), "ns", "p", tc.uid)
				took := time.Since(start)
				if tc.want == "" && (err != nil || pod == nil) || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
					t.Errorf("got %v, %v; want error %q", pod, err, tc.want)
				}
				if took < tc.atLeast || took > tc.atMost {
					t.Errorf("took %v, want %v to %v", took, tc.atLeast, tc.atMost)
				}
				for i, f := range fakes {
					if len(f.asked) != tc.asked[i] {
						t.Errorf("%s was asked at %v, want %d times", f.name, f.asked, tc.asked[i])
					}
				}
				if err != nil {
					var e *Error
					if !errors.As(err, &e) || e.Namespace != "ns" || len(e.Tries) != len(tc.sources) {
						t.Errorf("error %#v", err)
					}
				}
			})
		})
	}
}

// TestBackoff: pauses are random, grow, and stay below 2 s; the bound is kept.
func TestBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const bound = 30 * time.Second
		f := newFake(t, "source", answer{err: errDown})
		start := time.Now()
		_, err := fetcher(bound, f).Pod(t.Context(), "ns", "p", "u")
		if took := time.Since(start); err == nil || took > bound {
			t.Errorf("error %v after %v", err, took)
		}
		if !errors.Is(err, errDown) {
			t.Errorf("the cause is lost: %v", err)
		}
		limit, equal := firstBackoff, 0
		for i := 1; i < len(f.asked); i++ {
			pause := f.asked[i] - f.asked[i-1]
			if pause > limit {
				t.Errorf("pause %d: %v, want at most %v", i, pause, limit)
			}
			if i > 1 && pause == f.asked[i-1]-f.asked[i-2] {
				equal++
			}
			limit = min(2*limit, maxBackoff)
		}
		// 30 pauses of 1 s on average.
		if n := len(f.asked); n < 15 || n > 120 || equal > n/4 {
			t.Errorf("asked %d times, at %v", n, f.asked)
		}
	})
}

// TestCancel: an end of the caller's patience is an end.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		start := time.Now()
		_, err := fetcher(time.Minute, newFake(t, "source", answer{hang: true})).Pod(ctx, "ns", "p", "u")
		if took := time.Since(start); err == nil || took != 3*time.Second {
			t.Errorf("error %v after %v", err, took)
		}
	})
}
