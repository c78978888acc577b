package mesh

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/internal/condition"
	"hauberk.dev/internal/token"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/mesh/http1"
	"hauberk.dev/mesh/http2"
	"hauberk.dev/plan"
)

// trialEvery is how often the same rule in audit is told of for one sandbox;
// all it would refuse is counted.
const trialEvery = time.Second

// judgement is what the rules of a service want beside names and paths.
type judgement struct {
	conditions bool // some rule has sources, headers, a token or a condition
	letters    bool // some rule reads fields of requests
	trying     bool // some rule or policy is in audit
	when       map[*plan.Expr]*condition.Condition
	issuers    map[string]*issuer
	print      func() string // of what is the same as long as the plan says the same; empty if there is none
}

// judged is what a request under way was allowed by: it is judged again only by
// other rules, and its tokens by the time it began.
type judged struct {
	rules string
	began time.Time
}

// rules is a fingerprint of all that decides about requests to a service, with the
// keys that were read from files. It is empty if there is none.
func (s *service) rules() string {
	all := s.print()
	for i := range s.Issuers {
		if s.Issuers[i].File == "" || all == "" {
			continue
		}
		if v := s.issuers[s.Issuers[i].Name].now.Load(); v != nil {
			all += string(v.set[:])
		} else {
			all += "-"
		}
	}
	return all
}

// by tells whether the rules of a service have decided already.
func (j *judged) by(s *service) bool { return j.rules != "" && j.rules == s.rules() }

func (s *service) fingerprint() string {
	b, err := json.Marshal(plan.Service{Ports: s.Ports, Allow: s.Allow, Deny: s.Deny, Issuers: s.Issuers})
	if err != nil {
		return ""
	}
	sum := sha256.Sum256(b)
	return string(sum[:])
}

// prepare checks the rules and makes their conditions ready.
func (s *service) prepare() error {
	var faults []error
	s.print = sync.OnceValue(s.fingerprint)
	s.when, s.issuers = map[*plan.Expr]*condition.Condition{}, map[string]*issuer{}
	for _, i := range s.Issuers {
		ready, err := newIssuer(i)
		if err != nil {
			faults = append(faults, fmt.Errorf("issuer %q: %w", i.Name, err))
		}
		s.issuers[i.Name] = ready
	}
	lists, back := [][]plan.Rule{s.Allow, s.Deny}, [][]plan.Rule{s.Callbacks}
	for i := range s.Trials {
		lists, back = append(lists, s.Trials[i].Allow, s.Trials[i].Deny), append(back, s.Trials[i].Callbacks)
	}
	s.trying = len(s.Trials) > 0
	for n, rules := range lists {
		faults = append(faults, s.prepareRules(rules, n < 2))
	}
	remote := s.remote
	for _, rules := range back {
		faults = append(faults, s.prepareRules(rules, false))
	}
	s.remote = remote // callbacks are read in any case, and nothing else is for them
	return errors.Join(faults...)
}

func (s *service) prepareRules(rules []plan.Rule, enforced bool) error {
	var faults []error
	for i := range rules {
		if err := s.prepareRule(&rules[i], enforced && !rules[i].Audit); err != nil {
			faults = append(faults, fmt.Errorf("rule %q: %w", rules[i].Name, err))
		}
	}
	return errors.Join(faults...)
}

// prepareRule makes one rule ready. One that is only tried out must not have a
// request refused for its path.
func (s *service) prepareRule(r *plan.Rule, enforced bool) error {
	s.paths = s.paths || enforced && len(r.Paths) > 0
	s.remote = s.remote || len(r.Services)+len(r.Methods) > 0
	s.letters = s.letters || len(r.Headers) > 0 || r.Token != nil || r.When != nil
	s.conditions = s.conditions || s.letters || len(r.Sources) > 0
	s.trying = s.trying || r.Audit
	for _, h := range r.Headers {
		if h.Name == "" || h.Name != strings.ToLower(h.Name) || http1.CheckField(h.Name, "") != nil {
			return fmt.Errorf("header %q is no field name in lower case", h.Name)
		}
	}
	if r.Token != nil {
		if len(r.Token.Issuers) == 0 {
			return errors.New("a token is wanted, and no issuer is named")
		}
		for _, name := range r.Token.Issuers {
			if s.issuers[name] == nil {
				return fmt.Errorf("issuer %q is not one of the service", name)
			}
		}
	}
	if r.When == nil {
		return nil
	}
	c, err := condition.New(*r.When)
	if err != nil {
		return fmt.Errorf("condition: %w", err)
	}
	s.when[r.When] = c
	s.paths = s.paths || enforced && c.Uses("request.path")
	for _, v := range []string{"rpc.service", "rpc.method", "rpc.version", "rpc.group"} {
		s.remote = s.remote || c.Uses(v)
	}
	return nil
}

// try names the rule or policy in audit that would refuse a call which is
// allowed. A policy in audit is tried as if it were the only one that allows.
func (s *service) try(c call) string {
	for i := range s.Deny {
		if r := &s.Deny[i]; r.Audit && matches(r, c, true) {
			return r.Name
		}
	}
	for i := range s.Trials {
		t := &s.Trials[i]
		for k := range t.Deny {
			if matches(&t.Deny[k], c, true) {
				return t.Deny[k].Name
			}
		}
		// One that allows only calls would refuse callbacks; one for callbacks only
		// says nothing of calls.
		allow, verb, some := t.Allow, "/allow", len(t.Allow) > 0 || t.Faulty
		if c.back {
			allow, verb, some = t.Callbacks, "/callbacks", some || len(t.Callbacks) > 0 || t.FaultyCallbacks
		}
		if some && !slices.ContainsFunc(allow, func(r plan.Rule) bool { return matches(&r, c, false) }) {
			return t.Name + verb
		}
	}
	return ""
}

// wouldAllow names a rule in audit that would have allowed what is refused.
func (s *service) wouldAllow(c call) string {
	if !s.trying {
		return ""
	}
	allow := c.allowing(s.Allow, s.Callbacks)
	for i := range allow {
		if r := &allow[i]; r.Audit && matches(r, c, false) {
			return fmt.Sprintf("; %s, which is in audit, would", r.Name)
		}
	}
	for i := range s.Trials {
		allow := c.allowing(s.Trials[i].Allow, s.Trials[i].Callbacks)
		for k := range allow {
			if r := &allow[k]; matches(r, c, false) {
				return fmt.Sprintf("; %s, which is in audit, would", r.Name)
			}
		}
	}
	return ""
}

// letter holds the fields of a request, of either version of HTTP.
type letter struct {
	one *http1.Head
	two []http2.Field
}

func (l letter) known() bool { return l.one != nil && len(l.one.Raw) > 0 || l.two != nil }

// each goes through the fields: names in lower case, as they came. One of
// HTTP/2 calls its host :authority.
func (l letter) each(f func(name, value string)) {
	for i := range l.two {
		f(l.two[i].Name, l.two[i].Value)
	}
	if l.one == nil {
		return
	}
	_, b, _ := bytes.Cut(l.one.Raw, []byte("\n"))
	for len(b) > 0 {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		b = rest
		if name, value, ok := bytes.Cut(line, []byte(":")); ok {
			f(strings.ToLower(string(name)), string(bytes.Trim(value, " \t\r")))
		}
	}
}

// host is whom a request is for, in lower case: HTTP/2 says it in :authority, an
// absolute URI in place of the field. It is empty where nothing says it.
func (l letter) host() (host string) {
	if l.one != nil {
		if host = l.one.Host; host == "" {
			authority, _, _ := http1.SplitTarget([]byte(l.one.Target))
			host = string(authority)
		}
		return strings.ToLower(host)
	}
	for i := range l.two {
		switch f := &l.two[i]; {
		case f.Name == ":authority" && f.Value != "":
			return strings.ToLower(f.Value)
		case f.Name == "host":
			host = f.Value
		}
	}
	return strings.ToLower(host)
}

// splitHost cuts a host, in lower case, into its name without the last dot, which
// says only that the name is whole, and its port without leading zeros. An empty
// port is none.
func splitHost(host string) (name, port string) {
	if namesPort(host) {
		end := strings.LastIndexByte(host, ':')
		host, port = host[:end], strings.TrimLeft(host[end+1:], "0")
	}
	return strings.ToLower(strings.TrimRight(host, ".")), port
}

// namesPort tells whether there is a colon after the name, which may be an address
// in brackets.
func namesPort(host string) bool {
	return strings.LastIndexByte(host, ':') > strings.LastIndexByte(host, ']')
}

// hostAs writes a host as it is compared with a text of a rule: with its port if
// that names one.
func hostAs(host, rule string) string {
	name, port := splitHost(host)
	if namesPort(rule) && port != "" {
		name += ":" + port
	}
	return name
}

// values are those of a field, and aliases those of fields that some servers take
// for it: to CGI and what follows its ways, X_A is X-A. Cookies are one value, in however many fields a
// client has put them (RFC 9113, section 8.2.3).
func (l letter) values(name string) (all, aliases []string) {
	if name == "host" {
		if host := l.host(); host != "" {
			all = append(all, host)
		}
		return all, nil
	}
	l.each(func(n, v string) {
		switch {
		case n != name && isAlias(n, name):
			aliases = append(aliases, v)
		case n != name:
		case n == "cookie" && len(all) == 1:
			all[0] += "; " + v
		default:
			all = append(all, v)
		}
	})
	return all, aliases
}

// isAlias tells whether names differ in underscores for hyphens alone.
func isAlias(a, b string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range len(a) {
		if a[i] != b[i] && (a[i] != '_' || b[i] != '-') && (a[i] != '-' || b[i] != '_') {
			return false
		}
	}
	return true
}

// found is what conditions find out about one call. Nothing is looked at before
// a condition asks.
type found struct {
	s       *service
	c       call
	now     time.Time
	headers map[string]any
	mixed   error            // why headers cannot be told
	tokens  map[string]proof // by name of the issuer
	claims  map[*token.Token]any
	unclear string // why the last condition could not be told
}

func find(s *service, c call) *found {
	if c.began.IsZero() {
		c.began = time.Now()
	}
	return &found{s: s, c: c, now: c.began}
}

// why explains a refusal by what could not be told.
func (f *found) why() string {
	if f == nil || f.unclear == "" {
		return ""
	}
	return " (" + f.unclear + ")"
}

// holds tells whether the conditions of a rule hold, and whether that is known.
// One that certainly does not is enough to know.
func (f *found) holds(r *plan.Rule) (holds, known bool) {
	known = true
	for _, check := range []func(*plan.Rule) (bool, error){f.from, f.lettered, f.proven, f.meant} {
		ok, err := check(r)
		switch {
		case err != nil:
			f.unclear, known = err.Error(), false
		case !ok:
			return false, true
		}
	}
	return known, known
}

var (
	errSource = errors.New("it cannot be told where the call comes from")
	errLetter = errors.New("there are no header fields to be read")
	errHost   = errors.New("the request does not say its host")
)

func (f *found) from(r *plan.Rule) (bool, error) {
	if len(r.Sources) == 0 {
		return true, nil
	}
	if !f.c.source.IsValid() {
		return false, errSource
	}
	return slices.ContainsFunc(r.Sources, func(p netip.Prefix) bool { return p.Contains(f.c.source) }), nil
}

func (f *found) lettered(r *plan.Rule) (bool, error) {
	if len(r.Headers) > 0 && !f.c.letter.known() {
		return false, errLetter
	}
	var unclear error
	for i := range r.Headers {
		h := &r.Headers[i]
		values, aliases := f.c.letter.values(h.Name)
		named := len(values)
		values = append(values, aliases...)
		good := 0
		for _, v := range values {
			if fieldMatches(h, v) {
				good++
			}
		}
		switch {
		case good > 0 && named == 0:
			unclear = fmt.Errorf("a field is there that some servers take for %s", h.Name)
		case good > 0 && good < len(values):
			unclear = fmt.Errorf("field %s is there %d times, with values that say different things", h.Name, len(values))
		case good > 0 == h.Absent:
			return false, nil
		}
	}
	return unclear == nil, unclear
}

// fieldMatches tells whether a value is what a rule names. Hosts have no case; a
// port counts where the rule names one, and a last dot never.
func fieldMatches(h *plan.Header, v string) bool {
	if h.Name == "host" {
		return (h.Exact == nil || hostAs(v, *h.Exact) == hostAs(*h.Exact, *h.Exact)) && strings.HasPrefix(hostAs(v, h.Prefix), strings.ToLower(h.Prefix))
	}
	return (h.Exact == nil || v == *h.Exact) && strings.HasPrefix(v, h.Prefix)
}

// meant evaluates the condition in CEL.
func (f *found) meant(r *plan.Rule) (bool, error) {
	if r.When == nil {
		return true, nil
	}
	ok, err := f.s.when[r.When].Holds(facts{f, r.Token})
	if err != nil {
		return false, fmt.Errorf("condition: %w", err)
	}
	return ok, nil
}

// facts are those a condition may read, with the token that its rule wants.
type facts struct {
	*found
	token *plan.Token
}

func (f facts) Fact(variable string) (any, error) {
	c := &f.c
	of, name, _ := strings.Cut(variable, ".")
	switch of {
	case "source":
		if name == "identity" {
			return c.caller, nil
		}
		if !c.source.IsValid() {
			return nil, errSource
		}
		return c.source.String(), nil
	case "destination":
		return int64(c.port), nil
	case "request":
		return f.request(name)
	case "rpc":
		if !c.rpc {
			return nil, errors.New("the call is none of an RPC service")
		}
		return string(map[string][]byte{"service": c.remote.service, "version": c.remote.version, "group": c.remote.group, "method": c.remote.method}[name]), nil
	case "jwt":
		if f.token == nil {
			return nil, errors.New("the rule wants no token")
		}
		good, err := f.prove(f.token)
		if err != nil {
			return nil, err
		}
		good = slices.DeleteFunc(good, func(t *token.Token) bool { return !claims(t, f.token) })
		if len(good) != 1 {
			return nil, fmt.Errorf("%d tokens are there of which the condition may speak", len(good))
		}
		t := good[0]
		if f.claims[t] == nil { // made once, however often it is read
			if f.claims == nil {
				f.claims = map[*token.Token]any{}
			}
			f.claims[t] = plainValue(t.Claims)
		}
		return f.claims[t], nil
	}
	return nil, fmt.Errorf("%s is not known", variable)
}

func (f facts) request(name string) (any, error) {
	c := &f.c
	if !c.http || !c.letter.known() {
		return nil, errLetter
	}
	switch name {
	case "method":
		return c.method, nil
	case "path":
		if c.crooked {
			return nil, http1.ErrAmbiguous
		}
		return c.path, nil
	case "query":
		_, query, _ := strings.Cut(c.target, "?")
		return query, nil
	case "host":
		if host := c.letter.host(); host != "" {
			return host, nil
		}
		return nil, errHost
	}
	if f.headers == nil && f.mixed == nil {
		f.headers, f.mixed = c.letter.all()
	}
	return f.headers, f.mixed
}

// all are the fields by name, those of one name as one. What some servers take for
// another name is told under that as well: with hyphens alone, and with underscores.
// It cannot be told where both are there and say different things.
func (l letter) all() (map[string]any, error) {
	all := map[string]any{}
	l.each(func(name, value string) {
		if old, twice := all[name]; twice {
			sep := ", "
			if name == "cookie" {
				sep = "; "
			}
			value = old.(string) + sep + value
		}
		if !strings.HasPrefix(name, ":") {
			all[name] = value
		}
	})
	for _, name := range slices.Sorted(maps.Keys(all)) {
		for _, other := range [...]string{strings.ReplaceAll(name, "_", "-"), strings.ReplaceAll(name, "-", "_")} {
			if old, both := all[other]; both && old != all[name] {
				return nil, fmt.Errorf("some servers take field %s for %s, and they say different things", name, other)
			}
			all[other] = all[name]
		}
	}
	if host := l.host(); host != "" {
		all["host"] = host
	}
	return all, nil
}

// plainValue makes of a claim what conditions know: every number is a double, as
// CEL reads JSON.
func plainValue(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, _ := v.Float64() // out of range: infinite
		return f
	case []any:
		out := make([]any, len(v))
		for i := range v {
			out[i] = plainValue(v[i])
		}
		return out
	case map[string]any:
		out := make(map[string]any, len(v))
		for k := range v {
			out[k] = plainValue(v[k])
		}
		return out
	}
	return v
}

// trials counts what rules in audit would refuse, and remembers what was told.
type trials struct {
	count atomic.Uint64
	mu    sync.Mutex
	told  map[string]time.Time
}

// due tells whether a rule is to be told of now.
func (t *trials) due(rule string, now time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now.Sub(t.told[rule]) < trialEvery {
		return false
	}
	if t.told == nil || len(t.told) > maxEvents {
		t.told = map[string]time.Time{}
	}
	t.told[rule] = now
	return true
}

// call is what rules judge of this connection.
func (a *arrival) call() call {
	return call{caller: a.who.peerIdentity, port: a.port, source: a.origin}
}

// tried tells of what a rule in audit would have refused.
func (a *arrival) tried(v verdict, what string) { a.sb.tried(a.ev, v, what) }

func (sb *sandbox) tried(ev api.Event, v verdict, what string) {
	if v.trial == "" {
		return
	}
	t := &sb.trials
	t.count.Add(1)
	if !t.due(v.trial, time.Now()) {
		return
	}
	ev.Kind, ev.Rule, ev.Instance = api.EventWouldDeny, v.trial, sb.facts.Load().Instance
	ev.Reason = fmt.Sprintf("%s: allowed by %s, and %s would refuse it", what, v.rule, v.trial)
	sb.p.events.add(ev)
}

func (a *arrival) triedRequest(v verdict, method, path string) {
	if v.trial != "" {
		a.tried(v, said(method, path))
	}
}

// keep copies the fields of a request, which are gone when it has been passed
// on, if some rule reads them: it is judged again when the plan changes.
func (x *exchange2) keep(d *directory, h *http2.Head) []http2.Field {
	if s := d.services[x.key]; s == nil || !s.letters {
		return nil
	}
	return slices.Clone(h.Fields)
}

// origin is where a call comes from. What the calling proxy says is taken if
// the plan knows the address for the identity that was proved; if it says
// nothing, its own address is.
func (g *guestSide) origin(s *hbone.Stream, who party, source string) netip.Addr {
	if s.Field("forwarded") != "" && who.peerInstance == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddrPort(source)
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap()
}

// readKeysAgain takes up changed key files of issuers.
func (d *directory) readKeysAgain(log *slog.Logger) {
	for _, s := range d.services {
		for _, i := range s.issuers {
			if err := i.readAgain(); err != nil {
				log.Warn("read keys again; those before stay in force", "service", s, "issuer", i.Name, "err", err)
			}
		}
	}
}
