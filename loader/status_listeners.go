// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Listener is what listens at the proxy's inbound port: sockets of one address.
type Listener struct {
	Addr     netip.AddrPort
	OnlyIPv6 bool // IPV6_V6ONLY
	MPTCP    bool
	// Reached: REDIRECT would reach it.
	Reached bool
	// Registered and Others are how many sockets are in the map of listeners,
	// and how many are not. One that is there stands for those of its address.
	Registered, Others int
	// Serves4 and Serves6: it is the one that a family's connections get.
	Serves4, Serves6 bool

	cookies []uint64 // of those that are registered
}

// A listening is a listening socket, as the kernel's sock_diag(7) has it.
type listening struct {
	addr         netip.AddrPort
	iface        uint32 // bound to it; 0: to none
	cookie       uint64
	only6, mptcp bool
}

// askListeners asks the pod's network namespace who listens at the inbound port,
// and adds those that are not registered. A namespace that is not at its path is
// an error if it must be.
func (st *Status) askListeners(must bool) error {
	n, err := st.peekNetns()
	if err != nil || n == nil {
		if err == nil && must {
			err = fmt.Errorf("its network namespace is not at %s any more", st.Netns)
		}
		return err
	}
	defer n.Close()
	found, err := n.listening(st.Rules.InboundPort)
	if err != nil {
		return err
	}
	st.Asked = true
	for _, s := range found {
		if s.iface == loIndex || slices.ContainsFunc(st.Listeners, func(l Listener) bool { return slices.Contains(l.cookies, s.cookie) }) {
			continue
		}
		a := s.addr.Addr()
		l := Listener{Addr: s.addr, OnlyIPv6: s.only6, MPTCP: s.mptcp, Reached: a.IsUnspecified() || a == st.Rules.Source4 || a == st.Rules.Source6}
		i := slices.IndexFunc(st.Listeners, func(x Listener) bool {
			return x.Addr == l.Addr && x.OnlyIPv6 == l.OnlyIPv6 && x.MPTCP == l.MPTCP
		})
		if i < 0 {
			st.Listeners = append(st.Listeners, l)
			i = len(st.Listeners) - 1
		}
		st.Listeners[i].Others++
	}
	return nil
}

// The request and the answer of sock_diag(7), inet_diag.h. Ports and addresses
// are in network byte order.
type diagID struct {
	sport, dport uint16
	src, dst     [16]byte
	iface        uint32
	cookie       [2]uint32
}

type diagRequest struct {
	family, protocol, ext, _ uint8
	states                   uint32
	id                       diagID
}

type diagAnswer struct {
	family, state, _, _ uint8
	id                  diagID
	_                   [5]uint32 // expires, queues, uid, inode
}

// Attributes of the answer, and of the one that says what lies over TCP.
const (
	diagV6Only  = 11
	diagULPInfo = 19
	ulpName     = 1
)

// listening lists the TCP sockets that listen at a port, host byte order.
func (n *Netns) listening(port uint16) (out []listening, err error) {
	var s *rtnl
	err = n.do(func() error {
		f, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
		if err != nil {
			return fmt.Errorf("open a socket for sock_diag: %w", err)
		}
		_ = unix.SetsockoptTimeval(f, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
		s = &rtnl{fd: f}
		return nil
	})
	if err != nil {
		return nil, err
	}
	defer s.close()
	const (
		listen = 10           // TCP_LISTEN
		info   = 1 << (2 - 1) // INET_DIAG_INFO, without which nothing is said of MPTCP
	)
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		req := diagRequest{family: family, protocol: unix.IPPROTO_TCP, ext: info, states: 1 << listen}
		body := unsafe.Slice((*byte)(unsafe.Pointer(&req)), unsafe.Sizeof(req))
		err := s.request(unix.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP, body, func(m *syscall.NetlinkMessage) error {
			if l, ok := parseListening(m.Data); ok && l.addr.Port() == port {
				out = append(out, l)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list the listening sockets of family %d: %w", family, err)
		}
	}
	return out, nil
}

func parseListening(b []byte) (l listening, ok bool) {
	var a diagAnswer
	if len(b) < int(unsafe.Sizeof(a)) {
		return l, false
	}
	a = *(*diagAnswer)(unsafe.Pointer(unsafe.SliceData(b)))
	at := netip.AddrFrom16(a.id.src).Unmap()
	if a.family == unix.AF_INET {
		at = netip.AddrFrom4([4]byte(a.id.src[:4]))
	}
	l = listening{
		addr: netip.AddrPortFrom(at, order16(a.id.sport)), iface: a.id.iface,
		cookie: uint64(a.id.cookie[1])<<32 | uint64(a.id.cookie[0]),
	}
	eachAttr(b[unsafe.Sizeof(a):], func(typ uint16, value []byte) {
		switch {
		case typ == diagV6Only && len(value) > 0:
			l.only6 = value[0] != 0
		case typ == diagULPInfo:
			eachAttr(value, func(typ uint16, value []byte) {
				l.mptcp = l.mptcp || typ == ulpName && unix.ByteSliceToString(value) == "mptcp"
			})
		}
	})
	return l, true
}

// eachAttr calls fn for each netlink attribute.
func eachAttr(b []byte, fn func(typ uint16, value []byte)) {
	for len(b) >= unix.SizeofNlAttr {
		size, typ := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
		if size < unix.SizeofNlAttr || size > len(b) {
			return
		}
		fn(typ&^unix.NLA_F_NESTED, b[unix.SizeofNlAttr:size])
		b = b[min((size+3)&^3, len(b)):]
	}
}
