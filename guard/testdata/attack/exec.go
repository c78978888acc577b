package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

var execAttacks = map[string]func([]string) error{
	"nothing":    func([]string) error { return nil },
	"serve":      func([]string) error { time.Sleep(time.Hour); return nil },
	"exec":       func(a []string) error { return spawn(a[0]) },
	"as":         func(a []string) error { return as(nil, a) },
	"env":        func(a []string) error { return as(a[:1], a[1:]) },
	"manyenv":    func(a []string) error { return as(append(manyVariables(), a[0]), a[1:]) },
	"args":       args,
	"readown":    readOwn,
	"readmemfd":  readMemfd,
	"drop":       drop,
	"memfd":      memfd,
	"unlinked":   unlinked,
	"touched":    touched,
	"script":     script,
	"revshell":   revshell,
	"pipeshell":  pipeshell,
	"underfire":  underfire,
	"execthread": execthread,
}

// named does what it is told under another name than its own.
func named(a []string) error {
	if err := void(os.WriteFile("/proc/self/comm", []byte(a[0]), 0)); err != nil {
		return err
	}
	return do(a[1:])
}

// inThread does what it is told in a thread that is not the first.
func inThread(a []string) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		go func() {
			runtime.LockOSThread()
			result <- do(a)
		}()
	}()
	return <-result
}

// spawn runs a program that does nothing and checks that it did.
func spawn(path string, args ...string) error {
	if len(args) == 0 {
		args = []string{"nothing"}
	}
	out, err := exec.Command(path, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w %s", err, out)
	}
	return nil
}

// as has another copy of this program make the attempt, with env besides what it
// would have anyway.
func as(env, args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil && cmd.ProcessState != nil && cmd.ProcessState.ExitCode() == 11 {
		return void(fmt.Errorf("%w %s", err, out))
	}
	if err != nil {
		return fmt.Errorf("%w %s", err, out)
	}
	return nil
}

// manyVariables hide one among them.
func manyVariables() (env []string) {
	for i := range 300 {
		env = append(env, fmt.Sprintf("VARIABLE_%d=%s", i, strings.Repeat("x", i%40)))
	}
	return env
}

// args starts an interpreter with options. What stands in for it looks at its
// last argument but those that begin with a dash; "path=name" gives it a name
// of its own.
func args(a []string) error {
	path, name, ok := strings.Cut(a[0], "=")
	if !ok {
		name = path
	}
	cmd := exec.Command(path, a[1:]...)
	cmd.Args[0] = name
	cmd.Env = append(os.Environ(), "OPTIONS=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w %s", err, out)
	}
	return nil
}

// readOwn reads what it wrote.
func readOwn(a []string) error {
	if err := void(os.WriteFile(a[0], []byte("echo"), 0o644)); err != nil {
		return err
	}
	return read(a)
}

// readMemfd reads what lies in memory only, by its name in proc.
func readMemfd([]string) error {
	fd, err := newMemfd()
	if err != nil {
		return void(err)
	}
	return read([]string{fmt.Sprintf("/proc/self/fd/%d", fd)})
}

func copySelf(to string) error {
	b, err := os.ReadFile("/attack")
	if err != nil {
		return void(err)
	}
	return void(os.WriteFile(to, b, 0o755))
}

// drop writes a program and runs it.
func drop(a []string) error {
	if err := copySelf(a[0]); err != nil {
		return err
	}
	return spawn(a[0])
}

func newMemfd() (int, error) {
	name := append([]byte("x"), 0)
	fd, _, errno := syscall.Syscall(319, uintptr(unsafe.Pointer(&name[0])), 0, 0)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

func memfd([]string) error {
	fd, err := newMemfd()
	if err != nil {
		return void(err)
	}
	path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)
	if err := copySelf(path); err != nil {
		return err
	}
	return spawn(path)
}

// unlinked runs a program of the image after taking its name away.
func unlinked([]string) error {
	f, err := os.Open("/bin/tool")
	if err != nil {
		return void(err)
	}
	if err := os.Remove("/bin/tool"); err != nil {
		return void(err)
	}
	return spawn(fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()))
}

// touched changes an attribute of an image's program, which moves it to the
// writable layer.
func touched([]string) error {
	if err := os.Chmod("/bin/tool", 0o711); err != nil {
		return void(err)
	}
	return spawn("/bin/tool")
}

// script runs a script it wrote, through an interpreter of the image.
func script([]string) error {
	if err := os.WriteFile("/tmp/script", []byte("#!/attack nothing\n"), 0o755); err != nil {
		return void(err)
	}
	return spawn("/tmp/script")
}

// revshell starts a program of the image with a connection as its input.
func revshell([]string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return void(err)
	}
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return void(err)
	}
	f, err := conn.(*net.TCPConn).File()
	if err != nil {
		return void(err)
	}
	cmd := exec.Command("/bin/tool", "nothing")
	cmd.Stdin = f
	return cmd.Run()
}

// pipeshell is what a server does with its children all day.
func pipeshell([]string) error {
	cmd := exec.Command("/bin/tool", "nothing")
	in, err := cmd.StdinPipe()
	if err != nil {
		return void(err)
	}
	defer in.Close()
	return cmd.Run()
}

// underfire has eight loops do what is forbidden, two each run a program, open a
// file, connect and make a raw socket, until the file it is told of appears and
// each kind was tried often enough, however slow the machine. It
// is refused if each try was; its words are how many tries of each there were.
func underfire(a []string) error {
	const enough = 20
	if err := copySelf("/tmp/storm"); err != nil {
		return err
	}
	forbidden := [...]func(i int) error{
		func(i int) error {
			if i == 0 {
				return spawn("/tmp/storm")
			}
			return syscall.Exec("/tmp/storm", []string{"storm", "nothing"}, nil)
		},
		func(int) error {
			_, err := os.OpenFile("/etc/app/1", os.O_WRONLY, 0)
			return err
		},
		func(int) error {
			s, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer syscall.Close(s)
			return syscall.Connect(s, &syscall.SockaddrInet4{Port: 81, Addr: [4]byte{192, 0, 2, 1}})
		},
		func(int) error {
			_, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_RAW, syscall.IPPROTO_ICMP)
			return err
		},
	}
	var tries [len(forbidden)]atomic.Int64
	result := make(chan error)
	for i := range 2 * len(forbidden) {
		kind := i % len(forbidden)
		go func() {
			for {
				if _, err := os.Stat(a[0]); err == nil && tries[kind].Load() >= enough {
					result <- nil
					return
				}
				tries[kind].Add(1)
				if err := forbidden[kind](i); !errors.Is(err, syscall.EPERM) {
					result <- fmt.Errorf("got through, or failed otherwise: %w", err)
					return
				}
			}
		}()
	}
	var through error
	for range 2 * len(forbidden) {
		through = errors.Join(through, <-result)
	}
	if through != nil {
		fmt.Println(through)
		return nil
	}
	return fmt.Errorf("%d runs %d opens %d connections %d sockets", tries[0].Load(), tries[1].Load(), tries[2].Load(), tries[3].Load())
}

// execthread runs a dropped program from a thread that is not the first.
func execthread([]string) error {
	if err := copySelf("/tmp/thread"); err != nil {
		return err
	}
	result := make(chan error)
	for range 8 {
		go func() { result <- spawn("/tmp/thread") }()
	}
	for range 8 {
		if err := <-result; err == nil || !errors.Is(err, syscall.EPERM) {
			return err
		}
	}
	return syscall.EPERM
}
