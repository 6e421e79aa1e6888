// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Actor does a test's networking somewhere else: in a process inside of a pod,
// or in the world. Its methods may be called from several goroutines; those
// that block hold up no others.
type Actor struct {
	Name string
	UID  int
	GID  int
	PID  int // 0 in the world, whose sockets are the test's own

	wire wire
	proc *Process // nil in the world
}

// wire carries requests to an engine.
type wire interface {
	roundTrip(q request) (response, error)
	pass(sock int) (fd int, err error)    // a descriptor out of the engine
	receive(fd int) (sock int, err error) // a descriptor into the engine
}

// Listener is a listener of an actor's.
type Listener struct {
	Name  string
	Addr  netip.AddrPort // as bound: the port is known where 0 was asked for
	actor *Actor
	id    int
}

func (a *Actor) call(t testing.TB, q request) response {
	t.Helper()
	r, err := a.wire.roundTrip(q)
	if err != nil {
		t.Fatalf("actor %s: %s: %v", a.Name, q.Verb, err)
	}
	if r.Misuse != "" {
		t.Fatalf("actor %s: %s", a.Name, r.Misuse)
	}
	return r
}

// Listen opens a listener; a refusal by the kernel ends the test.
func (a *Actor) Listen(t testing.TB, spec ListenSpec) *Listener {
	t.Helper()
	l, errno := a.TryListen(t, spec)
	if errno != "" {
		t.Fatalf("actor %s: listen on %s: %s", a.Name, spec.Addr, errno)
	}
	return l
}

// TryListen opens a listener, or gives the name of the kernel's error.
func (a *Actor) TryListen(t testing.TB, spec ListenSpec) (l *Listener, errno string) {
	t.Helper()
	if spec.BindOnly {
		t.Fatal("BindOnly makes no listener: use Bind")
	}
	r := a.call(t, request{Verb: "listen", Listen: &spec})
	if r.Errno != "" {
		return nil, r.Errno
	}
	return &Listener{Name: spec.Name, Addr: r.Info.Local, actor: a, id: r.Sock}, ""
}

// Bind makes a bound socket that doesn't listen yet: [ListenSpec].Sock listens
// on it, [ConnectSpec].Sock connects it.
func (a *Actor) Bind(t testing.TB, spec ListenSpec) (sock int) {
	t.Helper()
	spec.BindOnly = true
	r := a.call(t, request{Verb: "listen", Listen: &spec})
	if r.Errno != "" {
		t.Fatalf("actor %s: bind to %s: %s", a.Name, spec.Addr, r.Errno)
	}
	return r.Sock
}

// Close closes the listener. Connections that it has accepted stay.
func (l *Listener) Close(t testing.TB) {
	t.Helper()
	l.unlisten(t, 0)
}

// CloseAll closes the listener and resets the connections it has accepted.
func (l *Listener) CloseAll(t testing.TB) {
	t.Helper()
	l.unlisten(t, 1)
}

func (l *Listener) unlisten(t testing.TB, conns int) {
	t.Helper()
	if r := l.actor.call(t, request{Verb: "unlisten", Sock: l.id, Int: [3]int{conns}}); r.Errno != "" {
		t.Fatalf("actor %s: close listener: %s", l.actor.Name, r.Errno)
	}
}

// Accepted gives what the listener has accepted so far, oldest first.
func (l *Listener) Accepted(t testing.TB) []Served {
	t.Helper()
	return l.actor.call(t, request{Verb: "accepted", Sock: l.id}).Accepted
}

// WaitAccepted waits until the listener has accepted n connections, and gives
// all it has.
func (l *Listener) WaitAccepted(t testing.TB, n int) []Served {
	t.Helper()
	var got []Served
	Eventually(t, fmt.Sprintf("%d connections at listener %q", n, l.Name), func() bool {
		got = l.Accepted(t)
		return len(got) >= n
	})
	return got
}

// Connect makes one connection.
func (a *Actor) Connect(t testing.TB, spec ConnectSpec) ConnectResult {
	t.Helper()
	return a.ConnectBatch(t, []ConnectSpec{spec})[0]
}

// Dial is Connect with nothing but a destination.
func (a *Actor) Dial(t testing.TB, dst string) ConnectResult {
	t.Helper()
	return a.Connect(t, ConnectSpec{Dst: netip.MustParseAddrPort(dst)})
}

// ConnectBatch makes connections one after the other, and gives their results
// in the same order. Flows that are neither kept nor aborted leave a TIME_WAIT
// each: set Abort in thousands of them.
func (a *Actor) ConnectBatch(t testing.TB, specs []ConnectSpec) []ConnectResult {
	t.Helper()
	r := a.call(t, request{Verb: "connect", Connect: specs})
	if len(r.Connect) != len(specs) {
		t.Fatalf("actor %s: %d results for %d flows", a.Name, len(r.Connect), len(specs))
	}
	return r.Connect
}

// Socket creates a socket and keeps it: bound where spec says so, else fresh.
func (a *Actor) Socket(t testing.TB, spec SocketSpec) (sock int) {
	t.Helper()
	if spec.Family == 0 && !spec.Bind.IsValid() {
		t.Fatal("SocketSpec: Family or Bind must be given")
	}
	r := a.call(t, request{Verb: "socket", Socket: &spec})
	if r.Errno != "" {
		t.Fatalf("actor %s: create socket: %s", a.Name, r.Errno)
	}
	return r.Sock
}

// Info asks a kept socket for its addresses and original destinations.
func (a *Actor) Info(t testing.TB, sock int) SockInfo {
	t.Helper()
	return *a.call(t, request{Verb: "info", Sock: sock}).Info
}

// Disconnect is connect(AF_UNSPEC) on a kept socket.
func (a *Actor) Disconnect(t testing.TB, sock int) (errno string) {
	t.Helper()
	return a.call(t, request{Verb: "disconnect", Sock: sock}).Errno
}

// Send sends data as it is.
func (a *Actor) Send(t testing.TB, sock int, data string) (errno string) {
	t.Helper()
	return a.call(t, request{Verb: "send", Sock: sock, Data: data}).Errno
}

// RecvLine receives up to a newline, which it leaves out. A timeout of 0 is 5 s.
func (a *Actor) RecvLine(t testing.TB, sock int, timeout time.Duration) (line, errno string) {
	t.Helper()
	r := a.call(t, request{Verb: "recvline", Sock: sock, Timeout: timeout})
	return string(r.Data), r.Errno
}

// Shutdown is shutdown(2); how is unix.SHUT_RD, SHUT_WR or SHUT_RDWR.
func (a *Actor) Shutdown(t testing.TB, sock, how int) (errno string) {
	t.Helper()
	return a.call(t, request{Verb: "shutdown", Sock: sock, Int: [3]int{how}}).Errno
}

// Linger0 makes the close of a kept socket send a reset.
func (a *Actor) Linger0(t testing.TB, sock int) {
	t.Helper()
	if r := a.call(t, request{Verb: "linger0", Sock: sock}); r.Errno != "" {
		t.Fatalf("actor %s: set SO_LINGER: %s", a.Name, r.Errno)
	}
}

// Close closes a kept socket.
func (a *Actor) Close(t testing.TB, sock int) {
	t.Helper()
	if r := a.call(t, request{Verb: "close", Sock: sock}); r.Errno != "" {
		t.Fatalf("actor %s: close: %s", a.Name, r.Errno)
	}
}

// Getsockopt asks a kept socket with a buffer of size bytes. It gives what was
// written into the buffer, and optlen after the call.
func (a *Actor) Getsockopt(t testing.TB, sock, level, option, size int) (value []byte, optlen int, errno string) {
	t.Helper()
	r := a.call(t, request{Verb: "getsockopt", Sock: sock, Int: [3]int{level, option, size}})
	return r.Data, r.Int, r.Errno
}

// SetsockoptInt sets an integer option of a kept socket.
func (a *Actor) SetsockoptInt(t testing.TB, sock, level, option, value int) (errno string) {
	t.Helper()
	return a.call(t, request{Verb: "setsockopt", Sock: sock, Int: [3]int{level, option, value}}).Errno
}

// PassSocket gives another actor a copy of a kept socket by SCM_RIGHTS, and
// gives its id there. The first actor's stays open.
func (a *Actor) PassSocket(t testing.TB, sock int, to *Actor) (there int) {
	t.Helper()
	fd, err := a.wire.pass(sock)
	if err != nil {
		t.Fatalf("actor %s: pass socket: %v", a.Name, err)
	}
	defer unix.Close(fd)
	if there, err = to.wire.receive(fd); err != nil {
		t.Fatalf("actor %s: receive socket: %v", to.Name, err)
	}
	return there
}

// Take gives the test a kept socket of the actor's: a descriptor of this
// process's, which the test must close. The socket stays what its creation made
// it: its owner, its cgroup and its network namespace are the actor's.
func (a *Actor) Take(t testing.TB, sock int) (fd int) {
	t.Helper()
	fd = a.copySocket(t, sock)
	a.Close(t, sock)
	return fd
}

// TakeSocket is Take of a copy: the actor's stays open; the copy is closed when
// the test ends, unless that was done.
func (a *Actor) TakeSocket(t testing.TB, sock int) *os.File {
	t.Helper()
	f := os.NewFile(uintptr(a.copySocket(t, sock)), "socket of "+a.Name)
	t.Cleanup(func() { f.Close() })
	return f
}

func (a *Actor) copySocket(t testing.TB, sock int) (fd int) {
	t.Helper()
	fd, err := a.wire.pass(sock)
	if err != nil {
		t.Fatalf("actor %s: take socket: %v", a.Name, err)
	}
	return fd
}

// Stop ends the actor: its sockets are closed as at the end of a process. In
// the world it does nothing.
func (a *Actor) Stop(t testing.TB) {
	t.Helper()
	if a.proc == nil {
		return
	}
	if r, ok := a.wire.(*remote); ok {
		r.hangUp()
	}
	a.proc.wait(t)
}

// Kill ends the actor by SIGKILL.
func (a *Actor) Kill(t testing.TB) {
	t.Helper()
	if a.proc == nil {
		t.Fatal("the world can't be killed")
	}
	a.proc.Kill(t)
}

// Freeze stops the actor by SIGSTOP, and waits until each of its threads has
// stopped. Thaw has it go on.
func (a *Actor) Freeze(t testing.TB) {
	t.Helper()
	if a.PID == 0 {
		t.Fatal("the world can't be frozen")
	}
	if err := unix.Kill(a.PID, unix.SIGSTOP); err != nil {
		t.Fatalf("stop actor %s: %v", a.Name, err)
	}
	Eventually(t, "actor "+a.Name+" to stop", func() bool {
		stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", a.PID))
		return err == nil && len(stats) > 0 && !slices.ContainsFunc(stats, func(path string) bool {
			b, err := os.ReadFile(path)
			_, state, _ := strings.Cut(string(b), ") ") // the name of a thread is its program's
			return err != nil || !strings.HasPrefix(state, "T")
		})
	})
}

// Thaw is for an actor that was frozen.
func (a *Actor) Thaw(t testing.TB) {
	t.Helper()
	if err := unix.Kill(a.PID, unix.SIGCONT); err != nil {
		t.Fatalf("continue actor %s: %v", a.Name, err)
	}
}

// local is the wire to an engine in this process, whose calls run inside of a
// network namespace, with sockets that may have any address.
type local struct {
	e  *engine
	ns *namespace
}

func (l *local) roundTrip(q request) (r response, err error) {
	if q.Connect != nil {
		q.Connect = append([]ConnectSpec(nil), q.Connect...)
		for i := range q.Connect {
			q.Connect[i].Transparent = true
		}
	}
	if q.Listen != nil {
		spec := *q.Listen
		spec.Transparent = true
		q.Listen = &spec
	}
	if q.Socket != nil {
		spec := *q.Socket
		spec.Transparent = true
		q.Socket = &spec
	}
	err = l.ns.do(func() error {
		r = l.e.do(q)
		return nil
	})
	return r, err
}

func (l *local) pass(sock int) (int, error) {
	fd, err := l.e.fd(sock)
	if err != nil {
		return -1, err
	}
	return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
}

func (l *local) receive(fd int) (int, error) {
	fd, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	return l.e.keep(fd), nil
}

// remote is the wire to an actor's process.
type remote struct {
	ctl *os.File
	aux *os.File

	passing sync.Mutex // one descriptor is under way at a time

	mu      sync.Mutex
	next    int
	waiting map[int]chan response
	gone    error
	ended   chan struct{} // closed when the reader has ended
}

func newRemote(ctl, aux *os.File) *remote {
	r := &remote{ctl: ctl, aux: aux, waiting: map[int]chan response{}, ended: make(chan struct{})}
	go r.read()
	return r
}

// read hands answers to those who wait for them.
func (r *remote) read() {
	defer close(r.ended)
	in := json.NewDecoder(bufio.NewReader(r.ctl))
	for {
		var a response
		err := in.Decode(&a)
		r.mu.Lock()
		if err != nil {
			r.gone = fmt.Errorf("the actor is gone: %w", err)
			for _, c := range r.waiting {
				close(c)
			}
			r.waiting = nil
			r.mu.Unlock()
			return
		}
		if c, ok := r.waiting[a.ID]; ok {
			delete(r.waiting, a.ID)
			c <- a // has room
		}
		r.mu.Unlock()
	}
}

func (r *remote) roundTrip(q request) (response, error) {
	c := make(chan response, 1)
	r.mu.Lock()
	if r.gone != nil {
		r.mu.Unlock()
		return response{}, r.gone
	}
	r.next++
	q.ID = r.next
	r.waiting[q.ID] = c
	r.mu.Unlock()

	line, err := json.Marshal(q)
	if err != nil {
		return response{}, err
	}
	// One write, so that requests of several goroutines don't mix: os.File
	// holds its lock until all is written.
	if _, err := r.ctl.Write(append(line, '\n')); err != nil {
		return response{}, fmt.Errorf("send request: %w", err)
	}
	limit := time.NewTimer(q.patience())
	defer limit.Stop()
	select {
	case a, ok := <-c:
		if !ok {
			r.mu.Lock()
			defer r.mu.Unlock()
			return response{}, r.gone
		}
		return a, nil
	case <-limit.C:
		return response{}, errors.New("no answer")
	}
}

// patience is how long the answer to a request may take.
func (q request) patience() time.Duration {
	d := deadline + q.Timeout
	for _, c := range q.Connect {
		if c.Timeout == 0 {
			c.Timeout = defaultTimeout
		}
		d += 2 * c.Timeout
	}
	return d
}

func (r *remote) pass(sock int) (int, error) {
	r.passing.Lock()
	defer r.passing.Unlock()
	if err := r.must(request{Verb: "pass", Sock: sock}); err != nil {
		return -1, err
	}
	return recvFD(int(r.aux.Fd()))
}

func (r *remote) receive(fd int) (int, error) {
	r.passing.Lock()
	defer r.passing.Unlock()
	if err := sendFD(int(r.aux.Fd()), fd); err != nil {
		return -1, err
	}
	a, err := r.roundTrip(request{Verb: "receive"})
	if err == nil && a.Misuse+a.Errno != "" {
		err = errors.New(a.Misuse + a.Errno)
	}
	return a.Sock, err
}

func (r *remote) must(q request) error {
	a, err := r.roundTrip(q)
	if err == nil && a.Misuse+a.Errno != "" {
		err = errors.New(a.Misuse + a.Errno)
	}
	return err
}

// hangUp tells the actor to end, which it does when its control socket closes.
func (r *remote) hangUp() {
	// Shut down first: it wakes the reader here, and the actor.
	_ = unix.Shutdown(int(r.aux.Fd()), unix.SHUT_RDWR)
	if raw, err := r.ctl.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
	<-r.ended
	r.ctl.Close()
	r.aux.Close()
}

// socketPair makes a pair of connected Unix sockets. Nothing of it is
// inherited but what is named in a child's ExtraFiles.
func socketPair(kind int) (mine, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("create socket pair: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "mine"), os.NewFile(uintptr(fds[1]), "theirs"), nil
}
