// Package supervise keeps the programs of an installation running on this
// machine: it starts them as their users, starts them again when they end, and
// stops them in the reverse order.
//
// It knows nothing of what they do. It holds no sandbox: the machines belong to
// the node, survive it, and are adopted by the next.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// Timing of restarts and stops.
const (
	backoffFirst = 200 * time.Millisecond
	backoffMost  = 10 * time.Second
	// healthy is how long a program must have run for its next end to be a new
	// fault and not the same one again.
	healthy = 30 * time.Second
	// Grace is how long a program may take to stop before it is killed.
	Grace = 20 * time.Second
)

// Program is one program to keep running.
type Program struct {
	Name string
	Path string
	Args []string
	// User the program runs as; nil is the user of the supervisor.
	User *User
	// Leave is the signal that ends the program so that it leaves behind what
	// it runs; it is also what the kernel sends when the supervisor dies. Zero
	// is SIGTERM.
	Leave syscall.Signal
	// TakeOver are the arguments by which another process of the program takes
	// this one's place while it runs; this one then ends. nil if it cannot.
	TakeOver []string
}

func (p Program) leave() syscall.Signal {
	if p.Leave == 0 {
		return syscall.SIGTERM
	}
	return p.Leave
}

// ErrLeave as the cause of a context's end asks the supervisor to stop its
// programs by their Leave signals.
var ErrLeave = errors.New("leave behind what the programs run")

// Supervisor keeps programs running.
type Supervisor struct {
	Programs []Program // in the order of starting
	RunDir   string    // where process ids are written
	LogDir   string    // where each program's output goes
	Out      io.Writer // the supervisor's own log
	Grace    time.Duration
	// Replace, if set, asks for each program that can be replaced to be, by the
	// program that is at its path then.
	Replace <-chan os.Signal
}

// Run keeps the programs running until the context ends, then stops them in
// reverse order. When it returns none of them runs.
//
// If the supervisor is killed the kernel sends them their Leave signals: they
// are bound to the thread that starts them, which lives as long as the process.
func (s *Supervisor) Run(ctx context.Context) error {
	lock, err := Lock(s.RunDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	self := filepath.Join(s.RunDir, "supervisor.pid")
	if err := writeIdentity(self, os.Getpid()); err != nil {
		return err
	}
	defer os.Remove(self)
	forks := make(chan func())
	go forker(forks)
	defer close(forks)

	type keeper struct {
		stop    func()
		done    chan struct{}
		replace chan struct{}
	}
	var keepers []keeper
	for _, p := range s.Programs {
		// Not a child of ctx: each is stopped in its turn.
		own, stop := context.WithCancelCause(context.WithoutCancel(ctx))
		k := keeper{func() { stop(context.Cause(ctx)) }, make(chan struct{}), make(chan struct{}, 1)}
		keepers = append(keepers, k)
		go func() { defer close(k.done); s.keep(own, p, forks, k.replace) }()
	}
	go func() {
		for {
			select {
			case <-s.Replace:
			case <-ctx.Done():
				return
			}
			for _, k := range keepers {
				select {
				case k.replace <- struct{}{}:
				default: // it is being done
				}
			}
		}
	}()
	s.boundLogs(ctx)
	s.say("stopping")
	for i := len(keepers) - 1; i >= 0; i-- {
		keepers[i].stop()
		<-keepers[i].done
	}
	s.say("stopped")
	return nil
}

// forker starts processes from one thread that never ends before the process:
// Linux sends the parent-death signal when the starting thread ends.
func forker(forks <-chan func()) {
	runtime.LockOSThread()
	for f := range forks {
		f()
	}
}

// keep runs one program again and again until the context ends.
func (s *Supervisor) keep(ctx context.Context, p Program, forks chan<- func(), replace <-chan struct{}) {
	wait := backoffFirst
	for ctx.Err() == nil {
		began := time.Now()
		err := s.once(ctx, p, forks, replace)
		if ctx.Err() != nil {
			s.say("%s: stopped: %s", p.Name, describe(err))
			return
		}
		if time.Since(began) >= healthy {
			wait = backoffFirst
		}
		s.say("%s: ended: %s; starting it again in %v", p.Name, describe(err), wait)
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, backoffMost)
	}
}

func describe(err error) string {
	if err == nil {
		return "exit status 0"
	}
	return err.Error()
}

// process is a program that runs.
type process struct {
	cmd   *exec.Cmd
	ended chan error
}

// launch starts a program.
func (s *Supervisor) launch(p Program, args []string, forks chan<- func()) (*process, error) {
	out, err := openLog(s.LogDir, p.Name)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(p.Path, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = "/"
	cmd.Env = environment()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: p.leave(), Setpgid: true}
	if p.User != nil {
		cmd.SysProcAttr.Credential = p.User.credential()
	}
	started := make(chan error, 1)
	forks <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", p.Name, err)
	}
	r := &process{cmd, make(chan error, 1)}
	go func() { r.ended <- cmd.Wait() }()
	return r, nil
}

// note writes down which process the program is now.
func (s *Supervisor) note(p Program, r *process, what string) {
	s.say("%s: %s, pid %d", p.Name, what, r.cmd.Process.Pid)
	if err := writeIdentity(s.pidFile(p), r.cmd.Process.Pid); err != nil {
		s.say("%s: %v", p.Name, err)
	}
}

func (s *Supervisor) pidFile(p Program) string { return filepath.Join(s.RunDir, p.Name+".pid") }

// once runs a program to its end, and that of those that have taken its place.
// When the context ends it asks the program to stop and, after the grace period,
// makes it.
func (s *Supervisor) once(ctx context.Context, p Program, forks chan<- func(), replace <-chan struct{}) error {
	now, err := s.launch(p, p.Args, forks)
	if err != nil {
		return err
	}
	s.note(p, now, "started")
	defer os.Remove(s.pidFile(p))
	next := &process{} // ends never
	for {
		select {
		case err := <-now.ended:
			if next.cmd == nil {
				return err
			}
			now, next = next, &process{}
			s.note(p, now, "replaced")
		case err := <-next.ended:
			s.say("%s: not replaced: the other process ended: %s; going on as it was", p.Name, describe(err))
			next = &process{}
		case <-replace:
			if p.TakeOver == nil || next.cmd != nil {
				continue
			}
			if r, err := s.launch(p, p.TakeOver, forks); err != nil {
				s.say("%s: not replaced: %v", p.Name, err)
			} else {
				next = r
			}
		case <-ctx.Done():
			signal := syscall.SIGTERM
			if errors.Is(context.Cause(ctx), ErrLeave) {
				signal = p.leave()
			}
			if next.cmd != nil {
				err = s.end(next.cmd, p, signal, next.ended)
			}
			return errors.Join(err, s.end(now.cmd, p, signal, now.ended))
		}
	}
}

func (s *Supervisor) end(cmd *exec.Cmd, p Program, signal syscall.Signal, ended <-chan error) error {
	if err := cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		s.say("%s: %v", p.Name, err)
	}
	grace := s.Grace
	if grace == 0 {
		grace = Grace
	}
	select {
	case err := <-ended:
		return err
	case <-time.After(grace):
	}
	_ = cmd.Process.Kill()
	<-ended
	return fmt.Errorf("killed: did not stop within %v", grace)
}

// environment of the programs: nothing of whoever typed the command.
func environment() []string {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "HOME=/nonexistent"}
	for _, name := range []string{"GODEBUG", "GOTRACEBACK", "TZ"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	return env
}

func (s *Supervisor) say(format string, args ...any) {
	if s.Out != nil {
		fmt.Fprintf(s.Out, time.Now().UTC().Format("2006-01-02T15:04:05.000Z ")+format+"\n", args...)
	}
}
