package mesh

import (
	"errors"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/trace"
)

// Bounds of what following calls to their answers may cost.
const (
	maxCalls    = 512      // of one connection
	maxAllCalls = 16 << 10 // of all
	callTime    = time.Minute
)

// tracedCodec carries traces on in the calls that inspect has read.
type tracedCodec interface {
	rpcCodec
	// trace reads where the call stands in its trace.
	trace(perMille int) (trace.Call, error)
	// summed tells whether a sum follows, and renew renews it in the whole frame b.
	summed() bool
	renew(b []byte)
	// extend appends to dst the whole frame b with a trace that begins here.
	extend(dst, b []byte, c *trace.Call) ([]byte, error)
	// number is the id of the call.
	number() uint64
	// answered reads the frame that begins with b, of which measure knows the
	// size: answer tells whether it is one, to which call, and with which status.
	answered(b []byte) (id uint64, status int, well, answer bool)
}

func (c *boltCodec) trace(perMille int) (trace.Call, error) {
	return trace.OfBolt(c.frame.Header, perMille)
}
func (c *boltCodec) summed() bool   { return c.extent.CRC }
func (c *boltCodec) renew(b []byte) { bolt.SetID(b, c.extent, c.frame.ID) }
func (c *boltCodec) number() uint64 { return uint64(c.frame.ID) }

func (c *boltCodec) extend(dst, b []byte, t *trace.Call) ([]byte, error) {
	return bolt.Extend(dst, b, c.extent, t.ForBolt())
}

func (c *boltCodec) answered(b []byte) (id uint64, status int, well, answer bool) {
	f := bolt.Parse(b, c.extent)
	return uint64(f.ID), int(f.Status), f.Status == bolt.OK, f.Type == bolt.Response && f.Command != bolt.Heartbeat
}

var errNotWhole = errors.New("the frame is too long to look for a trace in")

func (c *dubboCodec) trace(perMille int) (trace.Call, error) {
	if dubbo.HeaderLen+len(c.frame.Body) < c.size {
		return trace.Call{}, errNotWhole
	}
	return trace.OfDubbo(&c.reader, &c.frame, perMille)
}
func (c *dubboCodec) summed() bool   { return false }
func (c *dubboCodec) renew([]byte)   {}
func (c *dubboCodec) number() uint64 { return c.frame.ID }

func (c *dubboCodec) extend(dst, b []byte, t *trace.Call) ([]byte, error) {
	return dubbo.Extend(dst, b, t.Attachments(), t.ForDubbo())
}

func (c *dubboCodec) answered(b []byte) (id uint64, status int, well, answer bool) {
	f := dubbo.Parse(b, dubbo.HeaderLen)
	return f.ID, int(f.Status), f.Status == dubbo.OK, dubbo.IsAnswer(b)
}

// calls are those of one connection that wait for their answers, to be told of
// with them.
type calls struct {
	open atomic.Int32 // so that nobody takes the lock who need not

	mu    sync.Mutex
	all   map[uint64]*note
	swept time.Time
}

// traces tells whether calls are to be looked at for their traces.
func (s *sight) traces() bool { return s != nil && s.tracing() != nil }

// carry carries the trace of a call on, whose frame of size bytes begins with b. It
// returns what is to be sent in its place, if that is a longer frame. Of what cannot
// be read, or has no room, nothing is changed. An error is one of the frame.
func (s *sight) carry(codec rpcCodec, n *note, b []byte, size int) (longer []byte, err error) {
	t := s.tracing()
	c, ok := codec.(tracedCodec)
	if t == nil || !ok {
		return nil, nil
	}
	call, err := c.trace(t.PerMille)
	if err != nil {
		s.o.untraced.Add(1)
		return nil, nil
	}
	s.believe(&call.Context, t)
	if !call.Known && !call.Sampled {
		return nil, nil // nobody would hear of it
	}
	if whole := len(b) >= size; !whole && (!call.Known || c.summed()) {
		s.o.untraced.Add(1)
		return nil, nil
	} else if whole && c.summed() {
		c.begin()
		if err := c.add(b[:size]); err != nil { // else it would be made right
			return nil, &frameError{err}
		}
	}
	if call.Known {
		if call.Rewrite() && c.summed() {
			c.renew(b[:size])
		}
	} else if longer, err = c.extend(s.room[:0], b[:size], &call); err != nil {
		s.o.untraced.Add(1)
		return nil, nil
	} else {
		s.room = longer
	}
	n.trace = &call.Context
	return longer, nil
}

// passes notes a call that goes on to its server, and carries its trace on.
func (s *sight) passes(codec rpcCodec, b []byte, size int, answer bool) (longer []byte, err error) {
	if s == nil {
		return nil, nil
	}
	s.counts.count(s.protocol, 0, "", verdictAllowed, 0)
	if s.o.taps.Load() == 0 && !s.logs() && s.tracing() == nil {
		return nil, nil
	}
	n := s.noteOf(codec) // before its frame is written into
	if longer, err = s.carry(codec, n, b, size); err != nil {
		return nil, err
	}
	if s.o.taps.Load() > 0 || s.logs() {
		s.log(n, s.request(n, verdictAllowed, 0, "", 0, s.verdict.reason))
	}
	if s.exports(n) == nil {
		return longer, nil
	}
	if c := codec.(tracedCodec); !answer || !s.wait(c.number(), n) {
		s.span(n, "", false, "")
	}
	return longer, nil
}

// noteOf is a note of the call that the codec has read and the verdict was on.
func (s *sight) noteOf(codec rpcCodec) *note {
	c := s.call
	if !c.rpc {
		c.remote, _ = codec.target() // empty if it cannot be told
	}
	cut := func(b []byte, most int) string { return string(b[:min(len(b), most)]) }
	return &note{begin: time.Now(), method: cut(c.remote.method, maxMethod), path: cut(c.remote.service, maxPath), rule: s.verdict.rule}
}

// fails notes a call that was answered here: refused, or allowed and answered here.
func (s *sight) fails(codec rpcCodec, verdict int, reason string) {
	if s == nil {
		return
	}
	s.counts.count(s.protocol, 0, "", verdict, 0)
	if s.o.taps.Load() > 0 || s.logs() {
		n := s.noteOf(codec)
		s.log(n, s.request(n, verdict, 0, "", 0, reason))
	}
}

// wait keeps a note until the answer with that id is there. It is false if there is
// no room.
func (s *sight) wait(id uint64, n *note) bool {
	k := &s.calls
	k.mu.Lock()
	defer k.mu.Unlock()
	if len(k.all) >= maxCalls && n.begin.Sub(k.swept) > time.Second {
		k.swept = n.begin
		s.giveUpLocked(n.begin.Add(-callTime), "no answer within "+callTime.String())
	}
	full := len(k.all) >= maxCalls
	if !full && s.o.waiting.Add(1) > maxAllCalls {
		s.o.waiting.Add(-1)
		full = true
	}
	if full {
		s.o.untraced.Add(1)
		return false
	}
	if old := k.all[id]; old != nil {
		s.forgetLocked(id)
		s.span(old, "", true, "its id was used again")
	}
	if k.all == nil {
		k.all = map[uint64]*note{}
	}
	k.all[id] = n
	k.open.Add(1)
	return true
}

func (s *sight) forgetLocked(id uint64) {
	delete(s.calls.all, id)
	s.calls.open.Add(-1)
	s.o.waiting.Add(-1)
}

// giveUpLocked tells of calls that began before a time and have no answer.
func (s *sight) giveUpLocked(before time.Time, why string) {
	for id, n := range s.calls.all {
		if n.begin.Before(before) {
			s.forgetLocked(id)
			s.span(n, "", true, why)
		}
	}
}

// answer notes the answer that begins with b, if that is one.
func (s *sight) answer(codec rpcCodec, b []byte) {
	if s.calls.open.Load() == 0 {
		return
	}
	c, ok := codec.(tracedCodec)
	if !ok {
		return
	}
	id, status, well, ok := c.answered(b)
	if !ok {
		return
	}
	s.calls.mu.Lock()
	n := s.calls.all[id]
	if n != nil {
		s.forgetLocked(id)
	}
	s.calls.mu.Unlock()
	if n != nil {
		s.span(n, strconv.Itoa(status), !well, "")
	}
}

// gone tells of the calls of a connection that has ended without their answers.
func (s *sight) gone() {
	s.calls.mu.Lock()
	defer s.calls.mu.Unlock()
	s.giveUpLocked(time.Now().Add(time.Hour), "the connection ended before the answer")
}

// held takes the calls that wait, for another process.
func (s *sight) held() (all map[uint64]*noteState) {
	s.calls.mu.Lock()
	defer s.calls.mu.Unlock()
	for id, n := range s.calls.all {
		if all == nil {
			all = map[uint64]*noteState{}
		}
		all[id] = n.state()
		s.forgetLocked(id)
	}
	return all
}

// hold goes on waiting for what another process waited for.
func (s *sight) hold(all map[uint64]*noteState) {
	for id, state := range all {
		if n := state.note(); n.trace != nil {
			s.wait(id, &n)
		}
	}
}

// exports is who is told of a request, nil for nobody.
func (s *sight) exports(n *note) *trace.Exporter {
	if now := s.o.now.Load(); now != nil && n.trace != nil && n.trace.Sampled {
		return now.exporter
	}
	return nil
}

// span tells of a call that is over.
func (s *sight) span(n *note, status string, failed bool, why string) {
	to := s.exports(n)
	if to == nil {
		return
	}
	facts := s.a.sb.facts.Load()
	to.Add(trace.Hop{Context: *n.trace, Name: strings.TrimSpace(n.method + " " + s.service), Begin: n.begin, End: time.Now(), Failed: failed,
		Attributes: [][2]string{{"rpc.system", s.protocol}, {"rpc.service", n.path}, {"rpc.method", n.method}, {"rpc.response.status_code", status}, {"hauberk.why", why},
			{"hauberk.service", s.service}, {"hauberk.instance", facts.Instance}, {"hauberk.peer", s.a.who.peerIdentity}, {"hauberk.verdict", verdictNames[verdictAllowed]},
			{"hauberk.rule", n.rule}, {"sofa.trace_id", n.trace.SofaTrace}, {"sofa.rpc_id", n.trace.SofaSpan}}})
}
