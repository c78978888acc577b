package http2

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"time"

	"hauberk.dev/mesh/h2frame"
	"hauberk.dev/mesh/wire"
)

// ErrFrozen is what Run returns of a connection that was frozen.
var ErrFrozen = wire.ErrFrozen

// readSize holds the largest frame with its header.
const readSize = maxFrame + h2frame.HeaderLen

// What of the peer's greeting has come.
const (
	begunPreface  = 1 // a client's
	begunSettings = 2
)

// Freeze stops the connection as it is; the peer is told nothing. Run returns
// ErrFrozen once nothing moves any more, which wants the transport to be frozen
// too: its Read is to return an error that is wire.ErrFrozen, its Write is not to
// wait and not to fail. Save then reads the connection out. If the connection was
// ending, and its peer had no more time to read, Run returns what it always does,
// and there is nothing to save.
func (c *Conn) Freeze() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.frozen {
		return
	}
	c.frozen = true
	close(c.frost)
	for _, t := range []*time.Timer{c.pulsing, c.linger} {
		if t != nil {
			t.Stop()
		}
	}
}

func (c *Conn) isFrozen() bool {
	select {
	case <-c.frost:
		return true
	default:
		return false
	}
}

// rests tells whether a frozen connection goes on when it is resumed. The writer
// and the reader have ended.
func (c *Conn) rests() bool {
	c.mu.Lock()
	rests := c.frozen && (c.err == nil || c.farewell)
	c.mu.Unlock()
	if rests {
		c.busy.Wait()
	}
	return rests
}

// stop freezes or ends the connection for what reading it has returned.
func (c *Conn) stop(err error) {
	if errors.Is(err, wire.ErrFrozen) {
		c.Freeze()
		return
	}
	c.end(err)
}

// endUnlessFrozen ends a connection for a reason that waits, if need be, until it
// is resumed.
func (c *Conn) endUnlessFrozen(err error) {
	c.mu.Lock()
	if c.frozen {
		c.closing = c.closing || err == ErrClosed
		c.mu.Unlock()
		return
	}
	c.busy.Add(1)
	defer c.busy.Done()
	c.endLocked(err)
}

// giveUp ends the moment a peer has to read the last frames.
func (c *Conn) giveUp() {
	c.mu.Lock()
	if c.frozen {
		c.mu.Unlock()
		return
	}
	c.farewell = false
	c.busy.Add(1)
	defer c.busy.Done()
	c.mu.Unlock()
	c.t.Abort()
}

// shutdown ends this side's half, when all is written.
func (c *Conn) shutdown() {
	c.mu.Lock()
	shut := c.shut
	c.shut = true
	c.mu.Unlock()
	if !shut {
		c.t.CloseWrite()
	}
}

// readAhead gives first what was read before the connection was resumed.
type readAhead struct {
	t io.Reader
	b []byte
}

func (a *readAhead) Read(p []byte) (int, error) {
	if len(a.b) == 0 {
		return a.t.Read(p)
	}
	n := copy(p, a.b)
	if a.b = a.b[n:]; len(a.b) == 0 {
		a.b = nil
	}
	return n, nil
}

// part is what was left of a frame or a header block when reading stopped.
type part struct {
	data *Stream // takes the next n bytes, with which it may end
	n    int
	end  bool
	skip int // bytes after those that nobody takes
	// frames is set for a header block that was begun; Conn.block holds it.
	head   h2frame.Header
	self   bool
	frames int
}

// goOn reads the rest of a frame that was begun before the connection was
// resumed.
func (c *Conn) goOn() error {
	p := c.part
	c.part = part{}
	if p == (part{}) {
		return nil
	}
	c.mid.Store(true)
	var err error
	switch {
	case p.frames > 0:
		err = c.continued(p.head, p.self, p.frames)
	case p.data != nil:
		err = c.passData(p.data, p.n, p.skip, p.end)
	default:
		err = c.discard(p.skip)
	}
	if err = c.stand(err); err != nil {
		return err
	}
	c.mid.Store(false)
	c.stage.Add(1)
	return nil
}

// State is a group of frozen connections whose streams are each other's mates. It
// is plain data that goes through JSON and that only Resume reads.
type State struct {
	Conns   []connState   `json:"conns"`
	Streams []streamState `json:"streams,omitempty"`
}

// connState is one connection. Streams are named by their place in State.
type connState struct {
	Client  bool       `json:"client,omitempty"`
	Started bool       `json:"started,omitempty"` // Run has greeted the peer
	Begun   uint8      `json:"begun,omitempty"`
	Greeted bool       `json:"greeted,omitempty"`
	Unread  []byte     `json:"unread,omitempty"`
	Part    *partState `json:"part,omitempty"`
	Out     []byte     `json:"out,omitempty"`
	Answers int        `json:"answers,omitempty"`

	// The table of the decoder, oldest first, and how large it may be. That of
	// the encoder is not kept, as a decoder can be told to empty its own.
	Table    []h2frame.Field `json:"table,omitempty"`
	TableMax uint32          `json:"tableMax"`
	Encoder  uint32          `json:"encoder"`

	Cheap   allowanceState `json:"cheap"`
	Resets  allowanceState `json:"resets"`
	Updates allowanceState `json:"updates"`
	Frames  uint64         `json:"frames,omitempty"`
	Sent    uint64         `json:"sent,omitempty"`
	Paid    uint64         `json:"paid,omitempty"`
	Empty   int            `json:"empty,omitempty"`
	Well    int            `json:"well,omitempty"`

	Window  int64 `json:"window"`
	Credit  int64 `json:"credit"`
	Owed    int64 `json:"owed,omitempty"`
	Initial int64 `json:"initial"`
	Most    int   `json:"most"`

	NextID   uint32        `json:"nextID,omitempty"`
	LastID   uint32        `json:"lastID,omitempty"`
	Taken    uint32        `json:"taken,omitempty"`
	Draining bool          `json:"draining,omitempty"`
	Ended    []endingState `json:"ended,omitempty"` // oldest first

	Ready   []int `json:"ready,omitempty"`
	Waiting []int `json:"waiting,omitempty"`
	Blocked []int `json:"blocked,omitempty"`

	End     *endState `json:"end,omitempty"` // the peer has been told, and reads
	Closing bool      `json:"closing,omitempty"`
}

type partState struct {
	Data   int    `json:"data"` // -1 if it is none
	N      int    `json:"n,omitempty"`
	End    bool   `json:"end,omitempty"`
	Skip   int    `json:"skip,omitempty"`
	Stream uint32 `json:"stream,omitempty"`
	Flags  byte   `json:"flags,omitempty"`
	Self   bool   `json:"self,omitempty"`
	Frames int    `json:"frames,omitempty"`
	Block  []byte `json:"block,omitempty"`
}

// fieldState is a Field, whose bytes need not be text.
type fieldState struct {
	Name      []byte `json:"n"`
	Value     []byte `json:"v"`
	Sensitive bool   `json:"s,omitempty"`
}

type allowanceState struct {
	Left int           `json:"left"`
	Ago  time.Duration `json:"ago,omitempty"` // since it grew, 0 if it never had to
}

type endingState struct {
	ID  uint32  `json:"id"`
	How endKind `json:"how"`
}

// endState is why a connection has ended: a fault of the peer if Code is set.
type endState struct {
	Drained bool   `json:"drained,omitempty"`
	Code    Code   `json:"code,omitempty"`
	Why     string `json:"why,omitempty"`
	Shut    bool   `json:"shut,omitempty"`
}

type streamState struct {
	Conn  int             `json:"conn"` // -1 if that has ended
	ID    uint32          `json:"id,omitempty"`
	Mate  int             `json:"mate"` // -1 if it has none
	Value json.RawMessage `json:"value,omitempty"`

	Declared int64 `json:"declared"`
	Got      int64 `json:"got,omitempty"`
	Answered bool  `json:"answered,omitempty"`
	Bodyless bool  `json:"bodyless,omitempty"`
	IsHead   bool  `json:"isHead,omitempty"`

	Window    int64          `json:"window"`
	Credit    int64          `json:"credit"`
	Owed      int64          `json:"owed,omitempty"`
	Heads     [][]fieldState `json:"heads,omitempty"`
	Data      []byte         `json:"data,omitempty"`
	Trailers  []fieldState   `json:"trailers"` // nil and empty differ
	Begun     bool           `json:"begun,omitempty"`
	Finishing bool           `json:"finishing,omitempty"`
	Stopping  bool           `json:"stopping,omitempty"`
	StopCode  Code           `json:"stopCode,omitempty"`
	Ended     bool           `json:"ended,omitempty"`
	PeerEnded bool           `json:"peerEnded,omitempty"`
	Over      bool           `json:"over,omitempty"`
	HeadBytes int            `json:"headBytes,omitempty"`
}

// Save reads out connections of which Run has returned ErrFrozen, or was not
// called since Freeze. The mates of their streams are to be among them, and no
// stream may be one that its owner reads and writes (Receive, Ask). value
// turns a Stream's Value into JSON; it may be nil if none has one. The
// connections are not to be used any more.
func Save(conns []*Conn, value func(*Stream) (json.RawMessage, error)) (*State, error) {
	v := &saver{conns: map[*Conn]int{}, streams: map[*Stream]int{}, value: value}
	for i, c := range conns {
		c.mu.Lock()
		c.unlock() // credits go to where they are owed
		v.conns[c] = i
	}
	for i, c := range conns {
		if err := v.conn(c); err != nil {
			return nil, fmt.Errorf("save connection %d: %w", i, err)
		}
	}
	for i := 0; i < len(v.order); i++ { // grows by the mates
		if err := v.stream(v.order[i]); err != nil {
			return nil, fmt.Errorf("save stream %d: %w", v.order[i].id, err)
		}
	}
	return &v.state, nil
}

type saver struct {
	state   State
	conns   map[*Conn]int
	streams map[*Stream]int
	order   []*Stream
	value   func(*Stream) (json.RawMessage, error)
}

// index is the place of a stream, -1 for none.
func (v *saver) index(s *Stream) int {
	if s == nil {
		return -1
	}
	i, ok := v.streams[s]
	if !ok {
		i = len(v.order)
		v.streams[s] = i
		v.order = append(v.order, s)
	}
	return i
}

func (v *saver) line(l *line) (all []int) {
	for s := l.first; s != nil; s = s.next {
		all = append(all, v.index(s))
	}
	return all
}

func (v *saver) conn(c *Conn) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case !c.frozen:
		return errors.New("it is not frozen")
	case c.err != nil && !c.farewell:
		return fmt.Errorf("it has ended: %w", c.err)
	}
	for _, id := range slices.Sorted(maps.Keys(c.streams)) {
		v.index(c.streams[id])
	}
	ahead, _ := c.r.Peek(c.r.Buffered())
	s := connState{
		Client: c.client, Started: c.started, Begun: c.begun, Greeted: c.greeted,
		Unread: append(slices.Clone(ahead), c.ahead.b...), Part: v.part(c),
		Out: slices.Clone(c.out), Answers: c.answers,
		Encoder: c.encoder.MaxDynamicTableSize(),
		Cheap:   c.cheap.save(), Resets: c.resets.save(), Updates: c.updates.save(),
		Frames: c.frames, Sent: c.sent, Paid: c.paid, Empty: c.empty, Well: c.well,
		Window: c.window, Credit: c.credit, Owed: c.owed, Initial: c.initial, Most: c.most,
		NextID: c.nextID, LastID: c.lastID, Taken: c.taken, Draining: c.draining,
		Ready: v.line(&c.ready), Waiting: v.line(&c.waiting), Blocked: v.line(&c.blocked),
		End: saveEnd(c), Closing: c.closing,
	}
	s.Table, s.TableMax = h2frame.Table(c.decode.decoder)
	for i := range c.ended {
		if e := c.ended[(c.endedAt+i)%rememberEnded]; e.id != 0 {
			s.Ended = append(s.Ended, endingState{e.id, e.how})
		}
	}
	v.state.Conns = append(v.state.Conns, s)
	return nil
}

func (v *saver) part(c *Conn) *partState {
	p := c.part
	if p == (part{}) {
		return nil
	}
	s := &partState{Data: v.index(p.data), N: p.n, End: p.end, Skip: p.skip, Stream: p.head.Stream, Flags: p.head.Flags, Self: p.self, Frames: p.frames}
	if p.frames > 0 {
		s.Block = slices.Clone(c.block)
	}
	return s
}

func saveEnd(c *Conn) *endState {
	if c.err == nil {
		return nil
	}
	e := &endState{Drained: c.err == errDrained, Shut: c.shut}
	var ce *h2frame.Error
	if errors.As(c.err, &ce) {
		e.Code, e.Why = ce.Code, ce.Why
	}
	return e
}

func (v *saver) stream(s *Stream) error {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	conn, known := v.conns[s.c]
	if !known {
		if conn = -1; !s.over {
			return errors.New("its connection is not among those to save")
		}
	}
	if s.sink != nil && !s.over {
		return errors.New("its owner reads and writes it, and only mates are saved")
	}
	t := streamState{
		Conn: conn, ID: s.id, Mate: v.index(s.mate.Load()),
		Declared: s.declared, Got: s.got, Answered: s.answered, Bodyless: s.bodyless, IsHead: s.isHead,
		Window: s.window, Credit: s.credit, Owed: s.owed, Trailers: saveFields(s.trailers),
		Begun: s.begun, Finishing: s.finishing, Stopping: s.stopping, StopCode: s.stopCode,
		Ended: s.ended, PeerEnded: s.peerEnded, Over: s.over, HeadBytes: s.headBytes,
	}
	for _, h := range s.heads {
		t.Heads = append(t.Heads, saveFields(h))
	}
	for _, k := range s.chunks {
		t.Data = append(t.Data, k.buf[k.from:k.to]...)
	}
	if s.Value != nil {
		if v.value == nil {
			return errors.New("it has a value, and nobody saves it")
		}
		var err error
		if t.Value, err = v.value(s); err != nil {
			return err
		}
	}
	v.state.Streams = append(v.state.Streams, t)
	return nil
}

func saveFields(fields []Field) []fieldState {
	if fields == nil {
		return nil
	}
	all := make([]fieldState, len(fields))
	for i, f := range fields {
		all[i] = fieldState{[]byte(f.Name), []byte(f.Value), f.Sensitive}
	}
	return all
}

func resumeFields(saved []fieldState) []Field {
	if saved == nil {
		return nil
	}
	all := make([]Field, len(saved))
	for i, f := range saved {
		all[i] = Field{Name: string(f.Name), Value: string(f.Value), Sensitive: f.Sensitive}
	}
	return all
}

func (a *allowance) save() allowanceState {
	s := allowanceState{Left: a.left}
	if !a.at.IsZero() {
		s.Ago = max(time.Since(a.at), 1)
	}
	return s
}

func (a *allowance) resume(s allowanceState) {
	if a.left = s.Left; s.Ago > 0 {
		a.at = time.Now().Add(-s.Ago)
	}
}

// Resume makes connections of a State: transports[i] and options(i) are those of
// the i-th that was saved, and value is the reverse of Save's. It reads and writes
// nothing; each connection goes on when its Run is called, and may be frozen again
// before.
func Resume(s *State, transports []Transport, options func(i int) Options, value func(json.RawMessage) (any, error)) ([]*Conn, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	if len(transports) != len(s.Conns) {
		return nil, fmt.Errorf("resume %d connections: there are %d transports", len(s.Conns), len(transports))
	}
	conns := make([]*Conn, len(s.Conns))
	for i := range conns {
		c := newConn(transports[i], s.Conns[i].Client, options(i))
		if err := c.resume(&s.Conns[i]); err != nil {
			return nil, fmt.Errorf("resume connection %d: %w", i, err)
		}
		conns[i] = c
	}
	gone := &Conn{err: ErrClosed} // for streams that are over with theirs
	streams := make([]*Stream, len(s.Streams))
	for i := range streams {
		t := &s.Streams[i]
		c := gone
		if t.Conn >= 0 {
			c = conns[t.Conn]
		}
		streams[i] = t.resume(c)
		if len(t.Value) > 0 {
			if value == nil {
				return nil, fmt.Errorf("resume stream %d: it has a value, and nobody takes it", t.ID)
			}
			var err error
			if streams[i].Value, err = value(t.Value); err != nil {
				return nil, fmt.Errorf("resume stream %d: %w", t.ID, err)
			}
		}
	}
	for i, m := range streams {
		if mate := s.Streams[i].Mate; mate >= 0 {
			m.mate.Store(streams[mate])
			streams[mate].c.held += int64(m.held)
		}
	}
	for i, c := range conns {
		c.resumeLines(&s.Conns[i], streams)
	}
	return conns, nil
}

// resume takes over all but what has to do with streams.
func (c *Conn) resume(s *connState) error {
	c.started, c.begun, c.greeted = s.Started, s.Begun, s.Greeted
	c.ahead.b = s.Unread
	if len(s.Out) > 0 {
		c.out = append(takeBuffer(), s.Out...)
	}
	c.answers = s.Answers
	if err := h2frame.SetTable(c.decode.decoder, s.Table, s.TableMax); err != nil {
		return err
	}
	c.encoder.SetMaxDynamicTableSizeLimit(s.Encoder)
	if s.Started { // RFC 7541, 4.2: the peer empties its table
		c.encoder.SetMaxDynamicTableSize(0)
		c.encoder.SetMaxDynamicTableSize(s.Encoder)
	}
	c.cheap.resume(s.Cheap)
	c.resets.resume(s.Resets)
	c.updates.resume(s.Updates)
	c.frames, c.sent, c.paid, c.empty, c.well = s.Frames, s.Sent, s.Paid, s.Empty, s.Well
	c.window, c.credit, c.owed, c.initial, c.most = s.Window, s.Credit, s.Owed, s.Initial, s.Most
	c.nextID, c.lastID, c.taken, c.draining = s.NextID, s.LastID, s.Taken, s.Draining
	for _, e := range s.Ended {
		c.ended[c.endedAt%rememberEnded] = ending{e.ID, e.How}
		c.endedAt++
	}
	c.closing = s.Closing
	if e := s.End; e != nil {
		switch {
		case e.Drained:
			c.err = errDrained
		case e.Code != h2frame.CodeNone || e.Why != "":
			c.err = &h2frame.Error{Code: e.Code, Why: e.Why}
		default:
			c.err = errGone
		}
		c.farewell, c.shut = true, e.Shut
		close(c.done)
	}
	return nil
}

func (t *streamState) resume(c *Conn) *Stream {
	s := &Stream{
		c: c, id: t.ID, declared: t.Declared, got: t.Got, answered: t.Answered, bodyless: t.Bodyless, isHead: t.IsHead,
		window: t.Window, credit: t.Credit, owed: t.Owed, trailers: resumeFields(t.Trailers),
		begun: t.Begun, finishing: t.Finishing, stopping: t.Stopping, stopCode: t.StopCode,
		ended: t.Ended, peerEnded: t.PeerEnded, over: t.Over, headBytes: t.HeadBytes,
	}
	for _, h := range t.Heads {
		s.heads = append(s.heads, resumeFields(h))
	}
	s.hold(t.Data)
	if !s.over {
		c.heads += s.headBytes
		if s.id != 0 {
			c.streams[s.id] = s
		}
	}
	return s
}

// resumeLines gives streams their places, and a frame its rest.
func (c *Conn) resumeLines(s *connState, streams []*Stream) {
	for _, i := range s.Ready {
		c.ready.push(streams[i])
	}
	for _, i := range s.Waiting {
		c.waiting.push(streams[i])
	}
	for _, i := range s.Blocked {
		c.blocked.push(streams[i])
	}
	p := s.Part
	if p == nil {
		return
	}
	c.part = part{n: p.N, end: p.End, skip: p.Skip, self: p.Self, frames: p.Frames}
	if p.Data >= 0 {
		c.part.data = streams[p.Data]
		c.held += int64(p.N)
	}
	if p.Frames > 0 {
		c.part.head = h2frame.Header{Kind: h2frame.Headers, Stream: p.Stream, Flags: p.Flags}
		c.block = p.Block
	}
}
