package alone

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"hauberk.dev/mesh/balance"
)

// parts says that the connection ends with the request at hand.
func (s *session) parts() bool {
	return s.p.stopping.Load() || s.l.gone.Load() || s.p.leaving.Load() && !s.movable()
}

// movable says whether the connection is to go on in the process that has taken over.
// One of TLS cannot: its state is that of crypto/tls.
func (s *session) movable() bool {
	return s.p.leaving.Load() && s.raw != nil && s.two == nil && !s.stays && s.p.line.whole() && !s.p.stopping.Load() && !s.l.gone.Load()
}

// part has a connection between two requests move on, or says that it is none to move.
func (s *session) part() bool {
	s.moving.Lock()
	defer s.moving.Unlock()
	if !s.movable() {
		return false
	}
	if s.state.CompareAndSwap(idle, stopped) {
		s.conn.SetReadDeadline(time.Unix(1, 0)) // who waits for a request finds it
	}
	return true
}

// stay has a connection that cannot move go on here. No part comes after it, which
// would end it with requests unread.
func (s *session) stay() {
	s.moving.Lock()
	defer s.moving.Unlock()
	s.stays = true
	s.conn.SetReadDeadline(time.Now().Add(s.l.patience()))
	s.state.Store(idle)
}

// moveOn gives the connection, which is between two requests, to the process that has
// taken over. If it cannot, the connection is still this one's.
func (s *session) moveOn() bool {
	unread := s.in.waiting()
	if len(unread) > maxUnread {
		return false
	}
	m := &parcel{Session: &sessionState{Listener: s.l.address, Client: s.client, Local: s.local, Used: s.used, Unread: unread}}
	var err error
	cerr := s.raw.Control(func(fd uintptr) { err = s.p.line.send(m, int(fd)) })
	if err = errors.Join(cerr, err); err != nil {
		s.p.log.Warn("a connection stays here", "client", s.client, "err", err)
		return false
	}
	s.conn.Close() // the other has it too
	s.in.drop()
	s.out.drop()
	return true
}

// goOn serves a connection that the process before has handed on.
func (p *Proxy) goOn(m *sessionState, f *os.File) {
	tcp, err := tcpOf(f)
	if err != nil {
		p.log.Error("take on a connection", "client", m.Client, "err", err)
		return
	}
	p.mu.Lock()
	l := p.listeners[m.Listener]
	p.mu.Unlock()
	if l == nil || l.ln == nil || l.site.Load().l.Protocol != "http" {
		tcp.Close() // nobody is served by what is not configured any more
		return
	}
	s, err := newSession(p, l, tcp, tcp, m.Client, m.Local)
	if err != nil {
		tcp.Close()
		return
	}
	s.used = m.Used
	if len(m.Unread) > 0 {
		s.in.take()
		s.in.end = copy(s.in.b[:], m.Unread)
	}
	l.open.Add(1)
	p.open.Add(1)
	c := &client{l: l, conn: tcp}
	p.carry(c, func() {
		defer func() { l.open.Add(-1); p.open.Add(-1) }()
		p.serveOne(c, s)
	})
}

// passage is a connection whose bytes go to a server as they are.
type passage struct {
	client *client
	conn   net.Conn // the client's
	server *server
	at     chosen // nothing, if the configuration does not name the server any more
	source netip.AddrPort
	flow   *flow
}

// plain are the two connections, if there is nothing between them and the network.
func (s *passage) plain() (client, server *net.TCPConn) {
	client, ok := s.conn.(*net.TCPConn)
	server, too := s.server.conn.(*net.TCPConn)
	if !ok || !too {
		return nil, nil
	}
	return client, server
}

// between moves bytes until both sides have ended, or another process does.
func (p *Proxy) between(ctx context.Context, s *passage, early []byte) {
	f, e := s.flow, s.server.e
	e.active.Add(1)
	stop := context.AfterFunc(ctx, func() { f.end(s.conn, s.server.conn) })
	p.exchangeBytes(s, early, nil)
	stop()
	e.active.Add(-1)
	if s.at.e != nil {
		s.at.Done(s.server.up.clock.Now(), balance.Success)
	}
	s.server.close()
}

// exchangeBytes moves bytes both ways to the end, or until another process does; up and
// down have been read before.
func (p *Proxy) exchangeBytes(s *passage, up, down []byte) (got, sent int64, moved bool) {
	f := s.flow
	if c, _ := s.plain(); c != nil && s.client != nil {
		s.client.stream.Store(s)
		if p.leaving.Load() {
			f.halt(s.conn, s.server.conn)
		}
	}
	got, sent = f.splice(s.conn, s.server.conn, up, down)
	for f.rests() {
		if p.moveStream(s) {
			return got, sent, true
		}
		f.halted.Store(false)
		g, n := f.splice(s.conn, s.server.conn, nil, nil)
		got, sent = got+g, sent+n
	}
	return got, sent, false
}

// moveStream gives a stream that rests to the process that has taken over.
func (p *Proxy) moveStream(s *passage) bool {
	client, server := s.plain()
	m := &parcel{Stream: &streamState{Listener: s.client.l.address, Source: s.source, Upstream: s.server.up.name, Endpoint: s.server.e.address,
		Idle: s.flow.idle, FromClient: s.flow.fromClient, FromServer: s.flow.fromServer}}
	err := withDescriptor(client, func(a int) error {
		return withDescriptor(server, func(b int) error { return p.line.send(m, a, b) })
	})
	if err != nil {
		p.log.Warn("a connection stays here", "client", s.source, "err", err)
	}
	return err == nil
}

// withDescriptor lends the descriptor of a connection.
func withDescriptor(c syscall.Conn, do func(int) error) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = do(int(fd)) })
	return errors.Join(cerr, err)
}

// goBetween goes on with a stream that the process before has handed on, also if
// the configuration names neither its listener nor its server: a reload lets such go
// on too.
func (p *Proxy) goBetween(m *streamState, from, to *os.File) {
	a, err := tcpOf(from)
	if err != nil {
		p.log.Error("take on a connection", "client", m.Source, "err", err)
		return
	}
	b, err := tcpOf(to)
	if err != nil {
		a.SetLinger(0)
		a.Close()
		p.log.Error("take on a connection", "client", m.Source, "err", err)
		return
	}
	p.mu.Lock()
	l := p.listeners[m.Listener]
	p.mu.Unlock()
	if l == nil || l.ln == nil {
		l = &listener{address: m.Listener}
	}
	at, srv := p.world.Load().named(m.Upstream, m.Endpoint)
	srv.conn, srv.tcp = b, b
	srv.up.open.Add(1)
	f := newFlow(m.Idle)
	f.fromClient, f.fromServer = m.FromClient, m.FromServer
	l.open.Add(1)
	p.open.Add(1)
	c := &client{l: l, conn: a}
	p.carry(c, func() {
		defer func() { l.open.Add(-1); p.open.Add(-1) }()
		p.between(p.context(), &passage{client: c, conn: a, server: srv, at: at, source: m.Source, flow: f}, nil)
	})
}

// named is a place for a connection to an endpoint, with a pick of it if it is named.
func (w *world) named(name, address string) (at chosen, s *server) {
	u := w.upstreams[name]
	if u == nil {
		u = &upstream{name: name}
	}
	for _, e := range u.endpoints {
		if e.address == address {
			if pick, err := u.set.PickNamed(u.clock.Now(), address); err == nil {
				at = chosen{pick, e}
			}
			return at, &server{up: u, e: e}
		}
	}
	return at, &server{up: u, e: &endpoint{address: address}}
}

func tcpOf(f *os.File) (*net.TCPConn, error) {
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	t, ok := c.(*net.TCPConn)
	if !ok {
		c.Close()
		return nil, errors.New("no connection of TCP")
	}
	return t, nil
}

// goCalling serves a connection of bolt or Dubbo that the process before has handed on.
func (p *Proxy) goCalling(m *callsState, f *os.File) {
	tcp, err := tcpOf(f)
	if err != nil {
		p.log.Error("take on a connection", "client", m.Client, "err", err)
		return
	}
	p.mu.Lock()
	l := p.listeners[m.Listener]
	p.mu.Unlock()
	if l == nil || l.ln == nil || l.site.Load().l.Protocol != m.Protocol {
		tcp.Close() // nobody is served by what is not configured any more
		return
	}
	l.open.Add(1)
	p.open.Add(1)
	c := &client{l: l, conn: tcp}
	p.carry(c, func() {
		defer func() { l.open.Add(-1); p.open.Add(-1) }()
		if err := p.serveRPC(l, c, tcp, m.Protocol, m.Client, m.Unread); err != nil {
			p.log.Debug("connection failed", "listener", l.name(), "client", m.Client, "err", err)
		}
	})
}
