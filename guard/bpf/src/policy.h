// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// What the guest agent writes and the programs read: the labels of tasks, the
// marks on inodes and the policy of one generation. package guard compiles the
// same layouts; its tests compare the two.
#ifndef POLICY_H
#define POLICY_H

#include "kernel.h"

/* A function that is not static is looked at by the verifier once in each
   program, whatever it is called with and from wherever; one that is static, on
   every way that leads to it. It takes numbers and addresses of plain memory. */
#define ONCE __attribute__((noinline))

/* The verifier of 6.1 goes once through a function that bpf_loop calls back, with
   the values it knows of the first time, and cuts away what it did not come to.
   So nothing that such a function branches on may be known at the start: it is
   read from a map, from memory that was handed over, or made with NOTHING. */

/* A reference to a rule: its number, and whether it denies or only reports.
   0 is no rule. */
#define DENY 0x80000000u

/* Rules that no policy can switch off. */
enum builtin {
	RULE_NO_POLICY = 1,
	RULE_BPF = 2,
	RULE_MODULE = 3,
	RULE_AGENT = 4,
	RULE_DEVICE = 5,
	RULE_SETTING = 6,
	RULE_HELPER = 7,
	RULE_DEPTH = 8,
	RULE_HOST = 9,
};

/* Indexes of policy.rule. */
enum rule_index {
	ON_ORIGIN,
	ON_MEMORY,
	ON_SHELL,
	ON_BPF,
	ON_MODULE,
	ON_PTRACE,
	ON_MOUNT,
	ON_RAWSOCKET,
	ON_MKNOD,
	ON_IOURING,
	ON_USERNS,
	ON_UNLISTED, /* some list of programs has not all of them */
	ON_PRELOAD,
	ON_SCRIPT,
	ON_INLINE,

	/* 0 in every policy, which the verifier does not know: what is or-ed with it
	   is as good as unknown, and two ways that differ in it are one. */
	NOTHING = 31,
	ON_SETNS = 32,
	ON_UNSHARE,
	ON_CHROOT,
	ON_KEYCTL,
	ON_PERF,
	ON_USERFAULTFD,
	ON_TIME,
	ON_REBOOT,
	ON_SWAP,
	ON_QUOTA,
	ON_SYSLOG,
	ON_MEMFD,
	ON_SETUID,
	ON_HOSTNAME,
	ON_NICE,
	ON_CAPABILITY,       /* using one of CAPS_DENIED */
	ON_CAPABILITY_AUDIT, /* using one of CAPS_REPORTED */
	CAPS_DENIED,         /* two words of bits, no rules */
	CAPS_REPORTED = CAPS_DENIED + 2,
	INGRESS_DENY = CAPS_REPORTED + 2, /* lists that must all allow who connects */
	INGRESS_AUDIT,
	DNS_LISTS, /* lists that open the ports of DNS only to whom they name */
	HAS_NAMES, /* nonzero: some list has names */
	DNS_AUDIT, /* nonzero: answers are recorded, too */

	APPLIED = 61, /* no rule: how many policies the agent has put in force */
	SLOT = 62,  /* no rule: its slot in the maps that have one for each policy */
	OWNER = 63, /* whose the policy is, of a kernel that others share */
	RULE_INDEXES = 64,
};

/* Whose policies a shared kernel has room for. The low bits of the number of an
   owner are its place; the rest tells it from who had the place before. */
#define OWNERS 64

#define EGRESS_LISTS 32

struct policy {
	__u64 generation;
	__u32 slot;         /* which of the two slots of a mark is its own */
	__u32 files;        /* nonzero: there are file rules */
	__u32 reads;        /* nonzero: some deny reading */
	__u32 listed;       /* LISTED_ bits: what is said of programs */
	__u32 egress_deny;  /* lists that must all allow a destination */
	__u32 egress_audit; /* lists whose refusal is only reported */
	__u32 rule[RULE_INDEXES];
	__u32 egress[EGRESS_LISTS]; /* the rule of each list */
};

/* Bits of policy.listed. */
#define LISTED_DENIED 1 /* some programs may not run */
#define LISTED_KNOWN 2  /* something else is said of some */
#define LISTED_VOLUMES 4 /* some mounts may hold programs */
#define LISTED_RELAYS 8 /* some interpreters may have no socket relayed to them */

/* What may be lifted for some programs or places, by policies of which each has
   a list of its own: what one refuses another's list does not allow. */
enum aspect {
	ASPECT_ORIGIN,
	ASPECT_MEMORY,
	ASPECT_PROGRAM,
	ASPECT_SCRIPT,
	ASPECT_INLINE,
	ASPECT_SHELL,
	ASPECTS = 8,
};

#define EXEC_LISTS 32

struct aspect_lists {
	__u32 deny;  /* lists that must all have it */
	__u32 audit; /* lists whose refusal is only reported */
	__u32 rule[EXEC_LISTS];
};

struct exec_lists {
	struct aspect_lists aspect[ASPECTS];
};

/* What the lists say of one program of the image. */
struct program {
	__u32 denied;  /* rule */
	__u32 allowed; /* lists that have it */
	__u32 limited; /* lists that have it for some parents */
	__u32 jit;     /* lists that let it make code */
	__u32 script;  /* lists that know it as an interpreter */
	__u32 inlined; /* of them, those that let it have no code in its arguments */
	__u64 code;    /* letters of its options that bring code: bit 0 is 'A' */
	__u64 value;   /* letters of its options that take a value */
};

/* What a file means to one generation. Only valid if the generation matches. */
struct meaning {
	__u64 generation;
	__u32 rules;  /* of filesets: what holds for it and for what is below it */
	__u32 home;   /* id of the directory it is in by its rules' paths; 0: of several or none */
	__u32 exec;
	__u32 anchor; /* rule against moving it: a protected path leads through it */
	__u32 names;  /* set of names in it that have rules of their own */
	__u32 volume; /* lists that let the mount with this root hold programs */
};

enum kind {
	KIND_NONE,
	KIND_OVERLAY, /* root of the container's file system */
	KIND_AGENT,   /* the agent's own program */
};

struct mark {
	__u32 kind;
	__u32 id; /* by which the agent knows it again */
	struct meaning slot[2];
};

enum label {
	LABEL_HOST, /* of a shared kernel: of no bound cgroup, and not judged */
	LABEL_AGENT, /* PID 1 of a guest; of a shared kernel, what loads the programs */
	LABEL_KERNEL,
	LABEL_SETUP,    /* forked by the agent, still runs the agent's code */
	LABEL_WORKLOAD,
	LABEL_UNKNOWN,  /* treated as a workload that may not even exec */
};

struct object {
	__u32 dev;
	__u32 pad;
	__u64 ino;
};

enum label_flag {
	LABEL_PRELOADED = 1, /* the loader was told to load more than the program */
	LABEL_SCRIPT = 2,    /* runs a script by its first line */
};

#define EXE_SIZE 128
#define ANCESTORS 8
#define COMM_SIZE 16

/* A process as it was when it started another. */
struct forebear {
	__u32 pid;
	char name[COMM_SIZE]; /* of its program's file */
};

/* Who a task is, for the record: the program it runs and the processes that led
   to it, back to the first of its container. No verdict asks it. */
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

/* What is known of a task from the moment it runs its program. Nothing that the
   task does later, such as naming another file as its program, changes it. */
struct task_label {
	__u32 label;
	__u32 flags;
	__u32 origin;      /* enum origin of the program */
	__u32 owner;       /* of a shared kernel: whose policy it is held to */
	struct object exe; /* the program; as it lies in the image, if it is of it */
	struct lineage who;
};

/* What an entry of the map of addresses is about. */
enum {
	TO_4 = 4, /* whom the workload may reach */
	TO_6 = 6,
	FROM_4 = 0x104, /* who may reach it, at a port of its own */
	FROM_6 = 0x106,
	AT_PORT = 0x200, /* ports that anybody may reach */
	TO_NAME = 0x306, /* its number stands where the address would */
};

struct destination {
	__u32 prefix;
	__u16 family;
	__u16 port; /* network order; 0: any */
	__u8 addr[16];
};

/* The lists that allow an address, by protocol. */
struct lists {
	__u32 tcp;
	__u32 udp;
	__u32 other;
};

/* Who may start a program that a list limits to some parents. */
struct kinship {
	struct object child;
	struct object parent;
};

/* A device that the containers of one cgroup were given: S_IFCHR or S_IFBLK,
   and the number as inodes have it. */
struct device {
	__u64 cgroup;
	__u32 type;
	__u32 number;
};

#define NAME_SIZE 256
struct name {
	__u32 set;
	char text[NAME_SIZE];
};

/* What a name in a directory stands for, now or later. */
struct named {
	__u32 rules;
	__u32 anchor; /* rule against making it: a protected path will lead through it */
};

/* Rules for files that hold together: those of the deepest path of each policy.
   The agent finds them out; one look decides. */
#define EXCEPTIONS 16

struct exception {
	__u32 programs; /* the list of those that may */
	__u32 may;      /* WANT_ */
	__u32 write;    /* if this ends a group: the rules for whom no list of it allows */
	__u32 read;
	__u32 ends;
};

struct fileset {
	__u32 write; /* rule against changing it, whoever asks */
	__u32 read;
	__u32 watch; /* rule that wants every change recorded */
	__u32 count;
	struct exception except[EXCEPTIONS];
};

/* A program on a list, by the inode below the overlay. List 0 has all of them. */
struct listed_program {
	__u32 list;
	__u32 dev;
	__u64 ino;
};

#define AT(type, member, offset) \
	_Static_assert(__builtin_offsetof(struct type, member) == offset, "the other side has it at " #offset)

/* As guard/compile.go and guest/guard/policy.go write them. */
AT(policy, slot, 8);
AT(policy, files, 12);
AT(policy, reads, 16);
AT(policy, listed, 20);
AT(policy, egress_deny, 24);
AT(policy, egress_audit, 28);
AT(policy, rule, 32);
AT(policy, egress, 288);
AT(meaning, rules, 8);
AT(meaning, names, 24);
AT(fileset, except, 16);
AT(exception, ends, 16);
AT(listed_program, ino, 8);
AT(mark, id, 4);
AT(mark, slot, 8);
AT(destination, family, 4);
AT(destination, port, 6);
AT(destination, addr, 8);
AT(lists, udp, 4);
AT(lists, other, 8);
AT(object, ino, 8);
AT(meaning, volume, 28);
AT(exec_lists, aspect[1], 136);
AT(program, script, 16);
AT(program, code, 24);
AT(kinship, parent, 16);
AT(task_label, exe, 16);
AT(device, type, 8);
AT(device, number, 12);

struct {
	__uint(type, BPF_MAP_TYPE_TASK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct task_label);
} labels SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_INODE_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct mark);
} marks SEC(".maps");

/* Replacing the one inner map is the moment a generation takes effect: the
   kernel swaps a pointer and waits until no program reads the old one. */
struct policy_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct policy));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, struct policy_map);
} current SEC(".maps");

struct egress_map {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct destination));
	__uint(value_size, sizeof(struct lists));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct egress_map);
} egress SEC(".maps");

struct name_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct name));
	__uint(value_size, sizeof(struct named));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct name_map);
} names SEC(".maps");

struct fileset_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct fileset));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct fileset_map);
} filesets SEC(".maps");

struct trusted_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct listed_program));
	__uint(value_size, sizeof(__u32));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct trusted_map);
} trusted SEC(".maps");

/* A key is too large for a program's stack; the second is a blank one. No program is interrupted by
   another that uses it: the kernel would not run that one at all. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct name);
} name_key SEC(".maps");

struct object_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct object));
	__uint(value_size, sizeof(struct program));
};

/* Programs of the image that something is said of, by the inode below the
   overlay, so that a hard link in the image is no way around. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct object_map);
} listed SEC(".maps");

struct kinship_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct kinship));
	__uint(value_size, sizeof(__u32));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct kinship_map);
} kin SEC(".maps");

struct execs_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct exec_lists));
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct execs_map);
} execs SEC(".maps");

/* Devices of the erofs file systems that hold released images. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u32);
} images SEC(".maps");

/* Devices beyond the usual that a container's configuration gives it. The agent
   fills it before the container's first process, and empties it after the
   last. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct device);
	__type(value, __u32);
} devices SEC(".maps");

/* A name the wrong way round, so that what is below it begins with it: one that
   is meant itself ends in NUL, one that only those below belong to in a dot. */
#define DOMAIN_SIZE 256
struct domain {
	__u32 prefix;
	__u8 text[DOMAIN_SIZE];
};

struct domain_map {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(struct domain));
	__uint(value_size, sizeof(__u64));
};

/* The number of a name is of its text, and so the same in all generations:
   what was learnt under one holds under the next, if that has the name. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 2);
	__type(key, __u32);
	__array(values, struct domain_map);
} domains SEC(".maps");

/* What names an address was given for, and until when. */
#define LEARNT_NAMES 4
struct learnt {
	struct {
		__u64 name;
		__u64 until;
	} of[LEARNT_NAMES];
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__uint(key_size, 16);
	__type(value, struct learnt);
} learnt SEC(".maps");

/* Who has exchanged datagrams with a port of ours, as a list allowed one way:
   the other way is then open, too. */
struct talk {
	__u8 peer[16];
	__u16 peer_port;
	__u16 port;
	__u32 owner;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct talk);
	__type(value, __u32);
} talks SEC(".maps");

/* Questions that were asked: the number of one stands for the peer's port. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct talk);
	__type(value, __u32);
} asked SEC(".maps");

#include "shared.h"

/* Counts the zeros below the first one: without a loop, of which the verifier
   would follow every end. */
static __always_inline __u32 first_bit(__u32 bits)
{
	__u32 x = (bits & -bits) - 1;

	x -= x >> 1 & 0x55555555;
	x = (x & 0x33333333) + (x >> 2 & 0x33333333);
	x = (x + (x >> 4)) & 0x0f0f0f0f;
	return x * 0x01010101 >> 24;
}

static __always_inline const struct policy *policy_now(void)
{
	return policy_of(shared() ? owner_of(bpf_get_current_task_btf()) : 0);
}

static __always_inline __u64 generation_of(const struct policy *p)
{
	return p ? p->generation : 0;
}

/* The label of a task that has this one written down, or none. */
static __always_inline __u32 label_with(struct task_struct *task, const struct task_label *l)
{
	if (!shared() && task->tgid == 1)
		return LABEL_AGENT;
	if (task->flags & PF_KTHREAD)
		return LABEL_KERNEL;
	if (l)
		return l->label;
	return shared() ? LABEL_HOST : LABEL_UNKNOWN;
}

static __always_inline __u32 label_of(struct task_struct *task)
{
	return label_with(task, bpf_task_storage_get(&labels, task, 0, 0));
}

static __always_inline __u32 label_now(void)
{
	return label_of(bpf_get_current_task_btf());
}

/* Whether the current task is held to the policy. */
static __always_inline bool is_workload(void)
{
	return label_now() >= LABEL_WORKLOAD;
}

#endif
