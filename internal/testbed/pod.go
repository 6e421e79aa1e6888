// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Default ids and ports of the proxy.
const (
	ProxyUID     = 1337
	ProxyGID     = 1337
	OutboundPort = 15001
	InboundPort  = 15006
	AppUID       = 1000
	AppGID       = 1000
)

// Pod is what the container runtime has made by the time it calls the CNI
// plugin: a network namespace with eth0 and its addresses, and a cgroup.
type Pod struct {
	*namespace
	World *World

	Name        string
	Namespace   string // of Kubernetes
	UID         string
	ContainerID string         // the sandbox's
	Interfaces  []PodInterface // eth0 first

	cgroup  *cgroup
	outside map[string]string // interface -> the world's end of it
}

// PodInterface is an interface of a pod: a veth whose other end is the world's.
type PodInterface struct {
	Name  string
	Addrs []netip.Prefix
	// Routes go by this interface. eth0 has the default routes, of the
	// families of its addresses.
	Routes []netip.Prefix
	MAC    string // filled in by NewPod
}

type podConfig struct {
	world      *World
	v4, v6     bool
	addrs      []netip.Prefix
	more       []PodInterface
	name, ns   string
	uid        string
	sandboxOf  *Pod
	sysctls    [][2]string
	loopbackV6 bool
	users      int // UserNamespace's
}

// Option is a wish for NewPod.
type Option func(*podConfig)

// InWorld puts the pod into a world that exists; otherwise it has one of its own.
func InWorld(w *World) Option { return func(c *podConfig) { c.world = w } }

// V4Only gives the pod no IPv6 address but ::1 and a link-local one.
func V4Only() Option { return func(c *podConfig) { c.v6 = false } }

// V6Only gives the pod no IPv4 address but 127.0.0.1.
func V6Only() Option { return func(c *podConfig) { c.v4 = false } }

// NoIPv6 switches IPv6 off in the pod: no ::1 either. It implies V4Only.
func NoIPv6() Option {
	return func(c *podConfig) { c.v6, c.loopbackV6 = false, false }
}

// Addrs gives eth0 these addresses in place of the default ones; a prefix
// other than /32 and /128 makes an on-link route. "10.0.0.5" stands for
// "10.0.0.5/32".
func Addrs(addrs ...string) Option {
	return func(c *podConfig) { c.addrs = append(c.addrs, prefixes(addrs)...) }
}

// Interface adds an interface with addresses, and routes that go by it.
func Interface(name string, addrs, routes []string) Option {
	return func(c *podConfig) {
		c.more = append(c.more, PodInterface{Name: name, Addrs: prefixes(addrs), Routes: prefixes(routes)})
	}
}

// Named sets namespace and name of the pod.
func Named(namespace, name string) Option {
	return func(c *podConfig) { c.ns, c.name = namespace, name }
}

// WithUID sets the pod's UID.
func WithUID(uid string) Option { return func(c *podConfig) { c.uid = uid } }

// SandboxOf makes another sandbox of the same pod: name, UID and cgroup are the
// old one's, namespace and container id are new. It keeps the old one's world
// and addresses, if no option says otherwise; the old one must then be taken
// down first ([Pod.Destroy]), or both in one world would fight over the routes.
func SandboxOf(old *Pod) Option { return func(c *podConfig) { c.sandboxOf = old } }

// Sysctl sets a value below /proc/sys in the pod's namespace before there is
// an interface in it.
func Sysctl(key, value string) Option {
	return func(c *podConfig) { c.sysctls = append(c.sysctls, [2]string{key, value}) }
}

// UserNamespace has the pod's network namespace be owned by a user namespace of
// its own, in which ids are what they are here less first. As after a runtime's
// work, no process is left in it. Actors have ids as they are here.
func UserNamespace(first int) Option { return func(c *podConfig) { c.users = first } }

func prefixes(ss []string) []netip.Prefix {
	var ps []netip.Prefix
	for _, s := range ss {
		if !strings.Contains(s, "/") {
			a := netip.MustParseAddr(s)
			ps = append(ps, netip.PrefixFrom(a, a.BitLen()))
			continue
		}
		ps = append(ps, netip.MustParsePrefix(s))
	}
	return ps
}

// NewPod makes a pod that ends with the test. By default it is dual-stack, with
// one address of each family, in a world of its own.
func NewPod(t testing.TB, opts ...Option) *Pod {
	t.Helper()
	c := podConfig{v4: true, v6: true, loopbackV6: true, ns: "shunt-test", uid: randomUID()}
	for _, o := range opts {
		o(&c)
	}
	if !ipv6Available() {
		c.v6 = false
	}
	p := &Pod{Namespace: c.ns, Name: c.name, UID: c.uid, ContainerID: randomHex(32), World: c.world, outside: map[string]string{}}
	if old := c.sandboxOf; old != nil {
		p.Namespace, p.Name, p.UID, p.cgroup = old.Namespace, old.Name, old.UID, old.cgroup
		if p.World == nil {
			p.World = old.World
		}
		if c.addrs == nil {
			c.addrs = old.Interfaces[0].Addrs
		}
		if c.more == nil {
			c.more = old.Interfaces[1:]
		}
	}
	if p.World == nil {
		p.World = NewWorld(t)
	}
	n := p.World.nextPod()
	if p.Name == "" {
		p.Name = fmt.Sprintf("pod-%d", n)
	}
	if c.addrs == nil {
		if c.v4 {
			c.addrs = append(c.addrs, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, byte(n >> 8), byte(n)}), 32))
		}
		if c.v6 {
			c.addrs = append(c.addrs, netip.PrefixFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x10, 3: 0x44, 14: byte(n >> 8), 15: byte(n)}), 128))
		}
	}
	if p.cgroup == nil {
		p.cgroup = newCgroup(t, p.UID)
	}
	p.namespace = newNamespace(t, c.users)
	sysctls := append([][2]string{
		// As containerd and CRI-O set it: no port needs a capability.
		{"net.ipv4.ip_unprivileged_port_start", "0"},
	}, c.sysctls...)
	if ipv6Available() {
		quietIPv6(t, p.namespace)
		if !c.loopbackV6 {
			sysctls = append(sysctls, [2]string{"net.ipv6.conf.all.disable_ipv6", "1"}, [2]string{"net.ipv6.conf.default.disable_ipv6", "1"})
		}
	}
	for _, s := range sysctls {
		if err := p.sysctl(s[0], s[1]); err != nil {
			t.Fatalf("set %s: %v", s[0], err)
		}
	}
	eth0 := PodInterface{Name: "eth0", Addrs: c.addrs}
	for _, a := range c.addrs {
		all := netip.MustParsePrefix("0.0.0.0/0")
		if a.Addr().Is6() {
			all = netip.MustParsePrefix("::/0")
		}
		eth0.Routes = append(eth0.Routes, all)
	}
	for _, i := range append([]PodInterface{eth0}, c.more...) {
		p.Interfaces = append(p.Interfaces, p.connect(t, i))
	}
	return p
}

// AddInterface adds an interface to a pod that is there.
func (p *Pod) AddInterface(t testing.TB, name string, addrs, routes []string) {
	t.Helper()
	p.Interfaces = append(p.Interfaces, p.connect(t, PodInterface{Name: name, Addrs: prefixes(addrs), Routes: prefixes(routes)}))
}

// AddAddrs adds addresses to an interface of a pod that is there. What the world
// sends to them comes by that.
func (p *Pod) AddAddrs(t testing.TB, name string, addrs ...string) {
	t.Helper()
	inner, err := p.nl.LinkByName(name)
	if err != nil {
		t.Fatalf("pod %s: find interface %s: %v", p.Name, name, err)
	}
	outer, err := p.World.nl.LinkByName(p.outside[name])
	if err != nil {
		t.Fatalf("pod %s: find the world's end of %s: %v", p.Name, name, err)
	}
	for _, a := range prefixes(addrs) {
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := p.nl.AddrAdd(inner, addr); err != nil {
			t.Fatalf("pod %s: add address %v: %v", p.Name, a, err)
		}
		p.World.Route(t, netip.PrefixFrom(a.Addr(), a.Addr().BitLen()), p, name)
		err := p.World.nl.NeighSet(&netlink.Neigh{
			LinkIndex: outer.Attrs().Index, State: unix.NUD_PERMANENT,
			IP: a.Addr().AsSlice(), HardwareAddr: inner.Attrs().HardwareAddr,
		})
		if err != nil {
			t.Fatalf("pod %s: add neighbour %v: %v", p.Name, a, err)
		}
	}
	awaitAddresses(t, p.namespace, inner)
	// The kernel makes the way to an IPv6 address a moment after the address.
	for _, a := range prefixes(addrs) {
		Eventually(t, "the way to "+a.Addr().String(), func() bool {
			routes, err := p.nl.RouteGet(a.Addr().AsSlice())
			return err == nil && len(routes) == 1 && routes[0].Type == unix.RTN_LOCAL
		})
	}
}

// nextPod numbers the pods of a world, from 10.
func (w *World) nextPod() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods++
	return w.pods + 9
}

// connect adds an interface, with neighbours that are known for good: no ARP,
// no neighbour discovery, no first packet that is late.
func (p *Pod) connect(t testing.TB, i PodInterface) PodInterface {
	t.Helper()
	p.World.mu.Lock()
	p.World.links++
	far := fmt.Sprintf("p%d", p.World.links)
	p.World.mu.Unlock()

	fatal := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("pod %s: interface %s: %s: %v", p.Name, i.Name, what, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = i.Name
	fatal("create veth", p.nl.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: far, PeerNamespace: netlink.NsFd(p.World.file.Fd())}))
	p.outside[i.Name] = far
	inner, err := p.nl.LinkByName(i.Name)
	fatal("find", err)
	outer, err := p.World.nl.LinkByName(far)
	fatal("find the world's end", err)
	fatal("set up", p.nl.LinkSetUp(inner))
	fatal("set the world's end up", p.World.nl.LinkSetUp(outer))
	// A link that is set up drops packets until the kernel, in its own time, has
	// seen its carrier and given it a queue: a SYN lost then costs a second.
	ready := func(nl *netlink.Handle, index int) bool {
		l, err := nl.LinkByIndex(index)
		return err == nil && l.Attrs().OperState == netlink.OperUp
	}
	Eventually(t, "the carrier of "+i.Name, func() bool {
		return ready(p.nl, inner.Attrs().Index) && ready(p.World.nl, outer.Attrs().Index)
	})
	i.MAC = inner.Attrs().HardwareAddr.String()

	families := map[bool]bool{} // is IPv6 -> is needed
	for _, a := range i.Addrs {
		families[a.Addr().Is6()] = true
		addr := &netlink.Addr{IPNet: ipNet(a)}
		if a.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		fatal("add address "+a.String(), p.nl.AddrAdd(inner, addr))
		host := netip.PrefixFrom(a.Addr(), a.Addr().BitLen())
		p.World.Route(t, host, p, i.Name)
		fatal("add neighbour in the world", p.World.nl.NeighSet(&netlink.Neigh{
			LinkIndex: outer.Attrs().Index, State: unix.NUD_PERMANENT,
			IP: a.Addr().AsSlice(), HardwareAddr: inner.Attrs().HardwareAddr,
		}))
	}
	for _, r := range i.Routes {
		families[r.Addr().Is6()] = true
	}
	for is6 := range families {
		gw := gateway4
		if is6 {
			gw = gateway6
		}
		fatal("add neighbour", p.nl.NeighSet(&netlink.Neigh{
			LinkIndex: inner.Attrs().Index, State: unix.NUD_PERMANENT,
			IP: gw.AsSlice(), HardwareAddr: outer.Attrs().HardwareAddr,
		}))
	}
	for _, r := range i.Routes {
		gw := gateway4
		if r.Addr().Is6() {
			gw = gateway6
		}
		route := &netlink.Route{LinkIndex: inner.Attrs().Index, Dst: ipNet(r), Gw: gw.AsSlice(), Flags: int(netlink.FLAG_ONLINK)}
		fatal("add route to "+r.String(), p.nl.RouteReplace(route))
	}
	awaitAddresses(t, p.namespace, inner)
	awaitAddresses(t, p.World.namespace, outer)
	return i
}

// awaitAddresses waits until no address of an interface is tentative. Even one
// without duplicate address detection is for a moment, until the kernel's
// worker has seen to it, and takes no packets.
func awaitAddresses(t testing.TB, n *namespace, l netlink.Link) {
	t.Helper()
	if !ipv6Available() {
		return
	}
	Eventually(t, "the addresses of "+l.Attrs().Name, func() bool {
		addrs, err := n.nl.AddrList(l, netlink.FAMILY_V6)
		if err != nil {
			return false // a dump may be interrupted; the next is not
		}
		return !slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.Flags&unix.IFA_F_TENTATIVE != 0 })
	})
}

// Addr4 gives the first IPv4 address of eth0, or the zero Addr.
func (p *Pod) Addr4() netip.Addr { return p.addr(false) }

// Addr6 gives the first IPv6 address of eth0, or the zero Addr.
func (p *Pod) Addr6() netip.Addr { return p.addr(true) }

func (p *Pod) addr(is6 bool) netip.Addr {
	for _, a := range p.Interfaces[0].Addrs {
		if a.Addr().Is6() == is6 {
			return a.Addr()
		}
	}
	return netip.Addr{}
}

// AllAddrs gives the addresses of all interfaces but lo, those of eth0 first.
func (p *Pod) AllAddrs() []netip.Addr {
	var all []netip.Addr
	for _, i := range p.Interfaces {
		for _, a := range i.Addrs {
			all = append(all, a.Addr())
		}
	}
	return all
}

// NetnsPath gives the file that the namespace is mounted at: CNI_NETNS.
func (p *Pod) NetnsPath() string { return p.path }

// NetnsCookie gives the namespace's SO_NETNS_COOKIE.
func (p *Pod) NetnsCookie(t testing.TB) uint64 {
	t.Helper()
	cookie, err := p.cookie()
	if err != nil {
		t.Fatalf("read cookie of %s: %v", p.path, err)
	}
	return cookie
}

// CgroupPath gives the directory of the pod's cgroup, mount point and all.
func (p *Pod) CgroupPath() string { return p.cgroup.pod }

// CgroupRoot gives the directory that holds the pod's kubepods cgroup: what
// the cgroup2 mount is on a node.
func (p *Pod) CgroupRoot() string { return p.cgroup.root }

// RemoveCgroup removes the pod's cgroup, as the kubelet does some time after
// the sandbox has gone. No process may be left in it.
func (p *Pod) RemoveCgroup(t testing.TB) {
	t.Helper()
	if err := removeCgroup(p.cgroup.pod); err != nil {
		t.Fatal(err)
	}
}

// RemakeCgroup makes the pod's cgroup again.
func (p *Pod) RemakeCgroup(t testing.TB) {
	t.Helper()
	if err := os.MkdirAll(p.cgroup.pod, 0o755); err != nil {
		t.Fatal(err)
	}
}

// Destroy lets go of the pod's network namespace before the test's end; the
// cgroup stays. Actors and other processes in it must have been stopped, or
// the namespace lives on without a name.
func (p *Pod) Destroy(t testing.TB) {
	t.Helper()
	// The kernel takes a namespace down some time after its last user left.
	// Without its veth the world forgets the routes to it at once.
	for _, i := range p.Interfaces {
		l, err := p.nl.LinkByName(i.Name)
		if err == nil {
			err = p.nl.LinkDel(l)
		}
		if err != nil {
			t.Fatalf("remove %s: %v", i.Name, err)
		}
	}
	if err := p.namespace.close(); err != nil {
		t.Fatal(err)
	}
}

// DestroyAll is Destroy of many pods, and takes hardly longer than of one: the
// kernel takes down at once what has lost its last user by the time it comes to that.
func DestroyAll(t testing.TB, pods ...*Pod) {
	t.Helper()
	for _, p := range pods {
		if err := p.namespace.close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range pods {
		for name, far := range p.outside {
			Eventually(t, "the kernel to remove "+name+" of pod "+p.Name, func() bool {
				_, err := p.World.nl.LinkByName(far)
				var gone netlink.LinkNotFoundError
				return errors.As(err, &gone)
			})
		}
	}
}

// Do runs f on a thread in the pod's namespace. f must not end the test.
func (p *Pod) Do(f func() error) error { return p.namespace.do(f) }

// Netlink gives a netlink handle in the pod's namespace.
func (p *Pod) Netlink() *netlink.Handle { return p.nl }

// Netlink gives a netlink handle in the world's namespace.
func (w *World) Netlink() *netlink.Handle { return w.nl }

// Sysctl sets a value below /proc/sys in the pod's namespace.
func (p *Pod) Sysctl(t testing.TB, key, value string) {
	t.Helper()
	if err := p.sysctl(key, value); err != nil {
		t.Fatalf("set %s: %v", key, err)
	}
}

// EnableFastOpen lets clients and servers in the pod and its world use TCP fast
// open without a cookie, so that the first connect has its data in the SYN.
func (p *Pod) EnableFastOpen(t testing.TB) {
	t.Helper()
	const client, server, clientNoCookie, serverNoCookie = 0x1, 0x2, 0x4, 0x200
	value := fmt.Sprint(client | server | clientNoCookie | serverNoCookie)
	for _, n := range []*namespace{p.namespace, p.World.namespace} {
		if err := n.sysctl("net.ipv4.tcp_fastopen", value); err != nil {
			t.Fatal(err)
		}
	}
}

// EnablePing lets processes in the pod open ping sockets.
func (p *Pod) EnablePing(t testing.TB) {
	t.Helper()
	p.Sysctl(t, "net.ipv4.ping_group_range", "0 2147483647")
}

// Command runs a program in the pod's namespace, as root in the test's own
// cgroup, to its end, and gives its output; an exit status other than 0 ends
// the test.
func (p *Pod) Command(t testing.TB, argv ...string) string {
	t.Helper()
	return runIn(t, p.namespace, ProcessSpec{Argv: argv})
}

// Start starts a program inside of the pod, in its namespace and cgroup.
func (p *Pod) Start(t testing.TB, spec ProcessSpec) *Process {
	t.Helper()
	proc, err := startIn(t, p.namespace, p.cgroup, spec)
	if err != nil {
		t.Fatal(err)
	}
	return proc
}

// IPTablesRestore applies rules in the pod's namespace, without a flush of what
// is there; family is 4 or 6.
func (p *Pod) IPTablesRestore(t testing.TB, family int, rules string) {
	t.Helper()
	name := "iptables-restore"
	if family == 6 {
		name = "ip6tables-restore"
	}
	runIn(t, p.namespace, ProcessSpec{
		Argv:  []string{name, "--noflush"},
		Stdin: strings.NewReader(rules),
		// A namespace of one's own needs no lock of the host's.
		Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "XTABLES_LOCKFILE=" + t.TempDir() + "/xtables.lock"},
	})
}

// runIn runs a program to its end, which must be a good one.
func runIn(t testing.TB, ns *namespace, spec ProcessSpec) string {
	t.Helper()
	proc, err := startIn(t, ns, nil, spec)
	if err != nil {
		t.Fatal(err)
	}
	if code := proc.Wait(t); code != 0 {
		t.Fatalf("%q ended with status %d:\n%s", spec.Argv, code, proc.Output())
	}
	return proc.Output()
}

// ActorOption is a wish for an actor.
type ActorOption func(*ProcessSpec)

// InContainer names the container cgroup that an actor runs in; "app" else.
func InContainer(name string) ActorOption { return func(s *ProcessSpec) { s.Container = name } }

// WithCaps lets an actor with a uid other than 0 keep capabilities, such as
// unix.CAP_NET_ADMIN.
func WithCaps(caps ...uintptr) ActorOption { return func(s *ProcessSpec) { s.Caps = caps } }

// InHostCgroup leaves an actor in the test's own cgroup, out of the pod's.
func InHostCgroup() ActorOption { return func(s *ProcessSpec) { s.HostCgroup = true } }

// Actor starts an actor inside of the pod: a process of its own in the pod's
// namespace and cgroup, with uid and gid and no further groups.
func (p *Pod) Actor(t testing.TB, name string, uid, gid int, opts ...ActorOption) *Actor {
	t.Helper()
	ctl, theirCtl, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		t.Fatal(err)
	}
	aux, theirAux, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		t.Fatal(err)
	}
	defer theirCtl.Close()
	defer theirAux.Close()
	spec := ProcessSpec{
		// The link, not the path: the directory of a test binary is open to
		// its owner alone, and the child is another user when it executes.
		Argv: []string{"/proc/self/exe"},
		Env:  append(goEnv(), actorEnv+"="+name),
		UID:  uid, GID: gid,
		extraFiles: []*os.File{theirCtl, theirAux}, // actorCtlFD, actorAuxFD
	}
	for _, o := range opts {
		o(&spec)
	}
	proc, err := startIn(t, p.namespace, p.cgroup, spec)
	if err != nil {
		ctl.Close()
		aux.Close()
		t.Fatalf("start actor %s: %v", name, err)
	}
	r := newRemote(ctl, aux)
	a := &Actor{Name: name, UID: uid, GID: gid, PID: proc.PID, wire: r, proc: proc}
	t.Cleanup(r.hangUp) // runs before the process is killed
	return a
}

// goEnv passes on what steers the Go runtime.
func goEnv() []string {
	var env []string
	for _, key := range []string{"GORACE", "GODEBUG", "GOTRACEBACK", "PATH", "TMPDIR"} {
		if v, ok := os.LookupEnv(key); ok {
			env = append(env, key+"="+v)
		}
	}
	return env
}

// Proxy is an actor in the part of the sidecar proxy.
type Proxy struct {
	*Actor
	Out, In []*Listener
}

type proxyConfig struct {
	actor       []ActorOption
	name        string
	split       bool
	shape       func(*ListenSpec)
	out, in     uint16
	noOut, noIn bool
}

// ProxyOption is a wish for StartProxy.
type ProxyOption func(*proxyConfig)

// SplitFamilies makes one listener for each family in place of one for both.
func SplitFamilies() ProxyOption { return func(c *proxyConfig) { c.split = true } }

// ShapeListeners changes each listener before it is opened.
func ShapeListeners(f func(*ListenSpec)) ProxyOption { return func(c *proxyConfig) { c.shape = f } }

// ProxyPorts sets the ports; 0 opens no listener.
func ProxyPorts(out, in uint16) ProxyOption {
	return func(c *proxyConfig) { c.out, c.in, c.noOut, c.noIn = out, in, out == 0, in == 0 }
}

// ProxyName names the actor; "proxy" else.
func ProxyName(name string) ProxyOption { return func(c *proxyConfig) { c.name = name } }

// ProxyActor passes on wishes for the actor.
func ProxyActor(opts ...ActorOption) ProxyOption {
	return func(c *proxyConfig) { c.actor = append(c.actor, opts...) }
}

// StartProxy starts an actor in the container "proxy", with listeners "out" on
// port 15001 and "in" on 15006 of the wildcard addresses. They are not MPTCP.
func (p *Pod) StartProxy(t testing.TB, uid, gid int, opts ...ProxyOption) *Proxy {
	t.Helper()
	c := proxyConfig{name: "proxy", out: OutboundPort, in: InboundPort}
	for _, o := range opts {
		o(&c)
	}
	x := &Proxy{Actor: p.Actor(t, c.name, uid, gid, append([]ActorOption{InContainer("proxy")}, c.actor...)...)}
	if !c.noOut {
		x.Out = listenBoth(t, x.Actor, ListenSpec{Name: "out"}, c.out, c.split, c.shape)
	}
	if !c.noIn {
		x.In = listenBoth(t, x.Actor, ListenSpec{Name: "in"}, c.in, c.split, c.shape)
	}
	return x
}

// App is an actor in the part of the application.
type App struct {
	*Actor
	Listeners map[uint16][]*Listener // by port
}

// StartApp starts an actor in the container "app", as AppUID and AppGID, with
// listeners "app" on ports of the wildcard addresses.
func (p *Pod) StartApp(t testing.TB, ports ...uint16) *App {
	t.Helper()
	return p.StartAppAs(t, AppUID, AppGID, ports...)
}

// StartAppAs is StartApp with ids.
func (p *Pod) StartAppAs(t testing.TB, uid, gid int, ports ...uint16) *App {
	t.Helper()
	a := &App{Actor: p.Actor(t, "app", uid, gid), Listeners: map[uint16][]*Listener{}}
	for _, port := range ports {
		a.Listeners[port] = listenBoth(t, a.Actor, ListenSpec{Name: "app"}, port, false, nil)
	}
	return a
}

// listenBoth listens on a port of both families' wildcard addresses, by one
// socket or two.
func listenBoth(t testing.TB, a *Actor, spec ListenSpec, port uint16, split bool, shape func(*ListenSpec)) []*Listener {
	t.Helper()
	wild := []netip.Addr{netip.IPv6Unspecified()}
	if !ipv6Available() {
		wild = []netip.Addr{netip.IPv4Unspecified()}
	} else if split {
		wild = append(wild, netip.IPv4Unspecified())
	}
	var ls []*Listener
	for _, w := range wild {
		s := spec
		s.Addr, s.V6Only = netip.AddrPortFrom(w, port), split && w.Is6()
		if shape != nil {
			shape(&s)
		}
		ls = append(ls, a.Listen(t, s))
	}
	return ls
}
