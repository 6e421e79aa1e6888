// SPDX-License-Identifier: Apache-2.0

//go:build linux

// Command run runs the benchmarks of bench/, one after the other, shows how far
// it is, and keeps every sample in a file in the Go benchmark format. Then it
// has bench/report make the report. It is what `make bench` and
// `make bench-gate` are; see docs/BENCHMARKS.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

type options struct {
	goCommand, dir, bench, benchtime, format string
	count                                    int
	short, gate                              bool
}

func main() {
	var o options
	flag.StringVar(&o.goCommand, "go", "go", "the go `command`")
	flag.StringVar(&o.dir, "dir", "bin/bench", "`directory` for everything that is made")
	flag.StringVar(&o.bench, "bench", ".", "which benchmarks, a `pattern` as for go test -bench")
	flag.StringVar(&o.benchtime, "benchtime", "200x", "how many `turns`, as for go test -benchtime")
	flag.IntVar(&o.count, "count", 1, "how `often` each benchmark runs")
	flag.BoolVar(&o.short, "short", false, "run fewer cases")
	flag.BoolVar(&o.gate, "gate", false, "run what .ci/bench-gates needs, and judge by it")
	flag.StringVar(&o.format, "o", "text", "what to print of it: `text` or json")
	flag.Parse()
	if flag.NArg() != 0 || o.format != "text" && o.format != "json" || o.count < 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// A job is one benchmark, to be run once.
type job struct {
	name      string // without "Benchmark"
	rest      string // the pattern of its sub-benchmarks, with its slash
	benchtime string
	run       int // from 1
}

// gated is what the gates need, in the order in which it runs: fast enough for
// CI, and the medians of several runs, so that one moment of a busy machine does
// not decide.
var gated = []struct {
	name, benchtime string
	runs            int
}{
	{"KernelProgramming", "50x", 5},
	{"AddProcess", "30x", 5},
	{"Data", "20x", 3},
	{"StormKernel", "50x", 3},
	{"Storm", "50x", 3},
	{"Scale", "1x", 1},
}

func gateJobs() (jobs []job) {
	for run := 1; ; run++ {
		before := len(jobs)
		for _, g := range gated {
			if run <= g.runs {
				jobs = append(jobs, job{g.name, "", g.benchtime, run})
			}
		}
		if len(jobs) == before {
			return jobs
		}
	}
}

func run(ctx context.Context, o options) (err error) {
	whole := o.bench == "." && !o.short && !o.gate
	f := files{dir: o.dir, name: "part"}
	switch {
	case o.gate:
		f.name, o.short = "gate", true
	case whole:
		f.name = "samples"
	case o.bench == ".":
		f.name = "short"
	}
	// Of json, standard output has nothing else.
	out := os.Stdout
	if o.format == "json" {
		out = os.Stderr
	}
	binary, err := build(ctx, o, out)
	if err != nil {
		return err
	}
	jobs := gateJobs()
	if !o.gate {
		if jobs, err = list(ctx, binary, o); err != nil {
			return err
		}
	}
	rec, err := f.start()
	if err != nil {
		return err
	}
	defer rec.Close()
	m, err := describe(ctx, o)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(rec, m); err != nil {
		return err
	}
	r := &runner{options: o, binary: binary, files: f, samples: rec, show: newShow(out, len(jobs)), times: readTimes(f.times())}
	failed := r.all(ctx, jobs)
	if err := ctx.Err(); err != nil {
		return errors.Join(failed, errors.New("interrupted: no report is made; what was measured is in "+f.samples()))
	}
	scope := "part"
	switch {
	case failed != nil:
	case whole:
		scope = "all"
	case f.name == "short":
		scope = "all, but short"
	}
	// The configuration is of the lines that follow it.
	if _, err := fmt.Fprintf(rec, "scope: %s\nBenchmarkMachine/during=all 1 %.3f sec-in-all\n", scope, time.Since(r.show.began).Seconds()); err != nil {
		return err
	}
	if err := rec.Close(); err != nil {
		return err
	}
	return errors.Join(failed, report(ctx, o, f, scope == "all", out))
}

// build makes the test binary, once for all.
func build(ctx context.Context, o options, out io.Writer) (string, error) {
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return "", err
	}
	binary, err := filepath.Abs(filepath.Join(o.dir, "bench.test"))
	if err != nil {
		return "", err
	}
	fmt.Fprintln(out, "building the benchmarks")
	cmd := exec.CommandContext(ctx, o.goCommand, "test", "-c", "-o", binary, "./bench")
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("build the benchmarks: %w", err)
	}
	return binary, nil
}

// list finds the benchmarks of a pattern, whose first part, up to a slash, is of
// their names.
func list(ctx context.Context, binary string, o options) (jobs []job, err error) {
	top, rest, deeper := strings.Cut(o.bench, "/")
	if _, err := regexp.Compile(top); err != nil {
		return nil, fmt.Errorf("-bench %q: %w", o.bench, err)
	}
	cmd := exec.CommandContext(ctx, binary, "-test.list", top)
	cmd.Dir, cmd.Stderr = "bench", os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("list the benchmarks: %w", err)
	}
	if deeper {
		rest = "/" + rest
	}
	for run := 1; run <= o.count; run++ {
		for line := range strings.Lines(string(out)) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(line), "Benchmark"); ok {
				jobs = append(jobs, job{name, rest, o.benchtime, run})
			}
		}
	}
	if len(jobs) == 0 {
		return nil, fmt.Errorf("-bench %q: no benchmark has such a name", o.bench)
	}
	return jobs, nil
}

// report has bench/report say what was measured.
func report(ctx context.Context, o options, f files, whole bool, out io.Writer) error {
	args := []string{"run", "./bench/report", "-samples", f.samples(), "-o", o.format}
	switch {
	case o.gate:
		args = append(args, "-gates", ".ci/bench-gates", "-printed", f.printed())
	case whole:
		args = append(args, "-docs", "docs", "-html", f.html())
	default:
		fmt.Fprintln(out, "not everything ran: docs/BENCHMARKS.md stays as it is")
		if f.name == "short" {
			args = append(args, "-html", f.html())
		}
	}
	cmd := exec.CommandContext(ctx, o.goCommand, args...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err := cmd.Run()
	if !o.gate {
		fmt.Fprintf(out, "samples: %s (for benchstat, too)\n", f.samples())
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) && o.gate {
		return errors.New("a gate is not met")
	}
	return err
}

// files are what a run makes. Those of a run of everything, of a short one, of a
// part and of the gates are kept apart.
type files struct{ dir, name string }

func (f files) path(suffix string) string { return filepath.Join(f.dir, f.name+suffix) }
func (f files) samples() string           { return f.path(".txt") }
func (f files) printed() string           { return f.path("-printed.txt") }
func (f files) html() string {
	return filepath.Join(f.dir, map[bool]string{true: "report.html", false: f.name + ".html"}[f.name == "samples"])
}
func (f files) times() string { return filepath.Join(f.dir, "times.json") }

// start makes the file of samples; the one before is kept, for benchstat.
func (f files) start() (*os.File, error) {
	for _, path := range []string{f.samples(), f.printed()} {
		err := os.Rename(path, strings.TrimSuffix(path, ".txt")+".old.txt")
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return os.OpenFile(f.samples(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
}
