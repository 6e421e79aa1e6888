// SPDX-License-Identifier: Apache-2.0

// Package fakekube stands in for the Kubernetes API server in tests and
// benchmarks: the little of it that Shunt talks to, as faithfully as client-go
// can tell. Pods, nodes, DaemonSets, events and a few more are kept in memory;
// get, list, watch (with streaming lists, bookmarks, history that expires),
// create, update, patch, delete and eviction work on them with resource
// versions, preconditions and selectors. Service accounts get tokens, which
// expire. It can be told to fail, and what a token may do can be restricted by
// RBAC rules.
//
// What it lacks: admission, defaults, validation, finalizers, owners' garbage
// collection, server-side apply; and it answers in JSON whatever the client likes
// best.
package fakekube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"
)

// A Server is one API server, on a port of 127.0.0.1, by TLS. All its methods
// may be called at any time, from any goroutine.
type Server struct {
	cert tls.Certificate
	ca   []byte // PEM
	addr string // once known, for good

	mu        sync.Mutex
	srv       *http.Server  // nil while it is down
	done      chan struct{} // closed when srv has ended
	stop      chan struct{} // closed to let what hangs go
	tokens    map[string]*bearer
	token     string        // which may do everything
	tokenLife time.Duration // see SetTokenLife
	faults    []*fault
	asked     []Request

	rv        uint64
	tables    map[string]*table // by resource and group
	changed   chan struct{}     // closed and replaced at each change
	cut       chan struct{}     // closed and replaced by DropWatches
	bookmark  chan struct{}     // closed and replaced by Bookmark
	pages     map[string]page
	graceful  bool
	watchList bool
	watches   int
}

// New starts a server without objects. Close ends it.
func New() (*Server, error) {
	s := &Server{
		stop:      make(chan struct{}),
		token:     "all-" + randomHex(8),
		tables:    map[string]*table{},
		changed:   make(chan struct{}),
		cut:       make(chan struct{}),
		bookmark:  make(chan struct{}),
		pages:     map[string]page{},
		watchList: true,
		rv:        100,
	}
	s.tokens = map[string]*bearer{s.token: {user: "admin", all: true}}
	for _, r := range resources {
		s.tables[r.key()] = &table{res: r, items: map[string]*stored{}}
	}
	if err := s.makeCert(); err != nil {
		return nil, fmt.Errorf("start an API server: %w", err)
	}
	if err := s.Up(); err != nil {
		return nil, err
	}
	return s, nil
}

// Start is New for a test. The server ends with it.
func Start(t testing.TB) *Server {
	t.Helper()
	s, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// Close ends the server, and every connection.
func (s *Server) Close() {
	s.mu.Lock()
	select {
	case <-s.stop:
	default:
		close(s.stop)
	}
	s.mu.Unlock()
	s.Down()
}

// Down lets the server be gone: connections end, new ones are refused. Its
// objects stay.
func (s *Server) Down() {
	s.mu.Lock()
	srv, done := s.srv, s.done
	s.srv = nil
	s.mu.Unlock()
	if srv != nil {
		_ = srv.Close() // closes the listener, which nobody else has closed
		<-done
	}
}

// Up brings the server back where it was.
func (s *Server) Up() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.srv != nil {
		return nil
	}
	at := s.addr
	if at == "" {
		at = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp4", at) //nolint:noctx // returns at once
	if err != nil {
		return fmt.Errorf("start an API server: %w", err)
	}
	s.addr = l.Addr().String()
	s.srv = &http.Server{
		Handler:           http.HandlerFunc(s.serve),
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{s.cert}, MinVersion: tls.VersionTLS12},
		ErrorLog:          log.New(io.Discard, "", 0), // clients that hang up are part of tests
		ReadHeaderTimeout: time.Minute,
	}
	s.done = make(chan struct{})
	go func(srv *http.Server, done chan struct{}) {
		defer close(done)
		_ = srv.ServeTLS(l, "", "") // ErrServerClosed
	}(s.srv, s.done)
	return nil
}

// URL returns the server's address, https://127.0.0.1:PORT.
func (s *Server) URL() string { return "https://" + s.addr }

// CA returns the PEM of the certificate that the server is known by.
func (s *Server) CA() []byte { return slices.Clone(s.ca) }

// Token returns the token that may do everything.
func (s *Server) Token() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.token
}

// RotateToken lets another token than Token's do everything, in its place.
func (s *Server) RotateToken() {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.tokens, s.token)
	s.token = "all-" + randomHex(8)
	s.tokens[s.token] = &bearer{user: "admin", all: true}
}

// Kubeconfig returns a kubeconfig, in JSON, for the bearer of the token.
func (s *Server) Kubeconfig(token string) []byte {
	return []byte(`{"apiVersion":"v1","kind":"Config","clusters":[{"name":"local","cluster":{"server":"` + s.URL() +
		`","certificate-authority-data":"` + base64.StdEncoding.EncodeToString(s.ca) + `"}}],` +
		`"users":[{"name":"u","user":{"token":"` + token + `"}}],` +
		`"contexts":[{"name":"c","context":{"cluster":"local","user":"u"}}],"current-context":"c"}` + "\n")
}

// WriteKubeconfig writes a kubeconfig for Token to dir/kubeconfig, and returns
// its path.
func (s *Server) WriteKubeconfig(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "kubeconfig")
	if err := os.WriteFile(path, s.Kubeconfig(s.Token()), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// SetGraceful says what a delete of a pod on a node does. By default the pod
// is gone at once, as if the kubelet took no time; with true it only gets its
// deletionTimestamp, until it is deleted with a grace period of 0.
func (s *Server) SetGraceful(graceful bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.graceful = graceful
}

// SetWatchList says whether the server can stream lists (sendInitialEvents).
// It can by default; one that can't refuses the watch.
func (s *Server) SetWatchList(can bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.watchList = can
}

// DropWatches ends the watches that there are, in mid-stream.
func (s *Server) DropWatches() { s.poke(&s.cut) }

// Bookmark sends a bookmark to each watch that takes them. The real server
// does about once a minute.
func (s *Server) Bookmark() { s.poke(&s.bookmark) }

func (s *Server) poke(ch *chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(*ch)
	*ch = make(chan struct{})
}

// Watches returns how many watches there are now.
func (s *Server) Watches() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.watches
}

// Compact forgets history, as etcd does every five minutes: a watch or a page
// of a list that begins before is answered by 410 Expired. Watches that there
// are go on.
func (s *Server) Compact() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rv++ // of some object that nobody here watches
	for _, t := range s.tables {
		t.compacted = s.rv
	}
	clear(s.pages)
}

func (s *Server) makeCert() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "fakekube"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		DNSNames: []string{"localhost", "kubernetes.default.svc"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return err
	}
	s.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	s.ca = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return nil
}

func randomHex(n int) string {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}
