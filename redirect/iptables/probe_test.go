// SPDX-License-Identifier: Apache-2.0

//go:build linux

package iptables

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/testbed"
)

// answers gives what rows say, by their names without "iptables-".
func answers(rows []probe.Row) map[string]probe.Answer {
	got := map[string]probe.Answer{}
	for _, r := range rows {
		got[strings.TrimPrefix(r.Name, "iptables-")] = r.Answer
	}
	return got
}

// all gives the same answer to every question about a mode.
func all(m Mode, programs, rest probe.Answer) map[string]probe.Answer {
	want := map[string]probe.Answer{string(m) + "-programs": programs}
	for _, what := range []string{"redirect", "owner", "tproxy", "dns"} {
		for _, f := range []string{"4", "6"} {
			want[string(m)+"-"+what+f] = rest
		}
	}
	return want
}

func both(nft, legacy map[string]probe.Answer) map[string]probe.Answer {
	for k, v := range legacy {
		nft[k] = v
	}
	return nft
}

func TestPrivilegedProbe(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	dir := t.TempDir()
	rows := Probe(t.Context(), Options{RunDir: dir})
	want := both(all(NFT, probe.Yes, probe.Yes), all(Legacy, probe.Yes, probe.Yes))
	if diff := cmp.Diff(want, answers(rows)); diff != "" {
		t.Errorf("%s\n%v", diff, rows)
	}
	for _, r := range rows {
		if r.Why == "" || r.Group != probe.GroupIptables {
			t.Errorf("%+v", r)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "*")); len(left) > 0 {
		t.Errorf("it has kept %v", left)
	}
}

// fakePrograms puts scripts in place of a mode's programs.
func fakePrograms(t *testing.T, m Mode, script string) (path string) {
	t.Helper()
	path = t.TempDir()
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"restore", "save"} {
			file := filepath.Join(path, name+"-"+string(m)+"-"+what)
			if err := os.WriteFile(file, []byte("#!/bin/sh\n[ \"$1\" = --version ] && echo v1 && exit\n"+script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}
	return path
}

func TestPrivilegedProbeOfOtherNodes(t *testing.T) {
	testbed.Privileged(t)
	none := all(Legacy, probe.No, probe.Unknown)
	for _, tt := range []struct {
		name   string
		script string
		nft    map[string]probe.Answer
		why    string // of nft-redirect4
	}{
		{"the kernel refuses", "echo 'RULE_APPEND failed (No such file or directory)' >&2; exit 4", all(NFT, probe.Yes, probe.No), "RULE_APPEND failed"},
		{"it refuses once", `[ -e "$0.again" ] && exit 0; : >"$0.again"; exit 4`, all(NFT, probe.Yes, probe.Yes), "REDIRECT"},
		{"programs that are killed", "kill -9 $$", all(NFT, probe.Yes, probe.Unknown), "killed"},
		{"programs that hang", "exec sleep 60", all(NFT, probe.Yes, probe.Unknown), "did not end"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			testbed.NoLeaks(t)
			limit := 20 * time.Second // for those that end
			if tt.why == "did not end" {
				limit = time.Second // in which one has to say its version
			}
			rows := Probe(t.Context(), Options{Path: fakePrograms(t, NFT, tt.script), Timeout: limit})
			if diff := cmp.Diff(both(tt.nft, none), answers(rows)); diff != "" {
				t.Errorf("%s\n%v", diff, rows)
			}
			if !strings.Contains(rows[1].Why, tt.why) {
				t.Errorf("why: %s", rows[1].Why)
			}
		})
	}
}

func TestProbeWithoutPrograms(t *testing.T) {
	rows := Probe(t.Context(), Options{Path: t.TempDir()})
	want := both(all(NFT, probe.No, probe.Unknown), all(Legacy, probe.No, probe.Unknown))
	if diff := cmp.Diff(want, answers(rows)); diff != "" {
		t.Error(diff)
	}
	if !strings.Contains(rows[0].Why, "install the package") {
		t.Errorf("why: %s", rows[0].Why)
	}
}
