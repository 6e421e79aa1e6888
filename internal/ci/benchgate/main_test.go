// SPDX-License-Identifier: Apache-2.0

package main

import (
	"io"
	"strings"
	"testing"
)

func TestGates(t *testing.T) {
	const output = `goos: linux
BenchmarkKernel-2      200   774.0 ebpf-µs   7.998 iptables/ebpf
BenchmarkKernel-2      200   700.0 ebpf-µs   12.00 iptables/ebpf
BenchmarkKernel-2      200   780.0 ebpf-µs   7.000 iptables/ebpf
BenchmarkAdd/one-pod   200   1.490 ADD/reference
PASS
`
	for _, c := range []struct{ gates, want string }{
		{gates: "# none\n"},
		{gates: "BenchmarkKernel iptables/ebpf min 7\nBenchmarkAdd/one-pod ADD/reference max 1.5\n"},
		{"BenchmarkKernel iptables/ebpf min 10\n", "BenchmarkKernel iptables/ebpf is 8, not >= 10"},
		{"BenchmarkAdd/one-pod ADD/reference max 1.4\n", "is 1.49, not <= 1.4"},
		{"BenchmarkKernel iptables/nothing min 10\n", "was not measured"},
		{"BenchmarkKernel iptables/ebpf over 10\n", "want BENCHMARK METRIC min|max BOUND"},
		{"BenchmarkKernel iptables/ebpf min ten\n", "invalid syntax"},
	} {
		gates, err := readGates(strings.NewReader(c.gates))
		if err == nil {
			measured, readErr := readMetrics(strings.NewReader(output))
			if readErr != nil {
				t.Fatal(readErr)
			}
			err = judge(io.Discard, gates, measured)
		}
		got := ""
		if err != nil {
			got = err.Error()
		}
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("gates %q: got %q, want %q", c.gates, got, c.want)
		}
	}
}
