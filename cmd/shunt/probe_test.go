// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/scratch"
	"shunt.dev/shunt/internal/testbed"
)

// probeProcess makes a process of `shunt probe`.
func probeProcess(t *testing.T, args ...string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer) {
	t.Helper()
	cmd = exec.CommandContext(t.Context(), "/proc/self/exe", append([]string{"probe"}, args...)...)
	cmd.Env = append(os.Environ(), asShunt+"=1")
	stdout, stderr = new(bytes.Buffer), new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.Dir = "/" // a user may not see where the tests run
	return cmd, stdout, stderr
}

// noScratch fails the test if a scratch cgroup of a process is left.
func noScratch(t *testing.T, pid int) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(testbed.Cgroup2Mount(t), fmt.Sprintf("%s%d-*", scratch.CgroupPrefix, pid))); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestProbeStatus(t *testing.T) {
	for _, tt := range []struct {
		name     string
		datapath string
		checks   []probe.Check
		want     int
	}{
		{"ebpf", probe.EBPF, nil, 0},
		{"ebpf, tested", probe.EBPF, []probe.Check{{OK: true}}, 0},
		{"iptables only", probe.Iptables, []probe.Check{{OK: true}}, 3},
		{"neither", probe.None, nil, 4},
		{"could not tell", string(probe.Unknown), nil, 5},
		{"the self-test failed", probe.EBPF, []probe.Check{{OK: true}, {}}, 1},
		{"the self-test failed where eBPF is not", probe.Iptables, []probe.Check{{}}, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := 0
			err := status(&probe.Report{Datapath: tt.datapath, SelfTest: tt.checks})
			var known *exitError
			if errors.As(err, &known) {
				got = known.code
			} else if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("exit %d, want %d", got, tt.want)
			}
		})
	}
}

func TestProbeUsage(t *testing.T) {
	for _, args := range [][]string{{"all"}, {"-o", "yaml"}, {"--netconf", "/nowhere"}, {"--fast"}, {"--self-test=perhaps"}} {
		cmd, stdout, stderr := probeProcess(t, args...)
		_ = cmd.Run() // its status is looked at
		if code := cmd.ProcessState.ExitCode(); code != 2 || stdout.Len() > 0 || stderr.Len() == 0 {
			t.Errorf("%v: exit %d, %s%s", args, code, stdout, stderr)
		}
	}
}

// Without root, no row is a wrong no, and nothing is claimed.
func TestPrivilegedProbeAsUser(t *testing.T) {
	testbed.Privileged(t) // to become another
	testbed.NoLeaks(t)
	for range 3 { // the library's order of loading is not always the same
		cmd, stdout, stderr := probeProcess(t, "-o", "json", "--self-test")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		_ = cmd.Run() // its status is looked at
		if code := cmd.ProcessState.ExitCode(); code != exitUntold {
			t.Fatalf("exit %d, want %d: %s%s", code, exitUntold, stdout, stderr)
		}
		var r probe.Report
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatal(err)
		}
		for _, row := range r.Rows {
			if row.NeededFor == probe.ForEBPF && row.Answer == probe.No {
				t.Errorf("%s is no: %s", row.Name, row.Why)
			}
			if strings.HasPrefix(row.Name, "bpf-") && (row.Answer != probe.Unknown || !strings.HasPrefix(row.Why, probe.NeedsRoot)) {
				t.Errorf("%s is %s: %s", row.Name, row.Answer, row.Why)
			}
		}
		for name, want := range map[string]probe.Answer{"netns-cookie": probe.Yes, "cgroup2": probe.Yes, "iptables-nft-programs": probe.Yes} {
			if row := r.Row(name); row.Answer != want {
				t.Errorf("%s is %s, which any user can tell: %s", name, row.Answer, row.Why)
			}
		}
		if len(r.SelfTest) > 0 || r.Datapath != "unknown" {
			t.Errorf("datapath %s, self-test %v", r.Datapath, r.SelfTest)
		}
	}

	cmd, stdout, _ := probeProcess(t)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	_ = cmd.Run() // as above
	if !strings.Contains(stdout.String(), "unknown (needs root)") {
		t.Errorf("the table does not say what needs root:\n%s", stdout)
	}
}

func TestPrivilegedProbeTable(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	cmd, stdout, stderr := probeProcess(t, "--self-test")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s%s", err, stdout, stderr)
	}
	noScratch(t, cmd.Process.Pid)
	lines := strings.Split(strings.TrimRight(stdout.String(), "\n"), "\n")
	if last := lines[len(lines)-1]; !strings.HasPrefix(last, "datapath of a default pod: ebpf: ") {
		t.Errorf("the last line: %s", last)
	}
	if strings.Contains(stdout.String(), "FAILED") || !strings.Contains(stdout.String(), "iptables-legacy  ok") {
		t.Errorf("%s", stdout)
	}
}

// The netconf has its say, from a conflist too.
func TestPrivilegedProbeNetconf(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	file := filepath.Join(t.TempDir(), "10-cluster.conflist")
	for _, tt := range []struct {
		conf     string
		datapath string
		exit     int
	}{
		{`{"cniVersion":"1.1.0","name":"x","plugins":[{"type":"bridge"},{"type":"shunt-cni","datapath":"iptables"}]}`, "iptables", 3},
		{`{"type":"shunt-cni","name":"x","cniVersion":"1.1.0","bpfDir":"/run/shunt-probe-test","datapath":"ebpf"}`, "none", 4},
		{`{"type":"shunt-cni","name":"x","cniVersion":"1.1.0","bpfDir":"/run/shunt-probe-test"}`, "iptables", 3},
	} {
		if err := os.WriteFile(file, []byte(tt.conf), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd, stdout, stderr := probeProcess(t, "--netconf", file, "-o", "json")
		_ = cmd.Run() // its status is looked at
		var r probe.Report
		if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
			t.Fatalf("%v: %s%s", err, stdout, stderr)
		}
		if code := cmd.ProcessState.ExitCode(); code != tt.exit || r.Datapath != tt.datapath {
			t.Errorf("%s: exit %d, %s (%s); want %d, %s", tt.conf, code, r.Datapath, r.Reason, tt.exit, tt.datapath)
		}
		// The same row is in the table of every kernel that knows MPTCP.
		if r.Row("mptcp-listener").Answer == probe.Unknown {
			t.Errorf("mptcp-listener: %s", r.Row("mptcp-listener").Why)
		}
	}
	if _, err := os.Stat("/run/shunt-probe-test"); err == nil {
		t.Error("it has made bpfDir")
	}
}

// Every row that there is is in the documentation.
func TestPrivilegedProbeIsDocumented(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	doc, err := os.ReadFile("../../docs/PROBE.md")
	if err != nil {
		t.Fatal(err)
	}
	cmd, stdout, stderr := probeProcess(t, "-o", "json")
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, stderr)
	}
	var r probe.Report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	for _, row := range r.Rows {
		// Of iptables, a line for both modes.
		name := strings.Replace(strings.Replace(row.Name, "-nft-", "-*-", 1), "-legacy-", "-*-", 1)
		if !bytes.Contains(doc, []byte("| "+name+" |")) {
			t.Errorf("docs/PROBE.md does not tell of %s", name)
		}
	}
}

func TestPrivilegedProbeIsStopped(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		cmd, stdout, stderr := probeProcess(t, "--self-test")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// In the midst of the self-test: its cgroup has processes.
		inTest := testbed.Poll(20*time.Second, func() bool {
			found, _ := filepath.Glob(filepath.Join(testbed.Cgroup2Mount(t), fmt.Sprintf("%s%d-*", scratch.CgroupPrefix, cmd.Process.Pid), "container"))
			return len(found) > 0
		})
		if !inTest {
			t.Fatal("the self-test has not begun")
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // its status is looked at
		if code := cmd.ProcessState.ExitCode(); code != exitFailed {
			t.Errorf("%v: exit %d, want %d: %s%s", sig, code, exitFailed, stdout, stderr)
		}
		noScratch(t, cmd.Process.Pid)
	}
}
