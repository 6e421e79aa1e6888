// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// A HookState says whether a program is where a pod needs it.
type HookState string

// The states of a hook.
const (
	HookAttached HookState = "attached"
	HookMissing  HookState = "missing"
	// HookOther: another program than the record's datapath has runs there.
	HookOther HookState = "other-program"
	// HookExtra: a program of Shunt's that the record knows nothing of runs
	// there besides.
	HookExtra   HookState = "extra"
	HookUnknown HookState = "unknown" // it could not be told
)

// A HookStatus is a program of a pod, and what the kernel says of it.
type HookStatus struct {
	Name  string // connect4, sk_lookup, "tc eth0" ...
	State HookState
	Text  string // what is wrong, a clause; empty where nothing is
}

// hookName is a program's name for people.
func hookName(program string) string { return strings.TrimPrefix(program, "shunt_") }

// lookHooks asks the kernel for each of the pod's links. alive: one of them tells
// that the pod's network namespace is.
func (s *surveyor) lookHooks(st *Status, b *loaded) (alive bool) {
	r := st.Record
	dir := b.cgroupLinks(r.CgroupID)
	detached := false
	for _, h := range r.hooks() {
		if _, has := b.ids[h.program]; !has && st.OtherBuild && st.Loaded {
			continue // what that build has not, its pods don't need
		}
		li, hook := s.lookLink(filepath.Join(dir, h.program), hookName(h.program), b.ids[h.program], "the pod's cgroup")
		if li != nil {
			if id, at := li.cgroupTarget(); id != r.CgroupID || at != h.attach {
				hook.State, hook.Text = HookMissing, hook.Name+" is not attached to the pod's cgroup any more"
				detached = true
			}
		}
		st.Hooks = append(st.Hooks, hook)
	}
	if slices.ContainsFunc(st.Hooks, func(h HookStatus) bool { return h.State != HookAttached }) {
		var is unix.Stat_t
		err := unix.Stat(r.Cgroup, &is)
		// A path that does not lead there says nothing by itself: it may be the
		// host's, and be looked for from inside of a container.
		st.CgroupGone = errors.Is(err, unix.ENOENT) && detached || err == nil && is.Ino != r.CgroupID
	}

	dir = b.netnsLinks(r.Cookie)
	stamp, err := b.stampIn(dir, r.Cookie)
	untold := errors.Is(err, errForeignSlots)
	if err != nil {
		stamp = 0 // its map or its pin is gone
	}
	ids := map[string]uint32{}
	for _, x := range []struct {
		name string
		want uint32
	}{{stampLink, stamp}, {skLookupLink, b.ids[bpf.ShuntProgShuntSkLookup]}} {
		li, hook := s.lookLink(filepath.Join(dir, x.name), x.name, x.want, "the pod's network namespace")
		if li != nil {
			if x.name == stampLink && untold {
				hook.State, hook.Text = HookUnknown, fmt.Sprintf("whether the stamp is the pod's own could not be told: %v", err)
			}
			ids[x.name] = li.id
			if ino, _ := li.netnsTarget(); ino == r.NetnsIno {
				alive = true
			} else {
				hook.State, hook.Text = HookMissing, x.name+" is not attached to the pod's network namespace any more"
			}
		}
		st.Hooks = append(st.Hooks, hook)
	}
	if last := &st.Hooks[len(st.Hooks)-1]; last.State == HookAttached && ids[stampLink] > ids[skLookupLink] {
		last.State, last.Text = HookMissing, "sk_lookup is attached before the stamp that it needs: inbound connections are refused"
	}
	if r.InboundHook == TC && s.lookTC(st, b) {
		alive = true
	}
	return alive
}

// lookLink asks the kernel about a pinned link, which is to run the program with
// the id want. The info is nil where there is none.
func (s *surveyor) lookLink(path, name string, want uint32, to string) (*linkInfo, HookStatus) {
	hook := HookStatus{Name: name, State: HookAttached}
	l, err := getPin(path)
	if errors.Is(err, fs.ErrNotExist) {
		hook.State, hook.Text = HookMissing, fmt.Sprintf("%s is not attached to %s", name, to)
		return nil, hook
	}
	var li *linkInfo
	if err == nil {
		li, err = info[linkInfo](l)
		l.close()
	}
	if err != nil {
		hook.State, hook.Text = HookUnknown, fmt.Sprintf("whether %s is attached could not be told: %v", name, err)
		return nil, hook
	}
	if li.progID != want {
		hook.State, hook.Text = HookOther, fmt.Sprintf("%s is attached, but it is %s", name, s.whose(li.progID))
	}
	return li, hook
}

// lookTC is lookHooks for the TC program, which a pod may have at its interfaces
// besides.
func (s *surveyor) lookTC(st *Status, b *loaded) (alive bool) {
	r, want := st.Record, b.ids[bpf.ShuntProgShuntTc]
	var n *Netns
	var filters *tcFilters
	for _, i := range r.Interfaces {
		name := "tc " + i.Name
		if !i.Filter {
			li, hook := s.lookLink(tcLinkPath(b.netnsLinks(r.Cookie), i), name, want, "the interface")
			if li != nil && onInterface(i)(li) {
				alive = true
			} else if li != nil {
				hook.State, hook.Text = HookMissing, name+" is not attached any more: the interface is gone"
			}
			st.Hooks = append(st.Hooks, hook)
			continue
		}
		hook := HookStatus{Name: name, State: HookUnknown}
		if filters == nil {
			var err error
			if n, err = r.peekNetns(); err == nil && n != nil {
				defer n.Close()
				if filters, err = openFilters(n); err == nil {
					defer filters.close()
				}
			}
			if n == nil {
				hook.Text = fmt.Sprintf("whether the filter of interface %s is there could not be told: the network namespace is not at %s", i.Name, r.Netns)
			}
			if err != nil {
				hook.Text = fmt.Sprintf("whether the filter of interface %s is there could not be told: %v", i.Name, err)
			}
		}
		if filters != nil {
			alive = true
			has, err := filters.find(i)
			switch {
			case errors.Is(err, errForeignFilter), err == nil && has == nil:
				hook.State, hook.Text = HookMissing, fmt.Sprintf("the filter of interface %s is missing", i.Name)
			case err != nil:
				hook.Text = fmt.Sprintf("whether the filter of interface %s is there could not be told: %v", i.Name, err)
			case uint32(has.Id) != want:
				hook.State, hook.Text = HookOther, fmt.Sprintf("%s is attached, but it is %s", name, s.whose(uint32(has.Id)))
			default:
				hook.State = HookAttached
			}
		}
		st.Hooks = append(st.Hooks, hook)
	}
	return alive
}

// peekNetns opens the file at the record's path, if it is the record's network
// namespace by its inode; nil without an error if it is not. Only a namespace
// that is known to live can be told by its inode.
func (r *Record) peekNetns() (*Netns, error) {
	f, err := unix.Open(r.Netns, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", &fs.PathError{Op: "open", Path: r.Netns, Err: err})
	}
	n := &Netns{fd: fd(f), own: -1, path: r.Netns, Cookie: r.Cookie}
	var st unix.Stat_t
	var vfs unix.Statfs_t
	if err = errors.Join(unix.Fstat(f, &st), unix.Fstatfs(f, &vfs)); err != nil || vfs.Type != unix.NSFS_MAGIC || uint32(st.Ino) != r.NetnsIno {
		n.Close()
		return nil, err
	}
	n.Inode = r.NetnsIno
	return n, nil
}

// whose says which datapath a program is of.
func (s *surveyor) whose(id uint32) string {
	dirs, _ := filepath.Glob(filepath.Join(s.opts.BPFDir, "datapath-*")) // the pattern is good
	for _, dir := range dirs {
		b, err := s.build(filepath.Base(dir))
		if err != nil {
			continue
		}
		for _, known := range b.ids {
			if known == id {
				return fmt.Sprintf("program %d of %s", id, filepath.Base(dir))
			}
		}
	}
	if name, err := programName(id); err == nil {
		return fmt.Sprintf("program %d (%s) of a datapath that is not in %s", id, name, s.opts.BPFDir)
	}
	return fmt.Sprintf("program %d, which this datapath has not", id)
}

func programName(id uint32) (string, error) {
	prog, err := programByID(id)
	if err != nil {
		return "", err
	}
	defer prog.close()
	pi, err := info[progInfo](prog)
	if err != nil {
		return "", err
	}
	return unix.ByteSliceToString(pi.name[:]), nil
}

// lookCloser asks the pod's cgroup and network namespace what is attached there:
// for programs of Shunt's that no link of the pod's runs, and interfaces by which
// what arrives meets none.
func (s *surveyor) lookCloser(st *Status, b *loaded) error {
	r := st.Record
	if !st.CgroupGone {
		cgroup, id, err := openCgroup(r.Cgroup)
		if err != nil {
			return err
		}
		defer cgroup.close()
		if id == r.CgroupID {
			for _, h := range slices.Concat(hooks, dnsHooks) {
				if err := s.strangers(st, cgroup, h.attach, hookName(h.program), b.ids[h.program]); err != nil {
					return err
				}
			}
		}
	}
	n, err := r.peekNetns()
	if err != nil || n == nil {
		return err
	}
	defer n.Close()
	stamp, err := b.stampIn(b.netnsLinks(r.Cookie), r.Cookie)
	if errors.Is(err, errForeignSlots) {
		return nil // lookHooks has said it, as it has any other error
	}
	skLookup := b.ids[bpf.ShuntProgShuntSkLookup]
	if err := s.strangers(st, n.fd, attachSkLookup, "sk_lookup", stamp, skLookup); err != nil || r.InboundHook != TC {
		return err
	}
	// What arrives by an interface that came later is sk_lookup's.
	if got, err := query(n.fd, attachSkLookup); err != nil || slices.Contains(got, skLookup) {
		return err
	}
	if err := n.do(func() (err error) { n.rt, err = openRTNL(); return err }); err != nil {
		return err
	}
	now, err := n.tcInterfaces(false)
	if err != nil {
		return err
	}
	for _, i := range now {
		if !slices.ContainsFunc(r.Interfaces, func(x TCInterface) bool { return x.Index == i.Index }) {
			st.Hooks = append(st.Hooks, HookStatus{
				Name: "tc " + i.Name, State: HookMissing,
				Text: fmt.Sprintf("interface %s came after the pod was attached: without sk_lookup what arrives by it goes around the proxy", i.Name),
			})
		}
	}
	return nil
}

// strangers finds, at one hook of a target, our programs that should not be there.
func (s *surveyor) strangers(st *Status, target fd, attach attachType, name string, expected ...uint32) error {
	got, err := query(target, attach)
	if err != nil {
		return fmt.Errorf("ask what is attached as %v: %w", attach, err)
	}
	seen := map[uint32]bool{}
	for _, id := range got {
		switch known := slices.Contains(expected, id); {
		case known && !seen[id]:
			seen[id] = true
			continue
		case known:
			st.Hooks = append(st.Hooks, HookStatus{name, HookExtra, fmt.Sprintf("%s is attached twice", name)})
		default:
			// A link's own state has said so of the one in its place.
			if is, err := programName(id); err != nil || !strings.HasPrefix(is, "shunt_") ||
				slices.ContainsFunc(st.Hooks, func(h HookStatus) bool { return h.Name == name && h.State == HookOther }) {
				continue
			}
			st.Hooks = append(st.Hooks, HookStatus{name, HookExtra, fmt.Sprintf("a second %s is attached: %s", name, s.whose(id))})
		}
	}
	return nil
}
