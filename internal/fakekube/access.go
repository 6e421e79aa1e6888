// SPDX-License-Identifier: Apache-2.0

package fakekube

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation/field"
)

// A bearer is who has a token.
type bearer struct {
	user    string
	all     bool
	grants  []Grant
	expires time.Time // zero: never
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
	s.tokens[token] = &bearer{user: user, grants: slices.Clone(grants)}
}

// AccountToken makes a token as the API server does, a JWT, and lets it in as
// the service account, as AddToken does. With a pod it is bound to that: what
// becomes of the token as the pod goes is for RevokeToken.
func (s *Server) AccountToken(namespace, name, pod string, life time.Duration, grants ...Grant) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.issue(namespace, name, pod, time.Now(), time.Now().Add(life), grants)
}

// issue makes a token. The caller holds the lock.
func (s *Server) issue(namespace, name, pod string, now, expires time.Time, grants []Grant) string {
	account := "system:serviceaccount:" + namespace + ":" + name
	who := map[string]any{"namespace": namespace, "serviceaccount": map[string]any{"name": name, "uid": s.accountUID(namespace, name)}}
	if pod != "" {
		who["pod"] = map[string]any{"name": pod, "uid": newUID()}
	}
	token := jwt(map[string]any{
		"iss": "https://kubernetes.default.svc", "sub": account, "aud": []string{"https://kubernetes.default.svc"},
		"iat": now.Unix(), "nbf": now.Unix(), "exp": expires.Unix(), "jti": newUID(), "kubernetes.io": who,
	})
	s.tokens[token] = &bearer{user: account, grants: slices.Clone(grants), expires: expires}
	return token
}

// accountUID is a service account's, also where the server has no such object.
func (s *Server) accountUID(namespace, name string) string {
	if o := s.tables["serviceaccounts."].items[keyOf(namespace, name)]; o != nil {
		return string(o.obj.GetUID())
	}
	return "00000000-0000-4000-8000-000000000000"
}

// jwt makes a token of claims that nobody can check the signature of.
func jwt(claims map[string]any) string {
	part := func(v any) string {
		data, err := json.Marshal(v)
		if err != nil {
			panic(fmt.Sprintf("marshal a token: %v", err)) // strings and numbers
		}
		return base64.RawURLEncoding.EncodeToString(data)
	}
	return part(map[string]any{"alg": "RS256", "kid": "fakekube"}) + "." + part(claims) + "." + base64.RawURLEncoding.EncodeToString([]byte(randomHex(16)))
}

// SetTokenLife bounds how long a token lives that TokenRequest gives, as the API
// server's --service-account-max-token-expiration does. 0: no bound.
func (s *Server) SetTokenLife(life time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tokenLife = life
}

// minTokenLife is the API server's bound for what is asked for.
const minTokenLife = 10 * time.Minute

// requestToken answers a TokenRequest. The token may what its account may: the
// grants of who asks, if that is the account, else those of another token of it.
func (s *Server) requestToken(q *query, who *bearer, body []byte) (int, any, error) {
	req := &authenticationv1.TokenRequest{}
	if err := decode(body, req); err != nil {
		return 0, nil, apierrors.NewBadRequest(err.Error())
	}
	life := time.Hour
	if n := req.Spec.ExpirationSeconds; n != nil {
		life = time.Duration(*n) * time.Second
	}
	if life < minTokenLife {
		return 0, nil, apierrors.NewInvalid(schema.GroupKind{Group: "authentication.k8s.io", Kind: "TokenRequest"}, "", field.ErrorList{
			field.Invalid(field.NewPath("spec", "expirationSeconds"), int64(life/time.Second), "may not specify a duration less than 10 minutes"),
		})
	}
	if s.tokenLife > 0 {
		life = min(life, s.tokenLife)
	}
	pod := ""
	if b := req.Spec.BoundObjectRef; b != nil {
		pod = b.Name
	}
	user := "system:serviceaccount:" + q.namespace + ":" + q.name
	grants := who.grants
	if who.user != user {
		grants = nil
		for _, other := range s.tokens {
			if other.user == user {
				grants = other.grants
			}
		}
	}
	now := time.Now().Truncate(time.Second)
	expires := now.Add(life)
	req.TypeMeta = metav1.TypeMeta{Kind: "TokenRequest", APIVersion: "authentication.k8s.io/v1"}
	req.ObjectMeta = metav1.ObjectMeta{Namespace: q.namespace, Name: q.name}
	req.Status = authenticationv1.TokenRequestStatus{
		Token: s.issue(q.namespace, q.name, pod, now, expires, grants), ExpirationTimestamp: metav1.NewTime(expires),
	}
	return http.StatusCreated, req, nil
}

// RevokeToken lets token in no more: 401.
func (s *Server) RevokeToken(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tokens, token)
}

func (b *bearer) may(q *query) error {
	if b.all {
		return nil
	}
	for _, g := range b.grants {
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
		fmt.Errorf("User %q cannot %s resource %q in API group %q %s", b.user, q.verb, q.fullResource(), q.group, scope)) //nolint:staticcheck // the API server's words
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
