package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// writeProtected changes a file that should not change, in every way there is;
// what can be undone is.
func writeProtected(args []string) []Step {
	path := argument(args, "ATTACK_FILE", "/etc/passwd")
	dir := filepath.Dir(path)
	aside := filepath.Join(dir, ".aside")
	st, err := os.Stat(path)
	if err != nil {
		return []Step{{Try: "look at " + path, Seen: why(err)}}
	}
	return []Step{
		step("open it for writing", func() error { return appendTo(path) }),
		step("write through a hard link", func() error {
			if err := os.Link(path, aside); err != nil {
				return err
			}
			defer os.Remove(aside)
			return appendTo(aside)
		}),
		step("change its mode", func() error {
			if err := os.Chmod(path, 0o666); err != nil {
				return err
			}
			return os.Chmod(path, st.Mode())
		}),
		step("change its owner", func() error { return os.Chown(path, 0, 0) }),
		step("change its attributes", func() error {
			if err := unix.Setxattr(path, "trusted.attack", []byte("x"), 0); err != nil {
				return err
			}
			return unix.Removexattr(path, "trusted.attack")
		}),
		step("truncate it", func() error { return os.Truncate(path, st.Size()) }),
		step("rename it away", func() error {
			if err := os.Rename(path, aside); err != nil {
				return err
			}
			return os.Rename(aside, path)
		}),
		step("rename another over it", func() error { return replaceBy(path, aside, func() error { return os.Rename(aside, path) }) }),
		step("remove and make it again", func() error {
			return replaceBy(path, aside, func() error {
				if err := os.Remove(path); err != nil {
					return err
				}
				return os.Rename(aside, path)
			})
		}),
		step("mount another over it", func() error {
			return replaceBy(path, aside, func() error {
				if err := unix.Mount(aside, path, "", unix.MS_BIND, ""); err != nil {
					return err
				}
				return unix.Unmount(path, unix.MNT_DETACH)
			})
		}),
		step("rename its directory away", func() error {
			if dir == "/" {
				return unix.EBUSY
			}
			away := dir + ".aside"
			if err := os.Rename(dir, away); err != nil {
				return err
			}
			return os.Rename(away, dir)
		}),
	}
}

func step(try string, do func() error) Step {
	if err := do(); err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	return Step{Try: try, Reached: true, Seen: "done"}
}

func appendTo(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString("\n")
	return errors.Join(err, f.Close())
}

// replaceBy writes a copy aside and lets do put it in the place of path.
func replaceBy(path, aside string, do func() error) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := os.WriteFile(aside, raw, 0o644); err != nil {
		return err
	}
	defer os.Remove(aside)
	return do()
}

// unloadGuard tries, as root of the guest, every power by which what watches
// it could be switched off or blinded. A step has reached its end if the
// kernel let it through, whether or not there was something to switch off.
func unloadGuard([]string) []Step {
	return append(bpfSteps(),
		step("unload module overlay", func() error { return permitted(unix.DeleteModule("overlay", unix.O_NONBLOCK)) }),
		step("load a module", loadModule),
		killInit(),
		step("mount securityfs", mountSecurity),
		step("write lockdown", func() error {
			return os.WriteFile("/sys/kernel/security/lockdown", []byte("none"), 0)
		}),
		openPort(),
		step("open the memory of PID 1", func() error {
			f, err := os.OpenFile("/proc/1/mem", os.O_RDWR, 0)
			if err == nil {
				f.Close()
			}
			return err
		}),
		tracePID1(),
		step("open the kernel's memory", func() error {
			f, err := os.OpenFile("/dev/mem", os.O_RDWR, 0)
			if err == nil {
				f.Close()
			}
			return err
		}),
	)
}

// permitted takes away errors that come after the question whether it is
// allowed.
func permitted(err error) error {
	for _, later := range []error{unix.EAGAIN, unix.EBUSY, unix.ENOENT, unix.ENOEXEC, unix.EINVAL} {
		if errors.Is(err, later) {
			return nil
		}
	}
	return err
}

// loadModule offers the kernel something that is no module.
func loadModule() error {
	fd, err := unix.MemfdCreate("module", 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte("no module at all")); err != nil {
		return err
	}
	return permitted(unix.FinitModule(fd, "", 0))
}

// killInit kills PID 1. The kernel drops the signal if this process lives in
// the same namespace, so only its end counts.
func killInit() Step {
	const try = "kill PID 1"
	if os.Getpid() == 1 {
		return Step{Try: try, Seen: "this is PID 1"}
	}
	if err := unix.Kill(1, unix.SIGKILL); err != nil {
		return Step{Try: try, Seen: why(err)}
	}
	time.Sleep(200 * time.Millisecond)
	if err := unix.Kill(1, 0); err != nil {
		return Step{Try: try, Reached: true, Seen: "it is gone"}
	}
	return Step{Try: try, Seen: "sent, and PID 1 lives"}
}

func mountSecurity() error {
	dir, err := os.MkdirTemp("/tmp", "s-")
	if err != nil {
		return err
	}
	defer os.Remove(dir)
	if err := unix.Mount("none", dir, "securityfs", 0, ""); err != nil {
		return err
	}
	return unix.Unmount(dir, unix.MNT_DETACH)
}

// openPort opens the guest's channel to its host, under its own name or
// through a node made for it.
func openPort() Step {
	const try = "open the channel to the host"
	found, _ := filepath.Glob("/dev/vport*")
	more, _ := filepath.Glob("/dev/virtio-ports/*")
	var last error
	for _, name := range append(found, more...) {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == nil || errors.Is(err, unix.EBUSY) {
			unix.Close(fd)
			return Step{Try: try, Reached: true, Seen: name + " can be opened"}
		}
		last = err
	}
	numbers, _ := filepath.Glob("/sys/class/virtio-ports/*/dev")
	for _, n := range numbers {
		if last = makeNode(n); last == nil {
			return Step{Try: try, Reached: true, Seen: n + " can be opened by a node of its own"}
		}
	}
	if last != nil {
		return Step{Try: try, Seen: why(last)}
	}
	return Step{Try: try, Seen: "there is none to see"}
}

// makeNode makes a device node of the number a sysfs file tells, and opens it.
func makeNode(number string) error {
	raw, err := os.ReadFile(number)
	if err != nil {
		return err
	}
	major, minor, _ := strings.Cut(strings.TrimSpace(string(raw)), ":")
	name := "/tmp/.port"
	if err := unix.Mknod(name, unix.S_IFCHR|0o600, int(unix.Mkdev(atoi(major), atoi(minor)))); err != nil {
		return err
	}
	defer os.Remove(name)
	fd, err := unix.Open(name, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	if errors.Is(err, unix.EBUSY) {
		return nil
	}
	return err
}

func atoi(s string) (n uint32) {
	for _, c := range []byte(s) {
		if c >= '0' && c <= '9' {
			n = n*10 + uint32(c-'0')
		}
	}
	return n
}
