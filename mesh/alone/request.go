package alone

import (
	"errors"
	"strconv"
	"time"

	"hauberk.dev/mesh/http1"
)

// send writes the request. A body that is not at hand is passed on while the
// answer is waited for.
func (s *session) send(a *action, up *upstream, srv *server) error {
	s.up.w, s.up.sent = srv.conn, 0
	whole := s.gathered()
	now := time.Now()
	if whole {
		srv.conn.SetDeadline(s.within(now, s.tryTime(a)))
	} else {
		srv.conn.SetReadDeadline(s.within(now, s.streamTime()))
		srv.conn.SetWriteDeadline(s.within(now, time.Duration(a.route.Timeout)))
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
		s.stopped.Store(false)
		s.passed.Store(false)
		s.moved.Store(now.UnixNano())
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
	asks := s.cache.on && s.cache.entry != nil
	if asks {
		b = s.cache.appendValidators(b)
	}
	for i := range m.Fields {
		f := &m.Fields[i]
		if hopByHop(f.Name) || forwarded(f.Name) || a.toServer.drops(f.Name) || inList(lists, f.Name) || equalFold(f.Name, "host") ||
			whole && equalFold(f.Name, "expect") || asks && validator(f.Name) || s.tells(a, f) || s.retraced(f) {
			continue
		}
		b = appendRaw(b, f)
	}
	b = s.appendForwarded(b)
	b = s.appendDeadline(b, a)
	b = s.appendTrace(b, a)
	b = s.appendEdits(b, &a.toServer)
	switch {
	case m.Framing == http1.Length:
		b = append(strconv.AppendInt(append(b, "Content-Length: "...), m.Length, 10), "\r\n"...)
	case m.Framing == http1.Chunked:
		b = append(b, "Transfer-Encoding: chunked\r\n"...)
	}
	if te, _ := m.Field("TE"); up.two() && equalFold(te, "trailers") {
		b = append(b, "TE: trailers\r\n"...)
	}
	if m.Upgrade && m.Framing == http1.NoBody && !up.two() {
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
	if s.peer != nil {
		b = append(append(b, "\r\nX-Forwarded-Client-Cert: "...), s.peer.forwarded...)
	}
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
	case 23:
		return hyphenated(name, "x-forwarded-client-cert")
	}
	return false
}

func hyphenated(name []byte, want string) bool {
	for i, c := range name {
		w := want[i]
		if c == '_' {
			c = '-'
		}
		if w == '_' {
			w = '-'
		}
		if c|0x20 != w|0x20 {
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
