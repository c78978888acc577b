package alone

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/proxyproto"
	"hauberk.dev/mesh/sni"
)

// tunnel passes an upgrade on, and then bytes, whatever they mean.
func (s *session) tunnel(a *action, srv *server) {
	s.final = true
	s.status = 101
	b := append(s.out.buffer(), "HTTP/1.1 101 "...)
	b = append(append(b, s.resp.Reason...), "\r\n"...)
	b, err := s.appendAnswer(b, a, false)
	if err != nil {
		s.failed(srv, err, false, false, false)
		return
	}
	v, _ := s.resp.Field("Upgrade")
	b = append(append(append(b, "Connection: Upgrade\r\nUpgrade: "...), v...), "\r\n\r\n"...)
	err = s.out.kept(b)
	if err == nil {
		err = s.out.flush()
	}
	if err != nil {
		s.aborted = true
		srv.close()
		return
	}
	early := append([]byte(nil), s.in.waiting()...)
	s.in.drop()
	got, sent := splice(s.conn, srv.conn, early, append([]byte(nil), srv.in.waiting()...), s.streamTime())
	s.got, s.out.sent = got, s.out.sent+sent
	srv.in.at = srv.in.end
	srv.close()
}

// splice moves bytes both ways until both have ended, or nothing has moved for
// idle. up and down are bytes that have been read before.
func splice(client, server net.Conn, up, down []byte, idle time.Duration) (got, sent int64) {
	var wg sync.WaitGroup
	wg.Go(func() { got = pump(server, client, up, idle) })
	sent = pump(client, server, down, idle)
	wg.Wait()
	return got, sent
}

// pump moves one way. An orderly end ends this half; anything else both, so that
// neither side takes the rest for complete.
func pump(to, from net.Conn, early []byte, idle time.Duration) (n int64) {
	b := blocks.Get().(*block)
	defer blocks.Put(b)
	at := copy(b[:], early)
	if len(early) > at { // never: what was read before fits a block
		at = 0
	}
	for {
		if at > 0 {
			to.SetWriteDeadline(time.Now().Add(idle))
			w, err := to.Write(b[:at])
			n += int64(w)
			if err != nil {
				break
			}
		}
		from.SetReadDeadline(time.Now().Add(idle))
		var err error
		if at, err = from.Read(b[:]); at > 0 {
			continue
		}
		if c, ok := to.(interface{ CloseWrite() error }); ok && err == io.EOF {
			if c.CloseWrite() == nil {
				return n
			}
		}
		break
	}
	now := time.Unix(1, 0)
	to.SetDeadline(now)
	from.SetDeadline(now)
	reset(to)
	reset(from)
	return n
}

// reset makes the coming end of a connection visible as one that was not meant.
func reset(c net.Conn) {
	for n, ok := c.(interface{ NetConn() net.Conn }); ok; n, ok = c.(interface{ NetConn() net.Conn }) {
		c = n.NetConn()
	}
	if t, ok := c.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
}

// pass serves a connection whose bytes are nobody's business here.
func (p *Proxy) pass(ctx context.Context, conn net.Conn, up *upstream, h proxyproto.Header, early []byte, idle time.Duration) error {
	at, srv, err := up.reach(ctx, h)
	if err != nil {
		reset(conn)
		return err
	}
	srv.e.requests.Add(1)
	srv.e.active.Add(1)
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)); srv.conn.SetDeadline(time.Unix(1, 0)) })
	splice(conn, srv.conn, early, nil, idle)
	stop()
	srv.e.active.Add(-1)
	at.Done(up.clock.Now(), balance.Success)
	srv.close()
	return nil
}

var errNoName = errors.New("no upstream for that name")

// byName serves a TLS connection that is passed on by the name it asks for.
func (p *Proxy) byName(ctx context.Context, w *world, site *site, conn net.Conn, h proxyproto.Header, early []byte) error {
	in := inflow{r: conn}
	in.take()
	defer in.drop()
	in.end = copy(in.b[:], early)
	conn.SetReadDeadline(time.Now().Add(time.Duration(w.config.Limits.HeadTimeout)))
	var scratch []byte
	for {
		name, whole, err := sni.Name(in.waiting(), scratch)
		if err != nil {
			return err
		}
		if whole {
			host := site.names.Host(name)
			if host == nil {
				reset(conn)
				return errors.Join(errNoName, errors.New(strconv.Quote(string(name))))
			}
			return p.pass(ctx, conn, host.Rules[0].Then, h, in.waiting(), time.Duration(w.config.Limits.StreamTimeout))
		}
		if err := in.fill(); err != nil {
			return err
		}
	}
}
