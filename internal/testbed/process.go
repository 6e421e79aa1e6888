// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ProcessSpec is a program to run inside of a pod.
type ProcessSpec struct {
	Argv       []string
	UID, GID   int
	Container  string    // the container's cgroup; "" = "app"
	Caps       []uintptr // capabilities kept by a uid other than 0 (unix.CAP_…)
	Env        []string  // the whole environment; nil = PATH alone
	Stdin      io.Reader // nil = nothing
	Dir        string    // "" = the test's
	HostCgroup bool      // stay in the test's own cgroup

	extraFiles []*os.File
}

// Process is a program that runs inside of a pod. It is killed when the test
// ends, if it still runs.
type Process struct {
	PID  int
	Argv []string

	cmd    *exec.Cmd
	output output
	done   chan struct{} // closed when it has been reaped
	err    error         // of Wait; read after done
}

// output collects what a process writes, for reading meanwhile.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

// startIn starts a process in a network namespace and, if it is not nil, a
// cgroup. Both are its own from its first instruction on, in every thread: the
// child is cloned by a thread that is in the namespace, straight into the
// cgroup.
func startIn(t testing.TB, ns *namespace, cg *cgroup, spec ProcessSpec) (*Process, error) {
	p := &Process{Argv: spec.Argv, done: make(chan struct{})}
	p.cmd = exec.Command(spec.Argv[0], spec.Argv[1:]...)
	p.cmd.Env = spec.Env
	if spec.Env == nil {
		p.cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	}
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = spec.Stdin, &p.output, &p.output
	p.cmd.Dir = spec.Dir
	p.cmd.ExtraFiles = spec.extraFiles
	// A grandchild may keep the output open; don't wait for that for ever.
	p.cmd.WaitDelay = 2 * time.Second
	attr := &syscall.SysProcAttr{AmbientCaps: spec.Caps}
	if spec.UID != os.Getuid() || spec.GID != os.Getgid() {
		attr.Credential = &syscall.Credential{Uid: uint32(spec.UID), Gid: uint32(spec.GID)}
	}
	if cg != nil && !spec.HostCgroup {
		container := spec.Container
		if container == "" {
			container = "app"
		}
		dir, err := cg.container(container)
		if err != nil {
			return nil, err
		}
		defer dir.Close()
		attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	}
	p.cmd.SysProcAttr = attr
	if err := ns.do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Argv[0], err)
	}
	p.PID = p.cmd.Process.Pid
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		if p.Running() {
			_ = p.cmd.Process.Kill()
		}
		p.wait(t)
		if out := p.output.String(); out != "" && t.Failed() {
			t.Logf("output of %q (pid %d):\n%s", p.Argv, p.PID, out)
		}
	})
	return p, nil
}

// Running says whether the process has not ended yet.
func (p *Process) Running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// Output gives what the process has written so far to stdout and stderr.
func (p *Process) Output() string { return p.output.String() }

// Signal sends the process a signal.
func (p *Process) Signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("signal %q: %v", p.Argv, err)
	}
}

// Kill ends the process by SIGKILL and waits until it is gone.
func (p *Process) Kill(t testing.TB) {
	t.Helper()
	p.Signal(t, unix.SIGKILL)
	p.wait(t)
}

// Wait waits until the process has ended and gives its exit status, -1 if a
// signal ended it.
func (p *Process) Wait(t testing.TB) int {
	t.Helper()
	p.wait(t)
	return p.cmd.ProcessState.ExitCode()
}

// wait waits for the end, and kills what doesn't end within the deadline.
func (p *Process) wait(t testing.TB) {
	t.Helper()
	select {
	case <-p.done:
		return
	case <-time.After(deadline):
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	t.Errorf("%q (pid %d) had to be killed: it did not end within %v", p.Argv, p.PID, deadline)
}
