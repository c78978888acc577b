package alone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/proxyproto"
)

// acceptPause is how long to wait when no connection can be accepted: out of
// descriptors, most likely.
const acceptPause = 20 * time.Millisecond

// listener is an open socket. It outlives reloads that still name its address.
type listener struct {
	address string
	ln      *net.TCPListener
	site    atomic.Pointer[site]

	open     atomic.Int64
	accepted atomic.Uint64
	refused  atomic.Uint64
	failed   atomic.Uint64 // handshakes and headers
}

func (l *listener) use(s *site) { l.site.Store(s) }

// name is what the configuration calls it now.
func (l *listener) name() string { return l.site.Load().l.Name }

// patience is how long an idle client may keep its connection.
func (l *listener) patience() time.Duration {
	return time.Duration(l.site.Load().world.config.Limits.IdleTimeout)
}

// listen opens the listeners a world has and the proxy has not: all, or none.
func (p *Proxy) listen(w *world) (added []*listener, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range w.config.Listeners {
		c := &w.config.Listeners[i]
		if p.listeners[c.Address] != nil {
			continue
		}
		ln, err := net.Listen("tcp", c.Address)
		if err != nil {
			for _, l := range added {
				l.ln.Close()
			}
			return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
		}
		l := &listener{address: c.Address, ln: ln.(*net.TCPListener)}
		l.use(w.sites[c.Name])
		added = append(added, l)
	}
	return added, nil
}

func (p *Proxy) serveLocked(l *listener) {
	p.running.Go(func() {
		for {
			conn, err := l.ln.AcceptTCP()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				p.log.Warn("accept", "listener", l.name(), "err", err)
				time.Sleep(acceptPause)
				continue
			}
			p.accept(l, conn)
		}
	})
}

// accept serves a connection if there is room for it.
func (p *Proxy) accept(l *listener, conn *net.TCPConn) {
	site := l.site.Load()
	l.accepted.Add(1)
	here, all := l.open.Add(1), p.open.Add(1)
	leave := func() { l.open.Add(-1); p.open.Add(-1) }
	if here > int64(site.l.Connections) || all > int64(site.world.config.Limits.Connections) {
		l.refused.Add(1)
		leave()
		conn.SetLinger(0)
		conn.Close()
		return
	}
	c := &client{conn: conn}
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	p.serving.Go(func() {
		defer leave()
		if err := p.serve(l, c, conn); err != nil {
			l.failed.Add(1)
			p.log.Debug("connection failed", "listener", l.name(), "client", conn.RemoteAddr(), "err", err)
		}
		conn.Close()
		p.mu.Lock()
		delete(p.conns, c)
		p.mu.Unlock()
	})
}

// serve does with a connection what its listener is for.
func (p *Proxy) serve(l *listener, c *client, tcp *net.TCPConn) error {
	w := p.enter()
	site := l.site.Load()
	left := false
	leave := func() {
		if !left {
			w.leave()
			left = true
		}
	}
	defer leave()
	patience := time.Duration(site.world.config.Limits.HeadTimeout)
	tcp.SetDeadline(time.Now().Add(patience))
	remote, local := addrPort(tcp.RemoteAddr()), addrPort(tcp.LocalAddr())
	var conn net.Conn = tcp
	var early []byte
	if trusted(site.l.from, remote.Addr()) {
		h, rest, err := readHeader(tcp)
		if err != nil {
			return err
		}
		if h.Source.IsValid() {
			remote, local = h.Source, h.Destination
		}
		early = rest
	}
	header := proxyproto.Header{Source: remote, Destination: local}
	if site.tls != nil {
		t := tls.Server(&preread{tcp, early}, site.tls)
		ctx, cancel := context.WithTimeout(p.context(), patience)
		err := t.HandshakeContext(ctx)
		cancel()
		if err != nil {
			return err
		}
		conn, early = t, nil
	}
	tcp.SetDeadline(time.Time{})
	idle := time.Duration(site.world.config.Limits.StreamTimeout)
	switch site.l.Protocol {
	case "tcp":
		return p.pass(p.context(), conn, site.tcp, header, early, idle)
	case "sni":
		return p.byName(p.context(), site.world, site, conn, header, early)
	}
	s, err := newSession(p, l, conn, tcp, remote, local)
	if err != nil {
		return err
	}
	if len(early) > 0 {
		s.in.take()
		s.in.end = copy(s.in.b[:], early)
	}
	leave() // each request takes the world of its own time
	c.session.Store(s)
	if p.stopping.Load() {
		return nil
	}
	s.serve()
	return nil
}

func trusted(from []netip.Prefix, a netip.Addr) bool {
	for _, p := range from {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// readHeader reads a PROXY protocol header, and what came after it.
func readHeader(conn net.Conn) (h proxyproto.Header, rest []byte, err error) {
	b := make([]byte, 0, 2*proxyproto.MaxHeader)
	for {
		n, err := conn.Read(b[len(b):cap(b)])
		if err != nil {
			return h, nil, err
		}
		b = b[:len(b)+n]
		h, used, err := proxyproto.Parse(b)
		if err != nil || used > 0 {
			return h, b[used:], err
		}
		if len(b) == cap(b) {
			return h, nil, proxyproto.ErrMalformed
		}
	}
}

// preread is a connection of which something has been read already.
type preread struct {
	net.Conn
	early []byte
}

func (p *preread) Read(b []byte) (int, error) {
	if len(p.early) > 0 {
		n := copy(b, p.early)
		p.early = p.early[n:]
		return n, nil
	}
	return p.Conn.Read(b)
}

// NetConn is the connection itself.
func (p *preread) NetConn() net.Conn { return p.Conn }

func (p *Proxy) context() context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ctx
}
