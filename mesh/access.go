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
}

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

// matches tells whether every present field matches. unreadable is the answer
// for methods and paths of what is not an HTTP request.
func matches(r *plan.Rule, c call, unreadable bool) bool {
	if !slices.ContainsFunc(r.From, func(from string) bool {
		return from == c.caller || from == "*" && c.caller != anonymous
	}) {
		return false
	}
	if len(r.Ports) > 0 && !slices.Contains(r.Ports, c.port) {
		return false
	}
	if len(r.Methods) == 0 && len(r.Paths) == 0 {
		return true
	}
	if !c.http {
		return unreadable
	}
	if len(r.Methods) > 0 && !slices.Contains(r.Methods, c.method) {
		return false
	}
	return len(r.Paths) == 0 || slices.ContainsFunc(r.Paths, func(p string) bool { return pathMatches(p, c.path) })
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
	if h.Method == "CONNECT" || h.Method == "TRACE" {
		return verdict{reason: h.Method + " is not passed on"}, 405
	}
	path, err := http1.Path(h.Method, h.Target)
	if err != nil && (s.paths || err != http1.ErrAmbiguous) {
		return verdict{reason: fmt.Sprintf("path: %v", err)}, 400
	}
	return decide(s, call{caller: caller, port: port, http: true, method: h.Method, path: path}), 403
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
