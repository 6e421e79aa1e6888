// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// What makes a run noisy. The runner writes, for each benchmark, the share of
// the machine's CPU time that was stolen by its host, and that other processes
// took.
const (
	wideSpread   = 0.10 // half an interval, relative to the median
	greatDrift   = 0.10
	muchStolen   = 2.0  // percent
	muchByOthers = 10.0 // percent
	fewSamples   = minBlocks
)

// machineBase names the runner's own lines.
const machineBase = "Machine"

// noise says, in words, what about the run makes its numbers doubtful.
func noise(s *samples) (found []string) {
	say := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	for _, c := range s.config {
		switch c.key {
		case "commit", "kernel", "cpu":
			if len(c.values) > 1 {
				say("The samples mix what should not be compared: %s is %s.", c.key, strings.Join(c.values, " and "))
			}
		}
	}
	if load, err := strconv.ParseFloat(s.setting("load"), 64); err == nil {
		if cpus, err := strconv.ParseFloat(s.setting("cpus"), 64); err == nil && load > cpus/2 {
			say("The machine was busy when the run began: load %.2f on %g CPUs.", load, cpus)
		}
	}
	for _, x := range []struct {
		unit, what string
		limit      float64
	}{
		{"steal-percent", "the host of this virtual machine took", muchStolen},
		{"others-percent", "others, the kernel's threads included, took", muchByOthers},
	} {
		var during []string
		for _, m := range s.of(machineBase, x.unit) {
			if v := slices.Max(m.values); v > x.limit {
				during = append(during, fmt.Sprintf("%.0f %% during %s", v, m.key("during")))
			}
		}
		if len(during) > 0 {
			say("Of the CPU time, %s %s.", x.what, strings.Join(during, ", "))
		}
	}
	var wide, drifted, few []string
	for _, x := range s.series {
		if !strings.Contains(x.unit, "sec") || x.base() == machineBase {
			continue
		}
		name := fmt.Sprintf("`%s` (%s)", x.name, unitName(x.unit))
		sum := summarize(x)
		switch {
		case len(x.values) < fewSamples*x.block():
			few = append(few, name)
		case sum.median.spread() > wideSpread:
			wide = append(wide, fmt.Sprintf("%s %s", name, plusMinus(sum.median)))
		}
		if d := drift(x); d > greatDrift || d < -greatDrift {
			drifted = append(drifted, fmt.Sprintf("%s %s", name, formatPercent(d)))
		}
	}
	tell := func(what string, names []string) {
		const most = 8
		if len(names) == 0 {
			return
		}
		more := ""
		if len(names) > most {
			more = fmt.Sprintf(", and %d more", len(names)-most)
			names = names[:most]
		}
		say("%s: %s%s.", what, strings.Join(names, ", "), more)
	}
	tell("The interval of the median is wider than ±10 % of it", wide)
	tell("Between the first half of the rounds and the second, the median moved", drifted)
	tell("Too few rounds for an interval", few)
	return found
}
