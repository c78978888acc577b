package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
)

func (s *session) exec() *cobra.Command {
	var ask admin.Exec
	var input bool
	c := &cobra.Command{
		Use:   "exec [-it] [NAMESPACE/]WORKLOAD -- COMMAND [ARGS...]",
		Short: "Run a command in a running instance",
		Long: `Exec runs a command inside the sandbox of a running instance. It needs the right
to debug on the application, it is recorded in the ledger, and the Guard judges
the command like any other.

The exit code is the command's own; 125 if it could not be started or watched.`,
		Example:           "  hauberk exec bank/web -- /bin/web -version\n  hauberk exec -it bank/assistant -- /bin/sh",
		Args:              args(2, -1, "a WORKLOAD and a COMMAND"),
		ValidArgsFunction: s.completeWorkloads,
		RunE: func(c *cobra.Command, args []string) error {
			ask.Namespace, ask.Workload = address(ask.Namespace, args[0])
			ask.Args = args[1:]
			if ask.Args[0] == "--" && len(ask.Args) > 1 {
				ask.Args = ask.Args[1:]
			}
			code, err := s.attach(c.Context(), ask, input)
			if err != nil {
				return &exitError{exitExec, err}
			}
			if code != 0 {
				return &exitError{code: code}
			}
			return nil
		},
	}
	c.Flags().SetInterspersed(false)
	c.Flags().StringVarP(&ask.Namespace, "namespace", "n", "default", "namespace of the workload")
	c.Flags().StringVar(&ask.Instance, "instance", "", "this instance (default: any that runs)")
	c.Flags().BoolVarP(&input, "stdin", "i", false, "pass standard input on")
	c.Flags().BoolVarP(&ask.TTY, "tty", "t", false, "give the command a terminal")
	return c
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
