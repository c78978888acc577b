package alone_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	ratelimit "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/emptypb"
)

// counter is a rate limit service: two of each descriptor, in all.
type counter struct {
	ratelimit.UnimplementedRateLimitServiceServer
	mu    sync.Mutex
	seen  map[string]int
	fault func(context.Context) error
}

func (c *counter) ShouldRateLimit(ctx context.Context, r *ratelimit.RateLimitRequest) (*ratelimit.RateLimitResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fault != nil {
		if err := c.fault(ctx); err != nil {
			return nil, err
		}
	}
	out := &ratelimit.RateLimitResponse{OverallCode: ratelimit.RateLimitResponse_OK}
	for _, d := range r.Descriptors {
		key := r.Domain
		for _, e := range d.Entries {
			key += " " + e.Key + "=" + e.Value
		}
		c.seen[key]++
		s := &ratelimit.RateLimitResponse_DescriptorStatus{Code: ratelimit.RateLimitResponse_OK, LimitRemaining: uint32(max(2-c.seen[key], 0)),
			CurrentLimit:       &ratelimit.RateLimitResponse_RateLimit{RequestsPerUnit: 2, Unit: ratelimit.RateLimitResponse_RateLimit_MINUTE},
			DurationUntilReset: durationpb.New(30 * time.Second)}
		if c.seen[key] > 2 {
			s.Code, out.OverallCode = ratelimit.RateLimitResponse_OVER_LIMIT, ratelimit.RateLimitResponse_OVER_LIMIT
			out.ResponseHeadersToAdd = []*core.HeaderValue{{Key: "x-from", Value: "service"}, {Key: "content-length", Value: "0"}, {Key: "bad name", Value: "x"}}
		}
		out.Statuses = append(out.Statuses, s)
	}
	return out, nil
}

func (c *counter) set(fault func(context.Context) error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fault = fault
}

func (c *counter) count(key string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen[key]
}

func serveGRPC(t *testing.T, register func(*grpc.Server)) (address string, stop func()) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	register(srv)
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(ln)
	}()
	stop = sync.OnceFunc(func() {
		srv.Stop()
		<-done
	})
	t.Cleanup(stop)
	return ln.Addr().String(), stop
}

// TestGlobalRate asks a real server of Envoy's rate limit API, and does with its
// answers, errors and silence what the file says.
func TestGlobalRate(t *testing.T) {
	c := &counter{seen: map[string]int{}}
	service, stop := serveGRPC(t, func(s *grpc.Server) { ratelimit.RegisterRateLimitServiceServer(s, c) })
	a, address := told(t), freePort(t)
	configure := func(timeout, unanswered string) {
		t.Helper()
		status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
rate_service: {upstream: limits, domain: shop, timeout: ` + timeout + `, unanswered: ` + unanswered + `}
upstreams: [{name: limits, protocol: grpc, endpoints: [{address: '` + service + `'}]}]
hosts:
- names: ["*"]
  routes:
  - {path: /user, global_rate: [[{key: user, header: X-User}, {key: path, value: "$path"}]], respond: {status: 200, body: user}}
  - {global_rate: [[{key: client, value: $remote}]], respond: {status: 200, body: all}}
`)
		if status != 200 {
			t.Fatalf("%d %v", status, answer)
		}
	}
	ask := func(path, user string) (*http.Response, string) {
		t.Helper()
		req := mustRequest(t, "GET", "http://"+address+path, nil, 0)
		if user != "" {
			req.Header.Set("X-User", user)
		}
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Fatal(err)
		}
		return r, string(b)
	}
	configure("30s", "deny")
	for i, want := range []int{200, 200, 429, 429} {
		r, body := ask("/user", "ann")
		if r.StatusCode != want {
			t.Fatalf("request %d: %d %s, want %d", i, r.StatusCode, body, want)
		}
		h := r.Header
		if want == 429 && (h.Get("Retry-After") != "30" || h.Get("X-RateLimit-Limit") != "2" || h.Get("X-RateLimit-Remaining") != "0" ||
			h.Get("X-RateLimit-Reset") != "30" || h.Get("X-From") != "service" || !strings.Contains(body, `"hint"`)) {
			t.Errorf("%v %s", h, body)
		}
	}
	if r, _ := ask("/user", "bob"); r.StatusCode != 200 {
		t.Errorf("another user: %d", r.StatusCode)
	}
	for _, user := range []string{"\xff", "a" + strings.Repeat("ü", 300)} { // no text of protobuf, whole or cut
		for i, want := range []int{200, 200, 429} {
			if r, body := ask("/user", user); r.StatusCode != want {
				t.Errorf("%.10q, request %d: %d %s, want %d", user, i, r.StatusCode, body, want)
			}
		}
	}
	for range 3 {
		if r, _ := ask("/user", ""); r.StatusCode != 200 {
			t.Errorf("nobody: %d", r.StatusCode)
		}
	}
	if n := c.count("shop user=ann path=/user"); n != 4 {
		t.Errorf("ann was counted %d times", n)
	}

	// A call of gRPC is refused in its own words.
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask("/", "")
	ask("/", "")
	err = conn.Invoke(context.Background(), "/x.Y/Z", &emptypb.Empty{}, &emptypb.Empty{})
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the rate is used up") {
		t.Errorf("a call over the rate: %v", err)
	}

	// Errors, and silence.
	c.set(func(context.Context) error { return status.Error(codes.ResourceExhausted, "no room") })
	if r, body := ask("/user", "eve"); r.StatusCode != 503 || !strings.Contains(body, `gRPC status \"8\": \"no room\"`) {
		t.Errorf("an error of the service, denied: %d %s", r.StatusCode, body)
	}
	configure("30s", "allow")
	if r, _ := ask("/user", "eve"); r.StatusCode != 200 {
		t.Errorf("an error of the service, allowed: %d", r.StatusCode)
	}
	c.set(func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	configure("20ms", "deny")
	if r, body := ask("/user", "eve"); r.StatusCode != 503 {
		t.Errorf("silence: %d %s", r.StatusCode, body)
	}
	c.set(nil)
	stop()
	if r, body := ask("/user", "eve"); r.StatusCode != 503 {
		t.Errorf("nobody there, denied: %d %s", r.StatusCode, body)
	}
	configure("20ms", "allow")
	if r, _ := ask("/user", "eve"); r.StatusCode != 200 {
		t.Errorf("nobody there, allowed: %d", r.StatusCode)
	}
	r, err := a.c.Get("http://x/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || !strings.Contains(string(b), "hauberk_proxy_rate_unanswered_total 5\n") || !strings.Contains(string(b), `hauberk_proxy_limited_total{route="*/0"} 4`) {
		t.Errorf("%v in\n%s", err, b)
	}
}

// TestGlobalRateFaults finds what a file says that could not work.
func TestGlobalRateFaults(t *testing.T) {
	a, address := told(t), freePort(t)
	status, answer := a.put("version: 1\nadmin: a\nlisteners: [{name: web, address: '" + address + `'}]
rate_service: {upstream: limits}
upstreams: [{name: limits, endpoints: []}]
hosts: [{names: ["*"], routes: [{global_rate: [[], [{key: k, value: v, header: h}], [{header: "a b"}], [{key: k, value: $1}]], respond: {status: 200}}]}]
`)
	said := fmt.Sprint(answer["reason"])
	for _, want := range []string{"write protocol: grpc", "rate_service.domain: is missing", "write allow or deny", "global_rate[0]: 0 entries", "use one of value and header",
		"global_rate[2][0].key: is missing", `"a b" is no field name`, "$1, but the regex"} {
		if status != 422 || !strings.Contains(said, want) {
			t.Errorf("no %q in %d %s", want, status, said)
		}
	}
}
