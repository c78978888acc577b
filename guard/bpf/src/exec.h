// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// What may run: programs, executable mappings, executable memory.
#ifndef EXEC_H
#define EXEC_H

#include "event.h"

enum origin {
	FROM_IMAGE,
	FROM_CHANGE,    /* added or changed since the image: the upper layer */
	FROM_ELSEWHERE, /* another file system: tmpfs, memfd, a volume, proc */
	FROM_UNLINKED,
};

/* Why executable memory was refused. */
enum memory {
	MEMORY_ANONYMOUS = 1,
	MEMORY_WRITABLE, /* writable and executable at once */
	MEMORY_WRITTEN,  /* a mapped file's page was written before */
	MEMORY_PROC,     /* writing memory through /proc/PID/mem */
	MEMORY_PERSONA,  /* personality that makes every page executable */
};

static __always_inline bool is_image(__u32 dev)
{
	return bpf_map_lookup_elem(&images, &dev) != NULL;
}

/* The file that an overlay's inode stands for, in the image below; NULL if
 * there is none. */
static __always_inline struct inode *below(struct ovl_inode *ovl)
{
	struct ovl_inode___path *path = (void *)ovl;
	struct ovl_inode___stack *stack = (void *)ovl;
	struct ovl_entry___stack *oe;

	if (bpf_core_field_exists(path->lowerpath))
		return BPF_CORE_READ(path, lowerpath.dentry, d_inode);
	oe = BPF_CORE_READ(stack, oe);
	if (!oe || !BPF_CORE_READ(oe, __numlower))
		return NULL;
	return BPF_CORE_READ(oe, __lowerstack[0].dentry, d_inode);
}

/* The object of the image that an overlay's inode shows, once it was found. It
   shows no other until it is copied up. */
struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct object);
} below_shown SEC(".maps");

/* Finds the object below an overlay's inode, whose address stands in place of
   its number. */
ONCE int find_below(struct object *o)
{
	struct ovl_inode *ovl;
	struct inode *lower;

	if (!o)
		return FROM_ELSEWHERE;
	ovl = (void *)o->ino;
	o->dev = o->ino = 0;
	if (BPF_CORE_READ(ovl, __upperdentry))
		return FROM_CHANGE;
	lower = below(ovl);
	if (!lower)
		return FROM_ELSEWHERE;
	o->dev = BPF_CORE_READ(lower, i_sb, s_dev);
	o->ino = BPF_CORE_READ(lower, i_ino);
	/* What lies below a container's root is its image, whatever it lies on. */
	return shared() || is_image(o->dev) ? FROM_IMAGE : FROM_ELSEWHERE;
}

static __always_inline enum origin origin_below(struct inode *inode, struct object *o)
{
	struct ovl_inode *ovl = (void *)inode - bpf_core_field_offset(struct ovl_inode, vfs_inode);
	struct super_block *sb = inode->i_sb;
	struct object *seen = bpf_inode_storage_get(&below_shown, inode, 0, 0);
	struct mark *root;
	enum origin from;

	if (seen && seen->ino) {
		if (BPF_CORE_READ(ovl, __upperdentry))
			return FROM_CHANGE;
		*o = *seen;
		return FROM_IMAGE;
	}
	root = bpf_inode_storage_get(&marks, sb->s_root->d_inode, 0, 0);
	if (!root || root->kind != KIND_OVERLAY)
		return FROM_ELSEWHERE;
	o->ino = (__u64)ovl;
	from = find_below(o);
	if (from != FROM_IMAGE)
		return from;
	seen = bpf_inode_storage_get(&below_shown, inode, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (seen) {
		seen->dev = o->dev;
		*(volatile __u64 *)&seen->ino = o->ino; /* after the device */
	}
	return FROM_IMAGE;
}

/* Where the inode comes from, and its identity below the overlay. */
static __always_inline enum origin origin_of(struct inode *inode, struct object *o)
{
	struct super_block *sb = inode->i_sb;

	if (!inode->i_nlink)
		return FROM_UNLINKED;
	switch (sb->s_magic) {
	case OVERLAYFS_MAGIC:
		return origin_below(inode, o);
	case EROFS_MAGIC:
		o->dev = sb->s_dev;
		o->ino = inode->i_ino;
		return is_image(o->dev) ? FROM_IMAGE : FROM_ELSEWHERE;
	}
	return FROM_ELSEWHERE;
}

/* What the policy says of a program of the image. */
static __always_inline const struct program *program_of(const struct policy *p, const struct object *o)
{
	__u32 slot = slot_of(p);
	void *inner;

	if (!p->listed || !o->ino)
		return NULL;
	inner = bpf_map_lookup_elem(&listed, &slot);
	return inner ? bpf_map_lookup_elem(inner, o) : NULL;
}

/* The rule of the first list that lifts nothing here; lifted are those that
   do. */
ONCE int list_rule(__u32 slot, __u32 aspect, __u32 lifted)
{
	__u32 zero = 0, missing;
	const struct exec_lists *lists;
	const struct aspect_lists *l;
	void *inner = bpf_map_lookup_elem(&execs, &slot);

	lists = inner ? bpf_map_lookup_elem(inner, &zero) : NULL;
	if (!lists)
		return DENY | RULE_NO_POLICY;
	l = &lists->aspect[aspect & (ASPECTS - 1)];
	missing = l->deny & ~lifted;
	if (!missing)
		missing = l->audit & ~lifted;
	if (!missing)
		return 0;
	return l->rule[first_bit(missing) & (EXEC_LISTS - 1)];
}

static __always_inline __u32 list_ref(const struct policy *p, __u32 aspect, __u32 lifted)
{
	return list_rule(slot_of(p), aspect, lifted);
}

static __always_inline __u32 denied_ref(const struct policy *p, struct inode *inode, const struct program *program)
{
	__u32 slot = p->slot & 1;
	struct mark *m = bpf_inode_storage_get(&marks, inode, 0, 0);

	if (m && m->slot[slot].generation == p->generation && m->slot[slot].exec)
		return m->slot[slot].exec;
	return program ? program->denied : 0;
}

/* The lists that let files of this mount run. A mount is known by the directory
   that is its root, wherever it was put; what is mounted over it or in it, and
   the same file by another way, is not of it. */
static __always_inline __u32 volume_lists(const struct policy *p, struct file *file)
{
	struct mark *m = bpf_inode_storage_get(&marks, file->f_path.mnt->mnt_root->d_inode, 0, 0);
	__u32 slot = p->slot & 1;

	return m && m->slot[slot].generation == p->generation ? m->slot[slot].volume : 0;
}

#define VOLUME_DEPTH 64

struct volume_walk {
	const struct policy *p;
	struct dentry *d;
	__u32 lists;
};

static long volume_step(__u32 i, struct volume_walk *w)
{
	struct dentry *d = w->d, *parent = d->d_parent;
	struct mark *m = bpf_inode_storage_get(&marks, d->d_inode, 0, 0);
	__u32 slot = w->p->slot & 1;

	if (m && m->slot[slot].generation == w->p->generation)
		w->lists |= m->slot[slot].volume;
	w->d = parent;
	return parent == d;
}

/* The lists that let the files of the volume run in which the dentry is. One
   that lies too deep is in none. */
static __always_inline __u32 volume_above(const struct policy *p, struct dentry *d)
{
	struct volume_walk w = {.p = p, .d = d};

	bpf_loop(VOLUME_DEPTH, volume_step, &w, 0);
	return w.lists;
}

/* A file that is not in a volume gets no name in it, though another mount of
   the same file system lies above both. */
static __always_inline int into_volume(struct dentry *old, struct dentry *d)
{
	struct about a = {.op = OP_INTO_VOLUME, .dentry = d};
	const struct policy *p;
	__u32 more;

	if (!is_workload())
		return 0;
	p = policy_now();
	if (!p || !(p->listed & LISTED_VOLUMES) || !p->rule[ON_ORIGIN])
		return 0;
	more = volume_above(p, d->d_parent);
	if (!more)
		return 0;
	more &= ~volume_above(p, old->d_parent);
	return more ? decide(p, list_ref(p, ASPECT_ORIGIN, ~more), &a) : 0;
}

static __always_inline __u32 origin_ref(const struct policy *p, struct file *file, enum origin from)
{
	if (from == FROM_IMAGE || !p->rule[ON_ORIGIN])
		return 0;
	return list_ref(p, ASPECT_ORIGIN, from == FROM_ELSEWHERE ? volume_lists(p, file) : 0);
}

/* Whether the code in a file may run. */
static __always_inline int check_code(const struct policy *p, struct file *file, struct path *path, struct about *a, enum origin from, const struct program *program)
{
	int err = 0;

	if (p->listed & LISTED_DENIED) {
		__u64 op = a->op;

		a->op = OP_LISTED;
		err = decide_at(p, denied_ref(p, file->f_inode, program), a, path);
		a->op = op;
	}
	if (!err && from != FROM_IMAGE) {
		a->why = from;
		err = decide_at(p, origin_ref(p, file, from), a, path);
	}
	return err;
}

static __always_inline int check_mapped(const struct policy *p, struct file *file, struct path *path, struct about *a)
{
	struct object o = {};
	enum origin from = origin_of(shared() ? file->f_path.dentry->d_inode : file->f_inode, &o);

	return check_code(p, file, path, a, from, program_of(p, &o));
}

/* The rule against a program that some list of programs does not have. */
static __always_inline __u32 unlisted_ref(const struct policy *p, const struct program *program, const struct object *o, const struct task_label *l)
{
	__u32 slot = slot_of(p), lists = 0, *of_parent;
	void *inner;

	if (program)
		lists = program->allowed;
	if (program && program->limited & ~lists) {
		if (l->label == LABEL_SETUP) {
			lists |= program->limited;
		} else {
			struct kinship key = {.child = *o, .parent = l->exe};

			inner = bpf_map_lookup_elem(&kin, &slot);
			of_parent = inner ? bpf_map_lookup_elem(inner, &key) : NULL;
			if (of_parent)
				lists |= *of_parent;
		}
	}
	return list_ref(p, ASPECT_PROGRAM, lists);
}

static __always_inline bool is_agent_program(struct inode *inode)
{
	struct mark *m = bpf_inode_storage_get(&marks, inode, 0, 0);

	return m && m->kind == KIND_AGENT;
}

/* Whether standard input, output or error will be a network socket. */
ONCE int on_socket(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct fdtable *fdt = BPF_CORE_READ(task, files, fdt);
	unsigned long *cloexec = BPF_CORE_READ(fdt, close_on_exec), closing = 0;
	struct file **fds = BPF_CORE_READ(fdt, fd), *file;

	bpf_probe_read_kernel(&closing, sizeof(closing), cloexec);
	for (int i = 0; i < 3; i++) {
		struct socket *sock;
		unsigned short family;

		file = NULL;
		if (closing & (1ul << i) || bpf_probe_read_kernel(&file, sizeof(file), fds + i) || !file)
			continue;
		if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) != S_IFSOCK)
			continue;
		sock = BPF_CORE_READ(file, private_data);
		family = BPF_CORE_READ(sock, sk, __sk_common.skc_family);
		if (family == AF_INET || family == AF_INET6)
			return true;
	}
	return false;
}

/* The other end of what a process has as its input. */
struct end {
	__u64 object; /* what identifies it; 0 is none */
	__u64 number; /* of the inode, of a pipe */
};

/* Descriptors that are looked at of each process, and how many processes. */
#define MAX_HELD 48
#define MAX_RELAYS 3

static __always_inline struct sock *socket_of(struct file *file)
{
	struct socket *sock = BPF_CORE_READ(file, private_data);

	return BPF_CORE_READ(sock, sk);
}

static __always_inline struct tty_struct *terminal_of(struct file *file)
{
	struct tty_file_private *of = BPF_CORE_READ(file, private_data);

	return BPF_CORE_READ(of, tty);
}

static __always_inline void input_end(struct end *end)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct file *file = NULL, **fds = BPF_CORE_READ(task, files, fdt, fd);
	struct tty_struct *terminal;
	struct inode *inode;
	struct sock *sock;

	if (bpf_probe_read_kernel(&file, sizeof(file), fds) || !file)
		return;
	inode = BPF_CORE_READ(file, f_inode);
	switch (BPF_CORE_READ(inode, i_mode) & S_IFMT) {
	case S_IFIFO:
		end->object = (__u64)inode;
		end->number = BPF_CORE_READ(inode, i_ino);
		break;
	case S_IFSOCK:
		sock = socket_of(file);
		if (BPF_CORE_READ(sock, __sk_common.skc_family) == AF_UNIX)
			end->object = (__u64)BPF_CORE_READ((struct unix_sock *)sock, peer);
		break;
	case S_IFCHR:
		if (BPF_CORE_READ(inode, i_rdev) >> 20 < 136 || BPF_CORE_READ(inode, i_rdev) >> 20 > 143)
			break;
		terminal = terminal_of(file);
		end->object = (__u64)BPF_CORE_READ(terminal, link);
		break;
	}
}

/* A look through the files of a process. */
struct search {
	struct file **fds;
	__u64 max;
	struct end end; /* that is looked for */
	__u64 has_end;
	__u64 has_net; /* a socket that reaches, or could reach, another machine */
};

static __always_inline void search_files(struct search *s, struct task_struct *task)
{
	struct fdtable *fdt = BPF_CORE_READ(task, files, fdt);

	s->fds = BPF_CORE_READ(fdt, fd);
	s->max = BPF_CORE_READ(fdt, max_fds);
	s->has_end = s->has_net = 0;
}

/* What cannot be read stays zero, and is nothing that is looked for. */
static long search_file(__u32 i, struct search *s)
{
	__u32 family, rdev;
	struct inode *inode;
	struct file *file = NULL;
	struct sock *sk;

	if (i >= s->max || bpf_probe_read_kernel(&file, sizeof(file), s->fds + i))
		return 1;
	if (!file)
		return 0;
	inode = BPF_CORE_READ(file, f_inode);
	switch (BPF_CORE_READ(inode, i_mode) & S_IFMT) {
	case S_IFIFO:
		if (BPF_CORE_READ(file, f_mode) & FMODE_WRITE && (__u64)inode == s->end.object)
			s->has_end = 1;
		break;
	case S_IFSOCK:
		sk = socket_of(file);
		family = BPF_CORE_READ(sk, __sk_common.skc_family);
		if ((family == AF_INET || family == AF_INET6) && BPF_CORE_READ(sk, __sk_common.skc_state) != TCP_LISTEN)
			s->has_net = 1;
		if ((__u64)sk == s->end.object)
			s->has_end = 1;
		break;
	case S_IFCHR:
		rdev = BPF_CORE_READ(inode, i_rdev);
		if (rdev == (5 << 20 | 2) && (__u64)terminal_of(file) == s->end.object) /* ptmx */
			s->has_end = 1;
		break;
	}
	return 0;
}

/* Pipes that are the input of an interpreter, or that a process with a socket
   can write to. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct end);
	__type(value, __u64);
} inputs SEC(".maps");

enum input {
	INPUT_OF_INTERPRETER = 1,
	INPUT_FROM_SOCKET = 2,
};

/* Whether what an interpreter is to read comes from a process that holds a
   network socket: the one that starts it, or one of those above it; or any, if
   it goes through one pipe. */
ONCE int relayed(void)
{
	__u64 found = INPUT_OF_INTERPRETER, *input;
	struct task_struct *task = bpf_get_current_task_btf();
	struct search s = {};

	input_end(&s.end);
	if (!s.end.object)
		return false;
	if (s.end.number) {
		input = bpf_map_lookup_elem(&inputs, &s.end);
		if (input && *input & INPUT_FROM_SOCKET)
			return true;
	}
	for (int i = 0; i < MAX_RELAYS; i++) {
		search_files(&s, task);
		bpf_loop(MAX_HELD, search_file, &s, 0);
		if (s.has_net && s.has_end)
			return true;
		task = BPF_CORE_READ(task, real_parent);
		if (BPF_CORE_READ(task, tgid) <= 1)
			break;
	}
	if (s.end.number)
		bpf_map_update_elem(&inputs, &s.end, &found, BPF_ANY);
	return false;
}

/* Notes a pipe that a process which gets a socket can write to. */
static long note_pipe(__u32 i, struct search *s)
{
	__u64 found = INPUT_FROM_SOCKET, *input;
	struct file *file = NULL;
	struct inode *inode;
	struct end end = {};

	if (i >= s->max || bpf_probe_read_kernel(&file, sizeof(file), s->fds + i))
		return 1;
	if (!file || !(BPF_CORE_READ(file, f_mode) & FMODE_WRITE))
		return 0;
	inode = BPF_CORE_READ(file, f_inode);
	if ((BPF_CORE_READ(inode, i_mode) & S_IFMT) != S_IFIFO)
		return 0;
	end.object = (__u64)inode;
	end.number = BPF_CORE_READ(inode, i_ino);
	input = bpf_map_lookup_elem(&inputs, &end);
	if (input && *input & INPUT_OF_INTERPRETER) {
		s->has_end = 1;
		return 1;
	}
	bpf_map_update_elem(&inputs, &end, &found, BPF_ANY);
	return 0;
}

/* Whether a process that gets a socket can write to what an interpreter reads
   from. */
ONCE int feeds_interpreter(void)
{
	struct search s = {};

	search_files(&s, bpf_get_current_task_btf());
	bpf_loop(MAX_HELD, note_pipe, &s, 0);
	return s.has_end;
}

static __always_inline int new_connection(struct socket *sock)
{
	__u32 family = BPF_CORE_READ(sock, sk, __sk_common.skc_family);
	struct about a = {.op = OP_SHELL, .why = 2};
	const struct policy *p;

	if ((family != AF_INET && family != AF_INET6) || !is_workload())
		return 0;
	p = policy_now();
	if (!p || !(p->listed & LISTED_RELAYS) || !feeds_interpreter())
		return 0;
	return decide(p, p->rule[ON_SHELL], &a);
}

SEC("lsm/socket_accept")
int BPF_PROG(on_accept_relay, struct socket *sock, struct socket *new, int prev)
{
	return prev ? prev : new_connection(sock);
}

static __always_inline int check_program(const struct policy *p, struct file *file, struct about *a, const struct task_label *l)
{
	struct path *path = &file->f_path;
	const struct program *program;
	struct object o = {};
	enum origin from = origin_of(file->f_inode, &o);
	int err;

	program = program_of(p, &o);
	if (program && program->script && p->listed & LISTED_RELAYS && relayed()) {
		a->op = OP_SHELL;
		a->why = 2;
		err = decide_at(p, list_ref(p, ASPECT_SHELL, ~program->script), a, path);
		if (err)
			return err;
		a->op = OP_EXEC;
		a->why = 0;
	}
	err = check_code(p, file, path, a, from, program);
	if (!err && p->rule[ON_UNLISTED]) {
		a->op = OP_UNLISTED;
		err = decide_at(p, unlisted_ref(p, program, &o, l), a, path);
	}
	return err;
}

/* Asked for a script and again for its interpreter. */
SEC("lsm/bprm_check_security")
int BPF_PROG(on_exec, struct linux_binprm *bprm, int prev)
{
	struct about a = {.op = OP_EXEC, .dentry = bprm->file->f_path.dentry};
	struct path *path = &bprm->file->f_path;
	struct task_struct *task = bpf_get_current_task_btf();
	struct task_label *l = bpf_task_storage_get(&labels, task, 0, 0);
	__u32 label = label_with(task, l);
	const struct policy *p;
	int err = 0;

	if (!prev && shared() && label == LABEL_HOST) {
		label = adopt(task);
		l = bpf_task_storage_get(&labels, task, 0, 0);
	}
	if (prev || label < LABEL_SETUP)
		return prev;
	p = policy_now();
	if (label == LABEL_SETUP && is_agent_program(bprm->file->f_inode))
		return 0;
	if (label == LABEL_UNKNOWN || !l) {
		a.op = OP_HELPER;
		return decide_at(p, DENY | RULE_HELPER, &a, path);
	}
	if (!p)
		return decide_at(p, DENY | RULE_NO_POLICY, &a, path);
	if (p->rule[ON_SHELL] && on_socket()) {
		a.op = OP_SHELL;
		err = decide_at(p, p->rule[ON_SHELL], &a, path);
		a.op = OP_EXEC;
	}
	return err ? err : check_program(p, bprm->file, &a, l);
}

/* From here on this is what the task runs, whatever it says of itself. */
static __always_inline void stamp(struct task_label *l, struct linux_binprm *bprm)
{
	struct inode *inode = bprm->file->f_inode;
	struct object o = {};

	l->origin = origin_of(inode, &o);
	if (!o.ino) {
		o.dev = inode->i_sb->s_dev;
		o.ino = inode->i_ino;
	}
	l->exe = o;
	l->flags = BPF_CORE_READ(bprm, interp) == BPF_CORE_READ(bprm, filename) ? 0 : LABEL_SCRIPT;
}

static __always_inline void tell_started(const struct policy *p, struct linux_binprm *bprm, const struct lineage *who, __u32 origin)
{
	unsigned long size = bprm->exec - bprm->p;
	struct started *s = (void *)begin_audit(p, OP_STARTED, sizeof(*s));

	if (!s)
		return;
	s->e.why = origin;
	s->e.argc = bprm->argc;
	s->e.text_kind = TEXT_PATH;
	if (!who->exe_cut)
		bpf_probe_read_kernel_str(s->e.text, EXE_SIZE, who->exe);
	else if (bpf_d_path(&bprm->file->f_path, s->e.text, TEXT_SIZE) <= 0)
		write_names(&s->e, bprm->file->f_path.dentry);
	/* Behind the arguments stands the environment; the reader stops at argc. */
	if (size > ARGS_SIZE)
		size = ARGS_SIZE;
	if (bpf_probe_read_user(s->args, size, (void *)bprm->p))
		s->e.argc = 0;
	s->e.detail = size;
	bpf_ringbuf_submit(s, 0);
}

SEC("lsm/bprm_committed_creds")
int BPF_PROG(on_started, struct linux_binprm *bprm)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct task_label *l = bpf_task_storage_get(&labels, task, 0, 0);
	__u32 label = label_with(task, l);

	if (!l || label < LABEL_SETUP || (label == LABEL_SETUP && is_agent_program(bprm->file->f_inode)))
		return 0;
	l->label = LABEL_WORKLOAD;
	stamp(l, bprm);
	lineage_exec(&l->who, bprm, label == LABEL_SETUP);
	tell_started(policy_now(), bprm, &l->who, l->origin);
	return 0;
}

/* Files that the agent wrote into a container before its first process. A
   workload that opens one for writing makes it its own. */
struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} written SEC(".maps");

enum writer {
	WRITER_AGENT = 1,
	WRITER_WORKLOAD,
};

static __always_inline void note_writer(struct file *file, __u32 label)
{
	__u32 *who;

	if ((file->f_inode->i_mode & S_IFMT) != S_IFREG)
		return;
	who = bpf_inode_storage_get(&written, file->f_inode, 0, label == LABEL_SETUP ? BPF_LOCAL_STORAGE_GET_F_CREATE : 0);
	if (who)
		*who = label == LABEL_SETUP ? WRITER_AGENT : WRITER_WORKLOAD;
}

/* What an interpreter opens for reading is as good as a program. */
static __always_inline int read_by_interpreter(const struct policy *p, struct file *file)
{
	struct about a = {.op = OP_SCRIPT, .dentry = file->f_path.dentry};
	struct inode *inode = file->f_inode;
	unsigned long magic = inode->i_sb->s_magic;
	const struct program *program;
	struct object o = {};
	struct task_label *l;
	__u32 lifted = 0, *who;
	enum origin from;

	if (!(file->f_mode & FMODE_READ) || (inode->i_mode & S_IFMT) != S_IFREG || magic == PROC_SUPER_MAGIC || magic == SYSFS_MAGIC)
		return 0;
	l = bpf_task_storage_get(&labels, bpf_get_current_task_btf(), 0, 0);
	if (!l)
		return 0;
	if (!(l->flags & LABEL_SCRIPT)) {
		program = l->origin == FROM_IMAGE ? program_of(p, &l->exe) : NULL;
		if (!program || !program->script)
			return 0;
		lifted = ~program->script;
	}
	from = origin_of(inode, &o);
	if (from == FROM_IMAGE)
		return 0;
	if (from == FROM_CHANGE) {
		who = bpf_inode_storage_get(&written, inode, 0, 0);
		if (who && *who == WRITER_AGENT)
			return 0;
	}
	if (from == FROM_ELSEWHERE)
		lifted |= volume_lists(p, file);
	a.why = from;
	return decide_at(p, list_ref(p, ASPECT_SCRIPT, lifted), &a, &file->f_path);
}

/* Variables that the dynamic loader obeys. */
enum variable {
	VARIABLE_PRELOAD = 1,
	VARIABLE_AUDIT = 2,
	VARIABLE_OTHER = 4,    /* LD_LIBRARY_PATH or GLIBC_TUNABLES */
	VARIABLE_UNKNOWN = 16, /* there was more than could be looked at */
};

#define CODE_LOADING (VARIABLE_PRELOAD | VARIABLE_AUDIT | VARIABLE_UNKNOWN)

#define MAX_PIECES 512 /* of an environment */
#define PIECE_BITS 6 /* with what it calls a program has 512 bytes of stack */
#define PIECE_SIZE (1 << PIECE_BITS)

#define EIGHT(a, b, c, d, e, f, g, h) \
	((__u64)(a) | (__u64)(b) << 8 | (__u64)(c) << 16 | (__u64)(d) << 24 | (__u64)(e) << 32 | (__u64)(f) << 40 | (__u64)(g) << 48 | (__u64)(h) << 56)

struct environment {
	__u64 found;
	__u64 at; /* one of those found; one that loads code before others */
};

/* Whether a string sets LD_PRELOAD or LD_AUDIT to something. */
static __always_inline __u32 loads_code(const char *text)
{
	if (text[3] == 'A')
		return text[8] == '=' && text[9] ? VARIABLE_AUDIT : 0;
	return text[8] == 'A' && text[9] == 'D' && text[10] == '=' && text[11] ? VARIABLE_PRELOAD : 0;
}

struct variable_walk {
	char text[PIECE_SIZE] __attribute__((aligned(8)));
	__u64 at;
	__u64 end;
	__u64 code_at; /* one that loads code */
	__u64 more;    /* there are several */
	__u64 other_at;
	__u64 done;
};

static long next_variable(__u32 i, struct variable_walk *w)
{
	__u64 word, at = w->at;
	long n;

	if (at >= w->end) {
		w->done = 1;
		return 1;
	}
	n = bpf_probe_read_user_str(w->text, sizeof(w->text), (void *)at);
	if (n < 0)
		return 1;
	word = *(__u64 *)w->text;
	if (word == EIGHT('L', 'D', '_', 'P', 'R', 'E', 'L', 'O') || word == EIGHT('L', 'D', '_', 'A', 'U', 'D', 'I', 'T')) {
		if (w->code_at)
			w->more = 1;
		w->code_at = at;
	}
	if (word == EIGHT('L', 'D', '_', 'L', 'I', 'B', 'R', 'A') || word == EIGHT('G', 'L', 'I', 'B', 'C', '_', 'T', 'U'))
		w->other_at = at;
	/* All of a piece: it may go on. Of an empty one n is 0. */
	w->at = at + n - (n >> PIECE_BITS) + !n;
	return 0;
}

/* Looks through the environment of a program that was loaded and has not run
   yet. Nobody but the kernel has written there since. A string longer than a
   piece is looked at in several, of which the first counts; that another begins
   like a variable of the loader is taken for one. */
ONCE int look_through(struct environment *e, __u64 at, __u64 end)
{
	struct variable_walk w = {.at = at, .end = end};

	if (!e)
		return 0;
	/* All 0, which the verifier does not know. */
	w.code_at = w.other_at = e->at;
	w.more = w.done = e->found;
	bpf_loop(MAX_PIECES, next_variable, &w, 0);
	e->found = 0;
	if (w.more) {
		e->found |= VARIABLE_PRELOAD | VARIABLE_AUDIT; /* of which one may be empty */
	} else if (w.code_at && bpf_probe_read_user_str(w.text, sizeof(w.text), (void *)w.code_at) > 0) {
		e->found |= loads_code(w.text);
	}
	if (!w.done) {
		e->found |= VARIABLE_UNKNOWN;
		w.code_at = w.code_at ? w.code_at : w.at;
	}
	if (w.other_at)
		e->found |= VARIABLE_OTHER;
	e->at = e->found & CODE_LOADING ? w.code_at : w.other_at;
	return 0;
}

static __always_inline void tell_environment(const struct policy *p, const struct environment *e)
{
	struct event *event = begin_audit(p, OP_ENVIRONMENT, sizeof(*event));

	if (!event)
		return;
	event->detail = e->found;
	if (bpf_probe_read_user_str(event->text, TEXT_SIZE, (void *)e->at) > 0)
		event->text_kind = TEXT_VALUE;
	bpf_ringbuf_submit(event, 0);
}

/* The program is loaded: what it was given cannot change any more, and it can
   only be killed. */
static __always_inline bool kill(const struct policy *p, __u32 ref, const struct about *a)
{
	if (!ref)
		return false;
	if (ref & DENY)
		bpf_send_signal(9);
	tell(a, generation_of(p), ref, ref & DENY ? VERDICT_KILLED : VERDICT_REPORTED);
	return true;
}

#define MAX_OPTIONS 16 /* and pieces of them */
#define OPTION_SIZE 32

/* Bit 0 is 'A'; 0 is none. */
static __always_inline __u64 letter_bit(char c)
{
	__u64 n = (__u8)(c - 'A');

	return n < 58 ? 1ull << (n & 63) : 0;
}

/* A walk through the options of an interpreter, in search of one that brings
   code. Letters are those of its dialect. */
struct option_walk {
	char text[OPTION_SIZE] __attribute__((aligned(8)));
	__u64 at;
	__u64 end;
	__u64 code;
	__u64 value;
	__u64 skip; /* the next is the program's own name, or an option's value */
	__u64 found; /* where */
};

struct letter_walk {
	struct option_walk *o;
	__u64 bits;
};

/* One letter of several behind one dash. */
static long next_letter(__u32 i, struct letter_walk *l)
{
	struct option_walk *o = l->o;
	__u32 at = (i + 1) & 7;
	__u64 letter = letter_bit(o->text[at]);

	if (!o->text[at])
		return 1;
	l->bits |= letter;
	if (!(letter & o->value))
		return 0;
	/* What follows one that takes a value is its value. */
	if (!o->text[at + 1])
		o->skip = 1;
	return 1;
}

static long next_option(__u32 i, struct option_walk *o)
{
	const char *text = o->text;
	__u64 at = o->at;
	long n;

	if (at >= o->end)
		return 1;
	n = bpf_probe_read_user_str(o->text, sizeof(o->text), (void *)at);
	if (n < 0)
		return 1;
	if (o->skip) {
		o->skip = 0;
		goto next;
	}
	if (text[0] == '+')
		goto next;
	if (text[0] != '-')
		return 1;
	if (text[1] == '-') {
		/* --eval and --print of node, but neither -- nor --experimental... */
		if (!text[2])
			return 1;
		if ((text[2] == 'e' && text[3] == 'v') || (text[2] == 'p' && text[3] == 'r' && text[4] == 'i')) {
			o->found = at;
			return 1;
		}
		goto next;
	}
	if (!text[1]) { /* the input */
		o->found = o->code ? at : 0;
		return 1;
	}
	struct letter_walk l = {.o = o};

	bpf_loop(6, next_letter, &l, 0);
	if (l.bits & o->code) {
		o->found = at;
		return 1;
	}
next:
	/* One that is longer goes on, and what goes on is looked over. */
	if (n >> 5)
		o->skip = 1;
	o->at = at + n - (n >> 5) + !n;
	return 0;
}

/* The address of the first option that brings code, or 0. */
static __always_inline unsigned long inline_code(const struct policy *p, const struct program *program, unsigned long at, unsigned long end)
{
	struct option_walk o = {.at = at, .end = end, .code = program->code, .value = program->value, .skip = 1 ^ p->rule[NOTHING], .found = p->rule[NOTHING]};

	bpf_loop(MAX_OPTIONS, next_option, &o, 0);
	return o.found;
}

static __always_inline void check_inline(const struct policy *p, const struct task_label *l, struct mm_struct *mm)
{
	struct about a = {.op = OP_INLINE};
	const struct program *program;

	if (!p->rule[ON_INLINE] || l->origin != FROM_IMAGE)
		return;
	program = program_of(p, &l->exe);
	if (!program || !program->inlined)
		return;
	a.value = inline_code(p, program, mm->arg_start, mm->arg_end);
	if (a.value)
		kill(p, list_ref(p, ASPECT_INLINE, ~program->inlined), &a);
}

SEC("fentry/finalize_exec")
int BPF_PROG(on_loaded, struct linux_binprm *bprm)
{
	struct about a = {.op = OP_PRELOAD};
	struct task_struct *task = bpf_get_current_task_btf();
	const struct policy *p = policy_now();
	struct environment e = {};
	struct task_label *l;

	if (!p || label_of(task) != LABEL_WORKLOAD)
		return 0;
	l = bpf_task_storage_get(&labels, task, 0, 0);
	if (!l)
		return 0;
	look_through(&e, task->mm->env_start, task->mm->env_end);
	if (e.found & CODE_LOADING)
		l->flags |= LABEL_PRELOADED;
	if (e.found & CODE_LOADING && p->rule[ON_PRELOAD]) {
		a.value = e.at;
		a.why = e.found;
		kill(p, p->rule[ON_PRELOAD], &a);
	} else if (e.found) {
		tell_environment(p, &e);
	}
	check_inline(p, l, task->mm);
	return 0;
}

SEC("lsm/task_alloc")
int BPF_PROG(on_fork, struct task_struct *task, unsigned long flags, int prev)
{
	struct task_struct *parent = bpf_get_current_task_btf();
	__u32 label = label_of(parent);
	struct task_label *l, *own;

	if (prev)
		return prev;
	if (label == LABEL_AGENT) {
		if (flags & CLONE_THREAD)
			return 0;
		label = LABEL_SETUP;
	}
	/* What the kernel starts gets no label: if it ever leaves the kernel, it
	   is unknown. */
	if (label == LABEL_KERNEL || label == LABEL_UNKNOWN || (shared() && label == LABEL_HOST))
		return 0;
	l = bpf_task_storage_get(&labels, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!l)
		return -ENOMEM;
	own = bpf_task_storage_get(&labels, parent, 0, 0);
	if (own) {
		bpf_probe_read_kernel(l, sizeof(*l), own);
		if (!(flags & CLONE_THREAD))
			lineage_fork(&l->who, &own->who);
	}
	l->label = label;
	return 0;
}

/* Memory that is no program's own code. A program that was told to load more
   than itself has no exception: it would be another's. */
static __always_inline int memory(const struct policy *p, __u32 why)
{
	struct about a = {.op = OP_MEMORY, .why = why};
	const struct program *program;
	struct task_label *l;
	__u32 lifted = 0;

	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!p->rule[ON_MEMORY])
		return 0;
	if (p->listed & LISTED_KNOWN) {
		l = bpf_task_storage_get(&labels, bpf_get_current_task_btf(), 0, 0);
		program = l && l->origin == FROM_IMAGE && !(l->flags & LABEL_PRELOADED) ? program_of(p, &l->exe) : NULL;
		if (program)
			lifted = program->jit;
	}
	return decide(p, list_ref(p, ASPECT_MEMORY, lifted), &a);
}

/* Later verifiers take a hook's argument to be there and drop the branch for
   one that is not. So what may be absent is looked at as a number, by whoever
   holds its address. */
static __always_inline bool absent(const void *at)
{
	unsigned long pointer = 0;

	bpf_probe_read_kernel(&pointer, sizeof(pointer), at);
	return !pointer;
}

SEC("lsm/mmap_file")
int BPF_PROG(on_mmap, struct file *file, unsigned long reqprot, unsigned long prot, unsigned long flags, int prev)
{
	const struct policy *p;

	if (prev || !(prot & PROT_EXEC) || !is_workload())
		return prev;
	p = policy_now();
	if (!p || absent(&ctx[0]))
		return memory(p, MEMORY_ANONYMOUS);
	if (prot & PROT_WRITE) {
		int err = memory(p, MEMORY_WRITABLE);

		if (err)
			return err;
	}
	struct about a = {.op = OP_MAP, .dentry = file->f_path.dentry};

	return check_mapped(p, file, &file->f_path, &a);
}

/* On 6.1 a mapping of an overlay file holds the file below it: the image's
   own, or one of the upper layer. Its path is still the overlay's. */
SEC("lsm/file_mprotect")
int BPF_PROG(on_mprotect, struct vm_area_struct *vma, unsigned long reqprot, unsigned long prot, int prev)
{
	const struct policy *p;
	struct file *file;

	if (prev || !(prot & PROT_EXEC) || !is_workload())
		return prev;
	p = policy_now();
	if (!p || absent(&vma->vm_file))
		return memory(p, MEMORY_ANONYMOUS);
	file = vma->vm_file;
	if (prot & PROT_WRITE || vma->anon_vma) {
		int err = memory(p, prot & PROT_WRITE ? MEMORY_WRITABLE : MEMORY_WRITTEN);

		if (err)
			return err;
	}
	struct about a = {.op = OP_MAP, .dentry = file->f_path.dentry};

	return check_mapped(p, file, NULL, &a);
}

/* READ_IMPLIES_EXEC makes heap pages executable through brk, which no hook
   sees. There is no hook for personality(2) either, so the task dies before
   it returns from it. */
static __always_inline int persona(unsigned long value)
{
	const struct policy *p;
	struct about a = {.op = OP_MEMORY, .why = MEMORY_PERSONA};
	__u32 ref;

	if ((__u32)value == 0xffffffff || !(value & READ_IMPLIES_EXEC) || !is_workload())
		return 0;
	p = policy_now();
	ref = ref_of(p, ON_MEMORY);
	if (!ref)
		return 0;
	if (ref & DENY)
		bpf_send_signal(9);
	tell(&a, generation_of(p), ref, ref & DENY ? VERDICT_KILLED : VERDICT_REPORTED);
	return 0;
}

SEC("fentry/__x64_sys_personality")
int BPF_PROG(on_persona, struct pt_regs *regs)
{
	return persona(regs->di);
}

SEC("fentry/__ia32_sys_personality")
int BPF_PROG(on_persona32, struct pt_regs *regs)
{
	return persona(regs->bx);
}

#endif
