// SPDX-License-Identifier: Apache-2.0

package redirect

import (
	"errors"
	"fmt"
	"strings"
)

// Auto leaves a choice to Shunt, where a configuration may make it.
const Auto = "auto"

// A Datapath is a way to redirect a pod.
type Datapath string

// The datapaths, by the names that netconf and annotation have for them.
const (
	EBPF     Datapath = "ebpf"
	Iptables Datapath = "iptables"
)

// A Hook is where the eBPF datapath takes inbound connections.
type Hook string

// The hooks, by the names that netconf and annotation have for them.
const (
	HookSkLookup Hook = "sk_lookup"
	HookTC       Hook = "tc"
)

// The annotations by which a pod chooses where the configuration says Auto.
const (
	KeyDatapath    = "shunt.dev/datapath"
	KeyInboundHook = "shunt.dev/inbound-hook"
)

// A ReasonName tells reasons apart, in metrics and logs. It is stable.
type ReasonName string

// Why a pod gets its datapath: somebody has asked for it,
const (
	ReasonServed     ReasonName = "served"     // by eBPF, in all that the pod needs
	ReasonConfigured ReasonName = "configured" // by netconf
	ReasonAnnotation ReasonName = "annotation" // by the pod
)

// or the pod needs what eBPF does not serve,
const (
	ReasonExcludeInterfaces ReasonName = "exclude-interfaces"
	ReasonRerouteInterfaces ReasonName = "reroute-interfaces"
	ReasonRuntimeClass      ReasonName = "runtime-class"      // P15a
	ReasonSecondaryNetworks ReasonName = "secondary-networks" // P15b
)

// or eBPF has failed on the node: see package redirect/ebpf for what it finds.
const (
	ReasonNoCgroup2     ReasonName = "no-cgroup2"     // cgroup2 is not mounted
	ReasonNoPodCgroup   ReasonName = "no-pod-cgroup"  // the pod's own cgroup is not to be found
	ReasonNoBPFFS       ReasonName = "no-bpffs"       // no place for pins
	ReasonNoPermission  ReasonName = "no-permission"  // EPERM: capabilities, lockdown or a security module
	ReasonLoadRefused   ReasonName = "load-refused"   // the kernel has not what the programs need
	ReasonAttachRefused ReasonName = "attach-refused" // the kernel, or somebody's exclusive program, keeps ours out
	ReasonUserNamespace ReasonName = "user-namespace" // of a pod with hostUsers: false, its ids can't be told
	ReasonListener      ReasonName = "listener"       // a running proxy's listener could not be registered
	ReasonMapFull       ReasonName = "map-full"       // the node's pods have filled a map
	ReasonOtherBuild    ReasonName = "other-build"    // the pod has programs of another build
	ReasonFailed        ReasonName = "ebpf-failed"    // anything else
)

// FallbackReasons are those for which iptables redirects a pod though nobody has
// asked for it.
func FallbackReasons() []ReasonName {
	return []ReasonName{
		ReasonExcludeInterfaces, ReasonRerouteInterfaces, ReasonRuntimeClass, ReasonSecondaryNetworks,
		ReasonNoCgroup2, ReasonNoPodCgroup, ReasonNoBPFFS, ReasonNoPermission, ReasonLoadRefused, ReasonAttachRefused,
		ReasonUserNamespace, ReasonListener, ReasonMapFull, ReasonOtherBuild, ReasonFailed,
	}
}

// A Reason says why a pod gets the datapath that it gets.
type Reason struct {
	Name ReasonName
	Text string // a clause that an operator can act on
}

// Reasons are in the order in which they count: the first is the one to name
// where there is room for one only.
type Reasons []Reason

// String joins the clauses.
func (r Reasons) String() string {
	clauses := make([]string, len(r))
	for i := range r {
		clauses[i] = r[i].Text
	}
	return strings.Join(clauses, "; ")
}

// A Choice is how one pod is to be redirected, and why. Reasons is never empty.
type Choice struct {
	Datapath Datapath
	Hook     Hook // of EBPF
	// Fallback: nobody has asked for EBPF, and Iptables takes over where it fails.
	Fallback bool
	Reasons  Reasons
}

// An UnservedError says that eBPF is asked for by a pod, or for one, that needs
// what eBPF does not serve.
type UnservedError struct {
	By    string // what asks: a key and its value
	Needs Reasons
}

func (e *UnservedError) Error() string {
	return fmt.Sprintf("%s is asked for and does not serve the pod: %v", e.By, e.Needs)
}

// needs are what a policy may ask for that the eBPF datapath does not serve.
var needs = []struct {
	name ReasonName
	of   func(p *Policy) string // empty: it does not ask for it
}{
	// What interfaces the pod has is known only when it is set up: then too eBPF
	// may turn out not to serve it, for this reason.
	{ReasonExcludeInterfaces, func(p *Policy) string {
		return when(len(p.ExcludeInterfaces) > 0 && p.SecondaryNetworks,
			"interfaces are excluded, "+strings.Join(p.ExcludeInterfaces, ", ")+", and further ones come after this plugin")
	}},
	{ReasonRerouteInterfaces, func(p *Policy) string {
		return when(len(p.RerouteInterfaces) > 0, "interfaces are rerouted: "+strings.Join(p.RerouteInterfaces, ", "))
	}},
	{ReasonRuntimeClass, func(p *Policy) string {
		return when(p.RuntimeClass != "", fmt.Sprintf(
			"runtimeClassName %q is not among nativeRuntimeClasses: its containers may not be processes of this kernel", p.RuntimeClass))
	}},
	{ReasonSecondaryNetworks, func(p *Policy) string {
		return when(p.SecondaryNetworks, "further networks are attached after this plugin (annotation "+keyNetworks+")")
	}},
}

func when(is bool, clause string) string {
	if is {
		return clause
	}
	return ""
}

// unserved lists the needs of a policy that eBPF does not serve.
func unserved(p *Policy) (list Reasons) {
	for _, n := range needs {
		if clause := n.of(p); clause != "" {
			list = append(list, Reason{n.name, clause})
		}
	}
	return list
}

// Choose says how a pod is to be redirected: as datapath and hook, the netconf's
// keys, ask; where those say Auto, as the pod's annotations do; else by eBPF,
// unless the pod needs what that does not serve.
//
// It fails with an *InputError for each annotation that is not one of its
// values, and with an *UnservedError where eBPF is asked for and won't do.
func Choose(datapath, hook string, pod *Pod, policy *Policy) (Choice, error) {
	byPath, err := ask(&datapath, pod, "datapath", KeyDatapath, string(EBPF), string(Iptables))
	byHook, err2 := ask(&hook, pod, "inboundHook", KeyInboundHook, string(HookSkLookup), string(HookTC))
	if err := errors.Join(err, err2); err != nil {
		return Choice{}, err
	}
	if Datapath(datapath) == Iptables {
		return Choice{Datapath: Iptables, Reasons: Reasons{byPath}}, nil
	}
	c := Choice{Datapath: EBPF, Hook: HookSkLookup, Fallback: datapath == Auto}
	if hook != Auto {
		c.Hook = Hook(hook)
	}
	list := unserved(policy)
	switch {
	case len(list) == 0 && !c.Fallback:
		c.Reasons = Reasons{byPath}
	case len(list) == 0 && hook != Auto:
		c.Reasons = Reasons{byHook}
	case len(list) == 0:
		c.Reasons = Reasons{{ReasonServed, "eBPF serves all that the pod needs"}}
	case !c.Fallback:
		return Choice{}, &UnservedError{By: byPath.Text, Needs: list}
	default:
		return Choice{Datapath: Iptables, Reasons: list}, nil
	}
	return c, nil
}

// ask has the pod's annotation stand in for Auto, and says who has asked.
func ask(value *string, pod *Pod, key, annotation string, values ...string) (Reason, error) {
	by := Reason{ReasonConfigured, fmt.Sprintf("%s %s (netconf)", key, *value)}
	given, ok := pod.Annotations[annotation]
	switch {
	case !ok:
	case given != values[0] && given != values[1]:
		return by, &InputError{Key: annotation, Value: given, Want: strings.Join(values, " or ")}
	case *value == Auto:
		*value = given
		by = Reason{ReasonAnnotation, fmt.Sprintf("%s %s (annotation)", annotation, given)}
	}
	return by, nil
}
