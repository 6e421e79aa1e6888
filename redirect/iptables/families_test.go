// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// TestPrivilegedFamilies: IPv6 is programmed wherever it is not switched off,
// so that an address that comes later is covered.
func TestPrivilegedFamilies(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		if err := n.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
		w := testbed.NewWorld(t)
		w.ServeAll(t)
		for _, c := range []struct {
			name     string
			opts     []testbed.Option
			programs int64
			s6       bool
		}{
			{"dual-stack", nil, 2, true},
			{"IPv4 only", []testbed.Option{testbed.V4Only()}, 2, false},
			{"IPv6 only", []testbed.Option{testbed.V6Only()}, 2, true},
			{"without IPv6", []testbed.Option{testbed.NoIPv6()}, 1, false},
		} {
			t.Run(c.name, func(t *testing.T) {
				p := testbed.NewPod(t, append(c.opts, testbed.InWorld(w))...)
				before := n.children.Load()
				if err := n.Apply(t.Context(), targetOf(p), evaluate(t, redirect.DefaultConfig(), p)); err != nil {
					t.Fatal(err)
				}
				if k := n.children.Load() - before; k != c.programs {
					t.Errorf("it took %d programs, want %d", k, c.programs)
				}
				saved := p.Command(t, "ip6tables-"+string(n.opts.Mode)+"-save")
				if there := strings.Contains(saved, chainOut); there != (c.programs == 2) {
					t.Errorf("IPv6 has rules: %v", there)
				}
				if there := strings.Contains(p.Command(t, "ip", "addr", "show", "dev", "lo"), "::6/128"); there != c.s6 {
					t.Errorf("::6 is on lo: %v", there)
				}
				app := p.StartApp(t)
				p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
				for _, x := range []struct {
					has bool
					dst string
				}{{p.Addr4().IsValid(), "10.99.1.1:80"}, {p.Addr6().IsValid(), "[fd99::5]:80"}} {
					if !x.has {
						continue
					}
					if r := app.Dial(t, x.dst); r.Listener() != "out" {
						t.Errorf("%s is served by %q", x.dst, r.Listener())
					}
				}
				if c.programs == 1 {
					p.Sysctl(t, "net.ipv6.conf.all.disable_ipv6", "0")
					err := n.Check(t.Context(), targetOf(p))
					if err == nil || !strings.Contains(err.Error(), "IPv6 was switched on") {
						t.Errorf("check after IPv6 was switched on: %v", err)
					}
					if err := n.Apply(t.Context(), targetOf(p), evaluate(t, redirect.DefaultConfig(), p)); err != nil {
						t.Fatal(err)
					}
				}
				if err := n.Check(t.Context(), targetOf(p)); err != nil {
					t.Errorf("check: %v", err)
				}
				if err := n.Remove(t.Context(), targetOf(p).Attachment); err != nil {
					t.Error(err)
				}
				if left := residue(t, n.opts.Mode, p); left != "" {
					t.Errorf("left behind:\n%s", left)
				}
			})
		}
	})
}
