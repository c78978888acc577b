package command

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/show"
)

// maxDocuments bounds the YAML of one apply.
const maxDocuments = 16 << 20

func (s *session) apply() *cobra.Command {
	return s.documents("apply", "Create or change resources from YAML",
		"  hauberk apply -f examples/bank/bank.yaml\n  hauberk apply -f - < policy.yaml",
		func(ctx context.Context, docs []byte) ([]admin.Applied, error) { return s.client().Apply(ctx, docs) })
}

func (s *session) delete() *cobra.Command {
	return s.documents("delete", "Delete the resources that YAML names", "  hauberk delete -f examples/bank/bank.yaml",
		func(ctx context.Context, docs []byte) ([]admin.Applied, error) { return s.client().Delete(ctx, docs) })
}

// documents is a command that sends YAML and prints what became of each part.
func (s *session) documents(verb, short, example string, send func(context.Context, []byte) ([]admin.Applied, error)) *cobra.Command {
	var files []string
	c := &cobra.Command{
		Use: verb + " -f FILE", Short: short, Example: example,
		Args: args(0, 0, ""),
		RunE: func(c *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usage(c, fmt.Errorf("%s needs -f FILE", c.CommandPath()))
			}
			docs, err := s.read(files)
			if err != nil {
				return err
			}
			list, err := send(c.Context(), docs)
			if err != nil {
				return err
			}
			return s.print(list, func(w io.Writer) error { return appliedTable(w, list) })
		},
	}
	c.Flags().StringArrayVarP(&files, "filename", "f", nil, "file of YAML documents, or - for standard input; may be repeated")
	_ = c.MarkFlagFilename("filename", "yaml", "yml", "json")
	return c
}

// read joins files into one stream of documents.
func (s *session) read(files []string) (docs []byte, err error) {
	for _, name := range files {
		in := s.In
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return nil, err
			}
			defer f.Close()
			in = f
		}
		data, err := io.ReadAll(io.LimitReader(in, maxDocuments+1))
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		if len(docs)+len(data) > maxDocuments {
			return nil, fmt.Errorf("read %s: more than %d bytes of YAML in one command", name, maxDocuments)
		}
		docs = append(append(docs, "\n---\n"...), data...)
	}
	return docs, nil
}

func appliedTable(w io.Writer, list []admin.Applied) error {
	for _, a := range list {
		name := a.Name
		if a.Namespace != "" {
			name = a.Namespace + "/" + a.Name
		}
		fmt.Fprintf(w, "%s %s %s\n", show.Clean(a.Kind), show.Clean(name), show.Clean(a.Result))
	}
	return nil
}

func (s *session) restart() *cobra.Command {
	var namespace string
	c := &cobra.Command{
		Use: "restart [NAMESPACE/]WORKLOAD", Short: "Replace every instance of a workload",
		Long: `Restart replaces every instance of a workload, also one that an incident has
contained. The contained sandbox is ended; its story stays in the ledger.`,
		Args:              args(1, 1, "a WORKLOAD"),
		ValidArgsFunction: s.completeWorkloads,
		RunE: func(c *cobra.Command, args []string) error {
			ns, workload := address(namespace, args[0])
			return s.client().Restart(c.Context(), ns, workload)
		},
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "default", "namespace of the workload")
	return c
}
