package alone

import (
	"encoding/json"
	"errors"
	"io"
	"net"
	"strconv"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/static"
)

// reasons are the phrases of the statuses the proxy itself answers with.
var reasons = map[int]string{200: "OK", 206: "Partial Content", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
	307: "Temporary Redirect", 308: "Permanent Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
	408: "Request Timeout", 409: "Conflict", 412: "Precondition Failed", 413: "Content Too Large", 415: "Unsupported Media Type", 416: "Range Not Satisfiable", 421: "Misdirected Request",
	429: "Too Many Requests", 431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
	503: "Service Unavailable", 504: "Gateway Timeout"}

// answerTime is how long a client may take to read an answer of the proxy's own that
// is short. Of others it must take a piece in each idle_timeout.
const (
	answerTime = 10 * time.Second
	piece      = 64 << 10
	filePiece  = 256 << 10 // where the kernel copies
)

// refusal is the body of an answer the proxy gives itself.
type refusal struct {
	Error  string `json:"error"`
	Reason string `json:"reason"`
	Hint   string `json:"hint,omitempty"`
}

// refuse answers a request that goes nowhere. It returns false.
func (s *session) refuse(status int, why, hint string) bool {
	s.why = why
	if s.grpc {
		s.refuseGRPC(status, why, hint)
		return false
	}
	body, err := json.Marshal(refusal{reasons[status], why, hint})
	if err != nil {
		body = nil
	}
	s.short(status, "application/json", append(body, '\n'), "", "")
	return false
}

func (s *session) tooMany(wait time.Duration) {
	s.why = "rate limit"
	if s.grpc {
		s.refuseGRPC(429, "the route's rate is used up", "wait "+strconv.Itoa(int(wait/time.Second)+1)+"s")
		return
	}
	body := []byte(`{"error":"Too Many Requests","reason":"the route's rate is used up","hint":"wait as Retry-After says"}` + "\n")
	s.short(429, "application/json", body, "Retry-After", strconv.Itoa(int(wait/time.Second)+1))
}

// begin begins an answer of the proxy's own.
func (s *session) begin(status int) []byte {
	s.status = status
	now := time.Now()
	s.conn.SetWriteDeadline(now.Add(answerTime))
	b := append(s.out.buffer(), "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(append(append(b, ' '), reasons[status]...), "\r\n"...)
	if s.action != nil && s.action.toClient.drops(dateField) {
		return b
	}
	b = now.UTC().AppendFormat(append(b, "Date: "...), static.TimeFormat)
	return append(b, "\r\n"...)
}

var dateField = []byte("Date")

// own appends a field of an answer of the proxy's own, unless the route removes it or
// writes it itself.
func (s *session) own(b []byte, name, value string) []byte {
	if s.action != nil && s.action.toClient.drops([]byte(name)) {
		return b
	}
	return appendField(b, name, value)
}

func appendField(b []byte, name, value string) []byte {
	return append(append(append(append(b, name...), ": "...), value...), "\r\n"...)
}

// finish writes the last fields of a head: those of the route, the length if
// there is one, and whether the connection stays.
func (s *session) finish(b []byte, length int64) []byte {
	if s.action != nil {
		b = s.appendEdits(b, &s.action.toClient)
	}
	if length >= 0 {
		b = append(strconv.AppendInt(append(b, "Content-Length: "...), length, 10), "\r\n"...)
	}
	return s.connection(b)
}

// connection ends a head.
func (s *session) connection(b []byte) []byte {
	if s.two != nil { // the connection says itself when it ends
		return append(b, "\r\n"...)
	}
	if s.unread() || s.parts() {
		s.final = true
	}
	if s.final {
		b = append(b, "Connection: close\r\n"...)
	} else if s.req.Minor == 0 {
		b = append(b, "Connection: keep-alive\r\n"...)
	}
	return append(b, "\r\n"...)
}

// unread says whether a body is still to come that nobody will read. What has
// come is taken.
func (s *session) unread() bool {
	if s.upload != nil {
		return false // somebody reads it
	}
	for !s.body.Ended() {
		_, n, err := s.body.Next(s.in.waiting())
		s.in.at += n
		if err != nil || !s.body.Ended() && len(s.in.waiting()) == 0 {
			return true
		}
		if n == 0 && !s.body.Ended() {
			return true
		}
	}
	return false
}

// short answers with a body that is at hand.
func (s *session) short(status int, kind string, body []byte, name, value string) {
	if s.status != 0 { // an answer has begun; it cannot be taken back
		s.final, s.aborted = true, true
		return
	}
	if status == 400 || status == 408 || status == 431 || status == 413 {
		s.final = true // where the next request begins is not known, or not worth it
	}
	b := s.begin(status)
	if kind != "" && (len(body) > 0 || string(s.req.Method) == "HEAD") {
		b = s.own(b, "Content-Type", kind)
	}
	if name != "" {
		b = s.own(b, name, value)
	}
	length := int64(len(body))
	if status == 204 || status == 304 {
		length, body = -1, nil
	}
	b = s.finish(b, length)
	if s.out.kept(b) == nil && string(s.req.Method) != "HEAD" {
		s.out.write(body)
	}
}

func (s *session) respond(a *action) {
	r := a.route.Respond
	s.short(r.Status, r.Type, []byte(r.Body), "", "")
}

func (s *session) redirect(a *action) {
	to := a.redirect.Append(nil, &s.route)
	s.short(a.route.Redirect.Status, "", nil, "Location", string(to))
}

// file answers with a file.
func (s *session) file(a *action) {
	x := a.static.Answer(string(s.path), &s.req)
	defer x.Close()
	switch x.Status {
	case 301:
		to := appendPath(nil, x.Location)
		s.short(301, "", nil, "Location", string(append(to, s.route.Query...)))
		return
	case 416:
		s.short(416, "", nil, "Content-Range", "bytes */"+strconv.FormatInt(x.Size, 10))
		return
	case 405:
		s.short(405, "", nil, "Allow", "GET, HEAD")
		return
	case 412:
		s.short(412, "", nil, "", "")
		return
	case 200, 206, 304:
	default:
		s.refuse(x.Status, "no such file", "")
		return
	}
	b := s.begin(x.Status)
	z := s.compression(a, x.Type, x.N, x.Status == 200)
	etag := x.ETag
	if z {
		etag = "W/" + etag
	}
	b = s.own(b, "ETag", etag)
	b = s.own(b, "Last-Modified", x.Modified.UTC().Format(static.TimeFormat))
	if x.Status != 304 {
		b = s.own(b, "Content-Type", x.Type)
		if !z {
			b = s.own(b, "Accept-Ranges", "bytes")
		}
	}
	if x.Status == 206 {
		b = s.own(b, "Content-Range", "bytes "+strconv.FormatInt(x.From, 10)+"-"+strconv.FormatInt(x.From+x.N-1, 10)+
			"/"+strconv.FormatInt(x.Size, 10))
	}
	s.sendFile(a, &x, b, z)
}

func (s *session) sendFile(a *action, x *static.Answer, b []byte, z bool) {
	if a.route.Gzip != nil {
		b = appendField(b, "Vary", "Accept-Encoding")
	}
	length := x.N
	switch {
	case x.Status == 304:
		length = -1
	case z:
		length = -1
		b = append(b, "Content-Encoding: gzip\r\n"...)
		if s.req.Minor == 1 {
			b = append(b, "Transfer-Encoding: chunked\r\n"...)
		}
	}
	b = s.finish(b, length)
	if s.out.kept(b) != nil || string(s.req.Method) == "HEAD" || x.N == 0 && !z {
		return
	}
	if _, err := x.File.Seek(x.From, io.SeekStart); err != nil {
		s.final, s.aborted = true, true
		return
	}
	if err := s.copyFile(a, x, z); err != nil {
		s.final, s.aborted = true, true // it shrank, or the client left
		s.why = err.Error()
	}
}

func (s *session) copyFile(a *action, x *static.Answer, z bool) error {
	from := &io.LimitedReader{R: x.File, N: x.N}
	if z {
		c := s.compressor(a)
		defer c.drop()
		if _, err := io.Copy(paced{s, c}, from); err != nil {
			return err
		}
		if from.N > 0 { // its end would look like a whole answer
			return io.ErrUnexpectedEOF
		}
		return c.close()
	}
	if _, plain := s.conn.(*net.TCPConn); !plain {
		_, err := io.Copy(paced{s, pourer{&s.out}}, from)
		if err == nil && from.N > 0 {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	if err := s.out.flush(); err != nil {
		return err
	}
	for from.N > 0 {
		part := &io.LimitedReader{R: x.File, N: min(from.N, filePiece)}
		s.giveTime()
		n, err := io.Copy(s.conn, part) // the kernel copies
		s.out.sent += n
		from.N -= n
		if err != nil || part.N > 0 {
			return errors.Join(err, io.ErrUnexpectedEOF)
		}
	}
	return nil
}

// giveTime has a client take what is written next while it may be idle.
func (s *session) giveTime() {
	s.conn.SetWriteDeadline(time.Now().Add(time.Duration(s.world.config.Limits.IdleTimeout)))
}

// paced gives the client time for each part that is written.
type paced struct {
	s  *session
	to io.Writer
}

func (p paced) Write(b []byte) (int, error) {
	p.s.giveTime()
	return p.to.Write(b)
}

func (s *session) streamTime() time.Duration {
	return time.Duration(s.world.config.Limits.StreamTimeout)
}

// appendPath encodes a path for a Location.
func appendPath(b []byte, path string) []byte {
	for i := range len(path) {
		c := path[i]
		if c <= ' ' || c >= 0x7f || c == '"' || c == '<' || c == '>' || c == '?' || c == '#' || c == '\\' {
			const digits = "0123456789ABCDEF"
			b = append(b, '%', digits[c>>4], digits[c&15])
			continue
		}
		b = append(b, c)
	}
	return b
}

// appendEdits adds the fields of a route.
func (s *session) appendEdits(b []byte, e *edits) []byte {
	for i := range e.add {
		b = append(append(b, e.add[i].name...), ": "...)
		b = append(e.add[i].value.Append(b, &s.route), "\r\n"...)
	}
	return b
}

// appendLine is a line of the access log.
func (s *session) appendLine(b []byte, asJSON bool, took time.Duration) []byte {
	name, server := "", ""
	if s.action != nil {
		name = s.action.name
	}
	if s.server != nil {
		server = s.server.address
	}
	if !asJSON {
		b = s.began.UTC().AppendFormat(b, "2006-01-02T15:04:05.000Z ")
		b = append(append(b, s.clientText...), ' ')
		b = append(appendQuoted(append(appendQuoted(b, s.req.Method), ' '), s.req.Host), ' ')
		b = append(appendQuoted(b, s.req.Target), ' ')
		b = append(strconv.AppendInt(b, int64(s.status), 10), ' ')
		b = append(strconv.AppendInt(b, s.got, 10), ' ')
		b = append(strconv.AppendInt(b, s.sent, 10), ' ')
		b = append(strconv.AppendInt(b, took.Microseconds(), 10), "us "...)
		b = append(strconv.AppendQuote(b, name), ' ')
		b = append(strconv.AppendQuote(b, server), ' ')
		return append(strconv.AppendQuote(b, s.why), '\n')
	}
	b = s.began.UTC().AppendFormat(append(b, `{"time":"`...), "2006-01-02T15:04:05.000Z")
	b = append(append(b, `","client":"`...), s.clientText...)
	b = appendQuoted(append(b, `","method":`...), s.req.Method)
	b = appendQuoted(append(b, `,"host":`...), s.req.Host)
	b = appendQuoted(append(b, `,"target":`...), s.req.Target)
	b = strconv.AppendInt(append(b, `,"status":`...), int64(s.status), 10)
	b = strconv.AppendInt(append(b, `,"received":`...), s.got, 10)
	b = strconv.AppendInt(append(b, `,"sent":`...), s.sent, 10)
	b = strconv.AppendInt(append(b, `,"micros":`...), took.Microseconds(), 10)
	b = appendQuoted(append(b, `,"route":`...), []byte(name))
	b = appendQuoted(append(b, `,"upstream":`...), []byte(server))
	b = appendQuoted(append(b, `,"why":`...), []byte(s.why))
	return append(b, "}\n"...)
}

// maxLogged bounds what of a client's text is logged.
const maxLogged = 1024

// appendQuoted writes foreign bytes as a JSON string, at most maxLogged of them.
func appendQuoted(b, text []byte) []byte {
	b = append(b, '"')
	for _, c := range text[:min(len(text), maxLogged)] {
		switch {
		case c == '"' || c == '\\':
			b = append(b, '\\', c)
		case c < ' ' || c >= 0x7f:
			const digits = "0123456789abcdef"
			b = append(b, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		default:
			b = append(b, c)
		}
	}
	return append(b, '"')
}

// accepts says whether the client takes a coding.
func accepts(m *http1.Message, coding string) bool {
	v, ok := m.Field("Accept-Encoding")
	for more := ok; more; {
		var item []byte
		item, v, more = cut(v, ',')
		name, weight, _ := cut(item, ';')
		if equalFold(trim(name), coding) {
			q := trim(weight)
			return !(len(q) > 2 && (q[0] == 'q' || q[0] == 'Q') && q[1] == '=' && zero(q[2:]))
		}
	}
	return false
}

func zero(q []byte) bool {
	for _, c := range q {
		if c != '0' && c != '.' {
			return false
		}
	}
	return true
}

func cut(b []byte, sep byte) (before, after []byte, found bool) {
	for i, c := range b {
		if c == sep {
			return b[:i], b[i+1:], true
		}
	}
	return b, nil, false
}

func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}
