package guest

import (
	"strconv"
	"syscall"
)

const (
	asPath = 0x200000 // O_PATH
	atCwd  = -100
)

// inside resolves paths in a container before it runs: the image's symbolic
// links may lead anywhere in it, and nowhere else, not even by way of what
// /proc shows of this process.
type inside struct{ root int }

// openInside takes the root of this process, which is the container's.
func openInside() (inside, error) {
	root, err := syscall.Open("/", asPath|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return inside{}, fail("open", "/", err)
	}
	return inside{root}, nil
}

func (in inside) close() { _ = syscall.Close(in.root) }

// open opens what is at a path.
func (in inside) open(path string, flags int) (int, error) {
	return openat2(in.root, path, flags, 0, resolveInRoot|resolveNoMagicLinks)
}

// dir opens a directory, and makes it and what leads to it if it is missing.
func (in inside) dir(path string, mode uint32) (int, error) {
	fd, err := in.open(path, asPath|syscall.O_DIRECTORY)
	if err != syscall.ENOENT {
		return opened(fd, path, err)
	}
	if fd, err = in.open("/", asPath|syscall.O_DIRECTORY); err != nil {
		return opened(fd, path, err)
	}
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' || path[i-1] == '/' {
			continue
		}
		next, err := in.open(path[:i], asPath|syscall.O_DIRECTORY)
		if err == syscall.ENOENT {
			if err = syscall.Mkdirat(fd, lastName(path[:i]), mode); err == nil || err == syscall.EEXIST {
				next, err = in.open(path[:i], asPath|syscall.O_DIRECTORY)
			}
		}
		_ = syscall.Close(fd)
		if err != nil {
			return opened(-1, path, err)
		}
		fd = next
	}
	return fd, nil
}

func opened(fd int, path string, err error) (int, error) {
	if err != nil {
		return -1, fail("open", strconv.Quote(path), err)
	}
	return fd, nil
}

// target opens what a mount goes over, and makes it if it is missing: a
// directory, or a file.
func (in inside) target(path string, isDir bool) (int, error) {
	if isDir {
		return in.dir(path, 0o755)
	}
	fd, err := in.open(path, asPath)
	if err != syscall.ENOENT {
		return opened(fd, path, err)
	}
	dir, err := in.dir(parent(path), 0o755)
	if err != nil {
		return -1, err
	}
	defer syscall.Close(dir)
	fd, err = syscall.Openat(dir, lastName(path), syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o644)
	return opened(fd, path, err)
}

// replaceFile makes a new file in place of whatever is at path.
func (in inside) replaceFile(path string, data []byte, mode uint32) error {
	dir, err := in.dir(parent(path), 0o755)
	if err != nil {
		return err
	}
	defer syscall.Close(dir)
	name := lastName(path)
	if err := unlinkat(dir, name, 0); err != nil && err != syscall.ENOENT {
		return fail("replace", strconv.Quote(path), err)
	}
	fd, err := syscall.Openat(dir, name, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, mode)
	if err != nil {
		return fail("create", strconv.Quote(path), err)
	}
	defer syscall.Close(fd)
	if err := writeAll(fd, data); err != nil {
		return fail("write", strconv.Quote(path), err)
	}
	return syscall.Fchmod(fd, mode)
}

// writeAll writes all of data.
func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := syscall.Write(fd, data)
		if err != nil && err != syscall.EINTR {
			return err
		}
		data = data[max(n, 0):]
	}
	return nil
}

// parent is the directory of a path.
func parent(path string) string {
	for i := len(path) - 1; i > 0; i-- {
		if path[i] == '/' {
			return path[:i]
		}
	}
	return "/"
}

// lastName is the name of a path in its directory.
func lastName(path string) string {
	for i := len(path) - 1; i >= 0; i-- {
		if path[i] == '/' {
			return path[i+1:]
		}
	}
	return path
}

// absolute checks a path of the host's: from the root, with nothing in it that
// leads back. A slash at its end goes.
func absolute(path string) (string, bool) {
	for len(path) > 1 && path[len(path)-1] == '/' {
		path = path[:len(path)-1]
	}
	if path == "" || path[0] != '/' {
		return "", false
	}
	for rest := path[1:]; rest != ""; {
		var name string
		name, rest = cut(rest, '/')
		if name == "" || name == "." || name == ".." {
			return "", false
		}
		for i := range len(name) {
			if name[i] == 0 {
				return "", false
			}
		}
	}
	return path, true
}
