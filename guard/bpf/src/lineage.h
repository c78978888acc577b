// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// Who a task is, for the record: the program it runs and the processes that
// led to it, back to the first of its container. It is taken down when a task
// starts and when it forks, so that neither a new name for itself nor the end
// of its parent changes it. No verdict asks it.
#ifndef LINEAGE_H
#define LINEAGE_H

#include "policy.h"

#define EXE_SIZE 128
#define ANCESTORS 8
#define COMM_SIZE 16

struct forebear {
	__u32 pid;
	char name[COMM_SIZE]; /* of its program's file */
};

struct lineage {
	__u64 start; /* when it began to run its program, nanoseconds since boot */
	__u64 exe_ino;
	__u32 exe_dev;
	__u32 container;
	__u8 exe_cut; /* exe is the file's name alone: its path is too long */
	__u8 parent_cut;
	__u8 ancestors; /* how many there are */
	__u8 left_out;  /* those between the last two of up are missing */
	__u32 pad;
	char name[COMM_SIZE];
	char exe[EXE_SIZE];
	char parent[EXE_SIZE]; /* what its parent ran when it forked */
	struct forebear up[ANCESTORS]; /* nearest first; the last is the container's first */
};

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct lineage);
} lineages SEC(".maps");

/* The number of the container, by the name that the agent gave its cgroup:
   "c" and the number. */
static __always_inline __u32 container_of_now(struct task_struct *task)
{
	char name[12] = {};
	__u32 n = 0;

	if (shared())
		return owner_of(task);
	bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, name));
	if (name[0] != 'c')
		return 0;
	for (int i = 1; i < 11; i++) {
		if (name[i] < '0' || name[i] > '9')
			break;
		n = n * 10 + (name[i] - '0');
	}
	return n;
}

/* The current task begins to run a program; first: the agent started it. */
static __always_inline void lineage_exec(struct linux_binprm *bprm, bool first)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct lineage *l = bpf_task_storage_get(&lineages, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	struct inode *inode = bprm->file->f_inode;

	if (!l)
		return;
	l->start = bpf_ktime_get_boot_ns();
	l->exe_ino = inode->i_ino;
	l->exe_dev = inode->i_sb->s_dev;
	bpf_probe_read_kernel_str(l->name, sizeof(l->name), bprm->file->f_path.dentry->d_name.name);
	l->exe_cut = 0;
	if (bpf_d_path(&bprm->file->f_path, l->exe, sizeof(l->exe)) <= 0) {
		l->exe_cut = 1;
		bpf_probe_read_kernel_str(l->exe, sizeof(l->exe), bprm->file->f_path.dentry->d_name.name);
	}
	if (first) {
		l->container = container_of_now(task);
		l->ancestors = 0;
		l->left_out = 0;
		l->parent[0] = 0;
	}
}

/* The current task makes a new one. Its storage is the current task's own, one
   ancestor longer; a thread's is the same. */
static __always_inline void lineage_fork(struct task_struct *child, bool thread)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct lineage *from = bpf_task_storage_get(&lineages, task, 0, 0), *to;

	if (!from)
		return;
	to = bpf_task_storage_get(&lineages, child, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!to)
		return;
	bpf_probe_read_kernel(to, sizeof(*to), from);
	if (thread)
		return;
	if (from->ancestors < ANCESTORS) {
		bpf_probe_read_kernel(to->up + 1, sizeof(struct forebear) * (ANCESTORS - 1), from->up);
		to->ancestors = from->ancestors + 1;
	} else { /* the first of the container keeps its place */
		bpf_probe_read_kernel(to->up + 1, sizeof(struct forebear) * (ANCESTORS - 2), from->up);
		to->left_out = 1;
	}
	to->up[0].pid = task->tgid;
	bpf_probe_read_kernel(to->up[0].name, COMM_SIZE, from->name);
	bpf_probe_read_kernel(to->parent, EXE_SIZE, from->exe);
	to->parent_cut = from->exe_cut;
}

#endif
