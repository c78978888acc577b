package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// world is this process in a cgroup of its own, with a listener whose connections are
// plain and, if shortcuts could be opened, one whose connections have them.
type world struct {
	home, cgroup string
	plain, short net.Listener
	shortcuts    *shortcuts
}

func openWorld() (w *world, err error) {
	w = &world{}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.Close())
		}
	}()
	if w.home, err = ownCgroup(); err != nil {
		return w, err
	}
	w.cgroup = filepath.Join(w.home, "hauberk-bench-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(w.cgroup, 0o755); err != nil {
		return w, err
	}
	if err := enter(w.cgroup); err != nil {
		return w, err
	}
	if w.plain, err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
		return w, err
	}
	w.short, err = net.Listen("tcp4", "127.0.0.1:0")
	return w, err
}

// cut opens shortcuts for the one listener, anew if there are some.
func (w *world) cut() (err error) {
	if w.shortcuts != nil {
		if err := w.shortcuts.Close(); err != nil {
			return err
		}
	}
	w.shortcuts, err = openShortcuts(w.cgroup, uint16(w.short.Addr().(*net.TCPAddr).Port))
	return err
}

// forget takes all connections out, if there are shortcuts.
func (w *world) forget() error {
	if w.shortcuts == nil {
		return nil
	}
	return w.shortcuts.forget()
}

func (w *world) Close() (err error) {
	if w.shortcuts != nil {
		err = w.shortcuts.Close()
	}
	for _, ln := range []net.Listener{w.plain, w.short} {
		if ln != nil {
			err = errors.Join(err, ln.Close())
		}
	}
	if w.cgroup != "" {
		err = errors.Join(err, enter(w.home), syscall.Rmdir(w.cgroup))
	}
	return err
}

func enter(cgroup string) error {
	return os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte("0"), 0)
}

// ownCgroup is this process' folder in the hierarchy of version 2.
func ownCgroup() (string, error) {
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	inside := ""
	for line := range strings.Lines(string(raw)) {
		if of, found := strings.CutPrefix(strings.TrimSpace(line), "0::"); found {
			inside = of
		}
	}
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer mounts.Close()
	for in := bufio.NewScanner(mounts); in.Scan(); {
		f := strings.Fields(in.Text())
		if i := len(f) - 3; i > 4 && f[i] == "cgroup2" {
			return filepath.Join(f[4], inside), nil
		}
	}
	return "", errors.New("find cgroup: none of version 2 is mounted")
}

// conn is a connection as a proxy uses it.
type conn interface {
	net.Conn
	syscall.Conn
	CloseWrite() error
	SetReadBuffer(int) error
	SetWriteBuffer(int) error
	File() (*os.File, error)
}

// pair is a connection: a called, b was called, by way of ln if there is one.
type pair struct {
	a, b conn
	ln   net.Listener
}

func (p pair) Close() {
	p.a.Close()
	p.b.Close()
}

// opener makes connections of one kind.
type opener func() (pair, error)

func over(ln net.Listener) opener {
	return func() (p pair, err error) {
		a, err := net.Dial("tcp4", ln.Addr().String())
		if err != nil {
			return p, err
		}
		b, err := ln.Accept()
		if err != nil {
			a.Close()
			return p, fmt.Errorf("accept: %w", err)
		}
		return pair{a.(conn), b.(conn), ln}, nil
	}
}

func unixPair() (p pair, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return p, err
	}
	a, err := adopt(fds[0])
	if err != nil {
		syscall.Close(fds[1])
		return p, err
	}
	b, err := adopt(fds[1])
	if err != nil {
		a.Close()
		return p, err
	}
	return pair{a: a, b: b}, nil
}
