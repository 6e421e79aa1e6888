// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An rtnl is a routing socket in a network namespace: with blocking calls and
// without a goroutine of its own, because every pod's start waits for it.
type rtnl struct {
	fd  int
	seq uint32
	buf [8 << 10]byte // the kernel fills no more at once (NLMSG_GOODSIZE)
}

func openRTNL() (*rtnl, error) {
	s, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a routing socket: %w", err)
	}
	// The kernel answers at once; this is for the day it does not.
	_ = unix.SetsockoptTimeval(s, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
	return &rtnl{fd: s}, nil
}

func (r *rtnl) close() { unix.Close(r.fd) }

// request sends a message and gives each answer to fn.
func (r *rtnl) request(typ uint16, flags uint16, body []byte, fn func(m *syscall.NetlinkMessage) error) error {
	r.seq++
	b := make([]byte, unix.SizeofNlMsghdr, unix.SizeofNlMsghdr+len(body))
	h := (*unix.NlMsghdr)(unsafe.Pointer(unsafe.SliceData(b)))
	*h = unix.NlMsghdr{Len: uint32(len(b) + len(body)), Type: typ, Flags: unix.NLM_F_REQUEST | flags, Seq: r.seq}
	// The socket is not connected: what is written to it goes to the kernel.
	if _, err := unix.Write(r.fd, append(b, body...)); err != nil {
		return err
	}
	for {
		n, err := unix.Read(r.fd, r.buf[:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		msgs, err := syscall.ParseNetlinkMessage(r.buf[:n])
		if err != nil {
			return err
		}
		for i := range msgs {
			m := &msgs[i]
			if m.Header.Seq != r.seq {
				continue
			}
			if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
				return errDumpInterrupted
			}
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return nil
			case unix.NLMSG_ERROR:
				if len(m.Data) < 4 {
					return unix.EBADMSG
				}
				if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
					return unix.Errno(errno)
				}
				return nil
			}
			if err := fn(m); err != nil {
				return err
			}
		}
	}
}

// errDumpInterrupted: something changed while the kernel was listing.
var errDumpInterrupted = errors.New("the list changed while it was read")

// addrs lists the addresses on all interfaces, in the kernel's order.
func (r *rtnl) addrs() (out []netip.Addr, err error) {
	for range 5 {
		out = nil
		err = r.request(unix.RTM_GETADDR, unix.NLM_F_DUMP, make([]byte, unix.SizeofIfAddrmsg), func(m *syscall.NetlinkMessage) error {
			if a, ok := addrOf(m); ok {
				out = append(out, a)
			}
			return nil
		})
		if !errors.Is(err, errDumpInterrupted) {
			break
		}
	}
	return out, err
}

func addrOf(m *syscall.NetlinkMessage) (a netip.Addr, ok bool) {
	attrs, err := syscall.ParseNetlinkRouteAttr(m)
	if err != nil {
		return a, false
	}
	for _, attr := range attrs {
		// IFA_LOCAL is the own address where IFA_ADDRESS is the peer's.
		if attr.Attr.Type == unix.IFA_LOCAL || (attr.Attr.Type == unix.IFA_ADDRESS && !ok) {
			a, ok = netip.AddrFromSlice(attr.Value)
		}
	}
	return a.Unmap(), ok
}

// onLo adds an IPv6 address to lo, or deletes it (RTM_NEWADDR, RTM_DELADDR).
func (r *rtnl) onLo(typ uint16, p netip.Prefix) error {
	ip := p.Addr().AsSlice()
	body := make([]byte, unix.SizeofIfAddrmsg+2*(unix.SizeofRtAttr+len(ip)))
	m := (*unix.IfAddrmsg)(unsafe.Pointer(unsafe.SliceData(body)))
	*m = unix.IfAddrmsg{Family: unix.AF_INET6, Prefixlen: uint8(p.Bits()), Flags: unix.IFA_F_NODAD, Index: loIndex}
	for i, attr := range []uint16{unix.IFA_LOCAL, unix.IFA_ADDRESS} {
		at := body[unix.SizeofIfAddrmsg+i*(unix.SizeofRtAttr+len(ip)):]
		*(*unix.RtAttr)(unsafe.Pointer(unsafe.SliceData(at))) = unix.RtAttr{Len: uint16(unix.SizeofRtAttr + len(ip)), Type: attr}
		copy(at[unix.SizeofRtAttr:], ip)
	}
	flags := uint16(unix.NLM_F_ACK)
	if typ == unix.RTM_NEWADDR {
		flags |= unix.NLM_F_CREATE | unix.NLM_F_EXCL
	}
	return r.request(typ, flags, body, func(*syscall.NetlinkMessage) error { return nil })
}

// loIndex is lo's, in every network namespace.
const loIndex = 1
