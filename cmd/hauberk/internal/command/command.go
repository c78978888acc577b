// Package command is the command line of hauberk: flags, help, and the words
// in which answers and refusals are put to people.
//
// What a command does lives in the packages beside this one.
package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/progress"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/internal/version"
)

// Exit codes of hauberk itself; exec passes on the code of its process.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	// exitExec is what exec answers when the process could not be started or
	// watched, so that it can be told from codes of common programs.
	exitExec = 125
)

// Stdio of the command.
type Stdio struct {
	In       io.Reader
	Out, Err io.Writer
}

// session is what the commands share: flags that every command has, and where
// to read and write.
type session struct {
	Stdio
	state, run string
	format     show.Format
	now        func() time.Time
}

// exitError carries an exit code out of a command. A nil error in it has been
// told already.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// Run runs one command line and returns its exit code.
func Run(ctx context.Context, args []string, stdio Stdio) int {
	s := &session{Stdio: stdio, format: show.Table, now: time.Now}
	root := s.root()
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	var exit *exitError
	if !errors.As(err, &exit) {
		exit = &exitError{exitFailed, err}
	}
	if exit.err != nil {
		s.complain(exit.err)
	}
	return exit.code
}

// complain says what is wrong, then what to do about it.
func (s *session) complain(err error) {
	var refused *admin.Error
	fix := ""
	switch {
	case errors.As(err, &refused):
		fix = refused.Fix
	case errors.Is(err, client.ErrNotRunning):
		fix = "start it with: hauberk up"
	case errors.Is(err, context.Canceled):
		err = errors.New("interrupted")
	}
	for l := range strings.Lines(err.Error()) { // several faults are a line each
		fmt.Fprintf(s.Err, "hauberk: %s\n", show.Clean(strings.TrimSuffix(l, "\n")))
	}
	if fix != "" {
		fmt.Fprintf(s.Err, "  fix: %s\n", show.Clean(fix))
	}
}

func (s *session) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "hauberk",
		Short: "Run workloads so that every link of the chain is checked, enforced and recorded",
		Long: `Hauberk runs cloud-native workloads so that every link of the chain is checked,
enforced and recorded: who owns the code, who released the image, what machine
booted, which kernel isolates the pod, what may run inside it, and whom it may
talk to.`,
		Example: `  hauberk up examples/bank       start everything and deploy the bank
  hauberk ps                     what runs
  hauberk why transfer           what happened to a workload, in order
  hauberk incidents              what was contained
  hauberk run --rm -it busybox   a sandbox by hand, without all the rest
  hauberk down                   stop everything`,
		Args:          known,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SuggestionsMinimumDistance = 2
	root.SetIn(s.In)
	root.SetOut(s.Out)
	root.SetErr(s.Err)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usage(c, err) })
	flags := root.PersistentFlags()
	s.state, s.run = defaultState, defaultRun
	flags.Var(place{&s.state}, "state", "directory of what must survive a restart")
	flags.Var(place{&s.run}, "run", "directory of sockets and process ids")
	flags.VarP(&s.format, "output", "o", "how answers are printed")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(show.Formats(), cobra.ShellCompDirectiveNoFileComp))
	for _, name := range []string{"state", "run"} {
		_ = root.MarkPersistentFlagDirname(name)
	}
	root.AddGroup(&cobra.Group{ID: "run", Title: "Run:"}, &cobra.Group{ID: "hand", Title: "Sandboxes by hand:"}, &cobra.Group{ID: "ask", Title: "Ask:"}, &cobra.Group{ID: "release", Title: "Build and release:"})
	group(root, "run", s.up(), s.down(), s.upgrade(), s.apply(), s.delete(), s.restart(), s.exec())
	group(root, "hand", s.runBox(), s.attachBox(), s.stopBox(), s.kill(), s.rm(), s.pause(), s.resume(), s.snapshot(), s.restore(), s.fork(), s.wait(), s.stats(), s.top(), s.cp(), s.inspect(), s.images(), s.pull(), s.rmi())
	group(root, "ask", s.status(), s.ps(), s.logs(), s.events(), s.tap(), s.why(), s.incidents(), s.guard(), s.ledger())
	group(root, "release", s.build(), s.release())
	root.AddCommand(s.version(), s.supervise())
	return root
}

// place is a flag that means one place, whatever directory the programs
// that are told of it work in.
type place struct{ path *string }

func (p place) Set(v string) (err error) {
	*p.path, err = filepath.Abs(v)
	return err
}

func (p place) String() string {
	if p.path == nil { // as pflag makes one, to compare defaults
		return ""
	}
	return *p.path
}

func (place) Type() string { return "string" }

// known refuses words that are no command, and offers those that are near.
func known(c *cobra.Command, words []string) error {
	if len(words) == 0 {
		return nil
	}
	err := fmt.Errorf("unknown command %q", words[0])
	if near := c.SuggestionsFor(words[0]); len(near) > 0 {
		err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
	}
	return usage(c, err)
}

func group(root *cobra.Command, id string, commands ...*cobra.Command) {
	for _, c := range commands {
		c.GroupID = id
		root.AddCommand(c)
	}
}

// usage is an error in the command line itself.
func usage(c *cobra.Command, err error) error {
	return &exitError{exitUsage, fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
}

// args checks the number of arguments and says what is missing by name.
func args(least, most int, names string) cobra.PositionalArgs {
	return func(c *cobra.Command, got []string) error {
		switch {
		case len(got) < least:
			return usage(c, fmt.Errorf("%s needs %s", c.CommandPath(), names))
		case most >= 0 && len(got) > most:
			return usage(c, fmt.Errorf("%s: unexpected argument %q", c.CommandPath(), got[most]))
		}
		return nil
	}
}

func (s *session) client() *client.Client {
	return client.New(filepath.Join(s.run, "control", "admin.sock"))
}

func (s *session) progress() *progress.Log { return progress.New(s.Err, s.now) }

// print shows v in the format that was asked for.
func (s *session) print(v any, table func(io.Writer) error) error {
	return show.Value(s.Out, s.format, v, table)
}

// address splits NAMESPACE/NAME; a bare NAME is in the namespace of the flag.
func address(flag, arg string) (namespace, name string) {
	if ns, name, ok := strings.Cut(arg, "/"); ok {
		return ns, name
	}
	return flag, arg
}

func (s *session) version() *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Print the version of this command and of the control plane",
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			v := struct {
				Hauberk  string `json:"hauberk"`
				Hauberkd string `json:"hauberkd,omitempty"`
			}{Hauberk: version.Long()}
			if st, err := s.client().Status(c.Context()); err == nil {
				v.Hauberkd = st.Version
			}
			return s.print(v, func(w io.Writer) error {
				if v.Hauberkd == "" {
					v.Hauberkd = "not running"
				}
				_, err := fmt.Fprintf(w, "hauberk   %s\nhauberkd  %s\n", v.Hauberk, show.Clean(v.Hauberkd))
				return err
			})
		},
	}
}
