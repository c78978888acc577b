// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// How the lineage of a task is taken down: when it runs a program and when it
// forks, so that neither a new name for itself nor the end of its parent changes
// it.
#ifndef LINEAGE_H
#define LINEAGE_H

#include "policy.h"

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
static __always_inline void lineage_exec(struct lineage *l, struct linux_binprm *bprm, bool first)
{
	struct inode *inode = bprm->file->f_inode;

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
		l->container = container_of_now(bpf_get_current_task_btf());
		l->ancestors = 0;
		l->left_out = 0;
		l->parent[0] = 0;
	}
}

/* A process that the current task makes is one ancestor further down than the
   copy of its lineage says. */
static __always_inline void lineage_fork(struct lineage *to, const struct lineage *from)
{
	if (from->ancestors < ANCESTORS) {
		bpf_probe_read_kernel(to->up + 1, sizeof(struct forebear) * (ANCESTORS - 1), from->up);
		to->ancestors = from->ancestors + 1;
	} else { /* the first of the container keeps its place */
		bpf_probe_read_kernel(to->up + 1, sizeof(struct forebear) * (ANCESTORS - 2), from->up);
		to->left_out = 1;
	}
	to->up[0].pid = bpf_get_current_pid_tgid() >> 32;
	bpf_probe_read_kernel(to->up[0].name, COMM_SIZE, from->name);
	bpf_probe_read_kernel(to->parent, EXE_SIZE, from->exe);
	to->parent_cut = from->exe_cut;
}

#endif
