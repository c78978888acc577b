package hessian

import (
	"encoding/binary"
	"math"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Writer writes a stream of values in the draft, at the end of B. The zero value
// is ready; what must not be longer than something is for who writes to watch.
type Writer struct {
	B       []byte
	classes map[string]int // that are defined, by their number
}

// Define begins an object, with the definition of its class before the first.
func (w *Writer) Define(class string, fields ...string) {
	n, known := w.classes[class]
	if !known {
		if w.classes == nil {
			w.classes = map[string]int{}
		}
		n = len(w.classes)
		w.classes[class] = n
		w.B = append(w.B, 'O')
		w.Int(int32(utf16Len(class)))
		w.B = append(w.B, class...)
		w.Int(int32(len(fields)))
		for _, f := range fields {
			w.Text(f)
		}
	}
	w.B = append(w.B, 'o')
	w.Int(int32(n))
}

// List begins a list of so many values, which ends in z.
func (w *Writer) List(name string, n int) {
	w.B = append(w.B, 'V')
	if name != "" {
		w.B = append(binary.BigEndian.AppendUint16(append(w.B, 't'), uint16(utf16Len(name))), name...)
	}
	if n < 256 {
		w.B = append(w.B, 'n', byte(n))
	} else {
		w.B = binary.BigEndian.AppendUint32(append(w.B, 'l'), uint32(n))
	}
}

// Int writes a number of 32 bits.
func (w *Writer) Int(n int32) {
	if n >= -16 && n <= 47 {
		w.B = append(w.B, byte(0x90+n))
		return
	}
	w.B = binary.BigEndian.AppendUint32(append(w.B, 'I'), uint32(n))
}

// Long writes a number of 64 bits.
func (w *Writer) Long(n int64) {
	if n >= -8 && n <= 15 {
		w.B = append(w.B, byte(0xe0+n))
		return
	}
	w.B = binary.BigEndian.AppendUint64(append(w.B, 'L'), uint64(n))
}

// Double writes a number with a fraction.
func (w *Writer) Double(v float64) {
	w.B = binary.BigEndian.AppendUint64(append(w.B, 'D'), math.Float64bits(v))
}

// Null writes that there is nothing.
func (w *Writer) Null() { w.B = append(w.B, 'N') }

// Bool writes true or false.
func (w *Writer) Bool(v bool) { w.B = append(w.B, map[bool]byte{true: 'T', false: 'F'}[v]) }

// Date writes a time in milliseconds since 1970.
func (w *Writer) Date(millis int64) {
	w.B = binary.BigEndian.AppendUint64(append(w.B, 'd'), uint64(millis))
}

// Map begins a map without a type: keys and values follow, then End.
func (w *Writer) Map() { w.B = append(w.B, 'M') }

// End ends a list or a map.
func (w *Writer) End() { w.B = append(w.B, 'z') }

func utf16Len(s string) (n int) {
	for _, c := range s {
		n += utf16.RuneLen(c)
	}
	return n
}

// maxPiece is how many units of UTF-16 one piece of a string has at most.
const maxPiece = 0x8000

// Text writes a string in pieces, whose lengths are in units of UTF-16. A character
// of two units is written as its halves, as Java does. s must be UTF-8.
func (w *Writer) Text(s string) {
	for first := true; ; first = false {
		units, end := 0, len(s)
		for i, c := range s {
			if units+utf16.RuneLen(c) > maxPiece {
				end = i
				break
			}
			units += utf16.RuneLen(c)
		}
		switch piece := s[:end]; {
		case end < len(s):
			w.B = append(binary.BigEndian.AppendUint16(append(w.B, 's'), uint16(units)), surrogates(piece)...)
		case units <= 0x1f && first: // some readers want no such piece after others
			w.B = append(append(w.B, byte(units)), surrogates(piece)...)
			return
		default:
			w.B = append(binary.BigEndian.AppendUint16(append(w.B, 'S'), uint16(units)), surrogates(piece)...)
			return
		}
		s = s[end:]
	}
}

// surrogates writes characters beyond 16 bits as Java does: two units of three
// bytes each.
func surrogates(s string) string {
	if !strings.ContainsFunc(s, func(c rune) bool { return c > 0xffff }) {
		return s
	}
	var b []byte
	for _, c := range s {
		if c <= 0xffff {
			b = utf8.AppendRune(b, c)
			continue
		}
		hi, lo := utf16.EncodeRune(c)
		for _, u := range []rune{hi, lo} {
			b = append(b, 0xe0|byte(u>>12), 0x80|byte(u>>6)&0xbf, 0x80|byte(u)&0xbf)
		}
	}
	return string(b)
}

// Bytes writes bytes, in pieces.
func (w *Writer) Bytes(raw []byte) {
	for len(raw) > maxPiece {
		w.B = append(binary.BigEndian.AppendUint16(append(w.B, 'b'), maxPiece), raw[:maxPiece]...)
		raw = raw[maxPiece:]
	}
	w.B = append(binary.BigEndian.AppendUint16(append(w.B, 'B'), uint16(len(raw))), raw...)
}
