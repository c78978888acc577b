package mesh

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	api "hauberk.dev/api/mesh"
)

// fault is why a request is answered here and not by its server.
type fault int

const (
	faultDenied fault = iota
	faultUnreachable
)

// rpcKind is what a frame means to who passes it on.
type rpcKind int

const (
	rpcCall  rpcKind = iota // to be judged
	rpcAlive                // asks for a sign of life
	rpcOther                // answers, or tells of an event
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
	// target tells what the request is for.
	target() (remote, error)
	// refuse appends an answer to the request, alive one to the heartbeat.
	refuse(dst []byte, f fault, text string) []byte
	alive(dst []byte) []byte
	// begin and add check what passes of a frame.
	begin()
	add(b []byte) error
}

func newCodec(protocol string) rpcCodec {
	switch protocol {
	case "bolt":
		return &boltCodec{}
	case "dubbo":
		return &dubboCodec{}
	case "dubbo-thrift":
		return &thriftCodec{}
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

	server side
	in     *frames
	answer []byte
	mu     sync.Mutex    // held while a frame is written to the client
	done   chan struct{} // the responses' goroutine has ended
}

// run serves the client to its end.
func (x *rpcExchange) run() {
	x.in = newFrames(&countingReader{x.entry, x.client, &x.entry.received}, newCodec(x.protocol), x.reserve)
	defer x.in.free()
	err := x.requests()
	if x.server == nil {
		if err != nil {
			x.client.abort()
			return
		}
		x.client.CloseWrite()
		x.client.finish()
		return
	}
	if err == nil {
		err = x.server.CloseWrite() // what it still answers is passed on
	}
	if err != nil {
		x.client.abort()
		x.server.abort()
	}
	<-x.done
	x.server.finish()
	x.client.finish()
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
		b, size, err := x.in.next(x.deep())
		if err != nil {
			return errors.Join(x.flush(), err)
		}
		if size == 0 {
			return x.flush()
		}
		pass, err := x.one(b, size)
		if err != nil {
			return err
		}
		if !pass {
			if err := x.flush(); err != nil {
				return err
			}
			x.in.drop(size)
		} else if err := x.in.pass(size); err != nil {
			return errors.Join(x.flush(), err)
		}
	}
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
		if err := x.connect(); err != nil {
			x.answer = codec.refuse(x.answer, faultUnreachable, err.Error())
			break
		}
		if fresh { // that took its time: there may be another plan
			if f, text := x.judge(codec); text != "" {
				x.answer = codec.refuse(x.answer, f, text)
				break
			}
		}
		return true, nil
	default:
		// Who may call nothing does not reach the server with anything else.
		if x.server != nil || x.maybe() && x.connect() == nil {
			return true, nil
		}
		if answer = kind == rpcAlive; answer {
			x.answer = codec.alive(x.answer)
		}
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
	in := newFrames(x.server, newCodec(x.protocol), x.reserve)
	defer in.free()
	err := x.copy(in, out)
	if err == io.EOF && !in.within() {
		// As long as the client has not seen the end, what it sends goes nowhere.
		x.client.CloseWrite()
		time.AfterFunc(lingerTime, x.client.abort)
		return
	}
	x.client.abort()
	x.server.abort()
}

func (x *rpcExchange) copy(in *frames, out io.Writer) error {
	held := false // the lock, in the middle of a frame
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
			_, size, err := in.next(false)
			if err == nil && size > 0 {
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
func (a *arrival) serveRPC(e *entry, key, protocol string) {
	service := func() *service { return a.p.directory.Load().services[key] }
	maybe := func() bool {
		s := service()
		return s != nil && mayCall(s, a.who.peerIdentity, a.port)
	}
	x := &rpcExchange{
		entry: e, client: a.client, protocol: protocol,
		dial: func() (side, error) {
			c, err := a.connect(e)
			return tcpSide{c}, err
		},
		deep: func() bool {
			s := service()
			return s != nil && s.remote
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
	x.run()
}

// judgeRPC judges one request. A refusal says in a sentence what it is about.
func (a *arrival) judgeRPC(s *service, codec rpcCodec) (fault, string) {
	v := verdict{reason: "the service is no longer in the plan"}
	c := call{caller: a.who.peerIdentity, port: a.port}
	var unclear error
	if s != nil {
		if s.remote {
			c.remote, unclear = codec.target()
			c.rpc = unclear == nil
		}
		v = decide(s, c)
	}
	if v.allowed {
		return 0, ""
	}
	if !c.rpc && unclear == nil {
		c.remote, unclear = codec.target()
	}
	what := fmt.Sprintf("%.128q method %.128q", c.remote.service, c.remote.method)
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
		entry: &entry{}, client: tcpSide{c}, protocol: protocol,
		deep: func() bool { return false }, maybe: func() bool { return false }, reserve: func(int) bool { return false },
		judge: func(rpcCodec) (fault, string) { return faultUnreachable, text }, malformed: func(error) {},
	}
	x.run()
}
