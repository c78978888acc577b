// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Operations on the system, and what protects the agent and the Guard itself
// whatever the policy says.
#ifndef SYSTEM_H
#define SYSTEM_H

#include "event.h"

/* A policy that does not deny bpf still allows no more than looking. */
static __always_inline bool only_looks(int cmd)
{
	switch (cmd) {
	case BPF_PROG_GET_NEXT_ID:
	case BPF_MAP_GET_NEXT_ID:
	case BPF_BTF_GET_NEXT_ID:
	case BPF_LINK_GET_NEXT_ID:
	case BPF_OBJ_GET_INFO_BY_FD:
	case BPF_PROG_QUERY:
		return true;
	}
	return false;
}

SEC("lsm/bpf")
int BPF_PROG(on_bpf, int cmd, union bpf_attr *attr, unsigned int size, int prev)
{
	struct about a = {.op = OP_BPF, .detail = cmd};
	const struct policy *p;

	if (prev || !is_workload())
		return prev;
	p = policy_now();
	return decide(p, only_looks(cmd) ? ref_of(p, ON_BPF) : ref_always(p, ON_BPF, RULE_BPF), &a);
}

static __always_inline int touch_bpf(__u64 what)
{
	struct about a = {.op = OP_BPF, .detail = what};
	const struct policy *p;

	if (!is_workload())
		return 0;
	p = policy_now();
	return decide(p, ref_always(p, ON_BPF, RULE_BPF), &a);
}

SEC("lsm/bpf_map")
int BPF_PROG(on_bpf_map, struct bpf_map *map, unsigned int mode, int prev)
{
	return prev ? prev : touch_bpf(1000);
}

SEC("lsm/bpf_prog")
int BPF_PROG(on_bpf_prog, struct bpf_prog *prog, int prev)
{
	return prev ? prev : touch_bpf(1001);
}

static __always_inline int module(__u64 what)
{
	struct about a = {.op = OP_MODULE, .detail = what};
	const struct policy *p;

	if (!is_workload())
		return 0;
	p = policy_now();
	return decide(p, ref_always(p, ON_MODULE, RULE_MODULE), &a);
}

/* Reading a module, a kernel to boot or the like into the kernel. */
SEC("lsm/kernel_read_file")
int BPF_PROG(on_kernel_read, struct file *file, __u32 id, bool contents, int prev)
{
	return prev ? prev : module(id);
}

SEC("lsm/kernel_load_data")
int BPF_PROG(on_kernel_load, __u32 id, bool contents, int prev)
{
	return prev ? prev : module(id);
}

/* The kernel's own idea, not the workload's: refused without a word. */
SEC("lsm/kernel_module_request")
int BPF_PROG(on_module_request, char *name, int prev)
{
	return prev ? prev : is_workload() ? -EPERM : 0;
}

static __always_inline int operation(__u32 index, __u32 op, struct dentry *d)
{
	struct about a = {.op = op, .detail = op == OP_OPERATION ? index : 0, .dentry = d};
	const struct policy *p;

	if (!is_workload())
		return 0;
	p = policy_now();
	return decide(p, ref_of(p, index), &a);
}

static __always_inline int named_operation(__u32 index)
{
	return operation(index, OP_OPERATION, NULL);
}

/* The calls whose only hook is the question for a capability. */
enum call {
	CALL_OTHER,
	CALL_MODULE,
	CALL_SETNS,
	CALL_NAMESPACE,
	CALL_SWAP,
	CALL_HOSTNAME,
	CALL_MEMFD,
	CALL_RING,
};

/* Which call the task is in. Its number is the kernel's copy, which the task
   cannot change any more. x32 calls, where a kernel has them, carry a bit. */
static __always_inline enum call call_now(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);
	__u32 nr = regs->orig_ax & ~0x40000000u;

	if (task->thread_info.status & TS_COMPAT)
		switch (nr) {
		case 128: /* init_module */
		case 129: /* delete_module */
		case 350: /* finit_module */
			return CALL_MODULE;
		case 346:
			return CALL_SETNS;
		case 120: /* clone */
		case 310: /* unshare */
		case 435: /* clone3 */
			return CALL_NAMESPACE;
		case 87:  /* swapon */
		case 115: /* swapoff */
			return CALL_SWAP;
		case 74:  /* sethostname */
		case 121: /* setdomainname */
			return CALL_HOSTNAME;
		case 356: /* memfd_create */
		case 447: /* memfd_secret */
			return CALL_MEMFD;
		case 426: /* io_uring_enter */
			return CALL_RING;
		default:
			return CALL_OTHER;
		}
	switch (nr) {
	case 175: /* init_module */
	case 176: /* delete_module */
	case 313: /* finit_module */
		return CALL_MODULE;
	case 308:
		return CALL_SETNS;
	case 56:  /* clone */
	case 272: /* unshare */
	case 435: /* clone3 */
		return CALL_NAMESPACE;
	case 167: /* swapon */
	case 168: /* swapoff */
		return CALL_SWAP;
	case 170: /* sethostname */
	case 171: /* setdomainname */
		return CALL_HOSTNAME;
	case 319: /* memfd_create */
	case 447: /* memfd_secret */
		return CALL_MEMFD;
	case 426: /* io_uring_enter */
		return CALL_RING;
	}
	return CALL_OTHER;
}

/* What else CAP_SYS_ADMIN is asked for that has a name in a policy. */
static __always_inline int administer(void)
{
	switch (call_now()) {
	case CALL_SETNS:
		return named_operation(ON_SETNS);
	case CALL_NAMESPACE:
		return named_operation(ON_UNSHARE);
	case CALL_SWAP:
		return named_operation(ON_SWAP);
	case CALL_HOSTNAME:
		return named_operation(ON_HOSTNAME);
	default:
		return 0;
	}
}

/* What a workload never gets, whatever it was given. */
static __always_inline int never(const struct policy *p, int cap)
{
	struct about a = {.op = OP_SETTING, .why = 1, .detail = cap};

	if (cap == CAP_SYS_RAWIO)
		return decide(p, DENY | RULE_SETTING, &a);
	if (cap == CAP_SYS_BOOT)
		return decide(p, ref_always(p, ON_REBOOT, RULE_SETTING), &a);
	/* The kernel also asks this when it thinks of loading a module by itself,
	   which is nobody's attack. */
	if (call_now() != CALL_MODULE)
		return -EPERM;
	a.op = OP_MODULE;
	return decide(p, ref_always(p, ON_MODULE, RULE_MODULE), &a);
}

static __always_inline bool among(const struct policy *p, __u32 caps, int cap)
{
	__u64 bits = p->rule[caps] | (__u64)p->rule[caps + 1] << 32;

	return cap >= 0 && cap < 64 && bits >> cap & 1;
}

/* The overlay works on the image with the rights of who mounted it, which is
   nothing the workload does. io_uring borrows rights too, but a workload's
   own. */
static __always_inline bool borrows(void)
{
	struct task_struct *task = bpf_get_current_task_btf();

	return task->cred != task->real_cred && !(task->flags & PF_IO_WORKER) && call_now() != CALL_RING;
}

/* Only capabilities that every policy keeps may be used. What the kernel asks
   by itself is answered without a word. */
static __always_inline int kept(const struct policy *p, int cap, bool quiet)
{
	struct about a = {.op = OP_CAPABILITY, .detail = cap};

	if (among(p, CAPS_DENIED, cap))
		return quiet ? -EPERM : decide(p, p->rule[ON_CAPABILITY], &a);
	if (!quiet && among(p, CAPS_REPORTED, cap))
		return decide(p, p->rule[ON_CAPABILITY_AUDIT], &a);
	return 0;
}

SEC("lsm/capable")
int BPF_PROG(on_capable, const struct cred *cred, struct user_namespace *ns, int cap, unsigned int opts, int prev)
{
	const struct policy *p;
	int err = 0;

	if (prev || !is_workload())
		return prev;
	p = policy_now();
	switch (cap) {
	case CAP_SYS_MODULE:
	case CAP_SYS_RAWIO:
	case CAP_SYS_BOOT:
		return never(p, cap);
	case CAP_SYS_TIME:
		err = named_operation(ON_TIME);
		break;
	case CAP_SYS_ADMIN:
		err = administer();
		break;
	}
	if (err || !p || !(p->rule[ON_CAPABILITY] | p->rule[ON_CAPABILITY_AUDIT]) || borrows())
		return err;
	return kept(p, cap, opts & CAP_OPT_NOAUDIT);
}

/* The agent, the kernel and what the agent is about to start are out of a
   workload's reach. */
static __always_inline int touch(struct task_struct *target, __u64 detail)
{
	struct about a = {.op = OP_AGENT, .detail = detail};
	__u32 label;

	if (!is_workload())
		return 0;
	label = label_of(target);
	if (label == LABEL_WORKLOAD && same_owner(target))
		return 0;
	return decide(policy_now(), DENY | RULE_AGENT, &a);
}

SEC("lsm/task_kill")
int BPF_PROG(on_kill, struct task_struct *target, struct kernel_siginfo *info, int sig, const struct cred *cred, int prev)
{
	return prev ? prev : touch(target, sig);
}

SEC("lsm/task_setrlimit")
int BPF_PROG(on_setrlimit, struct task_struct *target, unsigned int resource, struct rlimit *limit, int prev)
{
	return prev ? prev : touch(target, 1000);
}

static __always_inline int schedule(struct task_struct *target, __u64 detail)
{
	int err = touch(target, detail);

	return err ? err : named_operation(ON_NICE);
}

/* On which processors to run is nobody's disadvantage. */
static __always_inline bool only_places(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct pt_regs *regs = (struct pt_regs *)bpf_task_pt_regs(task);

	return (regs->orig_ax & ~0x40000000u) == (task->thread_info.status & TS_COMPAT ? 241 : 203);
}

SEC("lsm/task_setscheduler")
int BPF_PROG(on_setscheduler, struct task_struct *target, int prev)
{
	if (prev)
		return prev;
	return only_places() ? touch(target, 1001) : schedule(target, 1001);
}

SEC("lsm/task_setnice")
int BPF_PROG(on_setnice, struct task_struct *target, int nice, int prev)
{
	return prev ? prev : schedule(target, 1002);
}

SEC("lsm/task_setioprio")
int BPF_PROG(on_setioprio, struct task_struct *target, int priority, int prev)
{
	return prev ? prev : schedule(target, 1004);
}

SEC("lsm/ptrace_access_check")
int BPF_PROG(on_ptrace, struct task_struct *target, unsigned int mode, int prev)
{
	struct about a = {.op = OP_PTRACE, .detail = target->tgid};
	const struct policy *p;
	__u32 ref;
	int err;

	if (prev || !is_workload())
		return prev;
	/* Only looking, as ps does at everything there is, is refused without a
	   word, and only at the agent. */
	if (!(mode & PTRACE_MODE_ATTACH))
		return label_of(target) == LABEL_WORKLOAD && same_owner(target) ? 0 : -EPERM;
	err = touch(target, 1003);
	if (err)
		return err;
	p = policy_now();
	ref = ref_of(p, ON_PTRACE);
	/* What rules for files let a program do, no other does in its name. */
	if (p && p->files && !(ref & DENY))
		ref = stronger(ref, trusted_ref(p, target, 0));
	/* Who may write another's memory can make it run anything. */
	if (p && !(ref & DENY) && (!ref || p->rule[ON_MEMORY] & DENY))
		ref = p->rule[ON_MEMORY];
	return decide(p, ref, &a);
}

SEC("lsm/ptrace_traceme")
int BPF_PROG(on_traceme, struct task_struct *parent, int prev)
{
	struct about a = {.op = OP_PTRACE};
	const struct policy *p;
	__u32 ref;

	if (prev || !is_workload())
		return prev;
	p = policy_now();
	ref = ref_of(p, ON_PTRACE);
	if (p && !(ref & DENY) && (!ref || p->rule[ON_MEMORY] & DENY))
		ref = p->rule[ON_MEMORY];
	return decide(p, ref, &a);
}

/* Mounts that were allowed are recorded. */
static __always_inline void mounted(struct dentry *d)
{
	struct event *e = is_workload() ? begin_audit(policy_now(), OP_MOUNTED, sizeof(*e)) : NULL;

	if (!e)
		return;
	if (d)
		write_names(e, d);
	else
		e->why = 1;
	bpf_ringbuf_submit(e, 0);
}

/* A mount over a protected path, or over a directory on the way to it, would
   hide it. */
static __always_inline int mount_on(struct dentry *d)
{
	int err = operation(ON_MOUNT, OP_MOUNT, d);
	__u32 watch = 0;

	if (err)
		return err;
	err = change(d, true, CHANGED_COVERED, &watch);
	if (!err)
		mounted(d);
	return err;
}

SEC("lsm/sb_mount")
int BPF_PROG(on_mount, const char *dev, struct path *path, const char *type, unsigned long flags, void *data, int prev)
{
	return prev ? prev : mount_on(path->dentry);
}

SEC("lsm/move_mount")
int BPF_PROG(on_move_mount, struct path *from, struct path *to, int prev)
{
	return prev ? prev : mount_on(to->dentry);
}

#define SYSTEM(a, b, c, d, e, f, g) \
	((__u64)(a) | (__u64)(b) << 8 | (__u64)(c) << 16 | (__u64)(d) << 24 | (__u64)(e) << 32 | (__u64)(f) << 40 | (__u64)(g) << 48)

/* Whether a workload that may mount may mount this. A disk is opened by who
   mounts it, without the hook for files; some file systems are one for the
   whole kernel (devtmpfs holds the agent's own devices), or the agent's (the
   pod's share). What is not known to be neither is refused. */
static __always_inline bool may_be_mounted(struct super_block *sb)
{
	__u64 name = 0;

	if (sb->s_bdev)
		return device_given(S_IFBLK, sb->s_dev);
	bpf_probe_read_kernel_str(&name, sizeof(name), sb->s_type->name);
	switch (name) {
	case SYSTEM('p', 'r', 'o', 'c', 0, 0, 0):
	case SYSTEM('s', 'y', 's', 'f', 's', 0, 0):
	case SYSTEM('t', 'm', 'p', 'f', 's', 0, 0):
	case SYSTEM('r', 'a', 'm', 'f', 's', 0, 0):
	case SYSTEM('m', 'q', 'u', 'e', 'u', 'e', 0):
	case SYSTEM('d', 'e', 'v', 'p', 't', 's', 0):
	case SYSTEM('c', 'g', 'r', 'o', 'u', 'p', '2'):
	case SYSTEM('o', 'v', 'e', 'r', 'l', 'a', 'y'):
	case SYSTEM('f', 'u', 's', 'e', 0, 0, 0): /* of a server that has /dev/fuse */
		return true;
	}
	return false;
}

/* A mount made by fsmount can be used without ever being put anywhere. */
SEC("lsm/sb_kern_mount")
int BPF_PROG(on_new_mount, struct super_block *sb, int prev)
{
	struct about a = {.op = OP_DEVICE, .detail = sb->s_dev};
	int err = prev ? prev : operation(ON_MOUNT, OP_MOUNT, sb->s_root);

	if (err || !is_workload() || may_be_mounted(sb))
		return err;
	return decide(policy_now(), DENY | RULE_DEVICE, &a);
}

SEC("lsm/sb_umount")
int BPF_PROG(on_umount, struct vfsmount *mount, int flags, int prev)
{
	int err = prev ? prev : operation(ON_MOUNT, OP_MOUNT, NULL);

	if (!err)
		mounted(NULL);
	return err;
}

SEC("lsm/sb_remount")
int BPF_PROG(on_remount, struct super_block *sb, void *options, int prev)
{
	return prev ? prev : operation(ON_MOUNT, OP_MOUNT, sb->s_root);
}

SEC("lsm/sb_pivotroot")
int BPF_PROG(on_pivot, struct path *old, struct path *new, int prev)
{
	return prev ? prev : operation(ON_MOUNT, OP_MOUNT, new->dentry);
}

SEC("lsm/userns_create")
int BPF_PROG(on_userns, const struct cred *cred, int prev)
{
	return prev ? prev : operation(ON_USERNS, OP_USERNS, NULL);
}

/* A ring and the like is an anonymous inode; refusing the inode refuses the
   call that makes it. */
SEC("lsm/inode_init_security_anon")
int BPF_PROG(on_anon_inode, struct inode *inode, struct qstr *name, struct inode *context, int prev)
{
	char text[12] = {};

	if (prev || !is_workload())
		return prev;
	bpf_probe_read_kernel_str(text, sizeof(text), name->name);
	if (text[1] == 'i' && text[2] == 'o' && text[3] == '_' && text[4] == 'u')
		return operation(ON_IOURING, OP_IOURING, NULL);
	if (text[1] == 'u' && text[2] == 's' && text[3] == 'e' && text[4] == 'r' && text[5] == 'f')
		return named_operation(ON_USERFAULTFD);
	return 0;
}

/* memfd_create has no hook but that of the inode it makes. */
SEC("lsm/inode_alloc_security")
int BPF_PROG(on_new_inode, struct inode *inode, int prev)
{
	if (prev || !is_workload() || call_now() != CALL_MEMFD)
		return prev;
	return named_operation(ON_MEMFD);
}

SEC("lsm/path_chroot")
int BPF_PROG(on_chroot, struct path *path, int prev)
{
	return prev ? prev : operation(ON_CHROOT, OP_OPERATION, path->dentry);
}

SEC("lsm/key_alloc")
int BPF_PROG(on_key, struct key *key, const struct cred *cred, unsigned long flags, int prev)
{
	return prev ? prev : named_operation(ON_KEYCTL);
}

SEC("lsm/key_permission")
int BPF_PROG(on_key_use, unsigned long key, const struct cred *cred, __u32 need, int prev)
{
	return prev ? prev : named_operation(ON_KEYCTL);
}

/* Kernels differ in what they tell this one. */
SEC("lsm/perf_event_open")
int on_perf(void *ctx)
{
	return named_operation(ON_PERF);
}

SEC("lsm/quotactl")
int BPF_PROG(on_quota, int command, int type, int id, struct super_block *sb, int prev)
{
	return prev ? prev : named_operation(ON_QUOTA);
}

SEC("lsm/syslog")
int BPF_PROG(on_syslog, int type, int prev)
{
	return prev ? prev : named_operation(ON_SYSLOG);
}

SEC("lsm/task_fix_setuid")
int BPF_PROG(on_setuid, struct cred *new, const struct cred *old, int flags, int prev)
{
	if (prev || (new->uid.val == old->uid.val && new->euid.val == old->euid.val && new->suid.val == old->suid.val && new->fsuid.val == old->fsuid.val))
		return prev;
	return named_operation(ON_SETUID);
}

SEC("lsm/task_fix_setgid")
int BPF_PROG(on_setgid, struct cred *new, const struct cred *old, int flags, int prev)
{
	if (prev || (new->gid.val == old->gid.val && new->egid.val == old->egid.val && new->sgid.val == old->sgid.val && new->fsgid.val == old->fsgid.val))
		return prev;
	return named_operation(ON_SETUID);
}

SEC("lsm/task_fix_setgroups")
int BPF_PROG(on_setgroups, struct cred *new, const struct cred *old, int prev)
{
	return prev ? prev : named_operation(ON_SETUID);
}

/* A program with a set-user-ID or set-group-ID bit. */
SEC("lsm/bprm_creds_from_file")
int BPF_PROG(on_setuid_program, struct linux_binprm *bprm, struct file *file, int prev)
{
	const struct cred *old = bpf_get_current_task_btf()->cred;

	if (prev || (bprm->cred->euid.val == old->euid.val && bprm->cred->egid.val == old->egid.val))
		return prev;
	return operation(ON_SETUID, OP_OPERATION, file->f_path.dentry);
}

#endif
