// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
	ebpfbackend "shunt.dev/shunt/redirect/ebpf"
)

// later is a pod whose addresses and interfaces change after it was programmed.
type later struct {
	*node
	*pod
}

func newLater(t *testing.T, n *node, mutators []testbed.PodMutator, opts ...testbed.ProxyOption) *later {
	t.Helper()
	return &later{n, n.pod(t, append(slices.Clone(includeAll), mutators...), opts...)}
}

// outcome is who serves a connection, and what it is told of where that went; or
// the connect's error.
func outcome(r testbed.ConnectResult) string {
	if r.Served == nil {
		return r.Errno
	}
	told := r.Served.OrigDst4
	if r.Served.Peer.Addr().Unmap().Is6() {
		told = r.Served.OrigDst6
	}
	if !redirected(r.Listener()) {
		return r.Listener()
	}
	return fmt.Sprintf("%s: %s", r.Listener(), plain(told.Addr))
}

// expect tries connections, by what they are from and to, with what must come of
// each. in and out stand for the proxy's listeners, told of the destination.
func (l *later) expect(t *testing.T, when string, flows map[[2]string]string) {
	t.Helper()
	for _, k := range slices.SortedFunc(maps.Keys(flows), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		want := flows[k]
		if redirected(want) {
			want += ": " + k[1]
		}
		spec := testbed.ConnectSpec{Dst: ap(k[1]), Abort: true}
		if got := outcome(l.who(k[0]).Connect(t, spec)); got != want {
			t.Errorf("%s, %s: %s to %s: %q, want %q", l.node.name, when, k[0], k[1], got, want)
		}
	}
}

const (
	later4, later6 = "10.246.1.1", "fd12::1"
	net14, net16   = "10.247.1.1", "fd13::1"
)

// TestPrivilegedLater: addresses and interfaces that come after ADD, and go again,
// on every backend. What arrives by them is redirected; what leaves by them is; what
// the pod says to its own new address stays in it, by the same rules.
func TestPrivilegedLater(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			l := newLater(t, n, nil)
			before := map[[2]string]string{
				{app, "10.77.0.1:80"}: "out", {app, "[fd77::1]:80"}: "out",
				{world, at(l.Addr4(), 8080).String()}: "in", {world, at(l.Addr6(), 8080).String()}: "in",
				{app, at(l.Addr4(), 8080).String()}: "app", {proxy, at(l.Addr6(), 8080).String()}: "in",
				{app, later4 + ":8080"}: "out", {proxy, later4 + ":8080"}: "world",
			}
			l.expect(t, "before", before)

			l.AddAddrs(t, "eth0", later4, later6)
			for _, a := range []string{later4 + ":", "[" + later6 + "]:"} {
				l.expect(t, "a new address", map[[2]string]string{
					{world, a + "8080"}: "in", {world, a + "8081"}: "app",
					{app, a + "8080"}: "app", {proxy, a + "8080"}: "in", {gidOf, a + "8080"}: "app",
					{proxy, a + "15008"}: "ECONNREFUSED",
					// Told where it went, though nobody redirected it.
					{app, a + "15001"}: "out", {app, a + "15006"}: "in",
				})
			}

			l.AddInterface(t, "net1", []string{net14, net16}, []string{"10.77.0.0/16", "fd77::/16"})
			for _, a := range []string{net14 + ":", "[" + net16 + "]:"} {
				l.expect(t, "a new interface", map[[2]string]string{
					{world, a + "8080"}: "in", {world, a + "8081"}: "app", {world, a + "15006"}: "in",
					{app, a + "8080"}: "app", {proxy, a + "8080"}: "in",
				})
			}
			l.expect(t, "a new interface", map[[2]string]string{
				{app, "10.77.0.1:80"}: "out", {app, "[fd77::1]:80"}: "out", {proxy, "10.77.0.1:80"}: "world", {gidOf, "[fd77::1]:80"}: "world",
			})

			// An address that has gone is anybody's.
			eth0, err := l.Netlink().LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			for _, a := range []string{later4, later6} {
				ip := netip.MustParseAddr(a)
				if err := l.Netlink().AddrDel(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(ip.BitLen(), ip.BitLen())}}); err != nil {
					t.Fatal(err)
				}
				dst := at(ip, 8080).String()
				l.expect(t, "gone", map[[2]string]string{{app, dst}: "out"})
			}
			l.expect(t, "after", map[[2]string]string{{app, at(l.Addr4(), 8080).String()}: "app", {proxy, at(l.Addr6(), 8080).String()}: "in"})
		})
	}
}

// slowDAD has a pod's eth0 ask whether others have its addresses, and wait for a
// while before it takes silence for a no.
func (l *later) slowDAD(t *testing.T, wait time.Duration) {
	t.Helper()
	l.Sysctl(t, "net.ipv6.conf.eth0.accept_dad", "1")
	l.Sysctl(t, "net.ipv6.conf.eth0.dad_transmits", "1")
	l.Sysctl(t, "net.ipv6.neigh.eth0.retrans_time_ms", fmt.Sprint(wait.Milliseconds()))
}

// addTentative puts an address on eth0, which the world has too if it is to be a
// duplicate. flags are the kernel's of it.
func (l *later) addTentative(t *testing.T, address string, duplicate bool) (flags func() int) {
	t.Helper()
	ip := netip.MustParseAddr(address)
	a := &netlink.Addr{IPNet: &net.IPNet{IP: ip.AsSlice(), Mask: net.CIDRMask(128, 128)}, Flags: unix.IFA_F_NOPREFIXROUTE}
	eth0, err := l.Netlink().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if duplicate {
		outer, err := l.World.Netlink().LinkByIndex(eth0.Attrs().ParentIndex)
		if err != nil {
			t.Fatal(err)
		}
		b := *a
		b.Flags = unix.IFA_F_NODAD
		if err := l.World.Netlink().AddrAdd(outer, &b); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Netlink().AddrAdd(eth0, a); err != nil {
		t.Fatal(err)
	}
	return func() int {
		list, err := l.Netlink().AddrList(eth0, netlink.FAMILY_V6)
		if err != nil {
			return unix.IFA_F_TENTATIVE // a dump may be interrupted; the next is not
		}
		i := slices.IndexFunc(list, func(a netlink.Addr) bool { return a.IP.Equal(ip.AsSlice()) })
		if i < 0 {
			t.Fatalf("%v is not on eth0", ip)
		}
		return list[i].Flags
	}
}

// expectForeign tries connections to and from an address that the pod has only
// tried to take: it is somebody else's.
func (l *later) expectForeign(t *testing.T, when, address string) {
	t.Helper()
	ip := netip.MustParseAddr(address)
	l.expect(t, when, map[[2]string]string{{app, at(ip, 80).String()}: "out"})
	spec := testbed.ConnectSpec{Dst: at(l.Addr6(), 8080), Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(ip, 0)}}
	if got, want := outcome(l.who(world).Connect(t, spec)), "in: "+spec.Dst.String(); got != want {
		t.Errorf("%s, %s: world from %v: %q, want %q", l.node.name, when, ip, got, want)
	}
}

// TestPrivilegedLaterDuplicate: an address that another has is not the pod's own by
// its trying to take it, neither after ADD nor before.
func TestPrivilegedLaterDuplicate(t *testing.T) {
	begin(t)
	const dup = "fd15::99"
	for _, n := range nodes(t, anyone) {
		t.Run(n.name+"/after", func(t *testing.T) {
			l := newLater(t, n, nil)
			l.slowDAD(t, time.Second)
			flags := l.addTentative(t, dup, true)
			testbed.Eventually(t, "the end of DAD", func() bool { return flags()&unix.IFA_F_DADFAILED != 0 })
			l.expectForeign(t, "its DAD has failed", dup)
		})
		t.Run(n.name+"/before", func(t *testing.T) {
			l := &later{n, n.podBy(t, func(p *testbed.Pod) {
				l := &later{n, &pod{Pod: p}}
				l.slowDAD(t, time.Second)
				flags := l.addTentative(t, dup, true)
				testbed.Eventually(t, "the end of DAD", func() bool { return flags()&unix.IFA_F_DADFAILED != 0 })
			}, includeAll)}
			l.expectForeign(t, "its DAD had failed", dup)
		})
	}
}

// TestPrivilegedLaterDAD: an address whose DAD ends after ADD is the pod's own from
// then on; and where that is all that changes, no list is asked any more.
func TestPrivilegedLaterDAD(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			var flags func() int
			l := &later{n, n.podBy(t, func(p *testbed.Pod) {
				l := &later{n, &pod{Pod: p}}
				l.slowDAD(t, 2*time.Second)
				flags = l.addTentative(t, later6, false)
			}, includeAll)}
			known := func(when string, want bool) {
				t.Helper()
				if n.bpfDir == "" {
					return
				}
				if s := n.state(t, l.Pod); (s.Generation == s.Compared) != want {
					t.Errorf("%s, %s: dests are the pod's addresses: %v", n.name, when, !want)
				}
			}
			l.expect(t, "at ADD", map[[2]string]string{{app, at(l.Addr6(), 8080).String()}: "app"})
			if flags()&unix.IFA_F_TENTATIVE != 0 {
				known("at ADD", false)
			}
			testbed.Eventually(t, "the end of DAD", func() bool { return flags()&unix.IFA_F_TENTATIVE == 0 })
			own := at(netip.MustParseAddr(later6), 8080).String()
			l.expect(t, "after DAD", map[[2]string]string{{app, own}: "app", {proxy, own}: "in"})
			known("after DAD", true)

			l.AddAddrs(t, "eth0", later4)
			l.expect(t, "another address", map[[2]string]string{{app, later4 + ":8080"}: "app"})
			known("another address", false)
		})
	}
}

// TestPrivilegedLaterBound: the proxy's connection to an address that came later,
// from a socket that is bound to a port and no address, is told where it went.
func TestPrivilegedLaterBound(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			l := newLater(t, n, nil)
			l.AddAddrs(t, "eth0", later4, later6)
			for port, a := range map[uint16]netip.Addr{20001: l.Addr4(), 20002: netip.MustParseAddr(later4), 20003: netip.MustParseAddr(later6)} {
				bind := netip.IPv4Unspecified()
				if a.Is6() {
					bind = netip.IPv6Unspecified()
				}
				spec := testbed.ConnectSpec{Dst: at(a, 9999), Abort: true, SocketSpec: testbed.SocketSpec{Bind: at(bind, port)}}
				if got, want := outcome(l.who(proxy).Connect(t, spec)), "in: "+spec.Dst.String(); got != want {
					t.Errorf("%s: %q, want %q", n.name, got, want)
				}
			}
		})
	}
}

// TestPrivilegedLaterRefused: what arrives by an interface that came after ADD meets
// no app where the proxy has no listener, or one that can't be registered.
func TestPrivilegedLaterRefused(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			l := newLater(t, n, nil, noListeners...)
			l.AddInterface(t, "net1", []string{net14, net16}, nil)
			for _, a := range []string{net14, net16} {
				dst := netip.MustParseAddr(a)
				l.expect(t, "no listener", map[[2]string]string{
					{world, at(dst, 8080).String()}: "ECONNREFUSED", {world, at(dst, 8081).String()}: "app",
				})
			}
			spec := listenIn("[::]:15006")
			spec.MPTCP = true
			in, errno := l.who(proxy).TryListen(t, spec)
			if errno == "EPROTONOSUPPORT" || errno == "ENOPROTOOPT" {
				return // nothing listens by that here
			}
			if errno != "" {
				t.Fatal(errno)
			}
			defer in.CloseAll(t)
			for _, a := range []string{net14, net16} {
				dst := at(netip.MustParseAddr(a), 8080).String()
				want := "in"
				if n.bpfDir != "" && n.failed(t, l.Pod)[bpf.ShuntPlacePLACE_LISTENER_NONE] > 0 && n.unregistrable(t, l) {
					want = "ECONNREFUSED"
				}
				l.expect(t, "an MPTCP listener", map[[2]string]string{{world, dst}: want})
			}
		})
	}
}

// unregistrable reports whether the kernel keeps a pod's listener out of the map.
func (n *node) unregistrable(t *testing.T, l *later) bool {
	t.Helper()
	s := n.state(t, l.Pod)
	return !slices.ContainsFunc(s.Listeners[:], func(cookie uint64) bool { return cookie != 0 })
}

// TestPrivilegedExcludedLater: in a pod with an excluded interface others come, and
// names and addresses change. Where it is not certain any more by which interface a
// connection leaves, nothing is excluded, and that is counted.
func TestPrivilegedExcludedLater(t *testing.T) {
	begin(t)
	const uncertain = bpf.ShuntPlacePLACE_INTERFACES
	for _, n := range nodes(t, anyone) {
		t.Run(n.name, func(t *testing.T) {
			ebpf := n.bpfDir != ""
			// what gives, of what is on iptables and on eBPF, what is here.
			what := func(ipt, bpf string) string {
				if ebpf {
					return bpf
				}
				return ipt
			}
			l := newLater(t, n, []testbed.PodMutator{testbed.Annotate(keyExcludeInterfaces, "eth0")})
			own4, own6 := at(l.Addr4(), 8080).String(), at(l.Addr6(), 8080).String()
			counted := func(when string, want bool) {
				t.Helper()
				if ebpf && (n.failed(t, l.Pod)[uncertain] > 0) != want {
					t.Errorf("%s, %s: counted %v", n.name, when, n.failed(t, l.Pod))
				}
			}
			direct := map[[2]string]string{
				{app, "10.99.0.1:80"}: "world", {app, "[fd99::1]:80"}: "world", {proxy, own4}: "in", {proxy, own6}: "in", {app, own4}: "app",
				{world, own4}: "app", {world, own6}: "app",
			}
			l.expect(t, "as it was at ADD", direct)

			// An address of its own is by lo, whenever it came.
			l.AddAddrs(t, "eth0", later4, later6)
			l.expect(t, "a new address", direct)
			for _, a := range []string{later4 + ":8080", "[" + later6 + "]:8080"} {
				l.expect(t, "a new address", map[[2]string]string{{app, a}: "app", {proxy, a}: "in", {world, a}: "app"})
			}
			counted("a new address", false)

			l.AddInterface(t, "net1", []string{net14, net16}, []string{"10.77.0.0/16", "fd77::/16"})
			l.expect(t, "a new interface", map[[2]string]string{
				{app, "10.77.0.1:80"}: "out", {app, "[fd77::1]:80"}: "out",
				{app, "10.99.0.1:80"}: what("world", "out"), {app, "[fd99::1]:80"}: what("world", "out"), {proxy, "10.99.0.1:80"}: "world",
				{proxy, own4}: "in", {app, own6}: "app", {proxy, net14 + ":8080"}: "in",
				{world, own4}: "app", {world, own6}: "app",
				{world, net14 + ":8080"}: "in", {world, "[" + net16 + "]:8080"}: "in",
			})
			counted("a new interface", true)

			// Down, it leads nowhere; and as if it had never been.
			net1, err := l.Netlink().LinkByName("net1")
			if err != nil {
				t.Fatal(err)
			}
			if err := l.Netlink().LinkSetDown(net1); err != nil {
				t.Fatal(err)
			}
			l.expect(t, "the new interface down", direct)
			if err := l.Netlink().LinkDel(net1); err != nil {
				t.Fatal(err)
			}
			l.expect(t, "the new interface gone", direct)

			// Under another name it is not the one that is excluded.
			eth0, err := l.Netlink().LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			err = l.Netlink().LinkSetName(eth0, "renamed")
			if errors.Is(err, unix.EBUSY) {
				return // before Linux 6.2 nothing that is up is renamed
			}
			if err != nil {
				t.Fatal(err)
			}
			l.expect(t, "renamed", map[[2]string]string{
				{app, "10.99.0.1:80"}: "out", {app, "[fd99::1]:80"}: "out", {proxy, own4}: "in", {app, own4}: "app",
				{world, own4}: "in", {world, own6}: "in",
			})
			if err := l.Netlink().LinkSetName(eth0, "eth0"); err != nil {
				t.Fatal(err)
			}
			l.expect(t, "named as it was", direct)
		})
	}
}

// TestPrivilegedExcludedBound: a socket that is bound to an interface leaves by
// that, as its own address by lo: the same on every backend.
func TestPrivilegedExcludedBound(t *testing.T) {
	begin(t)
	for _, excluded := range []string{"eth0", "lo", "eth0,lo"} {
		t.Run(excluded, func(t *testing.T) {
			var first map[string]string
			for _, n := range nodes(t, anyone) {
				l := newLater(t, n, []testbed.PodMutator{testbed.Annotate(keyExcludeInterfaces, excluded)})
				got := map[string]string{}
				for _, device := range []string{"eth0", "lo"} {
					for _, by := range []string{app, proxy} {
						for _, dst := range []string{"10.99.0.1:80", "[fd99::1]:80", at(l.Addr4(), 8080).String(), at(l.Addr6(), 8080).String(), "127.0.0.1:8080", "[::1]:8080"} {
							spec := testbed.ConnectSpec{Dst: ap(dst), Abort: true, Timeout: silence, SocketSpec: testbed.SocketSpec{Device: device}}
							r := l.who(by).Connect(t, spec)
							if r.Step == testbed.StepGreeting { // somebody is there, and may be slow
								spec.Timeout = 0
								r = l.who(by).Connect(t, spec)
							}
							x := outcome(r)
							// Direct or not, it gets nowhere.
							if slices.Contains([]string{testbed.ErrnoTimeout, "ENETUNREACH", "EHOSTUNREACH", "EINVAL"}, x) {
								x = "nowhere"
							}
							got[fmt.Sprintf("%s at %s to %s", by, device, dst)] = x
						}
					}
				}
				if first == nil {
					first = got
					t.Logf("%v", got)
				} else if diff := cmp.Diff(first, got); diff != "" {
					t.Errorf("%s (-%s +%s):\n%s", n.name, kinds[0].name, n.name, diff)
				}
			}
		})
	}
}

// TestPrivilegedExcludedUnserved: eBPF leaves pods to others of whose connections
// it can't tell the way, and nothing of the attempt is left.
func TestPrivilegedExcludedUnserved(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, anyone) {
		if n.bpfDir == "" {
			continue
		}
		for _, x := range []struct {
			name, excluded string
			opts           []testbed.Option
			serves         bool
		}{
			{"the only one", "eth0", nil, true},
			{"and lo", "lo,eth0", nil, true},
			{"not there", "net1", nil, false},
			{"one of two not there", "eth0,net1", nil, false},
			{"several", "net1", net1("10.245.1.40", "fd11:1::40"), false},
			{"lo of several", "lo", net1("10.245.1.41", "fd11:1::41"), false},
		} {
			t.Run(n.name+"/"+x.name, func(t *testing.T) {
				p := testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(n.world)}, x.opts...)...)
				_, policy := setup{mutators: []testbed.PodMutator{testbed.Annotate(keyExcludeInterfaces, x.excluded)}}.evaluate(t, p)
				if x.serves {
					n.apply(t, p, policy)
					return
				}
				to := target(p)
				to.Hook = n.hook
				err := n.Apply(t.Context(), to, policy)
				if err == nil || ebpfbackend.Reason(err).Name != redirect.ReasonExcludeInterfaces {
					t.Errorf("excluding %s: %v", x.excluded, err)
				}
				if n.Backend.(*ebpfbackend.Backend).Knows(to.Attachment) {
					t.Error("something of it is left")
				}
			})
		}
	}
}
