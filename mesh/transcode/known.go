package transcode

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	nullEnum = ".google.protobuf.NullValue"
	anyValue = ".google.protobuf.Value"
)

// form is how a type that everybody knows is written in JSON.
type form struct {
	write func(w *writer, m *Message, all [][]value, depth int) error
	read  func(r *reader, dst []byte, m *Message, tok json.Token, depth int) ([]byte, error)
}

// formOf is the form of a type; that of most is none.
func formOf(name string) form {
	rest, ok := strings.CutPrefix(name, ".google.protobuf.")
	if !ok {
		return form{}
	}
	switch rest {
	case "Timestamp":
		return form{writeTimestamp, readTimestamp}
	case "Duration":
		return form{writeDuration, readDuration}
	case "FieldMask":
		return form{writeMask, readMask}
	case "Struct", "ListValue":
		return form{writeInner, readInner}
	case "Value":
		return form{writeValue, readValue}
	case "Any":
		return form{writeAny, readAny}
	case "DoubleValue", "FloatValue", "Int64Value", "UInt64Value", "Int32Value", "UInt32Value", "BoolValue", "StringValue", "BytesValue":
		return form{writeWrapped, readWrapped}
	}
	return form{}
}

var errAny = errors.New("google.protobuf.Any is not held")

func writeAny(*writer, *Message, [][]value, int) error { return errAny }

func readAny(*reader, []byte, *Message, json.Token, int) ([]byte, error) { return nil, errAny }

// last is the value of a field, zero if it is not there.
func last(m *Message, all [][]value, n protowire.Number) (v value, there bool) {
	f := m.byNumber[n]
	if f == nil || len(all[f.index]) == 0 {
		return v, false
	}
	vs := all[f.index]
	return vs[len(vs)-1], true
}

// A wrapper is its value.
func writeWrapped(w *writer, m *Message, all [][]value, depth int) error {
	v, _ := last(m, all, 1)
	if m.byNumber[1] == nil {
		return errMessage
	}
	return w.single(m.byNumber[1], v, depth)
}

func readWrapped(r *reader, dst []byte, m *Message, tok json.Token, depth int) ([]byte, error) {
	if m.byNumber[1] == nil {
		return nil, errMessage
	}
	return r.single(dst, m.byNumber[1], tok, depth)
}

// A struct or a list is its only field.
func writeInner(w *writer, m *Message, all [][]value, depth int) error {
	f := m.byNumber[1]
	if f == nil || !f.repeated {
		return errMessage
	}
	return w.field(f, all[f.index], depth)
}

func readInner(r *reader, dst []byte, m *Message, tok json.Token, depth int) ([]byte, error) {
	if m.byNumber[1] == nil {
		return nil, errMessage
	}
	return r.field(dst, m.byNumber[1], tok, depth)
}

// Numbers of the fields of google.protobuf.Value.
const (
	valueNull = 1 + iota
	valueNumber
	valueString
	valueBool
	valueStruct
	valueList
)

func writeValue(w *writer, m *Message, all [][]value, depth int) error {
	for n := protowire.Number(valueNull); n <= valueList; n++ {
		v, there := last(m, all, n)
		if !there {
			continue
		}
		if f := math.Float64frombits(v.n); n == valueNumber && (math.IsNaN(f) || math.IsInf(f, 0)) {
			return errors.New("a value that is no number of JSON")
		}
		return w.single(m.byNumber[n], v, depth)
	}
	return errors.New("a value of no kind")
}

func readValue(r *reader, dst []byte, m *Message, tok json.Token, depth int) ([]byte, error) {
	n := protowire.Number(valueNull)
	switch tok := tok.(type) {
	case json.Number:
		n = valueNumber
	case string:
		n = valueString
	case bool:
		n = valueBool
	case json.Delim:
		if n = valueStruct; tok == '[' {
			n = valueList
		}
	}
	f := m.byNumber[n]
	if f == nil {
		return nil, errMessage
	}
	return r.single(dst, f, tok, depth)
}

// Bounds of times, as protobuf has them.
const (
	minSeconds = -62135596800 // year 1
	maxSeconds = 253402300799 // year 9999
	maxSpan    = 315576000000
)

func secondsAndNanos(m *Message, all [][]value) (seconds, nanos int64) {
	s, _ := last(m, all, 1)
	n, _ := last(m, all, 2)
	return int64(s.n), int64(int32(n.n))
}

func appendTime(dst []byte, seconds, nanos int64) []byte {
	if seconds != 0 {
		dst = protowire.AppendVarint(protowire.AppendTag(dst, 1, protowire.VarintType), uint64(seconds))
	}
	if nanos != 0 {
		dst = protowire.AppendVarint(protowire.AppendTag(dst, 2, protowire.VarintType), uint64(nanos))
	}
	return dst
}

// fraction is the part of a second, in no, three, six or nine digits.
func fraction(nanos int64) string {
	if nanos == 0 {
		return ""
	}
	text := fmt.Sprintf(".%09d", nanos)
	return strings.TrimSuffix(strings.TrimSuffix(text, "000"), "000")
}

func writeTimestamp(w *writer, m *Message, all [][]value, _ int) error {
	s, n := secondsAndNanos(m, all)
	if s < minSeconds || s > maxSeconds || n < 0 || n > 999_999_999 {
		return errors.New("a time outside the years 1 to 9999")
	}
	w.text(time.Unix(s, 0).UTC().Format("2006-01-02T15:04:05") + fraction(n) + "Z")
	return nil
}

func readTimestamp(_ *reader, dst []byte, _ *Message, tok json.Token, _ int) ([]byte, error) {
	text, _ := tok.(string)
	t, err := time.Parse(time.RFC3339Nano, text)
	_, after, _ := strings.Cut(text, ".")
	if err != nil || t.Unix() < minSeconds || t.Unix() > maxSeconds || len(after) > len("999999999+00:00") || strings.Contains(text, ",") {
		return nil, fmt.Errorf("%s: want a time, as 2006-01-02T15:04:05Z", shown(tok))
	}
	return appendTime(dst, t.Unix(), int64(t.Nanosecond())), nil
}

func writeDuration(w *writer, m *Message, all [][]value, _ int) error {
	s, n := secondsAndNanos(m, all)
	if s < -maxSpan || s > maxSpan || n < -999_999_999 || n > 999_999_999 || s > 0 && n < 0 || s < 0 && n > 0 {
		return errors.New("a duration out of range")
	}
	sign := ""
	if s < 0 || n < 0 {
		sign, s, n = "-", -s, -n
	}
	w.text(sign + strconv.FormatInt(s, 10) + fraction(n) + "s")
	return nil
}

func readDuration(_ *reader, dst []byte, _ *Message, tok json.Token, _ int) ([]byte, error) {
	text, _ := tok.(string)
	number, ok := strings.CutSuffix(text, "s")
	rest, minus := strings.CutPrefix(number, "-")
	before, after, dot := strings.Cut(rest, ".")
	s, err := strconv.ParseUint(before, 10, 63)
	n, nerr := strconv.ParseUint((after + "000000000")[:9], 10, 32)
	digits := strings.Trim(before+after, "0123456789") == "" && (len(before) < 2 || before[0] != '0') // as protobuf reads it
	if !ok || err != nil || nerr != nil || !digits || len(after) > 9 || dot && after == "" || s > maxSpan {
		return nil, fmt.Errorf("%s: want a duration, as 1.5s", shown(tok))
	}
	seconds, nanos := int64(s), int64(n)
	if minus {
		seconds, nanos = -seconds, -nanos
	}
	return appendTime(dst, seconds, nanos), nil
}

func writeMask(w *writer, m *Message, all [][]value, _ int) error {
	f := m.byNumber[1]
	if f == nil {
		return errMessage
	}
	var paths []string
	for _, v := range all[f.index] {
		path := camel(string(v.b))
		if snake(path) != string(v.b) || !isPath(string(v.b)) {
			return fmt.Errorf("path %.64q has no form in JSON", v.b)
		}
		paths = append(paths, path)
	}
	w.text(strings.Join(paths, ","))
	return nil
}

func readMask(_ *reader, dst []byte, _ *Message, tok json.Token, _ int) ([]byte, error) {
	text, ok := tok.(string)
	if !ok || strings.Contains(text, "_") {
		return nil, fmt.Errorf("%s: want paths of fields, as a,b.c", shown(tok))
	}
	if text == "" {
		return dst, nil
	}
	for path := range strings.SplitSeq(text, ",") {
		if !isPath(snake(path)) {
			return nil, fmt.Errorf("%.64q: no path of a field", path)
		}
		dst = protowire.AppendString(protowire.AppendTag(dst, 1, protowire.BytesType), snake(path))
	}
	return dst, nil
}

// isPath says whether a text is names of fields with dots between them.
func isPath(path string) bool {
	for name := range strings.SplitSeq(path, ".") {
		if name == "" || name[0] >= '0' && name[0] <= '9' || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" {
			return false
		}
	}
	return true
}

func snake(path string) string {
	var b strings.Builder
	for _, c := range path {
		if c >= 'A' && c <= 'Z' {
			b.WriteByte('_')
			c += 'a' - 'A'
		}
		b.WriteRune(c)
	}
	return b.String()
}
