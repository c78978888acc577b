package alone

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/proxyproto"
)

// Bounds of a connection to a server of RPC.
const (
	maxRPCLinks   = 4   // to one endpoint
	linkLoad      = 256 // calls under way, above which another connection is made
	maxUnder      = 64 << 10
	rpcTick       = 50 * time.Millisecond // calls that got no answer in time are looked for
	beatEvery     = 15 * time.Second
	maxMissed     = 3 // heartbeats without an answer
	writePatience = 30 * time.Second
)

// rpcUnderway is one call under way.
type rpcUnderway struct {
	client *rpcClient
	world  *world
	route  *callRoute
	up     *upstream
	at     chosen
	asked  *endpoint // in JSON, in place of at
	frame  rpcFrame  // without its bytes
	began  time.Time
	until  time.Time
	name   []byte // of service and method, for the log
	hop    hop
	got    int
}

var calls = sync.Pool{New: func() any { return new(rpcUnderway) }}

// rpcLink is a connection to a server of bolt or Dubbo, which the calls of all
// clients share: each gets an id that is new there.
type rpcLink struct {
	u    *upstream
	e    *endpoint
	srv  *server
	wire wire // for the goroutine that reads
	out  *outbox

	heard  atomic.Int64 // when something came, in Unix nanoseconds
	missed atomic.Int32

	mu       sync.Mutex
	under    map[uint64]*rpcUnderway
	next     uint64
	draining bool
	over     bool
	ticking  bool
	beat     *time.Timer
}

// link is a connection to e that has room for a call.
func (u *upstream) link(ctx context.Context, p *Proxy, e *endpoint) (l *rpcLink, err error) {
	if u.speaks != e.speaks {
		return nil, errNoServer
	}
	limit := maxRPCLinks
	if u.config.Connections > 0 {
		limit = min(limit, u.config.Connections)
	}
	l, _, err = e.links.get(ctx, limit, func() (*rpcLink, error) { return u.newLink(ctx, p, e) })
	return l, err
}

func (u *upstream) newLink(ctx context.Context, p *Proxy, e *endpoint) (*rpcLink, error) {
	if n := u.open.Add(1); u.config.Connections > 0 && n > int64(u.config.Connections) {
		u.open.Add(-1)
		return nil, errBusy
	}
	s, err := u.dial(ctx, e, proxyproto.Header{})
	if err != nil {
		u.open.Add(-1)
		e.failures.Add(1)
		return nil, err
	}
	l := &rpcLink{u: u, e: e, srv: s, wire: wire{dubbo: u.config.Protocol == "dubbo"}, out: newOutbox(s.conn, &p.held), under: map[uint64]*rpcUnderway{}}
	l.heard.Store(time.Now().UnixNano())
	l.mu.Lock()
	l.beat = time.AfterFunc(beatEvery, l.alive)
	l.mu.Unlock()
	go l.out.run(writePatience)
	go l.read(p)
	return l, nil
}

func (l *rpcLink) takes() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.draining && !l.over
}

func (l *rpcLink) load() (open, most int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.under), linkLoad
}

// unused is never so: heartbeats keep a connection whose next call must not wait.
func (l *rpcLink) unused(time.Time) bool { return false }

func (l *rpcLink) drain() {
	l.mu.Lock()
	l.draining = true
	idle := len(l.under) == 0
	l.mu.Unlock()
	if idle {
		l.out.finish()
	}
}

// send sends the frame of a call, with an id of its own. Nobody has seen any of it
// if there is an error.
func (l *rpcLink) send(c *rpcUnderway, frame []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || l.draining {
		return errNoServer
	}
	if len(l.under) >= maxUnder {
		return errBusy
	}
	id := l.idLocked()
	l.wire.setID(frame, id)
	if err := l.out.add(frame); err != nil {
		return err
	}
	if c.frame.oneWay {
		return nil
	}
	l.under[id] = c
	if !l.ticking {
		l.ticking = true
		time.AfterFunc(rpcTick, l.tick)
	}
	return nil
}

func (l *rpcLink) idLocked() uint64 {
	for {
		l.next = (l.next + 1) & 0x7fffffff
		if l.next != 0 && l.under[l.next] == nil {
			return l.next
		}
	}
}

// take is the call that an answer is to, nil if nobody waits for it any more.
func (l *rpcLink) take(id uint64) *rpcUnderway {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.under[id]
	delete(l.under, id)
	if l.draining && len(l.under) == 0 {
		l.out.finish()
	}
	return c
}

// read gives each answer to the client it is for.
func (l *rpcLink) read(p *Proxy) {
	r := &frameReader{conn: l.srv.conn, wire: &l.wire, most: maxAnswer, patient: writePatience, held: &p.answers}
	defer r.free()
	var f rpcFrame
	var err error
	for err == nil {
		frame, why := r.next(time.Time{})
		if errors.Is(why, errHeld) {
			l.wire.begin(frame, &f)
		} else if err = why; err == nil {
			err = l.wire.read(frame, &f)
		}
		if err != nil {
			break
		}
		l.heard.Store(time.Now().UnixNano())
		l.missed.Store(0)
		switch f.kind {
		case rpcAnswer:
			if c := l.take(f.id); c != nil && why != nil {
				c.refuseAnswer(why)
			} else if c != nil {
				c.answer(&f, frame, &l.wire)
			}
		case rpcAlive:
			l.out.say(l.wire.appendLiving(nil, &f)) // a server that does not read need not hear it
		case rpcGoAway:
			l.drain()
		}
	}
	l.fail(err)
}

// fail answers every call that waits, in the words of its protocol: none is sent
// again, as the server may have done what it asks.
func (l *rpcLink) fail(err error) {
	l.out.close()
	l.mu.Lock()
	l.over = true
	l.beat.Stop()
	all := l.under
	l.under = map[uint64]*rpcUnderway{}
	l.mu.Unlock()
	l.u.open.Add(-1)
	for _, c := range all {
		l.e.failures.Add(1)
		c.refuse(rpcBroken, balance.Unreachable, fmt.Sprintf("the connection to the server ended before its answer: %v", err))
	}
}

// tick answers the calls whose time is over.
func (l *rpcLink) tick() {
	now := time.Now()
	var late []*rpcUnderway
	l.mu.Lock()
	for id, c := range l.under {
		if now.After(c.until) {
			late = append(late, c)
			delete(l.under, id)
		}
	}
	l.ticking = len(l.under) > 0
	if l.ticking {
		time.AfterFunc(rpcTick, l.tick)
	}
	idle := l.draining && len(l.under) == 0
	l.mu.Unlock()
	if idle {
		l.out.finish()
	}
	for _, c := range late {
		if c.givenUp(now) {
			c.refuse(rpcLate, balance.Cancelled, "the server did not answer in the time its client gave")
			continue
		}
		l.e.failures.Add(1)
		if l.heard.Load() < c.began.UnixNano() {
			l.drain() // nothing at all has come since: the server may be gone
		}
		c.refuse(rpcLate, balance.Unreachable, "the server did not answer in time")
	}
}

// alive asks a server that has said nothing for a sign of life.
func (l *rpcLink) alive() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return
	}
	if time.Since(time.Unix(0, l.heard.Load())) >= beatEvery {
		if l.missed.Add(1) > maxMissed {
			l.srv.conn.Close() // who reads it finds its end
			return
		}
		l.out.add(l.wire.appendBeat(nil, l.idLocked()))
	}
	l.beat.Reset(beatEvery)
}
