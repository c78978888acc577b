package command

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/guard"
)

// proposals finds what was learnt under a policy, or of a workload.
func (s *session) proposals(ctx context.Context, name string) (out []admin.Proposal, err error) {
	g, err := s.client().Guard(ctx)
	if err != nil {
		return nil, err
	}
	var learning []string
	for _, p := range g.Policies {
		if p.Mode != "learn" {
			continue
		}
		learning = append(learning, p.Name)
		proposal, err := s.client().Proposal(ctx, p.Name)
		if err != nil {
			return nil, err
		}
		if p.Name == name || slices.Contains(proposal.Workloads, name) {
			out = append(out, proposal)
		}
	}
	if len(out) == 0 {
		fix := "no policy is in learn: set spec.mode: learn in one that the workload names"
		if len(learning) > 0 {
			fix = "in learn are " + strings.Join(learning, ", ")
		}
		return nil, &admin.Error{Message: fmt.Sprintf("nothing is learnt of %q: want namespace/workload, or the policy's namespace/name", name), Fix: fix}
	}
	return out, nil
}

func (s *session) guardPropose() *cobra.Command {
	return &cobra.Command{
		Use: "propose WORKLOAD", Short: "Print the policy that was learnt, with the evidence for each rule",
		Long: `Propose prints, as YAML, the policy that allows what a workload did while a policy in
learn watched it, and not much more. Above each rule stands what was seen: how
often, when first and last, and an example. It changes nothing: read it, then
promote it, or change it and apply it.`,
		Example: "  hauberk guard propose bank/web\n  hauberk guard propose bank/web > web.yaml",
		Args:    args(1, 1, "a WORKLOAD, namespace/name, or the name of a policy in learn"),
		RunE: func(c *cobra.Command, names []string) error {
			list, err := s.proposals(c.Context(), names[0])
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return proposalText(w, list) })
		},
	}
}

func proposalText(w io.Writer, list []admin.Proposal) error {
	for n, p := range list {
		var proposal guard.Proposal
		if err := json.Unmarshal(p.Proposal, &proposal); err != nil {
			return fmt.Errorf("read proposal of %s: %w", p.Policy, err)
		}
		if n > 0 {
			fmt.Fprintln(w, "---")
		}
		if err := writeProposal(w, p, proposal); err != nil {
			return err
		}
	}
	return nil
}

// writeProposal writes one as YAML that can be applied. What comes from workloads
// is in comments, shown and not sent.
func writeProposal(w io.Writer, p admin.Proposal, proposal guard.Proposal) error {
	fmt.Fprintf(w, "# Learnt from %s: %d instances, %d acts, from %s to %s.\n", show.Clean(strings.Join(p.Workloads, ", ")), p.Instances, p.Acts,
		p.Since.Local().Format(time.DateTime), p.Until.Local().Format(time.DateTime))
	for _, n := range proposal.Notes {
		fmt.Fprintf(w, "# Note: %s.\n", show.Clean(n))
	}
	for _, r := range proposal.Refuses {
		fmt.Fprintf(w, "# Would be denied: %s: %s\n", r.Field, evidenceText(r))
	}
	fmt.Fprintf(w, "# To put it in force: hauberk guard promote %s\n", show.Clean(p.Policy))
	namespace, name, _ := strings.Cut(p.Policy, "/")
	o := newGuardObject(namespace, name, proposal.Spec)
	if namespace == "cluster" {
		o.Kind, o.Metadata.Namespace = "ClusterGuardPolicy", ""
	}
	var b strings.Builder
	if err := show.Value(&b, show.YAML, o, nil); err != nil {
		return err
	}
	var doc yaml.Node
	if err := yaml.Unmarshal([]byte(b.String()), &doc); err != nil {
		return fmt.Errorf("write proposal: %w", err)
	}
	for _, e := range proposal.Evidence {
		if at := nodeOf(&doc, "spec."+e.Field); at != nil {
			at.HeadComment = strings.TrimPrefix(at.HeadComment+"\n# "+evidenceText(e), "\n")
		}
	}
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(&doc); err != nil {
		return fmt.Errorf("write proposal: %w", err)
	}
	return enc.Close()
}

// evidenceText is one line.
func evidenceText(e guard.Evidence) string {
	text := e.Text
	if e.Count > 0 {
		text += fmt.Sprintf("; %d times, first %s, last %s", e.Count, e.First.Local().Format(time.DateTime), e.Last.Local().Format(time.DateTime))
	}
	if e.Example != "" {
		text += "; such as: " + e.Example
	}
	return strings.Join(strings.Fields(show.Clean(text)), " ")
}

// nodeOf finds where a comment about a field goes: its key, or the element of a
// list.
func nodeOf(at *yaml.Node, field string) *yaml.Node {
	if at.Kind == yaml.DocumentNode && len(at.Content) > 0 {
		at = at.Content[0]
	}
	var found *yaml.Node
	for _, part := range strings.FieldsFunc(field, func(r rune) bool { return r == '.' || r == '[' || r == ']' }) {
		next, _ := child(at, part)
		if next == nil {
			return nil
		}
		found = next
		for i := 0; at.Kind == yaml.MappingNode && i+1 < len(at.Content); i += 2 {
			if at.Content[i].Value == part {
				found = at.Content[i]
			}
		}
		at = next
	}
	return found
}

func (s *session) guardPromote() *cobra.Command {
	var ask admin.Promote
	c := &cobra.Command{
		Use: "promote POLICY", Short: "Make what was learnt under a policy the policy itself",
		Long: `Promote puts the proposal of a policy in learn in the policy's place. It is a person's
act and recorded as such; it then goes out in stages as every change does, and
rollback takes it back. What is promoted is what propose printed last: with
--digest, another proposal is refused. One that was learnt from a record with gaps
is promoted only with --lossy.`,
		Example: "  hauberk guard promote bank/web\n  hauberk guard promote bank/web --mode audit --reason 'a week in audit first'",
		Args:    args(1, 1, "a POLICY in learn: namespace/name, or cluster/name"),
		RunE: func(c *cobra.Command, names []string) error {
			ask.Policy = names[0]
			if ask.Digest == "" {
				p, err := s.client().Proposal(c.Context(), ask.Policy)
				if err != nil {
					return err
				}
				ask.Digest = p.Digest
			}
			p, err := s.client().Promote(c.Context(), ask)
			if err != nil {
				return err
			}
			return s.print(p, func(w io.Writer) error { return policyTable(w, p) })
		},
	}
	f := c.Flags()
	f.StringVar(&ask.Mode, "mode", "enforce", "enforce, or audit to see first what it would deny")
	f.StringVar(&ask.Digest, "digest", "", "of the proposal that you have read (propose -o json says it)")
	f.BoolVar(&ask.Lossy, "lossy", false, "also if records were lost while it was learnt")
	f.StringVar(&ask.By, "as", myself(), "your name, for the ledger; who runs the command is recorded beside it")
	f.StringVar(&ask.Reason, "reason", "", "why, for the ledger")
	_ = c.RegisterFlagCompletionFunc("mode", cobra.FixedCompletions([]string{"enforce", "audit"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}
