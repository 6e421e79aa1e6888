// SPDX-License-Identifier: Apache-2.0

// Command kernels runs `shunt probe`, its self-test and some of the privileged
// tests on other kernels, in emulated machines, and on this machine's own, and
// compares what the probe says with what each kernel is known to have and, but for
// this machine's, with docs/KERNELS.md. See docs/TESTING.md.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/loader"
)

const (
	scripts = "scripts/kernels"
	doc     = "docs/KERNELS.md"
	absent  = 3      // what setup.sh exits with where the mirror has no such kernel
	this    = "this" // the running kernel, not emulated
)

// A suite is some tests of a package, by their whole names.
type suite struct {
	pkg   string
	tests []string
}

// onIptables is for kernels that can't run the programs: the fallback and what
// it falls back to.
var onIptables = []suite{
	{"cmd/shunt-cni", []string{"TestPrivilegedFallback/no_netns_cookies", "TestPrivilegedIptables"}},
	{"redirect/iptables", []string{"TestPrivilegedFamilies"}},
}

// onEBPF has each hook once: connect and getpeername (the original destination),
// getsockopt and sockops, sk_lookup, sendmsg and recvmsg (DNS), TC, and TPROXY.
var onEBPF = []suite{
	{"loader", []string{"TestPrivilegedAttachTwice", "TestPrivilegedCheckNamesAndAttachMends", "TestPrivilegedLookAtTC"}},
	{"internal/probe/kernel", []string{"TestPrivilegedProbe"}},
	{"redirect/ebpf", []string{
		"TestPrivilegedOriginalDst", "TestPrivilegedProxyDown", "TestPrivilegedTimeWait",
		"TestPrivilegedMPTCP", "TestPrivilegedMPTCPListener", "TestPrivilegedTProxyListener", "TestPrivilegedDNS", "TestPrivilegedTrace",
	}},
	{"cmd/shunt-cni", []string{"TestPrivilegedIptables"}},
}

func main() {
	kernels := flag.String("kernels", "5.10 6.1 6.12 this", "which, by their versions; \"this\" is this machine's own")
	update := flag.Bool("update", false, "write "+doc+" instead of comparing with it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, strings.Fields(*kernels), *update, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "kernels:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, kernels []string, update bool, out io.Writer) (err error) {
	dir, err := os.MkdirTemp("", "shunt-kernels-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	start := time.Now()
	if err := build(ctx, dir); err != nil {
		return err
	}
	fmt.Fprintf(out, "built in %v\n", time.Since(start).Round(time.Second))

	text, err := os.ReadFile(doc)
	if err != nil && !update {
		return err
	}
	known := parse(string(text))
	var summary []string
	var bad []error
	for _, k := range kernels {
		start := time.Now()
		got, ran, err := try(ctx, k, dir, out)
		verdict := "ok"
		switch {
		case errors.Is(err, errAbsent), errors.Is(err, errNoRoot):
			verdict = "SKIPPED: " + err.Error()
		case err != nil:
			verdict = "FAILED"
			bad = append(bad, fmt.Errorf("%s: %w", k, err))
		}
		summary = append(summary, fmt.Sprintf("%-6s %4.0fs  %2d tests  %s", k, time.Since(start).Seconds(), ran, verdict))
		if got == nil || k == this { // others have another than this machine
			continue
		}
		if !update {
			if err := compare(known[k], got); err != nil {
				bad = append(bad, fmt.Errorf("%s: %w: `make test-kernels KERNELS_UPDATE=1` writes it", k, err))
			}
		}
		known[k] = got
	}
	fmt.Fprintf(out, "\nkernels:\n  %s\n", strings.Join(summary, "\n  "))
	if update && len(bad) == 0 {
		bad = append(bad, os.WriteFile(doc, []byte(render(known)), 0o644)) //nolint:gosec // a document
	}
	return errors.Join(bad...)
}

// build puts the commands and the tests' binaries into dir: the guest has no Go.
func build(ctx context.Context, dir string) error {
	command := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if b, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%q: %w\n%s", cmd.Args, err, b)
		}
		return nil
	}
	if err := command("build", "-trimpath", "-ldflags=-s -w", "-o", dir+"/", "./cmd/shunt", "./cmd/shunt-cni"); err != nil {
		return err
	}
	built := map[string]bool{}
	for _, s := range slices.Concat(onIptables, onEBPF) {
		if built[s.pkg] {
			continue
		}
		built[s.pkg] = true
		if err := command("test", "-c", "-trimpath", "-ldflags=-s -w", "-o", binary(dir, s), "./"+s.pkg); err != nil {
			return err
		}
	}
	return nil
}

func binary(dir string, s suite) string {
	return filepath.Join(dir, strings.ReplaceAll(s.pkg, "/", "-")+".test")
}

var (
	errAbsent = errors.New("the mirror has no such kernel")
	errNoRoot = errors.New("only root can run it on this machine")
)

// try runs everything on a kernel. What the probe said is there where the
// machine came that far, whatever came after.
func try(ctx context.Context, kernel, dir string, out io.Writer) (column, int, error) {
	version := kernel
	if kernel == this {
		version = loader.Release()
	}
	fmt.Fprintf(out, "\n===== Linux %s\n", version)
	suites := onEBPF
	if older(version, "5.17") {
		suites = onIptables
	}
	script := filepath.Join(dir, "tests.sh")
	if err := os.WriteFile(script, []byte(commands(dir, suites)), 0o755); err != nil { //nolint:gosec // a program
		return nil, 0, err
	}
	results := filepath.Join(dir, "out-"+kernel)
	run := emulated
	if kernel == this {
		run = native
	}
	cmd, err := run(ctx, kernel, script, results, out)
	if err != nil {
		return nil, 0, err
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	failed := cmd.Run()
	if failed != nil {
		failed = fmt.Errorf("%w:\n%s", failed, output.String())
	}
	report, err := readReport(results)
	if err != nil {
		return nil, 0, errors.Join(err, failed)
	}
	fmt.Fprintf(out, "datapath of a default pod: %s: %s\n", report.Datapath, report.Reason)
	passed, err := tests(output.String(), suites, out)
	return columnOf(report), passed, errors.Join(failed, err, judge(version, report))
}

// emulated gives the command that runs a script, which lies in the folder of all
// that it needs, on another kernel.
func emulated(ctx context.Context, kernel, script, results string, out io.Writer) (*exec.Cmd, error) {
	setup := exec.CommandContext(ctx, filepath.Join(scripts, "setup.sh"), kernel)
	setup.Stdout, setup.Stderr = out, out
	if err := setup.Run(); setup.ProcessState != nil && setup.ProcessState.ExitCode() == absent {
		return nil, errAbsent
	} else if err != nil {
		return nil, fmt.Errorf("setup.sh: %w", err)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(scripts, "run.sh"), kernel, script)
	cmd.Env = append(os.Environ(), "VM_TIMEOUT=900", "VM_OUT="+results, "VM_FILES="+filepath.Dir(script))
	return cmd, nil
}

// native gives the command that runs a script on the running kernel.
func native(ctx context.Context, _, script, results string, _ io.Writer) (*exec.Cmd, error) {
	if os.Geteuid() != 0 {
		return nil, errNoRoot
	}
	if err := os.Mkdir(results, 0o755); err != nil { //nolint:gosec // below a temporary folder
		return nil, err
	}
	cmd := exec.CommandContext(ctx, script)
	cmd.Env = append(os.Environ(), "OUT="+results)
	return cmd, nil
}

// commands gives the script that the machine runs.
func commands(dir string, suites []suite) string {
	var b strings.Builder
	fmt.Fprintf(&b, `#!/bin/sh
# No test of these asks for the module's folder but by files of its own.
cd %[1]s || exit
: "${OUT:=/out}"
export SHUNT_TESTBED_PLUGIN=%[1]s/shunt-cni
./shunt probe -o json >"$OUT/probe.json"
echo $? >"$OUT/probe.status"
./shunt probe --self-test -o json >"$OUT/self-test.json"
echo $? >"$OUT/self-test.status"
bad=0
`, dir)
	for _, s := range suites {
		fmt.Fprintf(&b, "%s -test.v -test.timeout 10m -test.run '%s' || bad=1\n", binary(dir, s), pattern(s.tests))
	}
	b.WriteString("exit $bad\n")
	return b.String()
}

// pattern gives the argument of -test.run.
func pattern(tests []string) string {
	var all []string
	for _, t := range tests {
		all = append(all, "^"+strings.ReplaceAll(t, "/", "$/^")+"$")
	}
	return strings.Join(all, "|")
}

var result = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): ([^ ]+) \(([0-9.]+s)\)`)

// tests fails unless each of the tests has passed, and none was skipped.
func tests(output string, suites []suite, out io.Writer) (passed int, err error) {
	verdicts := map[string]string{}
	var bad []error
	for line := range strings.Lines(output) {
		m := result.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		verdicts[m[2]] = m[1]
		if m[1] != "PASS" {
			bad = append(bad, fmt.Errorf("%s: %s", m[1], m[2]))
		}
		if !strings.HasPrefix(line, " ") {
			fmt.Fprintf(out, "%s %6s  %s\n", strings.ToLower(m[1]), m[3], m[2])
		}
	}
	for _, s := range suites {
		for _, t := range s.tests {
			if verdicts[t] == "PASS" {
				passed++
			} else if verdicts[t] == "" {
				bad = append(bad, fmt.Errorf("%s of %s has not run", t, s.pkg))
			}
		}
	}
	return passed, errors.Join(bad...)
}

// readReport reads what the two runs of the probe have left. They have to agree,
// but that the first may not have been able to tell: it has the kernel load
// iptables' modules, for which in an emulated machine the time that a program is
// given may not suffice.
func readReport(dir string) (*probe.Report, error) {
	var reports [2]probe.Report
	for i, name := range []string{"probe", "self-test"} {
		b, err := os.ReadFile(filepath.Join(dir, name+".json"))
		if err != nil {
			return nil, fmt.Errorf("the probe has left nothing: %w", err)
		}
		if err := json.Unmarshal(b, &reports[i]); err != nil {
			return nil, fmt.Errorf("%s.json: %w", name, err)
		}
		status, err := os.ReadFile(filepath.Join(dir, name+".status"))
		if err != nil {
			return nil, err
		}
		want := map[string]string{probe.EBPF: "0", probe.Iptables: "3"}[reports[i].Datapath]
		if got := strings.TrimSpace(string(status)); got != want {
			return nil, errors.Join(fmt.Errorf("%s: exit status %s for datapath %s (%s)", name, got, reports[i].Datapath, reports[i].Reason), selfTest(&reports[i]))
		}
	}
	for _, row := range reports[0].Rows {
		if again := reports[1].Row(row.Name); again.Answer != row.Answer && row.Answer != probe.Unknown {
			return nil, fmt.Errorf("the probe said of %s %s, then %s", row.Name, row.Answer, again.Answer)
		}
	}
	return &reports[1], nil
}

// older compares two versions, of which only the first two numbers count.
func older(a, b string) bool {
	number := func(s string) (n [2]int) {
		_, _ = fmt.Sscanf(s, "%d.%d", &n[0], &n[1]) // what is no version is 0
		return n
	}
	x, y := number(a), number(b)
	return slices.Compare(x[:], y[:]) < 0
}

// judge fails where the probe says something else than what the kernel is known
// to have: a row's version is the first that has it.
func judge(kernel string, r *probe.Report) error {
	var bad []error
	for _, row := range r.Rows {
		if row.Since == "" {
			continue
		}
		want := probe.Yes
		if older(kernel, row.Since) {
			want = probe.No
		}
		if row.Answer != want {
			bad = append(bad, fmt.Errorf("%s is %s, and Linux has it since %s: %s", row.Name, row.Answer, row.Since, row.Why))
		}
	}
	want, paths := probe.EBPF, []string{probe.PathEBPF, probe.PathNFT, probe.PathLegacy}
	if older(kernel, "5.17") {
		want, paths = probe.Iptables, paths[1:]
		if !strings.Contains(r.Reason, "eBPF does not work (") {
			bad = append(bad, fmt.Errorf("the reason does not say why: %s", r.Reason))
		}
	}
	if r.Datapath != want {
		bad = append(bad, fmt.Errorf("datapath %s, not %s: %s", r.Datapath, want, r.Reason))
	}
	for _, path := range paths {
		if !slices.ContainsFunc(r.SelfTest, func(c probe.Check) bool { return c.Path == path }) {
			bad = append(bad, fmt.Errorf("no self-test of %s", path))
		}
	}
	return errors.Join(append(bad, selfTest(r))...)
}

// selfTest tells of the checks that are not OK.
func selfTest(r *probe.Report) error {
	var bad []error
	for _, c := range r.SelfTest {
		if !c.OK {
			bad = append(bad, fmt.Errorf("self-test of %s, %s: %s, not %s", c.Path, c.Connection, c.Got, c.Expected))
		}
	}
	return errors.Join(bad...)
}
