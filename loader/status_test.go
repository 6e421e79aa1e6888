// SPDX-License-Identifier: Apache-2.0

//go:build linux

package loader

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/bpf/object"
	"shunt.dev/shunt/internal/testbed"
)

// survey looks, quickly and closely, and fails the test on an error.
func survey(t testing.TB, opts Options, closely bool) *Survey {
	t.Helper()
	s, err := Look(t.Context(), opts, closely)
	if err != nil {
		t.Fatalf("look (closely: %v): %v", closely, err)
	}
	return s
}

// only gives the one attachment that there is.
func only(t testing.TB, opts Options, closely bool) *Status {
	t.Helper()
	s := survey(t, opts, closely)
	if len(s.Attachments) != 1 {
		t.Fatalf("%d attachments, want 1", len(s.Attachments))
	}
	return &s.Attachments[0]
}

// wrong joins what a status says is wrong, but for listeners.
func (st *Status) wrong() string {
	var list []string
	for _, is := range []struct {
		so   bool
		text string
	}{{!st.Loaded, "not loaded"}, {st.OtherBuild, "other build"}, {st.NetnsGone, "netns gone"}, {st.CgroupGone, "cgroup gone"}, {st.Changing, "changing"}} {
		if is.so {
			list = append(list, is.text)
		}
	}
	for _, h := range st.Hooks {
		if h.State != HookAttached {
			list = append(list, fmt.Sprintf("%s %s: %s", h.Name, h.State, h.Text))
		}
	}
	list = append(list, st.Missing...)
	for _, p := range st.Outside {
		list = append(list, "outside: "+p.Name)
	}
	return strings.Join(list, "; ")
}

// treeOf lists what is in the node's folders, with all that a write would change.
func treeOf(t testing.TB, opts Options) (list []string) {
	t.Helper()
	for _, dir := range []string{opts.BPFDir, opts.RunDir} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			st, err := e.Info()
			if err != nil {
				return err
			}
			line := fmt.Sprint(path, " ", st.Mode(), " ", st.ModTime().UnixNano())
			if st.Mode().IsRegular() && strings.HasPrefix(path, opts.RunDir) {
				text, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				line += " " + string(text)
			}
			list = append(list, line)
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
	return list
}

// The constant mirrors the programs'.
func TestInflightLimit(t *testing.T) {
	spec, err := object.LoadShunt()
	if err != nil {
		t.Fatal(err)
	}
	var limit uint32
	if err := spec.Variables[bpf.ShuntVarInflightLimit].Get(&limit); err != nil || limit != inflightLimit {
		t.Errorf("the programs' limit is %d (%v), not %d", limit, err, inflightLimit)
	}
}

// A node that has nothing has an empty survey, and gets nothing by it.
func TestLookAtNothing(t *testing.T) {
	dir := t.TempDir()
	opts := Options{BPFDir: filepath.Join(dir, "bpf"), RunDir: filepath.Join(dir, "run")}
	for _, closely := range []bool{false, true} {
		s, err := Look(t.Context(), opts, closely)
		if err != nil || len(s.Attachments) != 0 {
			t.Errorf("%+v, %v", s, err)
		}
	}
	if left := treeOf(t, opts); len(left) != 0 {
		t.Errorf("made %q", left)
	}
	// One that can't be read does not hide the others.
	if err := errors.Join(os.MkdirAll(opts.RunDir+"/attachments", 0o700), os.WriteFile(opts.RunDir+"/attachments/x@eth0.json", []byte("{"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := Look(t.Context(), opts, false); err == nil || !strings.Contains(err.Error(), "x@eth0.json") {
		t.Errorf("a record that can't be parsed: %v", err)
	}
}

// Whatever is detached or taken away is seen, by what the kernel says; and
// looking changes nothing.
func TestPrivilegedLook(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	rules := testRules(p)
	rules.Flags |= bpf.ShuntPodFlagPOD_DNS
	mustAttach(t, opts, p, rules)
	testbed.NewPod(t, testbed.InWorld(p.World)) // it is not attached: it must not be told of
	before := treeOf(t, opts)
	for _, closely := range []bool{false, true} {
		st := only(t, opts, closely)
		if w := st.wrong(); w != "" || len(st.Hooks) != len(hooks)+len(dnsHooks)+2 {
			t.Errorf("closely %v: %d hooks; wrong: %s", closely, len(st.Hooks), w)
		}
		if st.ID != podID(p) || st.Pod.Name != p.Name || st.Handshakes != 0 || st.HandshakeLimit != inflightLimit {
			t.Errorf("%+v", st)
		}
	}
	if diff := cmp.Diff(before, treeOf(t, opts)); diff != "" {
		t.Errorf("looking has changed (-before +after):\n%s", diff)
	}

	var st unix.Stat_t
	if err := unix.Stat(p.CgroupPath(), &st); err != nil {
		t.Fatal(err)
	}
	cg, ns := filepath.Join(opts.BPFDir, cgroupLinks, fmt.Sprint(st.Ino)), filepath.Join(opts.BPFDir, netnsLinks, fmt.Sprint(p.NetnsCookie(t)))
	// A link whose pin is there, and which is attached to nothing any more.
	detach := func(path string) error {
		l, err := getPin(path)
		if err != nil {
			return err
		}
		defer l.close()
		return l.detach()
	}
	type damage struct {
		what string
		do   func() error
		want []string
	}
	var damages []damage
	for _, h := range append(hooks[:len(hooks):len(hooks)], dnsHooks...) {
		path, name := filepath.Join(cg, h.program), hookName(h.program)
		damages = append(damages,
			damage{name + " unpinned", func() error { return os.Remove(path) }, []string{name + " missing: " + name + " is not attached to the pod's cgroup"}},
			damage{name + " detached", func() error { return detach(path) }, []string{name + " missing: "}})
	}
	for _, name := range []string{stampLink, skLookupLink} {
		path := filepath.Join(ns, name)
		damages = append(damages,
			damage{name + " unpinned", func() error { return os.Remove(path) }, []string{name + " missing: "}},
			damage{name + " detached", func() error { return detach(path) }, []string{name + " missing: "}})
	}
	entry := func(name string) func() error {
		return func() error {
			d := &Datapath{opts: opts, dir: filepath.Join(opts.BPFDir, "datapath-"+bpf.Digest[:16]), fds: map[string]fd{}}
			defer d.closeFDs()
			m, err := d.object(name)
			if err != nil {
				return err
			}
			cookie := p.NetnsCookie(t)
			return remove(m, &cookie)
		}
	}
	damages = append(damages,
		damage{"pod entry", entry(bpf.ShuntMapPods), []string{"the pod's entry is missing"}},
		damage{"state", entry(bpf.ShuntMapStates), []string{"the pod's state is missing"}})
	for _, d := range damages {
		if err := d.do(); err != nil {
			t.Fatalf("%s: %v", d.what, err)
		}
		for _, closely := range []bool{false, true} {
			testbed.Eventually(t, d.what+" is told", func() bool {
				w := only(t, opts, closely).wrong()
				for _, want := range d.want {
					if !strings.Contains(w, want) {
						return false
					}
				}
				return strings.Count(w, "; ") == 0
			})
		}
		mustAttach(t, opts, p, rules)
	}
	// The kernel lets go of links without pins in its own time.
	testbed.Eventually(t, "all is well again", func() bool { return only(t, opts, true).wrong() == "" })
	mustRemove(t, opts, p)
	if s := survey(t, opts, true); len(s.Attachments) != 0 {
		t.Errorf("removed, and still there: %+v", s)
	}
}

// A program that is attached, but another datapath's, is told.
func TestPrivilegedLookAtOthers(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	other := opts
	other.BPFDir, other.RunDir = filepath.Join(filepath.Dir(opts.BPFDir), "other"), t.TempDir()
	mustAttach(t, opts, p, testRules(p))
	mustAttach(t, other, p, testRules(p))
	w := only(t, opts, true).wrong()
	for _, want := range []string{"connect4 extra: a second connect4 is attached: program ", "sk_lookup extra", " of a datapath that is not in " + opts.BPFDir} {
		if !strings.Contains(w, want) {
			t.Errorf("two datapaths: %s, want %q", w, want)
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(p.CgroupPath(), &st); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(cgroupLinks, fmt.Sprint(st.Ino), bpf.ShuntProgShuntConnect4)
	// The other's takes the place of ours.
	if err := os.Rename(filepath.Join(other.BPFDir, link), filepath.Join(opts.BPFDir, link)); err != nil {
		t.Fatal(err)
	}
	if w := only(t, opts, false).wrong(); !strings.HasPrefix(w, "connect4 other-program: connect4 is attached, but it is program ") {
		t.Errorf("another's program: %s", w)
	}
	mustRemove(t, other, p)
	mustAttach(t, opts, p, testRules(p))

	// Another build's datapath.
	own, theirs := filepath.Join(opts.BPFDir, "datapath-"+bpf.Digest[:16]), filepath.Join(opts.BPFDir, "datapath-0123456789abcdef")
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	edit := func(fn func(r *Record)) {
		t.Helper()
		d := &Datapath{opts: opts}
		r, err := d.readRecord(podID(p))
		if err == nil {
			fn(r)
			err = d.writeRecord(r)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	rename(own, theirs)
	edit(func(r *Record) { r.Build = filepath.Base(theirs) })
	for _, closely := range []bool{false, true} {
		testbed.Eventually(t, "another build's datapath is told, and that alone", func() bool { return only(t, opts, closely).wrong() == "other build" })
	}
	rename(theirs, own)
	edit(func(r *Record) { r.Build = filepath.Base(own) })

	// A load that is gone.
	rename(own, theirs)
	if w := only(t, opts, true).wrong(); !strings.HasPrefix(w, "not loaded; connect4 other-program") && !strings.HasPrefix(w, "not loaded; sockops other-program") {
		t.Errorf("no datapath: %s", w)
	}
	rename(theirs, own)

	// The cgroup is made anew, as for a pod whose sandbox is.
	p.RemoveCgroup(t)
	p.RemakeCgroup(t)
	testbed.Eventually(t, "the cgroup is gone", func() bool {
		st := only(t, opts, true)
		return st.CgroupGone && !st.NetnsGone && st.Hooks[0].State == HookMissing
	})
	p.Destroy(t)
	testbed.Eventually(t, "the namespace is gone", func() bool { return only(t, opts, false).NetnsGone })
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// The TC program is seen at each interface, as a link or as a filter, and so are
// the programs that stand behind it: they serve an interface that comes later,
// which is no finding unless they are gone.
func TestPrivilegedLookAtTC(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	var major, minor int
	if _, err := fmt.Sscanf(Release(), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	haveTCX := major > 6 || major == 6 && minor >= 6
	for _, noTCX := range []bool{false, true} {
		opts, p := node(t), testbed.NewPod(t)
		opts.NoTCX = noTCX
		attach := func() {
			t.Helper()
			if err := attachBy(t, opts, p, TC); err != nil {
				t.Fatal(err)
			}
		}
		attach()
		for _, closely := range []bool{false, true} {
			if st := only(t, opts, closely); st.wrong() != "" || len(st.Hooks) != len(hooks)+3 || st.Hooks[len(hooks)+2].Name != "tc eth0" {
				t.Errorf("%v", st.Hooks)
			}
		}
		if noTCX || !haveTCX {
			l, err := p.Netlink().LinkByName("eth0")
			if err != nil {
				t.Fatal(err)
			}
			if err := p.Netlink().FilterDel(ours(TCInterface{Index: uint32(l.Attrs().Index)}, -1)); err != nil {
				t.Fatal(err)
			}
		} else {
			pins, err := filepath.Glob(filepath.Join(opts.BPFDir, netnsLinks, "*", tcLinkPrefix+"*"))
			if err != nil || len(pins) != 1 {
				t.Fatalf("pins %v, %v", pins, err)
			}
			// Its pin alone gone, the kernel would let go of it in its own time.
			if err := unlink(pins[0]); err != nil {
				t.Fatal(err)
			}
		}
		for _, closely := range []bool{false, true} {
			if w := only(t, opts, closely).wrong(); !strings.HasPrefix(w, "tc eth0 missing: ") {
				t.Errorf("detached: %s", w)
			}
		}
		attach()
		detach := func(name, want string) {
			t.Helper()
			if err := unlink(filepath.Join(opts.BPFDir, netnsLinks, fmt.Sprint(p.NetnsCookie(t)), name)); err != nil {
				t.Fatal(err)
			}
			for _, closely := range []bool{false, true} {
				w := only(t, opts, closely).wrong()
				if !strings.HasPrefix(w, name+" missing: ") || closely && !strings.Contains(w, want) {
					t.Errorf("%s detached, closely %v: %s", name, closely, w)
				}
			}
		}
		detach(stampLink, "")
		attach()
		p.Command(t, "ip", "link", "add", "net1", "type", "veth", "peer", "name", "net2")
		// The kernel lets go of the links that were replaced in its own time.
		well := func() bool { return only(t, opts, true).wrong() == "" }
		testbed.Eventually(t, "all is well with an interface that came after", well)
		detach(skLookupLink, "; tc net1 missing: interface net1 came after the pod was attached: without sk_lookup ")
		p.Command(t, "ip", "link", "del", "net1")
		attach()
		testbed.Eventually(t, "all is well again", well)
		// Those of another datapath are told here too.
		other := opts
		other.BPFDir, other.RunDir = filepath.Join(filepath.Dir(opts.BPFDir), "other"), t.TempDir()
		mustAttach(t, other, p, testRules(p))
		if w := only(t, opts, true).wrong(); !strings.Contains(w, "sk_lookup extra: a second sk_lookup is attached: ") {
			t.Errorf("two datapaths: %s", w)
		}
		mustRemove(t, other, p)
		mustRemove(t, opts, p)
	}
}

// Listeners are those that the kernel has: registered, not registered because
// they are MPTCP's, or where REDIRECT would not look.
func TestPrivilegedLookAtListeners(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, hook := range []InboundHook{SkLookup, TC} {
		opts, p := node(t), testbed.NewPod(t)
		if err := attachBy(t, opts, p, hook); err != nil {
			t.Fatal(err)
		}
		proxy := p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		at := func(a string) testbed.ListenSpec {
			return testbed.ListenSpec{Name: "in", Addr: netip.AddrPortFrom(netip.MustParseAddr(a), testbed.InboundPort), ReusePort: true}
		}
		expect := func(when string, want ...Listener) {
			t.Helper()
			got := only(t, opts, true).Listeners
			for i := range got {
				got[i].cookies = nil
			}
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(Listener{}), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
				t.Errorf("%s, %s (-want +got):\n%s", hook, when, diff)
			}
		}
		expect("nobody listens")
		any6, any4 := netip.MustParseAddrPort("[::]:15006"), netip.MustParseAddrPort("0.0.0.0:15006")
		l := proxy.Listen(t, at("::"))
		proxy.Listen(t, at("::"))
		expect("two workers", Listener{Addr: any6, Reached: true, Registered: 2, Serves4: true, Serves6: true})
		spec := at("127.0.0.1")
		local := proxy.Listen(t, spec)
		expect("and loopback", Listener{Addr: any6, Reached: true, Registered: 2, Serves4: true, Serves6: true}, Listener{Addr: netip.MustParseAddrPort("127.0.0.1:15006"), Others: 1})
		local.Close(t)
		l.Close(t)
		testbed.Eventually(t, "one has closed", func() bool { return only(t, opts, false).Listeners[0].Registered == 1 })
		spec = at("::")
		spec.V6Only = true
		proxy.Listen(t, spec)
		expect("IPv6 only", Listener{Addr: any6, Reached: true, Registered: 1, Serves4: true}, Listener{Addr: any6, OnlyIPv6: true, Reached: true, Registered: 1, Serves6: true})
		proxy.Stop(t)

		proxy = p.Actor(t, "proxy", testbed.ProxyUID, testbed.ProxyGID)
		spec = at("0.0.0.0")
		spec.MPTCP, spec.ReusePort = true, false
		proxy.Listen(t, spec)
		expect("MPTCP", Listener{Addr: any4, MPTCP: true, Reached: true, Others: 1})
		for _, closely := range []bool{false, true} {
			st := only(t, opts, closely)
			n, errno := st.Counted(bpf.ShuntPlacePLACE_LISTENER_REGISTER)
			if want := map[InboundHook]uint64{SkLookup: 1}[hook]; n != want || n > 0 && (errno != unix.EOPNOTSUPP || !st.Asked) {
				t.Errorf("%s, closely %v: %d failures (%v), asked %v", hook, closely, n, errno, st.Asked)
			}
		}
		mustRemove(t, opts, p)
	}
}

// A process that is in the pod's network namespace and not in its cgroup is
// found; those in its cgroup are not.
func TestPrivilegedLookOutside(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	p.StartApp(t)
	if w := only(t, opts, true).wrong(); w != "" {
		t.Error(w)
	}
	a := p.Actor(t, "outside", 0, 0, testbed.InHostCgroup())
	st := only(t, opts, true)
	if len(st.Outside) != 1 || st.Outside[0].PID != a.PID || st.Outside[0].Name == "?" {
		t.Errorf("outside: %+v, want process %d", st.Outside, a.PID)
	}
	if st := only(t, opts, false); len(st.Outside) != 0 {
		t.Errorf("looked for: %+v", st.Outside)
	}
	a.Stop(t)
	if w := only(t, opts, true).wrong(); w != "" {
		t.Error(w)
	}
	mustRemove(t, opts, p)
}

// What another process is at work on is no finding; and nobody is waited for
// long.
func TestPrivilegedLookWhileChanging(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	d, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	// With the lock held, all that is right is told at once.
	if w := only(t, opts, false).wrong(); w != "" {
		t.Error(w)
	}
	r, err := d.readRecord(podID(p))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.unlinkAll(d.netnsLinks(r.Cookie), skLookupLink); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if st := only(t, opts, false); !st.Changing || time.Since(start) > 5*time.Second {
		t.Errorf("changing %v, after %v", st.Changing, time.Since(start))
	}
	// Who waits is let in when it is done, and sees how it has ended.
	done := make(chan *Survey, 1)
	go func() {
		s, err := Look(context.WithoutCancel(t.Context()), opts, false)
		if err != nil {
			t.Error(err)
		}
		done <- s
	}()
	if err := d.undo(r); err != nil {
		t.Error(err)
	}
	d.Close()
	if s := <-done; len(s.Attachments) != 0 {
		t.Errorf("removed meanwhile: %+v", s.Attachments[0].wrong())
	}
	nothingLeft(t, opts)
}

// BenchmarkPrivilegedLook is a node with 250 pods.
func BenchmarkPrivilegedLook(b *testing.B) {
	testbed.Privileged(b)
	opts, w := node(b), testbed.NewWorld(b)
	for range 250 {
		p := testbed.NewPod(b, testbed.InWorld(w))
		mustAttach(b, opts, p, testRules(p))
		b.Cleanup(func() { // b's context has ended by then
			if err := Remove(context.Background(), opts, podID(p)); err != nil {
				b.Error(err)
			}
		})
	}
	for _, closely := range []bool{false, true} {
		b.Run(map[bool]string{false: "quick", true: "closely"}[closely], func(b *testing.B) {
			for b.Loop() {
				if s := survey(b, opts, closely); len(s.Attachments) != 250 || s.Attachments[7].wrong() != "" {
					b.Fatalf("%d attachments; %s", len(s.Attachments), s.Attachments[7].wrong())
				}
			}
		})
	}
}
