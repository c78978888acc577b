package http2

import (
	"bytes"
	"io"
	"testing"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// canned is a transport that has received what it will.
type canned struct {
	io.Reader
}

func (c *canned) Write(p []byte) (int, error) { return len(p), nil }
func (c *canned) CloseWrite() error           { return nil }
func (c *canned) Abort()                      {}
func (c *canned) Finish()                     {}

func seeds(f *testing.F) {
	var b blockWriter
	e := hpack.NewEncoder(&b)
	for i := 0; i < len(plainHead); i += 2 {
		e.WriteField(hpack.HeaderField{Name: plainHead[i], Value: plainHead[i+1]})
	}
	e.WriteField(hpack.HeaderField{Name: "content-length", Value: "2"})
	settings := h2frame.Append([]byte{}, h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 10))
	head := h2frame.Append(bytes.Clone(settings), h2frame.Headers, h2frame.FlagEndHeaders, 1, b)
	f.Add(append(bytes.Clone(head), h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, 1, []byte("ab"))...))
	f.Add(append(bytes.Clone(head), h2frame.Append(nil, h2frame.Data, h2frame.FlagPadded, 1, []byte{2, 'a', 0, 0})...))
	f.Add(append(bytes.Clone(head), h2frame.AppendWord(h2frame.AppendWord(nil, h2frame.Window, 1, 9), h2frame.Reset, 1, 8)...))
	f.Add(h2frame.Append(h2frame.Append(bytes.Clone(settings), h2frame.Headers, h2frame.FlagEndStream, 3, b[:3]), h2frame.Continuation, h2frame.FlagEndHeaders, 3, b[3:]))
	f.Add(h2frame.AppendGoAway(h2frame.Append(bytes.Clone(settings), h2frame.Ping, 0, 0, make([]byte, 8)), 0, 0))
}

// FuzzServe gives a server's end whatever a client may send, with a server
// behind it that says as much. Nothing panics, hangs or stays.
func FuzzServe(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) > 1<<16 {
			return
		}
		answers := bytes.ReplaceAll(in, []byte{h2frame.Headers, h2frame.FlagEndHeaders}, []byte{h2frame.Headers, h2frame.FlagEndHeaders | h2frame.FlagEndStream})
		up := Client(&canned{Reader: bytes.NewReader(answers)}, Options{})
		down := Server(&canned{Reader: io.MultiReader(bytes.NewReader([]byte(h2frame.Preface)), bytes.NewReader(in))}, Options{
			Request: func(s *Stream, h *Head) {
				if h.Method == "" || h.Method != "CONNECT" && h.Path == "" {
					t.Errorf("a request without method or path was let through: %+v", h)
				}
				if s.Forward(up, h) != nil {
					s.Reset(h2frame.CodeRefused)
				}
			},
			Failed: func(s *Stream, err error) { s.Answer([]Field{{Name: ":status", Value: "502"}}, []byte("gone")) },
		})
		down.Run()
		up.Run()
		up.Close()
		for _, c := range []*Conn{up, down} {
			if len(c.streams) > 0 || c.ready.first != nil || c.waiting.first != nil || c.blocked.first != nil {
				t.Errorf("streams are left over")
			}
		}
	})
}

// FuzzHead checks that what passes can be said in HTTP/1 without meaning
// something else.
func FuzzHead(f *testing.F) {
	f.Add(":method", "GET", ":path", "/", "a", "b", true)
	f.Add(":status", "200", "content-length", "0", "te", "trailers", false)
	f.Fuzz(func(t *testing.T, n1, v1, n2, v2, n3, v3 string, request bool) {
		fields := []Field{{Name: n1, Value: v1}, {Name: n2, Value: v2}, {Name: ":scheme", Value: "http"}, {Name: n3, Value: v3}}
		if !request {
			fields = append(fields[:2:2], fields[3])
		}
		h := &Head{}
		err := h.response(fields)
		if request {
			err = h.request(fields)
		}
		if err != nil {
			return
		}
		for _, f := range fields {
			if bytes.ContainsAny([]byte(f.Name+f.Value), "\r\n\x00") || f.Name == "" || bytes.ContainsAny([]byte(f.Name), " ABCDEFGHIJKLMNOPQRSTUVWXYZ") {
				t.Errorf("passed %q: %q", f.Name, f.Value)
			}
		}
		if request && bytes.ContainsAny([]byte(h.Method+h.Path), " \t") {
			t.Errorf("passed %q %q", h.Method, h.Path)
		}
	})
}

// TestDataAllocatesNothing guards the path of data from one connection to the
// other.
func TestDataAllocatesNothing(t *testing.T) {
	down, up := Server(&canned{}, Options{}), Client(&canned{}, Options{})
	for _, c := range []*Conn{down, up} {
		c.started = true
		c.window, c.initial = h2frame.MaxWindow, h2frame.MaxWindow
	}
	s := &Stream{c: down, id: 1, declared: -1, credit: streamWindow, window: h2frame.MaxWindow}
	down.streams[1] = s
	h := &Head{Fields: []Field{{Name: ":method", Value: "POST"}, {Name: ":path", Value: "/"}}}
	if err := s.Forward(up, h); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 1000)
	f := h2frame.Header{Length: len(data), Kind: h2frame.Data, Stream: 1}
	one := func() {
		if got, err := down.takeData(f, len(data), false); got != s || err != nil {
			t.Fatal(err)
		}
		if err := s.receive(data, false); err != nil {
			t.Fatal(err)
		}
		for _, c := range []*Conn{down, up} { // as the writer does
			c.mu.Lock()
			c.fillLocked()
			c.window, c.answers = h2frame.MaxWindow, 0
			s.mate.Load().window = h2frame.MaxWindow
			c.out = c.out[:0]
			c.unlock()
		}
	}
	if n := testing.AllocsPerRun(1000, one); n > 0 {
		t.Errorf("%v allocations for a DATA frame", n)
	}
	// The same through the queue, as if there were no room for frames.
	window := func(n int64) { up.mu.Lock(); s.mate.Load().window = n; up.mu.Unlock() }
	slow := func() {
		window(0)
		if _, err := down.takeData(f, len(data), false); err != nil {
			t.Fatal(err)
		}
		if err := s.receive(data, false); err != nil {
			t.Fatal(err)
		}
		window(h2frame.MaxWindow)
		up.mu.Lock()
		up.unblockLocked(s.mate.Load())
		up.fillLocked()
		up.out = up.out[:0]
		up.window = h2frame.MaxWindow
		up.unlock()
		down.mu.Lock()
		down.out, down.answers = down.out[:0], 0
		down.mu.Unlock()
	}
	if n := testing.AllocsPerRun(1000, slow); n > 0 {
		t.Errorf("%v allocations for a DATA frame that waits", n)
	}
	if s.mate.Load().held != 0 || down.held != 0 {
		t.Errorf("%d and %d bytes are left", s.mate.Load().held, down.held)
	}
}
