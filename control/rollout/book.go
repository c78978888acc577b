// Package rollout keeps the book of guard policies: which content of each is
// in force, how far a change has gone out and who confirmed it, and who
// lowered what, why and until when.
//
// It decides and remembers; it reads no API and reaches no guest. Every change
// is recorded before it takes effect, and the book is rebuilt from those
// records and from the contents they name by digest.
package rollout

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"hauberk.dev/api/spec"
)

// Kinds of record the book writes and replays.
const (
	KindPolicy  = "guard.policy"
	KindDegrade = "guard.degrade"
)

// Recorder writes a record and returns once it is durable. No record, no act.
type Recorder interface {
	Record(ctx context.Context, r Record) error
}

// Contents keeps what is too large for a record, by its digest.
type Contents interface {
	Put(digest string, content []byte) error
	Read(digest string) ([]byte, error)
}

// Record is one change of the book.
type Record struct {
	Kind string
	// By is who caused it; empty means the control plane itself.
	By string
	// Policy, Namespace, Workload, Instance and Node say what it is about.
	Policy, Namespace, Workload, Instance, Node string
	Text                                        string
	Body                                        json.RawMessage
}

// Cluster is in place of a namespace in the name of a cluster's policy.
const Cluster = "cluster"

// Name of a policy: its namespace, or Cluster, and its own.
type Name struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
	// Floor is true of a ClusterGuardPolicy. A namespace may be called cluster.
	Floor bool `json:"floor,omitempty"`
}

// String is how verdicts and people name the policy.
func (n Name) String() string {
	if n.Floor {
		return Cluster + "/" + n.Name
	}
	return n.Namespace + "/" + n.Name
}

// Version is one content of a policy.
type Version struct {
	// Number counts the contents of a policy and never goes back.
	Number uint64 `json:"number"`
	// Object is the generation of the API's object that brought it.
	Object int64     `json:"object"`
	Digest string    `json:"digest"`
	At     time.Time `json:"at"`

	Spec spec.ClusterGuardPolicy `json:"-"`
}

// keepVersions bounds what can be rolled back to.
const keepVersions = 16

// Policy is what the book knows of one policy.
type Policy struct {
	Name Name
	// Current is in force wherever Next is not; nil before the first content.
	Current *Version
	// Next is going out, as Stage says; nil if nothing is.
	Next  *Version
	Stage *Stage
	// Past are the contents that were in force before, the newest first.
	Past []Version
	// Last is the highest number given.
	Last uint64
	// Rejected is the generation of the object whose content was aborted or
	// rolled back, and is not proposed again. 0 is none.
	Rejected int64
}

// ErrNone means that there is nothing of the kind that was asked for.
var ErrNone = errors.New("there is none")

// Book is the record of policies and switches.
type Book struct {
	rec      Recorder
	contents Contents
	now      func() time.Time

	mu       sync.Mutex
	policies map[Name]*Policy
	switches map[string]Switch
}

// New returns an empty book.
func New(rec Recorder, contents Contents, now func() time.Time) *Book {
	return &Book{rec: rec, contents: contents, now: now, policies: map[Name]*Policy{}, switches: map[string]Switch{}}
}

// Acts on a policy, as they stand in records.
const (
	actAccept   = "accept"
	actStage    = "stage"
	actComplete = "complete"
	actConfirm  = "confirm"
	actHalt     = "halt"
	actPause    = "pause"
	actResume   = "resume"
	actAbort    = "abort"
	actRollBack = "rollback"
	actForget   = "forget"
)

// change is the body of a KindPolicy record.
type change struct {
	Name     Name     `json:"name"`
	Act      string   `json:"act"`
	By       string   `json:"by,omitempty"`
	Reason   string   `json:"reason,omitempty"`
	Version  *Version `json:"version,omitempty"`
	Stage    *Stage   `json:"stage,omitempty"`
	Rejected int64    `json:"rejected,omitempty"`
}

// Replay applies one record that was written earlier, in the order of writing.
// A content that is lost is not an error: its policy is then proposed anew.
func (b *Book) Replay(kind string, body json.RawMessage) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch kind {
	case KindPolicy:
		var c change
		if err := json.Unmarshal(body, &c); err != nil {
			return fmt.Errorf("replay guard policy: %w", err)
		}
		if c.Version != nil {
			if err := b.load(c.Version); err != nil {
				if p := b.policies[c.Name]; p != nil {
					p.Last = max(p.Last, c.Version.Number)
				} else {
					b.policies[c.Name] = &Policy{Name: c.Name, Last: c.Version.Number}
				}
				return nil
			}
		}
		b.applyLocked(c)
	case KindDegrade:
		var s Switch
		if err := json.Unmarshal(body, &s); err != nil {
			return fmt.Errorf("replay guard switch: %w", err)
		}
		b.setLocked(s)
	}
	return nil
}

func (b *Book) load(v *Version) error {
	raw, err := b.contents.Read(v.Digest)
	if err != nil {
		return err
	}
	if Digest(raw) != v.Digest {
		return fmt.Errorf("content %s of a guard policy is another one", v.Digest)
	}
	return json.Unmarshal(raw, &v.Spec)
}

// Digest names a content.
func Digest(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// Encode is the content of a policy, without how it is rolled out.
func Encode(s spec.ClusterGuardPolicy) (raw []byte, digest string, err error) {
	s.Rollout = nil
	raw, err = json.Marshal(s)
	return raw, Digest(raw), err
}

// applyLocked makes a recorded change true.
func (b *Book) applyLocked(c change) {
	p := b.policies[c.Name]
	if p == nil {
		p = &Policy{Name: c.Name}
		b.policies[c.Name] = p
	}
	if c.Version != nil {
		p.Last = max(p.Last, c.Version.Number)
	}
	switch c.Act {
	case actAccept:
		p.Next, p.Stage, p.Rejected = c.Version, c.Stage, 0
		if c.Stage == nil {
			p.promote()
		}
	case actComplete:
		p.promote()
	case actAbort:
		p.Next, p.Stage, p.Rejected = nil, nil, c.Rejected
	case actRollBack:
		p.Next, p.Stage, p.Rejected = c.Version, nil, c.Rejected
		p.promote()
	case actForget:
		p.Current, p.Next, p.Stage, p.Past, p.Rejected = nil, nil, nil, nil, 0
	default:
		if p.Next != nil {
			p.Stage = c.Stage
		}
	}
}

func (p *Policy) promote() {
	if p.Next == nil {
		return
	}
	if p.Current != nil {
		p.Past = slices.Insert(p.Past, 0, *p.Current)
		p.Past = p.Past[:min(len(p.Past), keepVersions)]
	}
	p.Current, p.Next, p.Stage = p.Next, nil, nil
}

// copy is safe to read without the lock: what a version and a stage point to
// is never changed, only replaced.
func (p *Policy) copy() Policy {
	c := *p
	c.Past = slices.Clone(p.Past)
	return c
}

// Policy returns what is known of a policy; a zero Last means nothing.
func (b *Book) Policy(n Name) Policy {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.policies[n]; p != nil {
		return p.copy()
	}
	return Policy{Name: n}
}

// State is the book at one moment.
type State struct {
	Policies []Policy
	Switches []Switch
}

// State returns a copy of the book that never changes, ordered by name.
// Switches that have expired are not in it.
func (b *Book) State() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	var s State
	for _, n := range slices.SortedFunc(maps.Keys(b.policies), func(x, y Name) int { return strings.Compare(x.String(), y.String()) }) {
		if p := b.policies[n]; p.Current != nil || p.Next != nil {
			s.Policies = append(s.Policies, p.copy())
		}
	}
	for _, id := range slices.Sorted(maps.Keys(b.switches)) {
		if sw := b.switches[id]; b.now().Before(sw.Until) {
			s.Switches = append(s.Switches, sw)
		}
	}
	return s
}

// do records a change, then makes it true.
func (b *Book) do(ctx context.Context, c change, text string) error {
	body, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("%s guard policy %s: %w", c.Act, c.Name, err)
	}
	r := Record{Kind: KindPolicy, By: c.By, Policy: c.Name.String(), Namespace: c.Name.Namespace, Text: text, Body: body}
	if c.Name.Floor {
		r.Namespace = Cluster
	}
	if err := b.rec.Record(ctx, r); err != nil {
		return fmt.Errorf("%s guard policy %s: %w", c.Act, c.Name, err)
	}
	b.applyLocked(c)
	return nil
}

// Accept takes a content that has passed the pre-check. With no stages it is in
// force at once, else it goes out to the first stage.
func (b *Book) Accept(ctx context.Context, n Name, object int64, s spec.ClusterGuardPolicy, plan Plan) (Version, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	raw, digest, err := Encode(s)
	if err != nil {
		return Version{}, fmt.Errorf("accept guard policy %s: %w", n, err)
	}
	if err := b.contents.Put(digest, raw); err != nil {
		return Version{}, fmt.Errorf("accept guard policy %s: %w", n, err)
	}
	v := Version{Number: b.lastLocked(n) + 1, Object: object, Digest: digest, At: b.now().UTC(), Spec: s}
	v.Spec.Rollout = nil
	c := change{Name: n, Act: actAccept, Version: &v}
	text := fmt.Sprintf("guard policy %s: generation %d (content %.12s) passed the pre-check and is in force at once, for %d instances", n, v.Number, digest, len(plan.Instances))
	if len(plan.Stages) > 0 {
		st := plan.first(n, v.Number, b.now().UTC())
		c.Stage = &st
		text = fmt.Sprintf("guard policy %s: generation %d (content %.12s) passed the pre-check; stage 1 of %d gives it to %s", n, v.Number, digest, len(st.Percents), st.words())
	}
	return v, b.do(ctx, c, text)
}

func (b *Book) lastLocked(n Name) uint64 {
	if p := b.policies[n]; p != nil {
		return p.Last
	}
	return 0
}

// Forget drops a policy whose object is gone and for which nothing holds it.
func (b *Book) Forget(ctx context.Context, n Name) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.policies[n]
	if p == nil || p.Current == nil && p.Next == nil {
		return nil
	}
	return b.do(ctx, change{Name: n, Act: actForget}, fmt.Sprintf("guard policy %s was deleted and holds no more", n))
}

// RollBack puts the content that was in force before into force again, at once
// and everywhere, under a new number. A change that is going out is given up.
func (b *Book) RollBack(ctx context.Context, n Name, object int64, by, reason string) (Version, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.policies[n]
	if p == nil || p.Current == nil {
		return Version{}, fmt.Errorf("roll back guard policy %s: nothing of it is in force: %w", n, ErrNone)
	}
	back := *p.Current
	if p.Next == nil {
		i := slices.IndexFunc(p.Past, func(v Version) bool { return v.Digest != p.Current.Digest })
		if i < 0 {
			return Version{}, fmt.Errorf("roll back guard policy %s: an earlier content: %w", n, ErrNone)
		}
		back = p.Past[i]
	}
	v := Version{Number: p.Last + 1, Object: object, Digest: back.Digest, At: b.now().UTC(), Spec: back.Spec}
	text := fmt.Sprintf("guard policy %s: %s rolled it back: generation %d has the content of generation %d and is in force everywhere at once%s", n, by, v.Number, back.Number, because(reason))
	return v, b.do(ctx, change{Name: n, Act: actRollBack, By: by, Reason: reason, Version: &v, Rejected: object}, text)
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

// Act is what a record of a policy says was done.
func Act(r Record) string {
	var c change
	if json.Unmarshal(r.Body, &c) != nil || c.Act == "" {
		return "change"
	}
	return c.Act
}
