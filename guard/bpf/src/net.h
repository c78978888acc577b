// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Where a workload may connect, and with what kinds of socket.
#ifndef NET_H
#define NET_H

#include "event.h"

/* Fits sockaddr_in and sockaddr_in6. */
struct address {
	__u16 family;
	__u16 port;
	union {
		__u8 four[4]; /* at 4 in sockaddr_in */
		struct {
			__u32 flow;
			__u8 six[16];
		};
	};
};

static __always_inline bool mapped(const __u8 *six)
{
	const __u32 *w = (const __u32 *)six;

	return !w[0] && !w[1] && w[2] == bpf_htonl(0xffff);
}

/* False: the kernel will not send to it, so there is nothing to decide. */
static __always_inline bool parse(const void *from, bool unspecified_is_four, struct destination *d)
{
	struct address a = {};

	if (bpf_probe_read_kernel(&a, sizeof(a), from))
		return false;
	__builtin_memset(d, 0, sizeof(*d));
	d->prefix = 160;
	d->port = a.port;
	if (a.family == AF_INET6 && !mapped(a.six)) {
		d->family = 6;
		__builtin_memcpy(d->addr, a.six, 16);
		return true;
	}
	d->family = 4;
	d->addr[10] = d->addr[11] = 0xff;
	if (a.family == AF_INET6)
		__builtin_memcpy(d->addr + 12, a.six + 12, 4);
	else if (a.family == AF_INET || (a.family == AF_UNSPEC && unspecified_is_four))
		__builtin_memcpy(d->addr + 12, a.four, 4);
	else
		return false;
	return true;
}

/* The rule of the first list that does not allow the destination. */
static __always_inline __u32 egress_ref(const struct policy *p, const struct destination *to)
{
	struct destination key = *to;
	__u32 slot = p->slot & 1, allowed = 0, missing, *lists;
	void *inner;

	inner = bpf_map_lookup_elem(&egress, &slot);
	if (inner) {
		lists = bpf_map_lookup_elem(inner, &key);
		if (lists)
			allowed = *lists;
		key.port = 0;
		lists = bpf_map_lookup_elem(inner, &key);
		if (lists)
			allowed |= *lists;
	}
	missing = p->egress_deny & ~allowed;
	if (!missing)
		missing = p->egress_audit & ~allowed;
	if (!missing)
		return 0;
	for (__u32 i = 0; i < EGRESS_LISTS; i++)
		if (missing & (1u << i))
			return p->egress[i];
	return DENY | RULE_NO_POLICY;
}

static __always_inline bool loopback(const struct destination *d)
{
	return d->family == 4 && d->addr[12] == 127;
}

static __always_inline void tell_connected(const struct policy *p, const struct destination *to)
{
	struct event *e = loopback(to) ? NULL : begin_audit(p, OP_CONNECTED, sizeof(*e));

	if (!e)
		return;
	__builtin_memcpy(e->text, to, sizeof(*to));
	e->text_kind = TEXT_TARGET;
	bpf_ringbuf_submit(e, 0);
}

static __always_inline int reach(const struct destination *to)
{
	struct about a = {.op = OP_EGRESS, .target = to};
	const struct policy *p = policy_now();

	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!(p->egress_deny | p->egress_audit))
		return 0;
	return decide(p, egress_ref(p, to), &a);
}

static __always_inline bool is_inet(__u32 family)
{
	return family == AF_INET || family == AF_INET6;
}

/* A socket that is being taken apart has no family any more; it is judged as
 * one that reaches somewhere. */
static __always_inline __u32 family_of(struct socket *sock)
{
	struct sock *sk = sock->sk;

	return sk ? sk->__sk_common.skc_family : AF_INET;
}

SEC("lsm/socket_connect")
int BPF_PROG(on_connect, struct socket *sock, struct sockaddr *address, int size, int prev)
{
	struct destination to;
	int err;

	if (prev || !is_inet(family_of(sock)) || !is_workload())
		return prev;
	/* An unspecified family takes a connection back. */
	if (!parse(address, false, &to))
		return 0;
	err = reach(&to);
	if (!err)
		tell_connected(policy_now(), &to);
	return err;
}

SEC("lsm/socket_sendmsg")
int BPF_PROG(on_sendmsg, struct socket *sock, struct msghdr *msg, int size, int prev)
{
	struct destination to;
	__u32 family;

	if (prev || !msg->msg_name)
		return prev;
	family = family_of(sock);
	/* An IPv4 socket sends to an address of unspecified family all the same. */
	if (!is_inet(family) || !is_workload() || !parse(msg->msg_name, family == AF_INET, &to))
		return 0;
	return reach(&to);
}

/* Sockets whose traffic the rules above cannot see. */
static __always_inline bool is_raw(int family, int type, int protocol)
{
	switch (family) {
	case AF_UNIX:
		return false;
	case AF_NETLINK:
		return protocol != NETLINK_ROUTE;
	case AF_INET:
	case AF_INET6:
		if (type != SOCK_STREAM && type != SOCK_DGRAM)
			return true;
		/* Multipath TCP connects as TCP does; a further path needs a netlink
		   socket, which is not to be had. */
		return protocol != IPPROTO_IP && protocol != IPPROTO_TCP && protocol != IPPROTO_UDP &&
		       protocol != IPPROTO_ICMP && protocol != IPPROTO_ICMPV6 && protocol != IPPROTO_MPTCP;
	}
	return true;
}

SEC("lsm/socket_create")
int BPF_PROG(on_socket_create, int family, int type, int protocol, int kern, int prev)
{
	struct about a = {.op = OP_RAWSOCKET, .detail = (__u64)(__u32)family << 32 | (__u32)type};
	const struct policy *p;
	__u32 ref;

	if (prev || kern || !is_raw(family, type, protocol) || !is_workload())
		return prev;
	p = policy_now();
	ref = ref_of(p, ON_RAWSOCKET);
	/* A list of destinations means nothing to a socket that writes its own
	   headers. */
	if (p && !(ref & DENY) && (p->egress_deny | p->egress_audit)) {
		struct destination nowhere = {.prefix = 160};
		__u32 other = egress_ref(p, &nowhere);

		if (other & DENY || !ref)
			ref = other;
	}
	return decide(p, ref, &a);
}

#endif
