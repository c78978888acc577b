package dubbo

import (
	"encoding/binary"
	"unicode/utf8"
)

// A frame of dubbo-thrift: its size, then what the size counts: a magic, the
// size again, where the message begins, a version, the service, an id, and a
// message of Thrift's binary protocol.
const (
	thriftMagic   = 0xdabc
	thriftPrefix  = 4                 // the size before the magic
	thriftFixed   = 2 + 4 + 2 + 1 + 4 // magic, size, head, version, length of the service
	thriftID      = 8
	thriftVersion = 1
	maxThriftHead = 4 << 10
	maxThriftName = 1 << 10 // of a method
)

// Types of a Thrift message, and what an exception of Thrift holds.
const (
	thriftCall      = 1
	thriftException = 3
	thriftOneWay    = 4

	thriftStrict   = 0x80010000
	thriftInternal = 6 // TApplicationException.INTERNAL_ERROR
	fieldString    = 11
	fieldI32       = 8
)

// ThriftSize tells how long the frame is that begins with b, and how much of it
// stands before the message; 0 means that more of b is needed to tell.
func ThriftSize(b []byte) (size, head int, err error) {
	const need = thriftPrefix + 2 + 4 + 2
	if len(b) < need {
		return 0, 0, nil
	}
	n := binary.BigEndian.Uint32(b)
	h := int(binary.BigEndian.Uint16(b[thriftPrefix+6:]))
	switch {
	case binary.BigEndian.Uint16(b[thriftPrefix:]) != thriftMagic:
		return 0, 0, malformed("magic %04x of dubbo-thrift", binary.BigEndian.Uint16(b[thriftPrefix:]))
	case n != binary.BigEndian.Uint32(b[thriftPrefix+2:]):
		return 0, 0, malformed("sizes %d and %d", n, binary.BigEndian.Uint32(b[thriftPrefix+2:]))
	case n > MaxBody:
		return 0, 0, malformed("a frame of %d bytes; at most %d", n, MaxBody)
	case h < thriftFixed+thriftID || h > maxThriftHead || h > int(n):
		return 0, 0, malformed("a message at %d of %d", h, n)
	}
	return thriftPrefix + int(n), thriftPrefix + h, nil
}

// ThriftFrame is a frame of dubbo-thrift, cut up.
type ThriftFrame struct {
	Service []byte
	ID      uint64
	Message []byte // as much of it as is there

	raw []byte // the head
}

// ParseThrift cuts up the frame that begins with b, whose head must be there.
func ParseThrift(b []byte, size, head int) (f ThriftFrame, err error) {
	h := b[thriftPrefix:head]
	if h[8] != thriftVersion {
		return f, malformed("version %d of dubbo-thrift", h[8])
	}
	if n := binary.BigEndian.Uint32(h[9:]); int64(n) != int64(len(h)-thriftFixed-thriftID) {
		return f, malformed("a service of %d bytes in a head of %d", n, len(h))
	}
	at := len(h) - thriftID
	return ThriftFrame{Service: h[thriftFixed:at], ID: binary.BigEndian.Uint64(h[at:]), Message: b[head:min(size, len(b))], raw: b[:head]}, nil
}

// ThriftMessage is the head of a Thrift message.
type ThriftMessage struct {
	Kind     Kind
	TwoWay   bool
	Method   []byte
	Sequence uint32
}

// Head reads the head of the message, strict or not.
func (f *ThriftFrame) Head() (m ThriftMessage, err error) {
	b := f.Message
	if len(b) < 4 {
		return m, unclear("the message ends")
	}
	first := binary.BigEndian.Uint32(b)
	b = b[4:]
	var kind byte
	n := first
	strict := first&0x80000000 != 0
	if strict {
		if first&0xffffff00 != thriftStrict {
			return m, unclear("version %#08x of Thrift", first)
		}
		kind = byte(first)
		if len(b) < 4 {
			return m, unclear("the message ends")
		}
		n, b = binary.BigEndian.Uint32(b), b[4:]
	}
	if n > maxThriftName || int(n)+1 > len(b) {
		return m, unclear("a method of %d bytes", n)
	}
	m.Method, b = b[:n], b[n:]
	if !strict {
		kind, b = b[0], b[1:]
	}
	if len(b) < 4 {
		return m, unclear("the message ends")
	}
	m.Sequence = binary.BigEndian.Uint32(b)
	if !utf8.Valid(m.Method) || !utf8.Valid(f.Service) || len(m.Method) == 0 || len(f.Service) == 0 {
		return m, unclear("no service or no method")
	}
	m.Kind, m.TwoWay = KindOther, kind == thriftCall
	if kind != 2 && kind != thriftException {
		m.Kind = KindCall
	}
	if m.Kind == KindCall && kind != thriftCall && kind != thriftOneWay {
		return m, unclear("message type %d of Thrift", kind)
	}
	return m, nil
}

// AppendThriftError appends the answer that refuses the request f: an exception
// as Thrift's own servers throw it.
func AppendThriftError(dst []byte, f *ThriftFrame, m *ThriftMessage, message string) []byte {
	message = message[:min(len(message), maxMessage)]
	begin := len(dst)
	dst = append(dst, f.raw...)
	dst = binary.BigEndian.AppendUint32(dst, thriftStrict|thriftException)
	dst = appendThriftString(dst, string(m.Method))
	dst = binary.BigEndian.AppendUint32(dst, m.Sequence)
	dst = appendThriftString(append(dst, fieldString, 0, 1), message)
	dst = binary.BigEndian.AppendUint32(append(dst, fieldI32, 0, 2), thriftInternal)
	dst = append(dst, 0)
	size := uint32(len(dst) - begin - thriftPrefix)
	binary.BigEndian.PutUint32(dst[begin:], size)
	binary.BigEndian.PutUint32(dst[begin+thriftPrefix+2:], size)
	return dst
}

func appendThriftString(dst []byte, s string) []byte {
	return append(binary.BigEndian.AppendUint32(dst, uint32(len(s))), s...)
}
