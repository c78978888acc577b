// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Protected files, devices, and the kernel's own knobs.
#ifndef FILE_H
#define FILE_H

#include "clear.h"
#include "exec.h"

/* Deeper than this below a file system's root nothing can be decided; with
   file rules in force it is refused. */
#define MAX_DEPTH 96

#define WANT_WRITE 1
#define WANT_READ 2

/* What is known of the object that a dentry names. */
struct known {
	__u32 id;
	__u32 rules;
	__u32 home;
	__u32 names;
	__u32 anchor;
};

static __always_inline void know(const struct policy *p, struct inode *inode, struct known *k)
{
	struct mark *m = bpf_inode_storage_get(&marks, inode, 0, 0);
	__u32 slot = p->slot & 1, id = 0, rules = 0, home = 0, names = 0, anchor = 0;

	if (m && m->slot[slot].generation == p->generation) {
		id = m->id;
		rules = m->slot[slot].rules;
		home = m->slot[slot].home;
		names = m->slot[slot].names;
		anchor = m->slot[slot].anchor;
	}
	k->id = id | p->rule[NOTHING];
	k->rules = rules | p->rule[NOTHING];
	k->home = home | p->rule[NOTHING];
	k->names = names | p->rule[NOTHING];
	k->anchor = anchor | p->rule[NOTHING];
}

/* The rules of a name in a directory, which hold whatever object bears it. */
static __always_inline struct named *named_in(__u32 slot, __u32 set, struct dentry *d)
{
	__u32 first = 0, second = 1;
	struct name *key = bpf_map_lookup_elem(&name_key, &first), *blank = bpf_map_lookup_elem(&name_key, &second);
	void *inner;

	if (!key || !blank || bpf_probe_read_kernel(key, sizeof(*key), blank))
		return NULL;
	key->set = set;
	bpf_probe_read_kernel_str(key->text, sizeof(key->text), d->d_name.name);
	inner = bpf_map_lookup_elem(&names, &slot);
	return inner ? bpf_map_lookup_elem(inner, key) : NULL;
}

/* One that denies beats one that reports, which beats none; else the one that
   was there. Without a branch, for the verifier would follow each of them. */
static __always_inline __u32 stronger(__u32 old, __u32 rule)
{
	__u32 no_old = ~(old | -old) >> 31, some = (rule | -rule) >> 31;
	__u32 take = some & (no_old | (rule >> 31 & ~old >> 31));

	return old ^ ((old ^ rule) & -take);
}

/* The sets of rules that a place in a file system is under: more than one
   where an object is not where its rules' paths have it. */
struct under {
	__u32 set[3];
	__u32 anchor; /* of its name */
	__u32 lost;   /* there were more, or no end was found */
	__u32 watch;  /* of the sets, once they are weighed */
};

static __always_inline void add_set(struct under *u, __u32 set)
{
	__u32 some = -((set | -set) >> 31);

	u->lost |= u->set[2] & some;
	u->set[2] ^= (u->set[2] ^ u->set[1]) & some;
	u->set[1] ^= (u->set[1] ^ u->set[0]) & some;
	u->set[0] ^= (u->set[0] ^ set) & some;
}

/* A walk from what a dentry names up to where all is said. */
struct walk {
	const struct policy *p;
	struct dentry *d;
	struct known k; /* of d */
	struct under u;
	__u32 done;
};

/* One step of it. The kernel's own loop calls this: the verifier follows it
   once, not once for each step. */
static long step_up(__u32 i, struct walk *w)
{
	const struct policy *p = w->p;
	struct dentry *d = w->d, *parent = d->d_parent;
	__u32 named = 0, anchor = 0;
	struct known up;

	add_set(&w->u, w->k.rules);
	if (parent == d) {
		/* One that was opened by handle may hang nowhere. */
		w->u.lost |= d->d_flags & DCACHE_DISCONNECTED && d != d->d_inode->i_sb->s_root;
		w->done = 1;
		return 1;
	}
	know(p, parent->d_inode, &up);
	if (up.names) {
		struct named *n = named_in(slot_of(p), up.names, d);

		if (n) {
			named = n->rules;
			anchor = n->anchor;
		}
	}
	named |= p->rule[NOTHING];
	add_set(&w->u, named);
	if (i == 0)
		w->u.anchor = anchor | p->rule[NOTHING];
	/* Here its rules say all there is to say. */
	if (named || (w->k.rules && w->k.home && w->k.home == up.id)) {
		w->done = 1;
		return 1;
	}
	w->d = parent;
	w->k = up;
	return 0;
}

/* Finds the rules of what a dentry names: those of the object and of its name,
   or of the nearest directory above that has some. */
static __always_inline void look(const struct policy *p, struct dentry *d, struct under *u)
{
	__u32 nothing = p->rule[NOTHING];
	struct walk w = {.p = p, .d = d, .u = {{nothing, nothing, nothing}, nothing, nothing}};

	know(p, d->d_inode, &w.k);
	bpf_loop(MAX_DEPTH, step_up, &w, 0);
	*u = w.u;
	u->lost |= !w.done | nothing;
}

/* As look, of a place in a directory that was found clear at that moment; else
   false. */
static __always_inline bool look_in_clear(const struct policy *p, struct dentry *d, struct under *u, __u64 now)
{
	struct dentry *parent = d->d_parent;
	struct known k;

	if (parent == d || !is_clear(parent->d_inode, now))
		return false;
	know(p, d->d_inode, &k);
	u->set[0] = k.rules;
	u->set[1] = u->set[2] = u->anchor = u->lost = p->rule[NOTHING];
	return true;
}

/* Notes that a directory is clear, if it is: nothing is said of it, of anything
   above it or of names in it. It is looked at by itself: what was looked at
   before may not be in it any more. */
static __always_inline void learn_clear(const struct policy *p, struct dentry *dir, __u64 now)
{
	struct under u;
	struct known k;

	if (!may_be_clear(dir->d_inode, now))
		return;
	look(p, dir, &u);
	know(p, dir->d_inode, &k);
	if (!(u.set[0] | u.anchor | u.lost | k.names))
		note_clear(dir->d_inode, now);
}

/* The rule that has the program of a task on a list; 0 if there is none. */
static __always_inline __u32 trusted_ref(const struct policy *p, struct task_struct *task, __u32 list)
{
	struct task_label *l = bpf_task_storage_get(&labels, task, 0, 0);
	struct listed_program key = {.list = list};
	__u32 slot = slot_of(p), *ref;
	void *inner;

	/* One that was told to load more than itself is another's. */
	if (!l || l->origin != FROM_IMAGE || l->flags & LABEL_PRELOADED)
		return 0;
	key.dev = l->exe.dev;
	key.ino = l->exe.ino;
	inner = bpf_map_lookup_elem(&trusted, &slot);
	ref = inner ? bpf_map_lookup_elem(inner, &key) : NULL;
	return ref ? *ref : 0;
}

/* What the sets say to the current task. */
struct weighing {
	struct fileset *s;
	struct listed_program who;
	__u32 slot;
	__u32 set[3];
	__u32 writes; /* masks of what is wanted */
	__u32 reads;
	__u32 may;
	__u32 ref;
	__u32 watch;
	__u32 nothing;
};

static long weigh_exception(__u32 i, struct weighing *w)
{
	struct listed_program who = w->who;
	__u32 closed, may, slot = w->slot;
	struct exception *e;
	__u64 at = i;
	void *inner;

	if (i >= w->s->count)
		return 1;
	/* The verifier must see the bound on the very register that is used. */
	asm volatile("" : "+r"(at));
	at &= EXCEPTIONS - 1;
	e = &w->s->except[at];
	who.list = e->programs;
	inner = who.ino ? bpf_map_lookup_elem(&trusted, &slot) : NULL;
	may = inner && bpf_map_lookup_elem(inner, &who) ? e->may : 0;
	w->may |= may | w->nothing;
	closed = -e->ends;
	w->ref = stronger(w->ref, e->write & w->writes & closed & -(~w->may & 1));
	w->ref = stronger(w->ref, e->read & w->reads & closed & -(~w->may >> 1 & 1));
	w->may &= ~closed;
	return 0;
}

static long weigh_set(__u32 i, struct weighing *w)
{
	__u32 slot = w->slot, set = i ? i > 1 ? w->set[2] : w->set[1] : w->set[0];
	void *inner = bpf_map_lookup_elem(&filesets, &slot);

	if (!set)
		return 1;
	w->s = inner ? bpf_map_lookup_elem(inner, &set) : NULL;
	if (!w->s) {
		w->ref = DENY | RULE_DEPTH;
		return 1;
	}
	w->ref = stronger(w->ref, w->s->write & w->writes);
	w->ref = stronger(w->ref, w->s->read & w->reads);
	w->watch |= w->s->watch;
	w->may = w->nothing;
	if (w->s->count)
		bpf_loop(EXCEPTIONS, weigh_exception, w, 0);
	return 0;
}

/* The rule against what is wanted, by the sets of a slot; nothing is 0. */
ONCE int weigh(struct under *u, __u32 slot, __u32 want, __u32 nothing)
{
	struct task_label *l = bpf_task_storage_get(&labels, bpf_get_current_task_btf(), 0, 0);
	struct weighing w = {.slot = slot, .writes = -(want & WANT_WRITE), .reads = -(want >> 1 & 1), .may = nothing, .ref = nothing, .watch = nothing, .nothing = nothing};

	if (!u)
		return DENY | RULE_DEPTH;
	/* One that was told to load more than itself is another's. */
	if (l && l->origin == FROM_IMAGE && !(l->flags & LABEL_PRELOADED)) {
		w.who.dev = l->exe.dev;
		w.who.ino = l->exe.ino;
	}
	__builtin_memcpy(w.set, u->set, sizeof(w.set));
	bpf_loop(3, weigh_set, &w, 0);
	u->watch = w.watch;
	return w.ref;
}

/* The rule against what is wanted of what is under those sets. */
static __always_inline __u32 ref_under(const struct policy *p, struct under *u, __u32 want, __u32 *watch)
{
	__u32 ref = 0;

	u->watch = 0;
	if (u->set[0])
		ref = weigh(u, slot_of(p), want, 0);
	*watch |= u->watch | p->rule[NOTHING];
	ref |= p->rule[NOTHING];
	return stronger(ref, (DENY | RULE_DEPTH) & -((u->lost | -u->lost) >> 31));
}

static __always_inline __u32 file_ref(const struct policy *p, struct dentry *d, __u32 want, __u32 *watch)
{
	struct dentry *parent = d->d_parent;
	__u64 now = moment(p);
	struct under u;

	if (!look_in_clear(p, d, &u, now)) {
		look(p, d, &u);
		if (parent != d && !(u.set[0] | u.anchor | u.lost))
			learn_clear(p, parent, now);
	}
	return ref_under(p, &u, want, watch);
}

/* The rule against changing what the dentry names, and the one that wants it
   recorded. A directory on the way to something protected can be changed but not
   moved. */
static __always_inline __u32 change_ref(const struct policy *p, struct dentry *d, bool moves, struct under *u, __u32 *watch)
{
	__u32 ref;
	struct known k;

	if (!look_in_clear(p, d, u, moment(p)))
		look(p, d, u);
	ref = stronger(ref_under(p, u, WANT_WRITE, watch), u->anchor);
	if (!moves)
		return ref;
	know(p, d->d_inode, &k);
	return stronger(ref, k.anchor);
}

/* What was done to a file that may be changed. */
enum changed {
	CHANGED_CREATED = 1,
	CHANGED_OPENED, /* to be written */
	CHANGED_CUT,
	CHANGED_REMOVED,
	CHANGED_RENAMED, /* away from the name */
	CHANGED_NAMED,   /* to the name */
	CHANGED_LINKED,
	CHANGED_BY_DEFAULT = CHANGED_LINKED, /* those above are recorded of every file */
	CHANGED_ATTRIBUTES,
	CHANGED_XATTR,
	CHANGED_FLAGS,
	CHANGED_COVERED, /* mounted over */
};

/* Changes of files that no rule watches are the same if one program does one
   thing in one directory. What falls out of this map begins anew. */
struct change_key {
	__u64 exe_ino;
	__u64 dir;
	__u32 exe_dev;
	__u32 dev;
	__u64 why;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct change_key);
	__type(value, struct series);
} changes SEC(".maps");

static __always_inline struct series *changes_of(const struct about *a)
{
	struct task_label *l = bpf_task_storage_get(&labels, bpf_get_current_task_btf(), 0, 0);
	struct change_key key = {.why = a->why};
	struct dentry *d = a->dentry;
	struct series *s;
	__u32 second = 1;
	void *blank;

	if (l) {
		key.exe_ino = l->who.exe_ino;
		key.exe_dev = l->who.exe_dev;
	}
	key.dir = BPF_CORE_READ(d, d_parent, d_inode, i_ino);
	key.dev = BPF_CORE_READ(d, d_parent, d_inode, i_sb, s_dev);
	s = bpf_map_lookup_elem(&changes, &key);
	if (s)
		return s;
	blank = bpf_map_lookup_elem(&name_key, &second);
	if (blank)
		bpf_map_update_elem(&changes, &key, blank, BPF_NOEXIST);
	return bpf_map_lookup_elem(&changes, &key);
}

/* What the overlay does to the files below it, it does with the rights of who
   mounted it: it is no act of the task's own. io_uring lends rights, too. */
static __always_inline bool for_overlay(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);

	return task->cred != task->real_cred && !(task->flags & PF_IO_WORKER) && (regs->orig_ax & ~0x40000000u) != 426 /* io_uring_enter */;
}

/* Records a change that was allowed. Of a rule that watches none is held back. */
static __attribute__((noinline)) void tell_change(const struct policy *p, __u32 ref, const struct about *a)
{
	struct counters *c = counters_now();
	struct tally *t = tally_of(OP_CHANGED);
	struct series *s;
	struct event *e;

	if (!c || !t)
		return;
	__sync_fetch_and_add(&t->happened, 1);
	s = ref ? series_of(generation_of(p), ref, VERDICT_ALLOWED, a) : changes_of(a);
	if (s && merge(s, bpf_ktime_get_boot_ns())) {
		__sync_fetch_and_add(&t->merged, 1);
		return;
	}
	if (!ref && held_back(p)) {
		__sync_fetch_and_add(&t->held, 1);
		return;
	}
	e = reserve_audit(p, OP_CHANGED, sizeof(*e), t, c);
	if (!e)
		return;
	e->rule = ref & ~DENY;
	e->why = a->why;
	if (s)
		number(e, s, e->sequence | AUDIT_SERIES);
	write_names(e, a->dentry);
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void changed(const struct policy *p, __u32 watch, struct dentry *d, __u64 why)
{
	struct about a = {.op = OP_CHANGED, .why = why, .dentry = d};

	if (watch || (why <= CHANGED_BY_DEFAULT && !for_overlay()))
		tell_change(p, watch, &a);
}

/* The content of a watched file, from the act that may change it to its end. */
struct content {
	__u64 id;    /* of the inode, as long as it is in memory */
	__u64 image; /* number of the image's inode whose content it had; 0: none */
	__u32 ref;
	__u32 flags;
};

enum {
	CONTENT_NEW = 1,    /* there was nothing of the name */
	CONTENT_MAPPED = 2, /* a mapping may go on changing it */
	CONTENT_GONE = 4,   /* the name is no more */
};

struct content_event {
	struct event e;
	__u64 id;
	__u64 image;
	__u32 dev;
	__u32 flags;
	/* The agent's: what is known of the two digests, and they. */
	__u8 known[2];
	__u8 pad[6];
	__u8 digest[2][32];
};

AT(content_event, id, 816);
AT(content_event, dev, 832);
AT(content_event, known, 840);
AT(content_event, digest, 848);

struct watched {
	__u64 id;
	__u64 image;
};

struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct watched);
} watched SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} watched_last SEC(".maps");

/* Watched files that are open for writing, by the address of the open file. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, struct content);
} writing SEC(".maps");

/* Ends of writing that the agent has not seen yet: one stands for those after
   it, for the agent looks at the file later than all of them. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u64);
} written_unseen SEC(".maps");

/* What a task is about to do to a watched file; what became of it is seen when
   the kernel comes back from it. */
struct acting {
	struct content c;
	__u64 dentry;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, struct acting);
} acting SEC(".maps");

/* Finds the number of a watched inode, and what it holds of the image. It is
   asked before the first change, and remembers. */
static __always_inline void know_content(struct inode *inode, struct content *c)
{
	struct watched *w = bpf_inode_storage_get(&watched, inode, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	struct object o = {};
	__u32 zero = 0;
	__u64 *last;

	if (!w)
		return;
	last = bpf_map_lookup_elem(&watched_last, &zero);
	if (!w->id && last) {
		if (origin_of(inode, &o) == FROM_IMAGE)
			w->image = o.ino;
		w->id = __sync_fetch_and_add(last, 1) + 1;
	}
	c->id = w->id;
	c->image = w->image;
}

static __always_inline void begin_writing(struct file *file, __u32 watch)
{
	struct content c = {.ref = watch};
	__u64 key = (__u64)file;

	if (file->f_mode & FMODE_CREATED)
		c.flags = CONTENT_NEW;
	know_content(file->f_inode, &c);
	/* If there is no room, the end of it is not seen; that is counted. */
	if (bpf_map_update_elem(&writing, &key, &c, BPF_ANY)) {
		struct tally *t = tally_of(OP_CONTENT);

		if (t) {
			__sync_fetch_and_add(&t->happened, 1);
			__sync_fetch_and_add(&t->lost, 1);
		}
	}
}

static __always_inline void begin_act(struct dentry *d, struct content *c)
{
	struct acting a = {.c = *c, .dentry = (__u64)d};
	__u64 key = bpf_get_current_pid_tgid();

	bpf_map_update_elem(&acting, &key, &a, BPF_ANY);
}

/* The content of what the dentry names is another now. */
static __attribute__((noinline)) void tell_content(const struct policy *p, const struct content *of, struct dentry *d, __u64 once)
{
	struct counters *c = counters_now();
	struct tally *t = tally_of(OP_CONTENT);
	struct content_event *e;
	__u64 id = of->id;

	if (!c || !t)
		return;
	__sync_fetch_and_add(&t->happened, 1);
	if (once && bpf_map_update_elem(&written_unseen, &id, &once, BPF_NOEXIST) && bpf_map_lookup_elem(&written_unseen, &id)) {
		__sync_fetch_and_add(&t->merged, 1);
		return;
	}
	e = (void *)reserve_audit(p, OP_CONTENT, sizeof(*e), t, c);
	if (!e) {
		bpf_map_delete_elem(&written_unseen, &id);
		return;
	}
	e->e.rule = of->ref & ~DENY;
	e->e.why = of->flags;
	e->id = id;
	e->image = of->image;
	e->flags = of->flags;
	e->dev = BPF_CORE_READ(d, d_parent, d_inode, i_sb, s_dev);
	__builtin_memset(e->known, 0, sizeof(*e) - __builtin_offsetof(struct content_event, known));
	write_names(&e->e, d);
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void end_act(struct dentry *d)
{
	__u64 key = bpf_get_current_pid_tgid();
	struct acting *a = bpf_map_lookup_elem(&acting, &key);
	struct content c;

	if (!a || a->dentry != (__u64)d)
		return;
	c = a->c;
	bpf_map_delete_elem(&acting, &key);
	tell_content(policy_now(), &c, d, 0);
}

/* The last use of an open file ends. */
SEC("fentry/__fput")
int BPF_PROG(on_close, struct file *file)
{
	__u64 key = (__u64)file;
	struct content *of, c;

	if (!(file->f_mode & FMODE_WRITE) || file->f_mode & FMODE_NOACCOUNT)
		return 0;
	of = bpf_map_lookup_elem(&writing, &key);
	if (!of)
		return 0;
	c = *of;
	bpf_map_delete_elem(&writing, &key);
	tell_content(policy_now(), &c, file->f_path.dentry, 1);
	return 0;
}

SEC("fexit/notify_change")
int BPF_PROG(on_cut, void *idmap, struct dentry *d, struct iattr *attr, void *delegated, int ret)
{
	if (!ret)
		end_act(d);
	return 0;
}

SEC("fexit/vfs_rename")
int BPF_PROG(on_renamed, struct renamedata *rd, int ret)
{
	if (!ret)
		end_act(rd->old_dentry);
	return 0;
}

SEC("fexit/vfs_unlink")
int BPF_PROG(on_unlinked, void *idmap, struct inode *dir, struct dentry *d, void *delegated, int ret)
{
	if (!ret)
		end_act(d);
	return 0;
}

SEC("fexit/vfs_link")
int BPF_PROG(on_linked, struct dentry *old, void *idmap, struct inode *dir, struct dentry *d, void *delegated, int ret)
{
	if (!ret)
		end_act(d);
	return 0;
}

/* What a shared mapping writes, it may write after the file was closed. */
SEC("lsm/mmap_file")
int BPF_PROG(on_map_shared, struct file *file, unsigned long reqprot, unsigned long prot, unsigned long flags, int prev)
{
	__u64 key = ctx[0];
	struct content *c;

	flags &= MAP_TYPE;
	if (prev || !key || (flags != MAP_SHARED && flags != MAP_SHARED_VALIDATE))
		return prev;
	c = bpf_map_lookup_elem(&writing, &key);
	if (c)
		c->flags |= CONTENT_MAPPED;
	return 0;
}

/* A change of what the dentry names, for which those that follow ask. */
static __always_inline int change(struct dentry *d, bool moves, __u64 why, __u32 *watch)
{
	struct about a = {.op = OP_WRITE, .dentry = d};
	const struct policy *p;
	struct under u;
	int err;

	if (!is_workload())
		return 0;
	p = policy_now();
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (p->files) {
		err = decide(p, change_ref(p, d, moves, &u, watch), &a);
		if (err)
			return err;
	}
	changed(p, *watch, d, why);
	return 0;
}

static __always_inline int change_only(struct dentry *d, __u64 why)
{
	__u32 watch = 0;

	return change(d, false, why, &watch);
}

/* Gives what is called old another name. What may not be read may not leave the
   directory that says so. */
static __always_inline int refer(struct dentry *old, struct dentry *d, bool moves)
{
	struct about a = {.op = OP_WRITE, .dentry = old};
	__u32 watch = 0, from_watch = 0, to_watch = 0;
	struct content c = {};
	struct under from, to;
	const struct policy *p;
	int err;

	if (!is_workload())
		return 0;
	p = policy_now();
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!p->files)
		goto told;
	err = decide(p, change_ref(p, old, moves, &from, &from_watch), &a);
	if (err)
		return err;
	a.dentry = d;
	err = decide(p, change_ref(p, d, moves, &to, &to_watch), &a);
	if (err)
		return err;
	if (p->reads && (from.set[0] != to.set[0] || from.set[1] != to.set[1] || from.set[2] != to.set[2])) {
		a.op = OP_READ;
		a.dentry = old;
		err = decide(p, ref_under(p, &from, WANT_READ, &watch), &a);
		if (err)
			return err;
	}
told:
	changed(p, from_watch, old, moves ? CHANGED_RENAMED : CHANGED_LINKED);
	if (moves || to_watch)
		changed(p, to_watch, d, moves ? CHANGED_NAMED : CHANGED_CREATED);
	if (!to_watch)
		return 0;
	if ((BPF_CORE_READ(old, d_inode, i_mode) & S_IFMT) != S_IFREG)
		return 0;
	c.ref = to_watch;
	know_content(old->d_inode, &c);
	c.image = 0;
	c.flags = CONTENT_NEW;
	if (moves && !absent(&d->d_inode)) {
		struct object o = {};

		c.flags = 0;
		if (origin_of(d->d_inode, &o) == FROM_IMAGE)
			c.image = o.ino;
	}
	begin_act(moves ? old : d, &c);
	return 0;
}

/* What is left of a watched file that is removed is what was known of it. */
static __always_inline int removal(struct dentry *d)
{
	struct content c = {.flags = CONTENT_GONE};
	int err = change(d, true, CHANGED_REMOVED, &c.ref);

	if (err || !c.ref || (BPF_CORE_READ(d, d_inode, i_mode) & S_IFMT) != S_IFREG)
		return err;
	know_content(d->d_inode, &c);
	begin_act(d, &c);
	return 0;
}

static __always_inline int set_attributes(struct dentry *d, struct iattr *attr)
{
	bool cuts = attr->ia_valid & ATTR_SIZE;
	struct content c = {};
	int err = change(d, false, cuts ? CHANGED_CUT : CHANGED_ATTRIBUTES, &c.ref);

	if (err || !c.ref || !cuts)
		return err;
	know_content(d->d_inode, &c);
	begin_act(d, &c);
	return 0;
}

SEC("lsm/inode_create")
int BPF_PROG(on_create, struct inode *dir, struct dentry *d, unsigned short mode, int prev)
{
	return prev ? prev : change_only(d, CHANGED_CREATED);
}

SEC("lsm/inode_mkdir")
int BPF_PROG(on_mkdir, struct inode *dir, struct dentry *d, unsigned short mode, int prev)
{
	return prev ? prev : change_only(d, CHANGED_CREATED);
}

SEC("lsm/inode_symlink")
int BPF_PROG(on_symlink, struct inode *dir, struct dentry *d, const char *to, int prev)
{
	return prev ? prev : change_only(d, CHANGED_CREATED);
}

SEC("lsm/inode_link")
int BPF_PROG(on_link, struct dentry *old, struct inode *dir, struct dentry *d, int prev)
{
	int err = prev ? prev : into_volume(old, d);

	return err ? err : refer(old, d, false);
}

/* What is pinned keeps the programs where they are when their loader ends. */
static __always_inline int unpin(struct dentry *d)
{
	struct about a = {.op = OP_SETTING, .dentry = d};

	if (!shared() || d->d_parent->d_inode->i_sb->s_magic != BPF_FS_MAGIC || !is_workload())
		return 0;
	return decide(policy_now(), DENY | RULE_SETTING, &a);
}

SEC("lsm/inode_unlink")
int BPF_PROG(on_unlink, struct inode *dir, struct dentry *d, int prev)
{
	if (!prev)
		prev = unpin(d);
	return prev ? prev : removal(d);
}

SEC("lsm/inode_rmdir")
int BPF_PROG(on_rmdir, struct inode *dir, struct dentry *d, int prev)
{
	return prev ? prev : removal(d);
}

SEC("lsm/inode_rename")
int BPF_PROG(on_rename, struct inode *old_dir, struct dentry *old, struct inode *dir, struct dentry *d, int prev)
{
	int err = prev ? prev : into_volume(old, d);

	if (!err) /* they may change places */
		err = into_volume(d, old);
	return err ? err : refer(old, d, true);
}

/* The linker takes the one whose number is that of the hook's arguments. */
SEC("lsm/inode_setattr")
int BPF_PROG(on_setattr___2, struct dentry *d, struct iattr *attr, int prev)
{
	return prev ? prev : set_attributes(d, attr);
}

SEC("lsm/inode_setattr")
int BPF_PROG(on_setattr___3, struct mnt_idmap *idmap, struct dentry *d, struct iattr *attr, int prev)
{
	return prev ? prev : set_attributes(d, attr);
}

/* What lets the kernel go on to its own check of capabilities. Before it asked
   another hook whether to make it, a BPF LSM that answered 0 made it skip the
   check, and 1 did not; since then 1 is no answer. */
static __always_inline int go_on(void)
{
	union security_list_options *hooks = NULL;

	return bpf_core_field_exists(hooks->inode_xattr_skipcap) ? 0 : 1;
}

SEC("lsm/inode_setxattr")
int BPF_PROG(on_setxattr, struct user_namespace *ns, struct dentry *d, const char *name, const void *value, __u64 size, int flags, int prev)
{
	int err = prev < 0 ? prev : change_only(d, CHANGED_XATTR);

	return err ? err : go_on();
}

SEC("lsm/inode_removexattr")
int BPF_PROG(on_removexattr, struct user_namespace *ns, struct dentry *d, const char *name, int prev)
{
	int err = prev < 0 ? prev : change_only(d, CHANGED_XATTR);

	return err ? err : go_on();
}

/* Changing inode flags needs no descriptor open for writing. */
static __always_inline int set_flags(struct file *file, unsigned int cmd)
{
	switch (cmd) {
	case FS_IOC_SETFLAGS:
	case FS_IOC32_SETFLAGS:
	case FS_IOC_FSSETXATTR:
	case FS_IOC_SETVERSION:
	case FS_IOC_ENABLE_VERITY:
	case FS_IOC_SET_ENCRYPTION_POLICY:
		return change_only(file->f_path.dentry, CHANGED_FLAGS);
	}
	return 0;
}

SEC("lsm/file_ioctl")
int BPF_PROG(on_ioctl, struct file *file, unsigned int cmd, unsigned long arg, int prev)
{
	return prev ? prev : set_flags(file, cmd);
}

SEC("lsm/inode_mknod")
int BPF_PROG(on_mknod, struct inode *dir, struct dentry *d, unsigned short mode, __u32 dev, int prev)
{
	struct about a = {.op = OP_MKNOD, .detail = dev, .dentry = d};
	__u32 type = mode & S_IFMT;
	int err = 0;

	if (prev || !is_workload())
		return prev;
	/* Character device 0:0 is a whiteout: the overlay makes them itself. */
	if (type == S_IFBLK || (type == S_IFCHR && dev))
		err = decide(policy_now(), ref_of(policy_now(), ON_MKNOD), &a);
	return err ? err : change_only(d, CHANGED_CREATED);
}

static __always_inline bool is_usual(__u32 type, __u32 rdev)
{
	__u32 major = rdev >> 20, minor = rdev & 0xfffff;

	if (type != S_IFCHR)
		return false;
	switch (major) {
	case 1: /* null zero full random urandom */
		return minor == 3 || minor == 5 || (minor >= 7 && minor <= 9);
	case 5: /* tty ptmx */
		return minor == 0 || minor == 2;
	}
	return major >= 136 && major <= 143; /* pts */
}

/* Whether the container of this task was given the device. Containers are the
   cgroups right below the first, and none of their processes can leave: the
   files that would move it are settings. */
static __always_inline bool device_given(__u32 type, __u32 rdev)
{
	struct device key = {.type = type, .number = rdev};

	key.cgroup = shared() ? owner_of(bpf_get_current_task_btf()) : bpf_get_current_ancestor_cgroup_id(1);
	return key.cgroup && bpf_map_lookup_elem(&devices, &key);
}

static __always_inline bool device_allowed(__u32 type, __u32 rdev)
{
	return is_usual(type, rdev) || device_given(type, rdev);
}

/* Whether writing the file sets something of the kernel itself rather than of
   a process: all of sysfs and its kin, and of proc what is below no process. */
static __always_inline bool is_setting(unsigned long magic, struct dentry *d)
{
	char first = 0;

	switch (magic) {
	case SYSFS_MAGIC:
	case SECURITYFS_MAGIC:
	case DEBUGFS_MAGIC:
	case TRACEFS_MAGIC:
	case BPF_FS_MAGIC:
	case EFIVARFS_MAGIC:
	case CONFIGFS_MAGIC:
	case BINFMTFS_MAGIC:
	case CGROUP_SUPER_MAGIC:
	case CGROUP2_SUPER_MAGIC:
		return true;
	case PROC_SUPER_MAGIC:
		break;
	default:
		return false;
	}
	for (int i = 0; i < 8; i++) {
		struct dentry *parent = d->d_parent;

		if (parent == parent->d_parent) {
			bpf_probe_read_kernel(&first, 1, d->d_name.name);
			return first < '0' || first > '9';
		}
		d = parent;
	}
	return true;
}

static __always_inline bool is_proc_mem(unsigned long magic, struct dentry *d)
{
	char name[4] = {};

	if (magic != PROC_SUPER_MAGIC)
		return false;
	bpf_probe_read_kernel(name, sizeof(name), d->d_name.name);
	return name[0] == 'm' && name[1] == 'e' && name[2] == 'm' && name[3] == 0;
}

static __always_inline int check_write(const struct policy *p, struct file *file)
{
	unsigned long magic = file->f_inode->i_sb->s_magic;
	struct dentry *d = file->f_path.dentry;
	struct about a = {.op = OP_SETTING, .dentry = d};

	if (is_setting(magic, d))
		return decide_at(p, DENY | RULE_SETTING, &a, &file->f_path);
	if (!is_proc_mem(magic, d))
		return 0;
	/* A process may write its own read-only pages this way. */
	a.op = OP_MEMORY;
	a.why = 4; /* MEMORY_PROC */
	return decide_at(p, ref_of(p, ON_MEMORY), &a, &file->f_path);
}

/* Tells the loader what it opens. */
static __always_inline void show(struct file *file)
{
	__u32 zero = 0;
	struct shown *s = bpf_map_lookup_elem(&shown, &zero);
	struct object o = {};

	if (!s)
		return;
	s->origin = origin_of(file->f_inode, &o);
	s->object = o;
	s->times++;
}

static __always_inline void opened_to_write(const struct policy *p, struct file *file, __u32 watch)
{
	struct content c = {};

	if (!(file->f_mode & FMODE_WRITE)) {
		/* It is about to be cut, which is told where it is done. */
		if (watch)
			know_content(file->f_inode, &c);
		return;
	}
	/* That it was created is told already. */
	if (!(file->f_mode & FMODE_CREATED))
		changed(p, watch, file->f_path.dentry, CHANGED_OPENED);
	if (watch)
		begin_writing(file, watch);
}

SEC("lsm/file_open")
int BPF_PROG(on_open, struct file *file, int prev)
{
	struct about a = {.dentry = file->f_path.dentry};
	struct path *path = &file->f_path;
	const struct policy *p;
	struct inode *inode;
	__u32 type, want = 0, watch = 0, label;
	int err;

	/* NOACCOUNT is the overlay opening the file below one already checked. */
	if (prev || file->f_mode & FMODE_NOACCOUNT)
		return prev;
	label = label_now();
	if (shared() && label == LABEL_AGENT) {
		show(file);
		return 0;
	}
	if (file->f_mode & FMODE_WRITE && label >= LABEL_SETUP)
		note_writer(file, label);
	if (label < LABEL_WORKLOAD)
		return 0;
	p = policy_now();
	inode = file->f_inode;
	type = inode->i_mode & S_IFMT;
	if ((type == S_IFCHR || type == S_IFBLK) && !device_allowed(type, inode->i_rdev)) {
		a.op = OP_DEVICE;
		a.detail = inode->i_rdev;
		return decide_at(p, DENY | RULE_DEVICE, &a, path);
	}
	if (file->f_mode & FMODE_WRITE) {
		want = WANT_WRITE;
		err = check_write(p, file);
		if (err)
			return err;
	} else if (file->f_flags & O_TRUNC)
		want = WANT_WRITE;
	a.op = want ? OP_WRITE : OP_READ;
	if (!p)
		return decide_at(p, DENY | RULE_NO_POLICY, &a, path);
	if (p->rule[ON_SCRIPT]) {
		err = read_by_interpreter(p, file);
		if (err)
			return err;
	}
	if (file->f_mode & FMODE_READ && p->reads)
		want |= WANT_READ;
	if (p->files && want) {
		err = decide_at(p, file_ref(p, file->f_path.dentry, want, &watch), &a, path);
		if (err)
			return err;
	}
	if (want & WANT_WRITE && type == S_IFREG && (watch || inode->i_sb->s_magic != PROC_SUPER_MAGIC))
		opened_to_write(p, file, watch);
	return 0;
}

static __always_inline bool is_directory(struct dentry *d)
{
	return d->d_inode && (d->d_inode->i_mode & S_IFMT) == S_IFDIR;
}

/* The kernel moves a directory, whoever asked for it. */
SEC("fentry/d_move")
int BPF_PROG(on_move_begins, struct dentry *d, struct dentry *target)
{
	if (is_directory(d))
		move_begins();
	return 0;
}

SEC("fexit/d_move")
int BPF_PROG(on_move_ended, struct dentry *d, struct dentry *target)
{
	if (is_directory(d))
		move_ends();
	return 0;
}

SEC("fentry/d_exchange")
int BPF_PROG(on_exchange_begins, struct dentry *one, struct dentry *other)
{
	move_begins();
	return 0;
}

SEC("fexit/d_exchange")
int BPF_PROG(on_exchange_ended, struct dentry *one, struct dentry *other)
{
	move_ends();
	return 0;
}

#endif
