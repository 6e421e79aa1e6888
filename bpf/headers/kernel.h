/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The few kernel structures that the programs look into. Only the fields that
 * are used; where they lie is settled at load time from the kernel's BTF.
 */
#pragma once

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct cred {
	kuid_t fsuid;
	kgid_t fsgid;
};

struct file {
	const struct cred *f_cred;
};

struct socket {
	struct file *file;
};

struct list_head {
	struct list_head *next;
};

typedef struct {
	int counter;
} atomic_t;

struct netns_ipv4 {
	atomic_t dev_addr_genid;
};

struct netns_ipv6 {
	atomic_t dev_addr_genid;
};

struct net {
	__u64 net_cookie;
	struct list_head dev_base_head;
	struct netns_ipv4 ipv4;
	struct netns_ipv6 ipv6;
};

typedef struct {
	struct net *net;
} possible_net_t;

struct sock_common {
	unsigned char skc_ipv6only : 1;
	possible_net_t skc_net;
	__u32 skc_tw_rcv_nxt;
};

struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket;
};

struct inet_timewait_sock {
	struct sock_common __tw_common;
};

struct tcp_timewait_sock {
	struct inet_timewait_sock tw_sk;
	__u32 tw_ts_recent;
};

struct in_ifaddr {
	struct in_ifaddr *ifa_next;
	__be32 ifa_local;
};

struct in_device {
	struct in_ifaddr *ifa_list;
};

struct inet6_ifaddr {
	struct in6_addr addr;
	__u32 flags;
	struct list_head if_list;
};

struct inet6_dev {
	struct list_head addr_list;
};

struct net_device {
	char name[16];
	unsigned int flags;
	int ifindex;
	struct list_head dev_list;
	possible_net_t nd_net;
	struct in_device *ip_ptr;
	struct inet6_dev *ip6_ptr;
};

struct sk_buff {
	struct net_device *dev;
};

struct task_struct {
	int tgid;
	char comm[16];
};

#pragma clang attribute pop
