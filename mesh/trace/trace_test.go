package trace

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

const (
	aTrace = "0af7651916cd43dd8448eb211c80319c"
	aSpan  = "b7ad6b7169203331"
)

func read(fields ...string) Context {
	var r Reader
	for i := 0; i < len(fields); i += 2 {
		r.Field(fields[i], fields[i+1])
	}
	return r.Next(0)
}

// TestRead has what may be read carried on, and what may not begin a new trace.
func TestRead(t *testing.T) {
	for _, c := range []struct {
		fields  []string
		trace   string
		sampled bool
	}{
		{[]string{"traceparent", "00-" + aTrace + "-" + aSpan + "-01"}, aTrace, true},
		{[]string{"TraceParent", "00-" + aTrace + "-" + aSpan + "-00"}, aTrace, false},
		{[]string{"traceparent", "cc-" + aTrace + "-" + aSpan + "-03-what-comes"}, aTrace, true},
		{[]string{"traceparent", "00-" + aTrace + "-" + aSpan + "-01-more"}, "", false},
		{[]string{"traceparent", "cc-" + aTrace + "-" + aSpan + "-01x"}, "", false},
		{[]string{"traceparent", "ff-" + aTrace + "-" + aSpan + "-01"}, "", false},
		{[]string{"traceparent", "00-" + strings.ToUpper(aTrace) + "-" + aSpan + "-01"}, "", false},
		{[]string{"traceparent", "00-" + aTrace + "-0000000000000000-01"}, "", false},
		{[]string{"traceparent", "00-" + aTrace + "_" + aSpan + "-01"}, "", false},
		{[]string{"traceparent", ""}, "", false},
		{[]string{"b3", aTrace + "-" + aSpan}, aTrace, false},
		{[]string{"b3", aTrace + "-" + aSpan + "-d-" + aSpan}, aTrace, true},
		{[]string{"b3", aTrace[:16] + "-" + aSpan + "-1"}, "0000000000000000" + aTrace[:16], true},
		{[]string{"b3", "0"}, "", false},
		{[]string{"b3", aTrace + "-" + aSpan + "-1-" + aSpan + "-1"}, "", false},
		{[]string{"X-B3-TraceId", aTrace, "X-B3-SpanId", aSpan, "X-B3-Sampled", "1"}, aTrace, true},
		{[]string{"X-B3-TraceId", aTrace, "X-B3-SpanId", aSpan, "X-B3-Flags", "1"}, aTrace, true},
		{[]string{"X-B3-TraceId", aTrace}, "", false},
		{[]string{"traceparent", "bad", "b3", aTrace + "-" + aSpan + "-1"}, aTrace, true},
	} {
		got := read(c.fields...)
		if c.trace != "" && (got.ID() != c.trace || got.Parent == [8]byte{}) || c.trace == "" && (got.ID() == aTrace || got.Parent != [8]byte{}) || got.Sampled != c.sampled || got.Span == [8]byte{} {
			t.Errorf("%q: %s, parent %x, sampled %v", c.fields, got.ID(), got.Parent, got.Sampled)
		}
	}
	if a, b := read("SOFA-TraceId", "0a0fe8ec", "SOFA-RpcId", "0.1"), read("sofa-traceid", "0a0fe8ec"); a.ID() != b.ID() || a.Span == b.Span || a.SofaSpan != "0.1" {
		t.Errorf("%+v, %+v", a, b)
	}
	if c := read("sofa-traceid", "a b"); c.SofaTrace != "" {
		t.Errorf("%+v", c)
	}
	all := Reader{}
	if c := all.Next(1000); !c.Sampled {
		t.Error("every trace is sampled, and this one is not")
	}
}

func TestRewrite(t *testing.T) {
	head := "GET / HTTP/1.1\r\nHost: x\r\nTraceParent: 00-" + aTrace + "-" + aSpan + "-01\r\ntracestate: a=b\r\nb3: 0\r\n\r\n"
	c := read("traceparent", "00-"+aTrace+"-"+aSpan+"-01")
	got := string(c.Rewrite([]byte(head)))
	if !strings.HasPrefix(got, "GET / HTTP/1.1\r\nHost: x\r\ntracestate: a=b\r\nb3: 0\r\ntraceparent: 00-"+aTrace+"-") || !strings.HasSuffix(got, "-01\r\n\r\n") || strings.Contains(got, aSpan) {
		t.Errorf("%q", got)
	}
}

// TestExporterDropsAndGoesOn: without a collector nothing waits, and when one
// comes it is told.
func TestExporterDropsAndGoesOn(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := ln.Addr().String()
	ln.Close()
	x := NewExporter(address, nil)
	for range maxQueue + 10 {
		x.Add(Hop{Name: "x"})
	}
	if _, dropped := x.Counts(); dropped != 10 {
		t.Errorf("%d were dropped; want 10", dropped)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- x.Run(ctx) }()
	wait := func(what string, so func() bool) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal(what)
			}
		}
	}
	wait("nobody listens, and hops are not given up", func() bool { _, dropped := x.Counts(); return dropped == maxQueue+10 })
	if ln, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go srv.Serve(ln)
	defer srv.Close()
	x.Add(Hop{Name: "y"})
	wait("a collector is there, and is not told", func() bool { sent, _ := x.Counts(); return sent == 1 })
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestExporterEnds: what is on its way when the end comes is told.
func TestExporterEnds(t *testing.T) {
	begun, gate := make(chan struct{}, 1), make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		begun <- struct{}{}
		<-gate
	}))
	defer srv.Close()
	x := NewExporter(srv.Listener.Addr().String(), nil)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { x.Run(ctx); close(ended) }()
	x.Add(Hop{Name: "x"})
	<-begun
	stop()
	select {
	case <-ended: // without it
	case <-time.After(100 * time.Millisecond):
	}
	close(gate)
	<-ended
	if sent, dropped := x.Counts(); sent != 1 || dropped != 0 {
		t.Errorf("%d told, %d dropped", sent, dropped)
	}
}

// FuzzRead: whatever a client says of its trace, what goes on is a good head with
// one trace in it.
func FuzzRead(f *testing.F) {
	f.Add("traceparent", "00-"+aTrace+"-"+aSpan+"-01", "b3", "0")
	f.Add("b3", aTrace+"-"+aSpan+"-1", "sofa-traceid", "0a0f")
	f.Add("x-b3-traceid", aTrace, "x-b3-spanid", aSpan)
	f.Fuzz(func(t *testing.T, n1, v1, n2, v2 string) {
		c := read(n1, v1, n2, v2)
		head := c.Rewrite([]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"))
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(head)))
		if err != nil {
			t.Fatalf("%q: %v", head, err)
		}
		var again Reader
		for name := range r.Header {
			again.Field(name, r.Header.Get(name))
		}
		if next := again.Next(0); next.Trace != c.Trace || next.Parent != c.Span || next.Sampled != c.Sampled {
			t.Errorf("%q %q %q %q: %+v goes on as %+v", n1, v1, n2, v2, c, next)
		}
	})
}
