// SPDX-License-Identifier: Apache-2.0

//go:build linux

package testbed

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// Descriptors and environment by which a process is told to be an actor.
const (
	actorEnv   = "SHUNT_TESTBED_ACTOR" // the actor's name
	actorCtlFD = 3                     // requests in, answers out
	actorAuxFD = 4                     // sockets passed both ways
)

// A test binary that is started as an actor never gets as far as its tests,
// whether its TestMain calls Main or not: a missing call must not make each
// actor run all tests, and so start more actors.
func init() {
	name, ok := os.LookupEnv(actorEnv)
	if !ok {
		return
	}
	if err := actorMain(name); err != nil {
		fmt.Fprintf(os.Stderr, "testbed: actor %s: %v\n", name, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// actorMain answers requests until the test closes its end. Each request has a
// goroutine, so that one that blocks in the kernel holds up no other.
func actorMain(name string) error {
	ctl := os.NewFile(actorCtlFD, "control")
	e, err := newEngine(name, actorAuxFD)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	out := json.NewEncoder(ctl)
	in := json.NewDecoder(bufio.NewReader(ctl))
	for {
		var q request
		if err := in.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		go func() {
			r := e.do(q)
			mu.Lock()
			defer mu.Unlock()
			if err := out.Encode(r); err != nil {
				fmt.Fprintf(os.Stderr, "testbed: actor %s: answer: %v\n", name, err)
				os.Exit(1)
			}
		}()
	}
}
