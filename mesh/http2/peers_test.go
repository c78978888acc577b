package http2

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"hauberk.dev/mesh/h2frame"
)

// serveHTTP runs net/http's HTTP/2 server in the clear.
func serveHTTP(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// httpClient is net/http's HTTP/2 client in the clear.
func httpClient(t testing.TB) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: time.Minute}
}

func TestPassesRequests(t *testing.T) {
	server := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/early":
			w.WriteHeader(103)
		case "/none":
			w.WriteHeader(204)
			return
		case "/abort":
			w.Write([]byte("some"))
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
		w.Header().Set("Trailer", "Sum")
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s %d", r.Method, r.Host, r.URL, len(body))
		w.Header().Set("Sum", fmt.Sprint(len(body)))
	})
	r := newRelay(t, server)
	client := httpClient(t)
	for _, c := range []struct {
		method, path, body, want string
		status                   int
	}{
		{"GET", "/a?b=c", "", "GET %s /a?b=c 0", 200},
		{"POST", "/p", strings.Repeat("x", 300_000), "POST %s /p 300000", 200},
		{"HEAD", "/h", "", "", 200},
		{"GET", "/none", "", "", 204},
		{"GET", "/early", "", "GET %s /early 0", 200},
		{"POST", "/refused", "body", "not you", 403},
		{"GET", "/after", "", "GET %s /after 0", 200},
	} {
		req, err := http.NewRequest(c.method, "http://"+r.address()+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.path, err)
			continue
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		want := c.want
		if strings.Contains(want, "%s") {
			want = fmt.Sprintf(want, r.address())
		}
		if err != nil || resp.StatusCode != c.status || string(got) != want || resp.ProtoMajor != 2 {
			t.Errorf("%s %s: %d %q, %v; want %d %q", c.method, c.path, resp.StatusCode, got, err, c.status, want)
		}
		if c.method == "POST" && c.status == 200 && resp.Trailer.Get("Sum") != fmt.Sprint(len(c.body)) {
			t.Errorf("%s: trailer %v", c.path, resp.Trailer)
		}
	}
	resp, err := client.Get("http://" + r.address() + "/abort")
	if err == nil {
		_, err = io.ReadAll(resp.Body)
		resp.Body.Close()
	}
	if err == nil {
		t.Error("a response that was broken off ended well")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.malformed) > 0 {
		t.Errorf("called malformed: %v", r.malformed)
	}
}

// TestManyAtOnce passes bodies both ways over one connection, many at a time.
func TestManyAtOnce(t *testing.T) {
	server := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	r := newRelay(t, server)
	client := httpClient(t)
	var wg sync.WaitGroup
	for i := range 300 { // more than either end takes
		wg.Go(func() {
			body := make([]byte, i*997)
			rand.Read(body)
			resp, err := client.Post("http://"+r.address()+"/", "", bytes.NewReader(body))
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil || sha256.Sum256(got) != sha256.Sum256(body) {
				t.Errorf("%d bytes came back as %d, %v", len(body), len(got), err)
			}
		})
	}
	wg.Wait()
}

// TestBackPressure has one end stop reading: the other must stop soon, and
// streams beside it go on.
func TestBackPressure(t *testing.T) {
	release, written := make(chan struct{}), make(chan int64, 1)
	server := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/up":
			<-release
			io.Copy(w, r.Body)
		case "/down":
			var n int64
			for range 1024 {
				k, err := w.Write(make([]byte, 16<<10))
				n += int64(k)
				if err != nil {
					break
				}
			}
			written <- n
		default:
			io.WriteString(w, "ok")
		}
	})
	r := newRelay(t, server)
	client := httpClient(t)
	beside := func() {
		t.Helper()
		resp, err := client.Get("http://" + r.address() + "/beside")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	beside()
	var sent counter
	up := make(chan error, 1)
	go func() {
		resp, err := client.Post("http://"+r.address()+"/up", "", io.LimitReader(&sent, 16<<20))
		if err == nil {
			var n int64
			n, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if n != 16<<20 {
				err = fmt.Errorf("%d bytes came back, %w", n, errors.Join(err, io.ErrUnexpectedEOF))
			}
		}
		up <- err
	}()
	most := sent.settle(t)
	if most > 8<<20 {
		t.Errorf("%d bytes were taken for a server that reads none", most)
	}
	beside()
	resp, err := client.Get("http://" + r.address() + "/down")
	if err != nil {
		t.Fatal(err)
	}
	beside()
	r.mu.Lock()
	for _, c := range r.conns {
		c.mu.Lock()
		if c.held > 2*streamWindow || len(c.out) > outFull+maxSend+h2frame.HeaderLen {
			t.Errorf("%d bytes held, %d ready", c.held, len(c.out))
		}
		c.mu.Unlock()
	}
	r.mu.Unlock()
	close(release)
	if err := <-up; err != nil {
		t.Error(err)
	}
	n, err := io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	if err != nil || n != 16<<20 || <-written != n {
		t.Errorf("%d bytes down, %v", n, err)
	}
}

// counter makes bytes and counts them.
type counter struct {
	mu sync.Mutex
	n  int64
}

func (c *counter) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += int64(len(p))
	return len(p), nil
}

// settle waits until no more is read.
func (c *counter) settle(t *testing.T) int64 {
	t.Helper()
	for last, since := int64(-1), time.Now(); ; time.Sleep(10 * time.Millisecond) {
		c.mu.Lock()
		n := c.n
		c.mu.Unlock()
		if n != last {
			last, since = n, time.Now()
		} else if n > 0 && time.Since(since) > 300*time.Millisecond {
			return n
		}
	}
}

// TestClientCancels tells the server that nobody waits any more.
func TestClientCancels(t *testing.T) {
	began, gone := make(chan struct{}), make(chan struct{})
	server := serveHTTP(t, func(w http.ResponseWriter, r *http.Request) {
		close(began)
		<-r.Context().Done()
		close(gone)
	})
	r := newRelay(t, server)
	ctx, cancel := context.WithCancel(t.Context())
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+r.address()+"/", nil)
	if err != nil {
		t.Fatal(err)
	}
	go func() { <-began; cancel() }()
	if _, err := httpClient(t).Do(req); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	select {
	case <-gone:
	case <-time.After(30 * time.Second):
		t.Error("the server was not told")
	}
}

// TestServerGone answers what can get no answer, and asks anew for the next.
func TestServerGone(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for first := true; ; first = false {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			if first {
				c.Read(make([]byte, 100))
				c.Close()
				continue
			}
			srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "second") })}
			srv.Protocols.SetUnencryptedHTTP2(true)
			go srv.Serve(&single{c: c, Listener: ln})
		}
	}()
	r := newRelay(t, ln.Addr().String())
	client := httpClient(t)
	for _, want := range []int{502, 200} {
		resp, err := client.Get("http://" + r.address() + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%d %s, want %d", resp.StatusCode, body, want)
		}
	}
}

// single is a listener of one connection.
type single struct {
	net.Listener
	c net.Conn
}

func (s *single) Accept() (net.Conn, error) {
	if s.c == nil {
		return nil, net.ErrClosed
	}
	c := s.c
	s.c = nil
	return c, nil
}

func (s *single) Close() error { return nil }
