package guest

import (
	"strconv"
	"syscall"

	"hauberk.dev/api/guestproto"
)

const (
	dataLink = "..data"
	dataNext = "..data_tmp"
)

// push writes files into a directory of the pod. All of it lies in this
// kernel's memory, and one frame holds little: it is done at once.
func (a *agent) push(payload []byte) error {
	m, err := guestproto.ParsePush(payload)
	if err != nil {
		return err
	}
	d, err := a.findDir(guestproto.VerbPush, m.Dir)
	if err != nil {
		return err
	}
	if d.state != dirReady || d.device != "" {
		return fail("push into", strconv.Quote(m.Dir), syscall.EINVAL) // a disk may take its time
	}
	top, err := syscall.Open(dirPath(m.Dir), syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", strconv.Quote(m.Dir), err)
	}
	defer syscall.Close(top)
	if m.Stamp == "" {
		return pushFiles(top, m.Files)
	}
	if err := pushAll(top, &m); err != nil {
		return fail("push into", strconv.Quote(m.Dir), err)
	}
	return nil
}

// pull appends the end of a file of a directory of the pod to the reply.
func (a *agent) pull(payload []byte) error {
	m, err := guestproto.ParsePull(payload)
	if err != nil {
		return err
	}
	d, err := a.findDir(guestproto.VerbPull, m.Dir)
	if err != nil {
		return err
	}
	if d.state != dirReady || d.device != "" {
		return fail("pull from", strconv.Quote(m.Dir), syscall.EINVAL) // a disk may take its time
	}
	top, err := syscall.Open(dirPath(m.Dir), syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", strconv.Quote(m.Dir), err)
	}
	defer syscall.Close(top)
	fd, err := openBelow(top, m.Path, syscall.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK)
	if err != nil {
		return fail("open", strconv.Quote(m.Path), err)
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return fail("read", strconv.Quote(m.Path), syscall.EINVAL)
	}
	if _, err := syscall.Seek(fd, max(st.Size-guestproto.MaxChunk, 0), 0); err != nil {
		return fail("seek in", strconv.Quote(m.Path), err)
	}
	n, err := readFull(fd, a.tx[len(a.tx):len(a.tx)+guestproto.MaxChunk])
	if err != nil {
		return fail("read", strconv.Quote(m.Path), err)
	}
	a.tx = a.tx[:len(a.tx)+n]
	return nil
}

// pushAll gathers the files of a push in a directory of its own, and with the
// last of them makes it the one that counts.
func pushAll(top int, m *guestproto.Push) error {
	if m.First {
		if err := dropStale(top); err != nil {
			return err
		}
		if err := syscall.Mkdirat(top, m.Stamp, 0o755); err != nil {
			return fail("make directory", strconv.Quote(m.Stamp), err)
		}
	}
	fresh, err := openBelow(top, m.Stamp, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return fail("open", strconv.Quote(m.Stamp), err)
	}
	defer syscall.Close(fresh)
	if err := pushFiles(fresh, m.Files); err != nil || !m.Last {
		return err
	}
	if err := unlinkat(top, dataNext, 0); err != nil && err != syscall.ENOENT {
		return fail("remove", dataNext, err)
	}
	if err := symlinkat(m.Stamp, top, dataNext); err != nil {
		return fail("link", dataNext, err)
	}
	// From here on whoever opens a file gets the new one.
	if err := renameat(top, dataNext, dataLink); err != nil {
		return fail("rename", dataNext, err)
	}
	if err := linkNames(top, fresh); err != nil {
		return err
	}
	return dropStale(top)
}

// linkNames gives every first name of the files its link, and takes away the
// links of those that are no more.
func linkNames(top, fresh int) error {
	names, err := namesIn(fresh)
	if err != nil {
		return err
	}
	var buf [300]byte
	for _, name := range names {
		want := dataLink + "/" + name
		n, err := readlinkat(top, name, buf[:])
		if err == nil && string(buf[:n]) == want {
			continue
		}
		if err != syscall.ENOENT {
			if err := removeTree(top, name, 0); err != nil {
				return err
			}
		}
		if err := symlinkat(want, top, name); err != nil {
			return fail("link", strconv.Quote(name), err)
		}
	}
	all, err := namesIn(top)
	if err != nil {
		return err
	}
	for _, name := range all {
		n, err := readlinkat(top, name, buf[:])
		if err != nil || string(buf[:n]) != dataLink+"/"+name {
			continue // not one of ours
		}
		var st syscall.Stat_t
		if fstatat(fresh, name, &st) == syscall.ENOENT {
			if err := unlinkat(top, name, 0); err != nil {
				return fail("remove", strconv.Quote(name), err)
			}
		}
	}
	return nil
}

// dropStale removes the directories of pushes that count no more, or never did.
func dropStale(top int) error {
	names, err := namesIn(top)
	if err != nil {
		return err
	}
	var buf [300]byte
	n, err := readlinkat(top, dataLink, buf[:])
	if err != nil {
		n = 0
	}
	for _, name := range names {
		if len(name) < 3 || name[:2] != ".." || name == dataLink || name == string(buf[:n]) {
			continue
		}
		if err := removeTree(top, name, 0); err != nil {
			return err
		}
	}
	return nil
}

// pushFiles writes files below a directory. One that is there is written in
// place.
func pushFiles(top int, files []guestproto.PushFile) error {
	for i := range files {
		if err := pushFile(top, &files[i]); err != nil {
			return fail("write", strconv.Quote(files[i].Path), err)
		}
	}
	return nil
}

func pushFile(top int, f *guestproto.PushFile) error {
	dir, name := top, f.Path
	if up := parent("/" + f.Path)[1:]; up != "" {
		var err error
		if dir, err = makeBelow(top, up); err != nil {
			return err
		}
		defer syscall.Close(dir)
		name = lastName(f.Path)
	}
	flags := syscall.O_WRONLY | syscall.O_CREAT | syscall.O_NOFOLLOW | syscall.O_NONBLOCK | syscall.O_CLOEXEC
	if f.More {
		flags |= syscall.O_APPEND
	} else {
		flags |= syscall.O_TRUNC
	}
	fd, err := syscall.Openat(dir, name, flags, 0o600)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&syscall.S_IFMT != syscall.S_IFREG {
		return syscall.EINVAL // a pipe of the container's, say
	}
	if err := writeAll(fd, f.Data); err != nil {
		return err
	}
	if st.Uid != f.UID || st.Gid != f.GID {
		if err := syscall.Fchown(fd, int(f.UID), int(f.GID)); err != nil {
			return err
		}
	}
	return syscall.Fchmod(fd, f.Mode)
}

// namesIn lists an open directory from its start.
func namesIn(dir int) ([]string, error) {
	fd, err := openBelow(dir, ".", syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return nil, fail("open", "directory", err)
	}
	defer syscall.Close(fd)
	var names []string
	var buf [2048]byte
	for {
		n, err := syscall.ReadDirent(fd, buf[:])
		if err != nil {
			return nil, fail("list", "directory", err)
		}
		if n <= 0 {
			return names, nil
		}
		if _, _, names = syscall.ParseDirent(buf[:n], -1, names); len(names) > guestproto.MaxList {
			return nil, fail("list", "directory", syscall.E2BIG)
		}
	}
}

// maxDepth bounds how deep a tree is followed.
const maxDepth = 32

// removeTree removes a name in a directory and all below it.
func removeTree(dir int, name string, depth int) error {
	err := unlinkat(dir, name, 0)
	if err == nil || err == syscall.ENOENT {
		return nil
	}
	if err != syscall.EISDIR || depth == maxDepth {
		return fail("remove", strconv.Quote(name), err)
	}
	fd, err := openBelow(dir, name, syscall.O_RDONLY|syscall.O_DIRECTORY)
	if err != nil {
		return fail("open", strconv.Quote(name), err)
	}
	defer syscall.Close(fd)
	names, err := namesIn(fd)
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := removeTree(fd, n, depth+1); err != nil {
			return err
		}
	}
	if err := unlinkat(dir, name, atRemoveDir); err != nil {
		return fail("remove directory", strconv.Quote(name), err)
	}
	return nil
}
