package rollout

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"hauberk.dev/api/spec"
)

// Phase of a stage.
type Phase string

// The phases. Applying ends when every instance of the stage has the change,
// Soaking when it was watched long enough; Waiting, Halted and Paused end by a
// person.
const (
	Applying Phase = "Applying"
	Soaking  Phase = "Soaking"
	Waiting  Phase = "Waiting"
	Halted   Phase = "Halted"
	Paused   Phase = "Paused"
)

// Stage is how far a change has gone out. Its values are never changed, only
// replaced.
type Stage struct {
	Phase    Phase   `json:"phase"`
	Index    int     `json:"index"` // of Percents
	Percents []int32 `json:"percents"`
	// Instances have the change; Held ran when it was accepted and have it not.
	Instances []string `json:"instances"`
	Held      []string `json:"held,omitempty"`
	// Since is when the phase began.
	Since time.Time `json:"since"`
	// Began is when the instances of the stage were given the change.
	Began time.Time     `json:"began"`
	Soak  time.Duration `json:"soak"`
	// Allowed denials a minute, of all Instances together, beyond Before a
	// minute and instance.
	Allowed float64 `json:"allowed"`
	Before  float64 `json:"before"`
	Reason  string  `json:"reason,omitempty"`
}

// Last tells whether no stage follows.
func (s Stage) Last() bool { return s.Index == len(s.Percents)-1 }

// words names the instances of a stage, but not thousands.
func (s Stage) words() string {
	const most = 8
	list := strings.Join(s.Instances[:min(len(s.Instances), most)], ", ")
	if len(s.Instances) > most {
		list += ", ..."
	}
	return fmt.Sprintf("%d of %d instances (%d %%): %s", len(s.Instances), len(s.Instances)+len(s.Held), s.Percents[s.Index], list)
}

// Message says to a person what the rollout waits for.
func (s Stage) Message() string {
	switch s.Phase {
	case Applying:
		return "waiting for the instances of this stage to have the change"
	case Soaking:
		return "watched until " + s.Since.Add(s.Soak).Format(time.RFC3339)
	case Waiting:
		return "a person must confirm this stage: hauberk guard rollout confirm"
	case Paused:
		return "paused by a person" + because(s.Reason)
	}
	return s.Reason
}

// Plan says how a change goes out.
type Plan struct {
	// Stages in percent, rising to 100; none means at once.
	Stages []int32
	Soak   time.Duration
	// Allowed denials a minute beyond Before a minute and instance.
	Allowed, Before float64
	// Instances that run and are to have the change.
	Instances []string
}

// What a policy that says nothing gets.
const (
	defaultSoak    = 300 * time.Second
	defaultAllowed = 5
)

var defaultStages = [...]int32{10, 50, 100}

// NewPlan reads what a policy says of its rollout.
func NewPlan(r *spec.GuardRollout, instances []string, before float64) Plan {
	p := Plan{Stages: defaultStages[:], Soak: defaultSoak, Allowed: defaultAllowed, Before: before, Instances: instances}
	if r != nil {
		if len(r.Stages) > 0 {
			p.Stages = slices.Compact(slices.Sorted(slices.Values(r.Stages)))
		}
		if r.SoakSeconds != nil {
			p.Soak = time.Duration(*r.SoakSeconds) * time.Second
		}
		if r.DenialsPerMinute != nil {
			p.Allowed = float64(*r.DenialsPerMinute)
		}
	}
	if len(instances) <= 1 {
		p.Stages = nil
	}
	return p
}

// first is the stage that a plan begins with. Which instances come first is a
// matter of chance that anybody can repeat.
func (p Plan) first(n Name, number uint64, now time.Time) Stage {
	all := slices.Clone(p.Instances)
	rank := func(instance string) string {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %s", n, number, instance))
		return hex.EncodeToString(sum[:8])
	}
	slices.SortFunc(all, func(a, b string) int { return cmp.Compare(rank(a), rank(b)) })
	s := Stage{Phase: Applying, Percents: p.Stages, Held: all, Since: now, Soak: p.Soak, Allowed: p.Allowed, Before: p.Before}
	return s.take(now)
}

// take gives the change to as many of Held as the stage is for, at least one.
func (s Stage) take(now time.Time) Stage {
	all := len(s.Instances) + len(s.Held)
	want := max(len(s.Instances)+1, (all*int(s.Percents[s.Index])+99)/100)
	if s.Last() {
		want = all
	}
	more := min(len(s.Held), want-len(s.Instances))
	s.Instances = slices.Concat(s.Instances, s.Held[:more])
	s.Held = slices.Clone(s.Held[more:])
	s.Phase, s.Since, s.Began, s.Reason = Applying, now, now, ""
	return s
}

// stageLocked returns the stage of a change that is going out.
func (b *Book) stageLocked(n Name, verb string) (*Policy, Stage, error) {
	p := b.policies[n]
	if p == nil || p.Next == nil || p.Stage == nil {
		return nil, Stage{}, fmt.Errorf("%s rollout of guard policy %s: a change that is going out: %w", verb, n, ErrNone)
	}
	return p, *p.Stage, nil
}

// ErrPhase means that the rollout is not where the act makes sense.
var ErrPhase = errors.New("not now")

// Applied notes that every instance of the stage has the change.
func (b *Book) Applied(ctx context.Context, n Name) error {
	return b.phase(ctx, n, actStage, Soaking, "", "", func(p *Policy, s Stage) (string, error) {
		return fmt.Sprintf("guard policy %s: generation %d is in force in %s; watched for %v", n, p.Next.Number, s.words(), s.Soak), need(s, Applying)
	})
}

// Soaked notes that a stage was watched long enough. The last stage completes
// the rollout, every other waits for a person.
func (b *Book) Soaked(ctx context.Context, n Name) error {
	b.mu.Lock()
	p, s, err := b.stageLocked(n, "go on with")
	if err == nil && s.Last() {
		defer b.mu.Unlock()
		if err := need(s, Soaking); err != nil {
			return err
		}
		return b.do(ctx, change{Name: n, Act: actComplete}, fmt.Sprintf("guard policy %s: generation %d is in force in all %d instances: the rollout is complete", n, p.Next.Number, len(s.Instances)))
	}
	b.mu.Unlock()
	return b.phase(ctx, n, actStage, Waiting, "", "", func(p *Policy, s Stage) (string, error) {
		return fmt.Sprintf("guard policy %s: stage %d of %d of generation %d soaked without anomaly; a person must confirm it", n, s.Index+1, len(s.Percents), p.Next.Number), need(s, Soaking)
	})
}

func need(s Stage, one ...Phase) error {
	if slices.Contains(one, s.Phase) {
		return nil
	}
	return fmt.Errorf("the rollout is %s, not %s: %w", s.Phase, one[0], ErrPhase)
}

// Halt stops a rollout where it is, because of what was seen.
func (b *Book) Halt(ctx context.Context, n Name, reason string) error {
	return b.phase(ctx, n, actHalt, Halted, "", reason, func(p *Policy, s Stage) (string, error) {
		return fmt.Sprintf("guard policy %s: rollout of generation %d halted at stage %d of %d: %s", n, p.Next.Number, s.Index+1, len(s.Percents), reason),
			need(s, Soaking, Applying, Waiting)
	})
}

// Pause stops a rollout because a person says so.
func (b *Book) Pause(ctx context.Context, n Name, by, reason string) error {
	return b.phase(ctx, n, actPause, Paused, by, reason, func(p *Policy, s Stage) (string, error) {
		return fmt.Sprintf("guard policy %s: %s paused the rollout of generation %d at stage %d of %d%s", n, by, p.Next.Number, s.Index+1, len(s.Percents), because(reason)),
			need(s, Soaking, Applying, Waiting)
	})
}

// Resume lets a rollout go on that was halted or paused: its stage is applied
// and watched from the beginning.
func (b *Book) Resume(ctx context.Context, n Name, by, reason string) error {
	return b.phase(ctx, n, actResume, Applying, by, reason, func(p *Policy, s Stage) (string, error) {
		return fmt.Sprintf("guard policy %s: %s resumed the rollout of generation %d at stage %d of %d%s", n, by, p.Next.Number, s.Index+1, len(s.Percents), because(reason)),
			need(s, Halted, Paused)
	})
}

// phase records a new phase of the stage.
func (b *Book) phase(ctx context.Context, n Name, act string, to Phase, by, reason string, check func(*Policy, Stage) (string, error)) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, s, err := b.stageLocked(n, act)
	if err != nil {
		return err
	}
	text, err := check(p, s)
	if err != nil {
		return fmt.Errorf("%s rollout of guard policy %s: %w", act, n, err)
	}
	s.Phase, s.Since, s.Reason = to, b.now().UTC(), reason
	if to == Applying {
		s.Began = s.Since
	}
	return b.do(ctx, change{Name: n, Act: act, By: by, Reason: reason, Stage: &s}, text)
}

// Confirm lets the next stage begin.
func (b *Book) Confirm(ctx context.Context, n Name, by string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, s, err := b.stageLocked(n, actConfirm)
	if err != nil {
		return err
	}
	if err := need(s, Waiting); err != nil {
		if s.Phase == Soaking {
			err = fmt.Errorf("stage %d soaks until %s: %w", s.Index+1, s.Since.Add(s.Soak).Format(time.RFC3339), ErrPhase)
		}
		return fmt.Errorf("confirm rollout of guard policy %s: %w", n, err)
	}
	s.Index++
	s = s.take(b.now().UTC())
	text := fmt.Sprintf("guard policy %s: %s confirmed stage %d of %d of generation %d; stage %d gives it to %s", n, by, s.Index, len(s.Percents), p.Next.Number, s.Index+1, s.words())
	return b.do(ctx, change{Name: n, Act: actConfirm, By: by, Stage: &s}, text)
}

// Abort gives a change up: its instances return to the content in force.
func (b *Book) Abort(ctx context.Context, n Name, by, reason string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, s, err := b.stageLocked(n, actAbort)
	if err != nil {
		return err
	}
	who := by
	if who == "" {
		who = "a newer change"
	}
	back := "what held before"
	if p.Current != nil {
		back = fmt.Sprintf("generation %d", p.Current.Number)
	}
	text := fmt.Sprintf("guard policy %s: %s aborted the rollout of generation %d at stage %d of %d; %d instances return to %s%s", n, who, p.Next.Number, s.Index+1, len(s.Percents), len(s.Instances), back, because(reason))
	return b.do(ctx, change{Name: n, Act: actAbort, By: by, Reason: reason, Rejected: p.Next.Object}, text)
}

// Without is the stage without the instances that are gone, so that nothing
// waits for them.
func (s Stage) Without(gone func(string) bool) Stage {
	s.Instances = slices.DeleteFunc(slices.Clone(s.Instances), gone)
	s.Held = slices.DeleteFunc(slices.Clone(s.Held), gone)
	return s
}
