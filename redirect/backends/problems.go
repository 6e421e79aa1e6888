// SPDX-License-Identifier: Apache-2.0

package backends

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// A Problem is something that is wrong with an attachment.
type Problem struct {
	Name   string // stable, for machines
	Text   string // a sentence
	Remedy string // the command or the setting that mends it
}

// The names of problems.
const (
	ProblemStale           = "stale"            // the network namespace is gone
	ProblemDatapathGone    = "datapath-gone"    // the pins of what redirects the pod are gone
	ProblemOtherBuild      = "other-build"      // another build's datapath redirects the pod
	ProblemCgroupGone      = "cgroup-gone"      // the pod's cgroup is gone, or was made anew
	ProblemHookMissing     = "hook-missing"     // a program is not attached
	ProblemHookOther       = "hook-other"       // another program is attached, or one besides
	ProblemHookUnknown     = "hook-unknown"     // it could not be told
	ProblemEntries         = "entries-differ"   // the maps' entries are not as they were made
	ProblemRules           = "rules-differ"     // iptables' rules are not as they were made
	ProblemBoth            = "both-datapaths"   // both backends have a record
	ProblemListener        = "listener-refused" // the proxy listens, and can't get connections
	ProblemNoListener      = "no-listener"      // connections were refused because nobody listens
	ProblemHandshakes      = "handshakes"       // there is little room for more
	ProblemOutsideOfCgroup = "outside-cgroup"   // processes go around the proxy
)

// near is the share of a limit, in quarters, from which on it is told.
const near = 3

// apply mends what was programmed.
func apply(netns string) string {
	return fmt.Sprintf("run `shunt apply --netns %s --pod FILE`, or delete the pod to have it made anew", netns)
}

func problemStale(a redirect.Attachment, netns string) Problem {
	return Problem{
		ProblemStale, fmt.Sprintf("its network namespace %s is gone; what is left of the attachment waits for the runtime's DEL or GC", netns),
		fmt.Sprintf("run `shunt remove --container-id %s`, if neither comes", a.ContainerID),
	}
}

// remedyOfBuild is for a pod with another build's programs.
func remedyOfBuild(movable bool) string {
	if movable {
		return "it goes on to work; the node agent, or `shunt upgrade`, has this build's programs take over without a gap"
	}
	return "it goes on to work until it ends; delete the pod to have it made anew by this build"
}

func problemBoth(s *Status) Problem {
	return Problem{ProblemBoth, "both eBPF and iptables have a record of it: a change from one to the other did not come to its end", apply(s.Netns)}
}

// problemsOfIptables says what is wrong with an attachment of iptables'.
func problemsOfIptables(r *iptables.Status) []Problem {
	switch {
	case r.Gone:
		return []Problem{problemStale(r.Attachment, r.Netns)}
	case r.Changing || len(r.Wrong) == 0:
		return nil
	}
	return []Problem{{ProblemRules, "its rules are not what they should be: " + strings.Join(r.Wrong, "; "), apply(r.Netns)}}
}

// problemsOfEBPF says what is wrong with an attachment of eBPF's on a node.
func problemsOfEBPF(s *loader.Status, node *loader.Survey) (list []Problem) {
	switch {
	case s.Changing:
		return nil
	case s.NetnsGone:
		return []Problem{problemStale(redirect.Attachment(s.ID), s.Netns)}
	case !s.Loaded:
		return []Problem{{
			ProblemDatapathGone, fmt.Sprintf("the datapath that it was attached to (%s, as it was then) is not in bpfDir any more: the pod may go around its proxy", s.Build),
			apply(s.Netns),
		}}
	}
	if s.OtherBuild {
		list = append(list, Problem{
			ProblemOtherBuild, fmt.Sprintf("it is redirected by the programs of another build of shunt (%s; this one's are in datapath-%s)", s.Build, bpf.Digest[:16]),
			remedyOfBuild(s.Movable),
		})
	}
	list = append(list, problemsOfHooks(s)...)
	if len(s.Missing) > 0 {
		list = append(list, Problem{ProblemEntries, "its entries in the maps are not what they should be: " + strings.Join(s.Missing, "; "), apply(s.Netns)})
	}
	list = append(list, problemsOfListeners(s)...)
	// Of the node's map those are told who have a part in it.
	switch all := node.HandshakesMax; {
	case 4*s.Handshakes >= near*s.HandshakeLimit:
		list = append(list, Problem{
			ProblemHandshakes, fmt.Sprintf("%d handshakes with its proxy are under way; with %d the next connect is denied", s.Handshakes, s.HandshakeLimit),
			"the proxy does not accept what is sent to it: " + logs(s),
		})
	case s.Handshakes > 0 && all > 0 && 4*node.Handshakes >= near*all:
		list = append(list, Problem{
			ProblemHandshakes, fmt.Sprintf("%d handshakes of this node's pods with their proxies are under way, %d of them this pod's; with %d the next connect is denied", node.Handshakes, s.Handshakes, all),
			"the proxies do not accept what is sent to them: begin with that of the pod that has most",
		})
	}
	if len(s.Outside) > 0 {
		list = append(list, Problem{
			ProblemOutsideOfCgroup, fmt.Sprintf("%s in its network namespace but not in its cgroup %s: what they connect to goes around the proxy", processes(s.Outside), s.Cgroup),
			"where cgroup v1 is mounted beside v2, have `datapath: iptables`, or the pod's annotation shunt.dev/datapath: iptables; a process that somebody has put there by hand (nsenter, ip netns) needs nothing",
		})
	}
	return list
}

// maxProcesses is how many are named.
const maxProcesses = 4

func processes(list []loader.Process) string {
	var names []string
	for i, p := range list {
		if i == maxProcesses {
			names = append(names, fmt.Sprintf("%d more", len(list)-i))
			break
		}
		names = append(names, fmt.Sprintf("process %d (%s)", p.PID, p.Name))
	}
	if len(list) == 1 {
		return names[0] + " is"
	}
	return strings.Join(names, ", ") + " are"
}

func problemsOfHooks(s *loader.Status) (list []Problem) {
	texts := map[loader.HookState][]string{}
	for _, h := range s.Hooks {
		texts[h.State] = append(texts[h.State], h.Text)
	}
	if missing := texts[loader.HookMissing]; s.CgroupGone {
		list = append(list, Problem{ProblemCgroupGone, fmt.Sprintf("its cgroup %s is gone, or was made anew, and the hooks with it: what the pod connects to goes around the proxy", s.Cgroup), apply(s.Netns)})
	} else if len(missing) > 0 {
		list = append(list, Problem{ProblemHookMissing, strings.Join(missing, "; "), apply(s.Netns)})
	}
	if other := slices.Concat(texts[loader.HookOther], texts[loader.HookExtra]); len(other) > 0 {
		list = append(list, Problem{ProblemHookOther, strings.Join(other, "; "), apply(s.Netns)})
	}
	if unknown := texts[loader.HookUnknown]; len(unknown) > 0 {
		list = append(list, Problem{ProblemHookUnknown, strings.Join(unknown, "; "), "run `shunt status` as root on the node itself"})
	}
	return list
}

// logs says where to read what the proxy has to say.
func logs(s *loader.Status) string {
	if s.Pod.Name == "" {
		return "look at its log"
	}
	return fmt.Sprintf("see `kubectl logs -n %s %s -c istio-proxy` (or what proxy.containerName says)", s.Pod.Namespace, s.Pod.Name)
}

func problemsOfListeners(s *loader.Status) []Problem {
	tc := s.InboundHook == loader.TC
	var reached, refused, elsewhere []loader.Listener
	for _, l := range s.Listeners {
		switch {
		case !l.Reached:
			elsewhere = append(elsewhere, l)
		case l.Registered == 0 && !tc:
			refused = append(refused, l)
		default:
			reached = append(reached, l)
		}
	}
	failed, errno := s.Counted(bpf.ShuntPlacePLACE_LISTENER_REGISTER)
	if !s.Asked && failed > 0 && !tc && len(reached) == 0 {
		// Nobody could be asked; it is what was counted.
		return []Problem{listenerRefused(s, fmt.Sprintf("port %d", s.Rules.InboundPort), errors.Is(errno, unix.EOPNOTSUPP), errno)}
	}
	var list []Problem
	for _, l := range refused {
		list = append(list, listenerRefused(s, l.Addr.String(), l.MPTCP, errno))
	}
	none, _ := s.Counted(bpf.ShuntPlacePLACE_LISTENER_NONE)
	if len(reached)+len(refused) > 0 || none == 0 || tc && !s.Asked {
		return list
	}
	text := fmt.Sprintf("nobody listens on the proxy's inbound port %d: %d connections were refused", s.Rules.InboundPort, none)
	if len(elsewhere) > 0 {
		text = fmt.Sprintf("the proxy listens at %v, which inbound connections don't reach: %d were refused", elsewhere[0].Addr, none)
	}
	return append(list, Problem{ProblemNoListener, text, "have the proxy listen at the wildcard or the pod's address; " + logs(s)})
}

// listenerRefused is about a listener at a place.
func listenerRefused(s *loader.Status, at string, mptcp bool, errno unix.Errno) Problem {
	if mptcp {
		return Problem{
			ProblemListener, fmt.Sprintf("the proxy listens at %s by Multipath TCP, which sk_lookup can't serve: inbound connections are refused", at),
			fmt.Sprintf("give the pod the annotation %s: tc, and run `shunt apply --netns %s --pod FILE` or make the pod anew", redirect.KeyInboundHook, s.Netns),
		}
	}
	why := "it was open before the pod was attached, or its registration failed"
	if errno != 0 {
		why = fmt.Sprintf("its registration failed (%v)", errno)
	}
	return Problem{
		ProblemListener, fmt.Sprintf("the proxy's listener at %s is not registered, %s: it gets no inbound connections", at, why),
		apply(s.Netns) + fmt.Sprintf("; if that does not help, give it the annotation %s: tc", redirect.KeyInboundHook),
	}
}
