package inspect

import (
	"strings"
	"sync"
	"time"
)

// node is a segment of paths, and what may follow it.
type node struct {
	kids   map[string]*node
	name   *node // any segment that looks like a name, or that has no room
	routes map[string]*route
}

// route is what is known of the requests to one path with one method.
type route struct {
	method, path string

	mu       sync.Mutex
	requests uint64
	refused  uint64 // with errors of the server or the client
	answered uint64
	sizes    Sizes
	rate     average // requests in a window
	window   int64
	inWindow int
	callers  map[string]uint64
	over     uint64 // requests of callers without room
	fields   map[uint64]*field
	omitted  uint64 // arguments without room
}

type field struct {
	name  string
	types Types
	count uint64
}

const rateWindow = 10 * time.Second

// template finds the route of a path. Segments that are names of things are all
// the same one.
func template[T string | []byte](q *Query, method string, path T) {
	s := q.service
	s.mu.RLock()
	n, i := &s.root, 0
	var ends [maxSegments]int
	depth := 0
	for n != nil && i < len(path) && depth < maxSegments {
		i++ // the slash
		end := i
		for end < len(path) && path[end] != '/' {
			end++
		}
		n = n.next(string(path[i:end]))
		ends[depth] = end
		depth++
		i = end
	}
	if n != nil {
		if q.route = n.routes[method]; q.route != nil {
			s.mu.RUnlock()
			return
		}
	}
	known := n != nil && len(n.routes) > 0
	s.mu.RUnlock()
	q.fresh(method, string(path), known)
}

// next is the node of a segment, nil if there is none.
func (n *node) next(segment string) *node {
	if n.name != nil && (isName(segment) || len(n.kids) >= MaxKids) {
		if kid := n.kids[segment]; kid != nil {
			return kid
		}
		return n.name
	}
	return n.kids[segment]
}

// named finds the route of what is not a path.
func (q *Query) named(method string, name []byte) {
	s := q.service
	s.mu.RLock()
	if n := s.root.kids[string(name)]; n != nil {
		q.route = n.routes[method]
	}
	s.mu.RUnlock()
	if q.route == nil {
		q.fresh(method, string(name), false)
	}
}

// fresh is a request whose route is not known: it is made one, if that is still
// to be learnt. pathKnown means that another method is.
func (q *Query) fresh(method, path string, pathKnown bool) {
	s := q.service
	if q.conf.Frozen || s.total.Load() >= uint64(q.conf.Learn) {
		if pathKnown {
			q.note(NewMethod, method)
		} else {
			q.note(NewRoute, quote([]byte(path[:min(len(path), 64)])))
		}
	}
	if q.conf.Frozen || q.found != 0 {
		return // what holds an attack teaches nothing
	}
	if !printable(method, maxMethod) || !printable(path, maxPath) || path[0] != '/' && len(path) > maxCall {
		s.Counts.RoutesOver.Add(1)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.routes >= MaxRoutes {
		s.Counts.RoutesOver.Add(1)
		return
	}
	q.route = s.makeLocked(method, path)
}

func (s *Service) makeLocked(method, path string) *route {
	n := &s.root
	var template strings.Builder
	if !strings.HasPrefix(path, "/") { // of an RPC service
		n = n.kid(path, false)
		template.WriteString(path)
	} else {
		for depth, segment := range strings.Split(path[1:], "/") {
			if depth == maxSegments {
				break
			}
			name := isName(segment) || len(n.kids) >= MaxKids && n.kids[segment] == nil
			n = n.kid(segment, name)
			if name {
				segment = "{}"
			}
			template.WriteString("/" + segment)
		}
	}
	r := n.routes[method]
	if r == nil {
		r = &route{method: method, path: template.String(), callers: map[string]uint64{}, fields: map[uint64]*field{}}
		if n.routes == nil {
			n.routes = map[string]*route{}
		}
		n.routes[method] = r
		s.routes++
	}
	return r
}

func (n *node) kid(segment string, name bool) *node {
	if name {
		if n.name == nil {
			n.name = &node{}
		}
		return n.name
	}
	if n.kids == nil {
		n.kids = map[string]*node{}
	}
	k := n.kids[segment]
	if k == nil {
		k = &node{}
		n.kids[segment] = k
	}
	return k
}

// isName tells whether a segment looks like the name of one thing of many: it
// has many digits for its length, or what words do not have.
func isName(s string) bool {
	digits, letters, other := 0, 0, 0
	for i := range len(s) {
		switch c := s[i]; {
		case isDigit(c):
			digits++
		case isLetter(c | 0x20):
			letters++
		case c == '-' || c == '_' || c == '.':
		default:
			other++
		}
	}
	switch {
	case s == "{}" || digits > 0 && letters == 0 || other > 0:
		return true
	case digits >= 4:
		return true
	}
	return digits >= 2 && len(s) >= 12 || len(s) > 48
}

// note notes a finding that is not a signature.
func (q *Query) note(k Kind, what string) {
	q.odd |= 1 << k
	q.oddWhat[k] = what
}

// compare notes what the route has not seen. The route is locked.
func (r *route) compareLocked(q *Query, caller string) {
	if !q.conf.Frozen && r.requests < uint64(q.conf.Learn) {
		return
	}
	if caller != "" && r.callers[caller] == 0 && len(r.callers) < MaxSeen {
		q.note(NewCaller, caller)
	}
	for i := range q.fields {
		f := &q.fields[i]
		switch old := r.fields[f.hash]; {
		case old == nil && len(r.fields) < MaxFields:
			q.note(NewArgument, quote(q.name[f.from:f.to]))
		case old != nil && f.types&^old.types != 0 && f.types != TypeNull:
			q.note(ArgumentType, quote(q.name[f.from:f.to])+" is "+f.types.String()+", not "+old.types.String())
		}
	}
	if q.size > 4<<10 && q.size > 4*max(r.sizes.most, 1<<10) {
		q.note(LargeRequest, sizeText(q.size)+", none was over "+sizeText(r.sizes.most))
	}
	limit := 8 * (r.rate.mean + 4*sqrt(r.rate.variance))
	if r.rate.count >= 6 && r.inWindow > 200 && float64(r.inWindow) > limit {
		q.note(Rate, "more than eight times as many requests as is usual")
	}
}

// learnLocked takes a request into what is known.
func (r *route) learnLocked(q *Query, caller string) {
	if !q.resumed {
		r.requests++
		if n, ok := r.callers[caller]; ok || len(r.callers) < MaxSeen {
			r.callers[caller] = n + 1
		} else {
			r.over++
		}
	}
	if q.sized {
		r.sizes.Add(q.size)
	}
	r.omitted += uint64(q.over)
	for i := range q.fields {
		f := &q.fields[i]
		old := r.fields[f.hash]
		if old == nil {
			if len(r.fields) == MaxFields {
				r.omitted++
				q.service.Counts.FieldsOver.Add(1)
				continue
			}
			old = &field{name: string(q.name[f.from:f.to])}
			r.fields[f.hash] = old
		}
		old.types |= f.types
		old.count++
	}
}

// tickLocked counts the request in its window of time.
func (r *route) tickLocked(now time.Duration, frozen bool) {
	w := int64(now / rateWindow)
	if w != r.window {
		if r.window != 0 && !frozen {
			r.rate.add(float64(r.inWindow))
		}
		r.window, r.inWindow = w, 0
	}
	r.inWindow++
}

func sizeText(n int64) string {
	return string(number(nil, uint64(max(n, 0)))) + " bytes"
}

// printable tells whether a name is one that people can read.
func printable(s string, most int) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] >= 0x7f {
			return false
		}
	}
	return s != "" && len(s) <= most
}
