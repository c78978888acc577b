package xds_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"

	"hauberk.dev/plan"
	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/xdstest"
)

func TestStartUpdateRemove(t *testing.T) {
	w := newWorld(t)
	p := w.run()
	w.set("1", xdstest.Cluster("a"), xdstest.Endpoints("a", 1, 2), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "a listener with its route", func() bool { _, ok := p.listener("l"); return ok })
	l, _ := p.listener("l")
	if got := l.Chains[0].HTTP.Hosts[0].Routes[0]; got.To[0].Cluster != "a" || got.Timeout != 15*time.Second {
		t.Errorf("route is %+v", got)
	}
	if got := p.ports("a"); !slices.Equal(got, []uint16{1, 2}) {
		t.Errorf("endpoints are %d", got)
	}
	xdstest.Until(t, "the digest that the server works out", func() bool { return p.Status().Digest == w.digest() })

	w.set("2", xdstest.Cluster("a"), xdstest.Endpoints("a", 3), xdstest.Cluster("b"), xdstest.Endpoints("b", 4), xdstest.Listener(t, "l", 80, "r"), routes("r", "a", "b"))
	xdstest.Until(t, "both clusters, and both routes", func() bool {
		l, _ := p.listener("l")
		return slices.Equal(p.ports("a"), []uint16{3}) && slices.Equal(p.ports("b"), []uint16{4}) &&
			len(l.Chains[0].HTTP.Hosts[0].Routes) == 2
	})
	xdstest.Until(t, "the digest after an update", func() bool { return p.Status().Digest == w.digest() })

	w.set("3", xdstest.Cluster("b"), xdstest.Endpoints("b", 4))
	xdstest.Until(t, "what is removed to leave", func() bool {
		return len(p.plan().Listeners) == 0 && len(p.plan().Clusters) == 1
	})
	xdstest.Until(t, "names that are not wanted to be forgotten", func() bool {
		n := p.Status().Resources
		return n["clusters"] == 1 && n["endpoints"] == 1 && n["listeners"] == 0 && n["routes"] == 0
	})
	xdstest.Until(t, "the digest after removals", func() bool { return p.Status().Digest == w.digest() })
	if s := p.Status(); s.Nacks != 0 || !s.Connected || len(s.Waiting) > 0 {
		t.Errorf("status is %+v", s)
	}
}

// TestRefuseAndRecover proves that one bad resource takes neither the good
// ones of its response down nor the version of itself that is in force.
func TestRefuseAndRecover(t *testing.T) {
	w := newWorld(t)
	p := w.run()
	w.set("1", xdstest.Cluster("a"), xdstest.Endpoints("a", 1))
	xdstest.Until(t, "the first cluster", func() bool { return slices.Equal(p.ports("a"), []uint16{1}) })

	bad := xdstest.Cluster("a")
	bad.LbPolicy = cluster.Cluster_MAGLEV
	w.set("2", bad, xdstest.Cluster("b"), xdstest.Endpoints("a", 1), xdstest.Endpoints("b", 2))
	xdstest.Until(t, "the good one of a response with a bad one", func() bool { return slices.Equal(p.ports("b"), []uint16{2}) })
	xdstest.Until(t, "the NACK", func() bool { return len(w.refusals()) > 0 })
	if got := w.refusals()[0]; !strings.Contains(got, `clusters "a": lb_policy: "MAGLEV": no hash policy`) {
		t.Errorf("NACK says %q", got)
	}
	if c, ok := p.cluster("a"); !ok || c.Balance != "round_robin" {
		t.Errorf("in force is %+v", c)
	}
	if got := p.Status().Refused; len(got) != 1 || !strings.Contains(got[0], "MAGLEV") {
		t.Errorf("status says refused %q", got)
	}

	good := xdstest.Cluster("a")
	good.LbPolicy = cluster.Cluster_RANDOM
	w.set("3", good, xdstest.Cluster("b"), xdstest.Endpoints("a", 1), xdstest.Endpoints("b", 2))
	xdstest.Until(t, "the mended one", func() bool { c, _ := p.cluster("a"); return c.Balance == "random" })
	if got := p.Status(); len(got.Refused) != 0 || got.Nacks != 1 {
		t.Errorf("status is %+v", got)
	}
}

// TestCheckRefuses proves that who applies a plan can refuse what it cannot do.
func TestCheckRefuses(t *testing.T) {
	w := newWorld(t)
	p := w.run(func(o *xds.Options) {
		o.Check = func(v any) error {
			if c, ok := v.(*envoy.Cluster); ok && c.Balance != "round_robin" {
				return fmt.Errorf("lb_policy: %q: this proxy does not have it", c.Balance)
			}
			return nil
		}
	})
	least := xdstest.Cluster("a")
	least.LbPolicy = cluster.Cluster_LEAST_REQUEST
	w.set("1", least, xdstest.Cluster("b"), xdstest.Endpoints("b", 2))
	xdstest.Until(t, "the one that can be done", func() bool { return slices.Equal(p.ports("b"), []uint16{2}) })
	xdstest.Until(t, "the NACK", func() bool { return len(w.refusals()) == 1 })
	if got := w.refusals()[0]; got != `clusters "a": lb_policy: "least_request": this proxy does not have it` {
		t.Errorf("NACK says %q", got)
	}
}

// TestReconnect proves that state outlives the server, and that a server that
// comes back is told what is there and does not send it again.
func TestReconnect(t *testing.T) {
	w := newWorld(t)
	p := w.run()
	w.set("1", xdstest.Cluster("a"), xdstest.Endpoints("a", 1), xdstest.Cluster("b"), xdstest.Endpoints("b", 2), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "everything", func() bool { _, ok := p.listener("l"); return ok && len(p.plan().Clusters) == 2 })
	w.stop()
	xdstest.Until(t, "the client to notice", func() bool { return !p.Status().Connected })
	xdstest.Until(t, "some tries", func() bool { return p.Status().Attempts > 2 })
	if len(p.plan().Clusters) != 2 || len(p.plan().Listeners) != 1 {
		t.Errorf("while the server is away, the plan is %+v", p.plan())
	}

	// While it is away one is changed and one is removed.
	w.forget()
	w.set("2", xdstest.Cluster("a"), xdstest.Endpoints("a", 9), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	w.start()
	xdstest.Until(t, "what changed", func() bool { return slices.Equal(p.ports("a"), []uint16{9}) && len(p.plan().Clusters) == 1 })
	xdstest.Until(t, "the digest", func() bool { return p.Status().Digest == w.digest() })
	sent, removed := w.told()
	if !slices.Equal(sent, []string{"endpoints a"}) || !slices.Contains(removed, "clusters b") {
		t.Errorf("sent again %q, removed %q", sent, removed)
	}
	// The server may answer one kind before it reads the request for the next.
	xdstest.Until(t, "all six versions to be told", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		told := 0
		for _, r := range w.requests {
			told += len(r.InitialResourceVersions)
		}
		return told == 6
	})
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.requests[0].Node.GetId() != node {
		t.Errorf("first request %v", w.requests[0])
	}
}

// TestWarmUp proves that a cluster waits for endpoints, a listener for routes
// and their clusters, and that what is in force stays until then.
func TestWarmUp(t *testing.T) {
	w := newWorld(t)
	p := w.run(func(o *xds.Options) { o.Patience = time.Hour })
	w.set("1", xdstest.Cluster("a"), xdstest.Listener(t, "l", 80, "r"), xdstest.Listener(t, "m", 81, "s"), routes("r", "a"))
	want := []string{`clusters "a" waits for endpoints "a"`, `listeners "l" waits for clusters "a"`, `listeners "m" waits for routes "s"`}
	xdstest.Until(t, "all to wait for what is missing", func() bool { return slices.Equal(p.Status().Waiting, want) })
	if got := p.plan(); len(got.Clusters)+len(got.Listeners) > 0 {
		t.Errorf("in force before it is ready: %+v", got)
	}
	w.set("2", xdstest.Cluster("a"), xdstest.Endpoints("a", 1), xdstest.Listener(t, "l", 80, "r"), xdstest.Listener(t, "m", 81, "s"), routes("r", "a"), routes("s", "a"))
	xdstest.Until(t, "all to be ready", func() bool { return len(p.plan().Listeners) == 2 && len(p.Status().Waiting) == 0 })

	// Another name of endpoints: the one before stays until they are there.
	moved := xdstest.Cluster("a")
	moved.EdsClusterConfig.ServiceName = "a2"
	moved.LbPolicy = cluster.Cluster_RANDOM
	rest := []types.Resource{xdstest.Listener(t, "l", 80, "r2"), xdstest.Listener(t, "m", 81, "s"), routes("r", "a"), routes("s", "a")}
	w.set("3", append(rest, moved, xdstest.Endpoints("a", 1, 2))...)
	xdstest.Until(t, "the old ones' update", func() bool { return len(p.ports("a")) == 2 })
	xdstest.Until(t, "both to wait", func() bool { return len(p.Status().Waiting) == 2 })
	if c, _ := p.cluster("a"); c.Balance != "round_robin" || len(p.plan().Listeners) != 2 {
		t.Errorf("in force before its endpoints are known: %+v", p.plan())
	}
	w.set("4", append(rest, moved, xdstest.Endpoints("a2", 7), routes("r2", "a"))...)
	xdstest.Until(t, "the new ones", func() bool {
		c, _ := p.cluster("a")
		return c.Balance == "random" && slices.Equal(p.ports("a"), []uint16{7}) && len(p.Status().Waiting) == 0
	})
}

// TestPatience proves that a cluster that never gets ready holds up a listener
// for some time only.
func TestPatience(t *testing.T) {
	w := newWorld(t)
	p := w.run(func(o *xds.Options) { o.Patience = 50 * time.Millisecond })
	w.set("1", xdstest.Cluster("a"), xdstest.Listener(t, "l", 80, "r"), routes("r", "a"))
	xdstest.Until(t, "the listener nevertheless", func() bool { _, ok := p.listener("l"); return ok })
	if _, ok := p.cluster("a"); ok {
		t.Error("a cluster without known endpoints is in force")
	}
}

// TestOnDemand proves that only clusters somebody speaks of are asked for.
func TestOnDemand(t *testing.T) {
	w := newWorld(t)
	p := w.run(func(o *xds.Options) { o.OnDemand = true })
	all := []types.Resource{xdstest.Listener(t, "l", 80, "r")}
	for _, n := range names("c", 50) {
		all = append(all, xdstest.Cluster(n), xdstest.Endpoints(n, 5))
	}
	w.set("1", append(all, routes("r", "c-7"))...)
	xdstest.Until(t, "the listener", func() bool { _, ok := p.listener("l"); return ok })
	if got := p.plan().Clusters; len(got) != 1 || got[0].Name != "c-7" {
		t.Errorf("clusters are %+v", got)
	}
	release, err := p.Want("c-9")
	if err != nil {
		t.Fatal(err)
	}
	xdstest.Until(t, "a wanted one", func() bool { return slices.Equal(p.ports("c-9"), []uint16{5}) })
	w.set("2", append(all, routes("r", "c-8"))...)
	xdstest.Until(t, "another route's, and not the first", func() bool {
		_, old := p.cluster("c-7")
		return len(p.ports("c-8")) == 1 && !old
	})
	release()
	release()
	xdstest.Until(t, "the wanted one to leave", func() bool { return len(p.plan().Clusters) == 1 })
	sent, _ := w.told()
	for _, s := range sent {
		if strings.HasPrefix(s, "clusters ") && !slices.Contains([]string{"clusters c-7", "clusters c-8", "clusters c-9"}, s) {
			t.Errorf("sent %q, which nobody asked for", s)
		}
	}
	if _, err := p.Want("*"); err == nil {
		t.Error("all clusters can be wanted as if they were one")
	}
}

func TestManyEndpoints(t *testing.T) {
	w := newWorld(t)
	p := w.run()
	ports := make([]uint32, 5000)
	for i := range ports {
		ports[i] = uint32(i + 1)
	}
	w.set("1", xdstest.Cluster("a"), xdstest.Endpoints("a", ports...))
	xdstest.Until(t, "5,000 endpoints of one cluster", func() bool { return len(p.ports("a")) == 5000 })

	all := []types.Resource{xdstest.Cluster("a"), xdstest.Endpoints("a", ports...)}
	for _, n := range names("c", 5000) {
		all = append(all, xdstest.Cluster(n), xdstest.Endpoints(n, 1))
	}
	w.set("2", all...)
	xdstest.Until(t, "5,000 clusters", func() bool { return len(p.plan().Clusters) == 5001 })
	xdstest.Until(t, "the digest", func() bool { return p.Status().Digest == w.digest() })
	w.forget()
	all[3] = xdstest.Endpoints("c-0", 2)
	w.set("3", all...)
	xdstest.Until(t, "one of 5,000", func() bool { return slices.Equal(p.ports("c-0"), []uint16{2}) })
	if sent, _ := w.told(); !slices.Equal(sent, []string{"endpoints c-0"}) {
		t.Errorf("sent %d resources for one that changed: %.200q", len(sent), sent)
	}
}

// TestManyUpdates proves that of a flood of updates the last one is in force,
// though who applies them is slower than they come.
func TestManyUpdates(t *testing.T) {
	w := newWorld(t)
	var at atomic.Int32
	var most atomic.Int32
	p := w.run(func(o *xds.Options) {
		apply := o.Apply
		o.Apply = func(ctx context.Context, next *plan.Proxy) error {
			most.Store(max(most.Load(), at.Add(1)))
			defer at.Add(-1)
			time.Sleep(30 * time.Millisecond)
			return apply(ctx, next)
		}
	})
	const updates = 300
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for i := range updates {
		<-tick.C
		w.set(fmt.Sprint(i), xdstest.Cluster("a"), xdstest.Endpoints("a", uint32(i+1)))
	}
	xdstest.Until(t, "the last", func() bool { return slices.Equal(p.ports("a"), []uint16{updates}) })
	xdstest.Until(t, "its digest", func() bool { return p.Status().Digest == w.digest() })
	if most.Load() != 1 {
		t.Errorf("%d plans applied at once", most.Load())
	}
}

// TestApplyAgain proves that a plan that could not be applied is not called
// applied, and that the next one is.
func TestApplyAgain(t *testing.T) {
	w := newWorld(t)
	var broken atomic.Bool
	broken.Store(true)
	p := w.run(func(o *xds.Options) {
		apply := o.Apply
		o.Apply = func(ctx context.Context, next *plan.Proxy) error {
			if broken.Load() {
				return errors.New("port taken")
			}
			return apply(ctx, next)
		}
	})
	w.set("1", xdstest.Cluster("a"), xdstest.Endpoints("a", 1))
	xdstest.Until(t, "the error", func() bool { return p.Status().ApplyError == "port taken" })
	if s := p.Status(); s.Applied != 0 || s.Digest != "" {
		t.Errorf("status is %+v", s)
	}
	broken.Store(false)
	xdstest.Until(t, "the same plan again", func() bool { return slices.Equal(p.ports("a"), []uint16{1}) })
	xdstest.Until(t, "the digest", func() bool { return p.Status().Digest == w.digest() })
}

func TestNew(t *testing.T) {
	w := newWorld(t)
	for _, c := range []struct {
		change func(*xds.Options)
		want   string
	}{
		{func(o *xds.Options) { o.Server = "" }, "no server"},
		{func(o *xds.Options) { o.Credentials = nil }, "no credentials"},
		{func(o *xds.Options) { o.Node.ID = "" }, "no node id"},
		{func(o *xds.Options) { o.Apply = nil }, "nobody applies"},
	} {
		o := w.options()
		o.Apply = func(context.Context, *plan.Proxy) error { return nil }
		c.change(&o)
		if _, err := xds.New(o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

// TestNothingIsLeft proves that a client that ended has no goroutine left,
// whatever it was doing.
func TestNothingIsLeft(t *testing.T) {
	before := runtime.NumGoroutine()
	w := newWorld(t)
	for i := range 10 {
		if i == 5 {
			w.stop()
		}
		p := w.run()
		w.set(fmt.Sprint(i), xdstest.Cluster("a"), xdstest.Endpoints("a", 1))
		xdstest.Until(t, "something", func() bool { return p.Status().Connected || p.Status().Attempts > 1 })
		p.stop()
	}
	xdstest.Until(t, "all goroutines to end", func() bool { return runtime.NumGoroutine() <= before })
}
