package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/supervise"
)

const (
	// readyWithin bounds the wait for the first start: it builds a template
	// machine, with emulation on a loaded host.
	readyWithin = 3 * time.Minute
	pollEvery   = 100 * time.Millisecond
)

func (s *session) up() *cobra.Command {
	var i installation
	var checks bool
	var set map[string]string
	c := &cobra.Command{
		Use:   "up [DIR]",
		Short: "Start an installation on this machine and deploy an example",
		Long: `Up starts the control plane, the mesh and the node of this machine, waits until
they are ready and, given a directory such as examples/bank, builds its images,
signs and releases them, applies its resources and waits until they run.

With --check it then sends real payments through every link of the chain, replays
a list of attacks, and says of each what was seen. The exit code is 1 if a link
failed or an attack was not stopped.

What is already running stays; up can be run again at any time.`,
		Example: `  hauberk up
  hauberk up examples/bank
  hauberk up --check examples/bank -o json`,
		Args: func(c *cobra.Command, got []string) error {
			if checks {
				return args(1, 1, "the DIR of an example to check")(c, got)
			}
			return args(0, 1, "")(c, got)
		},
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(c *cobra.Command, dirs []string) error {
			if err := s.ensure(c.Context(), &i); err != nil {
				return err
			}
			if len(dirs) == 0 {
				return nil
			}
			return s.example(c.Context(), dirs[0], set, &i, checks)
		},
	}
	c.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	i.flags(c.Flags())
	settings(c, &set)
	c.Flags().BoolVar(&checks, "check", false, "check every link and replay the attacks")
	return c
}

// ensure starts the installation unless it runs. A control plane that answers
// proves nothing: it may be on its way out after a supervisor that was killed.
func (s *session) ensure(ctx context.Context, i *installation) error {
	p, err := supervise.Find(s.run, "supervisor")
	if err != nil {
		return err
	}
	if p != nil {
		_ = p.Release()
		if err := s.running(ctx, i); !errors.Is(err, errEnded) {
			return err
		}
	}
	if _, err := s.endLeft(ctx, syscall.SIGUSR1); err != nil {
		return err
	}
	if err := i.check(); err != nil {
		return err
	}
	if err := i.prepare(s.state, s.run); err != nil {
		return err
	}
	pid, died, err := s.detach(i)
	if err != nil {
		return err
	}
	if err := s.ready(ctx, died); err != nil {
		// Nothing half done: what this command started ends with it, and
		// nothing else.
		if p, _ := supervise.Find(s.run, "supervisor"); p != nil && p.Pid == pid {
			_, stop := supervise.Stop(context.WithoutCancel(ctx), s.run, "supervisor", syscall.SIGTERM, 2*supervise.Grace)
			err = errors.Join(err, stop)
		}
		return err
	}
	return nil
}

// running accepts an installation that runs if it is the one that was asked
// for.
func (s *session) running(ctx context.Context, i *installation) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := s.ready(ctx, s.watch(ctx)); err != nil {
		return err
	}
	st, err := s.client().Status(ctx)
	if err != nil {
		return err
	}
	for _, n := range st.Nodes {
		if n.GuardOff != i.withoutGuard {
			return &admin.Error{Message: fmt.Sprintf("node %s is running with --without-guard=%v", n.Name, n.GuardOff), Fix: "stop it first: hauberk down"}
		}
	}
	s.progress().Say("already running since %s", st.StartedAt.Local().Format(time.DateTime))
	return nil
}

// errEnded is the end of the supervisor while something is waited for.
var errEnded = errors.New("the supervisor ended")

// watch yields when a supervisor that this command did not start has ended.
func (s *session) watch(ctx context.Context) <-chan error {
	ended := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			p, err := supervise.Find(s.run, "supervisor")
			if p == nil {
				ended <- err
				return
			}
			_ = p.Release()
			time.Sleep(pollEvery)
		}
	}()
	return ended
}

// detach starts the supervisor in a session of its own. The channel yields if
// it dies while this command runs.
func (s *session) detach(i *installation) (pid int, died <-chan error, err error) {
	out, err := os.OpenFile(s.log("supervisor"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return 0, nil, err
	}
	defer out.Close()
	self, err := os.Executable()
	if err != nil {
		return 0, nil, err
	}
	cmd := exec.Command(self, append([]string{"supervise", "--state=" + s.state, "--run=" + s.run}, i.arguments()...)...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = out, out, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return 0, nil, fmt.Errorf("start supervisor: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	return cmd.Process.Pid, ended, nil
}

func (s *session) logDir() string { return filepath.Join(s.state, "log") }

func (s *session) log(program string) string { return filepath.Join(s.logDir(), program+".log") }

// ready waits for the control plane, then for a node.
func (s *session) ready(ctx context.Context, died <-chan error) error {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	err := s.await(ctx, "the control plane", "hauberkd", died, func(admin.Status) bool { return true })
	if err != nil {
		return err
	}
	return s.await(ctx, "the node, which boots a template sandbox", "hauberk-node", died, func(st admin.Status) bool {
		for _, n := range st.Nodes {
			if n.Ready {
				return true
			}
		}
		return false
	})
}

// await polls the status until it is good. The error says what was waited for
// and what the program to blame wrote last.
func (s *session) await(ctx context.Context, what, program string, died <-chan error, good func(admin.Status) bool) error {
	end := s.progress().Step("waiting for %s", what)
	for {
		st, err := s.client().Status(ctx)
		if err == nil && good(st) {
			return end(nil)
		}
		select {
		case err := <-died:
			return s.blame("supervisor", fmt.Errorf("wait for %s: %w: %w", what, errEnded, orZero(err)))
		case <-ctx.Done():
			if errors.Is(err, client.ErrNotRunning) {
				err = errors.New("it does not answer")
			}
			return s.blame(program, fmt.Errorf("wait for %s: %w: %v", what, context.Cause(ctx), err))
		case <-time.After(pollEvery):
		}
	}
}

func orZero(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// blame adds the end of a program's log to an error.
func (s *session) blame(program string, err error) error {
	s.progress().Say("last lines of %s:\n%s", s.log(program), supervise.Tail(s.logDir(), program, 20))
	return err
}

func (s *session) down() *cobra.Command {
	var keep bool
	c := &cobra.Command{
		Use: "down", Short: "Stop the installation on this machine",
		Long: `Down stops the node, which ends its sandboxes, then the mesh and the control
plane. What was released, recorded and configured stays in the state directory.`,
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			signal := syscall.SIGTERM
			if keep {
				signal = syscall.SIGUSR1
			}
			return s.stop(c.Context(), signal)
		},
	}
	c.Flags().BoolVar(&keep, "keep", false, "leave the sandboxes running; the next up adopts them")
	return c
}

// upgradeWithin bounds the wait for the mesh to be replaced: what it holds stops
// for a moment only, but it may have to wait for handshakes first.
const upgradeWithin = 30 * time.Second

func (s *session) upgrade() *cobra.Command {
	return &cobra.Command{
		Use: "upgrade", Short: "Replace the running mesh, losing no connection",
		Long: `Upgrade starts the hauberk-mesh that is installed now and has it take the place of
the one that runs, with its sockets and all live connections, requests under way
among them. If it cannot, for whatever reason, the one that runs goes on.

Connections stand still for a moment meanwhile; none is reset and no request is
lost. The way back is the same: install the version before and upgrade again.`,
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			end := s.progress().Step("replacing the mesh")
			return end(s.replaceMesh(c.Context()))
		},
	}
}

func (s *session) replaceMesh(ctx context.Context) error {
	sv, err := supervise.Find(s.run, "supervisor")
	if err != nil {
		return err
	}
	old, err := supervise.Find(s.run, "hauberk-mesh")
	if err != nil {
		return err
	}
	if sv == nil || old == nil {
		return &admin.Error{Message: "no mesh runs on this machine", Fix: "start the installation: hauberk up"}
	}
	if err := sv.Signal(syscall.SIGHUP); err != nil {
		return fmt.Errorf("ask the supervisor: %w", err)
	}
	for deadline := time.Now().Add(upgradeWithin); time.Now().Before(deadline); {
		now, err := supervise.Find(s.run, "hauberk-mesh")
		if err == nil && now != nil && now.Pid != old.Pid {
			s.progress().Say("process %d has taken the place of %d", now.Pid, old.Pid)
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollEvery):
		}
	}
	return &admin.Error{Message: fmt.Sprintf("the mesh was not replaced within %v; process %d goes on", upgradeWithin, old.Pid),
		Fix: "see why in " + s.log("hauberk-mesh") + " and " + s.log("supervisor")}
}

// stop ends the supervisor, and with it the programs.
func (s *session) stop(ctx context.Context, signal syscall.Signal) error {
	end := s.progress().Step("stopping")
	found, err := supervise.Stop(ctx, s.run, "supervisor", signal, 4*supervise.Grace)
	if err != nil {
		return err
	}
	left, err := s.endLeft(ctx, signal)
	if err != nil {
		return err
	}
	// It holds an administrator's key, and what it opens is gone.
	_ = os.Remove(filepath.Join(s.run, "control", "kubeconfig"))
	if !found && !left {
		s.progress().Say("nothing was running")
	}
	if signal == syscall.SIGTERM {
		return end(s.endSandboxes(ctx))
	}
	return end(nil)
}

// endLeft ends programs that have outlived a supervisor that was killed, as
// the signal would have made it do. It says whether there were any.
func (s *session) endLeft(ctx context.Context, signal syscall.Signal) (found bool, err error) {
	for _, name := range []string{"hauberk-node", "hauberk-mesh", "hauberkd"} {
		last := syscall.SIGTERM
		if signal == syscall.SIGUSR1 && name == "hauberk-node" {
			last = syscall.SIGKILL // asked to stop it would end its sandboxes
		}
		left, err := supervise.Stop(ctx, s.run, name, last, supervise.Grace)
		if err != nil {
			return found, err
		}
		found = found || left
		_ = os.Remove(filepath.Join(s.run, name+".pid")) // a killed supervisor has not
	}
	_ = os.Remove(filepath.Join(s.run, "supervisor.pid"))
	return found, nil
}

// endSandboxes ends what a node that was killed has left running.
func (s *session) endSandboxes(ctx context.Context) error {
	if _, err := os.Stat(s.nodeDir()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	cmd := exec.CommandContext(ctx, filepath.Join(beside(), "hauberk-node"), "--end", "--state="+filepath.Join(s.state, "node"), "--run="+s.nodeDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("end sandboxes: %w: %s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

func (s *session) nodeDir() string { return filepath.Join(s.run, "node") }

// supervise is what up starts and leaves running.
func (s *session) supervise() *cobra.Command {
	var i installation
	c := &cobra.Command{
		Use: "supervise", Short: "Keep the programs of this machine running (started by up)",
		Hidden: true, Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			programs, err := i.list(s.state, s.run)
			if err != nil {
				return err
			}
			ctx, end := context.WithCancelCause(c.Context())
			defer end(nil)
			leave := make(chan os.Signal, 1)
			signal.Notify(leave, syscall.SIGUSR1)
			defer signal.Stop(leave)
			go func() {
				select {
				case <-leave:
					end(supervise.ErrLeave)
				case <-ctx.Done():
				}
			}()
			replace := make(chan os.Signal, 1)
			signal.Notify(replace, syscall.SIGHUP)
			defer signal.Stop(replace)
			sv := supervise.Supervisor{Replace: replace, Programs: programs, RunDir: s.run, LogDir: s.logDir(), Out: s.Err}
			return sv.Run(ctx)
		},
	}
	i.flags(c.Flags())
	return c
}
