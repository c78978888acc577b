package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	api "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	rpc "google.golang.org/grpc/status"

	"hauberk.dev/internal/token"
	"hauberk.dev/mesh/alone"
	"hauberk.dev/xds/xdstest"
)

// issuer is a trust domain.
type issuer struct {
	t    *testing.T
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newIssuer(t *testing.T, domain string) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	x := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{{Scheme: "spiffe", Host: domain}}}
	der, err := x509.CreateCertificate(rand.Reader, x, x, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issuer{t, key, cert}
}

// svid issues one. change edits it before it is signed.
func (i *issuer) svid(name string, change ...func(*x509.Certificate)) *api.X509SVID {
	i.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		i.t.Fatal(err)
	}
	u, err := url.Parse(name)
	if err != nil {
		i.t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	x := &x509.Certificate{SerialNumber: serial, URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		NotBefore:   time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	for _, c := range change {
		c(x)
	}
	der, err := x509.CreateCertificate(rand.Reader, x, i.cert, &key.PublicKey, i.key)
	if err != nil {
		i.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		i.t.Fatal(err)
	}
	return &api.X509SVID{SpiffeId: name, X509Svid: der, X509SvidKey: raw, Bundle: i.cert.Raw}
}

func lasts(d time.Duration) func(*x509.Certificate) {
	return func(x *x509.Certificate) { x.NotAfter = time.Now().Add(d) }
}

// agent is a Workload API. What it says is what a real one would; the clients of
// go-spiffe read it too.
type agent struct {
	api.UnimplementedSpiffeWorkloadAPIServer
	t    *testing.T
	path string
	stop func()

	mu      sync.Mutex
	says    *api.X509SVIDResponse
	fails   error
	changed chan struct{}
	asked   int
}

func newAgent(t *testing.T) *agent {
	t.Helper()
	a := &agent{t: t, path: socketOf(t), changed: make(chan struct{})}
	a.start()
	t.Cleanup(func() { a.stop() })
	return a
}

func (a *agent) start() {
	a.t.Helper()
	os.Remove(a.path)
	ln, err := net.Listen("unix", a.path)
	if err != nil {
		a.t.Fatal(err)
	}
	srv := grpc.NewServer()
	api.RegisterSpiffeWorkloadAPIServer(srv, a)
	done := make(chan struct{})
	go func() { defer close(done); srv.Serve(ln) }()
	a.stop = sync.OnceFunc(func() { srv.Stop(); <-done })
}

func (a *agent) say(svids ...*api.X509SVID) { a.respond(&api.X509SVIDResponse{Svids: svids}, nil) }

func (a *agent) respond(r *api.X509SVIDResponse, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.says, a.fails = r, err
	close(a.changed)
	a.changed = make(chan struct{})
}

func (a *agent) FetchX509SVID(_ *api.X509SVIDRequest, s grpc.ServerStreamingServer[api.X509SVIDResponse]) error {
	if m, _ := metadata.FromIncomingContext(s.Context()); len(m["workload.spiffe.io"]) != 1 || m["workload.spiffe.io"][0] != "true" {
		return rpc.Error(codes.InvalidArgument, "security header missing from request")
	}
	for {
		a.mu.Lock()
		a.asked++
		says, err, changed := a.says, a.fails, a.changed
		a.mu.Unlock()
		if err != nil {
			return err
		}
		if says != nil {
			if err := s.Send(says); err != nil {
				return err
			}
		}
		select {
		case <-s.Context().Done():
			return nil
		case <-changed:
		}
	}
}

// meshed is a proxy whose identities come from an agent, by this program.
type meshed struct {
	*rig
	agent *agent
	port  int
	logs  *lines
}

// lines keeps what was logged.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newMeshed starts the program and a proxy with what text says of a listener named
// web and upstreams.
func newMeshed(t *testing.T, a *agent, listenerTLS, upstreams string) *meshed {
	t.Helper()
	dir, err := os.MkdirTemp("", "hx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &meshed{rig: &rig{t: t, dir: dir, stopProxy: func() {}, stopXDS: func() {}}, agent: a, logs: &lines{}}
	m.config = &config{Version: 1, Workload: "unix://" + a.path, Identities: dir + "/keys", Status: dir + "/status"}
	if faults := m.config.faults(); len(faults) > 0 {
		t.Fatal(faults)
	}
	t.Cleanup(func() { m.stopXDS(); m.stopProxy() })
	m.run()
	c, err := alone.Parse("proxy.yaml", dir, []byte(`
version: 1
admin: admin
identities: keys
listeners: [{name: web, address: "127.0.0.1:0", tls: {min_version: "1.3", `+listenerTLS+`}}]
hosts: [{names: ["*"], routes: [{upstream: up, retries: {attempts: 1}}]}]
upstreams: [`+upstreams+`]
`))
	if err != nil {
		t.Fatal(err)
	}
	p, err := alone.Open(c, slog.New(slog.NewTextHandler(m.logs, nil)))
	if err != nil {
		t.Fatal(err)
	}
	m.port = p.Address("web").(*net.TCPAddr).Port
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	m.stopProxy = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("proxy: %v", err)
		}
	})
	return m
}

// run starts the program.
func (m *meshed) run() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, m.config, slog.New(slog.NewTextHandler(m.logs, nil))) }()
	m.stopXDS = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Errorf("hauberk-xds: %v", err)
		}
	})
}

// ask asks the proxy's or the program's socket.
func (m *meshed) ask(socket, path string) (int, string) {
	c := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", m.dir+"/"+socket)
	}}}
	r, err := c.Get("http://x" + path)
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	b, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(b)
}

func (m *meshed) ready() bool {
	code, _ := m.ask("admin", "/readyz")
	return code == http.StatusOK
}

// shows is the serial number and name of the certificate that the proxy shows on a
// new connection to one that shows nothing.
func (m *meshed) shows() string {
	var got string
	c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", m.port), &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(s tls.ConnectionState) error {
		got = fmt.Sprintf("%s %x", s.PeerCertificates[0].URIs[0], s.PeerCertificates[0].SerialNumber)
		return nil
	}})
	if err != nil && got == "" {
		return err.Error()
	}
	if c != nil {
		c.Close()
	}
	return got
}

func leafOf(t *testing.T, s *api.X509SVID) string {
	t.Helper()
	c, err := x509.ParseCertificate(s.X509Svid)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%s %x", s.SpiffeId, c.SerialNumber)
}

const (
	webID = "spiffe://example.org/ns/shop/sa/web"
	apiID = "spiffe://example.org/ns/shop/sa/api"
)

// TestWorkloadRotation is one client and one server of go-spiffe, with the proxy
// between them, whose certificates and authorities all change while requests are
// under way: none of them fails.
func TestWorkloadRotation(t *testing.T) {
	first := newIssuer(t, "example.org")
	a, peers := newAgent(t), newAgent(t)
	a.say(first.svid(webID))
	peers.say(first.svid(apiID))
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+peers.path)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	// The server behind the proxy: go-spiffe's TLS demands the proxy's id.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	up := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.TLS.PeerCertificates[0].URIs[0].String()+" for "+r.Header.Get("X-Forwarded-Client-Cert"))
	})}
	go up.Serve(tls.NewListener(ln, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(webID)))))
	defer up.Close()

	m := newMeshed(t, a, `certificates: [{identity: default}], clients: {bundles: [example.org], names: ["spiffe://example.org/ns/shop/*"]}`,
		`{name: up, endpoints: [{address: "`+ln.Addr().String()+`"}], tls: {bundles: [example.org], names: ["`+apiID+`"], certificate: {identity: "`+webID+`"}}}`)
	xdstest.Until(t, "identities at the proxy", m.ready)

	client := func(keep bool) *http.Client {
		return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: !keep,
			TLSClientConfig: tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(webID)))}}
	}
	url := fmt.Sprintf("https://127.0.0.1:%d/", m.port)
	if got := get(client(false), url); !strings.HasPrefix(got, webID+" for Hash=") || !strings.Contains(got, "URI="+apiID) {
		t.Fatalf("%q\n%s", got, m.logs)
	}
	var asked, failed atomic.Uint64
	stop := make(chan struct{})
	var working sync.WaitGroup
	for i := range 4 {
		c := client(i%2 == 0)
		defer c.CloseIdleConnections()
		working.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				asked.Add(1)
				if got := get(c, url); !strings.HasPrefix(got, webID+" for Hash=") {
					failed.Add(1)
					t.Errorf("a request failed: %s", got)
				}
			}
		})
	}
	ended := sync.OnceFunc(func() { close(stop); working.Wait() })
	defer ended()
	for range 20 { // leaves, each waited for
		next := first.svid(webID)
		a.say(next)
		peers.say(first.svid(apiID))
		xdstest.Until(t, "the next certificate", func() bool { return m.shows() == leafOf(t, next) })
	}
	// The authority: first both are believed, then the new one issues, then the old
	// one is let go of.
	second := newIssuer(t, "example.org")
	both := append(append([]byte(nil), first.cert.Raw...), second.cert.Raw...)
	with := func(s *api.X509SVID, bundle []byte) *api.X509SVID { s.Bundle = bundle; return s }
	authorities := func(n int) {
		t.Helper()
		xdstest.Until(t, "authorities at the peers", func() bool {
			b, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString("example.org"))
			return err == nil && len(b.X509Authorities()) == n
		})
	}
	last := with(first.svid(webID), both)
	a.say(last)
	peers.say(with(first.svid(apiID), both))
	xdstest.Until(t, "both authorities at the proxy", func() bool { return m.shows() == leafOf(t, last) })
	authorities(2)
	last = with(second.svid(webID), both)
	a.say(last)
	apiNext := with(second.svid(apiID), both)
	peers.say(apiNext)
	xdstest.Until(t, "the other issuer at the proxy", func() bool { return m.shows() == leafOf(t, last) })
	xdstest.Until(t, "the other issuer at the peers", func() bool {
		s, err := source.GetX509SVID()
		return err == nil && bytes.Equal(s.Certificates[0].Raw, apiNext.X509Svid)
	})
	// A certificate of the old one that somebody has kept.
	kept := first.svid(apiID)
	if err := handshake(m.port, kept); err != nil {
		t.Errorf("while both are believed: %v", err)
	}
	last = second.svid(webID)
	a.say(last)
	peers.say(second.svid(apiID))
	xdstest.Until(t, "the old authority gone at the proxy", func() bool { return m.shows() == leafOf(t, last) })
	authorities(1)
	xdstest.Until(t, "the old authority refused", func() bool { return handshake(m.port, kept) != nil })
	ended()
	if asked.Load() < 50 || failed.Load() != 0 {
		t.Errorf("%d requests, %d failed", asked.Load(), failed.Load())
	}
	if _, metrics := m.ask("admin", "/metrics"); !strings.Contains(metrics, "hauberk_proxy_identity_source_up 1\n") ||
		!strings.Contains(metrics, `hauberk_proxy_identity_expires_seconds{identity="`+webID+`"}`) || strings.Contains(metrics, "identity_rotations_total 0\n") {
		t.Errorf("metrics:\n%s", metrics)
	}
	t.Logf("%d requests through 23 rotations", asked.Load())
}

// handshake connects with an SVID and makes sure the proxy has judged it.
func handshake(port int, s *api.X509SVID) error {
	key, err := x509.ParsePKCS8PrivateKey(s.X509SvidKey)
	if err != nil {
		return err
	}
	c, err := tls.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port), &tls.Config{InsecureSkipVerify: true,
		Certificates: []tls.Certificate{{Certificate: [][]byte{s.X509Svid}, PrivateKey: key}}})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && !bytes.HasPrefix(b, []byte("HTTP/1.1 ")) {
		err = fmt.Errorf("answered %q", b)
	}
	return err
}

// answered is an upstream that needs no identity.
func answered(t *testing.T) string {
	t.Helper()
	return fmt.Sprintf(`{name: up, endpoints: [{address: "127.0.0.1:%d"}]}`, backend(t, "up"))
}

// TestWorkloadSeveral gives two listeners' worth of names to one: by id, by hint, and
// by default. What the API takes back is refused, and what it says wrongly changes
// nothing.
func TestWorkloadSeveral(t *testing.T) {
	ca, a := newIssuer(t, "example.org"), newAgent(t)
	inner, outer, third := ca.svid(webID), ca.svid("spiffe://example.org/outer"), ca.svid("spiffe://example.org/third")
	inner.Hint, outer.Hint, third.Hint = "internal", "external", "external"
	a.say(inner, outer, third)
	m := newMeshed(t, a, `certificates: [{identity: external}]`, answered(t))
	xdstest.Until(t, "the one of the hint", func() bool { return m.shows() == leafOf(t, outer) }) // of two with one hint the first
	if !m.ready() {
		_, why := m.ask("admin", "/readyz")
		t.Errorf("not ready: %s", why)
	}
	code, text := m.ask("status", "/status")
	if code != http.StatusOK || !strings.Contains(text, webID) || strings.Contains(text, "KEY") {
		t.Errorf("%d %s", code, text)
	}

	// Wrong in one place each: the whole response counts for nothing.
	stranger := newIssuer(t, "example.org")
	wrong := func(change func(*api.X509SVID)) *api.X509SVID {
		s := ca.svid("spiffe://example.org/outer")
		s.Hint = "external"
		change(s)
		return s
	}
	for why, s := range map[string]*api.X509SVID{
		"URI names, want exactly one": ca.svid("spiffe://example.org/outer", func(x *x509.Certificate) { x.URIs = append(x.URIs, &url.URL{Scheme: "spiffe", Host: "a"}) }),
		"certificate is a CA":         ca.svid("spiffe://example.org/outer", func(x *x509.Certificate) { x.IsCA, x.BasicConstraintsValid = true, true }),
		"is that of":                  wrong(func(s *api.X509SVID) { s.SpiffeId = "spiffe://example.org/other" }),
		"not that of the certificate": wrong(func(s *api.X509SVID) { s.X509SvidKey = inner.X509SvidKey }),
		"not one in PKCS #8":          wrong(func(s *api.X509SVID) { s.X509SvidKey = []byte("garbage") }),
		"by its own bundle":           wrong(func(s *api.X509SVID) { s.Bundle = stranger.cert.Raw }),
		"is not a CA":                 wrong(func(s *api.X509SVID) { s.Bundle = s.X509Svid }),
		"parse certificates":          wrong(func(s *api.X509SVID) { s.X509Svid = s.X509Svid[:40] }),
	} {
		if why == "by its own bundle" { // which beside another of the domain would be one too many
			a.say(s)
		} else {
			a.say(inner, s)
		}
		xdstest.Until(t, "refused: "+why, func() bool { _, text := m.ask("status", "/status"); return strings.Contains(text, why) })
		if got := m.shows(); got != leafOf(t, outer) {
			t.Errorf("after %q: shows %s", why, got)
		}
	}
	a.respond(&api.X509SVIDResponse{}, nil)
	xdstest.Until(t, "refused: none", func() bool { _, text := m.ask("status", "/status"); return strings.Contains(text, "svids: none") })

	a.say(inner)
	xdstest.Until(t, "not ready without the hint", func() bool { return !m.ready() })
	if got := m.shows(); !strings.Contains(got, "internal error") {
		t.Errorf("without an identity: %s", got)
	}
	if _, why := m.ask("admin", "/readyz"); !strings.Contains(why, `there is no identity \"external\"`) {
		t.Errorf("%s", why)
	}
	xdstest.Until(t, "an event", func() bool {
		return strings.Contains(m.logs.String(), "handshakes are refused for want of an identity")
	})
	a.say(inner, outer)
	xdstest.Until(t, "ready again", m.ready)
}

// TestWorkloadExpiry lets a certificate expire while the API is away, and come back
// with another. Connections that were there live on.
func TestWorkloadExpiry(t *testing.T) {
	ca, a := newIssuer(t, "example.org"), newAgent(t)
	m := newMeshed(t, a, `certificates: [{identity: default}]`, answered(t))
	old := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}, Timeout: time.Minute}
	defer old.CloseIdleConnections()
	url := fmt.Sprintf("https://127.0.0.1:%d/x", m.port)
	xdstest.Until(t, "a connection before the end", func() bool { // on a slow machine one may be over before it is used
		short := ca.svid(webID, lasts(3*time.Second))
		a.say(short)
		xdstest.Until(t, "an identity", func() bool {
			got := m.shows()
			return got == leafOf(t, short) || strings.Contains(got, "internal error")
		})
		return get(old, url) == "up /x "
	})
	a.stop()
	xdstest.Until(t, "not ready, and why", func() bool {
		code, why := m.ask("admin", "/readyz")
		return code == http.StatusServiceUnavailable && strings.Contains(why, "expired at") && strings.Contains(why, "has no successor: the Workload API at unix://")
	})
	if got := m.shows(); !strings.Contains(got, "internal error") {
		t.Errorf("expired: %s", got)
	}
	if got := get(old, url); got != "up /x " {
		t.Errorf("a connection from before: %q", got)
	}
	if _, metrics := m.ask("admin", "/metrics"); !strings.Contains(metrics, `hauberk_proxy_identity_expires_seconds{identity="`+webID+`"} -`) ||
		strings.Contains(metrics, "hauberk_proxy_identity_refused_total 0\n") {
		t.Errorf("metrics:\n%s", metrics)
	}
	// Everything comes back: the API, and this program after it.
	next := ca.svid(webID)
	a.say(next)
	a.start()
	xdstest.Until(t, "the successor", func() bool { return m.shows() == leafOf(t, next) && m.ready() })
	m.stopXDS()
	last := ca.svid(webID)
	if got := m.shows(); got != leafOf(t, next) {
		t.Errorf("without hauberk-xds: %s", got)
	}
	a.say(last)
	m.run()
	xdstest.Until(t, "an identity from the program that began anew", func() bool { return m.shows() == leafOf(t, last) })
}

// TestWorkloadPeers verifies clients by the bundle of their own trust domain, and by
// name.
func TestWorkloadPeers(t *testing.T) {
	home, partner, stranger := newIssuer(t, "example.org"), newIssuer(t, "partner.example"), newIssuer(t, "stranger.example")
	a := newAgent(t)
	federated := map[string][]byte{"spiffe://partner.example": partner.cert.Raw, "spiffe://stranger.example": stranger.cert.Raw}
	a.respond(&api.X509SVIDResponse{Svids: []*api.X509SVID{home.svid(webID)}, FederatedBundles: federated}, nil)
	m := newMeshed(t, a, `certificates: [{identity: default}], clients: {bundles: [example.org, partner.example], names: ["`+apiID+`", "spiffe://partner.example/*", "spiffe://example.org/ns/pay/*"]}`, answered(t))
	xdstest.Until(t, "ready", m.ready)
	for _, c := range []struct {
		by   *issuer
		name string
		ok   bool
		edit func(*x509.Certificate)
	}{
		{by: home, name: apiID, ok: true},
		{by: home, name: "spiffe://example.org/ns/pay/sa/x", ok: true},
		{by: home, name: "spiffe://example.org/ns/shop/sa/other"},
		{by: partner, name: "spiffe://partner.example/any/thing", ok: true},
		{by: partner, name: apiID},                                // vouches for another domain's
		{by: home, name: "spiffe://partner.example/any"},          // likewise
		{by: stranger, name: "spiffe://stranger.example/x"},       // known, and not allowed here
		{by: partner, name: "spiffe://partner.example.evil.test"}, // a longer domain
		{by: partner, name: "spiffe://partner.example/a", edit: func(x *x509.Certificate) { x.KeyUsage = x509.KeyUsageCertSign }},
		{by: partner, name: "spiffe://partner.example/a", edit: lasts(-time.Minute)},
		{by: partner, name: "spiffe://partner.example/a", edit: func(x *x509.Certificate) { x.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }},
	} {
		if c.edit == nil {
			c.edit = func(*x509.Certificate) {}
		}
		if err := handshake(m.port, c.by.svid(c.name, c.edit)); (err == nil) != c.ok {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	// A bundle that is taken back takes its trust domain with it, from the next
	// connection on.
	a.respond(&api.X509SVIDResponse{Svids: []*api.X509SVID{home.svid(webID)}, FederatedBundles: map[string][]byte{"spiffe://other.example": stranger.cert.Raw}}, nil)
	xdstest.Until(t, "the partner refused", func() bool { return handshake(m.port, partner.svid("spiffe://partner.example/any")) != nil })
	if err := handshake(m.port, home.svid(apiID)); err != nil {
		t.Error(err)
	}
}

// TestKeys keeps a file of an issuer's keys, with no control plane at all.
func TestKeys(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := key.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	part := base64.RawURLEncoding.EncodeToString
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, `{"keys": [{"kty": "EC", "crv": "P-256", "kid": "k", "x": %q, "y": %q}]}`, part(raw[1:33]), part(raw[33:]))
	}))
	t.Cleanup(s.Close)
	dir := t.TempDir()
	writePEM(t, dir+"/ca.pem", "CERTIFICATE", s.Certificate().Raw)
	if err := os.WriteFile(dir+"/xds.yaml", []byte("version: 1\nkeys: [{url: '"+s.URL+"', ca: ca.pem, file: keys.json, refresh: 1m, max_age: 1h}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := load(dir + "/xds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, c, slog.New(slog.DiscardHandler)) }()
	xdstest.Until(t, "the file", func() bool { _, err := os.Stat(dir + "/keys.json"); return err == nil })
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	set, err := os.ReadFile(dir + "/keys.json")
	if err != nil {
		t.Fatal(err)
	}
	keys, err := token.ParseKeys(set)
	if err != nil || keys.Check(time.Now()) != nil || keys.Check(time.Now().Add(2*time.Hour)) == nil {
		t.Errorf("%s: %v", set, err)
	}
	for text, want := range map[string]string{
		"version: 1\nkeys: [{url: 'http://x/', file: a}]\n":                                         "want https://",
		"version: 1\nkeys: [{url: 'https://x/', file: a}, {url: 'https://y/', file: a}]\n":          "keys[1].file: another has",
		"version: 1\nkeys: [{url: 'https://x/', file: a, refresh: 1s}]\n":                           "too often",
		"version: 1\nworkload: unix:///run/a\n":                                                     "identities: is missing",
		"version: 1\nworkload: here\nidentities: k\n":                                               "workload: \"here\" is not known",
		"version: 1\nworkload: unix:///run/a\nidentities: k\nproxy: {admin: a, file: b}\n":          "server: is missing",
		"version: 1\nserver: unix:///a\nnode: {id: n}\nproxy: {admin: a, file: b}\nbase: base.yaml": "identities: is not of this file",
	} {
		if err := os.WriteFile(dir+"/base.yaml", []byte("version: 1\nidentities: x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dir+"/bad.yaml", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := load(dir + "/bad.yaml"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
