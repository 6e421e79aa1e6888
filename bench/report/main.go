// SPDX-License-Identifier: Apache-2.0

// Command report makes the report of a run of the benchmarks: from a file of
// samples in the Go benchmark format, what bench/ claims and whether it was
// reached, tables and plots.
//
//	report -samples FILE [-o text|json]        to standard output
//	report -samples FILE -docs docs -html FILE  docs/BENCHMARKS.md and docs/bench/*.svg, and a page
//	report -samples FILE -printed FILE -gates FILE
//
// See docs/BENCHMARKS.md.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"shunt.dev/shunt/bench/programs"
)

type options struct {
	samples, programs, docs, html, gates, printed, format string
}

func main() {
	var o options
	flag.StringVar(&o.samples, "samples", "bin/bench/samples.txt", "`file` with the samples")
	flag.StringVar(&o.programs, "programs", "bench/programs/programs.txt", "`file` with what the BPF programs measure")
	flag.StringVar(&o.docs, "docs", "", "`directory` whose BENCHMARKS.md and bench/*.svg are written; of a run of everything only")
	flag.StringVar(&o.html, "html", "", "`file` for the report as a page")
	flag.StringVar(&o.gates, "gates", "", "`file` with gates: judge by them, and do nothing else")
	flag.StringVar(&o.printed, "printed", "", "`file` with what the benchmarks printed, for the gates")
	flag.StringVar(&o.format, "o", "text", "what to print: `text` or json")
	flag.Parse()
	if flag.NArg() != 0 || o.format != "text" && o.format != "json" {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(o, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
}

// An analysis is everything that the reports have in common.
type analysis struct {
	samples  *samples
	verdicts []verdict
	noise    []string
	programs programs.Table
	whole    bool // every benchmark ran
}

func analyse(s *samples, t programs.Table) *analysis {
	return &analysis{samples: s, verdicts: judgeAll(s), noise: noise(s), programs: t, whole: s.setting("scope") == "all"}
}

func run(o options, out, log io.Writer) error {
	s, err := readFile(o.samples, readSamples)
	if err != nil {
		return err
	}
	if o.gates != "" {
		gates, err := readFile(o.gates, readGates)
		if err != nil {
			return err
		}
		printed := new(samples)
		if o.printed != "" {
			if printed, err = readFile(o.printed, readSamples); err != nil {
				return err
			}
		}
		return judgeGates(out, gates, s, printed)
	}
	t, err := readFile(o.programs, programs.Read)
	if err != nil {
		return err
	}
	a := analyse(s, t)
	doc := build(a)
	if o.docs != "" {
		if !a.whole {
			return fmt.Errorf("%s is of a part of the benchmarks (scope: %q, want all): %s is not written", o.samples, s.setting("scope"), o.docs)
		}
		if err := writeDocs(doc, o.docs, log); err != nil {
			return err
		}
	}
	if o.html != "" {
		if err := write(o.html, doc.html(), log); err != nil {
			return err
		}
	}
	switch {
	case o.format == "json":
		return a.writeJSON(out)
	case o.docs == "" && o.html == "":
		_, err = io.WriteString(out, doc.text())
	}
	return err
}

func readFile[T any](path string, read func(io.Reader, string) (T, error)) (T, error) {
	f, err := os.Open(path)
	if err != nil {
		var none T
		return none, err
	}
	defer f.Close()
	return read(f, path)
}

func write(path, content string, log io.Writer) error {
	old, err := os.ReadFile(path)
	if err == nil && string(old) == content {
		return nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	if err := renameio.WriteFile(path, []byte(content), 0o644); err != nil {
		return err
	}
	fmt.Fprintln(log, "wrote", path)
	return nil
}

// The generated part of BENCHMARKS.md lies between these lines; the rest is
// written by hand.
const (
	begin = "<!-- begin: written by make bench -->\n"
	end   = "<!-- end: written by make bench -->\n"
)

// writeDocs writes the generated part and the plots; plots that the report no
// longer has are removed.
func writeDocs(doc *document, dir string, log io.Writer) error {
	path := filepath.Join(dir, "BENCHMARKS.md")
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	text, err := splice(string(old), doc.markdown())
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	plots := map[string]bool{}
	for _, b := range doc.blocks {
		if f, ok := b.(figure); ok {
			plots[f.file] = true
			if err := write(filepath.Join(dir, plotDir, f.file), f.svg, log); err != nil {
				return err
			}
		}
	}
	found, err := filepath.Glob(filepath.Join(dir, plotDir, "*.svg"))
	if err != nil {
		return err
	}
	for _, f := range found {
		if !plots[filepath.Base(f)] {
			if err := os.Remove(f); err != nil {
				return err
			}
			fmt.Fprintln(log, "removed", f)
		}
	}
	return write(path, text, log)
}

func splice(text, generated string) (string, error) {
	before, rest, ok := strings.Cut(text, begin)
	if !ok || strings.Contains(rest, begin) {
		return "", fmt.Errorf("want the line %q once", strings.TrimSpace(begin))
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok || strings.Contains(after, end) {
		return "", fmt.Errorf("want the line %q once, after the other", strings.TrimSpace(end))
	}
	return before + begin + "\n" + generated + "\n" + end + after, nil
}
