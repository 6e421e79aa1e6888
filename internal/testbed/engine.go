// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const defaultTimeout = 5 * time.Second

// engine carries out an actor's verbs, by plain system calls on the calling
// thread. The same engine works in an actor's process and, for the world,
// inside of the test's.
type engine struct {
	server *server
	aux    int // descriptor over which sockets are passed; -1 for none

	mu    sync.Mutex
	socks map[int]int // kept sockets: id -> descriptor
	next  int
}

func newEngine(name string, aux int) (*engine, error) {
	s, err := newServer(name)
	if err != nil {
		return nil, err
	}
	return &engine{server: s, aux: aux, socks: map[int]int{}}, nil
}

func (e *engine) close() {
	e.server.close()
	for _, fd := range e.socks {
		unix.Close(fd)
	}
}

func (e *engine) keep(fd int) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.next++
	e.socks[e.next] = fd
	return e.next
}

func (e *engine) fd(id int) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if fd, ok := e.socks[id]; ok {
		return fd, nil
	}
	return -1, fmt.Errorf("no socket %d is kept", id)
}

// take gives a kept socket away.
func (e *engine) take(id int) (int, error) {
	fd, err := e.fd(id)
	if err != nil {
		return -1, err
	}
	e.mu.Lock()
	delete(e.socks, id)
	e.mu.Unlock()
	return fd, nil
}

// do carries out a request. Listener ids are descriptors of the server; socket
// ids are the engine's own.
func (e *engine) do(q request) response {
	r := response{ID: q.ID}
	if err := e.verb(q, &r); err != nil {
		var errno unix.Errno
		if errors.As(err, &errno) || errorIsData(err) {
			r.Errno = errnoName(err)
		} else {
			r.Misuse = fmt.Sprintf("%s: %v", q.Verb, err)
		}
	}
	return r
}

func errorIsData(err error) bool {
	return errnoName(err) == ErrnoEOF || errors.Is(err, errTimeout)
}

func (e *engine) verb(q request, r *response) error {
	until := func() time.Time {
		if q.Timeout == 0 {
			q.Timeout = defaultTimeout
		}
		return time.Now().Add(q.Timeout)
	}
	switch q.Verb {
	case "connect":
		r.Connect = make([]ConnectResult, len(q.Connect))
		for i, spec := range q.Connect {
			var err error
			if r.Connect[i], err = e.connect(spec); err != nil {
				return fmt.Errorf("flow %d: %w", i, err)
			}
		}
		return nil
	case "listen":
		return e.listen(*q.Listen, r)
	case "unlisten":
		return e.server.remove(q.Sock, q.Int[0] != 0)
	case "accepted":
		var err error
		r.Accepted, err = e.server.accepted(q.Sock)
		return err
	case "socket":
		family := q.Socket.Family
		if family == 0 {
			family = familyOf(q.Socket.Bind.Addr())
		}
		fd, err := newSocket(*q.Socket, family)
		if err != nil {
			return err
		}
		if q.Socket.Bind.IsValid() {
			if err := bindSocket(fd, q.Socket.Bind, family); err != nil {
				unix.Close(fd)
				return err
			}
		}
		r.Sock = e.keep(fd)
		return nil
	case "receive":
		fd, err := recvFD(e.aux)
		if err != nil {
			return err
		}
		r.Sock = e.keep(fd)
		return nil
	case "close":
		fd, err := e.take(q.Sock)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	}

	fd, err := e.fd(q.Sock)
	if err != nil {
		return err
	}
	switch q.Verb {
	case "info":
		i := sockInfo(fd)
		r.Info = &i
		return nil
	case "disconnect":
		return disconnect(fd)
	case "linger0":
		return linger0(fd)
	case "shutdown":
		return unix.Shutdown(fd, q.Int[0])
	case "send":
		return sendAll(fd, []byte(q.Data), until())
	case "recvline":
		line, err := recvLine(fd, until())
		r.Data = []byte(line)
		return err
	case "getsockopt":
		r.Data, r.Int, err = getsockopt(fd, q.Int[0], q.Int[1], q.Int[2])
		return err
	case "setsockopt":
		return unix.SetsockoptInt(fd, q.Int[0], q.Int[1], q.Int[2])
	case "pass":
		return sendFD(e.aux, fd)
	}
	return fmt.Errorf("no such verb")
}

func (e *engine) listen(spec ListenSpec, r *response) error {
	var fd int
	var err error
	if spec.Sock != 0 {
		if fd, err = e.take(spec.Sock); err != nil {
			return err
		}
		if err = listen(fd, spec); err != nil {
			unix.Close(fd)
		}
	} else {
		fd, err = openListener(spec)
	}
	if err != nil {
		return err
	}
	i := sockInfo(fd)
	r.Info = &i
	if spec.BindOnly {
		r.Sock = e.keep(fd)
		return nil
	}
	r.Sock = fd
	if err := e.server.add(fd, spec); err != nil {
		unix.Close(fd)
		return err
	}
	return nil
}

// connect carries out one flow. The error is for wrong use only.
func (e *engine) connect(spec ConnectSpec) (r ConnectResult, err error) {
	if spec.Timeout == 0 {
		spec.Timeout = defaultTimeout
	}
	family := spec.Family
	if family == 0 {
		family = familyOf(spec.Dst.Addr())
	}
	fail := func(step string, err error) { r.Step, r.Errno = step, errnoName(err) }

	fd := -1
	if spec.Sock != 0 {
		if fd, err = e.fd(spec.Sock); err != nil {
			return r, err
		}
		r.Sock = spec.Sock
	} else {
		fd, err = newSocket(spec.SocketSpec, family)
		if err != nil {
			fail(StepSocket, err)
			return r, nil
		}
		if spec.Keep {
			r.Sock = e.keep(fd)
		} else {
			defer func() {
				if spec.Abort {
					_ = linger0(fd)
				}
				unix.Close(fd)
			}()
		}
		if spec.Bind.IsValid() {
			if err := bindSocket(fd, spec.Bind, family); err != nil {
				fail(StepBind, err)
				return r, nil
			}
		}
	}

	start := time.Now()
	err = connectSocket(fd, spec, family)
	r.Elapsed = time.Since(start)
	if err != nil {
		fail(StepConnect, err)
		return r, nil
	}
	if spec.Data != "" && !spec.FastOpen {
		if err := sendAll(fd, []byte(spec.Data+"\n"), time.Now().Add(spec.Timeout)); err != nil {
			fail(StepGreeting, err)
		}
	}
	r.SockInfo = sockInfo(fd)
	if spec.NoGreeting || r.Errno != "" {
		return r, nil
	}
	line, err := recvLine(fd, time.Now().Add(spec.Timeout))
	if err != nil {
		fail(StepGreeting, err)
		return r, nil
	}
	r.Served = new(Served)
	if err := json.Unmarshal([]byte(line), r.Served); err != nil {
		r.Step, r.Errno = StepGreeting, fmt.Sprintf("not a greeting of the bed's: %q", line)
		r.Served = nil
		return r, nil
	}
	if spec.AwaitClose {
		if _, err := recvLine(fd, time.Now().Add(spec.Timeout)); !errors.Is(err, io.EOF) {
			if err == nil {
				err = errors.New("the server sent another line")
			}
			fail(StepClose, err)
		}
	}
	return r, nil
}

// connectSocket is the connect in the way that was asked for.
func connectSocket(fd int, spec ConnectSpec, family int) error {
	sa, err := sockaddr(spec.Dst, family)
	if err != nil {
		return err
	}
	until := time.Now().Add(spec.Timeout)
	if spec.FastOpenConnect {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN_CONNECT, 1); err != nil {
			return err
		}
	}
	switch {
	case spec.Nonblock:
		if err := unix.SetNonblock(fd, true); err != nil {
			return err
		}
		defer unix.SetNonblock(fd, false)
	default:
		tv := unix.NsecToTimeval(spec.Timeout.Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv); err != nil {
			return err
		}
	}
	switch {
	case spec.FastOpen:
		_, err = unix.SendmsgN(fd, []byte(spec.Data+"\n"), nil, sa, unix.MSG_FASTOPEN|unix.MSG_NOSIGNAL)
	case spec.IOURing:
		err = ioUringConnect(fd, spec.Dst, family, spec.Timeout)
	default:
		err = unix.Connect(fd, sa)
	}
	switch {
	case errors.Is(err, unix.EINPROGRESS) && !spec.Nonblock:
		return errTimeout // SO_SNDTIMEO's answer
	case errors.Is(err, unix.EINPROGRESS), errors.Is(err, unix.EINTR):
		// A signal of the Go runtime's ends the call, not the connect.
	default:
		return err
	}
	if err := pollFD(fd, unix.POLLOUT, until); err != nil {
		return err
	}
	soErr, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err != nil {
		return err
	}
	if soErr != 0 {
		return unix.Errno(soErr)
	}
	return nil
}

// disconnect is connect(AF_UNSPEC).
func disconnect(fd int) error {
	var sa unix.RawSockaddr // the zero family is AF_UNSPEC
	return rawConnect(fd, &sa)
}

// sendFD passes a copy of fd to the other end of a Unix socket.
func sendFD(socket, fd int) error {
	return unix.Sendmsg(socket, []byte{0}, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
}

// recvFD takes a descriptor from a Unix socket.
func recvFD(socket int) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(socket, make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1, err
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(msgs) != 1 {
		return -1, fmt.Errorf("no descriptor came (%d messages, %w)", len(msgs), errors.Join(err, unix.EBADMSG))
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("no descriptor came: %w", errors.Join(err, unix.EBADMSG))
	}
	return fds[0], nil
}
