package admin

import (
	"bytes"
	"io"
	"testing"
)

func TestFramesComeBack(t *testing.T) {
	var b bytes.Buffer
	want := []struct {
		kind    byte
		payload string
	}{{FrameStdin, "hello"}, {FrameStdin, ""}, {FrameExit, "\x00\x00\x00\x07"}}
	for _, f := range want {
		if err := WriteFrame(&b, f.kind, []byte(f.payload)); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range want {
		kind, payload, err := ReadFrame(&b)
		if err != nil || kind != f.kind || string(payload) != f.payload {
			t.Errorf("got %d %q %v, want %d %q", kind, payload, err, f.kind, f.payload)
		}
	}
	if _, _, err := ReadFrame(&b); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

func TestFramesAreBounded(t *testing.T) {
	if err := WriteFrame(io.Discard, FrameStdin, make([]byte, MaxFrame+1)); err == nil {
		t.Error("an oversized frame was written")
	}
	for name, raw := range map[string]string{
		"oversized": "\x00\xff\xff\xff\xff", "unknown kind": "\x09\x00\x00\x00\x00",
		"cut head": "\x00\x00", "cut payload": "\x00\x00\x00\x00\x05ab",
	} {
		if _, _, err := ReadFrame(bytes.NewReader([]byte(raw))); err == nil || err == io.EOF {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x00\x05hello"))
	f.Add([]byte("\x05\x00\x01\x00\x00"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		kind, payload, err := ReadFrame(bytes.NewReader(raw))
		if err != nil {
			return
		}
		var b bytes.Buffer
		if err := WriteFrame(&b, kind, payload); err != nil || !bytes.HasPrefix(raw, b.Bytes()) {
			t.Errorf("%q read as %d %q", raw, kind, payload)
		}
	})
}
