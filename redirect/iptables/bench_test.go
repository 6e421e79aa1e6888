// SPDX-License-Identifier: Apache-2.0

package iptables

import (
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
	"shunt.dev/shunt/redirect"
)

// BenchmarkPrivilegedApply applies the default policy in new namespaces.
func BenchmarkPrivilegedApply(b *testing.B) {
	testbed.Privileged(b)
	for _, m := range []Mode{NFT, Legacy} {
		b.Run(string(m), func(b *testing.B) {
			n := newNode(b, func(o *Options) { o.Mode = m })
			w := testbed.NewWorld(b)
			if err := n.Ready(b.Context()); err != nil {
				b.Fatal(err)
			}
			var apply, remove time.Duration
			before := n.children.Load()
			var programs int64
			for b.Loop() {
				b.StopTimer()
				p := testbed.NewPod(b, testbed.InWorld(w))
				policy := evaluate(b, redirect.DefaultConfig(), p)
				b.StartTimer()
				start := time.Now()
				if err := n.Apply(b.Context(), targetOf(p), policy); err != nil {
					b.Fatal(err)
				}
				apply += time.Since(start)
				b.StopTimer()
				programs += n.children.Load() - before
				start = time.Now()
				if err := n.Remove(b.Context(), targetOf(p).Attachment); err != nil {
					b.Fatal(err)
				}
				remove += time.Since(start)
				before = n.children.Load()
				b.StartTimer()
			}
			b.ReportMetric(float64(apply.Microseconds())/float64(b.N), "apply-µs")
			b.ReportMetric(float64(remove.Microseconds())/float64(b.N), "remove-µs")
			b.ReportMetric(float64(programs)/float64(b.N), "programs")
		})
	}
}
