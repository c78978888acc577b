package command

import (
	"fmt"
	"io"
	"maps"
	"path/filepath"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/deploy"
	"hauberk.dev/cmd/hauberk/internal/show"
)

func (s *session) release() *cobra.Command {
	var namespace, application, image string
	c := &cobra.Command{
		Use: "release LAYOUT", Short: "Submit an image and its evidence to the gate",
		Long: `Release submits an OCI image layout to the gate, with the signed statements that
lie in its directory evidence/: the builder's provenance, a reviewer's review and
an owner's approval. The gate verifies them, records its decision, and only then
puts the image into the registry. There is no other way in.`,
		Example: "  hauberk release -n bank --application payments --image bank/web:1 /var/lib/hauberk/layouts/bank_web_1",
		Args:    args(1, 1, "the LAYOUT directory of an image"),
		RunE: func(c *cobra.Command, dirs []string) error {
			for flag, v := range map[string]string{"application": application, "image": image} {
				if v == "" {
					return usage(c, fmt.Errorf("%s needs --%s", c.CommandPath(), flag))
				}
			}
			end := s.progress().Step("submitting %s to the gate", image)
			r, err := deploy.Submit(c.Context(), s.client(), namespace, application, image, dirs[0])
			if end(err) != nil {
				return err
			}
			return s.print(r, func(w io.Writer) error { return releasedTable(w, r) })
		},
	}
	c.ValidArgsFunction = func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	c.Flags().StringVarP(&namespace, "namespace", "n", "default", "namespace of the application")
	c.Flags().StringVarP(&application, "application", "a", "", "application that owns the image")
	c.Flags().StringVarP(&image, "image", "i", "", "name to release it under, repository:tag")
	return c
}

func releasedTable(w io.Writer, r admin.Released) error {
	fmt.Fprintf(w, "released %s as %s for application %s, ledger entry %d\n",
		show.Clean(r.Image), show.Clean(r.Digest), show.Clean(r.Application), r.Index)
	for _, c := range r.Checks {
		fmt.Fprintf(w, "  ok  %s\n", show.Clean(c))
	}
	return nil
}

func (s *session) build() *cobra.Command {
	var set map[string]string
	c := &cobra.Command{
		Use: "build DIR", Short: "Build the images of an example into OCI layouts with signed provenance",
		Long: `Build builds the images that the JSON file in DIR lists from their Go sources, the same
bytes every time, and signs where they came from with the builder's key in the
state directory. It releases nothing.`,
		Example: "  hauberk build examples/bank",
		Args:    args(1, 1, "the DIR of an example"),
		RunE: func(c *cobra.Command, dirs []string) error {
			d := s.deployer(set)
			x, err := d.Open(dirs[0])
			if err != nil {
				return err
			}
			type line struct {
				Image  string `json:"image"`
				Digest string `json:"digest"`
				Layout string `json:"layout"`
			}
			var made []line
			for _, img := range x.Recipe.Images {
				b, err := d.Build(c.Context(), x, img)
				if err != nil {
					return err
				}
				made = append(made, line{img.Name, b.Digest, b.Layout})
			}
			return s.print(made, func(w io.Writer) error {
				var rows [][]string
				for _, m := range made {
					rows = append(rows, []string{m.Image, show.Short(m.Digest), m.Layout})
				}
				return show.Rows(w, []string{"IMAGE", "DIGEST", "LAYOUT"}, rows)
			})
		},
	}
	settings(c, &set)
	return c
}

// settings is the flag for what the placeholders of an example stand for.
func settings(c *cobra.Command, set *map[string]string) {
	c.Flags().StringToStringVar(set, "set", nil, "what ${NAME} in the example's YAML stands for (WEB_PORT is 18080 unless set)")
}

func (s *session) deployer(set map[string]string) *deploy.Deployer {
	all := map[string]string{"WEB_PORT": "18080"}
	maps.Copy(all, set)
	return &deploy.Deployer{
		Client: s.client(), Progress: s.progress(), Settings: all,
		Accounts: filepath.Join(s.state, "accounts"), Layouts: filepath.Join(s.state, "layouts"),
	}
}
