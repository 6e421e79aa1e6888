// SPDX-License-Identifier: Apache-2.0

package repair

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
)

// patience is how long a test waits for what should come at once.
const patience = 20 * time.Second

// eventually fails the test if cond does not become true.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	end := time.Now().Add(patience)
	for !cond() {
		if time.Now().After(end) {
			t.Fatalf("waited in vain for %s", what)
		}
		<-time.After(2 * time.Millisecond)
	}
}

// nurse is a healer that heals in memory, by the real rules.
type nurse struct {
	*mender

	mu     sync.Mutex
	good   map[types.UID]bool
	states map[types.UID]state // of those that run; else lost, unless good
	mended map[types.UID]int
	fails  func(pod *corev1.Pod) error
	tidied int
}

func newNurse() *nurse {
	return &nurse{
		mender: &mender{conf: netconf.Default()},
		good:   map[types.UID]bool{}, mended: map[types.UID]int{}, states: map[types.UID]state{},
	}
}

func (n *nurse) look(_ context.Context, pod *corev1.Pod) (*patient, state, error) {
	if _, _, err := n.decide(pod); err != nil {
		return nil, stateUnknown, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.states[pod.UID]
	switch {
	case n.good[pod.UID]:
		return nil, stateGood, nil
	case s == stateUnknown:
		s = stateLost
	}
	return nil, s, errors.New("it differs")
}

func (n *nurse) mend(_ context.Context, pod *corev1.Pod, _ bool) (redirect.Choice, bool, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.good[pod.UID] {
		return redirect.Choice{}, true, nil
	}
	if n.fails != nil {
		if err := n.fails(pod); err != nil {
			return redirect.Choice{}, false, err
		}
	}
	n.good[pod.UID] = true
	n.mended[pod.UID]++
	return redirect.Choice{Datapath: redirect.EBPF, Reasons: redirect.Reasons{{Name: redirect.ReasonServed, Text: "x"}}}, false, nil
}

func (n *nurse) tidy(context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.tidied++
	return nil
}

func (n *nurse) count() (pods, times int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, k := range n.mended {
		times += k
	}
	return len(n.mended), times
}

// A ward is a controller that runs, with the cluster about it.
type ward struct {
	*controller
	kube     *fakekube.Server
	nurse    *nurse
	registry *prometheus.Registry
	log      *lockedBuffer
	stop     func()
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

var quickPace = pace{
	workers: 4, qps: 5000, burst: 100, callTime: patience, // where requests are counted, none is given up because the machine is busy
	retryFirst: 5 * time.Millisecond, retryMost: 100 * time.Millisecond,
	sweepEvery: time.Hour, grace: 30 * time.Second, settle: time.Millisecond,
	reread: 10 * time.Millisecond,
}

// hasty is for API servers that hang.
const hasty = 300 * time.Millisecond

func inHaste(o *Options) { o.callTime = hasty }

// rules are those of the chart, by mode: the agent's part that a pod shares, and
// what each mode needs beyond that.
func rules(o Options) []rbacv1.PolicyRule {
	rule := func(resource string, verbs ...string) rbacv1.PolicyRule {
		return rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{resource}, Verbs: verbs}
	}
	list := []rbacv1.PolicyRule{rule("pods", "list", "watch"), rule("events", "create")}
	switch {
	case o.DeletePods && o.RespectDisruptionBudgets:
		list = append(list, rule("pods/eviction", "create"))
	case o.DeletePods:
		list = append(list, rule("pods", "delete"))
	case o.LabelPods:
		list = append(list, rule("pods", "patch"))
	}
	return list
}

// open starts a controller that may do what its mode needs, and nothing else.
func open(t *testing.T, kube *fakekube.Server, n *nurse, edits ...func(*Options)) *ward {
	t.Helper()
	return openAs(t, kube, n, rules, edits...)
}

// openAs is open with other rights.
func openAs(t *testing.T, kube *fakekube.Server, n *nurse, may func(Options) []rbacv1.PolicyRule, edits ...func(*Options)) *ward {
	t.Helper()
	o := Options{
		Filter: testFilter, LabelKey: "cni.istio.io/uninitialized", LabelValue: "true", pace: quickPace,
	}
	for _, e := range edits {
		e(&o)
	}
	token := fmt.Sprintf("repair-%d", time.Now().UnixNano())
	kube.AddToken(token, "system:serviceaccount:shunt:shunt", fakekube.Grant{Rules: may(o)})
	conf, err := clientcmd.RESTConfigFromKubeConfig(kube.Kubeconfig(token))
	if err != nil {
		t.Fatal(err)
	}
	conf.QPS = -1
	if o.Client, err = kubernetes.NewForConfig(conf); err != nil {
		t.Fatal(err)
	}
	w := &ward{kube: kube, nurse: n, registry: prometheus.NewRegistry(), log: new(lockedBuffer)}
	o.Log = slog.New(slog.NewTextHandler(w.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	w.controller = newController(o, n, newMetrics(w.registry))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.run(ctx)
	}()
	w.stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(func() {
		w.stop()
		if t.Failed() {
			t.Logf("log:\n%s", w.log)
		}
	})
	return w
}

func mode(repair, del, label bool) func(*Options) {
	return func(o *Options) { o.RepairPods, o.DeletePods, o.LabelPods = repair, del, label }
}

// metric reads a count.
func (w *ward) metric(k kind, r result) int {
	return int(testutil.ToFloat64(w.metrics.pods.WithLabelValues(string(k), string(r))))
}

// reasons lists the events about a pod, sorted.
func reasons(kube *fakekube.Server, pod string) (list []string) {
	for _, e := range fakekube.List[*corev1.Event](kube) {
		if e.InvolvedObject.Name == pod && e.InvolvedObject.Kind == "Pod" && e.Source.Component == component && e.Source.Host == testNode {
			list = append(list, e.Reason)
		}
	}
	slices.Sort(list)
	return list
}

func (w *ward) wantReasons(t *testing.T, pod string, want ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("events %q of %s", want, pod), func() bool { return len(reasons(w.kube, pod)) >= len(want) })
	if diff := cmp.Diff(want, reasons(w.kube, pod)); diff != "" {
		t.Errorf("events of %s:\n%s", pod, diff)
	}
}

// calls counts requests by verb and resource.
func calls(kube *fakekube.Server) map[string]int {
	n := map[string]int{}
	for _, r := range kube.Requests() {
		n[r.Verb+" "+r.Resource]++
	}
	return n
}

// settled waits until nothing is left to do at once.
func (w *ward) settled(t *testing.T) {
	t.Helper()
	eventually(t, "the end of all work", func() bool { return w.queue.Len() == 0 })
}

// TestModes: what is done to a pod by each mode, with the least of rights, and
// which goes before which.
func TestModes(t *testing.T) {
	type outcome struct {
		Mended, Deleted, Labelled bool
		Events                    []string
	}
	repaired := outcome{Mended: true, Events: []string{"RedirectionRepaired"}}
	deleted := outcome{Deleted: true, Events: []string{"RedirectionMissingPodDeleted"}}
	labelled := outcome{Labelled: true, Events: []string{"RedirectionMissingPodLabelled"}}
	told := outcome{Events: []string{"RedirectionMissing"}}
	evict := func(o *Options) { o.RespectDisruptionBudgets = true }
	for _, tc := range []struct {
		name  string
		edits []func(*Options)
		pod   func(*corev1.Pod)
		want  outcome
	}{
		{"repair", []func(*Options){mode(true, false, false)}, nil, repaired},
		{"delete", []func(*Options){mode(false, true, false)}, nil, deleted},
		{"evict", []func(*Options){mode(false, true, false), evict}, nil, deleted},
		{"label", []func(*Options){mode(false, false, true)}, nil, labelled},
		{"repair goes first", []func(*Options){mode(true, true, true)}, nil, repaired},
		{"delete goes before label", []func(*Options){mode(false, true, true)}, nil, deleted},
		{"nothing is on", []func(*Options){mode(false, false, false)}, nil, told},
		{"never again: delete", []func(*Options){mode(true, true, true)}, never, deleted},
		{"never again: evict", []func(*Options){mode(true, true, true), evict}, never, deleted},
		{"never again: label", []func(*Options){mode(true, false, true)}, never, labelled},
		{"never again: nothing", []func(*Options){mode(true, false, false)}, never, told},
		{"the rules let it alone", []func(*Options){mode(true, true, true)}, func(p *corev1.Pod) {
			p.Annotations["sidecar.istio.io/interceptionMode"] = "NONE"
		}, outcome{Events: []string{"RedirectionNotMeant"}}},
		{"its namespace is excluded", []func(*Options){mode(false, true, true)}, func(p *corev1.Pod) { p.Namespace = "kube-system" }, outcome{Events: []string{"RedirectionNotMeant"}}},
		{"labelled before", []func(*Options){mode(false, false, true)}, func(p *corev1.Pod) {
			p.Labels["cni.istio.io/uninitialized"] = "true"
		}, outcome{Labelled: true}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			kube, n := fakekube.Start(t), newNurse()
			pod := broken("x")
			if tc.pod != nil {
				tc.pod(pod)
			}
			kube.Set(pod, up("good"), broken("others", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }))
			w := open(t, kube, n, tc.edits...)
			eventually(t, "an end", func() bool { return w.isDone(pod) || w.metric(kindDelete, resultOK) > 0 })
			w.settled(t)
			got := outcome{Mended: n.mended[pod.UID] == 1}
			there, ok := fakekube.Get[*corev1.Pod](kube, pod.Namespace, "x")
			if got.Deleted = !ok; ok {
				got.Labelled = there.Labels["cni.istio.io/uninitialized"] == "true"
			}
			eventually(t, "its events", func() bool { return len(reasons(kube, "x")) >= len(tc.want.Events) })
			got.Events = reasons(kube, "x")
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			for _, other := range []string{"good", "others"} {
				if p, ok := fakekube.Get[*corev1.Pod](kube, "shop", other); !ok || p.Labels["cni.istio.io/uninitialized"] != "" || n.mended[p.UID] > 0 {
					t.Errorf("pod %s was touched", other)
				}
			}
			for _, r := range kube.Requests() {
				switch r.Verb + " " + r.Resource {
				case "delete pods", "create pods/eviction":
					if !strings.Contains(string(r.Body), `"uid":"uid-x"`) || !strings.Contains(string(r.Body), `"resourceVersion":`) {
						t.Errorf("%s %s without preconditions: %s", r.Verb, r.Resource, r.Body)
					}
				case "patch pods":
					if !strings.Contains(string(r.Body), `"uid":"uid-x"`) || !strings.Contains(string(r.Body), `"resourceVersion":`) {
						t.Errorf("patch without preconditions: %s", r.Body)
					}
				}
			}
		})
	}
}

// TestLeast: each right that a mode has is needed.
func TestLeast(t *testing.T) {
	for _, tc := range []struct {
		edits []func(*Options)
		uses  []string
	}{
		{[]func(*Options){mode(true, false, false)}, nil},
		{[]func(*Options){mode(false, true, false)}, []string{"delete pods"}},
		{[]func(*Options){mode(false, true, false), func(o *Options) { o.RespectDisruptionBudgets = true }}, []string{"create pods/eviction"}},
		{[]func(*Options){mode(false, false, true)}, []string{"patch pods"}},
	} {
		kube := fakekube.Start(t)
		kube.Set(broken("x"))
		w := open(t, kube, newNurse(), tc.edits...)
		eventually(t, "an event", func() bool { return len(reasons(kube, "x")) > 0 })
		w.stop()
		used := calls(kube)
		want := append([]string{"create events", "watch pods"}, tc.uses...)
		for _, u := range want {
			if used[u] == 0 {
				t.Errorf("%q is granted and not used: %v", u, used)
			}
		}
		for u := range used {
			if !slices.Contains(append(want, "list pods"), u) {
				t.Errorf("%q is used", u)
			}
		}
		// Without it, the attempt is refused, and repeated.
		if tc.uses != nil {
			kube := fakekube.Start(t)
			kube.Set(broken("x"))
			w := openAs(t, kube, newNurse(), func(Options) []rbacv1.PolicyRule { return rules(Options{}) }, tc.edits...)
			k := kindDelete
			if w.LabelPods {
				k = kindLabel
			}
			eventually(t, "failures", func() bool { return w.metric(k, resultFailed) > 1 })
			w.wantReasons(t, "x", "RedirectionRepairFailed")
			if !strings.Contains(w.log.String(), "cannot") {
				t.Errorf("the log does not say what is forbidden:\n%s", w.log)
			}
		}
	}
}

// TestMany: 500 broken pods at once, each dealt with once.
func TestMany(t *testing.T) {
	const many = 500
	for name, m := range map[string]func(*Options){"repair": mode(true, false, false), "delete": mode(false, true, false), "label": mode(false, false, true)} {
		t.Run(name, func(t *testing.T) {
			kube, n := fakekube.Start(t), newNurse()
			for i := range many {
				kube.Set(broken(fmt.Sprint("p", i)))
			}
			start := time.Now()
			w := open(t, kube, n, m)
			eventually(t, "all of them", func() bool {
				return w.metric(kindRepair, resultOK)+w.metric(kindDelete, resultOK)+w.metric(kindLabel, resultOK) == many
			})
			eventually(t, "an event for each", func() bool { return len(fakekube.List[*corev1.Event](kube)) == many })
			t.Logf("%d pods in %v", many, time.Since(start).Round(time.Millisecond))
			w.stop()
			used := calls(kube)
			pods, times := n.count()
			switch name {
			case "repair":
				if pods != many || times != many {
					t.Errorf("%d pods were mended %d times", pods, times)
				}
			case "delete":
				if used["delete pods"] != many {
					t.Errorf("requests %v", used)
				}
			case "label":
				if used["patch pods"] != many {
					t.Errorf("requests %v", used)
				}
			}
		})
	}
}

// TestPace: what changes something in the cluster is bounded in its rate.
func TestPace(t *testing.T) {
	kube := fakekube.Start(t)
	for i := range 30 {
		kube.Set(broken(fmt.Sprint("p", i)))
	}
	start := time.Now()
	w := open(t, kube, newNurse(), mode(false, true, false), func(o *Options) { o.qps, o.burst = 50, 5 })
	eventually(t, "all of them", func() bool { return w.metric(kindDelete, resultOK) == 30 })
	if took := time.Since(start); took < 400*time.Millisecond { // 25 beyond the burst, at 50 a second
		t.Errorf("30 pods were deleted within %v", took)
	}
}

// TestAnswers: what the API server may answer in place of doing it.
func TestAnswers(t *testing.T) {
	type fault = fakekube.Fault
	for _, tc := range []struct {
		name   string
		fault  fault
		failed bool // it counts as a failure
		within [2]time.Duration
	}{
		{"409", fault{Status: 409, Times: 3}, false, [2]time.Duration{}},
		{"429", fault{Status: 429, Times: 3}, true, [2]time.Duration{}},
		{"429 with Retry-After", fault{Status: 429, RetryAfter: 1, Times: 2}, true, [2]time.Duration{2 * time.Second, patience}},
		{"500", fault{Status: 500, Message: "etcd is not there", Times: 3}, true, [2]time.Duration{}},
		{"503 with Retry-After", fault{Status: 503, RetryAfter: 1, Times: 1}, true, [2]time.Duration{time.Second, patience}},
		{"it hangs", fault{Hang: true, Times: 2}, true, [2]time.Duration{2 * hasty, patience}},
		{"it hangs up", fault{Drop: true, Times: 2}, true, [2]time.Duration{}},
	} {
		for _, verb := range []struct {
			verb, resource string
			mode           []func(*Options)
			kind           kind
		}{
			{"delete", "pods", []func(*Options){mode(false, true, false)}, kindDelete},
			{"create", "pods/eviction", []func(*Options){mode(false, true, false), func(o *Options) { o.RespectDisruptionBudgets = true }}, kindDelete},
			{"patch", "pods", []func(*Options){mode(false, false, true)}, kindLabel},
		} {
			t.Run(verb.verb+" "+verb.resource+" "+tc.name, func(t *testing.T) {
				t.Parallel()
				kube := fakekube.Start(t)
				kube.Set(broken("x"))
				f := tc.fault
				f.Verb, f.Resource, f.Name = verb.verb, verb.resource, "x"
				kube.Fail(f)
				edits := verb.mode
				if f.Hang {
					edits = append(slices.Clip(edits), inHaste)
				}
				start := time.Now()
				w := open(t, kube, newNurse(), edits...)
				eventually(t, "the action", func() bool { return w.metric(verb.kind, resultOK) == 1 })
				if took := time.Since(start); took < tc.within[0] || tc.within[1] > 0 && took > tc.within[1] {
					t.Errorf("it took %v, want %v", took, tc.within)
				}
				if n := w.metric(verb.kind, resultFailed); (n > 0) != tc.failed {
					t.Errorf("%d failures are counted", n)
				}
				w.stop()
				// In haste, one that does not hang may be given up too.
				if got, want := calls(kube)[verb.verb+" "+verb.resource], tc.fault.Times+1; got < want || got > want && !f.Hang {
					t.Errorf("%d requests, want %d", got, want)
				}
			})
		}
	}
}

// TestEventsLost: an API server that takes no events keeps nobody from being
// mended, and holds nobody up.
func TestEventsLost(t *testing.T) {
	for _, f := range []fakekube.Fault{{Status: 403}, {Status: 429, RetryAfter: 1}, {Hang: true}} {
		kube, n := fakekube.Start(t), newNurse()
		for i := range 20 {
			kube.Set(broken(fmt.Sprint("p", i)))
		}
		f.Verb, f.Resource = "create", "events"
		lift := kube.Fail(f)
		w := open(t, kube, n, mode(true, false, false), inHaste)
		start := time.Now()
		eventually(t, "all of them", func() bool { return w.metric(kindRepair, resultOK) == 20 })
		if took := time.Since(start); took > patience/2 {
			t.Errorf("%+v: it took %v", f, took)
		}
		eventually(t, "word of the event", func() bool { return strings.Contains(w.log.String(), "an event was not written") })
		lift()
		w.stop()
	}
}

// TestBudget: an eviction that a budget forbids is tried again, and never forced.
func TestBudget(t *testing.T) {
	kube := fakekube.Start(t)
	pdb := &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "pdb"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "shop"}}},
	}
	kube.Set(broken("x"), pdb)
	w := open(t, kube, newNurse(), mode(false, true, true), func(o *Options) { o.RespectDisruptionBudgets = true })
	eventually(t, "attempts", func() bool { return w.metric(kindDelete, resultFailed) >= 3 })
	if _, ok := fakekube.Get[*corev1.Pod](kube, "shop", "x"); !ok {
		t.Fatal("the budget was overridden")
	}
	w.wantReasons(t, "x", "RedirectionRepairFailed") // once, not for each attempt
	fakekube.Update(kube, "shop", "pdb", func(b *policyv1.PodDisruptionBudget) { b.Status.DisruptionsAllowed = 1 })
	eventually(t, "the eviction", func() bool { return w.metric(kindDelete, resultOK) == 1 })
	w.wantReasons(t, "x", "RedirectionMissingPodDeleted", "RedirectionRepairFailed")
	if used := calls(kube); used["delete pods"]+used["patch pods"] > 0 {
		t.Errorf("requests %v", used)
	}
}

// TestAnother: preconditions keep the hand from a pod that has taken the broken
// one's name.
func TestAnother(t *testing.T) {
	kube := fakekube.Start(t)
	kube.Set(broken("x"))
	// The watch is held up, so that the controller knows the old pod alone.
	lift := kube.Fail(fakekube.Fault{Verb: "delete", Resource: "pods", Hang: true})
	w := open(t, kube, newNurse(), mode(false, true, false), inHaste)
	eventually(t, "an attempt", func() bool { return calls(kube)["delete pods"] > 0 })
	fakekube.Remove[*corev1.Pod](kube, "shop", "x")
	kube.Set(up("x", func(p *corev1.Pod) { p.UID = "uid-another" }))
	lift()
	eventually(t, "the end of it", func() bool {
		w.settled(t)
		pod := w.pods.Get("shop", "x")
		return pod != nil && pod.UID == "uid-another" && w.queue.Len() == 0
	})
	if pod, ok := fakekube.Get[*corev1.Pod](kube, "shop", "x"); !ok || pod.UID != "uid-another" {
		t.Errorf("the other pod was deleted")
	}
	eventually(t, "its being forgotten", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.failed)+len(w.done)+len(w.found) == 0
	})
}

// TestOnce: a pod that goes on failing is not dealt with twice; its successor is.
func TestOnce(t *testing.T) {
	kube, n := fakekube.Start(t), newNurse()
	kube.Set(broken("x"))
	w := open(t, kube, n, mode(true, false, false))
	eventually(t, "the first", func() bool { return w.metric(kindRepair, resultOK) == 1 })
	for i := range 5 {
		fakekube.Update(kube, "shop", "x", func(p *corev1.Pod) { p.Status.InitContainerStatuses[0].RestartCount = int32(3 + i) })
	}
	kube.Set(broken("y"))
	eventually(t, "the second", func() bool { return w.metric(kindRepair, resultOK) == 2 })
	fakekube.Remove[*corev1.Pod](kube, "shop", "x")
	kube.Set(broken("x", func(p *corev1.Pod) { p.UID = "uid-successor" }))
	eventually(t, "the successor", func() bool { return w.metric(kindRepair, resultOK) == 3 })
	if _, times := n.count(); times != 3 || w.metric(kindRepair, resultAlready) != 0 {
		t.Errorf("mended %d times", times)
	}
	// Another process finds it mended.
	w.stop()
	w2 := open(t, kube, n, mode(true, true, true))
	eventually(t, "a look at both", func() bool { return w2.metric(kindRepair, resultAlready) == 2 })
	if _, times := n.count(); times != 3 || calls(kube)["delete pods"] != 0 {
		t.Errorf("mended %d times after a restart", times)
	}
}

// TestMendedAndFails: a pod that is redirected, and whose init container fails all
// the same when it is started after that, is told each time; one that has lost its
// redirection meanwhile is mended again.
func TestMendedAndFails(t *testing.T) {
	kube, n := fakekube.Start(t), newNurse()
	pod := broken("x")
	kube.Set(pod)
	w := open(t, kube, n, mode(true, true, true))
	eventually(t, "its being mended", func() bool { return w.metric(kindRepair, resultOK) == 1 })
	again := func(started time.Time) {
		t.Helper()
		now, ok := fakekube.Get[*corev1.Pod](kube, pod.Namespace, pod.Name)
		if !ok {
			t.Fatal("the pod is gone")
		}
		now = now.DeepCopy()
		_, end := w.ended(now)
		end.StartedAt = metav1.NewTime(started)
		kube.Set(now)
	}
	again(time.Now().Add(-time.Minute)) // it was started before it was mended
	w.settled(t)
	w.wantReasons(t, "x", "RedirectionRepaired")

	again(time.Now().Add(2 * time.Second))
	eventually(t, "its being told", func() bool { return w.metric(kindRepair, resultAlready) == 1 })
	w.wantReasons(t, "x", "RedirectionNotSeen", "RedirectionRepaired")

	n.mu.Lock()
	delete(n.good, pod.UID)
	n.mu.Unlock()
	again(time.Now().Add(time.Minute))
	eventually(t, "its being mended again", func() bool { return w.metric(kindRepair, resultOK) == 2 })
}

// TestMendFails: a failure is told once, tried again, and falls back to nothing
// that the pod would not survive.
func TestMendFails(t *testing.T) {
	kube, n := fakekube.Start(t), newNurse()
	kube.Set(broken("x"))
	var tries int
	n.fails = func(*corev1.Pod) error {
		if tries++; tries <= 4 {
			return errors.New("the map is full")
		}
		return nil
	}
	w := open(t, kube, n, mode(true, true, true))
	eventually(t, "its being mended", func() bool { return w.metric(kindRepair, resultOK) == 1 })
	w.wantReasons(t, "x", "RedirectionRepairFailed", "RedirectionRepaired")
	if got := w.metric(kindRepair, resultFailed); got != 4 || calls(kube)["delete pods"] > 0 {
		t.Errorf("%d failures, requests %v", got, calls(kube))
	}
	if strings.Count(w.log.String(), "level=WARN") != 1 {
		t.Errorf("warnings:\n%s", w.log)
	}
}

// TestSweep: running pods that have lost their redirection are told of, and
// mended where that is on; others' are left to them.
func TestSweep(t *testing.T) {
	for _, mends := range []bool{true, false} {
		t.Run(fmt.Sprint("repair ", mends), func(t *testing.T) {
			kube, n := fakekube.Start(t), newNurse()
			n.good["uid-good"] = true
			n.states["uid-wrong"], n.states["uid-foreign"] = stateWrong, stateForeign
			kube.Set(up("good"), up("lost"), up("wrong"), up("foreign"),
				up("plain", func(p *corev1.Pod) { p.Spec.Containers = p.Spec.Containers[:1] }),
				up("none", func(p *corev1.Pod) { p.Annotations["sidecar.istio.io/interceptionMode"] = "NONE" }),
				up("going", func(p *corev1.Pod) {
					p.DeletionTimestamp = &metav1.Time{Time: time.Now()}
					p.Finalizers = []string{"x/y"}
				}),
				up("young", func(p *corev1.Pod) {
					for i := range p.Status.ContainerStatuses {
						p.Status.ContainerStatuses[i].State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}
					}
				}),
				up("others", func(p *corev1.Pod) { p.Spec.NodeName = "node-2" }))
			var mu sync.Mutex
			var listed []redirect.PodRef
			w := open(t, kube, n, mode(mends, true, true), func(o *Options) {
				o.sweepEvery = 5 * time.Millisecond
				o.list = func(pods []redirect.PodRef) error {
					mu.Lock()
					defer mu.Unlock()
					listed = pods
					return nil
				}
			})
			want := 0
			if mends {
				want = 1
			}
			eventually(t, "the sweeps", func() bool {
				n.mu.Lock()
				defer n.mu.Unlock()
				return n.tidied > 5
			})
			for k, found := range map[kind]int{kindLost: 1, kindWrong: 1} {
				if got := w.metric(k, resultFound); got != found {
					t.Errorf("%s: %d found, want %d", k, got, found)
				}
				if got := w.metric(k, resultOK); got != want {
					t.Errorf("%s: %d mended, want %d", k, got, want)
				}
			}
			if got := w.metric(kindLost, resultSkipped); got != 1 {
				t.Errorf("%d are left to others, want 1", got)
			}
			n.mu.Lock()
			mended := len(n.mended)
			n.mu.Unlock()
			if mended != 2*want {
				t.Errorf("mended %v", n.mended)
			}
			// What is mended is off the list by the next sweep.
			list := []redirect.PodRef{{Namespace: "shop", Name: "lost", UID: "uid-lost"}}
			if mends {
				list = []redirect.PodRef{}
			}
			eventually(t, "the list for status", func() bool {
				mu.Lock()
				defer mu.Unlock()
				return slices.Equal(listed, list)
			})
			lost := []string{"RedirectionLost"}
			if mends {
				lost = append(lost, "RedirectionRepaired")
			}
			w.wantReasons(t, "lost", lost...)
			w.wantReasons(t, "wrong", lost...)
			w.wantReasons(t, "foreign", "RedirectionLost")
			for _, name := range []string{"good", "plain", "none", "going", "young", "others"} {
				w.wantReasons(t, name)
			}
			if used := calls(kube); used["delete pods"]+used["patch pods"] > 0 {
				t.Errorf("requests %v", used)
			}
			// It is lost again: it is told and mended again.
			if mends {
				n.mu.Lock()
				delete(n.good, "uid-lost")
				n.mu.Unlock()
				eventually(t, "its being mended again", func() bool { return w.metric(kindLost, resultOK) == 2 })
			}
		})
	}
}

func TestClip(t *testing.T) {
	for in, want := range map[string]string{"abc": "abc", "abcdefghij": "abcde…", "abcd€fghij": "abcd…", strings.Repeat("€", 5): "€…"} {
		if got := clip(in, 8); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

var _ io.Writer = (*lockedBuffer)(nil)
