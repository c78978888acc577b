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
	"testing"

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

// A server that ends a connection of TLS at rest costs no request, whatever it asks.
func TestStaleTLS(t *testing.T) {
	dir := t.TempDir()
	certify(t, dir, "s", "localhost")
	cert, err := tls.LoadX509KeyPair(filepath.Join(dir, "s.pem"), filepath.Join(dir, "s.key"))
	if err != nil {
		t.Fatal(err)
	}
	read, ended := make(chan bool, 9), make(chan bool, 9)
	ln := listenTCP(t)
	serveConns(t, tls.NewListener(ln, &tls.Config{Certificates: []tls.Certificate{cert}}), func(c net.Conn) {
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
	p := serve(t, one("  - {prefix: /, upstream: up}", "upstreams:\n- name: up\n  endpoints: [{address: '"+ln.Addr().String()+"'}]\n  tls: {name: localhost, ca: "+filepath.Join(dir, "s.pem")+"}\n"))
	for i := range 4 {
		if resp, got := get(t, p, "POST", "/", strings.NewReader("x"), nil); resp.StatusCode != 200 {
			t.Fatalf("request %d: %d %q", i, resp.StatusCode, got)
		}
		read <- true
		<-ended
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
