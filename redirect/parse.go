// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The keys of section 2, beside keyMode.
const (
	keyIncludeOutboundRanges = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	keyExcludeOutboundRanges = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	keyIncludeInboundPorts   = "traffic.sidecar.istio.io/includeInboundPorts"
	keyExcludeInboundPorts   = "traffic.sidecar.istio.io/excludeInboundPorts"
	keyIncludeOutboundPorts  = "traffic.sidecar.istio.io/includeOutboundPorts"
	keyExcludeOutboundPorts  = "traffic.sidecar.istio.io/excludeOutboundPorts"
	keyExcludeInterfaces     = "traffic.sidecar.istio.io/excludeInterfaces"
	keyRerouteInterfaces     = "istio.io/reroute-virtual-interfaces"
	keyKubevirtInterfaces    = "traffic.sidecar.istio.io/kubevirtInterfaces"

	keyDNSCapture  = "ISTIO_META_DNS_CAPTURE"
	keyInvalidDrop = "INVALID_DROP"
	keyRunAsUser   = "securityContext.runAsUser"
	keyRunAsGroup  = "securityContext.runAsGroup"

	keyInboundDefault = "includeInboundPortsDefault"
)

// An InputError is an input of section 2 that does not parse (P15).
type InputError struct {
	Key   string // the annotation, variable or field
	Value string // all of its value
	Want  string // what was expected of it; a noun phrase
}

// Error names key, value and what was expected. A long value is shortened.
func (e *InputError) Error() string {
	return fmt.Sprintf("%s: value %s: expected %s", e.Key, clip(e.Value), e.Want)
}

// clip quotes s, shortened: a value may be as long as all of a pod's
// annotations (256 KiB), an event's message holds 1 KiB.
func clip(s string) string {
	const most = 128
	if len(s) > most {
		return fmt.Sprintf("%q... (%d bytes)", s[:most], len(s))
	}
	return strconv.Quote(s)
}

// A grammar is the form of one item of a list.
type grammar[T any] struct {
	want  string // a noun phrase
	parse func(item string) (T, bool)
}

var (
	portList      = grammar[PortRange]{"a port (1-65535) or a range such as 8000-8100", parsePortRange}
	prefixList    = grammar[netip.Prefix]{"a CIDR such as 10.0.0.0/8 or fd00::/8, or an IP address", parsePrefix}
	interfaceList = grammar[string]{"an interface name (1-15 letters, digits, _ . -, a letter or digit first)", parseInterface}
)

// wildcard says whether `*` may stand alone for all.
type wildcard bool

const (
	noWildcard   wildcard = false
	withWildcard wildcard = true
)

// parseList reads a comma-separated list. Spaces around an item are fine, and
// a value of nothing, or of spaces, is the empty list; all is true for a
// lone `*`. The error is an *InputError that names the first bad item.
func parseList[T any](key, value string, g grammar[T], star wildcard) (list []T, all bool, err error) {
	const space = " "
	switch strings.Trim(value, space) {
	case "":
		return nil, false, nil
	case "*":
		if star {
			return nil, true, nil
		}
	}
	n := 0
	for item := range strings.SplitSeq(value, ",") {
		n++
		item = strings.Trim(item, space)
		v, ok := g.parse(item)
		if !ok {
			want := fmt.Sprintf("item %d, %s, to be %s", n, clip(item), g.want)
			if star {
				want += "; or a lone *"
			}
			return nil, false, &InputError{Key: key, Value: value, Want: want}
		}
		list = append(list, v)
	}
	return list, false, nil
}

// parsePort reads 1-65535: decimal digits alone, no leading zero.
func parsePort(s string) (uint16, bool) {
	if s == "" || s[0] < '1' || s[0] > '9' { // ParseUint refuses signs, not leading zeros
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 16)
	return uint16(n), err == nil
}

func parsePortRange(s string) (PortRange, bool) {
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	f, okFirst := parsePort(first)
	l, okLast := parsePort(last)
	return PortRange{First: f, Last: l}, okFirst && okLast && f <= l
}

// parsePrefix reads a CIDR, or an address as its /32 or /128. Host bits are
// masked. What lies in ::ffff:0:0/96 becomes the IPv4 prefix it stands for;
// a shorter prefix stays IPv6, and says nothing of IPv4. Zones are refused.
func parsePrefix(s string) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" {
			return netip.Prefix{}, false
		}
		p = netip.PrefixFrom(addr, addr.BitLen())
	}
	if p.Addr().Is4In6() && p.Bits() >= 96 {
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	return p.Masked(), true
}

// parseInterface reads an interface name: at most IFNAMSIZ-1 bytes, and none
// that means something to another program.
func parseInterface(s string) (string, bool) {
	const alnum = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	ok := s != "" && len(s) <= 15 && strings.IndexByte(alnum, s[0]) >= 0 && strings.Trim(s, alnum+"_.-") == ""
	return s, ok
}

// inputs reads a pod's inputs and keeps the first error, in the order of
// reading: that of section 2's table.
type inputs struct {
	pod   *Pod
	proxy *Container
	err   error
}

func (in *inputs) fail(err error) {
	if in.err == nil {
		in.err = err
	}
}

// annotation returns the value, or what stands for it when it is absent.
// Present and empty is not absent: it is the empty list.
func (in *inputs) annotation(key, absent string) string {
	if value, ok := in.pod.Annotations[key]; ok {
		return value
	}
	return absent
}

func (in *inputs) mode() Mode {
	value := in.annotation(keyMode, string(ModeRedirect))
	mode := Mode(value)
	if mode != ModeRedirect && mode != ModeTProxy { // NONE was P14's
		in.fail(&InputError{Key: keyMode, Value: value, Want: "REDIRECT, TPROXY or NONE"})
	}
	return mode
}

func (in *inputs) ports(key, absent string, star wildcard) Ports {
	list, all, err := parseList(key, in.annotation(key, absent), portList, star)
	if err != nil {
		in.fail(err)
	}
	return Ports{All: all, Ranges: mergeRanges(list)}
}

func (in *inputs) prefixes(key, absent string, star wildcard) Prefixes {
	list, all, err := parseList(key, in.annotation(key, absent), prefixList, star)
	if err != nil {
		in.fail(err)
	}
	slices.SortFunc(list, netip.Prefix.Compare)
	return Prefixes{All: all, List: slices.Compact(list)}
}

func (in *inputs) interfaces(key string) []string {
	list, _, err := parseList(key, in.annotation(key, ""), interfaceList, noWildcard)
	if err != nil {
		in.fail(err)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

func (in *inputs) flag(key string) bool {
	value, ok := in.proxy.env(key)
	if !ok {
		return false
	}
	on, err := strconv.ParseBool(value)
	if err != nil {
		in.fail(&InputError{Key: key, Value: value, Want: fmt.Sprintf("true or false, in the environment of container %q", in.proxy.Name)})
	}
	return on
}

// id reads a uid or gid; 0 and nil give the default. 2^32-1 is no id: it
// stands for "leave it" in the kernel's calls, and for NoOwner here.
func (in *inputs) id(key string, value *int64, byDefault uint32) uint32 {
	if value == nil || *value == 0 {
		return byDefault
	}
	if *value < 0 || *value > math.MaxUint32-1 {
		in.fail(&InputError{Key: key, Value: strconv.FormatInt(*value, 10), Want: fmt.Sprintf("0 to 4294967294, in container %q", in.proxy.Name)})
		return byDefault
	}
	return uint32(*value)
}

// containerPorts returns the TCP containerPorts of the app: of every
// long-running container but the proxy.
func (in *inputs) containerPorts() Ports {
	var list []PortRange
	for _, c := range in.pod.longRunning() {
		if c.Name == in.proxy.Name {
			continue
		}
		for _, port := range c.Ports {
			if port.Protocol != "" && port.Protocol != "TCP" {
				continue
			}
			n := port.ContainerPort
			if n < 1 || n > math.MaxUint16 {
				in.fail(&InputError{Key: "containerPort", Value: strconv.Itoa(int(n)), Want: fmt.Sprintf("1 to 65535, in container %q", c.Name)})
				continue
			}
			list = append(list, PortRange{First: uint16(n), Last: uint16(n)})
		}
	}
	return Ports{Ranges: mergeRanges(list)}
}

// includeInboundPorts reads the annotation, or what the administrator said
// stands for it.
func (in *inputs) includeInboundPorts(byDefault string) Ports {
	_, present := in.pod.Annotations[keyIncludeInboundPorts]
	switch {
	case present || byDefault == InboundAll:
		return in.ports(keyIncludeInboundPorts, InboundAll, withWildcard)
	case byDefault == InboundContainerPorts:
		return in.containerPorts()
	}
	in.fail(&InputError{Key: keyInboundDefault, Value: byDefault, Want: InboundContainerPorts + " or " + InboundAll})
	return Ports{}
}

// policy reads section 2. Every key is read, also one that another makes
// unused: a value that does not parse is a mistake that its owner should see.
func (c *Config) policy(pod *Pod) (*Policy, error) {
	in := &inputs{pod: pod, proxy: pod.Container(c.ProxyContainer)}

	p := &Policy{
		Mode:              in.mode(),
		Proxy:             c.Proxy,
		HostUsers:         pod.HostUsers == nil || *pod.HostUsers,
		RuntimeClass:      pod.RuntimeClassName,
		SecondaryNetworks: secondaryNetworks(pod.Annotations[keyNetworks]),
	}
	if c.isNativeRuntime(p.RuntimeClass) {
		p.RuntimeClass = ""
	}

	p.IncludeOutbound = in.prefixes(keyIncludeOutboundRanges, "*", withWildcard)
	p.ExcludeOutbound = in.prefixes(keyExcludeOutboundRanges, "", noWildcard).List
	p.IncludeInboundPorts = in.includeInboundPorts(c.IncludeInboundPortsDefault)
	excludeInbound := in.ports(keyExcludeInboundPorts, "", noWildcard).Ranges
	if p.IncludeInboundPorts.All {
		for _, port := range c.ProxyExcludeInboundPorts {
			excludeInbound = append(excludeInbound, PortRange{First: port, Last: port})
		}
		p.ExcludeInboundPorts = mergeRanges(excludeInbound)
	}
	p.IncludeOutboundPorts = in.ports(keyIncludeOutboundPorts, "", withWildcard)
	p.ExcludeOutboundPorts = in.ports(keyExcludeOutboundPorts, "", noWildcard).Ranges
	p.ExcludeInterfaces = in.interfaces(keyExcludeInterfaces)
	p.RerouteInterfaces = in.interfaces(keyRerouteInterfaces)
	kubevirt := in.interfaces(keyKubevirtInterfaces)
	if _, ok := pod.Annotations[keyRerouteInterfaces]; !ok {
		p.RerouteInterfaces = kubevirt
	}

	p.DNSCapture = in.flag(keyDNSCapture)
	p.InvalidDrop = in.flag(keyInvalidDrop)
	if sc := in.proxy.SecurityContext; sc != nil {
		p.Proxy.UID = in.id(keyRunAsUser, sc.RunAsUser, c.Proxy.UID)
		p.Proxy.GID = in.id(keyRunAsGroup, sc.RunAsGroup, c.Proxy.GID)
	}

	if in.err != nil {
		return nil, in.err
	}
	return p, nil
}

// mergeRanges returns the same ports as a Ports holds them: sorted, disjoint,
// not adjacent. The argument is left as it was.
func mergeRanges(ranges []PortRange) []PortRange {
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	merged := ranges[:0]
	for _, r := range ranges {
		if n := len(merged); n > 0 && int(r.First) <= int(merged[n-1].Last)+1 {
			merged[n-1].Last = max(merged[n-1].Last, r.Last)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}
