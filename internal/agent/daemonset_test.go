// SPDX-License-Identifier: Apache-2.0

package agent

import (
	"bytes"
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/internal/fakekube"
	"shunt.dev/shunt/internal/testbed"
)

func newClient(t *testing.T, s *fakekube.Server) kubernetes.Interface {
	t.Helper()
	c, err := clientcmd.RESTConfigFromKubeConfig(s.Kubeconfig(s.Token()))
	if err != nil {
		t.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// selecting has a DaemonSet select nodes.
func selecting(label, value string) func(*appsv1.DaemonSet) {
	return func(d *appsv1.DaemonSet) { d.Spec.Template.Spec.NodeSelector = map[string]string{label: value} }
}

func requiring(label string, op corev1.NodeSelectorOperator, values ...string) func(*appsv1.DaemonSet) {
	return func(d *appsv1.DaemonSet) {
		d.Spec.Template.Spec.Affinity = &corev1.Affinity{NodeAffinity: &corev1.NodeAffinity{
			RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{
				{MatchExpressions: []corev1.NodeSelectorRequirement{{Key: label, Operator: op, Values: values}}},
			}},
		}}
	}
}

// TestVerdict: the plugin goes only where it is sure that nobody wants it.
func TestVerdict(t *testing.T) {
	deleted := func(s *fakekube.Server) { fakekube.Remove[*appsv1.DaemonSet](s, "shunt", "shunt-node") }
	update := func(f func(*appsv1.DaemonSet)) func(*fakekube.Server) {
		return func(s *fakekube.Server) { fakekube.Update(s, "shunt", "shunt-node", f) }
	}
	refusing := func(resource string, status int) func(*fakekube.Server) {
		return func(s *fakekube.Server) { s.Fail(fakekube.Fault{Resource: resource, Status: status}) }
	}
	all := func(steps ...func(*fakekube.Server)) func(*fakekube.Server) {
		return func(s *fakekube.Server) {
			for _, step := range steps {
				step(s)
			}
		}
	}
	for _, tc := range []struct {
		name   string
		before func(*fakekube.Server) // before the agent starts
		then   func(*fakekube.Server) // what the watch sees, if it can
		last   func(*fakekube.Server) // when that is seen
		want   verdict
		why    string
	}{
		{name: "nothing has happened", want: keep, why: "is for every node"},
		{name: "another image", then: update(func(d *appsv1.DaemonSet) { d.Labels = map[string]string{"a": "b"} }), want: keep, why: "is for every node"},
		{name: "deleted", last: deleted, want: remove, why: "is deleted"},
		{name: "deleted, and seen", then: deleted, want: remove, why: "is deleted"},
		{name: "deleted, and the token is void", then: deleted, last: refusing("", http.StatusUnauthorized), want: remove, why: "is deleted"},
		{name: "deleted, and the role is gone", then: deleted, last: refusing("", http.StatusForbidden), want: remove, why: "is deleted"},
		{name: "deleted, and the API server is down", then: deleted, last: func(s *fakekube.Server) { s.Down() }, want: remove, why: "is deleted"},
		{name: "being deleted", then: update(func(d *appsv1.DaemonSet) { now := metav1.Now(); d.DeletionTimestamp = &now }), want: remove, why: "is being deleted"},
		{
			name: "being deleted, and the role is gone", want: remove, why: "is deleted",
			then: update(func(d *appsv1.DaemonSet) { now := metav1.Now(); d.DeletionTimestamp = &now }), last: refusing("", http.StatusForbidden),
		},
		{name: "deleted and made anew", then: deleted, last: func(s *fakekube.Server) { s.Set(daemonSet()) }, want: keep, why: "is for every node"},
		{name: "the token is void", last: refusing("", http.StatusUnauthorized), want: unknown, why: "get DaemonSet shunt/shunt-node: "},
		{name: "the API server is down", last: func(s *fakekube.Server) { s.Down() }, want: unknown, why: "refused"},
		{name: "the API server hangs", last: func(s *fakekube.Server) { s.Fail(fakekube.Fault{Hang: true}) }, want: unknown, why: "get DaemonSet"},
		{name: "never there", before: deleted, want: unknown, why: "never was while this agent ran"},
		{name: "the system selector", then: update(selecting(corev1.LabelOSStable, "linux")), last: refusing("nodes", http.StatusForbidden), want: keep, why: "every node"},
		{name: "selects the node", then: update(selecting("pool", "mesh")), want: keep, why: "selects node node-1"},
		{name: "selects others", then: update(selecting("pool", "other")), want: remove, why: "does not select node node-1 any more"},
		{name: "requires the node", then: update(requiring("pool", corev1.NodeSelectorOpIn, "a", "mesh")), want: keep, why: "selects node node-1"},
		{name: "requires others", then: update(requiring("pool", corev1.NodeSelectorOpDoesNotExist)), want: remove, why: "does not select"},
		{name: "requires nonsense", then: update(requiring("pool", "Near", "a")), want: unknown, why: "Near"},
		{
			name: "the node has lost its label", want: remove, why: "does not select", before: update(selecting("pool", "mesh")),
			last: func(s *fakekube.Server) {
				fakekube.Update(s, "", "node-1", func(n *corev1.Node) { n.Labels = nil })
			},
		},
		{name: "the node may not be asked", then: update(selecting("pool", "other")), last: refusing("nodes", http.StatusForbidden), want: unknown, why: "get node node-1"},
		{
			name: "the node is gone", want: unknown, why: "get node node-1",
			last: all(update(selecting("pool", "other")), func(s *fakekube.Server) { fakekube.Remove[*corev1.Node](s, "", "node-1") }),
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := fakekube.Start(t)
			s.Set(daemonSet(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node-1", Labels: map[string]string{"pool": "mesh"}}})
			if tc.before != nil {
				tc.before(s)
			}
			o := newOwner(newClient(t, s), "shunt", "shunt-node", "node-1", logTo(new(bytes.Buffer)))
			// The API server's answer may take its time on a busy machine.
			o.see = 100 * time.Millisecond
			if strings.HasSuffix(tc.name, "hangs") {
				o.ask = o.see
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				_ = o.run(ctx) // its context's
			}()
			defer func() { cancel(); <-done }()
			look := func() string {
				o.mu.Lock()
				defer o.mu.Unlock()
				if o.last == nil {
					return ""
				}
				return o.last.ResourceVersion
			}
			version := func() string {
				d, ok := fakekube.Get[*appsv1.DaemonSet](s, "shunt", "shunt-node")
				if !ok {
					return ""
				}
				return d.ResourceVersion
			}
			seen := func() bool { return s.Watches() > 0 && look() == version() }
			testbed.Eventually(t, "the watch to begin", seen)
			if tc.then != nil {
				tc.then(s)
				testbed.Eventually(t, "the watch to see it", seen)
			}
			if tc.last != nil {
				tc.last(s)
			}
			began := time.Now()
			got, why := o.verdict(t.Context())
			if got != tc.want || !strings.Contains(why, tc.why) {
				t.Errorf("%v, %s; want %v, %s", got, why, tc.want, tc.why)
			}
			if took := time.Since(began); took > o.ask+o.see+2*time.Second {
				t.Errorf("it took %v", took)
			}
		})
	}
}

// TestVerdictWaits: the watch may see it a moment after the credentials are gone.
func TestVerdictWaits(t *testing.T) {
	s := fakekube.Start(t)
	s.Set(daemonSet())
	o := newOwner(newClient(t, s), "shunt", "shunt-node", "node-1", logTo(new(bytes.Buffer)))
	o.note(daemonSet())
	s.RotateToken()
	got := make(chan verdict)
	go func() {
		v, _ := o.verdict(t.Context())
		got <- v
	}()
	testbed.Eventually(t, "the question", func() bool { return len(s.Requests()) > 0 })
	o.note(nil)
	if v := <-got; v != remove {
		t.Errorf("got %v", v)
	}
}

// TestVerdictWithoutWatch: what the API server says counts though the watch has not
// seen it.
func TestVerdictWithoutWatch(t *testing.T) {
	s := fakekube.Start(t)
	o := newOwner(newClient(t, s), "shunt", "shunt-node", "node-1", logTo(new(bytes.Buffer)))
	o.note(daemonSet())
	if v, why := o.verdict(t.Context()); v != remove {
		t.Errorf("got %v: %s", v, why)
	}
}

func daemonSet() *appsv1.DaemonSet {
	return &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "shunt", Name: "shunt-node"}}
}
