// Package alone is the proxy without a mesh: an HTTP, TCP and UDP load balancer told
// by one file, with sockets of its own.
//
// It routes requests by virtual host, path, method, header and query, and calls of
// SOFABolt and Dubbo by service and method; it ends TLS or passes it on by the name
// asked for, serves files, stores answers, edits, compresses, limits and logs. A
// request of HTTP/2 is served by a session of its own in the words of HTTP/1; those
// are read as strictly as in the mesh (mesh/http1), so that the server behind sees
// the requests that were judged. It knows no plan, and starts no process.
package alone

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/internal/unixsock"
	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/cache"
)

const (
	sweepPeriod  = 5 * time.Second // idle connections, changed certificates
	upstreamIdle = 60 * time.Second
)

// Proxy serves a configuration.
type Proxy struct {
	log      *slog.Logger
	world    atomic.Pointer[world]
	stats    *stats
	cache    *cache.Store
	collapse time.Duration // to wait for the answer to another's request
	open     atomic.Int64  // connections of clients
	mirrors  atomic.Int64
	held     holding // calls of bolt and Dubbo
	answers  holding // to them: clients cannot use up the one by the other
	hands    hands

	identities *identities // nil if none are handed over
	stopping   atomic.Bool
	leaving    atomic.Bool   // another process has taken this one's place
	handed     chan struct{} // closed then

	callPatience time.Duration // for the end of a call that may be tried twice
	met          func()        // a test's, with a connection that is not served yet

	reloading sync.Mutex
	mu        sync.Mutex
	listeners map[string]*listener // by address
	conns     map[*client]struct{}
	ctx       context.Context // of Run
	checks    map[*balance.Set]func()
	admin     *net.UnixListener
	door      *net.UnixListener // of GiveOver
	line      *line             // to the process that takes over, once one does
	told      tallies           // on it
	before    *line             // to the one whose place this one has taken
	accepting sync.WaitGroup    // accept loops: after them nothing is added to serving
	running   sync.WaitGroup    // these and the like
	serving   sync.WaitGroup    // connections
}

// client is a connection that can be ended from outside.
type client struct {
	l       *listener
	conn    net.Conn
	session atomic.Pointer[session] // once it speaks HTTP/1
	two     atomic.Pointer[multiplex]
	rpc     atomic.Pointer[rpcClient]
	stream  atomic.Pointer[passage] // of bytes that can go on elsewhere
}

// Open opens every socket the configuration names. Nothing is served before Run.
func Open(c *Config, log *slog.Logger) (*Proxy, error) {
	p, err := prepare(c, log)
	if err != nil {
		return nil, err
	}
	w := p.world.Load()
	added, err := p.listen(w, nil)
	if err != nil {
		w.close(nil)
		return nil, err
	}
	for _, l := range added {
		p.listeners[l.address] = l
	}
	if c.Admin != "" {
		if p.admin, err = unixsock.ListenStream(c.Admin); err != nil {
			p.Close()
			w.close(nil)
			return nil, err
		}
	}
	if err := w.commit(); err != nil {
		p.Close()
		w.close(nil)
		return nil, err
	}
	p.stats.generation.Store(1)
	return p, nil
}

// prepare makes a proxy that has no socket yet.
func prepare(c *Config, log *slog.Logger) (*Proxy, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Proxy{log: log, stats: newStats(), cache: cache.New(int64(c.Cache.Memory)), collapse: maxCollapse, listeners: map[string]*listener{}, conns: map[*client]struct{}{},
		checks: map[*balance.Set]func(){}, handed: make(chan struct{})}
	p.held.most, p.answers.most, p.callPatience = maxRPCHeld, maxRPCHeld, callPatience
	if c.Identities != "" {
		p.identities = newIdentities(c.Identities, log)
	}
	w, err := newWorld(c, nil, p.stats, p.identities)
	if err != nil {
		return nil, err
	}
	p.world.Store(w)
	return p, nil
}

// Close closes the sockets of a proxy that is not run.
func (p *Proxy) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.listeners {
		l.close()
	}
	if p.admin != nil {
		p.admin.Close()
	}
	return nil
}

// Address is where a listener serves, nil if there is none of that name.
func (p *Proxy) Address(name string) net.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.listeners {
		if l.name() == name {
			return l.addr()
		}
	}
	return nil
}

// Run serves until ctx ends, then lets requests under way end in the time the
// configuration gives them.
func (p *Proxy) Run(ctx context.Context) error {
	inner, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	p.mu.Lock()
	p.ctx = inner
	p.checkLocked(p.world.Load())
	for _, l := range p.listeners {
		p.serveLocked(l)
	}
	p.mu.Unlock()
	p.running.Go(func() { p.sweep(inner) })
	if p.identities != nil {
		p.running.Go(func() { p.identities.run(inner) })
	}
	if p.admin != nil {
		p.running.Go(func() { p.serveAdmin(inner) })
	}
	if p.before != nil {
		p.serving.Go(func() { p.listenTo(inner, p.before) })
	}
	patience := p.Patience
	select {
	case <-ctx.Done():
	case <-p.handed:
		if !p.drain(ctx) && ctx.Err() == nil {
			patience = func() time.Duration { return 0 } // they have had their time
		}
	}
	p.stop(cancel, patience())
	if p.leaving.Load() {
		p.report()
		p.line.conn.Close()
	}
	return nil
}

// stop ends everything: first what nobody waits for, last what takes too long.
func (p *Proxy) stop(cancel func(), patience time.Duration) {
	p.reloading.Lock() // a reload beside it would open listeners that nobody closes
	p.stopping.Store(true)
	p.reloading.Unlock()
	p.Close()
	p.accepting.Wait() // for connections that they had and eachClient has not
	if p.before != nil {
		p.before.conn.Close() // what it has left ends there
	}
	p.eachDatagrams((*datagrams).endAll)
	w := p.world.Load()
	p.eachClient(func(c *client) { c.dismiss() })
	done := make(chan struct{})
	go func() { p.serving.Wait(); close(done) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
		p.log.Warn("connections did not end in time: cut", "open", p.open.Load())
	}
	cancel()
	p.eachClient(func(c *client) { c.conn.Close() })
	<-done
	p.running.Wait()
	p.hands.close()
	w.retire(&world{})
	p.stats.telling.Wait() // for a short while at most
}

// dismiss has a client's connection end when its requests have.
func (c *client) dismiss() {
	if s := c.session.Load(); s != nil && s.state.CompareAndSwap(idle, stopped) {
		c.conn.Close()
	}
	if x := c.two.Load(); x != nil {
		x.conn.Drain()
	}
	if x := c.rpc.Load(); x != nil {
		x.leave()
	}
}

func (p *Proxy) eachClient(f func(*client)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		f(c)
	}
}

func (p *Proxy) eachDatagrams(f func(*datagrams)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.listeners {
		if l.udp != nil {
			f(l.udp)
		}
	}
}

// Reload serves another configuration from the next request on. If it cannot,
// everything stays as it is.
func (p *Proxy) Reload(c *Config) (err error) {
	defer func() {
		if err != nil {
			p.stats.badReloads.Add(1)
		}
	}()
	p.reloading.Lock()
	defer p.reloading.Unlock()
	if p.stopping.Load() {
		return errors.New("reload: the proxy is stopping")
	}
	if p.leaving.Load() {
		return errors.New("reload: another process has taken this one's place")
	}
	before := p.world.Load()
	if c.Admin != before.config.Admin {
		return fmt.Errorf("reload: admin cannot change from %q to %q while running; restart for that", before.config.Admin, c.Admin)
	}
	if c.Identities != before.config.Identities {
		return fmt.Errorf("reload: identities cannot change from %q to %q while running; restart for that", before.config.Identities, c.Identities)
	}
	w, err := newWorld(c, before, p.stats, p.identities)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	added, err := p.listen(w, nil)
	if err != nil {
		w.close(before)
		return fmt.Errorf("reload: %w", err)
	}
	if err := w.commit(); err != nil {
		p.log.Error("put endpoints in force", "err", err)
	}
	p.world.Store(w)
	p.cache.Resize(int64(c.Cache.Memory))
	p.mu.Lock()
	p.checkLocked(w)
	keep := map[string]bool{}
	var gone []*listener
	for i := range c.Listeners {
		key := c.Listeners[i].key()
		keep[key] = true
		if l := p.listeners[key]; l != nil {
			l.use(w.sites[c.Listeners[i].Name])
			if l.udp != nil {
				l.udp.settle()
			}
		}
	}
	for address, l := range p.listeners {
		if !keep[address] {
			l.close()
			l.gone.Store(true)
			gone = append(gone, l)
			delete(p.listeners, address)
		}
	}
	for _, l := range added {
		p.listeners[l.address] = l
		if p.ctx != nil { // else Run does
			p.serveLocked(l)
		}
	}
	p.mu.Unlock()
	// Nobody is served by what is not configured any more.
	p.eachClient(func(c *client) {
		if slices.Contains(gone, c.l) {
			c.dismiss()
		}
	})
	before.retire(w)
	p.stats.generation.Add(1)
	return nil
}

// Refused counts a configuration that could not be read.
func (p *Proxy) Refused() { p.stats.badReloads.Add(1) }

// Patience is how long requests under way have to end when the proxy stops.
func (p *Proxy) Patience() time.Duration {
	return time.Duration(p.world.Load().config.Limits.StopTimeout)
}

// checkLocked runs the checks of the upstreams there are, and of no others.
func (p *Proxy) checkLocked(w *world) {
	now := map[*balance.Set]bool{}
	for _, u := range w.upstreams {
		now[u.set] = true
		if p.checks[u.set] != nil || p.ctx == nil {
			continue
		}
		ctx, cancel := context.WithCancel(p.ctx)
		p.checks[u.set] = cancel
		p.running.Go(func() { u.check(ctx) })
	}
	for set, cancel := range p.checks {
		if !now[set] {
			cancel()
			delete(p.checks, set)
		}
	}
}

// sweep closes what has been idle for long and reads changed certificates.
func (p *Proxy) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			w := p.enter()
			for _, e := range w.endpoints {
				e.sweep(now.Add(-upstreamIdle))
			}
			p.hands.sweep()
			p.eachDatagrams((*datagrams).sweep)
			p.eachClient(func(c *client) {
				if x := c.two.Load(); x != nil && x.idle(now.Add(-c.l.patience())) {
					x.conn.Drain()
				}
			})
			p.refresh(w)
			w.leave()
		case <-p.identities.news():
			w := p.enter()
			p.refresh(w)
			w.leave()
		}
	}
}

// refresh puts certificates and authorities in force that are others now.
func (p *Proxy) refresh(w *world) {
	for _, u := range w.upstreams {
		if u.tls != nil && u.tls.refresh(p.log) {
			u.renew()
		}
	}
	for name, s := range w.sites {
		if s.tls != nil {
			s.tls.refresh(p.log, name)
		}
	}
	if w.identities != nil {
		w.identities.watch(w, time.Now())
	}
}
