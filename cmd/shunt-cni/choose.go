// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/redirect"
)

// The annotations by which a pod chooses where the configuration says auto.
const (
	keyDatapath    = "shunt.dev/datapath"
	keyInboundHook = "shunt.dev/inbound-hook"
)

// choose fails where the pod needs what the eBPF backend, the only one so far,
// does not serve: with code 7 for an annotation that is not one of its values,
// else with code 100 and every need.
func choose(conf *netconf.Config, pod *redirect.Pod, policy *redirect.Policy) error {
	eff := *conf
	var errs []error
	for _, a := range []struct {
		key    string
		into   *string
		values [2]string
	}{
		{keyDatapath, &eff.Datapath, [2]string{"ebpf", "iptables"}},
		{keyInboundHook, &eff.InboundHook, [2]string{"sk_lookup", "tc"}},
	} {
		value, ok := pod.Annotations[a.key]
		switch {
		case !ok:
		case value != a.values[0] && value != a.values[1]:
			errs = append(errs, &redirect.InputError{Key: a.key, Value: value, Want: strings.Join(a.values[:], " or ")})
		case *a.into == "auto":
			*a.into = value
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fail(types.ErrInvalidNetworkConfig, "read what pod %s/%s asks for: %v", pod.Namespace, pod.Name, err)
	}
	if err := served(&eff); err != nil {
		return fail(codeProgram, "program pod %s/%s: %v", pod.Namespace, pod.Name, err)
	}
	if needs := unserved(policy); len(needs) > 0 {
		return fail(codeProgram, "program pod %s/%s: the eBPF datapath does not serve it, and this build has no other: %s",
			pod.Namespace, pod.Name, strings.Join(needs, "; "))
	}
	return nil
}

// served fails where the configuration itself, or what is left of it after a
// pod's annotations, asks for what this build does not have.
func served(conf *netconf.Config) error {
	if conf.Datapath == "iptables" {
		return errors.New("datapath iptables is asked for, which this build does not have: use ebpf, or auto")
	}
	if conf.InboundHook == "tc" {
		return errors.New("inboundHook tc is asked for, which this build does not have: use sk_lookup, or auto")
	}
	return nil
}

// unserved names the needs of a policy that the eBPF backend does not serve,
// each as a clause that an operator can act on.
func unserved(p *redirect.Policy) []string {
	var needs []string
	add := func(need bool, format string, args ...any) {
		if need {
			needs = append(needs, fmt.Sprintf(format, args...))
		}
	}
	add(p.Mode == redirect.ModeTProxy, "interception mode TPROXY is asked for (annotation sidecar.istio.io/interceptionMode)")
	add(p.DNSCapture, "DNS capture is asked for (ISTIO_META_DNS_CAPTURE of the proxy)")
	add(len(p.ExcludeInterfaces) > 0, "interfaces are excluded: %s", strings.Join(p.ExcludeInterfaces, ", "))
	add(len(p.RerouteInterfaces) > 0, "interfaces are rerouted: %s", strings.Join(p.RerouteInterfaces, ", "))
	add(!p.HostUsers, "the pod has a user namespace of its own (hostUsers: false)")
	add(p.RuntimeClass != "", "runtimeClassName %q is not among nativeRuntimeClasses: its containers may not be processes of this kernel", p.RuntimeClass)
	add(p.SecondaryNetworks, "further networks are attached after this plugin (annotation k8s.v1.cni.cncf.io/networks)")
	return needs
}
