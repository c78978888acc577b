package mesh

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	pb "google.golang.org/grpc/interop/grpc_testing"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/mesh/trace"
	"hauberk.dev/plan"
)

// A request of HTTP/1 and one of gRPC that are held again and again before they are
// answered are counted, logged, traced and tapped once, as what they were.
func TestHeldRequestsAreNoted(t *testing.T) {
	log := &safeBuffer{}
	w := newWorldOf(t, Options{Requests: log, tapPatience: time.Minute})
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, []plan.Rule{{Name: "open", From: []string{"*"}}}, nil)
	bank := w.add("bank", grpcPort, anyone(), nil)
	w.plan.Observe = &plan.Observe{Log: "json", Traces: &plan.Traces{PerMille: 1000}}
	w.plan.Generation++
	w.apply()
	ln := b.listen(t, 8080)
	bank.serveGRPC(t)
	held := func() {
		t.Helper()
		for range 2 {
			load, err := w.proxy.hold()
			if err == nil {
				err = w.proxy.back(load)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := w.link.Tap(t.Context(), "api-1", 7); err != nil {
		t.Fatal(err)
	}

	c := web.mustDial(t, "10.99.0.2:8080")
	c.SetDeadline(time.Now().Add(time.Minute))
	io.WriteString(c, "POST /held?key=1 HTTP/1.1\r\nHost: api\r\nContent-Length: 3\r\nX-Is: y\r\n\r\nabc")
	far, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer far.Close()
	asked, err := http.ReadRequest(bufio.NewReader(far))
	if err != nil {
		t.Fatal(err)
	}
	held()
	const head, half = "HTTP/1.1 201 Created\r\nContent-Length: 4\r\n\r\n", "ab"
	io.WriteString(far, head+half)
	if _, err := io.ReadFull(c, make([]byte, len(head+half))); err != nil {
		t.Fatal(err)
	}
	held()
	io.WriteString(far, "cd")
	if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
		t.Fatal(err)
	}

	client := web.grpcClient(t, w.service("bank").Address.String()+":9090")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	stream, err := client.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	ask := func() {
		t.Helper()
		if err := stream.Send(&pb.StreamingOutputCallRequest{Payload: &pb.Payload{Body: []byte("x")}}); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); err != nil {
			t.Fatal(err)
		}
	}
	ask()
	held()
	ask()
	stream.CloseSend()
	if _, err := stream.Recv(); err != io.EOF {
		t.Fatal(err)
	}
	for _, line := range []string{`hauberk_mesh_requests_total{service="api.bank",protocol="http",code="2xx",verdict="allowed"} 1`,
		`hauberk_mesh_request_seconds_count{service="api.bank"} 1`,
		`hauberk_mesh_requests_total{service="bank.bank",protocol="grpc",code="0",verdict="allowed"} 1`} {
		until(t, line, func() bool { return strings.Contains(w.proxy.Metrics(), line+"\n") })
	}
	until(t, "log", func() bool { return strings.Count(log.String(), "\n") == 2 })
	if l := log.String(); !strings.Contains(l, `"method":"POST","path":"/held","verdict":"allowed","rule":"open","status":201`) || !strings.Contains(l, `"path":"/grpc.testing.TestService/FullDuplexCall"`) {
		t.Errorf("log:\n%s", l)
	}
	p, err := w.link.Tap(t.Context(), "api-1", 7)
	if err != nil || len(p.Requests) != 1 {
		t.Fatalf("%+v, %v", p, err)
	}
	parent := strings.Split(asked.Header.Get("Traceparent"), "-")
	if r := p.Requests[0]; len(parent) != 4 || r.Trace != parent[1] || r.Received < 3 || r.Sent != int64(len(head)+4) || !strings.Contains(fmt.Sprint(r.Header), "{x-is y}") {
		t.Errorf("%+v; the server was told of trace %v", r, parent)
	}
}

// An answer whose head was half there when the exchange was held is that of the
// request that waits for it.
func TestHeldInTheHeadOfAnAnswer(t *testing.T) {
	client, near := net.Pipe()
	server, far := net.Pipe()
	defer far.Close()
	x := &exchange{entry: &entry{}, client: pipeSide{near}, server: &begunSide{pipeSide{server}, []byte("HTTP/1.1 200 OK\r\nContent-")},
		judge: func(*http1.Head) (int, refusal) { return 0, refusal{} }, malformed: func(error) {}}
	x.start()
	done := make(chan struct{})
	go func() {
		defer close(done)
		x.run(&exchangeState{Met: true, Reply: replyingHead, Waiting: []frozenRequest{{Method: "GET"}}})
	}()
	client.SetDeadline(time.Now().Add(20 * time.Second))
	go io.WriteString(far, "Length: 2\r\n\r\nab")
	const want = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(client, got); err != nil || string(got) != want {
		t.Errorf("%q, %v", got, err)
	}
	// It counts: a server that ends its connection while it is asked once more does
	// so as without a proxy.
	io.WriteString(client, "GET /2 HTTP/1.1\r\nHost: a\r\n\r\n")
	if _, err := http.ReadRequest(bufio.NewReader(far)); err != nil {
		t.Error(err)
	}
	far.Close()
	if rest, err := io.ReadAll(client); err != nil || len(rest) > 0 {
		t.Errorf("%q, %v; want the end", rest, err)
	}
	client.Close()
	select {
	case <-done:
	case <-time.After(20 * time.Second):
		t.Error("the exchange does not end")
	}
}

// A note is the same on the other side, and none where another version has none.
func TestNoteState(t *testing.T) {
	if n := (*noteState)(nil).note(); !n.begin.IsZero() {
		t.Errorf("%+v", n)
	}
	if s := (&note{}).state(); s != nil {
		t.Errorf("%+v", s)
	}
	began := time.Now().Add(-time.Hour)
	b, err := json.Marshal((&note{begin: began, method: "GET", path: "/a?secret", rule: "r", grpc: true, done: true, received: 7, trace: &trace.Context{Trace: [16]byte{1}, Sampled: true, SofaSpan: "0.1"},
		header: []api.Header{{Name: "a", Value: "b"}}}).state())
	if err != nil || strings.Contains(string(b), "secret") {
		t.Fatalf("%s, %v", b, err)
	}
	var s noteState
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	n := s.note()
	if d := time.Since(n.begin); d < time.Hour || d > time.Hour+time.Minute {
		t.Errorf("began %v ago", d)
	}
	if n.method != "GET" || n.path != "/a" || n.rule != "r" || !n.grpc || !n.done || n.received != 7 || n.trace.Trace[0] != 1 || !n.trace.Sampled || n.trace.SofaSpan != "0.1" || len(n.header) != 1 {
		t.Errorf("%+v", n)
	}
	later := noteState{Begin: time.Now().Add(time.Hour)}
	if n := later.note(); time.Since(n.begin) < 0 {
		t.Error("a request begins after now")
	}
}

// A tap shows no query of an address, and holds no more than what it shows.
func TestTapHoldsWhatItShows(t *testing.T) {
	p := New(Options{})
	sb := &sandbox{p: p}
	sb.facts.Store(&plan.Sandbox{Instance: "i", Service: "s", Namespace: "n"})
	p.sandboxes["i"] = sb
	if _, err := p.tap("i", 1); err != nil {
		t.Fatal(err)
	}
	s := p.observer.look(&arrival{p: p, sb: sb, protocol: "http"})
	const large = 64 << 10
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range maxTapped {
		n := s.begin2(&http2.Head{Method: "GET", Path: "/a?" + strings.Repeat("x", large),
			Fields: []http2.Field{{Name: "referer", Value: "https://shop.test/cart?token=SECRET"}, {Name: "x-a", Value: "why?"}}})
		s.ended(&n, 200, "", 1)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > maxTapped*large/4 {
		t.Errorf("%d bytes are held", grown)
	}
	got, err := p.tap("i", 1)
	if err != nil || len(got.Requests) != maxTapped {
		t.Fatalf("%d requests, %v", len(got.Requests), err)
	}
	if r := got.Requests[0]; r.Path != "/a" || fmt.Sprint(r.Header) != "[{referer https://shop.test/cart} {x-a why?}]" {
		t.Errorf("%q %v", r.Path, r.Header)
	}
}
