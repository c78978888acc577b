package mesh

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/otlp"
	"hauberk.dev/mesh/trace"
	"hauberk.dev/mesh/wire"
	"hauberk.dev/plan"
)

// Bounds of what noting requests may cost.
const (
	maxMethod   = 128
	maxPath     = 1024
	maxReason   = 512
	maxServices = 10_000 // that are counted by name
)

// Verdicts of requests.
const (
	verdictAllowed = iota
	verdictDenied
	verdictMalformed
	verdictFailed
	verdicts
)

var verdictNames = [verdicts]string{"allowed", "denied", "malformed", "failed"}

// observer notes requests where they arrive.
type observer struct {
	now  atomic.Pointer[noting]
	taps atomic.Int32 // so that nobody takes the lock who need not

	patience time.Duration // with who taps and does not ask

	mu       sync.Mutex
	rings    map[uint64]*tapRing
	services map[string]*serviceCounts
	log      requestLog

	recorded, unrecorded atomic.Uint64 // requests that a collector was told of, or not
	untraced             atomic.Uint64 // calls whose trace could not be carried on, or not told of
	waiting              atomic.Int64  // calls that are followed to their answer
}

// noting is what a plan wants to be noted.
type noting struct {
	plan.Observe
	exporter *trace.Exporter
	stop     func()
	records  *otlp.Logs
	end      func() // of records
}

// follow takes up what a new plan says.
func (o *observer) follow(p *Proxy, want *plan.Observe) {
	n, old := &noting{}, o.now.Load()
	if want != nil {
		n.Observe = *want
	}
	collector := ""
	if n.Traces != nil {
		collector = n.Traces.Collector
	}
	switch {
	case old != nil && old.exporter != nil && old.exporter.Address() == collector:
		n.exporter, n.stop = old.exporter, old.stop
	case collector != "":
		n.exporter = trace.NewExporter(collector, nil)
		n.stop = p.start(n.exporter.Run)
	}
	o.collect(p, n, old)
	o.now.Store(n)
	if old != nil && old.exporter != nil && old.exporter != n.exporter {
		old.stop()
	}
	if old != nil && old.records != nil && old.records != n.records {
		old.end()
	}
}

// collect has the collector of the log told of requests, if there is one.
func (o *observer) collect(p *Proxy, n, old *noting) {
	c := n.LogCollector
	switch {
	case c == nil:
	case old != nil && old.LogCollector != nil && *old.LogCollector == *c:
		n.records, n.end = old.records, old.end
	default:
		over, err := collectorTLS(c)
		if err != nil { // never: the plan was checked
			p.log.Warn("no log is told to its collector", "err", err)
			return
		}
		n.records = otlp.NewLogs(c.Address, over, "hauberk-mesh", &o.recorded, &o.unrecorded)
		n.end = p.start(n.records.Run)
	}
}

// collectorTLS is how a collector is spoken to, nil for in the clear.
func collectorTLS(c *plan.Collector) (*tls.Config, error) {
	host, _, err := net.SplitHostPort(c.Address)
	if err != nil {
		return nil, fmt.Errorf("collector %q: %w", c.Address, err)
	}
	if c.Authorities == "" {
		return nil, nil
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM([]byte(c.Authorities)) {
		return nil, fmt.Errorf("collector %q: its authorities hold no certificate in PEM", c.Address)
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: host, NextProtos: []string{"http/1.1"}}, nil
}

// close ends what was begun.
func (o *observer) close() {
	n := o.now.Swap(nil)
	if n != nil && n.exporter != nil {
		n.stop()
	}
	if n != nil && n.records != nil {
		n.end()
	}
}

// look begins to note the requests of a connection.
func (o *observer) look(a *arrival) *sight {
	c := o.countsOf(a.ev.Service)
	if a.counts.Since.IsZero() { // else it arrived before it was frozen
		c.connections.Add(1)
	}
	return &sight{a: a, o: o, counts: c, service: a.ev.Service, protocol: a.protocol}
}

func (o *observer) countsOf(service string) *serviceCounts {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.services[service]
	if c == nil {
		if o.services == nil {
			o.services = map[string]*serviceCounts{}
		}
		if len(o.services) >= maxServices {
			service = "other"
		}
		if c = o.services[service]; c == nil {
			c = &serviceCounts{}
			o.services[service] = c
		}
	}
	return c
}

// sight notes the requests of one connection. The nil one notes nothing.
type sight struct {
	a        *arrival
	o        *observer
	counts   *serviceCounts
	service  string
	protocol string

	now note // of the request of HTTP/1 that is being judged

	// Of the call that is being judged, what it is for and the verdict.
	call    call
	verdict verdict
	calls   calls
	room    []byte // for a frame that is made longer
}

// note is what is kept of a request until it is answered.
type note struct {
	begin        time.Time
	method, path string
	rule         string
	grpc, done   bool
	received     int64
	trace        *trace.Context
	header       []api.Header
}

// noteState is a note as plain data. A process that does not know it loses the
// note, and nothing else.
type noteState struct {
	Begin    time.Time      `json:"begin"`
	Method   string         `json:"method,omitempty"`
	Path     string         `json:"path,omitempty"`
	Rule     string         `json:"rule,omitempty"`
	GRPC     bool           `json:"grpc,omitempty"`
	Done     bool           `json:"done,omitempty"`
	Received int64          `json:"received,omitempty"`
	Trace    *trace.Context `json:"trace,omitempty"`
	Header   []api.Header   `json:"header,omitempty"`
}

func (n *note) state() *noteState {
	if n.begin.IsZero() {
		return nil
	}
	return &noteState{n.begin, shorter(n.method, maxMethod), shorter(pathOf(n.path), maxPath), n.rule, n.grpc, n.done, n.received, n.trace, n.header}
}

// note goes on with a note. Its time goes by the clock of this process from here
// on, so that it cannot run backwards.
func (s *noteState) note() note {
	if s == nil || s.Begin.IsZero() {
		return note{}
	}
	now := time.Now()
	return note{now.Add(-max(now.Sub(s.Begin), 0)), s.Method, s.Path, s.Rule, s.GRPC, s.Done, s.Received, s.Trace, s.Header}
}

// pathOf is a target as it is told: what comes after a question mark is often a
// secret.
func pathOf(target string) string {
	path, _, _ := strings.Cut(target, "?")
	return path
}

func shorter(s string, most int) string { return s[:min(len(s), most)] }

// begin notes a request of HTTP/1 whose head is there.
func (s *sight) begin(h *http1.Head) {
	if s == nil {
		return
	}
	s.now = note{begin: time.Now(), method: h.Method, path: h.Target, received: int64(len(h.Raw)) + h.Length}
	if s.o.taps.Load() > 0 {
		s.now.header = s.shown(letter{one: h})
	}
}

// passed ends the judging of a request that goes on, and carries its trace on.
func (s *sight) passed(h *http1.Head) note {
	if s == nil {
		return note{}
	}
	if t := s.tracing(); t != nil {
		var r trace.Reader
		letter{one: h}.each(r.Field)
		c := s.next(&r, t)
		h.Raw = c.Rewrite(h.Raw)
		s.now.trace = &c
	}
	n := s.now
	s.now = note{}
	return n
}

// next is this hop of the trace that was read. Who has proved no identity has no
// say in whether it is sampled: that costs us, not them.
func (s *sight) next(r *trace.Reader, t *plan.Traces) trace.Context {
	c := r.Next(t.PerMille)
	s.believe(&c, t)
	return c
}

func (s *sight) believe(c *trace.Context, t *plan.Traces) {
	if c.Parent != [8]byte{} && s.a.who.peerIdentity == anonymous {
		c.Sampled = trace.Sample(t.PerMille)
	}
}

func (s *sight) tracing() *plan.Traces {
	if n := s.o.now.Load(); n != nil {
		return n.Traces
	}
	return nil
}

// refused notes the request that is being judged as answered here.
func (s *sight) refused(status int, r *refusal) {
	if s == nil || s.now.begin.IsZero() {
		return
	}
	n := s.now
	s.now = note{}
	n.rule = r.Rule
	s.end(&n, verdictOf(status, r.Error), status, "", 0, r.Reason)
}

func verdictOf(status int, what string) int {
	switch {
	case what == "unreachable" || status == 502:
		return verdictFailed
	case status == 400:
		return verdictMalformed
	}
	return verdictDenied
}

// ended notes the answer of a server.
func (s *sight) ended(n *note, status int, grpc string, sent uint64) {
	if s != nil && !n.begin.IsZero() && !n.done {
		n.done = true
		s.end(n, verdictAllowed, status, grpc, int64(sent), "")
	}
}

// replied notes the end of an answer of HTTP/1, unless another process goes on
// with it.
func (s *sight) replied(n *note, status int, sent uint64, err error) {
	switch {
	case err == nil:
		s.ended(n, status, "", sent)
	case !errors.Is(err, wire.ErrFrozen):
		s.failed(n, err)
	}
}

// failed notes a request whose server gave no answer.
func (s *sight) failed(n *note, err error) {
	if s != nil && !n.begin.IsZero() && !n.done {
		n.done = true
		s.end(n, verdictFailed, 502, "", 0, err.Error())
	}
}

// begin2 notes a request of HTTP/2.
func (s *sight) begin2(h *http2.Head) note {
	if s == nil {
		return note{}
	}
	n := note{begin: time.Now(), method: h.Method, path: h.Path, grpc: h.GRPC(), received: max(h.Length, 0)}
	if s.o.taps.Load() > 0 {
		n.header = s.shown(letter{two: h.Fields})
	}
	return n
}

func (s *sight) refused2(q *asked, status int, r *refusal) {
	if s == nil {
		return
	}
	grpc := ""
	if q.grpc {
		grpc = grpcStatus[status]
	}
	q.note.done, q.note.rule = true, r.Rule
	s.end(&q.note, verdictOf(status, r.Error), status, grpc, 0, r.Reason)
}

// carry2 carries the trace of a request on.
func (s *sight) carry2(n *note, h *http2.Head) {
	if s == nil {
		return
	}
	t := s.tracing()
	if t == nil {
		return
	}
	var r trace.Reader
	letter{two: h.Fields}.each(r.Field)
	c := s.next(&r, t)
	fields := slices.DeleteFunc(slices.Clone(h.Fields), func(f http2.Field) bool { return c.Replaces([]byte(f.Name)) })
	for _, f := range c.Fields() {
		fields = append(fields, http2.Field{Name: f[0], Value: f[1]})
	}
	h.Fields, n.trace = fields, &c
}

// answered2 notes the head of an answer, which of gRPC tells nothing before its
// status is there.
func (s *sight) answered2(q *asked, status int, fields []http2.Field) {
	if s == nil || status != 0 && status < 200 {
		return
	}
	if q.grpc {
		for i := range fields {
			if fields[i].Name == "grpc-status" {
				s.ended(&q.note, 200, grpcCode(fields[i].Value), 0)
			}
		}
		return
	}
	if status != 0 {
		s.ended(&q.note, status, "", 0)
	}
}

// judged keeps the verdict on a request of an RPC protocol, and notes one that was
// refused.
func (s *sight) judged(codec rpcCodec, c call, v verdict) {
	if s == nil {
		return
	}
	if s.call, s.verdict = c, v; !v.allowed {
		s.fails(codec, verdictDenied, v.reason)
	}
}

func (s *sight) logs() bool {
	n := s.o.now.Load()
	return n != nil && (n.Log != "" || n.records != nil)
}

// end counts a request and tells who wants to know.
func (s *sight) end(n *note, verdict, status int, grpc string, sent int64, reason string) {
	s.counts.count(s.protocol, status, grpc, verdict, time.Since(n.begin))
	if s.o.taps.Load() == 0 && !s.logs() && n.trace == nil {
		return
	}
	s.tell(n, s.request(n, verdict, status, grpc, sent, reason))
}

func (s *sight) request(n *note, verdict, status int, grpc string, sent int64, reason string) api.Request {
	facts := s.a.sb.facts.Load()
	r := api.Request{At: n.begin, Instance: facts.Instance, Service: s.service, Protocol: s.protocol, Peer: s.a.who.peerIdentity, Source: s.a.ev.Source,
		Method: shorter(n.method, maxMethod), Path: shorter(pathOf(n.path), maxPath), Verdict: verdictNames[verdict], Rule: n.rule, Reason: shorter(reason, maxReason), Status: status, GRPC: grpc,
		Received: n.received, Sent: sent, Micros: time.Since(n.begin).Microseconds()}
	if n.trace != nil {
		r.Trace = n.trace.ID()
	}
	return r
}

func (s *sight) tell(n *note, r api.Request) {
	now := s.o.now.Load()
	exported, tapped := now != nil && now.exporter != nil && n.trace != nil && n.trace.Sampled, s.o.taps.Load() > 0
	if exported || tapped { // who keeps it keeps what it says, and not what that was cut from
		r.Method, r.Path, r.Reason, r.GRPC = strings.Clone(r.Method), strings.Clone(r.Path), strings.Clone(r.Reason), strings.Clone(r.GRPC)
	}
	if exported {
		status := strconv.Itoa(r.Status)
		if r.GRPC != "" {
			status = ""
		}
		now.exporter.Add(trace.Hop{Context: *n.trace, Name: strings.TrimSpace(r.Method + " " + r.Service), Begin: r.At, End: time.Now(),
			Failed: r.Verdict != verdictNames[verdictAllowed] || r.Status >= 500 || r.GRPC != "" && r.GRPC != "0",
			Attributes: [][2]string{{"http.request.method", r.Method}, {"url.path", r.Path}, {"http.response.status_code", status}, {"rpc.grpc.status_code", r.GRPC},
				{"hauberk.service", r.Service}, {"hauberk.instance", r.Instance}, {"hauberk.peer", r.Peer}, {"hauberk.verdict", r.Verdict}, {"hauberk.rule", r.Rule},
				{"sofa.trace_id", n.trace.SofaTrace}, {"sofa.rpc_id", n.trace.SofaSpan}}})
	}
	s.log(n, r)
}

// log tells who has requests logged or taps them.
func (s *sight) log(n *note, r api.Request) {
	now := s.o.now.Load()
	if now != nil && now.Log != "" {
		s.o.log.add(s.a.p, now.Log, &r)
	}
	if now != nil && now.records != nil {
		record(now.records, n, &r)
	}
	if s.o.taps.Load() > 0 {
		r.Header = n.header
		s.o.tapped(r)
	}
}

// record tells a collector of a request.
func record(to *otlp.Logs, n *note, r *api.Request) {
	severity := otlp.Info
	switch {
	case r.Verdict == verdictNames[verdictFailed] || r.Status >= 500:
		severity = otlp.Error
	case r.Verdict != verdictNames[verdictAllowed] || r.Status >= 400:
		severity = otlp.Warn
	}
	text := func(key, value string) otlp.Attribute { return otlp.Attribute{Key: key, Text: []byte(value)} }
	x := otlp.Record{At: r.At, Severity: severity, Body: "request", Attributes: []otlp.Attribute{text("http.request.method", r.Method), text("url.path", r.Path),
		text("network.protocol.name", r.Protocol), text("client.address", r.Source), text("rpc.grpc.status_code", r.GRPC), text("hauberk.service", r.Service),
		text("hauberk.instance", r.Instance), text("hauberk.peer", r.Peer), text("hauberk.verdict", r.Verdict), text("hauberk.rule", r.Rule), text("hauberk.reason", r.Reason),
		{Key: "http.response.status_code", Number: int64(r.Status)}, {Key: "http.request.body.size", Number: r.Received}, {Key: "http.response.size", Number: r.Sent},
		{Key: "hauberk.micros", Number: r.Micros}}}
	if n.trace != nil {
		x.Trace, x.Span, x.Sampled = n.trace.Trace, n.trace.Span, n.trace.Sampled
	}
	to.Add(&x)
}

// service is what the plan says of the called one, nil if nothing any more.
func (a *arrival) service() *service {
	facts := a.sb.facts.Load()
	return a.p.directory.Load().services[serviceKey(facts.Namespace, facts.Service)]
}

// said is a request as events tell it. What comes after a question mark is often
// a secret.
func said(method, target string) string {
	return fmt.Sprintf("%s %.128q", method, pathOf(target))
}

// grpcCode is a code that a server gave, or UNKNOWN where it is none.
func grpcCode(s string) string {
	if n, err := strconv.ParseUint(s, 10, 8); err != nil || len(s) > 2 || n > 99 {
		return "2"
	}
	return s
}
