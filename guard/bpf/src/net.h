// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Whom a workload may reach, who may reach it, and with what kinds of socket.
// Sockets are judged first, where there is an error to give and a process to
// name. Packets are judged again, for what no hook of a socket sees: a source
// route, a connection older than the policy.
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

/* The lists that allow an address. */
static __always_inline __u32 allowed(const struct policy *p, const struct destination *at, __u32 protocol)
{
	struct destination key = *at;
	__u32 slot = slot_of(p), exact = 0, any = 0;
	struct lists *l;
	void *inner;

	inner = bpf_map_lookup_elem(&egress, &slot);
	if (!inner)
		return 0;
	l = bpf_map_lookup_elem(inner, &key);
	if (l)
		exact = by_protocol(l, protocol);
	key.port = 0;
	l = bpf_map_lookup_elem(inner, &key);
	if (l)
		any = by_protocol(l, protocol);
	if (at->port == bpf_htons(DNS) || at->port == bpf_htons(DNS_ENCRYPTED))
		any &= ~p->rule[DNS_LISTS];
	return exact | any;
}

/* The rule of the first list that does not allow what the others do. */
static __always_inline __u32 missing_ref(const struct policy *p, __u32 deny, __u32 audit, __u32 lists)
{
	__u32 missing = deny & ~lists;

	if (!missing)
		missing = audit & ~lists;
	if (!missing)
		return 0;
	for (__u32 i = 0; i < EGRESS_LISTS; i++)
		if (missing & (1u << i))
			return p->egress[i];
	return DENY | RULE_NO_POLICY;
}

/* The lists that allow the names which an address was learnt by. */
static __attribute__((noinline)) __u32 allowed_names(const struct policy *p, const struct destination *to, __u32 protocol)
{
	struct learnt *l = bpf_map_lookup_elem(&learnt, to->addr);
	struct destination key = {.prefix = 160, .family = TO_NAME, .port = to->port};
	__u64 now = bpf_ktime_get_boot_ns();
	__u32 lists = 0;

	if (!l)
		return 0;
	for (int i = 0; i < LEARNT_NAMES; i++) {
		__u64 name = l->of[i].name;

		if (l->of[i].until < now || !name)
			continue;
		__builtin_memcpy(key.addr, &name, sizeof(name));
		lists |= allowed(p, &key, protocol);
	}
	return lists;
}

static __always_inline __u32 egress_ref(const struct policy *p, const struct destination *to, __u32 protocol)
{
	__u32 lists = allowed(p, to, protocol);

	if (p->rule[HAS_NAMES] && (p->egress_deny | p->egress_audit) & ~lists)
		lists |= allowed_names(p, to, protocol);
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
	int err;

	if (prev || !is_inet(family_of(sock)) || !is_workload())
		return prev;
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

/* What a packet is about, seen from here. */
struct packet {
	struct destination peer;
	__u16 port; /* our own, in the machine's order */
	__u16 payload; /* where what it carries begins */
	__u8 protocol;
	bool opens; /* a connection, or it is a datagram */
};

/* False: it has no ports to judge by. */
static __always_inline bool read_ports(struct __sk_buff *skb, __u32 at, bool out, struct packet *k)
{
	__u16 ports[2];
	__u8 flags[2] = {};

	if (k->protocol != IPPROTO_TCP && k->protocol != IPPROTO_UDP)
		return true;
	if (bpf_skb_load_bytes(skb, at, ports, sizeof(ports)))
		return false;
	k->peer.port = out ? ports[1] : ports[0];
	k->port = bpf_ntohs(out ? ports[0] : ports[1]);
	if (k->protocol == IPPROTO_TCP) {
		if (bpf_skb_load_bytes(skb, at + 12, flags, 2))
			return false;
		k->opens = (flags[1] & 0x12) == 0x02; /* SYN without ACK */
		k->payload = at + (flags[0] >> 4) * 4;
	} else {
		k->payload = at + 8;
	}
	return true;
}

static __always_inline bool read_four(struct __sk_buff *skb, bool out, struct packet *k)
{
	__u8 head[20];

	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return false;
	k->protocol = head[9];
	set_four(&k->peer, head + (out ? 16 : 12));
	/* A later fragment has no ports, and is nothing without the first. */
	if (head[6] & 0x1f || head[7])
		return false;
	return read_ports(skb, (head[0] & 15) * 4, out, k);
}

static __always_inline bool read_six(struct __sk_buff *skb, bool out, struct packet *k)
{
	__u8 head[40], next[2];
	__u32 at = 40;

	if (bpf_skb_load_bytes(skb, 0, head, sizeof(head)))
		return false;
	k->protocol = head[6];
	set_six(&k->peer, head + (out ? 24 : 8));
	for (int i = 0; i < 4; i++) {
		if (k->protocol != 0 && k->protocol != 43 && k->protocol != 44 && k->protocol != 60)
			break;
		if (bpf_skb_load_bytes(skb, at, next, sizeof(next)))
			return false;
		at += k->protocol == 44 ? 8 : ((__u32)next[1] + 1) * 8;
		k->protocol = next[0];
	}
	return read_ports(skb, at, out, k);
}

/* False: there is nothing to judge in this packet. */
static __always_inline bool read_packet(struct __sk_buff *skb, bool out, struct packet *k)
{
	__builtin_memset(k, 0, sizeof(*k));
	k->peer.prefix = 160;
	k->opens = true;
	if (skb->protocol == bpf_htons(0x0800))
		return read_four(skb, out, k);
	return skb->protocol == bpf_htons(0x86dd) && read_six(skb, out, k);
}

/* Packets of one kind, as tell has it of acts. Who sends from many addresses
   makes no more records of it. */
static __always_inline bool repeats_packet(const struct policy *p, __u32 ref, __u32 op, const struct destination *peer, __u32 port, struct event *e)
{
	struct series_key key = {.generation = p->generation, .detail = port, .rule = ref & ~DENY, .op = op, .why = 1};
	__u64 now = bpf_ktime_get_boot_ns();
	struct series *s;

	key.verdict = ref & DENY ? VERDICT_DENIED : VERDICT_REPORTED;
	if (op == OP_EGRESS) {
		__builtin_memcpy(key.target, peer->addr, sizeof(key.target));
		key.detail = peer->port;
	}
	s = bpf_map_lookup_elem(&repeats, &key);
	if (!s) {
		struct series none = {.rule = key.rule, .op = key.op, .verdict = key.verdict, .why = key.why};

		bpf_map_update_elem(&repeats, &key, &none, BPF_NOEXIST);
		s = bpf_map_lookup_elem(&repeats, &key);
	}
	if (!s)
		return false;
	if (now - s->window > WINDOW) {
		s->window = now;
		s->burst = 0;
	}
	s->last = now;
	if (!e) {
		if (s->burst < BURST || !s->sequence)
			return false;
		__sync_fetch_and_add(&s->count, 1);
		return true;
	}
	__sync_fetch_and_add(&s->burst, 1);
	e->series = __sync_val_compare_and_swap(&s->sequence, 0, e->sequence);
	if (!e->series)
		e->series = e->sequence;
	e->count = __sync_fetch_and_add(&s->count, 1) + 1;
	return false;
}

/* Those of a bound cgroup are seen by programs on that cgroup. */
static __always_inline const struct policy *policy_of_packet(void)
{
	__u32 *owner = shared() ? bpf_get_local_storage(&packet_owner, 0) : NULL;

	return policy_of(owner ? *owner : 0);
}

/* As tell, where there are fewer functions of the kernel to be had. What comes
   in comes in while anybody runs. */
static __always_inline void tell_packet(const struct policy *p, __u32 ref, __u32 op, const struct destination *peer, __u32 port)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct counters *c = counters_now();
	struct tally *t = tally_of(op);
	struct event *e;
	__u64 sequence;

	if (!c || !t)
		return;
	__sync_fetch_and_add(&t->happened, 1);
	if (repeats_packet(p, ref, op, peer, port, NULL)) {
		__sync_fetch_and_add(&t->merged, 1);
		return;
	}
	sequence = __sync_fetch_and_add(&c->sequence, 1) + 1;
	e = bpf_ringbuf_reserve(&denials, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&t->lost, 1);
		__sync_fetch_and_add(&c->lost, 1);
		return;
	}
	__sync_fetch_and_add(&t->sent, 1);
	__builtin_memset(e, 0, sizeof(*e));
	e->version = 2;
	e->op = op;
	e->verdict = ref & DENY ? VERDICT_DENIED : VERDICT_REPORTED;
	e->why = 1;
	e->rule = ref & ~DENY;
	e->sequence = sequence;
	e->time = bpf_ktime_get_boot_ns();
	e->generation = p->generation;
	e->who.container = p->rule[OWNER];
	e->lost = c->lost;
	e->detail = port;
	if (op == OP_EGRESS) {
		e->pid = task->tgid;
		e->ppid = task->real_parent->tgid;
		e->uid = task->cred->uid.val;
		bpf_probe_read_kernel(e->comm, sizeof(e->comm), task->comm);
	}
	__builtin_memcpy(e->text, peer, sizeof(*peer));
	e->text_kind = TEXT_TARGET;
	repeats_packet(p, ref, op, peer, port, e);
	bpf_ringbuf_submit(e, 0);
}

static __always_inline bool judge_packet(const struct policy *p, __u32 ref, __u32 op, const struct destination *peer, __u32 port)
{
	tell_packet(p, ref, op, peer, port);
	return !(ref & DENY);
}

/* A packet is let go where its socket would be. Of a connection only the first
   is looked at: without it there are no others. Raw sockets are the kernel's
   own here: to a workload with a list of destinations none is given. */
SEC("cgroup_skb/egress")
int on_packet_out(struct __sk_buff *skb)
{
	const struct policy *p = policy_of_packet();
	struct bpf_sock *sk = skb->sk;
	struct packet k;
	__u32 ref;

	if (!p || !(has_egress(p) || has_ingress(p)) || !sk)
		return 1;
	sk = bpf_sk_fullsock(sk);
	if (!sk || !read_packet(skb, true, &k) || !k.opens)
		return 1;
	if (k.protocol != IPPROTO_TCP && k.protocol != IPPROTO_UDP && sk->type != SOCK_DGRAM && sk->type != SOCK_STREAM)
		return 1;
	ref = has_egress(p) ? egress_ref(p, &k.peer, k.protocol) : 0;
	if (ref && !(k.protocol == IPPROTO_UDP && talked(p, &k.peer, k.port)) && !judge_packet(p, ref, OP_EGRESS, &k.peer, k.port))
		return 0;
	if (k.protocol == IPPROTO_UDP && (has_ingress(p) || p->rule[HAS_NAMES]))
		note_talk(p, &k.peer, k.port);
	return 1;
}

SEC("cgroup_skb/ingress")
int on_packet_in(struct __sk_buff *skb)
{
	const struct policy *p = policy_of_packet();
	struct destination key;
	struct packet k;
	__u32 ref;

	if (!p || !has_ingress(p) || !read_packet(skb, false, &k) || !k.opens)
		return 1;
	if (k.protocol != IPPROTO_TCP && k.protocol != IPPROTO_UDP)
		return 1;
	key = k.peer;
	key.family |= FROM_4 & ~TO_4;
	key.port = bpf_htons(k.port);
	ref = ingress_ref(p, allowed(p, &key, k.protocol));
	if (ref && !(k.protocol == IPPROTO_UDP && talked(p, &k.peer, k.port)) && !judge_packet(p, ref, OP_INGRESS, &k.peer, k.port))
		return 0;
	if (k.protocol == IPPROTO_UDP && has_egress(p))
		note_talk(p, &k.peer, k.port);
	return 1;
}

#include "dns.h"

#endif
