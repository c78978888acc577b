package inspect

// Types are those an argument has had.
type Types uint16

// The types.
const (
	TypeNull Types = 1 << iota
	TypeBool
	TypeInt
	TypeFloat
	TypeString
	TypeList
	TypeObject
	TypeVarint // of Protobuf, by how they are written
	TypeFixed64
	TypeBytes
	TypeFixed32
	TypeClass // of Hessian
)

var typeNames = [...]string{"null", "bool", "int", "float", "string", "list", "object", "varint", "fixed64", "bytes", "fixed32", "class"}

func (t Types) String() string {
	s, sep := "", ""
	for i, n := range typeNames {
		if t&(1<<i) != 0 {
			s, sep = s+sep+n, "|"
		}
	}
	return s
}

// json walks over a text of JSON, which may end anywhere. What is no JSON ends
// the walk, and is looked at as bytes.
func (q *Query) json(b []byte) {
	w := walker{q: q, b: b}
	if !w.value(0, 0) {
		q.bytes(b, codePercent|codeJSON)
		return
	}
	if w.skip(); w.i < len(b) {
		q.bytes(b[w.i:], codePercent|codeJSON)
	}
}

// walker reads JSON and keeps the path of the field it is at.
type walker struct {
	q    *Query
	b    []byte
	i    int
	path [maxPathField]byte
}

func (w *walker) skip() {
	for w.i < len(w.b) && (w.b[w.i] == ' ' || w.b[w.i] == '\n' || w.b[w.i] == '\t' || w.b[w.i] == '\r') {
		w.i++
	}
}

// note notes that the argument whose path is n bytes has a type.
func (w *walker) note(n int, t Types) {
	if n == 0 {
		return
	}
	from := len(w.q.name)
	w.q.name = append(w.q.name, w.path[:n]...)
	w.q.argument(from, t)
}

// value reads one value whose path is n bytes. It is false where the text is no
// JSON; the end of what is there is well.
func (w *walker) value(n, depth int) bool {
	w.skip()
	if w.i >= len(w.b) {
		return true
	}
	switch c := w.b[w.i]; {
	case c == '"':
		w.note(n, TypeString)
		s, ok := w.text()
		if fresh := text(w.q, inBody, s, codePercent|codeJSON); fresh != 0 {
			w.q.at(fresh, quote(w.path[:n]))
		}
		return ok
	case c == '{':
		w.note(n, TypeObject)
		return depth < maxDepth && w.object(n, depth+1)
	case c == '[':
		w.note(n, TypeList)
		return depth < maxDepth && w.list(n, depth+1)
	case c == '-' || isDigit(c):
		w.note(n, w.number())
		return true
	}
	for _, word := range [...]struct {
		text string
		t    Types
	}{{"true", TypeBool}, {"false", TypeBool}, {"null", TypeNull}} {
		rest := w.b[w.i:]
		if m := min(len(rest), len(word.text)); string(rest[:m]) == word.text[:m] {
			w.note(n, word.t)
			w.i += m
			return true
		}
	}
	return false
}

func (w *walker) number() Types {
	t := TypeInt
	for ; w.i < len(w.b); w.i++ {
		switch c := w.b[w.i]; {
		case c == '.' || c == 'e' || c == 'E':
			t = TypeFloat
		case !isDigit(c) && c != '-' && c != '+':
			return t
		}
	}
	return t
}

// text reads a string without its quotes.
func (w *walker) text() ([]byte, bool) {
	from := w.i + 1
	for i := from; i < len(w.b); i++ {
		switch w.b[i] {
		case '\\':
			i++
		case '"':
			w.i = i + 1
			return w.b[from:i], true
		}
	}
	w.i = len(w.b)
	return w.b[from:], true
}

func (w *walker) object(n, depth int) bool {
	w.i++
	for first := true; ; first = false {
		if w.skip(); w.i >= len(w.b) {
			return true
		}
		if w.b[w.i] == '}' {
			w.i++
			return true
		}
		if !first {
			if w.b[w.i] != ',' {
				return false
			}
			w.i++
			if w.skip(); w.i >= len(w.b) {
				return true
			}
		}
		if w.b[w.i] != '"' {
			return false
		}
		key, _ := w.text()
		text(w.q, inBody, key, codePercent|codeJSON)
		m := n
		if n > 0 && m < len(w.path) {
			w.path[m] = '.'
			m++
		}
		m += copy(w.path[m:], key)
		if w.skip(); w.i >= len(w.b) {
			return true
		}
		if w.b[w.i] != ':' {
			return false
		}
		w.i++
		if !w.value(m, depth) {
			return false
		}
	}
}

func (w *walker) list(n, depth int) bool {
	w.i++
	m := n + copy(w.path[n:], "[]")
	for first := true; ; first = false {
		if w.skip(); w.i >= len(w.b) {
			return true
		}
		if w.b[w.i] == ']' {
			w.i++
			return true
		}
		if !first {
			if w.b[w.i] != ',' {
				return false
			}
			w.i++
		}
		if !w.value(m, depth) {
			return false
		}
	}
}

// protobuf notes the numbers of the fields of a message of gRPC and how they are
// written. What is inside of one is not told from a text.
func (q *Query) protobuf(b []byte) {
	if len(b) < 5 || b[0] != 0 { // compressed
		return
	}
	b = b[5:]
	for len(b) > 0 {
		tag, n := varint(b)
		if n == 0 || tag>>3 == 0 || tag>>3 >= 1<<29 {
			return
		}
		b = b[n:]
		t, size := Types(0), uint64(0)
		switch tag & 7 {
		case 0:
			_, n := varint(b)
			t, size = TypeVarint, uint64(n)
			if n == 0 {
				return
			}
		case 1:
			t, size = TypeFixed64, 8
		case 2:
			length, n := varint(b)
			if n == 0 {
				return
			}
			b = b[n:]
			t, size = TypeBytes, length
		case 5:
			t, size = TypeFixed32, 4
		default:
			return
		}
		from := len(q.name)
		q.name = number(q.name, tag>>3)
		q.argument(from, t)
		if size > uint64(len(b)) {
			return
		}
		b = b[size:]
	}
}

func varint(b []byte) (v uint64, n int) {
	for i := 0; i < len(b) && i < 10; i++ {
		v |= uint64(b[i]&0x7f) << (7 * i)
		if b[i] < 0x80 {
			return v, i + 1
		}
	}
	return 0, 0
}

func number(dst []byte, v uint64) []byte {
	var b [20]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + v%10)
		if v /= 10; v == 0 {
			return append(dst, b[i:]...)
		}
	}
}

// Class notes a class that an RPC call carries.
func (q *Query) Class(name []byte) {
	from := len(q.name)
	q.name = append(q.name, name[:min(len(name), maxPathField)]...)
	q.argument(from, TypeClass)
	text(q, inBody, name, codeRaw)
}

// Text looks at a string that an RPC call carries.
func (q *Query) Text(s []byte) { text(q, inBody, s, codePercent) }
