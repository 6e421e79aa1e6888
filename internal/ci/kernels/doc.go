// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"shunt.dev/shunt/internal/probe"
)

// A column is what the probe says of a kernel, by row, in the probe's order.
type column []cell

type cell struct{ name, text string }

func (c column) text(name string) string {
	for _, cell := range c {
		if cell.name == name {
			return cell.text
		}
	}
	return ""
}

// columnOf gives the rows, the outcome of the self-test by path, and the datapath.
func columnOf(r *probe.Report) column {
	var c column
	for _, row := range r.Rows {
		name := row.Name
		if row.Since != "" {
			name += " (" + row.Since + ")"
		}
		c = append(c, cell{name, string(row.Answer)})
	}
	for _, path := range probe.Paths {
		good, all := 0, 0
		for _, check := range r.SelfTest {
			if check.Path == path {
				all++
				if check.OK {
					good++
				}
			}
		}
		text := "not possible"
		if all > 0 {
			text = fmt.Sprintf("%d of %d", good, all)
		}
		c = append(c, cell{"self-test " + path, text})
	}
	return append(c, cell{"datapath of a default pod", r.Datapath}, cell{because, strings.ReplaceAll(r.Reason, "|", "/")})
}

const (
	because = "because"
	intro   = `# What each kernel has

Written by ` + "`make test-kernels KERNELS_UPDATE=1`" + `, which runs ` + "`shunt probe --self-test`" + ` on Debian's kernels in emulated
machines with cgroup2 alone and without a kubelet; ` + "`make test-kernels`" + ` fails where it is otherwise. In brackets is the mainline version that has it first: a no on
a kernel that is newer, or a yes on an older one, fails too. [PROBE.md](PROBE.md) says what the rows mean. A self-test counts the connections that went as they have to.

`
)

// render writes the document. The columns are in the order of versions.
func render(known map[string]column) string {
	kernels := slices.SortedFunc(maps.Keys(known), func(a, b string) int {
		if older(a, b) {
			return -1
		}
		return 1
	})
	var b strings.Builder
	b.WriteString(intro)
	line := func(cells []string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	line(append([]string{"Linux"}, kernels...))
	b.WriteString("|---" + strings.Repeat("|---", len(kernels)) + "|\n")
	var names []string
	for _, k := range kernels {
		for _, c := range known[k] {
			if c.name != because && !slices.Contains(names, c.name) {
				names = append(names, c.name)
			}
		}
	}
	for _, name := range names {
		cells := []string{name}
		for _, k := range kernels {
			cells = append(cells, known[k].text(name))
		}
		line(cells)
	}
	b.WriteString("\nWhy that datapath:\n\n")
	for _, k := range kernels {
		fmt.Fprintf(&b, "* %s: %s\n", k, known[k].text(because))
	}
	return b.String()
}

// parse reads what render has written.
func parse(text string) map[string]column {
	known := map[string]column{}
	var kernels []string
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "* "); ok {
			if k, why, ok := strings.Cut(rest, ": "); ok && known[k] != nil {
				known[k] = append(known[k], cell{because, why})
			}
		}
		if !strings.HasPrefix(line, "| ") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		if cells[0] == "Linux" {
			kernels = cells[1:]
			continue
		}
		for i, k := range kernels {
			if i+1 < len(cells) {
				known[k] = append(known[k], cell{cells[0], strings.TrimSpace(cells[i+1])})
			}
		}
	}
	return known
}

// compare fails where the document says something else than the probe.
func compare(known, got column) error {
	if known == nil {
		return nil // a kernel that the document does not tell of
	}
	var bad []error
	for _, c := range got {
		if c.name == because {
			continue // words, with the kernel's own among them
		}
		if was := known.text(c.name); was != c.text {
			bad = append(bad, fmt.Errorf("%s says %q of %s, and it is %q", doc, was, c.name, c.text))
		}
	}
	return errors.Join(bad...)
}
