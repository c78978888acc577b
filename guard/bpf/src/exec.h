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

/* Where the inode comes from, and its identity below the overlay. */
static __always_inline enum origin origin_of(struct inode *inode, struct object *o)
{
	struct super_block *sb = inode->i_sb;
	struct ovl_inode *ovl;
	struct inode *lower;
	struct mark *root;

	if (!inode->i_nlink)
		return FROM_UNLINKED;
	if (sb->s_magic == EROFS_MAGIC) {
		o->dev = sb->s_dev;
		o->ino = inode->i_ino;
		return is_image(o->dev) ? FROM_IMAGE : FROM_ELSEWHERE;
	}
	root = bpf_inode_storage_get(&marks, sb->s_root->d_inode, 0, 0);
	if (!root || root->kind != KIND_OVERLAY)
		return FROM_ELSEWHERE;
	ovl = (void *)inode - bpf_core_field_offset(struct ovl_inode, vfs_inode);
	if (BPF_CORE_READ(ovl, __upperdentry))
		return FROM_CHANGE;
	lower = below(ovl);
	if (!lower)
		return FROM_ELSEWHERE;
	o->dev = BPF_CORE_READ(lower, i_sb, s_dev);
	o->ino = BPF_CORE_READ(lower, i_ino);
	return is_image(o->dev) ? FROM_IMAGE : FROM_ELSEWHERE;
}

/* What the policy says of a program of the image. */
static __always_inline const struct program *program_of(const struct policy *p, const struct object *o)
{
	__u32 slot = p->slot & 1;
	void *inner;

	if (!p->listed || !o->ino)
		return NULL;
	inner = bpf_map_lookup_elem(&listed, &slot);
	return inner ? bpf_map_lookup_elem(inner, o) : NULL;
}

/* The rule of the first list that lifts nothing here; lifted are those that
   do. */
static __always_inline __u32 list_ref(const struct policy *p, __u32 aspect, __u32 lifted)
{
	__u32 slot = p->slot & 1, zero = 0, missing;
	const struct exec_lists *lists;
	const struct aspect_lists *l;
	void *inner = bpf_map_lookup_elem(&execs, &slot);

	lists = inner ? bpf_map_lookup_elem(inner, &zero) : NULL;
	if (!lists)
		return DENY | RULE_NO_POLICY;
	l = &lists->aspect[aspect];
	missing = l->deny & ~lifted;
	if (!missing)
		missing = l->audit & ~lifted;
	if (!missing)
		return 0;
	for (__u32 i = 0; i < EXEC_LISTS; i++)
		if (missing & (1u << i))
			return l->rule[i];
	return DENY | RULE_NO_POLICY;
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

static __always_inline __u32 origin_ref(const struct policy *p, struct file *file, enum origin from)
{
	if (from == FROM_IMAGE || !p->rule[ON_ORIGIN])
		return 0;
	return list_ref(p, ASPECT_ORIGIN, from == FROM_ELSEWHERE ? volume_lists(p, file) : 0);
}

/* Whether the code in a file may run. */
static __always_inline int check_code(const struct policy *p, struct file *file, struct about *a, enum origin from, const struct program *program)
{
	int err = 0;

	if (p->listed & LISTED_DENIED) {
		__u32 op = a->op;

		a->op = OP_LISTED;
		err = decide(p, denied_ref(p, file->f_inode, program), a);
		a->op = op;
	}
	if (!err && from != FROM_IMAGE) {
		a->why = from;
		err = decide(p, origin_ref(p, file, from), a);
	}
	return err;
}

static __always_inline int check_mapped(const struct policy *p, struct file *file, struct about *a)
{
	struct object o = {};
	enum origin from = origin_of(file->f_inode, &o);

	return check_code(p, file, a, from, program_of(p, &o));
}

/* The rule against a program that some list of programs does not have. */
static __always_inline __u32 unlisted_ref(const struct policy *p, const struct program *program, const struct object *o, const struct task_label *l)
{
	__u32 slot = p->slot & 1, lists = 0, *of_parent;
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
static __always_inline bool on_socket(void)
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

static __always_inline int check_program(const struct policy *p, struct file *file, struct about *a, const struct task_label *l)
{
	const struct program *program;
	struct object o = {};
	enum origin from = origin_of(file->f_inode, &o);
	int err;

	program = program_of(p, &o);
	err = check_code(p, file, a, from, program);
	if (!err && p->rule[ON_UNLISTED]) {
		a->op = OP_UNLISTED;
		err = decide(p, unlisted_ref(p, program, &o, l), a);
	}
	return err;
}

/* Asked for a script and again for its interpreter. */
SEC("lsm/bprm_check_security")
int BPF_PROG(on_exec, struct linux_binprm *bprm, int prev)
{
	struct about a = {.op = OP_EXEC, .path = &bprm->file->f_path, .dentry = bprm->file->f_path.dentry};
	struct task_struct *task = bpf_get_current_task_btf();
	const struct policy *p = policy_now();
	__u32 label = label_of(task);
	struct task_label *l;
	int err = 0;

	if (prev || label < LABEL_SETUP)
		return prev;
	if (label == LABEL_SETUP && is_agent_program(bprm->file->f_inode))
		return 0;
	l = bpf_task_storage_get(&labels, task, 0, 0);
	if (label == LABEL_UNKNOWN || !l) {
		a.op = OP_HELPER;
		return decide(p, DENY | RULE_HELPER, &a);
	}
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (p->rule[ON_SHELL] && on_socket()) {
		a.op = OP_SHELL;
		err = decide(p, p->rule[ON_SHELL], &a);
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
	l->started = bpf_ktime_get_boot_ns();
}

static __always_inline void tell_started(const struct policy *p, struct linux_binprm *bprm)
{
	unsigned long size = bprm->exec - bprm->p;
	struct started *s = (void *)begin_audit(p, OP_STARTED, sizeof(*s));

	if (!s)
		return;
	s->e.argc = bprm->argc;
	if (bpf_d_path(&bprm->file->f_path, s->e.text, TEXT_SIZE) > 0)
		s->e.text_kind = TEXT_PATH;
	else
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
	__u32 label = label_of(task);
	struct task_label *l;

	if (label < LABEL_SETUP)
		return 0;
	if (label == LABEL_SETUP) {
		if (is_agent_program(bprm->file->f_inode))
			return 0;
	}
	l = bpf_task_storage_get(&labels, task, 0, 0);
	if (l) {
		l->label = LABEL_WORKLOAD;
		stamp(l, bprm);
	}
	lineage_exec(bprm, label == LABEL_SETUP);
	tell_started(policy_now(), bprm);
	return 0;
}

static __always_inline void step_line(struct task_label *l, const struct task_label *parent, __u32 pid)
{
	for (int i = LINEAGE - 1; i > 0; i--)
		l->line[i] = parent->line[i - 1];
	l->line[0].exe = parent->exe;
	l->line[0].started = parent->started;
	l->line[0].pid = pid;
	l->line[0].origin = parent->origin;
	l->started = bpf_ktime_get_boot_ns();
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
	if (label == LABEL_KERNEL || label == LABEL_UNKNOWN)
		return 0;
	l = bpf_task_storage_get(&labels, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!l)
		return -ENOMEM;
	l->label = label;
	lineage_fork(task, flags & CLONE_THREAD);
	own = bpf_task_storage_get(&labels, parent, 0, 0);
	if (label != LABEL_WORKLOAD || !own)
		return 0;
	l->flags = own->flags;
	l->origin = own->origin;
	l->exe = own->exe;
	if (!(flags & CLONE_THREAD)) {
		step_line(l, own, parent->tgid);
		return 0;
	}
	__builtin_memcpy(l->line, own->line, sizeof(l->line));
	l->started = own->started;
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
	struct about a = {.op = OP_MAP, .path = &file->f_path, .dentry = file->f_path.dentry};

	return check_mapped(p, file, &a);
}

/* On 6.1 a mapping of an overlay file holds the file below it: the image's
   own, or one of the upper layer. */
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

	return check_mapped(p, file, &a);
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
	tell(p, ref, ref & DENY ? VERDICT_KILLED : VERDICT_REPORTED, &a);
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
