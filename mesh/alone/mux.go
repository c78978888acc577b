package alone

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/proxyproto"
	meshwire "hauberk.dev/mesh/wire"
)

// maxMuxes bounds the connections of HTTP/2 to one endpoint. One carries a hundred
// requests or more at once; more are made when those there are full.
const maxMuxes = 16

// muxed is a connection of HTTP/2 to an endpoint.
type muxed struct {
	conn  *http2.Conn
	srv   *server
	heard atomic.Int64 // when something came from the server, in Unix nanoseconds
	used  atomic.Int64
	rings rings
	asked atomic.Int64 // the first request since heard that its client gave up
}

// settled wakes those for whom something has come.
func (m *muxed) settled() { m.rings.all() }

// carrier is the connection below.
type carrier struct {
	net.Conn
	tcp   *net.TCPConn
	heard *atomic.Int64
}

func (c *carrier) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && c.heard != nil {
		c.heard.Store(time.Now().UnixNano())
	}
	return n, err
}

// prompt is a carrier without TLS.
type prompt struct {
	carrier
	now *meshwire.Now
}

func (c *prompt) WriteNow(p []byte) int { return c.now.Write(p) }

// below is what a connection of HTTP/2 stands on.
func below(conn net.Conn, tcp *net.TCPConn, heard *atomic.Int64, plain bool) http2.Transport {
	c := carrier{conn, tcp, heard}
	if !plain {
		return &c
	}
	return &prompt{c, meshwire.NewNow(tcp)}
}

// CloseWrite ends this half.
func (c *carrier) CloseWrite() error {
	if h, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return h.CloseWrite()
	}
	return nil
}

// Abort ends both halves at once.
func (c *carrier) Abort() {
	c.tcp.SetLinger(0)
	c.tcp.Close()
}

// Finish lets go.
func (c *carrier) Finish() { c.Conn.Close() }

// stream opens a place for a request on a connection of HTTP/2 to e.
func (u *upstream) stream(ctx context.Context, e *endpoint, h proxyproto.Header, fresh bool) (*server, error) {
	m, reused, err := u.muxed(ctx, e, h)
	if err != nil {
		return nil, err
	}
	m.used.Store(time.Now().UnixNano())
	t := &call{to: m, scheme: "http"}
	t.rings = &m.rings
	if u.tls != nil {
		t.scheme = "https"
	}
	s := &server{up: u, e: e, conn: t, two: t, reused: reused && !fresh}
	s.in.r = t
	return s, nil
}

// muxed is a connection that has room, if there can be one.
func (u *upstream) muxed(ctx context.Context, e *endpoint, h proxyproto.Header) (m *muxed, reused bool, err error) {
	if u.speaks != e.speaks {
		return nil, false, errNoServer // a request of the world before has picked an endpoint of this one
	}
	limit := maxMuxes
	if u.config.Connections > 0 {
		limit = min(limit, u.config.Connections)
	}
	return e.muxes.get(ctx, limit, func() (*muxed, error) { return u.mux(ctx, e, h) })
}

func (m *muxed) takes() bool            { return m.conn.Open() }
func (m *muxed) load() (open, most int) { return m.conn.Load() }
func (m *muxed) drain()                 { m.conn.Drain() }

func (m *muxed) unused(since time.Time) bool {
	open, _ := m.conn.Load()
	return open == 0 && m.used.Load() < since.UnixNano()
}

// mux makes a connection.
func (u *upstream) mux(ctx context.Context, e *endpoint, h proxyproto.Header) (*muxed, error) {
	if n := u.open.Add(1); u.config.Connections > 0 && n > int64(u.config.Connections) {
		u.open.Add(-1)
		return nil, errBusy
	}
	s, err := u.dial(ctx, e, h)
	if err != nil {
		u.open.Add(-1)
		e.failures.Add(1)
		return nil, err
	}
	if c, ok := s.conn.(*tls.Conn); ok && c.ConnectionState().NegotiatedProtocol != "h2" {
		s.close()
		return nil, fmt.Errorf("connect to %s: the server does not speak HTTP/2 over TLS", e.address)
	}
	m := &muxed{srv: s}
	m.heard.Store(time.Now().UnixNano())
	m.conn = http2.Client(below(s.conn, s.tcp, &m.heard, u.tls == nil), http2.Options{Settled: m.settled})
	go func() {
		m.conn.Run()
		u.open.Add(-1)
	}()
	return m, nil
}

// late is called when a request got no answer in time. A connection on which
// nothing at all has come since takes no more of them: its server may be gone.
func (t *call) late(began time.Time) {
	if t.to.heard.Load() < began.UnixNano() {
		t.to.conn.Drain()
	}
}

// vain is called when a client gave a request up before the server was late. That
// tells nothing, but where nothing at all comes for as long as the server may take:
// the next request tries another connection.
func (t *call) vain(asked time.Time, most time.Duration) {
	m := t.to
	heard, first := m.heard.Load(), m.asked.Load()
	if first <= heard {
		m.asked.CompareAndSwap(first, asked.UnixNano())
		return
	}
	if time.Now().UnixNano()-first > int64(most) {
		m.conn.Drain()
	}
}

// notTaken says that the server has not looked at a request.
func notTaken(err error) bool {
	return errors.Is(err, http2.ErrRefused) || errors.Is(err, http2.ErrBusy)
}

// isCancelled tells whether a server has cancelled a request, as those of gRPC do
// when its time is over.
func isCancelled(err error) bool {
	var reset *http2.ResetError
	return errors.As(err, &reset) && reset.Code == h2frame.CodeCancel
}

// errConnection is the end of a connection with requests on it.
var errConnection = errors.New("the connection has ended")

// broken says that an error means that the connection has ended.
func (s *server) broken(err error) bool {
	if s.two == nil {
		return ended(err)
	}
	return notTaken(err) || errors.Is(err, errConnection)
}

// two says whether the servers speak HTTP/2.
func (u *upstream) two() bool { return u.config.Protocol == "http2" || u.config.Protocol == "grpc" }

// probeTwo is well if GET of a path is answered with a status of 200 to 299.
func (u *upstream) probeTwo(ctx context.Context, e *endpoint, c *Check) error {
	srv, err := u.stream(ctx, e, proxyproto.Header{}, false)
	if err != nil {
		return err
	}
	defer srv.close()
	stop := context.AfterFunc(ctx, func() { srv.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	host := c.Host
	if host == "" {
		host = e.address
	}
	if _, err := fmt.Fprintf(srv.conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: hauberk-mesh-check\r\n\r\n", c.Path, host); err != nil {
		return err
	}
	var m http1.Message
	for m.Status < 200 {
		head, _, err := srv.in.head(maxHead)
		if err == nil {
			err = m.Response(head, methodGet)
		}
		if err != nil {
			return err
		}
	}
	if m.Status > 299 {
		return fmt.Errorf("status %d", m.Status)
	}
	return nil
}

var methodGet = []byte("GET")
