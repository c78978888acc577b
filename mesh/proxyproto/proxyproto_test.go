package proxyproto

import (
	"net/netip"
	"testing"
)

func TestBackAndForth(t *testing.T) {
	for _, pair := range [][2]string{{"192.0.2.1:1", "198.51.100.2:65535"}, {"[2001:db8::1]:80", "[::1]:443"}} {
		want := Header{netip.MustParseAddrPort(pair[0]), netip.MustParseAddrPort(pair[1])}
		for _, b := range [][]byte{Append1(nil, want), Append2(nil, want)} {
			for cut := range b {
				if _, n, err := Parse(b[:cut]); n != 0 || err != nil {
					t.Fatalf("%d bytes of %q: %d, %v", cut, b, n, err)
				}
			}
			got, n, err := Parse(append(b, "GET"...))
			if got != want || n != len(b) || err != nil {
				t.Errorf("%+v, %d, %v; want %+v", got, n, err, want)
			}
		}
	}
	for _, b := range [][]byte{Append1(nil, Header{}), Append2(nil, Header{}), []byte("PROXY UNKNOWN ffff:: ::1 1 2\r\n")} {
		if got, n, err := Parse(b); got != (Header{}) || n != len(b) || err != nil {
			t.Errorf("%q: %+v, %d, %v", b, got, n, err)
		}
	}
	if got := string(Append1(nil, Header{netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:2")})); got != "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" {
		t.Errorf("%q", got)
	}
}

// An address of IPv4 is one, however it is written.
func TestMapped(t *testing.T) {
	h, _, err := Parse([]byte("PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 1 2\r\n"))
	if err != nil || h.Source != netip.MustParseAddrPort("192.0.2.1:1") || h.Destination != netip.MustParseAddrPort("192.0.2.2:2") {
		t.Errorf("%+v, %v", h, err)
	}
}

func TestRefused(t *testing.T) {
	sig := string(signature)
	for _, in := range []string{"GET / HTTP/1.1\r\n", "PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n", "PROXY TCP4 ::1 ::1 1 2\r\n", "PROXY TCP4 1.2.3.4 1.2.3.4 01 2\r\n",
		"PROXY TCP4 1.2.3.4 1.2.3.4 1 70000\r\n", "PROXY TCP6 fe80::1%eth0 ::1 1 2\r\n", "PROXY TCP4 1.2.3.4 1.2.3.4 1 2\n",
		"PROXY UDP4 1.2.3.4 1.2.3.4 1 2\r\n", "PROXY " + string(make([]byte, 200)), sig + "\x11\x11\x00\x0c", sig + "\x22\x11\x00\x0c",
		sig + "\x21\x11\x00\x04abcd", sig + "\x21\x11\xff\xff"} {
		if h, n, err := Parse([]byte(in + string(make([]byte, 16)))); err == nil {
			t.Errorf("%q: %+v, %d", in, h, n)
		}
	}
}

func FuzzParse(f *testing.F) {
	h := Header{netip.MustParseAddrPort("192.0.2.1:1"), netip.MustParseAddrPort("192.0.2.2:2")}
	f.Add(Append1(nil, h))
	f.Add(Append2(nil, h))
	f.Add([]byte("PROXY UNKNOWN\r\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, n, err := Parse(b)
		if n > len(b) || n > 0 && err != nil {
			t.Fatal(n, err)
		}
		if err != nil || n == 0 || !h.Source.IsValid() {
			return
		}
		if again, _, err := Parse(Append2(nil, h)); err != nil || again.Source != h.Source {
			t.Fatalf("%+v became %+v, %v", h, again, err)
		}
	})
}
