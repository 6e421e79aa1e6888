// SPDX-License-Identifier: Apache-2.0

//go:build linux

package selftest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/scratch"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
)

// childArg makes this test binary a process of the self-test.
const childArg = "self-test-child"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == childArg {
		if err := Child(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	testbed.Main(m)
}

// begin begins a privileged test: what a run leaves fails it.
func begin(t *testing.T) {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	pattern := filepath.Join(testbed.Cgroup2Mount(t), fmt.Sprintf("%s%d-*", scratch.CgroupPrefix, os.Getpid()))
	t.Cleanup(func() {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

func options(paths ...string) Options {
	return Options{Paths: paths, IPv6: true, Child: []string{childArg}}
}

// perPath is how many checks a path has that is tested to its end.
const perPath = 14

func TestPrivilegedRun(t *testing.T) {
	begin(t)
	start := time.Now()
	checks := Run(t.Context(), options(probe.Paths...))
	if took := time.Since(start); took > Limit {
		t.Errorf("it took %v", took)
	}
	if len(checks) != perPath*len(probe.Paths) {
		t.Errorf("%d checks, want %d on each of %d paths", len(checks), perPath, len(probe.Paths))
	}
	for _, c := range checks {
		if !c.OK {
			t.Errorf("%s, %s: %s, want %s", c.Path, c.Connection, c.Got, c.Expected)
		}
	}
}

func TestPrivilegedRunIPv4Only(t *testing.T) {
	begin(t)
	opts := options(probe.PathEBPF)
	opts.IPv6 = false
	checks := Run(t.Context(), opts)
	if len(checks) != perPath/2 {
		t.Errorf("%d checks, want %d", len(checks), perPath/2)
	}
	for _, c := range checks {
		if !c.OK || !strings.HasPrefix(c.Connection, "IPv4") {
			t.Errorf("%+v", c)
		}
	}
}

// Nothing of one run is in the way of another.
func TestPrivilegedRunsAtOnce(t *testing.T) {
	begin(t)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for _, c := range Run(t.Context(), options(probe.Paths...)) {
				if !c.OK {
					t.Errorf("%+v", c)
				}
			}
		})
	}
	wg.Wait()
}

// A broken backend does less than it should.
type broken struct {
	redirect.Backend
	apply, remove func() error // nil: the real one
}

func (b *broken) Apply(ctx context.Context, t redirect.Target, p *redirect.Policy) error {
	if b.apply != nil {
		return b.apply()
	}
	return b.Backend.Apply(ctx, t, p)
}

func (b *broken) Remove(ctx context.Context, a redirect.Attachment) error {
	if b.remove != nil {
		return b.remove()
	}
	return b.Backend.Remove(ctx, a)
}

func TestPrivilegedRunOfBrokenBackends(t *testing.T) {
	nothing := func() error { return nil }
	for _, tt := range []struct {
		name  string
		b     broken
		bad   int    // checks that are not OK
		first string // what the first of them got
	}{
		// Those of the app and the client, with a proxy and without.
		{"programs nothing", broken{apply: nothing}, 8, "direct, the service itself"},
		{"fails to program", broken{apply: func() error { return errors.New("no room") }}, 1, "program the pod: no room"},
		{"removes nothing", broken{remove: nothing}, 4, "refused"},
		{"fails to remove", broken{remove: func() error { return errors.New("stuck") }}, 1, "remove what was programmed: stuck"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			begin(t)
			opts := options(probe.PathEBPF)
			opts.backend = func(_, bpfDir, runDir string) redirect.Backend {
				b := tt.b
				b.Backend = ebpf.New(loader.Options{BPFDir: bpfDir, RunDir: runDir, Programs: programs.New()})
				return &b
			}
			var bad []probe.Check
			for _, c := range Run(t.Context(), opts) {
				if !c.OK {
					bad = append(bad, c)
				}
			}
			if len(bad) != tt.bad || !strings.Contains(bad[0].Got, tt.first) {
				t.Errorf("%d checks failed, want %d and first %q: %+v", len(bad), tt.bad, tt.first, bad)
			}
		})
	}
}

// Whoever wants it to stop has it stop soon, and everything cleared away.
func TestPrivilegedRunIsStopped(t *testing.T) {
	for _, after := range []time.Duration{0, 5 * time.Millisecond, 30 * time.Millisecond, 80 * time.Millisecond, 150 * time.Millisecond} {
		t.Run(after.String(), func(t *testing.T) {
			begin(t)
			ctx, cancel := context.WithCancelCause(t.Context())
			timer := time.AfterFunc(after, func() { cancel(errors.New("enough")) })
			defer timer.Stop()
			start := time.Now()
			checks := Run(ctx, options(probe.Paths...))
			if took := time.Since(start); took > after+10*time.Second { // of Limit's minute; to clear away may take five
				t.Errorf("it took %v", took)
			}
			if ctx.Err() == nil {
				return // it was done before
			}
			if last := checks[len(checks)-1]; last.OK || !strings.Contains(last.Got, "enough") {
				t.Errorf("the last check: %+v", last)
			}
		})
	}
}

func TestPrivilegedListenMPTCP(t *testing.T) {
	begin(t)
	c, err := scratch.NewCgroup(testbed.Cgroup2Mount(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := ListenMPTCP([]string{childArg})(t.Context(), c.Dir); err != nil {
		t.Error(err)
	}
	if err := c.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestChildRefusesUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"serve"}, {"serve", "x", "true"}, {"mptcp", "x"}, {"other", "1", "true"}} {
		var out bytes.Buffer
		if err := Child(args, strings.NewReader(""), &out); !errors.Is(err, errUsage) {
			t.Errorf("%v: %v, %s", args, err, &out)
		}
	}
}
