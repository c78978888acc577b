package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// Attributes of a mount, as mount_setattr has them.
const (
	attrReadOnly    = 0x1
	attrNoSUID      = 0x2
	attrNoDev       = 0x4
	attrNoExec      = 0x8
	attrNoAtime     = 0x10
	attrStrictAtime = 0x20
	attrAtimes      = 0x70
	attrNoDirAtime  = 0x80
	attrNoSymFollow = 0x200000

	msNoSymFollow = 0x100
	msPropagation = syscall.MS_UNBINDABLE | syscall.MS_PRIVATE | syscall.MS_SLAVE | syscall.MS_SHARED
)

// attributes are flags of mount(2) as mount_setattr knows them.
func attributes(flags uint32) (set, clear uint64) {
	for _, f := range [...]struct{ flag, attr uint32 }{
		{syscall.MS_RDONLY, attrReadOnly}, {syscall.MS_NOSUID, attrNoSUID}, {syscall.MS_NODEV, attrNoDev},
		{syscall.MS_NOEXEC, attrNoExec}, {syscall.MS_NODIRATIME, attrNoDirAtime}, {msNoSymFollow, attrNoSymFollow},
		{syscall.MS_NOATIME, attrNoAtime}, {syscall.MS_STRICTATIME, attrStrictAtime},
	} {
		if flags&f.flag != 0 {
			set |= uint64(f.attr)
		}
	}
	if flags&(syscall.MS_NOATIME|syscall.MS_STRICTATIME|syscall.MS_RELATIME) != 0 {
		clear = attrAtimes
	}
	return set, clear
}

// propagationOf gives the kind of propagation, private if none is named, and
// whether the mounts below have it too.
func propagationOf(flags uint32) (kind uint64, recursive bool) {
	if flags&msPropagation == 0 {
		return syscall.MS_PRIVATE, flags&syscall.MS_REC != 0
	}
	return uint64(flags & msPropagation), flags&syscall.MS_REC != 0
}

// takeSources opens what comes from outside the container, while that can be
// seen: trees that hang nowhere yet.
func (c *container) takeSources() (err error) {
	for i := range c.Devices {
		if d := &c.Devices[i]; d.Serial != "" {
			if d.Major, d.Minor, err = renewDisk(d.Serial); err != nil {
				return err
			}
		}
	}
	c.trees = make([]int, len(c.Mounts))
	for i := range c.Mounts {
		m := &c.Mounts[i]
		c.trees[i] = -1
		switch m.Kind {
		case guestproto.MountPod:
			c.trees[i], err = takeBelow(dirsDir, m.Source, true)
		case guestproto.MountShare:
			c.trees[i], err = takeBelow(sharesDir, m.Source, false)
		case guestproto.MountDisk:
			c.trees[i], err = takeDisk(m)
		}
		if err != nil {
			return fail("mount at", strconv.Quote(m.Target), err)
		}
	}
	return nil
}

// takeBelow makes a tree of "name/path/below" in one of the agent's folders.
// Nothing on the way may be a symbolic link: what the pod, or whoever fills a
// share, puts there must not lead out of it.
func takeBelow(folder, source string, make bool) (int, error) {
	clean, ok := absolute("/" + source)
	if !ok || clean == "/" {
		return -1, fail("open", strconv.Quote(source), syscall.EINVAL)
	}
	name, rest := cut(clean[1:], '/')
	base, err := syscall.Open(folder+"/"+name, asPath|syscall.O_DIRECTORY|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, fail("open", strconv.Quote(name), err)
	}
	fd := base
	if rest != "" {
		defer syscall.Close(base)
		if fd, err = openBelow(base, rest, asPath); err == syscall.ENOENT && make {
			fd, err = makeBelow(base, rest)
		}
		if err != nil {
			return -1, fail("open", strconv.Quote(source), err)
		}
	}
	defer syscall.Close(fd)
	tree, err := openTree(fd, false)
	if err != nil {
		return -1, fail("take", strconv.Quote(source), err)
	}
	return tree, nil
}

// openBelow opens a path that stays below a directory and follows no link.
func openBelow(dir int, path string, flags int) (int, error) {
	return openat2(dir, path, flags, 0, resolveBeneath|resolveNoSymlinks)
}

// makeBelow makes a directory there, and those that lead to it.
func makeBelow(dir int, path string) (int, error) {
	at := dir
	for {
		var name string
		name, path = cut(path, '/')
		err := syscall.Mkdirat(at, name, 0o755)
		if err != nil && err != syscall.EEXIST {
			return -1, err
		}
		next, err := openBelow(at, name, asPath|syscall.O_DIRECTORY)
		if at != dir {
			_ = syscall.Close(at)
		}
		if err != nil || path == "" {
			return next, err
		}
		at = next
	}
}

// takeDisk mounts a disk on the side and takes it away from there as a tree.
func takeDisk(m *guestproto.Mount) (int, error) {
	const side = "/tmp" // of the agent's, in this process' own copy of its mounts
	device, err := findDisk(m.Source)
	if err != nil {
		return -1, err
	}
	if err := mountDisk(device, side, m.FS, 0, m.Data); err != nil {
		return -1, err
	}
	defer syscall.Unmount(side, syscall.MNT_DETACH)
	fd, err := syscall.Open(side, asPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return -1, fail("open", device, err)
	}
	defer syscall.Close(fd)
	tree, err := openTree(fd, false)
	if err != nil {
		return -1, fail("take", device, err)
	}
	return tree, nil
}

// mountAll mounts everything, in order.
func (c *container) mountAll() error {
	for i := range c.Mounts {
		m := &c.Mounts[i]
		var err error
		switch m.Kind {
		case guestproto.MountFS:
			err = c.mountFS(m)
		case guestproto.MountBind:
			err = c.bindInside(m)
		default:
			err = c.attach(c.trees[i], m)
		}
		if err != nil {
			return fail("mount at", strconv.Quote(m.Target), err)
		}
	}
	return nil
}

// sayMounts tells PID 1 what may be meant by a place that may hold programs.
func (c *container) sayMounts() error {
	for i := range c.Mounts {
		m := &c.Mounts[i]
		switch m.Kind {
		case guestproto.MountPod, guestproto.MountShare, guestproto.MountDisk:
		default:
			continue
		}
		fd, err := c.in.open(m.Target, asPath)
		if err == nil {
			err = syscall.Sendmsg(setupSocket, append([]byte{wordMount}, m.Target...), syscall.UnixRights(fd), nil, 0)
			_ = syscall.Close(fd)
		}
		if err != nil {
			return fail("tell of mount at", strconv.Quote(m.Target), err)
		}
	}
	return nil
}

// sayPlaces tells PID 1 what this container has mounted where, its root last,
// which rules for files are about. What the kernel shows of itself is none.
func (c *container) sayPlaces() error {
	say := func(path string) error {
		fd, err := c.in.open(path, asPath)
		if err == nil {
			err = syscall.Sendmsg(setupSocket, append([]byte{wordPlace}, path...), syscall.UnixRights(fd), nil, 0)
			_ = syscall.Close(fd)
		}
		if err != nil {
			return fail("tell of place", strconv.Quote(path), err)
		}
		return nil
	}
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if m.Kind == guestproto.MountFS {
			switch m.FS {
			case "proc", "sysfs", "cgroup2", "devpts", "mqueue":
				continue
			}
		}
		if err := say(m.Target); err != nil {
			return err
		}
	}
	return say("/")
}

// mountFS mounts a file system of the kernel.
func (c *container) mountFS(m *guestproto.Mount) error {
	known := false
	for _, fs := range kernelFS {
		known = known || fs == m.FS
	}
	if !known {
		return fail("mount", "file system "+strconv.Quote(m.FS), syscall.ENODEV)
	}
	at, err := c.in.dir(m.Target, 0o755)
	if err != nil {
		return err
	}
	defer syscall.Close(at)
	if err := syscall.Fchdir(at); err != nil {
		return fail("enter", strconv.Quote(m.Target), err)
	}
	const ours = syscall.MS_BIND | syscall.MS_REC | syscall.MS_MOVE | syscall.MS_REMOUNT | msPropagation
	if err := syscall.Mount(m.FS, ".", m.FS, uintptr(m.Flags&^ours), m.Data); err != nil {
		return fail("mount", m.FS, err)
	}
	if m.Propagation&msPropagation == 0 && m.Recursive == 0 {
		return nil
	}
	top, err := c.in.open(m.Target, asPath) // what is mounted now
	if err != nil {
		return fail("open", strconv.Quote(m.Target), err)
	}
	defer syscall.Close(top)
	return settle(top, &guestproto.Mount{Recursive: m.Recursive, Propagation: m.Propagation})
}

// bindInside mounts a path of the container at another.
func (c *container) bindInside(m *guestproto.Mount) error {
	source, ok := absolute(m.Source)
	if !ok {
		return fail("bind", strconv.Quote(m.Source), syscall.EINVAL)
	}
	fd, err := c.in.open(source, asPath)
	if err != nil {
		return fail("open", strconv.Quote(source), err)
	}
	defer syscall.Close(fd)
	tree, err := openTree(fd, m.Flags&syscall.MS_REC != 0)
	if err != nil {
		return fail("take", strconv.Quote(source), err)
	}
	return c.attach(tree, m)
}

// attach puts a tree where the mount goes, and closes it.
func (c *container) attach(tree int, m *guestproto.Mount) error {
	defer syscall.Close(tree)
	var st syscall.Stat_t
	if err := syscall.Fstat(tree, &st); err != nil {
		return fail("stat", "source", err)
	}
	to, err := c.in.target(m.Target, st.Mode&syscall.S_IFMT == syscall.S_IFDIR)
	if err != nil {
		return err
	}
	defer syscall.Close(to)
	if err := moveMount(tree, to); err != nil {
		return fail("attach", "source", err)
	}
	return settle(tree, m)
}

// settle gives what is mounted its attributes and propagation.
func settle(fd int, m *guestproto.Mount) error {
	set, clear := attributes(m.Flags)
	kind, all := propagationOf(m.Propagation)
	if err := setMount(fd, set, clear, kind, false); err != nil {
		return fail("set up", "mount", err)
	}
	if all {
		if err := setMount(fd, 0, 0, kind, true); err != nil {
			return fail("propagate", "mount", err)
		}
	}
	if m.Recursive != 0 {
		set, clear := attributes(m.Recursive)
		if err := setMount(fd, set, clear, 0, true); err != nil {
			return fail("set up", "mount and those below", err)
		}
	}
	return nil
}

// mask covers what the container must not read.
func (c *container) mask() error {
	for _, path := range c.Masked {
		fd, err := c.in.open(path, asPath)
		if err == syscall.ENOENT || err == syscall.ENOTDIR {
			continue
		}
		if err == nil {
			err = c.cover(fd)
			_ = syscall.Close(fd)
		}
		if err != nil {
			return fail("hide", strconv.Quote(path), err)
		}
	}
	return nil
}

// cover puts nothing over a directory, or /dev/null over a file.
func (c *container) cover(fd int) error {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT == syscall.S_IFDIR {
		if err := syscall.Fchdir(fd); err != nil {
			return err
		}
		return syscall.Mount("tmpfs", ".", "tmpfs", closed|syscall.MS_RDONLY, "size=0")
	}
	return c.coverWith("dev/null", fd)
}

// coverWith puts a file of the agent's root over what fd is of.
func (c *container) coverWith(path string, fd int) error {
	file, err := openat2(c.old, path, asPath, 0, resolveInRoot)
	if err != nil {
		return err
	}
	defer syscall.Close(file)
	tree, err := openTree(file, false)
	if err != nil {
		return err
	}
	defer syscall.Close(tree)
	return moveMount(tree, fd)
}

// protect makes paths, and what is mounted below them, read-only.
func (c *container) protect() error {
	for _, path := range c.ReadOnly {
		fd, err := c.in.open(path, asPath)
		if err == syscall.ENOENT || err == syscall.ENOTDIR {
			continue
		}
		if err == nil {
			err = protectAt(fd)
			_ = syscall.Close(fd)
		}
		if err != nil {
			return fail("write-protect", strconv.Quote(path), err)
		}
	}
	return nil
}

func protectAt(fd int) error {
	tree, err := openTree(fd, true)
	if err != nil {
		return err
	}
	defer syscall.Close(tree)
	if err := setMount(tree, attrReadOnly, 0, 0, true); err != nil {
		return err
	}
	return moveMount(tree, fd)
}

// bindBootID puts the clone's own boot id, which lies in the agent's root, over
// the template's.
func (c *container) bindBootID() error {
	fd, err := c.in.open("/proc/sys/kernel/random/boot_id", asPath)
	if err == syscall.ENOENT || err == syscall.ENOTDIR {
		return nil // this container has no /proc
	}
	if err != nil {
		return fail("open", "boot_id", err)
	}
	defer syscall.Close(fd)
	err = c.coverWith(bootIDPath[1:], fd)
	if err != nil && err != syscall.ENOENT { // none was given
		return fail("bind", "boot_id", err)
	}
	return nil
}
