package balance

import (
	"context"
	"time"
)

// Check says how hosts are asked whether they are well (Envoy: "Health
// checking"). A field of 0 takes the default.
type Check struct {
	Interval  time.Duration // 5 s
	Timeout   time.Duration // 1 s, of one probe
	Jitter    uint32        // per cent of the interval that is added at random; 10
	Unhealthy uint32        // failures in a row after which a host is out; 3
	Healthy   uint32        // successes in a row after which it is back; 2
}

// Health is what the checks of one host have found. The zero value is a host
// that is taken for healthy until it is checked.
type Health struct {
	Unhealthy bool
	known     bool
	inARow    uint32 // results against what is believed
}

// Record takes the result of one check in and tells whether it has changed what
// is believed. The first result is believed at once.
func (h *Health) Record(c *Check, well bool) (changed bool) {
	if well != h.Unhealthy {
		h.inARow, h.known = 0, true
		return false
	}
	h.inARow++
	need := c.Unhealthy
	if well {
		need = c.Healthy
	}
	if h.known && h.inARow < need {
		return false
	}
	h.Unhealthy, h.inARow, h.known = !well, 0, true
	return true
}

// wait is the time to the next check, jittered: proxies that start together do
// not ask together.
func (c *Check) wait(random uint64) time.Duration {
	spread := c.Interval * time.Duration(c.Jitter) / whole
	return c.Interval + time.Duration(below(random, int(spread)+1))
}

// Due returns the hosts to be checked now, each once until Checked is called
// for it, and when to ask again. Without a Check in the policy there are none.
func (s *Set) Due(now Time) (hosts []*Host, next Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	next = never
	if s.policy.Load().Check == nil {
		return nil, next
	}
	for _, h := range s.hosts {
		switch {
		case h.checking:
		case now >= h.nextCheck:
			h.checking = true
			hosts = append(hosts, h)
		default:
			next = min(next, h.nextCheck)
		}
	}
	return hosts, next
}

// Checked takes the result of a check in.
func (s *Set) Checked(now Time, h *Host, well bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h.checking = false
	c := s.policy.Load().Check
	if c == nil {
		return
	}
	h.nextCheck = now.Add(c.wait(s.random()))
	if h.health.Record(c, well) {
		s.refreshLocked(now)
	}
	s.wake()
}

// wake tells RunChecks that there may be something to do sooner.
func (s *Set) wake() {
	select {
	case s.checks <- struct{}{}:
	default:
	}
}

const maxProbes = 32 // of one set, at once

// RunChecks checks the hosts of the set as the policy says, until ctx ends. One
// call for each set.
func (s *Set) RunChecks(ctx context.Context, now func() Time, probe func(context.Context, *Host) error) {
	places := make(chan struct{}, maxProbes)
	defer func() { // all probes have ended
		for range maxProbes {
			places <- struct{}{}
		}
	}()
	for {
		hosts, next := s.Due(now())
		for _, h := range hosts {
			select {
			case places <- struct{}{}:
			case <-ctx.Done():
				return
			}
			go func() {
				defer func() { <-places }()
				s.probe(ctx, now, h, probe)
			}()
		}
		timer := time.NewTimer(next.Sub(now()))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-s.checks:
			timer.Stop()
		case <-timer.C:
		}
	}
}

func (s *Set) probe(ctx context.Context, now func() Time, h *Host, probe func(context.Context, *Host) error) {
	timeout := time.Second
	if c := s.policy.Load().Check; c != nil {
		timeout = c.Timeout
	}
	try, cancel := context.WithTimeout(ctx, timeout)
	err := probe(try, h)
	cancel()
	if ctx.Err() != nil { // the probe was given up, and says nothing
		s.mu.Lock()
		h.checking = false
		s.mu.Unlock()
		return
	}
	s.Checked(now(), h, err == nil)
}
