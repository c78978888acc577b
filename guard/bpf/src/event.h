// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Verdicts and what is told of them. The verdict is made first; a full ring
// changes only the lost counter.
#ifndef EVENT_H
#define EVENT_H

#include "policy.h"

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
	OP_OPERATION = 50, /* detail: index of its rule */
	OP_CAPABILITY,     /* detail: which */
	OP_STARTED = 64, /* for the record only */
	OP_CONNECTED,
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
	char comm[16];
	char text[TEXT_SIZE];
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
AT(started, args, 336);

struct counters {
	__u64 sequence;
	__u64 lost;
	__u64 audit_sequence;
	__u64 audit_lost;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 16);
} denials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 17);
} audit SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} counters SEC(".maps");

/* What a verdict is about. Unused members are dropped by the compiler. */
struct about {
	__u32 op;
	__u32 why;
	__u64 detail;
	struct path *path;
	struct dentry *dentry;
	const struct destination *target;
};

static __always_inline struct counters *counters_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&counters, &zero);
}

static __always_inline void fill(struct event *e, const struct policy *p, __u32 op, __u64 sequence, __u64 lost)
{
	struct task_struct *task = bpf_get_current_task_btf();

	e->version = 1;
	e->op = op;
	e->verdict = VERDICT_ALLOWED;
	e->label = label_of(task);
	e->text_kind = TEXT_NONE;
	e->why = 0;
	e->argc = 0;
	e->rule = 0;
	e->pid = bpf_get_current_pid_tgid() >> 32;
	e->ppid = task->real_parent->tgid;
	e->uid = (__u32)bpf_get_current_uid_gid();
	e->sequence = sequence;
	e->time = bpf_ktime_get_boot_ns();
	e->generation = p ? p->generation : 0;
	e->lost = lost;
	e->detail = 0;
	bpf_get_current_comm(e->comm, sizeof(e->comm));
	e->text[0] = 0;
}

/* Writes the names from the dentry up. There is no way to print a path from
   here; the reader turns the names around. */
static __always_inline void write_names(struct event *e, struct dentry *d)
{
	__u64 off = 0;
	long n;

	for (int i = 0; i < 12; i++) {
		struct dentry *parent = d->d_parent;

		if (parent == d)
			break;
		/* The verifier must see the bound on the very register that is used. */
		asm volatile("" : "+r"(off));
		if (off > TEXT_SIZE - 64)
			break;
		n = bpf_probe_read_kernel_str(e->text + off, 64, d->d_name.name);
		if (n <= 0 || n > 64)
			break;
		off += n;
		d = parent;
	}
	if (off < TEXT_SIZE)
		e->text[off] = 0;
	e->text_kind = TEXT_NAMES;
}

static __always_inline void tell(const struct policy *p, __u32 ref, __u32 verdict, const struct about *a)
{
	struct counters *c = counters_now();
	struct event *e;
	__u64 sequence;

	if (!c)
		return;
	sequence = __sync_fetch_and_add(&c->sequence, 1) + 1;
	e = bpf_ringbuf_reserve(&denials, sizeof(*e), 0);
	if (!e) {
		__sync_fetch_and_add(&c->lost, 1);
		return;
	}
	fill(e, p, a->op, sequence, c->lost);
	e->verdict = verdict;
	e->rule = ref & ~DENY;
	e->why = a->why;
	e->detail = a->detail;
	if (a->target) {
		__builtin_memcpy(e->text, a->target, sizeof(*a->target));
		e->text_kind = TEXT_TARGET;
	} else if (a->path && bpf_d_path(a->path, e->text, TEXT_SIZE) > 0) {
		e->text_kind = TEXT_PATH;
	} else if (a->dentry) {
		write_names(e, a->dentry);
	}
	bpf_ringbuf_submit(e, 0);
}

/* Turns a reference to a rule into the hook's answer, and tells of it. */
static __always_inline int decide(const struct policy *p, __u32 ref, const struct about *a)
{
	if (!ref)
		return 0;
	tell(p, ref, ref & DENY ? VERDICT_DENIED : VERDICT_REPORTED, a);
	return ref & DENY ? -EPERM : 0;
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
