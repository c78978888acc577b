package shim

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"hauberk.dev/guard"
	"hauberk.dev/guard/trail"
)

const (
	// historyName is the file in a pod's bundle that keeps what its Guard told.
	historyName = "events.jsonl"
	// historyLimit bounds it, in bytes.
	historyLimit = 4 << 20
	// heedEvery is how often a guest is asked what became of its records.
	heedEvery = 3 * time.Second
)

// tellings keeps the record of what the Guard of a pod told.
type tellings struct {
	mu      sync.Mutex
	trail   trail.Trail
	history *trail.History
	fresh   bool // something was told since the guest was last asked
}

// record keeps a record of the Guard, and logs what it refused.
func (p *pod) record(raw []byte) {
	e, err := guard.DecodeEvents(raw)
	if err != nil {
		p.log.Error("event of the Guard", "err", err)
		return
	}
	t := &p.told
	t.mu.Lock()
	policy := p.inForce()
	t.fresh, t.trail.Sandbox.ID = true, p.id
	r := t.trail.Record(e, policy, policy.Digest, time.Now())
	p.keepLocked(r)
	t.mu.Unlock()
	if e.Verdict != guard.Allowed {
		p.log.Warn("guard", "event", r.Text, "rule", r.RuleText, "policy", r.Policy, "count", r.Count, "sequence", e.Sequence, "lost", e.Lost)
	}
}

// keepLocked writes to the history, which is made by the first record.
func (p *pod) keepLocked(r trail.Record) {
	t := &p.told
	if t.history == nil {
		h, err := trail.OpenHistory(filepath.Join(p.bundle, historyName), historyLimit)
		if err != nil {
			p.log.Error("keep events of the Guard", "err", err)
			return
		}
		t.history = h
	}
	if err := t.history.Append(r); err != nil {
		p.log.Error("keep events of the Guard", "err", err)
	}
}

// heed asks a machine that told something how often its Guard's records were
// repeated, and keeps what it says was lost. One that is quiet is not asked.
func (p *pod) heed(b *box) {
	tick := time.NewTicker(heedEvery)
	defer tick.Stop()
	for {
		select {
		case <-b.machine.Done():
			return
		case <-tick.C:
		}
		p.told.mu.Lock()
		fresh := p.told.fresh
		p.told.fresh = false
		p.told.mu.Unlock()
		if !fresh {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), agentTime)
		raw, err := b.channel.GuardStatus(ctx)
		cancel()
		if err != nil {
			continue // a machine that is paused, saved or ending
		}
		st, err := guard.DecodeStatus(raw)
		if err != nil {
			p.log.Error("state of the Guard", "err", err)
			continue
		}
		p.told.mu.Lock()
		for _, r := range p.told.trail.Losses(st.Tallies, time.Now()) {
			p.keepLocked(r)
			p.log.Warn("guard", "event", r.Text)
		}
		p.told.mu.Unlock()
	}
}
