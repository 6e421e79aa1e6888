// SPDX-License-Identifier: Apache-2.0

// Package handover has the small plugin, which is started for each pod, hand a
// request on to a larger executable beside it: the process becomes that one, with
// the same environment and the same standard input, and the request is done from
// its beginning. Nothing comes back.
//
// Only a request for which nothing has been changed, or for which all has been
// undone, is handed over: so there is no state that only half of the two knows of.
package handover

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// Larger is the name of the larger executable: the operator's tool, which has
	// all that is needed, and lies where the plugin does.
	Larger = "shunt"
	// Verb is its first argument; the second is the reason.
	Verb = "cni"
)

// A Reason says why a request is handed over. It is stable.
type Reason string

// The reasons.
const (
	Facts     Reason = "facts"      // the node agent has not given the pod's facts
	HungAgent Reason = "agent-hung" // likewise, and it took all of its time
	Iptables  Reason = "iptables"   // it is chosen, or has done something for the attachment
	Datapath  Reason = "datapath"   // programs have to be loaded
	EBPF      Reason = "ebpf"       // eBPF has failed, and was undone: iptables may take over
	Check     Reason = "check"      // something is not as it should be, or not eBPF's
	GC        Reason = "gc"         // all attachments are looked at
	Status    Reason = "status"     // what ADD would need is tried
)

// A NeededError is the error of a request that is to be handed over.
type NeededError struct {
	Reason Reason
	Err    error // what has led to it; nil where the request alone has
}

func (n *NeededError) Error() string {
	if n.Err == nil {
		return "the request is to be handed over: " + string(n.Reason)
	}
	return "the request is to be handed over: " + string(n.Reason) + ": " + n.Err.Error()
}

func (n *NeededError) Unwrap() error { return n.Err }

// To is how this process becomes another.
type To struct {
	// Self is the link to this process's own executable.
	Self string
	// Environ is the environment that the process was started with.
	Environ []string
}

// Exec hands a request over. It returns only where that has failed: nothing has been
// done for the request then.
func (t To) Exec(stdin []byte, why Reason) error {
	self, err := os.Readlink(t.Self)
	if err != nil {
		return fmt.Errorf("find the directory of this executable: %w", err)
	}
	path := filepath.Join(filepath.Dir(self), Larger)
	if err := check(path); err != nil {
		return fmt.Errorf("%w: the plugin is two executables, and without %s this request (%s) can't be served: "+
			"let the node agent install both, or copy the one of the same release there", err, path, why)
	}
	input, err := refill(stdin)
	if err != nil {
		return fmt.Errorf("hand the network configuration over to %s: %w", path, err)
	}
	defer input.Close()
	if err := unix.Dup3(int(input.Fd()), 0, 0); err != nil {
		return fmt.Errorf("hand the network configuration over to %s: %w", path, err)
	}
	err = unix.Exec(path, []string{Larger, Verb, string(why)}, t.Environ)
	return fmt.Errorf("run %s: %w: see that it is the one of the same release, and of this machine's architecture", path, err)
}

// check fails unless what is at a path may be run as root: whoever can write it would
// be root otherwise.
func check(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s is not a regular file", path)
	case st.Mode&0o111 == 0:
		return fmt.Errorf("%s is not executable", path)
	case st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s is uid %d's, not root's", path, st.Uid)
	case st.Mode&0o022 != 0:
		return fmt.Errorf("%s can be written by others than its owner (mode %#o)", path, st.Mode&0o777)
	}
	return nil
}

// refill gives a file from which the same can be read once more.
func refill(stdin []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("shunt-netconf", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a file in memory: %w", err)
	}
	f := os.NewFile(uintptr(fd), "netconf")
	if _, err = f.Write(stdin); err == nil {
		_, err = f.Seek(0, 0)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
