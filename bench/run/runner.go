// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// samplesFile is bench/'s: the variable that names the file of samples.
const samplesFile = "SHUNT_BENCH_SAMPLES"

// killAfter is how long an interrupted benchmark may take to clean up.
const killAfter = 30 * time.Second

type runner struct {
	options
	binary  string
	files   files
	samples io.Writer
	show    *show
	times   times
}

// all runs the jobs. One that fails does not keep the others from running.
func (r *runner) all(ctx context.Context, jobs []job) error {
	printed, err := os.Create(r.files.printed())
	if err != nil {
		return err
	}
	defer printed.Close()
	var errs []error
	last := 0
	for i, j := range jobs {
		if ctx.Err() != nil {
			break
		}
		if j.run != last {
			last = j.run
			if _, err := fmt.Fprintf(r.samples, "run: %d\n", j.run); err != nil {
				return err
			}
			if _, err := fmt.Fprintf(printed, "run: %d\n", j.run); err != nil {
				return err
			}
		}
		if err := r.one(ctx, i, jobs, printed); err != nil {
			errs = append(errs, fmt.Errorf("benchmark %s: %w", j.name, err))
		}
	}
	errs = append(errs, printed.Close())
	return errors.Join(errs...)
}

// one runs a job to its end, and says what the machine did meanwhile.
func (r *runner) one(ctx context.Context, i int, jobs []job, printed io.Writer) error {
	j := jobs[i]
	path, err := filepath.Abs(r.files.samples())
	if err != nil {
		return err
	}
	args := []string{"-test.run", "^$", "-test.bench", "^Benchmark" + j.name + "$" + j.rest, "-test.benchtime", j.benchtime, "-test.timeout", "60m"}
	if r.short {
		args = append(args, "-test.short")
	}
	cmd := exec.CommandContext(ctx, r.binary, args...)
	cmd.Dir = "bench" // as go test
	cmd.Env = append(os.Environ(), samplesFile+"="+path)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = killAfter
	out := &lines{each: func(line string) {
		if strings.HasPrefix(line, "Benchmark") && len(strings.Fields(line)) > 2 {
			fmt.Fprintln(printed, line)
		}
		if !isHead(line) {
			r.show.output(line)
		}
	}}
	cmd.Stdout = out
	cmd.Stderr = &lines{each: func(line string) {
		if status, ok := strings.CutPrefix(line, "bench: "); ok {
			r.show.status(status)
			return
		}
		r.show.output(line)
	}}
	before, err := readCPU()
	if err != nil {
		return err
	}
	had, err := countLines(path)
	if err != nil {
		return err
	}
	start := time.Now()
	left := func() (time.Duration, bool) { return r.times.left(jobs[i:], r.short, time.Since(start)) }
	stop := r.show.begin(i, j, func() int { n, _ := countLines(path); return n - had }, left)
	err = cmd.Run()
	took := time.Since(start)
	n, _ := countLines(path) // it could be read before
	stop()
	if err != nil {
		r.show.end(i, j, fmt.Sprintf("FAILED after %s: %v", took.Round(time.Second), err))
		return err
	}
	after, err := readCPU()
	if err != nil {
		return err
	}
	steal, others := shares(before, after, cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime())
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(load), " ")
	_, err = fmt.Fprintf(r.samples, "BenchmarkMachine/during=%s 1 %s load %.1f steal-percent %.1f others-percent %.3f sec\n", j.name, first, steal, others, took.Seconds())
	if err != nil {
		return err
	}
	r.show.end(i, j, fmt.Sprintf("%s, %d samples", took.Round(100*time.Millisecond), n-had))
	r.times.set(j, r.short, took)
	return r.times.write(r.files.times())
}

// isHead tells what each test binary prints and says nothing of the benchmark.
func isHead(line string) bool {
	key, _, _ := strings.Cut(line, ":")
	return line == "PASS" || slices.Contains([]string{"goos", "goarch", "pkg", "cpu"}, key)
}

// lines calls a function with each line that is written to it.
type lines struct {
	each func(string)
	rest []byte
}

func (l *lines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.each(string(line))
		l.rest = rest
	}
}

func countLines(path string) (n int, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for part := make([]byte, 1<<16); ; {
		k, err := f.Read(part)
		n += bytes.Count(part[:k], []byte("\n"))
		if err == io.EOF {
			return n, nil
		} else if err != nil {
			return n, err
		}
	}
}

// times is how long each benchmark took last, in seconds.
type times map[string]float64

func timeKey(j job, short bool) string {
	key := j.name + j.rest + " " + j.benchtime
	if short {
		key += " short"
	}
	return key
}

// readTimes forgives a file that is not there, or broken: it only has guesses.
func readTimes(path string) times {
	t := times{}
	if data, err := os.ReadFile(path); err == nil && json.Unmarshal(data, &t) != nil {
		return times{}
	}
	return t
}

func (t times) set(j job, short bool, took time.Duration) { t[timeKey(j, short)] = took.Seconds() }

func (t times) write(path string) error {
	data, err := json.MarshalIndent(t, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(data, '\n'), 0o644)
}

// left is how long jobs will take, of which the first has run for a while; false
// if one of them was never seen.
func (t times) left(jobs []job, short bool, elapsed time.Duration) (time.Duration, bool) {
	sum := 0.0
	for i, j := range jobs {
		known, ok := t[timeKey(j, short)]
		if !ok {
			return 0, false
		}
		if i == 0 {
			known = max(known-elapsed.Seconds(), 0)
		}
		sum += known
	}
	return time.Duration(sum * float64(time.Second)), true
}

// A show tells whoever waits how far it is: on a terminal in a line that is
// written over each second, else by a line now and then.
type show struct {
	out      io.Writer
	terminal int // its descriptor, or -1
	of       int
	began    time.Time

	mu      sync.Mutex
	doing   string // what the benchmark says that it does
	written bool   // a line that is to be written over
}

const (
	everyOnTerminal = time.Second
	everyElsewhere  = 30 * time.Second
)

func newShow(out *os.File, of int) *show {
	fd := int(out.Fd())
	if _, err := unix.IoctlGetTermios(fd, unix.TCGETS); err != nil {
		fd = -1
	}
	return &show{out: out, terminal: fd, of: of, began: time.Now()}
}

// begin shows how far a job is until stop is called.
func (s *show) begin(i int, j job, samples func() int, left func() (time.Duration, bool)) (stop func()) {
	s.mu.Lock()
	s.doing = ""
	s.mu.Unlock()
	pace := everyElsewhere
	if s.terminal >= 0 {
		pace = everyOnTerminal
	}
	start := time.Now()
	ticks, done := time.NewTicker(pace), make(chan struct{})
	var wg sync.WaitGroup
	line := func() {
		text := fmt.Sprintf("%s: %s, %d samples", s.where(i, j), time.Since(start).Round(time.Second), samples())
		if d, ok := left(); ok {
			text += fmt.Sprintf("; all of it will take %s more", d.Round(time.Second))
		} else {
			text += "; how long all of it takes is known after the first time"
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.doing != "" {
			text += " (" + s.doing + ")"
		}
		s.write(text, true)
	}
	line()
	wg.Go(func() {
		defer ticks.Stop()
		for {
			select {
			case <-ticks.C:
				line()
			case <-done:
				return
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

func (s *show) where(i int, j job) string {
	text := fmt.Sprintf("[%d/%d] %s%s", i+1, s.of, j.name, j.rest)
	if j.run > 1 {
		text += fmt.Sprintf(", run %d", j.run)
	}
	return text
}

func (s *show) end(i int, j job, text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write(s.where(i, j)+": "+text, false)
}

func (s *show) status(doing string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doing = doing
}

// output passes on what a benchmark prints.
func (s *show) output(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write("    "+line, false)
}

func (s *show) write(text string, over bool) {
	if s.terminal >= 0 {
		if s.written {
			fmt.Fprint(s.out, "\r\x1b[K")
		}
		s.written = over
		if over {
			// A line that is wrapped can't be written over.
			if size, err := unix.IoctlGetWinsize(s.terminal, unix.TIOCGWINSZ); err == nil && size.Col > 1 {
				text = cut(text, int(size.Col)-1)
			}
			fmt.Fprint(s.out, text)
			return
		}
	}
	fmt.Fprintln(s.out, text)
}

func cut(text string, most int) string {
	if runes := []rune(text); len(runes) > most {
		return string(runes[:most])
	}
	return text
}
