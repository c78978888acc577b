package guard

import (
	"strconv"
	"syscall"
)

const (
	oPath     = 0x200000
	maxLinks  = 40
	maxSteps  = 4096
	linkBytes = 4096
)

// openPath opens an object without opening its contents.
func openPath(dir int, path string, flags int) (int, error) {
	flags |= oPath | syscall.O_CLOEXEC
	fd, err := syscall.Openat(dir, path, flags, 0)
	if err == syscall.EMFILE {
		raiseFileLimit()
		fd, err = syscall.Openat(dir, path, flags, 0)
	}
	return fd, err
}

// walker follows a container's path from the container's root as the kernel
// would for a process in it. It shows every object on the way to step, which
// keeps or closes fd, with the place it has in the container; and the last name
// that was not there to absent, with the names after it.
type walker struct {
	root   int
	top    *place
	step   func(fd int, at *place, last bool) error
	absent func(at *place, rest string) error
}

// place is where something is, or would be, in a container: a path without
// links. Its object is known once it was walked to.
type place struct {
	up   *place
	name string
	in   map[string]*place
	mark *mark
	// mounted: it is the root of a mount.
	mounted bool
	fileWishes
}

func (p *place) child(name string) *place {
	if c := p.in[name]; c != nil {
		return c
	}
	if p.in == nil {
		p.in = map[string]*place{}
	}
	c := &place{up: p, name: name}
	p.in[name] = c
	return c
}

func (w *walker) walk(path string) error {
	dir, err := openPath(w.root, ".", 0)
	if err != nil {
		return err
	}
	defer func() { syscall.Close(dir) }()
	links, rest, at := 0, path, w.top
	if err := w.here(dir, at, onlySlashes(rest)); err != nil {
		return err
	}
	for steps := 0; !onlySlashes(rest); steps++ {
		var name string
		name, rest = cutName(rest)
		if steps >= maxSteps {
			return syscall.ENAMETOOLONG
		}
		if name == "." || name == ".." {
			if name == ".." && at.up != nil {
				if dir, err = replace(dir, dir, ".."); err != nil {
					return err
				}
				at = at.up
			}
			if onlySlashes(rest) { // where a link led to, which need not be below
				return w.here(dir, at, true)
			}
			continue
		}
		fd, err := openPath(dir, name, syscall.O_NOFOLLOW)
		if err == syscall.ENOENT {
			return w.absent(at.child(name), rest)
		}
		if err != nil {
			return err
		}
		target, isDir, err := inspect(fd)
		if err != nil {
			syscall.Close(fd)
			return err
		}
		last := onlySlashes(rest)
		if target != "" {
			if links++; links > maxLinks {
				syscall.Close(fd)
				return syscall.ELOOP
			}
			if err := w.step(fd, at.child(name), false); err != nil {
				return err
			}
			rest = target + "/" + rest
			if target[0] == '/' {
				at = w.top
				if dir, err = replace(dir, w.root, "."); err != nil {
					return err
				}
				if onlySlashes(rest) {
					return w.here(dir, at, true)
				}
			}
			continue
		}
		at = at.child(name)
		if last {
			return w.step(fd, at, true)
		}
		if !isDir {
			syscall.Close(fd)
			return syscall.ENOTDIR
		}
		deeper, err := openPath(fd, ".", 0)
		if err != nil {
			syscall.Close(fd)
			return err
		}
		syscall.Close(dir)
		dir = deeper
		if err := w.step(fd, at, false); err != nil {
			return err
		}
	}
	return nil
}

// here shows the directory that dir is.
func (w *walker) here(dir int, at *place, last bool) error {
	fd, err := openPath(dir, ".", 0)
	if err != nil {
		return err
	}
	return w.step(fd, at, last)
}

// replace gives a descriptor of name in from, and closes old.
func replace(old, from int, name string) (int, error) {
	fd, err := openPath(from, name, 0)
	if err != nil {
		return old, err
	}
	syscall.Close(old)
	return fd, nil
}

// inspect says where a symbolic link leads, or whether fd is a directory.
func inspect(fd int) (target string, isDir bool, err error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return "", false, err
	}
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFDIR:
		return "", true, nil
	case syscall.S_IFLNK:
		buf := make([]byte, linkBytes)
		n, err := readLink(fd, buf)
		if err != nil || n == 0 {
			return "", false, syscall.EINVAL
		}
		return string(buf[:n]), false, nil
	}
	return "", false, nil
}

// cutName takes the first name off a path.
func cutName(path string) (name, rest string) {
	start := 0
	for start < len(path) && path[start] == '/' {
		start++
	}
	end := start
	for end < len(path) && path[end] != '/' {
		end++
	}
	return path[start:end], path[end:]
}

func onlySlashes(path string) bool {
	name, _ := cutName(path)
	return name == ""
}

// stronger picks the rule that denies, else the one that was there first.
func stronger(old, rule uint32) uint32 {
	if old == 0 || old&denies == 0 && rule&denies != 0 {
		return rule
	}
	return old
}

// unreachable says whether an error of a walk is about the path. Else it is
// about the machine.
func unreachable(err error) bool {
	errno, ok := err.(syscall.Errno)
	return ok && errno != syscall.EMFILE && errno != syscall.ENFILE && errno != syscall.ENOMEM
}

// lost notes a rule whose path leads nowhere; other errors stay errors.
func (n *next) lost(rule uint32, err error) error {
	if !unreachable(err) {
		return err
	}
	n.note(rule, absentLost, err.(syscall.Errno))
	return nil
}

// note keeps what is to be said of a rule, once.
func (n *next) note(rule uint32, why byte, errno syscall.Errno) {
	a := absent{rule &^ denies, why, errno}
	if !n.noted[a] {
		n.noted[a] = true
		n.absent = append(n.absent, a)
	}
}

// list denies the program a path leads to: the object seen through the
// overlay, and the one in the image below it, which hard links share.
func (n *next) list(root guardedRoot, d programRule) error {
	var found bool
	w := walker{root: root.overlay, top: &place{}, absent: func(*place, string) error { return nil }}
	w.step = func(fd int, _ *place, last bool) error {
		if !last {
			return syscall.Close(fd)
		}
		found = true
		m, err := n.g.take(fd)
		if err != nil {
			return fail("mark", strconv.Quote(d.path), err)
		}
		s := n.meaning(m)
		s.exec = stronger(s.exec, d.rule)
		return nil
	}
	if err := n.lost(d.rule, w.walk(d.path)); err != nil {
		return err
	}
	w.root, w.step = root.image, func(fd int, _ *place, last bool) error {
		defer syscall.Close(fd)
		if last {
			found = true
			return n.listImage(root, fd, d.rule)
		}
		return nil
	}
	err := n.lost(d.rule, w.walk(d.path))
	if err == nil && !found {
		n.note(d.rule, absentLost, syscall.ENOENT)
	}
	return err
}

// listImage denies an inode of the image.
func (n *next) listImage(root guardedRoot, fd int, rule uint32) error {
	key, err := n.g.object(root, fd)
	if err != nil || key == "" {
		return err
	}
	p := n.program(key)
	p.denied = stronger(p.denied, rule)
	return nil
}
