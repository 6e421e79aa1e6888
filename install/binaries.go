// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/handover"
)

// binaries are what goes into the directory of CNI plugins, in this order: the plugin
// comes after what it hands requests over to, and goes before.
var binaries = []string{handover.Larger, pluginType}

// A stamp tells whether a file is the one that was looked at before, without
// reading it again.
type stamp struct {
	dev, ino    uint64
	size        int64
	mode        fs.FileMode
	mtim, ctime syscall.Timespec
}

func stampOf(st fs.FileInfo) (s stamp) {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		s = stamp{sys.Dev, sys.Ino, sys.Size, st.Mode(), sys.Mtim, sys.Ctim}
	}
	return s
}

// A copier copies binaries, and remembers those that it has compared.
type copier struct {
	from, to string
	same     map[string][2]stamp
}

// copy has each binary be the same as its source, by a file of its own: a link
// in its place is replaced, not followed. It says whether it has changed any.
func (c *copier) copy() (changed bool, err error) {
	for _, name := range binaries {
		one, err := c.copyOne(name)
		if err != nil {
			return changed, fmt.Errorf("copy %s: %w", name, err)
		}
		changed = changed || one
	}
	return changed, nil
}

func (c *copier) copyOne(name string) (changed bool, err error) {
	src, err := os.OpenFile(filepath.Join(c.from, name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer src.Close()
	st, err := src.Stat()
	if err != nil {
		return false, err
	}
	if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
		return false, fmt.Errorf("%s is not an executable file", src.Name())
	}
	if dir, err := os.Stat(c.to); err != nil {
		return false, fmt.Errorf("%w: is cniBinDir the runtime's?", err)
	} else if !dir.IsDir() {
		return false, fmt.Errorf("%s is not a directory: is cniBinDir the runtime's?", c.to)
	}
	path := filepath.Join(c.to, name)
	is, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return false, err
	case is.IsDir():
		return false, fmt.Errorf("%s is a directory: remove it", path)
	case is.Mode() == st.Mode() && is.Size() == st.Size():
		known := [2]stamp{stampOf(st), stampOf(is)}
		if c.same[name] == known {
			return false, nil
		}
		if same, err := sameContent(src, path); err != nil {
			return false, err
		} else if same {
			c.remember(name, known)
			return false, nil
		}
		if _, err := src.Seek(0, io.SeekStart); err != nil {
			return false, err
		}
	}
	temp, err := writeTemp(c.to, src, own(st.Mode().Perm()))
	if err != nil {
		return false, err
	}
	return true, replaceBy(temp, path)
}

func (c *copier) remember(name string, s [2]stamp) {
	if c.same == nil {
		c.same = map[string][2]stamp{}
	}
	c.same[name] = s
}

// sameContent compares r, to its end, with a file.
func sameContent(r io.Reader, path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	a, b := make([]byte, 64<<10), make([]byte, 64<<10)
	for {
		n, err := io.ReadFull(r, a)
		m, err2 := io.ReadFull(f, b)
		if n != m || !bytes.Equal(a[:n], b[:m]) {
			return false, nil
		}
		if end(err) && end(err2) {
			return true, nil
		}
		if err := errors.Join(err, err2); err != nil {
			return false, err
		}
	}
}

func end(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }
