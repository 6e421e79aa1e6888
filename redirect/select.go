// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// An Outcome says which rule of section 1 decided for a pod, and why.
type Outcome struct {
	Rule   string // "P8"; stable
	Skip   bool   // nothing is programmed, and that is right
	Reason string // a sentence an operator can act on
}

// Names that others gave.
const (
	initContainer = "istio-init"
	ownNetwork    = "shunt-cni" // Shunt's own NetworkAttachmentDefinition, for meta-plugins (OpenShift)

	keyInject   = "sidecar.istio.io/inject" // label, or annotation
	keyStatus   = "sidecar.istio.io/status"
	keyMode     = "sidecar.istio.io/interceptionMode"
	keyNetworks = "k8s.v1.cni.cncf.io/networks"
	envDisabled = "DISABLE_ENVOY"
)

// Early decides by P2 to P4 of section 1: from CNI_ARGS alone, before anything
// that can fail. It reports false when the pod's facts are needed.
func (c *Config) Early(namespace, name string) (Outcome, bool) {
	skip := func(rule, reason string) (Outcome, bool) {
		return Outcome{Rule: rule, Skip: true, Reason: reason}, true
	}
	switch {
	case namespace == "" || name == "":
		return skip("P2", "not a Kubernetes pod: CNI_ARGS lacks K8S_POD_NAMESPACE or K8S_POD_NAME")
	case slices.Contains(c.ExcludeNamespaces, namespace):
		return skip("P3", fmt.Sprintf("namespace %q is in excludeNamespaces", namespace))
	case c.Agent.owns(namespace, name):
		return skip("P4", fmt.Sprintf("the pod is the node agent itself (DaemonSet %s/%s)", c.Agent.Namespace, c.Agent.DaemonSet))
	}
	return Outcome{}, false
}

// skips are the rules that let a pod alone, in the table's order. A reason
// that is not empty means that the rule applies. From P9 on there is a proxy.
var skips = []struct {
	rule   string
	reason func(c *Config, pod *Pod) string
}{
	{"P6a", func(_ *Config, pod *Pod) string {
		if !pod.HostNetwork {
			return ""
		}
		return "hostNetwork is true: the pod has no network namespace of its own, and the host's is never programmed"
	}},
	{"P7", func(_ *Config, pod *Pod) string {
		if !slices.ContainsFunc(pod.InitContainers, func(c Container) bool { return c.Name == initContainer }) {
			return ""
		}
		return fmt.Sprintf("init container %q programs the pod itself", initContainer)
	}},
	{"P8", func(c *Config, pod *Pod) string {
		if pod.Container(c.ProxyContainer) != nil {
			return ""
		}
		return fmt.Sprintf("no container and no init container is named %q: there is no proxy to redirect to", c.ProxyContainer)
	}},
	{"P9", func(_ *Config, pod *Pod) string {
		n := len(pod.longRunning())
		if n >= 2 {
			return ""
		}
		return fmt.Sprintf("long-running containers: %d, at least 2 are needed: a gateway, or the proxy alone", n)
	}},
	{"P10", func(c *Config, pod *Pod) string {
		args := pod.Container(c.ProxyContainer).Args
		if len(args) < 2 || args[0] != "proxy" || args[1] == "sidecar" {
			return ""
		}
		return fmt.Sprintf("container %q runs as a proxy of type %s, not sidecar", c.ProxyContainer, clip(args[1]))
	}},
	{"P11", func(c *Config, pod *Pod) string {
		value, _ := pod.Container(c.ProxyContainer).env(envDisabled)
		if on, _ := strconv.ParseBool(value); !on {
			return ""
		}
		return fmt.Sprintf("container %q has %s=%s: its proxy is switched off", c.ProxyContainer, envDisabled, value)
	}},
	{"P12", func(_ *Config, pod *Pod) string {
		// The booleans are Go's, as in Istio's own plugin; the injector's
		// wider YAML set (no, off, n) never reaches this far, because such a
		// pod is not injected. What is no boolean is not false: redirect.
		kind := "label"
		value, ok := pod.Labels[keyInject]
		if !ok {
			kind, value = "annotation", pod.Annotations[keyInject]
		}
		if on, err := strconv.ParseBool(value); on || err != nil {
			return ""
		}
		return fmt.Sprintf("%s %s is %q", kind, keyInject, value)
	}},
	{"P13", func(_ *Config, pod *Pod) string {
		if _, ok := pod.Annotations[keyStatus]; ok {
			return ""
		}
		return fmt.Sprintf("annotation %s is absent: the pod was never injected", keyStatus)
	}},
	{"P14", func(_ *Config, pod *Pod) string {
		if Mode(pod.Annotations[keyMode]) != ModeNone {
			return ""
		}
		return fmt.Sprintf("annotation %s is %q", keyMode, ModeNone)
	}},
}

// Evaluate decides by P6a to P16 of section 1, in that order. A Policy is
// returned for P16 only. The error, for P15 only, is an *InputError, and the
// Outcome then bears its message. P15a and P15b don't decide: they are facts
// in the Policy (RuntimeClass, SecondaryNetworks).
func (c *Config) Evaluate(pod *Pod) (Outcome, *Policy, error) {
	for _, s := range skips {
		if reason := s.reason(c, pod); reason != "" {
			return Outcome{Rule: s.rule, Skip: true, Reason: reason}, nil, nil
		}
	}
	policy, err := c.policy(pod)
	if err != nil {
		return Outcome{Rule: "P15", Reason: err.Error()}, nil, err
	}
	return Outcome{Rule: "P16", Reason: fmt.Sprintf("injected, with proxy container %q", c.ProxyContainer)}, policy, nil
}

// secondaryNetworks reports whether the annotation names a network other than
// Shunt's own attachment (P15b). What can't be read counts as one: iptables is
// right for every pod.
func secondaryNetworks(annotation string) bool {
	annotation = strings.TrimSpace(annotation)
	if annotation == "" {
		return false
	}
	var names []string
	if strings.ContainsAny(annotation, "[{\"") {
		var list []struct {
			Name string `json:"name"`
		}
		if json.Unmarshal([]byte(annotation), &list) != nil {
			return true
		}
		for _, n := range list {
			names = append(names, n.Name)
		}
	} else {
		// [namespace/]name[@interface], comma separated
		for item := range strings.SplitSeq(annotation, ",") {
			name := strings.TrimSpace(item)
			if _, rest, ok := strings.Cut(name, "/"); ok {
				name = rest
			}
			name, _, _ = strings.Cut(name, "@")
			names = append(names, name)
		}
	}
	return slices.ContainsFunc(names, func(name string) bool { return name != ownNetwork })
}
