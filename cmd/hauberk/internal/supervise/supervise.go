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
		stop func()
		done chan struct{}
	}
	var keepers []keeper
	for _, p := range s.Programs {
		// Not a child of ctx: each is stopped in its turn.
		own, stop := context.WithCancelCause(context.WithoutCancel(ctx))
		k := keeper{func() { stop(context.Cause(ctx)) }, make(chan struct{})}
		keepers = append(keepers, k)
		go func() { defer close(k.done); s.keep(own, p, forks) }()
	}
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
func (s *Supervisor) keep(ctx context.Context, p Program, forks chan<- func()) {
	wait := backoffFirst
	for ctx.Err() == nil {
		began := time.Now()
		err := s.once(ctx, p, forks)
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

// once runs a program to its end. When the context ends it asks the program to
// stop and, after the grace period, makes it.
func (s *Supervisor) once(ctx context.Context, p Program, forks chan<- func()) error {
	out, err := openLog(s.LogDir, p.Name)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(p.Path, p.Args...)
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
		return fmt.Errorf("start %s: %w", p.Name, err)
	}
	s.say("%s: started, pid %d", p.Name, cmd.Process.Pid)
	pid := filepath.Join(s.RunDir, p.Name+".pid")
	if err := writeIdentity(pid, cmd.Process.Pid); err != nil {
		s.say("%s: %v", p.Name, err)
	}
	defer os.Remove(pid)
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return err
	case <-ctx.Done():
	}
	signal := syscall.SIGTERM
	if errors.Is(context.Cause(ctx), ErrLeave) {
		signal = p.leave()
	}
	return s.end(cmd, p, signal, ended)
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
