// Package http1 reads HTTP/1 messages strictly enough to judge them.
//
// A proxy that judges requests must see the same requests as the server behind
// it. What RFC 9112 lets a recipient repair is refused here: a bare line feed,
// a folded line, space before a colon, two lengths, a length beside a transfer
// coding. What is accepted is passed on byte for byte. The package opens no
// connection and holds no policy.
package http1

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// Bounds of a message head.
const (
	MaxHead   = 64 << 10
	MaxFields = 128
	maxTarget = 16 << 10
)

// SyntaxError is a message that may not be passed on.
type SyntaxError struct{ Why string }

func (e *SyntaxError) Error() string { return "malformed message: " + e.Why }

func malformed(format string, args ...any) error {
	return &SyntaxError{fmt.Sprintf(format, args...)}
}

// Framing says where a message body ends.
type Framing int

// The framings.
const (
	NoBody     Framing = iota
	Length             // after Head.Length bytes
	Chunked            // by chunks
	UntilClose         // with the connection; responses only
)

// Head is what was learned from the head of a message.
type Head struct {
	// Raw is the head as it came, with its last empty line. It is valid until
	// the next head is read.
	Raw []byte

	Method string // requests
	Target string
	Host   string
	Status int // responses
	Minor  int // of HTTP/1

	Framing Framing
	Length  int64
	Close   bool // the sender closes after this message
	Upgrade bool // the sender asks for, or takes up, another protocol
	Expect  bool // the client waits for 100 Continue
}

// Reader reads message heads.
type Reader struct {
	R   *bufio.Reader
	raw []byte
}

// NewReader reads from r.
func NewReader(r io.Reader) *Reader { return &Reader{R: bufio.NewReaderSize(r, 16<<10)} }

// Request reads the head of a request. io.EOF means an orderly end between
// messages.
func (r *Reader) Request() (*Head, error) {
	lines, err := r.lines()
	if err != nil {
		return nil, err
	}
	h := &Head{Raw: r.raw}
	if err := h.requestLine(lines); err != nil {
		return nil, err
	}
	return h, h.fields(lines.rest, true)
}

// Response reads the head of a response to a request with the given method.
func (r *Reader) Response(method string) (*Head, error) {
	lines, err := r.lines()
	if err != nil {
		return nil, err
	}
	h := &Head{Raw: r.raw}
	if err := h.statusLine(lines.first); err != nil {
		return nil, err
	}
	if err := h.fields(lines.rest, false); err != nil {
		return nil, err
	}
	if method == "HEAD" || h.Status < 200 || h.Status == 204 || h.Status == 304 {
		h.Framing, h.Length = NoBody, 0
	}
	return h, nil
}

type split struct{ first, rest []byte }

// lines reads up to and with the empty line.
func (r *Reader) lines() (split, error) {
	r.raw = r.raw[:0]
	first := -1
	for {
		line, err := r.R.ReadSlice('\n')
		r.raw = append(r.raw, line...)
		switch {
		case len(r.raw) > MaxHead:
			return split{}, malformed("head over %d bytes", MaxHead)
		case err == bufio.ErrBufferFull:
			continue
		case err == io.EOF && len(r.raw) > 0:
			return split{}, io.ErrUnexpectedEOF
		case err != nil:
			return split{}, err
		}
		if !bytes.HasSuffix(r.raw, []byte("\r\n")) {
			return split{}, malformed("a line does not end in CR LF")
		}
		if first < 0 {
			if first = len(r.raw); first == 2 {
				return split{}, malformed("empty line before the message")
			}
		} else if bytes.HasSuffix(r.raw, []byte("\r\n\r\n")) {
			return split{r.raw[:first-2], r.raw[first : len(r.raw)-2]}, nil
		}
	}
}

func (h *Head) requestLine(l split) error {
	parts := strings.Split(string(l.first), " ")
	if len(parts) != 3 {
		return malformed("request line is not method, target and version")
	}
	h.Method, h.Target = parts[0], parts[1]
	if !isToken(h.Method) || len(h.Method) > 32 {
		return malformed("method %.40q", h.Method)
	}
	if h.Target == "" || len(h.Target) > maxTarget {
		return malformed("target of %d bytes", len(h.Target))
	}
	for i := range len(h.Target) {
		if c := h.Target[i]; c <= ' ' || c >= 0x7f || c == '#' {
			return malformed("target has byte %#x", c)
		}
	}
	return h.version(parts[2])
}

func (h *Head) statusLine(line []byte) error {
	version, rest, _ := strings.Cut(string(line), " ")
	if err := h.version(version); err != nil {
		return err
	}
	code, reason, _ := strings.Cut(rest, " ")
	if len(code) != 3 || code[0] < '1' || code[0] > '9' || !isDigits(code) {
		return malformed("status %.10q", code)
	}
	if !isValue([]byte(reason)) {
		return malformed("reason phrase has a control character")
	}
	h.Status = int(code[0]-'0')*100 + int(code[1]-'0')*10 + int(code[2]-'0')
	return nil
}

func (h *Head) version(s string) error {
	switch s {
	case "HTTP/1.1":
		h.Minor = 1
	case "HTTP/1.0":
		h.Minor = 0
	default:
		return malformed("version %.16q", s)
	}
	return nil
}

// fields reads the field lines that decide on the framing and checks them all.
func (h *Head) fields(b []byte, request bool) error {
	var lengths, codings, hosts, count int
	var keepAlive, closing, connUpgrade, hasUpgrade bool
	for len(b) > 0 {
		end := bytes.Index(b, []byte("\r\n"))
		line := b[:end]
		b = b[end+2:]
		if count++; count > MaxFields {
			return malformed("more than %d fields", MaxFields)
		}
		if line[0] == ' ' || line[0] == '\t' {
			return malformed("a field is folded over lines")
		}
		name, value, ok := bytes.Cut(line, []byte(":"))
		if !ok || !isToken(string(name)) {
			return malformed("field name %.40q", name)
		}
		if !isValue(value) {
			return malformed("value of %s has a control character", name)
		}
		v := string(bytes.Trim(value, " \t"))
		switch {
		case is(name, "Content-Length"):
			lengths++
			if !isDigits(v) || len(v) > 18 {
				return malformed("Content-Length %.40q", v)
			}
			h.Length = 0
			for i := range len(v) {
				h.Length = h.Length*10 + int64(v[i]-'0')
			}
		case is(name, "Transfer-Encoding"):
			codings++
			if !strings.EqualFold(v, "chunked") {
				return malformed("Transfer-Encoding %.40q; only chunked is passed on", v)
			}
		case is(name, "Host"):
			hosts++
			h.Host = v
			if strings.ContainsAny(v, " \t,/?#@\\") {
				return malformed("Host %.60q", v)
			}
		case is(name, "Connection"):
			for _, t := range strings.Split(v, ",") {
				switch t = strings.ToLower(strings.Trim(t, " \t")); t {
				case "close":
					closing = true
				case "keep-alive":
					keepAlive = true
				case "upgrade":
					connUpgrade = true
				}
			}
		case is(name, "Upgrade"):
			hasUpgrade = true
		case is(name, "Expect"):
			h.Expect = strings.EqualFold(v, "100-continue")
		}
	}
	h.Close = closing || h.Minor == 0 && !keepAlive
	h.Upgrade = connUpgrade && hasUpgrade
	switch {
	case lengths > 1:
		return malformed("%d Content-Length fields", lengths)
	case codings > 1:
		return malformed("%d Transfer-Encoding fields", codings)
	case lengths > 0 && codings > 0:
		return malformed("Content-Length beside Transfer-Encoding")
	case codings > 0 && h.Minor == 0:
		return malformed("Transfer-Encoding in HTTP/1.0")
	case request && (hosts > 1 || hosts == 0 && h.Minor == 1):
		return malformed("%d Host fields", hosts)
	case codings > 0:
		h.Framing = Chunked
	case lengths > 0:
		h.Framing = Length
	case !request:
		h.Framing, h.Close = UntilClose, true
	}
	return nil
}

func is(name []byte, want string) bool {
	return len(name) == len(want) && strings.EqualFold(string(name), want)
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

func isToken(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
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

// ErrAmbiguous is a path that servers read in different ways.
var ErrAmbiguous = errors.New("servers read this path in different ways")

// Path is the path of a request target as servers understand it: without the
// query, percent-encoding of ordinary characters undone. What servers do not
// agree on (empty and dot segments, an encoded slash, a backslash, parameters,
// a stray percent sign) is ErrAmbiguous. The asterisk of OPTIONS is its own
// path.
func Path(method, target string) (string, error) {
	if target == "*" && method == "OPTIONS" {
		return "*", nil
	}
	if rest, ok := cutScheme(target); ok {
		slash := strings.IndexAny(rest, "/?")
		switch {
		case slash < 0:
			target = "/"
		case rest[slash] == '?':
			target = "/" + rest[slash:]
		default:
			target = rest[slash:]
		}
	}
	if target == "" || target[0] != '/' {
		return "", malformed("target %.60q is neither a path nor an absolute URI", target)
	}
	path, _, _ := strings.Cut(target, "?")
	var b strings.Builder
	for i := 0; i < len(path); i++ {
		c := path[i]
		if c == '%' {
			if i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2]) {
				return "", ErrAmbiguous
			}
			c = unhex(path[i+1])<<4 | unhex(path[i+2])
			i += 2
			if c == '/' || c == '%' || c < ' ' || c == 0x7f {
				return "", ErrAmbiguous
			}
		}
		if c == '\\' || c == ';' {
			return "", ErrAmbiguous
		}
		b.WriteByte(c)
	}
	decoded := b.String()
	for i, segment := range strings.Split(decoded[1:], "/") {
		last := i == strings.Count(decoded[1:], "/")
		if segment == "." || segment == ".." || segment == "" && !last {
			return "", ErrAmbiguous
		}
	}
	return decoded, nil
}

func cutScheme(target string) (string, bool) {
	for _, s := range []string{"http://", "https://"} {
		if len(target) > len(s) && strings.EqualFold(target[:len(s)], s) {
			return target[len(s):], true
		}
	}
	return "", false
}

func isHex(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'f' || c >= 'A' && c <= 'F'
}

func unhex(c byte) byte {
	switch {
	case c <= '9':
		return c - '0'
	case c <= 'F':
		return c - 'A' + 10
	}
	return c - 'a' + 10
}
