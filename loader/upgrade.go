// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// A node may have the datapaths of several builds, each in a directory of its
// own. One that is loaded while pods use another is loaded with that one's maps,
// where the maps of both are laid out alike. Both directories then have pins of
// the same maps, and the same epoch: twins. A pod goes from one to its twin link by
// link, each in one go; whichever programs it has meanwhile, they work on the same
// entries.

const datapathPrefix = "datapath-"

// layoutLink is a symbolic link in a datapath's directory, as the epoch's is: its
// target is bpf.Layout of its build.
const layoutLink = "layout"

// stampLayout is the name that the stamp program has in a layout.
const stampLayout = "shunt_stamp"

// needed are the maps without which a live pod's connections, or its redirection,
// would be lost. Other maps may be laid out otherwise: each build has its own then.
var needed = []string{
	bpf.ShuntMapPods, bpf.ShuntMapDests, bpf.ShuntMapPorts, bpf.ShuntMapStates, bpf.ShuntMapSockets, bpf.ShuntMapResolvers,
	bpf.ShuntMapInflight, bpf.ShuntMapListeners, bpf.ShuntMapStamps, bpf.ShuntMapSlots,
}

// A build is what the datapaths of two builds of Shunt may differ in.
type build struct {
	dir    string // of the pins, below BPFDir
	layout string
	flags  bpf.ShuntPodFlag // that its programs know
}

// build is this one, but in tests.
func (o *Options) build() build {
	if o.otherBuild != nil {
		return *o.otherBuild
	}
	return build{dir: ThisBuild(), layout: bpf.Layout, flags: bpf.PodFlags}
}

// A layout has the digest of each map's layout by the map's name.
type layout map[string]string

func parseLayout(text string) layout {
	l := layout{}
	for field := range strings.FieldsSeq(text) {
		name, digest, _ := strings.Cut(field, "=")
		l[name] = digest
	}
	return l
}

// layoutOf gives how the maps of a loaded datapath are laid out. One of a build
// that did not say so is like no other.
func (d *Datapath) layoutOf(build string) (layout, error) {
	text, err := os.Readlink(filepath.Join(d.opts.BPFDir, build, layoutLink))
	if errors.Is(err, fs.ErrNotExist) {
		return layout{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the datapath's layout: %w", err)
	}
	return parseLayout(text), nil
}

// like reports whether programs of l and of o can work on the same maps.
func (l layout) like(o layout) bool {
	return l["meaning"] != "" && l["meaning"] == o["meaning"] && !slices.ContainsFunc(needed, func(name string) bool {
		return l[name] != "" && o[name] != "" && l[name] != o[name]
	})
}

// otherBuilds lists the directories of other builds' datapaths.
func otherBuilds(opts Options) ([]string, error) {
	entries, err := os.ReadDir(opts.BPFDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("bpfDir: %w", err)
	}
	var others []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), datapathPrefix) && e.Name() != opts.build().dir {
			others = append(others, e.Name())
		}
	}
	return others, nil
}

// users counts the attachments that are recorded to use a datapath that is loaded,
// by its directory.
func (d *Datapath) users() (map[string]int, error) {
	records, err := Records(d.opts)
	if err != nil {
		return nil, err
	}
	epochs, users := map[string]string{}, map[string]int{}
	for _, r := range records {
		epoch, known := epochs[r.Build]
		if !known {
			if epoch, err = d.epoch(r.Build); err != nil {
				return nil, err
			}
			epochs[r.Build] = epoch
		}
		if epoch != "" && epoch == r.Epoch {
			users[r.Build]++
		}
	}
	return users, nil
}

// removeUnused removes the datapaths of other builds that no pod uses, and loads
// that were not finished. Where it can't be told who uses what, all stay.
func (d *Datapath) removeUnused() error {
	entries, err := os.ReadDir(d.opts.BPFDir)
	if err != nil {
		return fmt.Errorf("bpfDir: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), loadPrefix) {
			if err := os.RemoveAll(filepath.Join(d.opts.BPFDir, e.Name())); err != nil {
				return fmt.Errorf("remove an unfinished load: %w", err)
			}
		}
	}
	others, err := otherBuilds(d.opts)
	if err != nil || len(others) == 0 {
		return err
	}
	if err := d.settle(others); err != nil {
		return err
	}
	users, err := d.users()
	if err != nil {
		d.opts.Log.Warn("datapaths of other builds stay: it can't be told which are used", "error", err)
		return nil
	}
	for _, name := range others {
		if users[name] > 0 {
			continue
		}
		if err := d.inheritStamps(name); err != nil {
			return err
		}
		// Under a name by which nobody takes what is left of it for a datapath.
		dir := filepath.Join(d.opts.BPFDir, loadPrefix+name)
		if err := os.Rename(filepath.Join(d.opts.BPFDir, name), dir); err != nil {
			return fmt.Errorf("remove unused datapath: %w", err)
		}
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove unused datapath: %w", err)
		}
		d.opts.Log.Info("removed the datapath of another build: no pod uses it any more", "dir", filepath.Join(d.opts.BPFDir, name))
	}
	return nil
}

// settle looks at the pods that are recorded as this build's: a process of a twin's may
// have ended while it was moving one. That pod has the programs of both, until here.
func (d *Datapath) settle(others []string) error {
	own := filepath.Base(d.dir)
	epoch, err := d.epoch(own)
	if err != nil {
		return err
	}
	twins := false
	for _, name := range others {
		twin, err := d.twin(name)
		if err != nil {
			return err
		}
		twins = twins || twin
	}
	if !twins {
		return nil
	}
	records, err := Records(d.opts)
	if err != nil {
		return nil //nolint:nilerr // nothing will be removed, and so it is said
	}
	for _, r := range records {
		if r.Build != own || r.Epoch != epoch || d.checkLinks(r) == nil {
			continue
		}
		err := d.move(r)
		if errors.Is(err, errFiltersAway) && d.checkLinks(r.withoutFilters()) == nil {
			continue // all that can be seen from here is ours
		}
		if err != nil {
			d.opts.Log.Warn("a pod has programs of two builds, which work together", "attachment", r.ID.String(), "error", err)
		}
	}
	return nil
}

// twin reports whether another build's datapath has the maps of this one.
func (d *Datapath) twin(build string) (bool, error) {
	own, err := d.epoch(filepath.Base(d.dir))
	if err != nil || own == "" {
		return false, err
	}
	its, err := d.epoch(build)
	return own == its, err
}

// inheritStamps takes over the free stamp programs of a twin that is to go: their
// slots are known to no other. If they are of other code the slots are lost for
// now; see lostSlot.
func (d *Datapath) inheritStamps(build string) error {
	same, err := d.sameStamps(build)
	if err != nil || !same {
		return err
	}
	from, to := filepath.Join(d.opts.BPFDir, build, stampsDir), filepath.Join(d.dir, stampsDir)
	return eachName(from, func(name string) error {
		if _, err := strconv.ParseUint(name, 10, 32); err != nil {
			return nil // "." and ".."
		}
		return os.Rename(filepath.Join(from, name), filepath.Join(to, name))
	})
}

// sameStamps reports whether stamp programs of another build are as good as our
// own.
func (d *Datapath) sameStamps(build string) (bool, error) {
	if twin, err := d.twin(build); err != nil || !twin {
		return false, err
	}
	l, err := d.layoutOf(build)
	if err != nil {
		return false, err
	}
	return l[stampLayout] == parseLayout(d.opts.build().layout)[stampLayout], nil
}

// A heritage is what a datapath that is about to be loaded takes over.
type heritage struct {
	epoch string
	maps  map[string]string // the paths of their pins, by name
}

// inherit finds the datapath whose maps the one that is about to be loaded can go
// on with: of several, the one that most pods use. Without one all is new. With an
// error there is nothing to close.
func (d *Datapath) inherit() (*heritage, error) {
	h := &heritage{epoch: newEpoch(), maps: map[string]string{}}
	others, err := otherBuilds(d.opts)
	if err != nil || len(others) == 0 {
		return h, err
	}
	// Those that nobody uses are gone, unless that could not be told.
	users, err := d.users()
	if err != nil {
		users = map[string]int{}
	}
	own := parseLayout(d.opts.build().layout)
	best, alike := "", layout(nil)
	for _, name := range others {
		l, err := d.layoutOf(name)
		if err != nil {
			return nil, err
		}
		if own.like(l) && (best == "" || users[name] > users[best]) {
			best, alike = name, l
		}
	}
	if best == "" {
		d.opts.Log.Warn("pods use another build's datapath, whose maps are laid out otherwise: they keep its programs until they end",
			"theirs", others, "this", filepath.Base(d.dir))
		return h, nil
	}
	epoch, err := d.epoch(best)
	if err != nil || epoch == "" {
		return h, err
	}
	for name, digest := range own {
		if name == stampLayout || alike[name] != digest {
			continue
		}
		pin := filepath.Join(d.opts.BPFDir, best, name)
		_, err := os.Lstat(pin)
		if errors.Is(err, fs.ErrNotExist) {
			if !slices.Contains(needed, name) {
				continue // what only the TC program needs is not pinned
			}
			// Moved to a map of the same name that is empty, a pod would be none of ours.
			d.opts.Log.Warn("pods use another build's datapath, of which a map is gone: they keep its programs until they end",
				"other", best, "map", name)
			return &heritage{epoch: newEpoch()}, nil
		}
		if err != nil {
			return nil, fmt.Errorf("take over the maps of %s: %w", best, err)
		}
		h.maps[name] = pin
	}
	h.epoch = epoch
	d.opts.Log.Info("the datapath is loaded with the maps of another build's, which pods use", "other", best)
	return h, nil
}

// Upgraded says what became of the pods that other builds' programs redirect.
type Upgraded struct {
	Moved []ID
	Kept  []Kept
}

// A Kept is an attachment that keeps another build's programs.
type Kept struct {
	ID
	Pod   PodRef
	Build string
	Why   error
}

// errLayout is why a pod keeps its programs for as long as it lives.
var errLayout = fmt.Errorf("%w, whose maps this one has not: it keeps them until it ends", ErrOtherBuild)

// Upgrade has this build's programs redirect every pod of the node, where another
// build's do so far: later or earlier, it is the same. No connection fails or is
// made around a proxy for it, and those that are there live on. The node's lock is
// held for one pod at a time. It may be ended at any point and repeated. Where no
// other build has a datapath, it costs to list one directory.
func Upgrade(ctx context.Context, opts Options) (*Upgraded, error) {
	out := new(Upgraded)
	others, err := otherBuilds(opts)
	if err != nil || len(others) == 0 {
		return out, err
	}
	records, err := Records(opts)
	errs := []error{err}
	for _, r := range records {
		if r.Build == opts.build().dir {
			continue
		}
		if ctx.Err() != nil {
			return out, errors.Join(append(errs, fmt.Errorf("upgrade: %w", context.Cause(ctx)))...)
		}
		moved, why, err := upgradeOne(ctx, opts, r.ID)
		switch {
		case err != nil:
			return out, errors.Join(append(errs, fmt.Errorf("upgrade attachment %v: %w", r.ID, err))...)
		case why != nil:
			out.Kept = append(out.Kept, Kept{r.ID, r.Pod, r.Build, why})
		case moved:
			out.Moved = append(out.Moved, r.ID)
		}
	}
	d, err := Open(ctx, opts)
	if err != nil {
		return out, errors.Join(append(errs, err)...)
	}
	defer d.Close()
	return out, errors.Join(append(errs, d.removeUnused())...)
}

// upgradeOne moves one attachment. why says that it stays where it is; err, that
// others can't be moved either.
func upgradeOne(ctx context.Context, opts Options, id ID) (moved bool, why, err error) {
	d, err := Open(ctx, opts)
	if err != nil {
		return false, nil, err
	}
	defer d.Close()
	r, err := d.readRecord(id)
	if err != nil || r == nil || r.Build == filepath.Base(d.dir) {
		return false, err, nil
	}
	epoch, err := d.epoch(r.Build)
	if err != nil || epoch != r.Epoch {
		return false, err, nil // of a datapath that is gone: there is nothing to move
	}
	why = d.move(r)
	return why == nil, why, nil
}

// move has this build's programs redirect a pod that another build's redirect so
// far. Whatever it has done when it ends, the pod is redirected, and it can be
// begun anew; the record comes last.
//
// What may fail without fault of the kernel's comes first. Then those that take
// connections, and answer for them, before those that send them on their way.
func (d *Datapath) move(r *Record) error {
	own, err := d.epoch(filepath.Base(d.dir))
	if err != nil {
		return err
	}
	if own != r.Epoch {
		return errLayout
	}
	if err := d.knows(r); err != nil {
		return err
	}
	end, err := ends(d.netnsLinks(r.Cookie))
	if err != nil {
		return err
	}
	if end == gone {
		// The cgroup's links are another sandbox's by now, and go with its record. The
		// stamp program is the next pod's.
		if err := d.replaceStamp(r); err != nil {
			return err
		}
		return d.rename(r)
	}
	if err := d.meetSharers(r); err != nil {
		return err
	}
	if err := d.linkNew(r); err != nil {
		return err
	}
	steps := []func(*Record) error{d.replaceFilters, d.replaceTCX, d.replaceSkLookup, d.replaceStamp, d.replaceCgroup}
	for _, step := range steps {
		if err := step(r); err != nil {
			return fmt.Errorf("replace the programs of %s: %w", r.Build, err)
		}
	}
	if err := d.unlinkUnknown(r); err != nil {
		return err
	}
	return d.rename(r)
}

// knows fails where a pod was set up with what this build's programs have not.
func (d *Datapath) knows(r *Record) error {
	if unknown := r.Rules.Flags &^ d.opts.build().flags; unknown != 0 {
		return fmt.Errorf("%w: the pod was set up with what this build has not (flags %#x)", ErrOtherBuild, uint32(unknown))
	}
	return nil
}

// meetSharers fails where a link that r's attachment has serves another one too, which
// this build's programs can't serve.
func (d *Datapath) meetSharers(r *Record) error {
	others, err := d.sharers(r)
	if err != nil {
		return err
	}
	for _, o := range others {
		end, err := ends(d.netnsLinks(o.Cookie))
		if err != nil {
			return err
		}
		if end == gone {
			continue
		}
		if err = d.knows(o); o.Epoch != r.Epoch {
			err = errLayout
		}
		if err != nil {
			return fmt.Errorf("attachment %v has the same links: %w", o.ID, err)
		}
	}
	return nil
}

// replaceProgram has a pinned link run another program, if its target is the right
// one. done says that it does; one that is not there is not made.
func replaceProgram(path string, prog fd, ok func(*linkInfo) bool) (done bool, err error) {
	l, err := getPin(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer l.close()
	li, err := info[linkInfo](l)
	if err != nil || !ok(li) {
		return false, err
	}
	if err := l.update(prog); err != nil {
		return false, fmt.Errorf("update link %s: %w", path, err)
	}
	return true, nil
}

// replaceAt is replaceProgram where the target does not matter: whoever looks at the
// pod says what is wrong with it.
func replaceAt(path string, prog fd) error {
	_, err := replaceProgram(path, prog, func(*linkInfo) bool { return true })
	return err
}

// removeAll removes a folder of links, with what may still be in it: programs that a
// sandbox before this one had for DNS capture, a later build's, one that had not come to
// its place.
func removeAll(dir string) error {
	err := removeDir(dir)
	if !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	err = eachEntry(dir, func(path string) error {
		if isProgram(path) {
			return os.Remove(path)
		}
		return unlink(path)
	})
	return errors.Join(err, removeDir(dir))
}

// isProgram tells the pin of a stamp program from those of links.
func isProgram(path string) bool {
	name := filepath.Base(path)
	return name == nextStamp || strings.HasPrefix(name, stampPrefix)
}

// linkNew attaches, in a pod of a build that knows fewer hooks, those that it has
// not.
func (d *Datapath) linkNew(r *Record) error {
	before := d.ofBuild(r.Build)
	defer before.closeFDs()
	dir := d.cgroupLinks(r.CgroupID)
	var cgroup fd = -1
	defer func() { cgroup.close() }()
	for _, h := range r.hooks() {
		_, err := before.object(h.program)
		if err == nil {
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if cgroup < 0 {
			var id uint64
			if cgroup, id, err = openCgroup(r.Cgroup); err == nil && id != r.CgroupID {
				err = fmt.Errorf("cgroup %s was made anew", r.Cgroup)
			}
			if err != nil {
				return fmt.Errorf("attach %s, which %s has not: %w", hookName(h.program), r.Build, err)
			}
		}
		prog, err := d.object(h.program)
		if err != nil {
			return err
		}
		ok := func(l *linkInfo) bool { id, at := l.cgroupTarget(); return id == r.CgroupID && at == h.attach }
		if err := link(filepath.Join(dir, h.program), false, prog, cgroup, h.attach, ok); err != nil {
			return err
		}
	}
	return nil
}

var errFiltersAway = errors.New("its TC filters can't be replaced from here")

// withoutFilters is the record of a pod that has links alone.
func (r *Record) withoutFilters() *Record {
	links := *r
	links.Interfaces = slices.DeleteFunc(slices.Clone(r.Interfaces), func(i TCInterface) bool { return i.Filter })
	return &links
}

// replaceFilters replaces the TC program where it is a filter. That needs the pod's
// network namespace, which not every process can enter.
func (d *Datapath) replaceFilters(r *Record) error {
	all := slices.DeleteFunc(slices.Concat(r.Interfaces, r.Leaving), func(i TCInterface) bool { return !i.Filter })
	if len(all) == 0 {
		return nil
	}
	prog, err := d.tcProgram()
	if err != nil {
		return err
	}
	n, err := r.netns()
	if err != nil {
		return err
	}
	if n == nil {
		return fmt.Errorf("%w: its network namespace is not at %s", errFiltersAway, r.Netns)
	}
	defer n.Close()
	filters, err := openFilters(n)
	if err != nil {
		return err
	}
	defer filters.close()
	for _, i := range all {
		has, err := filters.find(i)
		if err == nil && has != nil {
			err = filters.add(i, prog)
		}
		if err != nil {
			return fmt.Errorf("interface %s: %w", i.Name, err)
		}
	}
	return nil
}

func (d *Datapath) replaceTCX(r *Record) error {
	dir := d.netnsLinks(r.Cookie)
	links, err := tcLinks(dir)
	if err != nil || len(links) == 0 {
		return err
	}
	prog, err := d.tcProgram()
	if err != nil {
		return err
	}
	for _, i := range links {
		if err := replaceAt(tcLinkPath(dir, i), prog); err != nil {
			return err
		}
	}
	return nil
}

// nextStamp is the pin of a stamp program until it has its place.
const nextStamp = "next-program"

// replaceStamp replaces the pod's stamp program by our own of the same slot, if it may
// be of other code. It comes behind sk_lookup's: as long as that is ours, so is this.
func (d *Datapath) replaceStamp(r *Record) error {
	others, err := otherBuilds(d.opts)
	if err != nil {
		return err
	}
	differs := false
	for _, name := range others {
		twin, err := d.twin(name)
		if err != nil {
			return err
		}
		same, err := d.sameStamps(name)
		if err != nil {
			return err
		}
		differs = differs || twin && !same
	}
	if !differs {
		return nil
	}
	dir := d.netnsLinks(r.Cookie)
	slot, err := d.ownStamp(dir)
	if err != nil || slot == 0 {
		return err
	}
	next := filepath.Join(dir, nextStamp)
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	prog, err := d.loadStamp(slot)
	if err != nil {
		return err
	}
	defer prog.close()
	if err := prog.pin(next); err != nil {
		return err
	}
	if err := replaceAt(filepath.Join(dir, stampLink), prog); err != nil {
		return err
	}
	return os.Rename(next, stampPath(dir, slot))
}

func (d *Datapath) replaceSkLookup(r *Record) error {
	prog, err := d.object(bpf.ShuntProgShuntSkLookup)
	if err != nil {
		return err
	}
	return replaceAt(filepath.Join(d.netnsLinks(r.Cookie), skLookupLink), prog)
}

// replaceCgroup replaces all that is linked to the pod's cgroup, whether this pod
// needs it or another sandbox did.
func (d *Datapath) replaceCgroup(r *Record) error {
	for _, h := range slices.Concat(hooks, dnsHooks) {
		prog, err := d.object(h.program)
		if err != nil {
			return err
		}
		if err := replaceAt(filepath.Join(d.cgroupLinks(r.CgroupID), h.program), prog); err != nil {
			return err
		}
	}
	return nil
}

// unlinkUnknown detaches what this build has not: a later one's. The pod has no
// need of it any more.
func (d *Datapath) unlinkUnknown(r *Record) error {
	dir := d.cgroupLinks(r.CgroupID)
	keep := map[string]bool{".": true, "..": true}
	for _, h := range slices.Concat(hooks, dnsHooks) {
		keep[h.program], keep[h.program+"-new"] = true, true
	}
	return eachName(dir, func(name string) error {
		if keep[name] {
			return nil
		}
		return unlink(filepath.Join(dir, name))
	})
}

// rename has the record say that the pod's datapath is this one. What another
// build has written there besides stays as it is.
func (d *Datapath) rename(r *Record) error {
	path := d.recordPath(r.ID)
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read the attachment's record: %w", err)
	}
	own := filepath.Base(d.dir)
	// No string can have this within: its quotes would be escaped.
	was, is := `,"Build":"`+r.Build+`"`, `,"Build":"`+own+`"`
	if !bytes.Contains(data, []byte(was)) {
		return fmt.Errorf("the attachment's record %s does not name its datapath as %s", path, was[1:])
	}
	if err := replace(path, bytes.Replace(data, []byte(was), []byte(is), 1)); err != nil {
		return fmt.Errorf("write the attachment's record: %w", err)
	}
	r.Build = own
	return nil
}

// meetOthers sees, before an attachment is made, to what other builds have made of
// the same attachment, old, or in the same network namespace: a twin's is moved;
// one whose maps this build can't write is left alone, and this is an error.
func (d *Datapath) meetOthers(old, r *Record) error {
	if _, err := os.Lstat(d.netnsLinks(r.Cookie)); errors.Is(err, fs.ErrNotExist) {
		return nil // nobody has made anything there: the common case
	}
	if old != nil && old.Cookie == r.Cookie && old.Build != r.Build {
		epoch, err := d.epoch(old.Build)
		if err != nil {
			return err
		}
		if epoch == old.Epoch {
			return d.move(old)
		}
	}
	others, err := otherBuilds(d.opts)
	if err != nil || len(others) == 0 {
		return err
	}
	records, err := Records(d.opts)
	if err != nil {
		return err
	}
	for _, o := range records {
		if o.Cookie != r.Cookie || o.ID == r.ID || o.Epoch == r.Epoch {
			continue
		}
		epoch, err := d.epoch(o.Build)
		if err != nil {
			return err
		}
		if epoch == o.Epoch {
			return fmt.Errorf("attachment %v of the same network namespace: %w", o.ID, errLayout)
		}
	}
	return nil
}

// foreign reports whether what lies in the maps of a datapath can't be read as this
// build has it.
func (d *Datapath) foreign() (bool, error) {
	name := filepath.Base(d.dir)
	if name == d.opts.build().dir {
		return false, nil
	}
	l, err := d.layoutOf(name)
	return err == nil && !parseLayout(d.opts.build().layout).like(l), err
}

// removeForeign deletes the entries of a pod in maps that are laid out otherwise,
// as far as their keys are the same. The rest goes with the maps.
func (d *Datapath) removeForeign(r *Record) error {
	l, err := d.layoutOf(filepath.Base(d.dir))
	if err != nil {
		return err
	}
	own := parseLayout(d.opts.build().layout)
	var errs []error
	for _, name := range []string{bpf.ShuntMapPods, bpf.ShuntMapStates} {
		m, err := d.object(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var mi *mapInfo
		if err == nil {
			mi, err = info[mapInfo](m)
		}
		if err == nil && uintptr(mi.keySize) == cookieSize {
			err = remove(m, &r.Cookie)
		}
		errs = append(errs, err)
	}
	if l[bpf.ShuntMapDests] == own[bpf.ShuntMapDests] && l[bpf.ShuntMapPorts] == own[bpf.ShuntMapPorts] {
		errs = append(errs, d.removeRules(r.Cookie, &r.Rules))
	}
	if l[bpf.ShuntMapInflight] == own[bpf.ShuntMapInflight] {
		errs = append(errs, d.removeInflight(r.Cookie))
	}
	return errors.Join(errs...)
}

const cookieSize = 8
