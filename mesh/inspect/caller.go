package inspect

import (
	"math"
	"sync"
	"sync/atomic"
	"time"
)

// CallerKey names a caller: the identity it has proved, and which instance it
// is, or its address if it has no identity.
type CallerKey struct{ Identity, Instance string }

// Caller is how one caller has behaved towards a service.
type Caller struct {
	CallerKey
	service *Service
	open    atomic.Int64  // connections
	here    time.Duration // when the last began; guarded by the service
	sent    atomic.Uint64

	mu     sync.Mutex
	last   time.Duration
	past   [kinds]float32 // weights found, halved every minute
	misses distinct       // what was asked for and is not there, or not allowed
	places distinct       // destinations
	minute int64
	errors average
	shed   time.Duration // until when
	told   time.Duration // when an event was, of which kinds, and how hard
	tells  uint32
	hard   Action
	own    Action // the same, of Verdict.Own
	held   int
	window int64
	before uint64 // of sent, when the window began
}

// baseline is how much callers of one identity are sent in a window.
type baseline struct {
	average
	most float64
}

const (
	halfLife   = time.Minute
	scanMisses = 24 // different ones in a minute
	scanPlaces = 16
	quietTime  = time.Second // between two events of a caller
	leastExfil = 8 << 20     // bytes in a window that nobody minds
	exfilTimes = 10
	exfilAfter = 12 // windows, before they tell what is usual
)

func sqrt(v float64) float64 { return math.Sqrt(max(v, 0)) }

// Caller is the caller of that name, while it is connected: Leave gives it back.
func (s *Service) Caller(k CallerKey, now time.Duration) *Caller {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.callers[k]
	if c == nil {
		if len(s.callers) >= MaxCallers && !s.forgetLocked() {
			s.Counts.CallersOver.Add(1)
			c = &s.rest
		} else {
			c = &Caller{CallerKey: k, service: s}
			s.callers[k] = c
		}
	}
	c.open.Add(1)
	c.here = now
	return c
}

// forgetLocked makes room: of those not connected, who was there longest ago.
func (s *Service) forgetLocked() bool {
	var oldest *Caller
	for _, c := range s.callers {
		if c.open.Load() == 0 && (oldest == nil || c.here < oldest.here) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	delete(s.callers, oldest.CallerKey)
	return true
}

// Leave says that a connection of the caller has ended.
func (c *Caller) Leave() { c.open.Add(-1) }

// Shedding is how long the caller is refused, if it is.
func (c *Caller) Shedding() time.Duration { return c.service.Shedding() }

// Sent counts bytes that the service has sent to the caller.
func (c *Caller) Sent(n uint64) { c.sent.Add(n) }

// Shed tells whether the caller is to stay away, and for how long.
func (c *Caller) Shed(now time.Duration) (time.Duration, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.shed - now, c.shed > now
}

// Judge gives the verdict on a request whose parts have been looked at, and
// learns from it if nothing speaks against that.
func (q *Query) Judge(c *Caller) (v Verdict) {
	s := q.service
	if !q.resumed {
		s.Counts.Requests.Add(1)
		s.total.Add(1)
	}
	if r := q.route; r != nil {
		r.mu.Lock()
		if !q.resumed {
			r.tickLocked(q.now, q.conf.Frozen)
		}
		r.compareLocked(q, c.Identity)
		if q.found == 0 && !q.conf.Frozen {
			r.learnLocked(q, c.Identity)
		}
		r.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turnLocked(q.now)
	if c.errors.count >= 20 && c.errors.mean > 0.5 && q.route != nil && q.route.errorRatio() < 0.1 {
		q.note(Errors, "most of its requests fail, which others' do not")
	}
	if q.found == 0 && q.odd == 0 {
		return v
	}
	for k := range Gadget + 1 {
		if q.found&(1<<k) != 0 {
			v.Findings = append(v.Findings, q.reasons[k])
		}
	}
	for k := Gadget + 1; k < kinds; k++ {
		if q.odd&(1<<k) != 0 {
			v.Findings = append(v.Findings, Finding{k, q.oddWhat[k]})
		}
	}
	c.sumLocked(&v, q.now)
	return v
}

func (r *route) errorRatio() float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return float64(r.refused) / float64(max(r.answered, 1))
}

// sumLocked adds up the findings and what is left of those before, and says what
// is to be done.
func (c *Caller) sumLocked(v *Verdict, now time.Duration) {
	s, own, doubt := c.service, 0, 0
	for _, f := range v.Findings {
		own += f.Kind.Weight()
		if f.Kind == Hijack {
			doubt += f.Kind.Weight()
		}
		s.Counts.Found[f.Kind].Add(1)
	}
	c.fadeLocked(now)
	v.Before = c.past
	sum, sure := float32(own), float32(own-doubt)
	for k, left := range c.past {
		if sum += left; Kind(k) != Hijack {
			sure += left
		}
	}
	v.Score = int(sum)
	for _, f := range v.Findings {
		// A finding that repeats adds less and less: at most what it weighs four times.
		w := float32(f.Kind.Weight())
		c.past[f.Kind] = min(c.past[f.Kind]+w, 4*w)
	}
	conf := s.conf.Load()
	v.Action, v.Own = conf.action(v.Score), conf.action(int(sure))
	s.Counts.Done[v.Action].Add(1)
	if v.Action == Shed || v.Action == Challenge {
		c.shed = now + s.Shedding()
	}
	if v.Action == None {
		return
	}
	var of uint32
	for _, f := range v.Findings {
		of |= 1 << f.Kind
	}
	if c.told != 0 && now-c.told < quietTime && of&^c.tells == 0 && v.Action <= c.hard && v.Own <= c.own {
		v.Quiet = true
		c.held++
		return
	}
	if now-c.told >= quietTime {
		c.tells, c.hard, c.own = 0, None, None
	}
	c.told, v.Held, c.held = max(now, 1), c.held, 0
	c.tells |= of
	c.hard, c.own = max(c.hard, v.Action), max(c.own, v.Own)
}

// action is the hardest one whose score is reached.
func (c *Config) action(score int) Action {
	a := None
	for i, least := range [...]int{c.Observe, c.Shed, c.Challenge, c.Cut, c.Incident} {
		if least > 0 && score >= least {
			a = Observe + Action(i)
		}
	}
	return a
}

func (c *Caller) fadeLocked(now time.Duration) {
	if gone := now - c.last; gone > 0 {
		f := float32(math.Exp2(-float64(gone) / float64(halfLife)))
		for k := range c.past {
			if c.past[k] *= f; c.past[k] < 1 {
				c.past[k] = 0
			}
		}
	}
	c.last = now
}

// turnLocked begins a minute of counting.
func (c *Caller) turnLocked(now time.Duration) {
	if m := int64(now / time.Minute); m != c.minute {
		c.minute = m
		c.misses.clear()
		c.places.clear()
	}
}

// Asked is what is kept of a request until it is answered.
type Asked struct {
	route  *route
	what   uint64
	frozen bool
}

// Asked is to be kept of this request.
func (q *Query) Asked(what uint64) Asked { return Asked{q.route, what, q.conf.Frozen} }

// Answered notes how a request was answered, by HTTP's statuses. Many different
// things that are not there, or not allowed, are looked for by who does not know
// what is.
func (a *Asked) Answered(c *Caller, status int, now time.Duration) (v Verdict) {
	failed := 0.0
	if status >= 400 && status != 429 {
		failed = 1
	}
	if r := a.route; r != nil && !a.frozen {
		r.mu.Lock()
		r.answered++
		r.refused += uint64(failed)
		r.mu.Unlock()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errors.add(failed)
	switch status {
	case 401, 403, 404, 405, 501:
		return c.missLocked(a.what, now)
	}
	return v
}

// Missed notes that a caller was refused what it asked for.
func (c *Caller) Missed(what uint64, now time.Duration) Verdict {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.missLocked(what, now)
}

func (c *Caller) missLocked(what uint64, now time.Duration) (v Verdict) {
	c.turnLocked(now)
	before := c.misses.n
	if c.misses.add(what); c.misses.n >= scanMisses && c.misses.n > before && c.misses.n%scanMisses == 0 {
		v.Findings = []Finding{{Scan, sizeCount(c.misses.n) + " different requests for what is not there or not allowed, in a minute"}}
		c.sumLocked(&v, now)
	}
	return v
}

// Reached notes where a caller wanted to go.
func (c *Caller) Reached(place uint64, now time.Duration) (v Verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.turnLocked(now)
	before := c.places.n
	if c.places.add(place); c.places.n >= scanPlaces && c.places.n > before && c.places.n%scanPlaces == 0 {
		v.Findings = []Finding{{Spread, sizeCount(c.places.n) + " different destinations refused, in a minute"}}
		c.sumLocked(&v, now)
	}
	return v
}

// Strange notes a finding of the mesh itself about a caller.
func (c *Caller) Strange(k Kind, detail string, now time.Duration) (v Verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	v.Findings = []Finding{{k, detail}}
	c.sumLocked(&v, now)
	return v
}

// Hash is for what Answered, Missed and Reached are told of.
func Hash[T string | []byte](s T) uint64 {
	h := uint64(14695981039346656037)
	for i := range len(s) {
		h = (h ^ uint64(s[i])) * 1099511628211
	}
	return h
}

func sizeCount(n int) string { return string(number(nil, uint64(n))) }
