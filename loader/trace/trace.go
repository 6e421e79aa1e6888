// SPDX-License-Identifier: Apache-2.0

// Package trace shows how the programs decide, as they do.
package trace

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
)

const (
	// traceRing is the size of a tracer's ring buffer: about ten thousand decisions.
	traceRing = 1 << 20
	// A tracer moves its deadline on every traceRenewal. One that was killed is
	// gone after traceTime.
	traceRenewal = time.Second
	traceTime    = 3 * time.Second
)

// ErrTracers says that as many trace as can at once.
var ErrTracers = errors.New("others trace already")

// maxTracedPods is how many network namespaces a tracer can name.
const maxTracedPods = len(bpf.ShuntTrace{}.Tracers[0].Pods)

// noPod is no network namespace's cookie.
const noPod = ^uint64(0)

// A Decision is how a program has decided a flow.
type Decision struct {
	Time   time.Time
	Cookie uint64 // the pod's network namespace
	// Rule is RULE_NONE where something failed before there was one.
	Rule bpf.ShuntRule
	// Failure says why the flow was refused, whatever the rule says; nil: it wasn't.
	Failure  *loader.ErrorCount
	Protocol int            // IPPROTO_TCP or IPPROTO_UDP
	Dst      netip.AddrPort // the original destination; port 0: it can't be read
	// Inbound: the client, and the index of the interface that it came by, which
	// is 0 outbound.
	Src       netip.AddrPort
	Interface int
	// Outbound: who connects, by its number on the host, and the socket's owner,
	// as the host numbers it.
	PID      int
	Command  string // as the kernel has it: 15 characters
	UID, GID uint32
}

// A Filter says which decisions a tracer gets.
type Filter struct {
	Rules []bpf.ShuntRule
	// Pods are the cookies of network namespaces, 4 at most; nil: of every pod.
	Pods []uint64
	// Ring is the size of the ring buffer in bytes, a power of two of pages; 0: a
	// MiB. It can't be changed.
	Ring uint32
}

// A Tracer gets decisions as they fall. While there is none, a decision costs the
// programs one load and one branch. Of what it doesn't fetch in time the kernel
// keeps as much as its ring buffer holds, and counts the rest.
//
// It traces this build's datapath, also one that is loaded later, or anew.
type Tracer struct {
	opts   loader.Options
	seat   int
	ring   *ebpf.Map
	reader *ringbuf.Reader
	leave  func() // the seat
	stop   chan struct{}
	done   chan struct{}

	mu     sync.Mutex // of all below
	filter Filter
	at     *traced // nil: no datapath is loaded
	lost   uint64
	failed error // of the last renewal
}

// A traced is one load of the datapath with a tracer in it.
type traced struct {
	epoch  string
	memory []byte
	rings  *ebpf.Map
	counts uint64 // of lost decisions, when it was looked at last
}

func (x *traced) trace() *bpf.ShuntTrace {
	return (*bpf.ShuntTrace)(unsafe.Pointer(unsafe.SliceData(x.memory)))
}

// New begins to trace. Four can at once on a node, else the error is ErrTracers.
func New(opts loader.Options, filter Filter) (_ *Tracer, err error) {
	t := &Tracer{opts: opts, stop: make(chan struct{}), done: make(chan struct{})}
	if err := t.setFilter(filter); err != nil {
		return nil, err
	}
	if t.seat, t.leave, err = takeSeat(opts.RunDir); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.free())
		}
	}()
	t.ring, err = ebpf.NewMap(&ebpf.MapSpec{Name: "shunt_trace", Type: ebpf.RingBuf, MaxEntries: cmp.Or(filter.Ring, traceRing)})
	if err != nil {
		return nil, fmt.Errorf("make a ring buffer: %w", programs.Classify(err))
	}
	if t.reader, err = ringbuf.NewReader(t.ring); err != nil {
		return nil, fmt.Errorf("read a ring buffer: %w", err)
	}
	if err := t.renew(); err != nil {
		return nil, err
	}
	go func() {
		defer close(t.done)
		tick := time.NewTicker(traceRenewal)
		defer tick.Stop()
		for {
			select {
			case <-t.stop:
				return
			case <-tick.C:
				t.mu.Lock()
				t.failed = t.renew()
				t.mu.Unlock()
			}
		}
	}()
	return t, nil
}

// takeSeat takes one of a node's seats for tracers: a lock on one byte of the
// node's lock file, beside the lock of the whole file, with which it has nothing to
// do. The kernel releases it when the process ends, however it ends.
func takeSeat(runDir string) (int, func(), error) {
	if err := os.MkdirAll(runDir, 0o700); err != nil {
		return 0, nil, err
	}
	path := filepath.Join(runDir, "lock")
	f, err := unix.Open(path, unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return 0, nil, fmt.Errorf("open the node's lock: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	for seat := range len(bpf.ShuntTrace{}.Tracers) {
		err := unix.FcntlFlock(uintptr(f), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: int64(seat), Len: 1})
		switch {
		case err == nil:
			return seat, func() { unix.Close(f) }, nil
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES):
			unix.Close(f)
			return 0, nil, fmt.Errorf("lock a byte of %s: %w", path, err)
		}
	}
	unix.Close(f)
	return 0, nil, fmt.Errorf("%w: %d of them, and no more can on a node", ErrTracers, len(bpf.ShuntTrace{}.Tracers))
}

func (t *Tracer) setFilter(f Filter) error {
	if len(f.Pods) > maxTracedPods {
		return fmt.Errorf("trace %d network namespaces: %d can be named at once", len(f.Pods), maxTracedPods)
	}
	t.filter = f
	return nil
}

// SetPods changes whose decisions the tracer gets, as in Filter.
func (t *Tracer) SetPods(pods []uint64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.filter
	f.Pods = pods
	if err := t.setFilter(f); err != nil {
		return err
	}
	if t.at != nil {
		t.writeFilter()
	}
	return nil
}

func (t *Tracer) writeFilter() {
	seat := &t.at.trace().Tracers[t.seat]
	var rules uint32
	for _, r := range t.filter.Rules {
		rules |= 1 << r
	}
	atomic.StoreUint32(&seat.Rules, rules)
	for i := range seat.Pods {
		var pod uint64
		switch {
		case i < len(t.filter.Pods):
			pod = t.filter.Pods[i]
		case t.filter.Pods != nil:
			pod = noPod
		}
		atomic.StoreUint64(&seat.Pods[i], pod)
	}
}

func monotonic() uint64 {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // it is always there
	return uint64(now.Nano())
}

// renew moves the tracer's deadline on in the datapath that is loaded now.
func (t *Tracer) renew() error {
	epoch, err := loader.Epoch(t.opts, loader.ThisBuild())
	if err != nil {
		return err
	}
	if t.at != nil && t.at.epoch != epoch {
		t.countLost()
		if err := errors.Join(t.at.without(t.seat), t.at.close()); err != nil {
			return err
		}
		t.at = nil
	}
	if epoch == "" {
		return nil
	}
	if t.at == nil {
		dir := filepath.Join(t.opts.BPFDir, loader.ThisBuild())
		if t.at, err = t.enter(dir, epoch); err != nil {
			return fmt.Errorf("trace the datapath %s: %w", dir, err)
		}
	}
	until := monotonic() + uint64(traceTime)
	atomic.StoreUint64(&t.at.trace().Tracers[t.seat].Until, until)
	atomic.StoreUint64(&t.at.trace().On, until)
	return nil
}

// enter takes the tracer's seat in a datapath, but for the deadline.
func (t *Tracer) enter(dir, epoch string) (_ *traced, err error) {
	variable, err := ebpf.LoadPinnedMap(filepath.Join(dir, loader.TracingPin), nil)
	if err != nil {
		return nil, err
	}
	defer variable.Close()
	x := &traced{epoch: epoch}
	x.memory, err = unix.Mmap(variable.FD(), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s into memory: %w", loader.TracingPin, err)
	}
	if x.rings, err = ebpf.LoadPinnedMap(filepath.Join(dir, bpf.ShuntMapRings), nil); err != nil {
		return nil, errors.Join(err, unix.Munmap(x.memory))
	}
	// One who was killed may have this seat for a moment still.
	seat := &x.trace().Tracers[t.seat]
	atomic.StoreUint64(&seat.Until, 0)
	if err := x.rings.Put(uint32(t.seat), t.ring); err != nil {
		return nil, errors.Join(fmt.Errorf("give the programs a ring buffer: %w", err), x.close())
	}
	x.counts = atomic.LoadUint64(&seat.Lost)
	t.at = x
	t.writeFilter()
	return x, nil
}

// without takes the ring buffer of a seat away from the programs.
func (x *traced) without(seat int) error {
	err := x.rings.Delete(uint32(seat))
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

func (x *traced) close() error {
	return errors.Join(x.rings.Close(), unix.Munmap(x.memory))
}

func (t *Tracer) countLost() {
	if t.at == nil {
		return
	}
	now := atomic.LoadUint64(&t.at.trace().Tracers[t.seat].Lost)
	t.lost += now - t.at.counts
	t.at.counts = now
}

// Loaded says whether there is a datapath to trace.
func (t *Tracer) Loaded() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.at != nil
}

// Lost gives how many decisions the ring buffer had no room for since it was asked
// last.
func (t *Tracer) Lost() uint64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.countLost()
	n := t.lost
	t.lost = 0
	return n
}

// Read waits for the next decision until deadline; the error is
// os.ErrDeadlineExceeded then.
func (t *Tracer) Read(deadline time.Time) (Decision, error) {
	for {
		t.mu.Lock()
		err, filter := t.failed, t.filter
		t.mu.Unlock()
		if err != nil {
			return Decision{}, err
		}
		t.reader.SetDeadline(deadline)
		r, err := t.reader.Read()
		if err != nil {
			return Decision{}, err
		}
		d, err := decision(r.RawSample)
		// What was on its way when the filter changed, or the seat changed hands.
		if err != nil || filter.wants(&d) {
			return d, err
		}
	}
}

func (f *Filter) wants(d *Decision) bool {
	named := f.Pods == nil
	for _, pod := range f.Pods {
		named = named || pod == d.Cookie
	}
	for _, r := range f.Rules {
		if r == d.Rule {
			return named
		}
	}
	return false
}

// decision reads an event of the programs'.
func decision(raw []byte) (Decision, error) {
	var e bpf.ShuntEvent
	if len(raw) < int(unsafe.Sizeof(e)) {
		return Decision{}, fmt.Errorf("a decision of %d bytes: want %d", len(raw), unsafe.Sizeof(e))
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&e)), unsafe.Sizeof(e)), raw)
	d := Decision{
		Time:   time.Now().Add(time.Duration(int64(e.Time - monotonic()))),
		Cookie: e.Cookie, Rule: bpf.ShuntRule(e.How & 0xff), Protocol: int(e.Protocol),
		Dst:       netip.AddrPortFrom(plainAddr(e.Dst.W), e.Dport),
		Interface: int(e.Ifindex),
	}
	if d.Interface != 0 {
		d.Src = netip.AddrPortFrom(plainAddr(e.Src.W), e.Sport)
	} else {
		d.PID, d.UID, d.GID = int(e.Pid), e.Uid, e.Gid
		d.Command = unix.ByteSliceToString((*[len(e.Comm)]byte)(unsafe.Pointer(&e.Comm))[:])
	}
	if place := bpf.ShuntPlace(e.How >> 8 & 0xff); place != 0 {
		d.Failure = &loader.ErrorCount{Cookie: e.Cookie, Place: place, Errno: unix.Errno(e.How >> 16), Count: 1}
	}
	return d, nil
}

// plainAddr reads a struct addr.
func plainAddr(w [4]uint32) netip.Addr {
	return netip.AddrFrom16(*(*[16]byte)(unsafe.Pointer(&w))).Unmap()
}

// Close ends the tracing.
func (t *Tracer) Close() error {
	close(t.stop)
	<-t.done
	return t.free()
}

func (t *Tracer) free() error {
	var errs []error
	if t.at != nil {
		// The last one to leave is noticed by the next decision.
		atomic.StoreUint64(&t.at.trace().Tracers[t.seat].Until, 0)
		errs = append(errs, t.at.without(t.seat), t.at.close())
	}
	if t.reader != nil {
		errs = append(errs, t.reader.Close())
	}
	if t.ring != nil {
		errs = append(errs, t.ring.Close())
	}
	t.leave()
	return errors.Join(errs...)
}
