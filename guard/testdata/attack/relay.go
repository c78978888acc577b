package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"unsafe"
)

var relayAttacks = map[string]func([]string) error{
	"relaypipe":   func([]string) error { return relay(pipe, "/bin/sh", "nothing") },
	"relaysocket": func([]string) error { return relay(pair, "/bin/sh", "nothing") },
	"relaypty":    func([]string) error { return relay(terminal, "/bin/sh", "nothing") },
	"relayabove":  func([]string) error { return relay(pipe, "/bin/parent", "inherit", "/bin/sh") },
	"inherit":     inherit,
	"relayfifo":   relayFIFO,
	"relayfirst":  relayFirst,
	"holdfifo":    holdFIFO,
	"feed":        feed,
}

// relay starts a program whose input comes from a process with a connection.
func relay(ends func() (in, out *os.File, err error), args ...string) error {
	c, err := connection()
	if err != nil {
		return err
	}
	defer c.Close()
	in, out, err := ends()
	if err != nil {
		return void(err)
	}
	defer out.Close()
	return start(in, args...)
}

func start(in *os.File, args ...string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdin = in
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w %s", err, out)
	}
	return nil
}

// connection is one to this process itself.
func connection() (net.Conn, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, void(err)
	}
	return net.Dial("tcp", l.Addr().String())
}

func pipe() (in, out *os.File, err error) { return os.Pipe() }

func pair() (in, out *os.File, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "in"), os.NewFile(uintptr(fds[1]), "out"), nil
}

// terminal makes one of a file system of its own.
func terminal() (in, out *os.File, err error) {
	if err := syscall.Mount("devpts", "/mnt", "devpts", 0, "newinstance,ptmxmode=0666"); err != nil {
		return nil, nil, err
	}
	if out, err = os.OpenFile("/mnt/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0); err != nil {
		return nil, nil, err
	}
	var unlock, number uint32
	for _, call := range [][2]uintptr{{syscall.TIOCSPTLCK, uintptr(unsafe.Pointer(&unlock))}, {syscall.TIOCGPTN, uintptr(unsafe.Pointer(&number))}} {
		if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, out.Fd(), call[0], call[1]); errno != 0 {
			return nil, nil, errno
		}
	}
	in, err = os.OpenFile(fmt.Sprintf("/mnt/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	return in, out, err
}

// inherit starts a program with its own input.
func inherit(a []string) error { return start(os.Stdin, a[0], "nothing") }

// relayFIFO connects while an interpreter reads from what it can write to.
func relayFIFO([]string) error {
	const path = "/tmp/relay"
	f, err := fifo(path)
	if err != nil {
		return void(err)
	}
	defer f.Close()
	cmd := exec.Command("/bin/sh", "serve")
	cmd.Stdin = f
	if err := cmd.Start(); err != nil {
		return void(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	c, err := connection()
	if err != nil {
		return err
	}
	return c.Close()
}

// relayFirst has another process connect that can write to a pipe, then starts
// an interpreter that reads from it.
func relayFirst([]string) error {
	const path = "/tmp/relayfirst"
	f, err := fifo(path)
	if err != nil {
		return void(err)
	}
	defer f.Close()
	cmd := exec.Command("/attack", "holdfifo", path)
	ready, err := cmd.StdoutPipe()
	if err != nil {
		return void(err)
	}
	if err := cmd.Start(); err != nil {
		return void(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		return void(err)
	}
	return start(f, "/bin/sh", "nothing")
}

func fifo(path string) (*os.File, error) {
	if err := syscall.Mkfifo(path, 0o600); err != nil && !errors.Is(err, syscall.EEXIST) {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR, 0)
}

func holdFIFO(a []string) error {
	f, err := fifo(a[0])
	if err != nil {
		return void(err)
	}
	defer f.Close()
	c, err := connection()
	if err != nil {
		return err
	}
	defer c.Close()
	fmt.Println("up")
	select {}
}

// feed gives an interpreter its input, as a server does that listens.
func feed(a []string) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return void(err)
	}
	defer l.Close()
	cmd := exec.Command(a[0], "nothing")
	cmd.Stdin = bytes.NewReader([]byte("echo\n")) // through a pipe
	return cmd.Run()
}
