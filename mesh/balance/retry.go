package balance

import (
	"math/bits"
	"time"
)

// Retry says how often and how soon a request is tried again. A field of 0 takes
// the default.
type Retry struct {
	Tries  int           // with the first; 1
	PerTry time.Duration // for one try; 0 is no bound of its own
	// Base and Max of the wait before a retry: 25 ms, and ten times Base.
	Base, Max time.Duration
	// Percent of the requests under way that may be retries, 20, and the Floor of
	// that, 3.
	Percent uint32
	Floor   int64
}

func (r *Retry) defaults() {
	or(&r.Tries, 1)
	or(&r.Base, 25*time.Millisecond)
	or(&r.Max, max(10*r.Base, r.Base))
	or(&r.Percent, 20)
	or(&r.Floor, 3)
}

// Wait is how long to wait before the nth retry: anything up to Base times 2^n
// less one, and up to Max, so that those who failed together do not come back
// together. (AWS Architecture Blog, "Exponential backoff and jitter": full
// jitter; Envoy: x-envoy-max-retries.)
func (r *Retry) Wait(n int, random uint64) time.Duration {
	top := r.Max
	if n < bits.LeadingZeros64(uint64(r.Base))-1 {
		top = min(r.Base*(1<<max(n, 0)-1), r.Max)
	}
	return time.Duration(below(random, int(max(top, 0))+1))
}

// Until is when a try that begins now has to be over, with the request as a
// whole due at deadline; 0 is no deadline.
func (r *Retry) Until(now, deadline Time) Time {
	if r.PerTry == 0 {
		return deadline
	}
	end := now.Add(r.PerTry)
	if deadline != 0 {
		end = min(end, deadline)
	}
	return end
}
