// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

const module = "shunt.dev/shunt/"

// An event is a line of `go test -json`; see `go doc cmd/test2json`, and
// `go help buildjson` for those of the build.
type event struct {
	Action      string
	Package     string
	Test        string
	Elapsed     float64 // seconds
	Output      string
	ImportPath  string
	FailedBuild string
}

// A tally counts tests and subtests.
type tally struct{ passed, failed, skipped int }

func (t tally) String() string {
	return fmt.Sprintf("%d passed, %d failed, %d skipped", t.passed, t.failed, t.skipped)
}

// add sums two tallies up.
func (t tally) add(o tally) tally {
	return tally{t.passed + o.passed, t.failed + o.failed, t.skipped + o.skipped}
}

// A testID is a test, or with an empty name a package.
type testID struct{ pkg, name string }

func (id testID) String() string {
	return strings.TrimSpace(strings.TrimPrefix(id.pkg, module) + " " + id.name)
}

// A report makes of a stream of events what a person wants to read.
type report struct {
	out     io.Writer
	allowed map[string]bool // skips, as "redirect/ebpf TestX"

	tally    tally
	output   map[testID][]string
	building map[string][]string // output of the build, by import path
	running  map[string]bool     // packages that have not ended
	failures map[string]int      // failed tests, by package
	tests    map[string]int      // tests that ended, by package
	skips    []string            // those that are not allowed
}

func newReport(out io.Writer, allowed map[string]bool) *report {
	return &report{
		out: out, allowed: allowed,
		output: map[testID][]string{}, building: map[string][]string{},
		running: map[string]bool{}, failures: map[string]int{}, tests: map[string]int{},
	}
}

// read takes the whole stream. Lines that are no events are passed on.
func (r *report) read(in io.Reader) error {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if len(line) > 0 {
			var e event
			if json.Unmarshal(line, &e) != nil || e.Action == "" {
				fmt.Fprintf(r.out, "%s\n", strings.TrimSuffix(string(line), "\n"))
			} else {
				r.take(e)
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read the test's events: %w", err)
		}
	}
}

func (r *report) take(e event) {
	id := testID{e.Package, e.Test}
	switch e.Action {
	case "build-output":
		r.building[e.ImportPath] = append(r.building[e.ImportPath], e.Output)
	case "start":
		r.running[e.Package] = true
	case "output":
		r.output[id] = append(r.output[id], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			r.packageEnded(e)
		} else {
			r.testEnded(id, e.Action)
		}
		delete(r.output, id)
	}
}

func (r *report) testEnded(id testID, action string) {
	r.tests[id.pkg]++
	switch action {
	case "pass":
		r.tally.passed++
	case "fail":
		r.tally.failed++
		r.failures[id.pkg]++
		fmt.Fprintf(r.out, "--- FAIL: %s\n%s", id, body(r.output[id]))
	case "skip":
		r.tally.skipped++
		verdict := "allowed"
		if !r.allowed[id.String()] {
			verdict = "NOT ALLOWED"
			r.skips = append(r.skips, id.String())
		}
		fmt.Fprintf(r.out, "--- SKIPPED (%s): %s\n%s", verdict, id, body(r.output[id]))
	}
}

func (r *report) packageEnded(e event) {
	delete(r.running, e.Package)
	name := strings.TrimPrefix(e.Package, module)
	took := time.Duration(e.Elapsed * float64(time.Second)).Round(time.Millisecond)
	switch {
	case e.Action == "fail":
		// Without a failed test, it is the build, TestMain or a panic.
		if r.failures[e.Package] == 0 {
			r.tally.failed++
			fmt.Fprint(r.out, strings.Join(r.building[e.FailedBuild], ""), body(r.output[testID{pkg: e.Package}]))
		}
		fmt.Fprintf(r.out, "FAIL  %-24s %4d tests  %v\n", name, r.tests[e.Package], took)
	case r.tests[e.Package] > 0:
		fmt.Fprintf(r.out, "ok    %-24s %4d tests  %v\n", name, r.tests[e.Package], took)
	}
}

// body drops what go test says of every test.
func body(lines []string) string {
	var b strings.Builder
	for _, l := range lines {
		t := strings.TrimSpace(l)
		if strings.HasPrefix(t, "=== ") || strings.HasPrefix(t, "--- ") {
			continue
		}
		b.WriteString(l)
	}
	return b.String()
}

// verdict ends the report, and fails where CI must fail.
func (r *report) verdict() error {
	var errs []error
	if r.tally.failed > 0 {
		errs = append(errs, fmt.Errorf("%d failed", r.tally.failed))
	}
	if len(r.skips) > 0 {
		errs = append(errs, fmt.Errorf("skipped, which no list allows: %s", strings.Join(r.skips, ", ")))
	}
	for pkg := range r.running {
		errs = append(errs, fmt.Errorf("%s did not end", pkg))
	}
	if r.tally.passed+r.tally.failed == 0 {
		errs = append(errs, errors.New("no test ran"))
	}
	return errors.Join(errs...)
}

// readAllowed reads the list of skips that are allowed: package and test, then
// the reason.
func readAllowed(in io.Reader) (map[string]bool, error) {
	allowed := map[string]bool{}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		if len(f) < 3 {
			return nil, fmt.Errorf("allowed skip %q: want PACKAGE TEST REASON", lines.Text())
		}
		allowed[strings.Join(f[:2], " ")] = true
	}
	return allowed, lines.Err()
}

// readTallies sums up what runs have written to a file, one line a run.
func readTallies(in io.Reader) (sum tally, err error) {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		var t tally
		if _, err := fmt.Sscanf(lines.Text(), "%d passed, %d failed, %d skipped", &t.passed, &t.failed, &t.skipped); err != nil {
			return tally{}, fmt.Errorf("tally %q: %w", lines.Text(), err)
		}
		sum = sum.add(t)
	}
	return sum, lines.Err()
}
