package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	api "hauberk.dev/api/mesh"
	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/internal/netns"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// meshTime bounds one request to the mesh.
const meshTime = 5 * time.Second

var errNoMesh = errors.New("hauberk-mesh is not connected; is it running?")

// meshPart keeps the mesh told. It remembers everything said, so that a mesh
// that restarts hears it again, and holds every listener, so that nothing
// waiting in one is lost meanwhile.
type meshPart struct {
	n *Node

	mu        sync.Mutex
	link      *link.Link
	sandboxes map[string]*meshSandbox
	plan      *plan.Mesh
	gateway   *os.File
	published map[uint16]link.Published // by port of the node
	dirty     chan struct{}             // capacity 1: the plan is to be sent
	accused   map[string]time.Time      // instances, and when

	normals *normals
}

type meshSandbox struct {
	plan     plan.Sandbox
	ns       *netns.Namespace
	tcp      *os.File
	udp, dns *os.File
	// base is what was dropped before the workload's first process: the
	// guest kernel's own greetings.
	base netns.Drops
	// watch sees the namespace as the kernel does; found is what it saw first.
	watch *netns.Watch
	found []string
}

func newMeshPart(n *Node) *meshPart {
	m := &meshPart{n: n, sandboxes: map[string]*meshSandbox{}, published: map[uint16]link.Published{}, dirty: make(chan struct{}, 1)}
	m.normals = newNormals(filepath.Join(n.conf.State, "learnt"), n.slog, m.learntAnew)
	m.normals.here = m.workloads
	return m
}

// run keeps a link to the mesh until ctx ends.
func (m *meshPart) run(ctx context.Context) error {
	// In use it may be by the mesh, for the process of this node before.
	if err := m.openGateway(); err != nil && !errors.Is(err, syscall.EADDRINUSE) {
		return err
	}
	defer m.close()
	pause := 20 * time.Millisecond
	for ctx.Err() == nil {
		if err := m.session(ctx); err != nil && ctx.Err() == nil {
			m.n.note(fmt.Errorf("mesh link: %w", err))
		} else {
			pause = 20 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, time.Second)
	}
	return nil
}

// session connects, says everything, and then every change, until the link
// ends.
func (m *meshPart) session(ctx context.Context) error {
	l, err := link.Dial(ctx, m.n.conf.MeshLink, link.Handlers{Sign: m.sign, Sockets: m.sockets, Event: m.event})
	if err != nil {
		return err
	}
	defer l.Close()
	if err := m.say(ctx, l); err != nil {
		return err
	}
	m.n.slog.Info("mesh connected", "pid", l.Process())
	defer func() {
		m.mu.Lock()
		m.link = nil
		m.mu.Unlock()
	}()
	keeping, stop := context.WithCancel(ctx)
	var keeps sync.WaitGroup
	keeps.Go(func() { m.normals.run(keeping, l.Done(), l) })
	defer keeps.Wait()
	defer stop()
	for {
		select {
		case <-ctx.Done():
			keeps.Wait()
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), meshTime)
			defer cancel()
			m.normals.keep(last, l)
			return nil
		case <-l.Done():
			return errors.New("ended; dialling again")
		case <-m.dirty:
			if err := m.sayPlan(ctx, l); err != nil {
				err = fmt.Errorf("send plan to the mesh: %w", err)
				if !m.normals.gave(l) {
					return err
				}
				m.n.note(err)
				if errors.Is(err, context.DeadlineExceeded) {
					m.changed() // it has not been refused: it is to be said
				}
			}
		case <-m.normals.more:
			if len(m.dirty) > 0 { // the plan goes first
				m.normals.wake()
				continue
			}
			m.normals.later(ctx, l)
		}
	}
}

// say sends all there is. The link counts as connected before the sandboxes
// are sent, so that one added meanwhile is not missed.
func (m *meshPart) say(ctx context.Context, l *link.Link) error {
	if err := m.saySandboxes(ctx, l); err != nil {
		return err
	}
	return m.sayPlan(ctx, l)
}

func (m *meshPart) saySandboxes(ctx context.Context, l *link.Link) error {
	ctx, cancel := context.WithTimeout(ctx, 2*meshTime)
	defer cancel()
	if err := m.sayGateway(ctx, l); err != nil {
		return err
	}
	m.mu.Lock()
	m.link = l
	all := slices.Collect(maps.Values(m.sandboxes))
	m.mu.Unlock()
	if _, err := l.Cut(ctx, m.n.currentEpoch()); err != nil {
		return err
	}
	for _, s := range all {
		if err := l.AddSandbox(ctx, s.plan, s.tcp, s.udp, s.dns); err != nil {
			return err
		}
	}
	return nil
}

// sayGateway hands the gateway over. A mesh that has outlived a process of
// this node serves that one's until it is given another: it is given one that
// nobody knows, so that the address is free to be opened here.
func (m *meshPart) sayGateway(ctx context.Context, l *link.Link) error {
	if m.gateway == nil {
		other, err := listenFile("127.0.0.1:0")
		if err != nil {
			return err
		}
		defer other.Close()
		if err := l.SetGateway(ctx, other); err != nil {
			return err
		}
		if err := m.openGateway(); err != nil {
			return err
		}
	}
	return l.SetGateway(ctx, m.gateway)
}

// sayPlan sends the published ports and the plan, before the first of a link what
// was learnt of the workloads in it: that has a time of its own. A port that cannot
// be opened keeps back neither the plan nor the other ports.
func (m *meshPart) sayPlan(ctx context.Context, l *link.Link) error {
	m.mu.Lock()
	p := m.plan
	if p == nil {
		m.mu.Unlock()
		return nil
	}
	published, failed := m.publishLocked(p)
	m.mu.Unlock()
	if err := m.normals.give(ctx, l); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, meshTime)
	defer cancel()
	if err := l.SetPublish(ctx, published); err != nil {
		return err
	}
	if errors.Is(failed, syscall.EADDRINUSE) {
		// Perhaps by this mesh, for the process of this node before; it has
		// just let go of what it was not given again.
		m.mu.Lock()
		published, failed = m.publishLocked(p)
		m.mu.Unlock()
		if err := l.SetPublish(ctx, published); err != nil {
			return err
		}
	}
	m.n.note(failed)
	return l.SetPlan(ctx, *p)
}

// publishLocked opens the listeners the plan asks for and closes the others.
func (m *meshPart) publishLocked(p *plan.Mesh) ([]link.Published, error) {
	var errs []error
	wanted := map[uint16]bool{}
	for _, s := range p.Services {
		for _, port := range s.Ports {
			wanted[port.Publish] = true
		}
	}
	for port, ln := range m.published {
		if !wanted[port] {
			ln.Listener.Close()
			delete(m.published, port)
		}
	}
	for _, s := range p.Services {
		for _, port := range s.Ports {
			if port.Publish == 0 {
				continue
			}
			if err := m.openLocked(port.Publish, api.PublishedPort{Service: s.Name, Namespace: s.Namespace, Port: port.Port}); err != nil {
				errs = append(errs, fmt.Errorf("publish %s/%s: %w", s.Namespace, s.Name, err))
			}
		}
	}
	return slices.Collect(maps.Values(m.published)), errors.Join(errs...)
}

// openLocked leads a port of the node somewhere, and opens it if it is not open.
func (m *meshPart) openLocked(port uint16, to api.PublishedPort) error {
	at, open := m.published[port]
	switch {
	case open:
	case len(m.published) >= api.MaxFiles: // more cannot be handed over, and the plan goes with them
		return fmt.Errorf("port %d: a node has at most %d: take away a spec.ports[].publish", port, api.MaxFiles)
	default:
		ln, err := listenFile(fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			return fmt.Errorf("%w: free the port or change spec.ports[].publish", err)
		}
		at.Listener = ln
	}
	at.PublishedPort = to
	m.published[port] = at
	return nil
}

// listenFile opens a TCP listener and returns it as a descriptor to pass on.
func listenFile(address string) (*os.File, error) {
	ln, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	defer ln.Close() // File is a duplicate
	return ln.(*net.TCPListener).File()
}

func (m *meshPart) openGateway() error {
	f, err := listenFile(m.n.conf.Gateway)
	if err != nil {
		return fmt.Errorf("open mesh gateway: %w: free the address or choose another --gateway", err)
	}
	m.gateway = f
	return nil
}

func (m *meshPart) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.gateway != nil {
		m.gateway.Close()
	}
	for _, p := range m.published {
		p.Listener.Close()
	}
}

// add opens a sandbox's sockets and gives them to the mesh. Without a mesh the
// sandbox has no network, so that is an error.
func (m *meshPart) add(ctx context.Context, s plan.Sandbox, ns *netns.Namespace) error {
	tcp, err := ns.ListenTransparent()
	if err != nil {
		return err
	}
	udp, dns, err := ns.ListenDNS()
	if err != nil {
		tcp.Close()
		return err
	}
	sandbox := &meshSandbox{plan: s, ns: ns, tcp: tcp, udp: udp, dns: dns}
	sandbox.watch, sandbox.found, err = ns.Watch(fencedGuest(s.Address))
	if err == nil {
		sandbox.base, err = ns.Dropped()
	}
	if err != nil {
		return errors.Join(err, tcp.Close(), udp.Close(), dns.Close())
	}
	m.mu.Lock()
	m.sandboxes[s.Instance] = sandbox
	l := m.link
	m.mu.Unlock()
	if l == nil {
		return errNoMesh
	}
	ctx, cancel := context.WithTimeout(ctx, meshTime)
	defer cancel()
	if err := l.AddSandbox(ctx, s, tcp, udp, dns); err != nil {
		return err
	}
	m.changed()
	return nil
}

// adopt is add for a sandbox that runs already: if there is no mesh now, it
// hears of the sandbox when it comes.
func (m *meshPart) adopt(ctx context.Context, s plan.Sandbox, ns *netns.Namespace) error {
	if err := m.add(ctx, s, ns); err != nil && !errors.Is(err, errNoMesh) && !errors.Is(err, link.ErrClosed) {
		return err
	}
	return nil
}

// remove cuts a sandbox off and closes its sockets. It is safe at any moment.
func (m *meshPart) remove(ctx context.Context, instance string) {
	m.mu.Lock()
	s, l := m.sandboxes[instance], m.link
	delete(m.sandboxes, instance)
	m.mu.Unlock()
	if s == nil {
		return
	}
	if l != nil {
		ctx, cancel := context.WithTimeout(ctx, meshTime)
		defer cancel()
		if err := l.RemoveSandbox(ctx, instance); err != nil && !errors.Is(err, link.ErrClosed) {
			m.n.note(err)
		}
	}
	for _, f := range []*os.File{s.tcp, s.udp, s.dns} {
		f.Close()
	}
}

// fenced are the sandboxes now connected, for whoever reads their fences.
func (m *meshPart) fenced() map[string]*meshSandbox {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.sandboxes)
}

// workloads are those with an instance here.
func (m *meshPart) workloads() map[string]bool {
	all := map[string]bool{}
	for _, s := range m.fenced() {
		all[s.plan.Namespace+"/"+s.plan.Service] = true
	}
	return all
}

// setPlan hands over the newest plan.
func (m *meshPart) setPlan(p plan.Mesh) {
	m.mu.Lock()
	same := m.plan != nil && m.plan.Generation == p.Generation
	m.mu.Unlock()
	if !same {
		m.normals.follow(p) // before it is said
	}
	m.mu.Lock()
	m.plan = &p
	m.mu.Unlock()
	if !same {
		m.changed()
	}
}

func (m *meshPart) changed() {
	select {
	case m.dirty <- struct{}{}:
	default:
	}
}

// cut puts an epoch in force and says what that did.
func (m *meshPart) cut(ctx context.Context, e plan.Epoch) (string, error) {
	m.mu.Lock()
	l := m.link
	m.mu.Unlock()
	if l == nil {
		return "", fmt.Errorf("cut: %w", errNoMesh)
	}
	ctx, cancel := context.WithTimeout(ctx, meshTime)
	defer cancel()
	r, err := l.Cut(ctx, e)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("cut %d connections", r.Connections), nil
}

// sign asks the CA for an identity, with what this node knows of the instance.
func (m *meshPart) sign(ctx context.Context, instance string, csr []byte) ([][]byte, []byte, error) {
	a, ok := m.n.find(instance)
	if !ok {
		return nil, nil, fmt.Errorf("sign for %s: no such instance here", instance)
	}
	a.mu.Lock()
	ask := wire.CSR{Instance: instance, Ticket: a.entry.Instance.Ticket, Request: csr, Guard: a.heartbeat, Measurement: m.n.guests.measurement}
	contained := a.frozen
	a.mu.Unlock()
	if contained {
		return nil, nil, fmt.Errorf("sign for %s: it is contained", instance)
	}
	if fresh, ok := m.n.ticket(instance); ok {
		ask.Ticket = fresh
	}
	var c wire.Certificate
	if err := m.n.uplink.call(ctx, wire.PathCSR, ask, &c); err != nil {
		return nil, nil, err
	}
	a.mu.Lock()
	a.serial = c.Serial
	a.mu.Unlock()
	m.n.said()
	return c.Chain, m.n.roots(), nil
}

// sockets opens connections-to-be in an instance's namespace.
func (m *meshPart) sockets(instance string, count int) ([]*os.File, error) {
	m.mu.Lock()
	s := m.sandboxes[instance]
	m.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("open sockets for %s: no such sandbox", instance)
	}
	return s.ns.Dialers(count)
}

// learntAnew tells of a workload whose normal is learnt anew although it was kept:
// until that is done, less is found.
func (m *meshPart) learntAnew(service, why string) {
	for id, s := range m.fenced() {
		if s.plan.Namespace+"/"+s.plan.Service != service {
			continue
		}
		if a, ok := m.n.find(id); ok {
			m.n.violation(a, wire.Report{Severity: spec.SeverityWarning, Cause: "mesh", Rule: "LearntAnew", Denied: true,
				Detail: "what is normal of the requests to " + service + " was kept, but cannot be gone on from, and is learnt anew: " + why})
		}
	}
}

// event passes on what the mesh saw. Its words are the proxy's and are only
// shown, never acted upon.
func (m *meshPart) event(e api.Event) {
	if e.Kind == api.EventIncident && m.accuse(e) {
		return
	}
	a, ok := m.n.find(e.Instance)
	if !ok {
		m.n.slog.Info("mesh event", "kind", e.Kind, "service", e.Service, "peer", e.Peer, "reason", e.Reason)
		return
	}
	rule := string(e.Kind)
	if e.Rule != "" {
		rule += " " + e.Rule
	}
	m.n.violation(a, wire.Report{Severity: spec.SeverityWarning, Cause: "mesh", Rule: rule, Denied: e.Kind != api.EventWouldDeny,
		Detail: fmt.Sprintf("%s from %s to %s %s: %s", e.Peer, e.Source, e.Service, e.Destination, e.Reason)})
}
