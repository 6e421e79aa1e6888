// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"context"
	"io/fs"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// begin is the first line of a privileged test.
func begin(t *testing.T) {
	t.Helper()
	testbed.Privileged(t)
	testbed.NoLeaks(t)
}

// modes runs a test on nft and on legacy.
func modes(t *testing.T, test func(t *testing.T, n *node)) {
	t.Helper()
	for _, m := range []Mode{NFT, Legacy} {
		t.Run(string(m), func(t *testing.T) { test(t, newNode(t, func(o *Options) { o.Mode = m })) })
	}
}

// node is a node with a run directory of its own. When the test ends, nothing
// of any pod may be left in it.
type node struct {
	*Backend
}

func newNode(t testing.TB, edit ...func(*Options)) *node {
	t.Helper()
	opts := Options{RunDir: t.TempDir()}
	for _, e := range edit {
		e(&opts)
	}
	n := &node{New(opts)}
	t.Cleanup(func() {
		t.Helper()
		err := filepath.WalkDir(n.opts.RunDir, func(path string, d fs.DirEntry, err error) error {
			rel, _ := filepath.Rel(n.opts.RunDir, path)
			if err == nil && !d.IsDir() && rel != "iptables/lock" && rel != "iptables-backend" {
				t.Errorf("left behind: %s", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
	return n
}

// save gives what iptables-save says of both families, less what changes by
// itself.
func save(t testing.TB, m Mode, p *testbed.Pod) string {
	t.Helper()
	var b strings.Builder
	for _, program := range []string{"iptables", "ip6tables"} {
		b.WriteString("# " + program + "\n")
		for line := range strings.Lines(p.Command(t, program+"-"+string(m)+"-save")) {
			if strings.HasPrefix(line, "#") {
				continue
			}
			if strings.HasPrefix(line, ":") {
				line, _, _ = strings.Cut(line, " [")
				line += "\n"
			}
			b.WriteString(line)
		}
	}
	return b.String()
}

// residue is what a removed pod may not have: rules, chains of ours, addresses
// on lo, routing rules and routes of ours.
func residue(t testing.TB, m Mode, p *testbed.Pod) string {
	t.Helper()
	var out []string
	for line := range strings.Lines(save(t, m, p)) {
		if strings.Contains(line, "SHUNT") || strings.HasPrefix(line, "-A") {
			out = append(out, line)
		}
	}
	for _, argv := range [][]string{
		{"ip", "rule"},
		{"ip", "-6", "rule"},
		{"ip", "route", "show", "table", "all"},
		{"ip", "-6", "route", "show", "table", "all"},
		{"ip", "addr", "show", "dev", "lo"},
	} {
		for line := range strings.Lines(p.Command(t, argv...)) {
			for _, ours := range []string{"lookup 133", "table 133", "0x539", "::6/128", " ::6 "} {
				if strings.Contains(line, ours) {
					out = append(out, line)
					break
				}
			}
		}
	}
	return strings.Join(out, "")
}

// pod is a pod that is redirected by iptables.
type pod struct {
	*testbed.Pod
	node   *node
	policy *redirect.Policy
	target redirect.Target
}

func evaluate(t testing.TB, cfg redirect.Config, p *testbed.Pod, mutators ...testbed.PodMutator) *redirect.Policy {
	t.Helper()
	facts, err := redirect.ParsePod(p.Injected(mutators...))
	if err != nil {
		t.Fatal(err)
	}
	outcome, policy, err := cfg.Evaluate(facts)
	if err != nil || policy == nil {
		t.Fatalf("the pod is not to be redirected: %+v, %v", outcome, err)
	}
	return policy
}

func targetOf(p *testbed.Pod) redirect.Target {
	return redirect.Target{
		Attachment: redirect.Attachment{ContainerID: p.ContainerID, IfName: "eth0"},
		Network:    "shunt", Netns: p.NetnsPath(), Cgroup: p.CgroupPath(),
		Pod:   redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		Addrs: p.AllAddrs(),
	}
}

// redirect has the backend program a pod, by facts that mutators may change.
func (n *node) redirect(t testing.TB, p *testbed.Pod, mutators ...testbed.PodMutator) *pod {
	t.Helper()
	return n.apply(t, p, evaluate(t, redirect.DefaultConfig(), p, mutators...))
}

func (n *node) apply(t testing.TB, p *testbed.Pod, policy *redirect.Policy) *pod {
	t.Helper()
	x := &pod{Pod: p, node: n, policy: policy, target: targetOf(p)}
	if err := n.Apply(t.Context(), x.target, policy); err != nil {
		t.Fatalf("apply: %v", err)
	}
	t.Cleanup(func() { x.remove(t) })
	if err := n.Check(t.Context(), x.target); err != nil {
		t.Fatalf("check: %v", err)
	}
	return x
}

// remove undoes redirect. It may be repeated.
func (p *pod) remove(t testing.TB) {
	t.Helper()
	// Not the test's context, which has ended when the clean-up runs.
	if err := p.node.Remove(context.Background(), p.target.Attachment); err != nil {
		t.Errorf("remove: %v", err)
	}
}

// want is what a flow must come to.
type want struct {
	listener string         // who serves it
	dst      netip.AddrPort // what it asked for, as the kernel understands it
	from     netip.Addr     // its source address
}

// seen is a flow's outcome, in one form for all families.
type seen struct {
	Errno, Step string
	Listener    string
	ServerPeer  string // the client, as the server sees it
	ClientPeer  string // what the client thinks it is connected to
	Original    string // SO_ORIGINAL_DST, where iptables gives one
}

// plain writes an address as it is spoken of, mapped or not.
func plain(ap netip.AddrPort) string {
	if !ap.IsValid() {
		return ""
	}
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
}

func redirected(listener string) bool {
	return listener == "out" || listener == "in" || listener == "dns"
}

func see(r testbed.ConnectResult) seen {
	s := seen{Errno: r.Errno, Step: r.Step, Listener: r.Listener(), ClientPeer: plain(r.Peer)}
	if r.Served == nil {
		return s
	}
	s.ServerPeer = plain(r.Served.Peer)
	if redirected(s.Listener) {
		// NAT changes the port where two connections would be the same.
		s.ServerPeer = r.Served.Peer.Addr().Unmap().String()
		// By the level that fits the connection, not the socket.
		o := r.Served.OrigDst6
		if r.Served.Peer.Addr().Unmap().Is4() {
			o = r.Served.OrigDst4
		}
		s.Original = "error"
		if o.OK() {
			s.Original = o.Addr.String()
		}
	}
	return s
}

func (w want) outcome(r testbed.ConnectResult) seen {
	s := seen{Listener: w.listener, ServerPeer: netip.AddrPortFrom(w.from, r.Local.Port()).String(), ClientPeer: w.dst.String()}
	if redirected(w.listener) {
		s.ServerPeer = w.from.String()
		s.Original = w.dst.String()
	}
	return s
}

// expect fails the test unless a flow came to what is wanted.
func expect(t testing.TB, what string, r testbed.ConnectResult, w want) {
	t.Helper()
	if diff := cmp.Diff(w.outcome(r), see(r)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func ap(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func at(a netip.Addr, port uint16) netip.AddrPort { return netip.AddrPortFrom(a, port) }
