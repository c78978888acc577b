// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Protected files, devices, and the kernel's own knobs.
#ifndef FILE_H
#define FILE_H

#include "event.h"

/* Deeper than this below a file system's root nothing can be decided; with
   file rules in force it is refused. */
#define MAX_DEPTH 96

#define WANT_WRITE 1
#define WANT_READ 2

static __always_inline const struct meaning *meaning_of(const struct policy *p, struct inode *inode)
{
	struct mark *m = bpf_inode_storage_get(&marks, inode, 0, 0);
	__u32 slot = p->slot & 1;

	if (!m || m->slot[slot].generation != p->generation)
		return NULL;
	return &m->slot[slot];
}

/* The rules of a name in a directory, which hold whatever object bears it. */
static __always_inline struct named *named_in(__u32 slot, __u32 set, struct dentry *d)
{
	struct name key = {.set = set};
	void *inner;

	bpf_probe_read_kernel_str(key.text, sizeof(key.text), d->d_name.name);
	inner = bpf_map_lookup_elem(&names, &slot);
	return inner ? bpf_map_lookup_elem(inner, &key) : NULL;
}

/* One that denies beats one that reports, which beats none; else the one that
   was there. Without a branch, for the verifier would follow each of them at
   every step of a walk. */
static __always_inline __u32 stronger(__u32 old, __u32 rule)
{
	__u32 no_old = ~(old | -old) >> 31, some = (rule | -rule) >> 31;
	__u32 take = some & (no_old | (rule >> 31 & ~old >> 31));

	return old ^ ((old ^ rule) & -take);
}

/* The rule against what is wanted of the object, of its name, or of a
   directory above it. */
static __always_inline __u32 file_ref(const struct policy *p, struct dentry *d, __u32 want)
{
	__u32 writes = -(want & WANT_WRITE), reads = -(want >> 1), slot = p->slot & 1;
	__u32 found = p->slot >> 1; /* nothing, which the verifier shall not know */
	struct dentry *parent = d->d_parent;
	const struct meaning *m = meaning_of(p, parent->d_inode);

	if (m && m->names) {
		struct named *n = named_in(slot, m->names, d);

		if (n) {
			found = stronger(found, n->write & writes);
			found = stronger(found, n->read & reads);
		}
	}
	for (int i = 0; i < MAX_DEPTH; i++) {
		m = meaning_of(p, d->d_inode);
		if (m) {
			found = stronger(found, m->write & writes);
			found = stronger(found, m->read & reads);
		}
		parent = d->d_parent;
		if (parent == d)
			return found;
		d = parent;
	}
	return DENY | RULE_DEPTH;
}

/* The rule against changing what the dentry names. A directory on the way to
   something protected can be changed but not moved. */
static __always_inline __u32 change_ref(const struct policy *p, struct dentry *d, bool moves)
{
	__u32 ref = file_ref(p, d, WANT_WRITE);
	const struct meaning *m;

	if (!moves || ref & DENY)
		return ref;
	m = meaning_of(p, d->d_inode);
	return m ? stronger(ref, m->anchor) : ref;
}

static __always_inline int change(struct dentry *d, bool moves)
{
	struct about a = {.op = OP_WRITE, .dentry = d};
	const struct policy *p;

	if (!is_workload())
		return 0;
	p = policy_now();
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (!p->files)
		return 0;
	return decide(p, change_ref(p, d, moves), &a);
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
	int err = prev ? prev : change(old, false);

	return err ? err : change(d, false);
}

SEC("lsm/inode_unlink")
int BPF_PROG(on_unlink, struct inode *dir, struct dentry *d, int prev)
{
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
	int err = prev ? prev : change(old, true);

	return err ? err : change(d, true);
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
	if (cmd != FS_IOC_SETFLAGS && cmd != FS_IOC_FSSETXATTR)
		return 0;
	return change(file->f_path.dentry, false);
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
	struct device key = {.cgroup = bpf_get_current_ancestor_cgroup_id(1), .type = type, .number = rdev};

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
	struct about a = {.op = OP_SETTING, .path = &file->f_path, .dentry = d};

	if (is_setting(magic, d))
		return decide(p, DENY | RULE_SETTING, &a);
	if (!is_proc_mem(magic, d))
		return 0;
	/* A process may write its own read-only pages this way. */
	a.op = OP_MEMORY;
	a.why = 4; /* MEMORY_PROC */
	return decide(p, ref_of(p, ON_MEMORY), &a);
}

SEC("lsm/file_open")
int BPF_PROG(on_open, struct file *file, int prev)
{
	struct about a = {.path = &file->f_path, .dentry = file->f_path.dentry};
	const struct policy *p;
	struct inode *inode;
	__u32 type, want = 0;
	int err;

	/* NOACCOUNT is the overlay opening the file below one already checked. */
	if (prev || file->f_mode & FMODE_NOACCOUNT || !is_workload())
		return prev;
	p = policy_now();
	inode = file->f_inode;
	type = inode->i_mode & S_IFMT;
	if ((type == S_IFCHR || type == S_IFBLK) && !device_allowed(type, inode->i_rdev)) {
		a.op = OP_DEVICE;
		a.detail = inode->i_rdev;
		return decide(p, DENY | RULE_DEVICE, &a);
	}
	if (file->f_mode & FMODE_WRITE) {
		want = WANT_WRITE;
		err = check_write(p, file);
		if (err)
			return err;
	}
	a.op = want ? OP_WRITE : OP_READ;
	if (!p)
		return decide(p, DENY | RULE_NO_POLICY, &a);
	if (file->f_mode & FMODE_READ && p->reads)
		want |= WANT_READ;
	if (!p->files || !want)
		return 0;
	return decide(p, file_ref(p, file->f_path.dentry, want), &a);
}

#endif
