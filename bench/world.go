package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// world is a node's network with a real hauberk-mesh and two sandboxes whose
// guests are namespaces, so that no emulated processor is in the figures.
type world struct {
	ca      *authority
	dir     string
	proxy   *exec.Cmd
	said    *beginning
	profile string // where it goes, if one is taken
	link    *link.Link
	door    *os.File
	boxes   map[string]*box
	server  net.Listener
	signed  atomic.Int32
}

// box is one sandbox.
type box struct {
	plan.Sandbox
	ns, guest *netns.Namespace
	files     []*os.File
}

// openWorld makes one. Its proxy is hauberk-mesh, or, to be profiled, this program
// with the same packages.
func openWorld(ctx context.Context, l *lab, ca *authority, toProfile bool) (_ *world, err error) {
	w := &world{ca: ca, said: &beginning{}, boxes: map[string]*box{}}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open mesh: %w: %s", err, w.said), w.Close())
		}
	}()
	if w.dir, err = os.MkdirTemp(l.dir, "mesh"); err != nil {
		return nil, err
	}
	const meshUser = firstUser + 1<<16
	if err := os.Chown(w.dir, meshUser, meshUser); err != nil {
		return nil, err
	}
	socket := filepath.Join(w.dir, "link.sock")
	w.proxy, w.profile = exec.Command(filepath.Join(l.bin, "hauberk-mesh"), "-link", socket), filepath.Join(w.dir, "cpu")
	if toProfile {
		w.proxy = exec.Command("/proc/self/exe", profiled, socket, w.profile)
	}
	w.proxy.Stderr = w.said
	w.proxy.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Credential: &syscall.Credential{Uid: meshUser, Gid: meshUser}}
	if err := w.proxy.Start(); err != nil {
		return nil, err
	}
	if err := w.dial(ctx, socket); err != nil {
		return nil, err
	}
	return w, w.people(ctx)
}

// dial waits for the proxy and gives it its door.
func (w *world) dial(ctx context.Context, socket string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	var err error
	for {
		w.link, err = link.Dial(ctx, socket, link.Handlers{Sign: w.sign, Sockets: w.sockets, Event: func(api.Event) {}})
		if err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close() // File is a duplicate
	if w.door, err = ln.(*net.TCPListener).File(); err != nil {
		return err
	}
	return errors.Join(w.link.SetGateway(ctx, w.door), w.cast(ctx, netip.MustParseAddrPort(ln.Addr().String())))
}

// cast makes a caller and a callee, and the plan that lets one call the other.
func (w *world) cast(ctx context.Context, gateway netip.AddrPort) error {
	p := plan.Mesh{Generation: 1, TrustDomain: domain}
	for i, name := range []string{"caller", "callee"} {
		b, err := w.add(ctx, name, byte(i+1))
		if err != nil {
			return err
		}
		p.Sandboxes = append(p.Sandboxes, b.Sandbox)
		p.Services = append(p.Services, plan.Service{Name: name, Namespace: "bench", Address: netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)}),
			Identity: spiffe(name), Ports: []plan.Port{{Port: 9000, Protocol: "tcp"}},
			Allow:     []plan.Rule{{Name: "bench/caller", From: []string{spiffe("caller")}}},
			Endpoints: []plan.Endpoint{{Instance: b.Instance, Address: b.Address, Gateway: gateway}}})
	}
	return w.link.SetPlan(ctx, p)
}

func (w *world) add(ctx context.Context, name string, n byte) (*box, error) {
	b := &box{Sandbox: plan.Sandbox{Instance: name + "-1", Address: netip.AddrFrom4([4]byte{10, 88, 0, n}),
		Identity: spiffe(name), Service: name, Namespace: "bench"}}
	w.boxes[b.Instance] = b
	var err error
	if b.ns, err = netns.Create(filepath.Join(w.dir, "ns"), b.Instance); err != nil {
		return nil, err
	}
	if b.guest, err = netns.Create(filepath.Join(w.dir, "ns"), "guest-"+b.Instance); err != nil {
		return nil, err
	}
	if err := b.ns.Veth(netns.Guest{Address: b.Address, MAC: net.HardwareAddr{2, 0, 0, 0, 0, n}}, b.guest); err != nil {
		return nil, err
	}
	tcp, err := b.ns.ListenTransparent()
	if err != nil {
		return nil, err
	}
	b.files = append(b.files, tcp)
	udp, dns, err := b.ns.ListenDNS()
	if err != nil {
		return nil, err
	}
	b.files = append(b.files, udp, dns)
	return b, w.link.AddSandbox(ctx, b.Sandbox, tcp, udp, dns)
}

// people starts the callee and waits for both identities.
func (w *world) people(ctx context.Context) error {
	callee := w.boxes["callee-1"]
	err := callee.guest.Do(func() (err error) {
		w.server, err = net.Listen("tcp4", callee.Address.String()+":9000")
		return err
	})
	if err != nil {
		return err
	}
	go echo(w.server)
	for deadline := time.Now().Add(10 * time.Second); w.signed.Load() < 2; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) || ctx.Err() != nil {
			return errors.New("the proxy asked for no identities")
		}
	}
	return nil
}

func (w *world) sign(_ context.Context, _ string, csr []byte) ([][]byte, []byte, error) {
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, nil, err
	}
	der, err := w.ca.issue(req.PublicKey, req.URIs[0].String())
	w.signed.Add(1)
	return [][]byte{der}, w.ca.roots(), err
}

func (w *world) sockets(instance string, n int) ([]*os.File, error) {
	return w.boxes[instance].ns.Dialers(n)
}

// meshed dials as the caller's workload does.
func (w *world) meshed() (net.Conn, error) {
	return dialIn(w.boxes["caller-1"].guest, "10.99.0.2:9000")
}

// straight dials the same callee from its own tap's side.
func (w *world) straight() (net.Conn, error) {
	b := w.boxes["callee-1"]
	return dialIn(b.ns, b.Address.String()+":9000")
}

func dialIn(ns *netns.Namespace, address string) (c net.Conn, err error) {
	err = ns.Do(func() (err error) {
		c, err = (&net.Dialer{Timeout: 5 * time.Second, FallbackDelay: -1}).Dial("tcp4", address)
		return err
	})
	return c, err
}

func (w *world) Close() error {
	var errs []error
	if w.link != nil {
		errs = append(errs, w.link.Close())
	}
	if w.proxy != nil && w.proxy.Process != nil {
		end(w.proxy)
	}
	if w.server != nil {
		errs = append(errs, w.server.Close())
	}
	if w.door != nil {
		errs = append(errs, w.door.Close())
	}
	for _, b := range w.boxes {
		for _, f := range b.files {
			f.Close()
		}
		for _, ns := range []*netns.Namespace{b.ns, b.guest} {
			if ns != nil {
				errs = append(errs, ns.Delete())
			}
		}
	}
	return errors.Join(errs...)
}

// end asks a program to end, and makes it.
func end(c *exec.Cmd) {
	_ = c.Process.Signal(syscall.SIGTERM) // at worst it has ended
	kill := time.AfterFunc(5*time.Second, func() { _ = c.Process.Kill() })
	defer kill.Stop()
	_ = c.Wait() // how it ended is no figure
}
