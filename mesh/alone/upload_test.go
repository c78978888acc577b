package alone

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// What may take how long once the body is sent is for the route to say, for calls of
// gRPC their stream's time, and never longer than the client waits.
func TestAnswerTime(t *testing.T) {
	for _, c := range []struct {
		grpc       bool
		until      time.Duration
		from, most time.Duration
	}{{false, 0, 50 * time.Minute, time.Hour}, {true, 0, 23 * time.Hour, 24 * time.Hour}, {true, 10 * time.Minute, 0, 10 * time.Minute}, {false, 10 * time.Minute, 0, 10 * time.Minute}} {
		var last time.Time
		s, a, srv := uploader(&timed{read: ended0}, &timed{deadline: func(at time.Time) { last = at }})
		s.world.config.Limits.StreamTimeout = Duration(24 * time.Hour)
		s.grpc = c.grpc
		if c.until > 0 {
			s.until = time.Now().Add(c.until)
		}
		s.in.take()
		s.in.end = copy(s.in.b[:], "0\r\n\r\n")
		done := make(chan error, 1)
		s.sendBody(a, srv, done)
		if left := time.Until(last); <-done != nil || left < c.from || left > c.most {
			t.Errorf("%+v: %v", c, left)
		}
	}
}

// An upload that ends while the deadline of its answer is set leaves it that of the
// route.
func TestUploadEndsBeside(t *testing.T) {
	var s *session
	var last time.Time
	to := &timed{read: func(b []byte) (int, error) { return 1, nil }, deadline: func(at time.Time) { last = at; s.passed.Store(true) }}
	s, a, srv := uploader(&timed{read: ended0}, to)
	s.world.config.Limits.StreamTimeout = Duration(24 * time.Hour)
	s.upload = make(chan error, 1)
	if err := s.more(a, srv, nil); err != nil || time.Until(last) > time.Hour {
		t.Errorf("%v, deadline in %v", err, time.Until(last))
	}
}

// TestStreamedDeadline has a client that sends its body in pieces wait no longer than
// it says.
func TestStreamedDeadline(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	})
	p := serve(t, one("  - {prefix: /, upstream: up, timeout: 10m, deadline: X-Wait}", upstreamOf(up)))
	body := io.MultiReader(strings.NewReader("body")) // whose length nobody knows
	if resp, got := get(t, p, "POST", "/", body, func(r *http.Request) { r.Header.Set("X-Wait", "50") }); resp.StatusCode != 504 {
		t.Errorf("%d %q", resp.StatusCode, got)
	}
}

// A client of a call may be silent as long as it is answered, and no other.
func TestSilentClient(t *testing.T) {
	for _, c := range []struct{ grpc, answered, gone bool }{{true, true, false}, {true, false, true}, {false, true, true}} {
		var s *session
		reads := 0
		client := &timed{read: func([]byte) (int, error) {
			if reads++; reads > 3 {
				return 0, io.EOF
			}
			if c.answered {
				s.moved.Store(time.Now().Add(time.Duration(reads) * time.Minute).UnixNano())
			}
			return 0, os.ErrDeadlineExceeded
		}}
		s, _, _ = uploader(client, &timed{})
		s.grpc = c.grpc
		err := s.moreBody(time.Now(), time.Hour)
		if gone := errors.Is(err, os.ErrDeadlineExceeded); gone != c.gone || !gone && err != io.EOF {
			t.Errorf("%+v: %v after %d", c, err, reads)
		}
	}
}

// overtaken is a connection whose first deadline is overtaken by a stop.
type overtaken struct {
	net.Conn
	stop    func()
	once    sync.Once
	stopped chan struct{}
}

func (c *overtaken) SetReadDeadline(at time.Time) error {
	if at.Before(time.Now()) {
		defer close(c.stopped)
		return c.Conn.SetReadDeadline(at)
	}
	c.once.Do(func() {
		go c.stop()
		<-c.stopped
	})
	return c.Conn.SetReadDeadline(at)
}

// A stop is not lost if the deadlines of what it stops are being set.
func TestStopOvertakes(t *testing.T) {
	near, far := net.Pipe()
	defer far.Close()
	defer near.Close()
	s, a, srv := uploader(&timed{}, &timed{})
	c := &overtaken{Conn: near, stopped: make(chan struct{})}
	s.conn, s.in.r = c, c
	done, over := make(chan error, 1), make(chan struct{})
	s.upload = done
	c.stop = func() { s.stopUpload(srv, nil); close(over) }
	go s.sendBody(a, srv, done)
	select {
	case <-over:
	case <-time.After(patience):
		t.Fatal("the upload goes on")
	}
}

// TestResetBeside has a client give up an answer from the cache, whose server serves
// somebody else by then.
func TestResetBeside(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/slow":
			close(begun)
			<-end
		case r.Header.Get("If-None-Match") != "":
			w.WriteHeader(304)
		default:
			w.Header().Set("Cache-Control", "no-cache")
			w.Header().Set("ETag", `"v1"`)
			w.Write(make([]byte, 1<<20))
		}
	})
	p := serve(t, one("  - {prefix: /slow, upstream: up}\n  - {prefix: /, upstream: up, cache: {largest: 2MiB}}", upstreamOf(up)))
	e := p.world.Load().upstreams["up"].endpoints[0]
	rests := func() {
		t.Helper()
		waitFor(t, "idle connection to the server", func() bool { e.mu.Lock(); defer e.mu.Unlock(); return len(e.idle) == 1 })
	}
	get(t, p, "GET", "/", nil, nil)
	rests()
	c := clientTwo(t)
	c.Transport.(*http.Transport).HTTP2 = &http.HTTP2Config{MaxReceiveBufferPerStream: 64 << 10, MaxReceiveBufferPerConnection: 256 << 10}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", "http://"+p.Address("web").String()+"/", nil)
	resp, err := c.Do(req)
	if err != nil || !strings.Contains(resp.Header.Get("Cache-Status"), "fwd-status=304") {
		t.Fatal(resp, err)
	}
	defer resp.Body.Close()
	rests()
	status := make(chan int, 1)
	go func() {
		resp, err := clientOne(t).Get("http://" + p.Address("web").String() + "/slow")
		if err != nil {
			t.Error(err)
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-begun
	if n := e.connects.Load(); n != 1 {
		t.Fatalf("%d connections to the server", n)
	}
	cancel()
	waitFor(t, "end of what was given up", func() bool {
		under := int64(0)
		p.eachClient(func(c *client) {
			if x := c.two.Load(); x != nil {
				under += x.open.Load()
			}
		})
		return under == 0
	})
	close(end)
	if got := <-status; got != 200 {
		t.Errorf("the other request: %d", got)
	}
}
