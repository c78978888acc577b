package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"time"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hessian"
	"hauberk.dev/mesh/http2"
)

// caller is a connection that asks, once at a time.
type caller interface {
	call() error
	Close() error
}

// open connects in the words of what is spoken.
func open(ctx context.Context, spoken, address string, kib int, shown *tls.Certificate) (caller, error) {
	switch spoken {
	case "h2", "grpc":
		return dialTwo(ctx, address, kib, spoken == "grpc")
	case "bolt", "dubbo":
		return dialRPC(ctx, address, kib, spoken == "dubbo")
	case "mtls":
		return dialTLS(ctx, address, kib, shown)
	}
	return dial(ctx, address, spoken == "https", kib)
}

// carrier is a connection under HTTP/2.
type carrier struct{ *net.TCPConn }

func (c carrier) Abort()  { _ = c.SetLinger(0); c.Close() }
func (c carrier) Finish() { c.Close() }

// two is a connection of HTTP/2.
type two struct {
	conn   *http2.Conn
	fields []http2.Field
	body   []byte
	want   int
	got    int
	over   chan error
}

func dialTwo(ctx context.Context, address string, kib int, grpc bool) (*two, error) {
	c, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp4", address)
	if err != nil {
		return nil, err
	}
	t := &two{want: kib << 10, over: make(chan error, 1)}
	t.fields = []http2.Field{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/" + strconv.Itoa(kib)},
		{Name: ":authority", Value: "localhost"}, {Name: "user-agent", Value: "bench"}}
	if grpc {
		t.fields[0].Value = "POST"
		t.fields = append(t.fields, http2.Field{Name: "content-type", Value: "application/grpc"}, http2.Field{Name: "te", Value: "trailers"})
		t.body, t.want = make([]byte, 5), t.want+5
	}
	t.conn = http2.Client(carrier{c.(*net.TCPConn)}, http2.Options{})
	go func() { _ = t.conn.Run() }()
	return t, nil
}

func (t *two) call() error {
	t.got = 0
	s, err := t.conn.Ask(t.fields, t.body == nil, t)
	if err != nil {
		return err
	}
	if t.body != nil {
		s.SendData(t.body, true)
	}
	s.Flush()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case err := <-t.over:
		if err == nil && t.got != t.want {
			err = fmt.Errorf("an answer of %d bytes, not %d", t.got, t.want)
		}
		return err
	case <-late.C:
		return errors.New("no answer in time")
	}
}

func (t *two) Close() error { t.conn.Close(); return nil }

// Head, Data, Trailers, Sent and Lost take the answer.
func (t *two) Head(h *http2.Head) {
	if h.Status != 200 || h.End {
		t.over <- fmt.Errorf("the answer is %d", h.Status)
	}
}

func (t *two) Data(p []byte, end bool) int {
	t.got += len(p)
	if end {
		t.over <- nil
	}
	return len(p)
}

func (t *two) Trailers([]http2.Field) { t.over <- nil }
func (t *two) Sent(int)               {}
func (t *two) Lost(err error) {
	select {
	case t.over <- err:
	default:
	}
}

// openOriginTwo answers as openOrigin does, in HTTP/2 and gRPC.
func openOriginTwo() (*origin, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	text := bytes.Repeat([]byte("x"), 64<<10)
	go eachConn(ln, func(c *net.TCPConn) {
		_ = http2.Server(carrier{c}, http2.Options{Failed: func(s *http2.Stream, _ error) { s.Reset(http2.CodeInternal) }, Request: func(s *http2.Stream, h *http2.Head) {
			kib, _ := strconv.Atoi(h.Path[1:])
			s.Receive(deaf{})
			kind, grpc := "application/octet-stream", h.GRPC()
			if grpc {
				kind = "application/grpc"
			}
			s.SendHead([]http2.Field{{Name: ":status", Value: "200"}, {Name: "content-type", Value: kind}}, false, false)
			if grpc {
				s.SendData(binary.BigEndian.AppendUint32([]byte{0}, uint32(kib<<10)), false)
			}
			s.SendData(text[:kib<<10], !grpc)
			if grpc {
				s.SendTrailers([]http2.Field{{Name: "grpc-status", Value: "0"}})
			}
			s.Flush()
		}}).Run()
	})
	return &origin{ln}, nil
}

func eachConn(ln net.Listener, do func(*net.TCPConn)) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go do(c.(*net.TCPConn))
	}
}

// deaf takes a request's body and does nothing with it.
type deaf struct{}

func (deaf) Head(*http2.Head)          {}
func (deaf) Data(p []byte, _ bool) int { return len(p) }
func (deaf) Trailers([]http2.Field)    {}
func (deaf) Sent(int)                  {}
func (deaf) Lost(error)                {}

// rpc is a connection of bolt or Dubbo.
type rpc struct {
	net.Conn
	in      *bufio.Reader
	dubbo   bool
	request []byte
	frame   []byte
}

func dialRPC(ctx context.Context, address string, kib int, isDubbo bool) (*rpc, error) {
	c, err := (&net.Dialer{Timeout: patience}).DialContext(ctx, "tcp4", address)
	if err != nil {
		return nil, err
	}
	x := &rpc{Conn: c, in: bufio.NewReaderSize(c, 16<<10), dubbo: isDubbo, frame: make([]byte, 128<<10)}
	x.request = boltFrame(bolt.Request, 7, []byte(strconv.Itoa(kib)))
	if isDubbo {
		x.request = dubboFrame(0xc2, 7, dubboBody(strconv.Itoa(kib)))
	}
	return x, nil
}

// boltFrame is a frame of version 1 whose content is not looked at.
func boltFrame(kind bolt.Type, id uint32, content []byte) []byte {
	command := bolt.Call
	if kind == bolt.Response {
		command = bolt.Reply
	}
	b := binary.BigEndian.AppendUint16([]byte{1, byte(kind)}, uint16(command))
	b = binary.BigEndian.AppendUint32(append(b, 1), id)
	b = append(b, bolt.Protobuf)
	if kind == bolt.Response {
		b = append(b, 0, 0)
	} else {
		b = binary.BigEndian.AppendUint32(b, 10000)
	}
	b = append(b, 0, 0, 0, 0)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(content))), content...)
}

func dubboBody(argument string) (b []byte) {
	for _, s := range []string{"2.0.2", "com.example.S", "1.0", "m", "Ljava/lang/String;", argument} {
		b = hessian.AppendString(b, s)
	}
	return append(b, 'H', 'Z')
}

func dubboFrame(flags byte, id uint64, body []byte) []byte {
	b := []byte{0xda, 0xbb, flags, 0}
	if flags&0x80 == 0 {
		b[3] = byte(dubbo.OK)
	}
	b = binary.BigEndian.AppendUint64(b, id)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

// read reads one frame into x.frame.
func (x *rpc) read() (int, error) {
	head := 20 // of an answer of bolt
	if x.dubbo {
		head = dubbo.HeaderLen
	}
	if x.frame[1] == byte(bolt.Request) && !x.dubbo {
		head = 22
	}
	for n := 0; ; {
		if _, err := io.ReadFull(x.in, x.frame[n:head]); err != nil {
			return 0, err
		}
		n = head
		size, err := 0, error(nil)
		if x.dubbo {
			size, err = dubbo.Size(x.frame[:n])
		} else {
			var e bolt.Extent
			e, err = bolt.Size(x.frame[:n])
			size = e.Len
		}
		switch {
		case err != nil:
			return 0, err
		case size == 0:
			head++
		case size > len(x.frame):
			return 0, fmt.Errorf("a frame of %d bytes", size)
		case size == n:
			return n, nil
		default:
			head = size
		}
	}
}

func (x *rpc) call() error {
	if err := x.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := x.Write(x.request); err != nil {
		return err
	}
	x.frame[1] = 0
	n, err := x.read()
	if err == nil && n < 1<<10 {
		err = fmt.Errorf("the answer is %.100q", x.frame[:n])
	}
	return err
}

// openOriginRPC answers calls whose argument is N by N KiB.
func openOriginRPC(isDubbo bool) (*origin, error) {
	ln, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	text := bytes.Repeat([]byte("x"), 64<<10)
	go eachConn(ln, func(c *net.TCPConn) {
		defer c.Close()
		x := &rpc{Conn: c, in: bufio.NewReaderSize(c, 64<<10), dubbo: isDubbo, frame: make([]byte, 128<<10)}
		for {
			x.frame[1] = byte(bolt.Request)
			n, err := x.read()
			if err != nil {
				return
			}
			kib := 1
			if bytes.HasSuffix(bytes.TrimSuffix(x.frame[:n], []byte("HZ")), []byte("64")) {
				kib = 64
			}
			b := boltFrame(bolt.Response, binary.BigEndian.Uint32(x.frame[5:]), text[:kib<<10])
			if isDubbo {
				b = dubboFrame(2, binary.BigEndian.Uint64(x.frame[4:]), text[:kib<<10])
			}
			if _, err := c.Write(b); err != nil {
				return
			}
		}
	})
	return &origin{ln}, nil
}

// dialTLS shows a certificate.
func dialTLS(ctx context.Context, address string, kib int, shown *tls.Certificate) (*client, error) {
	c, err := dial(ctx, address, false, kib)
	if err != nil {
		return nil, err
	}
	// Who answers is known here: it was started by this program.
	c.Conn = tls.Client(c.Conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, ServerName: "localhost", Certificates: []tls.Certificate{*shown}})
	c.in.Reset(c.Conn)
	return c, nil
}
