package alone

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
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
	if !s.gather() {
		return
	}
	if a.mirror != nil {
		s.reflect(a)
	}
	s.asked = s.asked[:0]
	hash := s.hash(a)
	for try, retrying := 1, false; ; {
		at, err := up.pick(hash, s.asked)
		if err != nil {
			if retrying {
				up.set.EndRetry()
			}
			s.refuse(503, err.Error(), "is one of the upstream's endpoints up, and are its limits wide enough?")
			return
		}
		again, fault := s.attempt(a, up, at.e, false, try < a.attempts)
		if again && errors.Is(fault, errStale) { // nothing is wrong with the endpoint
			again, fault = s.attempt(a, up, at.e, true, try < a.attempts)
		}
		at.Done(up.clock.Now(), s.outcome)
		if retrying {
			up.set.EndRetry()
			retrying = false
		}
		if !again {
			return
		}
		if errors.Is(fault, errUnsent) {
			if s.asked = append(s.asked, at.Host()); len(s.asked) >= max(maxAttempts, a.attempts) {
				s.refuse(503, fault.Error(), "is one of the upstream's endpoints up?")
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
	srv, err := up.connect(context.Background(), e, s.header(), fresh, !safe || !s.gathered())
	if errors.Is(err, errBusy) {
		s.outcome = balance.Cancelled
		s.refuse(503, err.Error(), "raise connections of the upstream")
		return false, nil
	}
	if err != nil {
		s.why = err.Error()
		return true, fmt.Errorf("%w: %w", errUnsent, err)
	}
	e.requests.Add(1)
	e.active.Add(1)
	defer e.active.Add(-1)
	whole := s.gathered()
	err = s.send(a, up, srv)
	if err == nil {
		err = s.answerHead(srv)
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
	s.relay(a, srv)
	return false, nil
}

// failed decides what follows when there is no answer to pass on.
func (s *session) failed(srv *server, err error, whole, safe, more bool) (again bool, fault error) {
	begun := len(srv.in.waiting()) > 0 || srv.in.hold > 0
	unsent := whole && s.up.sent == 0
	err = s.stopUpload(srv, err)
	srv.close()
	s.up.drop()
	s.why, s.outcome = err.Error(), balance.Unreachable
	if begun { // it was reached, and answers what it should not
		s.outcome = balance.Failure
	}
	switch late := errors.Is(err, os.ErrDeadlineExceeded); {
	case srv.reused && !begun && ended(err) && (unsent || safe && whole):
		return true, errStale
	case unsent && !late:
		return true, errUnsent
	case whole && safe && !late && mayRetry(srv.up, more):
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
	case late:
		srv.e.failures.Add(1)
		s.refuse(504, "the server did not answer in time", "raise timeout of the route")
	default:
		srv.e.failures.Add(1)
		s.refuse(502, "the server's answer: "+err.Error(), "")
	}
	return false, nil
}

// header is what the next proxy is told of the client.
func (s *session) header() proxyproto.Header {
	return proxyproto.Header{Source: s.client, Destination: s.local}
}

// send writes the request. A body that is not at hand is passed on while the
// answer is waited for.
func (s *session) send(a *action, up *upstream, srv *server) error {
	s.up.w, s.up.sent = srv.conn, 0
	whole := s.gathered()
	now := time.Now()
	if whole {
		srv.conn.SetDeadline(now.Add(time.Duration(a.route.Timeout)))
	} else {
		srv.conn.SetReadDeadline(now.Add(s.streamTime()))
		srv.conn.SetWriteDeadline(now.Add(time.Duration(a.route.Timeout)))
	}
	b, err := s.appendHead(s.up.buffer(), a, up, whole)
	if err != nil {
		return err
	}
	if err := s.up.kept(b); err != nil {
		return err
	}
	if s.req.Framing == http1.Length && whole {
		if err := s.up.write(s.in.waiting()[:s.req.Length]); err != nil {
			return err
		}
	}
	if err := s.up.flush(); err != nil {
		return err
	}
	s.up.drop()
	if !whole {
		done := make(chan error, 1)
		s.upload = done
		go s.sendBody(a, srv, done)
	}
	return nil
}

// appendHead appends the head of the request as the server gets it.
func (s *session) appendHead(b []byte, a *action, up *upstream, whole bool) ([]byte, error) {
	m := &s.req
	b = append(append(b, m.Method...), ' ')
	if _, path, query := http1.SplitTarget(m.Target); a.rewrite == nil {
		b = append(append(b, path...), query...)
	} else {
		b = a.rewrite.Append(b, &s.route)
		if !a.rewrite.HasQuery() {
			b = append(b, query...)
		}
	}
	b = append(b, " HTTP/1.1\r\nHost: "...)
	switch {
	case a.route.Host != "":
		b = append(b, a.route.Host...)
	case len(m.Host) > 0:
		b = append(b, m.Host...)
	default:
		b = append(b, up.name...)
	}
	b = append(b, "\r\n"...)
	lists, err := s.nominated(m)
	if err != nil {
		return nil, err
	}
	for i := range m.Fields {
		f := &m.Fields[i]
		if hopByHop(f.Name) || forwarded(f.Name) || a.toServer.drops(f.Name) || inList(lists, f.Name) || equalFold(f.Name, "host") ||
			whole && equalFold(f.Name, "expect") {
			continue
		}
		b = appendRaw(b, f)
	}
	b = s.appendForwarded(b)
	b = s.appendEdits(b, &a.toServer)
	switch {
	case m.Framing == http1.Length:
		b = append(strconv.AppendInt(append(b, "Content-Length: "...), m.Length, 10), "\r\n"...)
	case m.Framing == http1.Chunked:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	if m.Upgrade && m.Framing == http1.NoBody {
		v, _ := m.Field("Upgrade")
		b = append(append(append(b, "Connection: Upgrade\r\nUpgrade: "...), v...), "\r\n"...)
	}
	return append(b, "\r\n"...), nil
}

func appendRaw(b []byte, f *http1.Field) []byte {
	b = append(append(b, f.Name...), ": "...)
	return append(append(b, f.Value...), "\r\n"...)
}

// appendForwarded says who asks; what the client said of it is not passed on.
func (s *session) appendForwarded(b []byte) []byte {
	b = append(append(b, "X-Forwarded-For: "...), s.clientText...)
	b = append(append(b, "\r\nX-Forwarded-Proto: "...), s.route.Scheme...)
	b = append(append(b, "\r\nX-Forwarded-Host: "...), s.req.Host...)
	return append(b, "\r\n"...)
}

// hopByHop fields are about one connection; the proxy writes its own.
func hopByHop(name []byte) bool {
	switch len(name) {
	case 2:
		return equalFold(name, "te")
	case 7:
		return equalFold(name, "upgrade") || equalFold(name, "trailer")
	case 10:
		return equalFold(name, "connection") || equalFold(name, "keep-alive")
	case 14:
		return equalFold(name, "content-length")
	case 16:
		return equalFold(name, "proxy-connection")
	case 17:
		return equalFold(name, "transfer-encoding")
	case 18:
		return equalFold(name, "proxy-authenticate")
	case 19:
		return equalFold(name, "proxy-authorization")
	}
	return false
}

// forwarded fields say who asks. Servers that make variables of names take an
// underscore for a hyphen.
func forwarded(name []byte) bool {
	switch len(name) {
	case 9:
		return equalFold(name, "forwarded") || hyphenated(name, "x-real-ip")
	case 15:
		return hyphenated(name, "x-forwarded-for")
	case 16:
		return hyphenated(name, "x-forwarded-host") || hyphenated(name, "x-forwarded-port")
	case 17:
		return hyphenated(name, "x-forwarded-proto")
	}
	return false
}

func hyphenated(name []byte, want string) bool {
	for i, c := range name {
		if c == '_' {
			c = '-'
		}
		if c|0x20 != want[i]|0x20 {
			return false
		}
	}
	return true
}

// nominated is what Connection fields name beside what everyone knows.
func (s *session) nominated(m *http1.Message) ([][]byte, error) {
	s.named = s.named[:0]
	for i := range m.Fields {
		if !equalFold(m.Fields[i].Name, "connection") {
			continue
		}
		for v, more := m.Fields[i].Value, true; more; {
			var t []byte
			t, v, more = cut(v, ',')
			t = trim(t)
			if len(t) == 0 || equalFold(t, "close") || equalFold(t, "keep-alive") || equalFold(t, "upgrade") {
				continue
			}
			if len(s.named) == maxNominated {
				return nil, errNominated
			}
			s.named = append(s.named, t)
		}
	}
	return s.named, nil
}

var errNominated = errors.New("the field Connection names too many others")

func inList(list [][]byte, name []byte) bool {
	for _, t := range list {
		if len(t) == len(name) && hyphenFold(t, name) {
			return true
		}
	}
	return false
}

func hyphenFold(a, b []byte) bool {
	for i := range a {
		if a[i] != b[i] && a[i]|0x20 != b[i]|0x20 {
			return false
		}
	}
	return true
}

// answerHead reads the head of the final answer, passing on that the server
// wants the body.
func (s *session) answerHead(srv *server) error {
	for range maxInterim {
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
	srv.conn.SetReadDeadline(time.Now().Add(time.Duration(a.route.Timeout)))
	done <- err
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
	for !s.body.Ended() {
		data, n, err := s.body.Next(s.in.waiting())
		s.in.at += n
		if err != nil {
			return requestSyntax{err}
		}
		if len(data) > 0 {
			if s.got += int64(len(data)); s.got > int64(a.route.Body) {
				return errTooLarge
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
		srv.conn.SetWriteDeadline(now.Add(timeout))
		if err := s.up.flush(); err != nil {
			return err
		}
		s.conn.SetReadDeadline(now.Add(idle))
		if err := s.in.fill(); err != nil {
			return fmt.Errorf("%w inside its request: %w", errClient, err)
		}
	}
	if s.req.Framing == http1.Chunked {
		if err := s.up.write(last); err != nil {
			return err
		}
	}
	return s.up.flush()
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
		s.final, s.aborted = true, true
		s.why = s.stopUpload(srv, err).Error()
		s.up.drop()
		srv.close()
		return
	}
	// The client has what it waits for before the connection is put away.
	if s.out.flush() != nil {
		s.final, s.aborted = true, true
	}
	whole := s.settleUpload(srv)
	s.up.drop()
	if s.resp.Close || !whole {
		srv.close()
	} else {
		srv.keep(s.began)
	}
	if s.gathered() && s.req.Framing == http1.Length && !s.body.Ended() {
		_, n, _ := s.body.Next(s.in.waiting())
		s.in.at += n
	}
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
	default:
		s.final = true
	}
	return chunked, s.out.kept(s.endHead(b))
}

// endHead ends the head of an answer that is passed on: what is left of a body
// at hand is known to be read.
func (s *session) endHead(b []byte) []byte {
	if s.p.stopping.Load() {
		s.final = true
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
	s.conn.SetWriteDeadline(now.Add(time.Duration(s.world.config.Limits.IdleTimeout)))
	if c != nil && srv.in.end < blockSize {
		if err := c.pass(); err != nil {
			return fmt.Errorf("%w: %w", errClient, err)
		}
	}
	if err := s.out.flush(); err != nil {
		return fmt.Errorf("%w: %w", errClient, err)
	}
	over, err := s.uploaded()
	if err != nil {
		return err
	}
	if over {
		srv.conn.SetReadDeadline(now.Add(time.Duration(a.route.Timeout)))
	}
	err = srv.in.fill()
	if err == io.EOF {
		return s.back.End()
	}
	return err
}
