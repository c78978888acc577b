// Package bolt reads frames of SOFABolt, versions 1 and 2, and writes the few
// that a proxy says itself.
//
// It works on the bytes where they are: Size tells how long the frame is that
// begins a buffer, Parse cuts it up, Call tells which service and method a
// request is for. A frame that implementations delimit differently, or whose
// service they would read differently, is an error: who judges a call must see
// the call that the server sees. The package opens no connection and holds no
// policy.
package bolt

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Bounds of a frame. Java and JavaScript read the lengths of class and header
// with a sign.
const (
	MaxClass   = 1<<15 - 1
	MaxHeader  = 1<<15 - 1
	MaxContent = 64 << 20
)

// Type of a frame.
type Type byte

// The types.
const (
	Response Type = iota
	Request
	OneWay // a request without a response
)

// Command of a frame.
type Command uint16

// The commands.
const (
	Heartbeat Command = 0
	Call      Command = 1
	Reply     Command = 2
	GoAway    Command = 100 // MOSN's: open no further request here
)

// Codecs of the content.
const (
	Hessian2 = 1
	Protobuf = 11
)

// Status of a response.
type Status uint16

// The statuses.
const (
	OK                Status = 0
	Failed            Status = 1
	ServerException   Status = 2
	Unknown           Status = 3
	Busy              Status = 4 // no thread free
	Comm              Status = 5
	NoProcessor       Status = 6
	Timeout           Status = 7
	SendFailed        Status = 8
	CodecFailed       Status = 9
	Closed            Status = 0x10
	SerializeFailed   Status = 0x11
	DeserializeFailed Status = 0x12
)

// SyntaxError is a frame that may not be passed on.
type SyntaxError struct{ Why string }

func (e *SyntaxError) Error() string { return "malformed bolt frame: " + e.Why }

func malformed(format string, args ...any) error {
	return &SyntaxError{fmt.Sprintf(format, args...)}
}

// Lengths of the fixed part.
const (
	request1  = 22
	response1 = 20
	extra2    = 2 // version and switch of version 2
	crcLen    = 4
	maxFixed  = request1 + extra2
)

// Extent is how far a frame goes.
type Extent struct {
	Head int  // with class and header
	Len  int  // of all
	CRC  bool // the last four bytes are a sum of those before
}

// Size tells how far the frame goes that begins with b. Len is 0 while more of
// b is needed to tell.
func Size(b []byte) (x Extent, err error) {
	if len(b) < 3 {
		if len(b) > 0 && b[0] != 1 && b[0] != 2 {
			return x, malformed("protocol %d", b[0])
		}
		return x, nil
	}
	at, kind := 0, Type(b[1])
	switch b[0] {
	case 1:
	case 2:
		at, kind = extra2, Type(b[2])
		if b[1] != 1 && b[1] != 2 {
			return x, malformed("protocol 2 in version %d", b[1])
		}
	default:
		return x, malformed("protocol %d", b[0])
	}
	if kind > OneWay {
		return x, malformed("type %d", kind)
	}
	fixed := at + request1
	if kind == Response {
		fixed = at + response1
	}
	if len(b) < fixed {
		return x, nil
	}
	if x.CRC, err = crcOf(b); err != nil {
		return Extent{}, err
	}
	lengths := b[fixed-8:]
	class, header := int(binary.BigEndian.Uint16(lengths)), int(binary.BigEndian.Uint16(lengths[2:]))
	content := binary.BigEndian.Uint32(lengths[4:])
	if class > MaxClass || header > MaxHeader || content > MaxContent {
		return Extent{}, malformed("lengths %d, %d and %d; at most %d, %d and %d", class, header, content, MaxClass, MaxHeader, MaxContent)
	}
	x.Head = fixed + class + header
	x.Len = x.Head + int(content)
	if x.CRC {
		x.Len += crcLen
	}
	return x, nil
}

// crcOf tells whether a sum follows. SOFABolt adds one if the version is 2 and
// bit 0 of the switches is set, its port to JavaScript if the switches are 1
// whatever the version: what is not the same for both is refused.
func crcOf(b []byte) (bool, error) {
	if b[0] == 1 {
		return false, nil
	}
	version, switches := b[1], b[11]
	java, script := version == 2 && switches&1 != 0, switches == 1
	if java != script {
		return false, malformed("version %d with switches %#02x: some readers expect a sum and some none", version, switches)
	}
	return java, nil
}

// Frame is one frame, cut up. Its slices are parts of the buffer.
type Frame struct {
	Protocol byte // 1 or 2
	Version  byte // of protocol 2; else 0
	Switch   byte
	Type     Type
	Command  Command
	ID       uint32
	Codec    byte
	Timeout  int32  // of a request, in milliseconds
	Status   Status // of a response
	Class    []byte
	Header   Header
	Content  []byte // as much of it as is there
	Empty    bool   // it has neither class nor header nor content, there or to come
}

// Parse cuts up the frame that begins with b and goes as far as x says. Of class and
// header there is as much as of b.
func Parse(b []byte, x Extent) Frame {
	f := Frame{Protocol: b[0], Type: Type(b[1])}
	head := min(x.Head, len(b))
	rest := b[2:head]
	if f.Protocol == 2 {
		f.Version, f.Type, f.Switch = b[1], Type(b[2]), b[11]
		rest = b[3:head]
	}
	f.Command = Command(binary.BigEndian.Uint16(rest))
	f.ID = binary.BigEndian.Uint32(rest[3:])
	f.Codec = rest[7]
	rest = rest[8:]
	if f.Protocol == 2 {
		rest = rest[1:]
	}
	if f.Type == Response {
		f.Status = Status(binary.BigEndian.Uint16(rest))
		rest = rest[2:]
	} else {
		f.Timeout = int32(binary.BigEndian.Uint32(rest))
		rest = rest[4:]
	}
	class := int(binary.BigEndian.Uint16(rest))
	rest = rest[8:]
	class = min(class, len(rest))
	f.Class, f.Header = rest[:class], Header(rest[class:])
	end := x.Len
	if x.CRC {
		end -= crcLen
	}
	f.Content = b[head:max(head, min(end, len(b)))]
	f.Empty = end == x.Head && len(rest) == 0 && x.Head <= len(b)
	return f
}

// SetID writes another id into the frame that begins with b, of which all must
// be there, and renews the sum.
func SetID(b []byte, x Extent, id uint32) {
	at := 5
	if b[0] == 2 {
		at = 6
	}
	binary.BigEndian.PutUint32(b[at:], id)
	if x.CRC {
		binary.BigEndian.PutUint32(b[x.Len-crcLen:], crc32.ChecksumIEEE(b[:x.Len-crcLen]))
	}
}

// Sum checks the sum of a frame whose bytes pass by. The zero value is over no
// frame.
type Sum struct {
	left int // bytes until the sum, then of it
	sum  uint32
	tail uint32
}

// Begin is called before the bytes of a frame.
func (s *Sum) Begin(x Extent) { *s = Sum{left: x.Len} }

// Add takes the next bytes of the frame. It fails with the last of them if the
// sum is wrong.
func (s *Sum) Add(b []byte) error {
	n := min(max(s.left-crcLen, 0), len(b))
	s.sum = crc32.Update(s.sum, crc32.IEEETable, b[:n])
	s.left -= n
	for _, c := range b[n:] {
		s.tail = s.tail<<8 | uint32(c)
		s.left--
	}
	if s.left == 0 && s.tail != s.sum {
		return malformed("the sum is %#08x and should be %#08x", s.tail, s.sum)
	}
	return nil
}

// Progress is where a Sum stands; Resume has another go on from there.
func (s *Sum) Progress() [3]uint32 { return [3]uint32{uint32(s.left), s.sum, s.tail} }

// Resume goes on where another Sum stood.
func (s *Sum) Resume(p [3]uint32) { *s = Sum{int(p[0]), p[1], p[2]} }
