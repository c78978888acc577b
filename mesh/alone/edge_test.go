package alone

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"hauberk.dev/mesh/proxyproto"
)

// certify writes a certificate for names that signs itself.
func certify(t testing.TB, dir, file string, names ...string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{SerialNumber: serial, DNSNames: names, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{".key": {Type: "PRIVATE KEY", Bytes: raw}, ".pem": {Type: "CERTIFICATE", Bytes: der}} {
		if err := os.WriteFile(filepath.Join(dir, file+name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// shake connects by TLS and says which certificate came.
func shake(t testing.TB, address, name string) (*tls.Conn, *x509.Certificate) {
	t.Helper()
	c, err := tls.Dial("tcp", address, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(patience))
	return c, c.ConnectionState().PeerCertificates[0]
}

func ask(t testing.TB, c net.Conn, host string) string {
	t.Helper()
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\n\r\n", host)
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

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	a, wild := certify(t, dir, "a", "a.example"), certify(t, dir, "wild", "*.b.example")
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("X-Forwarded-Proto")) })
	p := serve(t, `
version: 1
listeners:
- name: web
  address: 127.0.0.1:0
  tls: {certificates: [{chain: `+dir+`/a.pem, key: `+dir+`/a.key}, {chain: `+dir+`/wild.pem, key: `+dir+`/wild.key}]}
hosts: [{names: ['*'], routes: [{upstream: up}]}]
`+upstreamOf(up))
	address := p.Address("web").String()
	for name, want := range map[string]*x509.Certificate{"a.example": a, "x.b.example": wild, "unknown": a, "b.example": a} {
		c, got := shake(t, address, name)
		if !got.Equal(want) {
			t.Errorf("%s got the certificate of %v", name, got.DNSNames)
		}
		for range 3 {
			if got := ask(t, c, name); got != "https" {
				t.Errorf("%s: %q", name, got)
			}
		}
		c.Close()
	}
	// Changed files are read again; files that are wrong change nothing.
	site := p.world.Load().sites["web"]
	next := certify(t, dir, "a", "a.example")
	site.tls.refresh(slog.New(slog.DiscardHandler), "web")
	if c, got := shake(t, address, "a.example"); !got.Equal(next) {
		t.Error("the old certificate after a change")
	} else {
		c.Close()
	}
	if err := os.WriteFile(filepath.Join(dir, "a.pem"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	site.tls.refresh(slog.New(slog.DiscardHandler), "web")
	if c, got := shake(t, address, "a.example"); !got.Equal(next) {
		t.Error("another certificate after a file that is wrong")
	} else {
		c.Close()
	}
}

func TestPassthroughAndTCP(t *testing.T) {
	dir := t.TempDir()
	cert := certify(t, dir, "inner", "in.example")
	pair, err := tls.LoadX509KeyPair(dir+"/inner.pem", dir+"/inner.key")
	if err != nil {
		t.Fatal(err)
	}
	inner, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	go echo(inner)
	plain, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	go echo(plain)
	p := serve(t, `
version: 1
listeners:
- {name: sni, address: "127.0.0.1:0", protocol: sni, names: [{names: [in.example], upstream: inner}]}
- {name: tcp, address: "127.0.0.2:0", protocol: tcp, upstream: plain}
upstreams:
- {name: inner, endpoints: [{address: "`+inner.Addr().String()+`"}]}
- {name: plain, endpoints: [{address: "`+plain.Addr().String()+`"}], proxy_protocol: v1}
`)
	c, got := shake(t, p.Address("sni").String(), "in.example")
	defer c.Close()
	if !got.Equal(cert) {
		t.Error("TLS was not passed on whole")
	}
	text := strings.Repeat("through ", 20000)
	go func() { io.WriteString(c, text); c.CloseWrite() }()
	if b, err := io.ReadAll(c); string(b) != text || err != nil {
		t.Errorf("%d bytes of %d, %v", len(b), len(text), err)
	}
	if c, err := tls.Dial("tcp", p.Address("sni").String(), &tls.Config{ServerName: "other.example", InsecureSkipVerify: true}); err == nil {
		c.Close()
		t.Error("a name that is not listed was passed on")
	}
	if c, err := net.Dial("tcp", p.Address("sni").String()); err == nil {
		c.SetDeadline(time.Now().Add(patience))
		io.WriteString(c, "GET / HTTP/1.1\r\n\r\n")
		if b, _ := io.ReadAll(c); len(b) > 0 {
			t.Errorf("%q for what is no TLS", b)
		}
		c.Close()
	}
	raw, err := net.Dial("tcp", p.Address("tcp").String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(patience))
	go func() { io.WriteString(raw, "hello"); raw.(*net.TCPConn).CloseWrite() }()
	b, err := io.ReadAll(raw)
	h, n, perr := proxyproto.Parse(b)
	if err != nil || perr != nil || string(b[n:]) != "hello" || h.Source.String() != raw.LocalAddr().String() {
		t.Errorf("%q, %v, %+v, %v", b, err, h, perr)
	}
}

func echo(ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			io.Copy(c, c)
			c.(interface{ CloseWrite() error }).CloseWrite()
			c.Close()
		}()
	}
}

// Who the client is, is believed of trusted networks only.
func TestProxyProtocol(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, r.Header.Get("X-Forwarded-For")) })
	text := func(from string) string {
		return strings.Replace(one("  - {upstream: up}", upstreamOf(up)), "address: 127.0.0.1:0", "address: '127.0.0.1:0', proxy_protocol_from: ['"+from+"']", 1)
	}
	h := proxyproto.Header{Source: addrPort(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 9), Port: 4711}), Destination: addrPort(&net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 80})}
	believed := serve(t, text("127.0.0.0/8"))
	for _, header := range [][]byte{proxyproto.Append1(nil, h), proxyproto.Append2(nil, h)} {
		c := dial(t, believed)
		c.Write(header)
		if got := ask(t, c, "h"); got != "192.0.2.9" {
			t.Errorf("%q", got)
		}
		c.Close()
	}
	if got := raw(t, believed, "GET / HTTP/1.1\r\nHost: h\r\n\r\n"); got != "" {
		t.Errorf("without a header: %q", got)
	}
	if got := raw(t, serve(t, text("10.0.0.0/8")), string(proxyproto.Append1(nil, h))+"GET / HTTP/1.1\r\nHost: h\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.1 400 ") {
		t.Errorf("from anybody: %q", got)
	}
}

func TestReload(t *testing.T) {
	dir := t.TempDir()
	hold, release := make(chan bool, 1), make(chan bool)
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hold" {
			hold <- true
			<-release
		}
		io.WriteString(w, "old")
	})
	text := "access_log: {path: '" + dir + "/log'}\n" + one("  - {prefix: /, upstream: up}", upstreamOf(up))
	p := serve(t, text)
	c := dial(t, p)
	defer c.Close()
	if got := ask(t, c, "h"); got != "old" {
		t.Errorf("%q", got)
	}
	late := make(chan string, 1)
	go func() { late <- raw(t, p, "GET /hold HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n") }()
	<-hold
	load := func(text string) error {
		c, err := Parse("proxy.yaml", dir, []byte(text))
		if err != nil {
			return err
		}
		return p.Reload(c)
	}
	next := strings.Replace(text, "upstream: up}", "respond: {status: 200, body: new}}", 1)
	if err := load(next); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, c, "h"); got != "new" { // the same connection
		t.Errorf("%q", got)
	}
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	for _, bad := range []string{"version: 2", strings.Replace(next, "address: 127.0.0.1:0", "address: '"+busy.Addr().String()+"'", 1),
		"admin: /other\n" + next} {
		if err := load(bad); err == nil {
			t.Errorf("accepted: %s", bad)
		}
		if got := ask(t, c, "h"); got != "new" {
			t.Errorf("after a bad file: %q", got)
		}
	}
	close(release)
	if got := <-late; !strings.HasSuffix(got, "old") {
		t.Errorf("the request under way: %q", got)
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		b, _ := os.ReadFile(dir + "/log")
		if strings.Contains(string(b), `"/hold" 200 `) && strings.Count(string(b), `"/" 200 `) >= 5 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("log:\n%s", b)
		}
	}
}

// A stop lets requests under way end, and nothing else wait.
func TestStop(t *testing.T) {
	hold, release := make(chan bool, 1), make(chan bool)
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		hold <- true
		<-release
		io.WriteString(w, "done")
	})
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(one("  - {prefix: /, upstream: up}", upstreamOf(up))))
	if err != nil {
		t.Fatal(err)
	}
	p, err := Open(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	quiet := dial(t, p)
	defer quiet.Close()
	late := make(chan string, 1)
	go func() { late <- raw(t, p, "GET / HTTP/1.1\r\nHost: h\r\n\r\n") }()
	<-hold
	cancel()
	if b, err := io.ReadAll(quiet); len(b) > 0 || err != nil {
		t.Errorf("idle: %q, %v", b, err)
	}
	select {
	case <-ended:
		t.Error("ended before its request")
	default:
	}
	close(release)
	if got := <-late; !strings.HasSuffix(got, "done") || !strings.Contains(got, "Connection: close\r\n") {
		t.Errorf("the request under way: %q", got)
	}
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Error("does not end")
	}
}

func TestAdmin(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	p := serve(t, "admin: '"+socket+"'\n"+one("  - {name: hello, respond: {status: 200}}"))
	raw(t, p, "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
	if fi, err := os.Stat(socket); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	for path, want := range map[string]string{"/metrics": `hauberk_proxy_requests_total{route="hello",status="2xx"} 1`, "/status": `"generation":1`, "/x": "not found"} {
		c, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", path)
		if b, _ := io.ReadAll(c); !strings.Contains(string(b), want) {
			t.Errorf("%s: %s", path, b)
		}
		c.Close()
	}
}

// Many clients, some of which leave in the middle, cost neither goroutines nor
// answers of others.
func TestCrowd(t *testing.T) {
	var served atomic.Int64
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		b, _ := io.ReadAll(r.Body)
		w.Write(b)
	})
	p := serve(t, one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	done := make(chan error, 20)
	for i := range cap(done) {
		go func() {
			done <- func() error {
				for j := range 20 {
					c, err := net.Dial("tcp", p.Address("web").String())
					if err != nil {
						return err
					}
					c.SetDeadline(time.Now().Add(patience))
					body := fmt.Sprintf("%d-%d-%s", i, j, strings.Repeat("b", i*j*50))
					fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n", len(body))
					if j%5 == 4 {
						c.Close()
						continue
					}
					io.WriteString(c, body)
					resp, err := http.ReadResponse(bufio.NewReader(c), nil)
					if err != nil {
						return err
					}
					if b, err := io.ReadAll(resp.Body); err != nil || string(b) != body {
						return fmt.Errorf("%d bytes for %d, %v", len(b), len(body), err)
					}
					c.Close()
				}
				return nil
			}()
		}()
	}
	for range cap(done) {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for deadline := time.Now().Add(patience); p.open.Load() > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d connections stay open", p.open.Load())
		}
	}
}

// An endpoint that fails its checks gets no requests, and gets them again when
// it is well; what an endpoint does with a hash, it always does.
func TestBalance(t *testing.T) {
	var sick atomic.Bool
	served := [2]atomic.Int64{}
	var ups [2]string
	for i := range ups {
		ups[i] = origin(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/health" {
				if i == 0 && sick.Load() {
					w.WriteHeader(500)
				}
				return
			}
			served[i].Add(1)
		})
	}
	text := one("  - {prefix: /hash, upstream: sticky, hash: 'header:X-User'}\n  - {prefix: /, upstream: up}", upstreamOf(ups[:]...),
		"  balance: round-robin\n  check: {path: /health, interval: 20ms, healthy: 1, unhealthy: 1}",
		"- {name: sticky, balance: maglev, endpoints: [{address: '"+strings.TrimPrefix(ups[0], "http://")+"'}, {address: '"+strings.TrimPrefix(ups[1], "http://")+"'}]}")
	p := serve(t, text)
	for range 20 {
		get(t, p, "GET", "/", nil, nil)
	}
	if a, b := served[0].Load(), served[1].Load(); a != 10 || b != 10 {
		t.Errorf("in turn: %d and %d", a, b)
	}
	sick.Store(true)
	wait := func(want int) {
		t.Helper()
		for deadline := time.Now().Add(patience); strings.Count(string(p.metrics()), `upstream_up{upstream="up"`) != 2 ||
			strings.Count(string(p.metrics()), "\nhauberk_proxy_upstream_up{upstream=\"up\",endpoint=\""+strings.TrimPrefix(ups[0], "http://")+fmt.Sprintf("\"} %d\n", want)) != 1; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the first is not %d:\n%s", want, p.metrics())
			}
		}
	}
	wait(0)
	before := served[0].Load()
	for range 10 {
		get(t, p, "GET", "/", nil, nil)
	}
	if served[0].Load() != before {
		t.Error("requests went to an endpoint that is not well")
	}
	// A reload keeps what is known.
	c, err := Parse("proxy.yaml", t.TempDir(), []byte(text+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Reload(c); err != nil {
		t.Fatal(err)
	}
	get(t, p, "GET", "/", nil, nil)
	if served[0].Load() != before {
		t.Error("a reload forgot that an endpoint is not well")
	}
	sick.Store(false)
	wait(1)
	for _, user := range []string{"ann", "bob", "eve"} {
		first := served[0].Load()
		for range 5 {
			get(t, p, "GET", "/hash", nil, func(r *http.Request) { r.Header.Set("X-User", user) })
		}
		if n := served[0].Load() - first; n != 0 && n != 5 {
			t.Errorf("%s: %d of 5 at the first", user, n)
		}
	}
}
