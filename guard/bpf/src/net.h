// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Whom a workload may reach, who may reach it, and with what kinds of socket.
// Sockets are judged first, where there is an error to give and a process to
// name; packets again.
#ifndef NET_H
#define NET_H

#include "exec.h"

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

static __always_inline void set_four(struct destination *d, const void *four)
{
	d->family = TO_4;
	d->addr[10] = d->addr[11] = 0xff;
	__builtin_memcpy(d->addr + 12, four, 4);
}

static __always_inline void set_six(struct destination *d, const __u8 *six)
{
	d->family = mapped(six) ? TO_4 : TO_6;
	__builtin_memcpy(d->addr, six, 16);
}

/* Reads an address out of a socket, which has one of either kind. */
static __always_inline void set_address(struct destination *d, __u32 family, const void *four, const void *six)
{
	__u8 text[16] = {};

	if (family == AF_INET) {
		bpf_probe_read_kernel(text, 4, four);
		set_four(d, text);
	} else {
		bpf_probe_read_kernel(text, 16, six);
		set_six(d, text);
	}
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
	if (a.family == AF_INET6)
		set_six(d, a.six);
	else if (a.family == AF_INET || (a.family == AF_UNSPEC && unspecified_is_four))
		set_four(d, a.four);
	else
		return false;
	return true;
}

static __always_inline __u32 by_protocol(const struct lists *l, __u32 protocol)
{
	switch (protocol) {
	case IPPROTO_TCP:
	case IPPROTO_MPTCP:
		return l->tcp;
	case IPPROTO_UDP:
		return l->udp;
	}
	return l->other;
}

#define DNS 53
#define DNS_ENCRYPTED 853

/* The lists that allow an address; for_dns are those that open the ports of DNS
   only to whom they name. */
ONCE int allowing(const struct destination *at, __u32 slot, __u32 protocol, __u32 for_dns)
{
	__u32 exact = 0, any = 0;
	struct destination key;
	struct lists *l;
	void *inner;

	inner = bpf_map_lookup_elem(&egress, &slot);
	if (!inner || !at)
		return 0;
	key = *at;
	l = bpf_map_lookup_elem(inner, &key);
	if (l)
		exact = by_protocol(l, protocol);
	key.port = 0;
	l = bpf_map_lookup_elem(inner, &key);
	if (l)
		any = by_protocol(l, protocol);
	if (at->port == bpf_htons(DNS) || at->port == bpf_htons(DNS_ENCRYPTED))
		any &= ~for_dns;
	return exact | any;
}

static __always_inline __u32 allowed(const struct policy *p, const struct destination *at, __u32 protocol)
{
	return allowing(at, slot_of(p), protocol, p->rule[DNS_LISTS]);
}

/* The rule of the first list that does not allow what the others do. */
static __always_inline __u32 missing_ref(const struct policy *p, __u32 deny, __u32 audit, __u32 lists)
{
	__u32 missing = deny & ~lists;

	if (!missing)
		missing = audit & ~lists;
	if (!missing)
		return 0;
	return p->egress[first_bit(missing) & (EGRESS_LISTS - 1)];
}

/* The lists that allow the names which an address was learnt by. */
ONCE int allowing_names(const struct destination *to, __u32 slot, __u32 protocol, __u32 for_dns)
{
	struct destination key = {.prefix = 160, .family = TO_NAME};
	__u64 now = bpf_ktime_get_boot_ns();
	struct learnt *l;
	__u32 lists = 0;

	if (!to)
		return 0;
	__builtin_memcpy(key.addr, to->addr, sizeof(key.addr));
	l = bpf_map_lookup_elem(&learnt, key.addr);
	if (!l)
		return 0;
	__builtin_memset(key.addr, 0, sizeof(key.addr));
	key.port = to->port;
	for (int i = 0; i < LEARNT_NAMES; i++) {
		__u64 name = l->of[i].name;

		if (l->of[i].until < now || !name)
			continue;
		__builtin_memcpy(key.addr, &name, sizeof(name));
		lists |= allowing(&key, slot, protocol, for_dns);
	}
	return lists;
}

static __always_inline __u32 egress_ref(const struct policy *p, const struct destination *to, __u32 protocol)
{
	__u32 lists = allowed(p, to, protocol);

	if (p->rule[HAS_NAMES] && (p->egress_deny | p->egress_audit) & ~lists)
		lists |= allowing_names(to, slot_of(p), protocol, p->rule[DNS_LISTS]);
	return missing_ref(p, p->egress_deny, p->egress_audit, lists);
}

static __always_inline bool has_egress(const struct policy *p)
{
	return p->egress_deny | p->egress_audit;
}

static __always_inline bool has_ingress(const struct policy *p)
{
	return p->rule[INGRESS_DENY] | p->rule[INGRESS_AUDIT];
}

static __always_inline __u32 ingress_ref(const struct policy *p, __u32 lists)
{
	return missing_ref(p, p->rule[INGRESS_DENY], p->rule[INGRESS_AUDIT], lists);
}

static __always_inline bool loopback(const struct destination *d)
{
	const __u32 *w = (const __u32 *)d->addr;

	if ((d->family & 0xff) == TO_4)
		return d->addr[12] == 127;
	return !w[0] && !w[1] && !w[2] && w[3] == bpf_htonl(1);
}

/* For the record only. */
static __always_inline void tell_address(const struct policy *p, __u32 op, const struct destination *at)
{
	struct event *e = loopback(at) ? NULL : begin_audit(p, op, sizeof(*e));

	if (!e)
		return;
	__builtin_memcpy(e->text, at, sizeof(*at));
	e->text_kind = TEXT_TARGET;
	bpf_ringbuf_submit(e, 0);
}

static __always_inline bool talked(const struct policy *p, const struct destination *peer, __u16 port)
{
	struct talk t = {.peer_port = peer->port, .port = port, .owner = p->rule[OWNER]};

	__builtin_memcpy(t.peer, peer->addr, 16);
	return bpf_map_lookup_elem(&talks, &t);
}

static __always_inline void note_talk(const struct policy *p, const struct destination *peer, __u16 port)
{
	struct talk t = {.peer_port = peer->port, .port = port, .owner = p->rule[OWNER]};
	__u32 one = 1;

	__builtin_memcpy(t.peer, peer->addr, 16);
	if (!bpf_map_lookup_elem(&talks, &t))
		bpf_map_update_elem(&talks, &t, &one, BPF_ANY);
}

static __always_inline bool is_inet(__u32 family)
{
	return family == AF_INET || family == AF_INET6;
}

/* A socket that is being taken apart has no family any more; it is judged as
   one that reaches somewhere. */
static __always_inline __u32 family_of(struct socket *sock)
{
	struct sock *sk = sock->sk;

	return sk ? sk->__sk_common.skc_family : AF_INET;
}

static __always_inline __u32 protocol_of(struct socket *sock)
{
	struct sock *sk = sock->sk;

	return sk ? sk->sk_protocol : IPPROTO_IP;
}

static __always_inline int reach(struct socket *sock, const struct destination *to)
{
	struct about a = {.op = OP_EGRESS, .target = to};
	const struct policy *p = policy_now();
	struct sock *sk = sock->sk;
	__u32 ref, protocol = protocol_of(sock);

	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!has_egress(p))
		return 0;
	ref = egress_ref(p, to, protocol);
	/* Whoever may ask may be answered. */
	if (ref && sk && protocol == IPPROTO_UDP && talked(p, to, sk->__sk_common.skc_num))
		return 0;
	return decide(p, ref, &a);
}

SEC("lsm/socket_connect")
int BPF_PROG(on_connect, struct socket *sock, struct sockaddr *address, int size, int prev)
{
	struct destination to;
	int err = prev ? prev : new_connection(sock);

	if (err || !is_inet(family_of(sock)) || !is_workload())
		return err;
	/* An unspecified family takes a connection back. */
	if (!parse(address, false, &to))
		return 0;
	err = reach(sock, &to);
	if (!err)
		tell_address(policy_now(), OP_CONNECTED, &to);
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
	return reach(sock, &to);
}

/* What can be reached from no other machine is nobody's way in. */
static __always_inline int open_port(const struct destination *own, __u32 protocol)
{
	struct about a = {.op = OP_BIND, .target = own};
	struct destination key = {.prefix = 160, .family = AT_PORT, .port = own->port};
	const struct policy *p = policy_now();
	struct lists *l;
	__u32 slot, lists = 0;
	void *inner;

	if (!p || !has_ingress(p) || loopback(own))
		return 0;
	slot = slot_of(p);
	inner = bpf_map_lookup_elem(&egress, &slot);
	if (inner && own->port) {
		l = bpf_map_lookup_elem(inner, &key);
		if (l)
			lists = by_protocol(l, protocol);
	}
	return decide(p, ingress_ref(p, lists), &a);
}

/* A datagram's socket may get what anybody sends as soon as it has a port that
   somebody knows. One that the kernel chooses hears only whom it spoke to. */
SEC("lsm/socket_bind")
int BPF_PROG(on_bind, struct socket *sock, struct sockaddr *address, int size, int prev)
{
	struct destination own;
	__u32 family = family_of(sock), protocol = protocol_of(sock);

	if (prev || !is_inet(family) || protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP || !is_workload())
		return prev;
	if (!parse(address, family == AF_INET, &own) || !own.port)
		return 0;
	return open_port(&own, protocol);
}

SEC("lsm/socket_listen")
int BPF_PROG(on_listen, struct socket *sock, int backlog, int prev)
{
	struct destination own = {.prefix = 160};
	struct sock *sk = sock->sk;
	__u32 family = family_of(sock);
	int err;

	if (prev || !sk || !is_inet(family) || !is_workload())
		return prev;
	own.port = bpf_htons(sk->__sk_common.skc_num);
	set_address(&own, family, &sk->__sk_common.skc_rcv_saddr, &sk->__sk_common.skc_v6_rcv_saddr);
	err = open_port(&own, sk->sk_protocol);
	if (!err)
		tell_address(policy_now(), OP_LISTENING, &own);
	return err;
}

/* Who was let in. The packets below have decided. */
SEC("lsm/sock_graft")
int BPF_PROG(on_accepted, struct sock *sk, struct socket *parent)
{
	struct destination peer = {.prefix = 160};
	__u32 family = sk->__sk_common.skc_family;

	if (!is_inet(family) || !is_workload())
		return 0;
	peer.port = sk->__sk_common.skc_dport;
	set_address(&peer, family, &sk->__sk_common.skc_daddr, &sk->__sk_common.skc_v6_daddr);
	tell_address(policy_now(), OP_ACCEPTED, &peer);
	return 0;
}

/* Sockets whose traffic the rules above cannot see. */
static __always_inline bool is_raw(int family, int type, int protocol)
{
	switch (family) {
	case AF_UNIX:
		return false;
	case AF_NETLINK:
		/* PAM asks for audit, and takes a refusal, other than the kernel's own,
		   for a fault of the system; what can be done there needs capabilities. */
		return protocol != NETLINK_ROUTE && protocol != NETLINK_AUDIT;
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
	/* The way to the machine's own host is the agent's. */
	if (family == AF_VSOCK) {
		a.op = OP_HOST;
		return decide(p, DENY | RULE_HOST, &a);
	}
	ref = ref_of(p, ON_RAWSOCKET);
	/* A list of destinations means nothing to a socket that writes its own
	   headers. */
	if (p && !(ref & DENY) && has_egress(p)) {
		struct destination nowhere = {.prefix = 160};
		__u32 other = egress_ref(p, &nowhere, IPPROTO_IP);

		if (other & DENY || !ref)
			ref = other;
	}
	return decide(p, ref, &a);
}

#endif
