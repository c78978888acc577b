package hbone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// Headroom is the room WriteFramed needs before the data.
const Headroom = h2frame.HeaderLen

// reasonField tells the other proxy why it was refused.
const reasonField = "hauberk-reason"

// StatusError is a peer's refusal to open a stream.
type StatusError struct {
	Status int
	Reason string // the peer's words, bounded
}

func (e *StatusError) Error() string {
	if e.Reason == "" {
		return fmt.Sprintf("the peer answered %d", e.Status)
	}
	return fmt.Sprintf("the peer answered %d: %q", e.Status, e.Reason)
}

// ResetError is a stream's end by the peer before its time.
type ResetError struct{ Code Code }

func (e *ResetError) Error() string {
	return fmt.Sprintf("stream reset by the peer (code %d)", e.Code)
}

// Stream is a TCP stream inside the connection. One goroutine may read while
// another writes.
type Stream struct {
	// Authority is the address asked for, Fields the other fields of the
	// request, on the server's side.
	Authority string
	Fields    []hpack.HeaderField

	h         *Conn
	id        uint32
	malformed string

	// Guarded by h.mu.
	window int64  // what may be sent
	unsent []byte // written while the connection was frozen
	behind bool   // that is being sent, so who writes waits
	ending bool   // this half ends after it
	fresh  bool   // the handler has not begun

	mu        sync.Mutex
	readable  sync.Cond // something below has changed
	chunks    []*chunk
	credit    int // what the peer may still send
	unacked   int // consumed since the last WINDOW_UPDATE
	status    string
	reason    string
	answered  bool // by this side
	peerEnded bool
	ownEnded  bool
	told      bool // the reader knows of the peer's end
	past      bool // in h.past
	err       error
}

// chunk is a pooled piece of received data.
type chunk struct {
	n   int
	buf [maxFrame]byte
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

// Field is the value of a field of the request, "" if absent.
func (s *Stream) Field(name string) string {
	for _, f := range s.Fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// receive takes what was in a DATA frame that costs the peer credit bytes.
func (s *Stream) receive(c *chunk, cost int) error {
	n := c.n
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.peerEnded {
		return h2frame.Fault(h2frame.CodeClosed, "DATA after the end of stream %d", s.id)
	}
	if s.credit -= cost; s.credit < 0 {
		return h2frame.Fault(h2frame.CodeFlowControl, "more DATA than the window of stream %d", s.id)
	}
	s.unacked += cost - n // padding is consumed at once
	if s.err != nil || n == 0 {
		chunks.Put(c)
		return nil
	}
	// Small frames share a chunk, so that the window bounds memory too.
	if k := len(s.chunks); k > 0 && s.chunks[k-1].n+n <= maxFrame {
		last := s.chunks[k-1]
		last.n += copy(last.buf[last.n:], c.buf[:n])
		chunks.Put(c)
	} else {
		s.chunks = append(s.chunks, c)
	}
	s.readable.Signal()
	return nil
}

// peerDone notes that the peer has closed its half.
func (s *Stream) peerDone() {
	s.mu.Lock()
	s.peerEnded = true
	both := s.ownEnded
	s.readable.Broadcast()
	s.mu.Unlock()
	if both {
		s.h.remove(s)
	}
}

// noMore notes that the peer, whose half is closed, will not read the rest of
// this side's. What it sent stays readable.
func (s *Stream) noMore() (orderly bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.peerEnded {
		return false
	}
	s.ownEnded = true
	return true
}

// end ends both halves at once, with what is not yet read lost.
func (s *Stream) end(err error) {
	s.mu.Lock()
	if s.err == nil {
		s.err = err
	}
	for _, c := range s.chunks {
		chunks.Put(c)
	}
	s.chunks = nil
	past := s.past
	s.past = false
	s.readable.Broadcast()
	s.mu.Unlock()
	s.h.mu.Lock()
	if past {
		delete(s.h.past, s.id)
	}
	s.h.window.Broadcast()
	s.h.mu.Unlock()
}

// fail ends the stream and tells the peer.
func (s *Stream) fail(err error, code Code) {
	s.h.mu.Lock()
	live := s.h.streams[s.id] == s
	s.h.mu.Unlock()
	s.end(err)
	if live {
		s.h.remove(s)
		s.h.enqueue(h2frame.Append(nil, h2frame.Reset, 0, s.id, u32(uint32(code))))
	}
}

// Reset ends the stream at once. After an orderly end it does nothing that the
// peer would notice, even if that end is still to be sent.
func (s *Stream) Reset(code Code) {
	s.h.mu.Lock()
	s.mu.Lock()
	orderly := s.peerEnded && (s.ownEnded || s.ending)
	s.mu.Unlock()
	s.h.mu.Unlock()
	if orderly {
		s.end(ErrClosed)
		return
	}
	s.fail(ErrClosed, code)
}

func (s *Stream) setStatus(m message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.status != "" {
		return // trailers
	}
	s.status = m.status
	for _, f := range m.other {
		if f.Name == reasonField {
			s.reason = f.Value[:min(len(f.Value), 512)]
		}
	}
	s.readable.Broadcast()
}

// Await waits until the peer has accepted or refused a stream that Open left.
func (s *Stream) Await(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.fail(ctx.Err(), h2frame.CodeCancel) })
	defer stop()
	err := s.awaitStatus()
	if err != nil && !errors.Is(err, wire.ErrFrozen) {
		s.Reset(h2frame.CodeCancel)
	}
	return err
}

func (s *Stream) awaitStatus() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.status == "" && s.err == nil && !s.peerEnded {
		if s.h.frozen.Load() {
			return wire.ErrFrozen
		}
		s.readable.Wait()
	}
	switch {
	case s.status == "200":
		return nil
	case s.status != "":
		n, _ := strconv.Atoi(s.status)
		return &StatusError{n, s.reason}
	case s.err != nil:
		return s.err
	}
	return errors.New("the peer closed the stream without an answer")
}

// Accept answers the request with 200; the stream is then open.
func (s *Stream) Accept() error {
	return s.respond(0, []hpack.HeaderField{{Name: ":status", Value: "200"}})
}

// Refuse answers the request with a status other than 200.
func (s *Stream) Refuse(status int, reason string) error {
	err := s.respond(h2frame.FlagEndStream, []hpack.HeaderField{
		{Name: ":status", Value: strconv.Itoa(status)}, {Name: reasonField, Value: reason[:min(len(reason), 512)]}})
	if err == nil {
		// The peer learns the status first and then that its half is not read.
		s.fail(ErrClosed, h2frame.CodeNone)
	}
	return err
}

func (s *Stream) respond(flags byte, fields []hpack.HeaderField) error {
	s.mu.Lock()
	s.answered = true
	err := s.err
	s.mu.Unlock()
	if err != nil {
		return err // reset meanwhile
	}
	return s.h.write(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders|flags, s.id, encodeFields(fields)))
}

// take waits for data and hands over all there is, for an empty list.
func (s *Stream) take(empty []*chunk) (got []*chunk, err error) {
	s.mu.Lock()
	if err = s.waitLocked(); err == nil {
		got, s.chunks = s.chunks, empty
	}
	s.mu.Unlock()
	if err == io.EOF {
		s.atEnd()
	}
	return got, err
}

// waitLocked waits until there is something to read.
func (s *Stream) waitLocked() error {
	for {
		switch {
		case s.err != nil:
			return s.err
		case s.h.frozen.Load():
			return wire.ErrFrozen
		case len(s.chunks) > 0:
			return nil
		case s.peerEnded:
			return io.EOF
		}
		s.readable.Wait()
	}
}

// atEnd notes that the reader knows of the peer's end.
func (s *Stream) atEnd() {
	s.mu.Lock()
	s.told = true
	past := s.past
	s.past = false
	s.mu.Unlock()
	if past {
		s.h.forget(s)
	}
}

// consumed gives the peer its credit back, now and then. It does not wait for
// those who write.
func (s *Stream) consumed(n int) {
	s.mu.Lock()
	s.unacked += n
	grant := 0
	if s.unacked >= streamWindow/4 && !s.peerEnded && s.err == nil {
		grant = s.unacked
		s.credit += grant
		s.unacked = 0
	}
	s.mu.Unlock()
	if grant > 0 {
		s.h.enqueue(h2frame.Append(nil, h2frame.Window, 0, s.id, u32(uint32(grant))))
	}
}

// WriteTo writes what is received to w until the peer has closed its half.
func (s *Stream) WriteTo(w io.Writer) (total int64, err error) {
	var got []*chunk
	for {
		got, err = s.take(got[:0])
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
		for _, c := range got {
			if err == nil {
				var n int
				n, err = w.Write(c.buf[:c.n])
				total += int64(n)
				s.consumed(c.n)
			}
			chunks.Put(c)
		}
		if err != nil {
			return total, err
		}
	}
}

// Read reads what is received.
func (s *Stream) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	s.mu.Lock()
	if err := s.waitLocked(); err != nil {
		s.mu.Unlock()
		if err == io.EOF {
			s.atEnd()
		}
		return 0, err
	}
	c := s.chunks[0]
	n := copy(p, c.buf[:c.n])
	if n == c.n {
		s.chunks = slices.Delete(s.chunks, 0, 1) // which keeps the room
		chunks.Put(c)
	} else {
		copy(c.buf[:], c.buf[n:c.n])
		c.n -= n
	}
	s.mu.Unlock()
	s.consumed(n)
	return n, nil
}

type framed [Headroom + maxFrame]byte

var frames = sync.Pool{New: func() any { return new(framed) }}

// Write sends p. It copies; WriteFramed does not.
func (s *Stream) Write(p []byte) (int, error) {
	b := frames.Get().(*framed)
	defer frames.Put(b)
	sent := 0
	for sent < len(p) {
		n := copy(b[Headroom:], p[sent:])
		k, err := s.WriteFramed(b[:Headroom+n])
		sent += k
		if err != nil {
			return sent, err
		}
	}
	return sent, nil
}

// WriteFramed sends b[Headroom:], using the room before it, and destroying b:
// frames leave in one piece and nothing is copied.
func (s *Stream) WriteFramed(b []byte) (sent int, err error) {
	for len(b) > Headroom {
		n, err := s.reserve(b[Headroom:])
		if err != nil {
			return sent, err
		}
		if n == 0 {
			return sent + len(b) - Headroom, nil
		}
		h2frame.Put(b, n, h2frame.Data, 0, s.id)
		if err := s.h.write(b[:Headroom+n]); err != nil {
			return sent, err
		}
		sent += n
		b = b[n:] // the next header overwrites data already sent
	}
	return sent, nil
}

// reserve waits until something of p may be sent, and tells how much. Nothing
// means that the connection is frozen and p is kept.
func (s *Stream) reserve(p []byte) (int, error) {
	h := s.h
	h.mu.Lock()
	defer h.mu.Unlock()
	for {
		if h.err != nil {
			return 0, h.err
		}
		if h.streams[s.id] != s {
			return 0, s.cause()
		}
		if h.frozen.Load() {
			s.unsent = append(s.unsent, p...)
			return 0, nil
		}
		if !s.behind {
			if n := s.affordLocked(len(p)); n > 0 {
				return n, nil
			}
		}
		h.window.Wait()
	}
}

// affordLocked takes up to want bytes from the windows.
func (s *Stream) affordLocked(want int) int {
	n := min(int64(want), s.h.send, s.window, int64(s.h.frame))
	if n <= 0 {
		return 0
	}
	s.h.send -= n
	s.window -= n
	return int(n)
}

func (s *Stream) cause() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return s.err
	}
	return ErrClosed
}

// CloseWrite closes this side's half: the peer reads to the end.
func (s *Stream) CloseWrite() error {
	s.h.mu.Lock()
	s.ending = s.behind || len(s.unsent) > 0
	later := s.ending
	s.h.mu.Unlock()
	if later {
		return nil
	}
	return s.endOwn(false)
}

// endOwn sends the end of our half; late, if it was promised before.
func (s *Stream) endOwn(late bool) error {
	s.mu.Lock()
	if s.ownEnded || s.err != nil && !late {
		s.mu.Unlock()
		return nil
	}
	s.ownEnded = true
	s.mu.Unlock()
	err := s.h.write(h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, s.id, nil))
	s.mu.Lock()
	both := s.peerEnded
	s.mu.Unlock()
	if both {
		s.h.remove(s)
	}
	return err
}
