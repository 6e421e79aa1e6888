// SPDX-License-Identifier: Apache-2.0

package fakekube

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
)

// maxBody bounds a request's body, in bytes, as the API server does.
const maxBody = 3 << 20

// A query is what a request asks for.
type query struct {
	verb                      string
	group, version            string
	resource, namespace, name string
	sub                       string // subresource
	labels                    labels.Selector
	fields                    fields.Selector
	params                    url.Values
}

var everything = &query{labels: labels.Everything(), fields: fields.Everything()}

// A Request is one that the server got, whatever it answered.
type Request struct {
	Verb                      string // as RBAC has it
	Resource, Namespace, Name string // Resource with its subresource: pods/eviction
	Method, Path, RawQuery    string
	Header                    http.Header
	Body                      []byte
}

// Requests returns what the server has been asked so far.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

// parseQuery reads path and parameters; nil for what is no resource's.
func parseQuery(r *http.Request) (*query, error) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	q := &query{params: r.URL.Query()}
	switch {
	case len(parts) >= 3 && parts[0] == "api":
		q.version, parts = parts[1], parts[2:]
	case len(parts) >= 4 && parts[0] == "apis":
		q.group, q.version, parts = parts[1], parts[2], parts[3:]
	default:
		return nil, nil
	}
	if parts[0] == "namespaces" && len(parts) >= 3 {
		q.namespace, parts = parts[1], parts[2:]
	}
	q.resource, parts = parts[0], parts[1:]
	if len(parts) > 0 {
		q.name, parts = parts[0], parts[1:]
	}
	q.sub = strings.Join(parts, "/")
	switch r.Method {
	case http.MethodGet:
		on, _ := strconv.ParseBool(q.params.Get("watch"))
		switch {
		case on:
			q.verb = "watch"
		case q.name == "":
			q.verb = "list"
		default:
			q.verb = "get"
		}
	case http.MethodPost:
		q.verb = "create"
	case http.MethodPut:
		q.verb = "update"
	case http.MethodPatch:
		q.verb = "patch"
	case http.MethodDelete:
		q.verb = "delete"
		if q.name == "" {
			q.verb = "deletecollection"
		}
	default:
		q.verb = strings.ToLower(r.Method)
	}
	var err error
	if q.labels, err = labels.Parse(q.params.Get("labelSelector")); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if q.fields, err = fields.ParseSelector(q.params.Get("fieldSelector")); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return q, nil
}

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if err != nil {
		writeError(w, apierrors.NewRequestEntityTooLargeError(err.Error()))
		return
	}
	q, err := parseQuery(r)
	if err != nil {
		writeError(w, err)
		return
	}
	other := q == nil
	if other {
		q = &query{verb: strings.ToLower(r.Method)}
	}
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	s.mu.Lock()
	s.asked = append(s.asked, Request{
		Verb: q.verb, Resource: q.fullResource(), Namespace: q.namespace, Name: q.name,
		Method: r.Method, Path: r.URL.EscapedPath(), RawQuery: r.URL.RawQuery, Header: r.Header.Clone(), Body: body,
	})
	fault := s.fault(q, token)
	who := s.tokens[token]
	if who != nil && !who.expires.IsZero() && time.Now().After(who.expires) {
		who = nil
	}
	t := s.tables[q.resource+"."+q.group]
	s.mu.Unlock()

	switch {
	case fault != nil:
		s.happen(w, r, fault)
		return
	case other:
		s.serveOther(w, r)
		return
	case who == nil:
		writeError(w, apierrors.NewUnauthorized("Unauthorized"))
		return
	}
	if err := who.may(q); err != nil {
		writeError(w, err)
		return
	}
	if t == nil || q.version != t.res.version {
		writeError(w, apierrors.NewGenericServerResponse(http.StatusNotFound, q.verb, schema.GroupResource{Group: q.group, Resource: q.resource}, q.name, "404 page not found", 0, true))
		return
	}
	if q.verb == "watch" {
		if q.name != "" { // an old form of a watch of one object
			q.fields = fields.AndSelectors(q.fields, fields.OneTermEqualSelector("metadata.name", q.name))
		}
		s.watch(w, r, t, q)
		return
	}
	s.mu.Lock()
	code, answer, err := s.do(t, q, r, who, body)
	s.mu.Unlock()
	if err != nil {
		writeError(w, err)
		return
	}
	writeJSON(w, code, answer)
}

// serveOther serves what is no resource, and needs no token.
func (s *Server) serveOther(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/healthz", "/livez", "/readyz":
		_, _ = io.WriteString(w, "ok") // to a client that may be gone
	case "/version":
		writeJSON(w, http.StatusOK, map[string]string{"major": "1", "minor": "37", "gitVersion": "v1.37.2"})
	default:
		http.NotFound(w, r)
	}
}

// do serves one request, with the lock held. The answer is marshalled later;
// nothing of it changes.
func (s *Server) do(t *table, q *query, r *http.Request, who *bearer, body []byte) (int, any, error) {
	if q.sub != "" && q.sub != "status" && q.fullResource() != "pods/eviction" && q.fullResource() != "serviceaccounts/token" {
		return 0, nil, apierrors.NewNotFound(t.res.groupResource(), q.name+"/"+q.sub)
	}
	if q.verb == "list" {
		list, err := s.list(t, q)
		return http.StatusOK, list, err
	}
	if q.verb == "create" && q.sub == "" {
		return s.create(t, q, body)
	}
	o := t.items[keyOf(q.namespace, q.name)]
	if o == nil {
		return 0, nil, apierrors.NewNotFound(t.res.groupResource(), q.name)
	}
	switch q.verb {
	case "get":
		return http.StatusOK, json.RawMessage(o.raw), nil
	case "update":
		obj := t.res.fresh()
		if err := decode(body, obj); err != nil {
			return 0, nil, apierrors.NewBadRequest(err.Error())
		}
		return s.replace(t, q, o, obj)
	case "patch":
		obj, err := patched(t, o, r.Header.Get("Content-Type"), body)
		if err != nil {
			return 0, nil, err
		}
		return s.replace(t, q, o, obj)
	case "delete":
		opts := &metav1.DeleteOptions{}
		if len(body) > 0 {
			if err := decode(body, opts); err != nil {
				return 0, nil, apierrors.NewBadRequest(err.Error())
			}
		}
		return s.delete(t, q, o, opts)
	case "create":
		if q.sub == "token" {
			return s.requestToken(q, who, body)
		}
		return s.evict(t, q, o, body)
	}
	return 0, nil, apierrors.NewMethodNotSupported(t.res.groupResource(), q.verb)
}

// protobufMagic is what a body in protobuf begins with. Clients of client-go
// send it unless told otherwise, and take JSON as an answer.
var protobufMagic = []byte("k8s\x00")

// decode reads a request's body, JSON or protobuf.
func decode(body []byte, into any) error {
	data, ok := bytes.CutPrefix(body, protobufMagic)
	if !ok {
		return json.Unmarshal(body, into)
	}
	var envelope runtime.Unknown
	if err := envelope.Unmarshal(data); err != nil {
		return err
	}
	m, ok := into.(interface{ Unmarshal([]byte) error })
	if !ok {
		return fmt.Errorf("%T has no protobuf", into)
	}
	return m.Unmarshal(envelope.Raw)
}

// A page is the rest of a list that was cut.
type page struct {
	rv    uint64
	items []*stored
}

func (s *Server) list(t *table, q *query) (any, error) {
	want := q.params.Get("resourceVersion")
	rv, err := parseRV(want)
	if err != nil {
		return nil, err
	}
	exact := q.params.Get("resourceVersionMatch") == string(metav1.ResourceVersionMatchExact)
	switch {
	case rv > s.rv:
		return nil, tooLarge(rv, s.rv)
	case exact && rv != s.rv:
		return nil, apierrors.NewResourceExpired("The provided resource version is not kept by fakekube")
	}
	p := page{rv: s.rv}
	if token := q.params.Get("continue"); token != "" {
		var ok bool
		if p, ok = s.pages[token]; !ok {
			return nil, apierrors.NewResourceExpired("The provided continue parameter is too old to display a consistent list result.")
		}
	} else {
		p.items = t.sorted(q)
	}
	limit, _ := strconv.Atoi(q.params.Get("limit"))
	meta := map[string]any{"resourceVersion": strconv.FormatUint(p.rv, 10)}
	items := p.items
	// The watch cache answers resourceVersion=0, and cuts nothing.
	if limit > 0 && len(items) > limit && want != "0" {
		token := base64.RawURLEncoding.EncodeToString([]byte(randomHex(8)))
		s.pages[token] = page{rv: p.rv, items: items[limit:]}
		meta["continue"], meta["remainingItemCount"] = token, len(items)-limit
		items = items[:limit]
	}
	raw := make([]json.RawMessage, len(items))
	for i, o := range items {
		raw[i] = o.raw
	}
	return map[string]any{"kind": t.res.kind + "List", "apiVersion": t.res.apiVersion(), "metadata": meta, "items": raw}, nil
}

func parseRV(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	rv, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, apierrors.NewBadRequest(fmt.Sprintf("Invalid value: %q: expected a resource version", s))
	}
	return rv, nil
}

// tooLarge is the answer to a version that is yet to come.
func tooLarge(rv, current uint64) error {
	err := apierrors.NewTimeoutError(fmt.Sprintf("Too large resource version: %d, current: %d", rv, current), 1)
	err.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: metav1.CauseTypeResourceVersionTooLarge, Message: "Too large resource version"}}
	return err
}

func (s *Server) create(t *table, q *query, body []byte) (int, any, error) {
	obj := t.res.fresh()
	if err := decode(body, obj); err != nil {
		return 0, nil, apierrors.NewBadRequest(err.Error())
	}
	if t.res.namespaced {
		if ns := obj.GetNamespace(); ns != "" && ns != q.namespace {
			return 0, nil, apierrors.NewBadRequest("the namespace of the provided object does not match the namespace sent on the request")
		}
		obj.SetNamespace(q.namespace)
	}
	if obj.GetName() == "" && obj.GetGenerateName() != "" {
		obj.SetName(obj.GetGenerateName() + randomHex(3))
	}
	switch {
	case obj.GetName() == "":
		return 0, nil, apierrors.NewBadRequest("name or generateName is required")
	case t.items[keyOf(obj.GetNamespace(), obj.GetName())] != nil:
		return 0, nil, apierrors.NewAlreadyExists(t.res.groupResource(), obj.GetName())
	case obj.GetResourceVersion() != "":
		return 0, nil, apierrors.NewBadRequest("resourceVersion should not be set on objects to be created")
	}
	obj.SetUID("")
	return http.StatusCreated, json.RawMessage(s.put(t, obj).raw), nil
}

// replace puts obj in the place of o, if what it says of itself is true of o.
func (s *Server) replace(t *table, q *query, o *stored, obj Object) (int, any, error) {
	rv, uid := obj.GetResourceVersion(), obj.GetUID()
	conflict := func(format string, args ...any) (int, any, error) {
		return 0, nil, apierrors.NewConflict(t.res.groupResource(), q.name, fmt.Errorf(format, args...))
	}
	switch {
	case obj.GetName() != q.name || obj.GetNamespace() != q.namespace:
		return 0, nil, apierrors.NewBadRequest("the name of the object does not match the name on the URL")
	case uid != "" && uid != o.obj.GetUID():
		return conflict("Precondition failed: UID in precondition: %s, UID in object meta: %s", uid, o.obj.GetUID())
	case rv != "" && rv != o.obj.GetResourceVersion():
		return conflict("the object has been modified; please apply your changes to the latest version and try again")
	}
	obj.SetUID(o.obj.GetUID())
	obj.SetCreationTimestamp(o.obj.GetCreationTimestamp())
	return http.StatusOK, json.RawMessage(s.put(t, obj).raw), nil
}

// patched returns what a patch makes of an object.
func patched(t *table, o *stored, contentType string, patch []byte) (Object, error) {
	var data []byte
	var err error
	switch contentType {
	case "application/strategic-merge-patch+json":
		data, err = strategicpatch.StrategicMergePatch(o.raw, patch, t.res.blank)
	case "application/merge-patch+json":
		data, err = mergePatch(o.raw, patch)
	default:
		return nil, apierrors.NewGenericServerResponse(http.StatusUnsupportedMediaType, "patch", t.res.groupResource(), o.obj.GetName(), contentType, 0, true)
	}
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	obj := t.res.fresh()
	if err := json.Unmarshal(data, obj); err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return obj, nil
}

// mergePatch is RFC 7396's.
func mergePatch(target, patch []byte) ([]byte, error) {
	var t, p any
	if err := json.Unmarshal(target, &t); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(patch, &p); err != nil {
		return nil, err
	}
	return json.Marshal(merge(t, p))
}

func merge(target, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	t, ok := target.(map[string]any)
	if !ok {
		t = map[string]any{}
	}
	for key, value := range p {
		if value == nil {
			delete(t, key)
			continue
		}
		t[key] = merge(t[key], value)
	}
	return t
}

func (s *Server) delete(t *table, q *query, o *stored, opts *metav1.DeleteOptions) (int, any, error) {
	conflict := func(format string, args ...any) (int, any, error) {
		return 0, nil, apierrors.NewConflict(t.res.groupResource(), q.name, fmt.Errorf(format, args...))
	}
	if p := opts.Preconditions; p != nil {
		if p.UID != nil && *p.UID != o.obj.GetUID() {
			return conflict("Precondition failed: UID in precondition: %s, UID in object meta: %s", *p.UID, o.obj.GetUID())
		}
		if p.ResourceVersion != nil && *p.ResourceVersion != o.obj.GetResourceVersion() {
			return conflict("Precondition failed: ResourceVersion in precondition: %s, ResourceVersion in object meta: %s", *p.ResourceVersion, o.obj.GetResourceVersion())
		}
	}
	if len(opts.DryRun) > 0 {
		return http.StatusOK, json.RawMessage(o.raw), nil
	}
	pod, isPod := o.obj.(*corev1.Pod)
	grace := int64(30)
	if opts.GracePeriodSeconds != nil {
		grace = *opts.GracePeriodSeconds
	}
	if isPod && pod.Spec.NodeName != "" && grace != 0 {
		if pod.DeletionTimestamp == nil {
			pod = pod.DeepCopy()
			pod.DeletionTimestamp = &metav1.Time{Time: time.Now().Add(time.Duration(grace) * time.Second).Truncate(time.Second)}
			pod.DeletionGracePeriodSeconds = &grace
			o = s.put(t, pod)
		}
		if s.graceful {
			return http.StatusOK, json.RawMessage(o.raw), nil
		}
	}
	return http.StatusOK, json.RawMessage(s.drop(t, o).raw), nil
}

// evict deletes a pod if no budget forbids it.
func (s *Server) evict(t *table, q *query, o *stored, body []byte) (int, any, error) {
	e := &policyv1.Eviction{}
	if err := decode(body, e); err != nil {
		return 0, nil, apierrors.NewBadRequest(err.Error())
	}
	if e.Name != "" && e.Name != q.name {
		return 0, nil, apierrors.NewBadRequest("name in URL does not match name in Eviction object")
	}
	for _, b := range s.tables["poddisruptionbudgets.policy"].items {
		budget := b.obj.(*policyv1.PodDisruptionBudget)
		selector, err := metav1.LabelSelectorAsSelector(budget.Spec.Selector)
		if err != nil || budget.Namespace != q.namespace || !selector.Matches(labels.Set(o.obj.GetLabels())) || budget.Status.DisruptionsAllowed > 0 {
			continue
		}
		err429 := apierrors.NewTooManyRequests("Cannot evict pod as it would violate the pod's disruption budget.", 0)
		err429.ErrStatus.Details.Causes = []metav1.StatusCause{{
			Type: policyv1.DisruptionBudgetCause, Message: fmt.Sprintf("The disruption budget %s needs more healthy pods", budget.Name),
		}}
		return 0, nil, err429
	}
	opts := e.DeleteOptions
	if opts == nil {
		opts = &metav1.DeleteOptions{}
	}
	if _, _, err := s.delete(t, q, o, opts); err != nil {
		return 0, nil, err
	}
	return http.StatusCreated, &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess, Code: http.StatusCreated}, nil
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(code)
	_, _ = w.Write(data) // to a client that may be gone
}
