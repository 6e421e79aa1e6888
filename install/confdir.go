// SPDX-License-Identifier: Apache-2.0

package install

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A confDir is the directory of the CNI configuration.
type confDir string

// read reads what runtimes would, in their order. links are the directories that
// symbolic links lead to; marks are the names of other agents' leftovers, which
// tell who is at work here.
func (d confDir) read() (files []confFile, links, marks []string, err error) {
	entries, err := os.ReadDir(string(d)) // sorted by name, as runtimes do
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil, explain(err)
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasSuffix(name, ".cilium_bak") {
			marks = append(marks, name)
		}
		if e.IsDir() || !isConf(name) {
			continue
		}
		f := confFile{name: name}
		f.data, f.err = readConf(d.path(name))
		switch {
		case f.err == nil:
			if f.data == nil {
				f.data = []byte{}
			}
		case errors.Is(f.err, fs.ErrNotExist) && e.Type()&fs.ModeSymlink == 0:
			continue // gone meanwhile
		case errors.Is(f.err, fs.ErrNotExist):
			if f.skip = d.dangling(name); f.skip != nil {
				f.err = nil
			} else {
				f.err = fmt.Errorf("%w: the link leads out of %s, to what the agent does not see; mount that too, or set cniConfFileName", f.err, d)
			}
		case errors.Is(f.err, errIrregular), errors.Is(f.err, unix.ENXIO), errors.Is(f.err, unix.EISDIR):
			f.skip, f.err = f.err, nil
		}
		if e.Type()&fs.ModeSymlink != 0 {
			if to, err := d.real(name); err == nil {
				links = append(links, filepath.Dir(to))
			}
		}
		files = append(files, f)
	}
	return files, links, marks, nil
}

// dangling says so of a link that leads nowhere for everybody: the agent sees
// the directory at another path than the runtime does, and not all around it.
func (d confDir) dangling(name string) error {
	to, err := os.Readlink(d.path(name))
	if err != nil || filepath.IsAbs(to) || strings.Contains(to, "..") {
		return nil
	}
	return fmt.Errorf("it is a symbolic link to %s, which is not there", to)
}

func (d confDir) path(name string) string { return filepath.Join(string(d), name) }

// real is the file that a link leads to. It is the one to be written: whoever
// keeps a configuration behind a link writes it there, and expects the link to
// stay.
func (d confDir) real(name string) (string, error) { return filepath.EvalSymlinks(d.path(name)) }

// apply makes an edit, unless somebody has changed the file since it was read.
func (d confDir) apply(e edit) error {
	switch {
	case e.now == nil:
		if err := mustBe(d.path(e.name), e.was); err != nil {
			return err
		}
		if _, err := remove(d.path(e.name)); err != nil {
			return err
		}
		return syncDir(string(d))
	case e.was == nil:
		a := own(0o600)
		if e.like != "" {
			st, err := os.Stat(d.path(e.like))
			if err != nil {
				return changedIfGone(err)
			}
			a = attributesOf(st)
		}
		return create(d.path(e.name), e.now, a)
	}
	path, err := d.real(e.name)
	if err != nil {
		return changedIfGone(err)
	}
	return swap(path, e.was, e.now)
}
