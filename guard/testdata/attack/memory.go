package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"
)

const (
	r = syscall.PROT_READ
	w = syscall.PROT_WRITE
	x = syscall.PROT_EXEC
)

var memoryAttacks = map[string]func([]string) error{
	"mapwritten":     func([]string) error { return mapFile("/tmp/lib", true, r|x, 0) },
	"protectwritten": func([]string) error { return mapFile("/tmp/lib", true, r, r|x) },
	"mapshm":         func([]string) error { return mapFile("/shm/lib", true, r|x, 0) },
	"mapzero":        func([]string) error { return mapFile("/dev/zero", false, r|x, 0) },
	"mapimage":       func([]string) error { return mapFile("/bin/tool", false, r|x, 0) },
	"protectimage":   func([]string) error { return mapFile("/bin/tool", false, r, r|x) },
	"rwximage":       func([]string) error { return mapFile("/bin/tool", false, r|w|x, 0) },
	"protectrwx":     func([]string) error { return mapFile("/bin/tool", false, r, r|w|x) },
	"mapother":       func(a []string) error { return mapFile(a[0], false, r|x, 0) },
	"maplisted":      func([]string) error { return mapFile("/bin/curl", false, r|x, 0) },
	"anonymous":      anonymous,
	"rwx":            rwx,
	"patch":          patch,
	"memfdmap":       memfdMap,
	"shmexec":        shmExec,
	"procmem":        procMem,
	"persona":        persona,
	"personaquery":   personaQuery,
}

func mapFile(path string, write bool, prot, then int) error {
	if write {
		if err := copySelf(path); err != nil {
			return err
		}
	}
	f, err := os.Open(path)
	if err != nil {
		return void(err)
	}
	defer f.Close()
	b, err := syscall.Mmap(int(f.Fd()), 0, 4096, prot, syscall.MAP_PRIVATE)
	if err != nil || then == 0 {
		return err
	}
	return syscall.Mprotect(b, then)
}

// anonymous writes memory first and makes it executable after.
func anonymous([]string) error {
	b, err := syscall.Mmap(-1, 0, 4096, r|w, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return void(err)
	}
	b[0] = 0xc3
	return syscall.Mprotect(b, r|x)
}

func rwx([]string) error {
	_, err := syscall.Mmap(-1, 0, 4096, r|w|x, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	return err
}

// patch writes into a private mapping of an image's file, then executes it.
func patch([]string) error {
	f, err := os.Open("/bin/tool")
	if err != nil {
		return void(err)
	}
	b, err := syscall.Mmap(int(f.Fd()), 0, 4096, r|w, syscall.MAP_PRIVATE)
	if err != nil {
		return void(err)
	}
	b[0] = 0xc3
	return syscall.Mprotect(b, r|x)
}

func memfdMap([]string) error {
	fd, err := newMemfd()
	if err != nil {
		return void(err)
	}
	if err := void(syscall.Ftruncate(fd, 4096)); err != nil {
		return err
	}
	_, err = syscall.Mmap(fd, 0, 4096, r|x, syscall.MAP_SHARED)
	return err
}

// shmExec attaches System V shared memory as executable.
func shmExec([]string) error {
	const ipcPrivate, ipcCreat, readOnly, executable = 0, 0o1000, 0o10000, 0o100000
	id, _, errno := syscall.Syscall(syscall.SYS_SHMGET, ipcPrivate, 4096, ipcCreat|0o700)
	if errno != 0 {
		return void(errno)
	}
	if _, _, errno = syscall.Syscall(syscall.SYS_SHMAT, id, 0, readOnly|executable); errno != 0 {
		return errno
	}
	return nil
}

//go:noinline
func victim() int { return 41 }

// procMem writes its own read-only code through /proc/self/mem.
func procMem([]string) error {
	f, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	code := **(**uintptr)(unsafe.Pointer(ptr(victim)))
	var b [1]byte
	if _, err := f.ReadAt(b[:], int64(code)); err != nil {
		return void(err)
	}
	_, err = f.WriteAt(b[:], int64(code))
	return err
}

func ptr(f func() int) *func() int { return &f }

// persona asks for every readable page to be executable and grows its heap.
func persona([]string) error {
	if os.Getenv("STAGE") == "" {
		cmd := exec.Command("/attack", "persona")
		cmd.Env = []string{"STAGE=1"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w %s", err, out)
		}
		return nil
	}
	runtime.LockOSThread()
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PERSONALITY, 0x0400000, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func personaQuery([]string) error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PERSONALITY, 0xffffffff, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PERSONALITY, 0x0040000, 0, 0); errno != 0 { // no randomisation
		return errno
	}
	return nil
}
