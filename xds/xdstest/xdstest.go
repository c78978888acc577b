// Package xdstest serves ADS to tests by go-control-plane's own server, and makes
// resources for it to tell.
//
// What a proxy is told, and what must become of it, is the tests' to say.
package xdstest

import (
	"context"
	"net"
	"testing"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/envoyproxy/go-control-plane/pkg/cache/types"
	"github.com/envoyproxy/go-control-plane/pkg/cache/v3"
	"github.com/envoyproxy/go-control-plane/pkg/resource/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// Until polls for a condition, with a bound that a loaded machine meets.
func Until(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !cond(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// Serve serves ADS at an address until stop is called, and says where that is.
func Serve(t testing.TB, network, address string, ads discovery.AggregatedDiscoveryServiceServer, options ...grpc.ServerOption) (at string, stop func()) {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(options...)
	discovery.RegisterAggregatedDiscoveryServiceServer(srv, ads)
	done := make(chan struct{})
	go func() {
		defer close(done)
		srv.Serve(ln)
	}()
	return ln.Addr().String(), func() {
		srv.Stop()
		<-done
	}
}

// Set has a node told these resources, and no others.
func Set(t testing.TB, to cache.SnapshotCache, node, version string, resources ...types.Resource) {
	t.Helper()
	byType := map[resource.Type][]types.Resource{}
	for _, r := range resources {
		url := "type.googleapis.com/" + string(r.ProtoReflect().Descriptor().FullName())
		byType[url] = append(byType[url], r)
	}
	s, err := cache.NewSnapshot(version, byType)
	if err != nil {
		t.Fatal(err)
	}
	// Else the server's own goroutines would, while a test reads it.
	if err := s.ConstructVersionMap(); err != nil {
		t.Fatal(err)
	}
	if err := to.SetSnapshot(context.Background(), node, s); err != nil {
		t.Fatal(err)
	}
}

// ADS says that a resource is told on the same stream.
func ADS() *core.ConfigSource {
	return &core.ConfigSource{
		ResourceApiVersion:    core.ApiVersion_V3,
		ConfigSourceSpecifier: &core.ConfigSource_Ads{Ads: &core.AggregatedConfigSource{}},
	}
}

// Any wraps a message.
func Any(t testing.TB, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// Cluster has the endpoints that are told under its name.
func Cluster(name string) *cluster.Cluster {
	return &cluster.Cluster{
		Name: name, ClusterDiscoveryType: &cluster.Cluster_Type{Type: cluster.Cluster_EDS},
		EdsClusterConfig: &cluster.Cluster_EdsClusterConfig{EdsConfig: ADS()},
	}
}

// Endpoints of a cluster, at ports of 127.0.0.1.
func Endpoints(name string, ports ...uint32) *endpoint.ClusterLoadAssignment {
	group := &endpoint.LocalityLbEndpoints{}
	for _, p := range ports {
		group.LbEndpoints = append(group.LbEndpoints, &endpoint.LbEndpoint{
			HostIdentifier: &endpoint.LbEndpoint_Endpoint{Endpoint: &endpoint.Endpoint{Address: address(p)}},
		})
	}
	return &endpoint.ClusterLoadAssignment{ClusterName: name, Endpoints: []*endpoint.LocalityLbEndpoints{group}}
}

func address(port uint32) *core.Address {
	return &core.Address{Address: &core.Address_SocketAddress{SocketAddress: &core.SocketAddress{
		Address: "127.0.0.1", PortSpecifier: &core.SocketAddress_PortValue{PortValue: port},
	}}}
}

// Listener speaks HTTP at a port of 127.0.0.1, by the routes of a name.
func Listener(t testing.TB, name string, port uint32, routes string) *listener.Listener {
	t.Helper()
	manager := &hcm.HttpConnectionManager{
		StatPrefix:     "x",
		RouteSpecifier: &hcm.HttpConnectionManager_Rds{Rds: &hcm.Rds{ConfigSource: ADS(), RouteConfigName: routes}},
		HttpFilters:    []*hcm.HttpFilter{{Name: "router", ConfigType: &hcm.HttpFilter_TypedConfig{TypedConfig: Any(t, &router.Router{})}}},
	}
	return &listener.Listener{Name: name, Address: address(port), FilterChains: []*listener.FilterChain{{
		Filters: []*listener.Filter{{Name: "http", ConfigType: &listener.Filter_TypedConfig{TypedConfig: Any(t, manager)}}},
	}}}
}
