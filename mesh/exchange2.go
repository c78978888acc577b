package mesh

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/wire"
)

// speaksHTTP tells whether each request of a port is judged as one of HTTP.
func speaksHTTP(protocol string) bool { return protocol == "http" || protocol == "grpc" }

// begunSide is a side of which the first bytes have been read.
type begunSide struct {
	side
	begun []byte
}

func (b *begunSide) Read(p []byte) (int, error) {
	if len(b.begun) == 0 {
		return b.side.Read(p)
	}
	n := copy(p, b.begun)
	b.begun = b.begun[n:]
	return n, nil
}

// opening reads until it is known whether a client speaks HTTP/2, which for any
// other is at its first or second byte, and gives back a side that still has
// them. It waits for the first byte as long as the client likes.
func opening(c side) (client *begunSide, two bool, err error) {
	b := make([]byte, 0, len(http2.Preface))
	t := time.AfterFunc(time.Hour, c.abort)
	t.Stop()
	defer t.Stop()
	for len(b) < cap(b) {
		n, err := c.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
		if !strings.HasPrefix(http2.Preface, string(b)) {
			return &begunSide{c, b}, false, nil
		}
		if err != nil {
			return &begunSide{c, b}, false, err
		}
		t.Reset(headTimeout)
	}
	return &begunSide{c, b}, true, nil
}

// carrier is a side under an HTTP/2 connection. The client's counts, and ends
// with a cut.
type carrier struct {
	side
	in  io.Reader
	out io.Writer
}

func (c carrier) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c carrier) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c carrier) Abort()                      { c.abort() }
func (c carrier) Finish()                     { c.finish() }

// promptly is a carrier over TCP, that can do without waiting.
type promptly struct {
	carrier
	now func(p []byte) int
}

func (c promptly) WriteNow(p []byte) int { return c.now(p) }

// toGuest carries to a server.
func toGuest(w *wire.Conn) http2.Transport {
	return promptly{carrier{tcpSide{w}, w, w}, w.WriteNow}
}

// toClient carries to a client, and counts.
func (e *entry) toClient(c *begunSide) http2.Transport {
	out := &counter{e, c, &e.sent}
	below := carrier{c, &countingReader{e, c, &e.received}, out}
	t, plain := c.side.(tcpSide)
	if !plain {
		return below
	}
	return promptly{below, func(p []byte) (n int) {
		if !e.cut.Load() {
			n = t.WriteNow(p)
			out.count.Add(uint64(n))
		}
		return n
	}}
}

// exchange2 passes the requests of an HTTP/2 connection to a server, judging
// each. The two connections go with each other: a client whose server takes no
// more requests is told so.
type exchange2 struct {
	a   *arrival
	e   *entry
	key string

	client *http2.Conn
	server *http2.Conn // for the goroutine that reads the client

	mu      sync.Mutex
	still   bool // frozen
	dialled []*dialled
	servers sync.WaitGroup
}

// dialled is a connection to the guest.
type dialled struct {
	conn   *http2.Conn
	wire   *wire.Conn
	frozen bool // its Run has ended for that
}

// asked is what is kept of a request while it is under way.
type asked struct {
	method, path string
	grpc         bool
	look         looked        // at its body, and for its answer
	fields       []http2.Field // kept if some rule reads them
	note         note
	judged
}

// askedOf is what is kept of a request; nothing, if a state of another version
// had nothing.
func askedOf(s *http2.Stream) *asked {
	if q, ok := s.Value.(*asked); ok {
		return q
	}
	return &asked{}
}

// serveHTTP2 judges each request by the plan of the moment. It returns where the
// exchange stands if it was frozen; from is such a return.
func (a *arrival) serveHTTP2(e *entry, key string, client *begunSide, from *exchange2State) *exchange2State {
	x := &exchange2{a: a, e: e, key: key}
	below := e.toClient(client)
	if from != nil {
		if err := x.resume(below, from); err != nil {
			x.malformed(err)
			a.cut()
			return nil
		}
	} else {
		x.client = http2.Server(below, x.clientOptions())
	}
	freeze := x.freeze
	a.engine.Store(&freeze)
	if e.frozen.Load() {
		freeze()
	}
	a.streams.Store(x)
	if from != nil {
		x.judgeAgain(a.p.directory.Load()) // by a plan that has come meanwhile
	}
	for _, d := range x.dialled {
		x.servers.Go(func() { x.listen(d) })
	}
	frozen := errors.Is(x.client.Run(), wire.ErrFrozen)
	if x.server != nil && !frozen {
		x.server.Drain()
		t := time.AfterFunc(headTimeout, x.server.Close) // nobody waits for what is under way
		defer t.Stop()
	}
	x.servers.Wait()
	if frozen {
		return x.state(client)
	}
	for _, d := range x.dialled {
		if d.frozen { // while it was being ended
			d.wire.Abort()
		}
	}
	return nil
}

func (x *exchange2) clientOptions() http2.Options {
	return http2.Options{Request: x.request, Failed: x.failed, Malformed: x.malformed, Data: x.data}
}

// request passes one request on, or answers it.
func (x *exchange2) request(s *http2.Stream, h *http2.Head) {
	if x.e.cut.Load() {
		x.client.Close()
		return
	}
	d := x.a.p.directory.Load()
	q := &asked{method: h.Method, path: h.Path, grpc: h.GRPC(), fields: x.keep(d, h), judged: judged{began: time.Now()}}
	s.Value = q
	q.note = x.a.sight.begin2(h)
	if s := d.services[x.key]; s != nil {
		q.rules = s.rules() // before its keys are read: they may change meanwhile
	}
	v, status := x.judge(d, q)
	if !v.allowed {
		x.a.denied(verdict{rule: v.rule, reason: said(q.method, q.path) + ": " + v.reason})
		r := x.refusal(q)
		r.Error, r.Rule, r.Reason = "access denied", v.rule, v.reason
		x.a.sight.refused2(q, status, &r)
		answer2(s, q, status, r)
		return
	}
	x.a.triedRequest(v, q.method, q.path)
	if x.server == nil || x.server.Err() != nil {
		if err := x.dial(); err != nil {
			r := x.refusal(q)
			r.Error, r.Reason = "unreachable", err.Error()
			x.a.sight.refused2(q, 503, &r)
			answer2(s, q, 503, r)
			return
		}
		if x.a.p.directory.Load() != d { // that took its time: there is another plan
			x.request(s, h)
			return
		}
	}
	if x.look(s, q, h) {
		x.a.sight.refused2(q, 503, &refusal{Error: "found", Reason: "found out of the ordinary"})
		return
	}
	q.note.rule = v.rule
	x.a.sight.carry2(&q.note, h)
	if err := s.Forward(x.server, h); err == http2.ErrBusy {
		s.Reset(http2.CodeRefused) // nobody has looked at it: the client may ask again
	} else if err != nil {
		x.failed(s, err)
	}
	if now := x.a.p.directory.Load(); now != d {
		x.again(now, s) // whoever looked for it has not seen it
	}
}

// judge decides about one request.
func (x *exchange2) judge(d *directory, q *asked) (verdict, int) {
	s := d.services[x.key]
	if s == nil {
		return verdict{reason: "the service is no longer in the plan"}, 403
	}
	c := x.a.call()
	c.letter.two, c.began = q.fields, q.began
	return decideRequest(s, c, &http1.Head{Method: q.method, Target: q.path})
}

// judgeAgain ends the requests under way that a new plan does not allow. gRPC
// knows the code as a lack of permission.
func (x *exchange2) judgeAgain(d *directory) {
	x.client.Each(func(s *http2.Stream) { x.again(d, s) })
}

func (x *exchange2) again(d *directory, s *http2.Stream) {
	q := askedOf(s)
	if now := d.services[x.key]; now != nil && q.by(now) {
		return
	}
	if v, _ := x.judge(d, q); !v.allowed {
		x.a.denied(verdict{rule: v.rule, reason: said(q.method, q.path) + " under way: " + v.reason})
		s.Reset(http2.CodeSecurity)
	}
}

// dial connects to the guest.
func (x *exchange2) dial() error {
	c, err := x.a.connectWithin(x.a.sb.ctx, x.e)
	if err != nil {
		return err
	}
	d := &dialled{wire: c}
	d.conn = http2.Client(toGuest(c), x.serverOptions(d))
	x.server = d.conn
	x.mu.Lock()
	x.dialled = append(x.dialled, d)
	if x.still {
		d.freeze()
	}
	x.mu.Unlock()
	x.servers.Go(func() { x.listen(d) })
	return nil
}

func (x *exchange2) serverOptions(d *dialled) http2.Options {
	return http2.Options{Malformed: x.malformed, Answered: x.answered, Draining: func() {
		if d.conn.Err() == nil { // else it has ended, and the next request asks for another
			x.client.Drain()
		}
	}}
}

// listen serves a connection to the guest to its end.
func (x *exchange2) listen(d *dialled) {
	err := d.conn.Run()
	x.mu.Lock()
	defer x.mu.Unlock()
	if d.frozen = errors.Is(err, wire.ErrFrozen); !d.frozen {
		x.dialled = slices.DeleteFunc(x.dialled, func(other *dialled) bool { return other == d })
	}
}

// failed answers a request whose server is gone.
func (x *exchange2) failed(s *http2.Stream, err error) {
	q := askedOf(s)
	r := x.refusal(q)
	r.Error, r.Reason = "bad gateway", "the server's answer: "+err.Error()
	x.a.sight.failed(&q.note, err)
	answer2(s, q, 502, r)
}

func (x *exchange2) malformed(err error) {
	ev := x.a.ev
	ev.Kind, ev.Reason = api.EventBadRequest, err.Error()
	x.a.sb.refuse(ev)
}

func (x *exchange2) refusal(q *asked) refusal {
	return refusal{Service: x.a.ev.Service, Caller: x.a.who.peerIdentity, Method: q.method, Path: q.path[:min(len(q.path), 256)],
		Hint: "hauberk why " + x.a.sb.facts.Load().Instance}
}

// grpcStatus is how gRPC says what the proxy answers with.
var grpcStatus = map[int]string{400: "3", 403: "7", 405: "12", 502: "14", 503: "14"}

// answer2 gives the proxy's own answer: to a gRPC call in gRPC's words.
func answer2(s *http2.Stream, q *asked, status int, r refusal) {
	fields, body, err := words2(q, status, r)
	if err != nil {
		s.Reset(http2.CodeInternal)
		return
	}
	s.Answer(fields, body)
}

func words2(q *asked, status int, r refusal) (fields []http2.Field, body []byte, err error) {
	if q.grpc {
		fields = []http2.Field{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"},
			{Name: "grpc-status", Value: grpcStatus[status]}, {Name: "grpc-message", Value: grpcMessage(r.Error + ": " + r.Reason + "; try: " + r.Hint)}}
		if r.retry > 0 {
			fields = append(fields, http2.Field{Name: "grpc-retry-pushback-ms", Value: strconv.Itoa(1000 * r.retry)})
		}
		return fields, nil, nil
	}
	if body, err = json.Marshal(r); err != nil {
		return nil, nil, err
	}
	body = append(body, '\n')
	fields = []http2.Field{{Name: ":status", Value: strconv.Itoa(status)}, {Name: "content-type", Value: "application/json"},
		{Name: "content-length", Value: strconv.Itoa(len(body))}}
	if r.retry > 0 {
		fields = append(fields, http2.Field{Name: "retry-after", Value: strconv.Itoa(r.retry)})
	}
	if q.method == "HEAD" {
		body = nil
	}
	return fields, body, nil
}

// grpcMessage encodes a message as gRPC wants it in a header.
func grpcMessage(s string) string {
	const hex = "0123456789ABCDEF"
	s = s[:min(len(s), 1024)]
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			b.Write([]byte{'%', hex[c>>4], hex[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// refuseHTTP2 answers the first request of a connection that goes nowhere, and
// closes.
func refuseHTTP2(c *net.TCPConn, client side, r refusal) {
	c.SetDeadline(time.Now().Add(askTime + lingerTime))
	var h *http2.Conn
	h = http2.Server(carrier{client, client, client}, http2.Options{Request: func(s *http2.Stream, head *http2.Head) {
		q := &asked{method: head.Method, path: head.Path, grpc: head.GRPC()}
		r.Method, r.Path = q.method, q.path[:min(len(q.path), 256)]
		answer2(s, q, 503, r)
		h.Drain()
	}})
	h.Run()
}
