// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// Names of the folders in BPFDir that hold links: six to a cgroup, ten with DNS
// capture, by its id; two to a netns, by its cookie.
const (
	cgroupLinks = "cgroups"
	netnsLinks  = "netns"
)

// A hook is a program that is linked to a pod's cgroup.
//
// All are linked as BPF_F_ALLOW_MULTI: the kernel runs them before those of
// ancestors, and leaves other people's alone.
type hook struct {
	program string
	attach  attachType
}

// hooks are every pod's.
var hooks = []hook{
	{bpf.ShuntProgShuntSockops, attachSockOps},
	{bpf.ShuntProgShuntGetsockopt, attachGetsockopt},
	{bpf.ShuntProgShuntGetpeername4, attachGetpeername4},
	{bpf.ShuntProgShuntGetpeername6, attachGetpeername6},
	{bpf.ShuntProgShuntConnect4, attachConnect4},
	{bpf.ShuntProgShuntConnect6, attachConnect6},
}

// dnsHooks are those that a pod with DNS capture has besides: they run for
// datagrams.
var dnsHooks = []hook{
	{bpf.ShuntProgShuntRecvmsg4, attachUDP4Recvmsg},
	{bpf.ShuntProgShuntRecvmsg6, attachUDP6Recvmsg},
	{bpf.ShuntProgShuntSendmsg4, attachUDP4Sendmsg},
	{bpf.ShuntProgShuntSendmsg6, attachUDP6Sendmsg},
}

// hooks are the programs that the record's pod needs.
func (r *Record) hooks() []hook {
	if r.Rules.Flags&bpf.ShuntPodFlagPOD_DNS != 0 {
		return slices.Concat(hooks, dnsHooks)
	}
	return hooks
}

func names(hooks []hook) (names []string) {
	for _, h := range hooks {
		names = append(names, h.program)
	}
	return names
}

// A Target is what Attach attaches to.
type Target struct {
	ID
	Network string // the CNI network's name
	Pod     PodRef
	Netns   *Netns
	Cgroup  string // directory of the pod's own cgroup in cgroup2
	// Running: processes of the pod may run already, and have sockets open.
	Running bool
	// InboundHook is SkLookup, if it is empty.
	InboundHook InboundHook
}

// Attach programs a pod by rules. Repeating it mends what is missing and
// replaces what differs. On error nothing of the attachment is left, except of
// one that was made earlier: that has its earlier rules again, and its links.
// ErrNotUndone is among the errors where that failed.
func (d *Datapath) Attach(t Target, rules Rules) (err error) {
	cgroup, cgroupID, err := openCgroup(t.Cgroup)
	if err != nil {
		return err
	}
	defer cgroup.close()
	r := &Record{
		ID: t.ID, Network: t.Network, Pod: t.Pod, Build: filepath.Base(d.dir),
		Cookie: t.Netns.Cookie, NetnsIno: t.Netns.Inode, Netns: t.Netns.path,
		Cgroup: t.Cgroup, CgroupID: cgroupID, Rules: rules, InboundHook: t.InboundHook,
	}
	if r.Epoch, err = d.epoch(r.Build); err != nil {
		return err
	}

	old, err := d.readRecord(r.ID)
	if err != nil {
		return err
	}
	if err := d.meetOthers(old, r); err != nil {
		return err
	}
	if old != nil && (old.Epoch != r.Epoch || old.Build != r.Build || old.Cookie != r.Cookie || old.CgroupID != r.CgroupID) {
		if err := d.undo(old); err != nil {
			return fmt.Errorf("undo an earlier attachment of the same id: %w", err)
		}
		old = nil
	}
	if err := d.planTC(r, t.Netns, old); err != nil {
		return err
	}

	if err := d.planTProxy(r, old, t.Netns); err != nil {
		return err
	}

	// From here on the record says what may have been done.
	defer func() {
		if err != nil {
			err = d.takeBack(err, old, r, t.Netns, cgroup)
		}
	}()
	if err := d.writeRecord(r); err != nil {
		return err
	}
	added, err := t.Netns.addPassthrough()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil && added {
			err = notUndone(err, t.Netns.removePassthrough())
		}
	}()
	return d.program(r, old, t.Netns, cgroup, t.Running, false)
}

// program makes the pod what its record says. before is the record by which the
// pod is programmed so far, nil for none; back says that r's was there before that.
func (d *Datapath) program(r, before *Record, n *Netns, cgroup fd, running, back bool) error {
	if r.TProxy != nil && r.isTProxy() {
		if err := n.tproxy(r.TProxy).Prepare(r.TProxy.Sysctls); err != nil {
			return err
		}
	}
	if before != nil {
		if err := d.widen(before, r); err != nil {
			return err
		}
	}
	if err := d.writeRules(r); err != nil {
		return err
	}
	if before != nil {
		if err := d.removeRules(r.Cookie, stale(&before.Rules, &r.Rules)); err != nil {
			return err
		}
	}
	// What was served before is served again, as it is after any change to a pod
	// that runs: where the way is not certain, nothing is excluded.
	if err := d.look(n); err != nil && !(back && errors.Is(err, ErrInterfaces)) {
		return err
	}
	if err := d.linkCgroup(r, cgroup); err != nil {
		return err
	}
	if running { // by now no listener can come that the hooks don't see
		if err := d.adoptListeners(r, n); err != nil && r.InboundHook != TC { // which finds them itself
			return err
		}
	}
	if err := d.linkInbound(r, n); err != nil {
		return err
	}
	return d.dropTProxy(r, n)
}

// linkInbound makes sure of the inbound hook. The sk_lookup programs stand behind
// TC too: what comes by an interface that comes later meets them alone.
func (d *Datapath) linkInbound(r *Record, n *Netns) error {
	if err := d.linkNetns(r, n.fd); err != nil {
		return err
	}
	if r.InboundHook == TC {
		if err := d.linkTC(r, n); err != nil {
			return err
		}
	}
	return d.leave(r)
}

// takeBack undoes an attachment that failed by err, of which old, if any, was
// there before: a pod that runs must not lose its redirection by an attempt to
// change it.
func (d *Datapath) takeBack(err error, old, r *Record, n *Netns, cgroup fd) error {
	if old == nil {
		return notUndone(err, d.undo(r))
	}
	back := *old
	back.TProxy = r.TProxy
	for _, i := range slices.Concat(r.Interfaces, r.Leaving) {
		if !slices.Contains(back.Interfaces, i) && !slices.Contains(back.Leaving, i) {
			back.Leaving = append(slices.Clip(back.Leaving), i)
		}
	}
	undo := d.writeRecord(&back)
	if undo == nil {
		undo = d.program(&back, r, n, cgroup, false, true)
	}
	return notUndone(err, undo)
}

func notUndone(err, undo error) error {
	if undo == nil {
		return err
	}
	return fmt.Errorf("%w; %w: %w", err, ErrNotUndone, undo)
}

// openCgroup opens a cgroup's directory. A cgroup's id is its inode number.
func openCgroup(path string) (f fd, id uint64, err error) {
	n, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, 0, fmt.Errorf("open the pod's cgroup: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	var st unix.Stat_t
	if err := unix.Fstat(n, &st); err != nil {
		unix.Close(n)
		return -1, 0, fmt.Errorf("stat the pod's cgroup: %w", err)
	}
	return fd(n), st.Ino, nil
}

// stale is the part of old whose keys are not in now.
func stale(old, now *Rules) *Rules {
	out := new(Rules)
	dests := map[any]bool{}
	for _, e := range now.Dests {
		dests[e.Prefix] = true
	}
	for _, e := range old.Dests {
		if !dests[e.Prefix] {
			out.Dests = append(out.Dests, e)
		}
	}
	ports := map[bpf.ShuntPortKey]bool{}
	for _, e := range now.Ports {
		ports[e.key(0)] = true
	}
	for _, e := range old.Ports {
		if !ports[e.key(0)] {
			out.Ports = append(out.Ports, e)
		}
	}
	return out
}

// writeRules fills the maps. The pod's own entry comes last: the programs
// begin with it.
func (d *Datapath) writeRules(r *Record) error {
	dests, err := d.object(bpf.ShuntMapDests)
	if err != nil {
		return err
	}
	for _, e := range r.Rules.Dests {
		k, v := e.key(r.Cookie), e.value()
		if err := update(dests, &k, &v, updateAny); err != nil {
			return full("prefix "+e.Prefix.String(), err)
		}
	}
	if len(r.Rules.Ports) > 0 {
		ports, err := d.object(bpf.ShuntMapPorts)
		if err != nil {
			return err
		}
		for _, e := range r.Rules.Ports {
			k, v := e.key(r.Cookie), uint32(e.Flags)
			if err := update(ports, &k, &v, updateAny); err != nil {
				return full(fmt.Sprintf("port %d/%d", e.Port, e.Bits), err)
			}
		}
	}
	states, err := d.object(bpf.ShuntMapStates)
	if err != nil {
		return err
	}
	var state bpf.ShuntPodState
	if err := update(states, &r.Cookie, &state, updateNoExist); err != nil && !errors.Is(err, unix.EEXIST) {
		return full("pod state", err)
	}
	pods, err := d.object(bpf.ShuntMapPods)
	if err != nil {
		return err
	}
	pod := r.Rules.pod()
	if err := update(pods, &r.Cookie, &pod, updateAny); err != nil {
		return full("pod", err)
	}
	return nil
}

// widen has a pod's programs take what either of two sets of rules takes as a
// whole, while its lists change from the one to the other: what both redirect
// must not be let past in between.
func (d *Datapath) widen(old, now *Record) error {
	const whole = bpf.ShuntPodFlagPOD_OUT_ALL | bpf.ShuntPodFlagPOD_OUT_ALL_PORTS | bpf.ShuntPodFlagPOD_OUT_PORTS |
		bpf.ShuntPodFlagPOD_IN_ALL | bpf.ShuntPodFlagPOD_IN_PORTS
	if old.Rules.Flags&whole == now.Rules.Flags&whole {
		return nil
	}
	wide := old.Rules
	wide.Flags |= now.Rules.Flags & whole
	pods, err := d.object(bpf.ShuntMapPods)
	if err != nil {
		return err
	}
	pod := wide.pod()
	if err := update(pods, &old.Cookie, &pod, updateAny); err != nil {
		return full("pod", err)
	}
	return nil
}

// full says which entry did not fit: a policy is never cut short.
func full(what string, err error) error {
	if errors.Is(err, unix.E2BIG) || errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("write %s: %w: %w", what, ErrFull, err)
	}
	return fmt.Errorf("write %s: %w", what, err)
}

// removeRules deletes list entries.
func (d *Datapath) removeRules(cookie uint64, rules *Rules) error {
	var errs []error
	if len(rules.Dests) > 0 {
		m, err := d.object(bpf.ShuntMapDests)
		if err != nil {
			return err
		}
		for _, e := range rules.Dests {
			k := e.key(cookie)
			errs = append(errs, remove(m, &k))
		}
	}
	if len(rules.Ports) > 0 {
		m, err := d.object(bpf.ShuntMapPorts)
		if err != nil {
			return err
		}
		for _, e := range rules.Ports {
			k := e.key(cookie)
			errs = append(errs, remove(m, &k))
		}
	}
	return errors.Join(errs...)
}

// linkCgroup makes sure that each hook is linked once to the pod's cgroup. A
// recreated sandbox finds its predecessor's links there: the programs tell pods
// by their netns, so it uses the same. A second set would run every program
// twice.
func (d *Datapath) linkCgroup(r *Record, cgroup fd) error {
	dir := d.cgroupLinks(r.CgroupID)
	fresh, err := makeDir(dir)
	if err != nil {
		return fmt.Errorf("make a folder for links: %w", err)
	}
	for _, h := range r.hooks() {
		prog, err := d.object(h.program)
		if err != nil {
			return err
		}
		ok := func(l *linkInfo) bool { id, at := l.cgroupTarget(); return id == r.CgroupID && at == h.attach }
		if err := link(dir+"/"+h.program, fresh, prog, cgroup, h.attach, ok); err != nil {
			return err
		}
	}
	if fresh || r.Rules.Flags&bpf.ShuntPodFlagPOD_DNS != 0 {
		return nil
	}
	// What it had before under another policy. Another sandbox's stays: its
	// programs do nothing to a pod without DNS capture.
	if _, shared, err := d.others(r); err != nil || shared {
		return err
	}
	return d.unlinkAll(dir, names(dnsHooks)...)
}

// makeDir makes a directory and the parent it lies in; it says whether the
// directory was not there before.
func makeDir(path string) (fresh bool, err error) {
	err = os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrNotExist) {
		if err = os.MkdirAll(filepath.Dir(path), 0o700); err == nil {
			err = os.Mkdir(path, 0o700)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return false, nil
	}
	return err == nil, err
}

// link makes sure of a pinned link of prog to target. Where there may be one
// already, ok tells whether its target is the right one.
func link(path string, fresh bool, prog, target fd, attach attachType, ok func(*linkInfo) bool) error {
	if !fresh {
		good, err := linkIsGood(path, prog, ok)
		if err != nil || good {
			return err
		}
		if good, err = replaceProgram(path, prog, ok); err != nil || good {
			return err
		}
		if err := unlink(path); err != nil {
			return err
		}
	}
	l, err := createLink(prog, target, attach)
	if err != nil {
		return err
	}
	defer l.close()
	return l.pin(path)
}

// linkIsGood reports whether the pinned link runs prog at the right target.
func linkIsGood(path string, prog fd, ok func(*linkInfo) bool) (bool, error) {
	l, err := getPin(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer l.close()
	li, err := info[linkInfo](l)
	if err != nil {
		return false, err
	}
	pi, err := info[progInfo](prog)
	if err != nil {
		return false, err
	}
	return li.progID == pi.id && ok(li), nil
}

// unlink detaches a pinned link at once, and removes its pin.
func unlink(path string) error {
	l, err := getPin(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer l.close()
	if err := l.detach(); err != nil {
		return fmt.Errorf("detach %s: %w", path, err)
	}
	return os.Remove(path)
}

// Names of the two links to a network namespace, in the order in which their
// programs must run.
const (
	stampLink    = "stamp"
	skLookupLink = "sk_lookup"
)

// linkNetns makes sure that the two sk_lookup programs are linked to the pod's
// network namespace, in their order. Where one is missing or wrong, both are
// made anew, behind the old ones; as long as those are there they refuse what
// they can't decide.
func (d *Datapath) linkNetns(r *Record, netns fd) error {
	dir := d.netnsLinks(r.Cookie)
	fresh, err := makeDir(dir)
	if err != nil {
		return fmt.Errorf("make a folder for links: %w", err)
	}
	if !fresh {
		if wrong, err := d.wrongNetnsLinks(r); err != nil || len(wrong) == 0 {
			return err
		}
	}
	stamp, err := d.takeStamp(dir, fresh, r.Cookie)
	if err != nil {
		return err
	}
	defer stamp.close()
	skLookup, err := d.object(bpf.ShuntProgShuntSkLookup)
	if err != nil {
		return err
	}
	for _, l := range []struct {
		name string
		prog fd
	}{{stampLink, stamp}, {skLookupLink, skLookup}} {
		f, err := createLink(l.prog, netns, attachSkLookup)
		if err != nil {
			return err
		}
		defer f.close()
		path := dir + "/" + l.name
		if fresh {
			err = f.pin(path)
		} else {
			err = f.repin(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// repin puts a link's pin in the place of another's, which lets go of that.
func (f fd) repin(path string) error {
	next := path + "-new"
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := f.pin(next); err != nil {
		return err
	}
	return os.Rename(next, path)
}

// wrongNetnsLinks says what is wrong with the links to the pod's network
// namespace.
func (d *Datapath) wrongNetnsLinks(r *Record) (wrong []string, err error) {
	skLookup, err := d.object(bpf.ShuntProgShuntSkLookup)
	if err != nil {
		return nil, err
	}
	want, err := info[progInfo](skLookup)
	if err != nil {
		return nil, err
	}
	stamp, err := d.stampIn(d.netnsLinks(r.Cookie), r.Cookie)
	untold := errors.Is(err, errForeignSlots)
	if err != nil && !untold {
		return nil, err
	}
	ids := map[string]uint32{}
	for _, name := range []string{stampLink, skLookupLink} {
		l, err := getPin(filepath.Join(d.netnsLinks(r.Cookie), name))
		if errors.Is(err, fs.ErrNotExist) {
			wrong = append(wrong, fmt.Sprintf("the %s program is not attached to the pod's network namespace", name))
			continue
		}
		if err != nil {
			return nil, err
		}
		li, err := info[linkInfo](l)
		l.close()
		if err != nil {
			return nil, err
		}
		ids[name] = li.id
		if ino, _ := li.netnsTarget(); ino != r.NetnsIno {
			wrong = append(wrong, fmt.Sprintf("the %s program is attached to network namespace %d, not the pod's, %d", name, ino, r.NetnsIno))
		} else if name == skLookupLink && li.progID != want.id {
			wrong = append(wrong, fmt.Sprintf("the %s program is %d, not the node's, %d", name, li.progID, want.id))
		} else if name == stampLink && li.progID != stamp && !untold {
			wrong = append(wrong, fmt.Sprintf("the %s program is %d, not the pod's own", name, li.progID))
		}
	}
	if len(wrong) == 0 && ids[stampLink] > ids[skLookupLink] {
		wrong = append(wrong, "the stamp program is attached behind the sk_lookup program")
	}
	return wrong, nil
}

func (d *Datapath) cgroupLinks(id uint64) string {
	return filepath.Join(d.opts.BPFDir, cgroupLinks, strconv.FormatUint(id, 10))
}

func (d *Datapath) netnsLinks(cookie uint64) string {
	return filepath.Join(d.opts.BPFDir, netnsLinks, strconv.FormatUint(cookie, 10))
}

// Remove undoes Attach, by the attachment's ID alone. It succeeds when there is
// nothing to do.
func Remove(ctx context.Context, opts Options, id ID) error {
	if !Attached(opts, id) {
		return nil
	}
	d, err := openForRemoval(ctx, opts)
	if err != nil {
		return err
	}
	defer d.Close()
	r, err := d.readRecord(id)
	if err != nil || r == nil {
		return err
	}
	return d.undo(r)
}

// Attached reports whether an attachment may have been made and not been
// removed. It looks without the lock: the shortcut for pods that have nothing, on
// a node that may never have had anything.
func Attached(opts Options, id ID) bool {
	d := &Datapath{opts: opts}
	_, err := os.Lstat(d.recordPath(id))
	return !errors.Is(err, fs.ErrNotExist)
}

// undo removes all that a record speaks of, and the record when all is gone.
// Links go before the entries that their programs need. Every step is tried.
func (d *Datapath) undo(r *Record) error {
	epoch, err := d.epoch(r.Build)
	if err == nil && epoch == r.Epoch {
		err = d.ofBuild(r.Build).detach(r)
	}
	if err != nil {
		return fmt.Errorf("undo attachment %v: %w", r.ID, err)
	}
	return d.removeRecord(r)
}

// detach takes away what no other attachment needs.
func (d *Datapath) detach(r *Record) error {
	defer d.closeFDs()
	sharedNetns, sharedCgroup, err := d.others(r)
	if err != nil {
		return err
	}
	var errs []error
	if !sharedNetns {
		// The one that decides goes first: without a stamp it refuses.
		dir := d.netnsLinks(r.Cookie)
		errs = append(errs, d.unlinkAllTC(r))
		err := d.unlinkAll(dir, skLookupLink, stampLink)
		if err == nil {
			err = d.returnStamps(dir)
		}
		if err == nil { // or nobody would know the slot of a program that is still there
			err = removeAll(dir)
		}
		errs = append(errs, err)
	}
	if !sharedCgroup {
		dir := d.cgroupLinks(r.CgroupID)
		err := d.unlinkAll(dir, names(r.hooks())...)
		if err == nil {
			err = removeAll(dir)
		}
		errs = append(errs, err)
	}
	if !sharedNetns {
		errs = append(errs, d.removePod(r), r.undoTProxy())
	}
	return errors.Join(errs...)
}

// ofBuild gives the datapath in another directory, for what lies in its maps.
func (d *Datapath) ofBuild(build string) *Datapath {
	return d.in(filepath.Join(d.opts.BPFDir, build))
}

func (d *Datapath) in(dir string) *Datapath {
	return &Datapath{opts: d.opts, dir: dir, fds: map[string]fd{}}
}

func (d *Datapath) closeFDs() {
	for _, f := range d.fds {
		f.close()
	}
}

// unlinkAll detaches the links in a folder.
func (d *Datapath) unlinkAll(dir string, names ...string) error {
	var errs []error
	for _, name := range names {
		errs = append(errs, unlink(filepath.Join(dir, name)))
		// A repin that was interrupted.
		errs = append(errs, unlink(filepath.Join(dir, name+"-new")))
	}
	return errors.Join(errs...)
}

func removeDir(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removePod deletes a pod's map entries.
func (d *Datapath) removePod(r *Record) error {
	if foreign, err := d.foreign(); err != nil || foreign {
		return errors.Join(err, d.removeForeign(r))
	}
	pods, err := d.object(bpf.ShuntMapPods)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the maps are gone, and all that was in them
	}
	if err != nil {
		return err
	}
	states, err := d.object(bpf.ShuntMapStates)
	if err != nil {
		return err
	}
	var state bpf.ShuntPodState
	if err := lookup(states, &r.Cookie, &state); err == nil && state.Inflight != 0 {
		if err := d.removeInflight(r.Cookie); err != nil {
			return err
		}
	}
	return errors.Join(
		remove(pods, &r.Cookie),
		remove(states, &r.Cookie),
		d.removeRules(r.Cookie, &r.Rules),
	)
}

// maxInflightKeys is well above what the inflight map can hold.
const maxInflightKeys = 1 << 20

// removeInflight deletes the notes of handshakes that were under way when the
// hooks were taken off. No other pod's are touched.
func (d *Datapath) removeInflight(cookie uint64) error {
	f, err := d.object(bpf.ShuntMapInflight)
	if err != nil {
		return err
	}
	var errs []error
	var own []bpf.ShuntTuple
	err = eachKey(f, maxInflightKeys, func(key *bpf.ShuntTuple) {
		if key.Cookie == cookie {
			own = append(own, *key)
		}
	})
	for i := range own {
		errs = append(errs, remove(f, &own[i]))
	}
	return errors.Join(append(errs, err)...)
}

// Check compares what is in the kernel with what Attach made. It fails with
// ErrNotAttached without a record, else with one error a difference.
func Check(ctx context.Context, opts Options, id ID) error {
	probe := &Datapath{opts: opts}
	// Of a pod that has nothing there may be no node's lock either.
	if _, err := os.Lstat(probe.recordPath(id)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("attachment %v: %w", id, ErrNotAttached)
	}
	d, err := openForRemoval(ctx, opts)
	if err != nil {
		return err
	}
	defer d.Close()
	r, err := d.readRecord(id)
	if err != nil {
		return err
	}
	if r == nil {
		return fmt.Errorf("attachment %v: %w", id, ErrNotAttached)
	}
	epoch, err := d.epoch(r.Build)
	if err != nil {
		return err
	}
	if epoch != r.Epoch {
		return fmt.Errorf("attachment %v: %w: its record is of a datapath that is gone", id, ErrNotAttached)
	}
	b := d.ofBuild(r.Build)
	defer b.closeFDs()
	foreign, err := b.foreign()
	if err != nil {
		return err
	}
	links := b.checkLinks(r)
	if links != nil && r.Build != d.opts.build().dir && d.move(r) == nil { // an upgrade that was cut short is brought to its end
		links = d.checkLinks(r)
	}
	if foreign { // whose entries can't be read
		return errors.Join(links, r.checkTProxy())
	}
	return errors.Join(b.checkRules(r), links, r.checkTProxy())
}

func (d *Datapath) checkRules(r *Record) error {
	var errs []error
	same := func(what string, err error, got, want any) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s is missing: %w", what, err))
		} else if !reflect.DeepEqual(got, want) {
			errs = append(errs, fmt.Errorf("%s differs: %+v, not %+v", what, got, want))
		}
	}
	maps := map[string]fd{}
	for _, name := range []string{bpf.ShuntMapPods, bpf.ShuntMapStates, bpf.ShuntMapDests, bpf.ShuntMapPorts} {
		f, err := d.object(name)
		if err != nil {
			return err
		}
		maps[name] = f
	}
	var pod bpf.ShuntPod
	same("the pod's entry", lookup(maps[bpf.ShuntMapPods], &r.Cookie, &pod), pod, r.Rules.pod())
	var state bpf.ShuntPodState
	if err := lookup(maps[bpf.ShuntMapStates], &r.Cookie, &state); err != nil {
		errs = append(errs, fmt.Errorf("the pod's state is missing: %w", err))
	} else if state.Net == 0 {
		errs = append(errs, errors.New("the programs don't know the pod's interfaces"))
	}
	// A look-up in a longest-prefix table may be answered by another entry
	// than the one asked for; one that is gone shows by its flags then.
	for _, e := range r.Rules.Dests {
		var v bpf.ShuntDest
		k := e.key(r.Cookie)
		same("prefix "+e.Prefix.String(), lookup(maps[bpf.ShuntMapDests], &k, &v), v, e.value())
	}
	for _, e := range r.Rules.Ports {
		var v uint32
		k := e.key(r.Cookie)
		same(fmt.Sprintf("port block %d/%d", e.Port, e.Bits), lookup(maps[bpf.ShuntMapPorts], &k, &v), bpf.ShuntPortFlag(v), e.Flags)
	}
	return errors.Join(errs...)
}

func (d *Datapath) checkLinks(r *Record) error {
	var errs []error
	dir := d.cgroupLinks(r.CgroupID)
	for _, h := range r.hooks() {
		prog, err := d.object(h.program)
		if errors.Is(err, fs.ErrNotExist) && filepath.Base(d.dir) != d.opts.build().dir {
			continue // what that build has not, its pods don't need
		}
		if err != nil {
			return err
		}
		good, err := linkIsGood(filepath.Join(dir, h.program), prog, func(l *linkInfo) bool {
			id, at := l.cgroupTarget()
			return id == r.CgroupID && at == h.attach
		})
		if errs = append(errs, err); err == nil && !good {
			errs = append(errs, fmt.Errorf("%v is not attached to the pod's cgroup %s", h.attach, r.Cgroup))
		}
	}
	inbound := []func(*Record) ([]string, error){d.wrongNetnsLinks}
	if r.InboundHook == TC {
		inbound = append(inbound, d.wrongTC)
	}
	for _, find := range inbound {
		wrong, err := find(r)
		errs = append(errs, err)
		for _, w := range wrong {
			errs = append(errs, errors.New(w))
		}
	}
	return errors.Join(errs...)
}
