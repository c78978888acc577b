package http2

import (
	"encoding/binary"
	"errors"
	"io"
	"time"
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
	if c.touched != nil {
		c.touched.wake()
		c.touched = nil
	}
	if c.own {
		c.wake()
		c.own = false
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
			return err
		}
		c.r.Discard(len(b))
		n -= len(b)
	}
	return nil
}

// greeting reads the preface, and tells early if it is none.
func (c *Conn) greeting() error {
	if c.client {
		return nil
	}
	for n := 1; n <= len(preface); n++ {
		b, err := c.peek(n)
		if err != nil {
			return err
		}
		if string(b) != preface[:n] {
			return fault(CodeProtocol, "the client does not speak HTTP/2")
		}
	}
	c.r.Discard(len(preface))
	return nil
}

func (c *Conn) read() error {
	t := time.AfterFunc(prefaceTimeout, func() { c.end(errors.New("no HTTP/2 preface and SETTINGS in time")) })
	defer t.Stop()
	defer c.flush() // a response may be whole before its server errs
	if err := c.greeting(); err != nil {
		return err
	}
	for first := true; ; first = false {
		if _, err := c.peek(1); err != nil {
			return err
		}
		c.mid.Store(true)
		b, err := c.peek(headerLen)
		if err != nil {
			return err
		}
		f := parseHeader(b)
		if first && (f.kind != frameSettings || f.has(flagAck)) {
			return fault(CodeProtocol, "the first frame is not SETTINGS")
		}
		if f.length > maxFrame {
			return fault(CodeFrameSize, "frame of %d bytes", f.length)
		}
		c.r.Discard(headerLen)
		if err := c.stand(c.frameBody(f)); err != nil {
			return err
		}
		if first {
			t.Stop()
		}
		c.mid.Store(false)
		c.stage.Add(1)
	}
}

// stand makes a fault of one stream the end of that stream only. A peer is
// allowed so many.
func (c *Conn) stand(err error) error {
	var se *StreamError
	if err == nil || !errors.As(err, &se) {
		return err
	}
	if c.o.Malformed != nil && se.Code != CodeRefused {
		c.o.Malformed(err)
	}
	if !c.mayReset() {
		return fault(CodeCalm, "too many malformed streams, the last: %v", err)
	}
	c.mu.Lock()
	s := c.streams[se.Stream]
	var b [headerLen + 4]byte
	fits := c.answerLocked(appendWord(b[:0], frameReset, se.Stream, uint32(se.Code)))
	if s != nil {
		c.dropLocked(s, endOurs)
	} else if c.endedHowLocked(se.Stream) == endNever {
		c.ended[c.endedAt%rememberEnded] = ending{se.Stream, endOurs}
		c.endedAt++
	}
	c.own = true
	c.unlock()
	if s != nil {
		if mate := s.mate.Load(); mate != nil {
			mate.lost(CodeCancel, err)
			c.touch(mate.c)
		}
	}
	return c.calm(fits)
}

func (c *Conn) calm(fits bool) error {
	if !fits {
		return fault(CodeCalm, "the peer does not read the answers it asks for")
	}
	return nil
}

func (c *Conn) frameBody(f frameHeader) error {
	if f.kind == frameData {
		return c.readData(f)
	}
	p, err := c.peek(f.length)
	if err != nil {
		return err
	}
	c.r.Discard(f.length) // p stays as it is until the next read
	switch f.kind {
	case frameHeaders:
		return c.readHeaders(f, p)
	case frameReset:
		return c.readReset(f, p)
	case frameGoAway:
		return c.readGoAway(f, p)
	case frameWindow:
		return c.readWindow(f, p)
	case framePush:
		return fault(CodeProtocol, "PUSH_PROMISE is not taken")
	case frameContinuation:
		return fault(CodeProtocol, "CONTINUATION without HEADERS")
	}
	// What is left moves nothing.
	if !c.afford() {
		return fault(CodeCalm, "too many frames of type %d that carry nothing", f.kind)
	}
	switch f.kind {
	case frameSettings:
		return c.readSettings(f, p)
	case framePing:
		return c.readPing(f, p)
	case framePriority:
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
func (c *Conn) notOpenLocked(f frameHeader) error {
	opened := f.stream%2 == 1 && (c.client && f.stream < c.nextID || !c.client && f.stream <= c.lastID)
	if f.stream == 0 || !opened {
		return fault(CodeProtocol, "frame of type %d on stream %d, which is not open", f.kind, f.stream)
	}
	if f.kind == frameReset || f.kind == frameWindow {
		return nil // may have been on its way
	}
	switch c.endedHowLocked(f.stream) {
	case endOurs:
		return nil
	case endOrderly:
		return fault(CodeClosed, "frame of type %d after the end of stream %d", f.kind, f.stream)
	}
	return streamFault(f.stream, CodeClosed, "frame of type %d on a stream that is closed", f.kind)
}

func (c *Conn) readData(f frameHeader) error {
	n, pad := f.length, 0
	if f.has(flagPadded) {
		if f.length < 1 {
			return fault(CodeFrameSize, "padded frame without a pad length")
		}
		b, err := c.peek(1)
		if err != nil {
			return err
		}
		pad = int(b[0])
		c.r.Discard(1)
		if n -= 1 + pad; n < 0 {
			return fault(CodeProtocol, "padding longer than the frame")
		}
	}
	end := f.has(flagEndStream)
	if n == 0 && !end {
		if c.empty++; c.empty > maxEmptyData {
			return fault(CodeCalm, "%d DATA frames in a row without data", c.empty)
		}
	} else {
		c.empty = 0
		c.cheap.give(1)
	}
	s, err := c.takeData(f, n, end)
	var se *StreamError
	if err != nil && !errors.As(err, &se) {
		return err
	}
	if s == nil {
		if skip := c.discard(n + pad); skip != nil {
			return skip
		}
		return err
	}
	return c.passData(s, n, pad, end)
}

// takeData accounts for a DATA frame with n bytes of data. s is nil if they are
// not wanted.
func (c *Conn) takeData(f frameHeader, n int, end bool) (s *Stream, err error) {
	c.mu.Lock()
	defer c.unlock()
	if c.credit -= int64(f.length); c.credit < 0 {
		return nil, fault(CodeFlowControl, "more DATA than the window of the connection")
	}
	c.owed += int64(f.length)
	before := len(c.out)
	if !c.returnLocked() {
		return nil, c.calm(false)
	}
	c.own = c.own || len(c.out) > before || c.ready.first != nil
	if s = c.streams[f.stream]; s == nil {
		return nil, c.notOpenLocked(f)
	}
	total := s.got + int64(n)
	switch {
	case s.peerEnded:
		return nil, streamFault(f.stream, CodeClosed, "DATA after the end")
	case c.client && !s.answered:
		return nil, streamFault(f.stream, CodeProtocol, "DATA before the response")
	case s.credit < int64(f.length):
		return nil, streamFault(f.stream, CodeFlowControl, "more DATA than the window")
	case s.bodyless && total > 0:
		return nil, streamFault(f.stream, CodeProtocol, "a response with a body it cannot have")
	case s.declared >= 0 && !s.bodyless && (total > s.declared || end && total < s.declared):
		return nil, streamFault(f.stream, CodeProtocol, "%d bytes where content-length says %d", total, s.declared)
	}
	s.got = total
	s.credit -= int64(f.length)
	s.owed += int64(f.length - n) // padding is consumed at once
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
	if mate := s.mate.Load(); mate != nil {
		used = mate.sendData(p, end)
		c.touch(mate.c)
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

func (c *Conn) readHeaders(f frameHeader, p []byte) error {
	if f.stream == 0 {
		return fault(CodeProtocol, "HEADERS on stream 0")
	}
	block, self, err := unpad(f, p)
	if err != nil {
		return err
	}
	if !f.has(flagEndHeaders) {
		if block, err = c.continued(f, block); err != nil {
			return err
		}
	}
	fields, fits, err := c.decode.read(block)
	if err != nil {
		return err
	}
	c.cheap.give(1)
	c.empty = 0
	c.mu.Lock()
	s := c.streams[f.stream]
	switch {
	case s == nil && !c.client && f.stream > c.lastID:
		err = c.admitLocked(f)
	case s == nil:
		err = c.lateHeadersLocked(f)
		c.unlock()
		return err
	case s.peerEnded:
		err = streamFault(f.stream, CodeClosed, "HEADERS after the end")
	}
	c.unlock()
	if err == nil && self {
		err = streamFault(f.stream, CodeProtocol, "a stream that depends on itself")
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
func (c *Conn) lateHeadersLocked(f frameHeader) error {
	if !c.client && f.stream%2 == 1 && c.endedHowLocked(f.stream) == endNever {
		return fault(CodeProtocol, "stream %d is opened after stream %d", f.stream, c.lastID)
	}
	return c.notOpenLocked(f)
}

// continued appends CONTINUATION frames until the block is whole.
func (c *Conn) continued(f frameHeader, begin []byte) ([]byte, error) {
	c.block = append(c.block[:0], begin...)
	for frames := 1; ; frames++ {
		b, err := c.peek(headerLen)
		if err != nil {
			return nil, err
		}
		next := parseHeader(b)
		switch {
		case next.kind != frameContinuation || next.stream != f.stream:
			return nil, fault(CodeProtocol, "HEADERS are not continued")
		case next.length > maxFrame:
			return nil, fault(CodeFrameSize, "frame of %d bytes", next.length)
		case frames > maxContinuations || len(c.block)+next.length > maxBlock:
			return nil, fault(CodeCalm, "header block over %d frames or %d bytes", maxContinuations, maxBlock)
		}
		c.r.Discard(headerLen)
		p, err := c.peek(next.length)
		if err != nil {
			return nil, err
		}
		c.block = append(c.block, p...)
		c.r.Discard(next.length)
		if next.has(flagEndHeaders) {
			block := c.block
			if cap(c.block) > maxFrame {
				c.block = nil // one large head is no reason to keep the room
			}
			return block, nil
		}
	}
}

// admitLocked lets a client open a stream.
func (c *Conn) admitLocked(f frameHeader) error {
	if f.stream%2 == 0 {
		return fault(CodeProtocol, "stream %d is not a client's", f.stream)
	}
	c.lastID = f.stream
	switch {
	case c.err != nil:
		return c.err
	case c.draining:
		return streamFault(f.stream, CodeRefused, "no more requests are taken")
	case len(c.streams) >= MaxStreams:
		return streamFault(f.stream, CodeRefused, "more than %d streams", MaxStreams)
	}
	return nil
}

func (c *Conn) request(f frameHeader, fields []Field, fits bool) error {
	h := &c.head
	var err error
	if fits {
		err = h.request(fields)
	}
	h.End = f.has(flagEndStream)
	if err == nil && h.End && h.Length > 0 {
		err = errors.New("no body where content-length announces one")
	}
	if err != nil {
		return streamFault(f.stream, CodeProtocol, "malformed request: %v", err)
	}
	s := &Stream{c: c, id: f.stream, declared: h.Length, credit: streamWindow, peerEnded: h.End}
	c.mu.Lock()
	s.window = c.initial
	if err = c.err; err == nil && c.draining { // since it was admitted
		err = streamFault(f.stream, CodeRefused, "no more requests are taken")
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
			c.o.Malformed(streamFault(f.stream, CodeProtocol, "head over %d fields or %d bytes", MaxFields, MaxList))
		}
		s.tooLarge()
		return nil
	}
	c.o.Request(s, h)
	return nil
}

func (c *Conn) response(s *Stream, f frameHeader, fields []Field, fits bool) error {
	if !fits {
		return streamFault(f.stream, CodeProtocol, "head over %d fields or %d bytes", MaxFields, MaxList)
	}
	h := &c.head
	err := h.response(fields)
	h.End = f.has(flagEndStream)
	interim := h.Status < 200
	bodyless := s.isHead || h.Status == 204 || h.Status == 304
	switch {
	case err != nil:
	case interim && h.End:
		err = errors.New("the response ends before it begins")
	case h.End && h.Length > 0 && !bodyless:
		err = errors.New("no body where content-length announces one")
	}
	if err != nil {
		return streamFault(f.stream, CodeProtocol, "malformed response: %v", err)
	}
	if !interim {
		s.answered, s.declared, s.bodyless = true, h.Length, bodyless
	}
	if mate := s.mate.Load(); mate != nil {
		mate.sendHead(fields, interim, h.End)
		c.touch(mate.c)
	}
	if h.End {
		return s.finished()
	}
	return nil
}

// trailers passes the last fields of a message on.
func (c *Conn) trailers(s *Stream, f frameHeader, fields []Field, fits bool) error {
	err := checkTrailers(fields)
	switch {
	case err != nil:
	case !fits:
		err = errors.New("too many fields")
	case !f.has(flagEndStream):
		err = errors.New("HEADERS in the middle of a message")
	case s.declared >= 0 && !s.bodyless && s.got != s.declared:
		err = errors.New("less data than content-length announces")
	}
	if err != nil {
		return streamFault(f.stream, CodeProtocol, "malformed trailer: %v", err)
	}
	if mate := s.mate.Load(); mate != nil {
		mate.sendTrailers(fields)
		c.touch(mate.c)
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

// mayReset takes a reset that comes from the peer or is its doing. Of a client's
// requests only those that were answered pay for some, else HEADERS with
// END_STREAM would earn what the reset after them costs.
func (c *Conn) mayReset() bool {
	if c.resets.left == 0 {
		c.mu.Lock()
		n := min(c.well, c.resets.most/2)
		c.well -= n
		c.mu.Unlock()
		c.resets.give(2 * n)
	}
	return c.resets.spend()
}

func (c *Conn) readReset(f frameHeader, p []byte) error {
	if len(p) != 4 {
		return fault(CodeFrameSize, "RST_STREAM of %d bytes", len(p))
	}
	if !c.mayReset() {
		return fault(CodeCalm, "streams are opened and reset too fast")
	}
	code := Code(binary.BigEndian.Uint32(p))
	c.mu.Lock()
	s := c.streams[f.stream]
	if s == nil {
		err := c.notOpenLocked(f)
		c.unlock()
		return err
	}
	complete := s.peerEnded
	c.dropLocked(s, endTheirs)
	c.own = true
	c.unlock()
	mate := s.mate.Load()
	if mate == nil {
		return nil
	}
	c.touch(mate.c)
	if c.client && complete {
		mate.stop(code) // it has all there is; only its sending is not wanted
	} else {
		mate.abandon(code)
	}
	return nil
}

func (c *Conn) readPing(f frameHeader, p []byte) error {
	switch {
	case f.stream != 0:
		return fault(CodeProtocol, "PING on stream %d", f.stream)
	case len(p) != 8:
		return fault(CodeFrameSize, "PING of %d bytes", len(p))
	case f.has(flagAck):
		return nil
	}
	return c.reply(framePing, flagAck, p)
}

// reply answers a frame that asks for it.
func (c *Conn) reply(kind, flags byte, p []byte) error {
	var b [headerLen + 8]byte
	c.mu.Lock()
	fits := c.answerLocked(appendFrame(b[:0], kind, flags, 0, p))
	c.unlock()
	c.own = true
	return c.calm(fits)
}

func readPriority(f frameHeader, p []byte) error {
	switch {
	case f.stream == 0:
		return fault(CodeProtocol, "PRIORITY on stream 0")
	case len(p) != 5:
		return streamFault(f.stream, CodeFrameSize, "PRIORITY of %d bytes", len(p))
	case binary.BigEndian.Uint32(p)&0x7fffffff == f.stream:
		return fault(CodeProtocol, "stream %d depends on itself", f.stream)
	}
	return nil
}

func (c *Conn) readSettings(f frameHeader, p []byte) error {
	switch {
	case f.stream != 0:
		return fault(CodeProtocol, "SETTINGS on stream %d", f.stream)
	case len(p)%6 != 0 || f.has(flagAck) && len(p) > 0:
		return fault(CodeFrameSize, "SETTINGS of %d bytes", len(p))
	case f.has(flagAck):
		return nil
	}
	c.mu.Lock()
	var err error
	if !c.greeted { // who says nothing of streams takes any number
		c.greeted = true
		err = c.settingLocked(settingMaxStreams, MaxStreams)
	}
	for ; len(p) > 0 && err == nil; p = p[6:] {
		err = c.settingLocked(binary.BigEndian.Uint16(p), binary.BigEndian.Uint32(p[2:]))
	}
	if err == nil {
		err = c.calm(c.answerLocked(appendFrame(nil, frameSettings, flagAck, 0, nil)))
		c.fillLocked()
	}
	c.unlock()
	c.own = true
	return err
}

func (c *Conn) settingLocked(key uint16, v uint32) error {
	switch key {
	case settingTableSize:
		c.encoder.SetMaxDynamicTableSizeLimit(min(v, tableSize))
		c.encoder.SetMaxDynamicTableSize(min(v, tableSize))
	case settingPush:
		if v > 1 || v == 1 && c.client {
			return fault(CodeProtocol, "ENABLE_PUSH of %d", v)
		}
	case settingMaxStreams:
		c.most = int(min(v, MaxStreams))
		for w := c.waiting.pop(); w != nil; w = c.waiting.pop() {
			c.ready.push(w) // and back, if there is no place yet
		}
	case settingWindow:
		if v > maxWindow {
			return fault(CodeFlowControl, "initial window of %d", v)
		}
		for _, s := range c.streams {
			s.window += int64(v) - c.initial
			if s.window > maxWindow {
				return fault(CodeFlowControl, "window of stream %d overflows", s.id)
			}
			c.unblockLocked(s)
		}
		c.initial = int64(v)
	case settingMaxFrame:
		if v < 16<<10 || v > 1<<24-1 {
			return fault(CodeProtocol, "maximum frame of %d", v)
		}
	}
	return nil
}

// unblockLocked lets a stream go on whose window has grown.
func (c *Conn) unblockLocked(s *Stream) {
	if s.window > 0 && s.held > 0 && s.in == nil {
		c.ready.push(s)
	}
}

func (c *Conn) readWindow(f frameHeader, p []byte) error {
	if len(p) != 4 {
		return fault(CodeFrameSize, "WINDOW_UPDATE of %d bytes", len(p))
	}
	n := int64(binary.BigEndian.Uint32(p) & 0x7fffffff)
	c.mu.Lock()
	defer c.unlock()
	if c.updates.left == 0 { // each frame sent pays for some
		n := min(c.frames-c.sent, uint64(c.updates.most/10))
		c.sent += n
		c.updates.give(int(10 * n))
	}
	if !c.updates.spend() {
		return fault(CodeCalm, "too many WINDOW_UPDATE frames for what was sent")
	}
	if f.stream != 0 {
		s := c.streams[f.stream]
		switch {
		case s == nil:
			return c.notOpenLocked(f)
		case n == 0:
			return streamFault(f.stream, CodeProtocol, "WINDOW_UPDATE of nothing")
		}
		if s.window += n; s.window > maxWindow {
			return streamFault(f.stream, CodeFlowControl, "window overflow")
		}
		c.unblockLocked(s)
	} else {
		if n == 0 {
			return fault(CodeProtocol, "WINDOW_UPDATE of nothing")
		}
		if c.window += n; c.window > maxWindow {
			return fault(CodeFlowControl, "window of the connection overflows")
		}
		for s := c.blocked.pop(); s != nil; s = c.blocked.pop() {
			c.ready.push(s)
		}
	}
	before := len(c.out)
	c.fillLocked()
	c.own = c.own || len(c.out) > before || c.ready.first != nil
	return nil
}

func (c *Conn) readGoAway(f frameHeader, p []byte) error {
	switch {
	case f.stream != 0:
		return fault(CodeProtocol, "GOAWAY on stream %d", f.stream)
	case len(p) < 8:
		return fault(CodeFrameSize, "GOAWAY of %d bytes", len(p))
	case !c.afford():
		return fault(CodeCalm, "too many GOAWAY frames")
	case !c.client:
		return nil // it opens no more streams; what is under way goes on
	}
	last := binary.BigEndian.Uint32(p) & 0x7fffffff
	c.mu.Lock()
	c.draining = true
	var gone []*Stream
	for id, s := range c.streams {
		if id > last {
			gone = append(gone, s)
		}
	}
	for _, l := range []*line{&c.ready, &c.waiting} {
		for s := l.first; s != nil; s = s.next {
			if s.id == 0 {
				gone = append(gone, s)
			}
		}
	}
	for _, s := range gone {
		c.dropLocked(s, endTheirs)
	}
	c.unlock()
	for _, s := range gone {
		if mate := s.mate.Load(); mate != nil {
			mate.abandon(CodeRefused) // it was not looked at: the client may ask again
			c.touch(mate.c)
		}
	}
	if c.o.Draining != nil {
		c.o.Draining()
	}
	c.drained()
	return nil
}
