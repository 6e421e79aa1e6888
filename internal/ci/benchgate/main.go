// SPDX-License-Identifier: Apache-2.0

// Command benchgate passes on the output of `go test -bench` and fails unless
// every gate of a file is met; a gate whose metric is not in the output is not.
//
//	go test -bench . ./bench/... | benchgate FILE
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: benchgate FILE <OUTPUT")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "benchgate:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	gates, err := readGates(f)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	measured, err := readMetrics(io.TeeReader(os.Stdin, os.Stdout))
	if err != nil {
		return err
	}
	return judge(os.Stdout, gates, measured)
}

// A metric of a benchmark.
type metric struct{ benchmark, name string }

func (m metric) String() string { return m.benchmark + " " + m.name }

// A gate is a bound of a metric.
type gate struct {
	metric
	atLeast bool // else at most
	bound   float64
}

func readGates(in io.Reader) ([]gate, error) {
	var gates []gate
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if len(f) != 4 || f[2] != "min" && f[2] != "max" {
			return nil, fmt.Errorf("gate %q: want BENCHMARK METRIC min|max BOUND", lines.Text())
		}
		bound, err := strconv.ParseFloat(f[3], 64)
		if err != nil {
			return nil, fmt.Errorf("gate %q: %w", lines.Text(), err)
		}
		gates = append(gates, gate{metric{f[0], f[1]}, f[2] == "min", bound})
	}
	return gates, lines.Err()
}

// readMetrics reads lines such as
//
//	BenchmarkX-2   200   774.0 ebpf-µs   10.3 iptables/ebpf
//
// Of several measurements it is the median that counts.
func readMetrics(in io.Reader) (map[metric]float64, error) {
	runs := map[metric][]float64{}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) < 4 || !strings.HasPrefix(f[0], "Benchmark") {
			continue
		}
		name := f[0]
		// What follows the last hyphen is GOMAXPROCS, left out where it is 1.
		if i := strings.LastIndexByte(name, '-'); i > 0 {
			if _, err := strconv.Atoi(name[i+1:]); err == nil {
				name = name[:i]
			}
		}
		for i := 2; i+1 < len(f); i += 2 {
			value, err := strconv.ParseFloat(f[i], 64)
			if err != nil {
				return nil, fmt.Errorf("benchmark line %q: %w", lines.Text(), err)
			}
			m := metric{name, f[i+1]}
			runs[m] = append(runs[m], value)
		}
	}
	measured := map[metric]float64{}
	for m, values := range runs {
		slices.Sort(values)
		n := len(values)
		measured[m] = (values[(n-1)/2] + values[n/2]) / 2
	}
	return measured, lines.Err()
}

func judge(out io.Writer, gates []gate, measured map[metric]float64) error {
	var errs []error
	for _, g := range gates {
		sign := "<="
		if g.atLeast {
			sign = ">="
		}
		value, ok := measured[g.metric]
		switch {
		case !ok:
			errs = append(errs, fmt.Errorf("%s was not measured", g.metric))
		case g.atLeast && value < g.bound, !g.atLeast && value > g.bound:
			errs = append(errs, fmt.Errorf("%s is %.3g, not %s %g", g.metric, value, sign, g.bound))
		default:
			fmt.Fprintf(out, "gate  %s: %.3g %s %g\n", g.metric, value, sign, g.bound)
		}
	}
	return errors.Join(errs...)
}
