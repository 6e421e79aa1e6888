// SPDX-License-Identifier: Apache-2.0

// Package validate finds out from inside a pod, without any privilege, whether
// its traffic is redirected: by connections that have to arrive somewhere else
// than they were made to.
package validate

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"shunt.dev/shunt/redirect"
)

// A Side is a kind of connection that a start-up needs redirected.
type Side string

// The sides. Which of them a process can check is a matter of who it is.
const (
	Outbound Side = "outbound"  // by anybody but the proxy, to the world: goes to OUT
	ToItself Side = "to itself" // by the proxy, to the pod's own address: goes to IN
)

// A Check is one connection that has to be redirected.
type Check struct {
	Side Side
	To   netip.AddrPort
	// At is where it has to arrive.
	At netip.AddrPort
}

func (c Check) String() string { return fmt.Sprintf("%s %s, %v", Family(c.To.Addr()), c.Side, c.To) }

// A Gap is what can't be checked, or need not be.
type Gap struct {
	Side   Side
	Family string // "IPv4" or "IPv6"
	Reason string
	// Other: another user could.
	Other bool
}

// Family names an address's family.
func Family(a netip.Addr) string {
	if a.Is4() {
		return "IPv4"
	}
	return "IPv6"
}

// Addresses that belong to nobody and are routed nowhere (RFC 5737, RFC 3849,
// RFC 9637), by family. Where a connection to one is not redirected, nothing
// answers; see hopLimit.
var nobodys = map[string][]netip.Addr{
	"IPv4": {netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("203.0.113.1")},
	"IPv6": {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("3fff::1")},
}

// ports are those that are tried in turn, because a policy may let one alone.
// The first is what Istio's own check uses; nobody listens at any of them.
var ports = []uint16{15002, 9, 443, 61002}

var loopbacks = map[string]netip.Addr{"IPv4": netip.AddrFrom4([4]byte{127, 0, 0, 1}), "IPv6": netip.IPv6Loopback()}

// Plan says what a process of uid and gid can check in a pod that has addrs, by
// the policy that the pod ought to have: for each family one connection of each
// side, as far as the policy redirects one. to is where else than to nobody's
// addresses the outbound connections may be made.
func Plan(p *redirect.Policy, addrs []netip.Addr, uid, gid uint32, to []netip.AddrPort) (checks []Check, gaps []Gap) {
	for _, family := range []string{"IPv4", "IPv6"} {
		var own []netip.Addr
		for _, a := range addrs {
			if Family(a) == family {
				own = append(own, a)
			}
		}
		if len(own) == 0 {
			continue
		}
		for _, side := range []Side{ToItself, Outbound} {
			if reason := notAs(p.Proxy, side, uid, gid); reason != "" {
				gaps = append(gaps, Gap{side, family, reason, true})
				continue
			}
			dests := candidates(side, family, own, to)
			if c, ok := first(p, side, dests, addrs, uid, gid); ok {
				c.At = netip.AddrPortFrom(loopbacks[family], map[Side]uint16{Outbound: p.Proxy.OutboundPort, ToItself: p.Proxy.InboundPort}[side])
				checks = append(checks, c)
				continue
			}
			gaps = append(gaps, Gap{side, family, fmt.Sprintf("the pod's policy redirects no connection to %s", list(dests)), false})
		}
	}
	return checks, gaps
}

// notAs says why a side can't be checked by who has uid and gid.
func notAs(proxy redirect.Proxy, side Side, uid, gid uint32) string {
	switch {
	case side == ToItself && uid != proxy.UID:
		return fmt.Sprintf("it needs the proxy's uid, %d: this is uid %d", proxy.UID, uid)
	case side == Outbound && uid == proxy.UID:
		return fmt.Sprintf("it needs another uid than the proxy's, %d", proxy.UID)
	case side == Outbound && gid == proxy.GID:
		return fmt.Sprintf("it needs another gid than the proxy's, %d", proxy.GID)
	}
	return ""
}

// candidates are the destinations of a side, the best first.
func candidates(side Side, family string, own []netip.Addr, to []netip.AddrPort) (dests []netip.AddrPort) {
	addrs := own
	if side == Outbound {
		addrs = nobodys[family]
		for _, d := range to {
			if Family(d.Addr()) == family {
				dests = append(dests, d)
			}
		}
		if len(dests) > 0 {
			return dests
		}
	}
	for _, port := range ports {
		for _, a := range addrs {
			dests = append(dests, netip.AddrPortFrom(a, port))
		}
	}
	return dests
}

// first finds a destination to which a connection has to be redirected.
func first(p *redirect.Policy, side Side, dests []netip.AddrPort, addrs []netip.Addr, uid, gid uint32) (Check, bool) {
	want := map[Side]redirect.Verdict{Outbound: redirect.VerdictOutbound, ToItself: redirect.VerdictInbound}[side]
	for _, d := range dests {
		v := p.Decide(redirect.Flow{Direction: redirect.Outbound, Proto: redirect.TCP, Dst: d, UID: uid, GID: gid, PodAddrs: addrs})
		if v.Verdict == want {
			return Check{Side: side, To: d}, true
		}
	}
	return Check{}, false
}

// list names destinations.
func list(dests []netip.AddrPort) string {
	var texts []string
	for _, d := range dests {
		texts = append(texts, d.String())
	}
	return strings.Join(texts, ", ")
}

// Policy is that of a pod which has these annotations, and whose proxy is proxy.
func Policy(proxy redirect.Proxy, annotations map[string]string) (*redirect.Policy, error) {
	conf := redirect.DefaultConfig()
	conf.Proxy.OutboundPort, conf.Proxy.InboundPort = proxy.OutboundPort, proxy.InboundPort
	uid, gid := int64(proxy.UID), int64(proxy.GID)
	const status = "sidecar.istio.io/status"
	all := map[string]string{status: "{}"}
	for key, value := range annotations {
		all[key] = value
	}
	pod := &redirect.Pod{
		ObjectMeta: redirect.ObjectMeta{Annotations: all},
		PodSpec: redirect.PodSpec{Containers: []redirect.Container{
			{Name: "app"},
			{Name: conf.ProxyContainer, SecurityContext: &redirect.SecurityContext{RunAsUser: &uid, RunAsGroup: &gid}},
		}},
	}
	out, policy, err := conf.Evaluate(pod)
	if err != nil {
		return nil, err
	}
	if policy == nil {
		return nil, &LeftAloneError{Reason: out.Reason}
	}
	return policy, nil
}

// A LeftAloneError says that a pod is not to be redirected: nothing is to be
// validated.
type LeftAloneError struct{ Reason string }

func (e *LeftAloneError) Error() string { return "the pod is to be left alone: " + e.Reason }

// ParseAnnotations reads annotations as the downward API writes them into a
// volume: a line for each, key="value", the value quoted as Go quotes it.
func ParseAnnotations(data []byte) (map[string]string, error) {
	all := map[string]string{}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		line = strings.TrimRight(line, "\n")
		if line == "" {
			continue
		}
		key, quoted, ok := strings.Cut(line, "=")
		value, err := strconv.Unquote(quoted)
		if !ok || key == "" || err != nil {
			return nil, fmt.Errorf(`line %d: expected key="value", as the downward API writes metadata.annotations`, n)
		}
		all[key] = value
	}
	return all, nil
}
