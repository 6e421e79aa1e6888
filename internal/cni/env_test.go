// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

func TestParseArgs(t *testing.T) {
	full := podArgs{Namespace: "ns", Name: "p", UID: "u"}
	for in, want := range map[string]podArgs{
		"": {},
		"IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=p;K8S_POD_INFRA_CONTAINER_ID=c;K8S_POD_UID=u": full,
		"K8S_POD_UID=u;K8S_POD_NAME=p;X=Y;K8S_POD_NAMESPACE=ns":                                          full,
		";K8S_POD_UID=u;;K8S_POD_NAME=p;novalue;=;K8S_POD_NAMESPACE=ns;":                                 full,
		"k8s_pod_name=p":   {},
		"K8S_POD_NAME=a=b": {Name: "a=b"},
	} {
		if got := parseArgs(in); got != want {
			t.Errorf("%q: got %+v, want %+v", in, got, want)
		}
	}
}

func TestReadAgent(t *testing.T) {
	want := redirect.AgentRef{Namespace: "shunt", DaemonSet: "shunt-node"}
	for in, want := range map[string]redirect.AgentRef{
		"shunt/shunt-node":     want,
		" shunt/shunt-node \n": want,
		"":                     {},
		"shunt-node":           {},
		"/shunt-node":          {},
		"shunt/":               {},
		"a/b/c":                {},
		"a/b\nc/d":             {},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "agent"), []byte(in), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := readAgent(dir, redirect.AgentRef{}, slog.New(slog.DiscardHandler)); got != want {
			t.Errorf("%q: got %+v, want %+v", in, got, want)
		}
	}
	configured := redirect.AgentRef{Namespace: "kube-system", DaemonSet: "shunt"}
	dir := t.TempDir()
	if got := readAgent(dir, configured, slog.New(slog.DiscardHandler)); got != configured {
		t.Errorf("no file: got %+v", got)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "agent"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := readAgent(dir, configured, slog.New(slog.DiscardHandler)); got != configured {
		t.Errorf("a FIFO: got %+v", got)
	}
}

func TestCheckNetns(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink("/proc/self/ns/net", link); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"":                  "no such file",
		"/none/such":        "open netns /none/such: no such file",
		file:                "is not a network namespace",
		"/proc/self/ns/mnt": "is not a network namespace",
		"/proc/self/ns/net": "netns /proc/self/ns/net is the host's own",
		link:                "is the host's own",
	} {
		if err := checkNetns(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
}

// TestPrivilegedCheckNetns: another netns than the host's is fine.
func TestPrivilegedCheckNetns(t *testing.T) {
	testbed.Privileged(t)
	other := exec.Command("cat") // it waits for what is never written
	other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	stdin, err := other.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	if err := checkNetns(fmt.Sprintf("/proc/%d/ns/net", other.Process.Pid)); err != nil {
		t.Error(err)
	}
	if err := errors.Join(stdin.Close(), other.Wait()); err != nil {
		t.Error(err)
	}
}
