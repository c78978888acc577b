package run_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/stage"
)

// callTime bounds one command of the tests.
const callTime = 5 * time.Minute

// world is a place with the programs and an image.
type world struct {
	dir   string
	image string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	if err := stage.Missing(); err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "run") // short, for sockets
	if err != nil {
		t.Fatal(err)
	}
	w := &world{dir: dir, image: "docker-archive:" + filepath.Join(dir, "image.tar")}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := stage.Build(dir+"/bin", "hauberk", "containerd-shim-hauberk-v2", "hauberk-guest"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.end(t) })
	layer, err := stage.Layer(nil)
	if err == nil {
		err = stage.DockerArchive(filepath.Join(dir, "image.tar"), "busybox:latest", layer)
	}
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// end says what is left when everything was removed.
func (w *world) end(t *testing.T) {
	if err := stage.EndKeeper(filepath.Join(w.dir, "bin/containerd-shim-hauberk-v2"), w.dir+"/r/shim"); err != nil {
		t.Error(err)
	}
	for _, d := range []string{"s/hand/boxes", "s/hand/names", "r/shim/vm", "r/hand/s"} {
		if left, err := os.ReadDir(filepath.Join(w.dir, d)); err == nil && len(left) > 0 {
			t.Errorf("left in %s: %v", d, left)
		}
	}
	for pid, line := range stage.Processes(w.dir) {
		t.Errorf("process %d is left: %s", pid, line)
	}
}

// command is hauberk, in this world.
func (w *world) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(w.dir, "bin/hauberk"), append([]string{"--state", w.dir + "/s", "--run", w.dir + "/r"}, args...)...)
	cmd.WaitDelay = time.Second
	return cmd
}

// result of a command.
type result struct {
	out, errs string
	code      int
}

// hauberk runs a command to its end.
func (w *world) hauberk(t *testing.T, in string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	cmd := w.command(ctx, args...)
	cmd.Stdin = strings.NewReader(in)
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	return result{code: code(t, cmd.Run()), out: out.String(), errs: errs.String()}
}

// must runs a command that has to succeed.
func (w *world) must(t *testing.T, args ...string) string {
	t.Helper()
	r := w.hauberk(t, "", args...)
	if r.code != 0 {
		t.Fatalf("hauberk %q: code %d, %s", args, r.code, r.errs)
	}
	return r.out
}

func code(t *testing.T, err error) int {
	t.Helper()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	if err != nil {
		t.Error(err)
		return -1
	}
	return 0
}

// terminal is one of this machine's, with a program on it.
type terminal struct {
	master *os.File
	cmd    *exec.Cmd
	heard  chan []byte
	seen   strings.Builder
}

// onTerminal starts a command on a terminal of its own.
func (w *world) onTerminal(t *testing.T, rows, cols uint16, args ...string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	var number int
	control(t, master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
		number = n
		return err
	})
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	x := &terminal{master: master, heard: make(chan []byte, 1024)}
	x.resize(t, rows, cols)
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	t.Cleanup(cancel)
	x.cmd = w.command(ctx, args...)
	x.cmd.Stdin, x.cmd.Stdout, x.cmd.Stderr = slave, slave, slave
	x.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := x.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(x.heard)
		for {
			buf := make([]byte, 4096)
			n, err := master.Read(buf)
			if err != nil {
				return // the last that had it open has left
			}
			x.heard <- buf[:n]
		}
	}()
	return x
}

func control(t *testing.T, f *os.File, act func(fd int) error) {
	t.Helper()
	raw, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var inner error
	if err := errors.Join(raw.Control(func(fd uintptr) { inner = act(int(fd)) }), inner); err != nil {
		t.Fatal(err)
	}
}

func (x *terminal) resize(t *testing.T, rows, cols uint16) {
	t.Helper()
	control(t, x.master, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols})
	})
}

func (x *terminal) types(t *testing.T, keys string) {
	t.Helper()
	if _, err := x.master.WriteString(keys); err != nil {
		t.Fatal(err)
	}
}

// shows waits until the terminal shows a text, and forgets what came before.
func (x *terminal) shows(t *testing.T, text string) {
	t.Helper()
	late := time.After(callTime)
	for {
		all := strings.ReplaceAll(x.seen.String(), "\r", "")
		if _, rest, ok := strings.Cut(all, text); ok {
			x.seen.Reset()
			x.seen.WriteString(rest)
			return
		}
		select {
		case raw, open := <-x.heard:
			if !open {
				t.Fatalf("the terminal shows %q and no %q", all, text)
			}
			x.seen.Write(raw)
		case <-late:
			t.Fatalf("the terminal shows %q and no %q", all, text)
		}
	}
}

// ends waits for the program.
func (x *terminal) ends(t *testing.T) int {
	t.Helper()
	for range x.heard { // a full terminal would hold it up
	}
	return code(t, x.cmd.Wait())
}
