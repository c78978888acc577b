package alone

import (
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"

	"hauberk.dev/mesh/balance"
	"hauberk.dev/mesh/transcode"
)

// Call says where calls of bolt or Dubbo go. The first of a listener that matches
// decides.
type Call struct {
	Name    string   `yaml:"name"`
	Service string   `yaml:"service"` // whole, or its beginning and a *
	Methods []string `yaml:"methods"`
	Version string   `yaml:"version"`
	Group   string   `yaml:"group"`   // Dubbo
	Headers []Value  `yaml:"headers"` // bolt: of the frame's header

	Upstream string   `yaml:"upstream"`
	Split    []Share  `yaml:"split"`
	Timeout  Duration `yaml:"timeout"`
	Rate     *Rate    `yaml:"rate"`
	Hash     string   `yaml:"hash"` // client

	// Of calls of bolt that become requests in JSON.
	Transcode *Transcode `yaml:"transcode"`
	Host      string     `yaml:"host"`     // sent to the server; none: the upstream's name
	Deadline  string     `yaml:"deadline"` // field that tells the server how many milliseconds are left
}

func (c *Call) defaults() {
	def(&c.Service, "*")
	def(&c.Timeout, Duration(defaultTimeout))
	if c.Rate != nil {
		c.Rate.defaults()
	}
}

// callRoute is a Call, compiled.
type callRoute struct {
	name    string
	config  *Call
	any     bool // asks nothing of the call
	headers []headerRule
	shares  []share
	total   int
	limit   *limiter
	stats   *routeStats
	json    *transcode.Service // nil: calls go on as they are
}

type headerRule struct {
	name    string
	equal   *string
	pattern *regexp.Regexp
	not     bool
}

// callEnv is a call, of which as much is read as routes ask for.
type callEnv struct {
	wire  *wire
	frame *rpcFrame
	peer  []byte
	read  bool
	to    callTarget
	err   error
}

func (e *callEnv) target() (callTarget, error) {
	if !e.read {
		e.read = true
		e.to, e.err = e.wire.target(e.frame)
	}
	return e.to, e.err
}

// appendName is how the log calls it.
func (e *callEnv) appendName(b []byte) []byte {
	if !e.read || e.err != nil {
		return b
	}
	b = append(b, e.to.service...)
	if len(e.to.version) > 0 {
		b = append(append(b, ':'), e.to.version...)
	}
	return append(append(b, '#'), e.to.method...)
}

// callRoute finds the route of a call.
func (s *site) callRoute(e *callEnv) *callRoute {
	for _, r := range s.calls {
		if r.any {
			return r
		}
		if t, err := e.target(); err == nil && r.matches(&t) {
			return r
		}
	}
	return nil
}

func (r *callRoute) matches(t *callTarget) bool {
	c := r.config
	if prefix, any := strings.CutSuffix(c.Service, "*"); any {
		if len(t.service) < len(prefix) || string(t.service[:len(prefix)]) != prefix {
			return false
		}
	} else if string(t.service) != c.Service {
		return false
	}
	if c.Version != "" && string(t.version) != c.Version || c.Group != "" && string(t.group) != c.Group {
		return false
	}
	if len(c.Methods) > 0 && !slices.ContainsFunc(c.Methods, func(m string) bool { return m == string(t.method) }) {
		return false
	}
	for i := range r.headers {
		if r.headers[i].holds(t) == r.headers[i].not {
			return false
		}
	}
	return true
}

func (h *headerRule) holds(t *callTarget) bool {
	for rest := t.header; ; {
		key, value, next, ok, err := rest.Next()
		if err != nil || !ok {
			return false
		}
		if string(key) == h.name {
			return (h.equal == nil || string(value) == *h.equal) && (h.pattern == nil || h.pattern.Match(value))
		}
		rest = next
	}
}

func (r *callRoute) choose() *upstream {
	if len(r.shares) == 1 {
		return r.shares[0].up
	}
	return drawn(r.shares, r.total)
}

func drawn(shares []share, total int) *upstream {
	n := rand.IntN(total)
	for i := range shares {
		if n -= shares[i].weight; n < 0 {
			return shares[i].up
		}
	}
	return shares[0].up
}

func (r *callRoute) hash(x *rpcClient) uint64 {
	if r.config.Hash == "" {
		return 0
	}
	return balance.Hash(string(x.clientText))
}

// calls makes the routes of a listener ready.
func (w *world) calls(s *site, stats *stats) {
	for i := range s.l.Calls {
		c := &s.l.Calls[i]
		r := &callRoute{name: c.Name, config: c}
		if r.name == "" {
			r.name = fmt.Sprintf("%s/%d", s.l.Name, i)
		}
		r.stats = stats.route(r.name)
		r.any = c.Service == "*" && len(c.Methods) == 0 && c.Version == "" && c.Group == "" && len(c.Headers) == 0
		for _, v := range c.Headers {
			h := headerRule{name: v.Name, equal: v.Equal, not: v.Not}
			if v.Regex != "" {
				h.pattern = regexp.MustCompile(v.Regex) // it was checked
			}
			r.headers = append(r.headers, h)
		}
		if c.Upstream != "" {
			r.shares, r.total = []share{{w.upstreams[c.Upstream], 1}}, 1
		}
		for _, x := range c.Split {
			r.shares = append(r.shares, share{w.upstreams[x.Upstream], x.Weight})
			r.total += x.Weight
		}
		if c.Rate != nil {
			r.limit = newLimiter(c.Rate)
		}
		if c.Transcode != nil {
			r.json = c.Transcode.Bolt.service()
		}
		s.calls = append(s.calls, r)
	}
}

// speaksRPC says whether a listener or an upstream is of a protocol of calls.
func speaksRPC(protocol string) bool { return protocol == "bolt" || protocol == "dubbo" }

// calls checks the calls of a listener.
func (r *reading) calls(at string, l *Listener, c *Config, upstreams map[string]bool) {
	if !speaksRPC(l.Protocol) {
		if len(l.Calls) > 0 {
			r.fault(at+".calls", "goes with protocol bolt or dubbo")
		}
		return
	}
	if len(l.Calls) == 0 {
		r.fault(at+".calls", "is empty; list where calls go, for example service: \"*\" and an upstream")
	}
	for i := range l.Calls {
		x, field := &l.Calls[i], fmt.Sprintf("%s.calls[%d]", at, i)
		if strings.Contains(strings.TrimSuffix(x.Service, "*"), "*") {
			r.fault(field+".service", "%q has a * that is not at its end", x.Service)
		}
		if l.Protocol == "bolt" && x.Group != "" {
			r.fault(field+".group", "goes with protocol dubbo")
		}
		if l.Protocol == "dubbo" && len(x.Headers) > 0 {
			r.fault(field+".headers", "goes with protocol bolt")
		}
		r.values(field+".headers", x.Headers)
		r.oneOf(field+".hash", x.Hash, "", "client")
		if x.Rate != nil {
			r.rate(field, x.Rate)
		}
		names := r.shares(field, x.Upstream, x.Split, upstreams)
		if x.Transcode != nil {
			r.callsJSON(field, l, x, c, names)
			continue
		}
		if x.Host != "" || x.Deadline != "" {
			r.fault(field, "host and deadline go with transcode")
		}
		for _, u := range c.Upstreams {
			if slices.Contains(names, u.Name) && u.Protocol != l.Protocol {
				r.fault(field+".upstream", "%q speaks %s and the listener %s; write protocol: %s", u.Name, u.Protocol, l.Protocol, l.Protocol)
			}
		}
	}
}

// shares checks where something goes, and names the upstreams.
func (r *reading) shares(at, upstream string, split []Share, upstreams map[string]bool) (names []string) {
	if (upstream == "") == (len(split) == 0) {
		r.fault(at, "use exactly one of upstream and split")
	}
	if upstream != "" {
		r.known(at+".upstream", upstream, upstreams)
		names = append(names, upstream)
	}
	if len(split) > 0 {
		names = append(names, r.split(at, split, upstreams)...)
	}
	return names
}

func (r *reading) split(at string, split []Share, upstreams map[string]bool) (names []string) {
	total := 0
	for i, s := range split {
		field := fmt.Sprintf("%s.split[%d]", at, i)
		r.known(field+".upstream", s.Upstream, upstreams)
		if s.Weight < 0 || s.Weight > 1e6 {
			r.fault(field+".weight", "%d is out of range; use 0 to 1000000", s.Weight)
		}
		total += s.Weight
		names = append(names, s.Upstream)
	}
	if total <= 0 {
		r.fault(at+".split", "no weight above zero")
	}
	return names
}

func (r *reading) rate(at string, l *Rate) {
	r.positive(at+".rate.requests", l.Requests)
	r.positive(at+".rate.burst", l.Burst)
	r.oneOf(at+".rate.by", l.By, "client", "route")
}
