// SPDX-License-Identifier: Apache-2.0

//go:build linux

package backends

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/internal/tproxy"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// redirected fails the test unless connections of each family, out of the pod,
// into it and to itself, reach the proxy, which is told where they were going.
func redirected(t *testing.T, when string, p *testbed.Pod, app *testbed.App) {
	t.Helper()
	expect := func(dst netip.AddrPort, listener string, r testbed.ConnectResult) {
		t.Helper()
		if r.Served == nil || r.Listener() != listener || r.Served.OrigDst().Addr != dst {
			t.Errorf("%s: to %v: %+v (%+v), want %s with that destination", when, dst, r, r.Served, listener)
		}
	}
	for _, s := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
		dst := netip.MustParseAddrPort(s)
		expect(dst, "out", app.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}))
	}
	for _, a := range p.AllAddrs() {
		dst := netip.AddrPortFrom(a, 8080)
		expect(dst, "in", p.World.Connect(t, testbed.ConnectSpec{Dst: dst, Abort: true}))
	}
}

// node gives a node's backends, and what they are to do for a pod that runs.
func node(t *testing.T, p *testbed.Pod, mutators ...testbed.PodMutator) (*Backends, redirect.Target, *redirect.Policy) {
	t.Helper()
	return nodeOf(t, iptables.Auto, p, mutators...)
}

func nodeOf(t *testing.T, mode iptables.Mode, p *testbed.Pod, mutators ...testbed.PodMutator) (*Backends, redirect.Target, *redirect.Policy) {
	t.Helper()
	facts, err := redirect.ParsePod(p.Injected(append(mutators, testbed.ContainerPorts(8080))...))
	if err != nil {
		t.Fatal(err)
	}
	conf := redirect.DefaultConfig()
	_, policy, err := conf.Evaluate(facts)
	if err != nil || policy == nil {
		t.Fatalf("policy %v, %v", policy, err)
	}
	target := redirect.Target{
		Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
		Network:    "test", Netns: p.NetnsPath(), Cgroup: p.CgroupPath(), Addrs: p.AllAddrs(), Running: true,
	}
	b := New(Options{BPFDir: testbed.BPFFS(t) + "/shunt", RunDir: t.TempDir(), Iptables: mode})
	t.Cleanup(func() {
		if err := b.Remove(context.Background(), target.Attachment); err != nil {
			t.Error(err)
		}
	})
	return b, target, policy
}

func chosen(d redirect.Datapath) redirect.Choice {
	return redirect.Choice{Datapath: d, Hook: redirect.HookSkLookup, Reasons: redirect.Reasons{{Name: "test", Text: "test"}}}
}

// TestPrivilegedChange: a pod that runs goes from one datapath to the other and
// back, and is redirected rightly at every moment: also while both are in force.
func TestPrivilegedChange(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, mode := range []iptables.Mode{iptables.NFT, iptables.Legacy} {
		t.Run(string(mode), func(t *testing.T) { testChange(t, mode) })
	}
}

func testChange(t *testing.T, mode iptables.Mode) {
	p := testbed.NewPod(t)
	p.World.ServeAll(t)
	b, target, policy := nodeOf(t, mode, p)
	save := func() (all string) {
		for _, name := range []string{"iptables-%s-save", "ip6tables-%s-save"} {
			all += p.Command(t, fmt.Sprintf(name, mode))
		}
		return all
	}
	p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
	app := p.StartApp(t, 8080)
	apply := func(c redirect.Choice) {
		t.Helper()
		if _, err := b.Apply(t.Context(), target, policy, c); err != nil {
			t.Fatal(err)
		}
		redirected(t, string(c.Datapath), p, app)
		if err := b.Check(t.Context(), target); err != nil {
			t.Error(err)
		}
		rules := strings.Contains(save(), "SHUNT_OUT")
		if on := b.ebpf.Check(t.Context(), target) == nil; on != (c.Datapath == redirect.EBPF) || rules == on {
			t.Errorf("%s: eBPF %v, rules %v", c.Datapath, on, rules)
		}
		if s6 := p.Command(t, "ip", "-6", "addr", "show", "dev", "lo"); !strings.Contains(s6, "::6/128") {
			t.Errorf("%s: ::6 is not on lo:\n%s", c.Datapath, s6)
		}
	}
	// A connection lives on through all that follows, whoever has redirected it.
	alive := map[int]string{}
	begin := func(when string) {
		t.Helper()
		for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
			r := app.Connect(t, testbed.ConnectSpec{Dst: netip.MustParseAddrPort(dst), Keep: true})
			if r.Listener() != "out" {
				t.Fatalf("%s: to %s: %+v", when, dst, r)
			}
			alive[r.Sock] = when + " to " + dst
		}
	}
	lives := func(when string) {
		t.Helper()
		for sock, what := range alive {
			errno := app.Send(t, sock, when+"\n")
			line, errno2 := app.RecvLine(t, sock, 2*time.Second)
			if errno != "" || errno2 != "" || strings.TrimSpace(line) != when {
				t.Errorf("%s: the connection %s: %q, %s%s", when, what, line, errno, errno2)
				delete(alive, sock)
			}
		}
	}
	// The proxy's listeners were open before anything was there to see them
	// open.
	for _, d := range []redirect.Datapath{redirect.Iptables, redirect.EBPF, redirect.Iptables, redirect.EBPF} {
		apply(chosen(d))
		lives(string(d))
		begin(string(d))
	}

	if err := b.iptables.Apply(t.Context(), target, policy); err != nil {
		t.Fatal(err)
	}
	redirected(t, "both", p, app)
	lives("both")
	for range 2 { // and again: nothing more is to do
		if err := b.yield(t.Context(), target.Attachment, true); err != nil {
			t.Fatal(err)
		}
	}
	redirected(t, "eBPF again", p, app)
	lives("eBPF again")
	if got, err := b.Attachments(t.Context(), "test"); len(got) != 1 || err != nil {
		t.Errorf("attachments %v, %v", got, err)
	}
	if err := b.Remove(t.Context(), target.Attachment); err != nil {
		t.Error(err)
	}
	if rules := save(); strings.Contains(rules, "SHUNT") {
		t.Errorf("rules that are left:\n%s", rules)
	}
}

// TestPrivilegedProxySpeaksFirst: when iptables comes, the first packet that it
// sees of a connection of eBPF's may be the proxy's.
func TestPrivilegedProxySpeaksFirst(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	p := testbed.NewPod(t)
	b, target, policy := node(t, p)
	if _, err := b.Apply(t.Context(), target, policy, chosen(redirect.EBPF)); err != nil {
		t.Fatal(err)
	}
	proxy, app := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID), p.StartApp(t)
	// The test is the proxy: a listener of the bed speaks when it is spoken to.
	listener := int(proxy.TakeSocket(t, proxy.Bind(t, testbed.ListenSpec{
		Name: "out", Addr: netip.AddrPortFrom(netip.IPv6Unspecified(), testbed.OutboundPort),
	})).Fd())
	if err := unix.Listen(listener, 8); err != nil {
		t.Fatal(err)
	}
	type end struct{ sock, fd int }
	ends := map[string]end{}
	for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
		r := app.Connect(t, testbed.ConnectSpec{Dst: netip.MustParseAddrPort(dst), Keep: true, NoGreeting: true})
		if r.Errno != "" {
			t.Fatalf("to %s: %+v", dst, r)
		}
		runtime.LockOSThread()
		_, _ = unix.SetfsuidRetUid(testbed.ProxyUID)
		fd, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
		_, _ = unix.SetfsuidRetUid(0)
		runtime.UnlockOSThread()
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		ends[dst] = end{r.Sock, fd}
	}
	if _, err := b.Apply(t.Context(), target, policy, chosen(redirect.Iptables)); err != nil {
		t.Fatal(err)
	}
	for dst, e := range ends {
		if _, err := unix.Write(e.fd, []byte("first\n")); err != nil {
			t.Errorf("%s: %v", dst, err)
		}
		if line, errno := app.RecvLine(t, e.sock, 2*time.Second); strings.TrimSpace(line) != "first" {
			t.Errorf("%s: received %q, %s", dst, line, errno)
		}
	}
}

// TestPrivilegedChangeTProxy: what TPROXY mode has made in the namespace is there
// for whichever is in force.
func TestPrivilegedChangeTProxy(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	p := testbed.NewPod(t)
	b, target, policy := node(t, p, testbed.Annotate("sidecar.istio.io/interceptionMode", "TPROXY"), testbed.ProxyEnv("ISTIO_META_DNS_CAPTURE", "true"))
	marks := func() string {
		return p.Command(t, "ip", "rule") + p.Command(t, "ip", "-6", "rule") + p.Command(t, "cat",
			"/proc/sys/net/ipv4/tcp_fwmark_accept", "/proc/sys/net/ipv4/fwmark_reflect", "/proc/sys/net/ipv6/fwmark_reflect")
	}
	before := marks()
	for _, d := range []redirect.Datapath{redirect.EBPF, redirect.Iptables, redirect.EBPF, redirect.EBPF, redirect.Iptables} {
		if _, err := b.Apply(t.Context(), target, policy, chosen(d)); err != nil {
			t.Fatal(err)
		}
		if err := b.Check(t.Context(), target); err != nil {
			t.Errorf("%s: %v", d, err)
		}
		if got := strings.Count(marks(), "fwmark 0x539"); got != 2 {
			t.Errorf("%s: %d rules for the mark, want 2", d, got)
		}
	}
	if err := b.Remove(t.Context(), target.Attachment); err != nil {
		t.Error(err)
	}
	if after := marks(); after != before {
		t.Errorf("rules after: %s\nbefore: %s", after, before)
	}
}

// refusing makes a folder of iptables programs that refuse to program a pod: those
// whose name begins so. Whatever else is asked of them they do.
func refusing(t *testing.T, prefix string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, name := range []string{"iptables-nft-restore", "iptables-nft-save", "ip6tables-nft-restore", "ip6tables-nft-save"} {
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		script := "#!/bin/sh\n"
		if strings.HasPrefix(name, prefix) && strings.HasSuffix(name, "restore") {
			script += "rules=$(cat)\ncase $rules in *'-A SHUNT_OUT'*) echo no such table >&2; exit 4;; esac\n" +
				"echo \"$rules\" | exec " + program + " \"$@\"\n"
		} else {
			script += "exec " + program + " \"$@\"\n"
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestPrivilegedChangeFails: a pod of eBPF's that iptables can't take over has all
// that it had, what the two share above all, and what is kept for connections that
// iptables has redirected.
func TestPrivilegedChangeFails(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	for _, mode := range []string{"REDIRECT", "TPROXY"} {
		for _, first := range [][]redirect.Datapath{{redirect.EBPF}, {redirect.Iptables, redirect.EBPF}} {
			for _, refuses := range []string{"ip", "ip6"} { // both families, or one
				t.Run(fmt.Sprint(mode, first, refuses), func(t *testing.T) {
					testChangeFails(t, testbed.NewPod(t, testbed.InWorld(w)), mode, first, refuses)
				})
			}
		}
	}
}

func testChangeFails(t *testing.T, p *testbed.Pod, mode string, first []redirect.Datapath, refuses string) {
	b, target, policy := nodeOf(t, iptables.NFT, p, testbed.Annotate("sidecar.istio.io/interceptionMode", mode))
	state := func() (s string) {
		for _, c := range []string{
			"ip -6 addr show dev lo", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all",
			"cat /proc/sys/net/ipv4/tcp_fwmark_accept /proc/sys/net/ipv4/fwmark_reflect /proc/sys/net/ipv6/fwmark_reflect",
		} {
			s += c + "\n" + p.Command(t, strings.Fields(c)...)
		}
		for _, c := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
			for line := range strings.Lines(p.Command(t, c)) {
				if strings.Contains(line, "SHUNT") && strings.HasPrefix(line, "-A") {
					s += line
				}
			}
		}
		return s
	}
	proxy := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN)),
		testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Transparent = mode == "TPROXY" && l.Name == "in" }))
	app := p.StartApp(t, 8080)
	var alive []int
	for _, d := range first {
		if _, err := b.Apply(t.Context(), target, policy, chosen(d)); err != nil {
			t.Fatal(err)
		}
		for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
			r := app.Connect(t, testbed.ConnectSpec{Dst: netip.MustParseAddrPort(dst), Keep: true})
			if r.Listener() != "out" {
				t.Fatalf("%s: to %s: %+v", d, dst, r)
			}
			alive = append(alive, r.Sock)
		}
	}
	before, known := state(), b.iptables.Knows(target.Attachment)
	if !strings.Contains(before, "::6/128") || strings.Contains(before, "fwmark 0x539") != (mode == "TPROXY") || strings.Contains(before, "SHUNT_KEEP") != known || known != (len(first) > 1) {
		t.Fatalf("before: known %v, %s", known, before)
	}

	bad := New(Options{BPFDir: b.node.BPFDir, RunDir: b.node.RunDir, Iptables: iptables.NFT, IptablesPath: refusing(t, refuses)})
	for range 2 {
		if _, err := bad.Apply(t.Context(), target, policy, chosen(redirect.Iptables)); err == nil || !strings.Contains(err.Error(), "no such table") {
			t.Fatalf("iptables refuses, and apply says %v", err)
		}
		if diff := cmp.Diff(before, state()); diff != "" {
			t.Errorf("the pod is not as it was (-before +after):\n%s", diff)
		}
		if knows := b.iptables.Knows(target.Attachment); knows != known {
			t.Errorf("a record of iptables': %v, it was %v", knows, known)
		}
		if err := b.Check(t.Context(), target); err != nil {
			t.Error(err)
		}
		list, err := b.Inspect(t.Context(), func(redirect.PodRef) bool { return true })
		if err != nil || len(list) != 1 || problems(list[0]) != "" || list[0].Datapath != redirect.EBPF {
			t.Errorf("status %+v, %v", list, err)
		}
		if mode == "REDIRECT" {
			redirected(t, "after the failure", p, app)
		}
		for _, a := range p.AllAddrs() {
			spec := testbed.ConnectSpec{Dst: netip.AddrPortFrom(a, 8080), Abort: true}
			if r := p.World.Connect(t, spec); r.Listener() != "in" {
				t.Errorf("to %v: %+v", a, r)
			}
			// The proxy to its app, from where its app's answers come back to it.
			from := netip.MustParseAddr("127.0.0.6")
			if a.Is6() {
				from = netip.MustParseAddr("::6")
			}
			if mode == "TPROXY" {
				if from = netip.MustParseAddr("203.0.113.77"); a.Is6() {
					from = netip.MustParseAddr("2001:db8::77")
				}
				spec.Transparent, spec.Mark = true, tproxy.Mark
			}
			spec.Bind = netip.AddrPortFrom(from, 0)
			if r := proxy.Connect(t, spec); r.Listener() != "app" {
				t.Errorf("the proxy from %v to %v: %+v", from, a, r)
			}
		}
		for _, sock := range alive {
			errno := app.Send(t, sock, "on\n")
			if line, errno2 := app.RecvLine(t, sock, 2*time.Second); strings.TrimSpace(line) != "on" {
				t.Errorf("a connection that was: %q, %s%s", line, errno, errno2)
			}
		}
	}
	if _, err := b.Apply(t.Context(), target, policy, chosen(redirect.Iptables)); err != nil {
		t.Fatal(err)
	}
	if err := b.Check(t.Context(), target); err != nil {
		t.Error(err)
	}
}

// TestPrivilegedChangeBackFails: and so has one of iptables' that eBPF can't take
// over.
func TestPrivilegedChangeBackFails(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, mode := range []string{"REDIRECT", "TPROXY"} {
		p := testbed.NewPod(t)
		b, target, policy := node(t, p, testbed.Annotate("sidecar.istio.io/interceptionMode", mode))
		if _, err := b.Apply(t.Context(), target, policy, chosen(redirect.Iptables)); err != nil {
			t.Fatal(err)
		}
		proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: in(netip.IPv6Unspecified()), MPTCP: true})
		if _, err := b.Apply(t.Context(), target, policy, chosen(redirect.EBPF)); !errors.Is(err, loader.ErrListener) {
			t.Fatalf("%s: %v, want %v", mode, err, loader.ErrListener)
		}
		if err := b.Check(t.Context(), target); err != nil {
			t.Errorf("%s: %v", mode, err)
		}
	}
}

// TestPrivilegedOpenListeners: listeners of a proxy that was there before eBPF
// are registered, each kind and each worker, and are followed when they close;
// what can't be registered is said.
func TestPrivilegedOpenListeners(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	any6, any4 := netip.IPv6Unspecified(), netip.IPv4Unspecified()
	for _, tc := range []struct {
		name   string
		open   func(p *testbed.Pod) []testbed.ListenSpec
		served [2]bool // IPv4, IPv6
		err    error
	}{
		{"none", func(*testbed.Pod) []testbed.ListenSpec { return nil }, [2]bool{}, nil},
		{"both families", func(*testbed.Pod) []testbed.ListenSpec { return []testbed.ListenSpec{{Addr: in(any6)}} }, [2]bool{true, true}, nil},
		{"IPv4", func(*testbed.Pod) []testbed.ListenSpec { return []testbed.ListenSpec{{Addr: in(any4)}} }, [2]bool{true, false}, nil},
		{"IPv6 only", func(*testbed.Pod) []testbed.ListenSpec {
			return []testbed.ListenSpec{{Addr: in(any6), V6Only: true}}
		}, [2]bool{false, true}, nil},
		{"the pod's addresses", func(p *testbed.Pod) []testbed.ListenSpec {
			return []testbed.ListenSpec{{Addr: in(p.Addr4())}, {Addr: in(p.Addr6())}}
		}, [2]bool{true, true}, nil},
		{"loopback", func(*testbed.Pod) []testbed.ListenSpec {
			return []testbed.ListenSpec{{Addr: in(netip.MustParseAddr("127.0.0.1"))}}
		}, [2]bool{}, nil},
		{"workers", func(*testbed.Pod) []testbed.ListenSpec {
			return slices.Repeat([]testbed.ListenSpec{{Addr: in(any6), ReusePort: true}}, 24)
		}, [2]bool{true, true}, nil},
		{"Multipath TCP", func(*testbed.Pod) []testbed.ListenSpec {
			return []testbed.ListenSpec{{Addr: in(any6), MPTCP: true}}
		}, [2]bool{}, loader.ErrListener},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := testbed.NewPod(t, testbed.InWorld(w))
			b, target, policy := node(t, p)
			proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
			var open []*testbed.Listener
			for _, spec := range tc.open(p) {
				spec.Name = "in"
				open = append(open, proxy.Listen(t, spec))
			}
			expect := func(when string, served [2]bool) {
				t.Helper()
				for i, a := range []netip.Addr{p.Addr4(), p.Addr6()} {
					r := w.Connect(t, testbed.ConnectSpec{Dst: netip.AddrPortFrom(a, 8080), Abort: true})
					if got := r.Listener() == "in"; got != served[i] || !got && r.Errno != "ECONNREFUSED" {
						t.Errorf("%s: to %v: %+v, want served %v", when, a, r, served[i])
					}
				}
			}
			for range 2 { // and again: what is registered is not registered twice
				_, err := b.Apply(t.Context(), target, policy, chosen(redirect.EBPF))
				if !errors.Is(err, tc.err) || (err != nil) != (tc.err != nil) {
					t.Fatalf("apply: %v, want %v", err, tc.err)
				}
			}
			if tc.err != nil {
				return
			}
			expect("open before", tc.served)
			for i, l := range open {
				if l.Close(t); i%8 == 0 && i < len(open)-1 && tc.name == "workers" {
					expect("some have closed", tc.served)
				}
			}
			expect("all have closed", [2]bool{})
			l := proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: in(any6)})
			expect("another", [2]bool{true, true})
			l.Close(t)
			proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: in(any6)})
			expect("a third", [2]bool{true, true})
		})
	}
}

func in(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, testbed.InboundPort) }
