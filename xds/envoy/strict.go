package envoy

import (
	"fmt"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/anypb"
)

// held lists, for each message, the fields that may be set: those that are
// read, and after the bar those that change nothing for traffic here, be it
// because they are for people and statistics, or because they have a meaning
// only beside a field that is refused. Any other that is set is refused.
var held = map[protoreflect.FullName]string{
	"envoy.config.listener.v3.Listener":         "name address filter_chains default_filter_chain listener_filters | stat_prefix traffic_direction metadata enable_reuse_port",
	"envoy.config.listener.v3.FilterChain":      "filter_chain_match filters transport_socket | name metadata",
	"envoy.config.listener.v3.FilterChainMatch": "server_names transport_protocol",
	"envoy.config.listener.v3.Filter":           "name typed_config",
	"envoy.config.listener.v3.ListenerFilter":   "name typed_config",

	"envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager":    "codec_type rds route_config http_filters | stat_prefix",
	"envoy.extensions.filters.network.http_connection_manager.v3.Rds":                      "config_source route_config_name",
	"envoy.extensions.filters.network.http_connection_manager.v3.HttpFilter":               "name typed_config is_optional disabled",
	"envoy.extensions.filters.http.router.v3.Router":                                       "| dynamic_stats",
	"envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector":                      "",
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy":                               "cluster weighted_clusters | stat_prefix",
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster":               "clusters",
	"envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy.WeightedCluster.ClusterWeight": "name weight",

	"envoy.config.route.v3.RouteConfiguration":                                  "name virtual_hosts",
	"envoy.config.route.v3.VirtualHost":                                         "name domains routes | metadata",
	"envoy.config.route.v3.Route":                                               "name match route redirect direct_response request_headers_to_add request_headers_to_remove response_headers_to_add response_headers_to_remove | metadata stat_prefix",
	"envoy.config.route.v3.RouteMatch":                                          "prefix path safe_regex path_separated_prefix headers query_parameters grpc case_sensitive",
	"envoy.config.route.v3.RouteMatch.GrpcRouteMatchOptions":                    "",
	"envoy.config.route.v3.HeaderMatcher":                                       "name string_match present_match exact_match prefix_match suffix_match contains_match safe_regex_match invert_match",
	"envoy.config.route.v3.QueryParameterMatcher":                               "name string_match present_match",
	"envoy.config.route.v3.RouteAction":                                         "cluster weighted_clusters timeout prefix_rewrite host_rewrite_literal retry_policy hedge_policy",
	"envoy.config.route.v3.WeightedCluster":                                     "clusters",
	"envoy.config.route.v3.WeightedCluster.ClusterWeight":                       "name weight",
	"envoy.config.route.v3.RetryPolicy":                                         "retry_on num_retries per_try_timeout",
	"envoy.config.route.v3.HedgePolicy":                                         "hedge_on_per_try_timeout initial_requests",
	"envoy.config.route.v3.RedirectAction":                                      "https_redirect scheme_redirect host_redirect port_redirect path_redirect prefix_rewrite response_code strip_query",
	"envoy.config.route.v3.DirectResponseAction":                                "status body",
	"envoy.type.matcher.v3.StringMatcher":                                       "exact prefix suffix contains safe_regex",
	"envoy.type.matcher.v3.RegexMatcher":                                        "regex | google_re2",
	"envoy.type.matcher.v3.RegexMatcher.GoogleRE2":                              "",
	"envoy.config.core.v3.HeaderValueOption":                                    "header append append_action",
	"envoy.config.core.v3.HeaderValue":                                          "key value",
	"envoy.config.core.v3.DataSource":                                           "inline_string inline_bytes",
	"envoy.config.core.v3.Address":                                              "socket_address",
	"envoy.config.core.v3.SocketAddress":                                        "protocol address port_value",
	"envoy.config.core.v3.Locality":                                             "region zone sub_zone",
	"envoy.config.core.v3.TransportSocket":                                      "name typed_config",
	"envoy.config.core.v3.ConfigSource":                                         "ads self resource_api_version | initial_fetch_timeout",
	"envoy.config.core.v3.AggregatedConfigSource":                               "",
	"envoy.config.core.v3.SelfConfigSource":                                     "transport_api_version",
	"envoy.config.core.v3.Http1ProtocolOptions":                                 "",
	"envoy.config.core.v3.Http2ProtocolOptions":                                 "",
	"envoy.extensions.upstreams.http.v3.HttpProtocolOptions":                    "explicit_http_config",
	"envoy.extensions.upstreams.http.v3.HttpProtocolOptions.ExplicitHttpConfig": "http_protocol_options http2_protocol_options",

	"envoy.config.cluster.v3.Cluster":                    "name type eds_cluster_config connect_timeout lb_policy load_assignment circuit_breakers transport_socket typed_extension_protocol_options http2_protocol_options | metadata alt_stat_name",
	"envoy.config.cluster.v3.Cluster.EdsClusterConfig":   "eds_config service_name",
	"envoy.config.cluster.v3.CircuitBreakers":            "thresholds",
	"envoy.config.cluster.v3.CircuitBreakers.Thresholds": "max_connections max_pending_requests max_requests max_retries | track_remaining",
	"envoy.config.endpoint.v3.ClusterLoadAssignment":     "cluster_name endpoints",
	"envoy.config.endpoint.v3.LocalityLbEndpoints":       "locality lb_endpoints priority | load_balancing_weight metadata",
	"envoy.config.endpoint.v3.LbEndpoint":                "endpoint health_status load_balancing_weight | metadata",
	"envoy.config.endpoint.v3.Endpoint":                  "address | hostname health_check_config",

	"envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext":                                  "common_tls_context require_client_certificate",
	"envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext":                                    "common_tls_context sni",
	"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext":                                      "tls_certificate_sds_secret_configs validation_context_sds_secret_config combined_validation_context alpn_protocols",
	"envoy.extensions.transport_sockets.tls.v3.CommonTlsContext.CombinedCertificateValidationContext": "default_validation_context validation_context_sds_secret_config",
	"envoy.extensions.transport_sockets.tls.v3.CertificateValidationContext":                          "match_typed_subject_alt_names trusted_ca",
	"envoy.extensions.transport_sockets.tls.v3.Secret":                                                "name tls_certificate validation_context",
	"envoy.extensions.transport_sockets.tls.v3.TlsCertificate":                                        "certificate_chain private_key",
	"envoy.extensions.transport_sockets.tls.v3.SubjectAltNameMatcher":                                 "san_type matcher",
	"envoy.extensions.transport_sockets.tls.v3.SdsSecretConfig":                                       "name sds_config",
}

// reads says whether a message's field may be set, and whether it is read.
func reads(m protoreflect.FullName, field protoreflect.Name) (may, read bool) {
	row, quiet, _ := strings.Cut(held[m], "|")
	read = has(row, string(field))
	return read || has(quiet, string(field)), read
}

func has(row, field string) bool {
	for f := range strings.FieldsSeq(row) {
		if f == field {
			return true
		}
	}
	return false
}

// strict refuses what is set in a message and not held, down to the last.
func (r *reader) strict(at string, m protoreflect.Message, depth int) {
	if depth > maxDepth {
		r.refuse(at, "", "nested too deep")
		return
	}
	if unknown := m.GetUnknown(); len(unknown) > 0 {
		r.refuse(join(at, "?"), fmt.Sprintf("%d bytes", len(unknown)), "a field that this version does not know")
	}
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		may, read := reads(m.Descriptor().FullName(), f.Name())
		field := join(at, string(f.Name()))
		switch {
		case !may:
			r.refuse(field, show(f, v), "set, and not held")
		case !read || f.Message() == nil || f.IsMap() || leaf(f.Message()):
		case f.IsList():
			for i := range v.List().Len() {
				r.strict(fmt.Sprintf("%s[%d]", field, i), v.List().Get(i).Message(), depth+1)
			}
		default:
			r.strict(field, v.Message(), depth+1)
		}
		return r.more == 0 // enough was told
	})
}

// leaf says whether a message is a value: what is in it is looked at where it
// is read.
func leaf(m protoreflect.MessageDescriptor) bool {
	return m.FullName().Parent() == "google.protobuf"
}

func join(at, field string) string {
	if at == "" {
		return field
	}
	return at + "." + field
}

// show is a value in a few words.
func show(f protoreflect.FieldDescriptor, v protoreflect.Value) string {
	switch {
	case f.IsList():
		return fmt.Sprintf("%d entries", v.List().Len())
	case f.IsMap():
		return fmt.Sprintf("%d entries", v.Map().Len())
	case f.Message() != nil:
		return string(f.Message().Name())
	case f.Enum() != nil:
		if e := f.Enum().Values().ByNumber(v.Enum()); e != nil {
			return string(e.Name())
		}
	}
	return v.String()
}

// into reads a message that is wrapped in an Any, if it is of m's type.
func (r *reader) into(field string, a *anypb.Any, m proto.Message) bool {
	if a.GetTypeUrl() != prefix+string(m.ProtoReflect().Descriptor().FullName()) {
		return false
	}
	if err := unmarshal(a.GetValue(), m); err != nil {
		r.refuse(field, a.GetTypeUrl(), errBroken.Error())
		return true
	}
	r.strict(field, m.ProtoReflect(), 0)
	return true
}
