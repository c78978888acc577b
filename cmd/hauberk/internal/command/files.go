package command

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/hand"
	"hauberk.dev/cmd/hauberk/internal/show"
)

func (s *session) cp() *cobra.Command {
	return &cobra.Command{
		Use: "cp NAME:PATH TARGET | SOURCE NAME:PATH", Short: "Copy files out of a sandbox run by hand, or into it",
		Long: `Cp copies a file, or a directory with all that is in it, as cp -r does. SOURCE or
TARGET may be -, for a tar stream on standard output or input.

Files that come out belong to who calls, without set-id bits, and nothing is
written outside of TARGET, whatever the guest says. Files that go in are root's.`,
		Example:           "  hauberk cp web:/etc/passwd .\n  hauberk cp build/. web:/srv\n  hauberk cp web:/var/log - | tar t",
		Args:              args(2, 2, "SOURCE and TARGET, one of them NAME:PATH"),
		ValidArgsFunction: s.completeCopy,
		RunE: func(c *cobra.Command, args []string) error {
			from, fromPath, out := cutBox(args[0])
			to, toPath, in := cutBox(args[1])
			if out == in {
				return usage(c, errors.New("one of SOURCE and TARGET must be NAME:PATH, and only one"))
			}
			if in {
				b, err := s.box(to)
				switch {
				case err != nil:
					return err
				case args[0] == "-":
					return b.CopyIn(c.Context(), toPath, s.In)
				}
				return b.Put(c.Context(), args[0], toPath)
			}
			b, err := s.box(from)
			switch {
			case err != nil:
				return err
			case args[1] == "-":
				return b.CopyOut(c.Context(), fromPath, s.Out)
			}
			return b.Get(c.Context(), fromPath, args[1])
		},
	}
}

// cutBox tells NAME:PATH from a path of this machine, which has a slash before
// any colon, or none.
func cutBox(arg string) (name, path string, ok bool) {
	if strings.HasPrefix(arg, handPrefix) {
		name, path, ok = strings.Cut(arg[len(handPrefix):], ":")
		return name, path, ok && name != ""
	}
	name, path, ok = strings.Cut(arg, ":")
	return name, path, ok && name != "" && !strings.ContainsAny(name, "/.")
}

func (s *session) completeCopy(c *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	names, _ := s.completeBoxes(c, nil, typed)
	for i := range names {
		names[i] += ":"
	}
	return names, cobra.ShellCompDirectiveDefault | cobra.ShellCompDirectiveNoSpace
}

func (s *session) top() *cobra.Command {
	return &cobra.Command{
		Use: "top NAME", Short: "List what runs in a sandbox run by hand, by its guest's word",
		Args: args(1, 1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			b, err := s.box(names[0])
			if err != nil {
				return err
			}
			list, err := b.Top(c.Context())
			if err != nil {
				return err
			}
			slices.SortFunc(list, func(a, b hand.Task) int { return int(a.PID) - int(b.PID) })
			return s.print(list, func(w io.Writer) error {
				var rows [][]string
				for _, t := range list {
					rows = append(rows, []string{
						strconv.Itoa(int(t.PID)), strconv.Itoa(int(t.Parent)), strconv.Itoa(int(t.UID)), size(t.Resident),
						fmt.Sprint(time.Duration(t.CPUMicros) * time.Microsecond), t.Name,
					})
				}
				return show.Rows(w, []string{"PID", "PARENT", "USER", "MEMORY", "CPU", "COMMAND"}, rows)
			})
		},
	}
}
