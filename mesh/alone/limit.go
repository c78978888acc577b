package alone

import (
	"hash/maphash"
	"net/netip"
	"sync"
	"time"
)

// Bounds of the memory of a limiter.
const (
	limiterShards = 16
	maxBuckets    = 4096 // per shard
)

// limiter is a set of token buckets, one for each client or one for all.
type limiter struct {
	rate, burst float64 // per second
	each        bool
	seed        maphash.Seed
	shards      [limiterShards]limiterShard
}

type limiterShard struct {
	mu      sync.Mutex
	buckets map[netip.Addr]tokens
}

type tokens struct {
	left float64
	at   time.Time
}

func newLimiter(c *Rate) *limiter {
	l := &limiter{rate: float64(c.Requests) / time.Duration(c.Per).Seconds(), burst: float64(c.Burst), each: c.By == "client", seed: maphash.MakeSeed()}
	for i := range l.shards {
		l.shards[i].buckets = map[netip.Addr]tokens{}
	}
	return l
}

// allow takes a token of a client's. wait is when there will be one.
func (l *limiter) allow(client netip.Addr, now time.Time) (ok bool, wait time.Duration) {
	if !l.each {
		client = netip.Addr{}
	} else if client.Is6() {
		p, _ := client.WithZone("").Prefix(64) // one client has as many addresses below as it likes
		client = p.Addr()
	}
	s := &l.shards[maphash.Comparable(l.seed, client)%limiterShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	t, known := s.buckets[client]
	if !known {
		if len(s.buckets) >= maxBuckets {
			l.forget(s, now)
		}
		t = tokens{l.burst, now}
	}
	t.left = min(l.burst, t.left+l.rate*now.Sub(t.at).Seconds())
	t.at = now
	if ok = t.left >= 1; ok {
		t.left--
	} else {
		wait = time.Duration((1 - t.left) / l.rate * float64(time.Second))
	}
	s.buckets[client] = t
	return ok, wait
}

// forget drops the buckets that are full again, and if none is, some: memory
// stays bounded whatever the number of clients.
func (l *limiter) forget(s *limiterShard, now time.Time) {
	for k, t := range s.buckets {
		if t.left+l.rate*now.Sub(t.at).Seconds() >= l.burst {
			delete(s.buckets, k)
		}
	}
	for k := range s.buckets {
		if len(s.buckets) < maxBuckets*3/4 {
			return
		}
		delete(s.buckets, k)
	}
}
