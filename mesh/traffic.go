package mesh

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/plan"
)

const maxTries = 5 // endpoints, for one connection

// here is the locality of this node; every other is as far as the next.
const here = "node"

// defaultTraffic is what holds where a plan says nothing. Of two endpoints drawn
// the one with fewer connections is taken, and of equals the one on this node:
// a neighbour is preferred only while that costs nobody anything. One that could
// not be reached is tried last for a moment, which grows; as trying it costs a
// connection nobody waits for, all may be out at once, and are then all used.
// Half of the connections may be tried again, as one of two endpoints may end.
func defaultTraffic() balance.Policy {
	return balance.Policy{
		Balancer: balance.LeastRequest, Near: balance.NearOfEquals, Locality: here, Panic: 1,
		Outlier: &balance.Outlier{Unreachable: 1, Ejection: 2 * time.Second, MaxEjection: time.Minute, MaxEjected: 100},
		Retry:   balance.Retry{Tries: maxTries, PerTry: connectTimeout, Percent: 50, Floor: 64},
	}
}

// trafficPolicy is the plan's word on a service, checked, over the defaults.
func trafficPolicy(t *plan.Traffic) (balance.Policy, error) {
	p := defaultTraffic()
	if t == nil {
		return p, nil
	}
	override(&p.Balancer, balance.Balancer(t.Balancer))
	override(&p.Near, balance.Near(t.Near))
	p.SlowStart = time.Duration(t.SlowStart)
	if o := t.Outlier; o != nil {
		override(&p.Outlier.Unreachable, o.Unreachable)
		override(&p.Outlier.Ejection, time.Duration(o.Ejection))
		override(&p.Outlier.MaxEjection, max(time.Duration(o.MaxEjection), p.Outlier.Ejection))
		override(&p.Outlier.MaxEjected, o.MaxEjected)
		if o.Off {
			p.Outlier = nil
		}
	}
	if b := t.Breaker; b != nil {
		p.Limits = balance.Limits{Requests: b.Connections, Retries: b.Retries}
		p.EndpointLimits = balance.Limits{Requests: b.EndpointConnections}
	}
	if r := t.Retry; r != nil {
		override(&p.Retry.Tries, r.Tries)
		override(&p.Retry.PerTry, time.Duration(r.PerTry))
		override(&p.Retry.Percent, r.Percent)
		override(&p.Retry.Floor, r.Floor)
	}
	if t.Timeout < 0 || time.Duration(t.Timeout) > time.Hour {
		return p, fmt.Errorf("traffic: timeout %v; want at most 1h", time.Duration(t.Timeout))
	}
	if p.Retry.PerTry > time.Hour {
		return p, fmt.Errorf("traffic: %v for one try; want at most 1h", p.Retry.PerTry)
	}
	_, err := p.Checked()
	return p, err
}

// override replaces a default by what is said.
func override[T comparable](v *T, said T) {
	var zero T
	if said != zero {
		*v = said
	}
}

// traffic keeps the endpoints of each service, and what is known of them, from
// plan to plan.
type traffic struct {
	clock balance.Clock

	mu   sync.Mutex
	sets map[string]*balance.Set
}

// follow gives each service of a directory its set. Connections that are open
// go on where they are: an endpoint that has left gets no new ones.
func (t *traffic) follow(d *directory, local []plan.Sandbox) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	mine := make(map[netip.Addr]bool, len(local))
	for _, sb := range local {
		mine[sb.Address] = true
	}
	now := t.clock.Now()
	for key, s := range d.services {
		var err error
		if s.set = t.sets[key]; s.set == nil {
			s.set, err = balance.New(s.policy, rand.Uint64)
		} else if p, _ := s.policy.Checked(); !samePolicy(*p, s.set.Policy()) {
			err = s.set.Apply(now, s.policy)
		}
		if err == nil {
			err = replaceEndpoints(s.set, now, s.Endpoints, mine)
		}
		if err != nil {
			return fmt.Errorf("service %q in %q: %w", s.Name, s.Namespace, err)
		}
		t.sets[key] = s.set
	}
	maps.DeleteFunc(t.sets, func(key string, _ *balance.Set) bool { return d.services[key] == nil })
	return nil
}

func samePolicy(a, b balance.Policy) bool {
	if (a.Outlier == nil) != (b.Outlier == nil) || a.Outlier != nil && *a.Outlier != *b.Outlier {
		return false
	}
	a.Outlier, b.Outlier = nil, nil
	return a == b
}

// replaceEndpoints tells a set who is there, unless it knows: plans change more
// often than the endpoints of one service.
func replaceEndpoints(set *balance.Set, now balance.Time, endpoints []plan.Endpoint, mine map[netip.Addr]bool) error {
	all := make([]balance.Endpoint, len(endpoints))
	for i := range endpoints {
		e := endpoints[i]
		all[i] = balance.Endpoint{Name: endpointName(&e), Value: &e}
		if mine[e.Address] {
			all[i].Locality = here
		}
	}
	if slices.EqualFunc(all, set.Hosts(), func(e balance.Endpoint, h *balance.Host) bool {
		have := h.Endpoint()
		return have.Name == e.Name && have.Locality == e.Locality
	}) {
		return nil
	}
	return set.Replace(now, all)
}

// endpointName tells endpoints apart: an instance that has moved is another.
func endpointName(e *plan.Endpoint) string {
	return e.Instance + " " + e.Address.String() + " " + e.Gateway.String()
}

func endpointOf(h *balance.Host) *plan.Endpoint { return h.Endpoint().Value.(*plan.Endpoint) }

// reach opens a stream to an endpoint: the one dialled, or one picked and, while
// nothing was sent and the budget allows, another. A refusal by the rules is
// final. The pick is counted in until it is released.
func (sb *sandbox) reach(ctx context.Context, me identity, t target, source string) (*hbone.Stream, balance.Pick, error) {
	if d := time.Duration(t.trafficTimeout()); d > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d)
		defer cancel()
	}
	r := &reaching{sb: sb, me: me, t: t, source: source, set: t.service.set}
	defer r.endRetry()
	for {
		pick, err := r.pick()
		if errors.Is(err, balance.ErrTried) && len(r.faults) > 0 {
			return nil, pick, errors.Join(r.faults...)
		}
		if err != nil {
			return nil, pick, errors.Join(append(r.faults, err)...)
		}
		stream, outcome, err := r.try(ctx, endpointOf(pick.Host()))
		pick.Report(sb.p.traffic.clock.Now(), outcome)
		if err == nil {
			return stream, pick, nil
		}
		pick.Release()
		r.faults = append(r.faults, fmt.Errorf("endpoint %s: %w", endpointOf(pick.Host()).Instance, err))
		if refusedByRules(err) || ctx.Err() != nil || !r.again() {
			return nil, pick, errors.Join(r.faults...)
		}
	}
}

func (t target) trafficTimeout() plan.Duration {
	if t.service.Traffic == nil {
		return 0
	}
	return t.service.Traffic.Timeout
}

// reaching is one connection on its way to an endpoint.
type reaching struct {
	sb       *sandbox
	me       identity
	t        target
	source   string
	set      *balance.Set
	tried    []*balance.Host
	faults   []error
	retrying bool
}

func (r *reaching) pick() (p balance.Pick, err error) {
	now := r.sb.p.traffic.clock.Now()
	if r.t.endpoint != nil {
		p, err = r.set.PickNamed(now, endpointName(r.t.endpoint))
	} else {
		// The hash keeps an instance where it is, where the balancer goes by it.
		p, err = r.set.Pick(now, balance.Request{Hash: balance.Hash(r.sb.facts.Load().Instance), Tried: r.tried})
	}
	switch {
	case err == nil:
		r.tried = append(r.tried, p.Host())
	case errors.Is(err, balance.ErrNoEndpoint):
		err = fmt.Errorf("%s has no endpoint", r.t.service)
	case errors.Is(err, balance.ErrOverflow):
		limits, each := r.set.Policy().Limits.Requests, r.set.Policy().EndpointLimits.Requests
		err = fmt.Errorf("%w: %d connections to %s are open from this node; its traffic policy allows %s, and %s to one endpoint",
			err, r.set.Active(), r.t.service, orNoBound(limits), orNoBound(each))
	}
	return p, err
}

func orNoBound(n int64) string {
	if n == 0 {
		return "any number"
	}
	return fmt.Sprint(n)
}

// try opens a stream to one endpoint, and tells what that says of it. What is
// wrong with the caller says nothing of the endpoint.
func (r *reaching) try(ctx context.Context, e *plan.Endpoint) (*hbone.Stream, balance.Outcome, error) {
	p := r.sb.p
	if err := p.registry.check(party{peerInstance: e.Instance}); err != nil {
		return nil, balance.Cancelled, err
	}
	try, cancel := context.WithTimeout(ctx, r.set.Policy().Retry.PerTry)
	defer cancel()
	stream, err := p.open(try, r.sb, r.me, r.t.service, e, r.t.port.Port, r.source)
	var refusal tls.AlertError
	switch {
	case err == nil:
		return stream, balance.Success, nil
	case refusedByRules(err), errors.Is(err, errRevoked), errors.Is(ctx.Err(), context.Canceled), errors.As(err, &refusal):
		return nil, balance.Cancelled, err
	}
	return nil, balance.Unreachable, err
}

func refusedByRules(err error) bool {
	var status *hbone.StatusError
	return errors.As(err, &status) && status.Status == 401
}

// again tells whether another endpoint may be tried.
func (r *reaching) again() bool {
	r.endRetry()
	if r.t.endpoint != nil || len(r.tried) >= r.set.Policy().Retry.Tries {
		return false
	}
	if r.retrying = r.set.Retry(); !r.retrying {
		r.faults = append(r.faults, fmt.Errorf("no other is tried: %d retries to %s are under way, and its budget allows no more", r.set.Open(balance.Retries), r.t.service))
	}
	return r.retrying
}

func (r *reaching) endRetry() {
	if r.retrying {
		r.set.EndRetry()
		r.retrying = false
	}
}
