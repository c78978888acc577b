package mesh

//lint:file-ignore SA1019 the independent peer here is x/net's own client and server, framed by hand

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

var (
	tcpPort  = []plan.Port{{Port: 9000, Protocol: "tcp"}}
	httpPort = []plan.Port{{Port: 8080, Protocol: "http"}}
)

// serveEcho echoes every connection to its end.
func serveEcho(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// roundTrip tells whether a connection carries bytes both ways.
func roundTrip(c net.Conn, text string) error {
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != text {
		return fmt.Errorf("%q came back", got)
	}
	return nil
}

// refused tells a reset from a connection that ended well or hangs.
func refused(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}

func TestCallAndDeny(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	evil := w.add("evil", nil, nil, nil)
	ledger := w.add("ledger", tcpPort, []plan.Rule{{Name: "ledger/web", From: []string{spiffe("web")}, Ports: []uint16{9000}}}, nil)
	w.apply()
	go serveEcho(ledger.listen(t, 9000))

	for _, to := range []string{"10.99.0.3:9000", ledger.Address.String() + ":9000"} {
		if err := web.call(to, "hello"); err != nil {
			t.Errorf("web to %s: %v", to, err)
		}
		if err := evil.call(to, "hello"); !refused(err) {
			t.Errorf("evil to %s: %v, want a reset", to, err)
		}
	}
	e := w.awaitEvent(api.EventAccessDenied, "no rule of ledger.bank allows it")
	if e.Peer != spiffe("evil") && e.Peer != spiffe("ledger") {
		t.Errorf("%+v", e)
	}
	// A port that is not declared, and an address that is nobody's.
	for _, to := range []string{"10.99.0.3:9001", "8.8.8.8:443", "10.88.0.77:80", "169.254.1.1:80"} {
		if err := web.call(to, "x"); !refused(err) {
			t.Errorf("web to %s: %v, want a reset", to, err)
		}
	}
	w.awaitEvent(api.EventEgressRefused, "no service has this address")

	// Deny beats allow, takes effect on the connection that is open, and goes.
	open := web.mustDial(t, "10.99.0.3:9000")
	if err := roundTrip(open, "open"); err != nil {
		t.Fatal(err)
	}
	w.service("ledger").Deny = []plan.Rule{{Name: "ledger/stop", From: []string{"*"}}}
	w.plan.Generation++
	w.apply()
	if err := roundTrip(open, "more"); err == nil {
		t.Error("the open connection outlived the rule that denies it")
	}
	if err := web.call("10.99.0.3:9000", "x"); err == nil {
		t.Error("deny did not beat allow")
	}
	w.awaitEvent(api.EventAccessDenied, "ledger/stop")
	w.plan.Generation--
	if err := w.link.SetPlan(context.Background(), w.plan); err == nil {
		t.Error("an older plan was taken")
	}
}

func TestServerFirstAndHalfClose(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	ln := b.listen(t, 9000)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, "220 ready\r\n") // speaks first
				all, err := io.ReadAll(c)          // to the client's half close
				if err != nil {
					return
				}
				fmt.Fprintf(c, "%d bytes", len(all))
			}()
		}
	}()
	c := a.mustDial(t, "10.99.0.2:9000")
	line := make([]byte, 11)
	if _, err := io.ReadFull(c, line); err != nil || string(line) != "220 ready\r\n" {
		t.Fatalf("%q, %v", line, err)
	}
	sent := make([]byte, 5<<20)
	rand.Read(sent)
	if _, err := c.Write(sent); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if rest, err := io.ReadAll(c); err != nil || string(rest) != fmt.Sprintf("%d bytes", len(sent)) {
		t.Errorf("%q, %v", rest, err)
	}
}

// The server's half ends first; the client goes on, to the last byte.
func TestServerEndsFirst(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	ln := b.listen(t, 9000)
	got := make(chan int, 1)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.(*net.TCPConn).CloseWrite()
		all, _ := io.ReadAll(c)
		got <- len(all)
	}()
	c := a.mustDial(t, "10.99.0.2:9000")
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		t.Fatalf("%q, %v", rest, err)
	}
	time.Sleep(20 * time.Millisecond) // the end has arrived everywhere
	if _, err := c.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	c.CloseWrite()
	if n := <-got; n != 1<<20 {
		t.Errorf("the server read %d bytes after its own end", n)
	}
}

// A server that dies resets its client: the client must not take what it has
// got for all there is.
func TestResetIsPassedOn(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	ln := b.listen(t, 9000)
	go func() {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		io.WriteString(c, "part")
		time.Sleep(20 * time.Millisecond)
		abortTCP(c.(*net.TCPConn))
	}()
	c := a.mustDial(t, "10.99.0.2:9000")
	if got, err := io.ReadAll(c); err == nil {
		t.Errorf("a dead server's answer ended well: %q", got)
	}
	ln.Close()
	// Nobody listens.
	if err := a.call("10.99.0.2:9000", "x"); err == nil {
		t.Error("a call to a closed port went through")
	}
	w.awaitEvent(api.EventUnreachable, "connection refused")
}

func TestHTTPRules(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	api2 := w.add("api", httpPort, []plan.Rule{
		{Name: "api/read", From: []string{spiffe("web")}, Methods: []string{"GET", "HEAD"}, Paths: []string{"/accounts*", "/"}},
		{Name: "api/write", From: []string{spiffe("web")}, Methods: []string{"POST"}, Paths: []string{"/payments"}},
	}, []plan.Rule{{Name: "api/never", From: []string{"*"}, Paths: []string{"/accounts/secret*"}}})
	w.apply()
	var mu sync.Mutex
	var served []string
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		served = append(served, r.Method+" "+r.RequestURI)
		mu.Unlock()
		fmt.Fprintf(rw, "%s %s %d", r.Method, r.URL.Path, len(body))
	})}
	go srv.Serve(api2.listen(t, 8080))
	defer srv.Close()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return web.dial("tcp4", "10.99.0.2:8080")
	}}}
	defer client.CloseIdleConnections()
	for _, c := range []struct {
		method, path, body string
		status             int
		rule               string
	}{
		{"GET", "/", "", 200, ""},
		{"GET", "/accounts/7?x=y", "", 200, ""},
		{"HEAD", "/accounts", "", 200, ""},
		{"POST", "/payments", strings.Repeat("p", 100_000), 200, ""},
		{"POST", "/accounts", "x", 403, ""},
		{"DELETE", "/accounts", "", 403, ""},
		{"GET", "/admin", "", 403, ""},
		{"GET", "/accounts/secret", "", 403, "api/never"},
		{"GET", "/accounts/%73ecret/1", "", 403, "api/never"},
		{"GET", "/accounts/../admin", "", 400, ""},
		{"GET", "/accounts//secret", "", 400, ""},
		{"GET", "/accounts/7", "", 200, ""},
	} {
		u := &url.URL{Scheme: "http", Host: "api", Opaque: c.path}
		req := &http.Request{Method: c.method, URL: u, Host: "api", Header: http.Header{}}
		if c.body != "" {
			req.Body, req.ContentLength = io.NopCloser(strings.NewReader(c.body)), int64(len(c.body))
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.path, err)
			continue
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status {
			t.Errorf("%s %s: %d %s, want %d", c.method, c.path, resp.StatusCode, body, c.status)
		}
		if c.status == 200 {
			continue
		}
		var r refusal
		if err := json.Unmarshal(body, &r); err != nil || r.Rule != c.rule || r.Reason == "" || r.Caller != spiffe("web") || !strings.Contains(r.Hint, "hauberk why") {
			t.Errorf("%s %s: body %s, %v", c.method, c.path, body, err)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	for _, s := range served {
		if strings.Contains(s, "secret") || strings.Contains(s, "admin") || strings.HasPrefix(s, "DELETE") {
			t.Errorf("the server has seen %s", s)
		}
	}
	w.awaitEvent(api.EventAccessDenied, "api/never")
}

// Raw bytes over one connection: pipelining keeps its order around refusals, and
// what may be smuggling ends the connection.
func TestHTTPRaw(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, []plan.Rule{{Name: "api/ok", From: []string{"*"}, Paths: []string{"/ok*"}}}, nil)
	w.apply()
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ok/slow" {
			time.Sleep(50 * time.Millisecond)
		}
		if r.URL.Path == "/ok/upgrade" {
			rw.Header().Set("Connection", "Upgrade")
			rw.Header().Set("Upgrade", "echo")
			rw.WriteHeader(101)
			c, buf, err := rw.(http.Hijacker).Hijack()
			if err == nil {
				io.Copy(c, buf)
				c.Close()
			}
			return
		}
		io.Copy(io.Discard, r.Body)
		io.WriteString(rw, r.URL.Path)
	})}
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()

	const get = "GET %s HTTP/1.1\r\nHost: a\r\n\r\n"
	statuses := func(in string) (got []string) {
		c := web.mustDial(t, "10.99.0.2:8080")
		defer c.Close()
		io.WriteString(c, in)
		c.CloseWrite()
		r := bufio.NewReader(c)
		for {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				return got
			}
			body, _ := io.ReadAll(resp.Body)
			got = append(got, fmt.Sprintf("%d %.3s", resp.StatusCode, body))
		}
	}
	for name, c := range map[string]struct {
		in   string
		want []string
	}{
		"pipelined":       {fmt.Sprintf(get+get+get, "/ok/slow", "/no", "/ok/2"), []string{"200 /ok", `403 {"e`, "200 /ok"}},
		"body then next":  {"POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + fmt.Sprintf(get, "/ok/3"), []string{"200 /ok", "200 /ok"}},
		"refused body":    {"POST /no HTTP/1.1\r\nHost: a\r\nContent-Length: 44\r\n\r\n" + fmt.Sprintf(get, "/ok/smuggled"), []string{`403 {"e`}},
		"CL and TE":       {"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + fmt.Sprintf(get, "/no"), []string{`400 {"e`}},
		"bare LF":         {"GET /ok HTTP/1.1\nHost: a\n\n", []string{`400 {"e`}},
		"http/2 too late": {fmt.Sprintf(get, "/ok") + "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", []string{"200 /ok", `400 {"e`}},
		"connect":         {"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", []string{`405 {"e`}},
		"close":           {"GET /ok HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" + fmt.Sprintf(get, "/ok/2"), []string{"200 /ok"}},
		"1.0":             {"GET /ok HTTP/1.0\r\n\r\n", []string{"200 /ok"}},
		"broken chunks":   {"POST /ok HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", nil},
		"expect continue": {"POST /ok HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nExpect: 100-continue\r\n\r\nx", []string{"100 ", "200 /ok"}},
	} {
		got := statuses(c.in)
		// A broken body may be answered by the server before it is known to be.
		if name != "broken chunks" && !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}

	c := web.mustDial(t, "10.99.0.2:8080")
	io.WriteString(c, "GET /ok/upgrade HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	r := bufio.NewReader(c)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != 101 {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	io.WriteString(c, "not HTTP\n")
	if line, err := r.ReadString('\n'); err != nil || line != "not HTTP\n" {
		t.Errorf("after the upgrade: %q, %v", line, err)
	}
	w.awaitEvent(api.EventBadRequest, "Content-Length beside Transfer-Encoding")
}

// peer dials the gateway as a stranger would.
func (w *world) peer(t testing.TB, b *box, cred *id.Credential, roots bool) (*http2.ClientConn, error) {
	cfg := &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, ServerName: serverName(b.Address)}
	if cred != nil {
		cfg.Certificates = []tls.Certificate{cred.Certificate}
	}
	c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", w.gateway.String(), cfg)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(5 * time.Second))
	return (&http2.Transport{}).NewClientConn(c)
}

func connectTo(cc *http2.ClientConn, authority string, body io.Reader) (*http.Response, error) {
	rc, _ := body.(io.ReadCloser)
	if rc == nil {
		rc = io.NopCloser(strings.NewReader(""))
	}
	return cc.RoundTrip(&http.Request{Method: "CONNECT", Host: authority, URL: &url.URL{Host: authority}, Header: http.Header{}, Body: rc})
}

// Go's own HTTP/2 client with a right identity is served at the gateway; one
// without, with a foreign, an expired, a revoked or a wrong one is not.
func TestGatewayPeers(t *testing.T) {
	w := newWorld(t)
	b := w.add("b", tcpPort, []plan.Rule{{Name: "b/a", From: []string{spiffe("a")}}}, nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	authority := b.Address.String() + ":9000"
	awaitIdentity(t, w, "b-1")

	try := func(cred *id.Credential, authority string) (int, error) {
		cc, err := w.peer(t, b, cred, true)
		if err != nil {
			return 0, err
		}
		pr, pw := io.Pipe()
		resp, err := connectTo(cc, authority, pr)
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		if resp.StatusCode != 200 {
			return resp.StatusCode, nil
		}
		go func() { io.WriteString(pw, "interop"); pw.Close() }()
		if got, err := io.ReadAll(resp.Body); err != nil || string(got) != "interop" {
			return 0, fmt.Errorf("%q, %v", got, err)
		}
		return 200, nil
	}
	good := w.ca.credential(t, spiffe("a"), time.Hour)
	if status, err := try(&good, authority); status != 200 {
		t.Fatalf("a good peer: %d, %v", status, err)
	}
	wrong := w.ca.credential(t, spiffe("c"), time.Hour)
	if status, err := try(&wrong, authority); status != 401 {
		t.Errorf("an identity without a rule: %d, %v", status, err)
	}
	if status, err := try(&good, "10.88.0.99:9000"); status != 400 {
		t.Errorf("another sandbox's address: %d, %v", status, err)
	}
	foreign := newAuthority(t).credential(t, spiffe("a"), time.Hour)
	expired := w.ca.credential(t, spiffe("a"), -time.Second)
	node := w.ca.credential(t, "spiffe://"+domain+"/hauberk/node/n1", time.Hour)
	domain2 := w.ca.credential(t, "spiffe://other.local/ns/bank/sa/a", time.Hour)
	revoked := w.ca.credential(t, spiffe("a"), time.Hour)
	leaf, err := id.ParseChain(revoked.Certificate.Certificate)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.link.Cut(context.Background(), plan.Epoch{Number: 1, Serials: []string{serialOf(leaf[0])}}); err != nil {
		t.Fatal(err)
	}
	for name, cred := range map[string]*id.Credential{"none": nil, "foreign": &foreign, "expired": &expired, "node": &node, "domain": &domain2, "revoked": &revoked} {
		if status, err := try(cred, authority); err == nil {
			t.Errorf("identity %s: answered %d", name, status)
		}
	}
	for _, reason := range []string{"client didn't provide a certificate", "unknown authority", "expired", "not a name of the expected kind"} {
		w.awaitEvent(api.EventPeerRefused, reason)
	}
	w.awaitEvent(api.EventRevoked, "since epoch 1")
	if status, err := try(&good, authority); status != 200 {
		t.Errorf("the good peer, after the others: %d, %v", status, err)
	}
}

func awaitIdentity(t testing.TB, w *world, instance string) api.InstanceStats {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		s, err := w.link.Stats(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if i := s.Sandboxes[instance]; i.Serial != "" {
			return i
		}
	}
	t.Fatalf("%s has no certificate", instance)
	return api.InstanceStats{}
}

// An endpoint that shows another identity than the plan says gets no byte.
func TestWrongEndpoint(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.service("b").Identity = spiffe("somebody-else")
	w.apply()
	go serveEcho(b.listen(t, 9000))
	if err := a.call("10.99.0.2:9000", "secret"); err == nil {
		t.Error("the wrong endpoint was talked to")
	}
	w.awaitEvent(api.EventPeerRefused, "want")
}

// Another endpoint is tried when one is gone.
func TestRetry(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	svc := w.service("b")
	dead := svc.Endpoints[0]
	dead.Instance, dead.Address = "b-0", dead.Address.Next()
	svc.Endpoints = []plan.Endpoint{dead, svc.Endpoints[0]}
	w.apply()
	go serveEcho(b.listen(t, 9000))
	for range 4 {
		if err := a.call("10.99.0.2:9000", "x"); err != nil {
			t.Error(err)
		}
	}
}

func TestRotation(t *testing.T) {
	w := newWorld(t)
	w.ca.life = 6 * time.Second // long beside a call, on whatever machine
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	first := awaitIdentity(t, w, "a-1").Serial
	open := a.mustDial(t, "10.99.0.2:9000")
	for begin := time.Now(); time.Since(begin) < time.Minute && awaitIdentity(t, w, "a-1").Serial == first; time.Sleep(100 * time.Millisecond) {
		if err := roundTrip(open, "old"); err != nil {
			t.Fatalf("the open connection: %v", err)
		}
		if err := a.call("10.99.0.2:9000", "new"); err != nil {
			t.Fatalf("a new connection: %v", err)
		}
	}
	if now := awaitIdentity(t, w, "a-1").Serial; now == first {
		t.Error("the certificate was not renewed")
	}
	// The CA stops: the certificates run out, and the reason is told.
	w.mu.Lock()
	w.sign = func(string) error { return errors.New("the ticket was withdrawn") }
	w.mu.Unlock()
	for begin := time.Now(); time.Since(begin) < time.Minute && a.call("10.99.0.2:9000", "last") == nil; {
		time.Sleep(100 * time.Millisecond)
	}
	if err := a.call("10.99.0.2:9000", "x"); err == nil {
		t.Error("an expired identity was let through")
	}
	w.awaitEvent(api.EventNoIdentity, "expired")
	w.awaitEvent(api.EventNoIdentity, "the ticket was withdrawn")
	// What was proved when a connection began holds until it is revoked.
	open.SetDeadline(time.Now().Add(time.Minute))
	if err := roundTrip(open, "proved"); err != nil {
		t.Errorf("an open connection, after the certificates: %v", err)
	}
	// The CA is back: so is everybody, without being asked.
	w.mu.Lock()
	w.sign = nil
	w.mu.Unlock()
	err := errors.New("not called")
	for begin := time.Now(); time.Since(begin) < time.Minute && err != nil; time.Sleep(50 * time.Millisecond) {
		err = a.call("10.99.0.2:9000", "again")
	}
	if err != nil {
		t.Errorf("after the CA has come back: %v", err)
	}
}

func TestCut(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	c := w.add("c", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	var bad, good []*net.TCPConn
	for range 300 {
		bad = append(bad, a.mustDial(t, "10.99.0.3:9000"))
	}
	for range 20 {
		good = append(good, c.mustDial(t, "10.99.0.3:9000"))
	}
	for _, conn := range append(slices.Clone(bad), good...) {
		if err := roundTrip(conn, "up"); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now()
	receipt, err := w.link.Cut(context.Background(), plan.Epoch{Number: 4, Instances: []string{"a-1"}})
	took := time.Since(begin)
	if err != nil {
		t.Fatal(err)
	}
	// Each connection counts at both ends, as both are on this node.
	if receipt.Epoch != 4 || receipt.Connections != 600 || receipt.Instances["a-1"] != 300 || receipt.Instances["b-1"] != 300 {
		t.Errorf("receipt %+v", receipt)
	}
	t.Logf("cut %d connections in %d us, %v with the link", receipt.Connections, receipt.Micros, took)
	for _, conn := range bad {
		if err := roundTrip(conn, "down"); err == nil {
			t.Fatal("a cut connection carries bytes")
		}
	}
	for _, conn := range good {
		if err := roundTrip(conn, "still"); err != nil {
			t.Fatalf("a connection of somebody else: %v", err)
		}
	}
	if err := a.call("10.99.0.3:9000", "again"); err == nil {
		t.Error("a revoked instance connected again")
	}
	w.awaitEvent(api.EventRevoked, "instance a-1 is revoked since epoch 4")
	// An older epoch changes nothing.
	if r, err := w.link.Cut(context.Background(), plan.Epoch{Number: 3}); err != nil || r.Epoch != 4 {
		t.Errorf("%+v, %v", r, err)
	}
	if err := a.call("10.99.0.3:9000", "again"); err == nil {
		t.Error("an older epoch lifted the revocation")
	}
	// By identity, at the receiver.
	r, err := w.link.Cut(context.Background(), plan.Epoch{Number: 5, Identities: []string{spiffe("c")}})
	if err != nil || r.Connections != 40 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestPublish(t *testing.T) {
	w := newWorld(t)
	rules := []plan.Rule{{Name: "web/front", From: []string{"anonymous"}, Methods: []string{"GET"}, Paths: []string{"/public*"}}}
	web := w.add("web", httpPort, rules, nil)
	vault := w.add("vault", tcpPort, anyone(), nil)
	w.apply()
	go http.Serve(web.listen(t, 8080), http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "page") }))
	go serveEcho(vault.listen(t, 9000))
	var published []link.Published
	var at []string
	for _, p := range []api.PublishedPort{{Namespace: "bank", Service: "web", Port: 8080}, {Namespace: "bank", Service: "vault", Port: 9000}} {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		f, err := ln.(*net.TCPListener).File()
		if err != nil {
			t.Fatal(err)
		}
		at = append(at, ln.Addr().String())
		ln.Close()
		defer f.Close()
		published = append(published, link.Published{PublishedPort: p, Listener: f})
	}
	if err := w.link.SetPublish(context.Background(), published); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{"/public/x": 200, "/private": 403} {
		resp, err := http.Get("http://" + at[0] + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s: %d, want %d", path, resp.StatusCode, want)
		}
	}
	// "*" is any identity, and anonymous is none.
	c, err := net.Dial("tcp", at[1])
	if err == nil {
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second))
		err = roundTrip(c, "x")
	}
	if !refused(err) {
		t.Errorf("an anonymous caller at a port for identities: %v", err)
	}
}

func TestEgress(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	// The only outside there is here is the machine itself, by an address that
	// is not loopback.
	var own string
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range addrs {
		if n, ok := x.(*net.IPNet); ok && n.IP.To4() != nil && !n.IP.IsLoopback() && !n.IP.IsLinkLocalUnicast() {
			own = n.IP.String()
		}
	}
	if own == "" {
		t.Skip("this machine has no address but loopback to play the outside")
	}
	ln, err := net.Listen("tcp", own+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go serveEcho(ln)
	to := addrPort(ln.Addr())
	set := func(prefix string, ports ...uint16) {
		w.plan.Sandboxes[0].Egress = nil
		if err := json.Unmarshal(fmt.Appendf(nil, `[{"prefix":%q}]`, prefix), &w.plan.Sandboxes[0].Egress); err != nil {
			t.Fatal(err)
		}
		w.plan.Sandboxes[0].Egress[0].Ports = ports
		w.apply()
	}
	for _, c := range []struct {
		prefix string
		ports  []uint16
		ok     bool
	}{
		{own + "/32", nil, true},
		{own + "/32", []uint16{to.Port()}, true},
		{own + "/32", []uint16{to.Port() - 1}, false},
		{"0.0.0.0/0", nil, false}, // wide prefixes do not reach the node itself
		{"198.51.100.0/24", nil, false},
	} {
		set(c.prefix, c.ports...)
		if err := a.call(to.String(), "out"); c.ok != (err == nil) {
			t.Errorf("%s %v: %v", c.prefix, c.ports, err)
		}
	}
	set(own + "/32")
	open := a.mustDial(t, to.String())
	if err := roundTrip(open, "x"); err != nil {
		t.Fatal(err)
	}
	set("198.51.100.0/24")
	if err := roundTrip(open, "x"); err == nil {
		t.Error("an egress connection outlived its permission")
	}
}

func TestDNS(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	w.add("b", tcpPort, anyone(), nil)
	w.apply()
	for _, network := range []string{"udp4", "tcp4"} {
		r := &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) { return a.dial(network, "169.254.1.1:53") }}
		got, err := r.LookupHost(context.Background(), "b.bank.svc.cluster.local.")
		if err != nil || !slices.Equal(got, []string{"10.99.0.2"}) {
			t.Errorf("%s: %v, %v", network, got, err)
		}
		if got, err := r.LookupHost(context.Background(), "example.com."); err == nil {
			t.Errorf("%s: example.com is %v", network, got)
		}
	}
}

// The proxy is replaced: connections waiting in the listener, whose descriptor
// the node has kept, are served by the next one.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	if err := a.call("10.99.0.2:9000", "one"); err != nil {
		t.Fatal(err)
	}
	w.stopProxy()
	<-w.link.Done()
	waiting := a.mustDial(t, "10.99.0.2:9000")
	w.startProxy()
	w.connect()
	if err := roundTrip(waiting, "two"); err != nil {
		t.Errorf("the connection made in between: %v", err)
	}
	// The node is replaced: the proxy goes on, and drops what the new node does
	// not know.
	w.link.Close()
	if err := roundTrip(waiting, "three"); err != nil {
		t.Errorf("without a node: %v", err)
	}
	b2 := w.boxes["b-1"]
	delete(w.boxes, "b-1")
	w.connect()
	w.boxes["b-1"] = b2
	if s, err := w.link.Stats(context.Background()); err != nil || len(s.Sandboxes) != 1 {
		t.Errorf("%+v, %v", s, err)
	}
	if err := roundTrip(waiting, "four"); err == nil {
		t.Error("a sandbox that the node does not know is still served")
	}
}

func TestLimit(t *testing.T) {
	w := newWorldOf(t, Options{Connections: 5})
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	w.apply()
	go serveEcho(b.listen(t, 9000))
	var open []*net.TCPConn
	for range 5 {
		c := a.mustDial(t, "10.99.0.2:9000")
		if err := roundTrip(c, "x"); err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	if err := a.call("10.99.0.2:9000", "x"); err == nil {
		t.Error("one more than the limit")
	}
	w.awaitEvent(api.EventLimit, "5 connections")
	open[0].Close()
	deadline := time.Now().Add(3 * time.Second)
	for {
		err := a.call("10.99.0.2:9000", "x")
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a place that was freed is not given: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A plan with a fault is refused as a whole, and the one before stays.
func TestPlanRefused(t *testing.T) {
	w := newWorld(t)
	w.add("a", tcpPort, nil, nil)
	for name, change := range map[string]func(*plan.Mesh){
		"trust domain":   func(m *plan.Mesh) { m.TrustDomain = "" },
		"identity":       func(m *plan.Mesh) { m.Services[0].Identity = "spiffe://x" },
		"foreign domain": func(m *plan.Mesh) { m.Services[0].Identity = "spiffe://other/ns/a/sa/b" },
		"port 0":         func(m *plan.Mesh) { m.Services[0].Ports = []plan.Port{{Protocol: "tcp"}} },
		"protocol":       func(m *plan.Mesh) { m.Services[0].Ports = []plan.Port{{Port: 1, Protocol: "udp"}} },
		"named twice":    func(m *plan.Mesh) { m.Services = append(m.Services, m.Services[0]) },
		"no gateway":     func(m *plan.Mesh) { m.Services[0].Endpoints = []plan.Endpoint{{Address: m.Services[0].Address}} },
		"shared address": func(m *plan.Mesh) { s := m.Services[0]; s.Name = "z"; m.Services = append(m.Services, s) },
	} {
		raw, err := json.Marshal(w.plan)
		if err != nil {
			t.Fatal(err)
		}
		var m plan.Mesh
		if err := json.Unmarshal(raw, &m); err != nil {
			t.Fatal(err)
		}
		change(&m)
		if err := w.link.SetPlan(context.Background(), m); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if !bytes.Contains([]byte(serverName(w.boxes["a-1"].Address)), []byte("10-88-0-1")) {
		t.Error("server name")
	}
}
