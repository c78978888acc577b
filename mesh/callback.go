package mesh

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hbone"
)

const (
	frameHead  = 32        // more than the fixed part of a frame of bolt or Dubbo
	maxAnswers = 256 << 10 // bytes of refusals that wait for the client to end its frame
)

// callbackCodec is that of a protocol whose servers ask over the connections of
// their clients, else nil.
func callbackCodec(protocol string) rpcCodec {
	switch protocol {
	case "bolt", "dubbo":
		return newCodec(protocol)
	}
	return nil
}

// callbacks judges, at the client's node, what servers ask over a connection that
// the client has made. Nothing else is held up or copied: of the rest only where
// frames begin is followed, so that a refusal stands between two of the client's.
type callbacks struct {
	client *calledSide
	server *callingSide
}

// callbacksState is a frozen callbacks as plain data.
type callbacksState struct {
	Source netip.AddrPort `json:"source,omitzero"` // the endpoint that asks
	// Of what the server says: bytes that are not decided on, and how much is to
	// come of the frame that is.
	Held     []byte `json:"held,omitempty"`
	Left     int    `json:"left,omitempty"`
	Dropping bool   `json:"dropping,omitempty"`
	// Of what the client says: the beginning of a frame of which the size is not
	// known yet, how much is to come of one, that nobody can tell any more, and
	// what is to be said after it.
	Head    []byte `json:"head,omitempty"`
	Rest    int    `json:"rest,omitempty"`
	Lost    bool   `json:"lost,omitempty"`
	Answers []byte `json:"answers,omitempty"`
}

// check refuses what no callbacks can have come to.
func (s *callbacksState) check() error {
	if s.Left < 0 || s.Rest < 0 || s.Left > 1<<31 || s.Rest > 1<<31 || len(s.Head) > frameHead || len(s.Answers) > maxAnswers ||
		len(s.Held) > dubbo.HeaderLen+dubboLook || len(s.Held) > 0 && s.Left > 0 {
		return fmt.Errorf("callbacks with %d bytes held, %d and %d to come, %d of a head and %d of answers", len(s.Held), s.Left, s.Rest, len(s.Head), len(s.Answers))
	}
	return nil
}

// callbackRules is who decides, and who is told.
type callbackRules struct {
	judge     func(rpcCodec) (fault, string)
	reserve   func(bytes int) bool
	malformed func(error)
}

// newCallbacks goes on where from says. over tells that the client has ended its
// half.
func newCallbacks(protocol string, client, server side, r callbackRules, from callbacksState, over bool) *callbacks {
	s := &callingSide{side: server, over: over, answers: from.Answers}
	s.said = follower{codec: callbackCodec(protocol), left: from.Rest, lost: from.Lost}
	s.said.n = copy(s.said.head[:], from.Head)
	s.waits.Store(len(s.answers) > 0)
	c := &calledSide{side: client, server: s, callbackRules: r, codec: callbackCodec(protocol), left: from.Left, dropping: from.Dropping}
	c.resume(from.Held)
	return &callbacks{c, s}
}

// state is where it stands once nothing moves any more.
func (c *callbacks) state() *callbacksState {
	s, d := &c.server.said, c.client
	return &callbacksState{Held: slices.Clone(d.held), Left: d.left, Dropping: d.dropping, Head: slices.Clone(s.head[:s.n]), Rest: s.left, Lost: s.lost,
		Answers: slices.Clone(c.server.answers)}
}

// stop waits for a refusal that is being written, and gives back what is reserved.
// Both sides have ended, or are frozen.
func (c *callbacks) stop() {
	c.server.telling.Wait()
	c.client.release()
}

// calledSide is the client: what is written to it was said by the server.
type calledSide struct {
	side
	callbackRules
	server *callingSide
	codec  rpcCodec

	left     int  // of the frame decided on, to come
	dropping bool // that frame
	// held is the beginning of a frame: of a request of which want bytes are needed
	// to judge it, or a part of a head.
	held     []byte
	want     int
	reserved int
	slow     *time.Timer // a request has its time to come
	head     [frameHead]byte
}

func (s *calledSide) resume(held []byte) {
	s.held = held
	if len(held) == 0 || len(held) < frameHead && s.needs(held) == 0 {
		return
	}
	s.await(max(s.needs(held), 1))
}

// needs is how many bytes it takes to judge the request that begins with b, 0 if
// that cannot be told yet or never.
func (s *calledSide) needs(b []byte) int {
	size, look, err := s.codec.measure(b, true)
	if err != nil || size == 0 {
		return 0
	}
	if look > frameHold && !s.reserveFor(look) {
		_, look, _ = s.codec.measure(b, false) // others hold too much: it is judged by its head
	}
	return look
}

func (s *calledSide) reserveFor(n int) bool {
	if n > s.reserved {
		if !s.reserve(n - s.reserved) {
			return false
		}
		s.reserved = n
	}
	return true
}

// release lets go of what was held.
func (s *calledSide) release() {
	if s.slow != nil {
		s.slow.Stop()
	}
	if s.reserved > 0 {
		s.reserve(-s.reserved)
		s.reserved = 0
	}
}

// Write passes on what the server says, but for requests that are refused.
func (s *calledSide) Write(p []byte) (n int, err error) {
	n = len(p)
	for len(p) > 0 && err == nil {
		if len(s.held) == 0 {
			err = s.pass(p)
			break
		}
		p, err = s.gather(p)
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// CloseWrite ends what the server says, unless that is in the middle of a frame:
// the rest is not to be taken for complete.
func (s *calledSide) CloseWrite() error {
	if s.left > 0 || len(s.held) > 0 {
		return s.broken(errors.New("the server ended in the middle of a frame"))
	}
	return s.side.CloseWrite()
}

func (s *calledSide) broken(err error) error {
	s.malformed(err)
	return err
}

// pass passes all of p on, up to a frame that must be held.
func (s *calledSide) pass(p []byte) error {
	from, at := 0, 0
	for at < len(p) {
		if s.left > 0 {
			n := min(s.left, len(p)-at)
			s.left -= n
			if at += n; s.dropping {
				from = at
			}
			continue
		}
		b := p[at:]
		size, _, err := s.codec.measure(b, false)
		if err == nil && size > 0 && !s.codec.asks(b) {
			s.left, s.dropping = size, false
			continue
		}
		if werr := s.on(p[from:at]); werr != nil {
			return werr
		}
		from = at
		switch {
		case err != nil:
			return s.broken(fmt.Errorf("the server's answer: %w", err))
		case size == 0:
			s.held = append(s.head[:0], b...)
			return nil
		}
		if need := s.needs(b); need > len(b) {
			s.held = append(make([]byte, 0, need), b...)
			s.await(need)
			return nil
		}
		if err := s.decide(b, size); err != nil {
			return err
		}
	}
	return s.on(p[from:at])
}

func (s *calledSide) on(p []byte) error {
	if len(p) == 0 {
		return nil
	}
	_, err := s.side.Write(p)
	return err
}

// await has the request that is held come within its time.
func (s *calledSide) await(need int) {
	s.want = need
	if s.slow == nil {
		s.slow = time.AfterFunc(headTimeout, func() { s.abort(); s.server.abort() })
	} else {
		s.slow.Reset(headTimeout)
	}
}

// gather joins what is held with what comes, and returns what is left of that.
func (s *calledSide) gather(p []byte) (rest []byte, err error) {
	if s.want == 0 {
		b := buffers.Get().(*buffer)
		defer buffers.Put(b)
		n := copy(b[:], s.held)
		s.held = nil
		k := copy(b[n:], p)
		return p[k:], s.pass(b[:n+k])
	}
	n := max(0, min(s.want-len(s.held), len(p)))
	s.held = append(s.held, p[:n]...)
	if len(s.held) < s.want {
		return nil, nil
	}
	whole := s.held
	s.held, s.want = nil, 0
	s.slow.Stop()
	return p[n:], s.pass(whole)
}

// decide judges the request at the beginning of b.
func (s *calledSide) decide(b []byte, size int) error {
	defer s.release()
	kind, answer, err := s.codec.inspect(b, size)
	if err != nil {
		return s.broken(fmt.Errorf("the server's request: %w", err))
	}
	s.left, s.dropping = size, false
	if kind != rpcCall {
		return nil
	}
	f, text := s.judge(s.codec)
	if text == "" {
		return nil
	}
	if s.dropping = true; answer {
		s.server.answer(s.codec.refuse(nil, f, text))
	}
	return nil
}

// framedWriter is a side that sends without copying, with room before the data.
type framedWriter interface {
	WriteFramed([]byte) (int, error)
}

// callingSide is the server: what is written to it is said by the client, and now
// and then by us.
type callingSide struct {
	side
	mu   sync.Mutex // held while something is written
	said follower   // under mu
	over bool       // under mu: the client's half has ended, so is ours

	waits   atomic.Bool // there are answers
	amu     sync.Mutex  // held for moments
	answers []byte      // under amu
	asked   bool        // under amu: tell is on its way
	telling sync.WaitGroup
}

// WriteTo is what pump looks for: it spares a copy.
func (s *callingSide) WriteTo(w io.Writer) (int64, error) {
	if from, ok := s.side.(io.WriterTo); ok {
		return from.WriteTo(w)
	}
	return io.Copy(w, struct{ io.Reader }{s.side})
}

// Write is for who has no room before the data; pump has.
func (s *callingSide) Write(p []byte) (int, error) {
	return s.WriteFramed(append(make([]byte, hbone.Headroom, hbone.Headroom+len(p)), p...))
}

// WriteFramed passes on what the client says. If something of ours waits, it is
// said at the end of a frame.
func (s *callingSide) WriteFramed(b []byte) (sent int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for err == nil && len(b) > hbone.Headroom {
		if err = s.sayBetweenLocked(); err != nil {
			break
		}
		n, k := s.said.follow(b[hbone.Headroom:], s.waits.Load()), 0
		k, err = s.send(b[:hbone.Headroom+n])
		sent += k
		b = b[n:] // the room before the rest is in what has been sent
	}
	if err == nil {
		err = s.sayBetweenLocked()
	}
	return sent, err
}

func (s *callingSide) send(b []byte) (int, error) {
	if f, ok := s.side.(framedWriter); ok {
		return f.WriteFramed(b)
	}
	return s.side.Write(b[hbone.Headroom:])
}

// CloseWrite ends what the client says. Who asks after that gets no answer.
func (s *callingSide) CloseWrite() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.sayBetweenLocked(); err != nil {
		return err
	}
	s.over = true
	return s.side.CloseWrite()
}

// answer has the server told something between two frames of the client. It never
// waits: who moves what the server says must go on doing that, or the server may
// never come to read. What there is no room for is not said; the server takes its
// request for lost when its time is up.
func (s *callingSide) answer(b []byte) {
	s.amu.Lock()
	defer s.amu.Unlock()
	if len(s.answers)+len(b) > maxAnswers {
		return
	}
	s.answers = append(s.answers, b...)
	s.waits.Store(true)
	if !s.asked {
		s.asked = true
		s.telling.Go(s.tell)
	}
}

// tell says what waits, unless the client is in the middle of a frame: then it is
// said after that. It ends with its write, which the end of the connection ends.
func (s *callingSide) tell() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.amu.Lock()
	s.asked = false
	s.amu.Unlock()
	s.sayBetweenLocked() // who moves the bytes learns how that ended
}

// sayBetweenLocked writes what waits, unless the client is in the middle of a frame.
func (s *callingSide) sayBetweenLocked() error {
	if !s.waits.Load() || !s.said.between() {
		return nil
	}
	s.amu.Lock()
	b := s.answers
	s.answers = nil
	s.waits.Store(false)
	s.amu.Unlock()
	if len(b) == 0 || s.over {
		return nil
	}
	_, err := s.side.Write(b)
	return err
}

// follower knows where frames begin in bytes that pass. What cannot be read as
// frames is followed no more; the proxy of the server ends such a connection.
type follower struct {
	codec rpcCodec
	left  int // of the frame under way
	lost  bool
	n     int // bytes in head, of a frame whose size is not known yet
	head  [frameHead]byte
}

// between tells whether a frame has ended and none has begun.
func (f *follower) between() bool { return f.left == 0 && f.n == 0 && !f.lost }

// follow goes through b: all of it, or with stop up to the next end of a frame. It
// returns how far.
func (f *follower) follow(b []byte, stop bool) int {
	at := 0
	for at < len(b) && !f.lost {
		if f.left > 0 {
			n := min(f.left, len(b)-at)
			f.left -= n
			if at += n; stop && f.left == 0 {
				return at
			}
			continue
		}
		whole := b[at:]
		k := 0
		if f.n > 0 {
			k = copy(f.head[f.n:], whole)
			whole = f.head[:f.n+k]
		}
		size, _, err := f.codec.measure(whole, false)
		switch {
		case err != nil:
			f.lost = true
		case size > 0:
			f.left, f.n = size-f.n, 0
		case f.n > 0:
			f.n += k
			at += k
		default:
			f.n = copy(f.head[:], whole)
			at += f.n
		}
	}
	return len(b)
}

// callbacks judges what the server of a connection asks over it, if its protocol
// knows that.
func (f *outFlow) callbacks(h halves) *callbacks {
	if f.back == nil || callbackCodec(f.protocol) == nil {
		return nil
	}
	return newCallbacks(f.protocol, tcpSide{f.c}, f.peer(), callbackRules{judge: f.judgeCallback, reserve: f.sb.p.reserve, malformed: func(err error) {
		ev := f.ev
		ev.Kind, ev.Reason = api.EventBadRequest, err.Error()
		f.sb.refuse(ev)
	}}, *f.back, h.Out)
}

// judgeCallback judges what the server asks, by the rules of the workload that has
// made the connection. A refusal says in a sentence what it is about.
func (f *outFlow) judgeCallback(codec rpcCodec) (fault, string) {
	facts := f.sb.facts.Load()
	name := facts.Service + "." + facts.Namespace
	c := call{caller: f.party.peerIdentity, back: true, source: f.back.Source.Addr()}
	var unclear error
	c.remote, unclear = codec.target()
	c.rpc = unclear == nil
	v := verdict{reason: fmt.Sprintf("the plan has no service %s", name)}
	if s := f.sb.p.directory.Load().services[serviceKey(facts.Namespace, facts.Service)]; s != nil {
		v = decide(s, c)
	}
	what := "callback " + c.remote.what()
	if unclear != nil {
		what = fmt.Sprintf("a callback that cannot be read (%v)", unclear)
	}
	ev := api.Event{Peer: f.party.peerIdentity, Source: f.back.Source.String(), Destination: f.ev.Source, Service: name}
	counts := f.sb.p.observer.countsOf(name)
	if v.allowed {
		counts.calledBack[verdictAllowed].Add(1)
		f.sb.tried(ev, v, what)
		return 0, ""
	}
	counts.calledBack[verdictDenied].Add(1)
	ev.Kind, ev.Rule, ev.Reason = api.EventAccessDenied, v.rule, what+": "+v.reason
	f.sb.tellRefused(ev) // no scan: a server asks each of its clients the same
	return faultDenied, fmt.Sprintf("access denied to %s: %s: %s; see: hauberk why %s", f.party.peerIdentity, what, v.reason, facts.Instance)
}
