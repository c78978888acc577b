// Package hbone carries TCP streams over one HTTP/2 connection, each as a
// CONNECT request: HBONE, as Istio's ambient mesh speaks it.
//
// It is an engine for nothing else: no other method, no push, no priorities,
// no trailers. In return both ends may close their half of a stream, which a
// general HTTP/2 server does not let its handler do, a stream costs no
// goroutine of its own, and the bytes are copied once on each side. TLS and
// the identity of the peer are the caller's: a Conn is handed an established
// connection.
package hbone

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"
)

const (
	// MaxStreams at once on one connection, as the peer is told.
	MaxStreams = 100
	// streamWindow bounds what a slow reader makes this side hold.
	streamWindow = 256 << 10
	// connWindow is given back on receipt: only the windows of its streams bound
	// a connection, so a slow stream does not hold up the others.
	connWindow = 16 << 20

	maxControl     = 64 << 10 // bytes of answers a peer may leave unread
	prefaceTimeout = 10 * time.Second
	// pulse is how often a peer is asked for a sign of life. One that has not
	// answered by the next time is gone, or reads no more: whoever waits for it,
	// reading or writing, waits for two pulses at most.
	pulse = 15 * time.Second
)

var errGone = errors.New("the peer has closed the connection")

var errSilent = fmt.Errorf("the peer has not answered for %v", pulse)

// ErrClosed is what streams and Open report after Close.
var ErrClosed = errors.New("connection closed")

// ErrBusy is returned by Open when the connection takes no more streams now.
var ErrBusy = errors.New("connection takes no more streams")

// Conn is one end of an HTTP/2 connection.
type Conn struct {
	c      net.Conn
	client bool
	handle func(*Stream)
	r      *bufio.Reader
	fields *fieldReader

	mu       sync.Mutex
	window   sync.Cond // sending windows have grown, or all is over
	streams  map[uint32]*Stream
	nextID   uint32 // of the next stream this side opens
	lastID   uint32 // highest stream the peer opened
	draining bool
	err      error
	send     int64 // what may be sent on the connection
	initial  int64 // what may be sent on a new stream
	frame    int   // largest frame the peer takes
	streamsM int   // streams the peer takes
	control  []byte
	idle     time.Time // since when there is no stream
	beat     *time.Timer
	asked    uint64 // what the peer is to answer to show that it reads; 0 for nothing

	received int64 // since the last WINDOW_UPDATE; reader only
	handlers atomic.Int32
	kick     chan struct{}
	done     chan struct{}
}

// Client starts the client's end on c and returns when its preface is sent.
func Client(c net.Conn) (*Conn, error) {
	h := newConn(c, true, nil)
	hello := append([]byte(preface), h.hello()...)
	c.SetWriteDeadline(time.Now().Add(prefaceTimeout))
	if _, err := c.Write(hello); err != nil {
		c.Close()
		return nil, fmt.Errorf("start http/2: %w", err)
	}
	c.SetWriteDeadline(time.Time{})
	h.start()
	go h.run()
	return h, nil
}

// Serve runs the server's end on c until the connection ends, with handle in a
// goroutine of its own for each request; a stream still open when its handle
// returns is reset. attach, if set, is given the Conn
// before the first request.
func Serve(c net.Conn, handle func(*Stream), attach func(*Conn)) error {
	h := newConn(c, false, handle)
	c.SetDeadline(time.Now().Add(prefaceTimeout))
	greeted := make(chan error, 1) // beside reading: both ends greet first
	go func() { _, err := c.Write(h.hello()); greeted <- err }()
	got := make([]byte, len(preface))
	_, err := io.ReadFull(h.r, got)
	if err == nil && string(got) != preface {
		err = errors.New("the client does not speak HTTP/2")
	}
	if err != nil {
		c.SetDeadline(time.Unix(1, 0))
	}
	if err = errors.Join(err, <-greeted); err != nil {
		c.Close()
		return fmt.Errorf("start http/2: %w", err)
	}
	c.SetDeadline(time.Time{})
	if attach != nil {
		attach(h)
	}
	h.start()
	return h.run()
}

func newConn(c net.Conn, client bool, handle func(*Stream)) *Conn {
	h := &Conn{
		c: c, client: client, handle: handle,
		r: bufio.NewReaderSize(c, maxFrame+headerLen), fields: newFieldReader(),
		streams: map[uint32]*Stream{}, nextID: 2,
		send: 65535, initial: 65535, frame: sendFrame(maxFrame), streamsM: MaxStreams,
		kick: make(chan struct{}, 1), done: make(chan struct{}), idle: time.Now(),
	}
	if client {
		h.nextID = 1
	}
	h.window.L = &h.mu
	return h
}

// start makes the connection's own goroutine and timer.
func (h *Conn) start() {
	go h.writeControl()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.beat = time.AfterFunc(pulse, h.ask)
	}
}

// ask asks the peer for a sign of life, or ends the connection if the last time
// was in vain. What it asks cannot be guessed: only who reads can answer.
func (h *Conn) ask() {
	h.mu.Lock()
	vain := h.asked != 0
	h.asked = rand.Uint64() | 1
	ping := appendFrame(nil, framePing, 0, 0, binary.BigEndian.AppendUint64(nil, h.asked))
	h.mu.Unlock()
	if vain {
		h.end(errSilent)
		return
	}
	h.enqueue(ping)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err == nil {
		h.beat.Reset(pulse)
	}
}

func (h *Conn) answered(p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if binary.BigEndian.Uint64(p) == h.asked {
		h.asked = 0
	}
}

// sendFrame is the payload to send in one frame. With its header it just fills
// a TLS record.
func sendFrame(peerTakes uint32) int { return int(min(peerTakes, maxFrame)) - headerLen }

// hello is what either side sends first.
func (h *Conn) hello() []byte {
	var s []byte
	s = appendSetting(s, settingPush, 0)
	s = appendSetting(s, settingMaxStreams, MaxStreams)
	s = appendSetting(s, settingWindow, streamWindow)
	s = appendSetting(s, settingMaxFrame, maxFrame)
	b := appendFrame(nil, frameSettings, 0, 0, s)
	return appendFrame(b, frameWindow, 0, 0, u32(connWindow-65535))
}

// Done is closed when the connection has ended.
func (h *Conn) Done() <-chan struct{} { return h.done }

// Err is why the connection ended, nil while it has not.
func (h *Conn) Err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.err
}

// Open opens a stream to authority and waits until the peer has accepted or
// refused it. A refusal is a *StatusError.
func (h *Conn) Open(ctx context.Context, authority string, fields ...hpack.HeaderField) (*Stream, error) {
	s, err := h.request(authority, fields)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { s.fail(ctx.Err(), CodeCancel) })
	defer stop()
	if err := s.awaitStatus(); err != nil {
		s.Reset(CodeCancel)
		return nil, err
	}
	return s, nil
}

func (h *Conn) request(authority string, fields []hpack.HeaderField) (*Stream, error) {
	block := encodeFields(append([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: authority}}, fields...))
	if len(block) > maxFrame {
		return nil, errors.New("request head is too large")
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.err != nil:
		return nil, h.err
	case h.draining || len(h.streams) >= min(h.streamsM, MaxStreams) || h.nextID > 1<<30 || len(h.control)+headerLen+len(block) > maxControl:
		return nil, ErrBusy
	}
	s := h.addLocked(h.nextID, authority)
	h.nextID += 2
	// Queued, not written: the context of Open cannot end a write. In the order
	// of stream ids, as the lock is held.
	h.control = appendFrame(h.control, frameHeaders, flagEndHeaders, s.id, block)
	h.wake()
	return s, nil
}

func (h *Conn) addLocked(id uint32, authority string) *Stream {
	s := &Stream{h: h, id: id, Authority: authority, window: h.initial, credit: streamWindow}
	s.readable.L = &s.mu
	h.streams[id] = s
	return s
}

// Busy is the number of streams open; idle is since when there is none.
func (h *Conn) Busy() (streams int, idle time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.streams), h.idle
}

// Drain tells the peer to open no more streams. Those open go on.
func (h *Conn) Drain() {
	h.mu.Lock()
	h.draining = true
	last := h.lastID
	h.mu.Unlock()
	h.enqueue(appendFrame(nil, frameGoAway, 0, 0, append(u32(last), u32(uint32(CodeNone))...)))
}

// Close ends the connection and all its streams at once.
func (h *Conn) Close() error {
	h.end(ErrClosed)
	return nil
}

// write sends whole frames. The connection below keeps each call together.
func (h *Conn) write(frames []byte) error {
	_, err := h.c.Write(frames)
	if err != nil {
		h.end(fmt.Errorf("write: %w", err))
	}
	return err
}

// enqueue leaves frames to the control writer, as the reader must not wait for
// a peer that is itself waiting to be read.
func (h *Conn) enqueue(frames []byte) {
	h.mu.Lock()
	tooMuch := len(h.control)+len(frames) > maxControl
	if !tooMuch {
		h.control = append(h.control, frames...)
	}
	h.mu.Unlock()
	if tooMuch {
		h.end(fault(CodeCalm, "the peer does not read the answers it asks for"))
		return
	}
	h.wake()
}

func (h *Conn) wake() {
	select {
	case h.kick <- struct{}{}:
	default:
	}
}

func (h *Conn) writeControl() {
	for {
		select {
		case <-h.kick:
		case <-h.done:
			return
		}
		h.mu.Lock()
		frames := h.control
		h.control = nil
		h.mu.Unlock()
		if len(frames) > 0 && h.write(frames) != nil {
			return
		}
	}
}

// end is the one way a connection ends. It does not wait for the peer.
func (h *Conn) end(err error) {
	h.mu.Lock()
	if h.err != nil {
		h.mu.Unlock()
		return
	}
	h.err = err
	streams, last := h.streams, h.lastID
	h.streams = map[uint32]*Stream{}
	h.window.Broadcast()
	if h.beat != nil {
		h.beat.Stop()
	}
	h.mu.Unlock()
	close(h.done)
	var ce *connError
	if errors.As(err, &ce) {
		// Say why, if the peer still listens.
		h.c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		h.c.Write(appendFrame(nil, frameGoAway, 0, 0, append(u32(last), u32(uint32(ce.code))...)))
	}
	if below, ok := h.c.(interface{ NetConn() net.Conn }); ok {
		below.NetConn().Close() // a TLS farewell could block on a peer that does not read
	}
	h.c.Close()
	for _, s := range streams {
		s.end(err)
	}
}

func (h *Conn) run() error {
	err := h.read()
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errGone // not EOF: to a reader of a stream that is its orderly end
	}
	h.end(err)
	return h.Err()
}

func (h *Conn) read() error {
	var head [headerLen]byte
	for first := true; ; first = false {
		if _, err := io.ReadFull(h.r, head[:]); err != nil {
			return err
		}
		f := parseHeader(head[:])
		if f.length > maxFrame {
			return fault(CodeFrameSize, "frame of %d bytes", f.length)
		}
		if first && f.kind != frameSettings {
			return fault(CodeProtocol, "the first frame is not SETTINGS")
		}
		if f.kind == frameData {
			if err := h.readData(f); err != nil {
				return err
			}
			continue
		}
		payload := make([]byte, f.length)
		if _, err := io.ReadFull(h.r, payload); err != nil {
			return err
		}
		if err := h.readFrame(f, payload); err != nil {
			return err
		}
	}
}

func (h *Conn) readFrame(f frameHeader, p []byte) error {
	switch f.kind {
	case frameHeaders:
		return h.readHeaders(f, p)
	case frameReset:
		return h.readReset(f, p)
	case frameSettings:
		return h.readSettings(f, p)
	case framePing:
		if len(p) != 8 || f.stream != 0 {
			return fault(CodeFrameSize, "malformed PING")
		}
		if !f.has(flagAck) {
			h.enqueue(appendFrame(nil, framePing, flagAck, 0, p))
			break
		}
		h.answered(p)
	case frameGoAway:
		return h.readGoAway(f, p)
	case frameWindow:
		return h.readWindow(f, p)
	case framePush:
		return fault(CodeProtocol, "PUSH_PROMISE is not taken")
	case frameContinuation:
		return fault(CodeProtocol, "CONTINUATION without HEADERS")
	case framePriority:
		if len(p) != 5 || f.stream == 0 {
			return fault(CodeFrameSize, "malformed PRIORITY")
		}
	}
	return nil // unknown frames are to be ignored
}

// stream finds an open stream; nil if it is closed already. Frames on a stream
// that was never opened end the connection.
func (h *Conn) stream(id uint32) (*Stream, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s := h.streams[id]; s != nil {
		return s, nil
	}
	mine := id%2 == 1 == h.client
	if id == 0 || mine && id >= h.nextID || !mine && id > h.lastID {
		return nil, fault(CodeProtocol, "frame on stream %d, which is not open", id)
	}
	return nil, nil
}

func (h *Conn) readData(f frameHeader) error {
	s, err := h.stream(f.stream)
	if err != nil {
		return err
	}
	h.received += int64(f.length)
	if h.received > connWindow/4 {
		h.enqueue(appendFrame(nil, frameWindow, 0, 0, u32(uint32(h.received))))
		h.received = 0
	}
	body, pad := f.length, 0
	if f.has(flagPadded) {
		n, err := h.r.ReadByte()
		if err != nil {
			return err
		}
		body, pad = f.length-1-int(n), int(n)
		if body < 0 {
			return fault(CodeProtocol, "padding longer than the frame")
		}
	}
	if s == nil {
		return discard(h.r, body+pad)
	}
	if err := s.receive(h.r, body, f.length); err != nil {
		return err
	}
	if err := discard(h.r, pad); err != nil {
		return err
	}
	if f.has(flagEndStream) {
		s.peerDone()
	}
	return nil
}

func (h *Conn) readHeaders(f frameHeader, p []byte) error {
	block, err := unpad(f, p)
	if err != nil {
		return err
	}
	if block, err = h.continued(f, block); err != nil {
		return err
	}
	fields, ok, err := h.fields.read(block)
	if err != nil {
		return err
	}
	m := readMessage(fields)
	if !ok {
		m.malformed = "too many fields"
	}
	if h.client {
		return h.readResponse(f, m)
	}
	return h.readRequest(f, m)
}

// continued appends CONTINUATION frames until the block is whole.
func (h *Conn) continued(f frameHeader, block []byte) ([]byte, error) {
	for f.flags&flagEndHeaders == 0 {
		var head [headerLen]byte
		if _, err := io.ReadFull(h.r, head[:]); err != nil {
			return nil, err
		}
		next := parseHeader(head[:])
		if next.kind != frameContinuation || next.stream != f.stream || next.length == 0 && !next.has(flagEndHeaders) {
			return nil, fault(CodeProtocol, "HEADERS are not continued")
		}
		if len(block)+next.length > maxBlock {
			return nil, fault(CodeCalm, "header block over %d bytes", maxBlock)
		}
		more := make([]byte, next.length)
		if _, err := io.ReadFull(h.r, more); err != nil {
			return nil, err
		}
		block = append(block, more...)
		f.flags |= next.flags & flagEndHeaders
	}
	return block, nil
}

func (h *Conn) readResponse(f frameHeader, m message) error {
	s, err := h.stream(f.stream)
	if err != nil || s == nil {
		return err
	}
	if m.malformed != "" || m.status == "" {
		s.fail(fmt.Errorf("malformed response: %s", m.malformed), CodeProtocol)
		return nil
	}
	if len(m.status) == 3 && m.status[0] == '1' {
		return nil // informational: the answer is yet to come
	}
	s.setStatus(m)
	if f.has(flagEndStream) {
		s.peerDone()
	}
	return nil
}

func (h *Conn) readRequest(f frameHeader, m message) error {
	h.mu.Lock()
	if s := h.streams[f.stream]; s != nil {
		h.mu.Unlock()
		// Trailers: they carry nothing for a tunnel but its end.
		if f.has(flagEndStream) {
			s.peerDone()
			return nil
		}
		return fault(CodeProtocol, "second HEADERS on stream %d", f.stream)
	}
	if f.stream%2 == 0 || f.stream <= h.lastID {
		h.mu.Unlock()
		return fault(CodeProtocol, "stream %d cannot be opened", f.stream)
	}
	h.lastID = f.stream
	if h.draining || len(h.streams) >= MaxStreams {
		h.mu.Unlock()
		h.enqueue(appendFrame(nil, frameReset, 0, f.stream, u32(uint32(CodeRefused))))
		return nil
	}
	s := h.addLocked(f.stream, m.authority)
	h.mu.Unlock()
	s.Fields = m.other
	if f.has(flagEndStream) {
		s.peerDone()
	}
	if m.malformed != "" || m.method != "CONNECT" || m.authority == "" {
		s.malformed = "want CONNECT with an authority"
	}
	// A peer that opens and resets faster than handlers end is an attack.
	if h.handlers.Add(1) > 2*MaxStreams {
		return fault(CodeCalm, "streams are opened and reset too fast")
	}
	go func() {
		defer h.handlers.Add(-1)
		if s.malformed != "" {
			s.Refuse(400, s.malformed)
			return
		}
		h.handle(s)
		s.Reset(CodeCancel)
	}()
	return nil
}

func (h *Conn) readReset(f frameHeader, p []byte) error {
	if len(p) != 4 {
		return fault(CodeFrameSize, "malformed RST_STREAM")
	}
	s, err := h.stream(f.stream)
	if err != nil || s == nil {
		return err
	}
	code := Code(binary.BigEndian.Uint32(p))
	h.remove(s)
	if code == CodeNone && s.noMore() {
		h.mu.Lock()
		h.window.Broadcast()
		h.mu.Unlock()
		return nil
	}
	s.end(&ResetError{code})
	return nil
}

func (h *Conn) readSettings(f frameHeader, p []byte) error {
	if f.stream != 0 || len(p)%6 != 0 || f.has(flagAck) && len(p) > 0 {
		return fault(CodeFrameSize, "malformed SETTINGS")
	}
	if f.has(flagAck) {
		return nil
	}
	if err := h.applySettings(p); err != nil {
		return err
	}
	h.enqueue(appendFrame(nil, frameSettings, flagAck, 0, nil))
	return nil
}

func (h *Conn) applySettings(p []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ; len(p) > 0; p = p[6:] {
		v := binary.BigEndian.Uint32(p[2:])
		switch binary.BigEndian.Uint16(p) {
		case settingMaxStreams:
			h.streamsM = int(min(v, MaxStreams))
		case settingWindow:
			if v > 1<<31-1 {
				return fault(CodeFlowControl, "initial window of %d", v)
			}
			for _, s := range h.streams {
				s.window += int64(v) - h.initial
			}
			h.initial = int64(v)
			h.window.Broadcast()
		case settingMaxFrame:
			if v < 16<<10 || v > 1<<24-1 {
				return fault(CodeProtocol, "maximum frame of %d", v)
			}
			h.frame = sendFrame(v)
		}
	}
	return nil
}

func (h *Conn) readGoAway(f frameHeader, p []byte) error {
	if f.stream != 0 || len(p) < 8 {
		return fault(CodeFrameSize, "malformed GOAWAY")
	}
	last, code := binary.BigEndian.Uint32(p)&0x7fffffff, Code(binary.BigEndian.Uint32(p[4:]))
	h.mu.Lock()
	h.draining = true
	var gone []*Stream
	for id, s := range h.streams {
		if h.client && id > last {
			gone = append(gone, s)
			delete(h.streams, id)
		}
	}
	h.mu.Unlock()
	for _, s := range gone {
		s.end(&ResetError{CodeRefused})
	}
	if code != CodeNone {
		return fmt.Errorf("the peer ended the connection: http/2 error %d", code)
	}
	return nil
}

func (h *Conn) readWindow(f frameHeader, p []byte) error {
	if len(p) != 4 {
		return fault(CodeFrameSize, "malformed WINDOW_UPDATE")
	}
	n := int64(binary.BigEndian.Uint32(p) & 0x7fffffff)
	if n == 0 {
		return fault(CodeProtocol, "WINDOW_UPDATE of nothing")
	}
	if f.stream != 0 {
		s, err := h.stream(f.stream)
		if err != nil || s == nil {
			return err
		}
		h.mu.Lock()
		s.window += n
		over := s.window > 1<<31-1
		h.window.Broadcast()
		h.mu.Unlock()
		if over {
			s.fail(errors.New("window overflow"), CodeFlowControl)
		}
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.send += n
	h.window.Broadcast()
	if h.send > 1<<31-1 {
		return fault(CodeFlowControl, "connection window overflow")
	}
	return nil
}

// remove forgets a stream that is closed on both sides.
func (h *Conn) remove(s *Stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.streams[s.id] == s {
		delete(h.streams, s.id)
		if len(h.streams) == 0 {
			h.idle = time.Now()
		}
	}
}
