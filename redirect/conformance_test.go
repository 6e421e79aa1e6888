// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

var update = flag.Bool("update", false, "write the table in docs/SEMANTICS.md")

const (
	semantics    = "../docs/SEMANTICS.md"
	architecture = "../docs/ARCHITECTURE.md"

	tableBegins = "<!-- conformance: written by TestPrivilegedConformance -->\n"
	tableEnds   = "<!-- conformance ends -->\n"
)

// A lawRow is one thing that docs/SEMANTICS.md says of verdicts.
type lawRow struct {
	section int
	rule    redirect.Rule // of the tables of sections 4 and 5
	what    string        // a short name, of what is no rule
	// quote is in the bullet, or in the sentence of section 6, that it stands for.
	quote string
	// setup names the policy that it is about: who serves that, plays the row.
	setup string
	// play makes real connections, some of which must go another way than the
	// others: it fails where the row's line does not hold.
	play func(t *testing.T, h *house)
}

func (r lawRow) name() string {
	if r.rule != 0 {
		return "[" + r.rule.String() + "]"
	}
	return r.what
}

// notes are what a cell may say beside yes. Each is told in a document, in these
// words.
var notes = []struct{ text, file, quote string }{
	noteLoopback: {"from 127.0.0.0/8 to a remote destination: redirected, where iptables gives EINVAL", architecture, "an IPv4 socket that its owner bound to 127.0.0.0/8"},
	noteNoIPv6:   {"to IPv6 in a pod without: ENETUNREACH, where iptables gives EADDRNOTAVAIL", architecture, "a pod with IPv6 switched off"},
	noteLast:     {"where one socket asks several at once, every answer bears the address of the last", architecture, "every answer bears the address of the last"},
	noteFragment: {"a SYN in fragments is dropped and counted, unless the first has the whole header and the port is direct", architecture, "a SYN in fragments"},
	noteTimeWait: {"with net.ipv4.tcp_rfc1337=1 not before TIME_WAIT is over: dropped and counted", architecture, "`net.ipv4.tcp_rfc1337=1`"},
	noteMany:     {"of more than 32 listeners of a kind some are not known: refused and counted", architecture, "more than 32 listeners of one kind"},
	noteMPTCP:    {"refused and counted, where the kernel keeps an MPTCP listener out of a sockmap", semantics, "on kernels that refuse it in a sockmap: refused, counted, told"},
	noteOpaque:   {"a listener that is not transparent is served, where iptables drops the client's packets", architecture, "a listener that is not transparent"},
	noteOne:      {"in a pod with one interface besides lo, which is there at ADD: others get iptables (`exclude-interfaces`)", architecture, "in a pod that has one interface besides lo"},
	noteNoMap:    {"it has no map that could be full", semantics, "a full map"},
}

type note int

const (
	noteLoopback note = iota
	noteNoIPv6
	noteLast
	noteFragment
	noteTimeWait
	noteMany
	noteMPTCP
	noteOpaque
	noteOne
	noteNoMap
)

// A house is a node in which rows are played, each in pods of its own or of many.
type house struct {
	*node
	parent  testing.TB // whose pods they are
	stages  map[string]*stage
	outside ring   // the world's resolvers
	packets uint16 // those sent in fragments, each with a number of its own

	// Of the row that is played.
	noted   []note
	decided map[redirect.Rule]map[string]bool // who served what a rule decided
}

// A setup is a policy, and the pod that has it.
type setup struct {
	mutators []testbed.PodMutator
	pod      []testbed.Option
	users    int // the pod's ids begin there
	proxy    []testbed.ProxyOption
	prepare  func(t testing.TB, p *testbed.Pod)
}

// A stage is a pod of a setup.
type stage struct {
	*pod
	house  *house
	t      testing.TB // of the row that is played
	policy *redirect.Policy
	users  int // see setup
	proxy  *testbed.Proxy
	ring   ring // once resolvers is called
}

// evaluate gives the facts and the policy of a setup.
func (s setup) evaluate(t testing.TB, p *testbed.Pod) (*redirect.Pod, *redirect.Policy) {
	t.Helper()
	facts, err := redirect.ParsePod(p.Injected(s.mutators...))
	if err != nil {
		t.Fatal(err)
	}
	cfg := redirect.DefaultConfig()
	outcome, policy, err := cfg.Evaluate(facts)
	if err != nil || policy == nil {
		t.Fatalf("the pod is not to be redirected: %+v, %v", outcome, err)
	}
	return facts, policy
}

// on gives the pod of a setup, which is made when it is first asked for and
// stays until the node goes.
func (h *house) on(t *testing.T, name string) *stage {
	t.Helper()
	if s := h.stages[name]; s != nil {
		s.t = t
		return s
	}
	plan, ok := setups[name]
	if !ok {
		t.Fatalf("no setup %q", name)
	}
	if to := h.handsOver(t, name); to != "" {
		t.Fatalf("%s does not serve setup %q: %s", h.name, name, to)
	}
	p := testbed.NewPod(h.parent, append([]testbed.Option{testbed.InWorld(h.node.world), testbed.UserNamespace(plan.users)}, plan.pod...)...)
	_, policy := plan.evaluate(t, p)
	s := &stage{pod: &pod{Pod: p}, house: h, t: t, policy: policy, users: plan.users}
	h.apply(h.parent, p, policy)
	if plan.prepare != nil {
		plan.prepare(t, p)
	}
	uid, gid, other := plan.users+testbed.ProxyUID, plan.users+testbed.ProxyGID, plan.users+4321
	s.proxy = p.StartProxy(h.parent, uid, gid, plan.proxy...)
	s.actors = map[string]*testbed.Actor{
		flowgen.ByProxy: s.proxy.Actor, flowgen.ByApp: p.StartAppAs(h.parent, plan.users+testbed.AppUID, plan.users+testbed.AppGID, 8080, 8081).Actor, flowgen.ByWorld: h.node.world.Actor,
		flowgen.ByUIDOnly: p.Actor(h.parent, flowgen.ByUIDOnly, uid, other),
		flowgen.ByGIDOnly: p.Actor(h.parent, flowgen.ByGIDOnly, other, gid),
	}
	for name, port := range map[string]uint16{"dns": policy.Proxy.DNSPort, "tunnel": policy.Proxy.TunnelPort} {
		s.proxy.Listen(h.parent, testbed.ListenSpec{Name: name, Addr: at(netip.IPv6Unspecified(), port)})
	}
	h.stages[name] = s
	return s
}

// note marks the row's cell.
func (h *house) note(n note) {
	if !slices.Contains(h.noted, n) {
		h.noted = append(h.noted, n)
	}
}

// replace puts a pod's addresses for A4 and A6, those of net1 for N4 and N6.
func (s *stage) replace(text string) string {
	pairs := []string{"A4", s.Addr4().String(), "A6", s.Addr6().String()}
	if len(s.Interfaces) > 1 {
		for _, a := range s.Interfaces[1].Addrs {
			pairs = append(pairs, fmt.Sprintf("N%d", familyOf(a.Addr())), a.Addr().String())
		}
	}
	return strings.NewReplacer(pairs...).Replace(text)
}

func (s *stage) expand(text string) netip.AddrPort { return ap(s.replace(text)) }

// A flow is tried once for each of its destinations.
type flow struct {
	by   string
	to   string        // addresses and ports, with a blank between them; see replace
	goes string        // the listener that serves it, or the connect's errno
	rule redirect.Rule // that decides, where that matters

	from  string // its source addresses where they are not the usual, one for each destination
	bind  string // addresses and ports that it binds to, likewise
	iface string // that it leaves or comes by; "" = the usual
	// mapped: IPv4 destinations are tried by an IPv6 socket only. Otherwise,
	// in the pod, by both.
	mapped bool
	shape  func(*testbed.ConnectSpec)
}

// try makes flows, and fails the test where one comes to anything but what it
// should.
func (s *stage) try(flows ...flow) {
	s.t.Helper()
	for _, f := range flows {
		for i, to := range strings.Fields(f.to) {
			dst := s.expand(to)
			families := []int{familyOf(dst.Addr())}
			switch {
			case f.by == flowgen.ByWorld || dst.Addr().Is6():
			case f.mapped:
				families = []int{6}
			default:
				families = []int{4, 6}
			}
			for _, family := range families {
				spec := testbed.ConnectSpec{Dst: dst, Abort: true, SocketSpec: testbed.SocketSpec{Family: family}}
				if f.bind != "" {
					spec.Bind, spec.ReuseAddr = s.expand(strings.Fields(f.bind)[i]), true
				}
				if f.shape != nil {
					f.shape(&spec)
				}
				var from netip.Addr
				if f.from != "" {
					from = netip.MustParseAddr(s.replace(strings.Fields(f.from)[i]))
				}
				before := s.counted()
				s.expect(f, spec, from, before, s.who(f.by).Connect(s.t, spec))
			}
		}
	}
}

// counted is what eBPF has counted so far; nothing where that has no part.
func (s *stage) counted() map[redirect.Rule]int {
	if s.house.bpfDir == "" {
		return nil
	}
	return s.house.counted(s.t, s.Pod)
}

// source says from where a flow comes that is bound to nothing.
func (s *stage) source(f flow, dst netip.Addr) netip.Addr {
	switch own, six := s.Addr4(), s.Addr6(); {
	case f.by == flowgen.ByWorld && dst.Is4():
		return testbed.WorldAddr4
	case f.by == flowgen.ByWorld:
		return testbed.WorldAddr6
	case dst.Is4() && dst.IsLoopback():
		return netip.MustParseAddr("127.0.0.1")
	case dst.Is4():
		return own
	case dst.IsLoopback() || dst == netip.MustParseAddr("::6"):
		return dst
	default:
		return six
	}
}

// expect compares what has come of a flow with what should have.
func (s *stage) expect(f flow, spec testbed.ConnectSpec, from netip.Addr, before map[redirect.Rule]int, r testbed.ConnectResult) {
	s.t.Helper()
	by := s.who(f.by)
	x := flowgen.Trial{By: f.by, Spec: spec, Dst: spec.Dst, From: from, Listener: f.goes}
	x.Flow = redirect.Flow{Src: spec.Bind.Addr(), Dst: spec.Dst, UID: uint32(by.UID - s.users), GID: uint32(by.GID - s.users), Interface: f.iface, PodAddrs: s.AllAddrs()}
	if spec.FSUID != nil {
		x.Flow.UID, x.Flow.GID = uint32(*spec.FSUID), uint32(*spec.FSGID)
	}
	if f.by == flowgen.ByWorld {
		x.Flow.Direction = redirect.Inbound
		if f.iface == "" {
			x.Flow.Interface = "eth0"
		}
	}
	if strings.HasPrefix(f.goes, "E") {
		x.Listener, x.Errno = "", f.goes
	}
	bound := spec.Bind.IsValid() && !spec.Bind.Addr().IsUnspecified()
	switch spec.Dst.Addr() {
	case netip.IPv4Unspecified():
		x.Dst = at(netip.MustParseAddr("127.0.0.1"), spec.Dst.Port())
		if bound {
			x.Dst = at(spec.Bind.Addr(), spec.Dst.Port())
		}
	case netip.IPv6Unspecified():
		x.Dst = at(netip.IPv6Loopback(), spec.Dst.Port())
	}
	switch {
	case from.IsValid():
	case bound:
		x.From = spec.Bind.Addr()
	default:
		x.From = s.source(f, x.Dst.Addr())
	}
	x.FromLoopback = x.From.Is4() && x.From.IsLoopback() && !x.Dst.Addr().IsLoopback() && !slices.Contains(s.AllAddrs(), x.Dst.Addr())
	x.Want = s.policy.Decide(x.Flow)
	what := fmt.Sprintf("%s to %v, family %d", f.by, spec.Dst, spec.Family)
	if f.rule != 0 && x.Want.Rule != f.rule {
		s.t.Errorf("%s: Decide says %v by %v, want %v", what, x.Want.Verdict, x.Want.Rule, f.rule)
	}
	// Of the scene these two ask for nothing but the mode.
	scene := &flowgen.Scene{Policy: s.policy, Needs: flowgen.Features{TProxy: s.policy.Mode == redirect.ModeTProxy}}
	if diff := cmp.Diff(s.house.want(scene, x, r), s.house.see(scene, x, r)); diff != "" {
		s.t.Errorf("%s, decided by %v (-want +got):\n%s", what, x.Want.Rule, diff)
	}
	if before != nil {
		// Inbound once or more: what comes late for a socket that is gone is
		// looked up as well, and with SYN cookies a connection is twice.
		after := s.counted()
		for _, rule := range redirect.AllRules() {
			more := after[rule] > before[rule]
			if more != (rule == x.Want.Rule) && !(more && rule.Direction() == redirect.Inbound) {
				s.t.Errorf("%s, decided by %v: %v was counted %d times", what, x.Want.Rule, rule, after[rule]-before[rule])
			}
		}
	}
	d := s.house.decided
	if d[x.Want.Rule] == nil {
		d[x.Want.Rule] = map[string]bool{}
	}
	d[x.Want.Rule][f.goes] = true
}

// contrasts reports whether flows have shown a rule, and others that another
// verdict was to be had.
func (h *house) contrasts(rule redirect.Rule) bool {
	for other, goes := range h.decided {
		for who := range goes {
			if other != rule && len(h.decided[rule]) > 0 && !h.decided[rule][who] {
				return true
			}
		}
	}
	return false
}

// capable reports whether a backend with these features serves a policy.
func capable(can flowgen.Features, p *redirect.Policy) bool {
	s := flowgen.Scene{Needs: flowgen.Features{
		Interfaces: len(p.RerouteInterfaces) > 0, Excluded: len(p.ExcludeInterfaces) > 0,
		TProxy: p.Mode == redirect.ModeTProxy, DNS: p.DNSCapture,
	}}
	return can.Serve(&s)
}

// handsOver says whom the node gives a pod of a setup to, and why; "" where it
// serves it.
func (h *house) handsOver(t testing.TB, name string) (to string) {
	t.Helper()
	facts, policy := setups[name].evaluate(t, new(testbed.Pod))
	if h.hook != "" {
		c, err := redirect.Choose(redirect.Auto, string(h.hook), facts, policy)
		switch {
		case err != nil:
			t.Fatal(err)
		case c.Datapath == redirect.Iptables:
			to = fmt.Sprintf("→ iptables: %s", c.Reasons[0].Name)
		case c.Hook != h.hook:
			to = fmt.Sprintf("→ %s: %s", c.Hook, c.Reasons[0].Name)
		}
	}
	if serves := to == ""; serves != capable(h.can, policy) {
		t.Errorf("setup %q: %q is the choice, and the features of %s are %+v", name, to, h.name, h.can)
	}
	return to
}

// A cell is what the table says of a row and a backend.
type cell struct {
	text  string
	notes []note
}

// TestPrivilegedConformance plays the law, line by line, on every backend, and
// keeps the table of docs/SEMANTICS.md to what it has seen.
func TestPrivilegedConformance(t *testing.T) {
	begin(t)
	checkQuotes(t)
	table := map[string]map[string]cell{}
	whole := true
	all := nodes(t, anyone)
	for _, n := range all {
		table[n.name] = map[string]cell{}
		whole = t.Run(n.name, func(t *testing.T) {
			h := &house{node: n, parent: t, stages: map[string]*stage{}}
			for _, row := range lawRows {
				name := fmt.Sprintf("%d %s", row.section, strings.Trim(row.name(), "[]"))
				t.Run(name, func(t *testing.T) {
					if to := h.handsOver(t, row.setup); to != "" {
						table[n.name][row.name()] = cell{text: to}
						return
					}
					h.noted, h.decided = nil, map[redirect.Rule]map[string]bool{}
					row.play(t, h)
					if row.rule != 0 && row.rule != redirect.RuleOutProxyGIDLocal && !t.Failed() && !h.contrasts(row.rule) {
						t.Errorf("no flow shows the rule, or none would have gone another way: %v", h.decided)
					}
					if t.Failed() {
						return
					}
					c := cell{text: "yes", notes: h.noted}
					if slices.Contains(h.noted, noteNoMap) {
						c.text = "–"
					}
					table[n.name][row.name()] = c
				})
			}
		}) && whole
		whole = whole && len(table[n.name]) == len(lawRows)
	}
	if !whole {
		t.Log("not all was played: the table is not compared")
		return
	}
	checkTable(t, render(all, table))
}

// sections gives the lines of a document's sections by their number.
func sections(doc string) map[int][]string {
	found, number := map[int][]string{}, 0
	for line := range strings.Lines(doc) {
		if rest, ok := strings.CutPrefix(line, "## "); ok {
			number = 0
			_, _ = fmt.Sscanf(rest, "%d.", &number) // a section without a number is none of these
		}
		found[number] = append(found[number], strings.TrimSpace(line))
	}
	return found
}

func read(t testing.TB, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// checkQuotes fails the test unless the rows stand for all rules, all bullets of
// sections 4 and 5, and the sentences of section 6 on verdicts, and the notes for
// what documents say.
func checkQuotes(t testing.TB) {
	t.Helper()
	law := sections(read(t, semantics))
	told := map[string]bool{} // lines that rows stand for
	seen := map[string]bool{}
	for _, row := range lawRows {
		if seen[row.name()] {
			t.Errorf("%s is there twice", row.name())
		}
		seen[row.name()] = true
		if row.rule != 0 {
			continue
		}
		i := slices.IndexFunc(law[row.section], func(line string) bool { return strings.Contains(line, row.quote) })
		if i < 0 || row.quote == "" {
			t.Errorf("%s: section %d does not say %q", row.what, row.section, row.quote)
			continue
		}
		told[law[row.section][i]] = true
	}
	for _, r := range redirect.AllRules() {
		if !seen["["+r.String()+"]"] {
			t.Errorf("no row for rule %v", r)
		}
	}
	for _, section := range []int{4, 5} {
		for _, line := range law[section] {
			if strings.HasPrefix(line, "- ") && !told[line] {
				t.Errorf("section %d: no row for %q", section, line)
			}
		}
	}
	for _, n := range notes {
		if !strings.Contains(read(t, n.file), n.quote) {
			t.Errorf("%s does not say %q", n.file, n.quote)
		}
	}
}

var superscripts = []string{"¹", "²", "³", "⁴", "⁵", "⁶", "⁷", "⁸", "⁹", "¹⁰", "¹¹", "¹²"}

// render writes the table.
func render(all []*node, table map[string]map[string]cell) string {
	rows := [][]string{{"§", "what"}}
	for _, n := range all {
		title := n.name
		if n.hook != "" {
			title = fmt.Sprintf("%s, %s", redirect.EBPF, n.hook)
		}
		rows[0] = append(rows[0], title)
	}
	var used []note
	for _, row := range lawRows {
		line := []string{fmt.Sprint(row.section), row.name()}
		for _, n := range all {
			c := table[n.name][row.name()]
			for _, x := range c.notes {
				i := slices.Index(used, x)
				if i < 0 {
					i, used = len(used), append(used, x)
				}
				c.text += " " + superscripts[i]
			}
			line = append(line, c.text)
		}
		rows = append(rows, line)
	}
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, text := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(text))
		}
	}
	var b strings.Builder
	for i, row := range rows {
		for k, text := range row {
			fmt.Fprintf(&b, "| %s%s ", text, strings.Repeat(" ", widths[k]-utf8.RuneCountInString(text)))
		}
		b.WriteString("|\n")
		if i == 0 {
			for _, w := range widths {
				b.WriteString("|" + strings.Repeat("-", w+2))
			}
			b.WriteString("|\n")
		}
	}
	for i, n := range used {
		if i == 0 {
			b.WriteString("\n")
		}
		end := "  \n" // a line break
		if i == len(used)-1 {
			end = "\n"
		}
		fmt.Fprintf(&b, "%s %s%s", superscripts[i], notes[n].text, end)
	}
	return b.String()
}

// checkTable compares what is between the markers, or writes it.
func checkTable(t testing.TB, want string) {
	t.Helper()
	doc := read(t, semantics)
	before, rest, ok := strings.Cut(doc, tableBegins)
	got, after, ok2 := strings.Cut(rest, tableEnds)
	if !ok || !ok2 {
		t.Fatalf("%s has no lines %q and %q", semantics, tableBegins, tableEnds)
	}
	switch {
	case got == want:
	case *update:
		whole := before + tableBegins + want + tableEnds + after
		if err := os.WriteFile(semantics, []byte(whole), 0o644); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s is not what was seen; -update writes it (-file +seen):\n%s", semantics, cmp.Diff(got, want))
	}
}

// withNetAdmin is for the proxy of TPROXY.
var withNetAdmin = testbed.ProxyActor(testbed.WithCaps(unix.CAP_NET_ADMIN))
