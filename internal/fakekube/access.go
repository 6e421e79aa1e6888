// SPDX-License-Identifier: Apache-2.0

package fakekube

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// An account is who bears a token.
type account struct {
	user   string
	all    bool
	grants []Grant
}

// A Grant is a binding of rules: a ClusterRoleBinding's, or with a Namespace
// a RoleBinding's.
type Grant struct {
	Namespace string // empty: in every one, and for what has none
	Rules     []rbacv1.PolicyRule
}

// AddToken lets token in as user, who may do what the grants say, by the rules
// of RBAC, and nothing else.
func (s *Server) AddToken(token, user string, grants ...Grant) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokens[token] = &account{user: user, grants: slices.Clone(grants)}
}

// RevokeToken lets token in no more: 401.
func (s *Server) RevokeToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tokens, token)
}

func (a *account) may(q *query) error {
	if a.all {
		return nil
	}
	for _, g := range a.grants {
		if g.Namespace != "" && g.Namespace != q.namespace {
			continue
		}
		if slices.ContainsFunc(g.Rules, q.allowedBy) {
			return nil
		}
	}
	scope := "at the cluster scope"
	if q.namespace != "" {
		scope = fmt.Sprintf("in the namespace %q", q.namespace)
	}
	return apierrors.NewForbidden(schema.GroupResource{Group: q.group, Resource: q.resource}, q.name,
		fmt.Errorf("User %q cannot %s resource %q in API group %q %s", a.user, q.verb, q.fullResource(), q.group, scope)) //nolint:staticcheck // the API server's words
}

func (q *query) fullResource() string {
	if q.sub == "" {
		return q.resource
	}
	return q.resource + "/" + q.sub
}

func (q *query) allowedBy(r rbacv1.PolicyRule) bool {
	has := func(list []string, what string) bool {
		return slices.Contains(list, "*") || slices.Contains(list, what)
	}
	return has(r.Verbs, q.verb) && has(r.APIGroups, q.group) && has(r.Resources, q.fullResource()) &&
		(len(r.ResourceNames) == 0 || q.named() != "" && slices.Contains(r.ResourceNames, q.named()))
}

// named is the one object that is asked for: by its path, or of a list by a
// field selector, as the API server has it.
func (q *query) named() string {
	if q.name != "" || q.verb != "list" && q.verb != "watch" && q.verb != "deletecollection" {
		return q.name
	}
	name, _ := q.fields.RequiresExactMatch("metadata.name")
	return name
}

// A Fault is what happens to requests in place of what should. Empty fields of
// the first block match all.
type Fault struct {
	Verb      string // get list watch create update patch delete
	Resource  string // "pods", "pods/eviction"
	Namespace string
	Name      string
	Token     string

	Times int // how many requests it happens to; 0: all, until it is lifted

	Status     int    // answer with this; a Message in it as the API server does
	Message    string // empty: the status' own text
	RetryAfter int    // seconds; 0 sends no such header
	Hang       bool   // answer never
	Drop       bool   // close the connection
}

type fault struct {
	Fault
	left int // 0: for ever
	over bool
}

// Fail lets a fault happen, before those of earlier calls. The function that
// is returned lifts it.
func (s *Server) Fail(f Fault) (lift func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := &fault{Fault: f, left: f.Times}
	s.faults = append(s.faults, x)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		x.over = true
	}
}

// fault returns what is to happen to a request, or nil. The caller holds the
// lock.
func (s *Server) fault(q *query, token string) *Fault {
	is := func(want, got string) bool { return want == "" || want == got }
	for _, f := range slices.Backward(s.faults) {
		if f.over || !is(f.Verb, q.verb) || !is(f.Resource, q.fullResource()) || !is(f.Namespace, q.namespace) ||
			!is(f.Name, q.name) || !is(f.Token, token) {
			continue
		}
		if f.left > 0 {
			f.left--
			f.over = f.left == 0
		}
		return &f.Fault
	}
	return nil
}

// happen answers a request by a fault.
func (s *Server) happen(w http.ResponseWriter, r *http.Request, f *Fault) {
	switch {
	case f.Hang:
		select {
		case <-s.stop:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	case f.Drop:
		panic(http.ErrAbortHandler)
	}
	err := apierrors.NewGenericServerResponse(f.Status, strings.ToLower(r.Method), schema.GroupResource{}, "", f.Message, f.RetryAfter, true)
	if f.Message != "" {
		err.ErrStatus.Message = f.Message
	}
	writeError(w, err)
}

// writeError writes the Status of an error of apimachinery's.
func writeError(w http.ResponseWriter, err error) {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		status = apierrors.NewInternalError(err)
	}
	st := status.Status()
	st.Kind, st.APIVersion = "Status", "v1"
	if st.Details != nil && st.Details.RetryAfterSeconds > 0 {
		w.Header().Set("Retry-After", fmt.Sprint(st.Details.RetryAfterSeconds))
	}
	writeJSON(w, int(st.Code), &st)
}
