package command

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"hauberk.dev/api/spec"
	"hauberk.dev/cmd/hauberk/internal/show"
	"hauberk.dev/guard"
)

// guardObject is a GuardPolicy as it is applied.
type guardObject struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Metadata   struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace,omitempty"`
	} `json:"metadata"`
	Spec spec.GuardPolicy `json:"spec"`
}

func newGuardObject(namespace, name string, s spec.GuardPolicy) (o guardObject) {
	o.APIVersion, o.Kind, o.Spec = "hauberk.dev/v1alpha1", "GuardPolicy", s
	o.Metadata.Namespace, o.Metadata.Name = namespace, name
	return o
}

func (s *session) guardReady() *cobra.Command {
	return &cobra.Command{
		Use: "ready [NAME]", Short: "Print a ready-made policy as YAML, or list them all",
		Long: `Ready prints policies that come with Hauberk, to be applied as they are or taken
further: in a file of your own, add to net.egress what the workload calls, and to
exec.allow what it runs. docs/guard.md gives the reason for each of them.`,
		Example:   "  hauberk guard ready\n  hauberk guard ready web > web.yaml\n  hauberk guard ready database | hauberk apply -f -",
		Args:      args(0, 1, ""),
		ValidArgs: policyNames(),
		RunE: func(c *cobra.Command, names []string) error {
			if len(names) == 0 {
				return s.print(guard.Ready(), readyTable)
			}
			r, ok := guard.FindReady(names[0])
			if !ok {
				return usage(c, fmt.Errorf("there is no ready policy %q: there are %s", names[0], strings.Join(policyNames(), ", ")))
			}
			return s.print(r, func(w io.Writer) error {
				fmt.Fprintf(w, "# %s: %s.\n", r.Name, r.Why)
				return show.Value(w, show.YAML, newGuardObject("", r.Name, r.Spec), nil)
			})
		},
	}
}

func readyTable(w io.Writer) error {
	var rows [][]string
	for _, r := range guard.Ready() {
		rows = append(rows, []string{r.Name, r.Why})
	}
	return show.Rows(w, []string{"POLICY", "FOR"}, rows)
}
