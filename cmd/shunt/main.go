// SPDX-License-Identifier: Apache-2.0

// Command shunt is the operator's tool: it says what Shunt does with a pod, and
// why, and does the plugin's work where no CNI runtime does.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"shunt.dev/shunt/internal/handover"
)

// buildVersion is set by the linker.
var buildVersion = "dev"

// What shunt exits with, beside 0.
const (
	exitFailed  = 1
	exitUsage   = 2 // bad usage or input
	exitDiffers = 6 // check: not as it should be; status: something is wrong
)

// An exitError ends the command with a status of its own.
type exitError struct {
	code int
	err  error // nil: everything has been said
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usage marks an error as the caller's.
func usage(err error) error { return &exitError{exitUsage, err} }

func usagef(format string, args ...any) error { return usage(fmt.Errorf(format, args...)) }

// failed marks an error as none of the caller's, unless somebody has marked it.
func failed(err error) error {
	var known *exitError
	if err == nil || errors.As(err, &known) {
		return err
	}
	return &exitError{exitFailed, err}
}

// environment reads a variable.
var environment = os.Getenv

func main() {
	if isPlugin(os.Args) {
		servePlugin(handover.Reason(os.Args[2]))
		return
	}
	// The first signal lets a verb undo what it is at; the second ends it.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	debug.SetGCPercent(400) // it reads little and ends soon
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main with its surroundings given.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) (exit int) {
	root := newRoot()
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	// What no verb has marked is cobra's own: arguments that it can't take.
	exit = exitUsage
	var known *exitError
	if errors.As(err, &known) {
		exit = known.code
		if known.err == nil {
			return exit
		}
	}
	fmt.Fprintf(stderr, "shunt: %s\n", strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; "))
	return exit
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "shunt",
		Short: "say what Shunt does with a pod, and do it",
		Long: `Shunt turns a pod's TCP traffic to its sidecar proxy. The plugin shunt-cni does so
for every pod of a node. This command says what it does with a pod and why, and
does the same work where no CNI runtime asks for it.

Exit status: 0 it is so, or done; 1 failed; 2 bad usage or input; others are the
verb's own.`,
		Example: `  $ shunt explain --pod meshed.yaml --to 10.1.2.3:443
  pod         shop/reviews-v1-7f99cc4496-xk2lp
  redirected  yes
  ...
  verdict  OUT by out-include-cidr
  ...`,
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.AddCommand(
		newProbeCmd(), newExplainCmd(), newRenderCmd(), newStatusCmd(), newTraceCmd(),
		newApplyCmd(), newCheckCmd(), newRemoveCmd(), newUpgradeCmd(),
		newValidateCmd(),
		newVersionCmd(),
	)
	return root
}

// verb makes a command of a function that takes no arguments but flags.
func verb(cmd *cobra.Command, do func(cmd *cobra.Command) error) *cobra.Command {
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return failed(do(cmd)) }
	return cmd
}
