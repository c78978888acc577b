package hbone

import (
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/net/http2/hpack"
)

// Frame types and flags of RFC 9113.
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
)

const (
	headerLen = 9
	// maxFrame is what this side takes in one frame, the protocol's least.
	maxFrame = 16 << 10
	// maxBlock bounds a header block over all its frames, and the fields in it.
	maxBlock  = 16 << 10
	maxFields = 64
	preface   = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
)

// connError ends the connection.
type connError struct {
	code Code
	why  string
}

func (e *connError) Error() string { return fmt.Sprintf("http/2 error %d: %s", e.code, e.why) }

func fault(code Code, format string, args ...any) error {
	return &connError{code, fmt.Sprintf(format, args...)}
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

func putHeader(b []byte, length int, kind, flags byte, stream uint32) {
	b[0], b[1], b[2], b[3], b[4] = byte(length>>16), byte(length>>8), byte(length), kind, flags
	binary.BigEndian.PutUint32(b[5:], stream)
}

func appendFrame(b []byte, kind, flags byte, stream uint32, payload []byte) []byte {
	n := len(b)
	b = append(b, make([]byte, headerLen)...)
	putHeader(b[n:], len(payload), kind, flags, stream)
	return append(b, payload...)
}

func appendSetting(b []byte, key uint16, value uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(b, key), value)
}

func u32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }

// encodeFields makes a header block that leaves no trace in the peer's dynamic
// table, so that blocks can be made without a lock.
func encodeFields(fields []hpack.HeaderField) []byte {
	var b blockWriter
	e := hpack.NewEncoder(&b)
	for _, f := range fields {
		f.Sensitive = true // a literal, never indexed
		e.WriteField(f)
	}
	return b
}

type blockWriter []byte

func (b *blockWriter) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}

// unpad removes padding and, from HEADERS, the priority.
func unpad(h frameHeader, p []byte) ([]byte, error) {
	pad := 0
	if h.has(flagPadded) {
		if len(p) < 1 {
			return nil, fault(CodeFrameSize, "padded frame without a pad length")
		}
		pad, p = int(p[0]), p[1:]
	}
	if h.kind == frameHeaders && h.has(flagPriority) {
		if len(p) < 5 {
			return nil, fault(CodeFrameSize, "headers too short for their priority")
		}
		p = p[5:]
	}
	if pad > len(p) {
		return nil, fault(CodeProtocol, "padding longer than the frame")
	}
	return p[:len(p)-pad], nil
}

// fieldReader decodes header blocks within bounds.
type fieldReader struct {
	decoder *hpack.Decoder
	fields  []hpack.HeaderField
	size    int
	excess  bool
}

func newFieldReader() *fieldReader {
	r := &fieldReader{}
	r.decoder = hpack.NewDecoder(4096, func(f hpack.HeaderField) {
		r.size += len(f.Name) + len(f.Value) + 32
		if len(r.fields) >= maxFields || r.size > maxBlock {
			r.excess = true // go on decoding: the table must stay in step
			return
		}
		r.fields = append(r.fields, f)
	})
	r.decoder.SetMaxStringLength(8 << 10)
	return r
}

// read decodes one whole block. ok is false if it holds more than is taken.
func (r *fieldReader) read(block []byte) (fields []hpack.HeaderField, ok bool, err error) {
	r.fields, r.size, r.excess = nil, 0, false
	if _, err := r.decoder.Write(block); err != nil {
		return nil, false, fault(CodeCompression, "%v", err)
	}
	if err := r.decoder.Close(); err != nil {
		return nil, false, fault(CodeCompression, "%v", err)
	}
	return r.fields, !r.excess, nil
}

// message is a request or response head.
type message struct {
	method, authority, status string
	other                     []hpack.HeaderField
	malformed                 string // why, if it is
}

func readMessage(fields []hpack.HeaderField) (m message) {
	seen := map[string]bool{}
	for _, f := range fields {
		if !f.IsPseudo() {
			if !lowerToken(f.Name) {
				m.malformed = "a field name is not a lower-case token"
			}
			switch f.Name {
			case "connection", "transfer-encoding", "upgrade", "keep-alive", "proxy-connection":
				m.malformed = "a field belongs to HTTP/1"
			}
			m.other = append(m.other, f)
			continue
		}
		if seen[f.Name] || len(m.other) > 0 {
			m.malformed = "pseudo-fields are repeated or late"
		}
		seen[f.Name] = true
		switch f.Name {
		case ":method":
			m.method = f.Value
		case ":authority":
			m.authority = f.Value
		case ":status":
			m.status = f.Value
		case ":scheme", ":path":
		default:
			m.malformed = "unknown pseudo-field"
		}
	}
	if m.method == "CONNECT" && (seen[":scheme"] || seen[":path"]) {
		m.malformed = "CONNECT with a scheme or path"
	}
	return m
}

func lowerToken(s string) bool {
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '-', c == '_', c == '.':
		default:
			return false
		}
	}
	return s != ""
}

func discard(r io.Reader, n int) error {
	_, err := io.CopyN(io.Discard, r, int64(n))
	return err
}
