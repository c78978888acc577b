package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	etls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/protobuf/types/known/wrapperspb"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"hauberk.dev/internal/atomicfile"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/proxyfile"
	"hauberk.dev/xds/xdstest"
)

// TestMain lets the test binary be the program.
func TestMain(m *testing.M) {
	if os.Getenv("HAUBERK_XDS_MAIN") != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestGoControlPlane has go-control-plane tell a real proxy, through the program,
// and sends real requests: from the start to the end of all three.
func TestGoControlPlane(t *testing.T) {
	p := newPlane(t, "unix", socketOf(t))
	r := newRig(t, func(c *config) { c.Server = "unix://" + p.address })
	a, b, port := backend(t, "a"), backend(t, "b"), freePort(t)
	url := fmt.Sprintf("http://127.0.0.1:%d", port)
	base := func() []types.Resource {
		return []types.Resource{xdstest.Cluster("a"), xdstest.Cluster("b"), xdstest.Endpoints("b", b), xdstest.Listener(t, "l", port, "r")}
	}
	served := func(path, want string) {
		t.Helper()
		xdstest.Until(t, path+" to be answered "+want, func() bool { return get(fresh, url+path) == want })
	}
	passed, parts := 0, 0
	part := func(name string, f func(t *testing.T)) {
		parts++
		if t.Run(name, f) {
			passed++
		}
	}

	r.startXDS()
	r.startProxy()
	part("listener, route, cluster and endpoints", func(t *testing.T) {
		p.set("1", append(base(), xdstest.Endpoints("a", a), routes("r", "1", "a"))...)
		served("/a/x", "a /to-a/x 1")
		served("/other", "404")
	})
	part("an ACK means that it is in force", func(t *testing.T) {
		xdstest.Until(t, "the ACK of the routes before", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return slices.Contains(p.acks, envoy.Routes) })
		// What an ACK of routes promises is asked for before the server hears it.
		var early []string
		p.mu.Lock()
		p.onAck = func(k envoy.Kind) {
			if k == envoy.Routes {
				early = append(early, get(fresh, url+"/a"))
			}
		}
		p.mu.Unlock()
		p.set("1b", append(base(), xdstest.Endpoints("a", a), routes("r", "1b", "a"))...)
		xdstest.Until(t, "the ACK of routes", func() bool { p.mu.Lock(); defer p.mu.Unlock(); return len(early) > 0 })
		p.mu.Lock()
		defer p.mu.Unlock()
		p.onAck = nil
		if !slices.Equal(early, []string{"a /to-a 1b"}) {
			t.Errorf("at the ACK the proxy answered %q", early)
		}
	})
	part("update of endpoints and routes", func(t *testing.T) {
		p.set("2", append(base(), xdstest.Endpoints("a", b), routes("r", "2", "a", "b"))...)
		served("/a", "b /to-a 2")
		served("/b", "b /to-b 2")
		if got := p.refusals(); len(got) > 0 {
			t.Errorf("refused: %q", got)
		}
	})
	part("NACK of what the proxy has not", func(t *testing.T) {
		bad := xdstest.Cluster("b")
		bad.LbPolicy = cluster.Cluster_MAGLEV
		two := xdstest.Cluster("a")
		two.TransportSocket = &core.TransportSocket{Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{
			TypedConfig: xdstest.Any(t, &etls.UpstreamTlsContext{Sni: "a.test", CommonTlsContext: &etls.CommonTlsContext{
				ValidationContextType: &etls.CommonTlsContext_ValidationContextSdsSecretConfig{
					ValidationContextSdsSecretConfig: &etls.SdsSecretConfig{Name: "nobody", SdsConfig: xdstest.ADS()}}}})}}
		bad.Name = "c"
		p.set("3", append(base()[1:], two, bad, xdstest.Endpoints("a", b), routes("r", "3", "a"))...)
		served("/a", "b /to-a 3")
		xdstest.Until(t, "the NACK", func() bool { return len(p.refusals()) > 0 })
		if got := p.refusals()[0]; !strings.Contains(got, `clusters "a": validation_context_sds_secret_config: "nobody": no authorities of this name were given to the proxy`) ||
			!strings.Contains(got, `clusters "c": lb_policy: "MAGLEV"`) {
			t.Errorf("NACK says %q", got)
		}
	})
	part("NACK in the proxy's own words", func(t *testing.T) {
		taken, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer taken.Close()
		n := len(p.refusals())
		p.set("4", append(base(), xdstest.Listener(t, "m", uint32(taken.Addr().(*net.TCPAddr).Port), "r"), xdstest.Endpoints("a", a), routes("r", "4", "a"))...)
		xdstest.Until(t, "the NACK", func() bool { return len(p.refusals()) > n })
		if got := p.refusals()[n]; !strings.Contains(got, "the proxy: reload: listen on "+taken.Addr().String()+": ") ||
			!strings.Contains(got, "address already in use") {
			t.Errorf("NACK says %q", got)
		}
		served("/a", "a /to-a 4")
	})
	part("the server is away, and comes back", func(t *testing.T) {
		p.stop()
		served("/a", "a /to-a 4")
		p.mu.Lock()
		p.sent = nil
		p.mu.Unlock()
		p.set("5", append(base(), xdstest.Endpoints("a", a), routes("r", "5", "a"))...)
		p.start()
		served("/a", "a /to-a 5")
		p.mu.Lock()
		defer p.mu.Unlock()
		if slices.Contains(p.sent, "clusters b") || !slices.Contains(p.sent, "routes r") {
			t.Errorf("after a reconnect it sent %q", p.sent)
		}
	})
	part("the proxy begins anew without the others", func(t *testing.T) {
		p.stop()
		r.stopXDS()
		r.stopProxy()
		r.startProxy()
		served("/a", "a /to-a 5")
	})
	part("the program begins anew and changes nothing before it knows", func(t *testing.T) {
		r.startXDS()
		xdstest.Until(t, "its status", func() bool {
			return strings.Contains(status(r), `"connected":false`) && strings.Contains(status(r), `"error":"`)
		})
		served("/a", "a /to-a 5")
		p.start()
		p.set("6", append(base(), xdstest.Endpoints("a", a), routes("r", "6", "a"))...)
		served("/a", "a /to-a 6")
	})
	part("a proxy that begins with an older file is told again", func(t *testing.T) {
		old, err := os.ReadFile(r.config.Proxy.File)
		if err != nil {
			t.Fatal(err)
		}
		p.set("7", append(base(), xdstest.Endpoints("a", b), routes("r", "7", "a"))...)
		served("/a", "b /to-a 7")
		r.stopProxy()
		if err := atomicfile.Write(r.config.Proxy.File, old, 0o600); err != nil {
			t.Fatal(err)
		}
		r.startProxy()
		served("/a", "b /to-a 7")
	})
	part("what the server removes is not served", func(t *testing.T) {
		p.set("8", xdstest.Cluster("a"), xdstest.Endpoints("a", a))
		xdstest.Until(t, "the port to be closed", func() bool { return strings.Contains(get(fresh, url+"/a"), "connection refused") })
	})
	t.Logf("xDS by go-control-plane: %d of %d", passed, parts)
}

func status(r *rig) string {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", r.config.Status)
	}}}
	return get(client, "http://x/status")
}

// TestTLSAndOnDemand asks for the clusters that routes name, over TLS with both
// sides proved, and has the proxy end TLS with a secret that the plan names.
func TestTLSAndOnDemand(t *testing.T) {
	ca := newAuthority(t)
	server, client := ca.issue(t, "control.test"), ca.issue(t, "proxy.test")
	p := newPlane(t, "tcp", "127.0.0.1:0", grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{server.cert}, ClientCAs: ca.pool, ClientAuth: tls.RequireAndVerifyClientCert})))
	web := ca.issue(t, "web.test")
	r := newRig(t, func(c *config) {
		c.Server, c.OnDemand = p.address, true
		c.TLS = &serverTLS{CA: ca.file, Name: "control.test", Certificate: &client.Secret}
		c.Secrets = map[string]proxyfile.Secret{"web": web.Secret}
		c.Authorities = map[string]string{"people": ca.file}
	})
	r.startXDS()
	r.startProxy()
	port := freePort(t)
	l := xdstest.Listener(t, "l", port, "r")
	l.FilterChains[0].TransportSocket = &core.TransportSocket{Name: "tls", ConfigType: &core.TransportSocket_TypedConfig{
		TypedConfig: xdstest.Any(t, &etls.DownstreamTlsContext{RequireClientCertificate: wrapperspb.Bool(true), CommonTlsContext: &etls.CommonTlsContext{
			TlsCertificateSdsSecretConfigs: []*etls.SdsSecretConfig{{Name: "web", SdsConfig: xdstest.ADS()}},
			ValidationContextType: &etls.CommonTlsContext_ValidationContextSdsSecretConfig{
				ValidationContextSdsSecretConfig: &etls.SdsSecretConfig{Name: "people", SdsConfig: xdstest.ADS()}}}})}}
	p.set("1", xdstest.Cluster("a"), xdstest.Cluster("unused"), xdstest.Endpoints("a", backend(t, "a")), xdstest.Endpoints("unused", 1), l, routes("r", "1", "a"))
	browser := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: ca.pool, ServerName: "web.test",
		Certificates: []tls.Certificate{client.cert}}}}
	url := fmt.Sprintf("https://127.0.0.1:%d/a", port)
	xdstest.Until(t, "an answer over TLS", func() bool { return get(browser, url) == "a /to-a 1" })
	stranger := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: ca.pool, ServerName: "web.test"}}}
	if got := get(stranger, url); !strings.Contains(got, "certificate") {
		t.Errorf("a client without a certificate is told %q", got)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.sent, "clusters unused") || !slices.Contains(p.asked, "clusters a") {
		t.Errorf("asked for %q, got %q", p.asked, p.sent)
	}
}

// authority issues certificates into files.
type authority struct {
	dir, file string
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
	pool      *x509.CertPool
}

type issued struct {
	Secret proxyfile.Secret
	cert   tls.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir(), pool: x509.NewCertPool()}
	a.file = filepath.Join(a.dir, "ca.pem")
	der, key := a.sign(t, &x509.Certificate{Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	var err error
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.key = key
	a.pool.AddCert(a.cert)
	writePEM(t, a.file, "CERTIFICATE", der)
	return a
}

func (a *authority) sign(t *testing.T, c *x509.Certificate) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber = big.NewInt(time.Now().UnixNano())
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := c, key
	if a.cert != nil {
		parent, signer = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return der, key
}

func (a *authority) issue(t *testing.T, name string) issued {
	t.Helper()
	der, key := a.sign(t, &x509.Certificate{DNSNames: []string{name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	out := issued{Secret: proxyfile.Secret{Chain: filepath.Join(a.dir, name+".pem"), Key: filepath.Join(a.dir, name+".key")}}
	writePEM(t, out.Secret.Chain, "CERTIFICATE", der)
	writePEM(t, out.Secret.Key, "PRIVATE KEY", raw)
	out.cert = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	return out
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestProgram runs the program: it says what is wrong with its file, refuses to
// be root, and ends on SIGTERM.
func TestProgram(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	run := func(args ...string) *exec.Cmd {
		c := exec.Command(os.Args[0], args...)
		c.Env = append(os.Environ(), "HAUBERK_XDS_MAIN=1")
		return c
	}
	bad := write("bad.yaml", "version: 2\nserver: x:1\nbase: base.yaml\nsecrets: {s: {chain: c}}\n")
	write("base.yaml", "version: 1\nlisteners: []\n")
	out, err := run("check", bad).CombinedOutput()
	for _, want := range []string{"version: 2 is not known", "tls: is missing", "node.id: is missing", "proxy.admin: is missing", "proxy.file: is missing",
		"secrets.s: want chain and key", "base: listeners: is not of this file"} {
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("no %q in %v\n%s", want, err, out)
		}
	}
	if out, err := run("check", write("odd.yaml", "nonsense: 1\n")).CombinedOutput(); err == nil || !strings.Contains(string(out), "nonsense") {
		t.Errorf("%v\n%s", err, out)
	}
	good := write("good.yaml", "version: 1\nserver: unix:///nowhere/s\nnode: {id: n}\nproxy: {admin: a, file: p.yaml}\nstatus: st\n")
	if out, err := run("check", good).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := run("-c", good).CombinedOutput(); os.Geteuid() == 0 && (err == nil || !strings.Contains(string(out), "refuse to run as root")) {
		t.Errorf("%v\n%s", err, out)
	}
	c := run("--allow-root", "-c", good)
	pipe, err := c.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	xdstest.Until(t, "the file that the proxy begins with", func() bool { _, err := os.Stat(filepath.Join(dir, "p.yaml")); return err == nil })
	xdstest.Until(t, "the status socket", func() bool { _, err := os.Stat(filepath.Join(dir, "st")); return err == nil })
	c.Process.Signal(syscall.SIGTERM)
	log, err := io.ReadAll(pipe)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Errorf("%v\n%s", err, log)
	}
}
