package balance

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Rate is so many requests in a time, on average, and so many at once.
type Rate struct {
	Requests int64
	Per      time.Duration
	Burst    int64 // 0 means Requests
}

// maxRate keeps a request's part of the time so long, in nanoseconds, that
// rounding it changes the rate by less than a thousandth.
const maxRate = time.Microsecond

func (r *Rate) check() error {
	or(&r.Burst, r.Requests)
	switch {
	case r.Requests < 1 || r.Per < time.Millisecond || r.Per > maxDuration:
		return fmt.Errorf("rate of %d in %v; want at least 1, in 1ms to %v", r.Requests, r.Per, maxDuration)
	case r.Per/time.Duration(r.Requests) < maxRate:
		return fmt.Errorf("rate of %d in %v; at most one each %v", r.Requests, r.Per, maxRate)
	case r.Burst < 1 || r.Burst > maxLimit || r.Burst > int64(maxDuration/(r.Per/time.Duration(r.Requests))):
		return fmt.Errorf("burst of %d; want 1 to %d, and no more than come in %v", r.Burst, maxLimit, maxDuration)
	}
	return nil
}

// each is a request's part of the time.
func (r *Rate) each() time.Duration {
	return (r.Per + time.Duration(r.Requests)/2) / time.Duration(r.Requests)
}

// Bucket is a token bucket kept as one moment: when it would be full again.
// (ITU-T I.371, annex A: "virtual scheduling"; also called GCRA.) It needs no
// ticker and no lock, and lets exactly so many through whoever asks at once.
type Bucket struct {
	each, depth time.Duration
	full        atomic.Int64 // Time
}

// NewBucket makes a full bucket.
func NewBucket(r Rate) (*Bucket, error) {
	if err := r.check(); err != nil {
		return nil, err
	}
	b := &Bucket{each: r.each(), depth: r.each() * time.Duration(r.Burst)}
	b.full.Store(-1 << 63)
	return b, nil
}

// Take takes n tokens, or none and says when there will be enough; 0 with false
// means never.
func (b *Bucket) Take(now Time, n int64) (ok bool, wait time.Duration) {
	if n < 0 || n > int64(b.depth/b.each) {
		return false, 0
	}
	for {
		old := b.full.Load()
		next := max(Time(old), now).Add(b.each * time.Duration(n))
		if over := next.Sub(now) - b.depth; over > 0 {
			return false, over
		}
		if b.full.CompareAndSwap(old, int64(next)) {
			return true, 0
		}
	}
}

const shards = 64

// Buckets are one bucket for each key, as for each client. They hold a bounded
// number: at the bound, buckets that are full again are forgotten, which changes
// nothing; keys that then find no room share one bucket.
type Buckets struct {
	rate   Rate
	most   int // of one shard
	shards [shards]shard
}

type shard struct {
	mu   sync.Mutex
	keys map[string]*Bucket
	rest *Bucket
}

// NewBuckets makes buckets for at most so many keys, rounded up to the number
// of shards.
func NewBuckets(r Rate, keys int) (*Buckets, error) {
	if keys < 1 || keys > maxLimit {
		return nil, fmt.Errorf("rates for %d keys; want 1 to %d", keys, maxLimit)
	}
	b := &Buckets{rate: r, most: (keys + shards - 1) / shards}
	for i := range b.shards {
		rest, err := NewBucket(r)
		if err != nil {
			return nil, err
		}
		b.shards[i] = shard{keys: map[string]*Bucket{}, rest: rest}
	}
	return b, nil
}

// Take takes n tokens of a key's bucket, as Bucket.Take does.
func (b *Buckets) Take(now Time, key string, n int64) (ok bool, wait time.Duration) {
	return b.shards[Hash(key)%shards].bucket(b, now, key).Take(now, n)
}

func (s *shard) bucket(b *Buckets, now Time, key string) *Bucket {
	s.mu.Lock()
	defer s.mu.Unlock()
	if have := s.keys[key]; have != nil {
		return have
	}
	if len(s.keys) >= b.most {
		for k, have := range s.keys {
			if Time(have.full.Load()) <= now {
				delete(s.keys, k)
			}
		}
	}
	if len(s.keys) >= b.most {
		return s.rest
	}
	fresh := &Bucket{each: s.rest.each, depth: s.rest.depth}
	fresh.full.Store(-1 << 63)
	s.keys[key] = fresh
	return fresh
}
