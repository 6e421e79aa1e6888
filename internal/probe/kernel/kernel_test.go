// SPDX-License-Identifier: Apache-2.0

//go:build linux

package kernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	ebpflink "github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/scratch"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
)

// What a kernel has by its version must be yes, or the probe is wrong.
func TestPrivilegedProbe(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	noScratch(t)
	start := time.Now()
	rows := Probe(t.Context(), Options{BPFDir: "/sys/fs/bpf/shunt"})
	t.Logf("it took %v", time.Since(start)) // half a second; under emulation, fifty times that
	var running [2]int
	if _, err := fmt.Sscanf(loader.Release(), "%d.%d", &running[0], &running[1]); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range rows {
		names = append(names, r.Name)
		if r.Why == "" {
			t.Errorf("%s has no reason", r.Name)
		}
		if r.Since == "" {
			continue
		}
		var since [2]int
		if _, err := fmt.Sscanf(r.Since, "%d.%d", &since[0], &since[1]); err != nil {
			t.Errorf("%s: since %q: %v", r.Name, r.Since, err)
		}
		if slices.Compare(running[:], since[:]) >= 0 && r.Answer != probe.Yes {
			t.Errorf("%s is %s on %s, which has it since %s: %s", r.Name, r.Answer, loader.Release(), r.Since, r.Why)
		}
	}
	if answer, why := probe.NewReport(loader.Release(), rows, probe.Wish{}).Serves(probe.PathEBPF); answer != probe.Yes {
		t.Errorf("eBPF: %s: %s", answer, why)
	}
	// Names are stable: others read them.
	want := []string{
		"cap-bpf", "cap-perfmon", "cap-net-admin", "cap-sys-admin", "cap-net-raw",
		"kernel", "btf", "netns-cookie", "ipv6",
		"cgroup2", "cgroup-pods", "cgroup-unified", "cgroup-link",
		"bpf-connect4", "bpf-connect6", "bpf-getpeername4", "bpf-getpeername6", "bpf-getsockopt", "bpf-sockops", "bpf-adopt", "bpf-look", "bpf-stamp", "bpf-sk-lookup",
		"bpf-sendmsg4", "bpf-sendmsg6", "bpf-recvmsg4", "bpf-recvmsg6", "bpf-tc",
		"bpf-datapath", "netns-link", "bpffs", "bpf-set-retval", "bpf-mptcp-sock",
		"tc-clsact", "tc-tcx", "tc-sk-assign", "tc-reuseport",
	}
	if diff := cmp.Diff(want, names); diff != "" {
		t.Error(diff)
	}
}

// noScratch fails the test if a scratch cgroup of this process is left.
func noScratch(t *testing.T) {
	pattern := filepath.Join(testbed.Cgroup2Mount(t), fmt.Sprintf("%s%d-*", scratch.CgroupPrefix, os.Getpid()))
	t.Cleanup(func() {
		if left, _ := filepath.Glob(pattern); len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	})
}

// Each program has a row of its own.
func TestProbeHasEveryProgram(t *testing.T) {
	spec, err := object.LoadShunt()
	if err != nil {
		t.Fatal(err)
	}
	var probed []string
	for _, n := range needs {
		probed = append(probed, n.program)
		if one := alone(spec, n.program); len(one.Programs) != 1 || len(one.Maps) >= len(spec.Maps) {
			t.Errorf("%s is not alone: %d programs, %d maps", n.program, len(one.Programs), len(one.Maps))
		}
	}
	for name := range spec.Programs {
		if !slices.Contains(probed, name) {
			t.Errorf("%s is not probed", name)
		}
	}
}

func TestProbeAnswer(t *testing.T) {
	verifier := func(errno error) error {
		return fmt.Errorf("program x: %w", &ebpf.VerifierError{Cause: errno, Log: []string{"unknown func bpf_x#300"}})
	}
	for _, tt := range []struct {
		name string
		err  error
		root probe.Answer // with the capabilities
		user probe.Answer // without, which needs root
	}{
		{"it works", nil, probe.Yes, probe.Yes},
		{"unknown command", unix.EINVAL, probe.No, probe.Unknown},
		{"attributes that the kernel does not know", unix.E2BIG, probe.No, probe.Unknown},
		{"refused by the verifier", verifier(unix.EINVAL), probe.No, probe.Unknown},
		{"refused by the verifier, types", verifier(unix.EACCES), probe.No, probe.Unknown},
		{"the verifier has no memory", verifier(unix.ENOMEM), probe.Unknown, probe.Unknown},
		{"the library says", fmt.Errorf("map: %w", ebpf.ErrNotSupported), probe.No, probe.Unknown},
		{"not permitted", unix.EPERM, probe.Unknown, probe.Unknown},
		{"denied by a security module", unix.EACCES, probe.Unknown, probe.Unknown},
		{"no memory", unix.ENOMEM, probe.Unknown, probe.Unknown},
		{"no descriptors", unix.EMFILE, probe.Unknown, probe.Unknown},
		{"again", unix.EAGAIN, probe.Unknown, probe.Unknown},
		{"known to be conclusive", fmt.Errorf("attach: %w", noError{unix.EPERM}), probe.No, probe.No},
		{"known not to be", unknownError{unix.EINVAL}, probe.Unknown, probe.Unknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got, why := (&prober{root: true}).answer("done", tt.err); got != tt.root {
				t.Errorf("as root %s (%s), want %s", got, why, tt.root)
			}
			if got, why := (&prober{}).answer("done", tt.err); got != tt.user {
				t.Errorf("as a user %s (%s), want %s", got, why, tt.user)
			}
		})
	}
	for err, needs := range map[error]bool{unix.EPERM: true, unix.EINVAL: true, unknownError{unix.EACCES}: true, unknownError{unix.ENOENT}: false} {
		if _, why := (&prober{}).answer("", err); strings.HasPrefix(why, probe.NeedsRoot) != needs {
			t.Errorf("a user's %v: %s", err, why)
		}
	}
}

func TestProbeNamesHelpersAsTheKernelDoes(t *testing.T) {
	for helper, want := range map[asm.BuiltinFunc]string{
		asm.FnGetNetnsCookie: "bpf_get_netns_cookie", asm.FnBind: "bpf_bind", asm.FnSkcToTcpSock: "bpf_skc_to_tcp_sock",
	} {
		if got := helperName(helper); got != want {
			t.Errorf("%v is %s, want %s", helper, got, want)
		}
	}
}

// What is said of hosts without cgroup2, of every layout and of hybrid ones.
func TestProbeFindsPods(t *testing.T) {
	for _, layout := range kubepods {
		mount := t.TempDir()
		if err := os.MkdirAll(filepath.Join(mount, layout.path), 0o755); err != nil {
			t.Fatal(err)
		}
		if where, err := findPods(mount); err != nil || !strings.Contains(where, layout.layout) {
			t.Errorf("%s: %q, %v", layout.path, where, err)
		}
	}
	// What is mounted here, and whose pods lie there, must not matter.
	table := filepath.Join(t.TempDir(), "mountinfo")
	before := mountinfo
	t.Cleanup(func() { mountinfo = before })
	mountinfo = table
	if err := os.WriteFile(table, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, mount := range []string{"", t.TempDir()} {
		if _, err := findPods(mount); !errors.As(err, new(unknownError)) {
			t.Errorf("pods in %q: %v, want unknown", mount, err)
		}
	}

	// Of version 1 alone, as a hybrid host's kubelet makes them.
	v1 := t.TempDir()
	if err := os.MkdirAll(filepath.Join(v1, "kubepods/burstable"), 0o755); err != nil {
		t.Fatal(err)
	}
	line := "30 24 0:26 / " + v1 + " rw,nosuid shared:9 - cgroup cgroup rw,pids\n"
	if err := os.WriteFile(table, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := findPods(t.TempDir()); !errors.As(err, new(noError)) || !strings.Contains(err.Error(), v1) {
		t.Errorf("pods in version 1: %v, want no", err)
	}
	if _, err := unified(t.TempDir()); !errors.As(err, new(noError)) {
		t.Errorf("a hybrid host: %v, want no", err)
	}
	if err := os.WriteFile(table, []byte("30 24 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if why, err := unified(t.TempDir()); err != nil || !strings.Contains(why, "only hierarchy") {
		t.Errorf("a host of version 2: %q, %v", why, err)
	}
}

func TestProbeWithoutCgroup2(t *testing.T) {
	p := &prober{opts: Options{CgroupRoot: t.TempDir()}, root: true}
	p.cgroups(t.Context())
	got := map[string]probe.Answer{}
	for _, r := range p.rows {
		got[r.Name] = r.Answer
	}
	want := map[string]probe.Answer{"cgroup2": probe.No, "cgroup-pods": probe.Unknown, "cgroup-unified": probe.Unknown, "cgroup-link": probe.No}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestProbeBPFDirOutsideOfBPFFS(t *testing.T) {
	p := &prober{opts: Options{BPFDir: filepath.Join(t.TempDir(), "a", "b")}, root: true}
	if _, err := p.bpffs(); !errors.As(err, new(noError)) {
		t.Errorf("%v, want no", err)
	}
}

// A program that somebody has attached to an ancestor, and that allows none
// below it, is found.
func TestPrivilegedProbeSeesExclusivePrograms(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	noScratch(t)
	above, err := scratch.NewCgroup(testbed.Cgroup2Mount(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := above.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	p := &prober{root: true, hier: above.Path}
	if err := p.cgroupLink(t.Context()); err != nil {
		t.Fatalf("before: %v", err)
	}
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer prog.Close()
	if err := ebpflink.RawAttachProgram(ebpflink.RawAttachProgramOptions{
		Target: int(above.Dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInet4Connect, // no flags: exclusive
	}); err != nil {
		t.Fatal(err)
	}
	answer, why := p.answer("", p.cgroupLink(t.Context()))
	if answer != probe.No || !strings.Contains(why, "ancestor") {
		t.Errorf("%s: %s, want no", answer, why)
	}
}
