package hbone

import (
	"errors"
	"fmt"
	"net"
	"slices"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// A connection is frozen, together with the one below, to be taken up by
// another process, or again by this one. Reads stop (wire.ErrFrozen), and so do
// waits for a window; what is written then is kept. What has stopped is plain
// data: State. Resume makes a frozen Conn of it, Thaw sets that going.

const (
	// MaxUnsent bounds what a state may hold of a stream that was written and
	// not sent: what an engine has decided on and holds.
	MaxUnsent = 64 << 20

	maxHeld = 512 << 10 // a header block in the smallest of frames, and what is read ahead
)

// State is a frozen connection.
type State struct {
	Prefaced bool   `json:"prefaced,omitempty"` // the client's preface is read
	Settled  bool   `json:"settled,omitempty"`  // so is the peer's first SETTINGS
	Draining bool   `json:"draining,omitempty"`
	NextID   uint32 `json:"nextID"`
	LastID   uint32 `json:"lastID"`
	Send     int64  `json:"send"`
	Initial  int64  `json:"initial"`
	Streams  int    `json:"streams"`            // that the peer takes
	Received int64  `json:"received,omitempty"` // since the last WINDOW_UPDATE
	Asked    uint64 `json:"asked,omitempty"`
	Unread   []byte `json:"unread,omitempty"`
	Control  []byte `json:"control,omitempty"` // frames to be sent
	// Table of header fields, the oldest first, and how large it may be.
	Table    []h2frame.Field `json:"table,omitempty"`
	TableMax uint32          `json:"tableMax"`
	Open     []StreamState   `json:"open,omitempty"`
}

// StreamState is a stream of a frozen connection.
type StreamState struct {
	ID        uint32          `json:"id"`
	Authority []byte          `json:"authority,omitempty"`
	Fields    []h2frame.Field `json:"fields,omitempty"`
	Malformed string          `json:"malformed,omitempty"`
	Window    int64           `json:"window"`
	Credit    int             `json:"credit"`
	Unacked   int             `json:"unacked,omitempty"`
	Unread    []byte          `json:"unread,omitempty"`
	Unsent    []byte          `json:"unsent,omitempty"`
	Status    []byte          `json:"status,omitempty"` // the peer's answer
	Reason    []byte          `json:"reason,omitempty"`
	Ending    bool            `json:"ending,omitempty"`    // our half is to end after what is unsent
	OwnEnded  bool            `json:"ownEnded,omitempty"`  // our half is ended
	PeerEnded bool            `json:"peerEnded,omitempty"` // the peer's is
	Answered  bool            `json:"answered,omitempty"`  // by this side
	Fresh     bool            `json:"fresh,omitempty"`     // its handler has not begun
	Told      bool            `json:"told,omitempty"`      // the peer's end has been read
	Past      bool            `json:"past,omitempty"`      // both halves are ended
}

// ahead gives what was read of a connection before it was frozen, then the rest.
type ahead struct {
	unread []byte
	c      net.Conn
}

func (a *ahead) Read(p []byte) (int, error) {
	if len(a.unread) == 0 {
		a.unread = nil
		return a.c.Read(p)
	}
	n := copy(p, a.unread)
	a.unread = a.unread[n:]
	return n, nil
}

// Freeze stops the connection, and the one below if it has a Freeze of its own;
// otherwise its owner freezes that. Handlers may read elsewhere too: that is
// frozen after the connection, or else their streams are reset when they return.
func (h *Conn) Freeze() {
	h.freeze()
	switch below := h.c.(type) {
	case interface{ Freeze() }:
		below.Freeze()
	case interface{ NetConn() net.Conn }:
		if f, ok := below.NetConn().(interface{ Freeze() }); ok {
			f.Freeze()
		}
	}
}

// freeze stops all that waits here. It tells whether the connection lives.
func (h *Conn) freeze() bool {
	h.mu.Lock()
	alive := h.err == nil
	if h.frozen.Load() {
		h.mu.Unlock()
		return alive
	}
	h.freezes++
	h.still = make(chan struct{})
	h.frozen.Store(true)
	if h.beat != nil {
		h.beat.Stop()
	}
	h.window.Broadcast()
	h.stillLocked()
	streams := make([]*Stream, 0, len(h.streams)+len(h.past))
	for _, s := range h.allLocked() {
		streams = append(streams, s)
	}
	h.mu.Unlock()
	h.wake()
	for _, s := range streams {
		s.mu.Lock()
		s.readable.Broadcast()
		s.mu.Unlock()
	}
	return alive
}

// allLocked goes over the streams, those in the past too.
func (h *Conn) allLocked() func(func(uint32, *Stream) bool) {
	return func(yield func(uint32, *Stream) bool) {
		for id, s := range h.streams {
			if !yield(id, s) {
				return
			}
		}
		for id, s := range h.past {
			if !yield(id, s) {
				return
			}
		}
	}
}

// leave ends one of the goroutines that are counted.
func (h *Conn) leave(count *int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	*count--
	h.stillLocked()
}

func (h *Conn) stillLocked() {
	if !h.frozen.Load() {
		return
	}
	h.window.Broadcast()
	if h.still != nil && h.engine == 0 && h.handlers == 0 {
		close(h.still)
		h.still = nil
	}
}

// Stopped is closed when all that runs for the frozen connection has stopped,
// the handlers that it has started among it. Thaw makes it void.
func (h *Conn) Stopped() <-chan struct{} {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.still == nil {
		done := make(chan struct{})
		close(done)
		return done
	}
	return h.still
}

// overUnlessFrozen resets what a handler has left open. One that returns
// because of a freeze leaves its stream to others; one that lives through a
// freeze resets its stream itself.
func (h *Conn) overUnlessFrozen(s *Stream, freezes int) {
	h.mu.Lock()
	same := h.freezes == freezes
	h.mu.Unlock()
	if same {
		s.Reset(h2frame.CodeCancel)
	}
}

// State is what the frozen connection has come to, once Stopped and with nobody
// else using its streams. The Conn is of no use afterwards: it is Done with
// wire.ErrFrozen, while the connection below is neither closed nor told. nil
// means that the connection had ended.
func (h *Conn) State() *State {
	h.Freeze()
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.engine > 0 {
		h.window.Wait()
	}
	if h.err != nil {
		return nil
	}
	st := &State{
		Prefaced: h.prefaced, Settled: h.settled, Draining: h.draining, NextID: h.nextID, LastID: h.lastID,
		Send: h.send, Initial: h.initial, Streams: h.streamsM, Received: h.received, Asked: h.asked,
		Unread: h.unread(), Control: h.control,
	}
	st.Table, st.TableMax = h2frame.Table(h.fields.decoder)
	for _, s := range h.allLocked() {
		st.Open = append(st.Open, s.stateLocked())
	}
	h.err = wire.ErrFrozen
	close(h.done)
	h.window.Broadcast()
	return st
}

// unread is all that is read and not dealt with.
func (h *Conn) unread() []byte {
	b := slices.Clone(h.held)
	buffered, _ := h.r.Peek(h.r.Buffered())
	b = append(b, buffered...)
	if h.ahead != nil {
		b = append(b, h.ahead.unread...)
	}
	return b
}

// stateLocked takes what the stream holds. h.mu is held.
func (s *Stream) stateLocked() StreamState {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := StreamState{
		ID: s.id, Authority: []byte(s.Authority), Malformed: s.malformed, Window: s.window, Credit: s.credit, Unacked: s.unacked,
		Unsent: s.unsent, Status: []byte(s.status), Reason: []byte(s.reason), Ending: s.ending, OwnEnded: s.ownEnded,
		PeerEnded: s.peerEnded, Answered: s.answered, Fresh: s.fresh, Told: s.told, Past: s.past,
	}
	for _, f := range s.Fields {
		st.Fields = append(st.Fields, h2frame.Field{Name: []byte(f.Name), Value: []byte(f.Value)})
	}
	for _, c := range s.chunks {
		st.Unread = append(st.Unread, c.buf[:c.n]...)
		chunks.Put(c)
	}
	s.chunks = nil
	if s.past {
		st.Unsent, st.Ending = nil, false // the peer would not have it
	}
	return st
}

// ResumeServer makes a frozen Conn of a server's state, over a connection that
// stands where that one stood, and tells its streams; not those whose handler
// had not begun, which Thaw does. Streams known to the owner are its to go on
// with; others it resets. attach, if set, is given the Conn.
func ResumeServer(c net.Conn, st *State, handle func(*Stream), attach func(*Conn)) (*Conn, map[uint32]*Stream, error) {
	h, streams, err := resume(c, st, false, handle)
	if err == nil && attach != nil {
		attach(h)
	}
	return h, streams, err
}

// ResumeClient does for a client's state what ResumeServer does for a server's.
func ResumeClient(c net.Conn, st *State) (*Conn, map[uint32]*Stream, error) {
	return resume(c, st, true, nil)
}

func resume(c net.Conn, st *State, client bool, handle func(*Stream)) (*Conn, map[uint32]*Stream, error) {
	h := newConn(c, client, handle)
	if err := errors.Join(st.check(client), h2frame.SetTable(h.fields.decoder, st.Table, st.TableMax)); err != nil {
		return nil, nil, fmt.Errorf("resume http/2: %w", err)
	}
	h.greeted, h.prefaced, h.settled, h.draining = true, st.Prefaced, st.Settled, st.Draining
	h.nextID, h.lastID, h.send, h.initial = st.NextID, st.LastID, st.Send, st.Initial
	h.streamsM, h.received, h.asked = st.Streams, st.Received, st.Asked
	h.control = slices.Clone(st.Control)
	h.held = slices.Clone(st.Unread)
	h.freezes = 1
	h.frozen.Store(true)
	streams := map[uint32]*Stream{}
	for i := range st.Open {
		s := h.restore(&st.Open[i])
		if !s.fresh {
			streams[s.id] = s
		}
	}
	return h, streams, nil
}

func (h *Conn) restore(st *StreamState) *Stream {
	s := h.addLocked(st.ID, string(st.Authority))
	if st.Past {
		delete(h.streams, s.id)
		h.past[s.id] = s
	}
	for _, f := range st.Fields {
		s.Fields = append(s.Fields, hpack.HeaderField{Name: string(f.Name), Value: string(f.Value)})
	}
	s.malformed, s.window, s.credit, s.unacked = st.Malformed, st.Window, st.Credit, st.Unacked
	s.unsent, s.ending, s.fresh = slices.Clone(st.Unsent), st.Ending, st.Fresh
	s.status, s.reason, s.answered = string(st.Status), string(st.Reason), st.Answered
	s.ownEnded, s.peerEnded, s.told, s.past = st.OwnEnded, st.PeerEnded, st.Told, st.Past
	for b := st.Unread; len(b) > 0; {
		c := chunks.Get().(*chunk)
		c.n = copy(c.buf[:], b)
		s.chunks = append(s.chunks, c)
		b = b[c.n:]
	}
	return s
}

// Thaw sets a frozen connection going again, after the one below: one that is
// resumed, or the very one that was frozen, if something would not stop. Run is
// to follow. What streams had kept is sent before what they write from now on.
func (h *Conn) Thaw() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.engine > 0 {
		h.window.Wait()
	}
	h.engine++ // for Run
	if h.err != nil || !h.frozen.Load() {
		return
	}
	h.ahead = &ahead{h.unread(), h.c}
	h.held = nil
	h.r.Reset(h.ahead)
	h.still = nil
	h.frozen.Store(false)
	var late []*Stream
	for _, s := range h.streams {
		if s.behind = len(s.unsent) > 0 || s.ending; s.behind {
			late = append(late, s)
		}
		if s.fresh {
			h.attendLocked(s)
		}
	}
	if len(late) > 0 {
		h.engine++
		go h.catchUp(late)
	}
}

// Handle goes on with a stream of a resumed connection in a goroutine that
// Stopped waits for.
func (h *Conn) Handle(s *Stream, handle func(*Stream)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.handlers++
	freezes := h.freezes
	go func() {
		defer h.leave(&h.handlers)
		handle(s)
		h.overUnlessFrozen(s, freezes)
	}()
}

// catchUp sends what streams had kept. It ends with it, or with the connection,
// or when that is frozen again.
func (h *Conn) catchUp(late []*Stream) {
	defer h.leave(&h.engine)
	b := frames.Get().(*framed)
	defer frames.Put(b)
	for len(late) > 0 {
		i, n := h.nextLate(late, b[Headroom:])
		if i < 0 {
			return
		}
		s := late[i]
		if n > 0 {
			h2frame.Put(b[:], n, h2frame.Data, 0, s.id)
			h.write(b[:Headroom+n]) // a fault ends the connection, which is seen next
		}
		if h.caughtUp(s) {
			late = slices.Delete(late, i, i+1)
		}
	}
}

// nextLate waits until one of the streams can go on, and takes what it can send.
func (h *Conn) nextLate(late []*Stream, b []byte) (i, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for h.err == nil && !h.frozen.Load() {
		for i, s := range late {
			if h.streams[s.id] != s || len(s.unsent) == 0 {
				return i, 0
			}
			if n := s.affordLocked(min(len(s.unsent), maxFrame)); n > 0 {
				copy(b, s.unsent[:n])
				s.unsent = s.unsent[n:]
				return i, n
			}
		}
		h.window.Wait()
	}
	return -1, 0
}

// caughtUp tells whether nothing of the stream is to be sent any more, and lets
// its writer go on.
func (h *Conn) caughtUp(s *Stream) bool {
	h.mu.Lock()
	gone := h.streams[s.id] != s
	if !gone && len(s.unsent) > 0 {
		h.mu.Unlock()
		return false
	}
	end := s.ending && !gone
	s.unsent, s.behind = nil, false
	h.window.Broadcast()
	h.mu.Unlock()
	if end {
		s.endOwn(true)
		h.mu.Lock()
		s.ending = false
		h.mu.Unlock()
	}
	return true
}

// Conn is the connection that carries the stream.
func (s *Stream) Conn() *Conn { return s.h }

// ID is the stream's number on its connection, by which it is found again.
func (s *Stream) ID() uint32 { return s.id }

// Answered tells whether this side has accepted or refused the request.
func (s *Stream) Answered() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.answered
}

// check says what is wrong with a state that comes from outside.
func (st *State) check(client bool) error {
	switch {
	case client && (!st.Prefaced || st.NextID%2 == 0 || st.NextID > 1<<30+2 || st.LastID != 0), !client && st.NextID != 2, st.LastID > h2frame.MaxWindow:
		return fmt.Errorf("stream ids %d, %d", st.NextID, st.LastID)
	case st.Send < 0 || st.Send > h2frame.MaxWindow || st.Initial < 0 || st.Initial > h2frame.MaxWindow || st.Received < 0 || st.Received > connWindow:
		return fmt.Errorf("windows of %d and %d with %d received", st.Send, st.Initial, st.Received)
	case st.Streams < 0 || st.Streams > MaxStreams:
		return fmt.Errorf("%d streams at most", st.Streams)
	case len(st.Unread) > maxHeld || len(st.Control) > maxControl:
		return fmt.Errorf("%d bytes unread and %d of control", len(st.Unread), len(st.Control))
	}
	open, seen := 0, map[uint32]bool{}
	for i := range st.Open {
		s := &st.Open[i]
		if s.ID%2 == 0 || seen[s.ID] || client && s.ID >= st.NextID || !client && s.ID > st.LastID {
			return fmt.Errorf("stream %d cannot be open", s.ID)
		}
		seen[s.ID] = true
		if !s.Past {
			open++
		}
		if err := s.check(client); err != nil {
			return fmt.Errorf("stream %d: %w", s.ID, err)
		}
	}
	if open > MaxStreams {
		return fmt.Errorf("%d streams", open)
	}
	return nil
}

func (st *StreamState) check(client bool) error {
	switch {
	case st.Window < -h2frame.MaxWindow || st.Window > h2frame.MaxWindow:
		return fmt.Errorf("window of %d", st.Window)
	case st.Credit < 0 || st.Unacked < 0 || st.Credit > streamWindow || st.Unacked > streamWindow || st.Credit+st.Unacked+len(st.Unread) > streamWindow:
		return fmt.Errorf("credit of %d, %d unread and %d read", st.Credit, len(st.Unread), st.Unacked)
	case len(st.Unsent) > MaxUnsent:
		return fmt.Errorf("%d bytes unsent", len(st.Unsent))
	case st.OwnEnded && (st.Ending || len(st.Unsent) > 0), st.Past && !(st.OwnEnded && st.PeerEnded), st.Told && !st.PeerEnded:
		return errors.New("its ends contradict each other")
	case client && (st.Fresh || st.Answered || len(st.Fields) > 0), !client && len(st.Status) > 0:
		return errors.New("the other side's words")
	case len(st.Fields) > maxFields || len(st.Authority) > maxBlock || len(st.Status) > maxBlock || len(st.Reason) > 512 || len(st.Malformed) > 512:
		return errors.New("too many words")
	}
	return nil
}
