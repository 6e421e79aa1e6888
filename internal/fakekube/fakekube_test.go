// SPDX-License-Identifier: Apache-2.0

package fakekube_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/internal/fakekube"
)

// client returns a clientset for the bearer of a token.
func client(t *testing.T, s *fakekube.Server, token string) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.RESTConfigFromKubeConfig(s.Kubeconfig(token))
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1
	config.WarningHandler = rest.NoWarnings{}
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func pod(name, node string, labels ...string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, Labels: map[string]string{}},
		Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "app", Image: "x"}}},
	}
	for _, l := range labels {
		p.Labels[l] = "true"
	}
	return p
}

// eventually polls until f returns nil.
func eventually(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatal(err)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// informer runs an informer on the pods of node n1 and returns what tells its
// store's names.
func informer(t *testing.T, s *fakekube.Server) (names func() []string, log func() []string) {
	t.Helper()
	lw := cache.NewListWatchFromClient(client(t, s, s.Token()).CoreV1().RESTClient(), "pods", "", fields.OneTermEqualSelector("spec.nodeName", "n1"))
	i := cache.NewSharedInformer(lw, &corev1.Pod{}, 0)
	var mu sync.Mutex
	var events []string
	note := func(what string, obj any) {
		mu.Lock()
		defer mu.Unlock()
		if d, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = d.Obj
		}
		p := obj.(*corev1.Pod)
		events = append(events, what+" "+p.Name)
	}
	if _, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { note("add", obj) },
		UpdateFunc: func(_, obj any) { note("update", obj) },
		DeleteFunc: func(obj any) { note("delete", obj) },
	}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { i.RunWithContext(ctx); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	eventually(t, func() error {
		if !i.HasSynced() {
			return errors.New("the informer is not synced")
		}
		return nil
	})
	names = func() []string {
		var list []string
		for _, key := range i.GetStore().ListKeys() {
			list = append(list, strings.TrimPrefix(key, "ns/"))
		}
		slices.Sort(list)
		return list
	}
	return names, func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(events)
	}
}

func has(t *testing.T, get func() []string, want ...string) {
	t.Helper()
	eventually(t, func() error {
		if diff := cmp.Diff(want, get()); diff != "" {
			return fmt.Errorf("(-want +got):\n%s", diff)
		}
		return nil
	})
}

// TestInformer: an informer of client-go follows what happens, by a streamed
// list and by a list of its own.
func TestInformer(t *testing.T) {
	for _, streaming := range []bool{true, false} {
		t.Run(fmt.Sprintf("streaming=%v", streaming), func(t *testing.T) {
			s := fakekube.Start(t)
			s.SetWatchList(streaming)
			s.Set(pod("a", "n1"), pod("b", "n2"), pod("c", ""))
			names, events := informer(t, s)
			has(t, names, "a")
			s.Set(pod("d", "n1"))
			fakekube.Update(s, "ns", "c", func(p *corev1.Pod) { p.Spec.NodeName = "n1" }) // it is scheduled
			fakekube.Update(s, "ns", "a", func(p *corev1.Pod) { p.Labels["x"] = "y" })
			fakekube.Update(s, "ns", "d", func(p *corev1.Pod) { p.Spec.NodeName = "n3" }) // never happens; leaves the selection
			fakekube.Remove[*corev1.Pod](s, "ns", "b")
			has(t, names, "a", "c")
			other := pod("a", "n1")
			other.UID = "another"
			s.Set(other)
			has(t, events, "add a", "add d", "add c", "update a", "delete d", "delete a", "add a")
			lists := 0
			for _, r := range s.Requests() {
				if r.Verb == "list" {
					lists++
				}
			}
			if streaming && lists != 0 || !streaming && lists != 1 {
				t.Errorf("%d lists", lists)
			}
		})
	}
}

// TestInterrupted: an informer catches up with what happened while its watch
// was cut, while its version expired, and while the server was gone.
func TestInterrupted(t *testing.T) {
	s := fakekube.Start(t)
	s.Set(pod("a", "n1"))
	names, events := informer(t, s)
	change := func(pods ...string) {
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			fakekube.Remove[*corev1.Pod](s, "ns", name)
		}
		for _, name := range pods {
			s.Set(pod(name, "n1"))
		}
	}
	s.DropWatches()
	change("b")
	has(t, names, "b")

	s.Bookmark()
	lift := s.Fail(fakekube.Fault{Verb: "watch", Status: http.StatusTooManyRequests, RetryAfter: 1})
	s.DropWatches()
	change("c", "d")
	s.Compact()
	lift()
	has(t, names, "c", "d")

	s.Down()
	change("e")
	if err := s.Up(); err != nil {
		t.Fatal(err)
	}
	has(t, names, "e")
	// The store knows before the handlers do.
	eventually(t, func() error {
		if got := events(); len(got) != 9 {
			return fmt.Errorf("events: %q", got)
		}
		return nil
	})
}

// TestWatch: frames as the API server sends them.
func TestWatch(t *testing.T) {
	s := fakekube.Start(t)
	s.Set(pod("a", "n1"), pod("b", "n1", "seen"))
	pods := client(t, s, s.Token()).CoreV1().Pods("")
	next := func(w watch.Interface) watch.Event {
		select {
		case e := <-w.ResultChan():
			return e
		case <-time.After(30 * time.Second):
			t.Fatal("no event")
		}
		return watch.Event{}
	}
	start := func(o metav1.ListOptions) watch.Interface {
		w, err := pods.Watch(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Stop)
		return w
	}
	yes := true
	w := start(metav1.ListOptions{LabelSelector: "seen", AllowWatchBookmarks: true, SendInitialEvents: &yes, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
	if e := next(w); e.Type != watch.Added || e.Object.(*corev1.Pod).Name != "b" {
		t.Errorf("got %+v", e)
	}
	end := next(w)
	if end.Type != watch.Bookmark || end.Object.(*corev1.Pod).Annotations[metav1.InitialEventsAnnotationKey] != "true" {
		t.Errorf("got %+v", end)
	}
	// Into the selection, changed, out of it, with versions that grow.
	fakekube.Update(s, "ns", "a", func(p *corev1.Pod) { p.Labels["seen"] = "true" })
	fakekube.Update(s, "ns", "a", func(p *corev1.Pod) { p.Labels["more"] = "true" })
	fakekube.Update(s, "ns", "a", func(p *corev1.Pod) { delete(p.Labels, "seen") })
	last := end.Object.(*corev1.Pod).ResourceVersion
	for _, want := range []watch.EventType{watch.Added, watch.Modified, watch.Deleted} {
		e := next(w)
		if rv := e.Object.(*corev1.Pod).ResourceVersion; e.Type != want || rv <= last {
			t.Errorf("got %s at %s, want %s behind %s", e.Type, rv, want, last)
		} else {
			last = rv
		}
	}
	s.Bookmark()
	if e := next(w); e.Type != watch.Bookmark || e.Object.(*corev1.Pod).ResourceVersion != last {
		t.Errorf("got %+v, want a bookmark at %s", e, last)
	}
	// From a version, without what it has seen.
	old := start(metav1.ListOptions{ResourceVersion: end.Object.(*corev1.Pod).ResourceVersion})
	if e := next(old); e.Type != watch.Modified || e.Object.(*corev1.Pod).Name != "a" {
		t.Errorf("got %+v", e)
	}
	s.Compact()
	gone := start(metav1.ListOptions{ResourceVersion: last})
	if e := next(gone); e.Type != watch.Error || !apierrors.IsResourceExpired(apierrors.FromObject(e.Object)) {
		t.Errorf("got %+v", e)
	}
	if _, ok := <-gone.ResultChan(); ok {
		t.Error("the watch goes on behind an error")
	}
	second := int64(1)
	short := start(metav1.ListOptions{TimeoutSeconds: &second, AllowWatchBookmarks: true, ResourceVersion: "0"})
	var types []watch.EventType
	for e := range short.ResultChan() {
		types = append(types, e.Type)
	}
	if diff := cmp.Diff([]watch.EventType{watch.Added, watch.Added, watch.Bookmark}, types); diff != "" {
		t.Errorf("a watch that times out (-want +got):\n%s", diff)
	}
	if _, err := pods.Watch(t.Context(), metav1.ListOptions{ResourceVersion: "99999999"}); !apierrors.IsTimeout(err) {
		t.Errorf("a version to come: %v", err)
	}
	s.SetWatchList(false)
	_, err := pods.Watch(t.Context(), metav1.ListOptions{AllowWatchBookmarks: true, SendInitialEvents: &yes, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
	if !apierrors.IsInvalid(err) {
		t.Errorf("a streamed list that can't be had: %v", err)
	}
}

// TestList: pages, selectors.
func TestList(t *testing.T) {
	s := fakekube.Start(t)
	for i := range 7 {
		s.Set(pod(fmt.Sprintf("p%d", i), fmt.Sprintf("n%d", i%2), fmt.Sprintf("l%d", i%3)))
	}
	pods := client(t, s, s.Token()).CoreV1().Pods("ns")
	list := func(o metav1.ListOptions) (string, *corev1.PodList) {
		l, err := pods.List(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		names := ""
		for _, p := range l.Items {
			names += p.Name
		}
		return names, l
	}
	if got, _ := list(metav1.ListOptions{FieldSelector: "spec.nodeName=n0", LabelSelector: "l0"}); got != "p0p6" {
		t.Errorf("selected %s", got)
	}
	if got, _ := list(metav1.ListOptions{Limit: 3, ResourceVersion: "0"}); got != "p0p1p2p3p4p5p6" {
		t.Errorf("from the cache: %s", got)
	}
	got, l := list(metav1.ListOptions{Limit: 3})
	if got != "p0p1p2" || *l.RemainingItemCount != 4 {
		t.Errorf("first page: %s, %d more", got, *l.RemainingItemCount)
	}
	fakekube.Remove[*corev1.Pod](s, "ns", "p4") // a list is consistent
	if got, _ := list(metav1.ListOptions{Limit: 3, Continue: l.Continue}); got != "p3p4p5" {
		t.Errorf("second page: %s", got)
	}
	s.Compact()
	if _, err := pods.List(t.Context(), metav1.ListOptions{Limit: 3, Continue: l.Continue}); !apierrors.IsResourceExpired(err) {
		t.Errorf("an old page: %v", err)
	}
}

// TestWrites: create, update, patch, delete and evict, with preconditions.
func TestWrites(t *testing.T) {
	s := fakekube.Start(t)
	c := client(t, s, s.Token())
	pods, ctx := c.CoreV1().Pods("ns"), t.Context()
	a := pod("a", "n1")
	s.Set(a)
	if a.UID == "" || a.ResourceVersion == "" {
		t.Fatalf("not filled in: %+v", a.ObjectMeta)
	}

	for name, err := range map[string]error{
		"get":    second(pods.Get(ctx, "none", metav1.GetOptions{})),
		"delete": pods.Delete(ctx, "none", metav1.DeleteOptions{}),
		"patch":  second(pods.Patch(ctx, "none", types.MergePatchType, []byte(`{}`), metav1.PatchOptions{})),
	} {
		if !apierrors.IsNotFound(err) {
			t.Errorf("%s of what is not there: %v", name, err)
		}
	}
	if _, err := pods.Create(ctx, pod("a", "n1"), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("create what is there: %v", err)
	}

	patch := `{"metadata":{"labels":{"broken":"true"}}}`
	for _, typ := range []types.PatchType{types.StrategicMergePatchType, types.MergePatchType} {
		got, err := pods.Patch(ctx, "a", typ, []byte(patch), metav1.PatchOptions{})
		if err != nil || got.Labels["broken"] != "true" || got.UID != a.UID || got.ResourceVersion == a.ResourceVersion {
			t.Errorf("%s: %+v, %v", typ, got, err)
		}
		stale := fmt.Sprintf(`{"metadata":{"resourceVersion":%q,"labels":{"broken":null}}}`, a.ResourceVersion)
		if _, err := pods.Patch(ctx, "a", typ, []byte(stale), metav1.PatchOptions{}); !apierrors.IsConflict(err) {
			t.Errorf("%s of an old version: %v", typ, err)
		}
		if _, err := pods.Patch(ctx, "a", typ, []byte(`{"metadata":{"uid":"x"}}`), metav1.PatchOptions{}); !apierrors.IsConflict(err) {
			t.Errorf("%s of another pod: %v", typ, err)
		}
	}
	if _, err := pods.UpdateStatus(ctx, a, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("update of an old version: %v", err)
	}

	uid, rv := types.UID("x"), a.ResourceVersion
	for _, p := range []*metav1.Preconditions{{UID: &uid}, {UID: &a.UID, ResourceVersion: &rv}} {
		if err := pods.Delete(ctx, "a", metav1.DeleteOptions{Preconditions: p}); !apierrors.IsConflict(err) {
			t.Errorf("delete with %v: %v", p, err)
		}
	}
	s.SetGraceful(true)
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &a.UID}}); err != nil {
		t.Error(err)
	}
	if got, ok := fakekube.Get[*corev1.Pod](s, "ns", "a"); !ok || got.DeletionTimestamp == nil {
		t.Errorf("a graceful delete left %v, %+v", ok, got)
	}
	now := int64(0)
	if err := pods.Delete(ctx, "a", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Error(err)
	}
	if left := fakekube.List[*corev1.Pod](s); len(left) != 0 {
		t.Errorf("left: %v", left)
	}

	s.SetGraceful(false)
	b := pod("b", "n1", "guarded")
	budget := &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pdb"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"guarded": "true"}}},
	}
	s.Set(b, budget)
	evict := func() error {
		return pods.EvictV1(ctx, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "b"}})
	}
	if err := evict(); !apierrors.IsTooManyRequests(err) {
		t.Errorf("evict against the budget: %v", err)
	}
	fakekube.Update(s, "ns", "pdb", func(b *policyv1.PodDisruptionBudget) { b.Status.DisruptionsAllowed = 1 })
	if err := evict(); err != nil {
		t.Error(err)
	}
	if _, ok := fakekube.Get[*corev1.Pod](s, "ns", "b"); ok {
		t.Error("evicted, and still there")
	}

	ev, err := c.CoreV1().Events("ns").Create(ctx, &corev1.Event{ObjectMeta: metav1.ObjectMeta{GenerateName: "e."}, Reason: "R"}, metav1.CreateOptions{})
	if err != nil || !strings.HasPrefix(ev.Name, "e.") || len(fakekube.List[*corev1.Event](s)) != 1 {
		t.Errorf("event %+v, %v", ev, err)
	}
	s.Set(&appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "ds"}})
	if _, err := c.AppsV1().DaemonSets("ns").Get(ctx, "ds", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
	s.Set(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}})
	if _, err := c.CoreV1().Nodes().Get(ctx, "n1", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }

// TestAccess: who may do what.
func TestAccess(t *testing.T) {
	s := fakekube.Start(t)
	s.Set(pod("a", "n1"))
	rules := func(verbs, resources string, names ...string) []rbacv1.PolicyRule {
		return []rbacv1.PolicyRule{{APIGroups: []string{""}, Verbs: strings.Fields(verbs), Resources: strings.Fields(resources), ResourceNames: names}}
	}
	s.AddToken("reader", "r", fakekube.Grant{Rules: rules("get list", "pods")})
	s.AddToken("there", "r", fakekube.Grant{Namespace: "ns", Rules: rules("*", "pods")})
	s.AddToken("named", "r", fakekube.Grant{Rules: rules("get", "pods", "b")})
	ctx := t.Context()
	for _, tc := range []struct {
		token                        string
		get, list, remove, elsewhere bool
	}{
		{token: "reader", get: true, list: true},
		{token: "there", get: true, remove: true},
		{token: "named"},
	} {
		c := client(t, s, tc.token).CoreV1()
		for what, got := range map[string]struct {
			err error
			may bool
		}{
			"get":    {second(c.Pods("ns").Get(ctx, "a", metav1.GetOptions{})), tc.get},
			"list":   {second(c.Pods("").List(ctx, metav1.ListOptions{})), tc.list},
			"evict":  {c.Pods("ns").EvictV1(ctx, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "a"}}), false},
			"delete": {c.Pods("ns").Delete(ctx, "a", metav1.DeleteOptions{}), tc.remove},
		} {
			if (got.err == nil) != got.may || !got.may && !apierrors.IsForbidden(got.err) {
				t.Errorf("%s: %s: %v, want allowed: %v", tc.token, what, got.err, got.may)
			}
		}
		s.Set(pod("a", "n1"))
	}
	s.RevokeToken("reader")
	if _, err := client(t, s, "reader").CoreV1().Pods("ns").Get(ctx, "a", metav1.GetOptions{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("revoked: %v", err)
	}
}

// TestTokens: an account's tokens, by the rights to ask for them.
func TestTokens(t *testing.T) {
	s := fakekube.Start(t)
	s.Set(pod("a", "n1"), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "sa"}})
	grants := []fakekube.Grant{{Namespace: "ns", Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{""}, Resources: []string{"pods"}, Verbs: []string{"get"}},
		{APIGroups: []string{""}, Resources: []string{"serviceaccounts/token"}, ResourceNames: []string{"sa", "none"}, Verbs: []string{"create"}},
	}}}
	bound := s.AccountToken("ns", "sa", "agent", time.Hour, grants...)
	ask := func(token, name string, life int64) (*authenticationv1.TokenRequest, error) {
		return client(t, s, token).CoreV1().ServiceAccounts("ns").CreateToken(t.Context(), name,
			&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: &life}}, metav1.CreateOptions{})
	}
	get := func(token string) error {
		return second(client(t, s, token).CoreV1().Pods("ns").Get(t.Context(), "a", metav1.GetOptions{}))
	}
	got, err := ask(bound, "sa", 7200)
	if err != nil {
		t.Fatal(err)
	}
	if left := time.Until(got.Status.ExpirationTimestamp.Time); left < 7100*time.Second || left > 7200*time.Second {
		t.Errorf("expires in %s", left)
	}
	if byAdmin, err := ask(s.Token(), "sa", 7200); err != nil || get(byAdmin.Status.Token) != nil {
		t.Errorf("asked for by another: %v", err)
	}
	for what, tc := range map[string]struct {
		name string
		life int64
		is   func(error) bool
	}{
		"no such account": {"none", 7200, apierrors.IsNotFound},
		"another's":       {"other", 7200, apierrors.IsForbidden},
		"too short":       {"sa", 599, apierrors.IsInvalid},
	} {
		if _, err := ask(bound, tc.name, tc.life); !tc.is(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := get(bound); err != nil {
		t.Error(err)
	}
	s.RevokeToken(bound)
	if err := get(bound); !apierrors.IsUnauthorized(err) {
		t.Errorf("with a token whose pod is gone: %v", err)
	}
	if err := get(got.Status.Token); err != nil {
		t.Errorf("with one that is bound to none: %v", err)
	}
	s.SetTokenLife(time.Second)
	if got, err = ask(got.Status.Token, "sa", 7200); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		if err := get(got.Status.Token); !apierrors.IsUnauthorized(err) {
			return fmt.Errorf("with one that has expired: %w", err)
		}
		return nil
	})
}

// TestFaults: what is told to fail does, so often, and nothing else.
func TestFaults(t *testing.T) {
	s := fakekube.Start(t)
	s.Set(pod("a", "n1"), pod("b", "n1"))
	pods := client(t, s, s.Token()).CoreV1().Pods("ns")
	get := func(name string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		return second(pods.Get(ctx, name, metav1.GetOptions{}))
	}
	s.Fail(fakekube.Fault{Verb: "get", Resource: "pods", Name: "a", Status: 500, Message: "etcd is down", Times: 2})
	for range 2 {
		if err := get("a"); !apierrors.IsInternalError(err) || err.Error() != "etcd is down" {
			t.Errorf("got %v", err)
		}
		if err := get("b"); err != nil {
			t.Error(err)
		}
	}
	if err := get("a"); err != nil {
		t.Errorf("a third time: %v", err)
	}
	lift := s.Fail(fakekube.Fault{Drop: true})
	if err := get("a"); err == nil {
		t.Error("not dropped")
	}
	lift()
	lift = s.Fail(fakekube.Fault{Hang: true})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := pods.Get(ctx, "a", metav1.GetOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	lift()
	if err := get("a"); err != nil {
		t.Errorf("lifted: %v", err)
	}
}
