// SPDX-License-Identifier: Apache-2.0

package install

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

// ErrWaiting says that there is no CNI configuration to join yet.
var ErrWaiting = errors.New("waiting for the node's primary CNI configuration")

// extensions are those of the files that runtimes read.
var extensions = []string{".conf", ".conflist", ".json"}

func isConf(name string) bool { return slices.Contains(extensions, filepath.Ext(name)) }

// A confFile is one of the files that runtimes read.
type confFile struct {
	name string
	data []byte
	// skip says why no runtime can read it, err why this process can't though
	// a runtime may.
	skip, err error
}

// An edit is a change of one file.
type edit struct {
	name string
	was  []byte // nil: there is none
	now  []byte // nil: there shall be none
	like string // for a new file: whose mode and owner it gets
}

// A plan is what is to be done of the CNI configuration. It is decided from what
// is there, and nothing else.
type plan struct {
	// target is the file that has the entry, or shall have it; of is the file
	// that it was made of, where a single configuration has to become a list.
	target, of string
	// main is the edit of the target; nil: it is as it should be. rest are the
	// edits of other files, to be done after it.
	main *edit
	rest []edit
	// err says why there is no target, or why it can't be joined.
	err error
	// notes are for the log, by file. They change nothing.
	notes map[string]string
	// unsure: a file was passed over that somebody may be about to write.
	unsure bool
	// foreign are the types of the others in the target.
	foreign []string
	// newer: an entry is there that this build's plugin does not know.
	newer bool
}

// wish says what the CNI configuration is to be.
type wish struct {
	chained bool
	file    string // the name of the file to join, or "": the first; of the one to write
	entry   []byte // the netconf
}

// decide makes the plan for files, which are in the order of their names.
func decide(files []confFile, w wish) (p plan, err error) {
	p.notes = map[string]string{}
	entry, err := chainedEntry(w.entry)
	if err != nil {
		return p, err
	}
	if w.chained {
		err = p.join(files, w.file, entry)
	} else {
		err = p.standalone(files, w)
	}
	if err != nil {
		return p, err
	}
	p.rest = leave(files, p.target)
	if p.err != nil {
		// An entry that works stays until there is another. Not so a list
		// whose origin somebody has removed.
		p.rest = slices.DeleteFunc(p.rest, func(e edit) bool {
			from := wrappedFrom(e.was)
			return from == "" || slices.ContainsFunc(files, func(f confFile) bool { return f.name == from })
		})
	}
	return p, nil
}

// sibling is the name of the list that is made of a single configuration. It is
// the one before it in any runtime's order, so that the configuration itself can
// stay where it is: whoever owns it finds it, and finds it unchanged.
func sibling(name string) string {
	return strings.TrimSuffix(name, filepath.Ext(name)) + "-shunt.conflist"
}

// join plans the entry's way into the chain.
func (p *plan) join(files []confFile, file string, entry []byte) error {
	var first string // the first that runtimes take
	for i := range files {
		f := &files[i]
		if wrappedFrom(f.data) != "" {
			continue // it stands and falls with what it was made of
		}
		named := file != "" && f.name == named(files, file)
		if file != "" && !named && first != "" {
			continue
		}
		if f.err != nil {
			if file == "" || named {
				p.err = fmt.Errorf("%s can't be read, though the runtime may use it: %w", f.name, f.err)
				return nil
			}
			continue
		}
		c, why := candidateOf(f)
		if why != nil {
			p.notes[f.name] = fmt.Sprintf("passed over: %v (containerd goes no further than such a file)", why)
			p.unsure = true
			if named {
				p.err = fmt.Errorf("%w: %s is not usable: %w", ErrWaiting, f.name, why)
				return nil
			}
			continue
		}
		if first == "" {
			first = f.name
		}
		if file != "" && !named {
			continue
		}
		if first != f.name {
			p.notes[f.name] = fmt.Sprintf("it is the file to join, by cniConfFileName, but runtimes take %s, which comes before it", first)
		}
		return p.enter(files, f, c, entry)
	}
	switch {
	case file != "":
		p.err = fmt.Errorf("%w: %s is not there (cniConfFileName)", ErrWaiting, file)
	default:
		p.err = fmt.Errorf("%w: there is no usable .conf, .conflist or .json file", ErrWaiting)
	}
	return nil
}

// named returns the name of the file that is meant: where it is missing, the
// one that differs by being a list or not.
func named(files []confFile, name string) string {
	base := strings.TrimSuffix(name, filepath.Ext(name))
	for _, other := range []string{name, base + ".conflist", base + ".conf", base + ".json"} {
		for i := range files {
			if files[i].name == other && wrappedFrom(files[i].data) == "" {
				return other
			}
		}
	}
	return name
}

// A candidate is a configuration that a runtime would take: a list, or a single
// one.
type candidate struct {
	list   *list
	single *libcni.PluginConfig
}

// candidateOf reads a file as runtimes do, and says why it is not for joining.
func candidateOf(f *confFile) (c candidate, why error) {
	if f.skip != nil {
		return c, f.skip
	}
	if filepath.Ext(f.name) != ".conflist" {
		if c.single, why = libcni.NetworkPluginConfFromBytes(f.data); why != nil {
			return c, why
		}
		if c.single.Network.Type == pluginType {
			return c, errors.New("it has no plugin but shunt-cni")
		}
		return c, nil
	}
	if c.list, why = parseList(f.data); why != nil {
		return c, why
	}
	if len(c.list.plugins) == 0 {
		return c, errors.New("no plugins in it")
	}
	if _, others := c.list.count(); others == 0 {
		return c, errors.New("it has no plugin but shunt-cni")
	}
	return c, nil
}

// enter plans the entry into one file.
func (p *plan) enter(files []confFile, f *confFile, c candidate, entry []byte) (err error) {
	var now []byte
	e := &edit{name: f.name, was: f.data}
	if c.list == nil {
		e = &edit{name: sibling(f.name), like: f.name}
		p.of = f.name
		for i := range files {
			if files[i].name != e.name {
				continue
			}
			if e.was = files[i].data; wrappedFrom(e.was) == "" {
				p.err = fmt.Errorf("%s is in the way: the list made of %s needs this name", e.name, f.name)
				return nil
			}
		}
		if tooOld(c.single.Network.CNIVersion) {
			p.notes[f.name] = fmt.Sprintf("its cniVersion %q is older than lists: the list made of it has %s", c.single.Network.CNIVersion, wrapVersion)
		}
		if now, err = wrap(f.data, c.single, f.name, entry); err != nil {
			return err
		}
	} else {
		for i, s := range c.list.plugins {
			if c.list.ours(i) && !knows(s.of(f.data)) {
				p.newer = true
			}
		}
		if now, err = c.list.with(entry); err != nil {
			return err
		}
	}
	l, err := parseList(now)
	if err != nil {
		p.err = fmt.Errorf("%s can't be joined: %w", f.name, err)
		return nil
	}
	if err := accepts(l.conf, l.plugins[len(l.plugins)-1].of(now)); err != nil {
		p.err = fmt.Errorf("%s can't be joined: the plugin would refuse every pod: %w", f.name, err)
		return nil
	}
	for i := range l.plugins {
		if !l.ours(i) {
			p.foreign = append(p.foreign, l.conf.Plugins[i].Network.Type)
		}
	}
	p.target = e.name
	if e.now = now; !bytes.Equal(e.was, now) {
		p.main = e
	}
	return nil
}

// standalone plans a file of our own.
func (p *plan) standalone(files []confFile, w wish) error {
	e := &edit{name: w.file}
	var err error
	if e.now, err = standaloneConf(w.entry, filepath.Ext(w.file) == ".conflist"); err != nil {
		return err
	}
	for i := range files {
		f := &files[i]
		if f.name != w.file {
			continue
		}
		if f.err != nil {
			p.err = fmt.Errorf("%s can't be read: %w", f.name, f.err)
			return nil
		}
		if whose := othersIn(f); whose != "" {
			p.err = fmt.Errorf("%s is not shunt's: it has %s; give another cniConfFileName, or have chained=true to join it", f.name, whose)
			return nil
		}
		e.was = f.data
		if filepath.Ext(f.name) != ".conflist" {
			p.newer = len(f.data) > 0 && !knows(f.data)
		} else if l, err := parseList(f.data); err == nil { // else no runtime takes it
			for i, s := range l.plugins {
				p.newer = p.newer || !knows(s.of(f.data)) && l.ours(i)
			}
		}
	}
	p.target = w.file
	if e.was == nil || !bytes.Equal(e.was, e.now) {
		p.main = e
	}
	return nil
}

// othersIn names a plugin of somebody else's in a file, or is "".
func othersIn(f *confFile) string {
	if f.skip != nil {
		return f.skip.Error()
	}
	if filepath.Ext(f.name) == ".conflist" {
		if l, err := libcni.NetworkConfFromBytes(f.data); err == nil {
			for _, c := range l.Plugins {
				if c.Network.Type != pluginType {
					return "a plugin of type " + c.Network.Type
				}
			}
		}
	} else if c, err := libcni.NetworkPluginConfFromBytes(f.data); err == nil && c.Network.Type != pluginType {
		return "type " + c.Network.Type
	}
	return "" // or nobody's: no runtime takes it
}

// leave plans the end of every entry in files other than keep.
func leave(files []confFile, keep string) (out []edit) {
	for i := range files {
		f := &files[i]
		if f.name == keep || f.skip != nil || f.err != nil {
			continue
		}
		if wrappedFrom(f.data) != "" {
			out = append(out, edit{name: f.name, was: f.data})
			continue
		}
		if filepath.Ext(f.name) != ".conflist" {
			continue
		}
		l, err := parseList(f.data)
		if err != nil {
			continue // no runtime takes it
		}
		if ours, others := l.count(); ours > 0 && others > 0 {
			out = append(out, edit{name: f.name, was: f.data, now: l.without()})
		}
	}
	return out
}
