// SPDX-License-Identifier: Apache-2.0

package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"shunt.dev/shunt/internal/handover"
	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/podfacts"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables/record"
)

// MainSmall serves one request as far as that takes nothing which makes a process slow
// to start, and hands it over else. It ends the process where both fail.
func MainSmall(build string) {
	to := handover.To{Self: "/proc/self/exe", Environ: os.Environ()}
	serve(handing(small().funcs(), to.Exec), build)
}

// small returns the small plugin: of the agent and of eBPF alone.
func small() *plugin {
	p := newPlugin(Options{})
	p.facts = func(conf *netconf.Config, _ *slog.Logger) FactsSource {
		return agentOnce{podfacts.NewAgent(conf.RunDir), conf.PodFactsTimeout}
	}
	p.backends = func(conf *netconf.Config, log *slog.Logger) Programmer {
		return podSide{conf.RunDir, ebpf.New(loader.Options{BPFDir: conf.BPFDir, RunDir: conf.RunDir, Log: log})}
	}
	return p
}

// needed returns what an error says of a request that is to be handed over; nil where
// it is not.
func needed(err error) *handover.NeededError {
	var n *handover.NeededError
	errors.As(err, &n)
	return n
}

// handing has requests handed over, by exec, that ask for it. GC and STATUS do in any
// case.
func handing(f skel.CNIFuncs, exec func(stdin []byte, why handover.Reason) error) skel.CNIFuncs {
	hand := func(code uint, fn func(*skel.CmdArgs) error) func(*skel.CmdArgs) error {
		return func(args *skel.CmdArgs) error {
			err := fn(args)
			n := needed(err)
			if n == nil {
				return err
			}
			failed := exec(args.StdinData, n.Reason)
			if n.Err != nil {
				failed = fmt.Errorf("%w; it is needed because of: %w", failed, n.Err)
			}
			return fail(code, "%s", failed.Error())
		}
	}
	at := func(why handover.Reason) func(*skel.CmdArgs) error {
		return func(*skel.CmdArgs) error { return &handover.NeededError{Reason: why} }
	}
	return skel.CNIFuncs{
		Add: hand(CodeProgram, f.Add), Del: hand(CodeProgram, f.Del), Check: hand(CodeProgram, f.Check),
		GC: hand(CodeProgram, at(handover.GC)), Status: hand(types.ErrPluginNotAvailable, at(handover.Status)),
	}
}

// agentOnce is the node agent, asked once.
type agentOnce struct {
	podfacts.Source
	timeout time.Duration // the netconf's podFactsTimeout
}

func (a agentOnce) Pod(ctx context.Context, namespace, name, uid string) (*redirect.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	pod, err := podfacts.Ask(ctx, a.Source, namespace, name, uid)
	switch {
	case errors.Is(err, podfacts.ErrHung):
		return nil, &handover.NeededError{Reason: handover.HungAgent, Err: fmt.Errorf("%v: %w", a.Source, err)}
	case err != nil:
		return nil, &handover.NeededError{Reason: handover.Facts, Err: fmt.Errorf("%v: %w", a.Source, err)}
	}
	return pod, nil
}

// A podSide redirects by eBPF where the programs are loaded.
type podSide struct {
	runDir string
	ebpf   *ebpf.Backend
}

var errByIptables = errors.New("iptables redirects the pod, or has done so")

// byIptables fails where iptables may have done something for an attachment.
func (p podSide) byIptables(a redirect.Attachment) error {
	if !record.Any(p.runDir, a) {
		return nil
	}
	return &handover.NeededError{Reason: handover.Iptables, Err: errByIptables}
}

// Apply is Programmer's. Where eBPF fails the one that takes over is the larger
// executable's, or the reason why none does.
func (p podSide) Apply(ctx context.Context, t redirect.Target, policy *redirect.Policy, c redirect.Choice) (redirect.Choice, error) {
	if c.Datapath != redirect.EBPF {
		return c, &handover.NeededError{Reason: handover.Iptables, Err: errors.New(c.Reasons.String())}
	}
	if err := p.byIptables(t.Attachment); err != nil {
		return c, err
	}
	t.Hook = c.Hook
	err := p.ebpf.Apply(ctx, t, policy)
	switch {
	case err == nil:
		return c, nil
	case errors.Is(err, loader.ErrNotUndone): // nothing is handed over in the middle
		return c, fmt.Errorf("datapath ebpf: %w", err)
	case errors.Is(err, loader.ErrNoPrograms):
		return c, &handover.NeededError{Reason: handover.Datapath, Err: err}
	}
	return c, &handover.NeededError{Reason: handover.EBPF, Err: err}
}

// Check is Programmer's. What is not as it should be may be mended, or be iptables'.
func (p podSide) Check(ctx context.Context, t redirect.Target) error {
	if err := p.ebpf.Check(ctx, t); err != nil {
		return &handover.NeededError{Reason: handover.Check, Err: err}
	}
	return nil
}

// Remove is Programmer's.
func (p podSide) Remove(ctx context.Context, a redirect.Attachment) error {
	if err := p.byIptables(a); err != nil {
		return err
	}
	return p.ebpf.Remove(ctx, a)
}
