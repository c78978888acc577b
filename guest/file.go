package guest

import (
	"strconv"
	"syscall"
)

// failure is an error with a number for the host and a text for people.
type failure struct {
	errno syscall.Errno
	text  string
}

func (f *failure) Error() string { return f.text }

// fail names what was tried on what, and why it was not done.
func fail(verb, object string, cause error) error {
	errno := syscall.EINVAL
	switch c := cause.(type) {
	case syscall.Errno:
		errno = c
	case *failure:
		errno = c.errno
	}
	return &failure{errno, verb + " " + object + ": " + cause.Error()}
}

// readFile reads the file into buf, as far as it goes.
func readFile(path string, buf []byte) ([]byte, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail("open", path, err)
	}
	defer syscall.Close(fd)
	n, err := readFull(fd, buf)
	if err != nil {
		return nil, fail("read", path, err)
	}
	return buf[:n], nil
}

// readFull reads until buf is full or the file ends.
func readFull(fd int, buf []byte) (n int, err error) {
	for n < len(buf) {
		m, err := syscall.Read(fd, buf[n:])
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return n, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}

// readAll reads a file of at most limit bytes.
func readAll(path string, limit int64) ([]byte, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err // the caller tells absent from broken
	}
	defer syscall.Close(fd)
	return readDescriptor(fd, path, limit)
}

func readDescriptor(fd int, path string, limit int64) ([]byte, error) {
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return nil, fail("stat", path, err)
	}
	if st.Size > limit {
		return nil, fail("read", path, syscall.EFBIG)
	}
	buf := make([]byte, st.Size)
	n, err := readFull(fd, buf)
	if err != nil {
		return nil, fail("read", path, err)
	}
	return buf[:n], nil
}

// mapFile reads a file that is not empty into mapped memory.
func mapFile(path string, limit int64) ([]byte, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err // the caller tells absent from broken
	}
	defer syscall.Close(fd)
	var st syscall.Stat_t
	if err := syscall.Fstat(fd, &st); err != nil {
		return nil, fail("stat", path, err)
	}
	if st.Size > limit {
		return nil, fail("read", path, syscall.EFBIG)
	}
	b, err := mapMemory(int(st.Size))
	if err != nil {
		return nil, fail("map", path, err)
	}
	if n, err := readFull(fd, b); err != nil || n < len(b) {
		_ = syscall.Munmap(b)
		return nil, fail("read", path, syscall.EIO)
	}
	return b, nil
}

// writeFile writes to a file that is there, as those of proc and sys are.
func writeFile(path, value string) error {
	fd, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return fail("open", path, err)
	}
	defer syscall.Close(fd)
	if _, err := syscall.Write(fd, []byte(value)); err != nil {
		return fail("write "+strconv.Quote(value)+" to", path, err)
	}
	return nil
}

// replaceFile makes a new file in place of whatever is at path.
func replaceFile(path string, data []byte, mode uint32) error {
	if err := syscall.Unlink(path); err != nil && err != syscall.ENOENT {
		return fail("replace", strconv.Quote(path), err)
	}
	fd, err := syscall.Open(path, syscall.O_WRONLY|syscall.O_CREAT|syscall.O_EXCL|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, mode)
	if err != nil {
		return fail("create", strconv.Quote(path), err)
	}
	defer syscall.Close(fd)
	for len(data) > 0 {
		n, err := syscall.Write(fd, data)
		if err != nil && err != syscall.EINTR {
			return fail("write", strconv.Quote(path), err)
		}
		data = data[max(n, 0):]
	}
	return syscall.Fchmod(fd, mode)
}

// makeDirs makes path and what leads to it.
func makeDirs(path string, mode uint32) error {
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			continue
		}
		if err := syscall.Mkdir(path[:i], mode); err != nil && err != syscall.EEXIST {
			return fail("make directory", strconv.Quote(path[:i]), err)
		}
	}
	return nil
}

// listDir gives the names in a directory.
func listDir(path string) ([]string, error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail("open", path, err)
	}
	defer syscall.Close(fd)
	var names []string
	buf := make([]byte, 4096)
	for {
		n, err := syscall.ReadDirent(fd, buf)
		if err != nil {
			return nil, fail("list", path, err)
		}
		if n <= 0 {
			return names, nil
		}
		_, _, names = syscall.ParseDirent(buf[:n], -1, names)
	}
}

// nextLine cuts the first line off b.
func nextLine(b []byte) (line, rest []byte) {
	for i, c := range b {
		if c == '\n' {
			return b[:i], b[i+1:]
		}
	}
	return b, nil
}

// number reads the first decimal number in b, 0 if there is none.
func number(b []byte) (n uint64) {
	i := 0
	for i < len(b) && (b[i] < '0' || b[i] > '9') {
		i++
	}
	for ; i < len(b) && b[i] >= '0' && b[i] <= '9'; i++ {
		n = n*10 + uint64(b[i]-'0')
	}
	return n
}

// field finds the line of b that starts with name and reads its number.
func field(b []byte, name string) uint64 {
	for len(b) > 0 {
		var line []byte
		line, b = nextLine(b)
		if len(line) > len(name) && string(line[:len(name)]) == name {
			return number(line[len(name):])
		}
	}
	return 0
}

// trim drops a line's end.
func trim(b []byte) string {
	line, _ := nextLine(b)
	return string(line)
}
