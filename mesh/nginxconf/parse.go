// Package nginxconf turns a configuration of nginx into one of the proxy alone.
//
// It knows the common directives only. What it does not know, or what would mean
// something else, it says by line: a configuration that is converted in part
// serves other things than the one it came from.
package nginxconf

import "fmt"

// Bounds of what is read.
const (
	maxDepth      = 8
	maxDirectives = 20_000
)

// directive is one line, or one block, of nginx.conf.
type directive struct {
	line  int
	name  string
	args  []string
	block []directive
	open  bool // it has a block
}

// Problem is what could not be converted.
type Problem struct {
	Line int
	Why  string
}

func (p Problem) String() string { return fmt.Sprintf("line %d: %s", p.Line, p.Why) }

// reader takes a file apart.
type reader struct {
	text  string
	at    int
	line  int
	count int
}

// word is the next word, or one of { } ; or "" at the end. quoted words are never
// taken for those.
func (r *reader) word() (w string, quoted bool, err error) {
	for r.at < len(r.text) {
		switch c := r.text[r.at]; {
		case c == '\n':
			r.line++
			r.at++
		case c == ' ' || c == '\t' || c == '\r':
			r.at++
		case c == '#':
			for r.at < len(r.text) && r.text[r.at] != '\n' {
				r.at++
			}
		case c == '{' || c == '}' || c == ';':
			r.at++
			return string(c), false, nil
		case c == '"' || c == '\'':
			w, err := r.quoted(c)
			return w, true, err
		default:
			return r.bare(), true, nil
		}
	}
	return "", false, nil
}

func (r *reader) quoted(end byte) (string, error) {
	begun := r.line
	var b []byte
	for r.at++; r.at < len(r.text); r.at++ {
		c := r.text[r.at]
		switch {
		case c == '\\' && r.at+1 < len(r.text) && (r.text[r.at+1] == end || r.text[r.at+1] == '\\'):
			r.at++
			c = r.text[r.at]
		case c == end:
			r.at++
			return string(b), nil
		case c == '\n':
			r.line++
		}
		b = append(b, c)
	}
	return "", fmt.Errorf("line %d: a quote has no end", begun)
}

// bare is a word without quotes. A brace after a dollar sign is part of it.
func (r *reader) bare() string {
	from := r.at
	for ; r.at < len(r.text); r.at++ {
		switch r.text[r.at] {
		case ' ', '\t', '\r', '\n', ';':
			return r.text[from:r.at]
		case '\\':
			r.at++
		case '{':
			if r.at > from && r.text[r.at-1] == '$' {
				for r.at < len(r.text) && r.text[r.at] != '}' {
					r.at++
				}
				continue
			}
			return r.text[from:r.at]
		}
	}
	r.at = min(r.at, len(r.text))
	return r.text[from:r.at]
}

// block reads directives up to the brace that ends them.
func (r *reader) block(depth int) ([]directive, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("line %d: blocks in more than %d blocks", r.line, maxDepth)
	}
	var all []directive
	for {
		w, quoted, err := r.word()
		switch {
		case err != nil:
			return nil, err
		case !quoted && (w == "" && depth == 0 || w == "}" && depth > 0):
			return all, nil
		case !quoted:
			return nil, fmt.Errorf("line %d: unexpected %q", r.line, w)
		}
		if r.count++; r.count > maxDirectives {
			return nil, fmt.Errorf("more than %d directives", maxDirectives)
		}
		d := directive{line: r.line, name: w}
		if err := r.rest(&d, depth); err != nil {
			return nil, err
		}
		all = append(all, d)
	}
}

// rest reads what follows the name of a directive.
func (r *reader) rest(d *directive, depth int) (err error) {
	for {
		w, quoted, err := r.word()
		switch {
		case err != nil:
			return err
		case quoted:
			d.args = append(d.args, w)
		case w == ";":
			return nil
		case w == "{":
			d.open = true
			d.block, err = r.block(depth + 1)
			return err
		default:
			return fmt.Errorf("line %d: %s does not end in ; or a block", d.line, d.name)
		}
	}
}
