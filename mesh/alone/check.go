package alone

import (
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/route"
)

// maxPriority of an endpoint.
const maxPriority = 127

// check notes everything that could not work, and compiles what Load returns.
func (r *reading) check(c *Config) {
	if c.Version != 1 {
		r.fault("version", "%d is not known; write version: 1", c.Version)
	}
	r.oneOf("access_log.format", c.AccessLog.Format, "text", "json")
	if c.Limits.Head > maxHead || c.Limits.Head < 1<<10 {
		r.fault("limits.head", "%d bytes is out of range; use 1KiB to 16KiB", c.Limits.Head)
	}
	r.positive("limits.connections", c.Limits.Connections)
	if c.AccessLog.Collector != nil {
		r.collector("access_log.collector", c.AccessLog.Collector)
	}
	if c.Traces != nil {
		r.traces(c.Traces)
	}
	upstreams := r.upstreams(c)
	r.rateService(c, upstreams)
	r.listeners(c, upstreams)
	r.hosts(c, upstreams)
}

func (r *reading) oneOf(field, value string, known ...string) {
	if !slices.Contains(known, value) {
		r.fault(field, "%q is not known; use %s", value, strings.Join(known, ", "))
	}
}

func (r *reading) positive(field string, n int) {
	if n < 1 {
		r.fault(field, "%d is too few; use 1 or more", n)
	}
}

// name notes a name that is missing or taken.
func (r *reading) name(field, name string, seen map[string]bool) {
	switch {
	case name == "":
		r.fault(field, "is missing; give it a name of its own")
	case seen[name]:
		r.fault(field, "%q is taken; give it a name of its own", name)
	}
	seen[name] = true
}

func (r *reading) known(field, name string, names map[string]bool) {
	if !names[name] {
		r.fault(field, "no upstream %q; declare it under upstreams", name)
	}
}

func (r *reading) address(field, s string, server bool) {
	host, port, err := net.SplitHostPort(s)
	n, perr := strconv.ParseUint(port, 10, 16)
	if err != nil || perr != nil || server && (host == "" || n == 0) {
		r.fault(field, "%q is no address; write for example 127.0.0.1:8080 or [::1]:8080", s)
	}
}

func (r *reading) upstreams(c *Config) map[string]bool {
	seen := map[string]bool{}
	for i, u := range c.Upstreams {
		at := fmt.Sprintf("upstreams[%d]", i)
		r.name(at+".name", u.Name, seen)
		if len(u.Endpoints) == 0 && c.Admin == "" { // with admin, they may come later
			r.fault(at+".endpoints", "is empty; list at least one address")
		}
		for j, e := range u.Endpoints {
			r.address(fmt.Sprintf("%s.endpoints[%d].address", at, j), e.Address, true)
			if e.Weight < 1 || e.Weight > 1000 {
				r.fault(fmt.Sprintf("%s.endpoints[%d].weight", at, j), "%d is out of range; use 1 to 1000", e.Weight)
			}
			if e.Priority < 0 || e.Priority > maxPriority {
				r.fault(fmt.Sprintf("%s.endpoints[%d].priority", at, j), "%d is out of range; use 0 to %d", e.Priority, maxPriority)
			}
		}
		r.oneOf(at+".balance", u.Balance, policies...)
		r.balance(at, &c.Upstreams[i])
		r.oneOf(at+".protocol", u.Protocol, "http", "http2", "grpc", "bolt", "dubbo")
		r.oneOf(at+".proxy_protocol", u.ProxyProtocol, "", "v1", "v2")
		if u.Protocol != "http" && u.ProxyProtocol != "" {
			r.fault(at+".proxy_protocol", "goes with protocol http; connections of %s are shared by clients", u.Protocol)
		}
		if u.Connections < 0 || u.Idle < 0 || u.Requests < 0 {
			r.fault(at, "a negative number of connections or requests")
		}
		if u.TLS != nil {
			if _, _, err := u.TLS.config(u); err != nil {
				r.fault(at+".tls.ca", "%v", err)
			}
			if x := u.TLS.Certificate; x != nil {
				r.certificate(at+".tls.certificate", c, *x)
			}
			r.trust(at+".tls", c, u.TLS.CA, u.TLS.Authorities, u.TLS.Bundles, u.TLS.Names, false)
		}
	}
	return seen
}

// policies are the names of ways to balance.
var policies = []string{string(balance.LeastRequest), string(balance.RoundRobin), string(balance.Random), string(balance.PeakEWMA),
	string(balance.Maglev), string(balance.RingHash)}

// balance makes the policy of an upstream.
func (r *reading) balance(at string, u *Upstream) {
	seen := map[string]bool{}
	for j, e := range u.Endpoints {
		if seen[e.Address] {
			r.fault(fmt.Sprintf("%s.endpoints[%d].address", at, j), "%q is there twice; give it a weight", e.Address)
		}
		seen[e.Address] = true
	}
	o := u.Outlier
	p := balance.Policy{Balancer: balance.Balancer(u.Balance), SlowStart: time.Duration(u.SlowStart), Panic: 1,
		Limits: balance.Limits{Requests: int64(u.Requests)},
		Outlier: &balance.Outlier{Failures: uint32(max(o.Failures, 0)), Unreachable: uint32(max(o.Unreachable, 0)), Ejection: time.Duration(o.Ejection),
			MaxEjected: uint32(max(o.MaxEjected, 0))}}
	if c := u.Check; c != nil {
		p.Check = &balance.Check{Interval: time.Duration(c.Interval), Timeout: time.Duration(c.Timeout), Unhealthy: uint32(max(c.Unhealthy, 0)),
			Healthy: uint32(max(c.Healthy, 0))}
		if c.Path != "" && c.Path[0] != '/' {
			r.fault(at+".check.path", "%q does not begin with /", c.Path)
		}
	}
	if !slices.Contains(policies, u.Balance) {
		return // said already
	}
	var err error
	if u.policy, err = p.Checked(); err != nil {
		r.fault(at, "%v", err)
	}
}

// config is the TLS configuration towards an upstream, and what tells its rules
// from others: the file of the authorities may change under its name.
func (t *ClientTLS) config(u Upstream) (cfg *tls.Config, rules string, err error) {
	cfg = &tls.Config{MinVersion: tls.VersionTLS12, ServerName: t.Name, NextProtos: []string{"http/1.1"}}
	switch u.Protocol {
	case "http2", "grpc":
		cfg.NextProtos = []string{"h2"}
	case "bolt", "dubbo":
		cfg.NextProtos = nil
	}
	es := u.Endpoints
	if cfg.ServerName == "" && len(es) > 0 {
		cfg.ServerName, _, _ = net.SplitHostPort(es[0].Address)
	}
	var sum [sha256.Size]byte
	if t.CA != "" {
		if cfg.RootCAs, sum, err = readPool(t.CA); err != nil {
			return nil, "", err
		}
	}
	if len(t.Names) > 0 {
		cfg.InsecureSkipVerify = true // of the host name; the rest is done here
		cfg.VerifyConnection = t.verify(cfg.RootCAs)
	}
	return cfg, fmt.Sprintf("%q %q %x %q %q %q %v", cfg.ServerName, t.CA, sum, t.Authorities, t.Bundles, t.Names, t.Certificate), nil
}

func (r *reading) listeners(c *Config, upstreams map[string]bool) {
	if len(c.Listeners) == 0 && c.Admin == "" { // with admin, they may come later
		r.fault("listeners", "is empty; list at least one address to serve")
	}
	names, addresses := map[string]bool{}, map[string]bool{}
	for i := range c.Listeners {
		l := &c.Listeners[i]
		at := fmt.Sprintf("listeners[%d]", i)
		r.name(at+".name", l.Name, names)
		r.address(at+".address", l.Address, false)
		if addresses[l.key()] {
			r.fault(at+".address", "%q is served by another listener", l.Address)
		}
		addresses[l.key()] = true
		r.oneOf(at+".protocol", l.Protocol, "http", "tcp", "udp", "sni", "bolt", "dubbo")
		if r.datagrams(at, l, c, upstreams) {
			continue
		}
		r.oneOf(at+".http2", l.HTTP2, "on", "off", "only")
		r.positive(at+".connections", l.Connections)
		for j, s := range l.ProxyProtocol {
			p, err := netip.ParsePrefix(s)
			if err != nil {
				r.fault(fmt.Sprintf("%s.proxy_protocol_from[%d]", at, j), "%q is no network; write for example 10.0.0.0/8", s)
			}
			l.from = append(l.from, p)
		}
		r.serverTLS(at, c, l)
		r.layer4(at, l, c, upstreams)
		r.calls(at, l, c, upstreams)
	}
}

func (r *reading) clients(at string, all *Config, c *Clients) {
	r.trust(at, all, c.CA, c.Authorities, c.Bundles, c.Names, true)
	if c.CA != "" {
		if _, _, err := readPool(c.CA); err != nil {
			r.fault(at+".ca", "%v", err)
		}
	}
	for i, name := range c.Names {
		if name == "" || strings.Contains(strings.TrimSuffix(name, "*"), "*") {
			r.fault(fmt.Sprintf("%s.names[%d]", at, i), "%q is no name; write a SPIFFE id or a DNS name, whole or its beginning and a *", name)
		}
	}
}

func (r *reading) serverTLS(at string, all *Config, l *Listener) {
	if l.TLS == nil {
		return
	}
	if l.Protocol == "sni" {
		r.fault(at+".tls", "sni passes TLS on; end it with protocol http or tcp")
	}
	if len(l.TLS.Certificates) == 0 {
		r.fault(at+".tls.certificates", "is empty; list at least one chain and its key")
	}
	r.oneOf(at+".tls.min_version", l.TLS.MinVersion, "1.2", "1.3")
	if c := l.TLS.Clients; c != nil {
		r.clients(at+".tls.clients", all, c)
	}
	for j, cert := range l.TLS.Certificates {
		r.certificate(fmt.Sprintf("%s.tls.certificates[%d]", at, j), all, cert)
	}
}

func (r *reading) layer4(at string, l *Listener, c *Config, upstreams map[string]bool) {
	if l.Protocol == "tcp" {
		r.known(at+".upstream", l.Upstream, upstreams)
		r.speaks(at+".upstream", c, "http", l.Upstream)
	} else if l.Upstream != "" {
		r.fault(at+".upstream", "goes with protocol tcp or udp; http is routed under hosts")
	}
	if l.Protocol != "sni" {
		if len(l.Names) > 0 {
			r.fault(at+".names", "goes with protocol sni")
		}
		return
	}
	if len(l.Names) == 0 {
		r.fault(at+".names", "is empty; list the names and their upstream")
	}
	var table route.Table[string]
	for j, n := range l.Names {
		field := fmt.Sprintf("%s.names[%d]", at, j)
		r.known(field+".upstream", n.Upstream, upstreams)
		r.speaks(field+".upstream", c, "http", n.Upstream)
		for _, name := range n.Names {
			if err := table.Add(name, &route.Host[string]{}); err != nil {
				r.fault(field+".names", "%v", err)
			}
		}
	}
}

// goals are the upstreams that a route names.
func (x *Route) goals() (names []string) {
	names = append(names, x.Upstream)
	for _, s := range x.Split {
		names = append(names, s.Upstream)
	}
	if x.Mirror != nil {
		names = append(names, x.Mirror.Upstream)
	}
	return names
}

// speaks notes an upstream whose protocol does not go with who leads there. http
// stands for what passes bytes on as they are.
func (r *reading) speaks(field string, c *Config, protocol, name string) {
	for _, u := range c.Upstreams {
		if u.Name == name && u.Protocol != protocol {
			r.fault(field, "%q speaks %s; bytes go to upstreams without a protocol", name, u.Protocol)
		}
	}
}

// http notes upstreams that do not speak HTTP.
func (r *reading) http(field string, c *Config, names ...string) {
	for _, u := range c.Upstreams {
		if slices.Contains(names, u.Name) && speaksRPC(u.Protocol) {
			r.fault(field, "%q speaks %s, which goes with a listener of that protocol", u.Name, u.Protocol)
		}
	}
}

func (r *reading) hosts(c *Config, upstreams map[string]bool) {
	tables, cached := map[string]*route.Table[bool]{}, map[string]map[string]bool{}
	for _, l := range c.Listeners {
		if l.Protocol == "http" {
			tables[l.Name], cached[l.Name] = &route.Table[bool]{}, map[string]bool{}
		}
	}
	if len(tables) > 0 && len(c.Hosts) == 0 {
		r.fault("hosts", `is empty; a listener of protocol http needs one, for example names: ["*"]`)
	}
	for i := range c.Hosts {
		h := &c.Hosts[i]
		at := fmt.Sprintf("hosts[%d]", i)
		r.oneOf(at+".paths", h.Paths, "strict", "loose")
		if len(h.Names) == 0 {
			r.fault(at+".names", `is empty; name hosts, or write "*" for any`)
		}
		if len(h.Routes) == 0 {
			r.fault(at+".routes", "is empty; list at least one")
		}
		for j, l := range h.Listeners {
			if tables[l] == nil {
				r.fault(fmt.Sprintf("%s.listeners[%d]", at, j), "no listener %q of protocol http", l)
			}
		}
		for name, t := range tables {
			if len(h.Listeners) > 0 && !slices.Contains(h.Listeners, name) {
				continue
			}
			for j, n := range h.Names {
				if err := t.Add(n, &route.Host[bool]{}); err != nil {
					r.fault(fmt.Sprintf("%s.names[%d]", at, j), "%v on listener %s", err, name)
				}
			}
			r.cached(at, h, name, cached[name])
		}
		for j := range h.Routes {
			x, field := &h.Routes[j], fmt.Sprintf("%s.routes[%d]", at, j)
			groups := r.route(field, x, upstreams)
			r.transcode(field, &h.Routes[j], c)
			r.globalRate(field, x, groups, c.RateService != nil)
			if x.Transcode == nil { // which says itself what it speaks
				r.http(field, c, x.goals()...)
			}
		}
	}
}

// cached notes routes of a listener that would share what they store.
func (r *reading) cached(at string, h *Host, listener string, seen map[string]bool) {
	for j := range h.Routes {
		if h.Routes[j].Cache == nil || len(h.Names) == 0 {
			continue
		}
		name := h.label(j)
		if seen[name] {
			r.fault(fmt.Sprintf("%s.routes[%d].name", at, j), "%q is the name of another route with cache on listener %s; give it a name of its own", name, listener)
		}
		seen[name] = true
	}
}

func (r *reading) route(at string, x *Route, upstreams map[string]bool) (groups int) {
	groups = r.match(at, x)
	r.action(at, x, groups, upstreams)
	r.template(at+".rewrite", x.Rewrite, groups)
	if x.Rewrite != "" && x.Rewrite[0] != '/' && x.Rewrite[0] != '$' {
		r.fault(at+".rewrite", "%q is no path; begin with /", x.Rewrite)
	}
	r.edit(at+".request_headers", &x.RequestHeaders, groups)
	r.edit(at+".response_headers", &x.ResponseHeaders, groups)
	if m := x.Mirror; m != nil {
		r.known(at+".mirror.upstream", m.Upstream, upstreams)
		if m.Percent < 1 || m.Percent > 100 {
			r.fault(at+".mirror.percent", "%d is out of range; use 1 to 100", m.Percent)
		}
	}
	if x.Deadline != "" {
		r.fieldName(at+".deadline", x.Deadline)
	}
	if x.Cache != nil && (x.Upstream == "" && len(x.Split) == 0 || x.Transcode != nil) {
		r.fault(at+".cache", "goes with upstream or split, without transcode")
	}
	if x.Retries != nil && (x.Retries.Attempts < 1 || x.Retries.Attempts > 10) {
		r.fault(at+".retries.attempts", "%d is out of range; use 1 to 10, the first included", x.Retries.Attempts)
	}
	if x.Hedge != nil {
		r.hedge(at+".hedge", x)
	}
	if g := x.Gzip; g != nil && (g.Level < 1 || g.Level > 9) {
		r.fault(at+".gzip.level", "%d is out of range; use 1 to 9", g.Level)
	}
	if l := x.Rate; l != nil {
		r.rate(at, l)
	}
	if name, ok := strings.CutPrefix(x.Hash, "header:"); x.Hash != "" && x.Hash != "client" && (!ok || http1.CheckField(name, "") != nil) {
		r.fault(at+".hash", "%q is not known; use client or header:NAME", x.Hash)
	}
	return groups
}

// match compiles what is demanded of a request, and counts the groups of its
// expression.
func (r *reading) match(at string, x *Route) (groups int) {
	m := route.Match{Exact: x.Path, Prefix: x.Prefix, Methods: x.Methods}
	ways := 0
	for _, s := range []string{x.Path, x.Prefix, x.Regex} {
		if s != "" {
			ways++
		}
	}
	if ways > 1 {
		r.fault(at, "more than one of path, prefix and regex; use one")
	}
	for field, s := range map[string]string{".path": x.Path, ".prefix": x.Prefix} {
		if s != "" && s[0] != '/' {
			r.fault(at+field, "%q does not begin with /", s)
		}
	}
	if x.Regex != "" {
		var err error
		if m.Pattern, err = regexp.Compile(x.Regex); err != nil {
			r.fault(at+".regex", "%v; expressions are RE2, begin with ^ to bind the beginning", err)
			m.Pattern = regexp.MustCompile("$^")
		}
		groups = m.Pattern.NumSubexp()
	}
	for i, method := range x.Methods {
		if http1.CheckField(method, "") != nil {
			r.fault(fmt.Sprintf("%s.methods[%d]", at, i), "%q is no method", method)
		}
	}
	ok := r.values(at+".headers", x.Headers)
	if r.values(at+".query", x.Query) && ok {
		m.Fields, m.Query = values(x.Headers), values(x.Query)
	}
	x.match = m
	return groups
}

func (r *reading) values(at string, vs []Value) bool {
	before := len(r.faults)
	for i, v := range vs {
		field := fmt.Sprintf("%s[%d]", at, i)
		if v.Name == "" {
			r.fault(field+".name", "is missing")
		}
		if v.Equal != nil && v.Regex != "" {
			r.fault(field, "both equal and regex; use one")
		}
		if _, err := regexp.Compile(v.Regex); err != nil {
			r.fault(field+".regex", "%v", err)
		}
	}
	return len(r.faults) == before
}

func (r *reading) action(at string, x *Route, groups int, upstreams map[string]bool) {
	actions := 0
	if x.Upstream != "" {
		actions++
		r.known(at+".upstream", x.Upstream, upstreams)
	}
	if len(x.Split) > 0 {
		actions++
		r.split(at, x.Split, upstreams)
	}
	if d := x.Redirect; d != nil {
		actions++
		r.template(at+".redirect.to", d.To, groups)
		if !slices.Contains([]int{301, 302, 303, 307, 308}, d.Status) {
			r.fault(at+".redirect.status", "%d does not redirect; use 301, 302, 303, 307 or 308", d.Status)
		}
		if d.To == "" {
			r.fault(at+".redirect.to", "is missing; write for example https://$host$uri")
		}
	}
	if d := x.Respond; d != nil {
		actions++
		if d.Status < 200 || d.Status > 599 {
			r.fault(at+".respond.status", "%d is out of range; use 200 to 599", d.Status)
		}
		if err := http1.CheckField("Content-Type", d.Type); err != nil {
			r.fault(at+".respond.type", "%v", err)
		}
	}
	if s := x.Static; s != nil {
		actions++
		if fi, err := os.Stat(s.Root); err != nil || !fi.IsDir() {
			r.fault(at+".static.root", "%v", errors.Join(err, fmt.Errorf("%q is no directory", s.Root)))
		}
	}
	if actions != 1 {
		r.fault(at, "%d actions; use exactly one of upstream, split, redirect, respond and static", actions)
	}
}

func (r *reading) template(field, s string, groups int) {
	t, err := route.ParseTemplate(s)
	if err != nil {
		r.fault(field, "%v", err)
		return
	}
	if n := t.Groups(); n > groups {
		r.fault(field, "$%d, but the regex of the route has %d groups", n, groups)
	}
	if err := http1.CheckField("x", s); err != nil {
		r.fault(field, "a control character")
	}
}

// framed are fields that say where a message ends or who gets it.
var framed = []string{"Content-Length", "Transfer-Encoding", "Connection", "Host", "Upgrade", "Trailer", "TE", "Keep-Alive"}

func (r *reading) edit(at string, e *Edit, groups int) {
	for field, m := range map[string]map[string]string{at + ".set": e.Set, at + ".add": e.Add} {
		for name, value := range m {
			r.fieldName(field, name)
			r.template(field+"."+name, value, groups)
		}
	}
	for i, name := range e.Remove {
		r.fieldName(fmt.Sprintf("%s.remove[%d]", at, i), name)
	}
}

func (r *reading) fieldName(field, name string) {
	if err := http1.CheckField(name, ""); err != nil {
		r.fault(field, "%v", err)
	}
	if slices.ContainsFunc(framed, func(f string) bool { return strings.EqualFold(f, name) }) {
		r.fault(field, "%s is the proxy's own to write; to change the Host sent, use host", name)
	}
}
