package http2

import (
	"encoding/json"
	"fmt"
	"time"

	"hauberk.dev/mesh/h2frame"
)

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
