package transcode

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// AppendWire appends, in protobuf's own encoding, the message that text in JSON
// says.
func (m *Message) AppendWire(dst, text []byte) ([]byte, error) {
	r, err := newReader(text)
	if err == nil {
		dst, err = r.whole(func(tok json.Token) ([]byte, error) { return r.message(dst, m, tok, 0) })
	}
	if err != nil {
		return nil, fmt.Errorf("read %s from JSON: %w", m.name[1:], err)
	}
	return dst, nil
}

// reader reads JSON.
type reader struct{ d *json.Decoder }

func newReader(text []byte) (*reader, error) {
	if !utf8.Valid(text) {
		return nil, errors.New("the text is not UTF-8")
	}
	r := &reader{json.NewDecoder(bytes.NewReader(text))}
	r.d.UseNumber()
	return r, nil
}

// whole reads one value and wants nothing behind it.
func (r *reader) whole(f func(json.Token) ([]byte, error)) ([]byte, error) {
	tok, err := r.next()
	if err != nil {
		return nil, err
	}
	out, err := f(tok)
	if err != nil {
		return nil, err
	}
	if _, err := r.d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the value")
	}
	return out, nil
}

func (r *reader) next() (json.Token, error) {
	tok, err := r.d.Token()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return tok, err
}

// object calls f for each member of an object that has begun, with the first token
// of its value.
func (r *reader) object(tok json.Token, f func(key string, tok json.Token) error) error {
	if tok != json.Delim('{') {
		return fmt.Errorf("%s: want an object", shown(tok))
	}
	seen := map[string]bool{}
	for {
		tok, err := r.next()
		if err != nil || tok == json.Delim('}') {
			return err
		}
		key, ok := tok.(string)
		if !ok || seen[key] {
			return fmt.Errorf("%.64q: is there twice", key)
		}
		seen[key] = true
		if tok, err = r.next(); err == nil {
			err = f(key, tok)
		}
		if err != nil {
			return fmt.Errorf("%.64s: %w", key, err)
		}
	}
}

// list calls f for each entry of a list that has begun.
func (r *reader) list(tok json.Token, f func(json.Token) error) error {
	if tok != json.Delim('[') {
		return fmt.Errorf("%s: want a list", shown(tok))
	}
	for i := 0; ; i++ {
		tok, err := r.next()
		if err != nil || tok == json.Delim(']') {
			return err
		}
		if err := f(tok); err != nil {
			return fmt.Errorf("[%d]: %w", i, err)
		}
	}
}

func shown(tok json.Token) string {
	switch tok := tok.(type) {
	case nil:
		return "null"
	case json.Delim:
		return map[json.Delim]string{'{': "an object", '[': "a list"}[tok]
	case string:
		return fmt.Sprintf("%.64q", tok)
	}
	return fmt.Sprintf("%.64v", tok)
}

func (r *reader) message(dst []byte, m *Message, tok json.Token, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, errors.New("nested too deep")
	}
	if as := formOf(m.name); as.read != nil {
		return as.read(r, dst, m, tok, depth)
	}
	filled := map[*field]bool{}
	members := map[int]bool{}
	err := r.object(tok, func(key string, tok json.Token) (err error) {
		f := m.byName[key]
		switch {
		case f == nil:
			return errors.New("there is no such field")
		case filled[f]:
			return errors.New("is there twice, under both of its names")
		}
		filled[f] = true
		if tok == nil && (f.repeated || !f.takesNull()) {
			return nil
		}
		if f.oneof >= 0 {
			if members[f.oneof] {
				return errors.New("another member of its oneof is there")
			}
			members[f.oneof] = true
		}
		dst, err = r.field(dst, f, tok, depth)
		return err
	})
	return dst, err
}

// takesNull says whether null is a value of the field's type.
func (f *field) takesNull() bool {
	return f.kind == kindEnum && f.typeName == nullEnum || f.kind == kindMessage && f.message.name == anyValue
}

func (r *reader) field(dst []byte, f *field, tok json.Token, depth int) ([]byte, error) {
	switch {
	case f.isMap():
		return r.pairs(dst, f, tok, depth)
	case !f.repeated:
		return r.single(dst, f, tok, depth)
	}
	var packed []byte
	err := r.list(tok, func(tok json.Token) (err error) {
		if tok == nil && !f.takesNull() {
			return errors.New("null in a list")
		}
		if f.packed {
			packed, err = appendScalar(packed, f, tok)
		} else {
			dst, err = r.single(dst, f, tok, depth)
		}
		return err
	})
	if len(packed) > 0 {
		dst = protowire.AppendBytes(protowire.AppendTag(dst, f.number, protowire.BytesType), packed)
	}
	return dst, err
}

func (r *reader) single(dst []byte, f *field, tok json.Token, depth int) ([]byte, error) {
	if f.kind == kindGroup {
		return nil, errors.New("groups are not held")
	}
	dst = protowire.AppendTag(dst, f.number, f.wireType())
	if f.kind != kindMessage {
		return appendScalar(dst, f, tok)
	}
	inner, err := r.message(nil, f.message, tok, depth+1)
	if err != nil {
		return nil, err
	}
	return protowire.AppendBytes(dst, inner), nil
}

func (r *reader) pairs(dst []byte, f *field, tok json.Token, depth int) ([]byte, error) {
	key, val := f.message.byNumber[1], f.message.byNumber[2]
	seen := map[string]bool{}
	err := r.object(tok, func(name string, tok json.Token) error {
		if tok == nil && !val.takesNull() {
			return errors.New("null in a map")
		}
		k, err := appendKey(nil, key, name)
		if err != nil {
			return err
		}
		if seen[string(k)] {
			return errors.New("is there twice")
		}
		seen[string(k)] = true
		entry, err := r.single(protowireKey(key, k), val, tok, depth)
		if err != nil {
			return err
		}
		dst = protowire.AppendBytes(protowire.AppendTag(dst, f.number, protowire.BytesType), entry)
		return nil
	})
	return dst, err
}

func protowireKey(key *field, k []byte) []byte {
	return append(protowire.AppendTag(nil, key.number, key.wireType()), k...)
}

// appendKey appends the key of a map, which is a string in JSON.
func appendKey(dst []byte, f *field, name string) ([]byte, error) {
	if f.kind == kindBool {
		if name != "true" && name != "false" {
			return nil, fmt.Errorf("%.64q: want true or false", name)
		}
		return appendScalar(dst, f, name == "true")
	}
	return appendScalar(dst, f, name)
}

// appendScalar appends a value without its tag.
func appendScalar(dst []byte, f *field, tok json.Token) ([]byte, error) {
	switch f.kind {
	case kindBool:
		b, ok := tok.(bool)
		if !ok {
			return nil, fmt.Errorf("%s: want true or false", shown(tok))
		}
		return protowire.AppendVarint(dst, protowire.EncodeBool(b)), nil
	case kindString:
		s, ok := tok.(string)
		if !ok {
			return nil, fmt.Errorf("%s: want text", shown(tok))
		}
		if !utf8.ValidString(s) { // of a path or a query: no JSON holds such text
			return nil, fmt.Errorf("%s: want text in UTF-8", shown(tok))
		}
		return protowire.AppendString(dst, s), nil
	case kindBytes:
		b, err := decodeBytes(tok)
		if err != nil {
			return nil, err
		}
		return protowire.AppendBytes(dst, b), nil
	case kindEnum:
		n, err := f.enumValue(tok)
		if err != nil {
			return nil, err
		}
		return protowire.AppendVarint(dst, uint64(int64(n))), nil
	case kindDouble, kindFloat:
		return appendFloat(dst, f, tok)
	}
	return appendWhole(dst, f, tok)
}

func decodeBytes(tok json.Token) ([]byte, error) {
	s, ok := tok.(string)
	if !ok {
		return nil, fmt.Errorf("%s: want bytes in base64", shown(tok))
	}
	code := base64.StdEncoding
	if strings.ContainsAny(s, "-_") {
		code = base64.URLEncoding
	}
	if len(s)%4 != 0 {
		code = code.WithPadding(base64.NoPadding)
	}
	b, err := code.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("%.64q: want bytes in base64", s)
	}
	return b, nil
}

func (f *field) enumValue(tok json.Token) (int32, error) {
	switch tok := tok.(type) {
	case nil: // null is the one value of its enum
		return 0, nil
	case string:
		if n, there := f.enum.byName[tok]; there {
			return n, nil
		}
	case json.Number:
		if n, err := whole(string(tok), 32); err == nil {
			return int32(n), nil
		}
	}
	return 0, fmt.Errorf("%s: no value of its enum", shown(tok))
}

// literal is the text of a number, which may stand in quotes.
func literal(tok json.Token) (string, error) {
	switch tok := tok.(type) {
	case json.Number:
		return string(tok), nil
	case string:
		if tok != "" && !strings.ContainsAny(tok, " \t\r\n_xX") {
			return tok, nil
		}
	}
	return "", fmt.Errorf("%s: want a number", shown(tok))
}

func appendFloat(dst []byte, f *field, tok json.Token) ([]byte, error) {
	text, err := literal(tok)
	if err != nil {
		return nil, err
	}
	bits := 64
	if f.kind == kindFloat {
		bits = 32
	}
	v := 0.0
	switch text {
	case "NaN":
		v = math.NaN()
	case "Infinity":
		v = math.Inf(1)
	case "-Infinity":
		v = math.Inf(-1)
	default:
		if v, err = strconv.ParseFloat(text, bits); err != nil || !numeric(text) {
			return nil, fmt.Errorf("%.64q: no number of %d bits", text, bits)
		}
	}
	if bits == 32 {
		return protowire.AppendFixed32(dst, math.Float32bits(float32(v))), nil
	}
	return protowire.AppendFixed64(dst, math.Float64bits(v)), nil
}

// numeric says whether a text is a number of JSON.
func numeric(s string) bool {
	return strings.Trim(s, "0123456789.eE+-") == "" && json.Valid([]byte(s))
}

// whole reads a whole number of so many bits with a sign. It may be written with
// a fraction or an exponent, as long as it is whole and protobuf reads it so.
func whole(text string, bits int) (int64, error) {
	digits, ok := unscaled(text)
	n, err := strconv.ParseInt(digits, 10, bits)
	if !ok || err != nil {
		return 0, fmt.Errorf("%.64q: no whole number of %d bits", text, bits)
	}
	return n, nil
}

// natural is whole without a sign.
func natural(text string, bits int) (uint64, error) {
	digits, ok := unscaled(text)
	n, err := strconv.ParseUint(digits, 10, bits)
	if !ok || err != nil {
		return 0, fmt.Errorf("%.64q: no whole number of %d bits from 0", text, bits)
	}
	return n, nil
}

// unscaled writes a number without its fraction and its exponent, if it is whole.
func unscaled(text string) (digits string, ok bool) {
	const most = 20 // digits of a number of 64 bits
	if !numeric(text) {
		return "", false
	}
	mantissa, power, _ := strings.Cut(strings.ToLower(text), "e")
	before, after, _ := strings.Cut(mantissa, ".")
	after = strings.TrimRight(after, "0")
	exp := 0
	if power != "" {
		var err error
		if exp, err = strconv.Atoi(power); err != nil {
			return "", false
		}
	}
	zeros := exp - len(after)
	switch {
	case exp >= 0:
		if zeros < 0 || exp > most {
			return "", false
		}
		return before + after + strings.Repeat("0", zeros), true
	case after != "" || exp < -most: // the least number has no opposite
		return "", false
	}
	kept, ok := strings.CutSuffix(before, strings.Repeat("0", -exp))
	return kept, ok
}

func appendWhole(dst []byte, f *field, tok json.Token) ([]byte, error) {
	text, err := literal(tok)
	if err != nil {
		return nil, err
	}
	bits := 64
	switch f.kind {
	case kindInt32, kindSint32, kindSfixed32, kindUint32, kindFixed32:
		bits = 32
	}
	var n int64
	var u uint64
	switch f.kind {
	case kindUint32, kindUint64, kindFixed32, kindFixed64:
		u, err = natural(text, bits)
	default:
		n, err = whole(text, bits)
		u = uint64(n)
	}
	if err != nil {
		return nil, err
	}
	switch f.kind {
	case kindFixed32, kindSfixed32:
		return protowire.AppendFixed32(dst, uint32(u)), nil
	case kindFixed64, kindSfixed64:
		return protowire.AppendFixed64(dst, u), nil
	case kindSint32, kindSint64:
		u = protowire.EncodeZigZag(n)
	}
	return protowire.AppendVarint(dst, u), nil
}

type (
	jsonToken  = json.Token
	jsonNumber = json.Number
)
