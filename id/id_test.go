package id_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"hauberk.dev/id"
)

const td = "hauberk.test"

func TestNames(t *testing.T) {
	for _, c := range []struct {
		s    string
		kind id.Kind
	}{
		{"spiffe://hauberk.local/ns/bank/sa/web", id.KindWorkload},
		{"spiffe://cluster.local/ns/kube-system/sa/istio.reader-1", id.KindWorkload},
		{"spiffe://a/hauberk/node/n1.example.org", id.KindNode},
		{"spiffe://a/hauberk/control", id.KindControl},
		{"spiffe://a/hauberk/ingress", id.KindIngress},
	} {
		n, err := id.ParseName(c.s)
		if err != nil || n.String() != c.s || n.Kind() != c.kind || n.URL().String() != c.s {
			t.Errorf("%s: %v (%v), %v", c.s, n, n.Kind(), err)
		}
		if got, err := spiffeid.FromString(c.s); err != nil || got.TrustDomain().Name() != n.TrustDomain() {
			t.Errorf("%s: go-spiffe: %v, %v", c.s, got, err)
		}
		raw, err := json.Marshal(map[string]id.Name{"n": n})
		if err != nil {
			t.Fatal(err)
		}
		var back map[string]id.Name
		if err := json.Unmarshal(raw, &back); err != nil || back["n"] != n {
			t.Errorf("%s through JSON: %v, %v", c.s, back, err)
		}
	}
	for _, s := range []string{
		"", "spiffe://", "spiffe://a", "spiffe://a/", "http://a/ns/b/sa/c", "SPIFFE://a/ns/b/sa/c", "spiffe://A/ns/b/sa/c",
		"spiffe://a:1/ns/b/sa/c", "spiffe://u@a/ns/b/sa/c", "spiffe:///ns/b/sa/c", "spiffe://a//ns/b/sa/c", "spiffe://a/ns/b/sa/c/",
		"spiffe://a/ns/b/sa/c?x", "spiffe://a/ns/b/sa/c#x", "spiffe://a/ns/b/sa/%63", "spiffe://a/ns/../sa/c", "spiffe://a/ns/./sa/c",
		"spiffe://a/ns//sa/c", "spiffe://a/ns/b/sa/", "spiffe://a/ns/b.c/sa/d", "spiffe://a/ns/b/sa/-c", "spiffe://a/ns/b/sa/c-",
		"spiffe://a/ns/b_c/sa/d", "spiffe://a/ns/b/sb/c", "spiffe://a/hauberk/node", "spiffe://a/hauberk/node/", "spiffe://a/hauberk/control/x",
		"spiffe://a/hauberk/other", "spiffe://-a/hauberk/control", "spiffe://a..b/hauberk/control", "spiffe://a/ns/b/sa/c\n", "spiffe://a/ns/b/sa/ü",
		"spiffe://a/ns/" + strings.Repeat("b", 64) + "/sa/c", "spiffe://a/ns/b/sa/" + strings.Repeat("c", 3000),
	} {
		if n, err := id.ParseName(s); err == nil || !n.IsZero() {
			t.Errorf("%.60q: %v", s, n)
		}
	}
	for name, try := range map[string]func() (id.Name, error){
		"slash":  func() (id.Name, error) { return id.Workload(td, "bank", "web/../vault") },
		"empty":  func() (id.Name, error) { return id.Workload(td, "bank", "") },
		"node":   func() (id.Name, error) { return id.Node(td, "n/1") },
		"domain": func() (id.Name, error) { return id.Control("a/b") },
	} {
		if n, err := try(); err == nil || !n.IsZero() {
			t.Errorf("%s: %v", name, n)
		}
	}
	w, err := id.Workload(td, "bank", "web")
	if err != nil || w.Namespace() != "bank" || w.Workload() != "web" || w.Node() != "" {
		t.Errorf("%v, %v", w, err)
	}
}

func TestKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.pem")
	a, err := id.LoadOrCreateKey(path)
	if err != nil {
		t.Fatal(err)
	}
	b, err := id.LoadOrCreateKey(path)
	if err != nil || !a.Equal(b) {
		t.Errorf("second load: %v", err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := id.LoadOrCreateKey(link); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("symlink: %v", err)
	}
	dangling := filepath.Join(t.TempDir(), "dangling")
	if err := os.Symlink(filepath.Join(t.TempDir(), "elsewhere"), dangling); err != nil {
		t.Fatal(err)
	}
	if _, err := id.LoadOrCreateKey(dangling); err == nil {
		t.Error("a key was made through a dangling link")
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := id.LoadKey(path); err == nil || !strings.Contains(err.Error(), "0644") {
		t.Errorf("open mode: %v", err)
	}
	if err := errors.Join(os.WriteFile(path, []byte("torn"), 0o600), os.Chmod(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := id.LoadOrCreateKey(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("torn key: %v", err)
	}
}

// authority is a CA that signs whatever a test wants.
type authority struct {
	t    testing.TB
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t testing.TB) *authority {
	a := &authority{t: t, key: newKey(t)}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func (a *authority) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(a.cert)
	return p
}

func (a *authority) leaf(name string, change func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	u, err := url.Parse(name)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if change != nil {
		change(tmpl)
	}
	key := newKey(a.t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

const web = "spiffe://hauberk.test/ns/bank/sa/web"

func TestLeafRules(t *testing.T) {
	a := newAuthority(t)
	check := func(c tls.Certificate) (id.Name, error) {
		chain, err := id.ParseChain(c.Certificate)
		if err != nil {
			t.Fatal(err)
		}
		return id.Verify(chain, a.pool(), time.Now(), x509.ExtKeyUsageClientAuth)
	}
	if n, err := check(a.leaf(web, nil)); err != nil || n.String() != web {
		t.Errorf("good: %v, %v", n, err)
	}
	for name, change := range map[string]func(*x509.Certificate){
		"CA":           func(c *x509.Certificate) { c.IsCA = true },
		"cert sign":    func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign },
		"crl sign":     func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCRLSign },
		"no signature": func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement },
		"no name":      func(c *x509.Certificate) { c.URIs = nil; c.DNSNames = []string{"web"} },
		"two names":    func(c *x509.Certificate) { c.URIs = append(c.URIs, &url.URL{Scheme: "https", Host: "x"}) },
		"expired":      func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) },
		"not yet":      func(c *x509.Certificate) { c.NotBefore = time.Now().Add(30 * time.Second) },
		"server only":  func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"other scheme": func(c *x509.Certificate) { c.URIs[0].Scheme = "https" },
		"escaped": func(c *x509.Certificate) {
			c.URIs = nil
			c.ExtraExtensions = san(t, "spiffe://hauberk.test/ns/bank/sa/%77eb")
		},
	} {
		if n, err := check(a.leaf(web, change)); err == nil {
			t.Errorf("%s: accepted as %v", name, n)
		}
	}
	if n, err := check(newAuthority(t).leaf(web, nil)); err == nil {
		t.Errorf("foreign root: accepted as %v", n)
	}
	chain, err := id.ParseChain(a.leaf(web, nil).Certificate)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := id.Verify(chain, nil, time.Now(), x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("no roots: accepted")
	}
	if _, err := id.Verify(nil, a.pool(), time.Now(), x509.ExtKeyUsageClientAuth); err == nil {
		t.Error("no chain: accepted")
	}
}

func san(t *testing.T, uri string) []pkix.Extension {
	t.Helper()
	raw, err := asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(uri)}})
	if err != nil {
		t.Fatal(err)
	}
	return []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: raw}}
}

// shake has a client and a server meet, and returns what each says after a
// byte went both ways.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(5 * time.Second)
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(s, server)
		conn.SetDeadline(deadline)
		buf := make([]byte, 1)
		_, err := io.ReadFull(conn, buf)
		if err == nil {
			_, err = conn.Write(buf)
		}
		s.Close()
		done <- err
	}()
	conn := tls.Client(c, client)
	conn.SetDeadline(deadline)
	_, clientErr = conn.Write([]byte("x"))
	if clientErr == nil {
		_, clientErr = io.ReadFull(conn, make([]byte, 1))
	}
	c.Close()
	return <-done, clientErr
}

func TestTLS(t *testing.T) {
	a := newAuthority(t)
	source := func(name string) id.Source {
		return id.Static(id.Credential{Certificate: a.leaf(name, nil), Roots: a.pool()})
	}
	must := func(n id.Name, err error) id.Name {
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	control, node := must(id.Control(td)), must(id.Node(td, "n1"))
	if s, c := shake(t, id.ServerTLS(source(control.String()), id.AnyOf(id.KindNode, td)), id.ClientTLS(source(node.String()), id.Only(control))); s != nil || c != nil {
		t.Errorf("good: %v, %v", s, c)
	}
	foreign := newAuthority(t)
	tls12 := id.ClientTLS(source(node.String()), id.Only(control))
	tls12.MinVersion, tls12.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	noCert := id.ClientTLS(source(node.String()), id.Only(control))
	noCert.GetClientCertificate = nil
	nodes := id.AnyOf(id.KindNode, td)
	for name, c := range map[string]struct{ server, client *tls.Config }{
		"server expects nobody":   {id.ServerTLS(source(control.String()), nil), id.ClientTLS(source(node.String()), id.Only(control))},
		"client expects nobody":   {id.ServerTLS(source(control.String()), nodes), id.ClientTLS(source(node.String()), nil)},
		"client expects the zero": {id.ServerTLS(source(control.String()), nodes), id.ClientTLS(source(node.String()), id.Only(id.Name{}))},
		"workload as node":        {id.ServerTLS(source(control.String()), nodes), id.ClientTLS(source(web), id.Only(control))},
		"workload as control":     {id.ServerTLS(source(web), nodes), id.ClientTLS(source(node.String()), id.Only(control))},
		"foreign client":          {id.ServerTLS(source(control.String()), nodes), id.ClientTLS(id.Static(id.Credential{Certificate: foreign.leaf(node.String(), nil), Roots: a.pool()}), id.Only(control))},
		"foreign server":          {id.ServerTLS(id.Static(id.Credential{Certificate: foreign.leaf(control.String(), nil), Roots: a.pool()}), nodes), id.ClientTLS(source(node.String()), id.Only(control))},
		"TLS 1.2":                 {id.ServerTLS(source(control.String()), nodes), tls12},
		"no certificate":          {id.ServerTLS(source(control.String()), nodes), noCert},
		"no roots":                {id.ServerTLS(id.Static(id.Credential{Certificate: a.leaf(control.String(), nil)}), nodes), id.ClientTLS(source(node.String()), id.Only(control))},
		"no credential":           {id.ServerTLS(source(control.String()), nodes), id.ClientTLS(func() (id.Credential, error) { return id.Credential{}, errors.New("none yet") }, id.Only(control))},
	} {
		if s, c := shake(t, c.server, c.client); s == nil || c == nil {
			t.Errorf("%s: server %v, client %v", name, s, c)
		}
	}
}

func TestPEM(t *testing.T) {
	a := newAuthority(t)
	raw := id.MarshalCertificates(a.cert.Raw)
	if certs, err := id.ParseCertificates(append(raw, raw...)); err != nil || len(certs) != 2 {
		t.Errorf("%v, %v", certs, err)
	}
	key, err := id.MarshalKey(a.key)
	if err != nil {
		t.Fatal(err)
	}
	for name, raw := range map[string][]byte{"empty": nil, "key": key, "key behind": append(raw[:len(raw):len(raw)], key...), "text": []byte("hello"), "large": make([]byte, 2<<20)} {
		if _, err := id.ParseCertificates(raw); err == nil {
			t.Errorf("%s: parsed", name)
		}
	}
	if _, err := id.ParsePool(id.MarshalCertificates(a.leaf(web, nil).Certificate...)); err == nil {
		t.Error("a leaf became a root")
	}
	public, err := id.MarshalPublicKey(a.key.Public())
	if err != nil {
		t.Fatal(err)
	}
	if back, err := id.ParsePublicKey(public); err != nil || !a.key.PublicKey.Equal(back) {
		t.Errorf("%v, %v", back, err)
	}
}

func FuzzParseName(f *testing.F) {
	f.Add(web)
	f.Add("spiffe://a/hauberk/node/n1")
	f.Fuzz(func(t *testing.T, s string) {
		n, err := id.ParseName(s)
		if err != nil {
			return
		}
		if n.String() != s || n.URL().String() != s {
			t.Fatalf("%q prints back as %q", s, n)
		}
		if _, err := spiffeid.FromString(s); err != nil {
			t.Fatalf("go-spiffe refuses %q: %v", s, err)
		}
	})
}

func FuzzCertificate(f *testing.F) {
	a := newAuthority(f)
	f.Add(a.leaf(web, nil).Certificate[0])
	f.Add(a.cert.Raw)
	f.Fuzz(func(t *testing.T, der []byte) {
		chain, err := id.ParseChain([][]byte{der})
		if err != nil {
			return
		}
		if n, err := id.FromCertificate(chain[0]); err == nil && n.IsZero() {
			t.Fatal("nobody's certificate")
		}
	})
}
