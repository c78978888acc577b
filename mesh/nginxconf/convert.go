package nginxconf

import (
	"fmt"
	"net"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// ignored directives say something about nginx itself, or about what is so here
// anyway.
var ignored = strings.Fields(`user worker_processes worker_rlimit_nofile pid error_log events daemon sendfile tcp_nopush tcp_nodelay types
	default_type types_hash_max_size server_tokens keepalive_requests access_log log_format proxy_http_version gzip_vary gzip_proxied
	gzip_disable ssl_session_cache ssl_session_timeout ssl_prefer_server_ciphers ssl_session_tickets proxy_redirect_off charset keepalive
	server_names_hash_bucket_size proxy_buffering proxy_request_buffering gzip_buffers gzip_http_version
	proxy_cache_lock proxy_cache_lock_timeout proxy_cache_revalidate ssl_verify_depth`)

// scope is what a block inherits.
type scope struct {
	root, body, timeout, try string
	index                    []string
	gzip                     bool
	types                    []string
	min, level               string
	rate                     string
	set                      map[string]string // request header
	setSeen                  bool
	add                      map[string]string // response header
	addSeen                  bool
	cache                    cached
}

// cached is what a location says of storing answers.
type cached struct {
	on                       bool
	valid, onError, updating string
}

// longStale is for how long nginx would use what is stale: it sets no end.
const longStale = "24h"

// lines render it.
func (c *cached) lines() []string {
	if !c.on {
		return nil
	}
	var parts []string
	for _, p := range [][2]string{{"valid", c.valid}, {"stale_if_error", c.onError}, {"stale_while_revalidate", c.updating}} {
		if p[1] != "" {
			parts = append(parts, p[0]+": "+p[1])
		}
	}
	return []string{"cache: {" + strings.Join(parts, ", ") + "}"}
}

type converter struct {
	problems  []Problem
	zones     map[string]string // limit_req_zone: requests and period
	upstreams []string          // rendered
	known     map[string]bool
	speaks    map[string]string // an upstream: http or grpc, once somebody passes to it
	listeners map[string]*listener
	order     []string
	hosts     []string
	idle      string
}

type listener struct {
	address string
	tls     bool
	certs   [][2]string
	any     bool   // somebody answers for every name
	clients string // who must show a certificate
	old     bool   // no HTTP/2
	newest  bool   // TLS 1.3 alone: nginx decides by the name, here the strictest does
	claimed map[string]bool
}

// Convert turns nginx.conf into proxy.yaml. Problems are what is not in it.
func Convert(text string) (yaml string, problems []Problem, err error) {
	r := &reader{text: text, line: 1}
	all, err := r.block(0)
	if err != nil {
		return "", nil, fmt.Errorf("read nginx.conf: %w", err)
	}
	c := &converter{zones: map[string]string{}, known: map[string]bool{}, speaks: map[string]string{}, listeners: map[string]*listener{}}
	for _, d := range all {
		if d.name == "http" && d.open {
			c.http(d.block)
		} else if !slices.Contains(ignored, d.name) {
			c.problem(d, "%s is not converted", d.name)
		}
	}
	slices.SortStableFunc(c.problems, func(a, b Problem) int { return a.Line - b.Line })
	return c.render(), c.problems, nil
}

func (c *converter) problem(d directive, format string, args ...any) {
	c.problems = append(c.problems, Problem{d.line, fmt.Sprintf(format, args...)})
}

func (c *converter) http(block []directive) {
	s := scope{body: "1MiB", timeout: "60s", min: "20", level: "1", types: []string{"text/html"}, index: []string{"index.html"}}
	var servers []directive
	for _, d := range block {
		switch {
		case d.name == "server" && d.open:
			servers = append(servers, d)
		case d.name == "upstream" && d.open && len(d.args) == 1:
			c.upstream(d)
		case d.name == "limit_req_zone":
			c.zone(d)
		case d.name == "proxy_cache_path":
			c.problem(d, "answers are stored in memory, not in files: cache.memory says how much, 64MiB unless it does")
		case d.name == "keepalive_timeout" && len(d.args) > 0:
			c.idle = duration(d.args[0])
		case d.name == "include" && len(d.args) == 1 && strings.HasSuffix(d.args[0], "mime.types"):
		default:
			c.setting(d, &s)
		}
	}
	for _, d := range servers { // the first of an address answers for every name, unless one says that it does
		for _, x := range d.block {
			if x.name == "listen" && slices.Contains(x.args, "default_server") {
				c.listener(x).any = true
			}
		}
	}
	for _, d := range servers {
		c.server(d, s)
	}
}

// setting reads what any block may say.
func (c *converter) setting(d directive, s *scope) {
	one := len(d.args) == 1
	switch {
	case d.name == "root" && one:
		s.root = d.args[0]
	case d.name == "index":
		s.index = d.args
	case d.name == "client_max_body_size" && one:
		if s.body = size(d.args[0]); s.body == "" {
			c.problem(d, "%q is no size", d.args[0])
		}
	case d.name == "proxy_read_timeout" && one:
		s.timeout = duration(d.args[0])
	case d.name == "gzip" && one:
		s.gzip = d.args[0] == "on"
	case d.name == "gzip_types":
		s.types = append([]string{"text/html"}, d.args...)
	case d.name == "gzip_min_length" && one:
		s.min = d.args[0]
	case d.name == "gzip_comp_level" && one:
		s.level = d.args[0]
	case d.name == "limit_req":
		c.limit(d, s)
	case strings.HasPrefix(d.name, "proxy_cache"):
		c.caching(d, s)
	case d.name == "try_files":
		c.try(d, s)
	case d.name == "proxy_set_header" && len(d.args) == 2:
		c.header(d, s)
	case d.name == "add_header" && len(d.args) >= 2:
		if !s.addSeen { // as with proxy_set_header
			s.add, s.addSeen = map[string]string{}, true
		}
		s.add[d.args[0]] = c.text(d, d.args[1])
	case slices.Contains(ignored, d.name):
	default:
		c.problem(d, "%s is not converted", d.name)
	}
}

func (c *converter) limit(d directive, s *scope) {
	zone, burst, immediate := "", 0, false
	for _, a := range d.args {
		name, value, _ := strings.Cut(a, "=")
		switch name {
		case "zone":
			zone = value
		case "burst":
			burst, _ = strconv.Atoi(value)
		case "nodelay":
			immediate = true
		default:
			c.problem(d, "limit_req %s is not converted", a)
		}
	}
	if c.zones[zone] == "" {
		c.problem(d, "limit_req: no zone %q that could be converted", zone)
		return
	}
	if burst > 0 && !immediate {
		c.problem(d, "limit_req without nodelay holds requests back; here they pass up to the burst, then are refused")
	}
	s.rate = fmt.Sprintf("{%s, burst: %d, by: client}", c.zones[zone], burst+1)
}

// caching reads proxy_cache and its like.
func (c *converter) caching(d directive, s *scope) {
	one := len(d.args) == 1
	switch {
	case d.name == "proxy_cache" && one:
		s.cache.on = d.args[0] != "off"
	case d.name == "proxy_cache_valid" && len(d.args) > 0:
		codes := d.args[:len(d.args)-1]
		if len(codes) > 0 && !slices.Contains(codes, "200") {
			c.problem(d, "proxy_cache_valid is converted for 200, 301 and 302 only; others are stored if they say so themselves")
			return
		}
		s.cache.valid = duration(d.args[len(d.args)-1])
		if strings.HasSuffix(s.cache.valid, "d") {
			c.problem(d, "write days as hours")
		}
	case d.name == "proxy_cache_use_stale":
		s.cache.onError, s.cache.updating = "", ""
		for _, a := range d.args {
			switch {
			case a == "updating":
				s.cache.updating = longStale
			case a == "error" || a == "timeout" || strings.HasPrefix(a, "http_50"):
				s.cache.onError = longStale
			case a != "off":
				c.problem(d, "proxy_cache_use_stale %s is not converted", a)
			}
		}
	case d.name == "proxy_cache_background_update" && one:
		if d.args[0] == "on" {
			s.cache.updating = longStale
		}
	case slices.Contains(ignored, d.name):
	default:
		c.problem(d, "%s is not converted", d.name)
	}
}

var rate = regexp.MustCompile(`^rate=([0-9]+)r/([sm])$`)

func (c *converter) zone(d directive) {
	if len(d.args) == 3 && (d.args[0] == "$binary_remote_addr" || d.args[0] == "$remote_addr") {
		name, ok := strings.CutPrefix(d.args[1], "zone=")
		name, _, _ = strings.Cut(name, ":")
		if m := rate.FindStringSubmatch(d.args[2]); m != nil && ok {
			c.zones[name] = "requests: " + m[1] + ", per: 1" + m[2]
			return
		}
	}
	c.problem(d, "limit_req_zone is converted by client address only, in r/s or r/m")
}

func (c *converter) try(d directive, s *scope) {
	rest := slices.Clone(d.args)
	for len(rest) > 0 && (rest[0] == "$uri" || rest[0] == "$uri/") {
		rest = rest[1:]
	}
	switch {
	case len(rest) == 1 && rest[0] == "=404":
		s.try = ""
	case len(rest) == 1 && strings.HasPrefix(rest[0], "/") && !strings.ContainsAny(rest[0], "$?"):
		s.try = rest[0]
	default:
		c.problem(d, "try_files is converted as $uri $uri/ and one file or =404")
	}
}

// header converts proxy_set_header. What the proxy says by itself needs no line.
func (c *converter) header(d directive, s *scope) {
	if !s.setSeen { // a block that sets one inherits none
		s.set, s.setSeen = map[string]string{}, true
	}
	name, value := d.args[0], d.args[1]
	switch strings.ToLower(name) {
	case "host":
		s.set["Host"] = value
	case "upgrade", "connection":
	case "x-forwarded-for", "x-forwarded-proto", "x-forwarded-host":
		if !slices.Contains([]string{"$proxy_add_x_forwarded_for", "$remote_addr", "$scheme", "$host", "$http_host"}, value) {
			c.problem(d, "%s is the proxy's own to write", name)
		}
	default:
		s.set[name] = c.text(d, value)
	}
}

var variable = regexp.MustCompile(`\$\{?([a-z_0-9]+)\}?`)

// variables and what they are called here.
var variables = map[string]string{"host": "${host}", "http_host": "${host}", "scheme": "${scheme}", "remote_addr": "${remote}", "request_uri": "${uri}",
	"uri": "${path}", "is_args": "", "args": "${query}"}

// text converts a value with variables.
func (c *converter) text(d directive, s string) string {
	s = strings.ReplaceAll(s, "$is_args$args", "${args}")
	return variable.ReplaceAllStringFunc(s, func(v string) string {
		name := variable.FindStringSubmatch(v)[1]
		if name >= "1" && name <= "9" && len(name) == 1 {
			return "$" + name
		}
		to, ok := variables[name]
		if !ok || name == "is_args" {
			c.problem(d, "variable $%s is not converted", name)
			return ""
		}
		return to
	})
}

func (c *converter) upstream(d directive) {
	name := d.args[0]
	balance, endpoints, extra := "round-robin", "", ""
	for _, x := range d.block {
		switch {
		case x.name == "server" && len(x.args) > 0:
			e := "{address: " + quote(withPort(x.args[0], "80"))
			for _, a := range x.args[1:] {
				if w, ok := strings.CutPrefix(a, "weight="); ok {
					e += ", weight: " + w
				} else if !strings.HasPrefix(a, "max_fails=") && !strings.HasPrefix(a, "fail_timeout=") {
					c.problem(x, "server %s is not converted", a)
				}
			}
			if strings.HasPrefix(x.args[0], "unix:") {
				c.problem(x, "a Unix socket as an endpoint is not converted")
			}
			endpoints += "  - " + e + "}\n"
		case x.name == "least_conn":
			balance = "least-request"
		case x.name == "random":
			balance = "random"
		case x.name == "keepalive" && len(x.args) == 1:
			extra = "  idle: " + x.args[0] + "\n"
		case slices.Contains(ignored, x.name):
		default:
			c.problem(x, "%s in an upstream is not converted", x.name)
		}
	}
	c.known[name] = true
	c.upstreams = append(c.upstreams, "- name: "+quote(name)+"\n  balance: "+balance+"\n"+extra+"  endpoints:\n"+endpoints)
}

func withPort(address, port string) string {
	if _, _, err := net.SplitHostPort(address); err == nil {
		return address
	}
	return net.JoinHostPort(strings.Trim(address, "[]"), port)
}

func quote(s string) string { return strconv.Quote(s) }

func duration(s string) string {
	if _, err := strconv.Atoi(s); err == nil {
		return s + "s"
	}
	return s
}

func size(s string) string {
	if s == "0" {
		return "1048576GiB" // without a limit
	}
	for suffix, unit := range map[string]string{"k": "KiB", "m": "MiB", "g": "GiB", "": ""} {
		digits, ok := strings.CutSuffix(strings.ToLower(s), suffix)
		if _, err := strconv.ParseUint(digits, 10, 32); ok && err == nil {
			return digits + unit
		}
	}
	return ""
}

func (c *converter) render() string {
	var b strings.Builder
	b.WriteString("version: 1\n")
	if c.idle != "" {
		b.WriteString("limits: {idle_timeout: " + c.idle + "}\n")
	}
	b.WriteString("listeners:\n")
	for _, key := range c.order {
		l := c.listeners[key]
		fmt.Fprintf(&b, "- name: %s\n  address: %s\n", quote("listen-"+key), quote(l.address))
		if l.old {
			b.WriteString("  http2: off\n")
		}
		if l.tls {
			b.WriteString("  tls:\n")
			if l.newest {
				b.WriteString("    min_version: \"1.3\"\n")
			}
			if l.clients != "" {
				b.WriteString("    clients: " + l.clients + "\n")
			}
			b.WriteString("    certificates:\n")
			for _, cert := range l.certs {
				fmt.Fprintf(&b, "    - {chain: %s, key: %s}\n", quote(cert[0]), quote(cert[1]))
			}
		}
	}
	b.WriteString("hosts:\n" + strings.Join(c.hosts, ""))
	if len(c.upstreams) > 0 {
		b.WriteString("upstreams:\n" + strings.Join(c.upstreams, ""))
	}
	return b.String()
}
