// SPDX-License-Identifier: Apache-2.0

//go:build linux

package loader

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// sweptUntil sweeps until the attachments are gone that should go, and fails the test
// if another goes.
func sweptUntil(t *testing.T, opts Options, want ...ID) {
	t.Helper()
	var got []ID
	testbed.Eventually(t, "the kernel takes the links off", func() bool {
		more, err := Sweep(t.Context(), opts)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, more...)
		return len(got) >= len(want)
	})
	for _, id := range want {
		if !slices.Contains(got, id) {
			t.Errorf("attachment %v was not removed, but %v", id, got)
		}
	}
	if len(got) != len(want) {
		t.Errorf("removed: %v, want %v", got, want)
	}
}

// keeps fails the test if a sweep removes anything of an attachment.
func keeps(t *testing.T, opts Options, p *testbed.Pod) {
	t.Helper()
	if got, err := Sweep(t.Context(), opts); err != nil || len(got) > 0 {
		t.Errorf("sweep: %v, %v; want nothing removed", got, err)
	}
	if !Attached(opts, podID(p)) {
		t.Errorf("the record of %v is gone", podID(p))
	}
}

// detachAll takes the pinned links of a folder off their targets, and leaves the pins.
func detachAll(t *testing.T, dir string) {
	t.Helper()
	err := eachEntry(dir, func(path string) error {
		if isProgram(path) {
			return nil
		}
		l, err := getPin(path)
		if err != nil {
			return err
		}
		defer l.close()
		return l.detach()
	})
	if err != nil {
		t.Fatal(err)
	}
}

func linksOf(t *testing.T, opts Options, p *testbed.Pod) (netns, cgroup string) {
	t.Helper()
	d := newDatapath(opts)
	f, id, err := openCgroup(p.CgroupPath())
	if err != nil {
		t.Fatal(err)
	}
	f.close()
	return d.netnsLinks(p.NetnsCookie(t)), d.cgroupLinks(id)
}

// TestEachNameOfRemoved: a folder that goes between its opening and its listing has
// nothing in it. Who looks for garbage holds no lock.
func TestEachNameOfRemoved(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "netns")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := os.Remove(dir); err != nil {
		t.Fatal(err)
	}
	// To open it by its descriptor is to have it open: it is not there by a name.
	err = eachName(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), func(name string) error {
		t.Errorf("%s is in it", name)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// What is left of a pod whose DEL never came goes, and nothing else: pods that live
// keep all they have, whatever has become of their names.
func TestPrivilegedSweep(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, hook := range []InboundHook{SkLookup, TC} {
		t.Run("gone, by "+string(hook), func(t *testing.T) {
			opts, w := node(t), testbed.NewWorld(t)
			live, dead := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
			for _, p := range []*testbed.Pod{live, dead} {
				if err := attachWith(t.Context(), opts, p, tproxyRules(p), hook); err != nil {
					t.Fatal(err)
				}
			}
			keeps(t, opts, dead)
			dead.Destroy(t)
			dead.RemoveCgroup(t)
			sweptUntil(t, opts, podID(dead))
			if err := Check(t.Context(), opts, podID(live)); err != nil {
				t.Error(err)
			}
			mustRemove(t, opts, live)
			nothingLeft(t, opts)
		})
	}

	t.Run("sandbox recreated", func(t *testing.T) {
		opts, w := node(t), testbed.NewWorld(t)
		old := testbed.NewPod(t, testbed.InWorld(w))
		mustAttach(t, opts, old, testRules(old))
		netns, _ := linksOf(t, opts, old)
		old.Destroy(t)
		testbed.Eventually(t, "the namespace is gone", func() bool { end, err := ends(netns); return err == nil && end == gone })
		// Its cgroup lives: somebody else may have taken the links off.
		keeps(t, opts, old)
		now := testbed.NewPod(t, testbed.SandboxOf(old))
		mustAttach(t, opts, now, testRules(now))
		sweptUntil(t, opts, podID(old))
		if err := Check(t.Context(), opts, podID(now)); err != nil {
			t.Error(err)
		}
		mustRemove(t, opts, now)
		nothingLeft(t, opts)
	})

	t.Run("detached by hand", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t)
		mustAttach(t, opts, p, testRules(p))
		netns, cgroup := linksOf(t, opts, p)
		detachAll(t, netns)
		keeps(t, opts, p)
		detachAll(t, cgroup)
		keeps(t, opts, p) // its path leads to it
		mustAttach(t, opts, p, testRules(p))
		mustRemove(t, opts, p)
		nothingLeft(t, opts)
	})

	// A name leads to another pod by now: the cookie tells.
	t.Run("name taken", func(t *testing.T) {
		opts, w := node(t), testbed.NewWorld(t)
		live, dead := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
		mustAttach(t, opts, live, testRules(live))
		mustAttach(t, opts, dead, testRules(dead))
		d := newDatapath(opts)
		r, err := d.readRecord(podID(dead))
		if err != nil {
			t.Fatal(err)
		}
		r.Netns = live.NetnsPath()
		if err := d.writeRecord(r); err != nil {
			t.Fatal(err)
		}
		dead.Destroy(t)
		dead.RemoveCgroup(t)
		sweptUntil(t, opts, podID(dead))
		if err := Check(t.Context(), opts, podID(live)); err != nil {
			t.Error(err)
		}
		mustRemove(t, opts, live)
		nothingLeft(t, opts)
	})

	// What a path leads to can't be told, or it leads to what is none of the pod's.
	t.Run("paths", func(t *testing.T) {
		opts, w := node(t), testbed.NewWorld(t)
		untold, host, file := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
		plain := filepath.Join(t.TempDir(), "plain")
		if err := os.WriteFile(plain, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		d := newDatapath(opts)
		was := untold.NetnsPath()
		for p, path := range map[*testbed.Pod]string{untold: plain + "/below", host: "/proc/self/ns/net", file: plain} {
			mustAttach(t, opts, p, tproxyRules(p))
			r, err := d.readRecord(podID(p))
			if err != nil {
				t.Fatal(err)
			}
			r.Netns = path
			if err := d.writeRecord(r); err != nil {
				t.Fatal(err)
			}
			p.Destroy(t)
			p.RemoveCgroup(t)
		}
		var got []ID
		testbed.Eventually(t, "two of three go", func() bool {
			more, err := Sweep(t.Context(), opts)
			got = append(got, more...)
			return errors.Is(err, unix.ENOTDIR) && len(got) >= 2
		})
		if len(got) != 2 || slices.Contains(got, podID(untold)) || !Attached(opts, podID(untold)) {
			t.Errorf("removed: %v, want all but %v", got, podID(untold))
		}
		r, err := d.readRecord(podID(untold))
		if err != nil {
			t.Fatal(err)
		}
		r.Netns = was
		if err := d.writeRecord(r); err != nil {
			t.Fatal(err)
		}
		sweptUntil(t, opts, podID(untold))
		nothingLeft(t, opts)
	})

	t.Run("records lost", func(t *testing.T) {
		opts, w := node(t), testbed.NewWorld(t)
		live, dead := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
		mustAttach(t, opts, live, testRules(live))
		mustAttach(t, opts, dead, testRules(dead))
		netns, cgroup := linksOf(t, opts, dead)
		for _, dir := range []string{recordsDir, usersDir} {
			if err := os.RemoveAll(filepath.Join(opts.RunDir, dir)); err != nil {
				t.Fatal(err)
			}
		}
		before := entries(t, opts, "dests")
		dead.Destroy(t)
		dead.RemoveCgroup(t)
		testbed.Eventually(t, "what it had is gone", func() bool {
			if got, err := Sweep(t.Context(), opts); err != nil || len(got) > 0 {
				t.Fatalf("sweep: %v, %v", got, err)
			}
			_, err1 := os.Stat(netns)
			_, err2 := os.Stat(cgroup)
			return os.IsNotExist(err1) && os.IsNotExist(err2)
		})
		if now := entries(t, opts, "dests"); now != before/2 {
			t.Errorf("%d prefixes are left, want those of the pod that lives, %d", now, before/2)
		}
		mustAttach(t, opts, live, testRules(live))
		mustRemove(t, opts, live)
		nothingLeft(t, opts)
	})

	t.Run("second name, empty folder, other build", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t)
		mustAttach(t, opts, p, testRules(p))
		left := []string{
			filepath.Join(opts.RunDir, usersDir, "1.2.gone@eth0"),
			filepath.Join(opts.BPFDir, netnsLinks, strconv.Itoa(1<<40)),
			filepath.Join(opts.BPFDir, cgroupLinks, strconv.Itoa(1<<40)),
			filepath.Join(opts.BPFDir, datapathPrefix+"other"),
		}
		if err := os.WriteFile(left[0], nil, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, dir := range left[1:] {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		keeps(t, opts, p)
		for _, path := range left {
			if _, err := os.Lstat(path); !os.IsNotExist(err) {
				t.Errorf("%s is left: %v", path, err)
			}
		}
		if err := Check(t.Context(), opts, podID(p)); err != nil {
			t.Error(err)
		}
		mustRemove(t, opts, p)
		nothingLeft(t, opts)
	})

	t.Run("more than is removed at once", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t)
		mustAttach(t, opts, p, testRules(p))
		var left []string
		for i := range sweepAtOnce {
			for _, kind := range []string{netnsLinks, cgroupLinks} {
				left = append(left, filepath.Join(opts.BPFDir, kind, strconv.Itoa(1<<40+i)))
			}
		}
		for _, dir := range left {
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		// What can't be removed does not keep others from it.
		stuck := left[0]
		if err := os.MkdirAll(filepath.Join(stuck, stampPath("", 7), "within"), 0o700); err != nil {
			t.Fatal(err)
		}
		gone := func() (n int) {
			for _, dir := range left {
				if _, err := os.Lstat(dir); os.IsNotExist(err) {
					n++
				}
			}
			return n
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		if got, err := Sweep(ended, opts); !errors.Is(err, context.Canceled) || len(got) > 0 || gone() > 0 {
			t.Errorf("sweep that was ended: %v, %v; %d folders are gone", got, err, gone())
		}
		if got, err := Sweep(t.Context(), opts); err == nil || len(got) > 0 || gone() != len(left)-1 {
			t.Errorf("sweep: %v, %v; %d folders of %d are gone, want all but %s", got, err, gone(), len(left), stuck)
		}
		if err := os.RemoveAll(filepath.Join(stuck, stampPath("", 7))); err != nil {
			t.Fatal(err)
		}
		keeps(t, opts, p)
		mustRemove(t, opts, p)
		nothingLeft(t, opts)
	})

	t.Run("a record can't be read", func(t *testing.T) {
		opts, p := node(t), testbed.NewPod(t)
		mustAttach(t, opts, p, testRules(p))
		bad := filepath.Join(opts.RunDir, recordsDir, "bad@eth0.json")
		if err := os.WriteFile(bad, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		p.Destroy(t)
		p.RemoveCgroup(t)
		if got, err := Sweep(t.Context(), opts); err == nil || len(got) > 0 {
			t.Errorf("sweep: %v, %v; want an error, and nothing removed", got, err)
		}
		if err := os.Remove(bad); err != nil {
			t.Fatal(err)
		}
		sweptUntil(t, opts, podID(p))
		nothingLeft(t, opts)
	})
}

// Whatever is lost of a node, the next ADD makes it again, and DEL finds nothing amiss.
func TestPrivilegedAttachHeals(t *testing.T) {
	testbed.Privileged(t)
	testbed.NoLeaks(t)
	for _, c := range []struct {
		name string
		lose func(t *testing.T, opts Options, p *testbed.Pod)
	}{
		{"bpffs mounted anew", func(t *testing.T, opts Options, _ *testbed.Pod) {
			mount := filepath.Dir(opts.BPFDir)
			if err := unix.Unmount(mount, 0); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount("shunt-test", mount, "bpf", 0, "mode=0700"); err != nil {
				t.Fatal(err)
			}
		}},
		{"bpfDir removed", func(t *testing.T, opts Options, _ *testbed.Pod) {
			if err := os.RemoveAll(opts.BPFDir); err != nil {
				t.Fatal(err)
			}
		}},
		{"runDir removed", func(t *testing.T, opts Options, _ *testbed.Pod) {
			if err := os.RemoveAll(opts.RunDir); err != nil {
				t.Fatal(err)
			}
		}},
		{"a boot: both are gone", func(t *testing.T, opts Options, _ *testbed.Pod) {
			if err := errors.Join(os.RemoveAll(opts.RunDir), os.RemoveAll(opts.BPFDir)); err != nil {
				t.Fatal(err)
			}
		}},
		{"cgroup made anew", func(t *testing.T, _ Options, p *testbed.Pod) {
			p.RemoveCgroup(t)
			p.RemakeCgroup(t)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			opts, w := node(t), testbed.NewWorld(t)
			p, other := testbed.NewPod(t, testbed.InWorld(w)), testbed.NewPod(t, testbed.InWorld(w))
			mustAttach(t, opts, p, testRules(p))
			c.lose(t, opts, p)
			mustAttach(t, opts, other, testRules(other))
			mustAttach(t, opts, p, testRules(p))
			runs(t, opts, p, false)
			mustRemove(t, opts, other)
			mustRemove(t, opts, p)
			if _, err := Sweep(t.Context(), opts); err != nil {
				t.Error(err)
			}
			nothingLeft(t, opts)
		})
	}
}
