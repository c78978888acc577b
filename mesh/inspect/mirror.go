package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// A mirror is a stream of what callers send, for an analyser of another's
// making. It begins with MirrorMagic; then come frames of a header and a
// payload, in the order of the bytes they copy:
//
//	0  4  length of the payload, big endian, at most MaxMirror
//	4  1  kind
//	5  3  zero
//	8  8  number of the connection, big endian
//
// A connection is opened before its data, and again after the mirror's own
// connection was lost. Data are the bytes of the caller as they came, whatever
// its protocol. Lost stands where so many bytes were not copied.
const (
	MirrorMagic  = "HBMIRR1\n"
	MirrorHeader = 16
	MaxMirror    = 64 << 10
)

// MirrorKind is what a frame of a mirror says.
type MirrorKind byte

// The kinds.
const (
	MirrorOpen MirrorKind = 1 // JSON: service, port, protocol, caller, instance, source
	MirrorData MirrorKind = 2
	MirrorLost MirrorKind = 3 // eight bytes: how many were not copied here
	MirrorEnd  MirrorKind = 4
)

// MirrorFrame is one frame. Payload is a part of the buffer it was read from.
type MirrorFrame struct {
	Kind       MirrorKind
	Connection uint64
	Payload    []byte
}

// AppendMirror appends the header of a frame.
func AppendMirror(dst []byte, k MirrorKind, connection uint64, length int) []byte {
	dst = binary.BigEndian.AppendUint32(dst, uint32(length))
	return binary.BigEndian.AppendUint64(append(dst, byte(k), 0, 0, 0), connection)
}

var errMirror = errors.New("malformed frame of a mirror")

// NextMirror reads the frame that begins with b, after the magic. size 0 means
// that more of b is needed.
func NextMirror(b []byte) (f MirrorFrame, size int, err error) {
	if len(b) < MirrorHeader {
		return f, 0, nil
	}
	n := binary.BigEndian.Uint32(b)
	f.Kind, f.Connection = MirrorKind(b[4]), binary.BigEndian.Uint64(b[8:])
	switch {
	case n > MaxMirror:
		return f, 0, fmt.Errorf("%w: %d bytes; at most %d", errMirror, n, MaxMirror)
	case f.Kind < MirrorOpen || f.Kind > MirrorEnd || b[5]|b[6]|b[7] != 0:
		return f, 0, fmt.Errorf("%w: header %x", errMirror, b[:MirrorHeader])
	case f.Kind == MirrorLost && n != 8 || f.Kind == MirrorEnd && n != 0:
		return f, 0, fmt.Errorf("%w: kind %d with %d bytes", errMirror, f.Kind, n)
	}
	size = MirrorHeader + int(n)
	if len(b) < size {
		return f, 0, nil
	}
	f.Payload = b[MirrorHeader:size]
	return f, size, nil
}
