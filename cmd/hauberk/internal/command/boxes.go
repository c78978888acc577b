package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/image"
	"hauberk.dev/sandbox"
)

// Where what ps lists comes from.
const (
	fromControl = "control"
	fromHand    = "hand"
)

// listedInstance and listedBox are lines of ps for programs: what is known of
// the thing, and whose it is.
type (
	listedInstance struct {
		From string `json:"from"`
		admin.Instance
	}
	listedBox struct {
		From string `json:"from"`
		sandbox.Info
	}
)

func (s *session) ps() *cobra.Command {
	var namespace string
	var wide, all, quiet bool
	c := &cobra.Command{
		Use: "ps", Short: "List what runs: instances of workloads, and sandboxes run by hand",
		Long: `Ps lists the instances of the control plane, if one runs, and the sandboxes that
were run by hand. Of the latter those that have ended are listed with --all.`,
		Example: "  hauberk ps\n  hauberk ps -a\n  hauberk ps -n bank --wide\n  hauberk ps -o json",
		Args:    args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			instances, err := s.client().Instances(c.Context(), namespace)
			noControl := errors.Is(err, client.ErrNotRunning)
			if err != nil && !noControl {
				return err
			}
			boxes, listErr := s.listBoxes(c.Context(), namespace, all)
			if listErr != nil {
				return listErr
			}
			if boxes == nil && noControl {
				return err // nothing was ever started here, or who asks may not see it
			}
			if quiet {
				return s.printNames(instances, boxes)
			}
			lines := make([]any, 0, len(instances)+len(boxes))
			for _, i := range instances {
				lines = append(lines, listedInstance{fromControl, i})
			}
			for _, b := range boxes {
				lines = append(lines, listedBox{fromHand, b})
			}
			return s.print(lines, func(w io.Writer) error { return s.psTable(w, instances, boxes, wide) })
		},
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "only this namespace of the control plane")
	c.Flags().BoolVarP(&wide, "wide", "w", false, "show identifiers, digests, identity and policy as well")
	c.Flags().BoolVarP(&all, "all", "a", false, "sandboxes that have ended as well")
	c.Flags().BoolVarP(&quiet, "quiet", "q", false, "only names")
	return c
}

// listBoxes gives the sandboxes run by hand, which are in no namespace; nil if
// there is no place for any.
func (s *session) listBoxes(ctx context.Context, namespace string, all bool) ([]sandbox.Info, error) {
	if namespace != "" {
		return nil, nil
	}
	h, err := s.byHand()
	if h == nil || err != nil {
		return nil, err
	}
	list, err := h.List(ctx)
	if err != nil {
		return nil, err
	}
	if list == nil {
		list = []sandbox.Info{} // there could be some
	}
	return slices.DeleteFunc(list, func(i sandbox.Info) bool { return i.Phase == sandbox.Exited && !all }), nil
}

func (s *session) printNames(instances []admin.Instance, boxes []sandbox.Info) error {
	for _, i := range instances {
		if _, err := fmt.Fprintln(s.Out, show.Clean(i.Namespace+"/"+i.Workload)); err != nil {
			return err
		}
	}
	for _, b := range boxes {
		if _, err := fmt.Fprintln(s.Out, b.ID); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) psTable(w io.Writer, instances []admin.Instance, boxes []sandbox.Info, wide bool) error {
	heading := []string{"FROM", "NAMESPACE", "NAME", "RUNS", "PHASE", "ADDRESS", "AGE", "REASON"}
	if wide {
		heading = append(heading, "ID", "IMAGE", "DIGEST", "IDENTITY", "GUARD")
	}
	var rows [][]string
	for _, i := range instances {
		r := []string{fromControl, i.Namespace, i.Name, i.Workload, i.Phase, i.Address, show.Age(i.StartedAt, s.now()), reason(i)}
		if wide {
			r = append(r, "", i.Image, show.Short(i.Digest), i.Identity, i.Guard)
		}
		rows = append(rows, r)
	}
	for _, b := range boxes {
		r := []string{fromHand, "", b.Name, runs(b), string(b.Phase), strings.Join(b.Ports, ","), show.Age(b.Created, s.now()), ended(b)}
		if wide {
			r = append(r, b.ID, short(b.Image), show.Short(b.Digest), "", b.Policy)
		}
		rows = append(rows, r)
	}
	return show.Rows(w, heading, rows)
}

// runs is what a sandbox runs, in the width of a table.
func runs(b sandbox.Info) string {
	text := []rune(short(b.Image) + " " + strings.Join(b.Args, " "))
	if len(text) > 40 {
		text = append(text[:39], '…')
	}
	return string(text)
}

func ended(b sandbox.Info) string {
	switch {
	case b.Reason != "":
		return b.Reason
	case b.ExitCode != nil:
		return "exit code " + strconv.Itoa(*b.ExitCode)
	}
	return ""
}

// short is the name of an image as people write it.
func short(name string) string {
	if r, err := image.ParseReference(name); err == nil {
		return r.Short()
	}
	return name
}

func (s *session) inspect() *cobra.Command {
	return &cobra.Command{
		Use: "inspect NAME...", Short: "Show all that is known of sandboxes run by hand, as JSON",
		Args: args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			var out []sandbox.Info
			for _, n := range names {
				b, err := s.box(n)
				if err != nil {
					return err
				}
				i, err := b.Info(c.Context())
				if err != nil {
					return err
				}
				out = append(out, i)
			}
			if s.format == show.Table {
				return show.Value(s.Out, show.JSON, out, nil)
			}
			return s.print(out, nil)
		},
	}
}

// each does something to each of several sandboxes, and goes on after one that
// fails.
func (s *session) each(ctx context.Context, names []string, act func(context.Context, *sandbox.Sandbox) error) error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var errs []error
	for _, n := range names {
		wg.Go(func() {
			b, err := s.box(n)
			if err == nil {
				err = act(ctx, b)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				errs = append(errs, err)
				return
			}
			fmt.Fprintln(s.Out, show.Clean(n))
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (s *session) stopBox() *cobra.Command {
	var grace int
	c := &cobra.Command{
		Use: "stop NAME...", Short: "Ask sandboxes run by hand to end, and kill those that do not",
		Example: "  hauberk stop web\n  hauberk stop -t 0 web",
		Args:    args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			return s.each(c.Context(), names, func(ctx context.Context, b *sandbox.Sandbox) error {
				_, err := b.Stop(ctx, time.Duration(grace)*time.Second)
				return err
			})
		},
	}
	c.Flags().IntVarP(&grace, "time", "t", 10, "seconds to wait before it is killed")
	return c
}

func (s *session) rm() *cobra.Command {
	var force bool
	c := &cobra.Command{
		Use: "rm NAME...", Short: "Remove sandboxes run by hand, and all that is left of them",
		Example: "  hauberk rm web\n  hauberk rm -f $(hauberk ps -aq)",
		Args:    args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			return s.each(c.Context(), names, func(ctx context.Context, b *sandbox.Sandbox) error { return b.Remove(ctx, force) })
		},
	}
	c.Flags().BoolVarP(&force, "force", "f", false, "also those that run")
	return c
}

func (s *session) kill() *cobra.Command {
	var signal string
	c := &cobra.Command{
		Use: "kill NAME...", Short: "Signal the first process of sandboxes run by hand",
		Example: "  hauberk kill web\n  hauberk kill -s HUP web",
		Args:    args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			n, err := sandbox.ParseSignal(signal)
			if err != nil {
				return usage(c, err)
			}
			return s.each(c.Context(), names, func(ctx context.Context, b *sandbox.Sandbox) error { return b.Kill(ctx, n) })
		},
	}
	c.Flags().StringVarP(&signal, "signal", "s", "KILL", "name or number")
	return c
}

func (s *session) pause() *cobra.Command {
	return &cobra.Command{
		Use: "pause NAME...", Short: "Freeze sandboxes run by hand, whole",
		Args: args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			return s.each(c.Context(), names, func(ctx context.Context, b *sandbox.Sandbox) error { return b.Pause(ctx) })
		},
	}
}

func (s *session) resume() *cobra.Command {
	return &cobra.Command{
		Use: "resume NAME...", Short: "Let paused sandboxes go on", Aliases: []string{"unpause"},
		Args: args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			return s.each(c.Context(), names, func(ctx context.Context, b *sandbox.Sandbox) error { return b.Resume(ctx) })
		},
	}
}

func (s *session) wait() *cobra.Command {
	return &cobra.Command{
		Use: "wait NAME...", Short: "Wait for sandboxes run by hand to end, and print their exit codes",
		Args: args(1, -1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			for _, n := range names {
				b, err := s.box(n)
				if err != nil {
					return err
				}
				e, err := b.Wait(c.Context())
				if err != nil {
					return err
				}
				fmt.Fprintln(s.Out, e.Code)
			}
			return nil
		},
	}
}

// used is a line of stats.
type used struct {
	Name string `json:"name"`
	ID   string `json:"id"`
	sandbox.Stats
	// CPU is how much of one processor it used while it was watched.
	CPU float64 `json:"cpuPercent"`
}

// statsTime is how long processors are watched.
const statsTime = 500 * time.Millisecond

func (s *session) stats() *cobra.Command {
	var once bool
	c := &cobra.Command{
		Use: "stats [NAME...]", Short: "Show what sandboxes run by hand use",
		Long: `Stats shows what the guest says of its container, and what the machine's monitor
takes of this host's memory. On a terminal it goes on until interrupted.`,
		Example: "  hauberk stats\n  hauberk stats --no-stream -o json web",
		Args:    args(0, -1, ""), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			for {
				list, err := s.use(c.Context(), names)
				if err != nil {
					return err
				}
				clear := !once && s.format == show.Table && s.onTerminal()
				if clear {
					fmt.Fprint(s.Out, "\x1b[H\x1b[2J")
				}
				if err := s.print(list, func(w io.Writer) error { return statsTable(w, list) }); err != nil || !clear {
					return err
				}
				select {
				case <-c.Context().Done():
					return nil
				case <-time.After(statsTime):
				}
			}
		},
	}
	c.Flags().BoolVar(&once, "no-stream", false, "show it once")
	return c
}

// use measures sandboxes, or all that run.
func (s *session) use(ctx context.Context, names []string) ([]used, error) {
	h, err := s.host()
	if err != nil {
		return nil, err
	}
	list, err := h.List(ctx)
	if err != nil {
		return nil, err
	}
	if len(names) == 0 {
		list = slices.DeleteFunc(list, func(i sandbox.Info) bool { return i.Phase != sandbox.Running })
		for _, i := range list {
			names = append(names, i.ID)
		}
	}
	out := make([]used, len(names))
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for n, name := range names {
		wg.Go(func() { out[n], errs[n] = s.useOne(ctx, name) })
	}
	wg.Wait()
	return out, errors.Join(errs...)
}

func (s *session) useOne(ctx context.Context, name string) (used, error) {
	b, err := s.box(name)
	if err != nil {
		return used{}, err
	}
	i, err := b.Info(ctx)
	if err != nil {
		return used{}, err
	}
	before, err := b.Stats(ctx)
	if err != nil {
		return used{}, err
	}
	began := time.Now()
	select {
	case <-ctx.Done():
		return used{}, ctx.Err()
	case <-time.After(statsTime):
	}
	after, err := b.Stats(ctx)
	u := used{Name: i.Name, ID: i.ID, Stats: after}
	if after.CPUMicros > before.CPUMicros {
		u.CPU = float64(after.CPUMicros-before.CPUMicros) / float64(time.Since(began).Microseconds()) * 100
	}
	return u, err
}

func statsTable(w io.Writer, list []used) error {
	var rows [][]string
	for _, u := range list {
		limit := "-"
		if u.MemoryLimit > 0 {
			limit = size(u.MemoryLimit)
		}
		rows = append(rows, []string{u.Name, fmt.Sprintf("%.1f%%", u.CPU), size(u.Memory), limit, size(u.Host), strconv.FormatUint(u.Pids, 10), strconv.FormatUint(u.OOMKills, 10)})
	}
	return show.Rows(w, []string{"NAME", "CPU", "MEMORY", "LIMIT", "ON HOST", "PROCESSES", "OOM KILLS"}, rows)
}

// size of memory as people read it.
func size(n uint64) string {
	switch {
	case n >= 1<<30:
		return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%d KiB", n>>10)
}

func (s *session) attachBox() *cobra.Command {
	var noInput bool
	var keys string
	c := &cobra.Command{
		Use: "attach NAME", Short: "Join a sandbox that was left running",
		Long: `Attach joins the terminal, or the input and output, of a sandbox run by hand. On a
terminal ctrl-p ctrl-q leaves it running again. The exit code is the command's.`,
		Args: args(1, 1, "a NAME"), ValidArgsFunction: s.completeBoxes,
		RunE: func(c *cobra.Command, names []string) error {
			return exited(s.attachTo(c.Context(), names[0], !noInput, keys))
		},
	}
	c.Flags().BoolVar(&noInput, "no-stdin", false, "only watch")
	c.Flags().StringVar(&keys, "detach-keys", "ctrl-p,ctrl-q", "keys that leave the sandbox running; none turns it off")
	return c
}

func (s *session) attachTo(ctx context.Context, name string, input bool, keys string) (int, error) {
	b, err := s.box(name)
	if err != nil {
		return 0, err
	}
	i, err := b.Info(ctx)
	if err != nil {
		return 0, err
	}
	input = input && i.Stdin
	var tty *terminal
	if i.Terminal {
		if tty, err = s.openTerminal(input); err != nil {
			return 0, err
		}
	}
	stream, err := b.Attach(ctx)
	if err != nil {
		return 0, err
	}
	return s.join(ctx, joined{
		stream: stream, tty: tty, input: input, keys: keys, errs: s.Err, kill: b.Kill, resize: b.Resize, left: leftRunning(show.Clean(name)),
		wait: func(ctx context.Context) (int, error) { e, err := b.Wait(ctx); return e.Code, err },
	})
}

func (s *session) images() *cobra.Command {
	return &cobra.Command{
		Use: "images", Short: "List the images of this machine",
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			h, err := s.host()
			if err != nil {
				return err
			}
			list, err := h.Images()
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error {
				var rows [][]string
				for _, i := range list {
					rows = append(rows, []string{short(i.Name), show.Short(i.Digest), size(uint64(i.Size)), show.Age(i.Pulled, s.now())})
				}
				return show.Rows(w, []string{"IMAGE", "DIGEST", "SIZE", "PULLED"}, rows)
			})
		},
	}
}

func (s *session) pull() *cobra.Command {
	var o sandbox.PullOptions
	c := &cobra.Command{
		Use: "pull IMAGE...", Short: "Fetch images and pack them, ready to be run",
		Example: "  hauberk pull busybox:1.36\n  hauberk pull docker-archive:busybox.tar",
		Args:    args(1, -1, "an IMAGE"),
		RunE: func(c *cobra.Command, names []string) error {
			h, err := s.host()
			if err != nil {
				return err
			}
			var out []sandbox.Image
			for _, n := range names {
				img, err := h.Pull(c.Context(), n, o)
				if err != nil {
					return noImage(&sandbox.NoImageError{Image: n, Err: err})
				}
				out = append(out, img)
			}
			return s.print(out, func(w io.Writer) error {
				for _, i := range out {
					fmt.Fprintln(w, i.Digest)
				}
				return nil
			})
		},
	}
	c.Flags().BoolVar(&o.PlainHTTP, "plain-http", false, "speak to the registry without TLS")
	return c
}

func (s *session) rmi() *cobra.Command {
	return &cobra.Command{
		Use: "rmi IMAGE...", Short: "Forget images, and remove what nothing needs any more",
		Args: args(1, -1, "an IMAGE"), ValidArgsFunction: s.completeImages,
		RunE: func(c *cobra.Command, names []string) error {
			h, err := s.host()
			if err != nil {
				return err
			}
			for _, n := range names {
				if err := h.RemoveImage(c.Context(), n); err != nil {
					return err
				}
				fmt.Fprintln(s.Out, show.Clean(n))
			}
			return nil
		},
	}
}
