// Package cache stores answers of HTTP servers in memory and says when they may be
// used again, as a shared cache: RFC 9111, and RFC 5861 for answers that have gone
// stale.
//
// It asks no server and answers no client: whoever has a request asks what is
// stored, does what Use says, and stores what came. Memory is bounded; what was
// used longest ago goes first.
package cache

import (
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"hauberk.dev/mesh/http1"
)

// Bounds.
const (
	maxVariants = 16 // of one key
	maxFlights  = 4096
	voids       = 1024
)

// Use is what may be done with what is stored.
type Use uint8

const (
	Miss       Use = iota // nothing is there: ask, and store
	Fresh                 // answer with it
	Background            // answer with it, and ask meanwhile whether it is still good
	Revalidate            // ask first whether it is still good
	Bypass                // the request is not for a cache: ask, and store nothing
	Forbidden             // nothing is there, and the client wants nobody asked: 504
)

// Store is what is stored.
type Store struct {
	mu      sync.Mutex
	bound   int64
	bytes   int64
	coming  int64 // bytes of answers that are not stored yet
	entries map[string][]*Entry
	recent  Entry // of a ring: next is the one used last
	flights map[string]*Flight
	counts  Counts

	// When what is asked for under a key was last no good any more. Keys share places:
	// one too many is asked for again then.
	voided [voids]time.Time
	purged time.Time
	seed   maphash.Seed
}

// Counts are what has happened.
type Counts struct {
	Hits, Stale, Misses, Revalidated, Stored, Evicted, Collapsed uint64
	Bytes                                                        int64
	Entries                                                      int
}

// New makes a store that holds at most so many bytes.
func New(bytes int64) *Store {
	s := &Store{bound: bytes, entries: map[string][]*Entry{}, flights: map[string]*Flight{}, seed: maphash.MakeSeed()}
	s.recent.prev, s.recent.next = &s.recent, &s.recent
	return s
}

// Resize changes the bound.
func (s *Store) Resize(bytes int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bound = bytes
	s.evictLocked()
}

// Hold counts bytes of an answer in that is coming, which Give counts out. It reports
// whether there is room: those that are coming hold no more than what is stored.
func (s *Store) Hold(n int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n > s.bound-s.coming {
		return false
	}
	s.coming += n
	return true
}

// Give counts bytes out that Hold has counted in.
func (s *Store) Give(n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.coming -= n
}

// Look says what is stored for a request, and what may be done with it.
func (s *Store) Look(now time.Time, key []byte, req *http1.Message) (*Entry, Use) {
	if !plain(req) {
		return nil, Bypass
	}
	asked := control(req)
	if asked.noStore {
		return nil, Bypass
	}
	e := s.find(key, req)
	if e == nil {
		switch {
		case asked.onlyIfCached:
			return nil, Forbidden
		case string(req.Method) == "HEAD" || conditional(req):
			return nil, Bypass // its answer is no whole one
		}
		s.count(func(c *Counts) { c.Misses++ })
		return nil, Miss
	}
	use := e.use(now, req, asked)
	switch {
	case use == Background && string(req.Method) == "HEAD": // whose answer renews nothing
		use = Fresh
	case use == Revalidate && asked.onlyIfCached:
		return nil, Forbidden
	case use == Revalidate && string(req.Method) == "HEAD":
		return nil, Bypass
	case use == Revalidate && e.ETag == "" && e.Since == "" && conditional(req):
		return nil, Bypass
	}
	s.count(func(c *Counts) {
		switch use {
		case Fresh:
			c.Hits++
		case Background:
			c.Stale++
		}
	})
	return e, use
}

// plain says whether a request may be answered by a whole answer that is stored.
// Those for a part, and those that must not come too late, go to the server.
func plain(req *http1.Message) bool {
	if m := string(req.Method); m != "GET" && m != "HEAD" || req.Framing != http1.NoBody && req.Length > 0 || req.Framing == http1.Chunked || req.Upgrade {
		return false
	}
	for _, name := range [...]string{"Range", "If-Range", "If-Match", "If-Unmodified-Since"} {
		if _, there := req.Field(name); there {
			return false
		}
	}
	return true
}

func conditional(req *http1.Message) bool {
	_, match := req.Field("If-None-Match")
	_, since := req.Field("If-Modified-Since")
	return match || since
}

// use says what may be done with an entry: RFC 9111, sections 4.2 and 5.2.1.
func (e *Entry) use(now time.Time, req *http1.Message, asked directives) Use {
	if pragma, _ := req.Field("Pragma"); asked.noCache || e.control.noCache || !asked.said && strings.EqualFold(string(pragma), "no-cache") {
		return Revalidate
	}
	age := e.Age(now)
	left := e.lifetime - age
	switch {
	case asked.maxAge >= 0 && age > asked.maxAge && !asked.maxStaleAny && asked.maxStale < 0:
		return Revalidate
	case asked.minFresh >= 0 && left < asked.minFresh:
		return Revalidate
	case left > 0:
		return Fresh
	case e.strict():
		return Revalidate
	case asked.maxStaleAny || asked.maxStale >= 0 && -left <= asked.maxStale:
		return Fresh
	case e.control.staleWhileRevalidate > 0 && -left <= e.control.staleWhileRevalidate:
		return Background
	}
	return Revalidate
}

// strict says that the answer must not be used stale, whatever happens: RFC 9111,
// section 4.2.4. s-maxage means proxy-revalidate as well: section 5.2.2.10.
func (e *Entry) strict() bool {
	c := &e.control
	return c.mustRevalidate || c.proxyRevalidate || c.noCache || c.sMaxAge >= 0
}

// ForError says whether the answer may be used when the server fails: RFC 5861,
// section 4.
func (e *Entry) ForError(now time.Time) bool {
	return !e.strict() && e.control.staleIfError > 0 && e.Age(now)-e.lifetime <= e.control.staleIfError
}

// TTL is how long the answer is fresh yet; below zero, how long it has not been.
func (e *Entry) TTL(now time.Time) time.Duration { return e.lifetime - e.Age(now) }

// NotModified says whether the client has what is stored: RFC 9110, section 13.2.2.
func (e *Entry) NotModified(req *http1.Message) bool {
	if e.Status != 200 {
		return false
	}
	if tags, there := req.Field("If-None-Match"); there {
		return e.ETag != "" && hasTag(string(tags), e.ETag) || strings.Trim(string(tags), " ") == "*"
	}
	since, _, ok := date(req, "If-Modified-Since")
	if !ok || e.Since == "" {
		return false
	}
	var m http1.Message
	if m.Response(e.Head, []byte("GET")) != nil {
		return false
	}
	changed, _, ok := date(&m, "Last-Modified")
	return ok && !changed.After(since)
}

// hasTag compares weakly.
func hasTag(list, tag string) bool {
	tag = strings.TrimPrefix(tag, "W/")
	for list != "" {
		var one string
		one, list = nextDirective(list)
		if strings.TrimPrefix(strings.Trim(one, " \t"), "W/") == tag {
			return true
		}
	}
	return false
}

func (s *Store) count(f func(*Counts)) {
	s.mu.Lock()
	f(&s.counts)
	s.mu.Unlock()
}

func (s *Store) find(key []byte, req *http1.Message) *Entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.entries[string(key)] {
		if e.matches(req) {
			s.frontLocked(e)
			return e
		}
	}
	return nil
}

// Put stores a whole answer, in place of what the same request would find. asked is
// when the request was sent.
func (s *Store) Put(key []byte, req, resp *http1.Message, body []byte, asked, came time.Time, r Rules) *Entry {
	e := newEntry(string(key), req, resp, body, asked, came, r)
	s.put(e, req, asked)
	return e
}

// Renew stores an entry anew that the server has found good: resp is its 304.
func (s *Store) Renew(old *Entry, req, resp *http1.Message, asked, came time.Time, r Rules) *Entry {
	var m http1.Message
	if m.Response(old.Head, []byte("GET")) != nil {
		return old // never: it was read before
	}
	head := appendHead(nil, &m, resp, len(old.Body))
	var now http1.Message
	if now.Response(head, []byte("GET")) != nil {
		return old
	}
	e := newEntry(old.key, req, &now, old.Body, asked, came, r)
	e.Head = head
	e.age = firstAge(resp, asked, came)
	if len(old.vary) > 0 && len(e.vary) == 0 {
		e.vary = old.vary
	}
	switch said := control(&now); {
	case said.noStore || said.private || !r.chosen(&now):
		s.drop(old)
		return e
	case secret(req, said): // its fields may be about who has asked: others go on with the old
		return e
	}
	s.put(e, req, asked)
	s.count(func(c *Counts) { c.Revalidated++ })
	return e
}

func (s *Store) put(e *Entry, req *http1.Message, asked time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !asked.After(*s.voidedAt(e.key)) || !asked.After(s.purged) {
		e.gone = true // it may be from before
		return
	}
	for _, old := range slices.Clone(s.entries[e.key]) {
		if old.matches(req) {
			s.dropLocked(old)
		}
	}
	if all := s.entries[e.key]; len(all) >= maxVariants {
		s.dropLocked(all[0])
		s.counts.Evicted++
	}
	if e.size() > s.bound {
		e.gone = true
		return
	}
	s.entries[e.key] = append(s.entries[e.key], e)
	s.bytes += e.size()
	s.counts.Stored++
	e.prev, e.next = e, e
	s.frontLocked(e)
	s.evictLocked()
}

func (s *Store) frontLocked(e *Entry) {
	e.prev.next, e.next.prev = e.next, e.prev
	e.prev, e.next = &s.recent, s.recent.next
	e.prev.next, e.next.prev = e, e
}

func (s *Store) evictLocked() {
	for s.bytes > s.bound {
		s.dropLocked(s.recent.prev)
		s.counts.Evicted++
	}
}

func (s *Store) drop(e *Entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropLocked(e)
}

func (s *Store) dropLocked(e *Entry) {
	if e.gone {
		return
	}
	e.gone = true
	e.prev.next, e.next.prev = e.next, e.prev
	s.bytes -= e.size()
	left := slices.DeleteFunc(s.entries[e.key], func(x *Entry) bool { return x == e })
	if len(left) == 0 {
		delete(s.entries, e.key)
	} else {
		s.entries[e.key] = left
	}
}

func (s *Store) voidedAt(key string) *time.Time {
	return &s.voided[maphash.String(s.seed, key)%voids]
}

// Invalidate forgets what is stored under a key: RFC 9111, section 4.4. Answers that
// were asked for before now are not stored when they come, and nobody waits for
// them any more.
func (s *Store) Invalidate(now time.Time, key []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*s.voidedAt(string(key)) = now
	delete(s.flights, string(key))
	for _, e := range slices.Clone(s.entries[string(key)]) {
		s.dropLocked(e)
	}
}

// Purge forgets what match says yes to, and tells how many that were. What was asked
// for before now is not stored.
func (s *Store) Purge(now time.Time, match func(key string) bool) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.purged = now
	maps.DeleteFunc(s.flights, func(key string, _ *Flight) bool { return match(key) })
	for key, all := range s.entries {
		if match(key) {
			for _, e := range slices.Clone(all) {
				s.dropLocked(e)
				n++
			}
		}
	}
	return n
}

// Counts are what has happened, and what is stored.
func (s *Store) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counts
	c.Bytes = s.bytes
	for _, all := range s.entries {
		c.Entries += len(all)
	}
	return c
}

// Flight is a request to the server whose answer others wait for.
type Flight struct {
	s    *Store
	key  string
	done chan struct{}
	once sync.Once
}

// Lead says whether the caller is the one to ask the server: then it must Land.
// Else f.Done tells when it is worth to look again. f is nil if too many are under
// way.
func (s *Store) Lead(key []byte) (f *Flight, lead bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[string(key)]; f != nil {
		s.counts.Collapsed++
		return f, false
	}
	if len(s.flights) >= maxFlights {
		return nil, true
	}
	f = &Flight{s: s, key: string(key), done: make(chan struct{})}
	s.flights[f.key] = f
	return f, true
}

// Done is closed when the answer is stored, or will not be.
func (f *Flight) Done() <-chan struct{} { return f.done }

// Land ends the flight.
func (f *Flight) Land() {
	if f == nil {
		return
	}
	f.once.Do(func() {
		f.s.mu.Lock()
		if f.s.flights[f.key] == f { // else it was taken out
			delete(f.s.flights, f.key)
		}
		f.s.mu.Unlock()
		close(f.done)
	})
}
