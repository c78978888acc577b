package alone

import (
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http2"
)

// grpcCodes is how gRPC says what the proxy answers with.
var grpcCodes = map[int]int{400: 13, 403: 7, 404: 12, 405: 12, 408: 4, 413: 8, 421: 12, 429: 14, 431: 8, 500: 13, 502: 14, 503: 14, 504: 4}

// refuseGRPC answers a call that goes nowhere, in gRPC's words: the answer is its
// own trailer.
func (s *session) refuseGRPC(status int, why, hint string) {
	if hint != "" {
		why += "; " + hint
	}
	code, ok := grpcCodes[status]
	if !ok {
		code = 2
	}
	s.answerGRPC(code, why)
}

func (s *session) answerGRPC(code int, message string) {
	if s.status != 0 { // an answer has begun; it cannot be taken back
		s.final, s.aborted = true, true
		return
	}
	b := s.begin(200)
	b = appendField(b, "Content-Type", "application/grpc")
	b = appendField(b, "Grpc-Status", strconv.Itoa(code))
	b = appendField(b, "Grpc-Message", grpcMessage(message))
	s.out.kept(s.finish(b, -1))
	s.code = code
}

// grpcMessage encodes a message as gRPC wants it in a header.
func grpcMessage(text string) string {
	const digits = "0123456789ABCDEF"
	text = text[:min(len(text), 1024)]
	var b strings.Builder
	for i := range len(text) {
		if c := text[i]; c < ' ' || c > '~' || c == '%' {
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// trailers passes on what comes after the body of an answer, and reads in it what
// became of a call.
func (s *session) trailers(srv *server) {
	if srv.two == nil {
		return
	}
	srv.two.mu.Lock()
	fields := srv.two.trailers
	srv.two.mu.Unlock()
	if len(fields) > 0 { // they are not stored, so neither is what they end
		s.cache.storing = false
	}
	status := ""
	if v, ok := s.resp.Field("Grpc-Status"); ok {
		status = string(v)
	}
	for i := range fields {
		if fields[i].Name == "grpc-status" {
			status = fields[i].Value
		}
	}
	if s.two != nil {
		s.after = permitted(fields, &s.action.toClient, false)
	}
	if !isGRPC(&s.resp) {
		return
	}
	code, err := strconv.Atoi(status)
	if err != nil {
		code = 2
	}
	switch s.code = code; {
	case code == 4 && s.givenUp(s.action):
		s.outcome = balance.Cancelled
	case failure(code):
		s.outcome = balance.Failure
	}
}

// lateCall ends a call whose answer has begun when its client waits no longer. Only
// its trailers can say so. Its server is told whole milliseconds, and may have given
// it up that much earlier.
func (s *session) lateCall() bool {
	if !s.grpc || s.until.IsZero() || time.Until(s.until) > time.Millisecond || s.left() {
		return false
	}
	s.code = 4
	s.after = []http2.Field{{Name: "grpc-status", Value: "4"}, {Name: "grpc-message", Value: "the server did not answer in time"}}
	return true
}

// failure says whether a code of gRPC tells of the server rather than of the call.
func failure(code int) bool {
	switch code {
	case 4, 13, 14, 15: // deadline exceeded, internal, unavailable, data loss
		return true
	}
	return false
}
