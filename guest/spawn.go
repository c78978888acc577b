package guest

// How processes come to be, for whoever labels tasks (the Guard).
//
// The agent is PID 1 and never execs anything but itself. A process of the
// host's asking is made in two steps:
//
//  1. PID 1 calls syscall.ForkExec("/init") (a vfork by clone or clone3, one
//     exec) with HAUBERK_STAGE=setup in the environment: the setup stage. It is
//     the agent's own inode, from the initramfs (rootfs, or a bind of it).
//     For a container the clone carries NEWPID|NEWNS|NEWUTS|NEWIPC and
//     INTO_CGROUP; for an exec into a container the child is cloned into the
//     container's PID namespace (PID 1 points its pid_for_children there for
//     the moment of the clone) and cgroup, and joins the other namespaces
//     itself by setns on a pidfd.
//  2. The setup stage is trusted code on untrusted data. It mounts, pivots into
//     the container's overlay root, writes /etc/hosts and the like, opens a
//     terminal, drops capabilities, sets no_new_privs and its uid, waits for
//     Start if it is a container's first process, and calls execve(2) once on
//     the workload's program. It never forks.
//
// So, in labels:
//
//   - the thread group of PID 1 is the AGENT, its threads included: Go clones
//     threads (CLONE_THREAD) whenever it likes, in PID 1 and in a setup stage;
//     a thread takes the label of its thread group;
//   - a child of AGENT is SETUP. Its exec of the agent's own inode keeps SETUP;
//     its exec of anything else makes it WORKLOAD. That exec itself already
//     obeys the policy: it is the first thing the workload does;
//   - whatever a WORKLOAD forks or execs is WORKLOAD, for good;
//   - the agent's inode is never reachable from a container: it lies on a mount
//     that is detached from the container's mount namespace before the exec.
//
// Nothing runs before the Guard: at boot PID 1 mounts proc, sys, dev and
// cgroup2, loads modules with finit_module, calls guardStart, and only then
// opens the port. After a root is mounted it calls guardRoot with the device
// numbers of the overlay and of the erofs below it.
