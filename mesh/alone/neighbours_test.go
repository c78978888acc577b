package alone

import (
	"encoding/binary"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/http2"
)

// TestGivenUp has a client give a server no time: the server stays in for everybody,
// and so does the connection that is shared.
func TestGivenUp(t *testing.T) {
	for name, of := range map[string]struct {
		client func(testing.TB) *http.Client
		config func(...string) string
		header [2]string
		shared bool
	}{
		"HTTP/1": {clientOne, upstreamOf, [2]string{"X-Wait", "1"}, false},
		"HTTP/2": {clientTwo, upstreamTwo, [2]string{"X-Wait", "1"}, true},
		"gRPC":   {clientTwo, upstreamTwo, [2]string{"Grpc-Timeout", "1m"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			var mu sync.Mutex
			from := map[string]bool{}
			up := originTwo(t, func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				from[r.RemoteAddr] = true
				mu.Unlock()
				if r.URL.Path == "/slow" {
					<-r.Context().Done()
				}
			})
			p := serve(t, one("  - {prefix: /, upstream: up, deadline: X-Wait}", of.config(up)))
			c := of.client(t)
			ask := func(path string, header ...string) int {
				req, _ := http.NewRequest("POST", "http://"+p.Address("web").String()+path, strings.NewReader("x"))
				if name == "gRPC" {
					req.Header.Set("Content-Type", "application/grpc")
				}
				if len(header) > 0 {
					req.Header.Set(header[0], header[1])
				}
				resp, err := c.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				io.Copy(io.Discard, resp.Body)
				if code := resp.Header.Get("Grpc-Status"); code == "4" {
					return 504
				}
				return resp.StatusCode
			}
			if status := ask("/"); status != 200 {
				t.Fatal(status)
			}
			if status := ask("/slow", of.header[:]...); status != 504 {
				t.Errorf("in no time: %d", status)
			}
			if !allUp(p) {
				t.Error("the server is left out")
			}
			if status := ask("/"); status != 200 {
				t.Errorf("after: %d", status)
			}
			mu.Lock()
			defer mu.Unlock()
			if of.shared && len(from) != 1 {
				t.Errorf("over %d connections", len(from))
			}
		})
	}
}

// TestHedgeGivenUp is the same with two servers asked.
func TestHedgeGivenUp(t *testing.T) {
	slow := func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	p := serve(t, one("  - {prefix: /, upstream: up, deadline: X-Wait, hedge: {after: 1ms, percent: 300}}", upstreamOf(origin(t, slow), origin(t, slow))))
	for range 3 {
		resp, _ := get(t, p, "GET", "/", nil, func(r *http.Request) { r.Header.Set("X-Wait", "50") })
		if resp.StatusCode != 504 || !allUp(p) {
			t.Fatalf("%d, all up %v", resp.StatusCode, allUp(p))
		}
	}
}

// TestRPCGivenUp is the same with calls of bolt. Dubbo's tell no time.
func TestRPCGivenUp(t *testing.T) {
	o := newRPCOrigin(t, "o", false)
	p := serve(t, rpcConfig("bolt", "  - {upstream: up}", "up", endpointsOf(o)))
	x := newRPCTester(t, p, "rpc", false)
	x.send(callOf(false, 1, "com.test.S", "m"))
	if f := x.next(); !f.ok {
		t.Fatalf("%+v", f)
	}
	brief := callOf(false, 3, "com.test.S", "hang")
	binary.BigEndian.PutUint32(brief[10:], 1) // its timeout
	x.send(brief)
	if f := x.next(); f.id != 3 || f.bolt.Status != bolt.Timeout {
		t.Errorf("in no time: %+v", f)
	}
	if !allUp(p) {
		t.Error("the server is left out")
	}
	x.send(callOf(false, 5, "com.test.S", "m"))
	if f := x.next(); !f.ok || o.conns.Load() != 1 {
		t.Errorf("after: %+v, over %d connections", f, o.conns.Load())
	}
}

// TestUnderscores has clients write what a route sets or removes as servers that make
// variables of names read it.
func TestUnderscores(t *testing.T) {
	edits := "request_headers: {remove: [X-Admin, y_admin], set: {X-User: nobody}}"
	var mu sync.Mutex
	var seen []string
	note := func(names ...string) {
		mu.Lock()
		defer mu.Unlock()
		for _, n := range names {
			switch strings.ReplaceAll(strings.ToLower(n), "_", "-") {
			case "x-admin", "y-admin", "x-user":
				seen = append(seen, n)
			}
		}
	}
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { note(slices.Collect(maps.Keys(r.Header))...) })
	raw, err := proto.Marshal(&descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{protodesc.ToFileDescriptorProto(health.File_grpc_health_v1_health_proto)}})
	if err != nil {
		t.Fatal(err)
	}
	set := filepath.Join(t.TempDir(), "health.pb")
	if err := os.WriteFile(set, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	p := serve(t, one("  - {prefix: /, upstream: up, "+edits+"}", upstreamOf(up)))
	q := serve(t, one("  - {prefix: /, upstream: up, transcode: {descriptors: '"+set+"'}, "+edits+"}", strings.Replace(upstreamTwo(originTwo(t, func(w http.ResponseWriter, r *http.Request) {
		note(slices.Collect(maps.Keys(r.Header))...)
	})), "http2", "grpc", 1)))
	for name, ask := range map[string]func(func(*http.Request)){
		"plain": func(edit func(*http.Request)) { get(t, p, "GET", "/", nil, edit) },
		"transcoded": func(edit func(*http.Request)) {
			get(t, q, "POST", "/grpc.health.v1.Health/Check", strings.NewReader("{}"), edit)
		},
	} {
		seen = nil
		ask(func(r *http.Request) {
			r.Header.Set("Content-Type", "application/json")
			for _, n := range []string{"X-Admin", "x-admin", "X_Admin", "x_admin", "Y_Admin", "y-admin", "X_User", "x_user", "x-user"} {
				r.Header[n] = []string{"root"}
			}
		})
		mu.Lock()
		if len(seen) != 1 || seen[0] != "X-User" {
			t.Errorf("%s: the server is told %q", name, seen)
		}
		mu.Unlock()
	}
}

// TestCacheRewritten gives each client what its own address was made into.
func TestCacheRewritten(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "max-age=3600")
		io.WriteString(w, r.URL.Path)
	})
	p := serve(t, one("  - {prefix: /, upstream: up, cache: {}, rewrite: /of/$remote/mine}", upstreamOf(up)))
	for range 2 {
		for _, from := range []string{"127.0.0.1", "127.0.0.2"} {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
			tr := &http.Transport{DialContext: d.DialContext}
			t.Cleanup(tr.CloseIdleConnections)
			resp, err := (&http.Client{Transport: tr, Timeout: patience}).Get("http://" + p.Address("web").String() + "/me")
			if err != nil {
				t.Fatal(err)
			}
			b, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if want := "/of/" + from + "/mine"; string(b) != want {
				t.Errorf("%s gets %q", from, b)
			}
		}
	}
	if n := p.purge("http://" + p.Address("web").String() + "/me"); n != 2 {
		t.Errorf("%d are forgotten", n)
	}
}

// TestRPCNoRoom has some clients ask for more than there is room for: their calls are
// refused, and nobody else hears of it.
func TestRPCNoRoom(t *testing.T) {
	for protocol, isDubbo := range map[string]bool{"bolt": false, "dubbo": true} {
		t.Run(protocol, func(t *testing.T) {
			o := newRPCOrigin(t, "o", isDubbo)
			p := serveWith(t, rpcConfig(protocol, "  - {upstream: up}", "up", endpointsOf(o)), func(p *Proxy) {
				p.held.most, p.answers.most = 200<<10, 20<<10
			})
			release := sync.OnceFunc(func() { close(o.held) })
			defer release()
			long := func(id, size int) []byte {
				if isDubbo {
					b := append(callOf(true, id, "com.test.S", "m"), make([]byte, size)...)
					binary.BigEndian.PutUint32(b[12:], uint32(len(b)-dubbo.HeaderLen))
					return b
				}
				return boltCall(bolt.Request, uint32(id), "com.test.S:1.0", "m", id%2 == 0, strings.Repeat("\x01x", size/2))
			}
			refused := func(f rpcFrame, id uint64) bool {
				return f.id == id && (!isDubbo && f.bolt.Status == bolt.Busy || isDubbo && f.dubbo.Status == dubbo.Exhausted)
			}
			for range 4 {
				newRPCTester(t, p, "rpc", isDubbo).send(long(1, 50<<10)[:100]) // and no more
			}
			b, c := newRPCTester(t, p, "rpc", isDubbo), newRPCTester(t, p, "rpc", isDubbo)
			b.send(callOf(isDubbo, 2, "com.test.S", "hold"))
			waitFor(t, "a call", func() bool { return o.calls.Load() == 1 })
			for id := range 4 { // bolt with a sum and without
				c.send(callOf(isDubbo, id, "com.test.S", "large"))
				if f := c.next(); !refused(f, uint64(id)) {
					t.Fatalf("an answer without room: %+v", f)
				}
				c.send(long(id, 700<<10))
				if f := c.next(); !refused(f, uint64(id)) {
					t.Fatalf("a call without room: %+v", f)
				}
				c.send(callOf(isDubbo, id, "com.test.S", "m"), long(id, 50<<10))
				for range 2 {
					if f := c.next(); !f.ok || f.id != uint64(id) {
						t.Fatalf("a call after: %+v", f)
					}
				}
			}
			release()
			if f := b.next(); !f.ok || f.id != 2 {
				t.Errorf("another's call: %+v", f)
			}
			if !allUp(p) || o.conns.Load() != 1 {
				t.Errorf("all up %v, %d connections", allUp(p), o.conns.Load())
			}
			waitFor(t, "end of what is held", func() bool { return p.held.n.Load() == 0 && p.answers.n.Load() == 0 })
		})
	}
}

// ear is a server that hears the trailers of a request, and answers with its own.
type ear struct {
	s    *http2.Stream
	told chan []http2.Field
}

func (e *ear) Head(*http2.Head) {}
func (e *ear) Data(p []byte, end bool) int {
	if end {
		e.Trailers(nil)
	}
	return len(p)
}
func (e *ear) Trailers(fields []http2.Field) {
	e.told <- slices.Clone(fields)
	go func() {
		e.s.SendHead([]http2.Field{{Name: ":status", Value: "200"}}, false, false)
		e.s.SendTrailers([]http2.Field{{Name: "x-secret", Value: "s"}, {Name: "x-sum", Value: "1"}})
		e.s.Flush()
	}()
}
func (e *ear) Sent(int)   {}
func (e *ear) Lost(error) {}

// TestTrailersSayNoMore has trailers say what heads may not.
func TestTrailersSayNoMore(t *testing.T) {
	told := make(chan []http2.Field, 1)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			conn := http2.Server(&carrier{c, c.(*net.TCPConn), nil}, http2.Options{Request: func(st *http2.Stream, _ *http2.Head) { st.Receive(&ear{st, told}) }})
			go conn.Run()
		}
	}()
	up := ln.Addr().String()
	p := serve(t, one("  - {prefix: /, upstream: up, request_headers: {remove: [X-User]}, response_headers: {remove: [X-Secret]}}", upstreamTwo(up)))
	c := clientTwo(t)
	refused := []string{"X-Forwarded-For", "X-Forwarded-Client-Cert", "X-Real-Ip", "X_real_ip", "X-User", "X_user"}
	for _, also := range []bool{true, false} {
		req, _ := http.NewRequest("POST", "http://"+p.Address("web").String(), io.MultiReader(strings.NewReader("x")))
		req.Trailer = http.Header{}
		for _, name := range refused {
			req.Trailer[name] = []string{"root"}
		}
		if also {
			req.Trailer.Set("X-Sum", "1")
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		said, sum := resp.Trailer, false
		for _, f := range <-told {
			if f.Name != "x-sum" {
				t.Errorf("the server is told %s", f.Name)
			}
			sum = true
		}
		if sum != also {
			t.Errorf("the server is told of a sum: %v", sum)
		}
		if said.Get("X-Sum") != "1" || said.Get("X-Secret") != "" {
			t.Errorf("the client is told %v", said)
		}
	}
}

// TestLateTrailers has an answer that tells its length end later than with its last
// byte.
func TestLateTrailers(t *testing.T) {
	var hits, cancelled atomic.Int64
	more := make(chan struct{}, 1)
	up := originTwo(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "X-Sum")
		w.Header().Set("Content-Length", "4")
		w.Header().Set("Cache-Control", "max-age=3600")
		io.WriteString(w, "body")
		w.(http.Flusher).Flush()
		<-more // once the client has the body
		time.Sleep(50 * time.Millisecond)
		if r.Context().Err() != nil {
			cancelled.Add(1)
		}
		w.Header().Set("X-Sum", "1")
		hits.Add(1)
	})
	p := serve(t, one("  - {prefix: /plain, upstream: up}\n  - {prefix: /, upstream: up, cache: {}}", upstreamTwo(up)))
	for name, c := range map[string]*http.Client{"HTTP/1": clientOne(t), "HTTP/2": clientTwo(t)} {
		for i, path := range []string{"/plain", "/stored", "/stored"} {
			if name == "HTTP/1" && path == "/plain" {
				continue // which has nothing to wait for
			}
			before, lost := hits.Load(), cancelled.Load()
			resp, err := c.Get("http://" + p.Address("web").String() + path)
			if err != nil {
				t.Fatal(err)
			}
			body := make([]byte, 4)
			if _, err := io.ReadFull(resp.Body, body); err != nil {
				t.Fatal(err)
			}
			if hits.Load() != before {
				t.Errorf("%s %s: the body waits for the trailers, or is a stored one", name, path)
				break
			}
			more <- struct{}{}
			io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
			if name == "HTTP/2" && resp.Trailer.Get("X-Sum") != "1" {
				t.Errorf("%s: trailers %v", path, resp.Trailer)
			}
			waitFor(t, "end of the answer", func() bool { return hits.Load() == before+1 })
			if n := cancelled.Load() - lost; n > 0 && name == "HTTP/2" {
				t.Errorf("%s, request %d: %d were cancelled", name, i, n)
			}
		}
	}
}
