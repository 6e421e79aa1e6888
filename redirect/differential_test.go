// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/flowgen"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader/trace"
	"shunt.dev/shunt/redirect"
)

const (
	defaultFlows  = 9000
	flowsPerScene = 150
)

// seen is a flow's outcome, in one form for all families and backends: ports
// that the kernel chose are not in it.
type seen struct {
	Errno, Step string
	Listener    string
	ServerPeer  string // the client, as the server sees it
	SamePort    string // whether that has the port that the client calls its own
	ClientLocal string // what the client calls itself
	ClientPeer  string // what the client thinks it is connected to
	ServerLocal string // what the server calls itself: of TPROXY alone
	Original    string // SO_ORIGINAL_DST, by the level that fits the connection
	Original4   string // and by each, where both must answer
	Original6   string
}

func answer(o testbed.OrigDst, size int) string {
	switch {
	case !o.OK():
		return "error"
	case o.Len != size:
		return "wrong length"
	}
	return o.Addr.String()
}

func addr(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return ap.Addr().Unmap().String()
}

// The differences between backends that docs/ARCHITECTURE.md tells of, or that
// are in the nature of NAT. What they cover is not compared, or is wanted as
// each has it; nothing else is.

// mayChangePort: NAT gives a connection another source port, where two of one
// socket's address would be the same behind it.
func mayChangePort(n *node, listener string) bool {
	return !n.can.ConnectHooks && redirected(listener)
}

// answersAll: every listener in an eBPF pod gives the original destination, at
// both levels, of connections that were not redirected too. conntrack does so
// where it happens to know the connection.
func answersAll(n *node, listener string) bool {
	return n.can.ConnectHooks && listener != "world"
}

// errnoFor: a connection from 127.0.0.0/8 out of the pod fails in the route
// look-up, before any rule of iptables; connect hooks come before that.
func errnoFor(n *node, x flowgen.Trial) string {
	if x.FromLoopback && !n.can.ConnectHooks {
		return "EINVAL"
	}
	return x.Errno
}

func redirected(listener string) bool {
	return listener == "out" || listener == "in" || listener == "dns"
}

// transparent: the accepted socket has both addresses as they were.
func transparent(s *flowgen.Scene, x flowgen.Trial) bool {
	return s.Needs.TProxy && x.Flow.Direction == redirect.Inbound && x.Want.Verdict == redirect.VerdictInbound
}

func (n *node) see(s *flowgen.Scene, x flowgen.Trial, r testbed.ConnectResult) seen {
	o := seen{Errno: r.Errno, Step: r.Step, Listener: r.Listener(), ClientPeer: plain(r.Peer), ClientLocal: addr(r.Local)}
	if r.Served == nil {
		return o
	}
	o.ServerPeer = addr(r.Served.Peer)
	if !mayChangePort(n, o.Listener) {
		o.SamePort = fmt.Sprint(r.Served.Peer.Port() == r.Local.Port())
	}
	if transparent(s, x) {
		o.ServerLocal = plain(r.Served.Local)
	}
	four, six := answer(r.Served.OrigDst4, 16), answer(r.Served.OrigDst6, 28)
	if redirected(o.Listener) && x.Want.Verdict != redirect.VerdictDirect {
		// Not by the socket's own: one for both families has IPv4 too.
		o.Original = six
		if r.Served.Peer.Addr().Unmap().Is4() {
			o.Original = four
		}
	}
	if answersAll(n, o.Listener) {
		o.Original4, o.Original6 = four, six
	}
	return o
}

// want says what see must show.
func (n *node) want(s *flowgen.Scene, x flowgen.Trial, r testbed.ConnectResult) seen {
	if errno := errnoFor(n, x); errno != "" {
		return seen{Errno: errno, Step: testbed.StepConnect}
	}
	o := seen{Listener: x.Listener, ServerPeer: x.From.String(), ClientLocal: x.From.String(), ClientPeer: x.Dst.String()}
	if !mayChangePort(n, x.Listener) {
		o.SamePort = "true"
	}
	if transparent(s, x) {
		o.ServerLocal = x.Dst.String()
	}
	if x.Want.Verdict != redirect.VerdictDirect {
		o.Original = x.Dst.String()
	}
	if answersAll(n, x.Listener) {
		o.Original4, o.Original6 = "error", x.Dst.String()
		if x.Dst.Addr().Is4() {
			o.Original4, o.Original6 = x.Dst.String(), at(netip.AddrFrom16(x.Dst.Addr().As16()), x.Dst.Port()).String()
			if r.Served != nil && r.Served.Peer.Addr().Is4() {
				o.Original6 = "error" // there is no such level
			}
		}
	}
	return o
}

// common is what all backends must have alike, whatever Decide says.
func (o seen) common() seen {
	o.SamePort, o.Original4, o.Original6 = "", "", ""
	return o
}

// TestPrivilegedDifferential compares all backends with Policy.Decide, and with
// each other: random policies, random flows, no disagreement.
func TestPrivilegedDifferential(t *testing.T) {
	begin(t)
	play(t, nodes(t, anyone), defaultFlows, flowsPerScene, nil, func(t *testing.T, p *production) []redirect.Decision {
		return compare(t, p, p.scene.Trials(t, flowsPerScene, p.twins[0]))
	})
}

// failure says what eBPF counts of a flow that finds nobody at the proxy's port.
func failure(x flowgen.Trial) bpf.ShuntPlace {
	switch {
	case x.Errno == "" || x.Want.Verdict == redirect.VerdictDirect:
	case x.Flow.Direction == redirect.Inbound:
		return bpf.ShuntPlacePLACE_LISTENER_NONE
	case x.Flow.Src.IsValid() && x.Flow.Src.IsUnspecified() && !x.Spec.BindNoPort && !x.Dst.Addr().IsLoopback():
		// It has a port, and no address; the listener would have told which.
		return bpf.ShuntPlacePLACE_CONNECT_BIND
	}
	return bpf.ShuntPlacePLACE_NONE
}

// wantTraced says what a trace must show of flows: where they go, from where they
// come, who decided, and who was refused by a program.
func wantTraced(trials []flowgen.Trial) map[string]int {
	want := map[string]int{}
	for _, x := range trials {
		from, refused := "", bpf.ShuntPlacePLACE_NONE
		if x.Flow.Direction == redirect.Inbound {
			from, refused = addr(netip.AddrPortFrom(x.Flow.Src, 0)), failure(x)
		}
		want[fmt.Sprintf("%v %s to %s: %v by %v, place %d", x.Flow.Direction, from, plain(x.Dst), x.Want.Verdict, x.Want.Rule, refused)]++
	}
	return want
}

func seeTraced(list []trace.Decision) map[string]int {
	seen := map[string]int{}
	for _, d := range list {
		direction, from, refused := redirect.Outbound, "", bpf.ShuntPlacePLACE_NONE
		if d.Interface != 0 {
			direction, from = redirect.Inbound, addr(d.Src)
		}
		if d.Failure != nil {
			refused = d.Failure.Place
		}
		rule := redirect.Rule(d.Rule)
		seen[fmt.Sprintf("%v %s to %s: %v by %v, place %d", direction, from, plain(d.Dst), rule.Verdict(), rule, refused)]++
	}
	return seen
}

// compare tries flows on all twins of a scene.
func compare(t testing.TB, p *production, trials []flowgen.Trial) (decided []redirect.Decision) {
	t.Helper()
	byRule, failures := map[redirect.Rule]int{}, map[bpf.ShuntPlace]int{}
	for _, x := range trials {
		decided = append(decided, x.Want)
		byRule[x.Want.Rule]++
		if place := failure(x); place != 0 {
			failures[place]++
		}
	}
	results := make([][]testbed.ConnectResult, len(p.nodes))
	for k := range p.nodes {
		results[k] = p.twins[k].Run(t, trials)
	}
	p.tally(t, byRule, failures)
	for k, n := range p.nodes {
		if n.bpfDir == "" {
			continue
		}
		if diff := cmp.Diff(wantTraced(trials), seeTraced(p.traced[k])); diff != "" {
			p.describe(t)
			t.Errorf("%s: flows traced (-Decide +kernel):\n%s", n.name, diff)
		}
	}
	for i, x := range trials {
		var answers strings.Builder
		alike := true
		var first *seen
		for k, n := range p.nodes {
			got := n.see(p.scene, x, results[k][i])
			diff := cmp.Diff(n.want(p.scene, x, results[k][i]), got)
			if diff != "" {
				diff = "    (-want +got):\n" + diff
			}
			fmt.Fprintf(&answers, "  %s: %+v\n%s", n.name, got, diff)
			alike = alike && diff == ""
			if x.FromLoopback {
				continue
			}
			if first == nil {
				first = new(got.common())
			} else if *first != got.common() {
				alike = false
			}
		}
		if !alike {
			p.disagree(t, x, answers.String())
		}
	}
	return decided
}
