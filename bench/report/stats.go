// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sort"

	"golang.org/x/perf/benchmath"
)

const confidence = 0.95

// A statistic is a quantile of a series, in [0, 1]; 1 is the greatest value.
type statistic float64

const (
	p50     statistic = 0.5
	p90     statistic = 0.9
	p99     statistic = 0.99
	maximum statistic = 1
)

func (q statistic) String() string {
	if q == maximum {
		return "max"
	}
	return fmt.Sprintf("p%g", float64(q)*100)
}

// ranks are the places, from 0, of the ordered n values whose mean is the
// quantile: of an even number the median lies between two.
func (q statistic) ranks(n int) (lo, hi int) {
	if q == p50 {
		return (n - 1) / 2, n / 2
	}
	k := max(int(math.Ceil(float64(q)*float64(n)))-1, 0)
	return k, k
}

func (q statistic) of(sorted []float64) float64 {
	lo, hi := q.ranks(len(sorted))
	return (sorted[lo] + sorted[hi]) / 2
}

// middle is the median of a series.
func middle(s *series) float64 { return p50.of(slices.Sorted(slices.Values(s.values))) }

// An estimate has the bounds of its 95 % confidence interval; they are infinite
// where there are too few samples.
type estimate struct{ value, lo, hi float64 }

// bounded tells an estimate that has an interval.
func (e estimate) bounded() bool { return !math.IsInf(e.lo, 0) && !math.IsInf(e.hi, 0) }

// spread is half the interval, relative to the value.
func (e estimate) spread() float64 {
	if e.value == 0 {
		return 0
	}
	return (e.hi - e.lo) / 2 / e.value
}

// A summary is what the report tells of a series.
type summary struct {
	n             int
	median        estimate
	p90, p99, max float64
}

func summarize(s *series) summary {
	sorted := slices.Sorted(slices.Values(s.values))
	m := benchmath.AssumeNothing.Summary(benchmath.NewSample(slices.Clone(sorted), &benchmath.DefaultThresholds), confidence)
	sum := summary{
		n: len(sorted), median: estimate{m.Center, m.Lo, m.Hi},
		p90: p90.of(sorted), p99: p99.of(sorted), max: maximum.of(sorted),
	}
	if b := s.block(); b > 1 {
		// Order statistics would take each pod of a storm for an observation.
		boot := newBootstrap(s.values, b)
		sum.median.lo, sum.median.hi = boot.interval(func() float64 { return boot.draw(p50) })
	}
	return sum
}

// resamples is how often a bootstrap draws, and tail what of its draws lies on
// either side of the interval.
const (
	resamples = 1000
	tail      = (1 - confidence) / 2
	// minBlocks is how many independent observations an interval takes: with
	// fewer than six, no interval of 95 % has finite bounds.
	minBlocks = 6
)

// A bootstrap draws samples of a sample, block by block, with replacement. It
// always draws the same, so that a report can be made again.
type bootstrap struct {
	sorted []float64
	rank   []int // of each value, in the order of time
	block  int
	count  []int
	rnd    *rand.Rand
}

func newBootstrap(values []float64, block int) *bootstrap {
	b := &bootstrap{
		sorted: make([]float64, len(values)), rank: make([]int, len(values)), block: block,
		count: make([]int, len(values)), rnd: rand.New(rand.NewPCG(7, uint64(len(values)))),
	}
	order := make([]int, len(values))
	for i := range order {
		order[i] = i
	}
	sort.SliceStable(order, func(i, j int) bool { return values[order[i]] < values[order[j]] })
	for r, i := range order {
		b.rank[i] = r
		b.sorted[r] = values[i]
	}
	return b
}

func (b *bootstrap) blocks() int { return (len(b.rank) + b.block - 1) / b.block }

// draw is a quantile of the next resample. Counting how often each value was
// drawn spares sorting it.
func (b *bootstrap) draw(q statistic) float64 {
	clear(b.count)
	n, blocks := 0, b.blocks()
	for range blocks {
		first := b.rnd.IntN(blocks) * b.block
		for _, r := range b.rank[first:min(first+b.block, len(b.rank))] {
			b.count[r]++
			n++
		}
	}
	lo, hi := q.ranks(n)
	seen, at := 0, 0
	value := func(k int) float64 {
		for seen+b.count[at] <= k {
			seen += b.count[at]
			at++
		}
		return b.sorted[at]
	}
	return (value(lo) + value(hi)) / 2
}

func (b *bootstrap) interval(next func() float64) (lo, hi float64) {
	if b.blocks() < minBlocks {
		return math.Inf(-1), math.Inf(1)
	}
	draws := make([]float64, resamples)
	for i := range draws {
		draws[i] = next()
	}
	slices.Sort(draws)
	last := float64(resamples - 1)
	return draws[int(tail*last)], draws[int(math.Ceil((1-tail)*last))]
}

// quantile is a quantile of a series with its interval; of the greatest value
// there is none.
func quantile(s *series, q statistic) estimate {
	e := estimate{value: q.of(slices.Sorted(slices.Values(s.values)))}
	if q == maximum {
		e.lo, e.hi = e.value, e.value
		return e
	}
	b := newBootstrap(s.values, s.block())
	e.lo, e.hi = b.interval(func() float64 { return b.draw(q) })
	return e
}

// ratio is a quantile of one series by a quantile of another of the same run.
func ratio(num *series, of statistic, den *series, by statistic) estimate {
	n, d := newBootstrap(num.values, num.block()), newBootstrap(den.values, den.block())
	d.rnd = rand.New(rand.NewPCG(11, uint64(len(den.values)))) // not in step with n
	e := estimate{value: of.of(n.sorted) / by.of(d.sorted), lo: math.Inf(-1), hi: math.Inf(1)}
	if d.blocks() >= minBlocks {
		e.lo, e.hi = n.interval(func() float64 { return n.draw(of) / d.draw(by) })
	}
	return e
}

// same tells whether two series can't be told apart, by the Mann-Whitney U test.
func same(a, b *series) bool {
	t := &benchmath.DefaultThresholds
	c := benchmath.AssumeNothing.Compare(benchmath.NewSample(slices.Clone(a.values), t), benchmath.NewSample(slices.Clone(b.values), t))
	return c.P > c.Alpha
}

// drift is by how much the median of the second half of a series differs from
// the first half's, relative to it; 0 if the two can't be told apart.
func drift(s *series) float64 {
	half := len(s.values) / 2
	if half < minBlocks || s.block() > 1 {
		return 0
	}
	a, b := &series{values: s.values[:half]}, &series{values: s.values[half:]}
	if same(a, b) {
		return 0
	}
	first := p50.of(slices.Sorted(slices.Values(a.values)))
	if first == 0 {
		return 0
	}
	return p50.of(slices.Sorted(slices.Values(b.values)))/first - 1
}
