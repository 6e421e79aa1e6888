// SPDX-License-Identifier: Apache-2.0

package install

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

func mount(t *testing.T, source, target, fstype string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", target, err)
		}
	})
}

// TestPrivilegedDisk: a directory that is full, and one that is read-only. Nothing
// is half-written, and it goes on when it can.
func TestPrivilegedDisk(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, dir := range []string{"net.d", "bin", "run"} {
		t.Run(dir, func(t *testing.T) {
			n := newNode(t)
			if err := os.MkdirAll(n.path(dir), 0o755); err != nil {
				t.Fatal(err)
			}
			mount(t, "tmpfs", n.path(dir), "tmpfs", 0, "size=64k")
			n.write(t, files{"net.d/10-a.conflist": plain(line), "net.d/20-old.conf": single})
			fill := func() {
				t.Helper()
				f, err := os.Create(n.path(dir, "ballast"))
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				for err = nil; err == nil; {
					_, err = f.Write(make([]byte, 4096))
				}
				if !errors.Is(err, unix.ENOSPC) {
					t.Fatal(err)
				}
			}
			readOnly := func(flags uintptr) {
				t.Helper()
				if err := unix.Mount("", n.path(dir), "", unix.MS_REMOUNT|flags, ""); err != nil {
					t.Fatal(err)
				}
			}
			in := n.installer(t)
			fails := func(remedy string) {
				t.Helper()
				before, err := readFiles(n.root)
				if err != nil {
					t.Fatal(err)
				}
				s := pass(t, in)
				if s.Installed || s.Err == nil || !strings.Contains(s.Err.Error(), remedy) || !strings.Contains(s.Err.Error(), n.root) {
					t.Errorf("%+v, want an error with %q", s, remedy)
				}
				after, err := readFiles(n.path(dir))
				if err != nil {
					t.Fatal(err)
				}
				for name := range after {
					if was, ok := before[dir+"/"+name]; name != "shunt/install.lock" && (!ok || was != after[name]) {
						t.Errorf("%s was written: %q", name, after[name])
					}
				}
				if n.read("net.d/10-a.conflist") != plain(line) {
					t.Error("the entry is there without the rest")
				}
			}
			fill()
			fails("make room on the node's disk")
			readOnly(unix.MS_RDONLY)
			fails("mount it writable")
			readOnly(0)
			fails("make room on the node's disk")
			if err := os.Remove(n.path(dir, "ballast")); err != nil {
				t.Fatal(err)
			}
			if s := pass(t, in); !s.Installed || s.Err != nil {
				t.Errorf("with room: %+v", s)
			}
			// Full again: what is there is enough, and is taken out again.
			fill()
			if s := pass(t, in); !s.Installed || s.Err != nil {
				t.Errorf("full, and installed: %+v", s)
			}
			if dir == "net.d" {
				if err := n.uninstall(t); err == nil || n.read("bin/shunt") != "#!this is shunt" || n.read("net.d/10-a.conflist") != joined(line) {
					t.Errorf("uninstalled from a full disk: %v, %s", err, n.read("bin/shunt"))
				}
				if err := os.Remove(n.path(dir, "ballast")); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.uninstall(t); err != nil || n.read("net.d/10-a.conflist") != plain(line) {
				t.Errorf("uninstalled: %v", err)
			}
		})
	}
}

// TestPrivilegedOwner: mode and owner of a file stay, and a list made of a single
// configuration has its.
func TestPrivilegedOwner(t *testing.T) {
	testbed.Privileged(t)
	for name, has := range map[string]string{"10-a.conflist": "10-a.conflist", "10-old.conf": "10-old-shunt.conflist"} {
		n := newNode(t)
		n.write(t, files{"net.d/" + name: map[string]string{"10-a.conflist": plain(line), "10-old.conf": single}[name]})
		path := n.path("net.d", name)
		if err := errors.Join(os.Chown(path, 12345, 54321), os.Chmod(path, 0o604)); err != nil { //nolint:gosec // to be kept
			t.Fatal(err)
		}
		if s := pass(t, n.installer(t)); !s.Installed {
			t.Fatalf("%+v", s)
		}
		for range 2 {
			st, err := os.Stat(n.path("net.d", has))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(attributes{0o604, 12345, 54321}, attributesOf(st), cmp.AllowUnexported(attributes{})); diff != "" {
				t.Errorf("%s (-want +got):\n%s", has, diff)
			}
			if err := n.uninstall(t); err != nil {
				t.Fatal(err)
			}
			has = name
		}
	}
}

// TestPrivilegedGone: a directory that was removed under its mount can't come
// back; Run says so and ends, for the container to be started anew.
func TestPrivilegedGone(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	n := newNode(t)
	n.write(t, files{"host/etc/net.d/a.conflist": plain(line)})
	mount(t, n.path("host/etc/net.d"), n.path("net.d"), "", unix.MS_BIND, "")
	in := n.installer(t)
	done := make(chan error, 1)
	go func() { done <- in.Run(t.Context()) }()
	testbed.Eventually(t, "the installation", installed(in))
	if err := os.RemoveAll(n.path("host/etc")); err != nil {
		t.Fatal(err)
	}
	// In this mount namespace nobody may remove a mount point; by the other name
	// it goes.
	var st syscall.Stat_t
	if err := syscall.Stat(n.opts.ConfDir, &st); err != nil || st.Nlink != 0 {
		t.Fatalf("%s is still linked: %d, %v", n.opts.ConfDir, st.Nlink, err)
	}
	_ = os.Remove(n.path("bin/shunt")) // an event
	if err := <-done; !errors.Is(err, errGone) || !strings.Contains(err.Error(), filepath.Base(n.opts.ConfDir)) {
		t.Errorf("Run: %v", err)
	}
}
