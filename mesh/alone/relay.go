package alone

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
)

// relay passes the answer back.
func (s *session) relay(a *action, srv *server) {
	if s.resp.Status == 101 {
		s.tunnel(a, srv)
		return
	}
	z := s.squeezes(a)
	chunked, err := s.relayHead(a, z)
	if err == nil {
		err = s.relayBody(a, srv, z, chunked)
	}
	if err != nil {
		if s.out.sent == 0 && !errors.Is(err, errClient) {
			s.out.n, s.status = 0, 0 // nothing has left yet: say it properly
			s.failed(srv, err, false, false, false)
			return
		}
		late := s.lateCall()
		s.final, s.aborted = true, !late
		s.why = s.stopUpload(srv, err).Error()
		if s.left() {
			s.why, s.outcome = errClient.Error(), balance.Cancelled
		}
		s.up.drop()
		srv.close()
		return
	}
	if s.settled(a, srv) == nil || !s.lateCall() {
		s.trailers(srv)
	}
	s.store(a)
	// The client has what it waits for before the connection is put away.
	if s.flush() != nil {
		s.final, s.aborted = true, true
	}
	whole := s.settleUpload(srv)
	s.up.drop()
	if s.resp.Close || !whole {
		srv.close()
	} else {
		s.putAway(srv)
	}
	if s.gathered() && s.req.Framing == http1.Length && !s.body.Ended() {
		_, n, _ := s.body.Next(s.in.waiting())
		s.in.at += n
	}
}

// settled waits for the end of an answer that has told its length and whose last byte
// has come: trailers may follow. What is not seen to end is not stored.
func (s *session) settled(a *action, srv *server) error {
	if srv.two == nil || s.two == nil && !s.cache.storing {
		return nil
	}
	if _, whole := srv.two.arrived(); whole {
		return nil
	}
	now := time.Now()
	err := s.pass(now)
	if err == nil {
		err = s.awaits(a, srv, now)
	}
	if err == nil {
		if s.two == nil { // which can be told nothing more, and may ask again
			srv.conn.SetReadDeadline(now.Add(lingerTime))
		}
		_, err = srv.two.ending()
	}
	if err != nil {
		s.cache.storing = false
	}
	return err
}

// putAway has another request use a connection. Whoever waits for the client from
// here on, the connection is not woken for it any more.
func (s *session) putAway(srv *server) {
	if s.two != nil {
		s.two.wakes(nil)
	}
	srv.keep(s.began)
}

// squeezes says whether the answer is to be compressed.
func (s *session) squeezes(a *action) bool {
	if a.route.Gzip == nil || s.resp.Framing == http1.NoBody {
		return false
	}
	if _, coded := s.resp.Field("Content-Encoding"); coded {
		return false
	}
	if c, ok := s.resp.Field("Cache-Control"); ok && containsFold(c, "no-transform") {
		return false
	}
	length := int64(-1)
	if s.resp.Framing == http1.Length {
		length = s.resp.Length
	}
	kind, _ := s.resp.Field("Content-Type")
	return s.compression(a, string(kind), length, s.resp.Status == 200)
}

func containsFold(b []byte, word string) bool {
	for i := 0; i+len(word) <= len(b); i++ {
		if equalFold(b[i:i+len(word)], word) {
			return true
		}
	}
	return false
}

// relayHead writes the head of the answer as the client gets it.
func (s *session) relayHead(a *action, z bool) (chunked bool, err error) {
	m := &s.resp
	s.status = m.Status
	s.conn.SetWriteDeadline(time.Now().Add(time.Duration(s.world.config.Limits.IdleTimeout)))
	b := append(s.out.buffer(), "HTTP/1.1 "...)
	b = append(strconv.AppendInt(b, int64(m.Status), 10), ' ')
	b = append(append(b, m.Reason...), "\r\n"...)
	if b, err = s.appendAnswer(b, a, z); err != nil {
		return false, err
	}
	switch {
	case m.Framing == http1.NoBody:
		if length, ok := m.Field("Content-Length"); ok && m.Status != 204 {
			b = append(append(append(b, "Content-Length: "...), length...), "\r\n"...)
		}
	case m.Framing == http1.Length && !z:
		b = append(strconv.AppendInt(append(b, "Content-Length: "...), m.Length, 10), "\r\n"...)
	case s.req.Minor == 1:
		chunked = true
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	case s.req.Minor == 0:
		s.final = true
	}
	return chunked, s.out.kept(s.endHead(b))
}

// endHead ends the head of an answer that is passed on: what is left of a body
// at hand is known to be read.
func (s *session) endHead(b []byte) []byte {
	if s.parts() {
		s.final = true
	}
	if s.two != nil { // the connection says itself when it ends
		return append(b, "\r\n"...)
	}
	if s.final {
		b = append(b, "Connection: close\r\n"...)
	} else if s.req.Minor == 0 {
		b = append(b, "Connection: keep-alive\r\n"...)
	}
	return append(b, "\r\n"...)
}

// appendAnswer appends the fields of the answer and those of the route.
func (s *session) appendAnswer(b []byte, a *action, z bool) ([]byte, error) {
	lists, err := s.nominated(&s.resp)
	if err != nil {
		return nil, err
	}
	for i := range s.resp.Fields {
		f := &s.resp.Fields[i]
		if hopByHop(f.Name) || a.toClient.drops(f.Name) || inList(lists, f.Name) || z && equalFold(f.Name, "accept-ranges") {
			continue
		}
		if z && equalFold(f.Name, "etag") && len(f.Value) > 0 && f.Value[0] == '"' {
			b = append(append(append(b, "ETag: W/"...), f.Value...), "\r\n"...)
			continue
		}
		b = appendRaw(b, f)
	}
	if z {
		b = append(b, "Content-Encoding: gzip\r\n"...)
	}
	if a.route.Gzip != nil {
		b = append(b, "Vary: Accept-Encoding\r\n"...)
	}
	b = append(b, s.extra...)
	return s.appendEdits(b, &a.toClient), nil
}

// relayBody passes the body of the answer back as it comes.
func (s *session) relayBody(a *action, srv *server, z, chunked bool) error {
	s.back.Start(s.resp.Framing, s.resp.Length)
	var c *compressor
	if z {
		c = s.compressor(a)
		defer c.drop()
	}
	for !s.back.Ended() {
		data, n, err := s.back.Next(srv.in.waiting())
		srv.in.at += n
		switch {
		case err != nil:
			return err
		case len(data) > 0:
			if s.cache.storing {
				s.keepPart(a, data)
			}
			if err := s.relayPart(data, c, chunked); err != nil {
				return fmt.Errorf("%w: %w", errClient, err)
			}
		case !s.back.Ended():
			if err := s.more(a, srv, c); err != nil {
				return err
			}
		}
	}
	switch {
	case c != nil:
		return c.close()
	case chunked:
		return s.out.write(last)
	}
	return nil
}

func (s *session) relayPart(data []byte, c *compressor, chunked bool) error {
	switch {
	case c != nil:
		_, err := c.Write(data)
		return err
	case chunked:
		return writeChunk(&s.out, data)
	}
	return s.out.write(data)
}

// more sends what there is and waits for more of the answer.
func (s *session) more(a *action, srv *server, c *compressor) error {
	now := time.Now()
	if c != nil && srv.in.end < blockSize {
		if err := c.pass(); err != nil {
			return fmt.Errorf("%w: %w", errClient, err)
		}
	}
	err := s.pass(now)
	if err == nil {
		err = s.awaits(a, srv, now)
	}
	if err != nil {
		return err
	}
	err = srv.in.fill()
	if err == io.EOF {
		return s.back.End()
	}
	return err
}

// pass sends what there is.
func (s *session) pass(now time.Time) error {
	s.moved.Store(now.UnixNano())
	s.conn.SetWriteDeadline(now.Add(time.Duration(s.world.config.Limits.IdleTimeout)))
	if err := s.out.flush(); err != nil {
		return fmt.Errorf("%w: %w", errClient, err)
	}
	return nil
}

// awaits says until when more of the answer is waited for.
func (s *session) awaits(a *action, srv *server, now time.Time) error {
	over, err := s.uploaded()
	if err != nil {
		return err
	}
	srv.conn.SetReadDeadline(s.within(now, s.answerTime(a, over)))
	if !over { // it may have ended since, and its deadline is overwritten
		if s.passed.Load() {
			srv.conn.SetReadDeadline(s.within(now, s.answerTime(a, true)))
		}
		if _, err := s.uploaded(); err != nil {
			return err
		}
	}
	if s.left() {
		return errClient
	}
	return nil
}
