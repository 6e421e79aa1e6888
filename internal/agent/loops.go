// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"
)

// A loop that has failed is started again after a pause that grows.
const (
	firstPause = time.Second
	maxPause   = 30 * time.Second
)

// stuckAfter is how long a loop may be at one thing. The longest that any does
// is to wait for the node's lock (20 s) and then to load the datapath.
const stuckAfter = 2 * time.Minute

// loops are what the agent does all the time. Each runs until its context ends;
// one that fails is started again.
type loops struct {
	log *slog.Logger
	wg  sync.WaitGroup

	mu   sync.Mutex
	list []*loop
}

// A loop is one of them.
type loop struct {
	name    string
	watched bool // it says that it lives, by its beat

	mu   sync.Mutex
	last time.Time // of the beat
	err  error     // why it does not run just now
}

// start starts a loop whose run calls beat at least once in stuckAfter.
func (l *loops) start(ctx context.Context, name string, run func(ctx context.Context, beat func()) error) {
	l.add(ctx, &loop{name: name, watched: true, last: time.Now()}, run)
}

// startOther starts what has no beat.
func (l *loops) startOther(ctx context.Context, name string, run func(ctx context.Context) error) *loop {
	return l.add(ctx, &loop{name: name}, func(ctx context.Context, _ func()) error { return run(ctx) })
}

func (l *loops) add(ctx context.Context, one *loop, run func(ctx context.Context, beat func()) error) *loop {
	l.mu.Lock()
	l.list = append(l.list, one)
	l.mu.Unlock()
	l.wg.Go(func() {
		for pause := firstPause; ; pause = min(2*pause, maxPause) {
			began := time.Now()
			err := run(ctx, one.beat)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				err = errors.New("it ended by itself")
			}
			if time.Since(began) > maxPause {
				pause = firstPause
			}
			one.fail(err)
			l.log.Error("a part of the agent has failed and is started again", "part", one.name, "error", err, "in", pause)
			if !wait(ctx, pause, nil) {
				return
			}
			one.fail(nil)
		}
	})
	return one
}

func (l *loop) beat() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = time.Now()
}

func (l *loop) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last, l.err = time.Now(), err
}

// failure says why the loop does not run just now.
func (l *loop) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// stuck names the loops that have not given a sign of life for too long.
func (l *loops) stuck(now time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var stuck []string
	for _, one := range l.list {
		one.mu.Lock()
		since := now.Sub(one.last)
		one.mu.Unlock()
		if one.watched && since > stuckAfter {
			stuck = append(stuck, fmt.Sprintf("%s (for %s)", one.name, since.Round(time.Second)))
		}
	}
	if len(stuck) > 0 {
		return errors.New("stuck: " + strings.Join(stuck, ", "))
	}
	return nil
}

// wait waits until all loops have ended, and says which have not in time.
func (l *loops) wait(within time.Duration) bool {
	done := make(chan struct{})
	go func() {
		l.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return true
	case <-time.After(within):
		return false
	}
}

// every calls do at once and then again and again, until ctx ends.
func every(ctx context.Context, interval time.Duration, beat func(), do func(context.Context)) error {
	for {
		beat()
		do(ctx)
		if !wait(ctx, interval, nil) {
			return ctx.Err()
		}
	}
}

// wait waits for a time, or for sooner; it reports false when ctx has ended.
func wait(ctx context.Context, d time.Duration, sooner <-chan struct{}) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-sooner:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}
