// SPDX-License-Identifier: Apache-2.0

// Package ebpf is the backend that redirects with eBPF: it compiles a Policy to
// the tables that the programs read, and has package loader attach them.
package ebpf

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

// A Backend redirects with eBPF. It is a redirect.Backend.
type Backend struct {
	opts loader.Options
}

var _ redirect.Backend = (*Backend)(nil)

// New returns the backend of a node.
func New(opts loader.Options) *Backend {
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	return &Backend{opts: opts}
}

// Apply loads the node's datapath, unless it is loaded, and attaches the pod.
func (b *Backend) Apply(ctx context.Context, t redirect.Target, p *redirect.Policy) error {
	if t.Cgroup == "" {
		return cmp.Or(t.NoCgroup, loader.ErrNoPodCgroup)
	}
	ns, err := loader.OpenNetns(t.Netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	rules, err := Tables(p, Net{Addrs: t.Addrs, Netns: ns})
	if err != nil {
		return err
	}
	if rules.UID, rules.GID, err = ns.HostIDs(rules.UID, rules.GID, p.HostUsers); err != nil {
		return err
	}
	d, err := loader.Open(ctx, b.opts)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Attach(loader.Target{
		ID: id(t.Attachment), Network: t.Network, Pod: loader.PodRef(t.Pod), Netns: ns, Cgroup: t.Cgroup, Running: t.Running,
		InboundHook: loader.InboundHook(t.Hook),
	}, rules)
}

// Check compares the kernel's state with what Apply made.
func (b *Backend) Check(ctx context.Context, t redirect.Target) error {
	err := loader.Check(ctx, b.opts, id(t.Attachment))
	if errors.Is(err, loader.ErrNotAttached) {
		return fmt.Errorf("%w: %w", redirect.ErrNotProgrammed, err)
	}
	return err
}

// Knows reports whether Apply may have done something for an attachment that
// Remove has not undone.
func (b *Backend) Knows(a redirect.Attachment) bool { return loader.Attached(b.opts, id(a)) }

// Remove undoes Apply.
func (b *Backend) Remove(ctx context.Context, a redirect.Attachment) error {
	return loader.Remove(ctx, b.opts, id(a))
}

// Attachments lists what Apply made for a CNI network and Remove has not undone.
func (b *Backend) Attachments(_ context.Context, network string) ([]redirect.Attachment, error) {
	records, err := loader.Records(b.opts)
	var out []redirect.Attachment
	for _, r := range records {
		if r.Network == network {
			out = append(out, redirect.Attachment{ContainerID: r.ContainerID, IfName: r.IfName})
		}
	}
	return out, err
}

// Ready loads the node's datapath, unless it is loaded: it fails where Apply
// would fail for any pod.
func (b *Backend) Ready(ctx context.Context) error {
	d, err := loader.Open(ctx, b.opts)
	if err != nil {
		return err
	}
	d.Close()
	return nil
}

// ReadyTC loads what only a pod with TC as its inbound hook needs, unless it is
// loaded.
func (b *Backend) ReadyTC(ctx context.Context) error {
	d, err := loader.Open(ctx, b.opts)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.PrepareTC()
}

// Upgrade has this build's programs redirect the node's pods, where another build's do
// so far: see loader.Upgrade.
func (b *Backend) Upgrade(ctx context.Context) (*loader.Upgraded, error) {
	return loader.Upgrade(ctx, b.opts)
}

// Sweep removes what is left of pods that are gone: see loader.Sweep.
func (b *Backend) Sweep(ctx context.Context) ([]redirect.Attachment, error) {
	removed, err := loader.Sweep(ctx, b.opts)
	out := make([]redirect.Attachment, len(removed))
	for i, a := range removed {
		out[i] = redirect.Attachment(a)
	}
	return out, err
}

// Reason says why an Apply that failed by err leaves the pod to another backend.
func Reason(err error) redirect.Reason {
	r := redirect.Reason{Name: redirect.ReasonFailed, Text: "eBPF has failed: " + err.Error()}
	for _, known := range []struct {
		is   error
		name redirect.ReasonName
	}{
		{loader.ErrNoCgroup2, redirect.ReasonNoCgroup2},
		{loader.ErrNoPodCgroup, redirect.ReasonNoPodCgroup},
		{loader.ErrNoBPFFS, redirect.ReasonNoBPFFS},
		{loader.ErrPermission, redirect.ReasonNoPermission},
		{loader.ErrRefused, redirect.ReasonLoadRefused},
		{loader.ErrOtherBuild, redirect.ReasonOtherBuild},
		{loader.ErrFull, redirect.ReasonMapFull},
		{loader.ErrAttach, redirect.ReasonAttachRefused},
		{loader.ErrListener, redirect.ReasonListener},
		{loader.ErrInterfaces, redirect.ReasonExcludeInterfaces},
		{loader.ErrUserNamespace, redirect.ReasonUserNamespace},
		{unix.EPERM, redirect.ReasonNoPermission},
	} {
		if errors.Is(err, known.is) {
			r.Name = known.name
			break
		}
	}
	return r
}

func id(a redirect.Attachment) loader.ID {
	return loader.ID{ContainerID: a.ContainerID, IfName: a.IfName}
}

// Net is what the compiler needs to know of a pod's network: the addresses that
// prevResult gave, in its order, and what the namespace itself says.
type Net struct {
	Addrs []netip.Addr
	Netns *loader.Netns
}

// passthrough6 is S6, which is on lo and which the programs know themselves.
var passthrough6 = netip.MustParseAddr("::6")

// all returns every address of the pod, prevResult's first.
func (n Net) all() []netip.Addr {
	var out []netip.Addr
	for _, a := range slices.Concat(n.Addrs, n.Netns.Addrs) {
		if a = a.Unmap().WithZone(""); !slices.Contains(out, a) && !a.IsLoopback() && a != passthrough6 {
			out = append(out, a)
		}
	}
	return out
}

// Tables turns a policy into the tables of one pod: Compile, and what the pod's
// interfaces decide. It fails with loader.ErrInterfaces where it is not certain by
// which of them a connection leaves, and one is excluded.
func Tables(p *redirect.Policy, n Net) (loader.Rules, error) {
	r := Compile(p, n)
	err := exclude(&r, p.ExcludeInterfaces, n.Netns.Interfaces)
	return r, err
}

// Compile turns a policy into the tables of one pod, but for interfaces: Tables
// sees to those that are excluded, and the choice of the backend keeps rerouted
// ones away from here. It never cuts a list short. The proxy's ids are the pod's
// own; see loader.Netns.HostIDs.
func Compile(p *redirect.Policy, n Net) loader.Rules {
	r := loader.Rules{
		UID: p.Proxy.UID, GID: p.Proxy.GID,
		OutboundPort: p.Proxy.OutboundPort, InboundPort: p.Proxy.InboundPort,
		TunnelPort: p.Proxy.TunnelPort, DNSPort: p.Proxy.DNSPort,
		Source4: n.Netns.First(true), Source6: n.Netns.First(false),
	}
	for _, f := range []struct {
		flag bpf.ShuntPodFlag
		on   bool
	}{
		{bpf.ShuntPodFlagPOD_OUT_ALL, p.IncludeOutbound.All},
		{bpf.ShuntPodFlagPOD_OUT_ALL_PORTS, p.IncludeOutboundPorts.All},
		{bpf.ShuntPodFlagPOD_IN_ALL, p.IncludeInboundPorts.All},
		{bpf.ShuntPodFlagPOD_NO_OUT_LOCAL, p.IncludesLoopback()},
		{bpf.ShuntPodFlagPOD_DNS, p.DNSCapture},
		{bpf.ShuntPodFlagPOD_TPROXY, p.Mode == redirect.ModeTProxy},
	} {
		if f.on {
			r.Flags |= f.flag
		}
	}
	out := redirect.FlattenPorts(p.IncludeOutboundPorts.Ranges, p.ExcludeOutboundPorts)
	in := redirect.FlattenPorts(p.IncludeInboundPorts.Ranges, p.ExcludeInboundPorts)
	if len(out) > 0 {
		r.Flags |= bpf.ShuntPodFlagPOD_OUT_PORTS
	}
	if len(in) > 0 {
		r.Flags |= bpf.ShuntPodFlagPOD_IN_PORTS
	}
	r.Ports = append(ports(bpf.ShuntDirectionDIR_OUT, out), ports(bpf.ShuntDirectionDIR_IN, in)...)
	r.Dests = dests(p, n)
	return r
}

func ports(d bpf.ShuntDirection, list []redirect.PortVerdict) []loader.Port {
	out := make([]loader.Port, len(list))
	for i, v := range list {
		out[i] = loader.Port{Direction: d, Port: v.Port, Bits: v.Bits}
		if v.Include {
			out[i].Flags |= bpf.ShuntPortFlagPORT_INCLUDE
		}
		if v.Exclude {
			out[i].Flags |= bpf.ShuntPortFlagPORT_EXCLUDE
		}
	}
	return out
}

// dests joins three longest-prefix tables into one: the lists of the policy,
// the pod's own addresses, and the sources that its routes choose. A prefix of
// one table takes, of the others, what its longest containing prefix there says.
func dests(p *redirect.Policy, n Net) []loader.Dest {
	lists := newTrie[redirect.PrefixVerdict]()
	for _, v := range redirect.FlattenPrefixes(p.IncludeOutbound.List, p.ExcludeOutbound) {
		lists.add(v.Prefix, v)
	}
	sources := newTrie[netip.Addr]()
	for _, s := range n.Netns.Sources {
		sources.add(s.Prefix, s.Addr)
	}
	local := map[netip.Prefix]bool{}
	for _, a := range n.all() {
		local[netip.PrefixFrom(a, a.BitLen())] = true
	}

	var out []loader.Dest
	seen := map[netip.Prefix]bool{}
	add := func(prefix netip.Prefix) {
		if seen[prefix] {
			return
		}
		seen[prefix] = true
		d := loader.Dest{Prefix: prefix}
		if v, ok := lists.find(prefix); ok {
			if v.Include {
				d.Flags |= bpf.ShuntDestFlagDEST_INCLUDE
			}
			if v.Exclude {
				d.Flags |= bpf.ShuntDestFlagDEST_EXCLUDE
			}
		}
		if local[prefix] {
			d.Flags |= bpf.ShuntDestFlagDEST_LOCAL
		}
		d.Source, _ = sources.find(prefix)
		out = append(out, d)
	}
	for prefix := range lists.entries {
		add(prefix)
	}
	for prefix := range sources.entries {
		add(prefix)
	}
	for prefix := range local {
		add(prefix)
	}
	// The maps hold IPv4 as ::ffff:0:0/96: a shorter IPv6 prefix around that
	// must not speak for it.
	if slices.ContainsFunc(out, func(d loader.Dest) bool { return d.Prefix.Contains(mapped) }) {
		add(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	slices.SortFunc(out, func(a, b loader.Dest) int { return a.Prefix.Compare(b.Prefix) })
	return out
}

// mapped is the first address of ::ffff:0:0/96.
var mapped = netip.MustParseAddr("::ffff:0.0.0.0")

// A trie is a longest-prefix table over the prefixes of both families.
type trie[V any] struct {
	entries map[netip.Prefix]V
}

func newTrie[V any]() trie[V] { return trie[V]{entries: map[netip.Prefix]V{}} }

func (t trie[V]) add(p netip.Prefix, v V) { t.entries[p] = v }

// find returns the value of the longest prefix that contains all of p.
func (t trie[V]) find(p netip.Prefix) (v V, ok bool) {
	if len(t.entries) == 0 {
		return v, false
	}
	for bits := p.Bits(); bits >= 0; bits-- {
		shorter, err := p.Addr().Prefix(bits)
		if err != nil {
			return v, false
		}
		if v, ok = t.entries[shorter]; ok {
			return v, true
		}
	}
	return v, false
}
