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

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/rundir"
	"shunt.dev/shunt/loader/internal/load"
)

// Programs loads the programs into the kernel: package loader/programs has the one
// that does. The library that it takes costs a process more, at its start, than all
// that is done for a pod: so the plugin has none.
type Programs = load.Programs

// Options say where a node's datapath lives.
type Options struct {
	BPFDir string // a directory in a bpffs, for pins; made, 0700, when missing
	RunDir string // for the lock and the records of attachments; made, 0700, when missing
	Log    *slog.Logger

	// InflightLimit is how many handshakes with its proxy one pod may have
	// under way at once; 0 is the default of the programs. It takes effect
	// at the load.
	InflightLimit uint32

	// Programs loads them: package loader/programs's, or nil in a process that loads
	// nothing. Where that would have to, it fails with ErrNoPrograms.
	Programs Programs

	// NoTCX has TC programs attached as on a kernel without TCX links.
	NoTCX bool

	maxPrefixes uint32 // of the prefix maps, for tests of full ones
	otherBuild  *build // whose datapath it is, for tests of several
}

// BPFFSRoot is where a bpffs is mounted as a rule.
const BPFFSRoot = "/sys/fs/bpf"

// TracingPin is the pin of the variable that switches tracing on.
const TracingPin = load.TracingPin

// ThisBuild names this build's datapath, as records do.
func ThisBuild() string { return datapathPrefix + bpf.Digest[:16] }

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
	if opts.Programs == nil {
		return nil, fmt.Errorf("load the datapath: %w", ErrNoPrograms)
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

// request is what a load is to be like.
func (d *Datapath) request(dir string) load.Request {
	return load.Request{Dir: dir, InflightLimit: d.opts.InflightLimit, MaxPrefixes: d.opts.maxPrefixes}
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
		if !strings.HasPrefix(d.opts.BPFDir+"/", BPFFSRoot+"/") {
			return fmt.Errorf("%w: bpfDir: %s is not in one: mount one (mount -t bpf bpf %s)", ErrNoBPFFS, d.opts.BPFDir, filepath.Dir(d.opts.BPFDir))
		}
		if err := unix.Mount("bpf", BPFFSRoot, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
			return fmt.Errorf("%w: bpfDir: none is mounted at %s, and mounting one fails: %w", ErrNoBPFFS, BPFFSRoot, err)
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
	req := d.request(tmp)
	req.Maps = h.maps
	err = d.opts.Programs.Load(req)
	if errors.Is(err, load.ErrIncompatible) {
		d.opts.Log.Warn("another build's maps are not as it says: its pods keep its programs until they end", "error", err)
		h.epoch = newEpoch()
		req.Maps = nil
		err = d.opts.Programs.Load(req)
	}
	if err != nil {
		return err
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
