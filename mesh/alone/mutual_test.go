package alone

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// authority signs certificates.
type authority struct {
	t    testing.TB
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// newAuthority writes NAME.pem.
func newAuthority(t testing.TB, dir, name string) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{t: t, dir: dir, key: key}
	a.cert = a.sign(name, &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, key, nil)
	return a
}

func (a *authority) sign(file string, x *x509.Certificate, key *ecdsa.PrivateKey, by *x509.Certificate) *x509.Certificate {
	a.t.Helper()
	x.SerialNumber, _ = rand.Int(rand.Reader, big.NewInt(1<<62))
	x.NotBefore, x.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	if by == nil {
		by = x
	}
	der, err := x509.CreateCertificate(rand.Reader, x, by, &key.PublicKey, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for suffix, block := range map[string]*pem.Block{".key": {Type: "PRIVATE KEY", Bytes: raw}, ".pem": {Type: "CERTIFICATE", Bytes: der}} {
		if err := os.WriteFile(filepath.Join(a.dir, file+suffix), pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert
}

// leaf writes FILE.pem and FILE.key with a SPIFFE id and DNS names.
func (a *authority) leaf(file, id string, names ...string) tls.Certificate {
	a.t.Helper()
	x := &x509.Certificate{DNSNames: names, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if id != "" {
		u, err := url.Parse(id)
		if err != nil {
			a.t.Fatal(err)
		}
		x.URIs = []*url.URL{u}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	a.sign(file, x, key, a.cert)
	c, err := tls.LoadX509KeyPair(filepath.Join(a.dir, file+".pem"), filepath.Join(a.dir, file+".key"))
	if err != nil {
		a.t.Fatal(err)
	}
	return c
}

// TestMutual demands certificates of clients and shows one to the server.
func TestMutual(t *testing.T) {
	dir := t.TempDir()
	ca, stranger := newAuthority(t, dir, "ca"), newAuthority(t, dir, "stranger")
	server := ca.leaf("server", "spiffe://example.org/ns/a/sa/server", "web.example")
	ca.leaf("proxy", "spiffe://example.org/ns/a/sa/proxy")
	up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, r.TLS.PeerCertificates[0].URIs[0].String()+" for "+strings.Join(r.Header["X-Forwarded-Client-Cert"], "|")+" "+r.TLS.CurveID.String())
	}))
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	up.TLS = &tls.Config{Certificates: []tls.Certificate{server}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	up.EnableHTTP2 = true
	up.StartTLS()
	t.Cleanup(up.Close)
	config := func(names string) string {
		return `
version: 1
listeners:
- name: web
  address: 127.0.0.1:0
  tls:
    certificates: [{chain: ` + dir + `/server.pem, key: ` + dir + `/server.key}]
    clients: {ca: ` + dir + `/ca.pem, names: ['spiffe://example.org/ns/b/*', good.example]}
hosts: [{names: ['*'], routes: [{upstream: up, retries: {attempts: 1}}]}]
upstreams:
- name: up
  protocol: http2
  endpoints: [{address: ` + strings.TrimPrefix(up.URL, "https://") + `}]
  tls: {ca: ` + dir + `/ca.pem, names: [` + names + `], certificate: {chain: ` + dir + `/proxy.pem, key: ` + dir + `/proxy.key}}
`
	}
	p := serve(t, config("'spiffe://example.org/ns/a/sa/server'"))
	ask := func(p *Proxy, certs ...tls.Certificate) (string, tls.CurveID, error) {
		tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "web.example", Certificates: certs}, ForceAttemptHTTP2: true}
		defer tr.CloseIdleConnections()
		req, _ := http.NewRequest("GET", "https://"+p.Address("web").String(), nil)
		req.Header.Set("X-Forwarded-Client-Cert", "Hash=0;URI=spiffe://example.org/forged")
		resp, err := (&http.Client{Transport: tr, Timeout: patience}).Do(req)
		if err != nil {
			return "", 0, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), resp.TLS.CurveID, err
	}
	good, named := ca.leaf("good", "spiffe://example.org/ns/b/sa/client"), ca.leaf("named", "", "good.example")
	for _, c := range []tls.Certificate{good, named} {
		got, curve, err := ask(p, c)
		if err != nil || !strings.HasPrefix(got, "spiffe://example.org/ns/a/sa/proxy for Hash=") || strings.Contains(got, "forged") || strings.Contains(got, "|") {
			t.Errorf("%q, %v", got, err)
		}
		if curve != tls.X25519MLKEM768 || !strings.HasSuffix(got, " X25519MLKEM768") {
			t.Errorf("keys are exchanged by %v, and with the server: %q", curve, got)
		}
	}
	for why, certs := range map[string][]tls.Certificate{
		"none": nil, "another's": {stranger.leaf("other", "spiffe://example.org/ns/b/sa/client")},
		"another name": {ca.leaf("bad", "spiffe://example.org/ns/c/sa/client", "bad.example")},
	} {
		if got, _, err := ask(p, certs...); err == nil {
			t.Errorf("%s: %q", why, got)
		}
	}
	if got, _, err := ask(serve(t, config("'spiffe://example.org/ns/z/*'")), good); err != nil || !strings.Contains(got, "no name that is allowed") {
		t.Errorf("a server with another name: %q, %v", got, err)
	}
	// Another authority is put in place of the first.
	other := newAuthority(t, dir, "ca")
	p.world.Load().sites["web"].tls.refresh(slog.New(slog.DiscardHandler), "web")
	if got, _, err := ask(p, good); err == nil {
		t.Errorf("signed by the authority before: %q", got)
	}
	if got, _, err := ask(p, other.leaf("new", "spiffe://example.org/ns/b/sa/client")); err != nil || got == "" {
		t.Errorf("signed by the new authority: %q, %v", got, err)
	}
	u := p.world.Load().upstreams["up"]
	if !u.tls.refresh(slog.New(slog.DiscardHandler)) {
		t.Error("the upstream's authorities have not changed")
	}
	u.renew()
	if got, _, err := ask(p, other.leaf("new", "spiffe://example.org/ns/b/sa/client")); err != nil || !strings.Contains(got, "unknown authority") {
		t.Errorf("a server of the authority before: %q, %v", got, err)
	}
}
