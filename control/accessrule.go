package control

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"hauberk.dev/api/spec"
	"hauberk.dev/id"
	"hauberk.dev/plan"
)

const (
	modeAudit     = "audit"
	verbCallbacks = "callbacks"
)

// maxConditions bounds how many conditions are kept compiled.
const maxConditions = 4096

// conditions keeps what was compiled, as every plan is made of them anew. The
// nil one keeps nothing.
type conditions struct {
	mu   sync.Mutex
	done map[conditionText]compiled
}

type conditionText struct {
	text  string
	token bool // the rule wants a token, so its claims can be read
}

type compiled struct {
	expr *plan.Expr
	err  error
}

func (b *conditions) compile(text string, token bool) (*plan.Expr, error) {
	if b == nil {
		return compileCondition(text, token)
	}
	at := conditionText{text, token}
	b.mu.Lock()
	c, ok := b.done[at]
	b.mu.Unlock()
	if !ok {
		c.expr, c.err = compileCondition(text, token)
		b.mu.Lock()
		if b.done == nil || len(b.done) >= maxConditions {
			b.done = map[conditionText]compiled{}
		}
		b.done[at] = c
		b.mu.Unlock()
	}
	return c.expr, c.err
}

// protect adds the rules of a policy to the service it is for.
func (w world) protect(s *plan.Service, policy key, a spec.AccessPolicy) {
	issuers := map[string]string{} // issuer to its name in the plan
	for _, i := range a.Issuers {
		one := plan.Issuer{Name: policy.Name + " " + i.Issuer, Issuer: i.Issuer, Audiences: i.Audiences,
			Keys: i.Keys, File: i.KeysFile, Header: i.Header, Skew: int(i.SkewSeconds)}
		if checkIssuer(i) == nil && issuers[i.Issuer] == "" {
			issuers[i.Issuer] = one.Name
			s.Issuers = append(s.Issuers, one)
		}
	}
	allow, deny := w.rules(policy, "allow", a.Allow, issuers), w.rules(policy, "deny", a.Deny, issuers)
	callbacks := w.rules(policy, verbCallbacks, callbackRules(a.Callbacks), issuers)
	if a.Mode == modeAudit {
		s.Trials = append(s.Trials, plan.Trial{Name: policy.Name, Allow: allow, Deny: deny, Callbacks: callbacks,
			Faulty: len(allow) < len(a.Allow), FaultyCallbacks: len(callbacks) < len(a.Callbacks)})
		return
	}
	s.Allow, s.Deny, s.Callbacks = append(s.Allow, allow...), append(s.Deny, deny...), append(s.Callbacks, callbacks...)
}

// callbackRules are those for callbacks as rules with the fields that these have.
func callbackRules(all []spec.AccessCallback) (rules []spec.AccessRule) {
	for _, c := range all {
		rules = append(rules, spec.AccessRule{From: c.From, Services: c.Services, Methods: c.Methods, When: c.When, Mode: c.Mode})
	}
	return rules
}

// rules are those of a policy as the mesh judges by them. What of a rule makes no
// sense is what cannot be decided: a rule that allows is left out, one that
// denies goes by the rest.
func (w world) rules(policy key, verb string, rules []spec.AccessRule, issuers map[string]string) []plan.Rule {
	var out []plan.Rule
	for n, r := range rules {
		p := plan.Rule{
			Name:    fmt.Sprintf("%s/%s[%d]", policy.Name, verb, n),
			Methods: r.Methods, Paths: r.Paths, Services: r.Services, Audit: r.Mode == modeAudit,
		}
		for _, from := range r.From {
			p.From = append(p.From, w.caller(policy.Namespace, from))
		}
		for _, port := range r.Ports {
			p.Ports = append(p.Ports, uint16(port))
		}
		if err := w.condition(&p, r, issuers); err == nil || verb == "deny" {
			out = append(out, p)
		}
	}
	return out
}

// condition adds what of a rule can be decided, and names what cannot.
func (w world) condition(p *plan.Rule, r spec.AccessRule, issuers map[string]string) error {
	var errs []error
	for n, from := range r.From {
		if !isCaller(from) {
			errs = append(errs, fmt.Errorf("from[%d]: %q is no caller: write a workload, workload.namespace, a SPIFFE id, anonymous or *", n, from))
		}
	}
	if len(errs) > 0 { // whoever is meant may be anybody
		p.From = []string{"*", "anonymous"}
	}
	bad := len(errs)
	var sources []netip.Prefix
	for n, text := range r.Sources {
		prefix, err := netip.ParsePrefix(text)
		if err != nil {
			errs = append(errs, fmt.Errorf("sources[%d]: %q is no network: write it as 10.0.0.0/8, or 10.1.2.3/32 for one address", n, text))
		} else if a := prefix.Addr(); a.Is4In6() {
			errs = append(errs, fmt.Errorf("sources[%d]: %q is IPv4 written as IPv6, which no call comes from: write it as %s/%d", n, text, a.Unmap(), max(0, prefix.Bits()-96)))
		}
		sources = append(sources, prefix.Masked())
	}
	if len(errs) == bad {
		p.Sources = sources
	}
	for _, h := range r.Headers {
		p.Headers = append(p.Headers, plan.Header{Name: strings.ToLower(h.Name), Exact: h.Exact, Prefix: h.Prefix, Absent: h.Absent})
	}
	if r.JWT != nil {
		if t, err := wantedToken(r.JWT, issuers); err != nil {
			errs = append(errs, err)
		} else {
			p.Token = t
		}
	}
	if r.When != "" {
		e, err := w.conditions.compile(r.When, r.JWT != nil)
		if err != nil {
			errs = append(errs, fmt.Errorf("when: %w", err))
		} else if r.JWT == nil || p.Token != nil {
			p.When = e
		}
	}
	return errors.Join(errs...)
}

// isCaller tells whether a name of an AccessRule can be somebody's.
func isCaller(from string) bool {
	if from == "*" || from == "anonymous" {
		return true
	}
	if strings.HasPrefix(from, "spiffe://") {
		_, path, err := id.ParseSPIFFE(from)
		return err == nil && path != ""
	}
	k, _ := serviceKey("namespace", from)
	_, err := id.Workload("domain", k.Namespace, k.Name)
	return err == nil
}

func wantedToken(j *spec.AccessJWT, issuers map[string]string) (*plan.Token, error) {
	t := &plan.Token{}
	for n, i := range j.Issuers {
		name, ok := issuers[i]
		if !ok {
			return nil, fmt.Errorf("jwt.issuers[%d]: %q is no issuer of this policy, or is not accepted: add it to spec.issuers", n, i)
		}
		t.Issuers = append(t.Issuers, name)
	}
	if len(j.Issuers) == 0 {
		for _, name := range issuers {
			t.Issuers = append(t.Issuers, name)
		}
		slices.Sort(t.Issuers)
	}
	if len(t.Issuers) == 0 {
		return nil, errors.New("jwt: the policy has no issuer: add one to spec.issuers, with its keys")
	}
	for _, c := range j.Claims {
		t.Claims = append(t.Claims, plan.Claim{Name: c.Name, OneOf: c.OneOf})
	}
	return t, nil
}

// accessFaults are what of a policy makes no sense, by field, value and what to do.
func (w world) accessFaults(k key, a spec.AccessPolicy) error {
	var errs []error
	issuers := map[string]string{}
	for n, i := range a.Issuers {
		if err := checkIssuer(i); err != nil {
			errs = append(errs, fmt.Errorf("spec.issuers[%d].%w", n, err))
			continue
		}
		if issuers[i.Issuer] != "" {
			errs = append(errs, fmt.Errorf("spec.issuers[%d].issuer: %q is there twice: keep one", n, i.Issuer))
		}
		issuers[i.Issuer] = i.Issuer
	}
	for verb, rules := range map[string][]spec.AccessRule{"allow": a.Allow, "deny": a.Deny, verbCallbacks: callbackRules(a.Callbacks)} {
		for n, r := range rules {
			if err := w.condition(&plan.Rule{}, r, issuers); err != nil {
				held := "the rule allows nothing"
				if verb == "deny" {
					held = "the rule denies by the rest of it"
				}
				for _, one := range unjoin(err) {
					errs = append(errs, fmt.Errorf("spec.%s[%d].%w; until then %s", verb, n, one, held))
				}
			}
		}
	}
	for n, c := range a.Callbacks {
		if at := slices.Index(c.From, "anonymous"); at >= 0 {
			errs = append(errs, fmt.Errorf("spec.callbacks[%d].from[%d]: anonymous is never a server that calls back: name workloads, or take it out", n, at))
		}
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func unjoin(err error) []error {
	if all, ok := err.(interface{ Unwrap() []error }); ok {
		return all.Unwrap()
	}
	return []error{err}
}
