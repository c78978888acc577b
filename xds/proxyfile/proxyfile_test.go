package proxyfile_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hauberk.dev/mesh/alone"
	"hauberk.dev/plan"
	"hauberk.dev/xds/proxyfile"
)

func limits() plan.Limits {
	return plan.Limits{Connections: 1024, Pending: 1024, Requests: 1024, Retries: 3}
}

func cluster(name string, change ...func(*plan.Cluster)) plan.Cluster {
	c := plan.Cluster{Name: name, Balance: "round_robin", ConnectTimeout: 5 * time.Second, Limits: limits(), Upstreams: []plan.Upstream{
		{Address: netip.MustParseAddrPort("10.0.0.1:80"), Weight: 1, Health: "healthy"}}}
	for _, f := range change {
		f(&c)
	}
	return c
}

func to(cluster string) []plan.Weighted { return []plan.Weighted{{Cluster: cluster, Weight: 1}} }

func serving(routes ...plan.Route) plan.Proxy {
	return plan.Proxy{Clusters: []plan.Cluster{cluster("a")}, Listeners: []plan.Listener{{Name: "l", Address: netip.MustParseAddrPort("0.0.0.0:80"),
		Chains: []plan.Chain{{HTTP: &plan.HTTP{Hosts: []plan.Host{{Name: "h", Domains: []string{"*"}, Routes: routes}}}}}}}}
}

func writer(t *testing.T) *proxyfile.Writer {
	t.Helper()
	return &proxyfile.Writer{Base: []byte("version: 1\nadmin: a"), Secrets: map[string]proxyfile.Secret{}, Authorities: map[string]string{}}
}

// TestRoutes compares what is written of a route, and has the proxy read it.
func TestRoutes(t *testing.T) {
	any := plan.Match{Prefix: "/"}
	for name, c := range map[string]struct {
		route plan.Route
		want  string
	}{
		"prefix": {plan.Route{Match: plan.Match{Prefix: "/a."}, To: to("a"), Timeout: 15 * time.Second},
			`{"regex":"(?s)^/a\\.(.*)$","upstream":"a","timeout":"15s"}`},
		"prefix rewritten": {plan.Route{Match: plan.Match{Prefix: "/a"}, To: to("a"), PrefixRewrite: "/$b"},
			`{"regex":"(?s)^/a(.*)$","upstream":"a","rewrite":"/$$b$1","timeout":"8760h0m0s"}`},
		"segments rewritten": {plan.Route{Match: plan.Match{Segments: "/a"}, To: to("a"), PrefixRewrite: "/b", Timeout: time.Second},
			`{"prefix":"/a","upstream":"a","rewrite":"/b$rest","timeout":"1s"}`},
		"path": {plan.Route{Match: plan.Match{Path: "/p"}, To: []plan.Weighted{{Cluster: "a", Weight: 1}, {Cluster: "b", Weight: 4e6}},
			PrefixRewrite: "/q", Timeout: time.Second, HostRewrite: "h:1"},
			`{"path":"/p","split":[{"upstream":"a","weight":1},{"upstream":"b","weight":1000000}],"rewrite":"/q","host":"h:1","timeout":"1s"}`},
		"conditions": {plan.Route{Match: plan.Match{Regex: "/x|/y", GRPC: true, Headers: []plan.ValueMatch{
			{Name: ":method", Is: "exact", Value: "PUT"}, {Name: ":authority", Is: "prefix", Value: "a."}, {Name: "e", Is: "exact", Value: ""},
			{Name: "s", Is: "suffix", Value: "+"}, {Name: "c", Is: "contains", Value: "c", Invert: true}, {Name: "r", Is: "regex", Value: "a|b"},
			{Name: "p", Is: "present"}, {Name: "n", Is: "absent"}, {Name: "m", Is: "absent", Invert: true}},
			Query: []plan.ValueMatch{{Name: "q", Is: "absent"}}}, Reply: &plan.Reply{Status: 200, Body: "<$>"}},
			`{"regex":"^(?:/x|/y)$","headers":[{"name":"Host","regex":"^a\\."},{"name":"e","equal":""},{"name":"s","regex":"\\+$"},` +
				`{"name":"c","regex":"c","not":true},{"name":"r","regex":"^(?:a|b)$"},{"name":"p"},{"name":"n","not":true},{"name":"m"},` +
				`{"name":"Content-Type","regex":"^application/grpc($|\\+)"}],"query":[{"name":"q","not":true}],"methods":["PUT"],` +
				`"respond":{"status":200,"body":"\u003c$\u003e"}}`},
		"edits": {plan.Route{Match: any, To: to("a"), Timeout: time.Second, RequestHeaders: []plan.HeaderEdit{{Name: "r", Act: "remove"},
			{Name: "s", Act: "set", Value: "$1"}}, ResponseHeaders: []plan.HeaderEdit{{Name: "a", Act: "append", Value: "1"}}},
			`{"prefix":"/","upstream":"a","timeout":"1s","request_headers":{"set":{"s":"$$1"},"remove":["r"]},"response_headers":{"add":{"a":"1"}}}`},
		"retries": {plan.Route{Match: any, To: to("a"), Timeout: time.Second, Retry: &plan.RouteRetry{On: []string{"gateway-error", "connect-failure", "retriable-4xx"},
			Attempts: 2}}, `{"prefix":"/","upstream":"a","timeout":"1s","retries":{"attempts":3,"statuses":[409,502,503,504]}}`},
		"hedge": {plan.Route{Match: any, To: to("a"), Timeout: time.Second, Retry: &plan.RouteRetry{On: []string{"reset"}, Attempts: 1, PerTry: 50 * time.Millisecond}, Hedge: true},
			`{"prefix":"/","upstream":"a","timeout":"1s","retries":{"attempts":2},"hedge":{"after":"50ms","tries":2,"percent":100}}`},
		"to https": {plan.Route{Match: any, Redirect: &plan.Redirect{Status: 301, Scheme: "https"}},
			`{"prefix":"/","redirect":{"status":301,"to":"https://$host$path$query"}}`},
		"redirect of all": {plan.Route{Match: plan.Match{Segments: "/a"}, Redirect: &plan.Redirect{Status: 302, Host: "o.example", Port: 81, Prefix: "/b", StripQuery: true}},
			`{"prefix":"/a","redirect":{"status":302,"to":"$scheme://o.example:81/b$rest"}}`},
		"redirect of the path": {plan.Route{Match: any, Redirect: &plan.Redirect{Status: 307, Path: "/$"}},
			`{"prefix":"/","redirect":{"status":307,"to":"$scheme://$authority/$$$query"}}`},
	} {
		p := serving(c.route)
		text, _, err := writer(t).Write(&p)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if want := `- {"names":["*"],"listeners":["l"],"routes":[` + c.want + "]}\n"; !strings.Contains(string(text), want) {
			t.Errorf("%s: no %s in\n%s", name, want, text)
		}
		if _, err := alone.Parse("f", t.TempDir(), text); err != nil {
			t.Errorf("%s: the proxy says %v of\n%s", name, err, text)
		}
	}
}

// TestFile compares a whole file, and has the proxy read it.
func TestFile(t *testing.T) {
	p := serving(plan.Route{Match: plan.Match{Prefix: "/"}, To: to("a"), Timeout: time.Second})
	p.Listeners[0].Chains[0].HTTP.Hosts[0].Domains = []string{"x.example", "*.x.example"}
	p.Clusters[0].Upstreams = append(p.Clusters[0].Upstreams,
		plan.Upstream{Address: netip.MustParseAddrPort("[::1]:80"), Weight: 4000, Priority: 1, Health: "healthy"},
		plan.Upstream{Address: netip.MustParseAddrPort("10.0.0.2:80"), Weight: 9, Health: "draining"})
	p.Listeners = append(p.Listeners,
		plan.Listener{Name: "n", Address: netip.MustParseAddrPort("[::]:443"), Chains: []plan.Chain{
			{ServerNames: []string{"a.example"}, TCP: &plan.TCP{To: to("a")}}, {TCP: &plan.TCP{To: to("gone")}}}},
		plan.Listener{Name: "t", Address: netip.MustParseAddrPort("127.0.0.1:5"), Chains: []plan.Chain{{TCP: &plan.TCP{To: to("a")}}}})
	text, index, err := writer(t).Write(&p)
	if err != nil {
		t.Fatal(err)
	}
	want := `version: 1
admin: a
listeners:
- {"name":"l","address":"0.0.0.0:80","protocol":"http"}
- {"name":"n","address":"[::]:443","protocol":"sni","names":[{"names":["a.example"],"upstream":"a"},{"names":["*"],"upstream":"gone"}]}
- {"name":"t","address":"127.0.0.1:5","protocol":"tcp","upstream":"a"}
hosts:
- {"names":["x.example","*.x.example"],"listeners":["l"],"routes":[{"prefix":"/","upstream":"a","timeout":"1s"}]}
- {"names":["*"],"listeners":["l"],"routes":[{"respond":{"status":404}}]}
upstreams:
- {"name":"a","endpoints":[{"address":"10.0.0.1:80","weight":1},{"address":"[::1]:80","weight":1000,"priority":1}],"balance":"round-robin","connect_timeout":"5s","connections":1024,"requests":1024}
- {"name":"gone","endpoints":[]}
`
	if string(text) != want {
		t.Errorf("wrote\n%s\nwant\n%s", text, want)
	}
	if fmt.Sprint(index) != "{[l n t] [a gone] [l l]}" {
		t.Errorf("index is %v", index)
	}
	if _, err := alone.Parse("f", t.TempDir(), text); err != nil {
		t.Error(err)
	}
	empty, _, err := writer(t).Write(&plan.Proxy{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := alone.Parse("f", t.TempDir(), empty); err != nil {
		t.Errorf("%v of\n%s", err, empty)
	}
}

// TestSecrets writes the files of what a plan names.
func TestSecrets(t *testing.T) {
	w := writer(t)
	w.Secrets["s"] = proxyfile.Secret{Chain: "/c", Key: "/k"}
	ca := filepath.Join(t.TempDir(), "ca")
	if err := os.WriteFile(ca, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w.Authorities["a"] = ca
	for alpn, want := range map[string]string{"h2": `,"http2":"only"`, "http/1.1": `,"http2":"off"`, "h2 http/1.1": ""} {
		p := serving(plan.Route{Match: plan.Match{Prefix: "/"}, To: to("a")})
		p.Clusters[0].HTTP2 = true
		p.Listeners[0].Chains[0].TLS = &plan.ServerTLS{Certificates: []string{"s"}, ALPN: strings.Fields(alpn)}
		text, _, err := w.Write(&p)
		if err != nil || !strings.Contains(string(text), `"protocol":"http"`+want+`,"tls"`) || !strings.Contains(string(text), `}],"protocol":"http2"`) {
			t.Errorf("%s: %v\n%s", alpn, err, text)
		}
	}
	p := serving(plan.Route{Match: plan.Match{Prefix: "/"}, To: to("a")})
	p.Listeners[0].Chains[0].TLS = &plan.ServerTLS{Certificates: []string{"s"}, ALPN: []string{"h2", "http/1.1"}}
	p.Listeners[0].Chains = append(p.Listeners[0].Chains, p.Listeners[0].Chains[0])
	p.Listeners[0].Chains[1].ServerNames = []string{"x.example"}
	p.Listeners[0].Chains[0].TLS.Clients = "a"
	p.Clusters[0].TLS = &plan.ClientTLS{Authorities: "a", ServerName: "up.example", Names: []string{"spiffe://t/ns/a/sa/b"}, Certificate: "s"}
	text, _, err := w.Write(&p)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"tls":{"certificates":[{"chain":"/c","key":"/k"}],"clients":{"ca":"` + ca + `"}}`,
		`"tls":{"name":"up.example","ca":"` + ca + `","names":["spiffe://t/ns/a/sa/b"],"certificate":{"chain":"/c","key":"/k"}}`} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
}

// TestRefused lists what the proxy does not do, or would do otherwise.
func TestRefused(t *testing.T) {
	w := writer(t)
	w.Secrets["s"] = proxyfile.Secret{Chain: "/c", Key: "/k"}
	w.Authorities["a"] = "/ca"
	for want, c := range map[string]func(*plan.Cluster){
		"lb_policy: \"maglev\"":  func(c *plan.Cluster) { c.Balance = "maglev" },
		"circuit_breakers: 0":    func(c *plan.Cluster) { c.Limits.Requests = 0 },
		"no secret of this name": func(c *plan.Cluster) { c.TLS = &plan.ClientTLS{Certificate: "none", ServerName: "x", Authorities: "a"} },
		"no name that one server has": func(c *plan.Cluster) {
			c.TLS = &plan.ClientTLS{Names: []string{"spiffe://t/*"}, ServerName: "x", Authorities: "a"}
		},
		`alpn_protocols: ["h2"]`: func(c *plan.Cluster) {
			c.TLS = &plan.ClientTLS{ServerName: "x", Authorities: "a", ALPN: []string{"h2"}}
		},
		`alpn_protocols: ["http/1.1"]`: func(c *plan.Cluster) {
			c.HTTP2, c.TLS = true, &plan.ClientTLS{ServerName: "x", Authorities: "a", ALPN: []string{"http/1.1"}}
		},
		"no authorities of this name": func(c *plan.Cluster) { c.TLS = &plan.ClientTLS{ServerName: "o", Authorities: "b"} },
	} {
		x := cluster("x", c)
		if err := w.Cluster(&x); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("cluster: %v, want %s", err, want)
		}
	}
	tcp, http := &plan.TCP{To: to("a")}, &plan.HTTP{}
	for want, chains := range map[string][]plan.Chain{
		"no chain":                                    nil,
		"one kind is held":                            {{HTTP: http}, {TCP: tcp}},
		"chains of TCP beside chains of HTTP":         {{TCP: tcp}, {HTTP: http}},
		"one is held for TCP":                         {{TCP: &plan.TCP{To: append(to("a"), to("b")...)}}},
		"not what codec_type takes":                   {{HTTP: &plan.HTTP{Codec: "http2"}, TLS: &plan.ServerTLS{Certificates: []string{"s"}, ALPN: []string{"http/1.1"}}}},
		"chains that differ in it":                    {{HTTP: http}, {ServerNames: []string{"x"}, HTTP: &plan.HTTP{Codec: "http1"}}},
		"differ in certificates alone":                {{HTTP: http}, {ServerNames: []string{"x"}, HTTP: &plan.HTTP{Hosts: []plan.Host{{Name: "h"}}}}},
		"serves some names alone":                     {{ServerNames: []string{"x"}, HTTP: http, TLS: &plan.ServerTLS{Certificates: []string{"s"}}}},
		"no authorities of this name":                 {{HTTP: http, TLS: &plan.ServerTLS{Certificates: []string{"s"}, Clients: "c"}}},
		"verify clients differently":                  {{HTTP: http, TLS: &plan.ServerTLS{Certificates: []string{"s"}, Clients: "a"}}, {ServerNames: []string{"x"}, HTTP: http, TLS: &plan.ServerTLS{Certificates: []string{"s"}}}},
		"no secret of this name":                      {{HTTP: http, TLS: &plan.ServerTLS{Certificates: []string{"other"}}}},
		"offered where bytes are carried":             {{TCP: tcp, TLS: &plan.ServerTLS{Certificates: []string{"s"}, ALPN: []string{"h2"}}}},
		"several chains that end TLS and carry bytes": {{TCP: tcp, TLS: &plan.ServerTLS{}}, {TCP: tcp, TLS: &plan.ServerTLS{}, ServerNames: []string{"x"}}},
	} {
		if err := w.Listener(&plan.Listener{Name: "l", Address: netip.MustParseAddrPort("1.2.3.4:5"), Chains: chains}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("listener: %v, want %s", err, want)
		}
	}
	match := plan.Match{Prefix: "/"}
	for want, r := range map[string]plan.Route{
		`match.headers: ":path"`:    {Match: plan.Match{Prefix: "/", Headers: []plan.ValueMatch{{Name: ":path", Is: "present"}}}},
		`match.headers: ":method"`:  {Match: plan.Match{Prefix: "/", Headers: []plan.ValueMatch{{Name: ":method", Is: "prefix", Value: "P"}}}},
		"per_try_timeout: 1s":       {Match: match, To: to("a"), Retry: &plan.RouteRetry{PerTry: time.Second}},
		"num_retries: 4: above 3":   {Match: match, To: to("a"), Retry: &plan.RouteRetry{PerTry: time.Second, Attempts: 4}, Hedge: true},
		"num_retries: 10":           {Match: match, To: to("a"), Retry: &plan.RouteRetry{Attempts: 10}},
		`retry_on: "unavailable"`:   {Match: match, To: to("a"), Retry: &plan.RouteRetry{On: []string{"unavailable"}}},
		"host_redirect has a port":  {Match: match, Redirect: &plan.Redirect{Host: "a:1", Port: 2}},
		"ADD_IF_ABSENT is not held": {Match: match, To: to("a"), RequestHeaders: []plan.HeaderEdit{{Name: "x", Act: "add", Value: "y"}}},
		`"x": changed twice`:        {Match: match, To: to("a"), ResponseHeaders: []plan.HeaderEdit{{Name: "x", Act: "remove"}, {Name: "x", Act: "set", Value: "y"}}},
	} {
		err := w.Hosts([]plan.Host{{Domains: []string{"*"}, Routes: []plan.Route{r}}})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.HasPrefix(err.Error(), "virtual_hosts[0].routes[0].") {
			t.Errorf("route: %v, want %s", err, want)
		}
	}
	if err := w.Hosts([]plan.Host{{Domains: []string{"a.*"}}}); err == nil || !strings.Contains(err.Error(), `domains: "a.*"`) {
		t.Errorf("host: %v", err)
	}
}
