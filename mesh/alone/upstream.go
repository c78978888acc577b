package alone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hauberk.dev/mesh/proxyproto"
)

// downFor is how long an endpoint that could not be connected to is asked last.
const downFor = 5 * time.Second

// policies are the names of ways to balance.
var policies = []string{"round_robin"}

// upstream is a set of servers that answer alike.
type upstream struct {
	name      string
	config    Upstream
	tls       *tls.Config
	endpoints []*endpoint // each as often as its weight says
	turn      atomic.Uint64
	open      atomic.Int64 // connections
}

// endpoint is one server. It outlives a reload that still names it.
type endpoint struct {
	address string
	dialer  net.Dialer

	down     atomic.Int64 // until then, in Unix nanoseconds
	active   atomic.Int64
	requests atomic.Uint64
	failures atomic.Uint64
	connects atomic.Uint64

	mu     sync.Mutex
	idle   []*server // the one used last is at the end
	closed bool
}

// server is a connection to an endpoint.
type server struct {
	up     *upstream
	e      *endpoint
	conn   net.Conn
	tcp    *net.TCPConn
	raw    syscall.RawConn
	look   func(uintptr) // for alive
	ended  bool
	reused bool
	since  time.Time
	in     inflow
}

var (
	errNoServer = errors.New("no endpoint could be reached")
	errBusy     = errors.New("the upstream has as many connections as it may have")
)

// pick chooses an endpoint, by turns, one that was not tried before and could be
// reached lately if there is one.
func (u *upstream) pick(now time.Time, tried []*endpoint) *endpoint {
	var last *endpoint
	at := int(u.turn.Add(1))
	for i := range u.endpoints {
		e := u.endpoints[(at+i)%len(u.endpoints)]
		if has(tried, e) {
			continue
		}
		if e.down.Load() <= now.UnixNano() {
			return e
		}
		last = e
	}
	return last
}

func has(all []*endpoint, e *endpoint) bool {
	for _, t := range all {
		if t == e {
			return true
		}
	}
	return false
}

// connect takes an idle connection to e or makes a new one. fresh asks for a new
// one; sure for one that is known not to have ended.
func (u *upstream) connect(ctx context.Context, e *endpoint, h proxyproto.Header, fresh, sure bool) (*server, error) {
	for !fresh && u.config.ProxyProtocol == "" {
		s := e.pop()
		if s == nil {
			break
		}
		if !sure && time.Since(s.since) < time.Second || s.alive() {
			s.reused = true
			return s, nil
		}
		s.close()
	}
	if n := u.open.Add(1); u.config.Connections > 0 && n > int64(u.config.Connections) {
		u.open.Add(-1)
		return nil, errBusy
	}
	s, err := u.dial(ctx, e, h)
	if err != nil {
		u.open.Add(-1)
		e.failures.Add(1)
		e.down.Store(time.Now().Add(downFor).UnixNano())
	}
	return s, err
}

func (u *upstream) dial(ctx context.Context, e *endpoint, h proxyproto.Header) (*server, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(u.config.ConnectTimeout))
	defer cancel()
	e.connects.Add(1)
	conn, err := e.dialer.DialContext(ctx, "tcp", e.address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", e.address, err)
	}
	e.down.Store(0)
	s := &server{up: u, e: e, conn: conn, tcp: conn.(*net.TCPConn)}
	if s.raw, err = s.tcp.SyscallConn(); err != nil {
		conn.Close()
		return nil, err
	}
	s.look = s.peek
	if err := s.greet(ctx, h); err != nil {
		conn.Close()
		return nil, fmt.Errorf("connect to %s: %w", e.address, err)
	}
	s.in.r = s.conn
	return s, nil
}

// greet sends what goes before the first request.
func (s *server) greet(ctx context.Context, h proxyproto.Header) error {
	var header []byte
	switch s.up.config.ProxyProtocol {
	case "v1":
		header = proxyproto.Append1(nil, h)
	case "v2":
		header = proxyproto.Append2(nil, h)
	}
	if len(header) > 0 {
		s.conn.SetWriteDeadline(time.Now().Add(time.Duration(s.up.config.ConnectTimeout)))
		if _, err := s.conn.Write(header); err != nil {
			return err
		}
		s.conn.SetWriteDeadline(time.Time{})
	}
	if s.up.tls == nil {
		return nil
	}
	c := tls.Client(s.conn, s.up.tls)
	if err := c.HandshakeContext(ctx); err != nil {
		return err
	}
	s.conn = c
	return nil
}

func (e *endpoint) pop() *server {
	e.mu.Lock()
	defer e.mu.Unlock()
	n := len(e.idle)
	if n == 0 {
		return nil
	}
	s := e.idle[n-1]
	e.idle[n-1] = nil
	e.idle = e.idle[:n-1]
	return s
}

// keep makes a connection available to the next request, or closes it.
func (s *server) keep(now time.Time) {
	if len(s.in.waiting()) > 0 || s.up.config.ProxyProtocol != "" {
		s.close() // it said more than it was asked, or speaks for one client
		return
	}
	s.in.drop()
	s.since = now
	e := s.e
	e.mu.Lock()
	if e.closed || len(e.idle) >= s.up.config.Idle {
		e.mu.Unlock()
		s.close()
		return
	}
	e.idle = append(e.idle, s)
	e.mu.Unlock()
}

func (s *server) close() {
	s.conn.Close()
	s.in.drop()
	s.up.open.Add(-1)
}

// alive looks whether the server has ended the connection, or spoken unasked.
func (s *server) alive() bool {
	s.ended = true
	s.raw.Control(s.look)
	return !s.ended
}

func (s *server) peek(fd uintptr) {
	var b [1]byte
	n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	quiet := err == syscall.EAGAIN
	s.ended = !quiet && !(n > 0 && s.up.tls != nil) // TLS has words of its own
}

// sweep closes connections that have been idle for long.
func (e *endpoint) sweep(before time.Time) {
	e.mu.Lock()
	n := 0
	for n < len(e.idle) && e.idle[n].since.Before(before) {
		n++
	}
	old := append([]*server(nil), e.idle[:n]...)
	e.idle = append(e.idle[:0], e.idle[n:]...)
	e.mu.Unlock()
	for _, s := range old {
		s.close()
	}
}

// shut closes an endpoint nobody names any more. Connections in use end with
// their request.
func (e *endpoint) shut() {
	e.mu.Lock()
	e.closed = true
	all := e.idle
	e.idle = nil
	e.mu.Unlock()
	for _, s := range all {
		s.close()
	}
}

// reach connects to an endpoint for bytes, trying others if it cannot.
func (u *upstream) reach(ctx context.Context, h proxyproto.Header) (*server, error) {
	var tried []*endpoint
	err := errNoServer
	for len(tried) < maxAttempts {
		e := u.pick(time.Now(), tried)
		if e == nil {
			return nil, err
		}
		tried = append(tried, e)
		var s *server
		if s, err = u.connect(ctx, e, h, true, true); err == nil || errors.Is(err, errBusy) {
			return s, err
		}
	}
	return nil, err
}

// unread says that an error means an end of the connection rather than a wait
// that was too long.
func ended(err error) bool {
	return err == io.EOF || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed)
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		p := t.AddrPort()
		return netip.AddrPortFrom(p.Addr().Unmap(), p.Port())
	}
	return netip.AddrPort{}
}
