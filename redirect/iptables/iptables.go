// SPDX-License-Identifier: Apache-2.0

// Package iptables is the backend that redirects with iptables: it renders a
// Policy as rules (Render) and has the node's iptables programs put them into
// the pod's network namespace.
//
// Both of the kernel's packet filters are served, nf_tables (iptables-nft) and
// the older one (iptables-legacy). A node is found to be of one mode once; see
// Options.
package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	records "shunt.dev/shunt/redirect/iptables/record"
)

// Options say how a node's backend works.
type Options struct {
	// RunDir holds the records of attachments, their lock, and which mode the
	// node was found to be of.
	RunDir string
	// Mode is the netconf's iptablesBackend. Auto, also the zero value, takes
	// the programs that the node prefers, and others where those don't work.
	Mode Mode
	// Path is where the programs are looked for, as $PATH has it; empty:
	// DefaultPath.
	Path string
	// Timeout bounds the run of each program; 0: 10 s.
	Timeout time.Duration
	Log     *slog.Logger
}

// A Backend redirects with iptables. It is a redirect.Backend. It may not be
// used from several goroutines at once.
type Backend struct {
	opts     Options
	found    *tools       // once looked for
	held     int          // the lock's descriptor while it is held, else -1
	children atomic.Int64 // how many programs have been started
}

var _ redirect.Backend = (*Backend)(nil)

// New returns the backend of a node.
func New(opts Options) *Backend {
	if opts.Mode == "" {
		opts.Mode = Auto
	}
	if opts.Path == "" {
		opts.Path = DefaultPath
	}
	if opts.Timeout == 0 {
		opts.Timeout = defaultTimeout
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Backend{opts: opts, held: -1}
}

// Ready looks for the node's programs, unless that was done: it fails where
// Apply would fail for any pod.
func (b *Backend) Ready(ctx context.Context) error {
	_, err := b.tools(ctx)
	return err
}

// Mode is Ready, and says of which mode the node is.
func (b *Backend) Mode(ctx context.Context) (Mode, error) {
	t, err := b.tools(ctx)
	if err != nil {
		return "", err
	}
	return t.Mode, nil
}

// Apply programs the target. A pod that has nothing of ours costs one program
// for each of its families; one that has, two, and what is right is left alone.
//
// On error nothing is left programmed, except in a pod that an earlier Apply
// has programmed to its end: that one stays redirected.
func (b *Backend) Apply(ctx context.Context, t redirect.Target, p *redirect.Policy) error {
	return b.apply(ctx, t, p, false)
}

// TakeOver is Apply for a pod that another backend redirects so far: on error
// that has all that it had, what they share and what Yield has left.
func (b *Backend) TakeOver(ctx context.Context, t redirect.Target, p *redirect.Policy) error {
	return b.apply(ctx, t, p, true)
}

func (b *Backend) apply(ctx context.Context, t redirect.Target, p *redirect.Policy, over bool) (err error) {
	unlock, err := b.lock(ctx, t.Attachment)
	if err != nil {
		return err
	}
	defer unlock()
	n, err := openNamespace(t.Netns)
	if err != nil {
		return err
	}
	defer n.close()
	programs, err := b.tools(ctx)
	if err != nil {
		return err
	}
	before, err := readRecord(b.recordPath(t.Attachment))
	if err != nil {
		return err
	}
	if before != nil && !before.of(n) {
		before = nil // what it speaks of has gone with its namespace
	}

	r := &record{
		Attachment: t.Attachment, Network: t.Network, Pod: t.Pod,
		Netns: t.Netns, Inode: n.inode, Cookie: n.cookie, Boot: loader.BootID(),
		Mode: programs.Mode, TProxy: p.Mode == redirect.ModeTProxy,
		S6: n.ipv6 && n.has6,
	}
	want := map[Family][]table{}
	for _, f := range n.families() {
		want[f] = build(p, f)
		if text := Render(p, f); f == IPv6 {
			r.IPv6 = text
		} else {
			r.IPv4 = text
		}
	}
	if r.TProxy {
		if before != nil && before.TProxy {
			if r.Sysctls, err = n.tproxy(n.families()).Before(before.Sysctls); err != nil {
				return err
			}
		} else if r.Sysctls, err = n.tproxy(n.families()).Sysctls(); err != nil {
			return err
		}
	}
	own := *r // what goes again on error
	if over {
		if err := own.spare(n); err != nil {
			return err
		}
	}
	if err := b.writeRecord(r); err != nil {
		return err
	}
	defer func() {
		switch {
		case err == nil:
		case before != nil && before.Done && !before.Kept:
			err = errors.Join(err, b.writeRecord(before))
		case over && before != nil && before.Kept:
			err = errors.Join(err, b.keepAgain(ctx, n, before, &own))
		default:
			err = errors.Join(err, b.undo(ctx, n, &own))
		}
	}()
	if err := n.prepare(r); err != nil {
		return err
	}
	there, err := n.traces()
	if err != nil {
		return err
	}
	err = each(r.families(), func(f Family) error {
		return b.program(ctx, n, programs, f, want[f], r.rules(f), there.of(programs.Mode))
	})
	if err != nil {
		return err
	}
	// Only now, that the pod is redirected by the one, is the other done with.
	if m := programs.Mode.other(); there.of(m) {
		if err := b.sweep(ctx, n, m, before != nil && before.Mode == m); err != nil {
			return err
		}
	}
	if before != nil && before.TProxy && !r.TProxy {
		if err := n.unprepare(&record{TProxy: true, Sysctls: before.Sysctls, IPv4: before.IPv4, IPv6: before.IPv6}); err != nil {
			return err
		}
	}
	r.Done = true
	return b.writeRecord(r)
}

// Restore makes again what Apply has made besides rules, where that is in force:
// another backend that failed to take over has undone what it shares with this one.
// The caller's time may be up: it has a time of its own.
func (b *Backend) Restore(ctx context.Context, a redirect.Attachment) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.opts.Timeout)
	defer cancel()
	unlock, err := b.lock(ctx, a)
	if err != nil {
		return err
	}
	defer unlock()
	r, err := readRecord(b.recordPath(a))
	if err != nil || r == nil || r.Kept || !r.Done {
		return err
	}
	n, err := r.open()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNotNamespace):
		return nil
	case err != nil:
		return err
	}
	defer n.close()
	if !r.of(n) {
		return nil
	}
	return n.prepare(r)
}

// program makes the rules of a family so.
func (b *Backend) program(ctx context.Context, n *namespace, t *tools, f Family, want []table, text string, traces bool) error {
	if traces {
		got, err := b.read(ctx, n, t, f)
		if err != nil {
			return err
		}
		if text = mend(want, got); text == "" {
			return nil
		}
	}
	if _, err := b.run(ctx, n, text, t.restore(f), "--noflush"); err != nil {
		return fmt.Errorf("program the pod's %v: %w", f, err)
	}
	return nil
}

// read gives what is ours in the namespace.
func (b *Backend) read(ctx context.Context, n *namespace, t *tools, f Family) (*found, error) {
	text, err := b.run(ctx, n, "", t.save(f))
	if err != nil {
		return nil, fmt.Errorf("read the pod's %v rules: %w", f, err)
	}
	return parse(text), nil
}

// ofMode gives the programs of a mode, whichever the node's is.
func (b *Backend) ofMode(ctx context.Context, m Mode) (*tools, error) {
	if t, err := b.tools(ctx); err == nil && t.Mode == m {
		return t, nil
	}
	return b.named(ctx, m)
}

// named finds the programs of a mode by their names. It keeps nothing.
func (b *Backend) named(ctx context.Context, m Mode) (*tools, error) {
	t, err := b.find("-" + string(m))
	if err == nil {
		t.Mode = m
		return t, nil
	}
	plain, plainErr := b.find("")
	if plainErr == nil {
		if plain.Mode, plainErr = b.modeOf(ctx, plain.Restore4); plainErr == nil && plain.Mode == m {
			return plain, nil
		}
	}
	return nil, fmt.Errorf("find iptables programs of mode %s: %w (%s)", m, err, install)
}

// sweep removes what is ours in one mode, of both families: an address family
// that has been switched off may have been on before. sure says that there is
// something: legacy tables alone, which anybody may have made, are no reason to
// fail on a node without legacy programs.
func (b *Backend) sweep(ctx context.Context, n *namespace, m Mode, sure bool) error {
	t, err := b.ofMode(ctx, m)
	if errors.Is(err, ErrNotInstalled) && m == Legacy && !sure {
		return nil
	}
	if err != nil {
		return err
	}
	return each([]Family{IPv4, IPv6}, func(f Family) error {
		got, err := b.read(ctx, n, t, f)
		if err != nil || got.empty() {
			return err
		}
		if _, err := b.run(ctx, n, got.removal(), t.restore(f), "--noflush"); err != nil {
			return fmt.Errorf("remove the pod's %v rules: %w", f, err)
		}
		return nil
	})
}

// each calls fn for all families at once, because most of what it does is to
// start programs. An error of one does not stop the other.
func each(families []Family, fn func(f Family) error) error {
	errs := make([]error, len(families))
	var wg sync.WaitGroup
	for i, f := range families {
		wg.Go(func() { errs[i] = fn(f) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return oneLine(err)
	}
	return nil
}

// undo removes what a record speaks of, then the record. The caller's time may
// be up: it has a time of its own.
func (b *Backend) undo(ctx context.Context, n *namespace, r *record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.opts.Timeout)
	defer cancel()
	if others, err := b.shared(r); err != nil || others {
		return errors.Join(err, b.removeRecord(r))
	}
	if err := b.unprogram(ctx, n, r); err != nil {
		return err // the record stays, for Remove
	}
	return b.removeRecord(r)
}

func (b *Backend) unprogram(ctx context.Context, n *namespace, r *record) error {
	there, err := n.traces()
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range []Mode{r.Mode, r.Mode.other()} {
		if there.of(m) {
			errs = append(errs, b.sweep(ctx, n, m, m == r.Mode))
		}
	}
	return errors.Join(append(errs, n.unprepare(r))...)
}

// Knows reports whether Apply may have done something for an attachment that
// Remove has not undone.
func (b *Backend) Knows(a redirect.Attachment) bool {
	r, err := readRecord(b.recordPath(a))
	return r != nil || err != nil
}

// Remove undoes Apply. Where the namespace is gone, the rules went with it.
func (b *Backend) Remove(ctx context.Context, a redirect.Attachment) error {
	return b.remove(ctx, a, false, false)
}

// Yield is Remove for a pod that another backend redirects by now: what they
// share stays, which is ::6 on lo; and where the pod runs, until Remove, what its
// connections need that are redirected already.
func (b *Backend) Yield(ctx context.Context, a redirect.Attachment, running bool) error {
	return b.remove(ctx, a, true, running)
}

func (b *Backend) remove(ctx context.Context, a redirect.Attachment, yield, running bool) error {
	r, err := readRecord(b.recordPath(a))
	if r == nil && err == nil && !records.Any(b.opts.RunDir, a) {
		return nil // and make no lock for it
	}
	unlock, err := b.lock(ctx, a)
	if err != nil {
		return err
	}
	defer unlock()
	r, err = readRecord(b.recordPath(a))
	if err != nil || r != nil && yield && r.Kept {
		return err
	}
	if r == nil { // killed before it had its name: nothing was done yet
		return b.removeRecord(&record{Attachment: a})
	}
	n, err := r.open()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errNotNamespace):
		return b.removeRecord(r)
	case err != nil:
		return err
	}
	defer n.close()
	if !r.of(n) {
		return b.removeRecord(r)
	}
	others, err := b.shared(r)
	if err != nil {
		return err
	}
	if !others && running {
		return b.abandon(ctx, n, r)
	}
	if !others {
		gone := *r
		gone.S6 = gone.S6 && !yield
		if err := b.unprogram(ctx, n, &gone); err != nil {
			return err
		}
	}
	return b.removeRecord(r)
}

// Check compares what is in the namespace with what Apply made, order
// included.
func (b *Backend) Check(ctx context.Context, t redirect.Target) error {
	r, err := readRecord(b.recordPath(t.Attachment))
	if err != nil {
		return err
	}
	if r == nil || r.Kept {
		return fmt.Errorf("%w by iptables for %s@%s", redirect.ErrNotProgrammed, t.ContainerID, t.IfName)
	}
	n, err := openNamespace(t.Netns)
	if err != nil {
		return err
	}
	defer n.close()
	if !r.of(n) {
		return fmt.Errorf("%w in the network namespace %s: its record is of another", redirect.ErrNotProgrammed, t.Netns)
	}
	var wrong []string
	if !r.Done {
		wrong = append(wrong, "it was not programmed to the end")
	}
	if n.ipv6 && r.IPv6 == "" {
		wrong = append(wrong, "IPv6 was switched on after the pod was programmed, and goes directly")
	}
	missing, err := n.checkPrepared(r)
	if err != nil {
		return err
	}
	wrong = append(wrong, missing...)
	programs, err := b.ofMode(ctx, r.Mode)
	if err != nil {
		return err
	}
	for _, f := range r.families() {
		got, err := b.read(ctx, n, programs, f)
		if err != nil {
			return err
		}
		if diff := differences(parse(r.rules(f)), got); diff != "" {
			wrong = append(wrong, fmt.Sprintf("%v: %s", f, diff))
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("the pod's rules are not what they should be: %s", strings.Join(wrong, "; "))
	}
	return nil
}

// Attachments lists what Apply made for a CNI network and Remove has not undone.
func (b *Backend) Attachments(_ context.Context, network string) ([]redirect.Attachment, error) {
	records, err := b.records()
	var out []redirect.Attachment
	for _, r := range records {
		if r.Network == network {
			out = append(out, r.Attachment)
		}
	}
	return out, err
}
