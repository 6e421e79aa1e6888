// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	uid  = "6c5a0f1e-2b7d-4c3a-9e8f-001122334455"
	unit = "6c5a0f1e_2b7d_4c3a_9e8f_001122334455" // as systemd has it
	hash = "0123456789abcdef0123456789abcdef"     // a static pod's
)

// tree makes directories below a new one that stands for the mount.
func tree(t *testing.T, dirs ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, d := range dirs {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestFindPodCgroup(t *testing.T) {
	const (
		cgroupfs = "kubepods/burstable/pod" + uid
		systemd  = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + unit + ".slice"
		kind     = "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + unit + ".slice"
	)
	for _, tc := range []struct {
		name, hint, uid string
		dirs            []string // the first is looked for, unless err
		err             string
	}{
		{name: "containerd's hint", hint: "/" + cgroupfs, dirs: []string{cgroupfs}},
		{name: "hint without slash", hint: cgroupfs + "/", dirs: []string{cgroupfs}},
		{name: "hint of systemd in full", hint: "/" + systemd, dirs: []string{systemd}},
		{name: "CRI-O's hint", hint: "kubepods-burstable-pod" + unit + ".slice", dirs: []string{systemd}},
		{name: "CRI-O's hint, with its container", hint: "kubepods-burstable-pod" + unit + ".slice:cri-o:0123abc", dirs: []string{systemd}},
		{name: "CRI-O's hint with a slash", hint: "/kubepods-burstable-pod" + unit + ".slice", dirs: []string{systemd}},
		{name: "CRI-O's hint on kind", hint: "kubelet-kubepods-besteffort-pod" + unit + ".slice", dirs: []string{kind}},
		{name: "hint with containers in it", hint: "/" + cgroupfs, dirs: []string{cgroupfs, cgroupfs + "/0123abcd", cgroupfs + "/crio-conmon-1.scope"}},
		{name: "bare CRI's hint", hint: "/sandboxes/one", dirs: []string{"sandboxes/one"}},
		{name: "hint wins", hint: "/elsewhere/pod" + uid, uid: uid, dirs: []string{"elsewhere/pod" + uid, cgroupfs}},

		{name: "burstable", uid: uid, dirs: []string{cgroupfs}},
		{name: "besteffort", uid: uid, dirs: []string{"kubepods/besteffort/pod" + uid}},
		{name: "guaranteed", uid: uid, dirs: []string{"kubepods/pod" + uid}},
		{name: "kind", uid: uid, dirs: []string{"kubelet/kubepods/pod" + uid}},
		{name: "systemd, burstable", uid: uid, dirs: []string{systemd}},
		{name: "systemd, besteffort", uid: uid, dirs: []string{"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + unit + ".slice"}},
		{name: "systemd, guaranteed", uid: uid, dirs: []string{"kubepods.slice/kubepods-pod" + unit + ".slice"}},
		{name: "kind, systemd", uid: uid, dirs: []string{kind}},
		{name: "kind, systemd, guaranteed", uid: uid, dirs: []string{"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + unit + ".slice"}},
		{name: "static pod", uid: hash, dirs: []string{"kubepods/burstable/pod" + hash}},
		{name: "static pod, systemd", uid: hash, dirs: []string{"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + hash + ".slice"}},
		{name: "hint leads nowhere", hint: "/none/pod" + uid, uid: uid, dirs: []string{cgroupfs}},
		{name: "hint is the root", hint: "/", uid: uid, dirs: []string{cgroupfs}},
		{name: "hint is above pods", hint: "/kubepods/burstable", uid: uid, dirs: []string{cgroupfs}},
		{name: "hint holds pods", hint: "/mine", uid: uid, dirs: []string{"mine/pod" + uid, "mine/pod" + hash}},

		{name: "cgroup root", uid: uid, dirs: []string{"a/b/c/kubepods/burstable/pod" + uid, "a/b/x", "system.slice/y"}},
		{name: "cgroup root, systemd", uid: uid, dirs: []string{"x.slice/x-kubepods.slice/x-kubepods-burstable.slice/x-kubepods-burstable-pod" + unit + ".slice"}},
		{name: "cgroup root whose name holds pods", uid: uid, dirs: []string{"my.slice/my-pods.slice/my-pods-kubepods.slice/my-pods-kubepods-pod" + unit + ".slice"}},

		{name: "nothing", uid: uid, dirs: []string{"kubepods/burstable"}, err: "looked for kubepods/burstable/pod" + uid + ", kubepods.slice/"},
		{name: "nothing known", dirs: []string{cgroupfs}, err: "nothing: neither K8S_POD_UID nor a usable cgroupPath was given"},
		{name: "only the root is hinted at", hint: "/", dirs: []string{cgroupfs}, err: "neither"},
		{name: "only a group is hinted at", hint: "/kubepods", dirs: []string{"kubepods"}, err: "kubepods (not the cgroup of one pod)"},
		{name: "empty group by slice", hint: "kubepods-burstable.slice", dirs: []string{"kubepods.slice/kubepods-burstable.slice"}, err: "(not the cgroup of one pod)"},
		{name: "hint escapes", hint: "/../../etc", dirs: []string{cgroupfs}, err: "neither"},
		{name: "hint escapes inside", hint: "/kubepods/../" + cgroupfs, dirs: []string{cgroupfs}, err: "neither"},
		{name: "another pod's directory", uid: uid, dirs: []string{"kubepods/pod" + hash + "/pod" + uid}, err: "down to 8 levels"},
		{name: "another pod's slice", uid: uid, dirs: []string{"kubepods.slice/kubepods-pod" + hash + ".slice/pod" + uid}, err: "down to 8 levels"},
		{name: "too deep", uid: uid, dirs: []string{"1/2/3/4/5/6/7/8/pod" + uid}, err: "down to 8 levels"},
		{name: "longer uid", uid: hash, dirs: []string{"kubepods/pod" + hash + "0"}, err: "no cgroup of the pod"},
		{name: "uid with a slash", uid: "a/b", dirs: []string{"kubepods/poda/b"}, err: `the pod UID "a/b" has characters that no UID has`},
		{name: "uid of dots", uid: "..", dirs: []string{cgroupfs}, err: `the pod UID ".."`},
		{name: "uid of blanks", uid: "a b", dirs: []string{cgroupfs}, err: `the pod UID "a b"`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := tree(t, tc.dirs...)
			got, err := FindPodCgroup(root, tc.hint, tc.uid)
			if tc.err != "" {
				if !errors.Is(err, ErrNoPodCgroup) || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %q, %v; want error %q", got, err, tc.err)
				}
				return
			}
			if want := filepath.Join(root, tc.dirs[0]); got != want || err != nil {
				t.Errorf("got %s, %v; want %s", got, err, want)
			}
		})
	}
}

// TestFindPodCgroupWholePath: a path with the mount point is one too.
func TestFindPodCgroupWholePath(t *testing.T) {
	root := tree(t, "kubepods/pod"+uid)
	want := filepath.Join(root, "kubepods/pod"+uid)
	if got, err := FindPodCgroup(root, want, ""); got != want || err != nil {
		t.Errorf("got %s, %v", got, err)
	}
}

// TestFindPodCgroupLinks: a link out of the tree is not followed.
func TestFindPodCgroupLinks(t *testing.T) {
	root, outside := tree(t, "kubepods"), tree(t, "pod"+uid)
	if err := os.Symlink(outside, filepath.Join(root, "kubepods", "burstable")); err != nil {
		t.Fatal(err)
	}
	if got, err := FindPodCgroup(root, "/kubepods/burstable/pod"+uid, uid); !errors.Is(err, ErrNoPodCgroup) {
		t.Errorf("got %s, %v", got, err)
	}
}

// TestFindPodCgroupBounded: a huge tree is not read to its end.
func TestFindPodCgroupBounded(t *testing.T) {
	var dirs []string
	for i := range maxWalkDirs {
		dirs = append(dirs, fmt.Sprintf("a/%d/b", i))
	}
	_, err := FindPodCgroup(tree(t, dirs...), "", uid)
	if !errors.Is(err, ErrNoPodCgroup) || !strings.Contains(err.Error(), "in the first 2048 directories") {
		t.Errorf("got %v", err)
	}
	if _, err := FindPodCgroup(filepath.Join(t.TempDir(), "none"), "", uid); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no mount: %v", err)
	}
}

func TestFindCgroup2Mount(t *testing.T) {
	const table = `22 1 0:21 / /proc rw,nosuid shared:12 - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
40 31 0:38 /sub /part rw,relatime - cgroup2 cgroup2 rw
41 31 0:38 / /mnt/a\040b rw,relatime shared:3 master:4 - cgroup2 none rw
`
	info := filepath.Join(t.TempDir(), "mountinfo")
	if err := os.WriteFile(info, []byte(table), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, root string
		cgroup2    []string // where cgroup2 is
		want, err  string
	}{
		{name: "configured", root: "/mine/", cgroup2: []string{"/mine/", "/first"}, want: "/mine"},
		{name: "configured wrongly", root: "/mine", cgroup2: []string{"/first"}, err: "cgroupRoot: /mine is not on a cgroup2 file system"},
		{name: "configured, not there", root: "/none", err: "cgroupRoot: file does not exist"},
		{name: "unified", cgroup2: []string{"/first", "/second"}, want: "/first"},
		{name: "hybrid", cgroup2: []string{"/second"}, want: "/second"},
		{name: "by the mount table", cgroup2: []string{"/mnt/a b", "/part"}, want: "/mnt/a b"},
		{name: "a part", cgroup2: []string{"/part"}, want: "/part"},
		{name: "nowhere", err: "neither at /first or /second nor anywhere in " + info},
	} {
		f := cgroupFinder{
			candidates: []string{"/first", "/second"}, mountinfo: info,
			isCgroup2: func(path string) (bool, error) {
				if path == "/none" {
					return false, fs.ErrNotExist
				}
				for _, p := range tc.cgroup2 {
					if p == path {
						return true, nil
					}
				}
				return false, nil
			},
		}
		got, err := f.mount(tc.root)
		if got != tc.want || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: got %q, %v; want %q, error %q", tc.name, got, err, tc.want, tc.err)
		}
	}
	f := cgroupFinder{mountinfo: filepath.Join(t.TempDir(), "none")}
	if _, err := f.mount(""); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no mount table: %v", err)
	}
}

// TestIsCgroup2 asks the kernel.
func TestIsCgroup2(t *testing.T) {
	if is, err := isCgroup2(t.TempDir()); is || err != nil {
		t.Errorf("a temporary directory: %v, %v", is, err)
	}
	if _, err := isCgroup2("/none/such"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
}

func TestExpandSlice(t *testing.T) {
	got := []string{expandSlice("a.slice"), expandSlice("a-b.slice"), expandSlice("a-b-c_d.slice")}
	want := []string{"a.slice", "a.slice/a-b.slice", "a.slice/a-b.slice/a-b-c_d.slice"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
