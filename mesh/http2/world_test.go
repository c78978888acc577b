package http2

import (
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// tcp is a Transport over TCP.
type tcp struct{ *net.TCPConn }

func (c tcp) Abort()  { c.SetLinger(0); c.Close() }
func (c tcp) Finish() { c.Close() }

// promptTCP can do without waiting.
type promptTCP struct {
	tcp
	now *wire.Now
}

func (c promptTCP) WriteNow(p []byte) int { return c.now.Write(p) }

// below is one of the two ways there are.
func below(c *net.TCPConn, prompt bool) Transport {
	if prompt {
		return promptTCP{tcp{c}, wire.NewNow(c)}
	}
	return tcp{c}
}

// piped is a Transport whose peer sees each write when it reads it.
type piped struct{ net.Conn }

func (c piped) CloseWrite() error { return nil }
func (c piped) Abort()            { c.Close() }
func (c piped) Finish()           { c.Close() }

// relay is a proxy with one server connection for each of its clients.
type relay struct {
	t      testing.TB
	ln     net.Listener
	server string
	waits  atomic.Bool // nothing is written at once
	wg     sync.WaitGroup

	mu        sync.Mutex
	conns     []*Conn
	malformed []error
}

// newRelay listens, and passes what comes on to server.
func newRelay(t testing.TB, server string) *relay {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{t: t, ln: ln, server: server}
	r.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			r.wg.Go(func() { r.serve(c.(*net.TCPConn)) })
		}
	})
	t.Cleanup(r.close)
	return r
}

func (r *relay) address() string { return r.ln.Addr().String() }

func (r *relay) close() {
	r.ln.Close()
	r.mu.Lock()
	conns := r.conns
	r.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	done := make(chan struct{})
	go func() { r.wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		r.t.Error("the relay does not end")
	}
}

func (r *relay) keep(c *Conn) *Conn {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conns = append(r.conns, c)
	return c
}

func (r *relay) serve(client *net.TCPConn) {
	var up *Conn
	plain := func(s *Stream, status int, text string) {
		s.Answer([]Field{{Name: ":status", Value: strconv.Itoa(status)}, {Name: "content-length", Value: strconv.Itoa(len(text))}}, []byte(text))
	}
	down := r.keep(Server(below(client, !r.waits.Load()), Options{
		Request: func(s *Stream, h *Head) {
			if h.Path == "/refused" {
				plain(s, 403, "not you")
				return
			}
			if up == nil || !up.Open() {
				c, err := net.Dial("tcp", r.server)
				if err != nil {
					plain(s, 503, err.Error())
					return
				}
				up = r.keep(Client(below(c.(*net.TCPConn), !r.waits.Load()), Options{Malformed: r.fault}))
				r.wg.Go(func() { up.Run() })
			}
			if err := s.Forward(up, h); err != nil {
				s.Reset(h2frame.CodeRefused)
			}
		},
		Failed:    func(s *Stream, err error) { plain(s, 502, err.Error()) },
		Malformed: r.fault,
	}))
	down.Run()
	if up != nil {
		up.Close()
	}
}

func (r *relay) fault(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.malformed = append(r.malformed, err)
}
