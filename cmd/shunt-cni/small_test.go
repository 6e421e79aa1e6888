// SPDX-License-Identifier: Apache-2.0

//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/cni"
	"shunt.dev/shunt/internal/handover"
	"shunt.dev/shunt/internal/testbed"
)

// serveFacts is the node agent: it answers for pods as long as the test runs.
func (n *node) serveFacts(t *testing.T, answer http.HandlerFunc) {
	t.Helper()
	if err := os.MkdirAll(n.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.RunDir, "agent.sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: answer, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { _ = s.Serve(l); close(done) }()
	t.Cleanup(func() { s.Close(); <-done })
}

func factsOf(p *testbed.Pod, mutators ...testbed.PodMutator) http.HandlerFunc {
	facts := p.Injected(mutators...)
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(facts) }
}

// alone gives the plugin without what it hands requests over to.
func alone(t *testing.T, plugin string) string {
	t.Helper()
	data, err := os.ReadFile(plugin)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "shunt-cni")
	if err := os.WriteFile(path, data, 0o755); err != nil { //nolint:gosec // it is executed
		t.Fatal(err)
	}
	return path
}

// filesBelow lists what is below directories.
func filesBelow(t *testing.T, dirs ...string) (list []string) {
	t.Helper()
	for _, dir := range dirs {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			list = append(list, path)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return list
}

// TestPrivilegedSmallAlone: what the small executable does by itself it does whole,
// where there is no other; and what it hands over fails there, by name and remedy,
// with nothing changed.
func TestPrivilegedSmallAlone(t *testing.T) {
	w := begin(t)
	n := newNode(t, w)
	both, small := n.Plugin, alone(t, n.Plugin)
	n.Kubeconfig = "/none/such"
	kinds := map[string][]testbed.PodMutator{
		"sk_lookup": nil,
		"iptables":  {testbed.Annotate("shunt.dev/datapath", "iptables")},
		"tc":        {testbed.Annotate("shunt.dev/inbound-hook", "tc")},
	}
	// refused has a request fail, for want of the larger executable alone.
	refused := func(t *testing.T, p *testbed.Pod, command string, code uint, why handover.Reason, o ...testbed.Override) {
		t.Helper()
		n.Plugin = small
		defer func() { n.Plugin = both }()
		before := filesBelow(t, n.RunDir, n.BPFDir)
		r := n.Run(t, command, p, o...)
		for _, want := range []string{filepath.Join(filepath.Dir(small), handover.Larger), "no such file", "(" + string(why) + ")", "let the node agent install both"} {
			if r.ExitCode != 1 || r.Code() != code || !strings.Contains(message(r), want) {
				t.Errorf("%s: %s; want code %d and %q", command, r, code, want)
			}
		}
		ignoring := func(list []string) (out []string) {
			for _, path := range list {
				if base := filepath.Base(path); base != "lock" && base != "log" {
					out = append(out, path)
				}
			}
			return out
		}
		if diff := cmp.Diff(ignoring(before), ignoring(filesBelow(t, n.RunDir, n.BPFDir))); diff != "" {
			t.Errorf("%s has changed (-before +after):\n%s", command, diff)
		}
		if p != nil && command == "ADD" {
			n.expectUnruled(t, p)
			expectMarks(t, p, false)
		}
	}

	p := n.pod(t)
	refused(t, p, "ADD", cni.CodeProgram, handover.Facts)
	n.serveFacts(t, factsOf(p))
	refused(t, p, "ADD", cni.CodeProgram, handover.Datapath)
	refused(t, p, "CHECK", cni.CodeProgram, handover.Check)
	refused(t, p, "GC", cni.CodeProgram, handover.GC, testbed.Set("cni.dev/valid-attachments", []any{}))
	refused(t, nil, "STATUS", types.ErrPluginNotAvailable, handover.Status)
	hung := make(chan struct{})
	n.serveFacts(t, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-hung:
		case <-r.Context().Done():
		}
	})
	refused(t, p, "ADD", cni.CodeProgram, handover.HungAgent)
	close(hung)
	n.serveFacts(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	refused(t, p, "ADD", cni.CodeProgram, handover.Facts)

	for kind, mutators := range kinds {
		n.serveFacts(t, factsOf(p, mutators...))
		n.MustAdd(t, p) // both: what has to be loaded is
		if kind == "iptables" {
			refused(t, p, "DEL", cni.CodeProgram, handover.Iptables)
			refused(t, p, "CHECK", cni.CodeProgram, handover.Check)
			n.serveFacts(t, factsOf(p))
			refusedInPlace(t, n, p, small)
		}
		n.MustDel(t, p)
	}

	for kind, mutators := range kinds {
		n.serveFacts(t, factsOf(p, mutators...))
		if kind == "iptables" {
			refused(t, p, "ADD", cni.CodeProgram, handover.Iptables)
			continue
		}
		n.Plugin = small
		for range 2 { // it is the same, done again
			if r := n.MustAdd(t, p); string(r.Stdout) != prevResult(t, p, "1.1.0") || len(r.Stderr) != 0 {
				t.Errorf("%s: ADD: %s", kind, r)
			}
			n.MustCheck(t, p)
		}
		for range 2 {
			n.MustDel(t, p)
		}
		n.Plugin = both
		n.expectOnly(t, func(left string) bool { return strings.HasSuffix(left, "/agent.sock") }, p)
	}

	// eBPF can't: iptables would have to take over.
	n.serveFacts(t, factsOf(p))
	p.RemoveCgroup(t)
	refused(t, p, "ADD", cni.CodeProgram, handover.EBPF)

	n.Plugin = small
	if r := n.Add(t, p, testbed.Arg("K8S_POD_NAMESPACE", "kube-system")); !r.OK() {
		t.Errorf("a pod outside of the mesh: %s", r)
	}
	if r := n.Run(t, "VERSION", nil); !r.OK() {
		t.Errorf("VERSION: %s", r)
	}
	n.Plugin = both
}

// refusedInPlace: a pod that iptables redirects, and that is to be eBPF's now, stays
// what it is where the larger executable is missing.
func refusedInPlace(t *testing.T, n *node, p *testbed.Pod, small string) {
	t.Helper()
	both := n.Plugin
	n.Plugin = small
	r := n.Add(t, p)
	n.Plugin = both
	if r.Code() != cni.CodeProgram || !strings.Contains(message(r), "("+string(handover.Iptables)+")") || !ruled(t, p) {
		t.Errorf("ADD to a pod of iptables': %s; it has its rules: %v", r, ruled(t, p))
	}
	expectMarks(t, p, false)
}

// TestPrivilegedHandOver: a request that is handed over is the same request: the one
// process, its output, its environment, and all of a configuration of any size.
func TestPrivilegedHandOver(t *testing.T) {
	n := newNode(t, begin(t))
	p := n.pod(t)
	n.Config = map[string]any{"args": map[string]any{"padding": strings.Repeat("x", 1<<20)}}
	if r := n.MustAdd(t, p); string(r.Stdout) != prevResult(t, p, "1.1.0") || len(r.Stderr) != 0 {
		t.Errorf("ADD: %s", r)
	}
	n.MustCheck(t, p)
	n.MustDel(t, p)

	// Whoever could write the larger executable would be root.
	data, err := os.ReadFile(filepath.Join(filepath.Dir(n.Plugin), handover.Larger))
	if err != nil {
		t.Fatal(err)
	}
	n.Plugin = alone(t, n.Plugin)
	larger := filepath.Join(filepath.Dir(n.Plugin), handover.Larger)
	for want, shape := range map[string]func() error{
		"is not a regular file":    func() error { return os.Mkdir(larger, 0o755) }, //nolint:gosec // as a directory is
		"is not executable":        func() error { return os.WriteFile(larger, data, 0o600) },
		"can be written by others": func() error { return errors.Join(os.WriteFile(larger, data, 0o600), os.Chmod(larger, 0o777)) }, //nolint:gosec // that is it
		"is uid 1's, not root's": func() error {
			return errors.Join(os.WriteFile(larger, data, 0o600), os.Chmod(larger, 0o755), os.Chown(larger, 1, 0))
		}, //nolint:gosec // as binaries are
		"exec format error: see that": func() error {
			return errors.Join(os.WriteFile(larger, []byte("no program"), 0o600), os.Chmod(larger, 0o755))
		}, //nolint:gosec // as binaries are
	} {
		if err := errors.Join(os.RemoveAll(larger), shape()); err != nil {
			t.Fatal(err)
		}
		r := n.Add(t, p)
		if r.ExitCode != 1 || r.Code() != cni.CodeProgram || !strings.Contains(message(r), want) || !strings.Contains(message(r), larger) {
			t.Errorf("%s; want %q", r, want)
		}
		if !json.Valid(r.Stdout) {
			t.Errorf("printed %s", r.Stdout)
		}
	}
	if err := errors.Join(os.RemoveAll(larger), os.WriteFile(larger, data, 0o600), os.Chmod(larger, 0o755)); err != nil { //nolint:gosec // as binaries are
		t.Fatal(err)
	}
	n.MustAdd(t, p)
	n.MustDel(t, p)
}
