// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/ebpf"
	"shunt.dev/shunt/redirect/iptables"
)

// checked is what `shunt check` says. Its JSON is documented in docs/CLI.md.
type checked struct {
	AsItShouldBe bool     `json:"asItShouldBe"`
	Differences  []string `json:"differences"`
}

func newCheckCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check --netns PATH --pod FILE|-",
		Short: "is a pod redirected as it should be",
		Long: `Compares what is programmed in a pod with what was programmed there, and that with
what the pod's file and the configuration ask for. Nothing is changed.

Exit status: 0 as it should be; 6 not, and the differences are told; 1 could not tell;
2 bad usage or input.`,
		Example: `  # shunt check --netns /run/netns/reviews --pod meshed.yaml
  as it should be`,
	}
	var p place
	p.flags(cmd)
	output := formatFlag(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		s, n, a, err := p.find(cmd)
		if err != nil {
			return err
		}
		c := checked{Differences: []string{}}
		differs := func(format string, args ...any) { c.Differences = append(c.Differences, fmt.Sprintf(format, args...)) }
		switch {
		case s.policy == nil && a.by() != "":
			differs("the pod is to be left alone (%s: %s), but %s redirects it, attachment %v", s.outcome.Rule, s.outcome.Reason, a.by(), a)
		case s.policy == nil:
		case a.by() == "":
			differs("the pod is to be redirected, but nothing is programmed")
		default:
			t := redirect.Target{Attachment: a.Attachment, Netns: n.path}
			if err := p.node(s.conf, cmd.ErrOrStderr()).Check(cmd.Context(), t); err != nil {
				if couldNotTell(err) {
					return err
				}
				for line := range strings.Lines(err.Error()) {
					differs("%s", strings.TrimSpace(line))
				}
			}
			asked, err := a.differsFrom(s, n)
			if err != nil {
				return err
			}
			c.Differences = append(c.Differences, asked...)
		}
		c.AsItShouldBe = len(c.Differences) == 0
		if err := output.write(cmd.OutOrStdout(), c, c.text); err != nil || c.AsItShouldBe {
			return err
		}
		return &exitError{code: exitDiffers}
	})
}

func (c *checked) text(w io.Writer) {
	if c.AsItShouldBe {
		fmt.Fprintln(w, "as it should be")
	}
	for _, d := range c.Differences {
		fmt.Fprintf(w, "difference: %s\n", d)
	}
}

// couldNotTell reports whether an error says nothing of the pod.
func couldNotTell(err error) bool {
	for _, is := range []error{fs.ErrPermission, context.Canceled, context.DeadlineExceeded, iptables.ErrNotInstalled} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

// differsFrom compares what was programmed with what is asked for now.
func (a *attached) differsFrom(s *subject, n namespace) (list []string, err error) {
	const mend = ": `shunt apply` changes that"
	switch {
	case s.choice.Datapath == redirect.Iptables && a.ebpf != nil:
		return []string{fmt.Sprintf("the pod is to be redirected by iptables (%v), but is by ebpf%s", s.choice.Reasons, mend)}, nil
	case s.choice.Datapath == redirect.EBPF && !s.choice.Fallback && a.ebpf == nil:
		return []string{fmt.Sprintf("the pod is to be redirected by ebpf (%v), but is by iptables%s", s.choice.Reasons, mend)}, nil
	}
	if r := a.ebpf; r != nil {
		names, err := rulesDiffer(r, n.path, s.policy)
		if err != nil {
			return nil, err
		}
		if len(names) > 0 {
			list = append(list, fmt.Sprintf("ebpf has another policy than the pod asks for, in %s%s", strings.Join(names, ", "), mend))
		}
	}
	if r := a.iptables; r != nil {
		for family, text := range map[iptables.Family]string{iptables.IPv4: r.IPv4, iptables.IPv6: r.IPv6} {
			if text != "" && text != iptables.Render(s.policy, family) {
				list = append(list, fmt.Sprintf("iptables has other %v rules than the pod asks for%s", family, mend))
			}
		}
	}
	return list, nil
}

// rulesDiffer names what a record has otherwise than a policy makes it now.
func rulesDiffer(r *loader.Record, path string, p *redirect.Policy) (names []string, err error) {
	ns, err := loader.OpenNetns(path)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	// Addresses that only the runtime knew of are in the record alone.
	var addrs []netip.Addr
	for _, d := range r.Rules.Dests {
		if d.Flags&bpf.ShuntDestFlagDEST_LOCAL != 0 && d.Prefix.IsSingleIP() {
			addrs = append(addrs, d.Prefix.Addr())
		}
	}
	fields := func(rules loader.Rules) (m map[string]json.RawMessage, err error) {
		data, err := json.Marshal(rules)
		if err == nil {
			err = json.Unmarshal(data, &m)
		}
		return m, err
	}
	asked, err := ebpf.Tables(p, ebpf.Net{Addrs: addrs, Netns: ns})
	if errors.Is(err, loader.ErrInterfaces) {
		return []string{"Interface (" + err.Error() + ")"}, nil
	}
	if err != nil {
		return nil, err
	}
	asked.Flags |= r.Rules.Flags & bpf.ShuntPodFlagPOD_IN_TC // which is no part of a policy
	want, err := fields(asked)
	got, err2 := fields(r.Rules)
	if err := errors.Join(err, err2); err != nil {
		return nil, err
	}
	null := func(v json.RawMessage) bool { return string(v) == "null" || string(v) == "[]" }
	for _, key := range sortedKeys(want) {
		if !bytes.Equal(want[key], got[key]) && (!null(want[key]) || !null(got[key])) {
			names = append(names, key)
		}
	}
	return names, nil
}
