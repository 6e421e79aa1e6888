//go:build ignore

// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
//
// The programs of Shunt's eBPF path. They know sockets, addresses and maps;
// nothing of Kubernetes. The rules they follow, and the order of the rules, are
// those of docs/SEMANTICS.md; enum rule mirrors redirect.Rule.
//
// A pod is known by its network namespace's cookie, never reused until reboot:
// it is part of every key. All programs but one are loaded once a node and
// linked to each pod's cgroup or netns. No kernel lets an sk_lookup program
// learn the netns it runs in: a small one, stamp, of which each pod has its own
// with its slot as a constant, tells the one that comes after it.
//
// Addresses are IPv6 in network byte order everywhere; IPv4 in its mapped form
// (::ffff:a.b.c.d).

#include <linux/bpf.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "kernel.h"

char _license[] SEC("license") = "Dual BSD/GPL";

// ---------------------------------------------------------------- constants

#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOL_IP 0 // as in the level argument of getsockopt
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 // the same number at both levels
#define SOL_SOCKET 1
#define SO_BINDTODEVICE 25
#define SO_MARK 36
#define EPERM 1
#define ENOENT 2
#define EAGAIN 11
#define EEXIST 17
#define ENETUNREACH 101
#define EINVAL 22
#define E2BIG 7
#define ENODEV 19
#define ENOSYS 38
#define ENOTUNIQ 76
#define LOOPBACK_IFINDEX 1 // lo, in every netns
#define DNS_WELL_KNOWN 53
#define TPROXY_MARK 0x539 // internal/tproxy leads it back into the pod
#define PAGE 4096

enum { ALLOW = 1, DENY = 0 }; // return values of the cgroup programs

// SO_REUSEPORT gives a proxy one listener a worker. Each is registered in a slot
// of its own; one of them stands for the whole group, and when it closes another
// takes its place. FIRST_SLOTS are kept by those who came first, the rest are a
// ring of those who came last: of a proxy that reloads, old and new are both
// always represented, however many they are.
#define SLOTS 32
#define FIRST_SLOTS 16

// Sizes. A map with BPF_F_NO_PREALLOC costs nothing until it is filled.
#define MAX_PODS 16384
#define MAX_PREFIXES (1 << 22)
#define MAX_INFLIGHT (1 << 18)
#define MAX_LISTENERS (1 << 16)
#define MAX_ERRORS 4096

// Set by the loader before the load.
const volatile __u32 inflight_limit = 1 << 16; // handshakes under way at once, per pod
const volatile bool have_set_retval = false;   // bpf_set_retval, since Linux 5.18
const volatile bool have_mptcp = false;        // bpf_skc_to_mptcp_sock, since Linux 5.19

// ------------------------------------------------------------------- types

struct addr {
	__be32 w[4];
};

// Why a flow got its verdict; counted per pod. Mirrors redirect.Rule.
enum rule {
	RULE_NONE,
	RULE_OUT_EXCLUDE_INTERFACE,
	RULE_OUT_EXCLUDE_PORT,
	RULE_OUT_PASSTHROUGH,
	RULE_OUT_PROXY_TO_SELF,
	RULE_OUT_LOCAL,
	RULE_OUT_PROXY,
	RULE_OUT_PROXY_GID_TO_SELF,
	RULE_OUT_PROXY_GID_LOCAL,
	RULE_OUT_PROXY_GID,
	RULE_OUT_DNS,
	RULE_OUT_LOOPBACK,
	RULE_OUT_EXCLUDE_CIDR,
	RULE_OUT_INCLUDE_PORT,
	RULE_OUT_INCLUDE_CIDR,
	RULE_OUT_DEFAULT,
	RULE_IN_REROUTE,
	RULE_IN_EXCLUDE_INTERFACE,
	RULE_IN_TUNNEL,
	RULE_IN_EXCLUDE_PORT,
	RULE_IN_INCLUDE,
	RULE_IN_DEFAULT,
	RULE_COUNT,
};

enum pod_flag {
	POD_OUT_ALL = 1 << 0,       // includeOutboundIPRanges is *
	POD_OUT_ALL_PORTS = 1 << 1, // includeOutboundPorts is *
	POD_OUT_PORTS = 1 << 2,     // the ports map has outbound entries
	POD_IN_ALL = 1 << 3,        // includeInboundPorts is *
	POD_IN_PORTS = 1 << 4,      // the ports map has inbound entries
	POD_NO_OUT_LOCAL = 1 << 5,  // an include CIDR is loopback: no out-local rules
	POD_DNS = 1 << 6,           // DNS capture
	POD_TPROXY = 1 << 7,        // the proxy may connect to its app from the client's address
	POD_EXCLUDE_LO = 1 << 8,    // lo is an excluded interface
	POD_EXCLUDE_IF = 1 << 9,    // so is the pod's other one, .interface
	POD_IN_TC = 1 << 15,        // TC is the inbound hook: registered listeners aren't used
};

// One pod's policy, less its lists.
struct pod {
	__u32 uid; // the proxy's, as the host numbers it
	__u32 gid;
	__u32 flags;         // enum pod_flag
	__u16 outbound_port; // host byte order, as are the next three
	__u16 inbound_port;
	__u16 tunnel_port;
	__u16 dns_port;
	__u32 pad;
	// The pod's first address of each family, zero without one: the source
	// of redirected connections, unless a struct dest names another, and the
	// address besides the wildcard at which a proxy is looked for.
	struct addr source4;
	struct addr source6;
	// The name of the pod's only interface besides lo, where one of the two is
	// excluded; zeros behind it.
	__u8 interface[16];
	__u64 own; // the sum, by hash, over the addresses that are DEST_LOCAL in dests
};

#define POD_EXCLUDE (POD_EXCLUDE_LO | POD_EXCLUDE_IF)

enum dest_flag {
	DEST_LOCAL = 1 << 0,   // an address of the pod itself
	DEST_INCLUDE = 1 << 1, // in includeOutboundIPRanges
	DEST_EXCLUDE = 1 << 2, // in excludeOutboundIPRanges
};

struct dest_key {
	__u32 prefixlen; // 64 + the prefix's length
	__u32 cookie[2]; // the netns cookie, in memory order
	struct addr addr;
};

// What a destination is to a pod. The compiler flattens the lists, so that the
// longest prefix has the final word.
struct dest {
	__u32 flags;        // enum dest_flag
	struct addr source; // the source that the pod's routes choose; zero: the pod's first
};

enum direction { DIR_OUT, DIR_IN };

enum port_flag {
	PORT_INCLUDE = 1 << 0,
	PORT_EXCLUDE = 1 << 1,
};

struct port_key {
	__u32 prefixlen; // 80 + 0 to 16
	__u32 cookie[2];
	__u16 direction; // enum direction
	__be16 port;
};

enum listener_kind {
	LISTENER_POD4, // at the pod's own address
	LISTENER_ANY4, // at the wildcard
	LISTENER_POD6,
	LISTENER_ANY6, // for both families
	LISTENER_ONLY6, // IPV6_V6ONLY
	LISTENER_KINDS,
};

enum family { FAMILY4, FAMILY6, FAMILIES };

#define NO_LISTENER ((__u32)-1)

// What the programs themselves know of one pod.
struct pod_state {
	__s64 inflight;          // entries of the inflight map
	__u64 listens;           // listeners registered in the rings
	__u32 inbound[FAMILIES]; // the place of the listener that gets the connections
	// The cookie of the listener in each place, 0: free. Slots of one kind
	// lie side by side.
	__u64 listeners[LISTENER_KINDS * SLOTS];
	__u64 rules[RULE_COUNT]; // flows decided, by rule
	// The kernel's struct net of the netns, whose programs alone look here: it
	// lives for as long as they run.
	__u64 net;
	// How often addresses had come or gone there as they were those of dests,
	// and as that was looked at last.
	__u64 generation;
	__u64 compared;
};

// Where a helper failed.
enum place {
	PLACE_NONE,
	PLACE_CONNECT_STORAGE,   // socket storage could not be had: connect denied
	PLACE_CONNECT_BIND,      // the pod's address could not be bound: the proxy sees another peer address
	PLACE_CONNECT_UNBIND,    // an earlier bind of ours could not be undone
	PLACE_CONNECT_ROOM,      // too many handshakes under way: connect denied
	PLACE_CONNECT_NO_SOURCE, // the pod has no address of that family: connect denied
	PLACE_CONNECT_PORT,      // the destination's port could not be rewritten: connect denied
	PLACE_INFLIGHT_INSERT,   // the handshake could not be noted: its original destination is lost
	PLACE_ACCEPT_STORAGE,    // socket storage could not be had: the original destination is lost
	PLACE_ACCEPT_NO_ENTRY,   // a local connection to the proxy without a note: its original destination is unknown
	PLACE_LISTENER_REGISTER, // the proxy's listener could not be registered: no inbound connections
	PLACE_LISTENER_NONE,     // no listener at the proxy's inbound port: connection refused
	PLACE_LISTENER_ASSIGN,   // the kernel refused the listener for a connection: connection refused
	PLACE_GETSOCKOPT_LOST,   // SO_ORIGINAL_DST asked where it is lost: the question fails
	PLACE_NO_POD,            // a program ran for a pod without an entry: refused
	PLACE_TC_UNREADABLE,     // TC: a packet that may hide a TCP header: dropped
	PLACE_TC_FRAGMENT,       // TC: the first fragment of a segment that belongs to no connection: dropped
	PLACE_TC_OWNER,          // TC: the socket that a SYN hits could not be given it: dropped
	PLACE_TC_REOPEN,         // TC: a connection in TIME_WAIT could not be cleared out of a SYN's way: dropped
	PLACE_SENDMSG_STORAGE,   // socket storage could not be had: the datagram is not sent
	PLACE_SENDMSG_NO_WAY,    // no address of that family, or an interface that is not lo: the datagram is not sent
	PLACE_CONNECT_TPROXY,    // the proxy's connection from a client's address could not be kept in the pod: connect denied
	PLACE_INTERFACES,        // the pod's interfaces are not those of ADD: none is taken for excluded
	PLACE_COUNT,
};

struct error_key {
	__u64 cookie;
	__u32 place; // enum place
	__u32 error; // errno, positive
};

enum socket_flag {
	SOCKET_REDIRECTED = 1 << 0, // the connecting end of a redirected connection
	SOCKET_ACCEPTED = 1 << 1,   // the accepting end at a proxy port
	SOCKET_LOST = 1 << 2,       // original destination unknown: SO_ORIGINAL_DST must fail
	SOCKET_BOUND = 1 << 3,      // has been bound by us: .source is our doing, not its owner's
	SOCKET_WATCHED = 1 << 4,    // we switched its state callbacks on
	SOCKET_MARKED = 1 << 5,     // we gave it TPROXY_MARK
	SOCKET_AT_LO = 1 << 6,      // we bound it to lo
};

// Kept in the socket's own storage, for as long as the socket lives.
struct sock_state {
	__u32 flags; // enum socket_flag
	__be16 port; // of the original destination
	__u16 pad;
	struct addr dst; // the original destination
	struct addr source;
};

// The resolver that a UDP socket has asked last, of each family; zero: none.
// Its port is 53.
struct asked {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct addr last[2]; // by enum family
};

// A handshake with a proxy port inside the pod.
struct tuple {
	__u64 cookie;
	struct addr saddr;
	struct addr daddr;
	__be16 sport;
	__be16 dport;
	__u32 pad;
};

struct handshake {
	__u64 owner; // the connecting socket's cookie
	struct addr dst;
	__be16 port;
	__u16 pad[3];
};

struct listener_key {
	__u64 cookie;
	__u32 place; // as in struct pod_state
	__u32 pad;
};

// What stamp tells the program after it: the pod, and of which connection.
struct stamp {
	__u64 cookie;
	__u32 ifindex;
	__u32 remote_port;
	__u32 local_port;
	__u32 remote_word;
	// The TC program is asking, about a packet that it counts itself.
	__u32 by_tc;
	__u32 pad;
};

// What shunt_adopt is given: the head of a packet that is none.
struct adoption {
	__u8 ethernet[16];
	__u64 cookie; // the pod's
	__u64 listener; // the socket's cookie
	__u32 place; // where user space has put it in the listeners map
	__u32 pad;
};

// Named so that Go gets their numbers: bpf2go sees only what is used.
const enum pod_flag *unused_pod_flag __attribute__((unused));
const enum dest_flag *unused_dest_flag __attribute__((unused));
const enum port_flag *unused_port_flag __attribute__((unused));
const enum direction *unused_direction __attribute__((unused));
const enum rule *unused_rule __attribute__((unused));
const enum place *unused_place __attribute__((unused));
const enum listener_kind *unused_listener_kind __attribute__((unused));
const struct adoption *unused_adoption __attribute__((unused));

// -------------------------------------------------------------------- maps

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod);
} pods SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct dest_key);
	__type(value, struct dest);
} dests SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct port_key);
	__type(value, __u32); // enum port_flag
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PODS);
	__type(key, __u64);
	__type(value, struct pod_state);
} states SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MAX_ERRORS);
	__type(key, struct error_key);
	__type(value, __u64);
} errors SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct sock_state);
} sockets SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct asked);
} resolvers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_INFLIGHT);
	__type(key, struct tuple);
	__type(value, struct handshake);
} inflight SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, MAX_LISTENERS);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct stamp);
} stamps SEC(".maps");

// Which pod a copy of the stamp program serves, by its slot; 0: none. The first
// holds the highest slot that was ever given out.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MAX_PODS);
	__type(key, __u32);
	__type(value, __u64);
} slots SEC(".maps");

// ----------------------------------------------------------------- counting

static __always_inline void count(struct pod_state *c, enum rule r)
{
	if (c)
		__sync_fetch_and_add(&c->rules[r], 1);
}

// failed counts a helper's failure. err is the helper's (negative) result.
__noinline int failed(__u64 cookie, __u32 place, long err)
{
	struct error_key key = { .cookie = cookie, .place = place, .error = err < 0 ? -err : err };
	__u64 one = 1, *n = bpf_map_lookup_elem(&errors, &key);

	if (n)
		__sync_fetch_and_add(n, 1);
	else
		bpf_map_update_elem(&errors, &key, &one, BPF_ANY);
	return 0;
}

// ---------------------------------------------------------------- addresses

#define MAPPED_WORD bpf_htonl(0x0000ffff)

// words reads an address from a context. Contexts can only be read word by word;
// volatile keeps the compiler from joining two.
#define words(p)                                                                           \
	((struct addr){ { *(const volatile __u32 *)&(p)[0], *(const volatile __u32 *)&(p)[1], \
			  *(const volatile __u32 *)&(p)[2], *(const volatile __u32 *)&(p)[3] } })

static __always_inline struct addr mapped(__be32 ip4)
{
	return (struct addr){ { 0, 0, MAPPED_WORD, ip4 } };
}

// lo gives LO, 127.0.0.1 or ::1.
static __always_inline struct addr lo(bool four)
{
	return (struct addr){ { 0, 0, four ? MAPPED_WORD : 0, four ? bpf_htonl(0x7f000001) : bpf_htonl(1) } };
}

// The predicates are written without && and ||: a branch each would multiply the
// paths that the verifier has to follow.

// above is zero if a's first twelve bytes are w.
static __always_inline __u32 above(const struct addr *a, __be32 w)
{
	return a->w[0] | a->w[1] | (a->w[2] ^ w);
}

static __always_inline bool is_mapped(const struct addr *a)
{
	return above(a, MAPPED_WORD) == 0;
}

static __always_inline bool is_zero(const struct addr *a)
{
	return (above(a, 0) | a->w[3]) == 0;
}

// is_any4: 0.0.0.0
static __always_inline bool is_any4(const struct addr *a)
{
	return (above(a, MAPPED_WORD) | a->w[3]) == 0;
}

static __always_inline bool same(const struct addr *a, const struct addr *b)
{
	return ((a->w[0] ^ b->w[0]) | (a->w[1] ^ b->w[1]) | (a->w[2] ^ b->w[2]) | (a->w[3] ^ b->w[3])) == 0;
}

// either is zero if x or y is: 32 by 32 bits can't overflow.
static __always_inline __u64 either(__u32 x, __u32 y)
{
	return (__u64)x * y;
}

// is_loopback: 127.0.0.0/8, ::1, or ::6 (which is on lo), which need no look-up
// to be local
static __always_inline bool is_loopback(const struct addr *a)
{
	__u64 one_or_six = either(a->w[3] ^ bpf_htonl(1), a->w[3] ^ bpf_htonl(6));

	return either(above(a, MAPPED_WORD) | ((a->w[3] ^ bpf_htonl(0x7f000000)) & bpf_htonl(0xff000000)),
		      above(a, 0) | (__u32)(one_or_six | one_or_six >> 32)) == 0;
}

// is_lo: LO of the semantics, 127.0.0.1 or ::1
static __always_inline bool is_lo(const struct addr *a)
{
	return either(above(a, MAPPED_WORD) | (a->w[3] ^ bpf_htonl(0x7f000001)),
		      above(a, 0) | (a->w[3] ^ bpf_htonl(1))) == 0;
}

// is_link_local: fe80::/10
static __always_inline bool is_link_local(const struct addr *a)
{
	return (a->w[0] & bpf_htonl(0xffc00000)) == bpf_htonl(0xfe800000);
}

// is_s6: S6 of the semantics, 127.0.0.6 or ::6: the proxy's source towards its own app
static __always_inline bool is_s6(const struct addr *a)
{
	return either(above(a, MAPPED_WORD) | (a->w[3] ^ bpf_htonl(0x7f000006)),
		      above(a, 0) | (a->w[3] ^ bpf_htonl(6))) == 0;
}

// -------------------------------------------------------------------- rules

static __always_inline struct dest *find_dest(__u64 cookie, const struct addr *a)
{
	struct dest_key key = { .prefixlen = 64 + 128, .cookie = { cookie, cookie >> 32 }, .addr = *a };

	return bpf_map_lookup_elem(&dests, &key);
}

static __always_inline __u32 port_flags(__u64 cookie, enum direction d, __u16 port)
{
	struct port_key key = {
		.prefixlen = 64 + 16 + 16,
		.cookie = { cookie, cookie >> 32 },
		.direction = d,
		.port = bpf_htons(port),
	};
	__u32 *flags = bpf_map_lookup_elem(&ports, &key);

	return flags ? *flags : 0;
}

static __always_inline bool is_local(__u64 cookie, const struct addr *a)
{
	struct dest *d;

	if (is_loopback(a))
		return true;
	d = find_dest(cookie, a);
	return d && (d->flags & DEST_LOCAL);
}

static __always_inline bool is_proxy_port(const struct pod *pod, __u16 port)
{
	return port == pod->outbound_port || port == pod->inbound_port ||
	       ((pod->flags & POD_DNS) && port == pod->dns_port);
}

// One outbound flow, as section 4 of the semantics sees it.
struct flow {
	struct addr dst;
	struct addr src; // what the socket is bound to; zero: nothing
	__u16 port;      // destination, host byte order
	bool local;      // "by lo"
	bool marked;     // the socket has TPROXY_MARK, in a pod of that mode
	bool excluded;   // it leaves by an excluded interface
	__u32 dest;      // enum dest_flag of the destination
	__u32 uid;       // the owner
	__u32 gid;
};

static __always_inline enum rule outbound_rule(__u64 cookie, const struct pod *pod, const struct flow *f)
{
	__u32 listed = (pod->flags & POD_OUT_PORTS) ? port_flags(cookie, DIR_OUT, f->port) : 0;
	bool dns = (pod->flags & POD_DNS) && f->port == DNS_WELL_KNOWN;
	bool to_self = f->local && !is_lo(&f->dst) && f->port != pod->tunnel_port && !dns;
	bool to_local = f->local && !dns && !(pod->flags & POD_NO_OUT_LOCAL);

	if (f->excluded)
		return RULE_OUT_EXCLUDE_INTERFACE;
	if (listed & PORT_EXCLUDE)
		return RULE_OUT_EXCLUDE_PORT;
	if (f->local && is_s6(&f->src))
		return RULE_OUT_PASSTHROUGH;
	// To an address of the pod, and from the client's, the proxy can't say
	// otherwise that it means the app.
	if (f->local && f->marked)
		return RULE_OUT_PASSTHROUGH;

	if (f->uid == pod->uid)
		return to_self ? RULE_OUT_PROXY_TO_SELF : RULE_OUT_PROXY;
	if (to_local)
		return RULE_OUT_LOCAL;
	if (f->gid == pod->gid)
		return to_self ? RULE_OUT_PROXY_GID_TO_SELF : RULE_OUT_PROXY_GID;
	// out-proxy-gid-local can't be reached: out-local came first, and both
	// are absent together.

	if (dns)
		return RULE_OUT_DNS;
	if (is_lo(&f->dst))
		return RULE_OUT_LOOPBACK;
	if (f->dest & DEST_EXCLUDE)
		return RULE_OUT_EXCLUDE_CIDR;
	if ((pod->flags & POD_OUT_ALL_PORTS) || (listed & PORT_INCLUDE))
		return RULE_OUT_INCLUDE_PORT;
	if ((pod->flags & POD_OUT_ALL) || (f->dest & DEST_INCLUDE))
		return RULE_OUT_INCLUDE_CIDR;
	return RULE_OUT_DEFAULT;
}

// decide_outbound is a global function: the verifier follows it once, not once
// for every path that leads to it.
__noinline int decide_outbound(__u64 cookie, const struct pod *pod, const struct flow *f)
{
	return pod && f ? outbound_rule(cookie, pod, f) : RULE_NONE;
}

static __always_inline enum rule inbound_rule(__u64 cookie, const struct pod *pod, __u16 port)
{
	__u32 listed = (pod->flags & POD_IN_PORTS) ? port_flags(cookie, DIR_IN, port) : 0;

	if (port == pod->tunnel_port)
		return RULE_IN_TUNNEL;
	if (pod->flags & POD_IN_ALL)
		return (listed & PORT_EXCLUDE) ? RULE_IN_EXCLUDE_PORT : RULE_IN_INCLUDE;
	return (listed & PORT_INCLUDE) ? RULE_IN_INCLUDE : RULE_IN_DEFAULT;
}

// target_port gives the proxy's port for a rule, 0 for a direct connection.
static __always_inline __u16 target_port(const struct pod *pod, enum rule r)
{
	switch (r) {
	case RULE_OUT_PROXY_TO_SELF:
	case RULE_OUT_PROXY_GID_TO_SELF:
		return pod->inbound_port;
	case RULE_OUT_DNS:
		return pod->dns_port;
	case RULE_OUT_INCLUDE_PORT:
	case RULE_OUT_INCLUDE_CIDR:
		return pod->outbound_port;
	default:
		return 0;
	}
}

#include "interfaces.h"
#include "trace.h"

// ------------------------------------------------------------------ connect

// find_owner reads what iptables' owner match sees: fsuid and fsgid of the
// task that created the socket, kept in its file's credentials whoever holds
// the file now. A socket without a file belongs to nobody; so does one that
// can't be read: it is not the proxy's.
static __always_inline void find_owner(struct sock *sk, struct flow *f)
{
	const struct cred *cred;
	struct socket *so;
	struct file *file;

	f->uid = f->gid = (__u32)-1;
	if (!sk)
		return;
	so = sk->sk_socket;
	if (!so)
		return;
	file = so->file;
	if (!file)
		return;
	cred = file->f_cred;
	if (!cred)
		return;
	f->uid = cred->fsuid.val;
	f->gid = cred->fsgid.val;
}

// find_owner_udp is the same for a UDP socket, which no helper gives with its type.
static __noinline void find_owner_udp(struct bpf_sock *bsk, struct flow *f)
{
	const struct cred *cred = 0;
	struct socket *so = 0;
	struct file *file = 0;
	struct sock *sk = 0;

	f->uid = f->gid = (__u32)-1;
	// From the stack, the pointer comes as a number.
	bpf_probe_read_kernel(&sk, sizeof(sk), &bsk);
	if (sk)
		so = BPF_CORE_READ(sk, sk_socket);
	if (so)
		file = BPF_CORE_READ(so, file);
	if (file)
		cred = BPF_CORE_READ(file, f_cred);
	if (!cred)
		return;
	f->uid = BPF_CORE_READ(cred, fsuid.val);
	f->gid = BPF_CORE_READ(cred, fsgid.val);
}

// bind_to gives the socket a source address; the zero address takes one away.
// The port stays open until connect chooses it.
static __always_inline long bind_to(struct bpf_sock_addr *ctx, const struct addr *a, bool v6)
{
	if (v6) {
		struct sockaddr_in6 sa = { .sin6_family = AF_INET6 };

		__builtin_memcpy(&sa.sin6_addr, a, sizeof(*a));
		return bpf_bind(ctx, (struct sockaddr *)&sa, sizeof(sa));
	} else {
		struct sockaddr_in sa = { .sin_family = AF_INET, .sin_addr.s_addr = a->w[3] };

		return bpf_bind(ctx, (struct sockaddr *)&sa, sizeof(sa));
	}
}

// unbind lets the kernel choose the source again. A socket that was ever bound to
// an address keeps whatever the kernel chooses, beyond failure and
// connect(AF_UNSPEC): SOCKET_BOUND stays, and on_connect notes the choice.
static __always_inline void unbind(struct bpf_sock_addr *ctx, __u64 cookie, struct sock_state *st, bool v6)
{
	struct addr any = {};
	long err;

	if (is_zero(&st->source))
		return;
	err = bind_to(ctx, &any, v6);
	if (err)
		failed(cookie, PLACE_CONNECT_UNBIND, err);
	else
		st->source = any;
}

// listens reports whether a connection to a:port inside the pod would find a
// listener: one at that very address, or at the wildcard.
static __always_inline bool listens(struct bpf_sock_addr *ctx, const struct addr *a, __u16 port)
{
	struct bpf_sock_tuple t = {};
	struct bpf_sock *sk;
	bool found;

	if (is_mapped(a)) {
		t.ipv4.saddr = t.ipv4.daddr = a->w[3];
		t.ipv4.dport = bpf_htons(port);
		sk = bpf_sk_lookup_tcp(ctx, &t, sizeof(t.ipv4), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(t.ipv6.saddr, a, sizeof(*a));
		__builtin_memcpy(t.ipv6.daddr, a, sizeof(*a));
		t.ipv6.dport = bpf_htons(port);
		sk = bpf_sk_lookup_tcp(ctx, &t, sizeof(t.ipv6), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return false;
	found = sk->state == BPF_TCP_LISTEN;
	bpf_sk_release(sk);
	return found;
}

static __always_inline void set_address(struct bpf_sock_addr *ctx, const struct addr *a, __be16 port, bool v6)
{
	ctx->user_port = port;
	if (v6) {
		ctx->user_ip6[0] = a->w[0];
		ctx->user_ip6[1] = a->w[1];
		ctx->user_ip6[2] = a->w[2];
		ctx->user_ip6[3] = a->w[3];
	} else {
		ctx->user_ip4 = a->w[3];
	}
}

static __always_inline int deny(__u64 cookie, __u32 place, long err)
{
	failed(cookie, place, err);
	return DENY; // connect gives EPERM
}

// tell_outbound tells those who trace how a flow was decided. A global function, as
// decide_outbound is.
__noinline int tell_outbound(struct bpf_sock_addr *ctx, __u64 cookie, const struct flow *f, __u32 how)
{
	struct task_struct *task = (struct task_struct *)bpf_get_current_task();
	struct event e = { .cookie = cookie, .how = how };

	if (!f)
		return 0;
	e.dst = f->dst;
	e.dport = f->port;
	e.protocol = ctx->type == SOCK_DGRAM ? IPPROTO_UDP : IPPROTO_TCP;
	e.uid = f->uid;
	e.gid = f->gid;
	e.pid = BPF_CORE_READ(task, tgid);
	BPF_CORE_READ_STR_INTO(&e.comm, task, comm);
	return publish(&e);
}

static __always_inline void trace_outbound(struct bpf_sock_addr *ctx, __u64 cookie, const struct flow *f, enum rule rule)
{
	if (rule && traced())
		tell_outbound(ctx, cookie, f, rule);
}

// deny_flow is deny for a flow that rule was to decide.
static __always_inline int deny_flow(struct bpf_sock_addr *ctx, __u64 cookie, const struct flow *f, enum rule rule, enum place place, long err)
{
	if (traced())
		tell_outbound(ctx, cookie, f, how(rule, place, err));
	return deny(cookie, place, err);
}

static __always_inline int deny_unreachable(struct bpf_sock_addr *ctx, __u64 cookie, const struct flow *f, enum rule rule, enum place place)
{
	if (have_set_retval)
		bpf_set_retval(-ENETUNREACH);
	return deny_flow(ctx, cookie, f, rule, place, -ENETUNREACH);
}

// remember_mptcp: connect sees an MPTCP socket's subflow, getpeername the MPTCP
// socket itself. redirected is the subflow's state, or 0 for a direct connection.
static __always_inline void remember_mptcp(struct bpf_sock *sk, const struct sock_state *redirected)
{
	struct mptcp_sock *msk;
	struct sock_state *st;

	if (!have_mptcp)
		return;
	msk = bpf_skc_to_mptcp_sock(sk);
	if (!msk)
		return;
	st = bpf_sk_storage_get(&sockets, msk, 0, redirected ? BPF_SK_STORAGE_GET_F_CREATE : 0);
	if (!st)
		return;
	st->flags = redirected ? SOCKET_REDIRECTED : 0;
	if (redirected) {
		st->dst = redirected->dst;
		st->port = redirected->port;
	}
}

// complete_flow reads an unspecified destination as the kernel does, and looks
// up what the destination is to the pod. now is the generation of its addresses.
static __always_inline struct dest *complete_flow(__u64 cookie, const struct pod_state *c, __u64 now, struct flow *f, bool v6)
{
	struct dest *dest;

	if (is_any4(&f->src))
		f->src = (struct addr){};
	// IPv4: the address that the socket is bound to; IPv6: the loopback of the
	// family it is bound to.
	if (is_any4(&f->dst))
		f->dst = is_zero(&f->src) ? lo(true) : f->src;
	else if (v6 && is_zero(&f->dst))
		f->dst = lo(is_mapped(&f->src));

	dest = find_dest(cookie, &f->dst);
	if (dest)
		f->dest = dest->flags;
	if (have_changed_since(cookie, c, now))
		renew(cookie, f);
	f->local = is_loopback(&f->dst) || (f->dest & DEST_LOCAL);
	// The kernel answers ::6 from ::6, where for IPv4 it takes 127.0.0.1.
	if (f->local && !is_mapped(&f->dst) && is_zero(&f->src) && is_s6(&f->dst))
		f->src = f->dst;
	return dest;
}

// is_chosen says that the kernel is to choose the source, and that towards the
// original destination it would take another than towards the proxy.
static __always_inline bool is_chosen(const struct flow *f)
{
	return is_zero(&f->src) && !is_loopback(&f->dst);
}

// choice is what it would take; zero: the pod has no address of that family.
static __always_inline struct addr choice(const struct pod *pod, const struct flow *f, const struct dest *dest)
{
	if (f->dest & DEST_LOCAL)
		return f->dst;
	if (dest && !is_zero(&dest->source))
		return dest->source;
	return is_mapped(&f->dst) ? pod->source4 : pod->source6;
}

static __always_inline enum rule dns_rule(__u64 cookie, const struct pod *pod, const struct flow *f)
{
	if (f->excluded)
		return RULE_OUT_EXCLUDE_INTERFACE;
	if ((pod->flags & POD_OUT_PORTS) && (port_flags(cookie, DIR_OUT, DNS_WELL_KNOWN) & PORT_EXCLUDE))
		return RULE_OUT_EXCLUDE_PORT;
	if (f->local && is_s6(&f->src))
		return RULE_OUT_PASSTHROUGH;
	if (f->uid == pod->uid)
		return RULE_OUT_PROXY;
	return RULE_OUT_DNS;
}

// decide_udp is section 4 for UDP to port 53, RULE_OUT_DNS being for the proxy;
// of other datagrams it is RULE_NONE. A global function, as decide_outbound is.
__noinline int decide_udp(__u64 cookie, const struct pod *pod, const struct flow *f)
{
	enum rule rule;

	if (!pod || !f || !(pod->flags & POD_DNS) || f->port != DNS_WELL_KNOWN)
		return RULE_NONE;
	rule = dns_rule(cookie, pod, f);
	count(bpf_map_lookup_elem(&states, &cookie), rule);
	return rule;
}

// remember_asked notes whom a UDP socket asks, for recvmsg. The lock keeps
// threads that share the socket from mixing two addresses.
static __always_inline bool remember_asked(struct bpf_sock *sk, const struct addr *dst)
{
	struct asked *a = bpf_sk_storage_get(&resolvers, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);

	if (!a)
		return false;
	bpf_spin_lock(&a->lock);
	if (is_mapped(dst))
		a->last[FAMILY4] = *dst;
	else
		a->last[FAMILY6] = *dst;
	bpf_spin_unlock(&a->lock);
	return true;
}

// connect_udp has a connected UDP socket ask the proxy. The kernel sets it up as
// it would towards the resolver: the source first.
static __always_inline int connect_udp(struct bpf_sock_addr *ctx, __u64 cookie, const struct pod_state *c, const struct pod *pod, bool v6)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr target, want = {};
	struct sock_state *st;
	struct flow f = {};
	bool ours, captured;
	struct dest *dest;
	enum rule rule;
	long err;

	if (!sk || !(pod->flags & POD_DNS))
		return ALLOW;
	st = bpf_sk_storage_get(&sockets, sk, 0, 0);
	f.port = bpf_ntohs(ctx->user_port);
	if (v6) {
		f.dst = words(ctx->user_ip6);
		f.src = words(sk->src_ip6);
	} else {
		f.dst = mapped(ctx->user_ip4);
		f.src = mapped(sk->src_ip4);
	}
	// A socket that is connected keeps its source, whoever chose it.
	ours = st && (st->flags & SOCKET_BOUND) && sk->state == BPF_TCP_CLOSE && same(&f.src, &st->source);
	if (ours)
		f.src = (struct addr){};
	dest = complete_flow(cookie, c, generation(c->net), &f, v6);
	find_owner_udp(sk, &f);
	if ((pod->flags & POD_EXCLUDE) && f.port == DNS_WELL_KNOWN)
		f.excluded = leaves_excluded(cookie, pod, &f, sk->bound_dev_if);
	rule = decide_udp(cookie, pod, &f);
	captured = rule == RULE_OUT_DNS;

	// A source of ours stays with the socket: it changes with the
	// destination, as the kernel's own would.
	if (is_chosen(&f)) {
		want = choice(pod, &f, dest);
		if (captured && is_zero(&want))
			return deny_unreachable(ctx, cookie, &f, rule, PLACE_CONNECT_NO_SOURCE);
	} else if (ours) {
		want = is_mapped(&f.dst) ? lo(true) : f.dst;
	}
	if (captured) {
		if (!st)
			st = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
		if (!st || !remember_asked(sk, &f.dst))
			return deny_flow(ctx, cookie, &f, rule, PLACE_CONNECT_STORAGE, -EAGAIN);
	}
	trace_outbound(ctx, cookie, &f, rule);
	if (!st)
		return ALLOW;
	if (ours ? !same(&want, &st->source) : captured && !is_zero(&want)) {
		// One that has a port already can't be bound any more.
		err = bind_to(ctx, &want, v6);
		if (err) {
			failed(cookie, PLACE_CONNECT_BIND, err);
		} else {
			st->flags |= SOCKET_BOUND;
			st->source = want;
		}
	}
	if (!captured) {
		st->flags &= ~SOCKET_REDIRECTED;
		return ALLOW;
	}
	st->dst = f.dst;
	st->port = bpf_htons(DNS_WELL_KNOWN);
	st->flags |= SOCKET_REDIRECTED;
	target = lo(is_mapped(&f.dst));
	set_address(ctx, &target, bpf_htons(pod->dns_port), v6);
	return ALLOW;
}

// keep_in_pod has the answers to a connection that the proxy makes to its app
// from a client's address come back: the app's socket takes the mark over
// (tcp_fwmark_accept), and the mark leads all that it sends to lo. Bound to lo,
// the connection also arrives by lo for sk_lookup, which otherwise would see it
// come by the interface that has the pod's address, as the client's own does.
static __always_inline long keep_in_pod(struct bpf_sock_addr *ctx, struct bpf_sock *sk, bool marked)
{
	struct sock_state *st = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	char name[] = "lo";
	int mark = TPROXY_MARK;
	long err;

	if (!st)
		return -EAGAIN;
	if (!marked) {
		err = bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
		if (err)
			return err;
		st->flags |= SOCKET_MARKED;
	}
	if (sk->bound_dev_if)
		return 0;
	err = bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, name, sizeof(name));
	if (!err)
		st->flags |= SOCKET_AT_LO;
	return err;
}

// let_out undoes keep_in_pod, for the next connect of the same socket. Without
// NET_RAW its owner can't leave lo again, and then gets no further than the pod.
static __always_inline long let_out(struct bpf_sock_addr *ctx, struct sock_state *st, bool local)
{
	char none[] = "";
	int mark = 0;
	long err;

	if (st->flags & SOCKET_MARKED) {
		err = bpf_setsockopt(ctx, SOL_SOCKET, SO_MARK, &mark, sizeof(mark));
		if (err)
			return err;
		st->flags &= ~SOCKET_MARKED;
	}
	if (st->flags & SOCKET_AT_LO) {
		err = bpf_setsockopt(ctx, SOL_SOCKET, SO_BINDTODEVICE, none, sizeof(none));
		if (err)
			return local ? 0 : err;
		st->flags &= ~SOCKET_AT_LO;
	}
	return 0;
}

// mark_tproxy is what TPROXY mode adds to connect. A global function, as
// decide_outbound is.
__noinline int mark_tproxy(struct bpf_sock_addr *ctx, __u64 cookie, const struct pod *pod, struct flow *f)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock_state *st;
	long err;

	if (!sk || !pod || !f)
		return -EAGAIN;
	st = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (st && (st->flags & (SOCKET_MARKED | SOCKET_AT_LO))) {
		err = let_out(ctx, st, f->local);
		if (err)
			return err;
	}
	f->marked = sk->mark == TPROXY_MARK;
	if (!f->local || is_zero(&f->src) || is_own(cookie, &f->src))
		return 0;
	if (!f->marked && f->uid != pod->uid && f->gid != pod->gid)
		return 0;
	return keep_in_pod(ctx, sk, f->marked);
}

static __always_inline int connect(struct bpf_sock_addr *ctx, bool v6)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr target, want = {};
	struct sock_state *st;
	struct pod_state *c;
	struct dest *dest;
	struct flow f = {};
	struct pod *pod;
	bool ours, room, udp;
	enum rule rule;
	struct sock *tcp;
	__u64 cookie;
	__u32 sport;
	__u16 port;
	long err;

	udp = ctx->type == SOCK_DGRAM && ctx->protocol == IPPROTO_UDP;
	if (!sk || (!udp && (ctx->type != SOCK_STREAM || (ctx->protocol != IPPROTO_TCP && ctx->protocol != IPPROTO_MPTCP))))
		return ALLOW;
	if (ctx->user_family != (v6 ? AF_INET6 : AF_INET))
		return ALLOW; // the kernel refuses it
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return ALLOW; // another netns, nested in the pod's cgroup: not redirected by iptables either
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!c)
		return deny(cookie, PLACE_NO_POD, -ENOENT);
	if (udp)
		return connect_udp(ctx, cookie, c, pod, v6);
	st = bpf_sk_storage_get(&sockets, sk, 0, 0);

	f.port = bpf_ntohs(ctx->user_port);
	if (v6) {
		f.dst = words(ctx->user_ip6);
		f.src = words(sk->src_ip6);
	} else {
		f.dst = mapped(ctx->user_ip4);
		f.src = mapped(sk->src_ip4);
	}
	sport = sk->src_port;
	ours = st && (st->flags & SOCKET_BOUND) && same(&f.src, &st->source);
	if (ours)
		f.src = (struct addr){}; // to its owner the socket is not bound

	tcp = (struct sock *)bpf_skc_to_tcp_sock(sk);
	dest = complete_flow(cookie, c, tcp ? generation_by(tcp) : generation(c->net), &f, v6);
	find_owner(tcp, &f);
	if (pod->flags & POD_TPROXY) {
		err = mark_tproxy(ctx, cookie, pod, &f);
		if (err)
			return deny_flow(ctx, cookie, &f, RULE_NONE, PLACE_CONNECT_TPROXY, err);
	}
	if (pod->flags & POD_EXCLUDE)
		f.excluded = leaves_excluded(cookie, pod, &f, sk->bound_dev_if);

	rule = decide_outbound(cookie, pod, &f);
	if (rule == RULE_NONE)
		return deny(cookie, PLACE_NO_POD, -ENOENT); // can't be
	asm volatile("" : "+r"(rule)); // or the two tests become one that the verifier doesn't understand
	if (rule >= RULE_COUNT)
		return deny(cookie, PLACE_NO_POD, -ENOENT); // nor this, but it doesn't know
	count(c, rule);
	port = target_port(pod, rule);
	room = c->inflight < inflight_limit;

	if (!port) {
		remember_mptcp(sk, 0);
		if (st) {
			st->flags &= ~SOCKET_REDIRECTED;
			if (ours)
				unbind(ctx, cookie, st, v6);
		}
		if (!room && f.local && is_proxy_port(pod, f.port))
			return deny_flow(ctx, cookie, &f, rule, PLACE_CONNECT_ROOM, -EAGAIN);
		trace_outbound(ctx, cookie, &f, rule);
		return ALLOW;
	}

	if (!room)
		return deny_flow(ctx, cookie, &f, rule, PLACE_CONNECT_ROOM, -EAGAIN);
	if (!st)
		st = bpf_sk_storage_get(&sockets, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!st)
		return deny_flow(ctx, cookie, &f, rule, PLACE_CONNECT_STORAGE, -EAGAIN);

	target = lo(is_mapped(&f.dst));

	// The proxy is to see the peer address that it sees behind iptables: the
	// one that the kernel would have taken towards the original destination.
	if (is_chosen(&f)) {
		want = choice(pod, &f, dest);
		if (is_zero(&want))
			return deny_unreachable(ctx, cookie, &f, rule, PLACE_CONNECT_NO_SOURCE);
	}
	if (is_zero(&want)) {
		if (ours)
			unbind(ctx, cookie, st, v6);
	} else if (!ours || !same(&want, &st->source)) {
		if (ours || !sport) {
			err = bind_to(ctx, &want, v6);
			if (err) {
				failed(cookie, PLACE_CONNECT_BIND, err);
			} else {
				st->flags |= SOCKET_BOUND;
				st->source = want;
			}
		} else if (is_own(cookie, &want) && listens(ctx, &want, port)) {
			// Bound to the wildcard and a port, it can't be bound
			// again; but towards one of the pod's own addresses the
			// kernel takes that address.
			target = want;
		} else {
			failed(cookie, PLACE_CONNECT_BIND, -EEXIST);
		}
	}

	st->dst = f.dst;
	st->port = bpf_htons(f.port);
	st->flags |= SOCKET_REDIRECTED;
	remember_mptcp(sk, st);

	trace_outbound(ctx, cookie, &f, rule);
	set_address(ctx, &target, bpf_htons(port), v6);
	return ALLOW;
}

SEC("cgroup/connect4")
int shunt_connect4(struct bpf_sock_addr *ctx)
{
	return connect(ctx, false);
}

SEC("cgroup/connect6")
int shunt_connect6(struct bpf_sock_addr *ctx)
{
	return connect(ctx, true);
}

// ------------------------------------------------------ DNS over UDP, unconnected

// These are linked to pods with DNS capture only. Of a connected socket they run
// where a datagram is given a destination of its own, and where an answer's sender
// is asked for.

// set_source: volatile, because a context can't be written by a moved pointer.
static __always_inline void set_source(struct bpf_sock_addr *ctx, const struct addr *a, bool v6)
{
	volatile __u32 *w = v6 ? ctx->msg_src_ip6 : &ctx->msg_src_ip4;

	if (v6) {
		w[0] = a->w[0];
		w[1] = a->w[1];
		w[2] = a->w[2];
	}
	w[v6 ? 3 : 0] = a->w[3];
}

static __always_inline int sendmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr target, want = {};
	struct sock_state *st;
	struct flow f = {};
	struct pod_state *c;
	struct asked *asked;
	struct dest *dest;
	struct pod *pod;
	enum rule rule;
	__u64 cookie;
	bool ours;

	if (!sk || ctx->protocol != IPPROTO_UDP)
		return ALLOW;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || !(pod->flags & POD_DNS))
		return ALLOW;
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!c)
		return deny(cookie, PLACE_NO_POD, -ENOENT);

	f.port = bpf_ntohs(ctx->user_port);
	if (v6) {
		f.dst = words(ctx->user_ip6);
		f.src = words(ctx->msg_src_ip6);
	} else {
		f.dst = mapped(ctx->user_ip4);
		f.src = mapped(ctx->msg_src_ip4);
	}
	// connect_udp has bound it, and connect(AF_UNSPEC) left that.
	st = bpf_sk_storage_get(&sockets, sk, 0, 0);
	ours = st && (st->flags & SOCKET_BOUND) && sk->state == BPF_TCP_CLOSE && same(&f.src, &st->source);
	if (ours) {
		f.src = (struct addr){};
		set_source(ctx, &f.src, v6);
	}
	if (f.port != DNS_WELL_KNOWN && f.port != pod->dns_port)
		return ALLOW;
	dest = complete_flow(cookie, c, generation(c->net), &f, v6);
	find_owner_udp(sk, &f);
	if ((pod->flags & POD_EXCLUDE) && f.port == DNS_WELL_KNOWN)
		f.excluded = leaves_excluded(cookie, pod, &f, sk->bound_dev_if);
	rule = decide_udp(cookie, pod, &f);
	if (rule != RULE_OUT_DNS) {
		trace_outbound(ctx, cookie, &f, rule);
		if (f.port != pod->dns_port || !is_lo(&f.dst))
			return ALLOW;
		// What a connected IPv6 socket sends to a mapped address comes here
		// with connect_udp's destination.
		if (st && (st->flags & SOCKET_REDIRECTED) && sk->state == BPF_TCP_ESTABLISHED)
			return ALLOW;
		// Asked under its own address, the proxy answers under it.
		asked = bpf_sk_storage_get(&resolvers, sk, 0, 0);
		if (asked) {
			bpf_spin_lock(&asked->lock);
			asked->last[is_mapped(&f.dst) ? FAMILY4 : FAMILY6] = want;
			bpf_spin_unlock(&asked->lock);
		}
		return ALLOW;
	}

	// The kernel has taken the interface from a link-local destination: by that
	// it would leave for ::1.
	if (is_link_local(&f.dst))
		return deny_unreachable(ctx, cookie, &f, rule, PLACE_SENDMSG_NO_WAY);
	if (is_chosen(&f)) {
		want = choice(pod, &f, dest);
		if (is_zero(&want))
			return deny_unreachable(ctx, cookie, &f, rule, PLACE_SENDMSG_NO_WAY);
		set_source(ctx, &want, v6);
	}
	if (!remember_asked(sk, &f.dst))
		return deny_flow(ctx, cookie, &f, rule, PLACE_SENDMSG_STORAGE, -EAGAIN);
	trace_outbound(ctx, cookie, &f, rule);
	target = lo(is_mapped(&f.dst));
	set_address(ctx, &target, bpf_htons(pod->dns_port), v6);
	return ALLOW;
}

SEC("cgroup/sendmsg4")
int shunt_sendmsg4(struct bpf_sock_addr *ctx)
{
	return sendmsg(ctx, false);
}

SEC("cgroup/sendmsg6")
int shunt_sendmsg6(struct bpf_sock_addr *ctx)
{
	return sendmsg(ctx, true);
}

// An answer of the proxy's comes from the resolver that was asked. Where a socket
// has asked several it is the last, because nothing here tells which question an
// answer is to.
static __always_inline int recvmsg(struct bpf_sock_addr *ctx, bool v6)
{
	struct bpf_sock *sk = ctx->sk;
	struct asked *asked;
	struct addr from;
	struct pod *pod;
	__u64 cookie;

	asked = sk ? bpf_sk_storage_get(&resolvers, sk, 0, 0) : 0;
	if (!asked)
		return ALLOW;
	from = v6 ? words(ctx->user_ip6) : mapped(ctx->user_ip4);
	if (!is_lo(&from))
		return ALLOW;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod || ctx->user_port != bpf_htons(pod->dns_port))
		return ALLOW;
	bpf_spin_lock(&asked->lock);
	if (is_mapped(&from))
		from = asked->last[FAMILY4];
	else
		from = asked->last[FAMILY6];
	bpf_spin_unlock(&asked->lock);
	if (!is_zero(&from))
		set_address(ctx, &from, bpf_htons(DNS_WELL_KNOWN), v6);
	return ALLOW;
}

SEC("cgroup/recvmsg4")
int shunt_recvmsg4(struct bpf_sock_addr *ctx)
{
	return recvmsg(ctx, false);
}

SEC("cgroup/recvmsg6")
int shunt_recvmsg6(struct bpf_sock_addr *ctx)
{
	return recvmsg(ctx, true);
}

// -------------------------------------------------------------- getpeername

// The app is shown the destination that it asked for.
static __always_inline int getpeername(struct bpf_sock_addr *ctx, bool v6)
{
	struct sock_state *st = ctx->sk ? bpf_sk_storage_get(&sockets, ctx->sk, 0, 0) : 0;

	if (st && (st->flags & SOCKET_REDIRECTED))
		set_address(ctx, &st->dst, st->port, v6);
	return ALLOW;
}

SEC("cgroup/getpeername4")
int shunt_getpeername4(struct bpf_sock_addr *ctx)
{
	return getpeername(ctx, false);
}

SEC("cgroup/getpeername6")
int shunt_getpeername6(struct bpf_sock_addr *ctx)
{
	return getpeername(ctx, true);
}

// ------------------------------------------------------------------ sockops

// The original destination goes from the connecting socket to the accepted one
// through the inflight map, keyed by what both ends know of the connection. It
// is there from the SYN until the accepting end is established: nothing that a
// live connection needs stays in a map that could overflow.

static __always_inline void ends(struct bpf_sock_ops *ctx, struct addr *local, struct addr *remote)
{
	if (ctx->family == AF_INET) {
		*local = mapped(ctx->local_ip4);
		*remote = mapped(ctx->remote_ip4);
		return;
	}
	*remote = words(ctx->remote_ip6);
	*local = words(ctx->local_ip6);
	// While an IPv6 socket connects to a mapped address, the kernel has
	// filled in only the IPv4 form of its own.
	if (is_mapped(remote))
		*local = mapped(ctx->local_ip4);
}

static __always_inline void forget(__u64 cookie, const struct tuple *key)
{
	struct pod_state *c;

	if (bpf_map_delete_elem(&inflight, key))
		return; // the other end was first
	c = bpf_map_lookup_elem(&states, &cookie);
	if (c)
		__sync_fetch_and_add(&c->inflight, -1);
}

// listener_kind_of: which of the pod's inbound listeners is this socket?
// LISTENER_KINDS: none, REDIRECT would not look there.
static __always_inline __u32 listener_kind_of(struct bpf_sock_ops *ctx, const struct pod *pod)
{
	struct bpf_sock *bsk = ctx->sk;
	struct addr a;

	if (ctx->local_port != pod->inbound_port)
		return LISTENER_KINDS;
	if (bsk && bsk->bound_dev_if == LOOPBACK_IFINDEX)
		return LISTENER_KINDS;
	a = ctx->family == AF_INET ? mapped(ctx->local_ip4) : words(ctx->local_ip6);
	if (is_zero(&a)) {
		struct sock *sk = bsk ? (struct sock *)bpf_skc_to_tcp_sock(bsk) : 0;

		return sk && BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_ipv6only) ? LISTENER_ONLY6 : LISTENER_ANY6;
	}
	if (is_any4(&a))
		return LISTENER_ANY4;
	if (same(&a, &pod->source4))
		return LISTENER_POD4;
	if (same(&a, &pod->source6))
		return LISTENER_POD6;
	return LISTENER_KINDS;
}

static __always_inline void set_state_callbacks(struct bpf_sock_ops *ctx, bool on)
{
	__u32 flags = ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_STATE_CB_FLAG;

	bpf_sock_ops_cb_flags_set(ctx, on ? flags | BPF_SOCK_OPS_STATE_CB_FLAG : flags);
}

// place_of gives the i-th place in the order in which the kernel looks.
static __always_inline __u32 place_of(__u32 family, int i)
{
	__u32 kind = i / SLOTS == 2 ? LISTENER_ANY6 :
		     family == FAMILY4 ? LISTENER_POD4 + i / SLOTS :
		     i / SLOTS	       ? LISTENER_ONLY6 : LISTENER_POD6;

	return kind * SLOTS + i % SLOTS;
}

// choose picks the listener that gets a family's inbound connections: in the
// kernel's own order the exact address before the wildcard, the family's own
// sockets before those for both.
//
// If the one that is chosen closes at the same moment, either it is seen to be
// gone here, or it chooses after us: whoever chooses last chooses right.
static __always_inline void choose(struct pod_state *c, __u32 family)
{
	for (int try = 0; try < 3; try++) {
		__u32 chosen = NO_LISTENER;

		for (int i = 0; i < 3 * SLOTS && chosen == NO_LISTENER; i++) {
			__u32 place = place_of(family, i);

			if (*(volatile __u64 *)&c->listeners[place])
				chosen = place;
		}
		*(volatile __u32 *)&c->inbound[family] = chosen;
		if (chosen >= LISTENER_KINDS * SLOTS || *(volatile __u64 *)&c->listeners[chosen])
			return;
	}
}

// Not static, as are on_listen and on_unlisten: the verifier follows a global
// function once, not once for every path that leads to it.
__noinline int choose_all(__u64 cookie)
{
	struct pod_state *c = bpf_map_lookup_elem(&states, &cookie);

	if (!c)
		return failed(cookie, PLACE_NO_POD, -ENOENT);
	choose(c, FAMILY4);
	choose(c, FAMILY6);
	return 0;
}

__noinline int on_listen(struct bpf_sock_ops *ctx, __u64 cookie, __u32 kind)
{
	struct listener_key key = { .cookie = cookie };
	__u64 self = bpf_get_socket_cookie(ctx);
	struct pod_state *c;
	struct pod *pod;
	__u32 place;
	long err = -EEXIST;

	pod = bpf_map_lookup_elem(&pods, &cookie);
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!pod || !c)
		return failed(cookie, PLACE_NO_POD, -ENOENT);
	for (int i = 0; i < FIRST_SLOTS && err == -EEXIST; i++) {
		key.place = kind * SLOTS + i;
		err = bpf_sock_hash_update(ctx, &listeners, &key, BPF_NOEXIST);
	}
	if (err == -EEXIST) {
		key.place = kind * SLOTS + FIRST_SLOTS +
			    __sync_fetch_and_add(&c->listens, 1) % (SLOTS - FIRST_SLOTS);
		err = bpf_sock_hash_update(ctx, &listeners, &key, BPF_ANY);
	}
	// TC needs no registration: it is for what comes by a later interface, and for
	// the day on which the pod goes back to sk_lookup.
	if (err)
		return (pod->flags & POD_IN_TC) ? 0 : failed(cookie, PLACE_LISTENER_REGISTER, err);
	// A copy: the verifier of Linux 6.12 does not take what is read from the
	// stack a second time for what was compared the first time.
	place = key.place;
	if (place < LISTENER_KINDS * SLOTS)
		c->listeners[place] = self;
	set_state_callbacks(ctx, true);
	return choose_all(cookie);
}

// on_unlisten: a registered listener has closed, and the kernel has taken it out
// of its slot.
__noinline int on_unlisten(struct bpf_sock_ops *ctx, __u64 cookie)
{
	__u64 self = bpf_get_socket_cookie(ctx);
	struct pod_state *c;

	c = bpf_map_lookup_elem(&states, &cookie);
	if (!c)
		return failed(cookie, PLACE_NO_POD, -ENOENT);
	for (int i = 0; i < LISTENER_KINDS * SLOTS; i++)
		if (c->listeners[i] == self)
			c->listeners[i] = 0;
	return choose_all(cookie);
}

// A listener that was open before there was a hook to see it open is put into
// the listeners map by user space, which then has this run once, by
// BPF_PROG_TEST_RUN. It is attached to nothing.
SEC("tc")
int shunt_adopt(struct __sk_buff *skb)
{
	struct adoption *a = (void *)(long)skb->data;
	struct pod_state *c;
	__u64 cookie;

	if ((void *)(a + 1) > (void *)(long)skb->data_end)
		return -1;
	cookie = a->cookie;
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!c || a->place >= LISTENER_KINDS * SLOTS)
		return -1;
	c->listeners[a->place] = a->listener;
	return choose_all(cookie);
}

static __always_inline void on_connect(struct bpf_sock_ops *ctx, __u64 cookie)
{
	__u16 port = bpf_ntohl(ctx->remote_port);
	struct tuple key = { .cookie = cookie };
	struct handshake h = {};
	struct sock_state *st;
	struct bpf_sock *sk;
	struct pod_state *c;
	struct pod *pod;
	bool redirected;
	long err;

	sk = ctx->sk;
	st = sk ? bpf_sk_storage_get(&sockets, sk, 0, 0) : 0;
	ends(ctx, &key.saddr, &key.daddr);
	if (st && (st->flags & SOCKET_BOUND))
		st->source = key.saddr;
	redirected = st && (st->flags & SOCKET_REDIRECTED);
	if (!redirected) { // else it goes to a proxy port: connect has sent it there
		pod = bpf_map_lookup_elem(&pods, &cookie);
		if (!pod || !is_proxy_port(pod, port) || !is_own(cookie, &key.daddr))
			return;
	}
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!c)
		return;
	key.sport = bpf_htons(ctx->local_port);
	key.dport = bpf_htons(port);

	// A direct connection to a proxy port has its own destination.
	h.owner = bpf_get_socket_cookie(ctx);
	h.dst = key.daddr;
	h.port = key.dport;
	if (redirected) {
		h.dst = st->dst;
		h.port = st->port;
	}

	err = bpf_map_update_elem(&inflight, &key, &h, BPF_NOEXIST);
	if (!err)
		__sync_fetch_and_add(&c->inflight, 1);
	else if (err == -EEXIST)
		err = bpf_map_update_elem(&inflight, &key, &h, BPF_EXIST);
	if (err) {
		failed(cookie, PLACE_INFLIGHT_INSERT, err);
		return;
	}
	if (ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG)
		return; // somebody else's: they stay on
	set_state_callbacks(ctx, true);
	if (st)
		st->flags |= SOCKET_WATCHED;
}

static __always_inline void on_accept(struct bpf_sock_ops *ctx, __u64 cookie, const struct pod *pod)
{
	struct sock_state init = { .flags = SOCKET_ACCEPTED };
	struct tuple key = { .cookie = cookie };
	struct handshake *h;
	struct bpf_sock *sk;

	// Inherited from the listener, where on_listen switched them on.
	if (ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG)
		set_state_callbacks(ctx, false);
	if (!is_proxy_port(pod, ctx->local_port))
		return;
	ends(ctx, &key.daddr, &key.saddr);
	key.sport = bpf_htons(bpf_ntohl(ctx->remote_port));
	key.dport = bpf_htons(ctx->local_port);

	h = bpf_map_lookup_elem(&inflight, &key);
	if (h) {
		init.dst = h->dst;
		init.port = h->port;
	} else if (is_own(cookie, &key.saddr)) {
		init.flags = SOCKET_LOST;
		failed(cookie, PLACE_ACCEPT_NO_ENTRY, -ENOENT);
	} else {
		init.dst = key.daddr;
		init.port = key.dport;
	}
	sk = ctx->sk;
	if (!sk || !bpf_sk_storage_get(&sockets, sk, &init, BPF_SK_STORAGE_GET_F_CREATE))
		failed(cookie, PLACE_ACCEPT_STORAGE, -EAGAIN); // getsockopt knows by its absence
	if (h)
		forget(cookie, &key);
}

// on_state: a connecting socket that has noted a handshake changes its state.
// The note goes when the socket closes before the proxy's end came to be; while
// the proxy's backlog is full, that may be long after connect succeeded. A note
// says itself whose it is: the pod need not be looked up.
static __always_inline void on_state(struct bpf_sock_ops *ctx, __u64 cookie)
{
	struct tuple key = { .cookie = cookie };
	struct handshake *h;
	struct sock_state *st;
	struct bpf_sock *sk;

	ends(ctx, &key.saddr, &key.daddr);
	key.sport = bpf_htons(ctx->local_port);
	key.dport = bpf_htons(bpf_ntohl(ctx->remote_port));
	h = bpf_map_lookup_elem(&inflight, &key);
	if (h && h->owner == bpf_get_socket_cookie(ctx)) {
		if (ctx->args[1] == BPF_TCP_CLOSE)
			forget(cookie, &key);
		return;
	}
	// Nothing left to watch for. A closed socket has no other state to come, unless
	// it connects again: then there is another note.
	if (ctx->args[1] == BPF_TCP_CLOSE)
		return;
	sk = ctx->sk;
	st = sk ? bpf_sk_storage_get(&sockets, sk, 0, 0) : 0;
	if (st && (st->flags & SOCKET_WATCHED)) {
		st->flags &= ~SOCKET_WATCHED;
		set_state_callbacks(ctx, false);
	}
}

SEC("sockops")
int shunt_sockops(struct bpf_sock_ops *ctx)
{
	struct pod *pod;
	__u32 kind, op = ctx->op;
	__u64 cookie;

	// The kernel asks for more than this, several times a connection.
	if (op != BPF_SOCK_OPS_TCP_LISTEN_CB && op != BPF_SOCK_OPS_TCP_CONNECT_CB &&
	    op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_STATE_CB)
		return 1;
	if (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] == BPF_TCP_ESTABLISHED)
		return 1;
	// The pod is looked up only where it has to be known.
	cookie = bpf_get_netns_cookie(ctx);
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		on_connect(ctx, cookie);
		return 1;
	}
	if (op == BPF_SOCK_OPS_STATE_CB && ctx->args[0] != BPF_TCP_LISTEN) {
		on_state(ctx, cookie);
		return 1;
	}
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return 1;
	switch (op) {
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		kind = listener_kind_of(ctx, pod);
		if (kind < LISTENER_KINDS)
			on_listen(ctx, cookie, kind);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		on_accept(ctx, cookie, pod);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->local_port == pod->inbound_port)
			on_unlisten(ctx, cookie);
		break;
	}
	return 1;
}

// --------------------------------------------------------------- getsockopt

// answer writes a socket address in the form of the level that was asked.
static __always_inline int answer(struct bpf_sockopt *ctx, const struct addr *a, __be16 port)
{
	if (ctx->level == SOL_IP) {
		struct sockaddr_in *sin = ctx->optval;

		if (!is_mapped(a) || (void *)(sin + 1) > ctx->optval_end)
			return ALLOW; // what the kernel said stands
		__builtin_memset(sin, 0, sizeof(*sin));
		sin->sin_family = AF_INET;
		sin->sin_port = port;
		sin->sin_addr.s_addr = a->w[3];
		ctx->optlen = sizeof(*sin);
	} else {
		struct sockaddr_in6 *sin6 = ctx->optval;

		if ((void *)(sin6 + 1) > ctx->optval_end)
			return ALLOW;
		__builtin_memset(sin6, 0, sizeof(*sin6));
		sin6->sin6_family = AF_INET6;
		sin6->sin6_port = port;
		__builtin_memcpy(&sin6->sin6_addr, a, sizeof(*a));
		ctx->optlen = sizeof(*sin6);
	}
	ctx->retval = 0; // the kernel's own handler has usually failed
	return ALLOW;
}

// translated reports whether netfilter has brought the connection to this port
// from another one: then connection tracking has given the answer. While a pod
// goes from iptables to us or back, both are in force: what iptables has
// redirected is told of rightly until its rules go.
static __always_inline bool translated(struct bpf_sockopt *ctx, struct bpf_sock *sk)
{
	struct sockaddr_in *sin = ctx->optval; // as in struct sockaddr_in6, as far as the port

	if (ctx->retval || (void *)(sin + 1) > ctx->optval_end)
		return false;
	return sin->sin_port != bpf_htons(sk->src_port);
}

SEC("cgroup/getsockopt")
int shunt_getsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sock_state *st;
	struct pod *pod;
	struct addr a;
	__u64 cookie;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6)) {
		// Before Linux 6.5 a longer buffer makes the call fail unless it
		// is left alone: optlen 0 says so.
		if (ctx->optlen > PAGE)
			ctx->optlen = 0;
		return ALLOW;
	}
	if (!sk || sk->protocol != IPPROTO_TCP || (ctx->level == SOL_IPV6 && sk->family != AF_INET6))
		return ALLOW;
	if (sk->state == BPF_TCP_LISTEN || sk->state == BPF_TCP_CLOSE || sk->state == BPF_TCP_SYN_SENT)
		return ALLOW;
	cookie = bpf_get_netns_cookie(ctx);
	pod = bpf_map_lookup_elem(&pods, &cookie);
	if (!pod)
		return ALLOW;

	st = bpf_sk_storage_get(&sockets, sk, 0, 0);
	if (st && (st->flags & SOCKET_REDIRECTED))
		return answer(ctx, &st->dst, st->port);
	if (translated(ctx, sk))
		return ALLOW;
	if (st && (st->flags & SOCKET_ACCEPTED))
		return answer(ctx, &st->dst, st->port);
	if ((st && (st->flags & SOCKET_LOST)) || is_proxy_port(pod, sk->src_port))
		return deny(cookie, PLACE_GETSOCKOPT_LOST, -ENOENT);
	if (ctx->retval == 0)
		return ALLOW; // connection tracking is on and knows

	// Not redirected by rewriting: sk_lookup and direct connections keep
	// the destination as the accepted socket's own address.
	if (sk->family == AF_INET)
		a = mapped(sk->src_ip4);
	else
		a = words(sk->src_ip6);
	return answer(ctx, &a, bpf_htons(sk->src_port));
}

// ---------------------------------------------------------------- sk_lookup

// own_slot is this copy's number: a placeholder until the loader puts it in its
// place.
static __always_inline __u32 own_slot(void)
{
	__u64 slot;

	asm volatile("%0 = 0x544f4c534e574f ll" : "=r"(slot));
	return slot;
}

// remote_word is a part of the client's address: of the two, the one that is not
// of the packet's family reads as zero.
static __always_inline __u32 remote_word(struct bpf_sk_lookup *ctx)
{
	return ctx->remote_ip4 | ctx->remote_ip6[3];
}

// The first of the two programs of a netns. Each pod has a copy of its own: it is
// kept small.
SEC("sk_lookup")
int shunt_stamp(struct bpf_sk_lookup *ctx)
{
	__u32 zero = 0, slot = own_slot();
	struct stamp *s;
	__u64 *cookie;

	s = bpf_map_lookup_elem(&stamps, &zero);
	cookie = bpf_map_lookup_elem(&slots, &slot);
	if (s && cookie) {
		s->cookie = *cookie;
		s->ifindex = ctx->ingress_ifindex;
		s->remote_port = ctx->remote_port;
		s->local_port = ctx->local_port;
		s->remote_word = remote_word(ctx);
	}
	return SK_PASS;
}

static __always_inline long assign(struct bpf_sk_lookup *ctx, const struct listener_key *key)
{
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, key);
	long err;

	if (!sk)
		return -ENOENT;
	// One that is bound to another interface would not be found either.
	if (sk->bound_dev_if && sk->bound_dev_if != ctx->ingress_ifindex)
		err = -ENOENT;
	else
		err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return err;
}

// tell_inbound is tell_outbound for a connection that arrives.
__noinline int tell_inbound(struct bpf_sk_lookup *ctx, __u64 cookie, __u32 how)
{
	struct event e = {
		.cookie = cookie,
		.how = how,
		.sport = bpf_ntohs(ctx->remote_port),
		.dport = ctx->local_port,
		.protocol = IPPROTO_TCP,
		.ifindex = ctx->ingress_ifindex,
	};

	if (ctx->family == AF_INET) {
		e.src = mapped(ctx->remote_ip4);
		e.dst = mapped(ctx->local_ip4);
	} else {
		e.src = words(ctx->remote_ip6);
		e.dst = words(ctx->local_ip6);
	}
	return publish(&e);
}

static __always_inline void trace_inbound(struct bpf_sk_lookup *ctx, __u64 cookie, __u32 how)
{
	if (traced())
		tell_inbound(ctx, cookie, how);
}

// The second. The kernel runs both in one go, with bottom halves off for
// packets; where something else comes between (a look-up on behalf of a process,
// or softirqs that can be preempted), the stamp is not of this connection, and
// the connection is refused: the client tries again.
SEC("sk_lookup")
int shunt_sk_lookup(struct bpf_sk_lookup *ctx)
{
	struct listener_key key = {};
	struct pod_state *c;
	struct addr remote;
	struct stamp *s;
	struct pod *pod;
	enum place place;
	enum rule rule;
	__u32 zero = 0;
	__u64 cookie;
	bool four;
	long err;

	if (ctx->protocol != IPPROTO_TCP)
		return SK_PASS;
	// What comes by lo is the pod's own; 0 is a look-up by a BPF program,
	// not a packet.
	if (ctx->ingress_ifindex <= LOOPBACK_IFINDEX)
		return SK_PASS;
	s = bpf_map_lookup_elem(&stamps, &zero);
	if (!s)
		return SK_DROP;
	cookie = s->cookie;
	s->cookie = 0;
	if (s->ifindex != ctx->ingress_ifindex || s->remote_port != ctx->remote_port ||
	    s->local_port != ctx->local_port || s->remote_word != remote_word(ctx))
		cookie = 0;
	pod = bpf_map_lookup_elem(&pods, &cookie);
	c = bpf_map_lookup_elem(&states, &cookie);
	if (!pod || !c) {
		failed(cookie, PLACE_NO_POD, -ENOENT);
		return SK_DROP;
	}

	// For IPv4 the interface is that of the route, which for the pod's own
	// address is where that address lies: the source tells. From outside the
	// kernel takes no such IPv4 packet, and the answer to a forged IPv6 one
	// stays inside the pod.
	four = ctx->family == AF_INET;
	remote = four ? mapped(ctx->remote_ip4) : words(ctx->remote_ip6);
	have_changed(cookie, c); // or it is asked for each time
	if (is_own(cookie, &remote))
		return SK_PASS;

	if ((pod->flags & POD_EXCLUDE_IF) && arrives_excluded(cookie, pod, ctx->ingress_ifindex))
		rule = RULE_IN_EXCLUDE_INTERFACE;
	else
		rule = inbound_rule(cookie, pod, ctx->local_port);
	// Behind TC this is for what comes by an interface that has no TC program. What
	// one has let pass is let pass here, and counted there.
	if (rule != RULE_IN_INCLUDE) {
		if (!(pod->flags & POD_IN_TC)) {
			count(c, rule);
			trace_inbound(ctx, cookie, rule);
		}
		return SK_PASS;
	}
	// The TC program looks for the proxy's listener by its port; to there,
	// REDIRECT changes nothing.
	if ((pod->flags & POD_IN_TC) && ctx->local_port == pod->inbound_port)
		return SK_PASS;
	if (!s->by_tc)
		count(c, rule);

	key.cookie = cookie;
	key.place = four ? c->inbound[FAMILY4] : c->inbound[FAMILY6];
	err = assign(ctx, &key);
	// One that closes leaves the map, or refuses, a moment before on_unlisten
	// hears of it: the others of its group are as good.
	for (int i = 0; i < 3 * SLOTS && err; i++) {
		key.place = place_of(four ? FAMILY4 : FAMILY6, i);
		if (*(volatile __u64 *)&c->listeners[key.place])
			err = assign(ctx, &key);
	}
	if (err) {
		place = err == -ENOENT ? PLACE_LISTENER_NONE : PLACE_LISTENER_ASSIGN;
		if (!s->by_tc) {
			failed(cookie, place, err);
			trace_inbound(ctx, cookie, how(rule, place, err));
		}
		return SK_DROP; // the client gets a RST
	}
	if (!s->by_tc)
		trace_inbound(ctx, cookie, rule);
	return SK_PASS;
}

#include "tc.h"
