// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"net/netip"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"shunt.dev/shunt/redirect"
)

// A question asks explain about one flow.
type question struct {
	to, proto, from, iface string
	uid, gid               uint32
	inbound                uint16
	podIPs                 []string

	// What parse makes of them.
	asked  bool
	dst    netip.AddrPort // outbound
	src    netip.Addr
	addrs  []netip.Addr
	hasUID bool
	hasGID bool
}

func (q *question) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&q.to, "to", "", "a connection from inside the pod to `IP:PORT`")
	f.StringVar(&q.proto, "proto", "tcp", "its protocol, `tcp|udp`")
	f.Uint32Var(&q.uid, "uid", 0, "who makes it; the app's container's runAsUser, or 1000")
	f.Uint32Var(&q.gid, "gid", 0, "likewise; runAsGroup, or 1000")
	f.Uint16Var(&q.inbound, "inbound", 0, "a TCP connection that arrives at the pod's `PORT`")
	f.StringVar(&q.from, "from", "", "the `IP` that it comes from: outbound, the one that the socket is bound to")
	f.StringVar(&q.iface, "interface", "", "the interface `NAME` that it leaves or arrives by; eth0 for --inbound")
	f.StringSliceVar(&q.podIPs, "pod-ip", nil, "the pod's addresses, `IP,...`; its status.podIPs else")
}

// parse reads the flags, and refuses those that mean nothing together.
func (q *question) parse(f *pflag.FlagSet) (err error) {
	out, in := f.Changed("to"), f.Changed("inbound")
	q.asked, q.hasUID, q.hasGID = out || in, f.Changed("uid"), f.Changed("gid")
	switch {
	case out && in:
		return usagef("--to and --inbound ask about two connections: give one of them")
	case !out && (f.Changed("proto") || q.hasUID || q.hasGID):
		return usagef("--proto, --uid and --gid are of a connection from inside the pod: --to is missing")
	case !out && !in && (f.Changed("from") || f.Changed("interface")):
		return usagef("--from and --interface are of a connection: --to or --inbound is missing")
	case in && q.inbound == 0:
		return usagef("--inbound 0: expected a port, 1 to 65535")
	case q.proto != "tcp" && q.proto != "udp":
		return usagef("--proto %q: expected tcp or udp", q.proto)
	}
	if out {
		if q.dst, err = netip.ParseAddrPort(q.to); err != nil || q.dst.Port() == 0 {
			return usagef("--to %q: expected IP:PORT, such as 10.1.2.3:443 or [fd00::1]:443", q.to)
		}
	}
	if q.from != "" {
		if q.src, err = parseAddr("--from", q.from); err != nil {
			return err
		}
		if out && q.src.Unmap().Is4() != q.dst.Addr().Unmap().Is4() {
			return usagef("--from %s and --to %s are of two families", q.from, q.to)
		}
	}
	for _, s := range q.podIPs {
		a, err := parseAddr("--pod-ip", s)
		if err != nil {
			return err
		}
		q.addrs = append(q.addrs, a)
	}
	return nil
}

// flow is the answer.
type flow struct {
	Direction string       `json:"direction"`
	Proto     string       `json:"proto"`
	From      string       `json:"from,omitempty"`
	To        string       `json:"to"`
	UID       *uint32      `json:"uid,omitempty"` // outbound
	GID       *uint32      `json:"gid,omitempty"`
	Interface string       `json:"interface,omitempty"`
	PodIPs    []netip.Addr `json:"podIPs"`
	// Verdict is direct, OUT, IN or DNS; of a pod that is left alone,
	// untouched, and Rule is the one that leaves it alone.
	Verdict string   `json:"verdict"`
	Rule    string   `json:"rule"`
	Because string   `json:"because"`
	So      string   `json:"so"`
	Assumed []string `json:"assumed,omitempty"`
}

// answer decides the flow; nil where none was asked about.
func (q *question) answer(s *subject) (*flow, error) {
	if !q.asked {
		return nil, nil
	}
	if len(q.addrs) == 0 {
		q.addrs = s.IPs
	}
	a := &flow{PodIPs: append([]netip.Addr{}, q.addrs...), From: q.from, Interface: q.iface, Proto: q.proto}
	f := redirect.Flow{Src: q.src, Interface: q.iface, PodAddrs: q.addrs}
	if q.dst.IsValid() {
		q.outbound(s, &f, a)
	} else {
		q.arriving(&f, a)
	}
	a.Direction = f.Direction.String()
	if s.policy == nil {
		a.Verdict, a.Rule, a.Because = "untouched", s.outcome.Rule, s.outcome.Reason
		a.So = "Shunt does nothing in the pod: it goes where it is going, unless somebody else has a say"
		return a, nil
	}
	d := s.policy.Decide(f)
	a.Verdict, a.Rule, a.Because = d.Verdict.String(), d.Rule.String(), because[d.Rule]
	a.So = consequence(s.policy, f, d)
	if f.Direction == redirect.Inbound && d.Rule == redirect.RuleInReroute && !s.policy.IncludeOutbound.All {
		if len(q.addrs) == 0 {
			return nil, usagef("what arrives by %s goes by its destination: the pod's addresses are not known, give --pod-ip", f.Interface)
		}
		a.Assumed = append(a.Assumed, "it goes to the pod's own address: what a guest sends elsewhere goes by its own destination")
	}
	if len(q.addrs) == 0 && f.Direction == redirect.Outbound {
		own := f
		own.PodAddrs = []netip.Addr{f.Dst.Addr()}
		if other := s.policy.Decide(own); other != d {
			a.Assumed = append(a.Assumed, fmt.Sprintf("%s is not the pod's own: its addresses are not known (no status.podIPs, no --pod-ip). If it is, the verdict is %v by %v",
				f.Dst.Addr(), other.Verdict, other.Rule))
		}
	}
	return a, nil
}

func (q *question) outbound(s *subject, f *redirect.Flow, a *flow) {
	f.Direction, f.Dst = redirect.Outbound, q.dst
	a.To = q.dst.String()
	if q.proto == "udp" {
		f.Proto = redirect.UDP
	}
	uid, gid, who := appIDs(s)
	if q.hasUID {
		uid = q.uid
	}
	if q.hasGID {
		gid = q.gid
	}
	switch {
	case !q.hasUID && !q.hasGID:
		a.Assumed = append(a.Assumed, fmt.Sprintf("it is made as uid %d, gid %d: %s (--uid, --gid)", uid, gid, who))
	case !q.hasUID:
		a.Assumed = append(a.Assumed, fmt.Sprintf("it is made as uid %d: %s (--uid)", uid, who))
	case !q.hasGID:
		a.Assumed = append(a.Assumed, fmt.Sprintf("it is made as gid %d: %s (--gid)", gid, who))
	}
	f.UID, f.GID = uid, gid
	a.UID, a.GID = &uid, &gid
}

func (q *question) arriving(f *redirect.Flow, a *flow) {
	f.Direction = redirect.Inbound
	if f.Interface == "" {
		f.Interface = "eth0"
		a.Interface = f.Interface
		a.Assumed = append(a.Assumed, "it arrives by eth0 (--interface)")
	}
	a.To = "port " + strconv.Itoa(int(q.inbound))
	for i, own := range q.addrs { // of the client's family, where that is known
		if i == 0 || q.src.IsValid() && own.Unmap().Is4() == q.src.Unmap().Is4() && f.Dst.Addr().Is4() != q.src.Unmap().Is4() {
			f.Dst = netip.AddrPortFrom(own.Unmap(), q.inbound)
			a.To = f.Dst.String()
		}
	}
	if !f.Dst.IsValid() {
		f.Dst = netip.AddrPortFrom(netip.IPv4Unspecified(), q.inbound)
	}
}

// appIDs gives the uid and gid that the app most likely has, and why.
func appIDs(s *subject) (uid, gid uint32, why string) {
	const nobodys = 1000
	uid, gid, why = nobodys, nobodys, "any that is not the proxy's gives the same"
	if s.policy != nil { // not the proxy's
		for uid == s.policy.Proxy.UID || gid == s.policy.Proxy.GID {
			uid, gid = uid+1, gid+1
		}
	}
	user, group := s.RunAsUser, s.RunAsGroup
	for _, c := range s.Pod.Containers {
		if c.Name == s.conf.Redirect.ProxyContainer {
			continue
		}
		if sc := c.SecurityContext; sc != nil {
			if sc.RunAsUser != nil {
				user = sc.RunAsUser
			}
			if sc.RunAsGroup != nil {
				group = sc.RunAsGroup
			}
		}
		break
	}
	valid := func(id *int64) bool { return id != nil && *id >= 0 && *id < int64(redirect.NoOwner) }
	if valid(user) {
		uid, why = uint32(*user), "by the app's securityContext"
	}
	if valid(group) {
		gid, why = uint32(*group), "by the app's securityContext"
	}
	return uid, gid, why
}

// because says why a rule matches.
var because = map[redirect.Rule]string{
	redirect.RuleOutExcludeInterface: "it leaves by an excluded interface",
	redirect.RuleOutExcludePort:      "its destination port is in excludeOutboundPorts",
	redirect.RuleOutPassthrough:      "it stays in the pod and comes from the address that the proxy uses towards its own app",
	redirect.RuleOutProxyToSelf:      "the proxy calls the pod's own address: an app's own service is entered by the inbound side",
	redirect.RuleOutLocal:            "it stays in the pod, and is not the proxy's",
	redirect.RuleOutProxy:            "it is the proxy's own (by uid)",
	redirect.RuleOutProxyGIDToSelf:   "the proxy (by gid) calls the pod's own address: an app's own service is entered by the inbound side",
	redirect.RuleOutProxyGIDLocal:    "it stays in the pod, and is not the proxy's (by gid)",
	redirect.RuleOutProxyGID:         "it is the proxy's own (by gid)",
	redirect.RuleOutDNS:              "DNS capture is on, and it goes to port 53",
	redirect.RuleOutLoopback:         "it goes to loopback",
	redirect.RuleOutExcludeCIDR:      "its destination is in excludeOutboundIPRanges",
	redirect.RuleOutIncludePort:      "its destination port is in includeOutboundPorts",
	redirect.RuleOutIncludeCIDR:      "its destination is in includeOutboundIPRanges",
	redirect.RuleOutDefault:          "nothing includes it",
	redirect.RuleInReroute:           "it arrives by a rerouted interface, and goes by includeOutboundIPRanges",
	redirect.RuleInExcludeInterface:  "it arrives by an excluded interface",
	redirect.RuleInTunnel:            "it comes to the proxy's tunnel port",
	redirect.RuleInExcludePort:       "its port is in excludeInboundPorts",
	redirect.RuleInInclude:           "its port is in includeInboundPorts",
	redirect.RuleInDefault:           "nothing includes it",
}

// consequence says what becomes of a flow.
func consequence(p *redirect.Policy, f redirect.Flow, d redirect.Decision) string {
	at := func(port uint16) string {
		if f.Direction == redirect.Inbound {
			return "port " + strconv.Itoa(int(port))
		}
		lo := netip.MustParseAddr("127.0.0.1")
		if f.Dst.Addr().Unmap().Is6() {
			lo = netip.IPv6Loopback()
		}
		return netip.AddrPortFrom(lo, port).String()
	}
	dst := "the address and port that were dialled"
	if a := f.Dst.Addr(); !a.IsUnspecified() {
		dst = netip.AddrPortFrom(a.Unmap(), f.Dst.Port()).String()
	}
	gets := fmt.Sprintf("; the proxy gets %s as its original destination", dst)
	if f.Direction == redirect.Inbound && p.Mode == redirect.ModeTProxy {
		gets = "; the proxy's socket has both addresses as they arrived (TPROXY)"
	}
	switch d.Verdict {
	case redirect.VerdictOutbound:
		return "it goes to the proxy's outbound listener, " + at(p.Proxy.OutboundPort) + gets
	case redirect.VerdictInbound:
		return "it goes to the proxy's inbound listener, " + at(p.Proxy.InboundPort) + gets
	case redirect.VerdictDNS:
		return "it goes to the proxy's DNS listener, " + at(p.Proxy.DNSPort) + "; the answer comes from " + dst + " as the app sees it"
	}
	return "it is not redirected: it goes where it is going"
}

func (a *flow) text(w io.Writer) {
	fmt.Fprintf(w, "flow\t%s %s to %s", a.Direction, a.Proto, a.To)
	if a.From != "" {
		fmt.Fprintf(w, " from %s", a.From)
	}
	if a.UID != nil {
		fmt.Fprintf(w, ", uid %d, gid %d", *a.UID, *a.GID)
	}
	if a.Interface != "" {
		fmt.Fprintf(w, ", by %s", a.Interface)
	}
	fmt.Fprintf(w, "\nverdict\t%s by %s\nbecause\t%s\nso\t%s\n", a.Verdict, a.Rule, a.Because, a.So)
	for _, s := range a.Assumed {
		fmt.Fprintf(w, "assumed\t%s\n", s)
	}
}
