package envoy

//lint:file-ignore SA1019 control planes still use the words of before

import (
	"fmt"
	"regexp"
	"strings"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	route "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	matcher "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"golang.org/x/net/http/httpguts"

	"hauberk.dev/plan"
)

// routeTimeout is what Envoy takes an absent timeout of a route to be.
const routeTimeout = 15 * time.Second

func (r *reader) routes(c *route.RouteConfiguration) *RouteTable {
	hosts := r.hosts("virtual_hosts", c.VirtualHosts)
	return &RouteTable{Name: c.Name, Hosts: hosts, Clusters: r.names}
}

func (r *reader) hosts(at string, hosts []*route.VirtualHost) (out []plan.Host) {
	seen := map[string]bool{}
	for i, h := range hosts {
		at := fmt.Sprintf("%s[%d]", at, i)
		host := plan.Host{Name: h.Name}
		if len(h.Domains) == 0 {
			r.refuse(at+".domains", "", "want at least one")
		}
		for _, d := range h.Domains {
			d = strings.ToLower(d)
			rest := strings.TrimSuffix(strings.TrimPrefix(d, "*."), ".*")
			if d != "*" && (!domain(rest) || len(d)-len(rest) > 2) {
				r.refuse(at+".domains", d, `want a name, "*.name", "name.*" or "*"`)
			}
			if seen[d] {
				r.refuse(at+".domains", d, "listed twice")
			}
			seen[d] = true
			host.Domains = append(host.Domains, d)
		}
		for j, rt := range h.Routes {
			if r.more > 0 {
				return nil
			}
			host.Routes = append(host.Routes, r.route(fmt.Sprintf("%s.routes[%d]", at, j), rt))
		}
		out = append(out, host)
	}
	return out
}

func (r *reader) route(at string, rt *route.Route) plan.Route {
	out := plan.Route{Name: rt.Name, Match: r.match(at+".match", rt.GetMatch())}
	switch a := rt.Action.(type) {
	case *route.Route_Route:
		r.forward(at+".route", a.Route, &out)
	case *route.Route_Redirect:
		out.Redirect = r.redirect(at+".redirect", a.Redirect)
	case *route.Route_DirectResponse:
		out.Reply = r.reply(at+".direct_response", a.DirectResponse)
	default:
		r.refuse(at+".action", "", "want route, redirect or direct_response")
	}
	out.RequestHeaders = r.edits(at+".request_headers", rt.RequestHeadersToAdd, rt.RequestHeadersToRemove)
	out.ResponseHeaders = r.edits(at+".response_headers", rt.ResponseHeadersToAdd, rt.ResponseHeadersToRemove)
	return out
}

func (r *reader) match(at string, m *route.RouteMatch) (out plan.Match) {
	switch p := m.GetPathSpecifier().(type) {
	case *route.RouteMatch_Prefix:
		out.Prefix = r.path(at+".prefix", p.Prefix)
	case *route.RouteMatch_Path:
		out.Path = r.path(at+".path", p.Path)
	case *route.RouteMatch_PathSeparatedPrefix:
		out.Segments = r.path(at+".path_separated_prefix", p.PathSeparatedPrefix)
		if strings.HasSuffix(out.Segments, "/") {
			r.refuse(at+".path_separated_prefix", out.Segments, "must not end in /")
		}
	case *route.RouteMatch_SafeRegex:
		out.Regex = r.regex(at+".safe_regex.regex", p.SafeRegex.GetRegex())
	default:
		r.refuse(at+".path_specifier", "", "want prefix, path, path_separated_prefix or safe_regex")
	}
	if s := m.GetCaseSensitive(); s != nil && !s.Value {
		r.refuse(at+".case_sensitive", "false", "paths are compared as they are")
	}
	out.GRPC = m.GetGrpc() != nil
	for i, h := range m.GetHeaders() {
		out.Headers = append(out.Headers, r.header(fmt.Sprintf("%s.headers[%d]", at, i), h))
	}
	for i, q := range m.GetQueryParameters() {
		at := fmt.Sprintf("%s.query_parameters[%d]", at, i)
		v := plan.ValueMatch{Name: r.text(at+".name", q.GetName())}
		switch s := q.GetQueryParameterMatchSpecifier().(type) {
		case *route.QueryParameterMatcher_StringMatch:
			v.Is, v.Value = r.compare(at+".string_match", s.StringMatch)
		case *route.QueryParameterMatcher_PresentMatch:
			v.Is = presence(s.PresentMatch)
		default:
			v.Is = "present"
		}
		out.Query = append(out.Query, v)
	}
	return out
}

func presence(present bool) string {
	if present {
		return "present"
	}
	return "absent"
}

func (r *reader) header(at string, h *route.HeaderMatcher) plan.ValueMatch {
	v := plan.ValueMatch{Name: strings.ToLower(h.Name), Is: "present", Invert: h.InvertMatch}
	switch {
	case v.Name == ":method", v.Name == ":path", v.Name == ":authority", v.Name == ":scheme":
	case !httpguts.ValidHeaderFieldName(v.Name):
		r.refuse(at+".name", h.Name, "no name of a header")
	}
	var s *matcher.StringMatcher
	field := at + ".string_match"
	switch m := h.HeaderMatchSpecifier.(type) {
	case nil:
		return v
	case *route.HeaderMatcher_PresentMatch:
		v.Is = presence(m.PresentMatch)
		return v
	case *route.HeaderMatcher_StringMatch:
		s = m.StringMatch
	// What follows is how Envoy said it before string_match.
	case *route.HeaderMatcher_ExactMatch:
		field, s = at+".exact_match", &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Exact{Exact: m.ExactMatch}}
	case *route.HeaderMatcher_PrefixMatch:
		field, s = at+".prefix_match", &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Prefix{Prefix: m.PrefixMatch}}
	case *route.HeaderMatcher_SuffixMatch:
		field, s = at+".suffix_match", &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Suffix{Suffix: m.SuffixMatch}}
	case *route.HeaderMatcher_ContainsMatch:
		field, s = at+".contains_match", &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_Contains{Contains: m.ContainsMatch}}
	case *route.HeaderMatcher_SafeRegexMatch:
		field, s = at+".safe_regex_match", &matcher.StringMatcher{MatchPattern: &matcher.StringMatcher_SafeRegex{SafeRegex: m.SafeRegexMatch}}
	}
	v.Is, v.Value = r.compare(field, s)
	return v
}

func (r *reader) compare(at string, s *matcher.StringMatcher) (is, value string) {
	switch m := s.GetMatchPattern().(type) {
	case *matcher.StringMatcher_Exact:
		return "exact", r.text(at+".exact", m.Exact)
	case *matcher.StringMatcher_Prefix:
		is, value = "prefix", m.Prefix
	case *matcher.StringMatcher_Suffix:
		is, value = "suffix", m.Suffix
	case *matcher.StringMatcher_Contains:
		is, value = "contains", m.Contains
	case *matcher.StringMatcher_SafeRegex:
		return "regex", r.regex(at+".safe_regex.regex", m.SafeRegex.GetRegex())
	}
	if value == "" {
		r.refuse(at, is, "compares with nothing")
	}
	return is, r.text(at, value)
}

func (r *reader) forward(at string, a *route.RouteAction, out *plan.Route) {
	switch s := a.GetClusterSpecifier().(type) {
	case *route.RouteAction_Cluster:
		out.To = []plan.Weighted{{Cluster: r.toCluster(at+".cluster", s.Cluster), Weight: 1}}
	case *route.RouteAction_WeightedClusters:
		w := weights{r: r, at: at + ".weighted_clusters.clusters"}
		for _, c := range s.WeightedClusters.GetClusters() {
			w.add(c.GetName(), c.GetWeight().GetValue())
		}
		out.To = w.done()
	default:
		r.refuse(at+".cluster_specifier", "", "want cluster or weighted_clusters")
	}
	out.Timeout = routeTimeout
	if a.GetTimeout() != nil {
		out.Timeout = r.duration(at+".timeout", a.Timeout)
	}
	if out.PrefixRewrite = a.GetPrefixRewrite(); out.PrefixRewrite != "" {
		r.path(at+".prefix_rewrite", out.PrefixRewrite)
		if out.Match.Regex != "" {
			r.refuse(at+".prefix_rewrite", out.PrefixRewrite, "a pattern has no prefix that it could replace")
		}
	}
	if out.HostRewrite = a.GetHostRewriteLiteral(); out.HostRewrite != "" && !authority(out.HostRewrite) {
		r.refuse(at+".host_rewrite_literal", out.HostRewrite, "no host, with or without a port")
	}
	if p := a.GetRetryPolicy(); p != nil {
		out.Retry = r.retry(at+".retry_policy", p)
	}
	if p := a.GetHedgePolicy(); p != nil {
		r.hedge(at+".hedge_policy", p, out)
	}
}

// hedge reads what Envoy does of hedging: a retry after the time of a try, whose
// request is not given up.
func (r *reader) hedge(at string, p *route.HedgePolicy, out *plan.Route) {
	if n := p.GetInitialRequests(); n != nil && n.Value != 1 {
		r.refuse(at+".initial_requests", fmt.Sprint(n.Value), "held is 1")
	}
	if out.Hedge = p.HedgeOnPerTryTimeout; out.Hedge && (out.Retry == nil || out.Retry.PerTry == 0) {
		r.refuse(at+".hedge_on_per_try_timeout", "true", "goes with retry_policy.per_try_timeout")
	}
}

// authority says whether a text can be the host of a request, port included.
func authority(s string) bool {
	host, port, found := strings.Cut(s, ":")
	return domain(host) && (!found || port != "" && len(port) <= 5 && strings.Trim(port, "0123456789") == "")
}

// retried is what may be tried again: Envoy's words, of HTTP and of gRPC.
var retried = strings.Fields(`5xx gateway-error reset reset-before-request connect-failure retriable-4xx refused-stream
	cancelled deadline-exceeded internal resource-exhausted unavailable`)

func (r *reader) retry(at string, p *route.RetryPolicy) *plan.RouteRetry {
	out := &plan.RouteRetry{Attempts: 1}
	for _, on := range strings.Split(p.RetryOn, ",") {
		on = strings.TrimSpace(on)
		known := false
		for _, k := range retried {
			known = known || k == on
		}
		if !known {
			r.refuse(at+".retry_on", on, "held are "+strings.Join(retried, ", "))
		}
		out.On = append(out.On, on)
	}
	override(&out.Attempts, p.NumRetries)
	if out.Attempts > 100 {
		r.refuse(at+".num_retries", fmt.Sprint(out.Attempts), "above 100")
	}
	if p.PerTryTimeout != nil {
		out.PerTry = r.duration(at+".per_try_timeout", p.PerTryTimeout)
	}
	return out
}

func (r *reader) redirect(at string, a *route.RedirectAction) *plan.Redirect {
	out := &plan.Redirect{Host: a.GetHostRedirect(), StripQuery: a.GetStripQuery()}
	switch a.GetResponseCode() {
	case route.RedirectAction_MOVED_PERMANENTLY:
		out.Status = 301
	case route.RedirectAction_FOUND:
		out.Status = 302
	case route.RedirectAction_SEE_OTHER:
		out.Status = 303
	case route.RedirectAction_TEMPORARY_REDIRECT:
		out.Status = 307
	case route.RedirectAction_PERMANENT_REDIRECT:
		out.Status = 308
	default:
		r.refuse(at+".response_code", a.GetResponseCode().String(), "not held")
	}
	if out.Host != "" && !authority(out.Host) {
		r.refuse(at+".host_redirect", out.Host, "no host")
	}
	switch s := a.GetSchemeRewriteSpecifier().(type) {
	case *route.RedirectAction_HttpsRedirect:
		if s.HttpsRedirect {
			out.Scheme = "https"
		}
	case *route.RedirectAction_SchemeRedirect:
		if out.Scheme = s.SchemeRedirect; out.Scheme != "http" && out.Scheme != "https" {
			r.refuse(at+".scheme_redirect", out.Scheme, "held are http and https")
		}
	}
	if port := a.GetPortRedirect(); port > 65535 {
		r.refuse(at+".port_redirect", fmt.Sprint(port), "no port")
	} else {
		out.Port = uint16(port)
	}
	switch s := a.GetPathRewriteSpecifier().(type) {
	case *route.RedirectAction_PathRedirect:
		out.Path = r.path(at+".path_redirect", s.PathRedirect)
	case *route.RedirectAction_PrefixRewrite:
		out.Prefix = r.path(at+".prefix_rewrite", s.PrefixRewrite)
	}
	return out
}

func (r *reader) reply(at string, a *route.DirectResponseAction) *plan.Reply {
	if a.GetStatus() < 200 || a.GetStatus() > 599 {
		r.refuse(at+".status", fmt.Sprint(a.GetStatus()), "want 200 to 599")
	}
	body := a.GetBody().GetInlineString() + string(a.GetBody().GetInlineBytes())
	if len(body) > maxBody {
		r.refuse(at+".body", fmt.Sprintf("%d bytes", len(body)), fmt.Sprintf("more than %d", maxBody))
	}
	return &plan.Reply{Status: int(a.GetStatus()), Body: body}
}

// edits of headers, removals first, as Envoy orders them.
func (r *reader) edits(at string, add []*core.HeaderValueOption, remove []string) (out []plan.HeaderEdit) {
	for _, name := range remove {
		out = append(out, plan.HeaderEdit{Name: r.editable(at+"_to_remove", name), Act: "remove"})
	}
	for i, h := range add {
		at := fmt.Sprintf("%s_to_add[%d]", at, i)
		e := plan.HeaderEdit{Name: r.editable(at+".header.key", h.GetHeader().GetKey()), Value: h.GetHeader().GetValue()}
		switch {
		case !httpguts.ValidHeaderFieldValue(e.Value) || len(e.Value) > maxText:
			r.refuse(at+".header.value", e.Value, "no value of a header")
		case e.Value == "":
			r.refuse(at+".header.value", "", "an empty value would not be sent")
		case strings.Contains(e.Value, "%"):
			r.refuse(at+".header.value", e.Value, "values computed of a request are not held, so % is not either")
		}
		if was := h.GetAppend(); was != nil {
			e.Act = map[bool]string{true: "append", false: "set"}[was.Value]
			if h.AppendAction != 0 {
				r.refuse(at+".append_action", h.AppendAction.String(), "and append is set, too")
			}
			out = append(out, e)
			continue
		}
		switch h.GetAppendAction() {
		case core.HeaderValueOption_APPEND_IF_EXISTS_OR_ADD:
			e.Act = "append"
		case core.HeaderValueOption_ADD_IF_ABSENT:
			e.Act = "add"
		case core.HeaderValueOption_OVERWRITE_IF_EXISTS_OR_ADD:
			e.Act = "set"
		default:
			r.refuse(at+".append_action", h.GetAppendAction().String(), "not held")
		}
		out = append(out, e)
	}
	return out
}

// editable is the name of a header that a route may change: not what frames
// and routes a message.
func (r *reader) editable(field, name string) string {
	lower := strings.ToLower(name)
	switch lower {
	case "host", "connection", "content-length", "transfer-encoding", "upgrade", "te", "trailer", "keep-alive", "proxy-connection":
		r.refuse(field, name, "it frames or routes the message")
	}
	if !httpguts.ValidHeaderFieldName(lower) {
		r.refuse(field, name, "no name of a header that can be changed")
	}
	return lower
}

func (r *reader) path(field, p string) string {
	if !strings.HasPrefix(p, "/") || strings.ContainsAny(p, "?#") {
		r.refuse(field, p, "want a path: it begins with / and has no query or fragment")
	}
	return r.text(field, p)
}

func (r *reader) text(field, s string) string {
	if s == "" || len(s) > maxText || strings.ContainsAny(s, "\x00\r\n") {
		r.refuse(field, s, fmt.Sprintf("want 1 to %d bytes on one line", maxText))
	}
	return s
}

func (r *reader) regex(field, s string) string {
	r.text(field, s)
	if len(s) > maxText {
		return ""
	}
	// By itself too: "a)|(b" is one only between the parentheses.
	_, err := regexp.Compile(s)
	if err == nil {
		_, err = regexp.Compile(`^(?:` + s + `)$`)
	}
	if err != nil {
		r.refuse(field, s, "no pattern of RE2: "+err.Error())
	}
	return s
}
