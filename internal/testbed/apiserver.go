// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// An APIServer stands in for the Kubernetes API server: it serves pods by TLS
// to whoever has the token, as it is told, and remembers what it was asked.
type APIServer struct {
	srv  *httptest.Server
	stop chan struct{} // closed to let hanging answers go

	mu     sync.Mutex
	token  string
	pods   map[string]json.RawMessage // by namespace/name
	faults []APIFault
	asked  []APIRequest
}

// An APIRequest is one that the server got, whatever it answered.
type APIRequest struct {
	Method, Path string
	Header       http.Header
}

// An APIFault is an answer in place of a pod. The zero value is none: the
// request is answered as if nothing were wrong.
type APIFault struct {
	// Status is the answer's; with a Message in it as the API server wraps it.
	Status     int
	Message    string
	RetryAfter int // seconds; 0 sends no such header

	Body []byte // sent as it is, with Status or 200
	Pod  any    // sent as JSON, with 200: a pod as it was at that moment

	Hang bool // never answer
	Drop bool // close the connection
}

func (f *APIFault) none() bool {
	return f.Status == 0 && f.Body == nil && f.Pod == nil && !f.Hang && !f.Drop
}

// NewAPIServer starts a server without pods, on 127.0.0.1. It ends with the
// test.
func NewAPIServer(t testing.TB) *APIServer {
	t.Helper()
	a := &APIServer{
		token: "first-" + randomHex(8),
		stop:  make(chan struct{}),
		pods:  map[string]json.RawMessage{},
	}
	a.srv = httptest.NewUnstartedServer(http.HandlerFunc(a.serve))
	a.srv.Config.ErrorLog = log.New(io.Discard, "", 0) // clients that hang up are part of tests
	a.srv.StartTLS()
	t.Cleanup(func() {
		close(a.stop)
		a.srv.CloseClientConnections()
		a.srv.Close()
	})
	return a
}

// RotateToken lets the server take a new token only. Callers that present the
// old one get 401, until WriteKubeconfig has told them the new.
func (a *APIServer) RotateToken() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.token = "next-" + randomHex(8)
}

// SetPod lets the server have a pod, instead of one that it had by that name.
// pod is marshalled to JSON.
func (a *APIServer) SetPod(t testing.TB, namespace, name string, pod any) {
	t.Helper()
	data, err := json.Marshal(pod)
	if err != nil {
		t.Fatal(err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.pods[namespace+"/"+name] = data
}

// DeletePod lets the server have no such pod.
func (a *APIServer) DeletePod(namespace, name string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.pods, namespace+"/"+name)
}

// Fail lets the next requests be answered by faults, one each, before the
// server does as it should again. It replaces what is left of an earlier call.
func (a *APIServer) Fail(faults ...APIFault) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.faults = slices.Clone(faults)
}

// FailAlways lets every request be answered by the fault, until Fail is called.
func (a *APIServer) FailAlways(fault APIFault) {
	a.Fail(slices.Repeat([]APIFault{fault}, 10_000)...)
}

// Requests returns what the server has been asked so far.
func (a *APIServer) Requests() []APIRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.asked)
}

// URL returns the server's address, https://127.0.0.1:PORT.
func (a *APIServer) URL() string { return a.srv.URL }

// CA returns the PEM of the certificate that the server is known by.
func (a *APIServer) CA() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.srv.Certificate().Raw})
}

// WriteKubeconfig writes a kubeconfig for the server, in YAML as the node
// agent's, to dir/kubeconfig, and returns its path.
func (a *APIServer) WriteKubeconfig(t testing.TB, dir string) string {
	t.Helper()
	a.mu.Lock()
	token := a.token
	a.mu.Unlock()
	path := filepath.Join(dir, "kubeconfig")
	config := `apiVersion: v1
kind: Config
clusters:
- name: local
  cluster:
    server: ` + a.URL() + `
    certificate-authority-data: ` + base64.StdEncoding.EncodeToString(a.CA()) + `
users:
- name: shunt-cni
  user:
    token: "` + token + `"
contexts:
- name: shunt-cni
  context:
    cluster: local
    user: shunt-cni
current-context: shunt-cni
`
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func (a *APIServer) serve(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	a.asked = append(a.asked, APIRequest{Method: r.Method, Path: r.URL.EscapedPath(), Header: r.Header.Clone()})
	var fault APIFault
	if len(a.faults) > 0 {
		fault, a.faults = a.faults[0], a.faults[1:]
	}
	token := a.token
	parts := strings.Split(strings.TrimPrefix(r.URL.Path, "/"), "/")
	var pod json.RawMessage
	if len(parts) == 6 && slices.Equal([]string{parts[0], parts[1], parts[2], parts[4]}, []string{"api", "v1", "namespaces", "pods"}) {
		pod = a.pods[parts[3]+"/"+parts[5]]
	}
	a.mu.Unlock()

	switch {
	case !fault.none():
		a.fail(w, r, fault)
	case r.Header.Get("Authorization") != "Bearer "+token:
		writeStatus(w, http.StatusUnauthorized, "Unauthorized")
	case r.Method != http.MethodGet:
		writeStatus(w, http.StatusMethodNotAllowed, "the server does not allow this method on the requested resource")
	case pod == nil:
		writeStatus(w, http.StatusNotFound, `pods "`+parts[len(parts)-1]+`" not found`)
	default:
		writeJSON(w, http.StatusOK, pod)
	}
}

func (a *APIServer) fail(w http.ResponseWriter, r *http.Request, f APIFault) {
	switch {
	case f.Hang:
		select {
		case <-a.stop:
		case <-r.Context().Done():
		}
		panic(http.ErrAbortHandler)
	case f.Drop:
		panic(http.ErrAbortHandler)
	}
	if f.RetryAfter != 0 {
		w.Header().Set("Retry-After", strconv.Itoa(f.RetryAfter))
	}
	switch {
	case f.Body != nil:
		writeJSON(w, max(f.Status, http.StatusOK), f.Body)
	case f.Pod != nil:
		data, err := json.Marshal(f.Pod)
		if err != nil {
			writeStatus(w, http.StatusTeapot, "the test's pod: "+err.Error())
			return
		}
		writeJSON(w, http.StatusOK, data)
	default:
		writeStatus(w, f.Status, f.Message)
	}
}

// writeStatus writes a Status object as the API server does.
func writeStatus(w http.ResponseWriter, code int, message string) {
	data, _ := json.Marshal(map[string]any{ // of strings and ints: never fails
		"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code,
	})
	writeJSON(w, code, data)
}

func writeJSON(w http.ResponseWriter, code int, data []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(code)
	_, _ = w.Write(data) // to a client that may be gone
}
