// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// What was found out about directories and files, so that it need not be found
// out again. What is kept here says only that nothing stands against an act; it
// holds for one policy and until a directory of any file system is moved.
#ifndef CLEAR_H
#define CLEAR_H

#include "event.h"

/* A directory of which no rule is about what lies in it, but for marks of the
   objects themselves: when it was found out, which one store writes whole. */
struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u64);
} clears SEC(".maps");

/* Moves of directories. While one is under way the two differ. */
struct moves {
	__u64 begun;
	__u64 ended;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct moves);
} moves SEC(".maps");

static __always_inline struct moves *moves_now(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&moves, &zero);
}

#define MOVING (-1ull)

/* When it is, by the policies and the moves of directories there were, or MOVING
   while a move is under way. The end is read first: so none was under way when
   the other was read. */
static __always_inline __u64 moment(const struct policy *p)
{
	struct moves *m = moves_now();
	__u64 ended, moving;

	if (!m)
		return MOVING;
	ended = *(volatile __u64 *)&m->ended;
	moving = ended ^ *(volatile __u64 *)&m->begun;
	moving = (moving | -moving) >> 63; /* no branch, for the verifier */
	return -moving | (__u64)p->rule[APPLIED] << 40 | (ended + 1);
}

/* Whether a directory is one of which it is found out: directories are moved by
   nobody but this kernel where it alone has the file system, and there is one
   policy for all. */
static __always_inline bool may_be_clear(struct inode *dir, __u64 now)
{
	unsigned long magic = dir->i_sb->s_magic;

	return !shared() && now != MOVING && (magic == OVERLAYFS_MAGIC || magic == TMPFS_MAGIC);
}

static __always_inline bool is_clear(struct inode *dir, __u64 now)
{
	__u64 *when = shared() ? NULL : bpf_inode_storage_get(&clears, dir, 0, 0);

	return when && *(volatile __u64 *)when == now;
}

static __always_inline void note_clear(struct inode *dir, __u64 now)
{
	__u64 *when = bpf_inode_storage_get(&clears, dir, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);

	if (when)
		*(volatile __u64 *)when = now;
}

static __always_inline void move_begins(void)
{
	struct moves *m = moves_now();

	if (m)
		__sync_fetch_and_add(&m->begun, 1);
}

static __always_inline void move_ends(void)
{
	struct moves *m = moves_now();

	if (m)
		__sync_fetch_and_add(&m->ended, 1);
}

#endif
