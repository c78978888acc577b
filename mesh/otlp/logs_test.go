package otlp

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	common "go.opentelemetry.io/proto/otlp/common/v1"
	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"
)

const patience = 30 * time.Second

// taken are the requests of a collector, read with OpenTelemetry's own types: a
// LogsData is an ExportLogsServiceRequest on the wire.
type taken struct {
	mu     sync.Mutex
	status int
	all    []*logs.LogsData
	faults []string
}

func (k *taken) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(r.Body)
	k.mu.Lock()
	defer k.mu.Unlock()
	in := &logs.LogsData{}
	if err == nil {
		err = proto.Unmarshal(b, in)
	}
	if err != nil || r.URL.Path != "/v1/logs" || r.Header.Get("Content-Type") != "application/x-protobuf" || len(in.ProtoReflect().GetUnknown()) > 0 {
		k.faults = append(k.faults, fmt.Sprint(r.URL, r.Header, err))
		w.WriteHeader(400)
		return
	}
	if k.status != 0 {
		w.WriteHeader(k.status)
		return
	}
	k.all = append(k.all, in)
}

func (k *taken) records(t *testing.T) (all []*logs.LogRecord) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, in := range k.all {
		for _, rl := range in.ResourceLogs {
			if a := rl.Resource.Attributes; len(a) != 1 || a[0].Key != "service.name" || a[0].Value.GetStringValue() != "test" {
				t.Errorf("of %v", rl.Resource)
			}
			for _, sl := range rl.ScopeLogs {
				if sl.Scope.Name != "hauberk.dev/mesh" {
					t.Errorf("scope %v", sl.Scope)
				}
				all = append(all, sl.LogRecords...)
			}
		}
	}
	return all
}

func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s", what)
		}
	}
}

func attribute(r *logs.LogRecord, key string) *common.AnyValue {
	for _, a := range r.Attributes {
		if a.Key == key {
			return a.Value
		}
	}
	return nil
}

// TestLogs has a collector read what it is told, in the clear and over TLS, and
// counts what it does not take.
func TestLogs(t *testing.T) {
	for _, secure := range []bool{false, true} {
		k := &taken{}
		srv := httptest.NewUnstartedServer(k)
		var over *tls.Config
		if srv.Start(); secure {
			srv.Close()
			srv = httptest.NewUnstartedServer(k)
			srv.StartTLS()
			pool := x509.NewCertPool()
			pool.AddCert(srv.Certificate())
			over = &tls.Config{RootCAs: pool, ServerName: "example.com"}
		}
		defer srv.Close()
		var sent, dropped atomic.Uint64
		l := NewLogs(srv.Listener.Addr().String(), over, "test", &sent, &dropped)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() { l.Run(ctx); close(ended) }()
		at := time.Unix(1700000000, 12345)
		l.Add(&Record{At: at, Severity: Warn, Body: "request", Trace: [16]byte{1, 15: 2}, Span: [8]byte{3}, Sampled: true, Attributes: []Attribute{
			{Key: "a", Text: []byte("text \xff\xc3\xbc" + strings.Repeat("x", 5000))}, {Key: "n", Number: 1 << 40}, {Key: "below", Number: -1}, {Key: "nothing"}}})
		l.Add(&Record{At: at, Severity: Info})
		until(t, "records", func() bool { return sent.Load() == 2 })
		all := k.records(t)
		if len(all) != 2 {
			t.Fatalf("%d records; %q", len(all), k.faults)
		}
		r := all[0]
		if text := attribute(r, "a").GetStringValue(); !strings.HasPrefix(text, "text ?ü"+"xxx") || len(text) != maxText {
			t.Errorf("%d bytes of text: %.20q", len(text), text)
		}
		if r.TimeUnixNano != uint64(at.UnixNano()) || r.ObservedTimeUnixNano != r.TimeUnixNano || r.SeverityNumber != logs.SeverityNumber_SEVERITY_NUMBER_WARN || r.Body.GetStringValue() != "request" || r.Flags != 1 ||
			!bytes.Equal(r.TraceId, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2}) || len(r.SpanId) != 8 || attribute(r, "n").GetIntValue() != 1<<40 || attribute(r, "below").GetIntValue() != -1 || attribute(r, "nothing") != nil {
			t.Errorf("%v", r)
		}
		if r = all[1]; r.TraceId != nil || r.SpanId != nil || r.Body != nil || len(r.Attributes) != 0 {
			t.Errorf("%v", r)
		}
		// A collector that refuses, and one that is gone.
		k.mu.Lock()
		k.status = 503
		k.mu.Unlock()
		l.Add(&Record{At: at})
		until(t, "dropped record", func() bool { return dropped.Load() == 1 })
		k.mu.Lock()
		k.status = 0
		k.mu.Unlock()
		srv.CloseClientConnections() // the next goes over a connection of its own
		l.Add(&Record{At: at, Body: "after"})
		until(t, "record after", func() bool { return sent.Load() == 3 })
		l.Add(&Record{At: at, Body: "last"})
		cancel()
		<-ended
		if sent.Load() != 4 || len(k.records(t)) != 4 {
			t.Errorf("%d told, %d dropped", sent.Load(), dropped.Load())
		}
	}
}

// TestLogsEnd has the end come while a collector takes its time over what it was told:
// that is told.
func TestLogsEnd(t *testing.T) {
	begun, gate := make(chan struct{}, 1), make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		begun <- struct{}{}
		<-gate
	}))
	defer srv.Close()
	var sent, dropped atomic.Uint64
	l := NewLogs(srv.Listener.Addr().String(), nil, "test", &sent, &dropped)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { l.Run(ctx); close(ended) }()
	l.Add(&Record{})
	<-begun
	cancel()
	select {
	case <-ended: // without it
	case <-time.After(100 * time.Millisecond):
	}
	close(gate)
	<-ended
	if sent.Load() != 1 || dropped.Load() != 0 {
		t.Errorf("%d told, %d dropped", sent.Load(), dropped.Load())
	}
}

// TestOutlive ends what outlives a context that has ended, in its time or before.
func TestOutlive(t *testing.T) {
	ctx, end := context.WithCancel(t.Context())
	longer, cancel := Outlive(ctx)
	defer cancel()
	end()
	if longer.Err() != nil {
		t.Error("it has ended too")
	}
	select {
	case <-longer.Done():
	case <-time.After(time.Minute):
		t.Error("it does not end")
	}
	longer, cancel = Outlive(ctx)
	cancel()
	<-longer.Done()
}

// TestLogsBounded keeps no more than has room, and asks nobody who has not proved to
// be the collector.
func TestLogsBounded(t *testing.T) {
	var sent, dropped atomic.Uint64
	l := NewLogs("127.0.0.1:1", nil, "test", &sent, &dropped)
	r := &Record{Attributes: []Attribute{{Key: "a", Text: bytes.Repeat([]byte("x"), maxText)}}}
	for range 2000 {
		l.Add(r)
	}
	if n := dropped.Load(); n < 900 || n > 1100 || len(l.pending) > maxPending {
		t.Errorf("%d of 2000 were dropped, %d bytes wait", n, len(l.pending))
	}
	if n := testing.AllocsPerRun(100, func() { l.mu.Lock(); l.pending, l.n = l.pending[:0], 0; l.mu.Unlock(); l.Add(r) }); n > 0 {
		t.Errorf("%v allocations for a record", n)
	}
	k := &taken{}
	srv := httptest.NewTLSServer(k)
	defer srv.Close()
	l = NewLogs(srv.Listener.Addr().String(), &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "example.com"}, "test", &sent, &dropped)
	dropped.Store(0)
	l.Add(r)
	l.tell(t.Context())
	if dropped.Load() != 1 || len(k.records(t)) != 0 {
		t.Errorf("%d dropped", dropped.Load())
	}
}
