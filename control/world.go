package control

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	wire "hauberk.dev/api/node"
	"hauberk.dev/api/spec"
	"hauberk.dev/control/rollout"
	"hauberk.dev/guard"
	"hauberk.dev/plan"
)

// key names a namespaced object.
type key struct{ Namespace, Name string }

func (k key) String() string { return k.Namespace + "/" + k.Name }

// world is everything the control plane knows at one moment, as plain values.
// What a node should do is a pure function of it.
type world struct {
	trustDomain  string
	observe      *plan.Observe
	applications map[key]spec.Application
	workloads    map[key]workload
	guards       map[key]guardPolicy
	floors       map[string]clusterPolicy
	// book is what is in force of them, and what was lowered.
	book rollout.State
	// given is what instances were given under the generation they have. What
	// changed since then has no number yet and is told to nobody.
	given  map[key]wire.Guard
	access map[key]spec.AccessPolicy
	// conditions are those of access policies that were compiled before.
	conditions *conditions
	releases   map[key]spec.ReleasePolicy
	instances  map[key]instance
	nodes      map[string]nodeState
	epoch      plan.Epoch
}

// workload is a Workload object with what was allotted to it.
type workload struct {
	spec       spec.Workload
	generation int64
	// address is the virtual address its name resolves to.
	address netip.Addr
	// guard is the generation of its resolved policies.
	guard       uint64
	guardDigest string
	labels      map[string]string
}

// guardPolicy is a GuardPolicy object: what is wanted, not what is in force.
type guardPolicy struct {
	spec       spec.GuardPolicy
	generation int64
}

// clusterPolicy is a ClusterGuardPolicy object.
type clusterPolicy struct {
	spec       spec.ClusterGuardPolicy
	generation int64
}

// instance is an Instance object with the last word of its node.
type instance struct {
	workload    string
	application string
	node        string
	repository  string
	digest      string
	specHash    string
	address     netip.Addr
	identity    string
	ticket      []byte
	spec        spec.Workload
	status      wire.InstanceStatus
	observed    bool // a node has spoken of it
	deleting    bool
	// guard is the generation of the policies it should enforce, and the digest
	// of their content.
	guard       uint64
	guardDigest string
}

func (i instance) final() bool {
	switch i.status.Phase {
	case wire.PhaseFailed, wire.PhaseExited, wire.PhaseRefused:
		return true
	}
	return false
}

// nodeState is a node that said hello.
type nodeState struct {
	hello  wire.Hello
	ready  bool
	spares wire.Spares
}

// desired is everything the named node should be doing, but for generations
// and trust anchors, which the caller owns.
func (w world) desired(node string) wire.Desired {
	d := wire.Desired{Epoch: w.epoch, Mesh: w.mesh(node)}
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if i.node != node || i.deleting || i.final() {
			continue
		}
		wl, ok := w.workloads[key{k.Namespace, i.workload}]
		if !ok {
			continue
		}
		g, ok := w.given[k]
		if !ok { // as it was before a restart
			g = w.guard(w.subject(k, i, wl), w.book)
			g.Generation = i.guard
		}
		g.Kernel = w.nodes[node].hello.Measurement.Kernel
		d.Instances = append(d.Instances, wire.Instance{
			ID: k.Name, Namespace: k.Namespace, Workload: i.workload, Spec: i.spec,
			Digest: i.digest, Repository: i.repository, Address: i.address.String(),
			Identity: i.identity, Ticket: i.ticket, Guard: g,
		})
	}
	return d
}

// subject is an instance as policies select it; the zero instance is any new
// one of the workload.
func (w world) subject(k key, i instance, wl workload) rollout.Subject {
	return rollout.Subject{Instance: k.Name, Namespace: k.Namespace, Workload: i.workload, Node: i.node, Labels: wl.labels, Policies: wl.spec.GuardPolicies}
}

// guard resolves the policies of an instance and the service names in them.
func (w world) guard(of rollout.Subject, book rollout.State) wire.Guard {
	g := wire.Guard{Services: map[string]string{}, Policies: book.For(of, guard.Baseline())}
	for _, p := range g.Policies {
		if p.Spec.Net == nil {
			continue
		}
		for _, e := range p.Spec.Net.Egress {
			if k, ok := serviceKey(of.Namespace, e.Service); ok {
				if peer, ok := w.workloads[k]; ok && peer.address.IsValid() {
					g.Services[e.Service] = peer.address.String()
				}
			}
		}
	}
	return g
}

// serviceKey reads "workload" or "workload.namespace".
func serviceKey(namespace, service string) (key, bool) {
	if service == "" {
		return key{}, false
	}
	if name, ns, ok := strings.Cut(service, "."); ok {
		return key{ns, name}, true
	}
	return key{namespace, service}, true
}

// mesh is the plan of one node's proxy. Services are the same for every node;
// sandboxes are the node's own.
func (w world) mesh(node string) plan.Mesh {
	m := plan.Mesh{TrustDomain: w.trustDomain, Observe: w.observe}
	for _, k := range sortedKeys(w.workloads) {
		wl := w.workloads[k]
		if !wl.address.IsValid() {
			continue
		}
		m.Services = append(m.Services, w.service(k, wl))
	}
	for _, k := range sortedKeys(w.instances) {
		i := w.instances[k]
		if i.node != node || i.deleting || i.final() {
			continue
		}
		m.Sandboxes = append(m.Sandboxes, plan.Sandbox{
			Instance: k.Name, Address: i.address, Identity: i.identity,
			Service: i.workload, Namespace: k.Namespace,
			Egress: w.egress(w.subject(k, i, w.workloads[key{k.Namespace, i.workload}])),
		})
	}
	return m
}

func (w world) service(k key, wl workload) plan.Service {
	s := plan.Service{
		Name: k.Name, Namespace: k.Namespace, Address: wl.address,
		Identity: identity(w.trustDomain, k),
	}
	for _, p := range wl.spec.Ports {
		s.Ports = append(s.Ports, plan.Port{Port: uint16(p.Port), Protocol: p.Protocol, Publish: uint16(p.Publish)})
	}
	for _, ik := range sortedKeys(w.instances) {
		i := w.instances[ik]
		if ik.Namespace != k.Namespace || i.workload != k.Name || i.status.Phase != wire.PhaseRunning || i.deleting {
			continue
		}
		gateway, err := netip.ParseAddrPort(w.nodes[i.node].hello.Gateway)
		if err != nil {
			continue // its node has not said hello since the control plane started
		}
		if slices.Contains(w.epoch.Instances, ik.Name) {
			continue
		}
		s.Endpoints = append(s.Endpoints, plan.Endpoint{Instance: ik.Name, Address: i.address, Gateway: gateway})
	}
	for _, ak := range sortedKeys(w.access) {
		a := w.access[ak]
		if ak.Namespace != k.Namespace || a.Workload != k.Name {
			continue
		}
		w.protect(&s, ak, a)
		if a.Mode != modeAudit {
			s.Inspect = inspection(s.Inspect, a.Inspect)
		}
	}
	return s
}

// caller turns a name of an AccessRule into what the mesh compares.
func (w world) caller(namespace, from string) string {
	if from == "*" || from == "anonymous" || strings.HasPrefix(from, "spiffe://") {
		return from
	}
	k, _ := serviceKey(namespace, from)
	return identity(w.trustDomain, k)
}

// egress is what an instance's policies let it reach outside the mesh; every
// policy with a net section must allow a destination, so an instance with two
// gets their common part. A switch lowers what the Guard does, and not this.
func (w world) egress(of rollout.Subject) []plan.Egress {
	var lists [][]plan.Egress
	for _, p := range (rollout.State{Policies: w.book.Policies}).For(of, guard.Baseline()) {
		if p.Spec.Net == nil {
			continue
		}
		list := []plan.Egress{}
		for _, e := range p.Spec.Net.Egress {
			if prefix, err := netip.ParsePrefix(e.CIDR); err == nil {
				out := plan.Egress{Prefix: prefix.Masked()}
				for _, port := range e.Ports {
					out.Ports = append(out.Ports, uint16(port))
				}
				list = append(list, out)
			}
		}
		lists = append(lists, list)
	}
	if len(lists) == 0 {
		return nil // nobody allowed anything outside the mesh
	}
	common := lists[0]
	for _, next := range lists[1:] {
		common = intersect(common, next)
	}
	return common
}

// intersect keeps, of two allow lists, what both allow.
func intersect(a, b []plan.Egress) []plan.Egress {
	var both []plan.Egress
	for _, x := range a {
		for _, y := range b {
			if !x.Prefix.Overlaps(y.Prefix) {
				continue
			}
			narrow := x.Prefix
			if y.Prefix.Bits() > narrow.Bits() {
				narrow = y.Prefix
			}
			ports, some := commonPorts(x.Ports, y.Ports)
			if some {
				both = append(both, plan.Egress{Prefix: narrow, Ports: ports})
			}
		}
	}
	return both
}

// commonPorts intersects two port lists in which empty means all; some is
// false if nothing is common.
func commonPorts(a, b []uint16) (ports []uint16, some bool) {
	switch {
	case len(a) == 0:
		return b, true
	case len(b) == 0:
		return a, true
	}
	for _, p := range a {
		if slices.Contains(b, p) {
			ports = append(ports, p)
		}
	}
	return ports, len(ports) > 0
}

func identity(trustDomain string, k key) string {
	return "spiffe://" + trustDomain + "/ns/" + k.Namespace + "/sa/" + k.Name
}

func sortedKeys[V any](m map[key]V) []key {
	keys := make([]key, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	return keys
}

// allot returns the first address of the prefix that is not taken, starting
// after the last one allotted so that an address is not reused at once.
func allot(prefix netip.Prefix, after netip.Addr, taken map[netip.Addr]bool) (netip.Addr, error) {
	first := prefix.Masked().Addr().Next()
	a := first
	if prefix.Contains(after) {
		a = after.Next()
	}
	for range 1 << min(16, 32-prefix.Bits()) {
		if !prefix.Contains(a) || !prefix.Contains(a.Next()) {
			a = first // the last address of the prefix is not used
		}
		if !taken[a] {
			return a, nil
		}
		a = a.Next()
	}
	return netip.Addr{}, fmt.Errorf("allot address in %s: all are taken", prefix)
}
