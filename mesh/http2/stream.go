package http2

import (
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"hauberk.dev/mesh/h2frame"
)

// Stream is one request and its response on one connection.
type Stream struct {
	// Value is the owner's.
	Value any

	c    *Conn
	mate atomic.Pointer[Stream]
	sink Sink // in place of a mate; set under c.mu, by who reads if that may be another

	// For the goroutine that reads.
	declared int64 // content-length, -1 if unknown
	got      int64
	answered bool // client's end: the final head has come
	bodyless bool // the response has no body whatever its length says
	isHead   bool // the request is HEAD
	interims int  // heads before the final one

	// Guarded by c.mu.
	id        uint32
	window    int64 // what may be sent
	credit    int64 // what the peer may send
	owed      int64 // consumed and not given back
	heads     [][]Field
	one       [1][]Field // room for heads, mostly
	chunks    []*chunk
	held      int // bytes in chunks
	trailers  []Field
	begun     bool // the final head was queued
	finishing bool // no more will be queued
	stopping  bool // the peer is to send no more, once all is sent
	stopCode  Code
	ended     bool // END_STREAM was sent
	peerEnded bool
	over      bool // forgotten by the connection
	headBytes int  // counted in c.heads

	in         *line
	prev, next *Stream
}

// line is a queue of streams, of which each is in one at most.
type line struct{ first, last *Stream }

func (l *line) push(s *Stream) {
	if s.in == l {
		return
	}
	s.leave()
	s.in, s.prev, s.next = l, l.last, nil
	if l.last != nil {
		l.last.next = s
	} else {
		l.first = s
	}
	l.last = s
}

func (l *line) pop() *Stream {
	s := l.first
	if s != nil {
		s.leave()
	}
	return s
}

// leave takes a stream out of the line it is in.
func (s *Stream) leave() {
	l := s.in
	if l == nil {
		return
	}
	if s.prev != nil {
		s.prev.next = s.next
	} else {
		l.first = s.next
	}
	if s.next != nil {
		s.next.prev = s.prev
	} else {
		l.last = s.prev
	}
	s.in, s.prev, s.next = nil, nil, nil
}

// chunk is a pooled piece of data that waits to be sent. Small pieces share one.
type chunk struct {
	from, to int
	buf      [8 << 10]byte
}

var chunks = sync.Pool{New: func() any { return new(chunk) }}

// hold keeps p until it can be sent.
func (s *Stream) hold(p []byte) {
	s.held += len(p)
	for len(p) > 0 {
		var k *chunk
		if n := len(s.chunks); n > 0 && s.chunks[n-1].to < len(s.chunks[n-1].buf) {
			k = s.chunks[n-1]
		} else {
			k = chunks.Get().(*chunk)
			k.from, k.to = 0, 0
			s.chunks = append(s.chunks, k)
		}
		n := copy(k.buf[k.to:], p)
		k.to += n
		p = p[n:]
	}
}

// appendHeld moves n bytes that were held to b.
func (s *Stream) appendHeld(b []byte, n int) []byte {
	s.held -= n
	for n > 0 {
		k := s.chunks[0]
		m := min(n, k.to-k.from)
		b = append(b, k.buf[k.from:k.from+m]...)
		k.from += m
		n -= m
		if k.from == k.to {
			chunks.Put(k)
			s.chunks = slices.Delete(s.chunks, 0, 1)
		}
	}
	return b
}

// Forward sends the request on to a server. Response and bodies then go between
// the two by themselves.
func (s *Stream) Forward(to *Conn, h *Head) error {
	m := &Stream{c: to, declared: -1, isHead: h.Method == "HEAD"}
	m.mate.Store(s)
	size := 0
	for i := range h.Fields {
		size += int(h.Fields[i].Size())
	}
	to.mu.Lock()
	switch {
	case to.err != nil:
		defer to.mu.Unlock()
		return to.err
	case to.draining || to.heads+size > maxHeadsHeld || to.nextID > lastStream:
		defer to.mu.Unlock()
		return ErrBusy
	}
	m.window, m.credit = to.initial, streamWindow
	m.headBytes = size
	to.heads += size
	// Before anything can come back.
	s.mate.Store(m)
	m.headLocked(h.Fields, h.End)
	to.unlock()
	s.c.touch(to)
	s.c.mu.Lock()
	over := s.over
	s.c.mu.Unlock()
	if over { // before it had a mate to tell
		m.abandon(h2frame.CodeCancel)
	}
	return nil
}

// Answer answers the request itself, in place of a server. The rest of the
// request is not taken.
func (s *Stream) Answer(fields []Field, body []byte) {
	s.mate.Store(nil)
	c := s.c
	c.mu.Lock()
	if !s.over && !s.begun {
		s.begun = true
		s.stopping, s.stopCode = true, h2frame.CodeNone
		if len(body) > 0 {
			s.hold(body)
		}
		s.headLocked(fields, true)
	}
	c.unlock()
	c.wake()
}

// Reset ends the stream and tells both peers.
func (s *Stream) Reset(code Code) {
	mate := s.mate.Load()
	s.abandon(code)
	if mate != nil {
		mate.abandon(h2frame.CodeCancel)
	}
}

// headLocked queues a head and sends what can be sent. The fields are borrowed.
func (s *Stream) headLocked(fields []Field, end bool) {
	c := s.c
	if s.over || s.finishing {
		return
	}
	s.finishing = end
	if s.heads == nil {
		s.heads = s.one[:0]
	}
	s.heads = append(s.heads, fields)
	c.queueLocked(s)
	c.fillLocked()
	if n := len(s.heads); n > 0 {
		s.heads[n-1] = slices.Clone(fields)
	}
}

// sendHead passes a head on: an interim one, or the final one.
func (s *Stream) sendHead(fields []Field, interim, end bool) {
	c := s.c
	c.mu.Lock()
	flood := len(s.heads) >= maxInterim
	if !flood {
		s.begun = s.begun || !interim
		s.headLocked(fields, end)
	}
	c.unlock()
	if flood {
		s.Reset(h2frame.CodeCalm)
	}
}

// sendTrailers passes the last fields on.
func (s *Stream) sendTrailers(fields []Field) {
	c := s.c
	c.mu.Lock()
	if !s.over && !s.finishing {
		s.finishing = true
		s.trailers = fields
		c.queueLocked(s)
		c.fillLocked()
		if s.trailers != nil {
			s.trailers = slices.Clone(fields)
		}
	}
	c.unlock()
}

// sendData passes data on, and returns how much of it needs no more room here:
// it was made a frame, or nobody wants it any more.
func (s *Stream) sendData(p []byte, end bool) (used int) {
	c := s.c
	c.mu.Lock()
	if s.over || s.finishing {
		c.mu.Unlock()
		return len(p)
	}
	s.finishing = end
	if s.in == nil && s.held == 0 && len(s.heads) == 0 && s.id != 0 {
		for used < len(p) && len(c.out) < outFull {
			n := int(min(int64(len(p)-used), s.window, c.window, int64(c.frame)))
			if n <= 0 {
				break
			}
			c.dataHeaderLocked(s, n, end && used+n == len(p))
			c.out = append(c.out, p[used:used+n]...)
			used += n
		}
	}
	if used < len(p) {
		s.hold(p[used:])
	}
	if used < len(p) || end {
		c.queueLocked(s)
		c.fillLocked()
	}
	c.unlock()
	return used
}

// queueLocked gives a stream its turn to send, if it waits for nothing yet.
func (c *Conn) queueLocked(s *Stream) {
	if s.in == nil {
		c.ready.push(s)
	}
}

// dataHeaderLocked begins a DATA frame of n bytes.
func (c *Conn) dataHeaderLocked(s *Stream, n int, end bool) {
	var flags byte
	if end {
		flags = h2frame.FlagEndStream
		s.ended = true
	}
	s.window -= int64(n)
	c.window -= int64(n)
	c.frames++
	c.out = h2frame.AppendHeader(c.outLocked(), n, h2frame.Data, flags, s.id)
}

// fillLocked makes frames of what streams have to send, in turn, while there is
// room.
func (c *Conn) fillLocked() {
	if c.err != nil || !c.started {
		return
	}
	for len(c.out) < outFull {
		s := c.ready.pop()
		if s == nil {
			return
		}
		c.someLocked(s)
	}
}

// someLocked makes frames of one stream: heads, and then one of data or the end.
func (c *Conn) someLocked(s *Stream) {
	if s.id == 0 && !c.openLocked(s) {
		c.waiting.push(s)
		return
	}
	for len(s.heads) > 0 {
		last := len(s.heads) == 1 && s.finishing && s.held == 0 && s.trailers == nil
		c.encodeLocked(s, s.heads[0], last)
		s.heads = slices.Delete(s.heads, 0, 1)
	}
	if s.held > 0 {
		n := int(min(int64(s.held), s.window, c.window, int64(c.frame)))
		if n <= 0 {
			if s.window > 0 {
				c.blocked.push(s)
			}
			return
		}
		c.dataHeaderLocked(s, n, s.held == n && s.finishing && s.trailers == nil)
		c.out = s.appendHeld(c.out, n)
		c.creditLocked(s, n)
		if s.held > 0 {
			c.ready.push(s)
			return
		}
	}
	if s.finishing && !s.ended {
		if s.trailers != nil {
			c.encodeLocked(s, s.trailers, true)
			s.trailers = nil
		} else {
			c.dataHeaderLocked(s, 0, true)
		}
	}
	if s.ended {
		c.settleLocked(s)
	}
}

func (c *Conn) creditLocked(s *Stream, n int) {
	if mate := s.mate.Load(); mate != nil && n > 0 {
		c.credits = append(c.credits, credit{to: mate, n: n})
	} else if s.sink != nil && n > 0 {
		c.credits = append(c.credits, credit{n: n, of: s.sink})
	}
}

// openLocked gives a request its place on the connection, if there is one.
func (c *Conn) openLocked(s *Stream) bool {
	if len(c.streams) >= min(c.most, MaxStreams) || c.nextID > lastStream {
		return false
	}
	s.id = c.nextID
	c.nextID += 2
	c.streams[s.id] = s
	c.heads -= s.headBytes
	s.headBytes = 0
	return true
}

// encodeLocked makes frames of a header block.
func (c *Conn) encodeLocked(s *Stream, fields []Field, end bool) {
	c.encoded = c.encoded[:0]
	for i := range fields {
		c.encoder.WriteField(fields[i])
	}
	block := []byte(c.encoded)
	kind, flags := byte(h2frame.Headers), byte(0)
	if end {
		flags = h2frame.FlagEndStream
		s.ended = true
	}
	for {
		n := min(len(block), c.frame)
		if n == len(block) {
			flags |= h2frame.FlagEndHeaders
		}
		c.out = h2frame.Append(c.outLocked(), kind, flags, s.id, block[:n])
		if block = block[n:]; len(block) == 0 {
			break
		}
		kind, flags = h2frame.Continuation, 0
	}
	if cap(c.encoded) > 4<<10 {
		c.encoded = nil // one large head is no reason to keep the room
	}
	c.frames++
}

// settleLocked forgets a stream that has ended on this side and, if the peer
// has not, tells it to stop if that was asked.
func (c *Conn) settleLocked(s *Stream) {
	switch {
	case s.over || !s.ended:
	case s.peerEnded:
		c.dropLocked(s, endOrderly)
	case s.stopping:
		c.out = h2frame.AppendWord(c.outLocked(), h2frame.Reset, s.id, uint32(s.stopCode))
		c.dropLocked(s, endOurs)
	}
}

// dropLocked forgets a stream and what it had to send.
func (c *Conn) dropLocked(s *Stream, how endKind) {
	if s.over {
		return
	}
	s.over = true
	s.leave()
	c.heads -= s.headBytes
	s.headBytes = 0
	for _, k := range s.chunks {
		chunks.Put(k)
	}
	c.creditLocked(s, s.held)
	s.chunks, s.held, s.heads, s.trailers = nil, 0, nil, nil
	if s.id != 0 {
		delete(c.streams, s.id)
		if !c.client && how == endOrderly {
			c.well = min(c.well+1, c.resets.most)
		}
		c.ended[c.endedAt%rememberEnded] = ending{s.id, how}
		c.endedAt++
	}
	// One that was not opened yet may have held the place of another.
	if w := c.waiting.first; w != nil && len(c.streams) < min(c.most, MaxStreams) {
		c.ready.push(w)
	}
	if len(c.streams) == 0 && c.draining && c.err == nil {
		go c.drained() // under the lock here
	}
}

// endedHowLocked tells how a stream that is not open any more has ended.
func (c *Conn) endedHowLocked(id uint32) endKind {
	for i := range c.ended {
		if c.ended[i].id == id {
			return c.ended[i].how
		}
	}
	return endNever
}

// abandon resets the stream towards its own peer.
func (s *Stream) abandon(code Code) {
	c, fits := s.c, true
	c.mu.Lock()
	if !s.over {
		if s.id != 0 {
			var b [h2frame.HeaderLen + 4]byte
			fits = c.answerLocked(h2frame.AppendWord(b[:0], h2frame.Reset, s.id, uint32(code)))
		}
		c.dropLocked(s, endOurs)
	}
	c.unlock()
	c.wake()
	if !fits {
		c.end(h2frame.Fault(h2frame.CodeCalm, "the peer does not read what it causes"))
	}
}

// lost is called when the mate has ended before its time.
func (s *Stream) lost(code Code, err error) {
	if s.c.client {
		s.abandon(h2frame.CodeCancel)
		return
	}
	s.c.mu.Lock()
	begun := s.begun
	s.c.mu.Unlock()
	if !begun && s.c.o.Failed != nil && err != nil {
		s.c.o.Failed(s, err)
		return
	}
	if err != nil {
		code = h2frame.CodeInternal // the end of another connection, not this peer's doing
	}
	s.abandon(code)
}

// stop has the peer send no more, once all that is queued was sent.
func (s *Stream) stop(code Code) {
	c := s.c
	c.mu.Lock()
	s.stopping, s.stopCode = true, code
	c.settleLocked(s)
	c.unlock()
	c.wake()
}

// consumed gives the peer its credit back for data that has been passed on.
func (s *Stream) consumed(n int) {
	c := s.c
	c.mu.Lock()
	fits := c.consumedLocked(s, n)
	write := len(c.out) > 0
	c.unlock()
	if write {
		c.wake()
	}
	if !fits {
		c.end(h2frame.Fault(h2frame.CodeCalm, "the peer does not read what it causes"))
	}
}

func (c *Conn) consumedLocked(s *Stream, n int) (fits bool) {
	c.held -= int64(n)
	fits = true
	if s.owed += int64(n); s.owed >= streamWindow/4 && !s.peerEnded && !s.over {
		var b [h2frame.HeaderLen + 4]byte
		fits = c.answerLocked(h2frame.AppendWord(b[:0], h2frame.Window, s.id, uint32(s.owed)))
		s.credit += s.owed
		s.owed = 0
	}
	return c.returnLocked() && fits
}

// returnLocked gives back the connection's window, unless too much waits.
func (c *Conn) returnLocked() (fits bool) {
	if c.owed < connWindow/4 || c.held > maxHeld || c.err != nil {
		return true
	}
	var b [h2frame.HeaderLen + 4]byte
	fits = c.answerLocked(h2frame.AppendWord(b[:0], h2frame.Window, 0, uint32(c.owed)))
	c.credit += c.owed
	c.owed = 0
	return fits
}

// tooLarge answers a request whose head is over the bounds.
func (s *Stream) tooLarge() {
	s.Answer([]Field{{Name: ":status", Value: strconv.Itoa(431)}, {Name: "content-length", Value: "0"}}, nil)
}
