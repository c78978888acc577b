package alone

import (
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
)

// maxSessions bounds the requests of one connection that are being served, those
// included that the client has reset and that have not noticed yet.
const maxSessions = 2 * http2.MaxStreams

// multiplex is a client's connection that speaks HTTP/2: a session for each
// stream.
type multiplex struct {
	p             *Proxy
	l             *listener
	conn          *http2.Conn
	tls           bool
	client, local netip.AddrPort
	clientText    []byte
	peer          *peer

	pending []*session // for the goroutine that reads: until all that has come is read
	rings   rings
	open    atomic.Int64
	used    atomic.Int64 // when a request began or ended, in Unix nanoseconds
	under   sync.WaitGroup
}

// speaksTwo says whether a client that has sent b speaks HTTP/2, and whether more
// must come to tell.
func speaksTwo(b []byte) (yes, unsure bool) {
	n := min(len(b), len(http2.Preface))
	if !strings.HasPrefix(http2.Preface, string(b[:n])) {
		return false, false
	}
	return n == len(http2.Preface), n < len(http2.Preface)
}

// serveTwo serves a connection of HTTP/2 to its end.
func (p *Proxy) serveTwo(l *listener, c *client, conn net.Conn, tcp *net.TCPConn, of *session) {
	x := &multiplex{p: p, l: l, tls: of.tls, client: of.client, local: of.local, clientText: of.clientText, peer: of.peer}
	x.used.Store(time.Now().UnixNano())
	x.conn = http2.Server(below(conn, tcp, nil, !of.tls), http2.Options{Request: x.request, Settled: x.settled, Failed: func(s *http2.Stream, _ error) { s.Reset(http2.CodeInternal) },
		Malformed: func(err error) {
			p.log.Debug("malformed HTTP/2", "listener", l.name(), "client", x.client, "err", err)
		}})
	c.two.Store(x)
	if p.stopping.Load() || p.leaving.Load() || l.gone.Load() {
		x.conn.Drain()
	}
	x.conn.Run()
	x.under.Wait()
}

// request takes a request on. Its session begins when all that has come is read:
// most bodies are whole by then.
func (x *multiplex) request(st *http2.Stream, h *http2.Head) {
	if x.open.Add(1) > maxSessions {
		x.open.Add(-1)
		st.Reset(http2.CodeRefused)
		return
	}
	s := sessions.Get().(*session)
	s.of, s.p, s.l, s.tls, s.client, s.local, s.clientText, s.peer = x, x.p, x.l, x.tls, x.client, x.local, x.clientText, x.peer
	t := &asking{}
	t.s, t.rings = st, &x.rings
	t.peerEnd = h.End
	s.two, s.conn, s.in.r, s.out.w = t, t, t, t
	s.in.take()
	head := appendRequest(s.in.b[:0], h)
	s.in.end = min(len(head), blockSize)
	s.long = len(head) > maxHead
	st.Receive(t)
	x.pending = append(x.pending, s)
}

func (x *multiplex) settled() {
	x.rings.all()
	for i, s := range x.pending {
		x.pending[i] = nil
		x.under.Add(1)
		x.p.hands.serve(s)
	}
	x.pending = x.pending[:0]
}

// idle says whether nothing has been asked since.
func (x *multiplex) idle(since time.Time) bool {
	return x.open.Load() == 0 && x.used.Load() < since.UnixNano()
}

// sessions are those of streams, at rest.
var sessions = sync.Pool{New: func() any { return new(session) }}

// serveStream serves the one request of a stream.
func (s *session) serveStream() {
	t, x := s.two, s.of
	defer x.under.Done()
	s.exchange()
	switch {
	case s.aborted && s.expired(): // its words for that
		t.quit(http2.CodeCancel)
	case s.aborted || !t.begun:
		t.quit(http2.CodeInternal)
	default:
		t.quit(http2.CodeNone)
	}
	t.forget()
	s.in.drop()
	s.out.drop()
	s.up.drop()
	*s = session{req: http1.Message{Fields: s.req.Fields[:0]}, resp: http1.Message{Fields: s.resp.Fields[:0]}, path: s.path[:0], named: s.named[:0],
		line: s.line[:0], asked: s.asked[:0], extra: s.extra[:0], cache: caching{key: s.cache.key[:0]}}
	sessions.Put(s)
	x.used.Store(time.Now().UnixNano())
	x.open.Add(-1)
}

// streamHead checks the head of a stream's request, which is there already.
func (s *session) streamHead(w *world) bool {
	limit := int(w.config.Limits.Head)
	if s.long || s.in.end > min(limit, maxHead) {
		s.req.Method, s.req.Target = []byte("-"), []byte("-")
		s.in.drop()
		return s.refuse(431, "request head over the limit", "raise limits.head, up to 16KiB")
	}
	head, _, err := s.in.head(limit)
	if err == nil {
		err = s.req.Request(head)
	}
	s.two.method = s.req.Method
	if err != nil {
		return s.refuse(400, err.Error(), "")
	}
	s.req.Minor = 2
	s.grpc = isGRPC(&s.req)
	_, declared := s.req.Field("Content-Length")
	switch n, whole := s.two.arrived(); {
	case declared:
	case whole && n == 0 && s.two.trailers == nil:
	case whole && n <= blockSize-s.in.hold && s.two.trailers == nil:
		s.req.Framing, s.req.Length = http1.Length, int64(n)
	default: // its end is that of the stream
		s.req.Framing = http1.Chunked
	}
	s.body.Start(s.req.Framing, s.req.Length)
	if s.req.Framing == http1.Chunked {
		s.body.Start(http1.UntilClose, 0)
	}
	return s.target(w)
}

// flush has the client get what was written. The last of it ends a stream.
func (s *session) flush() error {
	if s.two == nil {
		return s.out.flush()
	}
	if s.aborted || s.two.sentEnd {
		return nil
	}
	var b []byte
	if s.out.b != nil {
		b = s.out.b[:s.out.n]
	}
	s.out.n = 0
	s.out.sent += int64(len(b))
	return s.two.last(b, s.after)
}

// left says that the client has given the request up.
func (s *session) left() bool { return s.two != nil && s.two.lost() != nil }
