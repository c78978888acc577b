package alone

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// slowness is a server that answers nothing before its client has gone.
type slowness struct{ asked, gone atomic.Int64 }

func (x *slowness) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	x.asked.Add(1)
	<-r.Context().Done()
	x.gone.Add(1)
}

// TestHedge asks a second server what the first does not answer: the client gets one
// answer, and the first server hears that nobody waits for it.
func TestHedge(t *testing.T) {
	for protocol, serverOf := range map[string]func(testing.TB, http.HandlerFunc) string{"http": origin, "http2": originTwo} {
		for client, of := range map[string]func(testing.TB) *http.Client{"HTTP/1": clientOne, "HTTP/2": clientTwo} {
			t.Run(client+" to "+protocol, func(t *testing.T) {
				slow := &slowness{}
				var quick atomic.Int64
				a, b := serverOf(t, slow.ServeHTTP), serverOf(t, func(w http.ResponseWriter, r *http.Request) {
					quick.Add(1)
					body, _ := io.ReadAll(r.Body)
					fmt.Fprintf(w, "%s %s %s", r.Method, r.URL, body)
				})
				p := serve(t, one(`
  - {prefix: /marked, upstream: up, hedge: {after: 20ms, percent: 100, idempotent: true}}
  - {prefix: /x, upstream: up, hedge: {after: 20ms, percent: 100}}
  - {prefix: /, upstream: up, timeout: 300ms, hedge: {after: 20ms, percent: 100}}`, strings.Replace(upstreamOf(a, b), "- name: up", "- name: up\n  balance: round-robin\n  protocol: "+protocol, 1)))
				base, c := "http://"+p.Address("web").String(), of(t)
				ask := func(method, path, body string) (int, string) {
					req, err := http.NewRequest(method, base+path, strings.NewReader(body))
					if err != nil {
						t.Fatal(err)
					}
					resp, err := c.Do(req)
					if err != nil {
						t.Fatal(err)
					}
					defer resp.Body.Close()
					got, err := io.ReadAll(resp.Body)
					if err != nil {
						t.Fatal(err)
					}
					return resp.StatusCode, string(got)
				}
				for range 6 { // each takes two turns: the slow server comes first
					if status, got := ask("GET", "/x?y", ""); status != 200 || got != "GET /x?y " {
						t.Errorf("%d %q", status, got)
					}
				}
				body := strings.Repeat("b", 3000)
				for range 2 {
					if status, got := ask("POST", "/marked", body); status != 200 || got != "POST /marked "+body {
						t.Errorf("%d %.40q", status, got)
					}
				}
				waitFor(t, "slow server that was asked", func() bool { return slow.asked.Load() == 8 })
				// What may not be sent twice is not.
				if status, _ := ask("POST", "/", "x"); status != 504 {
					t.Errorf("%d", status)
				}
				if q := quick.Load(); q != 8 {
					t.Errorf("the quick server was asked %d times", q)
				}
				waitFor(t, "server that hears it all", func() bool { return slow.gone.Load() == 9 })
				w := p.world.Load()
				st, marked := w.actions[1].stats, w.actions[0].stats
				if n := st.hedged.Load(); n != 6 || st.hedgesWon.Load() != n || st.hedgesCancelled.Load() != n || marked.hedgesWon.Load() != 2 {
					t.Errorf("%d hedged, %d won, %d cancelled", n, st.hedgesWon.Load(), st.hedgesCancelled.Load())
				}
				atRest(t, p)
				if !strings.Contains(string(p.metrics()), `hauberk_proxy_hedges_won_total{route="*/1"} 6`) {
					t.Error("no metric of it")
				}
			})
		}
	}
}

// atRest waits for everything that is counted in to be counted out.
func atRest(t *testing.T, p *Proxy) {
	t.Helper()
	u := p.world.Load().upstreams["up"]
	waitFor(t, "end of all requests", func() bool {
		n := u.set.Active()
		for _, e := range u.endpoints {
			n += e.active.Load()
		}
		return n == 0
	})
	if !u.set.Retry() {
		t.Error("the budget of retries is spent")
	}
	u.set.EndRetry()
	for _, e := range u.endpoints {
		e.mu.Lock()
		for _, s := range e.idle {
			if s.closed {
				t.Error("a connection that was closed waits for requests")
			}
		}
		e.mu.Unlock()
	}
}

// TestHedgeFault does not pass on the second answer if it tells of a fault while the
// first may be well, and passes on a fault if there is nothing better.
func TestHedgeFault(t *testing.T) {
	var asked atomic.Int64
	second := make(chan struct{}, 1)
	up := func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1)%2 == 0 {
			w.WriteHeader(503)
			w.(http.Flusher).Flush()
			second <- struct{}{}
			return
		}
		<-second
		if r.URL.Path == "/bad" {
			w.WriteHeader(500)
		}
		io.WriteString(w, "first")
	}
	p := serve(t, one("  - {prefix: /, upstream: up, hedge: {after: 20ms, percent: 100}}", upstreamOf(origin(t, up), origin(t, up))))
	if resp, got := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 200 || got != "first" {
		t.Errorf("%d %q", resp.StatusCode, got)
	}
	if resp, _ := get(t, p, "GET", "/bad", nil, nil); resp.StatusCode < 500 || resp.StatusCode > 503 {
		t.Errorf("%d", resp.StatusCode)
	}
	if n := p.world.Load().actions[0].stats.hedged.Load(); n != 2 {
		t.Errorf("%d hedged", n)
	}
	atRest(t, p)
}

// TestHedgeEnds has clients wait no longer, or leave, while two servers are asked.
func TestHedgeEnds(t *testing.T) {
	slow := &slowness{}
	a, b := originTwo(t, slow.ServeHTTP), originTwo(t, slow.ServeHTTP)
	p := serve(t, one("  - {prefix: /, upstream: up, deadline: X-Wait, hedge: {after: 10ms, percent: 100}}", upstreamTwo(a, b)+"  outlier: {unreachable: 100}"))
	resp, _ := get(t, p, "GET", "/", nil, func(r *http.Request) { r.Header.Set("X-Wait", "1000") })
	if resp.StatusCode != 504 {
		t.Errorf("%d", resp.StatusCode)
	}
	waitFor(t, "two servers that are told", func() bool { return slow.gone.Load() == 2 })
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+p.Address("web").String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		_, err := clientTwo(t).Do(req)
		ended <- err
	}()
	waitFor(t, "second try", func() bool { return slow.asked.Load() == 4 })
	cancel()
	if err := <-ended; err == nil {
		t.Error("an answer of nobody")
	}
	waitFor(t, "two servers that are told", func() bool { return slow.gone.Load() == 4 })
	atRest(t, p)
}

// TestHedgeAlone asks nobody twice where there is one server, or the budgets say no.
func TestHedgeAlone(t *testing.T) {
	var asked atomic.Int64
	up := func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		time.Sleep(30 * time.Millisecond)
	}
	for name, text := range map[string]string{
		"one server": one("  - {prefix: /, upstream: up, hedge: {after: 1ms, percent: 100}}", upstreamOf(origin(t, up))),
		"a share":    one("  - {prefix: /, upstream: up, hedge: {after: 1ms, percent: 1}}", upstreamOf(origin(t, up), origin(t, up))),
		"no moment":  one("  - {prefix: /, upstream: up, hedge: {percentile: 95, percent: 100}}", upstreamOf(origin(t, up), origin(t, up))),
	} {
		asked.Store(0)
		p := serve(t, text)
		for range 5 {
			if resp, _ := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 200 {
				t.Errorf("%s: %d", name, resp.StatusCode)
			}
		}
		most := uint64(0)
		if name == "a share" {
			most = 1 // of the first hundred
		}
		if n := p.world.Load().actions[0].stats.hedged.Load(); n != most {
			t.Errorf("%s: %d were tried twice", name, n)
		}
		atRest(t, p)
	}
}

// TestHedgeGRPC tries calls twice that the route marks, and no others.
func TestHedgeGRPC(t *testing.T) {
	var quick, slow, gone atomic.Int64
	server := func(is bool) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, st grpc.ServerStream) error {
			var m wrapperspb.BytesValue
			if err := st.RecvMsg(&m); err != nil {
				return err
			}
			if is {
				slow.Add(1)
				<-st.Context().Done()
				gone.Add(1)
				return st.Context().Err()
			}
			quick.Add(1)
			return st.SendMsg(&m)
		}))
		go s.Serve(ln)
		t.Cleanup(s.Stop)
		return ln.Addr().String()
	}
	p := serveWith(t, one(`
  - {path: /test.Echo/Find, upstream: up, hedge: {after: 20ms, percent: 100, idempotent: true}}
  - {prefix: /, upstream: up, hedge: {after: 20ms, percent: 100}}`, strings.Replace(upstreamTwo(server(true), server(false)), "http2", "grpc\n  balance: round-robin", 1)), func(p *Proxy) { p.callPatience = patience })
	c := grpcTo(t, p)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	for range 6 {
		in, out := wrapperspb.Bytes([]byte("hello")), new(wrapperspb.BytesValue)
		if err := c.Invoke(ctx, "/test.Echo/Find", in, out); err != nil || string(out.Value) != "hello" {
			t.Fatalf("%v, %q", err, out.Value)
		}
	}
	waitFor(t, "server that hears it", func() bool { return gone.Load() == 6 })
	late, stop := context.WithTimeout(ctx, 300*time.Millisecond)
	defer stop()
	if err := c.Invoke(late, "/test.Echo/Other", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue)); status.Code(err) != codes.DeadlineExceeded || quick.Load() != 6 {
		t.Errorf("%v, and the quick server was asked %d times", err, quick.Load())
	}
	atRest(t, p)
}
