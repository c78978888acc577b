package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hauberk.dev/internal/netns"
	"hauberk.dev/internal/strictjson"
)

const (
	reportFD  = 3
	maxReport = 64 << 10
	maxDenied = 1000 // lines of one process; a guest may ask without end
)

// Spec is the network of one sandbox.
type Spec struct {
	// Dir holds the namespaces, Name names them in it.
	Dir     string        `json:"dir"`
	Name    string        `json:"name"`
	Egress  []Destination `json:"egress,omitempty"`
	Publish []Publication `json:"publish,omitempty"`
	// UID and GID are those of the process that carries the traffic, and no
	// other's.
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
}

type report struct {
	Published []Publication `json:"published,omitempty"`
	Error     string        `json:"error,omitempty"`
}

// Start makes the namespaces, if they are not there, and starts program, which
// must call Serve, in a session of its own. It writes what was refused, and why
// it ended, to log. pod is the namespace for the guest's machine to join.
func Start(ctx context.Context, program []string, s Spec, log *os.File) (pod string, published []Publication, err error) {
	if s.UID == 0 || s.GID == 0 {
		return "", nil, fmt.Errorf("start gate of %s: it must not run as root", s.Name)
	}
	h, err := netns.CreateHand(s.Dir, s.Name, Answers(s.Publish))
	fresh := err == nil
	if errors.Is(err, fs.ErrExist) {
		h, err = netns.OpenHand(s.Dir, s.Name)
	}
	if err != nil {
		return "", nil, fmt.Errorf("start gate of %s: %w", s.Name, err)
	}
	defer h.Close()
	r, err := spawn(ctx, program, s, log)
	if err == nil && r.Error != "" {
		err = errors.New(r.Error)
	}
	if err != nil {
		if fresh {
			err = errors.Join(err, netns.RemoveHand(s.Dir, s.Name))
		}
		return "", nil, fmt.Errorf("start gate of %s: %w", s.Name, err)
	}
	return h.Pod.Path(), r.Published, nil
}

// spawn starts the process and waits for its report.
func spawn(ctx context.Context, program []string, s Spec, log *os.File) (r report, err error) {
	out, in, err := os.Pipe()
	if err != nil {
		return r, err
	}
	defer out.Close()
	text, err := json.Marshal(s)
	if err != nil {
		in.Close()
		return r, err
	}
	cmd := exec.Command(program[0], program[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{in}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	give, err := cmd.StdinPipe()
	if err != nil {
		in.Close()
		return r, err
	}
	err = startBound(cmd)
	in.Close()
	if err != nil {
		return r, err
	}
	go cmd.Wait() // ends with the process, which may outlive this one
	defer context.AfterFunc(ctx, func() { out.SetReadDeadline(time.Now()) })()
	_, err = give.Write(text)
	give.Close()
	if err == nil {
		err = json.NewDecoder(io.LimitReader(out, maxReport)).Decode(&r)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		return r, fmt.Errorf("hear from %s: %w", program[0], err)
	}
	return r, nil
}

// startBound starts a command that no program it executes can give a right back.
func startBound(cmd *exec.Cmd) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: nothing else may run on this thread
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			done <- err
			return
		}
		done <- cmd.Start()
	}()
	return <-done
}

// Serve is the process that Start starts: it opens the gate of the Spec on its
// standard input, gives up every right, and carries traffic until ctx ends.
func Serve(ctx context.Context, stdin io.Reader, stderr io.Writer) error {
	out := os.NewFile(reportFD, "report")
	if out == nil {
		return errors.New("serve gate: not started as a gate")
	}
	defer out.Close()
	g, lock, err := ready(stdin, stderr)
	r := report{}
	if err != nil {
		r.Error = err.Error()
	} else {
		r.Published = g.Published()
		defer lock.Close()
	}
	if told := json.NewEncoder(out).Encode(r); err == nil && told != nil {
		err = errors.Join(told, g.Close())
	}
	out.Close()
	if err != nil {
		return fmt.Errorf("serve gate: %w", err)
	}
	return g.Run(ctx)
}

func ready(stdin io.Reader, stderr io.Writer) (*Gate, *os.File, error) {
	var s Spec
	text, err := io.ReadAll(io.LimitReader(stdin, maxReport))
	if err == nil {
		err = strictjson.Decode(text, maxReport, &s)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read specification: %w", err)
	}
	lock, err := hold(s.lock())
	if err != nil {
		return nil, nil, err
	}
	h, err := netns.OpenHand(s.Dir, s.Name)
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	defer h.Close()
	g, err := Open(h, Options{Egress: s.Egress, Publish: s.Publish, Denied: denials(stderr)})
	if err == nil {
		if err = drop(int(s.UID), int(s.GID)); err != nil {
			g.Close()
		}
	}
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	return g, lock, nil
}

// denials writes what was refused, up to a bound.
func denials(w io.Writer) func(string) {
	var n atomic.Uint64
	return func(what string) {
		switch i := n.Add(1); {
		case i < maxDenied:
			fmt.Fprintf(w, "%s refused %q: it is not among the destinations\n", time.Now().UTC().Format(time.RFC3339), what)
		case i == maxDenied:
			fmt.Fprintln(w, "more was refused, and is not written down")
		}
	}
}

// drop makes every thread of the process an ordinary user's for good.
func drop(uid, gid int) error {
	if uid == 0 || gid == 0 {
		return errors.New("give up rights: the user is root")
	}
	for _, err := range []error{syscall.Setgroups(nil), syscall.Setresgid(gid, gid, gid), syscall.Setresuid(uid, uid, uid)} {
		if err != nil {
			return fmt.Errorf("give up rights: %w", err)
		}
	}
	return nil
}

func (s Spec) lock() string { return lockPath(s.Dir, s.Name) }

func lockPath(dir, name string) string { return filepath.Join(dir, name+".gate.lock") }

// hold takes the lock by which Stop finds the process. The kernel knows whose it
// is, so no number of a process that is gone can be mistaken for another's.
func hold(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: it runs already: %w", path, err)
	}
	return f, nil
}

// Running says which process carries the traffic of a sandbox, 0 if none does.
func Running(dir, name string) (pid int, err error) {
	f, err := os.OpenFile(lockPath(dir, name), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_GETLK, &lock); err != nil || lock.Type == unix.F_UNLCK {
		return 0, err
	}
	return int(lock.Pid), nil
}

// Stop ends the process and removes the namespaces. What is not there is no
// error.
func Stop(ctx context.Context, dir, name string) error {
	for {
		pid, err := Running(dir, name)
		if err != nil {
			return fmt.Errorf("stop gate of %s: %w", name, err)
		}
		if pid == 0 {
			break
		}
		if err := end(dir, name, pid); err != nil {
			return fmt.Errorf("stop gate of %s: %w", name, err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("stop gate of %s: %w", name, context.Cause(ctx))
		case <-time.After(5 * time.Millisecond):
		}
	}
	err := os.Remove(lockPath(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, netns.RemoveHand(dir, name))
}

// end kills the process that holds the lock: there is nothing it must save.
func end(dir, name string, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if again, err := Running(dir, name); err != nil || again != pid {
		return err // it ended, and its number may be another's by now
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// MarshalText writes d as ParseDestination reads it.
func (d Destination) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what ParseDestination does.
func (d *Destination) UnmarshalText(text []byte) (err error) {
	*d, err = ParseDestination(string(text))
	return err
}

// MarshalText writes p as ParsePublication reads it.
func (p Publication) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText reads what ParsePublication does.
func (p *Publication) UnmarshalText(text []byte) (err error) {
	*p, err = ParsePublication(string(text))
	return err
}
