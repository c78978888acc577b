package transcode

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"hauberk.dev/mesh/http1"
)

// maxTarget is how many bytes of path and query a request has at most: servers take
// little more.
const maxTarget = 8 << 10

// Request is what a call of gRPC becomes for a server that speaks JSON over HTTP.
type Request struct {
	Method string // of HTTP
	Target string // path and query, encoded
	Body   []byte // in JSON; nil is none
	rule   *rule
}

// bind gives each method its rules. The one that every method has counts only
// where there is no other: servers that have paths of their own do not serve it.
func (s *Schema) bind() {
	for i := range s.rules {
		m := s.rules[i].calls
		m.rules = append(m.rules, &s.rules[i])
	}
	for _, m := range s.methods {
		if len(m.rules) > 1 {
			m.rules = m.rules[1:]
		}
	}
}

// CheckRequests says which method could become no request of HTTP, whatever its
// message. Methods that stream become none.
func (s *Schema) CheckRequests() error {
	var faults []error
	callable := false
	for _, m := range s.methods {
		if m.ClientStreams || m.ServerStreams {
			continue
		}
		callable = true
		var err error
		for _, r := range m.rules {
			if err = r.check(); err == nil {
				break
			}
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", m.Path, err))
		}
	}
	if !callable {
		return errors.New("every method of it streams: none becomes a request")
	}
	slices.SortFunc(faults, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(faults...)
}

// check says why a rule makes no requests.
func (r *rule) check() error {
	switch r.method {
	case "*", "CONNECT", "TRACE", "HEAD":
		return fmt.Errorf("http: method %q makes no request with an answer in JSON", r.method)
	}
	if err := http1.CheckField(r.method, ""); err != nil {
		return fmt.Errorf("http: method %.64q is none of HTTP", r.method)
	}
	path := ""
	for _, seg := range r.path {
		switch {
		case seg.to == nil && (seg.word == "*" || seg.word == "**"):
			return fmt.Errorf("http: %s in a pattern without a field that fills it; write {field=%s}", seg.word, seg.word)
		case seg.word == "*" || seg.word == "**":
			path += "/x"
		default:
			path += "/" + seg.word
		}
	}
	if r.verb != "" {
		path += ":" + r.verb
	}
	if strings.ContainsFunc(path, func(c rune) bool { return c <= ' ' || c > '~' || strings.ContainsRune("\"<>^`{|}?#", c) }) {
		return fmt.Errorf("http: pattern %.128q has what no path may have", path)
	}
	if _, err := http1.AppendPath(nil, nil, []byte("/"+strings.TrimPrefix(path, "/")), false); err != nil {
		return fmt.Errorf("http: pattern %.128q: %w", path, err)
	}
	return nil
}

// Ask makes a request of the message of a call: by the first rule of its method whose
// path the message fills. What goes neither into the path nor into the body goes into
// the query. A value of the path stays in its segment, whatever it is, and makes no
// path of another rule; loose is that of http1.AppendPath. What the schema does not
// have is an error. The body has at most limit bytes; more is ErrTooLarge.
func (s *Schema) Ask(m *Method, message []byte, loose bool, limit int) (*Request, error) {
	var first error
	for _, r := range m.rules {
		err := r.check()
		if err == nil {
			var path string
			if path, err = s.fill(r, message, loose); err == nil {
				return r.request(path, message, limit)
			}
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// step is a segment of a path: a value, or a word of the pattern.
type step struct {
	text  string
	fixed bool
}

// fill makes the path of a rule.
func (s *Schema) fill(r *rule, message []byte, loose bool) (string, error) {
	var parts []step
	for i := 0; i < len(r.path); i++ {
		seg := r.path[i]
		if seg.to == nil {
			parts = append(parts, step{seg.word, true})
			continue
		}
		begin := i
		for !r.path[i].last {
			i++
		}
		text, err := textAt(r.calls.Input, message, seg.to)
		var words []string
		if err == nil {
			words, err = split(text, r.path[begin:i+1])
		}
		if err != nil {
			return "", fmt.Errorf("path: %s: %w", seg.to[len(seg.to)-1].name, err)
		}
		for _, word := range words {
			parts = append(parts, step{text: word})
		}
	}
	if other := s.taken(r, parts); other != nil {
		return "", fmt.Errorf("path: the values make a path of %s", other.calls.Path)
	}
	path := make([]byte, 0, 64)
	for _, p := range parts {
		if path = append(path, '/'); p.fixed {
			path = append(path, p.text...)
		} else {
			path = appendEscaped(path, p.text)
		}
	}
	if len(parts) == 0 {
		path = append(path, '/')
	}
	if r.verb != "" {
		path = append(append(path, ':'), r.verb...)
	}
	_, err := http1.AppendPath(nil, nil, path, loose)
	if err == nil && len(path) > maxTarget {
		err = fmt.Errorf("over %d bytes: %w", maxTarget, ErrTooLarge)
	}
	if err != nil {
		return "", fmt.Errorf("path: %w", err)
	}
	return string(path), nil
}

// split takes the value of a variable apart, as its pattern wants it.
func split(text string, pattern []segment) ([]string, error) {
	words := []string{text}
	many := len(pattern) > 1 || pattern[0].word == "**"
	if many {
		words = strings.Split(text, "/")
	}
	if n := len(pattern); len(words) < n || len(words) > n && pattern[n-1].word != "**" {
		return nil, fmt.Errorf("%.64q does not have the form that the path wants", text)
	}
	for i, word := range words {
		want := pattern[min(i, len(pattern)-1)].word
		switch {
		case word == "":
			return nil, fmt.Errorf("%.64q is empty, or has an empty part: no path can say it", text)
		case word == "." || word == ".." || strings.ContainsAny(word, `/\`):
			return nil, fmt.Errorf("%.64q would change which path it is", text)
		case want != "*" && want != "**" && want != word:
			return nil, fmt.Errorf("%.64q does not have the form that the path wants", text)
		}
	}
	return words, nil
}

// taken is another rule that servers may read the path by: it has a word, or a verb,
// where the path has a value.
func (s *Schema) taken(by *rule, parts []step) *rule {
	if len(parts) == 0 {
		return nil
	}
	end := parts[len(parts)-1]
	if by.verb != "" {
		end.text += ":" + by.verb
	}
	for i := range s.rules {
		if r := &s.rules[i]; r != by && r.method == by.method && r.takes(parts, end, by.verb) {
			return r
		}
	}
	return nil
}

func (r *rule) takes(parts []step, end step, verb string) (takes bool) {
	if len(parts) < len(r.path) || len(parts) > len(r.path) && !r.rest {
		return false
	}
	if r.verb != "" {
		before, ok := strings.CutSuffix(end.text, ":"+r.verb)
		if !ok {
			return false
		}
		end.text, takes = before, r.verb != verb && !end.fixed
	}
	for i, seg := range r.path {
		part := parts[i]
		if i == len(parts)-1 {
			part = end
		}
		switch {
		case seg.word == "*" || seg.word == "**":
		case seg.word != part.text:
			return false
		case !part.fixed:
			takes = true
		}
	}
	return takes
}

// textAt is the value of the field at the end of a path, as a path or a query says
// it. Where there is none it is the zero value, if the field has one.
func textAt(m *Message, raw []byte, to []*field) (string, error) {
	f := to[len(to)-1]
	var v value
	for i, next := range to {
		all, err := (&writer{strict: true}).collect(m, raw)
		if err != nil {
			return "", err
		}
		vs := all[next.index]
		if i == len(to)-1 && len(vs) > 0 {
			v = vs[len(vs)-1]
			break
		}
		if len(vs) == 0 {
			if f.explicit || i < len(to)-1 {
				return "", errors.New("is not there, and the path needs it")
			}
			break
		}
		m, raw = next.message, vs[len(vs)-1].b
	}
	return f.text(v)
}

// text is a value as a path or a query says it.
func (f *field) text(v value) (string, error) {
	if len(v.b) > maxTarget { // before it is escaped, and taken apart
		return "", fmt.Errorf("over %d bytes: %w", maxTarget, ErrTooLarge)
	}
	leaf := f
	if f.kind == kindMessage && f.message.byNumber[1] != nil && strings.HasSuffix(f.message.name, "Value") {
		leaf = f.message.byNumber[1]
	}
	if leaf.kind == kindEnum && leaf.typeName == nullEnum {
		return "", errors.New("null cannot be said in a path or a query")
	}
	w := &writer{limit: maxTarget, strict: true}
	if err := w.single(f, v, 0); err != nil {
		return "", err
	}
	text := string(w.b)
	if strings.HasPrefix(text, `"`) {
		text = ""
		if err := json.Unmarshal(w.b, &text); err != nil {
			return "", err
		}
	}
	if leaf.kind == kindBytes {
		text = strings.NewReplacer("+", "-", "/", "_").Replace(text)
	}
	return text, nil
}

// appendEscaped encodes all that could mean something in a path or a query.
func appendEscaped(b []byte, text string) []byte {
	const digits = "0123456789ABCDEF"
	for i := range len(text) {
		switch c := text[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_', c == '.', c == '~':
			b = append(b, c)
		default:
			b = append(b, '%', digits[c>>4], digits[c&15])
		}
	}
	return b
}

// request puts into the body and the query what the path does not say.
func (r *rule) request(path string, message []byte, limit int) (*Request, error) {
	q := &Request{Method: r.method, Target: path, rule: r}
	var elsewhere [][]*field
	for _, seg := range r.path {
		if seg.to != nil && seg.last {
			elsewhere = append(elsewhere, seg.to)
		}
	}
	in := r.calls.Input
	w := &writer{limit: limit, strict: true}
	if r.all {
		w.skip = elsewhere
		err := w.message(in, message, 0)
		if err == nil && len(w.b) > limit {
			err = ErrTooLarge
		}
		if err != nil {
			return nil, fmt.Errorf("write %s as JSON: %w", in.name[1:], err)
		}
		q.Body = w.b
		return q, nil
	}
	if r.body != nil {
		inner, gone := below(elsewhere, r.body)
		if w.skip = inner; !gone {
			if err := w.only(in, r.body, message); err != nil {
				return nil, err
			}
			q.Body = w.b
		}
		elsewhere = append(elsewhere, []*field{r.body})
	}
	p := parameters{b: append([]byte(path), '?')}
	if err := p.add(in, message, "", elsewhere, 0); err != nil {
		return nil, fmt.Errorf("query: %w", err)
	}
	if p.n > 0 {
		q.Target = string(p.b[:len(p.b)-1])
	}
	return q, nil
}

// only writes one field of a message: the zero of its type if it is not there.
func (w *writer) only(m *Message, f *field, message []byte) error {
	skip := w.skip
	w.skip = nil
	all, err := w.collect(m, message)
	if err == nil {
		vs := all[f.index]
		if len(vs) == 0 && !f.repeated {
			vs = []value{{}}
		}
		w.skip = skip
		err = w.field(f, vs, 0)
	}
	if err == nil && len(w.b) > w.limit {
		err = ErrTooLarge
	}
	if err != nil {
		return fmt.Errorf("write %s as JSON: %w", f.name, err)
	}
	return nil
}

// parameters of a query.
type parameters struct {
	b []byte // each ends in &
	n int
}

// add adds the fields of a message, but for those that are said elsewhere. A message
// that is there and empty is as one that is not.
func (p *parameters) add(m *Message, raw []byte, prefix string, elsewhere [][]*field, depth int) error {
	if depth > maxDepth {
		return errors.New("nested too deep")
	}
	all, err := (&writer{strict: true}).collect(m, raw)
	if err != nil {
		return err
	}
	for i, vs := range all {
		f := m.fields[i]
		inner, gone := below(elsewhere, f)
		if gone || f.absent(vs) {
			continue
		}
		name := prefix + f.json
		if f.kind == kindMessage && !f.repeated && formOf(f.message.name).read == nil {
			if err := p.add(f.message, vs[0].b, name+".", inner, depth+1); err != nil {
				return err
			}
			continue
		}
		if f.isMap() || f.kind == kindGroup || f.kind == kindMessage && !textual(f.message) {
			return fmt.Errorf("%.64q: cannot be said in a query", name)
		}
		for _, v := range vs {
			text, err := f.text(v)
			if err != nil {
				return fmt.Errorf("%.64q: %w", name, err)
			}
			if p.n++; p.n > maxParameters {
				return fmt.Errorf("over %d parameters", maxParameters)
			}
			p.b = append(appendEscaped(append(appendEscaped(p.b, name), '='), text), '&')
			if len(p.b) > maxTarget {
				return fmt.Errorf("over %d bytes: %w", maxTarget, ErrTooLarge)
			}
		}
	}
	return nil
}

// AppendAnswer appends the message that the body of a good answer says. One without
// a body is good only if the message has no fields.
func (q *Request) AppendAnswer(dst, body []byte) ([]byte, error) {
	out := q.rule.calls.Output
	switch {
	case len(bytes.TrimSpace(body)) == 0 && len(out.fields) > 0:
		return nil, fmt.Errorf("no body, where a %s is wanted", out.name[1:])
	case len(bytes.TrimSpace(body)) == 0:
		return dst, nil
	case q.rule.answer != nil:
		return q.rule.answer.appendWire(dst, body)
	}
	return out.AppendWire(dst, body)
}
