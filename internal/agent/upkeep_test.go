// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

// TestUpkeep: an agent that has the node upgrades pods and removes what is left of
// others; what it has said it does not say again.
func TestUpkeep(t *testing.T) {
	var (
		out               bytes.Buffer
		upgrades, sweeps  int
		done              loader.Upgraded
		upgradeErr, mine  error
		swept             []redirect.Attachment
		file              = &configFile{now: &config{Config: netconf.Default()}}
		notMine           = errors.New("another has it")
		id                = loader.ID{ContainerID: "c", IfName: "eth0"}
		wasKept           = loader.Kept{ID: id, Pod: loader.PodRef{Namespace: "shop", Name: "a"}, Build: "datapath-old", Why: errors.New("its maps differ")}
		otherwise, others = wasKept, wasKept
	)
	otherwise.Why = errors.New("its filters can't be reached")
	others.ID.ContainerID = "d"
	u := newUpkeeper(file, t.TempDir(), func() bool { return mine == nil }, logTo(&out))
	u.upgrade = func(context.Context, *config) (*loader.Upgraded, error) { upgrades++; return &done, upgradeErr }
	u.sweep = func(context.Context, *config) ([]redirect.Attachment, error) { sweeps++; return swept, nil }
	look := func(what string, wants ...string) {
		t.Helper()
		out.Reset()
		u.look(t.Context())
		got := out.String()
		if strings.Count(got, "\n") != len(wants) {
			t.Errorf("%s: it says %q, want %d lines", what, got, len(wants))
		}
		for _, want := range wants {
			if !strings.Contains(got, want) {
				t.Errorf("%s: it says %q, want %q", what, got, want)
			}
		}
	}

	mine = notMine
	look("another agent has the node")
	if upgrades+sweeps > 0 {
		t.Errorf("%d upgrades, %d sweeps by an agent that has not the node", upgrades, sweeps)
	}
	mine = nil
	swept = []redirect.Attachment{{ContainerID: "gone", IfName: "eth0"}}
	look("a pod that is gone", "container=gone")
	swept = nil
	done = loader.Upgraded{Moved: []loader.ID{id}, Kept: []loader.Kept{wasKept}}
	look("moved and kept", "pods=1", "its maps differ")
	done.Moved = nil
	look("kept again")
	done.Kept = []loader.Kept{otherwise, others}
	look("for another reason, and another", "can't be reached", "container=d")
	upgradeErr = errors.New("no lock")
	third := wasKept
	third.ID.ContainerID = "e"
	done.Kept = []loader.Kept{third}
	look("an error, before it came to the others", "no lock", "container=e")
	look("the same")
	done.Kept = []loader.Kept{otherwise, others, third}
	upgradeErr = nil
	look("none")
	upgradeErr = errors.New("no lock")
	look("again", "no lock")
	if upgrades != 8 || sweeps != 2 {
		t.Errorf("%d upgrades and %d sweeps, want 8 and 2", upgrades, sweeps)
	}
}

// Without a netconf the defaults say where the datapath is.
func TestConfigOf(t *testing.T) {
	for _, path := range []string{"", filepath.Join(t.TempDir(), "none")} {
		if c, _ := configOf(Options{Netconf: path, RunDir: t.TempDir()}).get(); c == nil || c.BPFDir != netconf.Default().BPFDir {
			t.Errorf("netconf %q: %+v", path, c)
		}
	}
}
