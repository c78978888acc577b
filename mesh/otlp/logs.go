package otlp

import (
	"context"
	"crypto/tls"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// Bounds of what is told to a collector.
const (
	maxPending = 1 << 20 // bytes of records that wait; what comes then is dropped
	batchBytes = 256 << 10
	batchEvery = time.Second
	maxText    = 1 << 10 // bytes of one value
)

// Severity of a record, as OpenTelemetry numbers it.
type Severity int

// The severities that requests have.
const (
	Info  Severity = 9
	Warn  Severity = 13
	Error Severity = 17
)

// Attribute is a name and a text, or a number if there is no text.
type Attribute struct {
	Key    string
	Text   []byte
	Number int64
}

// Record is one record of a log.
type Record struct {
	At         time.Time
	Severity   Severity
	Body       string
	Attributes []Attribute // those without text and number are left out
	Trace      [16]byte    // zero: none
	Span       [8]byte
	Sampled    bool
}

// Logs tells a collector of records.
type Logs struct {
	post    Poster
	service string
	sent    *atomic.Uint64
	dropped *atomic.Uint64
	wake    chan struct{}

	mu      sync.Mutex
	pending []byte // records as fields of a ScopeLogs
	n       uint64
	spare   []byte
	one     []byte // room to encode in
}

// NewLogs makes a log that tells nothing before Run. service is the name it has for
// the collector; sent and dropped count its records.
func NewLogs(address string, over *tls.Config, service string, sent, dropped *atomic.Uint64) *Logs {
	return &Logs{post: Poster{Address: address, TLS: over, Path: "/v1/logs", Type: "application/x-protobuf"}, service: service, sent: sent, dropped: dropped,
		wake: make(chan struct{}, 1)}
}

// Address is that of the collector.
func (l *Logs) Address() string { return l.post.Address }

// Add takes a record, if there is room.
func (l *Logs) Add(r *Record) {
	l.mu.Lock()
	l.one = appendRecord(l.one[:0], r)
	if len(l.pending)+len(l.one)+8 > maxPending {
		l.mu.Unlock()
		l.dropped.Add(1)
		return
	}
	l.pending = protowire.AppendBytes(protowire.AppendTag(l.pending, fieldRecords, protowire.BytesType), l.one)
	l.n++
	full := len(l.pending) > batchBytes
	l.mu.Unlock()
	if full {
		select {
		case l.wake <- struct{}{}:
		default:
		}
	}
}

// Run tells of records until ctx ends, and of those left in a short while after.
func (l *Logs) Run(ctx context.Context) error {
	tick := time.NewTicker(batchEvery)
	defer tick.Stop()
	defer l.post.Close()
	longer, cancel := Outlive(ctx)
	defer cancel()
	for {
		select {
		case <-tick.C:
		case <-l.wake:
		case <-ctx.Done():
			l.tell(longer)
			return nil
		}
		l.tell(longer)
	}
}

func (l *Logs) tell(ctx context.Context) {
	l.mu.Lock()
	records, n := l.pending, l.n
	l.pending, l.n = l.spare[:0], 0
	l.mu.Unlock()
	if n > 0 {
		if err := l.post.Post(ctx, wrap(records, l.service)); err != nil {
			l.dropped.Add(n)
		} else {
			l.sent.Add(n)
		}
	}
	l.mu.Lock()
	l.spare = records[:0]
	l.mu.Unlock()
}

// Numbers of fields in opentelemetry/proto/{collector/logs,logs,common,resource}/v1.
const (
	fieldResourceLogs = 1 // ExportLogsServiceRequest
	fieldResource     = 1 // ResourceLogs
	fieldScopeLogs    = 2
	fieldScope        = 1 // ScopeLogs
	fieldRecords      = 2
	fieldScopeName    = 1 // InstrumentationScope
	fieldOfResource   = 1 // Resource: attributes

	fieldTime       = 1 // LogRecord
	fieldSeverity   = 2
	fieldBody       = 5
	fieldAttributes = 6
	fieldFlags      = 8
	fieldTrace      = 9
	fieldSpan       = 10
	fieldObserved   = 11

	fieldKey   = 1 // KeyValue
	fieldValue = 2
	fieldText  = 1 // AnyValue
	fieldInt   = 3

	sampled = 1
)

// wrap makes a request of records.
func wrap(records []byte, service string) []byte {
	message := func(b []byte, field protowire.Number, m []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, field, protowire.BytesType), m)
	}
	scope := message(nil, fieldScopeName, []byte("hauberk.dev/mesh"))
	logs := append(message(make([]byte, 0, len(records)+64), fieldScope, scope), records...)
	resource := message(nil, fieldOfResource, appendAttribute(nil, &Attribute{Key: "service.name", Text: []byte(service)}))
	all := message(message(make([]byte, 0, len(logs)+128), fieldResource, resource), fieldScopeLogs, logs)
	return message(make([]byte, 0, len(all)+16), fieldResourceLogs, all)
}

func appendRecord(b []byte, r *Record) []byte {
	at := uint64(r.At.UnixNano())
	b = protowire.AppendFixed64(protowire.AppendTag(b, fieldTime, protowire.Fixed64Type), at)
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldSeverity, protowire.VarintType), uint64(r.Severity))
	if r.Body != "" {
		b = protowire.AppendTag(b, fieldBody, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(1+protowire.SizeBytes(len(r.Body))))
		b = protowire.AppendString(protowire.AppendTag(b, fieldText, protowire.BytesType), r.Body)
	}
	for i := range r.Attributes {
		a := &r.Attributes[i]
		if len(a.Text) == 0 && a.Number == 0 {
			continue
		}
		b = protowire.AppendTag(b, fieldAttributes, protowire.BytesType)
		b = protowire.AppendVarint(b, uint64(sizeOf(a)))
		b = appendAttribute(b, a)
	}
	if r.Trace != [16]byte{} {
		if r.Sampled {
			b = protowire.AppendFixed32(protowire.AppendTag(b, fieldFlags, protowire.Fixed32Type), sampled)
		}
		b = protowire.AppendBytes(protowire.AppendTag(b, fieldTrace, protowire.BytesType), r.Trace[:])
		b = protowire.AppendBytes(protowire.AppendTag(b, fieldSpan, protowire.BytesType), r.Span[:])
	}
	return protowire.AppendFixed64(protowire.AppendTag(b, fieldObserved, protowire.Fixed64Type), at)
}

// appendAttribute appends the inside of a KeyValue.
func appendAttribute(b []byte, a *Attribute) []byte {
	b = protowire.AppendString(protowire.AppendTag(b, fieldKey, protowire.BytesType), a.Key)
	b = protowire.AppendTag(b, fieldValue, protowire.BytesType)
	if len(a.Text) == 0 {
		b = protowire.AppendVarint(b, uint64(1+protowire.SizeVarint(uint64(a.Number))))
		return protowire.AppendVarint(protowire.AppendTag(b, fieldInt, protowire.VarintType), uint64(a.Number))
	}
	n := lengthOf(a.Text)
	b = protowire.AppendVarint(b, uint64(1+protowire.SizeBytes(n)))
	b = protowire.AppendVarint(protowire.AppendTag(b, fieldText, protowire.BytesType), uint64(n))
	return appendText(b, a.Text)
}

func sizeOf(a *Attribute) int {
	value := 1 + protowire.SizeVarint(uint64(a.Number))
	if len(a.Text) > 0 {
		value = 1 + protowire.SizeBytes(lengthOf(a.Text))
	}
	return 2 + protowire.SizeBytes(len(a.Key)) + protowire.SizeBytes(value)
}

// lengthOf and appendText write foreign bytes as UTF-8, at most maxText of them: a
// collector refuses a whole batch for one byte that is none.
func lengthOf(text []byte) int {
	n := 0
	for t := text[:min(len(text), maxText)]; len(t) > 0; {
		r, size := utf8.DecodeRune(t)
		if r == utf8.RuneError && size == 1 {
			n++
		} else {
			n += size
		}
		t = t[size:]
	}
	return n
}

func appendText(b, text []byte) []byte {
	for t := text[:min(len(text), maxText)]; len(t) > 0; {
		r, size := utf8.DecodeRune(t)
		if r == utf8.RuneError && size == 1 {
			b = append(b, '?')
		} else {
			b = append(b, t[:size]...)
		}
		t = t[size:]
	}
	return b
}
