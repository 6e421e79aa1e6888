// SPDX-License-Identifier: Apache-2.0

// Command null is the floor for the plugin as a process: a static binary that
// does what the protocol demands of a chained plugin, and no more. It reads the
// network configuration and prints prevResult.
package main

import (
	"encoding/json"
	"log"
	"os"
)

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	var conf struct {
		PrevResult json.RawMessage `json:"prevResult"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
		return err
	}
	_, err := os.Stdout.Write(conf.PrevResult)
	return err
}
