package alone

import (
	"crypto/tls"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/route"
	"hauberk.dev/mesh/static"
)

// world is a configuration made ready to serve. It never changes; a reload puts
// another in its place.
type world struct {
	config    *Config
	made      time.Time
	sites     map[string]*site // by listener
	at        map[string]*site // by address: a listener's name may move
	upstreams map[string]*upstream
	endpoints map[string]*endpoint // by upstream, address and what is spoken
	actions   []*action
	dirs      []*static.Dir
	log       *accessLog

	users   atomic.Int64 // requests and connections it serves
	retired atomic.Pointer[world]
	gone    atomic.Bool
}

// enter takes the world in force, so that it stays until leave.
func (p *Proxy) enter() *world {
	for {
		w := p.world.Load()
		w.users.Add(1)
		if p.world.Load() == w {
			return w
		}
		w.leave()
	}
}

func (w *world) leave() {
	if w.users.Add(-1) == 0 {
		w.end()
	}
}

// retire says that next has taken the place of w.
func (w *world) retire(next *world) {
	w.retired.Store(next)
	if w.users.Load() == 0 {
		w.end()
	}
}

func (w *world) end() {
	if next := w.retired.Load(); next != nil && w.gone.CompareAndSwap(false, true) {
		w.close(next)
	}
}

// site is what one listener serves.
type site struct {
	world *world
	l     *Listener
	hosts route.Table[*action]
	names route.Table[*upstream]
	tcp   *upstream
	tls   *tls.Config
	certs *certificates
}

// action is what a route does, compiled.
type action struct {
	name   string
	route  *Route
	shares []share
	total  int

	rewrite  *route.Template
	redirect *route.Template
	toServer edits
	toClient edits
	static   *static.Dir
	mirror   *upstream
	limit    *limiter
	stats    *routeStats

	attempts int
	statuses []int
}

type share struct {
	up     *upstream
	weight int
}

// edits are changes to header fields, compiled.
type edits struct {
	drop []string // set, or removed
	add  []edit
}

type edit struct {
	name  string
	value *route.Template
}

func (e *edits) drops(name []byte) bool {
	for _, d := range e.drop {
		if equalFold(name, d) {
			return true
		}
	}
	return false
}

// newWorld makes a configuration ready. What the one before knows of endpoints
// and routes that stay is kept.
func newWorld(c *Config, before *world, stats *stats) (*world, error) {
	w := &world{config: c, made: time.Now(), sites: map[string]*site{}, at: map[string]*site{}, upstreams: map[string]*upstream{}, endpoints: map[string]*endpoint{}}
	ok := false
	defer func() {
		if !ok {
			w.close(before)
		}
	}()
	for i := range c.Upstreams {
		if err := w.upstream(&c.Upstreams[i], before); err != nil {
			return nil, err
		}
	}
	for i := range c.Listeners {
		if err := w.site(&c.Listeners[i]); err != nil {
			return nil, err
		}
	}
	for i := range c.Hosts {
		if err := w.host(&c.Hosts[i], stats); err != nil {
			return nil, err
		}
	}
	log, err := openLog(c.AccessLog)
	if err != nil {
		return nil, err
	}
	w.log = log
	ok = true
	return w, nil
}

// close lets go of everything but what next still uses.
func (w *world) close(next *world) {
	for address, e := range w.endpoints {
		if next == nil || next.endpoints[address] != e {
			e.shut()
		}
	}
	for _, d := range w.dirs {
		d.Close()
	}
	if w.log != nil {
		w.log.close()
	}
}

func (w *world) upstream(c *Upstream, before *world) error {
	u := &upstream{name: c.Name, config: *c, clock: balance.NewClock()}
	if before != nil && before.upstreams[c.Name] != nil {
		u.set, u.clock = before.upstreams[c.Name].set, before.upstreams[c.Name].clock
	} else {
		set, err := balance.New(*c.policy, rand.Uint64)
		if err != nil {
			return fmt.Errorf("upstream %s: %w", c.Name, err)
		}
		u.set = set
	}
	if c.TLS != nil {
		cfg, rules, err := c.TLS.config(c.Endpoints)
		if err != nil {
			return fmt.Errorf("upstream %s: %w", c.Name, err)
		}
		u.tls, u.speaks = cfg, rules
	}
	for _, ce := range c.Endpoints {
		// Connections are shared by those who speak the same way only.
		key := fmt.Sprintf("%s %s %s", c.Name, ce.Address, u.speaks)
		e := w.endpoints[key]
		if e == nil && before != nil {
			e = before.endpoints[key]
		}
		if e == nil {
			e = &endpoint{address: ce.Address, speaks: u.speaks}
		}
		w.endpoints[key] = e
		u.endpoints = append(u.endpoints, e)
	}
	w.upstreams[c.Name] = u
	return nil
}

// commit puts the endpoints in force; what could fail was tried before.
func (w *world) commit() error {
	for _, u := range w.upstreams {
		u.probes()
		if err := u.commit(); err != nil {
			return fmt.Errorf("upstream %s: %w", u.name, err)
		}
	}
	return nil
}

func (w *world) site(l *Listener) error {
	s := &site{world: w, l: l, tcp: w.upstreams[l.Upstream]}
	if l.TLS != nil {
		certs, err := newCertificates(l.TLS.Certificates)
		if err != nil {
			return fmt.Errorf("listener %s: %w", l.Name, err)
		}
		s.certs = certs
		s.tls = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certs.pick}
		if l.TLS.MinVersion == "1.3" {
			s.tls.MinVersion = tls.VersionTLS13
		}
		if l.Protocol == "http" {
			s.tls.NextProtos = []string{"http/1.1"}
		}
	}
	for _, n := range l.Names {
		h := &route.Host[*upstream]{Rules: []route.Rule[*upstream]{{Then: w.upstreams[n.Upstream]}}}
		for _, name := range n.Names {
			if err := s.names.Add(name, h); err != nil {
				return fmt.Errorf("listener %s: %w", l.Name, err)
			}
		}
	}
	w.sites[l.Name], w.at[l.Address] = s, s
	return nil
}

func (w *world) host(c *Host, stats *stats) error {
	h := &route.Host[*action]{Loose: c.Paths == "loose"}
	for i := range c.Routes {
		r := &c.Routes[i]
		a, err := w.action(r)
		if err != nil {
			return fmt.Errorf("host %s: route %d: %w", c.Names[0], i, err)
		}
		if a.name = r.Name; a.name == "" {
			a.name = fmt.Sprintf("%s/%d", c.Names[0], i)
		}
		a.stats = stats.route(a.name)
		w.actions = append(w.actions, a)
		h.Rules = append(h.Rules, route.Rule[*action]{Match: r.match, Then: a})
	}
	on := c.Listeners
	if len(on) == 0 {
		for name, s := range w.sites {
			if s.l.Protocol == "http" {
				on = append(on, name)
			}
		}
	}
	for _, l := range on {
		for _, name := range c.Names {
			if err := w.sites[l].hosts.Add(name, h); err != nil {
				return fmt.Errorf("listener %s: %w", l, err)
			}
		}
	}
	return nil
}

func (w *world) action(r *Route) (*action, error) {
	a := &action{route: r, attempts: 1}
	if r.Upstream != "" {
		a.shares, a.total = []share{{w.upstreams[r.Upstream], 1}}, 1
	}
	for _, s := range r.Split {
		a.shares = append(a.shares, share{w.upstreams[s.Upstream], s.Weight})
		a.total += s.Weight
	}
	if r.Mirror != nil {
		a.mirror = w.upstreams[r.Mirror.Upstream]
	}
	if r.Retries != nil {
		a.attempts, a.statuses = r.Retries.Attempts, r.Retries.Statuses
	}
	if r.Rate != nil {
		a.limit = newLimiter(r.Rate)
	}
	var err error
	if r.Rewrite != "" {
		if a.rewrite, err = route.ParseTemplate(r.Rewrite); err != nil {
			return nil, err
		}
	}
	if r.Redirect != nil {
		if a.redirect, err = route.ParseTemplate(r.Redirect.To); err != nil {
			return nil, err
		}
	}
	if r.Static != nil {
		if a.static, err = static.Open(r.Static.Root, r.Static.Index, r.Static.Try); err != nil {
			return nil, err
		}
		w.dirs = append(w.dirs, a.static)
	}
	if a.toServer, err = compileEdit(r.RequestHeaders); err != nil {
		return nil, err
	}
	a.toClient, err = compileEdit(r.ResponseHeaders)
	return a, err
}

func compileEdit(e Edit) (out edits, err error) {
	out.drop = append(out.drop, e.Remove...)
	for i, m := range []map[string]string{e.Set, e.Add} {
		for name, value := range m {
			t, err := route.ParseTemplate(value)
			if err != nil {
				return out, err
			}
			out.add = append(out.add, edit{name: name, value: t})
			if i == 0 {
				out.drop = append(out.drop, name)
			}
		}
	}
	return out, nil
}

// choose picks the upstream of a request by the weights of the route.
func (a *action) choose() *upstream {
	if len(a.shares) == 1 {
		return a.shares[0].up
	}
	n := rand.IntN(a.total)
	for i := range a.shares {
		if n -= a.shares[i].weight; n < 0 {
			return a.shares[i].up
		}
	}
	return a.shares[0].up
}

// routeStats counts what a route has done. It survives reloads.
type routeStats struct {
	name     string
	statuses [6]atomic.Uint64 // by class; 0 for none
	received atomic.Uint64
	sent     atomic.Uint64
	retries  atomic.Uint64
	limited  atomic.Uint64
	took     [len(bounds) + 1]atomic.Uint64
	micros   atomic.Uint64
}

// bounds of the buckets of durations.
var bounds = [...]time.Duration{time.Millisecond / 2, time.Millisecond, 2 * time.Millisecond, 5 * time.Millisecond, 10 * time.Millisecond,
	25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second,
	5 * time.Second, 30 * time.Second}

func (s *routeStats) note(status int, received, sent int64, took time.Duration) {
	s.statuses[min(max(status/100, 0), 5)].Add(1)
	s.received.Add(uint64(received))
	s.sent.Add(uint64(sent))
	s.micros.Add(uint64(took.Microseconds()))
	i := 0
	for i < len(bounds) && took > bounds[i] {
		i++
	}
	s.took[i].Add(1)
}
