// SPDX-License-Identifier: Apache-2.0

package loader

import (
	"encoding/binary"
	"net/netip"

	"shunt.dev/shunt/bpf"
)

// Rules are one pod's policy in the form in which the programs read it.
type Rules struct {
	// UID and GID are the proxy's, as the host numbers them.
	UID, GID uint32
	// The proxy's ports, in host byte order.
	OutboundPort, InboundPort, TunnelPort, DNSPort uint16
	Flags                                          bpf.ShuntPodFlag
	// Source4 and Source6 are the pod's first global addresses; invalid
	// without one of that family.
	Source4, Source6 netip.Addr
	// Interface is the pod's only one besides lo, where one of the two is
	// excluded; else empty.
	Interface string
	// Dests is a longest-prefix table with the final word on a destination.
	Dests []Dest
	// Ports is one, likewise, over the ports of each direction.
	Ports []Port
}

// A Dest says what the destinations in a prefix are to the pod.
type Dest struct {
	Prefix netip.Prefix
	Flags  bpf.ShuntDestFlag
	Source netip.Addr // the source towards it, if it isn't Source4 or Source6
}

// A Port says what 2^(16-Bits) ports, from Port on, are to the pod.
type Port struct {
	Direction bpf.ShuntDirection
	Port      uint16 // host byte order; a multiple of the block's size
	Bits      uint8  // 0 to 16
	Flags     bpf.ShuntPortFlag
}

// words gives an address as the maps have it: IPv6, network byte order, IPv4
// mapped. An invalid address is all zeros.
func words(a netip.Addr) (w [4]uint32) {
	if !a.IsValid() {
		return w
	}
	b := a.As16()
	for i := range w {
		w[i] = binary.NativeEndian.Uint32(b[4*i:])
	}
	return w
}

// order16 turns a number around, from host to network byte order.
func order16(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}

func halves(cookie uint64) [2]uint32 { return [2]uint32{uint32(cookie), uint32(cookie >> 32)} }

func (d Dest) key(cookie uint64) bpf.ShuntDestKey {
	bits := d.Prefix.Bits()
	if d.Prefix.Addr().Is4() {
		bits += 96
	}
	k := bpf.ShuntDestKey{Prefixlen: uint32(64 + bits), Cookie: halves(cookie)}
	k.Addr.W = words(d.Prefix.Addr())
	return k
}

func (d Dest) value() bpf.ShuntDest {
	v := bpf.ShuntDest{Flags: uint32(d.Flags)}
	v.Source.W = words(d.Source)
	return v
}

func (p Port) key(cookie uint64) bpf.ShuntPortKey {
	return bpf.ShuntPortKey{
		Prefixlen: 64 + 16 + uint32(p.Bits),
		Cookie:    halves(cookie),
		Direction: uint16(p.Direction),
		Port:      order16(p.Port),
	}
}

func (r *Rules) pod() bpf.ShuntPod {
	p := bpf.ShuntPod{
		Uid: r.UID, Gid: r.GID, Flags: uint32(r.Flags),
		OutboundPort: r.OutboundPort, InboundPort: r.InboundPort, TunnelPort: r.TunnelPort, DnsPort: r.DNSPort,
	}
	p.Source4.W, p.Source6.W = words(r.Source4), words(r.Source6)
	copy(p.Interface[:], r.Interface)
	for _, d := range r.Dests {
		if d.Flags&bpf.ShuntDestFlagDEST_LOCAL != 0 {
			p.Own += addrHash(d.Prefix.Addr())
		}
	}
	return p
}

// addrHash is the programs' hash of an address. They compare sets of addresses by the
// sum over each.
func addrHash(a netip.Addr) uint64 {
	w := words(a)
	h := (uint64(w[0])<<32 | uint64(w[1])) * 0x9e3779b97f4a7c15
	h = ((h ^ h>>32) + (uint64(w[2])<<32 | uint64(w[3]))) * 0xbf58476d1ce4e5b9
	return h ^ h>>32
}
