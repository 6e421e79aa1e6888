// SPDX-License-Identifier: Apache-2.0

package podfacts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/redirect"
)

const (
	// agentTimeout bounds one question. An agent that gets the pod from the
	// API server gives up on that before.
	agentTimeout = time.Second
	// hungFor is how long an agent that has not answered is not asked again:
	// the API server's answer is not held up by it a second time.
	hungFor = 5 * time.Second
)

// An Agent is the node agent as a Source. A question is some ten system calls:
// there is no more between the plugin and the agent's memory than a socket.
type Agent struct {
	path string
}

// NewAgent returns the agent that serves runDir/agent.sock. The socket need
// not be there yet.
func NewAgent(runDir string) *Agent { return &Agent{path: filepath.Join(runDir, "agent.sock")} }

func (a *Agent) String() string { return "the node agent by " + a.path }

// errNoAgent is worth another try: after a reboot the kubelet starts pods and
// the agent at the same time.
var errNoAgent = fmt.Errorf("%w: it does not run, or is not ready", fs.ErrNotExist)

// Pod asks the agent once, and waits agentTimeout at most, or until ctx's
// deadline.
func (a *Agent) Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error) {
	deadline := time.Now().Add(agentTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	// An agent that is not there is told by one system call.
	var st unix.Stat_t
	if err := unix.Lstat(a.path, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, errNoAgent
		}
		return nil, &fs.PathError{Op: "lstat", Path: a.path, Err: err}
	}
	conn, err := dialRoot(a.path, deadline)
	if err != nil {
		return nil, hung(err)
	}
	defer unix.Close(conn.fd)
	request := "GET /v1/pods/" + url.PathEscape(namespace) + "/" + url.PathEscape(name) + "?uid=" + url.QueryEscape(uid) +
		" HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
	if err := conn.write([]byte(request)); err != nil {
		return nil, hung(fmt.Errorf("ask: %w", err))
	}
	return readPod(conn)
}

// ErrHung is that of an agent that has let its time pass. It is left alone for a
// while.
var ErrHung = RetryAfter(fmt.Errorf("it does not answer: %w", os.ErrDeadlineExceeded), hungFor)

// hung gives ErrHung where a deadline was what happened.
func hung(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrHung
	}
	return err
}

// A conn is a connected socket. Its calls block the thread: in a process that
// does one thing that is quicker than the runtime's poller.
type conn struct {
	fd       int
	deadline time.Time
}

// dialRoot connects to root's socket at path, and to nobody else's: whoever
// answers decides whether the pod is redirected.
func dialRoot(path string, deadline time.Time) (_ *conn, err error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make a socket: %w", err)
	}
	c := &conn{fd: fd, deadline: deadline}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	// It waits where the agent does not accept, and its queue is full.
	err = c.retry(unix.SO_SNDTIMEO, func() error { return unix.Connect(fd, &unix.SockaddrUnix{Name: path}) })
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	cred, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return nil, fmt.Errorf("ask who listens: %w", err)
	}
	if uid := os.Geteuid(); cred.Uid != 0 && int(cred.Uid) != uid {
		return nil, Permanent(fmt.Errorf("the socket is uid %d's, not root's: nothing that it says is believed; remove it", cred.Uid))
	}
	return c, nil
}

// retry makes a call that blocks, until the deadline.
func (c *conn) retry(option int, call func() error) error {
	for {
		left := time.Until(c.deadline)
		if left < time.Microsecond { // 0 would be for ever
			return os.ErrDeadlineExceeded
		}
		tv := unix.NsecToTimeval(int64(left))
		if err := unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, option, &tv); err != nil {
			return fmt.Errorf("set a timeout: %w", err)
		}
		err := call()
		switch {
		case errors.Is(err, unix.EAGAIN):
			return os.ErrDeadlineExceeded
		case !errors.Is(err, unix.EINTR):
			return err
		}
	}
}

func (c *conn) write(p []byte) error {
	for len(p) > 0 {
		var n int
		err := c.retry(unix.SO_SNDTIMEO, func() (err error) {
			// Without SIGPIPE, by which the runtime would end a process.
			n, err = unix.SendmsgN(c.fd, p, nil, nil, unix.MSG_NOSIGNAL)
			return err
		})
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// Read is io.Reader's.
func (c *conn) Read(p []byte) (n int, err error) {
	err = c.retry(unix.SO_RCVTIMEO, func() (err error) {
		n, err = unix.Read(c.fd, p)
		return err
	})
	if err != nil {
		return 0, err
	}
	if n == 0 && len(p) > 0 {
		return 0, io.EOF
	}
	return n, nil
}
