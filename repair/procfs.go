// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// scan finds a pod's sandbox by its processes: a process whose cgroup's path
// names the pod is one of it. That of the sandbox is the one whose container the
// pod's status does not know.
func scan(proc string, pod *corev1.Pod) (*sandbox, error) {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return nil, err
	}
	known := map[string]bool{}
	for _, list := range [][]corev1.ContainerStatus{
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses,
	} {
		for _, s := range list {
			for _, id := range []string{s.ContainerID, terminatedID(s.State), terminatedID(s.LastTerminationState)} {
				if _, bare, ok := strings.Cut(id, "://"); ok {
					known[bare] = true
				}
			}
		}
	}
	// Process 1's may be hidden from us; the rules have let alone what has the
	// host's network, and whoever programs a namespace looks again.
	host, err := os.Readlink(filepath.Join(proc, "1", "ns", "net"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("tell the host's network namespace: %w: share the host's process ids", err)
	}
	var of []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !e.IsDir() {
			continue
		}
		cgroup, err := os.ReadFile(filepath.Join(proc, e.Name(), "cgroup"))
		if err != nil || !namesPod(string(cgroup), nodeUID(pod)) {
			continue // of another, or it has ended
		}
		netns, err := os.Readlink(filepath.Join(proc, e.Name(), "ns", "net"))
		if err != nil {
			continue
		}
		if netns == host {
			return nil, fmt.Errorf("process %d of the pod is in the host's network namespace", pid)
		}
		id := containerOf(string(cgroup))
		of = append(of, process{pid, id, netns, id != "" && !known[id]})
	}
	if len(of) == 0 {
		return nil, errNoSandbox
	}
	slices.SortFunc(of, func(a, b process) int { return cmp.Compare(a.pid, b.pid) })
	i := slices.IndexFunc(of, func(p process) bool { return p.sandbox })
	if i < 0 {
		return nil, errors.New("none of the pod's processes is its sandbox's, whose id the attachment must have: name the container runtime's socket by --cri-socket")
	}
	s := of[i]
	for _, p := range of {
		if p.sandbox && (p.container != s.container || p.netns != s.netns) {
			return nil, fmt.Errorf("process %d may be its sandbox's, and process %d too: name the container runtime's socket by --cri-socket", s.pid, p.pid)
		}
	}
	return &sandbox{ID: s.container, Netns: filepath.Join(proc, strconv.Itoa(s.pid), "ns", "net"), By: proc}, nil
}

// A process is one of a pod's.
type process struct {
	pid       int
	container string
	netns     string // as /proc links it
	sandbox   bool
}

func terminatedID(s corev1.ContainerState) string {
	if s.Terminated == nil {
		return ""
	}
	return s.Terminated.ContainerID
}

// namesPod reports whether one of a process's cgroups (cgroups(7)) is the pod's
// or below it: pod<UID> by the kubelet's cgroupfs driver, …-pod<UID with _ for
// ->.slice by its systemd driver.
func namesPod(cgroups, uid string) bool {
	unit := "-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	for line := range strings.Lines(cgroups) {
		for part := range strings.SplitSeq(cgroupPath(line), "/") {
			if part == "pod"+uid || strings.HasSuffix(part, unit) {
				return true
			}
		}
	}
	return false
}

// cgroupPath takes the path from a line of /proc/PID/cgroup.
func cgroupPath(line string) string {
	fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
	if len(fields) < 3 {
		return ""
	}
	return fields[2]
}

// containerOf takes the container's id from a process's cgroups: their last part
// is the id itself, or cri-containerd-ID.scope, crio-ID.scope.
func containerOf(cgroups string) string {
	for line := range strings.Lines(cgroups) {
		for p := cgroupPath(line); p != "/" && p != "." && p != ""; p = path.Dir(p) {
			name := strings.TrimSuffix(path.Base(p), ".scope")
			if i := strings.LastIndexByte(name, '-'); i >= 0 {
				name = name[i+1:]
			}
			if isContainerID(name) {
				return name
			}
		}
	}
	return ""
}

// isContainerID reports whether s is as runtimes name containers.
func isContainerID(s string) bool {
	return len(s) == 64 && strings.Trim(s, "0123456789abcdef") == ""
}
