// SPDX-License-Identifier: Apache-2.0

// Package programs keeps what the BPF programs and maps measure, exactly: how
// many instructions the object has, how large its maps are, and what each
// kernel that they were loaded on made of them. A file of the repository has it,
// and a test compares.
package programs

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// A Program is one of the object, before any kernel has seen it.
type Program struct {
	Name string
	// Instructions counts those of 8 bytes, called functions included.
	Instructions int
}

// A Map is one of the object; sizes are in bytes.
type Map struct {
	Name                string
	Key, Value, Entries int
}

// Bytes is what the map's entries take if it is full, without the kernel's own.
func (m Map) Bytes() int { return (m.Key + m.Value) * m.Entries }

// A Loaded program is what a kernel made of it.
type Loaded struct {
	// Kernel is its version and the machine's architecture, as in 6.18-x86_64.
	Kernel, Name string
	// Verified is how many instructions the verifier has looked at, Translated
	// how many the kernel has after it, and Jited the size of the machine code in
	// bytes, which depends on the processor too.
	Verified, Translated, Jited int
}

// A Table is all of them.
type Table struct {
	Programs []Program
	Maps     []Map
	Loaded   []Loaded
}

// FromSpec measures an object.
func FromSpec(spec *ebpf.CollectionSpec) Table {
	var t Table
	for name, p := range spec.Programs {
		size := uint64(0)
		for _, i := range p.Instructions {
			size += i.Size()
		}
		t.Programs = append(t.Programs, Program{name, int(size / asm.InstructionSize)})
	}
	for name, m := range spec.Maps {
		if !strings.HasPrefix(name, ".") { // constants
			t.Maps = append(t.Maps, Map{name, int(m.KeySize), int(m.ValueSize), int(m.MaxEntries)})
		}
	}
	t.sort()
	return t
}

func (t *Table) sort() {
	slices.SortFunc(t.Programs, func(a, b Program) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(t.Maps, func(a, b Map) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(t.Loaded, func(a, b Loaded) int {
		return cmp.Or(strings.Compare(a.Kernel, b.Kernel), strings.Compare(a.Name, b.Name))
	})
}

// On is what a kernel made of the programs.
func (t Table) On(kernel string) (loaded []Loaded) {
	for _, l := range t.Loaded {
		if l.Kernel == kernel {
			loaded = append(loaded, l)
		}
	}
	return loaded
}

// Kernels are those that the table knows of.
func (t Table) Kernels() (kernels []string) {
	for _, l := range t.Loaded {
		if !slices.Contains(kernels, l.Kernel) {
			kernels = append(kernels, l.Kernel)
		}
	}
	return kernels
}

// Replace takes in a new measurement: the object's, and where there is any, one
// kernel's. What other kernels made of another object is out of date, and goes.
func (t *Table) Replace(now Table) {
	changed := !slices.Equal(t.Programs, now.Programs) || !slices.Equal(t.Maps, now.Maps)
	t.Programs, t.Maps = now.Programs, now.Maps
	t.Loaded = slices.DeleteFunc(t.Loaded, func(l Loaded) bool {
		return changed || slices.Contains(now.Kernels(), l.Kernel)
	})
	t.Loaded = append(t.Loaded, now.Loaded...)
	t.sort()
}

const head = `# SPDX-License-Identifier: Apache-2.0
#
# What the BPF programs and maps measure. As root, this writes it again:
#
#     go test -count=1 ./bench/programs -update
#
# program NAME INSTRUCTIONS (in the object)
# map     NAME KEY VALUE (bytes) ENTRIES
# kernel  VERSION NAME VERIFIED TRANSLATED (instructions) JITED (bytes)
`

// Write writes the file that Read reads.
func (t Table) Write(w io.Writer) error {
	b := bufio.NewWriter(w)
	fmt.Fprint(b, head)
	for _, p := range t.Programs {
		fmt.Fprintf(b, "program %-20s %6d\n", p.Name, p.Instructions)
	}
	for _, m := range t.Maps {
		fmt.Fprintf(b, "map     %-20s %6d %6d %8d\n", m.Name, m.Key, m.Value, m.Entries)
	}
	for _, l := range t.Loaded {
		fmt.Fprintf(b, "kernel  %s %-20s %6d %6d %6d\n", l.Kernel, l.Name, l.Verified, l.Translated, l.Jited)
	}
	return b.Flush()
}

// Read reads a table; its errors name the file and the line.
func Read(r io.Reader, file string) (Table, error) {
	var t Table
	lines := bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if err := t.line(f); err != nil {
			return Table{}, fmt.Errorf("%s:%d: %w", file, n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return Table{}, fmt.Errorf("%s: %w", file, err)
	}
	return t, nil
}

func (t *Table) line(f []string) error {
	forms := map[string]struct {
		names int // fields that are no numbers
		want  string
		count int
	}{
		"program": {1, "program NAME INSTRUCTIONS", 3},
		"map":     {1, "map NAME KEY VALUE ENTRIES", 5},
		"kernel":  {2, "kernel VERSION NAME VERIFIED TRANSLATED JITED", 6},
	}
	form, ok := forms[f[0]]
	if !ok {
		return fmt.Errorf("%q: want program, map or kernel", f[0])
	}
	if len(f) != form.count {
		return fmt.Errorf("%q: want %s", strings.Join(f, " "), form.want)
	}
	var v []int
	for _, digits := range f[1+form.names:] {
		n, err := strconv.Atoi(digits)
		if err != nil || n < 0 {
			return fmt.Errorf("%q: %q, want a number of 0 or more", strings.Join(f, " "), digits)
		}
		v = append(v, n)
	}
	switch f[0] {
	case "program":
		t.Programs = append(t.Programs, Program{f[1], v[0]})
	case "map":
		t.Maps = append(t.Maps, Map{f[1], v[0], v[1], v[2]})
	case "kernel":
		t.Loaded = append(t.Loaded, Loaded{f[1], f[2], v[0], v[1], v[2]})
	}
	return nil
}

// Tolerance is by how much, in percent, a number may grow before that has to be
// written down.
const Tolerance = 2

// Grown compares a measurement with what is written down, and returns an error
// for each number that has grown beyond the tolerance, for what is new and for
// what is gone. Of what kernels made of the programs, only those in both are
// compared; machine code is not, as it is the processor's too.
func Grown(written, now Table) error {
	var errs []error
	compare := func(what string, was, is int) {
		if is*100 > was*(100+Tolerance) {
			errs = append(errs, fmt.Errorf("%s: %d, which is more than %d %% above %d", what, is, Tolerance, was))
		}
	}
	old, fresh := written.numbers(), now.numbers()
	for _, n := range fresh {
		i := slices.IndexFunc(old, func(o number) bool { return o.what == n.what })
		switch {
		case i >= 0:
			compare(n.what, old[i].value, n.value)
		case n.kernel == "" || slices.Contains(written.Kernels(), n.kernel):
			errs = append(errs, fmt.Errorf("%s: %d, and nothing is written down", n.what, n.value))
		}
	}
	for _, o := range old {
		if (o.kernel == "" || slices.Contains(now.Kernels(), o.kernel)) &&
			!slices.ContainsFunc(fresh, func(n number) bool { return n.what == o.what }) {
			errs = append(errs, fmt.Errorf("%s: is written down, and not there any more", o.what))
		}
	}
	return errors.Join(errs...)
}

type number struct {
	what, kernel string
	value        int
}

func (t Table) numbers() (all []number) {
	for _, p := range t.Programs {
		all = append(all, number{p.Name + ": instructions", "", p.Instructions})
	}
	for _, m := range t.Maps {
		all = append(all,
			number{m.Name + ": bytes of an entry", "", m.Key + m.Value},
			number{m.Name + ": bytes of all entries", "", m.Bytes()})
	}
	for _, l := range t.Loaded {
		all = append(all,
			number{fmt.Sprintf("%s on %s: verified instructions", l.Name, l.Kernel), l.Kernel, l.Verified},
			number{fmt.Sprintf("%s on %s: translated instructions", l.Name, l.Kernel), l.Kernel, l.Translated})
	}
	return all
}
