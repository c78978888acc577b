package hbone

//lint:file-ignore SA1019 the independent peer here is x/net's own client and server, framed by hand

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// loop connects two ends over loopback TCP.
func loop(t testing.TB) (a, b net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if b, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

func both(t testing.TB, handle func(*Stream)) *Conn {
	t.Helper()
	a, b := loop(t)
	var wg sync.WaitGroup
	wg.Go(func() { Serve(b, handle, nil) })
	c, err := Client(a)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); wg.Wait() })
	return c
}

func echo(s *Stream) {
	s.Accept()
	io.Copy(s, s)
	s.CloseWrite()
}

func TestEchoLarge(t *testing.T) {
	c := both(t, echo)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			s, err := c.Open(context.Background(), "10.88.0.1:80", hpack.HeaderField{Name: "forwarded", Value: "for=x"})
			if err != nil {
				t.Error(err)
				return
			}
			sent := make([]byte, 3<<20+17) // beyond every window
			rand.Read(sent)
			go func() {
				s.Write(sent)
				s.CloseWrite()
			}()
			var got bytes.Buffer
			if _, err := s.WriteTo(&got); err != nil || !bytes.Equal(got.Bytes(), sent) {
				t.Errorf("%d of %d bytes came back: %v", got.Len(), len(sent), err)
			}
		})
	}
	wg.Wait()
	if n, _ := c.Busy(); n != 0 {
		t.Errorf("%d streams are left", n)
	}
}

// Each side closes its half alone: the answer is sent after the question ended,
// and a question after the answer ended.
func TestHalfClose(t *testing.T) {
	serverEnds := make(chan string, 1)
	c := both(t, func(s *Stream) {
		s.Accept()
		if s.Authority == "server-first:1" {
			s.Write([]byte("bye"))
			s.CloseWrite()
			rest, err := io.ReadAll(s)
			if err != nil {
				rest = []byte(err.Error())
			}
			serverEnds <- string(rest)
			return
		}
		all, _ := io.ReadAll(s)
		s.Write([]byte(strings.ToUpper(string(all))))
		s.CloseWrite()
	})
	s, err := c.Open(context.Background(), "client-first:1")
	if err != nil {
		t.Fatal(err)
	}
	s.Write([]byte("question"))
	s.CloseWrite()
	if got, err := io.ReadAll(s); err != nil || string(got) != "QUESTION" {
		t.Errorf("%q, %v", got, err)
	}
	if s, err = c.Open(context.Background(), "server-first:1"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(s); err != nil || string(got) != "bye" {
		t.Errorf("%q, %v", got, err)
	}
	time.Sleep(10 * time.Millisecond)
	if _, err := s.Write([]byte("still here")); err != nil {
		t.Error(err)
	}
	s.CloseWrite()
	if got := <-serverEnds; got != "still here" {
		t.Errorf("after its own end the server read %q", got)
	}
}

func TestRefuse(t *testing.T) {
	c := both(t, func(s *Stream) { s.Refuse(401, "no rule allows it") })
	_, err := c.Open(context.Background(), "x:1")
	var status *StatusError
	if !errors.As(err, &status) || status.Status != 401 || status.Reason != "no rule allows it" {
		t.Errorf("%v", err)
	}
	if n, _ := c.Busy(); n != 0 {
		t.Errorf("%d streams are left", n)
	}
}

func TestOpenGivesUp(t *testing.T) {
	release := make(chan struct{})
	c := both(t, func(s *Stream) { <-release })
	defer close(release)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if _, err := c.Open(ctx, "x:1"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// A slow reader holds up its own stream only, and the writer stops at the
// window.
func TestSlowReader(t *testing.T) {
	c := both(t, func(s *Stream) {
		if s.Authority == "slow:1" {
			s.Accept()
			s.mu.Lock()
			for s.err == nil {
				s.readable.Wait()
			}
			s.mu.Unlock()
			return
		}
		echo(s)
	})
	slow, err := c.Open(context.Background(), "slow:1")
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan int, 1)
	go func() {
		n, _ := slow.Write(make([]byte, 1<<20))
		wrote <- n
	}()
	s, err := c.Open(context.Background(), "fast:1")
	if err != nil {
		t.Fatal(err)
	}
	go func() { s.Write(make([]byte, 1<<20)); s.CloseWrite() }()
	if n, err := io.Copy(io.Discard, s); n != 1<<20 || err != nil {
		t.Errorf("fast stream: %d bytes, %v", n, err)
	}
	slow.Reset(h2frame.CodeCancel)
	if n := <-wrote; n > streamWindow {
		t.Errorf("%d bytes were sent into a window of %d", n, streamWindow)
	}
}

func TestCloseEndsAll(t *testing.T) {
	c := both(t, func(s *Stream) { s.Accept(); io.Copy(io.Discard, s) })
	var streams []*Stream
	for range 50 {
		s, err := c.Open(context.Background(), "x:1")
		if err != nil {
			t.Fatal(err)
		}
		streams = append(streams, s)
	}
	c.Close()
	for _, s := range streams {
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, ErrClosed) {
			t.Fatalf("read after close: %v", err)
		}
		if _, err := s.Write([]byte("x")); err == nil {
			t.Fatal("write after close")
		}
	}
	if _, err := c.Open(context.Background(), "x:1"); !errors.Is(err, ErrClosed) {
		t.Errorf("open after close: %v", err)
	}
}

// Go's HTTP/2 client speaks to our server.
func TestGoClient(t *testing.T) {
	a, b := loop(t)
	go Serve(b, func(s *Stream) {
		if s.Authority != "10.88.0.7:8080" || s.Field("baggage") != "k=v" {
			s.Refuse(400, "authority "+s.Authority)
			return
		}
		echo(s)
	}, nil)
	cc, err := (&http2.Transport{}).NewClientConn(a)
	if err != nil {
		t.Fatal(err)
	}
	pr, pw := io.Pipe()
	req := &http.Request{Method: "CONNECT", Host: "10.88.0.7:8080", URL: &url.URL{Host: "10.88.0.7:8080"}, Header: http.Header{"Baggage": {"k=v"}}, Body: pr}
	resp, err := cc.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Fatal(resp.Status)
	}
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	go func() { pw.Write(sent); pw.Close() }()
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back: %v", len(got), err)
	}
	// Anything but CONNECT is refused.
	get, _ := http.NewRequest("GET", "http://10.88.0.7:8080/", nil)
	if resp, err := cc.RoundTrip(get); err != nil || resp.StatusCode != 400 {
		t.Errorf("GET: %v, %v", resp, err)
	}
}

// Our client speaks to Go's HTTP/2 server.
func TestGoServer(t *testing.T) {
	a, b := loop(t)
	go (&http2.Server{}).ServeConn(b, &http2.ServeConnOpts{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "CONNECT" || r.Host == "refuse:1" {
			w.WriteHeader(503)
			return
		}
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		io.Copy(flusher{w}, r.Body)
	})})
	c, err := Client(a)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := c.Open(context.Background(), "10.88.0.7:8080")
	if err != nil {
		t.Fatal(err)
	}
	sent := make([]byte, 1<<20)
	rand.Read(sent)
	go func() { s.Write(sent); s.CloseWrite() }()
	if got, err := io.ReadAll(s); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back: %v", len(got), err)
	}
	var status *StatusError
	if _, err := c.Open(context.Background(), "refuse:1"); !errors.As(err, &status) || status.Status != 503 {
		t.Errorf("%v", err)
	}
}

type flusher struct{ w http.ResponseWriter }

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	f.w.(http.Flusher).Flush()
	return n, err
}

// Peers that break the protocol lose the connection, and soon.
func TestHostileClient(t *testing.T) {
	settings := h2frame.Append(nil, h2frame.Settings, 0, 0, nil)
	open := func(id uint32) []byte {
		return h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders, id, encodeFields([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "x:1"}}))
	}
	for name, bytes := range map[string][]byte{
		"no settings first":          h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8)),
		"huge frame":                 append(settings, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1),
		"data on idle stream":        h2frame.Append(settings, h2frame.Data, 0, 1, []byte("x")),
		"even stream":                append(settings, open(2)...),
		"stream id going back":       append(append(settings, open(3)...), open(1)...),
		"push promise":               h2frame.Append(settings, h2frame.Push, 0, 1, make([]byte, 8)),
		"continuation alone":         h2frame.Append(settings, h2frame.Continuation, 0, 1, nil),
		"headers then other frame":   h2frame.Append(h2frame.Append(settings, h2frame.Headers, 0, 1, nil), h2frame.Ping, 0, 0, make([]byte, 8)),
		"endless continuation":       h2frame.Append(h2frame.Append(h2frame.Append(settings, h2frame.Headers, 0, 1, make([]byte, 9000)), h2frame.Continuation, 0, 1, make([]byte, 9000)), h2frame.Ping, 0, 0, nil),
		"bad hpack":                  h2frame.Append(settings, h2frame.Headers, h2frame.FlagEndHeaders, 1, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}),
		"window of nothing":          h2frame.Append(settings, h2frame.Window, 0, 0, u32(0)),
		"connection window overflow": h2frame.Append(settings, h2frame.Window, 0, 0, u32(1<<31-1)),
		"stream's window overflows": append(h2frame.Append(append(settings, open(1)...), h2frame.Window, 0, 1, u32(1<<31-1-65535)),
			h2frame.Append(nil, h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 1<<31-1))...),
		"more data than the window":   append(append(settings, open(1)...), bytes.Repeat(h2frame.Append(nil, h2frame.Data, 0, 1, make([]byte, maxFrame)), streamWindow/maxFrame+1)...),
		"data after end of stream":    h2frame.Append(h2frame.Append(append(settings, open(1)...), h2frame.Data, h2frame.FlagEndStream, 1, nil), h2frame.Data, 0, 1, []byte("x")),
		"padding beyond the frame":    h2frame.Append(append(settings, open(1)...), h2frame.Data, h2frame.FlagPadded, 1, []byte{9, 1}),
		"too many settings":           h2frame.Append(nil, h2frame.Settings, 0, 0, make([]byte, 6*(h2frame.MaxSettings+1))),
		"malformed settings":          h2frame.Append(nil, h2frame.Settings, 0, 0, []byte{1}),
		"initial window out of range": h2frame.Append(nil, h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 1<<31)),
	} {
		t.Run(name, func(t *testing.T) {
			a, b := loop(t)
			ended := make(chan error, 1)
			go func() { ended <- Serve(b, func(s *Stream) { s.Accept(); <-s.h.Done() }, nil) }()
			go io.Copy(io.Discard, a)
			a.Write(append([]byte(h2frame.Preface), bytes...))
			select {
			case err := <-ended:
				var ce *h2frame.Error
				if !errors.As(err, &ce) {
					t.Errorf("ended with %v", err)
				}
			case <-time.After(time.Minute):
				t.Error("the connection lives on")
			}
		})
	}
}

// Opening and resetting streams faster than their handlers end is refused
// (rapid reset), as is asking for answers without reading them.
func TestFloods(t *testing.T) {
	block := encodeFields([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "x:1"}})
	floods := map[string]func(w *bufio.Writer, i uint32){
		"rapid reset": func(w *bufio.Writer, i uint32) {
			w.Write(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders, 2*i+1, block))
			w.Write(h2frame.Append(nil, h2frame.Reset, 0, 2*i+1, u32(8)))
		},
		"ping": func(w *bufio.Writer, i uint32) { w.Write(h2frame.Append(nil, h2frame.Ping, 0, 0, make([]byte, 8))) },
	}
	for name, send := range floods {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe() // unbuffered: what is not read blocks
			hold := make(chan struct{})
			ended := make(chan error, 1)
			go func() { ended <- Serve(b, func(s *Stream) { <-hold }, nil) }()
			go func() {
				if name == "rapid reset" {
					io.Copy(io.Discard, a)
				} else {
					io.CopyN(io.Discard, a, 60) // the greeting, and no more
				}
			}()
			go func() {
				w := bufio.NewWriter(a)
				w.WriteString(h2frame.Preface)
				w.Write(h2frame.Append(nil, h2frame.Settings, 0, 0, nil))
				for i := uint32(0); i < 20000; i++ {
					send(w, i)
				}
				w.Flush()
			}()
			select {
			case <-ended:
			case <-time.After(time.Minute):
				t.Error("the connection lives on")
			}
			close(hold)
			a.Close()
		})
	}
}

func FuzzServe(f *testing.F) {
	settings := h2frame.Append(nil, h2frame.Settings, 0, 0, nil)
	block := encodeFields([]hpack.HeaderField{{Name: ":method", Value: "CONNECT"}, {Name: ":authority", Value: "x:1"}})
	f.Add(settings)
	f.Add(h2frame.Append(settings, h2frame.Headers, h2frame.FlagEndHeaders, 1, block))
	f.Add(h2frame.Append(h2frame.Append(settings, h2frame.Headers, h2frame.FlagEndHeaders, 1, block), h2frame.Data, h2frame.FlagEndStream|h2frame.FlagPadded, 1, []byte{1, 'x', 0}))
	f.Add(h2frame.Append(h2frame.Append(settings, h2frame.Headers, 0, 1, block[:3]), h2frame.Continuation, h2frame.FlagEndHeaders, 1, block[3:]))
	f.Add(h2frame.Append(h2frame.Append(settings, h2frame.Window, 0, 0, u32(5)), h2frame.GoAway, 0, 0, make([]byte, 8)))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := &script{r: io.MultiReader(strings.NewReader(h2frame.Preface), bytes.NewReader(in))}
		if err := Serve(c, func(s *Stream) { s.Accept(); io.Copy(s, s); s.CloseWrite() }, nil); err == nil {
			t.Fatal("the end of input did not end the connection")
		}
	})
}

// script is a connection whose peer says what it has to say and leaves.
type script struct {
	r io.Reader
	net.Conn
}

func (s *script) Read(p []byte) (int, error)       { return s.r.Read(p) }
func (s *script) Write(p []byte) (int, error)      { return len(p), nil }
func (s *script) Close() error                     { return nil }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func BenchmarkPingPong(b *testing.B) {
	c := both(b, echo)
	s, err := c.Open(context.Background(), "x:1")
	if err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, Headroom+1024)
	b.ReportAllocs()
	for b.Loop() {
		s.WriteFramed(buf)
		io.ReadFull(s, buf[Headroom:])
	}
}
