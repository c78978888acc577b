package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
	"hauberk.dev/test/meshload"
)

const (
	domain          = "soak.local"
	certificateLife = 90 * time.Second // so that each rotates many times
	bootTime        = time.Minute
)

// ports of every service, by protocol of the load.
var ports = map[string]plan.Port{
	"http1": {Port: 8080, Protocol: "http"}, "http2": {Port: 8080, Protocol: "http"}, "grpc": {Port: 9090, Protocol: "grpc"},
	"bolt": {Port: 12200, Protocol: "bolt"}, "dubbo": {Port: 20880, Protocol: "dubbo"}, "tcp": {Port: 7000, Protocol: "tcp"},
}

// served are the protocols of the load whose servers have a port each: one speaks
// both versions of HTTP.
var served = []string{"http1", "grpc", "bolt", "dubbo", "tcp"}

// process is a proxy that runs.
type process struct {
	name string
	cmd  *exec.Cmd
	log  bytes.Buffer
	done chan struct{}
}

func start(name, program string, args ...string) (*process, error) {
	p := &process{name: name, cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Stderr = &p.log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	return p, nil
}

// stop ends it and says how that went.
func (p *process) stop() error {
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(bootTime):
		p.cmd.Process.Kill()
		<-p.done
	}
	if !p.cmd.ProcessState.Success() {
		return fmt.Errorf("%s ended with %s:\n%s", p.name, p.cmd.ProcessState, p.log.Bytes())
	}
	return nil
}

// node is a proxy of the mesh with the link to it.
type node struct {
	*process
	link    *link.Link
	gateway netip.AddrPort
	door    *os.File
	boxes   []*box
}

// box is a sandbox whose guest is a namespace.
type box struct {
	plan.Sandbox
	node      *node
	ns, guest *netns.Namespace
	files     []*os.File
	servers   map[string]*server
}

// server is one port of a box.
type server struct {
	box      *box
	protocol string
	ledger   *meshload.Ledger
	stop     func()
}

type world struct {
	dir    string
	nodes  []*node
	boxes  map[string]*box
	ledger *meshload.Ledger
	alone  *alone
	key    *ecdsa.PrivateKey
	root   *x509.Certificate
	serial atomic.Int64
	events sync.Map // api.EventKind: *atomic.Int64

	mu   sync.Mutex
	plan plan.Mesh // without sandboxes: those are each node's own
}

func newWorld(program string) (_ *world, err error) {
	dir, err := os.MkdirTemp("", "xsoak")
	if err != nil {
		return nil, err
	}
	w := &world{dir: dir, boxes: map[string]*box{}, ledger: &meshload.Ledger{}, plan: plan.Mesh{TrustDomain: domain}}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	if err := w.authority(); err != nil {
		return nil, err
	}
	for i := range 2 {
		if err := w.node(fmt.Sprintf("node-%d", i+1), program); err != nil {
			return nil, err
		}
	}
	everyone := []plan.Rule{{Name: "soak/all", From: []string{"*"}}}
	for _, b := range []struct {
		node     int
		workload string
		instance string
	}{{0, "web", "web-1"}, {0, "guest", "guest-1"}, {1, "shop", "shop-1"}, {1, "shop", "shop-2"}, {1, "still", "still-1"}} {
		made, err := w.box(w.nodes[b.node], b.workload, b.instance)
		if err != nil {
			return nil, err
		}
		s := w.service(b.workload)
		if s == nil {
			w.plan.Services = append(w.plan.Services, plan.Service{Name: b.workload, Namespace: "soak", Identity: spiffe(b.workload),
				Address: netip.AddrFrom4([4]byte{10, 99, 0, byte(len(w.plan.Services) + 1)}), Allow: everyone})
			s = &w.plan.Services[len(w.plan.Services)-1]
			for _, protocol := range served {
				s.Ports = append(s.Ports, ports[protocol])
			}
		}
		s.Endpoints = append(s.Endpoints, made.endpoint())
		if b.node == 1 {
			for _, protocol := range served {
				made.servers[protocol] = &server{box: made, protocol: protocol, ledger: w.ledger}
				if err := made.servers[protocol].start(); err != nil {
					return nil, err
				}
			}
		}
	}
	if err := w.apply(func(*plan.Mesh) {}); err != nil {
		return nil, err
	}
	w.alone, err = startAlone(program, dir, w.ledger)
	return w, err
}

func spiffe(workload string) string { return "spiffe://" + domain + "/ns/soak/sa/" + workload }

func (w *world) authority() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "soak"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(48 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err == nil {
		w.root, err = x509.ParseCertificate(der)
	}
	w.key = key
	return err
}

func (w *world) sign(_ context.Context, _ string, csr []byte) ([][]byte, []byte, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(1000 + w.serial.Add(1)),
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(certificateLife), URIs: []*url.URL{req.URIs[0]},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}}, w.root, req.PublicKey, w.key)
	return [][]byte{der}, id.MarshalCertificates(w.root.Raw), err
}

// node starts a proxy and links to it.
func (w *world) node(name, program string) error {
	path := filepath.Join(w.dir, name)
	p, err := start(name, program, "--allow-root", "--link", path)
	if err != nil {
		return err
	}
	n := &node{process: p}
	w.nodes = append(w.nodes, n)
	handlers := link.Handlers{Sign: w.sign, Event: w.event, Sockets: func(instance string, n int) ([]*os.File, error) {
		return w.boxes[instance].ns.Dialers(n)
	}}
	for deadline := time.Now().Add(bootTime); ; time.Sleep(20 * time.Millisecond) {
		if n.link, err = link.Dial(context.Background(), path, handlers); err == nil {
			break
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w\n%s", name, err, p.log.Bytes())
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	n.gateway = ln.Addr().(*net.TCPAddr).AddrPort()
	if n.door, err = ln.(*net.TCPListener).File(); err != nil {
		return err
	}
	return n.link.SetGateway(context.Background(), n.door)
}

func (w *world) event(e api.Event) {
	n, _ := w.events.LoadOrStore(e.Kind, new(atomic.Int64))
	n.(*atomic.Int64).Add(1)
}

// box makes a sandbox on a node.
func (w *world) box(n *node, workload, instance string) (*box, error) {
	number := byte(len(w.boxes) + 1)
	address := netip.AddrFrom4([4]byte{10, 88, 0, number})
	b := &box{node: n, servers: map[string]*server{},
		Sandbox: plan.Sandbox{Instance: instance, Address: address, Identity: spiffe(workload), Service: workload, Namespace: "soak"}}
	var err error
	if b.ns, err = netns.Create(w.dir+"/ns", instance); err != nil {
		return nil, err
	}
	w.boxes[instance] = b
	if b.guest, err = netns.Create(w.dir+"/ns", "guest-"+instance); err != nil {
		return nil, err
	}
	if err := b.ns.Veth(netns.Guest{Address: address, MAC: net.HardwareAddr{2, 0, 0, 0, 1, number}}, b.guest); err != nil {
		return nil, err
	}
	tcp, err := b.ns.ListenTransparent()
	if err != nil {
		return nil, err
	}
	udp, dns, err := b.ns.ListenDNS()
	if err != nil {
		return nil, err
	}
	b.files = []*os.File{tcp, udp, dns}
	n.boxes = append(n.boxes, b)
	return b, n.link.AddSandbox(context.Background(), b.Sandbox, tcp, udp, dns)
}

func (b *box) endpoint() plan.Endpoint {
	return plan.Endpoint{Instance: b.Instance, Address: b.Address, Gateway: b.node.gateway}
}

// dial dials from the guest.
func (b *box) dial(to string) (c net.Conn, err error) {
	err = b.guest.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: 30 * time.Second, FallbackDelay: -1}).Dial("tcp4", to)
		return err
	})
	return c, err
}

// start listens in the guest.
func (s *server) start() error {
	var ln net.Listener
	err := s.box.guest.Do(func() (err error) {
		ln, err = net.Listen("tcp4", netip.AddrPortFrom(s.box.Address, ports[s.protocol].Port).String())
		return err
	})
	if err == nil {
		s.stop = meshload.Serve(s.protocol, ln, s.ledger)
	}
	return err
}

func (w *world) service(name string) *plan.Service {
	for i := range w.plan.Services {
		if w.plan.Services[i].Name == name {
			return &w.plan.Services[i]
		}
	}
	return nil
}

// apply changes the plan and sends it to every node; it is in force then.
func (w *world) apply(change func(*plan.Mesh)) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	change(&w.plan)
	w.plan.Generation++
	for _, n := range w.nodes {
		p := w.plan
		for _, b := range n.boxes {
			p.Sandboxes = append(p.Sandboxes, b.Sandbox)
		}
		if err := n.link.SetPlan(context.Background(), p); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) close() error {
	var all []error
	for _, b := range w.boxes {
		for _, s := range b.servers {
			if s.stop != nil {
				s.stop()
			}
		}
	}
	for _, n := range w.nodes {
		if n.link != nil {
			n.link.Close()
		}
		all = append(all, n.stop())
		if n.door != nil {
			n.door.Close()
		}
	}
	if w.alone != nil {
		all = append(all, w.alone.close())
	}
	for _, b := range w.boxes {
		for _, f := range b.files {
			f.Close()
		}
		for _, ns := range []*netns.Namespace{b.ns, b.guest} {
			if ns != nil {
				all = append(all, ns.Delete())
			}
		}
	}
	return errors.Join(append(all, os.RemoveAll(w.dir))...)
}
