// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Verdicts and what is told of them. The verdict is made first; a full ring
// changes only the lost counter.
#ifndef EVENT_H
#define EVENT_H

#include "lineage.h"

enum op {
	OP_EXEC = 1,
	OP_MAP,
	OP_MEMORY,
	OP_LISTED,
	OP_SHELL,
	OP_WRITE,
	OP_READ,
	OP_EGRESS,
	OP_RAWSOCKET,
	OP_BPF,
	OP_MODULE,
	OP_PTRACE,
	OP_MOUNT,
	OP_MKNOD,
	OP_IOURING,
	OP_USERNS,
	OP_AGENT,
	OP_DEVICE,
	OP_SETTING,
	OP_HELPER,
	OP_UNLISTED = 40,
	OP_PRELOAD,
	OP_SCRIPT,
	OP_INLINE,
	OP_INTO_VOLUME,
	OP_OPERATION = 50, /* detail: index of its rule */
	OP_CAPABILITY,     /* detail: which */
	OP_INGRESS,
	OP_BIND,
	OP_HOST,
	OP_STARTED = 64, /* for the record only */
	OP_CONNECTED,
	OP_CHANGED, /* a file; why: enum changed */
	OP_CONTENT, /* of a watched file is another: a struct content_event, which the agent completes */
	OP_MOUNTED,
	OP_LISTENING = 70,
	OP_ACCEPTED,
	OP_NAMES, /* a message of DNS: its size stands in detail, itself behind the event */
	OP_ENVIRONMENT = 80, /* a variable that tells the loader what to do */
	OP_REPEATED = 120, /* the agent's: how often a record of a series was repeated */
	OPS = 128,
};

enum verdict {
	VERDICT_ALLOWED,
	VERDICT_REPORTED, /* would have been denied */
	VERDICT_DENIED,
	VERDICT_KILLED,
};

enum text_kind {
	TEXT_NONE,
	TEXT_PATH,   /* absolute, as the task sees it */
	TEXT_NAMES,  /* components, innermost first, each ending in NUL */
	TEXT_TARGET, /* a struct destination */
	TEXT_VALUE,  /* of an argument or variable of a program */
};

#define TEXT_SIZE 256
#define ARGS_SIZE 256

struct event {
	__u8 version;
	__u8 op;
	__u8 verdict;
	__u8 label;
	__u8 text_kind;
	__u8 why; /* meaning depends on op */
	__u16 argc;
	__u32 rule;
	__u32 pid;
	__u32 ppid;
	__u32 uid;
	__u64 sequence;
	__u64 time; /* nanoseconds since boot */
	__u64 generation;
	__u64 lost;
	__u64 detail; /* meaning depends on op */
	char comm[COMM_SIZE];
	char text[TEXT_SIZE];
	__u64 series; /* of records about the same: the sequence of its first */
	__u64 count;  /* acts of the series so far, this one included; 0: of no series */
	struct lineage who;
};

struct started {
	struct event e;
	char args[ARGS_SIZE];
};

/* As guard/event.go reads them. */
AT(event, op, 1);
AT(event, verdict, 2);
AT(event, text_kind, 4);
AT(event, why, 5);
AT(event, argc, 6);
AT(event, rule, 8);
AT(event, pid, 12);
AT(event, ppid, 16);
AT(event, uid, 20);
AT(event, sequence, 24);
AT(event, time, 32);
AT(event, generation, 40);
AT(event, lost, 48);
AT(event, detail, 56);
AT(event, comm, 64);
AT(event, text, 80);
AT(event, series, 336);
AT(event, count, 344);
AT(event, who, 352);
AT(lineage, exe_dev, 16);
AT(lineage, exe_cut, 24);
AT(lineage, name, 32);
AT(lineage, exe, 48);
AT(lineage, parent, 176);
AT(lineage, up, 304);
AT(started, args, 816);

struct counters {
	__u64 sequence;
	__u64 lost;
	__u64 audit_sequence;
	__u64 audit_lost;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 17);
} denials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} audit SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

/* What became of the acts of one operation. Every act is in happened and in
   just one of the others, however full a ring is. */
struct tally {
	__u64 happened;
	__u64 sent;
	__u64 merged; /* into the count of a series */
	__u64 lost;   /* there was no room in the ring */
	__u64 held;   /* by the policy's limit on the record of what was allowed */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, OPS);
	__type(key, __u32);
	__type(value, struct tally);
} tallies SEC(".maps");

/* Acts that are the same but for their time: the same rule and verdict, the
   same program, the same target. */
struct series_key {
	__u64 generation;
	__u64 exe_ino;
	__u64 target[2];
	__u64 detail;
	__u32 exe_dev;
	__u32 rule;
	__u32 uid;
	__u8 op;
	__u8 verdict;
	__u8 why;
	__u8 pad;
};

struct series {
	__u64 sequence; /* of its first record */
	__u64 count;
	__u64 last;   /* when */
	__u64 window; /* when the present burst began */
	__u32 burst;  /* records of it */
	__u32 pid;    /* of the last */
	__u32 rule;
	__u8 op;
	__u8 verdict;
	__u8 why;
	__u8 pad;
};

AT(series_key, exe_dev, 40);
AT(series_key, op, 52);
AT(series, last, 16);
AT(series, pid, 36);
AT(series, op, 44);

/* As many records of a series are sent in a window; the rest are counted. */
#define BURST 16
#define WINDOW 10000000000ull

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct series_key);
	__type(value, struct series);
} repeats SEC(".maps");

/* How many records of what was allowed may be sent in a second, by the slot of
   the policy; 0: as many as there is room for. */
struct limit {
	__u32 rate;
	__u32 pad;
	__u64 second;
	__u64 used;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct limit);
} limits SEC(".maps");

/* What a verdict is about. */
struct about {
	__u64 op;
	__u64 why;
	__u64 detail;
	struct dentry *dentry;
	const void *target;  /* a struct destination */
	unsigned long value; /* address of a string of the task's own */
	__u64 spelled;       /* its path was spelled out */
};

static __always_inline struct counters *counters_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

static __always_inline void fill(struct event *e, __u64 generation, __u32 op, __u64 sequence, __u64 lost)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct task_label *l = bpf_task_storage_get(&labels, task, 0, 0);

	e->version = 2;
	e->op = op;
	e->verdict = VERDICT_ALLOWED;
	e->label = label_with(task, l);
	e->text_kind = TEXT_NONE;
	e->why = 0;
	e->argc = 0;
	e->rule = 0;
	e->pid = bpf_get_current_pid_tgid() >> 32;
	e->ppid = task->real_parent->tgid;
	e->uid = (__u32)bpf_get_current_uid_gid();
	e->sequence = sequence;
	e->time = bpf_ktime_get_boot_ns();
	e->generation = generation;
	e->lost = lost;
	e->detail = 0;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	e->text[0] = 0;
	e->series = 0;
	e->count = 0;
	if (!l || bpf_probe_read_kernel(&e->who, sizeof(e->who), &l->who))
		__builtin_memset(&e->who, 0, sizeof(e->who));
}

/* Where the names of a dentry and of those above it are written. */
struct names_written {
	struct event *e;
	struct dentry *d;
	__u64 off;
};

static long write_name(__u32 i, struct names_written *w)
{
	struct dentry *d = w->d, *parent = BPF_CORE_READ(d, d_parent);
	__u64 off = w->off;
	long n;

	if (parent == d || off > TEXT_SIZE - 64)
		return 1;
	/* The verifier must see the bound on the very register that is used. */
	asm volatile("" : "+r"(off));
	n = bpf_probe_read_kernel_str(w->e->text + (off & (TEXT_SIZE - 1)), 64, BPF_CORE_READ(d, d_name.name));
	if (n <= 0)
		return 1;
	w->off = off + n;
	w->d = parent;
	return 0;
}

/* Writes the names from the dentry up. There is no way to print a path from
   here; the reader turns the names around. */
static __always_inline void write_names(struct event *e, struct dentry *d)
{
	struct names_written w = {.e = e, .d = d};
	__u64 off;

	*(volatile __u8 *)e->text = 0;
	w.off = *(volatile __u8 *)e->text; /* 0, which the verifier does not know */
	bpf_loop(12, write_name, &w, 0);
	off = w.off;
	asm volatile("" : "+r"(off));
	if (off < TEXT_SIZE)
		e->text[off] = 0;
	e->text_kind = TEXT_NAMES;
}

/* Gives the record the number of its series, which is that of the series' first
   record; those of one ring are told from those of the other. */
#define AUDIT_SERIES (1ull << 52)

static __always_inline void number(struct event *e, struct series *s, __u64 sequence)
{
	e->series = __sync_val_compare_and_swap(&s->sequence, 0, sequence);
	if (!e->series)
		e->series = sequence;
	e->count = __sync_fetch_and_add(&s->count, 1) + 1;
}

static __always_inline struct tally *tally_of(__u32 op)
{
	op &= OPS - 1;
	return bpf_map_lookup_elem(&tallies, &op);
}

/* The series that an act belongs to; NULL if there is no room to count one. */
static __always_inline struct series *series_of(__u64 generation, __u32 ref, __u32 verdict, const struct about *a)
{
	struct task_label *l = bpf_task_storage_get(&labels, bpf_get_current_task_btf(), 0, 0);
	struct series_key key = {
		.generation = generation, .detail = a->detail, .rule = ref & ~DENY, .op = a->op, .verdict = verdict, .why = a->why,
	};
	struct dentry *d = a->dentry;
	struct series *s;
	__u32 second = 1;
	void *blank;

	key.uid = (__u32)bpf_get_current_uid_gid();
	if (l) {
		key.exe_ino = l->who.exe_ino;
		key.exe_dev = l->who.exe_dev;
	}
	if (a->target) {
		const struct destination *at = a->target;

		bpf_probe_read_kernel(key.target, sizeof(key.target), at->addr);
		key.detail = 0;
		bpf_probe_read_kernel(&key.detail, sizeof(at->port), &at->port);
	} else if (d) {
		/* A name is hashed with the directory it is in. */
		key.target[0] = BPF_CORE_READ(d, d_name.hash_len);
		key.target[1] = BPF_CORE_READ(d, d_parent, d_inode, i_ino);
	}
	s = bpf_map_lookup_elem(&repeats, &key);
	if (s)
		return s;
	/* A series to begin with would not have room on the stack. */
	blank = bpf_map_lookup_elem(&name_key, &second);
	if (blank)
		bpf_map_update_elem(&repeats, &key, blank, BPF_NOEXIST);
	s = bpf_map_lookup_elem(&repeats, &key);
	if (s) {
		s->rule = key.rule;
		s->op = key.op;
		s->verdict = key.verdict;
		s->why = key.why;
	}
	return s;
}

/* Whether the act is only counted: there were enough records of its series. */
static __always_inline bool merge(struct series *s, __u64 now)
{
	bool merged;

	if (now - s->window > WINDOW) {
		s->window = now;
		s->burst = 0;
	}
	merged = s->burst >= BURST && s->sequence;
	if (merged)
		__sync_fetch_and_add(&s->count, 1);
	else
		__sync_fetch_and_add(&s->burst, 1);
	s->pid = bpf_get_current_pid_tgid() >> 32;
	s->last = now;
	return merged;
}

/* A path is spelled out where it is at hand, for tell takes no object. It is for
   text alone; no program of this kind is interrupted by another. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, char[TEXT_SIZE]);
} spelled SEC(".maps");

static __always_inline char *spelling(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&spelled, &zero);
}

static __always_inline void spell(struct path *path, struct about *a)
{
	char *text = spelling();

	a->spelled = text && bpf_d_path(path, text, TEXT_SIZE) > 0;
}

/* What the act was done to, in words. */
static __always_inline void write_text(struct event *e, const struct about *a)
{
	char *text = spelling();

	if (a->value) {
		if (bpf_probe_read_user_str(e->text, TEXT_SIZE, (void *)a->value) > 0)
			e->text_kind = TEXT_VALUE;
	} else if (a->target) {
		bpf_probe_read_kernel(e->text, sizeof(struct destination), a->target);
		e->text_kind = TEXT_TARGET;
	} else if (a->spelled && text) {
		bpf_probe_read_kernel_str(e->text, TEXT_SIZE, text);
		e->text_kind = TEXT_PATH;
	} else if (a->dentry) {
		write_names(e, a->dentry);
	}
}

/* Tells of a verdict. */
ONCE int tell(const struct about *a, __u64 generation, __u32 ref, __u32 verdict)
{
	struct counters *c = counters_now();
	struct series *s;
	struct event *e;
	struct tally *t;
	__u64 sequence;

	if (!a || !c)
		return 0;
	t = tally_of(a->op);
	if (!t)
		return 0;
	__sync_fetch_and_add(&t->happened, 1);
	s = series_of(generation, ref, verdict, a);
	if (s && merge(s, bpf_ktime_get_boot_ns())) {
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
	fill(e, generation, a->op, sequence, c->lost);
	e->verdict = verdict;
	e->rule = ref & ~DENY;
	e->why = a->why;
	e->detail = a->detail;
	if (s)
		number(e, s, sequence);
	write_text(e, a);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* Whether the policy's limit holds a record of what was allowed back. */
static __always_inline bool held_back(const struct policy *p)
{
	__u64 now = bpf_ktime_get_boot_ns();
	struct limit *l;
	__u32 slot;

	if (!p)
		return false;
	slot = slot_of(p);
	l = bpf_map_lookup_elem(&limits, &slot);
	if (!l || !l->rate)
		return false;
	if (now - l->second >= 1000000000ull) {
		l->second = now;
		l->used = 0;
	}
	return __sync_fetch_and_add(&l->used, 1) >= l->rate;
}

/* Takes room in the ring for a record of what was allowed and counted as having
   happened; NULL if there is none. */
static __always_inline struct event *reserve_audit(const struct policy *p, __u32 op, __u64 size, struct tally *t, struct counters *c)
{
	struct event *e;
	__u64 sequence;

	sequence = __sync_fetch_and_add(&c->audit_sequence, 1) + 1;
	e = bpf_ringbuf_reserve(&audit, size, 0);
	if (!e) {
		__sync_fetch_and_add(&t->lost, 1);
		__sync_fetch_and_add(&c->audit_lost, 1);
		return NULL;
	}
	__sync_fetch_and_add(&t->sent, 1);
	fill(e, generation_of(p), op, sequence, c->audit_lost);
	return e;
}

/* Begins a record of what was allowed, of that size; NULL if there is to be
   none. It is counted in any case; the caller submits it. */
static __always_inline struct event *begin_audit(const struct policy *p, __u32 op, __u64 size)
{
	struct counters *c = counters_now();
	struct tally *t = tally_of(op);

	if (!c || !t)
		return NULL;
	__sync_fetch_and_add(&t->happened, 1);
	if (held_back(p)) {
		__sync_fetch_and_add(&t->held, 1);
		return NULL;
	}
	return reserve_audit(p, op, size, t, c);
}

/* Turns a reference to a rule into the hook's answer, and tells of it. */
static __always_inline int decide(const struct policy *p, __u32 ref, const struct about *a)
{
	if (!ref)
		return 0;
	tell(a, generation_of(p), ref, ref & DENY ? VERDICT_DENIED : VERDICT_REPORTED);
	return ref & DENY ? -EPERM : 0;
}

/* As decide, of what has a path; where none can be spelled out it is NULL. */
static __always_inline int decide_at(const struct policy *p, __u32 ref, struct about *a, struct path *path)
{
	if (ref && path)
		spell(path, a);
	return decide(p, ref, a);
}

/* Without a policy everything a workload asks is refused. */
static __always_inline __u32 ref_of(const struct policy *p, __u32 index)
{
	return p ? p->rule[index] : DENY | RULE_NO_POLICY;
}

/* A rule that holds whatever the policy says; the policy's own, if it denies,
   gives the better name. */
static __always_inline __u32 ref_always(const struct policy *p, __u32 index, __u32 builtin)
{
	__u32 ref = p ? p->rule[index] : 0;

	return ref & DENY ? ref : DENY | builtin;
}

#endif
