package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"unsafe"
)

var callAttacks = map[string]func([]string) error{
	"setns":       setNS,
	"unshare":     func([]string) error { return locked(func() error { return syscall.Unshare(syscall.CLONE_NEWUTS) }) },
	"unsharenet":  func([]string) error { return locked(func() error { return syscall.Unshare(syscall.CLONE_NEWNET) }) },
	"clonens":     cloneNS,
	"chrootonly":  func([]string) error { return syscall.Chroot("/tmp") },
	"addkey":      addKey,
	"keyring":     func([]string) error { return call(250, 1, 0) }, // a session of its own
	"perfopen":    perfOpen,
	"userfault":   func([]string) error { return call(323, 0) },
	"settime":     setTime,
	"adjtime":     adjustTime,
	"swapon":      func([]string) error { return path("/etc/other", 167) },
	"swapoff":     func([]string) error { return path("/etc/other", 168) },
	"quota":       func([]string) error { return call(179, 0x800001<<8, 0, 0, 0) },
	"klog":        func([]string) error { return call(103, 10, 0, 0) },
	"klogread":    func([]string) error { b := make([]byte, 64); return call(103, 3, uintptr(unsafe.Pointer(&b[0])), 64) },
	"memfdcreate": func([]string) error { return path("x", 319) },
	"setuid":      func([]string) error { return call(syscall.SYS_SETUID, 1000) },
	"setresuid":   func([]string) error { return call(syscall.SYS_SETRESUID, 1000, 1000, 0) },
	"setgid":      func([]string) error { return call(syscall.SYS_SETGID, 1000) },
	"setgroups":   func([]string) error { return call(syscall.SYS_SETGROUPS, 0, 0) },
	"suid":        suid,
	"hostname":    func([]string) error { return syscall.Sethostname([]byte("other")) },
	"domainname":  func([]string) error { return syscall.Setdomainname([]byte("other")) },
	"nice":        func([]string) error { return syscall.Setpriority(syscall.PRIO_PROCESS, 0, 5) },
	"ioprio":      func([]string) error { return call(251, 1, 0, 3<<13) },
	"batch":       func([]string) error { var p [1]uint32; return call(144, 0, 3, uintptr(unsafe.Pointer(&p))) },
	"affinity":    affinity,
	"own":         func([]string) error { return os.Chown("/tmp/kept", 1000, 1000) },
	"sameids":     func([]string) error { return call(syscall.SYS_SETRESUID, ^uintptr(0), ^uintptr(0), ^uintptr(0)) },

	"unshare32":  func([]string) error { return call32(310, syscall.CLONE_NEWUTS, 0, 0) },
	"setns32":    setNS32,
	"hostname32": func([]string) error { return text32("other", 74) },
	"memfd32":    func([]string) error { return text32("x", 356) },
	"swapon32":   func([]string) error { return text32("/etc/other\x00", 87) },
	"stime32":    stime32,
	"module32":   func([]string) error { return text32("overlay\x00", 129) },
	"setuid32":   func([]string) error { return call32(213, 1000, 0, 0) },
	"chroot32":   func([]string) error { return text32("/tmp\x00", 61) },
}

func int80(nr, a, b, c uint32) int32

func call(nr uintptr, args ...uintptr) error {
	var a [6]uintptr
	copy(a[:], args)
	_, _, errno := syscall.RawSyscall6(nr, a[0], a[1], a[2], a[3], a[4], a[5])
	if errno != 0 {
		return errno
	}
	return nil
}

// path makes a call that gets as far as minding what the path leads to.
func path(p string, nr uintptr) error {
	b, _ := syscall.BytePtrFromString(p)
	err := call(nr, uintptr(unsafe.Pointer(b)), 0)
	if errno, ok := err.(syscall.Errno); ok && errno != syscall.ENOSPC && errno != syscall.ENOSYS {
		return reached(errno)
	}
	return err
}

func locked(f func() error) error {
	runtime.LockOSThread()
	return f()
}

// call32 enters the kernel as 32-bit programs do.
func call32(nr, a, b, c uint32) error {
	runtime.LockOSThread()
	if r := int80(nr, a, b, c); r < 0 {
		switch errno := syscall.Errno(-r); errno {
		case syscall.ENOSYS:
			return void(errno)
		case syscall.EPERM, syscall.EACCES, syscall.ENOSPC:
			return errno
		}
	}
	return nil
}

// text32 puts a text where 32-bit code can name it.
func text32(s string, nr uint32) error {
	const low = 0x40 // MAP_32BIT
	m, err := syscall.Mmap(-1, 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS|low)
	if err != nil {
		return void(err)
	}
	size := uint32(copy(m, s))
	if s[size-1] == 0 || nr == 356 {
		size = 0x800 // flags
	}
	if nr == 356 {
		size = 0
	}
	return call32(nr, uint32(uintptr(unsafe.Pointer(&m[0]))), size, 0)
}

func setNS([]string) error {
	runtime.LockOSThread()
	f, err := os.Open("/proc/self/ns/uts")
	if err != nil {
		return void(err)
	}
	return call(308, f.Fd(), 0)
}

func setNS32([]string) error {
	f, err := os.Open("/proc/self/ns/uts")
	if err != nil {
		return void(err)
	}
	return call32(346, uint32(f.Fd()), 0, 0)
}

// stime32 sets the clock by a call that only 32-bit code has.
func stime32([]string) error {
	var now syscall.Timeval
	if err := syscall.Gettimeofday(&now); err != nil {
		return void(err)
	}
	const low = 0x40
	m, err := syscall.Mmap(-1, 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANONYMOUS|low)
	if err != nil {
		return void(err)
	}
	*(*uint32)(unsafe.Pointer(&m[0])) = uint32(now.Sec)
	return call32(25, uint32(uintptr(unsafe.Pointer(&m[0]))), 0, 0)
}

func cloneNS([]string) error {
	cmd := exec.Command("/attack", "nothing")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUTS}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // it ran
	}
	return err
}

func addKey([]string) error {
	kind, _ := syscall.BytePtrFromString("user")
	name, _ := syscall.BytePtrFromString("x")
	const processKeyring = ^uintptr(1)
	return call(248, uintptr(unsafe.Pointer(kind)), uintptr(unsafe.Pointer(name)), uintptr(unsafe.Pointer(name)), 1, processKeyring)
}

func perfOpen([]string) error {
	var attr [128]byte
	attr[0], attr[4] = 1, 128 // of software
	return call(298, uintptr(unsafe.Pointer(&attr)), 0, ^uintptr(0), ^uintptr(0), 0)
}

func setTime([]string) error {
	var now syscall.Timespec
	if err := call(228, 0, uintptr(unsafe.Pointer(&now))); err != nil {
		return void(err)
	}
	return call(227, 0, uintptr(unsafe.Pointer(&now)))
}

func adjustTime([]string) error {
	t := syscall.Timex{Modes: 0x4000, Tick: 10000}
	_, err := syscall.Adjtimex(&t)
	return err
}

// suid runs a program that makes who runs it another user.
func suid([]string) error {
	if os.Getenv("SUID") != "" {
		if os.Geteuid() != 1000 {
			return void(errors.New("the program ran as " + strconv.Itoa(os.Geteuid())))
		}
		return nil
	}
	in, err := os.Open("/attack")
	if err != nil {
		return void(err)
	}
	out, err := os.Create("/tmp/suid")
	if err != nil {
		return void(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		return void(err)
	}
	out.Close()
	if err := errors.Join(os.Chown("/tmp/suid", 1000, 0), os.Chmod("/tmp/suid", 0o4755|os.ModeSetuid)); err != nil {
		return void(err)
	}
	cmd := exec.Command("/tmp/suid", "suid")
	cmd.Env = []string{"SUID=1"}
	return cmd.Run()
}

func affinity([]string) error {
	mask := [16]uint64{1}
	return call(203, 0, unsafe.Sizeof(mask), uintptr(unsafe.Pointer(&mask)))
}
