// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"shunt.dev/shunt/bpf"
)

// Most of what is made for a pod goes with DEL. What a DEL that never comes would
// leave is found by what the kernel says of the pod's links: it takes a link off a
// network namespace, a cgroup or an interface that ends, and the link then says that
// it is attached to nothing. That can be seen from any container, by the cookie that
// the links are filed under, and no path or name has to be believed.

// sweepAtOnce is how many things are removed before others may have the node's lock: a
// pod that is about to start waits for no more.
const sweepAtOnce = 32

// Sweep removes what is left of pods that are gone, and the datapaths of other
// builds that none uses any more. It removes nothing of a pod of which anything says
// that it lives, and nothing where nothing can be told. It holds the node's lock
// only where it has found something, and for a few things at a time.
func Sweep(ctx context.Context, opts Options) (removed []ID, err error) {
	tried := map[string]bool{}
	var errs []error
	for {
		found, err := newDatapath(opts).garbage()
		if err != nil {
			return removed, errors.Join(append(errs, err)...)
		}
		before := len(tried)
		if found.next(maps.Clone(tried)) > 0 {
			some, err := sweepSome(ctx, opts, tried)
			removed, errs = append(removed, some...), append(errs, err)
		}
		if len(tried) == before || ctx.Err() != nil {
			return removed, errors.Join(append(errs, found.untold, context.Cause(ctx))...)
		}
	}
}

// sweepSome removes some of what has not been tried, and notes it as tried.
func sweepSome(ctx context.Context, opts Options, tried map[string]bool) (removed []ID, err error) {
	d, err := openForRemoval(ctx, opts)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// Another process may have been at work.
	found, err := d.garbage()
	if err != nil {
		return nil, err
	}
	found.next(tried)
	var errs []error
	try := func(remove func() error) (ok bool) {
		if ctx.Err() != nil {
			return false // the sweep says so
		}
		err := remove()
		errs = append(errs, err)
		return err == nil
	}
	for _, r := range found.records {
		if try(func() error { return d.undo(r) }) {
			removed = append(removed, r.ID)
		}
	}
	for _, dir := range found.netns {
		try(func() error { return d.removeOrphan(dir) })
	}
	for _, dir := range found.folders {
		try(func() error { return removeAll(dir) })
	}
	for _, path := range found.users {
		try(func() error { return os.Remove(path) })
	}
	if len(found.builds) > 0 {
		try(d.removeUnused)
	}
	return removed, errors.Join(errs...)
}

// A find is what nobody needs any more.
type find struct {
	records []*Record // of pods that are gone
	netns   []string  // folders of links that no record speaks of, to network namespaces that are gone
	folders []string  // likewise, to cgroups; and those without any link
	users   []string  // second names of records that are gone
	builds  []string  // whose datapaths no record speaks of, and loads that were not finished
	untold  error     // of records of which it can't be told; they and what they speak of stay
}

// next leaves in f what has not been tried, sweepAtOnce of it at most, and notes it as
// tried. It says how much that is.
func (f *find) next(tried map[string]bool) (n int) {
	done := func(name string) bool {
		if tried[name] || n == sweepAtOnce {
			return true
		}
		tried[name] = true
		n++
		return false
	}
	f.records = slices.DeleteFunc(f.records, func(r *Record) bool { return done(r.ID.String()) })
	for _, list := range []*[]string{&f.netns, &f.folders, &f.users, &f.builds} {
		*list = slices.DeleteFunc(*list, done)
	}
	return n
}

// garbage looks for what nobody needs. Where a record can't be read it finds nothing:
// whose the rest is can't be told.
func (d *Datapath) garbage() (*find, error) {
	records, err := Records(d.opts)
	if err != nil {
		return nil, err
	}
	out := new(find)
	known := map[string]bool{}      // the names of what records speak of
	living := map[uint64][]uint64{} // cookies of network namespaces that live, by cgroup
	var suspects []*Record
	for _, r := range records {
		known[d.netnsLinks(r.Cookie)], known[d.cgroupLinks(r.CgroupID)] = true, true
		known[d.userPath(r)] = true
		switch end, err := ends(d.netnsLinks(r.Cookie)); {
		case err != nil:
			return nil, err
		case end == gone:
			suspects = append(suspects, r)
		case end == lives:
			living[r.CgroupID] = append(living[r.CgroupID], r.Cookie)
		}
	}
	for _, r := range suspects {
		dead, err := d.dead(r, len(living[r.CgroupID]) > 0)
		if err != nil {
			out.untold = errors.Join(out.untold, fmt.Errorf("tell whether the pod of attachment %v lives: %w", r.ID, err))
		}
		if dead {
			out.records = append(out.records, r)
		}
	}
	for _, kind := range []string{netnsLinks, cgroupLinks} {
		err := eachEntry(filepath.Join(d.opts.BPFDir, kind), func(dir string) error {
			if known[dir] {
				return nil
			}
			switch end, err := ends(dir); {
			case err != nil || end == lives:
				return err
			case end == gone && kind == netnsLinks:
				out.netns = append(out.netns, dir)
			default:
				out.folders = append(out.folders, dir)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	err = eachEntry(filepath.Join(d.opts.RunDir, usersDir), func(path string) error {
		if !known[path] {
			out.users = append(out.users, path)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if out.builds, err = filepath.Glob(filepath.Join(d.opts.BPFDir, loadPrefix+"*")); err != nil {
		return nil, err
	}
	others, err := otherBuilds(d.opts)
	if err != nil || len(others) == 0 {
		return out, err
	}
	users, err := d.users()
	if err != nil {
		return nil, err
	}
	for _, name := range others {
		if users[name] == 0 {
			out.builds = append(out.builds, name)
		}
	}
	return out, nil
}

// dead reports whether the pod of a record is gone, whose links to its network
// namespace say so. Somebody may have taken those off by hand, so that something else
// must say so too: the links to its cgroup, or that the cgroup has another sandbox by
// now. And its path must not lead to it.
func (d *Datapath) dead(r *Record, succeeded bool) (bool, error) {
	if !succeeded {
		if end, err := ends(d.cgroupLinks(r.CgroupID)); err != nil || end != gone {
			return false, err
		}
	}
	n, err := r.netns()
	if err != nil {
		return false, err
	}
	if n != nil {
		n.Close()
	}
	return n == nil, nil
}

// An end says whether what links were attached to is there.
type end int

const (
	unknown end = iota // there is no link that could tell
	lives
	gone
)

// ends says so of the links that are pinned in a folder: one that is attached is
// enough.
func ends(dir string) (end, error) {
	is := unknown
	err := eachEntry(dir, func(path string) error {
		if is == lives || isProgram(path) {
			return nil
		}
		l, err := getPin(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it went just now
		}
		if err != nil {
			return err
		}
		defer l.close()
		li, err := info[linkInfo](l)
		if err != nil {
			return err
		}
		if is = gone; li.attached() {
			is = lives
		}
		return nil
	})
	return is, err
}

// attached: the kernel clears the first part of what a link tells of its target when
// that ends: a cgroup's id, a network namespace's inode, an interface's index.
func (i *linkInfo) attached() bool {
	const cgroup = 3 // BPF_LINK_TYPE_CGROUP
	if i.kind == cgroup {
		return i.target != 0
	}
	return uint32(i.target) != 0
}

// eachEntry calls fn with the paths of what is in a folder that may not be there.
func eachEntry(dir string, fn func(path string) error) error {
	return eachName(dir, func(name string) error {
		if name == "." || name == ".." {
			return nil
		}
		return fn(filepath.Join(dir, name))
	})
}

// removeOrphan removes the links of a network namespace that is gone, of which there
// is no record, and the pod's entries in every datapath's maps, as far as they can be
// found by the cookie alone.
func (d *Datapath) removeOrphan(dir string) error {
	cookie, err := strconv.ParseUint(filepath.Base(dir), 10, 64)
	if err != nil {
		return fmt.Errorf("links of a network namespace: %s is no cookie", dir)
	}
	builds, err := filepath.Glob(filepath.Join(d.opts.BPFDir, datapathPrefix+"*"))
	errs := []error{err}
	for _, path := range builds {
		errs = append(errs, d.ofBuild(filepath.Base(path)).removeCookie(cookie))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// What says that there is something to do goes last.
	return removeAll(dir)
}

// removeCookie removes all entries of a pod of which only the cookie is known, and
// clears the slot of its stamp program.
func (d *Datapath) removeCookie(cookie uint64) error {
	defer d.closeFDs()
	foreign, err := d.foreign()
	if err != nil || foreign {
		return err // they go with the maps
	}
	r := &Record{Cookie: cookie}
	dests, err := d.object(bpf.ShuntMapDests)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	its := halves(cookie)
	errs := []error{removeEach(dests, func(k *bpf.ShuntDestKey) bool { return k.Cookie == its })}
	ports, err := d.object(bpf.ShuntMapPorts)
	if err == nil {
		err = removeEach(ports, func(k *bpf.ShuntPortKey) bool { return k.Cookie == its })
	}
	return errors.Join(append(errs, err, d.removePod(r), d.loseStamp(cookie))...)
}

// maxPrefixKeys is well above what a prefix map can hold.
const maxPrefixKeys = 1 << 23

// removeEach deletes the keys of a map that which names.
func removeEach[K any](m fd, which func(*K) bool) error {
	var own []K
	errs := []error{eachKey(m, maxPrefixKeys, func(k *K) {
		if which(k) {
			own = append(own, *k)
		}
	})}
	for i := range own {
		errs = append(errs, remove(m, &own[i]))
	}
	return errors.Join(errs...)
}
