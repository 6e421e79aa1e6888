// SPDX-License-Identifier: Apache-2.0

package podcache

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

func TestMain(m *testing.M) { testbed.Main(m) }

// client returns a clientset without a limit of requests.
func client(t testing.TB, kubeconfig []byte) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.RESTConfigFromKubeConfig(kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	transport, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(transport.CloseIdleConnections)
	c, err := kubernetes.NewForConfigAndClient(config, transport)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// meshed is a pod of the mesh as an API server has it, with much that nobody
// needs.
func meshed(name string, uid types.UID) *corev1.Pod {
	always, user, yes := corev1.ContainerRestartPolicyAlways, int64(1337), true
	class := "nvidia"
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "ns", Name: name, UID: uid,
			Labels: map[string]string{"app": "x", "sidecar.istio.io/inject": "true"},
			Annotations: map[string]string{
				"sidecar.istio.io/status": `{"version":"1"}`, keyLastApplied: strings.Repeat("x", 4000),
				"traffic.sidecar.istio.io/excludeOutboundPorts": "9000",
			},
			OwnerReferences: []metav1.OwnerReference{{Kind: "ReplicaSet", Name: "x-1", Controller: &yes}},
			ManagedFields:   []metav1.ManagedFieldsEntry{{Manager: "kubelet", FieldsV1: metav1.NewFieldsV1(`{"f:x":{}}`)}},
		},
		Spec: corev1.PodSpec{
			NodeName: "n1", RuntimeClassName: &class, RestartPolicy: corev1.RestartPolicyAlways,
			Volumes:        []corev1.Volume{{Name: "v"}},
			InitContainers: []corev1.Container{{Name: "helper", Image: "x", RestartPolicy: &always}, {Name: "istio-validation", Image: "x"}},
			Containers: []corev1.Container{
				{
					Name: "app", Image: "app:1", Command: []string{"/app"},
					Ports: []corev1.ContainerPort{{ContainerPort: 8080}, {ContainerPort: 53, Protocol: corev1.ProtocolUDP}},
				},
				{
					Name: "istio-proxy", Image: "proxy:1", Args: []string{"proxy", "sidecar"},
					Env: []corev1.EnvVar{
						{Name: "ISTIO_META_DNS_CAPTURE", Value: "true"},
						{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}},
					},
					SecurityContext: &corev1.SecurityContext{RunAsUser: &user, RunAsGroup: &user},
				},
			},
		},
		Status: corev1.PodStatus{
			Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: "10.0.0.1"}}, Message: "x",
			InitContainerStatuses: []corev1.ContainerStatus{{
				Name: "istio-validation", RestartCount: 3, ContainerID: "containerd://1", ImageID: "x",
				State:                corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 126}},
				LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 126}},
			}},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app", Ready: true}},
		},
	}
}

// A node is a cache between a fake API server and the plugin's client.
type node struct {
	t      testing.TB
	api    *fakekube.Server
	cache  *Cache
	runDir string
	log    *lockedBuffer
	stop   func()
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newNode makes a node whose cache does not run yet.
func newNode(t testing.TB, change ...func(*Options)) *node {
	t.Helper()
	n := &node{t: t, api: fakekube.Start(t), runDir: filepath.Join(t.TempDir(), "run"), log: new(lockedBuffer)}
	opts := Options{
		Client: client(t, n.api.Kubeconfig(n.api.Token())), Node: "n1", RunDir: n.runDir,
		Log: slog.New(slog.NewTextHandler(n.log, nil)), LiveTimeout: 10 * time.Second,
	}
	for _, f := range change {
		f(&opts)
	}
	n.cache = New(opts)
	return n
}

// run runs the cache until the test ends, or stop is called.
func (n *node) run() {
	n.t.Helper()
	ctx, cancel := context.WithCancel(n.t.Context())
	done := make(chan error, 1)
	go func() { done <- n.cache.Run(ctx) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("run: %v", err)
		}
	})
	n.t.Cleanup(n.stop)
	n.eventually(func() error { _, err := os.Lstat(SocketPath(n.runDir)); return err })
}

// runSynced waits for the cache to be filled too.
func (n *node) runSynced() {
	n.t.Helper()
	n.run()
	n.eventually(func() error {
		if !n.cache.Synced() {
			return errors.New("the cache is not filled")
		}
		return nil
	})
}

func (n *node) eventually(f func() error) {
	n.t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			n.t.Fatal(err)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// ask is the plugin's question. The plugin waits a second for an answer, and asks
// the API server then; on a machine that is busy the test asks again.
func (n *node) ask(name, uid string) (*redirect.Pod, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for {
		pod, err := podfacts.NewAgent(n.runDir).Pod(ctx, "ns", name, uid)
		if !errors.Is(err, os.ErrDeadlineExceeded) || ctx.Err() != nil {
			return pod, err
		}
	}
}

// gets counts the pods that were got live.
func (n *node) gets() int {
	count := 0
	for _, r := range n.api.Requests() {
		if r.Verb == "get" {
			count++
		}
	}
	return count
}

// want asks and compares the answer's uid, and how many live requests there
// have been so far.
func (n *node) want(name, uid, got string, gets int) {
	n.t.Helper()
	pod, err := n.ask(name, uid)
	if err != nil || pod.UID != got || n.gets() != gets {
		n.t.Errorf("%s with uid %q: got %+v, %v after %d live requests; want uid %s after %d", name, uid, pod, err, n.gets(), got, gets)
	}
}

// has waits until the cache has a pod of that uid.
func (n *node) has(uid types.UID) {
	n.t.Helper()
	n.eventually(func() error {
		if slices.ContainsFunc(n.cache.Pods(), func(p *corev1.Pod) bool { return p.UID == uid }) {
			return nil
		}
		return fmt.Errorf("the cache has no pod of uid %s", uid)
	})
}

// TestAnswers: from the cache what the cache has, live what it has not.
func TestAnswers(t *testing.T) {
	n := newNode(t)
	static := meshed("static", "mirror")
	static.Annotations["kubernetes.io/config.hash"] = "hash"
	n.api.Set(meshed("a", "1"), static)
	elsewhere := meshed("elsewhere", "9")
	elsewhere.Spec.NodeName = "n2"
	n.api.Set(elsewhere)
	n.runSynced()

	n.want("a", "1", "1", 0)
	n.want("static", "hash", "mirror", 0)
	n.want("static", "mirror", "mirror", 0)
	n.want("a", "", "1", 1)            // which one it is can't be told
	n.want("elsewhere", "9", "9", 2)   // not scheduled here, as far as the cache knows
	n.want("a", "of tomorrow", "1", 3) // told as it is: the plugin asks again
	n.want("static", "new hash", "mirror", 4)
	_, err := n.ask("none", "1")
	if err == nil || !strings.Contains(err.Error(), `404 Not Found: from the API server: pods "none" not found`) {
		t.Errorf("no such pod: %v", err)
	}
	n.api.Set(meshed("a", "2")) // replaced by another of its name
	n.eventually(func() error {
		pod, err := n.ask("a", "2")
		if err != nil || pod.UID != "2" {
			return fmt.Errorf("got %+v: %w", pod, err)
		}
		return nil
	})
	n.has("2")
	before := n.gets()
	n.want("a", "2", "2", before)
}

// TestNotFilled: while the list can't be had, each pod is got live.
func TestNotFilled(t *testing.T) {
	n := newNode(t)
	lift := n.api.Fail(fakekube.Fault{Verb: "watch", Hang: true})
	n.api.Set(meshed("a", "1"))
	n.run()
	n.want("a", "1", "1", 1)
	if n.cache.Synced() || len(n.cache.Pods()) != 0 {
		t.Error("synced")
	}
	lift()
	n.api.Down() // what hangs ends
	if err := n.api.Up(); err != nil {
		t.Fatal(err)
	}
	n.has("1")
	n.eventually(func() error {
		if !n.cache.Synced() {
			return errors.New("not synced")
		}
		return nil
	})
	n.want("a", "1", "1", 1)
}

// TestStale: with the watch down for long, pods are got live; where that fails
// too, a pod of the very uid is told as it was, and the log says so.
func TestStale(t *testing.T) {
	n := newNode(t, func(o *Options) { o.StaleAfter = time.Nanosecond })
	n.api.Set(meshed("a", "1"), meshed("b", "1b"))
	n.runSynced()
	n.eventually(func() error {
		if n.cache.staleFor() != 0 {
			return errors.New("the watch is down")
		}
		return nil
	})
	n.want("a", "1", "1", 0)

	lift := n.api.Fail(fakekube.Fault{Verb: "watch", Status: http.StatusTooManyRequests})
	n.api.DropWatches()
	n.eventually(func() error {
		if n.cache.staleFor() == 0 {
			return errors.New("the watch is up")
		}
		return nil
	})
	fakekube.Update(n.api, "ns", "a", func(p *corev1.Pod) { p.Annotations["new"] = "yes" })
	pod, err := n.ask("a", "1")
	if err != nil || pod.Annotations["new"] != "yes" || n.gets() != 1 {
		t.Errorf("live: %+v, %v", pod, err)
	}
	fakekube.Remove[*corev1.Pod](n.api, "ns", "b")
	if _, err := n.ask("b", "1b"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("one that is gone: %v", err)
	}

	for name, f := range map[string]fakekube.Fault{"dropped": {Verb: "get", Drop: true}, "500": {Verb: "get", Status: 500}, "429": {Verb: "get", Status: 429}} {
		lift := n.api.Fail(f)
		pod, err = n.ask("a", "1")
		if err != nil || pod.UID != "1" || pod.Annotations["new"] != "" {
			t.Errorf("%s: %+v, %v", name, pod, err)
		}
		if !strings.Contains(n.log.String(), "told of a pod as it was") {
			t.Errorf("%s: log: %s", name, n.log)
		}
		for _, uid := range []string{"", "2"} {
			if pod, err := n.ask("a", uid); err == nil {
				t.Errorf("%s: uid %q: got %+v", name, uid, pod)
			}
		}
		lift()
	}
	forbidden := n.api.Fail(fakekube.Fault{Verb: "get", Status: 403, Message: "no"})
	if _, err := n.ask("a", "1"); err == nil || !strings.Contains(err.Error(), "403 Forbidden: from the API server: no") {
		t.Errorf("403: %v", err)
	}
	forbidden()

	lift()
	n.eventually(func() error {
		if n.cache.staleFor() != 0 {
			return errors.New("the watch is down")
		}
		return nil
	})
}

// TestShared: all who ask for a pod at the same time share one live request;
// one that hangs is given up, and told as such.
func TestShared(t *testing.T) {
	n := newNode(t, func(o *Options) { o.LiveTimeout = 500 * time.Millisecond })
	n.api.Set(meshed("other", "1"))
	n.runSynced()
	lift := n.api.Fail(fakekube.Fault{Verb: "get", Hang: true})
	const askers = 50
	errs := make([]error, askers)
	var wg sync.WaitGroup
	for i := range askers {
		wg.Go(func() { _, errs[i] = n.ask("a", "1") })
	}
	wg.Wait()
	for _, err := range errs {
		if err == nil || !strings.Contains(err.Error(), "has not answered within 500ms") {
			t.Fatalf("got %v", err)
		}
	}
	// On a busy machine some may come after the first have been answered.
	if got := n.gets(); got < 1 || got > askers/2 {
		t.Errorf("%d requests", got)
	}
	lift()
	n.api.Fail(fakekube.Fault{Verb: "get", Status: 429, RetryAfter: 9, Times: 100})
	if _, err := n.ask("a", "1"); err == nil || !strings.Contains(err.Error(), "429 Too Many Requests: from the API server") {
		t.Errorf("got %v", err)
	}
}

// TestManyAskers: 250 pods of one node at once.
func TestManyAskers(t *testing.T) {
	n := newNode(t)
	const askers = 250
	for i := range askers {
		n.api.Set(meshed(fmt.Sprintf("p%d", i), types.UID(fmt.Sprintf("u%d", i))))
	}
	n.runSynced()
	var wg sync.WaitGroup
	errs := make(chan error, askers)
	for i := range askers {
		wg.Go(func() {
			uid := fmt.Sprintf("u%d", i)
			pod, err := n.ask(fmt.Sprintf("p%d", i), uid)
			if err == nil && pod.UID != uid {
				err = fmt.Errorf("asked for %s, got %+v", uid, pod)
			}
			errs <- err
		})
	}
	wg.Wait()
	for range askers {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if n.gets() != 0 {
		t.Errorf("%d pods were got live", n.gets())
	}
}

// TestEvents: handlers hear of pods, trimmed.
func TestEvents(t *testing.T) {
	n := newNode(t)
	n.api.Set(meshed("a", "1"))
	events := make(chan string, 10)
	note := func(what string, obj any) {
		p := obj.(*corev1.Pod)
		if p.Spec.Volumes != nil || p.ManagedFields != nil || p.Spec.Containers[0].Image != "" {
			t.Errorf("not trimmed: %+v", p)
		}
		events <- what + " " + p.Name
	}
	n.cache.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { note("add", obj) },
		UpdateFunc: func(_, obj any) { note("update", obj) },
		DeleteFunc: func(obj any) { note("delete", obj) },
	})
	n.runSynced()
	next := func(want string) {
		t.Helper()
		select {
		case got := <-events:
			if got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("no %s", want)
		}
	}
	next("add a")
	fakekube.Update(n.api, "ns", "a", func(p *corev1.Pod) { p.Labels["x"] = "y" })
	next("update a")
	fakekube.Remove[*corev1.Pod](n.api, "ns", "a")
	next("delete a")
}

// TestTrim: the rules decide by what is left as by the whole, and nothing that
// is not needed is left.
func TestTrim(t *testing.T) {
	pod := meshed("a", "1")
	whole, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	trimmed, err := trim(pod)
	if err != nil {
		t.Fatal(err)
	}
	told, err := json.Marshal(factsOf(trimmed.(*corev1.Pod)))
	if err != nil {
		t.Fatal(err)
	}
	evaluate := func(data []byte) (redirect.Outcome, *redirect.Policy) {
		p, err := redirect.ParsePod(data)
		if err != nil {
			t.Fatal(err)
		}
		if !p.MatchesUID("1") {
			t.Errorf("uid %s", p.UID)
		}
		config := redirect.DefaultConfig()
		outcome, policy, err := config.Evaluate(p)
		if err != nil || policy == nil {
			t.Fatalf("%+v, %v", outcome, err)
		}
		return outcome, policy
	}
	wantOutcome, wantPolicy := evaluate(whole)
	gotOutcome, gotPolicy := evaluate(told)
	if diff := cmp.Diff([]any{wantOutcome, wantPolicy}, []any{gotOutcome, gotPolicy}); diff != "" {
		t.Errorf("the rules (-whole +trimmed):\n%s", diff)
	}

	want := meshed("a", "1")
	delete(want.Annotations, keyLastApplied)
	want.ManagedFields, want.Spec.Volumes, want.Status.Message = nil, nil, ""
	for _, list := range [][]corev1.Container{want.Spec.InitContainers, want.Spec.Containers} {
		for i := range list {
			list[i].Image, list[i].Command = "", nil
		}
	}
	want.Spec.Containers[1].Env[1].ValueFrom = nil
	want.Status.InitContainerStatuses[0].ImageID = ""
	if diff := cmp.Diff(want, trimmed); diff != "" {
		t.Errorf("trimmed (-want +got):\n%s", diff)
	}
	again, err := trim(trimmed)
	if diff := cmp.Diff(trimmed, again); diff != "" || err != nil {
		t.Errorf("trimmed again: %v\n%s", err, diff)
	}
	tombstone := cache.DeletedFinalStateUnknown{Key: "ns/a", Obj: pod}
	if got, err := trim(tombstone); err != nil || got != any(tombstone) {
		t.Errorf("a tombstone: %v, %v", got, err)
	}
}

// TestSocket: private; in the place of a dead agent's at once; left to the next
// agent; made again when it is gone.
func TestSocket(t *testing.T) {
	n := newNode(t)
	if err := os.MkdirAll(n.runDir, 0o755); err != nil {
		t.Fatal(err)
	}
	// An agent was killed: one socket that nobody listens at, and one that was
	// not in its place yet.
	for _, name := range []string{SocketPath(n.runDir), SocketPath(n.runDir) + ".new"} {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
	}
	n.api.Set(meshed("a", "1"))
	ctx, cancel := context.WithCancel(t.Context())
	s, err := n.cache.newServer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = s.run(ctx); close(done) }()
	mode := func(path string, want os.FileMode) {
		t.Helper()
		if st, err := os.Lstat(path); err != nil || st.Mode() != want {
			t.Errorf("%s: %v, %v", path, st.Mode(), err)
		}
	}
	mode(n.runDir, os.ModeDir|0o700)
	mode(SocketPath(n.runDir), os.ModeSocket|0o600)
	if left, err := filepath.Glob(n.runDir + "/*"); err != nil || len(left) != 1 {
		t.Errorf("left: %q, %v", left, err)
	}
	n.want("a", "1", "1", 1) // of a cache that does not run

	// Another agent takes over. The first one ends, and leaves it its socket.
	next, err := n.cache.newServer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	n.want("a", "1", "1", 2)
	s.remove()
	mode(SocketPath(n.runDir), os.ModeSocket|0o600)
	next.remove()
	if _, err := os.Lstat(SocketPath(n.runDir)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	// Somebody has removed it: run, of the first, puts a new one there.
	n.eventually(func() error { _, err := n.ask("a", "1"); return err })
	if !strings.Contains(n.log.String(), "somebody has removed the socket") {
		t.Errorf("log: %s", n.log)
	}
	_ = next.http.Close()
	cancel()
	<-done
	if left, err := filepath.Glob(n.runDir + "/*"); err != nil || len(left) != 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}

// TestSocketInTheWay: what keeps the socket from being made is told.
func TestSocketInTheWay(t *testing.T) {
	n := newNode(t)
	if err := os.WriteFile(n.runDir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.cache.Run(t.Context()); err == nil || !strings.Contains(err.Error(), n.runDir) {
		t.Errorf("a file for a directory: %v", err)
	}
	if err := os.Remove(n.runDir); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(SocketPath(n.runDir)+"/x", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := n.cache.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "agent.sock") {
		t.Errorf("a directory for a socket: %v", err)
	}
}

// TestRequests: what is no question is refused, in the API's form.
func TestRequests(t *testing.T) {
	n := newNode(t)
	n.run()
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", SocketPath(n.runDir))
	}}}
	for _, tc := range []struct {
		method, path string
		body         int
		want         int
	}{
		{"GET", "/", 0, 404},
		{"GET", "/v1/pods/ns", 0, 404},
		{"POST", "/v1/pods/ns/p", 10, 405},
		{"GET", "/v1/pods/" + strings.Repeat("n", 64) + "/p", 0, 400},
		{"GET", "/v1/pods/ns/" + strings.Repeat("p", 254), 0, 400},
		{"GET", "/v1/pods/ns/" + strings.Repeat("p", 64<<10), 0, 431},
		{"GET", "/v1/pods/ns/p?uid=x", 1 << 10, 404}, // the body is not read
	} {
		req, err := http.NewRequestWithContext(t.Context(), tc.method, "http://agent"+tc.path, bytes.NewReader(make([]byte, tc.body)))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Errorf("%s: %v", tc.path[:min(len(tc.path), 30)], err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != tc.want {
			t.Errorf("%s %s: %d, want %d", tc.method, tc.path[:min(len(tc.path), 30)], resp.StatusCode, tc.want)
		}
	}
	// More at a time than there is room for.
	s := &server{cache: n.cache, slots: make(chan struct{})}
	w := &recorder{header: http.Header{}}
	s.get(w, nil)
	if w.code != http.StatusServiceUnavailable || w.header.Get("Retry-After") != "1" {
		t.Errorf("got %d, %v", w.code, w.header)
	}
}

type recorder struct {
	header http.Header
	code   int
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(code int)        { r.code = code }
func (r *recorder) Write(p []byte) (int, error) { return len(p), nil }
