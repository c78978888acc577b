// Package inspect finds out what the requests to a service mean: whether one
// holds an attack, and whether it is like those before it.
//
// It learns what is normal of each route within bounds, looks for signatures in
// decoded values, watches how a caller behaves, and gives a score that is a sum
// of named findings. What follows from a score is the plan's to say and the
// mesh's to do. The package opens no socket, starts no goroutine and knows no
// clock: time is passed in. It allocates only to learn, and to tell what it found.
package inspect

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds. What is beyond falls into one bucket, which is counted.
const (
	MaxRoutes  = 256  // of a service
	MaxCallers = 1024 // of a service, at once
	MaxFields  = 64   // in the shape of a route
	MaxSeen    = 64   // callers of a route that are told apart
	MaxKids    = 64   // different segments after one, before they are taken for names

	maxSegments  = 16
	maxMethod    = 64
	maxPath      = 16 << 10
	maxCall      = 1 << 10 // bytes of a path that is kept as it is, of an RPC service
	maxCaller    = 2 << 10 // bytes of a caller's name, as SPIFFE has it
	maxPathField = 128     // bytes of the name of a field
	maxDepth     = 32      // of JSON
	maxValue     = 4 << 10 // bytes of one value that are read
	maxComment   = 256     // bytes of a comment in a value

	// MaxBody is how much of a body may be looked at.
	MaxBody      = 16 << 10
	defaultBody  = 4 << 10
	defaultLearn = 1000 // requests of a route, before it is known
)

// Config says what is done about scores. The zero value learns and does nothing.
type Config struct {
	// The least scores at which something is done; 0 is never.
	Observe, Shed, Challenge, Cut, Incident int
	// Learn is after how many requests of a route what it has not seen counts.
	Learn int
	// Frozen stops learning: what is not known yet counts at once.
	Frozen bool
	// Body is how many bytes of a body are looked at; -1 is none.
	Body int
	// Shedding is how long a caller is refused.
	Shedding time.Duration
}

// Service is what is known of the requests to one service.
type Service struct {
	conf   atomic.Pointer[Config]
	Counts Counts

	mu      sync.RWMutex
	since   time.Time // when learning began
	root    node
	routes  int
	total   atomic.Uint64 // requests
	callers map[CallerKey]*Caller
	rest    Caller // those that have no room
	normal  map[string]*baseline
	typical baseline // of a caller of the service
	peers   map[string]*peer
}

// Counts of a service, for its metrics.
type Counts struct {
	Requests, Bytes atomic.Uint64
	Found           [kinds]atomic.Uint64
	Done            [actions]atomic.Uint64
	// What had no room of its own.
	RoutesOver, CallersOver, FieldsOver atomic.Uint64
}

// New makes a service of which nothing is known.
func New(c Config) *Service {
	s := &Service{callers: map[CallerKey]*Caller{}, normal: map[string]*baseline{}, peers: map[string]*peer{}}
	s.rest.service = s
	s.Configure(c)
	return s
}

// Configure changes what is done; what is known stays.
func (s *Service) Configure(c Config) {
	if c.Learn == 0 {
		c.Learn = defaultLearn
	}
	if c.Body == 0 {
		c.Body = defaultBody
	}
	if c.Shedding == 0 {
		c.Shedding = 10 * time.Second
	}
	c.Body = max(0, min(c.Body, MaxBody))
	s.conf.Store(&c)
}

// Wants is how many bytes of a body are to be shown.
func (s *Service) Wants() int { return s.conf.Load().Body }

// Shedding is how long a caller that was shed is to stay away.
func (s *Service) Shedding() time.Duration { return s.conf.Load().Shedding }

// BodyKind says how a body is written.
type BodyKind uint8

// The kinds of bodies.
const (
	Bytes BodyKind = iota
	JSON
	Form
	Page // HTML: scripts are its business
	GRPC // one message after its five bytes
	Hessian
)

// Query is one request as it is looked at. It belongs to one connection and is
// used again and again; the zero value is ready.
type Query struct {
	service *Service
	conf    *Config
	port    uint16
	value   value
	found   uint32 // signatures, as bits
	reasons [Gadget + 1]Finding
	route   *route
	odd     uint32 // kinds other than signatures
	oddWhat [kinds]string
	fields  []seen // of the arguments
	over    int
	name    []byte // of the field that is read
	size    int64
	now     time.Duration
	resumed bool
	sized   bool // the size is known, or has been told
}

// seen is an argument of the request: a hash of its name, its name as a part of
// names, and its types.
type seen struct {
	hash  uint64
	types Types
	from  uint16
	to    uint16
}

// Begin begins a request. Time is since some moment that stays.
func (q *Query) Begin(s *Service, port uint16, now time.Duration) {
	q.service, q.conf, q.port, q.now = s, s.conf.Load(), port, now
	q.found, q.odd, q.route, q.over, q.size = 0, 0, nil, 0, 0
	q.fields, q.name, q.resumed = q.fields[:0], q.name[:0], false
	q.sized = true
}

// Resume goes on with a request that was judged by its head: what comes is its
// body.
func (q *Query) Resume(s *Service, a Asked, now time.Duration) {
	q.Begin(s, 0, now)
	q.route, q.resumed, q.sized = a.route, true, false
}

// Wants is how many bytes of the body are to be shown.
func (q *Query) Wants() int { return q.conf.Body }

// Field looks at a header field.
func Field[T string | []byte](q *Query, name, v T) {
	if len(v) < 5 {
		return // nothing to look for is shorter
	}
	fresh := text(q, inHeader, v, codePercent)
	if fresh == 0 {
		return
	}
	q.at(fresh, string(name[:min(len(name), 64)]))
}

// secretNames are parts of the names of fields that hold what nobody is to see.
var secretNames = [...]string{"auth", "jwt", "key", "password", "session", "cookie", "credential", "token", "secret"}

// IsSecret tells by its name whether the value of a field is to be told to nobody.
func IsSecret(name string) bool {
	name = strings.ToLower(name)
	for _, s := range secretNames {
		if strings.Contains(name, s) {
			return true
		}
	}
	return false
}

// Target looks at the target of an HTTP request, and finds its route.
func Target[T string | []byte](q *Query, method string, target T) {
	end := len(target)
	for i := range len(target) {
		if target[i] == '?' {
			end = i
			break
		}
	}
	path := target[:end]
	text(q, inPath, path, codePercent)
	if end < len(target) {
		pairs(q, inQuery, target[end+1:])
	}
	template(q, method, path)
}

// Call finds the route of a request to a method of an RPC service.
func (q *Query) Call(service, method []byte) {
	q.name = append(append(append(q.name[:0], service...), '/'), method...)
	q.named("CALL", q.name)
	q.name = q.name[:0]
}

// Body looks at the beginning of a body. size is the whole, -1 if unknown.
func (q *Query) Body(kind BodyKind, b []byte, size int64) {
	q.size = max(size, int64(len(b)))
	q.sized = q.sized || size >= 0
	b = b[:min(len(b), q.conf.Body)]
	q.service.Counts.Bytes.Add(uint64(len(b)))
	switch kind {
	case JSON:
		q.json(b)
	case Form:
		pairs(q, inBody, b)
	case GRPC:
		q.protobuf(b)
		q.bytes(b, codeRaw)
	case Hessian:
		q.bytes(b, codeRaw)
	case Page:
		q.bytes(b, codePercent)
	default:
		q.bytes(b, codePercent)
		if len(b) > 4 && b[0] == 0xac {
			q.bytes(b, codeRaw)
		}
	}
}

// bytes looks at a body whose values are not told apart, piece by piece.
func (q *Query) bytes(b []byte, c coding) {
	const overlap = 256
	for len(b) > 0 {
		text(q, inBytes, b, c)
		if len(b) <= maxValue {
			return
		}
		b = b[maxValue-overlap:]
	}
}

// text looks for signatures in one value, and returns those that are new.
func text[T string | []byte](q *Query, p place, s T, c coding) (fresh uint32) {
	v := &q.value
	v.place = p
	decode(&v.normal, s, c)
	found, at := v.match()
	if fresh = found &^ q.found; fresh == 0 {
		return 0
	}
	q.found |= found
	for k := range Gadget + 1 {
		if fresh&(1<<k) != 0 {
			from := max(0, min(at-8, len(v.text)-1))
			q.reasons[k] = Finding{k, placeNames[p] + ": " + quote(v.text[from:min(len(v.text), from+48)])}
		}
	}
	return fresh
}

// at says by which name the value was told apart in which something was found.
// What that name says is a secret is not quoted.
func (q *Query) at(fresh uint32, name string) {
	secret := IsSecret(name)
	for k := range Gadget + 1 {
		if fresh&(1<<k) != 0 {
			if secret {
				place, _, _ := strings.Cut(q.reasons[k].Detail, ":")
				q.reasons[k].Detail = place + ", not shown"
			}
			q.reasons[k].Detail = name + " in " + q.reasons[k].Detail
		}
	}
}

// quote is a piece of foreign text for people.
func quote(b []byte) string {
	out := make([]byte, len(b))
	for i, c := range b {
		if c < ' ' || c >= 0x7f {
			c = '?'
		}
		out[i] = c
	}
	return `"` + string(out) + `"`
}

// pairs looks at the names and values of a query or a form.
func pairs[T string | []byte](q *Query, p place, s T) {
	for n := 0; len(s) > 0 && n < 2*MaxFields; n++ {
		end, eq := len(s), -1
		for i := range len(s) {
			if s[i] == '&' {
				end = i
				break
			}
			if s[i] == '=' && eq < 0 {
				eq = i
			}
		}
		pair := s[:end]
		if s = s[min(end+1, len(s)):]; eq < 0 {
			eq = len(pair)
		}
		text(q, p, pair[:eq], codePercent|codePlus)
		if eq < len(pair) {
			if fresh := text(q, p, pair[eq+1:], codePercent|codePlus); fresh != 0 {
				q.at(fresh, quote([]byte(pair[:min(eq, 64)])))
			}
			from := len(q.name)
			q.name = append(q.name, pair[:min(eq, maxPathField)]...)
			q.argument(from, scalar(pair[eq+1:]))
		}
	}
	if len(s) > 0 {
		text(q, p, s, codePercent|codePlus)
	}
}

// scalar is what a value of a query looks like.
func scalar[T string | []byte](s T) Types {
	digits := 0
	for i := range len(s) {
		if isDigit(s[i]) || i == 0 && s[i] == '-' {
			digits++
		}
	}
	if digits == len(s) && digits > 0 {
		return TypeInt
	}
	return TypeString
}

// argument notes one of the request's, whose name begins at from.
func (q *Query) argument(from int, t Types) {
	name := q.name[from:]
	h := hash(name)
	for i := range q.fields {
		if q.fields[i].hash == h {
			q.fields[i].types |= t
			q.name = q.name[:from]
			return
		}
	}
	if len(q.fields) == MaxFields {
		q.over++
		q.name = q.name[:from]
		return
	}
	q.fields = append(q.fields, seen{h, t, uint16(from), uint16(len(q.name))})
}

// hash is FNV-1a.
func hash(b []byte) uint64 {
	h := uint64(14695981039346656037)
	for _, c := range b {
		h = (h ^ uint64(c)) * 1099511628211
	}
	return h
}
