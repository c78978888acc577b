// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Names: what was asked and answered, for the record, and the addresses of names
// that a list allows. An answer is read before it is delivered, so that a
// connection right after it finds its address known.
#ifndef DNS_H
#define DNS_H

#include "packet.h"

#define MESSAGE 4096 /* of which this much is read; none needs more over UDP */
#define MESSAGE_SLACK 64
#define SHOWN 1232 /* of which this much is recorded */
#define LEAST_SECONDS 60
#define MOST_SECONDS 86400

/* All that reading a message needs lies here: the verifier takes what stands in
   a map for unknown, and so looks at every step once and not by all ways that
   lead to it. */
struct reading {
	struct domain key;
	__u8 dotted[DOMAIN_SIZE];
	__u32 size;
	__u32 left; /* bytes of the label */
	__u32 name; /* bytes of the name on the wire, without its end */
	__u32 bad;
	__u32 at;
	__u32 in_record;
	__u32 records;
	__u64 id;
	__u8 addr[16];
	__u32 seconds;
	__u32 slot;
	struct event e; /* what is recorded: the message follows */
	__u8 message[MESSAGE + MESSAGE_SLACK];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct reading);
} readings SEC(".maps");

_Static_assert(__builtin_offsetof(struct reading, message) == __builtin_offsetof(struct reading, e) + sizeof(struct event), "the message follows the event");

#define HEAD 12

/* What the steps of a loop work on. */
struct reader {
	struct reading *r;
	struct learnt *l;
};

/* One byte of the name that was asked for, in lower case. A byte that no name of
   a list can have, such as a dot inside a label, makes it no name. */
static long name_step(__u32 i, struct reader *w)
{
	struct reading *r = w->r;
	__u8 c;

	i &= DOMAIN_SIZE - 1;
	c = r->message[HEAD + i];
	if (!r->left) {
		r->left = c;
		r->dotted[i] = '.';
		r->name = i;
		r->bad = c > 63;
		return !c || c > 63;
	}
	r->left--;
	if (c >= 'A' && c <= 'Z')
		c += 'a' - 'A';
	r->dotted[i] = c;
	r->bad = !((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '_');
	return r->bad;
}

static __always_inline void read_name(struct reading *r)
{
	struct reader w = {.r = r};

	r->left = r->name = r->bad = 0;
	bpf_loop(DOMAIN_SIZE - 1, name_step, &w, 0);
	r->name &= DOMAIN_SIZE - 1;
	if (r->left || !r->name)
		r->bad = 1;
}

static long turn_step(__u32 i, struct reader *w)
{
	struct reading *r = w->r;
	__u32 from = r->name - 1 - i;
	bool inside = from && from < DOMAIN_SIZE;
	__u8 c;

	i &= DOMAIN_SIZE - 1;
	from &= DOMAIN_SIZE - 1;
	/* The verifier must see the bound on the very register that is used. */
	asm volatile("" : "+r"(from));
	c = r->dotted[from];
	/* The first byte on the wire is no dot of the name, but its end. */
	r->key.text[i] = inside ? c : 0;
	return 0;
}

/* Turns the name round. */
static __always_inline void turn_name(struct reading *r)
{
	struct reader w = {.r = r};

	bpf_loop(DOMAIN_SIZE, turn_step, &w, 0);
	r->key.prefix = r->name * 8;
}

/* Addresses that mean this machine or this link are nobody's to give away: a
   list that wants them names them. */
static __always_inline bool may_learn(const __u8 *a)
{
	if (mapped(a))
		return a[12] != 0 && a[12] != 127 && a[12] < 224 && !(a[12] == 169 && a[13] == 254);
	return a[0] != 0 && a[0] != 0xff && !(a[0] == 0xfe && (a[1] & 0xc0) == 0x80);
}

/* The slot of a name: its own, or that whose time is over first. */
static long slot_step(__u32 i, struct reader *w)
{
	__u32 slot = w->r->slot & (LEARNT_NAMES - 1);

	i &= LEARNT_NAMES - 1;
	if (w->l->of[slot].name == w->r->id)
		return 1;
	if (w->l->of[i].name == w->r->id || w->l->of[i].until < w->l->of[slot].until)
		w->r->slot = i;
	return 0;
}

static __always_inline void learn(struct reading *r)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct reader w = {.r = r};
	struct learnt first = {};
	__u32 slot, seconds = r->seconds;
	struct learnt *l;

	if (seconds < LEAST_SECONDS)
		seconds = LEAST_SECONDS;
	if (seconds > MOST_SECONDS)
		seconds = MOST_SECONDS;
	l = bpf_map_lookup_elem(&learnt, r->addr);
	if (!l) {
		first.of[0].name = r->id;
		first.of[0].until = now + (__u64)seconds * 1000000000ull;
		bpf_map_update_elem(&learnt, r->addr, &first, BPF_ANY);
		return;
	}
	r->slot = 0;
	w.l = l;
	bpf_loop(LEARNT_NAMES, slot_step, &w, 0);
	slot = r->slot & (LEARNT_NAMES - 1);
	if (l->of[slot].name != r->id)
		l->of[slot].until = 0; /* never one name until the other's time */
	l->of[slot].name = r->id;
	l->of[slot].until = now + (__u64)seconds * 1000000000ull;
}

static __always_inline __u32 big16(const __u8 *b) { return (__u32)b[0] << 8 | b[1]; }

/* Reads a record's fixed part and address. */
static __always_inline void read_record(struct reading *r, const __u8 *b)
{
	__u32 kind = big16(b), class = big16(b + 2), size = big16(b + 8);

	r->seconds = big16(b + 4) << 16 | big16(b + 6);
	r->at += 10 + size;
	if (r->at > r->size) {
		r->bad = 1;
		return;
	}
	if (class == 1 && kind == 1 && size == 4) {
		__builtin_memset(r->addr, 0, 10);
		r->addr[10] = r->addr[11] = 0xff;
		__builtin_memcpy(r->addr + 12, b + 10, 4);
	} else if (class == 1 && kind == 28 && size == 16) {
		__builtin_memcpy(r->addr, b + 10, 16);
	} else {
		return;
	}
	if (may_learn(r->addr))
		learn(r);
}

/* A label of a record's name, or the rest of the record. */
static long record_step(__u32 i, struct reader *w)
{
	struct reading *r = w->r;
	__u32 at = r->at;
	__u8 c;

	if (r->bad || !r->records || at >= r->size || at >= MESSAGE)
		return 1;
	at &= MESSAGE - 1;
	if (r->in_record) {
		read_record(r, r->message + at);
		r->in_record = 0;
		r->records--;
		return 0;
	}
	c = r->message[at];
	r->in_record = !c || c >= 0xc0;
	r->at = at + (c >= 0xc0 ? 2 : c + 1);
	return 0;
}

static __always_inline void read_records(struct reading *r)
{
	struct reader w = {.r = r};

	r->at = HEAD + r->name + 1 + 4;
	r->records = big16(r->message + 6);
	r->in_record = r->bad = 0;
	bpf_loop(160, record_step, &w, 0);
}

static __always_inline struct reading *reading_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&readings, &zero);
}

/* Learns the addresses that the message at hand gives a listed name. */
ONCE int learn_answer(__u32 slot)
{
	struct reading *r = reading_now();
	void *inner;
	__u64 *id;

	if (!r)
		return 0;
	read_name(r);
	if (r->bad)
		return 0;
	turn_name(r);
	inner = bpf_map_lookup_elem(&domains, &slot);
	id = inner ? bpf_map_lookup_elem(inner, &r->key) : NULL;
	if (!id)
		return 0;
	r->id = *id;
	read_records(r);
	return 0;
}

/* Reads the message that a packet holds; over TCP one that lies in one packet. */
static __always_inline struct reading *read_message(struct __sk_buff *skb, const struct packet *k)
{
	__u64 at = k->payload, size = skb->len;
	struct reading *r = reading_now();

	if (!r)
		return NULL;
	if (k->protocol == IPPROTO_TCP)
		at += 2;
	if (size <= at + HEAD)
		return NULL;
	size -= at;
	if (size > MESSAGE)
		size = MESSAGE;
	asm volatile("" : "+r"(size));
	if (size < HEAD || size > MESSAGE)
		return NULL;
	if (bpf_skb_load_bytes(skb, at, r->message, size))
		return NULL;
	r->size = size;
	return r;
}

static __always_inline void record_message(const struct policy *p, struct reading *r, const struct packet *k, bool out)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct counters *c = counters_now();
	struct tally *t = tally_of(OP_NAMES);
	__u64 size = r->size;

	if (!c || !t)
		return;
	__sync_fetch_and_add(&t->happened, 1);
	if (held_back(p)) {
		__sync_fetch_and_add(&t->held, 1);
		return;
	}
	__builtin_memset(&r->e, 0, sizeof(r->e));
	r->e.version = 2;
	r->e.op = OP_NAMES;
	r->e.why = out ? 0 : 1; /* 1: it is what came */
	r->e.argc = k->protocol;
	r->e.sequence = __sync_fetch_and_add(&c->audit_sequence, 1) + 1;
	r->e.time = bpf_ktime_get_boot_ns();
	r->e.generation = p->generation;
	r->e.who.container = p->rule[OWNER];
	r->e.lost = c->audit_lost;
	r->e.detail = (__u64)k->port << 32 | size;
	if (out) {
		r->e.pid = task->tgid;
		r->e.ppid = task->real_parent->tgid;
		r->e.uid = task->cred->uid.val;
		bpf_probe_read_kernel(r->e.comm, sizeof(r->e.comm), task->comm);
	}
	__builtin_memcpy(r->e.text, &k->peer, sizeof(k->peer));
	r->e.text_kind = TEXT_TARGET;
	if (size > SHOWN)
		size = SHOWN;
	if (bpf_ringbuf_output(&audit, &r->e, sizeof(r->e) + size, 0)) {
		__sync_fetch_and_add(&t->lost, 1);
		__sync_fetch_and_add(&c->audit_lost, 1);
		return;
	}
	__sync_fetch_and_add(&t->sent, 1);
}

static __always_inline struct talk question(const struct reading *r, const struct packet *k)
{
	struct talk t = {.port = k->port};

	__builtin_memcpy(t.peer, k->peer.addr, 16);
	t.peer_port = big16(r->message);
	return t;
}

static __always_inline void question_leaves(const struct policy *p, struct __sk_buff *skb, const struct packet *k)
{
	struct reading *r = read_message(skb, k);
	__u32 one = 1;
	struct talk t;

	if (!r)
		return;
	t = question(r, k);
	if (p->rule[HAS_NAMES])
		bpf_map_update_elem(&asked, &t, &one, BPF_ANY);
	record_message(p, r, k, true);
}

static __always_inline bool reads_answers(const struct policy *p)
{
	return p->rule[HAS_NAMES] | p->rule[DNS_AUDIT];
}

/* Only what a question was asked for is learnt, of a server that may be asked,
   and never what came over the loopback: that may be the workload's own. */
static __always_inline void answer_enters(const struct policy *p, struct __sk_buff *skb, const struct packet *k)
{
	__u32 loopback_interface = 1;
	struct reading *r = read_message(skb, k);
	struct talk t;

	if (!r)
		return;
	if (p->rule[DNS_AUDIT])
		record_message(p, r, k, false);
	/* An answer without a fault, to one question. */
	if (!p->rule[HAS_NAMES] || skb->ifindex == loopback_interface || (r->message[2] & 0x80) == 0 || (r->message[3] & 15) || big16(r->message + 4) != 1)
		return;
	t = question(r, k);
	if (bpf_map_delete_elem(&asked, &t))
		return;
	if (p->egress_deny & ~allowed(p, &k->peer, k->protocol))
		return;
	learn_answer(slot_of(p));
}

#endif
