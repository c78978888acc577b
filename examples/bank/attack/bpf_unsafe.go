package main

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Commands of bpf(2).
const (
	bpfMapCreate  = 0
	bpfProgLoad   = 5
	bpfProgNextID = 11
	bpfMapNextID  = 12
	bpfMapFdByID  = 14
	bpfLinkFdByID = 30
	bpfLinkNextID = 31
	bpfLinkDetach = 34
)

// bpf calls bpf(2) with the first words of its attributes.
func bpf(command int, words ...uint32) (int, error) {
	var attr [128]byte
	for i, w := range words {
		*(*uint32)(unsafe.Pointer(&attr[4*i])) = w
	}
	r, _, no := unix.Syscall(unix.SYS_BPF, uintptr(command), uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if no != 0 {
		return -1, no
	}
	// The NEXT_ID commands answer in the second word.
	if command == bpfProgNextID || command == bpfMapNextID || command == bpfLinkNextID {
		return int(*(*uint32)(unsafe.Pointer(&attr[4]))), nil
	}
	return int(r), nil
}

// bpfSteps lists programs, maps and links, opens the maps and takes off the
// links.
func bpfSteps() []Step {
	return []Step{
		step("list programs", func() error { _, err := bpf(bpfProgNextID, 0); return permitted(err) }),
		step("open a map", func() error {
			id, err := bpf(bpfMapNextID, 0)
			if err != nil {
				return permitted(err)
			}
			fd, err := bpf(bpfMapFdByID, uint32(id))
			if err == nil {
				unix.Close(fd)
			}
			return err
		}),
		step("take off a link", func() error {
			id, err := bpf(bpfLinkNextID, 0)
			if err != nil {
				return permitted(err)
			}
			fd, err := bpf(bpfLinkFdByID, uint32(id))
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			if os.Getenv("ATTACK_DETACH") == "no" {
				return nil // it could have
			}
			_, err = bpf(bpfLinkDetach, uint32(fd))
			return err
		}),
		step("make a map", func() error {
			fd, err := bpf(bpfMapCreate, 2, 4, 4, 1) // an array of one
			if err == nil {
				unix.Close(fd)
			}
			return err
		}),
	}
}

// tracePID1 takes hold of PID 1 as a debugger. The thread that does it ends at
// once, and with it the hold.
func tracePID1() Step {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		const seize = 0x4206
		_, _, no := unix.RawSyscall6(unix.SYS_PTRACE, seize, 1, 0, 0, 0, 0)
		if no != 0 {
			done <- no
			return
		}
		done <- nil
	}()
	return step("trace PID 1", func() error { return <-done })
}
