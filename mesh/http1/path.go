package http1

import (
	"bytes"
	"errors"
)

// ErrAmbiguous is a path that servers read in different ways.
var ErrAmbiguous = errors.New("servers read this path in different ways")

// AppendPath appends the path of a request target as servers understand it:
// without the query, percent-encoding of ordinary characters undone. What
// servers do not agree on (empty and dot segments, an encoded slash, a
// backslash, parameters, a stray percent sign) is ErrAmbiguous. The asterisk of
// OPTIONS is its own path.
//
// If loose, empty segments count as none, an encoded percent sign stays encoded,
// and parameters are part of their segment. Dot segments and an encoded slash are
// never accepted: who takes %2F for a slash sees another path than was judged.
func AppendPath(dst, method, target []byte, loose bool) ([]byte, error) {
	if len(target) == 1 && target[0] == '*' && string(method) == "OPTIONS" {
		return append(dst, '*'), nil
	}
	_, path, _ := SplitTarget(target)
	if len(path) == 0 || path[0] != '/' {
		target, _, _ = bytes.Cut(target, []byte("?")) // the rest may be a secret
		return nil, malformed("target %.60q is neither a path nor an absolute URI", target)
	}
	begun := len(dst) // where the segment that is read began, after its slash
	for i := 0; i < len(path); i++ {
		c := path[i]
		encoded := c == '%'
		if encoded {
			if i+2 >= len(path) || !isHex(path[i+1]) || !isHex(path[i+2]) {
				return nil, ErrAmbiguous
			}
			c = unhex(path[i+1])<<4 | unhex(path[i+2])
			i += 2
			if c < ' ' || c == 0x7f || c == '/' || !loose && c == '%' {
				return nil, ErrAmbiguous
			}
		}
		switch {
		case c == '\\' || c == ';' && !loose:
			return nil, ErrAmbiguous
		case c == '%' && encoded:
			dst = append(dst, "%25"...)
		case c == '/' && i > 0:
			if isDots(dst[begun:]) || len(dst) == begun && !loose {
				return nil, ErrAmbiguous
			}
			if len(dst) == begun {
				continue
			}
			dst = append(dst, c)
			begun = len(dst)
		default:
			dst = append(dst, c)
			if i == 0 {
				begun = len(dst)
			}
		}
	}
	if isDots(dst[begun:]) {
		return nil, ErrAmbiguous
	}
	return dst, nil
}

func isDots(segment []byte) bool {
	return len(segment) == 1 && segment[0] == '.' || len(segment) == 2 && segment[0] == '.' && segment[1] == '.'
}

// SplitTarget takes a request target apart: the authority, if it is an absolute
// URI, the path and the query with its question mark.
func SplitTarget(target []byte) (authority, path, query []byte) {
	rest, absolute := cutScheme(target)
	if absolute {
		end := bytes.IndexAny(rest, "/?")
		if end < 0 {
			return rest, root, nil
		}
		authority, rest = rest[:end], rest[end:]
	}
	mark := bytes.IndexByte(rest, '?')
	if mark < 0 {
		return authority, rest, nil
	}
	if mark == 0 && absolute {
		return authority, root, rest
	}
	return authority, rest[:mark], rest[mark:]
}

var root = []byte("/")

func cutScheme(target []byte) ([]byte, bool) {
	for _, s := range [...]string{"http://", "https://"} {
		if len(target) > len(s) && is(target[:len(s)], s) {
			return target[len(s):], true
		}
	}
	return target, false
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
