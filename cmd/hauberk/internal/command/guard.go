package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/show"
)

func (s *session) guard() *cobra.Command {
	c := &cobra.Command{
		Use: "guard", Short: "Guard policies: what is in force, on its way, or lowered",
		Long: `Guard shows and steers what the Guards in the sandboxes enforce. A change of a
policy is written with apply; it goes out in stages, each confirmed by a person.
Ready, check, explain, diff and test ask no control plane.`,
		Args: known,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(s.guardStatus(), s.guardRollout(), s.guardRollback(), s.guardDegrade(), s.guardRestore(),
		s.guardReady(), s.guardCheck(), s.guardExplain(), s.guardDiff(), s.guardTest(),
		s.guardPropose(), s.guardPromote())
	return c
}

func (s *session) guardStatus() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show every policy, every rollout and every switch",
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			g, err := s.client().Guard(c.Context())
			if err != nil {
				return err
			}
			return s.print(g, func(w io.Writer) error { return s.guardTable(w, g) })
		},
	}
}

func (s *session) guardTable(w io.Writer, g admin.GuardState) error {
	var rows [][]string
	for _, p := range g.Policies {
		rows = append(rows, policyRow(p))
	}
	if err := show.Rows(w, []string{"POLICY", "GENERATION", "MODE", "APPLIED", "ROLLOUT", "MESSAGE"}, rows); err != nil || len(g.Switches) == 0 {
		return err
	}
	fmt.Fprintln(w)
	return s.switchTable(w, g.Switches)
}

func policyRow(p admin.GuardPolicy) []string {
	rollout, message := "", p.Message
	if r := p.Rollout; r != nil {
		rollout = fmt.Sprintf("generation %d, stage %d of %d (%d %%), %d of %d instances: %s", r.Generation, r.Stage, r.Stages, r.Percent, len(r.Instances), len(r.Instances)+r.Waiting, r.Phase)
		if message == "" {
			message = r.Message
		}
	}
	mode := p.Mode
	if mode == "audit" || mode == "learn" {
		mode += fmt.Sprintf(", would deny %d", p.WouldDeny)
	}
	return []string{p.Name, strconv.FormatUint(p.Generation, 10), mode, fmt.Sprintf("%d of %d", p.Applied, p.Eligible), rollout, message}
}

func (s *session) switchTable(w io.Writer, list []admin.GuardSwitch) error {
	var rows [][]string
	for _, d := range list {
		rows = append(rows, []string{strings.TrimSpace(d.Scope + " " + d.Target), d.To, d.By, d.Until.Local().Format(time.DateTime), d.Reason})
	}
	return show.Rows(w, []string{"LOWERED", "TO", "BY", "UNTIL", "REASON"}, rows)
}

func (s *session) guardRollout() *cobra.Command {
	c := &cobra.Command{
		Use: "rollout", Short: "Steer a change of a policy that is on its way",
		Args: known,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	status := s.guardStatus()
	status.Use, status.Args = "status [POLICY]", args(0, 1, "")
	status.RunE = func(c *cobra.Command, names []string) error {
		g, err := s.client().Guard(c.Context())
		if err != nil {
			return err
		}
		if len(names) == 0 {
			return s.print(g, func(w io.Writer) error { return s.guardTable(w, g) })
		}
		for _, p := range g.Policies {
			if p.Name == names[0] {
				return s.print(p, func(w io.Writer) error { return policyTable(w, p) })
			}
		}
		return fmt.Errorf("there is no guard policy %q: it is namespace/name, or cluster/name", names[0])
	}
	c.AddCommand(status,
		s.rolloutAct("confirm", "Confirm that a stage is good, so that the next begins", false),
		s.rolloutAct("pause", "Let no further stage begin", true),
		s.rolloutAct("resume", "Go on after a pause or a halt, at the same stage", true),
		s.rolloutAct("abort", "Give a change up: its instances return to what is in force", true))
	return c
}

func policyTable(w io.Writer, p admin.GuardPolicy) error {
	if err := show.Rows(w, []string{"POLICY", "GENERATION", "MODE", "APPLIED", "ROLLOUT", "MESSAGE"}, [][]string{policyRow(p)}); err != nil || p.Rollout == nil {
		return err
	}
	_, err := fmt.Fprintf(w, "\nit has the change: %s\n", show.Clean(strings.Join(p.Rollout.Instances, ", ")))
	return err
}

// myself is what the person is called who asks.
func myself() string {
	for _, name := range []string{"SUDO_USER", "USER", "LOGNAME"} {
		if v := os.Getenv(name); v != "" {
			return v
		}
	}
	return ""
}

func (s *session) rolloutAct(act, short string, reasoned bool) *cobra.Command {
	ask := admin.Rollout{Act: act}
	c := &cobra.Command{
		Use: act + " POLICY", Short: short,
		Example: "  hauberk guard rollout " + act + " bank/web\n  hauberk guard rollout " + act + " cluster/floor",
		Args:    args(1, 1, "a POLICY: namespace/name, or cluster/name"),
		RunE: func(c *cobra.Command, names []string) error {
			ask.Policy = names[0]
			p, err := s.client().Rollout(c.Context(), ask)
			if err != nil {
				return err
			}
			return s.print(p, func(w io.Writer) error { return policyTable(w, p) })
		},
	}
	c.Flags().StringVar(&ask.By, "as", myself(), "your name, for the ledger; who runs the command is recorded beside it")
	if reasoned {
		c.Flags().StringVar(&ask.Reason, "reason", "", "why, for the ledger")
	}
	return c
}

func (s *session) guardRollback() *cobra.Command {
	c := s.rolloutAct("rollback", "Put the content before into force again, everywhere and at once", true)
	c.Long = `Rollback gives a policy the content that was in force before, under a new generation,
for generations never go back. It is in force everywhere at once, without stages.
A change that is on its way is given up. The object is changed to say the same.`
	c.Example = "  hauberk guard rollback bank/web --reason 'payments time out'"
	return c
}

// scopes are the flags that say what a switch is over.
type scopes struct {
	instance, workload, node string
	cluster                  bool
}

func (o *scopes) flags(c *cobra.Command) {
	c.Flags().StringVar(&o.instance, "instance", "", "one instance (pod), by name")
	c.Flags().StringVar(&o.workload, "workload", "", "one workload: namespace/name")
	c.Flags().StringVar(&o.node, "node", "", "one node, by name")
	c.Flags().BoolVar(&o.cluster, "cluster", false, "everything, the floors of ClusterGuardPolicy included")
}

func (o *scopes) read(c *cobra.Command) (scope, target string, err error) {
	n := 0
	for _, one := range []struct {
		scope, target string
		is            bool
	}{{"instance", o.instance, o.instance != ""}, {"workload", o.workload, o.workload != ""}, {"node", o.node, o.node != ""}, {"cluster", "", o.cluster}} {
		if one.is {
			scope, target, n = one.scope, one.target, n+1
		}
	}
	if n != 1 {
		return "", "", usage(c, fmt.Errorf("%s needs exactly one of --instance, --workload, --node and --cluster", c.CommandPath()))
	}
	return scope, target, nil
}

func (s *session) guardDegrade() *cobra.Command {
	var over scopes
	var ask admin.Degrade
	var lasts time.Duration
	c := &cobra.Command{
		Use: "degrade", Short: "Lower policies for a while: record less, only report, or nothing",
		Long: `Degrade lowers the guard policies of an instance, a workload, a node or the whole
cluster. Quiet records less of what is allowed; audit reports what would be
denied; off enforces no policy but what is built in. A reason and an end are
mandatory; at the end the policies hold again. A ClusterGuardPolicy is lowered by
--cluster alone.`,
		Example: "  hauberk guard degrade --workload bank/web --to audit --for 30m --reason 'release of web fails, incident 4711'",
		Args:    args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if ask.Scope, ask.Target, err = over.read(c); err != nil {
				return err
			}
			if ask.Reason == "" || lasts < time.Second {
				return usage(c, fmt.Errorf("%s needs --reason and --for", c.CommandPath()))
			}
			ask.Seconds = int64(lasts / time.Second)
			return s.sendDegrade(c.Context(), ask)
		},
	}
	over.flags(c)
	c.Flags().StringVar(&ask.To, "to", "audit", "quiet, audit or off")
	c.Flags().StringVar(&ask.Reason, "reason", "", "why, for the ledger")
	c.Flags().DurationVar(&lasts, "for", 0, "how long, such as 30m")
	c.Flags().StringVar(&ask.By, "as", myself(), "your name, for the ledger; who runs the command is recorded beside it")
	_ = c.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]string{"quiet", "audit", "off"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (s *session) guardRestore() *cobra.Command {
	var over scopes
	ask := admin.Degrade{To: "full"}
	c := &cobra.Command{
		Use: "restore", Short: "Let lowered policies hold again before the switch ends by itself",
		Example: "  hauberk guard restore --workload bank/web",
		Args:    args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) (err error) {
			if ask.Scope, ask.Target, err = over.read(c); err != nil {
				return err
			}
			return s.sendDegrade(c.Context(), ask)
		},
	}
	over.flags(c)
	c.Flags().StringVar(&ask.Reason, "reason", "", "why, for the ledger")
	c.Flags().StringVar(&ask.By, "as", myself(), "your name, for the ledger; who runs the command is recorded beside it")
	return c
}

func (s *session) sendDegrade(ctx context.Context, ask admin.Degrade) error {
	list, err := s.client().Degrade(ctx, ask)
	if err != nil {
		return err
	}
	return s.print(list, func(w io.Writer) error { return s.switchTable(w, list) })
}
