// SPDX-License-Identifier: Apache-2.0

package ebpf

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/internal/testbed"
)

// Flags of a TCP segment.
const (
	fin = 0x01
	syn = 0x02
	rst = 0x04
	ack = 0x10
)

// Addresses of the clients that exist only on the wire.
var (
	wireClient4 = netip.MustParseAddr("198.18.0.5")
	wireClient6 = netip.MustParseAddr("2001:2::5")
)

// wireMAC is theirs. No interface has it: the world's kernel answers none of
// what the pod sends them.
var wireMAC = net.HardwareAddr{2, 0, 0, 0, 0, 7}

// wire sends and receives frames at the world's end of a pod's eth0.
type wire struct {
	t   *testing.T
	fd  int
	pod net.HardwareAddr
}

func newWire(t *testing.T, p *pod) *wire {
	t.Helper()
	fatal := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	eth0, err := p.Netlink().LinkByName("eth0")
	fatal("find eth0", err)
	for client, gateway := range map[netip.Addr]string{wireClient4: "169.254.7.7", wireClient6: "fe80::7"} {
		gw := net.ParseIP(gateway)
		bits := 32
		if client.Is6() {
			bits = 64
		}
		fatal("add neighbour", p.Netlink().NeighSet(&netlink.Neigh{
			LinkIndex: eth0.Attrs().Index, State: unix.NUD_PERMANENT, IP: gw, HardwareAddr: wireMAC,
		}))
		fatal("add route", p.Netlink().RouteReplace(&netlink.Route{
			LinkIndex: eth0.Attrs().Index, Gw: gw, Flags: int(netlink.FLAG_ONLINK),
			Dst: &net.IPNet{IP: client.AsSlice(), Mask: net.CIDRMask(bits, client.BitLen())},
		}))
	}
	w := &wire{t: t, pod: eth0.Attrs().HardwareAddr}
	fatal("open a packet socket", p.World.Do(func() error {
		proto := uint16(unix.ETH_P_ALL)<<8 | uint16(unix.ETH_P_ALL)>>8
		var err error
		w.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(proto))
		if err != nil {
			return err
		}
		if err := unix.SetsockoptInt(w.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
			return err
		}
		return unix.Bind(w.fd, &unix.SockaddrLinklayer{Protocol: proto, Ifindex: eth0.Attrs().ParentIndex})
	}))
	t.Cleanup(func() { unix.Close(w.fd) })
	return w
}

// segment is a TCP segment, and how it is wrapped.
type segment struct {
	src, dst netip.AddrPort
	flags    byte
	seq, ack uint32
	options  []byte // of TCP
	data     []byte
	wrap     wrapping
}

// wrapping is what lies around a segment.
type wrapping struct {
	vlan    []uint16 // tags, the outermost first
	options []byte   // of IPv4; a multiple of four bytes
	// Extension headers of IPv6, by type; eight bytes each, more if given.
	headers []header
	// Where the IP payload is cut to pieces; multiples of eight.
	cuts []int
	// Bytes behind the packet that belong to the frame only.
	padding []byte
}

type header struct {
	kind byte
	body []byte // without the first two bytes
}

func sum(b []byte, s uint32) uint32 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(b[0])<<8 | uint32(b[1])
	}
	if len(b) > 0 {
		s += uint32(b[0]) << 8
	}
	return s
}

func folded(s uint32) uint16 {
	for s > 0xffff {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// encode gives the segment with its checksum.
func (s segment) encode() []byte {
	b := make([]byte, 20, 20+len(s.options)+len(s.data))
	binary.BigEndian.PutUint16(b, s.src.Port())
	binary.BigEndian.PutUint16(b[2:], s.dst.Port())
	binary.BigEndian.PutUint32(b[4:], s.seq)
	binary.BigEndian.PutUint32(b[8:], s.ack)
	b[12] = byte((20 + len(s.options)) / 4 << 4)
	b[13] = s.flags
	binary.BigEndian.PutUint16(b[14:], 65535)
	b = append(append(b, s.options...), s.data...)
	c := sum(s.src.Addr().AsSlice(), sum(s.dst.Addr().AsSlice(), uint32(unix.IPPROTO_TCP+len(b))))
	binary.BigEndian.PutUint16(b[16:], folded(sum(b, c)))
	return b
}

var packetID uint32 = 1

// frames gives the frames in which the segment goes over the wire.
func (w *wire) frames(s segment) (out [][]byte) {
	payload := s.encode()
	packetID++
	kind, off := byte(unix.IPPROTO_TCP), 0
	var chain []byte
	for i := len(s.wrap.headers) - 1; i >= 0; i-- {
		h := s.wrap.headers[i]
		body := h.body
		if body == nil {
			body = []byte{1, 4, 0, 0, 0, 0} // an option that pads
		}
		chain = append(append([]byte{kind, byte((len(body)+2)/8 - 1)}, body...), chain...)
		kind = h.kind
	}
	payload = append(chain, payload...)
	for _, cut := range append(s.wrap.cuts, len(payload)) {
		piece, more := payload[off:cut], cut < len(payload)
		f := append(append([]byte{}, w.pod...), wireMAC...)
		for _, tag := range s.wrap.vlan {
			f = binary.BigEndian.AppendUint16(append(f, 0x81, 0), tag)
		}
		if s.dst.Addr().Is4() {
			ip := make([]byte, 20, 60)
			ip[0] = 4<<4 | byte(20+len(s.wrap.options))/4
			binary.BigEndian.PutUint16(ip[2:], uint16(20+len(s.wrap.options)+len(piece)))
			binary.BigEndian.PutUint16(ip[4:], uint16(packetID))
			fragment := uint16(off / 8)
			if more {
				fragment |= 0x2000
			}
			binary.BigEndian.PutUint16(ip[6:], fragment)
			ip[8], ip[9] = 64, unix.IPPROTO_TCP
			copy(ip[12:], s.src.Addr().AsSlice())
			copy(ip[16:], s.dst.Addr().AsSlice())
			ip = append(ip, s.wrap.options...)
			binary.BigEndian.PutUint16(ip[10:], folded(sum(ip, 0)))
			f = append(append(append(f, 8, 0), ip...), piece...)
		} else {
			next := kind
			if len(s.wrap.cuts) > 0 {
				h := []byte{kind, 0, 0, 0}
				fragment := uint16(off)
				if more {
					fragment |= 1
				}
				binary.BigEndian.PutUint16(h[2:], fragment)
				piece = append(binary.BigEndian.AppendUint32(h, packetID), piece...)
				next = unix.IPPROTO_FRAGMENT
			}
			ip := make([]byte, 40)
			ip[0] = 6 << 4
			binary.BigEndian.PutUint16(ip[4:], uint16(len(piece)))
			ip[6], ip[7] = next, 64
			copy(ip[8:], s.src.Addr().AsSlice())
			copy(ip[24:], s.dst.Addr().AsSlice())
			f = append(append(append(f, 0x86, 0xdd), ip...), piece...)
		}
		out = append(out, append(f, s.wrap.padding...))
		off = cut
	}
	return out
}

func (w *wire) send(s segment) {
	w.t.Helper()
	for _, f := range w.frames(s) {
		if _, err := unix.Write(w.fd, f); err != nil {
			w.t.Fatalf("send: %v", err)
		}
	}
}

// received is a segment that the pod has sent, and whether its checksums are right.
type received struct {
	segment
	vlan  int // -1: no tag
	valid bool
}

// parse reads a frame that the pod has sent to a client on the wire.
func (w *wire) parse(b []byte) (r received, ok bool) {
	if len(b) < 14 || string(b[:6]) != string(wireMAC) {
		return r, false
	}
	kind, b := binary.BigEndian.Uint16(b[12:]), b[14:]
	var src, dst netip.Addr
	r.valid = true
	switch {
	case kind == unix.ETH_P_IP && len(b) >= 20 && b[9] == unix.IPPROTO_TCP:
		src, dst = netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:]))
		n := int(b[0]&15) * 4
		r.valid = folded(sum(b[:n], 0)) == 0
		r.wrap.options = b[20:n]
		b = b[n:binary.BigEndian.Uint16(b[2:])]
	case kind == unix.ETH_P_IPV6 && len(b) >= 40 && b[6] == unix.IPPROTO_TCP:
		src, dst = netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:]))
		b = b[40 : 40+binary.BigEndian.Uint16(b[4:])]
	default:
		return r, false
	}
	r.src = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b))
	r.dst = netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	r.seq, r.ack, r.flags = binary.BigEndian.Uint32(b[4:]), binary.BigEndian.Uint32(b[8:]), b[13]
	r.data = append([]byte{}, b[int(b[12]>>4)*4:]...)
	return r, true
}

// receive waits for a segment from the pod that ok accepts; false when none
// comes in time.
func (w *wire) receive(patience time.Duration, ok func(received) bool) (received, bool) {
	w.t.Helper()
	buf, oob := make([]byte, 64<<10), make([]byte, 256)
	for deadline := time.Now().Add(patience); ; {
		left := max(time.Until(deadline), 0) // what has come is looked at, however late
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if err != nil && err != unix.EINTR {
			w.t.Fatal(err)
		}
		if n <= 0 {
			if left == 0 {
				return received{}, false
			}
			continue
		}
		n, oobn, _, _, err := unix.Recvmsg(w.fd, buf, oob, unix.MSG_DONTWAIT)
		if err != nil {
			continue
		}
		r, good := w.parse(buf[:n])
		if !good {
			continue
		}
		r.vlan = -1
		msgs, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for _, m := range msgs {
			// struct tpacket_auxdata: status, ..., the tag at 16.
			if m.Header.Type == unix.PACKET_AUXDATA && binary.NativeEndian.Uint32(m.Data)&unix.TP_STATUS_VLAN_VALID != 0 {
				r.vlan = int(binary.NativeEndian.Uint16(m.Data[16:]))
			}
		}
		if ok(r) {
			return r, true
		}
	}
}

// between accepts what the pod sends from dst to src with all of the flags.
func between(src, dst netip.AddrPort, flags byte) func(received) bool {
	return func(r received) bool { return r.src == dst && r.dst == src && r.flags&flags == flags }
}

// dialogue is a connection by hand.
type dialogue struct {
	*wire
	src, dst netip.AddrPort
	wrap     wrapping
	options  []byte // of the SYN
	seq, ack uint32 // what is sent next, and what was received
	ended    bool   // the pod's FIN was received
}

func (d *dialogue) segment(flags byte, data string) segment {
	s := segment{src: d.src, dst: d.dst, flags: flags, seq: d.seq, ack: d.ack, data: []byte(data), wrap: d.wrap}
	if flags&syn != 0 {
		s.options = d.options
	}
	return s
}

// shake shakes hands, and gives what the listener says of itself.
func (d *dialogue) shake() (*testbed.Served, error) {
	d.t.Helper()
	d.send(d.segment(syn, ""))
	r, ok := d.receive(patience, between(d.src, d.dst, 0))
	switch {
	case !ok:
		return nil, fmt.Errorf("no answer to the SYN")
	case !r.valid:
		return nil, fmt.Errorf("the answer's checksum is wrong")
	case r.flags&rst != 0:
		return nil, fmt.Errorf("refused")
	case r.flags&(syn|ack) != syn|ack:
		return nil, fmt.Errorf("the answer has the flags %#x", r.flags)
	}
	d.seq++
	d.ack = r.seq + 1
	d.send(d.segment(ack, ""))
	return d.greeting()
}

// greeting reads the listener's first line.
func (d *dialogue) greeting() (*testbed.Served, error) {
	d.t.Helper()
	var line strings.Builder
	for !strings.Contains(line.String(), "\n") {
		r, ok := d.receive(patience, func(r received) bool {
			return between(d.src, d.dst, 0)(r) && (r.flags&rst != 0 || r.seq == d.ack && len(r.data) > 0)
		})
		if !ok {
			return nil, fmt.Errorf("no greeting but %q", line.String())
		}
		if r.flags&rst != 0 {
			return nil, fmt.Errorf("reset after the handshake")
		}
		line.Write(r.data)
		d.ack += uint32(len(r.data))
		d.ended = r.flags&fin != 0
		d.send(d.segment(ack, ""))
	}
	s := new(testbed.Served)
	first, _, _ := strings.Cut(line.String(), "\n")
	return s, json.Unmarshal([]byte(first), s)
}

// end closes a connection that the pod closes first.
func (d *dialogue) end() {
	d.t.Helper()
	if !d.ended {
		if _, ok := d.receive(patience, between(d.src, d.dst, fin)); !ok {
			d.t.Fatal("the proxy has not closed")
		}
	}
	d.ack++
	d.send(d.segment(fin|ack, ""))
	d.seq++
	if _, ok := d.receive(patience, func(r received) bool { return between(d.src, d.dst, ack)(r) && r.ack == d.seq }); !ok {
		d.t.Fatal("the proxy's end has not acknowledged the close")
	}
}

// abort resets the connection.
func (d *dialogue) abort() { d.send(d.segment(rst, "")) }
