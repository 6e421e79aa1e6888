// SPDX-License-Identifier: Apache-2.0

//go:build linux

package redirect_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// tell says in a word who serves a connection, or that it is refused.
func tell(served *testbed.Served, dst netip.AddrPort, client netip.AddrPort) string {
	if plain(served.Peer) != client.String() {
		return fmt.Sprintf("%s, for a client at %v", served.Listener, served.Peer)
	}
	if o := served.OrigDst(); served.Listener == "in" && plain(o.Addr) != dst.String() {
		return fmt.Sprintf("in, for %v (%s)", o.Addr, o.Errno)
	}
	return served.Listener
}

// withOptions connects from the world to an included port and to an excluded
// one, with IP options or extension headers.
func (s *stage) withOptions(t *testing.T, service, other string) {
	t.Helper()
	padded := string([]byte{0, 0, 1, 4, 0, 0, 0, 0}) // one PadN
	for _, x := range []struct {
		name          string
		family        int
		level, option int
		value         string
	}{
		{"record route", 4, unix.SOL_IP, unix.IP_OPTIONS, string([]byte{7, 15, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0})},
		{"destination options", 6, unix.SOL_IPV6, unix.IPV6_DSTOPTS, padded},
		{"hop-by-hop options", 6, unix.SOL_IPV6, unix.IPV6_HOPOPTS, padded},
	} {
		for port, want := range map[uint16]string{8080: service, 8081: other} {
			dst := at(s.Addr4(), port)
			if x.family == 6 {
				dst = at(s.Addr6(), port)
			}
			if got := s.connectWith(t, dst, x.level, x.option, x.value); got != want {
				t.Errorf("%s, to %v: %s, want %s", x.name, dst, got, want)
			}
		}
	}
}

// connectWith connects from the world by a socket with an option.
func (s *stage) connectWith(t *testing.T, dst netip.AddrPort, level, option int, value string) string {
	t.Helper()
	w := s.who(world)
	fd := w.Take(t, w.Socket(t, testbed.SocketSpec{Family: familyOf(dst.Addr())}))
	defer unix.Close(fd)
	if err := unix.SetsockoptString(fd, level, option, value); err != nil {
		t.Fatalf("set option %d: %v", option, err)
	}
	tv := unix.NsecToTimeval(patience.Nanoseconds())
	for _, o := range []int{unix.SO_SNDTIMEO, unix.SO_RCVTIMEO} { // the first is of connect, too
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, o, &tv); err != nil {
			t.Fatal(err)
		}
	}
	switch err := unix.Connect(fd, sockaddrOf(dst, familyOf(dst.Addr()))); {
	case errno(err) == "ECONNREFUSED":
		return "refused"
	case err != nil:
		return errno(err)
	}
	own, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	var line []byte
	for buf := make([]byte, 2048); !bytes.HasSuffix(line, []byte("\n")); {
		n, err := unix.Read(fd, buf)
		if err != nil || n == 0 {
			return fmt.Sprintf("connected, then %d, %s", n, errno(err))
		}
		line = append(line, buf[:n]...)
	}
	served := new(testbed.Served)
	if err := json.Unmarshal(line, served); err != nil {
		t.Fatal(err)
	}
	return tell(served, dst, addrPortOf(own))
}

// inFragments connects from the world as withOptions does, by packets in
// fragments, of which the first comes last. That has the header without its
// options; over IPv4 another time the ports alone, which the kernel does not want
// over IPv6 (ipv6frag_thdr_truncated).
func (s *stage) inFragments(t *testing.T, service, other string) {
	t.Helper()
	tc := s.house.hook == redirect.HookTC
	for _, x := range []struct {
		own   netip.Addr
		cut   int
		place bpf.ShuntPlace // where TC counts what it drops
	}{
		{s.Addr4(), 8, bpf.ShuntPlacePLACE_TC_UNREADABLE},
		{s.Addr4(), 24, bpf.ShuntPlacePLACE_TC_FRAGMENT},
		{s.Addr6(), 24, bpf.ShuntPlacePLACE_TC_FRAGMENT},
	} {
		for port, want := range map[uint16]string{8080: service, 8081: other} {
			if tc && (port == 8080 || x.place == bpf.ShuntPlacePLACE_TC_UNREADABLE) {
				want = dropped
				s.house.note(noteFragment)
			}
			if got := s.dialInFragments(t, at(x.own, port), x.cut, x.place); got != want {
				t.Errorf("to %v, the first of %d bytes: %s, want %s", at(x.own, port), x.cut, got, want)
			}
		}
	}
}

// dropped is what becomes of a packet that is counted and not answered.
const dropped = "dropped"

// A fragmented is a TCP client that is no socket, and all of whose packets are
// in fragments.
type fragmented struct {
	fd       int
	to       unix.SockaddrLinklayer
	src, dst netip.AddrPort
	seq, ack uint32
	cut      int     // bytes of TCP in the first fragment
	id       *uint16 // the last packet's
}

// From TCP's header.
const (
	flagSYN, flagRST, flagACK = 0x02, 0x04, 0x10
)

// dialInFragments says who serves the connection, or else what becomes of its
// SYN: place is where its loss is counted.
func (s *stage) dialInFragments(t *testing.T, dst netip.AddrPort, cut int, place bpf.ShuntPlace) string {
	t.Helper()
	w := s.house.node.world
	lost := func() int {
		if s.house.bpfDir == "" {
			return 0
		}
		return s.house.failed(t, s.Pod)[place]
	}
	// The world answers for all addresses but those that it throws away.
	client := netip.MustParseAddr("198.18.0.7")
	if dst.Addr().Is6() {
		client = netip.MustParseAddr("2001:db8:f::7")
	}
	drop := netlink.Route{Type: unix.RTN_BLACKHOLE, Table: unix.RT_TABLE_LOCAL, Dst: &net.IPNet{IP: client.AsSlice(), Mask: net.CIDRMask(client.BitLen(), client.BitLen())}}
	if err := w.Netlink().RouteReplace(&drop); err != nil {
		t.Fatalf("throw packets to %v away: %v", client, err)
	}
	routes, err := w.Netlink().RouteGet(dst.Addr().AsSlice())
	if err != nil || len(routes) == 0 {
		t.Fatalf("route to %v: %v", dst, err)
	}
	mac, err := net.ParseMAC(s.Interfaces[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	c := &fragmented{src: at(client, 20000+s.house.packets), dst: dst, seq: 1000, cut: cut, id: &s.house.packets}
	protocol := uint16(unix.ETH_P_IP)
	if dst.Addr().Is6() {
		protocol = unix.ETH_P_IPV6
	}
	protocol = protocol<<8 | protocol>>8
	c.to = unix.SockaddrLinklayer{Protocol: protocol, Ifindex: routes[0].LinkIndex, Halen: 6}
	copy(c.to.Addr[:], mac)
	if err := w.Do(func() (err error) {
		c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(protocol))
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(c.fd)
	if err := unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: protocol, Ifindex: c.to.Ifindex}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.send(flagRST | flagACK) }() // it answers to nobody
	before := lost()
	if err := c.send(flagSYN); err != nil {
		t.Fatal(err)
	}
	c.seq++
	var line []byte
	for until := time.Now().Add(patience); !bytes.HasSuffix(line, []byte("\n")); {
		flags, data, ok := c.receive(time.Now().Add(10 * time.Millisecond))
		switch {
		case !ok && lost() > before:
			return dropped // and not answered
		case !ok && time.Now().After(until):
			return "nothing"
		case !ok:
		case flags&flagRST != 0:
			return "refused"
		case flags&flagSYN != 0:
			if err := c.send(flagACK); err != nil {
				t.Fatal(err)
			}
		}
		line = append(line, data...)
	}
	served := new(testbed.Served)
	if err := json.Unmarshal(line, served); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return tell(served, dst, c.src)
}

// send sends a segment without data, in two fragments.
func (c *fragmented) send(flags byte) error {
	b := binary.BigEndian
	tcp := make([]byte, 32)
	b.PutUint16(tcp[0:], c.src.Port())
	b.PutUint16(tcp[2:], c.dst.Port())
	b.PutUint32(tcp[4:], c.seq)
	b.PutUint32(tcp[8:], c.ack)
	tcp[12], tcp[13] = 8<<4, flags              // eight words
	b.PutUint16(tcp[14:], 0xffff)               // window
	copy(tcp[20:], bytes.Repeat([]byte{1}, 12)) // no-operation
	if flags&flagSYN != 0 {
		copy(tcp[20:], []byte{2, 4, 1400 >> 8, 1400 & 0xff}) // maximum segment size
	}
	pseudo := append(c.src.Addr().AsSlice(), c.dst.Addr().AsSlice()...)
	pseudo = b.AppendUint32(pseudo, uint32(len(tcp)))
	pseudo = b.AppendUint32(pseudo, unix.IPPROTO_TCP)
	b.PutUint16(tcp[16:], checksum(append(pseudo, tcp...)))
	*c.id++
	for _, part := range []struct {
		offset int // of bytes
		data   []byte
		more   uint16
	}{{c.cut, tcp[c.cut:], 0}, {0, tcp[:c.cut], 1}} {
		if err := unix.Sendto(c.fd, append(c.header(part.offset, part.more, len(part.data)), part.data...), 0, &c.to); err != nil {
			return err
		}
	}
	return nil
}

// header is that of a fragment.
func (c *fragmented) header(offset int, more uint16, length int) (h []byte) {
	b := binary.BigEndian
	if c.dst.Addr().Is4() {
		h = []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0}
		b.PutUint16(h[2:], uint16(20+length))
		b.PutUint16(h[4:], *c.id)
		b.PutUint16(h[6:], more<<13|uint16(offset/8))
	} else {
		h = []byte{0x60, 0, 0, 0, 0, 0, unix.IPPROTO_FRAGMENT, 64}
		b.PutUint16(h[4:], uint16(8+length))
	}
	h = append(append(h, c.src.Addr().AsSlice()...), c.dst.Addr().AsSlice()...)
	if c.dst.Addr().Is4() {
		b.PutUint16(h[10:], checksum(h))
		return h
	}
	h = append(h, unix.IPPROTO_TCP, 0)
	h = b.AppendUint16(h, uint16(offset)|more) // in units of 8, three bits up
	return b.AppendUint32(h, uint32(*c.id))
}

// checksum is the Internet checksum.
func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i < len(data); i += 2 {
		sum += uint32(data[i])<<8 | uint32(append(data[:len(data):len(data)], 0)[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// receive waits for the next segment from the pod that has something to tell.
func (c *fragmented) receive(until time.Time) (flags byte, data []byte, ok bool) {
	b := binary.BigEndian
	buf := make([]byte, 1<<16)
	for {
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, int(max(0, time.Until(until)/time.Millisecond))); n == 0 || err != nil && err != unix.EINTR {
			return 0, nil, false
		}
		n, _, err := unix.Recvfrom(c.fd, buf, unix.MSG_DONTWAIT)
		if err != nil {
			continue
		}
		packet := buf[:n]
		var from netip.Addr
		switch {
		case n >= 40 && packet[0]>>4 == 4 && packet[9] == unix.IPPROTO_TCP:
			from = netip.AddrFrom4([4]byte(packet[12:16]))
			packet = packet[int(packet[0]&15)*4 : b.Uint16(packet[2:])]
		case n >= 60 && packet[0]>>4 == 6 && packet[6] == unix.IPPROTO_TCP:
			from = netip.AddrFrom16([16]byte(packet[8:24]))
			packet = packet[40 : 40+b.Uint16(packet[4:])]
		default:
			continue
		}
		if from != c.dst.Addr() || b.Uint16(packet) != c.dst.Port() || b.Uint16(packet[2:]) != c.src.Port() {
			continue
		}
		flags, data = packet[13], packet[packet[12]>>4*4:]
		seq := b.Uint32(packet[4:])
		switch {
		case flags&flagSYN != 0:
			c.ack = seq + 1
		case flags&flagRST == 0 && (len(data) == 0 || seq != c.ack):
			continue // nothing new, or again
		default:
			c.ack = seq + uint32(len(data))
		}
		return flags, data, true
	}
}
