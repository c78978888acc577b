package balance

import (
	"math"
	"math/bits"
	"sort"
	"sync/atomic"
	"time"
)

// below maps 64 random bits to a number below n, without a division (Lemire,
// "Fast random integer generation in an interval", 2019; the bias of one part
// in 2^64/n is left in).
func below(random uint64, n int) int {
	hi, _ := bits.Mul64(random, uint64(n))
	return int(hi)
}

// at is the member into whose part of the weights x falls.
func (l *level) at(x uint64) *member {
	if l.sums == nil {
		return &l.up[below(x, len(l.up))]
	}
	hi, _ := bits.Mul64(x, l.upSum)
	return &l.up[l.index(hi)]
}

// index of the first running sum above x.
func (l *level) index(x uint64) int {
	return sort.Search(len(l.sums), func(i int) bool { return l.sums[i] > x })
}

// two draws two different members by weight, where there are two: power of two
// choices (Mitzenmacher, "The power of two choices in randomized load
// balancing", 2001).
func (l *level) two(s *Set) (a, b *member) {
	n := len(l.up)
	if n == 1 {
		return &l.up[0], &l.up[0]
	}
	x, y := s.random(), s.random()
	if l.sums == nil {
		i, j := below(x, n), below(y, n-1)
		if j >= i {
			j++
		}
		return &l.up[i], &l.up[j]
	}
	first, _ := bits.Mul64(x, l.upSum)
	i := l.index(first)
	own := uint64(l.up[i].weight)
	second, _ := bits.Mul64(y, l.upSum-own)
	if second >= l.sums[i]-own {
		second += own
	}
	return &l.up[i], &l.up[l.index(second)]
}

// idler is the member with fewer requests under way for its weight. Among
// equals it is the nearer, if the policy says so: a busy neighbour gets no more
// than its share, an idle one spares the way.
func idler(a, b *member, p *Policy) *member {
	x, y := a.host.Active()*int64(b.weight), b.host.Active()*int64(a.weight)
	switch {
	case y < x:
		return b
	case x < y:
		return a
	case p.Near == NearOfEquals && a.weight == b.weight && b.distance < a.distance:
		return b
	}
	return a
}

// quicker is the member where a request costs less: its latency times how many
// would then wait for it (Finagle: "Peak EWMA").
func quicker(a, b *member, p *Policy, now Time) *member {
	if a.cost(p, now)/float64(a.weight) > b.cost(p, now)/float64(b.weight) {
		return b
	}
	return a
}

func (m *member) cost(p *Policy, now Time) float64 {
	return m.host.latency.at(now, p.Decay) * float64(m.host.Active()+1)
}

const strideScale = 1<<16 - 1

// roundRobin takes the members in turn, each as often as its weight says and
// evenly spread: the static stride scheduler of gRPC (gRFC A58), which needs
// one counter and no lock.
func (l *level) roundRobin(s *Set, p *Policy, now Time) *Host {
	n := uint64(len(l.up))
	if l.sums == nil && !l.slow {
		return l.up[(s.turn.Add(1)-1)%n].host
	}
	var m *member
	for range 2 * MaxEndpoints { // the heaviest is taken each time it is its turn
		turn := s.turn.Add(1) - 1
		i, round := turn%n, turn/n
		m = &l.up[i]
		w := max(uint64(m.weight)*strideScale/uint64(l.most), 1)
		if l.slow {
			w = max(uint64(float64(w)*m.host.ramp(p, now)), 1)
		}
		if (w*round+i*(strideScale/2))%strideScale >= strideScale-w {
			break
		}
	}
	return m.host
}

// latency is a moving average that jumps to peaks and forgets with time, in one
// word: the average in nanoseconds as a float32 above, the moment in units of
// 2^20 ns below.
type latency struct{ packed atomic.Uint64 }

const latencyTick = 20 // bits

func pack(value float32, stamp uint32) uint64 {
	return uint64(math.Float32bits(value))<<32 | uint64(stamp)
}

func unpack(packed uint64) (value float64, stamp uint32) {
	return float64(math.Float32frombits(uint32(packed >> 32))), uint32(packed)
}

func (l *latency) set(now Time, d time.Duration) {
	l.packed.Store(pack(float32(d), uint32(now>>latencyTick)))
}

// kept is the weight of what was known at stamp.
func kept(stamp, now uint32, decay time.Duration) float64 {
	passed := int32(now - stamp) // another processor may be ahead
	if passed <= 0 {
		return 1
	}
	return math.Exp(-float64(int64(passed)<<latencyTick) / float64(decay))
}

// at is the average as it has decayed until now: one that was slow is asked
// again after a while.
func (l *latency) at(now Time, decay time.Duration) float64 {
	value, stamp := unpack(l.packed.Load())
	return value * kept(stamp, uint32(now>>latencyTick), decay)
}

// observe takes one request's time in. A failure may only raise the average: it
// is quick to say no.
func (l *latency) observe(now Time, took, decay time.Duration, failed bool) {
	stamp := uint32(now >> latencyTick)
	for {
		old := l.packed.Load()
		value, at := unpack(old)
		w := kept(at, stamp, decay)
		one := float64(max(took, 1))
		next := one // a peak
		switch {
		case one > value*w:
		case failed:
			return
		default:
			next = value*w + one*(1-w)
		}
		if int32(stamp-at) < 0 {
			stamp = at
		}
		if l.packed.CompareAndSwap(old, pack(float32(next), stamp)) {
			return
		}
	}
}

// firstLatency is assumed where nothing is known.
const firstLatency = 30 * time.Millisecond

// usualLatencyLocked is what a new host begins with: the average of the others,
// so that it is neither flooded nor shunned.
func (s *Set) usualLatencyLocked(now Time) time.Duration {
	if len(s.hosts) == 0 {
		return firstLatency
	}
	p := s.policy.Load()
	var sum float64
	for _, h := range s.hosts {
		sum += h.latency.at(now, p.Decay)
	}
	return time.Duration(sum / float64(len(s.hosts)))
}
