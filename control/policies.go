package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/control/rollout"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
	"hauberk.dev/policy/rule"
)

// verdict is what is said of a policy: whether it makes sense together with
// the resources it names.
type verdict struct {
	accepted        bool
	reason, message string
}

var sound = verdict{true, "Accepted", "it holds where it is named"}

// syncPolicies says of every application and policy how it stands. Nothing
// here permits anything: what a refused policy would do is refused where it
// would be done.
func (c *Control) syncPolicies(ctx context.Context, w world) error {
	errs := []error{c.learn(w)}
	for k := range w.applications {
		releases, err := c.log.Find(ledger.Query{Kind: "release.done", Namespace: k.Namespace, Application: k.Name})
		errs = append(errs, err, stand(ctx, c, k, sound, func(o *v1alpha1.Application) {
			o.Status.Workloads, o.Status.Releases = w.countWorkloads(k.Namespace, func(wl workload) bool { return wl.spec.Application == k.Name }), int32(len(releases))
		}))
	}
	for k := range w.guards {
		n := rollout.Name{Namespace: k.Namespace, Name: k.Name}
		errs = append(errs, stand(ctx, c, k, c.guardVerdict(w, n), func(o *v1alpha1.GuardPolicy) {
			w.guardStatus(n, spec.GuardSelect{}, &o.Status)
			c.lessons.show(n, &o.Status)
		}))
	}
	for name, p := range w.floors {
		n := rollout.Name{Name: name, Floor: true}
		errs = append(errs, stand(ctx, c, key{Name: name}, c.guardVerdict(w, n), func(o *v1alpha1.ClusterGuardPolicy) {
			w.guardStatus(n, p.spec.Select, &o.Status)
			c.lessons.show(n, &o.Status)
		}))
	}
	for k := range w.access {
		errs = append(errs, stand(ctx, c, k, w.accessVerdict(k), func(*v1alpha1.AccessPolicy) {}))
	}
	for k := range w.releases {
		errs = append(errs, stand(ctx, c, k, w.releaseVerdict(k), func(*v1alpha1.ReleasePolicy) {}))
	}
	c.showRefusals(w)
	return errors.Join(errs...)
}

// showRefusals lets people who ask hear what the objects' conditions say.
func (c *Control) showRefusals(w world) {
	refused := map[rollout.Name]string{}
	note := func(n rollout.Name) {
		if v := c.guardVerdict(w, n); !v.accepted {
			refused[n] = v.message
		}
	}
	for k := range w.guards {
		note(rollout.Name{Namespace: k.Namespace, Name: k.Name})
	}
	for name := range w.floors {
		note(rollout.Name{Name: name, Floor: true})
	}
	c.mu.Lock()
	c.refused = refused
	c.mu.Unlock()
}

// stand writes a verdict and what change adds. A resource that is gone by now
// needs neither.
func stand[T any, P kube.Resource[T]](ctx context.Context, c *Control, k key, v verdict, change func(P)) error {
	err := kube.UpdateStatus(ctx, c.store, k.Namespace, k.Name, func(o P) {
		change(o)
		kube.SetCondition(o, v1alpha1.ConditionAccepted, v.accepted, v.reason, v.message)
	})
	if kube.NotFound(err) {
		return nil
	}
	return err
}

func (w world) countWorkloads(namespace string, match func(workload) bool) (n int32) {
	for k, wl := range w.workloads {
		if k.Namespace == namespace && match(wl) {
			n++
		}
	}
	return n
}

// guardVerdict says what became of what a policy's object says.
func (c *Control) guardVerdict(w world, n rollout.Name) verdict {
	p := c.rollouts.Policy(n)
	held := "nothing of it is in force"
	if p.Current != nil {
		held = fmt.Sprintf("generation %d stays in force", p.Current.Number)
	}
	if r, refused := c.refusals[n]; refused {
		return verdict{false, "PreCheckFailed", r.message + "; " + held}
	}
	if p.Next == nil && p.Rejected != 0 && p.Rejected == w.object(n) && !w.holds(n, p) {
		return verdict{false, "RolledBack", "a person aborted or rolled back what the object says, and " + held + ": change the object to try again"}
	}
	if n.Floor {
		return sound
	}
	return w.danglingService(key{n.Namespace, n.Name})
}

// object is the generation of the policy's object.
func (w world) object(n rollout.Name) int64 {
	if n.Floor {
		return w.floors[n.Name].generation
	}
	return w.guards[key{n.Namespace, n.Name}].generation
}

// holds tells whether what the object says is what is in force.
func (w world) holds(n rollout.Name, p rollout.Policy) bool {
	s := w.floors[n.Name].spec
	if !n.Floor {
		s = spec.ClusterGuardPolicy{GuardPolicy: w.guards[key{n.Namespace, n.Name}].spec}
	}
	_, digest, err := rollout.Encode(s)
	return err == nil && p.Current != nil && p.Current.Digest == digest
}

// danglingService finds a service that a policy allows and that is no workload.
func (w world) danglingService(k key) verdict {
	p := w.guards[k]
	if p.spec.Net == nil {
		return sound
	}
	for n, e := range p.spec.Net.Egress {
		peer, named := serviceKey(k.Namespace, e.Service)
		if !named {
			continue
		}
		if _, ok := w.workloads[peer]; !ok {
			return verdict{false, "ServiceNotFound", fmt.Sprintf("spec.net.egress[%d].service: %q is no workload: nothing is allowed there until it exists", n, e.Service)}
		}
	}
	return sound
}

// What a status names at most.
const (
	maxStatusLines     = 64
	maxStatusInstances = 10000
)

// guardStatus writes how far a policy is.
func (w world) guardStatus(n rollout.Name, sel spec.GuardSelect, o *v1alpha1.GuardPolicyStatus) {
	at := slices.IndexFunc(w.book.Policies, func(p rollout.Policy) bool { return p.Name == n })
	*o = v1alpha1.GuardPolicyStatus{Standing: o.Standing, Selects: selects(n, sel)}
	if at < 0 {
		return
	}
	p := w.book.Policies[at]
	if p.Current != nil {
		o.Generation, o.Digest, sel = int64(p.Current.Number), p.Current.Digest, p.Current.Spec.Select
	}
	for k, wl := range w.workloads {
		if rollout.Selects(n, sel, w.subject(key{Namespace: k.Namespace}, instance{workload: k.Name}, wl)) {
			o.Workloads++
		}
	}
	eligible, applied := w.applied(n, sel)
	o.Eligible, o.Applied = int32(eligible), int32(applied)
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		of := w.subject(k, i, wl)
		if !ok || i.deleting || i.status.Phase != wire.PhaseRunning || !rollout.Selects(n, sel, of) {
			continue
		}
		for _, text := range i.status.Unsupported {
			if !slices.Contains(o.Unsupported, text) && len(o.Unsupported) < maxStatusLines {
				o.Unsupported = append(o.Unsupported, text)
			}
		}
		for _, sw := range w.book.Over(of, n.Floor) {
			if text := sw.String(); !slices.Contains(o.Degraded, text) && len(o.Degraded) < maxStatusLines {
				o.Degraded = append(o.Degraded, text)
			}
		}
	}
	if s := p.Stage; s != nil {
		o.Rollout = &v1alpha1.GuardRolloutStatus{Generation: int64(p.Next.Number), Phase: string(s.Phase), Stage: int32(s.Index + 1), Stages: int32(len(s.Percents)),
			Percent: s.Percents[s.Index], Instances: s.Instances[:min(len(s.Instances), maxStatusInstances)], Message: s.Message()}
	}
}

// selects says in words for what a policy holds.
func selects(n rollout.Name, s spec.GuardSelect) string {
	if !n.Floor {
		return "the workloads of namespace " + n.Namespace + " that name it"
	}
	what, where := "every workload", "of every namespace"
	if len(s.WorkloadLabels) > 0 {
		var labels []string
		for _, k := range slices.Sorted(maps.Keys(s.WorkloadLabels)) {
			labels = append(labels, k+"="+s.WorkloadLabels[k])
		}
		what += " labelled " + strings.Join(labels, ",")
	}
	if len(s.Namespaces) > 0 {
		where = "of namespace " + strings.Join(s.Namespaces, ", ")
	}
	return what + " " + where
}

func (w world) accessVerdict(k key) verdict {
	name := w.access[k].Workload
	if _, ok := w.workloads[key{k.Namespace, name}]; !ok {
		return verdict{false, "WorkloadNotFound", fmt.Sprintf("spec.workload: %q does not exist in namespace %s: create the Workload or correct the name", name, k.Namespace)}
	}
	if err := w.accessFaults(k, w.access[k]); err != nil {
		return verdict{false, "RuleInvalid", err.Error()}
	}
	return sound
}

func (w world) releaseVerdict(k key) verdict {
	p := w.releases[k]
	if _, err := rule.Compile(k.Name, p.Rules); err != nil {
		return verdict{false, "RuleInvalid", err.Error()}
	}
	for n, name := range p.Applications {
		if _, ok := w.applications[key{k.Namespace, name}]; !ok && name != "*" {
			return verdict{false, "ApplicationNotFound", fmt.Sprintf("spec.applications[%d]: %q does not exist in namespace %s: create the Application or correct the name", n, name, k.Namespace)}
		}
	}
	return sound
}
