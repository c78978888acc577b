package transcode

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/internal/protofields"
)

// httpOption is the number of google.api.http in the options of a method.
const httpOption = 72295728

const maxParameters = 128 // of a query

// rule says which requests of HTTP are calls of a method: google.api.HttpRule.
type rule struct {
	method string // of HTTP
	path   []segment
	verb   string
	calls  *Method
	body   *field // nil: none, or all of it
	all    bool   // the body is the message
	answer *field // the field that is the answer; nil is all of it
	rest   bool   // the path ends in **
}

// segment of a path: a word, one of any kind, or all that is left.
type segment struct {
	word string // "*" and "**" are not words
	to   []*field
	last bool // of the segments that to is made of
}

// Call is a request of HTTP that is a call.
type Call struct {
	Method *Method
	rule   *rule
	bound  []bound
	query  string
}

// bound is a part of a path that a field of the message gets.
type bound struct {
	to   []*field
	text string
}

// ErrNoCall is a request that is no call.
var ErrNoCall = errors.New("no method of the schema is bound to it")

// annotated reads the rules of a method, and adds the one that every method has:
// POST of its own path, with the message as the body.
func (s *Schema) annotated(m *Method, options []byte) error {
	s.rules = append(s.rules, rule{method: "POST", path: words(m.Path), calls: m, all: true})
	return protofields.Each(options, func(n protowire.Number, inner []byte, _ uint64) error {
		if n != httpOption || inner == nil {
			return nil
		}
		return s.rule(m, inner, 0)
	})
}

func words(path string) (out []segment) {
	for word := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		out = append(out, segment{word: word})
	}
	return out
}

var httpMethods = map[protowire.Number]string{2: "GET", 3: "PUT", 4: "POST", 5: "DELETE", 6: "PATCH"}

func (s *Schema) rule(m *Method, raw []byte, depth int) error {
	r := rule{calls: m}
	pattern, body, answer := "", "", ""
	var more [][]byte
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch {
		case inner == nil:
		case httpMethods[n] != "":
			r.method, pattern = httpMethods[n], string(inner)
		case n == 7:
			body = string(inner)
		case n == 8: // custom
			return protofields.Each(inner, func(n protowire.Number, inner []byte, _ uint64) error {
				switch n {
				case 1:
					r.method = string(inner)
				case 2:
					pattern = string(inner)
				}
				return nil
			})
		case n == 11:
			more = append(more, inner)
		case n == 12:
			answer = string(inner)
		}
		return nil
	})
	if err == nil {
		err = r.parse(m.Input, pattern)
	}
	switch {
	case err != nil:
		return fmt.Errorf("%s: http: %w", m.Path, err)
	case body == "*":
		r.all = true
	case body != "":
		if r.body = m.Input.byName[body]; r.body == nil {
			return fmt.Errorf("%s: http: body %.64q is no field of %s", m.Path, body, m.Input.name)
		}
	}
	if answer != "" {
		if r.answer = m.Output.byName[answer]; r.answer == nil {
			return fmt.Errorf("%s: http: response_body %.64q is no field of %s", m.Path, answer, m.Output.name)
		}
	}
	s.rules = append(s.rules, r)
	if depth > 0 && len(more) > 0 {
		return fmt.Errorf("%s: http: additional bindings inside of others", m.Path)
	}
	for _, raw := range more {
		if err := s.rule(m, raw, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// parse reads a pattern: /v1/{name=shelves/*}/books/{id}:verb.
func (r *rule) parse(m *Message, pattern string) error {
	rest, ok := strings.CutPrefix(pattern, "/")
	if !ok || r.method == "" {
		return fmt.Errorf("pattern %.128q does not begin with /, or has no method", pattern)
	}
	if i := strings.LastIndexByte(rest, ':'); i > strings.LastIndexAny(rest, "/}") {
		rest, r.verb = rest[:i], rest[i+1:]
	}
	for rest != "" {
		var to []*field
		part := ""
		if strings.HasPrefix(rest, "{") {
			variable, after, ok := strings.Cut(rest[1:], "}")
			if !ok {
				return fmt.Errorf("pattern %.128q: { without }", pattern)
			}
			name, inner, given := strings.Cut(variable, "=")
			if !given {
				inner = "*"
			}
			var err error
			if to, err = m.resolve(name, false); err != nil {
				return fmt.Errorf("pattern %.128q: %w", pattern, err)
			}
			part, rest = inner, after
			if rest != "" && rest[0] != '/' {
				return fmt.Errorf("pattern %.128q: something follows }", pattern)
			}
			rest = strings.TrimPrefix(rest, "/")
		} else {
			part, rest, _ = strings.Cut(rest, "/")
		}
		for _, seg := range words(part) {
			if r.rest || seg.word == "" || strings.ContainsAny(seg.word, "{}") {
				return fmt.Errorf("pattern %.128q: segment %.64q", pattern, seg.word)
			}
			seg.to = to
			r.rest = seg.word == "**"
			r.path = append(r.path, seg)
		}
		r.path[len(r.path)-1].last = true
	}
	return nil
}

// resolve follows a path of fields to one that a text can fill.
func (m *Message) resolve(path string, lists bool) (to []*field, err error) {
	for name := range strings.SplitSeq(path, ".") {
		if m == nil {
			return nil, fmt.Errorf("%.64q: a field of what has none", path)
		}
		f := m.byName[name]
		if f == nil {
			return nil, fmt.Errorf("%.64q: %s has no such field", path, m.name[1:])
		}
		to, m = append(to, f), nil
		if f.kind == kindMessage && !f.repeated && formOf(f.message.name).read == nil {
			m = f.message
		}
	}
	last := to[len(to)-1]
	if m != nil || last.isMap() || last.repeated && !lists || last.kind == kindGroup || last.kind == kindMessage && !textual(last.message) {
		return nil, fmt.Errorf("%.64q: cannot be said in a path or a query", path)
	}
	return to, nil
}

// textual says whether a message is one text in JSON.
func textual(m *Message) bool {
	switch m.name {
	case ".google.protobuf.Timestamp", ".google.protobuf.Duration", ".google.protobuf.FieldMask":
		return true
	}
	return strings.HasPrefix(m.name, ".google.protobuf.") && strings.HasSuffix(m.name, "Value") && formOf(m.name).read != nil &&
		m.name != anyValue && m.name != ".google.protobuf.ListValue"
}

// Find says which call a request is: path is its path as it came, encoded, and
// query without its question mark. Rules are tried in their order.
func (s *Schema) Find(method, path, query string) (*Call, error) {
	given := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for i := range s.rules {
		r := &s.rules[i]
		if r.method != method {
			continue
		}
		if parts, ok := r.match(given); ok {
			return &Call{Method: r.calls, rule: r, bound: parts, query: query}, nil
		}
	}
	return nil, ErrNoCall
}

func (r *rule) match(given []string) (parts []bound, ok bool) {
	if len(given) < len(r.path) || len(given) > len(r.path) && !r.rest {
		return nil, false
	}
	end := given[len(given)-1]
	if r.verb != "" {
		before, ok := strings.CutSuffix(end, ":"+r.verb)
		if !ok {
			return nil, false
		}
		end = before
	}
	var open []string
	for i, seg := range r.path {
		here := given[i : i+1]
		if seg.word == "**" {
			here = given[i:]
		}
		for j, word := range here {
			if i+j == len(given)-1 {
				word = end
			}
			if word == "" || seg.word != "*" && seg.word != "**" && seg.word != word {
				return nil, false
			}
			if seg.to == nil {
				continue
			}
			text, err := url.PathUnescape(word)
			if err != nil {
				return nil, false
			}
			open = append(open, text)
		}
		if seg.to != nil && seg.last {
			parts = append(parts, bound{seg.to, strings.Join(open, "/")})
			open = nil
		}
	}
	return parts, true
}

// AppendRequest appends the message of a call.
func (c *Call) AppendRequest(dst, body []byte) (out []byte, err error) {
	switch {
	case c.rule.all && len(body) > 0:
		dst, err = c.Method.Input.AppendWire(dst, body)
	case c.rule.all:
	case c.rule.body != nil && len(body) > 0:
		dst, err = c.rule.body.appendWire(dst, body)
	case len(body) > 0:
		err = errors.New("a body, where none is bound")
	}
	if err != nil {
		return nil, err
	}
	if dst, err = c.appendQuery(dst); err != nil {
		return nil, err
	}
	for _, b := range c.bound {
		if dst, err = appendAt(dst, b.to, b.text); err != nil {
			return nil, fmt.Errorf("path: %w", err)
		}
	}
	return dst, nil
}

// appendWire appends a field whose value is text in JSON.
func (f *field) appendWire(dst, text []byte) ([]byte, error) {
	r, err := newReader(text)
	if err != nil {
		return nil, err
	}
	out, err := r.whole(func(tok jsonToken) ([]byte, error) {
		if tok == nil && !f.takesNull() {
			return dst, nil
		}
		return r.field(dst, f, tok, 0)
	})
	if err != nil {
		return nil, fmt.Errorf("read %s from JSON: %w", f.name, err)
	}
	return out, nil
}

func (c *Call) appendQuery(dst []byte) ([]byte, error) {
	if c.query == "" {
		return dst, nil
	}
	if c.rule.all {
		return nil, errors.New("a query beside a body that is the whole message")
	}
	n := 0
	var seen [][]*field
	for pair := range strings.SplitSeq(c.query, "&") {
		if n++; n > maxParameters {
			return nil, fmt.Errorf("query: over %d parameters", maxParameters)
		}
		key, text, _ := strings.Cut(pair, "=")
		key, err := url.QueryUnescape(key)
		if err == nil {
			text, err = url.QueryUnescape(text)
		}
		if err != nil {
			return nil, fmt.Errorf("query: %.64q is not well encoded", pair)
		}
		to, err := c.Method.Input.resolve(key, true)
		if err != nil {
			return nil, fmt.Errorf("query: %w", err)
		}
		same := func(other []*field) bool { return slices.Equal(other, to) }
		if !to[len(to)-1].repeated {
			if slices.ContainsFunc(seen, same) {
				return nil, fmt.Errorf("query: %.64q: is there twice", key)
			}
			seen = append(seen, to)
		}
		if to[0] == c.rule.body || slices.ContainsFunc(c.bound, func(b bound) bool { return same(b.to) }) {
			return nil, fmt.Errorf("query: %.64q: the path or the body says it", key)
		}
		if dst, err = appendAt(dst, to, text); err != nil {
			return nil, fmt.Errorf("query: %w", err)
		}
	}
	return dst, nil
}

// appendAt appends a message in which the field at the end of a path has the value
// that a text says. Messages that follow each other are one, so it adds to dst.
func appendAt(dst []byte, to []*field, text string) ([]byte, error) {
	f := to[len(to)-1]
	single := *f
	single.repeated, single.packed = false, false
	inner, err := (&reader{}).single(nil, &single, f.token(text), 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", f.name, err)
	}
	for i := len(to) - 2; i >= 0; i-- {
		inner = protowire.AppendBytes(protowire.AppendTag(nil, to[i].number, protowire.BytesType), inner)
	}
	return append(dst, inner...), nil
}

// token is a text as JSON would have it.
func (f *field) token(text string) jsonToken {
	leaf := f
	if f.kind == kindMessage && f.message.byNumber[1] != nil && strings.HasSuffix(f.message.name, "Value") {
		leaf = f.message.byNumber[1]
	}
	switch {
	case leaf.kind == kindBool && (text == "true" || text == "false"):
		return text == "true"
	case leaf.kind == kindEnum && leaf.enum != nil:
		if _, name := leaf.enum.byName[text]; !name && numeric(text) {
			return jsonNumber(text)
		}
	}
	return text
}

// AppendResponse appends the answer that a message says, in at most limit bytes.
func (c *Call) AppendResponse(dst, message []byte, limit int) ([]byte, error) {
	f := c.rule.answer
	if f == nil {
		return c.Method.Output.AppendJSON(dst, message, limit)
	}
	w := &writer{b: dst, limit: len(dst) + limit}
	if err := w.only(c.Method.Output, f, message); err != nil {
		return nil, err
	}
	return w.b, nil
}
