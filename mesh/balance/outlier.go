package balance

import (
	"math"
	"time"
)

// Outcome of a request, as far as it tells of the host.
type Outcome uint8

const (
	Success     Outcome = iota
	Failure             // the host answered with an error of its own
	Unreachable         // no connection, a reset, no answer in time
	Cancelled           // the caller went away: nothing is known
)

// Outlier detection (Envoy: "Outlier detection"): a host that fails is left out
// for a while, each time longer. A field of 0 takes the default, except where it
// says off.
type Outlier struct {
	// Failures in a row that eject, of any kind; 0 is off.
	Failures uint32
	// Unreachable is how often in a row a host may not be reached; 0 is off.
	Unreachable uint32
	// Interval at which success rates are compared and old ejections forgotten,
	// one at a time; 10 s.
	Interval time.Duration
	// Deviations below the average success rate that eject; 0 is off. Compared
	// are hosts with at least MinRequests (100) in the interval, if there are at
	// least MinHosts (5) of them.
	Deviations  float64
	MinHosts    int
	MinRequests uint32
	// Ejection is how long the first ejection lasts, 30 s; the nth is n times as
	// long, up to MaxEjection, 300 s.
	Ejection, MaxEjection time.Duration
	// MaxEjected is the share of hosts, in per cent, that may be ejected at once;
	// 10. One always may.
	MaxEjected uint32
}

// report takes an outcome in.
func (s *Set) report(h *Host, now Time, took time.Duration, o Outcome) {
	if o == Cancelled {
		return
	}
	p := s.policy.Load()
	if p.Balancer == PeakEWMA {
		h.latency.observe(now, took, p.Decay, o != Success)
	}
	if p.Outlier == nil {
		return
	}
	if o == Success {
		h.succeeded.Add(1)
		for i := range h.inARow {
			if h.inARow[i].Load() != 0 { // a read is cheaper where all is well
				h.inARow[i].Store(0)
			}
		}
		return
	}
	h.failed.Add(1)
	any, far := h.inARow[0].Add(1), uint32(0)
	if o == Unreachable {
		far = h.inARow[1].Add(1)
	} else {
		h.inARow[1].Store(0) // it has been reached
	}
	if reached(any, p.Outlier.Failures) || reached(far, p.Outlier.Unreachable) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.ejectLocked(p, h, now) {
			s.refreshLocked(now)
		}
	}
}

// reached tells whether the limit is reached, or again: a host that could not be
// ejected then is not asked about at each failure.
func reached(n, limit uint32) bool { return limit > 0 && n > 0 && n%limit == 0 }

// ejectLocked leaves a host out for a while, unless too many are.
func (s *Set) ejectLocked(p *Policy, h *Host, now Time) bool {
	if h.ejected != 0 || p.Outlier == nil {
		return false
	}
	n, here := 0, false
	for _, other := range s.hosts {
		here = here || other == h
		if other.ejected != 0 {
			n++
		}
	}
	if !here || n > 0 && (n+1)*whole > int(p.Outlier.MaxEjected)*len(s.hosts) {
		return false
	}
	h.ejections++
	h.ejected = max(now.Add(p.Outlier.duration(h.ejections)), 1)
	return true
}

// duration of the nth ejection.
func (o *Outlier) duration(n int) time.Duration {
	if int64(n) >= int64(o.MaxEjection/o.Ejection)+1 { // and no overflow
		return o.MaxEjection
	}
	return min(o.Ejection*time.Duration(n), o.MaxEjection)
}

// readmitLocked lets a host back in, with a clean record but for how often.
func (s *Set) readmitLocked(h *Host, now Time) {
	h.ejected = 0
	h.since.Store(int64(now))
	for i := range h.inARow {
		h.inARow[i].Store(0)
	}
}

// sweepLocked does what each interval asks for: ejects by success rate, and
// forgets one ejection of each host that was well.
func (s *Set) sweepLocked(p *Policy, now Time) {
	o := p.Outlier
	if o == nil || now < s.swept.Add(o.Interval) {
		return
	}
	s.swept = now
	for _, h := range s.hosts {
		if h.ejected == 0 && h.ejections > 0 {
			h.ejections--
		}
	}
	rates, hosts := []float64{}, []*Host{}
	for _, h := range s.hosts {
		good, bad := h.succeeded.Swap(0), h.failed.Swap(0)
		if n := good + bad; n >= o.MinRequests && h.ejected == 0 {
			rates, hosts = append(rates, float64(good)/float64(n)), append(hosts, h)
		}
	}
	if o.Deviations == 0 || len(hosts) < o.MinHosts {
		return
	}
	least := threshold(rates, o.Deviations)
	for i, h := range hosts {
		if rates[i] < least {
			s.ejectLocked(p, h, now)
		}
	}
}

// threshold is the average less so many standard deviations.
func threshold(rates []float64, deviations float64) float64 {
	var sum, squares float64
	for _, r := range rates {
		sum += r
	}
	mean := sum / float64(len(rates))
	for _, r := range rates {
		squares += (r - mean) * (r - mean)
	}
	return mean - deviations*math.Sqrt(squares/float64(len(rates)))
}
