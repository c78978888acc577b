package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/argv"
)

// shimProcess is the process that serves a sandbox, by what it left in the
// bundle.
type shimProcess struct {
	pid int
	fd  int
}

// process finds the shim; nil is none. The number may be another's by now, so
// the process must say whose it is.
func (b *Sandbox) process() (*shimProcess, error) {
	raw, err := os.ReadFile(filepath.Join(b.bundle(), "shim.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find shim: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid < 1 {
		return nil, fmt.Errorf("find shim: process %.32q", raw)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find shim: %w", err)
	}
	ours, err := argv.Has(pid, b.id)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("find shim: %w", err), unix.Close(fd))
	}
	if !ours {
		return nil, unix.Close(fd) // it has ended, and somebody else has its number
	}
	return &shimProcess{pid, fd}, nil
}

func (p *shimProcess) close() {
	if p != nil {
		_ = unix.Close(p.fd)
	}
}

// wait waits until the process has ended.
func (p *shimProcess) wait(ctx context.Context) error {
	for p != nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, 20)
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for shim: %w", err)
		case ctx.Err() != nil:
			return fmt.Errorf("end shim: process %d goes on", p.pid)
		}
	}
	return nil
}

// kill ends a process that does not end.
func (p *shimProcess) kill(ctx context.Context) error {
	if p == nil {
		return nil
	}
	if err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill shim: %w", err)
	}
	return p.wait(ctx)
}

// step is how the shim marks what takes long enough to be told: see package
// shim. Its log has a line such as: level=INFO msg="..." step="...".
const step = " step="

// follow hands on the steps that a log tells, until it is stopped.
func follow(path string, tell func(string)) (stop func()) {
	ended, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		read := 0
		for last := false; !last; {
			select {
			case <-ended:
				last = true
			case <-time.After(20 * time.Millisecond):
			}
			raw, err := os.ReadFile(path)
			if err != nil || len(raw) <= read {
				continue
			}
			whole := bytes.LastIndexByte(raw, '\n') + 1
			for l := range strings.Lines(string(raw[read:max(read, whole)])) {
				if text, ok := stepOf(l); ok {
					tell(text)
				}
			}
			read = max(read, whole)
		}
	}()
	return sync.OnceFunc(func() { close(ended); <-done })
}

// stepOf reads the step of a line, if it tells one.
func stepOf(line string) (string, bool) {
	_, rest, ok := strings.Cut(line, step)
	if !ok {
		return "", false
	}
	if quoted, err := strconv.QuotedPrefix(rest); err == nil {
		text, err := strconv.Unquote(quoted)
		return text, err == nil
	}
	word, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	return word, word != ""
}
