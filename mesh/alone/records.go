package alone

import (
	"context"
	"fmt"
	"strings"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/otlp"
)

// records is an access log that goes to a collector.
type records struct {
	logs *otlp.Logs
	stop func()
}

// openRecords opens it; nil means none.
func openRecords(c *Collector, stats *stats) (*records, error) {
	if c == nil {
		return nil, nil
	}
	over, err := c.over()
	if err != nil {
		return nil, fmt.Errorf("open access log: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	x := &records{otlp.NewLogs(c.Address, over, "hauberk-mesh", &stats.recorded, &stats.unrecorded), cancel}
	stats.telling.Go(func() { x.logs.Run(ctx) })
	return x, nil
}

func severityOf(status int) otlp.Severity {
	switch {
	case status >= 500 || status == 0:
		return otlp.Error
	case status >= 400:
		return otlp.Warn
	}
	return otlp.Info
}

// put hands a record over, with the trace it belongs to.
func (x *records) put(r *otlp.Record, h *hop) {
	if h.on {
		r.Trace, r.Span, r.Sampled = h.Trace, h.Span, h.Sampled
	}
	x.logs.Add(r)
}

// record notes a request that is over. What stands after a question mark is often a
// secret, and stays here.
func (s *session) record(x *records, took time.Duration) {
	name, server := "", ""
	if s.action != nil {
		name = s.action.name
	}
	if s.server != nil {
		server = s.server.address
	}
	_, path, _ := http1.SplitTarget(s.req.Target)
	code := int64(0)
	if s.grpc {
		code = int64(s.code)
	}
	all := [...]otlp.Attribute{{Key: "http.request.method", Text: s.req.Method}, {Key: "url.path", Text: path}, {Key: "server.address", Text: s.req.Host},
		{Key: "client.address", Text: s.clientText}, {Key: "http.response.status_code", Number: int64(s.status)}, {Key: "rpc.grpc.status_code", Number: code},
		{Key: "http.request.body.size", Number: s.got}, {Key: "http.response.size", Number: s.sent}, {Key: "hauberk.micros", Number: took.Microseconds()},
		{Key: "hauberk.route", Text: []byte(name)}, {Key: "hauberk.upstream", Text: []byte(server)}, {Key: "hauberk.why", Text: []byte(s.why)}}
	x.put(&otlp.Record{At: s.began, Severity: severityOf(s.status), Body: "request", Attributes: all[:]}, &s.hop)
}

// record notes a call that is over.
func (c *rpcUnderway) record(x *records, took time.Duration, status, sent int, server, why string) {
	name := ""
	if c.route != nil {
		name = c.route.name
	}
	service, method, _ := strings.Cut(string(c.name), "#")
	all := [...]otlp.Attribute{{Key: "rpc.system", Text: []byte(c.client.protocol)}, {Key: "rpc.service", Text: []byte(service)}, {Key: "rpc.method", Text: []byte(method)},
		{Key: "client.address", Text: c.client.clientText}, {Key: "http.response.status_code", Number: int64(status)}, {Key: "rpc.request.size", Number: int64(c.got)},
		{Key: "rpc.response.size", Number: int64(sent)}, {Key: "hauberk.micros", Number: took.Microseconds()}, {Key: "hauberk.route", Text: []byte(name)},
		{Key: "hauberk.upstream", Text: []byte(server)}, {Key: "hauberk.why", Text: []byte(why)}}
	x.put(&otlp.Record{At: c.began, Severity: severityOf(status), Body: "call", Attributes: all[:]}, &c.hop)
}
