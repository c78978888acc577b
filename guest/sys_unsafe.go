package guest

import (
	"syscall"
	"unsafe"
)

// Numbers of amd64 and constants that package syscall lacks.
const (
	sysFinitModule     = 313
	sysMemfdCreate     = 319
	sysPidfdSendSignal = 424
	sysSetns           = 308

	cloneNewCgroup = 0x02000000

	pollIn  = 0x1
	pollPri = 0x2
	pollOut = 0x4
	pollErr = 0x8
	pollHup = 0x10

	rndAddEntropy = 0x40085203
	rndReseedCRNG = 0x5207

	tiocSctty  = 0x540e
	tiocSwinsz = 0x5414
	tiocSptlck = 0x40045431
	tiocGptn   = 0x80045430

	prSetPdeathsig   = 1
	prSetDumpable    = 4
	prCapbsetDrop    = 24
	prSetNoNewPrivs  = 38
	prCapAmbient     = 47
	prCapAmbientWipe = 4
	prSetSeccomp     = 22

	clockBoottime = 7
)

type pollFD struct {
	fd      int32
	events  int16
	revents int16
}

// poll waits until some of fds have something, or for millis; -1 is for ever.
// It gives how many have.
func poll(fds []pollFD, millis int) (int, error) {
	n, _, errno := syscall.Syscall(syscall.SYS_POLL, uintptr(unsafe.Pointer(unsafe.SliceData(fds))), uintptr(len(fds)), uintptr(millis))
	switch errno {
	case 0:
		return int(n), nil
	case syscall.EINTR:
		for i := range fds {
			fds[i].revents = 0
		}
		return 0, nil
	}
	return 0, errno
}

// loadModule gives the module in fd to the kernel.
func loadModule(fd int) error {
	var none [1]byte
	_, _, errno := syscall.Syscall(sysFinitModule, uintptr(fd), uintptr(unsafe.Pointer(&none)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func memfd(name string) (int, error) {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return -1, err
	}
	const closeOnExec = 1
	fd, _, errno := syscall.RawSyscall(sysMemfdCreate, uintptr(unsafe.Pointer(p)), closeOnExec, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// addEntropy credits the kernel's pool with b and reseeds its generator.
func addEntropy(fd int, b *[64]byte) error {
	req := struct {
		bits, size int32
		data       [64]byte
	}{int32(len(b) * 8), int32(len(b)), *b}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(fd), rndAddEntropy, uintptr(unsafe.Pointer(&req))); errno != 0 {
		return errno
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0); errno != 0 {
		return errno
	}
	return nil
}

func resizeTerminal(fd int, rows, cols uint16) error {
	size := [4]uint16{rows, cols}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(fd), tiocSwinsz, uintptr(unsafe.Pointer(&size))); errno != 0 {
		return errno
	}
	return nil
}

// unlockTerminal makes the other end of a pty master usable and numbers it.
func unlockTerminal(master int) (uint32, error) {
	var lock int32
	if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(master), tiocSptlck, uintptr(unsafe.Pointer(&lock))); errno != 0 {
		return 0, errno
	}
	var n uint32
	if _, _, errno := syscall.RawSyscall(syscall.SYS_IOCTL, uintptr(master), tiocGptn, uintptr(unsafe.Pointer(&n))); errno != 0 {
		return 0, errno
	}
	return n, nil
}

// setCaps makes the calling thread's permitted and effective capabilities the
// given ones, and the inheritable none.
func setCaps(caps uint64) error {
	const version3 = 0x20080522
	header := struct {
		version uint32
		pid     int32
	}{version: version3}
	type set struct{ effective, permitted, inheritable uint32 }
	lo, hi := uint32(caps), uint32(caps>>32)
	data := [2]set{{lo, lo, 0}, {hi, hi, 0}}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&data)), 0); errno != 0 {
		return errno
	}
	return nil
}

// setGroups sets the calling thread's groups; syscall.Setgroups would stop
// every other thread to do it for all.
func setGroups(groups []uint32) error {
	if _, _, errno := syscall.RawSyscall(syscall.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(unsafe.SliceData(groups))), 0); errno != 0 {
		return errno
	}
	return nil
}

// filterInsn is one instruction of classic BPF.
type filterInsn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

// setSeccomp puts the calling thread under a filter, for good.
func setSeccomp(filter []filterInsn) error {
	prog := struct {
		length uint16
		_      [6]byte
		insns  *filterInsn
	}{length: uint16(len(filter)), insns: unsafe.SliceData(filter)}
	const modeFilter = 2
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetSeccomp, modeFilter, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	return nil
}

// uptimeMicros is the time since the kernel started.
func uptimeMicros() uint64 {
	var ts syscall.Timespec
	if _, _, errno := syscall.RawSyscall(syscall.SYS_CLOCK_GETTIME, clockBoottime, uintptr(unsafe.Pointer(&ts)), 0); errno != 0 {
		return 0
	}
	return uint64(ts.Sec)*1e6 + uint64(ts.Nsec)/1e3
}

func prctl(option, arg uintptr) error {
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, option, arg, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func setns(fd int, kinds uintptr) error {
	if _, _, errno := syscall.RawSyscall(sysSetns, uintptr(fd), kinds, 0); errno != 0 {
		return errno
	}
	return nil
}

func pidfdSignal(fd int, signal uint8) error {
	if _, _, errno := syscall.RawSyscall6(sysPidfdSendSignal, uintptr(fd), uintptr(signal), 0, 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}
