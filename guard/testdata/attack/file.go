package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"
)

var fileAttacks = map[string]func([]string) error{
	"write":      func(a []string) error { return write(a[0]) },
	"read":       read,
	"truncate":   func(a []string) error { return os.Truncate(a[0], 0) },
	"chmod":      func(a []string) error { return os.Chmod(a[0], 0o777) },
	"chown":      func(a []string) error { return os.Chown(a[0], 1, 1) },
	"utimes":     func(a []string) error { return syscall.Utimes(a[0], []syscall.Timeval{{}, {}}) },
	"unlink":     func(a []string) error { return syscall.Unlink(a[0]) },
	"rmdir":      func(a []string) error { return syscall.Rmdir(a[0]) },
	"mkdir":      func(a []string) error { return syscall.Mkdir(a[0], 0o755) },
	"symlink":    func(a []string) error { return syscall.Symlink("/tmp", a[0]) },
	"rename":     func(a []string) error { return syscall.Rename(a[0], a[1]) },
	"exchange":   func(a []string) error { return rename2(a[0], a[1], 2) },
	"over":       over,
	"link":       func(a []string) error { return syscall.Link(a[0], a[1]) },
	"linkdrop":   linkdrop,
	"mkfifo":     func(a []string) error { return syscall.Mkfifo(a[0], 0o644) },
	"setxattr":   func(a []string) error { return syscall.Setxattr(a[0], "trusted.x", []byte("y"), 0) },
	"chattr":     chattr,
	"deep":       deep,
	"chroot":     chrootWrite,
	"bindover":   bindOver,
	"linkinto":   func(a []string) error { return into(a, syscall.Link) },
	"renameinto": func(a []string) error { return into(a, syscall.Rename) },
	"exchangeinto": func(a []string) error {
		return into(a, func(from, to string) error { return rename2(from, to, 2) })
	},
	"tmpfsover": tmpfsOver,
	"bindrun":   bindRun,
	"securityxattr": func(a []string) error {
		return asNobody(func() error { return syscall.Setxattr(a[0], "security.x", []byte("y"), 0) })
	},
}

func write(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString("x")
	return err
}

func read(a []string) error {
	f, err := os.Open(a[0])
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Read(make([]byte, 1)); err != nil && err.Error() != "EOF" && !errors.Is(err, syscall.EISDIR) {
		return err
	}
	return nil
}

func rename2(from, to string, flags uintptr) error {
	f, err := syscall.BytePtrFromString(from)
	if err != nil {
		return void(err)
	}
	t, err := syscall.BytePtrFromString(to)
	if err != nil {
		return void(err)
	}
	const cwd = ^uintptr(99)
	if _, _, errno := syscall.Syscall6(316, cwd, uintptr(unsafe.Pointer(f)), cwd, uintptr(unsafe.Pointer(t)), flags, 0); errno != 0 {
		return errno
	}
	return nil
}

// over puts a file of its own in the place of another.
func over(a []string) error {
	if err := void(os.WriteFile("/tmp/own", []byte("mine"), 0o644)); err != nil {
		return err
	}
	return syscall.Rename("/tmp/own", a[0])
}

// linkdrop gives a file of its own the name of one that is not there.
func linkdrop(a []string) error {
	if err := void(os.WriteFile("/tmp/own", []byte("mine"), 0o644)); err != nil {
		return err
	}
	return syscall.Link("/tmp/own", a[0])
}

// chattr sets an inode flag through a descriptor that only reads.
func chattr(a []string) error {
	f, err := os.Open(a[0])
	if err != nil {
		return void(err)
	}
	flags := uint64(0x40) // no dump
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, f.Fd(), 0x40086602, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		return errno
	}
	return nil
}

// deep writes in a directory that lies deeper than the Guard looks.
func deep(a []string) error {
	if err := void(os.Chdir(a[0])); err != nil {
		return err
	}
	for range 120 {
		if err := os.Mkdir("d", 0o755); err != nil && !errors.Is(err, syscall.EEXIST) {
			return err
		}
		if err := void(os.Chdir("d")); err != nil {
			return err
		}
	}
	return write("file")
}

// chrootWrite writes to a path as it is called after a chroot.
func chrootWrite(a []string) error {
	if err := void(syscall.Chroot(filepath.Dir(a[0]))); err != nil {
		return err
	}
	return write("/" + filepath.Base(a[0]))
}

// bindOver covers a path with a directory of its own.
func bindOver(a []string) error {
	if err := os.MkdirAll("/tmp/cover", 0o755); err != nil {
		return void(err)
	}
	return syscall.Mount("/tmp/cover", a[0], "", syscall.MS_BIND, "")
}

// into writes a program and gives it another name.
func into(a []string, name func(from, to string) error) error {
	if err := copySelf(a[0]); err != nil {
		return err
	}
	return name(a[0], a[1])
}

// tmpfsOver covers a path with a file system of its own and runs what it puts
// there.
func tmpfsOver(a []string) error {
	if err := os.MkdirAll(a[0], 0o755); err != nil {
		return void(err)
	}
	if err := syscall.Mount("tmpfs", a[0], "tmpfs", 0, ""); err != nil {
		return void(err)
	}
	return drop([]string{a[0] + "/x"})
}

// bindRun covers a path with another directory of the same file system and runs
// what it put there.
func bindRun(a []string) error {
	if err := os.MkdirAll("/shm/cover", 0o755); err != nil {
		return void(err)
	}
	if err := syscall.Mount("/shm/cover", a[0], "", syscall.MS_BIND, ""); err != nil {
		return void(err)
	}
	return drop([]string{a[0] + "/x"})
}

// asNobody runs f in a thread without root's rights.
func asNobody(f func() error) error {
	const nobody = 65534
	if err := syscall.Setresuid(nobody, nobody, 0); err != nil {
		return void(fmt.Errorf("become nobody: %w", err))
	}
	return f()
}
