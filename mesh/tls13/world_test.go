package tls13

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"hauberk.dev/mesh/wire"
)

// patience is how long anything may take on the slowest machine.
const patience = 60 * time.Second

var suites = []uint16{tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384, tls.TLS_CHACHA20_POLY1305_SHA256}

// sockets are both ends of a TCP connection.
func sockets(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	d, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); d.Close() })
	for _, c := range []net.Conn{c, d} {
		c.SetDeadline(time.Now().Add(patience))
	}
	return c.(*net.TCPConn), d.(*net.TCPConn)
}

// made is a connection without a handshake, with the secrets given.
func made(t testing.TB, c *net.TCPConn, suite uint16, read, write byte, client bool) *Conn {
	t.Helper()
	su, err := suiteOf(suite)
	if err != nil {
		t.Fatal(err)
	}
	secret := func(fill byte) []byte {
		b := make([]byte, su.hash().Size())
		for i := range b {
			b[i] = fill
		}
		return b
	}
	w := wire.New(c)
	got, err := Resume(w, State{func() *state {
		return &state{Client: client, Suite: suite, Read: way{Secret: secret(read)}, Write: way{Secret: secret(write)}}
	}}, client)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// pair is a client and a server that have met.
func pair(t testing.TB, suite uint16) (client, server *Conn) {
	a, b := sockets(t)
	return made(t, a, suite, 's', 'c', true), made(t, b, suite, 'c', 's', false)
}

// papers are a certificate for localhost that its bearer signed, for both roles.
type papers struct {
	cert      tls.Certificate
	roots     *x509.CertPool
	crt, key_ string // files
}

func paper(t testing.TB) papers {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	form := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "peer"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, form, form, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err1 := x509.ParseCertificate(der)
	private, err2 := x509.MarshalPKCS8PrivateKey(key)
	dir := t.TempDir()
	p := papers{cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, roots: x509.NewCertPool(),
		crt: filepath.Join(dir, "crt"), key_: filepath.Join(dir, "key")}
	err3 := os.WriteFile(p.crt, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600)
	err4 := os.WriteFile(p.key_, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600)
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	p.roots.AddCert(leaf)
	return p
}

func (p papers) server() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{p.cert}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: p.roots, NextProtos: []string{"h2"}}
}

func (p papers) client() *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{p.cert}, RootCAs: p.roots, ServerName: "localhost", NextProtos: []string{"h2"}}
}

// met is the result of a handshake that runs beside another.
type met struct {
	c   *Conn
	err error
}

func shakeBeside(t testing.TB, f func(context.Context, *wire.Conn, *tls.Config) (*Conn, error), c *net.TCPConn, cfg *tls.Config) <-chan met {
	out := make(chan met, 1)
	go func() {
		got, err := f(t.Context(), wire.New(c), cfg)
		out <- met{got, err}
	}()
	return out
}

// moved freezes a connection that nobody uses and takes it up anew: its state
// goes by JSON and its socket by a duplicate, as to another process.
func moved(t testing.TB, c *Conn) *Conn {
	t.Helper()
	below, err1 := json.Marshal(c.wire.State())
	own, err2 := json.Marshal(c.State())
	var ws wire.State
	var s State
	err3 := errors.Join(json.Unmarshal(below, &ws), json.Unmarshal(own, &s), ws.Check())
	f, err4 := c.wire.TCP().File()
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := net.FileConn(f)
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	t.Cleanup(func() { n.Close() })
	w := wire.Resume(n.(*net.TCPConn), ws)
	w.SetDeadline(time.Now().Add(patience))
	got, err := Resume(w, s, c.client)
	if err != nil {
		t.Fatal(err)
	}
	w.Thaw()
	return got
}
