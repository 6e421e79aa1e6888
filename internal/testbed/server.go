// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	firstBytes = 256     // how much of what a client sent is recorded
	maxLine    = 1 << 16 // how much of an unfinished line is kept
)

// server serves listeners, and the connections that they accept, from one
// goroutine.
type server struct {
	actor string
	epoll int
	wake  int // eventfd that ends the loop
	done  chan struct{}

	mu        sync.Mutex
	listeners map[int]*serverListener // by descriptor
	conns     map[int]*serverConn     // by descriptor
}

type serverListener struct {
	spec     ListenSpec
	accepted []Served
}

type serverConn struct {
	l    *serverListener
	nth  int // index in l.accepted, or -1
	line []byte
}

func newServer(actor string) (*server, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create epoll: %w", err)
	}
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		unix.Close(epoll)
		return nil, fmt.Errorf("create eventfd: %w", err)
	}
	s := &server{
		actor: actor, epoll: epoll, wake: wake, done: make(chan struct{}),
		listeners: map[int]*serverListener{}, conns: map[int]*serverConn{},
	}
	if err := s.watch(wake); err != nil {
		unix.Close(epoll)
		unix.Close(wake)
		return nil, err
	}
	go s.loop()
	return s, nil
}

func (s *server) watch(fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}
	if err := unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("watch descriptor: %w", err)
	}
	return nil
}

// close ends the loop and closes every socket.
func (s *server) close() {
	var one [8]byte
	binary.NativeEndian.PutUint64(one[:], 1)
	_, _ = unix.Write(s.wake, one[:])
	<-s.done
	for fd := range s.listeners {
		unix.Close(fd)
	}
	for fd := range s.conns {
		unix.Close(fd)
	}
	unix.Close(s.wake)
	unix.Close(s.epoll)
}

// openListener creates the socket of a listener in the calling thread's
// network namespace, and listens unless the spec says otherwise.
func openListener(spec ListenSpec) (fd int, err error) {
	family := familyOf(spec.Addr.Addr())
	fd, err = newSocket(SocketSpec{
		MPTCP: spec.MPTCP, ReuseAddr: !spec.NoReuseAddr, ReusePort: spec.ReusePort,
		V6Only: spec.V6Only, Device: spec.Device, Transparent: spec.Transparent,
	}, family)
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if err := bindSocket(fd, spec.Addr, family); err != nil {
		return -1, err
	}
	if spec.BindOnly {
		return fd, nil
	}
	return fd, listen(fd, spec)
}

// listen turns a bound socket into a listener.
func listen(fd int, spec ListenSpec) error {
	if spec.FastOpen > 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_FASTOPEN, spec.FastOpen); err != nil {
			return err
		}
	}
	if spec.DeferAccept > 0 {
		if err := unix.SetsockoptInt(fd, unix.SOL_TCP, unix.TCP_DEFER_ACCEPT, spec.DeferAccept); err != nil {
			return err
		}
	}
	backlog := spec.Backlog
	if backlog == 0 {
		backlog = 1024
	}
	return unix.Listen(fd, backlog)
}

// add serves a listening socket, which it owns from then on.
func (s *server) add(fd int, spec ListenSpec) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	s.mu.Lock()
	s.listeners[fd] = &serverListener{spec: spec}
	s.mu.Unlock()
	if spec.NoAccept {
		return nil
	}
	return s.watch(fd)
}

// remove closes a listener; its connections stay, unless conns says that they
// are reset.
func (s *server) remove(fd int, conns bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.listeners[fd]
	if l == nil {
		return fmt.Errorf("no listener %d", fd)
	}
	delete(s.listeners, fd)
	// Out of the set first: another process may hold the socket too, and then
	// closing does not take it out.
	if !l.spec.NoAccept {
		_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_DEL, fd, nil)
	}
	err := unix.Close(fd)
	if conns {
		for cfd, c := range s.conns {
			if c.l == l {
				_ = linger0(cfd)
				s.drop(cfd)
			}
		}
	}
	return err
}

// accepted gives what a listener has accepted so far, oldest first.
func (s *server) accepted(fd int) ([]Served, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.listeners[fd]
	if l == nil {
		return nil, fmt.Errorf("no listener %d", fd)
	}
	return append([]Served(nil), l.accepted...), nil
}

// drop closes a connection. The lock is held.
func (s *server) drop(fd int) {
	delete(s.conns, fd)
	_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_DEL, fd, nil)
	unix.Close(fd)
}

func (s *server) loop() {
	defer close(s.done)
	events := make([]unix.EpollEvent, 64)
	for {
		n, err := unix.EpollWait(s.epoll, events, -1)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "testbed: %s: epoll: %v\n", s.actor, err)
			return
		}
		s.mu.Lock()
		for _, ev := range events[:n] {
			fd := int(ev.Fd)
			if fd == s.wake {
				s.mu.Unlock()
				return
			}
			if l := s.listeners[fd]; l != nil {
				s.accept(fd, l)
			} else if c := s.conns[fd]; c != nil {
				s.read(fd, c)
			}
		}
		s.mu.Unlock()
	}
}

// accept takes every connection that waits. The lock is held.
func (s *server) accept(lfd int, l *serverListener) {
	for {
		fd, _, err := unix.Accept4(lfd, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ECONNABORTED):
			continue
		case err != nil:
			fmt.Fprintf(os.Stderr, "testbed: %s: accept on %q: %v\n", s.actor, l.spec.Name, err)
			return
		}
		c := &serverConn{l: l, nth: -1}
		served := Served{Listener: l.spec.Name, Actor: s.actor, PID: os.Getpid(), SockInfo: sockInfo(fd)}
		early := make([]byte, firstBytes)
		if n, _, err := unix.Recvfrom(fd, early, unix.MSG_PEEK|unix.MSG_DONTWAIT); err == nil && n > 0 {
			served.First = string(early[:n])
		}
		if !l.spec.Forget {
			c.nth = len(l.accepted)
			l.accepted = append(l.accepted, served)
			l.accepted[c.nth].First = "" // read will fill it
		}
		s.conns[fd] = c
		if !l.spec.Silent {
			greeting, err := json.Marshal(served)
			if err != nil {
				panic(err) // strings and addresses always marshal
			}
			// A client that is gone already gets no greeting; that is its choice.
			_, _ = unix.SendmsgN(fd, append(greeting, '\n'), nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		}
		if l.spec.CloseFirst {
			// Unread bytes would turn the close into a reset.
			for n := 1; n > 0; {
				n, _, _ = unix.Recvfrom(fd, early, unix.MSG_DONTWAIT)
			}
			delete(s.conns, fd)
			unix.Close(fd)
			continue
		}
		if err := s.watch(fd); err != nil {
			s.drop(fd)
		}
	}
}

// read sends back every whole line that has come. The lock is held.
func (s *server) read(fd int, c *serverConn) {
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, unix.MSG_DONTWAIT)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return
	}
	if err != nil || n <= 0 {
		s.drop(fd)
		return
	}
	if c.nth >= 0 {
		first := &c.l.accepted[c.nth].First
		*first += string(buf[:min(n, firstBytes-len(*first))])
	}
	c.line = append(c.line, buf[:n]...)
	if end := bytes.LastIndexByte(c.line, '\n'); end >= 0 {
		if err := sendAll(fd, c.line[:end+1], time.Now().Add(time.Second)); err != nil {
			s.drop(fd)
			return
		}
		c.line = append(c.line[:0], c.line[end+1:]...)
	}
	if len(c.line) > maxLine {
		s.drop(fd)
	}
}
