package control

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	wire "hauberk.dev/api/node"
	"hauberk.dev/control/rollout"
)

// Above these an instance's Guard records less of what is allowed for a while.
// What is denied is recorded and denied as before.
const (
	auditCeiling = 2000 // records of allowed acts a second
	agentCeiling = 16 << 10
	overBeats    = 2 // heartbeats in a row
	quietTime    = 10 * time.Minute
)

// load is what the Guard of an instance cost lately.
type load struct {
	at      time.Time
	records uint64
	over    int
}

// offload quietens instances whose Guard costs too much.
func (c *Control) offload(ctx context.Context, w world) error {
	var errs []error
	for k, i := range w.instances {
		if !i.observed || i.status.Phase != wire.PhaseRunning {
			continue
		}
		l, why := c.loads[k].next(i.status.Guard)
		if why != "" && len(w.book.Over(rollout.Subject{Instance: k.Name}, true)) == 0 {
			l.over = 0
			errs = append(errs, c.rollouts.Degrade(ctx, rollout.Switch{Scope: rollout.ScopeInstance, Target: k.Name, To: rollout.ToQuiet,
				Reason: why, Until: c.now().Add(quietTime)}))
		}
		c.loads[k] = l
	}
	maps.DeleteFunc(c.loads, func(k key, _ load) bool { _, ok := w.instances[k]; return !ok })
	return errors.Join(errs...)
}

// next takes one more heartbeat, and says what was too much for too long.
func (l load) next(g wire.GuardHeartbeat) (load, string) {
	records := g.AuditSequence + g.AuditLost
	if !g.At.After(l.at) {
		return l, ""
	}
	n := load{at: g.At, records: records, over: l.over + 1}
	rate := 0.0
	if !l.at.IsZero() && records >= l.records {
		rate = float64(records-l.records) / g.At.Sub(l.at).Seconds()
	}
	var why string
	switch {
	case rate > auditCeiling:
		why = fmt.Sprintf("its Guard records %.0f allowed acts a second, more than %d", rate, auditCeiling)
	case g.AgentKiB > agentCeiling:
		why = fmt.Sprintf("its agent has %d KiB of memory, more than %d", g.AgentKiB, agentCeiling)
	default:
		n.over = 0
	}
	if n.over < overBeats {
		why = ""
	}
	return n, why
}
