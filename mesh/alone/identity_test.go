package alone

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"hauberk.dev/internal/svidlink"
)

// TestIdentityFaults says what of a configuration names nobody, or believes anybody.
func TestIdentityFaults(t *testing.T) {
	dir := t.TempDir()
	newAuthority(t, dir, "ca")
	const with = "identities: keys\n"
	const all = "certificates: [{identity: default}]"
	for _, c := range []struct{ top, tls, up, want string }{
		{with, all, "", ""},
		{with, all + ", clients: {bundles: [a.example], names: ['spiffe://a.example/*', 'spiffe://a.example/b', 'spiffe://a.example/b*']}", "bundles: [b.example], certificate: {identity: x}", ""},
		{with, all + ", clients: {authorities: people, names: [a.example]}", "authorities: servers", ""},
		{"", all, "", "listeners[0].tls.certificates[0].identity: names what nobody hands over"},
		{"", "certificates: [{chain: ca.pem, key: ca.key}], clients: {bundles: [a.example]}", "", "clients.bundles: names what nobody hands over"},
		{"", "certificates: [{chain: ca.pem, key: ca.key}]", "authorities: x", "upstreams[0].tls.authorities: names what nobody hands over"},
		{"", "certificates: [{chain: ca.pem, key: ca.key}]", "certificate: {identity: x}", "upstreams[0].tls.certificate.identity: names"},
		{with, "certificates: [{identity: default, chain: ca.pem, key: ca.key}]", "", "identity goes without chain and key"},
		{with, all + ", clients: {ca: ca.pem, bundles: [a.example]}", "", "more than one of ca, authorities and bundles"},
		{with, all + ", clients: {optional: true}", "", "clients.ca: is missing"},
		{with, all + ", clients: {bundles: ['*']}", "", `"*" is no trust domain`},
		{with, all + ", clients: {bundles: [a.example/b]}", "", `"a.example/b" is no trust domain`},
		{with, all + ", clients: {bundles: [a.example], names: ['spiffe://a.example*']}", "", "is no SPIFFE id"},
		{with, all + ", clients: {bundles: [a.example], names: [a.example]}", "", "is no SPIFFE id"},
		{with, all, "bundles: [a.example], names: ['spiffe://*']", "upstreams[0].tls.names[0]"},
	} {
		text := "version: 1\n" + c.top + "listeners: [{name: a, address: ':1', tls: {" + c.tls + "}}]\nhosts: [{names: ['*'], routes: [{upstream: u}]}]\n" +
			"upstreams: [{name: u, endpoints: [{address: 'a:1'}], tls: {" + c.up + "}}]\n"
		_, err := Parse("f", dir, []byte(text))
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s\n%v\nwant %q", text, err, c.want)
		}
	}
}

// TestTakeRefuses keeps what was handed over when what comes next cannot be.
func TestTakeRefuses(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	set := func(name string) *svidlink.Set {
		c := ca.leaf("leaf", "", "web.example")
		key, err := x509.MarshalPKCS8PrivateKey(c.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		return &svidlink.Set{Identities: []svidlink.Identity{{Name: name, Chain: c.Certificate[0], Key: key}}, Bundles: []svidlink.Bundle{{Name: "people", DER: ca.cert.Raw}}}
	}
	n := newIdentities("nowhere", slog.New(slog.DiscardHandler))
	if _, err := n.certificate("web", time.Now()); err == nil || !strings.Contains(err.Error(), "nothing was asked yet") {
		t.Error(err)
	}
	if err := n.take(set("web")); err != nil {
		t.Fatal(err)
	}
	one, err := n.certificate("web", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for why, edit := range map[string]func(*svidlink.Set){
		"parse certificates":          func(s *svidlink.Set) { s.Identities[0].Chain = []byte("x") },
		"not one in PKCS #8":          func(s *svidlink.Set) { s.Identities[0].Key = []byte("x") },
		"not that of the certificate": func(s *svidlink.Set) { s.Identities[0].Chain = ca.leaf("other", "").Certificate[0] },
		"URI names":                   func(s *svidlink.Set) { s.Identities[0].Name = "spiffe://example.org/web" },
		"not a CA":                    func(s *svidlink.Set) { s.Bundles[0].DER = s.Identities[0].Chain },
		"bundle":                      func(s *svidlink.Set) { s.Bundles[0].DER = nil },
	} {
		s := set("web")
		edit(s)
		key := s.Identities[0].Key
		if err := n.take(s); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%s: %v", why, err)
		}
		for _, b := range key {
			if b != 0 {
				t.Errorf("%s: the key was not cleared", why)
				break
			}
		}
	}
	if again, err := n.certificate("web", time.Now()); err != nil || again != one || n.malformed.Load() != 6 {
		t.Errorf("%v, %v, %d refused", again, err, n.malformed.Load())
	}
	if _, err := n.certificate("web", time.Now().Add(2*time.Hour)); err == nil || !strings.Contains(err.Error(), "has no successor") {
		t.Error(err)
	}
	if _, err := n.roots("people"); err != nil {
		t.Error(err)
	}
	if _, err := n.certificate("default", time.Now()); err == nil {
		t.Error("a secret was taken for the Workload API's default")
	}
}

// TestSPIFFEPeer reads names as SPIFFE has them, and none that is almost one.
func TestSPIFFEPeer(t *testing.T) {
	dir := t.TempDir()
	ca := newAuthority(t, dir, "ca")
	n := newIdentities("nowhere", slog.New(slog.DiscardHandler))
	if err := n.take(&svidlink.Set{Bundles: []svidlink.Bundle{{Name: "spiffe://example.org", DER: ca.cert.Raw}}}); err != nil {
		t.Fatal(err)
	}
	who := &trust{source: n, bundles: []string{"example.org", "absent.example"}, usage: x509.ExtKeyUsageClientAuth}
	for name, ok := range map[string]bool{
		"spiffe://example.org/a": true, "spiffe://example.org/A_b.c-d/e": true, "spiffe://example.org": true,
		"spiffe://example.org/": false, "spiffe://example.org//a": false, "spiffe://example.org/a/../b": false, "spiffe://example.org/%61": false,
		"spiffe://EXAMPLE.org/a": false, "spiffe://example.org:1/a": false, "spiffe://u@example.org/a": false, "spiffe://example.org/a?b": false,
		"https://example.org/a": false, "spiffe://absent.example/a": false, "spiffe://other.example/a": false,
	} {
		u, err := url.Parse(name)
		if err != nil {
			t.Fatal(err)
		}
		key := ca.key
		leaf := ca.sign("peer", &x509.Certificate{URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, key, ca.cert)
		if err := who.vouch([]*x509.Certificate{leaf}); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestTakeOverWithoutIdentities leaves the place to who has it while there is nothing
// to prove itself with, and waits for what comes in time.
func TestTakeOverWithoutIdentities(t *testing.T) {
	dir, err := os.MkdirTemp("", "al")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c, err := Parse("f", dir, []byte("version: 1\nidentities: keys\nlisteners: [{name: a, address: '127.0.0.1:0', tls: {certificates: [{identity: web}]}}]\n"+
		"hosts: [{names: ['*'], routes: [{respond: {status: 200}}]}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if p, _, err := TakeOver(ctx, dir+"/nobody", c, nil); err == nil || p != nil || !strings.Contains(err.Error(), `there is no identity "web": ask for identities`) {
		t.Errorf("%v", err)
	}
	p, err := prepare(c, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.world.Load().close(nil)
	ca := newAuthority(t, dir, "ca")
	leaf := ca.leaf("leaf", "", "web.example")
	key, err := x509.MarshalPKCS8PrivateKey(leaf.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	hub := source(t, dir+"/keys")
	for _, s := range []*svidlink.Set{{}, {Identities: []svidlink.Identity{{Name: "web", Chain: leaf.Certificate[0], Key: key}}}} {
		if err := hub.Put(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.identities.await(context.Background(), p.world.Load(), awaitTime); err != nil {
		t.Error(err)
	}
}

// source hands over what is put into it.
func source(t *testing.T, path string) *svidlink.Hub {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	hub := &svidlink.Hub{}
	serving, stop := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- hub.Serve(serving, ln, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return hub
}
