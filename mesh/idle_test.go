package mesh

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/plan"
)

// server answers the first request of every connection, then does as it is told.
func (b *box) server(t *testing.T, then func(net.Conn)) (connections *atomic.Int32) {
	ln := b.listen(t, 8080)
	connections = new(atomic.Int32)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			go func() {
				defer c.Close()
				if _, err := http.ReadRequest(bufio.NewReader(c)); err != nil {
					return
				}
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
				then(c)
			}()
		}
	}()
	return connections
}

func ask(t *testing.T, c net.Conn, in *bufio.Reader) *http.Response {
	t.Helper()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: api\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(resp.Body); err != nil {
		t.Fatal(err)
	}
	return resp
}

// TestIdleServer has a server end connections while nothing is asked: the client
// is told at once, and nothing said unasked becomes an answer.
func TestIdleServer(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	all := []plan.Rule{{Name: "all", From: []string{"*"}}}
	ends, talks, waits := w.add("ends", httpPort, all, nil), w.add("talks", httpPort, all, nil), w.add("waits", httpPort, all, nil)
	w.apply()
	ends.server(t, func(net.Conn) {})
	talks.server(t, func(c net.Conn) {
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged")
		io.Copy(io.Discard, c)
	})
	// Ends when the second request is there.
	connections := waits.server(t, func(c net.Conn) { c.Read(make([]byte, 1)) })

	for _, b := range []*box{ends, talks} {
		c := web.mustDial(t, w.service(b.Service).Address.String()+":8080")
		in := bufio.NewReader(c)
		ask(t, c, in)
		if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
			t.Errorf("%s: after its answer came %q, %v, want the end", b.Service, rest, err)
		}
	}

	// A client that reuses connections sees no fault of either kind.
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return web.dial(network, address) }}}
	defer client.CloseIdleConnections()
	for range 5 {
		resp, err := client.Get("http://" + w.service("waits").Address.String() + ":8080/")
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if resp.StatusCode != 200 {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	if n := connections.Load(); n != 5 {
		t.Errorf("%d connections for 5 requests, want as many", n)
	}
}
