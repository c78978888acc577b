package bolt

import (
	"encoding/binary"
	"unicode/utf8"
)

// Header is the map of a frame: keys and values one after the other, each
// behind its length. A value of length -1 is null.
type Header []byte

// Next returns the first pair and the rest. ok is false at the end; a header
// that is cut off or nonsense is an error.
func (h Header) Next() (key, value []byte, rest Header, ok bool, err error) {
	if len(h) == 0 {
		return nil, nil, nil, false, nil
	}
	if key, h, err = h.one(); err == nil && key == nil {
		err = malformed("a key of the header is null")
	}
	if err != nil {
		return nil, nil, nil, false, err
	}
	if value, h, err = h.one(); err != nil {
		return nil, nil, nil, false, err
	}
	return key, value, h, true, nil
}

func (h Header) one() ([]byte, Header, error) {
	if len(h) < 4 {
		return nil, nil, malformed("%d bytes end the header", len(h))
	}
	n := int32(binary.BigEndian.Uint32(h))
	h = h[4:]
	if n == -1 {
		return nil, h, nil
	}
	if n < 0 || int(n) > len(h) {
		return nil, nil, malformed("%d bytes in a header that has %d more", n, len(h))
	}
	return h[:n:n], h[n:], nil
}

// Check tells whether the header can be read to its end.
func (h Header) Check() error {
	for {
		_, _, rest, ok, err := h.Next()
		if err != nil || !ok {
			return err
		}
		h = rest
	}
}

// keys of the header that say what a request is for.
const (
	keyService       = "service"
	keyTargetService = "sofa_head_target_service"
	keyMethod        = "sofa_head_method_name"
	keyResponseError = "sofa_head_response_error"
)

// named is what a header says of a request.
type named struct{ service, target, method []byte }

// names reads what the header says. A key with two values is an error: servers
// take the last, or the first.
func (h Header) names() (n named, err error) {
	for {
		key, value, rest, ok, err := h.Next()
		if err != nil || !ok {
			return n, err
		}
		h = rest
		var field *[]byte
		switch string(key) {
		case keyService:
			field = &n.service
		case keyTargetService:
			field = &n.target
		case keyMethod:
			field = &n.method
		default:
			continue
		}
		if *field != nil && string(*field) != string(value) {
			return n, unclear("the header has two values for %s", key)
		}
		if !utf8.Valid(value) {
			return n, unclear("the header's %s is not UTF-8", key)
		}
		*field = value
	}
}

func appendHeader(dst []byte, key, value string) []byte {
	dst = append(binary.BigEndian.AppendUint32(dst, uint32(len(key))), key...)
	return append(binary.BigEndian.AppendUint32(dst, uint32(len(value))), value...)
}
