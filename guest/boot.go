package guest

import (
	"runtime"
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// Build names this agent in its hello; the linker sets it.
var Build = "unknown"

// Where things are in the guest. The agent's root is a bind of the initramfs
// over itself, for pivot_root refuses to leave the initramfs as such.
const (
	modulesDir = "/modules"
	bundlePath = "/guard.bundle"
	rootsDir   = "/run/roots"
	dirsDir    = "/run/dirs"
	sharesDir  = "/run/shares"
	bootIDPath = "/run/boot_id"
	cgroupDir  = "/sys/fs/cgroup"
	portName   = "agent.0"

	maxBundle = 16 << 20
)

// Main is the program: PID 1, or the setup stage that PID 1 starts.
func Main() {
	runtime.LockOSThread() // namespaces and capabilities belong to a thread
	switch stage, _ := syscall.Getenv(stageName); stage {
	case stageSetup, stageSpare, stageCopy:
		setupMain(stage == stageSpare)
		return
	case stageReap:
		reapMain()
		return
	}
	if syscall.Getpid() != 1 {
		warn("hauberk-guest: run as PID 1 of a sandbox, nowhere else")
		syscall.Exit(2)
	}
	warn("hauberk-guest: " + boot().Error())
	syscall.Exit(1) // the kernel panics, and the machine with it
}

// boot brings the guest up and serves. It returns only with an error: the end
// that the host asks for is the machine's.
func boot() error {
	runtime.GOMAXPROCS(2) // the loop's, and one for errands even on one processor
	if err := mountBasics(); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	a, err := newAgent()
	if err != nil {
		return err
	}
	if a.disks, err = listDisks(); err != nil {
		return err
	}
	a.guard, a.guardText = startGuard()
	lockDown()
	quietNetwork()
	if err := a.makeSpare(); err != nil {
		return err
	}
	if err := a.open(); err != nil {
		return err
	}
	return a.serve()
}

func warn(text string) { syscall.Write(2, []byte(text+"\n")) }

func mountBasics() error {
	for _, dir := range []string{"/self", "/proc", "/sys", "/dev", "/run", "/tmp"} {
		if err := syscall.Mkdir(dir, 0o755); err != nil && err != syscall.EEXIST {
			return fail("make directory", dir, err)
		}
	}
	if err := syscall.Mount("/", "/self", "", syscall.MS_BIND, ""); err != nil {
		return fail("bind", "/", err)
	}
	if err := syscall.Chdir("/self"); err != nil {
		return fail("enter", "/self", err)
	}
	if err := syscall.Mount(".", "/", "", syscall.MS_MOVE, ""); err != nil {
		return fail("move", "/self", err)
	}
	if err := syscall.Chroot("."); err != nil {
		return fail("change root to", "/self", err)
	}
	const closed = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
	for _, m := range []struct {
		kind, dir string
		flags     uintptr
		data      string
	}{
		{"proc", "/proc", closed, ""},
		{"sysfs", "/sys", closed, ""},
		{"devtmpfs", "/dev", syscall.MS_NOSUID | syscall.MS_NOEXEC, "mode=755"},
		{"cgroup2", cgroupDir, closed, ""},
		{"tmpfs", "/run", closed, "mode=755,size=1m"},
	} {
		if err := syscall.Mount(m.kind, m.dir, m.kind, m.flags, m.data); err != nil {
			return fail("mount", m.dir, err)
		}
	}
	for _, c := range []string{"+cpu", "+cpuset", "+memory", "+pids", "+io"} {
		_ = writeFile(cgroupDir+"/cgroup.subtree_control", c) // as far as the kernel has it
	}
	for _, dir := range []string{rootsDir, dirsDir, sharesDir} {
		if err := makeDirs(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// loadModules loads what /modules/order lists, one file a line, and frees the
// memory they lie in.
func loadModules() error {
	order, err := readAll(modulesDir+"/order", 64<<10)
	if err == syscall.ENOENT {
		return nil // everything is built in
	}
	if err != nil {
		return err
	}
	for len(order) > 0 {
		var line []byte
		line, order = nextLine(order)
		if len(line) == 0 {
			continue
		}
		path := modulesDir + "/" + string(line)
		fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		if err != nil {
			return fail("open", path, err)
		}
		err = loadModule(fd)
		syscall.Close(fd)
		if err != nil && err != syscall.EEXIST {
			return fail("load module", path, err)
		}
		_ = syscall.Unlink(path)
	}
	return nil
}

// startGuard attaches the Guard if the initramfs carries one.
func startGuard() (guestproto.GuardState, string) {
	bundle, err := mapFile(bundlePath, maxBundle)
	if err == syscall.ENOENT {
		return guestproto.GuardAbsent, ""
	}
	if err == nil {
		err = guardStart(bundle)
		_ = syscall.Munmap(bundle) // it is large, and never needed again
	}
	_ = syscall.Unlink(bundlePath)
	if err != nil {
		return guestproto.GuardFailed, err.Error()
	}
	return guestproto.GuardAttached, ""
}

// lockDown keeps even root of the guest from changing the running kernel, if
// the lockdown module is on the kernel's list.
func lockDown() {
	const dir = "/sys/kernel/security"
	if syscall.Mount("securityfs", dir, "securityfs", 0, "") != nil {
		return
	}
	_ = writeFile(dir+"/lockdown", "integrity")
	_ = syscall.Unmount(dir, 0)
}

// quietNetwork keeps interfaces that come later from speaking IPv6, which
// nothing outside would answer.
func quietNetwork() {
	_ = writeFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1")
}

// openPort finds the port by its name, for there is no udev. The host's side
// announces it a moment after the driver is loaded.
func openPort() (int, error) {
	const dir, tries = "/sys/class/virtio-ports", 2000
	var buf [64]byte
	for range tries {
		names, _ := listDir(dir)
		for _, n := range names {
			name, err := readFile(dir+"/"+n+"/name", buf[:])
			if err != nil || trim(name) != portName {
				continue
			}
			fd, err := syscall.Open("/dev/"+n, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
			if err != nil {
				return -1, fail("open", "/dev/"+n, err)
			}
			return fd, nil
		}
		if _, err := poll(nil, 5); err != nil {
			return -1, fail("wait for", portName, err)
		}
	}
	return -1, fail("find port", strconv.Quote(portName), syscall.ENODEV)
}

// open opens the port, and a way to learn that a host came to it.
func (a *agent) open() (err error) {
	if a.port, err = openPort(); err != nil {
		return err
	}
	if a.wake, err = syscall.EpollCreate1(syscall.EPOLL_CLOEXEC); err != nil {
		return fail("create", "epoll", err)
	}
	const edge = 1 << 31
	event := syscall.EpollEvent{Events: pollIn | pollOut | edge, Fd: int32(a.port)}
	if err := syscall.EpollCtl(a.wake, syscall.EPOLL_CTL_ADD, a.port, &event); err != nil {
		return fail("watch", "port "+portName, err)
	}
	return nil
}
