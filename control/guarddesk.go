package control

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/control/rollout"
	"hauberk.dev/kube"
)

// policyName reads "namespace/name" or "cluster/name". A floor comes before a
// policy of a namespace that is called cluster.
func (c *Control) policyName(text string) (rollout.Name, error) {
	namespace, name, ok := strings.Cut(text, "/")
	if !ok || namespace == "" || name == "" {
		return rollout.Name{}, &admin.Error{Reason: "BadName", Message: fmt.Sprintf("%q names no guard policy", text), Fix: "write namespace/name, or cluster/name for a ClusterGuardPolicy"}
	}
	for _, n := range []rollout.Name{{Name: name, Floor: true}, {Namespace: namespace, Name: name}} {
		if p := c.rollouts.Policy(n); p.Last > 0 && (!n.Floor || namespace == rollout.Cluster) {
			return n, nil
		}
	}
	return rollout.Name{}, &admin.Error{Reason: "UnknownPolicy", Message: fmt.Sprintf("guard policy %q was never in force", text), Fix: "`hauberk guard rollout status` lists the policies"}
}

// maxWho and maxReason bound a person's words, in bytes.
const (
	maxWho    = 128
	maxReason = 2048
)

// who is the person behind a request: what they call themselves, and whom the
// kernel saw.
func who(r *http.Request, called string) string {
	uid, _ := r.Context().Value(peerKey{}).(uint32)
	called = strings.Join(strings.Fields(clip(called, maxWho)), " ")
	if called == "" {
		return fmt.Sprintf("uid %d", uid)
	}
	return fmt.Sprintf("%s (uid %d)", called, uid)
}

func decodeAsk(r *http.Request, into any) error {
	d := json.NewDecoder(io.LimitReader(r.Body, maxRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return &admin.Error{Reason: "BadRequest", Message: fmt.Sprintf("decode %s: %v", r.URL.Path, err), Fix: "use the hauberk of the same release"}
	}
	return nil
}

// rollout does what a person wants of a change.
func (d *desk) rollout(r *http.Request) (any, error) {
	var in admin.Rollout
	if err := decodeAsk(r, &in); err != nil {
		return nil, err
	}
	n, err := d.c.policyName(in.Policy)
	if err != nil {
		return nil, err
	}
	ctx, by, why, book := r.Context(), who(r, in.By), clip(in.Reason, maxReason), d.c.rollouts
	switch in.Act {
	case "confirm":
		err = book.Confirm(ctx, n, by)
	case "pause":
		err = book.Pause(ctx, n, by, why)
	case "resume":
		err = book.Resume(ctx, n, by, why)
	case "abort":
		err = book.Abort(ctx, n, by, why)
	case "rollback":
		err = d.c.rollBack(r, n, by, why)
	default:
		err = &admin.Error{Reason: "BadAct", Message: fmt.Sprintf("%q is nothing that can be done to a rollout", in.Act), Fix: "use confirm, pause, resume, abort or rollback"}
	}
	d.c.look()
	return d.c.policyState(n), guardFix(err, in.Policy)
}

// guardFix says what to do about a refusal of the book.
func guardFix(err error, policy string) error {
	switch {
	case errors.Is(err, rollout.ErrPhase):
		return &admin.Error{Reason: "NotNow", Message: err.Error(), Fix: "`hauberk guard rollout status " + policy + "` says what the rollout waits for"}
	case errors.Is(err, rollout.ErrNone):
		return &admin.Error{Reason: "None", Message: err.Error(), Fix: "`hauberk guard status` lists what is in force, on its way and lowered"}
	case errors.Is(err, rollout.ErrInvalid):
		return &admin.Error{Reason: "Invalid", Message: err.Error(), Fix: "give --reason and --for, and the scope that you mean"}
	}
	return err
}

// rollBack puts the content before into force, then makes the object say so
// too. The first is what counts: if the second fails the object is reported as
// rolled back, and is not proposed again until it changes.
func (c *Control) rollBack(r *http.Request, n rollout.Name, by, why string) error {
	object, err := c.liveObject(r, n)
	if err != nil {
		return err
	}
	v, err := c.rollouts.RollBack(r.Context(), n, object, by, why)
	if err != nil {
		return err
	}
	if n.Floor {
		err = kube.Update(r.Context(), c.store, "", n.Name, func(o *v1alpha1.ClusterGuardPolicy) {
			keep := o.Spec.Rollout
			o.Spec = v.Spec
			o.Spec.Rollout = keep
		})
	} else {
		err = kube.Update(r.Context(), c.store, n.Namespace, n.Name, func(o *v1alpha1.GuardPolicy) {
			keep := o.Spec.Rollout
			o.Spec = v.Spec.GuardPolicy
			o.Spec.Rollout = keep
		})
	}
	if kube.NotFound(err) {
		return nil // deleted, and held on to by a workload that names it
	}
	return err
}

func (c *Control) liveObject(r *http.Request, n rollout.Name) (int64, error) {
	var o kube.Object
	var err error
	if n.Floor {
		o, err = kube.Get[v1alpha1.ClusterGuardPolicy](r.Context(), c.store, "", n.Name)
	} else {
		o, err = kube.Get[v1alpha1.GuardPolicy](r.Context(), c.store, n.Namespace, n.Name)
	}
	if kube.NotFound(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return o.GetGeneration(), nil
}

// degrade turns a switch.
func (d *desk) degrade(r *http.Request) (any, error) {
	var in admin.Degrade
	if err := decodeAsk(r, &in); err != nil {
		return nil, err
	}
	if err := d.c.knownTarget(in.Scope, in.Target); err != nil {
		return nil, err
	}
	by, why := who(r, in.By), clip(in.Reason, maxReason)
	var err error
	if in.To == string(rollout.ToFull) {
		err = d.c.rollouts.Restore(r.Context(), rollout.Scope(in.Scope), in.Target, by, why)
	} else {
		until := d.c.now().Add(time.Duration(min(max(in.Seconds, 0), 1<<32)) * time.Second)
		err = d.c.rollouts.Degrade(r.Context(), rollout.Switch{Scope: rollout.Scope(in.Scope), Target: in.Target, To: rollout.To(in.To), By: by, Reason: why, Until: until})
	}
	d.c.look()
	return d.c.guardState().Switches, guardFix(err, "")
}

// knownTarget refuses a switch over nothing: a wrong name must not look like
// one that works.
func (c *Control) knownTarget(scope, target string) error {
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	ok := true
	switch rollout.Scope(scope) {
	case rollout.ScopeInstance:
		_, _, ok = c.instance(target)
	case rollout.ScopeWorkload:
		namespace, name, _ := strings.Cut(target, "/")
		_, ok = w.workloads[key{namespace, name}]
	case rollout.ScopeNode:
		_, ok = w.nodes[target]
	}
	if ok || slices.ContainsFunc(c.rollouts.State().Switches, func(s rollout.Switch) bool { return string(s.Scope) == scope && s.Target == target }) {
		return nil
	}
	return &admin.Error{Reason: "UnknownTarget", Message: fmt.Sprintf("there is no %s %q", scope, target), Fix: "`hauberk ps` lists instances and workloads, `hauberk status` nodes; a workload is namespace/name"}
}

// guardState is what people are shown.
func (c *Control) guardState() admin.GuardState {
	out := admin.GuardState{Policies: []admin.GuardPolicy{}, Switches: []admin.GuardSwitch{}}
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	names := map[rollout.Name]bool{}
	for k := range w.guards {
		names[rollout.Name{Namespace: k.Namespace, Name: k.Name}] = true
	}
	for name := range w.floors {
		names[rollout.Name{Name: name, Floor: true}] = true
	}
	state := c.rollouts.State()
	for _, p := range state.Policies {
		names[p.Name] = true
	}
	for n := range names {
		out.Policies = append(out.Policies, c.policyState(n))
	}
	slices.SortFunc(out.Policies, func(a, b admin.GuardPolicy) int { return strings.Compare(a.Name, b.Name) })
	for _, s := range state.Switches {
		out.Switches = append(out.Switches, shownSwitch(s))
	}
	return out
}

func shownSwitch(s rollout.Switch) admin.GuardSwitch {
	return admin.GuardSwitch{Scope: string(s.Scope), Target: s.Target, To: string(s.To), By: orElse(s.By, "hauberkd"), Reason: s.Reason, Since: s.Since, Until: s.Until}
}

// policyState is one policy as people are shown it.
func (c *Control) policyState(n rollout.Name) admin.GuardPolicy {
	p := c.rollouts.Policy(n)
	c.mu.Lock()
	w, r := c.world, c.refused[n]
	c.mu.Unlock()
	out := admin.GuardPolicy{Name: n.String(), Accepted: r == "", Message: r}
	if p.Current != nil {
		out.Generation, out.Digest, out.Mode = p.Current.Number, p.Current.Digest, orElse(p.Current.Spec.Mode, "enforce")
		out.WouldDeny, _ = c.lessons.wouldHaveDenied(n)
		sel := p.Current.Spec.Select
		if p.Next != nil {
			sel = p.Next.Spec.Select
		}
		out.Eligible, out.Applied = w.applied(n, sel)
		out.Settled = w.settled(n, sel, c.rollouts.State())
	}
	for _, v := range p.Past {
		out.Past = append(out.Past, v.Number)
	}
	if s := p.Stage; s != nil {
		out.Rollout = &admin.GuardRollout{Generation: p.Next.Number, Phase: string(s.Phase), Stage: s.Index + 1, Stages: len(s.Percents),
			Percent: int(s.Percents[s.Index]), Instances: s.Instances, Waiting: len(s.Held), Message: s.Message()}
	}
	return out
}

// settled tells whether every instance was given what the book says now.
func (w world) settled(n rollout.Name, sel spec.GuardSelect, now rollout.State) bool {
	for k, i := range w.instances {
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		of := w.subject(k, i, wl)
		if ok && !i.deleting && rollout.Selects(n, sel, of) && i.guardDigest != guardDigest(w.guard(of, now)) {
			return false
		}
	}
	return true
}

// applied counts the instances a policy holds for, and those whose guest has
// said that it has everything it was given.
func (w world) applied(n rollout.Name, sel spec.GuardSelect) (eligible, applied int) {
	for k, i := range w.instances {
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		if !ok || i.deleting || i.status.Phase != wire.PhaseRunning || !rollout.Selects(n, sel, w.subject(k, i, wl)) {
			continue
		}
		eligible++
		if i.status.Guard.Generation == i.guard && i.status.Guard.Programs > 0 {
			applied++
		}
	}
	return eligible, applied
}
