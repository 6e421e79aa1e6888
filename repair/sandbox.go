// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A sandbox is what a pod runs in.
type sandbox struct {
	ID    string // by which the runtime calls the plugin: CNI_CONTAINERID
	Netns string // path of its network namespace
	Since time.Time
	By    string // who has told, for the log
}

// errNoSandbox says that a pod has no sandbox that runs: there is nothing that
// could be mended.
var errNoSandbox = errors.New("the pod has no sandbox that runs")

// usualSockets are where runtimes listen, likeliest first.
var usualSockets = []string{
	"/run/containerd/containerd.sock",
	"/run/crio/crio.sock",
	"/run/k3s/containerd/containerd.sock",
	"/run/cri-dockerd.sock",
	"/var/run/containerd/containerd.sock",
	"/var/run/crio/crio.sock",
}

const (
	criTimeout  = 5 * time.Second
	criRest     = 10 * time.Second
	maxCRI      = 16 << 20 // bytes of an answer
	labelPodUID = "io.kubernetes.pod.uid"
)

// A finder finds the sandboxes of a node: it asks the runtime, and where that
// can't be asked, looks at the processes.
type finder struct {
	socket string // empty: the usual places
	proc   string // where procfs is
	log    *slog.Logger

	conn *grpc.ClientConn
	at   string // what conn leads to
	// Until then the runtime is not asked: it has not answered in time.
	rest time.Time
	why  error
}

// find gives the pod's sandbox. It fails with errNoSandbox where none runs.
func (f *finder) find(ctx context.Context, pod *corev1.Pod) (*sandbox, error) {
	s, err := f.ask(ctx, pod)
	if err == nil || errors.Is(err, errNoSandbox) {
		return s, err
	}
	s, err2 := scan(f.proc, pod)
	if err2 != nil {
		if errors.Is(err2, errNoSandbox) {
			// Who can't see the processes can't tell either.
			return nil, fmt.Errorf("%w; by %s: no process of the pod is to be seen", err, f.proc)
		}
		return nil, fmt.Errorf("%w; by %s: %w", err, f.proc, err2)
	}
	f.log.Warn("the container runtime can't be asked: the pod was found by its processes", "pod", nameOf(pod), "error", err)
	return s, nil
}

// runtime connects to the runtime.
func (f *finder) runtime() (runtimeapi.RuntimeServiceClient, error) {
	places := usualSockets
	if f.socket != "" {
		places = []string{strings.TrimPrefix(f.socket, "unix://")}
	}
	at := ""
	for _, p := range places {
		if st, err := os.Stat(p); err == nil && st.Mode().Type() == fs.ModeSocket {
			at = p
			break
		}
	}
	if at == "" {
		return nil, fmt.Errorf("the container runtime's socket is not at %s: mount it, and name it by --cri-socket", strings.Join(places, ", "))
	}
	if f.conn == nil || f.at != at {
		f.close()
		conn, err := grpc.NewClient("unix://"+at, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxCRI)))
		if err != nil {
			return nil, fmt.Errorf("connect to the container runtime at %s: %w", at, err)
		}
		f.conn, f.at = conn, at
	}
	return runtimeapi.NewRuntimeServiceClient(f.conn), nil
}

func (f *finder) close() {
	if f.conn != nil {
		_ = f.conn.Close() // nothing is under way
		f.conn = nil
	}
}

// ask asks the runtime for the pod's sandbox.
func (f *finder) ask(ctx context.Context, pod *corev1.Pod) (_ *sandbox, err error) {
	if time.Now().Before(f.rest) {
		return nil, f.why
	}
	r, err := f.runtime()
	if err != nil {
		return nil, err
	}
	outer := ctx
	ctx, cancel := context.WithTimeout(ctx, criTimeout)
	defer cancel()
	defer func() {
		// One that hangs must not hold up every pod of the node. Its end of the
		// connection has the deadline too, and may be the first to say so.
		if (ctx.Err() != nil || status.Code(err) == codes.DeadlineExceeded) && outer.Err() == nil {
			f.rest, f.why = time.Now().Add(criRest), err
		}
	}()
	list, err := r.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{Filter: &runtimeapi.PodSandboxFilter{
		State:         &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{labelPodUID: nodeUID(pod)},
	}})
	if err != nil {
		err = fmt.Errorf("ask the container runtime at %s for the pod's sandbox: %w", f.at, err)
		return nil, err
	}
	ready := slices.DeleteFunc(list.Items, func(s *runtimeapi.PodSandbox) bool {
		// Not every runtime has filtered. The name is looked at because a pod's
		// annotation has a part in nodeUID.
		return s.State != runtimeapi.PodSandboxState_SANDBOX_READY || s.Labels[labelPodUID] != nodeUID(pod) ||
			s.GetMetadata().GetNamespace() != pod.Namespace || s.GetMetadata().GetName() != pod.Name
	})
	if len(ready) == 0 {
		return nil, errNoSandbox
	}
	s := slices.MaxFunc(ready, func(a, b *runtimeapi.PodSandbox) int { return cmp.Compare(a.CreatedAt, b.CreatedAt) })
	verbose, err := r.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.Id, Verbose: true})
	if err != nil {
		err = fmt.Errorf("ask the container runtime at %s for sandbox %s: %w", f.at, s.Id, err)
		return nil, err
	}
	netns, pid, err := parseInfo(verbose.Info)
	if err != nil {
		return nil, fmt.Errorf("the container runtime at %s says of sandbox %s: %w", f.at, s.Id, err)
	}
	found := &sandbox{ID: s.Id, Since: time.Unix(0, s.CreatedAt), By: f.at}
	if found.Netns = f.visible(netns, pid); found.Netns == "" {
		return nil, fmt.Errorf("the network namespace of sandbox %s is not to be seen from here: neither %q nor that of process %d: mount /run/netns, and share the host's process ids",
			s.Id, netns, pid)
	}
	return found, nil
}

// all lists the sandboxes that the runtime has, running or not.
func (f *finder) all(ctx context.Context) (map[string]bool, error) {
	r, err := f.runtime()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, criTimeout)
	defer cancel()
	list, err := r.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, fmt.Errorf("ask the container runtime at %s for its sandboxes: %w", f.at, err)
	}
	ids := map[string]bool{}
	for _, s := range list.Items {
		ids[s.Id] = true
	}
	return ids, nil
}

// visible gives the path by which a network namespace of the host's can be seen
// from here: a container may lack the link from /var/run to /run.
func (f *finder) visible(netns string, pid int) string {
	var paths []string
	if filepath.IsAbs(netns) {
		paths = append(paths, netns)
		if rest, ok := strings.CutPrefix(netns, "/var/run/"); ok {
			paths = append(paths, "/run/"+rest)
		}
	}
	if pid > 0 {
		paths = append(paths, filepath.Join(f.proc, strconv.Itoa(pid), "ns", "net"))
	}
	for _, p := range paths {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return ""
}

// parseInfo reads what containerd and CRI-O say of a sandbox beyond the CRI: the
// path of its network namespace, and its process. Either may be missing.
func parseInfo(info map[string]string) (netns string, pid int, err error) {
	text, ok := info["info"]
	if !ok {
		return "", 0, errors.New("nothing beyond the CRI: expected the key info")
	}
	var s struct {
		PID         int `json:"pid"`
		RuntimeSpec struct {
			Linux struct {
				Namespaces []struct {
					Type string `json:"type"`
					Path string `json:"path"`
				} `json:"namespaces"`
			} `json:"linux"`
		} `json:"runtimeSpec"`
		// containerd 2 keeps the path here too, also of sandboxes that no OCI
		// runtime has made.
		SandboxMetadata struct {
			Metadata struct {
				NetNSPath string `json:"NetNSPath"`
			} `json:"Metadata"`
			NetNSPath string `json:"NetNSPath"`
		} `json:"sandboxMetadata"`
	}
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		return "", 0, fmt.Errorf("its info is not understood: %w", err)
	}
	for _, ns := range s.RuntimeSpec.Linux.Namespaces {
		if ns.Type == "network" {
			netns = ns.Path
		}
	}
	for _, more := range []string{s.SandboxMetadata.Metadata.NetNSPath, s.SandboxMetadata.NetNSPath} {
		if netns == "" {
			netns = more
		}
	}
	if netns == "" && s.PID == 0 {
		return "", 0, errors.New("its info has neither a network namespace nor a process")
	}
	return netns, s.PID, nil
}
