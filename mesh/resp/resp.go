// Package resp reads what clients and servers of Redis say, RESP2 and RESP3, from
// whatever pieces it comes in: of a request which command it is, of an answer where
// it ends. It makes nothing of values, and holds none. Inline commands are refused:
// where one ends depends on who reads it.
//
// The byte tables are those of the Redis serialization protocol specification
// (redis.io/docs/latest/develop/reference/protocol-spec).
package resp

import (
	"bytes"
	"fmt"
)

const (
	MaxArguments = 1 << 20   // of a request, as servers have it
	MaxBulk      = 512 << 20 // bytes of a string, as servers have it
	MaxName      = 64        // bytes of a command's name, and of a subcommand's
	MaxElements  = 1 << 30   // of an answer that are to come
	maxNumber    = 10        // digits
)

// Error is what may not be passed on.
type Error struct{ What string }

func (e *Error) Error() string { return "redis: " + e.What }

func malformed(format string, args ...any) error { return &Error{fmt.Sprintf(format, args...)} }

// number reads the rest of a head, after its first byte: digits without a sign or
// a leading zero, and the end of the line. n is how long the head is, 0 if more of
// it is needed. null is taken for -1 where a length may be that.
func number(b []byte, most int, null bool) (value, n int, err error) {
	at := 1
	if null && len(b) > at && b[at] == '-' {
		if len(b) < 5 {
			return 0, 0, nil
		}
		if string(b[:5][1:]) != "-1\r\n" {
			return 0, 0, malformed("a length of %q", b[1:5])
		}
		return -1, 5, nil
	}
	for ; at < len(b) && b[at] >= '0' && b[at] <= '9'; at++ {
		if at > maxNumber || at > 1 && b[1] == '0' {
			return 0, 0, malformed("a number %q", b[1:at+1])
		}
		value = value*10 + int(b[at]-'0')
	}
	switch {
	case value > most:
		return 0, 0, malformed("%d after %q; at most %d", value, b[:1], most)
	case at == len(b):
		return 0, 0, nil
	case at == 1 || b[at] != '\r':
		return 0, 0, malformed("byte %#02x in a number after %q", b[at], b[:1])
	case at+1 == len(b):
		return 0, 0, nil
	case b[at+1] != '\n':
		return 0, 0, malformed("a line that ends in %q", b[at:at+2])
	}
	return value, at + 2, nil
}

// End watches a string of known length pass, for the end of its line.
type End struct{ left uint32 }

// Begin is called with the bytes of the string and of its end.
func (e *End) Begin(size int) { e.left = uint32(size) }

// Add looks at the next of them.
func (e *End) Add(b []byte) error {
	if e.left == 0 || len(b) == 0 {
		return nil
	}
	left := int(e.left)
	for i, want := range [2]byte{'\r', '\n'} {
		if at := left - 2 + i; at >= 0 && at < len(b) && b[at] != want {
			return malformed("byte %#02x after a string, not the end of its line", b[at])
		}
	}
	e.left -= uint32(min(left, len(b)))
	return nil
}

// Left is how much is to come, Resume goes on there.
func (e *End) Left() uint32       { return e.left }
func (e *End) Resume(left uint32) { e.left = left }

// AppendError appends an error, which is an answer. Line ends in its text are made
// spaces.
func AppendError(dst []byte, code, text string) []byte {
	dst = append(append(append(dst, '-'), code...), ' ')
	at := len(dst)
	dst = append(dst, text...)
	for i := at; i < len(dst); i++ {
		if dst[i] == '\r' || dst[i] == '\n' {
			dst[i] = ' '
		}
	}
	return append(dst, "\r\n"...)
}

// line is how much of a line is there, its end included if it is. more tells that
// it goes on.
func line(b []byte) (size int, more bool, err error) {
	at := bytes.IndexByte(b, '\n')
	if at < 0 {
		size = len(b)
		if size > 0 && b[size-1] == '\r' {
			size--
		}
		return size, true, nil
	}
	if at == 0 || b[at-1] != '\r' {
		return 0, false, malformed("a line that ends without a carriage return")
	}
	return at + 1, false, nil
}
