// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"slices"
	"strings"
)

// What IncludeInboundPortsDefault may be.
const (
	InboundContainerPorts = "containerPorts" // the TCP containerPorts of the app's containers
	InboundAll            = "*"
)

// A Config is the administrator's part of what the rules need: the netconf's
// keys of the same names (contract, "The network configuration").
type Config struct {
	ExcludeNamespaces []string // P3

	ProxyContainer string // netconf proxy.containerName
	// Proxy holds the default uid and gid, for a proxy container that names
	// none, and the ports.
	Proxy Proxy
	// ProxyExcludeInboundPorts are the proxy's own ports that are served
	// outside the mesh. Host byte order, as all ports here.
	ProxyExcludeInboundPorts []uint16

	// IncludeInboundPortsDefault stands in for an absent includeInboundPorts
	// annotation: InboundContainerPorts or InboundAll.
	IncludeInboundPortsDefault string

	// NativeRuntimeClasses are the runtimeClassNames whose containers are
	// ordinary processes of the host (P15a).
	NativeRuntimeClasses []string

	Agent AgentRef
}

// AgentRef names the DaemonSet of the node agent. The zero value names none.
type AgentRef struct {
	Namespace, DaemonSet string
}

// ParseAgentRef reads what String writes, with space around it or not. It reports
// false where that is no DaemonSet's namespace and name.
func ParseAgentRef(s string) (AgentRef, bool) {
	namespace, daemonSet, ok := strings.Cut(strings.TrimSpace(s), "/")
	if !ok || namespace == "" || daemonSet == "" || strings.ContainsAny(namespace+daemonSet, "/ \t\r\n") {
		return AgentRef{}, false
	}
	return AgentRef{Namespace: namespace, DaemonSet: daemonSet}, true
}

// String names the DaemonSet as namespace/name.
func (a AgentRef) String() string { return a.Namespace + "/" + a.DaemonSet }

// DefaultConfig returns the configuration of a netconf that says nothing.
func DefaultConfig() Config {
	return Config{
		ExcludeNamespaces: []string{"kube-system"},
		ProxyContainer:    "istio-proxy",
		Proxy: Proxy{
			UID: 1337, GID: 1337,
			OutboundPort: 15001,
			InboundPort:  15006,
			TunnelPort:   15008,
			DNSPort:      15053,
		},
		ProxyExcludeInboundPorts:   []uint16{15020, 15021, 15090},
		IncludeInboundPortsDefault: InboundContainerPorts,
	}
}

// The suffix that the API server appends to generateName
// (k8s.io/apimachinery/pkg/util/rand): no vowels, so that no word comes out.
const (
	suffixAlphabet = "bcdfghjklmnpqrstvwxz2456789"
	suffixLen      = 5
)

// owns reports whether the pod is one of the agent's. The whole suffix is
// matched, not the prefix alone: an `agent-debug` pod is not the agent.
func (a AgentRef) owns(namespace, name string) bool {
	if a.DaemonSet == "" || namespace != a.Namespace {
		return false
	}
	suffix, ok := strings.CutPrefix(name, a.DaemonSet+"-")
	return ok && len(suffix) == suffixLen && strings.Trim(suffix, suffixAlphabet) == ""
}

func (c *Config) isNativeRuntime(class string) bool {
	return slices.Contains(c.NativeRuntimeClasses, class)
}
