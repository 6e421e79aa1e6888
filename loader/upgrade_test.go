// SPDX-License-Identifier: Apache-2.0

//go:build linux

package loader

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	cebpf "github.com/cilium/ebpf"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader/programs"
)

// another gives the options of another build on the same node: the same programs,
// under another name, unless change says otherwise.
func another(opts Options, name string, change func(*build)) Options {
	b := opts.build()
	b.dir = datapathPrefix + name
	if change != nil {
		change(&b)
	}
	opts.otherBuild = &b
	return opts
}

// otherwise gives a build in which something of a name is laid out otherwise.
func otherwise(name string) func(*build) {
	return func(b *build) {
		was := name + "=" + parseLayout(b.layout)[name]
		if !strings.Contains(b.layout, was) {
			panic("no such name in the layout: " + name)
		}
		b.layout = strings.Replace(b.layout, was, name+"=otherwise", 1)
	}
}

// mustUpgrade has every pod of the node go to a build.
func mustUpgrade(t testing.TB, opts Options, moved int) {
	t.Helper()
	got, err := Upgrade(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Moved) != moved || len(got.Kept) != 0 {
		t.Fatalf("upgrade to %s: %+v, want %d moved", opts.build().dir, got, moved)
	}
}

// datapaths lists what is loaded.
func datapaths(t testing.TB, opts Options) (names []string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(opts.BPFDir, "*-*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range paths {
		names = append(names, filepath.Base(p))
	}
	return names
}

// programsOf gives the ids of the programs that are pinned in a datapath's folder,
// by name.
func programsOf(t testing.TB, opts Options) map[string]uint32 {
	t.Helper()
	d := newDatapath(opts)
	defer d.closeFDs()
	ids := map[string]uint32{}
	for _, h := range slices.Concat(hooks, dnsHooks, []hook{{program: bpf.ShuntProgShuntSkLookup}, {program: bpf.ShuntProgShuntTc}}) {
		f, err := d.object(h.program)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		pi, err := info[progInfo](f)
		if err != nil {
			t.Fatal(err)
		}
		ids[h.program] = pi.id
	}
	return ids
}

// runs fails the test unless the pod's hooks run the programs of a build, each once.
func runs(t testing.TB, opts Options, p *testbed.Pod, dns bool) {
	t.Helper()
	want := programsOf(t, opts)
	cgroup, _, err := openCgroup(p.CgroupPath())
	if err != nil {
		t.Fatal(err)
	}
	defer cgroup.close()
	all := hooks
	if dns {
		all = slices.Concat(hooks, dnsHooks)
	}
	for _, h := range all {
		got, err := query(cgroup, h.attach)
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(got, []uint32{want[h.program]}) {
			t.Errorf("%v runs programs %v, want %d of %s", h.attach, got, want[h.program], opts.build().dir)
		}
	}
	ns, err := OpenNetns(p.NetnsPath())
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	// A link whose pin another has replaced goes when the kernel comes to it.
	testbed.Eventually(t, "sk_lookup runs a stamp, and then the build's own program", func() bool {
		got, err := query(ns.fd, attachSkLookup)
		return err == nil && len(got) == 2 && got[1] == want[bpf.ShuntProgShuntSkLookup]
	})
}

// What needs what is said of the layout, and of the flags, is in it.
func TestLayout(t *testing.T) {
	own := parseLayout(bpf.Layout)
	for _, name := range append(slices.Clone(needed), stampLayout, "meaning") {
		if own[name] == "" {
			t.Errorf("the layout %q does not say how %s is", bpf.Layout, name)
		}
	}
	if flags := bpf.ShuntPodFlagPOD_OUT_ALL | bpf.ShuntPodFlagPOD_EXCLUDE_IF | bpf.ShuntPodFlagPOD_IN_TC; flags&^bpf.PodFlags != 0 {
		t.Errorf("flags %#x are not all among the known, %#x", uint32(flags), uint32(bpf.PodFlags))
	}
	for _, c := range []struct {
		name, a, b string
		want       bool
	}{
		{"the same", bpf.Layout, bpf.Layout, true},
		{"one that says nothing", bpf.Layout, "", false},
		{"another meaning", "meaning=1 pods=a", "meaning=2 pods=a", false},
		{"a map differs", "meaning=1 pods=a dests=b", "meaning=1 pods=a dests=c", false},
		{"one that is not needed differs", "meaning=1 pods=a errors=b", "meaning=1 pods=a errors=c", true},
		{"the stamp differs", "meaning=1 pods=a shunt_stamp=b", "meaning=1 pods=a shunt_stamp=c", true},
		{"one more", "meaning=1 pods=a", "meaning=1 pods=a sockets=b", true},
	} {
		a, b := parseLayout(c.a), parseLayout(c.b)
		if a.like(b) != c.want || b.like(a) != c.want {
			t.Errorf("%s: like: %v, %v; want %v", c.name, a.like(b), b.like(a), c.want)
		}
	}
}

// A pod goes to another build and back, with all it has, and nothing else changes.
func TestPrivilegedUpgrade(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	dns := func(r *Rules) { r.Flags |= bpf.ShuntPodFlagPOD_DNS }
	for _, c := range []struct {
		name   string
		hook   InboundHook
		noTCX  bool
		rules  func(*Rules)
		change func(*build)
	}{
		{name: "sk_lookup"},
		{name: "DNS capture", rules: dns},
		{name: "TPROXY mode", rules: func(r *Rules) { r.Flags |= bpf.ShuntPodFlagPOD_TPROXY }},
		{name: "TCX", hook: TC},
		{name: "TC filter", hook: TC, noTCX: true},
		{name: "another stamp", change: otherwise(stampLayout), rules: dns},
		{name: "another map of errors", change: otherwise(bpf.ShuntMapErrors)},
	} {
		t.Run(c.name, func(t *testing.T) {
			opts, p := node(t), testbed.NewPod(t)
			opts.NoTCX = c.noTCX
			rules := testRules(p)
			if c.rules != nil {
				c.rules(&rules)
			}
			if err := attachWith(t.Context(), opts, p, rules, c.hook); err != nil {
				t.Fatal(err)
			}
			was, err := newDatapath(opts).readRecord(podID(p))
			if err != nil {
				t.Fatal(err)
			}
			next := another(opts, "next", c.change)
			for i, to := range []Options{next, opts, next} {
				mustUpgrade(t, to, 1)
				runs(t, to, p, rules.Flags&bpf.ShuntPodFlagPOD_DNS != 0)
				if err := Check(t.Context(), to, podID(p)); err != nil {
					t.Errorf("step %d: %v", i, err)
				}
				if got := datapaths(t, to); !slices.Equal(got, []string{to.build().dir}) {
					t.Errorf("step %d: %v are loaded, want %s alone", i, got, to.build().dir)
				}
				r, err := newDatapath(to).readRecord(podID(p))
				if err != nil {
					t.Fatal(err)
				}
				want := *was
				want.Build = to.build().dir
				if diff := cmp.Diff(want.encode(), r.encode()); diff != "" {
					t.Errorf("step %d: the record (-want +got):\n%s", i, diff)
				}
				mustUpgrade(t, to, 0)
			}
			// Its programs and slots are used again.
			mustRemove(t, next, p)
			nothingLeft(t, next)
			mustAttach(t, next, p, rules)
			mustRemove(t, next, p)
			nothingLeft(t, next)
		})
	}
}

func attachWith(ctx context.Context, opts Options, p *testbed.Pod, rules Rules, hook InboundHook) error {
	ns, err := OpenNetns(p.NetnsPath())
	if err != nil {
		return err
	}
	defer ns.Close()
	d, err := Open(ctx, opts)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Attach(Target{ID: podID(p), Network: "test", Netns: ns, Cgroup: p.CgroupPath(), InboundHook: hook}, rules)
}

// An ADD that is repeated, or another attachment of the same network namespace, by
// another build takes the pod along.
func TestPrivilegedAttachByAnotherBuild(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	next := another(opts, "next", otherwise(stampLayout))
	rules := testRules(p)
	rules.UID = 4321
	mustAttach(t, next, p, rules)
	runs(t, next, p, false)
	second := *p
	second.ContainerID = "second"
	mustAttach(t, opts, &second, rules)
	runs(t, opts, p, false)
	mustUpgrade(t, next, 1)
	runs(t, next, p, false)
	mustRemove(t, opts, p)
	if err := Check(t.Context(), next, podID(&second)); err != nil {
		t.Error(err)
	}
	mustRemove(t, opts, &second)
	nothingLeft(t, opts)
}

// Pods of a build whose maps are laid out otherwise keep its programs until they end;
// new ones get this one's.
func TestPrivilegedUpgradeOtherLayout(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, name := range append(slices.Clone(needed), "meaning") {
		t.Run(name, func(t *testing.T) {
			opts, w := node(t), testbed.NewWorld(t)
			old, fresh := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
			mustAttach(t, opts, old, testRules(old))
			next := another(opts, "next", otherwise(name))
			kept := func() {
				t.Helper()
				got, err := Upgrade(t.Context(), next)
				if err != nil || len(got.Moved) != 0 || len(got.Kept) != 1 || !errors.Is(got.Kept[0].Why, ErrOtherBuild) {
					t.Fatalf("upgrade: %+v, %v; want one pod that is kept", got, err)
				}
				runs(t, opts, old, false)
				for _, o := range []Options{opts, next} {
					if err := Check(t.Context(), o, podID(old)); err != nil {
						t.Error(err)
					}
				}
			}
			kept()
			mustAttach(t, next, fresh, testRules(fresh))
			runs(t, next, fresh, false)
			kept()
			// Nobody can write its maps; what is there stays.
			if err := attach(t.Context(), next, old, testRules(old)); !errors.Is(err, ErrOtherBuild) {
				t.Errorf("attach again: %v, want %v", err, ErrOtherBuild)
			}
			second := *old
			second.ContainerID = "second"
			if err := attach(t.Context(), next, &second, testRules(old)); !errors.Is(err, ErrOtherBuild) {
				t.Errorf("a second attachment: %v, want %v", err, ErrOtherBuild)
			}
			kept()
			if got := datapaths(t, next); len(got) != 2 {
				t.Errorf("%v are loaded, want both", got)
			}
			mustRemove(t, next, old)
			if _, err := Sweep(t.Context(), next); err != nil {
				t.Error(err)
			}
			if got := datapaths(t, next); !slices.Equal(got, []string{next.build().dir}) {
				t.Errorf("%v are loaded, want %s alone", got, next.build().dir)
			}
			mustRemove(t, next, fresh)
			nothingLeft(t, next)
		})
	}
}

// A datapath of which a map is gone, by whatever hand, has no heir: its pods keep their
// programs, which have the map still, and others get new ones.
func TestPrivilegedUpgradeOfHalf(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, name := range needed {
		t.Run(name, func(t *testing.T) {
			opts, w := node(t), testbed.NewWorld(t)
			old, fresh := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
			mustAttach(t, opts, old, testRules(old))
			if err := os.Remove(filepath.Join(newDatapath(opts).dir, name)); err != nil {
				t.Fatal(err)
			}
			next := another(opts, "next", nil)
			got, err := Upgrade(t.Context(), next)
			if err != nil || len(got.Moved) != 0 || len(got.Kept) != 1 || !errors.Is(got.Kept[0].Why, ErrOtherBuild) {
				t.Fatalf("upgrade: %+v, %v; want one pod that is kept", got, err)
			}
			runs(t, opts, old, false)
			mustAttach(t, next, fresh, testRules(fresh))
			mustRemove(t, next, fresh)
		})
	}
}

// A map that can't be opened is an error, and neither a reason to end nor to go on
// without it.
func TestPrivilegedInheritFails(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	pin, away := filepath.Join(newDatapath(opts).dir, bpf.ShuntMapErrors), filepath.Join(newDatapath(opts).dir, "away")
	if err := errors.Join(os.Rename(pin, away), os.Mkdir(pin, 0o700)); err != nil {
		t.Fatal(err)
	}
	next := another(opts, "next", nil)
	if got, err := Upgrade(t.Context(), next); err == nil {
		t.Errorf("upgrade: %+v, want an error of %s", got, pin)
	}
	if got := datapaths(t, opts); !slices.Equal(got, []string{opts.build().dir}) {
		t.Errorf("%v are loaded, want %s alone", got, opts.build().dir)
	}
	runs(t, opts, p, false)
	if err := errors.Join(os.Remove(pin), os.Rename(away, pin)); err != nil {
		t.Fatal(err)
	}
	mustUpgrade(t, next, 1)
	mustRemove(t, next, p)
	nothingLeft(t, next)
}

// Two sandboxes of a pod share its cgroup's links, of two builds whose maps differ: the
// links are those of the later, and no move of the earlier takes them away from it.
func TestPrivilegedUpgradeSharedCgroup(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, dead := range []bool{true, false} {
		t.Run(fmt.Sprintf("the earlier one is gone: %v", dead), func(t *testing.T) {
			opts, w := node(t), testbed.NewWorld(t)
			first, second, twin := another(opts, "first", nil), another(opts, "second", otherwise(bpf.ShuntMapPods)), another(opts, "twin", otherwise(stampLayout))
			old := testbed.NewPod(t, testbed.InWorld(w))
			mustAttach(t, first, old, testRules(old))
			netns, _ := linksOf(t, first, old)
			if dead {
				old.Destroy(t)
				testbed.Eventually(t, "the namespace is gone", func() bool { end, err := ends(netns); return err == nil && end == gone })
			}
			now := testbed.NewPod(t, testbed.SandboxOf(old))
			mustAttach(t, second, now, testRules(now))
			got, err := Upgrade(t.Context(), twin)
			if err != nil {
				t.Fatal(err)
			}
			moved, kept := []ID(nil), []ID{podID(now), podID(old)}
			if dead {
				moved, kept = []ID{podID(old)}, kept[:1]
			}
			if !slices.Equal(got.Moved, moved) {
				t.Errorf("moved: %v, want %v", got.Moved, moved)
			}
			for _, id := range kept {
				if !slices.ContainsFunc(got.Kept, func(k Kept) bool { return k.ID == id && errors.Is(k.Why, ErrOtherBuild) }) {
					t.Errorf("kept: %+v, want %v among them", got.Kept, id)
				}
			}
			runs(t, second, now, false)
			if err := Check(t.Context(), second, podID(now)); err != nil {
				t.Error(err)
			}
			mustRemove(t, twin, old)
			runs(t, second, now, false)
			mustRemove(t, twin, now)
			nothingLeft(t, twin)
		})
	}
}

// Two attachments of one network namespace share all links: if one of them has what
// this build has not, both keep their programs.
func TestPrivilegedUpgradeSharedNetns(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	second, rules := *p, testRules(p)
	second.ContainerID = "second"
	rules.Flags |= bpf.ShuntPodFlagPOD_DNS
	mustAttach(t, opts, &second, rules)
	fewer := another(opts, "fewer", func(b *build) { b.flags &^= bpf.ShuntPodFlagPOD_DNS })
	got, err := Upgrade(t.Context(), fewer)
	if err != nil || len(got.Moved) != 0 || len(got.Kept) != 2 {
		t.Errorf("upgrade: %+v, %v; want two attachments that are kept", got, err)
	}
	runs(t, opts, p, true)
	mustRemove(t, opts, &second)
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// A later build may have flags and programs that this one has not: there and back.
func TestPrivilegedUpgradeOfFewer(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	rules := testRules(p)
	rules.Flags |= bpf.ShuntPodFlagPOD_DNS
	mustAttach(t, opts, p, rules)
	t.Run("a flag", func(t *testing.T) {
		fewer := another(opts, "fewer", func(b *build) { b.flags &^= bpf.ShuntPodFlagPOD_DNS })
		got, err := Upgrade(t.Context(), fewer)
		if err != nil || len(got.Kept) != 1 || !errors.Is(got.Kept[0].Why, ErrOtherBuild) {
			t.Errorf("upgrade: %+v, %v; want one pod that is kept", got, err)
		}
		runs(t, opts, p, true)
	})
	next := another(opts, "next", nil)
	t.Run("a program more", func(t *testing.T) {
		name := bpf.ShuntProgShuntRecvmsg4
		r, err := newDatapath(opts).readRecord(podID(p))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{filepath.Join(newDatapath(opts).dir, name), filepath.Join(newDatapath(opts).cgroupLinks(r.CgroupID), name)} {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
		testbed.Eventually(t, "the program to be off", func() bool { return attached(t, p, attachUDP4Recvmsg) == 0 })
		mustUpgrade(t, next, 1)
		runs(t, next, p, true)
	})
	t.Run("a program less", func(t *testing.T) {
		d := newDatapath(next)
		defer d.closeFDs()
		cgroup, id, err := openCgroup(p.CgroupPath())
		if err != nil {
			t.Fatal(err)
		}
		defer cgroup.close()
		prog, err := d.object(bpf.ShuntProgShuntGetsockopt)
		if err != nil {
			t.Fatal(err)
		}
		l, err := createLink(prog, cgroup, attachGetsockopt)
		if err != nil {
			t.Fatal(err)
		}
		defer l.close()
		if err := l.pin(filepath.Join(d.cgroupLinks(id), "shunt_later")); err != nil {
			t.Fatal(err)
		}
		mustUpgrade(t, opts, 1)
		runs(t, opts, p, true)
	})
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// The maps of another build may have larger entries than this one's: what they say is not
// told, and nothing else is lost for that.
func TestPrivilegedLargerMaps(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	for name, spec := range map[string]*cebpf.MapSpec{
		bpf.ShuntMapSlots:  {Type: cebpf.Array, KeySize: 4, ValueSize: 64, MaxEntries: 32},
		bpf.ShuntMapErrors: {Type: cebpf.LRUHash, KeySize: 24, ValueSize: 16, MaxEntries: 32},
	} {
		m, err := cebpf.NewMap(spec)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if spec.Type == cebpf.LRUHash {
			if err := m.Put(make([]byte, spec.KeySize), make([]byte, spec.ValueSize)); err != nil {
				t.Fatal(err)
			}
		}
		pin := filepath.Join(newDatapath(opts).dir, name)
		if err := errors.Join(os.Remove(pin), m.Pin(pin)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := Errors(opts); len(got) > 0 || err != nil {
		t.Errorf("errors: %v, %v; want none that can be told", got, err)
	}
	d := newDatapath(opts)
	defer d.closeFDs()
	netns, _ := linksOf(t, opts, p)
	if id, err := d.stampIn(netns, p.NetnsCookie(t)); !errors.Is(err, errForeignSlots) {
		t.Errorf("stamp: %d, %v; want %v", id, err, errForeignSlots)
	}
	if err := Check(t.Context(), opts, podID(p)); err != nil {
		t.Error(err)
	}
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// Where nobody can look at a pod's TC filters, as in a container, nothing is said of them
// as long as its links are in order.
func TestPrivilegedSettleWithoutNetns(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	var out bytes.Buffer
	opts, w := node(t), testbed.NewWorld(t)
	opts.NoTCX = true
	p, other := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
	next := another(opts, "next", nil)
	rename := func(p *testbed.Pod, path string) {
		t.Helper()
		d := newDatapath(opts)
		r, err := d.readRecord(podID(p))
		if err != nil {
			t.Fatal(err)
		}
		r.Netns = path
		if err := d.writeRecord(r); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []*testbed.Pod{p, other} {
		if err := attachWith(t.Context(), opts, p, testRules(p), TC); err != nil {
			t.Fatal(err)
		}
	}
	rename(other, "/none")
	got, err := Upgrade(t.Context(), next)
	if err != nil || !slices.Equal(got.Moved, []ID{podID(p)}) || len(got.Kept) != 1 || !errors.Is(got.Kept[0].Why, errFiltersAway) {
		t.Fatalf("upgrade: %+v, %v; want one moved, and one whose filters can't be reached", got, err)
	}
	rename(p, "/none")
	next.Log = slog.New(slog.NewTextHandler(&out, nil))
	for range 2 {
		if _, err := Upgrade(t.Context(), next); err != nil {
			t.Error(err)
		}
	}
	if out.Len() > 0 {
		t.Errorf("it says %q", &out)
	}
	// One link of another build is said.
	d := newDatapath(opts)
	defer d.closeFDs()
	prog, err := d.object(bpf.ShuntProgShuntSkLookup)
	if err != nil {
		t.Fatal(err)
	}
	netns, _ := linksOf(t, opts, p)
	if err := replaceAt(filepath.Join(netns, skLookupLink), prog); err != nil {
		t.Fatal(err)
	}
	if _, err := Upgrade(t.Context(), next); err != nil || !strings.Contains(out.String(), podID(p).String()) {
		t.Errorf("%v; it says %q, want %v", err, &out, podID(p))
	}
	rename(p, p.NetnsPath())
	rename(other, other.NetnsPath())
	mustUpgrade(t, next, 1)
	runs(t, next, p, false)
	mustRemove(t, next, p)
	mustRemove(t, next, other)
	nothingLeft(t, next)
}

// flow is a connection that stays.
type flow struct {
	dst   netip.AddrPort
	app   int // the app's socket
	proxy fd  // the accepted one, a copy
}

// establish connects from the app through the proxy, to stay.
func establish(t testing.TB, app *testbed.App, proxy *testbed.Proxy, dst netip.AddrPort) flow {
	t.Helper()
	r := app.Connect(t, testbed.ConnectSpec{Dst: dst, Keep: true})
	if r.Errno != "" || r.Listener() != "out" {
		t.Fatalf("connect to %v: %+v", dst, r)
	}
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", proxy.PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		link, err := os.Readlink(name)
		if err != nil || !strings.HasPrefix(link, "socket:") {
			continue
		}
		f, err := getFD(strconv.Itoa(proxy.PID), filepath.Base(name), link)
		if err != nil {
			t.Fatal(err)
		}
		if f < 0 {
			continue
		}
		if at := testbed.InfoOf(int(f)).Peer; netip.AddrPortFrom(at.Addr().Unmap(), at.Port()) == r.Local {
			t.Cleanup(f.close)
			return flow{dst, r.Sock, f}
		}
		f.close()
	}
	t.Fatalf("the proxy has no connection from %v", r.Local)
	return flow{}
}

// lives fails the test unless both ends are told where the connection goes.
func (f flow) lives(t testing.TB, app *testbed.App) {
	t.Helper()
	if got := app.Info(t, f.app); got.Peer != f.dst {
		t.Errorf("the app's peer is %v, want %v", got.Peer, f.dst)
	}
	if got := testbed.InfoOf(int(f.proxy)); got.OrigDst().Addr != f.dst {
		t.Errorf("the proxy is told %+v, want %v", got, f.dst)
	}
	if errno := app.Send(t, f.app, "x\n"); errno != "" {
		t.Errorf("send to %v: %s", f.dst, errno)
	}
}

// A scene is a pod that is redirected, its proxy and its app, and connections that
// stay.
type scene struct {
	*testbed.Pod
	proxy *testbed.Proxy
	app   *testbed.App
	flows []flow
}

func newScene(t testing.TB, opts Options, w *testbed.World, hook InboundHook) *scene {
	t.Helper()
	p := testbed.NewPod(t, testbed.InWorld(w))
	if err := attachWith(t.Context(), opts, p, testRules(p), hook); err != nil {
		t.Fatal(err)
	}
	s := &scene{Pod: p, proxy: p.StartProxy(t, 1337, 1337), app: p.StartApp(t, 8080)}
	for _, dst := range []string{"10.99.7.1:443", "[fd99::7]:443"} {
		s.flows = append(s.flows, establish(t, s.app, s.proxy, netip.MustParseAddrPort(dst)))
	}
	return s
}

// load makes connections out of the pod and into it, and counts those that fail, and
// those that go around the proxy.
func (s *scene) load(t testing.TB, w *testbed.World, round int) (made, failed, direct int) {
	t.Helper()
	const each = 20
	var out, in []testbed.ConnectSpec
	for i := range each {
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 99, byte(1 + round%200), byte(1 + i)}), 80)
		if i%2 == 1 {
			dst = netip.AddrPortFrom(netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 14: byte(round), 15: byte(1 + i)}), 80)
		}
		out = append(out, testbed.ConnectSpec{Dst: dst, Abort: true})
		in = append(in, testbed.ConnectSpec{Dst: netip.AddrPortFrom(s.AllAddrs()[i%2], 8080), Abort: true})
	}
	count := func(what string, specs []testbed.ConnectSpec, results []testbed.ConnectResult) {
		for i, r := range results {
			made++
			switch {
			case r.Errno != "":
				failed++
				t.Errorf("round %d, %s to %v failed: %s (%s)", round, what, specs[i].Dst, r.Errno, r.Step)
			case r.Listener() != what:
				direct++
				t.Errorf("round %d, %s to %v got to %q", round, what, specs[i].Dst, r.Listener())
			case r.Served.OrigDst().Addr != specs[i].Dst:
				failed++
				t.Errorf("round %d, %s to %v: the proxy was told %+v", round, what, specs[i].Dst, r.Served.OrigDst())
			}
		}
	}
	count("out", out, s.app.ConnectBatch(t, out))
	count("in", in, w.ConnectBatch(t, in))
	return made, failed, direct
}

// While pods go from one build to another and back, and others come and go, no
// connection fails and none goes around its proxy; those that were there before are
// told of rightly ever after.
func TestPrivilegedUpgradeUnderLoad(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, hook := range []InboundHook{SkLookup, TC} {
		t.Run(string(hook), func(t *testing.T) {
			opts, w := node(t), testbed.NewWorld(t)
			w.ServeAll(t)
			scenes := []*scene{newScene(t, opts, w, hook), newScene(t, opts, w, hook)}
			next := another(opts, "next", otherwise(stampLayout))
			builds := []Options{next, opts}

			var wg sync.WaitGroup
			done := make(chan struct{})
			var came int
			var rounds atomic.Int64
			var over atomic.Bool
			var upgradeErr, attachErr error
			wg.Go(func() { // a build after the other
				defer over.Store(true)
				for ; upgradeErr == nil; rounds.Add(1) {
					got, err := Upgrade(context.WithoutCancel(t.Context()), builds[rounds.Load()%2])
					if upgradeErr = err; err == nil && len(got.Kept) > 0 {
						upgradeErr = fmt.Errorf("kept: %+v", got.Kept)
					}
					select {
					case <-done:
						return
					default:
					}
				}
			})
			other := testbed.NewPod(t, testbed.InWorld(w))
			wg.Go(func() { // plugins of both builds
				for ; attachErr == nil; came++ {
					attachErr = errors.Join(
						attachWith(context.WithoutCancel(t.Context()), builds[came%2], other, testRules(other), hook),
						Remove(context.WithoutCancel(t.Context()), builds[came/2%2], podID(other)),
					)
					select {
					case <-done:
						return
					default:
					}
				}
			})
			var made, failed, direct int
			for round := 0; round < 40 || rounds.Load() < 4 && !over.Load(); round++ {
				for _, s := range scenes {
					m, f, d := s.load(t, w, round)
					made, failed, direct = made+m, failed+f, direct+d
				}
			}
			close(done)
			wg.Wait()
			if upgradeErr != nil || attachErr != nil {
				t.Fatalf("upgrade: %v; another pod: %v", upgradeErr, attachErr)
			}
			t.Logf("%d connections during %d upgrades and %d other pods: %d failed, %d went around the proxy", made, rounds.Load(), came, failed, direct)
			if rounds.Load() < 4 {
				t.Errorf("only %d upgrades", rounds.Load())
			}
			for _, s := range scenes {
				for _, f := range s.flows {
					f.lives(t, s.app)
				}
			}
			if _, err := Upgrade(t.Context(), next); err != nil {
				t.Fatal(err)
			}
			for _, s := range scenes {
				runs(t, next, s.Pod, false)
				mustRemove(t, next, s.Pod)
			}
			nothingLeft(t, next)
		})
	}
}

// killEnv has the test binary be a process that upgrades a node's pods, and ends: its
// bpfDir, its runDir and the name of the build, which is this one where it is empty.
const (
	killEnv  = "SHUNT_LOADER_TEST_UPGRADE"
	allSteps = "SHUNT_LOADER_TEST_ALL_STEPS" // not empty: no step is left out
)

func init() {
	where := strings.Split(os.Getenv(killEnv), "|")
	if len(where) != 3 {
		return
	}
	opts := Options{BPFDir: where[0], RunDir: where[1], Log: slog.New(slog.DiscardHandler), Programs: programs.New()}
	if where[2] != "" {
		opts = another(opts, where[2], otherwise(stampLayout))
	}
	done, err := Upgrade(context.Background(), opts)
	if err != nil || len(done.Kept) > 0 {
		fmt.Fprintf(os.Stderr, "%+v, %v\n", done, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// An upgrade that is killed, or in which a call fails, at whichever step, leaves pods
// that are redirected as before; another then comes to its end, to either build.
func TestPrivilegedUpgradeInterrupted(t *testing.T) {
	testbed.NeedSteps(t)
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, w := node(t), testbed.NewWorld(t)
	w.ServeAll(t)
	s := newScene(t, opts, w, TC)
	next := another(opts, "next", otherwise(stampLayout))
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	try := func(t *testing.T, f testbed.Fault) testbed.StepsResult {
		t.Helper()
		r, err := testbed.RunSteps(testbed.StepsSpec{
			Argv: []string{exe}, Env: []string{killEnv + "=" + strings.Join([]string{opts.BPFDir, opts.RunDir, "next"}, "|"), "GORACE=atexit_sleep_ms=0"}, Fault: f,
		})
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	isAt := func(t *testing.T, o Options) {
		t.Helper()
		if got, err := Upgrade(t.Context(), o); err != nil || len(got.Kept) > 0 {
			t.Fatalf("upgrade to %s: %+v, %v", o.build().dir, got, err)
		}
		if _, err := Sweep(t.Context(), o); err != nil { // of a load that was not finished
			t.Error(err)
		}
		if err := Check(t.Context(), o, podID(s.Pod)); err != nil {
			t.Error(err)
		}
		if got := datapaths(t, o); !slices.Equal(got, []string{o.build().dir}) {
			t.Errorf("%v are loaded, want %s alone", got, o.build().dir)
		}
		runs(t, o, s.Pod, false)
	}

	all := try(t, testbed.Fault{})
	if all.ExitCode != 0 {
		t.Fatalf("upgrade: %d, %s", all.ExitCode, all.Stderr)
	}
	isAt(t, next)
	isAt(t, opts)
	// Of the load, which is another test's matter, few steps are tried, and of those
	// that only look; all that change links and records.
	tried := 0
	for i, step := range all.Steps {
		changes := strings.HasPrefix(step.Arg, "LINK_UPDATE") || step.Call == "renameat" || step.Call == "renameat2" ||
			strings.Contains(step.Arg, nextStamp) || strings.Contains(step.Arg, ".next")
		if !changes && i%16 != 0 && os.Getenv(allSteps) == "" {
			continue
		}
		kind := testbed.FaultKind(tried % 3) // each of them
		tried++
		t.Run(fmt.Sprintf("%d %v", i+1, step.Call), func(t *testing.T) {
			r := try(t, testbed.Fault{Step: i + 1, Kind: kind, Errno: unix.EIO})
			if kind != testbed.FailCall && (!r.Hit || r.ExitCode != -1) {
				t.Fatalf("it was not killed: %d, %s", r.ExitCode, r.Stderr)
			}
			s.load(t, w, i%200)
			for _, f := range s.flows {
				f.lives(t, s.app)
			}
			if tried%2 == 0 {
				if err := Check(t.Context(), next, podID(s.Pod)); err != nil {
					t.Error(err)
				}
			}
			if tried%4 < 2 {
				isAt(t, next)
			}
			isAt(t, opts)
			if t.Failed() {
				t.Logf("fault %v at %v", kind, step)
			}
		})
	}
	t.Logf("of %d steps, %d were tried", len(all.Steps), tried)
	mustRemove(t, opts, s.Pod)
	nothingLeft(t, opts)
}

// Where all slots were given out, those that no program has are found.
func TestPrivilegedLostSlots(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	d, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	slots, err := d.object(bpf.ShuntMapSlots)
	if err != nil {
		t.Fatal(err)
	}
	mi, err := info[mapInfo](slots)
	if err != nil {
		t.Fatal(err)
	}
	first, highest := uint32(0), uint64(mi.maxEntries-1)
	if err := update(slots, &first, &highest, updateAny); err != nil {
		t.Fatal(err)
	}
	mine, err := d.ownStamp(d.netnsLinks(p.NetnsCookie(t)))
	if err != nil {
		t.Fatal(err)
	}
	// One is lost; one that is not pinned anywhere serves a pod, as its value says.
	if err := os.Remove(filepath.Join(d.dir, stampsDir, "3")); err != nil {
		t.Fatal(err)
	}
	serving := uint64(77)
	if mine == 3 {
		t.Fatal("the pod has the slot that was to be lost")
	}
	if slot, err := d.newSlot(); err != nil || slot != 3 {
		t.Errorf("slot %d, %v; want 3, which was lost", slot, err)
	}
	third := uint32(3)
	if err := update(slots, &third, &serving, updateAny); err != nil {
		t.Fatal(err)
	}
	if slot, err := d.newSlot(); err != nil || slot != stampsAtStart+1 {
		t.Errorf("slot %d, %v; want %d, the first that was never used", slot, err, stampsAtStart+1)
	}
	serving = 0
	if err := update(slots, &third, &serving, updateAny); err != nil {
		t.Fatal(err)
	}
	d.Close()
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}
