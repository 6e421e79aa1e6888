// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Cgroup2Mount gives the directory where cgroup2 is mounted: /sys/fs/cgroup, or
// on hybrid hosts /sys/fs/cgroup/unified.
func Cgroup2Mount(t testing.TB) string {
	t.Helper()
	dir, err := cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func cgroup2Mount() (string, error) {
	mounts, err := mountsOf()
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		// A mount of less than the whole hierarchy can't show a kubelet's tree.
		if m.fstype == "cgroup2" && m.root == "/" {
			return m.point, nil
		}
	}
	return "", errors.New("cgroup2 is not mounted")
}

// mount is a line of /proc/self/mountinfo.
type mount struct{ id, root, point, fstype string }

// mountsOf reads this process's mounts.
func mountsOf() ([]mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var mounts []mount
	for s := bufio.NewScanner(f); s.Scan(); {
		before, after, ok := strings.Cut(s.Text(), " - ")
		fields := strings.Fields(before)
		if !ok || len(fields) < 5 {
			return nil, fmt.Errorf("mountinfo line not understood: %q", s.Text())
		}
		fstype, _, _ := strings.Cut(after, " ")
		mounts = append(mounts, mount{id: fields[0], root: fields[3], point: unescapeOctal(fields[4]), fstype: fstype})
	}
	return mounts, nil
}

// unescapeOctal undoes the kernel's \040 for blanks in paths.
func unescapeOctal(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// cgroup is the cgroup of a pod, as the kubelet makes it: the pod's own is
// empty, containers are children of it.
type cgroup struct {
	root string // <mount>/shunt-test-…
	pod  string // <root>/kubepods/burstable/pod<UID>
}

// newCgroup makes a pod cgroup and removes its whole tree when the test ends.
func newCgroup(t testing.TB, uid string) *cgroup {
	t.Helper()
	mnt, err := cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	c := &cgroup{root: filepath.Join(mnt, cgroupPrefix()+randomHex(4))}
	c.pod = filepath.Join(c.root, "kubepods", "burstable", "pod"+uid)
	t.Cleanup(func() {
		if err := removeCgroup(c.root); err != nil {
			t.Error(err)
		}
	})
	if err := os.MkdirAll(c.pod, 0o755); err != nil {
		t.Fatalf("create pod cgroup: %v", err)
	}
	return c
}

// container opens the cgroup of a container, made if need be, for clone3.
func (c *cgroup) container(name string) (*os.File, error) {
	dir := filepath.Join(c.pod, name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("create container cgroup: %w", err)
	}
	return os.Open(dir)
}

// removeCgroup removes a cgroup with everything below it. The last process
// leaves its cgroup a moment after its parent has reaped it, so a cgroup that
// is busy gets time.
func removeCgroup(dir string) error {
	var last error
	ok := Poll(deadline, func() bool {
		last = rmdirTree(dir)
		return !errors.Is(last, unix.EBUSY)
	})
	if ok && last == nil {
		return nil
	}
	procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	return fmt.Errorf("remove cgroup: %w (its processes: %q)", last, strings.Fields(string(procs)))
}

func rmdirTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := rmdirTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("rmdir %s: %w", dir, err)
	}
	return nil
}
