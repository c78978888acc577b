package control

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/control/rollout"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
)

const (
	// applyPatience is how long instances of a stage may take to have a change.
	applyPatience = 2 * time.Minute
	// writers bounds how many objects are written at once.
	writers = 8
)

// guardContents keeps the contents of policies, each a file named by digest.
type guardContents string

// Put implements rollout.Contents.
func (d guardContents) Put(digest string, content []byte) error {
	path := filepath.Join(string(d), digest+".json")
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(string(d), 0o700); err != nil {
		return fmt.Errorf("keep guard policy: %w", err)
	}
	return atomicfile.Write(path, content, 0o600)
}

// Read implements rollout.Contents.
func (d guardContents) Read(digest string) ([]byte, error) {
	if !fs.ValidPath(digest) || strings.ContainsRune(digest, '/') {
		return nil, fmt.Errorf("read guard policy %q: not a digest", digest)
	}
	return os.ReadFile(filepath.Join(string(d), digest+".json"))
}

// guardRecorder writes the book of rollouts into the ledger, and remembers what
// is to be told as an event.
type guardRecorder struct{ c *Control }

// Record implements rollout.Recorder.
func (g guardRecorder) Record(ctx context.Context, r rollout.Record) error {
	by := r.By
	if by == "" {
		by = "hauberkd"
	}
	e := ledger.Entry{Time: g.c.now().UTC(), Kind: r.Kind, Actor: by, Subject: r.Policy, Namespace: r.Namespace,
		Workload: r.Workload, Instance: r.Instance, Node: r.Node, Text: r.Text, Body: r.Body}
	if _, err := g.c.log.Append(ctx, e); err != nil {
		return fmt.Errorf("record %s: %w", r.Kind, err)
	}
	g.c.untold.add(r)
	return nil
}

// told gathers records until somebody tells them.
type told struct {
	mu   sync.Mutex
	list []rollout.Record
}

const maxUntold = 1024

func (t *told) add(r rollout.Record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.list) < maxUntold { // the ledger has it
		t.list = append(t.list, r)
	}
}

func (t *told) take() (list []rollout.Record) {
	t.mu.Lock()
	defer t.mu.Unlock()
	list, t.list = t.list, nil
	return list
}

// syncGuards looks at what people want of guard policies: it checks and takes
// changes, watches those that go out, and turns back what has expired.
func (c *Control) syncGuards(ctx context.Context, w *world) error {
	var errs []error
	if _, err := c.rollouts.Expire(ctx); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, c.offload(ctx, *w))
	names := map[rollout.Name]bool{}
	for _, k := range sortedKeys(w.guards) {
		n, p := rollout.Name{Namespace: k.Namespace, Name: k.Name}, w.guards[k]
		names[n] = true
		errs = append(errs, c.propose(ctx, *w, n, p.generation, spec.ClusterGuardPolicy{GuardPolicy: p.spec}))
	}
	for name, p := range w.floors {
		n := rollout.Name{Name: name, Floor: true}
		names[n] = true
		errs = append(errs, c.propose(ctx, *w, n, p.generation, p.spec))
	}
	for _, p := range c.rollouts.State().Policies {
		if names[p.Name] {
			errs = append(errs, c.watchStage(ctx, *w, p))
			continue
		}
		// A deleted policy holds on where a workload still names it.
		if p.Name.Floor || w.countWorkloads(p.Name.Namespace, func(wl workload) bool { return slices.Contains(wl.spec.GuardPolicies, p.Name.Name) }) == 0 {
			errs = append(errs, c.rollouts.Forget(ctx, p.Name))
			delete(c.refusals, p.Name)
		}
	}
	w.book = c.rollouts.State()
	errs = append(errs, c.tell(ctx))
	return errors.Join(errs...)
}

// propose checks a content that is not in force and takes it, or notes why not.
func (c *Control) propose(ctx context.Context, w world, n rollout.Name, object int64, s spec.ClusterGuardPolicy) error {
	p := c.rollouts.Policy(n)
	_, digest, err := rollout.Encode(s)
	if err != nil {
		return fmt.Errorf("guard policy %s: %w", n, err)
	}
	switch {
	case p.Next != nil && p.Next.Digest == digest, p.Next == nil && p.Rejected == object && object != 0:
		return nil
	case p.Next != nil:
		return c.rollouts.Abort(ctx, n, "", "the object was changed again") // proposed in the next round
	case p.Current != nil && p.Current.Digest == digest:
		delete(c.refusals, n)
		return nil
	}
	if err := w.preCheck(n, s, c.images); err != nil {
		return c.refuse(ctx, n, object, digest, err)
	}
	delete(c.refusals, n)
	instances := w.reached(n, s)
	before := c.meter.rate(instances, c.now())
	if _, err := c.rollouts.Accept(ctx, n, object, s, rollout.NewPlan(s.Rollout, instances, before)); err != nil {
		return err
	}
	c.look()
	return nil
}

// reached lists the instances that run and that a content would hold for.
func (w world) reached(n rollout.Name, s spec.ClusterGuardPolicy) (out []string) {
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		if ok && !i.deleting && i.status.Phase == wire.PhaseRunning && rollout.Selects(n, s.Select, w.subject(k, i, wl)) {
			out = append(out, k.Name)
		}
	}
	return out
}

// watchStage moves a change on, or halts it.
func (c *Control) watchStage(ctx context.Context, w world, p rollout.Policy) error {
	s := p.Stage
	if s == nil || s.Phase == rollout.Paused || s.Phase == rollout.Halted {
		return nil
	}
	now := c.now()
	if why := c.anomaly(w, *s, now); why != "" {
		return c.rollouts.Halt(ctx, p.Name, why)
	}
	switch s.Phase {
	case rollout.Applying:
		waits := w.behind(s.Instances)
		if len(waits) == 0 && w.numbered(p, s.Instances) {
			return c.rollouts.Applied(ctx, p.Name)
		}
		if now.Sub(s.Since) > applyPatience {
			return c.rollouts.Halt(ctx, p.Name, fmt.Sprintf("%s does not have the change after %v", strings.Join(waits, ", "), applyPatience))
		}
	case rollout.Soaking:
		if now.Sub(s.Since) >= s.Soak {
			return c.rollouts.Soaked(ctx, p.Name)
		}
	}
	return nil
}

// numbered tells whether the instances were given a generation that has the
// change in it: in the round in which a stage begins they have the one before.
func (w world) numbered(p rollout.Policy, instances []string) bool {
	book := rollout.State{Policies: w.book.Policies, Switches: w.book.Switches}
	for k, i := range w.instances {
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		if !ok || i.deleting || !slices.Contains(instances, k.Name) {
			continue
		}
		if i.guardDigest != guardDigest(w.guard(w.subject(k, i, wl), book)) {
			return false
		}
	}
	at := slices.IndexFunc(w.book.Policies, func(o rollout.Policy) bool { return o.Name == p.Name })
	return at >= 0 && w.book.Policies[at].Next != nil && w.book.Policies[at].Next.Number == p.Next.Number &&
		slices.Equal(w.book.Policies[at].Stage.Instances, p.Stage.Instances)
}

// behind lists those of the instances whose guest has not said that it has
// what it was given. One that is gone is not waited for.
func (w world) behind(instances []string) (out []string) {
	for k, i := range w.instances {
		if slices.Contains(instances, k.Name) && !i.deleting && i.status.Guard.Generation != i.guard {
			out = append(out, k.Name)
		}
	}
	slices.Sort(out)
	return out
}

// anomaly says what is wrong with the instances that have a change.
func (c *Control) anomaly(w world, s rollout.Stage, now time.Time) string {
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if !slices.Contains(s.Instances, k.Name) || i.deleting {
			continue
		}
		switch {
		case i.status.Refused != 0 && i.status.Refused == i.guard:
			return fmt.Sprintf("%s refused the change: %s", k.Name, clip(i.status.RefusedReason, maxRule))
		case i.status.Phase == wire.PhaseContained || slices.Contains(w.epoch.Instances, k.Name):
			return fmt.Sprintf("%s is contained: %s", k.Name, clip(i.status.Message, maxRule))
		case i.status.Phase != wire.PhaseRunning:
			return fmt.Sprintf("%s does not run any more (%s): %s", k.Name, i.status.Phase, clip(i.status.Message, maxRule))
		case i.observed && !w.nodes[i.node].ready:
			return fmt.Sprintf("%s: its node %s is not heard", k.Name, i.node)
		}
	}
	window := min(now.Sub(s.Began), time.Minute)
	if seen := c.meter.seen(s.Instances, now.Add(-window), now); seen > s.Allowed+s.Before*float64(len(s.Instances)) {
		return fmt.Sprintf("%.0f denials within a minute in %d instances; before the change they had %.1f, and %.0f more are allowed", seen, len(s.Instances), s.Before*float64(len(s.Instances)), s.Allowed)
	}
	return ""
}

// number notes the generation of a content.
func (c *Control) number(k key, digest string, generation uint64) {
	if c.numbers[k] == nil {
		c.numbers[k] = map[string]uint64{}
	}
	c.numbers[k][digest] = generation
}

// guardNumber is the generation of a content for an instance that has one up
// to above: the one that others have it under, or the next.
func (c *Control) guardNumber(ctx context.Context, w *world, k key, digest string, above uint64) (uint64, error) {
	if n := c.numbers[k][digest]; n > above {
		return n, nil
	}
	wl := w.workloads[k]
	wl.guard = max(wl.guard+1, wire.FirstGeneration)
	if err := c.setWorkload(ctx, w, k, wl); err != nil {
		return 0, err
	}
	c.number(k, digest, wl.guard)
	return wl.guard, nil
}

// numberInstances gives every instance whose policies have changed the number
// of what it should have now, and stores it before any node is told.
func (c *Control) numberInstances(ctx context.Context, w *world) error {
	var errs []error
	var changed []key
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		wk := key{k.Namespace, i.workload}
		wl, ok := w.workloads[wk]
		if !ok || i.deleting || i.final() {
			continue
		}
		g := w.guard(w.subject(k, i, wl), w.book)
		digest := guardDigest(g)
		if i.guardDigest == digest {
			if c.numbers[wk][digest] < i.guard {
				c.number(wk, digest, i.guard) // known from before a restart
			}
			g.Generation = i.guard
			c.given[k] = g
			continue
		}
		number, err := c.guardNumber(ctx, w, wk, digest, i.guard)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		i.guard, i.guardDigest = number, digest
		w.instances[k] = i
		changed = append(changed, k)
	}
	if err := c.storeNumbers(ctx, *w, changed); err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, k := range changed {
		i := w.instances[k]
		g := w.guard(w.subject(k, i, w.workloads[key{k.Namespace, i.workload}]), w.book)
		g.Generation = i.guard
		c.given[k] = g
	}
	return errors.Join(errs...)
}

func (c *Control) storeNumbers(ctx context.Context, w world, changed []key) error {
	var wg sync.WaitGroup
	var mu sync.Mutex
	var errs []error
	slots := make(chan struct{}, writers)
	for _, k := range changed {
		i := w.instances[k]
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			err := kube.Update(ctx, c.store, k.Namespace, k.Name, func(o *v1alpha1.Instance) {
				o.Spec.GuardGeneration, o.Spec.GuardDigest = int64(i.guard), i.guardDigest
			})
			if err != nil && !kube.NotFound(err) {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// tell shows what was recorded as events of the objects it is about.
func (c *Control) tell(ctx context.Context) error {
	var errs []error
	for _, r := range c.untold.take() {
		var about kube.Object
		var err error
		namespace, name, _ := strings.Cut(r.Policy, "/")
		switch {
		case r.Policy != "" && r.Namespace == rollout.Cluster && namespace == rollout.Cluster:
			about, err = kube.Get[v1alpha1.ClusterGuardPolicy](ctx, c.store, "", name)
			if kube.NotFound(err) { // or a namespace of that name
				about, err = kube.Get[v1alpha1.GuardPolicy](ctx, c.store, namespace, name)
			}
		case r.Policy != "":
			about, err = kube.Get[v1alpha1.GuardPolicy](ctx, c.store, namespace, name)
		case r.Workload != "":
			about, err = kube.Get[v1alpha1.Workload](ctx, c.store, r.Namespace, r.Workload)
		default:
			continue // about no object
		}
		if err == nil {
			reason, warning := eventReason(r)
			err = c.store.Record(ctx, about, warning, reason, clip(r.Text, 1000))
		}
		if !kube.NotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func eventReason(r rollout.Record) (reason string, warning bool) {
	if r.Kind == rollout.KindDegrade {
		return "GuardDegraded", true
	}
	act := rollout.Act(r)
	return "Guard" + strings.ToUpper(act[:1]) + act[1:], act == "halt" || act == "abort" || act == "rollback" || act == "refuse"
}
