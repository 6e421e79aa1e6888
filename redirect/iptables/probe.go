// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/redirect"
)

// trials are the rules that Probe has the programs put into a namespace.
var trials = []struct {
	name      string
	neededFor string
	why       string
	rules     func(f Family) string
	// since, by mode and family. An empty version is one that no kernel which
	// runs containers is older than.
	since map[Mode]map[Family]string
}{
	// nf_tables and its way to xtables' extensions: 96518518cc41, 0ca743a55991.
	// NAT for IPv6: 58a317f1061c.
	{
		"redirect", probe.ForIptables, "REDIRECT in nat, by the rules of a pod",
		func(f Family) string { return Render(trialPolicy(), f) },
		map[Mode]map[Family]string{NFT: {IPv4: "3.13", IPv6: "3.13"}, Legacy: {IPv6: "3.7"}},
	},
	{
		"owner", probe.ForIptables, "-m owner tells the proxy's connections",
		func(Family) string {
			return "*nat\n-N " + prefix + "PROBE\n-A " + prefix + "PROBE -p tcp -m owner --uid-owner 1337 -j RETURN\n" +
				"-A " + prefix + "PROBE -p tcp -m owner --gid-owner 1337 -j RETURN\nCOMMIT\n"
		},
		map[Mode]map[Family]string{NFT: {IPv4: "3.13", IPv6: "3.13"}, Legacy: {IPv6: "3.7"}},
	},
	// TPROXY: e84392707e10, for IPv6 6ad78893272c.
	{
		"tproxy", probe.Optional, "TPROXY in mangle, by the rules of a pod in that mode",
		func(f Family) string {
			p := trialPolicy()
			p.Mode = redirect.ModeTProxy
			return Render(p, f)
		},
		map[Mode]map[Family]string{NFT: {IPv4: "3.13", IPv6: "3.13"}, Legacy: {IPv6: "3.7"}},
	},
	{
		"dns", probe.Optional, "DNS capture: conntrack zones in raw, by the rules of such a pod",
		func(f Family) string {
			p := trialPolicy()
			p.DNSCapture = true
			return Render(p, f)
		},
		map[Mode]map[Family]string{NFT: {IPv4: "3.13", IPv6: "3.13"}, Legacy: {IPv6: "3.7"}},
	},
}

// trialPolicy is a pod's that leaves everything at its default but its inbound
// ports, so that exclusions are among the rules.
func trialPolicy() *redirect.Policy {
	conf := redirect.DefaultConfig()
	p := &redirect.Policy{
		Mode: redirect.ModeRedirect, Proxy: conf.Proxy,
		IncludeOutbound:     redirect.Prefixes{All: true},
		IncludeInboundPorts: redirect.Ports{All: true},
		HostUsers:           true,
	}
	for _, port := range conf.ProxyExcludeInboundPorts {
		p.ExcludeInboundPorts = append(p.ExcludeInboundPorts, redirect.PortRange{First: port, Last: port})
	}
	return p
}

// Probe finds out what the node's iptables programs can do, of both modes, by
// having them put the rules of pods into network namespaces that end with the
// attempt. Of opts, it uses Path and Timeout, and it keeps nothing. What the
// programs do to have the kernel load its modules is theirs.
func Probe(ctx context.Context, opts Options) []probe.Row {
	b := New(opts)
	rows := make([][]probe.Row, 2)
	var wg sync.WaitGroup
	for i, m := range []Mode{NFT, Legacy} {
		wg.Go(func() { rows[i] = b.probeMode(ctx, m) })
	}
	wg.Wait()
	return append(rows[0], rows[1]...)
}

func (b *Backend) probeMode(ctx context.Context, m Mode) []probe.Row {
	row := func(name, since, neededFor string) probe.Row {
		return probe.Row{Name: name, Group: probe.GroupIptables, Since: since, NeededFor: neededFor}
	}
	programs := row("iptables-"+string(m)+"-programs", "", probe.ForIptables)
	t, version, err := b.programsOf(ctx, m)
	switch {
	case err == nil:
		programs.Answer, programs.Why = probe.Yes, fmt.Sprintf("%s, %s", t.Restore4, version)
	case errors.Is(err, ErrNotInstalled):
		programs.Answer, programs.Why = probe.No, fmt.Sprintf("%v (%s)", err, install)
	default:
		programs.Answer, programs.Why = probe.Unknown, err.Error()
	}
	rows := []probe.Row{programs}
	for _, trial := range trials {
		for _, f := range []Family{IPv4, IPv6} {
			r := row(fmt.Sprintf("iptables-%s-%s%d", m, trial.name, f), trial.since[m][f], trial.neededFor)
			if t == nil {
				r.Answer, r.Why = probe.Unknown, fmt.Sprintf("without programs of mode %s the kernel was not asked", m)
			} else {
				r.Answer, r.Why = b.trial(ctx, t.restore(f), trial.rules(f), trial.why)
			}
			rows = append(rows, r)
		}
	}
	return rows
}

// programsOf finds the programs of a mode, without a thought to whether they
// work, and keeps no choice.
func (b *Backend) programsOf(ctx context.Context, m Mode) (t *tools, version string, err error) {
	t, err = b.find("-" + string(m))
	if err != nil {
		plain, plainErr := b.find("")
		if plainErr != nil {
			return nil, "", err
		}
		mode, plainErr := b.modeOf(ctx, plain.Restore4)
		if plainErr != nil {
			return nil, "", plainErr
		}
		if mode != m {
			return nil, "", err
		}
		t = plain
	}
	t.Mode = m
	version, err = b.run(ctx, nil, "", t.Restore4, "--version")
	if err != nil {
		return nil, "", err
	}
	return t, strings.TrimSpace(version), nil
}

// trial has a program put rules into a namespace of their own. What it refuses
// twice is conclusive.
func (b *Backend) trial(ctx context.Context, program, rules, why string) (probe.Answer, string) {
	var refused error
	for range 2 {
		n, err := scratchNamespace()
		if errors.Is(err, unix.EPERM) {
			return probe.Unknown, fmt.Sprintf("%s: make a scratch network namespace: %v", probe.NeedsRoot, err)
		}
		if err != nil {
			return probe.Unknown, fmt.Sprintf("make a scratch network namespace: %v", err)
		}
		_, err = b.run(ctx, n, rules, program, "--noflush")
		n.close()
		if err == nil {
			return probe.Yes, why
		}
		var exit *exec.ExitError
		if ctx.Err() != nil || !errors.As(err, &exit) || !exit.Exited() {
			return probe.Unknown, err.Error() // it was killed, or did not begin
		}
		refused = err
	}
	return probe.No, refused.Error()
}
