package control

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/contain"
	"hauberk.dev/control/rollout"
	"hauberk.dev/evidence"
	"hauberk.dev/kube"
	"hauberk.dev/plan"
	"hauberk.dev/release"
)

const (
	// ticketLife is how long a launch may be repeated; it is signed again at
	// half of it.
	ticketLife = 24 * time.Hour
	// idleLook is how often the reconciler looks without being asked.
	idleLook = 2 * time.Second
)

// reconcileLoop brings the world to what the resources say, whenever
// something changes.
func (c *Control) reconcileLoop(ctx context.Context) error {
	for {
		wait := idleLook
		if again, err := c.reconcile(ctx); err != nil {
			c.note(fmt.Errorf("reconcile: %w", err))
			wait = time.Second
		} else if again > 0 {
			wait = min(wait, again)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		case <-time.After(wait):
		}
	}
}

// reconcile does one round: read, decide, act, order.
func (c *Control) reconcile(ctx context.Context) (again time.Duration, err error) {
	var errs []error
	if err := c.orderEpoch(); err != nil {
		errs = append(errs, err)
	}
	w, err := c.read(ctx)
	if err != nil {
		return 0, errors.Join(append(errs, err)...)
	}
	c.publish(w)
	if err := c.syncGuards(ctx, &w); err != nil {
		errs = append(errs, err)
	}
	if err := c.recordApplications(ctx, w); err != nil {
		errs = append(errs, err)
	}
	if err := c.syncInstances(ctx, w); err != nil {
		errs = append(errs, err)
	}
	for _, k := range sortedKeys(w.workloads) {
		wait, err := c.reconcileWorkload(ctx, &w, k)
		if err != nil {
			errs = append(errs, fmt.Errorf("workload %s: %w", k, err))
		}
		if wait > 0 && (again == 0 || wait < again) {
			again = wait
		}
	}
	if err := c.numberInstances(ctx, &w); err != nil {
		errs = append(errs, err)
	}
	if err := c.dropOrphans(ctx, w); err != nil {
		errs = append(errs, err)
	}
	if err := c.syncIncidents(ctx); err != nil {
		errs = append(errs, err)
	}
	w, err = c.read(ctx)
	if err != nil {
		return 0, errors.Join(append(errs, err)...)
	}
	c.publish(w)
	c.forget(w)
	errs = append(errs, c.order(w))
	// Last, for nobody waits for it.
	errs = append(errs, c.syncPolicies(ctx, w))
	return again, errors.Join(errs...)
}

// orderEpoch sends a new epoch out before anything else is looked at, with the
// orders as they were: a revocation waits for no store and no disk.
func (c *Control) orderEpoch() error {
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	old := w.epoch.Number
	if w.epoch = c.book.Epoch(); w.epoch.Number == old {
		return nil
	}
	c.publish(w)
	return c.order(w)
}

// order tells every node what it should be doing.
func (c *Control) order(w world) error {
	var errs []error
	for node := range w.nodes {
		orders, err := c.desiredFor(w, node)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		c.hub.order(node, orders)
	}
	return errors.Join(errs...)
}

// forget drops what is remembered of workloads and applications that are gone.
func (c *Control) forget(w world) {
	maps.DeleteFunc(c.retries, func(k key, _ retry) bool { _, ok := w.workloads[k]; return !ok })
	maps.DeleteFunc(c.numbers, func(k key, _ map[string]uint64) bool { _, ok := w.workloads[k]; return !ok })
	maps.DeleteFunc(c.given, func(k key, _ wire.Guard) bool { _, ok := w.instances[k]; return !ok })
	maps.DeleteFunc(c.owned, func(k key, _ string) bool { _, ok := w.applications[k]; return !ok })
}

// publish makes a world the one that questions are answered from. They read it
// at any time, so it shares nothing that whoever publishes goes on to change.
func (c *Control) publish(w world) {
	w.instances, w.workloads = maps.Clone(w.instances), maps.Clone(w.workloads)
	c.mu.Lock()
	c.world = w
	c.mu.Unlock()
}

// read builds the world from the store, the nodes and the book.
func (c *Control) read(ctx context.Context) (world, error) {
	w := world{
		trustDomain: c.conf.TrustDomain, applications: map[key]spec.Application{}, workloads: map[key]workload{},
		guards: map[key]guardPolicy{}, access: map[key]spec.AccessPolicy{}, releases: map[key]spec.ReleasePolicy{},
		instances: map[key]instance{}, epoch: c.book.Epoch(),
		floors: map[string]clusterPolicy{}, book: c.rollouts.State(), given: maps.Clone(c.given),
		conditions: &c.conditions, observe: c.conf.Observe,
	}
	var statuses map[word]wire.InstanceStatus
	w.nodes, statuses, _ = c.hub.snapshot()
	err := errors.Join(
		each(ctx, c.store, func(o *v1alpha1.Application) { w.applications[keyOf(o)] = o.Spec }),
		each(ctx, c.store, func(o *v1alpha1.GuardPolicy) { w.guards[keyOf(o)] = guardPolicy{o.Spec, o.Generation} }),
		each(ctx, c.store, func(o *v1alpha1.ClusterGuardPolicy) { w.floors[o.Name] = clusterPolicy{o.Spec, o.Generation} }),
		each(ctx, c.store, func(o *v1alpha1.AccessPolicy) { w.access[keyOf(o)] = o.Spec }),
		each(ctx, c.store, func(o *v1alpha1.ReleasePolicy) { w.releases[keyOf(o)] = o.Spec }),
		each(ctx, c.store, func(o *v1alpha1.Workload) {
			address, _ := netip.ParseAddr(o.Status.Address) // none yet is the zero address
			w.workloads[keyOf(o)] = workload{spec: o.Spec, generation: o.Generation, address: address,
				guard: uint64(o.Status.GuardGeneration), guardDigest: o.Status.GuardDigest, labels: o.Labels}
		}),
		each(ctx, c.store, func(o *v1alpha1.Instance) { w.instances[keyOf(o)] = instanceOf(o, statuses) }),
	)
	return w, err
}

func each[T any, P kube.Resource[T]](ctx context.Context, s *kube.Store, f func(P)) error {
	all, err := kube.List[T, P](ctx, s, "")
	if err != nil {
		return err
	}
	for n := range all {
		f(P(&all[n]))
	}
	return nil
}

func keyOf(o kube.Object) key { return key{o.GetNamespace(), o.GetName()} }

// instanceOf joins an Instance object with the last word of its node, which is
// newer than the object's status.
func instanceOf(o *v1alpha1.Instance, statuses map[word]wire.InstanceStatus) instance {
	address, _ := netip.ParseAddr(o.Spec.Address) // the API let only addresses in
	i := instance{
		workload: o.Spec.Workload, application: o.Spec.Application, node: o.Spec.Node, repository: o.Spec.Repository,
		digest: o.Spec.Digest, specHash: launchHash(o.Spec.Launch, o.Spec.Digest), address: address,
		identity: o.Spec.Identity, ticket: []byte(o.Spec.Ticket), spec: o.Spec.Launch,
		deleting: o.DeletionTimestamp != nil, guard: uint64(o.Spec.GuardGeneration), guardDigest: o.Spec.GuardDigest,
	}
	i.status = wire.InstanceStatus{ID: o.Name, Phase: wire.Phase(o.Status.Phase), Reason: o.Status.Reason,
		Message: o.Status.Message, ReadyMillis: o.Status.ReadyMillis, Serial: o.Status.Serial}
	if o.Status.StartedAt != nil {
		i.status.StartedAt = o.Status.StartedAt.Time
	}
	if o.Status.ExitCode != nil {
		code := int(*o.Status.ExitCode)
		i.status.ExitCode = &code
	}
	if s, ok := statuses[word{o.Spec.Node, o.Name}]; ok && !i.final() {
		i.status, i.observed = s, true
	}
	return i
}

// reconcileWorkload allots, admits, launches and removes for one workload.
func (c *Control) reconcileWorkload(ctx context.Context, w *world, k key) (time.Duration, error) {
	wl, err := c.allotTo(ctx, w, k)
	if err != nil {
		return 0, err
	}
	if reason, message := w.dangling(k, wl); reason != "" {
		return 0, c.workloadStatus(ctx, w, k, reason, message, nil)
	}
	rel, err := c.gate.Admitted(ctx, k.Namespace, wl.spec.Application, wl.spec.Image)
	if err != nil {
		c.note(c.recordLaunchRefusal(ctx, k, wl, err))
		return 0, c.workloadStatus(ctx, w, k, refusalReason(err), err.Error(), nil)
	}
	d := w.decide(k, rel.Digest, c.retries[k], c.now())
	if err := c.act(ctx, w, k, wl, rel, d); err != nil {
		return 0, errors.Join(err, c.workloadStatus(ctx, w, k, "LaunchFailed", err.Error(), &rel))
	}
	return d.wait, c.workloadStatus(ctx, w, k, d.reason, d.message, &rel)
}

// dangling says which resource that the workload names is not there.
func (w world) dangling(k key, wl workload) (reason, message string) {
	if _, ok := w.applications[key{k.Namespace, wl.spec.Application}]; !ok {
		return "ApplicationNotFound", fmt.Sprintf("spec.application: %q does not exist in namespace %s: create the Application or correct the name", wl.spec.Application, k.Namespace)
	}
	for n, name := range wl.spec.GuardPolicies {
		if _, ok := w.guards[key{k.Namespace, name}]; !ok {
			return "GuardPolicyNotFound", fmt.Sprintf("spec.guardPolicies[%d]: %q does not exist in namespace %s: create the GuardPolicy or correct the name", n, name, k.Namespace)
		}
		if !w.book.Has(rollout.Name{Namespace: k.Namespace, Name: name}) {
			return "GuardPolicyRefused", fmt.Sprintf("spec.guardPolicies[%d]: nothing of %q is in force: its Accepted condition says what to correct", n, name)
		}
	}
	return "", ""
}

// allotTo gives a workload its address and numbers its Guard policies.
func (c *Control) allotTo(ctx context.Context, w *world, k key) (workload, error) {
	wl := w.workloads[k]
	digest := guardDigest(w.guard(w.subject(key{Namespace: k.Namespace}, instance{workload: k.Name}, wl), w.book))
	if wl.address.IsValid() && wl.guardDigest == digest {
		return wl, nil
	}
	if !wl.address.IsValid() {
		taken := map[netip.Addr]bool{}
		for _, o := range w.workloads {
			taken[o.address] = true
		}
		a, err := allot(plan.Services, netip.Addr{}, taken)
		if err != nil {
			return wl, err
		}
		wl.address = a
	}
	wl.guardDigest = digest
	if c.numbers[k][digest] == 0 {
		wl.guard = max(wl.guard+1, wire.FirstGeneration)
	}
	if err := c.setWorkload(ctx, w, k, wl); err != nil {
		return wl, err
	}
	if c.numbers[k][digest] == 0 {
		c.number(k, digest, wl.guard)
	}
	return wl, nil
}

// setWorkload stores what is allotted to a workload.
func (c *Control) setWorkload(ctx context.Context, w *world, k key, wl workload) error {
	w.workloads[k] = wl
	return kube.UpdateStatus(ctx, c.store, k.Namespace, k.Name, func(o *v1alpha1.Workload) {
		o.Status.Address = wl.address.String()
		o.Status.Identity = identity(w.trustDomain, k)
		o.Status.GuardGeneration, o.Status.GuardDigest = int64(wl.guard), wl.guardDigest
	})
}

// guardDigest names the content of resolved policies, whatever their number.
func guardDigest(g wire.Guard) string {
	g.Generation, g.Kernel = 0, ""
	data, err := json.Marshal(g)
	if err != nil {
		return "" // plain values always marshal
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:16])
}

// act carries a decision out.
func (c *Control) act(ctx context.Context, w *world, k key, wl workload, rel release.Release, d decision) error {
	for _, ik := range d.remove {
		i := w.instances[ik]
		if i.final() { // a good exit too: one that exits at once must not spin
			c.retries[k] = c.retries[k].failed(ik, i, c.now())
		}
		if err := kube.Delete[v1alpha1.Instance](ctx, c.store, ik.Namespace, ik.Name); err != nil {
			return err
		}
		i.deleting = true
		w.instances[ik] = i
	}
	if d.running > 0 && c.retries[k].failures > 0 && c.now().Sub(c.retries[k].last) > time.Minute {
		delete(c.retries, k)
	}
	for range d.create {
		if !c.now().After(c.retries[k].after()) {
			return nil // a removal above has just put the next try off
		}
		if err := c.launch(ctx, w, k, wl, rel); err != nil {
			return err
		}
	}
	return nil
}

// launch records, signs and orders one instance.
func (c *Control) launch(ctx context.Context, w *world, k key, wl workload, rel release.Release) error {
	node, err := w.place()
	if err != nil {
		return err
	}
	taken := map[netip.Addr]bool{}
	var last netip.Addr
	for _, i := range w.instances {
		taken[i.address] = true
		if i.address.Compare(last) > 0 {
			last = i.address
		}
	}
	address, err := allot(plan.Guests, max0(last, c.lastAddress), taken)
	if err != nil {
		return err
	}
	c.lastAddress = address
	name := k.Name + "-" + strings.ToLower(rand.Text()[:6])
	digest := guardDigest(w.guard(w.subject(key{k.Namespace, name}, instance{workload: k.Name, node: node}, wl), w.book))
	generation, err := c.guardNumber(ctx, w, k, digest, 0)
	if err != nil {
		return err
	}
	t, err := c.ticket(ctx, k, wl, generation, rel.Repository, rel.Digest, name, node, w.nodes[node].hello.Measurement)
	if err != nil {
		return err
	}
	o := &v1alpha1.Instance{ObjectMeta: kube.ObjectMeta{Namespace: k.Namespace, Name: name}, Spec: v1alpha1.InstanceSpec{
		Workload: k.Name, Application: wl.spec.Application, Node: node, Repository: rel.Repository, Digest: rel.Digest,
		Address: address.String(), Identity: identity(w.trustDomain, k), Ticket: string(t), Launch: wl.spec,
		GuardGeneration: int64(generation), GuardDigest: digest,
	}}
	if err := kube.Create(ctx, c.store, o); err != nil {
		return err
	}
	w.instances[key{k.Namespace, name}] = instanceOf(o, nil)
	return nil
}

func max0(a, b netip.Addr) netip.Addr {
	if a.Compare(b) > 0 {
		return a
	}
	return b
}

// ticket records a permission to launch, then signs it.
func (c *Control) ticket(ctx context.Context, k key, wl workload, generation uint64, repository, digest, name, node string, m wire.Measurement) (json.RawMessage, error) {
	now := c.now().UTC()
	t := evidence.Ticket{
		ID: strings.ToLower(rand.Text()), Instance: name, Namespace: k.Namespace, Workload: k.Name,
		Application: wl.spec.Application, Repository: repository, Digest: digest, SandboxClass: wl.spec.Sandbox.Class,
		Node: node, Measurement: m, GuardGeneration: generation, NotBefore: now, NotAfter: now.Add(ticketLife),
	}
	body, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("ticket of %s: %w", name, err)
	}
	guardText := fmt.Sprintf("Guard policy generation %d", generation)
	if m.GuardOff {
		guardText = "WITHOUT the Guard"
	}
	t.LedgerIndex, err = c.append(ctx, contain.Record{
		Kind: kindTicket, Namespace: k.Namespace, Application: wl.spec.Application, Workload: k.Name, Instance: name,
		Digest: digest, Node: node, Body: body,
		Text: fmt.Sprintf("ticket: %s may run %s@%.19s… on node %s in a %s sandbox with kernel %.8s…, %s", name, repository, digest, node, t.SandboxClass, m.Kernel, guardText),
	})
	if err != nil {
		return nil, err
	}
	return evidence.SignTicket(t, c.tickets)
}

// renewTicket signs again what is past half its life, as it was: the guest
// still is the one it was. A ticket that was never signed here is not renewed,
// however its object came to be.
func (c *Control) renewTicket(ctx context.Context, w world, k key, i instance) error {
	wl, ok := w.workloads[key{k.Namespace, i.workload}]
	if !ok || i.final() || i.deleting {
		return nil
	}
	t, err := evidence.VerifyTicket(i.ticket, c.now(), []evidence.Key{c.tickets.Key()})
	if expired := (*evidence.ExpiredError)(nil); errors.As(err, &expired) {
		t, err = evidence.VerifyTicket(i.ticket, expired.From, []evidence.Key{c.tickets.Key()})
	} else if err == nil && c.now().Before(t.NotBefore.Add(t.NotAfter.Sub(t.NotBefore)/2)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("renew ticket of instance %s: %w: delete the instance", k, err)
	}
	if t.Instance != k.Name || t.Namespace != k.Namespace || t.Workload != i.workload || t.Digest != i.digest || t.Repository != i.repository || t.Node != i.node {
		return fmt.Errorf("renew ticket of instance %s: ticket %s is for %s/%s with %s on %s: delete the instance", k, t.ID, t.Namespace, t.Instance, t.Digest, t.Node)
	}
	generation := t.GuardGeneration
	if i.status.Guard.Generation >= i.guard {
		generation = i.guard // what was refused by the guest is demanded of nobody
	}
	raw, err := c.ticket(ctx, key{k.Namespace, i.workload}, wl, generation, i.repository, i.digest, k.Name, i.node, t.Measurement)
	if err != nil {
		return err
	}
	return kube.Update(ctx, c.store, k.Namespace, k.Name, func(o *v1alpha1.Instance) { o.Spec.Ticket = string(raw) })
}

// syncInstances writes what nodes said into the resources, and the first
// running state of each into the ledger.
func (c *Control) syncInstances(ctx context.Context, w world) error {
	var errs []error
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if err := c.renewTicket(ctx, w, k, i); err != nil {
			errs = append(errs, err)
		}
		if !i.observed {
			continue
		}
		if i.status.Phase == wire.PhaseRunning && !c.booted[k.Name] {
			if err := c.recordBoot(ctx, k, i); err != nil {
				errs = append(errs, err)
				continue
			}
			c.booted[k.Name] = true
		}
		errs = append(errs, kube.UpdateStatus(ctx, c.store, k.Namespace, k.Name, func(o *v1alpha1.Instance) { setInstanceStatus(o, i.status) }))
	}
	maps.DeleteFunc(c.booted, func(name string, _ bool) bool {
		for k := range w.instances {
			if k.Name == name {
				return false
			}
		}
		return true
	})
	return errors.Join(errs...)
}

func (c *Control) recordBoot(ctx context.Context, k key, i instance) error {
	found, err := c.log.Find(ledgerBoot(k.Name))
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return nil
	}
	g := i.status.Guard
	body, err := json.Marshal(i.status)
	if err != nil {
		return fmt.Errorf("record boot of %s: %w", k.Name, err)
	}
	text := fmt.Sprintf("%s runs on %s after %d ms; its Guard has %d programs attached and enforces generation %d", k.Name, i.node, i.status.ReadyMillis, g.Programs, g.Generation)
	return c.record(ctx, contain.Record{Kind: kindBoot, Namespace: k.Namespace, Application: i.application, Workload: i.workload,
		Instance: k.Name, Digest: i.digest, Node: i.node, Text: text, Body: body})
}

func setInstanceStatus(o *v1alpha1.Instance, s wire.InstanceStatus) {
	before := wire.InstanceStatus{Phase: wire.Phase(o.Status.Phase), Reason: o.Status.Reason, Message: o.Status.Message, Serial: o.Status.Serial}
	if g := o.Status.Guard; g != nil {
		before.Guard = wire.GuardHeartbeat{Generation: uint64(g.Generation), Lost: uint64(g.Lost)}
	}
	g := s.Guard
	silent := g.At.IsZero() // not heard yet; what was heard once stays
	if sameButHeartbeat(before, s) && (silent || o.Status.Guard != nil) && o.Status.Phase != "" {
		return // a beat alone is not written: it would change every object every few seconds
	}
	o.Status.Phase, o.Status.Reason, o.Status.Message = string(s.Phase), s.Reason, s.Message
	o.Status.ReadyMillis, o.Status.Serial = s.ReadyMillis, s.Serial
	if !s.StartedAt.IsZero() {
		o.Status.StartedAt = &kube.Time{Time: s.StartedAt}
	}
	if s.ExitCode != nil {
		code := int32(*s.ExitCode)
		o.Status.ExitCode = &code
	}
	if !silent {
		o.Status.Guard = &v1alpha1.GuardHeartbeat{At: kube.MicroTime{Time: g.At}, Generation: int64(g.Generation), Digest: g.Digest,
			Programs: int32(g.Programs), Sequence: int64(g.Sequence), Lost: int64(g.Lost)}
	}
	kube.SetCondition(o, v1alpha1.ConditionReady, s.Phase == wire.PhaseRunning, orElse(s.Reason, string(s.Phase)), s.Message)
}

// dropOrphans deletes instances whose workload is gone.
func (c *Control) dropOrphans(ctx context.Context, w world) error {
	var errs []error
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if _, ok := w.workloads[key{k.Namespace, i.workload}]; !ok && !i.deleting {
			errs = append(errs, kube.Delete[v1alpha1.Instance](ctx, c.store, k.Namespace, k.Name))
		}
	}
	return errors.Join(errs...)
}
