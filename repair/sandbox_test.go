// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A fakeCRI is a container runtime that has sandboxes, and nothing else.
type fakeCRI struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	socket string

	mu    sync.Mutex
	boxes []*runtimeapi.PodSandbox
	info  map[string]string // by sandbox
	hangs bool
	fails error
	asked int
}

// startCRI serves one on a socket of the test's.
func startCRI(t testing.TB) *fakeCRI {
	t.Helper()
	dir, err := os.MkdirTemp("", "cri") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeCRI{socket: filepath.Join(dir, "cri.sock"), info: map[string]string{}}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(s, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		<-done
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return f
}

// add gives a pod a sandbox.
func (f *fakeCRI) add(namespace, name, uid, id, info string, state runtimeapi.PodSandboxState, created time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.boxes = append(f.boxes, &runtimeapi.PodSandbox{
		Id: id, State: state, CreatedAt: created.UnixNano(), Labels: map[string]string{labelPodUID: uid},
		Metadata: &runtimeapi.PodSandboxMetadata{Namespace: namespace, Name: name, Uid: uid},
	})
	f.info[id] = info
}

func (f *fakeCRI) remove(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, b := range f.boxes {
		if b.Id == id {
			f.boxes = append(f.boxes[:i:i], f.boxes[i+1:]...)
			return
		}
	}
}

func (f *fakeCRI) wait(ctx context.Context) error {
	f.mu.Lock()
	f.asked++
	hangs, fails := f.hangs, f.fails
	f.mu.Unlock()
	if hangs {
		<-ctx.Done()
		return ctx.Err()
	}
	return fails
}

func (f *fakeCRI) ListPodSandbox(ctx context.Context, q *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	if err := f.wait(ctx); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var r runtimeapi.ListPodSandboxResponse
	for _, b := range f.boxes {
		if x := q.GetFilter(); x != nil && (x.State != nil && x.State.State != b.State || x.LabelSelector[labelPodUID] != b.Labels[labelPodUID]) {
			continue
		}
		r.Items = append(r.Items, b)
	}
	return &r, nil
}

func (f *fakeCRI) PodSandboxStatus(ctx context.Context, q *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	if err := f.wait(ctx); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r := &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Id: q.PodSandboxId}}
	if q.Verbose {
		r.Info = map[string]string{"info": f.info[q.PodSandboxId]}
	}
	return r, nil
}

const (
	ready    = runtimeapi.PodSandboxState_SANDBOX_READY
	notReady = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
)

// containerdInfo is what containerd says of a sandbox, as far as it matters.
func containerdInfo(pid int, netns string) string {
	return fmt.Sprintf(`{"pid":%d,"processStatus":"running","netNamespaceClosed":false,"image":"registry/pause:3.10","runtimeType":"io.containerd.runc.v2",`+
		`"config":{"metadata":{"name":"x"}},"runtimeSpec":{"ociVersion":"1.2.0","process":{"args":["/pause"]},"linux":{"namespaces":[`+
		`{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"mount"},{"type":"network","path":%q}]}},"cniResult":{"Interfaces":{}}}`, pid, netns)
}

func TestParseInfo(t *testing.T) {
	for _, tc := range []struct {
		name, info string
		netns      string
		pid        int
		fails      string
	}{
		{name: "containerd", info: containerdInfo(4711, "/var/run/netns/cni-1"), netns: "/var/run/netns/cni-1", pid: 4711},
		{name: "containerd 2, a sandbox without an OCI runtime", info: `{"pid":0,"sandboxMetadata":{"Version":"v1","Metadata":{"ID":"x","NetNSPath":"/var/run/netns/cni-2"}}}`, netns: "/var/run/netns/cni-2"},
		{name: "CRI-O", info: `{"image":"pause","pid":815,"runtimeSpec":{"annotations":{"io.kubernetes.cri-o.Labels":"{}"},"linux":{"namespaces":[{"type":"pid"},{"type":"network","path":"/var/run/netns/3b"}]}}}`, netns: "/var/run/netns/3b", pid: 815},
		{name: "a process alone", info: `{"pid":5,"runtimeSpec":{"linux":{"namespaces":[{"type":"network"}]}}}`, pid: 5},
		{name: "neither", info: `{"runtimeSpec":{}}`, fails: "neither a network namespace nor a process"},
		{name: "no JSON", info: `pid 5`, fails: "not understood"},
	} {
		netns, pid, err := parseInfo(map[string]string{"info": tc.info})
		if netns != tc.netns || pid != tc.pid || (err != nil) != (tc.fails != "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
			t.Errorf("%s: %q, %d, %v", tc.name, netns, pid, err)
		}
	}
	if _, _, err := parseInfo(nil); err == nil {
		t.Error("a runtime that says nothing was understood")
	}
}

// TestFind asks a runtime.
func TestFind(t *testing.T) {
	cri, dir := startCRI(t), t.TempDir()
	netns := filepath.Join(dir, "cni-1")
	if err := os.WriteFile(netns, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pod := broken("x")
	f := &finder{socket: cri.socket, proc: filepath.Join(dir, "proc"), log: slog.New(slog.DiscardHandler)}
	defer f.close()
	now := time.Now()
	cri.add("shop", "other", "uid-other", "other", containerdInfo(1, netns), ready, now)
	cri.add("shop", "x", "uid-x", "first", containerdInfo(1, netns), notReady, now.Add(time.Hour))
	if _, err := f.find(t.Context(), pod); !errors.Is(err, errNoSandbox) {
		t.Errorf("a pod whose sandbox has ended: %v", err)
	}
	cri.add("shop", "x", "uid-x", "third", containerdInfo(1, netns), ready, now.Add(2*time.Second))
	cri.add("shop", "x", "uid-x", "second", containerdInfo(1, "/nosuch"), ready, now.Add(time.Second))
	got, err := f.find(t.Context(), pod)
	if err != nil || got.ID != "third" || got.Netns != netns || !got.Since.Equal(now.Add(2*time.Second).Truncate(0)) {
		t.Errorf("%+v, %v", got, err)
	}
	all, err := f.all(t.Context())
	if err != nil || len(all) != 4 || !all["first"] {
		t.Errorf("%v, %v", all, err)
	}
	// A static pod bears another UID on its node.
	static := broken("s", func(p *corev1.Pod) {
		p.Annotations["kubernetes.io/config.hash"], p.Annotations["kubernetes.io/config.mirror"] = "0123456789abcdef", "0123456789abcdef"
	})
	cri.add("shop", "s", "0123456789abcdef", "static", containerdInfo(1, netns), ready, now)
	if got, err := f.find(t.Context(), static); err != nil || got.ID != "static" {
		t.Errorf("%+v, %v", got, err)
	}
	// A pod that gives itself the UID of another is not that one, with the mark of
	// a mirror or without.
	for _, key := range []string{"", "kubernetes.io/config.mirror"} {
		thief := broken("thief", func(p *corev1.Pod) {
			p.Annotations["kubernetes.io/config.hash"], p.Annotations[key] = "uid-x", "uid-x"
		})
		if got, err := f.find(t.Context(), thief); !errors.Is(err, errNoSandbox) {
			t.Errorf("the sandbox of another pod was found by an annotation: %+v, %v", got, err)
		}
	}
	// A namespace that can't be seen.
	hidden := broken("h")
	cri.add("shop", "h", "uid-h", "hidden", containerdInfo(7, "/nosuch/netns"), ready, now)
	if _, err := f.find(t.Context(), hidden); err == nil || !strings.Contains(err.Error(), `neither "/nosuch/netns" nor that of process 7: mount /run/netns`) {
		t.Errorf("a namespace that can't be seen: %v", err)
	}

	// A runtime that hangs is not asked for every pod.
	cri.mu.Lock()
	cri.hangs, cri.asked = true, 0
	cri.mu.Unlock()
	start := time.Now()
	for range 10 {
		if _, err := f.find(t.Context(), pod); err == nil || errors.Is(err, errNoSandbox) {
			t.Errorf("a runtime that hangs: %v", err)
		}
	}
	cri.mu.Lock()
	if took := time.Since(start); took > 2*criTimeout || cri.asked != 1 {
		t.Errorf("it was asked %d times, in %v", cri.asked, took)
	}
	// Nor is one that says itself, and before us, that the time is over.
	cri.hangs, cri.fails, cri.asked = false, status.Error(codes.DeadlineExceeded, "late"), 0
	f.rest = time.Time{}
	cri.mu.Unlock()
	for range 3 {
		if _, err := f.find(t.Context(), pod); err == nil || !strings.Contains(err.Error(), "late") {
			t.Errorf("a runtime that says that it hangs: %v", err)
		}
	}
	cri.mu.Lock()
	defer cri.mu.Unlock()
	if cri.asked != 1 {
		t.Errorf("it was asked %d times", cri.asked)
	}
	none := &finder{socket: filepath.Join(dir, "nosuch"), proc: "/nosuch", log: f.log}
	if _, err := none.find(t.Context(), pod); err == nil || !strings.Contains(err.Error(), "--cri-socket") {
		t.Errorf("no socket: %v", err)
	}
}

// A tree is a /proc of the test's own.
type tree string

func (r tree) add(t *testing.T, pid int, cgroup, netns string) {
	t.Helper()
	dir := filepath.Join(string(r), strconv.Itoa(pid))
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "ns"), 0o700), os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o600),
		os.Symlink(netns, filepath.Join(dir, "ns", "net")))
	if err != nil {
		t.Fatal(err)
	}
}

func TestScan(t *testing.T) {
	const uid = "5a0b5c2e-7f0d-4a43-8d0e-3f6b6f0e9a77"
	pause, app, other := strings.Repeat("a", 64), strings.Repeat("b", 64), strings.Repeat("c", 64)
	pod := broken("x", func(p *corev1.Pod) {
		p.UID = uid
		p.Status.InitContainerStatuses[0].LastTerminationState.Terminated.ContainerID = "containerd://" + app
	})
	under := strings.ReplaceAll(uid, "-", "_")
	for _, tc := range []struct {
		name  string
		procs []string // cgroup, netns
		pid   int      // the sandbox's
		fails string
	}{
		{name: "cgroupfs", procs: []string{"0::/kubepods/burstable/pod" + uid + "/" + pause + "\n", "net:[2]"}, pid: 2},
		{name: "systemd, containerd", procs: []string{
			"0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + under + ".slice/cri-containerd-" + pause + ".scope\n", "net:[2]",
		}, pid: 2},
		{name: "systemd, CRI-O, seen from another cgroup namespace", procs: []string{
			"0::/../../kubepods-burstable-pod" + under + ".slice/crio-" + pause + ".scope/container\n", "net:[2]",
		}, pid: 2},
		{name: "cgroup v1", procs: []string{"12:cpuset:/\n3:pids:/kubepods/pod" + uid + "/" + pause + "\n0::/\n", "net:[2]"}, pid: 2},
		{name: "with an init container", procs: []string{
			"0::/kubepods/pod" + uid + "/" + app, "net:[2]", "0::/kubepods/pod" + uid + "/" + pause, "net:[2]",
		}, pid: 3},
		{name: "none", fails: errNoSandbox.Error()},
		{name: "another pod's", procs: []string{"0::/kubepods/pod" + uid[:35] + "0/" + pause, "net:[2]", "0::/kubepods/podx" + uid + "/" + pause, "net:[2]"}, fails: errNoSandbox.Error()},
		{name: "no sandbox", procs: []string{"0::/kubepods/pod" + uid + "/" + app, "net:[2]"}, fails: "none of the pod's processes is its sandbox's"},
		{name: "two", procs: []string{
			"0::/kubepods/pod" + uid + "/" + pause, "net:[2]", "0::/kubepods/pod" + uid + "/" + other, "net:[3]",
		}, fails: "process 2 may be its sandbox's, and process 3 too"},
		{name: "the host's network", procs: []string{"0::/kubepods/pod" + uid + "/" + pause, "net:[1]"}, fails: "host's network namespace"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			proc := tree(t.TempDir())
			proc.add(t, 1, "0::/init.scope\n", "net:[1]")
			for i := 0; i+1 < len(tc.procs); i += 2 {
				proc.add(t, 2+i/2, tc.procs[i], tc.procs[i+1])
			}
			got, err := scan(string(proc), pod)
			if tc.fails != "" {
				if err == nil || !strings.Contains(err.Error(), tc.fails) {
					t.Errorf("%+v, %v", got, err)
				}
				return
			}
			if want := filepath.Join(string(proc), strconv.Itoa(tc.pid), "ns", "net"); err != nil || got.ID != pause || got.Netns != want {
				t.Errorf("%+v, %v; want %s", got, err, want)
			}
		})
	}
	if _, err := scan(t.TempDir(), pod); err == nil || !strings.Contains(err.Error(), "share the host's process ids") {
		t.Errorf("no process 1: %v", err)
	}
}
