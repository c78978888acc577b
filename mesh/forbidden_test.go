package mesh

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/wire"
	"hauberk.dev/plan"
)

// TestPlanCutsWhoItForbids: so many requests under way become forbidden that
// their caller is cut for it. The plan comes into force all the same, and what
// is revoked after it is cut.
func TestPlanCutsWhoItForbids(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", httpPort, anyone(), nil)
	w.service("api").Inspect = &plan.Inspect{Observe: 1, Cut: 60}
	w.apply()
	const n = 100
	begun := make(chan struct{}, n)
	srv := &http.Server{Protocols: new(http.Protocols), Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		begun <- struct{}{}
		<-r.Context().Done()
	})}
	srv.Protocols.SetUnencryptedHTTP2(true)
	go srv.Serve(b.listen(t, 8080))
	t.Cleanup(func() { srv.Close() })
	client, ended := web.http2Client(t), make(chan error, n)
	for i := range n {
		go func() {
			resp, err := client.Get(fmt.Sprintf("http://10.99.0.2:8080/h/%d", i))
			if err == nil {
				resp.Body.Close()
			}
			ended <- err
		}()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for i := range n {
		select {
		case <-begun:
		case <-ctx.Done():
			t.Fatalf("%d of %d requests have begun", i, n)
		}
	}
	w.service("api").Deny = []plan.Rule{{Name: "api/none", From: []string{"*"}}}
	w.plan.Generation++
	if err := w.link.SetPlan(ctx, w.plan); err != nil {
		t.Fatalf("the plan: %v", err)
	}
	if _, err := w.link.Cut(ctx, plan.Epoch{Number: 1, Instances: []string{"web-1"}}); err != nil {
		t.Fatalf("the epoch after it: %v", err)
	}
	w.awaitEvent(api.EventFinding, "cut at score")
	for range n {
		if err := <-ended; err == nil {
			t.Error("a request was answered")
		}
	}
}

// TestRegisterForbidden: a connection that was allowed when its making began is
// ended, and told of, if the plan does not allow it any more when it is made; so
// is one that comes from before a freeze.
func TestRegisterForbidden(t *testing.T) {
	w := newWorld(t)
	w.add("api", tcpPort, nil, nil)
	w.apply()
	sb := w.proxy.sandboxAt(w.boxes["api-1"].Address)
	if err := sb.register(&entry{allowed: func(*directory) bool { return false }}); !errors.Is(err, errForbidden) {
		t.Errorf("registered: %v", err)
	}
	if err := sb.register(&entry{allowed: func(d *directory) bool { return d.generation != w.plan.Generation }}); !errors.Is(err, errForbidden) {
		t.Errorf("judged by another plan than that in force: %v", err)
	}
	client := func() (*wire.Conn, net.Conn) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		far, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { far.Close() })
		c, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		far.SetDeadline(time.Now().Add(time.Minute))
		return wire.New(c.(*net.TCPConn)), far
	}
	ended := func(what string, far net.Conn) {
		t.Helper()
		_, err := far.Read(make([]byte, 1))
		if late, ok := err.(net.Error); err == nil || ok && late.Timeout() {
			t.Errorf("%s stays: %v", what, err)
		}
	}
	c, far := client()
	a := w.proxy.publishedArrival(sb, c, 9000, party{instance: "api-1", peerIdentity: anonymous}, api.Event{Source: "resumed"})
	a.key, a.protocol = "bank/api", "tcp"
	w.proxy.still.moves(1)
	sb.open[in].Add(1)
	a.goOn(engineState{Splice: &halves{}})
	ended("a connection to the guest", far)
	if ev := w.awaitEvent(api.EventAccessDenied, "any more"); ev.Source != "resumed" {
		t.Errorf("event %+v", ev)
	}
	c, far = client()
	outside, _ := client()
	f := &outFlow{sb: sb, c: c, far: outside, to: netip.MustParseAddrPort("192.0.2.1:443")}
	if err := f.serve(halves{}); !errors.Is(err, errForbidden) {
		t.Errorf("to the outside: %v", err)
	} else {
		f.unregistered(err)
	}
	ended("a connection to the outside", far)
	w.awaitEvent(api.EventEgressRefused, "any more")
	if n := len(w.proxy.registry.all()); n != 0 {
		t.Errorf("%d connections are registered", n)
	}
}
