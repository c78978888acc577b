// Package route decides which rule a request falls under: by the host it asks
// for, its path, method, header fields and query.
//
// It moves no bytes and holds no connection; what a rule then does is a value of
// the caller's. Paths are judged as http1.AppendPath reads them. A match
// allocates nothing, but for regular expressions, which are RE2: their time is
// linear in what they read.
package route

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"

	"hauberk.dev/mesh/http1"
)

// Request is what rules and templates read.
type Request struct {
	Message *http1.Message
	Scheme  string
	Remote  []byte // address of the client
	Path    []byte // decoded
	Query   []byte // with its question mark

	rest    []byte // of the path, after the prefix of the rule
	pattern *regexp.Regexp
}

// Value is a condition on a named header field or query parameter. Without
// Equal and Pattern it only has to be there. Not turns the condition round: what
// is compared must be there and differ, else it must not be there.
type Value struct {
	Name    string
	Equal   *string
	Pattern *regexp.Regexp
	Not     bool
}

// Match is what a rule demands; all of what is set must hold.
type Match struct {
	Exact, Prefix string // of the path; a prefix ends where a segment ends
	Pattern       *regexp.Regexp
	Methods       []string
	Fields, Query []Value
}

// Matches says whether r is under m, and keeps in r what templates read of it.
func (m *Match) Matches(r *Request) bool {
	r.rest, r.pattern = r.Path, nil
	switch {
	case m.Exact != "":
		if string(r.Path) != m.Exact {
			return false
		}
		r.rest = nil
	case m.Prefix != "":
		if !m.under(r.Path) {
			return false
		}
		r.rest = r.Path[len(m.Prefix):]
	case m.Pattern != nil:
		if !m.Pattern.Match(r.Path) {
			return false
		}
		r.pattern = m.Pattern
	}
	return m.method(r.Message.Method) && m.fields(r.Message) && m.query(r.Query)
}

func (m *Match) under(path []byte) bool {
	n := len(m.Prefix)
	if len(path) < n || string(path[:n]) != m.Prefix {
		return false
	}
	return len(path) == n || m.Prefix[n-1] == '/' || path[n] == '/'
}

func (m *Match) method(method []byte) bool {
	for _, want := range m.Methods {
		if string(method) == want || want == "GET" && string(method) == "HEAD" {
			return true
		}
	}
	return len(m.Methods) == 0
}

func (m *Match) fields(msg *http1.Message) bool {
	for i := range m.Fields {
		v := &m.Fields[i]
		if value, ok := msg.Field(v.Name); !v.met(value, ok) {
			return false
		}
	}
	return true
}

func (m *Match) query(query []byte) bool {
	if len(m.Query) == 0 {
		return true
	}
	query = bytes.TrimPrefix(query, []byte("?"))
	for i := range m.Query {
		v := &m.Query[i]
		if value, ok := parameter(query, v.Name); !v.met(value, ok) {
			return false
		}
	}
	return true
}

func (v *Value) met(b []byte, there bool) bool {
	if !there {
		return v.Not && v.Equal == nil && v.Pattern == nil
	}
	return v.holds(b) != v.Not
}

func (v *Value) holds(b []byte) bool {
	switch {
	case v.Equal != nil:
		return string(b) == *v.Equal
	case v.Pattern != nil:
		return v.Pattern.Match(b)
	}
	return true
}

// parameter is the first value of that name in a query, decoded.
func parameter(query []byte, name string) ([]byte, bool) {
	for more := true; more; {
		var pair []byte
		pair, query, more = bytes.Cut(query, []byte("&"))
		key, value, _ := bytes.Cut(pair, []byte("="))
		if string(unescaped(key)) == name {
			return unescaped(value), true
		}
	}
	return nil, false
}

// unescaped undoes the encoding of a query. What is not well encoded stands for
// itself.
func unescaped(b []byte) []byte {
	if bytes.IndexByte(b, '%') < 0 && bytes.IndexByte(b, '+') < 0 {
		return b
	}
	out := make([]byte, 0, len(b))
	for i := 0; i < len(b); i++ {
		switch {
		case b[i] == '+':
			out = append(out, ' ')
		case b[i] == '%' && i+2 < len(b) && digit(b[i+1]) >= 0 && digit(b[i+2]) >= 0:
			out = append(out, byte(digit(b[i+1])<<4|digit(b[i+2])))
			i += 2
		default:
			out = append(out, b[i])
		}
	}
	return out
}

func digit(c byte) int { return strings.IndexByte("0123456789abcdef", lower(c)) }

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		return c | 0x20
	}
	return c
}

// Rule is a condition and what then happens.
type Rule[T any] struct {
	Match
	Then T
}

// Host is a virtual host: its rules in order, of which the first that matches
// decides.
type Host[T any] struct {
	Rules []Rule[T]
	Loose bool // paths, as http1.AppendPath takes them
}

// Find is what the first matching rule says, or nil.
func (h *Host[T]) Find(r *Request) *T {
	for i := range h.Rules {
		if h.Rules[i].Matches(r) {
			return &h.Rules[i].Then
		}
	}
	return nil
}

// Table finds a virtual host by its name.
type Table[T any] struct {
	exact, below map[string]*Host[T]
	any          *Host[T]
}

// Add gives a host a name: "example.com", "*.example.com" for every name below
// it, or "*" for whatever has no other.
func (t *Table[T]) Add(name string, h *Host[T]) error {
	if t.exact == nil {
		t.exact, t.below = map[string]*Host[T]{}, map[string]*Host[T]{}
	}
	if err := CheckName(name); err != nil {
		return err
	}
	name = strings.ToLower(name)
	if name == "*" {
		if t.any != nil {
			return fmt.Errorf("name %q is taken", name)
		}
		t.any = h
		return nil
	}
	in, key := t.exact, name
	if suffix, ok := strings.CutPrefix(name, "*"); ok {
		in, key = t.below, suffix
	}
	if in[key] != nil {
		return fmt.Errorf("name %q is taken", name)
	}
	in[key] = h
	return nil
}

// CheckName says what is wrong with the name of a host.
func CheckName(name string) error {
	rest := name
	if name == "*" {
		return nil
	}
	if after, ok := strings.CutPrefix(name, "*."); ok {
		rest = after
	}
	if rest == "" || len(rest) > 253 || strings.ContainsAny(rest, "*/ \t:?#@\\,") || strings.HasSuffix(rest, ".") {
		return fmt.Errorf("%q is no name of a host", name)
	}
	return nil
}

// Host finds the host for what a Host field says: by its whole name, by the
// longest name it is below, else the one for any.
func (t *Table[T]) Host(field []byte) *Host[T] {
	var buf [256]byte
	name := buf[:0]
	for _, c := range WithoutPort(field) {
		if len(name) == len(buf)-1 {
			return t.any
		}
		name = append(name, lower(c))
	}
	if h := t.exact[string(name)]; h != nil {
		return h
	}
	if len(t.below) == 0 {
		return t.any
	}
	for i, c := range name {
		if c == '.' {
			if h := t.below[string(name[i:])]; h != nil {
				return h
			}
		}
	}
	return t.any
}

// WithoutPort is the name in a Host field: no port, no last dot.
func WithoutPort(field []byte) []byte {
	if i := bytes.LastIndexByte(field, ':'); i >= 0 && bytes.IndexByte(field[i:], ']') < 0 {
		field = field[:i]
	}
	return bytes.TrimSuffix(field, []byte("."))
}
