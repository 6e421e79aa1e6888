// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// soOriginalDst is SO_ORIGINAL_DST at SOL_IP, IP6T_SO_ORIGINAL_DST at SOL_IPV6.
const soOriginalDst = 80

// errnoName names an error of a system call; "" for none.
func errnoName(err error) string {
	var errno unix.Errno
	switch {
	case err == nil:
		return ""
	case errors.Is(err, io.EOF):
		return ErrnoEOF
	case errors.Is(err, errTimeout):
		return ErrnoTimeout
	case errors.As(err, &errno):
		if errno == unix.EOPNOTSUPP {
			return "EOPNOTSUPP" // x/sys prefers its other name, ENOTSUP
		}
		if name := unix.ErrnoName(errno); name != "" {
			return name
		}
		return fmt.Sprintf("errno %d", int(errno))
	}
	return err.Error()
}

var errTimeout = errors.New("the bed's time is up")

// sockaddr gives ap in the form of a socket's family; an IPv4 address for an
// IPv6 socket is mapped.
func sockaddr(ap netip.AddrPort, family int) (unix.Sockaddr, error) {
	a := ap.Addr()
	if family == 4 {
		if a = a.Unmap(); !a.Is4() {
			return nil, unix.EAFNOSUPPORT
		}
		return &unix.SockaddrInet4{Port: int(ap.Port()), Addr: a.As4()}, nil
	}
	return &unix.SockaddrInet6{Port: int(ap.Port()), Addr: a.As16()}, nil
}

func addrPort(sa unix.Sockaddr) netip.AddrPort {
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		return netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	return netip.AddrPort{}
}

// familyOf gives the family, 4 or 6, in which to speak of an address.
func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 4
	}
	return 6
}

// getsockopt is the system call with a buffer of size bytes; it gives what the
// kernel wrote into the buffer, and optlen after the call.
func getsockopt(fd, level, option, size int) ([]byte, int, error) {
	buf := make([]byte, max(size, 1))
	n := uint32(size)
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return nil, int(n), errno
	}
	return buf[:min(int(n), size)], int(n), nil
}

func origDst(fd, level int) OrigDst {
	size := unix.SizeofSockaddrInet4
	if level == unix.SOL_IPV6 {
		size = unix.SizeofSockaddrInet6
	}
	b, n, err := getsockopt(fd, level, soOriginalDst, size)
	if err != nil {
		return OrigDst{Errno: errnoName(err)}
	}
	ap, err := parseSockaddr(b)
	if err != nil {
		return OrigDst{Errno: err.Error(), Len: n}
	}
	return OrigDst{Addr: ap, Len: n}
}

// parseSockaddr reads a raw sockaddr_in or sockaddr_in6 by its family.
func parseSockaddr(b []byte) (netip.AddrPort, error) {
	if len(b) < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}, fmt.Errorf("sockaddr of %d bytes", len(b))
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch family := binary.NativeEndian.Uint16(b); {
	case family == unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port), nil
	case family == unix.AF_INET6 && len(b) >= unix.SizeofSockaddrInet6:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[8:24])), port), nil
	default:
		return netip.AddrPort{}, fmt.Errorf("sockaddr of family %d and %d bytes", family, len(b))
	}
}

// InfoOf asks a socket of the test's own, such as one that it has taken from an actor.
func InfoOf(fd int) SockInfo { return sockInfo(fd) }

// sockInfo asks a socket all that [SockInfo] holds.
func sockInfo(fd int) SockInfo {
	var i SockInfo
	if sa, err := unix.Getpeername(fd); err == nil {
		i.Peer = addrPort(sa)
	}
	if sa, err := unix.Getsockname(fd); err == nil {
		i.Local = addrPort(sa)
	}
	i.OrigDst4 = origDst(fd, unix.SOL_IP)
	i.OrigDst6 = origDst(fd, unix.SOL_IPV6)
	return i
}

// newSocket creates a TCP, UDP or ping socket of a family with the options of s,
// unbound.
func newSocket(s SocketSpec, family int) (fd int, err error) {
	domain, kind, proto := unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_TCP
	if family == 6 {
		domain = unix.AF_INET6
	}
	switch {
	case s.MPTCP:
		proto = unix.IPPROTO_MPTCP
	case s.UDP:
		kind, proto = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	case s.Ping:
		if kind, proto = unix.SOCK_DGRAM, unix.IPPROTO_ICMP; family == 6 {
			proto = unix.IPPROTO_ICMPV6
		}
	}
	if err := withFSIDs(s.FSUID, s.FSGID, func() error {
		fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, proto)
		return err
	}); err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	type option struct {
		want          bool
		level, option int
		value         int
	}
	for _, o := range []option{
		{s.ReuseAddr, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1},
		{s.ReusePort, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1},
		{s.Mark != 0, unix.SOL_SOCKET, unix.SO_MARK, s.Mark},
		{s.Transparent, unix.SOL_IP, unix.IP_TRANSPARENT, 1},
		{s.BindNoPort, unix.SOL_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1},
		{family == 6 && s.V6Only, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1},
		{family == 6 && !s.V6Only, unix.SOL_IPV6, unix.IPV6_V6ONLY, 0},
	} {
		if !o.want {
			continue
		}
		if err := unix.SetsockoptInt(fd, o.level, o.option, o.value); err != nil {
			return -1, err
		}
	}
	if s.Device != "" {
		if err := unix.BindToDevice(fd, s.Device); err != nil {
			return -1, err
		}
	}
	return fd, nil
}

// withFSIDs runs f while the thread's file system ids are other ones.
func withFSIDs(uid, gid *int, f func() error) error {
	if uid == nil && gid == nil {
		return f()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// The group first, and last: without fsuid 0 it can still be changed only
	// by a holder of CAP_SETGID, which setfsuid doesn't take away.
	if gid != nil {
		defer unix.SetfsgidRetGid(setfsid(unix.SetfsgidRetGid, *gid))
	}
	if uid != nil {
		defer unix.SetfsuidRetUid(setfsid(unix.SetfsuidRetUid, *uid))
	}
	if uid != nil && setfsid(unix.SetfsuidRetUid, *uid) != *uid {
		return unix.EPERM
	}
	if gid != nil && setfsid(unix.SetfsgidRetGid, *gid) != *gid {
		return unix.EPERM
	}
	return f()
}

// setfsid calls setfsuid or setfsgid, which report no error but the id that
// was in force before.
func setfsid(set func(int) (int, error), id int) (before int) {
	before, _ = set(id)
	return before
}

// bindSocket binds, waiting for nothing.
func bindSocket(fd int, ap netip.AddrPort, family int) error {
	sa, err := sockaddr(ap, family)
	if err != nil {
		return err
	}
	return unix.Bind(fd, sa)
}

// pollFD waits for events on a descriptor until a moment.
func pollFD(fd int, events int16, until time.Time) error {
	for {
		left := time.Until(until)
		if left <= 0 {
			return errTimeout
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
		// Rounded up, so that the last fraction of a millisecond isn't spun.
		n, err := unix.Poll(fds, int((left+time.Millisecond-1)/time.Millisecond))
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		if n > 0 {
			return nil
		}
	}
}

// recvLine reads up to a newline, which is left out. Like a blocking client it
// leaves what follows the line in the socket.
func recvLine(fd int, until time.Time) (string, error) {
	var line []byte
	buf := make([]byte, 2048)
	for {
		n, _, err := unix.Recvfrom(fd, buf, unix.MSG_PEEK|unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if err := pollFD(fd, unix.POLLIN, until); err != nil {
				return string(line), err
			}
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return string(line), err
		case n == 0:
			return string(line), io.EOF
		}
		take, end := n, false
		for i, c := range buf[:n] {
			if c == '\n' {
				take, end = i+1, true
				break
			}
		}
		if _, _, err := unix.Recvfrom(fd, buf[:take], unix.MSG_DONTWAIT); err != nil {
			return string(line), err
		}
		line = append(line, buf[:take]...)
		if end {
			return string(line[:len(line)-1]), nil
		}
	}
}

// sendAll writes all of b.
func sendAll(fd int, b []byte, until time.Time) error {
	for len(b) > 0 {
		n, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			if err := pollFD(fd, unix.POLLOUT, until); err != nil {
				return err
			}
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		default:
			b = b[n:]
		}
	}
	return nil
}

// linger0 makes close send a reset.
func linger0(fd int) error {
	return unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1})
}

// rawConnect is connect(2) with an address of 16 bytes.
func rawConnect(fd int, sa *unix.RawSockaddr) error {
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(sa)), unsafe.Sizeof(*sa))
	if errno != 0 {
		return errno
	}
	return nil
}
