package transcode

import (
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/mesh/hessian"
)

// ErrTooLarge is a message that would be longer than its bound in the other words.
var ErrTooLarge = errors.New("too large in the other words")

// maxValues is how many values an answer has at most: each takes many times the
// byte that it may come in.
const maxValues = 1 << 17

var errValues = fmt.Errorf("over %d values", maxValues)

var errMessage = errors.New("the bytes are no such message")

// AppendJSON appends what a message in protobuf's own encoding says, in at most
// limit bytes. Fields that the type does not have are left out, as protobuf does.
func (m *Message) AppendJSON(dst, raw []byte, limit int) ([]byte, error) {
	w := &writer{b: dst, limit: len(dst) + limit}
	err := w.message(m, raw, 0)
	if err == nil && len(w.b) > w.limit {
		err = ErrTooLarge
	}
	if err != nil {
		return dst, fmt.Errorf("write %s as JSON: %w", m.name[1:], err)
	}
	return w.b, nil
}

// writer writes JSON.
type writer struct {
	b     []byte
	limit int
	depth int                     // of values of Hessian
	read  int                     // values of lists, in all messages
	busy  map[*hessian.Value]bool // being written: one inside of itself

	// Of what clients say.
	strict bool       // fields that the type does not have are refused, not left out
	skip   [][]*field // of the message that is written next: said elsewhere
	types  *Service   // values of Hessian are of these types; nil: of any
}

// value is one value of a field, as it came.
type value struct {
	n     uint64 // of numbers
	b     []byte // of what has a length
	owned bool   // b is no part of what came
}

// collect sorts the values of a message by field. A later member of a oneof takes
// the place of an earlier one.
func (w *writer) collect(m *Message, raw []byte) ([][]value, error) {
	all := make([][]value, len(m.fields))
	members := map[int]*field{}
	for len(raw) > 0 {
		n, kind, took := protowire.ConsumeTag(raw)
		if took < 0 {
			return nil, errMessage
		}
		rest := raw[took:]
		f := m.byNumber[n]
		if took = protowire.ConsumeFieldValue(n, kind, rest); took < 0 {
			return nil, errMessage
		}
		raw = rest[took:]
		if f == nil && w.strict {
			return nil, fmt.Errorf("field %d of %s is not in the schema", n, m.name[1:])
		}
		if f == nil {
			continue
		}
		vs, err := f.values(kind, rest[:took])
		if err != nil {
			return nil, err
		}
		if f.repeated {
			w.read += len(vs)
		}
		if w.read > maxValues {
			return nil, errValues
		}
		if f.oneof >= 0 {
			if was := members[f.oneof]; was != nil && was != f {
				all[was.index] = nil
			}
			members[f.oneof] = f
		}
		switch {
		case f.repeated:
			all[f.index] = append(all[f.index], vs...)
		case f.kind == kindMessage && len(all[f.index]) > 0: // of two, the sum
			was := &all[f.index][0]
			if !was.owned {
				was.b, was.owned = append([]byte(nil), was.b...), true
			}
			was.b = append(was.b, vs[0].b...)
		default:
			all[f.index] = vs
		}
	}
	return all, nil
}

// values are those of one occurrence: several if they are packed.
func (f *field) values(kind protowire.Type, raw []byte) ([]value, error) {
	want := f.wireType()
	if kind == want {
		v, _ := consume(kind, raw)
		return []value{v}, nil
	}
	if kind != protowire.BytesType || !f.repeated || f.kind == kindString || f.kind == kindBytes || f.kind == kindMessage {
		return nil, fmt.Errorf("field %s: %w", f.name, errMessage)
	}
	packed, _ := protowire.ConsumeBytes(raw)
	var all []value
	for len(packed) > 0 {
		v, took := consume(want, packed)
		if took < 0 {
			return nil, fmt.Errorf("field %s: %w", f.name, errMessage)
		}
		if len(all) == maxValues {
			return nil, errValues
		}
		all, packed = append(all, v), packed[took:]
	}
	return all, nil
}

func consume(kind protowire.Type, raw []byte) (v value, took int) {
	switch kind {
	case protowire.VarintType:
		v.n, took = protowire.ConsumeVarint(raw)
	case protowire.Fixed32Type:
		var n uint32
		n, took = protowire.ConsumeFixed32(raw)
		v.n = uint64(n)
	case protowire.Fixed64Type:
		v.n, took = protowire.ConsumeFixed64(raw)
	case protowire.BytesType:
		v.b, took = protowire.ConsumeBytes(raw)
	default:
		took = -1
	}
	return v, took
}

func (f *field) wireType() protowire.Type {
	switch f.kind {
	case kindDouble, kindFixed64, kindSfixed64:
		return protowire.Fixed64Type
	case kindFloat, kindFixed32, kindSfixed32:
		return protowire.Fixed32Type
	case kindString, kindBytes, kindMessage:
		return protowire.BytesType
	case kindGroup:
		return protowire.StartGroupType
	}
	return protowire.VarintType
}

func (w *writer) message(m *Message, raw []byte, depth int) error {
	if depth > maxDepth {
		return errors.New("nested too deep")
	}
	all, err := w.collect(m, raw)
	if err != nil {
		return err
	}
	skip := w.skip
	w.skip = nil
	if as := formOf(m.name); as.write != nil {
		return as.write(w, m, all, depth)
	}
	w.b = append(w.b, '{')
	first := true
	for i, vs := range all {
		f := m.fields[i]
		inner, gone := below(skip, f)
		if gone || f.absent(vs) {
			continue
		}
		w.skip = inner
		if !first {
			w.b = append(w.b, ',')
		}
		first = false
		w.text(f.json)
		w.b = append(w.b, ':')
		if err := w.field(f, vs, depth); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	w.b = append(w.b, '}')
	return nil
}

// absent says whether values of a field are as if it were not there.
func (f *field) absent(vs []value) bool {
	return len(vs) == 0 || !f.repeated && !f.explicit && vs[0].n == 0 && len(vs[0].b) == 0
}

// below is what paths that begin with a field say of what is in it; gone, that they
// say all of it.
func below(paths [][]*field, f *field) (inner [][]*field, gone bool) {
	for _, p := range paths {
		switch {
		case p[0] != f:
		case len(p) == 1:
			return nil, true
		default:
			inner = append(inner, p[1:])
		}
	}
	return inner, false
}

func (w *writer) field(f *field, vs []value, depth int) error {
	if f.isMap() {
		return w.pairs(f, vs, depth)
	}
	if !f.repeated {
		return w.single(f, vs[len(vs)-1], depth)
	}
	w.b = append(w.b, '[')
	for i, v := range vs {
		if i > 0 {
			w.b = append(w.b, ',')
		}
		if err := w.single(f, v, depth); err != nil {
			return err
		}
	}
	w.b = append(w.b, ']')
	return nil
}

// pairs writes a map. Of a key that is there twice the last value counts.
func (w *writer) pairs(f *field, vs []value, depth int) error {
	key, val := f.message.byNumber[1], f.message.byNumber[2]
	entries := make([][2]value, 0, len(vs))
	place := map[string]int{}
	for _, v := range vs {
		both, err := w.collect(f.message, v.b)
		if err != nil {
			return err
		}
		var e [2]value
		for i, part := range []*field{key, val} {
			if got := both[part.index]; len(got) > 0 {
				e[i] = got[len(got)-1]
			}
		}
		name := strconv.FormatUint(e[0].n, 10) + string(e[0].b)
		if at, there := place[name]; there {
			entries[at] = e
			continue
		}
		place[name] = len(entries)
		entries = append(entries, e)
	}
	bare := false
	switch key.kind {
	case kindInt32, kindUint32, kindSint32, kindFixed32, kindSfixed32, kindBool:
		bare = true
	}
	w.b = append(w.b, '{')
	for i, e := range entries {
		if i > 0 {
			w.b = append(w.b, ',')
		}
		if bare { // keys are strings in JSON
			w.b = append(w.b, '"')
		}
		if err := w.single(key, e[0], depth); err != nil {
			return err
		}
		if bare {
			w.b = append(w.b, '"')
		}
		w.b = append(w.b, ':')
		if err := w.single(val, e[1], depth); err != nil {
			return err
		}
	}
	w.b = append(w.b, '}')
	return nil
}

func (w *writer) single(f *field, v value, depth int) error {
	if len(w.b) > w.limit {
		return ErrTooLarge
	}
	switch f.kind {
	case kindDouble:
		w.float(math.Float64frombits(v.n), 64)
	case kindFloat:
		w.float(float64(math.Float32frombits(uint32(v.n))), 32)
	case kindInt64, kindSfixed64:
		w.quoted(int64(v.n))
	case kindSint64:
		w.quoted(protowire.DecodeZigZag(v.n))
	case kindUint64, kindFixed64:
		w.b = append(strconv.AppendUint(append(w.b, '"'), v.n, 10), '"')
	case kindInt32, kindSfixed32:
		w.b = strconv.AppendInt(w.b, int64(int32(v.n)), 10)
	case kindSint32:
		w.b = strconv.AppendInt(w.b, int64(int32(protowire.DecodeZigZag(v.n&math.MaxUint32))), 10)
	case kindUint32, kindFixed32:
		w.b = strconv.AppendUint(w.b, uint64(uint32(v.n)), 10)
	case kindBool:
		w.b = strconv.AppendBool(w.b, v.n != 0)
	case kindString:
		if !utf8.Valid(v.b) {
			return errors.New("text is not UTF-8")
		}
		w.text(string(v.b))
	case kindBytes:
		w.b = base64.StdEncoding.AppendEncode(append(w.b, '"'), v.b)
		w.b = append(w.b, '"')
	case kindEnum:
		w.enum(f, int32(v.n))
	case kindMessage:
		return w.message(f.message, v.b, depth+1)
	default:
		return errors.New("groups are not held")
	}
	return nil
}

func (w *writer) enum(f *field, n int32) {
	switch name, there := f.enum.byNumber[n]; {
	case f.typeName == nullEnum:
		w.b = append(w.b, "null"...)
	case there:
		w.text(name)
	default:
		w.b = strconv.AppendInt(w.b, int64(n), 10)
	}
}

func (w *writer) quoted(n int64) { w.b = append(strconv.AppendInt(append(w.b, '"'), n, 10), '"') }

// float writes a number as JSON has it, and those that it has not as text.
func (w *writer) float(v float64, bits int) {
	switch {
	case math.IsNaN(v):
		w.b = append(w.b, `"NaN"`...)
		return
	case math.IsInf(v, 0):
		w.b = append(w.b, map[bool]string{true: `"Infinity"`, false: `"-Infinity"`}[v > 0]...)
		return
	}
	form := byte('f')
	if abs := math.Abs(v); abs != 0 && (abs < 1e-6 || abs >= 1e21) {
		form = 'e'
	}
	w.b = strconv.AppendFloat(w.b, v, form, -1, bits)
}

// text writes a string.
func (w *writer) text(s string) { w.b = appendText(w.b, s) }

func appendText(b []byte, s string) []byte {
	const digits = "0123456789abcdef"
	b = append(b, '"')
	from := 0
	for i := range len(s) {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' {
			continue
		}
		b = append(b, s[from:i]...)
		from = i + 1
		if c == '"' || c == '\\' {
			b = append(b, '\\', c)
		} else {
			b = append(b, '\\', 'u', '0', '0', digits[c>>4], digits[c&15])
		}
	}
	return append(append(b, s[from:]...), '"')
}
