// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/trace"
	"shunt.dev/shunt/redirect"
)

// quiet is how long nothing has to come.
const quiet = 50 * time.Millisecond

// trace looks on at a node's pods: at all of them, where none is given.
func (n *node) trace(t testing.TB, filter trace.Filter, pods ...*pod) *trace.Tracer {
	t.Helper()
	if filter.Rules == nil {
		filter.Rules = rules(func(redirect.Rule) bool { return true })
	}
	for _, p := range pods {
		filter.Pods = append(filter.Pods, p.cookie)
	}
	tracer, err := trace.New(n.opts, filter)
	if err != nil {
		t.Fatalf("trace: %v", err)
	}
	t.Cleanup(func() {
		if err := tracer.Close(); err != nil {
			t.Errorf("end a trace: %v", err)
		}
	})
	return tracer
}

// rules are those that fit, and what has none.
func rules(fit func(redirect.Rule) bool) []bpf.ShuntRule {
	list := []bpf.ShuntRule{bpf.ShuntRuleRULE_NONE}
	for _, r := range redirect.AllRules() {
		if fit(r) {
			list = append(list, bpf.ShuntRule(r))
		}
	}
	return list
}

// expectTraced fails the test unless a tracer shows these decisions, and no others.
func expectTraced(t *testing.T, what string, tracer *trace.Tracer, want ...string) {
	t.Helper()
	var got []string
	for {
		wait := quiet
		if len(got) < len(want) {
			wait = leftTime
		}
		d, err := tracer.Read(time.Now().Add(wait))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatalf("%s: read a decision: %v", what, err)
		}
		if age := time.Since(d.Time); age < 0 || age > leftTime {
			t.Errorf("%s: a decision is of %v", what, d.Time)
		}
		got = append(got, tell(&d))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
	if n := tracer.Lost(); n != 0 {
		t.Errorf("%s: %d decisions were lost", what, n)
	}
}

// tell puts a decision into words.
func tell(d *trace.Decision) string {
	rule := redirect.Rule(d.Rule)
	who := fmt.Sprintf("%s/%d (%d, %d)", d.Command, d.PID, d.UID, d.GID)
	if d.Interface != 0 {
		who = fmt.Sprintf("%v by %d", d.Src, d.Interface)
	}
	proto := map[int]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[d.Protocol]
	s := fmt.Sprintf("pod %d: %s %s to %v: %v by %v", d.Cookie, proto, who, d.Dst, rule.Verdict(), rule)
	if f := d.Failure; f != nil {
		s += fmt.Sprintf(", refused: %s %s", f.Program(), f.Name())
	}
	return s
}

// by is what tell says of a TCP connection that an actor makes.
func (p *pod) by(t testing.TB, a *testbed.Actor, dst string, v redirect.Verdict, r redirect.Rule, refused ...string) string {
	t.Helper()
	return p.byProcess(t, a, a.PID, "tcp", dst, v, r, refused...)
}

// byProcess: one that has an actor's socket.
func (p *pod) byProcess(t testing.TB, a *testbed.Actor, pid int, proto, dst string, v redirect.Verdict, r redirect.Rule, refused ...string) string {
	t.Helper()
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		t.Fatal(err)
	}
	s := fmt.Sprintf("pod %d: %s %s/%d (%d, %d) to %s: %v by %v", p.cookie, proto, strings.TrimSpace(string(comm)), pid, a.UID, a.GID, dst, v, r)
	return s + strings.Join(slices.Insert(refused, 0, ""), ", refused: ")
}

// TestPrivilegedTrace: who looks on sees of each decision the pod, the process or
// the client, where it goes, the verdict, the rule, and why it was refused.
func TestPrivilegedTrace(t *testing.T) {
	begin(t)
	eachHook(t, testTrace)
}

func testTrace(t *testing.T, n *node) {
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), append(slices.Clone(dnsPolicy), testbed.Annotate(excludePorts, "3306"), testbed.Annotate(includeInbound, "8080"))...)
	c := newCast(t, p, []uint16{8080, 8081})
	eth0, err := p.Netlink().LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	arrives := func(r testbed.ConnectResult, client netip.Addr, dst string, v redirect.Verdict, rule redirect.Rule, refused string) string {
		s := fmt.Sprintf("pod %d: tcp %v by %d to %s: %v by %v", p.cookie, at(client, r.Local.Port()), eth0.Attrs().Index, dst, v, rule)
		return s + refused
	}
	out, in, direct, dns := redirect.VerdictOutbound, redirect.VerdictInbound, redirect.VerdictDirect, redirect.VerdictDNS

	if r := c.app.Dial(t, "10.99.1.1:80"); r.Listener() != "out" {
		t.Fatalf("before anybody looks: %+v", r)
	}
	tracer := n.trace(t, trace.Filter{})
	for _, family := range []struct {
		dst, own, client, resolver string
	}{
		{"10.99.1.1:", p.Addr4().String() + ":", testbed.WorldAddr4.String(), "10.99.0.53:53"},
		{"[fd99::1]:", "[" + p.Addr6().String() + "]:", testbed.WorldAddr6.String(), "[fd99::53]:53"},
	} {
		client := netip.MustParseAddr(family.client)
		for _, x := range []struct {
			by  *testbed.Actor
			dst string
			v   redirect.Verdict
			r   redirect.Rule
		}{
			{c.app.Actor, family.dst + "80", out, redirect.RuleOutIncludeCIDR},
			{c.app.Actor, family.dst + "3306", direct, redirect.RuleOutExcludePort},
			{c.proxy.Actor, family.own + "8080", in, redirect.RuleOutProxyToSelf},
			{c.gidOnly, family.dst + "80", direct, redirect.RuleOutProxyGID},
			{c.app.Actor, family.resolver, dns, redirect.RuleOutDNS},
		} {
			x.by.Connect(t, testbed.ConnectSpec{Dst: ap(x.dst), Abort: true})
			expectTraced(t, x.dst, tracer, p.by(t, x.by, x.dst, x.v, x.r))
		}

		// Datagrams: by sendto, and by connect, after which send decides nothing.
		asks := p.byProcess(t, c.app.Actor, os.Getpid(), "udp", family.resolver, dns, redirect.RuleOutDNS)
		domain := 4
		if client.Is6() {
			domain = 6
		}
		u := udpSocket(t, c.app.Actor, testbed.SocketSpec{Family: domain})
		if e := u.send("?", ap(family.resolver)); e != "" {
			t.Errorf("sendto: %s", e)
		}
		expectTraced(t, "sendto", tracer, asks)
		u.close()
		u = udpSocket(t, c.app.Actor, testbed.SocketSpec{Family: domain})
		if e := u.connect(ap(family.resolver)); e != "" {
			t.Errorf("connect: %s", e)
		}
		u.send("?", netip.AddrPort{}) // nobody is there
		expectTraced(t, "a connected datagram socket", tracer, asks)
		u.close()

		r := w.Dial(t, family.own+"8080")
		expectTraced(t, "inbound", tracer, arrives(r, client, family.own+"8080", in, redirect.RuleInInclude, ""))
		r = w.Dial(t, family.own+"8081")
		expectTraced(t, "inbound", tracer, arrives(r, client, family.own+"8081", direct, redirect.RuleInDefault, ""))
	}

	for _, l := range c.proxy.In {
		l.CloseAll(t)
	}
	for i, own := range p.AllAddrs() {
		client := []netip.Addr{testbed.WorldAddr4, testbed.WorldAddr6}[i]
		spec := testbed.ConnectSpec{Dst: at(own, 8080), SocketSpec: testbed.SocketSpec{Bind: at(client, uint16(40000+i)), ReuseAddr: true}}
		r := w.Connect(t, spec)
		r.Local = spec.Bind
		expectTraced(t, "nobody listens: "+r.Errno, tracer, arrives(r, client, spec.Dst.String(), in, redirect.RuleInInclude, ", refused: inbound listener-none ENOENT"))
	}
}

// TestPrivilegedTraceRefused: what a program denies is shown with the rule, and
// with what was in the way.
func TestPrivilegedTraceRefused(t *testing.T) {
	begin(t)
	n := newNode(t, func(o *loader.Options) { o.InflightLimit = 1 })
	p, c := newScene(t, n, testbed.V4Only())
	for _, l := range append(c.proxy.Out, c.proxy.In...) {
		l.Close(t)
	}
	frozen := c.proxy.Listen(t, testbed.ListenSpec{Name: "frozen", Addr: ap("0.0.0.0:15001"), NoAccept: true, Backlog: 1})
	defer frozen.Close(t)
	tracer := n.trace(t, trace.Filter{}, p)
	out, rule := redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR

	if r := c.app.Dial(t, "[fd99::1]:80"); r.Errno != "ENETUNREACH" {
		t.Errorf("to IPv6 in a pod without: %q", r.Errno)
	}
	expectTraced(t, "no source", tracer, p.by(t, c.app.Actor, "[fd99::1]:80", out, rule, "connect no-source ENETUNREACH"))

	// A backlog takes one more than it is asked for; then handshakes stay under way.
	var stuck []int
	defer func() {
		for _, s := range stuck {
			c.app.Close(t, s)
		}
	}()
	for i := 0; ; i++ {
		r := c.app.Connect(t, testbed.ConnectSpec{Dst: ap("10.99.1.1:80"), Nonblock: true, Keep: true, NoGreeting: true, Timeout: time.Millisecond})
		stuck = append(stuck, r.Sock)
		if r.Errno == "EPERM" {
			expectTraced(t, "no room", tracer, p.by(t, c.app.Actor, "10.99.1.1:80", out, rule, "connect room EAGAIN"))
			return
		}
		expectTraced(t, "room", tracer, p.by(t, c.app.Actor, "10.99.1.1:80", out, rule))
		if i == 8 {
			t.Fatal("no connect is denied")
		}
	}
}

// TestPrivilegedTraceFilter: each tracer gets the pods and the rules that it asks
// for, four of them at once.
func TestPrivilegedTraceFilter(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	q := n.redirect(t, testbed.NewPod(t, testbed.InWorld(p.World)), twinPolicy...)
	other := newCast(t, q, nil)
	redirected := func(r redirect.Rule) bool { return r.Verdict() != redirect.VerdictDirect }

	all := n.trace(t, trace.Filter{})
	one := n.trace(t, trace.Filter{}, p)
	out := n.trace(t, trace.Filter{Rules: rules(redirected)})
	direct := n.trace(t, trace.Filter{Rules: rules(func(r redirect.Rule) bool { return !redirected(r) })}, p, q)
	if _, err := trace.New(n.opts, trace.Filter{}); !errors.Is(err, trace.ErrTracers) {
		t.Errorf("a fifth tracer: %v, want %v", err, trace.ErrTracers)
	}
	if err := one.SetPods([]uint64{1, 2, 3, 4, 5}); err == nil {
		t.Error("five pods can be named")
	}

	a := p.by(t, c.app.Actor, "10.99.1.1:80", redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR)
	b := p.by(t, c.proxy.Actor, "[fd99::1]:80", redirect.VerdictDirect, redirect.RuleOutProxy)
	d := q.by(t, other.app.Actor, "10.99.1.1:80", redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR)
	connect := func() {
		t.Helper()
		for _, r := range []testbed.ConnectResult{c.app.Dial(t, "10.99.1.1:80"), c.proxy.Dial(t, "[fd99::1]:80"), other.app.Dial(t, "10.99.1.1:80")} {
			if r.Errno != "" {
				t.Errorf("connect: %s", r.Errno)
			}
		}
	}
	connect()
	expectTraced(t, "of all", all, a, b, d)
	expectTraced(t, "of one pod", one, a, b)
	expectTraced(t, "redirected", out, a, d)
	expectTraced(t, "direct", direct, b)

	if err := errors.Join(one.SetPods([]uint64{q.cookie}), direct.SetPods([]uint64{}), out.SetPods(nil)); err != nil {
		t.Fatal(err)
	}
	connect()
	expectTraced(t, "of all", all, a, b, d)
	expectTraced(t, "of another pod", one, d)
	expectTraced(t, "of no pod", direct)
	expectTraced(t, "of every pod", out, a, d)
}

// switchedOn reads the word that switches tracing on, and counts the ring buffers.
func (n *node) switchedOn(t testing.TB) (on bool, rings int) {
	t.Helper()
	m := n.pinned(t, "tracing")
	defer m.Close()
	var v bpf.ShuntTrace
	if err := m.Lookup(uint32(0), &v); err != nil {
		t.Fatal(err)
	}
	r := n.pinned(t, bpf.ShuntMapRings)
	defer r.Close()
	for seat := range uint32(len(v.Tracers)) {
		var id uint32
		if err := r.Lookup(seat, &id); err == nil {
			rings++
		}
	}
	return v.On != 0, rings
}

// TestPrivilegedTraceOff: the programs look at one word, which is zero unless
// somebody traces, and become so again by the next decision when nobody does.
func TestPrivilegedTraceOff(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	expectOff := func(when string) {
		t.Helper()
		if on, rings := n.switchedOn(t); on || rings != 0 {
			t.Errorf("%s: tracing is on: %v, with %d ring buffers", when, on, rings)
		}
	}
	c.app.Dial(t, "10.99.1.1:80")
	expectOff("before anybody has traced")

	first, err := trace.New(n.opts, trace.Filter{Rules: rules(func(redirect.Rule) bool { return true })})
	if err != nil {
		t.Fatal(err)
	}
	second := n.trace(t, trace.Filter{})
	if on, rings := n.switchedOn(t); !on || rings != 2 {
		t.Errorf("with two tracers: on: %v, with %d ring buffers", on, rings)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	c.app.Dial(t, "10.99.1.1:80")
	expectTraced(t, "when the other has gone", second, p.by(t, c.app.Actor, "10.99.1.1:80", redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR))
	third, err := trace.New(n.opts, trace.Filter{Rules: rules(func(redirect.Rule) bool { return true })})
	if err != nil {
		t.Fatal(err)
	}
	c.app.Dial(t, "[fd99::1]:80")
	for _, tracer := range []*trace.Tracer{second, third} {
		expectTraced(t, "in a seat that was taken before", tracer, p.by(t, c.app.Actor, "[fd99::1]:80", redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR))
	}
	// The datapath goes, and comes anew, under who looks on.
	p.remove(t)
	if err := os.RemoveAll(n.opts.BPFDir); err != nil {
		t.Fatal(err)
	}
	testbed.Eventually(t, "the tracer leaves the datapath", func() bool { return !second.Loaded() && !third.Loaded() })
	if err := third.Close(); err != nil {
		t.Fatal(err)
	}
	q := n.redirect(t, testbed.NewPod(t, testbed.InWorld(p.World)), twinPolicy...)
	other := newCast(t, q, nil)
	testbed.Eventually(t, "the tracer finds the datapath", second.Loaded)
	other.app.Dial(t, "10.99.1.1:80")
	expectTraced(t, "in another datapath", second, q.by(t, other.app.Actor, "10.99.1.1:80", redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR))
	if err := second.SetPods([]uint64{}); err != nil {
		t.Fatal(err)
	}
	if on, _ := n.switchedOn(t); !on {
		t.Error("off, with a tracer")
	}
}

// TestPrivilegedTraceOverload: what a tracer does not fetch is kept as far as its
// ring buffer goes, and the rest counted; no connection waits for it.
func TestPrivilegedTraceOverload(t *testing.T) {
	begin(t)
	n := newNode(t)
	p, c := newScene(t, n)
	tracer := n.trace(t, trace.Filter{Ring: uint32(os.Getpagesize())})
	dst := ap("10.99.1.1:80")
	const connections = 1000
	specs := make([]testbed.ConnectSpec, connections)
	for i := range specs {
		specs[i] = testbed.ConnectSpec{Dst: dst, Abort: true}
	}
	for _, r := range c.app.ConnectBatch(t, specs) {
		if r.Listener() != "out" {
			t.Fatalf("%+v", r)
		}
	}
	got := 0
	for ; ; got++ {
		_, err := tracer.Read(time.Now().Add(quiet))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	lost := tracer.Lost()
	t.Logf("%d decisions were kept, %d lost", got, lost)
	if got == 0 || lost == 0 || got+int(lost) != connections {
		t.Errorf("of %d decisions %d were kept and %d lost", connections, got, lost)
	}
	c.app.Dial(t, "10.99.1.1:80")
	expectTraced(t, "with room again", tracer, p.by(t, c.app.Actor, "10.99.1.1:80", redirect.VerdictOutbound, redirect.RuleOutIncludeCIDR))
}
