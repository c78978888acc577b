package alone

import (
	"crypto/tls"
	"errors"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/route"
)

// Patience with clients that are told something they may not read.
const (
	lingerTime  = time.Second
	lingerBytes = 256 << 10
)

// States of a session, so that a stop ends those nobody waits for.
const (
	idle int32 = iota
	busy
	stopped
)

// session is one client connection that speaks HTTP. One goroutine reads a
// request, passes it on, reads the answer and passes that back; nothing is
// allocated for a request that is only passed on.
type session struct {
	p    *Proxy
	l    *listener
	conn net.Conn
	tcp  *net.TCPConn
	raw  syscall.RawConn
	tls  bool

	client, local netip.AddrPort
	clientText    []byte // of its address

	two    *asking    // of HTTP/2: the stream that is served
	of     *multiplex // and its connection
	long   bool       // its head is over every limit
	grpc   bool
	code   int       // status of a call of gRPC
	taken  int       // bytes of a message that becomes another, counted in p.held
	until  time.Time // the client waits no longer; zero: it does not say
	cache  caching
	extra  []byte        // fields of the proxy's own
	peer   *peer         // nil if the client has shown no certificate
	after  []http2.Field // trailers of the answer
	state  atomic.Int32
	used   bool       // it has had a request
	stays  bool       // it could not be handed on
	moving sync.Mutex // for stays, and what part does for want of it
	parted bool       // its bytes go through another process now
	c      *client    // nil of HTTP/2
	in     inflow
	out    outflow
	one    [1]byte
	try    func(uintptr) bool
	tried  error

	// Of the request at hand.
	world   *world
	req     http1.Message
	resp    http1.Message
	body    http1.Payload // of the request
	back    http1.Payload // of the answer
	route   route.Request
	path    []byte
	named   [][]byte // by a Connection field
	action  *action
	began   time.Time
	status  int
	got     int64     // bytes of the body received
	server  *endpoint // that was asked last
	sent    int64
	final   bool // no more requests on this connection
	aborted bool // what the client got is not whole
	line    []byte
	why     string
	up      outflow      // to the server
	upload  chan error   // of a body that is passed on while the answer is read
	stopped atomic.Bool  // nobody waits for the upload
	passed  atomic.Bool  // the upload has ended well
	moved   atomic.Int64 // when something of the answer came, in Unix nanoseconds
	asked   []*balance.Host
	outcome balance.Outcome // of the endpoint that was asked last
	at      chosen          // that endpoint
	racing  *race           // a hedged request whose answer is passed on
	hop     hop             // if requests are followed
}

// serve serves requests to the end of the connection. If it turns out to speak
// HTTP/2, serve gives it back as it was before a byte was read.
func (s *session) serve() (two net.Conn) {
	s.try = s.firstBytes
	for {
		if two := s.requests(); two != nil {
			return two
		}
		if s.parted {
			s.conn.Close() // without a word: the other process has it too
			s.in.drop()
			s.out.drop()
			return nil
		}
		if s.final || s.aborted || !s.movable() {
			break
		}
		if s.moveOn() {
			return nil
		}
		s.stay()
	}
	s.end()
	return nil
}

// requests serves requests until the connection ends or goes on elsewhere.
func (s *session) requests() (two net.Conn) {
	for s.await() {
		if !s.state.CompareAndSwap(idle, busy) {
			break
		}
		if !s.used && s.l.site.Load().l.HTTP2 == "on" && s.opening() {
			early := append([]byte(nil), s.in.waiting()...)
			s.in.drop()
			s.conn.SetDeadline(time.Time{})
			return &preread{s.conn, early}
		}
		s.used = true
		s.exchange()
		if s.final || !s.state.CompareAndSwap(busy, idle) || s.p.stopping.Load() || s.l.gone.Load() {
			break
		}
	}
	return nil
}

// opening says whether the client speaks HTTP/2 without having been asked: for any
// other that is known at its first or second byte.
func (s *session) opening() bool {
	s.conn.SetReadDeadline(time.Now().Add(time.Duration(s.l.site.Load().world.config.Limits.HeadTimeout)))
	for {
		yes, unsure := speaksTwo(s.in.waiting())
		if !unsure {
			return yes
		}
		if s.in.fill() != nil {
			return false // whoever reads the head finds the same
		}
	}
}

// end closes the connection. A client that is still sending gets to read the
// last answer: a plain close would reset it.
func (s *session) end() {
	if s.aborted {
		s.tcp.SetLinger(0)
	} else if s.final {
		s.conn.SetDeadline(time.Now().Add(lingerTime))
		if c, ok := s.conn.(interface{ CloseWrite() error }); ok {
			c.CloseWrite()
		}
		io.CopyN(io.Discard, s.tcp, lingerBytes)
	}
	s.conn.Close()
	s.in.drop()
	s.out.drop()
}

// await waits for the first bytes of a request. It holds no memory meanwhile.
func (s *session) await() bool {
	s.in.hold = 0
	s.in.release()
	if s.movable() {
		return false
	}
	if len(s.in.waiting()) > 0 {
		return true
	}
	s.in.drop()
	s.out.drop()
	s.conn.SetReadDeadline(time.Now().Add(s.l.patience()))
	if s.state.Load() == stopped || s.movable() { // it was told so before the deadline was set
		return false
	}
	if s.raw == nil { // TLS
		if n, err := s.conn.Read(s.one[:]); n == 0 || err != nil {
			return false
		}
		s.in.take()
		s.in.b[0], s.in.end = s.one[0], 1
		return true
	}
	if err := s.raw.Read(s.try); err != nil || s.tried != nil {
		return false
	}
	return true
}

// firstBytes reads into a block, if there is something to read.
func (s *session) firstBytes(fd uintptr) bool {
	s.in.take()
	for {
		n, err := syscall.Read(int(fd), s.in.b[:])
		switch {
		case err == syscall.EINTR:
			continue
		case err == syscall.EAGAIN:
			s.in.drop()
			return false
		case err == nil && n == 0:
			err = io.EOF
		}
		s.in.end = max(n, 0)
		s.tried = err
		return true
	}
}

// exchange serves one request.
func (s *session) exchange() {
	w := s.p.enter()
	defer w.leave()
	site := w.at[s.l.address]
	if site == nil { // nobody is served by what is not configured any more
		s.final, s.aborted = true, true
		if s.two != nil {
			s.two.quit(http2.CodeRefused)
		}
		return
	}
	s.req = http1.Message{Fields: s.req.Fields[:0]} // the one before is a view of bytes that may be gone
	s.world, s.began = site.world, time.Now()
	s.status, s.got, s.sent, s.server, s.action, s.why = 0, 0, 0, nil, nil, ""
	s.grpc, s.code, s.after, s.extra = false, 0, nil, s.extra[:0]
	s.until = time.Time{}
	s.cache = caching{key: s.cache.key[:0]}
	s.hop.on = false
	s.out.sent = 0
	s.route.Path, s.route.Query = nil, nil
	if s.head(w) {
		s.dispatch(site)
	}
	if !s.aborted {
		if err := s.flush(); err != nil {
			s.final, s.aborted = true, true
		}
	}
	s.sent = s.out.sent
	s.note(w)
}

// head reads and checks the head of a request. It answers what it refuses.
func (s *session) head(w *world) bool {
	if s.two != nil {
		return s.streamHead(w)
	}
	limit := int(w.config.Limits.Head)
	if n, _, _ := http1.HeadLength(s.in.waiting(), 0); n == 0 { // not all there yet: do not wait for ever
		s.conn.SetReadDeadline(s.began.Add(time.Duration(w.config.Limits.HeadTimeout)))
	}
	head, begun, err := s.in.head(limit)
	switch {
	case err == nil:
	case errors.Is(err, errHead):
		return s.refuse(431, "request head over the limit", "raise limits.head, up to 16KiB")
	case errors.Is(err, os.ErrDeadlineExceeded) && begun:
		return s.refuse(408, "request head took too long", "")
	case isSyntax(err):
		return s.refuse(400, err.Error(), "")
	case err != nil:
		s.final = true
		return false
	}
	if err := s.req.Request(head); err != nil {
		return s.refuse(400, err.Error(), "")
	}
	s.body.Start(s.req.Framing, s.req.Length)
	s.final = s.req.Close
	return s.target(w)
}

func isSyntax(err error) bool {
	var syntax *http1.SyntaxError
	return errors.As(err, &syntax)
}

// target checks what the request is for.
func (s *session) target(w *world) bool {
	method := s.req.Method
	if string(method) == "CONNECT" || string(method) == "TRACE" {
		return s.refuse(405, "method is not served", "")
	}
	authority, _, query := http1.SplitTarget(s.req.Target)
	if authority != nil && !equalFold(s.req.Host, string(authority)) {
		return s.refuse(400, "Host and the target name different hosts", "")
	}
	if _, err := s.nominated(&s.req); err != nil {
		return s.refuse(400, err.Error(), "")
	}
	s.route.Message, s.route.Query, s.route.Remote, s.route.Scheme = &s.req, query, s.clientText, "http"
	if s.tls {
		s.route.Scheme = "https"
	}
	return true
}

// dispatch finds the route and does what it says.
func (s *session) dispatch(site *site) {
	host := site.hosts.Host(s.req.Host)
	if host == nil {
		s.refuse(421, "no virtual host of that name", `name it under hosts, or one host "*"`)
		return
	}
	path, err := http1.AppendPath(s.path[:0], s.req.Method, s.req.Target, host.Loose)
	if err != nil {
		s.refuse(400, err.Error(), "paths: loose accepts more")
		return
	}
	s.path, s.route.Path = path, path
	found := host.Find(&s.route)
	if found == nil {
		s.refuse(404, "no route matches", "")
		return
	}
	a := *found
	s.action = a
	if t := s.world.traces; t != nil {
		s.follow(t)
	}
	if a.limit != nil {
		if ok, wait := a.limit.allow(s.client.Addr(), s.began); !ok {
			a.stats.limited.Add(1)
			s.tooMany(wait)
			return
		}
	}
	if len(a.global) > 0 && !s.withinGlobal(a) {
		return
	}
	if s.req.Framing == http1.Length && s.req.Length > s.longest(a) {
		s.refuse(413, "request body over the limit", "raise body of the route")
		return
	}
	switch {
	case a.redirect != nil:
		s.redirect(a)
	case a.static != nil:
		s.file(a)
	case a.route.Respond != nil:
		s.respond(a)
	case a.schema != nil && a.toJSON && s.grpc:
		s.callJSON(a)
	case a.schema != nil && !a.toJSON && !s.grpc:
		s.transcode(a)
	case a.bolt != nil:
		s.callBolt(a)
	case a.route.Cache != nil:
		s.forwardCached(a)
	default:
		s.forward(a)
	}
}

// longest is how long the body of a request may be. A call of gRPC may go on for
// ever: its messages are bounded by their windows.
func (s *session) longest(a *action) int64 {
	if s.grpc {
		return math.MaxInt64
	}
	return int64(a.route.Body)
}

// note counts and logs the request.
func (s *session) note(w *world) {
	took := time.Since(s.began)
	st := s.p.stats.other
	if s.action != nil {
		st = s.action.stats
	}
	if s.status == 0 && s.action == nil && s.final {
		return // it asked nothing
	}
	st.note(s.status, s.got, s.sent, took)
	if s.hop.sampled(w.traces) {
		s.tell(w.traces, took)
	}
	if w.log != nil {
		s.line = s.appendLine(s.line[:0], w.log.json, took)
		w.log.add(s.line)
	}
	if w.records != nil {
		s.record(w.records, took)
	}
}

func newSession(p *Proxy, l *listener, conn net.Conn, tcp *net.TCPConn, client, local netip.AddrPort) (*session, error) {
	s := &session{p: p, l: l, conn: conn, tcp: tcp, client: client, local: local}
	s.clientText = client.Addr().AppendTo(nil)
	s.in.r, s.out.w = conn, conn
	var t *tls.Conn
	if t, s.tls = conn.(*tls.Conn); s.tls {
		s.peer = peerOf(t)
	} else {
		raw, err := tcp.SyscallConn()
		if err != nil {
			return nil, err
		}
		s.raw = raw
	}
	return s, nil
}

func equalFold(a []byte, b string) bool { return http1.Is(a, b) }
