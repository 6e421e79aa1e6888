// SPDX-License-Identifier: Apache-2.0

//go:build linux

package programs

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/testbed"
)

var update = flag.Bool("update", false, "write programs.txt")

const file = "programs.txt"

func TestMain(m *testing.M) { testbed.Main(m) }

func written(t *testing.T) Table {
	t.Helper()
	f, err := os.Open(file)
	if *update && errors.Is(err, fs.ErrNotExist) {
		return Table{}
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	table, err := Read(f, file)
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// gate compares with what is written down, or writes it.
func gate(t *testing.T, now Table) {
	t.Helper()
	old := written(t)
	if *update {
		old.Replace(now)
		var b bytes.Buffer
		if err := old.Write(&b); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := Grown(old, now); err != nil {
		t.Errorf("what the BPF programs measure is not what is written down; if it has to be so, run\n"+
			"\tgo test -count=1 ./bench/programs -update\nas root, and say why in the commit:\n%v", err)
	}
}

func spec(t *testing.T) *ebpf.CollectionSpec {
	t.Helper()
	spec, err := object.LoadShunt()
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// TestObject has the numbers that are the same everywhere.
func TestObject(t *testing.T) { gate(t, FromSpec(spec(t))) }

// kernel names the running one as the table does.
func kernel(t *testing.T) string {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatal(err)
	}
	version := strings.Split(unix.ByteSliceToString(u.Release[:]), ".")
	if len(version) < 2 {
		t.Fatalf("kernel release %q, want MAJOR.MINOR…", u.Release)
	}
	return fmt.Sprintf("%s.%s-%s", version[0], version[1], unix.ByteSliceToString(u.Machine[:]))
}

// TestPrivilegedLoaded has what this kernel makes of the programs. A kernel that
// nothing is written down of is only told.
func TestPrivilegedLoaded(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	spec := spec(t)
	now := FromSpec(spec)
	// As the loader does where the kernel has everything.
	for _, v := range []string{bpf.ShuntVarHaveMptcp, bpf.ShuntVarHaveSetRetval} {
		if err := spec.Variables[v].Set(true); err != nil {
			t.Fatal(err)
		}
	}
	c, err := ebpf.NewCollection(spec)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	running := kernel(t)
	for name, p := range c.Programs {
		info, err := p.Info()
		if err != nil {
			t.Fatal(err)
		}
		l := Loaded{Kernel: running, Name: name}
		verified, ok := info.VerifiedInstructions()
		if !ok {
			t.Fatal("this kernel does not tell how many instructions it has verified: there since 5.16 (commit aba64c7da983)")
		}
		l.Verified = int(verified)
		size, err := info.TranslatedSize()
		if err != nil {
			t.Fatal(err)
		}
		l.Translated = size / asm.InstructionSize
		jited, err := info.JitedSize()
		if err != nil {
			t.Fatal(err)
		}
		l.Jited = int(jited)
		now.Loaded = append(now.Loaded, l)
	}
	gate(t, now)
	if old := written(t); len(old.On(running)) == 0 {
		t.Logf("%s has nothing of kernel %s, but of %s: verified instructions are not compared", file, running, strings.Join(old.Kernels(), ", "))
	}
}

func TestFile(t *testing.T) {
	table := Table{
		Programs: []Program{{"connect", 100}, {"lookup", 200}},
		Maps:     []Map{{"pods", 8, 24, 4096}},
		Loaded:   []Loaded{{"6.18-x86_64", "connect", 12000, 110, 640}},
	}
	var b bytes.Buffer
	if err := table.Write(&b); err != nil {
		t.Fatal(err)
	}
	got, err := Read(&b, "x")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(table, got); diff != "" {
		t.Errorf("read back (-written +read):\n%s", diff)
	}
	for _, c := range []struct{ text, want string }{
		{"# good\nprogram connect\n", `x:2: "program connect": want program NAME INSTRUCTIONS`},
		{"program connect many\n", `x:1: "program connect many": "many", want a number of 0 or more`},
		{"map pods 1 2 -3\n", `x:1: "map pods 1 2 -3": "-3", want a number of 0 or more`},
		{"table pods\n", `x:1: "table": want program, map or kernel`},
	} {
		if _, err := Read(strings.NewReader(c.text), "x"); err == nil || err.Error() != c.want {
			t.Errorf("%q: got %v, want %s", c.text, err, c.want)
		}
	}
}

func TestGrown(t *testing.T) {
	base := func() Table {
		return Table{
			Programs: []Program{{"connect", 100}},
			Maps:     []Map{{"pods", 8, 24, 4096}},
			Loaded:   []Loaded{{"6.18-x86_64", "connect", 12000, 110, 640}},
		}
	}
	for _, c := range []struct {
		name   string
		change func(*Table)
		want   string // of the error; "" for none
	}{
		{"nothing", func(*Table) {}, ""},
		{"two percent", func(n *Table) { n.Programs[0].Instructions = 102 }, ""},
		{"three percent", func(n *Table) { n.Programs[0].Instructions = 103 }, "connect: instructions: 103, which is more than 2 % above 100"},
		{"less", func(n *Table) { n.Programs[0].Instructions = 10 }, ""},
		{"verified", func(n *Table) { n.Loaded[0].Verified = 13000 }, "connect on 6.18-x86_64: verified instructions: 13000, which is more than 2 % above 12000"},
		{"translated", func(n *Table) { n.Loaded[0].Translated = 120 }, "connect on 6.18-x86_64: translated instructions: 120, which is more than 2 % above 110"},
		{"machine code", func(n *Table) { n.Loaded[0].Jited = 6400 }, ""},
		{"another kernel", func(n *Table) { n.Loaded[0] = Loaded{"6.1-x86_64", "connect", 99999, 999, 1} }, ""},
		{"a wider entry", func(n *Table) { n.Maps[0].Value = 32 }, "pods: bytes of an entry: 40, which is more than 2 % above 32\npods: bytes of all entries: 163840, which is more than 2 % above 131072"},
		{"more entries", func(n *Table) { n.Maps[0].Entries *= 2 }, "pods: bytes of all entries: 262144, which is more than 2 % above 131072"},
		{"a new program", func(n *Table) { n.Programs = append(n.Programs, Program{"new", 1}) }, "new: instructions: 1, and nothing is written down"},
		{"no map", func(n *Table) { n.Maps = nil }, "pods: bytes of an entry: is written down, and not there any more\npods: bytes of all entries: is written down, and not there any more"},
		{"without root", func(n *Table) { n.Loaded = nil }, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			now := base()
			c.change(&now)
			got := ""
			if err := Grown(base(), now); err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}

func TestReplace(t *testing.T) {
	old := Table{
		Programs: []Program{{"connect", 100}},
		Loaded:   []Loaded{{"6.1-x86_64", "connect", 1, 1, 1}, {"6.18-x86_64", "connect", 2, 2, 2}},
	}
	same := old
	same.Loaded = []Loaded{{"6.18-x86_64", "connect", 3, 3, 3}}
	got := Table{Programs: old.Programs, Loaded: append([]Loaded(nil), old.Loaded...)}
	got.Replace(same)
	want := Table{Programs: old.Programs, Loaded: []Loaded{{"6.1-x86_64", "connect", 1, 1, 1}, {"6.18-x86_64", "connect", 3, 3, 3}}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the same object (-want +got):\n%s", diff)
	}
	other := Table{Programs: []Program{{"connect", 90}}}
	got.Replace(other)
	if diff := cmp.Diff(other.Programs, got.Programs); diff != "" || len(got.Loaded) != 0 {
		t.Errorf("another object: %+v", got)
	}
}
