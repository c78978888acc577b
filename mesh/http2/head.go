package http2

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// Field is a header field.
type Field = hpack.HeaderField

// Head is the head of a request or response that has been found well formed.
type Head struct {
	// Fields are all fields as they came, pseudo-fields first. They are valid
	// during the call that hands the head over.
	Fields []Field

	Method    string // requests
	Scheme    string
	Path      string
	Authority string // of :authority, else of host
	Status    int    // responses

	ContentType string
	Length      int64 // declared, -1 if it is not
	End         bool  // nothing follows

	status string
}

// GRPC tells whether the message says it is gRPC's.
func (h *Head) GRPC() bool {
	rest, ok := strings.CutPrefix(h.ContentType, "application/grpc")
	return ok && (rest == "" || rest[0] == '+' || rest[0] == ';')
}

const (
	maxMethod = 32
	maxPath   = 16 << 10
)

var (
	errPseudoLate   = errors.New("a pseudo-field comes after another field")
	errPseudoTwice  = errors.New("a pseudo-field is repeated")
	errName         = errors.New("a field name is not a lower-case token")
	errTransfer     = errors.New("a field belongs to a connection of HTTP/1")
	errTE           = errors.New("te is not \"trailers\"")
	errHosts        = errors.New("two hosts are named")
	errLengths      = errors.New("content-length is repeated or no number")
	errTrailerField = errors.New("a trailer would change the message or its routing")
)

// parse reads the fields of a head; which pseudo-fields there must be is for
// request and response to say.
func (h *Head) parse(fields []Field) (seen pseudo, err error) {
	*h = Head{Fields: fields, Length: -1}
	host, hosts := "", 0
	late := false
	for i := range fields {
		f := &fields[i]
		if err := checkValue(f); err != nil {
			return 0, err
		}
		if f.IsPseudo() {
			p, to := h.pseudoField(f.Name)
			switch {
			case p == 0:
				return 0, fmt.Errorf("unknown pseudo-field %.40q", f.Name)
			case late:
				return 0, errPseudoLate
			case seen&p != 0:
				return 0, errPseudoTwice
			}
			seen |= p
			*to = f.Value
			continue
		}
		late = true
		if !lowerToken(f.Name) {
			return 0, errName
		}
		if f.Name == "host" {
			host = f.Value
			hosts++
		}
		if err := h.field(f); err != nil {
			return 0, err
		}
	}
	if hosts > 1 || hosts == 1 && seen&hasAuthority != 0 && !strings.EqualFold(host, h.Authority) {
		return 0, errHosts
	}
	if seen&hasAuthority == 0 {
		h.Authority = host
	}
	return seen, nil
}

// pseudo is a set of pseudo-fields.
type pseudo uint8

const (
	hasMethod pseudo = 1 << iota
	hasScheme
	hasPath
	hasAuthority
	hasStatus
)

func (h *Head) pseudoField(name string) (pseudo, *string) {
	switch name {
	case ":method":
		return hasMethod, &h.Method
	case ":scheme":
		return hasScheme, &h.Scheme
	case ":path":
		return hasPath, &h.Path
	case ":authority":
		return hasAuthority, &h.Authority
	case ":status":
		return hasStatus, &h.status
	}
	return 0, nil // :protocol among them: extended CONNECT is not offered
}

// field checks what fields say of the message itself.
func (h *Head) field(f *Field) error {
	switch f.Name {
	case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade":
		return errTransfer
	case "te":
		if !strings.EqualFold(f.Value, "trailers") {
			return errTE
		}
	case "content-type":
		h.ContentType = f.Value
	case "content-length":
		n, ok := decimal(f.Value)
		if !ok || h.Length >= 0 {
			return errLengths
		}
		h.Length = n
	}
	return nil
}

// request reads the head of a request.
func (h *Head) request(fields []Field) error {
	seen, err := h.parse(fields)
	switch {
	case err != nil:
		return err
	case seen&hasStatus != 0:
		return errors.New(":status in a request")
	case seen&hasMethod == 0 || !token(h.Method) || len(h.Method) > maxMethod:
		return fmt.Errorf("method %.40q", h.Method)
	case !isAuthority(h.Authority):
		return fmt.Errorf("authority %.60q", h.Authority)
	case h.Method == "CONNECT":
		if seen != hasMethod|hasAuthority || h.Authority == "" {
			return errors.New("CONNECT wants an authority only")
		}
		return nil
	case seen&hasScheme == 0 || h.Scheme != "http" && h.Scheme != "https":
		return fmt.Errorf("scheme %.20q", h.Scheme)
	case seen&hasPath == 0 || !isPath(h.Method, h.Path):
		path, _, _ := strings.Cut(h.Path, "?") // the rest may be a secret
		return fmt.Errorf("path %.60q", path)
	}
	return nil
}

// response reads the head of a response.
func (h *Head) response(fields []Field) error {
	seen, err := h.parse(fields)
	switch {
	case err != nil:
		return err
	case seen != hasStatus:
		return errors.New("a response has :status and no other pseudo-field")
	}
	status, ok := decimal(h.status)
	if !ok || len(h.status) != 3 || status < 100 || status == 101 {
		return fmt.Errorf("status %.10q", h.status)
	}
	h.Status = int(status)
	return nil
}

// checkTrailers checks the fields after a body. Those of a request do not say who
// sends it: some servers put them among the fields that were judged.
func checkTrailers(fields []Field, request bool) error {
	for i := range fields {
		f := &fields[i]
		if f.IsPseudo() {
			return errors.New("pseudo-field in a trailer")
		}
		if !lowerToken(f.Name) {
			return errName
		}
		if err := checkValue(f); err != nil {
			return err
		}
		switch f.Name {
		case "connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade", "te", "host", "content-length":
			return errTrailerField
		case "authorization", "proxy-authorization", "cookie", "expect":
			if request {
				return errTrailerField
			}
		}
	}
	return nil
}

// checkValue refuses what another protocol would take for the end of a field,
// and the space around a value that RFC 9113 section 8.2.1 forbids.
func checkValue(f *Field) error {
	v := f.Value
	for i := range len(v) {
		if c := v[i]; c < ' ' && c != '\t' || c == 0x7f {
			return fmt.Errorf("value of %.40q has byte %#x", f.Name, c)
		}
	}
	if v != "" && (isBlank(v[0]) || isBlank(v[len(v)-1])) {
		return fmt.Errorf("value of %.40q begins or ends with space", f.Name)
	}
	return nil
}

func isBlank(c byte) bool { return c == ' ' || c == '\t' }

func isPath(method, path string) bool {
	if path == "*" {
		return method == "OPTIONS"
	}
	if path == "" || path[0] != '/' || len(path) > maxPath {
		return false
	}
	for i := range len(path) {
		if c := path[i]; c <= ' ' || c >= 0x7f || c == '#' {
			return false
		}
	}
	return true
}

// isAuthority allows a name or an address in brackets, with an optional port: of
// anything else readers take different parts for the name, and some undo an
// encoded byte where others keep it.
func isAuthority(s string) bool {
	name, port, _ := strings.Cut(s, ":")
	if strings.HasPrefix(s, "[") {
		end := strings.IndexByte(s, ']') + 1
		if end == 0 || end < len(s) && s[end] != ':' {
			return false
		}
		// Some take the brackets off a name as well.
		if a, err := netip.ParseAddr(s[1 : end-1]); err != nil || !a.Is6() || a.Zone() != "" {
			return false
		}
		if name, port = "", ""; end < len(s) {
			port = s[end+1:]
		}
	}
	for i := range len(name) {
		if c := name[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`,/?#@%\"<>[]`, c) >= 0 {
			return false
		}
	}
	return strings.Trim(port, "0123456789") == "" && len(s) <= 1<<10
}

func decimal(s string) (n int64, ok bool) {
	if s == "" || len(s) > 18 {
		return 0, false
	}
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int64(s[i]-'0')
	}
	return n, true
}

// tokenByte holds what a token may: 1, and 2 if it is an upper-case letter.
var tokenByte = func() (t [256]byte) {
	for c := byte('!'); c < 0x7f; c++ {
		if strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) < 0 {
			t[c] = 1
		}
		if c >= 'A' && c <= 'Z' {
			t[c] = 2
		}
	}
	return t
}()

func lowerToken(s string) bool {
	for i := range len(s) {
		if tokenByte[s[i]] != 1 {
			return false
		}
	}
	return s != ""
}

func token(s string) bool {
	for i := range len(s) {
		if tokenByte[s[i]] == 0 {
			return false
		}
	}
	return s != ""
}
