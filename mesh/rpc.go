package mesh

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/wire"
)

// fault is why a request is answered here and not by its server.
type fault int

const (
	faultDenied fault = iota
	faultUnreachable
	faultShed
)

// rpcKind is what a frame means to who passes it on.
type rpcKind int

const (
	rpcCall  rpcKind = iota // to be judged
	rpcAlive                // asks for a sign of life
	rpcOther                // answers, or tells of an event
	rpcMore                 // goes the way of the one before (orderedCodec)
)

// rpcCodec reads the frames of one direction of a connection. What inspect has
// read is what the methods after it are about.
type rpcCodec interface {
	// measure tells how long the frame is that begins with b, 0 if more of b is
	// needed to tell, and how much of it inspect must see: with deep as much as
	// it takes to tell what a request is for.
	measure(b []byte, deep bool) (size, look int, err error)
	// inspect reads the frame of size bytes that begins with b. answer tells
	// whether its sender waits for one.
	inspect(b []byte, size int) (kind rpcKind, answer bool, err error)
	// asks tells whether the frame that begins with b, of which measure has just told
	// the size, is a request. It is asked of what servers say.
	asks(b []byte) bool
	// target tells what the request is for.
	target() (remote, error)
	// refuse appends an answer to the request, alive one to the heartbeat.
	refuse(dst []byte, f fault, text string) []byte
	alive(dst []byte) []byte
	// begin and add check what passes of a frame.
	begin()
	add(b []byte) error
	// progress is how far that check has come in a frame, for resume.
	progress() [3]uint32
	resume([3]uint32)
}

func newCodec(protocol string) rpcCodec {
	switch protocol {
	case "bolt":
		return &boltCodec{}
	case "dubbo":
		return &dubboCodec{}
	case "dubbo-thrift":
		return &thriftCodec{}
	case "redis":
		return &redisCodec{}
	}
	return nil
}

// rpcExchange passes the frames of a connection from a client to a server,
// judging each request, and everything that the server says back. A refused
// request is answered between two frames of the server; the others go on.
type rpcExchange struct {
	entry    *entry
	client   side
	protocol string
	// dial connects to the server. It is called before the first frame that
	// passes.
	dial func() (side, error)
	// deep tells whether it matters now what requests are for, maybe whether any
	// request can be allowed, and judge returns "" if the one that the codec has
	// read may pass, else what to answer.
	deep, maybe func() bool
	judge       func(rpcCodec) (fault, string)
	reserve     func(bytes int) bool
	malformed   func(error)
	sight       *sight      // nil notes nothing
	called      func()      // tells of a request of the server, if not nil
	toldOf      atomic.Bool // that it has asked, in a hand-over before too

	server side
	in     *frames
	order  *order // of the answers, nil if they have ids
	answer []byte
	traced bool          // the codec carries traces
	longer []byte        // what goes on in place of the frame decided on, if not nil
	mu     sync.Mutex    // held while a frame is written to the client
	done   chan struct{} // the responses' goroutine has ended

	ended    bool // the client has ended its half
	silent   bool // under mu: ours is ended
	replies  ending
	replying framesState // where a frozen responses' goroutine stopped
	farewell *time.Timer // for a client that does not know yet that the server has ended
}

// rpcState is a frozen exchange as plain data.
type rpcState struct {
	Requests framesState `json:"requests"`
	Ended    bool        `json:"ended,omitempty"` // by the client
	// Met tells that there is a server, Over that it has ended its half.
	Met     bool        `json:"met,omitempty"`
	Over    bool        `json:"over,omitempty"`
	Replies framesState `json:"replies"`
	// Called tells that the server has asked something, and that this was told.
	Called bool        `json:"called,omitempty"`
	Order  *orderState `json:"order,omitempty"`
	// Calls that wait to be told of with their answers. A process that does not know
	// them loses that, and nothing else.
	Calls map[uint64]*noteState `json:"calls,omitempty"`
}

func (s *rpcState) check() error {
	if !s.Met && (s.Over || s.Requests.Left > 0 && !s.Requests.Dropping) {
		return errors.New("exchange with a frame under way and no server")
	}
	if len(s.Calls) > maxCalls {
		return fmt.Errorf("exchange with %d calls; want at most %d", len(s.Calls), maxCalls)
	}
	return errors.Join(s.Requests.check(), s.Replies.check(), s.Order.check())
}

// run serves the client to its end. It returns where it stands if it was frozen;
// from is such a return, and x.server the server that was met.
func (x *rpcExchange) run(from *rpcState) *rpcState {
	codec := newCodec(x.protocol)
	if c, ok := codec.(orderedCodec); ok {
		x.order = &order{codec: c}
	}
	_, x.traced = codec.(tracedCodec)
	x.in = newFrames(&countingReader{x.entry, x.client, &x.entry.received}, codec, x.reserve)
	defer x.in.free()
	if from != nil {
		x.resume(from)
	}
	var err error
	if !x.ended {
		err = x.requests()
	}
	if x.server == nil {
		if errors.Is(err, wire.ErrFrozen) {
			return &rpcState{Requests: x.in.state()}
		}
		if err != nil {
			x.client.abort()
			return nil
		}
		x.client.CloseWrite()
		x.client.finish()
		return nil
	}
	if err == nil {
		x.ended = true
		err = x.server.CloseWrite() // what it still answers is passed on
	}
	if err != nil && !errors.Is(err, wire.ErrFrozen) {
		x.client.abort()
		x.server.abort()
	}
	<-x.done
	if frozen := errors.Is(err, wire.ErrFrozen) || err == nil && x.replies == endFrozen; frozen && x.replies != endFailed {
		return x.state()
	}
	x.server.finish()
	x.client.finish()
	return nil
}

func (x *rpcExchange) state() *rpcState {
	if x.farewell != nil {
		x.farewell.Stop()
	}
	return &rpcState{Requests: x.in.state(), Ended: x.ended, Met: true, Called: x.toldOf.Load(), Over: x.replies == endOrderly, Replies: x.replying, Order: x.order.state()}
}

// resume puts the exchange where another stood.
func (x *rpcExchange) resume(s *rpcState) {
	x.in.resume(s.Requests)
	x.toldOf.Store(s.Called)
	x.ended, x.replying = s.Ended, s.Replies
	if x.server == nil {
		return
	}
	if x.order != nil {
		x.order.resume(s.Order)
		if x.order.Said {
			x.endAfter()
		}
	}
	x.done = make(chan struct{})
	if s.Over {
		x.sayGoodbye()
		close(x.done)
		return
	}
	if x.order != nil {
		x.order.hold(x)
	} else if s.Replies.Left > 0 {
		x.mu.Lock() // copy's, before anything of ours
	}
	go x.responses()
}

// requests passes frames on until the client's end.
func (x *rpcExchange) requests() error {
	slow := time.AfterFunc(time.Hour, x.client.abort)
	slow.Stop()
	defer slow.Stop()
	waiting := false
	for {
		if err := x.buffered(); err != nil {
			var cut *frameError
			if errors.As(err, &cut) {
				x.malformed(err)
			}
			return err
		}
		// A frame that is not there to be judged yet has its time.
		if part := x.in.partial(); part != waiting {
			if waiting = part; waiting {
				slow.Reset(headTimeout)
			} else {
				slow.Stop()
			}
		}
		err := x.in.fill()
		if err == io.EOF && !x.in.within() {
			return nil
		}
		if err != nil {
			return err
		}
		if x.entry.cut.Load() {
			return errCut
		}
	}
}

// buffered decides on all the frames that are there.
func (x *rpcExchange) buffered() error {
	for {
		if x.order != nil && x.order.Closing {
			x.in.discard()
			return nil
		}
		x.in.whole = x.traced && x.sight.traces()
		b, size, err := x.in.next(x.deep())
		if err != nil {
			return errors.Join(x.flush(), err)
		}
		if size == 0 {
			return x.flush()
		}
		pass, err := x.one(b, size)
		if err != nil {
			return errors.Join(x.flush(), err)
		}
		if x.longer != nil {
			if err := x.replace(size); err != nil {
				return err
			}
		} else if !pass {
			if err := x.flush(); err != nil {
				return err
			}
			if x.order != nil {
				x.order.codec.skip()
			}
			x.in.drop(size)
		} else if err := x.in.pass(size); err != nil {
			return errors.Join(x.flush(), err)
		}
	}
}

// replace sends a longer frame in place of the one of size bytes, which is there.
func (x *rpcExchange) replace(size int) error {
	err := x.flush()
	if err == nil {
		_, err = x.server.Write(x.longer)
	}
	x.longer = nil
	x.in.drop(size)
	return err
}

// one decides on one frame, and answers it if it goes no further.
func (x *rpcExchange) one(b []byte, size int) (pass bool, err error) {
	codec := x.in.codec
	kind, answer, err := codec.inspect(b, size)
	if err != nil {
		return false, &frameError{err}
	}
	x.answer = x.answer[:0]
	switch kind {
	case rpcCall:
		if f, text := x.judge(codec); text != "" {
			x.answer = codec.refuse(x.answer, f, text)
			break
		}
		fresh := x.server == nil
		if err := x.connect(); errors.Is(err, wire.ErrFrozen) {
			return false, err
		} else if err != nil {
			x.sight.fails(codec, verdictFailed, err.Error())
			x.answer = codec.refuse(x.answer, faultUnreachable, err.Error())
			break
		}
		if fresh { // that took its time: there may be another plan
			if f, text := x.judge(codec); text != "" {
				x.answer = codec.refuse(x.answer, f, text)
				break
			}
		}
		if text := x.entry.watch.call(codec, size); text != "" {
			x.sight.fails(codec, verdictDenied, "found out of the ordinary")
			x.answer = codec.refuse(x.answer, faultShed, text)
			break
		}
		if x.order != nil {
			x.order.passed()
		}
		x.longer, err = x.sight.passes(codec, b, size, answer)
		return true, err
	case rpcMore:
		return x.order.codec.passes(), nil
	default:
		// Who may call nothing does not reach the server with anything else.
		if x.server == nil && x.maybe() {
			if err := x.connect(); errors.Is(err, wire.ErrFrozen) {
				return false, err
			}
		}
		if x.server != nil {
			return true, nil
		}
		if answer = kind == rpcAlive; answer {
			x.answer = codec.alive(x.answer)
		}
	}
	if answer && x.order != nil {
		x.order.refused(x.answer)
		return false, x.settle()
	}
	if answer {
		err = x.say(x.answer)
	}
	return false, err
}

// connect makes sure there is a server.
func (x *rpcExchange) connect() error {
	if x.server != nil {
		return nil
	}
	if x.dial == nil {
		return errors.New("no server")
	}
	server, err := x.dial()
	if err != nil {
		return err
	}
	x.server, x.done = server, make(chan struct{})
	go x.responses()
	return nil
}

// say writes whole frames of our own to the client.
func (x *rpcExchange) say(b []byte) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.silent {
		return nil
	}
	_, err := x.client.Write(b)
	return err
}

// flush sends what has been decided to pass.
func (x *rpcExchange) flush() error {
	b := x.in.passed()
	if len(b) == 0 {
		return nil
	}
	_, err := x.server.Write(b)
	return err
}

// responses passes on what the server says, frame by frame, so that ours can
// stand between them.
func (x *rpcExchange) responses() {
	defer close(x.done)
	out := &counter{x.entry, x.client, &x.entry.sent}
	codec := newCodec(x.protocol)
	var answers answerCodec
	if x.order != nil {
		answers = x.order.codec.answers()
		codec = answers
	}
	in := newFrames(x.server, codec, x.reserve)
	defer in.free()
	in.resume(x.replying)
	var err error
	if answers == nil {
		err = x.copy(in, out)
	} else {
		err = x.copyInOrder(in, answers, out)
	}
	switch {
	case errors.Is(err, wire.ErrFrozen):
		x.replies, x.replying = endFrozen, in.state()
	case x.order != nil && x.order.said():
		// What comes after the last refusal is of no interest, nor how it ends.
	case err == io.EOF && !in.within():
		x.sayGoodbye()
	default:
		x.replies = endFailed
		x.client.abort()
		x.server.abort()
	}
}

// sayGoodbye tells the client that there are no more answers. As long as it has
// not seen that, what it sends goes nowhere.
func (x *rpcExchange) sayGoodbye() {
	x.mu.Lock()
	x.silent = true
	x.client.CloseWrite()
	x.mu.Unlock()
	x.farewell = time.AfterFunc(lingerTime, x.client.abort)
}

func (x *rpcExchange) copy(in *frames, out io.Writer) error {
	held := in.left > 0 // the lock, in the middle of a frame; resume has taken it
	defer func() {
		if held {
			x.mu.Unlock()
		}
	}()
	in.blind = true
	for {
		if err := in.fill(); err != nil {
			return err
		}
		var fault error
		for fault == nil {
			b, size, err := in.next(false)
			if err == nil && size > 0 {
				if x.called != nil && in.codec.asks(b) {
					x.called()
				}
				if x.sight != nil {
					x.sight.answer(in.codec, b)
				}
				err = in.pass(size)
			}
			if fault = err; size == 0 {
				break
			}
		}
		if b := in.passed(); len(b) > 0 {
			if !held {
				x.mu.Lock()
			}
			_, err := out.Write(b)
			if held = in.left > 0 || err != nil; !held {
				x.mu.Unlock()
			}
			if err != nil {
				return err
			}
		}
		if fault != nil {
			x.malformed(fmt.Errorf("the server's answer: %w", fault))
			return fault
		}
	}
}

// serveRPC judges each request by the plan of the moment.
func (a *arrival) serveRPC(e *entry, key, protocol string, from *rpcState) *rpcState {
	service := func() *service { return a.p.directory.Load().services[key] }
	maybe := func() bool {
		s := service()
		return s != nil && mayCall(s, a.call())
	}
	x := &rpcExchange{
		entry: e, client: a.client, protocol: protocol,
		dial: func() (side, error) {
			c, err := a.connect(e)
			return tcpSide{c}, err
		},
		deep: func() bool {
			s := service()
			return s != nil && (s.remote || s.inspected != nil)
		},
		maybe:   maybe,
		reserve: a.p.reserve,
		judge:   func(c rpcCodec) (fault, string) { return a.judgeRPC(service(), c) },
		malformed: func(err error) {
			ev := a.ev
			ev.Kind, ev.Reason = api.EventBadRequest, err.Error()
			a.sb.refuse(ev)
		},
	}
	x.called, x.sight = a.calledBack(&x.toldOf), a.sight
	if from != nil && from.Met {
		x.server = tcpSide{a.guest.Load()}
	}
	if from != nil && a.sight != nil {
		a.sight.hold(from.Calls)
	}
	state := x.run(from)
	switch {
	case a.sight == nil:
	case state == nil:
		a.sight.gone()
	default:
		state.Calls = a.sight.held()
	}
	return state
}

// calledBack counts what a server asks over the connection of its client. The node
// of a client in the mesh judges it; where the client is outside nobody does, and
// the first is told.
func (a *arrival) calledBack(told *atomic.Bool) func() {
	return func() {
		a.sight.counts.callbacks.Add(1)
		if a.who.peerIdentity != anonymous || told.Swap(true) {
			return
		}
		ev := a.ev
		ev.Kind, ev.Instance = api.EventFinding, a.sb.facts.Load().Instance
		ev.Reason = "the server makes requests over the connection of its client, which is outside the mesh; they pass and are not judged"
		a.p.events.add(ev)
	}
}

// judgeRPC judges one request. A refusal says in a sentence what it is about.
func (a *arrival) judgeRPC(s *service, codec rpcCodec) (fault, string) {
	v := verdict{reason: "the service is no longer in the plan"}
	c := a.call()
	var unclear error
	if s != nil {
		if s.remote {
			c.remote, unclear = codec.target()
			c.rpc = unclear == nil
		}
		v = decide(s, c)
	}
	a.sight.judged(codec, c, v)
	if v.allowed {
		if v.trial != "" {
			a.tried(v, c.remote.what())
		}
		return 0, ""
	}
	if !c.rpc && unclear == nil {
		c.remote, unclear = codec.target()
	}
	what := c.remote.what()
	if unclear != nil {
		what = fmt.Sprintf("a request that cannot be read (%v)", unclear)
	}
	ev := a.ev
	ev.Kind, ev.Rule, ev.Reason = api.EventAccessDenied, v.rule, what+": "+v.reason
	a.sb.refuse(ev)
	return faultDenied, fmt.Sprintf("access denied to %s: %s: %s; see: hauberk why %s", a.who.peerIdentity, what, v.reason, a.sb.facts.Load().Instance)
}

// refuseRPC answers the requests of a connection that goes nowhere, for a
// moment.
func refuseRPC(c *net.TCPConn, protocol, text string) {
	c.SetDeadline(time.Now().Add(askTime))
	x := &rpcExchange{
		entry: &entry{}, client: tcpSide{wire.New(c)}, protocol: protocol,
		deep: func() bool { return false }, maybe: func() bool { return false }, reserve: func(int) bool { return false },
		judge: func(rpcCodec) (fault, string) { return faultUnreachable, text }, malformed: func(error) {},
	}
	x.run(nil)
}
