package xds

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"time"

	"hauberk.dev/plan"
	"hauberk.dev/xds/envoy"
)

// force is what of the store is in force: the newest of each cluster and
// listener that is ready, or the one before while its successor is not.
type force struct {
	clusters  map[string]cluster
	listeners map[string]listener
	since     map[string]time.Time // a listener has been waiting for clusters
	wait      []string             // who waits for what, for the status
}

type cluster struct {
	from *envoy.Cluster
	plan plan.Cluster
}

type listener struct {
	from *envoy.Listener
	plan plan.Listener
}

func newForce() force {
	return force{clusters: map[string]cluster{}, listeners: map[string]listener{}, since: map[string]time.Time{}}
}

// refer adds the names that what is in force still speaks of.
func (f *force) refer(st *store, endpoints, routes map[string]bool) {
	for name, c := range f.clusters {
		if st.shelves[envoy.Clusters].have[name] != nil && c.from.Endpoints != "" {
			endpoints[c.from.Endpoints] = true
		}
	}
	for name, l := range f.listeners {
		if st.shelves[envoy.Listeners].have[name] == nil {
			continue
		}
		for _, r := range l.from.Routes {
			if r != "" {
				routes[r] = true
			}
		}
	}
}

func (st *store) waiting() []string { return st.force.wait }

// build makes the plan of what is ready, and says after which time to ask
// again though nothing was heard. There is no plan before the server has said
// which listeners and clusters there are.
func (st *store) build(now time.Time) (p *plan.Proxy, again time.Duration) {
	again = time.Hour
	if !st.shelves[envoy.Listeners].heard || !st.o.OnDemand && !st.shelves[envoy.Clusters].heard {
		return nil, again
	}
	st.force.wait = nil
	st.buildClusters()
	again = st.buildListeners(now)
	p = &plan.Proxy{}
	for _, name := range slices.Sorted(maps.Keys(st.force.clusters)) {
		p.Clusters = append(p.Clusters, st.force.clusters[name].plan)
	}
	for _, name := range slices.Sorted(maps.Keys(st.force.listeners)) {
		p.Listeners = append(p.Listeners, st.force.listeners[name].plan)
	}
	slices.Sort(st.force.wait)
	st.refer() // names that only what was replaced spoke of
	return p, again
}

func (st *store) buildClusters() {
	next := map[string]cluster{}
	for name, r := range st.shelves[envoy.Clusters].have {
		from := r.value.(*envoy.Cluster)
		missing := st.lacks(from.Secrets())
		p, ok := st.cluster(from)
		if !ok {
			missing = fmt.Sprintf("endpoints %q", from.Endpoints)
		}
		if missing == "" {
			next[name] = cluster{from, p}
			continue
		}
		st.force.wait = append(st.force.wait, fmt.Sprintf("clusters %q waits for %s", name, missing))
		if old, there := st.force.clusters[name]; there {
			if p, ok := st.cluster(old.from); ok {
				old.plan = p
			}
			next[name] = old
		}
	}
	st.force.clusters = next
}

// cluster joins a cluster with its endpoints, once they are known. Those the
// server says do not exist are known to be none.
func (st *store) cluster(from *envoy.Cluster) (p plan.Cluster, ok bool) {
	p = from.Cluster
	if from.Endpoints == "" {
		return p, true
	}
	s := &st.shelves[envoy.Endpoints]
	if r := s.have[from.Endpoints]; r != nil {
		p.Upstreams = r.value.(*envoy.EndpointTable).Upstreams
		return p, true
	}
	return p, s.gone[from.Endpoints]
}

func (st *store) buildListeners(now time.Time) (again time.Duration) {
	again = time.Hour
	next := map[string]listener{}
	since := map[string]time.Time{}
	for name, r := range st.shelves[envoy.Listeners].have {
		from := r.value.(*envoy.Listener)
		old, there := st.force.listeners[name]
		p, named, missing := st.listener(from)
		if missing == "" {
			if missing = cmp.Or(st.unready(named), st.lacks(from.Secrets())); missing != "" {
				// A cluster or secret that never gets ready does not hold up a listener for ever.
				since[name] = cmp.Or(st.force.since[name], now)
				left := st.o.Patience - now.Sub(since[name])
				if left <= 0 {
					st.force.wait = append(st.force.wait, fmt.Sprintf("listeners %q waited in vain for %s", name, missing))
					missing = ""
				} else {
					again = min(again, left)
				}
			}
		} else if there {
			// Still the one before, with its own routes as they are now.
			if p, _, unknown := st.listener(old.from); unknown == "" {
				old.plan = p
			}
		}
		switch {
		case missing == "":
			next[name] = listener{from, p}
			continue
		case there:
			next[name] = old
		}
		st.force.wait = append(st.force.wait, fmt.Sprintf("listeners %q waits for %s", name, missing))
	}
	st.force.listeners, st.force.since = next, since
	return again
}

// listener joins a listener with its routes, and lists the clusters that both
// name. missing is which routes are not known yet.
func (st *store) listener(from *envoy.Listener) (p plan.Listener, clusters []string, missing string) {
	p, clusters = from.Listener, from.Clusters
	p.Chains = slices.Clone(p.Chains)
	s := &st.shelves[envoy.Routes]
	for i, name := range from.Routes {
		if name == "" {
			continue
		}
		http := *p.Chains[i].HTTP
		if r := s.have[name]; r != nil {
			routes := r.value.(*envoy.RouteTable)
			http.Hosts = routes.Hosts
			clusters = append(slices.Clip(clusters), routes.Clusters...)
		} else if !s.gone[name] {
			return p, nil, fmt.Sprintf("routes %q", name)
		}
		p.Chains[i].HTTP = &http
	}
	return p, clusters, ""
}

// unready names a cluster that is to come and is not in force yet.
func (st *store) unready(clusters []string) string {
	s := &st.shelves[envoy.Clusters]
	for _, name := range clusters {
		if _, ready := st.force.clusters[name]; ready {
			continue
		}
		if s.have[name] != nil || st.o.OnDemand && !s.gone[name] && s.refused[name] == "" {
			return fmt.Sprintf("clusters %q", name)
		}
	}
	return ""
}
