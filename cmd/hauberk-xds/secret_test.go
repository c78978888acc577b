package main

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	etls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/xds/xdstest"
)

func inline(b []byte) *core.DataSource {
	return &core.DataSource{Specifier: &core.DataSource_InlineBytes{InlineBytes: b}}
}

// certificateSecret is an issued certificate as SDS carries it.
func certificateSecret(t *testing.T, name string, i issued) *etls.Secret {
	t.Helper()
	chain, err1 := os.ReadFile(i.Secret.Chain)
	key, err2 := os.ReadFile(i.Secret.Key)
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	return &etls.Secret{Name: name, Type: &etls.Secret_TlsCertificate{TlsCertificate: &etls.TlsCertificate{CertificateChain: inline(chain), PrivateKey: inline(key)}}}
}

func authoritySecret(name string, all ...*authority) *etls.Secret {
	var text []byte
	for _, a := range all {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})...)
	}
	return &etls.Secret{Name: name, Type: &etls.Secret_ValidationContext{ValidationContext: &etls.CertificateValidationContext{TrustedCa: inline(text)}}}
}

func socketTLS(t *testing.T, m proto.Message) *core.TransportSocket {
	t.Helper()
	return &core.TransportSocket{Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{TypedConfig: xdstest.Any(t, m)}}
}

func common(certificate, authorities string) *etls.CommonTlsContext {
	return &etls.CommonTlsContext{
		TlsCertificateSdsSecretConfigs: []*etls.SdsSecretConfig{{Name: certificate, SdsConfig: xdstest.ADS()}},
		ValidationContextType: &etls.CommonTlsContext_ValidationContextSdsSecretConfig{
			ValidationContextSdsSecretConfig: &etls.SdsSecretConfig{Name: authorities, SdsConfig: xdstest.ADS()}}}
}

// secured is a rig whose certificates all come by SDS: the proxy has no file of any.
type secured struct {
	*rig
	plane  *plane
	ca     *authority
	url    string
	l      *listener.Listener
	c      *cluster.Cluster
	others []types.Resource
}

func newSecured(t *testing.T) *secured {
	t.Helper()
	s := &secured{ca: newAuthority(t)}
	s.plane = newPlane(t, "unix", socketOf(t))
	s.rig = newRig(t, func(c *config) {
		c.Server, c.Identities = "unix://"+s.plane.address, filepath.Join(filepath.Dir(c.Status), "keys")
	})
	up := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "up "+r.URL.Path) }))
	up.TLS = &tls.Config{Certificates: []tls.Certificate{s.ca.issue(t, "up.test").cert}, ClientCAs: s.ca.pool, ClientAuth: tls.RequireAndVerifyClientCert}
	up.StartTLS()
	t.Cleanup(up.Close)
	port := freePort(t)
	s.url = fmt.Sprintf("https://127.0.0.1:%d/a", port)
	s.l = xdstest.Listener(t, "l", port, "r")
	s.l.FilterChains[0].TransportSocket = socketTLS(t, &etls.DownstreamTlsContext{RequireClientCertificate: wrapperspb.Bool(true), CommonTlsContext: common("web", "people")})
	s.c = xdstest.Cluster("a")
	s.c.TransportSocket = socketTLS(t, &etls.UpstreamTlsContext{Sni: "up.test", CommonTlsContext: common("own", "servers")})
	s.others = []types.Resource{xdstest.Endpoints("a", uint32(up.Listener.Addr().(*net.TCPAddr).Port)), routes("r", "1", "a")}
	s.startXDS()
	s.startProxy()
	return s
}

// set has the control plane say this of secrets.
func (s *secured) set(version string, secrets ...types.Resource) {
	s.t.Helper()
	s.plane.set(version, append(append([]types.Resource{s.l, s.c}, s.others...), secrets...)...)
}

// caller is a client with a certificate, that notes the one it is shown.
func (s *secured) caller(own issued, seen *atomic.Pointer[string]) *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: s.ca.pool, ServerName: "web.test",
		Certificates: []tls.Certificate{own.cert}, VerifyConnection: func(c tls.ConnectionState) error {
			serial := c.PeerCertificates[0].SerialNumber.String()
			seen.Store(&serial)
			return nil
		}}}}
}

// TestSecrets has every certificate and authority come by SDS from go-control-plane,
// changes them while requests are under way, and lets bad ones come: those before
// stay.
func TestSecrets(t *testing.T) {
	s := newSecured(t)
	web, own := s.ca.issue(t, "web.test"), s.ca.issue(t, "own.test")
	me := s.ca.issue(t, "me.test")
	var seen atomic.Pointer[string]
	client := s.caller(me, &seen)
	people, servers, ownSecret := authoritySecret("people", s.ca), authoritySecret("servers", s.ca), certificateSecret(t, "own", own)
	s.set("1", certificateSecret(t, "web", web), people, servers, ownSecret)
	xdstest.Until(t, "an answer over TLS", func() bool { return get(client, s.url) == "up /to-a" })

	stop := make(chan struct{})
	var asked, failed atomic.Uint64
	var working sync.WaitGroup
	for range 3 {
		working.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				asked.Add(1)
				if got := get(client, s.url); got != "up /to-a" {
					failed.Add(1)
					t.Errorf("a request failed: %s", got)
				}
			}
		})
	}
	ended := sync.OnceFunc(func() { close(stop); working.Wait() })
	defer ended()
	for i := range 10 {
		next := s.ca.issue(t, "web.test")
		serial := leafSerial(t, next)
		s.set(fmt.Sprint("r", i), certificateSecret(t, "web", next), people, servers, certificateSecret(t, "own", s.ca.issue(t, "own.test")))
		xdstest.Until(t, "the next certificate", func() bool { return *seen.Load() == serial })
		web = next
	}
	if got := s.plane.refusals(); len(got) > 0 {
		t.Errorf("refused: %q", got)
	}
	// What cannot be: the key of another, a file, no certificate, a thing not asked of
	// SDS. Each is refused by name, without its bytes; what was in force goes on.
	bad := certificateSecret(t, "web", web)
	bad.GetTlsCertificate().PrivateKey = ownSecret.GetTlsCertificate().PrivateKey
	file := certificateSecret(t, "web", web)
	file.GetTlsCertificate().PrivateKey = &core.DataSource{Specifier: &core.DataSource_Filename{Filename: "/etc/shadow"}}
	garbage := authoritySecret("people")
	garbage.GetValidationContext().TrustedCa = inline([]byte("no certificate"))
	ticket := &etls.Secret{Name: "web", Type: &etls.Secret_SessionTicketKeys{SessionTicketKeys: &etls.TlsSessionTicketKeys{Keys: []*core.DataSource{inline([]byte("ticket key"))}}}}
	for i, c := range []struct {
		secret *etls.Secret
		why    string
	}{{bad, "not that of the certificate"}, {file, "filename"}, {garbage, "PEM blocks"}, {ticket, "session_ticket_keys"}} {
		all := []types.Resource{ownSecret, servers, c.secret}
		if c.secret.Name == "web" {
			all = append(all, people)
		} else {
			all = append(all, certificateSecret(t, "web", web))
		}
		s.set(fmt.Sprint("bad", i), all...)
		xdstest.Until(t, "a NACK that says "+c.why, func() bool {
			n := s.plane.refusals()
			return len(n) > 0 && strings.Contains(n[len(n)-1], c.why) && strings.Contains(n[len(n)-1], fmt.Sprintf("secrets %q", c.secret.Name))
		})
	}
	for _, n := range s.plane.refusals() {
		if strings.Contains(n, "PRIVATE") || strings.Contains(n, "ticket key") {
			t.Errorf("a NACK tells a secret: %s", n)
		}
	}
	// An authority that goes: clients it has vouched for are refused, others come in.
	stranger := newAuthority(t)
	s.set("other", certificateSecret(t, "web", web), authoritySecret("people", s.ca, stranger), servers, ownSecret)
	other := s.caller(stranger.issue(t, "me.test"), &seen)
	xdstest.Until(t, "a client of the new authority", func() bool { return get(other, s.url) == "up /to-a" })
	ended()
	if asked.Load() < 30 || failed.Load() > 0 {
		t.Errorf("%d requests, %d failed", asked.Load(), failed.Load())
	}
	t.Logf("%d requests", asked.Load())
	s.set("gone", certificateSecret(t, "web", web), authoritySecret("people", stranger), servers, ownSecret)
	xdstest.Until(t, "the old authority refused", func() bool { return get(client, s.url) != "up /to-a" })
	if got := get(other, s.url); got != "up /to-a" {
		t.Errorf("a client of the authority that stays: %s", got)
	}
	// No key is in what was kept.
	kept, err := os.ReadFile(s.config.Proxy.File)
	if err != nil || !strings.Contains(string(kept), `"identity":"web"`) || strings.Contains(string(kept), "PRIVATE") {
		t.Errorf("%v: %s", err, kept)
	}
}

// TestSecretOfAnother names a secret by a SPIFFE id that its certificate does not
// have, which the proxy would refuse with all others: it is refused alone, and what
// comes after it is in force.
func TestSecretOfAnother(t *testing.T) {
	s := newSecured(t)
	var seen atomic.Pointer[string]
	me := s.ca.issue(t, "me.test")
	client := s.caller(me, &seen)
	const name = "spiffe://a.test/x"
	l := xdstest.Listener(t, "m", freePort(t), "r")
	l.FilterChains[0].TransportSocket = socketTLS(t, &etls.DownstreamTlsContext{RequireClientCertificate: wrapperspb.Bool(true), CommonTlsContext: common(name, "people")})
	s.others = append(s.others, l)
	people, servers, own := authoritySecret("people", s.ca), authoritySecret("servers", s.ca), certificateSecret(t, "own", s.ca.issue(t, "own.test"))
	s.set("1", certificateSecret(t, "web", s.ca.issue(t, "web.test")), people, servers, own, certificateSecret(t, name, s.ca.issue(t, "x.test")))
	xdstest.Until(t, "a NACK of the one secret", func() bool {
		return slices.ContainsFunc(s.plane.refusals(), func(n string) bool { return strings.Contains(n, `secrets "`+name+`": name: `) })
	})
	xdstest.Until(t, "an answer over TLS", func() bool { return get(client, s.url) == "up /to-a" })
	next := s.ca.issue(t, "web.test")
	s.set("2", certificateSecret(t, "web", next), people, servers, own, certificateSecret(t, name, s.ca.issue(t, "x.test")))
	xdstest.Until(t, "the next certificate", func() bool { return get(client, s.url) == "up /to-a" && *seen.Load() == leafSerial(t, next) })
}

// TestSecretLate lets a listener wait for its certificate, and come into force with
// it.
func TestSecretLate(t *testing.T) {
	s := newSecured(t)
	var seen atomic.Pointer[string]
	client := s.caller(s.ca.issue(t, "me.test"), &seen)
	own := certificateSecret(t, "own", s.ca.issue(t, "own.test"))
	s.set("1", authoritySecret("people", s.ca), authoritySecret("servers", s.ca), own)
	xdstest.Until(t, "a listener that waits", func() bool { return strings.Contains(status(s.rig), `waits for secrets \"web\"`) })
	if got := get(client, s.url); got == "up /to-a" {
		t.Errorf("before: %s", got)
	}
	s.set("2", certificateSecret(t, "web", s.ca.issue(t, "web.test")), authoritySecret("people", s.ca), authoritySecret("servers", s.ca), own)
	xdstest.Until(t, "an answer over TLS", func() bool { return get(client, s.url) == "up /to-a" })
}

func leafSerial(t *testing.T, i issued) string {
	t.Helper()
	c, err := tls.LoadX509KeyPair(i.Secret.Chain, i.Secret.Key)
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf.SerialNumber.String()
}
