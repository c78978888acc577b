package http2

import (
	"errors"
	"io"
	"time"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// touch notes that another connection has frames to write. They are written
// when all that has arrived here was read.
func (c *Conn) touch(other *Conn) {
	if c.touched != nil && c.touched != other {
		c.touched.wake()
	}
	c.touched = other
}

// flush has written what reading has caused, before the reader waits.
func (c *Conn) flush() {
	if c.o.Settled != nil {
		c.o.Settled()
	}
	if c.touched != nil {
		c.touched.push(MaxStreams) // all that was read goes into one write
		c.touched = nil
	}
	if c.own {
		c.own = false
		c.push(1)
	}
}

// peek waits for n bytes. They are valid until the next read.
func (c *Conn) peek(n int) ([]byte, error) {
	if c.r.Buffered() < n {
		c.flush()
	}
	b, err := c.r.Peek(n)
	if err == io.EOF && len(b) > 0 {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

// some waits for data and returns up to n bytes of it.
func (c *Conn) some(n int) ([]byte, error) {
	if c.r.Buffered() == 0 {
		if _, err := c.peek(1); err != nil {
			return nil, err
		}
	}
	return c.r.Peek(min(n, c.r.Buffered()))
}

func (c *Conn) discard(n int) error {
	for n > 0 {
		b, err := c.some(n)
		if err != nil {
			c.part = part{skip: n}
			return err
		}
		c.r.Discard(len(b))
		n -= len(b)
	}
	return nil
}

// greeting reads the preface, and tells early if it is none.
func (c *Conn) greeting() error {
	if c.client || c.begun >= begunPreface {
		return nil
	}
	for n := 1; n <= len(h2frame.Preface); n++ {
		b, err := c.peek(n)
		if err != nil {
			return err
		}
		if string(b) != h2frame.Preface[:n] {
			return h2frame.Fault(h2frame.CodeProtocol, "the client does not speak HTTP/2")
		}
	}
	c.r.Discard(len(h2frame.Preface))
	c.begun = begunPreface
	return nil
}

func (c *Conn) read() error {
	t := time.AfterFunc(prefaceTimeout, func() { c.endUnlessFrozen(errors.New("no HTTP/2 preface and SETTINGS in time")) })
	defer t.Stop()
	if c.begun == begunSettings {
		t.Stop()
	}
	defer c.flush() // a response may be whole before its server errs
	if err := c.greeting(); err != nil {
		return err
	}
	if err := c.goOn(); err != nil {
		return err
	}
	for {
		first := c.begun != begunSettings
		if c.isFrozen() {
			return wire.ErrFrozen
		}
		if _, err := c.peek(1); err != nil {
			return err
		}
		c.mid.Store(true)
		b, err := c.peek(h2frame.HeaderLen)
		if err != nil {
			return err
		}
		f := h2frame.Parse(b)
		if first && (f.Kind != h2frame.Settings || f.Has(h2frame.FlagAck)) {
			return h2frame.Fault(h2frame.CodeProtocol, "the first frame is not SETTINGS")
		}
		if f.Length > maxFrame {
			return h2frame.Fault(h2frame.CodeFrameSize, "frame of %d bytes", f.Length)
		}
		if err := c.stand(c.frameBody(f)); err != nil {
			return err
		}
		if first {
			c.begun = begunSettings
			t.Stop()
		}
		c.mid.Store(false)
		c.stage.Add(1)
	}
}

// stand makes a fault of one stream the end of that stream only. A peer is
// allowed so many.
func (c *Conn) stand(err error) error {
	if err == nil {
		return nil
	}
	var se *StreamError
	if !errors.As(err, &se) {
		return err
	}
	if c.o.Malformed != nil && se.Code != h2frame.CodeRefused {
		c.o.Malformed(err)
	}
	if !c.mayReset() {
		return h2frame.Fault(h2frame.CodeCalm, "too many malformed streams, the last: %v", err)
	}
	c.mu.Lock()
	s := c.streams[se.Stream]
	var b [h2frame.HeaderLen + 4]byte
	fits := c.answerLocked(h2frame.AppendWord(b[:0], h2frame.Reset, se.Stream, uint32(se.Code)))
	if s != nil {
		c.dropLocked(s, endOurs)
	} else if c.endedHowLocked(se.Stream) == endNever {
		c.ended[c.endedAt%rememberEnded] = ending{se.Stream, endOurs}
		c.endedAt++
	}
	c.own = true
	c.unlock()
	if s != nil {
		s.lostBoth(h2frame.CodeCancel, err)
		if mate := s.mate.Load(); mate != nil {
			c.touch(mate.c)
		}
	}
	return c.calm(fits)
}

func (c *Conn) calm(fits bool) error {
	if !fits {
		return h2frame.Fault(h2frame.CodeCalm, "the peer does not read the answers it asks for")
	}
	return nil
}

// frameBody reads a frame, of which the header was looked at. It is left unread
// until all of it, or of a DATA frame all but the data, is there.
func (c *Conn) frameBody(f h2frame.Header) error {
	if f.Kind == h2frame.Data {
		return c.readData(f)
	}
	p, err := c.peek(h2frame.HeaderLen + f.Length)
	if err != nil {
		return err
	}
	p = p[h2frame.HeaderLen:]
	c.r.Discard(h2frame.HeaderLen + f.Length) // p stays as it is until the next read
	switch f.Kind {
	case h2frame.Headers:
		return c.readHeaders(f, p)
	case h2frame.Reset:
		return c.readReset(f, p)
	case h2frame.GoAway:
		return c.readGoAway(f, p)
	case h2frame.Window:
		return c.readWindow(f, p)
	case h2frame.Push:
		return h2frame.Fault(h2frame.CodeProtocol, "PUSH_PROMISE is not taken")
	case h2frame.Continuation:
		return h2frame.Fault(h2frame.CodeProtocol, "CONTINUATION without HEADERS")
	}
	// What is left moves nothing.
	if !c.afford() {
		return h2frame.Fault(h2frame.CodeCalm, "too many frames of type %d that carry nothing", f.Kind)
	}
	switch f.Kind {
	case h2frame.Settings:
		return c.readSettings(f, p)
	case h2frame.Ping:
		return c.readPing(f, p)
	case h2frame.Priority:
		return readPriority(f, p)
	}
	return nil // unknown frames are to be ignored
}

// afford takes one frame that moves nothing. What was sent to the peer pays for
// some: gRPC measures its bandwidth by a PING for each answer to the last.
func (c *Conn) afford() bool {
	if c.cheap.left == 0 {
		c.mu.Lock()
		n := min(c.frames-c.paid, uint64(c.cheap.most))
		c.mu.Unlock()
		c.paid += n
		c.cheap.give(int(n))
	}
	return c.cheap.spend()
}

// notOpenLocked judges a frame on a stream that is not open. nil means to ignore
// it.
func (c *Conn) notOpenLocked(f h2frame.Header) error {
	opened := f.Stream%2 == 1 && (c.client && f.Stream < c.nextID || !c.client && f.Stream <= c.lastID)
	if f.Stream == 0 || !opened {
		return h2frame.Fault(h2frame.CodeProtocol, "frame of type %d on stream %d, which is not open", f.Kind, f.Stream)
	}
	if f.Kind == h2frame.Reset || f.Kind == h2frame.Window {
		return nil // may have been on its way
	}
	switch c.endedHowLocked(f.Stream) {
	case endOurs:
		return nil
	case endOrderly:
		return h2frame.Fault(h2frame.CodeClosed, "frame of type %d after the end of stream %d", f.Kind, f.Stream)
	}
	return streamFault(f.Stream, h2frame.CodeClosed, "frame of type %d on a stream that is closed", f.Kind)
}
