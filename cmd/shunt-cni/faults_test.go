// SPDX-License-Identifier: Apache-2.0

package main

import (
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/testbed"
)

var update = flag.Bool("update", false, "add what was seen to the tables of docs/FAULTS.md, and with "+allSteps+" write them anew")

const faultsDoc = "../../docs/FAULTS.md"

// Words of the fault matrix.
const (
	outRefused    = "fails, nothing is left"
	outRedirected = "succeeds, redirected"
	outFallback   = "succeeds, redirected by iptables"
	outLater      = "fails, the next DEL clears"
	columnBefore  = "killed before it"
	columnAfter   = "killed after it"
	columnFails   = "it fails"
	outCleared    = "succeeds, nothing is left"
	outAddAgain   = "the next ADD redirects"
	outDelAgain   = "DEL clears"
)

// A matrix is what came of faults, as a table of docs/FAULTS.md has it: a row for
// each step of a command, and a column for each fault. How often a command makes
// a step, and in what order, is none of its business: so the table stands as
// long as the commands do the same things.
type matrix struct {
	title   string // of the command, as in the table's first line
	columns []string
	mu      sync.Mutex
	rows    map[string]map[string]map[string]bool // step, column, outcomes
}

func newMatrix(title string, columns ...string) *matrix {
	return &matrix{title: title, columns: columns, rows: map[string]map[string]map[string]bool{}}
}

// note keeps an outcome.
func (m *matrix) note(step, column, outcome string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rows[step] == nil {
		m.rows[step] = map[string]map[string]bool{}
	}
	if m.rows[step][column] == nil {
		m.rows[step][column] = map[string]bool{}
	}
	m.rows[step][column][outcome] = true
}

// mapNames are those of the datapath's maps.
func mapNames() []string {
	spec, err := object.LoadShunt()
	if err != nil {
		panic(err) // it is compiled in
	}
	return slices.Collect(maps.Keys(spec.Maps))
}

// A stepNaming turns what a step is about into what it is in any run.
type stepNaming struct {
	is   *regexp.Regexp
	name string
}

// stepNamings are made when they are needed: the test binary also plays pods'
// processes, by the hundred.
var stepNamings = sync.OnceValue(func() []stepNaming {
	return []stepNaming{
		{regexp.MustCompile(`^/(sys/kernel/mm|proc/(self|\d+)/(cgroup|mountinfo)$|sys/fs/cgroup/cpu/|etc/localtime|usr/share/zoneinfo).*`), "the Go runtime's own"},
		{regexp.MustCompile(`[0-9a-f]{64}@eth0`), "ATTACHMENT"},
		{regexp.MustCompile(`users/[\d.]+ATTACHMENT`), "users/ATTACHMENT"},
		{regexp.MustCompile(`datapath-[0-9a-f]+`), "datapath"},
		{regexp.MustCompile(`load-[^/]+`), "load"},
		{regexp.MustCompile(`cgroups/\d+`), "cgroups/CGROUP"},
		{regexp.MustCompile(`netns/\d+`), "netns/COOKIE"},
		{regexp.MustCompile(`cgroups/CGROUP/[a-z]\w+`), "cgroups/CGROUP/LINK"},
		{regexp.MustCompile(`netns/COOKIE/(stamp|sk_lookup|tc-\d+)`), "netns/COOKIE/LINK"},
		{regexp.MustCompile(`(datapath|load)/shunt_\w+`), "$1/PROGRAM"},
		{regexp.MustCompile(`(datapath|load)/(` + strings.Join(mapNames(), "|") + `)$`), "$1/MAP"},
		{regexp.MustCompile(`(program-|free/)\d+`), "${1}SLOT"},
		{regexp.MustCompile(`\.next-\d+`), ".next"},
		{regexp.MustCompile(`^/proc/\d+/task/\d+/`), "/proc/thread-self/"},
		{regexp.MustCompile(`^/proc/\d+/`), "/proc/self/"},
		{regexp.MustCompile(`^net:.*`), "the host's netns"},
		{regexp.MustCompile(`^/memfd:shunt-ip6?tables\S*-(restore|save).*`), "the input of iptables-$1"},
		{regexp.MustCompile(`^(/\S*)?(shunt-test-\S*|kubepods|burstable|pod[0-9a-f-]{36})$`), "the pod's cgroup"},
		{regexp.MustCompile(`^/\S+/netns$`), "the pod's netns"},
		{regexp.MustCompile(`^/\S+/TestPrivileged[^/]+/\d+$`), "another bpffs"}, // of another test's
		{regexp.MustCompile(`^/\S+/shunt-testbed-\d+/shunt$`), "the larger executable"},
		{regexp.MustCompile(`^/memfd:shunt-netconf.*`), "what is handed over"},
		{regexp.MustCompile(`^/\S+/kubeconfig$`), "kubeconfig"},
	}
})

// stepName names a step as the tables do.
func (n *node) stepName(s testbed.Step) string {
	var args []string
	for arg := range strings.SplitSeq(s.Arg, ", ") {
		arg = strings.NewReplacer(n.RunDir, "runDir", n.BPFDir, "bpfDir",
			filepath.Dir(n.RunDir), "runDir's parent", filepath.Dir(n.BPFDir), "bpfDir's parent").Replace(arg)
		for _, x := range stepNamings() {
			arg = x.is.ReplaceAllString(arg, x.name)
		}
		args = append(args, arg)
	}
	return strings.TrimSuffix(s.Call+" "+strings.Join(args, ", "), " ")
}

// at notes what came of a fault at a step.
func (m *matrix) at(n *node, s testbed.StepsResult, fault testbed.Fault, outcome string) {
	if !s.Hit {
		return
	}
	column := map[testbed.FaultKind]string{
		testbed.KillBefore: columnBefore, testbed.KillAfter: columnAfter, testbed.FailCall: columnFails,
	}[fault.Kind]
	m.note(n.stepName(s.Steps[fault.Step-1]), column, outcome)
}

// oneIn chooses a step of so many, from a random one on: for sweeps that take
// long.
func oneIn(t *testing.T, of int) func(step int) bool {
	t.Helper()
	if full() {
		return nil
	}
	if raced() {
		of *= 2
	}
	from := rand.IntN(of)
	t.Logf("one step of %d is tried, the first is %d", of, from+1)
	return func(step int) bool { return step%of == (from+1)%of }
}

// markers frame the table of a test in the document.
func (m *matrix) markers() (begins, ends string) {
	return "<!-- " + m.title + " -->\n", "<!-- end of " + m.title + " -->\n"
}

func (m *matrix) render() string {
	var b strings.Builder
	fmt.Fprintf(&b, "| step | %s |\n|---|%s\n", strings.Join(m.columns, " | "), strings.Repeat("---|", len(m.columns)))
	for _, step := range slices.Sorted(maps.Keys(m.rows)) {
		fmt.Fprintf(&b, "| `%s` |", step)
		for _, c := range m.columns {
			cell := strings.Join(slices.Sorted(maps.Keys(m.rows[step][c])), "; or ")
			if cell == "" {
				cell = "–"
			}
			fmt.Fprintf(&b, " %s |", cell)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// parseMatrix reads a table back.
func parseMatrix(title string, columns []string, text string) *matrix {
	m := newMatrix(title, columns...)
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		step := strings.TrimSpace(cells[0])
		if len(cells) != len(columns)+1 || !strings.HasPrefix(step, "`") {
			continue
		}
		for i, c := range columns {
			for outcome := range strings.SplitSeq(strings.TrimSpace(cells[i+1]), "; or ") {
				if outcome != "–" {
					m.note(strings.Trim(step, "`"), c, outcome)
				}
			}
		}
	}
	return m
}

// settle fails the test where the document says another outcome of a step than
// was seen. A step that it does not have is told, and fails the test only where
// all steps were tried; and so does one that was not seen then.
func (m *matrix) settle(t *testing.T) {
	t.Helper()
	if raced() {
		return // its libc has steps of its own
	}
	complain := t.Logf
	if full() {
		complain = t.Errorf
	}
	b, err := os.ReadFile(faultsDoc)
	if err != nil {
		t.Fatal(err)
	}
	begins, ends := m.markers()
	before, rest, ok := strings.Cut(string(b), begins)
	old, after, ok2 := strings.Cut(rest, ends)
	if !ok || !ok2 {
		t.Fatalf("%s has no lines %q and %q", faultsDoc, begins, ends)
	}
	want := parseMatrix(m.title, m.columns, old)
	for step, columns := range m.rows {
		for column, outcomes := range columns {
			known := len(want.rows[step][column]) > 0
			for o := range outcomes {
				switch {
				case want.rows[step][column][o]:
					continue
				case *update:
				case known:
					t.Errorf("%s: step %s, %s: %q is not what %s says; `make faults` writes it", m.title, step, column, o, faultsDoc)
				default:
					complain("%s: step %s, %s: %q is not in %s; `make faults` writes it", m.title, step, column, o, faultsDoc)
				}
				want.note(step, column, o)
			}
		}
	}
	if full() {
		for step := range want.rows {
			if m.rows[step] == nil {
				if !*update {
					t.Errorf("%s: %s has step %s, which was not seen; `make faults` writes it", m.title, faultsDoc, step)
				}
				delete(want.rows, step)
			}
		}
	}
	if *update && !t.Failed() {
		if err := os.WriteFile(faultsDoc, []byte(before+begins+want.render()+ends+after), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
