package http2

import (
	"errors"
	"fmt"

	"hauberk.dev/mesh/h2frame"
)

func (c *Conn) readHeaders(f h2frame.Header, p []byte) error {
	if f.Stream == 0 {
		return h2frame.Fault(h2frame.CodeProtocol, "HEADERS on stream 0")
	}
	block, self, err := h2frame.Unpad(f, p)
	if err != nil {
		return err
	}
	if !f.Has(h2frame.FlagEndHeaders) {
		c.block = append(c.block[:0], block...)
		return c.continued(f, self, 1)
	}
	return c.readBlock(f, self, block)
}

// readBlock takes a whole header block. self tells that the stream is said to
// depend on itself.
func (c *Conn) readBlock(f h2frame.Header, self bool, block []byte) error {
	fields, fits, err := c.decode.read(block)
	if err != nil {
		return err
	}
	c.cheap.give(1)
	c.empty = 0
	c.mu.Lock()
	s := c.streams[f.Stream]
	switch {
	case s == nil && !c.client && f.Stream > c.lastID:
		err = c.admitLocked(f)
	case s == nil:
		err = c.lateHeadersLocked(f)
		c.unlock()
		return err
	case s.peerEnded:
		err = streamFault(f.Stream, h2frame.CodeClosed, "HEADERS after the end")
	}
	c.unlock()
	if err == nil && self {
		err = streamFault(f.Stream, h2frame.CodeProtocol, "a stream that depends on itself")
	}
	switch {
	case err != nil:
		return err
	case s == nil:
		return c.request(f, fields, fits)
	case c.client && !s.answered:
		return c.response(s, f, fields, fits)
	}
	return c.trailers(s, f, fields, fits)
}

// lateHeadersLocked judges HEADERS on a stream that is not open any more.
func (c *Conn) lateHeadersLocked(f h2frame.Header) error {
	if !c.client && f.Stream%2 == 1 && c.endedHowLocked(f.Stream) == endNever {
		return h2frame.Fault(h2frame.CodeProtocol, "stream %d is opened after stream %d", f.Stream, c.lastID)
	}
	return c.notOpenLocked(f)
}

// continued appends CONTINUATION frames to a block of so many frames until it is
// whole.
func (c *Conn) continued(f h2frame.Header, self bool, frames int) error {
	for ; ; frames++ {
		b, err := c.peek(h2frame.HeaderLen)
		if err != nil {
			c.part = part{head: f, self: self, frames: frames}
			return err
		}
		next := h2frame.Parse(b)
		switch {
		case next.Kind != h2frame.Continuation || next.Stream != f.Stream:
			return h2frame.Fault(h2frame.CodeProtocol, "HEADERS are not continued")
		case next.Length > maxFrame:
			return h2frame.Fault(h2frame.CodeFrameSize, "frame of %d bytes", next.Length)
		case frames > maxContinuations || len(c.block)+next.Length > maxBlock:
			return h2frame.Fault(h2frame.CodeCalm, "header block over %d frames or %d bytes", maxContinuations, maxBlock)
		}
		if b, err = c.peek(h2frame.HeaderLen + next.Length); err != nil {
			c.part = part{head: f, self: self, frames: frames}
			return err
		}
		c.block = append(c.block, b[h2frame.HeaderLen:]...)
		c.r.Discard(h2frame.HeaderLen + next.Length)
		if next.Has(h2frame.FlagEndHeaders) {
			block := c.block
			if cap(c.block) > maxFrame {
				c.block = nil // one large head is no reason to keep the room
			}
			return c.readBlock(f, self, block)
		}
	}
}

// admitLocked lets a client open a stream.
func (c *Conn) admitLocked(f h2frame.Header) error {
	if f.Stream%2 == 0 {
		return h2frame.Fault(h2frame.CodeProtocol, "stream %d is not a client's", f.Stream)
	}
	c.lastID = f.Stream
	switch {
	case c.err != nil:
		return c.err
	case c.draining:
		return streamFault(f.Stream, h2frame.CodeRefused, "no more requests are taken")
	case len(c.streams) >= MaxStreams:
		return streamFault(f.Stream, h2frame.CodeRefused, "more than %d streams", MaxStreams)
	}
	return nil
}

func (c *Conn) request(f h2frame.Header, fields []Field, fits bool) error {
	h := &c.head
	var err error
	if fits {
		err = h.request(fields)
	}
	h.End = f.Has(h2frame.FlagEndStream)
	if err == nil && h.End && h.Length > 0 {
		err = errors.New("no body where content-length announces one")
	}
	if err != nil {
		return streamFault(f.Stream, h2frame.CodeProtocol, "malformed request: %v", err)
	}
	s := &Stream{c: c, id: f.Stream, declared: h.Length, credit: streamWindow, peerEnded: h.End}
	c.mu.Lock()
	s.window = c.initial
	if err = c.err; err == nil && c.draining { // since it was admitted
		err = streamFault(f.Stream, h2frame.CodeRefused, "no more requests are taken")
	}
	if err != nil {
		c.mu.Unlock()
		return err
	}
	c.taken = s.id
	c.streams[s.id] = s
	c.mu.Unlock()
	if !fits {
		if c.o.Malformed != nil {
			c.o.Malformed(streamFault(f.Stream, h2frame.CodeProtocol, "head over %d fields or %d bytes", MaxFields, MaxList))
		}
		s.tooLarge()
		return nil
	}
	c.o.Request(s, h)
	return nil
}

func (c *Conn) response(s *Stream, f h2frame.Header, fields []Field, fits bool) error {
	if !fits {
		return streamFault(f.Stream, h2frame.CodeProtocol, "head over %d fields or %d bytes", MaxFields, MaxList)
	}
	h := &c.head
	err := h.response(fields)
	h.End = f.Has(h2frame.FlagEndStream)
	interim := h.Status < 200
	bodyless := s.isHead || h.Status == 204 || h.Status == 304
	switch {
	case err != nil:
	case interim && h.End:
		err = errors.New("the response ends before it begins")
	case interim && s.interims == mostInterims:
		err = fmt.Errorf("more than %d heads before the response", mostInterims)
	case h.End && h.Length > 0 && !bodyless:
		err = errors.New("no body where content-length announces one")
	}
	if err != nil {
		return streamFault(f.Stream, h2frame.CodeProtocol, "malformed response: %v", err)
	}
	if interim {
		s.interims++
	} else {
		s.answered, s.declared, s.bodyless = true, h.Length, bodyless
	}
	if mate := s.mate.Load(); mate != nil {
		c.answered(mate, h.Status, fields)
		mate.sendHead(fields, interim, h.End)
		c.touch(mate.c)
	} else if s.sink != nil {
		s.sink.Head(h)
	}
	if h.End {
		return s.finished()
	}
	return nil
}

// trailers passes the last fields of a message on.
func (c *Conn) trailers(s *Stream, f h2frame.Header, fields []Field, fits bool) error {
	err := checkTrailers(fields, !c.client)
	switch {
	case err != nil:
	case !fits:
		err = errors.New("too many fields")
	case !f.Has(h2frame.FlagEndStream):
		err = errors.New("HEADERS in the middle of a message")
	case s.declared >= 0 && !s.bodyless && s.got != s.declared:
		err = errors.New("less data than content-length announces")
	}
	if err != nil {
		return streamFault(f.Stream, h2frame.CodeProtocol, "malformed trailer: %v", err)
	}
	if c.o.Data != nil {
		c.o.Data(s, nil, true) // else who looks at bodies never hears the end
	}
	if mate := s.mate.Load(); mate != nil {
		c.answered(mate, 0, fields)
		mate.sendTrailers(fields)
		c.touch(mate.c)
	} else if s.sink != nil {
		s.sink.Trailers(fields)
	}
	return s.finished()
}

// finished notes that the peer has ended its half, without data.
func (s *Stream) finished() error {
	c := s.c
	c.mu.Lock()
	defer c.unlock()
	before := len(c.out)
	s.peerEnded = true
	c.endedLocked(s)
	c.own = c.own || len(c.out) > before || c.ready.first != nil
	return nil
}

// endedLocked notes that the peer has ended its half. A server has then done
// what was asked, which pays for resets; a client has only asked.
func (c *Conn) endedLocked(s *Stream) {
	c.settleLocked(s)
	if c.client {
		c.resets.give(2)
	}
}
