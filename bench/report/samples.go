// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/perf/benchfmt"
)

// A series is what was measured of one quantity, in the order of time.
type series struct {
	name string // the benchmark's, without "Benchmark"
	unit string // tidied: sec and B, never ns and MB
	// values, and of which run each is: benchmarks may run several times.
	values []float64
	runs   []string
}

// base is the name's first part.
func (s *series) base() string {
	base, _, _ := strings.Cut(s.name, "/")
	return base
}

// key gives a value of the name, such as null for path; "" if it has none.
func (s *series) key(key string) string { return keyOf(s.name, key) }

func keyOf(name, key string) string {
	for part := range strings.SplitSeq(name, "/") {
		if v, ok := strings.CutPrefix(part, key+"="); ok {
			return v
		}
	}
	return ""
}

// with is the name with another value of a key that it has.
func with(name, key, value string) string {
	parts := strings.Split(name, "/")
	for i, part := range parts {
		if strings.HasPrefix(part, key+"=") {
			parts[i] = key + "=" + value
		}
	}
	return strings.Join(parts, "/")
}

// block is how many samples in a row were taken together: the pods of a storm
// wait for each other, and only another storm is another observation.
func (s *series) block() int {
	if b := s.base(); b == "Storm" || b == "StormKernel" {
		if n, err := strconv.Atoi(s.key("pods")); err == nil && n > 0 {
			return n
		}
	}
	return 1
}

// of is the part of a series that was measured in one run.
func (s *series) of(run string) *series {
	part := &series{name: s.name, unit: s.unit}
	for i, v := range s.values {
		if s.runs[i] == run {
			part.values = append(part.values, v)
			part.runs = append(part.runs, run)
		}
	}
	return part
}

// A config is a line such as "kernel: 6.18", with every value that it had.
type config struct {
	key    string
	values []string
}

// samples is all that a file has.
type samples struct {
	series []*series // in the order in which they begin
	config []config
	byName map[[2]string]*series
}

// perRun are configuration lines that are meant to change within a file.
var perRun = []string{"run"}

// get finds a series; nil if it was not measured.
func (s *samples) get(name, unit string) *series { return s.byName[[2]string{name, unit}] }

// of are the series of a base and a unit.
func (s *samples) of(base, unit string) (found []*series) {
	for _, x := range s.series {
		if x.base() == base && x.unit == unit {
			found = append(found, x)
		}
	}
	return found
}

// runs are the names of the runs, in order.
func (s *samples) runs() (names []string) {
	for _, x := range s.series {
		for _, r := range x.runs {
			if !slices.Contains(names, r) {
				names = append(names, r)
			}
		}
	}
	slices.Sort(names)
	return names
}

// setting is what the file says of a key; several values are told with a comma.
func (s *samples) setting(key string) string {
	for _, c := range s.config {
		if c.key == key {
			return strings.Join(c.values, ", ")
		}
	}
	return ""
}

// readSamples reads the Go benchmark format
// (https://go.dev/design/14313-benchmark-format). Every line that it can't
// read is told, by file and line; no part of a broken file is taken.
func readSamples(in io.Reader, file string) (*samples, error) {
	s := &samples{byName: map[[2]string]*series{}}
	var errs []error
	r := benchfmt.NewReader(in, file)
	for r.Scan() {
		switch rec := r.Result().(type) {
		case *benchfmt.SyntaxError:
			errs = append(errs, rec)
		case *benchfmt.Result:
			if err := s.add(rec); err != nil {
				_, line := rec.Pos()
				errs = append(errs, fmt.Errorf("%s:%d: %w", file, line, err))
			}
		}
	}
	if err := r.Err(); err != nil {
		errs = append(errs, fmt.Errorf("%s: %w", file, err))
	}
	if len(errs) == 0 && len(s.series) == 0 {
		errs = append(errs, fmt.Errorf("%s: no samples in it", file))
	}
	return s, errors.Join(errs...)
}

func (s *samples) add(rec *benchfmt.Result) error {
	base, parts := rec.Name.Parts()
	name := string(base)
	for _, p := range parts {
		if p[0] != '-' { // GOMAXPROCS is the machine's
			name += string(p)
		}
	}
	if len(rec.Values) == 0 {
		return fmt.Errorf("%s: no value, want VALUE UNIT pairs", name)
	}
	run := rec.GetConfig("run")
	for _, c := range rec.Config {
		if c.File && !slices.Contains(perRun, c.Key) {
			s.configure(c.Key, string(c.Value))
		}
	}
	for _, v := range rec.Values {
		if math.IsNaN(v.Value) || math.IsInf(v.Value, 0) {
			return fmt.Errorf("%s: value %v %s, want a finite number", name, v.Value, v.Unit)
		}
		k := [2]string{name, v.Unit}
		x := s.byName[k]
		if x == nil {
			x = &series{name: name, unit: v.Unit}
			s.byName[k] = x
			s.series = append(s.series, x)
		}
		x.values = append(x.values, v.Value)
		x.runs = append(x.runs, run)
	}
	return nil
}

func (s *samples) configure(key, value string) {
	for i := range s.config {
		if c := &s.config[i]; c.key == key {
			if !slices.Contains(c.values, value) {
				c.values = append(c.values, value)
			}
			return
		}
	}
	s.config = append(s.config, config{key, []string{value}})
}
