package hessian

import (
	"errors"
	"strings"
	"testing"
)

// values that one Skip passes over, in each dialect.
var values = map[Dialect]map[string]string{
	Final: {
		"null": "N", "true": "T", "int 0": "\x90", "int -1": "\x8f", "int of two": "\xc8\x30", "int of three": "\xd4\x00\x00", "int": "I\x00\x00\x00\x01",
		"long": "\xe0", "long of two": "\xf8\x01", "long of three": "\x3c\x00\x01", "long of four": "\x59\x00\x00\x00\x01", "long of eight": "L12345678",
		"0.0": "\x5b", "1.0": "\x5c", "double of one": "\x5d\x01", "double of two": "\x5e\x01\x02", "double of four": "\x5f1234", "double": "D12345678",
		"milliseconds": "\x4a12345678", "minutes": "\x4b1234",
		"empty string": "\x00", "string": "\x03abc", "string of 256": "\x31\x00" + strings.Repeat("a", 256), "long string": "S\x00\x02ab",
		"pieces": "R\x00\x01aR\x00\x01b\x01c", "two bytes a character": "\x02\xc3\xa9\xc3\xa9", "surrogates": "\x02\xed\xa0\xbd\xed\xb8\x80",
		"bytes": "\x23abc", "bytes of 256": "\x35\x00" + strings.Repeat("a", 256), "long bytes": "A\x00\x01aB\x00\x01b",
		"list to its end": "U\x04listNTZ", "fixed list": "V\x04list\x92NT", "untyped list": "WNTZ", "untyped fixed list": "X\x92NT",
		"short list": "\x72\x04listNT", "short untyped list": "\x7aNT", "list of a type seen": "V\x90\x91N",
		"map": "M\x03a.B\x01kNZ", "untyped map": "H\x01k\x91Z", "map in a map": "H\x01kHZZ", "reference": "Q\x90",
		"object": "C\x03a.B\x92\x01a\x01b\x60NT", "object again": "\x7aC\x03a.B\x91\x01a\x60NO\x90T", "object in a class": "C\x03a.B\x91\x01aC\x03a.C\x90\x60\x61",
	},
	Draft: {
		"long of four": "w1234", "0.0": "g", "1.0": "h", "double of one": "i\x01", "double of two": "j12", "double of four": "k1234", "date": "d12345678",
		"pieces": "s\x00\x01aS\x00\x01b", "XML": "x\x00\x01<X\x00\x01>", "long bytes": "b\x00\x01aB\x00\x01b",
		"list": "Vt\x00\x04listn\x02NTz", "list without a type": "Vl\x00\x00\x00\x01Nz", "list without a length": "VNz", "list of a type seen": "v\x90\x91N",
		"map": "Mt\x00\x03a.B\x01kNz", "untyped map": "M\x01kNz", "map of a type seen": "Mu\x90z",
		"reference": "R1234", "reference of one": "J\x01", "reference of two": "K12",
		"object": "O\x93a.B\x92\x01a\x01bo\x90NT", "object again": "VO\x93a.B\x91\x01ao\x90No\x90Tz",
	},
}

func TestSkip(t *testing.T) {
	var r Reader
	for dialect, all := range values {
		for name, v := range all {
			r.Reset([]byte(v+"\x91"), dialect)
			if err := r.Skip(); err != nil || r.Offset() != len(v) {
				t.Errorf("dialect %d: %s: %d of %d bytes, %v", dialect, name, r.Offset(), len(v), err)
			}
			for n := range len(v) {
				r.Reset([]byte(v[:n]), dialect)
				if err := r.Skip(); !errors.Is(err, ErrShort) {
					t.Errorf("dialect %d: %s cut off after %d: %v", dialect, name, n, err)
				}
			}
		}
	}
}

func TestSkipRefuses(t *testing.T) {
	deep := func(open string) string { return strings.Repeat(open, MaxDepth+1) }
	var r Reader
	for dialect, all := range map[Dialect]map[string]string{
		Final: {
			"deep lists": deep("\x79"), "deep maps": deep("H\x90"), "deep objects": "C\x01a\x91\x01a" + deep("\x60"),
			"many classes": strings.Repeat("C\x01a\x90", MaxClasses+1) + "\x60", "many fields": "C\x01a\xd7\xff\xff", "long list": "X\xd7\xff\xff", "negative list": "X\x8f",
			"an object without a class": "\x60", "class -1": "O\x8f", "unknown": "\x40", "draft": "O\x91a\x90o\x90", "four bytes a character": "\x01\xf0\x9f\x98\x80",
			"no character": "\x01\x80", "a type that is a list": "V\x78\x90",
		},
		Draft: {
			"deep lists": deep("V"), "deep maps": deep("M\x90"), "two lengths": "Vn\x02Nz", "long list": "Vl\x7f\xff\xff\xffz", "a type or true": "MTz",
			"string of another dialect": "\x30\x01a", "final map": "HZ", "remote": "rt\x00\x01a\x01b", "pieces of another dialect": "s\x00\x01a\x01b",
		},
	} {
		for name, v := range all {
			r.Reset([]byte(v), dialect)
			var syntax *SyntaxError
			if err := r.Skip(); !errors.As(err, &syntax) {
				t.Errorf("dialect %d: %s: %v", dialect, name, err)
			}
		}
	}
}

func TestString(t *testing.T) {
	var r Reader
	for in, want := range map[string]string{
		"\x00": "", "\x03abc": "abc", "\x30\x03abc": "abc", "S\x00\x03abc": "abc", "R\x00\x01aR\x00\x01b\x01c": "abc", "\x01\xc3\xa9": "é",
	} {
		r.Reset([]byte(in), Final)
		if s, err := r.String(); err != nil || s == nil || string(s) != want {
			t.Errorf("%q: %q, %v", in, s, err)
		}
	}
	r.Reset([]byte("N"), Final)
	if s, err := r.String(); err != nil || s != nil {
		t.Errorf("null: %q, %v", s, err)
	}
	for name, in := range map[string]string{"overlong": "\x01\xc1\xb0", "surrogate": "\x01\xed\xa0\xbd", "a number": "\x91", "endless": strings.Repeat("R\xff\xff"+strings.Repeat("a", 0xffff), 3)} {
		r.Reset([]byte(in), Final)
		if s, err := r.String(); err == nil {
			t.Errorf("%s: %.20q", name, s)
		}
	}
}

func TestMapAndObject(t *testing.T) {
	var r Reader
	r.Reset([]byte("H\x01a\x01b\x01cNZ"), Final)
	if there, err := r.Map(); err != nil || !there {
		t.Fatal(there, err)
	}
	got := ""
	for {
		more, err := r.More()
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			break
		}
		k, err := r.String()
		if err != nil {
			t.Fatal(err)
		}
		v, err := r.String()
		if err != nil {
			t.Fatal(err)
		}
		got += string(k) + "=" + string(v) + ";"
	}
	if got != "a=b;c=;" {
		t.Error(got)
	}
	var names [2][]byte
	for in, dialect := range map[string]Dialect{"C\x03a.B\x92\x01a\x01b\x60NT": Final, "O\x93a.B\x92\x01a\x01bo\x90NT": Draft} {
		r.Reset([]byte(in), dialect)
		if class, n, err := r.Object(names[:]); err != nil || string(class) != "a.B" || n != 2 || string(names[0])+string(names[1]) != "ab" {
			t.Errorf("%q: %q, %d, %q, %v", in, class, n, names, err)
		}
	}
	for _, in := range []string{"\x60", "N", "C\x03a.B\x93\x01a\x01b\x01c\x60", "C\x03a.B\x90N", "C\x03a.B\x90\x61"} {
		r.Reset([]byte(in), Final)
		if class, _, err := r.Object(names[:]); err == nil {
			t.Errorf("%q: %q", in, class)
		}
	}
}

func TestAppend(t *testing.T) {
	var r Reader
	for _, s := range []string{"", "abc", strings.Repeat("x", 0x1f), strings.Repeat("x", 0x20), strings.Repeat("x", 70_000), "é"} {
		want := strings.ReplaceAll(s[:min(len(s), 0xffff)], "é", "??")
		for _, d := range []Dialect{Final, Draft} {
			r.Reset(AppendString(nil, s), d)
			if got, err := r.String(); err != nil || string(got) != want {
				t.Errorf("%.20q: %.20q, %v", s, got, err)
			}
		}
	}
	r.Reset(AppendInt(nil, 47), Draft)
	if n, err := r.Int(); n != 47 || err != nil {
		t.Error(n, err)
	}
}

func TestNoAllocation(t *testing.T) {
	var all []byte
	count := 0
	for name, v := range values[Final] {
		if !strings.HasPrefix(name, "object") {
			all = append(all, v...)
			count++
		}
	}
	var r Reader
	if n := testing.AllocsPerRun(100, func() {
		r.Reset(all, Final)
		for range count {
			if err := r.Skip(); err != nil {
				t.Fatal(err)
			}
		}
	}); n != 0 {
		t.Errorf("%v allocations for %d values", n, count)
	}
}

// No input is read beyond its end, or without end.
func FuzzHessian(f *testing.F) {
	for dialect, all := range values {
		for _, v := range all {
			f.Add([]byte(v), dialect == Draft)
		}
	}
	var r Reader
	f.Fuzz(func(t *testing.T, in []byte, draft bool) {
		dialect := Final
		if draft {
			dialect = Draft
		}
		r.Reset(in, dialect)
		for r.Offset() < len(in) {
			before := r.Offset()
			if r.Skip() != nil {
				break
			}
			if r.Offset() <= before || r.Offset() > len(in) {
				t.Fatalf("from %d to %d of %d", before, r.Offset(), len(in))
			}
		}
		var names [4][]byte
		r.Reset(in, dialect)
		r.Object(names[:])
		r.Reset(in, dialect)
		if s, err := r.String(); err == nil && len(s) > len(in) {
			t.Fatalf("%d bytes of string in %d", len(s), len(in))
		}
	})
}
