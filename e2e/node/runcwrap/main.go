// SPDX-License-Identifier: Apache-2.0

// Command runcwrap stands in front of runc where the machine that the node is
// on has less than a node's: no cpu, memory and pids controllers in its
// cgroup2, no CAP_SYS_RESOURCE. It takes the limits and the negative
// oom_score_adj out of a container's configuration, and becomes runc.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

func main() {
	err := run(os.Args[1:])
	fmt.Fprintln(os.Stderr, "runcwrap:", err)
	os.Exit(1)
}

func run(args []string) error {
	controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
	bare := err == nil && !slices.Contains(strings.Fields(string(controllers)), "memory")
	if bare && slices.Contains(args, "update") {
		os.Exit(0) // of limits that there are none of
	}
	if i := slices.Index(args, "--bundle"); i >= 0 && i+1 < len(args) && (slices.Contains(args, "create") || slices.Contains(args, "run")) {
		if err := edit(filepath.Join(args[i+1], "config.json"), bare); err != nil {
			return err
		}
	}
	runc := cmp.Or(os.Getenv("RUNCWRAP_RUNC"), "/usr/sbin/runc")
	return fmt.Errorf("execute %s: %w", runc, syscall.Exec(runc, append([]string{"runc"}, args...), os.Environ()))
}

// edit takes from the container's configuration what the machine refuses.
func edit(name string, bare bool) error {
	data, err := os.ReadFile(name)
	if err != nil {
		return err
	}
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		return fmt.Errorf("decode %s: %w", name, err)
	}
	if process, ok := config["process"].(map[string]any); ok {
		if score, ok := process["oomScoreAdj"].(float64); ok && score < 0 {
			delete(process, "oomScoreAdj")
		}
	}
	if linux, ok := config["linux"].(map[string]any); ok && bare {
		if resources, ok := linux["resources"].(map[string]any); ok {
			linux["resources"] = map[string]any{"devices": resources["devices"]}
		}
	}
	if data, err = json.Marshal(config); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o600)
}
