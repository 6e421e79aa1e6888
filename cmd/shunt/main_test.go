// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"shunt.dev/shunt/internal/testbed"
)

// asShunt in the environment makes the test binary the command itself.
const asShunt = "SHUNT_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asShunt) != "" {
		main()
	}
	testbed.Main(m)
}

// pods are those of the documentation.
const pods = "testdata/pods"

// TestScripts runs the command as people do. Beside testscript's own commands
// there is exits: `exits 2 shunt ...` wants that exit status.
func TestScripts(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			bin := filepath.Join(env.WorkDir, ".bin")
			env.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			env.Setenv(asShunt, "1")
			env.Setenv("GORACE", "atexit_sleep_ms=0") // it would rest for a second
			abs, err := filepath.Abs(pods)
			if err == nil {
				err = os.Mkdir(bin, 0o755)
			}
			return errors.Join(err, os.Symlink(self, filepath.Join(bin, "shunt")), os.CopyFS(env.WorkDir, os.DirFS(abs)))
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				got := 0
				var exit *exec.ExitError
				if err := ts.Exec(args[1], args[2:]...); errors.As(err, &exit) {
					got = exit.ExitCode()
				} else {
					ts.Check(err)
				}
				if neg || got != want {
					ts.Fatalf("exit status %d, want %d", got, want)
				}
			},
		},
	})
}

// An example is a command that help or documentation shows, with its output.
type example struct {
	where string
	root  bool // it is for root: it programs something
	line  string
	want  []string // "..." stands for any lines
}

// examples gives those of the help texts and of docs/CLI.md.
func examples(t testing.TB) (all []example) {
	t.Helper()
	var visit func(cmd *cobra.Command)
	visit = func(cmd *cobra.Command) {
		all = append(all, parseExamples(cmd.CommandPath()+" --help", cmd.Example)...)
		for _, sub := range cmd.Commands() {
			visit(sub)
		}
	}
	visit(newRoot())
	doc, err := os.ReadFile("../../docs/CLI.md")
	if err != nil {
		t.Fatal(err)
	}
	return append(all, parseExamples("docs/CLI.md", string(doc))...)
}

var exampleLine = regexp.MustCompile(`^ +([$#]) (.*\bshunt .*)$`)

func parseExamples(where, text string) (all []example) {
	inside := false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		m := exampleLine.FindStringSubmatch(line)
		switch {
		case m != nil && (m[1] == "$" || strings.HasPrefix(m[2], "shunt ")):
			all = append(all, example{where: where, root: m[1] == "#", line: m[2]})
			inside = true
		case line == "":
		case line[0] != ' ':
			inside = false
		case inside:
			indent := "  "
			if strings.HasSuffix(where, ".md") {
				indent = "    "
			}
			last := &all[len(all)-1]
			last.want = append(last.want, strings.TrimPrefix(line, indent))
		}
	}
	return all
}

// args gives the command's arguments, and the pod that it reads from standard
// input.
func (e example) args() (args []string, stdin string) {
	line := e.line
	if before, after, piped := strings.Cut(line, " | "); piped && strings.HasPrefix(before, "kubectl ") {
		line, stdin = after, "meshed.yaml"
	}
	return strings.Fields(line)[1:], stdin
}

// compare fails the test unless got is what the example shows. Empty lines
// don't count; a line that ends with ... may go on.
func (e example) compare(t *testing.T, got string) {
	t.Helper()
	lines := slices.DeleteFunc(strings.Split(got, "\n"), func(s string) bool { return s == "" })
	same := func(want, got string) bool {
		if prefix, ok := strings.CutSuffix(want, "..."); ok {
			return strings.HasPrefix(got, prefix)
		}
		return want == got
	}
	skip := len(e.want) == 0
	for _, want := range e.want {
		if want == "..." {
			skip = true
			continue
		}
		i := slices.IndexFunc(lines, func(s string) bool { return same(want, s) })
		if i < 0 || i > 0 && !skip {
			t.Errorf("%s: %s: its output does not go on with %q, but with:\n%s", e.where, e.line, want, strings.Join(lines, "\n"))
			return
		}
		lines, skip = lines[i+1:], false
	}
	if len(lines) > 0 && !skip {
		t.Errorf("%s: %s: its output goes on with:\n%s", e.where, e.line, strings.Join(lines, "\n"))
	}
}

// TestExamples: what help and documentation show is what comes.
func TestExamples(t *testing.T) {
	tried := map[string]int{}
	all := examples(t)
	t.Chdir(pods)
	for _, e := range all {
		args, stdin := e.args()
		if e.root || args[0] == "probe" || args[0] == "validate" { // a node's own answer, a pod's own
			continue
		}
		var in strings.Reader
		if stdin != "" {
			pod, err := os.ReadFile(stdin)
			if err != nil {
				t.Fatal(err)
			}
			in.Reset(string(pod))
		}
		var out strings.Builder
		exit := run(t.Context(), args, &in, &out, &out)
		if bad := strings.Contains(e.line, "bad-"); exit != 0 && !bad || bad && exit != exitUsage {
			t.Errorf("%s: %s: exit status %d\n%s", e.where, e.line, exit, out.String())
		}
		e.compare(t, out.String())
		tried[args[0]]++
	}
	for _, verb := range []string{"explain", "render", "version"} {
		if tried[verb] < 2 {
			t.Errorf("%s has %d examples in help and documentation", verb, tried[verb])
		}
	}
}

// TestHelp: every verb has help with an example.
func TestHelp(t *testing.T) {
	for _, cmd := range newRoot().Commands() {
		if cmd.Hidden || !cmd.IsAvailableCommand() {
			continue
		}
		var out, errs strings.Builder
		if exit := run(t.Context(), []string{cmd.Name(), "--help"}, strings.NewReader(""), &out, &errs); exit != 0 || errs.Len() > 0 {
			t.Errorf("%s --help: exit status %d\n%s", cmd.Name(), exit, errs.String())
		}
		if !strings.Contains(out.String(), "shunt "+cmd.Name()) || cmd.Short == "" || cmd.Long == "" {
			t.Errorf("%s --help:\n%s", cmd.Name(), out.String())
		}
	}
}

// TestDocumented: docs/CLI.md, or a page of its own, has a section on every verb, and
// names no flag that the verb it stands with does not have.
func TestDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/CLI.md")
	if err != nil {
		t.Fatal(err)
	}
	sections := map[string]string{}
	for _, part := range strings.Split(string(doc), "\n## ")[1:] {
		head, text, _ := strings.Cut(part, "\n")
		for verb := range strings.SplitSeq(head, ", ") {
			sections[verb] += text
		}
	}
	page, err := os.ReadFile("../../docs/PROBE.md")
	if err != nil {
		t.Fatal(err)
	}
	sections["probe"] = string(page)
	line := regexp.MustCompile(`(?m)^ +[$#] (?:bin/)?shunt (\w+)(.*)$`)
	flagName := regexp.MustCompile(`--([a-z][-a-z]*)`)
	for _, cmd := range newRoot().Commands() {
		if cmd.Hidden || !cmd.IsAvailableCommand() {
			continue
		}
		if sections[cmd.Name()] == "" {
			t.Errorf("%s has no section", cmd.Name())
		}
		// What a section says of flags without a command may be another program's.
		for _, m := range line.FindAllStringSubmatch(string(doc)+string(page), -1) {
			for _, f := range flagName.FindAllStringSubmatch(m[2], -1) {
				if m[1] == cmd.Name() && f[1] != "help" && cmd.Flags().Lookup(f[1]) == nil {
					t.Errorf("shunt %s has no flag --%s", cmd.Name(), f[1])
				}
			}
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			if f.Usage == "" {
				t.Errorf("%s: --%s has no help", cmd.Name(), f.Name)
			}
		})
	}
}

// TestWriteFails: an output that can't be written is no success.
func TestWriteFails(t *testing.T) {
	for _, args := range [][]string{
		{"version"},
		{"version", "-o", "json"},
		{"explain", "--pod", pods + "/meshed.yaml"},
		{"render", "--pod", pods + "/meshed.yaml"},
		{"render", "--pod", pods + "/plain.yaml"},
	} {
		var errs strings.Builder
		if exit := run(t.Context(), args, strings.NewReader(""), fullDevice{}, &errs); exit != exitFailed || errs.String() != "shunt: full\n" {
			t.Errorf("%q: exit status %d, %q", args, exit, errs.String())
		}
	}
}

type fullDevice struct{}

func (fullDevice) Write([]byte) (int, error) { return 0, fmt.Errorf("full") }
