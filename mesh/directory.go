package mesh

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"hauberk.dev/id"
	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/inspect"
	"hauberk.dev/plan"
)

// directory is a plan made quick to look things up in. It never changes.
type directory struct {
	generation  uint64
	trustDomain string
	services    map[string]*service
	// targets are the addresses a workload may dial: virtual ones, and those of
	// endpoints.
	targets map[netip.AddrPort]target
	// instances behind addresses, to name the instance that calls.
	endpoints map[netip.Addr]instanceOf
}

type service struct {
	plan.Service
	identity id.Name
	ports    map[uint16]plan.Port
	paths    bool // some rule that is enforced has paths
	remote   bool // some rule has services or methods
	judgement
	policy balance.Policy
	set    *balance.Set // of the endpoints; kept from plan to plan

	inspected *inspect.Service // nil if requests are not looked at
	mirror    *mirror          // nil if they are not copied
}

func (s *service) String() string { return s.Name + "." + s.Namespace }

type target struct {
	service  *service
	endpoint *plan.Endpoint // nil for the virtual address
	port     plan.Port
}

type instanceOf struct {
	instance string
	identity string
}

func serviceKey(namespace, name string) string { return namespace + "/" + name }

// newDirectory checks a plan as a whole and indexes it. All faults are named.
func newDirectory(m plan.Mesh) (*directory, error) {
	if err := id.CheckTrustDomain(m.TrustDomain); err != nil {
		return nil, err
	}
	d := &directory{generation: m.Generation, trustDomain: m.TrustDomain, services: map[string]*service{},
		targets: map[netip.AddrPort]target{}, endpoints: map[netip.Addr]instanceOf{}}
	faults := []error{checkObserve(m.Observe)}
	for i := range m.Services {
		if err := d.add(&service{Service: m.Services[i]}); err != nil {
			faults = append(faults, fmt.Errorf("service %q in %q: %w", m.Services[i].Name, m.Services[i].Namespace, err))
		}
	}
	return d, errors.Join(faults...)
}

func (d *directory) add(s *service) (err error) {
	if s.identity, err = id.ParseName(s.Identity); err != nil {
		return err
	}
	if s.identity.TrustDomain() != d.trustDomain || s.identity.Kind() != id.KindWorkload {
		return fmt.Errorf("identity %q is no workload of trust domain %q", s.Identity, d.trustDomain)
	}
	if s.Address.IsValid() && !s.Address.Is4() {
		return fmt.Errorf("address %q is not IPv4", s.Address)
	}
	if s.policy, err = trafficPolicy(s.Traffic); err != nil {
		return err
	}
	if _, err = inspectConfig(s.Inspect); err != nil {
		return err
	}
	key := serviceKey(s.Namespace, s.Name)
	if d.services[key] != nil {
		return errors.New("named twice")
	}
	d.services[key] = s
	s.ports = map[uint16]plan.Port{}
	for _, port := range s.Ports {
		if port.Port == 0 || !slices.Contains(plan.Protocols, port.Protocol) {
			return fmt.Errorf("port %d with protocol %q; want 1 to 65535 and one of %q", port.Port, port.Protocol, plan.Protocols)
		}
		s.ports[port.Port] = port
		if err := d.target(s.Address, target{s, nil, port}); err != nil {
			return err
		}
	}
	if len(s.Endpoints) > balance.MaxEndpoints {
		return fmt.Errorf("%d endpoints; at most %d", len(s.Endpoints), balance.MaxEndpoints)
	}
	named := make(map[string]bool, len(s.Endpoints))
	for i := range s.Endpoints {
		e := &s.Endpoints[i]
		if name := endpointName(e); named[name] {
			return fmt.Errorf("endpoint %q named twice", e.Instance)
		} else {
			named[name] = true
		}
		if !e.Address.Is4() || !e.Gateway.IsValid() {
			return fmt.Errorf("endpoint %q with address %q and gateway %q", e.Instance, e.Address, e.Gateway)
		}
		d.endpoints[e.Address] = instanceOf{e.Instance, s.Identity}
		for _, port := range s.ports {
			if err := d.target(e.Address, target{s, e, port}); err != nil {
				return err
			}
		}
	}
	return s.prepare()
}

func (d *directory) target(a netip.Addr, t target) error {
	if !a.IsValid() {
		return nil // a service without an address is reached by its endpoints
	}
	at := netip.AddrPortFrom(a, t.port.Port)
	if old, ok := d.targets[at]; ok {
		return fmt.Errorf("%s belongs to %s already", at, old.service)
	}
	d.targets[at] = t
	return nil
}

// lookup is what the name server asks.
func (d *directory) lookup(name, namespace string) (netip.Addr, bool) {
	s := d.services[serviceKey(namespace, name)]
	if s == nil || !s.Address.IsValid() {
		return netip.Addr{}, false
	}
	return s.Address, true
}

// callerInstance names the instance behind the address that the calling proxy
// says it speaks for, if that fits the identity it has proved. It can only
// narrow what the identity allows.
func (d *directory) callerInstance(a netip.Addr, identity string) string {
	if i, ok := d.endpoints[a]; ok && i.identity == identity {
		return i.instance
	}
	return ""
}
