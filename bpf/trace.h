/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What `shunt trace` sees: decisions as they fall. Included by shunt.bpf.c.
 *
 * While nobody looks a decision costs one load and one branch that isn't taken.
 * Who looks (a tracer) has a seat in the trace, from which user space tells what
 * is wanted, and a ring buffer of its own in the rings map. A tracer lives for as
 * long as it moves its deadline on; one that was killed has none soon, and the
 * decision that finds no tracer alive ends the look.
 */
#pragma once

#define TRACERS 4           // at once
#define TRACED_PODS 4       // that one can name
#define RING_SIZE (1 << 16) // of the rings map's template; a tracer's own may differ

struct tracer {
	__u64 until;             // by bpf_ktime_get_ns; 0, or past: nobody sits here
	__u64 lost;              // decisions that its ring had no room for
	__u64 pods[TRACED_PODS]; // their netns cookies; all zero: every pod
	__u32 rules;             // by which of enum rule, a bit each
	__u32 pad;
};

// Written by user space, through its memory, but for lost.
struct trace {
	__u64 on; // the last deadline that was set; 0: nobody looks
	struct tracer tracers[TRACERS];
};

volatile struct trace tracing SEC(".data.trace") = {};

struct event {
	__u64 time; // bpf_ktime_get_ns
	__u64 cookie;
	struct addr src; // inbound: the client
	struct addr dst; // the original destination
	__u16 sport; // host byte order, as is the next
	__u16 dport;
	__u32 how; // see how
	__u32 protocol;
	__u32 ifindex; // inbound: of the interface that it came by
	// Outbound: who connects; uid and gid are the socket's owner.
	__u32 pid;
	__u32 uid;
	__u32 gid;
	char comm[16];
	__u32 pad;
};

const struct event *unused_event __attribute__((unused));

// how joins what decided a flow, and what was in the way: enum rule in 8 bits,
// enum place in 8, errno in 16.
static __always_inline __u32 how(__u32 rule, __u32 place, long err)
{
	return rule | place << 8 | (__u32)-err << 16;
}

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, TRACERS);
	__type(key, __u32);
	__array(values, struct {
		__uint(type, BPF_MAP_TYPE_RINGBUF);
		__uint(max_entries, RING_SIZE);
	});
} rings SEC(".maps");

static __always_inline bool traced(void)
{
	return __builtin_expect(tracing.on != 0, 0);
}

static __always_inline bool wants(volatile struct tracer *t, const struct event *e)
{
	__u64 named = 0, other = 1;

	if (!(t->rules & 1u << (e->how & 31))) // the rule is less than that
		return false;
	for (int i = 0; i < TRACED_PODS; i++) {
		named |= t->pods[i];
		if (t->pods[i] == e->cookie)
			other = 0;
	}
	return !named || !other;
}

// publish gives an event to those who want it. A global function: see
// decide_outbound.
__noinline int publish(struct event *e)
{
	__u64 on = tracing.on;
	bool alive = false;

	if (!e)
		return 0;
	e->time = bpf_ktime_get_ns();
	for (__u32 i = 0; i < TRACERS; i++) {
		volatile struct tracer *t = &tracing.tracers[i];
		__u32 seat = i;
		void *ring;

		if (t->until <= e->time)
			continue;
		alive = true;
		if (!wants(t, e))
			continue;
		ring = bpf_map_lookup_elem(&rings, &seat);
		if (ring && bpf_ringbuf_output(ring, e, sizeof(*e), 0))
			__sync_fetch_and_add(&t->lost, 1);
	}
	// Nobody who has come meanwhile is switched off: his deadline is another.
	if (!alive)
		__sync_val_compare_and_swap(&tracing.on, on, 0);
	return 0;
}
