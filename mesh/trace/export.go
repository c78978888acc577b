package trace

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"strconv"
	"sync/atomic"
	"time"

	"hauberk.dev/mesh/otlp"
)

// Bounds of what is told to a collector.
const (
	maxQueue  = 2048 // hops that wait; what comes then is dropped and counted
	maxBatch  = 256
	batchTime = time.Second
)

// Hop is one request as a span tells it.
type Hop struct {
	Context
	Name       string
	Begin, End time.Time
	Failed     bool
	Attributes [][2]string
}

// Exporter tells a collector of hops, by OTLP over HTTP in JSON. It never makes a
// request wait: what has no room in its queue is dropped and counted.
type Exporter struct {
	post    otlp.Poster
	queue   chan Hop
	dropped atomic.Uint64
	sent    atomic.Uint64
}

// NewExporter makes an exporter that does nothing before Run. It speaks TLS if over
// is given.
func NewExporter(address string, over *tls.Config) *Exporter {
	return &Exporter{post: otlp.Poster{Address: address, TLS: over, Path: "/v1/traces", Type: "application/json"}, queue: make(chan Hop, maxQueue)}
}

// Address is that of the collector.
func (x *Exporter) Address() string { return x.post.Address }

// Counts are the hops that were told and those that were not.
func (x *Exporter) Counts() (sent, dropped uint64) { return x.sent.Load(), x.dropped.Load() }

// Add takes a hop, if there is room.
func (x *Exporter) Add(h Hop) {
	select {
	case x.queue <- h:
	default:
		x.dropped.Add(1)
	}
}

// Run tells of hops until ctx ends, and of those left in a short while after.
func (x *Exporter) Run(ctx context.Context) error {
	tick := time.NewTicker(batchTime)
	defer tick.Stop()
	defer x.post.Close()
	longer, cancel := otlp.Outlive(ctx)
	defer cancel()
	var batch []Hop
	for {
		select {
		case <-ctx.Done():
			x.last(longer, batch)
			return nil
		case h := <-x.queue:
			if batch = append(batch, h); len(batch) < maxBatch {
				continue
			}
		case <-tick.C:
			if len(batch) == 0 {
				continue
			}
		}
		x.tell(longer, batch)
		batch = batch[:0]
	}
}

// last tells of the hops that are left.
func (x *Exporter) last(ctx context.Context, batch []Hop) {
	for {
		select {
		case h := <-x.queue:
			if batch = append(batch, h); len(batch) < maxQueue {
				continue
			}
		default:
		}
		if len(batch) > 0 {
			x.tell(ctx, batch)
		}
		return
	}
}

func (x *Exporter) tell(ctx context.Context, batch []Hop) {
	if err := x.post.Post(ctx, encode(batch)); err != nil {
		x.dropped.Add(uint64(len(batch)))
	} else {
		x.sent.Add(uint64(len(batch)))
	}
}

// The part of OTLP that a hop needs, as its JSON mapping has it.
type (
	otlpValue struct {
		Text string `json:"stringValue"`
	}
	otlpAttribute struct {
		Key   string    `json:"key"`
		Value otlpValue `json:"value"`
	}
	otlpStatus struct {
		Code int `json:"code,omitempty"`
	}
	otlpSpan struct {
		Trace      string          `json:"traceId"`
		Span       string          `json:"spanId"`
		Parent     string          `json:"parentSpanId,omitempty"`
		Name       string          `json:"name"`
		Kind       int             `json:"kind"`
		Begin      string          `json:"startTimeUnixNano"`
		End        string          `json:"endTimeUnixNano"`
		Attributes []otlpAttribute `json:"attributes,omitempty"`
		Status     otlpStatus      `json:"status"`
	}
	otlpScope struct {
		Name string `json:"name"`
	}
	otlpScopeSpans struct {
		Scope otlpScope  `json:"scope"`
		Spans []otlpSpan `json:"spans"`
	}
	otlpResource struct {
		Attributes []otlpAttribute `json:"attributes"`
	}
	otlpResourceSpans struct {
		Resource otlpResource     `json:"resource"`
		Scopes   []otlpScopeSpans `json:"scopeSpans"`
	}
	otlpTraces struct {
		Resources []otlpResourceSpans `json:"resourceSpans"`
	}
)

const (
	spanServer  = 2
	statusError = 2
)

func encode(batch []Hop) []byte {
	spans := make([]otlpSpan, len(batch))
	for i := range batch {
		h := &batch[i]
		s := &spans[i]
		*s = otlpSpan{Trace: h.ID(), Span: hex.EncodeToString(h.Span[:]), Name: h.Name, Kind: spanServer,
			Begin: strconv.FormatInt(h.Begin.UnixNano(), 10), End: strconv.FormatInt(h.End.UnixNano(), 10)}
		if h.Parent != [8]byte{} {
			s.Parent = hex.EncodeToString(h.Parent[:])
		}
		if h.Failed {
			s.Status.Code = statusError
		}
		for _, a := range h.Attributes {
			if a[1] != "" {
				s.Attributes = append(s.Attributes, otlpAttribute{a[0], otlpValue{a[1]}})
			}
		}
	}
	b, _ := json.Marshal(otlpTraces{[]otlpResourceSpans{{ // of strings and numbers: it cannot fail
		Resource: otlpResource{[]otlpAttribute{{"service.name", otlpValue{"hauberk-mesh"}}}},
		Scopes:   []otlpScopeSpans{{otlpScope{"hauberk.dev/mesh"}, spans}},
	}}})
	return b
}
