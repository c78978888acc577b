package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// rootPath is where a root file system is mounted.
func rootPath(n uint8) string { return rootsDir + "/" + strconv.Itoa(int(n)) + "/root" }

// mountRoot mounts an image with an overlay over it and tells the Guard.
func (a *agent) mountRoot(payload []byte) error {
	m, err := guestproto.ParseMountRoot(payload)
	if err != nil {
		return err
	}
	if a.roots[m.Root] {
		return fail("mount root", strconv.Itoa(int(m.Root)), syscall.EEXIST)
	}
	if m.UpperSerial != "" {
		return fail("mount root", strconv.Itoa(int(m.Root))+": upper layer on a disk", syscall.ENOSYS)
	}
	device, err := a.findDisk(m.Serial)
	if err != nil {
		return err
	}
	reply, err := mountOverlay(device, m.Root, m.UpperBytes)
	if err != nil {
		unmountRoot(m.Root)
		return err
	}
	if err := guardRoot(rootPath(m.Root), reply.Overlay, reply.Lower); err != nil {
		unmountRoot(m.Root)
		return fail("guard root", strconv.Itoa(int(m.Root)), err)
	}
	a.roots[m.Root] = true
	a.tx = reply.Append(a.tx)
	return nil
}

// mountOverlay mounts the image, a tmpfs for what is written, and both as one.
func mountOverlay(device string, root uint8, upperBytes uint64) (m guestproto.MountedRoot, err error) {
	base := rootsDir + "/" + strconv.Itoa(int(root))
	image, upper, merged := base+"/image", base+"/upper", rootPath(root)
	for _, dir := range []string{image, upper, merged} {
		if err := makeDirs(dir, 0o755); err != nil {
			return m, err
		}
	}
	if err := syscall.Mount(device, image, "erofs", syscall.MS_RDONLY|syscall.MS_NODEV|syscall.MS_NOSUID, ""); err != nil {
		return m, fail("mount erofs", device, err)
	}
	data := "mode=755"
	if upperBytes > 0 {
		data += ",size=" + strconv.FormatUint(upperBytes, 10)
	}
	if err := syscall.Mount("tmpfs", upper, "tmpfs", syscall.MS_NODEV|syscall.MS_NOSUID, data); err != nil {
		return m, fail("mount tmpfs", upper, err)
	}
	for _, dir := range []string{upper + "/data", upper + "/work"} {
		if err := syscall.Mkdir(dir, 0o755); err != nil {
			return m, fail("make directory", dir, err)
		}
	}
	data = "lowerdir=" + image + ",upperdir=" + upper + "/data,workdir=" + upper + "/work"
	if err := syscall.Mount("overlay", merged, "overlay", syscall.MS_NODEV, data); err != nil {
		return m, fail("mount overlay", merged, err)
	}
	if m.Overlay, err = kernelDevice(merged); err != nil {
		return m, err
	}
	m.Lower, err = kernelDevice(image)
	return m, err
}

// kernelDevice gives the device number of a file system as the kernel holds
// it, not as stat spells it.
func kernelDevice(path string) (uint32, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return 0, fail("stat", path, err)
	}
	major := uint32(st.Dev>>8) & 0xfff
	minor := uint32(st.Dev&0xff) | uint32(st.Dev>>12)&0xfff00
	return major<<20 | minor, nil
}

// unmountRoot undoes what mountOverlay got done.
func unmountRoot(root uint8) {
	base := rootsDir + "/" + strconv.Itoa(int(root))
	for _, dir := range []string{"/root", "/upper", "/image"} {
		_ = syscall.Unmount(base+dir, syscall.MNT_DETACH)
	}
}

// mount is one of a container's own.
type mount struct {
	kind, dir string
	flags     uintptr
	data      string
}

// enterRoot makes path the root of this process' mount namespace and fills in
// what every container has. Nothing of the agent's root stays reachable.
func enterRoot(path string) error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fail("detach", "mounts", err)
	}
	const asPath = 0x200000 // O_PATH
	old, err := syscall.Open("/", asPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", "/", err)
	}
	defer syscall.Close(old)
	if err := syscall.Chdir(path); err != nil {
		return fail("enter", path, err)
	}
	if err := syscall.PivotRoot(".", "."); err != nil {
		return fail("pivot to", path, err)
	}
	// From here on absolute paths are the container's. The image's symlinks
	// may lead anywhere in it, and nowhere else.
	if err := mountOwn(); err != nil {
		return err
	}
	if err := fillDev(); err != nil {
		return err
	}
	if err := hide(old); err != nil {
		return err
	}
	if err := syscall.Fchdir(old); err != nil {
		return fail("enter", "old root", err)
	}
	if err := syscall.Unmount(".", syscall.MNT_DETACH); err != nil {
		return fail("unmount", "old root", err)
	}
	return syscall.Chdir("/")
}

func mountOwn() error {
	const closed = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
	for _, m := range []mount{
		{"proc", "/proc", closed, ""},
		{"sysfs", "/sys", closed | syscall.MS_RDONLY, ""},
		{"cgroup2", "/sys/fs/cgroup", closed | syscall.MS_RDONLY, ""},
		{"tmpfs", "/dev", syscall.MS_NOSUID | syscall.MS_NOEXEC, "mode=755,size=64k"},
		{"devpts", "/dev/pts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"tmpfs", "/dev/shm", closed, "mode=1777,size=64m"},
		{"mqueue", "/dev/mqueue", closed, ""},
	} {
		if err := syscall.Mkdir(m.dir, 0o755); err != nil && err != syscall.EEXIST && err != syscall.EPERM && err != syscall.EROFS {
			return fail("make directory", m.dir, err)
		}
		var st syscall.Stat_t
		if err := syscall.Lstat(m.dir, &st); err != nil {
			return fail("mount "+m.kind+" at", m.dir, err)
		}
		if st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
			return fail("mount "+m.kind+" at", m.dir, syscall.ENOTDIR) // a symlink, say
		}
		if err := syscall.Mount(m.kind, m.dir, m.kind, m.flags, m.data); err != nil {
			return fail("mount "+m.kind+" at", m.dir, err)
		}
	}
	return nil
}

// fillDev makes the few devices a container may use.
func fillDev() error {
	for _, d := range []struct {
		path         string
		major, minor int
	}{
		{"/dev/null", 1, 3}, {"/dev/zero", 1, 5}, {"/dev/full", 1, 7},
		{"/dev/random", 1, 8}, {"/dev/urandom", 1, 9}, {"/dev/tty", 5, 0},
	} {
		if err := syscall.Mknod(d.path, syscall.S_IFCHR|0o666, d.major<<8|d.minor); err != nil {
			return fail("make device", d.path, err)
		}
	}
	for _, l := range [][2]string{
		{"pts/ptmx", "/dev/ptmx"}, {"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"},
	} {
		if err := syscall.Symlink(l[0], l[1]); err != nil {
			return fail("link", l[1], err)
		}
	}
	return nil
}

// hide covers what a container must not read and write-protects what it must
// not change. It puts the clone's own boot id, which lies in the agent's root,
// over the template's.
func hide(oldRoot int) error {
	const closed = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC
	for _, path := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if err := syscall.Mount(path, path, "", syscall.MS_BIND|syscall.MS_REC, ""); err == syscall.ENOENT {
			continue
		} else if err != nil {
			return fail("bind", path, err)
		}
		if err := syscall.Mount("", path, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY|closed, ""); err != nil {
			return fail("write-protect", path, err)
		}
	}
	for _, path := range []string{
		"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/proc/kallsyms", "/proc/modules", "/proc/kmsg",
		"/sys/firmware", "/sys/devices/virtual/powercap", "/sys/class/virtio-ports",
	} {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil {
			continue
		}
		var err error
		if st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
			err = syscall.Mount("tmpfs", path, "tmpfs", closed|syscall.MS_RDONLY, "size=0")
		} else {
			err = syscall.Mount("/dev/null", path, "", syscall.MS_BIND, "")
		}
		if err != nil {
			return fail("hide", path, err)
		}
	}
	if err := syscall.Fchdir(oldRoot); err != nil {
		return fail("enter", "old root", err)
	}
	err := syscall.Mount(bootIDPath[1:], "/proc/sys/kernel/random/boot_id", "", syscall.MS_BIND, "")
	if err != nil && err != syscall.ENOENT { // none was given
		return fail("bind", "boot_id", err)
	}
	return nil
}
