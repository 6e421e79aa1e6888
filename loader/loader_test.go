// SPDX-License-Identifier: Apache-2.0

//go:build linux

package loader

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cebpf "github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/loader/programs"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// node gives the options of a node of the test's own.
func node(t testing.TB) Options {
	t.Helper()
	return Options{
		BPFDir: filepath.Join(testbed.BPFFS(t), "shunt"),
		RunDir: filepath.Join(t.TempDir(), "run"),
		Log:    slog.New(slog.DiscardHandler),

		Programs: programs.New(),
	}
}

func testRules(p *testbed.Pod) Rules {
	return Rules{
		UID: 1337, GID: 1337,
		OutboundPort: 15001, InboundPort: 15006, TunnelPort: 15008, DNSPort: 15053,
		Flags:   bpf.ShuntPodFlagPOD_OUT_ALL | bpf.ShuntPodFlagPOD_IN_PORTS,
		Source4: p.Addr4(), Source6: p.Addr6(),
		Dests: []Dest{
			{Prefix: netip.PrefixFrom(p.Addr4(), 32), Flags: bpf.ShuntDestFlagDEST_LOCAL},
			{Prefix: netip.PrefixFrom(p.Addr6(), 128), Flags: bpf.ShuntDestFlagDEST_LOCAL},
			{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Flags: bpf.ShuntDestFlagDEST_EXCLUDE},
		},
		Ports: []Port{{Direction: bpf.ShuntDirectionDIR_IN, Port: 8080, Bits: 16, Flags: bpf.ShuntPortFlagPORT_INCLUDE}},
	}
}

func podID(p *testbed.Pod) ID { return ID{ContainerID: p.ContainerID, IfName: "eth0"} }

func attach(ctx context.Context, opts Options, p *testbed.Pod, rules Rules) error {
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
	return d.Attach(Target{
		ID: podID(p), Network: "test", Netns: ns, Cgroup: p.CgroupPath(),
		Pod: PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID},
	}, rules)
}

func mustAttach(t testing.TB, opts Options, p *testbed.Pod, rules Rules) {
	t.Helper()
	if err := attach(t.Context(), opts, p, rules); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), opts, podID(p)); err != nil {
		t.Fatalf("check after attach: %v", err)
	}
}

func mustRemove(t testing.TB, opts Options, p *testbed.Pod) {
	t.Helper()
	if err := Remove(t.Context(), opts, podID(p)); err != nil {
		t.Fatal(err)
	}
}

// On a file system that is full, what was there before stays, and nothing of what did
// not fit.
func TestPrivilegedReplaceOnFull(t *testing.T) {
	testbed.Privileged(t)
	dir := t.TempDir()
	if err := unix.Mount("shunt-test", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	path := filepath.Join(dir, "record")
	if err := replace(path, []byte("before")); err != nil {
		t.Fatal(err)
	}
	if err := replace(path, make([]byte, 64<<10)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("replace: %v, want %v", err, unix.ENOSPC)
	}
	if got, err := os.ReadFile(path); string(got) != "before" {
		t.Errorf("%d bytes, %v; want what was there before", len(got), err)
	}
	if left, err := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left: %v, %v; want the file alone", left, err)
	}
}

// entries counts the entries of a pinned map.
func entries(t testing.TB, opts Options, name string) (n int) {
	t.Helper()
	dirs, _ := filepath.Glob(filepath.Join(opts.BPFDir, "datapath-*"))
	for _, dir := range dirs {
		m, err := cebpf.LoadPinnedMap(filepath.Join(dir, name), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		var k, v []byte
		for it := m.Iterate(); it.Next(&k, &v); {
			n++
		}
	}
	return n
}

// taken lists the slots of stamp programs that serve a pod.
func taken(t testing.TB, opts Options) (slots []uint32) {
	t.Helper()
	dirs, _ := filepath.Glob(filepath.Join(opts.BPFDir, "datapath-*"))
	for _, dir := range dirs {
		m, err := cebpf.LoadPinnedMap(filepath.Join(dir, bpf.ShuntMapSlots), nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		var slot uint32
		var cookie uint64
		for it := m.Iterate(); it.Next(&slot, &cookie); {
			if slot > 0 && cookie != 0 { // the first says which is the highest
				slots = append(slots, slot)
			}
		}
	}
	return slots
}

// nothingLeft fails the test if anything but the node's datapath is there.
func nothingLeft(t testing.TB, opts Options) {
	t.Helper()
	for _, name := range []string{bpf.ShuntMapPods, bpf.ShuntMapStates, bpf.ShuntMapDests, bpf.ShuntMapPorts, bpf.ShuntMapInflight} {
		if n := entries(t, opts, name); n != 0 {
			t.Errorf("map %s has %d entries left", name, n)
		}
	}
	if slots := taken(t, opts); len(slots) > 0 {
		t.Errorf("slots %v are left taken", slots)
	}
	for _, dir := range []string{
		opts.BPFDir + "/" + cgroupLinks, opts.BPFDir + "/" + netnsLinks,
		opts.RunDir + "/" + recordsDir, opts.RunDir + "/" + usersDir,
	} {
		left, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range left {
			t.Errorf("left behind: %s", filepath.Join(dir, e.Name()))
		}
	}
}

// attached counts the programs of a hook at the pod's cgroup itself.
func attached(t testing.TB, p *testbed.Pod, at attachType) int {
	t.Helper()
	cg, err := os.Open(p.CgroupPath())
	if err != nil {
		t.Fatal(err)
	}
	defer cg.Close()
	r, err := ebpflink.QueryPrograms(ebpflink.QueryOptions{Target: int(cg.Fd()), Attach: cebpf.AttachType(at)})
	if err != nil {
		t.Fatal(err)
	}
	return len(r.Programs)
}

func TestPrivilegedAttachTwice(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	mustAttach(t, opts, p, testRules(p))
	for _, h := range hooks {
		if n := attached(t, p, h.attach); n != 1 {
			t.Errorf("%v: %d programs at the pod's cgroup, want 1", h.attach, n)
		}
	}
	mustRemove(t, opts, p)
	mustRemove(t, opts, p)
	for _, h := range hooks {
		if n := attached(t, p, h.attach); n != 0 {
			t.Errorf("%v: %d programs at the pod's cgroup after the removal", h.attach, n)
		}
	}
	nothingLeft(t, opts)
}

func TestPrivilegedAttachOtherRules(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	rules := testRules(p)
	mustAttach(t, opts, p, rules)
	rules.Flags |= bpf.ShuntPodFlagPOD_NO_OUT_LOCAL
	rules.Dests = append(rules.Dests[:2:2], Dest{Prefix: netip.MustParsePrefix("10.2.0.0/16"), Flags: bpf.ShuntDestFlagDEST_INCLUDE})
	rules.Ports = nil
	mustAttach(t, opts, p, rules)
	if n := entries(t, opts, bpf.ShuntMapDests); n != len(rules.Dests) {
		t.Errorf("%d prefixes, want %d: entries of the earlier rules are left", n, len(rules.Dests))
	}
	if n := entries(t, opts, bpf.ShuntMapPorts); n != 0 {
		t.Errorf("%d ports of the earlier rules are left", n)
	}
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// The load races, and each attachment with all the others.
func TestPrivilegedAttachAtOnce(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, w := node(t), testbed.NewWorld(t)
	var pods []*testbed.Pod
	for range 12 {
		pods = append(pods, testbed.NewPod(t, testbed.InWorld(w)))
	}
	all := func(what string, f func(p *testbed.Pod) error) {
		t.Helper()
		errs := make([]error, len(pods))
		var wg sync.WaitGroup
		for i, p := range pods {
			wg.Go(func() { errs[i] = f(p) })
		}
		wg.Wait()
		for i, err := range errs {
			if err != nil {
				t.Errorf("%s pod %d: %v", what, i, err)
			}
		}
	}
	all("attach", func(p *testbed.Pod) error { return attach(t.Context(), opts, p, testRules(p)) })
	if dirs, _ := os.ReadDir(opts.BPFDir); len(dirs) != 3 { // the datapath, cgroups, netns
		t.Errorf("%s has %v", opts.BPFDir, dirs)
	}
	all("check", func(p *testbed.Pod) error { return Check(t.Context(), opts, podID(p)) })
	all("remove", func(p *testbed.Pod) error { return Remove(t.Context(), opts, podID(p)) })
	nothingLeft(t, opts)
}

// Whatever is taken away, CHECK names it and Attach mends it.
func TestPrivilegedCheckNamesAndAttachMends(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	rules := testRules(p)
	mustAttach(t, opts, p, rules)
	cookie := p.NetnsCookie(t)
	datapath := filepath.Join(opts.BPFDir, "datapath-"+bpf.Digest[:16])
	unpin := func(path ...string) func(t *testing.T) {
		return func(t *testing.T) {
			if err := os.Remove(filepath.Join(append([]string{opts.BPFDir}, path...)...)); err != nil {
				t.Fatal(err)
			}
		}
	}
	inMap := func(name string, f func(m *cebpf.Map) error) func(t *testing.T) {
		return func(t *testing.T) {
			m, err := cebpf.LoadPinnedMap(filepath.Join(datapath, name), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			if err := f(m); err != nil {
				t.Fatal(err)
			}
		}
	}
	var st unix.Stat_t
	if err := unix.Stat(p.CgroupPath(), &st); err != nil {
		t.Fatal(err)
	}
	cg := fmt.Sprint(st.Ino)
	type damage struct {
		name, want string
		do         func(t *testing.T)
	}
	damages := []damage{
		{"pod entry gone", "the pod's entry is missing", inMap(bpf.ShuntMapPods, func(m *cebpf.Map) error { return m.Delete(cookie) })},
		{"pod entry differs", "the pod's entry differs", inMap(bpf.ShuntMapPods, func(m *cebpf.Map) error {
			v := rules.pod()
			v.Uid++
			return m.Put(cookie, v)
		})},
		{"state gone", "the pod's state is missing", inMap(bpf.ShuntMapStates, func(m *cebpf.Map) error { return m.Delete(cookie) })},
		{"prefix gone", "prefix 10.1.0.0/16 is missing", inMap(bpf.ShuntMapDests, func(m *cebpf.Map) error { return m.Delete(rules.Dests[2].key(cookie)) })},
		{"port gone", "port block 8080/16 is missing", inMap(bpf.ShuntMapPorts, func(m *cebpf.Map) error { return m.Delete(rules.Ports[0].key(cookie)) })},
		{"stamp link gone", "stamp program is not attached", unpin(netnsLinks, fmt.Sprint(cookie), stampLink)},
		{"sk_lookup link gone", "sk_lookup program is not attached", unpin(netnsLinks, fmt.Sprint(cookie), skLookupLink)},
	}
	for _, h := range hooks {
		damages = append(damages, damage{h.program + " link gone", h.attach.String() + " is not attached to the pod's cgroup", unpin(cgroupLinks, cg, h.program)})
	}
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			d.do(t)
			err := Check(t.Context(), opts, podID(p))
			if err == nil || !strings.Contains(err.Error(), d.want) {
				t.Errorf("check says %v, want it to name %q", err, d.want)
			}
			mustAttach(t, opts, p, rules)
		})
	}
	for _, h := range hooks {
		testbed.Eventually(t, "one program at the pod's cgroup", func() bool { return attached(t, p, h.attach) == 1 })
	}
	mustRemove(t, opts, p)
	if err := Check(t.Context(), opts, podID(p)); !errors.Is(err, ErrNotAttached) {
		t.Errorf("check after the removal: %v", err)
	}
	nothingLeft(t, opts)
}

// A datapath of another build that no pod uses, and a load that was not finished, are
// replaced.
func TestPrivilegedOtherBuild(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	other := filepath.Join(opts.BPFDir, "datapath-0123456789abcdef")
	unfinished := filepath.Join(opts.BPFDir, "load-1")
	for _, dir := range []string{other, unfinished} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mustAttach(t, opts, p, testRules(p))
	for _, dir := range []string{other, unfinished} {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", dir, err)
		}
	}
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// A policy that doesn't fit is an error that says so, and nothing of it stays.
func TestPrivilegedMapFull(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	opts.maxPrefixes = 8
	rules := testRules(p)
	for i := range 20 {
		rules.Dests = append(rules.Dests, Dest{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i), 0}), 24)})
	}
	err := attach(t.Context(), opts, p, rules)
	if err == nil || !strings.Contains(err.Error(), "the map is full") || !strings.Contains(err.Error(), "prefix 172.16.") {
		t.Errorf("attach: %v, want an error that names the prefix and says that the map is full", err)
	}
	nothingLeft(t, opts)
	mustAttach(t, opts, p, testRules(p))
	mustRemove(t, opts, p)
}

// A change that fails leaves an attachment as it was: its pod runs.
func TestPrivilegedFailedChangeKeepsWhatWas(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	opts.maxPrefixes = 8
	rules := testRules(p)
	mustAttach(t, opts, p, rules)
	changed := testRules(p)
	changed.UID, changed.Flags = 4321, changed.Flags^bpf.ShuntPodFlagPOD_OUT_ALL
	for i := range 20 {
		changed.Dests = append(changed.Dests, Dest{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{172, 16, byte(i), 0}), 24)})
	}
	for range 2 {
		err := attach(t.Context(), opts, p, changed)
		if !errors.Is(err, ErrFull) || errors.Is(err, ErrNotUndone) {
			t.Errorf("attach: %v, want a full map", err)
		}
		if err := Check(t.Context(), opts, podID(p)); err != nil {
			t.Error(err)
		}
		records, err := Records(opts)
		if err != nil || len(records) != 1 {
			t.Fatalf("records: %v, %v", records, err)
		}
		if diff := cmp.Diff(rules, records[0].Rules, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); diff != "" {
			t.Error(diff)
		}
	}
	// None of the prefixes that did fit has stayed: there is room.
	mustAttach(t, opts, p, rules)
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// So it is where the interface that is excluded is not the only one any more.
func TestPrivilegedFailedChangeOfExcluded(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	rules := testRules(p)
	rules.Flags |= bpf.ShuntPodFlagPOD_EXCLUDE_IF
	rules.Interface = "eth0"
	mustAttach(t, opts, p, rules)
	p.AddInterface(t, "net1", []string{"10.247.1.1"}, nil)
	changed := rules
	changed.UID = 4321
	if err := attach(t.Context(), opts, p, changed); !errors.Is(err, ErrInterfaces) || errors.Is(err, ErrNotUndone) {
		t.Errorf("attach: %v, want %v", err, ErrInterfaces)
	}
	if err := Check(t.Context(), opts, podID(p)); err != nil {
		t.Error(err)
	}
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// Rules that say other addresses than the pod has are known to, whenever it got them.
func TestPrivilegedOwnAddressesCompared(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	of := func() Rules {
		n, err := OpenNetns(p.NetnsPath())
		if err != nil {
			t.Fatal(err)
		}
		defer n.Close()
		rules := testRules(p)
		rules.Dests = nil
		for _, a := range n.Addrs {
			if a != passthrough6.Addr() {
				rules.Dests = append(rules.Dests, Dest{Prefix: netip.PrefixFrom(a, a.BitLen()), Flags: bpf.ShuntDestFlagDEST_LOCAL})
			}
		}
		return rules
	}
	expect := func(when string, rules Rules, known bool) {
		t.Helper()
		mustAttach(t, opts, p, rules)
		d, err := Open(t.Context(), opts)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		states, err := d.object(bpf.ShuntMapStates)
		if err != nil {
			t.Fatal(err)
		}
		cookie := p.NetnsCookie(t)
		var s bpf.ShuntPodState
		if err := lookup(states, &cookie, &s); err != nil {
			t.Fatal(err)
		}
		if (s.Generation == s.Compared) != known {
			t.Errorf("%s: the rules have the pod's addresses: %v", when, !known)
		}
	}
	before := of()
	expect("as they are", before, true)
	p.AddAddrs(t, "eth0", "10.246.1.1", "fd12::1")
	expect("one more than the rules have", before, false)
	expect("as they are again", of(), true)
	more := of()
	more.Dests = append(more.Dests, Dest{Prefix: netip.MustParsePrefix("10.246.1.2/32"), Flags: bpf.ShuntDestFlagDEST_LOCAL})
	expect("one less than the rules have", more, false)
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// What a security module forbids today it may allow tomorrow: only what the
// kernel can't do is conclusive.
func TestPrivilegedClassify(t *testing.T) {
	testbed.Privileged(t)
	verifier := func(cause error, log ...string) error {
		return fmt.Errorf("program x: %w", &cebpf.VerifierError{Cause: cause, Log: log})
	}
	for _, c := range []struct{ err, want error }{
		{verifier(unix.EACCES, "R1 invalid mem access"), ErrRefused},
		{verifier(unix.EINVAL, "unknown func bpf_x#300"), ErrRefused},
		{verifier(unix.EINVAL), ErrRefused},
		{cebpf.ErrNotSupported, ErrRefused},
		{verifier(unix.EACCES), ErrPermission},
		{unix.EACCES, ErrPermission},
		{unix.EPERM, ErrPermission},
		{verifier(unix.EPERM), ErrPermission},
		{unix.ENOMEM, unix.ENOMEM},
		{unix.EAGAIN, unix.EAGAIN},
	} {
		err := programs.Classify(c.err)
		if !errors.Is(err, c.want) || errors.Is(err, ErrRefused) != (c.want == ErrRefused) || errors.Is(err, ErrPermission) != (c.want == ErrPermission) { //nolint:errorlint // sentinels of the table
			t.Errorf("%v: got %v, want %v", c.err, err, c.want)
		}
	}
}

// While a pod goes from one set of rules to another, what either takes as a whole
// is taken; nothing else of it changes yet.
func TestPrivilegedWiden(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	rules := testRules(p)
	mustAttach(t, opts, p, rules)
	d, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	old, err := d.readRecord(podID(p))
	if err != nil || old == nil {
		t.Fatalf("record: %v, %v", old, err)
	}
	now := *old
	now.Rules.UID, now.Rules.Flags = 4321, bpf.ShuntPodFlagPOD_IN_ALL|bpf.ShuntPodFlagPOD_DNS
	if err := d.widen(old, &now); err != nil {
		t.Error(err)
	}
	pods, err := d.object(bpf.ShuntMapPods)
	if err != nil {
		t.Fatal(err)
	}
	var got bpf.ShuntPod
	if err := lookup(pods, &old.Cookie, &got); err != nil {
		t.Fatal(err)
	}
	want := rules
	want.Flags |= bpf.ShuntPodFlagPOD_IN_ALL
	if diff := cmp.Diff(want.pod(), got); diff != "" {
		t.Error(diff)
	}
	d.Close()
	mustAttach(t, opts, p, rules)
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// What is done to the datapath's directory does not make records stale.
func TestPrivilegedDirectoryTouched(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	dir := filepath.Join(opts.BPFDir, "datapath-"+bpf.Digest[:16])
	now := time.Now()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(dir, 0o700), os.Chown(dir, 1, 1), os.Chown(dir, 0, 0), os.Chtimes(dir, now, now)); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), opts, podID(p)); err != nil {
		t.Error(err)
	}
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// A failed Attach takes ::6 off lo again, unless it was there before.
func TestPrivilegedFailedAttachTakesPassthroughAway(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	opts.maxPrefixes = 1
	onLo := func() bool {
		ns, err := OpenNetns(p.NetnsPath())
		if err != nil {
			t.Fatal(err)
		}
		defer ns.Close()
		return slices.Contains(ns.Addrs, passthrough6.Addr())
	}
	if err := attach(t.Context(), opts, p, testRules(p)); err == nil {
		t.Fatal("attached in spite of a full map")
	}
	if onLo() {
		t.Error("::6 is left on lo")
	}
	p.Command(t, "ip", "-6", "addr", "add", "::6/128", "dev", "lo", "nodad")
	if err := attach(t.Context(), opts, p, testRules(p)); err == nil {
		t.Fatal("attached in spite of a full map")
	}
	if !onLo() {
		t.Error("somebody else's ::6 was taken off lo")
	}
	nothingLeft(t, opts)
}

// After a reboot the cookie may be another pod's.
func TestPrivilegedRecordOfEarlierBoot(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	d := &Datapath{opts: opts}
	r, err := d.readRecord(podID(p))
	if err != nil {
		t.Fatal(err)
	}
	stale := *r
	stale.ID = ID{"deadbeef", "eth0"}
	stale.Epoch = newEpoch()
	if err := d.writeRecord(&stale); err != nil {
		t.Fatal(err)
	}
	if err := Remove(t.Context(), opts, stale.ID); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), opts, podID(p)); err != nil {
		t.Errorf("the removal of an earlier boot's attachment hurt this boot's: %v", err)
	}
	mustRemove(t, opts, p)
	nothingLeft(t, opts)
}

// Two attachments of one network namespace (a standalone and a chained entry,
// say) share its programming until both are gone.
func TestPrivilegedTwoAttachmentsOfANetns(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	opts, p := node(t), testbed.NewPod(t)
	mustAttach(t, opts, p, testRules(p))
	second := *p
	second.ContainerID = "second"
	mustAttach(t, opts, &second, testRules(p))
	mustRemove(t, opts, p)
	if err := Check(t.Context(), opts, podID(&second)); err != nil {
		t.Errorf("the removal of one attachment hurt the other: %v", err)
	}
	mustRemove(t, opts, &second)
	nothingLeft(t, opts)
}

// tproxyState is what TPROXY mode changes in a pod's network namespace.
func tproxyState(t testing.TB, p *testbed.Pod) string {
	t.Helper()
	state := p.Command(t, "ip", "rule") + p.Command(t, "ip", "-6", "rule")
	if err := p.Do(func() error {
		for _, key := range []string{"ipv4/tcp_fwmark_accept", "ipv4/fwmark_reflect", "ipv6/fwmark_reflect"} {
			v, err := os.ReadFile("/proc/sys/net/" + key)
			if err != nil {
				return err
			}
			state += key + " " + string(v)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return state
}

func tproxyRules(p *testbed.Pod) Rules {
	r := testRules(p)
	r.Flags |= bpf.ShuntPodFlagPOD_TPROXY | bpf.ShuntPodFlagPOD_DNS
	return r
}

// A failed Attach, and the last of several attachments, leave the namespace as it
// was before the first.
func TestPrivilegedTProxyUndone(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	t.Run("failed", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t)
		opts.maxPrefixes = 1
		before := tproxyState(t, p)
		if err := attach(t.Context(), opts, p, tproxyRules(p)); err == nil {
			t.Fatal("attached in spite of a full map")
		}
		if got := tproxyState(t, p); got != before {
			t.Errorf("left behind:\n%s", got)
		}
		nothingLeft(t, opts)
	})
	t.Run("two attachments", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t, testbed.Sysctl("net.ipv6.fwmark_reflect", "1"))
		before := tproxyState(t, p)
		mustAttach(t, opts, p, tproxyRules(p))
		with := tproxyState(t, p)
		second := *p
		second.ContainerID = "second"
		mustAttach(t, opts, &second, tproxyRules(p))
		mustRemove(t, opts, p)
		if err := Check(t.Context(), opts, podID(&second)); err != nil {
			t.Error(err)
		}
		if got := tproxyState(t, p); got != with || with == before {
			t.Errorf("the removal of one attachment hurt the other:\n%s", got)
		}
		mustRemove(t, opts, &second)
		if got := tproxyState(t, p); got != before {
			t.Errorf("left behind:\n%s", got)
		}
		nothingLeft(t, opts)
	})
	// Remove has only the path by which the namespace was known.
	t.Run("namespace gone", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t)
		mustAttach(t, opts, p, tproxyRules(p))
		p.Destroy(t)
		mustRemove(t, opts, p)
		nothingLeft(t, opts)
	})
}

func TestPrivilegedHostNetns(t *testing.T) {
	testbed.Privileged(t)
	for _, path := range []string{"/proc/self/ns/net", "/proc/thread-self/ns/net"} {
		if _, err := OpenNetns(path); !errors.Is(err, ErrHostNetns) {
			t.Errorf("open %s: %v, want %v", path, err, ErrHostNetns)
		}
	}
	if _, err := OpenNetns(filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open a path that is not there: %v", err)
	}
	if _, err := OpenNetns("/proc/self/ns/mnt"); err == nil {
		t.Error("a mount namespace was taken for a network namespace")
	}
}

// Who holds the lock too long makes others give up in time, and say why.
func TestPrivilegedLockIsBounded(t *testing.T) {
	testbed.Privileged(t)
	opts := node(t)
	d, err := Open(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Open(ctx, opts); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "held by another shunt process") {
		t.Errorf("open while locked: %v", err)
	}
	d.Close()
	d, err = Open(t.Context(), opts)
	if err != nil {
		t.Fatalf("open after the lock was released: %v", err)
	}
	d.Close()
}

func TestPrivilegedNotABPFFS(t *testing.T) {
	testbed.Privileged(t)
	opts := node(t)
	opts.BPFDir = filepath.Join(t.TempDir(), "shunt")
	if _, err := Open(t.Context(), opts); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("open outside a bpffs: %v, want an error that says how to mount one", err)
	}
	if _, err := os.Stat(opts.BPFDir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("the directory was made all the same")
	}
}

// The record is written by hand and read by encoding/json.
func TestRecordEncoding(t *testing.T) {
	want := &Record{
		ID: ID{"0123abcd", "eth0"}, Network: "a \"name\"\n", Build: "datapath-1", Epoch: "epoch",
		Pod:    PodRef{"ns", "pöd", "uid"},
		Cookie: 1<<64 - 1, NetnsIno: 1<<32 - 1, Netns: "/var/run/netns/x", Cgroup: `/sys/fs/cgroup/a\b`, CgroupID: 1<<63 + 1,
		TProxy: &TProxy{IPv6: true, Sysctls: map[string]string{"ipv4/a": "0", "ipv4/b": "1"}},
		Rules: Rules{
			UID: 1, GID: 2, OutboundPort: 3, InboundPort: 4, TunnelPort: 5, DNSPort: 6, Flags: 7,
			Source4: netip.MustParseAddr("10.0.0.1"), Interface: `e"0`,
			Dests: []Dest{
				{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Flags: 1, Source: netip.MustParseAddr("10.0.0.2")},
				{Prefix: netip.MustParsePrefix("fd00::/8"), Flags: 2},
			},
			Ports: []Port{{1, 8080, 16, 3}, {0, 0, 0, 1}},
		},
	}
	got := new(Record)
	if err := json.Unmarshal(want.encode(), got); err != nil {
		t.Fatalf("%v in %s", err, want.encode())
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("what comes back differs (-want +got):\n%s", diff)
	}
	// Nothing was forgotten: every field of the type is in the sample.
	byReflection, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	again := new(Record)
	if err := json.Unmarshal(byReflection, again); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(again, got, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("what reflection writes differs (-reflection +by hand):\n%s", diff)
	}
}

// A record of a build that knew less is read.
func TestRecordOfEarlierBuild(t *testing.T) {
	r := &Record{ID: ID{"0123abcd", "eth0"}, Cookie: 5}
	text := r.encode()
	if strings.Contains(string(text), "TProxy") {
		t.Fatalf("an attachment without TPROXY mode says %s", text)
	}
	got := new(Record)
	if err := json.Unmarshal(text, got); err != nil || got.TProxy != nil || got.Cookie != 5 {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestRuleKeys(t *testing.T) {
	const cookie = 0x0102030405060708
	d := Dest{Prefix: netip.MustParsePrefix("10.1.0.0/16"), Flags: bpf.ShuntDestFlagDEST_LOCAL}.key(cookie)
	if d.Prefixlen != 64+96+16 || d.Cookie != [2]uint32{0x05060708, 0x01020304} || d.Addr.W != words(netip.MustParseAddr("::ffff:10.1.0.0")) {
		t.Errorf("key of an IPv4 prefix: %+v", d)
	}
	p := Port{Direction: bpf.ShuntDirectionDIR_IN, Port: 0x1f90, Bits: 12}.key(cookie)
	if p.Prefixlen != 64+16+12 || p.Direction != 1 || p.Port != order16(8080) {
		t.Errorf("key of a port block: %+v", p)
	}
}

func TestStale(t *testing.T) {
	prefix := func(s string) Dest { return Dest{Prefix: netip.MustParsePrefix(s)} }
	old := &Rules{Dests: []Dest{prefix("10.0.0.0/8"), prefix("10.1.0.0/16")}, Ports: []Port{{Port: 80, Bits: 16}, {Port: 0x2000, Bits: 4}}}
	now := &Rules{Dests: []Dest{prefix("10.1.0.0/16")}, Ports: []Port{{Port: 80, Bits: 16, Flags: 1}}}
	want := &Rules{Dests: old.Dests[:1], Ports: old.Ports[1:]}
	if diff := cmp.Diff(want, stale(old, now), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("stale (-want +got):\n%s", diff)
	}
}

// TestAttachTypes: they are named as others name them.
func TestAttachTypes(t *testing.T) {
	for _, h := range slices.Concat(hooks, dnsHooks, []hook{{"shunt_sk_lookup", attachSkLookup}, {"shunt_tc", attachTCXIngress}, {"none", 0x7777}}) {
		if want := cebpf.AttachType(h.attach).String(); h.attach.String() != want {
			t.Errorf("%s: %d is %v, not %s", h.program, h.attach, h.attach, want)
		}
	}
}
