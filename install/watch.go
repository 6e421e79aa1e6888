// SPDX-License-Identifier: Apache-2.0

package install

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/fsnotify/fsnotify"
)

// A watch tells that something may have changed in directories. They may come,
// go, and be replaced.
type watch struct {
	log     *slog.Logger
	watcher *fsnotify.Watcher // nil: the kernel has none left; the caller's timer has to do
	// on says which directory is watched by a name, that it may not be any more.
	on map[string]stamp
	// names are those that count in a directory; an empty list: all.
	names map[string][]string
	told  bool
}

// cover has the watch be on the directories that names has, and on those above
// them that can tell of their coming. It comes before the look at their content:
// then nothing that happens after that look is missed.
func (w *watch) cover(names map[string][]string) {
	if w.watcher == nil {
		var err error
		if w.watcher, err = fsnotify.NewWatcher(); err != nil {
			if w.complain(err); w.watcher != nil {
				_ = w.watcher.Close()
			}
			w.watcher = nil
			return
		}
		w.on = map[string]stamp{}
	}
	w.names = map[string][]string{}
	for dir, list := range names {
		w.add(dir, list)
		// Its own end, and who takes its place, is told of by the one above;
		// by the link's, where it is one.
		for _, path := range []string{dir, resolved(dir)} {
			up := filepath.Dir(path)
			for !isDir(up) && up != filepath.Dir(up) {
				path, up = up, filepath.Dir(up)
			}
			w.add(up, []string{filepath.Base(path)})
		}
	}
	for dir := range w.on {
		if _, ok := w.names[dir]; !ok {
			_ = w.watcher.Remove(dir) // it may be gone
			delete(w.on, dir)
		}
	}
}

func (w *watch) add(dir string, names []string) {
	if before, ok := w.names[dir]; ok {
		if len(before) == 0 || len(names) == 0 {
			names = nil
		} else {
			names = append(names, before...)
		}
	}
	st, err := os.Stat(dir)
	if err != nil {
		return
	}
	w.names[dir] = names
	is := stampOf(st)
	is = stamp{dev: is.dev, ino: is.ino}
	if w.on[dir] == is {
		return
	}
	_ = w.watcher.Remove(dir) // another one may be watched by the name
	if err := w.watcher.Add(dir); err != nil {
		delete(w.on, dir)
		w.complain(err)
		return
	}
	w.on[dir] = is
}

// complain says once that the timer is all there is.
func (w *watch) complain(err error) {
	if !w.told {
		w.log.Warn("changes can't be watched, and are found by looking now and then: raise fs.inotify.max_user_instances and max_user_watches", "error", err)
	}
	w.told = true
}

func (w *watch) complete() bool { return w.watcher != nil && len(w.on) == len(w.names) }

func (w *watch) events() <-chan fsnotify.Event {
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Events
}

func (w *watch) trouble() <-chan error {
	if w.watcher == nil {
		return nil
	}
	return w.watcher.Errors
}

// counts says whether an event is of something that is looked at.
func (w *watch) counts(e fsnotify.Event) bool {
	if _, ok := w.names[e.Name]; ok {
		if e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
			delete(w.on, e.Name) // the kernel has ended the watch, or it is on another name
		}
		return !e.Has(fsnotify.Chmod)
	}
	name := filepath.Base(e.Name)
	if strings.HasPrefix(name, tempPrefix) {
		return false
	}
	names, ok := w.names[filepath.Dir(e.Name)]
	if !ok || len(names) == 0 {
		return ok
	}
	for _, n := range names {
		if n == name || strings.HasPrefix(n, "*.") && filepath.Ext(name) == n[1:] {
			return true
		}
	}
	return false
}

func (w *watch) close() {
	if w.watcher != nil {
		_ = w.watcher.Close()
	}
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

// resolved is where a path leads to, or the path.
func resolved(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	return path
}
