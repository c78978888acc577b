package alone

import (
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	logs "go.opentelemetry.io/proto/otlp/logs/v1"
	"google.golang.org/protobuf/proto"

	"hauberk.dev/mesh/bolt"
)

// TestRecords has a collector take the access log, of requests and of calls.
func TestRecords(t *testing.T) {
	var mu sync.Mutex
	var all []*logs.LogRecord
	collector := strings.TrimPrefix(origin(t, func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		in := &logs.LogsData{}
		if err == nil {
			err = proto.Unmarshal(b, in)
		}
		if err != nil || r.URL.Path != "/v1/logs" {
			t.Errorf("%s: %v", r.URL, err)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		for _, rl := range in.ResourceLogs {
			for _, sl := range rl.ScopeLogs {
				all = append(all, sl.LogRecords...)
			}
		}
	}), "http://")
	has := func(want map[string]any) func() bool {
		return func() bool {
			mu.Lock()
			defer mu.Unlock()
			for _, r := range all {
				n := 0
				for _, a := range r.Attributes {
					switch v := want[a.Key].(type) {
					case string:
						if a.Value.GetStringValue() == v {
							n++
						}
					case int64:
						if a.Value.GetIntValue() == v {
							n++
						}
					}
				}
				if n == len(want) {
					return true
				}
			}
			return false
		}
	}
	up := origin(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello") })
	head := "access_log: {collector: {address: '" + collector + "'}}\n"
	p := serve(t, head+one("  - {name: r, prefix: /, upstream: up}", upstreamOf(up)))
	get(t, p, "POST", "/path?secret=1", strings.NewReader("xyz"), nil)
	waitFor(t, "record of a request", has(map[string]any{"http.request.method": "POST", "url.path": "/path", "http.response.status_code": int64(200), "hauberk.route": "r",
		"http.request.body.size": int64(3), "hauberk.upstream": strings.TrimPrefix(up, "http://"), "client.address": "127.0.0.1"}))
	waitFor(t, "metric of it", func() bool { // which is counted once the collector has answered
		return strings.Contains(string(p.metrics()), `hauberk_proxy_log_records_total{outcome="sent"} 1`)
	})
	o := newRPCOrigin(t, "a", false)
	p = serve(t, "version: 1\n"+head+"listeners:\n- {name: calls, address: '127.0.0.1:0', protocol: bolt, calls: [{name: c, service: '*', methods: [m], upstream: up}]}\n"+
		"upstreams: [{name: up, protocol: bolt, endpoints: [{address: '"+o.ln.Addr().String()+"'}]}]\n")
	x := newRPCTester(t, p, "calls", false)
	x.send(boltCall(bolt.Request, 1, "com.S:1.0", "m", true, ""))
	if f := x.next(); !f.ok {
		t.Fatalf("%+v", f)
	}
	waitFor(t, "record of a call", has(map[string]any{"rpc.system": "bolt", "rpc.service": "com.S:1.0", "rpc.method": "m", "http.response.status_code": int64(200), "hauberk.route": "c"}))
}
