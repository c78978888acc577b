package http2

import "hauberk.dev/mesh/h2frame"

func (c *Conn) readData(f h2frame.Header) error {
	n, pad := f.Length, 0
	if f.Has(h2frame.FlagPadded) {
		if f.Length < 1 {
			return h2frame.Fault(h2frame.CodeFrameSize, "padded frame without a pad length")
		}
		b, err := c.peek(h2frame.HeaderLen + 1)
		if err != nil {
			return err
		}
		pad = int(b[h2frame.HeaderLen])
		c.r.Discard(1)
		if n -= 1 + pad; n < 0 {
			return h2frame.Fault(h2frame.CodeProtocol, "padding longer than the frame")
		}
	}
	c.r.Discard(h2frame.HeaderLen)
	end := f.Has(h2frame.FlagEndStream)
	if n == 0 && !end {
		if c.empty++; c.empty > maxEmptyData {
			return h2frame.Fault(h2frame.CodeCalm, "%d DATA frames in a row without data", c.empty)
		}
	} else {
		c.empty = 0
		c.cheap.give(1)
	}
	s, err := c.takeData(f, n, end)
	if s == nil {
		if err = c.stand(err); err != nil {
			return err
		}
		return c.discard(n + pad)
	}
	return c.passData(s, n, pad, end)
}

// takeData accounts for a DATA frame with n bytes of data. s is nil if they are
// not wanted.
func (c *Conn) takeData(f h2frame.Header, n int, end bool) (s *Stream, err error) {
	c.mu.Lock()
	defer c.unlock()
	if c.credit -= int64(f.Length); c.credit < 0 {
		return nil, h2frame.Fault(h2frame.CodeFlowControl, "more DATA than the window of the connection")
	}
	c.owed += int64(f.Length)
	before := len(c.out)
	if !c.returnLocked() {
		return nil, c.calm(false)
	}
	c.own = c.own || len(c.out) > before || c.ready.first != nil
	if s = c.streams[f.Stream]; s == nil {
		return nil, c.notOpenLocked(f)
	}
	total := s.got + int64(n)
	switch {
	case s.peerEnded:
		return nil, streamFault(f.Stream, h2frame.CodeClosed, "DATA after the end")
	case c.client && !s.answered:
		return nil, streamFault(f.Stream, h2frame.CodeProtocol, "DATA before the response")
	case s.credit < int64(f.Length):
		return nil, streamFault(f.Stream, h2frame.CodeFlowControl, "more DATA than the window")
	case s.bodyless && total > 0:
		return nil, streamFault(f.Stream, h2frame.CodeProtocol, "a response with a body it cannot have")
	case s.declared >= 0 && !s.bodyless && (total > s.declared || end && total < s.declared):
		return nil, streamFault(f.Stream, h2frame.CodeProtocol, "%d bytes where content-length says %d", total, s.declared)
	}
	s.got = total
	s.credit -= int64(f.Length)
	s.owed += int64(f.Length - n) // padding is consumed at once
	c.held += int64(n)
	return s, nil
}

// passData gives the data of a frame to the stream's mate, as it arrives.
func (c *Conn) passData(s *Stream, n, pad int, end bool) error {
	for first := true; first || n > 0; first = false {
		var p []byte
		if n > 0 {
			var err error
			if p, err = c.some(n); err != nil {
				c.part = part{data: s, n: n, end: end, skip: pad}
				return err
			}
		}
		n -= len(p)
		err := s.receive(p, end && n == 0)
		c.r.Discard(len(p))
		if err != nil {
			return err
		}
	}
	return c.discard(pad)
}

// receive takes data, and maybe the end, from the peer.
func (s *Stream) receive(p []byte, end bool) error {
	c, used := s.c, len(p)
	if c.o.Data != nil {
		c.o.Data(s, p, end)
	}
	if mate := s.mate.Load(); mate != nil {
		used = mate.sendData(p, end)
		c.touch(mate.c)
	} else if s.sink != nil {
		used = s.sink.Data(p, end)
	}
	c.mu.Lock()
	defer c.unlock()
	before := len(c.out)
	s.peerEnded = s.peerEnded || end
	fits := c.consumedLocked(s, used)
	if end {
		c.endedLocked(s)
	}
	c.own = c.own || len(c.out) > before || c.ready.first != nil
	return c.calm(fits)
}
