package mesh

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/plan"
)

// anonymous is the caller behind a published port.
const anonymous = "anonymous"

// call is what rules judge.
type call struct {
	caller string // SPIFFE id or anonymous
	port   uint16
	back   bool // the server asks, over a connection of its client; there is no port
	// method and path of a request; on a port that does not speak HTTP, and
	// before the request is known, http is false.
	http         bool
	method, path string
	target       string // path and query as they came
	crooked      bool   // servers read the path in different ways
	// remote is what a request of an RPC protocol is for; rpc is false where
	// there is none, or it cannot be told.
	rpc    bool
	remote remote
	// unclear is set on a port of gRPC where it cannot be told what a request is
	// for: a server may read its path as that of a call.
	unclear bool
	// source is where the call comes from, if that can be told.
	source netip.Addr
	letter letter
	// began is when a request under way began, by which its tokens are judged;
	// zero is now.
	began time.Time
	// found is what conditions find out, nil if no rule of the service has any.
	found *found
}

// remote names a method of an RPC service, in the bytes of its request.
type remote struct {
	service, version, group, method []byte
	// command tells that the method is one of Redis, in upper case, with its
	// subcommand after a bar. There is no service.
	command bool
}

func (r *remote) what() string {
	if r.command {
		return fmt.Sprintf("command %.128q", r.method)
	}
	return fmt.Sprintf("%.128q method %.128q", r.service, r.method)
}

// verdict is a decision and who made it.
type verdict struct {
	allowed bool
	rule    string
	reason  string
	// trial is the rule or policy in audit that would refuse what is allowed.
	trial string
}

// decide applies the rules of a service: a deny that matches refuses, else an
// allow that matches allows, else nothing does.
func decide(s *service, c call) verdict {
	if _, ok := s.ports[c.port]; !ok && !c.back {
		return verdict{reason: fmt.Sprintf("%s has no port %d", s, c.port)}
	}
	if s.conditions {
		c.found = find(s, c)
	}
	for i := range s.Deny {
		// Where the request cannot be read, a deny matches on the rest: what
		// cannot be told apart is refused.
		if r := &s.Deny[i]; !r.Audit && matches(r, c, true) {
			return verdict{rule: r.Name, reason: fmt.Sprintf("denied by %s%s", r.Name, c.found.why())}
		}
	}
	allow := c.allowing(s.Allow, s.Callbacks)
	for i := range allow {
		if r := &allow[i]; !r.Audit && matches(r, c, false) {
			v := verdict{allowed: true, rule: r.Name}
			if s.trying {
				v.trial = s.try(c)
			}
			return v
		}
	}
	switch {
	case c.back:
		return verdict{reason: fmt.Sprintf("no rule of %s allows callbacks of it: name it under callbacks in an AccessPolicy of that workload%s%s", s, c.found.why(), s.wouldAllow(c))}
	case len(s.Allow) == 0:
		return verdict{reason: fmt.Sprintf("%s has no rule that allows anybody", s)}
	}
	return verdict{reason: fmt.Sprintf("no rule of %s allows it%s%s", s, c.found.why(), s.wouldAllow(c))}
}

// allowing are the rules that may allow the call: those of callbacks are apart, so
// that who may call a port may not call back, nor the other way round.
func (c *call) allowing(allow, callbacks []plan.Rule) []plan.Rule {
	if c.back {
		return callbacks
	}
	return allow
}

// mayCall tells whether some request on a connection could be allowed.
func mayCall(s *service, c call) bool {
	if s.conditions {
		c.found = find(s, c)
	}
	if _, ok := s.ports[c.port]; !ok {
		return false
	}
	for i := range s.Deny {
		if r := &s.Deny[i]; !r.Audit && matches(r, c, false) {
			return false
		}
	}
	for i := range s.Allow {
		if r := &s.Allow[i]; !r.Audit && matches(r, c, true) {
			return true
		}
	}
	return false
}

// matches tells whether every present field matches. unreadable is the answer
// where nothing speaks against it but a field that the request has not, or that
// cannot be read.
func matches(r *plan.Rule, c call, unreadable bool) bool {
	if !slices.ContainsFunc(r.From, func(from string) bool {
		return from == c.caller || from == "*" && c.caller != anonymous
	}) {
		return false
	}
	if len(r.Ports) > 0 && !slices.Contains(r.Ports, c.port) {
		return false
	}
	readable := true
	if len(r.Methods) > 0 {
		if !slices.ContainsFunc(r.Methods, func(m string) bool { return methodMatches(m, c, unreadable) }) {
			if (c.http || c.rpc) && !c.unclear {
				return false
			}
			readable = false
		}
	}
	if len(r.Paths) > 0 {
		clear := c.http && !c.crooked
		if clear && !slices.ContainsFunc(r.Paths, func(p string) bool { return pathMatches(p, c.path) }) {
			return false
		}
		readable = readable && clear
	}
	if len(r.Services) > 0 {
		named := c.rpc && !c.remote.command
		if named && !slices.ContainsFunc(r.Services, func(p string) bool { return serviceMatches(p, c.remote) }) {
			return false
		}
		readable = readable && named
	}
	if c.found != nil {
		holds, known := c.found.holds(r)
		if known && !holds {
			return false
		}
		readable = readable && known
	}
	return readable || unreadable
}

// methodMatches takes a rule's get for GET, which is what its author means, but
// not where it may name a method of gRPC: those calls are all POST. With fold a
// request's get is GET too: some servers make that of it.
func methodMatches(pattern string, c call, fold bool) bool {
	switch {
	case c.remote.command:
		return commandMatches(pattern, c.remote.method)
	case c.rpc && pattern == string(c.remote.method), c.http && pattern == c.method:
		return true
	case !c.http || c.rpc:
		return false
	case fold:
		return strings.EqualFold(pattern, c.method)
	}
	return strings.ToUpper(pattern) == c.method
}

// commandMatches knows a command in whatever case, and takes one that has
// subcommands for all of them.
func commandMatches(pattern string, command []byte) bool {
	if n := len(pattern); len(command) != n && (len(command) < n || command[n] != '|') {
		return false
	}
	for i := range len(pattern) {
		c := pattern[i]
		if c >= 'a' && c <= 'z' {
			c -= 'a' - 'A'
		}
		if c != command[i] {
			return false
		}
	}
	return true
}

// serviceMatches knows an interface, of any version and group, interface:version,
// and group/ before either. A trailing * stands for anything.
func serviceMatches(pattern string, s remote) bool {
	if n := len(s.group); n > 0 && len(pattern) > n && pattern[n] == '/' && pattern[:n] == string(s.group) {
		pattern = pattern[n+1:]
	}
	pattern, prefix := strings.CutSuffix(pattern, "*")
	name := s.service
	if n := len(name); len(pattern) > n {
		if pattern[n] != ':' || pattern[:n] != string(name) {
			return false
		}
		pattern, name = pattern[n+1:], s.version
	}
	if prefix {
		return len(pattern) <= len(name) && pattern == string(name[:len(pattern)])
	}
	return pattern == string(name)
}

func pathMatches(pattern, path string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(path, prefix)
	}
	return path == pattern
}

// decideRequest judges one HTTP request. status is the answer to a request that
// is refused for its form.
func decideRequest(s *service, c call, h *http1.Head) (v verdict, status int) {
	if m := strings.ToUpper(h.Method); m == "CONNECT" || m == "TRACE" {
		return verdict{reason: m + " is not passed on"}, 405
	}
	path, err := http1.Path(h.Method, h.Target)
	if err != nil && (s.paths || err != http1.ErrAmbiguous) {
		return verdict{reason: fmt.Sprintf("path: %v", err)}, 400
	}
	c.http, c.method, c.path, c.target, c.crooked = true, h.Method, path, h.Target, err != nil
	if s.ports[c.port].Protocol == "grpc" {
		if path == h.Target {
			c.remote, c.rpc = grpcTarget(h.Method, path)
		}
		c.unclear = !c.rpc
	}
	return decide(s, c), 403
}

// grpcTarget is what a gRPC call is for. A path that a server could read in
// another way is for nothing that can be told.
func grpcTarget(method, path string) (r remote, ok bool) {
	name, call, ok := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	if !ok || method != "POST" || name == "" || call == "" || strings.Contains(call, "/") {
		return remote{}, false
	}
	return remote{service: []byte(name), method: []byte(call)}, true
}

// mayEgress tells whether a sandbox may reach a destination outside the mesh.
func mayEgress(sb *plan.Sandbox, to destination) bool {
	return slices.ContainsFunc(sb.Egress, func(e plan.Egress) bool {
		if !e.Prefix.Contains(to.Addr()) || len(e.Ports) > 0 && !slices.Contains(e.Ports, to.Port()) {
			return false
		}
		// A wide prefix is not meant to reach the node itself or its cloud's
		// metadata service; one that names the address alone is.
		return !to.sensitive() || e.Prefix.IsSingleIP()
	})
}
