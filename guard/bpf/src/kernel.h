// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// The few kernel structures the Guard reads. Every field is relocated (CO-RE)
// against the BTF of the kernel and the overlay module of one guest, so only
// names matter here, neither order nor offsets.
#ifndef KERNEL_H
#define KERNEL_H

#include <linux/bpf.h>
#include <stdbool.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct qstr {
	__u64 hash_len;
	const unsigned char *name;
};

struct dentry;

struct file_system_type {
	const char *name;
};

struct super_block {
	__u32 s_dev;
	unsigned long s_magic;
	struct dentry *s_root;
	struct file_system_type *s_type;
	void *s_bdev;
};

struct inode {
	unsigned short i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
	unsigned int i_nlink;
	__u32 i_rdev;
};

struct dentry {
	unsigned int d_flags;
	struct dentry *d_parent;
	struct qstr d_name;
	struct inode *d_inode;
};

struct vfsmount {
	struct dentry *mnt_root;
};

struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};

struct iattr {
	unsigned int ia_valid;
};

struct renamedata {
	struct dentry *old_dentry;
};

struct file {
	struct path f_path;
	struct inode *f_inode;
	unsigned int f_mode;
	unsigned int f_flags;
	void *private_data;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
	unsigned long *close_on_exec;
};

struct files_struct {
	struct fdtable *fdt;
};

struct thread_info {
	unsigned int status;
};

typedef struct {
	__u32 val;
} kuid_t;

typedef struct {
	__u32 val;
} kgid_t;

struct cred {
	kuid_t uid, suid, euid, fsuid;
	kgid_t gid, sgid, egid, fsgid;
};

struct kernfs_node {
	const char *name;
};

struct cgroup {
	struct kernfs_node *kn;
};

struct css_set {
	struct cgroup *dfl_cgrp;
};

struct mm_struct {
	unsigned long arg_start;
	unsigned long arg_end;
	unsigned long env_start;
	unsigned long env_end;
};

struct task_struct {
	struct mm_struct *mm;
	struct css_set *cgroups;
	struct thread_info thread_info;
	const struct cred *real_cred;
	const struct cred *cred;
	unsigned int flags;
	int tgid;
	char comm[16];
	struct task_struct *real_parent;
	struct files_struct *files;
};

struct linux_binprm {
	struct file *file;
	unsigned long p;
	unsigned long exec;
	int argc;
	const char *filename;
	const char *interp;
	struct cred *cred;
};

struct vm_area_struct {
	unsigned long vm_flags;
	void *anon_vma;
	struct file *vm_file;
};

struct in6_addr {
	__u8 in6_u[16];
};

struct sock_common {
	__u32 skc_daddr;
	__u32 skc_rcv_saddr;
	__u16 skc_dport; /* network order */
	__u16 skc_num;   /* the socket's own port, in the machine's order */
	unsigned short skc_family;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	unsigned char skc_state;
};

struct sock {
	struct sock_common __sk_common;
	__u16 sk_type;
	__u16 sk_protocol;
};

struct unix_sock {
	struct sock *peer;
};

struct socket {
	struct sock *sk;
};

struct tty_struct {
	struct tty_struct *link; /* the other end of a terminal */
};

struct tty_file_private {
	struct tty_struct *tty;
};

struct msghdr {
	void *msg_name;
	int msg_namelen;
};

struct pt_regs {
	unsigned long di;
	unsigned long bx;
	unsigned long orig_ax;
};

union security_list_options {
	void *inode_xattr_skipcap; /* from 6.12 */
};

/* Of the overlay module. */
struct ovl_path {
	struct dentry *dentry;
};

struct ovl_entry___stack {
	unsigned int __numlower;
	struct ovl_path __lowerstack[];
};

struct ovl_inode {
	struct inode vfs_inode;
	struct dentry *__upperdentry;
};

/* Where it keeps the file below: one of the two, by the age of the kernel. A
 * field of such an alternative may be missing; the linker knows them by the
 * three underscores. */
struct ovl_inode___path { /* up to 6.4 */
	struct ovl_path lowerpath;
};

struct ovl_inode___stack { /* from 6.5 */
	struct ovl_entry___stack *oe;
};

/* Of no kernel: the linker says that it is there if the kernel is a node's. */
struct hauberk_shared {
	int yes;
};

#pragma clang attribute pop

struct sockaddr;
struct key;
struct perf_event_attr;
struct user_namespace;
struct mnt_idmap;
struct super_block;
struct kernel_siginfo;
struct rlimit;
struct bpf_map;
struct bpf_prog;
union bpf_attr;

/* Constants of the kernel's own interfaces. */
#define EPERM 1
#define ENOMEM 12

#define PF_KTHREAD 0x00200000
#define PF_IO_WORKER 0x00000010
#define CLONE_THREAD 0x00010000

#define S_IFMT 0170000
#define S_IFSOCK 0140000
#define S_IFDIR 0040000
#define S_IFBLK 0060000
#define S_IFIFO 0010000
#define S_IFREG 0100000
#define S_IFCHR 0020000

#define FMODE_READ 0x1
#define FMODE_WRITE 0x2
#define FMODE_CREATED 0x100000
#define FMODE_NOACCOUNT 0x20000000

#define O_TRUNC 01000
#define ATTR_SIZE 0x8

#define PROT_READ 0x1
#define PROT_WRITE 0x2
#define PROT_EXEC 0x4
#define MAP_TYPE 0x0f
#define MAP_SHARED 0x01
#define MAP_SHARED_VALIDATE 0x03
#define MAP_PRIVATE 0x02
#define VM_WRITE 0x2
#define READ_IMPLIES_EXEC 0x0400000

#define TCP_LISTEN 10

#define AF_UNSPEC 0
#define AF_UNIX 1
#define AF_INET 2
#define AF_NETLINK 16
#define AF_INET6 10
#define AF_VSOCK 40
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define IPPROTO_IP 0
#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define IPPROTO_MPTCP 262
#define NETLINK_ROUTE 0
#define NETLINK_AUDIT 9

#define PTRACE_MODE_ATTACH 0x2

#define CAP_SYS_MODULE 16
#define CAP_SYS_RAWIO 17
#define CAP_SYS_ADMIN 21
#define CAP_SYS_BOOT 22
#define CAP_SYS_TIME 25
#define CAP_OPT_NOAUDIT 0x2 /* the kernel asks for itself */

#define TS_COMPAT 0x2 /* the call came from 32-bit code */

#define FS_IOC_SETFLAGS 0x40086602
#define FS_IOC32_SETFLAGS 0x40046602
#define FS_IOC_FSSETXATTR 0x401c5820
#define FS_IOC_SETVERSION 0x40087602
#define FS_IOC_ENABLE_VERITY 0x40806685
#define FS_IOC_SET_ENCRYPTION_POLICY 0x800c6613

#define DCACHE_DISCONNECTED 0x20

#define EROFS_MAGIC 0xe0f5e1e2
#define OVERLAYFS_MAGIC 0x794c7630
#define TMPFS_MAGIC 0x01021994
#define PROC_SUPER_MAGIC 0x9fa0
#define SYSFS_MAGIC 0x62656572
#define SECURITYFS_MAGIC 0x73636673
#define DEBUGFS_MAGIC 0x64626720
#define TRACEFS_MAGIC 0x74726163
#define BPF_FS_MAGIC 0xcafe4a11
#define EFIVARFS_MAGIC 0xde5e81e4
#define CONFIGFS_MAGIC 0x62656570
#define BINFMTFS_MAGIC 0x42494e4d
#define CGROUP_SUPER_MAGIC 0x27e0eb
#define CGROUP2_SUPER_MAGIC 0x63677270

#endif
