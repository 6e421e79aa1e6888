// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/netconf"
	"shunt.dev/shunt/loader"
	"shunt.dev/shunt/loader/programs"
)

func newUpgradeCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "upgrade",
		Short: "have this build's programs redirect the node's pods",
		Long: `Has the eBPF programs of this build take the place of another build's, later or
earlier, in every pod of the node: what the node agent does when it has been replaced.
No connection fails for it or is made around a proxy, those that are there live on, and
what the proxy is told of their original destination stays right. It may be ended at
any point, and repeated.

A pod keeps its programs where the two builds' maps are laid out differently, where it
was set up with what this build has not, or where its network namespace is needed and is
not to be found: it goes on to work. Pods of iptables are not touched.

Exit status: 0 no pod has another build's programs; 1 failed; 2 bad usage or input; 6
pods keep another build's programs.`,
		Example: `  # shunt upgrade
  1 pod has this build's programs now`,
	}
	var confPath, logLevel string
	f := cmd.Flags()
	f.StringVar(&confPath, "netconf", "", "the plugin's configuration or the conflist that has it, a `FILE`; defaults without one")
	f.StringVar(&logLevel, "log-level", "warn", "`LEVEL` of the log on standard error")
	return verb(cmd, func(cmd *cobra.Command) error {
		level, ok := logLevels[logLevel]
		if !ok {
			return usagef("--log-level %q: expected panic, fatal, error, warn, info or debug", logLevel)
		}
		conf, err := readConf(confPath, netconf.ParseForRemoval)
		if err != nil {
			return err
		}
		done, err := loader.Upgrade(cmd.Context(), loader.Options{
			BPFDir: conf.BPFDir, RunDir: conf.RunDir, Programs: programs.New(),
			Log: slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level})),
		})
		if err := printUpgraded(cmd.OutOrStdout(), done); err != nil {
			return err
		}
		if err != nil {
			return err
		}
		if len(done.Kept) > 0 {
			return &exitError{code: exitDiffers}
		}
		return nil
	})
}

// printUpgraded says what became of the node's pods.
func printUpgraded(w io.Writer, done *loader.Upgraded) error {
	text := fmt.Sprintf("%d pods have this build's programs now\n", len(done.Moved))
	switch len(done.Moved) {
	case 0:
		text = "no pod has got other programs\n"
	case 1:
		text = "1 pod has this build's programs now\n"
	}
	for _, k := range done.Kept {
		text += fmt.Sprintf("keeps %s: pod %s/%s, attachment %v: %v\n", k.Build, k.Pod.Namespace, k.Pod.Name, k.ID, k.Why)
	}
	_, err := io.WriteString(w, text)
	return err
}
