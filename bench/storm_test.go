// SPDX-License-Identifier: Apache-2.0

//go:build linux

package bench

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"time"

	"shunt.dev/shunt/internal/testbed"
)

// asTraffic makes the test binary an app that connects to the address in it, a
// thousand times a second at most, for as long as it lives. A connection that
// fails ends it: the address is one at which nobody listens, so the proxy has
// to take it.
const asTraffic = "SHUNT_BENCH_AS_TRAFFIC"

func runTraffic() error {
	pace := time.NewTicker(time.Millisecond)
	for range pace.C {
		c, err := net.Dial("tcp", os.Getenv(asTraffic))
		if err != nil {
			return err
		}
		// A reset: no port is kept for a minute.
		if err := errors.Join(c.(*net.TCPConn).SetLinger(0), c.Close()); err != nil {
			return err
		}
	}
	return nil
}

// traffic is an app's in another pod, through its proxy, while f runs.
func traffic(b *testing.B, p *testbed.Pod, f func()) {
	b.Helper()
	app := p.Start(b, testbed.ProcessSpec{
		Argv: []string{"/proc/self/exe"}, UID: testbed.AppUID, GID: testbed.AppGID,
		Env: []string{asTraffic + "=" + net.JoinHostPort(testbed.WorldAddr4.String(), "80")},
	})
	defer app.Kill(b)
	f()
	if !app.Running() {
		b.Errorf("the other pod's traffic has ended: %s", app.Output())
	}
}

// A storm is of pods that start, some of them at once.
type storm struct {
	pods, concurrency int
	load              string // yes: with another pod's traffic
}

func (s storm) name(kind, path string) string {
	n := fmt.Sprintf("%s/path=%s/pods=%d/concurrency=%d", kind, path, s.pods, s.concurrency)
	if s.load != "" {
		n += "/load=" + s.load
	}
	return n
}

// run does a thing to each pod, and returns how long that took in all. do is told
// since when it was to be done: since one before it was ready.
func (s storm) run(pods []*testbed.Pod, do func(i int, p *testbed.Pod, since time.Time)) time.Duration {
	todo := make(chan int, s.pods)
	for i := range s.pods {
		todo <- i
	}
	close(todo)
	runtime.GC()
	var wg sync.WaitGroup
	start := time.Now()
	for range s.concurrency {
		wg.Go(func() {
			since := start
			for i := range todo {
				do(i, pods[i], since)
				since = time.Now()
			}
		})
	}
	wg.Wait()
	return time.Since(start)
}

// removeAll undoes a way in all pods, in this process: many at once, because what
// it does to nftables and TC waits most of the time.
func (n *node) removeAll(b *testing.B, w way, pods []*testbed.Pod) {
	b.Helper()
	errs := make([]error, len(pods))
	storm{pods: len(pods), concurrency: 32}.run(pods, func(i int, p *testbed.Pod, _ time.Time) {
		errs[i] = n.backend(w).Remove(context.Background(), target(w, p).Attachment)
	})
	if err := errors.Join(errs...); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkStorm has many pods start at a time: ADD as a process with the agent's
// facts, from exec to exit, and the null plugin. The paths take turns, storm by
// storm, in another order each round. A round comes every fiftieth turn.
func BenchmarkStorm(b *testing.B) {
	testbed.Privileged(b)
	n := newNode(b)
	agent := newAgent(b, filepath.Join(n.run, "agent"))
	n.join(b, agent)
	l := newLedger(b)

	type contender struct {
		name string
		cni  *testbed.CNI
		way  way // whose pod the other's traffic goes through; null has the first's
	}
	contenders := []contender{{"null", null(b), ways[0]}}
	for _, w := range ways {
		contenders = append(contenders, contender{w.name, n.cni(b, w), w})
	}
	few := []contender{contenders[0], contenders[1], contenders[3]} // null, and the first of each datapath
	type contest struct {
		storm
		among []contender
	}
	contests := []contest{
		{storm{100, 32, "no"}, contenders},
		{storm{250, 32, "no"}, contenders},
		{storm{100, 8, "no"}, few},
		{storm{250, 8, "no"}, few},
		{storm{100, 32, "yes"}, few},
		{storm{250, 32, "yes"}, few},
	}
	pods := 250
	if testing.Short() {
		contests, pods = []contest{{contests[0].storm, few}}, 100
	}
	crowd := n.crowd(b, pods)
	for _, p := range crowd.pods {
		agent.set(b, p)
	}
	busy := map[string]*testbed.Pod{} // by way
	for _, c := range contests {
		for _, x := range c.among {
			if c.load == "no" || busy[x.way.name] != nil {
				continue
			}
			p := testbed.NewPod(b, testbed.InWorld(n.world))
			agent.set(b, p)
			n.cni(b, x.way).MustAdd(b, p)
			p.StartProxy(b, testbed.ProxyUID, testbed.ProxyGID)
			busy[x.way.name] = p
		}
	}

	one := func(s storm, x contender) {
		pods := crowd.fresh(b, s.pods)
		results, errs := make([]testbed.CNIResult, s.pods), make([]error, s.pods)
		var total time.Duration
		all := func() {
			total = s.run(pods, func(i int, p *testbed.Pod, _ time.Time) { results[i], errs[i] = x.cni.Exec("ADD", p) })
		}
		if s.load == "yes" {
			traffic(b, busy[x.way.name], all)
		} else {
			all()
		}
		if err := errors.Join(errs...); err != nil {
			b.Fatal(err)
		}
		var cpu time.Duration
		failures := 0
		for _, r := range results {
			cpu += r.CPU
			if !r.OK() {
				failures++
				b.Errorf("%s: %s", s.name("Storm", x.name), r)
			}
			l.add(s.name("Storm", x.name), r.Elapsed)
		}
		l.add(s.name("StormTotal", x.name), total, cpuPerOp(cpu), value{float64(failures), "failures/op"})
		if x.name != "null" {
			n.removeAll(b, x.way, pods)
		}
	}
	for _, x := range contests[0].among { // warm
		one(storm{8, 8, "no"}, x)
	}
	l.warm = true
	round := 0
	for turn := 0; b.Loop(); turn++ {
		if !every(50, turn) {
			continue
		}
		for _, c := range contests {
			progress("storm: round %d, %d pods, %d at a time, load %s", round+1, c.pods, c.concurrency, c.load)
			for i := range c.among {
				one(c.storm, c.among[(i+round)%len(c.among)])
			}
		}
		round++
	}
	b.ReportMetric(0, "ns/op")
	first, nft := ways[0].name, "iptables-nft"
	s := storm{100, 32, "no"}
	l.ratio("total/null", s.name("StormTotal", first), 0.5, s.name("StormTotal", "null"), 0.5)
	l.ratio("p99/null-p99", s.name("Storm", first), 0.99, s.name("Storm", "null"), 0.99)
	l.ratio("iptables-nft-total/ebpf-total", s.name("StormTotal", nft), 0.5, s.name("StormTotal", first), 0.5)
	s.pods = 250
	l.ratio("250-p99/iptables-nft-p50", s.name("Storm", first), 0.99, s.name("Storm", nft), 0.5)
}

// BenchmarkStormKernel has kernel programming done to many pods at a time, in
// this process: what is left of a storm without the starts of processes. As many
// threads run Go code as pods are set up at once, so that these compete as processes
// do. What a pod waits for a processor counts too. A round comes every fiftieth turn.
func BenchmarkStormKernel(b *testing.B) {
	testbed.Privileged(b)
	n := newNode(b)
	l := newLedger(b)
	measured := ways
	storms := []storm{{100, 32, ""}, {100, 8, ""}}
	if testing.Short() {
		measured, storms = []way{wayOf("ebpf-sk_lookup"), wayOf("iptables-nft")}, storms[:1]
	}
	crowd := n.crowd(b, 100)
	one := func(s storm, w way) {
		pods := crowd.fresh(b, s.pods)
		apply, took, errs := make([]func() error, s.pods), make(samples, s.pods), make([]error, s.pods)
		for i, p := range pods {
			pol, t := policy(b, p), target(w, p)
			apply[i] = func() error { return n.backend(w).Apply(context.Background(), t, pol) }
		}
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(s.concurrency))
		s.run(pods, func(i int, _ *testbed.Pod, since time.Time) {
			errs[i] = apply[i]()
			took[i] = time.Since(since)
		})
		if err := errors.Join(errs...); err != nil {
			b.Fatal(err)
		}
		for _, d := range took {
			l.add(s.name("StormKernel", w.name), d)
		}
		n.removeAll(b, w, pods)
	}
	for _, w := range measured { // warm
		one(storm{8, 8, ""}, w)
	}
	l.warm = true
	round := 0
	for turn := 0; b.Loop(); turn++ {
		if !every(50, turn) {
			continue
		}
		progress("storm of kernel programming: round %d", round+1)
		for _, s := range storms {
			for i := range measured {
				one(s, measured[(i+round)%len(measured)])
			}
		}
		round++
	}
	b.ReportMetric(0, "ns/op")
	for _, s := range storms {
		first, nft := s.name("StormKernel", ways[0].name), s.name("StormKernel", "iptables-nft")
		for _, q := range []float64{0.5, 0.99} {
			l.ratio(fmt.Sprintf("%d-p%.0f-iptables-nft/ebpf", s.concurrency, 100*q), nft, q, first, q)
		}
	}
}
