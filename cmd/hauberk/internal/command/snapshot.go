package command

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/sandbox"
)

func (s *session) snapshot() *cobra.Command {
	var end bool
	c := &cobra.Command{
		Use: "snapshot NAME DIRECTORY", Short: "Save a sandbox run by hand, with what it is in the middle of",
		Long: `Snapshot saves a running sandbox into a directory, which is made: its processes,
their memory, the files it wrote and its policy. The sandbox stands still for
about a second meanwhile, and goes on unless --end is given. A sandbox with
volumes of this machine cannot be saved.

The directory holds all that the processes hold, passwords and keys too. It is
root's, and whoever can read it has them.`,
		Example: "  hauberk snapshot agent /var/backups/agent-1\n  hauberk snapshot --end agent /var/backups/agent-1 && hauberk restore /var/backups/agent-1",
		Args:    args(2, 2, "a NAME and a DIRECTORY"), ValidArgsFunction: s.completeSnapshot,
		RunE: func(c *cobra.Command, words []string) error {
			b, err := s.box(words[0])
			if err != nil {
				return err
			}
			if !end {
				return b.Snapshot(c.Context(), words[1])
			}
			if err := b.Suspend(c.Context(), words[1]); err != nil {
				return err
			}
			_, err = b.Wait(c.Context())
			return err
		},
	}
	c.Flags().BoolVar(&end, "end", false, "end the sandbox instead of letting it go on")
	return c
}

func (s *session) completeSnapshot(c *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	if len(given) == 0 {
		return s.completeBoxes(c, given, typed)
	}
	return nil, cobra.ShellCompDirectiveFilterDirs
}

func (s *session) restore() *cobra.Command {
	var o sandbox.Options
	var labels []string
	c := &cobra.Command{
		Use: "restore DIRECTORY", Short: "Let a saved sandbox go on as a new one, and print its ID",
		Long: `Restore starts a sandbox that goes on from where another was saved, as often as
wanted. It has an ID, a name, addresses and random numbers of its own; its image,
policy, size, environment and host name are as they were. Connections that were
open have ended.

It needs the same QEMU, guest kernel, agent, Guard and image as when it was saved:
if one of them changed, the error names it. A directory that was changed, or that
others could have read, is refused.`,
		Example: "  hauberk restore /var/backups/agent-1\n  hauberk restore --name again -p 8081:80 /var/backups/web",
		Args:    args(1, 1, "a DIRECTORY"),
		RunE: func(c *cobra.Command, words []string) error {
			var err error
			if o.Labels, err = parseLabels(labels); err != nil {
				return usage(c, err)
			}
			h, err := s.host()
			if err != nil {
				return err
			}
			b, err := h.Restore(c.Context(), words[0], o)
			if errors.Is(err, sandbox.ErrDamaged) {
				return &admin.Error{Message: err.Error(), Fix: "use another copy of the snapshot: this one is not as it was written"}
			}
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(s.Out, b.ID())
			return err
		},
	}
	f := c.Flags()
	f.StringVar(&o.Name, "name", "", "name of the sandbox (default: made up)")
	f.BoolVar(&o.Remove, "rm", false, "remove the sandbox when it ends")
	f.StringArrayVarP(&labels, "label", "l", nil, "label NAME=VALUE, in place of those it had")
	f.StringArrayVar(&o.Egress, "egress", nil, "where it may go, in place of where it could; as run has it")
	f.StringArrayVarP(&o.Publish, "publish", "p", nil, "ports that lead into it, in place of those that did; as run has it")
	for _, name := range []string{"name", "label", "egress", "publish"} {
		_ = c.RegisterFlagCompletionFunc(name, cobra.NoFileCompletions)
	}
	return c
}

func (s *session) fork() *cobra.Command {
	var n int
	c := &cobra.Command{
		Use: "fork NAME", Short: "Copy a running sandbox, with what it is in the middle of, and print the copies' IDs",
		Long: `Fork makes copies of a running sandbox, which go on from where it is: the same
processes, memory and files, and from then on each its own. The sandbox stands
still for about a second and goes on. Each copy has an ID, a name, addresses and
random numbers of its own; ports are published on free ones, which ps shows. A
sandbox with volumes of this machine cannot be copied.`,
		Example: "  hauberk fork agent\n  hauberk fork -n 3 agent",
		Args:    args(1, 1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error { return s.forkBox(c.Context(), names[0], n) },
	}
	c.Flags().IntVarP(&n, "number", "n", 1, "how many copies")
	return c
}

func (s *session) forkBox(ctx context.Context, name string, n int) error {
	b, err := s.box(name)
	if err != nil {
		return err
	}
	copies, err := b.Fork(ctx, n)
	if err != nil {
		return err
	}
	for _, f := range copies {
		if _, err := fmt.Fprintln(s.Out, show.Clean(f.ID())); err != nil {
			return err
		}
	}
	return nil
}
