// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// twin is one of two equal pods, each alone in an equal world: one behind
// eBPF, one behind the iptables rules that the semantics are written from.
type twin struct {
	*testbed.Pod
	proxy *testbed.Proxy
	app   *testbed.App
	ebpf  *pod // nil behind iptables
}

// twins runs a scenario in both and fails the test where what it gives
// differs. A scenario must not depend on chance: no ports that the kernel
// chooses, for instance.
type twins struct {
	behindEBPF, behindIPTables *twin
}

// twinPolicy are the annotations whose rules are written out in iptablesRules.
var twinPolicy = []testbed.PodMutator{
	testbed.Annotate(excludeRanges, "10.97.0.0/16,fd97::/16"),
	testbed.Annotate(includeInbound, "*"),
	testbed.Annotate(excludeInbound, "8081"),
}

// iptablesRules are sections 4 and 5 as iptables has them, for twinPolicy.
func iptablesRules(family int) string {
	lo, s6, excluded := "127.0.0.1/32", "127.0.0.6/32", "10.97.0.0/16"
	if family == 6 {
		lo, s6, excluded = "::1/128", "::6/128", "fd97::/16"
	}
	return fmt.Sprintf(`*nat
:SHUNT_OUT - [0:0]
:SHUNT_IN - [0:0]
-A OUTPUT -p tcp -j SHUNT_OUT
-A PREROUTING -p tcp -j SHUNT_IN
-A SHUNT_OUT -o lo -s %[2]s -j RETURN
-A SHUNT_OUT -o lo ! -d %[1]s -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j REDIRECT --to-ports 15006
-A SHUNT_OUT -o lo -m owner ! --uid-owner 1337 -j RETURN
-A SHUNT_OUT -m owner --uid-owner 1337 -j RETURN
-A SHUNT_OUT -o lo ! -d %[1]s -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j REDIRECT --to-ports 15006
-A SHUNT_OUT -o lo -m owner ! --gid-owner 1337 -j RETURN
-A SHUNT_OUT -m owner --gid-owner 1337 -j RETURN
-A SHUNT_OUT -d %[1]s -j RETURN
-A SHUNT_OUT -d %[3]s -j RETURN
-A SHUNT_OUT -p tcp -j REDIRECT --to-ports 15001
-A SHUNT_IN -p tcp --dport 15008 -j RETURN
-A SHUNT_IN -p tcp -m multiport --dports 8081,15020,15021,15090 -j RETURN
-A SHUNT_IN -p tcp -j REDIRECT --to-ports 15006
COMMIT
`, lo, s6, excluded)
}

func newTwins(t *testing.T, n *node, opts ...testbed.Option) *twins {
	t.Helper()
	one := func() *testbed.Pod {
		w := testbed.NewWorld(t)
		w.ServeAll(t)
		return testbed.NewPod(t, append([]testbed.Option{testbed.InWorld(w)}, opts...)...)
	}
	x := &twins{behindEBPF: &twin{Pod: one()}, behindIPTables: &twin{Pod: one()}}
	x.behindEBPF.ebpf = n.redirect(t, x.behindEBPF.Pod, twinPolicy...)
	p := x.behindIPTables.Pod
	p.IPTablesRestore(t, 4, iptablesRules(4))
	p.IPTablesRestore(t, 6, iptablesRules(6))
	if p.Addr6().IsValid() {
		err := p.Netlink().AddrAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}, &netlink.Addr{
			IPNet: &net.IPNet{IP: net.ParseIP("::6"), Mask: net.CIDRMask(128, 128)}, Flags: unix.IFA_F_NODAD,
		})
		if err != nil {
			t.Fatalf("put ::6 on lo: %v", err)
		}
	}
	return x
}

// withCast starts a proxy and an app in both.
func (x *twins) withCast(t *testing.T, opts ...testbed.ProxyOption) *twins {
	t.Helper()
	for _, p := range []*twin{x.behindEBPF, x.behindIPTables} {
		p.proxy = p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, opts...)
		p.app = p.StartApp(t, 8080, 8081)
	}
	return x
}

// compare runs a scenario in both pods. It returns what came of it behind eBPF,
// for those who know more than that both are alike.
func compare[T any](t *testing.T, x *twins, name string, scenario func(t *testing.T, p *twin) T) (got T) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		t.Helper()
		want := scenario(t, x.behindIPTables)
		got = scenario(t, x.behindEBPF)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-iptables +ebpf):\n%s", diff)
		}
	})
	return got
}

// likeness is see, less what may differ: a port that the kernel chose, and
// answers that only eBPF gives: SOL_IPV6 on a connection over IPv4, and any to
// those who were not redirected.
func likeness(spec testbed.ConnectSpec, r testbed.ConnectResult) seen {
	s := see(r)
	if spec.Bind.Port() == 0 {
		s.ServerPeer, s.ClientLocal = host(s.ServerPeer), host(s.ClientLocal)
	}
	v4 := r.Peer.Addr().Unmap().Is4()
	if s.Listener == "app" || s.Listener == "world" {
		s.Original4, s.Original6 = "", ""
	}
	if v4 {
		s.Original6 = ""
	}
	return s
}

func host(addrPort string) string {
	a, err := netip.ParseAddrPort(addrPort)
	if err != nil {
		return addrPort
	}
	return a.Addr().String()
}
