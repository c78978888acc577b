package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/id"
	"hauberk.dev/mesh/link"
	"hauberk.dev/plan"
)

// control is what one connected node says.
type control struct {
	p       *Proxy
	session *link.Session
	greeted bool
	planned bool
	kept    map[string]bool // sandboxes added over this link
}

// handle answers the node. Requests come one after the other.
func (c *control) handle(ctx context.Context, m *api.Message, files []*os.File) (*api.Message, []*os.File, error) {
	defer closeAll(files) // listeners are dup'ed on the way in
	c.p.changes.RLock()
	defer c.p.changes.RUnlock()
	if c.p.handedOver() {
		return nil, nil, errors.New("another process has taken this one's place; dial again")
	}
	if !c.greeted && m.Kind != api.KindHello {
		return nil, nil, errors.New("say hello first")
	}
	reply := &api.Message{}
	var err error
	switch m.Kind {
	case api.KindHello:
		if m.Hello.Version != api.Version {
			return nil, nil, fmt.Errorf("version %d is not spoken here, %d is", m.Hello.Version, api.Version)
		}
		c.greeted = true
		c.p.node.Store(c.session)
		c.p.events.wake()
		reply.Hello = &api.Hello{Version: api.Version, Process: os.Getpid()}
	case api.KindAdd:
		err = c.add(*m.Sandbox, files)
	case api.KindRemove:
		delete(c.kept, m.Instance)
		c.p.removeSandbox(m.Instance)
	case api.KindPlan:
		err = c.plan(*m.Plan)
	case api.KindGateway:
		err = c.p.setGateway(files[0])
	case api.KindPublish:
		err = c.p.setPublished(m.Publish.Ports, files)
	case api.KindCut:
		r := c.p.registry.cutEpoch(*m.Epoch)
		reply.Receipt = &r
	case api.KindStats:
		reply.Stats = c.p.stats()
	case api.KindTap:
		reply.Tapped, err = c.p.tap(m.Instance, m.Tap)
	case api.KindCarried:
		reply.Connections = c.p.carried.strange(m.Connections)
	case api.KindLearnt:
		reply.Learnt, err = c.p.analysis.learnt(m.Learnt.Service)
	case api.KindRelearn:
		err = c.p.analysis.goOn(m.Learnt.Service, m.Learnt.Schema)
	case api.KindPing:
	default:
		err = fmt.Errorf("a node does not ask for %q", m.Kind)
	}
	return reply, nil, err
}

func (c *control) add(s plan.Sandbox, files []*os.File) error {
	if _, err := id.ParseName(s.Identity); err != nil {
		return err
	}
	p := c.p
	p.mu.Lock()
	if other := p.byAddress[s.Address]; other != nil && other.facts.Load().Instance != s.Instance {
		p.mu.Unlock()
		return fmt.Errorf("address %s belongs to %q", s.Address, other.facts.Load().Instance)
	}
	sb := p.sandboxes[s.Instance]
	fresh, before := sb == nil, &s
	if fresh {
		sb = p.newSandbox(s)
		p.sandboxes[s.Instance] = sb
	} else {
		before = sb.facts.Swap(&s)
		delete(p.byAddress, before.Address)
	}
	p.byAddress[s.Address] = sb
	p.mu.Unlock()
	c.kept[s.Instance] = true
	if err := sb.listen(files); err != nil {
		if fresh {
			p.removeSandbox(s.Instance)
		} else { // what it has goes on
			p.mu.Lock()
			delete(p.byAddress, s.Address)
			p.byAddress[before.Address] = sb
			sb.facts.Store(before)
			p.mu.Unlock()
		}
		return err
	}
	sb.svid.now()
	return nil
}

func (p *Proxy) removeSandbox(instance string) {
	p.mu.Lock()
	sb := p.sandboxes[instance]
	if sb != nil {
		delete(p.sandboxes, instance)
		delete(p.byAddress, sb.facts.Load().Address)
	}
	p.mu.Unlock()
	if sb != nil {
		sb.close()
	}
}

// plan puts a plan in force. What the new plan does not allow is cut.
func (c *control) plan(m plan.Mesh) error {
	p := c.p
	if now := p.directory.Load().generation; m.Generation < now {
		return fmt.Errorf("plan %d is older than %d, which is in force", m.Generation, now)
	}
	if err := p.setPlan(m); err != nil {
		return fmt.Errorf("plan %d: %w", m.Generation, err)
	}
	if !c.planned {
		c.planned = true
		p.dropStrangers(c.kept)
	}
	p.cutForbidden(p.directory.Load())
	return nil
}

// cutForbidden ends what a plan does not allow. It judges outside the registry's
// lock: that verifies tokens, and a refusal may itself cut. What is registered
// meanwhile is judged there.
func (p *Proxy) cutForbidden(d *directory) {
	gone := map[*entry]bool{}
	for _, e := range p.registry.all() {
		if !e.allowedBy(d) {
			gone[e] = true
		}
	}
	p.registry.cutIf(func(e *entry) bool { return gone[e] })
}

// setPlan puts a plan in force for what comes.
func (p *Proxy) setPlan(m plan.Mesh) error {
	d, err := newDirectory(m)
	if err != nil {
		return err
	}
	if err := p.traffic.follow(d, m.Sandboxes); err != nil {
		return err
	}
	p.analysis.follow(p, d)
	p.observer.follow(p, m.Observe)
	p.directory.Store(d)
	p.world.Store(&m)
	p.plans.Do(func() { close(p.planned) })
	p.refreshFacts(m.Sandboxes)
	return nil
}

// refreshFacts takes over what a plan says of sandboxes that are here. Who they
// are does not change.
func (p *Proxy) refreshFacts(all []plan.Sandbox) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range all {
		sb := p.sandboxes[s.Instance]
		if sb == nil {
			continue
		}
		if old := sb.facts.Load(); old.Address == s.Address && old.Identity == s.Identity {
			sb.facts.Store(&s)
		}
	}
}

// dropStrangers removes sandboxes that an earlier link left and this one does
// not know.
func (p *Proxy) dropStrangers(kept map[string]bool) {
	p.mu.Lock()
	var gone []string
	for instance := range p.sandboxes {
		if !kept[instance] {
			gone = append(gone, instance)
		}
	}
	p.mu.Unlock()
	for _, instance := range gone {
		p.removeSandbox(instance)
	}
}

func (p *Proxy) setGateway(f *os.File) error {
	ln, err := listener(f)
	if err != nil {
		return err
	}
	p.replaceGateway(ln)
	p.still.shakes(1)
	p.running.Go(func() { p.accept(ln, p.still.shakes, p.inbound) })
	return nil
}

// replaceGateway closes the listener there was. Not under the lock: Close waits
// for the goroutine that accepts.
func (p *Proxy) replaceGateway(ln net.Listener) {
	p.mu.Lock()
	old := p.gateway
	p.gateway = ln
	p.mu.Unlock()
	if old != nil {
		old.Close()
	}
}

func (p *Proxy) setPublished(ports []api.PublishedPort, files []*os.File) error {
	var all []net.Listener
	for _, f := range files {
		ln, err := listener(f)
		if err != nil {
			for _, ln := range all {
				ln.Close()
			}
			return err
		}
		all = append(all, ln)
	}
	p.replacePublished(all, ports)
	for i, ln := range all {
		port := ports[i]
		p.serveOn(ln, func(c net.Conn) { p.ingress(c, port) })
	}
	return nil
}

func (p *Proxy) replacePublished(all []net.Listener, ports []api.PublishedPort) {
	p.mu.Lock()
	old := p.published
	p.published, p.ports = all, ports
	p.mu.Unlock()
	for _, ln := range old {
		ln.Close()
	}
}

func (p *Proxy) stats() *api.Stats {
	s := &api.Stats{Process: os.Getpid(), Started: p.started, Generation: p.directory.Load().generation,
		Sandboxes: map[string]api.InstanceStats{}, EventsLost: p.events.total.Load(), Analysis: p.analysis.stats(), Goroutines: runtime.NumGoroutine()}
	s.Flows, s.FlowsTotal = p.registry.flows()
	p.registry.mu.Lock()
	s.Epoch = p.registry.epoch
	p.registry.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	for instance, sb := range p.sandboxes {
		s.Sandboxes[instance] = sb.stats()
	}
	return s
}

// ownAddress tells whether an address is one of this machine's.
func ownAddress(a netip.Addr) bool {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return true // better too careful
	}
	return slices.ContainsFunc(all, func(own net.Addr) bool {
		n, ok := own.(*net.IPNet)
		return ok && n.IP.Equal(net.IP(a.AsSlice()))
	})
}
