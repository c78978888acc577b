package alone

import (
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/transcode"
)

const (
	maxReason = 64 << 10 // bytes of an answer that says why it is none
	acceptsJ  = "Accept: application/json\r\nAccept-Encoding: identity\r\n"
)

// httpError is what a server of HTTP says of a request that failed.
type httpError struct {
	status int
	text   string // of the server's; may be empty
}

func (e *httpError) Error() string {
	if e.text == "" {
		return fmt.Sprintf("the server answers status %d", e.status)
	}
	return fmt.Sprintf("the server answers status %d: %.512s", e.status, e.text)
}

// What is wrong with a good answer.
var (
	errAnswer  = errors.New("the server's answer")
	errTooLong = errors.New("its body is too long")
)

// grpcOf is what a status of HTTP is in gRPC where it says nothing else, as its
// http-grpc-status-mapping.md has it.
func grpcOf(status int) int {
	switch status {
	case 400:
		return 13
	case 401:
		return 16
	case 403:
		return 7
	case 404:
		return 12
	case 429, 502, 503, 504:
		return 14
	}
	return 2
}

// callJSON makes a request in JSON of a call of gRPC, and the answer of the call's.
func (s *session) callJSON(a *action) {
	s.deadline(a)
	path := string(s.route.Path)
	m := a.schema.Method(path)
	kind, _ := s.req.Field("Content-Type")
	coding, coded := s.req.Field("Grpc-Encoding")
	switch {
	case m == nil:
		s.answerGRPC(12, "the schema of the route has no method "+path)
		return
	case m.ClientStreams || m.ServerStreams:
		s.answerGRPC(12, path+" streams, which one request in JSON cannot")
		return
	case !isProto(kind), coded && string(coding) != "identity":
		s.answerGRPC(12, fmt.Sprintf("a message of %.64q in %.64q; it is read as application/grpc+proto, not compressed", kind, coding))
		return
	}
	defer s.giveBytes()
	body, ok := s.whole(a)
	if !ok {
		return
	}
	if len(body) < grpcPrefix || body[0] != 0 || uint64(binary.BigEndian.Uint32(body[1:])) != uint64(len(body)-grpcPrefix) {
		s.refuse(400, "the body of the call is not one message, not compressed", "")
		return
	}
	q, err := a.schema.Ask(m, body[grpcPrefix:], a.loose, maxAnswerJ)
	if err != nil {
		s.why = err.Error()
		s.answerGRPC(map[bool]int{true: 8, false: 3}[errors.Is(err, transcode.ErrTooLarge)], err.Error())
		return
	}
	if !s.takeBytes(len(q.Target) + len(q.Body)) {
		s.refuseHeld()
		return
	}
	answer, message, err := s.askJSON(a, q)
	var said *httpError
	switch {
	case err == nil:
		s.answerCall(a, answer, message)
	case errors.As(err, &said):
		s.why = err.Error()
		s.answerGRPC(grpcOf(said.status), err.Error())
	case errors.Is(err, errAnswer):
		s.refuse(500, err.Error(), "")
	case s.expired() && !errors.Is(err, errClient):
		s.refuse(504, "the server did not answer in the time its client gave", "")
	default:
		s.callFailed(err)
	}
}

// isProto says whether a message of gRPC is one of protobuf.
func isProto(kind []byte) bool {
	kind, _, _ = cut(kind, ';')
	kind = trim(kind)
	return equalFold(kind, "application/grpc") || equalFold(kind, "application/grpc+proto")
}

// askJSON sends the request with the metadata of the call, and reads the message of
// its answer.
func (s *session) askJSON(a *action, q *transcode.Request) (answer *http1.Message, message []byte, err error) {
	ctx, cancel := context.WithDeadline(context.Background(), s.within(time.Now(), time.Duration(a.route.Timeout)))
	defer cancel()
	head := append(append(append(append([]byte(q.Method), ' '), q.Target...), " HTTP/1.1\r\nHost: "...), a.route.Host...)
	if a.route.Host == "" {
		head = append(head, s.req.Host...)
	}
	if head, err = s.appendFields(append(head, "\r\n"+acceptsJ...), a); err != nil {
		return nil, nil, err
	}
	if name := a.route.Deadline; name != "" && !s.until.IsZero() {
		left := max(time.Until(s.until).Milliseconds(), 1)
		head = appendField(head, name, strconv.FormatInt(left, 10))
	}
	if !s.until.IsZero() { // servers that are made for gRPC's clients know it
		head = appendTimeout(append(head, "Grpc-Timeout: "...), time.Until(s.until))
	}
	x := &exchangeJSON{method: q.Method, head: endJSON(head, q.Method, q.Body), sent: q.Body, left: s.left, held: &s.p.answers}
	if !s.takeBytes(len(x.head)) {
		return nil, nil, errHeld
	}
	defer x.free()
	err = s.ask(ctx, a, func(srv *server) error {
		if err := x.with(ctx, srv); err != nil {
			srv.close()
			return err
		}
		if x.answer.Close {
			srv.close()
		} else {
			s.putAway(srv)
		}
		return x.failed()
	})
	if err == nil {
		if message, err = q.AppendAnswer(make([]byte, grpcPrefix), x.body); err == nil && len(message) > grpcPrefix+maxCall {
			err = fmt.Errorf("a message of over %d bytes", maxCall)
		}
		if err != nil {
			err = fmt.Errorf("%w: %w", errAnswer, err)
		} else if !s.takeBytes(len(message)) { // until the client has read it
			err = errHeld
		}
	}
	return &x.answer, message, err
}

// answerCall answers a call with a message, which has room for its prefix, and the
// fields of the server's answer as metadata.
func (s *session) answerCall(a *action, m *http1.Message, message []byte) {
	lists, err := s.nominated(m)
	if err != nil {
		s.refuse(502, err.Error(), "")
		return
	}
	b := s.begin(200)
	b = appendField(b, "Content-Type", "application/grpc")
	for i := range m.Fields {
		f := &m.Fields[i]
		if !hopByHop(f.Name) && !ofAnswer(f.Name) && !a.toClient.drops(f.Name) && !inList(lists, f.Name) && !badBinary(f) {
			b = appendRaw(b, f)
		}
	}
	binary.BigEndian.PutUint32(message[1:], uint32(len(message)-grpcPrefix))
	s.code, s.after = 0, []http2.Field{{Name: "grpc-status", Value: "0"}}
	err = s.out.kept(s.finish(b, -1))
	for part := range slices.Chunk(message, piece) {
		if err == nil {
			s.conn.SetWriteDeadline(s.within(time.Now(), time.Duration(s.world.config.Limits.IdleTimeout)))
			err = s.out.write(part)
		}
	}
	if err != nil {
		s.final, s.aborted, s.why = true, true, err.Error()
	}
}

// ofAnswer fields tell of the body that was, are written by the proxy, or are
// gRPC's own.
func ofAnswer(name []byte) bool {
	return equalFold(name, "date") || ofBody(name)
}

func ofBody(name []byte) bool {
	const content, grpc = "content-", "grpc-"
	return len(name) >= len(content) && equalFold(name[:len(content)], content) || len(name) >= len(grpc) && equalFold(name[:len(grpc)], grpc) ||
		equalFold(name, "accept-ranges")
}

// badBinary says that a field has a name for bytes and no value of bytes: clients of
// gRPC give up a call for that.
func badBinary(f *http1.Field) bool {
	const bin = "-bin"
	if n := len(f.Name) - len(bin); n < 0 || !equalFold(f.Name[n:], bin) {
		return false
	}
	_, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(string(f.Value), "="))
	return err != nil
}

// appendJSON ends the head of a request and puts its body behind. nil is none.
func appendJSON(head []byte, method string, body []byte) []byte {
	return append(endJSON(head, method, body), body...)
}

// endJSON ends the head of a request with that body.
func endJSON(head []byte, method string, body []byte) []byte {
	switch {
	case body != nil:
		head = append(head, "Content-Type: application/json\r\nContent-Length: "...)
		head = append(strconv.AppendInt(head, int64(len(body)), 10), "\r\n"...)
	case method != "GET" && method != "DELETE":
		head = append(head, "Content-Length: 0\r\n"...)
	}
	return append(head, "\r\n"...)
}

// exchangeJSON is a request to a server of JSON, with its answer.
type exchangeJSON struct {
	method string
	head   []byte
	sent   []byte      // the body, if it is not behind the head
	left   func() bool // nobody waits for the answer any more; nil: somebody does
	held   *holding    // what is read is counted there
	answer http1.Message
	body   []byte
	taken  int // of held
}

func (x *exchangeJSON) free() {
	x.held.give(x.taken)
	x.taken = 0
}

// with sends the request and reads its answer whole. With errStale nobody has looked
// at it.
func (x *exchangeJSON) with(ctx context.Context, srv *server) error {
	x.free()
	x.body = nil
	until, _ := ctx.Deadline()
	srv.conn.SetDeadline(until)
	stop := context.AfterFunc(ctx, func() { srv.conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		if !stop() { // whoever had the connection next could be cut off
			x.answer.Close = true
		}
	}()
	if x.left != nil && x.left() { // after the deadline was set: either is seen
		return errClient
	}
	parts := net.Buffers{x.head}
	if len(x.sent) > 0 {
		parts = append(parts, x.sent)
	}
	_, err := parts.WriteTo(srv.conn)
	if err == nil {
		err = x.read(srv)
	}
	begun := len(srv.in.waiting()) > 0 || srv.in.hold > 0
	if err != nil && srv.two == nil && srv.reused && !begun && ended(err) && repeatable([]byte(x.method)) {
		err = fmt.Errorf("%w: %w", errStale, err)
	}
	return err
}

func (x *exchangeJSON) read(srv *server) error {
	for i := 0; ; i++ {
		head, _, err := srv.in.head(maxHead)
		if err == nil {
			x.answer = http1.Message{}
			err = x.answer.Response(slices.Clone(head), []byte(x.method))
		}
		switch {
		case err != nil:
			return err
		case x.answer.Status == 101:
			return errUnasked
		case i == maxInterim:
			return errInterim
		}
		if x.answer.Status >= 200 {
			break
		}
	}
	var p http1.Payload
	p.Start(x.answer.Framing, x.answer.Length)
	for !p.Ended() {
		data, n, err := p.Next(srv.in.waiting())
		srv.in.at += n
		if err == nil && len(data) > 0 {
			err = x.add(data)
		}
		if errors.Is(err, errTooLong) && x.answer.Status > 299 { // it is none, whatever else it says
			x.body, x.answer.Close = nil, true
			return nil
		}
		if err != nil {
			return err
		}
		if len(data) > 0 || p.Ended() {
			continue
		}
		if err := srv.in.fill(); err == io.EOF && p.End() == nil {
			x.answer.Close = true
			return nil
		} else if err == io.EOF {
			return io.ErrUnexpectedEOF
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (x *exchangeJSON) add(data []byte) error {
	limit := maxCall
	if x.answer.Status > 299 {
		limit = maxReason
	}
	if len(x.body)+len(data) > limit {
		return fmt.Errorf("%w: %w: over %d bytes", errAnswer, errTooLong, limit)
	}
	if !x.held.take(len(data)) {
		return errHeld
	}
	x.taken += len(data)
	x.body = append(x.body, data...)
	return nil
}

// failed is why a whole answer is not one in JSON.
func (x *exchangeJSON) failed() error {
	kind, _ := x.answer.Field("Content-Type")
	coding, coded := x.answer.Field("Content-Encoding")
	plain := !coded || equalFold(coding, "identity")
	switch status := x.answer.Status; {
	case status > 299 || status == 206:
		e := &httpError{status: status}
		if plain {
			e.text = reasonOf(x.body)
		}
		return e
	case !plain:
		return fmt.Errorf("%w: its coding is %.64q, which nobody asked for", errAnswer, coding)
	case len(x.body) > 0 && !isJSON(kind):
		return fmt.Errorf("%w: it is %.64q and not application/json", errAnswer, kind)
	}
	return nil
}

// reasonOf is the text by which an answer in JSON says what is wrong, as those who
// write such answers call it.
func reasonOf(body []byte) string {
	var members map[string]json.RawMessage
	if json.Unmarshal(body, &members) != nil {
		return ""
	}
	for _, name := range []string{"message", "detail", "reason", "error", "title"} {
		var text string
		if raw, there := members[name]; there && json.Unmarshal(raw, &text) == nil && text != "" {
			return text
		}
	}
	return ""
}
