package mesh

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/wire"
	"hauberk.dev/plan"
)

var (
	errRevoked   = errors.New("revoked")
	errForbidden = errors.New("the plan does not allow the connection any more")
)

// party is both sides of a connection, as far as they are known.
type party struct {
	instance, identity, serial             string // local
	peerInstance, peerIdentity, peerSerial string
}

type entryKind int

const (
	kindFlow entryKind = iota // a connection of a workload
	kindLink                  // an HBONE connection under flows
)

// entry is a live connection in the registry.
type entry struct {
	party
	kind      entryKind
	direction string // "in", "out", "egress"
	address   string
	since     time.Time
	// allowed tells after a change of plan whether the connection may stay.
	allowed func(*directory) bool
	// guest is the connection to the local sandbox itself, nil while there is none.
	guest func() *net.TCPConn
	// sever stops the connection's sockets from carrying bytes, quickly; close
	// then ends it and frees what it holds. Each is called at most once by the
	// registry, and neither may call back into it.
	sever func()
	close func()
	watch *watch // looks at the requests, if any
	// freeze stops a flow where it is; link is what a link is made of.
	freeze func()
	link   *carrierLink

	cut, frozen    atomic.Bool
	sent, received atomic.Uint64 // by, and to, the local sandbox

	moved uint64 // bytes at the last sweep
	quiet time.Time
}

// registry knows every live connection and who must have none. A connection
// that is not in it does not carry a byte.
type registry struct {
	mu         sync.Mutex
	entries    map[*entry]struct{}
	epoch      uint64
	instances  map[string]bool
	identities map[string]bool
	serials    map[string]bool
	closed     bool // no connection is taken in any more
	frozen     bool // nor for now
}

// add takes a connection in, unless a party of it is revoked. Check and entry
// are one step: a cut that comes later finds the entry.
func (r *registry) add(e *entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return net.ErrClosed
	}
	if r.frozen {
		return wire.ErrFrozen
	}
	if err := r.checkLocked(e.party); err != nil {
		return err
	}
	if r.entries == nil {
		r.entries = map[*entry]struct{}{}
	}
	if e.since.IsZero() {
		e.since = time.Now()
	}
	e.quiet = time.Now()
	r.entries[e] = struct{}{}
	return nil
}

// allowedBy tells whether the connection may stay under a plan.
func (e *entry) allowedBy(d *directory) bool { return e.allowed == nil || e.allowed(d) }

// kindOf is how a connection that was not taken in is told of.
func kindOf(err error) api.EventKind {
	switch {
	case errors.Is(err, errRevoked):
		return api.EventRevoked
	case errors.Is(err, errForbidden):
		return api.EventAccessDenied
	}
	return api.EventUnreachable
}

func (r *registry) remove(e *entry) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.entries, e)
}

func (r *registry) revoked(p party) bool { return r.check(p) != nil }

func (r *registry) check(p party) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.checkLocked(p)
}

func (r *registry) checkLocked(p party) error {
	for _, c := range []struct {
		what string
		set  map[string]bool
		one  string
	}{
		{"instance", r.instances, p.instance}, {"instance", r.instances, p.peerInstance},
		{"identity", r.identities, p.identity}, {"identity", r.identities, p.peerIdentity},
		{"certificate", r.serials, p.serial}, {"certificate", r.serials, p.peerSerial},
	} {
		if c.one != "" && c.set[c.one] {
			return fmt.Errorf("%s %s is %w since epoch %d", c.what, c.one, errRevoked, r.epoch)
		}
	}
	return nil
}

// cut puts an epoch in force and ends what matches. When it returns, nothing
// that matches is connected.
func (r *registry) cutEpoch(e plan.Epoch) api.Receipt {
	begin := time.Now()
	r.mu.Lock()
	if e.Number >= r.epoch {
		r.epoch = e.Number
		r.instances, r.identities, r.serials = set(e.Instances), set(e.Identities), set(e.Serials)
	}
	var hit []*entry
	for entry := range r.entries {
		if r.checkLocked(entry.party) != nil {
			hit = append(hit, entry)
			delete(r.entries, entry)
		}
	}
	number := r.epoch
	r.mu.Unlock()
	receipt := api.Receipt{Epoch: number, Instances: map[string]int{}}
	for _, e := range hit {
		if e.kind == kindFlow {
			receipt.Connections++
			receipt.Instances[e.instance]++
		}
	}
	end(hit)
	receipt.Micros = time.Since(begin).Microseconds()
	return receipt
}

// cutIf ends the flows for which f says so and returns how many. f is asked under
// the lock: it must be quick and not come back here.
func (r *registry) cutIf(f func(*entry) bool) (n int) {
	r.mu.Lock()
	var hit []*entry
	for e := range r.entries {
		if f(e) {
			hit = append(hit, e)
			delete(r.entries, e)
		}
	}
	r.mu.Unlock()
	end(hit)
	return len(hit)
}

// closeAll ends all connections, those that are still being made as well.
func (r *registry) closeAll() {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cutIf(func(*entry) bool { return true })
}

// freeze takes no connection in until thaw, and returns those there are.
func (r *registry) freeze() []*entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frozen = true
	return slices.Collect(maps.Keys(r.entries))
}

func (r *registry) thaw() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frozen = false
}

// inForce is the epoch, as it was told.
func (r *registry) inForce() plan.Epoch {
	r.mu.Lock()
	defer r.mu.Unlock()
	return plan.Epoch{Number: r.epoch, Instances: keys(r.instances), Identities: keys(r.identities), Serials: keys(r.serials)}
}

// sweep ends flows over which nothing has moved for long.
func (r *registry) sweep(now time.Time) {
	r.cutIf(func(e *entry) bool {
		if e.kind != kindFlow {
			return false
		}
		if moved := e.sent.Load() + e.received.Load(); moved != e.moved {
			e.moved, e.quiet = moved, now
		}
		return now.Sub(e.quiet) > flowIdle
	})
}

// end makes all entries carry no byte any more: HBONE connections first, as
// each stands for many, then the sockets at both ends. Their goroutines and
// descriptors go in the background.
func end(hit []*entry) {
	var links, flows []*entry
	for _, e := range hit {
		e.cut.Store(true)
		if e.kind == kindLink {
			links = append(links, e)
		} else {
			flows = append(flows, e)
		}
	}
	sever(links)
	half := len(flows) / 2 // a system call each: worth a second processor
	var wg sync.WaitGroup
	wg.Go(func() { sever(flows[:half]) })
	sever(flows[half:])
	wg.Wait()
	go func() {
		for _, e := range hit {
			e.close()
		}
	}()
}

func sever(all []*entry) {
	for _, e := range all {
		if e.sever != nil {
			e.sever()
		}
	}
}

func set(all []string) map[string]bool {
	m := make(map[string]bool, len(all))
	for _, s := range all {
		m[s] = true
	}
	return m
}

func keys(m map[string]bool) []string { return slices.Sorted(maps.Keys(m)) }

// all is every entry of the moment.
func (r *registry) all() []*entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Keys(r.entries))
}

// flows lists what is open.
func (r *registry) flows() (list []api.Flow, total int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for e := range r.entries {
		if e.kind != kindFlow {
			continue
		}
		if total++; len(list) < api.MaxFlows {
			list = append(list, api.Flow{Instance: e.instance, Direction: e.direction, Peer: e.peerIdentity, Serial: e.peerSerial,
				Address: e.address, Since: e.since, Sent: e.sent.Load(), Received: e.received.Load()})
		}
	}
	return list, total
}

// destination is where a workload wants to go outside the mesh.
type destination struct{ netip.AddrPort }

// sensitive destinations are the node's own, or nobody's business.
func (d destination) sensitive() bool {
	a := d.Addr()
	return a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() || ownAddress(a)
}
