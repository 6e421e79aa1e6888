// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
)

// The keys of section 2.
const (
	keyMode                  = "sidecar.istio.io/interceptionMode"
	keyIncludeOutboundRanges = "traffic.sidecar.istio.io/includeOutboundIPRanges"
	keyExcludeOutboundRanges = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
	keyIncludeOutboundPorts  = "traffic.sidecar.istio.io/includeOutboundPorts"
	keyExcludeOutboundPorts  = "traffic.sidecar.istio.io/excludeOutboundPorts"
	keyIncludeInboundPorts   = "traffic.sidecar.istio.io/includeInboundPorts"
	keyExcludeInboundPorts   = "traffic.sidecar.istio.io/excludeInboundPorts"
	keyExcludeInterfaces     = "traffic.sidecar.istio.io/excludeInterfaces"
	keyRerouteInterfaces     = "istio.io/reroute-virtual-interfaces"
	keyKubevirtInterfaces    = "traffic.sidecar.istio.io/kubevirtInterfaces"
	keyDNSCapture            = "ISTIO_META_DNS_CAPTURE"
	keyInvalidDrop           = "INVALID_DROP"
)

// known are the annotations with the prefixes of the two above that mean
// something.
var known = map[string]bool{
	keyIncludeOutboundRanges: true, keyExcludeOutboundRanges: true, keyIncludeOutboundPorts: true, keyExcludeOutboundPorts: true,
	keyIncludeInboundPorts: true, keyExcludeInboundPorts: true, keyExcludeInterfaces: true, keyKubevirtInterfaces: true,
	redirect.KeyDatapath: true, redirect.KeyInboundHook: true,
}

// A setting is one part of a policy.
type setting struct {
	Key   string `json:"key"`
	Value string `json:"value"` // empty: none
	From  string `json:"from"`
}

// Where a setting may come from.
const (
	fromDefault    = "default"
	fromNetconf    = "netconf"
	fromAnnotation = "annotation"
)

// settings are a policy's parts, in the order of section 2, then the proxy's.
func settings(s *subject) []setting {
	p, pod := s.policy, s.Pod
	own, byDefault := s.conf.Redirect, netconf.Default().Redirect
	proxy := pod.Container(own.ProxyContainer)

	annotated := func(key, value string, absent string) setting {
		if _, ok := pod.Annotations[key]; ok {
			absent = fromAnnotation
		}
		return setting{key, value, absent}
	}
	configured := func(is bool) string {
		if is {
			return fromNetconf
		}
		return fromDefault
	}
	env := func(key string, value bool) setting {
		from := fromDefault
		if slices.ContainsFunc(proxy.Env, func(e redirect.EnvVar) bool { return e.Name == key && e.Value != "" }) {
			from = "environment of " + proxy.Name
		}
		return setting{key, strconv.FormatBool(value), from}
	}
	id := func(key string, given *int64, value, byDefault uint32) setting {
		if given != nil && *given != 0 {
			return setting{key, strconv.FormatUint(uint64(value), 10), "securityContext of " + proxy.Name}
		}
		return setting{key, strconv.FormatUint(uint64(value), 10), configured(value != byDefault)}
	}
	port := func(key string, value, byDefault uint16) setting {
		return setting{"proxy." + key, strconv.Itoa(int(value)), configured(value != byDefault)}
	}

	inbound := configured(own.IncludeInboundPortsDefault != byDefault.IncludeInboundPortsDefault)
	if own.IncludeInboundPortsDefault == redirect.InboundContainerPorts {
		inbound += ", containerPorts of the app"
	}
	excluded := annotated(keyExcludeInboundPorts, portsText(redirect.Ports{Ranges: p.ExcludeInboundPorts}), "")
	if p.IncludeInboundPorts.All {
		ports := configured(!slices.Equal(own.ProxyExcludeInboundPorts, byDefault.ProxyExcludeInboundPorts))
		excluded.From = strings.TrimPrefix(excluded.From+" and "+ports, " and ")
	} else if excluded.From == "" {
		excluded.From = fromDefault
	}
	reroute := annotated(keyRerouteInterfaces, strings.Join(p.RerouteInterfaces, ","), fromDefault)
	if _, ok := pod.Annotations[keyKubevirtInterfaces]; ok && reroute.From == fromDefault {
		reroute = annotated(keyKubevirtInterfaces, reroute.Value, "")
	}
	var user, group *int64
	if c := proxy.SecurityContext; c != nil {
		user, group = c.RunAsUser, c.RunAsGroup
	}
	return []setting{
		annotated(keyMode, string(p.Mode), fromDefault),
		annotated(keyIncludeOutboundRanges, prefixesText(p.IncludeOutbound), fromDefault),
		annotated(keyExcludeOutboundRanges, prefixesText(redirect.Prefixes{List: p.ExcludeOutbound}), fromDefault),
		annotated(keyIncludeOutboundPorts, portsText(p.IncludeOutboundPorts), fromDefault),
		annotated(keyExcludeOutboundPorts, portsText(redirect.Ports{Ranges: p.ExcludeOutboundPorts}), fromDefault),
		annotated(keyIncludeInboundPorts, portsText(p.IncludeInboundPorts), inbound),
		excluded,
		annotated(keyExcludeInterfaces, strings.Join(p.ExcludeInterfaces, ","), fromDefault),
		reroute,
		env(keyDNSCapture, p.DNSCapture),
		env(keyInvalidDrop, p.InvalidDrop),
		id("proxy.uid", user, p.Proxy.UID, byDefault.Proxy.UID),
		id("proxy.gid", group, p.Proxy.GID, byDefault.Proxy.GID),
		port("outboundPort", p.Proxy.OutboundPort, byDefault.Proxy.OutboundPort),
		port("inboundPort", p.Proxy.InboundPort, byDefault.Proxy.InboundPort),
		port("tunnelPort", p.Proxy.TunnelPort, byDefault.Proxy.TunnelPort),
		port("dnsPort", p.Proxy.DNSPort, byDefault.Proxy.DNSPort),
	}
}

func portsText(p redirect.Ports) string {
	if p.All {
		return "*"
	}
	var list []string
	for _, r := range p.Ranges {
		text := strconv.Itoa(int(r.First))
		if r.Last != r.First {
			text = fmt.Sprintf("%d-%d", r.First, r.Last)
		}
		list = append(list, text)
	}
	return strings.Join(list, ",")
}

func prefixesText(p redirect.Prefixes) string {
	if p.All {
		return "*"
	}
	return joined(p.List, netip.Prefix.String)
}

func joined[T any](list []T, text func(T) string) string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = text(v)
	}
	return strings.Join(out, ",")
}

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
