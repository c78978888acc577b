package cache

import (
	"bytes"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/http1"
)

// Entry is a stored answer. It never changes; one that was found good again is
// stored anew.
type Entry struct {
	Status int
	Head   []byte // status line and fields, with Content-Length, as of HTTP/1.1
	Body   []byte
	ETag   string // validators; "" if there is none
	Since  string

	key      string
	vary     []varied
	at       time.Time     // when it came, or was found good
	age      time.Duration // then
	lifetime time.Duration
	control  directives

	prev, next *Entry
	gone       bool
}

// varied is a field of the request that has chosen the answer.
type varied struct{ name, value string }

// Rules are what a route adds to what answers say themselves.
type Rules struct {
	// Valid is how long an answer of 200, 301 or 302 that says nothing is fresh.
	Valid time.Duration
	// StaleWhileRevalidate and StaleIfError hold where the answer says nothing.
	StaleWhileRevalidate, StaleIfError time.Duration
	Largest                            int64 // body
	// Told says whether the server has got a field of the request as it came. What
	// varies by another is not stored: nobody could tell for whom it is. nil: every one.
	Told func(name string) bool
}

// chosen says whether an answer was chosen by fields that a request can be compared
// by, and what they are.
func (r *Rules) chosen(resp *http1.Message) bool {
	names, any := varies(resp)
	return !any && len(names) <= maxVaried && (r.Told == nil || !slices.ContainsFunc(names, func(name string) bool { return !r.Told(name) }))
}

// heuristic are the statuses that may be stored without a word about it: RFC 9110,
// section 15.1, but 206.
func heuristic(status int) bool {
	switch status {
	case 200, 203, 204, 300, 301, 308, 404, 405, 410, 414, 501:
		return true
	}
	return false
}

// Storable says whether the answer to a GET may be stored by a shared cache: RFC
// 9111, sections 3 and 3.5. Answers that set cookies are not, though they may be.
func Storable(now time.Time, req, resp *http1.Message, r Rules) bool {
	if string(req.Method) != "GET" || resp.Status < 200 || resp.Status == 206 || resp.Status == 304 {
		return false
	}
	asked, said := control(req), control(resp)
	if asked.noStore || said.noStore || said.private {
		return false
	}
	for _, name := range [...]string{"Content-Range", "Set-Cookie"} {
		if _, there := resp.Field(name); there {
			return false
		}
	}
	if secret(req, said) {
		return false
	}
	if !r.chosen(resp) {
		return false
	}
	_, expires := resp.Field("Expires")
	if said.public || expires || said.maxAge >= 0 || said.sMaxAge >= 0 {
		return true
	}
	_, tagged := resp.Field("ETag") // what is never fresh is of use if it can be asked about
	return (heuristic(resp.Status) || r.Valid > 0) && (tagged || lifetime(resp, said, now, r) > 0)
}

// secret says that an answer is for nobody but who has asked: RFC 9111, section 3.5.
func secret(req *http1.Message, said directives) bool {
	_, proves := req.Field("Authorization")
	return proves && !said.public && !said.mustRevalidate && said.sMaxAge < 0
}

// maxVaried bounds the fields that one answer may vary by.
const maxVaried = 8

// varies are the names in Vary fields, and whether one is *.
func varies(m *http1.Message) (names []string, any bool) {
	for i := range m.Fields {
		if !http1.Is(m.Fields[i].Name, "vary") {
			continue
		}
		for name := range strings.SplitSeq(string(m.Fields[i].Value), ",") {
			switch name = strings.ToLower(strings.Trim(name, " \t")); {
			case name == "*":
				return nil, true
			case name != "" && !slices.Contains(names, name):
				names = append(names, name)
			}
		}
	}
	return names, false
}

// valueOf is a field of a request as Vary compares it: all its lines as one, without
// the space that means nothing.
func valueOf(m *http1.Message, name string) string {
	var b strings.Builder
	n := 0
	for i := range m.Fields {
		if !http1.Is(m.Fields[i].Name, name) {
			continue
		}
		for part := range strings.SplitSeq(string(m.Fields[i].Value), ",") {
			if n++; n > 1 {
				b.WriteByte(',')
			}
			b.WriteString(strings.Trim(part, " \t"))
		}
	}
	if n == 0 {
		return "\x00" // not there is not the same as empty
	}
	return b.String()
}

// lifetime is how long an answer is fresh: RFC 9111, section 4.2.1. Where it does not
// say, it is what the route says, else a tenth of the time since it was last
// changed, a day at most.
func lifetime(resp *http1.Message, said directives, now time.Time, r Rules) time.Duration {
	switch {
	case said.sMaxAge >= 0:
		return said.sMaxAge
	case said.maxAge >= 0:
		return said.maxAge
	}
	made, _, valid := date(resp, "Date")
	if !valid {
		made = now
	}
	if expires, there, valid := date(resp, "Expires"); there {
		if !valid {
			return 0
		}
		return max(expires.Sub(made), 0)
	}
	if r.Valid > 0 && (resp.Status == 200 || resp.Status == 301 || resp.Status == 302) {
		return r.Valid
	}
	changed, _, valid := date(resp, "Last-Modified")
	if !valid || !heuristic(resp.Status) {
		return 0
	}
	return min(max(made.Sub(changed), 0)/10, 24*time.Hour)
}

// firstAge is how old an answer is when it comes: RFC 9111, section 4.2.3.
func firstAge(resp *http1.Message, asked, came time.Time) time.Duration {
	apparent := time.Duration(0)
	if made, _, valid := date(resp, "Date"); valid {
		apparent = max(came.Sub(made), 0)
	}
	said := time.Duration(0)
	if v, there := resp.Field("Age"); there {
		said = seconds(string(v))
	}
	return max(apparent, said+came.Sub(asked))
}

// Age is how old the answer is now.
func (e *Entry) Age(now time.Time) time.Duration { return e.age + max(now.Sub(e.at), 0) }

// newEntry makes an entry of a whole answer. asked is when its request was sent.
func newEntry(key string, req, resp *http1.Message, body []byte, asked, came time.Time, r Rules) *Entry {
	said := control(resp)
	if said.staleWhileRevalidate < 0 {
		said.staleWhileRevalidate = r.StaleWhileRevalidate
	}
	if said.staleIfError < 0 {
		said.staleIfError = r.StaleIfError
	}
	e := &Entry{key: key, Status: resp.Status, Body: body, at: came, age: firstAge(resp, asked, came), control: said,
		lifetime: lifetime(resp, said, came, r)}
	names, _ := varies(resp)
	for _, name := range names {
		e.vary = append(e.vary, varied{name, valueOf(req, name)})
	}
	if v, ok := resp.Field("ETag"); ok {
		e.ETag = string(v)
	}
	if v, ok := resp.Field("Last-Modified"); ok {
		e.Since = string(v)
	}
	e.Head = appendHead(nil, resp, nil, len(body))
	return e
}

// appendHead writes the head of a stored answer: the fields of first, but those that
// second has, and then those of second.
func appendHead(b []byte, first, second *http1.Message, length int) []byte {
	b = strconv.AppendInt(append(b, "HTTP/1.1 "...), int64(first.Status), 10)
	b = append(append(append(b, ' '), first.Reason...), "\r\n"...)
	for i := range first.Fields {
		f := &first.Fields[i]
		if notStored(first, f.Name) || second != nil && replaced(second, f.Name) {
			continue
		}
		b = appendField(b, f)
	}
	if second != nil {
		for i := range second.Fields {
			if f := &second.Fields[i]; !notStored(second, f.Name) && updates(f.Name) {
				b = appendField(b, f)
			}
		}
	}
	b = strconv.AppendInt(append(b, "Content-Length: "...), int64(length), 10)
	return append(b, "\r\n\r\n"...)
}

func appendField(b []byte, f *http1.Field) []byte {
	return append(append(append(append(b, f.Name...), ": "...), f.Value...), "\r\n"...)
}

// notStored are fields of the connection that an answer came on, RFC 9111, section
// 3.1, and those that are written anew.
func notStored(m *http1.Message, name []byte) bool {
	for _, n := range [...]string{"connection", "keep-alive", "te", "transfer-encoding", "upgrade", "trailer", "proxy-connection", "proxy-authenticate",
		"proxy-authentication-info", "proxy-authorization", "content-length", "age"} {
		if http1.Is(name, n) {
			return true
		}
	}
	for i := range m.Fields {
		if http1.Is(m.Fields[i].Name, "connection") {
			for one := range bytes.SplitSeq(m.Fields[i].Value, []byte(",")) {
				if bytes.EqualFold(bytes.Trim(one, " \t"), name) {
					return true
				}
			}
		}
	}
	return false
}

// updates says whether a field of a 304 replaces that of what is stored: RFC 9111,
// section 3.2. What describes the body stays with the body, and a cookie is for the
// one client that asked.
func updates(name []byte) bool {
	for _, n := range [...]string{"content-encoding", "content-type", "content-range", "content-length", "set-cookie"} {
		if http1.Is(name, n) {
			return false
		}
	}
	return true
}

func replaced(m *http1.Message, name []byte) bool {
	if !updates(name) {
		return false
	}
	for i := range m.Fields {
		if bytes.EqualFold(m.Fields[i].Name, name) {
			return true
		}
	}
	return false
}

func (e *Entry) size() int64 {
	const overhead = 512
	n := int64(len(e.key)+len(e.Head)+len(e.Body)+len(e.ETag)+len(e.Since)) + overhead
	for _, v := range e.vary {
		n += int64(len(v.name) + len(v.value))
	}
	return n
}

func (e *Entry) matches(req *http1.Message) bool {
	for _, v := range e.vary {
		if valueOf(req, v.name) != v.value {
			return false
		}
	}
	return true
}
