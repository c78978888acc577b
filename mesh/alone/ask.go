package alone

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/proxyproto"
)

// errand is something to be asked of an upstream that is no request passed on.
type errand struct {
	hash  uint64
	from  proxyproto.Header
	began time.Time
	until time.Time       // the client waits no longer; zero: it does not say
	most  time.Duration   // that the route gives
	to    func(*endpoint) // is told of each endpoint before it is asked
}

// givenUp says that the client's own time is over, and not the route's: that tells
// nothing of the server, which may have been told to give up a little earlier.
func (x *errand) givenUp() bool {
	return !x.until.IsZero() && time.Until(x.until) <= time.Millisecond && time.Since(x.began) < x.most
}

// ask has do speak to an endpoint: to another if one could not be reached, or has not
// looked at what it was sent. do closes or keeps the connection.
func (u *upstream) ask(ctx context.Context, x *errand, do func(*server) error) (err error) {
	var tried []*balance.Host
	for fresh := false; len(tried) < maxAttempts; {
		at, perr := u.pick(x.hash, tried)
		if perr != nil {
			return errors.Join(err, perr)
		}
		x.to(at.e)
		srv, cerr := u.connect(ctx, at.e, x.from, fresh)
		if errors.Is(cerr, errBusy) {
			at.Done(u.clock.Now(), balance.Cancelled)
			return cerr
		}
		if cerr != nil && x.givenUp() {
			at.Done(u.clock.Now(), balance.Cancelled)
			return fmt.Errorf("%w: %w: %w", errUnsent, cerr, context.DeadlineExceeded)
		}
		if cerr != nil {
			at.Done(u.clock.Now(), balance.Unreachable)
			tried, err = append(tried, at.Host()), fmt.Errorf("%w: %w", errUnsent, cerr)
			continue
		}
		at.e.requests.Add(1)
		at.e.active.Add(1)
		err = do(srv)
		if err != nil && ctx.Err() != nil { // whichever side was the first to see that the time is over
			err = errors.Join(err, ctx.Err())
		}
		at.e.active.Add(-1)
		at.Done(u.clock.Now(), x.judged(srv, err))
		switch {
		case errors.Is(err, errStale) && !fresh:
			fresh = true // nothing is wrong with the endpoint
		case err == nil || !notTaken(err):
			return err
		default:
			tried = append(tried, at.Host())
		}
	}
	return err
}

// judged is what an error tells of an endpoint.
func (x *errand) judged(srv *server, err error) balance.Outcome {
	var grpc *grpcError
	var http *httpError
	switch {
	case err == nil, errors.As(err, &grpc) && !failure(grpc.code), errors.As(err, &http) && http.status < 500:
		return balance.Success
	case errors.Is(err, errClient), errors.Is(err, errStale), errors.Is(err, errHeld), notTaken(err),
		srv.reused && !srv.begun && srv.broken(err): // a kept connection had ended, which tells nothing of the endpoint
		return balance.Cancelled
	case x.givenUp():
		if srv.two != nil {
			srv.two.vain(x.began, x.most)
		}
		return balance.Cancelled
	case srv.two != nil && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)):
		srv.two.late(x.began)
	}
	srv.e.failures.Add(1)
	return balance.Failure
}

// ask asks the route's upstream for the request at hand.
func (s *session) ask(ctx context.Context, a *action, do func(*server) error) error {
	x := errand{hash: s.hash(a), from: s.header(), began: s.began, until: s.until, most: time.Duration(a.route.Timeout), to: func(e *endpoint) { s.server = e }}
	return a.choose().ask(ctx, &x, func(srv *server) error {
		if s.two != nil {
			s.two.wakes(srv.conn)
			defer s.two.wakes(nil)
		}
		err := do(srv)
		if s.left() {
			err = errClient
		}
		return err
	})
}
