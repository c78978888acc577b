package inspect

import "math/bits"

// Sizes counts sizes by their magnitude: four counters for each power of two,
// so a quantile is at most a fifth too large. The idea is DDSketch's (Masson,
// Rim and Lee, VLDB 12, 2019): buckets whose width grows with the value bound
// the relative error; powers of two with linear parts (as in HdrHistogram) spare
// the logarithm.
type Sizes struct {
	counts [4 * 40]uint32
	total  uint64
	most   int64
}

func sizeBucket(n int64) int {
	if n < 4 {
		return int(max(n, 0))
	}
	e := bits.Len64(uint64(n)) - 1 // n has its highest bit at e
	return min(4*(e-1)+int(n>>(e-2))&3, 4*40-1)
}

// bucketEnd is the largest size that a bucket counts.
func bucketEnd(b int) int64 {
	if b < 4 {
		return int64(b)
	}
	e := b/4 + 1
	return int64(4+b%4+1)<<(e-2) - 1
}

// Add counts one.
func (s *Sizes) Add(n int64) {
	s.counts[sizeBucket(n)]++
	s.total++
	s.most = max(s.most, n)
}

// Quantile is a size that at most the rest of q is larger than.
func (s *Sizes) Quantile(q float64) int64 {
	rank := uint64(q * float64(s.total))
	for b, n := range s.counts {
		if uint64(n) > rank {
			return min(bucketEnd(b), s.most)
		}
		rank -= uint64(n)
	}
	return s.most
}

// average is a mean that forgets, and how far values are from it: Roberts,
// "Control chart tests based on geometric moving averages" (Technometrics 1,
// 1959), with the variance kept as Finch, "Incremental calculation of weighted
// mean and variance" (2009) has it. Until it has seen enough it is a plain mean.
type average struct {
	mean, variance float64
	count          uint32
}

const steady = 64 // values after which old ones fade

func (a *average) add(v float64) {
	if a.count < steady {
		a.count++
	}
	alpha := 1 / float64(a.count)
	d := v - a.mean
	a.mean += alpha * d
	a.variance = (1 - alpha) * (a.variance + alpha*d*d)
}

// distinct estimates how many different things were seen of late: linear
// counting (Whang, Vander-Zanden and Taylor, TODS 15, 1990), here just by the
// bits that are set, which is never too many.
type distinct struct {
	bits [4]uint64
	n    int
}

func (d *distinct) add(h uint64) {
	h ^= h >> 29
	h *= 0x9e3779b97f4a7c15
	i := h >> 56 // one of 256
	if bit := uint64(1) << (i & 63); d.bits[i>>6]&bit == 0 {
		d.bits[i>>6] |= bit
		d.n++
	}
}

func (d *distinct) clear() { *d = distinct{} }
