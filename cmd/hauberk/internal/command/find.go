package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/cmd/hauberk/internal/client"
	"hauberk.dev/sandbox"
)

// handPrefix says that a sandbox run by hand is meant, where a workload has the
// same name.
const handPrefix = "hand/"

// byHand opens the sandboxes of this machine if there are any to be asked for:
// who may not, or has never run one, has none.
func (s *session) byHand() (*sandbox.Host, error) {
	if _, err := os.Stat(filepath.Join(s.state, "hand")); err != nil {
		return nil, nil
	}
	h, err := s.host()
	if errors.Is(err, os.ErrPermission) || os.Geteuid() != 0 {
		return nil, nil
	}
	return h, err
}

// box finds a sandbox run by hand.
func (s *session) box(name string) (*sandbox.Sandbox, error) {
	h, err := s.host()
	if err != nil {
		return nil, err
	}
	b, err := h.Find(strings.TrimPrefix(name, handPrefix))
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil, &admin.Error{Message: fmt.Sprintf("no sandbox is called %q", name), Fix: "hauberk ps -a lists those that there are"}
	}
	return b, err
}

// target is what a name means: a sandbox run by hand, or, if it is nil, a
// workload of the control plane.
type target struct {
	box                           *sandbox.Sandbox
	namespace, workload, instance string
}

// find tells which of the two a name means. Who has both must say more.
func (s *session) find(ctx context.Context, namespace, instance, name string) (target, error) {
	if rest, ok := strings.CutPrefix(name, handPrefix); ok {
		b, err := s.box(rest)
		return target{box: b}, err
	}
	ns, workload := address(namespace, name)
	out := target{namespace: ns, workload: workload, instance: instance}
	if strings.Contains(name, "/") || instance != "" {
		return out, nil
	}
	h, err := s.byHand()
	if h == nil || err != nil {
		return out, err
	}
	b, err := h.Find(name)
	if errors.Is(err, sandbox.ErrNotFound) {
		return out, nil // the control plane says what it thinks of the name
	}
	if err != nil {
		return out, err
	}
	list, err := s.client().Instances(ctx, ns)
	if err != nil && !errors.Is(err, client.ErrNotRunning) {
		return out, err
	}
	if slices.ContainsFunc(list, func(i admin.Instance) bool { return i.Namespace == ns && i.Workload == workload }) {
		return out, &admin.Error{
			Message: fmt.Sprintf("%q is a workload of namespace %s, and a sandbox run by hand", name, ns),
			Fix:     fmt.Sprintf("say %s/%s, or %s%s", ns, name, handPrefix, name),
		}
	}
	return target{box: b}, nil
}

// completeAll offers what runs, of both.
func (s *session) completeAll(c *cobra.Command, given []string, typed string) ([]string, cobra.ShellCompDirective) {
	names, directive := s.completeWorkloads(c, given, typed)
	if len(given) > 0 {
		return names, directive
	}
	boxes, _ := s.completeBoxes(c, given, typed)
	return append(names, boxes...), cobra.ShellCompDirectiveNoFileComp
}

// completeBoxes offers the names of sandboxes run by hand.
func (s *session) completeBoxes(_ *cobra.Command, given []string, _ string) (names []string, _ cobra.ShellCompDirective) {
	h, err := s.byHand()
	if h == nil || err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	list, err := h.List(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	for _, i := range list {
		if i.Name != "" && !slices.Contains(given, i.Name) {
			names = append(names, i.Name)
		}
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeImages offers the images of this machine.
func (s *session) completeImages(_ *cobra.Command, given []string, _ string) (names []string, _ cobra.ShellCompDirective) {
	if len(given) > 0 {
		return nil, cobra.ShellCompDirectiveDefault
	}
	h, err := s.byHand()
	if h == nil || err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	list, err := h.Images()
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	for _, i := range list {
		names = append(names, short(i.Name))
	}
	return names, cobra.ShellCompDirectiveDefault
}
