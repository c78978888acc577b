// Package guard makes what stands behind the word Guard: the programs that run
// in a guest's kernel, the policy they hold a workload to, and the words for
// what they saw.
//
// It works on the host, before and beside the guest: Compile turns policies into
// one blob that the guest's agent puts into maps, Decode reads what the guest
// sends back. Package guard/bpf has the programs and fits them to one kernel.
// This one loads nothing into any kernel and opens no connection; what loads is
// package guest, which speaks bpf(2) itself.
//
// A verdict rests on identity (an inode, a task, a file system), never on a
// name, and without a policy a workload may do nothing. What the programs do
// not hold:
//   - code that an interpreter reads from its standard input, or that stands in
//     its arguments behind the first that is no option. What else is handed to
//     one that a policy lists must come from the image (exec.scripts);
//   - several programs in one file, such as busybox: what is said of one is said
//     of all of them;
//   - a program of the image that an allowed one maps and runs as its own;
//   - a shell whose socket is relayed by a process that is neither above it nor
//     at the other end of its input, or by a descriptor beyond the 48th; or
//     through a terminal to which the socket came after the shell;
//   - what the workload itself writes to a volume that may hold programs: mount
//     it read-only;
//   - a file that was open for writing before the rule that protects it came;
//   - what the host does to a share of its files, where it puts another directory
//     in the place of one that a rule's path leads through: that is found with the
//     next heartbeat;
//   - what a shared mapping writes after its file was closed, and a file that is
//     watched by another name than the rule's: the record of a change
//     (files[].fim) says of a mapping that there is one;
//   - a file that a directory's rule covers, and that has another name elsewhere
//     already: in the image, where it can be read by it, or since before the rule.
//     One that a rule names itself is held by all its names;
//   - a file that a program may read, once that program gives it away;
//   - a listed program that was copied, where the origin of programs is "any";
//   - a connection or flow of datagrams that stood before the policy which has no
//     room for it: only its beginning is judged;
//   - an answer over TCP that lies in more than one packet, or a name with more
//     than 159 labels and records in its answer: nothing, or not all, is learnt;
//   - who decides where a listed name leads: whoever speaks for the name, and
//     whoever can pretend to be the name server on the sandbox's own link. No
//     name opens this machine or its link (127.0.0.0/8, 169.254.0.0/16, ::1,
//     fe80::/10); private ranges it can;
//   - sockets among the containers of one sandbox: they are peers like any other
//     by address, and free by loopback;
//   - what a container's root does to its own container short of the above:
//     policy is one for the whole sandbox.
package guard
