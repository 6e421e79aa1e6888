// SPDX-License-Identifier: Apache-2.0

// Package backends joins a node's two backends, eBPF and iptables: it has a pod
// redirected by the one that was chosen for it, or by iptables where eBPF fails
// and nobody has asked for it.
package backends

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// Options say how a node's backends work.
type Options struct {
	BPFDir   string        // see loader.Options
	RunDir   string        // of both
	Iptables iptables.Mode // the netconf's iptablesBackend
	// IptablesPath is where iptables' programs are looked for, and
	// IptablesTimeout how long each may take; zero: see iptables.Options.
	IptablesPath    string
	IptablesTimeout time.Duration
	Log             *slog.Logger // nil: nothing is logged
}

// A backend is what both are.
type backend interface {
	redirect.Backend
	// Attachments lists what it has programmed for a CNI network.
	Attachments(ctx context.Context, network string) ([]redirect.Attachment, error)
	// Ready fails where Apply would fail for any pod.
	Ready(ctx context.Context) error
	// Knows reports whether there may be something for Remove to do.
	Knows(a redirect.Attachment) bool
}

// Backends are a node's two. Each knows by its own records what it has
// programmed, so that only Apply and Ready have to be told which it is to be.
type Backends struct {
	ebpf     backend
	iptables backend
	// yield is Remove of iptables, for a pod that eBPF redirects by now and that
	// may be running.
	yield func(ctx context.Context, a redirect.Attachment, running bool) error
	// takeOver is Apply of iptables, for a pod that eBPF redirects so far.
	takeOver func(ctx context.Context, t redirect.Target, p *redirect.Policy) error
	// restore mends what iptables has made, where eBPF has failed to take over.
	restore func(ctx context.Context, a redirect.Attachment) error
	foreign func(ctx context.Context, netns string) ([]string, error)
	sweep   func(ctx context.Context) ([]redirect.Attachment, error)
	// What Status asks.
	node  loader.Options
	rules *iptables.Backend
	log   *slog.Logger
}

// New returns the backends of a node.
func New(opts Options) *Backends {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	ipt := iptables.New(iptables.Options{
		RunDir: opts.RunDir, Mode: opts.Iptables, Path: opts.IptablesPath, Timeout: opts.IptablesTimeout, Log: opts.Log,
	})
	node := loader.Options{BPFDir: opts.BPFDir, RunDir: opts.RunDir, Log: opts.Log, Programs: programs.New()}
	kernel := ebpf.New(node)
	return &Backends{
		ebpf:     kernel,
		iptables: ipt,
		yield:    ipt.Yield,
		takeOver: ipt.TakeOver,
		restore:  ipt.Restore,
		foreign:  ipt.Foreign,
		sweep:    kernel.Sweep,
		node:     node,
		rules:    ipt,
		log:      opts.Log,
	}
}

// Apply programs the target as chosen, and says what came of the choice: where
// eBPF fails, is undone, and the choice allows it, iptables takes over.
//
// What the other backend did for the same attachment goes when the new one is
// in force: a pod that runs is redirected at every moment. On error the target
// is as it was; a new one has nothing.
func (b *Backends) Apply(ctx context.Context, t redirect.Target, p *redirect.Policy, c redirect.Choice) (redirect.Choice, error) {
	if c.Datapath == redirect.EBPF {
		t.Hook = c.Hook
		err := b.ebpf.Apply(ctx, t, p)
		if err == nil {
			return c, b.replace(ctx, t, p, b.ebpf, b.iptables, func(ctx context.Context, a redirect.Attachment) error {
				return b.yield(ctx, a, t.Running)
			})
		}
		// What is left of it might meet with iptables' rules in ways that
		// nobody has thought of.
		if !c.Fallback || errors.Is(err, loader.ErrNotUndone) || ctx.Err() != nil {
			err = fmt.Errorf("datapath ebpf: %w", err)
			if b.iptables.Knows(t.Attachment) {
				err = errors.Join(err, b.restore(ctx, t.Attachment))
			}
			return c, err
		}
		reason := ebpf.Reason(err)
		b.log.Warn("eBPF can't redirect the pod: iptables takes over", "reason", reason.Name, "error", err)
		c = redirect.Choice{Datapath: redirect.Iptables, Reasons: redirect.Reasons{reason}}
		if err2 := b.byIptables(ctx, t, p); err2 != nil {
			return c, fmt.Errorf("datapath ebpf: %w; datapath iptables, which was to take over: %w", err, err2)
		}
		return c, b.replace(ctx, t, p, b.iptables, b.ebpf, b.ebpf.Remove)
	}
	if err := b.byIptables(ctx, t, p); err != nil {
		return c, fmt.Errorf("datapath iptables: %w", err)
	}
	return c, b.replace(ctx, t, p, b.iptables, b.ebpf, b.ebpf.Remove)
}

func (b *Backends) byIptables(ctx context.Context, t redirect.Target, p *redirect.Policy) error {
	if b.ebpf.Knows(t.Attachment) {
		return b.takeOver(ctx, t, p)
	}
	return b.iptables.Apply(ctx, t, p)
}

// replace ends what the other backend did for a target, now that one has applied.
func (b *Backends) replace(ctx context.Context, t redirect.Target, p *redirect.Policy, one, other backend, remove func(context.Context, redirect.Attachment) error) error {
	if !other.Knows(t.Attachment) {
		return nil
	}
	if err := remove(ctx, t.Attachment); err != nil {
		return err
	}
	if p.Mode != redirect.ModeTProxy {
		return nil
	}
	// The mark's rule and route, and the sysctls, are the same for both, and
	// have gone with the other.
	return one.Apply(ctx, t, p)
}

// Check asks whichever has programmed the target.
func (b *Backends) Check(ctx context.Context, t redirect.Target) error {
	err := b.ebpf.Check(ctx, t)
	if !errors.Is(err, redirect.ErrNotProgrammed) {
		return err
	}
	if other := b.iptables.Check(ctx, t); !errors.Is(other, redirect.ErrNotProgrammed) {
		return other
	}
	return err
}

// Remove undoes whatever either has done.
func (b *Backends) Remove(ctx context.Context, a redirect.Attachment) error {
	return errors.Join(b.ebpf.Remove(ctx, a), b.iptables.Remove(ctx, a))
}

// Attachments lists what either has programmed for a CNI network.
func (b *Backends) Attachments(ctx context.Context, network string) ([]redirect.Attachment, error) {
	first, err := b.ebpf.Attachments(ctx, network)
	second, err2 := b.iptables.Attachments(ctx, network)
	// iptables has a record too of what it keeps in a pod of eBPF's.
	second = slices.DeleteFunc(second, func(a redirect.Attachment) bool { return slices.Contains(first, a) })
	return append(first, second...), errors.Join(err, err2)
}

// Ready fails where no pod could be programmed by a datapath; redirect.Auto is
// either. notEBPF says why pods would go by iptables.
func (b *Backends) Ready(ctx context.Context, datapath string) (notEBPF *redirect.Reason, err error) {
	if redirect.Datapath(datapath) == redirect.Iptables {
		return nil, b.iptables.Ready(ctx)
	}
	err = b.ebpf.Ready(ctx)
	if err == nil || redirect.Datapath(datapath) == redirect.EBPF {
		return nil, err
	}
	if err2 := b.iptables.Ready(ctx); err2 != nil {
		return nil, fmt.Errorf("datapath ebpf: %w; datapath iptables: %w", err, err2)
	}
	reason := ebpf.Reason(err)
	return &reason, nil
}

// Sweep removes what is left of pods that are gone, as far as the kernel says that
// they are: what eBPF has made. iptables' rules go with their network namespace.
func (b *Backends) Sweep(ctx context.Context) ([]redirect.Attachment, error) { return b.sweep(ctx) }

// Foreign names what of others redirects connections in a network namespace: a
// pod that Shunt knows nothing of may have been programmed by another.
func (b *Backends) Foreign(ctx context.Context, netns string) ([]string, error) {
	return b.foreign(ctx, netns)
}
