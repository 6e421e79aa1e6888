// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"errors"
	"fmt"
	"path/filepath"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// An ErrorCount says how often a program failed at a place for a pod.
type ErrorCount struct {
	Cookie uint64 // the pod's network namespace
	Place  bpf.ShuntPlace
	Errno  unix.Errno
	Count  uint64
}

// places say in which program something failed, by which name it goes, and what
// came of it. The names are stable.
var places = map[bpf.ShuntPlace]struct{ program, name, text string }{
	bpf.ShuntPlacePLACE_CONNECT_STORAGE:   {"connect", "storage", "socket storage could not be had: connect denied"},
	bpf.ShuntPlacePLACE_CONNECT_BIND:      {"connect", "bind", "the pod's address could not be bound: the proxy sees another peer address"},
	bpf.ShuntPlacePLACE_CONNECT_UNBIND:    {"connect", "unbind", "an earlier bind could not be undone"},
	bpf.ShuntPlacePLACE_CONNECT_ROOM:      {"connect", "room", "too many handshakes with the proxy under way: connect denied"},
	bpf.ShuntPlacePLACE_CONNECT_NO_SOURCE: {"connect", "no-source", "the pod has no address of the destination's family: connect denied"},
	bpf.ShuntPlacePLACE_CONNECT_PORT:      {"connect", "port", "the destination's port could not be rewritten: connect denied"},
	bpf.ShuntPlacePLACE_INFLIGHT_INSERT:   {"sockops", "inflight-insert", "a handshake could not be noted: its original destination is lost"},
	bpf.ShuntPlacePLACE_ACCEPT_STORAGE:    {"sockops", "accept-storage", "socket storage could not be had: the original destination is lost"},
	bpf.ShuntPlacePLACE_ACCEPT_NO_ENTRY:   {"sockops", "accept-no-entry", "a local connection to the proxy without a note: its original destination is unknown"},
	bpf.ShuntPlacePLACE_LISTENER_REGISTER: {"sockops", "listener-register", "the proxy's listener could not be registered: it gets no inbound connections; if it is an MPTCP listener, inboundHook tc serves it"},
	bpf.ShuntPlacePLACE_LISTENER_NONE:     {"inbound", "listener-none", "the proxy does not listen on its inbound port: connection refused"},
	bpf.ShuntPlacePLACE_LISTENER_ASSIGN:   {"inbound", "listener-assign", "the kernel refused the proxy's listener for a connection: connection refused"},
	bpf.ShuntPlacePLACE_GETSOCKOPT_LOST:   {"getsockopt", "lost", "SO_ORIGINAL_DST was asked where it is lost: the question failed"},
	bpf.ShuntPlacePLACE_NO_POD:            {"any", "no-pod", "a program ran for a pod without an entry: refused"},
	bpf.ShuntPlacePLACE_SENDMSG_STORAGE:   {"sendmsg", "storage", "socket storage could not be had: the question to a resolver is not sent"},
	bpf.ShuntPlacePLACE_SENDMSG_NO_WAY:    {"sendmsg", "no-way", "the pod has no address of the resolver's family, or the socket is bound to an interface: the question is not sent"},
	bpf.ShuntPlacePLACE_CONNECT_TPROXY:    {"connect", "tproxy", "the proxy's connection from a client's address could not be kept in the pod: connect denied"},
	bpf.ShuntPlacePLACE_INTERFACES:        {"connect", "interfaces", "an interface is excluded, and the pod's interfaces are not those that it was set up with (ENOTUNIQ: another is up; ENODEV: one has gone, or has another name): redirected as if none were; to have it right, start the pod anew, or run shunt apply; E2BIG: the pod's interfaces or addresses have become more than the programs look at (16), and what goes to its own addresses is redirected too"},
	bpf.ShuntPlacePLACE_TC_UNREADABLE:     {"tc", "unreadable", "a packet that may hide a TCP header came in: dropped"},
	bpf.ShuntPlacePLACE_TC_FRAGMENT:       {"tc", "fragment", "the first segment of a connection came in fragments: dropped"},
	bpf.ShuntPlacePLACE_TC_OWNER:          {"tc", "owner", "the connection that a SYN hits could not be given it: dropped"},
	bpf.ShuntPlacePLACE_TC_REOPEN:         {"tc", "reopen", "a connection in TIME_WAIT could not be cleared out of a SYN's way: dropped"},
}

// Program names the program that failed: "inbound" is whichever hook takes the
// pod's inbound connections.
func (e ErrorCount) Program() string {
	if p, ok := places[e.Place]; ok {
		return p.program
	}
	return "any"
}

// Name names the place and the error: "listener-register EOPNOTSUPP".
func (e ErrorCount) Name() string {
	place, errno := fmt.Sprintf("place-%d", e.Place), unix.ErrnoName(e.Errno)
	if p, ok := places[e.Place]; ok {
		place = p.name
	}
	if errno == "" {
		errno = fmt.Sprintf("errno-%d", int(e.Errno))
	}
	return place + " " + errno
}

// Text says what failed, and what came of it.
func (e ErrorCount) Text() string {
	p, ok := places[e.Place]
	if !ok {
		return fmt.Sprintf("place %d", e.Place)
	}
	if e.Errno == unix.ESOCKTNOSUPPORT && e.Place == bpf.ShuntPlacePLACE_LISTENER_ASSIGN {
		return p.text + "; inboundHook tc serves no SO_REUSEPORT listener before Linux 6.6"
	}
	return p.text
}

func (e ErrorCount) String() string {
	return fmt.Sprintf("%s (%v, %d times)", e.Text(), e.Errno, e.Count)
}

// Errors reads what the programs of a node have counted, those of other builds too,
// unless they count otherwise. The kernel forgets what was counted least recently.
// Nothing is held: counts go on meanwhile.
func Errors(opts Options) (out []ErrorCount, err error) {
	paths, err := filepath.Glob(filepath.Join(opts.BPFDir, "datapath-*", bpf.ShuntMapErrors))
	if err != nil {
		return nil, err
	}
	seen := map[uint32]bool{}
	for _, path := range paths {
		more, err := readErrors(path, seen)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", path, err)
		}
		out = append(out, more...)
	}
	return out, nil
}

// maxErrorKeys is well above what the map holds.
const maxErrorKeys = 1 << 20

// readErrors reads a map that it has not seen: builds may share one.
func readErrors(path string, seen map[uint32]bool) (out []ErrorCount, err error) {
	m, err := getPinToRead(path)
	if err != nil {
		return nil, err
	}
	defer m.close()
	mi, err := info[mapInfo](m)
	if err != nil || seen[mi.id] {
		return nil, err
	}
	seen[mi.id] = true
	var count uint64
	if uintptr(mi.keySize) != unsafe.Sizeof(bpf.ShuntErrorKey{}) || uintptr(mi.valueSize) != unsafe.Sizeof(count) {
		return nil, nil // that build's own tools can read it
	}
	// Entries are pushed out all the time, and keys come twice then.
	known := map[bpf.ShuntErrorKey]bool{}
	err = eachKey(m, maxErrorKeys, func(key *bpf.ShuntErrorKey) {
		if known[*key] || lookup(m, key, &count) != nil {
			return
		}
		known[*key] = true
		out = append(out, ErrorCount{key.Cookie, bpf.ShuntPlace(key.Place), unix.Errno(key.Error), count})
	})
	if errors.Is(err, errMapChanges) {
		err = nil // these are some
	}
	return out, err
}
