// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"log/slog"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// A backend is what both are: the seam, and what GC and STATUS ask.
type backend interface {
	redirect.Backend
	lister
	readier
}

// backends are the two ways to redirect a pod. Each knows by its own records
// what it has programmed, so that only Apply has to be told which it is to be.
type backends struct {
	chosen, other backend
}

// newBackend returns the backends of this node; conf.Datapath chooses.
func newBackend(conf *netconf.Config, log *slog.Logger) redirect.Backend {
	b := &backends{
		chosen: ebpf.New(loader.Options{BPFDir: conf.BPFDir, RunDir: conf.RunDir, Log: log}),
		other:  iptables.New(iptables.Options{RunDir: conf.RunDir, Mode: iptables.Mode(conf.IptablesBackend), Log: log}),
	}
	if conf.Datapath == datapathIptables {
		b.chosen, b.other = b.other, b.chosen
	}
	return b
}

// Apply programs the target by the chosen backend, and by it alone: an earlier
// ADD may have taken the other. In between the pod has neither, which is for ADD
// only: no process of the pod runs yet.
func (b *backends) Apply(ctx context.Context, t redirect.Target, p *redirect.Policy) error {
	if err := b.other.Remove(ctx, t.Attachment); err != nil {
		return err
	}
	return b.chosen.Apply(ctx, t, p)
}

// Check asks whichever has programmed the target.
func (b *backends) Check(ctx context.Context, t redirect.Target) error {
	err := b.chosen.Check(ctx, t)
	if !errors.Is(err, redirect.ErrNotProgrammed) {
		return err
	}
	if other := b.other.Check(ctx, t); !errors.Is(other, redirect.ErrNotProgrammed) {
		return other
	}
	return err
}

// Remove undoes whatever either has done.
func (b *backends) Remove(ctx context.Context, a redirect.Attachment) error {
	return errors.Join(b.chosen.Remove(ctx, a), b.other.Remove(ctx, a))
}

// Attachments lists what either has programmed for a CNI network.
func (b *backends) Attachments(ctx context.Context, network string) ([]redirect.Attachment, error) {
	first, err := b.chosen.Attachments(ctx, network)
	second, err2 := b.other.Attachments(ctx, network)
	return append(first, second...), errors.Join(err, err2)
}

// Ready asks the chosen one.
func (b *backends) Ready(ctx context.Context) error { return b.chosen.Ready(ctx) }
