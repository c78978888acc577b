package alone_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"hauberk.dev/mesh/alone"
)

// admin speaks with a proxy over its socket.
type admin struct {
	t *testing.T
	c *http.Client
}

func (a admin) put(text string) (status int, answer map[string]any) {
	a.t.Helper()
	req, err := http.NewRequest("PUT", "http://x/config", strings.NewReader(text))
	if err != nil {
		a.t.Fatal(err)
	}
	r, err := a.c.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer r.Body.Close()
	if err := json.NewDecoder(r.Body).Decode(&answer); err != nil {
		a.t.Fatalf("answer %d: %v", r.StatusCode, err)
	}
	return r.StatusCode, answer
}

// told is a proxy that begins with nothing but an admin socket.
func told(t *testing.T) admin {
	t.Helper()
	dir, err := os.MkdirTemp("", "told")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "a")
	c, err := alone.Parse("p.yaml", dir, []byte("version: 1\nadmin: a\n"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := alone.Open(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	t.Cleanup(func() {
		client.CloseIdleConnections()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return admin{t, client}
}

func freePort(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// A configuration that comes over the socket is in force when it is answered, or
// nothing of it is, with every reason.
func TestToldOverSocket(t *testing.T) {
	a := told(t)
	address := freePort(t)
	text := func(body string) string {
		return fmt.Sprintf("version: 1\nadmin: a\nlisteners: [{name: web, address: '%s'}]\nupstreams: [{name: none, endpoints: []}]\n"+
			"hosts: [{names: ['*'], routes: [{path: /none, upstream: none}, {respond: {status: 200, body: %s}}]}]\n", address, body)
	}
	get := func(path string) (int, string) {
		t.Helper()
		r, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r.StatusCode, string(b)
	}
	status, answer := a.put(text("first"))
	if status != 200 || answer["generation"] != 2.0 || len(fmt.Sprint(answer["digest"])) != 64 {
		t.Fatalf("%d %v", status, answer)
	}
	if _, body := get("/"); body != "first" {
		t.Errorf("serves %q", body)
	}
	if status, _ := get("/none"); status != 503 {
		t.Errorf("an upstream without endpoints: %d", status)
	}
	status, answer = a.put("version: 1\nadmin: a\nlisteners: [{name: web}]\nhosts: [{names: ['*'], routes: [{upstream: x}]}]\n")
	faults, _ := answer["faults"].([]any)
	if status != 422 || len(faults) != 2 || !strings.Contains(fmt.Sprint(faults), `no upstream "x"`) {
		t.Errorf("%d %v", status, answer)
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	status, answer = a.put(text("second"))
	if status != 200 {
		t.Errorf("%d %v", status, answer)
	}
	status, answer = a.put(strings.Replace(text("third"), address, taken.Addr().String(), 1))
	if status != 422 || !strings.Contains(fmt.Sprint(answer["reason"]), "address already in use") {
		t.Errorf("%d %v", status, answer)
	}
	if _, body := get("/"); body != "second" {
		t.Errorf("serves %q after a refusal", body)
	}
	r, err := a.c.Do(mustRequest(t, "PUT", "http://x/config", io.LimitReader(zeros{}, 9<<20), 9<<20))
	if err == nil {
		if r.Body.Close(); r.StatusCode != 413 {
			t.Errorf("9 MiB: %d", r.StatusCode)
		}
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func mustRequest(t *testing.T, method, url string, body io.Reader, length int64) *http.Request {
	t.Helper()
	req, err := http.NewRequest(method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	req.ContentLength = length
	return req
}

// TestConditionsTurnedRound matches what is not there, or differs.
func TestConditionsTurnedRound(t *testing.T) {
	a := told(t)
	address := freePort(t)
	up := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer up.Close()
	status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
upstreams: [{name: u, endpoints: [{address: '` + up.Listener.Addr().String() + `', priority: 3}]}]
hosts:
- names: ["*"]
  routes:
  - {path: /up, upstream: u}
  - {headers: [{name: X-A, not: true}], respond: {status: 200, body: absent}}
  - {headers: [{name: X-A, equal: "1", not: true}], respond: {status: 200, body: other}}
  - {query: [{name: q, regex: "^2", not: true}], respond: {status: 200, body: query}}
  - respond: {status: 200, body: rest}
`)
	if status != 200 {
		t.Fatalf("%d %v", status, answer)
	}
	for _, c := range []struct{ path, value, want string }{
		{"/", "", "absent"}, {"/", "2", "other"}, {"/?q=3", "1", "query"}, {"/?q=2", "1", "rest"}, {"/", "1", "rest"}, {"/up", "", ""},
	} {
		req := mustRequest(t, "GET", "http://"+address+c.path, nil, 0)
		if c.value != "" {
			req.Header.Set("X-A", c.value)
		}
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		b.ReadFrom(r.Body)
		r.Body.Close()
		if b.String() != c.want || r.StatusCode != 200 {
			t.Errorf("%s with %q: %d %q, want %q", c.path, c.value, r.StatusCode, b.String(), c.want)
		}
	}
}
