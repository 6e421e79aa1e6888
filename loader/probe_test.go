// SPDX-License-Identifier: Apache-2.0

//go:build linux

package loader

import (
	"os"
	"testing"
	"time"

	"shunt.dev/shunt/internal/probe"
)

func TestPrivilegedProbeTmp(t *testing.T) {
	for range 2 {
	start := time.Now()
	rows := Probe(t.Context(), ProbeOptions{BPFDir: "/sys/fs/bpf/shunt"})
	t.Log(time.Since(start))
	probe.NewReport(Release(), rows, probe.Wish{}).WriteTable(os.Stderr, false)
	}
}
