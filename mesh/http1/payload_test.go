package http1

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

// unframe takes a body apart, seeing step more bytes at a time.
func unframe(in []byte, f Framing, length int64, step int) (body, rest []byte, err error) {
	var p Payload
	p.Start(f, length)
	at, end := 0, 0
	for !p.Ended() {
		data, n, err := p.Next(in[at:end])
		body = append(body, data...)
		at += n
		if err != nil {
			return body, nil, err
		}
		if len(data) > 0 || p.Ended() {
			continue
		}
		if end == len(in) {
			return body, nil, p.End()
		}
		end = min(end+step, len(in))
	}
	return body, in[at:], nil
}

// A body means the same however it arrives, and what Reader.Forward takes,
// Payload takes too.
func FuzzPayload(f *testing.F) {
	f.Add([]byte("5\r\nhello\r\n0\r\n\r\nNEXT"))
	f.Add([]byte("5;a=b\r\nhello\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\n"))
	f.Add([]byte("5\r\nhelloX"))
	f.Add([]byte("0\r\nHost: x\r\n\r\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		want, rest, werr := unframe(in, Chunked, 0, len(in))
		for _, step := range []int{1, 3} {
			got, r, err := unframe(in, Chunked, 0, step)
			if (err == nil) != (werr == nil) || err == nil && (!bytes.Equal(got, want) || !bytes.Equal(r, rest)) {
				t.Fatalf("in steps of %d: %q, %q, %v; at once %q, %q, %v", step, got, r, err, want, rest, werr)
			}
		}
		r := NewReader(bytes.NewReader(append([]byte("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"), in...)))
		h, err := r.Request()
		if err != nil {
			t.Fatal(err)
		}
		err = r.Forward(io.Discard, h)
		left, _ := io.ReadAll(r.R)
		if (err == nil) != (werr == nil) || err == nil && !bytes.Equal(left, rest) {
			t.Fatalf("Forward: %q, %v; Payload: %q, %v", left, err, rest, werr)
		}
	})
}

func TestPayload(t *testing.T) {
	if got, rest, err := unframe([]byte("hello NEXT"), Length, 6, 2); string(got) != "hello " || string(rest) != "NEXT" || err != nil {
		t.Errorf("%q, %q, %v", got, rest, err)
	}
	if got, _, err := unframe([]byte("hel"), Length, 6, 2); string(got) != "hel" || err != io.ErrUnexpectedEOF {
		t.Errorf("%q, %v", got, err)
	}
	if got, _, err := unframe([]byte("to the end"), UntilClose, 0, 3); string(got) != "to the end" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

// A Message reads a head again and again without allocating.
func TestMessageAllocates(t *testing.T) {
	head := []byte("GET /a/b?c HTTP/1.1\r\nHost: example.com\r\nConnection: keep-alive, x\r\nContent-Length: 12\r\nX: " + strings.Repeat("y", 200) + "\r\n\r\n")
	var m Message
	path := make([]byte, 0, 64)
	if n := testing.AllocsPerRun(100, func() {
		if n, _, err := HeadLength(head, 0); n != len(head) || err != nil {
			t.Fatal(n, err)
		}
		if err := m.Request(head); err != nil {
			t.Fatal(err)
		}
		if _, err := AppendPath(path[:0], m.Method, m.Target, false); err != nil {
			t.Fatal(err)
		}
	}); n > 0 {
		t.Errorf("%v allocations", n)
	}
}
