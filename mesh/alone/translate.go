package alone

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
)

// A head of HTTP/2 becomes one of HTTP/1 for a session, and back: RFC 9113,
// section 8.3. What either protocol forbids has been refused by its own parser.

// appendRequest writes the head of a request as HTTP/1 has it.
func appendRequest(b []byte, h *http2.Head) []byte {
	b = append(append(b, h.Method...), ' ')
	if h.Method == "CONNECT" {
		b = append(b, h.Authority...)
	} else {
		b = append(b, h.Path...)
	}
	b = append(append(append(b, " HTTP/1.1\r\nHost: "...), h.Authority...), "\r\n"...)
	cookies := 0
	for i := range h.Fields {
		switch f := &h.Fields[i]; {
		case f.IsPseudo() || f.Name == "host":
		case f.Name == "cookie":
			cookies++
		default:
			b = appendField(b, f.Name, f.Value)
		}
	}
	if cookies > 0 {
		b = appendCookies(b, h.Fields)
	}
	return append(b, "\r\n"...)
}

// appendCookies makes one field of the crumbs: RFC 9113, section 8.2.3.
func appendCookies(b []byte, fields []http2.Field) []byte {
	b = append(b, "Cookie: "...)
	first := true
	for i := range fields {
		if fields[i].Name != "cookie" {
			continue
		}
		if !first {
			b = append(b, "; "...)
		}
		b = append(b, fields[i].Value...)
		first = false
	}
	return append(b, "\r\n"...)
}

// appendResponse writes the head of an answer as HTTP/1 has it. One that tells no
// length ends with its stream, but one to HEAD, which says that of another.
func appendResponse(b []byte, h *http2.Head, toHead bool) []byte {
	b = strconv.AppendInt(append(b, "HTTP/1.1 "...), int64(h.Status), 10)
	b = append(append(append(b, ' '), reasons[h.Status]...), "\r\n"...)
	for i := range h.Fields {
		if f := &h.Fields[i]; !f.IsPseudo() {
			b = appendField(b, f.Name, f.Value)
		}
	}
	if h.End && !toHead && h.Length < 0 && h.Status >= 200 && h.Status != 204 && h.Status != 304 && !h.GRPC() {
		b = append(b, "Content-Length: 0\r\n"...)
	}
	return append(b, "\r\n"...)
}

// draft is a head on its way to HTTP/2.
type draft struct {
	m      http1.Message
	text   []byte // of the head, names in lower case
	names  []span
	fields []http2.Field
}

// span is where a field is in the text.
type span struct{ from, colon, to int }

var drafts = sync.Pool{New: func() any { return new(draft) }}

func (d *draft) drop() {
	d.m = http1.Message{Fields: d.m.Fields[:0]}
	clear(d.fields)
	d.text, d.names, d.fields = d.text[:0], d.names[:0], d.fields[:0]
	drafts.Put(d)
}

// add notes a field, in text that becomes one string for all.
func (d *draft) add(name, value []byte) {
	from := len(d.text)
	for _, c := range name {
		if 'A' <= c && c <= 'Z' {
			c |= 0x20
		}
		d.text = append(d.text, c)
	}
	colon := len(d.text)
	d.text = append(d.text, value...)
	d.names = append(d.names, span{from, colon, len(d.text)})
}

func (d *draft) finish() {
	text := string(d.text)
	for _, n := range d.names {
		d.fields = append(d.fields, http2.Field{Name: text[n.from:n.colon], Value: text[n.colon:n.to]})
	}
}

// request makes the fields of a request of the head of HTTP/1 in d.m. A call of
// gRPC says no length.
func (d *draft) request(scheme string) {
	m := &d.m
	d.fields = append(d.fields, http2.Field{Name: ":method", Value: methodName(m.Method)}, http2.Field{Name: ":scheme", Value: scheme})
	d.add(pathField, m.Target)
	if len(m.Host) > 0 {
		d.add(authorityField, m.Host)
	}
	grpc := isGRPC(m)
	for i := range m.Fields {
		f := &m.Fields[i]
		if equalFold(f.Name, "host") || grpc && equalFold(f.Name, "content-length") || ofConnection(f.Name) {
			continue
		}
		d.add(f.Name, f.Value)
	}
	d.finish()
}

// response makes the fields of an answer.
func (d *draft) response() {
	m := &d.m
	var b [3]byte
	d.add(statusField, strconv.AppendInt(b[:0], int64(m.Status), 10))
	grpc := isGRPC(m)
	for i := range m.Fields {
		f := &m.Fields[i]
		if grpc && equalFold(f.Name, "content-length") || ofConnection(f.Name) {
			continue
		}
		d.add(f.Name, f.Value)
	}
	d.finish()
}

var (
	pathField      = []byte(":path")
	authorityField = []byte(":authority")
	statusField    = []byte(":status")
)

// ofConnection are the fields that HTTP/2 has no use for.
func ofConnection(name []byte) bool {
	return equalFold(name, "connection") || equalFold(name, "transfer-encoding") || equalFold(name, "upgrade") || equalFold(name, "keep-alive") ||
		equalFold(name, "proxy-connection")
}

// methodName is a method as a string, without allocating those that are common.
func methodName(m []byte) string {
	switch string(m) {
	case "GET":
		return "GET"
	case "POST":
		return "POST"
	case "HEAD":
		return "HEAD"
	case "PUT":
		return "PUT"
	}
	return string(m)
}

// isGRPC says whether a message says it is gRPC's.
func isGRPC(m *http1.Message) bool {
	kind, _ := m.Field("Content-Type")
	const grpc = "application/grpc"
	return len(kind) >= len(grpc) && equalFold(kind[:len(grpc)], grpc) && (len(kind) == len(grpc) || kind[len(grpc)] == '+' || kind[len(grpc)] == ';')
}

// heading gathers the head of a message that is written in pieces.
type heading struct{ part []byte }

// next takes a whole head off the front of p, or keeps what there is of it.
func (h *heading) next(p []byte) (head, rest []byte, err error) {
	b := p
	if len(h.part) > 0 {
		h.part = append(h.part, p...)
		b = h.part
	}
	n, _, err := http1.HeadLength(b, 0)
	switch {
	case err != nil:
		return nil, nil, err
	case n == 0 && len(b) > http1.MaxHead:
		return nil, nil, errHead
	case n == 0 && len(h.part) == 0:
		h.part = append(h.part, p...)
		return nil, nil, nil
	case n == 0:
		return nil, nil, nil
	}
	h.part = nil
	return b[:n], b[n:], nil
}

// asking is a client's end: the request that came, the answer that goes.
type asking struct {
	stream
	method  []byte // of the request; the session's
	head    heading
	pending *draft // the head of the answer, until something follows
	begun   bool   // the final head was written
}

// Head is for the other end.
func (t *asking) Head(*http2.Head) {}

// Write takes the answer: its heads in the words of HTTP/1, its body as it is.
func (t *asking) Write(p []byte) (int, error) {
	rest, err := t.heads(p)
	if err == nil && t.begun {
		t.sendPending(false)
		err = t.send(rest, false)
		t.s.Flush()
	}
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// last takes what is left of the answer, and ends it.
func (t *asking) last(p []byte, trailers []http2.Field) error {
	if t.sentEnd {
		return nil
	}
	rest, err := t.heads(p)
	if err != nil {
		return err
	}
	if !t.begun {
		return io.ErrUnexpectedEOF
	}
	t.sendPending(len(rest) == 0 && trailers == nil)
	if !t.sentEnd && len(rest) > 0 || trailers == nil && !t.sentEnd {
		err = t.send(rest, trailers == nil)
	}
	if trailers != nil {
		t.s.SendTrailers(trailers)
	}
	t.ended()
	t.s.Flush()
	return err
}

func (t *stream) ended() {
	t.mu.Lock()
	t.sentEnd = true
	t.mu.Unlock()
}

// heads sends interim heads, and keeps the final one.
func (t *asking) heads(p []byte) (rest []byte, err error) {
	for rest = p; !t.begun && len(rest) > 0; {
		var head []byte
		if head, rest, err = t.head.next(rest); head == nil {
			return nil, err
		}
		d := drafts.Get().(*draft)
		if err := d.m.Response(head, t.method); err != nil {
			d.drop()
			return nil, err
		}
		d.response()
		if d.m.Status < 200 {
			t.s.SendHead(d.fields, true, false)
			t.s.Flush()
			d.drop()
			continue
		}
		t.pending, t.begun = d, true
	}
	return rest, nil
}

func (t *asking) sendPending(end bool) {
	if t.pending == nil {
		return
	}
	t.s.SendHead(t.pending.fields, false, end)
	t.pending.drop()
	t.pending = nil
	if end {
		t.ended()
	}
}

// forget gives back what an answer that does not come to its end holds.
func (t *asking) forget() {
	if t.pending != nil {
		t.pending.drop()
		t.pending = nil
	}
}

// call is an upstream's end: the request that goes, the answer that comes.
type call struct {
	stream
	to     *muxed
	scheme string
	head   heading
	body   http1.Payload
	asked  bool
	toHead bool
	left   []byte // of a chunk's line
	after  []http2.Field
}

// Head takes a head of the answer.
func (t *call) Head(h *http2.Head) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.peerEnd = t.peerEnd || h.End
	if !t.closed {
		b := blocks.Get().(*block)
		text := appendResponse(b[:0], h, t.toHead)
		t.in.write(text)
		t.text += len(text)
		blocks.Put(b)
	}
	t.rings.add(&t.stream)
}

// Lost tells the end of a connection from that of a stream.
func (t *call) Lost(err error) {
	var reset *http2.ResetError
	var fault *http2.StreamError
	if !errors.As(err, &reset) && !errors.As(err, &fault) && !notTaken(err) {
		err = fmt.Errorf("%w: %w", errConnection, err)
	}
	t.stream.Lost(err)
}

// Write takes the request in the words of HTTP/1. A head that has left is told: who
// has asked it that far may not have others asked.
func (t *call) Write(p []byte) (n int, err error) {
	rest := p
	if !t.asked {
		head, after, err := t.head.next(rest)
		if head == nil {
			return len(p), err
		}
		if err := t.ask(head); err != nil {
			return 0, err
		}
		rest = after
	}
	n = len(p) - len(rest)
	err = t.pass(rest)
	t.s.Flush()
	if err != nil {
		return n, err
	}
	return len(p), nil
}

func (t *call) ask(head []byte) error {
	d := drafts.Get().(*draft)
	defer d.drop()
	if err := d.m.Request(head); err != nil {
		return fmt.Errorf("write a request: %w", err)
	}
	t.body.Start(d.m.Framing, d.m.Length)
	d.request(t.scheme)
	t.toHead = string(d.m.Method) == "HEAD"
	end := t.body.Ended()
	s, err := t.to.conn.Ask(d.fields, end, t)
	if err != nil {
		return err
	}
	t.asked, t.s = true, s
	if end {
		t.ended()
	}
	return nil
}

// pass sends what is left of the body.
func (t *call) pass(p []byte) error {
	if len(t.left) > 0 {
		p = append(t.left, p...)
		t.left = nil
	}
	for !t.body.Ended() {
		data, n, err := t.body.Next(p)
		p = p[n:]
		switch {
		case err != nil:
			return err
		case len(data) > 0:
			end := t.body.Ended() && t.after == nil
			if err := t.send(data, end); err != nil {
				return err
			}
			if end {
				t.ended()
			}
			continue
		case !t.body.Ended(): // a chunk's line comes in pieces
			t.left = append(t.left, p...)
			return nil
		}
	}
	t.mu.Lock()
	sent := t.sentEnd
	t.mu.Unlock()
	if sent {
		return nil
	}
	t.ended()
	if t.after != nil {
		t.s.SendTrailers(t.after)
		return nil
	}
	return t.send(nil, true)
}
