// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"shunt.dev/shunt/install"
)

// jwt makes a token of the agent's account; id tells it from others.
func jwt(id, uid, pod string, life time.Duration) string {
	bound := ""
	if pod != "" {
		bound = `"pod":{"name":"` + pod + `"},`
	}
	now := time.Now()
	return "e30." + base64.RawURLEncoding.EncodeToString(fmt.Appendf(nil,
		`{"iss":"i","jti":%q,"sub":"system:serviceaccount:shunt:agent","iat":%d,"exp":%d,"kubernetes.io":{%s"serviceaccount":{"uid":%q}}}`,
		id, now.Unix(), now.Add(life).Unix(), bound, uid)) + ".sig"
}

// A tokenBed has a tokenKeeper, and an API server that gives tokens or fails.
type tokenBed struct {
	*testing.T
	dir, source string
	log         bytes.Buffer
	life        time.Duration
	uid         string

	mu      sync.Mutex
	fail    error
	minted  int    // how often it was asked
	granted string // the last that was given
}

func newTokenBed(t *testing.T) *tokenBed {
	dir := t.TempDir()
	return &tokenBed{T: t, dir: dir, source: filepath.Join(dir, "pods"), life: tokenLife, uid: "u"}
}

func (b *tokenBed) keeper() *tokenKeeper {
	k := newTokenKeeper(nil, b.dir, b.source, logTo(&b.log))
	k.mint = func(ctx context.Context, namespace, account string) (string, time.Time, error) {
		if namespace != "shunt" || account != "agent" {
			b.Errorf("asked for a token of %s/%s", namespace, account)
		}
		if _, ok := ctx.Deadline(); !ok {
			b.Error("asked without a deadline")
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		b.minted++
		if b.fail != nil {
			return "", time.Time{}, b.fail
		}
		b.granted = jwt(fmt.Sprint(b.minted), b.uid, "", b.life)
		return b.granted, time.Now().Add(b.life), nil
	}
	return k
}

// start runs a keeper as the agent does, until the end that is returned.
func (b *tokenBed) start() (end func()) {
	b.Helper()
	k := b.keeper()
	if err := k.prepare(); err != nil {
		b.Fatal(err)
	}
	l := &loops{log: logTo(&b.log)}
	ctx, cancel := context.WithCancel(b.Context())
	l.start(ctx, "token", k.run)
	synctest.Wait()
	return func() {
		cancel()
		l.wg.Wait()
	}
}

func (b *tokenBed) asked() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.minted
}

func (b *tokenBed) last() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.granted
}

func (b *tokenBed) setFail(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = err
}

func (b *tokenBed) pass(d time.Duration) {
	time.Sleep(d) //nolint:forbidigo // the bubble's clock
	synctest.Wait()
}

func (b *tokenBed) expect(when, token string, asked int) {
	b.Helper()
	path := install.TokenPath(b.dir)
	data, err := os.ReadFile(path)
	if err != nil || string(data) != token || b.asked() != asked {
		b.Errorf("%s: %q, %v, asked for %d times; want %q, %d", when, data, err, b.asked(), token, asked)
	}
	if st, err := os.Stat(path); err != nil || st.Mode() != 0o600 {
		b.Errorf("%s: %v, %v", when, st, err)
	}
}

func forbidden() error {
	return apierrors.NewForbidden(schema.GroupResource{Resource: "serviceaccounts"}, "agent", nil)
}

// TestToken: a token is renewed when half of its life is over, whoever has
// asked for it.
func TestToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTokenBed(t)
		b.life = time.Hour // less than was asked for
		pods := jwt("pod", "u", "a", 24*time.Hour)
		write(t, b.source, pods+"\n")
		if err := b.keeper().prepare(); err != nil {
			t.Fatal(err)
		}
		b.expect("before the API server was asked", pods, 0)
		end := b.start()
		first := b.last()
		b.expect("at the start", first, 1)
		b.pass(29 * time.Minute)
		b.expect("before half of it", first, 1)
		end()

		end = b.start()
		b.expect("after a restart", first, 1)
		b.pass(8 * time.Minute) // half and a tenth, and what a look takes
		second := b.last()
		b.expect("after half of it", second, 2)

		b.setFail(forbidden())
		b.pass(50 * time.Minute)
		asked := b.asked()
		b.expect("while it can't be renewed", second, asked)
		if asked < 5 || asked > 20 {
			t.Errorf("asked %d times", asked-2)
		}
		b.pass(10 * time.Minute)
		b.expect("when it is over", pods, b.asked())
		b.pass(maxTokenPause * 3 / 2)
		b.setFail(nil)
		b.pass(maxTokenPause * 3 / 2)
		b.expect("when it is allowed again", b.last(), b.asked())
		end()
		for what, n := range map[string]int{"can't be renewed yet": 1, "has the token of the agent's pod": 1, "does not end with this pod": 3, "level=ERROR": 0} {
			if got := strings.Count(b.log.String(), what); got != n {
				t.Errorf("%q is said %d times, want %d:\n%s", what, got, n, b.log.String())
			}
		}
	})
}

// TestTokenRefused: where there is no other the pod's does, as it rotates.
func TestTokenRefused(t *testing.T) {
	down := errors.New("the API server is down")
	notFound := apierrors.NewNotFound(schema.GroupResource{Resource: "serviceaccounts"}, "agent")
	for _, tc := range []struct {
		name  string
		make  func(id string) string // nil: a pod's
		fail  error
		short time.Duration
		log   string
		never bool // it can't even be asked for
	}{
		{name: "forbidden", fail: forbidden(), log: "the chart's Role"},
		{name: "no such account", fail: notFound, log: "not found"},
		{name: "down", fail: down, log: "is down"},
		{name: "by a wrong clock", short: time.Minute, log: "look whether the clock is right"},
		{name: "no token of an account", make: func(id string) string { return id }, log: "the agent's own token", never: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newTokenBed(t)
				b.fail = tc.fail
				if tc.short > 0 {
					b.life = tc.short
				}
				pods := tc.make
				if pods == nil {
					pods = func(id string) string { return jwt(id, "u", "a", time.Hour) }
				}
				first := pods("first")
				write(t, b.source, first)
				defer b.start()()
				b.expect("at first", first, b.asked())
				b.pass(time.Hour)
				second := pods("second")
				write(t, b.source, second)
				b.pass(tokenInterval)
				b.expect("when the kubelet has replaced it", second, b.asked())
				if (b.asked() == 0) != tc.never || b.asked() > 25 {
					t.Errorf("asked for %d times in an hour", b.asked())
				}
				if got := b.log.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, tc.log) {
					t.Errorf("the log is not one line with %q:\n%s", tc.log, got)
				}
			})
		})
	}
}

// TestTokenHeld: which file of an earlier agent is kept.
func TestTokenHeld(t *testing.T) {
	for _, tc := range []struct {
		name string
		make func() string
		mode os.FileMode
		keep bool
	}{
		{"minted", func() string { return jwt("x", "u", "", time.Hour) }, 0o600, true},
		{"nearly over", func() string { return jwt("x", "u", "", time.Minute) }, 0o600, false},
		{"over", func() string { return jwt("x", "u", "", -time.Hour) }, 0o600, false},
		{"of a pod that is gone", func() string { return jwt("x", "u", "b", time.Hour) }, 0o600, false},
		{"of an account that was made anew", func() string { return jwt("x", "v", "", time.Hour) }, 0o600, false},
		{"no token", func() string { return "a.b.c" }, 0o600, false},
		{"to be read by others", func() string { return jwt("x", "u", "", time.Hour) }, 0o644, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newTokenBed(t)
				pods := jwt("pod", "u", "a", time.Hour)
				write(t, b.source, pods)
				held := tc.make()
				write(t, install.TokenPath(b.dir), held)
				if err := os.Chmod(install.TokenPath(b.dir), tc.mode); err != nil {
					t.Fatal(err)
				}
				want := pods
				if tc.keep {
					want = held
				}
				if err := b.keeper().prepare(); err != nil {
					t.Fatal(err)
				}
				b.expect("before the API server was asked", want, 0)
			})
		})
	}
}

// TestTokenMissing: without the pod's token, one that is good still is.
func TestTokenMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newTokenBed(t)
		if err := b.keeper().prepare(); err == nil || !strings.Contains(err.Error(), "read the token of the agent's pod: open "+b.source) {
			t.Errorf("got %v", err)
		}
		write(t, b.source, "\n")
		if err := b.keeper().prepare(); err == nil || !strings.Contains(err.Error(), "is empty") {
			t.Errorf("got %v", err)
		}
		write(t, install.TokenPath(b.dir), jwt("x", "u", "", time.Hour))
		defer b.start()()
		b.pass(40 * time.Minute)
		b.expect("after half of its life", b.last(), 1)
		// Whoever removes it has it made anew.
		if err := os.Remove(install.TokenPath(b.dir)); err != nil {
			t.Fatal(err)
		}
		write(t, b.source, jwt("pod", "u", "a", time.Hour))
		b.pass(tokenInterval)
		b.expect("when it was removed", b.last(), 2)
	})
}
