// SPDX-License-Identifier: Apache-2.0

package spool

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// TestPrivilegedFullDisk: a line that has no room is lost, and nobody is held
// up; what is there is drained, and the file used again.
func TestPrivilegedFullDisk(t *testing.T) {
	testbed.Privileged(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	start := time.Now()
	for range 100 {
		write(t, dir, strings.Repeat("x", 4<<10))
	}
	if took := time.Since(start); took > quick {
		t.Errorf("took %v", took)
	}
	if got := drain(t, dir); len(got) < 10 || len(got) > 17 {
		t.Errorf("%d lines", len(got))
	}
	write(t, dir, "after")
	if got := drain(t, dir); len(got) != 1 || got[0] != "after" {
		t.Errorf("%q", got)
	}
}
