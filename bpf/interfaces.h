/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What the kernel itself knows of a pod's interfaces and addresses at the moment.
 * Included in shunt.bpf.c, whose maps and types it shares.
 *
 * The hooks have no look-up of routes. By which interface a connection leaves is
 * certain only where the pod has two in all that are up, lo and one other: what is
 * the pod's own goes by lo, everything else by the other. Interfaces, their names and
 * addresses come and go: where it is not so any more, nothing is excluded.
 */
#pragma once

// Of a netns' interfaces so many are looked at: lo, the pod's, and those, down,
// that modules for tunnels leave in every netns.
#define INTERFACES 16
#define ADDRESSES 16 // of an interface and a family
#define IFF_UP 1
#define IFA_F_OPTIMISTIC 0x04
#define IFA_F_DADFAILED 0x08
#define IFA_F_TENTATIVE 0x40

// What find_ways finds.
struct ways {
	__u32 lo;      // lo's index, if it has its name
	__u32 pods;    // the pod's other interface's, if it is there by its name
	__u32 others;  // how many others are up
	__u32 holder;  // the index of the interface that has the address; 0: none
	__u64 sum;     // over the addresses, of its family, that are before the address, or all
};

// hash is what an address adds to a sum, by which sets of them are compared;
// loader.Rules has the same.
static __always_inline __u64 hash(const struct addr *a)
{
	__u64 h = ((__u64)a->w[0] << 32 | a->w[1]) * 0x9e3779b97f4a7c15;

	h = ((h ^ h >> 32) + ((__u64)a->w[2] << 32 | a->w[3])) * 0xbf58476d1ce4e5b9;
	return h ^ h >> 32;
}

static __always_inline bool is_named(struct net_device *dev, const __u8 *name)
{
	__u64 is[2] = {}, want[2];

	// Behind its end there may be the rest of an earlier, longer one.
	bpf_probe_read_kernel_str(is, sizeof(is), __builtin_preserve_access_index(&dev->name));
	__builtin_memcpy(want, name, sizeof(want));
	return is[0] == want[0] && is[1] == want[1];
}

static __always_inline bool is_named_lo(struct net_device *dev)
{
	__u8 lo[16] = "lo";

	return is_named(dev, lo);
}

// is_settled: others may have an address as long as the kernel does not know that
// nobody has, and routes what goes there to them.
static __always_inline bool is_settled(const struct inet6_ifaddr *ifa6)
{
	__u32 flags = BPF_CORE_READ(ifa6, flags);

	return !(flags & (IFA_F_TENTATIVE | IFA_F_DADFAILED)) || (flags & IFA_F_OPTIMISTIC);
}

// holds4 reports whether an interface has an IPv4 address. It and holds6 are two,
// because the kernel counts the stack of the deepest call.
__noinline int holds4(__u64 interface, __be32 a, struct ways *w)
{
	struct net_device *dev = (struct net_device *)interface;
	struct in_ifaddr *ifa = 0;
	struct in_device *in = 0;
	struct addr has;

	if (!dev || !w)
		return false;
	if (!bpf_core_field_exists(dev->ip_ptr) || !bpf_core_field_exists(in->ifa_list) ||
	    !bpf_core_field_exists(ifa->ifa_local) || !bpf_core_field_exists(ifa->ifa_next))
		return -ENOSYS;
	in = BPF_CORE_READ(dev, ip_ptr);
	ifa = in ? BPF_CORE_READ(in, ifa_list) : 0;
	for (int i = 0; i < ADDRESSES && ifa; i++) {
		has = mapped(BPF_CORE_READ(ifa, ifa_local));
		if (has.w[3] == a)
			return true;
		if (!is_loopback(&has))
			w->sum += hash(&has);
		ifa = BPF_CORE_READ(ifa, ifa_next);
	}
	return ifa ? -E2BIG : false;
}

// holds6 reports whether it has an IPv6 address.
__noinline int holds6(__u64 interface, const struct addr *a, struct ways *w)
{
	struct net_device *dev = (struct net_device *)interface;
	struct inet6_ifaddr *ifa6 = 0;
	struct list_head *head, *at;
	struct inet6_dev *in6 = 0;
	struct addr has;

	if (!dev || !a || !w)
		return false;
	if (!bpf_core_field_exists(dev->ip6_ptr) || !bpf_core_field_exists(in6->addr_list) ||
	    !bpf_core_field_exists(ifa6->addr) || !bpf_core_field_exists(ifa6->flags) || !bpf_core_field_exists(ifa6->if_list))
		return -ENOSYS;
	in6 = BPF_CORE_READ(dev, ip6_ptr);
	if (!in6)
		return false;
	head = __builtin_preserve_access_index(&in6->addr_list);
	at = BPF_CORE_READ(in6, addr_list.next);
	for (int i = 0; i < ADDRESSES && at != head; i++) {
		ifa6 = (void *)at - bpf_core_field_offset(struct inet6_ifaddr, if_list);
		bpf_probe_read_kernel(&has, sizeof(has), __builtin_preserve_access_index(&ifa6->addr));
		if (is_settled(ifa6)) {
			if (same(&has, a))
				return true;
			if (!is_loopback(&has))
				w->sum += hash(&has);
		}
		at = BPF_CORE_READ(ifa6, if_list.next);
	}
	return at == head ? false : -E2BIG;
}

// find_ways goes through the interfaces. It fails unless there are these two and no
// others, and with -E2BIG, -ENOENT or -ENOSYS where what it has found is not all.
__noinline int find_ways(__u64 cookie, __u64 address, const struct pod *pod, const struct addr *a, struct ways *w)
{
	struct net *net = (struct net *)address;
	struct net_device *dev = 0;
	struct list_head *head, *at;
	__u32 ifindex;
	int has;

	if (!pod || !a || !w)
		return -EINVAL;
	if (!bpf_core_field_exists(net->dev_base_head) || !bpf_core_field_exists(dev->dev_list) ||
	    !bpf_core_field_exists(dev->name) || !bpf_core_field_exists(dev->flags) || !bpf_core_field_exists(dev->ifindex))
		return -ENOSYS;
	if (!net || BPF_CORE_READ(net, net_cookie) != cookie)
		return -ENOENT;
	head = __builtin_preserve_access_index(&net->dev_base_head);
	at = BPF_CORE_READ(net, dev_base_head.next);
	for (int i = 0; i < INTERFACES && at != head; i++) {
		dev = (void *)at - bpf_core_field_offset(struct net_device, dev_list);
		at = BPF_CORE_READ(dev, dev_list.next);
		if (!(BPF_CORE_READ(dev, flags) & IFF_UP))
			continue; // no route leads by it, and its addresses are nobody's
		ifindex = BPF_CORE_READ(dev, ifindex);
		if (ifindex == LOOPBACK_IFINDEX) {
			if (is_named_lo(dev))
				w->lo = ifindex;
		} else if (is_named(dev, pod->interface)) {
			w->pods = ifindex;
		} else {
			w->others++;
		}
		has = is_mapped(a) ? holds4((__u64)dev, a->w[3], w) : holds6((__u64)dev, a, w);
		if (has < 0)
			return has;
		if (has)
			w->holder = ifindex;
	}
	if (at != head)
		return -E2BIG;
	if (w->others)
		return -ENOTUNIQ;
	return w->lo && w->pods ? 0 : -ENODEV;
}

static __always_inline bool is_whole(int err)
{
	return err != -E2BIG && err != -ENOENT && err != -ENOSYS && err != -EINVAL;
}

// sum_up finds the sum over all the pod's addresses, as find_ways finds them.
static __always_inline int sum_up(__u64 cookie, __u64 net, const struct pod *pod, __u64 *sum)
{
	// Nobody has the unspecified address: all are looked at.
	struct addr none = { { 0, 0, MAPPED_WORD, 0 } };
	struct ways w = {};
	int err;

	err = find_ways(cookie, net, pod, &none, &w);
	if (!is_whole(err))
		return err;
	none.w[2] = 0;
	w.lo = w.pods = w.others = 0;
	err = find_ways(cookie, net, pod, &none, &w);
	*sum = w.sum;
	return err;
}

static __always_inline __u64 joined(__u32 four, __u32 six)
{
	return (__u64)four << 32 | six;
}

// generation is how often addresses have come or gone, of both families, in the
// netns whose struct net is there; 0 without one.
static __always_inline __u64 generation(__u64 address)
{
	const struct net *net = (const struct net *)address;
	__u32 four = 0, six = 0;

	if (bpf_core_field_exists(net->ipv4.dev_addr_genid))
		four = BPF_CORE_READ(net, ipv4.dev_addr_genid.counter);
	if (bpf_core_field_exists(net->ipv6.dev_addr_genid))
		six = BPF_CORE_READ(net, ipv6.dev_addr_genid.counter);
	return joined(four, six);
}

// generation_by is the same, with a socket of the netns at hand, by which the counters
// can be had without a helper's call each.
static __always_inline __u64 generation_by(const struct sock *sk)
{
	const struct net *net = sk->__sk_common.skc_net.net;
	__u32 four = 0, six = 0;

	if (bpf_core_field_exists(net->ipv4.dev_addr_genid))
		four = net->ipv4.dev_addr_genid.counter;
	if (bpf_core_field_exists(net->ipv6.dev_addr_genid))
		six = net->ipv6.dev_addr_genid.counter;
	return joined(four, six);
}

// compare reports whether the pod's addresses are those of dests, and has the
// answer stand for as long as none comes or goes.
__noinline int compare(__u64 cookie, __u64 now)
{
	struct pod_state *c;
	struct pod *pod;
	__u64 sum = 0;
	bool equal;

	c = bpf_map_lookup_elem(&states, &cookie);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!c || !pod)
		return false;
	equal = is_whole(sum_up(cookie, c->net, pod, &sum)) && sum == pod->own;
	if (equal)
		c->generation = now;
	c->compared = now;
	return equal;
}

// is_known says that dests has the pod's own addresses, as far as was looked at.
static __always_inline bool is_known(const struct pod_state *c)
{
	return !c->net || generation(c->net) == c->generation;
}

// have_changed_since reports whether the pod's addresses are not those that dests
// says are its own. now is their generation.
static __always_inline bool have_changed_since(__u64 cookie, const struct pod_state *c, __u64 now)
{
	if (!c->net || now == c->generation)
		return false;
	return now == c->compared || !compare(cookie, now);
}

static __always_inline bool have_changed(__u64 cookie, const struct pod_state *c)
{
	return have_changed_since(cookie, c, generation(c->net));
}

// owns reports whether an address is the pod's own now. It fails with -E2BIG where
// the pod's addresses have changed, and are too many to look at.
__noinline int owns(__u64 cookie, const struct addr *a)
{
	struct pod_state *c;
	struct ways w = {};
	struct pod *pod;
	int err;

	if (!a)
		return false;
	if (is_loopback(a))
		return true;
	c = bpf_map_lookup_elem(&states, &cookie);
	pod = c && !is_known(c) ? bpf_map_lookup_elem(&pods, &cookie) : 0;
	if (c && pod) {
		err = find_ways(cookie, c->net, pod, a, &w);
		if (is_whole(err))
			return w.holder != 0;
		if (err == -E2BIG)
			return err;
	}
	return is_local(cookie, a);
}

// is_own is owns, where what was the pod's own at ADD still is, unless it is known
// not to be.
static __always_inline bool is_own(__u64 cookie, const struct addr *a)
{
	int own = owns(cookie, a);

	return own < 0 ? is_local(cookie, a) : own;
}

// renew has a flow know what its destination is now. What may be another's is not
// let past the proxy.
static __always_inline void renew(__u64 cookie, struct flow *f)
{
	int own;

	if (is_loopback(&f->dst))
		return;
	own = owns(cookie, &f->dst);
	if (own < 0)
		failed(cookie, PLACE_INTERFACES, own);
	if (own > 0)
		f->dest |= DEST_LOCAL;
	else
		f->dest &= ~DEST_LOCAL;
}

// by_excluded is leaves_excluded, where a negative number says that the way is
// not certain.
static __always_inline long by_excluded(__u64 cookie, const struct pod *pod, const struct flow *f, __u32 bound)
{
	struct pod_state *c = bpf_map_lookup_elem(&states, &cookie);
	struct ways w = {};
	bool by_lo;
	int err;

	err = c ? find_ways(cookie, c->net, pod, &f->dst, &w) : -ENOENT;
	if (!is_whole(err))
		return err;
	if (bound == LOOPBACK_IFINDEX)
		by_lo = true;
	else if (!bound)
		by_lo = f->local || w.holder || f->marked;
	else if (bound == w.pods)
		by_lo = w.holder && w.holder != LOOPBACK_IFINDEX; // what is at lo has no route by another
	else
		return false; // by one that came later
	if (by_lo)
		return w.lo && (pod->flags & POD_EXCLUDE_LO);
	if (!(pod->flags & POD_EXCLUDE_IF))
		return false;
	return err ? err : true;
}

// leaves_excluded is [out-exclude-interface]. bound is the interface that the
// socket is bound to, or 0.
__noinline int leaves_excluded(__u64 cookie, const struct pod *pod, const struct flow *f, __u32 bound)
{
	long yes;

	if (!pod || !f)
		return false;
	yes = by_excluded(cookie, pod, f, bound);
	if (yes < 0)
		failed(cookie, PLACE_INTERFACES, yes);
	return yes > 0;
}

// arrives_excluded is [in-exclude-interface].
__noinline int arrives_excluded(__u64 cookie, const struct pod *pod, __u32 ifindex)
{
	struct pod_state *c = bpf_map_lookup_elem(&states, &cookie);
	struct addr none = {};
	struct ways w = {};
	int err;

	if (!pod)
		return false;
	err = c ? find_ways(cookie, c->net, pod, &none, &w) : -ENOENT;
	if (!w.pods)
		failed(cookie, PLACE_INTERFACES, err);
	return w.pods && w.pods == ifindex;
}

// At ADD, on a thread in the pod's netns, by BPF_PROG_TEST_RUN, which gives the
// packet the netns' lo: notes where the netns is, for programs that can't learn
// that, and says, by errno, whether the two ways can be told apart there, if that is
// needed. It is attached to nothing.
SEC("tc")
int shunt_look(struct __sk_buff *skb)
{
	struct net *net = BPF_CORE_READ((struct sk_buff *)skb, dev, nd_net.net);
	__u64 cookie = BPF_CORE_READ(net, net_cookie);
	struct pod_state *c;
	struct pod *pod;
	__u64 sum = 0;
	int err;

	pod = bpf_map_lookup_elem(&pods, &cookie);
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!pod || !c)
		return ENOENT;
	c->compared = generation((__u64)net); // before they are looked at
	c->net = (__u64)net;
	err = sum_up(cookie, c->net, pod, &sum);
	// Those that can't be looked at are taken for what user space has found. Else
	// a generation that has been matches none that comes.
	c->generation = c->compared - (is_whole(err) && sum != pod->own);
	return (pod->flags & POD_EXCLUDE) ? -err : 0;
}
