package alone

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/mesh/h2frame"
)

// TestCaching has the same done by each protocol of clients.
func TestCaching(t *testing.T) {
	var hits atomic.Int64
	var down, changed atomic.Bool
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		n := hits.Add(1)
		h := w.Header()
		switch {
		case down.Load():
			w.WriteHeader(503)
			return
		case r.URL.Path == "/validated":
			h.Set("Cache-Control", "no-cache")
			h.Set("ETag", `"v1"`)
			if r.Header.Get("If-None-Match") == `"v1"` && !changed.Load() {
				h.Set("X-Renewed", fmt.Sprint(n))
				w.WriteHeader(304)
				return
			}
		case r.URL.Path == "/renewed":
			if h.Set("ETag", `"r"`); r.Header.Get("If-None-Match") == `"r"` {
				h.Set("Cache-Control", "max-age=600")
				h["Set-Cookie"] = []string{"a=1", "b=2"}
				w.WriteHeader(304)
				return
			}
			h.Set("Cache-Control", "max-age=0")
		case r.URL.Path == "/private":
			h.Set("Cache-Control", "private, max-age=60")
		case r.URL.Path == "/error":
			h.Set("Cache-Control", "max-age=0, stale-if-error=600")
		case r.URL.Path == "/behind":
			h.Set("Cache-Control", "max-age=0, stale-while-revalidate=600")
		case r.URL.Path == "/language":
			h.Set("Cache-Control", "max-age=600")
			h.Set("Vary", "Accept-Language")
		case r.URL.Path == "/said":
			h.Set("Cache-Control", "max-age=600")
			h.Set("ETag", `"said"`)
		case r.URL.Path == "/chunked":
			h.Set("Cache-Control", "max-age=600")
			w.(http.Flusher).Flush()
		case r.URL.Path == "/large":
			h.Set("Cache-Control", "max-age=600")
			io.WriteString(w, strings.Repeat("x", 50<<10))
		default:
			h.Set("Cache-Control", "max-age=600")
		}
		fmt.Fprintf(w, "%s %d", r.Header.Get("Accept-Language"), n)
	})
	for name, client := range map[string]*http.Client{"http1": clientOne(t), "http2": clientTwo(t)} {
		t.Run(name, func(t *testing.T) {
			down.Store(false)
			changed.Store(false)
			p := serve(t, one("  - {prefix: /, upstream: up, cache: {largest: 20KiB}, response_headers: {set: {X-Own: \"1\"}}}", upstreamOf(up)+"  outlier: {unreachable: 100}"))
			ask := func(method, path string, header ...string) (*http.Response, string) {
				t.Helper()
				req, _ := http.NewRequest(method, "http://"+p.Address("web").String()+path, nil)
				for i := 0; i+1 < len(header); i += 2 {
					req.Header.Set(header[i], header[i+1])
				}
				resp, err := client.Do(req)
				if err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				if err != nil {
					t.Fatalf("%s: %v", path, err)
				}
				return resp, string(b)
			}
			same := func(path string, header ...string) *http.Response {
				t.Helper()
				first, a := ask("GET", path, header...)
				resp, b := ask("GET", path, header...)
				if a != b || resp.Header.Get("Age") == "" || !strings.HasPrefix(resp.Header.Get("Cache-Status"), "hauberk; hit") || resp.Header.Get("X-Own") != "1" {
					t.Errorf("%s: %q (%v) and %q (%v)", path, a, first.Header, b, resp.Header)
				}
				return resp
			}
			differ := func(path string, header ...string) {
				t.Helper()
				if _, a := ask("GET", path, header...); a != "" {
					if _, b := ask("GET", path, header...); a == b {
						t.Errorf("%s %v: %q twice", path, header, a)
					}
				}
			}
			same("/plain")
			same("/plain?other")
			same("/chunked")
			differ("/private")
			differ("/large")
			differ("/plain", "Cache-Control", "no-store")
			differ("/with", "Authorization", "Basic x")
			differ("/part", "Range", "bytes=0-1")
			same("/language", "Accept-Language", "de")
			same("/language", "Accept-Language", "en")
			same("/said")
			if resp, b := ask("GET", "/said", "If-None-Match", `"said"`); resp.StatusCode != 304 || b != "" || resp.Header.Get("ETag") == "" {
				t.Errorf("has it: %d %q", resp.StatusCode, b)
			}
			if resp, b := ask("HEAD", "/said"); resp.StatusCode != 200 || b != "" || resp.ContentLength < 1 || resp.Header.Get("Age") == "" {
				t.Errorf("HEAD: %d %q %v", resp.StatusCode, b, resp.Header)
			}
			if resp, _ := ask("GET", "/nowhere", "Cache-Control", "only-if-cached"); resp.StatusCode != 504 {
				t.Errorf("only-if-cached: %d", resp.StatusCode)
			}
			if resp := same("/validated"); resp.Header.Get("X-Renewed") == "" || !strings.Contains(resp.Header.Get("Cache-Status"), "fwd-status=304") {
				t.Errorf("found good again: %v", resp.Header)
			}
			changed.Store(true)
			differ("/validated")
			// A cookie of a 304 is for the client that asked, and for nobody else.
			_, a := ask("GET", "/renewed")
			if resp, b := ask("GET", "/renewed"); a != b || strings.Join(resp.Header["Set-Cookie"], " ") != "a=1 b=2" {
				t.Errorf("found good again: %q, %q, %v", a, b, resp.Header)
			}
			for _, tag := range []string{`"r"`, `"other"`} {
				if resp, _ := ask("GET", "/renewed", "If-None-Match", tag); resp.Header["Set-Cookie"] != nil || resp.Header.Get("Age") == "" {
					t.Errorf("another's cookie: %v", resp.Header)
				}
			}
			// What changes a resource forgets what is stored of it.
			_, a = ask("GET", "/plain")
			ask("POST", "/plain")
			if _, b := ask("GET", "/plain"); a == b {
				t.Errorf("after POST: %q twice", a)
			}
			// Stale while it is asked for anew.
			_, a = ask("GET", "/behind")
			if _, b := ask("HEAD", "/behind"); b != "" { // which does not ask for it anew
				t.Errorf("stale, HEAD: %q", b)
			}
			if _, b := ask("GET", "/behind"); a != b {
				t.Errorf("stale: %q, %q", a, b)
			}
			waitFor(t, "answer asked for behind the client's back", func() bool { _, b := ask("GET", "/behind"); return a != b })
			// Stale for an error.
			_, a = ask("GET", "/error")
			down.Store(true)
			if resp, b := ask("GET", "/error"); resp.StatusCode != 200 || a != b {
				t.Errorf("for an error: %d %q, %q", resp.StatusCode, a, b)
			}
			if resp, _ := ask("GET", "/private"); resp.StatusCode != 503 {
				t.Errorf("an error with nothing stored: %d", resp.StatusCode)
			}
			down.Store(false)
			if n := p.purge("http://" + p.Address("web").String() + "/said"); n != 1 {
				t.Errorf("%d purged", n)
			}
			if c := p.cache.Counts(); c.Hits == 0 || c.Revalidated == 0 || c.Stale == 0 || c.Bytes == 0 {
				t.Errorf("%+v", c)
			}
			if n := p.purge(""); n == 0 || p.cache.Counts().Bytes != 0 {
				t.Errorf("%d purged, %+v", n, p.cache.Counts())
			}
		})
	}
}

// TestCollapse has many clients ask for the same at once: the server is asked once.
func TestCollapse(t *testing.T) {
	var hits atomic.Int64
	begun, go_ := make(chan struct{}, 100), make(chan struct{})
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		hits.Add(1)
		begun <- struct{}{}
		<-go_
		w.Header().Set("Cache-Control", "max-age=600")
		io.WriteString(w, "answer")
	})
	p := serveWith(t, one("  - {prefix: /, upstream: up, cache: {}}", upstreamOf(up)), func(p *Proxy) { p.collapse = patience })
	c := clientTwo(t)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			resp, err := c.Get("http://" + p.Address("web").String() + "/a")
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if b, err := io.ReadAll(resp.Body); string(b) != "answer" {
				t.Errorf("%q, %v", b, err)
			}
		})
	}
	<-begun
	waitFor(t, "19 that wait", func() bool { return p.cache.Counts().Collapsed == 19 })
	close(go_)
	wg.Wait()
	if n := hits.Load(); n != 1 {
		t.Errorf("the server was asked %d times", n)
	}
}

// TestCacheApart has two listeners store under the same addresses: neither answers
// with what the other has.
func TestCacheApart(t *testing.T) {
	say := func(what string) string {
		return strings.TrimPrefix(origin(t, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "max-age=600")
			io.WriteString(w, what)
		}), "http://")
	}
	text := "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}, {name: inner, address: '" + freeAddress(t) + `'}]
hosts:
- {names: ['*'], listeners: [inner], routes: [{upstream: inner, cache: {}}]}
- {names: ['*'], listeners: [web], routes: [{upstream: web, cache: {}}]}
upstreams:
- {name: web, endpoints: [{address: '` + say("web") + `'}]}
- {name: inner, endpoints: [{address: '` + say("inner") + `'}]}
`
	p, c := serve(t, text), clientOne(t)
	for _, name := range []string{"inner", "web", "inner", "web"} {
		req, _ := http.NewRequest("GET", "http://"+p.Address(name).String(), nil)
		req.Host = "h"
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != name {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if n := p.purge("http://h/"); n != 2 {
		t.Errorf("%d purged", n)
	}
}

// Routes that would share what they store need names of their own.
func TestCacheNames(t *testing.T) {
	for text, wrong := range map[string]bool{
		"- {names: [a], routes: [{name: x, path: /a, upstream: up, cache: {}}, {name: x, upstream: up, cache: {}}]}":                                 true,
		"- {names: [a], routes: [{name: b/0, upstream: up, cache: {}}]}\n- {names: [b], routes: [{upstream: up, cache: {}}]}":                        true,
		"- {names: [a], routes: [{name: x, path: /a, upstream: up, cache: {}}, {name: x, upstream: up}]}":                                            false,
		"- {names: [a], routes: [{upstream: up, cache: {}}]}\n- {names: [b], routes: [{upstream: up, cache: {}}]}":                                   false,
		"- {names: [a], listeners: [web], routes: [{upstream: up, cache: {}}]}\n- {names: [a], listeners: [b], routes: [{upstream: up, cache: {}}]}": false,
	} {
		_, err := Parse("proxy.yaml", t.TempDir(), []byte("version: 1\nlisteners: [{name: web, address: ':80'}, {name: b, address: ':81'}]\nhosts:\n"+text+"\n"+upstreamOf("127.0.0.1:1")))
		if got := err != nil && strings.Contains(err.Error(), "another route with cache"); got != wrong || !wrong && err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// TestCacheIdentity has clients with certificates ask for the same: the server is told
// who they are, and neither gets what the other has got.
func TestCacheIdentity(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	ca.leaf("server", "", "web.example")
	var hits atomic.Int64
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=600")
		w.Header().Set("Vary", r.URL.Query().Get("vary"))
		fmt.Fprint(w, hits.Add(1), r.Header["X-Forwarded-Client-Cert"], r.Header["X-Set"], r.Header["X-Cut"])
	})
	p := serve(t, `
version: 1
listeners:
- name: web
  address: 127.0.0.1:0
  tls:
    certificates: [{chain: `+dir+`/server.pem, key: `+dir+`/server.key}]
    clients: {ca: `+dir+`/ca.pem, optional: true}
hosts: [{names: ['*'], routes: [{upstream: up, cache: {}, deadline: X-Wait, request_headers: {set: {X-Set: "$remote"}, remove: [X-Cut]}}]}]
`+upstreamOf(up))
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	client := func(certs ...tls.Certificate) func(vary string, header ...string) string {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "web.example", Certificates: certs}}
		t.Cleanup(tr.CloseIdleConnections)
		c := &http.Client{Transport: tr, Timeout: patience}
		return func(vary string, header ...string) string {
			t.Helper()
			req, _ := http.NewRequest("GET", "https://"+p.Address("web").String()+"/?vary="+vary, nil)
			for i := 0; i+1 < len(header); i += 2 {
				req.Header.Set(header[i], header[i+1])
			}
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
	}
	a, b, nobody := client(ca.leaf("a", "spiffe://example.org/a")), client(ca.leaf("b", "spiffe://example.org/b")), client()
	for _, vary := range []string{"", "X-Forwarded-Client-Cert"} {
		for _, pair := range [][2]func(string, ...string) string{{a, b}, {b, a}, {nobody, a}, {a, nobody}} {
			if x, y := pair[0](vary), pair[1](vary); x == y {
				t.Errorf("vary %q: %q twice", vary, x)
			}
		}
	}
	if x, y := nobody("Accept"), nobody("Accept"); x != y {
		t.Errorf("%q and %q to nobody", x, y)
	}
	for _, vary := range []string{"X-Forwarded-For", "accept,x_forwarded_for", "X-Set", "x-cut", "X-Wait", "TE", "X-Named"} {
		if x, y := nobody(vary, "Connection", "X-Named"), nobody(vary, "Connection", "X-Named"); x == y {
			t.Errorf("vary %q: %q twice", vary, x)
		}
	}
}

// TestCacheCut has the answer that is asked for behind the client's back break off, or
// end with trailers: what was stored stays.
func TestCacheCut(t *testing.T) {
	stale := func(n int64, h http.Header, w io.Writer) {
		h.Set("Cache-Control", "max-age=0, stale-while-revalidate=600")
		fmt.Fprint(w, n)
	}
	for name, c := range map[string]struct {
		up    func(t testing.TB, h http.HandlerFunc) string
		text  func(...string) string
		later http.HandlerFunc
	}{
		"cut": {origin, upstreamOf, func(w http.ResponseWriter, r *http.Request) {
			hijack(w, "HTTP/1.1 200 OK\r\nCache-Control: max-age=600\r\n\r\nhal")
		}},
		"trailers": {originTwo, upstreamTwo, func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Cache-Control", "max-age=600")
			w.Header().Set("Trailer", "X-Sum")
			io.WriteString(w, "other")
			w.Header().Set("X-Sum", "1")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var hits atomic.Int64
			p := serve(t, one("  - {prefix: /, upstream: up, cache: {}}", c.text(c.up(t, func(w http.ResponseWriter, r *http.Request) {
				if n := hits.Add(1); n == 1 {
					stale(n, w.Header(), w)
				} else {
					c.later(w, r)
				}
			}))))
			// Once a third has been asked for, what became of the second is known.
			waitFor(t, "three requests", func() bool {
				if _, b := get(t, p, "GET", "/", nil, nil); b != "1" {
					t.Fatalf("%q after %d requests", b, hits.Load())
				}
				return hits.Load() >= 3
			})
		})
	}
}

// deaf asks over HTTP/2 and takes nothing of the body.
func deaf(t testing.TB, p *Proxy, path string) {
	t.Helper()
	c := dial(t, p)
	t.Cleanup(func() { c.Close() })
	b := h2frame.Append([]byte(h2frame.Preface), h2frame.Settings, 0, 0, h2frame.AppendSetting(nil, h2frame.SettingWindow, 0))
	head := append([]byte{0x82, 0x86, 0x04, byte(len(path))}, path...) // GET, http
	b = h2frame.Append(b, h2frame.Headers, h2frame.FlagEndStream|h2frame.FlagEndHeaders, 1, append(head, 0x01, 1, 'h'))
	if _, err := c.Write(b); err != nil {
		t.Fatal(err)
	}
}

// TestCollapseSlow has the client whose request others wait for not read its answer:
// they get theirs all the same.
func TestCollapseSlow(t *testing.T) {
	long := strings.Repeat("x", 200<<10)
	for name, c := range map[string]struct {
		control  string
		stored   bool
		collapse time.Duration
		later    http.HandlerFunc
	}{
		"renewed": {"no-cache", true, time.Hour, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(304) }},
		"error":   {"max-age=0, stale-if-error=600", true, time.Hour, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(503) }},
		"broken":  {"max-age=0, stale-if-error=600", true, time.Hour, func(w http.ResponseWriter, r *http.Request) { hijack(w, "") }},
		"miss":    {"max-age=600", false, 10 * time.Millisecond, nil},
	} {
		t.Run(name, func(t *testing.T) {
			var hits atomic.Int64
			up := origin(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Cache-Control", c.control)
				w.Header().Set("ETag", `"a"`)
				if hits.Add(1); r.Header.Get("If-None-Match") != "" {
					c.later(w, r)
					return
				}
				io.WriteString(w, long)
			})
			p := serveWith(t, one("  - {prefix: /, upstream: up, timeout: 5m, cache: {}}", upstreamOf(up)+"  outlier: {unreachable: 100}"), func(p *Proxy) { p.collapse = c.collapse })
			ask := func() {
				t.Helper()
				if resp, b := get(t, p, "GET", "/a", nil, func(r *http.Request) { r.Host = "h" }); resp.StatusCode != 200 || b != long {
					t.Errorf("%d, %d bytes", resp.StatusCode, len(b))
				}
			}
			if c.stored {
				ask()
			}
			before := hits.Load()
			deaf(t, p, "/a")
			waitFor(t, "its request", func() bool { return hits.Load() > before })
			ask()
			ask()
		})
	}
}

// TestCacheChange has a request change what another gets at the same time, and is
// about to: what was stored is gone before the first knows that it has.
func TestCacheChange(t *testing.T) {
	var hits atomic.Int64
	held, begun, posted := make(chan struct{}), make(chan struct{}), make(chan struct{})
	answer, end := sync.OnceFunc(func() { close(held) }), sync.OnceFunc(func() { close(posted) })
	defer answer()
	defer end()
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		n := hits.Add(1)
		switch {
		case r.Method == "POST":
			w.(http.Flusher).Flush()
			<-posted
			return
		case n == 2:
			close(begun)
			<-held
		}
		w.Header().Set("Cache-Control", "max-age=600")
		fmt.Fprint(w, n)
	})
	p := serveWith(t, one("  - {prefix: /, upstream: up, cache: {}}", upstreamOf(up)), func(p *Proxy) { p.collapse = time.Hour })
	c := clientOne(t)
	ask := func(method, path string) *http.Response {
		t.Helper()
		req, _ := http.NewRequest(method, "http://"+p.Address("web").String()+path, nil)
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	read := func(resp *http.Response) string {
		t.Helper()
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	first := read(ask("GET", "/a"))
	old := make(chan string, 1)
	go func() {
		resp, err := c.Get("http://" + p.Address("web").String() + "/b")
		if err != nil {
			old <- err.Error()
			return
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		old <- string(b)
	}()
	<-begun
	// The head of the answer has come, and no more.
	a, b := ask("POST", "/a"), ask("POST", "/b")
	if got := read(ask("GET", "/a")); got == first {
		t.Errorf("%q after its change", got)
	}
	second := read(ask("GET", "/b")) // does not wait for the one from before
	end()
	read(a)
	read(b)
	answer()
	if got := <-old; got != "2" {
		t.Errorf("asked before: %q", got)
	}
	if got := read(ask("GET", "/b")); got == "2" || second == "2" {
		t.Errorf("%q and %q after the change", second, got)
	}
}
