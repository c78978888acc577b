package bolt

import (
	"encoding/binary"
	"hash/crc32"

	"hauberk.dev/mesh/hessian"
)

const maxMessage = 1 << 10

// AppendError appends the response that refuses the request f, in its protocol
// and version and with its id. The message is in the place where clients look
// for the server's exception.
func AppendError(dst []byte, f *Frame, status Status, message string) []byte {
	message = message[:min(len(message), maxMessage)]
	begin := len(dst)
	dst, lengths := appendFixed(dst, f, Reply, status)
	class := classException
	dst = append(dst, class...)
	head := len(dst)
	if f.Codec == Protobuf {
		dst = appendHeader(dst, keyResponseError, "true")
	}
	content := len(dst)
	switch f.Codec {
	case Protobuf:
		dst = append(dst, message...)
	default:
		dst = appendException(dst, message)
	}
	binary.BigEndian.PutUint16(dst[lengths:], uint16(len(class)))
	binary.BigEndian.PutUint16(dst[lengths+2:], uint16(content-head))
	binary.BigEndian.PutUint32(dst[lengths+4:], uint32(len(dst)-content))
	return appendSum(dst, begin, f)
}

// AppendReply appends the good response to the request f. It fails if the header
// cannot take the pairs, or if the content is over MaxContent.
func AppendReply(dst []byte, f *Frame, class string, pairs [][2]string, content []byte) ([]byte, error) {
	begin := len(dst)
	out, lengths := appendFixed(dst, f, Reply, OK)
	out = append(out, class...)
	head := len(out)
	for _, p := range pairs {
		out = appendHeader(out, p[0], p[1])
	}
	if n := len(out) - head; n > MaxHeader || len(class) > MaxClass || len(content) > MaxContent {
		return dst, malformed("lengths %d, %d and %d; at most %d, %d and %d", len(class), n, len(content), MaxClass, MaxHeader, MaxContent)
	}
	binary.BigEndian.PutUint16(out[lengths:], uint16(len(class)))
	binary.BigEndian.PutUint16(out[lengths+2:], uint16(len(out)-head))
	binary.BigEndian.PutUint32(out[lengths+4:], uint32(len(content)))
	return appendSum(append(out, content...), begin, f), nil
}

// AppendAlive appends the answer to the heartbeat f.
func AppendAlive(dst []byte, f *Frame) []byte {
	begin := len(dst)
	dst, _ = appendFixed(dst, f, Heartbeat, OK)
	return appendSum(dst, begin, f)
}

// appendFixed appends the fixed part of a response with lengths of zero, and
// tells where these are.
func appendFixed(dst []byte, f *Frame, c Command, status Status) ([]byte, int) {
	dst = append(dst, f.Protocol)
	if f.Protocol == 2 {
		dst = append(dst, f.Version)
	}
	dst = append(dst, byte(Response))
	dst = binary.BigEndian.AppendUint16(dst, uint16(c))
	dst = append(dst, 1)
	dst = binary.BigEndian.AppendUint32(dst, f.ID)
	dst = append(dst, f.Codec)
	if f.Protocol == 2 {
		dst = append(dst, f.Switch)
	}
	dst = binary.BigEndian.AppendUint16(dst, uint16(status))
	lengths := len(dst)
	return append(dst, 0, 0, 0, 0, 0, 0, 0, 0), lengths
}

func appendSum(dst []byte, begin int, f *Frame) []byte {
	if f.Protocol == 2 && f.Version == 2 && f.Switch&1 != 0 {
		dst = binary.BigEndian.AppendUint32(dst, crc32.ChecksumIEEE(dst[begin:]))
	}
	return dst
}

// appendException appends a RpcServerException in SOFA's dialect of Hessian.
func appendException(dst []byte, message string) []byte {
	dst = append(dst, 'O')
	dst = appendLength(dst, len(classException))
	dst = append(dst, classException...)
	dst = hessian.AppendInt(dst, 3)
	for _, name := range [...]string{"detailMessage", "stackTrace", "cause"} {
		dst = hessian.AppendString(dst, name)
	}
	dst = hessian.AppendInt(append(dst, 'o'), 0)
	dst = hessian.AppendString(dst, message)
	return append(dst, stackTrace+"N"...)
}

// stackTrace is an empty one.
const stackTrace = "V" + "t\x00\x1c[java.lang.StackTraceElement" + "n\x00" + "z"

// appendLength appends an integer of up to 2047.
func appendLength(dst []byte, n int) []byte {
	return append(dst, byte(0xc8+n>>8), byte(n))
}

// Extend appends the whole frame that x tells of, with pairs added at the end of its
// header. Class and content stay as they are, and the sum is renewed. It fails if
// the header cannot take them.
func Extend(dst, frame []byte, x Extent, pairs [][2]string) ([]byte, error) {
	begin, added := len(dst), 0
	for _, p := range pairs {
		added += 8 + len(p[0]) + len(p[1])
	}
	f := Parse(frame, x)
	if err := f.Header.Check(); err != nil {
		return dst, err
	}
	if len(f.Header)+added > MaxHeader {
		return dst, malformed("a header of %d bytes; at most %d", len(f.Header)+added, MaxHeader)
	}
	dst = append(dst, frame[:x.Head]...)
	for _, p := range pairs {
		dst = appendHeader(dst, p[0], p[1])
	}
	lengths := begin + x.Head - len(f.Header) - len(f.Class) - 8
	binary.BigEndian.PutUint16(dst[lengths+2:], uint16(len(f.Header)+added))
	end := x.Len
	if x.CRC {
		end -= crcLen
	}
	dst = append(dst, frame[x.Head:end]...)
	if x.CRC {
		dst = binary.BigEndian.AppendUint32(dst, crc32.ChecksumIEEE(dst[begin:]))
	}
	return dst, nil
}
