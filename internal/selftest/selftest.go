// SPDX-License-Identifier: Apache-2.0

// Package selftest shows that the datapaths work on this node: it makes a pod
// of its own, of a network namespace and a cgroup, has the real backends
// program it, and lets real connections tell where they went.
//
// The namespaces, bpffs and the runDir have no names and end with the process.
// No packet leaves the two namespaces.
package selftest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/scratch"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// Limit bounds a whole run, its clearing away not counted.
const Limit = time.Minute

// Options say what to test.
type Options struct {
	Paths      []string // of probe.Paths
	IPv6       bool     // the kernel has it
	CgroupRoot string   // see loader.FindCgroup2Mount
	// Child are the arguments by which this executable calls Child.
	Child []string

	backend func(path, bpfDir, runDir string) redirect.Backend // nil: the real ones
}

// The addresses are of the blocks for documentation: nobody has them.
var (
	pod4     = netip.MustParsePrefix("192.0.2.2/24")
	client4  = netip.MustParsePrefix("192.0.2.1/24")
	service4 = netip.MustParseAddrPort("198.51.100.1:8000")
	pod6     = netip.MustParsePrefix("2001:db8::2/64")
	client6  = netip.MustParsePrefix("2001:db8::1/64")
	service6 = netip.MustParseAddrPort("[2001:db8:1::1]:8000")
)

const (
	appPort = 8080
	appUID  = 1000
)

// Names of listeners.
const (
	listenService = "service"
	listenApp     = "app"
	listenOut     = "out"
	listenIn      = "in"
)

// Run tests each of the paths. A path that could not be tested to its end has a
// check that says why, and is not OK. It returns when all is cleared away.
func Run(ctx context.Context, opts Options) (checks []probe.Check) {
	ctx, cancel := context.WithTimeoutCause(ctx, Limit, fmt.Errorf("the self-test took longer than %v", Limit))
	defer cancel()
	for _, path := range opts.Paths {
		r := &run{opts: opts, path: path}
		err := r.run(ctx)
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			r.check("the self-test itself", "it comes to its end", err.Error())
		}
		checks = append(checks, r.checks...)
		if ctx.Err() != nil {
			break
		}
	}
	return checks
}

// A run is the test of one path.
type run struct {
	opts   Options
	path   string
	checks []probe.Check
	undo   []func() error

	pod, world *scratch.Netns
	cgroup     *scratch.Cgroup // the pod's
	container  *scratch.Cgroup
	policy     *redirect.Policy
}

func (r *run) check(connection, expected, got string) {
	r.checks = append(r.checks, probe.Check{Path: r.path, Connection: connection, Expected: expected, Got: got, OK: expected == got})
}

// later has fn done at the end, the last first.
func (r *run) later(fn func() error) { r.undo = append(r.undo, fn) }

func (r *run) run(ctx context.Context) (err error) {
	defer func() {
		for i := len(r.undo) - 1; i >= 0; i-- {
			err = errors.Join(err, r.undo[i]())
		}
	}()
	if err := r.build(ctx); err != nil {
		return err
	}
	backend, err := r.backend()
	if err != nil {
		return err
	}
	client, err := r.start(ctx, r.world, nil, appUID, listener{listenService, service4.Port()})
	if err != nil {
		return err
	}
	target := redirect.Target{
		Attachment: redirect.Attachment{ContainerID: "shunt-self-test", IfName: "eth0"},
		Network:    "shunt-self-test",
		Netns:      r.pod.Path(),
		Cgroup:     r.cgroup.Path,
		Pod:        redirect.PodRef{Namespace: "shunt-self-test", Name: "pod"},
	}
	r.policy = policy()
	if err := backend.Apply(ctx, target, r.policy); err != nil {
		return fmt.Errorf("program the pod: %w", err)
	}
	removed := false
	r.later(func() error {
		if removed {
			return nil
		}
		return backend.Remove(context.WithoutCancel(ctx), target.Attachment)
	})

	proxy, err := r.start(ctx, r.pod, r.container, r.policy.Proxy.UID,
		listener{listenOut, r.policy.Proxy.OutboundPort}, listener{listenIn, r.policy.Proxy.InboundPort})
	if err != nil {
		return err
	}
	app, err := r.start(ctx, r.pod, r.container, appUID, listener{listenApp, appPort})
	if err != nil {
		return err
	}
	families := []family{{"IPv4", pod4.Addr(), client4.Addr(), service4}}
	if r.opts.IPv6 {
		families = append(families, family{"IPv6", pod6.Addr(), client6.Addr(), service6})
	}
	for _, f := range families {
		own := netip.AddrPortFrom(f.pod, appPort)
		r.dial(f.name+" app to service", app, f.service, r.proxied(listenOut, f.service, f.pod))
		r.dial(f.name+" proxy to service", proxy, f.service, direct(listenService))
		r.dial(f.name+" client to app", client, own, r.proxied(listenIn, own, f.client))
	}
	proxy.end()
	for _, f := range families {
		r.dial(f.name+" app to service, no proxy", app, f.service, refused)
		r.dial(f.name+" client to app, no proxy", client, netip.AddrPortFrom(f.pod, appPort), refused)
	}
	if err := backend.Remove(ctx, target.Attachment); err != nil {
		return fmt.Errorf("remove what was programmed: %w", err)
	}
	removed = true
	for _, f := range families {
		r.dial(f.name+" app to service, removed", app, f.service, direct(listenService))
		r.dial(f.name+" client to app, removed", client, netip.AddrPortFrom(f.pod, appPort), direct(listenApp))
	}
	return nil
}

// A family is who talks to whom in an IP version.
type family struct {
	name        string
	pod, client netip.Addr
	service     netip.AddrPort
}

// policy is one that has nothing special, and excludes nothing that is dialled.
func policy() *redirect.Policy {
	return &redirect.Policy{
		Mode: redirect.ModeRedirect, Proxy: redirect.DefaultConfig().Proxy,
		IncludeOutbound:     redirect.Prefixes{All: true},
		IncludeInboundPorts: redirect.Ports{Ranges: []redirect.PortRange{{First: appPort, Last: appPort}}},
		HostUsers:           true,
	}
}

func (r *run) dial(name string, from *process, to netip.AddrPort, want answer) {
	r.check(name, r.say(want), r.say(from.dial(to)))
}

func (r *run) proxied(listener string, original netip.AddrPort, peer netip.Addr) answer {
	return answer{Listener: listener, Original: original.String(), Peer: peer.String(), Remote: original.String()}
}

func direct(listener string) answer { return answer{Listener: listener} }

var refused = answer{Refused: true}

// say puts an answer into words, as far as it counts: which port of the proxy's
// it came to, the original destination and the peer that the proxy sees, and
// the peer that the one who has connected sees.
func (r *run) say(a answer) string {
	var port uint16
	switch {
	case a.Refused:
		return "refused"
	case a.Error != "":
		return a.Error
	case a.Listener == listenOut:
		port = r.policy.Proxy.OutboundPort
	case a.Listener == listenIn:
		port = r.policy.Proxy.InboundPort
	default:
		return "direct, the " + a.Listener + " itself"
	}
	return fmt.Sprintf("proxy :%d for %s, from %s, seen as %s", port, a.Original, a.Peer, a.Remote)
}

// build makes the pod and the world around it.
func (r *run) build(ctx context.Context) error {
	if r.path == probe.PathEBPF {
		mount, err := loader.FindCgroup2Mount(r.opts.CgroupRoot)
		if err != nil {
			return err
		}
		if r.cgroup, err = scratch.NewCgroup(mount); err != nil {
			return err
		}
		r.later(func() error { return remove(ctx, r.cgroup) })
		if r.container, err = r.cgroup.Child("container"); err != nil {
			return err
		}
		r.later(func() error { return remove(ctx, r.container) })
	} else {
		r.cgroup = new(scratch.Cgroup) // iptables needs none
	}
	for _, n := range []**scratch.Netns{&r.pod, &r.world} {
		made, err := scratch.NewNetns()
		if err != nil {
			return err
		}
		*n = made
		r.later(func() error { made.Close(); return nil })
	}
	return r.connect()
}

// remove removes a cgroup, in a time of its own: that of the test may be up.
func remove(ctx context.Context, c *scratch.Cgroup) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return c.Remove(ctx)
}

// connect joins the two namespaces by a veth pair.
func (r *run) connect() error {
	pod, err := netlink.NewHandleAt(netns.NsHandle(r.pod.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in the pod: %w", err)
	}
	defer pod.Close()
	world, err := netlink.NewHandleAt(netns.NsHandle(r.world.FD()), unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink in the world: %w", err)
	}
	defer world.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	if err := pod.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(r.world.FD())}); err != nil {
		return fmt.Errorf("make a veth pair: %w", err)
	}
	if r.opts.IPv6 {
		for _, n := range []*scratch.Netns{r.pod, r.world} {
			if err := n.Do(enableIPv6); err != nil {
				return err
			}
		}
	}
	podAddrs, worldAddrs := []netip.Prefix{pod4}, []netip.Prefix{client4}
	services := []netip.Addr{service4.Addr()}
	if r.opts.IPv6 {
		podAddrs, worldAddrs = append(podAddrs, pod6), append(worldAddrs, client6)
		services = append(services, service6.Addr())
	}
	var hosts []netip.Prefix
	for _, s := range services {
		hosts = append(hosts, netip.PrefixFrom(s, s.BitLen()))
	}
	err = errors.Join(
		up(pod, "lo", nil), up(world, "lo", hosts),
		up(world, "eth0", worldAddrs), up(pod, "eth0", podAddrs),
	)
	if err != nil {
		return err
	}
	for i, s := range hosts {
		if err := pod.RouteAdd(&netlink.Route{Dst: ipNet(s), Gw: net.IP(worldAddrs[i].Addr().AsSlice())}); err != nil {
			return fmt.Errorf("add a route to %v: %w", s, err)
		}
	}
	return nil
}

// enableIPv6 undoes, inside a namespace, what it has inherited.
func enableIPv6() error {
	for _, which := range []string{"all", "default", "eth0", "lo"} {
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("0"), 0); err != nil {
			return fmt.Errorf("switch IPv6 on: %w", err)
		}
	}
	return nil
}

// up sets an interface up and gives it addresses.
func up(h *netlink.Handle, name string, addrs []netip.Prefix) error {
	link, err := h.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	for _, a := range addrs {
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(link, addr); err != nil {
			return fmt.Errorf("put %v on %s: %w", a, name, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// backend gives the backend of the path, with places of its own for what it
// keeps.
func (r *run) backend() (redirect.Backend, error) {
	memory, err := scratch.Mount("tmpfs")
	if err != nil {
		return nil, err
	}
	r.later(func() error { memory.Close(); return nil })
	// The mount's own path is a link, which a runDir must not be.
	runDir := memory.Path() + "/run"
	if err := os.Mkdir(runDir, 0o700); err != nil {
		return nil, err
	}
	bpfDir := ""
	if r.path == probe.PathEBPF {
		pins, err := scratch.Mount("bpf")
		if err != nil {
			return nil, err
		}
		r.later(func() error { pins.Close(); return nil })
		bpfDir = pins.Path() + "/shunt"
	}
	if r.opts.backend != nil {
		return r.opts.backend(r.path, bpfDir, runDir), nil
	}
	switch r.path {
	case probe.PathEBPF:
		return ebpf.New(loader.Options{BPFDir: bpfDir, RunDir: runDir, Programs: programs.New()}), nil
	case probe.PathNFT:
		return iptables.New(iptables.Options{RunDir: runDir, Mode: iptables.NFT}), nil
	case probe.PathLegacy:
		return iptables.New(iptables.Options{RunDir: runDir, Mode: iptables.Legacy}), nil
	}
	return nil, fmt.Errorf("there is no path %q", r.path)
}
