package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"unsafe"
)

// costs prints how often each eBPF program ran, and how long in all. The kernel
// counts while kernel.bpf_stats_enabled is set.
func costs() error {
	const next, open, info = 11, 13, 15
	for id := uint32(0); ; {
		attr := [2]uint32{id}
		err := bpf(next, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
		if errors.Is(err, syscall.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find program after %d: %w", id, err)
		}
		id = attr[1]
		fd, _, errno := syscall.Syscall(321, open, uintptr(unsafe.Pointer(&[3]uint32{id})), 12)
		if errno != 0 {
			return fmt.Errorf("open program %d: %w", id, errno)
		}
		var facts [208]byte // struct bpf_prog_info up to run_cnt
		about := struct {
			fd, size uint32
			info     unsafe.Pointer
		}{uint32(fd), uint32(len(facts)), unsafe.Pointer(&facts)}
		err = bpf(info, unsafe.Pointer(&about), unsafe.Sizeof(about))
		syscall.Close(int(fd))
		if err != nil {
			return fmt.Errorf("ask about program %d: %w", id, err)
		}
		le := binary.LittleEndian
		fmt.Println("COST", string(bytes.TrimRight(facts[64:80], "\x00")), le.Uint64(facts[200:]), le.Uint64(facts[192:]))
	}
}

func bpf(cmd uintptr, attr unsafe.Pointer, size uintptr) error {
	if _, _, errno := syscall.Syscall(321, cmd, uintptr(attr), size); errno != 0 {
		return errno
	}
	return nil
}
