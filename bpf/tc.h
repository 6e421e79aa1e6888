/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The other inbound hook: TC ingress, on the interfaces of a pod. Included at
 * the end of shunt.bpf.c, whose maps and rules it shares.
 *
 * It gives a packet the proxy's listener as its socket before the kernel looks
 * for one. Every packet passes, so what belongs to a connection goes on after
 * one look-up. What no connection owns and the rules send to the proxy never
 * gets as far as the kernel's own search, which would find the app: neither
 * here nor a moment later, when the socket that was found here has gone.
 */
#pragma once

#include <linux/if_ether.h>
#include <linux/pkt_cls.h>

#define IPV4_FRAGMENT 0x2000 // more fragments follow
#define IPV4_OFFSET 0x1fff
#define IPV6_FRAGMENT 0x0001
#define IPV6_OFFSET 0xfff8
#define IPV6_HEADERS 8 // extension headers that are followed
#define IPV4_SIZE 20   // of the header without options
#define IPV6_SIZE 40
#define TCP_SIZE 20
#define TCP_CHECK 16 // where the checksum lies in the TCP header
#define TCP_OPTIONS 40
#define TCP_OPTION_TIMESTAMP 8
#define TCP_OPTION_NOP 1
#define TCP_OPTION_END 0
#define VLAN_TAGS 2 // that lie in the packet; the outermost doesn't
#define PULL 256    // bytes of a packet in which its headers end
#define TTL 64
#define PACKET_HOST 0
#define VLAN_ID 0x0fff

enum { TC_NEXT = TC_ACT_UNSPEC }; // other people's programs go on; the same number as TCX_NEXT

enum tcp_flag { FIN = 0x01, SYN = 0x02, RST = 0x04, ACK = 0x10 };

struct tcp {
	__be16 sport;
	__be16 dport;
	__be32 seq;
	__be32 ack;
	__u8 length; // in the upper half, in words
	__u8 flags;  // enum tcp_flag
	__be16 window;
	__be16 check;
	__be16 urgent;
};

struct ipv4 {
	__u8 length; // in the lower half, in words
	__u8 tos;
	__be16 total;
	__be16 id;
	__be16 fragment;
	__u8 ttl;
	__u8 protocol;
	__be16 check;
	__be32 saddr;
	__be32 daddr;
};

struct ipv6 {
	__be32 version;
	__be16 payload;
	__u8 next;
	__u8 hops;
	__be32 saddr[4];
	__be32 daddr[4];
};

// A TCP segment, as far as it is read. Offsets count from the network header.
struct segment {
	struct bpf_sock_tuple tuple;
	struct tcp tcp;
	__u32 ip;       // where the IP header lies: behind the VLAN tags
	__u32 transport; // where the TCP header lies
	__u32 end;      // where the IP packet ends; 0: its header can't be read
	__u16 port;     // the destination's, host byte order
	bool four;
	bool fragment; // the first of several
};

enum reading { NOT_TCP, READ, UNREADABLE };

// The last SYN that was sent in again behind a RST on this CPU.
struct reopened {
	__u64 cookie;
	__be32 seq;
	__be32 client; // the end of its address
	__be16 sport;
	__be16 dport;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reopened);
} reopens SEC(".maps");

// tc_cookie gives the cookie of the netns that the packet's interface lies in. The
// helper that TC programs have for it since Linux 6.15 asks the packet's socket,
// which is still the sender's, in another netns.
static __always_inline __u64 tc_cookie(struct __sk_buff *ctx)
{
	return BPF_CORE_READ((struct sk_buff *)ctx, dev, nd_net.net, net_cookie);
}

// load reads headers, wherever the link layer's ends.
static __always_inline bool load(struct __sk_buff *ctx, __u32 off, void *to, __u32 len)
{
	return !bpf_skb_load_bytes_relative(ctx, off, to, len, BPF_HDR_START_NET);
}

static __always_inline enum reading read_tcp(struct __sk_buff *ctx, struct segment *s)
{
	// Padding behind the packet is no header: in a fragment another could
	// bring the real one.
	if (s->transport + TCP_SIZE > s->end || !load(ctx, s->transport, &s->tcp, TCP_SIZE))
		return UNREADABLE;
	s->port = bpf_ntohs(s->tcp.dport);
	if (s->four) {
		s->tuple.ipv4.sport = s->tcp.sport;
		s->tuple.ipv4.dport = s->tcp.dport;
	} else {
		s->tuple.ipv6.sport = s->tcp.sport;
		s->tuple.ipv6.dport = s->tcp.dport;
	}
	return READ;
}

static __always_inline enum reading read_ipv4(struct __sk_buff *ctx, struct segment *s)
{
	struct ipv4 ip;
	__u32 length;
	__u16 fragment;

	if (!load(ctx, s->ip, &ip, sizeof(ip)))
		return UNREADABLE;
	if (ip.protocol != IPPROTO_TCP)
		return NOT_TCP;
	// The kernel puts no packet together without its first fragment, nor
	// from fragments that overlap: the others need no look.
	fragment = bpf_ntohs(ip.fragment);
	if (fragment & IPV4_OFFSET)
		return NOT_TCP;
	length = (ip.length & 0xf) * 4;
	if (length < IPV4_SIZE)
		return NOT_TCP; // the kernel drops it
	s->four = true;
	s->fragment = fragment & IPV4_FRAGMENT;
	s->tuple.ipv4.saddr = ip.saddr;
	s->tuple.ipv4.daddr = ip.daddr;
	s->transport = s->ip + length;
	s->end = ip.total ? s->ip + bpf_ntohs(ip.total) : -1; // 0: joined to more than 64 KiB
	return read_tcp(ctx, s);
}

static __always_inline enum reading read_ipv6(struct __sk_buff *ctx, struct segment *s)
{
	struct ipv6 ip;
	__u16 fragment;
	__u8 next, header[4];

	if (!load(ctx, s->ip, &ip, sizeof(ip)))
		return UNREADABLE;
	__builtin_memcpy(s->tuple.ipv6.saddr, ip.saddr, sizeof(ip.saddr));
	__builtin_memcpy(s->tuple.ipv6.daddr, ip.daddr, sizeof(ip.daddr));
	s->transport = s->ip + IPV6_SIZE;
	s->end = ip.payload ? s->transport + bpf_ntohs(ip.payload) : -1;
	next = ip.next;
	for (int i = 0; i < IPV6_HEADERS; i++) {
		switch (next) {
		case IPPROTO_TCP:
			return read_tcp(ctx, s);
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
			break;
		default:
			return NOT_TCP;
		}
		if (!load(ctx, s->transport, header, sizeof(header)))
			return UNREADABLE;
		if (next == IPPROTO_FRAGMENT) {
			fragment = header[2] << 8 | header[3];
			if (fragment & IPV6_OFFSET)
				return NOT_TCP;
			s->fragment = fragment & IPV6_FRAGMENT;
			s->transport += 8;
		} else {
			s->transport += (header[1] + 1) * 8;
		}
		next = header[0];
	}
	return UNREADABLE;
}

// read_segment is a global function, as are the rare ways below: the verifier
// follows each once.
__noinline int read_segment(struct __sk_buff *ctx, struct segment *s)
{
	__u32 protocol = ctx->protocol;
	__be16 tag[2];

	if (!s)
		return NOT_TCP;
	for (int i = 0; i < VLAN_TAGS; i++) {
		if (protocol != bpf_htons(ETH_P_8021Q) && protocol != bpf_htons(ETH_P_8021AD))
			break;
		if (!load(ctx, s->ip, tag, sizeof(tag)))
			return NOT_TCP;
		protocol = tag[1];
		s->ip += sizeof(tag);
	}
	if (protocol == bpf_htons(ETH_P_IP))
		return read_ipv4(ctx, s);
	if (protocol == bpf_htons(ETH_P_IPV6))
		return read_ipv6(ctx, s);
	return NOT_TCP;
}

// tell_segment is tell_outbound for a segment that begins a connection.
__noinline int tell_segment(struct __sk_buff *ctx, __u64 cookie, const struct segment *s, __u32 how)
{
	struct event e = { .cookie = cookie, .how = how, .protocol = IPPROTO_TCP, .ifindex = ctx->ifindex };

	if (!s)
		return 0;
	e.sport = bpf_ntohs(s->tcp.sport);
	e.dport = s->port;
	if (s->four) {
		e.src = mapped(s->tuple.ipv4.saddr);
		e.dst = mapped(s->tuple.ipv4.daddr);
	} else {
		__builtin_memcpy(&e.src, s->tuple.ipv6.saddr, sizeof(e.src));
		__builtin_memcpy(&e.dst, s->tuple.ipv6.daddr, sizeof(e.dst));
	}
	return publish(&e);
}

static __always_inline void trace_segment(struct __sk_buff *ctx, __u64 cookie, const struct segment *s, __u32 how)
{
	if (traced())
		tell_segment(ctx, cookie, s, how);
}

// find looks for the socket that owns a tuple: a connection, a handshake, or a
// listener.
static __always_inline struct bpf_sock *find(struct __sk_buff *ctx, struct bpf_sock_tuple *t, bool four)
{
	struct bpf_sock *sk;
	struct stamp *s;
	__u32 zero = 0;

	// Where no connection owns it, the netns' sk_lookup programs are asked too.
	s = bpf_map_lookup_elem(&stamps, &zero);
	if (s)
		s->by_tc = true;
	sk = bpf_skc_lookup_tcp(ctx, t, four ? sizeof(t->ipv4) : sizeof(t->ipv6), BPF_F_CURRENT_NETNS, 0);
	if (s)
		s->by_tc = false;
	return sk;
}

// passes_through reports whether the kernel would send the packet on, to
// another than this pod.
__noinline int passes_through(struct __sk_buff *ctx, const struct segment *s)
{
	struct bpf_fib_lookup route = { .l4_protocol = IPPROTO_TCP, .ifindex = ctx->ifindex };
	long err;

	if (!s)
		return false;
	if (s->four) {
		route.family = AF_INET;
		route.ipv4_src = s->tuple.ipv4.saddr;
		route.ipv4_dst = s->tuple.ipv4.daddr;
	} else {
		route.family = AF_INET6;
		__builtin_memcpy(route.ipv6_src, s->tuple.ipv6.saddr, sizeof(route.ipv6_src));
		__builtin_memcpy(route.ipv6_dst, s->tuple.ipv6.daddr, sizeof(route.ipv6_dst));
	}
	err = bpf_fib_lookup(ctx, &route, sizeof(route), 0);
	return err >= 0 && err != BPF_FIB_LKUP_RET_NOT_FWDED && err != BPF_FIB_LKUP_RET_FWD_DISABLED;
}

// is_link reports whether the network header lies len bytes into the frame.
static __always_inline bool is_link(struct __sk_buff *ctx, __u32 len)
{
	struct ipv4 there, network;

	return load(ctx, 0, &network, sizeof(network)) && !bpf_skb_load_bytes(ctx, len, &there, sizeof(there)) &&
	       network.saddr == there.saddr && network.daddr == there.daddr && network.total == there.total &&
	       network.length == there.length && network.id == there.id && network.check == there.check;
}

// link_length gives the length of the link layer's header: Ethernet's, or none
// at all. Helpers that write count from there.
static __always_inline int link_length(struct __sk_buff *ctx)
{
	if (is_link(ctx, ETH_HLEN))
		return ETH_HLEN;
	return is_link(ctx, 0) ? 0 : -1;
}

// The sum over a packet's TCP header is complete, or is that of the pseudo header
// alone, because hardware is to complete it; where the helper leaves the field
// alone it is the latter.
static __always_inline bool is_partial(struct __sk_buff *ctx, __u32 check)
{
	__be16 before = 0, after = 0;

	bpf_skb_load_bytes(ctx, check, &before, sizeof(before));
	bpf_l4_csum_replace(ctx, check, 0, bpf_htonl(1), 4);
	bpf_skb_load_bytes(ctx, check, &after, sizeof(after));
	bpf_l4_csum_replace(ctx, check, bpf_htonl(1), 0, 4);
	return before == after;
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32 & 0xffff) + (sum >> 48);
	sum = (sum & 0xffff) + (sum >> 16);
	return (sum & 0xffff) + (sum >> 16);
}

// answerable: nobody sends RSTs to everybody, or to nobody.
static __always_inline bool answerable(const struct segment *s)
{
	if (s->four) {
		__u32 a = bpf_ntohl(s->tuple.ipv4.saddr) >> 24;

		return a != 0 && a != 127 && a < 224;
	}
	return (s->tuple.ipv6.saddr[0] & bpf_htonl(0xff000000)) != bpf_htonl(0xff000000) &&
	       (s->tuple.ipv6.saddr[0] | s->tuple.ipv6.saddr[1] | s->tuple.ipv6.saddr[2]) != 0;
}

// refuse turns a segment into the RST that answers it (RFC 9293, 3.5.2), and
// sends it back. What can't be answered is dropped.
__noinline int refuse(struct __sk_buff *ctx, const struct segment *s)
{
	struct {
		struct ipv4 ip;
		struct tcp tcp;
	} four = {};
	struct {
		struct ipv6 ip;
		struct tcp tcp;
	} six = {};
	__be32 macs[3], swapped[3];
	struct tcp tcp = {};
	__u32 base, extra, at, payload;
	__u64 pseudo;
	bool partial;
	int link;
	long err;

	if (!s || !answerable(s))
		return TC_ACT_SHOT;
	link = link_length(ctx);
	if (link < 0)
		return TC_ACT_SHOT;

	tcp.sport = s->tcp.dport;
	tcp.dport = s->tcp.sport;
	tcp.length = TCP_SIZE / 4 << 4;
	if (s->tcp.flags & ACK) {
		tcp.flags = RST;
		tcp.seq = s->tcp.ack;
	} else {
		payload = s->end - s->transport - (s->tcp.length >> 4) * 4;
		tcp.flags = RST | ACK;
		tcp.ack = bpf_htonl(bpf_ntohl(s->tcp.seq) + payload + !!(s->tcp.flags & SYN) + !!(s->tcp.flags & FIN));
	}

	// Options and extension headers go, and so does all behind the TCP header.
	at = link + s->ip;
	base = s->four ? IPV4_SIZE : IPV6_SIZE;
	extra = s->transport - s->ip - base;
	if (extra && bpf_skb_adjust_room(ctx, -(__s32)extra, BPF_ADJ_ROOM_NET, BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET))
		return TC_ACT_SHOT;
	if (bpf_skb_change_tail(ctx, at + base + TCP_SIZE, 0))
		return TC_ACT_SHOT;

	partial = is_partial(ctx, at + base + TCP_CHECK);
	if (s->four) {
		four.ip.length = 4 << 4 | IPV4_SIZE / 4;
		four.ip.total = bpf_htons(IPV4_SIZE + TCP_SIZE);
		four.ip.fragment = bpf_htons(0x4000); // don't
		four.ip.ttl = TTL;
		four.ip.protocol = IPPROTO_TCP;
		four.ip.saddr = s->tuple.ipv4.daddr;
		four.ip.daddr = s->tuple.ipv4.saddr;
		four.ip.check = ~fold(bpf_csum_diff(0, 0, (__be32 *)&four.ip, sizeof(four.ip), 0));
		pseudo = bpf_csum_diff(0, 0, &four.ip.saddr, 8, 0);
	} else {
		six.ip.version = bpf_htonl(6 << 28);
		six.ip.payload = bpf_htons(TCP_SIZE);
		six.ip.next = IPPROTO_TCP;
		six.ip.hops = TTL;
		__builtin_memcpy(six.ip.saddr, s->tuple.ipv6.daddr, sizeof(six.ip.saddr));
		__builtin_memcpy(six.ip.daddr, s->tuple.ipv6.saddr, sizeof(six.ip.daddr));
		pseudo = bpf_csum_diff(0, 0, six.ip.saddr, 32, 0);
	}
	pseudo = (pseudo & 0xffffffff) + bpf_htons(IPPROTO_TCP) + bpf_htons(TCP_SIZE);
	if (partial)
		tcp.check = fold(pseudo);
	else
		tcp.check = ~fold(pseudo + (bpf_csum_diff(0, 0, (__be32 *)&tcp, sizeof(tcp), 0) & 0xffffffff));
	if (s->four) {
		four.tcp = tcp;
		err = bpf_skb_store_bytes(ctx, at, &four, sizeof(four), BPF_F_RECOMPUTE_CSUM);
	} else {
		six.tcp = tcp;
		err = bpf_skb_store_bytes(ctx, at, &six, sizeof(six), BPF_F_RECOMPUTE_CSUM);
	}
	if (err)
		return TC_ACT_SHOT;
	if (link) {
		if (bpf_skb_load_bytes(ctx, 0, macs, sizeof(macs)))
			return TC_ACT_SHOT;
		// Twelve bytes, turned by six.
		__builtin_memcpy(swapped, (char *)macs + ETH_ALEN, ETH_ALEN);
		__builtin_memcpy((char *)swapped + ETH_ALEN, macs, ETH_ALEN);
		if (bpf_skb_store_bytes(ctx, 0, swapped, sizeof(swapped), 0))
			return TC_ACT_SHOT;
	}
	return bpf_redirect(ctx->ifindex, 0);
}

// change writes four bytes of the TCP header, at a distance from its beginning,
// and keeps its checksum right.
static __always_inline long change(struct __sk_buff *ctx, __u32 tcp, __u32 off, __be32 from, __be32 to)
{
	long err = bpf_l4_csum_replace(ctx, tcp + TCP_CHECK, from, to, 4);

	return err ? err : bpf_skb_store_bytes(ctx, tcp + off, &to, sizeof(to), 0);
}

#define TCP_SEQ 4
#define TCP_FLAGS_WORD 12 // length, flags, window

// with_flags gives that word with other flags.
static __always_inline __be32 with_flags(const struct tcp *t, __u8 flags)
{
	return bpf_htonl((__u32)t->length << 24 | (__u32)flags << 16 | bpf_ntohs(t->window));
}

// challenge has the kernel answer a SYN as it answers one that doesn't fit into
// the connection that it hits, by taking its SYN flag away: an ACK goes back, and
// a client that wants another connection resets this one and tries again. Unlike
// a SYN the segment begins nothing, whatever the kernel finds.
__noinline int challenge(struct __sk_buff *ctx, const struct segment *s)
{
	int link = link_length(ctx);

	if (!s || link < 0)
		return TC_ACT_SHOT;
	if (change(ctx, link + s->transport, TCP_FLAGS_WORD, with_flags(&s->tcp, s->tcp.flags), with_flags(&s->tcp, ACK)))
		return TC_ACT_SHOT;
	return TC_NEXT;
}

// reopen clears a connection in TIME_WAIT out of a SYN's way: a RST at
// sequence number seq goes in before the SYN, which comes round once more.
__noinline int reopen(struct __sk_buff *ctx, __u64 cookie, const struct segment *s, __u32 seq)
{
	__be32 client, flags, reset, reset_seq = bpf_htonl(seq);
	struct reopened *last;
	__u32 zero = 0, tcp;
	int link;

	last = bpf_map_lookup_elem(&reopens, &zero);
	link = link_length(ctx);
	if (!s || !last || link < 0)
		return TC_ACT_SHOT;
	client = s->four ? s->tuple.ipv4.saddr : s->tuple.ipv6.saddr[3];
	if (last->cookie == cookie && last->seq == s->tcp.seq && last->client == client && last->sport == s->tcp.sport && last->dport == s->tcp.dport) {
		last->cookie = 0;
		trace_segment(ctx, cookie, s, how(RULE_IN_INCLUDE, PLACE_TC_REOPEN, -EEXIST));
		failed(cookie, PLACE_TC_REOPEN, -EEXIST);
		return TC_ACT_SHOT; // the RST was in vain; the client will try again
	}
	last->cookie = cookie;
	last->seq = s->tcp.seq;
	last->client = client;
	last->sport = s->tcp.sport;
	last->dport = s->tcp.dport;

	tcp = link + s->transport;
	flags = with_flags(&s->tcp, s->tcp.flags);
	reset = with_flags(&s->tcp, RST);
	if (change(ctx, tcp, TCP_FLAGS_WORD, flags, reset) || change(ctx, tcp, TCP_SEQ, s->tcp.seq, reset_seq) ||
	    bpf_clone_redirect(ctx, ctx->ifindex, BPF_F_INGRESS) ||
	    change(ctx, tcp, TCP_SEQ, reset_seq, s->tcp.seq) || change(ctx, tcp, TCP_FLAGS_WORD, reset, flags)) {
		trace_segment(ctx, cookie, s, how(RULE_IN_INCLUDE, PLACE_TC_REOPEN, -EAGAIN));
		failed(cookie, PLACE_TC_REOPEN, -EAGAIN);
		return TC_ACT_SHOT;
	}
	return bpf_redirect(ctx->ifindex, BPF_F_INGRESS);
}

// timestamp gives the value of a segment's timestamp option, with bit 32 set;
// 0 without one.
__noinline __u64 timestamp(struct __sk_buff *ctx, const struct segment *s)
{
	__u8 o[TCP_OPTIONS] = {};
	__u64 len, i = 0;

	if (!s)
		return 0;
	len = (__u64)(s->tcp.length >> 4) * 4;
	if (len <= TCP_SIZE)
		return 0;
	len -= TCP_SIZE;
	asm volatile("" : "+r"(len)); // or the verifier doesn't see the bounds
	if (len < 4 || len > sizeof(o) || !load(ctx, s->transport + TCP_SIZE, o, len))
		return 0;
	for (int n = 0; n < 12; n++) {
		asm volatile("" : "+r"(i)); // or a copy is compared, whose bounds Linux 6.1 does not give to i
		if (i > sizeof(o) - 10)
			return 0;
		switch (o[i]) {
		case TCP_OPTION_END:
			return 0;
		case TCP_OPTION_NOP:
			i++;
			break;
		case TCP_OPTION_TIMESTAMP:
			return 1ull << 32 | (__u32)o[i + 2] << 24 | o[i + 3] << 16 | o[i + 4] << 8 | o[i + 5];
		default:
			if (o[i + 1] < 2)
				return 0;
			i += o[i + 1];
		}
	}
	return 0;
}

static __always_inline bool after(__u32 a, __u32 b)
{
	return (__s32)(b - a) < 0;
}

// on_time_wait: a SYN hits a connection in TIME_WAIT. As the kernel has it, one
// that is newer, by its sequence number or its time, opens a new connection; to
// others the old one answers.
__noinline int on_time_wait(struct __sk_buff *ctx, __u64 cookie, const struct segment *s, __u32 seq, __u32 recent)
{
	__u64 stamp = timestamp(ctx, s);
	bool stamped = stamp && recent;

	if (!s)
		return TC_ACT_SHOT;
	if (stamped && after(recent, stamp))
		return challenge(ctx, s);
	if (after(bpf_ntohl(s->tcp.seq), seq) || (stamped && after(stamp, recent)))
		return reopen(ctx, cookie, s, seq);
	return challenge(ctx, s);
}

// on_syn: a SYN for the proxy. What it hits, other than a listener, gets it,
// without a chance that the kernel, when that closes meanwhile, finds the app.
// PASS_ON: there is nothing.
#define PASS_ON (TC_ACT_VALUE_MAX + 1)

static __always_inline int on_syn(struct __sk_buff *ctx, __u64 cookie, struct segment *s)
{
	struct tcp_timewait_sock *wait = 0;
	struct bpf_sock *sk;
	__u32 state, seq, recent;
	long err;

	sk = find(ctx, &s->tuple, s->four);
	if (!sk)
		return PASS_ON;
	state = sk->state;
	switch (state) {
	case BPF_TCP_LISTEN:
	case BPF_TCP_CLOSE: // a listener that the sk_lookup program gave, and that closes
		bpf_sk_release(sk);
		return PASS_ON;
	case BPF_TCP_TIME_WAIT:
		// Not by bpf_skc_to_tcp_timewait_sock: it doesn't know the
		// children of a listener that is in a sockhash.
		bpf_probe_read_kernel(&wait, sizeof(wait), &sk);
		seq = BPF_CORE_READ(wait, tw_sk.__tw_common.skc_tw_rcv_nxt);
		recent = BPF_CORE_READ(wait, tw_ts_recent);
		bpf_sk_release(sk);
		return on_time_wait(ctx, cookie, s, seq, recent);
	case BPF_TCP_NEW_SYN_RECV:
		// It sends its answer again of its own accord. Where its listener
		// has closed, the kernel drops it now, and the next SYN is new.
		bpf_sk_release(sk);
		return challenge(ctx, s);
	default:
		err = bpf_sk_assign(ctx, sk, 0);
		bpf_sk_release(sk);
		if (!err)
			return TC_NEXT;
		trace_segment(ctx, cookie, s, how(RULE_IN_INCLUDE, PLACE_TC_OWNER, err));
		failed(cookie, PLACE_TC_OWNER, err);
		return TC_ACT_SHOT;
	}
}

// is_assigned: another interface of the pod, on top of which this one lies, has
// given the SYN its listener.
static __always_inline bool is_assigned(struct __sk_buff *ctx, const struct pod *pod)
{
	struct bpf_sock *sk = ctx->sk;

	return sk && sk->state == BPF_TCP_LISTEN && sk->src_port == pod->inbound_port;
}

// find_listener looks where REDIRECT leads: at the pod's address and the
// wildcard. No connection has the port 0. By the client's address the kernel
// chooses among the listeners of a group, by nothing else: each turn chooses anew.
static __always_inline struct bpf_sock *find_listener(struct __sk_buff *ctx, const struct segment *s, const struct pod *pod, __u32 turn)
{
	const struct addr *own = s->four ? &pod->source4 : &pod->source6;
	struct bpf_sock_tuple t = {};

	if (s->four) {
		t.ipv4.saddr = s->tuple.ipv4.saddr ^ turn;
		t.ipv4.daddr = is_zero(own) ? s->tuple.ipv4.daddr : own->w[3];
		t.ipv4.dport = bpf_htons(pod->inbound_port);
	} else {
		__builtin_memcpy(t.ipv6.saddr, s->tuple.ipv6.saddr, sizeof(t.ipv6.saddr));
		t.ipv6.saddr[3] ^= turn;
		if (is_zero(own))
			__builtin_memcpy(t.ipv6.daddr, s->tuple.ipv6.daddr, sizeof(t.ipv6.daddr));
		else
			__builtin_memcpy(t.ipv6.daddr, own, sizeof(t.ipv6.daddr));
		t.ipv6.dport = bpf_htons(pod->inbound_port);
	}
	return find(ctx, &t, s->four);
}

#define TURNS 8 // of looking for a listener

// give_listener gives a packet the proxy's listener, by the errors of
// bpf_sk_assign; -ENOENT: there is none. One that closes at the moment has left
// others of its group, or its successor. One that begins to listen joins its group
// before it can be assigned (EOPNOTSUPP): meanwhile, another has to be chosen.
__noinline int give_listener(struct __sk_buff *ctx, const struct segment *s, const struct pod *pod)
{
	struct bpf_sock *sk;
	long err = -ENOENT;

	if (!s || !pod)
		return err;
	for (int i = 0; i < TURNS && err; i++) {
		sk = find_listener(ctx, s, pod, i);
		if (!sk)
			return -ENOENT;
		err = sk->state == BPF_TCP_LISTEN ? bpf_sk_assign(ctx, sk, 0) : -ENOENT;
		bpf_sk_release(sk);
	}
	return err;
}

SEC("tc")
int shunt_tc(struct __sk_buff *ctx)
{
	struct segment s = {};
	struct pod_state *c;
	struct bpf_sock *sk;
	struct addr daddr;
	enum reading read;
	enum place place;
	struct pod *pod;
	enum rule rule;
	bool syn, owned;
	__u64 cookie;
	int verdict;
	long err;

	if (ctx->pkt_type != PACKET_HOST)
		return TC_NEXT; // no TCP socket takes it
	read = read_segment(ctx, &s);
	if (read == UNREADABLE) {
		// Its headers may just not lie in one piece.
		__builtin_memset(&s, 0, sizeof(s));
		bpf_skb_pull_data(ctx, ctx->len < PULL ? ctx->len : PULL);
		read = read_segment(ctx, &s);
	}
	if (read == NOT_TCP || !s.end)
		return TC_NEXT;
	syn = (s.tcp.flags & (SYN | ACK | RST)) == SYN;
	if (read == READ && !syn) {
		if (s.tcp.flags & RST)
			return TC_NEXT; // no listener minds
		sk = find(ctx, &s.tuple, s.four);
		if (sk) {
			owned = sk->state != BPF_TCP_LISTEN && sk->state != BPF_TCP_CLOSE;
			bpf_sk_release(sk);
			if (owned)
				return TC_NEXT;
		}
	}

	cookie = tc_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!pod || !c) {
		failed(cookie, PLACE_NO_POD, -ENOENT);
		return TC_ACT_SHOT;
	}
	if (syn && is_assigned(ctx, pod))
		return TC_NEXT;
	if (s.four)
		daddr = mapped(s.tuple.ipv4.daddr);
	else
		__builtin_memcpy(&daddr, s.tuple.ipv6.daddr, sizeof(daddr));
	if (!is_local(cookie, &daddr) && passes_through(ctx, &s))
		return TC_NEXT;
	// A tagged frame is another interface's.
	if ((pod->flags & POD_EXCLUDE_IF) && !s.ip && !(ctx->vlan_tci & VLAN_ID) && arrives_excluded(cookie, pod, ctx->ifindex)) {
		if (syn) {
			count(c, RULE_IN_EXCLUDE_INTERFACE);
			trace_segment(ctx, cookie, &s, RULE_IN_EXCLUDE_INTERFACE);
		}
		return TC_NEXT;
	}
	if (read != READ) {
		trace_segment(ctx, cookie, &s, how(RULE_NONE, PLACE_TC_UNREADABLE, -EINVAL));
		failed(cookie, PLACE_TC_UNREADABLE, -EINVAL);
		return TC_ACT_SHOT;
	}
	rule = inbound_rule(cookie, pod, s.port);
	verdict = PASS_ON;
	if (rule == RULE_IN_INCLUDE && syn && !s.fragment)
		verdict = on_syn(ctx, cookie, &s);
	if (verdict == TC_ACT_REDIRECT)
		return verdict; // it comes round once more
	if (syn)
		count(c, rule);
	if (rule != RULE_IN_INCLUDE) {
		if (syn)
			trace_segment(ctx, cookie, &s, rule);
		return TC_NEXT;
	}
	if (s.fragment) {
		// A packet that is put together has no socket any more.
		trace_segment(ctx, cookie, &s, how(rule, PLACE_TC_FRAGMENT, -EINVAL));
		failed(cookie, PLACE_TC_FRAGMENT, -EINVAL);
		return TC_ACT_SHOT;
	}
	if (verdict != PASS_ON) {
		if (verdict == TC_NEXT)
			trace_segment(ctx, cookie, &s, rule);
		return verdict;
	}
	err = give_listener(ctx, &s, pod);
	if (err) {
		place = err == -ENOENT ? PLACE_LISTENER_NONE : PLACE_LISTENER_ASSIGN;
		if (syn)
			trace_segment(ctx, cookie, &s, how(rule, place, err));
		failed(cookie, place, err);
		return refuse(ctx, &s);
	}
	if (syn)
		trace_segment(ctx, cookie, &s, rule);
	return TC_NEXT;
}
