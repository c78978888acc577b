package hbone

import (
	"encoding/binary"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// Code is an HTTP/2 error code.
type Code = h2frame.Code

// The codes that streams are ended with from outside.
const (
	CodeNone    = h2frame.CodeNone
	CodeCancel  = h2frame.CodeCancel
	CodeConnect = h2frame.CodeConnect
)

const (
	// maxFrame is what this side takes in one frame, the protocol's least.
	maxFrame = 16 << 10
	// maxBlock bounds a header block over all its frames, and the fields in it.
	maxBlock = 16 << 10
	// smallFrame is the room kept for frames that are not DATA.
	smallFrame = 1 << 10
	maxFields  = 64
)

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

// fieldReader decodes header blocks within bounds.
type fieldReader struct {
	decoder *hpack.Decoder
	fields  []hpack.HeaderField
	size    int
	excess  bool
}

func newFieldReader() *fieldReader {
	r := &fieldReader{}
	r.decoder = hpack.NewDecoder(h2frame.TableSize, func(f hpack.HeaderField) {
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
		return nil, false, h2frame.Fault(h2frame.CodeCompression, "%v", err)
	}
	if err := r.decoder.Close(); err != nil {
		return nil, false, h2frame.Fault(h2frame.CodeCompression, "%v", err)
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
