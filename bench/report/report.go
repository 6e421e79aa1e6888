// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"shunt.dev/shunt/bench/programs"
)

// plotDir is where the plots are, as docs/BENCHMARKS.md sees it.
const plotDir = "bench"

// A builder writes the report, and knows which series are in it: what no
// section has told of, the last one does.
type builder struct {
	document
	s    *samples
	told map[*series]bool
}

func build(a *analysis) *document {
	b := &builder{s: a.samples, told: map[*series]bool{}}
	b.run(a.noise)
	b.claims(a.verdicts, a.whole)
	for _, x := range []struct {
		title string
		bases []string
		tell  func()
	}{
		{"Setup: what a pod costs the kernel", []string{"Setup", "Cold"}, b.setup},
		{"Steps", []string{"Step", "ProcessStep"}, b.steps},
		{"The plugin as a process", []string{"Process"}, b.process},
		{"Storm: many pods at once", []string{"Storm", "StormTotal", "StormKernel"}, b.storm},
		{"Scale: the 1st pod and the 1,000th", []string{"Scale"}, b.scale},
		{"Data path: out of the pod", []string{"Data"}, b.data},
		{"Data path: what a redirected connection pays for", []string{"DataParts"}, b.parts},
		{"Data path: into the pod", []string{"Inbound", "InboundPacket"}, b.inbound},
		{"Programs: how long a run takes", []string{"Program"}, b.runs},
	} {
		switch {
		case b.measured(x.bases):
			b.heading(x.title)
			x.tell()
		case a.whole:
			b.heading(x.title)
			b.say("Not measured in this run: there are no samples of %s.", strings.Join(x.bases, ", "))
		}
	}
	if a.whole {
		b.programs(&a.programs, a.samples.setting("kernel"))
	}
	b.rest()
	return &b.document
}

func (b *builder) heading(text string)             { b.add(heading{2, text}) }
func (b *builder) say(format string, args ...any)  { b.add(paragraph(fmt.Sprintf(format, args...))) }
func (b *builder) figure(file, alt, svg string)    { b.add(figure{file, alt, svg}) }
func (b *builder) table(texts int, head ...string) { b.add(&table{head: head, texts: texts}) }
func (b *builder) row(cells ...string) {
	t := b.blocks[len(b.blocks)-1].(*table)
	t.rows = append(t.rows, cells)
}

// measured tells whether any of the bases was.
func (b *builder) measured(bases []string) bool {
	return slices.ContainsFunc(b.s.series, func(x *series) bool { return slices.Contains(bases, x.base()) })
}

// settings are the configuration lines that the report names first, and how.
var settings = []struct{ key, name string }{
	{"cpu", "processor"},
	{"cpus", "CPUs"},
	{"memory", "memory"},
	{"machine", "machine"},
	{"kernel", "kernel"},
	{"distribution", "distribution"},
	{"iptables", "iptables"},
	{"goos", "system"},
	{"goarch", "architecture"},
	{"go", "Go"},
	{"commit", "commit"},
	{"date", "date"},
	{"load", "load at the start"},
	{"scope", "scope"},
}

func (b *builder) run(noise []string) {
	b.heading("The run")
	b.table(2, "", "")
	named := map[string]bool{"pkg": true}
	for _, x := range settings {
		named[x.key] = true
		if v := b.s.setting(x.key); v != "" {
			b.row(x.name, v)
		}
	}
	for _, c := range b.s.config {
		if !named[c.key] {
			b.row(c.key, strings.Join(c.values, ", "))
		}
	}
	took := 0.0
	for _, m := range b.s.of(machineBase, "sec") {
		b.told[m] = true
		for _, v := range m.values {
			took += v
		}
	}
	if took > 0 {
		b.row("it took", fmt.Sprintf("%.0f min", math.Ceil(took/60)))
	}
	for _, x := range b.s.series {
		if x.base() == machineBase {
			b.told[x] = true
		}
	}
	if len(noise) > 0 {
		b.say("**Noise.** What makes these numbers less certain than they look:")
		b.add(list(noise))
	} else {
		b.say("**Noise.** None that the rounds show: no interval is wider than ±%.0f %%, no median moved during the run, and the machine did nothing else.", wideSpread*100)
	}
}

// claims tells what of the claims is reached; of a part of the benchmarks, only
// those that it has to do with.
func (b *builder) claims(verdicts []verdict, whole bool) {
	if !whole {
		verdicts = slices.DeleteFunc(slices.Clone(verdicts), func(v verdict) bool { return len(v.missing) > 0 })
	}
	if len(verdicts) == 0 {
		return
	}
	b.heading("What it has to show")
	b.say("Ratios within one run, with intervals of %.0f %%.", confidence*100)
	b.table(1, "claim", "statistic", "bound", "measured", "interval", "reached")
	var missing []string
	for _, v := range verdicts {
		bound := v.sign() + " " + v.formatBound()
		if len(v.missing) > 0 {
			b.row(v.what, v.statistic(), bound, "", "", v.String())
			missing = append(missing, fmt.Sprintf("%s: no samples of `%s`.", v.what, strings.Join(v.missing, "`, `")))
			continue
		}
		interval := "–"
		if v.got.bounded() && v.of != maximum {
			interval = v.format(v.got.lo) + " – " + v.format(v.got.hi)
		}
		b.row(v.what, v.statistic(), bound, v.format(v.got.value), interval, v.String())
	}
	if len(missing) > 0 {
		b.say("**Missing.** These claims can't be judged by this run:")
		b.add(list(missing))
	}
}

// cell is a median with its interval, and its ratio to a baseline if there is
// another.
func (b *builder) cell(x, baseline *series) string {
	b.told[x] = true
	sum := summarize(x)
	text := formatValue(sum.median.value, x.unit)
	// What is counted and always the same is exact, however seldom it was.
	if exact := !strings.Contains(x.unit, "sec") && sum.max == slices.Min(x.values); !exact {
		text = strings.TrimSpace(text + " " + plusMinus(sum.median))
	}
	if baseline == nil || baseline == x {
		return text
	}
	r := ratio(x, p50, baseline, p50)
	switch {
	case math.IsInf(r.value, 0) || math.IsNaN(r.value):
		return text
	case same(x, baseline):
		return text + " (≈1)"
	}
	return text + " (×" + formatRatio(r.value) + ")"
}

// keysOf are the keys of the names of some series, in the order of the names.
func keysOf(all []*series) (keys []string) {
	for _, x := range all {
		at := 0
		for _, part := range strings.Split(x.name, "/")[1:] {
			key, _, _ := strings.Cut(part, "=")
			if i := slices.Index(keys, key); i >= 0 {
				at = i + 1
				continue
			}
			keys = slices.Insert(keys, at, key)
			at++
		}
	}
	return keys
}

// columnsOf are the values of a key, those of the bed's own order first.
func columnsOf(all []*series, key string) (columns []string) {
	for _, x := range all {
		if v := x.key(key); !slices.Contains(columns, v) {
			columns = append(columns, v)
		}
	}
	order := []string{"null", "plain", "reference", "ebpf-sk_lookup", "ebpf-tc", "iptables-nft", "iptables-legacy"}
	place := func(c string) int {
		if i := slices.Index(order, c); i >= 0 {
			return i
		}
		return len(order)
	}
	slices.SortStableFunc(columns, func(x, y string) int { return place(x) - place(y) })
	return columns
}

// pivot is a table with a column for each path. Each cell is compared with the
// baseline of its row.
func (b *builder) pivot(all []*series, baseline string) {
	if len(all) == 0 {
		return
	}
	keys := slices.DeleteFunc(keysOf(all), func(k string) bool { return k == "path" })
	columns := columnsOf(all, "path")
	rowOf := func(x *series) (row []string) {
		for _, k := range keys {
			row = append(row, x.key(k))
		}
		return row
	}
	b.table(len(keys), append(slices.Clone(keys), columns...)...)
	var done [][]string
	for _, x := range all {
		row := rowOf(x)
		if slices.ContainsFunc(done, func(r []string) bool { return slices.Equal(r, row) }) {
			continue
		}
		done = append(done, row)
		in := map[string]*series{}
		for _, y := range all {
			if slices.Equal(rowOf(y), row) {
				in[y.key("path")] = y
			}
		}
		cells := slices.Clone(row)
		for _, c := range columns {
			if y := in[c]; y != nil {
				cells = append(cells, b.cell(y, in[baseline]))
			} else {
				cells = append(cells, "")
			}
		}
		b.row(cells...)
	}
}

// units are those of a base, in the order in which they begin.
func (b *builder) units(base string) (units []string) {
	for _, x := range b.s.series {
		if x.base() == base && !slices.Contains(units, x.unit) {
			units = append(units, x.unit)
		}
	}
	return units
}

// details is a table with a row for each name: the distribution of the first
// unit, the medians of the others. The baseline of a name is a name too.
func (b *builder) details(all []*series, what string, baseline func(*series) *series) {
	if len(all) == 0 {
		return
	}
	keys := keysOf(all)
	var others []string
	for _, u := range b.units(all[0].base()) {
		if u != all[0].unit {
			others = append(others, u)
		}
	}
	head := append(slices.Clone(keys), "n", unitName(all[0].unit), "p90", "p99", "max")
	if what != "" {
		head = append(head, what)
	}
	for _, u := range others {
		head = append(head, unitName(u))
	}
	b.table(len(keys), head...)
	for _, x := range all {
		var cells []string
		for _, k := range keys {
			cells = append(cells, x.key(k))
		}
		sum := summarize(x)
		cells = append(cells, group(fmt.Sprint(sum.n)), b.cell(x, nil), formatValue(sum.p90, x.unit), formatValue(sum.p99, x.unit), formatValue(sum.max, x.unit))
		if what != "" {
			cells = append(cells, b.ratioCell(x, baseline(x)))
		}
		for _, u := range others {
			if y := b.s.get(x.name, u); y != nil {
				cells = append(cells, b.cell(y, nil))
			} else {
				cells = append(cells, "")
			}
		}
		b.row(cells...)
	}
}

// ratioCell is a ratio with its interval.
func (b *builder) ratioCell(x, baseline *series) string {
	if baseline == nil || baseline == x {
		return ""
	}
	r := ratio(x, p50, baseline, p50)
	return strings.TrimSpace(formatRatio(r.value) + " " + plusMinus(r))
}

// curvesOf are the ECDF's curves of series, by a key of their names.
func curvesOf(all []*series, key string) (curves []curve) {
	for i, name := range columnsOf(all, key) {
		for _, x := range all {
			if x.key(key) == name {
				curves = append(curves, curve{name, colour(name, i), x.values})
			}
		}
	}
	return curves
}

// matching are the series of a base and unit whose names have all of the parts.
func (b *builder) matching(base, unit string, parts ...string) (found []*series) {
	for _, x := range b.s.of(base, unit) {
		all := strings.Split(x.name, "/")
		if !slices.ContainsFunc(parts, func(p string) bool { return !slices.Contains(all, p) }) {
			found = append(found, x)
		}
	}
	return found
}

func (b *builder) setup() {
	if x := b.matching("Setup", seconds, "op=add", "family=dual", "policy=small"); len(x) > 0 {
		b.figure("setup.svg", "How long the kernel programming of a pod takes, by path",
			ecdf("Kernel programming of a dual-stack pod", "time of one ADD in the kernel (logarithmic); how many of them took no longer", curvesOf(x, "path")))
	}
	if x := b.s.of("Setup", seconds); len(x) > 0 {
		b.say("In the process, once the facts are known. Medians, and the ratio to eBPF with sk_lookup; ≈1 where the two can't be told apart.")
		b.pivot(x, "ebpf-sk_lookup")
	}
	if x := b.s.of("Setup", cpuSeconds); len(x) > 0 {
		b.say("CPU time of the same, child processes included.")
		b.pivot(x, "ebpf-sk_lookup")
	}
	if x := b.s.of("Cold", seconds); len(x) > 0 {
		b.say("Cold: the first ADD of a node, as a process; with the datapath loaded before, as the agent does it when it starts, and without.")
		b.details(x, "time/loaded", func(y *series) *series { return b.s.get(with(y.name, "loaded", "yes"), y.unit) })
	}
}

func (b *builder) steps() {
	for _, x := range []struct{ base, file, title string }{
		{"Step", "steps.svg", "Kernel programming by eBPF, step by step"},
		{"ProcessStep", "process-steps.svg", "ADD as a process, step by step"},
	} {
		all := b.s.of(x.base, seconds)
		if len(all) == 0 {
			continue
		}
		names := columnsOf(all, "path")
		rows := make([][]part, len(names))
		for _, y := range all {
			i := slices.Index(names, y.key("path"))
			// A difference of two measurements may come out as less than nothing.
			rows[i] = append(rows[i], part{y.key("step"), max(middle(y), 0)})
		}
		sums := make([]float64, len(rows))
		for i, r := range rows {
			for _, p := range r {
				sums[i] += p.value
			}
			rows[i] = fold(r)
		}
		if len(names) == 1 && names[0] == "" {
			names[0] = "ADD"
		}
		b.figure(x.file, x.title, stack(x.title, "sum of the steps' medians", names, rows))
		b.table(1, "step", "median", "share", "p99")
		for _, y := range all {
			sum := summarize(y)
			of := sums[slices.Index(columnsOf(all, "path"), y.key("path"))]
			b.row(y.key("step"), b.cell(y, nil), fmt.Sprintf("%.0f %%", sum.median.value/of*100), formatValue(sum.p99, y.unit))
		}
	}
}

// fold makes one of the smallest parts, so that each part has its own colour.
func fold(parts []part) []part {
	most := len(colours)
	if len(parts) <= most {
		return parts
	}
	least := slices.Clone(parts)
	slices.SortStableFunc(least, func(x, y part) int {
		switch {
		case x.value > y.value:
			return -1
		case x.value < y.value:
			return 1
		}
		return 0
	})
	limit := least[most-2].value
	var kept []part
	rest := part{name: "the others"}
	for _, p := range parts {
		if p.value >= limit && len(kept) < most-1 {
			kept = append(kept, p)
		} else {
			rest.value += p.value
		}
	}
	return append(kept, rest)
}

// null is the null plugin's series for a process.
func (b *builder) null(x *series) *series {
	return b.s.get(with(with(x.name, "path", "null"), "facts", "none"), x.unit)
}

func (b *builder) process() {
	var group barGroup
	for i, x := range b.matching("Process", seconds, "op=add") {
		name := x.key("path")
		if f := x.key("facts"); f != "none" && f != "" {
			name += ", " + f
		}
		if null := b.null(x); null != nil {
			r := estimate{1, 1, 1}
			if null != x {
				r = ratio(x, p50, null, p50)
			}
			label := fmt.Sprintf("%s, %s", formatRatio(r.value), formatValue(middle(x), x.unit))
			group.bars = append(group.bars, bar{name, colour(x.key("path"), i), r, label})
		}
	}
	if len(group.bars) > 0 {
		group.name = "ADD from exec to exit, facts from the agent's socket or the API server"
		b.figure("process.svg", "ADD as a process, relative to the null plugin",
			bars("ADD as a process", "time relative to the null plugin's, median and its interval", 1, []barGroup{group}))
	}
	b.say("From exec to exit, against a plugin that does nothing but print prevResult (null).")
	b.details(b.s.of("Process", seconds), "time/null", b.null)
}

func (b *builder) storm() {
	for _, x := range []struct{ pods, file string }{{"100", "storm-100.svg"}, {"250", "storm-250.svg"}} {
		all := b.matching("Storm", seconds, "pods="+x.pods, "concurrency=32", "load=no")
		if len(all) > 0 {
			title := fmt.Sprintf("A storm of %s pods, 32 at once", x.pods)
			b.figure(x.file, title, ecdf(title, "time of one pod's ADD, from exec to exit (logarithmic); how many of them took no longer", curvesOf(all, "path")))
		}
	}
	if all := b.s.of("Storm", seconds); len(all) > 0 {
		b.say("Each pod's ADD as a process; in all: from the first exec to the last exit. Intervals are over the storms, not over their pods.")
		b.stormTable(all)
	}
	if all := b.s.of("StormKernel", seconds); len(all) > 0 {
		b.say("Only the kernel's part of it, by threads of one process.")
		if x := b.matching("StormKernel", seconds, "concurrency=32"); len(x) > 0 {
			b.figure("storm-kernel.svg", "Kernel programming of pods in a storm, by path",
				ecdf("Kernel programming in a storm of pods", "time of one pod in the kernel (logarithmic); how many of them took no longer", curvesOf(x, "path")))
		}
		b.details(all, "time/ebpf-sk_lookup", func(x *series) *series { return b.s.get(with(x.name, "path", "ebpf-sk_lookup"), x.unit) })
	}
}

// stormTable has the pods' latencies and, from StormTotal, the storms' sums.
func (b *builder) stormTable(all []*series) {
	keys := keysOf(all)
	var units []string
	for _, u := range b.units("StormTotal") {
		if u != seconds {
			units = append(units, u)
		}
	}
	head := append(slices.Clone(keys), "storms", "p50", "p90", "p99", "max", "in all", "in all/null")
	for _, u := range units {
		head = append(head, unitName(u)+", in all")
	}
	b.table(len(keys), head...)
	for _, x := range all {
		var cells []string
		for _, k := range keys {
			cells = append(cells, x.key(k))
		}
		b.told[x] = true
		sum := summarize(x)
		cells = append(cells, fmt.Sprint(len(x.values)/x.block()), b.cell(x, nil), formatValue(sum.p90, x.unit), formatValue(sum.p99, x.unit), formatValue(sum.max, x.unit))
		name := strings.Replace(x.name, "Storm/", "StormTotal/", 1)
		if total := b.s.get(name, seconds); total != nil {
			cells = append(cells, b.cell(total, nil), b.ratioCell(total, b.s.get(with(name, "path", "null"), seconds)))
		} else {
			cells = append(cells, "", "")
		}
		for _, u := range units {
			if y := b.s.get(name, u); y != nil {
				cells = append(cells, b.cell(y, nil))
			} else {
				cells = append(cells, "")
			}
		}
		b.row(cells...)
	}
}

func (b *builder) scale() {
	b.details(b.s.of("Scale", seconds), "time/1st", func(x *series) *series { return b.s.get(with(x.name, "pods", "1"), x.unit) })
	for _, u := range b.units("Scale") {
		if u == seconds {
			continue
		}
		for _, x := range b.s.of("Scale", u) {
			if b.s.get(x.name, seconds) == nil {
				b.say("%s, %s: %s.", x.name, unitName(u), b.cell(x, nil))
			}
		}
	}
}

// moreIsBetter tells rates.
func moreIsBetter(unit string) bool { return strings.HasSuffix(unit, "/s") }

func (b *builder) data() {
	if groups := b.relative("Data", "plain", "family=4"); len(groups) > 0 {
		b.figure("data.svg", "The data path, relative to a plain loopback dial of the proxy",
			bars("Outbound connections, IPv4", "relative to a plain loopback dial of the proxy, median and its interval", 1, groups))
	}
	b.say("Medians, and the ratio to a plain loopback dial of the proxy, by a pod on a node where nothing is redirected; ≈1 where the two can't be told apart. " +
		"outside: the same while eBPF redirects other pods. ebpf-empty: programs that do nothing, at the same hooks. direct: the proxy's own dial of its app in a redirected pod.")
	for _, u := range b.units("Data") {
		b.say("**%s**%s", capital(unitName(u)), rateRemark(u))
		b.pivot(b.s.of("Data", u), "plain")
	}
}

// parts has the paths in the order in which each does more than the last.
func (b *builder) parts() {
	b.say("Medians, and the ratio to a plain loopback dial of the proxy. The columns from ebpf-empty to ebpf-watch are of the benchmark's own programs at the same hooks, which decide nothing and do one thing more from column to column: " +
		"nothing; the destination is rewritten; the socket is bound to the pod's address; it has storage for its original destination; so has the accepted socket; the destination goes from one to the other by a note in a map; " +
		"a socket that closes early takes its note away. A redirection that keeps all of that so can cost no less. ebpf-maps: the same with maps in the place of storage, which can overflow.")
	for _, u := range b.units("DataParts") {
		b.say("**%s**%s", capital(unitName(u)), rateRemark(u))
		b.pivot(b.s.of("DataParts", u), "plain")
	}
}

func rateRemark(unit string) string {
	if moreIsBetter(unit) {
		return " (more is better)"
	}
	return ""
}

// relative are the groups of bars of what was measured of a base, each relative
// to the baseline; other policies than the usual are in the tables only.
func (b *builder) relative(base, baseline string, parts ...string) (groups []barGroup) {
	for _, unit := range []string{seconds, "B/s", cpuSeconds} {
		all := b.matching(base, unit, parts...)
		all = slices.DeleteFunc(all, func(x *series) bool {
			// CPU time has its tables; only that of a connection is a claim of its own.
			return x.key("policy") != "" || unit == cpuSeconds && x.key("what") != "connect-close"
		})
		for _, what := range columnsOf(all, "what") {
			name := what
			if name == "" {
				name = "a packet of an established connection"
			}
			g := barGroup{name: name + ", " + unitName(unit) + rateRemark(unit)}
			for i, path := range columnsOf(all, "path") {
				for _, x := range all {
					if x.key("what") != what || x.key("path") != path {
						continue
					}
					floor := b.s.get(with(x.name, "path", baseline), unit)
					if floor == nil {
						continue
					}
					r := estimate{1, 1, 1}
					if x != floor {
						r = ratio(x, p50, floor, p50)
					}
					label := fmt.Sprintf("%s, %s", formatRatio(r.value), formatValue(middle(x), unit))
					g.bars = append(g.bars, bar{path, colour(path, i), r, label})
				}
			}
			if len(g.bars) > 1 {
				groups = append(groups, g)
			}
		}
	}
	return groups
}

func (b *builder) inbound() {
	if groups := append(b.relative("Inbound", "plain"), b.relative("InboundPacket", "plain")...); len(groups) > 0 {
		b.figure("inbound.svg", "Inbound connections over a veth, relative to a plain dial",
			bars("Inbound connections over a veth", "relative to a plain dial of the proxy's port, median and its interval", 1, groups))
	}
	for _, base := range []string{"Inbound", "InboundPacket"} {
		for _, u := range b.units(base) {
			what := ""
			if base == "InboundPacket" {
				what = " of a packet of an established connection"
			}
			b.say("**%s%s**%s", capital(unitName(u)), what, rateRemark(u))
			b.pivot(b.s.of(base, u), "plain")
		}
	}
}

func (b *builder) runs() {
	b.say("By the kernel's own statistics, its two looks at the clock included.")
	b.details(b.s.of("Program", seconds), "", nil)
}

// programs tells what the repository has written down of the BPF programs.
func (b *builder) programs(t *programs.Table, kernel string) {
	b.heading("Programs: how large they are")
	b.say("Exact, from `bench/programs/programs.txt`; a test fails when one grows by more than %d %%.", programs.Tolerance)
	kernels := t.Kernels()
	head := []string{"program", "instructions in the object"}
	for _, k := range kernels {
		head = append(head, k+": verified", "translated", "machine code")
	}
	b.table(1, head...)
	for _, p := range t.Programs {
		cells := []string{"`" + p.Name + "`", group(fmt.Sprint(p.Instructions))}
		for _, k := range kernels {
			more := []string{"", "", ""}
			for _, l := range t.On(k) {
				if l.Name == p.Name {
					more = []string{group(fmt.Sprint(l.Verified)), group(fmt.Sprint(l.Translated)), formatValue(float64(l.Jited), "B")}
				}
			}
			cells = append(cells, more...)
		}
		b.row(cells...)
	}
	if !slices.ContainsFunc(kernels, func(k string) bool {
		version, _, _ := strings.Cut(k, "-")
		return version == kernel || strings.HasPrefix(kernel, version+".")
	}) {
		b.say("Nothing is written down of this run's kernel, %s.", kernel)
	}
	b.table(1, "map", "key", "value", "entries at most", "bytes of all")
	for _, m := range t.Maps {
		b.row("`"+m.Name+"`", fmt.Sprintf("%d B", m.Key), fmt.Sprintf("%d B", m.Value), group(fmt.Sprint(m.Entries)), formatValue(float64(m.Bytes()), "B"))
	}
}

// rest tells what no section has told.
func (b *builder) rest() {
	var all []*series
	for _, x := range b.s.series {
		if !b.told[x] {
			all = append(all, x)
		}
	}
	if len(all) == 0 {
		return
	}
	b.heading("Whatever else was measured")
	b.table(1, "benchmark", "unit", "n", "median", "p99", "max")
	for _, x := range all {
		sum := summarize(x)
		b.row("`"+x.name+"`", unitName(x.unit), group(fmt.Sprint(sum.n)), b.cell(x, nil), formatValue(sum.p99, x.unit), formatValue(sum.max, x.unit))
	}
}
