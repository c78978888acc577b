package http2

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"hauberk.dev/mesh/h2frame"
)

// TestNoLimitSaid: a server that says nothing of streams takes all there may be.
func TestNoLimitSaid(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	r := newRelay(t, ln.Addr().String())
	client := newRough(t, r.address())
	for i := range MaxStreams {
		client.headers(uint32(2*i+1), true, plainHead...)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.ReadFull(c, make([]byte, len(h2frame.Preface)))
	server := &rough{t: t, c: c, dec: hpack.NewDecoder(h2frame.TableSize, nil), status: map[uint32]string{}}
	server.raw(h2frame.Append(nil, h2frame.Settings, 0, 0, nil))
	for heads := 0; heads < MaxStreams; {
		f, _, err := server.next()
		if err != nil {
			t.Fatalf("after %d requests: %v", heads, err)
		}
		if f.Kind == h2frame.Headers {
			heads++
		}
	}
}

// TestPlacePassedOn: a stream that ends while it is about to be opened leaves
// its place to the next.
func TestPlacePassedOn(t *testing.T) {
	c := Client(nil, Options{})
	c.most = 1
	var all [3]*Stream
	for i := range all {
		all[i] = &Stream{c: c, declared: -1}
	}
	c.openLocked(all[0])
	c.waiting.push(all[1])
	c.waiting.push(all[2])
	c.dropLocked(all[0], endOrderly)
	c.dropLocked(all[1], endOurs)
	if c.ready.first != all[2] {
		t.Error("the place is lost")
	}
}

// TestLastStreams opens streams up to the highest number there is, and then has
// the client ask again elsewhere.
func TestLastStreams(t *testing.T) {
	r := newRelay(t, quietServer(t))
	c := newRough(t, r.address())
	ask := func(id uint32) (Code, string) {
		c.headers(id, true, plainHead...)
		return c.reset(id)
	}
	ask(1)
	r.mu.Lock()
	up := r.conns[1]
	r.mu.Unlock()
	up.mu.Lock()
	up.nextID = lastStream - 2
	up.mu.Unlock()
	for _, id := range []uint32{3, 5} {
		if code, status := ask(id); code != h2frame.CodeNone || status != "200" {
			t.Errorf("code %d, status %q", code, status)
		}
	}
	if code, status := ask(7); code != h2frame.CodeRefused || status != "" {
		t.Errorf("past the last: code %d, status %q", code, status)
	}
}

// TestFaultAfterResponse passes on a response that was whole before its server
// erred.
func TestFaultAfterResponse(t *testing.T) {
	r := newRelay(t, rudeServer(t, func(id uint32) []byte {
		return append(h2frame.Append(nil, h2frame.Headers, h2frame.FlagEndHeaders|h2frame.FlagEndStream, id, []byte{0x88}),
			h2frame.Append(nil, h2frame.Push, h2frame.FlagEndHeaders, id, make([]byte, 4))...)
	}))
	c := newRough(t, r.address())
	c.c.SetDeadline(time.Now().Add(20 * time.Second))
	c.headers(1, true, plainHead...)
	if code, status := c.reset(1); code != h2frame.CodeNone || status != "200" {
		t.Errorf("code %d, status %q", code, status)
	}
}

// TestRefusedWhileDraining says of no request that it was looked at when it was
// not.
func TestRefusedWhileDraining(t *testing.T) {
	r := newRelay(t, serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		io.Copy(io.Discard, r.Body)
	}))
	c := newRough(t, r.address())
	c.headers(1, false, plainHead...)
	for c.status[1] == "" {
		if _, _, err := c.next(); err != nil {
			t.Fatal(err)
		}
	}
	r.mu.Lock()
	down := r.conns[0]
	r.mu.Unlock()
	down.Drain()
	c.headers(3, true, plainHead...)
	c.headers(2, true, plainHead...) // ends the connection
	var last []uint32
	refused := false
	for {
		f, p, err := c.next()
		if err != nil {
			break
		}
		switch {
		case f.Kind == h2frame.GoAway:
			last = append(last, binary.BigEndian.Uint32(p))
		case f.Kind == h2frame.Reset && f.Stream == 3:
			refused = Code(binary.BigEndian.Uint32(p)) == h2frame.CodeRefused
		}
	}
	if len(last) != 2 || last[0] != 1 || last[1] != 1 || !refused {
		t.Errorf("GOAWAY after %v, refused %v", last, refused)
	}
}

// TestDrainMeetsRequest: a drain between the two looks at a request refuses it.
func TestDrainMeetsRequest(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	c := Server(piped{near}, Options{Request: func(*Stream, *Head) { t.Error("the request was taken") }})
	f := h2frame.Header{Kind: h2frame.Headers, Flags: h2frame.FlagEndHeaders | h2frame.FlagEndStream, Stream: 1}
	c.streams[99] = &Stream{c: c} // else the drain ends the connection
	if err := c.admitLocked(f); err != nil {
		t.Fatal(err)
	}
	c.Drain()
	var se *StreamError
	err := c.request(f, []Field{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/"}}, true)
	if !errors.As(err, &se) || se.Code != h2frame.CodeRefused {
		t.Errorf("%v", err)
	}
	if !bytes.Equal(c.out, h2frame.AppendGoAway(nil, 0, h2frame.CodeNone)) {
		t.Errorf("% x was said", c.out)
	}
}

// TestDrainedTail leaves a client time to read the last response.
func TestDrainedTail(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	far.SetDeadline(time.Now().Add(20 * time.Second))
	var h *Conn
	h = Server(piped{near}, Options{Request: func(s *Stream, _ *Head) {
		s.Answer([]Field{{Name: ":status", Value: "200"}}, make([]byte, 10_000))
		h.Drain()
	}})
	ended := make(chan error, 1)
	go func() { ended <- h.Run() }()
	c := &rough{t: t, c: far, dec: hpack.NewDecoder(h2frame.TableSize, nil), status: map[uint32]string{}}
	c.hpack = hpack.NewEncoder(&c.block)
	c.raw(append([]byte(h2frame.Preface), h2frame.Append(nil, h2frame.Settings, 0, 0, nil)...))
	c.headers(1, true, plainHead...)
	<-h.Done()
	time.Sleep(lingerTime + lingerTime/2) // longer than what an end without a drain leaves
	c.status[1] = ""
	for got := 0; got < 10_000; {
		f, _, err := c.next()
		if err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
		if f.Kind == h2frame.Data {
			got += f.Length
		}
	}
	far.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
