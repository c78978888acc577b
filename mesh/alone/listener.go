package alone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/proxyproto"
)

// acceptPause is how long to wait when no connection can be accepted: out of
// descriptors, most likely.
const acceptPause = 20 * time.Millisecond

// listener is an open socket. It outlives reloads that still name its address.
type listener struct {
	address string // Listener.key
	ln      *net.TCPListener
	udp     *datagrams // in place of ln
	site    atomic.Pointer[site]

	gone     atomic.Bool // no configuration names it any more
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

// key tells listeners apart: one of UDP may have the address of another.
func (l *Listener) key() string {
	if l.Protocol == "udp" {
		return "udp " + l.Address
	}
	return l.Address
}

// openListener opens the socket of a listener, or takes that of another process.
func (p *Proxy) openListener(c *Listener, s *site, from *os.File) (l *listener, err error) {
	l = &listener{address: c.key()}
	l.use(s)
	if c.Protocol == "udp" {
		l.udp, err = listenDatagrams(l, c.Address, from, p.log)
		return l, err
	}
	var ln net.Listener
	if from != nil {
		ln, err = net.FileListener(from)
	} else {
		ln, err = net.Listen("tcp", c.Address)
	}
	if err != nil {
		return nil, err
	}
	var ok bool
	if l.ln, ok = ln.(*net.TCPListener); !ok {
		ln.Close()
		return nil, errors.New("no socket of TCP")
	}
	return l, nil
}

// socket is what can be shared with another process.
func (l *listener) socket() interface{ File() (*os.File, error) } {
	if l.udp != nil {
		return l.udp.conn
	}
	return l.ln
}

func (l *listener) close() {
	if l.udp != nil {
		l.udp.conn.Close()
		return
	}
	l.ln.Close()
}

func (l *listener) addr() net.Addr {
	if l.udp != nil {
		return l.udp.conn.LocalAddr()
	}
	return l.ln.Addr()
}

// listen opens the listeners a world has and the proxy has not: all, or none. Some
// may be open already, by key.
func (p *Proxy) listen(w *world, open map[string]*os.File) (added []*listener, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range w.config.Listeners {
		c := &w.config.Listeners[i]
		if p.listeners[c.key()] != nil {
			continue
		}
		l, err := p.openListener(c, w.sites[c.Name], open[c.key()])
		if err != nil {
			for _, l := range added {
				l.close()
			}
			return nil, fmt.Errorf("listen on %s: %w", c.Address, err)
		}
		added = append(added, l)
	}
	return added, nil
}

func (p *Proxy) serveLocked(l *listener) {
	if l.udp != nil {
		l.udp.receiving.Add(1)
		p.running.Go(func() { l.udp.serve(p.running.Go) })
		return
	}
	p.accepting.Add(1)
	p.running.Go(func() {
		defer p.accepting.Done()
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
			if p.met != nil {
				p.met()
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
	c := &client{l: l, conn: conn}
	p.carry(c, func() {
		defer leave()
		if err := p.serve(l, c, conn); err != nil {
			l.failed.Add(1)
			p.log.Debug("connection failed", "listener", l.name(), "client", conn.RemoteAddr(), "err", err)
		}
	})
}

// carry runs what serves a client's connection, to its end.
func (p *Proxy) carry(c *client, serve func()) {
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	p.serving.Go(func() {
		serve()
		c.conn.Close()
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
		t := tls.Server(&preread{tcp, early}, site.tls.config())
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
		return p.pass(p.context(), c, conn, site.tcp, header, early, idle)
	case "sni":
		return p.byName(p.context(), c, site.world, site, conn, header, early)
	case "bolt", "dubbo":
		leave() // each call takes the world of its own time
		return p.serveRPC(l, c, conn, site.l.Protocol, remote, early)
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
	if t, ok := conn.(*tls.Conn); site.l.HTTP2 == "only" || ok && t.ConnectionState().NegotiatedProtocol == "h2" {
		if !ok {
			conn = &preread{conn, early}
		}
		p.serveTwo(l, c, conn, tcp, s)
		return nil
	}
	p.serveOne(c, s)
	return nil
}

// serveOne serves HTTP/1, and what it may turn out to be.
func (p *Proxy) serveOne(c *client, s *session) {
	s.c = c
	c.session.Store(s)
	if p.stopping.Load() || c.l.gone.Load() {
		return
	}
	if two := s.serve(); two != nil {
		c.session.Store(nil)
		p.serveTwo(c.l, c, two, s.tcp, s)
	}
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

// CloseWrite ends this half.
func (p *preread) CloseWrite() error {
	if c, ok := p.Conn.(interface{ CloseWrite() error }); ok {
		return c.CloseWrite()
	}
	return nil
}

// NetConn is the connection itself.
func (p *preread) NetConn() net.Conn { return p.Conn }

func (p *Proxy) context() context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ctx
}
