// SPDX-License-Identifier: Apache-2.0

// Package podfacts gets the facts of the pod that is being set up. It asks its
// sources in order, again and again, within one bound of time: a pod is never
// left without redirection because nobody knew what it is.
package podfacts

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	"shunt.dev/shunt/redirect"
)

// What one call and the pauses between calls may take.
const (
	callTimeout  = 5 * time.Second
	firstBackoff = 50 * time.Millisecond
	maxBackoff   = 2 * time.Second
)

// A Source knows pods. The node agent's socket is one, the API server another.
type Source interface {
	// Pod asks once and returns the pod as the source has it now. A uid that is
	// not empty says which one is looked for; the source may have another. It
	// returns when ctx ends. An error made by Permanent ends the asking of this
	// source; one made by RetryAfter says when to ask it next; any other is
	// worth another try.
	Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error)
	// String names the source in errors.
	fmt.Stringer
}

type permanentError struct{ error }

func (e permanentError) Unwrap() error { return e.error }

// Permanent marks err as one that asking again does not mend.
func Permanent(err error) error { return permanentError{err} }

type retryAfterError struct {
	error
	after time.Duration
}

func (e retryAfterError) Unwrap() error { return e.error }

// RetryAfter marks err as one of a source that wants no question for d.
func RetryAfter(err error, d time.Duration) error { return retryAfterError{err, d} }

// A Fetcher asks sources for pods.
type Fetcher struct {
	Sources []Source
	// Timeout bounds one fetch, all tries and pauses together.
	Timeout time.Duration
	Log     *slog.Logger
}

// An Error says that no source had the facts of a pod in time.
type Error struct {
	Namespace, Name string
	After           time.Duration // how long was tried
	Tries           []Try         // a source each, in the order of asking
}

// A Try is what came of asking one source.
type Try struct {
	Source string
	Count  int   // how often it was asked
	Last   error // nil when it was not asked
}

func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "get facts of pod %s/%s: gave up after %s", e.Namespace, e.Name, e.After.Round(time.Millisecond))
	for _, t := range e.Tries {
		if t.Count == 0 {
			fmt.Fprintf(&b, "; %s: not asked", t.Source)
			continue
		}
		times := "times"
		if t.Count == 1 {
			times = "time"
		}
		fmt.Fprintf(&b, "; %s: asked %d %s, last: %v", t.Source, t.Count, times, t.Last)
	}
	return b.String()
}

// Unwrap returns the last cause of each source.
func (e *Error) Unwrap() []error {
	var errs []error
	for _, t := range e.Tries {
		if t.Last != nil {
			errs = append(errs, t.Last)
		}
	}
	return errs
}

// state is what a fetch knows of one source.
type state struct {
	Try
	src       Source
	gone      bool      // failed for good
	notBefore time.Time // when the source allows the next question
}

// Pod returns the pod's facts from the first source that has them. When uid is
// not empty, a pod that does not match it is an earlier pod of that name, and
// is waited out like one that is not there yet. Its errors are *Error.
func (f *Fetcher) Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, f.Timeout)
	defer cancel()
	states := make([]state, len(f.Sources))
	for i, src := range f.Sources {
		states[i] = state{Try: Try{Source: src.String()}, src: src}
	}
	for backoff := firstBackoff; ; backoff = min(2*backoff, maxBackoff) {
		for i := range states {
			if pod := f.ask(ctx, &states[i], namespace, name, uid); pod != nil {
				return pod, nil
			}
		}
		if !pause(ctx, states, backoff) {
			break
		}
	}
	e := &Error{Namespace: namespace, Name: name, After: time.Since(start)}
	for i := range states {
		e.Tries = append(e.Tries, states[i].Try)
	}
	return nil, e
}

// ask asks a source once, if it may be asked now, and returns nil when that
// did not bring the pod that is looked for.
func (f *Fetcher) ask(ctx context.Context, s *state, namespace, name, uid string) *redirect.Pod {
	if s.gone || ctx.Err() != nil || time.Now().Before(s.notBefore) {
		return nil
	}
	pod, err := Ask(ctx, s.src, namespace, name, uid)
	s.Count++
	if err == nil {
		return pod
	}
	var permanent permanentError
	s.gone = errors.As(err, &permanent)
	var later retryAfterError
	if errors.As(err, &later) {
		s.notBefore = time.Now().Add(later.after)
	}
	// A call that the bound cut short tells less than what the source said
	// before. A connection's own deadline may be noticed before the context's.
	if end, _ := ctx.Deadline(); s.Last == nil || ctx.Err() == nil && time.Now().Before(end) {
		s.Last = err
	}
	f.Log.Debug("pod facts not had", "source", s.Source, "try", s.Count, "permanent", s.gone, "error", err)
	return nil
}

// Ask asks a source once, for a pod and no other by that name.
func Ask(ctx context.Context, src Source, namespace, name, uid string) (*redirect.Pod, error) {
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	pod, err := src.Pod(call, namespace, name, uid)
	switch {
	case err != nil:
		return nil, err
	case pod == nil:
		return nil, errors.New("the source returned no pod")
	case pod.Name != "" && (pod.Name != name || pod.Namespace != namespace):
		return nil, fmt.Errorf("the source returned another pod, %s/%s", pod.Namespace, pod.Name)
	case uid != "" && !pod.MatchesUID(uid):
		return nil, fmt.Errorf("the pod of that name has not the uid %s that the runtime gave (K8S_POD_UID)", uid)
	}
	return pod, nil
}

// pause waits for the next round: a random part of backoff, or until the first
// source allows a question. It reports false when there is nobody left to ask
// within the bound.
func pause(ctx context.Context, states []state, backoff time.Duration) bool {
	now := time.Now()
	deadline, _ := ctx.Deadline()
	left := deadline.Sub(now)
	wait := left // until the first source may be asked
	for _, s := range states {
		if !s.gone {
			wait = min(wait, max(0, s.notBefore.Sub(now)))
		}
	}
	if left < firstBackoff || wait >= left || ctx.Err() != nil {
		return false
	}
	d := rand.N(backoff)
	if d >= left {
		d = left / 2 // leave time for a last answer
	}
	d = max(d, wait)
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
