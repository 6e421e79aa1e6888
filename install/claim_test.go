// SPDX-License-Identifier: Apache-2.0

package install

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// beside is another agent of the node, with all of its own.
func (n *node) beside(t *testing.T, name string) *node {
	t.Helper()
	m := &node{root: n.root}
	m.options()
	m.opts.BinariesDir = n.path("image-" + name)
	m.opts.Entry = []byte(`{"type":"shunt-cni","logLevel":"error"}`)
	m.opts.Agent = redirect.AgentRef{Namespace: "kube-system", DaemonSet: name}
	m.opts.Kubeconfig.TokenFile = n.path("sa-"+name, "token")
	m.write(t, files{"sa-" + name + "/token": "token-of-" + name, "image-" + name + "/shunt-cni": name + " plugin", "image-" + name + "/shunt": name + " shunt"})
	for _, b := range binaries {
		if err := os.Chmod(n.path("image-"+name, b), 0o755); err != nil { //nolint:gosec // as binaries are
			t.Fatal(err)
		}
	}
	return m
}

// begin has an installer run until end is called.
func begin(t *testing.T, in *Installer) (end func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- in.Run(ctx) }()
	ended := false
	end = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(end)
	return end
}

// has says whether all that is installed is an agent's.
func (n *node) has(name string) bool {
	if name == "shunt-node" {
		return n.read("bin/shunt-cni") == "#!this is shunt-cni" && n.read("bin/shunt") == "#!this is shunt" &&
			strings.Contains(n.read("run/shunt/kubeconfig"), "first-token") &&
			n.read("run/shunt/agent") == "kube-system/shunt-node\n" && n.read("net.d/a.conflist") == joined(line)
	}
	return n.read("bin/shunt-cni") == name+" plugin" && n.read("bin/shunt") == name+" shunt" &&
		strings.Contains(n.read("run/shunt/kubeconfig"), "token-of-"+name) &&
		n.read("run/shunt/agent") == "kube-system/"+name+"\n" && strings.Contains(n.read("net.d/a.conflist"), `"logLevel":"error"`)
}

// TestTwoAgents: the later one has the node, and neither writes what the other
// would write again.
func TestTwoAgents(t *testing.T) {
	testbed.NoLeaks(t)
	n := newNode(t)
	n.write(t, files{"net.d/a.conflist": plain(line)})
	m := n.beside(t, "later")
	older, later := n.installer(t), m.installer(t)
	begin(t, older)
	testbed.Eventually(t, "the older one's installation", installed(older))
	end := begin(t, later)
	testbed.Eventually(t, "the later one's installation", installed(later))
	testbed.Eventually(t, "the older one to stand back", func() bool { return strings.Contains(n.logged(), "another agent (kube-system/later, ") })

	// quiet waits for a second in which nothing is written and nothing said.
	quiet := func(what string) {
		t.Helper()
		var diff string
		if !testbed.Poll(5*time.Second, func() bool {
			inodes, said := n.inodes(t), n.logged()+m.logged()
			bad := testbed.Poll(time.Second, func() bool {
				for _, in := range []*Installer{older, later} {
					if s := in.State(); !s.Installed || s.Err != nil || s.File != n.path("net.d/a.conflist") {
						return true
					}
				}
				return false
			})
			diff = cmp.Diff(inodes, n.inodes(t)) + (n.logged() + m.logged())[len(said):]
			return !bad && diff == ""
		}) {
			t.Errorf("%s: no end of it; of the last second (-before +after): %s\n%+v\n%+v", what, diff, older.State(), later.State())
		}
		if !n.has("later") {
			t.Errorf("%s: the later one's is not what is there", what)
		}
	}
	quiet("two agents")

	t.Log("what is changed, and what is removed, is put back by the later one")
	for _, name := range []string{"bin/shunt-cni", "run/shunt/kubeconfig", "run/shunt/agent", "net.d/a.conflist"} {
		if name == "net.d/a.conflist" {
			n.replace(t, name, plain(line))
		} else {
			n.replace(t, name, "changed")
		}
		testbed.Eventually(t, name, func() bool { return n.has("later") })
	}

	t.Log("the older one has another netconf")
	same := n.installer(t)
	same.start = older.start
	if s := pass(t, same); !s.Installed || s.Err != nil || !n.has("later") {
		t.Errorf("%+v", s)
	}

	t.Log("somebody uninstalls by hand")
	told := len(n.told())
	if err := n.uninstall(t); err != nil {
		t.Fatal(err)
	}
	// Between the two the older one may have found the node to be nobody's.
	quiet("uninstalled by hand")
	if k := len(n.told()) - told; k > 4 {
		t.Errorf("the older one has told of %d things: %v", k, n.told())
	}

	t.Log("the later one ends")
	end()
	testbed.Eventually(t, "the older one's installation", func() bool { return n.has("shunt-node") && installed(older)() })
	if log := n.logged(); !strings.Contains(log, "this one has the node again") {
		t.Errorf("the log:\n%s", log)
	}
}

// TestStandBack: the older one says so when the later one lives and leaves things
// undone, and does not do them.
func TestStandBack(t *testing.T) {
	n := newNode(t)
	n.write(t, files{"net.d/a.conflist": plain(line)})
	older, later := n.installer(t), n.beside(t, "later").installer(t)
	for _, in := range []*Installer{older, later, older} {
		if s := pass(t, in); !s.Installed || s.Err != nil {
			t.Fatalf("%+v", s)
		}
	}
	for what, breakIt := range map[string]func() error{
		"bin/shunt: no such file":  func() error { return os.Remove(n.path("bin/shunt")) },
		"not an executable file":   func() error { return os.Chmod(n.path("bin/shunt-cni"), 0o600) },
		"run/shunt/kubeconfig":     func() error { return os.Truncate(n.path("run/shunt/kubeconfig"), 0) },
		"configuration has the en": func() error { return os.WriteFile(n.path("net.d/a.conflist"), []byte(plain(line)), 0o600) },
	} {
		if err := breakIt(); err != nil {
			t.Fatal(err)
		}
		before := n.inodes(t)
		s := pass(t, older)
		if s.Installed || s.Err == nil || !strings.Contains(s.Err.Error(), what) || !strings.Contains(s.Err.Error(), "another agent (kube-system/later, ") {
			t.Errorf("%+v, want an error with %q", s, what)
		}
		if diff := cmp.Diff(before, n.inodes(t)); diff != "" {
			t.Errorf("%s: files were written (-before +after):\n%s", what, diff)
		}
		for _, in := range []*Installer{later, older} {
			if s := pass(t, in); !s.Installed || s.Err != nil || !n.has("later") {
				t.Errorf("%s: mended: %+v", what, s)
			}
		}
	}
	// A claim that nobody can have made holds nobody up.
	n.replace(t, "run/shunt/claim", "")
	f, err := os.Open(n.path("run/shunt/claim"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	if s := pass(t, older); !s.Installed || s.Err != nil || !n.has("shunt-node") {
		t.Errorf("%+v", s)
	}
}

// TestTakeoverKills ends a later agent before and after each of its steps: the
// older one, which runs, brings everything back to its own.
func TestTakeoverKills(t *testing.T) {
	testbed.NeedSteps(t)
	n := newNode(t)
	n.write(t, files{"net.d/a.conflist": plain(line)})
	m := n.beside(t, "older")
	older := m.installer(t)
	if s := pass(t, older); !s.Installed {
		t.Fatalf("%+v", s)
	}
	want := n.everything(t)
	back := func(what string) {
		t.Helper()
		if s := pass(t, older); !s.Installed || s.Err != nil || !n.has("older") {
			t.Errorf("%s: %+v", what, s)
		}
		if diff := cmp.Diff(want, n.everything(t)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	whole := n.step(t, "install", testbed.Fault{})
	if whole.ExitCode != 0 || !n.has("shunt-node") {
		t.Fatalf("exit code %d: %s", whole.ExitCode, whole.Stderr)
	}
	back("after all of it")
	for i, step := range whole.Steps {
		for _, kind := range []testbed.FaultKind{testbed.KillBefore, testbed.KillAfter} {
			if r := n.step(t, "install", testbed.Fault{Step: i + 1, Kind: kind}); !r.Hit {
				t.Fatalf("step %d (%v) did not happen: %v", i+1, step, r.Steps)
			}
			back(step.String())
		}
	}
}
