// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
)

// times scales a number of operations: rounds take about 10 ms a path.
func times(n int) int {
	if testing.Short() {
		return max(n/5, 8)
	}
	return n
}

func per(d time.Duration, n int) time.Duration { return d / time.Duration(n) }

// measureConnect: connect, at the app. The handshake is the kernel's work alone,
// done in the call: the proxy accepts when all that is over.
func measureConnect(b *testing.B, l lane, family int) []value {
	n := times(400)
	client := l.client.do(b, order{Op: opConnect, Dst: l.dials[family], Spread: l.spread, N: n})
	l.server.do(b, order{Op: opReset, Port: l.port, N: n})
	return []value{nsPerOp(per(client.Took, n)), cpuPerOp(per(client.CPU, n))}
}

// measureConnectClose: socket, connect and close at the app, accept and close at
// the proxy, one connection after the other. On one processor, the wall clock
// has the work of both.
func measureConnectClose(b *testing.B, l lane, family int) []value {
	n := times(300)
	server, client := l.run(b, family, order{Op: opReset, N: n}, order{Op: opAwait, N: n})
	return []value{nsPerOp(per(client.Took, n)), cpuPerOp(per(server.CPU+client.CPU, n))}
}

// measureRTT: one byte there and one back on an established connection.
func measureRTT(b *testing.B, l lane, family int) []value {
	n := times(800)
	_, client := l.run(b, family, order{Op: opAnswer, Every: 1}, order{Op: opConverse, N: n, Writes: 1, Size: 1})
	return []value{nsPerOp(per(client.Took, n)), cpuPerOp(per(client.CPU, n))}
}

// measureBulk: as much as goes through, with an answer every 2 MiB.
func measureBulk(b *testing.B, l lane, family int) []value {
	const size, writes = 64 << 10, 32
	n := times(16)
	_, client := l.run(b, family, order{Op: opAnswer, Every: size * writes}, order{Op: opConverse, N: n, Writes: writes, Size: size})
	return []value{{float64(n*size*writes) / client.Took.Seconds(), "B/s"}}
}

// measurePackets: packets of one byte into the pod, 32 in a row, then one back.
func measurePackets(b *testing.B, l lane, family int) []value {
	const row = 32
	n := times(80)
	server, client := l.run(b, family, order{Op: opAnswer, Every: row}, order{Op: opConverse, N: n, Writes: row, Size: 1})
	if want := (n + n/8) * row; server.Packets < want {
		b.Fatalf("%s: %d packets came, not %d: they were joined", l.path, server.Packets, want)
	}
	return []value{nsPerOp(per(client.Took, n*row))}
}

// measureAsk: SO_ORIGINAL_DST, at the proxy.
func measureAsk(b *testing.B, l lane, family int) []value {
	n := times(5000)
	server, _ := l.run(b, family, order{Op: opAsk, N: n}, order{Op: opConverse, N: 1})
	return []value{nsPerOp(per(server.Took, n))}
}

func families() []int {
	if testing.Short() {
		return []int{4}
	}
	return []int{4, 6}
}

// BenchmarkData compares, round by round, the ways of an app's connection to its
// proxy, all in one pod each. A ratio is of time, to the floor's; of bulk it is
// of the throughput.
func BenchmarkData(b *testing.B) {
	n := newDataNode(b)
	lanes := n.outbound(b, nil, plain, skLookup, nft, legacy, outside, hooks, direct)
	for _, m := range []struct {
		what    string
		measure measurement
		paths   int // so many of the lanes
	}{
		{"connect", measureConnect, 7},
		{"connect-close", measureConnectClose, 7},
		{"rtt", measureRTT, 5},
		{"bulk", measureBulk, 5},
		{"original-dst", measureAsk, 5},
	} {
		for _, family := range families() {
			b.Run(fmt.Sprintf("what=%s/family=%d", m.what, family), func(b *testing.B) {
				n.rounds(b, lanes[:m.paths], family, func(p path) string {
					return fmt.Sprintf("Data/what=%s/path=%s/family=%d", m.what, p, family)
				}, m.measure)
			})
		}
	}
}

const many = 10_000

// manyCIDRs are as many that don't lie side by side, 198.51.100.0/24 (farAway4)
// in their middle.
func manyCIDRs() string {
	var list []string
	for i := range many {
		if i == many/2 {
			list = append(list, "198.51.100.0/24")
		}
		list = append(list, fmt.Sprintf("10.%d.%d.0/24", i/128, i%128*2))
	}
	return strings.Join(list, ",")
}

// manyPorts likewise, with port 80.
func manyPorts() string {
	var list []string
	for i := range many {
		if i == many/2 {
			list = append(list, "80")
		}
		list = append(list, fmt.Sprint(20_000+2*i))
	}
	return strings.Join(list, ",")
}

// BenchmarkDataPolicy is connect-close of BenchmarkData with policies of 10,000
// entries; the destination's is in the middle of them.
func BenchmarkDataPolicy(b *testing.B) {
	for _, policy := range []struct {
		name     string
		mutators []testbed.PodMutator
	}{
		{"cidrs10000", []testbed.PodMutator{testbed.Annotate("traffic.sidecar.istio.io/includeOutboundIPRanges", manyCIDRs())}},
		{"ports10000", []testbed.PodMutator{
			testbed.Annotate("traffic.sidecar.istio.io/includeOutboundIPRanges", "192.0.2.1"),
			testbed.Annotate("traffic.sidecar.istio.io/includeOutboundPorts", manyPorts()),
		}},
	} {
		b.Run("policy="+policy.name, func(b *testing.B) {
			n := newDataNode(b)
			lanes := n.outbound(b, policy.mutators, plain, skLookup, nft, legacy)
			n.rounds(b, lanes, 4, func(p path) string {
				return fmt.Sprintf("Data/what=connect-close/path=%s/family=4/policy=%s", p, policy.name)
			}, measureConnectClose)
		})
	}
}

// BenchmarkInbound compares the ways into a pod, over a veth.
func BenchmarkInbound(b *testing.B) {
	n := newDataNode(b)
	lanes := n.inbound(b, plain, skLookup, tc, nft, legacy)
	for _, m := range []struct {
		what    string
		measure measurement
	}{
		{"connect-close", measureConnectClose},
		{"rtt", measureRTT},
		{"bulk", measureBulk},
	} {
		b.Run("what="+m.what, func(b *testing.B) {
			n.rounds(b, lanes, 4, func(p path) string { return fmt.Sprintf("Inbound/what=%s/path=%s", m.what, p) }, m.measure)
		})
	}
}

// BenchmarkInboundPacket compares what each packet of an established connection
// into a pod costs, from the write in the other netns to the read in the pod:
// sk_lookup doesn't see it, TC looks for its socket, iptables tracks it.
func BenchmarkInboundPacket(b *testing.B) {
	n := newDataNode(b)
	lanes := n.inbound(b, plain, skLookup, tc, nft, legacy)
	n.rounds(b, lanes, 4, func(p path) string { return fmt.Sprintf("InboundPacket/path=%s", p) }, measurePackets)
}
