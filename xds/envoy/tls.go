package envoy

import (
	"fmt"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tls "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"hauberk.dev/plan"
)

const needSecret = "want the name of a secret: keys and authorities do not travel here"

func (r *reader) serverTLS(field string, s *core.TransportSocket) *plan.ServerTLS {
	if s == nil {
		return nil
	}
	t := &tls.DownstreamTlsContext{}
	field += ".typed_config"
	if !r.into(field, s.GetTypedConfig(), t) {
		r.refuse(field, s.GetTypedConfig().GetTypeUrl(), "held is DownstreamTlsContext")
		return nil
	}
	c := t.GetCommonTlsContext()
	field += ".common_tls_context"
	out := &plan.ServerTLS{ALPN: r.alpn(field, c)}
	for i, s := range c.GetTlsCertificateSdsSecretConfigs() {
		out.Certificates = append(out.Certificates, r.named(fmt.Sprintf("%s.tls_certificate_sds_secret_configs[%d]", field, i), s))
	}
	if len(out.Certificates) == 0 {
		r.refuse(field+".tls_certificate_sds_secret_configs", "", needSecret)
	}
	authorities, names := r.authorities(field, c)
	out.Clients = authorities
	if len(names) > 0 {
		r.refuse(field+".combined_validation_context.default_validation_context.match_typed_subject_alt_names",
			fmt.Sprint(len(names)), "who may call is not held of a listener")
	}
	// Envoy lets clients without a certificate in unless this is set.
	if must := t.GetRequireClientCertificate().GetValue(); must != (authorities != "") {
		r.refuse("require_client_certificate", fmt.Sprint(must), "must be set just where clients are verified")
	}
	return out
}

func (r *reader) clientTLS(field string, s *core.TransportSocket) *plan.ClientTLS {
	if s == nil {
		return nil
	}
	t := &tls.UpstreamTlsContext{}
	field += ".typed_config"
	if !r.into(field, s.GetTypedConfig(), t) {
		r.refuse(field, s.GetTypedConfig().GetTypeUrl(), "held is UpstreamTlsContext")
		return nil
	}
	c := t.GetCommonTlsContext()
	out := &plan.ClientTLS{ServerName: t.Sni}
	field += ".common_tls_context"
	out.ALPN = r.alpn(field, c)
	switch own := c.GetTlsCertificateSdsSecretConfigs(); len(own) {
	case 0:
	case 1:
		out.Certificate = r.named(field+".tls_certificate_sds_secret_configs[0]", own[0])
	default:
		r.refuse(field+".tls_certificate_sds_secret_configs", fmt.Sprint(len(own)), "one is held")
	}
	out.Authorities, out.Names = r.authorities(field, c)
	if out.Authorities == "" {
		r.refuse(field+".validation_context_sds_secret_config", "", "without it anybody could answer; "+needSecret)
	}
	if out.ServerName == "" && len(out.Names) == 0 {
		r.refuse(field+".combined_validation_context", "", "neither sni nor a subject says who must answer")
	}
	if len(out.ServerName) > 253 {
		r.refuse("sni", out.ServerName, "no name of a host")
	}
	return out
}

// authorities is the secret by which the other side is verified, and the names
// of which it must prove one.
func (r *reader) authorities(field string, c *tls.CommonTlsContext) (secret string, names []string) {
	if s := c.GetValidationContextSdsSecretConfig(); s != nil {
		return r.named(field+".validation_context_sds_secret_config", s), nil
	}
	both := c.GetCombinedValidationContext()
	if both == nil {
		return "", nil
	}
	field += ".combined_validation_context"
	secret = r.named(field+".validation_context_sds_secret_config", both.GetValidationContextSdsSecretConfig())
	if both.GetDefaultValidationContext().GetTrustedCa() != nil {
		r.refuse(field+".default_validation_context.trusted_ca", "", needSecret)
	}
	for i, m := range both.GetDefaultValidationContext().GetMatchTypedSubjectAltNames() {
		at := fmt.Sprintf("%s.default_validation_context.match_typed_subject_alt_names[%d]", field, i)
		if t := m.GetSanType(); t != tls.SubjectAltNameMatcher_DNS && t != tls.SubjectAltNameMatcher_URI {
			r.refuse(at+".san_type", t.String(), "held are DNS and URI")
		}
		exact := m.GetMatcher().GetExact()
		if exact == "" {
			r.refuse(at+".matcher", "", "want exact")
		}
		names = append(names, r.name(at+".matcher.exact", exact))
	}
	return secret, names
}

func (r *reader) named(field string, s *tls.SdsSecretConfig) string {
	r.adsOnly(field+".sds_config", s.GetSdsConfig(), false)
	return r.name(field+".name", s.GetName())
}

func (r *reader) alpn(field string, c *tls.CommonTlsContext) []string {
	for _, p := range c.GetAlpnProtocols() {
		if p != "h2" && p != "http/1.1" {
			r.refuse(field+".alpn_protocols", p, "held are h2 and http/1.1")
		}
	}
	return c.GetAlpnProtocols()
}
