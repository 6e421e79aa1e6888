// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
)

// keep is what stays of the rules in a pod that runs and that another backend
// redirects by now. Without any rule that needs it the kernel stops to track
// connections in the namespace, and with that to translate those that we have
// redirected: the app's next segment of one would leave the pod as it is. This rule
// decides nothing.
func keep() []table {
	return []table{{
		name:   "nat",
		chains: []chain{{chainKeep, []rule{{"-p tcp -m conntrack --ctstate DNAT -j RETURN", "what we have redirected lives on"}}}},
		jumps:  []rule{{spec: "OUTPUT -p tcp -j " + chainKeep}},
	}}
}

// abandon leaves what keep says of the rules that a record speaks of, and has the
// record say so. Each table goes from the one to the other in one commit.
func (b *Backend) abandon(ctx context.Context, n *namespace, r *record) error {
	there, err := n.traces()
	if err != nil {
		return err
	}
	t, err := b.ofMode(ctx, r.Mode)
	if err != nil {
		return err
	}
	var text strings.Builder
	for _, t := range keep() {
		t.render(&text)
	}
	err = each(r.families(), func(f Family) error {
		got, err := b.read(ctx, n, t, f)
		if err != nil {
			return err
		}
		change := mend(keep(), got)
		if change == "" {
			return nil
		}
		if _, err := b.run(ctx, n, change, t.restore(f), "--noflush"); err != nil {
			return fmt.Errorf("leave the pod's %v rules: %w", f, err)
		}
		return nil
	})
	if m := r.Mode.other(); there.of(m) {
		err = errors.Join(err, b.sweep(ctx, n, m, false))
	}
	left := *r
	left.S6 = false // the other backend's by now
	if err := errors.Join(err, n.unprepare(&left)); err != nil {
		return err
	}
	left.Kept, left.TProxy, left.Sysctls = true, false, nil
	for _, rules := range []*string{&left.IPv4, &left.IPv6} {
		if *rules != "" {
			*rules = text.String()
		}
	}
	return b.writeRecord(&left)
}

// keepAgain is undo of r for a pod in which something was kept: that stays.
func (b *Backend) keepAgain(ctx context.Context, n *namespace, before, r *record) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), b.opts.Timeout)
	defer cancel()
	if others, err := b.shared(r); err != nil || others {
		return errors.Join(err, b.writeRecord(before))
	}
	kept := *before
	kept.IPv4, kept.IPv6 = cmp.Or(before.IPv4, r.IPv4), cmp.Or(before.IPv6, r.IPv6)
	kept.TProxy, kept.Sysctls = r.TProxy, r.Sysctls
	return b.abandon(ctx, n, &kept)
}

// spare takes out of a record what is there before Apply: in a pod that another
// backend redirects it is that one's.
func (r *record) spare(n *namespace) error {
	r.S6 = r.S6 && !n.hasS6
	if !r.TProxy {
		return nil
	}
	missing, err := n.tproxy(r.families()).Check(r.Sysctls)
	r.TProxy = len(missing) > 0
	return err
}
