package alone

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
)

// errClient is a fault of the client's connection.
var errClient = errors.New("client left")

// requestSyntax is a body that is not framed as it should be.
type requestSyntax struct{ error }

func (r requestSyntax) Unwrap() error { return r.error }

func isRequestSyntax(err error) bool {
	var r requestSyntax
	return errors.As(err, &r)
}

// sendBody passes the body on beside who waits for the answer. That one is woken by
// a fault, and must then find it in done; the deadline of a connection that stays
// is set before, for afterwards it may serve another request.
func (s *session) sendBody(a *action, srv *server, done chan<- error) {
	err := s.passBody(a, srv)
	if wakes(err) {
		done <- err
		srv.conn.SetDeadline(time.Unix(1, 0))
		return
	}
	// A server that takes no more may still have answered.
	s.passed.Store(true) // first: who moves the deadline looks at it after
	srv.conn.SetReadDeadline(s.within(time.Now(), s.answerTime(a, true)))
	done <- err
}

// answerTime is how long nothing of the answer may come. A call may say nothing for
// long, and nobody answers before the body is there.
func (s *session) answerTime(a *action, uploaded bool) time.Duration {
	if s.grpc || !uploaded {
		return s.streamTime()
	}
	return time.Duration(a.route.Timeout)
}

// ofClient says whether a fault is of the request rather than of the server.
func ofClient(err error) bool {
	return errors.Is(err, errTooLarge) || errors.Is(err, errClient) || isRequestSyntax(err)
}

// wakes says whether a fault of a body ends the wait for its answer.
func wakes(err error) bool { return ofClient(err) || errors.Is(err, os.ErrDeadlineExceeded) }

// uploaded says whether the body is not passed on any more, and the fault that
// ends the answer too. What became of the body stays to be asked again.
func (s *session) uploaded() (over bool, fault error) {
	if s.upload == nil {
		return true, nil
	}
	select {
	case err := <-s.upload:
		s.upload <- err // there is room: its sender sends once
		if wakes(err) {
			return true, err
		}
		return true, nil
	default:
		return false, nil
	}
}

// passBody passes the body on as it comes.
func (s *session) passBody(a *action, srv *server) error {
	idle, timeout := time.Duration(s.world.config.Limits.IdleTimeout), time.Duration(a.route.Timeout)
	if s.grpc { // a call may say nothing for long
		idle = s.streamTime()
	}
	for !s.body.Ended() {
		data, n, err := s.body.Next(s.in.waiting())
		s.in.at += n
		if err != nil {
			return requestSyntax{err}
		}
		if len(data) > 0 {
			if s.got += int64(len(data)); s.got > s.longest(a) {
				return errTooLarge
			}
			if s.req.Framing == http1.Length && s.body.Ended() {
				if err := s.passTrailers(a, srv, idle); err != nil {
					return err
				}
			}
			if err := s.passPart(data); err != nil {
				return err
			}
			continue
		}
		if s.body.Ended() {
			break
		}
		now := time.Now()
		srv.conn.SetWriteDeadline(s.within(now, timeout))
		if s.grpc { // a call that is sent to is not quiet
			srv.conn.SetReadDeadline(s.within(now, idle))
		}
		if s.stopped.Load() { // whose deadlines those above may have replaced
			return os.ErrDeadlineExceeded
		}
		if err := s.up.flush(); err != nil {
			return err
		}
		err = s.moreBody(now, idle)
		if err == io.EOF && s.body.End() == nil {
			break
		}
		if err != nil {
			return fmt.Errorf("%w inside its request: %w", errClient, err)
		}
	}
	if s.req.Framing == http1.Chunked {
		if err := s.passTrailers(a, srv, idle); err != nil {
			return err
		}
		if err := s.up.write(last); err != nil {
			return err
		}
	}
	return s.up.flush()
}

// moreBody waits for more of the body. A call's client may be silent for as long as
// it is answered.
func (s *session) moreBody(since time.Time, idle time.Duration) error {
	for {
		s.conn.SetReadDeadline(since.Add(idle))
		if s.stopped.Load() {
			return os.ErrDeadlineExceeded
		}
		err := s.in.fill()
		moved := time.Unix(0, s.moved.Load())
		if !s.grpc || !errors.Is(err, os.ErrDeadlineExceeded) || !moved.After(since) {
			return err
		}
		since = moved
	}
}

// passTrailers has what ends the client's stream end the server's. The end of a body
// that has told its length may come later than its last byte.
func (s *session) passTrailers(a *action, srv *server, idle time.Duration) error {
	if s.two == nil || srv.two == nil {
		return nil
	}
	s.two.SetReadDeadline(time.Now().Add(idle))
	if s.stopped.Load() {
		return os.ErrDeadlineExceeded
	}
	after, err := s.two.ending()
	if err != nil {
		return fmt.Errorf("%w inside its request: %w", errClient, err)
	}
	srv.two.after = permitted(after, &a.toServer, true)
	return nil
}

// permitted are the trailers that are passed on: they say nothing that a head may not.
// A client is not asked who asks.
func permitted(fields []http2.Field, by *edits, toServer bool) []http2.Field {
	refused := func(f http2.Field) bool {
		name := []byte(f.Name)
		return hopByHop(name) || toServer && forwarded(name) || by.drops(name)
	}
	if !slices.ContainsFunc(fields, refused) {
		return fields
	}
	return slices.DeleteFunc(slices.Clone(fields), refused) // which stay trailers, if none are left
}

func (s *session) passPart(data []byte) error {
	if s.req.Framing == http1.Chunked {
		return writeChunk(&s.up, data)
	}
	return s.up.write(data)
}

// stopUpload ends the passing on of a body, and tells what was first: its fault,
// or that of the answer.
func (s *session) stopUpload(srv *server, err error) error {
	if s.upload == nil {
		return err
	}
	select {
	case fault := <-s.upload:
		if ofClient(fault) {
			err = fault
		}
	default:
		s.stopped.Store(true) // first: the body's deadlines may be set meanwhile
		s.conn.SetReadDeadline(time.Unix(1, 0))
		srv.conn.SetDeadline(time.Unix(1, 0))
		<-s.upload
	}
	s.upload, s.final = nil, true
	return err
}

// settleUpload waits for the body to be passed on whole, for a moment after the
// answer: servers may answer without reading it.
func (s *session) settleUpload(srv *server) (whole bool) {
	if s.upload == nil {
		return true
	}
	if s.two != nil && srv.two != nil { // streams end by themselves
		select {
		case err := <-s.upload:
			s.upload = nil
			return err == nil
		default:
		}
		s.stopUpload(srv, nil)
		return false
	}
	wait := time.NewTimer(lingerTime)
	defer wait.Stop()
	select {
	case err := <-s.upload:
		s.upload = nil
		if err != nil {
			s.final = true
		}
		return err == nil
	case <-wait.C:
	}
	s.stopUpload(srv, nil)
	return false
}
