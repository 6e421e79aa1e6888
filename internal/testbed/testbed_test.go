// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { Main(m) }

func addr(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// plain is an address as it is spoken of, mapped or not.
func plain(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

func host(ap netip.AddrPort) string { return ap.Addr().Unmap().String() }

func TestPrivilegedOutbound(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	p := NewPod(t)
	p.World.ServeAll(t, 81)
	special := p.World.Listen(t, ListenSpec{Name: "special", Addr: addr("[::]:8443")})
	app := p.StartApp(t, 8080)
	v4, v6 := p.Addr4().String(), p.Addr6().String()

	for _, c := range []struct {
		dst, listener, from, errno string
		family                     int
	}{
		{dst: "10.99.3.4:80", listener: "world", from: v4},
		{dst: "8.8.8.8:65535", listener: "world", from: v4},
		{dst: "[fd99::77]:8000", listener: "world", from: v6},
		{dst: "[2001:db8::1]:443", listener: "world", from: v6},
		{dst: "[::ffff:1.2.3.4]:99", listener: "world", from: v4},
		{dst: "1.2.3.4:99", family: 6, listener: "world", from: v4},
		{dst: "1.2.3.4:8443", listener: "special", from: v4},
		{dst: "[2001:db8::1]:8443", listener: "special", from: v6},
		{dst: "1.1.1.1:81", errno: "ECONNREFUSED"},
		{dst: "[2001:db8::1]:81", errno: "ECONNREFUSED"},
		{dst: "127.0.0.1:8080", listener: "app", from: "127.0.0.1"},
		{dst: "[::1]:8080", listener: "app", from: "::1"},
		{dst: "0.0.0.0:8080", listener: "app", from: "127.0.0.1"},
		{dst: v4 + ":8080", listener: "app", from: v4},
		{dst: "127.0.0.1:8081", errno: "ECONNREFUSED"},
	} {
		for _, way := range []struct {
			name  string
			shape func(*ConnectSpec)
		}{
			{"blocking", func(*ConnectSpec) {}},
			{"nonblocking", func(s *ConnectSpec) { s.Nonblock = true }},
			{"io_uring", func(s *ConnectSpec) { s.IOURing = true }},
		} {
			t.Run(c.dst+" "+way.name, func(t *testing.T) {
				spec := ConnectSpec{SocketSpec: SocketSpec{Family: c.family}, Dst: addr(c.dst)}
				way.shape(&spec)
				r := app.Connect(t, spec)
				if spec.IOURing && (r.Errno == "ENOSYS" || r.Errno == "EPERM") {
					t.Skipf("no io_uring here: %s", r.Errno)
				}
				if r.Errno != c.errno || r.Listener() != c.listener {
					t.Fatalf("errno %q at %q, listener %q; want %q, %q", r.Errno, r.Step, r.Listener(), c.errno, c.listener)
				}
				if c.errno != "" {
					return
				}
				dst := plain(addr(c.dst))
				if dst == "0.0.0.0:8080" {
					dst = "127.0.0.1:8080"
				}
				got := map[string]string{
					"peer": plain(r.Peer), "server's local": plain(r.Served.Local),
					"local": plain(r.Local), "from": host(r.Served.Peer), "server's original": r.Served.OrigDst().Errno,
				}
				want := map[string]string{
					"peer": dst, "server's local": dst,
					"local": plain(r.Served.Peer), "from": c.from, "server's original": "ENOENT",
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
	if got := len(special.Accepted(t)); got < 4 {
		t.Errorf("the special listener recorded %d connections", got)
	}
}

func TestPrivilegedInbound(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	p := NewPod(t)
	var ports []uint16
	for port := uint16(8000); port < 8040; port++ {
		ports = append(ports, port)
	}
	app := p.StartApp(t, ports...)
	proxy := p.StartProxy(t, ProxyUID, ProxyGID, SplitFamilies())
	if len(proxy.Out) != 2 || len(proxy.In) != 2 {
		t.Fatalf("listeners: %d out, %d in", len(proxy.Out), len(proxy.In))
	}
	for _, to := range []netip.Addr{p.Addr4(), p.Addr6()} {
		for port, name := range map[uint16]string{8000: "app", 8039: "app", OutboundPort: "out", InboundPort: "in"} {
			r := p.World.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(to, port)})
			if r.Errno != "" || r.Listener() != name {
				t.Errorf("to %s port %d: %q from %q", to, port, r.Errno, r.Listener())
			}
		}
		r := p.World.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(to, 9)})
		if r.Errno != "ECONNREFUSED" {
			t.Errorf("to a port without a listener: %q", r.Errno)
		}
	}
	for _, from := range []string{"10.99.7.7:4000", "203.0.113.9:4001", "[fd99::7]:4002", "[2001:db8:5::9]:4003"} {
		to := p.Addr4()
		if addr(from).Addr().Is6() {
			to = p.Addr6()
		}
		r := p.World.Connect(t, ConnectSpec{SocketSpec: SocketSpec{Bind: addr(from)}, Dst: netip.AddrPortFrom(to, 8001), Abort: true})
		if r.Errno != "" || plain(r.Served.Peer) != from {
			t.Errorf("from %s: %q at %q, seen from %+v", from, r.Errno, r.Step, r.Served)
		}
	}
	got := app.Listeners[8001][0].WaitAccepted(t, 4)
	if len(got) != 4 || got[0].PID != app.PID || got[0].Actor != "app" {
		t.Errorf("accepted: %+v", got)
	}
}

func TestPrivilegedActorIdentity(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	p := NewPod(t)
	a := p.Actor(t, "someone", 4242, 4343, InContainer("sidecar"), WithCaps(unix.CAP_NET_ADMIN))
	// Every thread, after work that starts some.
	a.Listen(t, ListenSpec{Name: "x", Addr: addr("[::]:80"), Transparent: true})
	a.Dial(t, "127.0.0.1:80")

	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", a.PID))
	if err != nil || len(tasks) < 2 {
		t.Fatalf("threads of the actor: %v, %v", tasks, err)
	}
	wantNS, err := os.Stat(p.NetnsPath())
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		ns, err := os.Stat(task + "/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		if !os.SameFile(wantNS, ns) {
			t.Errorf("%s is in another network namespace", task)
		}
		status, err := os.ReadFile(task + "/status")
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]string{}
		for line := range strings.Lines(string(status)) {
			switch key, value, _ := strings.Cut(line, ":"); key {
			case "Uid", "Gid", "Groups", "CapEff":
				got[key] = strings.Join(strings.Fields(value), " ")
			}
		}
		want := map[string]string{"Uid": "4242 4242 4242 4242", "Gid": "4343 4343 4343 4343", "Groups": "", "CapEff": "0000000000001000"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", task, diff)
		}
	}
	cg, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", a.PID))
	if err != nil {
		t.Fatal(err)
	}
	want := "0::" + strings.TrimPrefix(p.CgroupPath(), Cgroup2Mount(t)) + "/sidecar\n"
	if !strings.HasSuffix(string(cg), want) {
		t.Errorf("cgroups %q don't end with %q", cg, want)
	}
	if !strings.HasSuffix(p.CgroupPath(), "/kubepods/burstable/pod"+p.UID) || !strings.HasPrefix(p.CgroupPath(), p.CgroupRoot()) {
		t.Errorf("pod cgroup at %s", p.CgroupPath())
	}
}

// redirect is the rule set whose effect on sockets the actors must report
// right: the oracle for "as behind iptables".
func redirect(uid int) string {
	return fmt.Sprintf(`*nat
-A OUTPUT -p tcp -m owner ! --uid-owner %d -j REDIRECT --to-ports %d
-A PREROUTING -p tcp -j REDIRECT --to-ports %d
COMMIT
`, uid, OutboundPort, InboundPort)
}

func TestPrivilegedIPTablesOracle(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	p := NewPod(t)
	p.World.ServeAll(t)
	p.IPTablesRestore(t, 4, redirect(ProxyUID))
	p.IPTablesRestore(t, 6, redirect(ProxyUID))
	app, proxy := p.StartApp(t, 8080), p.StartProxy(t, ProxyUID, ProxyGID)

	type seen struct{ Listener, Dst, ServedFrom, Original, AppPeer string }
	check := func(name string, r ConnectResult, want seen) {
		t.Helper()
		if r.Errno != "" {
			t.Errorf("%s: %s at %s", name, r.Errno, r.Step)
			return
		}
		got := seen{r.Listener(), want.Dst, host(r.Served.Peer), plain(r.Served.OrigDst().Addr), plain(r.Peer)}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443", "[::ffff:9.9.9.9]:7"} {
		from := p.Addr4().String()
		if a := addr(dst).Addr(); a.Is6() && !a.Is4In6() {
			from = p.Addr6().String()
		}
		d := plain(addr(dst))
		check("app to "+dst, app.Dial(t, dst), seen{"out", d, from, d, d})
		check("proxy to "+dst, proxy.Dial(t, dst), seen{"world", d, from, "", d})
	}
	for _, a := range []netip.Addr{p.Addr4(), p.Addr6()} {
		dst := netip.AddrPortFrom(a, 8080)
		from := WorldAddr4
		if a.Is6() {
			from = WorldAddr6
		}
		check("inbound to "+dst.String(), p.World.Connect(t, ConnectSpec{Dst: dst}), seen{"in", dst.String(), from.String(), dst.String(), dst.String()})
	}

	// The owner is whoever created the socket, by its file system uid.
	root := p.Actor(t, "root", 0, 0)
	uid := ProxyUID
	r := root.Connect(t, ConnectSpec{SocketSpec: SocketSpec{FSUID: &uid}, Dst: addr("10.99.3.4:80")})
	check("root's socket, made as the proxy", r, seen{"world", "10.99.3.4:80", p.Addr4().String(), "", "10.99.3.4:80"})
	check("root's next", root.Dial(t, "10.99.3.4:80"), seen{"out", "10.99.3.4:80", p.Addr4().String(), "10.99.3.4:80", "10.99.3.4:80"})
	there := proxy.PassSocket(t, proxy.Socket(t, SocketSpec{Family: 4}), app.Actor)
	r = app.Connect(t, ConnectSpec{Sock: there, Dst: addr("10.99.3.4:80")})
	check("the app's, got from the proxy", r, seen{"world", "10.99.3.4:80", p.Addr4().String(), "", "10.99.3.4:80"})

	for _, l := range proxy.Out {
		l.Close(t)
	}
	if r := app.Dial(t, "10.99.3.4:80"); r.Errno != "ECONNREFUSED" {
		t.Errorf("while the proxy doesn't listen: %q", r.Errno)
	}
}

func TestPrivilegedSockets(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	p := NewPod(t, Addrs("10.244.9.1", "10.244.9.2", "fd10:9::1", "fd10:9::2"))
	p.World.ServeAll(t)
	app, other := p.StartApp(t, 8080), p.Actor(t, "other", 1001, 1001)

	t.Run("AF_UNSPEC", func(t *testing.T) {
		r := app.Connect(t, ConnectSpec{Dst: addr("10.99.0.5:80"), Keep: true})
		if errno := app.Disconnect(t, r.Sock); errno != "" {
			t.Fatal(errno)
		}
		if i := app.Info(t, r.Sock); i.Peer.IsValid() {
			t.Errorf("still has peer %s", i.Peer)
		}
		r = app.Connect(t, ConnectSpec{Sock: r.Sock, Dst: addr("10.99.0.6:81")})
		if r.Errno != "" || plain(r.Served.Local) != "10.99.0.6:81" {
			t.Errorf("connected again: %+v", r)
		}
		app.Close(t, r.Sock)
	})
	t.Run("bound", func(t *testing.T) {
		for bind, from := range map[string]string{"10.244.9.2:0": "10.244.9.2", "0.0.0.0:5555": "10.244.9.1", "10.244.9.2:5556": "10.244.9.2"} {
			r := app.Connect(t, ConnectSpec{SocketSpec: SocketSpec{Bind: addr(bind), ReuseAddr: true, BindNoPort: true}, Dst: addr("10.99.0.5:80"), Abort: true})
			if r.Errno != "" || host(r.Served.Peer) != from {
				t.Errorf("bound to %s: %+v", bind, r)
			}
			if port := addr(bind).Port(); port != 0 && r.Local.Port() != port {
				t.Errorf("bound to %s: local address %s", bind, r.Local)
			}
		}
		r := app.Connect(t, ConnectSpec{SocketSpec: SocketSpec{Bind: addr("10.1.1.1:0")}, Dst: addr("10.99.0.5:80")})
		if r.Errno != "EADDRNOTAVAIL" || r.Step != StepBind {
			t.Errorf("bound to a foreign address: %q at %q", r.Errno, r.Step)
		}
	})
	t.Run("fast open", func(t *testing.T) {
		p.EnableFastOpen(t)
		for _, spec := range []ConnectSpec{
			{FastOpen: true, Data: "hello"}, {FastOpenConnect: true, Data: "hello"},
		} {
			spec.Dst = addr("10.99.0.5:80")
			r := app.Connect(t, spec)
			if r.Errno != "" || r.Served.First != "hello\n" {
				t.Errorf("%+v: the server says %+v", r, r.Served)
			}
		}
	})
	t.Run("talk", func(t *testing.T) {
		r := app.Connect(t, ConnectSpec{Dst: addr("[fd99::5]:80"), Keep: true})
		there := app.PassSocket(t, r.Sock, other)
		if errno := other.Send(t, there, "ping\n"); errno != "" {
			t.Fatal(errno)
		}
		if line, errno := app.RecvLine(t, r.Sock, 0); line != "ping" || errno != "" {
			t.Errorf("got %q, %q", line, errno)
		}
		if errno := app.Shutdown(t, r.Sock, unix.SHUT_WR); errno != "" {
			t.Fatal(errno)
		}
		if _, errno := other.RecvLine(t, there, 0); errno != ErrnoEOF {
			t.Errorf("after the server closed: %q", errno)
		}
		if _, n, errno := app.Getsockopt(t, r.Sock, unix.SOL_SOCKET, unix.SO_ERROR, 4); n != 4 || errno != "" {
			t.Errorf("getsockopt: %d, %q", n, errno)
		}
		app.Close(t, r.Sock)
		other.Close(t, there)
	})
	t.Run("frozen", func(t *testing.T) {
		frozen := other.Listen(t, ListenSpec{Name: "frozen", Addr: addr("0.0.0.0:9000"), NoAccept: true, Backlog: 1})
		r := app.Connect(t, ConnectSpec{Dst: addr("127.0.0.1:9000"), Timeout: 50 * time.Millisecond, Keep: true})
		if !r.Connected() || r.Errno != ErrnoTimeout {
			t.Errorf("first: %q at %q", r.Errno, r.Step)
		}
		fill := make([]ConnectSpec, 3)
		for i := range fill {
			fill[i] = ConnectSpec{Dst: addr("127.0.0.1:9000"), Timeout: 50 * time.Millisecond, Keep: true, NoGreeting: true, Nonblock: i == 2}
		}
		rs := app.ConnectBatch(t, fill)
		if r := rs[2]; r.Errno != ErrnoTimeout || r.Step != StepConnect {
			t.Errorf("with the backlog full: %q at %q", r.Errno, r.Step)
		}
		frozen.Close(t)
	})
	t.Run("the server closes first", func(t *testing.T) {
		other.Listen(t, ListenSpec{Name: "hasty", Addr: addr("[::]:9001"), CloseFirst: true})
		spec := ConnectSpec{SocketSpec: SocketSpec{Bind: addr("10.99.0.7:7777"), ReuseAddr: true}, Dst: netip.AddrPortFrom(p.Addr4(), 9001), AwaitClose: true}
		for i := range 2 {
			r := p.World.Connect(t, spec)
			if r.Errno != "" || r.Listener() != "hasty" {
				t.Errorf("connection %d from the same port: %+v", i, r)
			}
			// 10.99.0.7:7777 as the kernel writes it, in state 6.
			Eventually(t, "TIME_WAIT in the pod", func() bool {
				b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/tcp6", other.PID))
				return err == nil && strings.Contains(string(b), "0000000000000000FFFF00000700630A:1E61 06 ")
			})
		}
	})
	t.Run("MPTCP", func(t *testing.T) {
		l, errno := other.TryListen(t, ListenSpec{Name: "mp", Addr: addr("[::]:9002"), MPTCP: true})
		if errno == "EPROTONOSUPPORT" || errno == "ENOPROTOOPT" {
			t.Skipf("no MPTCP in this kernel: %s", errno)
		}
		if errno != "" {
			t.Fatal(errno)
		}
		r := app.Connect(t, ConnectSpec{SocketSpec: SocketSpec{MPTCP: true}, Dst: addr("127.0.0.1:9002")})
		if r.Errno != "" || r.Served.OrigDst4.Errno != "EOPNOTSUPP" {
			t.Errorf("%+v; the server says %+v", r, r.Served)
		}
		l.CloseAll(t)
	})
	t.Run("many listeners on a port", func(t *testing.T) {
		third := p.Actor(t, "third", 1002, 1002)
		pids := map[int]bool{}
		var ls []*Listener
		for range 2 {
			// Of one uid only: the kernel asks that.
			ls = append(ls, other.Listen(t, ListenSpec{Name: "re", Addr: addr("[::]:9003"), ReusePort: true}))
		}
		if _, errno := third.TryListen(t, ListenSpec{Name: "re", Addr: addr("[::]:9003"), ReusePort: true}); errno != "EADDRINUSE" {
			t.Errorf("reuse by another uid: %q", errno)
		}
		for range 64 {
			pids[app.Dial(t, "127.0.0.1:9003").Served.PID] = true
		}
		if len(pids) != 1 || len(ls[0].Accepted(t)) == 0 || len(ls[1].Accepted(t)) == 0 {
			t.Errorf("%d processes served, %d and %d connections", len(pids), len(ls[0].Accepted(t)), len(ls[1].Accepted(t)))
		}
		for _, l := range ls {
			l.Close(t)
		}
	})
	t.Run("death", func(t *testing.T) {
		victim := p.Actor(t, "victim", 1002, 1002)
		victim.Listen(t, ListenSpec{Name: "v", Addr: addr("[::]:9004")})
		victim.Kill(t)
		if r := app.Dial(t, "127.0.0.1:9004"); r.Errno != "ECONNREFUSED" {
			t.Errorf("after the kill: %q", r.Errno)
		}
	})
}

func TestPrivilegedPods(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	t.Run("equal addresses", func(t *testing.T) {
		one, two := NewPod(t, Addrs("10.1.1.1", "fd01::1")), NewPod(t, Addrs("10.1.1.1", "fd01::1"))
		for i, p := range []*Pod{one, two} {
			name := fmt.Sprint("app", i)
			p.Actor(t, name, 1000, 1000).Listen(t, ListenSpec{Name: name, Addr: addr("[::]:8080")})
		}
		for i, p := range []*Pod{one, two} {
			if r := p.World.Dial(t, "10.1.1.1:8080"); r.Listener() != fmt.Sprint("app", i) {
				t.Errorf("world %d: %+v", i, r)
			}
		}
		if one.NetnsPath() == two.NetnsPath() || one.UID == two.UID || one.ContainerID == two.ContainerID {
			t.Errorf("the pods are not two")
		}
	})
	t.Run("one world", func(t *testing.T) {
		w := NewWorld(t)
		w.ServeAll(t)
		a, b := NewPod(t, InWorld(w)), NewPod(t, InWorld(w), Interface("net1", []string{"10.7.0.1"}, []string{"10.8.0.0/16"}))
		client := a.StartApp(t)
		server := b.StartApp(t, 8080)
		for _, to := range b.AllAddrs() {
			r := client.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(to, 8080)})
			if r.Errno != "" || r.Listener() != "app" || r.Served.PID != server.PID {
				t.Errorf("to %s: %+v", to, r)
			}
		}
		if r := server.Dial(t, "10.8.3.3:80"); r.Errno != "" || host(r.Served.Peer) != "10.7.0.1" {
			t.Errorf("by the second interface: %+v, %+v", r, r.Served)
		}
	})
	t.Run("families", func(t *testing.T) {
		for name, c := range map[string]struct {
			opt            Option
			v4, v6, noIPv6 string
		}{
			"v4":     {opt: V4Only(), v6: "ENETUNREACH"},
			"v6":     {opt: V6Only(), v4: "ENETUNREACH"},
			"noipv6": {opt: NoIPv6(), v6: "EADDRNOTAVAIL"},
		} {
			p := NewPod(t, c.opt)
			p.World.ServeAll(t)
			app := p.StartApp(t, 8080)
			if r := app.Dial(t, "10.99.0.1:80"); r.Errno != c.v4 {
				t.Errorf("%s: IPv4: %q, want %q", name, r.Errno, c.v4)
			}
			if r := app.Dial(t, "[fd99::1]:80"); r.Errno != c.v6 {
				t.Errorf("%s: IPv6: %q, want %q", name, r.Errno, c.v6)
			}
		}
	})
	t.Run("new sandbox", func(t *testing.T) {
		old := NewPod(t)
		app := old.StartApp(t, 8080)
		app.Stop(t)
		old.Destroy(t)
		p := NewPod(t, SandboxOf(old))
		p.StartApp(t, 8080)
		if p.UID != old.UID || p.CgroupPath() != old.CgroupPath() || p.ContainerID == old.ContainerID {
			t.Errorf("not another sandbox of the same pod")
		}
		if r := p.World.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(old.Addr4(), 8080)}); r.Listener() != "app" {
			t.Errorf("%+v", r)
		}
	})
	t.Run("many new sandboxes", func(t *testing.T) {
		w := NewWorld(t)
		pods := []*Pod{NewPod(t, InWorld(w)), NewPod(t, InWorld(w), Interface("net1", []string{"10.9.0.1"}, nil))}
		stays := NewPod(t, InWorld(w))
		DestroyAll(t, pods...)
		links, err := w.nl.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		var left []string
		for _, l := range links {
			left = append(left, l.Attrs().Name)
		}
		if want := []string{"lo", stays.outside["eth0"]}; !slices.Equal(left, want) {
			t.Errorf("the world has %q, want %q", left, want)
		}
		for _, old := range pods {
			p := NewPod(t, SandboxOf(old))
			p.StartApp(t, 8080)
			if r := w.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(old.Addr4(), 8080)}); r.Listener() != "app" {
				t.Errorf("%+v", r)
			}
		}
	})
	t.Run("cookie", func(t *testing.T) {
		if _, err := NewPod(t).cookie(); errors.Is(err, unix.ENOPROTOOPT) {
			t.Skip("SO_NETNS_COOKIE needs Linux 5.14")
		}
		if one, other := NewPod(t).NetnsCookie(t), NewPod(t).NetnsCookie(t); one == other {
			t.Error("two pods with one cookie")
		}
	})
}

// TestPrivilegedManyFlows holds the bed to its speed: thousands of flows are
// the differential test's daily bread.
func TestPrivilegedManyFlows(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	p := NewPod(t)
	p.World.ServeAll(t)
	app := p.StartApp(t)
	const flows = 4000
	specs := make([]ConnectSpec, flows)
	for i := range specs {
		a := WorldAddr4
		if i%2 == 1 {
			a = WorldAddr6
		}
		specs[i] = ConnectSpec{Dst: netip.AddrPortFrom(a, uint16(1000+i)), Abort: true}
	}
	start := time.Now()
	for i, r := range app.ConnectBatch(t, specs) {
		if r.Errno != "" || r.Served.Local.Port() != specs[i].Dst.Port() {
			t.Fatalf("flow %d: %+v", i, r)
		}
	}
	t.Logf("%.0f flows a second", flows/time.Since(start).Seconds())
}

// TestPrivilegedReadyAtOnce asks new pods for connections the moment they are
// there. One that comes too early loses a SYN, and takes a second.
func TestPrivilegedReadyAtOnce(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	w := NewWorld(t)
	w.ServeAll(t)
	for range 20 {
		p := NewPod(t, InWorld(w))
		app := p.StartApp(t, 8080)
		for _, r := range []ConnectResult{
			w.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(p.Addr4(), 8080)}),
			w.Connect(t, ConnectSpec{Dst: netip.AddrPortFrom(p.Addr6(), 8080)}),
			app.Connect(t, ConnectSpec{Dst: addr("[fd99::1]:80")}),
			app.Connect(t, ConnectSpec{Dst: addr("10.99.0.1:80")}),
		} {
			if r.Errno != "" || !r.AtOnce() {
				t.Errorf("%q at %q after %v", r.Errno, r.Step, r.Elapsed)
			}
		}
	}
}

// recorder is a test whose failure is wanted.
type recorder struct {
	testing.TB
	cleanup []func()
	errors  []string
}

func (r *recorder) Cleanup(f func()) { r.cleanup = append(r.cleanup, f) }

func (r *recorder) Errorf(format string, args ...any) {
	r.errors = append(r.errors, fmt.Sprintf(format, args...))
}

func TestPrivilegedNoLeaksNotices(t *testing.T) {
	Privileged(t)
	defer func(d time.Duration) { leakDeadline = d }(leakDeadline)
	leakDeadline = 50 * time.Millisecond

	r := &recorder{TB: t}
	NoLeaks(r)
	dir := BPFFS(t)
	p := NewPod(t)
	a := p.Actor(t, "a", 1, 1)
	for _, f := range r.cleanup {
		f()
	}
	all := strings.Join(r.errors, "\n")
	for _, want := range []string{
		"mount " + dir + " of type bpf", "mount " + p.NetnsPath() + " of type nsfs", "cgroup " + p.CgroupRoot(),
		fmt.Sprintf("process %d (", a.PID), "descriptor ",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("%q went unnoticed in: %s", want, all)
		}
	}
}

func TestPrivilegedBPFFS(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	dir := BPFFS(t)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
		t.Fatalf("file system of type %#x, %v", st.Type, err)
	}
}

// fakePlugin tells what it was called with.
const fakePlugin = `#!/bin/sh
case $CNI_COMMAND in
ADD) cat;;
DEL) printf '{"cniVersion":"1.1.0","code":7,"msg":"no","details":"%s %s"}' "$CNI_NETNS" "$CNI_ARGS"; echo log >&2; exit 1;;
CHECK) while :; do :; done;;
esac
`

func TestPrivilegedCNI(t *testing.T) {
	Privileged(t)
	NoLeaks(t)
	script := filepath.Join(t.TempDir(), "plugin")
	if err := os.WriteFile(script, []byte(fakePlugin), 0o755); err != nil {
		t.Fatal(err)
	}
	p := NewPod(t)
	c := &CNI{Plugin: script, CNIVersion: "0.4.0", RunDir: t.TempDir(), BPFDir: "/nowhere", Kubeconfig: "/k", Timeout: 300 * time.Millisecond}
	r := c.MustAdd(t, p, Set("logLevel", "debug"))
	var conf struct {
		CNIVersion, LogLevel, Kubeconfig string
		RuntimeConfig                    struct{ CgroupPath string }
		PrevResult                       struct {
			IPs []struct{ Version, Address string }
		}
	}
	if err := json.Unmarshal(r.Stdout, &conf); err != nil {
		t.Fatal(err)
	}
	if conf.CNIVersion != "0.4.0" || conf.LogLevel != "debug" || conf.Kubeconfig != "/k" || len(conf.PrevResult.IPs) != 2 ||
		conf.PrevResult.IPs[0].Version != "4" || !strings.HasPrefix(conf.RuntimeConfig.CgroupPath, "/shunt-test-") {
		t.Errorf("the plugin got %s", r.Stdout)
	}
	r = c.Del(t, p, LateDel(), NoArg("IgnoreUnknown"))
	if r.OK() || r.Code() != 7 || !strings.Contains(r.Err.Details, "K8S_POD_UID="+p.UID) || !strings.HasPrefix(r.Err.Details, " ") || string(r.Stderr) != "log\n" {
		t.Errorf("%s", r)
	}
	if r = c.Check(t, p); !r.TimedOut || r.OK() {
		t.Errorf("a plugin that hangs: %s", r)
	}
}

func TestInjected(t *testing.T) {
	p := &Pod{Name: "a", Namespace: "b", UID: "c"}
	b := p.Injected(Annotate("k", "v"), ContainerPorts(1, 2), ProxyIDs(5, 6), ProxyEnv("DISABLE_ENVOY", "true"))
	var k KubePod
	if err := json.Unmarshal(b, &k); err != nil {
		t.Fatal(err)
	}
	if k.Metadata.UID != "c" || k.Metadata.Annotations["k"] != "v" || len(k.Container("app").Ports) != 2 ||
		*k.Container("istio-proxy").SecurityContext.RunAsGroup != 6 || k.Metadata.Annotations["sidecar.istio.io/status"] == "" {
		t.Errorf("%s", b)
	}
}
