package node

import (
	"fmt"
	"maps"
	"time"

	api "hauberk.dev/api/mesh"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
)

// What the mesh may have contained: it faces the network, and whoever has taken
// it over shall not be able to stop a whole node at once.
const (
	maxAccused   = 8
	accusedEvery = time.Minute
)

// accuse has an instance contained for what it has sent to one here: at once if
// it runs here, and by the control plane if not. It is false where the event is
// to be told only. Of the proxy's words none decides but the two names, and the
// plan must have said that this victim's callers may be contained.
func (m *meshPart) accuse(e api.Event) bool {
	if _, ok := m.n.find(e.Instance); !ok || e.Offender == "" {
		return false
	}
	if ok, done := m.mayAccuse(e.Instance, e.Offender); !ok || done {
		return ok
	}
	r := wire.Report{Instance: e.Offender, Victim: e.Instance, Severity: spec.SeverityCritical, Cause: "mesh", Rule: "incident: " + e.Rule, Denied: true,
		Detail: fmt.Sprintf("%s from %s to %s %s: %s", e.Peer, e.Source, e.Service, e.Destination, e.Reason), Observed: m.n.now().UTC()}
	if a, ok := m.n.find(e.Offender); ok {
		m.n.violation(a, r)
		return true
	}
	select {
	case m.n.alarms <- r:
	default:
		m.mu.Lock()
		delete(m.accused, e.Offender) // the next event tries again
		m.mu.Unlock()
		m.n.note(fmt.Errorf("report %s: the control plane does not keep up: %s", r.Instance, r.Rule))
		return false
	}
	return true
}

// mayAccuse tells whether the plan makes what is sent to an instance here an
// incident, and not too many were accused of late. done means that this one was.
func (m *meshPart) mayAccuse(victim, offender string) (ok, done bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.plan == nil || !m.incidentsLocked(victim) {
		return false, false
	}
	now := m.n.now()
	maps.DeleteFunc(m.accused, func(_ string, at time.Time) bool { return now.Sub(at) >= accusedEvery })
	if _, done = m.accused[offender]; done {
		return true, true
	}
	if len(m.accused) >= maxAccused {
		return false, false
	}
	if m.accused == nil {
		m.accused = map[string]time.Time{}
	}
	m.accused[offender] = now
	return true, false
}

func (m *meshPart) incidentsLocked(victim string) bool {
	for _, sb := range m.plan.Sandboxes {
		if sb.Instance != victim {
			continue
		}
		for _, s := range m.plan.Services {
			if s.Name == sb.Service && s.Namespace == sb.Namespace {
				return s.Inspect != nil && s.Inspect.Incident > 0
			}
		}
	}
	return false
}
