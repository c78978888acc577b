package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"unsafe"
)

// More ways to a file than open and write.
var wayAttacks = map[string]func([]string) error{
	"tmplink":    tmpLink,
	"byhandle":   byHandle,
	"splicein":   func(a []string) error { return fill(a[0], spliceIn) },
	"copyrange":  func(a []string) error { return fill(a[0], copyRange) },
	"sendfilein": func(a []string) error { return fill(a[0], sendFileIn) },
	"fallocate": func(a []string) error {
		return fill(a[0], func(f *os.File) error { return syscall.Fallocate(int(f.Fd()), 0, 0, 8192) })
	},
	"mapstore":   mapStore,
	"opentrunc":  openTrunc,
	"whiteoutto": func(a []string) error { return rename2(a[0], a[1], 4) },
	"socketat":   socketAt,
	"bindwrite":  bindWrite,
	"fdopen":     fdOpen,
	"mapfiles":   mapFiles,
	"uopen":      func(a []string) error { return uringOpen(a[0]) },
	"uwrite":     uringWrite,
	"urename":    func(a []string) error { return uringPaths(35, a[0], a[1]) },
	"ulink":      func(a []string) error { return uringPaths(39, a[0], a[1]) },
	"uunlink":    func(a []string) error { return uringPaths(36, a[0], "") },
	"umkdir":     func(a []string) error { return uringPaths(37, a[0], "") },
	"usymlink":   func(a []string) error { return uringPaths(38, "/tmp", a[0]) },
	"overwith":   overWith,
}

const tmpFile = 0x410000 // O_TMPFILE

// tmpLink writes a file without a name in one directory and gives it one in
// another.
func tmpLink(a []string) error {
	fd, err := syscall.Open(a[0], tmpFile|syscall.O_RDWR, 0o644)
	if err != nil {
		return void(err)
	}
	if _, err := syscall.Write(fd, []byte("mine")); err != nil {
		return void(err)
	}
	from, _ := syscall.BytePtrFromString(fmt.Sprint("/proc/self/fd/", fd))
	to, _ := syscall.BytePtrFromString(a[1])
	const follow, cwd = 0x400, ^uintptr(99)
	return call(syscall.SYS_LINKAT, cwd, uintptr(unsafe.Pointer(from)), cwd, uintptr(unsafe.Pointer(to)), follow)
}

// byHandle opens a file by its handle, without any name.
func byHandle(a []string) error {
	var handle struct {
		size uint32
		kind int32
		data [128]byte
	}
	handle.size = 128
	var mount int32
	const nameToHandle, openByHandle, cwd = 303, 304, ^uintptr(99)
	path, _ := syscall.BytePtrFromString(a[0])
	if err := call(nameToHandle, cwd, uintptr(unsafe.Pointer(path)), uintptr(unsafe.Pointer(&handle)), uintptr(unsafe.Pointer(&mount)), 0); err != nil {
		return void(err)
	}
	dir, err := syscall.Open(filepath.Dir(a[0]), syscall.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return void(err)
	}
	fd, _, errno := syscall.Syscall(openByHandle, uintptr(dir), uintptr(unsafe.Pointer(&handle)), syscall.O_WRONLY)
	if errno != 0 {
		return errno
	}
	_, err = syscall.Write(int(fd), []byte("mine"))
	return err
}

// fill opens a file to have it filled by other means than write.
func fill(path string, with func(*os.File) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	return with(f)
}

func spliceIn(f *os.File) error {
	var p [2]int
	if err := syscall.Pipe(p[:]); err != nil {
		return void(err)
	}
	if _, err := syscall.Write(p[1], []byte("mine")); err != nil {
		return void(err)
	}
	_, err := syscall.Splice(p[0], nil, int(f.Fd()), nil, 4, 0)
	return err
}

func copyRange(f *os.File) error {
	in, err := os.Open("/etc/other")
	if err != nil {
		return void(err)
	}
	n, _, errno := syscall.Syscall6(326, in.Fd(), 0, f.Fd(), 0, 1, 0)
	switch {
	case errno == syscall.EXDEV: // of another file system; the file was open all the same
		return nil
	case errno != 0:
		return errno
	case n != 1:
		return void(errors.New("nothing was copied"))
	}
	return nil
}

func sendFileIn(f *os.File) error {
	in, err := os.Open("/etc/other")
	if err != nil {
		return void(err)
	}
	_, err = syscall.Sendfile(int(f.Fd()), int(in.Fd()), nil, 1)
	return err
}

// mapStore writes through a shared mapping alone.
func mapStore(a []string) error {
	f, err := os.OpenFile(a[0], os.O_RDWR, 0)
	if err != nil {
		return err
	}
	m, err := syscall.Mmap(int(f.Fd()), 0, 4, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return void(err)
	}
	f.Close()
	copy(m, "mine")
	return nil
}

// openTrunc empties a file that is opened to be read.
func openTrunc(a []string) error {
	fd, err := syscall.Open(a[0], syscall.O_RDONLY|syscall.O_TRUNC, 0)
	if err == nil {
		syscall.Close(fd)
	}
	return err
}

func socketAt(a []string) error {
	s, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return void(err)
	}
	if err := void(os.Chdir(filepath.Dir(a[0]))); err != nil { // the address has little room
		return err
	}
	err = syscall.Bind(s, &syscall.SockaddrUnix{Name: filepath.Base(a[0])})
	if err == syscall.EADDRINUSE {
		return void(err)
	}
	return err
}

// bindWrite writes through another mount of the directory.
func bindWrite(a []string) error {
	if err := void(os.MkdirAll("/tmp/other-mount", 0o755)); err != nil {
		return err
	}
	if err := void(syscall.Mount(filepath.Dir(a[0]), "/tmp/other-mount", "", syscall.MS_BIND, "")); err != nil {
		return err
	}
	return write("/tmp/other-mount/" + filepath.Base(a[0]))
}

// fdOpen opens for writing, by /proc, what is open to be read.
func fdOpen(a []string) error {
	f, err := os.Open(a[0])
	if err != nil {
		return void(err)
	}
	defer f.Close()
	return write(fmt.Sprint("/proc/self/fd/", f.Fd()))
}

// mapFiles opens for writing what is mapped to be read.
func mapFiles(a []string) error {
	f, err := os.Open(a[0])
	if err != nil {
		return void(err)
	}
	defer f.Close()
	size := os.Getpagesize()
	m, err := syscall.Mmap(int(f.Fd()), 0, size, syscall.PROT_READ, syscall.MAP_SHARED)
	if err != nil {
		return void(err)
	}
	at := uintptr(unsafe.Pointer(&m[0]))
	return write(fmt.Sprintf("/proc/self/map_files/%x-%x", at, at+uintptr(size)))
}

// overWith puts a file of its own, made beside it, in the place of another.
func overWith(a []string) error {
	if err := void(os.WriteFile(a[0], []byte("mine"), 0o644)); err != nil {
		return err
	}
	return syscall.Rename(a[0], a[1])
}

// ring makes one request of io_uring and gives its result.
func ring(request [64]byte) (int, error) {
	var params [120]byte
	le := binary.LittleEndian
	fd, _, errno := syscall.Syscall(425, 4, uintptr(unsafe.Pointer(&params)), 0)
	if errno != 0 {
		return 0, void(errno)
	}
	defer syscall.Close(int(fd))
	const sqOff, cqOff, offSQEs = 40, 80, 0x10000000
	rings, err := syscall.Mmap(int(fd), 0, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return 0, void(err)
	}
	entries, err := syscall.Mmap(int(fd), offSQEs, 4096, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	if err != nil {
		return 0, void(err)
	}
	copy(entries, request[:])
	le.PutUint32(rings[le.Uint32(params[sqOff+24:]):], 0) // array
	le.PutUint32(rings[le.Uint32(params[sqOff+4:]):], 1)  // tail
	if _, _, errno := syscall.Syscall6(426, fd, 1, 1, 1, 0, 0); errno != 0 {
		return 0, void(errno)
	}
	done := rings[le.Uint32(params[cqOff+20:]):]
	result := int(int32(le.Uint32(done[8:])))
	if result < 0 {
		return 0, syscall.Errno(-result)
	}
	return result, nil
}

func uringOpen(path string) error {
	p, _ := syscall.BytePtrFromString(path)
	var r [64]byte
	le := binary.LittleEndian
	r[0] = 18
	le.PutUint32(r[4:], ^uint32(99))
	le.PutUint64(r[16:], uint64(uintptr(unsafe.Pointer(p))))
	le.PutUint32(r[28:], syscall.O_WRONLY|syscall.O_CREAT)
	le.PutUint32(r[24:], 0o644)
	_, err := ring(r)
	runtime.KeepAlive(p)
	return err
}

// uringWrite opens and writes by requests alone.
func uringWrite(a []string) error {
	p, _ := syscall.BytePtrFromString(a[0])
	var r [64]byte
	le := binary.LittleEndian
	r[0] = 18
	le.PutUint32(r[4:], ^uint32(99))
	le.PutUint64(r[16:], uint64(uintptr(unsafe.Pointer(p))))
	le.PutUint32(r[28:], syscall.O_WRONLY)
	fd, err := ring(r)
	if err != nil {
		return err
	}
	text := []byte("mine")
	r = [64]byte{23}
	le.PutUint32(r[4:], uint32(fd))
	le.PutUint64(r[16:], uint64(uintptr(unsafe.Pointer(&text[0]))))
	le.PutUint32(r[24:], 4)
	n, err := ring(r)
	runtime.KeepAlive(p)
	runtime.KeepAlive(text)
	if err == nil && n != 4 {
		return void(errors.New("nothing was written"))
	}
	return err
}

// uringPaths makes a request about one or two paths.
func uringPaths(code byte, first, second string) error {
	a, _ := syscall.BytePtrFromString(first)
	b, _ := syscall.BytePtrFromString(second)
	var r [64]byte
	le := binary.LittleEndian
	r[0] = code
	le.PutUint32(r[4:], ^uint32(99))
	le.PutUint64(r[16:], uint64(uintptr(unsafe.Pointer(a))))
	switch code {
	case 35, 39: // where the second is
		le.PutUint32(r[24:], ^uint32(99))
		fallthrough
	case 38:
		le.PutUint64(r[8:], uint64(uintptr(unsafe.Pointer(b))))
	case 37:
		le.PutUint32(r[24:], 0o755)
	}
	_, err := ring(r)
	runtime.KeepAlive(a)
	runtime.KeepAlive(b)
	return err
}
