// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/internal/probe"
	"shunt.dev/shunt/internal/probe/kernel"
	"shunt.dev/shunt/internal/selftest"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect/iptables"
)

// What probe exits with, beside what every verb does.
const (
	exitIptablesOnly = 3
	exitNeither      = 4
	exitUntold       = 5
)

// selfTestChild is the command by which a self-test starts its processes.
const selfTestChild = "self-test-child"

// A prober is the verb probe.
type prober struct {
	confPath string
	selfTest bool
}

// child are the arguments of selfTestChild.
var child = []string{"probe", selfTestChild}

func newProbeCmd() *cobra.Command {
	p := new(prober)
	cmd := &cobra.Command{
		Use:   "probe",
		Short: "say what this kernel and host can do, and which datapath pods would get",
		Long: `Say what this kernel and host have of what Shunt needs, a row each: yes, no or
unknown, since which kernel, what for, and why. It is found out by doing: the
real programs are loaded, the real rules are put into a scratch network
namespace. Nothing is attached outside of what is made for it, and nothing is
left. Without root it works too; what it can't tell then is unknown.

With --self-test, real connections are redirected in scratch namespaces, on each
path that the rows say is possible.

docs/PROBE.md says of every row what it means and what to do when it says no.

Exit status: 0 a default pod would get eBPF; 3 iptables; 4 neither works; 5 it
could not be told; 1 the self-test failed; 2 bad usage or input.`,
		Example: `  $ shunt probe
  $ shunt probe --self-test -o json
  $ shunt probe --netconf /etc/cni/net.d/10-cluster.conflist`,
	}
	cmd.Flags().StringVar(&p.confPath, "netconf", "", "the plugin's configuration or the conflist that has it, a `FILE`; defaults without one")
	cmd.Flags().BoolVar(&p.selfTest, "self-test", false, "redirect real connections in scratch namespaces, too")
	out := formatFlag(cmd)
	verb(cmd, func(cmd *cobra.Command) error { return p.run(cmd, out) })
	cmd.AddCommand(&cobra.Command{
		Use: selfTestChild, Hidden: true, DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			return failed(selftest.Child(args, cmd.InOrStdin(), cmd.OutOrStdout()))
		},
	})
	return cmd
}

func (p *prober) run(cmd *cobra.Command, out *format) error {
	conf, err := readConf(p.confPath, netconf.Parse)
	if err != nil {
		return err
	}
	ctx := cmd.Context()
	report := collect(ctx, conf)
	if ctx.Err() != nil {
		return fmt.Errorf("probe: %w", context.Cause(ctx)) // what was found is not worth much
	}
	if p.selfTest {
		test(ctx, report, conf)
	}
	if err := out.write(cmd.OutOrStdout(), report, func(w io.Writer) { report.WriteTable(w, p.selfTest) }); err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return status(report)
}

// collect makes the report, without a self-test.
func collect(ctx context.Context, conf *netconf.Config) *probe.Report {
	rows := kernel.Probe(ctx, kernel.Options{
		BPFDir: conf.BPFDir, CgroupRoot: conf.CgroupRoot,
		ListenMPTCP: selftest.ListenMPTCP(child),
	})
	rows = append(rows, iptables.Probe(ctx, iptables.Options{})...)
	return probe.NewReport(loader.Release(), rows, probe.Wish{
		Datapath: conf.Datapath, InboundHook: conf.InboundHook, IptablesBackend: conf.IptablesBackend,
	})
}

// test adds the self-test of every path that can be taken here.
func test(ctx context.Context, report *probe.Report, conf *netconf.Config) {
	var paths []string
	for _, path := range probe.Paths {
		if answer, _ := report.Serves(path); answer == probe.Yes {
			paths = append(paths, path)
		}
	}
	checks := selftest.Run(ctx, selftest.Options{
		Paths: paths, IPv6: report.Row("ipv6").Answer == probe.Yes,
		CgroupRoot: conf.CgroupRoot, Child: child,
	})
	report.SelfTest = append(report.SelfTest, checks...)
}

// status turns what was found into what shunt exits with.
func status(r *probe.Report) error {
	bad := 0
	for _, c := range r.SelfTest {
		if !c.OK {
			bad++
		}
	}
	if bad > 0 {
		return &exitError{exitFailed, fmt.Errorf("the self-test failed: %d of %d checks", bad, len(r.SelfTest))}
	}
	switch r.Datapath {
	case probe.EBPF:
		return nil
	case probe.Iptables:
		return &exitError{exitIptablesOnly, nil}
	case probe.None:
		return &exitError{exitNeither, nil}
	}
	return &exitError{exitUntold, nil}
}
