package xds

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"

	"hauberk.dev/xds/envoy"
)

// maxCulprits is how often one response is tried again without what was refused
// of it, before all of it is refused.
const maxCulprits = 16

// Refusal is an error of Apply that no later try mends: what applies the plan
// does not take it. Name and Kind say which resource is the cause, if one is
// known to be; then the others of its response are tried without it.
type Refusal struct {
	Kind envoy.Kind
	Name string // "" if nobody knows which
	Why  string
}

func (r *Refusal) Error() string {
	if r.Name == "" {
		return r.Why
	}
	return fmt.Sprintf("%s %q: %s", r.Kind, r.Name, r.Why)
}

// confirm keeps what is good of a response and makes it true before it is
// answered. What Apply refuses is undone as if it had never come, and is a fault.
// While Apply cannot reach who would say, nothing is answered.
func (s *session) confirm(ctx context.Context, kind envoy.Kind, r *discovery.DeltaDiscoveryResponse) (changed bool, faults faults, err error) {
	c := s.c
	c.applying.Lock()
	defer c.applying.Unlock()
	c.mu.Lock()
	before := c.store.copied()
	c.mu.Unlock()
	changed, faults = c.take(kind, r)
	for tries := 0; changed; tries++ {
		no, err := c.forced(ctx)
		if err != nil { // the stream has ended: the next one brings all of it again
			c.mu.Lock()
			c.store.restore(&before)
			c.mu.Unlock()
			return false, faults, err
		}
		if no == nil {
			break
		}
		faults.add(no.Error())
		c.mu.Lock()
		one := tries < maxCulprits && c.store.undo(&before, no, r)
		if !one {
			c.store.restore(&before)
		}
		c.store.blame(kind, r, no, one)
		c.mu.Unlock()
		if !one {
			break // what is in force is what it was
		}
	}
	return changed, faults, nil
}

// forced has the plan applied, and waits for whoever cannot be reached.
func (c *Client) forced(ctx context.Context) (*Refusal, error) {
	for {
		_, err := c.force(ctx)
		var no *Refusal
		if err == nil || errors.As(err, &no) {
			return no, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(c.o.ApplyAgain):
		}
	}
}

// copied is the store as it is now; values in it never change.
func (st *store) copied() store {
	before := *st
	for k := range before.shelves {
		s := &before.shelves[k]
		s.have, s.wanted, s.gone, s.refused = maps.Clone(s.have), maps.Clone(s.wanted), maps.Clone(s.gone), maps.Clone(s.refused)
	}
	before.force.clusters, before.force.listeners = maps.Clone(st.force.clusters), maps.Clone(st.force.listeners)
	before.force.since = maps.Clone(st.force.since)
	return before
}

// restore undoes everything since the copy was made, but what was asked for. The
// copy is used up.
func (st *store) restore(before *store) {
	asked := st.asked
	for k := range st.shelves {
		before.shelves[k].heard, before.shelves[k].refused = st.shelves[k].heard, st.shelves[k].refused
	}
	*st = *before
	st.asked = asked
	st.refer()
}

// undo gives one resource back the value it had, and says whether it could: it
// must be one that the response changed.
func (st *store) undo(before *store, no *Refusal, r *discovery.DeltaDiscoveryResponse) bool {
	if no.Name == "" || no.Kind.URL() != r.TypeUrl {
		return false
	}
	now, was := st.shelves[no.Kind].have[no.Name], before.shelves[no.Kind].have[no.Name]
	if now == was {
		return false
	}
	st.drop(no.Kind, no.Name)
	st.putBack(no.Kind, no.Name, was)
	// Its place is taken by what was in force, not by what was refused.
	switch no.Kind {
	case envoy.Clusters:
		undoForce(st.force.clusters, before.force.clusters, no.Name)
	case envoy.Listeners:
		undoForce(st.force.listeners, before.force.listeners, no.Name)
	}
	st.refer()
	// Names that are spoken of again were never taken back from the server.
	for k := range st.shelves {
		s := &st.shelves[k]
		for name, was := range before.shelves[k].have {
			if envoy.Kind(k) != no.Kind && s.wanted[name] && s.have[name] == nil && !s.gone[name] {
				st.putBack(envoy.Kind(k), name, was)
			}
		}
		for name := range before.shelves[k].gone {
			if s.wanted[name] && s.have[name] == nil {
				s.gone[name] = true
			}
		}
	}
	return true
}

// putBack stores a resource that was there before.
func (st *store) putBack(kind envoy.Kind, name string, was *resource) {
	if was == nil {
		return
	}
	s := &st.shelves[kind]
	s.have[name] = was
	s.listed += was.listed(name)
	st.bytes += was.size
}

// blame remembers for the status what was refused: one, or all of a response.
func (st *store) blame(kind envoy.Kind, r *discovery.DeltaDiscoveryResponse, no *Refusal, one bool) {
	why := clip(no.Why, maxDetail/2)
	bad := map[string]string{no.Name: why}
	if !one {
		bad = map[string]string{}
		for _, res := range r.Resources {
			bad[res.GetName()] = why
		}
	}
	st.shelves[kind].remember(bad)
}

func undoForce[V any](now, before map[string]V, name string) {
	if was, there := before[name]; there {
		now[name] = was
	} else {
		delete(now, name)
	}
}
