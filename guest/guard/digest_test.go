package guard

import (
	"bytes"
	"crypto/sha256"
	"testing"
)

func FuzzDigest(f *testing.F) {
	for _, n := range []int{0, 1, 55, 56, 63, 64, 65, 119, 120, 1000} {
		f.Add(bytes.Repeat([]byte{0xa5}, n), uint16(7))
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		d := newDigester()
		at := int(cut) % (len(b) + 1)
		d.write(b[:at])
		d.write(b[at:])
		if got, want := d.sum(), sha256.Sum256(b); got != want {
			t.Errorf("digest of %x is %x, want %x", b, got, want)
		}
	})
}

func TestNamesOfRecord(t *testing.T) {
	for _, tt := range []struct{ text, want string }{
		{"passwd\x00etc\x00\x00", "etc/passwd"}, {"x\x00\x00", "x"}, {"", ""},
		{"a\x00b\x00c\x00d\x00e\x00f\x00g\x00h\x00i\x00j\x00k\x00l\x00\x00", ""},
	} {
		var text [256]byte
		copy(text[:], tt.text)
		if got := pathOf(text[:]); got != tt.want {
			t.Errorf("%q is %q, want %q", tt.text, got, tt.want)
		}
	}
}
