// SPDX-License-Identifier: Apache-2.0

package handover

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestExecRefused: what is no executable that only root could have written is not run,
// and the error says which, and what to do.
func TestExecRefused(t *testing.T) {
	for name, c := range map[string]struct {
		shape func(path string) error
		want  string
	}{
		"missing":           {func(string) error { return nil }, "no such file or directory"},
		"a directory":       {func(path string) error { return os.Mkdir(path, 0o700) }, "is not a regular file"},
		"not executable":    {func(path string) error { return os.WriteFile(path, nil, 0o600) }, "is not executable"},
		"anybody's":         {func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o702)) }, "can be written by others"}, //nolint:gosec // that is it
		"the group's":       {func(path string) error { return errors.Join(os.WriteFile(path, nil, 0o600), os.Chmod(path, 0o770)) }, "can be written by others"}, //nolint:gosec // that is it
		"a link to nothing": {func(path string) error { return os.Symlink("nothing", path) }, "no such file or directory"},
	} {
		dir := t.TempDir()
		self := filepath.Join(dir, "self")
		if err := errors.Join(c.shape(filepath.Join(dir, Larger)), os.Symlink(filepath.Join(dir, "shunt-cni (deleted)"), self)); err != nil {
			t.Fatal(err)
		}
		err := To{Self: self}.Exec([]byte("{}"), GC)
		for _, want := range []string{c.want, filepath.Join(dir, Larger), "(gc)", "let the node agent install both"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v; want %q", name, err, want)
			}
		}
	}
	if err := (To{Self: filepath.Join(t.TempDir(), "none")}).Exec(nil, GC); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without /proc: %v", err)
	}
}

// TestRefill: the same is read once more, of any size, and the file is not inherited
// under another number than 0.
func TestRefill(t *testing.T) {
	for _, size := range []int{0, 1, 1 << 20} {
		want := strings.Repeat("x", size)
		f, err := refill([]byte(want))
		if err != nil {
			t.Fatal(err)
		}
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0)
		if got, err2 := io.ReadAll(f); err != nil || err2 != nil || string(got) != want || flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("%d bytes, %v, %v, flags %#x; want %d", len(got), err, err2, flags, size)
		}
		f.Close()
	}
}

// TestNeeded: the error of what has led to it is not lost.
func TestNeeded(t *testing.T) {
	err := error(&NeededError{Reason: EBPF, Err: io.EOF})
	if !errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "ebpf: EOF") {
		t.Error(err)
	}
	if err := (&NeededError{Reason: GC}); !strings.HasSuffix(err.Error(), ": gc") || err.Unwrap() != nil {
		t.Error(err)
	}
}
