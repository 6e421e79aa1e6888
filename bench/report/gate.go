// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
)

// A gate is a bound that a run must not miss: of a claim, or of a metric that a
// benchmark reports itself. Of several runs it is the median that counts.
type gate struct {
	claim        *claim // nil for a metric
	name, metric string
	atLeast      bool
	bound        float64
}

func (g gate) String() string {
	if g.claim != nil {
		return "claim " + g.claim.id
	}
	return "Benchmark" + g.name + " " + g.metric
}

// readGates reads a file of gates; its errors name the file and the line.
func readGates(in io.Reader, file string) ([]gate, error) {
	var gates []gate
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		g, err := readGate(f)
		if err != nil {
			return nil, fmt.Errorf("%s:%d: gate %q: %w", file, n, strings.Join(f, " "), err)
		}
		gates = append(gates, g)
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if len(gates) == 0 {
		return nil, fmt.Errorf("%s: no gates in it", file)
	}
	return gates, nil
}

func readGate(f []string) (g gate, err error) {
	name, isBenchmark := strings.CutPrefix(f[0], "Benchmark")
	if len(f) != 4 || !isBenchmark && f[0] != "claim" || f[2] != "min" && f[2] != "max" {
		return g, errors.New("want BENCHMARK METRIC or claim ID, then min|max BOUND")
	}
	g = gate{name: name, metric: f[1], atLeast: f[2] == "min"}
	if g.bound, err = strconv.ParseFloat(f[3], 64); err != nil {
		return g, fmt.Errorf("bound %q, want a number", f[3])
	}
	if isBenchmark {
		return g, nil
	}
	g.claim = claimByID(f[1])
	if g.claim == nil {
		var ids []string
		for _, c := range claims {
			ids = append(ids, c.id)
		}
		return g, fmt.Errorf("no claim %q, want one of %s", f[1], strings.Join(ids, ", "))
	}
	if g.claim.atLeast != g.atLeast {
		return g, fmt.Errorf("claim %s has a bound from the other side, want %s", f[1], map[bool]string{true: "min", false: "max"}[g.claim.atLeast])
	}
	return g, nil
}

// measure gives what each run has of the gate; none is an error. Metrics are in
// what the benchmarks printed, claims are of the samples.
func (g gate) measure(s, printed *samples) ([]float64, error) {
	if g.claim == nil {
		if x := printed.get(g.name, g.metric); x != nil {
			return x.values, nil
		}
		return nil, fmt.Errorf("%s was not measured", g)
	}
	var got []float64
	if v := g.claim.judge(s); len(v.missing) > 0 {
		return nil, fmt.Errorf("%s was not measured: no samples of %s", g, strings.Join(v.missing, ", "))
	}
	num, den := s.get(g.claim.num, g.claim.unit), s.get(g.claim.den, g.claim.unit)
	for _, run := range s.runs() {
		n := num.of(run)
		if len(n.values) == 0 {
			continue
		}
		if den == nil {
			got = append(got, g.claim.of.of(slices.Sorted(slices.Values(n.values))))
			continue
		}
		if d := den.of(run); len(d.values) > 0 {
			got = append(got, g.claim.of.of(slices.Sorted(slices.Values(n.values)))/g.claim.by.of(slices.Sorted(slices.Values(d.values))))
		}
	}
	if len(got) == 0 {
		return nil, fmt.Errorf("%s: no run has both of %s and %s", g, g.claim.num, g.claim.den)
	}
	return got, nil
}

// judgeGates writes a line for each gate that is met, and returns an error for
// each that is not; one that was not measured is not met.
func judgeGates(out io.Writer, gates []gate, s, printed *samples) error {
	var errs []error
	for _, g := range gates {
		runs, err := g.measure(s, printed)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		got := p50.of(slices.Sorted(slices.Values(runs)))
		sign, met := "<=", got <= g.bound
		if g.atLeast {
			sign, met = ">=", got >= g.bound
		}
		of := ""
		if len(runs) > 1 {
			of = fmt.Sprintf(", the median of %d runs (%s to %s)", len(runs), four(slices.Min(runs)), four(slices.Max(runs)))
		}
		if !met {
			errs = append(errs, fmt.Errorf("%s is %s, not %s %g%s", g, four(got), sign, g.bound, of))
			continue
		}
		fmt.Fprintf(out, "gate  %s: %s %s %g%s\n", g, four(got), sign, g.bound, of)
	}
	return errors.Join(errs...)
}

// four gives a number four significant digits, or all before its point.
func four(v float64) string {
	if math.Abs(v) >= 1e4 {
		return strconv.FormatFloat(v, 'f', 0, 64)
	}
	return strconv.FormatFloat(v, 'g', 4, 64)
}
