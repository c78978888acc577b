package nginxconf

import (
	"fmt"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// listener is the one a listen directive means.
func (c *converter) listener(d directive) *listener {
	address := ":80"
	if len(d.args) > 0 {
		address = d.args[0]
	}
	switch {
	case strings.HasPrefix(address, "unix:"):
		c.problem(d, "a Unix socket to listen on is not converted")
	case strings.Trim(address, "0123456789") == "":
		address = ":" + address
	default:
		address = strings.Replace(withPort(address, "80"), "*:", ":", 1)
		address = strings.Replace(address, "[::]:", ":", 1) // which takes both families here
	}
	key := strings.TrimPrefix(address, ":")
	l := c.listeners[key]
	if l == nil {
		l = &listener{address: address, claimed: map[string]bool{}}
		c.listeners[key] = l
		c.order = append(c.order, key)
	}
	for _, a := range d.args[min(1, len(d.args)):] {
		switch a {
		case "ssl":
			l.tls = true
		case "default_server", "http2", "reuseport", "ipv6only=on", "ipv6only=off":
		default:
			c.problem(d, "listen %s is not converted", a)
		}
	}
	return l
}

// location is a location with what decides its turn.
type location struct {
	d    directive
	kind string // =, ^~, ~, ~*, or none
	path string
}

func (c *converter) server(d directive, s scope) {
	var locations []location
	var names []string
	var chain, key, authority string
	verify := "off"
	old, newest := false, false
	var on []*listener
	var returns *directive
	s.setSeen, s.addSeen = false, false
	for _, x := range d.block {
		switch {
		case x.name == "listen":
			if l := c.listener(x); !slices.Contains(on, l) { // of both families
				on = append(on, l)
			}
		case x.name == "server_name":
			names = append(names, c.names(x)...)
		case x.name == "ssl_certificate" && len(x.args) == 1:
			chain = x.args[0]
		case x.name == "ssl_certificate_key" && len(x.args) == 1:
			key = x.args[0]
		case x.name == "http2" && len(x.args) == 1:
			old = x.args[0] == "off"
		case x.name == "ssl_client_certificate" && len(x.args) == 1:
			authority = x.args[0]
		case x.name == "ssl_verify_client" && len(x.args) == 1:
			if verify = x.args[0]; verify == "optional_no_ca" {
				c.problem(x, "ssl_verify_client optional_no_ca is not converted: certificates are verified")
			}
		case x.name == "ssl_protocols": // 1.2 and 1.3 are what there is
			newest = !slices.Contains(x.args, "TLSv1.2") && slices.Contains(x.args, "TLSv1.3")
		case x.name == "location" && x.open:
			if l, ok := c.location(x); ok {
				locations = append(locations, l)
			}
		case x.name == "return":
			returns = &x
		default:
			c.setting(x, &s)
		}
	}
	if len(on) == 0 {
		on = append(on, c.listener(directive{line: d.line, name: "listen"}))
	}
	for _, l := range on {
		l.old, l.newest = l.old || old, l.newest || newest
		c.clients(d, l, authority, verify)
	}
	var routes string
	switch {
	case returns != nil:
		routes = c.route("", *returns, nil, s, "")
	default:
		routes = c.locations(d, locations, s)
	}
	c.host(d, on, names, [2]string{chain, key}, routes)
}

// clients demands certificates on a listener. nginx decides by the name that is
// asked for; here all hosts of a listener demand the same.
func (c *converter) clients(d directive, l *listener, authority, verify string) {
	rules := ""
	switch {
	case verify == "on" && authority != "":
		rules = "{ca: " + quote(authority) + "}"
	case verify == "optional" && authority != "":
		rules = "{ca: " + quote(authority) + ", optional: true}"
	case verify == "on":
		c.problem(d, "ssl_verify_client without ssl_client_certificate")
		return
	}
	if len(l.certs) > 0 && l.clients != rules {
		c.problem(d, "servers of one address that differ in ssl_verify_client are not converted")
		return
	}
	l.clients = rules
}

// host adds the virtual host of a server, once for each of its listeners: the
// names it answers for may differ.
func (c *converter) host(d directive, on []*listener, names []string, cert [2]string, routes string) {
	first := slices.ContainsFunc(d.block, func(x directive) bool {
		return x.name == "listen" && slices.Contains(x.args, "default_server")
	})
	for _, l := range on {
		if l.tls && cert[0] != "" && !slices.Contains(l.certs, cert) {
			l.certs = append(l.certs, cert)
		}
		own := []string{}
		for _, n := range names {
			if !l.claimed[n] {
				own = append(own, n)
				l.claimed[n] = true
			}
		}
		if first || !l.any {
			l.any = true
			own = append(own, "*")
		}
		if len(own) == 0 || routes == "" {
			c.problem(d, "server answers for no name, or does nothing")
			continue
		}
		quoted := make([]string, len(own))
		for i, n := range own {
			quoted[i] = quote(n)
		}
		c.hosts = append(c.hosts, fmt.Sprintf("- names: [%s]\n  listeners: [%s]\n  paths: loose\n  routes:\n%s", strings.Join(quoted, ", "),
			quote("listen-"+strings.TrimPrefix(l.address, ":")), routes))
	}
}

func (c *converter) names(d directive) (names []string) {
	for _, n := range d.args {
		switch {
		case n == "_" || n == "":
		case strings.HasPrefix(n, "."):
			names = append(names, n[1:], "*"+n)
		case strings.HasPrefix(n, "~") || strings.Contains(strings.TrimPrefix(n, "*."), "*"):
			c.problem(d, "server_name %s is not converted", n)
		default:
			names = append(names, n)
		}
	}
	return names
}

func (c *converter) location(d directive) (l location, ok bool) {
	l.d = d
	switch len(d.args) {
	case 1:
		l.path = d.args[0]
	case 2:
		l.kind, l.path = d.args[0], d.args[1]
	}
	if l.path == "" || l.path[0] == '@' || !slices.Contains([]string{"", "=", "^~", "~", "~*"}, l.kind) {
		c.problem(d, "location %s is not converted", strings.Join(d.args, " "))
		return l, false
	}
	return l, true
}

// locations puts locations in the order in which the first that matches is the
// one nginx takes: exact ones, those that stop the search, expressions, and the
// rest from long to short.
func (c *converter) locations(d directive, all []location, s scope) string {
	rank := map[string]int{"=": 0, "^~": 1, "~": 2, "~*": 2, "": 3}
	expressions := slices.ContainsFunc(all, func(l location) bool { return rank[l.kind] == 2 })
	for _, l := range all {
		for _, longer := range all {
			if expressions && l.kind == "^~" && longer.kind == "" && strings.HasPrefix(longer.path, l.path) {
				c.problem(longer.d, "a location inside location ^~ %s, beside regular expressions, is not converted", l.path)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b location) int {
		ra, rb := rank[a.kind], rank[b.kind]
		if !expressions && ra == 1 {
			ra = 3
		}
		if !expressions && rb == 1 {
			rb = 3
		}
		if ra != rb || ra == 2 {
			return ra - rb
		}
		return len(b.path) - len(a.path)
	})
	var b strings.Builder
	whole := false
	for _, l := range all {
		whole = whole || l.path == "/" && l.kind != "="
		b.WriteString(c.locate(l, s))
	}
	if !whole && s.root != "" {
		b.WriteString(c.route("", d, nil, s, ""))
	}
	return b.String()
}

// locate renders one location.
func (c *converter) locate(l location, s scope) string {
	match, prefix := "", l.path
	switch {
	case l.kind == "=":
		match = "path: " + quote(l.path)
	case l.kind == "~" || l.kind == "~*":
		e := l.path
		if l.kind == "~*" {
			e = "(?i)" + e
		}
		if _, err := regexp.Compile(e); err != nil {
			c.problem(l.d, "%v; expressions are RE2", err)
			return ""
		}
		match, prefix = "regex: "+quote(e), ""
	case strings.HasSuffix(l.path, "/"):
		match = "prefix: " + quote(l.path)
	default: // ends anywhere, not only where a segment does
		match = "regex: " + quote("^"+regexp.QuoteMeta(l.path)+"(.*)")
	}
	s.setSeen, s.addSeen = false, false
	var action *directive
	var rest []directive
	for _, x := range l.d.block {
		if x.name == "proxy_pass" || x.name == "grpc_pass" || x.name == "return" {
			action = &x
		} else {
			rest = append(rest, x)
		}
	}
	if action == nil {
		return c.route(match, l.d, rest, s, prefix)
	}
	return c.route(match, *action, rest, s, prefix)
}

// route renders what happens to what matches. prefix is what the location cuts.
func (c *converter) route(match string, d directive, settings []directive, s scope, prefix string) string {
	for _, x := range settings {
		c.setting(x, &s)
	}
	lines := []string{}
	if match != "" {
		lines = append(lines, match)
	}
	switch d.name {
	case "proxy_pass", "grpc_pass":
		lines = append(lines, c.pass(d, s, match, prefix)...)
		lines = append(lines, s.cache.lines()...)
	case "return":
		lines = append(lines, c.returns(d)...)
	default:
		if s.root == "" {
			c.problem(d, "nothing to do: neither proxy_pass, return nor root")
			return ""
		}
		static := "root: " + quote(s.root) + ", index: ["
		for i, x := range s.index {
			if i > 0 {
				static += ", "
			}
			static += quote(x)
		}
		static += "]"
		if s.try != "" {
			static += ", try: " + quote(s.try)
		}
		lines = append(lines, "static: {"+static+"}")
	}
	lines = append(lines, "body: "+s.body)
	if s.gzip {
		types := make([]string, len(s.types))
		for i, t := range s.types {
			types[i] = quote(t)
		}
		lines = append(lines, fmt.Sprintf("gzip: {types: [%s], min: %s, level: %s}", strings.Join(types, ", "), s.min, s.level))
	}
	if s.rate != "" {
		lines = append(lines, "rate: "+s.rate)
	}
	if len(s.add) > 0 {
		lines = append(lines, "response_headers: {add: "+fields(s.add)+"}")
	}
	return "  - " + strings.Join(lines, "\n    ") + "\n"
}

func fields(m map[string]string) string {
	var b []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		b = append(b, quote(k)+": "+quote(m[k]))
	}
	return "{" + strings.Join(b, ", ") + "}"
}

// pass renders proxy_pass.
func (c *converter) pass(d directive, s scope, match, prefix string) (lines []string) {
	if len(d.args) != 1 || strings.Contains(d.args[0], "$") {
		c.problem(d, "%s is converted without variables", d.name)
		return nil
	}
	speaks, to := "http", d.args[0]
	if d.name == "grpc_pass" {
		speaks = "grpc"
		if to = strings.Replace(to, "grpc", "http", 1); !strings.Contains(d.args[0], "://") {
			to = "http://" + d.args[0]
		}
	}
	u, err := url.Parse(to)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		c.problem(d, "%s %s is not converted", d.name, d.args[0])
		return nil
	}
	name, port := u.Host, map[string]string{"http": "80", "https": "443"}[u.Scheme]
	if u.Scheme == "https" {
		if c.known[name] {
			c.problem(d, "proxy_pass by https to an upstream block: write tls: {} to that upstream by hand")
		}
	}
	if !c.known[name] {
		c.known[name] = true
		up := "- name: " + quote(name) + "\n  endpoints: [{address: " + quote(withPort(name, port)) + "}]\n"
		if u.Scheme == "https" {
			up += "  tls: {}\n"
		}
		c.upstreams = append(c.upstreams, up)
	}
	c.protocol(d, name, speaks)
	lines = append(lines, "upstream: "+quote(name), "timeout: "+s.timeout)
	if u.Path != "" {
		switch {
		case prefix == "":
			c.problem(d, "proxy_pass with a path in a location by expression is not converted")
		case strings.HasPrefix(match, "path:"):
			lines = append(lines, "rewrite: "+quote(u.Path))
		case strings.HasPrefix(match, "regex:"):
			lines = append(lines, "rewrite: "+quote(u.Path+"$1"))
		default:
			lines = append(lines, "rewrite: "+quote(u.Path+"$rest"))
		}
	}
	set := maps.Clone(s.set)
	switch host := set["Host"]; {
	case host == "$host" || host == "$http_host":
	case host == "" || host == "$proxy_host":
		lines = append(lines, "host: "+quote(name))
	case strings.Contains(host, "$"):
		c.problem(d, "proxy_set_header Host %s is not converted", host)
	default:
		lines = append(lines, "host: "+quote(host))
	}
	delete(set, "Host")
	if len(set) > 0 {
		lines = append(lines, "request_headers: {set: "+fields(set)+"}")
	}
	return lines
}

// protocol notes what an upstream speaks, which all who pass to it agree on.
func (c *converter) protocol(d directive, name, speaks string) {
	switch before := c.speaks[name]; {
	case before == speaks:
		return
	case before != "":
		c.problem(d, "proxy_pass and grpc_pass to the same servers are not converted: an upstream speaks one protocol")
		return
	}
	c.speaks[name] = speaks
	if speaks == "http" {
		return
	}
	head := "- name: " + quote(name) + "\n"
	for i, up := range c.upstreams {
		if rest, ok := strings.CutPrefix(up, head); ok {
			c.upstreams[i] = head + "  protocol: " + speaks + "\n" + rest
		}
	}
}

// returns renders return.
func (c *converter) returns(d directive) []string {
	if len(d.args) == 0 || len(d.args) > 2 {
		c.problem(d, "return with %d arguments", len(d.args))
		return nil
	}
	status, text := d.args[0], ""
	if len(d.args) == 2 {
		text = d.args[1]
	} else if strings.Contains(status, "/") {
		status, text = "302", d.args[0]
	}
	if slices.Contains([]string{"301", "302", "303", "307", "308"}, status) {
		return []string{"redirect: {status: " + status + ", to: " + quote(c.text(d, text)) + "}"}
	}
	if status == "444" || strings.Contains(text, "$") {
		c.problem(d, "return %s is not converted", strings.Join(d.args, " "))
	}
	return []string{"respond: {status: " + status + ", body: " + quote(text) + "}"}
}
