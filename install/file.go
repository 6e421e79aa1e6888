// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// errChanged says that somebody has written a file at the same time. To look
// again is all that it takes.
var errChanged = errors.New("it was changed by somebody else meanwhile")

// tempPrefix begins the names of files that are not whole yet. Runtimes pass
// over them, for they have none of the extensions; what a process that was
// killed has left of them is known by it.
const tempPrefix = ".shunt-tmp-"

// maxConf bounds a CNI configuration, in bytes.
const maxConf = 4 << 20

// attributes are a file's mode and owner.
type attributes struct {
	mode     fs.FileMode // permission bits
	uid, gid int
}

func attributesOf(st fs.FileInfo) attributes {
	a := attributes{mode: st.Mode().Perm(), uid: -1, gid: -1}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		a.uid, a.gid = int(sys.Uid), int(sys.Gid)
	}
	return a
}

// own are those of a file of ours, of the mode.
func own(mode fs.FileMode) attributes {
	return attributes{mode: mode, uid: os.Geteuid(), gid: os.Getegid()}
}

// writeTemp writes a new file, to be renamed, beside where it will be. It is on
// the disk when this returns, so that no power failure leaves a name without
// its content.
func writeTemp(dir string, data io.Reader, a attributes) (string, error) {
	random := make([]byte, 8)
	_, _ = rand.Read(random) // never fails, by its documentation
	path := filepath.Join(dir, tempPrefix+hex.EncodeToString(random))
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", explain(err)
	}
	if err := errors.Join(fill(f, data, a), f.Close()); err != nil {
		_ = os.Remove(path)
		return "", explain(err)
	}
	return path, nil
}

func fill(f *os.File, data io.Reader, a attributes) error {
	if _, err := io.Copy(f, data); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if is := attributesOf(st); is.uid != a.uid || is.gid != a.gid {
		if err := f.Chown(a.uid, a.gid); err != nil {
			return fmt.Errorf("keep the owner %d:%d: %w", a.uid, a.gid, err)
		}
	}
	// After chown, which takes bits away.
	if err := f.Chmod(a.mode); err != nil {
		return err
	}
	return f.Sync()
}

// swap puts now in the place of was. A file that is not was, because somebody
// has written it meanwhile, is left with what they wrote, and errChanged says
// so: the two files change places in one step, and only then is the old one
// looked at.
func swap(path string, was, now []byte) (err error) {
	st, err := os.Lstat(path)
	if err != nil {
		return changedIfGone(err)
	}
	if err := mustBe(path, was); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	temp, err := writeTemp(dir, bytes.NewReader(now), attributesOf(st))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && !errors.Is(err, errStays) {
			_ = os.Remove(temp)
		}
	}()
	in, out := now, was
	for turn := 0; ; turn++ {
		err := unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
		switch {
		case turn == 0 && (errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)):
			// A filesystem that can't: the best that is left.
			if err := mustBe(path, was); err != nil {
				return err
			}
			if err := os.Rename(temp, path); err != nil {
				return explain(err)
			}
			return syncDir(dir)
		case turn > 0 && err != nil:
			return stays(temp, path, err)
		case errors.Is(err, unix.ENOENT):
			return errChanged
		case err != nil:
			return explain(&os.LinkError{Op: "exchange", Old: temp, New: path, Err: err})
		}
		got, err := readConf(temp)
		if err != nil {
			return stays(temp, path, err)
		}
		if bytes.Equal(got, out) {
			if _, err := remove(temp); err != nil {
				return err
			}
			if turn > 0 {
				return errChanged
			}
			return syncDir(dir)
		}
		in, out = got, in // theirs is newer: back with it
	}
}

// errStays says that a temporary file has what may be nowhere else.
var errStays = errors.New("what somebody wrote at the same time could not be put back")

// stays keeps such a file from being swept away.
func stays(temp, path string, why error) error {
	saved := path + ".shunt-saved"
	if err := os.Rename(temp, saved); err != nil {
		saved = temp
	}
	return fmt.Errorf("exchange %s: %w, it is in %s: %w", path, errStays, saved, why)
}

func mustBe(path string, was []byte) error {
	is, err := readConf(path)
	if err != nil {
		return changedIfGone(err)
	}
	if !bytes.Equal(is, was) {
		return errChanged
	}
	return nil
}

func changedIfGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errChanged
	}
	return err
}

// create makes a file that must not be there yet.
func create(path string, data []byte, a attributes) error {
	temp, err := writeTemp(filepath.Dir(path), bytes.NewReader(data), a)
	if err != nil {
		return err
	}
	err = unix.Renameat2(unix.AT_FDCWD, temp, unix.AT_FDCWD, path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		if err = unix.Link(temp, path); err == nil {
			err = os.Remove(temp)
		}
	}
	if err != nil {
		_ = os.Remove(temp)
		if errors.Is(err, fs.ErrExist) {
			return errChanged
		}
		return explain(&os.LinkError{Op: "rename", Old: temp, New: path, Err: err})
	}
	return syncDir(filepath.Dir(path))
}

// put has a file of ours be data, of the mode. A link in its place is replaced,
// not followed. It does nothing where that is so already.
func put(path string, data []byte, mode fs.FileMode) (changed bool, err error) {
	if st, err := os.Lstat(path); err == nil && st.Mode().IsRegular() && attributesOf(st) == own(mode) {
		if is, err := readConf(path); err == nil && bytes.Equal(is, data) {
			return false, nil
		}
	}
	temp, err := writeTemp(filepath.Dir(path), bytes.NewReader(data), own(mode))
	if err != nil {
		return false, err
	}
	return true, replaceBy(temp, path)
}

// replaceBy renames a temporary file to its place.
func replaceBy(temp, path string) error {
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return explain(err)
	}
	return syncDir(filepath.Dir(path))
}

// remove removes a file; none is fine.
func remove(path string) (removed bool, err error) {
	err = os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, explain(err)
}

// syncDir has the names in a directory outlive a power failure.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, unix.EINVAL) { // a filesystem that has no need of it
		return err
	}
	return nil
}

// sweep removes what a killed process has left in directories. The caller has
// the node's lock: no other is at work.
func sweep(dirs ...string) error {
	var errs []error
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), tempPrefix) && e.Type().IsRegular() {
				_, err := remove(filepath.Join(dir, e.Name()))
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// errIrregular is of what is no file that one can read to its end.
var errIrregular = errors.New("it is not a regular file")

// readConf reads a whole file of a bounded size. Nothing that somebody put in
// its place holds it up.
func readConf(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil {
		return nil, err
	} else if !st.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: errIrregular}
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConf+1))
	if err == nil && len(data) > maxConf {
		err = &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("it is longer than %d MiB", maxConf>>20)}
	}
	return data, err
}

// explain adds what an operator may do about an error.
func explain(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: mount it writable, or set cniBinDir and cniConfDir as this platform has them", err)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: make room on the node's disk", err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w: the agent has to be root with CAP_DAC_OVERRIDE, CAP_FOWNER and CAP_CHOWN, and no security module in its way", err)
	}
	return err
}
