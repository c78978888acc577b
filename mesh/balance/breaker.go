package balance

import "sync/atomic"

// Kind of what is counted.
type Kind uint8

// What is counted, per endpoint and per service (Envoy: "Circuit breaking").
const (
	Connections Kind = iota // open
	Pending                 // requests that wait for a connection
	Requests                // under way; Pick counts them
	Retries                 // of them, such that are not the first try
	kinds
)

// Limits of what is open at once; 0 is no limit.
type Limits struct {
	Connections, Pending, Requests, Retries int64
}

func (l *Limits) of(k Kind) int64 {
	switch k {
	case Connections:
		return l.Connections
	case Pending:
		return l.Pending
	case Requests:
		return l.Requests
	}
	return l.Retries
}

// counts is what is open.
type counts struct {
	now     [kinds]atomic.Int64
	refused [kinds]atomic.Uint64
}

// take counts one in, unless the limit is reached. It never counts above it,
// not even for a moment: that would refuse a third who has room.
func (c *counts) take(k Kind, limit int64) bool {
	if limit <= 0 {
		c.now[k].Add(1)
		return true
	}
	for {
		n := c.now[k].Load()
		if n >= limit {
			c.refused[k].Add(1)
			return false
		}
		if c.now[k].CompareAndSwap(n, n+1) {
			return true
		}
	}
}

func (c *counts) give(k Kind) { c.now[k].Add(-1) }

// Take counts one of a kind in for the whole service, unless the limit is
// reached. Requests are counted by Pick, and retries by Retry.
func (s *Set) Take(k Kind) bool { return s.counts.take(k, s.policy.Load().Limits.of(k)) }

// Give counts out what Take has counted in.
func (s *Set) Give(k Kind) { s.counts.give(k) }

// TakeAt is Take for one host.
func (s *Set) TakeAt(h *Host, k Kind) bool {
	return h.counts.take(k, s.policy.Load().EndpointLimits.of(k))
}

// GiveAt counts out what TakeAt has counted in.
func (s *Set) GiveAt(h *Host, k Kind) { h.counts.give(k) }

// Open is how many of a kind are open in the service.
func (s *Set) Open(k Kind) int64 { return s.counts.now[k].Load() }

// Refused is how often a limit of the service has refused one of a kind.
func (s *Set) Refused(k Kind) uint64 { return s.counts.refused[k].Load() }

// Retry counts one retry in, unless the budget is spent: a share of the
// requests under way, and never less than a floor (Envoy: "Retry budgets"). A
// service that fails as a whole is not asked twice for everything. EndRetry
// counts it out.
func (s *Set) Retry() bool {
	p := s.policy.Load()
	limit := max(p.Retry.Floor, s.Active()*int64(p.Retry.Percent)/whole)
	if most := p.Limits.Retries; most > 0 {
		limit = min(limit, most)
	}
	if limit <= 0 {
		s.counts.refused[Retries].Add(1)
		return false
	}
	return s.counts.take(Retries, limit)
}

// EndRetry counts a retry out.
func (s *Set) EndRetry() { s.counts.give(Retries) }
