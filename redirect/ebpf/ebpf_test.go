// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"fmt"
	"net/netip"
	"testing"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

func TestMain(m *testing.M) { testbed.Main(m) }

func TestPrivilegedSmoke(t *testing.T) {
	testbed.Privileged(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := testbed.NewPod(t, testbed.InWorld(w))
	opts := loader.Options{BPFDir: testbed.BPFFS(t) + "/shunt", RunDir: t.TempDir()}
	b := New(opts)
	cfg := redirect.DefaultConfig()
	pod, err := redirect.ParsePod(p.Injected())
	if err != nil {
		t.Fatal(err)
	}
	o, pol, err := cfg.Evaluate(pod)
	if err != nil || pol == nil {
		t.Fatal(o, err)
	}
	target := redirect.Target{Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"}, Netns: p.NetnsPath(), Cgroup: p.CgroupPath()}
	if err := b.Apply(t.Context(), target, pol); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(t.Context(), target); err != nil {
		t.Fatal(err)
	}
	p.StartProxy(t, 1337, 1337)
	app := p.StartApp(t, 8080, 9090)
	for _, dst := range []string{"10.99.1.2:80", "[fd99::5]:443", "127.0.0.1:8080", p.Addr4().String() + ":8080"} {
		r := app.Connect(t, testbed.ConnectSpec{Dst: netip.MustParseAddrPort(dst)})
		fmt.Printf("%s: %v %v listener=%s\n  client %+v\n  served %+v\n", dst, r.Errno, r.Step, r.Listener(), r.SockInfo, r.Served)
	}
	r := app.Connect(t, testbed.ConnectSpec{Dst: netip.MustParseAddrPort("[::ffff:10.99.1.2]:80")})
	fmt.Printf("mapped %v %v listener=%s\n  client %+v\n  served %+v\n", r.Errno, r.Step, r.Listener(), r.SockInfo, r.Served)
	r = app.Connect(t, testbed.ConnectSpec{SocketSpec: testbed.SocketSpec{MPTCP: true}, Dst: netip.MustParseAddrPort("10.99.1.2:80")})
	fmt.Printf("mptcp %v %v listener=%s\n  client %+v\n  served %+v\n", r.Errno, r.Step, r.Listener(), r.SockInfo, r.Served)
	for _, port := range []uint16{8080, 9090, 15006, 15008} {
		for _, a := range []netip.Addr{p.Addr4(), p.Addr6()} {
			r := w.Connect(t, testbed.ConnectSpec{Dst: netip.AddrPortFrom(a, port)})
			fmt.Printf("inbound %v:%d: %v listener=%s\n  served %+v\n", a, port, r.Errno, r.Listener(), r.Served)
		}
	}
	if err := b.Remove(t.Context(), target.Attachment); err != nil {
		t.Fatal(err)
	}
}
