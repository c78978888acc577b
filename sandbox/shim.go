package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// killShim ends a shim that does not answer, by what it left in the bundle.
// The number may be another's by now, so the process must say whose it is.
func (b *Sandbox) killShim() error {
	raw, err := os.ReadFile(filepath.Join(b.bundle(), "shim.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find shim: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(raw)))
	if err != nil || pid <= 1 {
		return fmt.Errorf("find shim: process %.32q", raw)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find shim: %w", err)
	}
	defer unix.Close(fd)
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !slices.ContainsFunc(bytes.Split(line, []byte{0}), func(a []byte) bool { return string(a) == b.id }) {
		return nil // it has ended, and somebody else has its number
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill shim: %w", err)
	}
	for began := time.Now(); time.Since(began) < cleanup/4; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return nil
		}
	}
	return fmt.Errorf("kill shim: process %d goes on", pid)
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
