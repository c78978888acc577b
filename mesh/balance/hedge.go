package balance

import (
	"errors"
	"fmt"
	"math/bits"
	"sync/atomic"
	"time"
)

// Bounds of hedging.
const (
	MaxHedged     = 4   // tries of one request at once, the first included
	hedgeBurst    = 10  // second tries that may come together
	enoughSamples = 100 // before a percentile says anything
	latencyWindow = 10 * time.Second
	freshEvery    = 64 // samples after which the percentile is computed anew
)

// Hedge says when a request that has no answer yet is asked of another endpoint
// too. A field of 0 takes the default. (Dean and Barroso, "The tail at scale":
// hedged requests; gRFC A6.)
type Hedge struct {
	// After is the wait before the second try, or with Percentile the least one.
	After time.Duration
	// Percentile of the time that answers took lately, in per cent: who waits
	// longer asks again. Nobody does before a hundred answers are known, unless
	// After says how long to wait until then.
	Percentile float64
	Tries      int    // at once, with the first; 2
	Percent    uint32 // second tries for a hundred requests, 10
}

// Checked is the hedge with its defaults, or all its faults.
func (h Hedge) Checked() (*Hedge, error) {
	or(&h.Tries, 2)
	or(&h.Percent, 10)
	var f faults
	f.when(h.After == 0 && h.Percentile == 0, "no moment: neither a time nor a percentile")
	f.duration("time before a second try", h.After, 0)
	f.when(!(h.Percentile == 0 || h.Percentile >= 50 && h.Percentile <= 99.9), "percentile %v; want 50 to 99.9", h.Percentile)
	f.when(h.Tries < 2 || h.Tries > MaxHedged, "%d tries at once; want 2 to %d", h.Tries, MaxHedged)
	f.when(h.Percent > whole*(MaxHedged-1), "%d second tries for a hundred requests; want at most %d", h.Percent, whole*(MaxHedged-1))
	if len(f) > 0 {
		return nil, fmt.Errorf("hedge: %w", errors.Join(f...))
	}
	return &h, nil
}

// Hedger decides for the requests of one route. It takes no lock and allocates
// nothing.
type Hedger struct {
	policy Hedge
	room   atomic.Int64 // second tries that may come, in hundredths
	took   latencies
}

// NewHedger makes a hedger of a checked hedge.
func NewHedger(h Hedge) *Hedger {
	x := &Hedger{policy: h}
	x.room.Store(whole)
	return x
}

// Policy is what was checked.
func (x *Hedger) Policy() Hedge { return x.policy }

// Wait counts a request that may be tried twice, and says after which time it
// may. ok is false if nothing tells it yet.
func (x *Hedger) Wait(now Time) (d time.Duration, ok bool) {
	if x.room.Add(int64(x.policy.Percent)) > hedgeBurst*whole {
		x.room.Store(hedgeBurst * whole)
	}
	d = x.policy.After
	if x.policy.Percentile == 0 {
		return d, true
	}
	x.took.turn(now)
	usual := time.Duration(x.took.cut.Load())
	return max(d, usual), d > 0 || usual > 0
}

// Again counts one more try in, unless there were too many for the requests there
// were. The upstream's budget of retries is to be asked too, and first.
func (x *Hedger) Again() bool {
	for {
		n := x.room.Load()
		if n < whole {
			return false
		}
		if x.room.CompareAndSwap(n, n-whole) {
			return true
		}
	}
}

// Took notes how long an answer took; of one that nobody waited for any more, how
// long that was, which is less.
func (x *Hedger) Took(now Time, d time.Duration) {
	if x.policy.Percentile > 0 {
		x.took.add(now, d, x.policy.Percentile)
	}
}

// Buckets of durations: eight to each power of two of 1,024 ns, up to 2^34 of it.
const (
	fineness = 3
	octaves  = 32
	buckets  = octaves << fineness
)

// latencies are those of the last two windows.
type latencies struct {
	due  atomic.Int64  // Time of the end of the window
	now  atomic.Uint32 // which of the two
	n    [2]atomic.Uint32
	seen [2][buckets]atomic.Uint32
	cut  atomic.Int64 // the percentile; 0 is not known
}

func bucketOf(d time.Duration) int {
	v := uint64(max(d, 0)) >> 10
	if v < 1<<fineness {
		return int(v)
	}
	shift := bits.Len64(v) - 1 - fineness
	return min((shift+1)<<fineness|int(v>>shift)&(1<<fineness-1), buckets-1)
}

// top is the longest duration of a bucket.
func top(bucket int) time.Duration {
	if bucket < 1<<fineness {
		return time.Duration(bucket+1)<<10 - 1
	}
	shift := bucket>>fineness - 1
	return time.Duration((1<<fineness|bucket&(1<<fineness-1))+1)<<(10+shift) - 1
}

// turn begins a new window when the time of one is over. What is counted
// meanwhile may be lost.
func (l *latencies) turn(now Time) {
	due := l.due.Load()
	if int64(now) < due || !l.due.CompareAndSwap(due, int64(now.Add(latencyWindow))) {
		return
	}
	next := 1 - l.now.Load()
	l.empty(next)
	if int64(now)-due >= int64(latencyWindow) { // the other is as old
		l.empty(1 - next)
		l.cut.Store(0)
	}
	l.now.Store(next)
}

func (l *latencies) empty(i uint32) {
	l.n[i].Store(0)
	for b := range l.seen[i] {
		l.seen[i][b].Store(0)
	}
}

func (l *latencies) add(now Time, d time.Duration, percentile float64) {
	l.turn(now)
	i := l.now.Load()
	l.seen[i][bucketOf(d)].Add(1)
	if n := l.n[i].Add(1); n%freshEvery == 0 || l.cut.Load() == 0 && n+l.n[1-i].Load() >= enoughSamples {
		l.refresh(percentile)
	}
}

func (l *latencies) refresh(percentile float64) {
	total := uint64(0)
	for b := range buckets {
		total += uint64(l.seen[0][b].Load()) + uint64(l.seen[1][b].Load())
	}
	if total < enoughSamples {
		return
	}
	below := uint64(float64(total) * percentile / whole)
	for b := range buckets {
		n := uint64(l.seen[0][b].Load()) + uint64(l.seen[1][b].Load())
		if n > below {
			l.cut.Store(int64(top(b)))
			return
		}
		below -= n
	}
}
