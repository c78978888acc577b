// Package kubetest starts a real API server in the test process.
//
// It is for tests of rooms that read and write resources. Accounts are made
// on the spot; nothing of it is fit for anything but tests.
package kubetest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"testing"
	"time"

	"hauberk.dev/kube"
)

// Authority signs certificates for a test.
type Authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// NewAuthority makes a new root.
func NewAuthority(t testing.TB) *Authority {
	a := &Authority{t: t, key: newKey(t)}
	a.cert = &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, a.cert, a.cert, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

// Roots is the root in PEM.
func (a *Authority) Roots() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// Issue signs a certificate after change had its say.
func (a *Authority) Issue(change func(*x509.Certificate)) (cert, key []byte) {
	a.t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		a.t.Fatal(err)
	}
	k := newKey(a.t)
	c := &x509.Certificate{
		SerialNumber: serial, NotBefore: a.cert.NotBefore, NotAfter: a.cert.NotAfter, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	change(c)
	der, err := x509.CreateCertificate(rand.Reader, c, a.cert, k.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalECPrivateKey(k)
	if err != nil {
		a.t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: raw})
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// API is a running server.
type API struct {
	// URL it answers at.
	URL string
	// Authority signs its certificate and its accounts.
	Authority *Authority
	// Options it was opened with; its Dir outlives it until the test ends.
	Options kube.Options

	t    testing.TB
	stop func() error
}

// Start runs a server until the test ends. change may adjust its options.
func Start(t testing.TB, change ...func(*kube.Options)) *API {
	t.Helper()
	a := &API{t: t, Authority: NewAuthority(t)}
	// Paths of sockets are short, those of t.TempDir are not.
	dir, err := os.MkdirTemp("", "kube")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a.Options = kube.Options{Dir: dir, Address: "127.0.0.1:0", ClientRoots: a.Authority.Roots()}
	a.Options.Certificate, a.Options.Key = a.Authority.Issue(func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	})
	for _, f := range change {
		f(&a.Options)
	}
	a.Run()
	return a
}

// Run starts the server again after Stop, at another address.
func (a *API) Run() {
	a.t.Helper()
	s, err := kube.Open(a.Options)
	if err != nil {
		a.t.Fatal(err)
	}
	a.URL = s.URL()
	ctx, cancel := context.WithCancel(context.Background())
	ended, stopped := make(chan error, 1), false
	go func() { ended <- s.Run(ctx) }()
	a.stop = func() error {
		cancel()
		if stopped {
			return nil
		}
		stopped = true
		return <-ended
	}
	a.t.Cleanup(func() { a.Stop() })
	select {
	case <-s.Ready():
	case err := <-ended:
		stopped = true
		a.t.Fatalf("run API server: %v", err)
	case <-time.After(time.Minute):
		a.t.Fatal("the API server is not ready after a minute")
	}
}

// Stop ends the server and waits for it.
func (a *API) Stop() {
	a.t.Helper()
	if err := a.stop(); err != nil {
		a.t.Errorf("end API server: %v", err)
	}
}

// Account makes an account in the given groups.
func (a *API) Account(name string, groups ...string) kube.Access {
	a.t.Helper()
	cert, key := a.Authority.Issue(func(c *x509.Certificate) {
		c.Subject = pkix.Name{CommonName: name, Organization: groups}
	})
	return kube.Access{Server: a.URL, Roots: a.Authority.Roots(), Certificate: cert, Key: key}
}

// Admin makes an account that may do everything.
func (a *API) Admin() kube.Access { return a.Account("admin", kube.GroupMasters) }
