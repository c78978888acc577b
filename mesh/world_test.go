package mesh

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
	"hauberk.dev/test/succession"
)

const domain = "test.local"

// authority is a CA for tests.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	mu   sync.Mutex
	life time.Duration
	next int64
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{key: key, cert: cert, life: time.Hour, next: 1000}
}

func (a *authority) roots() []byte { return id.MarshalCertificates(a.cert.Raw) }

// issue certifies a key for a name.
func (a *authority) issue(pub any, name string, life time.Duration) ([]byte, error) {
	u, err := url.Parse(name)
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.next++
	serial := a.next
	a.mu.Unlock()
	return x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(life),
		URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, a.cert, pub, a.key)
}

// credential is an identity for a client that is not the mesh.
func (a *authority) credential(t testing.TB, name string, life time.Duration) id.Credential {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := a.issue(&key.PublicKey, name, life)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := id.ParsePool(a.roots())
	if err != nil {
		t.Fatal(err)
	}
	return id.Credential{Certificate: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, Roots: pool}
}

// box is a sandbox whose guest is a namespace.
type box struct {
	plan.Sandbox
	ns, guest *netns.Namespace
	files     []*os.File
}

// world is a node: namespaces, CA, a proxy and the link to it.
type world struct {
	t       testing.TB
	dir     string
	ca      *authority
	path    string
	options Options
	proxy   *Proxy
	line    *succession.Line // if the proxy is another process
	link    *link.Link
	gateway netip.AddrPort
	door    *os.File
	boxes   map[string]*box
	plan    plan.Mesh
	stop    context.CancelFunc
	done    chan error
	learnt  map[string][]byte // given to a new proxy

	mu     sync.Mutex
	events []api.Event
	sign   func(instance string) error // refuses, if set
}

func spiffe(workload string) string { return "spiffe://" + domain + "/ns/bank/sa/" + workload }

func newWorld(t testing.TB) *world { return newWorldOf(t, Options{}) }

func newWorldOf(t testing.TB, o Options) *world { return newWorldWith(t, o, false) }

// newWorldWith has the proxy be a process of its own, if so wanted.
func newWorldWith(t testing.TB, o Options, process bool) *world {
	t.Helper()
	return newWorldAt(t, o, process, "127.0.0.1:0")
}

// everywhere is where a gateway listens that does not know its own address, and so
// is called by TCP by its own proxy too.
const everywhere = "0.0.0.0:0"

// newWorldAt has the gateway listen there.
func newWorldAt(t testing.TB, o Options, process bool, listen string) *world {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("making network namespaces for guests needs root")
	}
	w := &world{t: t, dir: t.TempDir(), ca: newAuthority(t), options: o, boxes: map[string]*box{}, plan: plan.Mesh{Generation: 1, TrustDomain: domain}}
	w.path = filepath.Join(w.dir, "mesh.sock")
	ln, err := net.Listen("tcp4", listen)
	if err != nil {
		t.Fatal(err)
	}
	w.gateway = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), addrPort(ln.Addr()).Port())
	if w.door, err = ln.(*net.TCPListener).File(); err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if process {
		w.line = succession.Start(t, w.dir)
	} else {
		w.startProxy()
	}
	t.Cleanup(w.close)
	w.connect()
	return w
}

func (w *world) startProxy() {
	w.t.Helper()
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: w.path, Net: "unixpacket"})
	if err != nil {
		w.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	w.proxy, w.stop, w.done = New(w.options), stop, make(chan error, 1)
	go func() { w.done <- w.proxy.Run(ctx, ln) }()
}

func (w *world) stopProxy() {
	if w.line != nil {
		w.line.End()
		return
	}
	w.stop()
	select {
	case err := <-w.done:
		if err != nil {
			w.t.Errorf("proxy ended: %v", err)
		}
	case <-time.After(time.Minute):
		w.t.Error("the proxy does not end")
	}
}

func (w *world) close() {
	w.link.Close()
	w.stopProxy()
	w.door.Close()
	for _, b := range w.boxes {
		for _, f := range b.files {
			f.Close()
		}
		if err := errors.Join(b.ns.Delete(), b.guest.Delete()); err != nil {
			w.t.Error(err)
		}
	}
}

// connect is what a node does when it starts or its proxy has restarted: dial,
// and say all again.
func (w *world) connect() {
	w.t.Helper()
	var err error
	if w.link, err = link.Dial(context.Background(), w.path, link.Handlers{Sign: w.signCSR, Sockets: w.sockets, Event: w.event}); err != nil {
		w.t.Fatal(err)
	}
	ctx := context.Background()
	if err := w.link.SetGateway(ctx, w.door); err != nil {
		w.t.Fatal(err)
	}
	for _, b := range w.boxes {
		if err := w.link.AddSandbox(ctx, b.Sandbox, b.files[0], b.files[1], b.files[2]); err != nil {
			w.t.Fatal(err)
		}
	}
	for service, schema := range w.learnt {
		if err := w.link.Relearn(ctx, service, schema); err != nil {
			w.t.Fatal(err)
		}
	}
	w.apply()
}

// reconnect connects to the proxy that has taken the place of another.
func (w *world) reconnect() {
	w.t.Helper()
	w.link.Close()
	w.connect()
}

func (w *world) apply() {
	w.t.Helper()
	if err := w.link.SetPlan(context.Background(), w.plan); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) signCSR(_ context.Context, instance string, csr []byte) ([][]byte, []byte, error) {
	w.mu.Lock()
	refuse := w.sign
	w.mu.Unlock()
	if refuse != nil {
		if err := refuse(instance); err != nil {
			return nil, nil, err
		}
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, err
	}
	w.ca.mu.Lock()
	life := w.ca.life
	w.ca.mu.Unlock()
	der, err := w.ca.issue(req.PublicKey, req.URIs[0].String(), life)
	return [][]byte{der}, w.ca.roots(), err
}

func (w *world) sockets(instance string, n int) ([]*os.File, error) {
	return w.boxes[instance].ns.Dialers(n)
}

func (w *world) event(e api.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.events = append(w.events, e)
}

// awaitEvent waits for an event of a kind and returns it.
func (w *world) awaitEvent(kind api.EventKind, reason string) api.Event {
	w.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		w.mu.Lock()
		for _, e := range w.events {
			if e.Kind == kind && bytes.Contains([]byte(e.Rule+" "+e.Reason), []byte(reason)) {
				w.mu.Unlock()
				return e
			}
		}
		all := fmt.Sprintf("%+v", w.events)
		w.mu.Unlock()
		if time.Now().After(deadline) {
			w.t.Fatalf("no event %s with %q; seen: %s", kind, reason, all)
		}
		time.Sleep(time.Millisecond)
	}
}

// add makes a workload with one instance and tells the proxy. The plan is
// applied by the caller.
func (w *world) add(workload string, ports []plan.Port, allow, deny []plan.Rule) *box {
	w.t.Helper()
	n := byte(len(w.boxes) + 1)
	b := w.instance(workload, workload+"-1")
	w.plan.Services = append(w.plan.Services, plan.Service{Name: workload, Namespace: "bank", Address: netip.AddrFrom4([4]byte{10, 99, 0, n}),
		Identity: spiffe(workload), Ports: ports, Allow: allow, Deny: deny,
		Endpoints: []plan.Endpoint{w.endpoint(b)}})
	return b
}

func (w *world) endpoint(b *box) plan.Endpoint {
	return plan.Endpoint{Instance: b.Instance, Address: b.Address, Gateway: w.gateway}
}

// instance makes one more instance of a workload, without an endpoint in its
// service.
func (w *world) instance(workload, name string) *box {
	w.t.Helper()
	n := byte(len(w.boxes) + 1)
	address := netip.AddrFrom4([4]byte{10, 88, 0, n})
	b := &box{Sandbox: plan.Sandbox{Instance: name, Address: address, Identity: spiffe(workload), Service: workload, Namespace: "bank"}}
	var err error
	if b.ns, err = netns.Create(w.dir+"/ns", b.Instance); err != nil {
		w.t.Fatal(err)
	}
	if b.guest, err = netns.Create(w.dir+"/ns", "guest-"+b.Instance); err != nil {
		w.t.Fatal(err)
	}
	if err := b.ns.Veth(netns.Guest{Address: address, MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}}, b.guest); err != nil {
		w.t.Fatal(err)
	}
	l, err := b.ns.ListenTransparent()
	if err != nil {
		w.t.Fatal(err)
	}
	u, d, err := b.ns.ListenDNS()
	if err != nil {
		w.t.Fatal(err)
	}
	b.files = []*os.File{l, u, d}
	w.boxes[b.Instance] = b
	if err := w.link.AddSandbox(context.Background(), b.Sandbox, l, u, d); err != nil {
		w.t.Fatal(err)
	}
	w.plan.Sandboxes = append(w.plan.Sandboxes, b.Sandbox)
	return b
}

// service is the plan's entry of a workload, to be changed.
func (w *world) service(workload string) *plan.Service {
	for i := range w.plan.Services {
		if w.plan.Services[i].Name == workload {
			return &w.plan.Services[i]
		}
	}
	w.t.Fatalf("no service %q", workload)
	return nil
}

// listen opens a port in the guest.
func (b *box) listen(t testing.TB, port int) net.Listener {
	t.Helper()
	var ln net.Listener
	err := b.guest.Do(func() (err error) { ln, err = net.Listen("tcp4", fmt.Sprintf("%s:%d", b.Address, port)); return err })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// dial dials from the guest.
func (b *box) dial(network, address string) (c net.Conn, err error) {
	err = b.guest.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: 5 * time.Second, FallbackDelay: -1}).Dial(network, address)
		return err
	})
	return c, err
}

// call dials from the guest and tells whether bytes go both ways.
func (b *box) call(address, text string) error {
	c, err := b.dial("tcp4", address)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return roundTrip(c, text)
}

func (b *box) mustDial(t testing.TB, address string) *net.TCPConn {
	t.Helper()
	c, err := b.dial("tcp4", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

func anyone() []plan.Rule { return []plan.Rule{{Name: "open/all", From: []string{"*"}}} }
