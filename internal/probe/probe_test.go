// SPDX-License-Identifier: Apache-2.0

package probe

import (
	"bytes"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// node gives rows as of a node on which all is well, but for those that are
// given.
func node(but ...Row) []Row {
	rows := []Row{
		{Name: "iptables-nft-programs", Group: GroupIptables, Answer: Yes, NeededFor: ForIptables, Why: "found"},
		{Name: "iptables-nft-redirect4", Group: GroupIptables, Answer: Yes, NeededFor: ForIptables, Why: "done", Since: "3.13"},
		{Name: "iptables-nft-redirect6", Group: GroupIptables, Answer: Yes, NeededFor: ForIptables, Why: "done", Since: "3.13"},
		{Name: "iptables-nft-tproxy4", Group: GroupIptables, Answer: No, NeededFor: Optional, Why: "no TPROXY", Since: "3.13"},
		{Name: "iptables-legacy-programs", Group: GroupIptables, Answer: Yes, NeededFor: ForIptables, Why: "found"},
		{Name: "iptables-legacy-redirect4", Group: GroupIptables, Answer: Yes, NeededFor: ForIptables, Why: "done"},
		{Name: "tc-clsact", Group: GroupTC, Answer: Yes, NeededFor: ForTC, Why: "done", Since: "4.5"},
		{Name: "ipv6", Group: GroupKernel, Answer: Yes, NeededFor: Optional, Why: "the kernel has IPv6"},
		{Name: "btf", Group: GroupKernel, Answer: Yes, NeededFor: ForEBPF, Why: "there", Since: "5.4"},
		{Name: "cgroup-unified", Group: GroupCgroup, Answer: Yes, NeededFor: Optional, Why: "the only hierarchy"},
		{Name: "bpf-sockops", Group: GroupBPF, Answer: Yes, NeededFor: ForEBPF, Why: "loaded", Since: "5.15"},
	}
	for _, b := range but {
		for i := range rows {
			if rows[i].Name == b.Name {
				rows[i].Answer, rows[i].Why = b.Answer, b.Why
			}
		}
	}
	return rows
}

func is(name string, a Answer) Row { return Row{Name: name, Answer: a, Why: "it says " + string(a)} }

func TestConclude(t *testing.T) {
	noEBPF := is("bpf-sockops", No)
	for _, tt := range []struct {
		name     string
		rows     []Row
		wish     Wish
		datapath string
		reason   string // a part of it
	}{
		{"all is well", node(), Wish{}, EBPF, "all that eBPF needs is there"},
		{"a hybrid host", node(is("cgroup-unified", No)), Wish{}, EBPF, "cgroup-unified"},
		{"no iptables", node(is("iptables-nft-programs", No), is("iptables-legacy-programs", No)), Wish{}, EBPF, ""},
		{"no tc", node(is("tc-clsact", No)), Wish{InboundHook: "auto"}, EBPF, ""},
		{"no tc, which is asked for", node(is("tc-clsact", No)), Wish{InboundHook: "tc"}, Iptables, "tc-clsact: it says no"},
		{"tc untold, which is asked for", node(is("tc-clsact", Unknown)), Wish{InboundHook: "tc"}, "unknown", "tc-clsact"},
		{"no eBPF", node(noEBPF), Wish{}, Iptables, "bpf-sockops: it says no"},
		{"no eBPF, nft broken", node(noEBPF, is("iptables-nft-redirect4", No)), Wish{}, Iptables, "iptables-legacy does"},
		{"no eBPF, nft broken, legacy not wished for", node(noEBPF, is("iptables-nft-redirect4", No)), Wish{IptablesBackend: "nft"}, None, "iptables-nft-redirect4"},
		{"no eBPF, no iptables", node(noEBPF, is("iptables-nft-programs", No), is("iptables-legacy-redirect4", No)), Wish{}, None, "nor does iptables"},
		{"no eBPF, iptables for IPv4 only", node(noEBPF, is("iptables-nft-redirect6", No), is("iptables-legacy-programs", No)), Wish{}, None, "iptables-nft-redirect6"},
		{"no eBPF, iptables for IPv4 only, no IPv6", node(noEBPF, is("ipv6", No), is("iptables-nft-redirect6", No)), Wish{}, Iptables, "iptables-nft does"},
		{"no eBPF, one mode of iptables untold", node(noEBPF, is("iptables-nft-redirect4", Unknown), is("iptables-legacy-programs", No)), Wish{}, "unknown", "could not be told"},
		{"eBPF untold", node(is("btf", Unknown)), Wish{}, "unknown", "btf: it says unknown"},
		{"one no outweighs what is untold", node(is("btf", Unknown), noEBPF), Wish{}, Iptables, "bpf-sockops"},
		{"iptables asked for", node(), Wish{Datapath: Iptables}, Iptables, "asked for"},
		{"iptables asked for and broken", node(is("iptables-nft-programs", No), is("iptables-legacy-programs", No)), Wish{Datapath: Iptables}, None, "asked for"},
		{"iptables asked for and untold", node(is("iptables-nft-programs", No), is("iptables-legacy-programs", Unknown)), Wish{Datapath: Iptables}, "unknown", "asked for"},
		{"ebpf asked for", node(), Wish{Datapath: EBPF}, EBPF, ""},
		{"ebpf asked for and refused", node(noEBPF), Wish{Datapath: EBPF}, None, "asked for"},
		{"nothing was looked at", nil, Wish{}, "unknown", "nothing that it needs was looked at"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := NewReport("6.1.0", tt.rows, tt.wish)
			if r.Datapath != tt.datapath || !strings.Contains(r.Reason, tt.reason) || r.Reason == "" {
				t.Errorf("%s: %s, want %s: …%s…", r.Datapath, r.Reason, tt.datapath, tt.reason)
			}
		})
	}
}

func TestServes(t *testing.T) {
	r := NewReport("6.1.0", node(is("iptables-legacy-redirect4", Unknown), is("btf", No)), Wish{})
	got := map[string]Answer{}
	for _, p := range Paths {
		got[p], _ = r.Serves(p)
	}
	want := map[string]Answer{PathEBPF: No, PathNFT: Yes, PathLegacy: Unknown}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// golden is a report with one of everything.
func golden() *Report {
	r := NewReport("6.1.0-13-amd64", node(
		Row{Name: "bpf-sockops", Answer: No, Why: "load program: invalid argument: unknown func bpf_get_netns_cookie#122 (a long reason, and one that does not fit into the width of a table)"},
		Row{Name: "cgroup-unified", Answer: Unknown, Why: NeedsRoot + ": permission denied"},
	), Wish{})
	r.SelfTest = []Check{
		{Path: PathNFT, Connection: "IPv4 app to service", Expected: "proxy :15001", Got: "proxy :15001", OK: true},
		{Path: PathNFT, Connection: "IPv4 client to app", Expected: "proxy :15006", Got: "direct, the app itself"},
	}
	return r
}

func TestGolden(t *testing.T) {
	var table, empty bytes.Buffer
	golden().WriteTable(&table, true)
	NewReport("6.1.0", nil, Wish{}).WriteTable(&empty, true)
	text, err := json.MarshalIndent(golden(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string][]byte{"report.json": append(text, '\n'), "report.txt": table.Bytes(), "empty.txt": empty.Bytes()} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	for line := range strings.Lines(table.String()) {
		// The last line is a sentence of its own.
		if len(line) > width+1 && !strings.HasPrefix(line, "datapath") {
			t.Errorf("a line of %d columns: %s", len(line), line)
		}
	}
}

// Rows that are not there are null to nobody.
func TestJSONHasNoNull(t *testing.T) {
	text, err := json.Marshal(NewReport("6.1.0", nil, Wish{}))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(text, []byte("null")) {
		t.Errorf("%s", text)
	}
}
