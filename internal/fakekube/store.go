// SPDX-License-Identifier: Apache-2.0

package fakekube

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
)

// An Object is one of Kubernetes' types that the server keeps: *corev1.Pod,
// Node, Namespace, ServiceAccount, Event, *appsv1.DaemonSet, *eventsv1.Event,
// *policyv1.PodDisruptionBudget.
type Object interface {
	metav1.Object
	runtime.Object
}

// A resource is a kind of objects.
type resource struct {
	group, version, name, kind string
	namespaced                 bool
	blank                      Object
}

var resources = []*resource{
	{"", "v1", "pods", "Pod", true, &corev1.Pod{}},
	{"", "v1", "nodes", "Node", false, &corev1.Node{}},
	{"", "v1", "namespaces", "Namespace", false, &corev1.Namespace{}},
	{"", "v1", "events", "Event", true, &corev1.Event{}},
	{"", "v1", "serviceaccounts", "ServiceAccount", true, &corev1.ServiceAccount{}},
	{"events.k8s.io", "v1", "events", "Event", true, &eventsv1.Event{}},
	{"apps", "v1", "daemonsets", "DaemonSet", true, &appsv1.DaemonSet{}},
	{"policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", true, &policyv1.PodDisruptionBudget{}},
}

func (r *resource) key() string { return r.name + "." + r.group }

func (r *resource) groupResource() schema.GroupResource {
	return schema.GroupResource{Group: r.group, Resource: r.name}
}

func (r *resource) apiVersion() string {
	return schema.GroupVersion{Group: r.group, Version: r.version}.String()
}

// fresh returns an empty object of the kind.
func (r *resource) fresh() Object {
	return reflect.New(reflect.TypeOf(r.blank).Elem()).Interface().(Object)
}

// stored is an object at one resource version. It is never changed.
type stored struct {
	obj    Object
	raw    []byte // with apiVersion and kind
	fields fields.Set
}

func (o *stored) matches(q *query) bool {
	return o != nil && (q.namespace == "" || q.namespace == o.obj.GetNamespace()) &&
		q.labels.Matches(labels.Set(o.obj.GetLabels())) && q.fields.Matches(o.fields)
}

// A change is one step of history.
type change struct {
	rv       uint64
	old, cur *stored // nil before there was one, and when it was deleted
	last     *stored // when it was deleted: what was, at rv
}

// event is how a watch with a selector sees the change; "" for not at all.
func (c *change) event(q *query) (watch.EventType, *stored) {
	was, is := c.old.matches(q), c.cur.matches(q)
	switch {
	case was && is:
		return watch.Modified, c.cur
	case is:
		return watch.Added, c.cur
	case was && c.cur == nil:
		return watch.Deleted, c.last
	case was: // it left the selection: shown as it was, at the new version
		return watch.Deleted, c.last
	}
	return "", nil
}

// A table has the objects of one resource.
type table struct {
	res       *resource
	items     map[string]*stored // by namespace/name
	log       []change
	compacted uint64 // a watch can't begin before this version any more
}

// sorted returns the objects that match, by key.
func (t *table) sorted(q *query) []*stored {
	var list []*stored
	for _, key := range slices.Sorted(maps.Keys(t.items)) {
		if o := t.items[key]; o.matches(q) {
			list = append(list, o)
		}
	}
	return list
}

func keyOf(namespace, name string) string { return namespace + "/" + name }

// freeze makes what is stored of an object. obj becomes the server's own.
func (t *table) freeze(obj Object, rv uint64) *stored {
	obj.SetResourceVersion(strconv.FormatUint(rv, 10))
	obj.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Group: t.res.group, Version: t.res.version, Kind: t.res.kind})
	raw, err := json.Marshal(obj)
	if err != nil {
		panic(fmt.Sprintf("marshal a %s: %v", t.res.kind, err)) // Kubernetes' own types
	}
	set := fields.Set{"metadata.name": obj.GetName(), "metadata.namespace": obj.GetNamespace()}
	switch o := obj.(type) {
	case *corev1.Pod:
		set["spec.nodeName"] = o.Spec.NodeName
		set["spec.restartPolicy"] = string(o.Spec.RestartPolicy)
		set["spec.serviceAccountName"] = o.Spec.ServiceAccountName
		set["spec.hostNetwork"] = strconv.FormatBool(o.Spec.HostNetwork)
		set["status.phase"] = string(o.Status.Phase)
		set["status.podIP"] = o.Status.PodIP
	case *corev1.Event:
		set["involvedObject.name"] = o.InvolvedObject.Name
		set["involvedObject.namespace"] = o.InvolvedObject.Namespace
		set["involvedObject.uid"] = string(o.InvolvedObject.UID)
		set["involvedObject.kind"] = o.InvolvedObject.Kind
		set["reason"] = o.Reason
		set["type"] = o.Type
	}
	return &stored{obj: obj, raw: raw, fields: set}
}

// put stores obj in the place of what there is by its name. The caller holds
// the lock, and gives obj away.
func (s *Server) put(t *table, obj Object) *stored {
	s.rv++
	key := keyOf(obj.GetNamespace(), obj.GetName())
	old := t.items[key]
	switch {
	case obj.GetUID() != "":
	case old != nil:
		obj.SetUID(old.obj.GetUID())
	default:
		obj.SetUID(newUID())
	}
	if c := obj.GetCreationTimestamp(); c.IsZero() {
		obj.SetCreationTimestamp(metav1.NewTime(time.Now().Truncate(time.Second)))
	}
	cur := t.freeze(obj, s.rv)
	if old != nil && old.obj.GetUID() != obj.GetUID() {
		// Another object by the same name: to watchers, one went and one came.
		t.log = append(t.log, change{rv: s.rv, old: old, last: t.freeze(old.obj.DeepCopyObject().(Object), s.rv)})
		s.rv++
		cur = t.freeze(obj, s.rv)
		old = nil
	}
	c := change{rv: s.rv, old: old, cur: cur}
	if old != nil {
		c.last = t.freeze(old.obj.DeepCopyObject().(Object), s.rv)
	}
	t.items[key] = cur
	t.log = append(t.log, c)
	s.announce()
	return cur
}

// drop removes an object for good. The caller holds the lock.
func (s *Server) drop(t *table, o *stored) *stored {
	s.rv++
	last := t.freeze(o.obj.DeepCopyObject().(Object), s.rv)
	delete(t.items, keyOf(o.obj.GetNamespace(), o.obj.GetName()))
	t.log = append(t.log, change{rv: s.rv, old: o, last: last})
	s.announce()
	return last
}

func (s *Server) announce() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func newUID() types.UID {
	x := randomHex(16)
	return types.UID(strings.Join([]string{x[:8], x[8:12], x[12:16], x[16:20], x[20:]}, "-"))
}

// tableOf finds where objects of a Go type are kept.
func (s *Server) tableOf(obj Object) *table {
	for _, t := range s.tables {
		if reflect.TypeOf(t.res.blank) == reflect.TypeOf(obj) {
			return t
		}
	}
	panic(fmt.Sprintf("fakekube keeps no %T", obj))
}

// Set lets the server have each object, in place of what it has by that name.
// An object without a uid keeps that of the one it replaces, or gets a new
// one; one with another uid is another object. Each is copied, and obj itself
// gets nothing but the uid and the resource version.
func (s *Server) Set(objs ...Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, obj := range objs {
		o := s.put(s.tableOf(obj), obj.DeepCopyObject().(Object))
		obj.SetUID(o.obj.GetUID())
		obj.SetResourceVersion(o.obj.GetResourceVersion())
	}
}

// SetJSON is Set for an object in the API's form.
func (s *Server) SetJSON(data []byte) error {
	var meta metav1.TypeMeta
	if err := json.Unmarshal(data, &meta); err != nil {
		return fmt.Errorf("parse an object: %w", err)
	}
	for _, r := range resources {
		if r.kind != meta.Kind || meta.APIVersion != "" && r.apiVersion() != meta.APIVersion {
			continue
		}
		obj := r.fresh()
		if err := json.Unmarshal(data, obj); err != nil {
			return fmt.Errorf("parse a %s: %w", r.kind, err)
		}
		s.Set(obj)
		return nil
	}
	return fmt.Errorf("fakekube keeps no %s %s", meta.APIVersion, meta.Kind)
}

// Get returns a copy of an object, and whether there is one.
func Get[T Object](s *Server, namespace, name string) (T, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var zero T
	o := s.tableOf(zero).items[keyOf(namespace, name)]
	if o == nil {
		return zero, false
	}
	return o.obj.DeepCopyObject().(T), true
}

// List returns copies of all objects of a type, sorted by namespace and name.
func List[T Object](s *Server) []T {
	s.mu.Lock()
	defer s.mu.Unlock()
	var zero T
	var list []T
	for _, o := range s.tableOf(zero).sorted(everything) {
		list = append(list, o.obj.DeepCopyObject().(T))
	}
	return list
}

// Update changes an object in place by f, and reports whether there is one.
func Update[T Object](s *Server, namespace, name string, f func(T)) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var zero T
	t := s.tableOf(zero)
	o := t.items[keyOf(namespace, name)]
	if o == nil {
		return false
	}
	obj := o.obj.DeepCopyObject().(T)
	f(obj)
	s.put(t, obj)
	return true
}

// Remove removes an object at once, and reports whether there was one.
func Remove[T Object](s *Server, namespace, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var zero T
	t := s.tableOf(zero)
	o := t.items[keyOf(namespace, name)]
	if o != nil {
		s.drop(t, o)
	}
	return o != nil
}
