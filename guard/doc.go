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
//   - an interpreter of the image that is handed code to interpret: sh script,
//     sh -c, python file. Only its libraries and a script run by its own name
//     must come from the image;
//   - a shell whose socket is relayed through a pipe or terminal by a program
//     of the image;
//   - a file that was open for writing before the rule that protects it came;
//   - what is in a volume, or in another file system mounted by the agent below a
//     protected directory: rules for files are about the root file system;
//   - a file that a directory's rule keeps from being read, and that has another
//     name elsewhere already, in the image or since before the rule;
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
