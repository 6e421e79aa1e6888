// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/found"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
)

// nodeStatus is what `shunt status` says. Its JSON is documented in docs/CLI.md.
type nodeStatus struct {
	AllWell bool        `json:"allWell"`
	Pods    []podStatus `json:"pods"`
}

type podStatus struct {
	Pod struct {
		Namespace string `json:"namespace"`
		Name      string `json:"name"`
		UID       string `json:"uid"`
	} `json:"pod"`
	Attachment struct {
		ContainerID string `json:"containerID"`
		IfName      string `json:"ifName"`
	} `json:"attachment"`
	Network   string           `json:"network"`
	Datapath  string           `json:"datapath"`
	Hook      string           `json:"hook,omitempty"`
	Netns     string           `json:"netns"`
	Hooks     []hookStatus     `json:"hooks"`
	Listeners []listenerStatus `json:"listeners"`
	Counted   bool             `json:"counted"`
	Flows     []flowCount      `json:"flows"`
	Errors    []errorCount     `json:"errors"`
	Problems  []problem        `json:"problems"`
}

type hookStatus struct {
	Name  string           `json:"name"`
	State loader.HookState `json:"state"`
	Text  string           `json:"text,omitempty"`
}

type listenerStatus struct {
	Address    string   `json:"address"`
	OnlyIPv6   bool     `json:"onlyIPv6"`
	MPTCP      bool     `json:"mptcp"`
	Sockets    int      `json:"sockets"`
	Registered int      `json:"registered"`
	Serves     []string `json:"serves"`
}

type flowCount struct {
	Direction string `json:"direction"`
	Rule      string `json:"rule"`
	Count     uint64 `json:"count"`
}

type errorCount struct {
	Program string `json:"program"`
	Error   string `json:"error"`
	Count   uint64 `json:"count"`
	Text    string `json:"text"`
}

type problem struct {
	Name   string `json:"name"`
	Text   string `json:"text"`
	Remedy string `json:"remedy"`
}

func newStatusCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status [--pod NS/NAME]",
		Short: "which pods are redirected here, and what is wrong",
		Long: `Lists the pods of this node that Shunt redirects, and what is wrong with them, in words,
with what mends it. With --pod, all of one pod: the hooks that are attached, the proxy's
listeners that are registered, the connections decided so far by each rule of the
semantics, and what has failed in the kernel.

It is asked of the kernel, not remembered, and nothing is changed. Pods that are not to be
redirected are not listed: "shunt explain" says why. Those that are to be, and are not, the
repair controller finds, and tells this command. It needs root.

What is counted ends with the pod, or with "shunt remove". iptables counts since its
rules were last changed.

Exit status: 0 all is well; 6 something is wrong, and is told; 1 it failed, or a pod that
--pod names is not redirected here; 2 bad usage or input.`,
		Example: `  # shunt status
  POD                               DATAPATH          HOOKS  LISTENERS  CONNECTIONS  PROBLEMS
  shop/reviews-v1-7f99cc4496-xk2lp  ebpf (sk_lookup)  8/8    1/1        3            none
  nothing is wrong`,
	}
	var confPath, pod string
	cmd.Flags().StringVar(&pod, "pod", "", "one pod, its `NS/NAME`")
	cmd.Flags().StringVar(&confPath, "netconf", "", "the plugin's configuration or the conflist that has it, a `FILE`; defaults without one")
	output := formatFlag(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		which := func(redirect.PodRef) bool { return true }
		if cmd.Flags().Changed("pod") {
			one, err := parsePodName(pod)
			if err != nil {
				return err
			}
			which = func(p redirect.PodRef) bool { return p.Namespace == one.Namespace && p.Name == one.Name }
		}
		conf, err := readConf(confPath, netconf.Parse)
		if err != nil {
			return err
		}
		p := place{logLevel: "error"}
		list, err := p.node(conf, cmd.ErrOrStderr()).Inspect(cmd.Context(), which)
		lost, err2 := found.Read(conf.RunDir)
		list, err = append(list, unredirected(lost, list, which)...), errors.Join(err, err2)
		if err == nil && pod != "" && len(list) == 0 {
			return fmt.Errorf("pod %s is not redirected here: it runs on another node, or it is left alone (`shunt explain --pod FILE` says why)", pod)
		}
		s := newNodeStatus(list)
		text := s.overview
		if pod != "" {
			text = s.details
		}
		// What could be told is told in any case.
		if err2 := output.write(cmd.OutOrStdout(), s, text); err2 != nil {
			return err2
		}
		if err != nil {
			return fmt.Errorf("it could not all be told: %w", err)
		}
		if !s.AllWell {
			return &exitError{code: exitDiffers}
		}
		return nil
	})
}

// unredirected are the pods that the repair controller has found to have nothing
// programmed, and that have nothing now.
func unredirected(lost []redirect.PodRef, list []backends.Status, which func(redirect.PodRef) bool) (out []backends.Status) {
	for _, pod := range found.Missing(lost, list) {
		if !which(pod) {
			continue
		}
		out = append(out, backends.Status{Pod: pod, Datapath: "none", Problems: []backends.Problem{{
			Name: found.Problem, Text: "the pod is to be redirected, and nothing is programmed for it: it runs around its proxy",
			Remedy: "the repair controller mends it, see its log (container repair of the agent's pod); or delete the pod, and its successor is set up by the plugin",
		}}})
	}
	return out
}

func newNodeStatus(list []backends.Status) *nodeStatus {
	s := &nodeStatus{AllWell: true, Pods: []podStatus{}}
	for _, x := range list {
		p := podStatus{
			Network: x.Network, Datapath: string(x.Datapath), Hook: string(x.Hook), Netns: x.Netns,
			Hooks: []hookStatus{}, Listeners: []listenerStatus{}, Counted: x.Counted,
			Flows: []flowCount{}, Errors: []errorCount{}, Problems: []problem{},
		}
		p.Pod.Namespace, p.Pod.Name, p.Pod.UID = x.Pod.Namespace, x.Pod.Name, x.Pod.UID
		p.Attachment.ContainerID, p.Attachment.IfName = x.ContainerID, x.IfName
		for _, h := range x.Hooks {
			p.Hooks = append(p.Hooks, hookStatus(h))
		}
		for _, l := range x.Listeners {
			if l.Serves == nil {
				l.Serves = []string{}
			}
			p.Listeners = append(p.Listeners, listenerStatus(l))
		}
		for _, f := range x.Flows {
			p.Flows = append(p.Flows, flowCount(f))
		}
		for _, e := range x.Errors {
			p.Errors = append(p.Errors, errorCount(e))
		}
		for _, pr := range x.Problems {
			p.Problems = append(p.Problems, problem(pr))
		}
		s.AllWell = s.AllWell && len(p.Problems) == 0
		s.Pods = append(s.Pods, p)
	}
	return s
}

// name is the pod's, or what is known of it.
func (p *podStatus) name() string {
	if p.Pod.Name == "" {
		return "attachment " + p.attachment()
	}
	return p.Pod.Namespace + "/" + p.Pod.Name
}

func (p *podStatus) attachment() string { return p.Attachment.ContainerID + "@" + p.Attachment.IfName }

func (p *podStatus) datapath() string {
	if p.Hook == "" {
		return p.Datapath
	}
	return fmt.Sprintf("%s (%s)", p.Datapath, p.Hook)
}

func (s *nodeStatus) overview(w io.Writer) {
	if len(s.Pods) == 0 {
		fmt.Fprintln(w, "no pod is redirected here")
		return
	}
	columns(w, func(w io.Writer) {
		fmt.Fprintln(w, "POD\tDATAPATH\tHOOKS\tLISTENERS\tCONNECTIONS\tPROBLEMS")
		for i := range s.Pods {
			p := &s.Pods[i]
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", p.name(), p.datapath(), p.hooks(), p.listeners(), p.connections(), p.problemNames())
		}
	})
	wrong := 0
	for i := range s.Pods {
		p := &s.Pods[i]
		p.tellProblems(w, "\n"+p.name()+"\n")
		if len(p.Problems) > 0 {
			wrong++
		}
	}
	if wrong == 0 {
		fmt.Fprintln(w, "nothing is wrong")
		return
	}
	fmt.Fprintf(w, "\nsomething is wrong with %d of %d\n", wrong, len(s.Pods))
}

// hooks says how many are attached, of those that should be.
func (p *podStatus) hooks() string {
	attached, all := 0, 0
	for _, h := range p.Hooks {
		switch h.State {
		case loader.HookExtra:
			continue
		case loader.HookAttached:
			attached++
		}
		all++
	}
	return fmt.Sprintf("%d/%d", attached, all)
}

// listeners says how many sockets are registered, of those that listen.
func (p *podStatus) listeners() string {
	if p.Datapath != string(redirect.EBPF) {
		return "-"
	}
	registered, all := 0, 0
	for _, l := range p.Listeners {
		registered, all = registered+l.Registered, all+l.Sockets
	}
	return fmt.Sprintf("%d/%d", registered, all)
}

func (p *podStatus) connections() string {
	if !p.Counted {
		return "-"
	}
	var n uint64
	for _, f := range p.Flows {
		n += f.Count
	}
	return fmt.Sprint(n)
}

func (p *podStatus) problemNames() string {
	if len(p.Problems) == 0 {
		return "none"
	}
	return joined(p.Problems, func(x problem) string { return x.Name })
}

func (p *podStatus) tellProblems(w io.Writer, before string) {
	if len(p.Problems) > 0 {
		fmt.Fprint(w, before)
	}
	for _, x := range p.Problems {
		fmt.Fprintf(w, "problem  %s: %s\nremedy   %s\n", x.Name, x.Text, x.Remedy)
	}
}

func (s *nodeStatus) details(w io.Writer) {
	for i := range s.Pods {
		if i > 0 {
			fmt.Fprintln(w)
		}
		s.Pods[i].details(w)
	}
}

func (p *podStatus) details(w io.Writer) {
	columns(w, func(w io.Writer) {
		fmt.Fprintf(w, "pod\t%s\nattachment\t%s, of network %q\ndatapath\t%s\nnetns\t%s\n", p.name(), p.attachment(), p.Network, p.datapath(), p.Netns)
	})
	section := func(head string, n int, row func(w io.Writer, i int)) {
		if n == 0 {
			return
		}
		fmt.Fprintln(w)
		columns(w, func(w io.Writer) {
			fmt.Fprintln(w, head)
			for i := range n {
				row(w, i)
			}
		})
	}
	section("HOOK\tSTATE", len(p.Hooks), func(w io.Writer, i int) { fmt.Fprintf(w, "%s\t%s\n", p.Hooks[i].Name, p.Hooks[i].State) })
	section("LISTENER\tSOCKETS\tREGISTERED\tGETS", len(p.Listeners), func(w io.Writer, i int) {
		l := p.Listeners[i]
		at := l.Address
		if l.OnlyIPv6 {
			at += " (IPv6 only)"
		}
		if l.MPTCP {
			at += " (Multipath TCP)"
		}
		gets := strings.Join(l.Serves, ",")
		if gets == "" {
			gets = "-"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%s\n", at, l.Sockets, l.Registered, gets)
	})
	section("RULE\tCONNECTIONS", len(p.Flows), func(w io.Writer, i int) { fmt.Fprintf(w, "%s\t%d\n", p.Flows[i].Rule, p.Flows[i].Count) })
	section("FAILURE\tTIMES\tWHAT", len(p.Errors), func(w io.Writer, i int) {
		e := p.Errors[i]
		fmt.Fprintf(w, "%s: %s\t%d\t%s\n", e.Program, e.Error, e.Count, e.Text)
	})
	fmt.Fprintln(w)
	p.tellProblems(w, "")
	if len(p.Problems) == 0 {
		fmt.Fprintln(w, "nothing is wrong")
	}
}
