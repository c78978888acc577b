package envoy

import (
	"fmt"
	"math"
	"net/netip"
	"time"

	cluster "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpoint "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	http "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/plan"
)

// What Envoy takes an absent field to mean.
const (
	connectTimeout = 5 * time.Second
	maxConnections = 1024 // and pending requests, and requests
	maxRetries     = 3
	maxDuration    = 365 * 24 * time.Hour
)

const httpOptions = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

func (r *reader) cluster(c *cluster.Cluster) *Cluster {
	out := &Cluster{Cluster: plan.Cluster{
		Name:           c.Name,
		Balance:        r.balance(c.LbPolicy),
		ConnectTimeout: connectTimeout,
		HTTP2:          r.http2(c),
		TLS:            r.clientTLS("transport_socket", c.TransportSocket),
		Limits:         r.limits(c.CircuitBreakers),
	}}
	if c.ConnectTimeout != nil {
		out.ConnectTimeout = r.duration("connect_timeout", c.ConnectTimeout)
		if out.ConnectTimeout == 0 {
			r.refuse("connect_timeout", "0s", "no connection is made in no time")
		}
	}
	switch c.GetType() {
	case cluster.Cluster_EDS:
		r.adsOnly("eds_cluster_config.eds_config", c.GetEdsClusterConfig().GetEdsConfig(), true)
		out.Endpoints = c.GetEdsClusterConfig().GetServiceName()
		if out.Endpoints == "" {
			out.Endpoints = c.Name
		}
		r.name("eds_cluster_config.service_name", out.Endpoints)
		if c.LoadAssignment != nil {
			r.refuse("load_assignment", c.LoadAssignment.ClusterName, "a cluster of type EDS has its endpoints elsewhere")
		}
	case cluster.Cluster_STATIC:
		out.Upstreams = r.upstreams("load_assignment.endpoints", c.LoadAssignment.GetEndpoints())
		if c.EdsClusterConfig != nil {
			r.refuse("eds_cluster_config", c.EdsClusterConfig.ServiceName, "only a cluster of type EDS has it")
		}
	default:
		r.refuse("type", c.GetType().String(), "held are STATIC and EDS: names are not resolved here")
	}
	return out
}

func (r *reader) balance(p cluster.Cluster_LbPolicy) string {
	switch p {
	case cluster.Cluster_ROUND_ROBIN:
		return "round_robin"
	case cluster.Cluster_LEAST_REQUEST:
		return "least_request"
	case cluster.Cluster_RANDOM:
		return "random"
	case cluster.Cluster_RING_HASH, cluster.Cluster_MAGLEV:
		r.refuse("lb_policy", p.String(), "no hash policy of a route is held that it could hash")
	default:
		r.refuse("lb_policy", p.String(), "held are ROUND_ROBIN, LEAST_REQUEST and RANDOM")
	}
	return ""
}

// http2 says whether the upstreams are spoken to in HTTP/2.
func (r *reader) http2(c *cluster.Cluster) bool {
	//lint:ignore SA1019 control planes still say it so
	two := c.GetHttp2ProtocolOptions() != nil
	for key, a := range c.GetTypedExtensionProtocolOptions() {
		field := fmt.Sprintf("typed_extension_protocol_options[%q]", show128(key))
		o := &http.HttpProtocolOptions{}
		if key != httpOptions || !r.into(field, a, o) {
			r.refuse(field, a.GetTypeUrl(), "held is "+httpOptions)
			continue
		}
		switch o.GetExplicitHttpConfig().GetProtocolConfig().(type) {
		case *http.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions:
			two = true
		case *http.HttpProtocolOptions_ExplicitHttpConfig_HttpProtocolOptions:
		default:
			r.refuse(field+".explicit_http_config", "", "want http_protocol_options or http2_protocol_options")
		}
	}
	return two
}

func show128(s string) string {
	if len(s) > 128 {
		return s[:128] + "..."
	}
	return s
}

func (r *reader) limits(b *cluster.CircuitBreakers) plan.Limits {
	l := plan.Limits{Connections: maxConnections, Pending: maxConnections, Requests: maxConnections, Retries: maxRetries}
	if len(b.GetThresholds()) > 1 {
		r.refuse("circuit_breakers.thresholds", fmt.Sprint(len(b.Thresholds)), "one is held: requests have one priority")
		return l
	}
	for _, t := range b.GetThresholds() {
		override(&l.Connections, t.MaxConnections)
		override(&l.Pending, t.MaxPendingRequests)
		override(&l.Requests, t.MaxRequests)
		override(&l.Retries, t.MaxRetries)
	}
	return l
}

func override(to *uint32, v *wrapperspb.UInt32Value) {
	if v != nil {
		*to = v.Value
	}
}

func (r *reader) endpoints(c *endpoint.ClusterLoadAssignment) *EndpointTable {
	return &EndpointTable{Name: c.ClusterName, Upstreams: r.upstreams("endpoints", c.Endpoints)}
}

func (r *reader) upstreams(field string, groups []*endpoint.LocalityLbEndpoints) (ups []plan.Upstream) {
	total := map[uint32]uint64{}
	seen := map[netip.AddrPort]bool{}
	for i, g := range groups {
		at := fmt.Sprintf("%s[%d]", field, i)
		if g.Priority > 127 {
			r.refuse(at+".priority", fmt.Sprint(g.Priority), "above 127")
		}
		for j, e := range g.LbEndpoints {
			at := fmt.Sprintf("%s.lb_endpoints[%d]", at, j)
			u := plan.Upstream{
				Address: r.address(at+".endpoint.address", e.GetEndpoint().GetAddress(), false),
				Weight:  1, Priority: g.Priority, Zone: g.GetLocality().GetZone(),
				Health: r.health(at+".health_status", e.HealthStatus),
			}
			override(&u.Weight, e.LoadBalancingWeight)
			if u.Weight == 0 {
				r.refuse(at+".load_balancing_weight", "0", "want at least 1")
			}
			if total[g.Priority] += uint64(u.Weight); total[g.Priority] > math.MaxUint32 {
				r.refuse(at+".load_balancing_weight", fmt.Sprint(u.Weight), "the weights of this priority are above 2^32 in all")
			}
			if seen[u.Address] {
				r.refuse(at+".endpoint.address", u.Address.String(), "listed twice")
			}
			seen[u.Address] = true
			if r.more > 0 {
				return nil
			}
			ups = append(ups, u)
		}
	}
	return ups
}

func (r *reader) health(field string, h core.HealthStatus) string {
	switch h {
	case core.HealthStatus_UNKNOWN, core.HealthStatus_HEALTHY:
		return "healthy"
	case core.HealthStatus_DRAINING:
		return "draining"
	case core.HealthStatus_UNHEALTHY, core.HealthStatus_TIMEOUT:
		return "unhealthy"
	}
	r.refuse(field, h.String(), "not held")
	return ""
}

// address is an IP address and a port; of a listener, port 0 or the address of
// all interfaces may be meant.
func (r *reader) address(field string, a *core.Address, listens bool) netip.AddrPort {
	s := a.GetSocketAddress()
	if s == nil {
		r.refuse(field, "", "want socket_address")
		return netip.AddrPort{}
	}
	if s.Protocol != core.SocketAddress_TCP {
		r.refuse(field+".protocol", s.Protocol.String(), "held is TCP")
	}
	ip, err := netip.ParseAddr(s.Address)
	if err != nil || ip.Zone() != "" {
		r.refuse(field+".address", s.Address, "no IP address: names are not resolved here")
	} else if ip.IsUnspecified() && !listens || ip.IsMulticast() {
		r.refuse(field+".address", s.Address, "nobody can be called there")
	}
	port := s.GetPortValue()
	if port == 0 || port > math.MaxUint16 {
		r.refuse(field+".port_value", fmt.Sprint(port), "no port")
	}
	return netip.AddrPortFrom(ip, uint16(port))
}

// adsOnly refuses a source of configuration that is not this stream.
func (r *reader) adsOnly(field string, c *core.ConfigSource, must bool) {
	switch {
	case c.GetAds() != nil || c.GetSelf() != nil:
	case c == nil && !must:
	default:
		r.refuse(field, "", "held is ads: there is one stream to one server")
	}
}

func (r *reader) duration(field string, d *durationpb.Duration) time.Duration {
	if d.CheckValid() != nil || d.AsDuration() < 0 || d.AsDuration() > maxDuration {
		r.refuse(field, fmt.Sprintf("%ds", d.GetSeconds()), "want 0 s to a year")
		return 0
	}
	return d.AsDuration()
}
