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
	since   map[netip.Addr]int // tokens taken since share; nil before it
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
	client = client.Unmap() // else all of IPv4 is one client
	if !l.each {
		client = netip.Addr{}
	} else if client.Is6() {
		p, _ := client.WithZone("").Prefix(64) // one client has as many addresses below as it likes
		client = p.Addr()
	}
	s := l.shard(client)
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
		s.note(client, 1)
	} else {
		wait = time.Duration((1 - t.left) / l.rate * float64(time.Second))
	}
	s.buckets[client] = t
	return ok, wait
}

// note counts tokens in for spent. s is locked.
func (s *limiterShard) note(client netip.Addr, n int) {
	if s.since != nil && (len(s.since) < maxBuckets || s.since[client] > 0) {
		s.since[client] += n
	}
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

// bucket is one that is not full, for another process.
type bucket struct {
	Client netip.Addr `json:"client"` // none: of all
	Left   float64    `json:"left"`
}

// share returns the buckets that are not full. What is taken of them from now on is
// noted for spent.
func (l *limiter) share() (all []bucket) {
	now := time.Now()
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		s.since = map[netip.Addr]int{}
		for client, t := range s.buckets {
			if left := t.left + l.rate*now.Sub(t.at).Seconds(); left < l.burst {
				all = append(all, bucket{client, left})
			}
		}
		s.mu.Unlock()
	}
	return all
}

// spent is what was taken since share, or since the last call; on says whether to go
// on noting.
func (l *limiter) spent(on bool) (all [][]spent) {
	var some []spent
	for i := range l.shards {
		s := &l.shards[i]
		s.mu.Lock()
		since := s.since
		if s.since = nil; on {
			s.since = map[netip.Addr]int{}
		}
		s.mu.Unlock()
		for client, n := range since {
			if some = append(some, spent{client, n}); len(some) == parcelSpent {
				all, some = append(all, some), nil
			}
		}
	}
	if len(some) > 0 {
		all = append(all, some)
	}
	return all
}

// resume takes the buckets of another process on.
func (l *limiter) resume(all []bucket) {
	now := time.Now()
	for _, b := range all {
		s := l.shard(b.Client)
		s.mu.Lock()
		if len(s.buckets) < maxBuckets {
			s.buckets[b.Client] = tokens{min(max(b.Left, -l.burst), l.burst), now}
		}
		s.mu.Unlock()
	}
}

// debit takes what another process has let through. A bucket may owe as much as it
// holds, and no more than fills it from there is told on.
func (l *limiter) debit(all []spent) {
	now := time.Now()
	for _, d := range all {
		s := l.shard(d.Client)
		s.mu.Lock()
		if t, known := s.buckets[d.Client]; known || len(s.buckets) < maxBuckets {
			if !known {
				t = tokens{l.burst, now}
			}
			left := min(l.burst, t.left+l.rate*now.Sub(t.at).Seconds())
			s.buckets[d.Client] = tokens{max(left-float64(d.Requests), -l.burst), now}
		}
		s.note(d.Client, min(d.Requests, int(2*l.burst))) // for a third process
		s.mu.Unlock()
	}
}

func (l *limiter) shard(client netip.Addr) *limiterShard {
	return &l.shards[maphash.Comparable(l.seed, client)%limiterShards]
}
