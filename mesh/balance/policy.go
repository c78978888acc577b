package balance

import (
	"errors"
	"fmt"
	"time"
)

// Balancer is a way to pick.
type Balancer string

// The balancers. Each honours weights, health, priorities and limits.
const (
	LeastRequest Balancer = "least-request" // of two drawn by weight, the one with less under way; the default
	RoundRobin   Balancer = "round-robin"   // in turn, smoothly by weight
	Random       Balancer = "random"        // drawn by weight
	PeakEWMA     Balancer = "peak-ewma"     // of two drawn, the one that is quicker and less busy
	Maglev       Balancer = "maglev"        // by the request's hash, evenly, with little disruption
	RingHash     Balancer = "ring-hash"     // by the request's hash, with the least disruption
)

// Near says what locality changes.
type Near string

// How the nearer of two endpoints is preferred.
const (
	NearOfEquals Near = "equal" // by LeastRequest, if both are equally busy; the default
	NearFirst    Near = "first" // the farther only as far as the nearer are not healthy
	NearIgnored  Near = "ignore"
)

// Bounds of a policy.
const (
	MaxWeight   = 1<<16 - 1
	maxTable    = 1 << 20
	maxPercent  = 1000
	maxDuration = 24 * time.Hour
	maxLimit    = 1 << 30
	maxTries    = 16
)

// Policy says how a set picks, and whom it leaves out. A field of 0 takes the
// default.
type Policy struct {
	Balancer Balancer
	// TableSize of Maglev, a prime, and of RingHash; 65,537. Many times the
	// number of endpoints is needed for an even load.
	TableSize int
	// Bound in per cent of the average load that a hash may give one endpoint, at
	// least 101; 0 is none.
	Bound uint32
	// Locality of the caller.
	Locality string
	Near     Near
	// Overprovision is how much of a level's load its healthy endpoints can take,
	// in per cent of their share; 140.
	Overprovision uint32
	// Panic is the per cent of healthy endpoints below which all are used; 50.
	Panic uint32
	// FailClosed picks no endpoint rather than one that is not healthy.
	FailClosed bool
	// SlowStart is the window in which a new endpoint's weight rises; 0 is none.
	SlowStart      time.Duration
	Aggression     float64 // of the rise; 1 is a straight line
	SlowStartFloor uint32  // per cent of the weight to begin with; 10
	Decay          time.Duration
	Outlier        *Outlier // nil: nobody is ejected
	Check          *Check   // nil: nobody is checked
	Limits         Limits   // of the service
	EndpointLimits Limits   // of each endpoint
	Retry          Retry
}

func (p *Policy) hashes() bool { return p.Balancer == Maglev || p.Balancer == RingHash }

// Checked is the policy with its defaults, or all its faults.
func (p Policy) Checked() (*Policy, error) {
	p.defaults()
	var f faults
	f.when(!isOneOf(p.Balancer, LeastRequest, RoundRobin, Random, PeakEWMA, Maglev, RingHash), "balancer %q", p.Balancer)
	f.when(!isOneOf(p.Near, NearOfEquals, NearFirst, NearIgnored), "near %q", p.Near)
	f.when(p.TableSize < 2 || p.TableSize > maxTable, "table size %d; want 2 to %d", p.TableSize, maxTable)
	f.when(p.Balancer == Maglev && !prime(p.TableSize), "table size %d is not prime", p.TableSize)
	f.when(p.Bound != 0 && (p.Bound <= whole || p.Bound > maxPercent), "bound %d %%; want 0, or 101 to %d", p.Bound, maxPercent)
	f.when(p.Overprovision < whole || p.Overprovision > maxPercent, "overprovision %d %%; want 100 to %d", p.Overprovision, maxPercent)
	f.when(p.Panic > whole, "panic below %d %%; want at most 100", p.Panic)
	f.when(!(p.Aggression >= 0.1 && p.Aggression <= 10), "aggression %v; want 0.1 to 10", p.Aggression)
	f.when(p.SlowStartFloor > whole, "slow start floor %d %%; want at most 100", p.SlowStartFloor)
	f.duration("slow start", p.SlowStart, 0)
	f.duration("decay", p.Decay, time.Millisecond)
	f.limits("", p.Limits)
	f.limits("endpoint ", p.EndpointLimits)
	f.retry(p.Retry)
	if p.Outlier != nil {
		o := p.Outlier.withDefaults()
		f.outlier(o)
		p.Outlier = &o
	}
	if p.Check != nil {
		c := p.Check.withDefaults()
		f.check(c)
		p.Check = &c
	}
	if len(f) > 0 {
		return nil, fmt.Errorf("traffic policy: %w", errors.Join(f...))
	}
	return &p, nil
}

func (p *Policy) defaults() {
	or(&p.Balancer, LeastRequest)
	or(&p.TableSize, DefaultTable)
	or(&p.Near, NearOfEquals)
	or(&p.Overprovision, 140)
	or(&p.Panic, 50)
	or(&p.Aggression, 1)
	or(&p.SlowStartFloor, 10)
	or(&p.Decay, 10*time.Second)
	p.Retry.defaults()
}

func (o Outlier) withDefaults() Outlier {
	or(&o.Interval, 10*time.Second)
	or(&o.MinHosts, 5)
	or(&o.MinRequests, 100)
	or(&o.Ejection, 30*time.Second)
	or(&o.MaxEjection, max(300*time.Second, o.Ejection))
	or(&o.MaxEjected, 10)
	return o
}

func (c Check) withDefaults() Check {
	or(&c.Interval, 5*time.Second)
	or(&c.Timeout, time.Second)
	or(&c.Jitter, 10)
	or(&c.Unhealthy, 3)
	or(&c.Healthy, 2)
	return c
}

// or puts a default in the place of nothing.
func or[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

func isOneOf[T comparable](v T, all ...T) bool {
	for _, one := range all {
		if v == one {
			return true
		}
	}
	return false
}

// faults are what is wrong with a policy.
type faults []error

func (f *faults) when(wrong bool, format string, args ...any) {
	if wrong {
		*f = append(*f, fmt.Errorf(format, args...))
	}
}

func (f *faults) duration(what string, d, least time.Duration) {
	f.when(d < least || d > maxDuration, "%s %v; want %v to %v", what, d, least, maxDuration)
}

func (f *faults) limits(whose string, l Limits) {
	for k, n := range map[string]int64{"connections": l.Connections, "pending": l.Pending, "requests": l.Requests, "retries": l.Retries} {
		f.when(n < 0 || n > maxLimit, "%s%s at most %d; want 0 to %d", whose, k, n, maxLimit)
	}
}

func (f *faults) retry(r Retry) {
	f.when(r.Tries < 1 || r.Tries > maxTries, "%d tries; want 1 to %d", r.Tries, maxTries)
	f.when(r.Percent > whole, "retry budget %d %%; want at most 100", r.Percent)
	f.when(r.Floor < 0 || r.Floor > maxLimit, "retry floor %d; want 0 to %d", r.Floor, maxLimit)
	f.duration("time per try", r.PerTry, 0)
	f.duration("backoff", r.Base, time.Millisecond)
	f.duration("greatest backoff", r.Max, r.Base)
}

func (f *faults) outlier(o Outlier) {
	f.duration("outlier interval", o.Interval, time.Millisecond)
	f.duration("ejection", o.Ejection, time.Millisecond)
	f.duration("greatest ejection", o.MaxEjection, o.Ejection)
	f.when(!(o.Deviations >= 0 && o.Deviations <= 100), "deviations %v; want 0 to 100", o.Deviations)
	f.when(o.MinHosts < 2 || o.MinHosts > MaxEndpoints, "success rates of %d hosts; want 2 to %d", o.MinHosts, MaxEndpoints)
	f.when(o.MaxEjected > whole, "ejected at most %d %%; want at most 100", o.MaxEjected)
}

func (f *faults) check(c Check) {
	f.duration("check interval", c.Interval, time.Millisecond)
	f.duration("check timeout", c.Timeout, time.Millisecond)
	f.when(c.Jitter > whole, "check jitter %d %%; want at most 100", c.Jitter)
}

func prime(n int) bool {
	for d := 2; d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return n > 1
}
