package mesh

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	api "hauberk.dev/api/mesh"
)

// countsState is what a proxy has counted and learnt, as plain data, so that it
// outlives the process.
type countsState struct {
	Services map[string]serviceCountsState `json:"services,omitempty"`
	Boxes    map[string]boxCountsState     `json:"sandboxes,omitempty"`
	// Events wait to be told to the node; Lost were, and are to be told of, and
	// AllLost ever.
	Events  []api.Event `json:"events,omitempty"`
	Lost    uint64      `json:"lost,omitempty"`
	AllLost uint64      `json:"allLost,omitempty"`
}

// learntState is what is known of the requests to a service that is looked at.
type learntState struct {
	Service string          `json:"service"`
	Schema  json.RawMessage `json:"schema"`
}

type serviceCountsState struct {
	Connections uint64            `json:"connections,omitempty"`
	Requests    map[string]uint64 `json:"requests,omitempty"` // by protocol, place of the code and of the verdict: "http.2.0"
	Took        []uint64          `json:"took,omitempty"`
	Micros      uint64            `json:"micros,omitempty"`
	Callbacks   uint64            `json:"callbacks,omitempty"`
	CalledBack  [2]uint64         `json:"calledBack,omitzero"` // allowed, denied
}

type boxCountsState struct {
	Total    uint64 `json:"total,omitempty"`
	Refused  uint64 `json:"refused,omitempty"`
	Trials   uint64 `json:"trials,omitempty"` // would have been refused
	BytesIn  uint64 `json:"bytesIn,omitempty"`
	BytesOut uint64 `json:"bytesOut,omitempty"`
}

// counts is what has been counted so far, and takes the events that wait.
func (p *Proxy) counts() *countsState {
	s := &countsState{Services: map[string]serviceCountsState{}, Boxes: map[string]boxCountsState{}, AllLost: p.events.total.Load()}
	s.Events, s.Lost = p.events.take()
	o := &p.observer
	o.mu.Lock()
	services := maps.Clone(o.services)
	o.mu.Unlock()
	for name, c := range services {
		s.Services[name] = c.state()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for name, sb := range p.sandboxes {
		s.Boxes[name] = boxCountsState{sb.total.Load(), sb.refused.Load(), sb.trials.count.Load(), sb.bytesIn.Load(), sb.bytesOut.Load()}
	}
	return s
}

// restore goes on from what another has counted and learnt. Plan and sandboxes
// are there.
func (p *Proxy) restore(s *countsState) error {
	var err error
	for name, c := range s.Services {
		err = errors.Join(err, p.observer.countsOf(name).restore(c))
	}
	p.events.total.Store(s.AllLost)
	p.mu.Lock()
	for name, c := range s.Boxes {
		if sb := p.sandboxes[name]; sb != nil {
			sb.total.Store(c.Total)
			sb.refused.Store(c.Refused)
			sb.trials.count.Store(c.Trials)
			sb.bytesIn.Store(c.BytesIn)
			sb.bytesOut.Store(c.BytesOut)
		}
	}
	p.mu.Unlock()
	return err
}

// relearn goes on from what another has learnt of a service.
func (p *Proxy) relearn(s *learntState) error {
	if service := p.analysis.known()[s.Service]; service != nil {
		return service.Import(s.Schema)
	}
	return nil // it is not looked at any more
}

func (c *serviceCounts) state() serviceCountsState {
	s := serviceCountsState{Connections: c.connections.Load(), Requests: map[string]uint64{}, Micros: c.micros.Load(), Callbacks: c.callbacks.Load()}
	for i := range c.calledBack {
		s.CalledBack[i] = c.calledBack[i].Load()
	}
	for i := range c.requests {
		for j := range c.requests[i] {
			for k := range c.requests[i][j] {
				if n := c.requests[i][j][k].Load(); n > 0 {
					s.Requests[fmt.Sprintf("%s.%d.%d", counted[i], j, k)] = n
				}
			}
		}
	}
	for i := range c.took {
		s.Took = append(s.Took, c.took[i].Load())
	}
	return s
}

// restore takes what it knows and tells what it does not: the other process may be
// of another version.
func (c *serviceCounts) restore(s serviceCountsState) error {
	c.connections.Store(s.Connections)
	c.micros.Store(s.Micros)
	c.callbacks.Store(s.Callbacks)
	for i := range c.calledBack {
		c.calledBack[i].Store(s.CalledBack[i])
	}
	var unknown []error
	for key, n := range s.Requests {
		i, j, k, ok := countedPlace(key)
		if !ok {
			unknown = append(unknown, fmt.Errorf("counts of requests %.32q", key))
			continue
		}
		c.requests[i][j][k].Store(n)
	}
	if len(s.Took) > len(c.took) {
		return errors.Join(append(unknown, fmt.Errorf("%d buckets of time; want at most %d", len(s.Took), len(c.took)))...)
	}
	for i, n := range s.Took {
		c.took[i].Store(n)
	}
	return errors.Join(unknown...)
}

// countedByPlace are the protocols as versions before wrote them: by their place.
var countedByPlace = [...]string{"http", "grpc", "bolt", "dubbo", "dubbo-thrift", "tcp", "redis", "other"}

// countedPlace reads where a count belongs.
func countedPlace(key string) (protocol, code, verdict int, ok bool) {
	parts := strings.Split(key, ".")
	if len(parts) != 3 {
		return 0, 0, 0, false
	}
	name := parts[0]
	if n, err := strconv.Atoi(name); err == nil && n >= 0 && n < len(countedByPlace) {
		name = countedByPlace[n]
	}
	code, cerr := strconv.Atoi(parts[1])
	verdict, verr := strconv.Atoi(parts[2])
	protocol = slices.Index(counted[:], name)
	ok = protocol >= 0 && cerr == nil && verr == nil && code >= 0 && code < classes+grpcCodes && verdict >= 0 && verdict < verdicts
	return protocol, code, verdict, ok
}
