package alone

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// maxRouteStats bounds the routes whose counts are kept over reloads.
const maxRouteStats = 10_000

// stats are counts that survive reloads.
type stats struct {
	generation atomic.Uint64
	badReloads atomic.Uint64
	mirrored   atomic.Uint64
	unmirrored atomic.Uint64
	unjudged   atomic.Uint64  // requests the rate service gave no answer to
	untraced   atomic.Uint64  // calls whose trace could not be carried on
	recorded   atomic.Uint64  // requests that a collector was told of
	unrecorded atomic.Uint64  // and that it was not, for want of room or of a collector
	telling    sync.WaitGroup // to collectors, of this world and of those before
	other      *routeStats    // requests no route was found for

	mu     sync.Mutex
	routes map[string]*routeStats
}

func newStats() *stats {
	return &stats{other: &routeStats{name: "none"}, routes: map[string]*routeStats{}}
}

// route is where a route of that name counts.
func (s *stats) route(name string) *routeStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.routes[name]
	if r == nil {
		if len(s.routes) >= maxRouteStats {
			return s.other
		}
		r = &routeStats{name: name}
		s.routes[name] = r
	}
	return r
}

// metrics is everything counted, in the text format of Prometheus.
func (p *Proxy) metrics() []byte {
	var b strings.Builder
	head := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	head("hauberk_proxy_generation", "gauge", "Configurations put in force since the start.")
	fmt.Fprintf(&b, "hauberk_proxy_generation %d\n", p.stats.generation.Load())
	head("hauberk_proxy_reloads_refused_total", "counter", "Configurations that were refused.")
	fmt.Fprintf(&b, "hauberk_proxy_reloads_refused_total %d\n", p.stats.badReloads.Load())
	head("hauberk_proxy_mirrored_total", "counter", "Requests copied, and those that were not for want of room.")
	fmt.Fprintf(&b, "hauberk_proxy_mirrored_total{outcome=\"sent\"} %d\nhauberk_proxy_mirrored_total{outcome=\"dropped\"} %d\n",
		p.stats.mirrored.Load(), p.stats.unmirrored.Load())
	head("hauberk_proxy_rate_unanswered_total", "counter", "Requests that the rate service gave no answer to.")
	fmt.Fprintf(&b, "hauberk_proxy_rate_unanswered_total %d\n", p.stats.unjudged.Load())
	p.cacheMetrics(&b, head)
	p.identities.metrics(&b, head, time.Now())
	w := p.enter()
	defer w.leave()
	if w.log != nil {
		head("hauberk_proxy_log_dropped_total", "counter", "Lines of the access log that were dropped.")
		fmt.Fprintf(&b, "hauberk_proxy_log_dropped_total %d\n", w.log.dropped.Load())
	}
	if w.records != nil {
		head("hauberk_proxy_log_records_total", "counter", "Records of the access log told to the collector, and dropped ones.")
		fmt.Fprintf(&b, "hauberk_proxy_log_records_total{outcome=\"sent\"} %d\nhauberk_proxy_log_records_total{outcome=\"dropped\"} %d\n", p.stats.recorded.Load(), p.stats.unrecorded.Load())
	}
	if w.traces != nil {
		p.traceMetrics(&b, head, w.traces)
	}
	p.listenerMetrics(&b, head)
	p.routeMetrics(&b, head)
	w.endpointMetrics(&b, head)
	return []byte(b.String())
}

func (p *Proxy) traceMetrics(b *strings.Builder, head func(name, kind, help string), t *tracing) {
	head("hauberk_proxy_untraced_calls_total", "counter", "Calls whose trace could not be read or written.")
	fmt.Fprintf(b, "hauberk_proxy_untraced_calls_total %d\n", p.stats.untraced.Load())
	if t.exporter == nil {
		return
	}
	sent, dropped := t.exporter.Counts()
	head("hauberk_proxy_spans_total", "counter", "Spans told to the collector, and dropped ones.")
	fmt.Fprintf(b, "hauberk_proxy_spans_total{outcome=\"sent\"} %d\nhauberk_proxy_spans_total{outcome=\"dropped\"} %d\n", sent, dropped)
}

func (p *Proxy) listenerMetrics(b *strings.Builder, head func(name, kind, help string)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := make([]string, 0, len(p.listeners))
	var udp []*listener
	for address, l := range p.listeners {
		if l.udp != nil {
			udp = append(udp, l)
			continue
		}
		names = append(names, address)
	}
	slices.Sort(names)
	slices.SortFunc(udp, func(a, b *listener) int { return strings.Compare(a.address, b.address) })
	datagramMetrics(b, head, udp)
	for _, m := range []struct {
		name, kind, help string
		read             func(*listener) int64
	}{
		{"hauberk_proxy_connections", "gauge", "Connections open.", func(l *listener) int64 { return l.open.Load() }},
		{"hauberk_proxy_connections_total", "counter", "Connections accepted.", func(l *listener) int64 { return int64(l.accepted.Load()) }},
		{"hauberk_proxy_connections_refused_total", "counter", "Connections over the limit.", func(l *listener) int64 { return int64(l.refused.Load()) }},
		{"hauberk_proxy_connections_failed_total", "counter", "Connections whose beginning failed.", func(l *listener) int64 { return int64(l.failed.Load()) }},
	} {
		head(m.name, m.kind, m.help)
		for _, address := range names {
			l := p.listeners[address]
			fmt.Fprintf(b, "%s{listener=%q} %d\n", m.name, l.name(), m.read(l))
		}
	}
}

func datagramMetrics(b *strings.Builder, head func(name, kind, help string), all []*listener) {
	for _, m := range []struct {
		name, kind, help string
		read             func(*datagrams) int64
	}{
		{"hauberk_proxy_udp_sessions", "gauge", "Sessions of UDP.", func(d *datagrams) int64 { return d.open.Load() }},
		{"hauberk_proxy_udp_sessions_total", "counter", "Sessions of UDP begun.", func(d *datagrams) int64 { return int64(d.begun.Load()) }},
		{"hauberk_proxy_udp_sessions_displaced_total", "counter", "Sessions that ended to make room for others.", func(d *datagrams) int64 { return int64(d.displaced.Load()) }},
		{"hauberk_proxy_udp_sessions_moved_total", "counter", "Sessions that left an endpoint which was not well.", func(d *datagrams) int64 { return int64(d.moved.Load()) }},
		{"hauberk_proxy_udp_received_total", "counter", "Datagrams of clients.", func(d *datagrams) int64 { return int64(d.received.Load()) }},
		{"hauberk_proxy_udp_sent_total", "counter", "Datagrams sent to clients.", func(d *datagrams) int64 { return int64(d.sent.Load()) }},
		{"hauberk_proxy_udp_dropped_total", "counter", "Datagrams that could not be passed on, either way.", func(d *datagrams) int64 { return int64(d.dropped.Load()) }},
	} {
		head(m.name, m.kind, m.help)
		for _, l := range all {
			fmt.Fprintf(b, "%s{listener=%q} %d\n", m.name, l.name(), m.read(l.udp))
		}
	}
}

func (p *Proxy) cacheMetrics(b *strings.Builder, head func(name, kind, help string)) {
	c := p.cache.Counts()
	head("hauberk_proxy_cache_bytes", "gauge", "Bytes of stored answers.")
	fmt.Fprintf(b, "hauberk_proxy_cache_bytes %d\n", c.Bytes)
	head("hauberk_proxy_cache_entries", "gauge", "Stored answers.")
	fmt.Fprintf(b, "hauberk_proxy_cache_entries %d\n", c.Entries)
	head("hauberk_proxy_cache_total", "counter", "What became of looks at stored answers, and of these.")
	for _, r := range []struct {
		name string
		n    uint64
	}{{"hit", c.Hits}, {"stale", c.Stale}, {"miss", c.Misses}, {"revalidated", c.Revalidated}, {"stored", c.Stored}, {"evicted", c.Evicted}, {"collapsed", c.Collapsed}} {
		fmt.Fprintf(b, "hauberk_proxy_cache_total{event=%q} %d\n", r.name, r.n)
	}
}

func (p *Proxy) routeMetrics(b *strings.Builder, head func(name, kind, help string)) {
	p.stats.mu.Lock()
	all := []*routeStats{p.stats.other}
	for _, r := range p.stats.routes {
		all = append(all, r)
	}
	p.stats.mu.Unlock()
	slices.SortFunc(all, func(a, b *routeStats) int { return strings.Compare(a.name, b.name) })
	head("hauberk_proxy_requests_total", "counter", "Requests by route and class of status.")
	for _, r := range all {
		for class := range r.statuses {
			if n := r.statuses[class].Load(); n > 0 {
				fmt.Fprintf(b, "hauberk_proxy_requests_total{route=%q,status=\"%dxx\"} %d\n", r.name, class, n)
			}
		}
	}
	for _, m := range []struct {
		name, help string
		read       func(*routeStats) uint64
	}{
		{"hauberk_proxy_received_bytes_total", "Bytes of request bodies.", func(r *routeStats) uint64 { return r.received.Load() }},
		{"hauberk_proxy_sent_bytes_total", "Bytes of answers.", func(r *routeStats) uint64 { return r.sent.Load() }},
		{"hauberk_proxy_retries_total", "Requests sent again.", func(r *routeStats) uint64 { return r.retries.Load() }},
		{"hauberk_proxy_hedged_total", "Requests asked of another endpoint while the first was slow.", func(r *routeStats) uint64 { return r.hedged.Load() }},
		{"hauberk_proxy_hedges_won_total", "Answers of such second tries that were passed on.", func(r *routeStats) uint64 { return r.hedgesWon.Load() }},
		{"hauberk_proxy_hedges_cancelled_total", "Tries that were cancelled as another had been answered.", func(r *routeStats) uint64 { return r.hedgesCancelled.Load() }},
		{"hauberk_proxy_limited_total", "Requests over the rate.", func(r *routeStats) uint64 { return r.limited.Load() }},
	} {
		head(m.name, "counter", m.help)
		for _, r := range all {
			fmt.Fprintf(b, "%s{route=%q} %d\n", m.name, r.name, m.read(r))
		}
	}
	head("hauberk_proxy_request_seconds", "histogram", "Time from the first byte of a request to the last of its answer.")
	for _, r := range all {
		total := uint64(0)
		for i, le := range bounds {
			total += r.took[i].Load()
			fmt.Fprintf(b, "hauberk_proxy_request_seconds_bucket{route=%q,le=\"%g\"} %d\n", r.name, le.Seconds(), total)
		}
		total += r.took[len(bounds)].Load()
		fmt.Fprintf(b, "hauberk_proxy_request_seconds_bucket{route=%q,le=\"+Inf\"} %d\n", r.name, total)
		fmt.Fprintf(b, "hauberk_proxy_request_seconds_sum{route=%q} %g\nhauberk_proxy_request_seconds_count{route=%q} %d\n",
			r.name, float64(r.micros.Load())/1e6, r.name, total)
	}
}

func (w *world) endpointMetrics(b *strings.Builder, head func(name, kind, help string)) {
	type row struct {
		upstream string
		e        *endpoint
	}
	var rows []row
	head("hauberk_proxy_upstream_up", "gauge", "Endpoints that are neither left out nor found unhealthy.")
	for i := range w.config.Upstreams {
		u := w.upstreams[w.config.Upstreams[i].Name]
		for _, e := range u.endpoints {
			rows = append(rows, row{u.name, e})
		}
		for _, h := range u.set.Hosts() {
			up := 0
			if h.Up() {
				up = 1
			}
			fmt.Fprintf(b, "hauberk_proxy_upstream_up{upstream=%q,endpoint=%q} %d\n", u.name, h.Endpoint().Name, up)
		}
	}
	for _, m := range []struct {
		name, kind, help string
		read             func(*endpoint) int64
	}{
		{"hauberk_proxy_upstream_active", "gauge", "Requests under way.", func(e *endpoint) int64 { return e.active.Load() }},
		{"hauberk_proxy_upstream_requests_total", "counter", "Requests sent.", func(e *endpoint) int64 { return int64(e.requests.Load()) }},
		{"hauberk_proxy_upstream_failures_total", "counter", "Requests and connections that failed.", func(e *endpoint) int64 { return int64(e.failures.Load()) }},
		{"hauberk_proxy_upstream_connects_total", "counter", "Connections made.", func(e *endpoint) int64 { return int64(e.connects.Load()) }},
	} {
		head(m.name, m.kind, m.help)
		for _, r := range rows {
			fmt.Fprintf(b, "%s{upstream=%q,endpoint=%q} %d\n", m.name, r.upstream, r.e.address, m.read(r.e))
		}
	}
}
