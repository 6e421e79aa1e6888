// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A cgroupFinder finds cgroup2 directories. Its fields are what a test on a
// tree of plain directories replaces.
type cgroupFinder struct {
	isCgroup2  func(path string) (bool, error)
	candidates []string // usual mount points, tried before the mount table
	mountinfo  string   // path of the mount table
}

var hostCgroups = cgroupFinder{
	isCgroup2:  isCgroup2,
	candidates: []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"},
	mountinfo:  "/proc/self/mountinfo",
}

func isCgroup2(path string) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	return st.Type == unix.CGROUP2_SUPER_MAGIC, nil
}

// FindCgroup2Mount returns the absolute path where cgroup2 is mounted. A root
// that is not empty is the administrator's: it is checked and nothing else is
// tried. Otherwise the usual places are tried, then this process's mounts.
func FindCgroup2Mount(root string) (string, error) {
	return hostCgroups.mount(root)
}

func (f *cgroupFinder) mount(root string) (string, error) {
	if root != "" {
		is, err := f.isCgroup2(root)
		if err != nil {
			return "", fmt.Errorf("find cgroup2 mount: %w: cgroupRoot: %w", ErrNoCgroup2, err)
		}
		if !is {
			return "", fmt.Errorf("find cgroup2 mount: %w: cgroupRoot: %s is not on a cgroup2 file system", ErrNoCgroup2, root)
		}
		return filepath.Clean(root), nil
	}
	for _, dir := range f.candidates {
		if is, err := f.isCgroup2(dir); err == nil && is {
			return dir, nil
		}
	}
	table, err := os.Open(f.mountinfo)
	if err != nil {
		return "", fmt.Errorf("find cgroup2 mount: %w", err)
	}
	defer table.Close()
	dirs, err := cgroup2Mounts(table)
	if err != nil {
		return "", fmt.Errorf("find cgroup2 mount: read %s: %w", f.mountinfo, err)
	}
	for _, dir := range dirs {
		// Another file system may have been mounted over it since.
		if is, err := f.isCgroup2(dir); err == nil && is {
			return dir, nil
		}
	}
	return "", fmt.Errorf("find cgroup2 mount: %w: it is mounted neither at %s nor anywhere in %s: mount it, or name the place by cgroupRoot",
		ErrNoCgroup2, strings.Join(f.candidates, " or "), f.mountinfo)
}

// cgroup2Mounts returns the mount points of cgroup2 in a mount table (see
// proc_pid_mountinfo(5)), those of the whole hierarchy first.
func cgroup2Mounts(table io.Reader) ([]string, error) {
	var whole, parts []string
	lines := bufio.NewScanner(table)
	lines.Buffer(nil, 1<<20) // an overlay's options make long lines
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(before)
		if fstype, _, _ := strings.Cut(after, " "); !ok || len(fields) < 5 || fstype != "cgroup2" {
			continue
		}
		point := unescapeMount(fields[4])
		if fields[3] == "/" {
			whole = append(whole, point)
		} else {
			parts = append(parts, point)
		}
	}
	return append(whole, parts...), lines.Err()
}

// Cgroup1Mounts returns where hierarchies of version 1 are mounted, by a mount table.
func Cgroup1Mounts(mountinfo string) (points []string, err error) {
	table, err := os.ReadFile(mountinfo)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(table)) {
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if ok && len(fields) >= 5 && strings.HasPrefix(after, "cgroup ") {
			points = append(points, unescapeMount(fields[4]))
		}
	}
	return points, nil
}

// unescapeMount undoes the octal escapes that the kernel writes for blanks,
// tabs, newlines, backslashes and hashes.
func unescapeMount(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#").Replace(s)
}

// FindPodCgroup returns the absolute path of a pod's own cgroup below mount,
// which is where cgroup2 is mounted. hint is what the runtime says
// (runtimeConfig.cgroupPath): a path without the mount point (containerd), or
// a systemd slice, with or without its parents (CRI-O). Where it is empty or
// leads nowhere, the cgroup is looked for by the pod's UID: in the layouts
// that kubelets make, then in the tree as deep as a kubelet's --cgroup-root
// may go. Either of hint and podUID may be empty.
//
// The error is an ErrNoPodCgroup that lists what was looked for, or says that
// the UID is none. A cgroup that holds more than this pod is never returned.
func FindPodCgroup(mount, hint, podUID string) (string, error) {
	if podUID != "" && !isPodUID(podUID) {
		return "", fmt.Errorf("find pod cgroup: %w: the pod UID %q has characters that no UID has", ErrNoPodCgroup, podUID)
	}
	root, err := os.OpenRoot(mount) // nothing below can lead out of it
	if err != nil {
		return "", fmt.Errorf("find pod cgroup: %w", err)
	}
	defer root.Close()
	var tried []string
	within := strings.TrimPrefix(hint, filepath.Clean(mount)+"/") // `shunt apply` may name the whole path
	for _, rel := range slices.Concat(hintPaths(within), uidPaths(podUID)) {
		st, err := root.Stat(rel)
		switch {
		case err == nil && st.IsDir() && !holdsPods(root, rel):
			return filepath.Join(mount, rel), nil
		case err == nil:
			tried = append(tried, rel+" (not the cgroup of one pod)")
		case errors.Is(err, fs.ErrNotExist):
			tried = append(tried, rel)
		default:
			tried = append(tried, fmt.Sprintf("%s (%v)", rel, err))
		}
	}
	if podUID != "" {
		rel, scope := walkForPod(root, podUID)
		if rel != "" {
			return filepath.Join(mount, rel), nil
		}
		tried = append(tried, scope)
	}
	if len(tried) == 0 {
		tried = []string{"nothing: neither K8S_POD_UID nor a usable cgroupPath was given"}
	}
	return "", fmt.Errorf("find pod cgroup: %w (uid %q, cgroupPath %q) under %s: looked for %s",
		ErrNoPodCgroup, podUID, hint, mount, strings.Join(tried, ", "))
}

// isPodUID reports whether s can be part of a cgroup's name: a UUID, a static
// pod's 32 hexadecimal digits, or what a runtime without a kubelet makes up.
func isPodUID(s string) bool {
	if len(s) > 128 || strings.Trim(s, ".") == "" {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.") == ""
}

// hintPaths returns the paths below the mount that a runtime's cgroupPath may
// stand for, likeliest first.
func hintPaths(hint string) []string {
	// runc's form for systemd is slice:prefix:name, of which the slice is the
	// pod's; a kubelet's cgroups have no colon.
	hint, _, _ = strings.Cut(hint, ":")
	if strings.ContainsRune(hint, 0) || slices.Contains(strings.Split(hint, "/"), "..") {
		return nil
	}
	rel := strings.TrimPrefix(path.Clean("/"+hint), "/")
	if rel == "" {
		return nil
	}
	paths := []string{rel}
	if base := path.Base(rel); strings.HasSuffix(base, ".slice") {
		if full := expandSlice(base); full != rel {
			paths = append(paths, full)
		}
	}
	return paths
}

// expandSlice returns the path of a systemd slice: the dashes in its name are
// its parents (systemd.slice(5)). a-b.slice lies in a.slice.
func expandSlice(name string) string {
	var dirs []string
	for i := range name {
		if name[i] == '-' && i > 0 {
			dirs = append(dirs, name[:i]+".slice")
		}
	}
	return path.Join(append(dirs, name)...)
}

// uidPaths returns where kubelets put a pod's cgroup, by their cgroup driver
// (cgroupfs, systemd), their root (none, and kind's) and the pod's QoS class
// (guaranteed pods lie beside the two other classes).
func uidPaths(uid string) []string {
	if uid == "" {
		return nil
	}
	unit := strings.ReplaceAll(uid, "-", "_") // dashes would be parents
	var paths []string
	for _, class := range []string{"burstable", "besteffort", ""} {
		slice := "kubepods"
		if class != "" {
			slice += "-" + class
		}
		slice += "-pod" + unit + ".slice"
		for _, prefix := range []string{"", "kubelet"} {
			paths = append(paths, path.Join(prefix, "kubepods", class, "pod"+uid))
			if prefix != "" {
				slice = prefix + "-" + slice
			}
			paths = append(paths, expandSlice(slice))
		}
	}
	return paths
}

// isPodDir reports whether a cgroup of that name is a pod's, by either driver.
func isPodDir(name string) bool {
	if slice, ok := strings.CutSuffix(name, ".slice"); ok {
		// A slice's last part is its own, the rest names its parents.
		name = slice[strings.LastIndex(slice, "-")+1:]
	}
	id, ok := strings.CutPrefix(name, "pod")
	return ok && strings.ContainsAny(id, "0123456789")
}

// groups are cgroups above the pods', which hold pods even when they look
// empty: programs attached there would run for every pod to come.
var groups = []string{
	"kubepods", "burstable", "besteffort", "guaranteed", "kubelet",
	"kubepods.slice", "kubepods-burstable.slice", "kubepods-besteffort.slice",
	"kubelet.slice", "kubelet-kubepods.slice", "kubelet-kubepods-burstable.slice", "kubelet-kubepods-besteffort.slice",
	"system.slice", "user.slice", "machine.slice", "init.scope",
}

// holdsPods reports whether the cgroup at rel is one above the pods'.
func holdsPods(root *os.Root, rel string) bool {
	if slices.Contains(groups, path.Base(rel)) {
		return true
	}
	if isPodDir(path.Base(rel)) {
		return false // the usual case is spared the reading
	}
	subs, err := subdirs(root, rel)
	return err != nil || slices.ContainsFunc(subs, isPodDir)
}

// subdirs returns the names of the directories in rel. Links are none.
func subdirs(root *os.Root, rel string) ([]string, error) {
	dir, err := root.Open(rel)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// What a walk may cost: the ADD of a pod waits for it.
const (
	maxWalkDepth = 8    // levels below the mount
	maxWalkDirs  = 2048 // directories read
)

// walkForPod looks for the pod's cgroup breadth first, and never into that of
// another pod. It returns "" when there is none, and always what it searched.
func walkForPod(root *os.Root, uid string) (rel, scope string) {
	literal, unit := "pod"+uid, "pod"+strings.ReplaceAll(uid, "-", "_")+".slice"
	level := []string{"."}
	read := 0
	for range maxWalkDepth {
		var next []string
		for _, dir := range level {
			if read++; read > maxWalkDirs {
				return "", fmt.Sprintf("%s and *-%s in the first %d directories of the tree", literal, unit, maxWalkDirs)
			}
			subs, err := subdirs(root, dir)
			if err != nil {
				continue // gone meanwhile
			}
			for _, sub := range subs {
				at := path.Join(dir, sub)
				switch {
				case sub == literal || sub == unit || strings.HasSuffix(sub, "-"+unit):
					return at, ""
				case !isPodDir(sub):
					next = append(next, at)
				}
			}
		}
		level = next
	}
	return "", fmt.Sprintf("%s and *-%s down to %d levels", literal, unit, maxWalkDepth)
}
