// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// A Survey is what eBPF does on a node, as the kernel says.
type Survey struct {
	Attachments []Status // in the order of their IDs
	// Handshakes are those of all pods that are under way now. The node's map
	// holds HandshakesMax; 0: no datapath is loaded.
	Handshakes, HandshakesMax int64
}

// A Status is one attachment.
type Status struct {
	*Record
	// Loaded: the datapath that the record speaks of is there. Else it has gone
	// with its pins, or with the boot.
	Loaded bool
	// OtherBuild: that datapath is another build's than this one. Movable: they
	// work on the same maps, and the pod can have this one's programs.
	OtherBuild, Movable bool
	// NetnsGone: the pod's network namespace is no more, or can't be found.
	NetnsGone bool
	// CgroupGone: the pod's cgroup is no more, or was made anew.
	CgroupGone bool
	// Changing: something looked wrong while another process was at work on the
	// node's pods.
	Changing bool

	Hooks []HookStatus
	// Missing says what of the pod is not in the maps, or differs.
	Missing []string
	// Listeners are those at the proxy's inbound port. Asked: the pod's network
	// namespace was asked for them too; else only those are known that are
	// registered.
	Listeners []Listener
	Asked     bool

	// Handshakes with the proxy are under way now; more than HandshakeLimit at
	// once are refused.
	Handshakes, HandshakeLimit int64
	// Flows are the connections decided since the pod was attached, by rule.
	// Another build's are read if its maps are laid out as this one's.
	Flows [bpf.ShuntRuleRULE_COUNT]uint64
	// Errors are the failures that the programs have counted for the pod.
	Errors []ErrorCount
	// Outside are processes in the pod's network namespace that are not in its
	// cgroup: no program sees them connect.
	Outside []Process
}

// A Process is one of the host.
type Process struct {
	PID  int
	Name string // as the kernel has it: 15 characters
}

// inflightLimit is the programs' own, where Options.InflightLimit is 0.
const inflightLimit = 1 << 16

// settleTime bounds the wait for others who are changing a node's pods.
const settleTime = time.Second

// Look surveys a node. It changes nothing and needs no datapath: of a node that
// has none, or no record of an attachment, the survey is empty. What could be
// told is told with an error too.
//
// It goes by the records, and asks the kernel for what they speak of: for each
// link, where it is attached and which program it runs; the maps' entries. closely
// has it ask, besides, what is attached to the pod's cgroup and namespace, who
// listens there, whether every entry is as it was made, and, in /proc, for
// processes outside of the pod's cgroup: for people, not for every few seconds.
//
// No lock is taken, but where something looks wrong: that is looked at again
// with the node's lock, shared, for the moment of the look, because it may be
// another process's work half done.
func Look(ctx context.Context, opts Options, closely bool) (*Survey, error) {
	records, err := Records(opts)
	errs := []error{err}
	s := &surveyor{opts: opts, closely: closely, builds: map[string]*loaded{}}
	defer s.close()
	out := new(Survey)
	var wait context.Context // bounds the waits for the lock, together
	for _, r := range records {
		if ctx.Err() != nil {
			return out, errors.Join(append(errs, context.Cause(ctx))...)
		}
		st, err := s.look(r)
		if err != nil || st.looksWrong() {
			if wait == nil {
				var cancel func()
				wait, cancel = context.WithTimeout(ctx, settleTime)
				defer cancel()
			}
			st, err = s.lookAgain(wait, st, err)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("attachment %v: %w", r.ID, err))
		}
		if st != nil {
			out.Attachments = append(out.Attachments, *st)
		}
	}
	slices.SortFunc(out.Attachments, func(a, b Status) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	counted := map[uint64]bool{}
	for i := range out.Attachments {
		if st := &out.Attachments[i]; !counted[st.Cookie] {
			counted[st.Cookie] = true
			out.Handshakes += st.Handshakes
		}
	}
	for _, b := range s.builds {
		out.HandshakesMax = max(out.HandshakesMax, b.handshakesMax)
	}
	if closely {
		errs = append(errs, findOutside(out.Attachments))
	}
	return out, errors.Join(errs...)
}

// looksWrong: what another process is changing may look so.
func (st *Status) looksWrong() bool {
	return !st.Loaded || st.NetnsGone || len(st.Missing) > 0 || slices.ContainsFunc(st.Hooks, func(h HookStatus) bool { return h.State != HookAttached })
}

// lookAgain looks while nobody changes anything. It returns nil where the
// attachment has gone.
func (s *surveyor) lookAgain(ctx context.Context, before *Status, was error) (*Status, error) {
	release, err := lockToRead(ctx, s.opts.RunDir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		release = func() {} // nobody can be at work
	case errors.Is(err, context.DeadlineExceeded) && was == nil:
		before.Changing = true
		return before, nil
	case err != nil:
		return before, errors.Join(was, err)
	}
	defer release()
	r, err := readRecordFile((&Datapath{opts: s.opts}).recordPath(before.ID))
	if err != nil || r == nil {
		return nil, err
	}
	s.forget(r.Build)
	return s.look(r)
}

// A surveyor looks at one attachment after the other.
type surveyor struct {
	opts    Options
	closely bool
	builds  map[string]*loaded // by their directories
	errors  map[uint64][]ErrorCount
}

// A loaded is a datapath as it is now.
type loaded struct {
	*Datapath
	epoch string
	ids   map[string]uint32 // of its programs
	// Maps; -1 where there is none, or one that is laid out otherwise.
	pods, states, listeners fd
	handshakesMax           int64
}

func (s *surveyor) close() {
	for build := range s.builds {
		s.forget(build)
	}
}

func (s *surveyor) forget(build string) {
	if b := s.builds[build]; b != nil {
		b.closeFDs()
		delete(s.builds, build)
	}
}

// mapInfo is the head of struct bpf_map_info.
type mapInfo struct {
	_, id, keySize, valueSize, maxEntries uint32
}

// build opens what is there of a datapath. One that is not there is none of an
// error.
func (s *surveyor) build(name string) (_ *loaded, err error) {
	if b := s.builds[name]; b != nil {
		return b, nil
	}
	if name == "" || name != filepath.Base(name) {
		return nil, fmt.Errorf("its record names a datapath %q, which can't be one", name)
	}
	b := &loaded{Datapath: (&Datapath{opts: s.opts}).ofBuild(name), ids: map[string]uint32{}, pods: -1, states: -1, listeners: -1}
	if b.epoch, err = b.Datapath.epoch(name); err != nil {
		return nil, err
	}
	s.builds[name] = b
	if b.epoch == "" {
		return b, nil
	}
	for _, h := range slices.Concat(hooks, dnsHooks, []hook{{program: bpf.ShuntProgShuntSkLookup}, {program: bpf.ShuntProgShuntTc}}) {
		prog, err := b.object(h.program)
		if errors.Is(err, fs.ErrNotExist) {
			continue // of another build, or the TC program, which no pod has asked for
		}
		if err != nil {
			return nil, err
		}
		pi, err := info[progInfo](prog)
		if err != nil {
			return nil, err
		}
		b.ids[h.program] = pi.id
	}
	// A value that is larger than we know would be written beyond its place.
	for _, m := range []struct {
		name       string
		key, value uintptr
		fd         *fd
	}{
		{bpf.ShuntMapPods, 8, unsafe.Sizeof(bpf.ShuntPod{}), &b.pods},
		{bpf.ShuntMapStates, 8, unsafe.Sizeof(bpf.ShuntPodState{}), &b.states},
		{bpf.ShuntMapListeners, unsafe.Sizeof(bpf.ShuntListenerKey{}), 8, &b.listeners},
		{bpf.ShuntMapInflight, 0, 0, nil},
	} {
		f, err := b.object(m.name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		mi, err := info[mapInfo](f)
		switch {
		case err != nil:
			return nil, err
		case m.fd == nil:
			b.handshakesMax = int64(mi.maxEntries)
		case uintptr(mi.keySize) == m.key && uintptr(mi.valueSize) == m.value:
			*m.fd = f
		}
	}
	return b, nil
}

// errorsOf gives what was counted for a pod.
func (s *surveyor) errorsOf(cookie uint64) ([]ErrorCount, error) {
	if s.errors == nil {
		list, err := Errors(s.opts)
		if err != nil {
			return nil, err
		}
		s.errors = map[uint64][]ErrorCount{}
		for _, e := range list {
			s.errors[e.Cookie] = append(s.errors[e.Cookie], e)
		}
	}
	return s.errors[cookie], nil
}

// look asks for all of an attachment. The status is never nil.
func (s *surveyor) look(r *Record) (st *Status, err error) {
	own := s.opts.build().dir
	st = &Status{Record: r, OtherBuild: r.Build != own, HandshakeLimit: cmp.Or(int64(s.opts.InflightLimit), inflightLimit)}
	b, err := s.build(r.Build)
	if err != nil {
		return st, err
	}
	st.Loaded = b.epoch == r.Epoch && b.epoch != ""
	if st.OtherBuild && st.Loaded {
		if st.Movable, err = s.movable(r, b); err != nil {
			return st, err
		}
	}

	alive := s.lookHooks(st, b)
	if !alive {
		if st.NetnsGone, err = r.netnsGone(); err != nil {
			return st, err
		}
	}
	if !st.Loaded {
		return st, nil
	}
	st.Errors, err = s.errorsOf(r.Cookie)
	errs := []error{err, s.lookMaps(st, b)}
	if !st.NetnsGone && (s.closely || st.suspicious()) {
		errs = append(errs, st.askListeners(s.closely))
	}
	if s.closely && !st.NetnsGone {
		if !st.OtherBuild {
			for _, err := range []error{b.checkRules(r), r.checkTProxy()} {
				if err != nil {
					st.Missing = append(st.Missing, strings.Split(err.Error(), "\n")...)
				}
			}
		}
		errs = append(errs, s.lookCloser(st, b))
	}
	return st, errors.Join(errs...)
}

// movable reports whether the pod of another build can have this one's programs:
// where this one's are not loaded, it is seen by how its maps are laid out.
func (s *surveyor) movable(r *Record, b *loaded) (bool, error) {
	if r.Rules.Flags&^s.opts.build().flags != 0 {
		return false, nil
	}
	own, err := s.build(s.opts.build().dir)
	if err != nil {
		return false, err
	}
	if own.epoch != "" {
		return own.epoch == r.Epoch, nil
	}
	l, err := b.layoutOf(r.Build)
	return err == nil && parseLayout(s.opts.build().layout).like(l), err
}

// netnsGone looks for the network namespace by its path, and its cookie.
func (r *Record) netnsGone() (bool, error) {
	n, err := r.netns()
	if errors.Is(err, ErrHostNetns) {
		return true, nil // a process's path, whose number another has by now
	}
	if err != nil {
		return false, err
	}
	if n != nil {
		n.Close()
	}
	return n == nil, nil
}

// lookMaps reads the pod's entries.
func (s *surveyor) lookMaps(st *Status, b *loaded) error {
	if b.pods >= 0 && !s.closely {
		var pod bpf.ShuntPod
		if err := lookup(b.pods, &st.Cookie, &pod); errors.Is(err, unix.ENOENT) {
			st.Missing = append(st.Missing, "the pod's entry is missing")
		} else if err != nil {
			return fmt.Errorf("look up the pod's entry: %w", err)
		}
	}
	if b.states < 0 {
		return nil
	}
	var state bpf.ShuntPodState
	if err := lookup(b.states, &st.Cookie, &state); errors.Is(err, unix.ENOENT) {
		if !s.closely { // which finds it too
			st.Missing = append(st.Missing, "the pod's state is missing")
		}
		return nil
	} else if err != nil {
		return fmt.Errorf("look up the pod's state: %w", err)
	}
	st.Handshakes, st.Flows = max(0, state.Inflight), state.Rules
	return st.registered(b, &state)
}

// registered fills in the listeners that are in the map of listeners.
func (st *Status) registered(b *loaded, state *bpf.ShuntPodState) error {
	var kinds [bpf.ShuntListenerKindLISTENER_KINDS]Listener
	for place, cookie := range state.Listeners {
		if cookie == 0 {
			continue
		}
		if b.listeners >= 0 {
			// One that closes leaves the map before the state hears of it.
			key, is := bpf.ShuntListenerKey{Cookie: st.Cookie, Place: uint32(place)}, uint64(0)
			if err := lookup(b.listeners, &key, &is); errors.Is(err, unix.ENOENT) || err == nil && is != cookie {
				continue
			} else if err != nil {
				return fmt.Errorf("look up a listener: %w", err)
			}
		}
		l := &kinds[place/listenerSlots]
		l.cookies = append(l.cookies, cookie)
		l.Registered++
		l.Serves4 = l.Serves4 || state.Inbound[0] == uint32(place)
		l.Serves6 = l.Serves6 || state.Inbound[1] == uint32(place)
	}
	for kind, l := range kinds {
		if l.Registered == 0 {
			continue
		}
		at, only := st.Rules.addressOf(bpf.ShuntListenerKind(kind))
		l.Addr, l.OnlyIPv6, l.Reached = netip.AddrPortFrom(at, st.Rules.InboundPort), only, true
		st.Listeners = append(st.Listeners, l)
	}
	return nil
}

// addressOf gives the address that a kind of listener is bound to.
func (r *Rules) addressOf(kind bpf.ShuntListenerKind) (at netip.Addr, only6 bool) {
	switch kind {
	case bpf.ShuntListenerKindLISTENER_POD4:
		return r.Source4, false
	case bpf.ShuntListenerKindLISTENER_ANY4:
		return netip.IPv4Unspecified(), false
	case bpf.ShuntListenerKindLISTENER_POD6:
		return r.Source6, false
	}
	return netip.IPv6Unspecified(), kind == bpf.ShuntListenerKindLISTENER_ONLY6
}

// Counted is how often the programs have failed at a place for the pod.
func (st *Status) Counted(place bpf.ShuntPlace) (n uint64, errno unix.Errno) {
	for _, e := range st.Errors {
		if e.Place == place {
			n, errno = n+e.Count, e.Errno
		}
	}
	return n, errno
}

// suspicious: something was counted that a listener may be the cause of, and not
// every family has one.
func (st *Status) suspicious() bool {
	none, _ := st.Counted(bpf.ShuntPlacePLACE_LISTENER_NONE)
	refused, _ := st.Counted(bpf.ShuntPlacePLACE_LISTENER_REGISTER)
	if none+refused == 0 {
		return false
	}
	var four, six bool
	for _, l := range st.Listeners {
		four, six = four || l.Serves4, six || l.Serves6
	}
	return st.Rules.Source4.IsValid() && !four || st.Rules.Source6.IsValid() && !six
}

// findOutside looks through /proc for processes that are in a pod's network
// namespace and not in its cgroup.
func findOutside(list []Status) error {
	pods := map[string]*Status{} // by what /proc shows of their namespaces
	for i := range list {
		if st := &list[i]; st.Loaded && !st.NetnsGone && !st.CgroupGone {
			pods[fmt.Sprintf("net:[%d]", st.NetnsIno)] = st
		}
	}
	if len(pods) == 0 {
		return nil
	}
	inside := map[*Status]map[string]bool{}
	for _, st := range pods {
		set, err := processesIn(st.Cgroup)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list the processes of the cgroup %s: %w", st.Cgroup, err)
		}
		inside[st] = set
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, proc := range procs {
		in := func() *Status {
			ns, err := os.Readlink(proc + "/ns/net")
			if err != nil {
				return nil // it has ended
			}
			return pods[ns]
		}
		st := in()
		pid := filepath.Base(proc)
		if st == nil || inside[st] == nil || inside[st][pid] {
			continue
		}
		// It may have come since.
		now, err := processesIn(st.Cgroup)
		if err != nil || now[pid] || in() != st {
			continue
		}
		p := Process{Name: "?"}
		_, _ = fmt.Sscan(pid, &p.PID) // digits only
		if name, err := os.ReadFile(proc + "/comm"); err == nil {
			p.Name = strings.TrimSpace(string(name))
		}
		st.Outside = append(st.Outside, p)
	}
	return nil
}

// processesIn lists the processes of a cgroup and of those below it.
func processesIn(cgroup string) (map[string]bool, error) {
	pids := map[string]bool{}
	err := filepath.WalkDir(cgroup, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			if path != cgroup && errors.Is(err, fs.ErrNotExist) {
				return nil // a container that has ended
			}
			return err
		}
		if !e.IsDir() {
			return nil
		}
		text, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // gone, or one of threads, whose processes are listed above it
		}
		if err != nil {
			return err
		}
		for _, pid := range strings.Fields(string(text)) {
			pids[pid] = true
		}
		return nil
	})
	return pids, err
}
