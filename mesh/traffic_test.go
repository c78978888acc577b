package mesh

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/balance"
	"hauberk.dev/plan"
)

func TestTrafficPolicy(t *testing.T) {
	p, err := trafficPolicy(nil)
	if err != nil || p.Balancer != balance.LeastRequest || p.Outlier == nil || p.Limits != (balance.Limits{}) {
		t.Errorf("the default: %+v, %v", p, err)
	}
	p, err = trafficPolicy(&plan.Traffic{Balancer: "maglev", Near: "first", SlowStart: plan.Duration(time.Second),
		Outlier: &plan.Outlier{Unreachable: 3, Ejection: plan.Duration(time.Hour), MaxEjected: 20},
		Breaker: &plan.Breaker{Connections: 4, EndpointConnections: 2, Retries: 1},
		Retry:   &plan.Retry{Tries: 2, PerTry: plan.Duration(time.Second), Percent: 5, Floor: 1}, Timeout: plan.Duration(time.Second)})
	want := defaultTraffic()
	want.Balancer, want.Near, want.SlowStart = balance.Maglev, balance.NearFirst, time.Second
	want.Outlier = &balance.Outlier{Unreachable: 3, Ejection: time.Hour, MaxEjection: time.Hour, MaxEjected: 20}
	want.Limits, want.EndpointLimits = balance.Limits{Requests: 4, Retries: 1}, balance.Limits{Requests: 2}
	want.Retry = balance.Retry{Tries: 2, PerTry: time.Second, Percent: 5, Floor: 1}
	if err != nil || !samePolicy(p, want) {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err := trafficPolicy(&plan.Traffic{Outlier: &plan.Outlier{Off: true}}); err != nil || p.Outlier != nil {
		t.Errorf("off: %+v, %v", p, err)
	}
	for name, bad := range map[string]plan.Traffic{
		"balancer":       {Balancer: "best"},
		"near":           {Near: "far"},
		"timeout":        {Timeout: plan.Duration(2 * time.Hour)},
		"one try":        {Retry: &plan.Retry{PerTry: plan.Duration(2 * time.Hour)}},
		"tries":          {Retry: &plan.Retry{Tries: 99}},
		"retry budget":   {Retry: &plan.Retry{Percent: 101}},
		"requests":       {Breaker: &plan.Breaker{Connections: -1}},
		"endpoint":       {Breaker: &plan.Breaker{EndpointConnections: -1}},
		"slow start":     {SlowStart: plan.Duration(100 * time.Hour)},
		"ejected at mos": {Outlier: &plan.Outlier{MaxEjected: 101}},
	} {
		m := plan.Mesh{TrustDomain: domain, Services: []plan.Service{{Name: "a", Namespace: "bank", Identity: spiffe("a"), Traffic: &bad}}}
		if _, err := newDirectory(m); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzTraffic: whatever a plan says of traffic is refused, or makes a set.
func FuzzTraffic(f *testing.F) {
	f.Add([]byte(`{"balancer":"maglev","slowStart":"1m30s","outlier":{"ejection":"2s","off":true},"breaker":{"connections":7},"retry":{"perTry":"500ms","tries":16}}`))
	f.Add([]byte(`{"near":"first","timeout":"1h","outlier":{"unreachable":4294967295,"maxEjection":"1ns"},"retry":{"floor":-1}}`))
	f.Add([]byte(`{"breaker":{"endpointConnections":-9223372036854775808}}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var said plan.Traffic
		if json.Unmarshal(raw, &said) != nil {
			return
		}
		p, err := trafficPolicy(&said)
		if err != nil {
			return
		}
		s, err := balance.New(p, rand.Uint64)
		if err != nil {
			t.Fatalf("%s: %v", raw, err)
		}
		if checked, err := p.Checked(); err != nil || !samePolicy(*checked, s.Policy()) {
			t.Errorf("%s: a plan that says it again would change something: %v", raw, err)
		}
	})
}

// What a set knows survives plans that do not change it, and the set goes with
// its service.
func TestTrafficFollowsPlans(t *testing.T) {
	p := New(Options{})
	gateway := netip.MustParseAddrPort("192.0.2.1:15008")
	end := func(n int) plan.Endpoint {
		return plan.Endpoint{Instance: fmt.Sprint("a-", n), Address: netip.AddrFrom4([4]byte{10, 88, 0, byte(n)}), Gateway: gateway}
	}
	m := plan.Mesh{TrustDomain: domain, Services: []plan.Service{{Name: "a", Namespace: "bank", Identity: spiffe("a"), Endpoints: []plan.Endpoint{end(1), end(2)}}},
		Sandboxes: []plan.Sandbox{{Address: end(2).Address}}}
	follow := func() *service {
		t.Helper()
		d, err := newDirectory(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.traffic.follow(d, m.Sandboxes); err != nil {
			t.Fatal(err)
		}
		return d.services["bank/a"]
	}
	s := follow()
	hosts := s.set.Hosts()
	if hosts[0].Endpoint().Locality != "" || hosts[1].Endpoint().Locality != here {
		t.Error("who is on this node is not known")
	}
	pick, err := s.set.Pick(p.traffic.clock.Now(), balance.Request{})
	if err != nil || pick.Host() != hosts[1] {
		t.Errorf("%v: the near one of equals is not picked", err)
	}
	first := hosts[0].Endpoint()
	if s = follow(); !slices.Equal(s.set.Hosts(), hosts) || hosts[0].Endpoint() != first {
		t.Error("a plan that changes nothing has changed the endpoints")
	}
	m.Services[0].Endpoints = []plan.Endpoint{end(3), end(2)}
	m.Services[0].Traffic = &plan.Traffic{Breaker: &plan.Breaker{Connections: 1}}
	if s = follow(); s.set.Hosts()[1] != hosts[1] || s.set.Active() != 1 || s.set.Policy().Limits.Requests != 1 {
		t.Error("a changed plan has forgotten what was known, or is not in force")
	}
	m.Services[0].Endpoints = []plan.Endpoint{end(1), end(1)}
	if _, err := newDirectory(m); err == nil || !strings.Contains(err.Error(), "named twice") {
		t.Errorf("an endpoint twice: %v", err)
	}
	m.Services = nil
	if d, err := newDirectory(m); err != nil || p.traffic.follow(d, nil) != nil || len(p.traffic.sets) != 0 {
		t.Error("a set has outlived its service")
	}
}

// An endpoint that could not be reached is left out for a while, though others
// serve; one alone is still tried.
func TestEjection(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", tcpPort, anyone(), nil)
	second := w.instance("b", "b-2")
	svc := w.service("b")
	svc.Endpoints = append(svc.Endpoints, w.endpoint(second))
	svc.Traffic = &plan.Traffic{Balancer: "round-robin", Outlier: &plan.Outlier{Ejection: plan.Duration(time.Hour)}}
	w.apply()
	go serveEcho(b.listen(t, 9000)) // the second does not listen
	for range 6 {
		if err := a.call("10.99.0.2:9000", "x"); err != nil {
			t.Error(err)
		}
	}
	hosts := w.proxy.directory.Load().services["bank/b"].set.Hosts()
	if !hosts[0].Up() || hosts[1].Up() {
		t.Errorf("up: %v and %v", hosts[0].Up(), hosts[1].Up())
	}
	w.mu.Lock()
	tried := 0
	for _, e := range w.events {
		if e.Kind == api.EventUnreachable && e.Instance == "b-2" {
			tried++
		}
	}
	w.mu.Unlock()
	if tried > 1 {
		t.Errorf("the one that is out was tried %d times", tried)
	}
	// It listens again and is the only one: it is used at once.
	go serveEcho(second.listen(t, 9000))
	svc.Endpoints = svc.Endpoints[1:]
	w.plan.Generation++
	w.apply()
	if err := a.call("10.99.0.2:9000", "x"); err != nil {
		t.Error(err)
	}
}

// A limit refuses clearly, and frees with what it counts.
func TestBreakerLimits(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	b := w.add("b", httpPort, anyone(), nil)
	w.service("b").Traffic = &plan.Traffic{Breaker: &plan.Breaker{Connections: 2}}
	w.apply()
	go http.Serve(b.listen(t, 8080), http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "page") }))
	get := func() (*http.Response, net.Conn) {
		t.Helper()
		c := a.mustDial(t, "10.99.0.2:8080")
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: b\r\n\r\n")
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		return resp, c
	}
	var open []net.Conn
	for range 2 {
		resp, c := get()
		if resp.StatusCode != 200 {
			t.Fatal(resp.Status)
		}
		open = append(open, c)
	}
	resp, _ := get()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != 503 || !strings.Contains(string(body), "its traffic policy allows 2") || !strings.Contains(string(body), `"hint":"hauberk why a-1"`) {
		t.Errorf("%s: %s", resp.Status, body)
	}
	w.awaitEvent(api.EventLimit, "2 connections to b.bank are open from this node; its traffic policy allows 2, and any number to one endpoint")
	open[0].Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if resp, _ := get(); resp.StatusCode == 200 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("a place that was freed is not given")
		}
	}
}

// A caller that no rule allows costs a server not even a connection; one that
// some rule may allow, no second one.
func TestGuestIsMetOnce(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	evil := w.add("evil", nil, nil, nil)
	b := w.add("b", httpPort, []plan.Rule{{Name: "b/a", From: []string{spiffe("a"), spiffe("denied")}, Methods: []string{"GET"}}},
		[]plan.Rule{{Name: "b/not", From: []string{spiffe("denied")}}})
	denied := w.add("denied", nil, nil, nil)
	w.apply()
	var met atomic.Int32
	srv := &http.Server{
		Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "page") }),
		ConnState: func(_ net.Conn, s http.ConnState) {
			if s == http.StateNew {
				met.Add(1)
			}
		},
	}
	go srv.Serve(b.listen(t, 8080))
	defer srv.Close()
	ask := func(from *box, method string) int {
		c := from.mustDial(t, "10.99.0.3:8080")
		defer c.Close()
		fmt.Fprintf(c, "%s / HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n", method)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if status := ask(evil, "GET"); status != 403 || met.Load() != 0 {
		t.Errorf("nobody's caller: %d, %d connections", status, met.Load())
	}
	if status := ask(denied, "GET"); status != 403 || met.Load() != 0 {
		t.Errorf("a denied caller: %d, %d connections", status, met.Load())
	}
	if status := ask(a, "GET"); status != 200 || met.Load() != 1 {
		t.Errorf("a caller: %d, %d connections", status, met.Load())
	}
	if status := ask(a, "PUT"); status != 403 {
		t.Errorf("a refused request: %d", status)
	}
	// A client that waits longer than a server may gets a fresh connection.
	c := a.mustDial(t, "10.99.0.3:8080")
	time.Sleep(aheadFor + 100*time.Millisecond)
	io.WriteString(c, "GET / HTTP/1.1\r\nHost: b\r\nConnection: close\r\n\r\n")
	if resp, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || resp.StatusCode != 200 {
		t.Errorf("a slow client: %v", err)
	}
}

// shop is an instance that serves pages, and closes and opens at will.
type shop struct {
	box *box
	srv *http.Server
	ln  net.Listener
}

// Endpoints leave the plan, stop and come back while requests flow: no request
// fails, none is sent twice, and answers under way are completed.
//
// An instance here closes its port only while no client is between dialling and
// being accepted, as the kernel resets what waits in a port's queue: that would
// happen to it without a mesh as well.
func TestEndpointsComeAndGo(t *testing.T) {
	w := newWorld(t)
	a := w.add("a", nil, nil, nil)
	shops := []*shop{{box: w.add("b", httpPort, anyone(), nil)}, {box: w.instance("b", "b-2")}, {box: w.instance("b", "b-3")}}
	w.service("b").Traffic = &plan.Traffic{Outlier: &plan.Outlier{Ejection: plan.Duration(20 * time.Millisecond)}}
	var seen sync.Map
	handler := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if _, twice := seen.LoadOrStore(r.URL.Path, true); twice {
			t.Errorf("%s came twice", r.URL.Path)
		}
		rw.(http.Flusher).Flush() // the head: it is accepted
		time.Sleep(3 * time.Millisecond)
		io.WriteString(rw, r.URL.Path)
	})
	open := func(s *shop) {
		s.ln = s.box.listen(t, 8080)
		s.srv = &http.Server{Handler: handler}
		go s.srv.Serve(s.ln)
	}
	inPlan := map[*shop]bool{}
	apply := func() {
		svc := w.service("b")
		svc.Endpoints = nil
		for _, s := range shops {
			if inPlan[s] {
				svc.Endpoints = append(svc.Endpoints, w.endpoint(s.box))
			}
		}
		w.plan.Generation++
		w.apply()
	}
	for _, s := range shops {
		open(s)
		inPlan[s] = true
	}
	apply()

	var door sync.RWMutex // held for reading while a client may wait in a queue
	var done atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				if err := visit(a, &door, fmt.Sprintf("/%d/%d", g, i)); err != nil {
					t.Errorf("request %d of %d: %v", i, g, err)
					return
				}
				done.Add(1)
			}
		})
	}
	r := rand.New(rand.NewPCG(3, 5))
	for range 30 {
		s := shops[r.IntN(len(shops))]
		if r.IntN(2) == 0 { // told before it stops, or not
			inPlan[s] = false
			apply()
		}
		door.Lock()
		s.ln.Close()
		door.Unlock()
		if err := s.srv.Shutdown(ctx); err != nil && !errors.Is(err, net.ErrClosed) { // its port is closed already
			t.Fatal(err)
		}
		for begin := done.Load(); done.Load() < begin+8 && !t.Failed(); { // some are served without it
			time.Sleep(time.Millisecond)
		}
		open(s)
		inPlan[s] = true
		apply()
	}
	cancel()
	wg.Wait()
	t.Logf("%d requests", done.Load())
	if w.proxy.directory.Load().services["bank/b"].set.Open(balance.Retries) != 0 {
		t.Error("retries are left")
	}
}

// visit makes one request on a connection of its own.
func visit(a *box, door *sync.RWMutex, path string) error {
	door.RLock()
	waiting := true
	accepted := func() {
		if waiting {
			waiting = false
			door.RUnlock()
		}
	}
	defer accepted()
	c, err := a.dial("tcp4", "10.99.0.2:8080")
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: b\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", path); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	accepted()
	body, err := io.ReadAll(resp.Body)
	if err == nil && (resp.StatusCode != 200 || string(body) != path) {
		err = errors.New(resp.Status + ": " + string(body))
	}
	return err
}
