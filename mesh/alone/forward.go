package alone

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/proxyproto"
)

// Bounds of what one request may cause.
const (
	maxAttempts  = 3  // to reach an endpoint, for a request that was not sent
	maxInterim   = 16 // interim answers before the final one
	maxNominated = 16 // fields a Connection field may name
)

var (
	errTooLarge = errors.New("request body over the limit")
	errInterim  = errors.New("too many interim answers")
	errUnasked  = errors.New("the server changes protocols unasked")
)

// repeatable says whether a request may be sent twice: RFC 9110, section 9.2.2.
func repeatable(method []byte) bool {
	switch string(method) {
	case "GET", "HEAD", "OPTIONS", "PUT", "DELETE":
		return true
	}
	return false
}

// forward passes the request on, to another endpoint if one does not answer and
// the request may go there.
func (s *session) forward(a *action) {
	up := a.choose()
	if a.hedge != nil && s.grpc && a.route.Hedge.Idempotent {
		s.gatherCall()
	}
	if !s.gather() {
		return
	}
	if a.mirror != nil {
		s.reflect(a)
	}
	s.asked = s.asked[:0]
	s.deadline(a)
	hash := s.hash(a)
	var unsent error
	for try, retrying := 1, false; ; {
		at, err := up.pick(hash, s.asked)
		if err != nil {
			if errors.Is(err, balance.ErrTried) && unsent != nil {
				err = unsent
			}
			if retrying {
				up.set.EndRetry()
			}
			s.unavailable(503, err.Error(), "is one of the upstream's endpoints up, and are its limits wide enough?")
			return
		}
		s.at = at
		again, fault := s.attempt(a, up, at.e, false, try < a.attempts)
		if again && errors.Is(fault, errStale) { // nothing is wrong with the endpoint
			again, fault = s.attempt(a, up, at.e, true, try < a.attempts)
		}
		s.at.Done(up.clock.Now(), s.outcome) // of a hedged request maybe another
		s.decided(a)
		if retrying {
			up.set.EndRetry()
			retrying = false
		}
		if !again {
			return
		}
		if errors.Is(fault, errUnsent) {
			unsent = fault
			if s.asked = append(s.asked, at.Host()); len(s.asked) >= max(maxAttempts, a.attempts) {
				s.unavailable(503, fault.Error(), "is one of the upstream's endpoints up?")
				return
			}
			continue
		}
		a.stats.retries.Add(1) // counted into the budget by mayRetry
		try, retrying = try+1, true
		if len(up.endpoints) > len(s.asked)+1 {
			s.asked = append(s.asked, at.Host())
		}
	}
}

// hash is what requests to the same endpoint have in common.
func (s *session) hash(a *action) uint64 {
	switch name, header := strings.CutPrefix(a.route.Hash, "header:"); {
	case header:
		v, _ := s.req.Field(name)
		return balance.Hash(string(v))
	case a.route.Hash != "":
		return balance.Hash(string(s.clientText))
	}
	return 0
}

// mayRetry says whether the route and the upstream's budget allow one more try,
// and counts it in.
func mayRetry(up *upstream, more bool) bool { return more && up.set.Retry() }

// gather waits for a small body: a server is not kept waiting for a slow client,
// and the request can be sent again.
func (s *session) gather() bool {
	if s.req.Framing != http1.Length || s.req.Expect || s.req.Length > int64(blockSize-s.in.hold) {
		return true
	}
	for waited := false; int64(len(s.in.waiting())) < s.req.Length; {
		if !waited {
			s.conn.SetReadDeadline(time.Now().Add(time.Duration(s.world.config.Limits.IdleTimeout)))
			waited = true
		}
		if err := s.in.fill(); errors.Is(err, os.ErrDeadlineExceeded) {
			return s.refuse(408, "request body took too long", "")
		} else if err != nil {
			s.final, s.aborted = true, true
			s.why = "client left inside its request"
			return false
		}
	}
	s.got = s.req.Length
	return true
}

// gathered says whether the whole body is at hand.
func (s *session) gathered() bool {
	return s.body.Ended() || s.req.Framing == http1.Length && s.got == s.req.Length
}

// What became of a request that may be sent again.
var (
	errUnsent = errors.New("not sent")
	errStale  = errors.New("the connection had ended")
	errFault  = errors.New("the server failed")
)

// attempt sends the request to one endpoint and passes the answer back. again
// says that it did not, and that the request may be sent once more; more that the
// route allows it.
func (s *session) attempt(a *action, up *upstream, e *endpoint, fresh, more bool) (again bool, fault error) {
	s.server, s.outcome = e, balance.Unreachable
	safe := repeatable(s.req.Method)
	srv, err := up.connect(context.Background(), e, s.header(), fresh)
	busy := errors.Is(err, errBusy)
	if busy {
		s.outcome = balance.Cancelled
	}
	if busy && !up.two() { // else another endpoint may have a connection with room
		s.refuse(503, err.Error(), "raise connections of the upstream")
		return false, nil
	}
	if err != nil {
		s.why = err.Error()
		return true, fmt.Errorf("%w: %w", errUnsent, err)
	}
	e.requests.Add(1)
	e.active.Add(1)
	defer s.inactive()
	whole := s.gathered()
	if s.two != nil {
		s.two.wakes(srv.conn) // until its connection is put away
		defer s.two.wakes(nil)
	}
	s.cache.asked = time.Now()
	err = s.send(a, up, srv)
	answered := false
	if err == nil && s.mayHedge(a, whole) {
		srv, answered, err = s.hedged(a, srv)
	}
	if err == nil && !answered {
		if err = s.answerHead(srv); err == nil && a.hedge != nil && s.resp.Status < 500 {
			a.hedge.Took(up.clock.Now(), time.Since(s.cache.asked))
		}
	}
	if err != nil {
		return s.failed(srv, err, whole, safe, more)
	}
	if s.outcome = balance.Success; s.resp.Status >= 500 {
		s.outcome = balance.Failure
	}
	if whole && safe && slices.Contains(a.statuses, s.resp.Status) && mayRetry(up, more) {
		srv.close()
		return true, errFault
	}
	if s.cache.on && s.answered(a, srv) {
		return false, nil
	}
	s.changed(a, s.resp.Status) // before the client knows
	s.relay(a, srv)
	return false, nil
}

func (s *session) inactive() { s.at.e.active.Add(-1) }

// failed decides what follows when there is no answer to pass on.
func (s *session) failed(srv *server, err error, whole, safe, more bool) (again bool, fault error) {
	begun := len(srv.in.waiting()) > 0 || srv.in.hold > 0
	unsent := whole && (s.up.sent == 0 || notTaken(err))
	late, givenUp, err := s.over(srv, err)
	s.why, s.outcome = err.Error(), balance.Unreachable
	if begun { // it was reached, and answers what it should not
		s.outcome = balance.Failure
	}
	stale := srv.reused && !begun && srv.broken(err) // that tells nothing of the endpoint
	if givenUp || stale {
		s.outcome = balance.Cancelled
	}
	switch {
	case stale && (unsent || safe && whole):
		return true, errStale
	case unsent && !late:
		if notTaken(err) {
			s.outcome = balance.Cancelled // it is well, and takes no more for now
		}
		return true, errUnsent
	case whole && safe && (!late || s.another(s.action)) && mayRetry(srv.up, more):
		srv.e.failures.Add(1)
		return true, errFault
	case errors.Is(err, errTooLarge):
		s.outcome = balance.Cancelled
		s.refuse(413, err.Error(), "raise body of the route")
	case errors.Is(err, errClient):
		s.final, s.aborted, s.outcome = true, true, balance.Cancelled
	case isRequestSyntax(err):
		s.outcome = balance.Cancelled
		s.refuse(400, err.Error(), "")
	case givenUp:
		s.unavailable(504, "the server did not answer in the time its client gave", "")
	case late:
		srv.e.failures.Add(1)
		s.unavailable(504, "the server did not answer in time", "raise timeout of the route")
	default:
		if !stale {
			srv.e.failures.Add(1)
		}
		s.unavailable(502, "the server's answer: "+err.Error(), "")
	}
	return false, nil
}

// over lets go of a server whose answer is not passed on. It says why that is, and
// whether something was late: for the route, or only for the client.
func (s *session) over(srv *server, err error) (late, givenUp bool, why error) {
	givenUp = s.givenUp(s.action)
	if why = s.stopUpload(srv, err); s.left() {
		why = errClient
	}
	cancelled := givenUp && isCancelled(why) // the server went by the time that it was told
	late = errors.Is(why, os.ErrDeadlineExceeded) || cancelled
	switch givenUp = givenUp && late; {
	case srv.two == nil || !late || cancelled:
	case givenUp:
		srv.two.vain(s.cache.asked, s.tryTime(s.action))
	default:
		srv.two.late(s.began)
	}
	srv.close()
	s.up.drop()
	return late, givenUp, why
}

// header is what the next proxy is told of the client.
func (s *session) header() proxyproto.Header {
	return proxyproto.Header{Source: s.client, Destination: s.local}
}

// answerHead reads the head of the final answer, passing on that the server
// wants the body.
func (s *session) answerHead(srv *server) error {
	for range maxInterim {
		if s.left() { // after the deadlines of srv were set: either is seen
			return errClient
		}
		head, _, err := srv.in.head(maxHead)
		if err != nil {
			return err
		}
		if err := s.resp.Response(head, s.req.Method); err != nil {
			return err
		}
		switch {
		case s.resp.Status == 101:
			if !s.req.Upgrade || s.req.Framing != http1.NoBody {
				return errUnasked
			}
			return nil
		case s.resp.Status >= 200:
			return nil
		case s.resp.Status == 100 && s.req.Expect:
			s.conn.SetWriteDeadline(time.Now().Add(time.Duration(s.world.config.Limits.IdleTimeout)))
			if _, err := s.conn.Write(continued); err != nil {
				return errClient
			}
		}
	}
	return errInterim
}

var continued = []byte("HTTP/1.1 100 Continue\r\n\r\n")
