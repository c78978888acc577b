package http2

import (
	"fmt"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// Code is an HTTP/2 error code.
type Code = h2frame.Code

// The codes that streams are ended with from outside.
const (
	CodeNone     = h2frame.CodeNone
	CodeInternal = h2frame.CodeInternal
	CodeRefused  = h2frame.CodeRefused
	CodeCancel   = h2frame.CodeCancel
	CodeSecurity = h2frame.CodeSecurity
)

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
	r.decoder = hpack.NewDecoder(h2frame.TableSize, func(f hpack.HeaderField) {
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
		return nil, false, h2frame.Fault(h2frame.CodeCompression, "%v", err)
	}
	if err := r.decoder.Close(); err != nil {
		return nil, false, h2frame.Fault(h2frame.CodeCompression, "%v", err)
	}
	return r.fields, !r.excess, nil
}

type blockWriter []byte

func (b *blockWriter) Write(p []byte) (int, error) {
	*b = append(*b, p...)
	return len(p), nil
}
