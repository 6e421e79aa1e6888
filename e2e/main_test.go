// SPDX-License-Identifier: Apache-2.0

//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"shunt.dev/shunt/e2e/wire"
)

const (
	nodeIP   = "192.0.2.1"
	sinkAddr = nodeIP + ":7777"
	sinkURL  = "http://" + sinkAddr + "/"
)

// What `make e2e` tells.
var (
	root  = os.Getenv("E2E_ROOT")  // of the project
	cache = os.Getenv("E2E_CACHE") // of what was built for these tests
	node  = os.Getenv("E2E_NODE")  // the node's name
	mode  = os.Getenv("E2E_MODE")  // v2 or hybrid
)

var (
	client kubernetes.Interface
	sink   = &server{seen: map[string]int{}}
)

// server is outside of the mesh. A redirected pod never reaches it: the
// workload's proxy passes nothing on.
type server struct {
	mu   sync.Mutex
	seen map[string]int // connections by the client's address
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	_ = json.NewEncoder(w).Encode(wire.Answer{Who: "sink", Peer: r.RemoteAddr, Local: local.String(), Through: r.Header.Values(wire.Header)})
}

func (s *server) note(c net.Conn, state http.ConnState) {
	if state == http.StateNew {
		host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
		s.mu.Lock()
		s.seen[host]++
		s.mu.Unlock()
	}
}

// by gives how often a client has come.
func (s *server) by(ip string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.seen[ip]
}

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	if root == "" || node == "" {
		return 0, fmt.Errorf("E2E_ROOT=%q, E2E_NODE=%q: these tests run in a node of their own: use make e2e", root, node)
	}
	if err := os.Chdir(filepath.Join(root, "e2e")); err != nil {
		return 0, err
	}
	config, err := clientcmd.BuildConfigFromFlags("", "/run/k8s/admin.conf")
	if err != nil {
		return 0, err
	}
	config.QPS, config.Burst = 500, 500
	config.WarningHandler = rest.NoWarnings{}
	if client, err = kubernetes.NewForConfig(config); err != nil {
		return 0, err
	}
	for _, image := range []string{filepath.Join(root, "bin/shunt-node.tar"), filepath.Join(cache, "next.tar")} {
		start := time.Now()
		if out, err := exec.Command("ctr", "-n", "k8s.io", "images", "import", image).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("import %s: %w: %s", image, err, out)
		}
		fmt.Printf("e2e: image %s imported in %s\n", filepath.Base(image), time.Since(start).Round(time.Millisecond))
	}
	l, err := net.Listen("tcp", sinkAddr)
	if err != nil {
		return 0, err
	}
	s := &http.Server{Handler: sink, ConnState: sink.note, ReadHeaderTimeout: time.Minute}
	go func() { _ = s.Serve(l) }()
	defer s.Close()
	if err := ready(); err != nil {
		return 0, err
	}
	return m.Run(), nil
}
