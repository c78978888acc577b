// Package sni reads the name a TLS client asks for out of its first message,
// without taking part in the handshake.
//
// The name is only a wish: nobody has proved anything yet.
package sni

import (
	"encoding/binary"
	"errors"
)

// MaxHello is the longest first message accepted: post-quantum key shares and
// long session tickets fit.
const MaxHello = 16 << 10

// ErrMalformed is what is no TLS client hello.
var ErrMalformed = errors.New("no TLS client hello")

// Name is the name in the client hello at the beginning of b, "" if it asks for
// none. whole says that the hello is all there; if not, more must come. The hello
// is put together in scratch if it comes in several records.
func Name(b, scratch []byte) (name []byte, whole bool, err error) {
	hello, whole, err := handshake(b, scratch[:0])
	if !whole || err != nil {
		return nil, false, err
	}
	name, err = serverName(hello)
	return name, err == nil, err
}

// handshake takes the first handshake message out of its records.
func handshake(b, out []byte) ([]byte, bool, error) {
	for len(b) > 0 {
		if b[0] != 22 || len(b) > 1 && b[1] != 3 {
			return nil, false, ErrMalformed
		}
		if len(b) < 5 {
			return nil, false, nil
		}
		n := int(binary.BigEndian.Uint16(b[3:]))
		if n == 0 || n > MaxHello || len(out)+n > MaxHello {
			return nil, false, ErrMalformed
		}
		part := b[5:min(len(b), 5+n)]
		out = append(out, part...)
		if len(out) > 0 && out[0] != 1 {
			return nil, false, ErrMalformed
		}
		if len(out) >= 4 {
			size := int(out[1])<<16 | int(out[2])<<8 | int(out[3])
			if size > MaxHello {
				return nil, false, ErrMalformed
			}
			if len(out) >= 4+size {
				return out[4 : 4+size], true, nil
			}
		}
		b = b[5+len(part):]
		if len(part) < n {
			return nil, false, nil
		}
	}
	return nil, false, nil
}

// take cuts a vector whose length is told by n bytes.
func take(b []byte, n int) (v, rest []byte, err error) {
	if len(b) < n {
		return nil, nil, ErrMalformed
	}
	size := 0
	for _, c := range b[:n] {
		size = size<<8 | int(c)
	}
	if len(b) < n+size {
		return nil, nil, ErrMalformed
	}
	return b[n : n+size], b[n+size:], nil
}

func serverName(hello []byte) ([]byte, error) {
	if len(hello) < 34 { // version, random
		return nil, ErrMalformed
	}
	rest := hello[34:]
	for _, width := range []int{1, 2, 1} { // session, ciphers, compressions
		var err error
		if _, rest, err = take(rest, width); err != nil {
			return nil, err
		}
	}
	if len(rest) == 0 {
		return nil, nil
	}
	extensions, _, err := take(rest, 2)
	if err != nil {
		return nil, err
	}
	for len(extensions) > 0 {
		if len(extensions) < 4 {
			return nil, ErrMalformed
		}
		kind := binary.BigEndian.Uint16(extensions)
		var body []byte
		if body, extensions, err = take(extensions[2:], 2); err != nil {
			return nil, err
		}
		if kind == 0 {
			return firstName(body)
		}
	}
	return nil, nil
}

func firstName(body []byte) ([]byte, error) {
	list, _, err := take(body, 2)
	if err != nil || len(list) < 3 || list[0] != 0 {
		return nil, ErrMalformed
	}
	name, _, err := take(list[1:], 2)
	if err != nil || len(name) == 0 || len(name) > 255 {
		return nil, ErrMalformed
	}
	for _, c := range name {
		if c <= ' ' || c >= 0x7f {
			return nil, ErrMalformed
		}
	}
	return name, nil
}
