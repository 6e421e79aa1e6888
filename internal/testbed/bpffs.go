// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// BPFFS mounts a bpffs of its own in a temporary directory and gives the
// directory. It is unmounted when the test ends; with it go the pins in it, and
// what only they kept alive.
func BPFFS(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("shunt-testbed", dir, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		t.Fatalf("mount bpffs: %v", err)
	}
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// unmount takes down a mount of the test's own, and complains if something
// still holds it.
func unmount(t testing.TB, dir string) {
	var err error
	Poll(deadline, func() bool {
		err = unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		return !errors.Is(err, unix.EBUSY)
	})
	if errors.Is(err, unix.EBUSY) {
		t.Errorf("%s is still in use at the end of the test", dir)
		err = unix.Unmount(dir, unix.MNT_DETACH)
	}
	if err != nil {
		t.Errorf("unmount %s: %v", dir, err)
	}
}
