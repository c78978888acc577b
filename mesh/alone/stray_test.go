package alone

import (
	"bufio"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"hauberk.dev/mesh/http2"
)

// serveConns serves connections with f, to the end of the test.
func serveConns(t testing.TB, ln net.Listener, f func(net.Conn)) {
	t.Helper()
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			all.Go(func() { f(c); c.Close() })
		}
	})
	t.Cleanup(func() { ln.Close(); all.Wait() })
}

func listenTCP(t testing.TB) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// What a server says unasked, behind an answer that is whole, is no answer to the
// request of the next client.
func TestStrayAnswer(t *testing.T) {
	go1, said := make(chan bool), make(chan bool)
	ln := listenTCP(t)
	serveConns(t, ln, func(c net.Conn) {
		r := bufio.NewReader(c)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright")
			if req.URL.Path == "/first" {
				<-go1
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong")
				close(said)
			}
		}
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(ln.Addr().String())))
	if _, got := get(t, p, "GET", "/first", nil, nil); got != "right" {
		t.Fatalf("%q", got)
	}
	go1 <- true
	<-said
	for _, path := range []string{"/second", "/third"} {
		if resp, got := get(t, p, "GET", path, nil, nil); got != "right" {
			t.Errorf("%s: %d %q, said to another", path, resp.StatusCode, got)
		}
	}
}

// upstreamTLSOf is an upstream with TLS at ln, and what its server needs for that.
func upstreamTLSOf(t testing.TB, ln net.Listener) (string, *tls.Config) {
	t.Helper()
	dir := t.TempDir()
	certify(t, dir, "s", "localhost")
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "s.pem"), filepath.Join(dir, "s.key"))
	if err != nil {
		t.Fatal(err)
	}
	return "upstreams:\n- name: up\n  endpoints: [{address: '" + ln.Addr().String() + "'}]\n  tls: {name: localhost, ca: " + filepath.Join(dir, "s.pem") + "}\n",
		&tls.Config{Certificates: []tls.Certificate{cert}}
}

// gathering keeps what is written to it, where on, to be sent as one.
type gathering struct {
	net.Conn
	on bool
	b  []byte
}

func (g *gathering) Write(p []byte) (int, error) {
	if !g.on {
		return g.Conn.Write(p)
	}
	g.b = append(g.b, p...)
	return len(p), nil
}

// The same where TLS has read the stray answer, or part of it, along with the one
// before. A server that says nothing unasked keeps its connection.
func TestStrayAnswerTLS(t *testing.T) {
	for _, c := range []struct {
		name       string
		unasked    string
		cut, conns int
	}{
		{"whole", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong", 0, 2},
		{"cut", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong", 7, 2},
		{"cut head", "x", 20, 2}, // 3 bytes of it are there in TLS 1.3
		{"none", "", 0, 1},
	} {
		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			t.Run(c.name+" "+tls.VersionName(version), func(t *testing.T) {
				ln := listenTCP(t)
				text, config := upstreamTLSOf(t, ln)
				config.MaxVersion = version
				var conns atomic.Int32
				serveConns(t, ln, func(under net.Conn) {
					conns.Add(1)
					g := &gathering{Conn: under}
					tc := tls.Server(g, config)
					for r := bufio.NewReader(tc); ; {
						req, err := http.ReadRequest(r)
						if err != nil {
							return
						}
						g.on = true
						io.WriteString(tc, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright")
						if req.URL.Path == "/first" {
							io.WriteString(tc, c.unasked)
							g.b = g.b[:len(g.b)-c.cut]
						}
						under.Write(g.b)
						g.on, g.b = false, nil
					}
				})
				p := serve(t, one("  - {prefix: /, upstream: up}", text))
				for _, path := range []string{"/first", "/second", "/third", "/fourth"} {
					if resp, got := get(t, p, "GET", path, nil, nil); got != "right" {
						t.Errorf("%s: %d %q", path, resp.StatusCode, got)
					}
					waitFor(t, "the connection to be at rest", func() bool { return p.resting("up") == 1 })
				}
				if n := int(conns.Load()); n != c.conns {
					t.Errorf("%d connections, want %d", n, c.conns)
				}
			})
		}
	}
}

// A server that ends a connection of TLS at rest costs no request, whatever it asks.
func TestStaleTLS(t *testing.T) {
	read, ended := make(chan bool, 9), make(chan bool, 9)
	ln := listenTCP(t)
	text, config := upstreamTLSOf(t, ln)
	serveConns(t, tls.NewListener(ln, config), func(c net.Conn) {
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			return
		}
		io.Copy(io.Discard, req.Body)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		<-read
		c.Close()
		ended <- true
	})
	t.Cleanup(func() { close(read) })
	p := serve(t, one("  - {prefix: /, upstream: up}", text))
	for i := range 4 {
		if resp, got := get(t, p, "POST", "/", strings.NewReader("x"), nil); resp.StatusCode != 200 {
			t.Fatalf("request %d: %d %q", i, resp.StatusCode, got)
		}
		read <- true
		<-ended
	}
}

// A kept connection that ends under a request which may not be sent twice costs that
// request, and its endpoint nothing. One that ends a new connection so is blamed.
func TestStalePost(t *testing.T) {
	const answer = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
	schema, types := bankSchema(t)
	for name, route := range map[string]string{"HTTP": "{prefix: /, upstream: up}", "JSON": "{transcode: {descriptors: '" + schema + "', to: json}, upstream: up}"} {
		for kept, want := range map[string]bool{"kept": true, "new": false} {
			t.Run(name+" "+kept, func(t *testing.T) {
				ln := listenTCP(t)
				serveConns(t, ln, func(c net.Conn) {
					for r := bufio.NewReader(c); ; {
						req, err := http.ReadRequest(r)
						if err != nil || req.Method == "POST" { // which Pay is
							if err == nil {
								io.Copy(io.Discard, req.Body)
							}
							return
						}
						io.WriteString(c, answer)
					}
				})
				p := serve(t, one("  - "+route, upstreamOf(ln.Addr().String())))
				ask := func(method string) bool {
					resp, _ := get(t, p, map[string]string{"Get": "GET", "Pay": "POST"}[method], "/", nil, nil)
					return resp.StatusCode == 200
				}
				if name == "JSON" {
					conn := grpcTo(t, p)
					ask = func(method string) bool {
						q, r := dynamicpb.NewMessage(types.ByName("Account")), dynamicpb.NewMessage(types.ByName("Account"))
						q.Set(q.Descriptor().Fields().ByName("id"), protoreflect.ValueOfString("7"))
						return conn.Invoke(t.Context(), "/bank.v1.Bank/"+method, q, r) == nil
					}
				}
				if want {
					if !ask("Get") {
						t.Fatal("no answer")
					}
					waitFor(t, "the connection to be at rest", func() bool { return p.resting("up") == 1 })
				}
				if ask("Pay") {
					t.Fatal("an answer that nobody gave")
				}
				if name == "HTTP" { // it is answered before its outcome is told
					waitFor(t, "end of the client's connection", func() bool { return p.open.Load() == 0 })
				}
				w := p.enter()
				defer w.leave()
				up := w.upstreams["up"]
				failures := up.endpoints[0].failures.Load()
				if well := up.set.Hosts()[0].Up() && failures == 0; well != want {
					t.Errorf("well: %v, %d failures", well, failures)
				}
			})
		}
	}
}

// A request whose head has left over HTTP/2 counts as sent, though its body cannot be.
func TestHeadLeft(t *testing.T) {
	ln := listenTCP(t)
	serveConns(t, ln, func(c net.Conn) { io.Copy(io.Discard, c) })
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := http2.Client(&carrier{c, c.(*net.TCPConn), nil}, http2.Options{})
	ended := make(chan struct{})
	go func() { conn.Run(); close(ended) }()
	defer func() { c.Close(); <-ended }()
	x := &call{to: &muxed{conn: conn}, scheme: "http"}
	x.stream.Lost(errors.New("reset"))
	head := "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\n"
	if n, err := x.Write([]byte(head + "x")); n != len(head) || err == nil {
		t.Errorf("%d bytes sent, %v; want the head's %d and an error", n, err, len(head))
	}
}
