// SPDX-License-Identifier: Apache-2.0

package selftest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/probe/scratch"
)

// A listener is what a process listens at, by both families.
type listener struct {
	name string
	port uint16
}

// A process is this executable again, as Child, somewhere else.
type process struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *json.Decoder
	stderr bytes.Buffer
	ended  bool
}

// start starts a process in a network namespace, and in a cgroup if that is not
// nil. It listens when start returns, and ends with the run.
func (r *run) start(ctx context.Context, n *scratch.Netns, cgroup *scratch.Cgroup, uid uint32, listeners ...listener) (*process, error) {
	args := []string{roleServe, strconv.FormatUint(uint64(uid), 10), strconv.FormatBool(r.opts.IPv6)}
	for _, l := range listeners {
		args = append(args, l.name+"="+strconv.Itoa(int(l.port)))
	}
	var dir *os.File
	if cgroup != nil {
		dir = cgroup.Dir
	}
	p, err := startChild(ctx, n, dir, r.opts.Child, args...)
	if err != nil {
		return nil, err
	}
	r.later(func() error { p.end(); return nil })
	var ready answer
	if err := p.stdout.Decode(&ready); err != nil {
		p.end()
		return nil, fmt.Errorf("start a process of the self-test: %w: %s", err, bytes.TrimSpace(p.stderr.Bytes()))
	}
	if ready.Error != "" {
		return nil, errors.New(ready.Error)
	}
	return p, nil
}

func startChild(ctx context.Context, n *scratch.Netns, cgroup *os.File, child []string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, "/proc/self/exe", append(child[:len(child):len(child)], args...)...)}
	p.cmd.Dir = "/"
	p.cmd.Stderr = &p.stderr
	// A group of its own: the terminal's signals are for us, who end it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if cgroup != nil {
		p.cmd.SysProcAttr.UseCgroupFD = true
		p.cmd.SysProcAttr.CgroupFD = int(cgroup.Fd())
	}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdout = json.NewDecoder(out)
	if err := n.Do(p.cmd.Start); err != nil {
		return nil, fmt.Errorf("start a process of the self-test: %w", err)
	}
	return p, nil
}

// end ends the process at once and waits for that.
func (p *process) end() {
	if p.ended {
		return
	}
	p.ended = true
	p.stdin.Close()
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait() // it says that it was killed
}

// An answer is what came of a connection, by both its ends. It is also what a
// process says of itself.
type answer struct {
	Refused bool   `json:"refused,omitempty"`
	Error   string `json:"error,omitempty"`

	Listener string `json:"listener,omitempty"` // who has accepted it
	Original string `json:"original,omitempty"` // SO_ORIGINAL_DST, or why there is none
	Peer     string `json:"peer,omitempty"`     // getpeername of the accepted socket, without its port

	Remote string `json:"remote,omitempty"` // getpeername of the one who has connected
}

// dial has the process connect.
func (p *process) dial(to netip.AddrPort) answer {
	if p.ended {
		return answer{Error: "the process has ended"}
	}
	if _, err := io.WriteString(p.stdin, to.String()+"\n"); err != nil {
		return answer{Error: err.Error()}
	}
	var a answer
	if err := p.stdout.Decode(&a); err != nil {
		p.end() // what it said is complete then
		return answer{Error: fmt.Sprintf("the process does not answer: %v %s", err, strings.TrimSpace(p.stderr.String()))}
	}
	return a
}

// ListenMPTCP gives what kernel.Options ask for; child is as in Options.
func ListenMPTCP(child []string) func(context.Context, *os.File) error {
	return func(ctx context.Context, cgroup *os.File) error {
		ctx, cancel := context.WithTimeout(ctx, dialTimeout)
		defer cancel()
		n, err := scratch.NewNetns()
		if err != nil {
			return err
		}
		defer n.Close()
		p, err := startChild(ctx, n, cgroup, child, roleMPTCP)
		if err != nil {
			return err
		}
		defer p.end()
		var a answer
		if err := p.stdout.Decode(&a); err != nil {
			p.end() // what it said is complete then
			return fmt.Errorf("%w: %s", err, strings.TrimSpace(p.stderr.String()))
		}
		if a.Refused {
			return unix.EPROTONOSUPPORT
		}
		if a.Error != "" {
			return errors.New(a.Error)
		}
		return nil
	}
}
