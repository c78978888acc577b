package bolt

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"unicode/utf8"
)

// SOFARPC writes an early draft of Hessian 2: 'O' defines a class, 'o' is an
// object of it, 'V' … 'z' a list, 'M' … 'z' a map.

// Request is a call: SofaRequest and its arguments.
type Request struct {
	Service string // such as com.example.bank.Ledger:1.0
	Method  string
	// Args are string or int64; their Java types follow from that.
	Args []any
}

// Response is an answer: SofaResponse. An error is the framework's; what the
// service has to say is the value.
type Response struct {
	Error string
	Value any // string, int64, bool or nil
}

var requestFields = []string{"methodName", "methodArgSigs", "targetServiceUniqueName", "targetAppName", "requestProps"}
var responseFields = []string{"isError", "errorMsg", "appResponse", "responseProps"}

// appendRequest encodes a request.
func appendRequest(b []byte, r Request) ([]byte, error) {
	b = appendClass(b, requestClass, requestFields)
	b = appendString(b, r.Method)
	b = append(b, 'V', 't')
	b = binary.BigEndian.AppendUint16(b, uint16(len("[java.lang.String")))
	b = append(b, "[java.lang.String"...)
	if len(r.Args) > math.MaxUint8 {
		return nil, fmt.Errorf("encode request: %d arguments", len(r.Args))
	}
	b = append(b, 'n', byte(len(r.Args)))
	for _, a := range r.Args {
		sig := "java.lang.String"
		if _, ok := a.(int64); ok {
			sig = "long"
		}
		b = appendString(b, sig)
	}
	b = append(b, 'z')
	b = appendString(b, r.Service)
	b = append(b, 'N', 'N')
	for i, a := range r.Args {
		var err error
		if b, err = appendValue(b, a); err != nil {
			return nil, fmt.Errorf("encode argument %d: %w", i, err)
		}
	}
	return b, nil
}

// appendResponse encodes a response.
func appendResponse(b []byte, r Response) ([]byte, error) {
	b = appendClass(b, responseClass, responseFields)
	if r.Error != "" {
		b = append(b, 'T')
		b = appendString(b, r.Error)
	} else {
		b = append(b, 'F', 'N')
	}
	b, err := appendValue(b, r.Value)
	return append(b, 'N'), err
}

func appendClass(b []byte, name string, fields []string) []byte {
	b = append(b, 'O')
	b = appendInt(b, int32(len(name)))
	b = append(b, name...)
	b = appendInt(b, int32(len(fields)))
	for _, f := range fields {
		b = appendString(b, f)
	}
	b = append(b, 'o')
	return appendInt(b, 0)
}

func appendInt(b []byte, n int32) []byte {
	switch {
	case n >= -16 && n <= 47:
		return append(b, byte(0x90+n))
	case n >= -2048 && n <= 2047:
		return append(b, byte(0xc8+(n>>8)), byte(n))
	}
	return binary.BigEndian.AppendUint32(append(b, 'I'), uint32(n))
}

// appendString encodes text; lengths count UTF-16 units.
func appendString(b []byte, s string) []byte {
	n := 0
	for _, r := range s {
		if n++; r > 0xffff {
			n++
		}
	}
	if n < 32 {
		b = append(b, byte(n))
	} else {
		b = binary.BigEndian.AppendUint16(append(b, 'S'), uint16(n))
	}
	return append(b, s...)
}

func appendValue(b []byte, v any) ([]byte, error) {
	switch v := v.(type) {
	case nil:
		return append(b, 'N'), nil
	case bool:
		if v {
			return append(b, 'T'), nil
		}
		return append(b, 'F'), nil
	case int64:
		return binary.BigEndian.AppendUint64(append(b, 'L'), uint64(v)), nil
	case string:
		if len(v) > math.MaxUint16 || !utf8.ValidString(v) {
			return nil, errors.New("text is too long or not UTF-8")
		}
		return appendString(b, v), nil
	}
	return nil, fmt.Errorf("values of type %T are not spoken here", v)
}

// decoder reads hessian; the first fault stays.
type decoder struct {
	b   []byte
	err error
}

var errCut = errors.New("hessian: value is cut")

func (d *decoder) fail(err error) {
	if d.err == nil {
		d.err = err
	}
	d.b = nil
}

func (d *decoder) take(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.fail(errCut)
		return make([]byte, min(max(n, 0), 8))
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) tag() byte { return d.take(1)[0] }

// expect reads an object's class and checks that it is the one wanted.
func (d *decoder) expect(class string, fields []string) {
	if d.tag() != 'O' {
		d.fail(errors.New("hessian: no class definition"))
		return
	}
	if got := string(d.take(d.count())); got != class {
		d.fail(fmt.Errorf("hessian: class is %.100q, want %q", got, class))
		return
	}
	if n := d.count(); n != len(fields) {
		d.fail(fmt.Errorf("hessian: %d fields, want %d", n, len(fields)))
		return
	}
	for _, f := range fields {
		if got := d.text(); got != f {
			d.fail(fmt.Errorf("hessian: field is %.100q, want %q", got, f))
			return
		}
	}
	if d.tag() != 'o' || d.count() != 0 {
		d.fail(errors.New("hessian: no object of the class"))
	}
}

// count reads an integer that counts something.
func (d *decoder) count() int {
	n, ok := d.value(0).(int64)
	if !ok || n < 0 || n > maxContent {
		d.fail(errors.New("hessian: no count"))
		return 0
	}
	return int(n)
}

// text reads text or null, which reads as none.
func (d *decoder) text() string {
	switch v := d.value(0).(type) {
	case string:
		return v
	case nil:
	default:
		d.fail(errors.New("hessian: no text"))
	}
	return ""
}

// value reads any value this protocol needs; lists and maps within others are
// read to a small depth.
func (d *decoder) value(depth int) any {
	t := d.tag()
	be := binary.BigEndian
	switch {
	case d.err != nil || t == 'N':
		return nil
	case t == 'T' || t == 'F':
		return t == 'T'
	case t < 0x20:
		return d.chars(int(t))
	case t == 'S':
		return d.chars(int(be.Uint16(d.take(2))))
	case t >= 0x80 && t <= 0xbf:
		return int64(t) - 0x90
	case t >= 0xc0 && t <= 0xcf:
		return (int64(t)-0xc8)<<8 | int64(d.tag())
	case t >= 0xd0 && t <= 0xd7:
		return (int64(t)-0xd4)<<16 | int64(be.Uint16(d.take(2)))
	case t == 'I' || t == 'w':
		return int64(int32(be.Uint32(d.take(4))))
	case t >= 0xd8 && t <= 0xef:
		return int64(t) - 0xe0
	case t >= 0xf0:
		return (int64(t)-0xf8)<<8 | int64(d.tag())
	case t >= 0x38 && t <= 0x3f:
		return (int64(t)-0x3c)<<16 | int64(be.Uint16(d.take(2)))
	case t == 'L':
		return int64(be.Uint64(d.take(8)))
	case (t == 'V' || t == 'M') && depth < 4:
		return d.collection(t, depth+1)
	}
	d.fail(fmt.Errorf("hessian: tag 0x%02x is not spoken here", t))
	return nil
}

// collection reads the values of a list, or the keys and values of a map, up
// to its end mark.
func (d *decoder) collection(kind byte, depth int) []any {
	if len(d.b) > 0 && d.b[0] == 't' {
		d.take(1)
		d.take(int(binary.BigEndian.Uint16(d.take(2))))
	}
	if kind == 'V' && len(d.b) > 0 && (d.b[0] == 'n' || d.b[0] == 'l') {
		if d.tag() == 'n' {
			d.take(1)
		} else {
			d.take(4)
		}
	}
	var out []any
	for d.err == nil {
		if len(d.b) > 0 && d.b[0] == 'z' {
			d.take(1)
			return out
		}
		out = append(out, d.value(depth))
	}
	return nil
}

// chars reads n UTF-16 units of UTF-8 text.
func (d *decoder) chars(n int) string {
	at := 0
	for n > 0 {
		r, size := utf8.DecodeRune(d.b[at:])
		if r == utf8.RuneError && size < 2 {
			d.fail(errCut)
			return ""
		}
		at += size
		if n--; r > 0xffff {
			n--
		}
	}
	return string(d.take(at))
}

// parseRequest decodes a request and checks that it has the arguments it
// announces.
func parseRequest(b []byte) (Request, error) {
	d := &decoder{b: b}
	d.expect(requestClass, requestFields)
	r := Request{Method: d.text()}
	sigs, _ := d.value(0).([]any)
	r.Service = d.text()
	d.value(0) // targetAppName
	d.value(0) // requestProps
	for range sigs {
		switch v := d.value(0).(type) {
		case string, int64:
			r.Args = append(r.Args, v)
		default:
			d.fail(errors.New("hessian: argument is neither text nor number"))
		}
	}
	if d.err == nil && len(d.b) > 0 {
		d.fail(errors.New("hessian: something follows the arguments"))
	}
	return r, d.err
}

// parseResponse decodes a response.
func parseResponse(b []byte) (Response, error) {
	d := &decoder{b: b}
	d.expect(responseClass, responseFields)
	isError, _ := d.value(0).(bool)
	r := Response{Error: d.text()}
	r.Value = d.value(0)
	if isError && r.Error == "" {
		r.Error = "error without a message"
	}
	if !isError {
		r.Error = ""
	}
	d.value(0) // responseProps
	return r, d.err
}
