package alone

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const patience = 30 * time.Second

// serve runs a proxy of a configuration, to the end of the test.
func serve(t testing.TB, text string) *Proxy {
	t.Helper()
	return serveWith(t, text, func(*Proxy) {})
}

// serveWith runs a proxy that is changed first.
func serveWith(t testing.TB, text string, change func(*Proxy)) *Proxy {
	t.Helper()
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	change(p)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("the proxy does not end")
		}
	})
	return p
}

// one is a configuration with one listener and one host.
func one(routes string, rest ...string) string {
	return "version: 1\nlisteners: [{name: web, address: 127.0.0.1:0}]\nhosts:\n- names: ['*']\n  routes:\n" + routes + "\n" + strings.Join(rest, "\n")
}

func upstreamOf(addresses ...string) string {
	s := "upstreams:\n- name: up\n  endpoints:\n"
	for _, a := range addresses {
		s += "  - address: " + strings.TrimPrefix(a, "http://") + "\n"
	}
	return s
}

func origin(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s.URL
}

// raw sends bytes and reads until the proxy ends the connection.
func raw(t testing.TB, p *Proxy, text string) string {
	t.Helper()
	c := dial(t, p)
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(c)
	return string(b)
}

func dial(t testing.TB, p *Proxy) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", p.Address("web").String())
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func get(t testing.TB, p *Proxy, method, path string, body io.Reader, edit func(*http.Request)) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://"+p.Address("web").String()+path, body)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(req)
	}
	tr := &http.Transport{DisableCompression: true}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse
	}}).Do(req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return resp, string(b)
}

func TestForward(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Saw", fmt.Sprintf("%s %s host=%s xff=%s xfp=%s te=%v secret=%s", r.Method, r.URL, r.Host, r.Header.Get("X-Forwarded-For"),
			r.Header.Get("X-Forwarded-Proto"), r.TransferEncoding, r.Header.Get("X-Secret")))
		if r.URL.Path == "/chunked" {
			w.(http.Flusher).Flush()
		}
		w.Write(b)
	})
	p := serve(t, one(`
  - {prefix: /v1, upstream: up, rewrite: "/api$rest", response_headers: {set: {X-Who: "$remote"}, remove: [X-Gone]}}
  - {prefix: /, upstream: up, request_headers: {remove: [X-Secret]}}`, upstreamOf(up)))
	for _, size := range []int{0, 1, 1000, 16 << 10, 40 << 10, 1 << 20} {
		for _, path := range []string{"/plain", "/chunked"} {
			for _, framed := range []bool{true, false} {
				body := strings.Repeat("x", size)
				var r io.Reader = strings.NewReader(body)
				if !framed {
					r = io.MultiReader(r)
				}
				resp, got := get(t, p, "POST", path, r, nil)
				if resp.StatusCode != 200 || got != body {
					t.Errorf("%s of %d bytes: %d, %d bytes", path, size, resp.StatusCode, len(got))
				}
			}
		}
	}
	resp, _ := get(t, p, "GET", "/v1/x%20y?q=1", nil, func(r *http.Request) {
		r.Header.Set("X-Forwarded-For", "6.6.6.6")
		r.Header.Set("X_Forwarded_For", "6.6.6.6")
		r.Host = "shop.example:80"
	})
	if got := resp.Header.Get("X-Saw"); !strings.HasPrefix(got, "GET /api/x%20y?q=1 host=shop.example:80 xff=127.0.0.1 xfp=http ") {
		t.Errorf("the server saw %q", got)
	}
	if resp.Header.Get("X-Who") != "127.0.0.1" {
		t.Errorf("%v", resp.Header)
	}
	resp, _ = get(t, p, "GET", "/x", nil, func(r *http.Request) { r.Header.Set("X-Secret", "s") })
	if got := resp.Header.Get("X-Saw"); !strings.HasSuffix(got, "secret=") {
		t.Errorf("the server saw %q", got)
	}
	if resp, got := get(t, p, "HEAD", "/x", nil, nil); resp.StatusCode != 200 || got != "" {
		t.Errorf("HEAD: %d %q", resp.StatusCode, got)
	}
}

// Requests of one connection are answered in order, however they arrive.
func TestPipelined(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body); io.WriteString(w, r.URL.Path) })
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	text := "POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabcGET /b HTTP/1.1\r\nHost: h\r\n\r\n" +
		"POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxy\r\n0\r\n\r\nGET /d HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
	for _, step := range []int{len(text), 7, 1} {
		c := dial(t, p)
		go func() {
			for i := 0; i < len(text); i += step {
				io.WriteString(c, text[i:min(len(text), i+step)])
			}
		}()
		r := bufio.NewReader(c)
		for _, want := range []string{"abc/a", "/b", "xy/c", "/d"} {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("in steps of %d: %v", step, err)
			}
			if got, err := io.ReadAll(resp.Body); string(got) != want || err != nil {
				t.Errorf("in steps of %d: %q, %v, want %q", step, got, err, want)
			}
		}
		if _, err := r.ReadByte(); err != io.EOF {
			t.Errorf("after the last: %v", err)
		}
		c.Close()
	}
}

func TestRoutes(t *testing.T) {
	a := origin(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "a "+r.URL.String()) })
	p := serve(t, `
version: 1
listeners: [{name: web, address: "127.0.0.1:0"}]
hosts:
- names: [exact.example]
  routes:
  - {path: /only, respond: {status: 200, body: only}}
  - {regex: '^/user/([0-9]+)$', methods: [GET], upstream: up, rewrite: '/u?id=$1'}
  - {prefix: /h, headers: [{name: X-Kind, equal: big}], respond: {status: 200, body: big}}
  - {prefix: /h, headers: [{name: X-Kind, regex: '^s'}], respond: {status: 200, body: small}}
  - {prefix: /q, query: [{name: v, equal: "a b"}], respond: {status: 200, body: query}}
  - {prefix: /old, redirect: {to: 'https://$host/new$rest$query', status: 301}}
  - {prefix: /gone, respond: {status: 410, body: gone}}
- names: ['*.example']
  routes: [{respond: {status: 200, body: below}}]
- names: ['*']
  paths: loose
  routes: [{prefix: /x, respond: {status: 200, body: loose}}, {respond: {status: 200, body: any}}]
`+upstreamOf(a))
	for _, c := range []struct {
		host, path, header string
		status             int
		want               string
	}{
		{"exact.example", "/only", "", 200, "only"},
		{"EXACT.example.:80", "/only", "", 200, "only"},
		{"exact.example", "/only/", "", 404, "no route matches"},
		{"exact.example", "/user/42", "", 200, "a /u?id=42"},
		{"exact.example", "/user/x", "", 404, "no route matches"},
		{"exact.example", "/h", "X-Kind: big", 200, "big"},
		{"exact.example", "/h/z", "x-kind: smallish", 200, "small"},
		{"exact.example", "/hh", "X-Kind: big", 404, ""},
		{"exact.example", "/q?u=1&v=a+b", "", 200, "query"},
		{"exact.example", "/q?v=c", "", 404, ""},
		{"exact.example", "/old/p?q", "", 301, "Location: https://exact.example/new/p?q\r\n"},
		{"exact.example", "/gone", "", 410, "gone"},
		{"exact.example", "/a/../gone", "", 400, "in different ways"},
		{"exact.example", "//gone", "", 400, "in different ways"},
		{"b.example", "/", "", 200, "below"},
		{"a.b.example", "/", "", 200, "below"},
		{"example", "/", "", 200, "any"},
		{"other", "//x//y;z", "", 200, "loose"},
		{"other", "/%2e%2e/x", "", 400, "in different ways"},
		{"other", "/x%2Fy", "", 400, "in different ways"},
	} {
		if c.header != "" {
			c.header += "\r\n"
		}
		got := raw(t, p, "GET "+c.path+" HTTP/1.1\r\nHost: "+c.host+"\r\n"+c.header+"Connection: close\r\n\r\n")
		if !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", c.status)) || !strings.Contains(got, c.want) {
			t.Errorf("%s%s %s: %q", c.host, c.path, c.header, got)
		}
	}
}

// What could be read in two ways is refused, and nothing after it is served.
func TestSmuggling(t *testing.T) {
	var served, smuggled atomic.Int32
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		if r.URL.Path == "/smuggled" {
			smuggled.Add(1)
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			panic(http.ErrAbortHandler)
		}
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	const next = "GET /smuggled HTTP/1.1\r\nHost: h\r\n\r\n"
	for name, text := range map[string]string{
		"two lengths":       "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\nContent-Length: 38\r\n\r\n",
		"length and chunks": "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"bare LF":           "GET / HTTP/1.1\nHost: h\n\n",
		"two hosts":         "GET / HTTP/1.1\r\nHost: h\r\nHost: i\r\n\r\n",
		"another target":    "GET http://i/ HTTP/1.1\r\nHost: h\r\n\r\n",
		"folded":            "GET / HTTP/1.1\r\nHost: h\r\nX: a\r\n b\r\n\r\n",
		"long head":         "GET / HTTP/1.1\r\nHost: h\r\nX: " + strings.Repeat("a", maxHead) + "\r\n\r\n",
		"CONNECT":           "CONNECT h:80 HTTP/1.1\r\nHost: h:80\r\nConnection: close\r\n\r\n",
	} {
		got := raw(t, p, text+next)
		if !strings.HasPrefix(got, "HTTP/1.1 4") || strings.Count(got, "HTTP/1.1 ") != 1 {
			t.Errorf("%s: %q", name, got)
		}
	}
	if n := served.Load(); n != 0 {
		t.Errorf("%d requests were served", n)
	}
	// A body that is framed badly ends its request, and the server's connection.
	got := raw(t, p, "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n"+next)
	if !strings.HasPrefix(got, "HTTP/1.1 400 ") || strings.Count(got, "HTTP/1.1 ") != 1 || smuggled.Load() != 0 {
		t.Errorf("bad chunk: %q, %d smuggled", got, smuggled.Load())
	}
}

func TestFaults(t *testing.T) {
	dead, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := dead.Addr().String()
	dead.Close()
	var calls atomic.Int32
	live := origin(t, func(w http.ResponseWriter, r *http.Request) {
		n := calls.Add(1)
		switch {
		case r.URL.Path == "/die":
			hijack(w, "")
		case r.URL.Path == "/half":
			hijack(w, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
		case r.URL.Path == "/late-half":
			hijack(w, "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"+strings.Repeat("x", 50000))
		case r.URL.Path == "/garbage":
			hijack(w, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx")
		case r.URL.Path == "/once" && n == 1:
			w.WriteHeader(503)
		case r.URL.Path == "/slow":
			select {
			case <-r.Context().Done():
			case <-time.After(patience):
			}
		}
	})
	p := serve(t, one(`
  - {path: /once, upstream: up, retries: {attempts: 2, statuses: [503]}}
  - {path: /die, upstream: up, retries: {attempts: 3}}
  - {path: /slow, upstream: up, timeout: 1s}
  - {path: /gone, upstream: gone}
  - {path: /both, upstream: both}
  - {prefix: /, upstream: up}`, upstreamOf(live), "- {name: gone, endpoints: [{address: '"+gone+"'}]}",
		"- {name: both, endpoints: [{address: '"+gone+"'}, {address: '"+strings.TrimPrefix(live, "http://")+"'}]}"))
	for _, c := range []struct {
		method, path string
		status       int
		calls        int32
	}{
		{"GET", "/once", 200, 2},
		{"POST", "/once", 503, 1},
		{"POST", "/die", 502, 1},
		{"GET", "/garbage", 502, 1},
		{"GET", "/slow", 504, 1},
		{"GET", "/gone", 503, 0},
		{"POST", "/both", 200, 1},
		{"GET", "/both", 200, 1},
	} {
		calls.Store(0)
		var body io.Reader
		if c.method == "POST" {
			body = strings.NewReader("pay")
		}
		resp, got := get(t, p, c.method, c.path, body, nil)
		if resp.StatusCode != c.status || calls.Load() != c.calls {
			t.Errorf("%s %s: %d after %d calls, want %d after %d: %s", c.method, c.path, resp.StatusCode, calls.Load(), c.status, c.calls, got)
		}
	}
	calls.Store(0) // a connection that may have been stale costs no attempt
	if resp, _ := get(t, p, "GET", "/die", nil, nil); resp.StatusCode != 502 || calls.Load() < 3 || calls.Load() > 4 {
		t.Errorf("/die: %d after %d calls", resp.StatusCode, calls.Load())
	}
	// An answer that has begun and does not end must not look whole.
	for _, path := range []string{"/half", "/late-half"} {
		got := raw(t, p, "GET "+path+" HTTP/1.1\r\nHost: h\r\n\r\n")
		if strings.Count(got, "HTTP/1.1 ") > 1 || len(got) > 60000 {
			t.Errorf("%s: %d bytes", path, len(got))
		}
	}
}

func hijack(w http.ResponseWriter, text string) {
	c, _, err := w.(http.Hijacker).Hijack()
	if err == nil {
		io.WriteString(c, text)
		c.Close()
	}
}

// A connection that a server has ended meanwhile costs no request, and none is
// sent twice that may not be.
func TestStale(t *testing.T) {
	var posts atomic.Int32
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			posts.Add(1)
		}
	}))
	s.Start()
	defer s.Close()
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(s.URL)))
	for i := range 20 {
		method := []string{"GET", "POST"}[i%2]
		resp, _ := get(t, p, method, "/", nil, nil)
		if resp.StatusCode != 200 {
			t.Errorf("%s %d: %d", method, i, resp.StatusCode)
		}
		s.CloseClientConnections()
	}
	if posts.Load() != 10 {
		t.Errorf("%d requests arrived of 10", posts.Load())
	}
}

func TestLimits(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })
	p := serve(t, "limits: {head_timeout: 200ms, idle_timeout: 500ms, head: 2KiB}\n"+one(`
  - {path: /rate, rate: {requests: 1, per: 1h, burst: 2}, respond: {status: 200}}
  - {prefix: /, upstream: up, body: 1KiB}`, upstreamOf(up)))
	for i, want := range []int{200, 200, 429} {
		resp, _ := get(t, p, "GET", "/rate", nil, nil)
		if resp.StatusCode != want {
			t.Errorf("request %d: %d, want %d", i, resp.StatusCode, want)
		}
	}
	big := strings.Repeat("x", 2<<10)
	if resp, _ := get(t, p, "POST", "/", strings.NewReader(big), nil); resp.StatusCode != 413 {
		t.Errorf("long body: %d", resp.StatusCode)
	}
	if got := raw(t, p, "POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n800\r\n"+big+"\r\n0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 413 ") {
		t.Errorf("long chunked body: %q", got)
	}
	if got := raw(t, p, "GET / HTTP/1.1\r\nHost: h\r\nX: "+big+"\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 431 ") {
		t.Errorf("long head: %q", got)
	}
	// Slow heads and bodies are given up, idle connections closed.
	for text, want := range map[string]string{
		"GET / HTTP/1.1\r\nHost":                                    "HTTP/1.1 408 ",
		"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\nx": "HTTP/1.1 408 ",
		"": "",
	} {
		if got := raw(t, p, text); !strings.HasPrefix(got, want) || want == "" && got != "" {
			t.Errorf("%q: %q", text, got)
		}
	}
}

func TestConnectionLimit(t *testing.T) {
	p := serve(t, strings.Replace(one("  - {respond: {status: 200}}"), "address: 127.0.0.1:0", "address: '127.0.0.1:0', connections: 2", 1))
	a, b := dial(t, p), dial(t, p)
	defer a.Close()
	defer b.Close()
	for _, c := range []net.Conn{a, b} { // both are there
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n")
		if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 200 {
			t.Fatal(resp, err)
		}
	}
	ask := func() string { // it may be reset before it knows that it is connected
		c, err := net.Dial("tcp", p.Address("web").String())
		if err != nil {
			return ""
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
		b, _ := io.ReadAll(c)
		return string(b)
	}
	if got := ask(); got != "" {
		t.Errorf("the third got %q", got)
	}
	a.Close()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if ask() != "" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no room after one has left")
		}
	}
}

func TestGzip(t *testing.T) {
	text := strings.Repeat("words and words ", 500)
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("ETag", `"v1"`)
		switch r.URL.Path {
		case "/done":
			w.Header().Set("Content-Encoding", "br")
		case "/image":
			w.Header().Set("Content-Type", "image/png")
		case "/small":
			io.WriteString(w, "small")
			return
		}
		io.WriteString(w, text)
	})
	p := serve(t, one("  - {prefix: /, upstream: up, gzip: {}}", upstreamOf(up)))
	for _, c := range []struct {
		path, accept string
		squeezed     bool
	}{
		{"/", "gzip, br", true}, {"/", "br, GZIP;q=0.5", true}, {"/", "", false}, {"/", "gzip;q=0", false}, {"/", "br", false},
		{"/done", "gzip", false}, {"/image", "gzip", false}, {"/small", "gzip", false},
	} {
		resp, got := get(t, p, "GET", c.path, nil, func(r *http.Request) { r.Header.Set("Accept-Encoding", c.accept) })
		if squeezed := resp.Header.Get("Content-Encoding") == "gzip"; squeezed != c.squeezed {
			t.Errorf("%s %q: %v", c.path, c.accept, resp.Header)
		}
		if c.squeezed {
			z, err := gzip.NewReader(strings.NewReader(got))
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(z)
			if err != nil || string(b) != text || resp.Header.Get("ETag") != `W/"v1"` || len(got) > len(text)/4 {
				t.Errorf("%s: %d bytes for %d, %v, %v", c.path, len(got), len(b), err, resp.Header)
			}
		}
		if resp.Header.Get("Vary") == "" {
			t.Errorf("%s: %v", c.path, resp.Header)
		}
	}
}

func TestStatic(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("site/index.html", "index")
	write("site/digits.txt", "0123456789")
	write("site/a/b.css", "css")
	write("site/.git/config", "secret")
	write("secret.txt", "secret")
	if err := errors.Join(os.Symlink("../secret.txt", filepath.Join(dir, "site/link")), os.Symlink("digits.txt", filepath.Join(dir, "site/inside"))); err != nil {
		t.Fatal(err)
	}
	p := serve(t, one("  - {prefix: /spa, static: {root: '"+dir+"/site', try: index.html}}\n  - {prefix: /, static: {root: '"+dir+"/site'}, gzip: {min: 1}}"))
	first, _ := get(t, p, "GET", "/digits.txt", nil, nil)
	etag := first.Header.Get("ETag")
	for _, c := range []struct {
		path, field, value string
		status             int
		body               string
	}{
		{"/", "", "", 200, "index"},
		{"/digits.txt", "", "", 200, "0123456789"},
		{"/inside", "", "", 200, "0123456789"},
		{"/digits.txt", "Range", "bytes=2-4", 206, "234"},
		{"/digits.txt", "Range", "bytes=7-", 206, "789"},
		{"/digits.txt", "Range", "bytes=-2", 206, "89"},
		{"/digits.txt", "Range", "bytes=5-99", 206, "56789"},
		{"/digits.txt", "Range", "bytes=99-", 416, ""},
		{"/digits.txt", "Range", "bytes=0-1,3-4", 200, "0123456789"},
		{"/digits.txt", "Range", "bytes=4-2", 200, "0123456789"},
		{"/digits.txt", "If-None-Match", etag, 304, ""},
		{"/digits.txt", "If-None-Match", `"x", W/` + etag, 304, ""},
		{"/digits.txt", "If-Match", `"x"`, 412, ""},
		{"/digits.txt", "If-Modified-Since", first.Header.Get("Last-Modified"), 304, ""},
		{"/digits.txt", "If-Modified-Since", "Mon, 02 Jan 2006 15:04:05 GMT", 200, "0123456789"},
		{"/a", "", "", 301, ""},
		{"/a/", "", "", 404, "no such file"},
		{"/digits.txt/", "", "", 404, "no such file"},
		{"/link", "", "", 404, "no such file"},
		{"/.git/config", "", "", 404, "no such file"},
		{"/spa/any/where", "", "", 200, "index"},
		{"/missing", "", "", 404, "no such file"},
	} {
		resp, got := get(t, p, "GET", c.path, nil, func(r *http.Request) {
			if c.field != "" {
				r.Header.Set(c.field, c.value)
			}
		})
		if resp.StatusCode != c.status || c.status < 400 && got != c.body || !strings.Contains(got, c.body) {
			t.Errorf("%s %s %s: %d %q", c.path, c.field, c.value, resp.StatusCode, got)
		}
	}
	if resp, _ := get(t, p, "GET", "/a?x=1", nil, nil); resp.Header.Get("Location") != "/a/?x=1" {
		t.Errorf("%v", resp.Header)
	}
	if resp, _ := get(t, p, "POST", "/digits.txt", strings.NewReader("x"), nil); resp.StatusCode != 405 {
		t.Errorf("POST: %d", resp.StatusCode)
	}
	resp, got := get(t, p, "GET", "/digits.txt", nil, func(r *http.Request) { r.Header.Set("Accept-Encoding", "gzip") })
	if z, err := gzip.NewReader(strings.NewReader(got)); err != nil || resp.Header.Get("ETag") != "W/"+etag {
		t.Errorf("%v, %v", err, resp.Header)
	} else if b, _ := io.ReadAll(z); string(b) != "0123456789" {
		t.Errorf("%q", b)
	}
	for _, path := range []string{"/../secret.txt", "/a/../../secret.txt", "/%2e%2e/secret.txt", "/..%2fsecret.txt"} {
		if got := raw(t, p, "GET "+path+" HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"); strings.Contains(got, "\r\n\r\nsecret") {
			t.Errorf("%s: %q", path, got)
		}
	}
}

func TestMirror(t *testing.T) {
	seen := make(chan string, 8)
	shadow := origin(t, func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		seen <- r.Method + " " + r.URL.Path + " " + string(b)
	})
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "real") })
	p := serve(t, one("  - {prefix: /, upstream: up, mirror: {upstream: shadow}}", upstreamOf(up),
		"- {name: shadow, endpoints: [{address: '"+strings.TrimPrefix(shadow, "http://")+"'}]}"))
	if _, got := get(t, p, "POST", "/m", strings.NewReader("body"), nil); got != "real" {
		t.Errorf("%q", got)
	}
	select {
	case got := <-seen:
		if got != "POST /m body" {
			t.Errorf("%q", got)
		}
	case <-time.After(patience):
		t.Error("no copy came")
	}
}

func TestUpgrade(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		c, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer c.Close()
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: "+r.Header.Get("Upgrade")+"\r\n\r\n")
		io.Copy(c, rw)
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	c := dial(t, p)
	defer c.Close()
	io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "echo" {
		t.Fatal(resp, err)
	}
	sent := bytes.Repeat([]byte("not HTTP\r\n\r\n"), 10000)
	go func() { c.Write(sent); c.(*net.TCPConn).CloseWrite() }()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes of %d back, %v", len(got), len(sent), err)
	}
}

func TestExpect(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(403)
			return
		}
		io.Copy(w, r.Body)
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	c := dial(t, p)
	defer c.Close()
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
	r := bufio.NewReader(c)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 100 {
		t.Fatal(resp, err)
	}
	io.WriteString(c, "body")
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	if b, _ := io.ReadAll(resp.Body); string(b) != "body" {
		t.Errorf("%q", b)
	}
	got := raw(t, p, "POST /no HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n")
	if !strings.HasPrefix(got, "HTTP/1.1 403 ") {
		t.Errorf("%q", got)
	}
}

// Forwarding without changes allocates nothing per request, nor does one that might
// have been tried twice.
func TestNoAllocation(t *testing.T) {
	for _, routed := range []string{"", ", hedge: {after: 30s, percentile: 99}"} {
		forwardWithoutAllocation(t, "  - {prefix: /, upstream: up"+routed+"}")
	}
}

func forwardWithoutAllocation(t *testing.T, routes string) {
	p := serve(t, "access_log: {path: /dev/null}\n"+one(routes, upstreamOf(fixedOrigin(t))))
	c := dial(t, p)
	defer c.Close()
	request := []byte("GET /a/b?c=d HTTP/1.1\r\nHost: example.com\r\nUser-Agent: test\r\nAccept: */*\r\n\r\n")
	b := make([]byte, 4096)
	ask := func() {
		c.Write(request)
		for got := 0; ; {
			n, err := c.Read(b[got:])
			if err != nil {
				t.Fatal(err)
			}
			if got += n; bytes.HasSuffix(b[:got], []byte("hello")) {
				return
			}
		}
	}
	for range 100 {
		ask()
	}
	most := 0.0
	if raced {
		most = 4 // the blocks that the pool forgets
	}
	if n := testing.AllocsPerRun(2000, ask); n > most {
		t.Errorf("%s: %v allocations per request", routes, n)
	}
}

// fixedOrigin gives each request the same answer, and allocates nothing for it.
func fixedOrigin(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	answer := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 5\r\n\r\nhello")
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				b := make([]byte, 4096)
				for {
					n, err := c.Read(b)
					if err != nil {
						c.Close()
						return
					}
					if bytes.HasSuffix(b[:n], []byte("\r\n\r\n")) {
						c.Write(answer)
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}
