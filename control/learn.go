package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"hauberk.dev/api/admin"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/api/v1alpha1"
	"hauberk.dev/control/rollout"
	"hauberk.dev/guard"
	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/kube"
	"hauberk.dev/ledger"
)

const (
	// kindPromoted is the ledger's word for a proposal that a person made a policy.
	kindPromoted = "guard.promoted"
	// maxLessons bounds how many instances of a workload are remembered apart. Those
	// that are gone become one.
	maxLessons = 64
	// keepEvery is how often what was learnt is written down at most.
	keepEvery = 5 * time.Second
)

// lessons is what the workloads of policies in learn did, and what policies in
// audit would have denied.
type lessons struct {
	mu        sync.Mutex
	workloads map[key]*lesson
	proposals map[rollout.Name]admin.Proposal
	policies  map[rollout.Name]guard.Proposal
	audited   map[rollout.Name]*audited
}

// lesson is what the instances of a workload did.
type lesson struct {
	Past      guard.Observation            `json:"past"` // of instances, or turns of them, that ended
	Instances map[string]guard.Observation `json:"instances"`

	changed bool // since the proposal was made
	kept    time.Time
	dirty   bool // since it was written down
}

// audited counts, for a content of a policy, the reports of what it would deny.
type audited struct {
	digest string
	count  uint64
}

// wouldDeny counts a report of a policy that only reports. Its name is that in
// NamedGuardPolicy: a floor's says that it is one.
func (l *lessons) wouldDeny(policy, namespace string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := rollout.Name{Namespace: namespace, Name: policy}
	if name, floor := strings.CutPrefix(policy, rollout.Cluster+"/"); floor {
		n = rollout.Name{Name: name, Floor: true}
	}
	if l.audited == nil {
		l.audited = map[rollout.Name]*audited{}
	}
	a := l.audited[n]
	if a == nil && len(l.audited) < maxAudited {
		a = &audited{} // the next round finds out of which content it is
		l.audited[n] = a
	}
	if a != nil {
		a.count++
	}
}

// maxAudited bounds how many policies' reports are counted.
const maxAudited = 4096

// wouldHaveDenied is what status shows of a policy in audit or learn.
func (l *lessons) wouldHaveDenied(n rollout.Name) (count uint64, shown bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.wouldHaveDeniedLocked(n)
}

func (l *lessons) wouldHaveDeniedLocked(n rollout.Name) (count uint64, shown bool) {
	if p, ok := l.policies[n]; ok {
		for _, r := range p.Refuses {
			count += r.Count
		}
		return count, true
	}
	if a := l.audited[n]; a != nil {
		return a.count, true
	}
	return 0, false
}

// learnt takes what a node says that an instance did.
func (d *door) learnt(_ context.Context, node string, in wire.Learnt) (none, error) {
	k, i, ok := d.c.instance(in.Instance)
	if !ok || i.node != node {
		return none{}, &wire.Error{Reason: "UnknownInstance", Message: fmt.Sprintf("learnt of %s: instance %q does not run on it", node, in.Instance)}
	}
	var o guard.Observation
	if err := json.Unmarshal(in.Observation, &o); err != nil {
		return none{}, &wire.Error{Reason: "BadRequest", Message: fmt.Sprintf("learnt of %s: %v", in.Instance, err)}
	}
	d.c.lessons.note(key{k.Namespace, i.workload}, in.Instance, guard.Join(o)) // joined, it is within its bounds
	d.c.look()
	return none{}, nil
}

// note remembers an observation in the place of that before it, unless it began
// after that had ended: then its node began anew.
func (l *lessons) note(workload key, instance string, o guard.Observation) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.workloads == nil {
		l.workloads = map[key]*lesson{}
	}
	at := l.workloads[workload]
	if at == nil {
		at = &lesson{Instances: map[string]guard.Observation{}}
		l.workloads[workload] = at
	}
	if old, known := at.Instances[instance]; known && o.Since.After(old.Since) {
		at.Past = guard.Join(at.Past, old)
	}
	at.Instances[instance] = o
	at.changed, at.dirty = true, true
	for name := range at.Instances {
		if len(at.Instances) <= maxLessons {
			break
		}
		if name != instance {
			at.Past = guard.Join(at.Past, at.Instances[name])
			delete(at.Instances, name)
		}
	}
}

// learns tells whether a content that holds for some instance is in learn.
func learns(p rollout.Policy) bool {
	return p.Current != nil && p.Current.Spec.Mode == "learn" || p.Next != nil && p.Next.Spec.Mode == "learn"
}

// learn makes proposals of what was learnt since the last round, and forgets what
// nobody learns from any more.
func (c *Control) learn(w world) error {
	l := &c.lessons
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.proposals == nil {
		l.proposals, l.policies = map[rollout.Name]admin.Proposal{}, map[rollout.Name]guard.Proposal{}
	}
	if l.audited == nil {
		l.audited = map[rollout.Name]*audited{}
	}
	watched := map[key]bool{}
	var errs []error
	named := map[rollout.Name]bool{}
	for _, p := range w.book.Policies {
		named[p.Name] = true
		l.auditLocked(p)
		if !learns(p) {
			delete(l.proposals, p.Name)
			delete(l.policies, p.Name)
			continue
		}
		of := w.watchedBy(p)
		for _, k := range of {
			watched[k] = true
			errs = append(errs, c.recallLocked(k))
		}
		errs = append(errs, c.proposeLocked(w, p, of))
	}
	maps.DeleteFunc(l.audited, func(n rollout.Name, _ *audited) bool { return !named[n] })
	for n := range l.proposals {
		if !named[n] {
			delete(l.proposals, n)
			delete(l.policies, n)
		}
	}
	for k, at := range l.workloads {
		if watched[k] {
			errs = append(errs, c.keepLocked(k, at))
			continue
		}
		delete(l.workloads, k)
		if err := os.Remove(c.lessonPath(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("forget what was learnt: %w", err))
		}
	}
	for _, at := range l.workloads {
		at.changed = false
	}
	return errors.Join(errs...)
}

// auditLocked counts anew for each content that only reports.
func (l *lessons) auditLocked(p rollout.Policy) {
	if p.Current == nil || p.Current.Spec.Mode != "audit" {
		delete(l.audited, p.Name)
		return
	}
	a := l.audited[p.Name]
	if a == nil || a.digest != "" && a.digest != p.Current.Digest {
		a = &audited{}
		l.audited[p.Name] = a
	}
	a.digest = p.Current.Digest
}

// watchedBy lists the workloads that a policy holds for.
func (w world) watchedBy(p rollout.Policy) (out []key) {
	var sel spec.GuardSelect
	if p.Current != nil {
		sel = p.Current.Spec.Select
	}
	for _, k := range sortedKeys(w.workloads) {
		if rollout.Selects(p.Name, sel, w.subject(key{Namespace: k.Namespace}, instance{workload: k.Name}, w.workloads[k])) {
			out = append(out, k)
		}
	}
	return out
}

func (c *Control) lessonPath(k key) string { return c.path("learnt", k.Namespace+"."+k.Name+".json") }

// recallLocked reads what was learnt of a workload before a restart.
func (c *Control) recallLocked(k key) error {
	if c.lessons.workloads == nil {
		c.lessons.workloads = map[key]*lesson{}
	}
	if at := c.lessons.workloads[k]; at != nil && !at.kept.IsZero() {
		return nil
	}
	old := lesson{Instances: map[string]guard.Observation{}, changed: true, kept: c.now()}
	raw, err := os.ReadFile(c.lessonPath(k))
	if err == nil {
		err = json.Unmarshal(raw, &old)
	}
	if at := c.lessons.workloads[k]; at != nil { // heard of before it was recalled
		for name, o := range at.Instances {
			if before, known := old.Instances[name]; known && o.Since.After(before.Since) {
				old.Past = guard.Join(old.Past, before)
			}
			old.Instances[name] = o
		}
		old.dirty = true
	}
	c.lessons.workloads[k] = &old
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("recall what was learnt of %s: %w", k, err)
	}
	return nil
}

// keepLocked writes down what was learnt of a workload.
func (c *Control) keepLocked(k key, at *lesson) error {
	if !at.dirty || c.now().Sub(at.kept) < keepEvery {
		return nil
	}
	at.dirty, at.kept = false, c.now()
	raw, err := json.Marshal(at)
	if err == nil {
		err = os.MkdirAll(c.path("learnt"), 0o700)
	}
	if err == nil {
		err = atomicfile.Write(c.lessonPath(k), raw, 0o600)
	}
	if err != nil {
		return fmt.Errorf("keep what was learnt of %s: %w", k, err)
	}
	return nil
}

// proposeLocked makes the proposal of a policy, if something new was learnt.
func (c *Control) proposeLocked(w world, p rollout.Policy, of []key) error {
	l := &c.lessons
	base := p.Current
	if base == nil {
		base = p.Next
	}
	_, known := l.proposals[p.Name]
	if known && !slices.ContainsFunc(of, func(k key) bool { return l.workloads[k].changed }) {
		return nil
	}
	out := admin.Proposal{Policy: p.Name.String(), Workloads: []string{}}
	facts := guard.ProposeFacts{Base: base.Spec.GuardPolicy, Services: w.serviceNames(p.Name.Namespace), Digest: c.digests(w, of)}
	var all []guard.Observation
	for _, k := range of {
		at := l.workloads[k]
		out.Workloads = append(out.Workloads, k.String())
		out.Instances += len(at.Instances)
		all = append(all, at.Past)
		for _, name := range sortedNames(at.Instances) {
			all = append(all, at.Instances[name])
		}
		for _, port := range w.workloads[k].spec.Ports {
			facts.Ports = append(facts.Ports, port.Port)
		}
	}
	o := guard.Join(all...)
	proposal := guard.Propose(o, facts)
	raw, err := json.Marshal(proposal)
	if err != nil {
		return fmt.Errorf("propose %s: %w", p.Name, err)
	}
	content, err := json.Marshal(proposal.Spec)
	if err != nil {
		return fmt.Errorf("propose %s: %w", p.Name, err)
	}
	out.Since, out.Until, out.Acts, out.Lost, out.Beyond, out.Denied = o.Since, o.Until, o.Acts, o.Lost, o.Beyond, o.Denied
	out.Digest, out.Proposal = rollout.Digest(content), raw
	l.proposals[p.Name], l.policies[p.Name] = out, proposal
	return nil
}

func sortedNames(m map[string]guard.Observation) (out []string) {
	for n := range m {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

// serviceNames names workloads by address, as policies of a namespace do.
func (w world) serviceNames(namespace string) map[netip.Addr]string {
	out := map[netip.Addr]string{}
	for k, wl := range w.workloads {
		switch {
		case !wl.address.IsValid():
		case k.Namespace == namespace:
			out[wl.address] = k.Name
		default:
			out[wl.address] = k.Name + "." + k.Namespace
		}
	}
	return out
}

// digests finds the digest of a program in the image of a workload that was
// watched.
func (c *Control) digests(w world, of []key) func(path string) string {
	return func(path string) string {
		for k, i := range w.instances {
			if !slices.Contains(of, key{k.Namespace, i.workload}) {
				continue
			}
			if x := c.images(i.repository, i.digest); x != nil {
				if p, ok := x.Program(path); ok {
					return p.SHA256
				}
			}
		}
		return ""
	}
}

// show writes what was learnt, and what would be denied, into a policy's status.
func (l *lessons) show(n rollout.Name, o *v1alpha1.GuardPolicyStatus) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o.WouldDeny, o.Learning = nil, nil
	if count, shown := l.wouldHaveDeniedLocked(n); shown {
		v := int64(count)
		o.WouldDeny = &v
	}
	p, ok := l.proposals[n]
	if !ok || p.Since.IsZero() {
		return // nobody was watched yet
	}
	policy := l.policies[n]
	raw, err := json.Marshal(policy.Spec)
	if err != nil {
		return
	}
	g := &v1alpha1.GuardLearning{Instances: int32(p.Instances), Acts: int64(p.Acts), Whole: p.Lost == 0 && p.Beyond == 0, Digest: p.Digest,
		Evidence: lines(policy.Evidence), Refuses: lines(policy.Refuses), Notes: policy.Notes}
	g.Watched(p.Since, p.Until)
	g.Propose(raw)
	o.Learning = g
}

// lines puts evidence into a line each.
func lines(list []guard.Evidence) (out []string) {
	const most, longest = 512, 1024
	for _, e := range list[:min(len(list), most)] {
		out = append(out, clip(fmt.Sprintf("%s: %s (%d times, first %s, last %s)", e.Field, e.Text, e.Count, e.First.UTC().Format(time.RFC3339), e.Last.UTC().Format(time.RFC3339)), longest))
	}
	return out
}

// proposal is what was learnt under a policy.
func (d *desk) proposal(r *http.Request) (any, error) {
	n, err := d.c.policyName(r.FormValue("policy"))
	if err != nil {
		return nil, err
	}
	return d.c.lessons.proposal(n)
}

func (l *lessons) proposal(n rollout.Name) (admin.Proposal, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	p, ok := l.proposals[n]
	if !ok {
		return p, &admin.Error{Reason: "NotLearning", Message: fmt.Sprintf("guard policy %s is not in learn", n), Fix: "set spec.mode: learn and let the workload run; `hauberk guard status` shows modes"}
	}
	return p, nil
}

// promote makes a proposal the policy: a person's act, recorded, which then goes
// the way of every other change.
func (d *desk) promote(r *http.Request) (any, error) {
	var in admin.Promote
	if err := decodeAsk(r, &in); err != nil {
		return nil, err
	}
	n, err := d.c.policyName(in.Policy)
	if err != nil {
		return nil, err
	}
	p, err := d.c.lessons.proposal(n)
	if err != nil {
		return nil, err
	}
	switch {
	case in.Mode != "enforce" && in.Mode != "audit":
		return nil, &admin.Error{Reason: "BadMode", Message: fmt.Sprintf("mode %q: want enforce or audit", in.Mode), Fix: "leave --mode out to enforce"}
	case in.Digest != p.Digest:
		return nil, &admin.Error{Reason: "Changed", Message: fmt.Sprintf("more was learnt since proposal %.12s was read: it is %.12s now", in.Digest, p.Digest), Fix: "read it again with `hauberk guard propose " + in.Policy + "`"}
	case p.Acts == 0:
		return nil, &admin.Error{Reason: "NothingLearnt", Message: fmt.Sprintf("nothing was seen under %s yet: what it proposes allows nothing", n), Fix: "let the workload work, then propose again"}
	case p.Lost+p.Beyond > 0 && !in.Lossy:
		return nil, &admin.Error{Reason: "Lossy", Message: fmt.Sprintf("%d records were lost and %d acts found no room while %s was learnt: what they told of would be denied", p.Lost, p.Beyond, n), Fix: "promote to --mode audit first, or say --lossy"}
	}
	var proposal guard.Proposal
	if err := json.Unmarshal(p.Proposal, &proposal); err != nil {
		return nil, fmt.Errorf("promote %s: %w", n, err)
	}
	proposal.Spec.Mode = in.Mode
	e := ledger.Entry{Time: d.c.now().UTC(), Kind: kindPromoted, Actor: who(r, in.By), Subject: n.String(), Namespace: n.Namespace, Body: p.Proposal,
		Text: clip(fmt.Sprintf("guard policy %s: %s makes proposal %.12s, learnt from %d acts, the policy, to %s: %s", n, who(r, in.By), p.Digest, p.Acts, in.Mode, in.Reason), maxDetail)}
	if _, err := d.c.log.Append(r.Context(), e); err != nil {
		return nil, fmt.Errorf("record %s: %w", e.Kind, err)
	}
	if err := d.c.writePolicy(r, n, proposal.Spec); err != nil {
		return nil, err
	}
	d.c.look()
	return d.c.policyState(n), nil
}

// writePolicy changes the object of a policy, which keeps how it is rolled out.
func (c *Control) writePolicy(r *http.Request, n rollout.Name, s spec.GuardPolicy) error {
	if n.Floor {
		return kube.Update(r.Context(), c.store, "", n.Name, func(o *v1alpha1.ClusterGuardPolicy) {
			s.Rollout = o.Spec.Rollout
			o.Spec.GuardPolicy = s
		})
	}
	return kube.Update(r.Context(), c.store, n.Namespace, n.Name, func(o *v1alpha1.GuardPolicy) {
		s.Rollout = o.Spec.Rollout
		o.Spec = s
	})
}
