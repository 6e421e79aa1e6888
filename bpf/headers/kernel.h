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

struct sock_common {
	unsigned char skc_ipv6only : 1;
};

struct sock {
	struct sock_common __sk_common;
	struct socket *sk_socket;
};

#pragma clang attribute pop
