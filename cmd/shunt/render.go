// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/iptables"
)

// rendered is what `shunt render` says. Its JSON is documented in docs/CLI.md.
type rendered struct {
	IPv4    string `json:"ipv4,omitempty"` // left out: not asked for, or skipped
	IPv6    string `json:"ipv6,omitempty"`
	Skipped string `json:"skipped,omitempty"` // why there are none
}

func newRenderCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "render --pod FILE|-",
		Short: "the iptables rules that a pod gets, where it is redirected by iptables",
		Long: `The input of iptables-restore --noflush (ip6tables-restore for IPv6) that is applied
in the pod's network namespace where the pod is redirected by iptables: because it
needs that, or because the node can't do eBPF. Give --family to feed it to the program.

A pod that is left alone has no rules: a comment says why, and the exit status is 0.`,
		Example: `  $ shunt render --pod meshed.yaml --family 4
  # IPv4 of pod shop/reviews-v1-7f99cc4496-xk2lp, for iptables-restore --noflush
  *nat
  -N SHUNT_OUT
  -N SHUNT_IN
  # [out-exclude-port]
  -A SHUNT_OUT -p tcp -m tcp --dport 3306 -j RETURN
  ...
  -A OUTPUT -p tcp -j SHUNT_OUT
  -A PREROUTING ! -i lo -p tcp -j SHUNT_IN
  COMMIT`,
	}
	var in input
	var backend string
	var family int
	in.flags(cmd)
	cmd.Flags().StringVar(&backend, "backend", "iptables", "whose input: `iptables`")
	cmd.Flags().IntVar(&family, "family", 0, "of one IP version alone: `4|6`")
	output := formatFlag(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		if backend != string(redirect.Iptables) {
			return usagef("--backend %q: expected iptables: eBPF's tables have no text of their own", backend)
		}
		families := []iptables.Family{iptables.Family(family)}
		switch {
		case !cmd.Flags().Changed("family"):
			families = []iptables.Family{iptables.IPv4, iptables.IPv6}
		case family != 4 && family != 6:
			return usagef("--family %d: expected 4 or 6", family)
		}
		s, err := in.read(cmd)
		if err != nil {
			return err
		}
		var r rendered
		if s.policy == nil {
			r.Skipped = s.outcome.Rule + ": " + s.outcome.Reason
			return output.write(cmd.OutOrStdout(), r, func(w io.Writer) {
				fmt.Fprintf(w, "# pod %s is left alone, by %s\n", s.name(), r.Skipped)
			})
		}
		for _, f := range families {
			if f == iptables.IPv6 {
				r.IPv6 = iptables.Render(s.policy, f)
			} else {
				r.IPv4 = iptables.Render(s.policy, f)
			}
		}
		return output.write(cmd.OutOrStdout(), r, func(w io.Writer) { r.text(w, s) })
	})
}

func (r *rendered) text(w io.Writer, s *subject) {
	tproxy := s.policy.Mode == redirect.ModeTProxy
	if r.IPv4 != "" {
		fmt.Fprintf(w, "# IPv4 of pod %s, for iptables-restore --noflush\n", s.name())
		if tproxy {
			beside(w, "-4", "net.ipv4.tcp_fwmark_accept=1 net.ipv4.fwmark_reflect=1")
		}
		fmt.Fprint(w, r.IPv4)
	}
	if r.IPv6 != "" {
		fmt.Fprintf(w, "# IPv6 of pod %s, for ip6tables-restore --noflush\n", s.name())
		fmt.Fprint(w, "# beside it: ip -6 addr add ::6/128 dev lo\n")
		if tproxy {
			beside(w, "-6", "net.ipv6.fwmark_reflect=1")
		}
		fmt.Fprint(w, r.IPv6)
	}
}

// beside tells what TPROXY needs that is none of iptables' own.
func beside(w io.Writer, family, sysctls string) {
	fmt.Fprintf(w, "# beside it: sysctl -w %s\n", sysctls)
	fmt.Fprintf(w, "# beside it: ip %s route add local default dev lo table %d\n", family, iptables.Table)
	fmt.Fprintf(w, "# beside it: ip %s rule add fwmark %#x lookup %d\n", family, iptables.Mark, iptables.Table)
}
