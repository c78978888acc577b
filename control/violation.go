package control

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

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/contain"
	"hauberk.dev/evidence"
)

// quietDenial is how long the same denial of an instance is only counted.
const quietDenial = 10 * time.Second

// maxDenials bounds how many different denials of one instance are recorded in
// that time. What a denial says is chosen by who is denied.
const maxDenials = 32

// maxQuiet bounds how many instances' denials are counted.
const maxQuiet = 4096

// denials counts repeated denials, so that a flood fills no ledger. A critical
// one is never held back: it opens an incident.
type denials struct {
	mu   sync.Mutex
	seen map[string]*flood
}

// flood is what one instance was denied lately.
type flood struct {
	since time.Time
	what  map[string]bool
	held  int
}

// admit says whether a denial is to be recorded now, and how many of the
// instance were held back before it.
func (d *denials) admit(instance, what string, now time.Time) (held int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := d.seen[instance]
	if f == nil || now.Sub(f.since) >= quietDenial {
		if f != nil {
			held = f.held
		}
		f = d.beginLocked(instance, now)
	} else if f.what[what] || len(f.what) >= maxDenials {
		f.held++
		return 0, false
	}
	f.what[what] = true
	return held, true
}

func (d *denials) beginLocked(instance string, now time.Time) *flood {
	if d.seen == nil {
		d.seen = map[string]*flood{}
	}
	if len(d.seen) >= maxQuiet {
		maps.DeleteFunc(d.seen, func(_ string, f *flood) bool { return now.Sub(f.since) >= quietDenial })
	}
	if len(d.seen) >= maxQuiet {
		clear(d.seen)
	}
	f := &flood{since: now, what: map[string]bool{}}
	d.seen[instance] = f
	return f
}

// violation acts on a report of a node: a critical one opens an incident, any
// other is recorded.
func (c *Control) violation(ctx context.Context, node string, r wire.Report) error {
	k, i, ok := c.instance(r.Instance)
	if r.Victim != "" {
		if err := c.accused(node, r, i, ok); err != nil {
			return err
		}
	} else if !ok || i.node != node {
		return &wire.Error{Reason: "UnknownInstance", Message: fmt.Sprintf("report of %s: instance %q does not run on it", node, r.Instance)}
	}
	c.meter.count(r.Instance, c.now())
	if !r.Denied {
		c.lessons.wouldDeny(r.Policy, k.Namespace)
	}
	if r.Severity == spec.SeverityCritical && r.Denied || r.Cause == "bypass" {
		return c.openIncident(ctx, k, i, r)
	}
	held, now := c.denials.admit(r.Instance, r.Rule+"\x00"+r.Detail, c.now())
	if !now {
		return nil
	}
	verb := "refused"
	if !r.Denied {
		verb = "would be refused (audit)"
	}
	r.Rule, r.Detail = clip(r.Rule, maxRule), clip(r.Detail, maxDetail)
	text := fmt.Sprintf("%s: %s by rule %q: %s", k.Name, verb, r.Rule, r.Detail)
	if held > 0 {
		text += fmt.Sprintf(" (and %d times more before)", held)
	}
	body, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("record denial: %w", err)
	}
	return c.record(ctx, contain.Record{Kind: kindDenial, Namespace: k.Namespace, Application: i.application,
		Workload: i.workload, Instance: k.Name, Text: text, Body: body})
}

// accused checks a report of what an instance, wherever it runs, has sent to one
// on the reporting node. A node may accuse only what a policy of the victim lets
// it: it is not trusted with other nodes' instances otherwise.
func (c *Control) accused(node string, r wire.Report, offender instance, known bool) error {
	k, victim, ok := c.instance(r.Victim)
	if !ok || victim.node != node {
		return &wire.Error{Reason: "UnknownInstance", Message: fmt.Sprintf("report of %s: victim %q does not run on it", node, r.Victim)}
	}
	if !known {
		return &wire.Error{Reason: "UnknownInstance", Message: fmt.Sprintf("report of %s: no instance %q", node, r.Instance)}
	}
	c.mu.Lock()
	w := c.world
	c.mu.Unlock()
	if !w.mayAccuse(k.Namespace, victim.workload) {
		return &wire.Error{Reason: "NotAsked", Message: fmt.Sprintf("report of %s: no AccessPolicy of %q makes what is sent to it an incident", node, victim.workload)}
	}
	if offender.node != node && !c.accusers.admit(node, r.Instance, c.now()) {
		return &wire.Error{Reason: "TooMany", Message: fmt.Sprintf("report of %s: it has accused %d instances of other nodes within a minute", node, maxAccused)}
	}
	return nil
}

// A node has at most so many instances of others contained in that time,
// whatever it says: it may have been taken over. Its own count is of a minute;
// this one is a little shorter, as reports take their time.
const (
	maxAccused  = 8
	accusedTime = 55 * time.Second
)

// accusers remembers whom each node has accused of late.
type accusers struct {
	mu   sync.Mutex
	seen map[string]map[string]time.Time // by node and instance
}

func (a *accusers) admit(node, instance string, now time.Time) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.seen == nil {
		a.seen = map[string]map[string]time.Time{}
	}
	for name, of := range a.seen {
		maps.DeleteFunc(of, func(_ string, at time.Time) bool { return now.Sub(at) >= accusedTime })
		if len(of) == 0 {
			delete(a.seen, name)
		}
	}
	of := a.seen[node]
	if _, again := of[instance]; again {
		return true
	}
	if len(of) >= maxAccused {
		return false
	}
	if of == nil {
		of = map[string]time.Time{}
		a.seen[node] = of
	}
	of[instance] = now
	return true
}

// What an Incident may hold of a node's words, in bytes.
const (
	maxRule   = 4096
	maxDetail = 16384
)

// clip cuts foreign words to what the API and the ledger take.
func clip(s string, most int) string {
	if s = strings.ToValidUTF8(s, "\uFFFD"); len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most-len("…")], "") + "…"
}

// causes are the words an Incident knows; of any other the Guard is the
// nearest.
var causes = []string{"guard", "bypass", "attestation", "person", "mesh"}

func (c *Control) openIncident(ctx context.Context, k key, i instance, r wire.Report) error {
	if !slices.Contains(causes, r.Cause) {
		r.Cause, r.Rule = "guard", r.Cause+": "+r.Rule
	}
	if r.Observed.IsZero() {
		r.Observed = c.now()
	}
	nodes, _, _ := c.hub.snapshot()
	needs := []contain.Point{{Kind: "sandbox", Node: i.node}}
	for name, n := range nodes {
		if n.ready {
			needs = append(needs, contain.Point{Kind: "mesh", Node: name})
		}
	}
	slices.SortFunc(needs, func(a, b contain.Point) int { return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Node, b.Node)) })
	_, fresh, err := c.book.Open(ctx, k.Namespace, spec.Incident{
		Instance: k.Name, Workload: i.workload, Application: i.application, Node: i.node,
		Identity: i.identity, Cause: r.Cause, Rule: clip(r.Rule, maxRule), Detail: clip(r.Detail, maxDetail),
		Observed: r.Observed.UTC().Format(time.RFC3339Nano),
	}, needs)
	if err != nil {
		return err
	}
	if fresh {
		c.look() // the epoch goes out with the next orders, at once
	}
	return nil
}

// receipt records that a node has applied an epoch. The signature is checked
// against the key the node proved on this very connection's certificate.
func (c *Control) receipt(ctx context.Context, node string, r wire.Receipt, keys ...evidence.Key) error {
	if r.Node != node {
		return &wire.Error{Reason: "ForeignReceipt", Message: fmt.Sprintf("receipt of %s: it speaks for node %q", node, r.Node)}
	}
	if err := evidence.VerifyReceipt(r, keys...); err != nil {
		return &wire.Error{Reason: "ReceiptInvalid", Message: err.Error()}
	}
	_, err := c.book.Receipt(ctx, r)
	if errors.Is(err, contain.ErrUnknown) {
		return &wire.Error{Reason: "EpochUnknown", Message: err.Error()}
	}
	if err != nil {
		return err
	}
	c.look()
	return nil
}
