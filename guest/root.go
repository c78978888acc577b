package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// rootPath is where a root file system is mounted.
func rootPath(n uint8) string { return rootsDir + "/" + strconv.Itoa(int(n)) + "/root" }

// upperPath is where lies what containers write to a root.
func upperPath(n uint8) string { return rootsDir + "/" + strconv.Itoa(int(n)) + "/upper" }

// root is a root file system of the guest.
type root struct {
	state   rootState
	devices [2]string // of the image, and of the upper layer if that is a disk
}

type rootState uint8

const (
	rootFree rootState = iota
	rootMounting
	rootMounted
	rootLeaving // being unmounted, or held by something when it was tried
)

// mountRoot mounts an image with an overlay over it and tells the Guard.
func (a *agent) mountRoot(request uint32, payload []byte) error {
	m, err := guestproto.ParseMountRoot(payload)
	if err != nil {
		return err
	}
	r := &a.roots[m.Root]
	if r.state != rootFree {
		return fail("mount root", strconv.Itoa(int(m.Root)), syscall.EEXIST)
	}
	disks := [2]disk{a.knownDisk(m.Serial), a.knownDisk(m.UpperSerial)}
	var devices [2]string
	var reply guestproto.MountedRoot
	r.state = rootMounting
	err = a.send(request, func() (err error) {
		if err := disks[0].find(); err != nil {
			return err
		}
		if m.UpperSerial != "" {
			if err := disks[1].find(); err != nil {
				return err
			}
		}
		devices = [2]string{disks[0].device, disks[1].device}
		if reply, err = mountOverlay(devices, &m); err != nil {
			_ = unmountOverlay(m.Root, syscall.MNT_DETACH)
		}
		return err
	}, func(err error) error {
		if err == nil {
			if err = guardRoot(rootPath(m.Root), reply.Overlay, reply.Lower); err != nil {
				_ = unmountOverlay(m.Root, syscall.MNT_DETACH)
				err = fail("guard root", strconv.Itoa(int(m.Root)), err)
			}
		}
		if err != nil {
			r.state = rootFree
			return err
		}
		r.state, r.devices = rootMounted, devices
		a.learn(disks[:])
		a.tx = reply.Append(a.tx)
		return nil
	})
	if err != nil {
		r.state = rootFree
	}
	return err
}

// unmountRoot gives a root's number and its disks free. What holds it is said
// by EBUSY; asked again, it goes on where it stopped.
func (a *agent) unmountRoot(request uint32, payload []byte) error {
	m, err := guestproto.ParseUnmountRoot(payload)
	if err != nil {
		return err
	}
	r := &a.roots[m.Root]
	object := strconv.Itoa(int(m.Root))
	switch r.state {
	case rootFree:
		return fail("unmount root", object, syscall.ENOENT)
	case rootMounting:
		return fail("unmount root", object, syscall.EBUSY)
	}
	for i := range a.processes {
		if p := &a.processes[i]; p.id != 0 && p.container == p && p.root == m.Root {
			return fail("unmount root", object+": "+p.name()+" is on it", syscall.EBUSY)
		}
	}
	if r.state == rootMounted {
		if err := guardUnroot(rootPath(m.Root)); err != nil {
			return fail("unguard root", object, err)
		}
	}
	r.state = rootLeaving
	devices := r.devices
	return a.send(request, func() error {
		if err := unmountOverlay(m.Root, 0); err != nil {
			return err
		}
		return released(devices)
	}, func(err error) error {
		if err == nil {
			*r = root{}
		}
		return err
	})
}

// released returns when no file system holds the devices any more: what a
// container left goes a moment after its last process.
func released(devices [2]string) error {
	const tries, rest = 100, 20
	for _, path := range devices {
		if path == "" {
			continue
		}
		for try := 0; ; try++ {
			fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_EXCL|syscall.O_CLOEXEC, 0)
			if err == nil {
				_ = syscall.Close(fd)
				break
			}
			if err != syscall.EBUSY || try == tries {
				return fail("release", path, err)
			}
			_, _ = poll(nil, rest)
		}
	}
	return nil
}

// mountOverlay mounts the image, what is written over it, and both as one.
func mountOverlay(devices [2]string, r *guestproto.MountRoot) (m guestproto.MountedRoot, err error) {
	base := rootsDir + "/" + strconv.Itoa(int(r.Root))
	image, upper, merged := base+"/image", base+"/upper", rootPath(r.Root)
	for _, dir := range []string{image, upper, merged} {
		if err := makeDirs(dir, 0o755); err != nil {
			return m, err
		}
	}
	const closed = syscall.MS_NODEV | syscall.MS_NOSUID
	if err := syscall.Mount(devices[0], image, "erofs", syscall.MS_RDONLY|closed, ""); err != nil {
		return m, fail("mount erofs", devices[0], err)
	}
	if devices[1] != "" {
		err = mountDisk(devices[1], upper, r.UpperFS, closed, "")
	} else {
		data := "mode=755"
		if r.UpperBytes > 0 {
			data += ",size=" + strconv.FormatUint(r.UpperBytes, 10)
		}
		if err = syscall.Mount("tmpfs", upper, "tmpfs", closed, data); err != nil {
			err = fail("mount tmpfs", upper, err)
		}
	}
	if err != nil {
		return m, err
	}
	for _, dir := range []string{upper + "/data", upper + "/work"} {
		if err := syscall.Mkdir(dir, 0o755); err != nil && err != syscall.EEXIST {
			return m, fail("make directory", dir, err)
		}
	}
	data := "lowerdir=" + image + ",upperdir=" + upper + "/data,workdir=" + upper + "/work"
	if err := syscall.Mount("overlay", merged, "overlay", syscall.MS_NODEV, data); err != nil {
		return m, fail("mount overlay", merged, err)
	}
	if m.Overlay, err = kernelDevice(merged); err != nil {
		return m, err
	}
	m.Lower, err = kernelDevice(image)
	return m, err
}

// diskFS are the file systems that a disk of the host may hold, as far as the
// kernel has them. Those of the kernel itself are not mounted by this name.
var diskFS = [...]string{"ext4", "ext3", "ext2", "xfs", "btrfs", "erofs", "squashfs", "iso9660", "vfat"}

// mountDisk mounts a disk, read-only if it is.
func mountDisk(device, dir, fs string, flags uintptr, data string) error {
	for _, known := range diskFS {
		if fs != known {
			continue
		}
		var buf [16]byte
		if b, err := readFile("/sys/block/"+device[len("/dev/"):]+"/ro", buf[:]); err == nil && number(b) == 1 {
			flags |= syscall.MS_RDONLY
		}
		if err := syscall.Mount(device, dir, fs, flags, data); err != nil {
			return fail("mount "+fs, device, err)
		}
		return nil
	}
	return fail("mount "+strconv.Quote(fs), device, syscall.ENODEV)
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

// unmountOverlay undoes what mountOverlay got done.
func unmountOverlay(root uint8, flags int) error {
	base := rootsDir + "/" + strconv.Itoa(int(root))
	for _, dir := range []string{"/root", "/upper", "/image"} {
		err := syscall.Unmount(base+dir, flags)
		if err != nil && err != syscall.EINVAL && err != syscall.ENOENT { // not mounted, or never made
			return fail("unmount", base+dir, err)
		}
	}
	return nil
}
