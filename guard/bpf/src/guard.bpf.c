// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
//
// The programs that hold a workload to its policy from inside the guest's
// kernel. A verdict rests on identity (inode, task, superblock), never on
// text; text is for events only.
#include "exec.h"
#include "file.h"
#include "system.h"
#include "wire.h"

char LICENSE[] SEC("license") = "GPL";
