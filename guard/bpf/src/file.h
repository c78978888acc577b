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

static __always_inline __u32 file_ref(const struct policy *p, struct dentry *d, __u32 want)
{
	struct dentry *parent = d->d_parent;
	__u64 now = moment(p);
	struct under u;
	__u32 watch = 0;

	if (!look_in_clear(p, d, &u, now)) {
		look(p, d, &u);
		if (parent != d && !(u.set[0] | u.anchor | u.lost))
			learn_clear(p, parent, now);
	}
	return ref_under(p, &u, want, &watch);
}

/* The rule against changing what the dentry names. A directory on the way to
   something protected can be changed but not moved. */
static __always_inline __u32 change_ref(const struct policy *p, struct dentry *d, bool moves, struct under *u)
{
	__u32 watch = 0, ref;
	struct known k;

	if (!look_in_clear(p, d, u, moment(p)))
		look(p, d, u);
	ref = stronger(ref_under(p, u, WANT_WRITE, &watch), u->anchor);
	if (!moves)
		return ref;
	know(p, d->d_inode, &k);
	return stronger(ref, k.anchor);
}

static __always_inline int change(struct dentry *d, bool moves)
{
	struct about a = {.op = OP_WRITE, .dentry = d};
	const struct policy *p;
	struct under u;

	if (!is_workload())
		return 0;
	p = policy_now();
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!p->files)
		return 0;
	return decide(p, change_ref(p, d, moves, &u), &a);
}

/* Gives what is called old another name. What may not be read may not leave the
   directory that says so. */
static __always_inline int refer(struct dentry *old, struct dentry *d, bool moves)
{
	struct about a = {.op = OP_WRITE, .dentry = old};
	struct under from, to;
	const struct policy *p;
	__u32 watch = 0;
	int err;

	if (!is_workload())
		return 0;
	p = policy_now();
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!p->files)
		return 0;
	err = decide(p, change_ref(p, old, moves, &from), &a);
	if (err)
		return err;
	a.dentry = d;
	err = decide(p, change_ref(p, d, moves, &to), &a);
	if (err || !p->reads)
		return err;
	if (from.set[0] == to.set[0] && from.set[1] == to.set[1] && from.set[2] == to.set[2])
		return 0;
	a.op = OP_READ;
	a.dentry = old;
	return decide(p, ref_under(p, &from, WANT_READ, &watch), &a);
}

SEC("lsm/inode_create")
int BPF_PROG(on_create, struct inode *dir, struct dentry *d, unsigned short mode, int prev)
{
	return prev ? prev : change(d, false);
}

SEC("lsm/inode_mkdir")
int BPF_PROG(on_mkdir, struct inode *dir, struct dentry *d, unsigned short mode, int prev)
{
	return prev ? prev : change(d, false);
}

SEC("lsm/inode_symlink")
int BPF_PROG(on_symlink, struct inode *dir, struct dentry *d, const char *to, int prev)
{
	return prev ? prev : change(d, false);
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
	return prev ? prev : change(d, true);
}

SEC("lsm/inode_rmdir")
int BPF_PROG(on_rmdir, struct inode *dir, struct dentry *d, int prev)
{
	return prev ? prev : change(d, true);
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
	return prev ? prev : change(d, false);
}

SEC("lsm/inode_setattr")
int BPF_PROG(on_setattr___3, struct mnt_idmap *idmap, struct dentry *d, struct iattr *attr, int prev)
{
	return prev ? prev : change(d, false);
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
	int err = prev < 0 ? prev : change(d, false);

	return err ? err : go_on();
}

SEC("lsm/inode_removexattr")
int BPF_PROG(on_removexattr, struct user_namespace *ns, struct dentry *d, const char *name, int prev)
{
	int err = prev < 0 ? prev : change(d, false);

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
		return change(file->f_path.dentry, false);
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
	return err ? err : change(d, false);
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

SEC("lsm/file_open")
int BPF_PROG(on_open, struct file *file, int prev)
{
	struct about a = {.dentry = file->f_path.dentry};
	struct path *path = &file->f_path;
	const struct policy *p;
	struct inode *inode;
	__u32 type, want = 0, label;
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
	}
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
	if (!p->files || !want)
		return 0;
	return decide_at(p, file_ref(p, file->f_path.dentry, want), &a, path);
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
