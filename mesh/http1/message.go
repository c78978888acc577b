package http1

import (
	"bytes"
	"fmt"
	"net/netip"
)

// Field is a field line of a head: views of the head's bytes.
type Field struct{ Name, Value []byte }

// Message is what a head says, as views of its bytes: they are good as long as
// those are. A Message is used again and again without allocating.
type Message struct {
	Method, Target []byte // requests
	Host           []byte
	hosted         bool // there is a Host field
	Status         int  // responses
	Reason         []byte
	Minor          int // of HTTP/1
	Fields         []Field

	Framing Framing
	Length  int64
	Close   bool // the sender closes after this message
	Upgrade bool // the sender asks for, or takes up, another protocol
	H2C     bool // of which one carries requests: they could not be judged, so Upgrade is not set
	Expect  bool // the client waits for 100 Continue
}

// HeadLength is how many bytes of b are a whole message head, with its last
// empty line; 0 means that more must come. seen bytes of b were looked at by a
// call before, which returned them as looked.
func HeadLength(b []byte, seen int) (n, looked int, err error) {
	for at := seen; ; {
		end := bytes.IndexByte(b[at:], '\n')
		if end < 0 {
			return 0, at, nil
		}
		end += at
		if end == 0 || b[end-1] != '\r' {
			return 0, 0, malformed("a line does not end in CR LF")
		}
		if end-1 == at { // an empty line: at is where a line begins
			if at == 0 {
				return 0, 0, malformed("empty line before the message")
			}
			return end + 1, end + 1, nil
		}
		at = end + 1
	}
}

// Request reads the whole head of a request.
func (m *Message) Request(head []byte) error {
	first, rest := m.reset(head)
	method, after, ok1 := bytes.Cut(first, space)
	target, version, ok2 := bytes.Cut(after, space)
	if !ok1 || !ok2 || bytes.IndexByte(version, ' ') >= 0 {
		return malformed("request line is not method, target and version")
	}
	m.Method, m.Target = method, target
	if !isToken(method) || len(method) > 32 {
		return malformed("method %.40q", method)
	}
	for _, m := range [...]string{"HEAD", "CONNECT"} {
		if is(method, m) && string(method) != m { // whether its answer has a body depends on who reads it
			return malformed("method %.32s, which some take for %s", method, m)
		}
	}
	if len(target) == 0 || len(target) > maxTarget {
		return malformed("target of %d bytes", len(target))
	}
	for _, c := range target {
		if c <= ' ' || c >= 0x7f || c == '#' {
			return malformed("target has byte %#x", c)
		}
	}
	if err := m.version(version); err != nil {
		return err
	}
	if err := m.fields(rest, true); err != nil {
		return err
	}
	return m.form()
}

// form refuses a target of which servers see different hosts: the host of an
// absolute URI, or of a CONNECT, must be the one of the Host field, and nothing
// beside it.
func (m *Message) form() error {
	t := m.Target
	if string(m.Method) == "CONNECT" {
		if !isHost(t) || !endsInPort(t) {
			return malformed("CONNECT to %.60q, which is no host:port", t)
		}
		if m.hosted && !bytes.EqualFold(t, m.Host) {
			return malformed("CONNECT to %.60q, Host says %.60q", t, m.Host)
		}
		return nil
	}
	if t[0] == '/' {
		return nil
	}
	if len(t) == 1 && t[0] == '*' {
		if string(m.Method) != "OPTIONS" { // RFC 9112 section 3.2.4
			return malformed("target * of %.32s", m.Method)
		}
		return nil
	}
	if _, absolute := cutScheme(t); !absolute {
		path, _, _ := bytes.Cut(t, []byte("?")) // the rest may be a secret
		return malformed("target %.60q is neither a path nor an absolute URI", path)
	}
	authority, _, _ := SplitTarget(t)
	if len(authority) == 0 || !isHost(authority) {
		return malformed("host %.60q of the target", authority)
	}
	if m.hosted && !bytes.EqualFold(authority, m.Host) {
		return malformed("the target is of host %.60q, Host says %.60q", authority, m.Host)
	}
	return nil
}

// isHost allows a name or an address with an optional port, as RFC 3986 spells
// them: of anything else readers take different parts for the name.
func isHost(b []byte) bool {
	name, port := b, []byte(nil)
	if len(b) > 0 && b[0] == '[' {
		end := bytes.IndexByte(b, ']')
		if end < 0 {
			return false
		}
		// Some take the brackets off a name as well.
		if a, err := netip.ParseAddr(string(b[1:end])); err != nil || !a.Is6() || a.Zone() != "" {
			return false
		}
		if name, port = nil, b[end+1:]; len(port) > 0 && port[0] != ':' {
			return false
		}
	} else if colon := bytes.IndexByte(b, ':'); colon >= 0 {
		name, port = b[:colon], b[colon:]
	}
	for _, c := range name {
		if !hostBytes[c] {
			return false
		}
	}
	return len(port) <= 1 || isDigits(port[1:])
}

// endsInPort tells whether a host has a port that can be dialled: a CONNECT must
// have one (RFC 9110 section 9.3.6).
func endsInPort(host []byte) bool {
	port := host[bytes.LastIndexByte(host, ':')+1:]
	if len(port) == len(host) || len(port) > 5 || !isDigits(port) {
		return false
	}
	n := 0
	for _, c := range port {
		n = 10*n + int(c-'0')
	}
	return n > 0 && n <= 65535
}

// hostBytes are those of names: RFC 3986 without the comma, which joins two, and
// the percent sign, which some undo and others keep.
var hostBytes = func() (t [256]bool) {
	for c := range t {
		t[c] = c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || bytes.IndexByte([]byte("-._~!$&'()*+;="), byte(c)) >= 0
	}
	return t
}()

// Response reads the whole head of a response to a request with that method.
func (m *Message) Response(head, method []byte) error {
	first, rest := m.reset(head)
	version, after, _ := bytes.Cut(first, space)
	if err := m.version(version); err != nil {
		return err
	}
	code, reason, _ := bytes.Cut(after, space)
	if len(code) != 3 || code[0] < '1' || code[0] > '9' || !isDigits(code) {
		return malformed("status %.10q", code)
	}
	if !isValue(reason) {
		return malformed("reason phrase has a control character")
	}
	m.Status, m.Reason = int(code[0]-'0')*100+int(code[1]-'0')*10+int(code[2]-'0'), reason
	if err := m.fields(rest, false); err != nil {
		return err
	}
	if m.Status < 200 || m.Status == 204 || m.Status == 304 || string(method) == "HEAD" {
		m.Framing = NoBody
	}
	m.Close = m.Close || m.Framing == UntilClose
	return nil
}

// Field is the value of the first field of that name, whatever its case.
func (m *Message) Field(name string) ([]byte, bool) {
	for i := range m.Fields {
		if is(m.Fields[i].Name, name) {
			return m.Fields[i].Value, true
		}
	}
	return nil, false
}

var space = []byte(" ")

func (m *Message) reset(head []byte) (first, rest []byte) {
	*m = Message{Fields: m.Fields[:0]}
	end := bytes.IndexByte(head, '\n')
	if end < 1 || len(head) < end+3 {
		return nil, nil
	}
	return head[:end-1], head[end+1 : len(head)-2]
}

func (m *Message) version(v []byte) error {
	switch string(v) {
	case "HTTP/1.1":
		m.Minor = 1
	case "HTTP/1.0":
		m.Minor = 0
	default:
		return malformed("version %.16q", v)
	}
	return nil
}

// counts of the fields that decide on the framing.
type counts struct {
	lengths, codings, hosts                     int
	keepAlive, closing, connUpgrade, hasUpgrade bool
}

// fields reads the field lines, checks them all and decides on the framing.
func (m *Message) fields(b []byte, request bool) error {
	var c counts
	for len(b) > 0 {
		end := bytes.IndexByte(b, '\n')
		if end < 1 || b[end-1] != '\r' {
			return malformed("a line does not end in CR LF")
		}
		line := b[:end-1]
		b = b[end+1:]
		if len(m.Fields) == MaxFields {
			return malformed("more than %d fields", MaxFields)
		}
		if len(line) == 0 {
			return malformed("an empty line among the fields")
		}
		if line[0] == ' ' || line[0] == '\t' {
			return malformed("a field is folded over lines")
		}
		colon := bytes.IndexByte(line, ':')
		if colon < 0 || !isToken(line[:colon]) {
			return malformed("field name %.40q", line[:max(colon, 0)])
		}
		said := line[colon+1:]
		f := Field{line[:colon], trim(said)}
		if !isValue(f.Value) {
			return malformed("value of %s has a control character", f.Name)
		}
		m.Fields = append(m.Fields, f)
		if err := m.known(&c, f); err != nil {
			return err
		}
		// Some take a tab for a part of the value, and so do not know it.
		if len(said) > len(f.Value) && bytes.IndexByte(said, '\t') >= 0 && (is(f.Name, "Content-Length") || is(f.Name, "Transfer-Encoding") || is(f.Name, "Host")) {
			return malformed("a tab beside the value of %s", f.Name)
		}
	}
	m.Close = c.closing || m.Minor == 0 && !c.keepAlive
	m.Upgrade = c.connUpgrade && c.hasUpgrade && !m.H2C
	return m.frame(c, request)
}

// known reads a field that means something to whoever passes the message on.
func (m *Message) known(c *counts, f Field) error {
	v := f.Value
	switch {
	case is(f.Name, "Content-Length"):
		c.lengths++
		if !isDigits(v) || len(v) > 18 {
			return malformed("Content-Length %.40q", v)
		}
		m.Length = 0
		for _, d := range v {
			m.Length = m.Length*10 + int64(d-'0')
		}
	case is(f.Name, "Transfer-Encoding"):
		c.codings++
		if !is(v, "chunked") {
			return malformed("Transfer-Encoding %.40q; only chunked is passed on", v)
		}
	case is(f.Name, "Host"):
		c.hosts++
		m.Host = v
		if !isHost(v) {
			return malformed("Host %.60q", v)
		}
	case is(f.Name, "Connection"):
		for more := true; more; {
			var t []byte
			t, v, more = bytes.Cut(v, comma)
			t = trim(t)
			c.closing = c.closing || is(t, "close")
			c.keepAlive = c.keepAlive || is(t, "keep-alive")
			c.connUpgrade = c.connUpgrade || is(t, "upgrade")
		}
	case is(f.Name, "Upgrade"):
		c.hasUpgrade = true
		for more := true; more; {
			var t []byte
			t, v, more = bytes.Cut(v, comma)
			m.H2C = m.H2C || carriesHTTP(trim(t))
		}
	case is(f.Name, "Expect"):
		m.Expect = is(v, "100-continue")
	}
	return nil
}

// carriesHTTP tells whether requests of HTTP would follow in the protocol of an
// Upgrade field: h2c and its drafts, HTTP itself, and TLS, in which it goes on
// (RFC 2817).
func carriesHTTP(protocol []byte) bool {
	name, _, _ := bytes.Cut(protocol, []byte("/"))
	return is(name, "h2") || is(name, "HTTP") || is(name, "TLS") || len(name) >= 3 && is(name[:3], "h2c")
}

// frame decides where the body ends, or refuses a message that says it in more
// than one way.
func (m *Message) frame(c counts, request bool) error {
	switch {
	case c.lengths > 1:
		return malformed("%d Content-Length fields", c.lengths)
	case c.codings > 1:
		return malformed("%d Transfer-Encoding fields", c.codings)
	case c.lengths > 0 && c.codings > 0:
		return malformed("Content-Length beside Transfer-Encoding")
	case c.codings > 0 && m.Minor == 0:
		return malformed("Transfer-Encoding in HTTP/1.0")
	case request && (c.hosts > 1 || c.hosts == 0 && m.Minor == 1):
		return malformed("%d Host fields", c.hosts)
	case c.codings > 0:
		m.Framing = Chunked
	case c.lengths > 0:
		m.Framing = Length
	case !request:
		m.Framing = UntilClose
	}
	m.hosted = c.hosts > 0
	return nil
}

var comma = []byte(",")

// trim takes blanks off both ends.
func trim(b []byte) []byte {
	for len(b) > 0 && (b[0] == ' ' || b[0] == '\t') {
		b = b[1:]
	}
	for len(b) > 0 && (b[len(b)-1] == ' ' || b[len(b)-1] == '\t') {
		b = b[:len(b)-1]
	}
	return b
}

// is compares ASCII, whatever the case.
func is(name []byte, want string) bool {
	if len(name) != len(want) {
		return false
	}
	for i, c := range name {
		w := want[i]
		if c == w {
			continue
		}
		if c|0x20 != w|0x20 || c|0x20 < 'a' || c|0x20 > 'z' {
			return false
		}
	}
	return true
}

// Is compares a field name or a token with a word, whatever the case.
func Is(name []byte, word string) bool { return is(name, word) }

func isDigits(s []byte) bool {
	for _, c := range s {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(s) > 0
}

// tokens are the bytes of which names of methods and fields are made.
var tokens = func() (t [256]bool) {
	for c := byte('!'); c < 0x7f; c++ {
		t[c] = bytes.IndexByte([]byte(`"(),/:;<=>?@[\]{}`), c) < 0
	}
	return t
}()

func isToken(s []byte) bool {
	for _, c := range s {
		if !tokens[c] {
			return false
		}
	}
	return len(s) > 0
}

// isValue allows what a field value may hold: no control character but tab.
func isValue(b []byte) bool {
	for _, c := range b {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// CheckField says what is wrong with a field somebody wants to add to a head.
func CheckField(name, value string) error {
	if !isToken([]byte(name)) {
		return fmt.Errorf("%q is no field name", name)
	}
	if !isValue([]byte(value)) {
		return fmt.Errorf("value of %s has a control character", name)
	}
	return nil
}
