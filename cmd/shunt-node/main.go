// SPDX-License-Identifier: Apache-2.0

// Command shunt-node is what the DaemonSet's containers run: the node agent, and
// the repair controller beside it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"

	"shunt.dev/shunt/bpf"
	"shunt.dev/shunt/repair"
)

// buildVersion is set by the linker.
var buildVersion = "dev"

// What shunt-node exits with, beside 0.
const (
	exitFailed = 1
	exitUsage  = 2
)

const usage = `usage: shunt-node COMMAND [flags]

  agent      keep the plugin on this node, and serve it
  repair     find pods that started before the plugin, and mend them
  uninstall  take the plugin from this node; pods that run keep their redirection
  version    which build this is

shunt-node COMMAND -h lists a command's flags.
`

func main() {
	os.Exit(run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
}

// run is main with its surroundings given.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	command := ""
	if len(args) > 0 {
		command, args = args[0], args[1:]
	}
	switch command {
	case "version":
		fmt.Fprintf(stdout, "shunt-node %s, BPF digest %s, %s %s/%s\n", buildVersion, bpf.Digest, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return 0
	case "help", "-h", "-help", "--help":
		fmt.Fprint(stdout, usage)
		return 0
	case "agent", "repair", "uninstall":
	default:
		fmt.Fprint(stderr, usage)
		return exitUsage
	}
	ctx, stop := untilSignal(stderr)
	defer stop()
	switch command {
	case "repair":
		return repair.Run(ctx, args, stderr)
	case "uninstall":
		return runUninstall(ctx, args, getenv, stderr)
	}
	return runAgent(ctx, args, getenv, stderr)
}

// untilSignal returns a context that the first SIGTERM or SIGINT ends. The
// second ends the process: as the first of its namespace it would not see the
// kernel's default.
func untilSignal(stderr io.Writer) (context.Context, func()) {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt)
	go func() {
		<-signals
		cancel()
		s := <-signals
		fmt.Fprintf(stderr, "shunt-node: %v again: ended at once\n", s)
		os.Exit(exitFailed)
	}()
	return ctx, func() { signal.Stop(signals) }
}

// parse reads a command's flags. done says that there is nothing more to do,
// and how to exit.
func parse(flags *flag.FlagSet, args []string, stderr io.Writer) (exit int, done bool) {
	flags.SetOutput(stderr)
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0, true
	case err != nil:
		return exitUsage, true // flag has said it
	case flags.NArg() > 0:
		fmt.Fprintf(stderr, "shunt-node %s: unexpected argument %q\n", flags.Name(), flags.Arg(0))
		return exitUsage, true
	}
	return 0, false
}

// newLog returns the log of a command, at one of the levels of logLevel's.
func newLog(w io.Writer, level string) (*slog.Logger, error) {
	levels := map[string]slog.Level{
		"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError,
		"fatal": slog.LevelError + 4, "panic": slog.LevelError + 4,
	}
	l, ok := levels[level]
	if !ok {
		return nil, fmt.Errorf("--log-level: %q is not debug, info, warn, error, fatal or panic", level)
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: l})), nil
}

// fail says why a command ends.
func fail(stderr io.Writer, command string, code int, err error) int {
	fmt.Fprintf(stderr, "shunt-node %s: %s\n", command, strings.ReplaceAll(err.Error(), "\n", "; "))
	return code
}
