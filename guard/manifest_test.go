package guard

import (
	"errors"
	"testing"
)

// oneProgram is a bundle with a map that has an inner one, and a program of
// one instruction.
func oneProgram() []byte {
	b := []byte("HBGUARD\x02\x02\x00id\x03\x00\x00\x00abc\x01\x00\x01\x00m")
	b = append(b, make([]byte, 28)...)
	b = append(b, 1, 0)
	b = append(b, make([]byte, 20)...)
	b = append(b, "\x01\x00\x01\x00p\x03\x00GPL"...)
	b = append(b, make([]byte, 16)...)
	b = append(b, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
	b = append(b, "\x95\x00\x00\x00\x00\x00\x00\x00"...)
	return append(b, make([]byte, 2*8)...)
}

func TestReadManifest(t *testing.T) {
	whole := oneProgram()
	m, err := ReadManifest(whole)
	if err != nil || m.BuildID != "id" || len(m.Programs) != 1 || m.Programs[0] != (Program{"p", "2046176fc1f44c75"}) {
		t.Errorf("%+v, %v", m, err)
	}
	for n := range whole {
		if _, err := ReadManifest(whole[:n]); !errors.Is(err, errBundle) {
			t.Fatalf("%d of %d bytes: %v", n, len(whole), err)
		}
	}
	if _, err := ReadManifest(append(whole, 0)); !errors.Is(err, errBundle) {
		t.Errorf("with a byte more: %v", err)
	}
}

func FuzzReadManifest(f *testing.F) {
	f.Add(oneProgram())
	f.Fuzz(func(t *testing.T, b []byte) {
		if m, err := ReadManifest(b); err == nil && len(m.Programs)*8 > len(b) {
			t.Errorf("%d programs of %d bytes", len(m.Programs), len(b))
		}
	})
}
