// SPDX-License-Identifier: Apache-2.0

package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/redirect"
	"shunt.dev/shunt/redirect/backends"
	"shunt.dev/shunt/redirect/iptables"
)

// place is where apply, check and remove work.
type place struct {
	input
	netns, cgroup, id, ifname string
	logLevel                  string
}

func (p *place) flags(cmd *cobra.Command) {
	p.input.flags(cmd)
	f := cmd.Flags()
	f.StringVar(&p.netns, "netns", "", "the pod's network namespace, a `PATH` such as /run/netns/NAME or /proc/PID/ns/net")
	f.StringVar(&p.cgroup, "cgroup", "", "the pod's cgroup, an absolute `PATH`; found by the pod's UID else")
	f.StringVar(&p.id, "container-id", "", "the attachment's `ID`; that of the one in the network namespace, or one made of that, else")
	f.StringVar(&p.ifname, "ifname", "", "the attachment's interface `NAME`; likewise, or eth0")
	f.StringVar(&p.logLevel, "log-level", "", "`LEVEL` of the log on standard error; the configuration's, else warn")
}

// logLevels are the configuration's, as slog has them. What would end the
// command is its error, not the log's.
var logLevels = map[string]slog.Level{
	"panic": slog.LevelError + 4, "fatal": slog.LevelError + 4,
	"error": slog.LevelError, "warn": slog.LevelWarn, "info": slog.LevelInfo, "debug": slog.LevelDebug,
}

// check checks the flags.
func (p *place) check() error {
	if _, ok := logLevels[p.logLevel]; !ok && p.logLevel != "" {
		return usagef("--log-level %q: expected panic, fatal, error, warn, info or debug", p.logLevel)
	}
	for flag, value := range map[string]string{"--container-id": p.id, "--ifname": p.ifname} {
		if value != "" && (value != filepath.Base(value) || value[0] == '.') { // it becomes a file's name
			return usagef("%s %q: expected a name without / that does not begin with a dot", flag, value)
		}
	}
	if p.cgroup != "" && !filepath.IsAbs(p.cgroup) {
		return usagef("--cgroup %q: expected an absolute path", p.cgroup)
	}
	return nil
}

// node gives the node's backends.
func (p *place) node(conf *netconf.Config, stderr io.Writer) *backends.Backends {
	level := conf.LogLevel
	if p.logLevel != "" {
		level = p.logLevel
	}
	log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: logLevels[level]}))
	return backends.New(backends.Options{BPFDir: conf.BPFDir, RunDir: conf.RunDir, Iptables: iptables.Mode(conf.IptablesBackend), Log: log})
}

// find reads what apply and check are given, and which attachment it is about.
func (p *place) find(cmd *cobra.Command) (*subject, namespace, *attached, error) {
	if err := p.check(); err != nil {
		return nil, namespace{}, nil, err
	}
	if p.netns == "" {
		return nil, namespace{}, nil, usagef("--netns is missing: give the PATH of the pod's network namespace")
	}
	s, err := p.read(cmd)
	if err != nil {
		return nil, namespace{}, nil, err
	}
	n, err := openNamespace(p.netns)
	if err != nil {
		return nil, n, nil, err
	}
	all, err := findAttached(s.conf)
	if err != nil {
		return nil, n, nil, err
	}
	a, err := choose(all, n, p.id, p.ifname)
	if err != nil {
		return nil, n, nil, err
	}
	return s, n, a, a.of(redirect.PodRef{Namespace: s.Pod.Namespace, Name: s.Pod.Name})
}

// target says what is to be programmed.
func (p *place) target(s *subject, n namespace, a *attached) (redirect.Target, error) {
	t := redirect.Target{
		Attachment: a.Attachment, Network: a.network, Netns: n.path, Running: true,
		Pod: redirect.PodRef{Namespace: s.Pod.Namespace, Name: s.Pod.Name, UID: s.Pod.UID},
	}
	mount, err := loader.FindCgroup2Mount(s.conf.CgroupRoot)
	if err != nil {
		t.NoCgroup = err
		if p.cgroup != "" {
			return t, fmt.Errorf("--cgroup %s: %w", p.cgroup, err)
		}
		return t, nil
	}
	if p.cgroup != "" {
		if t.Cgroup, err = loader.FindPodCgroup(mount, p.cgroup, ""); err != nil {
			return t, usagef("--cgroup %s: %w", p.cgroup, err)
		}
		return t, nil
	}
	// The runtime may have told the plugin what the UID does not tell us. A
	// cgroup that was made anew has another number.
	if r := a.ebpf; r != nil && r.Cgroup != "" {
		if id, err := inode(r.Cgroup); err == nil && id == r.CgroupID {
			t.Cgroup = r.Cgroup
			return t, nil
		}
	}
	t.Cgroup, t.NoCgroup = loader.FindPodCgroup(mount, "", s.Pod.NodeUID())
	return t, nil
}

func newApplyCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "apply --netns PATH --pod FILE|-",
		Short: "redirect a pod's traffic outside CNI, or anew",
		Long: `Redirects a pod as the plugin does: for virtual machines, for init containers, and to
repair. It may be repeated. What is right stays as it is, what differs is changed, and
at no moment can a connection be made around the proxy that belongs to it.

In a pod that the CNI runtime has set up, the runtime's own attachment is brought up to
date, so that it ends with the pod. Else there is a new one, which "shunt remove" ends,
and no runtime's garbage collection.

Sockets that the pod has open are reckoned with. A listener of the proxy that eBPF can't
take connections to (Multipath TCP) has the pod get iptables, unless eBPF is asked for.
Connections that iptables has redirected end when the pod goes to eBPF.

The host's own network namespace is refused. On error the pod is as it was. Exit status:
0 redirected, or rightly left alone; 1 failed; 2 bad usage or input.`,
		Example: `  # shunt apply --netns /run/netns/reviews --pod meshed.yaml
  pod shop/reviews-v1-7f99cc4496-xk2lp is redirected by ebpf (served: eBPF serves all that the pod needs), attachment netns-17@eth0`,
	}
	var p place
	p.flags(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		s, n, a, err := p.find(cmd)
		if err != nil {
			return err
		}
		if s.policy == nil {
			text := "nothing is programmed"
			if a.by() != "" {
				text = fmt.Sprintf("what %s has programmed before stays: `shunt remove --netns %s` undoes it", a.by(), n.path)
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "pod %s is left alone (%s: %s); %s\n", s.name(), s.outcome.Rule, s.outcome.Reason, text)
			return err
		}
		t, err := p.target(s, n, a)
		if err != nil {
			return err
		}
		done, err := p.node(s.conf, cmd.ErrOrStderr()).Apply(cmd.Context(), t, s.policy, s.choice)
		if err != nil {
			return fmt.Errorf("redirect pod %s: %w", s.name(), err)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "pod %s is redirected by %s (%s: %s), attachment %v\n",
			s.name(), done.Datapath, done.Reasons[0].Name, done.Reasons, a)
		return err
	})
}

func newRemoveCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "remove --netns PATH | --container-id ID",
		Short: "undo what apply, or the plugin, has done to a pod",
		Long: `Takes all redirection out of a pod: of every attachment in its network namespace, or
of the one that is named; where the network namespace is gone, by --container-id. It
succeeds when there is nothing to do. With --pod it refuses another pod's.

The pod's connections go around its proxy from then on. Exit status: 0 nothing is
programmed any more; 1 failed; 2 bad usage or input.`,
		Example: `  # shunt remove --netns /run/netns/reviews
  removed: attachment netns-17@eth0, by ebpf`,
	}
	var p place
	p.flags(cmd)
	return verb(cmd, func(cmd *cobra.Command) error {
		if err := p.check(); err != nil {
			return err
		}
		if p.netns == "" && p.id == "" {
			return usagef("--netns is missing: give the PATH of the pod's network namespace, or --container-id")
		}
		conf, err := readConf(p.confPath, netconf.ParseForRemoval)
		if err != nil {
			return err
		}
		all, err := findAttached(conf)
		if err != nil {
			return err
		}
		var n *namespace
		if p.netns != "" {
			opened, err := openNamespace(p.netns)
			if err != nil {
				return err
			}
			n = &opened
		}
		meant := slices.DeleteFunc(all, func(a *attached) bool {
			return n != nil && !a.in(*n) || p.id != "" && a.ContainerID != p.id || p.ifname != "" && a.IfName != p.ifname
		})
		if p.podPath != "" {
			f, err := readPod(p.podPath, cmd.InOrStdin())
			if err != nil {
				return err
			}
			pod := redirect.PodRef{Namespace: f.Pod.Namespace, Name: f.Pod.Name}
			for _, a := range meant {
				if err := a.of(pod); err != nil {
					return err
				}
			}
		}
		if len(meant) == 0 {
			_, err := fmt.Fprintln(cmd.OutOrStdout(), "nothing is programmed")
			return err
		}
		node := p.node(conf, cmd.ErrOrStderr())
		var errs []error
		for _, a := range meant {
			err := a.reachable(n)
			if err == nil {
				err = node.Remove(cmd.Context(), a.Attachment)
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("remove attachment %v: %w", a, err))
				continue
			}
			if _, err := fmt.Fprintf(cmd.OutOrStdout(), "removed: attachment %v, by %s\n", a, a.by()); err != nil {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	})
}

// reachable fails where a record's path no longer leads to the network
// namespace that it is of, though that is there, at n: its rules would stay.
func (a *attached) reachable(n *namespace) error {
	if n == nil || a.iptables == nil || a.iptables.Netns == n.path {
		return nil
	}
	if ino, err := inode(a.iptables.Netns); err == nil && ino == n.inode || err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return fmt.Errorf("its network namespace was at %s, and is not there any more: run `shunt apply --netns %s --pod FILE` first, which notes where it is",
		a.iptables.Netns, n.path)
}
