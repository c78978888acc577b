package alone

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/mesh/http2"
)

// originTwo is a server of HTTP/2 by prior knowledge, and of HTTP/1.
func originTwo(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	go s.Serve(ln)
	t.Cleanup(func() { s.Close() })
	return ln.Addr().String()
}

// clientTwo speaks HTTP/2 by prior knowledge.
func clientTwo(t testing.TB) *http.Client {
	tr := &http.Transport{Protocols: new(http.Protocols), DisableCompression: true}
	tr.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

func clientOne(t testing.TB) *http.Client {
	tr := &http.Transport{DisableCompression: true}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: patience}
}

func upstreamTwo(addresses ...string) string {
	return strings.Replace(upstreamOf(addresses...), "- name: up\n", "- name: up\n  protocol: http2\n", 1)
}

// TestTwo sends the same requests over each pair of protocols: the answers are
// the same.
func TestTwo(t *testing.T) {
	handler := func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Saw", fmt.Sprintf("%s %s host=%s xff=%s cookie=%s n=%d", r.Method, r.URL, r.Host, r.Header.Get("X-Forwarded-For"), r.Header.Get("Cookie"), len(b)))
		w.Header().Set("X-Proto", r.Proto+" te="+r.Header.Get("Te"))
		switch r.URL.Path {
		case "/flush":
			w.(http.Flusher).Flush()
		case "/none":
			w.WriteHeader(204)
			return
		case "/missing":
			w.WriteHeader(404)
		}
		if r.Method != "HEAD" {
			w.Write(b)
		}
	}
	old := origin(t, handler)
	two := originTwo(t, handler)
	for name, up := range map[string]string{"http1": upstreamOf(old), "http2": upstreamTwo(two)} {
		p := serve(t, one(`
  - {prefix: /, upstream: up, response_headers: {set: {X-Who: "$remote"}}}`, up))
		for client, c := range map[string]*http.Client{"http1": clientOne(t), "http2": clientTwo(t)} {
			t.Run(client+" to "+name, func(t *testing.T) {
				for _, path := range []string{"/plain", "/flush", "/none", "/missing"} {
					for _, size := range []int{0, 1, 5000, 40 << 10, 3 << 20} {
						for _, framed := range []bool{true, false} {
							askTwo(t, c, p, name, path, size, framed)
						}
					}
				}
			})
		}
	}
}

func askTwo(t *testing.T, c *http.Client, p *Proxy, up, path string, size int, framed bool) {
	t.Helper()
	sent := bytes.Repeat([]byte("y"), size)
	var body io.Reader = bytes.NewReader(sent)
	if !framed {
		body = io.MultiReader(body)
	}
	req, _ := http.NewRequest("POST", "http://"+p.Address("web").String()+path+"?q=1", body)
	req.Host = "example.com"
	req.Header.Set("Te", "trailers")
	req.Header.Set("Cookie", "a=1; b=2")
	req.Header.Set("X-Forwarded-For", "6.6.6.6")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatalf("%s %d framed=%v: %v", path, size, framed, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s %d framed=%v: read: %v", path, size, framed, err)
	}
	want := map[string]int{"/none": 204, "/missing": 404}[path]
	if want == 0 {
		want = 200
	}
	if path == "/none" {
		sent = nil
	}
	saw := fmt.Sprintf("POST %s?q=1 host=example.com xff=127.0.0.1 cookie=a=1; b=2 n=%d", path, size)
	proto := map[string]string{"http1": "HTTP/1.1 te=", "http2": "HTTP/2.0 te=trailers"}[up]
	if resp.StatusCode != want || !bytes.Equal(got, sent) || resp.Header.Get("X-Saw") != saw || resp.Header.Get("X-Who") != "127.0.0.1" || resp.Header.Get("X-Proto") != proto {
		t.Fatalf("%s %d framed=%v: %d, %d bytes, %v", path, size, framed, resp.StatusCode, len(got), resp.Header)
	}
}

// TestTwoOwn has the proxy answer by itself.
func TestTwoOwn(t *testing.T) {
	dir := t.TempDir()
	text := strings.Repeat("some text ", 10000)
	if err := os.Mkdir(dir+"/files", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/files/a.txt", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	p := serve(t, one(`
  - {path: /redirect, redirect: {to: "https://$host$uri"}}
  - {path: /say, respond: {status: 418, body: "short and stout"}}
  - {path: /limited, rate: {requests: 1, per: 1h}, respond: {status: 200, body: "ok"}}
  - {prefix: /files/, static: {root: `+dir+`}, gzip: {min: 10}}`))
	c := clientTwo(t)
	ask := func(method, path string, header ...string) (*http.Response, string) {
		t.Helper()
		req, _ := http.NewRequest(method, "http://"+p.Address("web").String()+path, nil)
		for i := 0; i+1 < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		if resp.ProtoMajor != 2 {
			t.Fatalf("answer of %s", resp.Proto)
		}
		return resp, string(b)
	}
	if resp, _ := ask("GET", "/redirect"); resp.StatusCode != 308 || !strings.HasPrefix(resp.Header.Get("Location"), "https://") {
		t.Errorf("redirect: %d %v", resp.StatusCode, resp.Header)
	}
	if resp, b := ask("GET", "/say"); resp.StatusCode != 418 || b != "short and stout" {
		t.Errorf("respond: %d %q", resp.StatusCode, b)
	}
	ask("GET", "/limited")
	if resp, b := ask("GET", "/limited"); resp.StatusCode != 429 || resp.Header.Get("Retry-After") == "" || !strings.Contains(b, "rate") {
		t.Errorf("limited: %d %q", resp.StatusCode, b)
	}
	if resp, _ := ask("GET", "/nothing"); resp.StatusCode != 404 {
		t.Errorf("no route: %d", resp.StatusCode)
	}
	if resp, b := ask("GET", "/files/a.txt"); resp.StatusCode != 200 || b != text {
		t.Errorf("file: %d, %d bytes", resp.StatusCode, len(b))
	}
	if resp, b := ask("GET", "/files/a.txt", "Range", "bytes=5-8"); resp.StatusCode != 206 || b != "text" {
		t.Errorf("range: %d %q", resp.StatusCode, b)
	}
	if resp, b := ask("HEAD", "/files/a.txt"); resp.StatusCode != 200 || b != "" || resp.ContentLength != int64(len(text)) {
		t.Errorf("head: %d %q %d", resp.StatusCode, b, resp.ContentLength)
	}
	resp, b := ask("GET", "/files/a.txt", "Accept-Encoding", "gzip")
	z, err := gzip.NewReader(strings.NewReader(b))
	if err != nil {
		t.Fatalf("gzip: %d %v: %v", resp.StatusCode, resp.Header, err)
	}
	if plain, err := io.ReadAll(z); err != nil || string(plain) != text {
		t.Errorf("gzip: %d bytes, %v", len(plain), err)
	}
}

// serviceOf is a gRPC server with one method of each kind, without generated code.
func serviceOf(t testing.TB, name string) (address string, calls *atomic.Int64) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	calls = new(atomic.Int64)
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, st grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(st)
		calls.Add(1)
		st.SendHeader(metadata.Pairs("x-name", name))
		st.SetTrailer(metadata.Pairs("x-after", name))
		for {
			var m wrapperspb.BytesValue
			if err := st.RecvMsg(&m); err == io.EOF {
				return nil
			} else if err != nil {
				return err
			}
			switch {
			case strings.HasSuffix(method, "/Fail"):
				return status.Error(codes.FailedPrecondition, "not now, "+name)
			case strings.HasSuffix(method, "/Hang"):
				<-st.Context().Done()
				return st.Context().Err()
			}
			if err := st.SendMsg(&m); err != nil {
				return err
			}
			if strings.HasSuffix(method, "/Unary") {
				return nil
			}
		}
	}))
	go s.Serve(ln)
	t.Cleanup(s.Stop)
	return ln.Addr().String(), calls
}

func grpcTo(t testing.TB, p *Proxy) *grpc.ClientConn {
	t.Helper()
	c, err := grpc.NewClient("passthrough:///"+p.Address("web").String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

var bidi = &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}

func TestGRPC(t *testing.T) {
	a, _ := serviceOf(t, "a")
	b, _ := serviceOf(t, "b")
	p := serve(t, one(`
  - {prefix: /limited.Echo, rate: {requests: 1, per: 1h}, upstream: up}
  - {prefix: /test.Echo, upstream: up}`, strings.Replace(upstreamTwo(a, b), "http2", "grpc\n  balance: round-robin", 1)))
	c := grpcTo(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	seen := map[string]int{}
	for i := range 20 {
		var header, trailer metadata.MD
		in, out := wrapperspb.Bytes(bytes.Repeat([]byte{byte(i)}, i*7000)), new(wrapperspb.BytesValue)
		if err := c.Invoke(ctx, "/test.Echo/Unary", in, out, grpc.Header(&header), grpc.Trailer(&trailer)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(in.Value, out.Value) || header.Get("x-name")[0] != trailer.Get("x-after")[0] {
			t.Fatalf("%d bytes for %d, %v, %v", len(out.Value), len(in.Value), header, trailer)
		}
		seen[header.Get("x-name")[0]]++
	}
	if seen["a"] != 10 || seen["b"] != 10 {
		t.Errorf("calls of one connection go to %v", seen)
	}
	st, err := c.NewStream(ctx, bidi, "/test.Echo/Stream")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 { // each waits for the one before: nothing is held back
		in, out := wrapperspb.Bytes(bytes.Repeat([]byte{byte(i)}, i*100)), new(wrapperspb.BytesValue)
		if err := st.SendMsg(in); err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(out); err != nil || !bytes.Equal(in.Value, out.Value) {
			t.Fatalf("message %d: %v", i, err)
		}
	}
	st.CloseSend()
	if err := st.RecvMsg(new(wrapperspb.BytesValue)); err != io.EOF || len(st.Trailer().Get("x-after")) != 1 {
		t.Errorf("end: %v, %v", err, st.Trailer())
	}
	for method, want := range map[string]codes.Code{"/test.Echo/Fail": codes.FailedPrecondition, "/other.Echo/Unary": codes.Unimplemented} {
		err := c.Invoke(ctx, method, wrapperspb.Bytes(nil), new(wrapperspb.BytesValue))
		if status.Code(err) != want {
			t.Errorf("%s: %v", method, err)
		}
	}
	c.Invoke(ctx, "/limited.Echo/Unary", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue))
	if err := c.Invoke(ctx, "/limited.Echo/Unary", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue)); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "rate") {
		t.Errorf("limited: %v", err)
	}
}

// TestGRPCGone has a client give up a call, and a server disappear.
func TestGRPCGone(t *testing.T) {
	ended := make(chan struct{}, 1)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, st grpc.ServerStream) error {
		<-st.Context().Done()
		ended <- struct{}{}
		return nil
	}))
	go s.Serve(ln)
	defer s.Stop()
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamTwo(ln.Addr().String())))
	c := grpcTo(t, p)
	ctx, cancel := context.WithCancel(context.Background())
	if _, err := c.NewStream(ctx, bidi, "/test.Echo/Stream"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a call under way", func() bool { return p.world.Load().upstreams["up"].endpoints[0].active.Load() == 1 })
	cancel()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("the server does not hear that the client has given up")
	}
	ctx, cancel = context.WithTimeout(context.Background(), patience)
	defer cancel()
	st, err := c.NewStream(ctx, bidi, "/test.Echo/Stream")
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a call under way", func() bool { return p.world.Load().upstreams["up"].endpoints[0].active.Load() == 1 })
	s.Stop()
	if err := st.RecvMsg(new(wrapperspb.BytesValue)); status.Code(err) != codes.Unavailable {
		t.Errorf("server gone: %v", err)
	}
	if err := c.Invoke(ctx, "/test.Echo/Unary", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue)); status.Code(err) != codes.Unavailable {
		t.Errorf("no server: %v", err)
	}
}

func waitFor(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s", what)
		}
	}
}

// TestTwoShared has many clients share the connections to a server.
func TestTwoShared(t *testing.T) {
	var mu sync.Mutex
	from := map[string]int{}
	up := originTwo(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		from[r.RemoteAddr]++
		mu.Unlock()
		io.WriteString(w, "hello")
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamTwo(up)))
	var wg sync.WaitGroup
	for i := range 8 {
		c := clientTwo(t)
		if i%2 == 0 {
			c = clientOne(t)
		}
		wg.Go(func() {
			for range 20 {
				resp, err := c.Get("http://" + p.Address("web").String())
				if err != nil {
					t.Error(err)
					return
				}
				io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
		})
	}
	wg.Wait()
	if len(from) != 1 {
		t.Errorf("%d connections: %v", len(from), from)
	}
}

// sink counts the answers of a client's connection.
type sink struct{ over chan struct{} }

func (k *sink) Head(*http2.Head) {}
func (k *sink) Data(p []byte, end bool) int {
	if end {
		k.over <- struct{}{}
	}
	return len(p)
}
func (k *sink) Trailers([]http2.Field) { k.over <- struct{}{} }
func (k *sink) Sent(int)               {}
func (k *sink) Lost(error)             { close(k.over) }

// TestTwoAllocations counts what a request of HTTP/2 costs, with what the client
// of the test itself allocates for it: HPACK makes strings, and a stream is new.
func TestTwoAllocations(t *testing.T) {
	ln := fixedOrigin(t)
	p := serve(t, "access_log: {path: /dev/null}\n"+one("  - {prefix: /, upstream: up}", upstreamOf(ln)))
	c, err := net.Dial("tcp", p.Address("web").String())
	if err != nil {
		t.Fatal(err)
	}
	conn := http2.Client(&carrier{c, c.(*net.TCPConn), nil}, http2.Options{})
	go conn.Run()
	defer conn.Close()
	k := &sink{make(chan struct{}, 1)}
	fields := []http2.Field{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/a/b?c=d"}, {Name: ":authority", Value: "example.com"}, {Name: "user-agent", Value: "test"}}
	ask := func() {
		s, err := conn.Ask(fields, true, k)
		if err != nil {
			t.Fatal(err)
		}
		s.Flush()
		if _, ok := <-k.over; !ok {
			t.Fatal("lost")
		}
	}
	for range 200 {
		ask()
	}
	n := testing.AllocsPerRun(2000, ask)
	t.Logf("%v allocations per request, those of the client among them", n)
	most := 6.0
	if raced {
		most = 16 // the blocks that the pool forgets
	}
	if n > most {
		t.Errorf("%v allocations per request", n)
	}
}
