// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	outTo = series{metricFlows, "outbound", "out-include-cidr"}
	inTo  = series{metricFlows, "inbound", "in-include"}
)

func counts(out, in uint64) map[series]uint64 { return map[series]uint64{outTo: out, inTo: in} }

// TestAccounts: totals grow by what each pod's grow by, whatever becomes of pods
// and of the agent.
func TestAccounts(t *testing.T) {
	dir := t.TempDir()
	a, err := openAccounts(dir)
	if err != nil {
		t.Fatal(err)
	}
	type pods = map[string]map[series]uint64
	for _, step := range []struct {
		name      string
		pods      pods
		partial   bool
		out, in   uint64
		restarted bool // the agent, before it
	}{
		{"none", pods{}, false, 0, 0, false},
		{"two pods", pods{"a": counts(3, 0), "b": counts(5, 1)}, false, 8, 1, false},
		{"no change", pods{"a": counts(3, 0), "b": counts(5, 1)}, false, 8, 1, false},
		{"one grows", pods{"a": counts(4, 0), "b": counts(5, 1)}, false, 9, 1, false},
		{"one goes", pods{"b": counts(5, 2)}, false, 9, 2, false},
		{"one comes by the other's name", pods{"a": counts(2, 0), "b": counts(5, 2)}, false, 11, 2, false},
		{"a restart", pods{"a": counts(2, 0), "b": counts(6, 2)}, false, 12, 2, true},
		{"programmed anew", pods{"a": counts(2, 0), "b": counts(1, 0)}, false, 13, 2, false},
		{"not all could be read", pods{"a": counts(3, 0)}, true, 14, 2, false},
		{"all again", pods{"a": counts(3, 0), "b": counts(2, 0)}, false, 15, 2, false},
		{"all go", pods{}, false, 15, 2, true},
		{"a restart without pods", pods{}, false, 15, 2, true},
	} {
		if step.restarted {
			if a, err = openAccounts(dir); err != nil {
				t.Fatal(err)
			}
		}
		a.book(step.pods, !step.partial)
		if err := a.save(); err != nil {
			t.Fatal(err)
		}
		if got := counts(a.totals[outTo], a.totals[inTo]); !cmp.Equal(got, counts(step.out, step.in)) {
			t.Errorf("%s: got %v, want %d and %d", step.name, got, step.out, step.in)
		}
	}
	if st, err := os.Stat(filepath.Join(dir, accountsFile)); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v", st, err)
	}
}

// TestAccountsKilled: an agent that is killed at any moment, before or after it
// has kept its accounts, is followed by one that shows no less.
func TestAccountsKilled(t *testing.T) {
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a test's
	truth := uint64(0)
	pod := counts(0, 0)
	shown := uint64(0)
	a, err := openAccounts(dir)
	if err != nil {
		t.Fatal(err)
	}
	for range 500 {
		n := rng.Uint64N(5)
		pod[outTo] += n
		truth += n
		a.book(map[string]map[series]uint64{"p": pod}, true)
		killed := rng.IntN(3) // 0: before the save, 1: after it and before it is shown
		if killed > 0 {
			if err := a.save(); err != nil {
				t.Fatal(err)
			}
		}
		if killed < 2 {
			if a, err = openAccounts(dir); err != nil {
				t.Fatal(err)
			}
		}
		if killed == 0 {
			continue // the next agent has not shown anything yet but this
		}
		if a.totals[outTo] < shown {
			t.Fatalf("shown %d after %d", a.totals[outTo], shown)
		}
		shown = a.totals[outTo]
	}
	a.book(map[string]map[series]uint64{"p": pod}, true)
	if a.totals[outTo] != truth {
		t.Errorf("%d in the end, want %d", a.totals[outTo], truth)
	}
}

func TestAccountsBadFile(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, accountsFile), `{"Totals": 3}`)
	a, err := openAccounts(dir)
	if err == nil || !strings.Contains(err.Error(), "read the counters") {
		t.Errorf("got %v", err)
	}
	a.book(map[string]map[series]uint64{"p": counts(1, 0)}, true)
	if err := a.save(); err != nil || a.totals[outTo] != 1 {
		t.Errorf("%v; %d", err, a.totals[outTo])
	}
	if a, err = openAccounts(dir); err != nil || a.totals[outTo] != 1 {
		t.Errorf("after that: %v, %d", err, a.totals[outTo])
	}
}
