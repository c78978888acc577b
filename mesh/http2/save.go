package http2

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"hauberk.dev/mesh/h2frame"
)

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

func (a *allowance) save() allowanceState {
	s := allowanceState{Left: a.left}
	if !a.at.IsZero() {
		s.Ago = max(time.Since(a.at), 1)
	}
	return s
}
