// SPDX-License-Identifier: Apache-2.0

// Package rundir makes sure of the plugin's run directory, by whose files the
// plugin, which is root, goes.
package rundir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// ours are names that Shunt has in its run directory. Any of them shows that a
// directory is not somebody else's.
var ours = []string{"agent", "agent.sock", "install.lock", "kubeconfig", "lock", "attachments", "iptables", "log", "token", "claim", "counts", "unredirected", "status"}

// Prepare makes the directory, readable by its owner alone. It refuses one that
// others could put their own files into, and changes the mode only of one that
// is new, or Shunt's already: a runDir that names a directory of the system by
// mistake must not take that away from everybody else.
func Prepare(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if err := own(dir, st); err != nil || st.Mode().Perm() == 0o700 {
		return err
	}
	// As the kubelet makes the directory of a volume.
	names, err := namesIn(dir)
	if err != nil {
		return err
	}
	if len(names) > 0 && !slices.ContainsFunc(names, func(n string) bool { return slices.Contains(ours, n) }) {
		return fmt.Errorf("%s has files of others (%s): expected a directory of Shunt's own, such as /run/shunt", dir, names[0])
	}
	return os.Chmod(dir, 0o700)
}

// Make makes the directory, readable by its owner alone, with those above it, or
// refuses one that others could put their own files into. What is there stays as
// it is.
func Make(dir string) error {
	err := Check(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return os.MkdirAll(dir, 0o700)
	}
	return err
}

// Check refuses a directory that others could put their own files into. Its error
// is fs.ErrNotExist where there is none.
func Check(dir string) error {
	st, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	return own(dir, st)
}

// own fails unless a directory is this user's, and nobody else can write to it.
func own(dir string, st fs.FileInfo) error {
	if st.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%s is a symbolic link: expected a directory, which nobody can have lead elsewhere", dir)
	}
	if !st.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if uid := ownerOf(st); uid != os.Geteuid() {
		return fmt.Errorf("%s belongs to user %d: expected %d", dir, uid, os.Geteuid())
	}
	if mode := st.Mode().Perm(); mode&0o022 != 0 {
		return fmt.Errorf("%s can be written by others (mode %#o): look who has made it so, then chmod 0700", dir, mode)
	}
	return nil
}

func namesIn(dir string) ([]string, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(1000)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return names, err
}

// ownerOf gives the user whom a file belongs to.
func ownerOf(st fs.FileInfo) int {
	if s, ok := st.Sys().(*syscall.Stat_t); ok {
		return int(s.Uid)
	}
	return -1
}
