package alone

import (
	"context"
	"crypto/tls"
	"net"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/trace"
)

// Traces are how requests are followed from hop to hop.
type Traces struct {
	Collector *Collector `yaml:"collector"` // of spans; none: traces are carried on and nobody is told
	Sample    int        `yaml:"sample"`    // of a thousand traces that begin here
	Believe   bool       `yaml:"believe"`   // clients without a certificate say whether a trace is sampled
}

// Collector takes OTLP over HTTP.
type Collector struct {
	Address string        `yaml:"address"`
	TLS     *CollectorTLS `yaml:"tls"`
}

// CollectorTLS is how a collector proves who it is.
type CollectorTLS struct {
	CA   string `yaml:"ca"`   // none: the system's
	Name string `yaml:"name"` // none: the host of the address
}

// over is the TLS of a collector, nil for none.
func (c *Collector) over() (*tls.Config, error) {
	if c.TLS == nil {
		return nil, nil
	}
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.TLS.Name, NextProtos: []string{"http/1.1"}}
	if cfg.ServerName == "" {
		cfg.ServerName, _, _ = net.SplitHostPort(c.Address)
	}
	var err error
	if c.TLS.CA != "" {
		cfg.RootCAs, _, err = readPool(c.TLS.CA)
	}
	return cfg, err
}

func (r *reading) collector(at string, c *Collector) {
	r.address(at+".address", c.Address, true)
	if _, err := c.over(); err != nil {
		r.fault(at+".tls.ca", "%v", err)
	}
}

func (r *reading) traces(t *Traces) {
	if t.Sample < 0 || t.Sample > 1000 {
		r.fault("traces.sample", "%d is out of range; use 0 to 1000, of a thousand", t.Sample)
	}
	if t.Collector != nil {
		r.collector("traces.collector", t.Collector)
	}
}

// tracing follows the requests of one world.
type tracing struct {
	Traces
	stats    *stats
	exporter *trace.Exporter // nil: nobody is told
	stop     func()
}

// openTraces makes ready what t says; nil means nothing.
func openTraces(t *Traces, stats *stats) (*tracing, error) {
	if t == nil {
		return nil, nil
	}
	x := &tracing{Traces: *t, stats: stats, stop: func() {}}
	if t.Collector == nil {
		return x, nil
	}
	over, err := t.Collector.over()
	if err != nil {
		return nil, err
	}
	x.exporter = trace.NewExporter(t.Collector.Address, over)
	ctx, cancel := context.WithCancel(context.Background())
	x.stop = cancel
	stats.telling.Go(func() { x.exporter.Run(ctx) })
	return x, nil
}

// hop is where a request stands in its trace.
type hop struct {
	trace.Context
	on bool
}

// sampled says whether the hop is told of.
func (h *hop) sampled(t *tracing) bool { return h.on && h.Sampled && t != nil && t.exporter != nil }

// disbelieve decides for a client that has no say in what is sampled.
func (t *tracing) disbelieve(c *trace.Context, proved bool) {
	if !proved && !t.Believe && !c.Began() {
		c.Sampled = trace.Sample(t.Sample)
	}
}

// follow reads where the request stands in its trace.
func (s *session) follow(t *tracing) {
	var r trace.Reader
	for i := range s.req.Fields {
		r.Bytes(s.req.Fields[i].Name, s.req.Fields[i].Value)
	}
	s.hop = hop{r.Next(t.Sample), true}
	t.disbelieve(&s.hop.Context, s.peer != nil)
}

// appendTrace tells the server of this hop, but for fields that the route writes.
func (s *session) appendTrace(b []byte, a *action) []byte {
	if !s.hop.on {
		return b
	}
	for _, f := range s.hop.Fields() {
		if !a.toServer.drops([]byte(f[0])) {
			b = appendField(b, f[0], f[1])
		}
	}
	return b
}

// retraced says whether a field of the request is written anew.
func (s *session) retraced(f *http1.Field) bool { return s.hop.on && s.hop.Replaces(f.Name) }

// tell tells of a request that is over.
func (s *session) tell(t *tracing, took time.Duration) {
	name, server := "none", ""
	if s.action != nil {
		name = s.action.name
	}
	if s.server != nil {
		server = s.server.address
	}
	_, path, _ := http1.SplitTarget(s.req.Target)
	grpc, status := "", strconv.Itoa(s.status)
	if s.grpc {
		grpc, status = strconv.Itoa(s.code), ""
	}
	t.exporter.Add(trace.Hop{Context: s.hop.Context, Name: string(s.req.Method) + " " + name, Begin: s.began, End: s.began.Add(took),
		Failed: s.status >= 500 || s.status == 0 || s.aborted || s.grpc && failure(s.code),
		Attributes: [][2]string{{"http.request.method", string(s.req.Method)}, {"url.path", string(path[:min(len(path), maxLogged)])}, {"http.response.status_code", status},
			{"rpc.grpc.status_code", grpc}, {"server.address", server}, {"client.address", string(s.clientText)}, {"hauberk.route", name}, {"hauberk.why", s.why},
			{"sofa.trace_id", s.hop.SofaTrace}, {"sofa.rpc_id", s.hop.SofaSpan}}})
}

// followCall reads where a call stands in its trace, and has its server told of this
// hop. Of what cannot be read, or has no room, nothing is changed.
func (x *rpcClient) followCall(t *tracing, c *rpcUnderway, frame []byte, f *rpcFrame) []byte {
	call, err := x.wire.trace(f, t.Sample)
	if err != nil {
		t.stats.untraced.Add(1)
		return frame
	}
	t.disbelieve(&call.Context, false)
	switch {
	case call.Known:
		call.Rewrite() // whoever sends the frame gives it an id, and renews its sum
	case !call.Sampled:
		return frame // nobody would hear of it
	default:
		longer, err := x.wire.extend(frame, &call)
		if err != nil {
			t.stats.untraced.Add(1)
			return frame
		}
		frame = longer
	}
	c.hop = hop{call.Context, true}
	return frame
}

func (w *wire) trace(f *rpcFrame, perMille int) (trace.Call, error) {
	if w.dubbo {
		return trace.OfDubbo(&w.dubbos, &f.dubbo, perMille)
	}
	return trace.OfBolt(f.bolt.Header, perMille)
}

// extend writes a trace that begins here into a copy of the frame.
func (w *wire) extend(frame []byte, c *trace.Call) ([]byte, error) {
	room := make([]byte, 0, len(frame)+512)
	if w.dubbo {
		return dubbo.Extend(room, frame, c.Attachments(), c.ForDubbo())
	}
	return bolt.Extend(room, frame, w.extent, c.ForBolt())
}

// tell tells of a call that is over.
func (c *rpcUnderway) tell(t *tracing, took time.Duration, status int, server, why string) {
	name := "none"
	if c.route != nil {
		name = c.route.name
	}
	service, method, _ := strings.Cut(string(c.name), "#")
	t.exporter.Add(trace.Hop{Context: c.hop.Context, Name: strings.TrimSpace(c.client.protocol + " " + name), Begin: c.began, End: c.began.Add(took), Failed: status >= 500,
		Attributes: [][2]string{{"rpc.system", c.client.protocol}, {"rpc.service", service}, {"rpc.method", method}, {"http.response.status_code", strconv.Itoa(status)},
			{"server.address", server}, {"client.address", string(c.client.clientText)}, {"hauberk.route", name}, {"hauberk.why", why},
			{"sofa.trace_id", c.hop.SofaTrace}, {"sofa.rpc_id", c.hop.SofaSpan}}})
}
