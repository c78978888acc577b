// Package dubbo speaks the Dubbo protocol with hessian2 content, as far as the
// bank needs it: calls with text and numbers, and heartbeats.
//
// The values are encoded by dubbo-go-hessian2; the frames are bounded here.
package dubbo

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	hessian "github.com/apache/dubbo-go-hessian2"

	"example.com/bank/call"
)

// Flags of a frame.
const (
	flagRequest = 0x80
	flagTwoWay  = 0x40
	flagEvent   = 0x20
	hessian2    = 2
	maskCodec   = 0x1f
)

// Status of a reply.
const (
	StatusOK         = 20
	StatusBadRequest = 40
	StatusNoService  = 60
	StatusError      = 70
)

const (
	magic    = 0xdabb
	headSize = 16
	maxBody  = 64 << 10
	version  = "5.3.0"
	maxConns = 256
)

// frame is one message.
type frame struct {
	flags  byte
	status byte
	id     uint64
	body   []byte
}

func (f frame) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, magic)
	b = append(b, f.flags, f.status)
	b = binary.BigEndian.AppendUint64(b, f.id)
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.body)))
	return append(b, f.body...)
}

func readFrame(r io.Reader) (frame, error) {
	var head [headSize]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return frame{}, err
	}
	f := frame{flags: head[2], status: head[3], id: binary.BigEndian.Uint64(head[4:])}
	size := binary.BigEndian.Uint32(head[12:])
	switch {
	case binary.BigEndian.Uint16(head[:]) != magic:
		return frame{}, fmt.Errorf("read frame: magic is %x", head[:2])
	case f.flags&maskCodec != hessian2:
		return frame{}, fmt.Errorf("read frame: serialisation %d is not spoken here", f.flags&maskCodec)
	case size > maxBody:
		return frame{}, fmt.Errorf("read frame: body of %d bytes is too large", size)
	}
	f.body = make([]byte, size)
	if _, err := io.ReadFull(r, f.body); err != nil {
		return frame{}, errors.Join(io.ErrUnexpectedEOF, err)
	}
	return f, nil
}

// Request is a call.
type Request struct {
	Service string // Java interface
	Version string
	Method  string
	// Args are string or int64; the descriptor follows from that.
	Args []any
}

func descriptor(args []any) string {
	var b strings.Builder
	for _, a := range args {
		if _, ok := a.(int64); ok {
			b.WriteString("J")
		} else {
			b.WriteString("Ljava/lang/String;")
		}
	}
	return b.String()
}

// appendRequest encodes the body of a call.
func appendRequest(r Request, attachments [][2]string) ([]byte, error) {
	e := hessian.NewEncoder()
	values := append([]any{version, r.Service, r.Version, r.Method, descriptor(r.Args)}, r.Args...)
	for _, v := range values {
		if err := e.Encode(v); err != nil {
			return nil, fmt.Errorf("encode request: %w", err)
		}
	}
	body := append(slices.Clone(e.Buffer()), 'H')
	for _, a := range attachments {
		kv := hessian.NewEncoder()
		if err := errors.Join(kv.Encode(a[0]), kv.Encode(a[1])); err != nil {
			return nil, fmt.Errorf("encode attachments: %w", err)
		}
		body = append(body, kv.Buffer()...)
	}
	return append(body, 'Z'), nil
}

// parseRequest decodes the body of a call. The decoder may panic on bytes that
// no peer writes; that is an error like any other.
func parseRequest(body []byte) (r Request, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("decode request: %v", p)
		}
	}()
	d := hessian.NewDecoder(body)
	var desc, dubboVersion string
	for _, s := range []*string{&dubboVersion, &r.Service, &r.Version, &r.Method, &desc} {
		v, err := d.Decode()
		if err != nil {
			return Request{}, fmt.Errorf("decode request: %w", err)
		}
		*s, _ = v.(string)
	}
	for desc != "" {
		v, err := d.Decode()
		if err != nil {
			return Request{}, fmt.Errorf("decode argument: %w", err)
		}
		rest, isText := strings.CutPrefix(desc, "Ljava/lang/String;")
		rest, isLong := cutIf(rest, "J", !isText)
		if desc = rest; !isText && !isLong {
			return Request{}, fmt.Errorf("decode argument: descriptor %.100q is neither text nor number", desc)
		}
		switch v.(type) {
		case string:
			if !isText {
				return Request{}, errors.New("decode argument: text, announced was a number")
			}
		case int64:
			if !isLong {
				return Request{}, errors.New("decode argument: a number, announced was text")
			}
		default:
			return Request{}, fmt.Errorf("decode argument: %T is neither text nor number", v)
		}
		r.Args = append(r.Args, v)
	}
	return r, nil
}

func cutIf(s, prefix string, cond bool) (string, bool) {
	if !cond {
		return s, false
	}
	return strings.CutPrefix(s, prefix)
}

// Kinds of a reply.
const (
	replyException = 0
	replyValue     = 1
	replyNull      = 2
)

// appendValue encodes the body of a good reply.
func appendValue(v string) ([]byte, error) {
	e := hessian.NewEncoder()
	err := errors.Join(e.Encode(int32(replyValue)), e.Encode(v))
	return e.Buffer(), err
}

// parseValue decodes the body of a good reply.
func parseValue(body []byte) (v string, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("decode reply: %v", p)
		}
	}()
	d := hessian.NewDecoder(body)
	kind, err := d.Decode()
	if err != nil {
		return "", fmt.Errorf("decode reply: %w", err)
	}
	if k, _ := kind.(int32); k != replyValue && k != replyValue+3 {
		return "", fmt.Errorf("decode reply: kind %v has no value", kind)
	}
	value, err := d.Decode()
	if err != nil {
		return "", fmt.Errorf("decode reply: %w", err)
	}
	v, ok := value.(string)
	if !ok {
		return "", fmt.Errorf("decode reply: %T is no text", value)
	}
	return v, nil
}

// Handler answers calls. An error becomes a service error.
type Handler func(context.Context, Request) (string, error)

// Serve answers calls until the context ends, then closes every connection and
// returns when all handlers have.
func Serve(ctx context.Context, ln net.Listener, handle Handler) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { ln.Close() })
	slots := make(chan struct{}, maxConns)
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		select {
		case slots <- struct{}{}:
		default:
			c.Close() // full
			continue
		}
		wg.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			serveConn(ctx, c, handle)
		})
	}
}

// serveConn answers one client. A client that breaks the protocol is dropped.
func serveConn(ctx context.Context, c net.Conn, handle Handler) {
	r := bufio.NewReader(c)
	for {
		c.SetReadDeadline(time.Now().Add(5 * time.Minute))
		f, err := readFrame(r)
		if err != nil || f.flags&flagRequest == 0 {
			return
		}
		reply := answer(ctx, f, handle)
		if f.flags&flagTwoWay == 0 {
			continue
		}
		c.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Write(reply.append(nil)); err != nil {
			return
		}
	}
}

// answer makes the reply to a call or a heartbeat.
func answer(ctx context.Context, f frame, handle Handler) frame {
	out := frame{flags: hessian2, status: StatusOK, id: f.id}
	if f.flags&flagEvent != 0 {
		out.flags |= flagEvent
		out.body = []byte{'N'}
		return out
	}
	req, err := parseRequest(f.body)
	if err != nil {
		return failed(out, StatusBadRequest, err)
	}
	value, err := handle(ctx, req)
	if err != nil {
		return failed(out, StatusError, err)
	}
	if out.body, err = appendValue(value); err != nil {
		return failed(out, StatusError, err)
	}
	return out
}

func failed(out frame, status byte, err error) frame {
	e := hessian.NewEncoder()
	e.Encode(err.Error()) // text always encodes
	out.status, out.body = status, e.Buffer()
	return out
}

// Client calls a Dubbo server.
type Client struct {
	pool *call.Pool
	id   atomic.Uint64
}

// NewClient returns a client of the server at an address.
func NewClient(address string) *Client { return &Client{pool: call.New(address)} }

// Close closes idle connections.
func (c *Client) Close() { c.pool.Close() }

// Call makes a call, again if a connection breaks. A status other than ok
// comes as *call.Refusal.
func (c *Client) Call(ctx context.Context, req Request) (string, error) {
	body, err := appendRequest(req, [][2]string{{"dubbo", version}, {"interface", req.Service}, {"path", req.Service}, {"version", req.Version}})
	if err != nil {
		return "", err
	}
	var value string
	err = c.pool.Do(ctx, func(conn net.Conn) error {
		value, err = exchange(conn, frame{flags: flagRequest | flagTwoWay | hessian2, id: c.id.Add(1), body: body})
		return err
	})
	return value, err
}

func exchange(conn net.Conn, f frame) (string, error) {
	if _, err := conn.Write(f.append(nil)); err != nil {
		return "", err
	}
	// Nothing is sent before the next call, so nothing read ahead is lost.
	reply, err := readFrame(bufio.NewReader(conn))
	switch {
	case err != nil:
		return "", err
	case reply.flags&flagRequest != 0 || reply.id != f.id:
		return "", errors.New("dubbo: reply belongs to another call")
	case reply.status != StatusOK:
		return "", &call.Refusal{Reason: fmt.Sprintf("dubbo: status %d", reply.status)}
	}
	return parseValue(reply.body)
}
