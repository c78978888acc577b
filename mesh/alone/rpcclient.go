package alone

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/balance"
)

// maxAnswer bounds the frame of an answer.
const maxAnswer = 64 << 20

// rpcClient is a client's connection that speaks bolt or Dubbo. Each of its calls
// goes to a server of its own.
type rpcClient struct {
	p          *Proxy
	l          *listener
	protocol   string
	client     netip.AddrPort
	clientText []byte
	out        *outbox
	wire       wire // for the goroutine that reads
	under      atomic.Int64
	leaving    atomic.Bool   // ends when nothing is under way
	idle       chan struct{} // nothing is
	tcp        *net.TCPConn  // nil of TLS
	parting    sync.Mutex
	moving     atomic.Bool // goes on in another process when nothing is under way
	tried      []*balance.Host
	buf        []byte
}

// serveRPC serves a connection to its end. early has been read of it.
func (p *Proxy) serveRPC(l *listener, c *client, conn net.Conn, protocol string, client netip.AddrPort, early []byte) error {
	x := &rpcClient{p: p, l: l, protocol: protocol, client: client, clientText: client.Addr().AppendTo(nil), out: newOutbox(conn, &p.answers),
		wire: wire{dubbo: protocol == "dubbo"}, idle: make(chan struct{}, 1)}
	x.tcp, _ = conn.(*net.TCPConn)
	limits := &l.site.Load().world.config.Limits
	r := &frameReader{conn: conn, wire: &x.wire, most: int(limits.Body), patient: time.Duration(limits.HeadTimeout), held: &p.held, halt: &x.moving}
	r.begin(early)
	defer r.free()
	go x.out.run(writePatience)
	c.rpc.Store(x)
	switch {
	case p.stopping.Load() || l.gone.Load():
		x.leave()
	case p.leaving.Load():
		x.part()
	}
	err := x.read(r)
	for err == errHalted {
		x.settle()
		if err = x.moveOn(r); err != nil {
			x.p.log.Warn("a connection stays here", "client", x.client, "err", err)
			x.stay()
			err = x.read(r)
		}
	}
	if err == io.EOF {
		x.settle() // it may wait for answers
		x.out.finish()
		err = nil
	} else {
		x.out.close() // if it moved the other process has it too
	}
	<-x.out.done
	return err
}

// part has the connection go on in the process that has taken over. One that cannot
// stays: neither protocol has a word by which its client would send no more calls.
func (x *rpcClient) part() {
	if x.tcp == nil || !x.p.line.whole() {
		return
	}
	x.parting.Lock()
	defer x.parting.Unlock()
	x.moving.Store(true)
	x.tcp.SetReadDeadline(time.Unix(1, 0))
}

// moveOn gives the connection, on which nothing is under way, to the process that has
// taken over.
func (x *rpcClient) moveOn(r *frameReader) error {
	x.out.release()
	<-x.out.done
	m := &parcel{Calls: &callsState{Listener: x.l.address, Protocol: x.protocol, Client: x.client, Unread: r.b[r.at:r.end]}}
	return withDescriptor(x.tcp, func(fd int) error { return x.p.line.send(m, fd) })
}

// stay goes on after moveOn has failed.
func (x *rpcClient) stay() {
	x.parting.Lock() // part has set its deadline, which the next frame sets anew
	x.moving.Store(false)
	x.parting.Unlock()
	x.out.resume(writePatience)
	if x.leaving.Load() { // it was told so meanwhile
		x.out.finish()
	}
}

// leave has the connection end when its calls have.
func (x *rpcClient) leave() {
	x.leaving.Store(true)
	if x.under.Load() == 0 {
		x.out.finish()
	}
}

// settle waits for the calls under way. Each of them has an end.
func (x *rpcClient) settle() {
	for x.under.Load() > 0 {
		select {
		case <-x.idle:
		case <-x.out.done:
			return
		}
	}
}

func (x *rpcClient) read(r *frameReader) error {
	var f rpcFrame
	for {
		frame, err := r.next(time.Now().Add(x.l.patience()))
		if x.moving.Load() && errors.Is(err, os.ErrDeadlineExceeded) && r.rests() {
			return errHalted
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && x.under.Load() > 0 && r.at == r.end && r.skip == 0 {
			continue // it waits for us
		}
		if errors.Is(err, errHeld) {
			x.wire.begin(frame, &f)
			if f.kind == rpcCall && x.call(len(frame), &f).refuse(rpcTooMany, balance.Cancelled, err.Error()) != nil {
				return err
			}
			continue
		}
		if err != nil {
			return err
		}
		if err := x.wire.read(frame, &f); err != nil {
			return err
		}
		switch f.kind {
		case rpcAlive:
			err = x.out.say(x.wire.appendLiving(x.buf[:0], &f))
		case rpcCall:
			err = x.serve(frame, &f)
		}
		if err != nil {
			return err
		}
	}
}

// call begins one.
func (x *rpcClient) call(got int, f *rpcFrame) *rpcUnderway {
	c := calls.Get().(*rpcUnderway)
	*c = rpcUnderway{client: x, world: x.p.enter(), frame: f.forgotten(), began: time.Now(), name: c.name[:0], got: got}
	x.under.Add(1)
	return c
}

// serve sends one call to a server, or answers it.
func (x *rpcClient) serve(frame []byte, f *rpcFrame) error {
	c := x.call(len(frame), f)
	site := c.world.at[x.l.address]
	if site == nil || site.l.Protocol != x.protocol {
		c.done(0, balance.Cancelled, "")
		return net.ErrClosed // nobody is served by what is not configured any more
	}
	e := callEnv{wire: &x.wire, frame: f, peer: x.clientText}
	c.route = site.callRoute(&e)
	c.name = e.appendName(c.name)
	switch {
	case c.route == nil && e.err != nil:
		return c.refuse(rpcUnclear, balance.Cancelled, "what the call is for cannot be read: "+e.err.Error())
	case c.route == nil:
		return c.refuse(rpcNoRoute, balance.Cancelled, "no route of the listener matches the call")
	}
	if c.route.limit != nil {
		if ok, _ := c.route.limit.allow(x.client.Addr(), c.began); !ok {
			c.route.stats.limited.Add(1)
			return c.refuse(rpcTooMany, balance.Cancelled, "the route's rate is used up")
		}
	}
	timeout := time.Duration(c.route.config.Timeout)
	if f.timeout > 0 {
		timeout = min(timeout, f.timeout)
	}
	c.until = c.began.Add(timeout)
	if t := c.world.traces; t != nil {
		frame = x.followCall(t, c, frame, f)
	}
	if c.route.json != nil {
		return x.toJSON(c, &e, frame)
	}
	return x.dispatch(c, frame)
}

// dispatch finds a server that takes the call. What was sent is never sent again.
func (x *rpcClient) dispatch(c *rpcUnderway, frame []byte) error {
	x.tried = x.tried[:0]
	c.up = c.route.choose()
	hash := c.route.hash(x)
	why := errNoServer
	for len(x.tried) < maxAttempts {
		at, err := c.up.pick(hash, x.tried)
		if errors.Is(err, balance.ErrOverflow) {
			return c.refuse(rpcTooMany, balance.Cancelled, err.Error())
		}
		if err != nil {
			why = errors.Join(why, err)
			break
		}
		c.at = at
		ctx, cancel := context.WithDeadline(x.p.context(), c.until)
		l, err := c.up.link(ctx, x.p, at.e)
		cancel()
		if err == nil {
			at.e.requests.Add(1)
			at.e.active.Add(1)
			if oneWay := c.frame.oneWay; oneWay {
				if err = l.send(c, frame); err == nil {
					at.e.active.Add(-1)
					c.done(200, balance.Success, "")
					return nil
				}
			} else if err = l.send(c, frame); err == nil {
				return nil // c is not ours any more
			}
			at.e.active.Add(-1)
		}
		c.at = chosen{}
		if errors.Is(err, errBusy) || errors.Is(err, errUnread) || errors.Is(err, errHeld) {
			at.Done(c.up.clock.Now(), balance.Cancelled)
			return c.refuse(rpcTooMany, balance.Cancelled, err.Error())
		}
		if c.givenUp(time.Now()) {
			at.Done(c.up.clock.Now(), balance.Cancelled)
			return c.refuse(rpcLate, balance.Cancelled, "no server was reached in the time its client gave: "+err.Error())
		}
		outcome := balance.Unreachable
		if l != nil { // it was there, and takes no more
			outcome = balance.Cancelled
		}
		at.Done(c.up.clock.Now(), outcome)
		x.tried = append(x.tried, at.Host())
		why = err
	}
	return c.refuse(rpcNoServer, balance.Cancelled, why.Error())
}

// givenUp says that the client's own time is over, and not the route's: that tells
// nothing of the server.
func (c *rpcUnderway) givenUp(now time.Time) bool {
	return !now.Before(c.until) && now.Before(c.began.Add(time.Duration(c.route.config.Timeout)))
}

// answer passes the server's answer on. frame is the reader's.
func (c *rpcUnderway) answer(f *rpcFrame, frame []byte, w *wire) {
	w.setID(frame, c.frame.id)
	outcome, status := balance.Success, 200
	if !f.ok {
		status = 500
	}
	if !f.well {
		outcome = balance.Failure
	}
	x := c.client
	err := x.out.add(frame)
	if errors.Is(err, errHeld) {
		c.refuseAnswer(err)
		return
	}
	if err != nil {
		x.out.close() // it does not read, or is gone
	}
	c.at.e.active.Add(-1)
	c.sent(len(frame), status, outcome, "")
}

// refuseAnswer answers in place of an answer for which there is no room: others do not
// read theirs.
func (c *rpcUnderway) refuseAnswer(why error) {
	x := c.client
	if c.refuse(rpcTooMany, balance.Cancelled, why.Error()) != nil {
		x.out.close()
	}
}

// refuse answers the call itself.
func (c *rpcUnderway) refuse(why rpcFault, outcome balance.Outcome, text string) error {
	var err error
	n := 0
	if !c.frame.oneWay {
		b := c.client.wire.appendFault(nil, &c.frame, why, text)
		n = len(b)
		err = c.client.out.say(b)
	}
	if c.at.e != nil {
		c.at.e.active.Add(-1)
	}
	c.sent(n, rpcStatuses[why], outcome, text)
	return err
}

func (c *rpcUnderway) done(status int, outcome balance.Outcome, why string) {
	c.sent(0, status, outcome, why)
}

// sent counts and logs a call that is over, and forgets it.
func (c *rpcUnderway) sent(n, status int, outcome balance.Outcome, why string) {
	x, w := c.client, c.world
	st := x.p.stats.other
	if c.route != nil {
		st = c.route.stats
	}
	took := time.Since(c.began)
	st.note(status, int64(c.got), int64(n), took)
	server := ""
	if c.at.e != nil {
		c.at.Done(c.up.clock.Now(), outcome)
		server = c.at.e.address
	}
	if c.asked != nil {
		server = c.asked.address
	}
	if w.log != nil {
		w.log.add(c.appendLine(nil, w.log.json, took, status, n, server, why))
	}
	if w.records != nil {
		c.record(w.records, took, status, n, server, why)
	}
	if c.hop.sampled(w.traces) {
		c.tell(w.traces, took, status, server, why)
	}
	w.leave()
	*c = rpcUnderway{name: c.name[:0]}
	calls.Put(c)
	if x.under.Add(-1) == 0 {
		select {
		case x.idle <- struct{}{}:
		default:
		}
		if x.leaving.Load() {
			x.out.finish()
		}
	}
}

// appendLine is a line of the access log: where HTTP has a method and a target,
// the protocol and what was called.
func (c *rpcUnderway) appendLine(b []byte, asJSON bool, took time.Duration, status, sent int, server, why string) []byte {
	name := ""
	if c.route != nil {
		name = c.route.name
	}
	protocol := c.client.protocol
	if !asJSON {
		b = c.began.UTC().AppendFormat(b, "2006-01-02T15:04:05.000Z ")
		b = append(append(b, c.client.clientText...), ' ')
		b = append(strconv.AppendQuote(b, protocol), ` "" `...)
		b = append(appendQuoted(b, c.name), ' ')
		b = append(strconv.AppendInt(b, int64(status), 10), ' ')
		b = append(strconv.AppendInt(b, int64(c.got), 10), ' ')
		b = append(strconv.AppendInt(b, int64(sent), 10), ' ')
		b = append(strconv.AppendInt(b, took.Microseconds(), 10), "us "...)
		b = append(strconv.AppendQuote(b, name), ' ')
		b = append(strconv.AppendQuote(b, server), ' ')
		return append(strconv.AppendQuote(b, why), '\n')
	}
	b = c.began.UTC().AppendFormat(append(b, `{"time":"`...), "2006-01-02T15:04:05.000Z")
	b = append(append(b, `","client":"`...), c.client.clientText...)
	b = appendQuoted(append(b, `","method":`...), []byte(protocol))
	b = appendQuoted(append(b, `,"host":"","target":`...), c.name)
	b = strconv.AppendInt(append(b, `,"status":`...), int64(status), 10)
	b = strconv.AppendInt(append(b, `,"received":`...), int64(c.got), 10)
	b = strconv.AppendInt(append(b, `,"sent":`...), int64(sent), 10)
	b = strconv.AppendInt(append(b, `,"micros":`...), took.Microseconds(), 10)
	b = appendQuoted(append(b, `,"route":`...), []byte(name))
	b = appendQuoted(append(b, `,"upstream":`...), []byte(server))
	b = appendQuoted(append(b, `,"why":`...), []byte(why))
	return append(b, "}\n"...)
}
