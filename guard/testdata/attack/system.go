package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
	"time"
	"unsafe"
)

var systemAttacks = map[string]func([]string) error{
	"bpfmap":     bpfMap,
	"bpfopen":    bpfOpen,
	"bpflist":    bpfList,
	"delmodule":  func([]string) error { return module(176, "overlay") },
	"newmodule":  newModule,
	"ptrace":     ptraceChild,
	"traceother": func(a []string) error { return traceOther(a[0]) },
	"traceme":    traceMe,
	"vmwrite":    vmWrite,
	"mount":      func([]string) error { return syscall.Mount("tmpfs", "/mnt", "tmpfs", 0, "") },
	"bind":       func(a []string) error { return bind(a[0]) },
	"umount":     func([]string) error { return syscall.Unmount("/shm", syscall.MNT_DETACH) },
	"remount":    func([]string) error { return syscall.Mount("", "/shm", "", syscall.MS_REMOUNT, "size=50m") },
	"mountnew":   func(a []string) error { return syscall.Mount(a[0], "/mnt", a[1], syscall.MS_RDONLY, "") },
	"mountover":  mountOver,
	"fsmount":    func(a []string) error { return fsmount(append(a, "tmpfs")[0]) },
	"pivot":      pivot,
	"mknod":      func([]string) error { return syscall.Mknod("/tmp/node", syscall.S_IFCHR|0o600, 1<<8|1) },
	"mknodreg":   func([]string) error { return syscall.Mknod("/tmp/regular", syscall.S_IFREG|0o600, 0) },
	"overwrite":  func(a []string) error { return overwrite(a[0]) },
	"beside":     func(a []string) error { return beside(a[0], a[1]) },
	"opennode":   func(a []string) error { return openNode(a[0], a[1], a[2]) },
	"open":       func(a []string) error { return openOnly(a[0]) },
	"iouring":    ioUring,
	"userns":     userNS,
	"utsns":      func([]string) error { return syscall.Unshare(syscall.CLONE_NEWUTS) },
	"killagent":  func([]string) error { return syscall.Kill(1, syscall.SIGUSR1) },
	"killown":    killOwn,
	"traceagent": traceAgent,
	"readagent":  func([]string) error { _, err := os.Readlink("/proc/1/exe"); return err },
	"limitagent": limitAgent,
	"niceagent":  func([]string) error { return syscall.Setpriority(syscall.PRIO_PROCESS, 1, 5) },
	"setting":    func([]string) error { return writeOld("/proc/sys/kernel/core_pattern", "core") },
	"sysfs":      func([]string) error { return writeOld("/sys/kernel/mm/transparent_hugepage/enabled", "never") },
	"ownproc":    func([]string) error { return writeOld("/proc/self/comm", "renamed") },
	"reboot":     rebootBad,
	"ioperm":     ioperm,
	"whiteout":   whiteout,
	"coredump":   coreDump,
	"denystorm":  denyStorm,
	"flood":      flood,
	"execs":      execs,
	"execstorm":  execStorm,
}

// bpf(2) with an attribute of 128 zero bytes but for what fill sets.
func bpf(cmd uintptr, fill func(attr []uint32)) (int, error) {
	var attr [32]uint32
	fill(attr[:])
	fd, _, errno := syscall.Syscall(321, cmd, uintptr(unsafe.Pointer(&attr)), 128)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func bpfMap([]string) error {
	_, err := bpf(0, func(a []uint32) { a[0], a[1], a[2], a[3] = 2, 4, 4, 1 }) // an array
	return err
}

// bpfList looks whether there are maps.
func bpfList([]string) error {
	_, err := bpf(12, func([]uint32) {})
	if errors.Is(err, syscall.ENOENT) {
		return nil
	}
	return err
}

// bpfOpen takes hold of any map by its number.
func bpfOpen([]string) error {
	for id := range uint32(64) {
		_, err := bpf(14, func(a []uint32) { a[0] = id })
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.ENOENT) {
			return err
		}
	}
	return nil // nothing refused it; there is no map
}

// reached is nil if the kernel got as far as minding something but the right.
func reached(errno syscall.Errno) error {
	if errno == syscall.EPERM || errno == syscall.EACCES {
		return errno
	}
	return nil
}

func module(nr uintptr, name string) error {
	b, _ := syscall.BytePtrFromString(name)
	const nonblock = syscall.O_NONBLOCK
	_, _, errno := syscall.Syscall(nr, uintptr(unsafe.Pointer(b)), nonblock, 0)
	return reached(errno)
}

func newModule([]string) error {
	f, err := os.Open("/bin/tool")
	if err != nil {
		return void(err)
	}
	var none [1]byte
	_, _, errno := syscall.Syscall(313, f.Fd(), uintptr(unsafe.Pointer(&none)), 0)
	return reached(errno)
}

func sleeper() (*exec.Cmd, error) { return sleeperOf("/attack") }

func sleeperOf(path string) (*exec.Cmd, error) {
	cmd := exec.Command(path, "killown")
	cmd.Env = []string{"WAIT=1"}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, void(err)
	}
	if err := cmd.Start(); err != nil {
		return nil, void(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		return nil, void(err)
	}
	return cmd, nil
}

// killOwn signals a process of its own, which it may.
func killOwn([]string) error {
	if os.Getenv("WAIT") != "" {
		fmt.Println("up")
		time.Sleep(time.Hour) // not select: that ends who waits for nothing
	}
	cmd, err := sleeper()
	if err != nil {
		return err
	}
	if err := cmd.Process.Kill(); err != nil {
		return err
	}
	cmd.Wait()
	return nil
}

func ptraceChild([]string) error {
	cmd, err := sleeper()
	if err != nil {
		return err
	}
	defer cmd.Process.Kill()
	runtime.LockOSThread()
	return syscall.PtraceAttach(cmd.Process.Pid)
}

// traceOther takes over a process of another program.
func traceOther(path string) error {
	cmd, err := sleeperOf(path)
	if err != nil {
		return err
	}
	defer cmd.Process.Kill()
	runtime.LockOSThread()
	return syscall.PtraceAttach(cmd.Process.Pid)
}

func traceMe([]string) error {
	_, _, errno := syscall.RawSyscall(syscall.SYS_PTRACE, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// traceAgent seizes PID 1 without stopping it.
func traceAgent([]string) error {
	runtime.LockOSThread()
	const seize = 0x4206
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PTRACE, seize, 1, 0, 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// vmWrite writes another's memory.
func vmWrite([]string) error {
	cmd, err := sleeper()
	if err != nil {
		return err
	}
	defer cmd.Process.Kill()
	var b [8]byte
	type iovec struct {
		base unsafe.Pointer
		size uint64
	}
	local := iovec{unsafe.Pointer(&b), 8}
	remote := struct{ base, size uint64 }{0x400000, 8}
	const processVMWritev = 311
	_, _, errno := syscall.Syscall6(processVMWritev, uintptr(cmd.Process.Pid), uintptr(unsafe.Pointer(&local)), 1, uintptr(unsafe.Pointer(&remote)), 1, 0)
	return reached(errno)
}

func bind(path string) error {
	if err := syscall.Mount(path, "/mnt", "", syscall.MS_BIND, ""); err != nil {
		return err
	}
	return write("/mnt/secret")
}

// fsmount makes a mount that is never put anywhere.
// mountOver mounts an overlay of its own on the image and runs what it adds.
func mountOver([]string) error {
	if err := syscall.Mount("tmpfs", "/opt", "tmpfs", 0, ""); err != nil {
		return void(err)
	}
	for _, d := range []string{"/opt/upper", "/opt/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return void(err)
		}
	}
	if err := syscall.Mount("overlay", "/mnt", "overlay", 0, "lowerdir=/bin,upperdir=/opt/upper,workdir=/opt/work"); err != nil {
		return void(err)
	}
	return drop([]string{"/mnt/x"})
}

func fsmount(system string) error {
	kind, _ := syscall.BytePtrFromString(system)
	fd, _, errno := syscall.Syscall(430, uintptr(unsafe.Pointer(kind)), 0, 0)
	if errno != 0 {
		return errno
	}
	const create = 6
	if _, _, errno = syscall.Syscall6(431, fd, create, 0, 0, 0, 0); errno != 0 {
		return errno
	}
	if _, _, errno = syscall.Syscall(432, fd, 0, 0); errno != 0 {
		return errno
	}
	return nil
}

func pivot([]string) error {
	err := syscall.PivotRoot("/shm", "/shm")
	if errno, ok := err.(syscall.Errno); ok {
		return reached(errno)
	}
	return err
}

// overwrite changes the first byte of a disk.
func overwrite(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString("x"); err != nil {
		return err
	}
	return f.Sync()
}

// beside makes a node of the device whose minor number is so much above that of
// another's node, and opens it.
func beside(path, step string) error {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return void(err)
	}
	n, err := strconv.Atoi(step)
	if err != nil {
		return void(err)
	}
	return openNew(st.Mode&syscall.S_IFMT, int(st.Rdev)+n)
}

func openNode(kind, major, minor string) error {
	m, err := strconv.Atoi(major)
	n, err2 := strconv.Atoi(minor)
	if err := errors.Join(err, err2); err != nil {
		return void(err)
	}
	if kind == "b" {
		return openNew(syscall.S_IFBLK, m<<8|n)
	}
	return openNew(syscall.S_IFCHR, m<<8|n)
}

// openNew opens a new node. That nothing stands behind it is no refusal.
func openNew(kind uint32, device int) error {
	node := fmt.Sprintf("/dev/%d-%d", kind, device)
	if err := syscall.Mknod(node, kind|0o600, device); err != nil && !errors.Is(err, syscall.EEXIST) {
		return void(err)
	}
	err := openOnly(node)
	if errors.Is(err, syscall.ENXIO) || errors.Is(err, syscall.ENODEV) {
		return nil
	}
	return err
}

func openOnly(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NONBLOCK, 0)
	if errors.Is(err, syscall.EROFS) || errors.Is(err, syscall.EACCES) {
		f, err = os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

func userNS([]string) error {
	cmd := exec.Command("/attack", "nothing")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER}
	return cmd.Run()
}

func ioUring([]string) error {
	var params [120]byte
	_, _, errno := syscall.Syscall(425, 4, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func limitAgent([]string) error {
	limit := syscall.Rlimit{Cur: 1000, Max: 1000}
	_, _, errno := syscall.RawSyscall6(syscall.SYS_PRLIMIT64, 1, 0, uintptr(unsafe.Pointer(&limit)), 0, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func writeOld(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

// rebootBad asks for a reboot with a wrong number, after the right to it.
func rebootBad([]string) error {
	_, _, errno := syscall.Syscall(syscall.SYS_REBOOT, 0, 0, 0)
	return reached(errno)
}

func ioperm([]string) error {
	_, _, errno := syscall.RawSyscall(syscall.SYS_IOPERM, 0x80, 1, 1)
	return reached(errno)
}

// whiteout removes a file of the image, for which the overlay makes a device
// node of its own.
func whiteout([]string) error {
	if err := os.Remove("/opt/gone"); err != nil {
		return err
	}
	return nil
}

// coreDump has the kernel start a program for it. A regular core is no proof,
// so this only checks that the dying process dies of what it should.
func coreDump([]string) error {
	cmd := exec.Command("/attack", "killown")
	cmd.Env = []string{"WAIT=1"}
	if err := cmd.Start(); err != nil {
		return void(err)
	}
	cmd.Process.Signal(syscall.SIGSEGV)
	cmd.Wait()
	return nil
}

// denyStorm opens what it may not as often as it is told.
func denyStorm(a []string) error {
	n, err := strconv.Atoi(a[0])
	if err != nil {
		return void(err)
	}
	for range n {
		if err = openOnly("/dev/disk"); err == nil {
			return nil
		}
	}
	return err
}

// flood makes, so many times, one of so many files where none may be made. It
// is refused if each time was.
func flood(a []string) error {
	times, err := strconv.Atoi(a[1])
	if err != nil {
		return void(err)
	}
	names, err := strconv.Atoi(a[2])
	if err != nil {
		return void(err)
	}
	for i := range times {
		fd, err := syscall.Open(a[0]+"/flood"+strconv.Itoa(i%names), syscall.O_CREAT|syscall.O_WRONLY, 0o600)
		if err == nil {
			syscall.Close(fd)
			return nil
		}
		if err != syscall.EPERM {
			return void(err)
		}
	}
	return fmt.Errorf("%d times", times)
}

// execs runs the smallest of programs so many times.
func execs(a []string) error {
	times, err := strconv.Atoi(a[0])
	if err != nil {
		return void(err)
	}
	for range times {
		pid, err := syscall.ForkExec("/bin/nop", []string{"nop"}, nil)
		if err != nil {
			return err
		}
		var status syscall.WaitStatus
		for {
			if _, err = syscall.Wait4(pid, &status, 0, nil); err != syscall.EINTR {
				break
			}
		}
		if err != nil || status != 0 {
			return void(fmt.Errorf("program %d ended with %d: %w", pid, status, err))
		}
	}
	return nil
}

// execStorm becomes a program that it wrote, or tries to, so many times.
func execStorm(a []string) error {
	times, err := strconv.Atoi(a[0])
	if err != nil {
		return void(err)
	}
	nop, err := os.ReadFile("/bin/nop")
	if err != nil {
		return void(err)
	}
	if err := os.WriteFile("/tmp/nop", nop, 0o755); err != nil {
		return void(err)
	}
	for range times {
		if err := syscall.Exec("/tmp/nop", []string{"nop"}, nil); err != syscall.EPERM {
			return void(err)
		}
	}
	return fmt.Errorf("%d times", times)
}
