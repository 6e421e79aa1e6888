// SPDX-License-Identifier: Apache-2.0

package podcache

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// FuzzRequest: whatever root writes to the agent's socket, it gets an answer in
// JSON, or HTTP's own, and the API server is asked for a pod and nothing else.
func FuzzRequest(f *testing.F) {
	f.Add([]byte("GET /v1/pods/ns/a?uid=1 HTTP/1.1\r\nHost: agent\r\n\r\n"))
	f.Add([]byte("GET /v1/pods/ns/..%2f..%2fsecrets?uid=%zz HTTP/1.1\r\nHost: agent\r\n\r\n"))
	f.Add([]byte("GET /v1/pods/a%2f..%2fb/%2e%2e HTTP/1.1\r\nHost: agent\r\n\r\n"))
	f.Add([]byte("GET /v1/pods/n..s/a..b HTTP/1.0\r\n\r\n"))
	f.Add([]byte("GET /v1/pods/ns/ HTTP/1.0\r\n\r\n"))
	f.Add([]byte("POST /v1/pods/a/b HTTP/1.1\r\nHost: agent\r\nTransfer-Encoding: chunked\r\n\r\nzz"))
	var asked atomic.Pointer[string]
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		line := r.Method + " " + r.URL.EscapedPath() + "?" + r.URL.RawQuery
		asked.Store(&line)
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"kind":"Pod","apiVersion":"v1","metadata":{"namespace":"ns","name":"a","uid":"1"}}`))
	}))
	f.Cleanup(api.Close)
	client, err := kubernetes.NewForConfig(&rest.Config{Host: api.URL, QPS: -1})
	if err != nil {
		f.Fatal(err)
	}
	s := &server{cache: New(Options{Client: client, Node: "n1"}), slots: make(chan struct{}, 1)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/pods/{namespace}/{name}", s.get)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(data)))
		if err != nil {
			return
		}
		asked.Store(nil)
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		if w.Header().Get("Content-Type") == "application/json" && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%d %s", w.Code, w.Body)
		}
		line := asked.Load()
		if line == nil {
			return
		}
		// /api/v1/namespaces/NAMESPACE/pods/NAME
		path, ok := strings.CutPrefix(*line, "GET /api/v1/namespaces/")
		parts := strings.Split(strings.TrimSuffix(path, "?"), "/")
		if !ok || len(parts) != 3 || parts[1] != "pods" || parts[2] == "" || slices.Contains(parts, "..") {
			t.Errorf("the API server is asked to %s", *line)
		}
	})
}
