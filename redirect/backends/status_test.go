// SPDX-License-Identifier: Apache-2.0

//go:build linux

package backends

import (
	"context"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// healthy is an attachment of eBPF's that nothing is wrong with.
func healthy() *loader.Status {
	return &loader.Status{
		Record: &loader.Record{
			ID: loader.ID{ContainerID: "c1", IfName: "eth0"}, Build: "datapath-x", Netns: "/run/netns/x", Cgroup: "/sys/fs/cgroup/podx", Cookie: 7,
			Pod:   loader.PodRef{Namespace: "shop", Name: "reviews"},
			Rules: loader.Rules{InboundPort: 15006, Source4: netip.MustParseAddr("10.0.0.1")},
		},
		Loaded: true, Asked: true, HandshakeLimit: 100,
		Hooks:     []loader.HookStatus{{Name: "connect4", State: loader.HookAttached}},
		Listeners: []loader.Listener{{Addr: at("[::]:15006"), Reached: true, Registered: 1, Serves4: true}},
	}
}

func at(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

func TestProblemsOfEBPF(t *testing.T) {
	counted := func(place bpf.ShuntPlace, errno unix.Errno) loader.ErrorCount {
		return loader.ErrorCount{Cookie: 7, Place: place, Errno: errno, Count: 3}
	}
	none := counted(bpf.ShuntPlacePLACE_LISTENER_NONE, unix.ENOENT)
	mptcp := counted(bpf.ShuntPlacePLACE_LISTENER_REGISTER, unix.EOPNOTSUPP)
	const apply = "shunt apply --netns /run/netns/x --pod FILE"
	for _, tc := range []struct {
		name   string
		damage func(s *loader.Status, node *loader.Survey)
		want   []string // each: name, "text", "remedy", parted by |, of which parts are looked for
	}{
		{"nothing", func(*loader.Status, *loader.Survey) {}, nil},
		{"namespace gone", func(s *loader.Status, _ *loader.Survey) { s.NetnsGone, s.Loaded = true, false }, []string{"stale|/run/netns/x is gone|shunt remove --container-id c1"}},
		{"datapath gone", func(s *loader.Status, _ *loader.Survey) { s.Loaded = false }, []string{"datapath-gone|datapath-x|" + apply}},
		{"being changed", func(s *loader.Status, _ *loader.Survey) { s.Changing, s.Loaded, s.Missing = true, false, []string{"x"} }, nil},
		{"another build", func(s *loader.Status, _ *loader.Survey) { s.OtherBuild = true }, []string{"other-build|datapath-x|delete the pod"}},
		{"another build of the same maps", func(s *loader.Status, _ *loader.Survey) { s.OtherBuild, s.Movable = true, true }, []string{"other-build|datapath-x|shunt upgrade"}},
		{"hooks", func(s *loader.Status, _ *loader.Survey) {
			s.Hooks = append(s.Hooks,
				loader.HookStatus{Name: "a", State: loader.HookMissing, Text: "a is not attached"}, loader.HookStatus{Name: "b", State: loader.HookMissing, Text: "b is not attached"},
				loader.HookStatus{Name: "c", State: loader.HookOther, Text: "c is another"}, loader.HookStatus{Name: "d", State: loader.HookExtra, Text: "d is there twice"},
				loader.HookStatus{Name: "e", State: loader.HookUnknown, Text: "e could not be told"})
		}, []string{"hook-missing|a is not attached; b is not attached|" + apply, "hook-other|c is another; d is there twice|" + apply, "hook-unknown|e could not be told|as root"}},
		{"cgroup made anew", func(s *loader.Status, _ *loader.Survey) {
			s.CgroupGone, s.Hooks[0].State = true, loader.HookMissing
		}, []string{"cgroup-gone|/sys/fs/cgroup/podx is gone|" + apply}},
		{"entries", func(s *loader.Status, _ *loader.Survey) { s.Missing = []string{"the pod's state is missing"} }, []string{"entries-differ|the pod's state is missing|" + apply}},
		{"an MPTCP listener", func(s *loader.Status, _ *loader.Survey) {
			s.Listeners = []loader.Listener{{Addr: at("[::]:15006"), MPTCP: true, Reached: true, Others: 1}}
			s.Errors = []loader.ErrorCount{mptcp, none}
		}, []string{"listener-refused|[::]:15006 by Multipath TCP|shunt.dev/inbound-hook: tc"}},
		{"an MPTCP listener, nobody could be asked", func(s *loader.Status, _ *loader.Survey) {
			s.Listeners, s.Asked, s.Errors = nil, false, []loader.ErrorCount{mptcp, none}
		}, []string{"listener-refused|port 15006 by Multipath TCP|shunt.dev/inbound-hook: tc"}},
		{"an MPTCP listener, once, and another now", func(s *loader.Status, _ *loader.Survey) { s.Errors = []loader.ErrorCount{mptcp} }, nil},
		{"an MPTCP listener, under TC", func(s *loader.Status, _ *loader.Survey) {
			s.InboundHook, s.Listeners = loader.TC, []loader.Listener{{Addr: at("[::]:15006"), MPTCP: true, Reached: true, Others: 1}}
			s.Errors = []loader.ErrorCount{none}
		}, nil},
		{"a listener that is not registered", func(s *loader.Status, _ *loader.Survey) {
			s.Listeners[0].Registered, s.Listeners[0].Others = 0, 1
		}, []string{"listener-refused|[::]:15006 is not registered, it was open before|" + apply}},
		{"one that could not be", func(s *loader.Status, _ *loader.Survey) {
			s.Listeners[0].Registered, s.Listeners[0].Others = 0, 1
			s.Errors = []loader.ErrorCount{counted(bpf.ShuntPlacePLACE_LISTENER_REGISTER, unix.E2BIG)}
		}, []string{"listener-refused|argument list too long|" + apply}},
		{"others of its group are", func(s *loader.Status, _ *loader.Survey) { s.Listeners[0].Others = 40 }, nil},
		{"nobody listens, nobody came", func(s *loader.Status, _ *loader.Survey) { s.Listeners = nil }, nil},
		{"nobody listens", func(s *loader.Status, _ *loader.Survey) { s.Listeners, s.Errors = nil, []loader.ErrorCount{none} }, []string{"no-listener|15006: 3 connections were refused|kubectl logs -n shop reviews"}},
		{"nobody listens, under TC", func(s *loader.Status, _ *loader.Survey) {
			s.InboundHook, s.Listeners, s.Errors = loader.TC, nil, []loader.ErrorCount{none}
		}, []string{"no-listener|15006: 3 connections were refused|kubectl"}},
		{"under TC, nobody could be asked", func(s *loader.Status, _ *loader.Survey) {
			s.InboundHook, s.Asked, s.Listeners, s.Errors = loader.TC, false, nil, []loader.ErrorCount{none}
		}, nil},
		{"at loopback", func(s *loader.Status, _ *loader.Survey) {
			s.Listeners, s.Errors = []loader.Listener{{Addr: at("127.0.0.1:15006"), Others: 1}}, []loader.ErrorCount{none}
		}, []string{"no-listener|listens at 127.0.0.1:15006, which|have the proxy listen at the wildcard"}},
		{"somebody listens by now", func(s *loader.Status, _ *loader.Survey) { s.Errors = []loader.ErrorCount{none} }, nil},
		{"room", func(s *loader.Status, _ *loader.Survey) { s.Handshakes = 74 }, nil},
		{"little room", func(s *loader.Status, _ *loader.Survey) { s.Handshakes = 75 }, []string{"handshakes|75 handshakes with its proxy are under way; with 100|kubectl logs"}},
		{"little room on the node", func(s *loader.Status, node *loader.Survey) {
			s.Handshakes, node.Handshakes, node.HandshakesMax = 5, 300, 400
		}, []string{"handshakes|300 handshakes of this node's pods with their proxies are under way, 5 of them this pod's|begin with"}},
		{"little room, by others", func(s *loader.Status, node *loader.Survey) { node.Handshakes, node.HandshakesMax = 300, 400 }, nil},
		{"outside of the cgroup", func(s *loader.Status, _ *loader.Survey) { s.Outside = []loader.Process{{PID: 17, Name: "curl"}} }, []string{"outside-cgroup|process 17 (curl) is in its network namespace but not in its cgroup|datapath: iptables"}},
		{"many outside", func(s *loader.Status, _ *loader.Survey) {
			for i := range 6 {
				s.Outside = append(s.Outside, loader.Process{PID: i, Name: "x"})
			}
		}, []string{"outside-cgroup|process 3 (x), 2 more are in its|datapath: iptables"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, node := healthy(), new(loader.Survey)
			tc.damage(s, node)
			got := problemsOfEBPF(s, node)
			if len(got) != len(tc.want) {
				t.Fatalf("got %+v, want %q", got, tc.want)
			}
			for i, want := range tc.want {
				parts := strings.Split(want, "|")
				if got[i].Name != parts[0] || !strings.Contains(got[i].Text, parts[1]) || !strings.Contains(got[i].Remedy, parts[2]) {
					t.Errorf("got %+v, want %q", got[i], want)
				}
			}
		})
	}
}

// TestJoin: attachments of both backends make one list, and what is counted in a
// network namespace counts once.
func TestJoin(t *testing.T) {
	one, twin, second := healthy(), healthy(), healthy()
	one.Flows[redirect.RuleOutIncludeCIDR], one.Flows[redirect.RuleInInclude] = 4, 2
	one.Errors = []loader.ErrorCount{
		{Cookie: 7, Place: bpf.ShuntPlacePLACE_CONNECT_ROOM, Errno: unix.EAGAIN, Count: 2},
		{Cookie: 7, Place: bpf.ShuntPlacePLACE_CONNECT_ROOM, Errno: unix.EAGAIN, Count: 3},
		{Cookie: 7, Place: 99, Errno: 9999, Count: 1},
	}
	twin.Record = &loader.Record{ID: loader.ID{ContainerID: "c2", IfName: "eth0"}, Cookie: 7, Pod: one.Pod, InboundHook: loader.TC}
	twin.Flows = one.Flows
	second.Record = &loader.Record{ID: loader.ID{ContainerID: "c3", IfName: "eth0"}, Cookie: 8, Pod: loader.PodRef{Namespace: "a", Name: "z"}}
	rule := func(id string, cookie uint64, wrong ...string) iptables.Status {
		r := new(iptables.Record)
		r.Attachment, r.Netns, r.Cookie = redirect.Attachment{ContainerID: id, IfName: "eth0"}, "/run/netns/"+id, cookie
		return iptables.Status{
			Record: r, Wrong: wrong, Counted: true, Flows: map[redirect.Rule]uint64{redirect.RuleInDefault: 5},
			Chains: []iptables.Chain{{Family: iptables.IPv4, Table: "nat", Name: "SHUNT_OUT", State: loader.HookMissing}},
		}
	}
	gone := rule("c5", 10)
	gone.Gone, gone.Chains, gone.Flows = true, nil, nil
	list := join(&loader.Survey{Attachments: []loader.Status{*one, *twin, *second}}, []iptables.Status{rule("c3", 8), rule("c4", 9, "x", "y"), gone})
	var got []string
	for _, s := range list {
		line := fmt.Sprintf("%s/%s %s %s %s hooks %d flows %v errors %d", s.Pod.Namespace, s.Pod.Name, s.ContainerID, s.Datapath, s.Hook, len(s.Hooks), s.Flows, len(s.Errors))
		for _, p := range s.Problems {
			line += " " + p.Name + ": " + p.Text
		}
		got = append(got, line)
	}
	want := []string{
		"/ c4 iptables  hooks 1 flows [{inbound in-default 5}] errors 0 rules-differ: its rules are not what they should be: x; y",
		"/ c5 iptables  hooks 0 flows [] errors 0 stale: its network namespace /run/netns/c5 is gone; what is left of the attachment waits for the runtime's DEL or GC",
		"a/z c3 ebpf sk_lookup hooks 2 flows [{inbound in-default 5}] errors 0 both-datapaths: both eBPF and iptables have a record of it: a change from one to the other did not come to its end",
		"shop/reviews c1 ebpf sk_lookup hooks 1 flows [{outbound out-include-cidr 4} {inbound in-include 2}] errors 2",
		"shop/reviews c2 ebpf tc hooks 1 flows [] errors 0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]ErrorCount{
		{Program: "any", Error: "place-99 errno-9999", Count: 1, Text: "place 99"},
		{Program: "connect", Error: "room EAGAIN", Count: 5, Text: "too many handshakes with the proxy under way: connect denied"},
	}, list[3].Errors); diff != "" {
		t.Error(diff)
	}
}

// count gives what a status has counted, by rule.
func count(s Status) map[string]uint64 {
	m := map[string]uint64{}
	for _, f := range s.Flows {
		m[f.Rule] = f.Count
	}
	return m
}

// problems names what is wrong.
func problems(s Status) string {
	var names []string
	for _, p := range s.Problems {
		names = append(names, p.Name)
	}
	return strings.Join(names, ",")
}

// TestPrivilegedStatus: on each backend and each hook, what is told is what is
// so.
func TestPrivilegedStatus(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	w := testbed.NewWorld(t)
	w.ServeAll(t)
	for _, tc := range []struct {
		name   string
		choice redirect.Choice
		hooks  int
	}{
		{"sk_lookup", chosen(redirect.EBPF), 8},
		{"tc", redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookTC}, 9},
		{"iptables", chosen(redirect.Iptables), 4},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := testbed.NewPod(t, testbed.InWorld(w))
			b, target, policy := node(t, p, testbed.Annotate("traffic.sidecar.istio.io/excludeOutboundPorts", "3306"))
			target.Pod = redirect.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID}
			every := func(redirect.PodRef) bool { return true }
			for _, err := range []error{func() error { _, err := b.Status(t.Context()); return err }(), func() error { _, err := b.Inspect(t.Context(), every); return err }()} {
				if err != nil {
					t.Errorf("nothing is there: %v", err)
				}
			}
			if _, err := b.Apply(t.Context(), target, policy, tc.choice); err != nil {
				t.Fatal(err)
			}
			status := func(inspect bool) Status {
				t.Helper()
				list, err := b.Status(t.Context())
				if inspect {
					list, err = b.Inspect(t.Context(), every)
				}
				if err != nil || len(list) != 1 {
					t.Fatalf("%+v, %v", list, err)
				}
				return list[0]
			}
			p.StartProxy(t, testbed.ProxyUID, testbed.ProxyGID)
			app := p.StartApp(t, 8080, 9090)
			for _, dst := range []string{"10.99.3.4:80", "[fd99::3]:443", "10.99.3.4:81", "10.99.3.4:3306", "127.0.0.1:8080"} {
				if r := app.Dial(t, dst); r.Errno != "" {
					t.Errorf("to %s: %+v", dst, r)
				}
			}
			for _, port := range []uint16{8080, 8080, 9090} {
				if r := w.Dial(t, netip.AddrPortFrom(p.Addr4(), port).String()); r.Errno != "" {
					t.Errorf("inbound: %+v", r)
				}
			}
			for _, inspect := range []bool{false, true} {
				s := status(inspect)
				if s.Attachment != target.Attachment || s.Pod != target.Pod || s.Network != "test" || s.Netns != p.NetnsPath() || s.Datapath != tc.choice.Datapath ||
					len(s.Hooks) != tc.hooks || len(s.Problems)+len(s.Errors) > 0 {
					t.Errorf("inspect %v: %+v", inspect, s)
				}
				if s.Datapath == redirect.EBPF && (s.Hook != tc.choice.Hook || len(s.Listeners) != 1 || s.Listeners[0].Registered != 1 || len(s.Listeners[0].Serves) != 2) {
					t.Errorf("inspect %v: %s, %+v", inspect, s.Hook, s.Listeners)
				}
				if s.Counted != (inspect || s.Datapath == redirect.EBPF) {
					t.Errorf("inspect %v: counted %v", inspect, s.Counted)
				} else if want := map[string]uint64{
					"out-include-cidr": 3, "out-exclude-port": 1, "out-local": 1, "in-include": 2, "in-default": 1,
				}; s.Counted && cmp.Diff(want, count(s)) != "" {
					t.Errorf("inspect %v: flows (-want +got):\n%s", inspect, cmp.Diff(want, count(s)))
				}
			}
			if list, err := b.Inspect(t.Context(), func(r redirect.PodRef) bool { return r.Name == "another" }); err != nil || len(list) != 0 {
				t.Errorf("another pod: %+v, %v", list, err)
			}

			// Both, as of a change that did not come to its end.
			other, choice := b.iptables, redirect.Iptables
			if tc.choice.Datapath == redirect.Iptables {
				other, choice = b.ebpf, redirect.EBPF
			}
			if err := other.Apply(t.Context(), target, policy); err != nil {
				t.Fatal(err)
			}
			if s := status(true); problems(s) != "both-datapaths" {
				t.Errorf("both: %+v", s.Problems)
			}
			if _, err := b.Apply(t.Context(), target, policy, chosen(choice)); err != nil {
				t.Fatal(err)
			}
			if s := status(true); problems(s) != "" || s.Datapath != choice {
				t.Errorf("mended: %s %+v", s.Datapath, s.Problems)
			}
			app.Stop(t)
		})
	}
}

// TestPrivilegedStatusListener: a listener by Multipath TCP is told with its
// remedy where sk_lookup can't serve it, and not where TC does; and so is a proxy
// that does not listen.
func TestPrivilegedStatusListener(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, hook := range []redirect.Hook{redirect.HookSkLookup, redirect.HookTC} {
		p := testbed.NewPod(t)
		b, target, policy := node(t, p)
		choice := redirect.Choice{Datapath: redirect.EBPF, Hook: hook}
		if _, err := b.Apply(t.Context(), target, policy, choice); err != nil {
			t.Fatal(err)
		}
		expect := func(when, want, text, remedy string) {
			t.Helper()
			for _, ask := range []func() ([]Status, error){
				func() ([]Status, error) { return b.Status(t.Context()) },
				func() ([]Status, error) {
					return b.Inspect(t.Context(), func(redirect.PodRef) bool { return true })
				},
			} {
				list, err := ask()
				if err != nil || len(list) != 1 {
					t.Fatalf("%+v, %v", list, err)
				}
				s := list[0]
				if problems(s) != want || want != "" && (!strings.Contains(s.Problems[0].Text, text) || !strings.Contains(s.Problems[0].Remedy, remedy)) {
					t.Errorf("%s, %s: %+v, want %q", hook, when, s.Problems, want)
				}
			}
		}
		dst := netip.AddrPortFrom(p.Addr4(), 8080).String()
		expect("before anybody comes", "", "", "")
		if r := p.World.Dial(t, dst); r.Errno != "ECONNREFUSED" {
			t.Errorf("%+v", r)
		}
		expect("nobody listens", ProblemNoListener, "15006: 1 connections were refused", "have the proxy listen at the wildcard")

		proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		proxy.Listen(t, testbed.ListenSpec{Name: "in", Addr: in(netip.IPv6Unspecified()), MPTCP: true})
		if r := p.World.Dial(t, dst); (r.Listener() == "in") != (hook == redirect.HookTC) {
			t.Errorf("%s: %+v", hook, r)
		}
		if hook == redirect.HookTC {
			expect("MPTCP", "", "", "")
		} else {
			expect("MPTCP", ProblemListener, "[::]:15006 by Multipath TCP", "shunt.dev/inbound-hook: tc, and run `shunt apply --netns "+p.NetnsPath())
			// The remedy is one.
			if _, err := b.Apply(t.Context(), target, policy, redirect.Choice{Datapath: redirect.EBPF, Hook: redirect.HookTC}); err != nil {
				t.Fatal(err)
			}
			if r := p.World.Dial(t, dst); r.Listener() != "in" {
				t.Errorf("after the remedy: %+v", r)
			}
			expect("after the remedy", "", "", "")
		}
		errs, err := b.Errors(t.Context())
		if err != nil || len(errs) == 0 || errs[0].Program != "inbound" || errs[0].Error != "listener-none ENOENT" {
			t.Errorf("the node's errors: %+v, %v", errs, err)
		}
		proxy.Stop(t)
	}
}

// TestPrivilegedStatusStale: a pod that is gone waits for its DEL; reading writes
// nothing.
func TestPrivilegedStatusStale(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, d := range []redirect.Datapath{redirect.EBPF, redirect.Iptables} {
		p := testbed.NewPod(t)
		b, target, policy := node(t, p)
		if _, err := b.Apply(t.Context(), target, policy, chosen(d)); err != nil {
			t.Fatal(err)
		}
		p.Destroy(t)
		var before []string
		list := func() (files []string) {
			for _, dir := range []string{b.node.RunDir, b.node.BPFDir} {
				err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
					if err != nil {
						return err
					}
					st, err := e.Info()
					if err == nil {
						files = append(files, path+" "+st.ModTime().String())
					}
					return err
				})
				if err != nil && d == redirect.EBPF {
					t.Fatal(err)
				}
			}
			return files
		}
		before = list()
		testbed.Eventually(t, "it is told to be stale", func() bool {
			all, err := b.Status(t.Context())
			if err != nil || len(all) != 1 {
				t.Fatalf("%+v, %v", all, err)
			}
			return problems(all[0]) == ProblemStale
		})
		if diff := cmp.Diff(before, list()); diff != "" {
			t.Errorf("%s: looking has changed:\n%s", d, diff)
		}
		if err := b.Remove(t.Context(), target.Attachment); err != nil {
			t.Error(err)
		}
		if all, err := b.Status(t.Context()); err != nil || len(all) != 0 {
			t.Errorf("removed: %+v, %v", all, err)
		}
	}
}

// TestSettled: a change between the backends that is under way is no problem, one
// that stays so is.
func TestSettled(t *testing.T) {
	between := []Status{{Problems: []Problem{{Name: ProblemBoth}}}}
	after := []Status{{Problems: []Problem{{Name: ProblemNoListener}}}}
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		look := func(until int) func() ([]Status, error) {
			looks = 0
			return func() ([]Status, error) {
				if looks++; looks > until {
					return after, nil
				}
				return between, nil
			}
		}
		for _, c := range []struct{ until, looks int }{{0, 1}, {1, 2}, {changeLooks, changeLooks}} {
			start := time.Now()
			want := after
			if c.until == changeLooks {
				want = between
			}
			got, err := settled(t.Context(), look(c.until))
			if diff := cmp.Diff(want, got); diff != "" || err != nil || looks != c.looks || time.Since(start) > changeTime {
				t.Errorf("over after %d looks: %d looks in %v, %v (-want +got):\n%s", c.until, looks, time.Since(start), err, diff)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if got, _ := settled(ctx, look(changeLooks)); looks > 2 || len(got) != 1 {
			t.Errorf("in spite of the end: %d looks, %v", looks, got)
		}
	})
}
