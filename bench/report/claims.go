// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"slices"
	"strconv"
)

// A claim is what a measurement has to show: a statistic of a series, by one of
// another series of the same run or else by itself, and its bound.
type claim struct {
	id   string
	what string
	unit string // as benchfmt tidies it
	num  string
	of   statistic
	den  string // "" for num itself
	by   statistic
	// atLeast is a bound from below, else from above.
	atLeast bool
	bound   float64
}

const (
	seconds    = "sec/op"
	cpuSeconds = "cpu-sec/op"
)

// claims is everything that Shunt says of its speed, in the order of the report.
var claims = []claim{
	{
		id: "kernel-p50", what: "kernel programming of a dual-stack pod: by iptables-nft / by eBPF", unit: seconds,
		num: "Setup/op=add/path=iptables-nft/family=dual/policy=small", of: p50,
		den: "Setup/op=add/path=ebpf-sk_lookup/family=dual/policy=small", by: p50, atLeast: true, bound: 20,
	},
	{
		id: "kernel-storm-p99", what: "kernel programming in a storm: by iptables-nft / by eBPF", unit: seconds,
		num: "StormKernel/path=iptables-nft/pods=100/concurrency=32", of: p99,
		den: "StormKernel/path=ebpf-sk_lookup/pods=100/concurrency=32", by: p99, atLeast: true, bound: 10,
	},
	{
		id: "add-p50", what: "ADD as a process, facts by the agent / the null plugin", unit: seconds,
		num: "Process/op=add/path=ebpf-sk_lookup/facts=agent", of: p50,
		den: "Process/op=add/path=null/facts=none", by: p50, bound: 2,
	},
	{
		id: "add-cpu", what: "ADD as a process, facts by the agent: CPU", unit: cpuSeconds,
		num: "Process/op=add/path=ebpf-sk_lookup/facts=agent", of: p50, bound: 5e-3,
	},
	{
		id: "add-children", what: "ADD as a process, facts by the agent: child processes", unit: "children/op",
		num: "Process/op=add/path=ebpf-sk_lookup/facts=agent", of: maximum, bound: 0,
	},
	{
		id: "add-reference", what: "ADD as a process, facts by the API server / a static program that asks it the same", unit: seconds,
		num: "Process/op=add/path=ebpf-sk_lookup/facts=api", of: p50,
		den: "Process/op=add/path=reference/facts=api", by: p50, bound: 1.5,
	},
	{
		id: "outside-p50", what: "ADD of a pod outside the mesh / the null plugin", unit: seconds,
		num: "Process/op=add/path=not-in-mesh/facts=agent", of: p50,
		den: "Process/op=add/path=null/facts=none", by: p50, bound: 1.3,
	},
	{
		id: "storm-total", what: "100 pods, 32 at once, in all / the null plugin's total", unit: seconds,
		num: "StormTotal/path=ebpf-sk_lookup/pods=100/concurrency=32/load=no", of: p50,
		den: "StormTotal/path=null/pods=100/concurrency=32/load=no", by: p50, bound: 3,
	},
	{
		id: "storm-p99", what: "100 pods, 32 at once / the null plugin", unit: seconds,
		num: "Storm/path=ebpf-sk_lookup/pods=100/concurrency=32/load=no", of: p99,
		den: "Storm/path=null/pods=100/concurrency=32/load=no", by: p99, bound: 4,
	},
	{
		id: "storm-250", what: "250 pods, 32 at once: eBPF's p99 / iptables-nft's p50", unit: seconds,
		num: "Storm/path=ebpf-sk_lookup/pods=250/concurrency=32/load=no", of: p99,
		den: "Storm/path=iptables-nft/pods=250/concurrency=32/load=no", by: p50, bound: 1,
	},
	{
		id: "storm-failures", what: "100 pods, 32 at once: failures", unit: "failures/op",
		num: "StormTotal/path=ebpf-sk_lookup/pods=100/concurrency=32/load=no", of: maximum, bound: 0,
	},
	{
		id: "connect-close-4", what: "connect and close, redirected / a plain loopback dial of the proxy, IPv4", unit: seconds,
		num: "Data/what=connect-close/path=ebpf-sk_lookup/family=4", of: p50,
		den: "Data/what=connect-close/path=plain/family=4", by: p50, bound: 1.05,
	},
	{
		id: "connect-close-6", what: "connect and close, redirected / a plain loopback dial of the proxy, IPv6", unit: seconds,
		num: "Data/what=connect-close/path=ebpf-sk_lookup/family=6", of: p50,
		den: "Data/what=connect-close/path=plain/family=6", by: p50, bound: 1.05,
	},
	{
		id: "rtt-4", what: "request and response on an established connection, redirected / plain, IPv4", unit: seconds,
		num: "Data/what=rtt/path=ebpf-sk_lookup/family=4", of: p50,
		den: "Data/what=rtt/path=plain/family=4", by: p50, bound: 1,
	},
	{
		id: "rtt-6", what: "request and response on an established connection, redirected / plain, IPv6", unit: seconds,
		num: "Data/what=rtt/path=ebpf-sk_lookup/family=6", of: p50,
		den: "Data/what=rtt/path=plain/family=6", by: p50, bound: 1,
	},
	{
		id: "scale", what: "the 1,000th pod of a node / the 1st", unit: seconds,
		num: "Scale/pods=1000", of: p50, den: "Scale/pods=1", by: p50, bound: 1.2,
	},
	{
		id: "memory", what: "kernel memory a pod, besides its links", unit: "B/pod",
		num: "Scale/pods=1000", of: p50, bound: 16 << 10,
	},
}

// claimByID finds a claim; nil if there is none.
func claimByID(id string) *claim {
	if i := slices.IndexFunc(claims, func(c claim) bool { return c.id == id }); i >= 0 {
		return &claims[i]
	}
	return nil
}

// statistic says what is compared, such as p50 or p99/p50.
func (c *claim) statistic() string {
	if c.den == "" || c.of == c.by {
		return c.of.String()
	}
	return c.of.String() + "/" + c.by.String()
}

func (c *claim) sign() string {
	if c.atLeast {
		return "≥"
	}
	return "≤"
}

// format gives a value of the claim: a ratio, or a quantity with its unit.
func (c *claim) format(v float64) string {
	if c.den != "" {
		return formatRatio(v)
	}
	return formatValue(v, c.unit)
}

func (c *claim) formatBound() string {
	if c.den != "" {
		return strconv.FormatFloat(c.bound, 'g', -1, 64)
	}
	s := scaleFor(c.bound, c.unit)
	bound := strconv.FormatFloat(c.bound/s.factor, 'g', 4, 64)
	if c.bound == 0 || s.unit == "" {
		return bound
	}
	return bound + " " + s.unit
}

// holds tells whether a value is on the good side of a bound.
func (c *claim) holds(v, bound float64) bool {
	if c.atLeast {
		return v >= bound
	}
	return v <= bound
}

// A verdict is what a claim came to. missing are the series that it lacks; with
// any, nothing else is set.
type verdict struct {
	*claim
	missing []string
	got     estimate
	reached bool
	// sure tells that the whole interval is on the side of the value.
	sure bool
}

func (c *claim) judge(s *samples) verdict {
	v := verdict{claim: c}
	find := func(name string) *series {
		x := s.get(name, c.unit)
		if x == nil {
			v.missing = append(v.missing, fmt.Sprintf("%s in %s", name, c.unit))
		}
		return x
	}
	num := find(c.num)
	var den *series
	if c.den != "" {
		den = find(c.den)
	}
	if len(v.missing) > 0 {
		return v
	}
	v.got = c.measure(num, den)
	v.reached = c.holds(v.got.value, c.bound)
	v.sure = v.got.bounded() && c.holds(v.got.lo, c.bound) == v.reached && c.holds(v.got.hi, c.bound) == v.reached
	return v
}

func (c *claim) measure(num, den *series) estimate {
	if den == nil {
		return quantile(num, c.of)
	}
	return ratio(num, c.of, den, c.by)
}

func (v verdict) String() string {
	switch {
	case len(v.missing) > 0:
		return "not measured"
	case v.reached && v.sure:
		return "**yes**"
	case v.reached && !v.got.bounded():
		return "yes; too few rounds for an interval"
	case v.reached:
		return "yes, but the interval reaches beyond"
	case v.sure:
		return "**no**"
	case !v.got.bounded():
		return "no; too few rounds for an interval"
	default:
		return "no, but the interval reaches the bound"
	}
}

func judgeAll(s *samples) []verdict {
	verdicts := make([]verdict, len(claims))
	for i := range claims {
		verdicts[i] = claims[i].judge(s)
	}
	return verdicts
}
