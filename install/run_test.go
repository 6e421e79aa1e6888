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
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/kubeapi"
	"shunt.dev/shunt/internal/testbed"
)

// run has the installer run until the test ends.
func (n *node) run(t *testing.T, shape func(*times)) *Installer {
	t.Helper()
	in := n.installer(t)
	in.times.settle = 20 * time.Millisecond
	if shape != nil {
		shape(&in.times)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- in.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if t.Failed() {
			t.Logf("results %v, log:\n%s", n.told(), n.logged())
		}
	})
	return in
}

func (n *node) write(t *testing.T, f files) {
	t.Helper()
	if err := f.write(n.root); err != nil {
		t.Fatal(err)
	}
}

// replace writes a file as careful agents do.
func (n *node) replace(t *testing.T, name, content string) {
	t.Helper()
	temp := n.path(filepath.Dir(name), ".other")
	if err := os.WriteFile(temp, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, n.path(name)); err != nil {
		t.Fatal(err)
	}
}

func (n *node) read(name string) string {
	data, err := os.ReadFile(n.path(name))
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func installed(in *Installer) func() bool {
	return func() bool { s := in.State(); return s.Installed && s.Err == nil }
}

// TestRun goes through what may happen to a node. The timer is no help: it is too
// slow for the test.
func TestRun(t *testing.T) {
	testbed.NoLeaks(t)
	n := newNode(t)
	in := n.run(t, func(ts *times) { ts.quick = 0 })
	eventually := func(what string, cond func() bool) {
		t.Helper()
		testbed.Eventually(t, what, cond)
	}
	is := func(name, content string) func() bool { return func() bool { return n.read(name) == content } }

	eventually("the state to say what is waited for", func() bool { return errors.Is(in.State().Err, ErrWaiting) })
	if err := checkUse(n.opts.ConfDir); err == nil {
		t.Error("there is something to use")
	}
	n.write(t, files{"net.d/10-calico.conflist": plain(calico)})
	eventually("the primary configuration that comes late", installed(in))
	if s := in.State(); s.File != n.path("net.d/10-calico.conflist") {
		t.Errorf("%+v", s)
	}

	t.Log("another agent rewrites it")
	n.replace(t, "net.d/10-calico.conflist", plain(cilium))
	eventually("the entry in the new content", is("net.d/10-calico.conflist", joined(cilium)))
	eventually("the state after it", installed(in))

	t.Log("somebody truncates and writes it")
	if err := os.WriteFile(n.path("net.d/10-calico.conflist"), []byte(plain(calico)), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually("the entry in the new content", is("net.d/10-calico.conflist", joined(calico)))

	t.Log("one comes before it")
	n.write(t, files{"net.d/05-new.conflist": plain(line)})
	eventually("the entry in the new file", is("net.d/05-new.conflist", joined(line)))
	eventually("the entry out of the old file", is("net.d/10-calico.conflist", plain(calico)))

	t.Log("it goes again")
	if err := os.Remove(n.path("net.d/05-new.conflist")); err != nil {
		t.Fatal(err)
	}
	eventually("the entry in the old file", is("net.d/10-calico.conflist", joined(calico)))

	t.Log("binaries, kubeconfig and agent file go, or change")
	for _, name := range []string{"bin/shunt-cni", "bin/shunt", "run/shunt/kubeconfig", "run/shunt/agent"} {
		want := n.read(name)
		if err := os.Remove(n.path(name)); err != nil {
			t.Fatal(err)
		}
		eventually(name+" that was removed", is(name, want))
		n.replace(t, name, "changed")
		eventually(name+" that was changed", is(name, want))
	}

	t.Log("the image has another build")
	if err := os.WriteFile(n.path("image/shunt-cni"), []byte("another build"), 0o755); err != nil { //nolint:gosec // as binaries are
		t.Fatal(err)
	}
	n.replace(t, "bin/shunt", "to wake it up")
	eventually("the other build", is("bin/shunt-cni", "another build"))

	t.Log("directories go and come")
	for _, dir := range []string{"net.d", "bin"} {
		before, err := readFiles(n.path(dir))
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(n.path(dir), n.path("was "+dir)); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(n.path("was " + dir)); err != nil {
			t.Fatal(err)
		}
		eventually("the state without "+dir, func() bool { return in.State().Err != nil })
		if dir == "net.d" {
			n.write(t, files{"net.d/10-calico.conflist": plain(calico)})
		} else if err := os.Mkdir(n.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
		eventually("all that was in "+dir, func() bool {
			after, err := readFiles(n.path(dir))
			return err == nil && cmp.Equal(before, after)
		})
		eventually("the state with "+dir, installed(in))
	}
	t.Log("and are watched again")
	n.replace(t, "net.d/10-calico.conflist", plain(line))
	eventually("the entry", is("net.d/10-calico.conflist", joined(line)))
	if err := os.Remove(n.path("bin/shunt")); err != nil {
		t.Fatal(err)
	}
	eventually("the binary", is("bin/shunt", "#!this is shunt"))

	got := n.told()
	slices.Sort(got)
	if diff := cmp.Diff([]string{ResultBinaries, ResultHealed, ResultInstalled, ResultUpdated, ResultWaiting}, slices.Compact(got)); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}

	t.Log("the run directory goes")
	if err := os.Rename(n.path("run/shunt"), n.path("run/was")); err != nil {
		t.Fatal(err)
	}
	eventually("the run directory", is("run/shunt/agent", "kube-system/shunt-node\n"))
	eventually("the state at the end", installed(in))
}

// TestRunLinks: directories and files behind links are watched where they are,
// and where the links are.
func TestRunLinks(t *testing.T) {
	n := newNode(t)
	for _, dir := range []string{"one", "two", "files"} {
		if err := os.Mkdir(n.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.write(t, files{"one/10-a.conflist": "-> ../files/a", "files/a": plain(line), "two/10-b.conflist": plain(calico), "conf.d": "-> one"})
	n.opts.ConfDir = n.path("conf.d")
	in := n.run(t, nil)
	testbed.Eventually(t, "the installation", installed(in))
	if got := n.read("files/a"); got != joined(line) {
		t.Errorf("behind the link there is %q", got)
	}
	n.replace(t, "files/a", plain(cilium))
	testbed.Eventually(t, "the entry behind the link", func() bool { return n.read("files/a") == joined(cilium) })
	if to, err := os.Readlink(n.path("one/10-a.conflist")); err != nil || to != "../files/a" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if err := os.Symlink("two", n.path("new")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(n.path("new"), n.path("conf.d")); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, "the entry in the other directory", func() bool { return n.read("two/10-b.conflist") == joined(calico) })
	n.replace(t, "two/10-b.conflist", plain(line))
	testbed.Eventually(t, "the entry in it again", func() bool { return n.read("two/10-b.conflist") == joined(line) })
}

// TestToken: at every moment of a rotation there is a kubeconfig that can be used.
func TestToken(t *testing.T) {
	n := newNode(t)
	n.write(t, files{"net.d/a.conflist": plain(line)})
	in := n.run(t, nil)
	testbed.Eventually(t, "the installation", installed(in))
	path := n.opts.Kubeconfig.Path
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st, err)
	}
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if err := kubeapi.CheckConfig(path); err != nil {
				t.Errorf("during a rotation: %v", err)
				return
			}
		}
	})
	for i := range 20 {
		token := fmt.Sprintf("token-%d", i)
		if err := n.serviceAccount(token); err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, "the new token", func() bool { return strings.Contains(n.read("run/shunt/kubeconfig"), token) })
	}
	close(stop)
	wg.Wait()

	// A token that is of no use leaves the old one in force.
	before := n.read("run/shunt/kubeconfig")
	for _, bad := range []string{"", "with a blank"} {
		if err := n.serviceAccount(bad); err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, "the state with a bad token", func() bool { s := in.State(); return s.Err != nil && s.Installed })
		if after := n.read("run/shunt/kubeconfig"); after != before {
			t.Errorf("%q made it %s", bad, after)
		}
		if err := n.serviceAccount("good"); err != nil {
			t.Fatal(err)
		}
		testbed.Eventually(t, "the state with a good token", installed(in))
		before = n.read("run/shunt/kubeconfig")
	}
	if !slices.Contains(n.told(), ResultKubeconfig) {
		t.Error(n.told())
	}
}

// rewrite replaces a file as a whole: one that is half written is for TestRun.
func rewrite(n *node, name, text string) error {
	return errors.Join(os.WriteFile(n.path("theirs"), []byte(text), 0o600), os.Rename(n.path("theirs"), n.path(name)))
}

// TestFight has another agent undo at once whatever is done.
func TestFight(t *testing.T) {
	for _, c := range []struct {
		name, file string
		theirs     string
		more       files
		undo       func(n *node) error
		says       string
	}{
		{
			name: "Cilium writes its file anew", file: "05-cilium.conflist", theirs: plain(cilium), says: "cni.exclusive=false",
			undo: func(n *node) error { return rewrite(n, "net.d/05-cilium.conflist", plain(cilium)) },
		},
		{
			name: "Cilium renames what is not its own", file: "10-old.conf", theirs: single, says: "it has renamed 10-old-shunt.conflist.cilium_bak",
			undo: func(n *node) error {
				return os.Rename(n.path("net.d/10-old-shunt.conflist"), n.path("net.d/10-old-shunt.conflist.cilium_bak"))
			},
		},
		{
			name: "somebody", file: "10-a.conflist", theirs: plain(line), says: "10-a.conflist: look which agent of this node writes it (bridge)",
			undo: func(n *node) error { return rewrite(n, "net.d/10-a.conflist", plain(line)) },
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNode(t)
			n.write(t, files{"net.d/" + c.file: c.theirs})
			in := n.run(t, func(ts *times) {
				ts.retry, ts.retryMax, ts.calm = 40*time.Millisecond, time.Second, 300*time.Millisecond
				ts.quick = 500 * time.Millisecond
			})
			testbed.Eventually(t, "the installation", installed(in))
			var undone atomic.Int32
			end := time.Now().Add(3 * time.Second)
			for time.Now().Before(end) {
				if checkUse(n.opts.ConfDir) == nil {
					if err := c.undo(n); err != nil {
						t.Fatal(err)
					}
					undone.Add(1)
				}
				if s := in.State(); undone.Load() > 4 && s.Err != nil && !errors.Is(s.Err, ErrFight) {
					t.Fatalf("%+v", s)
				}
			}
			// At once, at once, and then after 40, 80, 160 … ms, at most 1 s.
			if k := undone.Load(); k < 5 || k > 10 {
				t.Errorf("put back %d times within 3 s", k)
			}
			s := in.State()
			if !errors.Is(s.Err, ErrFight) || !strings.Contains(s.Err.Error(), c.says) || !strings.Contains(s.Err.Error(), c.file[:3]) {
				t.Errorf("%+v", s)
			}
			if k := strings.Count(n.logged(), "changed back again and again: pods"); k != 1 {
				t.Errorf("logged %d times", k)
			}
			if !slices.Contains(n.told(), ResultFight) {
				t.Error(n.told())
			}
			// They stop.
			testbed.Eventually(t, "the entry in the end", func() bool { return checkUse(n.opts.ConfDir) == nil })
			n.write(t, files{"net.d/zz": ""})
			testbed.Eventually(t, "calm", func() bool {
				_ = os.Chtimes(n.path("net.d", c.file), time.Now(), time.Now()) // an event
				return installed(in)()
			})
		})
	}
}

// TestNoBusyLoop: failures and other agents' noise cost little.
func TestNoBusyLoop(t *testing.T) {
	n := newNode(t)
	n.write(t, files{"net.d/a.conflist": `{"name":"n","plugins":[{"type":"a"}]}`}) // can't be joined
	in := n.installer(t)
	in.times = realTimes
	in.times.settle = 0
	var passes atomic.Int32
	in.opts.OnResult = func(string) { passes.Add(1) }
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	go func() {
		for i := 0; ctx.Err() == nil; i++ {
			_ = os.WriteFile(n.path("net.d/noise.conflist"), []byte{byte('0' + i%10)}, 0o600)
		}
	}()
	if err := in.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if k := passes.Load(); k < 1 || k > 3 {
		t.Errorf("%d attempts within 1.5 s", k)
	}
}

// TestSettle: a file that somebody is about to write is not taken for gone.
func TestSettle(t *testing.T) {
	n := newNode(t)
	n.write(t, files{"net.d/10-a.conflist": plain(line), "net.d/20-b.conflist": plain(calico)})
	in := n.installer(t)
	if s := pass(t, in); !s.Installed {
		t.Fatalf("%+v", s)
	}
	in.times.settle = time.Hour
	for _, half := range []string{"", `{"cniVersion":"1.0.0","name":"n","plug`} {
		n.replace(t, "net.d/10-a.conflist", half)
		if s := pass(t, in); s.Installed || n.read("net.d/20-b.conflist") != plain(calico) || n.read("net.d/10-a.conflist") != half {
			t.Errorf("while it is written: %+v, %q", s, n.read("net.d/20-b.conflist"))
		}
	}
	in.since = in.since.Add(-2 * in.times.settle) // which does not count for the next time
	n.replace(t, "net.d/10-a.conflist", plain(line))
	if s := pass(t, in); !s.Installed || n.read("net.d/10-a.conflist") != joined(line) {
		t.Errorf("written: %+v", s)
	}
	n.replace(t, "net.d/10-a.conflist", `{"cniVersion":"1.0.0","name":"n","plug`)
	if s := pass(t, in); n.read("net.d/20-b.conflist") != plain(calico) {
		t.Errorf("written once more: %+v", s)
	}
	in.times.settle = 0
	if s := pass(t, in); !s.Installed || n.read("net.d/20-b.conflist") != joined(calico) {
		t.Errorf("left like this: %+v", s)
	}
}

func TestWatchErrors(t *testing.T) {
	n := newNode(t)
	in := n.installer(t)
	overflow := &watch{watcher: &fsnotify.Watcher{Errors: make(chan error, 1)}}
	overflow.watcher.Errors <- fsnotify.ErrEventOverflow
	start := time.Now()
	if !in.wait(t.Context(), overflow, time.Hour, time.Millisecond) || time.Since(start) > time.Minute {
		t.Error("an overflow is not looked after")
	}
	// Without a watch the timer is quicker.
	if pause, _ := in.pause(outcome{installed: true}, false); pause > 5*in.times.retry {
		t.Errorf("unwatched for %v", pause)
	}
	if pause, _ := in.pause(outcome{installed: true}, true); pause < in.times.verify {
		t.Errorf("watched, and looked at after %v", pause)
	}
	var last time.Duration
	for range 12 {
		pause, gap := in.pause(outcome{err: errors.New("x")}, true)
		if pause < last || pause > in.times.retryMax || gap < in.times.retry {
			t.Errorf("after %v it pauses for %v, %v at the least", last, pause, gap)
		}
		last = pause
	}
	if last != in.times.retryMax {
		t.Errorf("the last pause is %v", last)
	}
}
