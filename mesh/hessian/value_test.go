package hessian

import (
	"fmt"
	"strings"
	"testing"
)

// written is one value of every kind.
func written() []byte {
	var w Writer
	w.Define("a.B", "n", "l", "d", "s", "b", "t", "at", "nothing", "list", "map", "again")
	w.Int(48)
	w.Long(-1 << 40)
	w.Double(1.5)
	w.Text("aé\U0001f600" + strings.Repeat("x", 0x10000)) // its last piece is short
	w.Bytes(make([]byte, 40000))
	w.Bool(true)
	w.Date(1234)
	w.Null()
	w.List("[int", 300)
	for i := range int32(300) {
		w.Int(i - 20)
	}
	w.End()
	w.Map()
	w.Text("k")
	w.Long(15)
	w.End()
	w.Define("a.B", "n") // it is known
	w.Int(0)
	for range 10 {
		w.Null()
	}
	return w.B
}

func TestReadWhatIsWritten(t *testing.T) {
	b := written()
	v, err := ReadValue(b)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, k := range v.Keys {
		m := v.Member(k)
		text := m.Text
		if len(text) > 20 {
			text = fmt.Sprintf("%.10q+%d", text, len(text))
		}
		got = append(got, fmt.Sprint(k, " ", m.Kind, " ", m.Number, " ", m.Real, " ", text, " ", len(m.Parts)))
	}
	want := []string{"n 2 48 0  0", "l 2 -1099511627776 0  0", "d 3 0 1.5  0", `s 4 0 0 "aé😀xxxxxxx"+65543 0`, `b 5 0 0 "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"+40000 0`,
		"t 1 1 0  0", "at 6 1234 0  0", "nothing 0 0 0  0", "list 7 0 0  300", "map 8 0 0  2", "again 9 0 0  11"}
	if v.Class != "a.B" || v.Member("again").Class != "a.B" || strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%s:\n%s\nwant\n%s", v.Class, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	var r Reader
	r.Reset(b, Draft)
	if err := r.Skip(); err != nil || r.Offset() != len(b) {
		t.Errorf("skipped to %d of %d, %v", r.Offset(), len(b), err)
	}
	if v.Member("none") != nil || v.Member("n").Member("n") != nil || (*Value)(nil).Member("n") != nil {
		t.Error("there is a member that there is not")
	}
	if _, err := ReadValue(append(b, 'N')); err == nil || !strings.Contains(err.Error(), "follows") {
		t.Error(err)
	}
	for i := range b[:200] {
		if _, err := ReadValue(b[:i]); err == nil {
			t.Errorf("%d bytes are a value", i)
		}
	}
}

// FuzzValue has any bytes read: what is a value is one to Skip too, but for two
// ways to write strings that only answers are allowed.
func FuzzValue(f *testing.F) {
	f.Add(written())
	f.Add([]byte("Mt\x00\x01aR\x00\x00\x00\x00Nz"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := ReadValue(b); err != nil {
			return
		}
		var r Reader
		r.Reset(b, Draft)
		err := r.Skip()
		if text := fmt.Sprint(err); strings.Contains(text, "a character begins") || strings.Contains(text, "a further piece of a string") {
			return
		}
		if err != nil || r.Offset() != len(b) {
			t.Fatalf("%x: skipped to %d of %d, %v", b, r.Offset(), len(b), err)
		}
	})
}
