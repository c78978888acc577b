package cri

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// role says, in the environment, which of three lives a program leads.
const role = "HAUBERK_TEST_ROLE"

// private runs the rest of the calling program in network, mount, process, IPC
// and cgroup namespaces of its own: its ports, links, packet filter, mounts and
// cgroups are nobody else's, and when it ends, however it ends, nothing of it
// goes on. Outside it returns the exit code of the inside; inside it returns at
// once.
func private() (inside bool, code int, err error) {
	life, group, _ := strings.Cut(os.Getenv(role), " ")
	switch life {
	case "main":
		return true, 0, nil
	case "init":
		code, err := first(group)
		return false, code, err
	}
	group = fmt.Sprintf("hbtest-%d", os.Getpid())
	all, err := hierarchies(group)
	if err != nil {
		return false, 1, err
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), role+"=init "+group)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC,
	}
	var exit *exec.ExitError
	if err = cmd.Run(); errors.As(err, &exit) {
		err = nil
	}
	for _, h := range all {
		err = errors.Join(err, h.remove())
	}
	if err != nil {
		return false, 1, fmt.Errorf("run in namespaces: %w", err)
	}
	return false, cmd.ProcessState.ExitCode(), nil
}

// first is process 1: it makes the namespaces fit to live in, starts the
// program once more and reaps whatever loses its parent.
func first(group string) (code int, err error) {
	runtime.LockOSThread() // a cgroup namespace is a thread's, and its children's
	if err := isolate(group); err != nil {
		return 1, fmt.Errorf("prepare namespaces: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	// One word of a name only: with two, the first would count, without end.
	if err := os.Setenv(role, "main"); err != nil {
		return 1, err
	}
	p, err := os.StartProcess(self, os.Args, &os.ProcAttr{Files: []*os.File{os.Stdin, os.Stdout, os.Stderr}})
	if err != nil {
		return 1, err
	}
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 1, err
		case pid == p.Pid && status.Exited():
			return status.ExitStatus(), nil
		case pid == p.Pid:
			return 128 + int(status.Signal()), nil
		}
	}
}

// isolate makes mounts known in these namespaces only, among themselves as
// shared as on a machine with systemd.
func isolate(group string) error {
	for _, flags := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
		if err := unix.Mount("", "/", "", unix.MS_REC|flags, ""); err != nil {
			return err
		}
	}
	if err := enterCgroups(group); err != nil {
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	for _, dir := range []string{"/run/containerd", "/run/netns", "/var/lib/cni", "/dev/shm"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=1777"); err != nil {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}
