// Package alone is the proxy without a mesh: an HTTP and TCP load balancer told
// by one file, with sockets of its own.
//
// It routes requests by virtual host, path, method, header and query, ends TLS or
// passes it on by the name asked for, serves files, edits, compresses, limits and
// logs. It speaks HTTP/1; requests are read as strictly as those of the mesh
// (mesh/http1), so that the server behind sees the requests that were judged. It
// knows no identities and no plan, and starts no process.
package alone

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/balance"
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
	open     atomic.Int64 // connections of clients
	mirrors  atomic.Int64
	stopping atomic.Bool

	reloading sync.Mutex
	mu        sync.Mutex
	listeners map[string]*listener // by address
	conns     map[*client]struct{}
	ctx       context.Context // of Run
	checks    map[*balance.Set]func()
	admin     net.Listener
	running   sync.WaitGroup // accept loops and the like
	serving   sync.WaitGroup // connections
}

// client is a connection that can be ended from outside.
type client struct {
	conn    net.Conn
	session atomic.Pointer[session] // once it speaks HTTP
}

// Open opens every socket the configuration names. Nothing is served before Run.
func Open(c *Config, log *slog.Logger) (*Proxy, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	p := &Proxy{log: log, stats: newStats(), listeners: map[string]*listener{}, conns: map[*client]struct{}{},
		checks: map[*balance.Set]func(){}}
	w, err := newWorld(c, nil, p.stats)
	if err != nil {
		return nil, err
	}
	added, err := p.listen(w)
	if err != nil {
		w.close(nil)
		return nil, err
	}
	for _, l := range added {
		p.listeners[l.address] = l
	}
	if c.Admin != "" {
		if p.admin, err = listenAdmin(c.Admin); err != nil {
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
	p.world.Store(w)
	p.stats.generation.Store(1)
	return p, nil
}

// Close closes the sockets of a proxy that is not run.
func (p *Proxy) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, l := range p.listeners {
		l.ln.Close()
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
			return l.ln.Addr()
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
	if p.admin != nil {
		p.running.Go(func() { p.serveAdmin(inner) })
	}
	<-ctx.Done()
	p.stop(cancel)
	return nil
}

// stop ends everything: first what nobody waits for, last what takes too long.
func (p *Proxy) stop(cancel func()) {
	p.reloading.Lock() // a reload beside it would open listeners that nobody closes
	p.stopping.Store(true)
	p.reloading.Unlock()
	p.Close()
	w := p.world.Load()
	patience := time.Duration(w.config.Limits.StopTimeout)
	p.eachClient(func(c *client) {
		if s := c.session.Load(); s != nil && s.state.CompareAndSwap(idle, stopped) {
			c.conn.Close()
		}
	})
	done := make(chan struct{})
	go func() { p.serving.Wait(); close(done) }()
	late := time.NewTimer(patience)
	defer late.Stop()
	select {
	case <-done:
	case <-late.C:
		p.log.Warn("connections did not end in time: cut", "open", p.open.Load(), "stop_timeout", patience)
	}
	cancel()
	p.eachClient(func(c *client) { c.conn.Close() })
	<-done
	p.running.Wait()
	w.retire(&world{})
}

func (p *Proxy) eachClient(f func(*client)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		f(c)
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
	before := p.world.Load()
	if c.Admin != before.config.Admin {
		return fmt.Errorf("reload: admin cannot change from %q to %q while running; restart for that", before.config.Admin, c.Admin)
	}
	w, err := newWorld(c, before, p.stats)
	if err != nil {
		return fmt.Errorf("reload: %w", err)
	}
	added, err := p.listen(w)
	if err != nil {
		w.close(before)
		return fmt.Errorf("reload: %w", err)
	}
	if err := w.commit(); err != nil {
		p.log.Error("put endpoints in force", "err", err)
	}
	p.world.Store(w)
	p.mu.Lock()
	p.checkLocked(w)
	keep := map[string]bool{}
	for i := range c.Listeners {
		keep[c.Listeners[i].Address] = true
		if l := p.listeners[c.Listeners[i].Address]; l != nil {
			l.use(w.sites[c.Listeners[i].Name])
		}
	}
	for address, l := range p.listeners {
		if !keep[address] {
			l.ln.Close()
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
			for name, s := range w.sites {
				if s.certs != nil {
					s.certs.refresh(p.log, name)
				}
			}
			w.leave()
		}
	}
}
