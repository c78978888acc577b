// Package h2frame holds the words of HTTP/2 (RFC 9113): frames, their types,
// flags and codes, and the tables of header compression (RFC 7541) as far as a
// connection that moves to another process needs them.
//
// It keeps no state and reads nothing by itself: when a frame may come and what
// it does is for the engines, mesh/hbone and mesh/http2, and for probes.
package h2frame

import (
	"encoding/binary"
	"fmt"
)

// Types of frames.
const (
	Data         = 0
	Headers      = 1
	Priority     = 2
	Reset        = 3
	Settings     = 4
	Push         = 5
	Ping         = 6
	GoAway       = 7
	Window       = 8
	Continuation = 9
)

// Flags of frames.
const (
	FlagEndStream  = 0x1
	FlagAck        = 0x1
	FlagEndHeaders = 0x4
	FlagPadded     = 0x8
	FlagPriority   = 0x20
)

// Settings, by their numbers.
const (
	SettingTableSize  = 1
	SettingPush       = 2
	SettingMaxStreams = 3
	SettingWindow     = 4
	SettingMaxFrame   = 5
	SettingMaxList    = 6
)

// Code is an HTTP/2 error code.
type Code uint32

// The codes in use.
const (
	CodeNone        Code = 0
	CodeProtocol    Code = 1
	CodeInternal    Code = 2
	CodeFlowControl Code = 3
	CodeClosed      Code = 5
	CodeFrameSize   Code = 6
	CodeRefused     Code = 7
	CodeCancel      Code = 8
	CodeCompression Code = 9
	CodeConnect     Code = 10
	CodeCalm        Code = 11
	CodeSecurity    Code = 12
)

const (
	// Preface is what a client says first.
	Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	// HeaderLen is the length of a frame's header.
	HeaderLen = 9
	// MaxWindow is the largest window there may be.
	MaxWindow = 1<<31 - 1
	// MaxSettings are taken in one frame: each may change the windows of all
	// streams, and there are not ten kinds of them.
	MaxSettings = 64
)

// Error is a fault of the peer that ends the connection.
type Error struct {
	Code Code
	Why  string
}

func (e *Error) Error() string { return fmt.Sprintf("http/2 error %d: %s", e.Code, e.Why) }

// Fault makes an Error.
func Fault(code Code, format string, args ...any) error {
	return &Error{code, fmt.Sprintf(format, args...)}
}

// Header is what a frame begins with.
type Header struct {
	Length int
	Kind   byte
	Flags  byte
	Stream uint32
}

// Has tells whether a flag is set.
func (h Header) Has(flag byte) bool { return h.Flags&flag != 0 }

// Parse reads a header of HeaderLen bytes.
func Parse(b []byte) Header {
	return Header{
		Length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		Kind:   b[3],
		Flags:  b[4],
		Stream: binary.BigEndian.Uint32(b[5:]) & 0x7fffffff,
	}
}

// Put writes a header over the first HeaderLen bytes of b.
func Put(b []byte, length int, kind, flags byte, stream uint32) {
	b[0], b[1], b[2], b[3], b[4] = byte(length>>16), byte(length>>8), byte(length), kind, flags
	binary.BigEndian.PutUint32(b[5:], stream)
}

// AppendHeader appends a header.
func AppendHeader(b []byte, length int, kind, flags byte, stream uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), kind, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

// Append appends a frame.
func Append(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	return append(AppendHeader(b, len(payload), kind, flags, stream), payload...)
}

// AppendWord appends a frame whose payload is one number: RST_STREAM and
// WINDOW_UPDATE.
func AppendWord(b []byte, kind byte, stream, word uint32) []byte {
	return binary.BigEndian.AppendUint32(AppendHeader(b, 4, kind, 0, stream), word)
}

// AppendSetting appends a setting to the payload of SETTINGS.
func AppendSetting(b []byte, key uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, key), value)
}

// AppendGoAway appends a GOAWAY frame.
func AppendGoAway(b []byte, last uint32, code Code) []byte {
	b = AppendHeader(b, 8, GoAway, 0, 0)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, last), uint32(code))
}

// Unpad removes padding and, from HEADERS, the priority. self tells that the
// stream is said to depend on itself.
func Unpad(h Header, p []byte) (body []byte, self bool, err error) {
	pad := 0
	if h.Has(FlagPadded) {
		if len(p) < 1 {
			return nil, false, Fault(CodeFrameSize, "padded frame without a pad length")
		}
		pad, p = int(p[0]), p[1:]
	}
	if h.Kind == Headers && h.Has(FlagPriority) {
		if len(p) < 5 {
			return nil, false, Fault(CodeFrameSize, "HEADERS too short for their priority")
		}
		self = binary.BigEndian.Uint32(p)&0x7fffffff == h.Stream
		p = p[5:]
	}
	if pad > len(p) {
		return nil, false, Fault(CodeProtocol, "padding longer than the frame")
	}
	return p[:len(p)-pad], self, nil
}
