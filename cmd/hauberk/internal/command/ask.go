package command

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/show"
)

func (s *session) status() *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Show the health of the chain, link by link",
		Long: `Status shows each link of the chain as ok, broken or absent. Absent means not
adopted; it is never shown as passed. The exit code is 1 if a link is broken.`,
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			st, err := s.client().Status(c.Context())
			if err != nil {
				return err
			}
			if err := s.print(st, func(w io.Writer) error { return s.statusTable(w, st) }); err != nil {
				return err
			}
			for _, l := range st.Links {
				if l.State == "broken" {
					return &exitError{exitFailed, fmt.Errorf("link %s is broken: %s", l.Name, l.Detail)}
				}
			}
			return nil
		},
	}
}

func (s *session) statusTable(w io.Writer, st admin.Status) error {
	fmt.Fprintf(w, "hauberkd %s, trust domain %s, up %s\n", show.Clean(st.Version), show.Clean(st.TrustDomain), show.Age(st.StartedAt, s.now()))
	fmt.Fprintf(w, "API      %s\nkubectl  --kubeconfig %s\n", show.Clean(st.API), show.Clean(st.Kubeconfig))
	fmt.Fprintf(w, "ledger   %d entries, root %s\n\n", st.Ledger.Size, show.Clean(st.Ledger.Root))
	var rows [][]string
	for _, l := range st.Links {
		rows = append(rows, []string{l.Name, l.State, l.Detail})
	}
	if err := show.Rows(w, []string{"LINK", "STATE", "DETAIL"}, rows); err != nil {
		return err
	}
	rows = nil
	for _, n := range st.Nodes {
		guard := "on"
		if n.GuardOff {
			guard = "OFF"
		}
		rows = append(rows, []string{n.Name, strconv.FormatBool(n.Ready), n.Accelerator, guard, strconv.Itoa(n.Instances), spares(n), show.Age(n.LastSeen, s.now())})
	}
	if len(st.Degraded) > 0 {
		fmt.Fprintln(w)
		if err := s.switchTable(w, st.Degraded); err != nil {
			return err
		}
	}
	fmt.Fprintln(w)
	return show.Rows(w, []string{"NODE", "READY", "ACCELERATOR", "GUARD", "INSTANCES", "SPARE", "SEEN"}, rows)
}

// spares are the machines that a node keeps ahead of demand, with their memory.
func spares(n admin.Node) string {
	if n.Spares == 0 {
		return "0"
	}
	return fmt.Sprintf("%d (%s)", n.Spares, size(uint64(n.SparesMiB)<<20))
}

func reason(i admin.Instance) string {
	switch {
	case i.Reason != "" && i.Message != "":
		return i.Reason + ": " + i.Message
	case i.ExitCode != nil:
		return "exit code " + strconv.Itoa(*i.ExitCode)
	}
	return i.Reason
}

func (s *session) incidents() *cobra.Command {
	var namespace string
	c := &cobra.Command{
		Use: "incidents", Short: "List violations and what was done about them",
		Example: "  hauberk incidents\n  hauberk why INCIDENT",
		Args:    args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			list, err := s.client().Incidents(c.Context(), namespace)
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return s.incidentTable(w, list) })
		},
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "only this namespace")
	return c
}

func (s *session) incidentTable(w io.Writer, list []admin.Incident) error {
	var rows [][]string
	for _, i := range list {
		took := ""
		if i.ContainedMillis > 0 {
			took = strconv.FormatInt(i.ContainedMillis, 10) + "ms"
		}
		rows = append(rows, []string{i.Namespace, i.Name, i.Workload, i.Cause, i.Rule, i.State, took,
			strconv.Itoa(len(i.Receipts)), show.Age(i.Observed, s.now())})
	}
	return show.Rows(w, []string{"NAMESPACE", "INCIDENT", "WORKLOAD", "CAUSE", "RULE", "STATE", "IN", "RECEIPTS", "AGE"}, rows)
}

func (s *session) why() *cobra.Command {
	var namespace string
	c := &cobra.Command{
		Use: "why [NAMESPACE/]SUBJECT", Short: "Tell what happened to an incident, workload, instance, refusal or digest",
		Long: `Why tells the chain in order and in plain words: who owns the code, who released
the image, where it was launched, what booted, which identity it got, whom it
talked to, and what broke. Each line names the ledger entry that proves it.`,
		Example:           "  hauberk why bank/transfer\n  hauberk why -n bank inc-7f3a\n  hauberk why sha256:9f86d0818...",
		Args:              args(1, 1, "a SUBJECT: the name of an incident, workload, instance or refusal, or a digest"),
		ValidArgsFunction: s.completeWorkloads,
		RunE: func(c *cobra.Command, args []string) error {
			ns, subject := address(namespace, args[0])
			story, err := s.client().Why(c.Context(), ns, subject)
			if err != nil {
				return err
			}
			return s.print(story, func(w io.Writer) error { return storyTable(w, story) })
		},
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "", "namespace of the subject")
	return c
}

func storyTable(w io.Writer, story admin.Story) error {
	fmt.Fprintf(w, "%s\n\n%s\n\n", show.Clean(story.Subject), show.Clean(story.Answer))
	var rows [][]string
	for _, c := range story.Chapter {
		index := ""
		if c.Index >= 0 {
			index = strconv.FormatInt(c.Index, 10)
		}
		at := ""
		if !c.At.IsZero() {
			at = c.At.Local().Format("2006-01-02 15:04:05.000")
		}
		rows = append(rows, []string{at, c.Link, index, c.Text})
	}
	return show.Rows(w, []string{"WHEN", "LINK", "LEDGER", "WHAT"}, rows)
}

// completeWorkloads offers NAMESPACE/WORKLOAD of what runs; without a control
// plane it offers nothing.
func (s *session) completeWorkloads(c *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	list, err := s.client().Instances(ctx, "")
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, i := range list {
		names = append(names, i.Namespace+"/"+i.Workload)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
