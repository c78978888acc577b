package control

import (
	"context"
	"errors"
	"fmt"
	"slices"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/v1alpha1"
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
	var errs []error
	for k := range w.applications {
		releases, err := c.log.Find(ledger.Query{Kind: "release.done", Namespace: k.Namespace, Application: k.Name})
		errs = append(errs, err, stand(ctx, c, k, sound, func(o *v1alpha1.Application) {
			o.Status.Workloads, o.Status.Releases = w.countWorkloads(k.Namespace, func(wl workload) bool { return wl.spec.Application == k.Name }), int32(len(releases))
		}))
	}
	for k := range w.guards {
		errs = append(errs, stand(ctx, c, k, w.guardVerdict(k), func(o *v1alpha1.GuardPolicy) {
			named := func(wl workload) bool { return slices.Contains(wl.spec.GuardPolicies, k.Name) }
			o.Status.Workloads, o.Status.Instances = w.countWorkloads(k.Namespace, named), w.enforcing(k)
		}))
	}
	for k := range w.access {
		errs = append(errs, stand(ctx, c, k, w.accessVerdict(k), func(*v1alpha1.AccessPolicy) {}))
	}
	for k := range w.releases {
		errs = append(errs, stand(ctx, c, k, w.releaseVerdict(k), func(*v1alpha1.ReleasePolicy) {}))
	}
	return errors.Join(errs...)
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

// enforcing counts the instances whose guest has said that it enforces the
// newest generation of a policy.
func (w world) enforcing(policy key) (n int32) {
	for k, i := range w.instances {
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		if ok && k.Namespace == policy.Namespace && slices.Contains(wl.spec.GuardPolicies, policy.Name) &&
			i.status.Phase == wire.PhaseRunning && i.status.Guard.Generation == wl.guard && i.status.Guard.Programs > 0 {
			n++
		}
	}
	return n
}

// guardVerdict looks at what a policy names. Whether a guest can hold it is
// found where it is compiled, on the node: the instance says so.
func (w world) guardVerdict(k key) verdict {
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

func (w world) accessVerdict(k key) verdict {
	name := w.access[k].Workload
	if _, ok := w.workloads[key{k.Namespace, name}]; !ok {
		return verdict{false, "WorkloadNotFound", fmt.Sprintf("spec.workload: %q does not exist in namespace %s: create the Workload or correct the name", name, k.Namespace)}
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
