package balance

import (
	"math"
	"time"
)

// member is a host as one layout sees it.
type member struct {
	host     *Host
	weight   uint32
	distance int
}

// tier is endpoints of equal rank. It does not change with their health.
type tier struct {
	members []member
	weight  uint64
	table   []uint16 // of Maglev, else nil
	ring    []point  // of RingHash, else nil
}

// level is a tier at one moment.
type level struct {
	*tier
	up     []member // who may be picked
	upSum  uint64   // of their weights
	most   uint32   // of their weights
	sums   []uint64 // running sums of their weights; nil when all are equal
	panics bool     // all may be picked, as too few are healthy
	slow   bool     // some are in slow start
	share  uint64   // of the load, in parts of whole
}

// live is who may be picked at one moment. It never changes.
type live struct {
	levels []level
}

// newLive lays out levels and their shares of the load, as Envoy does ("Priority
// levels", "Degraded endpoints" left out): each level is as healthy as its
// healthy weight, times the overprovisioning factor, allows; the first take what
// they can. If all together cannot take the whole, levels with too few healthy
// endpoints panic and use all they have.
func newLive(tiers []*tier, p *Policy, now Time) *live {
	v := &live{levels: make([]level, len(tiers))}
	can := make([]uint64, len(tiers)) // in parts of whole
	few := make([]bool, len(tiers))
	var total uint64
	for i, t := range tiers {
		up := t.upWeight()
		can[i] = min(up*uint64(p.Overprovision)/t.weight, whole)
		if up > 0 {
			can[i] = max(can[i], 1)
		}
		few[i] = up*whole < uint64(p.Panic)*t.weight
		total = min(total+can[i], whole)
	}
	allPanic := total < whole
	for i, t := range tiers {
		l := &v.levels[i]
		l.tier = t
		l.panics = total < whole && !p.FailClosed && few[i]
		allPanic = allPanic && l.panics
		l.fill(p, now)
	}
	shareOut(v.levels, can, total, allPanic)
	return v
}

func (t *tier) upWeight() (up uint64) {
	for _, m := range t.members {
		if m.host.up.Load() {
			up += uint64(m.weight)
		}
	}
	return up
}

// shareOut divides the load: in order while the levels can take it, else in
// proportion; where all panic, by their size.
func shareOut(levels []level, can []uint64, total uint64, allPanic bool) {
	if allPanic {
		var sum uint64
		for i := range levels {
			sum += levels[i].weight
		}
		for i := range levels {
			levels[i].share = levels[i].weight * whole / sum
		}
		return
	}
	left := uint64(whole)
	for i := range levels {
		if total < whole && total > 0 {
			levels[i].share = can[i] * whole / total
			continue
		}
		levels[i].share = min(can[i], left)
		left -= levels[i].share
	}
}

// fill lists who may be picked.
func (l *level) fill(p *Policy, now Time) {
	equal := true
	for _, m := range l.members {
		if !l.panics && !m.host.up.Load() {
			continue
		}
		equal = equal && (len(l.up) == 0 || l.up[0].weight == m.weight)
		l.up = append(l.up, m)
		l.upSum += uint64(m.weight)
		l.most = max(l.most, m.weight)
		l.slow = l.slow || m.host.ramp(p, now) < 1
	}
	if equal {
		return
	}
	var sum uint64
	for _, m := range l.up {
		sum += uint64(m.weight)
		l.sums = append(l.sums, sum)
	}
}

// ramp is the part of its weight that a host has in slow start, 1 after it
// (Envoy: "Slow start mode"): time over window to the power of 1 over
// aggression, and not less than a minimum.
func (h *Host) ramp(p *Policy, now Time) float64 {
	if p.SlowStart == 0 {
		return 1
	}
	at := now.Sub(Time(h.since.Load()))
	if at >= p.SlowStart {
		return 1
	}
	part := float64(max(at, time.Nanosecond)) / float64(p.SlowStart)
	return max(math.Pow(part, 1/p.Aggression), float64(p.SlowStartFloor)/whole)
}

// pick finds a host that takes the request.
func (v *live) pick(s *Set, p *Policy, now Time, r *Request) (*Host, error) {
	if len(v.levels) == 0 {
		return nil, ErrNoEndpoint
	}
	first := v.first(s, p, r)
	full, any := false, false
	for i := -1; i < len(v.levels); i++ {
		at := i // after the level whose turn it is, all others by rank
		if i < 0 {
			at = first
		} else if i == first {
			continue
		}
		l := &v.levels[at]
		any = any || len(l.up) > 0
		h, f := l.pick(s, p, now, r)
		if h != nil {
			return h, nil
		}
		full = full || f
	}
	// Those who are ejected or unhealthy come last, but before nobody.
	if len(r.Tried) > 0 && !p.FailClosed {
		for i := range v.levels {
			h, f := scan(v.levels[i].members, s.random(), p, r)
			if h != nil {
				return h, nil
			}
			full = full || f
		}
	}
	switch {
	case full:
		return nil, ErrOverflow
	case !any:
		return nil, ErrNoHealthy
	}
	return nil, ErrTried
}

// first draws the level whose turn it is.
func (v *live) first(s *Set, p *Policy, r *Request) int {
	if len(v.levels) == 1 {
		return 0
	}
	x := r.Hash
	if !p.hashes() {
		x = s.random()
	}
	at := uint64(below(mix(x), whole))
	for i := range v.levels {
		if at < v.levels[i].share {
			return i
		}
		at -= v.levels[i].share
	}
	for i := range v.levels { // what rounding has left over
		if v.levels[i].share > 0 {
			return i
		}
	}
	return 0
}

// Tries to draw a host before all are looked at in turn.
const (
	draws     = 3
	slowDraws = 32 // where slow start turns draws down
)

// pick draws a host of the level. full says that one was there but had no room.
func (l *level) pick(s *Set, p *Policy, now Time, r *Request) (h *Host, full bool) {
	if len(l.up) == 0 {
		return nil, false
	}
	switch p.Balancer {
	case Maglev:
		return l.maglev(s, p, r)
	case RingHash:
		return l.ringHash(s, p, r)
	}
	tries := draws
	if l.slow {
		tries = slowDraws
	}
	for range tries {
		h := l.draw(s, p, now)
		if h == nil || r.tried(h) {
			continue
		}
		if h.counts.take(Requests, p.EndpointLimits.Requests) {
			return h, false
		}
	}
	return scan(l.up, s.random(), p, r)
}

// draw is one draw, nil if slow start turned it down.
func (l *level) draw(s *Set, p *Policy, now Time) *Host {
	var m *member
	switch p.Balancer {
	case RoundRobin:
		return l.roundRobin(s, p, now)
	case Random:
		m = l.at(s.random())
	case PeakEWMA:
		a, b := l.two(s)
		m = quicker(a, b, p, now)
	default:
		a, b := l.two(s)
		m = idler(a, b, p)
	}
	if l.slow {
		if r := m.host.ramp(p, now); r < 1 && float64(s.random()>>11)/(1<<53) >= r {
			return nil
		}
	}
	return m.host
}

// scan takes the first host with room from a random place on.
func scan(all []member, random uint64, p *Policy, r *Request) (h *Host, full bool) {
	if len(all) == 0 {
		return nil, false
	}
	start := below(random, len(all))
	for i := range all {
		at := start + i
		if at >= len(all) {
			at -= len(all)
		}
		h := all[at].host
		if r.tried(h) {
			continue
		}
		if h.counts.take(Requests, p.EndpointLimits.Requests) {
			return h, false
		}
		full = true
	}
	return nil, full
}
