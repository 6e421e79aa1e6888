// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"syscall"
	"unsafe"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/tproxy"
	"shunt.dev/shunt/loader"
)

// passthrough6 is S6, from which the proxy talks to its app over IPv6.
var passthrough6 = netip.MustParsePrefix("::6/128")

// loIndex is lo's, in every network namespace.
const loIndex = 1

// A namespace is a pod's network namespace, open.
type namespace struct {
	fd   int
	path string
	// users is the user namespace that owns it, where that is not ours; else
	// -1.
	users int

	inode uint64
	// cookie names the namespace until reboot. 0: the kernel has none to give
	// (before Linux 5.14, commit e8b9eab99232).
	cookie uint64

	ipv6  bool // IPv6 is there and not switched off
	has6  bool // a global IPv6 address is there
	hasS6 bool // ::6 is there
}

// errNotNamespace: the file is there, but nothing is mounted on it any more.
var errNotNamespace = errors.New("it is not a namespace")

// openNamespace looks at the network namespace at path. It changes nothing.
func openNamespace(path string) (_ *namespace, err error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open network namespace: %w", &fs.PathError{Op: "open", Path: path, Err: err})
	}
	n := &namespace{fd: fd, path: path, users: -1}
	defer func() {
		if err != nil {
			n.close()
			err = fmt.Errorf("network namespace %s: %w", path, err)
		}
	}()
	var st, host unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	n.inode = st.Ino
	var vfs unix.Statfs_t
	if err := unix.Fstatfs(fd, &vfs); err != nil {
		return nil, err
	} else if vfs.Type != unix.NSFS_MAGIC {
		return nil, errNotNamespace
	}
	// Process 1's may be hidden from us; do compares with our own.
	if err := unix.Stat("/proc/1/ns/net", &host); err == nil && host.Ino == st.Ino && host.Dev == st.Dev {
		return nil, loader.ErrHostNetns
	}
	if err := n.do(n.look); err != nil {
		return nil, err
	}
	return n, n.findUsers()
}

func (n *namespace) close() {
	for _, fd := range []int{n.fd, n.users} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// do runs fn on a thread inside the namespace, unless that is our own.
func (n *namespace) do(fn func() error) error {
	return onThread(func() error {
		var own unix.Stat_t
		if err := unix.Stat(threadNetns, &own); err != nil {
			return err
		}
		if own.Ino == n.inode {
			return loader.ErrHostNetns
		}
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter: %w", err)
		}
		return fn()
	})
}

const threadNetns = "/proc/thread-self/ns/net"

// onThread runs fn, which may leave the thread in another network namespace, in a
// goroutine of its own: a thread that can't come back is left locked, and dies with
// that rather than serve others, or the caller, from the wrong place.
func onThread(fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		own, err := unix.Open(threadNetns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		err = fn()
		if unix.Setns(own, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		unix.Close(own)
		done <- err
	}()
	return <-done
}

// look is called inside the namespace.
func (n *namespace) look() error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open a socket in it: %w", err)
	}
	n.cookie, err = unix.GetsockoptUint64(s, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
	unix.Close(s)
	if err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		return fmt.Errorf("get its cookie: %w", err)
	}
	addrs, err := os.ReadFile("/proc/thread-self/net/if_inet6")
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a kernel without IPv6
	}
	if err != nil {
		return fmt.Errorf("list IPv6 addresses: %w", err)
	}
	for line := range bytes.Lines(addrs) {
		var b [16]byte
		if len(line) < 32 {
			continue
		}
		if _, err := hex.Decode(b[:], line[:32]); err != nil {
			return fmt.Errorf("list IPv6 addresses: %w", err)
		}
		switch a := netip.AddrFrom16(b); {
		case a == passthrough6.Addr():
			n.hasS6 = true
		case !a.IsLoopback() && !a.IsLinkLocalUnicast():
			n.has6 = true
		}
	}
	// An address that comes must be covered too.
	n.ipv6, err = tproxy.HasIPv6()
	return err
}

// findUsers asks who owns the namespace: -m owner can be put into it from its
// own user namespace only (owner_check in net/netfilter/xt_owner.c).
func (n *namespace) findUsers() error {
	const nsGetUserns = 0xb701 // NS_GET_USERNS
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(n.fd), nsGetUserns, 0)
	if errno != 0 {
		return fmt.Errorf("get its user namespace: %w", errno)
	}
	var own, its unix.Stat_t
	err := unix.Fstat(int(r), &its)
	if err == nil {
		err = unix.Stat("/proc/self/ns/user", &own)
	}
	if err != nil || its.Ino == own.Ino && its.Dev == own.Dev {
		unix.Close(int(r))
		return err
	}
	n.users = int(r)
	unix.CloseOnExec(n.users)
	return nil
}

// families are those that the pod has.
func (n *namespace) families() []Family {
	if n.ipv6 {
		return []Family{IPv4, IPv6}
	}
	return []Family{IPv4}
}

// traces says for each mode whether something of ours may be there, as the
// kernel tells without any program's help.
type traces struct {
	nft, legacy bool
}

func (t traces) of(m Mode) bool {
	if m == NFT {
		return t.nft
	}
	return t.legacy
}

func (n *namespace) traces() (t traces, err error) {
	err = n.do(func() error {
		t.nft = nftChains()
		for _, list := range []string{"ip_tables_names", "ip6_tables_names"} {
			// A table is listed from its first use in a namespace. What is
			// in it, only the program can tell.
			b, err := os.ReadFile("/proc/thread-self/net/" + list)
			t.legacy = t.legacy || len(b) > 0 || err != nil && !errors.Is(err, fs.ErrNotExist)
		}
		return nil
	})
	return t, err
}

// nftChains asks nf_tables whether it has a chain of ours; where there is no
// telling, it may have.
func nftChains() bool {
	some := false
	err := eachNFTChain(func(unix.Nfgenmsg, string, string) { some = true })
	return some || err != nil
}

// eachNFTChain gives our chains in nf_tables: the message's head, which has the
// family, the table and the name. It reads only, and it waits for nobody.
func eachNFTChain(fn func(head unix.Nfgenmsg, table, chain string)) error {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open a netfilter socket: %w", err)
	}
	defer unix.Close(s)
	_ = unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	const (
		getChain   = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETCHAIN
		sizeofHead = int(unsafe.Sizeof(unix.Nfgenmsg{}))
	)
	q := make([]byte, unix.SizeofNlMsghdr+sizeofHead) // of any family
	h := (*unix.NlMsghdr)(unsafe.Pointer(unsafe.SliceData(q)))
	*h = unix.NlMsghdr{Len: uint32(len(q)), Type: getChain, Flags: unix.NLM_F_REQUEST | unix.NLM_F_DUMP, Seq: 1}
	if err := unix.Sendto(s, q, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("ask for chains: %w", err)
	}
	buf := make([]byte, 32<<10)
	for {
		k, _, err := unix.Recvfrom(s, buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list chains: %w", err)
		}
		msgs, err := syscall.ParseNetlinkMessage(buf[:k])
		if err != nil {
			return fmt.Errorf("list chains: %w", err)
		}
		for _, m := range msgs {
			switch {
			case m.Header.Flags&unix.NLM_F_DUMP_INTR != 0:
				return errDumpInterrupted
			case m.Header.Type == unix.NLMSG_DONE:
				return nil
			case m.Header.Type == unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return fmt.Errorf("list chains: %w", unix.EBADMSG)
				}
				// What a kernel without nf_tables answers.
				errno := unix.Errno(-int32(binary.NativeEndian.Uint32(m.Data)))
				if errno == unix.EINVAL || errno == unix.EOPNOTSUPP {
					return nil
				}
				return fmt.Errorf("list chains: %w", errno)
			}
			if len(m.Data) < sizeofHead {
				return fmt.Errorf("list chains: %w", unix.EBADMSG)
			}
			head := *(*unix.Nfgenmsg)(unsafe.Pointer(unsafe.SliceData(m.Data)))
			var table, name string
			for attrs := m.Data[sizeofHead:]; len(attrs) >= unix.SizeofNlAttr; {
				size, typ := int(binary.NativeEndian.Uint16(attrs)), binary.NativeEndian.Uint16(attrs[2:])
				if size < unix.SizeofNlAttr || size > len(attrs) {
					return fmt.Errorf("list chains: %w", unix.EBADMSG)
				}
				switch value := attrs[unix.SizeofNlAttr:size]; typ {
				case unix.NFTA_CHAIN_TABLE:
					table = unix.ByteSliceToString(value)
				case unix.NFTA_CHAIN_NAME:
					name = unix.ByteSliceToString(value)
				}
				attrs = attrs[min((size+3)&^3, len(attrs)):]
			}
			if ours(name) {
				fn(head, table, name)
			}
		}
	}
}

// errDumpInterrupted: something changed while the kernel was listing.
var errDumpInterrupted = errors.New("the list changed while it was read")

// route is a handle for what netlink has to do in the namespace. netlink's own way in
// would go on with a thread that can't come back.
func (n *namespace) route(fn func(h *netlink.Handle) error) error {
	var h *netlink.Handle
	err := n.do(func() (err error) { h, err = netlink.NewHandle(unix.NETLINK_ROUTE); return err })
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	return fn(h)
}

func linkLo() netlink.Link {
	return &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: loIndex}}
}

func addrS6() *netlink.Addr {
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: passthrough6.Addr().AsSlice(), Mask: net.CIDRMask(128, 128)},
		Flags: unix.IFA_F_NODAD,
	}
}

// tproxy is what the namespace is to package tproxy.
func (n *namespace) tproxy(families []Family) tproxy.Netns {
	return tproxy.Netns{FD: n.fd, Do: n.do, IPv6: slices.Contains(families, IPv6)}
}

// prepare makes what the rules of a record need.
func (n *namespace) prepare(r *record) error {
	if r.TProxy {
		if err := n.tproxy(r.families()).Prepare(r.Sysctls); err != nil {
			return err
		}
	}
	if !r.S6 {
		return nil
	}
	return n.route(func(h *netlink.Handle) error {
		if err := h.AddrAdd(linkLo(), addrS6()); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("put %v on lo: %w", passthrough6, err)
		}
		return nil
	})
}

// unprepare undoes prepare.
func (n *namespace) unprepare(r *record) error {
	var errs []error
	if r.TProxy {
		errs = append(errs, n.tproxy(r.families()).Undo(r.Sysctls))
	}
	if r.S6 {
		errs = append(errs, n.route(func(h *netlink.Handle) error {
			if err := h.AddrDel(linkLo(), addrS6()); err != nil && !isGone(err) {
				return fmt.Errorf("remove ::6 from lo: %w", err)
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// isGone: what is to be removed is not there, nor may be its whole family.
func isGone(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.ENODEV)
}

// checkPrepared says what prepare has made and is not there; "" for nothing.
func (n *namespace) checkPrepared(r *record) (missing []string, err error) {
	if r.S6 && !n.hasS6 {
		missing = append(missing, "::6/128 is not on lo")
	}
	if r.TProxy {
		more, err := n.tproxy(r.families()).Check(r.Sysctls)
		return append(missing, more...), err
	}
	return missing, nil
}
