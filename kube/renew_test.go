package kube_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"
	"testing"
	"time"

	"hauberk.dev/kube"
	"hauberk.dev/kube/kubetest"
)

// TestServerCertificateIsRenewedWhileItServes needs no client to be told: the
// next handshake shows the new certificate.
func TestServerCertificateIsRenewedWhileItServes(t *testing.T) {
	a := kubetest.NewAuthority(t)
	local := func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	cert, key := a.Issue(local)
	s, err := kube.Open(kube.Options{Dir: t.TempDir(), Address: "127.0.0.1:0", Certificate: cert, Key: key, ClientRoots: a.Roots()})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Run(t.Context()) }()
	t.Cleanup(func() {
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case <-s.Ready():
	case <-time.After(time.Minute):
		t.Fatal("the server is not ready after a minute")
	}
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	shown := func() []byte {
		c, err := tls.Dial("tcp", u.Host, &tls.Config{InsecureSkipVerify: true}) // looks only
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return c.ConnectionState().PeerCertificates[0].Raw
	}
	first := shown()
	next, nextKey := a.Issue(local)
	if err := s.Renew(next, key); err == nil {
		t.Error("a certificate of another key was accepted")
	}
	if err := s.Renew(next, nextKey); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(20 * time.Second); bytes.Equal(first, shown()); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the old certificate is still shown")
		}
	}
}
