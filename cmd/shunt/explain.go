// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/redirect"
)

// explanation is what `shunt explain` says. Its JSON is documented in
// docs/CLI.md.
type explanation struct {
	Pod        podRef    `json:"pod"`
	Redirected bool      `json:"redirected"`
	Rule       string    `json:"rule"` // of section 1
	Reason     string    `json:"reason"`
	Datapath   *datapath `json:"datapath,omitempty"`
	Policy     []setting `json:"policy,omitempty"`
	Notes      []string  `json:"notes,omitempty"`
	Flow       *flow     `json:"flow,omitempty"`
}

type podRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid,omitempty"`
}

type datapath struct {
	Name     redirect.Datapath `json:"name"`
	Hook     redirect.Hook     `json:"hook,omitempty"`
	Fallback bool              `json:"fallback"` // iptables takes over where eBPF fails
	Reasons  []reason          `json:"reasons"`
}

type reason struct {
	Name redirect.ReasonName `json:"name"`
	Text string              `json:"text"`
}

// newDatapath is a choice in the words of JSON.
func newDatapath(c redirect.Choice) *datapath {
	d := &datapath{Name: c.Datapath, Hook: c.Hook, Fallback: c.Fallback}
	for _, r := range c.Reasons {
		d.Reasons = append(d.Reasons, reason(r))
	}
	return d
}

func newExplainCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "explain --pod FILE|- [--to IP:PORT | --inbound PORT]",
		Short: "is a pod redirected, by what policy, and where does a connection go",
		Long: `Whether a pod is redirected and which rule decided that, its policy and where each
part of it comes from, which datapath it gets and why. With --to or --inbound, where
one connection goes, and by which rule. Nothing is asked of the node or the cluster.

Rules are those of docs/SEMANTICS.md; the JSON of -o json is in docs/CLI.md.`,
		Example: `  $ shunt explain --pod meshed.yaml --to 10.1.2.3:443 --uid 1000
  pod         shop/reviews-v1-7f99cc4496-xk2lp
  redirected  yes
  rule        P16: injected, with proxy container "istio-proxy"
  datapath    ebpf (sk_lookup)
  ...
  verdict  OUT by out-include-cidr
  because  its destination is in includeOutboundIPRanges
  so       it goes to the proxy's outbound listener, 127.0.0.1:15001; the proxy gets 10.1.2.3:443 as its original destination
  ...

  $ shunt explain --pod meshed.yaml --inbound 9080
  ...
  flow     inbound tcp to 10.244.1.17:9080, by eth0
  verdict  IN by in-include
  ...

  $ kubectl get pod reviews-v1-7f99cc4496-xk2lp -o yaml | shunt explain --pod -`,
	}
	var in input
	var ask question
	in.flags(cmd)
	ask.flags(cmd)
	output := formatFlag(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		if err := ask.parse(cmd.Flags()); err != nil {
			return err
		}
		s, err := in.read(cmd)
		if err != nil {
			return err
		}
		e := explanation{
			Pod:        podRef{s.Pod.Namespace, s.Pod.Name, s.Pod.UID},
			Redirected: !s.outcome.Skip, Rule: s.outcome.Rule, Reason: s.outcome.Reason,
			Notes: s.assumed,
		}
		if e.Redirected {
			e.Datapath = newDatapath(s.choice)
			e.Policy = settings(s)
		}
		e.Notes = append(e.Notes, notes(s)...)
		if e.Flow, err = ask.answer(s); err != nil {
			return err
		}
		return output.write(cmd.OutOrStdout(), e, e.text)
	})
}

func (e *explanation) text(w io.Writer) {
	columns(w, func(w io.Writer) {
		fmt.Fprintf(w, "pod\t%s/%s\n", e.Pod.Namespace, e.Pod.Name)
		yes := "no"
		if e.Redirected {
			yes = "yes"
		}
		fmt.Fprintf(w, "redirected\t%s\nrule\t%s: %s\n", yes, e.Rule, e.Reason)
		if d := e.Datapath; d != nil {
			name := string(d.Name)
			if d.Hook != "" {
				name += " (" + string(d.Hook) + ")"
			}
			fmt.Fprintf(w, "datapath\t%s\n", name)
			for _, r := range d.Reasons {
				fmt.Fprintf(w, "  because\t%s: %s\n", r.Name, r.Text)
			}
			if d.Fallback {
				fmt.Fprint(w, "  or\tiptables takes over where the node can't: run `shunt probe` on the node\n")
			}
		}
		for _, n := range e.Notes {
			fmt.Fprintf(w, "note\t%s\n", n)
		}
	})
	if len(e.Policy) > 0 {
		fmt.Fprintln(w)
		columns(w, func(w io.Writer) {
			fmt.Fprint(w, "POLICY\tVALUE\tFROM\n")
			for _, s := range e.Policy {
				value := s.Value
				if value == "" {
					value = "-"
				}
				fmt.Fprintf(w, "%s\t%s\t%s\n", s.Key, value, s.From)
			}
		})
	}
	if e.Flow != nil {
		fmt.Fprintln(w)
		columns(w, e.Flow.text)
	}
}

// notes are what the policy does not show by itself.
func notes(s *subject) (list []string) {
	p, pod := s.policy, s.Pod
	if p == nil {
		return nil
	}
	note := func(is bool, format string, args ...any) {
		if is {
			list = append(list, fmt.Sprintf(format, args...))
		}
	}
	has := func(key string) bool { _, ok := pod.Annotations[key]; return ok }
	const nowhere = "INVALID_DROP has no effect by eBPF, where no packet has a conntrack state to be invalid"
	note(p.InvalidDrop && s.choice.Datapath == redirect.EBPF && !s.choice.Fallback, nowhere)
	note(p.InvalidDrop && s.choice.Datapath == redirect.EBPF && s.choice.Fallback, nowhere+"; it takes effect if iptables takes over")
	const alone = "eBPF serves excludeInterfaces where they are there when the pod is set up, and it has one interface besides lo; otherwise "
	note(len(p.ExcludeInterfaces) > 0 && s.choice.Datapath == redirect.EBPF && s.choice.Fallback, alone+"iptables takes over (%s)", redirect.ReasonExcludeInterfaces)
	note(len(p.ExcludeInterfaces) > 0 && s.choice.Datapath == redirect.EBPF && !s.choice.Fallback, alone+"ADD fails")
	note(has(keyExcludeInboundPorts) && !p.IncludeInboundPorts.All,
		"%s is not used: it counts only where all inbound ports are included", keyExcludeInboundPorts)
	note(has(keyKubevirtInterfaces) && has(keyRerouteInterfaces), "%s is not used: %s goes before it", keyKubevirtInterfaces, keyRerouteInterfaces)
	note(p.IncludesLoopback(), "a part of loopback is included: the app's own connections within the pod are captured too (no rule out-local)")
	if path := pod.Annotations[redirect.KeyDatapath]; path != "" && s.conf.Datapath != redirect.Auto && path != s.conf.Datapath {
		note(true, "annotation %s is not used: the configuration says datapath %s", redirect.KeyDatapath, s.conf.Datapath)
	}
	if hook := pod.Annotations[redirect.KeyInboundHook]; hook != "" && s.conf.InboundHook != redirect.Auto && hook != s.conf.InboundHook {
		note(true, "annotation %s is not used: the configuration says inboundHook %s", redirect.KeyInboundHook, s.conf.InboundHook)
	}
	for _, key := range sortedKeys(pod.Annotations) {
		note((strings.HasPrefix(key, "traffic.sidecar.istio.io/") || strings.HasPrefix(key, "shunt.dev/")) && !known[key],
			"annotation %s is not used: no such key is known", key)
	}
	return list
}
