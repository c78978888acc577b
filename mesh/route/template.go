package route

import (
	"fmt"
	"strings"

	"hauberk.dev/mesh/http1"
)

// Template is text with parts of the request in it: $host, $authority (the host
// with its port), $path, $rest (of the path, after the prefix of the rule),
// $query (with its question mark), $uri (the target as it came), $scheme,
// $remote, and $1 to $9 of the rule's regular expression. $$ is a dollar sign.
type Template struct{ parts []part }

type part struct {
	text  string
	name  variable
	group int
}

type variable uint8

const (
	literal variable = iota
	host
	path
	rest
	query
	uri
	scheme
	remote
	group
	authority
)

var variables = map[string]variable{"host": host, "authority": authority, "path": path, "rest": rest, "query": query, "uri": uri, "scheme": scheme, "remote": remote}

// ParseTemplate reads a template.
func ParseTemplate(s string) (*Template, error) {
	t := &Template{}
	for s != "" {
		text, after, found := strings.Cut(s, "$")
		if text != "" {
			t.parts = append(t.parts, part{text: text})
		}
		if !found {
			break
		}
		p, rest, err := parsePart(after)
		if err != nil {
			return nil, err
		}
		t.parts, s = append(t.parts, p), rest
	}
	return t, nil
}

// parsePart reads what follows a dollar sign.
func parsePart(s string) (p part, after string, err error) {
	if after, ok := strings.CutPrefix(s, "$"); ok {
		return part{text: "$"}, after, nil
	}
	if s != "" && s[0] >= '1' && s[0] <= '9' {
		return part{name: group, group: int(s[0] - '0')}, s[1:], nil
	}
	braced := strings.HasPrefix(s, "{")
	s = strings.TrimPrefix(s, "{")
	n := 0
	for n < len(s) && (s[n] >= 'a' && s[n] <= 'z' || s[n] == '_') {
		n++
	}
	name, after := s[:n], s[n:]
	if braced {
		var ok bool
		if after, ok = strings.CutPrefix(after, "}"); !ok {
			return p, "", fmt.Errorf("${%s has no end", name)
		}
	}
	v, ok := variables[name]
	if !ok {
		return p, "", fmt.Errorf("$%s is not known: use $host, $authority, $path, $rest, $query, $uri, $scheme, $remote or $1 to $9", name)
	}
	return part{name: v}, after, nil
}

// Groups is the highest $1 to $9 it reads.
func (t *Template) Groups() (n int) {
	for _, p := range t.parts {
		n = max(n, p.group)
	}
	return n
}

// HasQuery says whether the template itself decides on the query.
func (t *Template) HasQuery() bool {
	for _, p := range t.parts {
		if p.name == query || p.name == uri || p.name == literal && strings.Contains(p.text, "?") {
			return true
		}
	}
	return false
}

// Append appends the text for a request. Parts of the path are encoded again.
func (t *Template) Append(dst []byte, r *Request) []byte {
	var groups []int
	for i := range t.parts {
		p := &t.parts[i]
		switch p.name {
		case literal:
			dst = append(dst, p.text...)
		case host:
			dst = append(dst, WithoutPort(r.Message.Host)...)
		case authority:
			dst = append(dst, r.Message.Host...)
		case path:
			dst = appendEscaped(dst, r.Path)
		case rest:
			dst = appendEscaped(dst, r.rest)
		case query:
			dst = append(dst, r.Query...)
		case uri:
			_, p, q := http1.SplitTarget(r.Message.Target)
			dst = append(append(dst, p...), q...)
		case scheme:
			dst = append(dst, r.Scheme...)
		case remote:
			dst = append(dst, r.Remote...)
		case group:
			if groups == nil && r.pattern != nil {
				groups = r.pattern.FindSubmatchIndex(r.Path)
			}
			if n := 2 * p.group; n+1 < len(groups) && groups[n] >= 0 {
				dst = appendEscaped(dst, r.Path[groups[n]:groups[n+1]])
			}
		}
	}
	return dst
}

const hexDigits = "0123456789ABCDEF"

// appendEscaped encodes what a path may not hold as it is. A percent sign in a
// path that was read is one of an encoding that was kept.
func appendEscaped(dst, path []byte) []byte {
	for _, c := range path {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("\"<>?#[]\\^`{|}", c) >= 0 {
			dst = append(dst, '%', hexDigits[c>>4], hexDigits[c&15])
			continue
		}
		dst = append(dst, c)
	}
	return dst
}
