// SPDX-License-Identifier: Apache-2.0

package rundir

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestPrepare(t *testing.T) {
	with := func(mode fs.FileMode, names ...string) func(dir string) error {
		return func(dir string) error {
			err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, mode))
			for _, n := range names {
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, n), nil, 0o600))
			}
			return err
		}
	}
	for _, c := range []struct {
		name string
		make func(dir string) error
		want string
	}{
		{"none", func(string) error { return nil }, ""},
		{"as the kubelet makes it", with(0o755), ""},
		{"ours, opened", with(0o755, "log", "x"), ""},
		{"ours", with(0o700, "x"), ""},
		{"a directory of the system", with(0o755, "dbus"), "has files of others (dbus)"},
		{"others may write it", with(0o777 | fs.ModeSticky), "can be written by others (mode 0777)"},
		{"a group may write it", with(0o770), "can be written by others"},
		{"a link", func(dir string) error { return errors.Join(os.Mkdir(dir+"2", 0o700), os.Symlink(dir+"2", dir)) }, "symbolic link"},
		{"a file", func(dir string) error { return os.WriteFile(dir, nil, 0o600) }, "not a directory"},
	} {
		dir := filepath.Join(t.TempDir(), "run", "shunt")
		if err := errors.Join(os.Mkdir(filepath.Dir(dir), 0o700), c.make(dir)); err != nil {
			t.Fatal(err)
		}
		before, _ := os.Lstat(dir)
		err := Prepare(dir)
		after, err2 := os.Lstat(dir)
		switch {
		case err2 != nil:
			t.Errorf("%s: %v", c.name, err2)
		case c.want == "" && (err != nil || after.Mode() != fs.ModeDir|0o700):
			t.Errorf("%s: %v, %v", c.name, err, after.Mode())
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || before.Mode() != after.Mode()):
			t.Errorf("%s: %v, %v; want an error with %q, and nothing changed", c.name, err, after.Mode(), c.want)
		}
	}
}

// TestMake: what is there is used as it is, or refused.
func TestMake(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(dir string) error
		mode fs.FileMode
		want string
	}{
		{"none", func(string) error { return nil }, 0o700, ""},
		{"the system's", func(dir string) error { return os.MkdirAll(dir, 0o755) }, 0o755, ""},
		{"others may write it", func(dir string) error { return errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, 0o702)) }, 0, "can be written by others (mode 0702)"},
		{"a link", func(dir string) error {
			return errors.Join(os.MkdirAll(dir+"2", 0o700), os.Symlink(dir+"2", dir))
		}, 0, "symbolic link"},
		{"a file", func(dir string) error {
			return errors.Join(os.MkdirAll(filepath.Dir(dir), 0o700), os.WriteFile(dir, nil, 0o600))
		}, 0, "not a directory"},
	} {
		dir := filepath.Join(t.TempDir(), "run", "shunt")
		if err := c.make(dir); err != nil {
			t.Fatal(err)
		}
		err := Make(dir)
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v, want an error with %q", c.name, err, c.want)
			}
			continue
		}
		if st, err2 := os.Lstat(dir); err != nil || err2 != nil || st.Mode() != fs.ModeDir|c.mode {
			t.Errorf("%s: %v, %v", c.name, err, st)
		}
	}
}
