package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"sync/atomic"
	"time"

	"hauberk.dev/id"
)

const domain = "bench.local"

// authority signs for one run. Certificates have the shape of our own CA's:
// P-256, one SPIFFE name.
type authority struct {
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
	serial atomic.Int64
}

func newAuthority() (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	root := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "bench"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, root, root, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{key: key, cert: cert}, err
}

func (a *authority) roots() []byte { return id.MarshalCertificates(a.cert.Raw) }

// issue certifies a key for a name, and for the loopback address.
func (a *authority) issue(public any, name string) ([]byte, error) {
	u, err := url.Parse(name)
	if err != nil {
		return nil, err
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1 + a.serial.Add(1)), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}
	if u.Scheme == "spiffe" {
		c.URIs = []*url.URL{u}
	} else {
		c.DNSNames, c.IPAddresses = []string{u.Path}, []net.IP{net.IPv4(127, 0, 0, 1)}
	}
	return x509.CreateCertificate(rand.Reader, c, a.cert, public, a.key)
}

// pair makes a key and its certificate, PEM, certificate first.
func (a *authority) pair(name string) (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := a.issue(&k.PublicKey, name)
	if err != nil {
		return nil, nil, err
	}
	key, err = id.MarshalKey(k)
	return id.MarshalCertificates(der), key, err
}

func spiffe(workload string) string {
	return fmt.Sprintf("spiffe://%s/ns/bench/sa/%s", domain, workload)
}
