package xds

import (
	"crypto/sha256"
	"fmt"
	"slices"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"hauberk.dev/xds/envoy"
)

// store holds what was accepted, of each kind, and what of it is in force.
// The client's lock guards it. Values in it never change: an update puts
// another value in place of the one before.
type store struct {
	o       Options
	shelves [envoy.Kinds]shelf
	bytes   int
	asked   map[string]int // clusters, by Want
	force   force
}

// shelf holds the resources of one kind.
type shelf struct {
	have    map[string]*resource
	wanted  map[string]bool // by name, or "*"
	gone    map[string]bool // wanted by name, and the server says there is none
	refused map[string]string
	listed  int  // bytes of names and versions
	heard   bool // the server has answered
}

type resource struct {
	version string
	sum     [sha256.Size]byte
	size    int
	value   any
}

func newStore(o Options) store {
	st := store{o: o, asked: map[string]int{}, force: newForce()}
	for k := range st.shelves {
		st.shelves[k] = shelf{
			have: map[string]*resource{}, wanted: map[string]bool{},
			gone: map[string]bool{}, refused: map[string]string{},
		}
	}
	st.shelves[envoy.Listeners].wanted["*"] = true
	if !o.OnDemand {
		st.shelves[envoy.Clusters].wanted["*"] = true
	}
	return st
}

func (st *store) wanted(k envoy.Kind) map[string]bool { return st.shelves[k].wanted }

// versions of what is there, for a server that has not told this stream yet.
func (st *store) versions(k envoy.Kind) map[string]string {
	versions := make(map[string]string, len(st.shelves[k].have))
	for name, r := range st.shelves[k].have {
		versions[name] = r.version
	}
	return versions
}

func (st *store) count() map[string]int {
	n := map[string]int{}
	for k := range st.shelves {
		n[envoy.Kind(k).String()] = len(st.shelves[k].have)
	}
	return n
}

func (st *store) refusals() (all []string) {
	for k := range st.shelves {
		for name, why := range st.shelves[k].refused {
			all = append(all, fmt.Sprintf("%s %q: %s", envoy.Kind(k), name, why))
		}
	}
	slices.Sort(all)
	return all
}

// candidate is a resource of a response that was judged good by itself.
type candidate struct {
	name string
	*resource
}

// take keeps what is good of a response and says what is not. Resources are
// read before the lock is taken.
func (c *Client) take(kind envoy.Kind, r *discovery.DeltaDiscoveryResponse) (changed bool, faults faults) {
	if n := len(r.Resources); n > c.o.MaxResources {
		faults.add(fmt.Sprintf("resources: %d in one response: more than the %d that are held", n, c.o.MaxResources))
		return false, faults
	}
	twice := repeated(r)
	var good []candidate
	bad := map[string]string{}
	for _, res := range r.Resources {
		name := res.GetName()
		why := ""
		if twice[name] {
			why = "name: more than once in one response"
		} else if got, err := c.read(kind, res); err != nil {
			why = err.Error()
		} else {
			good = append(good, got)
		}
		if why != "" {
			why = clip(why, maxDetail/2)
			bad[name] = why
			faults.add(fmt.Sprintf("%s %q: %s", kind, clip(name, maxName), why))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	shelf := &c.store.shelves[kind]
	changed, shelf.heard = !shelf.heard, true
	for _, name := range r.RemovedResources {
		if !twice[name] && c.store.remove(kind, name) {
			changed = true
		}
	}
	for _, g := range good {
		switch stored, err := c.store.put(kind, g); {
		case err != nil:
			bad[g.name] = err.Error()
			faults.add(fmt.Sprintf("%s %q: %s", kind, g.name, err))
		case stored:
			changed = true
		}
	}
	shelf.remember(bad)
	if changed {
		c.store.refer()
	}
	return changed, faults
}

// repeated are the names that one response speaks of twice, and differently or with
// two resources: which of both is meant nobody can know.
func repeated(r *discovery.DeltaDiscoveryResponse) map[string]bool {
	seen := make(map[string]bool, len(r.Resources)+len(r.RemovedResources))
	for _, res := range r.Resources {
		seen[res.GetName()] = seenTwice(seen, res.GetName())
	}
	for _, name := range r.RemovedResources {
		if _, there := seen[name]; there {
			seen[name] = true
		}
	}
	return seen
}

func seenTwice(seen map[string]bool, name string) bool {
	_, there := seen[name]
	return there
}

// read judges one resource by itself.
func (c *Client) read(kind envoy.Kind, r *discovery.Resource) (candidate, error) {
	if err := envoy.Nameable(r.GetName()); err != nil {
		return candidate{}, fmt.Errorf("name: %w", err)
	}
	switch body := r.GetResource(); {
	case len(r.Version) > maxVersion:
		return candidate{}, fmt.Errorf("version: %d bytes: more than %d", len(r.Version), maxVersion)
	case len(r.Aliases) > 0:
		return candidate{}, fmt.Errorf("aliases: %q: a resource has one name here", clip(r.Aliases[0], maxName))
	case r.Ttl != nil:
		return candidate{}, fmt.Errorf("ttl: %v: what is accepted stays until it is removed", r.Ttl.AsDuration())
	case body == nil:
		return candidate{}, fmt.Errorf("resource: missing")
	case body.TypeUrl != kind.URL():
		return candidate{}, fmt.Errorf("resource.type_url: %q: want %q", clip(body.TypeUrl, maxName), kind.URL())
	}
	value, err := envoy.Read(kind, r.Name, r.Resource.Value)
	if err != nil {
		return candidate{}, err
	}
	if err := c.o.Check(value); err != nil {
		return candidate{}, err
	}
	body := r.Resource.Value
	return candidate{r.Name, &resource{version: r.Version, sum: sha256.Sum256(body), size: len(body), value: value}}, nil
}

// put stores a resource, within the bounds, and says whether that changed
// anything.
func (st *store) put(kind envoy.Kind, g candidate) (changed bool, err error) {
	s := &st.shelves[kind]
	if !s.wanted["*"] && !s.wanted[g.name] {
		return false, nil // no longer asked for, and under way when that was said
	}
	old := s.have[g.name]
	listed, bytes := s.listed+g.listed(g.name), st.bytes+g.size
	if old != nil {
		listed, bytes = listed-old.listed(g.name), bytes-old.size
	}
	switch {
	case old == nil && len(s.have) >= st.o.MaxResources:
		return false, fmt.Errorf("resource: %d of its kind are held: no more fit", len(s.have))
	case listed > maxListed:
		return false, fmt.Errorf("name: names and versions of its kind are above %d bytes", maxListed)
	case bytes > st.o.MaxBytes:
		return false, fmt.Errorf("resource: %d bytes more are above the %d that all may have", g.size, st.o.MaxBytes)
	}
	s.have[g.name], s.listed, st.bytes = g.resource, listed, bytes
	delete(s.gone, g.name)
	delete(s.refused, g.name)
	return old == nil || old.version != g.version || old.sum != g.sum, nil
}

// listed is what naming the resource costs in a request.
func (r *resource) listed(name string) int { return len(name) + len(r.version) + 12 }

// remove takes a resource away because the server says that it is gone.
func (st *store) remove(kind envoy.Kind, name string) (changed bool) {
	s := &st.shelves[kind]
	delete(s.refused, name)
	if kind == envoy.Secrets && s.have[name] != nil && s.wanted[name] {
		return false // as in Envoy: what still names it would be left without
	}
	changed = st.drop(kind, name)
	if s.wanted[name] && name != "*" && !s.gone[name] {
		s.gone[name] = true
		changed = true
	}
	return changed
}

func (st *store) drop(kind envoy.Kind, name string) bool {
	s := &st.shelves[kind]
	old := s.have[name]
	if old == nil {
		return false
	}
	s.listed -= old.listed(name)
	st.bytes -= old.size
	delete(s.have, name)
	return true
}

// remember keeps what was refused for the status, within a bound.
func (s *shelf) remember(bad map[string]string) {
	for name, why := range bad {
		if _, there := s.refused[name]; (there || len(s.refused) < maxRefused) && len(name) <= maxName {
			s.refused[name] = why
		}
	}
}

// refer works out which names are wanted, and forgets what is of a name that
// is not.
func (st *store) refer() {
	if st.o.OnDemand {
		st.want(envoy.Clusters, st.namedClusters())
	}
	endpoints, routes := map[string]bool{}, map[string]bool{}
	for _, r := range st.shelves[envoy.Clusters].have {
		if name := r.value.(*envoy.Cluster).Endpoints; name != "" {
			endpoints[name] = true
		}
	}
	for _, r := range st.shelves[envoy.Listeners].have {
		for _, name := range r.value.(*envoy.Listener).Routes {
			if name != "" {
				routes[name] = true
			}
		}
	}
	// What is in force until its successor is ready goes on being told.
	st.force.refer(st, endpoints, routes)
	st.want(envoy.Endpoints, endpoints)
	st.want(envoy.Routes, routes)
	if st.o.OnDemand { // routes may have left
		st.want(envoy.Clusters, st.namedClusters())
	}
	st.referSecrets()
}

// namedClusters are those that listeners and routes speak of.
func (st *store) namedClusters() map[string]bool {
	named := map[string]bool{}
	for name := range st.asked {
		named[name] = true
	}
	for _, r := range st.shelves[envoy.Listeners].have {
		for _, name := range r.value.(*envoy.Listener).Clusters {
			named[name] = true
		}
	}
	for _, r := range st.shelves[envoy.Routes].have {
		for _, name := range r.value.(*envoy.RouteTable).Clusters {
			named[name] = true
		}
	}
	return named
}

// want replaces the names that are wanted of a kind.
func (st *store) want(kind envoy.Kind, names map[string]bool) {
	s := &st.shelves[kind]
	for name := range s.have {
		if !names[name] {
			st.drop(kind, name)
		}
	}
	for name := range s.gone {
		if !names[name] {
			delete(s.gone, name)
		}
	}
	for name := range s.refused {
		if !names[name] {
			delete(s.refused, name)
		}
	}
	s.wanted = names
}
