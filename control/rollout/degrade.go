package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// Scope of a switch, the narrowest first.
type Scope string

// The scopes.
const (
	ScopeInstance Scope = "instance"
	ScopeWorkload Scope = "workload"
	ScopeNode     Scope = "node"
	ScopeCluster  Scope = "cluster"
)

// To is what a switch lowers policies to, the weakest last.
type To string

// The positions. Quiet only records less of what is allowed and never changes
// what is denied; it is the only one that the control plane takes by itself.
const (
	ToFull  To = "full" // the switch is back
	ToQuiet To = "quiet"
	ToAudit To = "audit"
	ToOff   To = "off"
)

var positions = []To{ToFull, ToQuiet, ToAudit, ToOff}

// Switch lowers policies until it expires.
type Switch struct {
	Scope Scope `json:"scope"`
	// Target is the instance, "namespace/workload" or node; empty for the
	// cluster.
	Target string    `json:"target,omitempty"`
	To     To        `json:"to"`
	By     string    `json:"by,omitempty"` // empty: the control plane itself
	Reason string    `json:"reason"`
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until"`
}

// String names the switch for people.
func (s Switch) String() string {
	who := s.By
	if who == "" {
		who = "hauberkd"
	}
	return fmt.Sprintf("%s: %s by %s until %s: %s", s.subject(), s.To, who, s.Until.UTC().Format(time.RFC3339), s.Reason)
}

func (s Switch) subject() string { return strings.TrimSpace(string(s.Scope) + " " + s.Target) }

// longest is how far ahead a switch may expire.
const longest = 30 * 24 * time.Hour

// check says what is missing from a switch.
func (s Switch) check(now time.Time) error {
	var errs []error
	if !slices.Contains([]Scope{ScopeInstance, ScopeWorkload, ScopeNode, ScopeCluster}, s.Scope) {
		errs = append(errs, fmt.Errorf("scope %q: want instance, workload, node or cluster", s.Scope))
	}
	if (s.Scope == ScopeCluster) != (s.Target == "") {
		errs = append(errs, fmt.Errorf("target %q: the cluster has none, every other scope needs one", s.Target))
	}
	if !slices.Contains(positions[1:], s.To) {
		errs = append(errs, fmt.Errorf("to %q: want quiet, audit or off", s.To))
	}
	if strings.TrimSpace(s.Reason) == "" {
		errs = append(errs, errors.New("reason: missing: say why"))
	}
	if s.By == "" && s.To != ToQuiet {
		errs = append(errs, fmt.Errorf("to %q: only a person lowers what is denied", s.To))
	}
	switch {
	case s.Until.IsZero() || !s.Until.After(now):
		errs = append(errs, errors.New("until: missing or past: say when it ends"))
	case s.Until.Sub(now) > longest:
		errs = append(errs, fmt.Errorf("until: more than %d days ahead: what is needed for longer is a change of the policy", longest/(24*time.Hour)))
	}
	return errors.Join(errs...)
}

// ErrInvalid is a switch that says too little.
var ErrInvalid = errors.New("the switch is not complete")

// Degrade turns a switch. One of the same scope and target is replaced.
func (b *Book) Degrade(ctx context.Context, s Switch) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s.Since, s.Until = b.now().UTC(), s.Until.UTC()
	if err := s.check(s.Since); err != nil {
		return fmt.Errorf("degrade %s: %w: %w", s.subject(), ErrInvalid, err)
	}
	return b.turn(ctx, s, fmt.Sprintf("the Guard of %s", s))
}

// Restore turns a switch back before it expires.
func (b *Book) Restore(ctx context.Context, scope Scope, target, by, reason string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, ok := b.switches[Switch{Scope: scope, Target: target}.subject()]
	if !ok {
		return fmt.Errorf("restore %s: a switch: %w", Switch{Scope: scope, Target: target}.subject(), ErrNone)
	}
	was := s.To
	s.To, s.By, s.Reason, s.Since = ToFull, by, reason, b.now().UTC()
	return b.turn(ctx, s, fmt.Sprintf("the Guard of %s: %s restored it from %s%s", s.subject(), by, was, because(reason)))
}

// Expire turns back what has expired, and says what that was.
func (b *Book) Expire(ctx context.Context) (ended []Switch, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now().UTC()
	for _, s := range b.switches {
		if now.Before(s.Until) {
			continue
		}
		was := s
		s.To, s.By, s.Since = ToFull, "", now
		if err := b.turn(ctx, s, fmt.Sprintf("the Guard of %s: %s expired; its policies hold in full again", s.subject(), was.To)); err != nil {
			return ended, err
		}
		ended = append(ended, was)
	}
	return ended, nil
}

// turn records the position of a switch, then makes it true.
func (b *Book) turn(ctx context.Context, s Switch, text string) error {
	body, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("degrade %s: %w", s.subject(), err)
	}
	r := Record{Kind: KindDegrade, By: s.By, Text: text, Body: body}
	switch s.Scope {
	case ScopeInstance:
		r.Instance = s.Target
	case ScopeWorkload:
		r.Namespace, r.Workload, _ = strings.Cut(s.Target, "/")
	case ScopeNode:
		r.Node = s.Target
	}
	if err := b.rec.Record(ctx, r); err != nil {
		return fmt.Errorf("degrade %s: %w", s.subject(), err)
	}
	b.setLocked(s)
	return nil
}

func (b *Book) setLocked(s Switch) {
	if s.To == ToFull {
		delete(b.switches, s.subject())
		return
	}
	b.switches[s.subject()] = s
}

// Subject is an instance, as policies and switches select it.
type Subject struct {
	Instance, Namespace, Workload, Node string
	Labels                              map[string]string // of the workload
	// Policies of its own namespace that hold for it.
	Policies []string
}

// over tells whether a switch is about the instance.
func (s Switch) over(i Subject) bool {
	switch s.Scope {
	case ScopeInstance:
		return i.Instance != "" && s.Target == i.Instance
	case ScopeWorkload:
		return s.Target == i.Namespace+"/"+i.Workload
	case ScopeNode:
		return i.Node != "" && s.Target == i.Node
	}
	return s.Scope == ScopeCluster
}

// Selects tells whether a policy holds for the workload.
func Selects(n Name, s spec.GuardSelect, i Subject) bool {
	if !n.Floor {
		return n.Namespace == i.Namespace && slices.Contains(i.Policies, n.Name)
	}
	if len(s.Namespaces) > 0 && !slices.Contains(s.Namespaces, i.Namespace) {
		return false
	}
	for k, v := range s.WorkloadLabels {
		if got, ok := i.Labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// Over lists the switches that lower what holds for an instance, of its floors
// or of its own policies.
func (s State) Over(i Subject, floor bool) (out []Switch) {
	for _, sw := range s.Switches {
		if sw.over(i) && (!floor || sw.lowersFloors()) {
			out = append(out, sw)
		}
	}
	return out
}

// lowersFloors: what a person says of the whole cluster, and what changes no
// denial.
func (s Switch) lowersFloors() bool { return s.Scope == ScopeCluster || s.To == ToQuiet }

// version is the content that an instance should have: the change if its stage
// has reached it, else what is in force. Where nothing was in force an instance
// that is new takes the change at once, for it must not start without.
func (p Policy) version(instance string) *Version {
	if p.Next == nil || p.Stage == nil {
		return p.Current
	}
	if slices.Contains(p.Stage.Instances, instance) || p.Current == nil && !slices.Contains(p.Stage.Held, instance) {
		return p.Next
	}
	return p.Current
}

// Has tells whether any content of a policy is in force or going out.
func (s State) Has(n Name) bool {
	return slices.ContainsFunc(s.Policies, func(p Policy) bool { return p.Name == n })
}

// With is the state in which a content is in force, as if it had been accepted,
// and nothing is lowered.
func (s State) With(n Name, content spec.ClusterGuardPolicy) State {
	out := State{Policies: slices.DeleteFunc(slices.Clone(s.Policies), func(p Policy) bool { return p.Name == n })}
	out.Policies = append(out.Policies, Policy{Name: n, Current: &Version{Spec: content}})
	slices.SortFunc(out.Policies, func(a, b Policy) int { return strings.Compare(a.Name.String(), b.Name.String()) })
	return out
}

// baselineName is what package guard calls the policy of a workload that has
// none.
const baselineName = "baseline"

// For returns the policies that an instance should enforce, its own first, and
// the floors behind them, as the switches have lowered them. Only a switch of
// the whole cluster lowers a floor. If nothing is left, baseline is what a
// workload without policies has.
func (s State) For(i Subject, baseline spec.GuardPolicy) (out []wire.NamedGuardPolicy) {
	own, floor := ToFull, ToFull
	for _, sw := range s.Switches {
		if !sw.over(i) {
			continue
		}
		own = weaker(own, sw.To)
		if sw.lowersFloors() {
			floor = weaker(floor, sw.To)
		}
	}
	var floors []wire.NamedGuardPolicy
	for _, p := range s.Policies {
		v := p.version(i.Instance)
		if v == nil || !Selects(p.Name, v.Spec.Select, i) {
			continue
		}
		if p.Name.Floor {
			floors = append(floors, wire.NamedGuardPolicy{Name: p.Name.String(), Spec: v.Spec.GuardPolicy})
		} else {
			out = append(out, wire.NamedGuardPolicy{Name: p.Name.Name, Spec: v.Spec.GuardPolicy})
		}
	}
	if len(i.Policies) == 0 && (len(floors) > 0 || own != ToFull) || len(out) > 0 && onlyWatched(out) {
		// Neither a floor nor watching takes anything away: the baseline holds beside
		// them.
		out = append(out, wire.NamedGuardPolicy{Name: baselineName, Spec: baseline})
	}
	out = append(lower(out, own), lower(floors, floor)...)
	if len(out) == 0 && own == ToOff {
		// No policy at all would mean the baseline.
		out = append(out, wire.NamedGuardPolicy{Name: "degraded", Spec: spec.GuardPolicy{Mode: "audit"}})
	}
	return out
}

// onlyWatched tells whether all policies are in learn.
func onlyWatched(list []wire.NamedGuardPolicy) bool {
	return !slices.ContainsFunc(list, func(p wire.NamedGuardPolicy) bool { return p.Spec.Mode != "learn" })
}

func weaker(a, b To) To {
	if slices.Index(positions, b) > slices.Index(positions, a) {
		return b
	}
	return a
}

// quietAudit is how many records of what is allowed a second remain.
const quietAudit = 1

func lower(list []wire.NamedGuardPolicy, to To) []wire.NamedGuardPolicy {
	switch to {
	case ToOff:
		return nil
	case ToAudit:
		for n := range list {
			if list[n].Spec.Mode != "learn" {
				list[n].Spec.Mode = "audit"
			}
		}
	case ToQuiet:
		for n := range list {
			list[n].Spec.Limits = &spec.GuardLimits{AuditPerSecond: quietAudit}
		}
	}
	return list
}
