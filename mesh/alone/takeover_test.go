package alone

import (
	"bufio"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/internal/svidlink"
	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh/bolt"
)

// seat is where one proxy follows another, all in this process.
type seat struct {
	t    *testing.T
	dir  string
	door string
	all  []*seated
}

type seated struct {
	*Proxy
	stop  func()
	ended chan error
}

func newSeat(t *testing.T, text string, set ...func(*Proxy)) *seat {
	t.Helper()
	dir, err := os.MkdirTemp("", "hk")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &seat{t: t, dir: dir, door: filepath.Join(dir, "next")}
	door, err := unixsock.Listen(s.door)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(s.config(text), s.log("0"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range set {
		f(p)
	}
	s.run(p, door)
	return s
}

func (s *seat) log(name string) *slog.Logger {
	return slog.New(slog.NewTextHandler(s.t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})).With("proxy", name)
}

func (s *seat) config(text string) *Config {
	s.t.Helper()
	c, err := Parse("proxy.yaml", s.dir, []byte(text))
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

func (s *seat) run(p *Proxy, door *net.UnixListener) {
	ctx, cancel := context.WithCancel(context.Background())
	r := &seated{Proxy: p, stop: cancel, ended: make(chan error, 1)}
	s.all = append(s.all, r)
	given := make(chan error, 1)
	go func() { given <- p.GiveOver(ctx, door) }()
	go func() {
		err := p.Run(ctx)
		cancel()
		if gerr := <-given; err == nil {
			err = gerr
		}
		r.ended <- err
	}()
	s.t.Cleanup(func() {
		cancel()
		r.waitEnd(s.t)
	})
	waitFor(s.t, "proxy that serves", func() bool { return p.context() != nil })
}

func (r *seated) waitEnd(t *testing.T) {
	t.Helper()
	select {
	case err := <-r.ended:
		if err != nil {
			t.Error(err)
		}
		r.ended <- nil
	case <-time.After(patience):
		t.Error("a proxy does not end")
	}
}

func (s *seat) now() *seated { return s.all[len(s.all)-1] }

// next has a new proxy, of another configuration maybe, take the place.
func (s *seat) next(text string) (before, now *seated) {
	s.t.Helper()
	before = s.now()
	p, door, err := TakeOver(s.t.Context(), s.door, s.config(text), s.log(fmt.Sprint(len(s.all))))
	if err != nil {
		s.t.Fatal(err)
	}
	s.run(p, door)
	return before, s.now()
}

func (s *seat) metric(line string) bool {
	return strings.Contains(string(s.now().metrics()), line+"\n")
}

// TestSucceed has a proxy take the place of another: sockets, kept connections, counts
// and rates go along, a request under way ends where it began.
func TestSucceed(t *testing.T) {
	under, goOn := make(chan struct{}, 1), make(chan struct{})
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			under <- struct{}{}
			<-goOn
		}
		io.WriteString(w, "up")
	})
	text := "version: 1\nadmin: admin\nlimits: {drain_timeout: 30s}\nlisteners: [{name: web, address: '127.0.0.1:0'}]\nhosts:\n- names: ['*']\n  routes:\n" +
		"  - {name: few, path: /few, rate: {requests: 4, per: 1h, by: route}, respond: {status: 200, body: few}}\n  - {name: rest, prefix: /, upstream: up}\n" + upstreamOf(up)
	s := newSeat(t, text)
	address := s.now().Address("web").String()
	kept, slow := dialed(t, address), dialed(t, address)
	for range 2 {
		if got := askPath(t, kept, "/few"); got != "few" {
			t.Fatalf("%q", got)
		}
	}
	if _, err := io.WriteString(slow, "GET /slow HTTP/1.1\r\nHost: h\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-under
	first, second := s.next(text)
	if got := second.Address("web").String(); got != address {
		t.Errorf("%s, and before %s", got, address)
	}
	waitFor(t, "kept connection in its new process", func() bool { return second.open.Load() == 1 })
	for n, want := range []string{"few", "few", "used up", "used up"} {
		if got := askPath(t, kept, "/few"); !strings.Contains(got, want) {
			t.Errorf("request %d: %q, want %s", n, got, want)
		}
	}
	select {
	case <-first.ended:
		t.Fatal("ended with a request under way")
	default:
	}
	if err := first.Reload(s.config(text)); err == nil {
		t.Error("a proxy that was replaced reloads")
	}
	close(goOn)
	if got := answerOn(t, slow); got != "up" {
		t.Errorf("%q", got)
	}
	first.waitEnd(t)
	if got := askPath(t, slow, "/"); got != "up" { // it was kept, and went along
		t.Errorf("%q", got)
	}
	for _, line := range []string{`hauberk_proxy_requests_total{route="few",status="2xx"} 4`, `hauberk_proxy_requests_total{route="few",status="4xx"} 2`,
		`hauberk_proxy_requests_total{route="rest",status="2xx"} 2`, `hauberk_proxy_connections_total{listener="web"} 2`, `hauberk_proxy_generation 2`} {
		waitFor(t, line, func() bool { return s.metric(line) })
	}
	if got := adminGet(t, filepath.Join(s.dir, "admin")); !strings.Contains(got, "hauberk_proxy_generation 2") {
		t.Errorf("the admin socket says %.200q", got)
	}
}

// TestSucceedRates has two processes follow soon after each other: what the first lets
// through then is taken from the rate of the third.
func TestSucceedRates(t *testing.T) {
	dir := t.TempDir()
	certify(t, dir, "a", "a")
	text := "version: 1\nlimits: {drain_timeout: 30s}\nlisteners: [{name: web, address: '127.0.0.1:0'}, {name: tls, address: '127.0.0.2:0', tls: {certificates: [{chain: " + dir + "/a.pem, key: " + dir + "/a.key}]}}]\n" +
		"hosts: [{names: ['*'], routes: [{name: few, path: /few, rate: {requests: 1, per: 1h, by: route}, respond: {status: 200, body: few}}, {respond: {status: 200, body: other}}]}]\n"
	s := newSeat(t, text)
	stays, _ := shake(t, s.now().Address("tls").String(), "a")
	defer stays.Close()
	if got := askPath(t, stays, "/"); got != "other" {
		t.Fatalf("%q", got)
	}
	s.next(text)
	s.next(text)
	if got := askPath(t, stays, "/few"); got != "few" {
		t.Fatalf("%q", got)
	}
	c := dialed(t, s.now().Address("web").String())
	waitFor(t, "rate that is told on", func() bool {
		for _, l := range s.now().world.Load().limiters() {
			sh := l.shard(netip.Addr{})
			sh.mu.Lock()
			defer sh.mu.Unlock()
			return sh.buckets[netip.Addr{}].at != time.Time{}
		}
		return false
	})
	if got := askPath(t, c, "/few"); !strings.Contains(got, "used up") {
		t.Errorf("%q", got)
	}
}

// TestSucceedNot has processes fail that want to take over: nothing changes.
func TestSucceedNot(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	text := "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}]\nhosts: [{names: ['*'], routes: [{name: few, rate: {requests: 3, per: 1h, by: route}, respond: {status: 200, body: few}}]}]\n"
	s := newSeat(t, text)
	kept := dialed(t, s.now().Address("web").String())
	for _, other := range []string{
		strings.Replace(text, "hosts:", "admin: /nonexistent/admin\nhosts:", 1),
		strings.Replace(text, "{name: web", "{name: other, address: '"+taken.Addr().String()+"'}, {name: web", 1),
	} {
		if got := askPath(t, kept, "/"); got != "few" {
			t.Errorf("%q", got)
		}
		p, _, err := TakeOver(t.Context(), s.door, s.config(other), nil)
		if err == nil || p != nil {
			t.Fatalf("%v: took over with %s", err, other)
		}
		t.Log(err)
	}
	if got := askPath(t, kept, "/"); got != "few" {
		t.Errorf("%q", got)
	}
	_, second := s.next(text)
	waitFor(t, "kept connection in its new process", func() bool { return second.open.Load() == 1 })
	if got := askPath(t, kept, "/"); !strings.Contains(got, "rate") {
		t.Errorf("%q: the rate begins anew", got)
	}
}

// TestSucceedOther has a proxy of another configuration take over: what it does not
// name is closed, what it names anew is opened.
func TestSucceedOther(t *testing.T) {
	const text = "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}, {name: old, address: 'localhost:0'}]\nhosts: [{names: ['*'], routes: [{respond: {status: 200, body: one}}]}]\n"
	s := newSeat(t, text)
	old := s.now().Address("old").String()
	kept := dialed(t, old)
	if got := askPath(t, kept, "/"); got != "one" {
		t.Fatalf("%q", got)
	}
	before, now := s.next(strings.Replace(text, "{name: old, address: 'localhost:0'}", "{name: new, address: '127.0.0.2:0'}", 1))
	before.waitEnd(t)
	if got := askPath(t, dialed(t, now.Address("new").String()), "/"); got != "one" {
		t.Errorf("%q", got)
	}
	if _, err := kept.Read(make([]byte, 1)); err == nil {
		t.Error("a connection of a listener that is gone goes on")
	}
	if c, err := net.Dial("tcp", old); err == nil {
		c.Close()
		t.Error("a listener that is gone takes connections")
	}
}

// TestSucceedTold has a proxy that was configured over its admin socket replaced, and
// its successor too: what was told stays in force, whatever the file says.
func TestSucceedTold(t *testing.T) {
	const text = "version: 1\nadmin: admin\n"
	s := newSeat(t, text)
	told := text + "listeners: [{name: web, address: '127.0.0.1:0'}]\nhosts: [{names: ['*'], routes: [{name: few, rate: {requests: 3, per: 1h, by: route}, respond: {status: 200, body: told}}]}]\n"
	s.put(told)
	kept := dialed(t, s.now().Address("web").String())
	for range 2 {
		if got := askPath(t, kept, "/"); got != "told" {
			t.Errorf("%q", got)
		}
		before, now := s.next(text)
		before.waitEnd(t)
		if got := now.Address("web"); got == nil || got.String() != kept.RemoteAddr().String() {
			t.Errorf("it serves %v", got)
		}
	}
	s.put(told) // the same again: a reload has a rate that stays go on
	if got := askPath(t, kept, "/"); got != "told" {
		t.Errorf("%q", got)
	}
	if got := askPath(t, kept, "/"); !strings.Contains(got, "used up") {
		t.Errorf("%q", got)
	}
}

// TestSucceedToldIdentities has a process not take over while it has not the identities
// of what the one before was told: the one that has them serves on.
func TestSucceedToldIdentities(t *testing.T) {
	const text = "version: 1\nadmin: admin\nidentities: keys\n"
	s := newSeat(t, text)
	told := text + "listeners: [{name: web, address: '127.0.0.1:0'}, {name: tls, address: '127.0.0.2:0', tls: {certificates: [{identity: web}]}}]\n" +
		"hosts: [{names: ['*'], routes: [{respond: {status: 200, body: told}}]}]\n"
	s.put(told)
	kept := dialed(t, s.now().Address("web").String())
	p, _, err := TakeOver(t.Context(), s.door, s.config(text), nil)
	if err == nil || p != nil || !strings.Contains(err.Error(), `there is no identity "web"`) {
		t.Fatalf("took over: %v", err)
	}
	if got := askPath(t, kept, "/"); got != "told" {
		t.Errorf("%q", got)
	}
	leaf := newAuthority(t, s.dir, "ca").leaf("leaf", "", "web.example")
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := source(t, filepath.Join(s.dir, "keys")).Put(&svidlink.Set{Identities: []svidlink.Identity{{Name: "web", Chain: leaf.Certificate[0], Key: key}}}); err != nil {
		t.Fatal(err)
	}
	_, now := s.next(strings.Replace(told, "body: told", "body: file", 1)) // which has it already
	c, cert := shake(t, now.Address("tls").String(), "web.example")
	defer c.Close()
	if cert.VerifyHostname("web.example") != nil {
		t.Error(cert.DNSNames)
	}
	if got := askPath(t, kept, "/"); got != "told" {
		t.Errorf("%q", got)
	}
}

// put configures the proxy over its admin socket.
func (s *seat) put(text string) {
	s.t.Helper()
	c, err := net.Dial("unix", filepath.Join(s.dir, "admin"))
	if err != nil {
		s.t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, "PUT /config HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", len(text), text)
	if got := answerOn(s.t, c); !strings.Contains(got, "generation") {
		s.t.Fatalf("%q", got)
	}
}

func dialed(t *testing.T, address string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c
}

func askPath(t *testing.T, c net.Conn, path string) string {
	t.Helper()
	if _, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: h\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
	return answerOn(t, c)
}

func answerOn(t *testing.T, c net.Conn) string {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func adminGet(t *testing.T, path string) string {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return askPath(t, c, "/metrics")
}

// echoTCP answers each line with the number of its connection and the line.
func echoTCP(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for n := 1; ; n++ {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				r := bufio.NewReader(c)
				line, err := r.ReadString('\n')
				for ; err == nil; line, err = r.ReadString('\n') {
					if strings.HasPrefix(line, "GET ") { // an upgrade
						io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
						for line != "\r\n" && err == nil {
							line, err = r.ReadString('\n')
						}
						continue
					}
					fmt.Fprintf(c, "%d:%s", n, line)
				}
				io.WriteString(c, "bye\n")
			}()
		}
	}()
	return ln.Addr().String()
}

func lineOn(t *testing.T, c net.Conn, r *bufio.Reader, line string) string {
	t.Helper()
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		t.Fatal(err)
	}
	got, err := r.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(got, "\n")
}

// TestSucceedMove has connections of every kind that can go along do so, three times:
// who is at their ends does not notice, and the process before ends at once.
func TestSucceedMove(t *testing.T) {
	tcp, calls, up := echoTCP(t), newRPCOrigin(t, "o", false), newEcho(t, "127.0.0.1:0", "u")
	text := fmt.Sprintf(`version: 1
limits: {drain_timeout: 1h, stop_timeout: 1s}
listeners:
- {name: web, address: '127.0.0.1:0'}
- {name: bytes, address: '127.0.0.2:0', protocol: tcp, upstream: tcp}
- {name: udp, address: '127.0.0.1:0', protocol: udp, upstream: udp}
- {name: rpc, address: '127.0.0.3:0', protocol: bolt, calls: [{service: com.*, upstream: calls}]}
hosts: [{names: ['*'], routes: [{prefix: /, upstream: tcp}]}]
upstreams:
- {name: tcp, endpoints: [{address: %q}]}
- {name: udp, endpoints: [{address: %q}]}
- {name: calls, protocol: bolt, endpoints: [%s]}
`, tcp, up.address(), endpointsOf(calls))
	s := newSeat(t, text)
	bytes, half, web := dialed(t, s.now().Address("bytes").String()), dialed(t, s.now().Address("bytes").String()), dialed(t, s.now().Address("web").String())
	bytesIn, halfIn, webIn := bufio.NewReader(bytes), bufio.NewReader(half), bufio.NewReader(web)
	number, _, _ := strings.Cut(lineOn(t, bytes, bytesIn, "a"), ":")
	lineOn(t, half, halfIn, "a")
	io.WriteString(web, "GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	if resp, err := http.ReadResponse(webIn, nil); err != nil || resp.StatusCode != 101 {
		t.Fatal(resp, err)
	}
	upgraded, _, _ := strings.Cut(lineOn(t, web, webIn, "a"), ":")
	udp := dialUDP(t, "", s.now().Address("udp").String())
	askUDP(t, udp, "first")
	session := *up.from.Load()
	rpc := newRPCTester(t, s.now().Proxy, "rpc", false)
	for n := range 3 {
		frame := callOf(false, 10+n, "com.test.S", "m")
		rpc.send(frame[:n*7])
		before, now := s.next(text)
		before.waitEnd(t)
		rpc.send(frame[n*7:])
		if f := rpc.next(); !f.ok || f.id != uint64(10+n) {
			t.Errorf("%d: %+v", n, f)
		}
		if got := lineOn(t, bytes, bytesIn, fmt.Sprint("b", n)); got != fmt.Sprint(number, ":b", n) {
			t.Errorf("%d: bytes: %q", n, got)
		}
		if got := lineOn(t, web, webIn, fmt.Sprint("c", n)); got != fmt.Sprint(upgraded, ":c", n) {
			t.Errorf("%d: upgrade: %q", n, got)
		}
		askUDP(t, udp, fmt.Sprint("d", n))
		if from := *up.from.Load(); from != session {
			t.Errorf("%d: udp from %v, and before from %v", n, from, session)
		}
		if n == 1 { // one way has ended, the other not
			half.(*net.TCPConn).CloseWrite()
			if got, err := io.ReadAll(halfIn); string(got) != "bye\n" || err != nil {
				t.Errorf("%d: %q, %v", n, got, err)
			}
		}
		if c := now.open.Load(); c > 4 {
			t.Errorf("%d: %d connections", n, c)
		}
		if d := now.udp(); d.open.Load() != 1 || d.begun.Load() != 1 {
			t.Errorf("%d: %d sessions, %d begun", n, d.open.Load(), d.begun.Load())
		}
	}
}

// TestSucceedAccepted has a process replaced, or stopped, with a connection that it has
// accepted and does not serve yet: who has connected is served, or the process waits
// to close it.
func TestSucceedAccepted(t *testing.T) {
	const text = "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}]\nhosts: [{names: ['*'], routes: [{respond: {status: 200, body: one}}]}]\n"
	for name, replaced := range map[string]bool{"replaced": true, "stopped": false} {
		t.Run(name, func(t *testing.T) {
			met, gate := make(chan struct{}), make(chan struct{})
			s := newSeat(t, text, func(p *Proxy) { p.met = func() { met <- struct{}{}; <-gate } })
			c := dialed(t, s.now().Address("web").String())
			<-met
			before := s.now()
			if replaced {
				s.next(text)
			} else {
				before.stop()
			}
			// Time to end too early.
			for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end) && before.context().Err() == nil; time.Sleep(time.Millisecond) {
			}
			if before.context().Err() != nil {
				t.Error("everything has ended, and a connection is not served yet")
			}
			close(gate)
			if replaced {
				if got := askPath(t, c, "/"); got != "one" {
					t.Errorf("%q", got)
				}
			} else if _, err := c.Read(make([]byte, 1)); err == nil {
				t.Error("an answer without a question")
			}
			before.waitEnd(t)
		})
	}
}

// TestSucceedMuchUnread has a connection not move, because more requests are read of it
// than can: it does not end without a word, whenever it is told to move.
func TestSucceedMuchUnread(t *testing.T) {
	under, goOn := make(chan struct{}, 1), make(chan struct{})
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		under <- struct{}{}
		<-goOn
	})
	text := "version: 1\nlisteners: [{name: web, address: '127.0.0.1:0'}]\nhosts: [{names: ['*'], routes: [{path: /slow, upstream: up}, {respond: {status: 200, body: one}}]}]\n" + upstreamOf(up)
	s := newSeat(t, text)
	c := dialed(t, s.now().Address("web").String())
	const more = 600 // over maxUnread, and under a block
	if _, err := io.WriteString(c, "GET /slow HTTP/1.1\r\nHost: h\r\n\r\n"+strings.Repeat("GET / HTTP/1.1\r\nHost: hhhhhhhh\r\n\r\n", more)); err != nil {
		t.Fatal(err)
	}
	<-under
	before, _ := s.next(text)
	waitFor(t, "process that lets its connections move", func() bool { return before.leaving.Load() })
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for before.open.Load() > 0 {
			before.eachClient((*client).part)
		}
	}()
	close(goOn)
	r := bufio.NewReader(c)
	for n, last := 0, false; !last && n <= more; n++ { // all, if less had come
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatalf("answer %d: %v", n, err)
		}
		io.Copy(io.Discard, resp.Body)
		last = resp.Close
	}
	before.waitEnd(t)
	<-ended
}

const rpcSeat = "version: 1\nlimits: {drain_timeout: 1h, stop_timeout: 1s}\nlisteners: [{name: rpc, address: '127.0.0.1:0', protocol: bolt, calls: [{service: com.*, upstream: up}]%s}]\n" +
	"upstreams: [{name: up, protocol: bolt, endpoints: [%s]}]\n"

// TestSucceedLongCall has a call begun of which more is there than can move: it ends
// where it began, and its connection moves then.
func TestSucceedLongCall(t *testing.T) {
	text := fmt.Sprintf(rpcSeat, "", endpointsOf(newRPCOrigin(t, "o", false)))
	s := newSeat(t, text)
	rpc := newRPCTester(t, s.now().Proxy, "rpc", false)
	frame := boltCall(bolt.Request, 7, "com.test.S:1.0", "m", false, "\x01"+strings.Repeat("x", 100<<10))
	rpc.send(frame[:40_000])
	waitFor(t, "call that is more than a block", func() bool { return s.now().held.n.Load() > 0 })
	before, now := s.next(text)
	waitFor(t, "process that lets its connections move", func() bool { return before.leaving.Load() })
	next := callOf(false, 8, "com.test.S", "m")
	rpc.send(frame[40_000:], next[:10])
	if f := rpc.next(); !f.ok || f.id != 7 {
		t.Fatalf("%+v", f)
	}
	before.waitEnd(t)
	rpc.send(next[10:])
	if f := rpc.next(); !f.ok || f.id != 8 || now.open.Load() != 1 {
		t.Errorf("%+v, %d connections", f, now.open.Load())
	}
}

// TestSucceedCallTLS has a connection of TLS stay where it is, with the calls it makes
// from then on.
func TestSucceedCallTLS(t *testing.T) {
	dir, o := t.TempDir(), newRPCOrigin(t, "o", false)
	certify(t, dir, "a", "a")
	text := fmt.Sprintf(rpcSeat, ", tls: {certificates: [{chain: "+dir+"/a.pem, key: "+dir+"/a.key}]}", endpointsOf(o))
	s := newSeat(t, text)
	c, _ := shake(t, s.now().Address("rpc").String(), "a")
	defer c.Close()
	w := &wire{}
	rpc := &rpcTester{t, c, w, &frameReader{conn: c, wire: w, most: 1 << 20, patient: patience, held: &holding{most: maxRPCHeld}}}
	rpc.send(callOf(false, 1, "com.test.S", "m"))
	if f := rpc.next(); !f.ok || f.id != 1 {
		t.Fatalf("%+v", f)
	}
	before, _ := s.next(text)
	waitFor(t, "line that is told of what was counted", func() bool { return s.metric(`hauberk_proxy_connections_total{listener="rpc"} 1`) })
	for id := range 3 {
		rpc.send(callOf(false, 10+id, "com.test.S", "m"))
		if f := rpc.next(); !f.ok || f.id != uint64(10+id) {
			t.Errorf("%+v", f)
		}
	}
	if n := before.open.Load(); n != 1 {
		t.Errorf("%d connections stay", n)
	}
	c.Close()
	before.waitEnd(t)
}

// TestCallsStay has a connection with half a call not move, as nobody is at the other
// end of the line: it is served on.
func TestCallsStay(t *testing.T) {
	p := serve(t, fmt.Sprintf(rpcSeat, "", endpointsOf(newRPCOrigin(t, "o", false))))
	own, theirs, err := newLine()
	if err != nil {
		t.Fatal(err)
	}
	defer own.conn.Close()
	theirs.Close()
	rpc := newRPCTester(t, p, "rpc", false)
	p.line = own
	for id := range 3 { // the line is broken from the first on
		frame := callOf(false, id, "com.test.S", "m")
		rpc.send(frame[:11])
		waitFor(t, "connection", func() bool { return p.open.Load() == 1 })
		p.eachClient((*client).part)
		if id == 0 {
			waitFor(t, "line that is broken", func() bool { p.eachClient((*client).part); return !own.whole() })
		}
		rpc.send(frame[11:])
		if f := rpc.next(); !f.ok || f.id != uint64(id) {
			t.Fatalf("%+v", f)
		}
	}
}

// TestSucceedBusyStream moves a stream in which bytes go both ways all the time, and
// one of which the client does not read.
func TestSucceedBusyStream(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go func() {
		for c, err := ln.Accept(); err == nil; c, err = ln.Accept() {
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
	text := "version: 1\nlisteners: [{name: bytes, address: '127.0.0.1:0', protocol: tcp, upstream: up}]\n" + upstreamOf(ln.Addr().String())
	s := newSeat(t, text)
	c := dialed(t, s.now().Address("bytes").String())
	const size = 48 << 20
	sent := make(chan error, 1)
	go func() {
		b := make([]byte, 64<<10)
		for n := 0; n < size; n += len(b) {
			for i := range b {
				b[i] = byte((n + i) * 2654435761 >> 13)
			}
			if _, err := c.Write(b); err != nil {
				sent <- err
				return
			}
		}
		sent <- c.(*net.TCPConn).CloseWrite()
	}()
	b := make([]byte, 64<<10)
	for n, turn := 0, 0; n < size; {
		if n > turn*size/4 && turn < 3 {
			turn++
			s.next(text)
		}
		k, err := c.Read(b)
		if err != nil {
			t.Fatalf("after %d bytes: %v", n, err)
		}
		for i := range k {
			if b[i] != byte((n+i)*2654435761>>13) {
				t.Fatalf("byte %d is wrong", n+i)
			}
		}
		n += k
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
	if n, err := c.Read(b); n != 0 || err != io.EOF {
		t.Errorf("%d bytes more, %v", n, err)
	}
	for _, r := range s.all[:len(s.all)-1] {
		r.waitEnd(t)
	}
}
