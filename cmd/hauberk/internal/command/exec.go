package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/sandbox"
)

// execOptions are the flags of exec.
type execOptions struct {
	admin.Exec
	input, detach bool
	cmd           sandbox.Cmd
	envFiles      []string
}

func (s *session) exec() *cobra.Command {
	var o execOptions
	c := &cobra.Command{
		Use:   "exec [-it] NAME COMMAND [ARGS...]",
		Short: "Run a command in a sandbox: of a workload, or run by hand",
		Long: `Exec runs a command inside a sandbox. NAME is [NAMESPACE/]WORKLOAD of the control
plane, or the name or ID of a sandbox run by hand; hand/NAME is always the latter.

In an instance it needs the right to debug on the application, and is recorded in
the ledger. In both the Guard judges the command like any other.

The exit code is the command's own; 125 if it could not be started or watched, 126
if it is there but cannot be run, 127 if it is not there.`,
		Example:           "  hauberk exec bank/web -- /bin/web -version\n  hauberk exec -it bank/assistant -- /bin/sh\n  hauberk exec -it brisk-otter sh",
		Args:              args(2, -1, "a NAME and a COMMAND"),
		ValidArgsFunction: s.completeAll,
		RunE: func(c *cobra.Command, args []string) error {
			o.Args = args[1:]
			if o.Args[0] == "--" && len(o.Args) > 1 {
				o.Args = o.Args[1:]
			}
			return exited(s.execIn(c.Context(), args[0], &o))
		},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	f.StringVarP(&o.Namespace, "namespace", "n", "default", "namespace of the workload")
	f.StringVar(&o.Instance, "instance", "", "this instance of the workload (default: any that runs)")
	f.BoolVarP(&o.input, "interactive", "i", false, "pass standard input on")
	f.BoolVar(&o.input, "stdin", false, "the same as --interactive")
	f.BoolVarP(&o.TTY, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&o.detach, "detach", "d", false, "by hand: leave it running")
	f.StringArrayVarP(&o.cmd.Env, "env", "e", nil, "by hand: variable NAME=VALUE")
	f.StringArrayVar(&o.envFiles, "env-file", nil, "by hand: file of lines NAME=VALUE")
	f.StringVarP(&o.cmd.Dir, "workdir", "w", "", "by hand: working directory")
	f.StringVarP(&o.cmd.User, "user", "u", "", "by hand: user, or user:group")
	_ = f.MarkHidden("stdin")
	return c
}

// execIn runs a command in what a name means.
func (s *session) execIn(ctx context.Context, name string, o *execOptions) (int, error) {
	t, err := s.find(ctx, o.Namespace, o.Instance, name)
	if err != nil {
		return 0, err
	}
	if t.box != nil {
		return s.execBox(ctx, t.box, o)
	}
	if o.detach || len(o.cmd.Env)+len(o.envFiles) > 0 || o.cmd.Dir != "" || o.cmd.User != "" {
		return 0, fmt.Errorf("%s is no sandbox run by hand: -d, -e, -w and -u are for those", name)
	}
	o.Namespace, o.Workload = t.namespace, t.workload
	return s.attach(ctx, o.Exec, o.input)
}

// execBox runs a command in a sandbox run by hand.
func (s *session) execBox(ctx context.Context, b *sandbox.Sandbox, o *execOptions) (int, error) {
	cmd := o.cmd
	cmd.Args, cmd.Terminal, cmd.Stdin, cmd.Detached = o.Args, o.TTY, o.input, o.detach
	var err error
	if cmd.Env, err = environment(o.envFiles, cmd.Env, os.LookupEnv); err != nil {
		return 0, err
	}
	var tty *terminal
	if cmd.Terminal && !cmd.Detached {
		if tty, err = s.openTerminal(o.input); err != nil {
			return 0, err
		}
		cmd.Rows, cmd.Cols = tty.size()
	}
	p, err := b.Exec(ctx, cmd)
	if err != nil {
		return 0, err
	}
	defer p.Close()
	if cmd.Detached {
		return 0, nil
	}
	return s.join(ctx, joined{
		stream: p.Stream, tty: tty, input: o.input, keys: "ctrl-p,ctrl-q", errs: s.Err,
		kill: p.Kill, resize: p.Resize, wait: p.Wait, left: "left running",
	})
}

func (s *session) logs() *cobra.Command {
	var namespace, instance, since string
	o := sandbox.LogOptions{}
	c := &cobra.Command{
		Use: "logs NAME", Short: "Print what a workload, or a sandbox run by hand, wrote",
		Long: `Logs prints what the first process of a sandbox wrote. NAME is
[NAMESPACE/]WORKLOAD of the control plane, or the name or ID of a sandbox run by
hand; hand/NAME is always the latter.`,
		Example:           "  hauberk logs bank/web\n  hauberk logs -n bank -f transfer\n  hauberk logs --tail 10 -t brisk-otter",
		Args:              args(1, 1, "a NAME"),
		ValidArgsFunction: s.completeAll,
		RunE: func(c *cobra.Command, args []string) error {
			t, err := s.find(c.Context(), namespace, instance, args[0])
			if err != nil {
				return err
			}
			if t.box == nil {
				return s.workloadLogs(c.Context(), t, o.Follow)
			}
			if since != "" {
				if o.Since, err = parseSince(since, s.now()); err != nil {
					return usage(c, err)
				}
			}
			err = t.box.Logs(c.Context(), o, s.Out, s.Err)
			if c.Context().Err() != nil {
				return nil // an interrupt is how following ends
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVarP(&namespace, "namespace", "n", "default", "namespace of the workload")
	f.StringVarP(&instance, "instance", "i", "", "only this instance of the workload")
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on until it ends, or interrupted")
	f.IntVar(&o.Tail, "tail", -1, "by hand: only the last lines (default: all)")
	f.BoolVarP(&o.Timestamps, "timestamps", "t", false, "by hand: the time before each line")
	f.StringVar(&since, "since", "", "by hand: not what is older than a time, or than a while such as 10m")
	return c
}

func (s *session) workloadLogs(ctx context.Context, t target, follow bool) error {
	r, err := s.client().Logs(ctx, t.namespace, t.workload, t.instance, follow)
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := io.Copy(s.Out, r); err != nil && ctx.Err() == nil {
		return fmt.Errorf("read logs of %s: %w", t.workload, err)
	}
	return nil // an interrupt is how following ends
}

// parseSince reads a time, or how long ago it was.
func parseSince(text string, now time.Time) (time.Time, error) {
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), nil
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("--since %q: want a time such as 2026-11-22T10:00:00Z, or a while such as 10m", text)
	}
	return at, nil
}

// attach runs an exec with this process's terminal, which is set back to what
// it was whatever happens.
func (s *session) attach(ctx context.Context, ask admin.Exec, input bool) (int, error) {
	stdio := client.Stdio{Out: s.Out, Err: s.Err}
	if input {
		stdio.In = s.In
	}
	if ask.TTY {
		restore, sizes, err := s.terminal(&ask)
		if err != nil {
			return 0, err
		}
		defer restore()
		stdio.Resize = sizes
	}
	return s.client().Exec(ctx, ask, stdio)
}

// terminal puts the terminal into raw mode and follows its size.
func (s *session) terminal(ask *admin.Exec) (restore func(), sizes <-chan client.Size, err error) {
	in, ok := s.In.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return nil, nil, errors.New("standard input is no terminal: leave -t out")
	}
	if cols, rows, err := term.GetSize(int(in.Fd())); err == nil {
		ask.Rows, ask.Cols = clamp(rows), clamp(cols)
	}
	old, err := term.MakeRaw(int(in.Fd()))
	if err != nil {
		return nil, nil, fmt.Errorf("set terminal to raw mode: %w", err)
	}
	changed := make(chan os.Signal, 1)
	signal.Notify(changed, syscall.SIGWINCH)
	out, ended := make(chan client.Size), make(chan struct{})
	go follow(in, changed, out, ended)
	return func() {
		signal.Stop(changed)
		close(ended)
		_ = term.Restore(int(in.Fd()), old)
	}, out, nil
}

func follow(in *os.File, changed <-chan os.Signal, out chan<- client.Size, ended <-chan struct{}) {
	for {
		select {
		case <-ended:
			return
		case <-changed:
		}
		cols, rows, err := term.GetSize(int(in.Fd()))
		if err != nil {
			continue
		}
		select {
		case out <- client.Size{Rows: clamp(rows), Cols: clamp(cols)}:
		case <-ended:
			return
		}
	}
}

func clamp(n int) uint16 { return uint16(min(max(n, 0), 1<<16-1)) }
