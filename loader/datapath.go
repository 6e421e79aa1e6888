// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/rundir"
)

// Options say where a node's datapath lives.
type Options struct {
	BPFDir string // a directory in a bpffs, for pins; made, 0700, when missing
	RunDir string // for the lock and the records of attachments; made, 0700, when missing
	Log    *slog.Logger

	// InflightLimit is how many handshakes with its proxy one pod may have
	// under way at once; 0 is the default of the programs. It takes effect
	// at the load.
	InflightLimit uint32

	// NoTCX has TC programs attached as on a kernel without TCX links.
	NoTCX bool

	maxPrefixes uint32 // of the prefix maps, for tests of full ones
	otherBuild  *build // whose datapath it is, for tests of several
}

const bpffsRoot = "/sys/fs/bpf"

// loadPrefix begins the name of a datapath's directory until it is whole.
const loadPrefix = "load-"

// A Datapath is the node's loaded programs and maps, and the right to change
// them: the node's lock is held from Open to Close.
type Datapath struct {
	opts    Options
	dir     string // of the pinned maps and programs of this build
	release func()
	fds     map[string]fd // opened pins, by name
}

// Open takes the node's lock and loads the datapath, unless it is loaded. Where pods
// use another build's, this one's is loaded beside it.
func Open(ctx context.Context, opts Options) (_ *Datapath, err error) {
	d := newDatapath(opts)
	if err := rundir.Make(opts.RunDir); err != nil {
		return nil, fmt.Errorf("runDir: %w", err)
	}
	d.release, err = lock(ctx, opts.RunDir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if err := rundir.Check(opts.BPFDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("bpfDir: %w", err)
	}
	// The common case costs one look-up.
	if _, err := os.Stat(d.dir); err == nil {
		return d, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("bpfDir: %w", err) // one that is there can't be loaded again
	}
	if err := d.refusedBefore(); err != nil {
		return nil, fmt.Errorf("load the datapath: %w", err)
	}
	if err := d.makeBPFDir(); err != nil {
		return nil, err
	}
	if err := d.removeUnused(); err != nil {
		return nil, err
	}
	if err := d.load(); err != nil {
		d.noteRefusal(err)
		return nil, fmt.Errorf("load the datapath: %w", err)
	}
	return d, nil
}

func newDatapath(opts Options) *Datapath {
	return &Datapath{opts: opts, dir: filepath.Join(opts.BPFDir, opts.build().dir), fds: map[string]fd{}}
}

// openForRemoval is Open without the load: what is not there needs no removal.
func openForRemoval(ctx context.Context, opts Options) (_ *Datapath, err error) {
	d := newDatapath(opts)
	d.release, err = lock(ctx, opts.RunDir)
	return d, err
}

// Close releases the node's lock.
func (d *Datapath) Close() {
	for name, f := range d.fds {
		f.close()
		delete(d.fds, name)
	}
	if d.release != nil {
		d.release()
		d.release = nil
	}
}

// object opens a pinned map or program of this build.
func (d *Datapath) object(name string) (fd, error) {
	if f, ok := d.fds[name]; ok {
		return f, nil
	}
	f, err := getPin(d.dir + "/" + name)
	if err != nil {
		return -1, err
	}
	d.fds[name] = f
	return f, nil
}

// makeBPFDir makes BPFDir, and mounts a bpffs at the usual place when it is
// meant to lie there and none is.
func (d *Datapath) makeBPFDir() error {
	parent := d.opts.BPFDir
	for {
		if _, err := os.Stat(parent); err == nil {
			break
		} else if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%w: bpfDir: %w", ErrNoBPFFS, err)
		}
		parent = filepath.Dir(parent)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(parent, &st); err != nil {
		return fmt.Errorf("%w: bpfDir: statfs %s: %w", ErrNoBPFFS, parent, err)
	}
	if st.Type != unix.BPF_FS_MAGIC {
		if !strings.HasPrefix(d.opts.BPFDir+"/", bpffsRoot+"/") {
			return fmt.Errorf("%w: bpfDir: %s is not in one: mount one (mount -t bpf bpf %s)", ErrNoBPFFS, d.opts.BPFDir, filepath.Dir(d.opts.BPFDir))
		}
		if err := unix.Mount("bpf", bpffsRoot, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("%w: bpfDir: none is mounted at %s, and mounting one fails: %w", ErrNoBPFFS, bpffsRoot, err)
		}
	}
	if err := os.MkdirAll(d.opts.BPFDir, 0o700); err != nil {
		return fmt.Errorf("%w: bpfDir: %w", ErrNoBPFFS, err)
	}
	return nil
}

// load loads everything into the kernel and pins it in a temporary directory.
// The last step gives that its name: until then nothing has happened that
// removeUnused would not clear away.
func (d *Datapath) load() (err error) {
	start := time.Now()
	h, err := d.inherit()
	if err != nil {
		return err
	}
	defer h.close()
	objs, err := d.loadObjects(h.maps)
	if errors.Is(err, ebpf.ErrMapIncompatible) {
		d.opts.Log.Warn("another build's maps are not as it says: its pods keep its programs until they end", "error", err)
		h.epoch = newEpoch()
		objs, err = d.loadObjects(nil)
	}
	if err != nil {
		return err
	}
	defer objs.Close()
	// bpffs refuses names with a dot.
	tmp := filepath.Join(d.opts.BPFDir, fmt.Sprintf("%s%d", loadPrefix, os.Getpid()))
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	for name, o := range pinned(objs) {
		if err := o.Pin(filepath.Join(tmp, name)); err != nil {
			return err
		}
	}
	if err := os.Mkdir(filepath.Join(tmp, stampsDir), 0o700); err != nil {
		return err
	}
	for name, target := range map[string]string{epochLink: h.epoch, layoutLink: d.opts.build().layout} {
		if err := os.Symlink(target, filepath.Join(tmp, name)); err != nil {
			return err
		}
	}
	loaded := d.in(tmp)
	defer loaded.closeFDs()
	for range stampsAtStart {
		_, prog, err := loaded.newStamp(func(slot uint32) string {
			return filepath.Join(tmp, stampsDir, strconv.FormatUint(uint64(slot), 10))
		})
		if err != nil {
			return err
		}
		prog.close()
	}
	if err := os.Rename(tmp, d.dir); err != nil {
		return err
	}
	d.opts.Log.Info("datapath loaded", "dir", d.dir, "took", time.Since(start))
	return nil
}

type pinner interface{ Pin(string) error }

// objects are a loaded collection, with the map of its variables.
type objects struct {
	bpf.ShuntObjects
	Tracing *ebpf.Map `ebpf:".data.trace"`
}

func (o *objects) Close() error {
	return errors.Join(o.ShuntObjects.Close(), o.Tracing.Close())
}

func pinned(o *objects) map[string]pinner {
	return map[string]pinner{
		tracingPin:                     o.Tracing,
		bpf.ShuntMapRings:              o.Rings,
		bpf.ShuntMapPods:               o.Pods,
		bpf.ShuntMapDests:              o.Dests,
		bpf.ShuntMapPorts:              o.Ports,
		bpf.ShuntMapStates:             o.States,
		bpf.ShuntMapErrors:             o.Errors,
		bpf.ShuntMapSockets:            o.Sockets,
		bpf.ShuntMapResolvers:          o.Resolvers,
		bpf.ShuntMapInflight:           o.Inflight,
		bpf.ShuntMapListeners:          o.Listeners,
		bpf.ShuntMapStamps:             o.Stamps,
		bpf.ShuntMapSlots:              o.Slots,
		bpf.ShuntProgShuntConnect4:     o.ShuntConnect4,
		bpf.ShuntProgShuntConnect6:     o.ShuntConnect6,
		bpf.ShuntProgShuntGetpeername4: o.ShuntGetpeername4,
		bpf.ShuntProgShuntGetpeername6: o.ShuntGetpeername6,
		bpf.ShuntProgShuntSendmsg4:     o.ShuntSendmsg4,
		bpf.ShuntProgShuntSendmsg6:     o.ShuntSendmsg6,
		bpf.ShuntProgShuntRecvmsg4:     o.ShuntRecvmsg4,
		bpf.ShuntProgShuntRecvmsg6:     o.ShuntRecvmsg6,
		bpf.ShuntProgShuntGetsockopt:   o.ShuntGetsockopt,
		bpf.ShuntProgShuntSockops:      o.ShuntSockops,
		bpf.ShuntProgShuntSkLookup:     o.ShuntSkLookup,
		bpf.ShuntProgShuntAdopt:        o.ShuntAdopt,
		bpf.ShuntProgShuntLook:         o.ShuntLook,
	}
}

// loadObjects loads the collection, with maps that are there already in the place
// of its own. The stamp program in it serves no pod: loading it shows at once
// whether a pod's own would be accepted.
func (d *Datapath) loadObjects(maps map[string]*ebpf.Map) (*objects, error) {
	// bpf_set_retval is there since Linux 5.18 (commit b44123b4a3dc),
	// bpf_skc_to_mptcp_sock since 5.19 (3bc253c2e652), if it has MPTCP. What
	// they do can be done without: try with them first.
	var first error
	for _, have := range []struct{ mptcp, setRetval bool }{{true, true}, {false, true}, {false, false}} {
		spec, err := bpf.LoadShunt()
		if err != nil {
			return nil, err
		}
		err = errors.Join(
			spec.Variables[bpf.ShuntVarHaveMptcp].Set(have.mptcp),
			spec.Variables[bpf.ShuntVarHaveSetRetval].Set(have.setRetval),
		)
		if err != nil {
			return nil, err
		}
		if d.opts.InflightLimit != 0 {
			if err := spec.Variables[bpf.ShuntVarInflightLimit].Set(d.opts.InflightLimit); err != nil {
				return nil, err
			}
		}
		d.sizeMaps(spec)
		withoutTC(spec)
		objs := new(objects)
		if err = spec.LoadAndAssign(objs, &ebpf.CollectionOptions{MapReplacements: maps}); err == nil {
			return objs, nil
		}
		if errors.Is(err, unix.EPERM) {
			return nil, classify(err)
		}
		if first == nil {
			first = err
		}
		// Only a refusal by the verifier can be due to a missing helper.
		var refused *ebpf.VerifierError
		if !errors.As(err, &refused) && !errors.Is(err, ebpf.ErrNotSupported) {
			break
		}
	}
	return nil, classify(first)
}

func (d *Datapath) sizeMaps(spec *ebpf.CollectionSpec) {
	if d.opts.maxPrefixes != 0 {
		spec.Maps[bpf.ShuntMapDests].MaxEntries = d.opts.maxPrefixes
		spec.Maps[bpf.ShuntMapPorts].MaxEntries = d.opts.maxPrefixes
	}
}
