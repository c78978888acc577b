package proxyfile

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"hauberk.dev/plan"
)

type host struct {
	Names     []string `json:"names"`
	Listeners []string `json:"listeners"`
	Routes    []route  `json:"routes"`
}

type route struct {
	Name    string   `json:"name,omitempty"`
	Path    string   `json:"path,omitempty"`
	Prefix  string   `json:"prefix,omitempty"`
	Regex   string   `json:"regex,omitempty"`
	Headers []value  `json:"headers,omitempty"`
	Query   []value  `json:"query,omitempty"`
	Methods []string `json:"methods,omitempty"`

	Upstream string    `json:"upstream,omitempty"`
	Split    []share   `json:"split,omitempty"`
	Redirect *redirect `json:"redirect,omitempty"`
	Respond  *respond  `json:"respond,omitempty"`

	Rewrite         string   `json:"rewrite,omitempty"`
	Host            string   `json:"host,omitempty"`
	Timeout         string   `json:"timeout,omitempty"`
	Retries         *retries `json:"retries,omitempty"`
	Hedge           *hedge   `json:"hedge,omitempty"`
	RequestHeaders  *edit    `json:"request_headers,omitempty"`
	ResponseHeaders *edit    `json:"response_headers,omitempty"`
}

type value struct {
	Name  string  `json:"name"`
	Equal *string `json:"equal,omitempty"`
	Regex string  `json:"regex,omitempty"`
	Not   bool    `json:"not,omitempty"`
}

type share struct {
	Upstream string `json:"upstream"`
	Weight   uint32 `json:"weight"`
}

type redirect struct {
	Status int    `json:"status"`
	To     string `json:"to"`
}

type respond struct {
	Status int    `json:"status"`
	Body   string `json:"body,omitempty"`
}

type retries struct {
	Attempts uint32 `json:"attempts"`
	Statuses []int  `json:"statuses,omitempty"`
}

type hedge struct {
	After   string `json:"after"`
	Tries   uint32 `json:"tries"`
	Percent uint32 `json:"percent"`
}

type edit struct {
	Set    map[string]string `json:"set,omitempty"`
	Add    map[string]string `json:"add,omitempty"`
	Remove []string          `json:"remove,omitempty"`
}

// nobody answers what no host or route is for, as Envoy does.
var nobody = route{Respond: &respond{Status: 404}}

// table is the hosts of a listener. What no route of a host is for is a 404.
func (d *document) table(listener string, hosts []plan.Host) (out []host, err error) {
	any := false
	for i := range hosts {
		h := &hosts[i]
		o := host{Names: h.Domains, Listeners: []string{listener}}
		for _, name := range h.Domains {
			any = any || name == "*"
			if strings.HasSuffix(name, ".*") || strings.Contains(name, ":") {
				return nil, fmt.Errorf(`virtual_hosts[%d].domains: %q: held are a name, "*.name" and "*"`, i, name)
			}
		}
		for j := range h.Routes {
			r, err := d.route(&h.Routes[j])
			if err != nil {
				return nil, fmt.Errorf("virtual_hosts[%d].routes[%d].%w", i, j, err)
			}
			o.Routes = append(o.Routes, r)
		}
		if len(o.Routes) == 0 {
			o.Routes = []route{nobody}
		}
		out = append(out, o)
	}
	if !any {
		out = append(out, host{Names: []string{"*"}, Listeners: []string{listener}, Routes: []route{nobody}})
	}
	return out, nil
}

func (d *document) route(r *plan.Route) (out route, err error) {
	out.Name = r.Name
	rest, err := out.match(&r.Match)
	if err != nil {
		return out, fmt.Errorf("match.%w", err)
	}
	switch {
	case r.Reply != nil:
		out.Respond = &respond{Status: r.Reply.Status, Body: r.Reply.Body}
	case r.Redirect != nil:
		if out.Redirect, err = redirected(r.Redirect, rest); err != nil {
			return out, err
		}
	default:
		if err := d.forward(r, &out, rest); err != nil {
			return out, fmt.Errorf("route.%w", err)
		}
	}
	if out.RequestHeaders, err = edits(r.RequestHeaders); err != nil {
		return out, fmt.Errorf("request_headers_to_add: %w", err)
	}
	if out.ResponseHeaders, err = edits(r.ResponseHeaders); err != nil {
		return out, fmt.Errorf("response_headers_to_add: %w", err)
	}
	return out, nil
}

// match says what is demanded, and rest what stands for the part of the path
// after a prefix.
func (out *route) match(m *plan.Match) (rest string, err error) {
	switch {
	case m.Path != "":
		out.Path = m.Path
	case m.Segments != "":
		out.Prefix, rest = m.Segments, "$rest"
	case strings.HasSuffix(m.Prefix, "/"):
		out.Prefix, rest = m.Prefix, "$rest"
	case m.Prefix != "": // may end inside a segment
		out.Regex, rest = "(?s)^"+regexp.QuoteMeta(m.Prefix)+"(.*)$", "$1"
	default:
		out.Regex = "^(?:" + m.Regex + ")$"
	}
	for _, h := range m.Headers {
		if err := out.header(h); err != nil {
			return "", err
		}
	}
	for _, q := range m.Query {
		v := value{Name: q.Name}
		v.compare(q)
		out.Query = append(out.Query, v)
	}
	if m.GRPC {
		out.Headers = append(out.Headers, value{Name: "Content-Type", Regex: `^application/grpc($|\+)`})
	}
	return rest, nil
}

// header is a condition on a header, or on what HTTP/2 calls one.
func (out *route) header(h plan.ValueMatch) error {
	v := value{Name: h.Name}
	switch h.Name {
	case ":method":
		if h.Is != "exact" || h.Invert || len(out.Methods) > 0 {
			return fmt.Errorf("headers: %q: held is one exact_match", h.Name)
		}
		out.Methods = []string{h.Value}
		return nil
	case ":authority":
		v.Name = "Host"
	case ":path", ":scheme":
		return fmt.Errorf("headers: %q: not held", h.Name)
	}
	v.compare(h)
	out.Headers = append(out.Headers, v)
	return nil
}

func (v *value) compare(m plan.ValueMatch) {
	text := regexp.QuoteMeta(m.Value)
	switch m.Is {
	case "exact":
		v.Equal = &m.Value
	case "prefix":
		v.Regex = "^" + text
	case "suffix":
		v.Regex = text + "$"
	case "contains":
		v.Regex = text
	case "regex":
		v.Regex = "^(?:" + m.Value + ")$"
	}
	v.Not = m.Invert != (m.Is == "absent")
}

// statuses that Envoy's words for retries mean.
var statuses = map[string][]int{
	"5xx":           fiveHundreds(),
	"gateway-error": {502, 503, 504},
	"retriable-4xx": {409},
	// A request that did not arrive is tried again in any case.
	"connect-failure": nil, "refused-stream": nil, "reset": nil, "reset-before-request": nil,
}

func fiveHundreds() (all []int) {
	for status := 500; status < 600; status++ {
		all = append(all, status)
	}
	return all
}

// maxHedged is how often the proxy tries a request at once.
const maxHedged = 4

func (d *document) forward(r *plan.Route, out *route, rest string) error {
	if len(r.To) == 1 {
		out.Upstream = d.to(r.To[0].Cluster)
	} else {
		most := uint32(0)
		for _, t := range r.To {
			most = max(most, t.Weight)
		}
		for _, t := range r.To {
			w := t.Weight
			if most > 1e6 {
				w = max(1, uint32((uint64(w)*1e6+uint64(most)/2)/uint64(most)))
			}
			out.Split = append(out.Split, share{Upstream: d.to(t.Cluster), Weight: w})
		}
	}
	out.Timeout, out.Host = duration(r.Timeout), r.HostRewrite
	if r.PrefixRewrite != "" {
		out.Rewrite = literal(r.PrefixRewrite) + rest
	}
	if r.Retry == nil {
		return nil
	}
	switch {
	case r.Hedge && r.Retry.Attempts > maxHedged-1:
		return fmt.Errorf("retry_policy.num_retries: %d: above %d, with hedge_policy", r.Retry.Attempts, maxHedged-1)
	case r.Hedge && r.Retry.Attempts > 0: // bounded by the budget of retries alone, as there
		out.Hedge = &hedge{After: duration(r.Retry.PerTry), Tries: r.Retry.Attempts + 1, Percent: 100 * r.Retry.Attempts}
	case r.Retry.PerTry != 0 && !r.Hedge:
		return fmt.Errorf("retry_policy.per_try_timeout: %v: held is the timeout of the route, for each try", r.Retry.PerTry)
	}
	if r.Retry.Attempts > 9 {
		return fmt.Errorf("retry_policy.num_retries: %d: above 9", r.Retry.Attempts)
	}
	out.Retries = &retries{Attempts: r.Retry.Attempts + 1}
	for _, on := range r.Retry.On {
		list, there := statuses[on]
		if !there {
			return fmt.Errorf("retry_policy.retry_on: %q: not held", on)
		}
		out.Retries.Statuses = append(out.Retries.Statuses, list...)
	}
	slices.Sort(out.Retries.Statuses)
	out.Retries.Statuses = slices.Compact(out.Retries.Statuses)
	return nil
}

func redirected(r *plan.Redirect, rest string) (*redirect, error) {
	to := strings.Builder{}
	if r.Scheme != "" {
		to.WriteString(r.Scheme)
	} else {
		to.WriteString("$scheme")
	}
	to.WriteString("://")
	switch {
	case r.Host != "" && r.Port != 0 && strings.Contains(r.Host, ":"):
		return nil, fmt.Errorf("redirect.port_redirect: %d: host_redirect has a port too", r.Port)
	case r.Host != "":
		to.WriteString(literal(r.Host))
	case r.Port != 0 || r.Scheme != "":
		to.WriteString("$host")
	default:
		to.WriteString("$authority")
	}
	if r.Port != 0 {
		fmt.Fprintf(&to, ":%d", r.Port)
	}
	switch {
	case r.Path != "":
		to.WriteString(literal(r.Path))
	case r.Prefix != "":
		to.WriteString(literal(r.Prefix) + rest)
	default:
		to.WriteString("$path")
	}
	if !r.StripQuery {
		to.WriteString("$query")
	}
	return &redirect{Status: r.Status, To: to.String()}, nil
}

func edits(all []plan.HeaderEdit) (*edit, error) {
	if len(all) == 0 {
		return nil, nil
	}
	out := &edit{Set: map[string]string{}, Add: map[string]string{}}
	for _, e := range all {
		_, set := out.Set[e.Name]
		_, added := out.Add[e.Name]
		if set || added || e.Act != "remove" && slices.Contains(out.Remove, e.Name) {
			return nil, fmt.Errorf("%q: changed twice, which is not held", e.Name)
		}
		switch e.Act {
		case "append":
			out.Add[e.Name] = literal(e.Value)
		case "set":
			out.Set[e.Name] = literal(e.Value)
		case "remove":
			out.Remove = append(out.Remove, e.Name)
		default:
			return nil, fmt.Errorf("%q: ADD_IF_ABSENT is not held", e.Name)
		}
	}
	return out, nil
}

// literal is text in a template of the proxy.
func literal(s string) string { return strings.ReplaceAll(s, "$", "$$") }
