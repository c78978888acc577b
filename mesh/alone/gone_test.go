package alone

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
)

// TestListenerGone reloads a configuration without a listener: nobody is served by
// what it said, on connections that were kept neither.
func TestListenerGone(t *testing.T) {
	const text = "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}, {name: old, address: 'localhost:0'}]\nhosts: [{names: ['*'], routes: [{respond: {status: 200, body: one}}]}]\n"
	p := serve(t, text)
	old := p.Address("old").String()
	kept, err := net.Dial("tcp", old)
	if err != nil {
		t.Fatal(err)
	}
	defer kept.Close()
	if got := ask(t, kept, "h"); got != "one" {
		t.Fatalf("%q", got)
	}
	two := clientTwo(t)
	resp, err := two.Get("http://" + old)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, resp.Body)
	resp.Body.Close()
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(strings.Replace(text, ", {name: old, address: 'localhost:0'}", "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Reload(c); err != nil {
		t.Fatal(err)
	}
	if _, err := kept.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a kept connection after its listener: %v", err)
	}
	if resp, err := two.Get("http://" + old); err == nil {
		resp.Body.Close()
		t.Errorf("an answer of status %d from a listener that is gone", resp.StatusCode)
	}
	waitFor(t, "end of all its connections", func() bool { return p.open.Load() == 0 })
}

// TestTwoGoAway has a server end its connections between requests, in the middle of
// a hundred: none is lost.
func TestTwoGoAway(t *testing.T) {
	a := originTwo(t, repeat)
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamTwo(a)))
	c := clientOne(t)
	for i := range 100 {
		if i%10 == 5 {
			p.world.Load().upstreams["up"].renew() // as GOAWAY does
		}
		resp, err := c.Post("http://"+p.Address("web").String(), "text/plain", strings.NewReader("body"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != 200 || string(b) != "body" {
			t.Fatalf("request %d: %d %q, %v", i, resp.StatusCode, b, err)
		}
	}
}

func repeat(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }
