package alone

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hauberk.dev/mesh/http1"
)

// A client that reads a stored answer slowly, but does, gets all of it.
func TestStoredSlowly(t *testing.T) {
	const size = 32 << 20
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=60")
		w.Write(make([]byte, size))
	})
	p := serve(t, "limits: {idle_timeout: 2s}\ncache: {memory: 64MiB}\n"+one("  - {prefix: /, upstream: up, cache: {largest: 32MiB}}", upstreamOf(up)))
	if _, got := get(t, p, "GET", "/", nil, nil); len(got) != size {
		t.Fatalf("%d bytes", len(got))
	}
	c := dial(t, p)
	defer c.Close()
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: "+p.Address("web").String()+"\r\nConnection: close\r\n\r\n")
	n, begin := int64(0), time.Now()
	for {
		m, err := io.CopyN(io.Discard, c, 128<<10)
		if n += m; err == io.EOF {
			break
		}
		if err != nil {
			t.Fatalf("after %d bytes and %v: %v", n, time.Since(begin), err)
		}
		time.Sleep(15 * time.Millisecond) // the pace is what is tested
	}
	if n < size {
		t.Errorf("%d bytes of %d", n, size)
	}
	if hits := p.cache.Counts().Hits; hits != 1 {
		t.Errorf("%d answers were stored ones", hits)
	}
}

// A client that does not read a file at all is given up as idle.
func TestFileUnread(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "large.txt"), make([]byte, 64<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	p := serve(t, "limits: {idle_timeout: 300ms}\n"+one("  - {prefix: /, static: {root: '"+dir+"'}}"))
	c := dial(t, p)
	defer c.Close()
	io.WriteString(c, "GET /large.txt HTTP/1.1\r\nHost: h\r\n\r\n")
	if _, err := io.ReadFull(c, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "an end of the connection", func() bool { return p.open.Load() == 0 })
	patient := serve(t, one("  - {prefix: /, static: {root: '"+dir+"'}}"))
	if _, got := get(t, patient, "GET", "/large.txt", nil, nil); len(got) != 64<<20 {
		t.Errorf("%d bytes for one who reads", len(got))
	}
}

// A file that shrinks while it is sent compressed does not end as one that is whole.
func TestFileShrinks(t *testing.T) {
	const size = 64 << 20 // more than lies between two sockets
	path := filepath.Join(t.TempDir(), "large.txt")
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(b)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	p := serve(t, one("  - {prefix: /, static: {root: '"+filepath.Dir(path)+"'}, gzip: {level: 1}}"))
	req, err := http.NewRequest("GET", "http://"+p.Address("web").String()+"/large.txt", nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if !resp.Uncompressed {
		t.Fatal("it is not compressed")
	}
	if err := os.Truncate(path, size/2); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err == nil {
		t.Errorf("%d bytes are a whole answer", n)
	}
}

// Answers that are coming, to be stored, hold no more memory than those that are.
func TestStoredTogether(t *testing.T) {
	const size = 600 << 10
	var begun atomic.Int32
	end := make(chan struct{})
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=60")
		w.Header().Set("Content-Length", fmt.Sprint(size))
		w.Write(make([]byte, size/2))
		w.(http.Flusher).Flush()
		<-end
		w.Write(make([]byte, size/2))
	})
	p := serve(t, "cache: {memory: 1MiB}\n"+one("  - {prefix: /, upstream: up, cache: {}}", upstreamOf(up)))
	var all sync.WaitGroup
	for i := range 4 {
		all.Go(func() {
			resp, err := http.Get(fmt.Sprintf("http://%s/%d", p.Address("web"), i))
			begun.Add(1)
			if err != nil {
				t.Error(err)
			} else if n, err := io.Copy(io.Discard, resp.Body); n != size || err != nil {
				t.Errorf("%d bytes, %v", n, err)
			}
		})
	}
	waitFor(t, "all to come", func() bool { return begun.Load() == 4 })
	close(end)
	all.Wait()
	if n := p.cache.Counts().Stored; n != 1 {
		t.Errorf("%d answers were kept at once", n)
	}
	if !p.cache.Hold(1 << 20) {
		t.Error("what came is still counted in")
	}
}

// What a route sets or removes of an answer is so in the proxy's own too, once.
func TestOwnFields(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.txt"), []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"e"`)
		w.Header().Set("Cache-Control", "max-age=60")
	})
	edits := "response_headers: {set: {Content-Type: text/html, Date: now}, remove: [ETag, Last_Modified]}"
	p := serve(t, one(fmt.Sprintf("  - {path: /a.txt, static: {root: '%s'}, %s}\n  - {path: /own, respond: {status: 200, body: x}, %s}\n  - {path: /stored, upstream: up, cache: {}, %s}", dir, edits, edits, edits), upstreamOf(up)))
	for _, path := range []string{"/a.txt", "/own", "/stored", "/stored"} {
		for _, tag := range []string{"", `"e"`} {
			resp, _ := get(t, p, "GET", path, nil, func(r *http.Request) {
				if tag != "" {
					r.Header.Set("If-None-Match", tag)
				}
			})
			h := resp.Header
			if len(h["Content-Type"]) > 1 || h.Get("Content-Type") != "text/html" || len(h["Date"]) != 1 || h.Get("Date") != "now" || h.Get("ETag")+h.Get("Last-Modified") != "" {
				t.Errorf("%s %s: %d %v", path, tag, resp.StatusCode, h)
			}
		}
	}
}

// Connections at rest with one endpoint make room for those to another.
func TestConnectionsAtRest(t *testing.T) {
	var servers []string
	for range 3 {
		servers = append(servers, origin(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }))
	}
	p := serve(t, one("  - {prefix: /, upstream: up}", strings.Replace(upstreamOf(servers...), "endpoints:", "connections: 1\n  balance: round-robin\n  endpoints:", 1)))
	for i := range 9 {
		if resp, got := get(t, p, "POST", "/", strings.NewReader("x"), nil); resp.StatusCode != 200 {
			t.Fatalf("request %d: %d %s", i, resp.StatusCode, got)
		}
		waitFor(t, "the connection to be at rest", func() bool { return p.resting("up") == 1 })
	}
}

// Over HTTP/2 requests go where a connection has room for them, if there may be no other.
func TestConnectionsShared(t *testing.T) {
	var servers []string
	for range 2 {
		servers = append(servers, originTwo(t, func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }))
	}
	p := serve(t, one("  - {prefix: /, upstream: up}", strings.Replace(upstreamTwo(servers...), "endpoints:", "connections: 1\n  balance: round-robin\n  endpoints:", 1)))
	for i := range 4 {
		if resp, got := get(t, p, "POST", "/", strings.NewReader("x"), nil); resp.StatusCode != 200 {
			t.Fatalf("request %d: %d %s", i, resp.StatusCode, got)
		}
	}
}

func (p *Proxy) resting(upstream string) (n int) {
	w := p.enter()
	defer w.leave()
	for _, e := range w.upstreams[upstream].endpoints {
		e.mu.Lock()
		n += len(e.idle)
		e.mu.Unlock()
	}
	return n
}

// A log that nobody reads does not keep a reload.
func TestLogUnread(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(path, os.O_RDWR, 0) // and does not
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	l, err := openLog(AccessLog{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	l.add(make([]byte, logBuffer))
	closed := make(chan struct{})
	go func() { l.close(); close(closed) }()
	select {
	case <-closed:
		<-l.done
	case <-time.After(patience):
		t.Error("it waits for the reader")
	}
}

// One that nobody reads at all is an error with its place, and not a wait.
func TestLogWithoutReader(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	said := make(chan error, 1)
	go func() { _, err := openLog(AccessLog{Path: path}); said <- err }()
	select {
	case err := <-said:
		if err == nil || !strings.Contains(err.Error(), "access_log.path: \""+path) || !strings.Contains(err.Error(), "start its reader") {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("it waits for a reader")
	}
}

// A kept connection that has ended says nothing of its endpoint, in a second try either.
func TestHedgeStale(t *testing.T) {
	for _, c := range []struct {
		srv  *server
		err  error
		want bool
	}{{&server{reused: true}, io.EOF, true}, {&server{}, io.EOF, false}, {nil, io.EOF, false}, {&server{reused: true}, nil, false}, {&server{reused: true, in: inflow{end: 1}}, io.EOF, false}} {
		if got := (&contender{srv: c.srv, err: c.err}).stale(); got != c.want {
			t.Errorf("%+v, %v: %v", c.srv, c.err, got)
		}
	}
}

// A name in a client's certificate makes no byte of a header that servers read in
// different ways.
func TestPeerName(t *testing.T) {
	for _, name := range []string{"a\x00b", "a\x7fb", "a b", "a\xc3\xa9", "a\tb", `a"b`} {
		var p peer
		p.add("DNS", name)
		if http1.CheckField("x", string(p.forwarded)) != nil || strings.ContainsFunc(string(p.forwarded), func(c rune) bool { return c <= ' ' || c > '~' || c == '"' }) {
			t.Errorf("%q became %q", name, p.forwarded)
		}
	}
}
