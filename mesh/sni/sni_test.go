package sni

import (
	"bytes"
	"crypto/tls"
	"net"
	"testing"
)

// hello is what crypto/tls sends first.
func hello(t testing.TB, name string) []byte {
	t.Helper()
	a, b := net.Pipe()
	defer b.Close()
	go tls.Client(a, &tls.Config{ServerName: name, InsecureSkipVerify: name == ""}).Handshake()
	buf := make([]byte, MaxHello)
	n, err := b.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	a.Close()
	return buf[:n]
}

func TestName(t *testing.T) {
	for _, want := range []string{"a.example", "", "very.long.name.of.some.host.example.com"} {
		b := hello(t, want)
		for cut := range b {
			if name, whole, err := Name(b[:cut], nil); whole || err != nil {
				t.Fatalf("%d of %d bytes: %q, %v", cut, len(b), name, err)
			}
		}
		name, whole, err := Name(append(b, "early"...), nil)
		if string(name) != want || !whole || err != nil {
			t.Errorf("%q, %v, %v; want %q", name, whole, err, want)
		}
		// The same in many records.
		var split []byte
		for body := b[5:]; len(body) > 0; {
			n := min(len(body), 40)
			split = append(append(split, 22, 3, 1, 0, byte(n)), body[:n]...)
			body = body[n:]
		}
		if name, whole, err := Name(split, nil); string(name) != want || !whole || err != nil {
			t.Errorf("in records: %q, %v, %v; want %q", name, whole, err, want)
		}
	}
	for _, in := range []string{"GET / HTTP/1.1", "\x16\x02", "\x16\x03\x01\x00\x00", "\x16\x03\x01\xff\xff", "\x16\x03\x01\x00\x01\x02", "\x15\x03\x01\x00\x02\x02\x28"} {
		if _, _, err := Name([]byte(in), nil); err == nil {
			t.Errorf("%q accepted", in)
		}
	}
}

func FuzzName(f *testing.F) {
	f.Add(hello(f, "a.example"))
	f.Add([]byte("\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		name, whole, err := Name(b, nil)
		if !whole || err != nil {
			return
		}
		// More bytes change nothing.
		again, whole, err := Name(append(bytes.Clone(b), 0), nil)
		if !whole || err != nil || !bytes.Equal(name, again) {
			t.Fatalf("%q then %q, %v", name, again, err)
		}
	})
}
