package hessian

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Value is a value that was read. Of one that is spoken of again there is one
// Value, so it may be inside of itself.
type Value struct {
	Kind   Kind
	Class  string // of an object
	Text   string // or bytes
	Number int64  // also 1 for true, and a date in milliseconds since 1970
	Real   float64
	Keys   []string // of an object, whose values are Parts
	Parts  []*Value // of a map: key, value, key...; of a list its values
}

// Kind is what a value is.
type Kind uint8

// The kinds.
const (
	KindNull Kind = iota
	KindBool
	KindWhole
	KindReal
	KindText
	KindBytes
	KindDate
	KindList
	KindMap
	KindObject
)

// Member is the value of a field of an object, and nil if it has no such field.
func (v *Value) Member(name string) *Value {
	if v == nil || v.Kind != KindObject {
		return nil
	}
	if i := slices.Index(v.Keys, name); i >= 0 {
		return v.Parts[i]
	}
	return nil
}

// MaxValues is how many values are read of one stream.
const MaxValues = 1 << 17

// ReadValue reads the one value that b holds in the draft, whole. What follows it
// is an error.
func ReadValue(b []byte) (*Value, error) {
	t := &tree{b: b}
	v, err := t.value(0)
	if err == nil && t.at != len(b) {
		err = t.fault("something follows the value")
	}
	return v, err
}

// ReadValues reads the values that b holds in the draft, one behind the other. Those
// that follow may speak of what is in those before.
func ReadValues(b []byte) (all []*Value, err error) {
	t := &tree{b: b}
	for t.at < len(b) {
		v, err := t.value(0)
		if err != nil {
			return nil, err
		}
		all = append(all, v)
	}
	return all, nil
}

// tree reads a value with all that is in it.
type tree struct {
	b       []byte
	at      int
	values  int
	classes []shape
	refs    []*Value // what can be referred to, in order
}

type shape struct {
	name   string
	fields []string
}

func (t *tree) fault(format string, args ...any) error {
	return &SyntaxError{t.at, fmt.Sprintf(format, args...)}
}

func (t *tree) take(n int) ([]byte, error) {
	if n < 0 || len(t.b)-t.at < n {
		return nil, ErrShort
	}
	t.at += n
	return t.b[t.at-n : t.at], nil
}

// number reads n bytes as a number with a sign.
func (t *tree) number(n int) (v int64, err error) {
	b, err := t.take(n)
	for i, c := range b {
		if i == 0 {
			v = int64(int8(c))
			continue
		}
		v = v<<8 | int64(c)
	}
	return v, err
}

// count is an integer of the protocol.
func (t *tree) count(most int) (int, error) {
	tag, err := t.take(1)
	if err != nil {
		return 0, err
	}
	n, ok, err := t.whole(tag[0])
	short := tag[0] >= 0x80 && tag[0] <= 0xd7 || tag[0] == 'I' // not one of 64 bits
	if err == nil && (!ok || !short || n < 0 || n > int64(most)) {
		err = t.fault("tag %#02x is no count up to %d", tag[0], most)
	}
	return int(n), err
}

// whole reads a number of 32 or 64 bits with this tag.
func (t *tree) whole(tag byte) (n int64, ok bool, err error) {
	switch {
	case tag >= 0x80 && tag <= 0xbf:
		return int64(tag) - 0x90, true, nil
	case tag >= 0xc0 && tag <= 0xcf:
		b, err := t.take(1)
		if err != nil {
			return 0, true, err
		}
		return (int64(tag)-0xc8)<<8 + int64(b[0]), true, nil
	case tag >= 0xd0 && tag <= 0xd7, tag >= 0x38 && tag <= 0x3f:
		b, err := t.take(2)
		if err != nil {
			return 0, true, err
		}
		base := int64(0xd4)
		if tag < 0x40 {
			base = 0x3c
		}
		return (int64(tag)-base)<<16 + int64(b[0])<<8 + int64(b[1]), true, nil
	case tag >= 0xd8 && tag <= 0xef:
		return int64(tag) - 0xe0, true, nil
	case tag >= 0xf0:
		b, err := t.take(1)
		if err != nil {
			return 0, true, err
		}
		return (int64(tag)-0xf8)<<8 + int64(b[0]), true, nil
	case tag == 'I', tag == 'w':
		n, err = t.number(4)
		return n, true, err
	case tag == 'L':
		n, err = t.number(8)
		return n, true, err
	}
	return 0, false, nil
}

func (t *tree) real(tag byte) (v float64, ok bool, err error) {
	width := map[byte]int{'g': 0, 'h': 0, 'i': 1, 'j': 2, 'k': 4, 'D': 8}
	n, ok := width[tag]
	if !ok {
		return 0, false, nil
	}
	raw, err := t.number(n)
	switch tag {
	case 'g':
		v = 0
	case 'h':
		v = 1
	case 'k':
		v = float64(math.Float32frombits(uint32(raw)))
	case 'D':
		v = math.Float64frombits(uint64(raw))
	default:
		v = float64(raw)
	}
	return v, true, err
}

// value reads one value.
func (t *tree) value(depth int) (*Value, error) {
	if t.values++; t.values > MaxValues || depth > MaxDepth {
		return nil, t.fault("too many values, or nested too deep")
	}
	tag, err := t.take(1)
	for err == nil && tag[0] == 'O' {
		if err = t.class(); err == nil {
			tag, err = t.take(1)
		}
	}
	if err != nil {
		return nil, err
	}
	c := tag[0]
	if n, ok, err := t.whole(c); ok {
		return &Value{Kind: KindWhole, Number: n}, err
	}
	if v, ok, err := t.real(c); ok {
		return &Value{Kind: KindReal, Real: v}, err
	}
	switch {
	case c == 'N':
		return &Value{}, nil
	case c == 'T', c == 'F':
		n := &Value{Kind: KindBool}
		if c == 'T' {
			n.Number = 1
		}
		return n, nil
	case c <= 0x1f, c == 'S', c == 's':
		text, err := t.text(c)
		return &Value{Kind: KindText, Text: text}, err
	case c >= 0x20 && c <= 0x2f, c == 'B', c == 'b':
		raw, err := t.bytes(c)
		return &Value{Kind: KindBytes, Text: raw}, err
	case c == 'd':
		n, err := t.number(8)
		return &Value{Kind: KindDate, Number: n}, err
	case c == 'R', c == 'J', c == 'K':
		n, err := t.number(map[byte]int{'R': 4, 'K': 2, 'J': 1}[c])
		if c == 'J' {
			n &= 0xff
		} else if c == 'K' {
			n &= 0xffff
		}
		if err == nil && (n < 0 || n >= int64(len(t.refs))) {
			err = t.fault("there is no value %d to refer to", n)
		}
		if err != nil {
			return nil, err
		}
		return t.refs[n], nil
	}
	return t.container(c, depth)
}

// class reads a definition.
func (t *tree) class() error {
	n, err := t.count(1 << 10)
	if err != nil {
		return err
	}
	s := shape{}
	if s.name, err = t.chars(n); err != nil {
		return err
	}
	if n, err = t.count(MaxFields); err != nil {
		return err
	}
	for range n {
		tag, err := t.take(1)
		if err != nil {
			return err
		}
		field, err := t.text(tag[0])
		if err != nil {
			return err
		}
		if slices.Contains(s.fields, field) {
			return t.fault("a field is there twice")
		}
		s.fields = append(s.fields, field)
	}
	if t.classes = append(t.classes, s); len(t.classes) > MaxClasses {
		return t.fault("over %d classes", MaxClasses)
	}
	return nil
}

// container reads a list, a map or an object. It can be referred to from its
// beginning on.
func (t *tree) container(c byte, depth int) (*Value, error) {
	n := &Value{}
	t.refs = append(t.refs, n)
	switch c {
	case 'V', 'M':
		want, err := int64(-1), t.typeName()
		if err != nil {
			return nil, err
		}
		if n.Kind = KindMap; c == 'V' {
			n.Kind = KindList
			if want, err = t.length(); err != nil {
				return nil, err
			}
		}
		for {
			if t.at < len(t.b) && t.b[t.at] == 'z' {
				t.at++
				if want >= 0 && int64(len(n.Parts)) != want {
					return nil, t.fault("a list of %d values has %d", want, len(n.Parts))
				}
				if c == 'M' && len(n.Parts)%2 != 0 {
					return nil, t.fault("a key without a value")
				}
				return n, nil
			}
			if err := t.into(n, depth); err != nil {
				return nil, err
			}
		}
	case 'v': // a list of a type that was named before
		if _, err := t.count(1 << 20); err != nil {
			return nil, err
		}
		size, err := t.count(MaxValues)
		n.Kind = KindList
		for i := 0; err == nil && i < size; i++ {
			err = t.into(n, depth)
		}
		return n, err
	case 'o':
		i, err := t.count(MaxClasses)
		if err != nil {
			return nil, err
		}
		if i >= len(t.classes) {
			return nil, t.fault("class %d is not defined", i)
		}
		n.Kind, n.Class, n.Keys = KindObject, t.classes[i].name, t.classes[i].fields
		for range n.Keys {
			if err := t.into(n, depth); err != nil {
				return nil, err
			}
		}
		return n, nil
	}
	return nil, t.fault("unknown tag %#02x", c)
}

func (t *tree) into(n *Value, depth int) error {
	v, err := t.value(depth + 1)
	n.Parts = append(n.Parts, v)
	return err
}

// typeName passes over the type of a list or a map, which may be left out.
func (t *tree) typeName() (err error) {
	if t.at >= len(t.b) {
		return ErrShort
	}
	switch t.b[t.at] {
	case 't':
		t.at++
		n, err := t.number(2)
		if err == nil {
			_, err = t.chars(int(n & 0xffff))
		}
		return err
	case 'u':
		t.at++
		_, err = t.count(1 << 20)
	case 'T': // a type for some readers, the value true for others
		err = t.fault("a type begins with %#02x", 'T')
	}
	return err
}

// length is that of a list, -1 if it does not say so.
func (t *tree) length() (n int64, err error) {
	switch {
	case t.at >= len(t.b):
		return 0, ErrShort
	case t.b[t.at] == 'n':
		t.at++
		n, err = t.number(1)
		return n & 0xff, err
	case t.b[t.at] == 'l':
		t.at++
		if n, err = t.number(4); err == nil && n < 0 {
			err = t.fault("a list of %d values", n)
		}
		return n, err
	}
	return -1, nil
}

// text reads a string with this tag, in its pieces. The last may be short, as some
// writers have it.
func (t *tree) text(c byte) (string, error) {
	var all strings.Builder
	for {
		n := int64(c)
		switch {
		case c <= 0x1f:
		case c == 'S', c == 's':
			var err error
			if n, err = t.number(2); err != nil {
				return "", err
			}
			n &= 0xffff
		default:
			return "", t.fault("tag %#02x in a string", c)
		}
		piece, err := t.chars(int(n))
		if err != nil {
			return "", err
		}
		all.WriteString(piece)
		if c != 's' {
			return joined(all.String()), nil
		}
		tag, err := t.take(1)
		if err != nil {
			return "", err
		}
		c = tag[0]
	}
}

// chars reads so many units of UTF-16, each in one to three bytes; some writers
// write two of them as one character of four.
func (t *tree) chars(n int) (string, error) {
	begin := t.at
	for n > 0 {
		if t.at >= len(t.b) {
			return "", ErrShort
		}
		width, units := 1, 1
		switch c := t.b[t.at]; {
		case c < 0x80:
		case c&0xe0 == 0xc0:
			width = 2
		case c&0xf0 == 0xe0:
			width = 3
		case c&0xf8 == 0xf0 && n > 1:
			width, units = 4, 2
		default:
			return "", t.fault("byte %#02x in a string", c)
		}
		b, err := t.take(width)
		if err != nil {
			return "", err
		}
		for _, c := range b[1:] {
			if c&0xc0 != 0x80 {
				return "", t.fault("byte %#02x in a character", c)
			}
		}
		n -= units
	}
	return string(t.b[begin:t.at]), nil
}

// joined makes one character of two halves that Java wrote as two. A half alone
// is no character.
func joined(s string) string {
	if utf8.ValidString(s) {
		return s
	}
	var b []byte
	var high rune
	flush := func() {
		if high != 0 {
			b = utf8.AppendRune(b, utf8.RuneError)
		}
		high = 0
	}
	for i := 0; i < len(s); {
		c, n := utf8.DecodeRuneInString(s[i:])
		if c == utf8.RuneError && n == 1 && i+2 < len(s) && s[i]&0xf0 == 0xe0 {
			c, n = rune(s[i]&15)<<12|rune(s[i+1]&63)<<6|rune(s[i+2]&63), 3
		}
		i += n
		switch {
		case c >= 0xd800 && c < 0xdc00:
			flush()
			high = c
			continue
		case c >= 0xdc00 && c < 0xe000 && high != 0:
			c, high = utf16.DecodeRune(high, c), 0
		}
		flush()
		b = utf8.AppendRune(b, c)
	}
	flush()
	return string(b)
}

func (t *tree) bytes(c byte) (string, error) {
	var all strings.Builder
	for {
		n := int64(c) - 0x20
		switch {
		case c >= 0x20 && c <= 0x2f:
		case c == 'B', c == 'b':
			var err error
			if n, err = t.number(2); err != nil {
				return "", err
			}
			n &= 0xffff
		default:
			return "", t.fault("tag %#02x in bytes", c)
		}
		b, err := t.take(int(n))
		if err != nil {
			return "", err
		}
		all.Write(b)
		if c != 'b' {
			return all.String(), nil
		}
		tag, err := t.take(1)
		if err != nil {
			return "", err
		}
		c = tag[0]
	}
}
