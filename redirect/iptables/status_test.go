// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
)

func every(redirect.PodRef) bool { return true }

// TestUncount: counters are taken out, and what is left is what iptables-save
// says without them.
func TestUncount(t *testing.T) {
	rules, packets := uncount(`# Generated
*nat
:OUTPUT ACCEPT [5:300]
:SHUNT_OUT - [0:0]
[4:240] -A OUTPUT -p tcp -j SHUNT_OUT
[3:180] -A SHUNT_OUT -d 10.1.0.0/16 -p tcp -j REDIRECT --to-ports 15001
-A OTHER -j RETURN
COMMIT
*raw
[9:9] -A SHUNT_ZONE_OUT -p udp -m udp --dport 53 -j CT --zone 1
COMMIT
`)
	want := `# Generated
*nat
:OUTPUT ACCEPT [5:300]
:SHUNT_OUT - [0:0]
-A OUTPUT -p tcp -j SHUNT_OUT
-A SHUNT_OUT -d 10.1.0.0/16 -p tcp -j REDIRECT --to-ports 15001
-A OTHER -j RETURN
COMMIT
*raw
-A SHUNT_ZONE_OUT -p udp -m udp --dport 53 -j CT --zone 1
COMMIT
`
	if diff := cmp.Diff(want, rules); diff != "" {
		t.Error(diff)
	}
	var got []string
	for _, c := range packets {
		got = append(got, strings.Join([]string{c.table, c.chain}, " "))
	}
	if diff := cmp.Diff([]string{"nat OUTPUT", "nat SHUNT_OUT", "raw SHUNT_ZONE_OUT"}, got); diff != "" || packets[1].packets != 3 {
		t.Errorf("%s %+v", diff, packets)
	}
}

// TestFlows: every rule that is rendered in nat has a row of the semantics to be
// counted by, or a reason; and what no rule counts is the default's.
func TestFlows(t *testing.T) {
	uncounted := map[string]bool{"the proxy's answers, which begin nothing": true}
	for _, c := range ruleCases() {
		for _, f := range []Family{IPv4, IPv6} {
			text := Render(c.policy(t, new(testbed.Pod)), f)
			var packets []counted
			sum := map[redirect.Rule]uint64{}
			into, why, table, seen := map[string]uint64{}, "", "", map[string]bool{}
			for line := range strings.Lines(text) {
				line = strings.TrimSpace(line)
				if name, ok := strings.CutPrefix(line, "*"); ok {
					table = name
				} else if name, ok := strings.CutPrefix(line, "# "); ok {
					why = name
				} else if rule, ok := strings.CutPrefix(line, "-A "); ok && table == "nat" {
					chain, spec, _ := strings.Cut(rule, " ")
					if !ours(chain) || seen[chain+normal(spec)] {
						continue
					}
					seen[chain+normal(spec)] = true
					packets = append(packets, counted{table, chain, normal(spec), 3})
					into[chain] += 3
					if r := ruleFor(why); r != 0 {
						sum[r] += 3
					} else if !uncounted[why] {
						t.Errorf("%s: no row for %q", c.name, why)
					}
				}
			}
			packets = append(packets, counted{"nat", "OUTPUT", normal("-p tcp -j " + chainOut), into[chainOut] + 5}, counted{"nat", "PREROUTING", normal("! -i lo -p tcp -j " + chainIn), into[chainIn] + 7})
			sum[redirect.RuleOutDefault] += 5
			sum[redirect.RuleInDefault] += 7
			if diff := cmp.Diff(sum, flows(text, packets)); diff != "" {
				t.Errorf("%s, %v (-want +got):\n%s", c.name, f, diff)
			}
		}
	}
}

// files lists a folder with what a write would change.
func files(t *testing.T, dir string) (list []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := e.Info()
		if err == nil {
			list = append(list, path+" "+st.ModTime().String())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestPrivilegedStatus: chains that are there or not are told, connections are
// counted by the rules that decided them, and nothing is changed.
func TestPrivilegedStatus(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		p := testbed.NewPod(t)
		p.World.ServeAll(t)
		if list, err := n.Status(t.Context(), every); err != nil || len(list) != 0 {
			t.Fatalf("a node that has nothing: %+v, %v", list, err)
		}
		x := n.redirect(t, p, testbed.Annotate(excludePorts, "3306"), testbed.ContainerPorts(8080))
		p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
		app := p.StartApp(t, 8080, 9090)
		for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443", "10.99.3.4:81", "10.99.3.4:3306", "127.0.0.1:8080"} {
			if r := app.Dial(t, dst); r.Errno != "" {
				t.Errorf("to %s: %+v", dst, r)
			}
		}
		for _, port := range []uint16{8080, 8080, 9090} {
			if r := p.World.Dial(t, netip.AddrPortFrom(p.Addr4(), port).String()); r.Errno != "" {
				t.Errorf("inbound: %+v", r)
			}
		}
		before, children := files(t, n.opts.RunDir), n.children.Load()
		status := func(closely func(redirect.PodRef) bool) Status {
			t.Helper()
			list, err := New(n.opts).Status(t.Context(), closely)
			if err != nil || len(list) != 1 {
				t.Fatalf("%+v, %v", list, err)
			}
			return list[0]
		}
		quick, closer := status(nil), status(every)
		if quick.Counted || len(quick.Wrong)+len(closer.Wrong) > 0 || quick.Gone || quick.Pod.Name != p.Name {
			t.Errorf("quick: %+v, closer: %q", quick, closer.Wrong)
		}
		want := map[redirect.Rule]uint64{
			redirect.RuleOutIncludeCIDR: 3, redirect.RuleOutExcludePort: 1, redirect.RuleOutLocal: 1,
			redirect.RuleInInclude: 2, redirect.RuleInDefault: 1,
		}
		if diff := cmp.Diff(want, closer.Flows); diff != "" || !closer.Counted {
			t.Errorf("flows (-want +got):\n%s", diff)
		}
		for _, st := range []Status{quick, closer} {
			state := loader.HookAttached
			if n.opts.Mode == Legacy && !st.Counted {
				state = loader.HookUnknown
			}
			if len(st.Chains) != 4 {
				t.Errorf("chains %v", st.Chains)
			}
			for _, c := range st.Chains {
				if c.State != state {
					t.Errorf("%v is %s, want %s", c, c.State, state)
				}
			}
		}
		n2 := New(n.opts)
		if _, err := n2.Status(t.Context(), func(redirect.PodRef) bool { return false }); err != nil || n2.children.Load() != 0 || n.children.Load() != children {
			t.Errorf("%v, %d children were started for a pod that is not asked about", err, n2.children.Load())
		}
		if diff := cmp.Diff(before, files(t, n.opts.RunDir)); diff != "" {
			t.Errorf("looking has changed:\n%s", diff)
		}

		// What somebody broke.
		program := "iptables-" + string(n.opts.Mode)
		p.Command(t, program, "-t", "nat", "-D", "OUTPUT", "-p", "tcp", "-j", chainOut)
		p.Command(t, program, "-t", "nat", "-F", chainOut)
		p.Command(t, program, "-t", "nat", "-X", chainOut)
		missing := "the chain IPv4 nat SHUNT_OUT is missing"
		if w := status(nil).Wrong; n.opts.Mode == NFT && cmp.Diff([]string{missing}, w) != "" {
			t.Errorf("quick: %q", w)
		}
		if w := strings.Join(status(every).Wrong, "; "); !strings.Contains(w, "chain SHUNT_OUT is missing") {
			t.Errorf("closely: %s", w)
		}
		// While somebody is at work on the pod, that is no finding.
		unlock, err := n.lock(t.Context(), x.target.Attachment)
		if err != nil {
			t.Fatal(err)
		}
		if st := status(every); !st.Changing {
			t.Errorf("locked: %+v", st)
		}
		unlock()
		records, err := Records(n.opts.RunDir)
		if err != nil || len(records) != 1 || !records[0].Of(records[0].Inode, p.NetnsCookie(t)) || records[0].Of(records[0].Inode, 1) {
			t.Errorf("records %+v, %v", records, err)
		}
		if err := os.WriteFile(filepath.Join(n.dir(), "x@eth0.json"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if list, err := n.Status(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "x@eth0.json") || len(list) != 1 {
			t.Errorf("beside a record that can't be read: %v, %v", list, err)
		}
		if err := os.Remove(filepath.Join(n.dir(), "x@eth0.json")); err != nil {
			t.Fatal(err)
		}
		app.Stop(t)
		r, err := readRecord(n.recordPath(x.target.Attachment))
		if err != nil {
			t.Fatal(err)
		}
		r.Boot = "another"
		if err := n.writeRecord(r); err != nil {
			t.Fatal(err)
		}
		if st := status(every); !st.Gone || len(st.Chains) != 0 {
			t.Errorf("of another boot: %+v", st)
		}
		if err := n.Remove(t.Context(), x.target.Attachment); err != nil {
			t.Error(err)
		}
	})
}

// TestPrivilegedStatusTProxy: what TPROXY hands over is counted as included, and
// questions to resolvers by their rule.
func TestPrivilegedStatusTProxy(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		p := testbed.NewPod(t)
		p.World.ServeAll(t)
		x := n.redirect(t, p, testbed.Annotate(interceptionMode, "TPROXY"), testbed.ContainerPorts(8080))
		transparentProxy(t, x)
		app := p.StartApp(t, 8080)
		if r := app.Dial(t, "10.99.3.4:80"); r.Listener() != "out" {
			t.Errorf("outbound: %+v", r)
		}
		for range 3 {
			if r := p.World.Dial(t, netip.AddrPortFrom(p.Addr4(), 8080).String()); r.Listener() != "in" {
				t.Errorf("inbound: %+v", r)
			}
		}
		list, err := n.Status(t.Context(), every)
		if err != nil || len(list) != 1 {
			t.Fatalf("%+v, %v", list, err)
		}
		want := map[redirect.Rule]uint64{redirect.RuleOutIncludeCIDR: 1, redirect.RuleInInclude: 3}
		if diff := cmp.Diff(want, list[0].Flows); diff != "" || len(list[0].Wrong) > 0 {
			t.Errorf("%q, flows (-want +got):\n%s", list[0].Wrong, diff)
		}
		if err := n.Remove(t.Context(), x.target.Attachment); err != nil {
			t.Error(err)
		}
	})
}
