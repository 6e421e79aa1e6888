// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/validate"
	"shunt.dev/shunt/redirect"
)

// exitMissing is what validate ends with where traffic is not redirected: the
// repair controller looks for it.
const exitMissing = 126

// validated is what `shunt validate` says. Its JSON is documented in docs/CLI.md.
type validated struct {
	Checked []checkedConn `json:"checked"`
	Not     []notChecked  `json:"notChecked"`
}

type checkedConn struct {
	Family      string `json:"family"`
	Side        string `json:"side"`
	Destination string `json:"destination"`
	Listener    string `json:"listener"`
	Redirected  bool   `json:"redirected"`
	Error       string `json:"error,omitempty"`
}

type notChecked struct {
	Family string `json:"family"`
	Side   string `json:"side"`
	Reason string `json:"reason"`
}

// validation is what the flags say.
type validation struct {
	uid, gid    uint32
	out, in     uint16
	family      int
	to          []string
	annotations string
	timeout     time.Duration
}

func newValidateCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "validate",
		Short: "is this pod redirected: the check of an init container",
		Long: `Finds out from inside a pod whether its traffic is redirected, before its proxy and
its app start. It needs no privilege, and makes real connections of each family that the
pod has, in the proxy's place:

  as the proxy's uid       to the pod's own address: has to arrive at the inbound port
  as any other uid and gid to an address that is nobody's: has to arrive at the outbound port

Each has to arrive with its original destination. What could not be checked, and why, is
said. Where a connection is not redirected, its one packet ends at the node: its hop limit
is 1.

The values of --uid, --gid, --outbound-port and --inbound-port may be given as PROXY_UID,
PROXY_GID, ENVOY_PORT and INBOUND_CAPTURE_PORT in the environment, too. --annotations
FILE is the pod's, as the downward API writes metadata.annotations: only with it a policy
that lets some destinations alone is known.

Exit status: 0 redirected; 126 not, and one line says what was missing; 1 could not tell;
2 bad usage or input, or a user as whom nothing can be checked.`,
		Example: `  $ shunt validate
  checked      IPv4 outbound   192.0.2.1:15002 arrives at 127.0.0.1:15001
  ...`,
	}
	proxy := redirect.DefaultConfig().Proxy
	v := validation{}
	f := cmd.Flags()
	f.Uint32Var(&v.uid, "uid", proxy.UID, "the proxy's `UID`")
	f.Uint32Var(&v.gid, "gid", proxy.GID, "the proxy's `GID`")
	f.Uint16Var(&v.out, "outbound-port", proxy.OutboundPort, "the proxy's outbound `PORT`")
	f.Uint16Var(&v.in, "inbound-port", proxy.InboundPort, "the proxy's inbound `PORT`")
	f.IntVar(&v.family, "family", 0, "only this `FAMILY`, 4 or 6; every one that the pod has else")
	f.StringSliceVar(&v.to, "to", nil, "`IP:PORT,…` that outbound connections are made to in place of nobody's addresses")
	f.StringVar(&v.annotations, "annotations", "", "the pod's annotations, a `FILE` of the downward API")
	f.DurationVar(&v.timeout, "timeout", 5*time.Second, "how long to try")
	output := formatFlag(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		if err := fromEnvironment(cmd); err != nil {
			return err
		}
		checks, gaps, err := v.plan()
		if err != nil {
			var alone *validate.LeftAloneError
			if errors.As(err, &alone) {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "nothing to check: %v\n", alone)
			}
			return err
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), v.timeout)
		defer cancel()
		missing, err := validate.Run(ctx, checks)
		if err != nil {
			return err
		}
		r := report(checks, gaps, missing)
		if err := output.write(cmd.OutOrStdout(), r, r.text); err != nil {
			return err
		}
		if len(missing) > 0 {
			return &exitError{exitMissing, fmt.Errorf(
				"traffic is not redirected: %s: nothing is programmed in this pod, or not all of it", validate.Text(missing))}
		}
		return nil
	})
}

// plan reads what is asked for, and says what can be checked.
func (v *validation) plan() (checks []validate.Check, gaps []validate.Gap, err error) {
	switch {
	case v.family != 0 && v.family != 4 && v.family != 6:
		return nil, nil, usagef("--family %d: expected 4 or 6", v.family)
	case v.out == 0:
		return nil, nil, usagef("--outbound-port 0: expected a port, 1 to 65535")
	case v.in == 0:
		return nil, nil, usagef("--inbound-port 0: expected a port, 1 to 65535")
	case v.timeout <= 0:
		return nil, nil, usagef("--timeout %v: expected more than 0", v.timeout)
	}
	var to []netip.AddrPort
	for _, s := range v.to {
		d, err := netip.ParseAddrPort(s)
		if err != nil || d.Port() == 0 {
			return nil, nil, usagef("--to %q: expected IP:PORT, such as 192.0.2.1:80 or [2001:db8::1]:80", s)
		}
		to = append(to, netip.AddrPortFrom(d.Addr().Unmap(), d.Port()))
	}
	var annotations map[string]string
	if v.annotations != "" {
		data, err := os.ReadFile(v.annotations)
		if err == nil {
			annotations, err = validate.ParseAnnotations(data)
		}
		if err != nil {
			return nil, nil, usagef("read the pod's annotations from %s: %w", v.annotations, err)
		}
	}
	policy, err := validate.Policy(redirect.Proxy{UID: v.uid, GID: v.gid, OutboundPort: v.out, InboundPort: v.in}, annotations)
	var alone *validate.LeftAloneError
	if err != nil && !errors.As(err, &alone) {
		return nil, nil, usagef("--annotations %s: %w", v.annotations, err)
	}
	if err != nil {
		return nil, nil, err
	}
	addrs, err := validate.Addrs()
	if err != nil {
		return nil, nil, err
	}
	uid, gid := uint32(os.Geteuid()), uint32(os.Getegid())
	checks, gaps = validate.Plan(policy, v.only(addrs), uid, gid, to)
	switch {
	case len(checks)+len(gaps) == 0:
		return nil, nil, errors.New("the pod has no address that could be redirected: expected one on an interface other than lo")
	case len(checks) == 0 && !anyone(gaps):
		return nil, nil, usagef("nothing can be checked as uid %d and gid %d: run it as the proxy's uid, %d, or with another uid and gid than the proxy's",
			uid, gid, v.uid)
	}
	return checks, gaps, nil
}

// only leaves the addresses of the family that is asked for.
func (v *validation) only(addrs []netip.Addr) (list []netip.Addr) {
	for _, a := range addrs {
		if v.family == 0 || a.Is4() == (v.family == 4) {
			list = append(list, a)
		}
	}
	return list
}

// anyone reports whether there is a side that needs no check, whoever asks.
func anyone(gaps []validate.Gap) bool {
	for _, g := range gaps {
		if !g.Other {
			return true
		}
	}
	return false
}

// fromEnvironment fills in what no flag says.
func fromEnvironment(cmd *cobra.Command) error {
	for _, x := range []struct{ flag, variable string }{
		{"uid", "PROXY_UID"}, {"gid", "PROXY_GID"}, {"outbound-port", "ENVOY_PORT"}, {"inbound-port", "INBOUND_CAPTURE_PORT"},
	} {
		value := environment(x.variable)
		if value == "" || cmd.Flags().Changed(x.flag) {
			continue
		}
		if err := cmd.Flags().Set(x.flag, value); err != nil {
			what := "a port, 1 to 65535"
			if x.flag == "uid" || x.flag == "gid" {
				what = "a number, 0 to " + strconv.FormatUint(1<<32-1, 10)
			}
			return usagef("environment %s=%q: expected %s", x.variable, value, what)
		}
	}
	return nil
}

// report joins plan and outcome.
func report(checks []validate.Check, gaps []validate.Gap, missing []validate.Missing) *validated {
	r := &validated{Checked: []checkedConn{}, Not: []notChecked{}}
	for _, c := range checks {
		line := checkedConn{
			Family: validate.Family(c.To.Addr()), Side: string(c.Side),
			Destination: c.To.String(), Listener: c.At.String(), Redirected: true,
		}
		for _, m := range missing {
			if m.Check == c {
				line.Redirected, line.Error = false, m.Err.Error()
			}
		}
		r.Checked = append(r.Checked, line)
	}
	for _, g := range gaps {
		r.Not = append(r.Not, notChecked{g.Family, string(g.Side), g.Reason})
	}
	return r
}

func (v *validated) text(w io.Writer) {
	columns(w, func(w io.Writer) {
		for _, c := range v.Checked {
			if c.Redirected {
				fmt.Fprintf(w, "checked\t%s %s\t%s arrives at %s\n", c.Family, c.Side, c.Destination, c.Listener)
			} else {
				fmt.Fprintf(w, "missing\t%s %s\t%s does not arrive at %s: %s\n", c.Family, c.Side, c.Destination, c.Listener, c.Error)
			}
		}
		for _, n := range v.Not {
			fmt.Fprintf(w, "not checked\t%s %s\t%s\n", n.Family, n.Side, n.Reason)
		}
	})
}
