package mesh

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/hessian"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/inspect"
	"hauberk.dev/mesh/wire"
	"hauberk.dev/plan"
)

const (
	maxScore        = 100_000
	maxRetryAfter   = time.Hour
	challengeLinger = time.Second // for a caller to read why
)

// analysis is what is known of the requests to the services that the plan has
// looked at.
type analysis struct {
	mu       sync.Mutex
	begun    time.Time
	services map[string]*inspect.Service // by key
	kept     map[string]*inspect.Service // what a node has kept of those of the next plan
	mirrors  map[string]*mirror          // by where they go
	copies   map[string]string           // where those of a service go
}

func newAnalysis() analysis {
	return analysis{begun: time.Now(), services: map[string]*inspect.Service{}, kept: map[string]*inspect.Service{}, mirrors: map[string]*mirror{}, copies: map[string]string{}}
}

func (n *analysis) now() time.Duration { return time.Since(n.begun) }

// inspectConfig checks what a plan says of a service.
func inspectConfig(i *plan.Inspect) (c inspect.Config, err error) {
	if i == nil {
		return c, nil
	}
	c = inspect.Config{Observe: i.Observe, Shed: i.Shed, Challenge: i.Challenge, Cut: i.Cut, Incident: i.Incident,
		Learn: i.Learn, Frozen: i.Frozen, Body: i.Body, Shedding: time.Duration(i.RetryAfter)}
	last := 0
	for _, score := range [...]int{i.Observe, i.Shed, i.Challenge, i.Cut, i.Incident} {
		if score < 0 || score > maxScore || score > 0 && score < last {
			return c, fmt.Errorf("inspect: score %d; want 0 or at most %d, and no harder action at a lower one", score, maxScore)
		}
		last = max(last, score)
	}
	if i.Learn < 0 || i.Body < -1 || i.Body > inspect.MaxBody || time.Duration(i.RetryAfter) > maxRetryAfter {
		return c, fmt.Errorf("inspect: learn %d, body %d and retryAfter %v; want at least 0, -1 to %d, and at most %v",
			i.Learn, i.Body, time.Duration(i.RetryAfter), inspect.MaxBody, maxRetryAfter)
	}
	if i.Mirror != "" {
		_, _, err = mirrorAddress(i.Mirror)
	}
	return c, err
}

// follow gives the services of a directory what is known of them. One that is
// looked at no more is forgotten.
func (n *analysis) follow(p *Proxy, d *directory) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for key, s := range d.services {
		if s.Inspect == nil {
			continue
		}
		c, _ := inspectConfig(s.Inspect) // checked with the plan
		if s.inspected = n.services[key]; s.inspected == nil {
			s.inspected = n.beginLocked(p, key)
			n.services[key] = s.inspected
		}
		s.inspected.Configure(c)
		n.copies[key] = s.Inspect.Mirror
	}
	clear(n.kept)
	n.mirrorsLocked(p, d)
	maps.DeleteFunc(n.services, func(key string, _ *inspect.Service) bool {
		gone := d.services[key] == nil || d.services[key].Inspect == nil
		if gone {
			p.log.Info("what is normal is forgotten: the plan does not have it looked at any more", "service", key)
		}
		return gone
	})
}

// beginLocked goes on from what was kept of a service, or begins to learn.
func (n *analysis) beginLocked(p *Proxy, key string) *inspect.Service {
	s := n.kept[key]
	if s == nil {
		s = inspect.New(inspect.Config{})
		s.Begin(time.Now())
	}
	since, requests := s.Learnt()
	p.log.Info("what is normal is learnt", "service", key, "since", since, "requests", requests)
	return s
}

// goOn takes what a node has kept of the requests to a service: for the next plan
// if they are not looked at yet, at once if they are for less long.
func (n *analysis) goOn(key string, schema []byte) error {
	s := inspect.New(inspect.Config{})
	if err := s.Import(schema); err != nil {
		return fmt.Errorf("%s%w", api.Useless, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	now := n.services[key]
	if now == nil {
		n.kept[key] = s
		return nil
	}
	kept, _ := s.Learnt()
	if since, _ := now.Learnt(); kept.Before(since) {
		return now.Import(schema)
	}
	return nil
}

// learnt is what has been learnt of a service, for a node to keep.
func (n *analysis) learnt(key string) (*api.Learnt, error) {
	out := &api.Learnt{Service: key}
	s := n.known()[key]
	if s == nil {
		return out, nil
	}
	b, err := s.Export()
	if err == nil && len(b) > api.MaxLearnt {
		err = fmt.Errorf("what was learnt is %d bytes; at most %d can be kept", len(b), api.MaxLearnt)
	}
	out.Schema = b
	return out, err
}

// known is what is known, by service.
func (n *analysis) known() map[string]*inspect.Service {
	n.mu.Lock()
	defer n.mu.Unlock()
	return maps.Clone(n.services)
}

func (n *analysis) stats() map[string]api.Analysis {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := make(map[string]api.Analysis, len(n.services))
	for key, s := range n.services {
		c := &s.Counts
		a := api.Analysis{Requests: c.Requests.Load(), Bytes: c.Bytes.Load(), Found: map[string]uint64{}, Done: map[string]uint64{},
			RoutesOver: c.RoutesOver.Load(), CallersOver: c.CallersOver.Load(), FieldsOver: c.FieldsOver.Load()}
		a.Since, a.Learnt = s.Learnt()
		if m := n.mirrors[n.copies[key]]; m != nil {
			a.Mirrored, a.MirrorMissed = m.sent.Load(), m.missed.Load()
		}
		for k := range c.Found {
			if v := c.Found[k].Load(); v > 0 {
				a.Found[inspect.Kind(k).String()] = v
			}
		}
		for k := range c.Done {
			if v := c.Done[k].Load(); v > 0 && k > 0 {
				a.Done[inspect.Action(k).String()] = v
			}
		}
		all[key] = a
	}
	return all
}

// watch looks at the requests of one connection.
type watch struct {
	a       *arrival
	e       *entry // nil if there is none
	key     string
	outward bool // what the sandbox itself dials, not who calls it

	mu      sync.Mutex // the responses' goroutine asks for the caller
	service *inspect.Service
	caller  *inspect.Caller
	address string // of the instance that calls, as long as it counts as arrived
	counted uint64 // of what was sent
	frozen  bool   // before the beginning of a body was there

	q      inspect.Query
	body   []byte
	reader *hessian.Reader
	copied mirrored
}

// ready tells whether requests are looked at now. The plan may have changed
// since the last.
func (w *watch) ready() bool {
	var now *inspect.Service
	if s := w.a.p.directory.Load().services[w.key]; s != nil {
		now = s.inspected
	}
	if now == w.service {
		return now != nil
	}
	w.forget()
	if now == nil {
		return false
	}
	p := w.a.p
	k := inspect.CallerKey{Identity: w.a.who.peerIdentity, Instance: w.a.who.peerInstance}
	if source, err := netip.ParseAddrPort(w.a.ev.Source); err == nil && k.Instance == "" {
		k.Instance = source.Addr().String()
	}
	w.mu.Lock()
	w.service, w.caller = now, now.Caller(k, p.analysis.now())
	w.mu.Unlock()
	w.arrive()
	return true
}

// arrive compares where the caller is with where it should be, and is already.
func (w *watch) arrive() {
	source, err := netip.ParseAddrPort(w.a.ev.Source)
	via, err2 := netip.ParseAddrPort(w.a.via)
	if err != nil || err2 != nil || source == via {
		return // no proxy speaks for it
	}
	strange, address := "", source.Addr().String()
	i, planned := w.a.p.directory.Load().endpoints[source.Addr()]
	if planned && i.identity != w.a.who.peerIdentity {
		// Not noted as being there: whoever does belong there is not two for it.
		strange = "its address " + address + " belongs to " + i.identity
	} else {
		w.address = address
		strange = w.service.Arrive(address, w.a.who.peerIdentity, via.Addr().String(), planned)
	}
	if strange == "" {
		return
	}
	if v := w.caller.Strange(inspect.Hijack, strange, w.a.p.analysis.now()); v.Action != inspect.None {
		w.act(w.caller, &v, "", nil)
	}
}

// refused looks for who tries what it may not: a caller of this sandbox, or the
// workload in it that dials around.
func (n *analysis) refused(sb *sandbox, ev api.Event) {
	facts := sb.facts.Load()
	d := sb.p.directory.Load()
	s := d.services[serviceKey(facts.Namespace, facts.Service)]
	if s == nil || s.inspected == nil {
		return
	}
	who := party{instance: facts.Instance, identity: facts.Identity, peerIdentity: ev.Peer}
	name := ""
	outward := ev.Kind == api.EventEgressRefused
	switch {
	case outward:
		who.peerIdentity, who.peerInstance = facts.Identity, facts.Instance
		ev.Peer = facts.Identity
	case ev.Kind == api.EventAccessDenied && ev.Peer != "" && ev.Peer != s.Identity:
		if source, err := netip.ParseAddrPort(ev.Source); err == nil {
			who.peerInstance = d.callerInstance(source.Addr(), ev.Peer)
			name = source.Addr().String()
		}
	default:
		return
	}
	c := s.inspected.Caller(inspect.CallerKey{Identity: who.peerIdentity, Instance: cmp.Or(who.peerInstance, name)}, n.now())
	defer c.Leave()
	v := c.Missed(inspect.Hash(ev.Destination+ev.Reason), n.now())
	if outward {
		v = c.Reached(inspect.Hash(ev.Destination), n.now())
	}
	if v.Action != inspect.None {
		w := &watch{a: &arrival{p: sb.p, sb: sb, who: who, ev: ev}, outward: outward}
		w.act(c, &v, "", nil)
	}
}

// leave ends the watch of a connection.
func (w *watch) leave() {
	w.forget()
	w.copied.end()
}

// forget gives back what is known of the caller.
func (w *watch) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.caller != nil {
		w.sentLocked()
		w.caller.Leave()
	}
	if w.address != "" {
		w.service.Depart(w.address)
	}
	w.service, w.caller, w.address = nil, nil, ""
}

// sentLocked counts what was sent since the last time.
func (w *watch) sentLocked() {
	if n := w.e.sent.Load(); w.caller != nil {
		w.caller.Sent(n - w.counted)
		w.counted = n
	}
}

// errInspected ends a request in the middle of its body.
var errInspected = errors.New("the body of the request was found out of the ordinary")

// request looks at a request of HTTP/1 and what is there of its body, which it
// waits for as far as the client must send it anyway. Status 0 lets it pass.
func (w *watch) request(x *exchange, in *http1.Reader, h *http1.Head, r *refusal) (status int, asked inspect.Asked) {
	if w == nil || !w.ready() {
		return 0, asked
	}
	if left, shed := w.caller.Shed(w.a.p.analysis.now()); shed {
		return w.shed(r, left), asked
	}
	w.frozen = false
	q := &w.q
	q.Begin(w.service, w.a.port, w.a.p.analysis.now())
	inspect.Target(q, h.Method, h.Target)
	kind, plain := w.fields(h.Raw)
	if h.Framing != http1.NoBody && plain && q.Wants() > 0 {
		body, size := w.prefix(x, in, h, q.Wants())
		q.Body(kind, body, size)
	}
	v := q.Judge(w.caller)
	asked = q.Asked(inspect.Hash(h.Target))
	if v.Action == inspect.None {
		return 0, asked
	}
	return w.act(w.caller, &v, said(h.Method, h.Target), r), asked
}

// fields looks at the fields of a head, and tells how a body is written and
// whether it can be read.
func (w *watch) fields(head []byte) (kind inspect.BodyKind, plain bool) {
	plain = true
	_, rest, _ := bytes.Cut(head, []byte("\r\n"))
	for len(rest) > 2 {
		line, after, _ := bytes.Cut(rest, []byte("\r\n"))
		rest = after
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case http1.Is(name, "Content-Type"):
			kind = bodyKind(value)
		case http1.Is(name, "Content-Encoding"):
			plain = http1.Is(value, "identity")
		}
		inspect.Field(&w.q, name, value)
	}
	return kind, plain
}

// bodyKind is how a body of a media type is written.
func bodyKind[T string | []byte](media T) inspect.BodyKind {
	n := 0
	for n < len(media) && media[n] != ';' && media[n] != ' ' {
		n++
	}
	var low [64]byte
	if n > len(low) {
		return inspect.Bytes
	}
	for i := range n {
		if low[i] = media[i]; low[i] >= 'A' && low[i] <= 'Z' {
			low[i] |= 0x20
		}
	}
	switch t := low[:n]; {
	case string(t) == "application/json", bytes.HasSuffix(t, []byte("+json")):
		return inspect.JSON
	case string(t) == "application/x-www-form-urlencoded":
		return inspect.Form
	case string(t) == "text/html":
		return inspect.Page
	case bytes.HasPrefix(t, []byte("application/grpc")):
		return inspect.GRPC
	case string(t) == "x-application/hessian", string(t) == "application/x-hessian":
		return inspect.Hessian
	}
	return inspect.Bytes
}

// stopped tells whether the request could not be looked at for a freeze.
func (w *watch) stopped() bool { return w != nil && w.frozen }

// prefix is the beginning of a body. What a client must send without being asked
// is waited for, so that nothing is hidden by sending it a moment later; the rest
// is looked at as it passes.
func (w *watch) prefix(x *exchange, in *http1.Reader, h *http1.Head, most int) (body []byte, size int64) {
	there := in.R.Buffered()
	if h.Framing == http1.Chunked {
		b, _ := in.R.Peek(there)
		return w.unchunk(b, most), -1
	}
	most = int(min(int64(most), h.Length))
	if there < most && !h.Expect {
		t := time.AfterFunc(headTimeout, x.client.abort)
		defer t.Stop()
		// A fault is met again when reading on; but what is frozen goes on later,
		// with the whole of the beginning.
		_, err := in.R.Peek(most)
		w.frozen = errors.Is(err, wire.ErrFrozen)
		there = in.R.Buffered()
	}
	body, _ = in.R.Peek(min(there, most))
	return body, h.Length
}

// unchunk takes what is there of a chunked body out of its framing.
func (w *watch) unchunk(b []byte, most int) []byte {
	var p http1.Payload
	p.Start(http1.Chunked, 0)
	w.body = w.body[:0]
	for len(b) > 0 && len(w.body) < most && !p.Ended() {
		data, used, err := p.Next(b)
		if err != nil || used == 0 {
			break
		}
		w.body = append(w.body, data[:min(len(data), most-len(w.body))]...)
		b = b[used:]
	}
	return w.body
}

// answered notes the answer to a request of HTTP.
func (w *watch) answered(asked *inspect.Asked, status int) {
	if w == nil {
		return
	}
	w.mu.Lock()
	c := w.caller
	w.mu.Unlock()
	if c == nil {
		return
	}
	if v := asked.Answered(c, status, w.a.p.analysis.now()); v.Action != inspect.None {
		w.act(c, &v, "", nil)
	}
}

// shed is the answer to who is to stay away.
func (w *watch) shed(r *refusal, left time.Duration) int {
	if r != nil {
		r.Error, r.Reason = "overloaded", "the caller's requests were found out of the ordinary; it is refused for a while"
		r.retry = int(left/time.Second) + 1
	}
	return 503
}

// act does what a verdict says about the request what, and returns the status to
// answer it with, 0 to let it pass.
func (w *watch) act(c *inspect.Caller, v *inspect.Verdict, what string, r *refusal) (status int) {
	ev := w.a.ev
	ev.Kind, ev.Rule, ev.Reason = api.EventFinding, v.Names(), v.String()
	if what != "" {
		ev.Reason = what + ": " + ev.Reason
	}
	p, sb := w.a.p, w.a.sb
	if v.Action == inspect.Observe {
		if !v.Quiet {
			ev.Instance = sb.facts.Load().Instance
			p.events.add(ev)
		}
		return 0
	}
	if r != nil {
		r.Rule = ev.Rule
	}
	status = w.shed(r, c.Shedding())
	if v.Action == inspect.Incident {
		ev.Kind = api.EventIncident
		if v.Own == inspect.Incident {
			ev.Offender = w.a.who.peerInstance
		}
	}
	if !v.Quiet {
		sb.refuse(ev)
	}
	switch v.Action {
	case inspect.Challenge:
		w.challenge()
	case inspect.Cut, inspect.Incident:
		w.cut()
	}
	return status
}

// challenge closes the connections under the caller's, once it could read why:
// whoever connects again proves its identity anew.
func (w *watch) challenge() {
	p, local, who := w.a.p, w.a.sb.facts.Load().Instance, w.a.who
	w.a.p.running.Go(func() {
		select {
		case <-p.context().Done():
		case <-time.After(challengeLinger):
			p.registry.cutIf(func(e *entry) bool {
				if e.kind == kindLink {
					return e.instance == local && e.peerIdentity == who.peerIdentity && (e.peerSerial == who.peerSerial || who.peerSerial == "")
				}
				return e == w.e
			})
		}
	})
}

// cut ends all connections of the caller to the service.
func (w *watch) cut() {
	who := w.a.who
	w.a.p.registry.cutIf(func(e *entry) bool {
		if e == w.e || w.outward {
			return e == w.e || e.kind == kindFlow && e.instance == who.instance && e.direction != "in"
		}
		return e.kind == kindFlow && e.direction == "in" && e.identity == who.identity && who.peerIdentity != anonymous &&
			e.peerIdentity == who.peerIdentity && e.peerInstance == who.peerInstance
	})
}

// analyse looks at what callers were sent.
func (p *Proxy) analyse() {
	by := map[*inspect.Caller]*watch{}
	for _, e := range p.registry.all() {
		if w := e.watch; w != nil {
			w.mu.Lock()
			w.sentLocked()
			by[w.caller] = w
			w.mu.Unlock()
		}
	}
	for _, s := range p.analysis.all() {
		s.Tick(p.analysis.now(), func(c *inspect.Caller, v inspect.Verdict) {
			if w := by[c]; w != nil && v.Action != inspect.None {
				w.act(c, &v, "", nil)
			}
		})
	}
}

func (n *analysis) all() []*inspect.Service {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Values(n.services))
}

// late looks at the rest of a body as it passes to the server: what was not there
// when its head was judged.
func (w *watch) late(to side, h *http1.Head, asked *inspect.Asked) io.Writer {
	if w == nil || h.Framing == http1.NoBody || !w.ready() || w.service.Wants() == 0 {
		return to
	}
	if h.Framing == http1.Length && !h.Expect {
		return to // its beginning was waited for
	}
	t := &tap{w: w, to: to, head: len(h.Raw), asked: *asked, what: said(h.Method, h.Target)}
	kind, plain := w.fields(h.Raw)
	if !plain {
		return to
	}
	t.kind, t.next = kind, 256
	t.payload.Start(h.Framing, h.Length)
	w.body = w.body[:0]
	return t
}

// tap looks at a body on its way. It looks again whenever twice as much of it is
// there, and before its end goes on: so the cost is bounded, and no server has a
// whole request that was not looked at.
type tap struct {
	w       *watch
	to      side
	head    int // bytes of the head still to pass
	asked   inspect.Asked
	what    string
	kind    inspect.BodyKind
	payload http1.Payload
	line    []byte // the beginning of one
	next    int
	done    bool
}

func (t *tap) Write(b []byte) (int, error) {
	if !t.done {
		rest := b[min(t.head, len(b)):]
		t.head -= len(b) - len(rest)
		if err := t.look(rest); err != nil {
			return 0, err
		}
	}
	return t.to.Write(b)
}

func (t *tap) look(b []byte) error {
	w := t.w
	if !w.ready() {
		return nil
	}
	most := w.service.Wants()
	if len(t.line) > 0 {
		b = append(t.line, b...)
		t.line = nil
	}
	for len(b) > 0 && len(w.body) < most && !t.payload.Ended() {
		data, used, err := t.payload.Next(b)
		if err != nil || used == 0 {
			t.line = bytes.Clone(b) // Forward has checked it: it is cut in the middle of a line
			break
		}
		w.body = append(w.body, data[:min(len(data), most-len(w.body))]...)
		b = b[used:]
	}
	t.done = t.payload.Ended() || len(w.body) == most
	if !t.done && len(w.body) < t.next {
		return nil
	}
	t.next = 2 * len(w.body)
	w.q.Resume(w.service, t.asked, w.a.p.analysis.now())
	w.q.Body(t.kind, w.body, -1)
	if v := w.q.Judge(w.caller); v.Action != inspect.None && w.act(w.caller, &v, t.what, nil) != 0 {
		return errInspected
	}
	return nil
}
