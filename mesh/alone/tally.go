package alone

import (
	"strings"
	"sync/atomic"
)

// tallies are counters by what they are of, in the order of their functions below. A
// process that takes another's place adds the other's to its own.
type tallies map[string][]uint64

// Kinds of what is counted; a name follows.
const (
	tallyOwn      = "own"
	tallyRoute    = "route "
	tallyListener = "listener "
	tallyEndpoint = "endpoint "
)

func (s *stats) counters() []*atomic.Uint64 {
	return []*atomic.Uint64{&s.badReloads, &s.mirrored, &s.unmirrored, &s.unjudged, &s.untraced, &s.recorded, &s.unrecorded}
}

func (r *routeStats) counters() []*atomic.Uint64 {
	all := []*atomic.Uint64{&r.received, &r.sent, &r.retries, &r.limited, &r.micros}
	for i := range r.statuses {
		all = append(all, &r.statuses[i])
	}
	for i := range r.took {
		all = append(all, &r.took[i])
	}
	return append(all, &r.hedged, &r.hedgesWon, &r.hedgesCancelled)
}

func (l *listener) counters() []*atomic.Uint64 {
	if d := l.udp; d != nil {
		return []*atomic.Uint64{&d.begun, &d.displaced, &d.moved, &d.received, &d.sent, &d.dropped}
	}
	return []*atomic.Uint64{&l.accepted, &l.refused, &l.failed}
}

func (e *endpoint) counters() []*atomic.Uint64 {
	return []*atomic.Uint64{&e.requests, &e.failures, &e.connects}
}

// tally is what was counted so far.
func (p *Proxy) tally() tallies {
	t := tallies{}
	t.take(tallyOwn, p.stats.counters())
	p.stats.mu.Lock()
	t.take(tallyRoute, p.stats.other.counters())
	for name, r := range p.stats.routes {
		t.take(tallyRoute+name, r.counters())
	}
	p.stats.mu.Unlock()
	p.mu.Lock()
	for key, l := range p.listeners {
		t.take(tallyListener+key, l.counters())
	}
	p.mu.Unlock()
	for key, e := range p.world.Load().endpoints {
		t.take(tallyEndpoint+key, e.counters())
	}
	return t
}

func (t tallies) take(key string, counters []*atomic.Uint64) {
	values := make([]uint64, len(counters))
	for i, c := range counters {
		values[i] = c.Load()
	}
	t[key] = values
}

// since is what has been added, without what has not.
func (t tallies) since(before tallies) tallies {
	more := tallies{}
	for key, now := range t {
		then := before[key]
		var values []uint64
		for i, v := range now {
			if i < len(then) {
				v -= then[i]
			}
			if v != 0 && values == nil {
				values = make([]uint64, len(now))
			}
			if v != 0 {
				values[i] = v
			}
		}
		if values != nil {
			more[key] = values
		}
	}
	return more
}

// add counts what another process has counted. What is of a listener or an endpoint
// that is not there is forgotten, as a reload does.
func (p *Proxy) add(t tallies) {
	for key, values := range t {
		counters := p.counters(key)
		for i := range min(len(values), len(counters)) {
			counters[i].Add(values[i])
		}
	}
}

func (p *Proxy) counters(key string) []*atomic.Uint64 {
	if key == tallyOwn {
		return p.stats.counters()
	}
	if key == tallyRoute {
		return p.stats.other.counters()
	}
	if name, ok := strings.CutPrefix(key, tallyRoute); ok {
		return p.stats.route(name).counters()
	}
	if name, ok := strings.CutPrefix(key, tallyListener); ok {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l := p.listeners[name]; l != nil {
			return l.counters()
		}
	}
	if name, ok := strings.CutPrefix(key, tallyEndpoint); ok {
		if e := p.world.Load().endpoints[name]; e != nil {
			return e.counters()
		}
	}
	return nil
}
