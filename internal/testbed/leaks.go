// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// leakDeadline is how long what a test has closed may take to go.
var leakDeadline = deadline

// NoLeaks fails the test if at its end, after everything else that the test has
// registered by t.Cleanup, something is left that was not there when NoLeaks
// was called: mounts, cgroups, child processes or open descriptors of this
// process, interfaces in its network namespace. It must come before what it
// watches, and not in a test that runs in parallel with others.
func NoLeaks(t testing.TB) {
	t.Helper()
	// First, so that the directory is removed after the check.
	dir := filepath.Dir(t.TempDir())
	// The runtime opens its poller's descriptors with the first use.
	if r, w, err := os.Pipe(); err == nil {
		r.Close()
		w.Close()
	}
	before := inventory(dir)
	t.Cleanup(func() {
		var left []string
		Poll(leakDeadline, func() bool {
			now := inventory(dir)
			maps.DeleteFunc(now, func(thing string, _ bool) bool { return before[thing] })
			left = slices.Sorted(maps.Keys(now))
			return len(left) == 0
		})
		if len(left) > 0 {
			t.Errorf("the test has left behind:\n\t%s", strings.Join(left, "\n\t"))
		}
	})
}

// inventory names everything that a test could leave behind. Other processes'
// tests run at the same time: what lies in temporary directories other than
// dir is theirs.
func inventory(dir string) map[string]bool {
	things := map[string]bool{}
	mounts, err := mountsOf()
	if err != nil {
		things[fmt.Sprintf("mounts can't be read: %v", err)] = true
	}
	for _, m := range mounts {
		if !within(m.point, os.TempDir()) || within(m.point, dir) {
			things[fmt.Sprintf("mount %s of type %s (id %s)", m.point, m.fstype, m.id)] = true
		}
	}
	if root, err := cgroup2Mount(); err == nil {
		dirs, _ := filepath.Glob(filepath.Join(root, cgroupPrefix()+"*"))
		for _, d := range dirs {
			things["cgroup "+d] = true
		}
	}
	for _, c := range children() {
		things["process "+c] = true
	}
	interfaces, _ := net.Interfaces()
	for _, i := range interfaces {
		things["interface "+i.Name] = true
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, fd := range fds {
		// The descriptor of this very directory is gone by now: no target.
		if target, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil {
			things[fmt.Sprintf("descriptor %s of %s", fd.Name(), target)] = true
		}
	}
	return things
}

func within(path, dir string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

// children lists this process's child processes as "pid (name)".
func children() []string {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	self := strconv.Itoa(os.Getpid())
	var found []string
	for _, stat := range stats {
		b, err := os.ReadFile(stat)
		if err != nil {
			continue // ended meanwhile
		}
		// pid (name, which may hold blanks and brackets) state ppid …
		end := strings.LastIndexByte(string(b), ')')
		if end < 0 {
			continue
		}
		if f := strings.Fields(string(b[end+1:])); len(f) > 1 && f[1] == self {
			found = append(found, string(b[:end+1]))
		}
	}
	return found
}
