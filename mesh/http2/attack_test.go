package http2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// rough is a client that sends whatever it is told.
type rough struct {
	t     testing.TB
	c     net.Conn
	block bytes.Buffer
	hpack *hpack.Encoder
	dec   *hpack.Decoder
	// statuses of responses, by stream
	status map[uint32]string
}

func newRough(t testing.TB, address string) *rough {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(time.Minute))
	r := &rough{t: t, c: c, dec: hpack.NewDecoder(h2frame.TableSize, nil), status: map[uint32]string{}}
	r.hpack = hpack.NewEncoder(&r.block)
	r.raw([]byte(h2frame.Preface))
	r.raw(h2frame.Append(nil, h2frame.Settings, 0, 0, nil))
	return r
}

// raw sends bytes. The other end may have given up already.
func (r *rough) raw(b []byte) error {
	_, err := r.c.Write(b)
	return err
}

var plainHead = []string{":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a"}

func with(fields []string, more ...string) []string {
	return append(append([]string{}, fields...), more...)
}

// encode makes a header block of names and values.
func (r *rough) encode(fields ...string) []byte {
	r.block.Reset()
	for i := 0; i < len(fields); i += 2 {
		r.hpack.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]})
	}
	return bytes.Clone(r.block.Bytes())
}

func (r *rough) headers(stream uint32, end bool, fields ...string) error {
	flags := byte(h2frame.FlagEndHeaders)
	if end {
		flags |= h2frame.FlagEndStream
	}
	return r.raw(h2frame.Append(nil, h2frame.Headers, flags, stream, r.encode(fields...)))
}

// next reads a frame.
func (r *rough) next() (f h2frame.Header, p []byte, err error) {
	var b [h2frame.HeaderLen]byte
	if _, err := io.ReadFull(r.c, b[:]); err != nil {
		return f, nil, err
	}
	f = h2frame.Parse(b[:])
	p = make([]byte, f.Length)
	if _, err = io.ReadFull(r.c, p); err != nil {
		return f, p, err
	}
	if f.Kind == h2frame.Headers {
		fields, err := r.dec.DecodeFull(p)
		if err != nil {
			r.t.Errorf("the proxy sent a block that cannot be read: %v", err)
		}
		for _, f2 := range fields {
			if f2.Name == ":status" {
				r.status[f.Stream] = f2.Value
			}
		}
	}
	return f, p, nil
}

// ended reads to GOAWAY and returns its code, or CodeNone if there is none.
func (r *rough) ended() Code {
	r.t.Helper()
	for {
		f, p, err := r.next()
		if err != nil {
			if ne, ok := err.(net.Error); ok && ne.Timeout() {
				r.t.Fatal("the connection goes on")
			}
			return h2frame.CodeNone
		}
		if f.Kind == h2frame.GoAway {
			return Code(binary.BigEndian.Uint32(p[4:]))
		}
	}
}

// reset reads to the RST_STREAM of a stream, or the end of its response.
func (r *rough) reset(stream uint32) (code Code, status string) {
	r.t.Helper()
	for {
		f, p, err := r.next()
		switch {
		case err != nil:
			r.t.Fatalf("waiting for the end of stream %d: %v", stream, err)
		case f.Kind == h2frame.Reset && f.Stream == stream:
			return Code(binary.BigEndian.Uint32(p)), r.status[stream]
		case f.Kind == h2frame.GoAway:
			r.t.Fatalf("GOAWAY with code %d", binary.BigEndian.Uint32(p[4:]))
		case f.Stream == stream && (f.Kind == h2frame.Headers || f.Kind == h2frame.Data) && f.Has(h2frame.FlagEndStream):
			return h2frame.CodeNone, r.status[stream]
		}
	}
}

func quietServer(t testing.TB) string {
	return serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		io.WriteString(w, "fine")
	})
}

// TestMalformedStreams ends the stream that is malformed, and no other; the
// server sees none of it.
func TestMalformedStreams(t *testing.T) {
	saw := make(chan string, 100)
	r := newRelay(t, serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		saw <- r.URL.Path
		io.Copy(io.Discard, r.Body)
	}))
	c := newRough(t, r.address())
	id := uint32(1)
	for name, fields := range map[string][]string{
		"upper case":            with(plainHead, "X-A", "b"),
		"empty name":            with(plainHead, "", "b"),
		"colon in name":         with(plainHead, "a:b", "b"),
		"space in name":         with(plainHead, "a b", "b"),
		"line feed in value":    with(plainHead, "a", "b\r\nc: d"),
		"nul in value":          with(plainHead, "a", "b\x00"),
		"space around value":    with(plainHead, "a", " b"),
		"late pseudo":           {":method", "GET", ":scheme", "http", "a", "b", ":path", "/"},
		"pseudo twice":          with(plainHead, ":path", "/b"),
		"unknown pseudo":        with(plainHead, ":x", "y"),
		"status":                with(plainHead, ":status", "200"),
		"extended CONNECT":      {":method", "CONNECT", ":protocol", "websocket", ":scheme", "http", ":path", "/", ":authority", "a"},
		"CONNECT with path":     {":method", "CONNECT", ":path", "/", ":authority", "a"},
		"no path":               {":method", "GET", ":scheme", "http", ":authority", "a"},
		"path without slash":    {":method", "GET", ":scheme", "http", ":path", "a", ":authority", "a"},
		"absolute path":         {":method", "GET", ":scheme", "http", ":path", "http://b/", ":authority", "a"},
		"path with fragment":    {":method", "GET", ":scheme", "http", ":path", "/#a", ":authority", "a"},
		"path with space":       {":method", "GET", ":scheme", "http", ":path", "/a HTTP/1.1", ":authority", "a"},
		"asterisk":              {":method", "GET", ":scheme", "http", ":path", "*", ":authority", "a"},
		"method with space":     {":method", "GET / HTTP/1.1", ":scheme", "http", ":path", "/", ":authority", "a"},
		"scheme":                {":method", "GET", ":scheme", "ftp", ":path", "/", ":authority", "a"},
		"user in authority":     {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "u@a"},
		"two ports":             {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a:80:80"},
		"port that is none":     {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a:x"},
		"name in brackets":      {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "[shop.test]"},
		"host in brackets":      {":method", "GET", ":scheme", "http", ":path", "/", "host", "[127.0.0.1]:80"},
		"nothing in brackets":   {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "[]:80"},
		"zone in brackets":      {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "[fe80::1%eth0]"},
		"bracket in a port":     {":method", "GET", ":scheme", "http", ":path", "/", ":authority", "a:]"},
		"host with two ports":   {":method", "GET", ":scheme", "http", ":path", "/", "host", "a:80:80"},
		"two hosts":             with(plainHead, "host", "b"),
		"host twice":            {":method", "GET", ":scheme", "http", ":path", "/", "host", "a", "host", "a"},
		"connection":            with(plainHead, "connection", "close"),
		"transfer-encoding":     with(plainHead, "transfer-encoding", "chunked"),
		"upgrade":               with(plainHead, "upgrade", "h2c"),
		"te":                    with(plainHead, "te", "gzip"),
		"content-length twice":  with(plainHead, "content-length", "0", "content-length", "0"),
		"content-length signed": with(plainHead, "content-length", "+1"),
		"content-length list":   with(plainHead, "content-length", "1, 1"),
		"content-length unmet":  with(plainHead, "content-length", "5"),
	} {
		c.headers(id, true, fields...)
		if code, status := c.reset(id); code != h2frame.CodeProtocol || status != "" {
			t.Errorf("%s: code %d, status %q", name, code, status)
		}
		id += 2
	}
	if len(saw) > 0 {
		t.Errorf("the server has seen %s", <-saw)
	}
	for name, send := range map[string]func(){
		"more data than announced": func() {
			c.headers(id, false, with(plainHead, "content-length", "1")...)
			c.raw(h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, id, []byte("ab")))
		},
		"less data than announced": func() {
			c.headers(id, false, with(plainHead, "content-length", "3")...)
			c.raw(h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, id, []byte("ab")))
		},
		"less data before trailers": func() {
			c.headers(id, false, with(plainHead, "content-length", "3")...)
			c.headers(id, true, "a", "b")
		},
		"length in a trailer": func() {
			c.headers(id, false, plainHead...)
			c.headers(id, true, "content-length", "0")
		},
		"identity in a trailer": func() {
			c.headers(id, false, plainHead...)
			c.headers(id, true, "authorization", "Basic eA==")
		},
		"pseudo in a trailer": func() {
			c.headers(id, false, plainHead...)
			c.headers(id, true, ":path", "/admin")
		},
	} {
		send()
		if code, status := c.reset(id); code != h2frame.CodeProtocol || status != "" {
			t.Errorf("%s: code %d, status %q", name, code, status)
		}
		id += 2
	}
	for len(saw) > 0 {
		<-saw // their heads had gone on before the fault was there
	}
	// The connection goes on.
	c.headers(id, true, with(plainHead, "te", "trailers")...)
	if code, status := c.reset(id); code != h2frame.CodeNone || status != "200" || <-saw != "/" {
		t.Errorf("a good request after all that: code %d, status %q", code, status)
	}
}

// TestHeadTooLarge answers 431 and stays in step with the client's table.
func TestHeadTooLarge(t *testing.T) {
	r := newRelay(t, quietServer(t))
	for name, more := range map[string]func(i int) (string, string){
		"size":  func(i int) (string, string) { return "a", strings.Repeat("x", 400) },
		"count": func(i int) (string, string) { return "a", "" },
	} {
		c := newRough(t, r.address())
		fields := plainHead
		for i := range 140 {
			n, v := more(i)
			fields = with(fields, n, v)
		}
		block := c.encode(fields...)
		flags := byte(h2frame.FlagEndStream)
		kind := byte(h2frame.Headers)
		for len(block) > maxFrame {
			c.raw(h2frame.Append(nil, kind, flags, 1, block[:maxFrame]))
			block, kind, flags = block[maxFrame:], h2frame.Continuation, 0
		}
		c.raw(h2frame.Append(nil, kind, flags|h2frame.FlagEndHeaders, 1, block))
		if _, status := c.reset(1); status != "431" {
			t.Errorf("%s: status %q", name, status)
		}
		c.headers(3, true, plainHead...)
		if code, status := c.reset(3); code != h2frame.CodeNone || status != "200" {
			t.Errorf("after %s: code %d, status %q", name, code, status)
		}
	}
}

// TestAttacks: each ends its own connection with a word, and no other.
func TestAttacks(t *testing.T) {
	r := newRelay(t, quietServer(t))
	other := newRough(t, r.address())
	other.headers(1, false, plainHead...)
	flood := func(c *rough, n int, frame func(i int) []byte) {
		go func() {
			for i := range n {
				if c.raw(frame(i)) != nil {
					return
				}
			}
		}()
	}
	for name, a := range map[string]struct {
		code Code
		run  func(*rough)
	}{
		"rapid reset": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 5000, func(i int) []byte {
				id := uint32(2*i + 1)
				return h2frame.AppendWord(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders, id, c.encode(plainHead...)), h2frame.Reset, id, uint32(h2frame.CodeCancel))
			})
		}},
		"resets made here": {h2frame.CodeCalm, func(c *rough) { // MadeYouReset
			flood(c, 5000, func(i int) []byte {
				id := uint32(2*i + 1)
				return h2frame.AppendWord(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders, id, c.encode(plainHead...)), h2frame.Window, id, 0)
			})
		}},
		"rapid reset of whole requests": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 5000, func(i int) []byte {
				id := uint32(2*i + 1)
				return h2frame.AppendWord(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders|h2frame.FlagEndStream, id, c.encode(plainHead...)), h2frame.Reset, id, uint32(h2frame.CodeCancel))
			})
		}},
		"resets of whole requests made here": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 1, func(int) []byte { // at once, and fewer than the WINDOW_UPDATE frames that are taken
				var b []byte
				for id := uint32(1); id < 2*1900; id += 2 {
					b = h2frame.Append(b, h2frame.Headers, h2frame.FlagEndHeaders|h2frame.FlagEndStream, id, c.encode(plainHead...))
					b = h2frame.AppendWord(b, h2frame.Window, id, 0)
				}
				return b
			})
		}},
		"continuation flood": {h2frame.CodeCalm, func(c *rough) {
			c.raw(h2frame.Append(nil, h2frame.Headers, 0, 1, c.encode(plainHead...)))
			flood(c, 1000, func(i int) []byte { return h2frame.Append(nil, h2frame.Continuation, 0, 1, nil) })
		}},
		"block without end": {h2frame.CodeCalm, func(c *rough) {
			c.raw(h2frame.Append(nil, h2frame.Headers, 0, 1, c.encode(plainHead...)))
			flood(c, 1000, func(i int) []byte {
				return h2frame.Append(nil, h2frame.Continuation, 0, 1, bytes.Repeat([]byte{0x82}, maxFrame))
			})
		}},
		"hpack string": {h2frame.CodeCompression, func(c *rough) {
			c.raw(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders, 1, []byte{0x00, 0x01, 'a', 0x7f, 0xff, 0xff, 0xff, 0x7f}))
		}},
		"hpack table": {h2frame.CodeCompression, func(c *rough) {
			c.raw(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders, 1, []byte{0x3f, 0xff, 0xff, 0xff, 0x7f}))
		}},
		"settings flood": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 5000, func(i int) []byte { return h2frame.Append(nil, h2frame.Settings, 0, 0, nil) })
		}},
		"settings in one frame": {h2frame.CodeCalm, func(c *rough) {
			c.raw(h2frame.Append(nil, h2frame.Settings, 0, 0, bytes.Repeat(h2frame.AppendSetting(nil, h2frame.SettingWindow, 1), h2frame.MaxSettings+1)))
		}},
		"ping flood": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 5000, func(i int) []byte { return h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8)) })
		}},
		"priority flood": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 5000, func(i int) []byte { return h2frame.Append(nil, h2frame.Priority, 0, 1, make([]byte, 5)) })
		}},
		"unknown flood": {h2frame.CodeCalm, func(c *rough) {
			flood(c, 5000, func(i int) []byte { return h2frame.Append(nil, 0x77, 0, 0, nil) })
		}},
		"empty data flood": {h2frame.CodeCalm, func(c *rough) {
			c.headers(1, false, plainHead...)
			flood(c, 1000, func(i int) []byte { return h2frame.Append(nil, h2frame.Data, 0, 1, nil) })
		}},
		"window flood": {h2frame.CodeCalm, func(c *rough) {
			c.headers(1, false, plainHead...)
			flood(c, 20000, func(i int) []byte { return h2frame.AppendWord(nil, h2frame.Window, 1, 1) })
		}},
		"interleaved block": {h2frame.CodeProtocol, func(c *rough) {
			c.raw(h2frame.Append(nil, h2frame.Headers, 0, 1, c.encode(plainHead...)))
			c.raw(h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8)))
		}},
		"long frame":  {h2frame.CodeFrameSize, func(c *rough) { c.raw(h2frame.AppendHeader(nil, maxFrame+1, h2frame.Data, 0, 1)) }},
		"even stream": {h2frame.CodeProtocol, func(c *rough) { c.headers(2, true, plainHead...) }},
		"push":        {h2frame.CodeProtocol, func(c *rough) { c.raw(h2frame.Append(nil, h2frame.Push, h2frame.FlagEndHeaders, 1, make([]byte, 4))) }},
	} {
		t.Run(name, func(t *testing.T) {
			c := newRough(t, r.address())
			a.run(c)
			if code := c.ended(); code != a.code {
				t.Errorf("ended with code %d, want %d", code, a.code)
			}
		})
	}
	other.raw(h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, 1, []byte("x")))
	if code, status := other.reset(1); code != h2frame.CodeNone || status != "200" {
		t.Errorf("the connection beside: code %d, status %q", code, status)
	}
}

// TestMoreThanTheWindow ends the stream of a client that does not wait.
func TestMoreThanTheWindow(t *testing.T) {
	r := newRelay(t, serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }))
	c := newRough(t, r.address())
	c.headers(1, false, plainHead...)
	for range 2 << 20 / maxFrame { // the server takes half of it
		c.raw(h2frame.Append(nil, h2frame.Data, 0, 1, make([]byte, maxFrame)))
	}
	if code, _ := c.reset(1); code != h2frame.CodeFlowControl {
		t.Errorf("code %d", code)
	}
}

// TestBomb: a block that stands for many times its size is not unfolded.
func TestBomb(t *testing.T) {
	r := newRelay(t, quietServer(t))
	c := newRough(t, r.address())
	block := append(c.encode(with(plainHead, "bomb", strings.Repeat("x", 3900))...), bytes.Repeat([]byte{0xbe}, 10_000)...)
	c.raw(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndStream|h2frame.FlagEndHeaders, 1, block))
	if _, status := c.reset(1); status != "431" {
		t.Errorf("status %q", status)
	}
	c.headers(3, true, plainHead...)
	if code, status := c.reset(3); code != h2frame.CodeNone || status != "200" {
		t.Errorf("after it: code %d, status %q", code, status)
	}
}

// TestSlowFrames gives up a client that takes too long for a frame or a header
// block, and none that says nothing.
func TestSlowFrames(t *testing.T) {
	for name, half := range map[string][]byte{
		"frame":  {0, 0, 10, h2frame.Data},
		"block":  append(h2frame.Append(nil, h2frame.Headers, 0, 1, []byte{0x82}), h2frame.Append(nil, h2frame.Continuation, 0, 1, []byte{0x86})...),
		"silent": nil,
	} {
		t.Run(name, func(t *testing.T) {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			ended := make(chan error, 1)
			go func() {
				c, err := ln.Accept()
				if err != nil {
					ended <- err
					return
				}
				h := Server(tcp{c.(*net.TCPConn)}, Options{})
				h.pulse = 20 * time.Millisecond
				ended <- h.Run()
			}()
			c := newRough(t, ln.Addr().String())
			c.raw(half)
			if half == nil {
				time.Sleep(200 * time.Millisecond) // ten times what is too long for a frame
				c.raw(h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8)))
				for {
					f, _, err := c.next()
					if err != nil {
						t.Fatal(err)
					}
					if f.Kind == h2frame.Ping {
						break
					}
				}
				c.c.Close()
				if err := <-ended; err != nil {
					t.Error(err)
				}
				return
			}
			if err := <-ended; err != errSlow {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

// TestHostileServer: what a server may not say does not reach the client, which
// is told of the failure, and other requests are not held up.
func TestHostileServer(t *testing.T) {
	ok := []byte{0x88} // :status 200
	head := func(stream uint32, end bool, block ...byte) []byte {
		flags := byte(h2frame.FlagEndHeaders)
		if end {
			flags |= h2frame.FlagEndStream
		}
		return h2frame.Append(nil, h2frame.Headers, flags, stream, block)
	}
	field := func(name, value string) []byte {
		return append(append(append([]byte{0, byte(len(name))}, name...), byte(len(value))), value...)
	}
	join := func(all ...[]byte) []byte { return bytes.Join(all, nil) }
	for name, c := range map[string]struct {
		says func(id uint32) []byte
		// broken: a response begins and does not end well; else 502.
		broken bool
	}{
		"no status":        {func(id uint32) []byte { return head(id, true, field("a", "b")...) }, false},
		"request's fields": {func(id uint32) []byte { return head(id, true, append(ok, 0x82)...) }, false},
		"upper case":       {func(id uint32) []byte { return head(id, true, join(ok, field("A", "b"))...) }, false},
		"line feed":        {func(id uint32) []byte { return head(id, true, join(ok, field("a", "b\nc"))...) }, false},
		"connection":       {func(id uint32) []byte { return head(id, true, join(ok, field("connection", "close"))...) }, false},
		"switching":        {func(id uint32) []byte { return head(id, false, field(":status", "101")...) }, false},
		"data first": {func(id uint32) []byte {
			return h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, id, []byte("x"))
		}, false},
		"not HTTP/2": {func(id uint32) []byte { return []byte("HTTP/1.1 400 Bad Request\r\n\r\n") }, false},
		"push": {func(id uint32) []byte {
			return h2frame.Append(nil, h2frame.Push, h2frame.FlagEndHeaders, id, make([]byte, 4))
		}, false},
		"bad block": {func(id uint32) []byte { return head(id, true, 0xff, 0xff, 0xff) }, false},
		"length unmet": {func(id uint32) []byte {
			return join(head(id, false, join(ok, field("content-length", "3"))...), h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, id, []byte("x")))
		}, true},
		"length over": {func(id uint32) []byte {
			return join(head(id, false, join(ok, field("content-length", "1"))...), h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, id, []byte("xy")))
		}, true},
		"body of 204": {func(id uint32) []byte {
			return join(head(id, false, 0x89), h2frame.Append(nil, h2frame.Data, h2frame.FlagEndStream, id, []byte("xy")))
		}, true},
		"pseudo in trailer": {func(id uint32) []byte { return join(head(id, false, ok...), head(id, true, ok...)) }, true},
		"never-ending 1xx": {func(id uint32) []byte {
			return bytes.Repeat(head(id, false, field(":status", "103")...), 100_000)
		}, false},
		"settings flood": {func(id uint32) []byte {
			return join(head(id, false, ok...), bytes.Repeat(h2frame.Append(nil, h2frame.Settings, 0, 0, nil), 5000))
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRelay(t, rudeServer(t, c.says))
			client := httpClient(t)
			resp, err := client.Get("http://" + r.address() + "/")
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			switch {
			case !c.broken && (err != nil || resp.StatusCode != 502):
				t.Errorf("%+v, %v; want 502", resp, err)
			case c.broken && err == nil && resp.StatusCode != 204:
				t.Errorf("%+v ended well", resp)
			}
		})
	}
}

// rudeServer answers the first HEADERS of each connection by what it is told.
func rudeServer(t *testing.T, says func(id uint32) []byte) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.ReadFull(c, make([]byte, len(h2frame.Preface)))
				r := &rough{t: t, c: c, dec: hpack.NewDecoder(h2frame.TableSize, nil), status: map[uint32]string{}}
				for {
					f, _, err := r.next()
					if err != nil {
						return
					}
					if f.Kind == h2frame.Headers {
						b := says(f.Stream)
						if !bytes.HasPrefix(b, []byte("HTTP")) {
							c.Write(h2frame.Append(nil, h2frame.Settings, 0, 0, nil))
						}
						c.Write(b)
						io.Copy(io.Discard, c)
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

// TestPingsForData: gRPC's peers send a PING for each round trip while data
// comes. That is no flood.
func TestPingsForData(t *testing.T) {
	const frames = 4000
	r := newRelay(t, serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		for range frames {
			w.Write([]byte("x"))
			w.(http.Flusher).Flush()
		}
	}))
	c := newRough(t, r.address())
	c.headers(1, true, plainHead...)
	for data := 0; data < frames; {
		f, _, err := c.next()
		if err != nil || f.Kind == h2frame.GoAway {
			t.Fatalf("after %d frames: %+v, %v", data, f, err)
		}
		if f.Kind == h2frame.Data {
			data += f.Length
			c.raw(h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8)))
		}
	}
}

// TestFirstBytes tells early what is not HTTP/2.
func TestFirstBytes(t *testing.T) {
	r := newRelay(t, quietServer(t))
	for name, send := range map[string]string{
		"http/1":      "PUT / HTTP/1.1\r\n",
		"no settings": h2frame.Preface + string(h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8))),
	} {
		c := newRough(t, r.address())
		c.c.Close()
		c.c, _ = net.Dial("tcp", r.address())
		c.c.SetDeadline(time.Now().Add(time.Minute))
		io.WriteString(c.c, send)
		if code := c.ended(); code != h2frame.CodeProtocol {
			t.Errorf("%s: code %d", name, code)
		}
		c.c.Close()
	}
}

// TestUnreadAnswers bounds what a peer that reads nothing makes this side hold.
func TestUnreadAnswers(t *testing.T) {
	r := newRelay(t, serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, 1<<20))
	}))
	c := newRough(t, r.address())
	c.raw(h2frame.Append(nil, h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, h2frame.MaxWindow)))
	c.raw(h2frame.AppendWord(nil, h2frame.Window, 0, h2frame.MaxWindow-65535))
	for i := range MaxStreams {
		c.headers(uint32(2*i+1), true, plainHead...)
	}
	// The proxy has stopped reading the server when nothing moves any more.
	deadline := time.Now().Add(time.Minute)
	var held int64
	for stable := 0; stable < 20 && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		n := int64(0)
		r.mu.Lock()
		for _, k := range r.conns {
			k.mu.Lock()
			n += k.held + int64(len(k.out))
			k.mu.Unlock()
		}
		r.mu.Unlock()
		if n == held && n > 0 {
			stable++
		} else {
			held, stable = n, 0
		}
	}
	if most := int64(maxHeld + connWindow + 2*outFull); held == 0 || held > most {
		t.Errorf("%d bytes are held, want some and at most %d", held, most)
	}
}

// TestUnreadResets gives up a client that has requests refused and reads none of
// it.
func TestUnreadResets(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	h := Server(piped{near}, Options{Request: func(s *Stream, _ *Head) { s.Reset(h2frame.CodeRefused) }})
	ended := make(chan error, 1)
	go func() { ended <- h.Run() }()
	far.SetDeadline(time.Now().Add(time.Minute))
	c := &rough{t: t, c: far}
	c.hpack = hpack.NewEncoder(&c.block)
	c.raw(append([]byte(h2frame.Preface), h2frame.Append(nil, h2frame.Settings, 0, 0, nil)...))
	for i := range 4 * maxAnswers / (h2frame.HeaderLen + 4) {
		if c.headers(uint32(2*i+1), true, plainHead...) != nil {
			break
		}
	}
	far.Close()
	var ce *h2frame.Error
	if err := <-ended; !errors.As(err, &ce) || ce.Code != h2frame.CodeCalm {
		t.Errorf("ended with %v", err)
	}
}
