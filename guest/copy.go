package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

const (
	copyBuffer = 32 << 10
	// copyCaps let the copy read and write what the container's user may not:
	// CHOWN, DAC_OVERRIDE, FOWNER, FSETID. More it has not.
	copyCaps = 1<<0 | 1<<1 | 1<<3 | 1<<4
	// copyDepth bounds how deep a tree is followed.
	copyDepth = 256
)

// becomeCopy enters a container and copies. It does not join its cgroup: a limit
// on processes must not hit the threads of this runtime.
func becomeCopy(payload []byte, join int) error {
	m, err := guestproto.ParseCopy(payload)
	if err != nil {
		return err
	}
	_ = syscall.Close(join)
	if err := enterExisting(); err != nil {
		return err
	}
	r, err := newRights(&guestproto.Program{Rights: guestproto.Rights{
		Given: true, Bounding: copyCaps, Effective: copyCaps, Permitted: copyCaps,
	}}, identity{})
	if err != nil {
		return err
	}
	r.umask = 0
	if err := r.apply(); err != nil {
		return err
	}
	in, err := openInside()
	if err != nil {
		return err
	}
	for fd := setupSocket; fd <= setupContainer; fd++ {
		_ = syscall.Close(fd) // as an exec would: PID 1 hears that this runs
	}
	c := copier{in: in, buf: make([]byte, copyBuffer)}
	if m.Out {
		err = c.out(m.Path)
	} else {
		err = c.into(m.Path)
	}
	if err != nil {
		warn(err.Error())
		syscall.Exit(1)
	}
	syscall.Exit(0)
	return nil
}

// copier moves files between a container and its standard input or output.
type copier struct {
	in   inside
	base int // of a copy into the container
	buf  []byte
	head [guestproto.CopyHead + 2*guestproto.MaxCopyPath]byte
}

// out writes what is at a path, by its last name.
func (c *copier) out(path string) error {
	path, _ = absolute(path)
	dir, err := c.in.open(parent(path), asPath|syscall.O_DIRECTORY)
	if err != nil {
		return fail("open", strconv.Quote(parent(path)), err)
	}
	name := lastName(path)
	if name == "" {
		name = "."
	}
	var st syscall.Stat_t
	if err := fstatat(dir, name, &st); err != nil {
		return fail("find", strconv.Quote(path), err)
	}
	if err := c.outEntry(dir, name, name, 0, 0); err != nil {
		return err
	}
	return c.say(&guestproto.CopyEntry{})
}

func (c *copier) say(e *guestproto.CopyEntry) error {
	if err := writeAll(1, e.Append(c.head[:0])); err != nil {
		return fail("write", "copy", err)
	}
	return nil
}

// outEntry writes a name in a directory and all below it. What is gone
// meanwhile is passed over, and so is what is neither file, directory nor link.
func (c *copier) outEntry(dir int, name, path string, device uint64, depth int) error {
	var st syscall.Stat_t
	err := fstatat(dir, name, &st)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return fail("stat", strconv.Quote(path), err)
	}
	e := guestproto.CopyEntry{Mode: st.Mode & 0o7777, UID: st.Uid, GID: st.Gid, UnixNanos: syscall.TimespecToNsec(st.Mtim), Path: path}
	if len(path) > guestproto.MaxCopyPath || depth > copyDepth {
		return fail("copy", strconv.Quote(path[:min(len(path), 64)]), syscall.ENAMETOOLONG)
	}
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		e.Kind = guestproto.CopyDir
		return c.outDir(dir, name, &e, device, st.Dev, depth)
	case syscall.S_IFREG:
		e.Kind = guestproto.CopyRegular
		return c.outFile(dir, name, &e)
	case syscall.S_IFLNK:
		n, err := readlinkat(dir, name, c.buf[:guestproto.MaxCopyPath])
		if err != nil || n == 0 {
			return fail("read link", strconv.Quote(path), syscall.EINVAL)
		}
		e.Kind, e.Link = guestproto.CopySymlink, string(c.buf[:n])
		return c.say(&e)
	}
	return nil
}

func (c *copier) outFile(dir int, name string, e *guestproto.CopyEntry) error {
	fd, err := openBelow(dir, name, syscall.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return fail("open", strconv.Quote(e.Path), err)
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return fail("stat", strconv.Quote(e.Path), syscall.EINVAL) // another took its place
	}
	e.Size = uint64(st.Size)
	if err := c.say(e); err != nil {
		return err
	}
	for left := st.Size; left > 0; {
		n, err := readFull(fd, c.buf[:min(int64(len(c.buf)), left)])
		if err != nil {
			return fail("read", strconv.Quote(e.Path), err)
		}
		if n == 0 { // it was cut meanwhile: the length was given
			n = int(min(int64(len(c.buf)), left))
			clear(c.buf[:n])
		}
		if err := writeAll(1, c.buf[:n]); err != nil {
			return fail("write", "copy", err)
		}
		left -= int64(n)
	}
	return nil
}

func (c *copier) outDir(dir int, name string, e *guestproto.CopyEntry, device, own uint64, depth int) error {
	if err := c.say(e); err != nil {
		return err
	}
	fd, err := openBelow(dir, name, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW)
	if err == syscall.ENOENT {
		return nil
	}
	if err != nil {
		return fail("open", strconv.Quote(e.Path), err)
	}
	defer syscall.Close(fd)
	if own != device && ofKernel(fd) {
		return nil
	}
	var entries [4096]byte
	for {
		n, err := syscall.ReadDirent(fd, entries[:])
		if err != nil {
			return fail("list", strconv.Quote(e.Path), err)
		}
		if n <= 0 {
			return nil
		}
		_, _, names := syscall.ParseDirent(entries[:n], -1, nil)
		for _, below := range names {
			if err := c.outEntry(fd, below, e.Path+"/"+below, own, depth+1); err != nil {
				return err
			}
		}
	}
}

// ofKernel says whether a directory shows the kernel's own state, whose files
// have no length.
func ofKernel(fd int) bool {
	var st syscall.Statfs_t
	if syscall.Fstatfs(fd, &st) != nil {
		return false
	}
	switch st.Type {
	case 0x9fa0, 0x62656572, 0x63677270, 0x1cd1, 0x19800202: // proc, sysfs, cgroup2, devpts, mqueue
		return true
	}
	return false
}

// into reads entries and makes them below a directory.
func (c *copier) into(path string) (err error) {
	path, _ = absolute(path)
	if c.base, err = c.in.dir(path, 0o755); err != nil {
		return err
	}
	for {
		if err := c.take(c.head[:guestproto.CopyHead]); err != nil {
			return err
		}
		e, pathLen, linkLen, err := guestproto.ParseCopyHead(c.head[:guestproto.CopyHead])
		if err != nil {
			return err
		}
		if e.Kind == guestproto.CopyEnd {
			return nil
		}
		names := c.head[guestproto.CopyHead:][:pathLen+linkLen]
		if err := c.take(names); err != nil {
			return err
		}
		e.Path, e.Link = string(names[:pathLen]), string(names[pathLen:])
		if err := c.inEntry(&e); err != nil {
			return fail("copy", strconv.Quote(e.Path), err)
		}
	}
}

// take reads exactly b.
func (c *copier) take(b []byte) error {
	n, err := readFull(0, b)
	if err == nil && n < len(b) {
		err = syscall.EPIPE
	}
	if err != nil {
		return fail("read", "copy", err)
	}
	return nil
}

// place opens the directory that an entry is in, and gives its name there. No
// link is followed below where the copy began.
func (c *copier) place(path string) (dir int, name string, err error) {
	clean, ok := absolute("/" + path)
	if !ok || clean == "/" {
		return -1, "", syscall.EINVAL
	}
	up := parent(clean)[1:]
	if up == "" {
		dir, err = openBelow(c.base, ".", asPath|syscall.O_DIRECTORY)
	} else {
		dir, err = makeBelow(c.base, up)
	}
	return dir, lastName(clean), err
}

func (c *copier) inEntry(e *guestproto.CopyEntry) error {
	dir, name, err := c.place(e.Path)
	if err != nil {
		return err
	}
	defer syscall.Close(dir)
	switch e.Kind {
	case guestproto.CopyDir:
		return inDir(dir, name, e)
	case guestproto.CopyRegular:
		return c.inFile(dir, name, e)
	}
	if err := unlinkat(dir, name, 0); err != nil && err != syscall.ENOENT {
		return err
	}
	if e.Kind == guestproto.CopySymlink {
		if err := symlinkat(e.Link, dir, name); err != nil {
			return err
		}
		return syscall.Fchownat(dir, name, int(e.UID), int(e.GID), atNoFollow)
	}
	from, old, err := c.place(e.Link)
	if err != nil {
		return err
	}
	defer syscall.Close(from)
	return linkat(from, old, dir, name)
}

func inDir(dir int, name string, e *guestproto.CopyEntry) error {
	if err := syscall.Mkdirat(dir, name, 0o700); err != nil && err != syscall.EEXIST {
		return err
	}
	fd, err := openBelow(dir, name, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	if err := syscall.Fchown(fd, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	return syscall.Fchmod(fd, e.Mode)
}

// inFile makes a file in place of what is there; one that is mounted there by
// itself is written.
func (c *copier) inFile(dir int, name string, e *guestproto.CopyEntry) error {
	const fresh = syscall.O_WRONLY | syscall.O_CREAT | syscall.O_EXCL | syscall.O_NOFOLLOW | syscall.O_CLOEXEC
	err := unlinkat(dir, name, 0)
	flags := fresh
	if err == syscall.EBUSY {
		flags = syscall.O_WRONLY | syscall.O_TRUNC | syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	} else if err != nil && err != syscall.ENOENT {
		return err
	}
	fd, err := syscall.Openat(dir, name, flags, 0o600)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	for left := e.Size; left > 0; {
		b := c.buf[:min(uint64(len(c.buf)), left)]
		if err := c.take(b); err != nil {
			return err
		}
		if err := writeAll(fd, b); err != nil {
			return err
		}
		left -= uint64(len(b))
	}
	if err := syscall.Fchown(fd, int(e.UID), int(e.GID)); err != nil {
		return err
	}
	if err := syscall.Fchmod(fd, e.Mode); err != nil {
		return err
	}
	return setTimes(dir, name, e.UnixNanos)
}
