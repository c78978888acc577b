package alone

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

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
		s.status, s.final = 0, false // nothing was said yet
		s.failed(srv, err, false, false, false)
		return
	}
	v, _ := s.resp.Field("Upgrade")
	b = append(append(append(b, "Connection: Upgrade\r\nUpgrade: "...), v...), "\r\n\r\n"...)
	s.conn.SetWriteDeadline(time.Now().Add(time.Duration(s.world.config.Limits.IdleTimeout)))
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
	s.in.at = s.in.end // the block stays: the log reads the request in it
	t := &passage{client: s.c, conn: s.conn, server: srv, source: s.client, flow: newFlow(s.streamTime())}
	got, sent, moved := s.p.exchangeBytes(t, early, append([]byte(nil), srv.in.waiting()...))
	s.got, s.out.sent, s.parted = got, s.out.sent+sent, moved
	srv.in.at = srv.in.end
	srv.close()
}

// flow is what the two directions of a tunnel know of each other.
type flow struct {
	idle   time.Duration
	began  time.Time
	moved  atomic.Int64 // when bytes last came from either side, since began
	over   atomic.Bool
	halted atomic.Bool // between two bytes, to go on elsewhere

	fromClient, fromServer bool // have ended, in order

	mu      sync.Mutex
	live    int // directions
	resting int
	both    chan struct{} // closed when all rest
}

func newFlow(idle time.Duration) *flow { return &flow{idle: idle, began: time.Now()} }

// end wakes both directions for the last time. over is set before the deadlines,
// and asked after a direction has set its own: one of the two is always seen.
func (f *flow) end(a, b net.Conn) {
	f.over.Store(true)
	past := time.Unix(1, 0)
	a.SetDeadline(past)
	b.SetDeadline(past)
}

// halt stops both directions with nothing on its way between them: who writes ends
// that first, and meanwhile the other goes on.
func (f *flow) halt(a, b net.Conn) {
	f.halted.Store(true)
	past := time.Unix(1, 0)
	a.SetReadDeadline(past)
	b.SetReadDeadline(past)
}

// patience is until when it may stay quiet.
func (f *flow) patience() time.Time { return f.began.Add(time.Duration(f.moved.Load()) + f.idle) }

// splice moves bytes both ways until both have ended, or nothing has moved for
// idle. up and down are bytes that have been read before.
func (f *flow) splice(client, server net.Conn, up, down []byte) (got, sent int64) {
	f.live, f.resting, f.both = 2, 0, make(chan struct{})
	for _, ended := range []bool{f.fromClient, f.fromServer} {
		if ended {
			f.live--
		}
	}
	var wg sync.WaitGroup
	if !f.fromClient {
		wg.Go(func() { got = f.pump(server, client, up, &f.fromClient) })
	}
	if !f.fromServer {
		sent = f.pump(client, server, down, &f.fromServer)
	}
	wg.Wait()
	return got, sent
}

// rests says whether splice has returned because of halt, with something left to do.
func (f *flow) rests() bool {
	return f.halted.Load() && !f.over.Load() && !(f.fromClient && f.fromServer)
}

// pump moves one way. An orderly end ends this half; anything else both, so that
// neither side takes the rest for complete.
func (f *flow) pump(to, from net.Conn, early []byte, ended *bool) (n int64) {
	b := blocks.Get().(*block)
	defer blocks.Put(b)
	at := copy(b[:], early)
	if len(early) > at { // never: what was read before fits a block
		at = 0
	}
	for {
		if at > 0 {
			f.moved.Store(int64(time.Since(f.began)))
			to.SetWriteDeadline(time.Now().Add(f.idle))
			if f.over.Load() {
				break
			}
			w, err := to.Write(b[:at])
			n += int64(w)
			if err != nil {
				break
			}
		}
		var err error
		if at, err = f.read(from, b[:]); at > 0 {
			continue
		}
		if c, ok := to.(interface{ CloseWrite() error }); ok && err == io.EOF {
			if c.CloseWrite() == nil {
				*ended = true
				f.ends()
				return n
			}
		}
		if err == errHalted {
			return n
		}
		break
	}
	f.end(to, from)
	reset(to)
	reset(from)
	return n
}

// read waits for bytes as long as anything moves, either way.
func (f *flow) read(from net.Conn, b []byte) (n int, err error) {
	for {
		until := f.patience()
		from.SetReadDeadline(until)
		if f.over.Load() {
			return 0, os.ErrDeadlineExceeded
		}
		if f.halted.Load() {
			if f.rest() {
				return 0, errHalted
			}
			until = time.Now().Add(restless)
			from.SetReadDeadline(until)
		}
		if n, err = from.Read(b); n > 0 || !errors.Is(err, os.ErrDeadlineExceeded) || !f.halted.Load() && !f.patience().After(until) {
			return n, err
		}
	}
}

var errHalted = errors.New("halted")

// While it is halted, a direction waits for the other for restful, and if that does
// not come goes on for restless.
const (
	restful  = 50 * time.Millisecond
	restless = 10 * time.Millisecond
)

// rest waits for the other direction to rest too.
func (f *flow) rest() bool {
	f.mu.Lock()
	f.resting++
	if f.resting == f.live {
		close(f.both)
	}
	f.mu.Unlock()
	late := time.NewTimer(restful)
	defer late.Stop()
	select {
	case <-f.both:
		return true
	case <-late.C:
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.resting == f.live {
		return true
	}
	f.resting--
	return false
}

// ends says that a direction has nothing left to do.
func (f *flow) ends() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.live--; f.live > 0 && f.resting == f.live {
		close(f.both)
	}
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
func (p *Proxy) pass(ctx context.Context, c *client, conn net.Conn, up *upstream, h proxyproto.Header, early []byte, idle time.Duration) error {
	at, srv, err := up.reach(ctx, h)
	if err != nil {
		reset(conn)
		return err
	}
	srv.e.requests.Add(1)
	p.between(ctx, &passage{client: c, conn: conn, at: at, server: srv, source: h.Source, flow: newFlow(idle)}, early)
	return nil
}

var errNoName = errors.New("no upstream for that name")

// byName serves a TLS connection that is passed on by the name it asks for.
func (p *Proxy) byName(ctx context.Context, c *client, w *world, site *site, conn net.Conn, h proxyproto.Header, early []byte) error {
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
			return p.pass(ctx, c, conn, host.Rules[0].Then, h, in.waiting(), time.Duration(w.config.Limits.StreamTimeout))
		}
		if err := in.fill(); err != nil {
			return err
		}
	}
}
