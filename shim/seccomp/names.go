package seccomp

import (
	"slices"
	"strings"
)

// call is a system call and its numbers; -1: that ABI has none.
type call struct {
	name     string
	amd, i86 int16
}

// find looks a call up.
func find(name string) (call, bool) {
	i, ok := slices.BinarySearchFunc(calls, name, func(c call, name string) int { return strings.Compare(c.name, name) })
	if !ok {
		return call{amd: -1, i86: -1}, false
	}
	return calls[i], true
}

// known says whether any machine of Linux has a call of this name.
func known(name string) bool {
	if _, ok := find(name); ok {
		return true
	}
	_, ok := slices.BinarySearch(foreign, name)
	return ok
}

// multiplexed are 32-bit calls that can be made by another: socketcall or ipc,
// with the number below as first argument.
var multiplexed = []struct {
	name, by string
	number   uint64
}{
	{"socket", "socketcall", 1}, {"bind", "socketcall", 2}, {"connect", "socketcall", 3}, {"listen", "socketcall", 4},
	{"accept", "socketcall", 5}, {"getsockname", "socketcall", 6}, {"getpeername", "socketcall", 7},
	{"socketpair", "socketcall", 8}, {"send", "socketcall", 9}, {"recv", "socketcall", 10}, {"sendto", "socketcall", 11},
	{"recvfrom", "socketcall", 12}, {"shutdown", "socketcall", 13}, {"setsockopt", "socketcall", 14},
	{"getsockopt", "socketcall", 15}, {"sendmsg", "socketcall", 16}, {"recvmsg", "socketcall", 17},
	{"accept4", "socketcall", 18}, {"recvmmsg", "socketcall", 19}, {"recvmmsg_time64", "socketcall", 19}, {"sendmmsg", "socketcall", 20},
	{"semop", "ipc", 1}, {"semget", "ipc", 2}, {"semctl", "ipc", 3}, {"semtimedop", "ipc", 4}, {"semtimedop_time64", "ipc", 4},
	{"msgsnd", "ipc", 11}, {"msgrcv", "ipc", 12}, {"msgget", "ipc", 13}, {"msgctl", "ipc", 14},
	{"shmat", "ipc", 21}, {"shmdt", "ipc", 22}, {"shmget", "ipc", 23}, {"shmctl", "ipc", 24},
}
