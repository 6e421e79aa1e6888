// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"shunt.dev/shunt/install"
)

// fakeInstallation is of one netconf. At most one may run.
type fakeInstallation struct {
	entry   string
	running *atomic.Int32
	fail    error
}

func (f *fakeInstallation) Run(ctx context.Context) error {
	if f.running.Add(1) != 1 {
		panic("two installations run at once")
	}
	defer f.running.Add(-1)
	if f.fail != nil {
		return f.fail
	}
	<-ctx.Done()
	return nil
}

func (f *fakeInstallation) State() install.State {
	return install.State{Installed: true, File: f.entry}
}

// TestKeeper: there is one installation at a time, of the netconf in force.
func TestKeeper(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		path := filepath.Join(t.TempDir(), "netconf.json")
		f := newConfigFile(path, "/run/shunt", logTo(&out))
		var running atomic.Int32
		var opened []string
		waited := false
		k := &keeper{
			config: f, log: logTo(&out),
			ready: func(ctx context.Context) { <-ctx.Done(); waited = true }, // in vain
			open: func(c *config) (installation, error) {
				opened = append(opened, string(c.raw))
				i := &fakeInstallation{entry: string(c.raw), running: &running}
				if len(opened) == 1 {
					return nil, errors.New("once")
				}
				return i, nil
			},
			fatal: func(err error) { t.Errorf("fatal: %v", err) },
		}
		l := &loops{log: logTo(&out)}
		ctx, cancel := context.WithCancel(t.Context())
		began := time.Now()
		one := l.startOther(ctx, "install", k.run)
		expect := func(ok bool, want string) {
			t.Helper()
			synctest.Wait()
			if got, says := k.condition(); got != ok || !strings.Contains(says, want) {
				t.Errorf("%v, %s; want %v, %s", got, says, ok, want)
			}
		}
		expect(false, "not yet")
		time.Sleep(firstWait) //nolint:forbidigo // the bubble's clock
		expect(false, "there is no valid netconf")
		if !waited || time.Since(began) > firstWait {
			t.Errorf("waited: %v, %v", waited, time.Since(began))
		}
		put := func(text string) {
			t.Helper()
			write(t, path, text)
			f.read()
			synctest.Wait()
		}
		put(`{"type":"shunt-cni"}`)
		if err := one.failure(); err == nil || err.Error() != "once" {
			t.Errorf("after its failure: %v", err)
		}
		time.Sleep(firstPause + firstWait) //nolint:forbidigo // the bubble's clock
		expect(true, `{"type":"shunt-cni"}`)
		put(`{"type":"shunt-cni","logLevel":"debug"}`)
		expect(true, "debug")
		put(`{"type":"shunt-cni","logLevel":"loud"}`)
		expect(true, "debug")
		if n := running.Load(); n != 1 || len(opened) != 3 {
			t.Errorf("%d run; opened: %q", n, opened)
		}
		cancel()
		if !l.wait(time.Second) || running.Load() != 0 {
			t.Errorf("%d run at the end", running.Load())
		}
	})
}

// TestKeeperFatal: what only a new process can mend ends the agent.
func TestKeeperFatal(t *testing.T) {
	path := filepath.Join(t.TempDir(), "netconf.json")
	write(t, path, `{"type":"shunt-cni"}`)
	f := newConfigFile(path, "/run/shunt", logTo(new(bytes.Buffer)))
	f.read()
	gone := errors.New("the directory was removed")
	var told error
	k := &keeper{
		config: f, log: f.log, ready: func(context.Context) {}, fatal: func(err error) { told = err },
		open: func(*config) (installation, error) {
			return &fakeInstallation{running: new(atomic.Int32), fail: gone}, nil
		},
	}
	if err := k.run(t.Context()); !errors.Is(err, gone) || !errors.Is(told, gone) {
		t.Errorf("%v; told: %v", err, told)
	}
}
