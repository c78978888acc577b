// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// A kernel that others share: a node's, with the containers of runc. Only tasks
// of bound cgroups are held to a policy, and each of them to its owner's. The
// linker says which kind of kernel it is, so a guest pays nothing for this.
#ifndef SHARED_H
#define SHARED_H

/* A constant to the verifier, which never looks at the side that is not taken. */
static __always_inline bool shared(void)
{
	struct hauberk_shared *kernel = NULL;

	return bpf_core_field_exists(kernel->yes);
}

/* Whose processes those of a cgroup are, and of all below that are not bound
   themselves. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, OWNERS);
	__type(key, __u64);
	__type(value, __u32);
} bound SEC(".maps");

/* The same for packets, which have no task. */
struct {
	__uint(type, BPF_MAP_TYPE_CGROUP_STORAGE);
	__type(key, __u64);
	__type(value, __u32);
} packet_owner SEC(".maps");

/* What the file is that the loader opened last: only the kernel knows which
   object of an image lies below one of an overlay. */
struct shown {
	struct object object;
	__u32 origin;
	__u32 times; /* opened so far */
};

AT(shown, origin, 16);

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct shown);
} shown SEC(".maps");

/* The slot of a policy in the maps that have one for each. */
static __always_inline __u32 slot_of(const struct policy *p)
{
	return p->rule[SLOT];
}

static __always_inline __u32 owner_of(struct task_struct *task)
{
	struct task_label *l = bpf_task_storage_get(&labels, task, 0, 0);

	return l ? l->owner : 0;
}

/* One whose owner has gone has no policy: it may do nothing. In a guest there is
   only one, whose owner is 0. */
static __always_inline const struct policy *policy_of(__u32 owner)
{
	__u32 place = shared() ? owner & (OWNERS - 1) : 0, zero = 0;
	void *inner = bpf_map_lookup_elem(&current, &place);
	const struct policy *p = inner ? bpf_map_lookup_elem(inner, &zero) : NULL;

	if (shared() && p && p->rule[OWNER] != owner)
		return NULL;
	return p;
}

#define MAX_LEVEL 16 /* a cgroup that lies deeper is not bound */

/* The owner of the nearest bound cgroup that the current task is in; 0 for
   none. */
static __always_inline __u32 owner_by_cgroup(void)
{
	__u32 owner = 0;

	for (int i = 1; i <= MAX_LEVEL; i++) {
		__u64 id = bpf_get_current_ancestor_cgroup_id(i);
		__u32 *found;

		if (!id)
			break;
		found = bpf_map_lookup_elem(&bound, &id);
		if (found)
			owner = *found;
	}
	return owner;
}

/* A program that is about to start in a bound cgroup, of a task that was not of
   it, is what the runtime starts there. From here on the label is what counts:
   who is moved to another cgroup keeps it. */
static __always_inline __u32 adopt(struct task_struct *task)
{
	__u32 owner = owner_by_cgroup();
	struct task_label *l;

	if (!owner)
		return LABEL_HOST;
	l = bpf_task_storage_get(&labels, task, 0, BPF_LOCAL_STORAGE_GET_F_CREATE);
	if (!l)
		return LABEL_UNKNOWN; /* refused */
	l->owner = owner;
	l->label = LABEL_SETUP;
	return LABEL_SETUP;
}

/* Whether a task is of the same workload as the current one. */
static __always_inline bool same_owner(struct task_struct *task)
{
	return !shared() || owner_of(task) == owner_of(bpf_get_current_task_btf());
}

#endif
