package alone

import (
	"context"
	"encoding/binary"
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
	"hauberk.dev/mesh/transcode"
)

// Transcode has requests in JSON become calls of another protocol, or calls requests.
type Transcode struct {
	// Descriptors is a file of protoc --descriptor_set_out --include_imports: its
	// services are those of the upstream, which speaks gRPC.
	Descriptors string `yaml:"descriptors"`
	// Bolt is a service of the upstream, which speaks bolt.
	Bolt *BoltService `yaml:"bolt"`
	// To is json if it is the other way round: calls, of gRPC by a route and of bolt
	// by a call of a listener, become requests in JSON.
	To string `yaml:"to"`
	// Path begins that of the requests which calls of bolt become: POST of path/METHOD.
	Path string `yaml:"path"`
}

const (
	maxCall    = 4 << 20 // bytes of a call's message, either way, as gRPC bounds them
	maxAnswerJ = 16 << 20
	maxSet     = 16 << 20 // bytes of descriptors

	toJSON = "json" // Transcode.To
)

func (t *Transcode) schema() (*transcode.Schema, error) {
	f, err := os.Open(t.Descriptors)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxSet+1))
	if err != nil {
		return nil, err
	}
	return transcode.Read(raw)
}

func (r *reading) transcode(at string, x *Route, c *Config) {
	if x.Transcode == nil {
		return
	}
	if x.Upstream == "" {
		r.fault(at+".transcode", "goes with upstream")
	}
	t, want := x.Transcode, []string{"grpc"}
	r.oneOf(at+".transcode.to", t.To, "", toJSON)
	if t.Path != "" {
		r.fault(at+".transcode.path", "%q goes with calls of a listener of protocol bolt; paths of gRPC's methods are in its descriptors", t.Path)
	}
	if t.To == toJSON {
		want = []string{"http", "http2"}
	}
	switch {
	case t.To == toJSON && t.Bolt != nil:
		r.fault(at+".transcode.bolt", "calls of bolt come to a listener of protocol bolt; write the transcode under one of its calls")
	case (t.Descriptors == "") == (t.Bolt == nil):
		r.fault(at+".transcode", "use one of descriptors and bolt")
	case t.Bolt != nil:
		want = []string{"bolt"}
		if err := t.Bolt.service().Check(); err != nil {
			r.fault(at+".transcode.bolt", "%v", err)
		}
	default:
		schema, err := t.schema()
		if err == nil && t.To == toJSON {
			err = schema.CheckRequests()
		}
		if err != nil {
			r.fault(at+".transcode.descriptors", "%q: %v", t.Descriptors, err)
		}
	}
	for _, u := range c.Upstreams {
		if u.Name == x.Upstream && !slices.Contains(want, u.Protocol) {
			r.fault(at+".transcode", "upstream %q speaks %s; write protocol: %s", u.Name, u.Protocol, strings.Join(want, " or "))
		}
	}
	if x.Rewrite != "" || x.Mirror != nil || x.Retries != nil {
		r.fault(at+".transcode", "does not go with rewrite, mirror and retries")
	}
}

// grpcError is what a server says of a call that failed.
type grpcError struct {
	code    int
	message string
}

func (e *grpcError) Error() string {
	return fmt.Sprintf("gRPC status \"%d\": %.256q", e.code, e.message)
}

// transcode makes a call of the request, and the answer of the call's.
func (s *session) transcode(a *action) {
	_, path, query := http1.SplitTarget(s.req.Target)
	text := string(query)
	if text != "" {
		text = text[1:] // the question mark
	}
	call, err := a.schema.Find(string(s.req.Method), string(path), text)
	if err != nil {
		s.refuse(404, err.Error(), "POST /package.Service/Method calls any method; others are bound by google.api.http")
		return
	}
	if call.Method.ClientStreams || call.Method.ServerStreams {
		s.refuse(501, call.Method.Path+" streams, which one answer in JSON cannot", "call it by gRPC")
		return
	}
	defer s.giveBytes()
	body, ok := s.whole(a)
	if !ok {
		return
	}
	if kind, _ := s.req.Field("Content-Type"); len(body) > 0 && !isJSON(kind) {
		s.refuse(415, "the body is not application/json", "")
		return
	}
	message, err := call.AppendRequest(make([]byte, grpcPrefix, grpcPrefix+len(body)), body)
	switch {
	case err != nil:
		s.refuse(400, err.Error(), "")
		return
	case len(message) > maxCall:
		s.refuse(413, "the message of the call is too large", "")
		return
	case !s.takeBytes(len(message)):
		s.refuseHeld()
		return
	}
	answer, err := s.call(a, call.Method.Path, message)
	var out []byte
	if err == nil {
		if out, err = call.AppendResponse(nil, answer, maxAnswerJ); err != nil {
			err = fmt.Errorf("the server's answer: %w", err)
		} else if !s.takeBytes(len(answer) + len(out)) { // until the client has read it
			err = errHeld
		}
	}
	if err != nil {
		s.callFailed(err)
		return
	}
	s.code = 0
	s.short(200, "application/json", out, "", "")
}

func isJSON(kind []byte) bool {
	const want = "application/json"
	return len(kind) >= len(want) && equalFold(kind[:len(want)], want) && (len(kind) == len(want) || kind[len(want)] == ';' || kind[len(want)] == ' ')
}

// statusOf is what a code of gRPC is in HTTP, as google.rpc.Code has it; 499 is no
// status of HTTP, and 408 the nearest.
var statusOf = [...]int{1: 408, 2: 500, 3: 400, 4: 504, 5: 404, 6: 409, 7: 403, 8: 429, 9: 400, 10: 409, 11: 400, 12: 501, 13: 500, 14: 503, 15: 500, 16: 401}

// callFailed answers in place of a call that has failed.
func (s *session) callFailed(err error) {
	var said *grpcError
	switch {
	case errors.Is(err, errClient):
		s.final, s.aborted = true, true
	case errors.As(err, &said):
		status := 500
		if said.code > 0 && said.code < len(statusOf) {
			status = statusOf[said.code]
		}
		s.code = said.code
		s.refuse(status, said.message, "gRPC status "+strconv.Itoa(said.code))
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		s.refuse(504, "the server did not answer in time", "raise timeout of the route")
	case errors.Is(err, errHeld):
		s.refuseHeld()
	case errors.Is(err, balance.ErrOverflow):
		s.refuse(503, err.Error(), "are the limits of the upstream wide enough?")
	case errors.Is(err, balance.ErrNoEndpoint), errors.Is(err, errBusy), errors.Is(err, errUnsent):
		s.refuse(503, err.Error(), "is one of the upstream's endpoints up?")
	default:
		s.refuse(502, err.Error(), "")
	}
}

// takeBytes counts bytes of a message that becomes another, until giveBytes.
func (s *session) takeBytes(n int) bool {
	if !s.p.held.take(n) {
		return false
	}
	s.taken += n
	return true
}

func (s *session) giveBytes() {
	s.p.held.give(s.taken)
	s.taken = 0
}

// refuseHeld answers that the proxy has no room for the message.
func (s *session) refuseHeld() bool {
	if !s.grpc {
		return s.refuse(503, errHeld.Error(), "")
	}
	s.why = errHeld.Error()
	s.answerGRPC(8, s.why)
	return false
}

// whole reads the body to its end. It answers what is too much, or too slow. What it
// takes its caller gives back.
func (s *session) whole(a *action) (body []byte, ok bool) {
	limit := min(int64(a.route.Body), maxCall)
	if s.grpc {
		limit += grpcPrefix
	}
	if s.req.Expect && !s.body.Ended() {
		s.conn.SetWriteDeadline(time.Now().Add(time.Duration(s.world.config.Limits.IdleTimeout)))
		if s.out.write(continued) != nil || s.out.flush() != nil {
			s.final, s.aborted = true, true
			return nil, false
		}
	}
	for !s.body.Ended() {
		data, n, err := s.body.Next(s.in.waiting())
		s.in.at += n
		if err != nil {
			return nil, s.refuse(400, err.Error(), "")
		}
		if s.got += int64(len(data)); s.got > limit {
			return nil, s.refuse(413, errTooLarge.Error(), "raise body of the route, up to 4MiB")
		}
		if !s.takeBytes(len(data)) {
			return nil, s.refuseHeld()
		}
		if body = append(body, data...); len(data) > 0 || s.body.Ended() {
			continue
		}
		s.conn.SetReadDeadline(s.within(time.Now(), time.Duration(s.world.config.Limits.IdleTimeout)))
		err = s.in.fill()
		switch {
		case err == io.EOF && s.body.End() == nil:
			return body, true
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil, s.refuse(408, "request body took too long", "")
		case err != nil:
			s.final, s.aborted, s.why = true, true, "client left inside its request"
			return nil, false
		}
	}
	return body, true
}

// call sends a message, which has room for its prefix in front, with the fields of
// the request.
func (s *session) call(a *action, path string, message []byte) (answer []byte, err error) {
	binary.BigEndian.PutUint32(message[1:], uint32(len(message)-grpcPrefix))
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(a.route.Timeout))
	defer cancel()
	head := append(append([]byte("POST "), path...), " HTTP/1.1\r\nHost: "...)
	if a.route.Host != "" {
		head = append(head, a.route.Host...)
	} else {
		head = append(head, s.req.Host...)
	}
	head, err = s.appendFields(append(head, "\r\nContent-Type: application/grpc\r\nTE: trailers\r\n"...), a)
	if err != nil {
		return nil, err
	}
	err = s.ask(ctx, a, func(srv *server) error {
		defer srv.close()
		answer, err = srv.unary(ctx, head, message)
		return err
	})
	return answer, err
}

// appendFields appends the fields of the request that another protocol, or another
// message, has room for, and those of the proxy and the route.
func (s *session) appendFields(b []byte, a *action) ([]byte, error) {
	lists, err := s.nominated(&s.req)
	if err != nil {
		return nil, err
	}
	for i := range s.req.Fields {
		f := &s.req.Fields[i]
		if !hopByHop(f.Name) && !forwarded(f.Name) && !ofMessage(f.Name) && !a.toServer.drops(f.Name) && !inList(lists, f.Name) && !s.retraced(f) && !s.tells(a, f) {
			b = appendRaw(b, f)
		}
	}
	return s.appendEdits(s.appendTrace(s.appendForwarded(b), a), &a.toServer), nil
}

// ofMessage fields tell of the message that was, are gRPC's own to write, or have
// servers that obey them do something else than what the request line says. Servers
// that make variables of names take an underscore for a hyphen.
func ofMessage(name []byte) bool {
	for _, own := range [...]string{"host", "expect", "content-type", "content-encoding", "content-length", "transfer-encoding", "accept", "accept-encoding", "range", "if-match", "if-none-match",
		"x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url"} {
		if len(name) == len(own) && hyphenated(name, own) {
			return true
		}
	}
	return len(name) >= 5 && hyphenated(name[:5], "grpc-")
}

// unary makes one call of gRPC: head is the beginning of its head, message has its
// prefix.
func (srv *server) unary(ctx context.Context, head, message []byte) ([]byte, error) {
	if until, ok := ctx.Deadline(); ok {
		srv.conn.SetDeadline(until)
		// A little more, so that the server does not give up before its answer could come.
		head = fmt.Appendf(slices.Clip(head), "Grpc-Timeout: %dm\r\n", max(time.Until(until).Milliseconds(), 1)+slack)
	}
	head = append(strconv.AppendInt(append(slices.Clip(head), "Content-Length: "...), int64(len(message)), 10), "\r\n\r\n"...)
	if _, err := srv.conn.Write(head); err != nil {
		return nil, err
	}
	if _, err := srv.conn.Write(message); err != nil {
		return nil, err
	}
	var m http1.Message
	for m.Status < 200 {
		head, _, err := srv.in.head(maxHead)
		if err == nil {
			err = m.Response(head, methodPost)
		}
		if err != nil {
			return nil, err
		}
	}
	if m.Status != 200 || !isGRPC(&m) {
		return nil, fmt.Errorf("status %d, which is no answer of gRPC", m.Status)
	}
	status, text := "", ""
	if v, ok := m.Field("Grpc-Status"); ok {
		said, _ := m.Field("Grpc-Message")
		status, text = string(v), string(said) // before what is read takes their place
	}
	body := slices.Clone(srv.in.waiting())
	rest, err := io.ReadAll(io.LimitReader(srv.conn, int64(grpcPrefix+maxCall+1-len(body))))
	if err != nil {
		return nil, err
	}
	if body = append(body, rest...); len(body) > grpcPrefix+maxCall {
		return nil, fmt.Errorf("an answer of over %d bytes", maxCall)
	}
	if status == "" {
		status, text = srv.two.status()
	}
	if code, err := strconv.Atoi(status); err != nil || code != 0 {
		if err != nil {
			code = 2
		}
		return nil, &grpcError{code, ungrpc(text)}
	}
	if len(body) < grpcPrefix || body[0] != 0 || uint64(binary.BigEndian.Uint32(body[1:])) != uint64(len(body)-grpcPrefix) {
		return nil, fmt.Errorf("%d bytes are not one message of gRPC", len(body))
	}
	return body[grpcPrefix:], nil
}

const (
	grpcPrefix = 5   // of a message
	slack      = 250 // milliseconds
)

var methodPost = []byte("POST")

// status is what the trailers say became of a call.
func (t *call) status() (status, message string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.trailers {
		switch f.Name {
		case "grpc-status":
			status = f.Value
		case "grpc-message":
			message = f.Value
		}
	}
	return status, message
}

// ungrpc undoes grpcMessage. What is not well encoded stands for itself.
func ungrpc(text string) string {
	b := make([]byte, 0, len(text))
	for i := 0; i < len(text); i++ {
		if text[i] == '%' && i+2 < len(text) {
			if n, err := strconv.ParseUint(text[i+1:i+3], 16, 8); err == nil {
				b = append(b, byte(n))
				i += 2
				continue
			}
		}
		b = append(b, text[i])
	}
	return string(b)
}
