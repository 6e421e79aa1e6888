// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"shunt.dev/shunt/bpf"
)

// A program is one of the datapath's, with what it has done so far.
type program struct {
	*ebpf.Program
	ns   float64
	runs float64
}

// read gives what the program has done since it was read last.
func (p *program) read(b *testing.B) (ns, runs float64) {
	b.Helper()
	s, err := p.Stats()
	if err != nil {
		b.Fatalf("read statistics: %v", err)
	}
	ns, runs = float64(s.Runtime.Nanoseconds())-p.ns, float64(s.RunCount)-p.runs
	p.ns, p.runs = p.ns+ns, p.runs+runs
	return ns, runs
}

// BenchmarkProgram has the kernel count what the programs themselves cost: the
// time of a run, and how many runs a connection takes (of getsockopt, a
// question), from connect to close, at both ends. In a run's time are the kernel's
// two looks at the clock, some tens of ns; what it does to get to a program isn't.
func BenchmarkProgram(b *testing.B) {
	n := newDataNode(b)
	out := n.outbound(b, nil, skLookup)[0]
	in := n.inbound(b, skLookup, tc)
	n.attach(b, true)
	stats, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatalf("have the kernel count: %v", err)
	}
	b.Cleanup(func() { stats.Close() })

	// measure has a lane run something, and looks at some programs meanwhile.
	perConn := map[string][]float64{}
	measure := func(l lane, family, connections int, server, client order, names ...string) func() {
		programs := map[string]*program{}
		for _, name := range names {
			pins, err := filepath.Glob(filepath.Join(n.opts.BPFDir, "datapath-*", name))
			if err != nil || len(pins) != 1 {
				b.Fatalf("pins of %s: %v, %v", name, pins, err)
			}
			p, err := ebpf.LoadPinnedProgram(pins[0], nil)
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { p.Close() })
			programs[name] = &program{Program: p}
		}
		l.check(b, family)
		return func() {
			for _, p := range programs {
				p.read(b)
			}
			l.run(b, family, server, client)
			for name, p := range programs {
				ns, runs := p.read(b)
				if runs == 0 {
					b.Fatalf("%s hasn't run", name)
				}
				conns := float64(connections)
				record(b, "Program/prog="+name, value{ns / runs, "ns/op"}, value{runs / conns, "runs/conn"}, value{ns / conns, "ns/conn"})
				perConn[name] = append(perConn[name], ns/conns)
			}
		}
	}
	conns, questions := times(300)/8*8, times(3000)
	reset, await := order{Op: opReset, N: conns}, order{Op: opAwait, N: conns}
	turns := []func(){
		measure(out, 4, conns+conns/8, reset, await, bpf.ShuntProgShuntConnect4, bpf.ShuntProgShuntSockops),
		measure(out, 6, conns+conns/8, reset, await, bpf.ShuntProgShuntConnect6),
		measure(out, 4, questions, order{Op: opAsk, N: questions}, order{Op: opConverse, N: 1}, bpf.ShuntProgShuntGetsockopt),
		measure(in[0], 4, conns+conns/8, reset, await, bpf.ShuntProgShuntSkLookup),
		measure(in[1], 4, conns+conns/8, reset, await, bpf.ShuntProgShuntTc),
	}
	for b.Loop() {
		for _, turn := range turns {
			turn()
		}
	}
	b.ReportMetric(0, "ns/op")
	for name, all := range perConn {
		b.ReportMetric(middle(all), name+"-ns/conn")
	}
}
