// Package http1 reads HTTP/1 messages strictly enough to judge them.
//
// A proxy that judges requests must see the same requests as the server behind
// it. What RFC 9112 lets a recipient repair is refused here: a bare line feed,
// a folded line, space before a colon, two lengths, a length beside a transfer
// coding. What is accepted is passed on byte for byte. The package opens no
// connection and holds no policy.
package http1

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
)

// Bounds of a message head.
const (
	MaxHead   = 64 << 10
	MaxFields = 128
	maxTarget = 16 << 10
)

// SyntaxError is a message that may not be passed on.
type SyntaxError struct{ Why string }

func (e *SyntaxError) Error() string { return "malformed message: " + e.Why }

func malformed(format string, args ...any) error {
	return &SyntaxError{fmt.Sprintf(format, args...)}
}

// Framing says where a message body ends.
type Framing int

// The framings.
const (
	NoBody     Framing = iota
	Length             // after Head.Length bytes
	Chunked            // by chunks
	UntilClose         // with the connection; responses only
)

// Head is what was learned from the head of a message.
type Head struct {
	// Raw is the head as it came, with its last empty line. It is valid until
	// the next head is read.
	Raw []byte

	Method string // requests
	Target string
	Host   string
	Status int // responses
	Minor  int // of HTTP/1

	Framing Framing
	Length  int64
	Close   bool // the sender closes after this message
	Upgrade bool // the sender asks for, or takes up, another protocol
	H2C     bool // of which one carries requests: to be dropped
	Expect  bool // the client waits for 100 Continue
}

// Reader reads message heads.
type Reader struct {
	R    *bufio.Reader
	raw  []byte
	part bool // raw is a part of a head, or one that was not good
	m    Message
	body Payload
}

// NewReader reads from r.
func NewReader(r io.Reader) *Reader { return &Reader{R: bufio.NewReaderSize(r, 16<<10)} }

// Rest is what has been read and not been used: another Reader must begin with
// it. A head that has been returned is used.
func (r *Reader) Rest() []byte {
	b, _ := r.R.Peek(r.R.Buffered())
	if r.part {
		return append(bytes.Clone(r.raw), b...)
	}
	return bytes.Clone(b)
}

// Body tells how far the last body has come; Resume has the reader be in the
// middle of one.
func (r *Reader) Body() Progress { return r.body.Progress() }

// Resume has the reader Continue with a body that has come so far.
func (r *Reader) Resume(g Progress) error { return r.body.Resume(g) }

// Request reads the head of a request. io.EOF means an orderly end between
// messages.
func (r *Reader) Request() (*Head, error) {
	if err := r.lines(); err != nil {
		return nil, err
	}
	err := r.m.Request(r.raw)
	r.part = err != nil
	return r.head(), err
}

// Response reads the head of a response to a request with the given method.
func (r *Reader) Response(method string) (*Head, error) {
	if err := r.lines(); err != nil {
		return nil, err
	}
	if err := r.m.Response(r.raw, []byte(method)); err != nil {
		return nil, err
	}
	r.part = false
	return r.head(), nil
}

func (r *Reader) head() *Head {
	m := &r.m
	h := &Head{Raw: r.raw, Method: string(m.Method), Target: string(m.Target), Host: string(m.Host), Status: m.Status, Minor: m.Minor,
		Framing: m.Framing, Close: m.Close, Upgrade: m.Upgrade, H2C: m.H2C, Expect: m.Expect}
	if h.Framing == Length {
		h.Length = m.Length
	}
	return h
}

// DropUpgrade takes the offer of another protocol out of a request. A server
// may always go on without taking one up.
func (h *Head) DropUpgrade() {
	kept := h.Raw[:0]
	for b := h.Raw; len(b) > 0; {
		end := bytes.IndexByte(b, '\n') + 1
		if end == 0 {
			end = len(b)
		}
		line := b[:end]
		b = b[end:]
		if name, _, ok := bytes.Cut(line, []byte(":")); ok && (is(name, "Upgrade") || is(name, "HTTP2-Settings")) {
			continue
		}
		kept = append(kept, line...)
	}
	h.Raw, h.Upgrade, h.H2C = kept, false, false
}

// lines reads up to and with the empty line.
func (r *Reader) lines() error {
	r.raw, r.part = r.raw[:0], true
	for begun := 0; ; {
		line, err := r.R.ReadSlice('\n')
		r.raw = append(r.raw, line...)
		switch {
		case len(r.raw) > MaxHead:
			return malformed("head over %d bytes", MaxHead)
		case err == bufio.ErrBufferFull:
			continue
		case err == io.EOF && len(r.raw) > 0:
			return io.ErrUnexpectedEOF
		case err != nil:
			return err
		}
		n, looked, err := HeadLength(r.raw, begun)
		if n > 0 || err != nil {
			return err
		}
		begun = looked
	}
}

// Path is AppendPath, strict, of strings.
func Path(method, target string) (string, error) {
	p, err := AppendPath(nil, []byte(method), []byte(target), false)
	return string(p), err
}
