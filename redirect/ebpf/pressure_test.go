// SPDX-License-Identifier: Apache-2.0

//go:build linux

package ebpf

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

// floodEnv makes the test binary begin that many connections, and keep them.
const floodEnv = "SHUNT_EBPF_FLOOD"

func init() {
	if s := os.Getenv(floodEnv); s != "" {
		if err := flood(s); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// flood begins connections to two destinations in turn, without waiting for any,
// says how many are under way and how many were not permitted, and keeps them
// until it is killed.
func flood(number string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	begun, denied := 0, 0
	for i := range n {
		family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: 80, Addr: ap("10.99.3.4:80").Addr().As4()})
		if i%2 == 1 {
			family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: 443, Addr: ap("[fd99::3]:443").Addr().As16()}
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("socket %d: %w", i, err)
		}
		switch err := unix.Connect(fd, sa); {
		case errors.Is(err, unix.EINPROGRESS):
			begun++
		case errors.Is(err, unix.EPERM):
			denied++
			unix.Close(fd)
		default:
			return fmt.Errorf("connect %d: %w", i, err)
		}
	}
	fmt.Println("flood", begun, denied)
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// perFlood is how many connections one process has: no machine allows fewer
// descriptors.
const perFlood = 4000

// startFlood has several processes in a pod begin connections, and gives what
// came of it when all have, and how to end them.
func startFlood(t *testing.T, p *pod, connections int) (begun, denied int, end func()) {
	t.Helper()
	var procs []*testbed.Process
	var stdins []io.Closer
	for left := connections; left > 0; left -= perFlood {
		r, w := io.Pipe()
		stdins = append(stdins, w)
		procs = append(procs, p.Start(t, testbed.ProcessSpec{
			Argv: []string{"/proc/self/exe"}, Env: []string{floodEnv + "=" + strconv.Itoa(min(left, perFlood)), "GORACE=atexit_sleep_ms=0"},
			UID: testbed.AppUID, GID: testbed.AppGID, Stdin: r,
		}))
	}
	end = func() {
		for i, proc := range procs {
			stdins[i].Close()
			proc.Kill(t)
		}
	}
	for _, proc := range procs {
		var b, d int
		if !testbed.Poll(time.Minute, func() bool {
			n, _ := fmt.Sscanf(proc.Output(), "flood %d %d", &b, &d)
			return n == 2 || !proc.Running()
		}) || b+d == 0 {
			t.Fatalf("a flood did not come: %q", proc.Output())
		}
		begun, denied = begun+b, denied+d
	}
	return begun, denied, end
}

// towards counts the pod's TCP sockets that are connected, or about to be, by
// where the kernel has them connect to.
func towards(t *testing.T, p *pod) (proxy, elsewhere int) {
	t.Helper()
	out := map[string]bool{"0100007F:3A99": true, "00000000000000000000000001000000:3A99": true, "0000000000000000FFFF00000100007F:3A99": true}
	if err := p.Do(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			for s := bufio.NewScanner(bytes.NewReader(b)); s.Scan(); {
				// sl local remote state …; a listener has no remote port, and
				// 02 is SYN_SENT, 01 established.
				f := strings.Fields(s.Text())
				if len(f) < 4 || f[3] != "02" && f[3] != "01" || strings.HasSuffix(f[1], ":3A99") {
					continue
				}
				if out[f[2]] {
					proxy++
				} else {
					elsewhere++
				}
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return proxy, elsewhere
}

// inFlight is how many connections are under way in TestPrivilegedInFlight.
func inFlight() int {
	if os.Getenv(testbed.RaceEnv) != "" {
		return 10_000 // a slower machine, so to speak
	}
	return 100_000
}

// TestPrivilegedInFlight: two pods whose proxies are frozen have 100,000
// connections under way, one of them as many as a pod may. What is more is denied
// and counted; nothing goes to where it was going; a third pod is served; and when
// it is over nothing is left.
func TestPrivilegedInFlight(t *testing.T) {
	begin(t)
	total := inFlight()
	limit, over := total*2/3, total/50
	n := newNode(t, func(o *loader.Options) {
		if limit > 1<<16 {
			limit = 1 << 16 // the datapath's own
		} else {
			o.InflightLimit = uint32(limit)
		}
	})
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	const backlog = 16
	frozen := func() *pod {
		p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w), testbed.Sysctl("net.ipv4.ip_local_port_range", "1024 65500")), twinPolicy...)
		proxy := p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID, testbed.ShapeListeners(func(l *testbed.ListenSpec) { l.Backlog = backlog }))
		proxy.Freeze(t)
		return p
	}
	a, b := frozen(), frozen()
	other, c := newScene(t, n)

	start := time.Now()
	begunA, deniedA, endA := startFlood(t, a, total-limit)
	begunB, deniedB, endB := startFlood(t, b, limit+over)
	t.Logf("%d connections in flight after %v", begunA+begunB, time.Since(start).Round(time.Millisecond))
	// Those that the backlog took are established, and free their room.
	const taken = 2 * (backlog + 1)
	if begunA != total-limit || deniedA != 0 {
		t.Errorf("%d were begun and %d denied, want %d and none", begunA, deniedA, total-limit)
	}
	if begunB < limit || begunB > limit+taken || deniedB < over-taken {
		t.Errorf("%d were begun and %d denied, want %d and %d", begunB, deniedB, limit, over)
	}
	for _, x := range []struct {
		p     *pod
		begun int
	}{{a, begunA}, {b, begunB}} {
		if got := int(x.p.state(t).Inflight); got > x.begun || got < x.begun-taken {
			t.Errorf("%d handshakes are noted, of %d", got, x.begun)
		}
		if proxy, elsewhere := towards(t, x.p); elsewhere > 0 || proxy != x.begun {
			t.Errorf("%d connections are towards the proxy, %d elsewhere, want %d and none", proxy, elsewhere, x.begun)
		}
	}
	if got := b.failures(t)[bpf.ShuntPlacePLACE_CONNECT_ROOM]; got != deniedB {
		t.Errorf("%d were counted as denied, %d were", got, deniedB)
	}
	a.expectFailures(t)
	for _, dst := range []string{"10.99.5.5:80", "[fd99::5]:80"} {
		r := c.app.Dial(t, dst)
		if r.Listener() != "out" || plain(r.Served.OrigDst().Addr) != dst {
			t.Errorf("a third pod, to %s: %+v", dst, r)
		}
	}
	other.expectFailures(t)
	endA()
	endB()
	for _, p := range []*pod{a, b} {
		if !testbed.Poll(time.Minute, func() bool { return p.state(t).Inflight == 0 }) {
			t.Errorf("%d handshakes are still noted", p.state(t).Inflight)
		}
	}
}

// TestPrivilegedFrozenProxy: a proxy that is stopped (SIGSTOP) neither serves nor
// refuses. Its pod's connections wait for it, in both directions: none goes
// around it, and when it goes on they are served.
func TestPrivilegedFrozenProxy(t *testing.T) {
	begin(t)
	eachHook(t, func(t *testing.T, n *node) {
		p, c := newScene(t, n)
		before := p.rules(t)
		c.proxy.Freeze(t)
		patience := 300 * time.Millisecond
		waits := func(what string, a *testbed.Actor, dst netip.AddrPort) int {
			t.Helper()
			r := a.Connect(t, testbed.ConnectSpec{Dst: dst, Keep: true, Timeout: patience})
			if r.Served != nil || r.Errno != testbed.ErrnoTimeout {
				t.Errorf("%s to %v while the proxy is frozen: %+v", what, dst, r)
			}
			return r.Sock
		}
		socks := map[int]string{}
		for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
			socks[waits("outbound", c.app.Actor, ap(dst))] = dst
		}
		for _, own := range p.AllAddrs() {
			waits("inbound", p.World.Actor, at(own, 8080))
		}
		d := p.rules(t).since(before)
		if d[redirect.RuleOutIncludeCIDR] != len(socks) || d[redirect.RuleInInclude] != len(p.AllAddrs()) {
			t.Errorf("counted: %v", d)
		}
		c.proxy.Thaw(t)
		for sock, dst := range socks {
			if line, errno := c.app.RecvLine(t, sock, 10*time.Second); !strings.Contains(line, `"listener":"out"`) {
				t.Errorf("to %s, when the proxy goes on: %q, %q", dst, line, errno)
			}
			c.app.Close(t, sock)
		}
		for _, own := range p.AllAddrs() {
			if r := p.World.Dial(t, at(own, 8080).String()); r.Listener() != "in" {
				t.Errorf("inbound to %v, when the proxy goes on: %+v", own, r)
			}
		}
	})
}

// TestPrivilegedForgottenErrors: the counters of failures are kept in an LRU map,
// the only one there is. Under pressure the kernel forgets counts, and nothing
// else: verdicts stay, and what fails next is counted.
func TestPrivilegedForgottenErrors(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	spec, err := object.LoadShunt()
	if err != nil {
		t.Fatal(err)
	}
	var forgetful []string
	for name, m := range spec.Maps {
		if slices.Contains([]ebpf.MapType{ebpf.LRUHash, ebpf.LRUCPUHash}, m.Type) {
			forgetful = append(forgetful, name)
		}
	}
	if !slices.Equal(forgetful, []string{bpf.ShuntMapErrors}) {
		t.Fatalf("maps that forget: %q, want %q alone", forgetful, bpf.ShuntMapErrors)
	}
	for _, l := range c.proxy.In {
		l.Close(t)
	}
	refused := func() {
		t.Helper()
		for _, own := range p.AllAddrs() {
			if r := p.World.Dial(t, at(own, 8080).String()); r.Errno != "ECONNREFUSED" {
				t.Errorf("inbound to %v without a listener: %+v", own, r)
			}
		}
	}
	m := n.pinned(t, bpf.ShuntMapErrors)
	defer m.Close()
	inserted := 4 * m.MaxEntries()
	for i := range inserted {
		key := bpf.ShuntErrorKey{Cookie: 1<<40 + uint64(i)} // nobody's
		if err := m.Put(key, uint64(1)); err != nil {
			t.Fatalf("count for cookie %d: %v", key.Cookie, err)
		}
	}
	if kept := len(n.keys(t, bpf.ShuntMapErrors)); kept == 0 || kept > int(m.MaxEntries()) {
		t.Errorf("%d counts are kept of %d, want some, and %d at most", kept, inserted, m.MaxEntries())
	}
	refused()
	p.expectFailures(t, bpf.ShuntPlacePLACE_LISTENER_NONE)
	for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443"} {
		r := c.app.Dial(t, dst)
		if r.Listener() != "out" || plain(r.Served.OrigDst().Addr) != dst {
			t.Errorf("to %s: %+v", dst, r)
		}
	}
}
