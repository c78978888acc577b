package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

const closed = syscall.MS_NOSUID | syscall.MS_NODEV | syscall.MS_NOEXEC

// What a container has if it is not told what to mount.
var (
	ownMounts = []guestproto.Mount{
		{Target: "/proc", FS: "proc", Flags: closed},
		{Target: "/sys", FS: "sysfs", Flags: closed | syscall.MS_RDONLY},
		{Target: "/sys/fs/cgroup", FS: "cgroup2", Flags: closed | syscall.MS_RDONLY},
		{Target: "/dev", FS: "tmpfs", Flags: syscall.MS_NOSUID | syscall.MS_NOEXEC, Data: "mode=755,size=64k"},
		{Target: "/dev/pts", FS: "devpts", Flags: syscall.MS_NOSUID | syscall.MS_NOEXEC, Data: "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{Target: "/dev/shm", FS: "tmpfs", Flags: closed, Data: "mode=1777,size=64m"},
		{Target: "/dev/mqueue", FS: "mqueue", Flags: closed},
	}
	ownReadOnly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
	ownMasked   = []string{
		"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/proc/kallsyms", "/proc/modules", "/proc/kmsg",
		"/sys/firmware", "/sys/devices/virtual/powercap", "/sys/class/virtio-ports",
	}
)

// kernelFS are the file systems of the kernel that a container may mount: the
// rest shows what is the agent's or the Guard's.
var kernelFS = [...]string{"proc", "sysfs", "cgroup2", "tmpfs", "devpts", "mqueue", "hugetlbfs", "ramfs"}

// container is one being made by its setup stage.
type container struct {
	*guestproto.Create
	in    inside
	old   int   // the agent's root
	trees []int // of mounts, what comes from outside the container; else -1
}

// makeContainer makes the container that this process is the first of.
func makeContainer(m *guestproto.Create, machineID string) error {
	// A mount namespace takes this thread's root and working directory out of
	// those the runtime's threads share.
	if err := syscall.Unshare(syscall.CLONE_NEWNS | cloneNewCgroup); err != nil {
		return fail("make", "namespaces", err)
	}
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fail("detach", "mounts", err)
	}
	if len(m.Mounts) == 0 {
		m.Mounts, m.Masked, m.ReadOnly = ownMounts, ownMasked, ownReadOnly
	}
	c := container{Create: m}
	steps := [...]func() error{
		c.checkPaths, c.takeSources, c.pivot, c.mountAll, c.sayMounts, c.fillDev, c.makeDevices, c.name, c.setSysctls,
		func() error { return c.writeFiles(machineID) }, c.bindBootID, c.protect, c.mask, c.sayPlaces, c.finishRoot,
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// checkPaths cleans every path of the container, or refuses it.
func (c *container) checkPaths() error {
	check := func(what string, path *string) (err error) {
		clean, ok := absolute(*path)
		if !ok {
			return fail(what, strconv.Quote(*path), syscall.EINVAL)
		}
		*path = clean
		return nil
	}
	for i := range c.Mounts {
		if err := check("mount at", &c.Mounts[i].Target); err != nil {
			return err
		}
	}
	for i := range c.Devices {
		if err := check("make device", &c.Devices[i].Path); err != nil {
			return err
		}
	}
	for i := range c.Files {
		f := &c.Files[i]
		if err := check("write file", &f.Path); err != nil {
			return err
		}
		if f.Path == "/" || f.Mode&^0o777 != 0 {
			return fail("write file", strconv.Quote(f.Path), syscall.EINVAL)
		}
	}
	for _, list := range [][]string{c.Masked, c.ReadOnly} {
		for i := range list {
			if err := check("hide", &list[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

// pivot makes the container's root that of this process. The agent's stays
// open until finishRoot.
func (c *container) pivot() (err error) {
	path := rootPath(c.Root)
	if c.old, err = syscall.Open("/", asPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0); err != nil {
		return fail("open", "/", err)
	}
	if err := syscall.Chdir(path); err != nil {
		return fail("enter", path, err)
	}
	if err := syscall.PivotRoot(".", "."); err != nil {
		return fail("pivot to", path, err)
	}
	// From here on absolute paths are the container's.
	c.in, err = openInside()
	return err
}

// fillDev makes the few devices that every container may use, if /dev was
// mounted for it.
func (c *container) fillDev() error {
	ours := false
	for i := range c.Mounts {
		m := &c.Mounts[i]
		ours = ours || m.Target == "/dev" && m.Kind == guestproto.MountFS && m.FS == "tmpfs"
	}
	if !ours {
		return nil
	}
	dev, err := c.in.dir("/dev", 0o755)
	if err != nil {
		return err
	}
	defer syscall.Close(dev)
	for _, d := range [...]struct {
		name         string
		major, minor int
	}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}} {
		if err := syscall.Mknodat(dev, d.name, syscall.S_IFCHR|0o666, d.major<<8|d.minor); err != nil {
			return fail("make device", d.name, err)
		}
	}
	for _, l := range [...][2]string{
		{"pts/ptmx", "ptmx"}, {"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"},
		{"/proc/self/fd/1", "stdout"}, {"/proc/self/fd/2", "stderr"},
	} {
		if err := symlinkat(l[0], dev, l[1]); err != nil && err != syscall.EEXIST {
			return fail("link", l[1], err)
		}
	}
	return nil
}

// usable are the devices, by number, that a container may be given: those that
// are no way to the guest's disks, ports or memory.
var usable = [...][2]uint32{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {10, 200}, {10, 229}}

// makeDevices makes the devices the container was given besides.
func (c *container) makeDevices() error {
	for i := range c.Devices {
		if err := c.makeDevice(&c.Devices[i]); err != nil {
			return fail("make device", strconv.Quote(c.Devices[i].Path), err)
		}
	}
	return nil
}

const (
	magicFUSE = 0x65735546 // of a share, too
	mayNoDev  = 0x4        // in the flags of a file system
)

func (c *container) makeDevice(d *guestproto.Device) error {
	kind, err := kindOf(d)
	if err != nil {
		return err
	}
	dir, err := c.in.dir(parent(d.Path), 0o755)
	if err != nil {
		return err
	}
	defer syscall.Close(dir)
	var fs syscall.Statfs_t
	if err := syscall.Fstatfs(dir, &fs); err != nil {
		return err
	}
	switch {
	case kind == syscall.S_IFIFO && fs.Type == magicFUSE:
		return syscall.EXDEV // what has the name there is the host's
	case kind != syscall.S_IFIFO && fs.Flags&mayNoDev != 0:
		return c.showDevice(d, kind)
	}
	name := lastName(d.Path)
	if err := unlinkat(dir, name, 0); err != nil && err != syscall.ENOENT {
		return err
	}
	return c.makeNode(dir, name, kind, d)
}

// kindOf is the kind of node that a device is, if a container may have it.
func kindOf(d *guestproto.Device) (uint32, error) {
	switch {
	case d.Serial != "":
		return syscall.S_IFBLK, nil
	case d.Kind == 'p':
		return syscall.S_IFIFO, nil
	case d.Kind == 'c':
		for _, n := range usable {
			if n == [2]uint32{d.Major, d.Minor} {
				return syscall.S_IFCHR, nil
			}
		}
	}
	return 0, syscall.EPERM // a disk is named by its serial
}

// makeNode makes a node, and tells PID 1 which device the container is to open.
func (c *container) makeNode(dir int, name string, kind uint32, d *guestproto.Device) error {
	number := 0
	if kind != syscall.S_IFIFO {
		number = int(d.Major<<8 | d.Minor&0xff | d.Minor&^0xff<<12)
		if _, err := syscall.Write(setupSocket, giveWord(kind, d.Major, d.Minor)); err != nil {
			return err
		}
	}
	if err := syscall.Mknodat(dir, name, kind|d.Mode&0o777, number); err != nil {
		return err
	}
	return syscall.Fchownat(dir, name, int(d.UID), int(d.GID), atNoFollow)
}

// showDevice puts a device where no node could be opened, such as in a root: the
// node lies in a file system of its own, and its path shows it.
func (c *container) showDevice(d *guestproto.Device, kind uint32) error {
	const side = "tmp" // of the agent's root, which this process is about to leave
	if err := syscall.Fchdir(c.old); err != nil {
		return err
	}
	if err := syscall.Mount("tmpfs", side, "tmpfs", syscall.MS_NOSUID|syscall.MS_NOEXEC, "mode=700,nr_inodes=8"); err != nil {
		return err
	}
	defer syscall.Unmount(side, syscall.MNT_DETACH)
	dir, err := syscall.Openat(c.old, side, asPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(dir)
	if err := c.makeNode(dir, "node", kind, d); err != nil {
		return err
	}
	node, err := syscall.Openat(dir, "node", asPath|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(node)
	tree, err := openTree(node, false)
	if err != nil {
		return err
	}
	defer syscall.Close(tree)
	to, err := c.in.target(d.Path, false)
	if err != nil {
		return err
	}
	defer syscall.Close(to)
	return moveMount(tree, to)
}

// name names the guest as this container wants it: the UTS namespace is that
// of all of them.
func (c *container) name() error {
	if c.Hostname != "" {
		if err := syscall.Sethostname([]byte(c.Hostname)); err != nil {
			return fail("set hostname", strconv.Quote(c.Hostname), err)
		}
	}
	if c.Domainname != "" {
		if err := syscall.Setdomainname([]byte(c.Domainname)); err != nil {
			return fail("set domain name", strconv.Quote(c.Domainname), err)
		}
	}
	return nil
}

// setSysctls sets those that belong to a namespace which the containers of this
// guest share. The others are the kernel's own.
func (c *container) setSysctls() error {
	for _, s := range c.Sysctls {
		path, ok := sysctlPath(s.Name)
		if !ok {
			return fail("set sysctl", strconv.Quote(s.Name), syscall.EPERM)
		}
		fd, err := openat2(c.old, path, syscall.O_WRONLY, 0, resolveInRoot|resolveNoSymlinks)
		if err == nil {
			_, err = syscall.Write(fd, []byte(s.Value))
			_ = syscall.Close(fd)
		}
		if err != nil {
			return fail("set sysctl", strconv.Quote(s.Name)+" to "+strconv.Quote(s.Value), err)
		}
	}
	return nil
}

// sysctlPath is where a sysctl lies in the agent's root. Its name is written
// with dots or, for names that hold some, with slashes.
func sysctlPath(name string) (string, bool) {
	const dir = "proc/sys"
	slashes := false
	for i := range len(name) {
		slashes = slashes || name[i] == '/'
	}
	path := []byte("/" + name)
	for i := range path {
		if path[i] == '.' && !slashes {
			path[i] = '/'
		}
	}
	clean, ok := absolute(string(path))
	if !ok || clean != string(path) {
		return "", false
	}
	for _, prefix := range [...]string{
		"/net/", "/fs/mqueue/", "/kernel/shm", "/kernel/msg", "/kernel/sem", "/kernel/domainname", "/kernel/hostname",
	} {
		if len(clean) >= len(prefix) && clean[:len(prefix)] == prefix {
			return dir + clean, true
		}
	}
	return "", false
}

func (c *container) writeFiles(machineID string) error {
	if machineID != "" {
		if err := c.in.replaceFile("/etc/machine-id", []byte(machineID+"\n"), 0o444); err != nil {
			return err
		}
	}
	for _, f := range c.Files {
		if err := c.in.replaceFile(f.Path, f.Data, f.Mode); err != nil {
			return err
		}
	}
	return nil
}

// finishRoot makes the root as it was asked for and lets go of the agent's.
func (c *container) finishRoot() error {
	top, err := c.in.open("/", asPath|syscall.O_DIRECTORY)
	if err != nil {
		return fail("open", "root", err)
	}
	defer syscall.Close(top)
	var set uint64
	if c.ReadOnlyRoot {
		set = attrReadOnly
	}
	propagation, recursive := propagationOf(c.RootPropagation)
	if err := setMount(top, set, 0, propagation, false); err != nil {
		return fail("set up", "root", err)
	}
	if recursive {
		if err := setMount(top, 0, 0, propagation, true); err != nil {
			return fail("propagate", "root", err)
		}
	}
	if err := syscall.Fchdir(c.old); err != nil {
		return fail("enter", "old root", err)
	}
	if err := syscall.Unmount(".", syscall.MNT_DETACH); err != nil {
		return fail("unmount", "old root", err)
	}
	closeFD(&c.old)
	c.in.close()
	return syscall.Chdir("/")
}
