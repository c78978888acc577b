package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Names in a run directory.
const (
	AgentSocket   = "agent.sock"
	MonitorSocket = "monitor.sock"
	ConsoleSocket = "console.sock"
	MonitorLog    = "monitor.log"
	consoleLog    = "console.log"
)

// RunDir is the directory of one machine: its journal, sockets and logs. It is
// root's and open to nobody else, the machine's monitor included: a monitor
// that a guest has broken could otherwise forge who it is.
type RunDir struct {
	open *os.File

	mu   sync.Mutex
	path string
}

// Path is where the directory is.
func (d *RunDir) Path() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.path
}

// move gives the directory another name, which nothing may have.
func (d *RunDir) move(to string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := unix.Renameat2(unix.AT_FDCWD, d.path, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("move run directory %s to %s: %w", d.path, to, err)
	}
	d.path = to
	return nil
}

// CreateRunDir makes the directory of a machine that is not there yet.
func CreateRunDir(parent, id string) (*RunDir, error) {
	path := filepath.Join(parent, id)
	if err := os.Mkdir(path, 0o700); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	return OpenRunDir(path)
}

// OpenRunDir opens the directory of a machine.
func OpenRunDir(path string) (*RunDir, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open run directory: %w", err)
	}
	return &RunDir{path: path, open: f}, nil
}

// name is a path of at most 108 bytes, which is all a socket may have.
func (d *RunDir) name(file string) string {
	return "/proc/self/fd/" + strconv.Itoa(int(d.open.Fd())) + "/" + file
}

// Listen makes a listening socket for another process to serve.
func (d *RunDir) Listen(file string) (*os.File, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: d.name(file), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen in %s: %w", d.Path(), err)
	}
	ln.SetUnlinkOnClose(false)
	f, err := ln.File()
	return f, errors.Join(err, ln.Close())
}

// Dial connects to a socket in the directory.
func (d *RunDir) Dial(ctx context.Context, file string) (*net.UnixConn, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", d.name(file))
	if err != nil {
		return nil, fmt.Errorf("dial %s in %s: %w", file, d.Path(), err)
	}
	return conn.(*net.UnixConn), nil
}

// Create makes a file that its writers append to.
func (d *RunDir) Create(file string) (*os.File, error) {
	return os.OpenFile(d.name(file), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
}

// trim empties a file that has more than so many bytes. Its writers append.
func (d *RunDir) trim(file string, most int64) error {
	name := d.name(file)
	fi, err := os.Stat(name)
	if err != nil || fi.Size() <= most {
		return err
	}
	return os.Truncate(name, 0)
}

// Tail returns at most so many bytes of the end of a file, quoted.
func (d *RunDir) Tail(file string, most int64) string {
	f, err := os.Open(d.name(file))
	if err != nil {
		return ""
	}
	defer f.Close()
	if fi, err := f.Stat(); err == nil && fi.Size() > most {
		_, _ = f.Seek(-most, io.SeekEnd)
	}
	b := make([]byte, most)
	n, _ := readFull(f, b)
	if text := strings.TrimSpace(string(b[:n])); text != "" {
		return fmt.Sprintf("%q", text)
	}
	return ""
}

// Close lets go of the directory. It may be called again.
func (d *RunDir) Close() error {
	if err := d.open.Close(); !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Remove deletes the directory with all it holds, and closes it.
func (d *RunDir) Remove() error {
	return errors.Join(os.RemoveAll(d.Path()), d.Close())
}
