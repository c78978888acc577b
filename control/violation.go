package control

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/contain"
	"hauberk.dev/evidence"
)

// quietDenial is how long the same denial of an instance is only counted.
const quietDenial = 10 * time.Second

// maxQuiet bounds how many denials are remembered for counting.
const maxQuiet = 4096

// denials counts repeated denials, so that a flood fills no ledger. A critical
// one is never held back: it opens an incident.
type denials struct {
	mu   sync.Mutex
	seen map[string]*repeat
}

type repeat struct {
	since time.Time
	held  int
}

// admit says whether a denial is to be recorded now, and how many equal ones
// were held back before it.
func (d *denials) admit(what string, now time.Time) (held int, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.seen == nil || len(d.seen) >= maxQuiet {
		d.seen = map[string]*repeat{}
	}
	r := d.seen[what]
	if r != nil && now.Sub(r.since) < quietDenial {
		r.held++
		return 0, false
	}
	if r != nil {
		held = r.held
	}
	d.seen[what] = &repeat{since: now}
	return held, true
}

// violation acts on a report of a node: a critical one opens an incident, any
// other is recorded.
func (c *Control) violation(ctx context.Context, node string, r wire.Report) error {
	k, i, ok := c.instance(r.Instance)
	if !ok || i.node != node {
		return &wire.Error{Reason: "UnknownInstance", Message: fmt.Sprintf("report of %s: instance %q does not run on it", node, r.Instance)}
	}
	if r.Severity == spec.SeverityCritical && r.Denied || r.Cause == "bypass" {
		return c.openIncident(ctx, k, i, r)
	}
	held, now := c.denials.admit(r.Instance+"\x00"+r.Rule+"\x00"+r.Detail, c.now())
	if !now {
		return nil
	}
	verb := "refused"
	if !r.Denied {
		verb = "would be refused (audit)"
	}
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

func (c *Control) openIncident(ctx context.Context, k key, i instance, r wire.Report) error {
	nodes, _, _ := c.hub.snapshot()
	needs := []contain.Point{{Kind: "sandbox", Node: i.node}}
	for name, n := range nodes {
		if n.ready {
			needs = append(needs, contain.Point{Kind: "mesh", Node: name})
		}
	}
	slices.SortFunc(needs, func(a, b contain.Point) int { return len(a.Kind+a.Node) - len(b.Kind+b.Node) })
	_, fresh, err := c.book.Open(ctx, k.Namespace, spec.Incident{
		Instance: k.Name, Workload: i.workload, Application: i.application, Node: i.node,
		Identity: i.identity, Cause: r.Cause, Rule: r.Rule, Detail: r.Detail,
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
		return err
	}
	if _, err := c.book.Receipt(ctx, r); err != nil {
		return err
	}
	c.look()
	return nil
}
