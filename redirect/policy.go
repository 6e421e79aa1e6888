// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"net/netip"
	"slices"
)

// Mode is how inbound connections are given to the proxy.
type Mode string

// The interception modes of sidecar.istio.io/interceptionMode.
const (
	ModeRedirect Mode = "REDIRECT"
	ModeTProxy   Mode = "TPROXY"
	ModeNone     Mode = "NONE"
)

// A PortRange is an inclusive range of ports, in host byte order.
type PortRange struct {
	First, Last uint16
}

// Contains reports whether port lies in r.
func (r PortRange) Contains(port uint16) bool { return r.First <= port && port <= r.Last }

// Ports is a list of port ranges, or all of them.
type Ports struct {
	All    bool        // `*`
	Ranges []PortRange // sorted, disjoint, not adjacent; empty when All
}

// Contains reports whether port is in the list.
func (p Ports) Contains(port uint16) bool { return p.All || containsPort(p.Ranges, port) }

func containsPort(ranges []PortRange, port uint16) bool {
	return slices.ContainsFunc(ranges, func(r PortRange) bool { return r.Contains(port) })
}

// Prefixes is a list of CIDRs, or all of them. Prefixes are masked; IPv4 is
// never held in its IPv6-mapped form.
type Prefixes struct {
	All  bool           // `*`
	List []netip.Prefix // sorted, no duplicates; empty when All
}

// Contains reports whether addr, unmapped and without a zone, is in the list.
func (p Prefixes) Contains(addr netip.Addr) bool { return p.All || containsAddr(p.List, addr) }

func containsAddr(list []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// Proxy says who the sidecar proxy is and where it listens.
type Proxy struct {
	UID, GID uint32 // of its container, as numbered in the pod's own user namespace

	OutboundPort uint16 // OUT, 15001
	InboundPort  uint16 // IN, 15006
	TunnelPort   uint16 // TUN, 15008
	DNSPort      uint16 // DNS, 15053
}

// A Policy is everything that decides a meshed pod's connections: sections 2
// to 5 of the semantics, with every default filled in.
type Policy struct {
	Mode  Mode // ModeRedirect or ModeTProxy
	Proxy Proxy

	IncludeOutbound      Prefixes // includeOutboundIPRanges
	ExcludeOutbound      []netip.Prefix
	IncludeOutboundPorts Ports
	ExcludeOutboundPorts []PortRange

	IncludeInboundPorts Ports
	// ExcludeInboundPorts is empty unless IncludeInboundPorts.All: it is used
	// with the wildcard only.
	ExcludeInboundPorts []PortRange

	ExcludeInterfaces []string
	RerouteInterfaces []string

	DNSCapture  bool
	InvalidDrop bool

	// What the choice of a backend needs to know of the pod.
	HostUsers         bool   // false: the pod has a user namespace of its own
	RuntimeClass      string // runtimeClassName; empty when native
	SecondaryNetworks bool   // further interfaces come after this plugin
}

// IncludesLoopback reports whether the pod asks for its own loopback to be
// captured, which takes [out-local] and its gid twin out of section 4, for
// both families: an include CIDR is 127.0.0.0/8 or a part of it, or ::1/128.
// A wider one (0.0.0.0/0, 127.0.0.0/7, ::/0, `*`) covers loopback by the way,
// and does not count.
func (p *Policy) IncludesLoopback() bool {
	return slices.ContainsFunc(p.IncludeOutbound.List, func(c netip.Prefix) bool {
		// Masked, a wider prefix than 127.0.0.0/8 does not begin in it.
		return loopbackNet4.Contains(c.Addr()) || c == netip.PrefixFrom(loopback6, loopback6.BitLen())
	})
}
