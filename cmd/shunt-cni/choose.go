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

// The datapaths.
const (
	datapathEBPF     = "ebpf"
	datapathIptables = "iptables"
)

// The annotations by which a pod chooses where the configuration says auto.
const (
	keyDatapath    = "shunt.dev/datapath"
	keyInboundHook = "shunt.dev/inbound-hook"
)

// choose says which datapath, ebpf or iptables, the pod gets: what the
// configuration asks for, or else its annotation, or else eBPF, unless the pod
// needs what that does not serve; reason says what. It fails with code 7 for an
// annotation that is not one of its values, and with code 100 and every need
// where eBPF is asked for and does not serve the pod.
func choose(conf *netconf.Config, pod *redirect.Pod, policy *redirect.Policy) (datapath, reason string, err error) {
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
		return "", "", fail(types.ErrInvalidNetworkConfig, "read what pod %s/%s asks for: %v", pod.Namespace, pod.Name, err)
	}
	if eff.Datapath == datapathIptables {
		return datapathIptables, "it is asked for", nil
	}
	if err := served(&eff); err != nil {
		return "", "", fail(codeProgram, "program pod %s/%s: %v", pod.Namespace, pod.Name, err)
	}
	needs := strings.Join(unserved(policy), "; ")
	switch {
	case needs == "":
		return datapathEBPF, "it serves all that the pod needs", nil
	case eff.Datapath == datapathEBPF:
		return "", "", fail(codeProgram, "program pod %s/%s: datapath ebpf is asked for and does not serve it: %s",
			pod.Namespace, pod.Name, needs)
	default:
		return datapathIptables, "eBPF does not serve the pod: " + needs, nil
	}
}

// served fails where the configuration itself, or what is left of it after a
// pod's annotations, asks for what this build does not have.
func served(conf *netconf.Config) error {
	if conf.InboundHook == "tc" && conf.Datapath != datapathIptables {
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
