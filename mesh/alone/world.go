package alone

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/route"
	"hauberk.dev/mesh/static"
	"hauberk.dev/mesh/transcode"
)

// world is a configuration made ready to serve. It never changes; a reload puts
// another in its place.
type world struct {
	config     *Config
	identities *identities // nil if none are handed over
	made       time.Time
	sites      map[string]*site // by listener
	at         map[string]*site // by Listener.key: a listener's name may move
	upstreams  map[string]*upstream
	endpoints  map[string]*endpoint // by upstream, address and what is spoken
	actions    []*action
	dirs       []*static.Dir
	log        *accessLog
	records    *records // nil: no collector is told of requests
	traces     *tracing // nil: requests are not followed

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
	calls []*callRoute
	tls   *serverTLS
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
	global   [][]counted
	schema   *transcode.Schema
	bolt     *transcode.Service
	toJSON   bool // calls become requests, by schema
	loose    bool // paths, as those of the host
	stats    *routeStats
	hedge    *balance.Hedger // nil: nothing is asked twice

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

// drops says whether a field is not passed on. Servers that make variables of names
// take an underscore for a hyphen.
func (e *edits) drops(name []byte) bool {
	for _, d := range e.drop {
		if len(name) == len(d) && hyphenated(name, d) {
			return true
		}
	}
	return false
}

// newWorld makes a configuration ready. What the one before knows of endpoints
// and routes that stay is kept.
func newWorld(c *Config, before *world, stats *stats, from *identities) (*world, error) {
	w := &world{config: c, identities: from, made: time.Now(), sites: map[string]*site{}, at: map[string]*site{}, upstreams: map[string]*upstream{}, endpoints: map[string]*endpoint{}}
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
		if err := w.site(&c.Listeners[i], stats); err != nil {
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
	if w.records, err = openRecords(c.AccessLog.Collector, stats); err != nil {
		return nil, err
	}
	if w.traces, err = openTraces(c.Traces, stats); err != nil {
		return nil, fmt.Errorf("traces: %w", err)
	}
	if before != nil {
		w.keepLimits(before)
	}
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
	if w.records != nil {
		w.records.stop()
	}
	if w.traces != nil {
		w.traces.stop()
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
		t, err := newUpstreamTLS(*c, w.identities)
		if err != nil {
			return fmt.Errorf("upstream %s: %w", c.Name, err)
		}
		u.tls, u.speaks = t, t.rules
	}
	u.speaks = c.Protocol + " " + u.speaks
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

func (w *world) site(l *Listener, stats *stats) error {
	s := &site{world: w, l: l, tcp: w.upstreams[l.Upstream]}
	if l.TLS != nil {
		t, err := newServerTLS(l, w.identities)
		if err != nil {
			return fmt.Errorf("listener %s: %w", l.Name, err)
		}
		s.tls = t
	}
	for _, n := range l.Names {
		h := &route.Host[*upstream]{Rules: []route.Rule[*upstream]{{Then: w.upstreams[n.Upstream]}}}
		for _, name := range n.Names {
			if err := s.names.Add(name, h); err != nil {
				return fmt.Errorf("listener %s: %w", l.Name, err)
			}
		}
	}
	w.calls(s, stats)
	w.sites[l.Name], w.at[l.key()] = s, s
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
		a.name, a.loose = c.label(i), h.Loose
		a.stats = stats.route(a.name)
		if r.Hedge != nil {
			if a.hedge, err = a.stats.hedger(r.Hedge); err != nil {
				return fmt.Errorf("host %s: route %d: %w", c.Names[0], i, err)
			}
		}
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

// label is what a route is called.
func (c *Host) label(i int) string {
	if name := c.Routes[i].Name; name != "" {
		return name
	}
	return fmt.Sprintf("%s/%d", c.Names[0], i)
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
	if r.Transcode != nil && r.Transcode.Bolt != nil {
		a.bolt = r.Transcode.Bolt.service()
	} else if r.Transcode != nil {
		if a.schema, err = r.Transcode.schema(); err != nil {
			return nil, err
		}
		a.toJSON = r.Transcode.To == toJSON
	}
	if a.global, err = compileGlobal(r.GlobalRate); err != nil {
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
	return drawn(a.shares, a.total)
}

// routeStats counts what a route has done. It survives reloads.
type routeStats struct {
	name     string
	statuses [6]atomic.Uint64 // by class; 0 for none
	received atomic.Uint64
	sent     atomic.Uint64
	retries  atomic.Uint64
	limited  atomic.Uint64
	hedge    atomic.Pointer[balance.Hedger]
	took     [len(bounds) + 1]atomic.Uint64
	micros   atomic.Uint64

	hedged          atomic.Uint64 // second tries
	hedgesWon       atomic.Uint64 // of them, such whose answer was passed on
	hedgesCancelled atomic.Uint64 // tries that nobody needed any more
}

// hedger is what decides of second tries. What it knows survives a reload that
// leaves its rules as they are.
func (s *routeStats) hedger(h *Hedge) (*balance.Hedger, error) {
	policy, err := h.policy()
	if err != nil {
		return nil, err
	}
	x := s.hedge.Load()
	if x == nil || x.Policy() != *policy {
		x = balance.NewHedger(*policy)
		s.hedge.Store(x)
	}
	return x, nil
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

// limiters are those of all routes.
func (w *world) limiters() map[string]*limiter {
	all := map[string]*limiter{}
	for key, at := range w.limits() {
		all[key] = *at
	}
	return all
}

// limits is where limiters are, by what they are called: a name, and which of those
// that share it.
func (w *world) limits() map[string]**limiter {
	all := map[string]**limiter{}
	put := func(kind, name string, l **limiter) {
		if *l == nil {
			return
		}
		for n := 1; ; n++ {
			if key := fmt.Sprintf("%s %s %d", kind, name, n); all[key] == nil {
				all[key] = l
				return
			}
		}
	}
	for _, a := range w.actions {
		put("route", a.name, &a.limit)
	}
	for i := range w.config.Listeners {
		for _, c := range w.sites[w.config.Listeners[i].Name].calls {
			put("call", c.name, &c.limit)
		}
	}
	return all
}

// keepLimits has rates that stay go on with the buckets they have.
func (w *world) keepLimits(before *world) {
	had := before.limiters()
	for key, at := range w.limits() {
		if l, now := had[key], *at; l != nil && l.rate == now.rate && l.burst == now.burst && l.each == now.each {
			*at = l
		}
	}
}
