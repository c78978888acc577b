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
	sysSeccomp         = 317
	sysOpenTree        = 428
	sysMoveMount       = 429
	sysOpenat2         = 437
	sysMountSetattr    = 442
	sysPrlimit64       = 302
	sysSymlinkat       = 266
	sysLinkat          = 265
	sysReadlinkat      = 267
	sysUtimensat       = 280
	sysRenameat        = 264
	sysEventfd2        = 290
	sysPause           = 34

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

	prSetDumpable     = 4
	prSetKeepCaps     = 8
	prCapbsetDrop     = 24
	prSetNoNewPrivs   = 38
	prCapAmbient      = 47
	prCapAmbientRaise = 2
	prCapAmbientWipe  = 4

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

// setCaps sets the calling thread's capabilities.
func setCaps(effective, permitted, inheritable uint64) error {
	const version3 = 0x20080522
	header := struct {
		version uint32
		pid     int32
	}{version: version3}
	type set struct{ effective, permitted, inheritable uint32 }
	data := [2]set{
		{uint32(effective), uint32(permitted), uint32(inheritable)},
		{uint32(effective >> 32), uint32(permitted >> 32), uint32(inheritable >> 32)},
	}
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

// setSeccomp puts the calling thread under a filter, for good. A filter is
// instructions of eight bytes each.
func setSeccomp(filter []byte, flags uint32) error {
	prog := struct {
		length uint16
		_      [6]byte
		insns  *byte
	}{length: uint16(len(filter) / 8), insns: unsafe.SliceData(filter)}
	const modeFilter = 1
	if _, _, errno := syscall.RawSyscall(sysSeccomp, modeFilter, uintptr(flags), uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return errno
	}
	return nil
}

// execImage is what execve needs, made while memory may still be had.
type execImage struct {
	paths      []*byte // to try
	argv, envv []*byte // end with nil
}

func newExecImage(paths, args, env []string) (*execImage, error) {
	var x execImage
	for _, list := range []struct {
		from []string
		to   *[]*byte
	}{{paths, &x.paths}, {args, &x.argv}, {env, &x.envv}} {
		*list.to = make([]*byte, len(list.from), len(list.from)+1)
		for i, s := range list.from {
			b, err := syscall.BytePtrFromString(s)
			if err != nil {
				return nil, err
			}
			(*list.to)[i] = b
		}
	}
	x.argv, x.envv = append(x.argv, nil), append(x.envv, nil)
	return &x, nil
}

// exec replaces this process by the program at a path. It makes no other
// system call and takes no memory, for a filter or a limit may forbid both.
func (x *execImage) exec(i int) syscall.Errno {
	_, _, errno := syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(x.paths[i])),
		uintptr(unsafe.Pointer(unsafe.SliceData(x.argv))), uintptr(unsafe.Pointer(unsafe.SliceData(x.envv))))
	return errno
}

// setLimit sets a resource limit of this process.
func setLimit(kind uint8, soft, hard uint64) error {
	limit := [2]uint64{soft, hard}
	if _, _, errno := syscall.RawSyscall6(sysPrlimit64, 0, uintptr(kind), uintptr(unsafe.Pointer(&limit)), 0, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// ignoreSignals makes this process deaf to all that can be ignored. Of its
// children that end nothing remains then.
func ignoreSignals() {
	const ignore = 1
	action := struct{ handler, flags, restorer, mask uint64 }{handler: ignore}
	for signal := uintptr(1); signal <= 64; signal++ {
		_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, signal, uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
	}
}

func pause() { _, _, _ = syscall.RawSyscall(sysPause, 0, 0, 0) }

func eventFD() (int, error) {
	const nonBlocking, closeOnExec = syscall.O_NONBLOCK, syscall.O_CLOEXEC
	fd, _, errno := syscall.RawSyscall(sysEventfd2, 0, nonBlocking|closeOnExec, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// How openat2 resolves a path.
const (
	resolveNoMagicLinks = 0x02
	resolveNoSymlinks   = 0x04
	resolveBeneath      = 0x08
	resolveInRoot       = 0x10
)

// openat2 opens a path, resolved from dir as told.
func openat2(dir int, path string, flags int, mode uint32, resolve uint64) (int, error) {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	how := struct{ flags, mode, resolve uint64 }{uint64(flags | syscall.O_CLOEXEC), uint64(mode), resolve}
	for {
		fd, _, errno := syscall.Syscall6(sysOpenat2, uintptr(dir), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&how)), unsafe.Sizeof(how), 0, 0)
		switch errno {
		case 0:
			return int(fd), nil
		case syscall.EINTR, syscall.EAGAIN: // something was renamed on the way
		default:
			return -1, errno
		}
	}
}

const (
	atEmptyPath = 0x1000
	atRecursive = 0x8000
)

var emptyPath [1]byte

// openTree makes a copy of what is mounted at fd, not attached anywhere.
func openTree(fd int, recursive bool) (int, error) {
	const clone, closeOnExec = 1, syscall.O_CLOEXEC
	flags := uintptr(clone | closeOnExec | atEmptyPath)
	if recursive {
		flags |= atRecursive
	}
	tree, _, errno := syscall.Syscall(sysOpenTree, uintptr(fd), uintptr(unsafe.Pointer(&emptyPath)), flags)
	if errno != 0 {
		return -1, errno
	}
	return int(tree), nil
}

// moveMount attaches a tree at what the descriptor to is of.
func moveMount(tree, to int) error {
	const emptyPaths = 0x04 | 0x40
	empty := uintptr(unsafe.Pointer(&emptyPath))
	if _, _, errno := syscall.Syscall6(sysMoveMount, uintptr(tree), empty, uintptr(to), empty, emptyPaths, 0); errno != 0 {
		return errno
	}
	return nil
}

// setMount changes what is mounted at fd: attributes, propagation.
func setMount(fd int, set, clear, propagation uint64, recursive bool) error {
	attr := struct{ set, clear, propagation, userns uint64 }{set, clear, propagation, 0}
	flags := uintptr(atEmptyPath)
	if recursive {
		flags |= atRecursive
	}
	_, _, errno := syscall.Syscall6(sysMountSetattr, uintptr(fd), uintptr(unsafe.Pointer(&emptyPath)), flags, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func twoPaths(number uintptr, dir int, path string, other int, otherPath string, flags uintptr) error {
	p, err := syscall.BytePtrFromString(path)
	if err != nil {
		return err
	}
	q, err := syscall.BytePtrFromString(otherPath)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall6(number, uintptr(dir), uintptr(unsafe.Pointer(p)), uintptr(other), uintptr(unsafe.Pointer(q)), flags, 0); errno != 0 {
		return errno
	}
	return nil
}

func renameat(dir int, from, to string) error { return twoPaths(sysRenameat, dir, from, dir, to, 0) }

func linkat(from int, old string, dir int, name string) error {
	return twoPaths(sysLinkat, from, old, dir, name, 0)
}

func symlinkat(target string, dir int, name string) error {
	t, err := syscall.BytePtrFromString(target)
	if err != nil {
		return err
	}
	n, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall(sysSymlinkat, uintptr(unsafe.Pointer(t)), uintptr(dir), uintptr(unsafe.Pointer(n))); errno != 0 {
		return errno
	}
	return nil
}

// readlinkat reads where a link leads.
func readlinkat(dir int, name string, buf []byte) (int, error) {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	n, _, errno := syscall.Syscall6(sysReadlinkat, uintptr(dir), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(unsafe.SliceData(buf))), uintptr(len(buf)), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

const (
	atNoFollow  = 0x100 // AT_SYMLINK_NOFOLLOW
	atRemoveDir = 0x200
)

// fstatat stats a name in a directory, and no link's target.
func fstatat(dir int, name string, st *syscall.Stat_t) error {
	const sysNewfstatat = 262
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall6(sysNewfstatat, uintptr(dir), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(st)), atNoFollow, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

// unlinkat removes a name in a directory.
func unlinkat(dir int, name string, flags uintptr) error {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_UNLINKAT, uintptr(dir), uintptr(unsafe.Pointer(p)), flags); errno != 0 {
		return errno
	}
	return nil
}

// setTimes sets when a name in a directory was last read and changed.
func setTimes(dir int, name string, nanos int64) error {
	p, err := syscall.BytePtrFromString(name)
	if err != nil {
		return err
	}
	times := [2]syscall.Timespec{syscall.NsecToTimespec(nanos), syscall.NsecToTimespec(nanos)}
	if _, _, errno := syscall.Syscall6(sysUtimensat, uintptr(dir), uintptr(unsafe.Pointer(p)), uintptr(unsafe.Pointer(&times)), atNoFollow, 0, 0); errno != 0 {
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

func prctl(option, arg uintptr) error { return prctl2(option, arg, 0) }

func prctl2(option, arg, more uintptr) error {
	if _, _, errno := syscall.RawSyscall6(syscall.SYS_PRCTL, option, arg, more, 0, 0, 0); errno != 0 {
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
