// Package meshload asks and answers in every protocol of the mesh, for tests and
// for the soak of the mesh. Each request carries a number: the answer must carry
// it too, and a server notes one that it is asked twice. The package knows no
// proxy: who uses it says how to dial and where to listen.
package meshload

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"
)

// Protocols are those that New and Serve know.
var Protocols = []string{"http1", "http2", "grpc", "bolt", "dubbo", "tcp"}

// MaxSize is the most bytes a request carries.
const MaxSize = 64 << 10

const patience = time.Minute // for one answer

// Refused is an answer in the protocol's own words that says no.
type Refused struct{ Why string }

func (r *Refused) Error() string { return "refused: " + r.Why }

// Client asks over a connection it keeps. It is used by one goroutine.
type Client interface {
	// Ask makes one request and checks the answer.
	Ask(id uint64, size int) error
	// Abort begins a request and leaves at some point of it, which at names: 0 is
	// the beginning, 255 the end of the answer.
	Abort(id uint64, size int, at uint8)
	Close()
}

// New is a client of a protocol.
func New(protocol string, dial func() (net.Conn, error)) Client {
	switch protocol {
	case "http1":
		return &plain{dial: dial, frame: http1Request, answer: http1Answer}
	case "http2":
		return &http2Client{dial: dial}
	case "grpc":
		return &grpcClient{dial: dial}
	case "bolt":
		return &plain{dial: dial, frame: boltRequest, answer: boltAnswer}
	case "dubbo":
		return &plain{dial: dial, frame: dubboRequest, answer: dubboAnswer}
	case "tcp":
		return &plain{dial: dial, frame: tcpRequest, answer: tcpAnswer}
	}
	panic("meshload: no protocol " + protocol)
}

// Ledger counts what servers were asked.
type Ledger struct {
	Served, Twice atomic.Uint64
	seen          [1 << 16]atomic.Uint64 // bits of numbers up to 4 million; beyond it goes round
}

// note notes a whole request. Numbers must rise, and not be 4 million apart.
func (l *Ledger) note(id uint64) {
	l.Served.Add(1)
	bit := uint64(1) << (id % 64)
	if l.seen[id/64%uint64(len(l.seen))].Or(bit)&bit != 0 {
		l.Twice.Add(1)
	}
	// What is half a turn ahead is forgotten, so that numbers may go round.
	l.seen[(id/64+uint64(len(l.seen)/2))%uint64(len(l.seen))].Store(0)
}

// Serve answers on ln until the stop it returns has been called; that ends what
// is open, too.
func Serve(protocol string, ln net.Listener, l *Ledger) (stop func()) {
	switch protocol {
	case "http1", "http2":
		return serveHTTP(ln, l)
	case "grpc":
		return serveGRPC(ln, l)
	case "bolt":
		return serveFrames(ln, l, boltServe)
	case "dubbo":
		return serveFrames(ln, l, dubboServe)
	case "tcp":
		return serveFrames(ln, l, tcpServe)
	}
	panic("meshload: no protocol " + protocol)
}

// pattern is what bodies are made of.
var pattern = func() (b [MaxSize + 256]byte) {
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return b
}()

func body(id uint64, size int) []byte { return pattern[id%256:][:size] }

// plain is a client of a protocol whose requests are bytes and nothing else.
type plain struct {
	dial   func() (net.Conn, error)
	frame  func(b []byte, id uint64, size int) []byte
	answer func(r *bufio.Reader, id uint64, size int) error

	conn net.Conn
	in   *bufio.Reader
	out  []byte
}

func (p *plain) open() error {
	if p.conn != nil {
		return nil
	}
	c, err := p.dial()
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	p.conn = c
	if p.in == nil {
		p.in = bufio.NewReaderSize(c, 4<<10)
	}
	p.in.Reset(c)
	return nil
}

func (p *plain) Ask(id uint64, size int) error {
	if err := p.open(); err != nil {
		return err
	}
	p.conn.SetDeadline(time.Now().Add(patience))
	p.out = p.frame(p.out[:0], id, size)
	_, err := p.conn.Write(p.out)
	if err == nil {
		err = p.answer(p.in, id, size)
	}
	var no *Refused
	if errors.As(err, &no) && no.Why != "" && p.in.Buffered() == 0 {
		p.Close() // it may be closing
	} else if err != nil {
		p.reset()
	}
	return err
}

func (p *plain) Abort(id uint64, size int, at uint8) {
	if p.open() != nil {
		return
	}
	p.conn.SetDeadline(time.Now().Add(patience))
	p.out = p.frame(p.out[:0], id, size)
	if at < 128 {
		p.conn.Write(p.out[:len(p.out)*int(at)/128])
	} else if _, err := p.conn.Write(p.out); err == nil {
		// A part of the answer: how long it is depends on the protocol.
		for left := size * int(at-128) / 128; left > 0; {
			if _, err := p.in.Peek(1); err != nil {
				break
			}
			n, _ := p.in.Discard(min(left, p.in.Buffered()))
			if left -= n; n < 1000 {
				break
			}
		}
	}
	if at%3 == 0 {
		p.Close()
	} else {
		p.reset()
	}
}

func (p *plain) reset() {
	if t, ok := p.conn.(interface{ SetLinger(int) error }); ok {
		t.SetLinger(0)
	}
	p.Close()
}

func (p *plain) Close() {
	if p.conn != nil {
		p.conn.Close()
		p.conn = nil
	}
}
