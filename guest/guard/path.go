package guard

import "syscall"

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
// keeps or closes fd, and the last name to name, with the directory it is or
// would be in; dir stays walker's.
type walker struct {
	root int
	step func(fd int, last bool) error
	name func(dir int, name string, there bool) error
}

func (w *walker) walk(path string) error {
	dir, err := openPath(w.root, ".", 0)
	if err != nil {
		return err
	}
	defer func() { syscall.Close(dir) }()
	links, rest := 0, path
	for steps := 0; ; steps++ {
		var name string
		name, rest = cutName(rest)
		if name == "" {
			// Nothing but slashes: the root itself, or a link to it.
			fd, err := openPath(dir, ".", 0)
			if err != nil {
				return err
			}
			return w.step(fd, true)
		}
		if steps >= maxSteps {
			return syscall.ENAMETOOLONG
		}
		if name == "." {
			continue
		}
		if name == ".." {
			if dir, err = w.up(dir); err != nil {
				return err
			}
			continue
		}
		fd, err := openPath(dir, name, syscall.O_NOFOLLOW)
		if err == syscall.ENOENT {
			return w.name(dir, name, false)
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
			if err := w.step(fd, false); err != nil {
				return err
			}
			rest = target + "/" + rest
			if target[0] == '/' {
				if dir, err = w.back(dir); err != nil {
					return err
				}
			}
			continue
		}
		if last {
			if err := w.name(dir, name, true); err != nil {
				syscall.Close(fd)
				return err
			}
			return w.step(fd, true)
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
		if err := w.step(fd, false); err != nil {
			return err
		}
	}
}

// up goes to the parent, but never above the root.
func (w *walker) up(dir int) (int, error) {
	var here, root syscall.Stat_t
	if err := syscall.Fstat(dir, &here); err != nil {
		return dir, err
	}
	if err := syscall.Fstat(w.root, &root); err != nil {
		return dir, err
	}
	if here.Dev == root.Dev && here.Ino == root.Ino {
		return dir, nil
	}
	return replace(dir, dir, "..")
}

func (w *walker) back(dir int) (int, error) { return replace(dir, w.root, ".") }

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

// meaning gives what the object behind fd means to the policy on its way.
func (n *next) meaning(fd int) (*meaning, error) {
	m, err := n.g.take(fd)
	if err != nil {
		return nil, err
	}
	m.slot[n.slot].generation = n.p.generation
	return &m.slot[n.slot], nil
}

// protect marks what a path leads to, and keeps what leads there in place.
// The last name has the rule too: whatever comes to bear it is protected.
func (n *next) protect(root int, f fileRule) error {
	rule := stronger(f.write, f.read)
	w := walker{root: root}
	w.step = func(fd int, last bool) error {
		m, err := n.meaning(fd)
		if err != nil {
			return err
		}
		m.anchor = stronger(m.anchor, rule)
		if last {
			m.write, m.read = stronger(m.write, f.write), stronger(m.read, f.read)
		}
		return nil
	}
	w.name = func(dir int, name string, there bool) error {
		why := byte(absentName)
		if len(name) >= nameSize {
			why = absentLost
		} else if err := n.protectName(dir, name, f); err != nil {
			return err
		}
		if !there {
			n.absent = append(n.absent, absent{rule, why})
		}
		return nil
	}
	return n.lost(rule, w.walk(f.path))
}

func (n *next) protectName(dir int, name string, f fileRule) error {
	fd, err := openPath(dir, ".", 0)
	if err != nil {
		return err
	}
	m, err := n.meaning(fd)
	if err != nil {
		return err
	}
	if m.names == 0 {
		n.sets++
		m.names = n.sets
	}
	var key [4 + nameSize]byte
	put32(key[:], m.names)
	copy(key[4:], name)
	rules := n.names[string(key[:])]
	n.names[string(key[:])] = [2]uint32{stronger(rules[0], f.write), stronger(rules[1], f.read)}
	return nil
}

// lost notes a rule whose path leads nowhere; other errors stay errors.
func (n *next) lost(rule uint32, err error) error {
	switch err {
	case syscall.ENOTDIR, syscall.ELOOP, syscall.ENAMETOOLONG:
		n.absent = append(n.absent, absent{rule, absentLost})
		return nil
	}
	return err
}

// list denies the program a path leads to: the object seen through the
// overlay, and the one in the image below it, which hard links share.
func (n *next) list(root guardedRoot, d programRule) error {
	var found bool
	w := walker{root: root.overlay, name: func(int, string, bool) error { return nil }}
	w.step = func(fd int, last bool) error {
		if !last {
			return syscall.Close(fd)
		}
		found = true
		m, err := n.meaning(fd)
		if err == nil {
			m.exec = stronger(m.exec, d.rule)
		}
		return err
	}
	if err := n.lost(d.rule, w.walk(d.path)); err != nil {
		return err
	}
	w.root, w.step = root.image, func(fd int, last bool) error {
		defer syscall.Close(fd)
		if last {
			found = true
			return n.listImage(root.device, fd, d.rule)
		}
		return nil
	}
	err := n.lost(d.rule, w.walk(d.path))
	if err == nil && !found {
		n.absent = append(n.absent, absent{d.rule, absentLost})
	}
	return err
}

// listImage denies an inode of the image. In erofs stat shows the number the
// kernel uses, and it is never given to another.
func (n *next) listImage(device uint32, fd int, rule uint32) error {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return err
	}
	p := n.program(objectKey(device, st.Ino))
	p.denied = stronger(p.denied, rule)
	return nil
}
