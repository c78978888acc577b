package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

// dir is a directory of the pod: what containers share, or what the host keeps
// up to date for them. It is a file system of its own, and so has a limit.
type dir struct {
	name   string
	state  dirState
	device string // if it is a disk's
}

type dirState uint8

const (
	dirFree dirState = iota
	dirMaking
	dirReady
	dirLeaving
)

func dirPath(name string) string { return dirsDir + "/" + name }

func (a *agent) findDir(v guestproto.Verb, name string) (*dir, error) {
	for i := range a.dirs {
		if d := &a.dirs[i]; d.state != dirFree && d.name == name {
			return d, nil
		}
	}
	return nil, fail(v.String(), strconv.Quote(name), syscall.ENOENT)
}

// makeDir makes a directory of the pod.
func (a *agent) makeDir(request uint32, payload []byte) error {
	m, err := guestproto.ParseDir(payload)
	if err != nil {
		return err
	}
	if _, err := a.findDir(guestproto.VerbMakeDir, m.Name); err == nil {
		return fail("make directory", strconv.Quote(m.Name), syscall.EEXIST)
	}
	var d *dir
	for i := range a.dirs {
		if a.dirs[i].state == dirFree {
			d = &a.dirs[i]
			break
		}
	}
	if d == nil {
		return fail("make directory", strconv.Quote(m.Name)+": table of "+strconv.Itoa(guestproto.MaxDirs), syscall.EAGAIN)
	}
	*d = dir{name: m.Name, state: dirMaking}
	from := a.knownDisk(m.Serial)
	err = a.send(request, func() (err error) { return mountDir(&m, &from) }, func(err error) error {
		if err != nil {
			*d = dir{}
			return err
		}
		d.state, d.device = dirReady, from.device
		a.learn([]disk{from})
		return nil
	})
	if err != nil {
		*d = dir{}
	}
	return err
}

func mountDir(m *guestproto.Dir, from *disk) (err error) {
	path := dirPath(m.Name)
	if err := syscall.Mkdir(path, 0o700); err != nil && err != syscall.EEXIST {
		return fail("make directory", strconv.Quote(m.Name), err)
	}
	if m.Serial != "" {
		if err = from.find(); err == nil {
			err = mountDisk(from.device, path, m.FS, syscall.MS_NODEV, "")
		}
	} else {
		data := "mode=" + strconv.FormatUint(uint64(m.Mode), 8) + ",uid=" + strconv.FormatUint(uint64(m.UID), 10) +
			",gid=" + strconv.FormatUint(uint64(m.GID), 10)
		if m.Bytes > 0 {
			data += ",size=" + strconv.FormatUint(m.Bytes, 10)
		}
		files := m.Files
		if files == 0 {
			files = max(m.Bytes>>12, 64)
		}
		if m.Bytes > 0 || m.Files > 0 {
			data += ",nr_inodes=" + strconv.FormatUint(files, 10)
		}
		if err = syscall.Mount("tmpfs", path, "tmpfs", syscall.MS_NODEV, data); err != nil {
			err = fail("mount tmpfs", strconv.Quote(m.Name), err)
		}
	}
	if err != nil {
		_ = syscall.Rmdir(path)
	}
	return err
}

// removeDir unmounts a directory of the pod. Containers that mounted it keep
// what they have; a disk is released when they are gone.
func (a *agent) removeDir(request uint32, payload []byte) error {
	m, err := guestproto.ParseName(guestproto.VerbRemoveDir, payload)
	if err != nil {
		return err
	}
	d, err := a.findDir(guestproto.VerbRemoveDir, m.Name)
	if err != nil {
		return err
	}
	if d.state == dirMaking {
		return fail("remove directory", strconv.Quote(m.Name), syscall.EBUSY)
	}
	d.state = dirLeaving
	device := d.device
	return a.send(request, func() error {
		path := dirPath(m.Name)
		if err := syscall.Unmount(path, 0); err != nil && err != syscall.EINVAL && err != syscall.ENOENT {
			return fail("unmount", strconv.Quote(m.Name), err)
		}
		if err := syscall.Rmdir(path); err != nil && err != syscall.ENOENT {
			return fail("remove directory", strconv.Quote(m.Name), err)
		}
		return released([2]string{device})
	}, func(err error) error {
		if err == nil {
			*d = dir{}
		}
		return err
	})
}

// mountShare mounts a virtio file system of the host. Whoever serves it may
// never answer, which holds up nobody but those who use it.
func (a *agent) mountShare(request uint32, payload []byte) error {
	m, err := guestproto.ParseName(guestproto.VerbMountShare, payload)
	if err != nil {
		return err
	}
	var slot *string
	for i := range a.shares {
		if a.shares[i] == m.Name {
			return fail("mount share", strconv.Quote(m.Name), syscall.EEXIST)
		}
		if a.shares[i] == "" && slot == nil {
			slot = &a.shares[i]
		}
	}
	if slot == nil {
		return fail("mount share", strconv.Quote(m.Name)+": table of "+strconv.Itoa(guestproto.MaxShares), syscall.EAGAIN)
	}
	*slot = m.Name
	err = a.send(request, func() error {
		path := sharesDir + "/" + m.Name
		if err := syscall.Mkdir(path, 0o700); err != nil && err != syscall.EEXIST {
			return fail("make directory", path, err)
		}
		if err := syscall.Mount(m.Name, path, "virtiofs", syscall.MS_NODEV, ""); err != nil {
			_ = syscall.Rmdir(path)
			return fail("mount share", strconv.Quote(m.Name), err)
		}
		return nil
	}, func(err error) error {
		if err != nil {
			*slot = ""
		}
		return err
	})
	if err != nil {
		*slot = ""
	}
	return err
}
