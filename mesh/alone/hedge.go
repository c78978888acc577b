package alone

import (
	"context"
	"errors"
	"net"
	"os"
	"strconv"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/proxyproto"
)

// Hedge asks a second endpoint what the first takes too long to answer. The first
// answer is passed on, and who is not needed any more is told so.
type Hedge struct {
	After      Duration `yaml:"after"`
	Percentile float64  `yaml:"percentile"` // of the time that answers took lately
	Tries      int      `yaml:"tries"`      // at once, the first included
	Percent    int      `yaml:"percent"`    // second tries for a hundred requests
	Idempotent bool     `yaml:"idempotent"` // every request of the route may be sent twice, whatever its method
}

func (h *Hedge) policy() (*balance.Hedge, error) {
	return balance.Hedge{After: time.Duration(h.After), Percentile: h.Percentile, Tries: h.Tries, Percent: uint32(max(h.Percent, 0))}.Checked()
}

func (r *reading) hedge(at string, x *Route) {
	h := x.Hedge
	if _, err := h.policy(); err != nil {
		r.fault(at, "%v", err)
	}
	if h.Percent < 0 {
		r.fault(at+".percent", "%d is out of range; use 1 to 300", h.Percent)
	}
	if x.Upstream == "" && len(x.Split) == 0 || x.Transcode != nil {
		r.fault(at, "goes with upstream or split, without transcode")
	}
}

// contender is one try of a request that is tried more than once at a time. It
// belongs to a goroutine of its own until it is heard.
type contender struct {
	at     chosen
	ask    []byte // the request; nil if it is sent already
	srv    *server
	resp   http1.Message
	err    error
	ends   time.Time
	second bool // counted into the budget of retries
	heard  bool // before the race was decided
}

// race is a request that is tried more than once at a time.
type race struct {
	up     *upstream
	all    []*contender // the first is the one that was slow
	best   *contender   // whose answer is passed on; a fault only if nobody does better
	heard  chan *contender
	out    int // not heard yet
	method []byte
	header proxyproto.Header
	asked  time.Time // the first
	until  time.Time // the client waits no longer
	ctx    context.Context
	cancel context.CancelFunc
}

// callPatience is how long the one message of a call that may be tried twice may take
// to come: who makes it writes its head first.
const callPatience = 100 * time.Millisecond

// gatherCall waits for the end of a call, and has it be a request with a body of a
// length. One that does not end soon is a stream, and passed on as it comes.
func (s *session) gatherCall() {
	if s.req.Framing != http1.Chunked {
		return
	}
	s.two.SetReadDeadline(time.Now().Add(s.p.callPatience))
	for {
		n, whole := s.two.arrived()
		switch {
		case n > blockSize-s.in.hold || s.two.lost() != nil:
			return
		case !whole:
			if s.two.read.wait() != nil {
				return
			}
			continue
		case s.two.trailed():
			return
		case n == 0:
			s.req.Framing = http1.NoBody
		default:
			s.req.Framing, s.req.Length = http1.Length, int64(n)
		}
		s.body.Start(s.req.Framing, s.req.Length)
		return
	}
}

// mayHedge says whether the request at hand may be sent to two servers. Nothing of
// its body may be missing, and its answer must not be a tunnel.
func (s *session) mayHedge(a *action, whole bool) bool {
	return a.hedge != nil && whole && !s.req.Upgrade && (a.route.Hedge.Idempotent || !s.grpc && safe(s.req.Method))
}

// hedged waits for the beginning of an answer, and asks others if that takes too
// long. It returns the server whose answer is to be read; answered says that its
// head is in s.resp already.
func (s *session) hedged(a *action, srv *server) (of *server, answered bool, err error) {
	now := time.Now()
	wait, ok := a.hedge.Wait(srv.up.clock.Now())
	ends := s.within(now, s.tryTime(a))
	if !ok || !now.Add(wait).Before(ends) {
		return srv, false, nil
	}
	srv.conn.SetReadDeadline(now.Add(wait))
	if s.left() {
		return srv, false, errClient
	}
	err = srv.in.fill()
	srv.conn.SetReadDeadline(ends)
	switch {
	case s.left():
		return srv, false, errClient
	case err == nil || !errors.Is(err, os.ErrDeadlineExceeded) || !time.Now().Before(ends):
		return srv, false, err
	}
	r := &race{up: srv.up, heard: make(chan *contender, balance.MaxHedged), method: s.req.Method, header: s.header(), asked: s.cache.asked, until: s.until}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	r.all = append(r.all, &contender{at: s.at, srv: srv, ends: ends})
	if !s.onceMore(a, r) {
		r.cancel()
		return srv, false, nil // nobody else is there, or may be asked
	}
	return s.race(a, r, wait)
}

// onceMore has one more endpoint asked, if there is one and the budgets allow it.
func (s *session) onceMore(a *action, r *race) bool {
	if len(r.all) >= a.hedge.Policy().Tries || s.expired() {
		return false
	}
	tried := len(s.asked)
	for _, c := range r.all {
		s.asked = append(s.asked, c.at.Host())
	}
	at, err := r.up.pick(s.hash(a), s.asked)
	s.asked = s.asked[:tried]
	if err != nil {
		return false
	}
	if !r.up.set.Retry() {
		at.Release()
		return false
	}
	b, err := s.appendHead(nil, a, r.up, true)
	if err != nil || !a.hedge.Again() {
		r.up.set.EndRetry()
		at.Release()
		return false
	}
	if s.req.Framing == http1.Length {
		b = append(b, s.in.waiting()[:s.req.Length]...)
	}
	c := &contender{at: at, ask: b, second: true, ends: r.all[0].ends}
	if p := a.route.Retries; p != nil && p.PerTry > 0 { // else the first has all the time there is
		c.ends = s.within(s.began, time.Duration(a.route.Timeout))
		if own := time.Now().Add(time.Duration(p.PerTry)); own.Before(c.ends) {
			c.ends = own
		}
	}
	at.e.requests.Add(1)
	at.e.active.Add(1)
	a.stats.hedged.Add(1)
	if len(r.all) == 1 {
		r.start(r.all[0])
	}
	r.all = append(r.all, c)
	r.start(c)
	return true
}

func (r *race) start(c *contender) {
	r.out++
	go func() {
		if c.err = c.run(r); c.err != nil && r.ctx.Err() != nil && c.srv != nil {
			c.srv.close() // its server hears at once that nobody waits for it
		}
		r.heard <- c // there is room for all
	}()
}

// run sends the request if it is not sent, and reads the head of the answer.
func (c *contender) run(r *race) (err error) {
	if c.srv == nil {
		ctx, cancel := context.WithDeadline(r.ctx, c.ends)
		c.srv, err = r.up.connect(ctx, c.at.e, r.header, false)
		cancel()
		if err != nil {
			return err
		}
		c.srv.conn.SetDeadline(c.ends)
	}
	stop := context.AfterFunc(r.ctx, func() { c.srv.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if c.ask != nil {
		if _, err := c.srv.conn.Write(c.ask); err != nil {
			return err
		}
	}
	for range maxInterim {
		head, _, err := c.srv.in.head(maxHead)
		if err == nil {
			err = c.resp.Response(head, r.method)
		}
		switch {
		case err != nil:
			return err
		case c.resp.Status == 101:
			return errUnasked
		case c.resp.Status >= 200:
			return nil
		}
	}
	return errInterim
}

// fails says whether an answer tells of a fault of its server: another may do
// better.
func (c *contender) fails() bool {
	if c.resp.Status >= 500 {
		return true
	}
	v, there := c.resp.Field("Grpc-Status")
	code, err := strconv.Atoi(string(v))
	return there && isGRPC(&c.resp) && err == nil && failure(code)
}

// givenUp says that what ended its time was that of the client.
func (c *contender) givenUp(until time.Time) bool {
	return c.ends.Equal(until) && (errors.Is(c.err, os.ErrDeadlineExceeded) || errors.Is(c.err, context.DeadlineExceeded))
}

// stale says that a kept connection had ended: nothing is wrong with the endpoint.
func (c *contender) stale() bool {
	return c.srv != nil && c.srv.reused && c.srv.in.end == 0 && c.srv.broken(c.err)
}

// hear takes what has become of a contender. won says that its answer is passed on.
func (r *race) hear(c *contender) (won bool) {
	r.out--
	c.heard = true
	switch {
	case c.err != nil:
		return false
	case !c.fails():
		r.best = c
		return true
	case r.best == nil:
		r.best = c
	}
	return false
}

// alarm is told that the client has left. It stands for a connection whose deadline
// is moved.
type alarm struct {
	net.Conn
	rung chan struct{}
}

func (x *alarm) SetDeadline(time.Time) error {
	select {
	case x.rung <- struct{}{}:
	default:
	}
	return nil
}

// race waits for the first answer that is none of a fault.
func (s *session) race(a *action, r *race, wait time.Duration) (*server, bool, error) {
	gone := &alarm{rung: make(chan struct{}, 1)}
	if s.two != nil {
		s.two.wakes(gone)
		if s.left() {
			gone.SetDeadline(time.Time{})
		}
	}
	next := time.NewTimer(wait)
	defer next.Stop()
	for won := false; !won && r.out > 0; {
		select {
		case c := <-r.heard:
			won = r.hear(c)
		case <-next.C:
			if s.onceMore(a, r) {
				next.Reset(wait)
			}
		case <-gone.rung:
			r.end(a, r.all[0])
			return r.all[0].srv, false, errClient
		}
	}
	if r.best == nil {
		r.end(a, r.all[0])
		return r.all[0].srv, false, r.all[0].err
	}
	r.cancel()
	s.racing = r
	a.hedge.Took(r.up.clock.Now(), time.Since(r.asked)) // who is cancelled would have taken longer
	c := r.best
	if c.second {
		a.stats.hedgesWon.Add(1)
	}
	s.at, s.server, s.resp = c.at, c.at.e, c.resp
	if s.two != nil {
		s.two.wakes(c.srv.conn)
	}
	if s.left() {
		return c.srv, false, errClient
	}
	return c.srv, true, nil
}

// end lets go of all contenders but stays, which is the session's. Nobody waits long
// for it: who is not heard yet has been cancelled.
func (r *race) end(a *action, stays *contender) {
	r.cancel()
	a.stats.hedgesCancelled.Add(uint64(r.out))
	for ; r.out > 0; r.out-- {
		<-r.heard
	}
	for _, c := range r.all {
		if c.second {
			r.up.set.EndRetry()
		}
		if c == stays {
			continue
		}
		if c.srv != nil {
			c.srv.close()
		}
		outcome := balance.Cancelled
		switch {
		case !c.heard || errors.Is(c.err, errBusy) || notTaken(c.err) || c.givenUp(r.until) || c.stale():
		case c.err != nil:
			c.at.e.failures.Add(1)
			outcome = balance.Unreachable
		case c.fails():
			outcome = balance.Failure
		}
		c.at.e.active.Add(-1)
		c.at.Done(r.up.clock.Now(), outcome)
	}
}

// decided ends the race of a request that is over.
func (s *session) decided(a *action) {
	if r := s.racing; r != nil {
		s.racing = nil
		r.end(a, r.best)
	}
}
