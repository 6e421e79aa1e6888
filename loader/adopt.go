// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// Listeners are registered by a program that sees them begin to listen. In a pod
// that runs already they may have begun before: those are found among the
// descriptors of its processes, and registered by hand.

// listenerSlots is how many places there are for each kind of listener.
const listenerSlots = len(bpf.ShuntPodState{}.Listeners) / int(bpf.ShuntListenerKindLISTENER_KINDS)

// adoptListeners registers the listeners at the pod's inbound port that were open
// before the hooks were attached. It fails with ErrListener where one can't be:
// connections to the pod would be refused.
func (d *Datapath) adoptListeners(r *Record, ns *Netns) error {
	inodes, err := ns.listeners(r.Rules.InboundPort)
	if err != nil || len(inodes) == 0 {
		return err
	}
	sockets, err := ns.held(r.Rules.InboundPort, inodes)
	defer func() {
		for _, s := range sockets {
			s.close()
		}
	}()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrListener, err)
	}
	for _, s := range sockets {
		if err := d.adopt(r, s); err != nil {
			return fmt.Errorf("%w: %w", ErrListener, err)
		}
	}
	return nil
}

// tcpListen is TCP_LISTEN, as /proc/net/tcp prints it.
const tcpListen = "0A"

// listeners gives the inodes of the sockets that listen at a port in the
// namespace, by /proc/net/tcp (proc_pid_net(5)).
func (n *Netns) listeners(port uint16) (inodes map[uint64]bool, err error) {
	inodes = map[uint64]bool{}
	suffix := fmt.Sprintf(":%04X", port)
	for _, name := range []string{"tcp", "tcp6"} {
		var text []byte
		err := n.do(func() (err error) { text, err = os.ReadFile("/proc/thread-self/net/" + name); return err })
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list listeners: %w", err)
		}
		lines := bufio.NewScanner(bytes.NewReader(text))
		for lines.Scan() {
			// sl local_address rem_address st queues timer retrnsmt uid timeout inode
			f := strings.Fields(lines.Text())
			if len(f) < 10 || f[3] != tcpListen || !strings.HasSuffix(f[1], suffix) {
				continue
			}
			inode, err := strconv.ParseUint(f[9], 10, 64)
			if err != nil {
				return nil, fmt.Errorf("list listeners: %w", err)
			}
			inodes[inode] = true
		}
	}
	return inodes, nil
}

// held gets descriptors of the listeners at a port that were listed, but for those
// that have ended since. What it has got is returned with an error too.
func (n *Netns) held(port uint16, listed map[uint64]bool) (got []fd, err error) {
	for try := 1; ; try++ {
		more, missing, err := findSockets(n.Inode, listed)
		got = append(got, more...)
		if err != nil || len(missing) == 0 {
			return got, err
		}
		now, err := n.listeners(port)
		if err != nil {
			return got, err
		}
		left := map[uint64]bool{}
		for inode := range missing {
			if !now[inode] {
				continue
			}
			left[inode] = true
			// A process that is about to end has given its descriptors up, and the
			// kernel has not closed them yet.
			if try == 3 {
				return got, fmt.Errorf("no process of the pod holds the listening %s: one of Multipath TCP, or of a process that can't be seen", socketLink(inode))
			}
		}
		listed = left
	}
}

// socketLink is what a descriptor of a socket is a link to, in /proc.
func socketLink(inode uint64) string { return fmt.Sprintf("socket:[%d]", inode) }

// findSockets gets descriptors of sockets from the processes of a network
// namespace that hold them, and says which nobody holds. What it has got is
// returned with an error too.
func findSockets(netns uint32, inodes map[uint64]bool) (got []fd, missing map[uint64]bool, err error) {
	want := map[string]uint64{}
	for inode := range inodes {
		want[socketLink(inode)] = inode
	}
	pids, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, nil, err
	}
	ns := fmt.Sprintf("net:[%d]", netns)
	for _, proc := range pids {
		if link, err := os.Readlink(proc + "/ns/net"); err != nil || link != ns {
			continue // of another, or it has ended
		}
		names, err := filepath.Glob(proc + "/fd/*")
		if err != nil {
			return got, nil, err
		}
		for _, name := range names {
			link, err := os.Readlink(name)
			if _, wanted := want[link]; err != nil || !wanted {
				continue
			}
			f, err := getFD(filepath.Base(proc), filepath.Base(name), link)
			if err != nil {
				return got, nil, err
			}
			if f >= 0 {
				got = append(got, f)
				delete(want, link)
			}
		}
	}
	missing = map[uint64]bool{}
	for _, inode := range want {
		missing[inode] = true
	}
	return got, missing, nil
}

// getFD duplicates a process's descriptor of a socket; -1 if it has it no more.
// pidfd_getfd is there since Linux 5.6.
func getFD(pid, number, socket string) (fd, error) {
	p, err := strconv.Atoi(pid)
	if err != nil {
		return -1, err
	}
	n, err := strconv.Atoi(number)
	if err != nil {
		return -1, err
	}
	pidfd, err := unix.PidfdOpen(p, 0)
	if errors.Is(err, unix.ESRCH) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open process %d: %w", p, err)
	}
	defer unix.Close(pidfd)
	f, err := unix.PidfdGetfd(pidfd, n, 0)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EBADF) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("get descriptor %d of process %d: %w", n, p, err)
	}
	// Between the look and the call it may have become another's.
	if link, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f)); err != nil || link != socket {
		unix.Close(f)
		return -1, err
	}
	return fd(f), nil
}

// adopt registers one listener, unless REDIRECT would not reach it, or it is
// registered.
func (d *Datapath) adopt(r *Record, s fd) error {
	kind, err := listenerKind(s, &r.Rules)
	if err != nil || kind == bpf.ShuntListenerKindLISTENER_KINDS {
		return err
	}
	cookie, err := unix.GetsockoptUint64(int(s), unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil {
		return fmt.Errorf("get the socket's cookie: %w", err)
	}
	states, err := d.object(bpf.ShuntMapStates)
	if err != nil {
		return err
	}
	var state bpf.ShuntPodState
	if err := lookup(states, &r.Cookie, &state); err != nil {
		return fmt.Errorf("look up the pod's state: %w", err)
	}
	if slices.Contains(state.Listeners[:], cookie) {
		return nil
	}
	listeners, err := d.object(bpf.ShuntMapListeners)
	if err != nil {
		return err
	}
	key := bpf.ShuntListenerKey{Cookie: r.Cookie}
	value := uint64(s)
	err = unix.EEXIST
	for slot := 0; slot < listenerSlots && errors.Is(err, unix.EEXIST); slot++ {
		key.Place = uint32(int(kind)*listenerSlots + slot)
		err = update(listeners, &key, &value, updateNoExist)
	}
	if errors.Is(err, unix.EEXIST) {
		err = update(listeners, &key, &value, updateAny) // the others of its group are as good
	}
	if err != nil {
		return fmt.Errorf("put the socket into the map of listeners: %w", err)
	}
	return d.runAdopt(bpf.ShuntAdoption{Cookie: r.Cookie, Listener: cookie, Place: key.Place})
}

// runAdopt has the pod's state know of a listener.
func (d *Datapath) runAdopt(a bpf.ShuntAdoption) error {
	prog, err := d.object(bpf.ShuntProgShuntAdopt)
	if err != nil {
		return err
	}
	ret, err := testRunOn(prog, unsafe.Slice((*byte)(unsafe.Pointer(&a)), unsafe.Sizeof(a)))
	if err != nil {
		return fmt.Errorf("run %s: %w", bpf.ShuntProgShuntAdopt, err)
	}
	if ret != 0 {
		return fmt.Errorf("run %s: the pod has no state", bpf.ShuntProgShuntAdopt)
	}
	return nil
}

// listenerKind mirrors listener_kind_of.
func listenerKind(s fd, rules *Rules) (bpf.ShuntListenerKind, error) {
	sa, err := unix.Getsockname(int(s))
	if err != nil {
		return 0, fmt.Errorf("get the socket's address: %w", err)
	}
	var at netip.Addr
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		at = netip.AddrFrom4(sa.Addr)
	case *unix.SockaddrInet6:
		at = netip.AddrFrom16(sa.Addr).Unmap()
	}
	switch {
	case at == netip.IPv6Unspecified():
		only, err := unix.GetsockoptInt(int(s), unix.SOL_IPV6, unix.IPV6_V6ONLY)
		if err != nil {
			return 0, fmt.Errorf("get IPV6_V6ONLY: %w", err)
		}
		if only != 0 {
			return bpf.ShuntListenerKindLISTENER_ONLY6, nil
		}
		return bpf.ShuntListenerKindLISTENER_ANY6, nil
	case at == netip.IPv4Unspecified():
		return bpf.ShuntListenerKindLISTENER_ANY4, nil
	case at.IsValid() && at == rules.Source4:
		return bpf.ShuntListenerKindLISTENER_POD4, nil
	case at.IsValid() && at == rules.Source6:
		return bpf.ShuntListenerKindLISTENER_POD6, nil
	}
	return bpf.ShuntListenerKindLISTENER_KINDS, nil
}
