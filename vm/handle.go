package vm

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// handle holds one process, ours or not, by a descriptor: unlike its number it
// can never come to mean another.
type handle struct {
	pid  int
	file *os.File
	own  *os.Process // nil if the process is not our child
}

// openHandle takes hold of a running process that started at a known time;
// 0 accepts any, for a child that cannot have been replaced.
func openHandle(pid int, start uint64, own *os.Process) (*handle, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		err = ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("hold process %d: %w", pid, err)
	}
	h := &handle{pid: pid, file: os.NewFile(uintptr(fd), "pidfd"), own: own}
	if start == 0 {
		return h, nil
	}
	// Asked after the descriptor is there: it is of this process or of none.
	if now, err := startTime(pid); err != nil || now != start {
		h.file.Close()
		return nil, fmt.Errorf("hold process %d: %w", pid, ErrGone)
	}
	return h, nil
}

// kill ends the process; one that has ended already is no error.
func (h *handle) kill() error {
	err := h.control(func(fd int) error { return unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) })
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func (h *handle) control(f func(fd int) error) error {
	raw, err := h.file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// wait returns how the process ended, in words, or an error if the handle was
// closed before.
func (h *handle) wait() (string, error) {
	raw, err := h.file.SyscallConn()
	if err != nil {
		return "", err
	}
	err = raw.Read(func(fd uintptr) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		return err == nil && n == 1
	})
	if err != nil {
		return "", err
	}
	if h.own == nil {
		return "ended", nil // only a parent learns how
	}
	st, err := h.own.Wait()
	if err != nil {
		return "", err
	}
	return st.String(), nil
}

func (h *handle) close() error { return h.file.Close() }

// letGo closes the handle of a process that runs on. A child is reaped when it
// ends, however long that takes: nobody else can.
func (h *handle) letGo() error {
	if h.own == nil {
		return h.close()
	}
	var fd int
	err := h.control(func(old int) (err error) {
		fd, err = unix.FcntlInt(uintptr(old), unix.F_DUPFD_CLOEXEC, 3)
		return err
	})
	if err != nil {
		return errors.Join(fmt.Errorf("let go of process %d: %w", h.pid, err), h.close())
	}
	rest := &handle{pid: h.pid, file: os.NewFile(uintptr(fd), "pidfd"), own: h.own}
	go func() { // ends with the child, or with this process
		_, _ = rest.wait()
		_ = rest.close()
	}()
	return h.close()
}
