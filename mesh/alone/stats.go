package alone

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
)

// maxRouteStats bounds the routes whose counts are kept over reloads.
const maxRouteStats = 10_000

// stats are counts that survive reloads.
type stats struct {
	generation atomic.Uint64
	badReloads atomic.Uint64
	mirrored   atomic.Uint64
	unmirrored atomic.Uint64
	other      *routeStats // requests no route was found for

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
	w := p.enter()
	defer w.leave()
	if w.log != nil {
		head("hauberk_proxy_log_dropped_total", "counter", "Lines of the access log that were dropped.")
		fmt.Fprintf(&b, "hauberk_proxy_log_dropped_total %d\n", w.log.dropped.Load())
	}
	p.listenerMetrics(&b, head)
	p.routeMetrics(&b, head)
	w.endpointMetrics(&b, head)
	return []byte(b.String())
}

func (p *Proxy) listenerMetrics(b *strings.Builder, head func(name, kind, help string)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := make([]string, 0, len(p.listeners))
	for address := range p.listeners {
		names = append(names, address)
	}
	slices.Sort(names)
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
