package alone

import (
	"bufio"
	"context"
	"crypto/tls"
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

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
)

// logged waits for a number of lines of the access log.
func logged(t testing.TB, path string, lines int) []string {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if all := strings.SplitAfter(string(b), "\n"); len(all) > lines {
			return all[:lines]
		}
		if time.Now().After(deadline) {
			t.Fatalf("log, %v:\n%s", err, b)
		}
	}
}

// The log tells of the request itself, also after a tunnel, and after a head that
// could not be read.
func TestLogOwnRequest(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		hijack(w, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"+strings.Repeat("#", 4<<10))
	})
	path := filepath.Join(t.TempDir(), "log")
	p := serve(t, "access_log: {path: '"+path+"'}\n"+one("  - {path: /ws, upstream: up}\n  - {respond: {status: 200}}", upstreamOf(up)))
	c := dial(t, p)
	io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	io.WriteString(c, strings.Repeat("#", 4<<10))
	io.Copy(io.Discard, c)
	c.Close()
	if got := logged(t, path, 1)[0]; !strings.Contains(got, `"GET" "h" "/ws" 101 `) {
		t.Errorf("after a tunnel: %q", got)
	}
	c = dial(t, p)
	defer c.Close()
	ask(t, c, "first")
	io.WriteString(c, "GET / HTTP/1.1\nHost: second\n\n")
	io.Copy(io.Discard, c)
	if got := logged(t, path, 3)[2]; !strings.Contains(got, `"" "" "" 400 `) {
		t.Errorf("a head that cannot be read: %q", got)
	}
}

// allUp says whether every endpoint of the upstream is in use.
func allUp(p *Proxy) bool {
	for _, h := range p.world.Load().upstreams["up"].set.Hosts() {
		if !h.Up() {
			return false
		}
	}
	return true
}

// Neither what a client asks nor an answer that is refused makes an endpoint one
// that could not be reached.
func TestRefusedLeavesEndpoints(t *testing.T) {
	var calls atomic.Int32
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		calls.Add(1)
		hijack(w, "HTTP/1.1 200 OK\r\nX: "+strings.Repeat("x", maxHead)+"\r\n\r\n")
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	many := strings.TrimSuffix(strings.Repeat("a,", maxNominated+1), ",")
	if got := raw(t, p, "GET / HTTP/1.1\r\nHost: h\r\nConnection: "+many+"\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 400 ") || calls.Load() != 0 || !allUp(p) {
		t.Errorf("%q after %d calls, all up %v", got, calls.Load(), allUp(p))
	}
	if resp, _ := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 502 || !allUp(p) {
		t.Errorf("long head of an answer: %d, all up %v", resp.StatusCode, allUp(p))
	}
}

// freeAddress is one that nobody serves.
func freeAddress(t testing.TB) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

func reload(t testing.TB, p *Proxy, text string) {
	t.Helper()
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Reload(c); err != nil {
		t.Fatal(err)
	}
}

// What an address serves follows the file, whatever its listener is called.
func TestListenerNameMoves(t *testing.T) {
	a, b := freeAddress(t), freeAddress(t)
	text := "version: 1\nlisteners: [{name: web, address: '" + a + "'}, {name: inner, address: '" + b + `'}]
hosts:
- {names: ['*'], listeners: [web], routes: [{respond: {status: 200, body: web}}]}
- {names: ['*'], listeners: [inner], routes: [{respond: {status: 200, body: inner}}]}
`
	p := serve(t, text)
	reload(t, p, strings.NewReplacer(a, b, b, a).Replace(text))
	for name, address := range map[string]string{"web": b, "inner": a} {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		if got := ask(t, c, "h"); got != name {
			t.Errorf("%s serves %q, not %q", address, got, name)
		}
		c.Close()
		if got := p.Address(name).String(); got != address {
			t.Errorf("%s is at %s, not %s", name, got, address)
		}
	}
}

// timed is a connection that only tells what is asked of it.
type timed struct {
	net.Conn
	read     func([]byte) (int, error)
	deadline func(time.Time)
}

func (c *timed) Read(b []byte) (int, error)         { return c.read(b) }
func (c *timed) Write(b []byte) (int, error)        { return len(b), nil }
func (c *timed) SetReadDeadline(at time.Time) error { return c.SetDeadline(at) }
func (c *timed) SetWriteDeadline(time.Time) error   { return nil }
func (c *timed) SetDeadline(at time.Time) error {
	if c.deadline != nil {
		c.deadline(at)
	}
	return nil
}

func (c *timed) Close() error { return nil }

func ended0([]byte) (int, error) { return 0, io.EOF }

// uploader is a session in the middle of a request with a body.
func uploader(client, to *timed) (*session, *action, *server) {
	s := &session{conn: client, world: &world{config: &Config{}}}
	s.in.r, s.out.w, s.up.w = client, client, to
	s.world.config.Limits.IdleTimeout = Duration(time.Hour)
	s.req.Framing = http1.Chunked
	s.body.Start(http1.Chunked, 0)
	srv := &server{conn: to}
	srv.in.r = to
	return s, &action{route: &Route{Timeout: Duration(time.Hour), Body: 1 << 20}}, srv
}

// Who waits for the answer and is woken finds why; a deadline of a connection
// that stays is set before anybody else may use it.
func TestUploadEnds(t *testing.T) {
	for text, late := range map[string]bool{"x\r\n": true, "1\r\nx": true, "0\r\n\r\n": false} {
		client, done := &timed{read: ended0}, make(chan error, 1)
		told, calls := false, 0
		to := &timed{deadline: func(time.Time) { calls++; told = len(done) == 1 }}
		s, a, srv := uploader(client, to)
		s.in.take()
		s.in.end = copy(s.in.b[:], text)
		s.sendBody(a, srv, done)
		if err := <-done; (err != nil) != late || told != late || calls != 1 {
			t.Errorf("%q: %v; told before the deadline %v", text, err, told)
		}
	}
}

// An answer that goes on has its time anew, once the body of its request is sent.
func TestAnswerAfterUpload(t *testing.T) {
	for _, c := range []struct {
		outcome error
		set     bool
		want    error
	}{{nil, true, nil}, {io.ErrClosedPipe, true, nil}, {errTooLarge, false, errTooLarge}} {
		var last time.Time
		to := &timed{read: func(b []byte) (int, error) { return 1, nil }, deadline: func(at time.Time) { last = at }}
		s, a, srv := uploader(&timed{read: ended0}, to)
		s.world.config.Limits.StreamTimeout = Duration(24 * time.Hour)
		s.upload = make(chan error, 1)
		if err := s.more(a, srv, nil); err != nil || time.Until(last) < 23*time.Hour {
			t.Errorf("under way: %v, deadline in %v", err, time.Until(last))
		}
		last = time.Time{}
		s.upload <- c.outcome
		err := s.more(a, srv, nil)
		if set := !last.IsZero() && time.Until(last) < 2*time.Hour; err != c.want || set != c.set || len(s.upload) != 1 {
			t.Errorf("%v: %v, deadline in %v", c.outcome, err, time.Until(last))
		}
	}
}

// A retry that finds no endpoint is counted out of the budget.
func TestRetryBudget(t *testing.T) {
	var set atomic.Pointer[balance.Set]
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if err := set.Load().Replace(0, nil); err != nil {
			t.Error(err)
		}
		w.WriteHeader(503)
	})
	p := serve(t, one("  - {prefix: /, upstream: up, retries: {attempts: 2, statuses: [503]}}", upstreamOf(up)))
	set.Store(p.world.Load().upstreams["up"].set)
	if resp, got := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 503 || !strings.Contains(got, "reason") {
		t.Errorf("%d %q", resp.StatusCode, got)
	}
	if n := set.Load().Open(balance.Retries); n != 0 {
		t.Errorf("%d retries are still counted", n)
	}
}

// What is said before the answer has its own time, not what is left of the answer
// before.
func TestStaleWriteDeadline(t *testing.T) {
	const idle = time.Second
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ws":
			time.Sleep(idle + idle/2) // the deadline of the first answer passes
			hijack(w, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
		case "/body":
			time.Sleep(idle + idle/2)
			io.Copy(io.Discard, r.Body) // says 100 first
		}
	})
	p := serve(t, "limits: {idle_timeout: "+idle.String()+"}\n"+one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	conns := map[int]net.Conn{}
	for status, text := range map[int]string{
		101: "GET /ws HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n",
		100: "POST /body HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\nbody",
	} {
		c := dial(t, p)
		defer c.Close()
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"+text)
		conns[status] = c
	}
	for status, c := range conns {
		r := bufio.NewReader(c)
		for _, want := range []int{200, status} {
			if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != want {
				t.Errorf("%v, %v, want %d", resp, err, want)
				break
			}
		}
	}
}

// A direction that is quiet does not end a tunnel whose other one is not, and one
// that has ended is not waited for.
func TestTunnelOneWay(t *testing.T) {
	f := newFlow(time.Hour)
	f.moved.Store(int64(-time.Hour)) // its time is up
	reads := 0
	from := &timed{read: func([]byte) (int, error) {
		if reads++; reads == 1 {
			f.moved.Store(0) // the other direction moves meanwhile
			return 0, os.ErrDeadlineExceeded
		}
		return 0, io.EOF
	}}
	if f.pump(&timed{}, from, nil, new(bool)); reads != 2 {
		t.Errorf("%d reads: a quiet direction ended the tunnel", reads)
	}
	f = newFlow(time.Hour)
	reads = 0
	from.deadline = func(time.Time) { f.over.Store(true) } // just before this deadline
	if f.pump(&timed{}, from, nil, new(bool)); reads != 0 {
		t.Error("a direction waits though the tunnel is over")
	}
}

// A listener that comes before Run is served by Run, once.
func TestReloadBeforeRun(t *testing.T) {
	first := one("  - {respond: {status: 200, body: ok}}")
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(first))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	reload(t, p, strings.Replace(first, "127.0.0.1:0", "127.0.0.2:0", 1))
	served := make(chan struct{})
	go func() { p.running.Wait(); close(served) }()
	select {
	case <-served:
	case <-time.After(patience):
		t.Error("something is served before Run")
		p.Close()
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	if got := raw(t, p, "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"); !strings.HasSuffix(got, "ok") {
		t.Errorf("%q", got)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A reload that is under way when a stop begins leaves nothing that the stop
// would wait for.
func TestReloadBesideStop(t *testing.T) {
	text := one("  - {respond: {status: 200}}")
	configs := [2]*Config{}
	for i, text := range []string{text, strings.Replace(text, "127.0.0.1:0", "127.0.0.2:0", 1)} {
		c, err := Parse("proxy.yaml", t.TempDir(), []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		configs[i] = c
	}
	p, err := Open(configs[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended, reloaded := make(chan error, 1), make(chan error, 1)
	p.reloading.Lock() // as one that takes long
	go func() { ended <- p.Run(ctx) }()
	go func() { reloaded <- p.Reload(configs[1]) }()
	time.Sleep(10 * time.Millisecond) // for the reload to be the next, most of the time
	cancel()
	for range 20 { // the stop may not pass the reload, however long it is given
		if p.stopping.Load() {
			t.Error("stops beside a reload")
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	p.reloading.Unlock()
	for _, c := range []chan error{reloaded, ended} {
		select {
		case err := <-c:
			if err != nil && err.Error() != "reload: the proxy is stopping" {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("the proxy does not end")
		}
	}
}

// Connections made when other authorities were trusted serve no request.
func TestReloadTrust(t *testing.T) {
	dir := t.TempDir()
	certify(t, dir, "a", "up.example")
	certify(t, dir, "b", "up.example")
	pair, err := tls.LoadX509KeyPair(dir+"/a.pem", dir+"/a.key")
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {}))
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	s.StartTLS()
	t.Cleanup(s.Close)
	trust := func(file string) {
		t.Helper()
		b, err := os.ReadFile(filepath.Join(dir, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "ca"), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	trust("a.pem")
	text := one("  - {prefix: /, upstream: up}", upstreamOf(strings.TrimPrefix(s.URL, "https://")), "  tls: {name: up.example, ca: '"+dir+"/ca'}")
	p := serve(t, text)
	before := p.world.Load()
	for range 2 {
		if resp, got := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 200 {
			t.Fatal(resp.StatusCode, got)
		}
	}
	trust("b.pem")
	reload(t, p, text)
	if resp, _ := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 503 {
		t.Errorf("%d from a server that is not trusted any more", resp.StatusCode)
	}
	// A request of the world before does not leave its connection to this one.
	old, e := before.upstreams["up"], p.world.Load().upstreams["up"].endpoints[0]
	near, far := net.Pipe()
	defer far.Close()
	old.open.Add(1)
	(&server{up: old, e: e, conn: near}).keep(time.Now())
	if e.pop() != nil {
		t.Error("a connection made under other rules was kept")
	}
}
