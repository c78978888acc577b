package alone

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/trace"
)

// spanSink takes spans as a collector does.
type spanSink struct {
	mu  sync.Mutex
	all []map[string]string
}

func (k *spanSink) ServeHTTP(w http.ResponseWriter, r *http.Request) {
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
	if json.NewDecoder(r.Body).Decode(&in) != nil || r.URL.Path != "/v1/traces" {
		w.WriteHeader(400)
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, rs := range in.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			for _, s := range ss.Spans {
				one := map[string]string{"trace": s.TraceID, "span": s.SpanID, "parent": s.ParentSpanID, "name": s.Name}
				for _, a := range s.Attributes {
					one[a.Key] = a.Value.StringValue
				}
				k.all = append(k.all, one)
			}
		}
	}
}

// one is the span whose attribute key is value.
func (k *spanSink) one(t *testing.T, key, value string) (found map[string]string) {
	t.Helper()
	waitFor(t, "span with "+key+" "+value, func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		for _, s := range k.all {
			if s[key] == value {
				found = s
			}
		}
		return found != nil
	})
	return found
}

const (
	theTrace = "0af7651916cd43dd8448eb211c80319c"
	theSpan  = "b7ad6b7169203331"
)

// TestTraces carries the traces of requests on, in the words they came in, and tells
// a collector of each.
func TestTraces(t *testing.T) {
	sink := &spanSink{}
	collector := strings.TrimPrefix(origin(t, sink.ServeHTTP), "http://")
	up := originTwo(t, func(w http.ResponseWriter, r *http.Request) {
		for _, name := range []string{"traceparent", "b3", "tracestate", "SOFA-TraceId"} {
			io.WriteString(w, name+"="+strings.Join(r.Header.Values(name), ",")+"\n")
		}
	})
	for _, protocol := range []string{"http", "http2"} {
		p := serve(t, "traces: {collector: {address: '"+collector+"'}, sample: 1000}\n"+one("  - {name: r, prefix: /, upstream: up}", strings.Replace(upstreamOf(up), "- name: up", "- name: up\n  protocol: "+protocol, 1)))
		ask := func(path string, fields ...string) string {
			resp, got := get(t, p, "GET", path, nil, func(r *http.Request) {
				for i := 0; i < len(fields); i += 2 {
					r.Header.Set(fields[i], fields[i+1])
				}
			})
			if resp.StatusCode != 200 {
				t.Fatalf("%d", resp.StatusCode)
			}
			return got
		}
		got := ask("/w3c"+protocol+"?secret", "traceparent", "00-"+theTrace+"-"+theSpan+"-00", "tracestate", "a=b")
		s := sink.one(t, "url.path", "/w3c"+protocol)
		if want := "traceparent=00-" + theTrace + "-" + s["span"] + "-01\n"; !strings.Contains(got, want) || !strings.Contains(got, "tracestate=a=b\n") || s["trace"] != theTrace || s["parent"] != theSpan ||
			s["name"] != "GET r" || s["http.response.status_code"] != "200" || s["server.address"] != up {
			t.Errorf("%s in %q, %v", want, got, s)
		}
		got = ask("/b3"+protocol, "b3", theTrace+"-"+theSpan+"-1")
		if s = sink.one(t, "url.path", "/b3"+protocol); !strings.Contains(got, "b3="+theTrace+"-"+s["span"]+"-1-"+theSpan+"\n") || !strings.Contains(got, "traceparent=\n") {
			t.Errorf("%q, %v", got, s)
		}
		got = ask("/sofa"+protocol, "SOFA-TraceId", "0a0f", "SOFA-RpcId", "0.1")
		if s = sink.one(t, "url.path", "/sofa"+protocol); !strings.Contains(got, "SOFA-TraceId=0a0f\n") || s["sofa.trace_id"] != "0a0f" || s["sofa.rpc_id"] != "0.1" {
			t.Errorf("%q, %v", got, s)
		}
		got = ask("/new" + protocol)
		if s = sink.one(t, "url.path", "/new"+protocol); !strings.Contains(got, "traceparent=00-"+s["trace"]+"-"+s["span"]+"-01\n") || s["parent"] != "" {
			t.Errorf("%q, %v", got, s)
		}
	}
	// A client that has proved nothing does not say what is sampled, unless it is to.
	for believe, want := range map[string]string{"": "-00\n", ", believe: true": "-01\n"} {
		p := serve(t, "traces: {sample: 0"+believe+"}\n"+one("  - {prefix: /, upstream: up}", upstreamOf(up)))
		if _, got := get(t, p, "GET", "/", nil, func(r *http.Request) { r.Header.Set("traceparent", "00-"+theTrace+"-"+theSpan+"-01") }); !strings.Contains(got, want) {
			t.Errorf("%q: %q", believe, got)
		}
	}
}

// TestTracedGRPC tells of calls of gRPC what became of them.
func TestTracedGRPC(t *testing.T) {
	sink := &spanSink{}
	a, _ := serviceOf(t, "a")
	c := grpcTo(t, serve(t, "traces: {collector: {address: '"+strings.TrimPrefix(origin(t, sink.ServeHTTP), "http://")+"'}, sample: 1000}\n"+one("  - {prefix: /, upstream: up}", upstreamTwo(a))))
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c.Invoke(ctx, "/test.Echo/Fail", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue))
	if s := sink.one(t, "url.path", "/test.Echo/Fail"); s["rpc.grpc.status_code"] != "9" || s["http.response.status_code"] != "" {
		t.Errorf("%v", s)
	}
}

// TestTracedCalls carries the traces of calls on: in their place where they have one,
// in a longer frame where one begins here, and not at all where that cannot be.
func TestTracedCalls(t *testing.T) {
	sink := &spanSink{}
	collector := strings.TrimPrefix(origin(t, sink.ServeHTTP), "http://")
	for _, isDubbo := range []bool{false, true} {
		protocol := map[bool]string{false: "bolt", true: "dubbo"}[isDubbo]
		seen := make(chan trace.Call, 10)
		o := newRPCOrigin(t, "a", isDubbo)
		o.seeing = func(w *wire, f *rpcFrame) {
			c, err := w.trace(f, 0)
			if err != nil {
				c = trace.Call{}
			}
			seen <- c
		}
		p := serve(t, "version: 1\ntraces: {collector: {address: '"+collector+"'}, sample: 1000}\nlisteners:\n- name: calls\n  address: 127.0.0.1:0\n  protocol: "+protocol+
			"\n  calls: [{service: '*', upstream: up}]\nupstreams: [{name: up, protocol: "+protocol+", endpoints: [{address: '"+o.ln.Addr().String()+"'}]}]\n")
		x := newRPCTester(t, p, "calls", isDubbo)
		call := func(id uint64, sum bool, method string, pairs ...string) []byte {
			if isDubbo {
				b := dubboCall(id, true, "com.S", "g", method, "x")
				if len(pairs) > 0 {
					var err error
					if b, err = extended(b, pairs); err != nil {
						t.Fatal(err)
					}
				}
				return b
			}
			return boltCall(bolt.Request, uint32(id), "com.S:1.0", method, sum, "", pairs...)
		}
		for i, sum := range []bool{false, true} {
			id := uint64(10 * (i + 1))
			x.send(call(id, sum, "w3c", "traceparent", "00-"+theTrace+"-"+theSpan+"-01"))
			if f := x.next(); f.id != id || !f.ok {
				t.Fatalf("%+v", f)
			}
			if c := <-seen; c.ID() != theTrace || c.Parent == [8]byte{} || hex.EncodeToString(c.Parent[:]) == theSpan {
				t.Errorf("%s: %+v", protocol, c)
			}
			x.send(call(id+1, sum, "begins"))
			if f := x.next(); f.id != id+1 || !f.ok {
				t.Fatalf("%+v", f)
			}
			if c := <-seen; c.Parent == [8]byte{} || c.SofaTrace != c.ID() || c.SofaSpan != "0" {
				t.Errorf("%s: %+v", protocol, c)
			}
		}
		sink.one(t, "rpc.system", protocol)
		// What there is no room for goes on as it came.
		broken := call(30, true, "full", "k", strings.Repeat("v", bolt.MaxHeader-20))
		if isDubbo {
			broken = append(call(30, true, "full"), 'N')
			broken[15]++ // a value after the attachments
		}
		x.send(broken)
		if f := x.next(); f.id != 30 {
			t.Fatalf("%+v", f)
		}
		if c := <-seen; c.Known {
			t.Errorf("%s: %+v", protocol, c)
		}
		if n := p.stats.untraced.Load(); n != 1 {
			t.Errorf("%s: %d calls were not traced", protocol, n)
		}
	}
}

// extended adds attachments to a call of Dubbo.
func extended(b []byte, pairs []string) ([]byte, error) {
	w := &wire{dubbo: true}
	var f rpcFrame
	if err := w.read(b, &f); err != nil {
		return nil, err
	}
	c, err := w.trace(&f, 0)
	if err != nil {
		return nil, err
	}
	return dubbo.Extend(nil, b, c.Attachments(), [][2]string{{pairs[0], pairs[1]}})
}

// TestTracesDropped drops what no collector takes, and counts it.
func TestTracesDropped(t *testing.T) {
	up := origin(t, func(http.ResponseWriter, *http.Request) {})
	p := serve(t, "traces: {collector: {address: '127.0.0.1:1'}, sample: 1000}\n"+one("  - {prefix: /, upstream: up}", upstreamOf(up)))
	for range 5 {
		get(t, p, "GET", "/", nil, nil)
	}
	waitFor(t, "dropped span", func() bool { _, n := p.world.Load().traces.exporter.Counts(); return n == 5 })
	if !strings.Contains(string(p.metrics()), `hauberk_proxy_spans_total{outcome="dropped"} 5`) {
		t.Error("no metric of it")
	}
}
