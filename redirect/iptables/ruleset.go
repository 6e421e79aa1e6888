// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// found is what is ours in a namespace, or should be, read from the text that
// iptables-save gives or iptables-restore takes.
type found struct {
	tables []*foundTable
}

type foundTable struct {
	name   string
	chains []*foundChain
	// jumps are rules of other chains, and those chains' names, that lead to
	// ours.
	jumps []string
}

type foundChain struct {
	name  string
	rules []string
}

// parse reads what is ours; other chains and rules are passed over.
func parse(text string) *found {
	out := new(found)
	var t *foundTable
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		switch {
		case strings.HasPrefix(line, "*"):
			t = out.table(line[1:])
			if t == nil {
				t = &foundTable{name: line[1:]}
				out.tables = append(out.tables, t)
			}
		case t == nil:
		case strings.HasPrefix(line, ":"), strings.HasPrefix(line, "-N "):
			name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(line, ":"), "-N "), " ")
			if ours(name) {
				t.chain(name)
			}
		case strings.HasPrefix(line, "-A "):
			name, spec, _ := strings.Cut(line[len("-A "):], " ")
			if ours(name) {
				c := t.chain(name)
				c.rules = append(c.rules, spec)
			} else if ours(target(spec)) {
				t.jumps = append(t.jumps, line[len("-A "):])
			}
		}
	}
	out.tables = slices.DeleteFunc(out.tables, func(t *foundTable) bool { return len(t.chains) == 0 && len(t.jumps) == 0 })
	return out
}

func ours(name string) bool { return strings.HasPrefix(name, prefix) }

// target is where a rule leads.
func target(spec string) string {
	words := strings.Fields(spec)
	for i, w := range words[:max(0, len(words)-1)] {
		if w == "-j" || w == "-g" {
			return words[i+1]
		}
	}
	return ""
}

func (x *found) table(name string) *foundTable {
	for _, t := range x.tables {
		if t.name == name {
			return t
		}
	}
	return nil
}

func (x *found) empty() bool { return len(x.tables) == 0 }

// chain finds a chain or makes it.
func (t *foundTable) chain(name string) *foundChain {
	if c := t.find(name); c != nil {
		return c
	}
	c := &foundChain{name: name}
	t.chains = append(t.chains, c)
	return c
}

func (t *foundTable) find(name string) *foundChain {
	for _, c := range t.chains {
		if c.name == name {
			return c
		}
	}
	return nil
}

// maxDifferences is how many differences are told.
const maxDifferences = 3

// differences compares what is there with what should be, order included, and
// says where they differ; "" is nowhere.
func differences(want, got *found) string {
	var out []string
	for _, t := range want.tables {
		there := got.table(t.name)
		if there == nil {
			there = &foundTable{name: t.name}
		}
		out = append(out, t.differences(there)...)
	}
	for _, t := range got.tables {
		if want.table(t.name) == nil {
			out = append(out, (&foundTable{name: t.name}).differences(t)...)
		}
	}
	if more := len(out) - maxDifferences; more > 0 {
		out = append(out[:maxDifferences], fmt.Sprintf("and %d more", more))
	}
	return strings.Join(out, "; ")
}

func (t *foundTable) differences(got *foundTable) (out []string) {
	say := func(format string, args ...any) {
		out = append(out, "table "+t.name+": "+fmt.Sprintf(format, args...))
	}
	for _, c := range t.chains {
		there := got.find(c.name)
		if there == nil {
			say("chain %s is missing", c.name)
			continue
		}
		if i := unequal(c.rules, there.rules); i >= 0 {
			say("chain %s, rule %d: there is %s, there should be %s", c.name, i+1, nth(there.rules, i), nth(c.rules, i))
		}
	}
	for _, c := range got.chains {
		if t.find(c.name) == nil {
			say("chain %s should not be there", c.name)
		}
	}
	// Built-in chains are listed in an order of the program's own.
	want, is := slices.Clone(t.jumps), slices.Clone(got.jumps)
	byChain := func(a, b string) int {
		a, _, _ = strings.Cut(a, " ")
		b, _, _ = strings.Cut(b, " ")
		return strings.Compare(a, b)
	}
	slices.SortStableFunc(want, byChain)
	slices.SortStableFunc(is, byChain)
	if i := unequal(want, is); i >= 0 {
		say("jumps to our chains: there is %s, there should be %s", nth(is, i), nth(want, i))
	}
	return out
}

// unequal is the index of the first rule that differs, -1 for none.
func unequal(want, got []string) int {
	for i := range max(len(want), len(got)) {
		if i >= len(want) || i >= len(got) || normal(want[i]) != normal(got[i]) {
			return i
		}
	}
	return -1
}

func nth(rules []string, i int) string {
	if i >= len(rules) {
		return "none"
	}
	return "`" + rules[i] + "`"
}

// normal brings a rule into a form that all versions of iptables-save agree
// on. They differ in the order of the options and in how they write addresses,
// and in whether they name the match that a protocol implies.
func normal(spec string) string {
	var groups []string
	for words := strings.Fields(spec); len(words) > 0; {
		n := 1
		if words[0] == "!" && len(words) > 1 {
			n = 2
		}
		for n < len(words) && words[n] != "!" && !strings.HasPrefix(words[n], "-") {
			n++
		}
		g := words[:n]
		words = words[n:]
		last := len(g) - 1
		switch g[len(g)-min(len(g), 2)] {
		case "-m":
			if g[last] == "tcp" || g[last] == "udp" {
				continue
			}
		case "-s", "-d":
			if p, err := netip.ParsePrefix(g[last]); err == nil {
				g[last] = p.String()
			} else if a, err := netip.ParseAddr(g[last]); err == nil {
				g[last] = netip.PrefixFrom(a, a.BitLen()).String()
			}
		}
		groups = append(groups, strings.Join(g, " "))
	}
	slices.Sort(groups)
	return strings.Join(groups, " ")
}

// tableOrder is the order in which tables are changed; see Render.
var tableOrder = []string{"nat", "mangle", "raw"}

func rank(table string) int {
	if i := slices.Index(tableOrder, table); i >= 0 {
		return i
	}
	return len(tableOrder)
}

// mend gives the input that makes what should be of what is there, each table
// in one commit. Tables that are right are left alone.
func mend(want []table, got *found) string {
	var (
		b    strings.Builder
		done = map[string]bool{}
	)
	for _, t := range want {
		done[t.name] = true
		there := got.table(t.name)
		if there == nil {
			t.render(&b)
			continue
		}
		var text strings.Builder
		t.render(&text)
		if len(parse(text.String()).table(t.name).differences(there)) == 0 {
			continue
		}
		b.WriteString("*" + t.name + "\n")
		for _, c := range t.chains {
			b.WriteString(":" + c.name + " - [0:0]\n") // made, or emptied
		}
		there.cut(&b, func(name string) bool {
			return !slices.ContainsFunc(t.chains, func(c chain) bool { return c.name == name })
		})
		t.renderRules(&b)
		b.WriteString("COMMIT\n")
	}
	left := slices.Clone(got.tables)
	slices.SortFunc(left, func(x, y *foundTable) int { return rank(x.name) - rank(y.name) })
	for _, t := range left {
		if !done[t.name] {
			t.remove(&b)
		}
	}
	return b.String()
}

// removal gives the input that removes what is there.
func (x *found) removal() string {
	var b strings.Builder
	tables := slices.Clone(x.tables)
	slices.SortFunc(tables, func(x, y *foundTable) int { return rank(y.name) - rank(x.name) })
	for _, t := range tables {
		t.remove(&b)
	}
	return b.String()
}

func (t *foundTable) remove(b *strings.Builder) {
	b.WriteString("*" + t.name + "\n")
	t.cut(b, func(string) bool { return true })
	b.WriteString("COMMIT\n")
}

// cut writes what removes our jumps, and our chains of which which says so.
func (t *foundTable) cut(b *strings.Builder, which func(name string) bool) {
	for _, j := range t.jumps {
		b.WriteString("-D " + j + "\n")
	}
	for _, c := range t.chains {
		if which(c.name) {
			b.WriteString("-F " + c.name + "\n")
		}
	}
	for _, c := range t.chains {
		if which(c.name) {
			b.WriteString("-X " + c.name + "\n")
		}
	}
}
