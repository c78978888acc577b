package workload

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	api "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"hauberk.dev/internal/svidlink"
)

// response is one SVID of a trust domain of its own.
func response(t testing.TB, name string) *api.X509SVIDResponse {
	return lasting(t, name, time.Hour)
}

// lasting is a response that holds for so long.
func lasting(t testing.TB, name string, life time.Duration) *api.X509SVIDResponse {
	t.Helper()
	sign := func(x, by *x509.Certificate, key, with *ecdsa.PrivateKey) []byte {
		x.SerialNumber, x.NotBefore, x.NotAfter = big.NewInt(5), time.Now().Add(-time.Hour), time.Now().Add(life)
		der, err := x509.CreateCertificate(rand.Reader, x, by, &key.PublicKey, with)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	root, err1 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	key, err2 := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	raw, err3 := x509.MarshalPKCS8PrivateKey(key)
	u, err4 := url.Parse(name)
	for _, err := range []error{err1, err2, err3, err4} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ca := &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	bundle := sign(ca, ca, root, root)
	leaf := sign(&x509.Certificate{URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature}, ca, key, root)
	return &api.X509SVIDResponse{Svids: []*api.X509SVID{{SpiffeId: name, X509Svid: leaf, X509SvidKey: raw, Bundle: bundle}}}
}

func TestRead(t *testing.T) {
	r := response(t, "spiffe://example.org/web")
	set, until, err := Read(r, time.Now())
	if err != nil || len(set.Identities) != 1 || len(set.Bundles) != 1 || set.Bundles[0].Name != "spiffe://example.org" || time.Until(until) > time.Hour {
		t.Fatalf("%+v, %v, %v", set, until, err)
	}
	set.Clear()
	if _, _, err := Read(r, time.Now()); err != nil {
		t.Errorf("the key of the response was cleared with that of the set: %v", err)
	}
	other := response(t, "spiffe://other.example/x")
	for why, edit := range map[string]func(*api.X509SVIDResponse){
		"without a path": func(r *api.X509SVIDResponse) {
			r.FederatedBundles = map[string][]byte{"spiffe://a/b": other.Svids[0].Bundle}
		},
		"does not begin": func(r *api.X509SVIDResponse) {
			r.FederatedBundles = map[string][]byte{"https://a": other.Svids[0].Bundle}
		},
		"parse certificates: none": func(r *api.X509SVIDResponse) { r.FederatedBundles = map[string][]byte{"spiffe://a": nil} },
		"has two bundles": func(r *api.X509SVIDResponse) {
			r.FederatedBundles = map[string][]byte{"spiffe://example.org": other.Svids[0].Bundle}
		},
		"bundle: parse certificate": func(r *api.X509SVIDResponse) { r.Svids[0].Bundle = nil },
		"svids: none":               func(r *api.X509SVIDResponse) { r.Svids = nil },
		"at most 32":                func(r *api.X509SVIDResponse) { r.Svids = make([]*api.X509SVID, 33) },
		"hint":                      func(r *api.X509SVIDResponse) { r.Svids[0].Hint = strings.Repeat("x", maxWhy+1) },
		"expired":                   func(*api.X509SVIDResponse) {},
	} {
		bad := proto.Clone(r).(*api.X509SVIDResponse)
		edit(bad)
		now := time.Now()
		if why == "expired" {
			now = now.Add(24 * time.Hour)
		}
		if set, _, err := Read(bad, now); err == nil || !strings.Contains(err.Error(), why) || set != nil {
			t.Errorf("%s: %v, %v", why, set, err)
		}
	}
}

func FuzzRead(f *testing.F) {
	r := response(f, "spiffe://example.org/web")
	for _, r := range []*api.X509SVIDResponse{r, {}, {Svids: []*api.X509SVID{{SpiffeId: "spiffe://a/b", X509Svid: []byte{0x30}}}, FederatedBundles: map[string][]byte{"spiffe://b": {0x30, 0}}}} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r := &api.X509SVIDResponse{}
		if len(b) > 1<<16 || proto.Unmarshal(b, r) != nil {
			return
		}
		set, until, err := Read(r, time.Now())
		if err != nil {
			if set != nil || len(err.Error()) > 1<<14 {
				t.Errorf("refused with a set, or with %d bytes", len(err.Error()))
			}
			return
		}
		if _, err := set.Marshal(); err != nil || len(set.Identities) == 0 || until.IsZero() {
			t.Errorf("%v: %+v", err, set)
		}
	})
}

func TestTarget(t *testing.T) {
	for endpoint, want := range map[string]string{
		"unix:///run/a.sock": "unix:///run/a.sock", "tcp://127.0.0.1:80": "passthrough:///127.0.0.1:80", "tcp://[::1]:80": "passthrough:///[::1]:80",
		"unix://run/a": "", "unix:/run/a": "", "tcp://host:80": "", "dns:///x": "", "": "", "/run/a": "", "tcp://127.0.0.1": "",
	} {
		got, err := Target(endpoint)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", endpoint, got, err)
		}
	}
}

// server is a server that says what it is told to.
type server struct {
	api.UnimplementedSpiffeWorkloadAPIServer
	mu    sync.Mutex
	says  *api.X509SVIDResponse
	err   error
	asked int
	holds bool // the stream, after it has said it
}

func (s *server) FetchX509SVID(_ *api.X509SVIDRequest, to grpc.ServerStreamingServer[api.X509SVIDResponse]) error {
	s.mu.Lock()
	s.asked++
	says, err, holds := s.says, s.err, s.holds
	s.mu.Unlock()
	if m, _ := metadata.FromIncomingContext(to.Context()); len(m["workload.spiffe.io"]) != 1 {
		return status.Error(codes.InvalidArgument, "no header")
	}
	if err != nil {
		return err
	}
	if err := to.Send(says); err != nil || !holds {
		return err // and ends the stream
	}
	<-to.Context().Done()
	return nil
}

func (s *server) say(r *api.X509SVIDResponse, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.says, s.err = r, err
}

// TestSilent has an API that goes on holding its stream and says nothing newer: it is
// asked anew before what it has said runs out.
func TestSilent(t *testing.T) {
	s := &server{says: lasting(t, "spiffe://example.org/web", 4*time.Second), holds: true}
	c := run(t, Options{Endpoint: "unix://" + serve(t, s), First: 10 * time.Millisecond, RetryMin: time.Millisecond, RetryMax: time.Millisecond, Take: func(*svidlink.Set) {}})
	until(t, "the second question", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.asked > 1 && c.Status().Connected
	})
}

// TestDenied lets an API say that there is nothing for this process: it is believed
// when it goes on saying so, and not at once.
func TestDenied(t *testing.T) {
	s := &server{says: response(t, "spiffe://example.org/web")}
	path := serve(t, s)
	var mu sync.Mutex
	var last *svidlink.Set
	kept := 0 // sets with the identity that came while the API denied it
	c := run(t, Options{Endpoint: "unix://" + path, RetryMin: time.Millisecond, RetryMax: 20 * time.Millisecond, Denied: 100 * time.Millisecond, Take: func(n *svidlink.Set) {
		mu.Lock()
		defer mu.Unlock()
		last = n
		if len(n.Identities) > 0 && strings.Contains(n.Why, "not for you") {
			kept++
		}
	}})
	has := func(n int) func() bool {
		return func() bool { mu.Lock(); defer mu.Unlock(); return last != nil && len(last.Identities) == n }
	}
	until(t, "an identity", has(1))
	s.say(nil, status.Error(codes.PermissionDenied, "not for you"))
	until(t, "none", has(0))
	mu.Lock()
	if kept == 0 {
		t.Error("the identity was let go of at the first word")
	}
	if !strings.Contains(last.Why, "not for you") || !bytes.Contains([]byte(last.Why), []byte(path)) {
		t.Errorf("why: %q", last.Why)
	}
	mu.Unlock()
	s.say(response(t, "spiffe://example.org/web"), nil)
	until(t, "an identity again", has(1))
	s.say(nil, status.Error(codes.InvalidArgument, "never"))
	until(t, "the reason", func() bool { return strings.Contains(c.Status().Error, "never") })
	if !has(1)() {
		t.Error("an API that does not understand has taken the identity away")
	}
}

func until(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(time.Minute); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// serve serves a Workload API at a path.
func serve(t *testing.T, s *server) (path string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "wa")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path = filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	api.RegisterSpiffeWorkloadAPIServer(srv, s)
	served := make(chan struct{})
	go func() { defer close(served); srv.Serve(ln) }()
	t.Cleanup(func() { srv.Stop(); <-served })
	return path
}

// run runs a client until the test ends.
func run(t *testing.T, o Options) *Client {
	t.Helper()
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- c.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	return c
}
