package mesh

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
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

// exchange2 passes the requests of an HTTP/2 connection to a server, judging
// each. The two connections go with each other: a client whose server takes no
// more requests is told so.
type exchange2 struct {
	a   *arrival
	e   *entry
	key string

	client  *http2.Conn
	server  *http2.Conn // for the goroutine that reads the client
	servers sync.WaitGroup
}

// asked is what is kept of a request while it is under way.
type asked struct {
	method, path string
	grpc         bool
}

// serveHTTP2 judges each request by the plan of the moment.
func (a *arrival) serveHTTP2(e *entry, key string, client side) {
	x := &exchange2{a: a, e: e, key: key}
	below := carrier{client, &countingReader{e, client, &e.received}, &counter{e, client, &e.sent}}
	x.client = http2.Server(below, http2.Options{Request: x.request, Failed: x.failed, Malformed: x.malformed})
	a.streams.Store(x)
	x.client.Run()
	if x.server != nil {
		x.server.Drain()
		t := time.AfterFunc(headTimeout, x.server.Close) // nobody waits for what is under way
		defer t.Stop()
	}
	x.servers.Wait()
}

// request passes one request on, or answers it.
func (x *exchange2) request(s *http2.Stream, h *http2.Head) {
	if x.e.cut.Load() {
		x.client.Close()
		return
	}
	q := &asked{h.Method, h.Path, h.GRPC()}
	s.Value = q
	d := x.a.p.directory.Load()
	v, status := x.judge(d, q)
	if !v.allowed {
		x.a.denied(verdict{rule: v.rule, reason: fmt.Sprintf("%s %.128q: %s", q.method, q.path, v.reason)})
		r := x.refusal(q)
		r.Error, r.Rule, r.Reason = "access denied", v.rule, v.reason
		answer2(s, q, status, r)
		return
	}
	if x.server == nil || x.server.Err() != nil {
		if err := x.dial(); err != nil {
			r := x.refusal(q)
			r.Error, r.Reason = "unreachable", err.Error()
			answer2(s, q, 503, r)
			return
		}
		if x.a.p.directory.Load() != d { // that took its time: there is another plan
			x.request(s, h)
			return
		}
	}
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
	return decideRequest(s, x.a.who.peerIdentity, x.a.port, &http1.Head{Method: q.method, Target: q.path})
}

// judgeAgain ends the requests under way that a new plan does not allow. gRPC
// knows the code as a lack of permission.
func (x *exchange2) judgeAgain(d *directory) {
	x.client.Each(func(s *http2.Stream) { x.again(d, s) })
}

func (x *exchange2) again(d *directory, s *http2.Stream) {
	q := s.Value.(*asked)
	if v, _ := x.judge(d, q); !v.allowed {
		x.a.denied(verdict{rule: v.rule, reason: fmt.Sprintf("%s %.128q under way: %s", q.method, q.path, v.reason)})
		s.Reset(http2.CodeSecurity)
	}
}

// dial connects to the guest.
func (x *exchange2) dial() error {
	c, err := x.a.connect(x.e)
	if err != nil {
		return err
	}
	var server *http2.Conn
	server = http2.Client(carrier{tcpSide{c}, c, c}, http2.Options{Malformed: x.malformed, Draining: func() {
		if server.Err() == nil { // else it has ended, and the next request asks for another
			x.client.Drain()
		}
	}})
	x.server = server
	x.servers.Go(func() { server.Run() })
	return nil
}

// failed answers a request whose server is gone.
func (x *exchange2) failed(s *http2.Stream, err error) {
	q := s.Value.(*asked)
	r := x.refusal(q)
	r.Error, r.Reason = "bad gateway", "the server's answer: "+err.Error()
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
	if q.grpc {
		s.Answer([]http2.Field{{Name: ":status", Value: "200"}, {Name: "content-type", Value: "application/grpc"},
			{Name: "grpc-status", Value: grpcStatus[status]}, {Name: "grpc-message", Value: grpcMessage(r.Error + ": " + r.Reason + "; try: " + r.Hint)}}, nil)
		return
	}
	body, err := json.Marshal(r)
	if err != nil {
		s.Reset(http2.CodeInternal)
		return
	}
	body = append(body, '\n')
	fields := []http2.Field{{Name: ":status", Value: strconv.Itoa(status)}, {Name: "content-type", Value: "application/json"},
		{Name: "content-length", Value: strconv.Itoa(len(body))}}
	if q.method == "HEAD" {
		body = nil
	}
	s.Answer(fields, body)
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
		q := &asked{head.Method, head.Path, head.GRPC()}
		r.Method, r.Path = q.method, q.path[:min(len(q.path), 256)]
		answer2(s, q, 503, r)
		h.Drain()
	}})
	h.Run()
}
