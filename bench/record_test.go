// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// samplesFile names the file that samples are appended to, in the Go benchmark
// format (https://go.dev/design/14313-benchmark-format), for bench/report and
// benchstat. Without it they are only kept for the benchmark's own metrics.
const samplesFile = "SHUNT_BENCH_SAMPLES"

// A value is one measured quantity. Units are benchfmt's: ns/op for times of
// one operation, cpu-ns/op for CPU time, B for sizes, conns/s, B/s, and so on.
type value struct {
	v    float64
	unit string
}

func nsPerOp(d time.Duration) value  { return value{float64(d.Nanoseconds()), "ns/op"} }
func cpuPerOp(d time.Duration) value { return value{float64(d.Nanoseconds()), "cpu-ns/op"} }

// record writes one sample: a line of its own for every round, so that rounds
// that were measured turn by turn stay comparable, and medians, intervals and
// distributions can be had later. The name is the benchmark's without
// "Benchmark", then /key=value pairs, always in the same order:
//
//	record(b, "Setup/op=add/path=ebpf-sk_lookup/family=dual/policy=small", nsPerOp(d))
func record(tb testing.TB, name string, values ...value) {
	tb.Helper()
	path := os.Getenv(samplesFile)
	if path == "" {
		return
	}
	var line strings.Builder
	fmt.Fprintf(&line, "Benchmark%s 1", name)
	for _, v := range values {
		fmt.Fprintf(&line, " %g %s", v.v, v.unit)
	}
	line.WriteByte('\n')
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		tb.Fatalf("record a sample: %v", err)
	}
	defer f.Close()
	if _, err := f.WriteString(line.String()); err != nil {
		tb.Fatalf("record a sample: %v", err)
	}
}
