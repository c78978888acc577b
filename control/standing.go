package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/contain"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
	"hauberk.dev/release"
)

// workloadStatus writes how a workload stands.
func (c *Control) workloadStatus(ctx context.Context, w *world, k key, reason, message string, rel *release.Release) error {
	wl := w.workloads[k]
	want := int32(1)
	if wl.spec.Replicas != nil {
		want = *wl.spec.Replicas
	}
	var all, running, contained int32
	for ik, i := range w.instances {
		if ik.Namespace != k.Namespace || i.workload != k.Name || i.deleting {
			continue
		}
		all++
		switch {
		case i.status.Phase == wire.PhaseContained || slices.Contains(w.epoch.Instances, ik.Name):
			contained++
		case i.status.Phase == wire.PhaseRunning:
			running++
		}
	}
	ready := reason == "" && running >= want || reason != "" && running >= want && rel != nil
	switch {
	case ready:
		reason, message = "Running", fmt.Sprintf("%d of %d instances run", running, want)
	case reason == "":
		reason, message = "Starting", fmt.Sprintf("%d of %d instances run", running, want)
	}
	return kube.UpdateStatus(ctx, c.store, k.Namespace, k.Name, func(o *v1alpha1.Workload) {
		o.Status.Instances, o.Status.ReadyInstances, o.Status.ContainedInstances = all, running, contained
		kube.SetCondition(o, v1alpha1.ConditionReady, ready, reason, message)
		kube.SetCondition(o, v1alpha1.ConditionAccepted, rel != nil, acceptedReason(rel, reason), acceptedMessage(rel, message))
		if rel != nil {
			index := int64(rel.Index)
			o.Status.Digest, o.Status.ReleaseIndex = rel.Digest, &index
		}
	})
}

func acceptedReason(rel *release.Release, reason string) string {
	if rel != nil {
		return "Released"
	}
	return reason
}

func acceptedMessage(rel *release.Release, message string) string {
	if rel != nil {
		return fmt.Sprintf("%s passed the gate, ledger entry %d", rel.Image(), rel.Index)
	}
	return message
}

// standing is a workload's state in one sentence.
func (c *Control) standing(k key) (string, bool) {
	c.mu.Lock()
	_, known := c.world.workloads[k]
	c.mu.Unlock()
	if !known {
		return "", false
	}
	o, err := kube.Get[v1alpha1.Workload](context.Background(), c.store, k.Namespace, k.Name)
	if err != nil {
		return "", false
	}
	ready := kube.FindCondition(o, v1alpha1.ConditionReady)
	if ready == nil {
		return fmt.Sprintf("Workload %s was accepted and has not been looked at yet.", k.Name), true
	}
	if ready.Status == "True" {
		return fmt.Sprintf("Workload %s runs: %s.", k.Name, ready.Message), true
	}
	return fmt.Sprintf("Workload %s does not run (%s): %s.", k.Name, ready.Reason, ready.Message), true
}

// syncIncidents shows the book's incidents as resources.
func (c *Control) syncIncidents(ctx context.Context) error {
	var errs []error
	for _, i := range c.book.Incidents() {
		if c.shown[i.Name] == len(i.Receipts)+1 {
			continue
		}
		if err := c.showIncident(ctx, i); err != nil {
			errs = append(errs, fmt.Errorf("incident %s: %w", i.Name, err))
			continue
		}
		c.shown[i.Name] = len(i.Receipts) + 1
	}
	return errors.Join(errs...)
}

func (c *Control) showIncident(ctx context.Context, i contain.Incident) error {
	_, err := kube.Get[v1alpha1.Incident](ctx, c.store, i.Namespace, i.Name)
	switch {
	case kube.NotFound(err) && c.shown[i.Name] == 0 && i.State() == contain.Contained && c.now().Sub(i.Done) > time.Hour:
		return nil // a person deleted the resource of an old incident; the ledger keeps it
	case kube.NotFound(err):
		o := &v1alpha1.Incident{ObjectMeta: kube.ObjectMeta{Namespace: i.Namespace, Name: i.Name}, Spec: i.Spec}
		if err := kube.Create(ctx, c.store, o); err != nil && !kube.Exists(err) {
			if kube.NotFound(err) {
				return nil // its namespace is gone; the ledger keeps the incident
			}
			return err
		}
	case err != nil:
		return err
	}
	return kube.UpdateStatus(ctx, c.store, i.Namespace, i.Name, func(o *v1alpha1.Incident) {
		if o.Status.State != v1alpha1.IncidentClosed {
			o.Status.State = v1alpha1.IncidentState(i.State())
		}
		o.Status.Epoch = int64(i.Epoch)
		o.Status.Receipts = nil
		for _, r := range i.Receipts {
			o.Status.Receipts = append(o.Status.Receipts, v1alpha1.Receipt{Point: r.Point, Node: r.Node, Act: r.Act,
				At: kube.MicroTime{Time: r.At}, Signature: r.Signature})
		}
		if !i.Done.IsZero() {
			ms := i.Elapsed().Milliseconds()
			o.Status.ContainedMillis = &ms
		}
		kube.SetCondition(o, v1alpha1.ConditionReady, i.State() == contain.Contained, string(i.State()),
			fmt.Sprintf("%d of %d receipts", len(i.Receipts), len(i.Needs)))
	})
}

func observed(i contain.Incident) time.Time {
	at, err := time.Parse(time.RFC3339Nano, i.Spec.Observed)
	if err != nil {
		return time.Time{}
	}
	return at
}

// restart replaces every instance of a workload, the contained ones included.
func (c *Control) restart(ctx context.Context, k key) error {
	if _, err := kube.Get[v1alpha1.Workload](ctx, c.store, k.Namespace, k.Name); err != nil {
		return &admin.Error{Reason: "UnknownWorkload", Message: fmt.Sprintf("restart %s: %v", k, err), Fix: "`hauberk ps` lists the workloads; -n chooses the namespace"}
	}
	all, err := kube.List[v1alpha1.Instance](ctx, c.store, k.Namespace)
	if err != nil {
		return err
	}
	for _, o := range all {
		if o.Spec.Workload == k.Name {
			if err := kube.Delete[v1alpha1.Instance](ctx, c.store, o.Namespace, o.Name); err != nil {
				return err
			}
		}
	}
	c.look()
	return nil
}

// recordApplications notes who owns what, whenever that changes, before
// anything can be released under it.
func (c *Control) recordApplications(ctx context.Context, w world) error {
	var errs []error
	for _, k := range sortedKeys(w.applications) {
		body, err := json.Marshal(w.applications[k])
		if err != nil {
			return fmt.Errorf("record application %s: %w", k, err)
		}
		if c.owned[k] == string(body) {
			continue
		}
		last, err := c.log.Find(ledger.Query{Kind: kindApplication, Namespace: k.Namespace, Application: k.Name, Limit: 1})
		if err != nil {
			return err
		}
		if len(last) == 0 || string(last[0].Entry.Body) != string(body) {
			a := w.applications[k]
			text := fmt.Sprintf("application %s is built from %v; %d accounts hold roles on it", k.Name, a.Repositories, len(a.Accounts))
			errs = append(errs, c.record(ctx, contain.Record{Kind: kindApplication, Namespace: k.Namespace, Application: k.Name, Text: text, Body: body}))
		}
		c.owned[k] = string(body)
	}
	return errors.Join(errs...)
}
