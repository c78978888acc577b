package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/server/v3"
	"google.golang.org/grpc"

	"hauberk.dev/mesh/alone"
	"hauberk.dev/xds/envoy"
	"hauberk.dev/xds/xdstest"
)

const nodeID = "proxy-1"

// plane is go-control-plane's own server.
type plane struct {
	t       *testing.T
	cache   cache.SnapshotCache
	network string
	address string
	options []grpc.ServerOption
	stop    func()

	mu    sync.Mutex
	nacks []string
	sent  []string // "kind name" of each resource
	asked []string // "kind name" of each subscription
	acks  []envoy.Kind
	onAck func(envoy.Kind) // before the server knows
}

func newPlane(t *testing.T, network, address string, options ...grpc.ServerOption) *plane {
	t.Helper()
	p := &plane{t: t, cache: cache.NewSnapshotCache(true, cache.IDHash{}, nil), network: network, address: address, options: options}
	p.start()
	t.Cleanup(func() { p.stop() })
	return p
}

func (p *plane) start() {
	p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ads := server.NewServer(ctx, p.cache, server.CallbackFuncs{
		StreamDeltaRequestFunc: p.request,
		StreamDeltaResponseFunc: func(_ int64, _ *discovery.DeltaDiscoveryRequest, r *discovery.DeltaDiscoveryResponse) {
			p.mu.Lock()
			defer p.mu.Unlock()
			kind, _ := envoy.KindOf(r.TypeUrl)
			for _, res := range r.Resources {
				p.sent = append(p.sent, kind.String()+" "+res.Name)
			}
		},
	})
	var stop func()
	p.address, stop = xdstest.Serve(p.t, p.network, p.address, ads, p.options...)
	p.stop = sync.OnceFunc(func() {
		cancel()
		stop()
	})
}

func (p *plane) request(_ int64, r *discovery.DeltaDiscoveryRequest) error {
	kind, _ := envoy.KindOf(r.TypeUrl)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, name := range r.ResourceNamesSubscribe {
		p.asked = append(p.asked, kind.String()+" "+name)
	}
	switch {
	case r.ErrorDetail != nil:
		p.nacks = append(p.nacks, r.ErrorDetail.Message)
	case r.ResponseNonce != "":
		p.acks = append(p.acks, kind)
		if p.onAck != nil {
			p.onAck(kind)
		}
	}
	return nil
}

func (p *plane) refusals() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]string(nil), p.nacks...)
}

func (p *plane) set(version string, resources ...types.Resource) {
	p.t.Helper()
	xdstest.Set(p.t, p.cache, nodeID, version, resources...)
}

// rig is a proxy, the program beside it, and their files.
type rig struct {
	t         *testing.T
	dir       string
	config    *config
	stopProxy func()
	stopXDS   func()
}

func newRig(t *testing.T, change func(*config)) *rig {
	t.Helper()
	dir, err := os.MkdirTemp("", "hx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{t: t, dir: dir, stopProxy: func() {}, stopXDS: func() {}}
	r.config = &config{Version: 1, Node: node{ID: nodeID}, Proxy: proxy{Admin: dir + "/admin", File: dir + "/proxy.yaml"}, Status: dir + "/status"}
	change(r.config)
	if faults := r.config.faults(); len(faults) > 0 {
		t.Fatal(faults)
	}
	if err := r.config.readBase(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.stopXDS(); r.stopProxy() })
	return r
}

func (r *rig) startXDS() {
	r.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, r.config, slog.New(slog.DiscardHandler)) }()
	r.stopXDS = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("hauberk-xds: %v", err)
		}
	})
	xdstest.Until(r.t, "the first file", func() bool { _, err := os.Stat(r.config.Proxy.File); return err == nil })
}

// startProxy starts the real proxy from its file.
func (r *rig) startProxy() {
	r.t.Helper()
	c, err := alone.Load(r.config.Proxy.File)
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := alone.Open(c, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	r.stopProxy = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			r.t.Errorf("proxy: %v", err)
		}
	})
}

// fresh asks on a connection of its own.
var fresh = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}

// get is the body of an answer, or why there is none.
func get(client *http.Client, url string) string {
	r, err := client.Get(url)
	if err != nil {
		return err.Error()
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return err.Error()
	}
	if r.StatusCode != http.StatusOK {
		return fmt.Sprint(r.StatusCode)
	}
	return string(b)
}

// backend answers with its name and the path it was asked for.
func backend(t *testing.T, name string) (port uint32) {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, name+" "+r.URL.Path+" "+r.Header.Get("X-Edit"))
	}))
	t.Cleanup(s.Close)
	return uint32(s.Listener.Addr().(*net.TCPAddr).Port)
}

func freePort(t *testing.T) uint32 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return uint32(ln.Addr().(*net.TCPAddr).Port)
}

// What follows makes resources.

// routes sends /NAME to the cluster of that name, and says so in a header.
func routes(name, edit string, clusters ...string) *route.RouteConfiguration {
	host := &route.VirtualHost{Name: "all", Domains: []string{"*"}}
	for _, c := range clusters {
		host.Routes = append(host.Routes, &route.Route{
			Match: &route.RouteMatch{PathSpecifier: &route.RouteMatch_Prefix{Prefix: "/" + c}},
			Action: &route.Route_Route{Route: &route.RouteAction{
				ClusterSpecifier: &route.RouteAction_Cluster{Cluster: c}, PrefixRewrite: "/to-" + c}},
			RequestHeadersToAdd: []*core.HeaderValueOption{{Header: &core.HeaderValue{Key: "X-Edit", Value: edit}}},
		})
	}
	return &route.RouteConfiguration{Name: name, VirtualHosts: []*route.VirtualHost{host}}
}

func socketOf(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "cp")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}
