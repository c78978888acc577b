// Package contain keeps the book of incidents: what was violated, what was
// revoked because of it, and which enforcement points have confirmed it.
//
// It decides and remembers; it cuts and freezes nothing itself. Every change
// is recorded before it takes effect, and the book is rebuilt from those
// records alone, so there is no second copy of the truth to disagree with.
package contain

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/plan"
)

// Kinds of record the book writes and replays.
const (
	KindIncident = "contain.incident"
	KindReceipt  = "contain.receipt"
	KindRevoke   = "contain.revoke"
	KindClose    = "contain.close"
)

// Recorder writes a record and returns once it is durable. No record, no act.
type Recorder interface {
	Record(ctx context.Context, r Record) error
}

// Record is one change of the book.
type Record struct {
	Kind        string
	Namespace   string
	Application string
	Workload    string
	Instance    string
	Incident    string
	Node        string
	Digest      string // of an image
	Text        string
	Body        json.RawMessage
}

// State of an incident.
type State string

// The states. An incident is contained once every enforcement point it needs
// has given its receipt.
const (
	Containing State = "Containing"
	Contained  State = "Contained"
)

// Incident is a violation and everything done about it.
type Incident struct {
	Name      string         `json:"name"`
	Namespace string         `json:"namespace"`
	Spec      spec.Incident  `json:"spec"`
	Epoch     uint64         `json:"epoch"`
	Needs     []Point        `json:"needs"`
	Receipts  []node.Receipt `json:"-"`
	// Done is when the last receipt was given; zero while containing.
	Done time.Time `json:"-"`
}

// Point is an enforcement point that owes a receipt.
type Point struct {
	Kind string `json:"kind"` // "mesh" or "sandbox"
	Node string `json:"node"`
}

// State tells whether every receipt is in.
func (i Incident) State() State {
	if i.Done.IsZero() {
		return Containing
	}
	return Contained
}

// Elapsed is the time from the violation to the last receipt, or 0.
func (i Incident) Elapsed() time.Duration {
	seen, err := time.Parse(time.RFC3339Nano, i.Spec.Observed)
	if err != nil || i.Done.IsZero() {
		return 0
	}
	return max(0, i.Done.Sub(seen)) // two machines' clocks may differ
}

// ErrUnknown is returned for an epoch that the book never issued.
var ErrUnknown = errors.New("unknown epoch")

// Book is the record of incidents and the current revocation epoch.
type Book struct {
	rec Recorder

	mu        sync.Mutex
	epoch     plan.Epoch
	incidents map[string]*Incident // by name
	open      map[string]*Incident // by name, those that wait for receipts
	byVictim  map[string]*Incident // by instance
	watchers  map[chan struct{}]struct{}
}

// New returns an empty book that writes to rec.
func New(rec Recorder) *Book {
	return &Book{
		rec:       rec,
		incidents: map[string]*Incident{},
		open:      map[string]*Incident{},
		byVictim:  map[string]*Incident{},
		watchers:  map[chan struct{}]struct{}{},
	}
}

// revocation is the body of a KindRevoke record.
type revocation struct {
	Epoch uint64 `json:"epoch"`
	What  string `json:"what"`
	Value string `json:"value"`
}

// Replay applies one record that was written earlier. Records come in the
// order they were written.
func (b *Book) Replay(kind string, body json.RawMessage) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch kind {
	case KindIncident:
		var i Incident
		if err := json.Unmarshal(body, &i); err != nil {
			return fmt.Errorf("replay incident: %w", err)
		}
		b.addLocked(&i)
	case KindReceipt:
		var r node.Receipt
		if err := json.Unmarshal(body, &r); err != nil {
			return fmt.Errorf("replay receipt: %w", err)
		}
		for _, i := range b.owedLocked(r) {
			i.take(r)
			b.settleLocked(i)
		}
	case KindRevoke:
		var r revocation
		if err := json.Unmarshal(body, &r); err != nil {
			return fmt.Errorf("replay revocation: %w", err)
		}
		return b.revokeLocked(r)
	}
	return nil
}

// Open records an incident and revokes its instance. A second violation of an
// instance that already has an incident returns that one and fresh false.
func (b *Book) Open(ctx context.Context, namespace string, s spec.Incident, needs []Point) (i Incident, fresh bool, err error) {
	if s.Instance == "" {
		return Incident{}, false, errors.New("open incident: no instance")
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if old := b.byVictim[s.Instance]; old != nil {
		return old.copy(), false, nil
	}
	next := &Incident{
		Name:      fmt.Sprintf("%s-%d", s.Instance, b.epoch.Number+1),
		Namespace: namespace,
		Spec:      s,
		Epoch:     b.epoch.Number + 1,
		Needs:     slices.Clone(needs),
	}
	body, err := json.Marshal(next)
	if err != nil {
		return Incident{}, false, fmt.Errorf("open incident %s: %w", next.Name, err)
	}
	err = b.rec.Record(ctx, Record{
		Kind: KindIncident, Namespace: namespace, Application: s.Application, Workload: s.Workload,
		Instance: s.Instance, Incident: next.Name, Body: body,
		Text: fmt.Sprintf("%s violation by %s: %s: %s; epoch %d revokes it", s.Cause, s.Instance, s.Rule, s.Detail, next.Epoch),
	})
	if err != nil {
		return Incident{}, false, fmt.Errorf("open incident %s: record: %w", next.Name, err)
	}
	b.addLocked(next)
	b.tellLocked()
	return next.copy(), true, nil
}

// Revoke adds a digest, identity or serial to the epoch.
func (b *Book) Revoke(ctx context.Context, what, value, why string) (uint64, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	r := revocation{Epoch: b.epoch.Number + 1, What: what, Value: value}
	body, err := json.Marshal(r)
	if err != nil {
		return 0, fmt.Errorf("revoke %s %q: %w", what, value, err)
	}
	if _, err := r.list(&plan.Epoch{}); err != nil {
		return 0, err
	}
	err = b.rec.Record(ctx, Record{Kind: KindRevoke, Body: body,
		Text: fmt.Sprintf("epoch %d revokes %s %s: %s", r.Epoch, what, value, why)})
	if err != nil {
		return 0, fmt.Errorf("revoke %s %q: record: %w", what, value, err)
	}
	if err := b.revokeLocked(r); err != nil {
		return 0, err
	}
	b.tellLocked()
	return r.Epoch, nil
}

// Receipt records that an enforcement point has applied an epoch, and returns
// the incidents that are complete with it. Epochs add up, so a receipt counts
// for every incident up to its epoch to which the point still owes one; a
// sandbox answers only for its own instance. A receipt given twice is accepted
// once.
func (b *Book) Receipt(ctx context.Context, r node.Receipt) (complete []Incident, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if r.Epoch > b.epoch.Number {
		return nil, fmt.Errorf("receipt of %s on %s: epoch %d: %w", r.Point, r.Node, r.Epoch, ErrUnknown)
	}
	if r.At.IsZero() {
		return nil, fmt.Errorf("receipt of %s on %s: it does not say when", r.Point, r.Node)
	}
	body, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("receipt of %s on %s: %w", r.Point, r.Node, err)
	}
	for _, in := range b.owedLocked(r) {
		err = b.rec.Record(ctx, Record{
			Kind: KindReceipt, Namespace: in.Namespace, Application: in.Spec.Application, Workload: in.Spec.Workload,
			Instance: in.Spec.Instance, Incident: in.Name, Body: body,
			Text: fmt.Sprintf("%s on %s: %s (epoch %d)", r.Point, r.Node, r.Act, r.Epoch),
		})
		if err != nil {
			return complete, fmt.Errorf("receipt of %s on %s: record: %w", r.Point, r.Node, err)
		}
		in.take(r)
		if b.settleLocked(in) {
			complete = append(complete, in.copy())
		}
	}
	return complete, nil
}

// Epoch returns the current epoch.
func (b *Book) Epoch() plan.Epoch {
	b.mu.Lock()
	defer b.mu.Unlock()
	e := b.epoch
	e.Instances = slices.Clone(e.Instances)
	e.Identities = slices.Clone(e.Identities)
	e.Serials = slices.Clone(e.Serials)
	e.Digests = slices.Clone(e.Digests)
	return e
}

// Incidents returns every incident, oldest first.
func (b *Book) Incidents() []Incident {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]Incident, 0, len(b.incidents))
	for _, i := range slices.SortedFunc(maps.Values(b.incidents), func(x, y *Incident) int { return cmp.Compare(x.Epoch, y.Epoch) }) {
		all = append(all, i.copy())
	}
	return all
}

// Revoked tells whether anything named is revoked, and says which.
func (b *Book) Revoked(instance, identity, serial, digest string) (string, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range []struct {
		list  []string
		what  string
		value string
	}{
		{b.epoch.Instances, "instance", instance},
		{b.epoch.Identities, "identity", identity},
		{b.epoch.Serials, "serial", serial},
		{b.epoch.Digests, "digest", digest},
	} {
		if c.value != "" && slices.Contains(c.list, c.value) {
			return fmt.Sprintf("%s %s is revoked since epoch %d or earlier", c.what, c.value, b.epoch.Number), true
		}
	}
	return "", false
}

// Watch returns a channel that receives after every change, and its stop.
func (b *Book) Watch() (<-chan struct{}, func()) {
	c := make(chan struct{}, 1)
	b.mu.Lock()
	b.watchers[c] = struct{}{}
	b.mu.Unlock()
	return c, func() {
		b.mu.Lock()
		delete(b.watchers, c)
		b.mu.Unlock()
	}
}

func (b *Book) tellLocked() {
	for c := range b.watchers {
		select {
		case c <- struct{}{}:
		default: // a change is already waiting to be seen
		}
	}
}

func (b *Book) addLocked(i *Incident) {
	b.incidents[i.Name] = i
	b.open[i.Name] = i
	b.byVictim[i.Spec.Instance] = i
	b.epoch.Number = max(b.epoch.Number, i.Epoch)
	if !slices.Contains(b.epoch.Instances, i.Spec.Instance) {
		b.epoch.Instances = append(b.epoch.Instances, i.Spec.Instance)
	}
}

// settleLocked says whether the incident is contained, and waits for nothing
// more of it if so.
func (b *Book) settleLocked(i *Incident) bool {
	if i.State() != Contained {
		return false
	}
	delete(b.open, i.Name)
	return true
}

// owedLocked are the incidents that the receipt counts for, oldest first.
func (b *Book) owedLocked(r node.Receipt) []*Incident {
	var owed []*Incident
	for _, i := range b.open {
		if i.owes(r) {
			owed = append(owed, i)
		}
	}
	slices.SortFunc(owed, func(x, y *Incident) int { return cmp.Compare(x.Epoch, y.Epoch) })
	return owed
}

// owes tells whether the incident waits for this very receipt.
func (i *Incident) owes(r node.Receipt) bool {
	return i.Epoch <= r.Epoch && slices.Contains(i.Needs, Point{r.Point, r.Node}) &&
		(r.Point != "sandbox" || r.Instance == i.Spec.Instance) && !i.has(r)
}

// take notes a receipt. The incident is done when the slowest of the points it
// needs was, whichever receipt arrives last.
func (i *Incident) take(r node.Receipt) {
	i.Receipts = append(i.Receipts, r)
	var last time.Time
	for _, p := range i.Needs {
		n := slices.IndexFunc(i.Receipts, func(r node.Receipt) bool { return r.Point == p.Kind && r.Node == p.Node })
		if n < 0 {
			return
		}
		if at := i.Receipts[n].At; at.After(last) {
			last = at
		}
	}
	i.Done = last
}

func (b *Book) revokeLocked(r revocation) error {
	list, err := r.list(&b.epoch)
	if err != nil {
		return err
	}
	if !slices.Contains(*list, r.Value) {
		*list = append(*list, r.Value)
	}
	b.epoch.Number = max(b.epoch.Number, r.Epoch)
	return nil
}

func (r revocation) list(e *plan.Epoch) (*[]string, error) {
	if strings.TrimSpace(r.Value) == "" {
		return nil, fmt.Errorf("revoke %s: empty value", r.What)
	}
	switch r.What {
	case "digest":
		return &e.Digests, nil
	case "identity":
		return &e.Identities, nil
	case "serial":
		return &e.Serials, nil
	}
	return nil, fmt.Errorf("revoke %q: not something that can be revoked: use digest, identity or serial", r.What)
}

func (i *Incident) has(r node.Receipt) bool {
	return slices.ContainsFunc(i.Receipts, func(o node.Receipt) bool { return o.Point == r.Point && o.Node == r.Node })
}

func (i *Incident) copy() Incident {
	c := *i
	c.Needs = slices.Clone(i.Needs)
	c.Receipts = slices.Clone(i.Receipts)
	return c
}
