package inspect

// coding says what a value may be written in.
type coding uint8

const (
	codePercent coding = 1 << iota // %27, and %2527
	codePlus                       // + for a blank
	codeJSON                       // \u0027
	codeRaw                        // nothing: bytes, in lower case
)

// normal is a value as a careless reader behind the server would take it: in
// lower case, decoded until nothing is left to decode, with blanks for tabs and
// for comments.
type normal struct {
	text []byte // part of room
	room [maxValue]byte
	// masked is set where bytes that need no coding were coded twice, or in a way
	// no encoder uses.
	masked bool
}

// decode makes n the normal form of s, of which it takes no more than fits.
func decode[T string | []byte](n *normal, s T, c coding) {
	n.masked = false
	s = s[:min(len(s), maxValue)]
	if c&codeRaw != 0 {
		for i := range len(s) {
			b := s[i]
			if b >= 'A' && b <= 'Z' {
				b |= 0x20
			}
			n.room[i] = b
		}
		n.text = n.room[:len(s)]
		return
	}
	again, comment, k := false, false, 0
	for i := 0; i < len(s) && k < len(n.room); k++ {
		b, used := s[i], 1
		switch coded[b] & c {
		case codePercent:
			b, used = percent(n, s, i)
			again = again || b == '%' && used > 1
		case codePlus:
			b = ' '
		case codeJSON:
			b, used = escape(s, i)
		}
		n.room[k] = lower[b]
		comment = comment || b == '*'
		i += used
	}
	n.text = n.room[:k]
	if again {
		n.again()
	}
	if comment || again {
		n.comments()
	}
}

// coded are the bytes that begin a code.
var coded = [256]coding{'%': codePercent, '+': codePlus, '\\': codeJSON}

// percent decodes at i; what is no code stands for itself.
func percent[T string | []byte](n *normal, s T, i int) (byte, int) {
	if i+2 >= len(s) {
		return '%', 1
	}
	if hi, lo := unhex[s[i+1]], unhex[s[i+2]]; hi|lo < 16 {
		b := hi<<4 | lo
		if b == '.' || b >= 'a' && b <= 'z' {
			n.masked = true
		}
		// Two bytes where UTF-8 takes one, as some servers read it still.
		if (b == 0xc0 || b == 0xc1) && i+5 < len(s) && s[i+3] == '%' {
			if hi, lo := unhex[s[i+4]], unhex[s[i+5]]; hi|lo < 16 && hi>>2 == 2 {
				n.masked = true
				return b<<6 | (hi<<4|lo)&0x3f, 6
			}
		}
		return b, 3
	}
	if s[i+1]|0x20 == 'u' && i+5 < len(s) && s[i+2] == '0' && s[i+3] == '0' {
		if hi, lo := unhex[s[i+4]], unhex[s[i+5]]; hi|lo < 16 {
			n.masked = true
			return hi<<4 | lo, 6
		}
	}
	return '%', 1
}

// escape decodes an escape of JSON at i.
func escape[T string | []byte](s T, i int) (byte, int) {
	if i+1 >= len(s) {
		return '\\', 1
	}
	switch s[i+1] {
	case 'u':
		if i+5 < len(s) && s[i+2] == '0' && s[i+3] == '0' {
			if hi, lo := unhex[s[i+4]], unhex[s[i+5]]; hi|lo < 16 {
				return hi<<4 | lo, 6
			}
		}
		return '?', 2
	case 'n':
		return '\n', 2
	case 'r', 't', 'b', 'f':
		return ' ', 2
	}
	return s[i+1], 2
}

// again decodes what was coded twice, in place.
func (n *normal) again() {
	for range 2 {
		out, more := n.text[:0], false
		for i := 0; i < len(n.text); {
			b, used := n.text[i], 1
			if b == '%' {
				if b, used = percent(n, n.text, i); used > 1 {
					n.masked, more = true, true
				}
			}
			out = append(out, lower[b])
			i += used
		}
		if n.text = out; !more {
			return
		}
	}
}

// comments makes comments of SQL blanks, in place.
func (n *normal) comments() {
	t := n.text
	for i := 0; i+3 < len(t); i++ {
		if t[i] != '/' || t[i+1] != '*' {
			continue
		}
		out := t[:i]
		for i < len(t) {
			if t[i] == '/' && i+1 < len(t) && t[i+1] == '*' {
				if end := find(t[i+2:], "*/"); end >= 0 && end < maxComment {
					out = append(out, ' ')
					if t[i+2] != '!' {
						i += end + 4
						continue
					}
					// MySQL runs what is in such a comment.
					for i += 3; i < len(t) && isDigit(t[i]); i++ {
					}
					continue
				}
			}
			if t[i] == '*' && i+1 < len(t) && t[i+1] == '/' {
				out = append(out, ' ')
				i += 2
				continue
			}
			out = append(out, t[i])
			i++
		}
		n.text = out
		return
	}
}

// lower is what a byte becomes: blanks of all kinds one, letters small. A line
// feed stays: to a shell it ends a command.
var lower = func() (t [256]byte) {
	for i := range t {
		c := byte(i)
		switch {
		case c >= 'A' && c <= 'Z':
			c |= 0x20
		case c == '\t' || c == '\r' || c == '\v' || c == '\f':
			c = ' '
		}
		t[i] = c
	}
	return t
}()

// unhex is the value of a hexadecimal digit; more than 15 is none.
var unhex = func() (t [256]byte) {
	for i := range t {
		t[i] = 255
	}
	for i := range 10 {
		t['0'+i] = byte(i)
	}
	for i := range 6 {
		t['a'+i], t['A'+i] = byte(10+i), byte(10+i)
	}
	return t
}()

func find(t []byte, word string) int {
	for i := 0; i+len(word) <= len(t); i++ {
		if string(t[i:i+len(word)]) == word {
			return i
		}
	}
	return -1
}
