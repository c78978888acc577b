package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/spf13/cobra"

	"hauberk.dev/api/admin"
	"hauberk.dev/guard/trail"
)

// asked is what a person wants to see of events.
type asked struct {
	namespace, instance, format, since string
	follow                             bool
	filter                             trail.Filter
}

func (s *session) events() *cobra.Command {
	var o asked
	c := &cobra.Command{
		Use: "events [NAME]", Short: "Show what the Guard saw and refused",
		Long: `Events shows what the Guard inside sandboxes told: what was denied, by which
policy and rule, by which program and what led to it; what was allowed, for the
record; and how much was lost. NAME is [NAMESPACE/]WORKLOAD of the control plane,
or the name or ID of a sandbox run by hand; without one it is every instance.`,
		Example: "  hauberk events bank/web --verdict denied\n  hauberk events --follow --workload transfer -o ocsf\n  hauberk events --since 10m --op exec brisk-otter",
		Args:    args(0, 1, ""), ValidArgsFunction: s.completeAll,
		RunE: func(c *cobra.Command, names []string) (err error) {
			if err := o.filter.Known(); err != nil {
				return usage(c, err)
			}
			if !slices.Contains([]string{trail.Text, trail.JSON, trail.OCSF, trail.OTel}, o.format) {
				return usage(c, fmt.Errorf("--output %q: want text, json, ocsf or otel", o.format))
			}
			if o.filter.Since, err = trail.Since(o.since, s.now()); err != nil {
				return usage(c, fmt.Errorf("--%w", err))
			}
			err = s.showEvents(c.Context(), o, names)
			if c.Context().Err() != nil {
				return nil // an interrupt is how following ends
			}
			return err
		},
	}
	f := c.Flags()
	f.StringVarP(&o.namespace, "namespace", "n", "", "namespace of the workload")
	f.StringVarP(&o.instance, "instance", "i", "", "only this instance")
	f.StringVar(&o.filter.Workload, "workload", "", "only instances of this workload")
	f.StringVar(&o.filter.Verdict, "verdict", "", "only allowed, reported, denied, killed or lost")
	f.StringVar(&o.filter.Op, "op", "", "only this operation, such as exec, write or egress")
	f.StringVar(&o.since, "since", "", "not what is older than a time, or than a while such as 10m")
	f.BoolVarP(&o.follow, "follow", "f", false, "go on until interrupted")
	f.StringVarP(&o.format, "output", "o", trail.Text, "text, json, ocsf or otel, an event a line")
	return c
}

// showEvents writes the events of a sandbox run by hand or of instances.
func (s *session) showEvents(ctx context.Context, o asked, names []string) error {
	if len(names) == 1 {
		t, err := s.find(ctx, cmp.Or(o.namespace, "default"), o.instance, names[0])
		if err != nil {
			return err
		}
		if t.box != nil {
			return t.box.Events(ctx, o.follow, func(r trail.Record) error { return s.showEvent(o, r) })
		}
		o.namespace, o.filter.Workload = t.namespace, t.workload
	}
	list, err := s.client().Instances(ctx, o.namespace)
	if err != nil {
		return err
	}
	list = slices.DeleteFunc(list, func(i admin.Instance) bool {
		return o.filter.Workload != "" && i.Workload != o.filter.Workload && i.Name != o.filter.Workload || o.instance != "" && i.Name != o.instance
	})
	if len(list) == 0 && len(names) == 1 {
		return &admin.Error{Message: fmt.Sprintf("no instance of %q is in namespace %q", o.filter.Workload, o.namespace), Fix: "hauberk ps lists what there is"}
	}
	o.filter.Workload = "" // it was the name of an instance, perhaps
	return s.instanceEvents(ctx, o, list)
}

func (s *session) showEvent(o asked, r trail.Record) error {
	if !o.filter.Wants(r) {
		return nil
	}
	return trail.Write(s.Out, o.format, r)
}

// instanceEvents writes the events of instances: in order of time, or as they
// come if they are followed.
func (s *session) instanceEvents(ctx context.Context, o asked, list []admin.Instance) error {
	var mu sync.Mutex
	var wg sync.WaitGroup
	var all []trail.Record
	var errs []error
	for _, i := range list {
		wg.Go(func() {
			err := s.eventsOf(ctx, i, o.follow, func(r trail.Record) error {
				mu.Lock()
				defer mu.Unlock()
				if o.follow {
					return s.showEvent(o, r)
				}
				all = append(all, r)
				return nil
			})
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
	}
	wg.Wait()
	slices.SortStableFunc(all, func(a, b trail.Record) int { return a.Time.Compare(b.Time) })
	for _, r := range all {
		errs = append(errs, s.showEvent(o, r))
	}
	return errors.Join(errs...)
}

func (s *session) eventsOf(ctx context.Context, i admin.Instance, follow bool, each func(trail.Record) error) error {
	r, err := s.client().Events(ctx, i.Namespace, i.Name, follow)
	if refused := (*admin.Error)(nil); errors.As(err, &refused) && refused.Reason == "NoEvents" {
		return nil // it has not run yet
	}
	if err != nil {
		return err
	}
	defer r.Close()
	if err := trail.Scan(r, each); err != nil && ctx.Err() == nil {
		return fmt.Errorf("read events of %s: %w", i.Name, err)
	}
	return nil
}
