// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

func TestNormal(t *testing.T) {
	for _, same := range [][]string{
		{"-d 10.0.0.1/32 -p tcp -j RETURN", "-p tcp -d 10.0.0.1 -j RETURN", "-p tcp -m tcp -d 10.0.0.1/32 -j RETURN"},
		{"! -d ::1/128 -o lo -j RETURN", "-o lo ! -d ::1 -j RETURN"},
		{"-d ::102:304/128 -j RETURN", "-d ::1.2.3.4/128 -j RETURN"},
		{"-p tcp -m tcp ! --dport 53 -m owner ! --uid-owner 7 -j RETURN", "-p tcp -m owner ! --uid-owner 7 -m tcp ! --dport 53 -j RETURN"},
	} {
		for _, s := range same[1:] {
			if a, b := normal(same[0]), normal(s); a != b {
				t.Errorf("%q gives %q, %q gives %q", same[0], a, s, b)
			}
		}
	}
	for _, differ := range [][2]string{
		{"-d 10.0.0.1/32 -j RETURN", "! -d 10.0.0.1/32 -j RETURN"},
		{"-p tcp -m tcp --dport 53 -j RETURN", "-p tcp -m tcp --dport 54 -j RETURN"},
		{"-p tcp -m tcp --dport 53 -j RETURN", "-p udp -m udp --dport 53 -j RETURN"},
		{"-m mark --mark 0x539 -j RETURN", "-m connmark --mark 0x539 -j RETURN"},
		{"-s 10.0.0.1/32 -j RETURN", "-d 10.0.0.1/32 -j RETURN"},
		{"-j RETURN", "-j SHUNT_X"},
	} {
		if normal(differ[0]) == normal(differ[1]) {
			t.Errorf("%q and %q are taken for the same", differ[0], differ[1])
		}
	}
}

// TestParseRender: what is rendered is read as what it was made from.
func TestParseRender(t *testing.T) {
	p := &testbed.Pod{Name: "pod", Namespace: "shop", UID: "1"}
	for _, c := range ruleCases() {
		for _, f := range []Family{IPv4, IPv6} {
			tables := build(c.policy(t, p), f)
			got := parse(Render(c.policy(t, p), f))
			if len(got.tables) != len(tables) {
				t.Fatalf("%s: %d tables are read of %d", c.name, len(got.tables), len(tables))
			}
			for i, x := range tables {
				var jumps []string
				for _, j := range x.jumps {
					jumps = append(jumps, j.spec)
				}
				if diff := cmp.Diff(jumps, got.tables[i].jumps); diff != "" {
					t.Errorf("%s: jumps (-rendered +read):\n%s", c.name, diff)
				}
				for k, ch := range x.chains {
					if there := got.tables[i].chains[k]; there.name != ch.name || len(there.rules) != len(ch.rules) {
						t.Errorf("%s: chain %s of %d rules is read as %s of %d", c.name, ch.name, len(ch.rules), there.name, len(there.rules))
					}
				}
			}
			if d := differences(got, got); d != "" {
				t.Errorf("%s: differs from itself: %s", c.name, d)
			}
			if text := mend(tables, got); text != "" {
				t.Errorf("%s: what is right is mended:\n%s", c.name, text)
			}
		}
	}
}

// restore puts rules into a pod without the backend.
func restore(t testing.TB, m Mode, p *testbed.Pod, program, rules string) {
	t.Helper()
	proc := p.Start(t, testbed.ProcessSpec{
		Argv:       []string{program + "-" + string(m) + "-restore", "--noflush"},
		Stdin:      strings.NewReader(rules),
		Env:        []string{"PATH=" + DefaultPath, "XTABLES_LOCKFILE=" + t.TempDir() + "/lock"},
		HostCgroup: true,
	})
	if code := proc.Wait(t); code != 0 {
		t.Fatalf("%s ended with %d:\n%s", program, code, proc.Output())
	}
}

// TestPrivilegedMend damages the rules of a pod in every way: Check names the
// damage, Apply mends it and nothing else, with and without a record.
func TestPrivilegedMend(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		w := testbed.NewWorld(t)
		mutators := annotations(interceptionMode, "TPROXY", includeInbound, "*", excludeRanges, "10.97.0.0/16,fd97::/16")
		for _, c := range []struct {
			name, program, rules, says string
			missing                    bool // Check can't know without the record
		}{
			{"a rule too many", "iptables", "*nat\n-I SHUNT_OUT -j RETURN\nCOMMIT\n", "IPv4: table nat: chain SHUNT_OUT, rule 1: there is `-j RETURN`, there should be `-s 127.0.0.6/32", false},
			{"a rule missing", "ip6tables", "*nat\n-D SHUNT_OUT -d fd97::/16 -j RETURN\nCOMMIT\n", "IPv6: table nat: chain SHUNT_OUT, rule 11: there is `-p tcp -j REDIRECT", false},
			{"a chain emptied", "ip6tables", "*mangle\n-F SHUNT_TPROXY\nCOMMIT\n", "IPv6: table mangle: chain SHUNT_TPROXY, rule 1: there is none", false},
			{"the order changed", "iptables", "*nat\n-D SHUNT_OUT -d 127.0.0.1/32 -j RETURN\n-A SHUNT_OUT -d 127.0.0.1/32 -j RETURN\nCOMMIT\n", "IPv4: table nat: chain SHUNT_OUT, rule 10", false},
			{"a jump doubled", "iptables", "*nat\n-A OUTPUT -p tcp -j SHUNT_OUT\nCOMMIT\n", "jumps to our chains: there is `OUTPUT -p tcp -j SHUNT_OUT`, there should be `PREROUTING", false},
			{"a jump missing", "ip6tables", "*nat\n-D PREROUTING ! -i lo -p tcp -j SHUNT_IN\nCOMMIT\n", "jumps to our chains: there is none, there should be `PREROUTING ! -i lo -p tcp -j SHUNT_IN`", false},
			{"another version's", "iptables", "*nat\n-N SHUNT_OLD\n-N SHUNT_OLDER\n-A SHUNT_OLDER -j SHUNT_OLD\n-A SHUNT_OLD -p tcp -j RETURN\n-I OUTPUT -j SHUNT_OLDER\nCOMMIT\n*filter\n-N SHUNT_GUARD\n-A SHUNT_GUARD -p tcp -m tcp --dport 9 -j DROP\n-A OUTPUT -j SHUNT_GUARD\nCOMMIT\n", "table nat: chain SHUNT_OLD should not be there", false},
			{"others' stay", "iptables", "*filter\n-N OTHER\n-A OUTPUT -p tcp -m tcp --dport 7 -j OTHER\nCOMMIT\n", "", false},
		} {
			for _, record := range []bool{true, false} {
				name := c.name
				if !record {
					name += ", without a record"
				}
				t.Run(name, func(t *testing.T) {
					p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)), mutators...)
					if c.says == "" {
						restore(t, n.opts.Mode, p.Pod, c.program, c.rules)
					}
					whole := save(t, n.opts.Mode, p.Pod)
					if c.says != "" {
						restore(t, n.opts.Mode, p.Pod, c.program, c.rules)
					}
					err := n.Check(t.Context(), p.target)
					if c.says == "" != (err == nil) || err != nil && !strings.Contains(err.Error(), c.says) {
						t.Errorf("check: %v, want %q", err, c.says)
					}
					if !record {
						if err := os.Remove(n.recordPath(p.target.Attachment)); err != nil {
							t.Fatal(err)
						}
					}
					before := n.children.Load()
					if err := n.Apply(t.Context(), p.target, p.policy); err != nil {
						t.Fatalf("apply: %v", err)
					}
					if k := n.children.Load() - before; k > 4 {
						t.Errorf("mending took %d programs", k)
					}
					// Built-in chains of tables that nobody had used stay.
					after := save(t, n.opts.Mode, p.Pod)
					if diff := cmp.Diff(rulesOf(whole), rulesOf(after)); diff != "" {
						t.Errorf("(-before the damage +mended):\n%s", diff)
					}
					if err := n.Check(t.Context(), p.target); err != nil {
						t.Errorf("check after mending: %v", err)
					}
				})
			}
		}
	})
}

// rulesOf leaves out built-in chains and tables without rules.
func rulesOf(saved string) (out []string) {
	table := ""
	for line := range strings.Lines(saved) {
		switch {
		case strings.HasPrefix(line, "*"):
			table = line
		case strings.HasPrefix(line, "-A"), strings.HasPrefix(line, ":SHUNT"):
			out = append(out, strings.TrimSpace(table)+" "+line)
		}
	}
	return out
}

// TestPrivilegedOtherMode: a node's mode changes while a pod lives.
func TestPrivilegedOtherMode(t *testing.T) {
	begin(t)
	for _, m := range []Mode{NFT, Legacy} {
		t.Run("from "+string(m), func(t *testing.T) {
			n := newNode(t, func(o *Options) { o.Mode = m })
			p := n.redirect(t, testbed.NewPod(t))
			later := &node{New(Options{RunDir: n.opts.RunDir, Mode: m.other()})}
			if err := later.Check(t.Context(), p.target); err != nil {
				t.Errorf("check by the other mode: %v", err)
			}
			if err := later.Apply(t.Context(), p.target, p.policy); err != nil {
				t.Fatal(err)
			}
			if left := residueOfRules(t, m, p.Pod); left != "" {
				t.Errorf("left in mode %s:\n%s", m, left)
			}
			if err := later.Check(t.Context(), p.target); err != nil {
				t.Errorf("check: %v", err)
			}
			p.remove(t) // by the old one
			if left := residue(t, m.other(), p.Pod); left != "" {
				t.Errorf("left in mode %s:\n%s", m.other(), left)
			}
		})
	}
}

func residueOfRules(t testing.TB, m Mode, p *testbed.Pod) string {
	t.Helper()
	return strings.Join(rulesOf(save(t, m, p)), "")
}

// TestPrivilegedChange: another policy for the same pod, both modes of
// interception and back.
func TestPrivilegedChange(t *testing.T) {
	begin(t)
	modes(t, func(t *testing.T, n *node) {
		p := testbed.NewPod(t)
		target := targetOf(p)
		for _, mutators := range [][]testbed.PodMutator{
			annotations(interceptionMode, "TPROXY", includeInbound, "*"),
			append(annotations(includeInbound, "80"), testbed.ProxyEnv(dnsCaptureEnv, "true")),
			annotations(interceptionMode, "TPROXY", excludeInterfaces, "net1"),
			nil,
		} {
			policy := evaluate(t, redirect.DefaultConfig(), p, mutators...)
			if err := n.Apply(t.Context(), target, policy); err != nil {
				t.Fatal(err)
			}
			if err := n.Check(t.Context(), target); err != nil {
				t.Error(err)
			}
			got := parse(p.Command(t, "iptables-"+string(n.opts.Mode)+"-save"))
			if d := differences(parse(Render(policy, IPv4)), got); d != "" {
				t.Error(d)
			}
			rule := strings.Contains(p.Command(t, "ip", "rule"), "0x539")
			if tproxy := policy.Mode == redirect.ModeTProxy; rule != tproxy {
				t.Errorf("mode %s: the routing rule is there: %v", policy.Mode, rule)
			}
		}
		if err := n.Remove(t.Context(), target.Attachment); err != nil {
			t.Error(err)
		}
		if left := residue(t, n.opts.Mode, p); left != "" {
			t.Errorf("left behind:\n%s", left)
		}
	})
}

// TestPrivilegedRecords: what records are for.
func TestPrivilegedRecords(t *testing.T) {
	begin(t)
	n := newNode(t)
	w := testbed.NewWorld(t)
	p := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)))
	list, err := n.Attachments(t.Context(), "shunt")
	if err != nil || len(list) != 1 || list[0] != p.target.Attachment {
		t.Errorf("attachments: %v, %v", list, err)
	}
	if list, err := n.Attachments(t.Context(), "other"); err != nil || len(list) != 0 {
		t.Errorf("attachments of another network: %v, %v", list, err)
	}

	// A second interface of the same pod has the same rules.
	second := p.target
	second.IfName = "net1"
	if err := n.Check(t.Context(), second); err == nil {
		t.Error("check passes for an attachment that there is not")
	}
	if err := n.Apply(t.Context(), second, p.policy); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(t.Context(), p.target.Attachment); err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), second); err != nil {
		t.Errorf("the first one took the second one's rules: %v", err)
	}

	// Another namespace at the path of a removed one.
	path := filepath.Join(t.TempDir(), "netns")
	if err := os.Symlink(p.NetnsPath(), path); err != nil {
		t.Fatal(err)
	}
	moved := second
	moved.ContainerID, moved.Netns = "moved", path
	if err := n.Remove(t.Context(), second.Attachment); err != nil {
		t.Fatal(err)
	}
	if err := n.Apply(t.Context(), moved, p.policy); err != nil {
		t.Fatal(err)
	}
	other := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)))
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other.NetnsPath(), path); err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), moved); err == nil {
		t.Error("check passes in a namespace of another pod")
	}
	if err := n.Remove(t.Context(), moved.Attachment); err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), other.target); err != nil {
		t.Errorf("a late removal hit another pod: %v", err)
	}
	// A namespace that is gone.
	gone := n.redirect(t, testbed.NewPod(t, testbed.InWorld(w)))
	gone.Destroy(t)
	before := n.children.Load()
	gone.remove(t)
	if k := n.children.Load() - before; k != 0 {
		t.Errorf("%d programs were run for a namespace that is gone", k)
	}
}
