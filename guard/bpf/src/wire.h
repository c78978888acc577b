// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// What packets may leave and come in, for what no hook of a socket sees: a
// source route, a connection older than the policy.
#ifndef WIRE_H
#define WIRE_H

#include "dns.h"

/* Packets of one kind, as tell has it of acts. Who sends from many addresses
   makes no more records of it. */
static __always_inline bool repeats_packet(__u64 generation, __u32 ref, __u32 op, const struct destination *peer, __u32 port, struct event *e)
{
	struct series_key key = {.generation = generation, .detail = port, .rule = ref & ~DENY, .op = op, .why = 1};
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

/* As tell, where there are fewer functions of the kernel to be had. What comes
   in comes in while anybody runs. */
ONCE int tell_packet(const struct destination *peer, __u64 generation, __u32 ref, __u32 op, __u64 at)
{
	__u32 port = at; /* the owner stands above it */
	struct task_struct *task = bpf_get_current_task_btf();
	struct counters *c = counters_now();
	struct tally *t = tally_of(op);
	struct event *e;
	__u64 sequence;

	if (!c || !t || !peer)
		return 0;
	__sync_fetch_and_add(&t->happened, 1);
	if (repeats_packet(generation, ref, op, peer, port, NULL)) {
		__sync_fetch_and_add(&t->merged, 1);
		return 0;
	}
	sequence = __sync_fetch_and_add(&c->sequence, 1) + 1;
	e = bpf_ringbuf_reserve(&denials, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&t->lost, 1);
		__sync_fetch_and_add(&c->lost, 1);
		return 0;
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
	e->generation = generation;
	e->who.container = at >> 32;
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
	repeats_packet(generation, ref, op, peer, port, e);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

static __always_inline bool judge_packet(const struct policy *p, __u32 ref, __u32 op, const struct destination *peer, __u32 port)
{
	tell_packet(peer, p->generation, ref, op, (__u64)p->rule[OWNER] << 32 | port);
	return !(ref & DENY);
}

/* Those of a bound cgroup are seen by programs on that cgroup. */
static __always_inline const struct policy *policy_of_packet(void)
{
	__u32 *owner = shared() ? bpf_get_local_storage(&packet_owner, 0) : NULL;

	return policy_of(owner ? *owner : 0);
}

/* A packet is let go where its socket would be. Of a connection only the first
   is looked at: without it there are no others. Raw sockets are the kernel's
   own here: to a workload with a list of destinations none is given. */
static __always_inline bool may_leave(const struct policy *p, struct bpf_sock *sk, const struct packet *k)
{
	__u32 ref = 0;

	sk = sk ? bpf_sk_fullsock(sk) : NULL;
	if (!sk || !k->opens)
		return true;
	if (k->protocol != IPPROTO_TCP && k->protocol != IPPROTO_UDP && sk->type != SOCK_DGRAM && sk->type != SOCK_STREAM)
		return true;
	if (has_egress(p))
		ref = egress_ref(p, &k->peer, k->protocol);
	if (ref && !(k->protocol == IPPROTO_UDP && talked(p, &k->peer, k->port)) && !judge_packet(p, ref, OP_EGRESS, &k->peer, k->port))
		return false;
	if (k->protocol == IPPROTO_UDP && (has_ingress(p) || p->rule[HAS_NAMES]))
		note_talk(p, &k->peer, k->port);
	return true;
}

static __always_inline bool may_enter(const struct policy *p, const struct packet *k)
{
	struct destination key = k->peer;
	__u32 ref;

	if (!k->opens || (k->protocol != IPPROTO_TCP && k->protocol != IPPROTO_UDP))
		return true;
	key.family |= FROM_4 & ~TO_4;
	key.port = bpf_htons(k->port);
	ref = ingress_ref(p, allowed(p, &key, k->protocol));
	if (ref && !(k->protocol == IPPROTO_UDP && talked(p, &k->peer, k->port)) && !judge_packet(p, ref, OP_INGRESS, &k->peer, k->port))
		return false;
	if (k->protocol == IPPROTO_UDP && has_egress(p))
		note_talk(p, &k->peer, k->port);
	return true;
}

SEC("cgroup_skb/egress")
int on_packet_out(struct __sk_buff *skb)
{
	const struct policy *p = policy_of_packet();
	struct packet k;

	if (!p || !read_packet(skb, true, &k))
		return 1;
	if (k.peer.port == bpf_htons(DNS))
		question_leaves(p, skb, &k);
	return !(has_egress(p) || has_ingress(p)) || may_leave(p, skb->sk, &k);
}

SEC("cgroup_skb/ingress")
int on_packet_in(struct __sk_buff *skb)
{
	const struct policy *p = policy_of_packet();
	struct packet k;

	if (!p || !(has_ingress(p) || reads_answers(p)) || !read_packet(skb, false, &k))
		return 1;
	if (reads_answers(p) && k.peer.port == bpf_htons(DNS))
		answer_enters(p, skb, &k);
	return !has_ingress(p) || may_enter(p, &k);
}

#endif
