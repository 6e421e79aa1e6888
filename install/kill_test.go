// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// steppedEnv makes the test binary install or uninstall, once, on the node in the
// directory that it names after the verb.
const steppedEnv = "SHUNT_INSTALL_STEPPED"

func init() {
	if verb, root, ok := strings.Cut(os.Getenv(steppedEnv), " "); ok {
		if err := stepped(verb, root); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

func stepped(verb, root string) error {
	n := &node{root: root}
	n.options()
	if verb == "uninstall" {
		return n.opts.uninstall(context.Background(), testTimes)
	}
	in, err := New(n.opts)
	if err != nil {
		return err
	}
	in.times, in.fight.times = testTimes, testTimes
	in.opts.Entry = n.opts.Entry
	out := in.pass(context.Background())
	if out.err == nil && !out.installed {
		return errors.New("not installed")
	}
	return out.err
}

func (n *node) step(t *testing.T, verb string, fault testbed.Fault) testbed.StepsResult {
	t.Helper()
	r, err := testbed.RunSteps(testbed.StepsSpec{
		Argv: []string{"/proc/self/exe"}, Fault: fault,
		Env: []string{"GORACE=atexit_sleep_ms=0", "GOCOVERDIR=" + t.TempDir(), steppedEnv + "=" + verb + " " + n.root},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestKills ends the installer before and after each of its steps, and has each
// of them fail: what others wrote is there at every moment, a runtime always has
// a network, and the next run comes to the same end.
func TestKills(t *testing.T) {
	testbed.NeedSteps(t)
	for _, c := range []struct {
		name   string
		before files
	}{
		{"a list", files{"10-calico.conflist": plain(calico), "20-b.conflist": plain(line)}},
		{"a single one", files{"10-old.conf": single}},
		{"a new one before it", files{"05-new.conflist": plain(cilium), "10-calico.conflist": joined(calico)}},
		{"a link", files{"10-a.conflist": "-> ../conf/a", "../conf/a": plain(line)}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			fresh := func() *node {
				n := newNode(t)
				if err := c.before.write(n.opts.ConfDir); err != nil {
					t.Fatal(err)
				}
				return n
			}
			for _, verb := range []string{"install", "uninstall"} {
				start := func() *node {
					n := fresh()
					if verb == "uninstall" {
						if r := n.step(t, "install", testbed.Fault{}); r.ExitCode != 0 {
							t.Fatalf("%s", r.Stderr)
						}
					}
					return n
				}
				whole := start()
				r := whole.step(t, verb, testbed.Fault{})
				if r.ExitCode != 0 || len(r.Steps) < 8 {
					t.Fatalf("%s: exit code %d, steps %v: %s", verb, r.ExitCode, r.Steps, r.Stderr)
				}
				want := whole.everything(t)
				for i, step := range r.Steps {
					errno := unix.ENOSPC
					if step.Call != "write" {
						errno = unix.EROFS
					}
					for _, fault := range []testbed.Fault{
						{Step: i + 1, Kind: testbed.KillBefore},
						{Step: i + 1, Kind: testbed.KillAfter},
						{Step: i + 1, Kind: testbed.FailCall, Errno: errno},
					} {
						n := start()
						first := n.step(t, verb, fault)
						if !first.Hit {
							t.Fatalf("%s, %v (%v): did not happen: %v", verb, fault, step, first.Steps)
						}
						if fault.Kind == testbed.FailCall && first.ExitCode == 1 {
							if remedy := map[unix.Errno]string{unix.EROFS: "mount it writable", unix.ENOSPC: "make room"}[errno]; step.Call != "flock" && !strings.Contains(string(first.Stderr), remedy) {
								t.Errorf("%s, %v (%v): %s", verb, fault, step, first.Stderr)
							}
							if left := n.temps(t); len(left) > 0 && step.Call != "unlinkat" {
								t.Errorf("%s, %v (%v): left %v behind", verb, fault, step, left)
							}
						}
						n.checkWhole(t, c.before, fmt.Sprintf("%s, %v (%v)", verb, fault, step))
						if second := n.step(t, verb, testbed.Fault{}); second.ExitCode != 0 {
							t.Errorf("%s, %v (%v): the next run: %s", verb, fault, step, second.Stderr)
						}
						if diff := cmp.Diff(want, n.everything(t)); diff != "" {
							t.Errorf("%s, %v (%v): after the next run (-want +got):\n%s", verb, fault, step, diff)
						}
						if err := os.RemoveAll(n.root); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
		})
	}
}

// TestOrder: nothing is ever there that needs what is not.
func TestOrder(t *testing.T) {
	testbed.NeedSteps(t)
	const newer = `,{"type":"shunt-cni","ofTheNextRelease":true}`
	for _, c := range []struct {
		name, conf, binary string
		want               []string
	}{
		{"new", plain(line), "", []string{"run/shunt/claim", "run/shunt/agent", "bin/shunt", "bin/shunt-cni", "run/shunt/kubeconfig", "net.d/a.conflist"}},
		{"upgrade", at(line, `,{"type":"shunt-cni"}`), "old", []string{"run/shunt/claim", "run/shunt/agent", "bin/shunt", "bin/shunt-cni", "run/shunt/kubeconfig", "net.d/a.conflist"}},
		// The binary must take the configuration that is there.
		{"downgrade", at(line, newer), "newer", []string{"run/shunt/claim", "run/shunt/agent", "net.d/a.conflist", "bin/shunt", "bin/shunt-cni", "run/shunt/kubeconfig"}},
		{"an entry of a newer release, no binary", at(line, newer), "", []string{"run/shunt/claim", "run/shunt/agent", "bin/shunt", "bin/shunt-cni", "run/shunt/kubeconfig", "net.d/a.conflist"}},
	} {
		n := newNode(t)
		if err := (files{"net.d/a.conflist": c.conf}).write(n.root); err != nil {
			t.Fatal(err)
		}
		if c.binary != "" {
			if err := (files{"bin/shunt-cni": c.binary}).write(n.root); err != nil {
				t.Fatal(err)
			}
		}
		r := n.step(t, "install", testbed.Fault{})
		if r.ExitCode != 0 {
			t.Fatalf("%s: %s", c.name, r.Stderr)
		}
		var got []string
		for _, s := range r.Steps {
			if _, to, ok := strings.Cut(s.Arg, ", "); ok && strings.HasPrefix(s.Call, "renameat") {
				name, err := filepath.Rel(n.root, to)
				if err != nil {
					t.Fatal(err)
				}
				got = append(got, name)
			}
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
	}

	n := newNode(t)
	if err := (files{"net.d/a.conflist": plain(line)}).write(n.root); err != nil {
		t.Fatal(err)
	}
	n.step(t, "install", testbed.Fault{})
	var got []string
	for _, s := range n.step(t, "uninstall", testbed.Fault{}).Steps {
		if name, ok := strings.CutPrefix(s.Arg, n.root+"/"); ok && s.Call == "unlinkat" {
			if strings.HasPrefix(filepath.Base(name), tempPrefix) {
				name = "the old conflist"
			}
			got = append(got, name)
		}
	}
	// agent.sock is not there; to try is a step. The binaries stay: it can't be told who
	// needs them.
	want := []string{"the old conflist", "run/shunt/kubeconfig", "run/shunt/token", "run/shunt/agent", "run/shunt/agent.sock", "run/shunt/claim"}
	if diff := cmp.Diff(want, slices.Compact(got)); diff != "" {
		t.Errorf("uninstall (-want +got):\n%s", diff)
	}
}

// temps are the temporary files that are there.
func (n *node) temps(t *testing.T) (out []string) {
	t.Helper()
	for name := range n.everything(t) {
		if strings.HasPrefix(filepath.Base(name), tempPrefix) {
			out = append(out, name)
		}
	}
	return out
}

// everything is all that is on the node, but for what differs from one to the
// other.
func (n *node) everything(t *testing.T) files {
	t.Helper()
	out := files{}
	defer func() {
		if _, ok := out["run/shunt/"+claimFile]; ok {
			out["run/shunt/"+claimFile] = ""
		}
	}()
	for _, dir := range []string{"bin", "net.d", "run", "conf"} {
		fs, err := readFiles(n.path(dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for name, content := range fs {
			out[dir+"/"+name] = content
		}
	}
	return out
}

// checkWhole fails unless every configuration of others is whole, with the entry
// or without it, a runtime has a network, and whatever it may start is there.
func (n *node) checkWhole(t *testing.T, before files, when string) {
	t.Helper()
	is := n.conf(t)
	for name, content := range before {
		bare := content
		for _, conf := range []string{calico, cilium, line} {
			if content == joined(conf) {
				bare = plain(conf)
			}
		}
		got := is[name]
		if strings.HasSuffix(name, ".conflist") || strings.HasPrefix(name, "../") {
			if l, err := parseList([]byte(got)); err == nil {
				got = string(l.without())
			}
		}
		if got != bare {
			t.Errorf("%s: %s is %q", when, name, is[name])
		}
	}
	list, err := inUse(n.opts.ConfDir)
	if err != nil {
		t.Errorf("%s: no network: %v", when, err)
		return
	}
	if list.Plugins[len(list.Plugins)-1].Network.Type != pluginType {
		return
	}
	for _, name := range binaries {
		if data, err := os.ReadFile(n.path("bin", name)); err != nil || string(data) != "#!this is "+name {
			t.Errorf("%s: the entry is there, and %s is %q, %v", when, name, data, err)
		}
	}
}
