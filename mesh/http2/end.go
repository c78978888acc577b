package http2

import (
	"errors"
	"fmt"

	"hauberk.dev/mesh/h2frame"
)

// ErrRefused is what a Sink is told of a request that the server has not looked
// at: it may be sent once more, whatever it asks (RFC 9113, section 8.7).
var ErrRefused = errors.New("the server has not looked at the request")

// ResetError is what a Sink is told of a stream that its peer has reset.
type ResetError struct{ Code Code }

func (e *ResetError) Error() string {
	return fmt.Sprintf("the stream was reset with code %d", e.Code)
}

// Sink takes what comes on a stream that has no mate: its owner reads the request
// and answers it, or asks and reads the answer. Its methods are called by the
// goroutine that reads the connection, but for Sent and Lost, and must not wait.
type Sink interface {
	// Head is called for the heads of an answer: interim ones, and the final one.
	Head(h *Head)
	// Data takes bytes of a body, and maybe its end. used is how many need no more
	// room here; for the others the owner calls Consumed.
	Data(p []byte, end bool) (used int)
	// Trailers are the last fields, and the end.
	Trailers(fields []Field)
	// Sent says that so many bytes that SendData held have left.
	Sent(n int)
	// Lost says that nothing comes and nothing goes any more. It is not called for
	// streams that both sides have ended, or that the owner has reset.
	Lost(err error)
}

// Receive gives what comes on a request's stream to k. It is called in Request,
// in place of Forward and Answer.
func (s *Stream) Receive(k Sink) {
	c := s.c
	c.mu.Lock()
	over, err := s.over, c.err
	if !over {
		s.sink = k
	}
	c.mu.Unlock()
	if over {
		k.Lost(errors.Join(ErrClosed, err))
	}
}

// Ask sends a request of the caller's own, whose answer k takes. More of it is
// sent by SendData and SendTrailers; Flush has all of it written.
func (c *Conn) Ask(fields []Field, end bool, k Sink) (*Stream, error) {
	s := &Stream{c: c, declared: -1, sink: k, isHead: len(fields) > 0 && fields[0] == Field{Name: ":method", Value: "HEAD"}}
	for i := range fields {
		s.headBytes += int(fields[i].Size())
	}
	c.mu.Lock()
	switch {
	case c.err != nil:
		defer c.mu.Unlock()
		return nil, c.err
	case c.draining || c.heads+s.headBytes > maxHeadsHeld || c.nextID > lastStream:
		defer c.mu.Unlock()
		return nil, ErrBusy
	}
	s.window, s.credit = c.initial, streamWindow
	c.heads += s.headBytes
	s.headLocked(fields, end)
	c.unlock()
	return s, nil
}

// SendHead sends the head of an answer.
func (s *Stream) SendHead(fields []Field, interim, end bool) { s.sendHead(fields, interim, end) }

// SendData sends bytes of a body, and maybe its end. used is how many of them
// need not wait; Sent tells when the others have left.
func (s *Stream) SendData(p []byte, end bool) (used int) { return s.sendData(p, end) }

// SendTrailers sends the last fields, and the end.
func (s *Stream) SendTrailers(fields []Field) { s.sendTrailers(fields) }

// Flush has everything written that was sent.
func (s *Stream) Flush() { s.c.push(1) }

// Stop has the peer send no more, once all that was sent has left.
func (s *Stream) Stop() { s.stop(h2frame.CodeNone) }

// Consumed says that n bytes that Data was given need no more room.
func (s *Stream) Consumed(n int) { s.consumed(n) }

// Load is how many requests are under way on a client's end, and how many the
// server takes at once.
func (c *Conn) Load() (open, most int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	open, most = len(c.streams), min(c.most, MaxStreams)
	for _, l := range []*line{&c.waiting, &c.ready} {
		for s := l.first; s != nil; s = s.next {
			if s.id == 0 {
				open++
			}
		}
	}
	return open, most
}

// taker is who takes what comes on the stream, for those who do not read it.
func (s *Stream) taker() (k Sink, opened bool) {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.sink, s.id != 0
}

// lostBoth tells whoever waits for the stream that it is over: its mate, or its
// owner.
func (s *Stream) lostBoth(code Code, err error) {
	if mate := s.mate.Load(); mate != nil {
		mate.lost(code, err)
		return
	}
	if k, opened := s.taker(); k != nil {
		if !opened {
			err = fmt.Errorf("%w: %w", ErrRefused, err)
		}
		k.Lost(err)
	}
}

// resetByPeer tells an owner of a reset.
func (s *Stream) resetByPeer(code Code) {
	k, _ := s.taker()
	switch {
	case k == nil:
	case code == h2frame.CodeRefused && s.c.client:
		k.Lost(ErrRefused)
	default:
		k.Lost(&ResetError{code})
	}
}
