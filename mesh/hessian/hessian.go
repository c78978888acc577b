// Package hessian reads and writes as much of Hessian 2 as calls take.
//
// Reader tells calls apart: it skips values, and reads strings, maps and the head
// of an object, in the two dialects in use: Hessian 2.0 as Dubbo writes it, and
// the draft of it that SOFA has kept. It makes no object and resolves no
// reference, so a value costs no more than its bytes. ReadValue and Writer are for
// who must say a value in other words: they read a whole one and write one, in the
// draft alone. Nothing here loads a class. What servers read in different ways is
// an error. The package opens no connection and knows no protocol.
package hessian

import (
	"errors"
	"fmt"
	"unicode/utf8"
)

// Bounds of what is read.
const (
	MaxDepth   = 64       // of values within values
	MaxClasses = 256      // defined in one stream
	MaxFields  = 1024     // of a class
	MaxString  = 64 << 10 // of a string that is read, not skipped, in pieces
)

// Dialect is a way to write Hessian 2.
type Dialect int

// The dialects.
const (
	Final Dialect = iota // Hessian 2.0 as published
	Draft                // the draft of 2007, as SOFA Hessian 3 writes it
)

// ErrShort is a value whose end is not there.
var ErrShort = errors.New("the value goes on after the end")

// SyntaxError is what cannot be read, or would be read in different ways.
type SyntaxError struct {
	At  int // offset in the stream
	Why string
}

func (e *SyntaxError) Error() string { return fmt.Sprintf("hessian at %d: %s", e.At, e.Why) }

// Reader reads a stream of values. The zero value reads nothing; Reset makes it
// read. It may be used again and again and allocates only for what goes wrong
// and for strings in pieces.
type Reader struct {
	b       []byte
	at      int
	draft   bool
	depth   int
	classes int
	fields  [MaxClasses]uint16 // of each class, in order of definition

	// Class, if set, is told each name of a class or a type that is passed over.
	Class func(name []byte)
	// Text, if set, is shown each piece of a string that is passed over.
	Text func(piece []byte)
}

// Reset makes r read b from its beginning. Strings that are read point into b.
func (r *Reader) Reset(b []byte, d Dialect) {
	r.b, r.at, r.draft, r.depth, r.classes = b, 0, d == Draft, 0, 0
}

// Offset is how far r has read.
func (r *Reader) Offset() int { return r.at }

func (r *Reader) fault(format string, args ...any) error {
	return &SyntaxError{r.at, fmt.Sprintf(format, args...)}
}

func (r *Reader) unknown(what string, tag byte) error {
	r.at--
	return r.fault("%s begins with %#02x", what, tag)
}

// peek is the next byte, which is not taken.
func (r *Reader) peek() (byte, error) {
	if r.at >= len(r.b) {
		return 0, ErrShort
	}
	return r.b[r.at], nil
}

func (r *Reader) byte() (byte, error) {
	c, err := r.peek()
	if err == nil {
		r.at++
	}
	return c, err
}

func (r *Reader) take(n int) ([]byte, error) {
	if n > len(r.b)-r.at {
		r.at = len(r.b)
		return nil, ErrShort
	}
	b := r.b[r.at : r.at+n]
	r.at += n
	return b, nil
}

func (r *Reader) uint16() (int, error) {
	b, err := r.take(2)
	if err != nil {
		return 0, err
	}
	return int(b[0])<<8 | int(b[1]), nil
}

// Int reads an integer of 32 bits.
func (r *Reader) Int() (int, error) {
	tag, err := r.byte()
	if err != nil {
		return 0, err
	}
	switch {
	case tag >= 0x80 && tag <= 0xbf:
		return int(tag) - 0x90, nil
	case tag >= 0xc0 && tag <= 0xcf:
		c, err := r.byte()
		return (int(tag)-0xc8)<<8 + int(c), err
	case tag >= 0xd0 && tag <= 0xd7:
		n, err := r.uint16()
		return (int(tag)-0xd4)<<16 + n, err
	case tag == 'I':
		b, err := r.take(4)
		if err != nil {
			return 0, err
		}
		return int(int32(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3]))), nil
	}
	return 0, r.unknown("an integer", tag)
}

// count reads an integer that counts something.
func (r *Reader) count(limit int) (int, error) {
	n, err := r.Int()
	if err == nil && (n < 0 || n > limit) {
		err = r.fault("a count of %d; at most %d", n, limit)
	}
	return n, err
}

// IsString tells whether the next value is a string.
func (r *Reader) IsString() bool {
	tag, err := r.peek()
	return err == nil && r.stringTag(tag)
}

func (r *Reader) stringTag(tag byte) bool {
	switch {
	case tag <= 0x1f, tag == 'S':
		return true
	case r.draft:
		return tag == 's' || tag == 'x' || tag == 'X'
	}
	return tag >= 0x30 && tag <= 0x33 || tag == 'R'
}

// String reads a string, or null, which is nil. A string that is not proper
// UTF-8 is an error: readers decode it to what others would compare with.
func (r *Reader) String() ([]byte, error) {
	tag, err := r.byte()
	if err != nil {
		return nil, err
	}
	if tag == 'N' {
		return nil, nil
	}
	s, last, err := r.piece(tag)
	if err != nil {
		return nil, err
	}
	for joined := false; !last; joined = true {
		var more []byte
		if more, last, err = r.next(); err != nil {
			return nil, err
		}
		if len(s)+len(more) > MaxString {
			return nil, r.fault("a string over %d bytes", MaxString)
		}
		if !joined {
			s = append(make([]byte, 0, len(s)+len(more)), s...)
		}
		s = append(s, more...)
	}
	if !utf8.Valid(s) {
		return nil, r.fault("a string is not UTF-8")
	}
	return s, nil
}

// piece reads the piece of a string that begins with tag.
func (r *Reader) piece(tag byte) (s []byte, last bool, err error) {
	if !r.stringTag(tag) {
		return nil, false, r.unknown("a string", tag)
	}
	n := int(tag)
	switch {
	case tag <= 0x1f:
	case tag >= 0x30 && tag <= 0x33:
		var low byte
		low, err = r.byte()
		n = int(tag-0x30)<<8 | int(low)
	default:
		n, err = r.uint16()
	}
	if err != nil {
		return nil, false, err
	}
	s, err = r.chars(n)
	return s, tag != 'R' && tag != 's' && tag != 'x', err
}

// next reads the piece after one that was not the last.
func (r *Reader) next() ([]byte, bool, error) {
	tag, err := r.byte()
	if err != nil {
		return nil, false, err
	}
	if r.draft && tag <= 0x1f {
		return nil, false, r.unknown("a further piece of a string", tag)
	}
	return r.piece(tag)
}

// chars takes n UTF-16 characters, each of which Java writes by itself. One of
// four bytes is two characters for some readers, one for others and a fault for
// the rest.
func (r *Reader) chars(n int) ([]byte, error) {
	begin := r.at
	for range n {
		c, err := r.byte()
		if err != nil {
			return nil, err
		}
		switch {
		case c < 0x80:
		case c&0xe0 == 0xc0:
			_, err = r.take(1)
		case c&0xf0 == 0xe0:
			_, err = r.take(2)
		default:
			err = r.unknown("a character", c)
		}
		if err != nil {
			return nil, err
		}
	}
	return r.b[begin:r.at], nil
}

// Map reads the head of a map; More then tells whether there is a pair, which
// is to be read or skipped before the next More. Null is no map and not there.
func (r *Reader) Map() (there bool, err error) {
	tag, err := r.byte()
	switch {
	case err != nil:
		return false, err
	case tag == 'N':
		return false, nil
	case tag == 'M':
		return true, r.typeName()
	case tag == 'H' && !r.draft:
		return true, nil
	}
	return false, r.unknown("a map", tag)
}

// More tells whether the map goes on. It takes the end.
func (r *Reader) More() (bool, error) {
	tag, err := r.peek()
	if err == nil && tag == r.end() {
		r.at++
		return false, nil
	}
	return err == nil, err
}

func (r *Reader) end() byte {
	if r.draft {
		return 'z'
	}
	return 'Z'
}

// Object reads an object up to the values of its fields, whose names it puts
// into names. The class must be defined right before the object, as it is for
// the first value of a stream.
func (r *Reader) Object(names [][]byte) (class []byte, fields int, err error) {
	tag, err := r.byte()
	if err != nil {
		return nil, 0, err
	}
	if tag != r.definition() {
		return nil, 0, r.unknown("an object with its class", tag)
	}
	if class, fields, err = r.class(names); err != nil {
		return nil, 0, err
	}
	if fields > len(names) {
		return nil, 0, r.fault("class %.128q has %d fields; at most %d", class, fields, len(names))
	}
	if tag, err = r.byte(); err != nil {
		return nil, 0, err
	}
	n, err := r.instance(tag)
	if err == nil && n != r.classes-1 {
		err = r.fault("an object of class %d follows the definition of class %d", n, r.classes-1)
	}
	return class, fields, err
}

func (r *Reader) definition() byte {
	if r.draft {
		return 'O'
	}
	return 'C'
}

// class reads a definition after its tag. names may have room for fewer names
// than there are.
func (r *Reader) class(names [][]byte) (name []byte, fields int, err error) {
	if r.classes == MaxClasses {
		return nil, 0, r.fault("more than %d classes", MaxClasses)
	}
	if r.draft {
		var n int
		if n, err = r.count(MaxString); err == nil {
			name, err = r.chars(n)
		}
	} else {
		name, err = r.String()
	}
	if err != nil {
		return nil, 0, err
	}
	if fields, err = r.count(MaxFields); err != nil {
		return nil, 0, err
	}
	for i := range fields {
		field, err := r.String()
		if err != nil {
			return nil, 0, err
		}
		if i < len(names) {
			names[i] = field
		}
	}
	r.fields[r.classes] = uint16(fields)
	r.classes++
	r.named(name)
	return name, fields, nil
}

// named tells of a class or a type.
func (r *Reader) named(name []byte) {
	if r.Class != nil {
		r.Class(name)
	}
}

// instance reads which class an object with this tag has.
func (r *Reader) instance(tag byte) (class int, err error) {
	switch {
	case r.draft && tag == 'o', !r.draft && tag == 'O':
		if class, err = r.Int(); err != nil {
			return 0, err
		}
	case !r.draft && tag >= 0x60 && tag <= 0x6f:
		class = int(tag - 0x60)
	default:
		return 0, r.unknown("an object", tag)
	}
	if class < 0 || class >= r.classes {
		return 0, r.fault("class %d of %d", class, r.classes)
	}
	return class, nil
}
