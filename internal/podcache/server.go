// SPDX-License-Identifier: Apache-2.0

package podcache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"shunt.dev/shunt/internal/rundir"
	"shunt.dev/shunt/redirect"
)

// What one request, and all together, may take.
const (
	maxRequests    = 512     // answered at a time; the kubelet starts fewer pods at once
	maxHeader      = 4 << 10 // bytes
	requestTimeout = 2 * time.Second
	// lookAfter is how often the socket is looked after: whether it is still
	// where the plugin looks for it.
	lookAfter = 5 * time.Second
)

// SocketPath returns where the plugin asks.
func SocketPath(runDir string) string { return filepath.Join(runDir, "agent.sock") }

// A server answers the plugin on the socket.
type server struct {
	cache *Cache
	http  *http.Server
	path  string
	slots chan struct{}

	mu   sync.Mutex
	ours os.FileInfo // of the socket that we made last
}

// newServer makes the socket, so that whoever connects from then on waits for
// run.
func (c *Cache) newServer(ctx context.Context) (*server, error) {
	s := &server{cache: c, path: SocketPath(c.opts.RunDir), slots: make(chan struct{}, maxRequests)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/pods/{namespace}/{name}", s.get)
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      2 * requestTimeout,
		IdleTimeout:       requestTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(io.Discard, "", 0), // of clients that hang up
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	l, err := s.listen(ctx)
	if err != nil {
		return nil, err
	}
	s.serve(l)
	return s, nil
}

// serve serves a listener in the background, until the server is closed.
func (s *server) serve(l net.Listener) {
	go func() {
		if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
			s.cache.opts.Log.Error("the plugin is not served any more", "error", err)
		}
	}()
}

// run looks after the socket until ctx ends, and closes it then.
func (s *server) run(ctx context.Context) error {
	defer func() {
		_ = s.http.Close() // its listeners' errors are of no use to anybody
		s.remove()
	}()
	tick := time.NewTicker(lookAfter)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		// One that somebody has put in our place is left alone: an agent that
		// takes over.
		if _, err := os.Lstat(s.path); !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		s.cache.opts.Log.Warn("somebody has removed the socket: it is made again", "path", s.path)
		l, err := s.listen(ctx)
		if err != nil {
			s.cache.opts.Log.Error("the plugin can't ask for pods, and asks the API server", "error", err)
			continue
		}
		s.serve(l)
	}
}

// listen makes the socket: under another name, to take the place of a dead
// agent's, or of one that is about to end, in one step. The plugin finds a
// socket there at any moment.
func (s *server) listen(ctx context.Context) (net.Listener, error) {
	dir := filepath.Dir(s.path)
	if err := rundir.Prepare(dir); err != nil {
		return nil, err
	}
	temporary := s.path + ".new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) { // of an agent that was killed here
		return nil, err
	}
	l, err := new(net.ListenConfig).Listen(ctx, "unix", temporary)
	if err != nil {
		return nil, err
	}
	unixListener := l.(*net.UnixListener)
	unixListener.SetUnlinkOnClose(false) // it would remove what has that name then
	fail := func(err error) (net.Listener, error) {
		l.Close()
		return nil, errors.Join(err, os.Remove(temporary))
	}
	// Until here the directory has kept everybody else out.
	if err := os.Chmod(temporary, 0o600); err != nil {
		return fail(err)
	}
	info, err := os.Lstat(temporary)
	if err != nil {
		return fail(err)
	}
	if err := os.Rename(temporary, s.path); err != nil {
		return fail(err)
	}
	s.mu.Lock()
	s.ours = info
	s.mu.Unlock()
	return &rootsOnly{UnixListener: unixListener, cache: s.cache}, nil
}

// remove removes the socket, if it is still this server's.
func (s *server) remove() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if info, err := os.Lstat(s.path); err == nil && os.SameFile(info, s.ours) {
		_ = os.Remove(s.path) // what stays is replaced by the next agent
	}
}

// A rootsOnly hangs up on whoever is neither root nor the agent's own user.
type rootsOnly struct {
	*net.UnixListener
	cache *Cache
}

func (l *rootsOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peerUID(conn)
		if err == nil && (uid == 0 || int(uid) == os.Geteuid()) {
			return conn, nil
		}
		l.cache.opts.Log.Warn("refused somebody at the socket who is not root", "uid", uid, "error", err)
		conn.Close()
	}
}

// peerUID returns who was at the other end when it connected.
func peerUID(conn *net.UnixConn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var errCred error
	if err := raw.Control(func(fd uintptr) {
		cred, errCred = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if errCred != nil {
		return 0, errCred
	}
	return cred.Uid, nil
}

// redirectMeta is what tells a pod's uids.
func redirectMeta(p *corev1.Pod) *redirect.Pod {
	return &redirect.Pod{ObjectMeta: redirect.ObjectMeta{UID: string(p.UID), Annotations: p.Annotations}}
}

// get answers for one pod.
func (s *server) get(w http.ResponseWriter, r *http.Request) {
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		writeStatus(w, http.StatusServiceUnavailable, fmt.Sprintf("%d others are being answered", maxRequests), 1)
		return
	}
	namespace, name, uid := r.PathValue("namespace"), r.PathValue("name"), r.URL.Query().Get("uid")
	if len(namespace) > 63 || len(name) > 253 || len(uid) > 253 {
		writeStatus(w, http.StatusBadRequest, "no pod has such a name", 0)
		return
	}
	pod, err := s.cache.pod(r.Context(), namespace, name, uid)
	if err != nil {
		code, message, retryAfter := statusOf(err)
		writeStatus(w, code, message, retryAfter)
		return
	}
	data, err := json.Marshal(factsOf(pod))
	if err != nil {
		writeStatus(w, http.StatusInternalServerError, err.Error(), 0) // of plain strings and numbers: never
		return
	}
	write(w, http.StatusOK, data)
}

// statusOf says how an error is passed on: the API server's as it is, for the
// plugin knows what to make of them.
func statusOf(err error) (code int, message string, retryAfter int) {
	var status apierrors.APIStatus
	if errors.As(err, &status) && status.Status().Code >= 400 {
		st := status.Status()
		if st.Details != nil {
			retryAfter = int(st.Details.RetryAfterSeconds)
		}
		return int(st.Code), "from the API server: " + st.Message, retryAfter
	}
	return http.StatusGatewayTimeout, "get the pod from the API server: " + err.Error(), 0
}

func writeStatus(w http.ResponseWriter, code int, message string, retryAfter int) {
	data, _ := json.Marshal(map[string]any{ // of strings and ints: never fails
		"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code,
	})
	if retryAfter > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
	}
	write(w, code, data)
}

func write(w http.ResponseWriter, code int, data []byte) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	w.WriteHeader(code)
	_, _ = w.Write(data) // to a plugin that may be gone
}
