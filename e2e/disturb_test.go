// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"shunt.dev/shunt/e2e/wire"
)

// A busy connection out of a redirected pod and one into it. They have to
// outlive whatever happens to the node's daemons.
type busy struct {
	from [2]string // the control address of the app that has it
	to   [2]string
}

func keepBusy(t *testing.T) *busy {
	t.Helper()
	m, o := start(t, meshed("busy")), start(t, plain("caller"))
	b := &busy{
		from: [2]string{hostPort(m.Status.PodIP, wire.ControlPort), hostPort(o.Status.PodIP, wire.ControlPort)},
		to:   [2]string{"http://10.99.0.1:80/", "http://" + hostPort(m.Status.PodIP, wire.AppPort) + "/"},
	}
	for i := range b.from {
		_ = ask(b.from[i], "/hold?url="+url.QueryEscape(b.to[i]), new(struct{})) // no answer
	}
	b.live(t)
	return b
}

// live checks that both connections are still the first, and carry traffic.
func (b *busy) live(t *testing.T) {
	t.Helper()
	for i := range b.from {
		var first, now wire.Held
		path := "/held?url=" + url.QueryEscape(b.to[i])
		eventually(t, patience, b.to[i]+" carries traffic", func() error {
			if err := ask(b.from[i], path, &now); err != nil {
				return err
			}
			if first.Rounds == 0 {
				first = now
			}
			if now.Rounds == 0 || now.Rounds < first.Rounds+5 {
				return fmt.Errorf("%d rounds, then %d, %s", first.Rounds, now.Rounds, now.Error)
			}
			return nil
		})
		if now.Conns != 1 || now.Error != "" {
			t.Errorf("%s: %d connections, error %q, after %d rounds: expected that the first lives", b.to[i], now.Conns, now.Error, now.Rounds)
		}
	}
}

// stream has meshed pods start and go, some at a time, until end is called, and
// checks of each that nothing of it went around its proxy.
func stream(t *testing.T, prefix string) (count *atomic.Int32, end func()) {
	count = new(atomic.Int32)
	var done sync.WaitGroup
	stop := make(chan struct{})
	for worker := range 4 {
		done.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				name := fmt.Sprintf("%s-%d-%d", prefix, worker, i)
				if err := through(t, name); err != nil {
					t.Errorf("pod %s: %v\n%s", name, err, podState(name))
				}
				count.Add(1)
				deletePod(t, name)
			}
		})
	}
	return count, sync.OnceFunc(func() {
		close(stop)
		done.Wait()
	})
}

// through takes one pod to ready and checks it, on any goroutine.
func through(t *testing.T, name string) error {
	pod := meshed(name)
	if _, err := client.CoreV1().Pods(space).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		return err
	}
	err := poll(patience, func() (err error) {
		if pod, err = client.CoreV1().Pods(space).Get(t.Context(), pod.Name, metav1.GetOptions{}); err == nil && !isReady(pod) {
			err = fmt.Errorf("phase %s", pod.Status.Phase)
		}
		return err
	})
	if err != nil {
		return err
	}
	var e wire.Early
	if err := poll(patience, func() error {
		err := ask(hostPort(pod.Status.PodIP, wire.ControlPort), "/early", &e)
		if err == nil && e.Answered == 0 {
			err = fmt.Errorf("%d tries, no answer", e.Tried)
		}
		return err
	}); err != nil {
		return err
	}
	if len(e.Around) > 0 {
		return fmt.Errorf("%d of %d connections went around the proxy: %+v", len(e.Around), e.Answered, e.Around[0])
	}
	return nil
}

func setImage(t *testing.T, image string) {
	t.Helper()
	patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"containers":[{"name":"agent","image":%q},{"name":"repair","image":%q}]}}}}`, image, image)
	if _, err := client.AppsV1().DaemonSets(system).Patch(t.Context(), daemonSet, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

const (
	thisImage = "localhost/shunt/shunt-node:0.1.0"
	nextImage = "localhost/shunt/shunt-node:next"
)

// The agent is upgraded, and back again, while pods start.
func TestUpgradeUnderLoad(t *testing.T) {
	install(t, defaults)
	b := keepBusy(t)
	count, end := stream(t, "upgrade")
	defer end()
	// Until enough pods have started to show something.
	for round := 0; round < 2 || count.Load() < 10; round++ {
		for _, image := range []string{nextImage, thisImage} {
			began := time.Now()
			before := count.Load()
			setImage(t, image)
			rolledOut(t)
			t.Logf("rolled out %s in %s, %d pods started meanwhile", image, time.Since(began).Round(10*time.Millisecond), count.Load()-before)
			b.live(t)
		}
	}
	end()
	t.Logf("%d pods started in all", count.Load())
	b.live(t)
}

// agentToken makes a token as the agent's pod has one: bound to the pod.
func agentToken(t *testing.T) string {
	t.Helper()
	pods, err := client.CoreV1().Pods(system).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if o := metav1.GetControllerOf(&p); o == nil || o.Name != daemonSet {
			continue
		}
		req, err := client.CoreV1().ServiceAccounts(system).CreateToken(t.Context(), p.Spec.ServiceAccountName, &authenticationv1.TokenRequest{
			Spec: authenticationv1.TokenRequestSpec{BoundObjectRef: &authenticationv1.BoundObjectReference{
				APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID,
			}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return req.Status.Token
	}
	t.Fatal("there is no agent")
	return ""
}

// refused says whether the API server lets a token in no more.
func refused(t *testing.T, token string) error {
	t.Helper()
	review, err := client.AuthenticationV1().TokenReviews().Create(t.Context(),
		&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
	if err == nil && review.Status.Authenticated {
		err = errors.New("the API server still takes the token of the agent's pod")
	}
	return err
}

// An upgrade to an image that is not there: no agent at all. Pods start, and
// are redirected, without it, also when what was bound to its pod is refused.
func TestAgentDown(t *testing.T) {
	install(t, defaults)
	b := keepBusy(t)
	token := agentToken(t)
	if refused(t, token) == nil {
		t.Fatal("the API server does not take the token of a pod that is there")
	}
	setImage(t, "localhost/shunt/shunt-node:none")
	defer func() {
		setImage(t, thisImage)
		rolledOut(t)
	}()
	eventually(t, patience, "the agent is down", func() error {
		pods, err := client.CoreV1().Pods(system).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, p := range pods.Items {
			if p.Status.Phase != "Pending" {
				return fmt.Errorf("pod %s: %s", p.Name, p.Status.Phase)
			}
		}
		return nil
	})
	// It remembers for ten seconds whom it has let in.
	gone := time.Now()
	if err := poll(15*time.Second, func() error { return refused(t, token) }); err != nil {
		t.Log(err)
	} else {
		t.Logf("the token of the agent's pod is refused %s after it", time.Since(gone).Round(10*time.Millisecond))
	}
	wantRedirected(t, start(t, meshed("agent-down")))
	b.live(t)
}

// crash ends a daemon and starts it again, with connections that have to live and
// with pods that are on their way, in the midst of ADD or DEL and before.
func crash(t *testing.T, d daemon) {
	install(t, defaults)
	b := keepBusy(t)
	count, end := stream(t, string(d))
	defer end()
	making := regexp.MustCompile(`RunPodSandbox for .*[Nn]ame:[\\"]*` + string(d) + `-\d`)
	eventually(t, patience, "pods are on their way", func() error {
		return unless(making.MatchString(runtimeLog(t)), "none")
	})
	d.kill(t)
	b.live(t)
	d.start(t)
	wantRedirected(t, start(t, meshed("after-"+string(d))))
	end()
	t.Logf("%d more pods started", count.Load())
	b.live(t)
}

// A crash of the runtime.
func TestContainerdRestart(t *testing.T) { crash(t, "containerd") }

// Without the API server the agent doesn't know a pod that comes by a file: it
// is not started until somebody can tell what it is.
func TestAPIServerDown(t *testing.T) {
	install(t, defaults)
	b := keepBusy(t)
	daemon("kube-apiserver").kill(t)
	up := false
	startServer := func() {
		if !up {
			daemon("kube-apiserver").start(t)
			up = true
		}
	}
	defer startServer()
	b.live(t)

	p := meshed("static")
	p.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
	p.Spec.AutomountServiceAccountToken = nil
	data, err := yaml.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	file := "/run/k8s/manifests/static.yaml"
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	name := "static-" + node
	defer func() {
		_ = os.Remove(file)
		eventually(t, patience, "the static pod is gone", func() error {
			if _, err := client.CoreV1().Pods(space).Get(t.Context(), name, metav1.GetOptions{}); err == nil {
				return os.ErrExist
			}
			return nil
		})
	}()
	eventually(t, patience, "its ADD has failed", func() error {
		log, err := os.ReadFile(filepath.Join(logDir(), "kubelet.log"))
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(log)) {
			if strings.Contains(line, "default/static-") && strings.Contains(line, "CreatePodSandboxError") {
				t.Logf("the kubelet says: %.600s", line)
				return nil
			}
		}
		return os.ErrNotExist
	})
	b.live(t)
	began := time.Now()
	startServer()
	s := awaitReady(t, name)
	t.Logf("static pod ready %s after the API server's start", time.Since(began).Round(10*time.Millisecond))
	wantRedirected(t, s)
	b.live(t)
}

func logDir() string { return filepath.Join(cache, "run", node) }

// A kubelet that starts again finds its pods, and they their connections.
func TestKubeletRestart(t *testing.T) {
	if mode == "v2" {
		t.Fatal("a kubelet can't be restarted on a node in mode v2: docs/TESTING.md")
	}
	crash(t, "kubelet")
}

// An ADD that fails is tried again by the kubelet, and succeeds once the cause
// is gone. Nothing of the failed ones is left.
func TestFailedADD(t *testing.T) {
	install(t, defaults)
	const key = "traffic.sidecar.istio.io/excludeOutboundPorts"
	p := meshed("typo", annotated(key, "80,x"))
	create(t, p)
	eventually(t, patience, "the pod's events name the annotation", func() error {
		events := eventsOf(p.Name)
		if !slices.ContainsFunc(events, func(e string) bool {
			return strings.HasPrefix(e, "FailedCreatePodSandBox") && strings.Contains(e, key) && strings.Contains(e, "80,x")
		}) {
			return fmt.Errorf("events: %q", events)
		}
		return nil
	})
	if left := traces(); len(left) > 0 {
		t.Errorf("left of the failed ADD: %v", left)
	}
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:"81"}}}`, key)
	if _, err := client.CoreV1().Pods(space).Patch(t.Context(), p.Name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	healed := awaitReady(t, p.Name)
	t.Logf("ready %s after the annotation was mended", time.Since(began).Round(10*time.Millisecond))
	wantRedirected(t, healed)
	deletePod(t, p.Name)
	wantNoTraces(t)
}
