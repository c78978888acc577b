package xds_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"hauberk.dev/plan"
	"hauberk.dev/xds"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/xdstest"
)

const node = "proxy-1"

// world is go-control-plane's own server, which notes what is said.
type world struct {
	t      *testing.T
	cache  cache.SnapshotCache
	socket string
	stop   func()

	mu       sync.Mutex
	requests []*discovery.DeltaDiscoveryRequest
	sent     []string // "kind name" of each resource
	removed  []string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "xds")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, cache: cache.NewSnapshotCache(true, cache.IDHash{}, nil), socket: filepath.Join(dir, "s")}
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

// start serves on the socket until stop.
func (w *world) start() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ads := server.NewServer(ctx, w.cache, server.CallbackFuncs{
		StreamDeltaRequestFunc: func(_ int64, r *discovery.DeltaDiscoveryRequest) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.requests = append(w.requests, proto.CloneOf(r))
			return nil
		},
		StreamDeltaResponseFunc: func(_ int64, _ *discovery.DeltaDiscoveryRequest, r *discovery.DeltaDiscoveryResponse) {
			w.mu.Lock()
			defer w.mu.Unlock()
			kind, _ := envoy.KindOf(r.TypeUrl)
			for _, res := range r.Resources {
				w.sent = append(w.sent, kind.String()+" "+res.Name)
			}
			for _, name := range r.RemovedResources {
				w.removed = append(w.removed, kind.String()+" "+name)
			}
		},
	})
	_, wait := xdstest.Serve(w.t, "unix", w.socket, ads)
	w.stop = sync.OnceFunc(func() {
		cancel()
		wait()
	})
}

// forget clears what was noted.
func (w *world) forget() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.requests, w.sent, w.removed = nil, nil, nil
}

func (w *world) told() (sent, removed []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	slices.Sort(w.sent)
	return slices.Clone(w.sent), slices.Clone(w.removed)
}

// refusals are the details of all NACKs.
func (w *world) refusals() (all []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range w.requests {
		if r.ErrorDetail != nil {
			all = append(all, r.ErrorDetail.Message)
		}
	}
	return all
}

// set makes the server tell these resources, and no others.
func (w *world) set(version string, resources ...types.Resource) {
	w.t.Helper()
	xdstest.Set(w.t, w.cache, node, version, resources...)
}

// digest is what the server works out of what it serves.
func (w *world) digest() string {
	w.t.Helper()
	s, err := w.cache.GetSnapshot(node)
	if err != nil {
		w.t.Fatal(err)
	}
	var all []xds.Resource
	for kind := range envoy.Kinds {
		versions := s.GetVersionMap(kind.URL())
		for name, r := range s.GetResources(kind.URL()) {
			body, err := cache.MarshalResource(r)
			if err != nil {
				w.t.Fatal(err)
			}
			all = append(all, xds.Resource{Type: kind.URL(), Name: name, Version: versions[name], Body: body})
		}
	}
	return xds.Digest(all)
}

// proxy is a client, and the plan it applied last.
type proxy struct {
	*xds.Client
	stop func()

	mu    sync.Mutex
	last  *plan.Proxy
	plans int
}

func (w *world) options() xds.Options {
	return xds.Options{
		Server: "unix://" + w.socket, Credentials: insecure.NewCredentials(), Node: xds.Node{ID: node, Cluster: "c"},
		RetryMin: 5 * time.Millisecond, RetryMax: 50 * time.Millisecond,
	}
}

// run starts a client that ends with the test.
func (w *world) run(change ...func(*xds.Options)) *proxy {
	w.t.Helper()
	p := &proxy{}
	o := w.options()
	o.Apply = func(_ context.Context, next *plan.Proxy) error {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.last, p.plans = next, p.plans+1
		return nil
	}
	for _, f := range change {
		f(&o)
	}
	c, err := xds.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	p.Client = c
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- c.Run(ctx) }()
	p.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("run: %v", err)
		}
	})
	w.t.Cleanup(p.stop)
	return p
}

func (p *proxy) plan() plan.Proxy {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last == nil {
		return plan.Proxy{}
	}
	return *p.last
}

func (p *proxy) listener(name string) (plan.Listener, bool) {
	all := p.plan().Listeners
	i := slices.IndexFunc(all, func(l plan.Listener) bool { return l.Name == name })
	if i < 0 {
		return plan.Listener{}, false
	}
	return all[i], true
}

func (p *proxy) cluster(name string) (plan.Cluster, bool) {
	all := p.plan().Clusters
	i := slices.IndexFunc(all, func(c plan.Cluster) bool { return c.Name == name })
	if i < 0 {
		return plan.Cluster{}, false
	}
	return all[i], true
}

// ports of a cluster's endpoints.
func (p *proxy) ports(name string) (ports []uint16) {
	c, _ := p.cluster(name)
	for _, u := range c.Upstreams {
		ports = append(ports, u.Address.Port())
	}
	return ports
}

// What follows makes resources.

func routes(name string, clusters ...string) *route.RouteConfiguration {
	host := &route.VirtualHost{Name: "all", Domains: []string{"*"}}
	for _, c := range clusters {
		host.Routes = append(host.Routes, &route.Route{
			Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/" + c}},
			Action: &route.Route_Route{Route: &route.RouteAction{
				ClusterSpecifier: &route.RouteAction_Cluster{Cluster: c}}},
		})
	}
	return &route.RouteConfiguration{Name: name, VirtualHosts: []*route.VirtualHost{host}}
}

func names(kind string, n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("%s-%d", kind, i))
	}
	return all
}
