package http2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/net/http2/hpack"
)

// Frame types, flags and settings of RFC 9113.
const (
	frameData         = 0
	frameHeaders      = 1
	framePriority     = 2
	frameReset        = 3
	frameSettings     = 4
	framePush         = 5
	framePing         = 6
	frameGoAway       = 7
	frameWindow       = 8
	frameContinuation = 9

	flagEndStream  = 0x1
	flagAck        = 0x1
	flagEndHeaders = 0x4
	flagPadded     = 0x8
	flagPriority   = 0x20

	settingTableSize  = 1
	settingPush       = 2
	settingMaxStreams = 3
	settingWindow     = 4
	settingMaxFrame   = 5
	settingMaxList    = 6
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
	CodeCalm        Code = 11
	CodeSecurity    Code = 12
)

const (
	headerLen = 9
	maxWindow = 1<<31 - 1
)

// ConnError is a fault of the peer that ends the connection.
type ConnError struct {
	Code Code
	Why  string
}

func (e *ConnError) Error() string { return fmt.Sprintf("http/2 error %d: %s", e.Code, e.Why) }

func fault(code Code, format string, args ...any) error {
	return &ConnError{code, fmt.Sprintf(format, args...)}
}

// StreamError is a fault of the peer that ends one stream.
type StreamError struct {
	Stream uint32
	Code   Code
	Why    string
}

func (e *StreamError) Error() string {
	return fmt.Sprintf("http/2 stream %d error %d: %s", e.Stream, e.Code, e.Why)
}

func streamFault(id uint32, code Code, format string, args ...any) error {
	return &StreamError{id, code, fmt.Sprintf(format, args...)}
}

type frameHeader struct {
	length int
	kind   byte
	flags  byte
	stream uint32
}

func (h frameHeader) has(flag byte) bool { return h.flags&flag != 0 }

func parseHeader(b []byte) frameHeader {
	return frameHeader{
		length: int(b[0])<<16 | int(b[1])<<8 | int(b[2]),
		kind:   b[3],
		flags:  b[4],
		stream: binary.BigEndian.Uint32(b[5:]) & 0x7fffffff,
	}
}

func appendHeader(b []byte, length int, kind, flags byte, stream uint32) []byte {
	return append(b, byte(length>>16), byte(length>>8), byte(length), kind, flags,
		byte(stream>>24), byte(stream>>16), byte(stream>>8), byte(stream))
}

func appendFrame(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	return append(appendHeader(b, len(payload), kind, flags, stream), payload...)
}

// appendWord appends a frame whose payload is one number: RST_STREAM and
// WINDOW_UPDATE.
func appendWord(b []byte, kind byte, stream, word uint32) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(b, 4, kind, 0, stream), word)
}

func appendSetting(b []byte, key uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, key), value)
}

func appendGoAway(b []byte, last uint32, code Code) []byte {
	b = appendHeader(b, 8, frameGoAway, 0, 0)
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, last), uint32(code))
}

// unpad removes padding and priority from the payload of HEADERS. self tells
// that the stream is said to depend on itself.
func unpad(h frameHeader, p []byte) (block []byte, self bool, err error) {
	pad := 0
	if h.has(flagPadded) {
		if len(p) < 1 {
			return nil, false, fault(CodeFrameSize, "padded frame without a pad length")
		}
		pad, p = int(p[0]), p[1:]
	}
	if h.has(flagPriority) {
		if len(p) < 5 {
			return nil, false, fault(CodeFrameSize, "HEADERS too short for their priority")
		}
		self = binary.BigEndian.Uint32(p)&0x7fffffff == h.stream
		p = p[5:]
	}
	if pad > len(p) {
		return nil, false, fault(CodeProtocol, "padding longer than the frame")
	}
	return p[:len(p)-pad], self, nil
}

// fieldReader decodes header blocks within bounds. The whole of a block is
// decoded even past the bounds, as the table must stay in step, but what is
// past them is not kept.
type fieldReader struct {
	decoder *hpack.Decoder
	fields  []hpack.HeaderField
	size    int
	excess  bool
}

func newFieldReader() *fieldReader {
	r := &fieldReader{}
	r.decoder = hpack.NewDecoder(tableSize, func(f hpack.HeaderField) {
		r.size += int(f.Size())
		if len(r.fields) >= MaxFields || r.size > MaxList {
			r.excess = true
			r.decoder.SetEmitEnabled(false)
			return
		}
		r.fields = append(r.fields, f)
	})
	r.decoder.SetMaxStringLength(MaxList)
	return r
}

// read decodes one whole block. fits is false if it holds more than is taken.
// The fields are valid until the next call.
func (r *fieldReader) read(block []byte) (fields []hpack.HeaderField, fits bool, err error) {
	clear(r.fields)
	r.fields, r.size, r.excess = r.fields[:0], 0, false
	r.decoder.SetEmitEnabled(true)
	if _, err := r.decoder.Write(block); err != nil {
		return nil, false, fault(CodeCompression, "%v", err)
	}
	if err := r.decoder.Close(); err != nil {
		return nil, false, fault(CodeCompression, "%v", err)
	}
	return r.fields, !r.excess, nil
}

type blockWriter []byte

func (b *blockWriter) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}
