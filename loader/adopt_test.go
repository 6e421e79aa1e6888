// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"shunt.dev/shunt/internal/testbed"
)

// TestPrivilegedListenersThatEnd: a listener that ends between the list and the
// look at who holds it is none. `shunt validate` has such in a pod that is mended.
// One that listens on, and that nobody holds, is said.
func TestPrivilegedListenersThatEnd(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	p := testbed.NewPod(t)
	ns, err := OpenNetns(p.NetnsPath())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
	const port = testbed.InboundPort
	listen := func(addr netip.Addr) *testbed.Listener {
		return proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: netip.AddrPortFrom(addr, port)})
	}
	stays, ends := listen(p.Addr4()), listen(p.Addr6())
	listed, err := ns.listeners(port)
	if err != nil || len(listed) != 2 {
		t.Fatalf("listeners: %v, %v", listed, err)
	}
	held := func() (int, error) {
		got, err := ns.held(port, listed)
		for _, s := range got {
			s.close()
		}
		return len(got), err
	}
	if n, err := held(); n != 2 || err != nil {
		t.Errorf("both there: %d, %v", n, err)
	}
	ends.Close(t)
	if n, err := held(); n != 1 || err != nil {
		t.Errorf("one has ended: %d, %v", n, err)
	}
	stays.Close(t)
	if n, err := held(); n != 0 || err != nil {
		t.Errorf("both have ended: %d, %v", n, err)
	}
	// Held by this process, which is in no namespace of the pod's.
	var elsewhere net.Listener
	if err := ns.do(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		elsewhere, err = lc.Listen(t.Context(), "tcp4", netip.AddrPortFrom(p.Addr4(), port).String())
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	if listed, err = ns.listeners(port); err != nil || len(listed) != 1 {
		t.Fatalf("listeners: %v, %v", listed, err)
	}
	if n, err := held(); n != 0 || err == nil || !strings.Contains(err.Error(), "no process of the pod holds") {
		t.Errorf("one that nobody in the pod holds: %d, %v", n, err)
	}
}
