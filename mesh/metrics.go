package mesh

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/plan"
)

const (
	adminTimeout = 5 * time.Second
	maxAdmins    = 16 // at once
	grpcCodes    = 17
	classes      = 6 // of statuses of HTTP; 0 is unknown
)

// latencies are the upper bounds of the buckets of time.
var latencies = [...]time.Duration{500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond,
	25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, time.Second, 2500 * time.Millisecond, 10 * time.Second}

// serviceCounts are those of one service since the start of the proxy. To count
// allocates nothing and takes no lock.
type serviceCounts struct {
	connections atomic.Uint64
	requests    [len(counted)][classes + grpcCodes][verdicts]atomic.Uint64
	took        [len(latencies) + 1]atomic.Uint64
	micros      atomic.Uint64
	callbacks   atomic.Uint64 // requests of the server, over connections of its clients
	// calledBack are requests to the service over connections that it has made, by verdict.
	calledBack [verdictDenied + 1]atomic.Uint64
}

// counted are the protocols by which requests are counted; the last stands for any other.
var counted = [...]string{"http", "grpc", "bolt", "dubbo", "dubbo-thrift", "tcp", "redis", "other"}

func (c *serviceCounts) count(protocol string, status int, grpc string, verdict int, took time.Duration) {
	p := 0
	for p < len(counted)-1 && counted[p] != protocol {
		p++
	}
	code := 0
	if status >= 100 && status < 600 {
		code = status / 100
	}
	if grpc != "" {
		code = classes + 2 // UNKNOWN
		if n, err := strconv.Atoi(grpc); err == nil && n >= 0 && n < grpcCodes {
			code = classes + n
		}
	}
	c.requests[p][code][verdict].Add(1)
	if took == 0 {
		return
	}
	b := 0
	for b < len(latencies) && took > latencies[b] {
		b++
	}
	c.took[b].Add(1)
	c.micros.Add(uint64(took.Microseconds()))
}

func codeName(code int) string {
	switch {
	case code >= classes:
		return strconv.Itoa(code - classes)
	case code == 0:
		return ""
	}
	return strconv.Itoa(code) + "xx"
}

// Metrics is everything that is counted, in the text format of Prometheus.
func (p *Proxy) Metrics() string {
	var b strings.Builder
	head := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind) }
	o := &p.observer
	o.mu.Lock()
	services := maps.Clone(o.services)
	o.mu.Unlock()
	names := slices.Sorted(maps.Keys(services))
	head("hauberk_mesh_connections_total", "counter", "Connections that have arrived at services.")
	for _, name := range names {
		fmt.Fprintf(&b, "hauberk_mesh_connections_total{service=%q} %d\n", name, services[name].connections.Load())
	}
	head("hauberk_mesh_requests_total", "counter", "Requests by protocol, class of status or code of gRPC, and verdict.")
	for _, name := range names {
		services[name].writeRequests(&b, name)
	}
	head("hauberk_mesh_callbacks_total", "counter", "Requests that servers made over connections of their clients, whose nodes judge them.")
	for _, name := range names {
		if n := services[name].callbacks.Load(); n > 0 {
			fmt.Fprintf(&b, "hauberk_mesh_callbacks_total{service=%q} %d\n", name, n)
		}
	}
	head("hauberk_mesh_callbacks_judged_total", "counter", "Requests to services over connections that they have made, by verdict.")
	for _, name := range names {
		for v := range services[name].calledBack {
			if n := services[name].calledBack[v].Load(); n > 0 {
				fmt.Fprintf(&b, "hauberk_mesh_callbacks_judged_total{service=%q,verdict=%q} %d\n", name, verdictNames[v], n)
			}
		}
	}
	head("hauberk_mesh_request_seconds", "histogram", "Time from the head of a request to its answer; of HTTP/2 to the head of that.")
	for _, name := range names {
		services[name].writeTimes(&b, name)
	}
	p.writeLearnt(&b, head)
	p.writeSandboxes(&b, head)
	head("hauberk_mesh_events_lost_total", "counter", "Events that were not told for want of room.")
	fmt.Fprintf(&b, "hauberk_mesh_events_lost_total %d\n", p.events.total.Load())
	head("hauberk_mesh_log_dropped_total", "counter", "Lines of the log of requests that were dropped.")
	fmt.Fprintf(&b, "hauberk_mesh_log_dropped_total %d\n", o.log.dropped.Load())
	head("hauberk_mesh_log_records_total", "counter", "Requests that the collector of the log was told of, and those that it was not.")
	fmt.Fprintf(&b, "hauberk_mesh_log_records_total{outcome=\"sent\"} %d\nhauberk_mesh_log_records_total{outcome=\"dropped\"} %d\n", o.recorded.Load(), o.unrecorded.Load())
	head("hauberk_mesh_untraced_total", "counter", "Calls of bolt and Dubbo whose trace could not be carried on, or not be told of with their answer.")
	fmt.Fprintf(&b, "hauberk_mesh_untraced_total %d\n", o.untraced.Load())
	if n := o.now.Load(); n != nil && n.exporter != nil {
		sent, dropped := n.exporter.Counts()
		head("hauberk_mesh_spans_total", "counter", "Spans that were told to the collector, and those that were not.")
		fmt.Fprintf(&b, "hauberk_mesh_spans_total{outcome=\"sent\"} %d\nhauberk_mesh_spans_total{outcome=\"dropped\"} %d\n", sent, dropped)
	}
	return b.String()
}

func (c *serviceCounts) writeRequests(b *strings.Builder, service string) {
	for p := range c.requests {
		for code := range c.requests[p] {
			for v := range c.requests[p][code] {
				if n := c.requests[p][code][v].Load(); n > 0 {
					fmt.Fprintf(b, "hauberk_mesh_requests_total{service=%q,protocol=%q,code=%q,verdict=%q} %d\n", service, counted[p], codeName(code), verdictNames[v], n)
				}
			}
		}
	}
}

func (c *serviceCounts) writeTimes(b *strings.Builder, service string) {
	total := uint64(0)
	for i, le := range latencies {
		total += c.took[i].Load()
		fmt.Fprintf(b, "hauberk_mesh_request_seconds_bucket{service=%q,le=\"%g\"} %d\n", service, le.Seconds(), total)
	}
	total += c.took[len(latencies)].Load()
	fmt.Fprintf(b, "hauberk_mesh_request_seconds_bucket{service=%q,le=\"+Inf\"} %d\n", service, total)
	fmt.Fprintf(b, "hauberk_mesh_request_seconds_sum{service=%q} %g\nhauberk_mesh_request_seconds_count{service=%q} %d\n", service, float64(c.micros.Load())/1e6, service, total)
}

func (p *Proxy) writeLearnt(b *strings.Builder, head func(name, kind, help string)) {
	all := p.analysis.stats()
	names := slices.Sorted(maps.Keys(all))
	head("hauberk_mesh_learnt_since_seconds", "gauge", "Since when what is normal of requests is learnt, as a time of Unix.")
	for _, name := range names {
		fmt.Fprintf(b, "hauberk_mesh_learnt_since_seconds{service=%q} %d\n", name, all[name].Since.Unix())
	}
	head("hauberk_mesh_learnt_requests", "gauge", "Requests from which it is.")
	for _, name := range names {
		fmt.Fprintf(b, "hauberk_mesh_learnt_requests{service=%q} %d\n", name, all[name].Learnt)
	}
}

func (p *Proxy) writeSandboxes(b *strings.Builder, head func(name, kind, help string)) {
	s := p.stats()
	names := slices.Sorted(maps.Keys(s.Sandboxes))
	for _, m := range []struct {
		name, kind, help string
		read             func(instance string) uint64
	}{
		{"hauberk_mesh_open", "gauge", "Connections open.", func(i string) uint64 { return uint64(s.Sandboxes[i].Open) }},
		{"hauberk_mesh_refused_total", "counter", "Connections and requests refused.", func(i string) uint64 { return s.Sandboxes[i].Refused }},
		{"hauberk_mesh_would_deny_total", "counter", "What rules in audit would have refused.", func(i string) uint64 { return s.Sandboxes[i].WouldDeny }},
		{"hauberk_mesh_received_bytes_total", "counter", "Bytes to the instance, of connections that have ended.", func(i string) uint64 { return s.Sandboxes[i].BytesIn }},
		{"hauberk_mesh_sent_bytes_total", "counter", "Bytes from the instance, of connections that have ended.", func(i string) uint64 { return s.Sandboxes[i].BytesOut }},
	} {
		head(m.name, m.kind, m.help)
		for _, i := range names {
			fmt.Fprintf(b, "%s{instance=%q} %d\n", m.name, i, m.read(i))
		}
	}
}

// ServeAdmin answers GET /metrics until ctx ends or the listener, a Unix socket,
// is closed.
func (p *Proxy) ServeAdmin(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	room := make(chan struct{}, maxAdmins)
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			p.pause("serve admin", err)
			continue
		}
		select {
		case room <- struct{}{}:
			go func() {
				p.answerAdmin(c)
				<-room
			}()
		default:
			c.Close()
		}
	}
}

// answerAdmin answers one request.
func (p *Proxy) answerAdmin(c net.Conn) {
	defer c.Close()
	c.SetDeadline(time.Now().Add(adminTimeout))
	h, err := http1.NewReader(c).Request()
	if err != nil {
		return
	}
	status, body := "404 Not Found", "not found: use GET /metrics\n"
	if h.Method == "GET" && h.Target == "/metrics" {
		status, body = "200 OK", p.Metrics()
	}
	io.WriteString(c, fmt.Sprintf("HTTP/1.1 %s\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", status, len(body), body))
}

// checkObserve refuses what cannot be noted.
func checkObserve(o *plan.Observe) error {
	if o == nil {
		return nil
	}
	if o.Log != "" && o.Log != "text" && o.Log != "json" {
		return fmt.Errorf("observe: log %q; want text or json, or none", o.Log)
	}
	if c := o.LogCollector; c != nil {
		if _, err := collectorTLS(c); err != nil {
			return fmt.Errorf("observe: log: %w", err)
		}
	}
	if t := o.Traces; t != nil {
		if t.PerMille < 0 || t.PerMille > 1000 {
			return fmt.Errorf("observe: perMille %d; want 0 to 1000", t.PerMille)
		}
		if _, _, err := net.SplitHostPort(t.Collector); t.Collector != "" && err != nil {
			return fmt.Errorf("observe: collector %q; want host:port", t.Collector)
		}
	}
	return nil
}
