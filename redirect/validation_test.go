// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
)

// TestPrivilegedIstioValidation plays Istio's own validation init container
// (istio-iptables --run-validation), which users may keep: as the proxy's uid it
// listens on loopback at both ports, dials 127.0.0.6:15002 from 127.0.0.1 (::6
// from ::1), and wants the accepted socket to know port 15002. Its listeners are
// of Multipath TCP since it is built with Go 1.24.
func TestPrivilegedIstioValidation(t *testing.T) {
	begin(t)
	for _, n := range nodes(t, anyone) {
		for _, mptcp := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, multipath %v", n.name, mptcp), func(t *testing.T) {
				p := testbed.NewPod(t, testbed.InWorld(n.world))
				validation := p.Actor(t, "validation", testbed.ProxyUID, testbed.ProxyGID, testbed.InContainer("validation"))
				passes := func(want bool, patience time.Duration) {
					t.Helper()
					for _, family := range []struct{ listen, to string }{{"127.0.0.1", "127.0.0.6"}, {"::1", "::6"}} {
						local := netip.MustParseAddr(family.listen)
						var listeners []*testbed.Listener
						for _, port := range []uint16{testbed.OutboundPort, testbed.InboundPort} {
							listeners = append(listeners, validation.Listen(t, testbed.ListenSpec{Name: fmt.Sprint(port), Addr: at(local, port), MPTCP: mptcp}))
						}
						dst := at(netip.MustParseAddr(family.to), 15002)
						r := validation.Connect(t, testbed.ConnectSpec{
							SocketSpec: testbed.SocketSpec{Bind: at(local, 0)}, Dst: dst, Timeout: patience,
						})
						if got := r.Served != nil && r.Served.OrigDst().OK() && r.Served.OrigDst().Addr.Port() == 15002; got != want {
							t.Errorf("to %v: passes %v, want %v: %+v (%+v)", dst, got, want, r, r.Served)
						}
						if want && r.Served != nil && r.Served.OrigDst().Addr != dst {
							t.Errorf("to %v: original destination %v", dst, r.Served.OrigDst())
						}
						for _, l := range listeners {
							l.Close(t)
						}
					}
				}
				passes(false, 300*time.Millisecond)
				n.apply(t, p, n.policy(t, p))
				passes(true, 5*time.Second)
			})
		}
	}
}
