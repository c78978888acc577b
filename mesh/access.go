package mesh

import (
	"fmt"
	"slices"
	"strings"

	"hauberk.dev/mesh/http1"
	"hauberk.dev/plan"
)

// anonymous is the caller behind a published port.
const anonymous = "anonymous"

// call is what rules judge.
type call struct {
	caller string // SPIFFE id or anonymous
	port   uint16
	// method and path of a request; on a port that does not speak HTTP, and
	// before the request is known, http is false.
	http         bool
	method, path string
	// remote is what a request of an RPC protocol is for; rpc is false where
	// there is none, or it cannot be told.
	rpc    bool
	remote remote
	// unclear is set on a port of gRPC where it cannot be told what a request is
	// for: a server may read its path as that of a call.
	unclear bool
}

// remote names a method of an RPC service, in the bytes of its request.
type remote struct{ service, version, group, method []byte }

// verdict is a decision and who made it.
type verdict struct {
	allowed bool
	rule    string
	reason  string
}

// decide applies the rules of a service: a deny that matches refuses, else an
// allow that matches allows, else nothing does.
func decide(s *service, c call) verdict {
	if _, ok := s.ports[c.port]; !ok {
		return verdict{reason: fmt.Sprintf("%s has no port %d", s, c.port)}
	}
	for i := range s.Deny {
		// Where the request cannot be read, a deny matches on the rest: what
		// cannot be told apart is refused.
		if r := &s.Deny[i]; matches(r, c, true) {
			return verdict{rule: r.Name, reason: fmt.Sprintf("denied by %s", r.Name)}
		}
	}
	for i := range s.Allow {
		if r := &s.Allow[i]; matches(r, c, false) {
			return verdict{allowed: true, rule: r.Name}
		}
	}
	if len(s.Allow) == 0 {
		return verdict{reason: fmt.Sprintf("%s has no rule that allows anybody", s)}
	}
	return verdict{reason: fmt.Sprintf("no rule of %s allows it", s)}
}

// mayCall tells whether some request of a caller could be allowed.
func mayCall(s *service, caller string, port uint16) bool {
	c := call{caller: caller, port: port}
	if _, ok := s.ports[port]; !ok || slices.ContainsFunc(s.Deny, func(r plan.Rule) bool { return matches(&r, c, false) }) {
		return false
	}
	return slices.ContainsFunc(s.Allow, func(r plan.Rule) bool { return matches(&r, c, true) })
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
		if c.http && !slices.ContainsFunc(r.Paths, func(p string) bool { return pathMatches(p, c.path) }) {
			return false
		}
		readable = readable && c.http
	}
	if len(r.Services) > 0 {
		if c.rpc && !slices.ContainsFunc(r.Services, func(p string) bool { return serviceMatches(p, c.remote) }) {
			return false
		}
		readable = readable && c.rpc
	}
	return readable || unreadable
}

// methodMatches takes a rule's get for GET, which is what its author means, but
// not where it may name a method of gRPC: those calls are all POST. With fold a
// request's get is GET too: some servers make that of it.
func methodMatches(pattern string, c call, fold bool) bool {
	switch {
	case c.rpc && pattern == string(c.remote.method), c.http && pattern == c.method:
		return true
	case !c.http || c.rpc:
		return false
	case fold:
		return strings.EqualFold(pattern, c.method)
	}
	return strings.ToUpper(pattern) == c.method
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
func decideRequest(s *service, caller string, port uint16, h *http1.Head) (v verdict, status int) {
	if m := strings.ToUpper(h.Method); m == "CONNECT" || m == "TRACE" {
		return verdict{reason: m + " is not passed on"}, 405
	}
	path, err := http1.Path(h.Method, h.Target)
	if err != nil && (s.paths || err != http1.ErrAmbiguous) {
		return verdict{reason: fmt.Sprintf("path: %v", err)}, 400
	}
	c := call{caller: caller, port: port, http: true, method: h.Method, path: path}
	if s.ports[port].Protocol == "grpc" {
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
