package alone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/proxyproto"
)

// upstream is a set of servers that answer alike.
type upstream struct {
	name      string
	config    Upstream
	tls       *upstreamTLS
	speaks    string // the rules of tls; connections made by others are not shared
	clock     balance.Clock
	set       *balance.Set // shared with the world before, if that has one of the name
	endpoints []*endpoint
	open      atomic.Int64 // connections
}

// endpoint is one server. It outlives a reload that still names it.
type endpoint struct {
	address string
	speaks  string // by its idle connections
	dialer  net.Dialer
	probe   atomic.Pointer[func(context.Context) error]

	active   atomic.Int64
	requests atomic.Uint64
	failures atomic.Uint64
	connects atomic.Uint64

	muxes  shared[*muxed]   // of HTTP/2
	links  shared[*rpcLink] // of bolt and Dubbo
	epoch  atomic.Uint64    // what was made in an earlier one is not used again
	mu     sync.Mutex
	idle   []*server // the one used last is at the end
	closed bool
}

// server is a connection to an endpoint.
type server struct {
	two    *call // of HTTP/2: one request of a connection that others share
	up     *upstream
	e      *endpoint
	conn   net.Conn
	tcp    *net.TCPConn
	raw    syscall.RawConn
	look   func(uintptr) // for alive
	under  *beneath      // TLS; nil: there is none
	ended  bool
	begun  bool // of a closed one: something had come that nobody took
	closed bool
	reused bool
	since  time.Time
	epoch  uint64
	in     inflow
}

var (
	errNoServer = errors.New("no endpoint could be reached")
	errBusy     = errors.New("the upstream has as many connections as it may have")
)

// chosen is an endpoint that was picked, to be told how it went.
type chosen struct {
	balance.Pick
	e *endpoint
}

// pick chooses an endpoint that was not tried before.
func (u *upstream) pick(hash uint64, tried []*balance.Host) (chosen, error) {
	p, err := u.set.Pick(u.clock.Now(), balance.Request{Hash: hash, Tried: tried})
	if err != nil {
		return chosen{}, err
	}
	e, ok := p.Host().Endpoint().Value.(*endpoint)
	if !ok { // never: every endpoint is put in with one
		p.Release()
		return chosen{}, balance.ErrNoEndpoint
	}
	return chosen{p, e}, nil
}

// commit puts the policy and the endpoints in force.
func (u *upstream) commit() error {
	now := u.clock.Now()
	if err := u.set.Apply(now, *u.config.policy); err != nil {
		return err
	}
	all := make([]balance.Endpoint, len(u.endpoints))
	for i, e := range u.endpoints {
		all[i] = balance.Endpoint{Name: e.address, Weight: uint32(u.config.Endpoints[i].Weight), Priority: uint8(u.config.Endpoints[i].Priority),
			Value: e}
	}
	return u.set.Replace(now, all)
}

// check asks the endpoints for signs of life until ctx ends.
func (u *upstream) check(ctx context.Context) {
	u.set.RunChecks(ctx, u.clock.Now, func(ctx context.Context, h *balance.Host) error {
		e, ok := h.Endpoint().Value.(*endpoint)
		if !ok {
			return balance.ErrNoEndpoint
		}
		how := e.probe.Load()
		if how == nil {
			return nil
		}
		return (*how)(ctx)
	})
}

// probes makes what a check of the endpoints does.
func (u *upstream) probes() {
	for _, e := range u.endpoints {
		c := u.config.Check
		if c == nil {
			e.probe.Store(nil)
			continue
		}
		dial := func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := e.dialer.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			s := &server{up: u, e: e, conn: conn}
			if err := s.greet(ctx, proxyproto.Header{}); err != nil {
				conn.Close()
				return nil, err
			}
			return s.conn, nil
		}
		probe := func(ctx context.Context) error {
			switch {
			case u.config.Protocol == "grpc" && c.Path == "":
				return balance.ProbeGRPC(ctx, dial, e.address, e.address, c.Service)
			case u.config.Protocol == "bolt":
				return balance.ProbeBolt(ctx, dial, e.address)
			case u.config.Protocol == "dubbo":
				return balance.ProbeDubbo(ctx, dial, e.address)
			case u.two() && c.Path != "":
				return u.probeTwo(ctx, e, c)
			}
			if c.Path == "" {
				return balance.ProbeTCP(ctx, dial, e.address)
			}
			host := c.Host
			if host == "" {
				host = e.address
			}
			return balance.ProbeHTTP(ctx, dial, e.address, host, c.Path)
		}
		e.probe.Store(&probe)
	}
}

// connect takes an idle connection to e or makes a new one, which fresh asks for.
// Each is looked at, however short its rest was: what came in it would be taken for
// the answer to the next request.
func (u *upstream) connect(ctx context.Context, e *endpoint, h proxyproto.Header, fresh bool) (*server, error) {
	if u.two() {
		return u.stream(ctx, e, h, fresh)
	}
	// A request of the world before may have picked an endpoint of this one.
	for !fresh && u.config.ProxyProtocol == "" && u.speaks == e.speaks {
		s := e.pop()
		if s == nil {
			break
		}
		if s.alive() {
			s.reused = true
			return s, nil
		}
		s.close()
	}
	if !u.room() {
		return nil, errBusy
	}
	s, err := u.dial(ctx, e, h)
	if err != nil {
		u.open.Add(-1)
		e.failures.Add(1)
	}
	return s, err
}

// room counts one more connection in, if there may be one. Those at rest, with
// whichever endpoint, make room for it.
func (u *upstream) room() bool {
	most := int64(u.config.Connections)
	for n := u.open.Add(1); most > 0 && n > most; n = u.open.Load() {
		s := u.resting()
		if s == nil {
			u.open.Add(-1)
			return false
		}
		s.close()
	}
	return true
}

// resting takes the connection that has been idle for the longest at one of the
// endpoints; nil if all are in use.
func (u *upstream) resting() *server {
	for _, e := range u.endpoints {
		e.mu.Lock()
		if len(e.idle) > 0 {
			s := e.idle[0]
			e.idle = slices.Delete(e.idle, 0, 1)
			e.mu.Unlock()
			return s
		}
		e.mu.Unlock()
	}
	return nil
}

func (u *upstream) dial(ctx context.Context, e *endpoint, h proxyproto.Header) (*server, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(u.config.ConnectTimeout))
	defer cancel()
	e.connects.Add(1)
	epoch := e.epoch.Load() // before the authorities are looked at
	conn, err := e.dialer.DialContext(ctx, "tcp", e.address)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", e.address, err)
	}
	s := &server{up: u, e: e, conn: conn, tcp: conn.(*net.TCPConn), epoch: epoch}
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
	s.under = &beneath{Conn: s.conn, raw: s.raw}
	c := tls.Client(s.under, s.up.tls.now.Load())
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
	if s.two != nil || len(s.in.waiting()) > 0 || s.up.config.ProxyProtocol != "" || s.up.speaks != s.e.speaks {
		s.close() // it said more than it was asked, speaks for one client, or was made under other rules
		return
	}
	s.in.drop()
	s.since = now
	e := s.e
	e.mu.Lock()
	if e.closed || s.epoch != e.epoch.Load() || len(e.idle) >= s.up.config.Idle {
		e.mu.Unlock()
		s.close()
		return
	}
	e.idle = append(e.idle, s)
	e.mu.Unlock()
}

func (s *server) close() {
	if s.closed {
		return
	}
	s.closed = true
	s.conn.Close()
	s.begun = s.in.end > 0
	s.in.drop()
	if s.two != nil {
		return // the connection stays
	}
	s.up.open.Add(-1)
}

// alive looks whether the server has ended the connection, or spoken unasked.
func (s *server) alive() bool {
	if s.under != nil {
		return s.under.rests(s.conn)
	}
	s.ended = true
	s.raw.Control(s.look)
	return !s.ended
}

func (s *server) peek(fd uintptr) {
	var b [1]byte
	_, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	s.ended = err != syscall.EAGAIN
}

// sweep closes connections that have been idle for long.
func (e *endpoint) sweep(before time.Time) {
	e.muxes.sweep(before)
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

// renew lets go of the connections there are, so that the next are made anew.
func (u *upstream) renew() {
	for _, e := range u.endpoints {
		e.epoch.Add(1) // first: those in use come back after the sweep
		e.sweep(time.Now())
		e.muxes.renew()
		e.links.renew()
	}
}

// shut closes an endpoint nobody names any more. Connections in use end with
// their request.
func (e *endpoint) shut() {
	e.muxes.shut()
	e.links.shut()
	e.mu.Lock()
	e.closed = true
	all := e.idle
	e.idle = nil
	e.mu.Unlock()
	for _, s := range all {
		s.close()
	}
}

// reach connects to an endpoint for bytes, trying others if it cannot. Who gets a
// server tells the pick how it went.
func (u *upstream) reach(ctx context.Context, h proxyproto.Header) (chosen, *server, error) {
	var tried []*balance.Host
	err := errNoServer
	for len(tried) < maxAttempts {
		at, perr := u.pick(balance.Hash(h.Source.Addr().String()), tried)
		if perr != nil {
			return at, nil, errors.Join(err, perr)
		}
		var s *server
		if s, err = u.connect(ctx, at.e, h, true); err == nil {
			return at, s, nil
		}
		if errors.Is(err, errBusy) {
			at.Done(u.clock.Now(), balance.Cancelled)
			return at, nil, err
		}
		at.Done(u.clock.Now(), balance.Unreachable)
		tried = append(tried, at.Host())
	}
	return chosen{}, nil, err
}

// ended says that an error means an end of the connection rather than a wait
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
