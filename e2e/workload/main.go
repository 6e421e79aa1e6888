// SPDX-License-Identifier: Apache-2.0

// Command workload is all that runs in the pods of the end-to-end tests: an
// app, the proxy beside it, the pause container.
//
//	workload app [-listen ADDR,…] [-control ADDR] [-early URL]
//	workload proxy sidecar [-transparent]
//	workload dial URL WANT       exit 0 if who answers is WANT
//	workload pause | true
//
// The proxy answers outbound connections, and questions to nameservers, itself
// instead of passing them on: so who answers tells what was redirected.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	verb := "pause"
	if len(os.Args) > 1 {
		verb = os.Args[1]
	}
	var err error
	switch verb {
	case "app":
		err = app(ctx, os.Args[2:])
	case "proxy":
		err = proxy(ctx, os.Args[2:])
	case "dial":
		err = dialOnce(ctx, os.Args[2:])
	case "pause":
		pause(ctx)
	case "true":
	default:
		err = fmt.Errorf("verb %q: expected app, proxy, dial, pause or true", verb)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		stop()
		os.Exit(1)
	}
}

// pause reaps what the other containers leave to it where they share its pid
// namespace.
func pause(ctx context.Context) {
	children := make(chan os.Signal, 8)
	signal.Notify(children, syscall.SIGCHLD)
	for {
		select {
		case <-ctx.Done():
			return
		case <-children:
			for {
				if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
					break
				}
			}
		}
	}
}

// dialOnce is a check for init containers and probes.
func dialOnce(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("dial: %d arguments: expected URL and WANT", len(args))
	}
	d := dial(ctx, args[0], 10*time.Second)
	if err := json.NewEncoder(os.Stdout).Encode(d); err != nil {
		return err
	}
	if d.Answer.Who != args[1] {
		return fmt.Errorf("dial %s: answered by %q (%s): expected %q", args[0], d.Answer.Who, d.Error, args[1])
	}
	return nil
}
