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

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
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
	frozen atomic.Bool

	// Of the reader alone.
	r        *bufio.Reader
	ahead    *ahead // below r, once the connection has been frozen
	held     []byte // of a frame, or of the frames of one header block, until it is dealt with
	fields   *fieldReader
	greeted  bool  // this side has sent its greeting
	prefaced bool  // the client's preface is read
	settled  bool  // so is the peer's first SETTINGS
	received int64 // since the last WINDOW_UPDATE

	mu       sync.Mutex
	window   sync.Cond // sending windows have grown, or all is over, or stops
	streams  map[uint32]*Stream
	past     map[uint32]*Stream // ended on both sides, the end not read yet
	nextID   uint32             // of the next stream this side opens
	lastID   uint32             // highest stream the peer opened
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
	engine   int    // goroutines of the connection's own
	handlers int    // goroutines of streams
	freezes  int
	still    chan struct{} // of this freeze
	kick     chan struct{}
	done     chan struct{}
}

// Client starts the client's end on c and returns when its preface is sent.
func Client(c net.Conn) (*Conn, error) {
	h := newConn(c, true, nil)
	hello := append([]byte(h2frame.Preface), h.hello()...)
	c.SetWriteDeadline(time.Now().Add(prefaceTimeout))
	if _, err := c.Write(hello); err != nil {
		c.Close()
		return nil, fmt.Errorf("start http/2: %w", err)
	}
	c.SetWriteDeadline(time.Time{})
	h.engine = 1
	go h.Run()
	return h, nil
}

// Serve runs the server's end on c until the connection ends or is frozen, with
// handle in a goroutine of its own for each request; a stream still open when
// its handle returns is reset. attach, if set, is given the Conn before anything
// is read.
func Serve(c net.Conn, handle func(*Stream), attach func(*Conn)) error {
	h := newConn(c, false, handle)
	h.engine = 1
	if attach != nil {
		attach(h)
	}
	return h.Run()
}

// greet exchanges greetings with a client. Both ends greet first, so this one
// writes beside reading.
func (h *Conn) greet() error {
	h.c.SetDeadline(time.Now().Add(prefaceTimeout))
	greeted := make(chan error, 1)
	if h.greeted {
		greeted <- nil
	} else {
		h.greeted = true
		go func() { _, err := h.c.Write(h.hello()); greeted <- err }()
	}
	_, err := h.more(len(h2frame.Preface))
	if err == nil && string(h.held) != h2frame.Preface {
		err = errors.New("the client does not speak HTTP/2")
	}
	if err != nil && !errors.Is(err, wire.ErrFrozen) {
		h.c.SetDeadline(time.Unix(1, 0))
	}
	if werr := <-greeted; werr != nil {
		err = werr
	}
	if err != nil {
		return fmt.Errorf("start http/2: %w", err)
	}
	h.c.SetDeadline(time.Time{})
	h.prefaced, h.held = true, h.held[:0]
	return nil
}

func newConn(c net.Conn, client bool, handle func(*Stream)) *Conn {
	h := &Conn{
		c: c, client: client, handle: handle,
		r: bufio.NewReaderSize(c, maxFrame+h2frame.HeaderLen), fields: newFieldReader(),
		streams: map[uint32]*Stream{}, past: map[uint32]*Stream{}, nextID: 2,
		send: 65535, initial: 65535, frame: sendFrame(maxFrame), streamsM: MaxStreams,
		kick: make(chan struct{}, 1), done: make(chan struct{}), idle: time.Now(),
	}
	if client {
		h.nextID, h.greeted, h.prefaced = 1, true, true
	}
	h.window.L = &h.mu
	return h
}

// start makes the connection's own goroutine and timer.
func (h *Conn) start() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err != nil || h.frozen.Load() {
		return
	}
	h.engine++
	go h.writeControl()
	h.beat = time.AfterFunc(pulse, h.ask)
}

// ask asks the peer for a sign of life, or ends the connection if the last time
// was in vain. What it asks cannot be guessed: only who reads can answer.
func (h *Conn) ask() {
	h.mu.Lock()
	if h.err != nil || h.frozen.Load() {
		h.mu.Unlock()
		return
	}
	err := errSilent
	if h.asked == 0 {
		h.asked = rand.Uint64() | 1
		err = h.queueLocked(h2frame.Append(nil, h2frame.Ping, 0, 0, binary.BigEndian.AppendUint64(nil, h.asked)))
		h.beat.Reset(pulse)
	}
	h.mu.Unlock()
	if err != nil {
		h.end(err)
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
func sendFrame(peerTakes uint32) int { return int(min(peerTakes, maxFrame)) - h2frame.HeaderLen }

// hello is what either side sends first.
func (h *Conn) hello() []byte {
	var s []byte
	s = h2frame.AppendSetting(s, h2frame.SettingPush, 0)
	s = h2frame.AppendSetting(s, h2frame.SettingMaxStreams, MaxStreams)
	s = h2frame.AppendSetting(s, h2frame.SettingWindow, streamWindow)
	s = h2frame.AppendSetting(s, h2frame.SettingMaxFrame, maxFrame)
	b := h2frame.Append(nil, h2frame.Settings, 0, 0, s)
	return h2frame.Append(b, h2frame.Window, 0, 0, u32(connWindow-65535))
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
// refused it. A refusal is a *StatusError. If the connection is frozen meanwhile
// the stream is returned with wire.ErrFrozen, to be awaited later; without one
// nothing was sent.
func (h *Conn) Open(ctx context.Context, authority string, fields ...hpack.HeaderField) (*Stream, error) {
	s, err := h.request(authority, fields)
	if err != nil {
		return nil, err
	}
	switch err := s.Await(ctx); {
	case errors.Is(err, wire.ErrFrozen):
		return s, err
	case err != nil:
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
	case h.frozen.Load():
		return nil, wire.ErrFrozen
	case h.draining || len(h.streams) >= min(h.streamsM, MaxStreams) || h.nextID > 1<<30 || len(h.control)+h2frame.HeaderLen+len(block) > maxControl:
		return nil, ErrBusy
	}
	s := h.addLocked(h.nextID, authority)
	h.nextID += 2
	// Queued, not written: the context of Open cannot end a write. In the order
	// of stream ids, as the lock is held.
	h.control = h2frame.Append(h.control, h2frame.Headers, h2frame.FlagEndHeaders, s.id, block)
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
	h.enqueue(h2frame.Append(nil, h2frame.GoAway, 0, 0, append(u32(last), u32(uint32(h2frame.CodeNone))...)))
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
	err := h.queueLocked(frames)
	h.mu.Unlock()
	if err != nil {
		h.end(err)
	}
}

func (h *Conn) queueLocked(frames []byte) error {
	if len(h.control)+len(frames) > maxControl {
		return h2frame.Fault(h2frame.CodeCalm, "the peer does not read the answers it asks for")
	}
	h.control = append(h.control, frames...)
	h.wake()
	return nil
}

func (h *Conn) wake() {
	select {
	case h.kick <- struct{}{}:
	default:
	}
}

func (h *Conn) writeControl() {
	defer h.leave(&h.engine)
	for {
		h.mu.Lock()
		frames := h.control
		if h.frozen.Load() {
			h.mu.Unlock()
			return // they are part of the state
		}
		h.control = nil
		h.mu.Unlock()
		if len(frames) > 0 && h.write(frames) != nil {
			return
		}
		select {
		case <-h.kick:
		case <-h.done:
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
	var ce *h2frame.Error
	if errors.As(err, &ce) {
		// Say why, if the peer still listens.
		h.c.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
		h.c.Write(h2frame.Append(nil, h2frame.GoAway, 0, 0, append(u32(last), u32(uint32(ce.Code))...)))
	}
	if below, ok := h.c.(interface{ NetConn() net.Conn }); ok {
		below.NetConn().Close() // a TLS farewell could block on a peer that does not read
	}
	h.c.Close()
	for _, s := range streams {
		s.end(err)
	}
}

// Run reads until the connection ends or is frozen. Client and Serve run what
// they make; what is resumed or thawed is run by its owner.
func (h *Conn) Run() error {
	defer h.leave(&h.engine)
	var err error
	if !h.prefaced {
		err = h.greet()
	}
	if err == nil {
		h.start()
		err = h.read()
	}
	if errors.Is(err, wire.ErrFrozen) && h.freeze() {
		return wire.ErrFrozen
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = errGone // not EOF: to a reader of a stream that is its orderly end
	}
	h.end(err)
	return h.Err()
}

// remove forgets a stream that is closed on both sides, but for what is still to
// be read from it.
func (h *Conn) remove(s *Stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.streams[s.id] != s {
		return
	}
	delete(h.streams, s.id)
	if len(h.streams) == 0 {
		h.idle = time.Now()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.past = s.err == nil && !s.told; s.past {
		h.past[s.id] = s
	}
}

// forget forgets a stream whose end has been read.
func (h *Conn) forget(s *Stream) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.past, s.id)
}
