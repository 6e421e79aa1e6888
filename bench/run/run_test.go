// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fake is a test binary that has two benchmarks, of which one fails.
const fake = `#!/bin/sh
case "$*" in
*-test.list*) echo BenchmarkGood; echo TestOther; echo BenchmarkBad ;;
*Good*)
	echo "goos: linux"
	echo "bench: half of it" >&2
	echo "a complaint" >&2
	echo "BenchmarkGood/path=a 1 5 ns/op" >>"$SHUNT_BENCH_SAMPLES"
	echo "BenchmarkGood/path=a 1 6 ns/op" >>"$SHUNT_BENCH_SAMPLES"
	echo "BenchmarkGood-2   200   0 ns/op   10.3 a/b"
	pwd >where
	echo "$@" >arguments
	;;
*) echo "it is broken"; exit 1 ;;
esac
`

// bed is a directory that looks like the repository, with a binary.
func bed(t *testing.T) string {
	t.Helper()
	t.Chdir(t.TempDir())
	binary := filepath.Join(t.TempDir(), "bench.test")
	if err := os.Mkdir("bench", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(binary, []byte(fake), 0o755); err != nil {
		t.Fatal(err)
	}
	return binary
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestRunner(t *testing.T) {
	binary := bed(t)
	o := options{dir: ".", bench: ".", benchtime: "7x", count: 2, short: true}
	jobs, err := list(t.Context(), binary, o)
	if err != nil {
		t.Fatal(err)
	}
	want := []job{{"Good", "", "7x", 1}, {"Bad", "", "7x", 1}, {"Good", "", "7x", 2}, {"Bad", "", "7x", 2}}
	if diff := cmp.Diff(want, jobs, cmp.AllowUnexported(job{})); diff != "" {
		t.Fatalf("jobs (-want +got):\n%s", diff)
	}
	f := files{dir: ".", name: "samples"}
	rec, err := f.start()
	if err != nil {
		t.Fatal(err)
	}
	defer rec.Close()
	var out bytes.Buffer
	r := &runner{options: o, binary: binary, files: f, samples: rec, times: times{}, show: &show{out: &out, terminal: -1, of: len(jobs), began: time.Now()}}
	err = r.all(t.Context(), jobs)
	if err == nil || err.Error() != "benchmark Bad: exit status 1\nbenchmark Bad: exit status 1" {
		t.Errorf("got error %v, want one for each time that Bad failed", err)
	}
	var kept []string
	for line := range strings.Lines(readFile(t, f.samples())) {
		if strings.HasPrefix(line, "BenchmarkMachine/during=Good 1 ") && strings.HasSuffix(line, " sec\n") {
			line = "machine\n"
		}
		kept = append(kept, line)
	}
	const round = "BenchmarkGood/path=a 1 5 ns/op\nBenchmarkGood/path=a 1 6 ns/op\nmachine\n"
	if diff := cmp.Diff("run: 1\n"+round+"run: 2\n"+round, strings.Join(kept, "")); diff != "" {
		t.Errorf("samples (-want +got):\n%s", diff)
	}
	if got, want := readFile(t, f.printed()), "run: 1\nBenchmarkGood-2   200   0 ns/op   10.3 a/b\nrun: 2\nBenchmarkGood-2   200   0 ns/op   10.3 a/b\n"; got != want {
		t.Errorf("printed: %q, want %q", got, want)
	}
	if got := readFile(t, "bench/arguments"); !strings.Contains(got, "-test.bench ^BenchmarkGood$ ") || !strings.Contains(got, "-test.benchtime 7x") || !strings.Contains(got, "-test.short") {
		t.Errorf("arguments: %s", got)
	}
	for _, want := range []string{"[1/4] Good: ", "    a complaint\n", "    it is broken\n", "[2/4] Bad: FAILED", "[3/4] Good, run 2: ", ", 2 samples\n"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q was not shown:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "goos") {
		t.Errorf("the head of a test binary was shown:\n%s", out.String())
	}
	if got := readTimes(f.times()); len(got) != 1 || got["Good 7x short"] <= 0 {
		t.Errorf("times: %v", got)
	}
}

func TestList(t *testing.T) {
	binary := bed(t)
	jobs, err := list(t.Context(), binary, options{bench: "Good/path=a", benchtime: "1x", count: 1})
	if err != nil || len(jobs) != 2 || jobs[0].rest != "/path=a" {
		t.Errorf("got %+v, %v, want the rest of the pattern for each", jobs, err)
	}
	if _, err := list(t.Context(), binary, options{bench: "(", count: 1}); err == nil || !strings.HasPrefix(err.Error(), `-bench "(": `) {
		t.Errorf("a broken pattern: %v", err)
	}
	if err := os.WriteFile(binary, []byte("#!/bin/sh\necho TestOther\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := list(t.Context(), binary, options{bench: "None", count: 1}); err == nil || err.Error() != `-bench "None": no benchmark has such a name` {
		t.Errorf("no benchmark: %v", err)
	}
}

// TestFiles: the run before is kept.
func TestFiles(t *testing.T) {
	t.Chdir(t.TempDir())
	f := files{dir: ".", name: "part"}
	for _, text := range []string{"first", "second"} {
		rec, err := f.start()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := rec.WriteString(text); err != nil {
			t.Fatal(err)
		}
		rec.Close()
	}
	if got := readFile(t, "part.txt") + ", " + readFile(t, "part.old.txt"); got != "second, first" {
		t.Errorf("got %s", got)
	}
}

func TestGateJobs(t *testing.T) {
	jobs := gateJobs()
	runs := map[string]int{}
	for i, j := range jobs {
		runs[j.name]++
		if j.run != runs[j.name] {
			t.Errorf("%s: run %d comes as the %d.", j.name, j.run, runs[j.name])
		}
		if i > 0 && j.run < jobs[i-1].run {
			t.Errorf("run %d of %s comes after a run %d: the runs are not apart", j.run, j.name, jobs[i-1].run)
		}
	}
	for _, g := range gated {
		if runs[g.name] != g.runs {
			t.Errorf("%s runs %d times, want %d", g.name, runs[g.name], g.runs)
		}
	}
}

func TestTimesLeft(t *testing.T) {
	jobs := []job{{"A", "", "1x", 1}, {"B", "/c", "1x", 1}}
	known := times{}
	known.set(jobs[0], false, 10*time.Second)
	if d, ok := known.left(jobs, false, 0); ok {
		t.Errorf("B was never seen: %s", d)
	}
	known.set(jobs[1], false, 20*time.Second)
	for elapsed, want := range map[time.Duration]time.Duration{0: 30 * time.Second, 4 * time.Second: 26 * time.Second, time.Minute: 20 * time.Second} {
		if d, ok := known.left(jobs, false, elapsed); !ok || d != want {
			t.Errorf("after %s: %s, %v, want %s", elapsed, d, ok, want)
		}
	}
	if _, ok := known.left(jobs, true, 0); ok {
		t.Error("a short run is not a long one")
	}
}

func TestCPU(t *testing.T) {
	before, err := parseCPU([]byte("cpu  100 0 50 800 20 5 5 20 0 0\ncpu0 1 2 3\n"))
	if err != nil {
		t.Fatal(err)
	}
	// 1,000 ticks: 10 stolen, 490 idle, 500 busy of which 4 s were our own.
	after, err := parseCPU([]byte("cpu  400 0 250 1280 30 5 5 30 0 0\n"))
	if err != nil {
		t.Fatal(err)
	}
	steal, others := shares(before, after, 4*time.Second)
	if math.Abs(steal-1) > 1e-9 || math.Abs(others-10) > 1e-9 {
		t.Errorf("stolen %v %%, others %v %%, want 1 and 10", steal, others)
	}
	if s, o := shares(before, before, time.Second); s != 0 || o != 0 {
		t.Errorf("of no time: %v, %v", s, o)
	}
	for _, text := range []string{"", "cpu 1 2\n", "cpu 1 2 3 4 5 6 7 x\n", "intr 1 2 3 4 5 6 7 8\n"} {
		if _, err := parseCPU([]byte(text)); err == nil {
			t.Errorf("%q: no error", text)
		}
	}
}

func TestDescribe(t *testing.T) {
	text, err := describe(t.Context(), options{benchtime: "200x"})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"goos", "goarch", "cpus", "memory", "kernel", "go", "date", "load", "benchtime"} {
		if field([]byte(text), key) == "" {
			t.Errorf("%s is missing:\n%s", key, text)
		}
	}
}

// TestTerminal: the line of progress is written over, and cut to the width.
func TestTerminal(t *testing.T) {
	var out bytes.Buffer
	s := &show{out: &out, terminal: math.MaxInt32} // no descriptor: of no width
	s.write("one", true)
	s.write("two", true)
	s.write("done", false)
	if got, want := out.String(), "one\r\x1b[Ktwo\r\x1b[Kdone\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := cut("µµµµ", 2); got != "µµ" {
		t.Errorf("cut: %q", got)
	}
}
