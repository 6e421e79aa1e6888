// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/probe"
)

func report(datapath string, rows ...probe.Row) *probe.Report {
	r := &probe.Report{Datapath: datapath, Reason: "eBPF does not work (x), but iptables-nft does", Rows: rows}
	for _, path := range probe.Paths {
		if path != probe.PathEBPF || datapath == probe.EBPF {
			r.SelfTest = append(r.SelfTest, probe.Check{Path: path, OK: true})
		}
	}
	return r
}

func TestJudge(t *testing.T) {
	row := func(answer probe.Answer) probe.Row { return probe.Row{Name: "x", Since: "6.6", Answer: answer} }
	broken := report(probe.EBPF)
	broken.SelfTest[0].OK = false
	for _, tt := range []struct {
		name, kernel string
		report       *probe.Report
		want         string // "": it is as it should be
	}{
		{"newer, yes", "6.12", report(probe.EBPF, row(probe.Yes)), ""},
		{"older, no", "6.1", report(probe.EBPF, row(probe.No)), ""},
		{"newer, no", "6.12", report(probe.EBPF, row(probe.No)), "x is no"},
		{"the same, unknown", "6.6", report(probe.EBPF, row(probe.Unknown)), "x is unknown"},
		{"older, yes", "5.10", report(probe.Iptables, row(probe.Yes)), "x is yes"},
		{"no version to tell by", "6.12", report(probe.EBPF, probe.Row{Name: "x", Answer: probe.No}), ""},
		{"too old for eBPF", "5.10", report(probe.EBPF), "datapath ebpf, not iptables"},
		{"falls back", "6.1", report(probe.Iptables), "datapath iptables, not ebpf"},
		{"self-test", "6.1", broken, "self-test of"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := judge(tt.kernel, tt.report)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func TestReadReport(t *testing.T) {
	with := func(answer probe.Answer) *probe.Report {
		return report(probe.EBPF, probe.Row{Name: "x", Answer: answer})
	}
	for _, tt := range []struct {
		name       string
		first      *probe.Report
		firstExits string
		second     *probe.Report
		want       string // "": the second is taken
	}{
		{"the same", with(probe.Yes), "0", with(probe.Yes), ""},
		{"told in the end", with(probe.Unknown), "0", with(probe.Yes), ""},
		{"not told in the end", with(probe.Yes), "0", with(probe.Unknown), "x yes, then unknown"},
		{"otherwise", with(probe.No), "0", with(probe.Yes), "x no, then yes"},
		{"another status", with(probe.Yes), "3", with(probe.Yes), "exit status 3 for datapath ebpf"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, r := range map[string]*probe.Report{"probe": tt.first, "self-test": tt.second} {
				b, err := json.Marshal(r)
				if err != nil {
					t.Fatal(err)
				}
				status := map[string]string{"probe": tt.firstExits, "self-test": "0"}[name]
				for file, content := range map[string]string{name + ".json": string(b), name + ".status": status + "\n"} {
					if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			got, err := readReport(dir)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.second, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDocument(t *testing.T) {
	known := map[string]column{
		"6.12": columnOf(report(probe.EBPF, probe.Row{Name: "a", Since: "6.6", Answer: probe.Yes})),
		"5.10": columnOf(report(probe.Iptables, probe.Row{Name: "a", Since: "6.6", Answer: probe.No})),
	}
	text := render(known)
	again := parse(text)
	if diff := cmp.Diff(known, again, cmp.AllowUnexported(cell{})); diff != "" {
		t.Errorf("(-written +read):\n%s\n%s", diff, text)
	}
	if err := compare(again["5.10"], known["5.10"]); err != nil {
		t.Error(err)
	}
	if compare(again["5.10"], known["6.12"]) == nil {
		t.Error("two kernels are alike")
	}
}

func TestTests(t *testing.T) {
	suites := []suite{{"p", []string{"TestA", "TestB/part"}}}
	for output, want := range map[string]string{
		"--- PASS: TestA (0.10s)\n--- PASS: TestB (1.00s)\n    --- PASS: TestB/part (0.10s)\n": "",
		"--- PASS: TestA (0.10s)\n": "TestB/part of p has not run",
		"--- PASS: TestA (0.10s)\n--- SKIP: TestB (1.00s)\n    --- SKIP: TestB/part (0.10s)\n": "SKIP: TestB",
	} {
		_, err := tests(output, suites, io.Discard)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", output, err, want)
		}
	}
	if got := pattern([]string{"TestA", "TestB/part"}); got != "^TestA$|^TestB$/^part$" {
		t.Error(got)
	}
}
