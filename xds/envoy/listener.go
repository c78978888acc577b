package envoy

import (
	"fmt"
	"math"
	"strings"

	listener "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	router "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	inspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	hcm "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"

	"hauberk.dev/plan"
)

func (r *reader) listener(l *listener.Listener) *Listener {
	out := &Listener{Listener: plan.Listener{Name: l.Name, Address: r.address("address", l.Address, true)}}
	for i, f := range l.ListenerFilters {
		// The server name is looked at wherever a chain asks for one.
		at := fmt.Sprintf("listener_filters[%d].typed_config", i)
		if !r.into(at, f.GetTypedConfig(), &inspector.TlsInspector{}) {
			r.refuse(at, f.GetTypedConfig().GetTypeUrl(), "held is TlsInspector")
		}
	}
	for i, c := range l.FilterChains {
		r.chain(out, fmt.Sprintf("filter_chains[%d]", i), c)
	}
	if c := l.DefaultFilterChain; c != nil {
		if c.FilterChainMatch != nil {
			r.refuse("default_filter_chain.filter_chain_match", "", "the default chain matches what no other does")
		}
		r.chain(out, "default_filter_chain", c)
	}
	r.chains(out)
	out.Clusters = r.names
	return out
}

// chains checks that for each connection it is clear which chain it takes.
func (r *reader) chains(l *Listener) {
	if len(l.Chains) == 0 {
		r.refuse("filter_chains", "", "a listener without a chain serves nobody")
		return
	}
	ends := l.Chains[0].TLS != nil
	rest := false
	seen := map[string]bool{}
	for i, c := range l.Chains {
		at := fmt.Sprintf("filter_chains[%d]", i)
		if ends != (c.TLS != nil) {
			r.refuse(at+".transport_socket", "", "some chains end TLS and others do not")
		}
		if len(c.ServerNames) == 0 && rest {
			r.refuse(at+".filter_chain_match", "", "another chain takes every connection already")
		}
		rest = rest || len(c.ServerNames) == 0
		if len(c.ServerNames) > 0 && c.TLS == nil && c.HTTP != nil {
			r.refuse(at+".filter_chain_match.server_names", c.ServerNames[0], "a server name is of TLS, and this chain serves HTTP without it")
		}
		for _, n := range c.ServerNames {
			if seen[n] {
				r.refuse(at+".filter_chain_match.server_names", n, "another chain has it")
			}
			seen[n] = true
		}
	}
}

func (r *reader) chain(l *Listener, at string, c *listener.FilterChain) {
	out := plan.Chain{TLS: r.serverTLS(at+".transport_socket", c.TransportSocket)}
	m := c.GetFilterChainMatch()
	for _, n := range m.GetServerNames() {
		if !domain(strings.TrimPrefix(n, "*.")) {
			r.refuse(at+".filter_chain_match.server_names", n, "no name of a host, nor *. and one")
		}
		out.ServerNames = append(out.ServerNames, strings.ToLower(n))
	}
	switch p := m.GetTransportProtocol(); {
	case p == "", p == "tls" && len(out.ServerNames) > 0:
	default:
		r.refuse(at+".filter_chain_match.transport_protocol", p, "held is tls beside server_names")
	}
	routes := ""
	at += ".filters"
	if len(c.Filters) != 1 {
		r.refuse(at, fmt.Sprint(len(c.Filters)), "want one: HttpConnectionManager or TcpProxy")
	} else {
		at += "[0].typed_config"
		a := c.Filters[0].GetTypedConfig()
		http, bytes := &hcm.HttpConnectionManager{}, &tcp.TcpProxy{}
		switch {
		case r.into(at, a, http):
			out.HTTP, routes = r.http(at, http)
		case r.into(at, a, bytes):
			out.TCP = r.tcp(at, bytes)
		default:
			r.refuse(at, a.GetTypeUrl(), "held are HttpConnectionManager and TcpProxy")
		}
	}
	l.Chains = append(l.Chains, out)
	l.Routes = append(l.Routes, routes)
}

func (r *reader) http(at string, m *hcm.HttpConnectionManager) (out *plan.HTTP, routes string) {
	out = &plan.HTTP{}
	switch m.CodecType {
	case hcm.HttpConnectionManager_AUTO:
	case hcm.HttpConnectionManager_HTTP1:
		out.Codec = "http1"
	case hcm.HttpConnectionManager_HTTP2:
		out.Codec = "http2"
	default:
		r.refuse(at+".codec_type", m.CodecType.String(), "held are AUTO, HTTP1 and HTTP2")
	}
	r.httpFilters(at+".http_filters", m.HttpFilters)
	switch s := m.RouteSpecifier.(type) {
	case *hcm.HttpConnectionManager_Rds:
		r.adsOnly(at+".rds.config_source", s.Rds.GetConfigSource(), true)
		return out, r.name(at+".rds.route_config_name", s.Rds.GetRouteConfigName())
	case *hcm.HttpConnectionManager_RouteConfig:
		out.Hosts = r.hosts(at+".route_config.virtual_hosts", s.RouteConfig.GetVirtualHosts())
	default:
		r.refuse(at+".route_specifier", "", "want rds or route_config")
	}
	return out, ""
}

// httpFilters wants the router and nothing that would do more. What says of
// itself that it may be left out is left out.
func (r *reader) httpFilters(at string, filters []*hcm.HttpFilter) {
	last := len(filters) - 1
	for i, f := range filters {
		field := fmt.Sprintf("%s[%d].typed_config", at, i)
		is := r.into(field, f.GetTypedConfig(), &router.Router{})
		switch {
		case is && i != last:
			r.refuse(field, f.Name, "the router must be the last filter")
		case is && f.Disabled:
			r.refuse(field, f.Name, "the router is needed")
		case is, f.IsOptional && i != last, f.Disabled && i != last:
		default:
			r.refuse(field, f.GetTypedConfig().GetTypeUrl(), "held is Router, as the last one")
		}
	}
	if last < 0 {
		r.refuse(at, "", "want Router")
	}
}

func (r *reader) tcp(at string, t *tcp.TcpProxy) *plan.TCP {
	switch s := t.ClusterSpecifier.(type) {
	case *tcp.TcpProxy_Cluster:
		return &plan.TCP{To: []plan.Weighted{{Cluster: r.toCluster(at+".cluster", s.Cluster), Weight: 1}}}
	case *tcp.TcpProxy_WeightedClusters:
		w := weights{r: r, at: at + ".weighted_clusters.clusters"}
		for _, c := range s.WeightedClusters.GetClusters() {
			w.add(c.Name, c.Weight)
		}
		return &plan.TCP{To: w.done()}
	}
	r.refuse(at+".cluster_specifier", "", "want cluster or weighted_clusters")
	return nil
}

// weights collects clusters and their shares.
type weights struct {
	r     *reader
	at    string
	to    []plan.Weighted
	total uint64
}

func (w *weights) add(cluster string, weight uint32) {
	w.r.toCluster(w.at+".name", cluster)
	if weight == 0 {
		return // nothing goes there
	}
	w.total += uint64(weight)
	w.to = append(w.to, plan.Weighted{Cluster: cluster, Weight: weight})
}

func (w *weights) done() []plan.Weighted {
	if w.total == 0 || w.total > math.MaxUint32 {
		w.r.refuse(w.at, fmt.Sprint(w.total), "the weights are not 1 to 2^32 in all")
	}
	return w.to
}

// domain says whether a text can be the name of a host, port aside.
func domain(name string) bool {
	if name == "" || len(name) > 253 {
		return false
	}
	return !strings.ContainsFunc(name, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && !strings.ContainsRune("-_.", c)
	})
}
