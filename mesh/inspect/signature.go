package inspect

// place is where in a request a value stands.
type place uint8

const (
	inPath place = iota
	inQuery
	inHeader
	inBody  // a value of its own: a string of JSON, a field of a form
	inBytes // not told apart: the piece of a body
)

var placeNames = [...]string{"path", "query", "header", "body", "body"}

// A signature is a word to look for in normal text, and what must be around it
// for it to be an attack. The word alone is found in ordinary text.
type signature struct {
	word    string
	kind    Kind
	confirm func(*value, int, int) bool // of the word from, to
}

// value is one normal text and where it was found.
type value struct {
	normal
	place place
}

// signatures are made once, here: all services look for the same.
var signatures = append(append(append(sqlWords(), shellWords()...), pathWords()...), otherWords()...)

var machine = func() *automaton {
	words := make([]string, len(signatures))
	for i, s := range signatures {
		words[i] = s.word
	}
	return newAutomaton(words)
}()

// match looks for all signatures at once and returns those that were confirmed,
// one of each kind, as bits; at is where the last stands.
func (v *value) match() (found uint32, at int) {
	m, s := machine, 0
	next, classes, width, first := m.next, &m.classes, m.width, int(m.first)
	for i, b := range v.text {
		if s = int(next[s*width+int(classes[b])]); s < first {
			continue
		}
		for _, n := range m.words[s-first] {
			g := &signatures[n]
			from := i + 1 - len(g.word)
			if found&(1<<g.kind) == 0 && (g.confirm == nil || g.confirm(v, from, i+1)) {
				found |= 1 << g.kind
				at = from
			}
		}
	}
	if v.place == inPath || v.place == inQuery { // elsewhere text has lines
		for i, b := range v.text {
			if b == '\n' && found&(1<<Shell) == 0 && v.command(i, i+1) {
				found, at = found|1<<Shell, i
			}
		}
	}
	return found, at
}

func words(k Kind, confirm func(*value, int, int) bool, all ...string) []signature {
	out := make([]signature, len(all))
	for i, w := range all {
		out[i] = signature{w, k, confirm}
	}
	return out
}

// What follows reads around a word.

func (v *value) before(i int) byte { // the last byte that is no blank, 0 at the beginning
	for i--; i >= 0 && (v.text[i] == ' ' || v.text[i] == '\n'); i-- {
	}
	if i < 0 {
		return 0
	}
	return v.text[i]
}

func (v *value) skip(i int) int {
	for i < len(v.text) && (v.text[i] == ' ' || v.text[i] == '\n') {
		i++
	}
	return i
}

func (v *value) at(i int) byte {
	if i < 0 || i >= len(v.text) {
		return 0
	}
	return v.text[i]
}

func (v *value) has(i int, word string) bool {
	if i < 0 || i+len(word) > len(v.text) {
		return false
	}
	for n := range len(word) {
		if b := v.text[i+n]; b != word[n] && (b != '\n' || word[n] != ' ') {
			return false
		}
	}
	return true
}

// within tells whether a word stands in the next n bytes.
func (v *value) within(i, n int, word string) bool {
	if i > len(v.text) {
		return false
	}
	return find(v.text[i:min(len(v.text), i+n)], word) >= 0
}

// blankless tells whether the value is one word.
func (v *value) blankless() bool {
	for _, b := range v.text {
		if b == ' ' || b == '\n' {
			return false
		}
	}
	return true
}

func isDigit(b byte) bool { return b >= '0' && b <= '9' }
func isLetter(b byte) bool {
	return b >= 'a' && b <= 'z'
}
func isWord(b byte) bool  { return isLetter(b) || isDigit(b) || b == '_' }
func isQuote(b byte) bool { return b == '\'' || b == '"' || b == '`' }
