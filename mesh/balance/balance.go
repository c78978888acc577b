// Package balance decides where the next request goes, and whether it goes at
// all: load balancing, outlier detection, health checks, circuit breakers,
// retry budgets, rate limits and faults on purpose.
//
// It opens no socket, starts no goroutine and reads no clock: time and
// randomness are arguments, so that every decision can be repeated in a test.
// (RunChecks alone waits, on a context, for whoever asks it to.) A pick takes no
// lock and allocates nothing; endpoints are replaced while picks go on, and what
// is known of those that stay is kept.
//
// What is meant by each word follows Envoy's documentation, named where it
// applies, so that a policy means the same here as there.
package balance

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds.
const (
	MaxEndpoints = 10_000 // of one set
	maxSubsets   = 1_024  // of one set
	maxGone      = 1_024  // endpoints remembered after they left
	goneFor      = 5 * time.Minute
	whole        = 100 // per cent
)

// Time is a moment of a monotonic clock, in nanoseconds since a start that the
// caller chooses: steps of the wall clock do not move it.
type Time int64

// Add returns the moment d after t.
func (t Time) Add(d time.Duration) Time { return t + Time(d) }

// Sub returns how long t is after u.
func (t Time) Sub(u Time) time.Duration { return time.Duration(t - u) }

const never = Time(1<<63 - 1)

// Clock reads the monotonic clock of the process.
type Clock struct{ start time.Time }

// NewClock makes a clock that starts now.
func NewClock() Clock { return Clock{time.Now()} }

// Now is the time since the clock's start.
func (c Clock) Now() Time { return Time(time.Since(c.start)) }

// Why no endpoint is picked.
var (
	ErrNoEndpoint = errors.New("there is no endpoint")
	ErrNoHealthy  = errors.New("no endpoint is healthy")
	ErrTried      = errors.New("every endpoint has been tried")
	ErrOverflow   = errors.New("too many requests at once")
)

// Endpoint is what a plan or a configuration says of one instance.
type Endpoint struct {
	Name     string            // unique in the set; what is known is kept by it
	Weight   uint32            // 0 means 1
	Priority uint8             // 0 is asked first
	Locality string            // from wide to narrow, as "region/zone/node"; may be empty
	Labels   map[string]string // for subsets
	Value    any               // the caller's own
}

// Host is an endpoint and what is known of it. It outlives changes of the set.
type Host struct {
	name      string
	endpoint  atomic.Pointer[Endpoint]
	counts    counts
	latency   latency
	up        atomic.Bool  // neither ejected nor found unhealthy
	since     atomic.Int64 // Time since when it is up, for slow start
	succeeded atomic.Uint32
	failed    atomic.Uint32
	inARow    [2]atomic.Uint32 // failures, and those to reach it

	// Under Set.mu.
	ejected   Time // until then; 0 if it is not
	ejections int  // how often lately
	health    Health
	nextCheck Time
	checking  bool
}

// Endpoint is what was last said of the host.
func (h *Host) Endpoint() *Endpoint { return h.endpoint.Load() }

// Active is how many requests are under way at the host.
func (h *Host) Active() int64 { return h.counts.now[Requests].Load() }

// Up tells whether the host is neither ejected nor found unhealthy.
func (h *Host) Up() bool { return h.up.Load() }

// Set is the endpoints of one service.
type Set struct {
	random func() uint64
	policy atomic.Pointer[Policy]
	counts counts // of the service
	turn   atomic.Uint64
	due    atomic.Int64 // Time of the next change that no one tells of
	all    *Subset

	mu      sync.Mutex
	hosts   []*Host // in the order given
	gone    map[string]departed
	subsets map[string]*Subset
	swept   Time // the last interval of outlier detection
	checks  chan struct{}
}

// departed is a host that has left and may come back.
type departed struct {
	host *Host
	at   Time
}

// New makes a set without endpoints. random is asked for 64 random bits, by
// many goroutines at once.
func New(p Policy, random func() uint64) (*Set, error) {
	if random == nil {
		return nil, errors.New("make set: no source of randomness")
	}
	checked, err := p.Checked()
	if err != nil {
		return nil, err
	}
	s := &Set{random: random, gone: map[string]departed{}, subsets: map[string]*Subset{}, checks: make(chan struct{}, 1)}
	s.policy.Store(checked)
	s.all = &Subset{set: s}
	s.all.live.Store(&live{})
	s.due.Store(int64(never))
	return s, nil
}

// Policy is the policy in force, with its defaults filled in.
func (s *Set) Policy() Policy { return *s.policy.Load() }

// Apply puts another policy in force. What is known of the endpoints stays.
func (s *Set) Apply(now Time, p Policy) error {
	checked, err := p.Checked()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.policy.Store(checked)
	for _, h := range s.hosts {
		h.nextCheck = now // by the new interval, or not at all
		if checked.Check == nil {
			h.health = Health{}
		}
		if checked.Outlier == nil && h.ejected != 0 {
			s.readmitLocked(h, now)
		}
	}
	s.layLocked()
	s.refreshLocked(now)
	s.wake()
	return nil
}

// Replace sets the endpoints. Picks go on meanwhile; what is known of endpoints
// that stay, or come back soon, is kept.
func (s *Set) Replace(now Time, all []Endpoint) error {
	if err := checkEndpoints(all); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	have := make(map[string]*Host, len(s.hosts))
	for _, h := range s.hosts {
		have[h.name] = h
	}
	start := s.usualLatencyLocked(now)
	hosts := make([]*Host, 0, len(all))
	for _, e := range all {
		h := have[e.Name]
		delete(have, e.Name)
		if h == nil {
			h = s.arriveLocked(now, e.Name, start)
		}
		h.endpoint.Store(&e)
		hosts = append(hosts, h)
	}
	s.departLocked(now, have)
	s.hosts = hosts
	s.layLocked()
	s.refreshLocked(now)
	s.wake()
	return nil
}

func checkEndpoints(all []Endpoint) error {
	if len(all) > MaxEndpoints {
		return fmt.Errorf("replace endpoints: %d; at most %d", len(all), MaxEndpoints)
	}
	seen := make(map[string]bool, len(all))
	for _, e := range all {
		switch {
		case e.Name == "":
			return errors.New("replace endpoints: one has no name")
		case seen[e.Name]:
			return fmt.Errorf("replace endpoints: %q is named twice", e.Name)
		case e.Weight > MaxWeight:
			return fmt.Errorf("replace endpoints: weight %d of %q; at most %d", e.Weight, e.Name, MaxWeight)
		}
		seen[e.Name] = true
	}
	return nil
}

// arriveLocked is a host that is new, or back.
func (s *Set) arriveLocked(now Time, name string, latency time.Duration) *Host {
	if d, ok := s.gone[name]; ok {
		delete(s.gone, name)
		d.host.checking = false
		d.host.nextCheck = now
		d.host.since.Store(int64(now))
		return d.host
	}
	h := &Host{name: name, nextCheck: now}
	h.up.Store(true)
	h.since.Store(int64(now))
	h.latency.set(now, latency)
	return h
}

// departLocked remembers those who have left, a bounded number for a bounded
// time: one that comes back must not have forgotten its requests or its faults.
func (s *Set) departLocked(now Time, left map[string]*Host) {
	maps.DeleteFunc(s.gone, func(_ string, d departed) bool { return now.Sub(d.at) > goneFor })
	for name, h := range left {
		if len(s.gone) >= maxGone {
			return
		}
		s.gone[name] = departed{h, now}
	}
}

// Hosts lists the endpoints of the moment, in the order they were given.
func (s *Set) Hosts() []*Host {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.hosts)
}

// Active is how many requests of the set are under way.
func (s *Set) Active() int64 { return s.counts.now[Requests].Load() }

// Request is what a pick may depend on.
type Request struct {
	// Hash of what requests to the same endpoint have in common, for Maglev and
	// RingHash.
	Hash uint64
	// Tried hosts are not picked again.
	Tried []*Host
}

func (r *Request) tried(h *Host) bool {
	for _, t := range r.Tried {
		if t == h {
			return true
		}
	}
	return false
}

// Pick is one request under way at a host. Release it once.
type Pick struct {
	set  *Set
	host *Host
	at   Time
}

// Host that was picked.
func (p Pick) Host() *Host { return p.host }

// Release says that the request is over.
func (p Pick) Release() {
	p.host.counts.give(Requests)
	p.set.counts.give(Requests)
}

// Report says how the request went; Cancelled says nothing about the host. It
// may be called before Release, where an answer is long.
func (p Pick) Report(now Time, o Outcome) { p.set.report(p.host, now, now.Sub(p.at), o) }

// Done is Report and Release.
func (p Pick) Done(now Time, o Outcome) {
	p.Report(now, o)
	p.Release()
}

// Pick picks a host for a request and counts it in.
func (s *Set) Pick(now Time, r Request) (Pick, error) { return s.all.Pick(now, r) }

// PickNamed counts a request in at one host, which the caller has chosen.
func (s *Set) PickNamed(now Time, name string) (Pick, error) {
	p := s.policy.Load()
	for _, l := range s.all.live.Load().levels {
		for _, m := range l.members {
			if m.host.name != name {
				continue
			}
			if !s.counts.take(Requests, p.Limits.Requests) {
				return Pick{}, ErrOverflow
			}
			if !m.host.counts.take(Requests, p.EndpointLimits.Requests) {
				s.counts.give(Requests)
				return Pick{}, ErrOverflow
			}
			return Pick{s, m.host, now}, nil
		}
	}
	return Pick{}, ErrNoEndpoint
}

// Subset is the part of a set whose endpoints carry given labels. It follows
// the set's changes. (Envoy: load balancer subsets.)
type Subset struct {
	set    *Set
	labels map[string]string
	orAny  bool
	tiers  []*tier // under Set.mu
	live   atomic.Pointer[live]
}

// Subset returns the endpoints that carry all labels. With orAny, the whole set
// stands in while there are none.
func (s *Set) Subset(now Time, labels map[string]string, orAny bool) (*Subset, error) {
	if len(labels) == 0 {
		return s.all, nil
	}
	var key strings.Builder
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		fmt.Fprintf(&key, "%q=%q,", k, labels[k])
	}
	fmt.Fprint(&key, orAny)
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.subsets[key.String()]; g != nil {
		return g, nil
	}
	if len(s.subsets) >= maxSubsets {
		return nil, fmt.Errorf("make subset: there are %d already", maxSubsets)
	}
	g := &Subset{set: s, labels: maps.Clone(labels), orAny: orAny}
	g.live.Store(&live{})
	s.subsets[key.String()] = g
	g.tiers = s.tiersLocked(g)
	s.refreshLocked(now)
	return g, nil
}

func (g *Subset) holds(e *Endpoint) bool {
	for k, v := range g.labels {
		if e.Labels[k] != v {
			return false
		}
	}
	return true
}

// Pick picks a host of the subset for a request and counts it in.
func (g *Subset) Pick(now Time, r Request) (Pick, error) {
	s := g.set
	if now >= Time(s.due.Load()) {
		s.tick(now)
	}
	p := s.policy.Load()
	if !s.counts.take(Requests, p.Limits.Requests) {
		return Pick{}, ErrOverflow
	}
	v := g.live.Load()
	if len(v.levels) == 0 && g.orAny {
		v = s.all.live.Load()
	}
	h, err := v.pick(s, p, now, &r)
	if err != nil {
		s.counts.give(Requests)
		return Pick{}, err
	}
	return Pick{s, h, now}, nil
}

// layLocked makes the tiers of the whole set and of its subsets anew.
func (s *Set) layLocked() {
	s.all.tiers = s.tiersLocked(s.all)
	for _, g := range s.subsets {
		g.tiers = s.tiersLocked(g)
	}
}

// tiersLocked sorts the endpoints of a subset into those asked first, second
// and so on.
func (s *Set) tiersLocked(g *Subset) []*tier {
	p := s.policy.Load()
	type rank struct {
		priority uint8
		distance int
	}
	byRank := map[rank]*tier{}
	for _, h := range s.hosts {
		e := h.endpoint.Load()
		if !g.holds(e) {
			continue
		}
		m := member{host: h, weight: max(e.Weight, 1), distance: distance(p.Locality, e.Locality)}
		r := rank{priority: e.Priority}
		if p.Near == NearFirst {
			r.distance = m.distance
		}
		if byRank[r] == nil {
			byRank[r] = &tier{}
		}
		t := byRank[r]
		t.members = append(t.members, m)
		t.weight += uint64(m.weight)
	}
	ranks := slices.SortedFunc(maps.Keys(byRank), func(a, b rank) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.distance, b.distance))
	})
	tiers := make([]*tier, 0, len(ranks))
	for _, r := range ranks {
		t := byRank[r]
		switch p.Balancer {
		case Maglev:
			t.table = maglev(t.members, p.TableSize)
		case RingHash:
			t.ring = ring(t.members, p.TableSize)
		}
		tiers = append(tiers, t)
	}
	return tiers
}

// distance counts the parts in which a locality is not our own, from the first
// that differs on. Nothing is known of one that is not given: it is far.
func distance(own, other string) int {
	if own == "" {
		return 0
	}
	a, b := strings.Split(own, "/"), strings.Split(other, "/")
	same := 0
	for same < min(len(a), len(b)) && a[same] == b[same] {
		same++
	}
	return len(a) - same
}

// tick does what has become due. A pick does not wait for one that does it
// already.
func (s *Set) tick(now Time) {
	if !s.mu.TryLock() {
		return
	}
	defer s.mu.Unlock()
	s.refreshLocked(now)
}

// refreshLocked looks at what time has changed, and lays out anew who may be
// picked.
func (s *Set) refreshLocked(now Time) {
	p := s.policy.Load()
	s.sweepLocked(p, now)
	due := never
	for _, h := range s.hosts {
		if h.ejected != 0 && now >= h.ejected {
			s.readmitLocked(h, now)
		}
		if h.ejected != 0 {
			due = min(due, h.ejected)
		}
		up := h.ejected == 0 && !h.health.Unhealthy
		if up && !h.up.Load() {
			h.since.Store(int64(now))
		}
		h.up.Store(up)
		if end := Time(h.since.Load()).Add(p.SlowStart); up && p.SlowStart > 0 && now < end {
			due = min(due, end)
		}
	}
	if p.Outlier != nil {
		due = min(due, s.swept.Add(p.Outlier.Interval))
	}
	s.all.live.Store(newLive(s.all.tiers, p, now))
	for _, g := range s.subsets {
		g.live.Store(newLive(g.tiers, p, now))
	}
	s.due.Store(int64(due))
}
