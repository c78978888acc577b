package control

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/cel-go/cel"

	"hauberk.dev/api/spec"
	"hauberk.dev/internal/condition"
	"hauberk.dev/plan"
)

// known are facts that cel-go is told of under the same names.
type known map[string]any

func (k known) Fact(name string) (any, error) {
	v, ok := k[name]
	if !ok {
		return nil, errors.New("cannot be told")
	}
	return v, nil
}

func facts() known {
	return known{
		"source.identity": "spiffe://bank.local/ns/bank/sa/web", "source.address": "10.88.0.7", "destination.port": int64(8080),
		"request.method": "GET", "request.path": "/accounts/7", "request.query": "q=1", "request.host": "ledger",
		"request.headers": map[string]any{"x-tenant": "gold", "user-agent": "curl/8"},
		"jwt": map[string]any{"sub": "alice", "level": float64(3), "half": 2.5, "admin": true, "nothing": nil,
			"groups": []any{"tellers", "staff", float64(7)}, "deep": map[string]any{"a": map[string]any{"b": "c"}}, "empty": []any{}},
	}
}

// expressions hold, do not hold, or cannot be decided, in every way known.
var expressions = []string{
	`true`, `false`, `!true`, `1 == 1`, `1 < 2 && 2 <= 2 && 3 > 2 && 3 >= 3 && 1 != 2`,
	`request.method == "GET" && request.path.startsWith("/accounts/")`, `request.method in ["GET", "HEAD"]`,
	`request.headers["x-tenant"] == "gold"`, `request.headers["none"] == "gold"`, `"none" in request.headers`, `has(request.headers.none)`,
	`"x-tenant" in request.headers && request.headers["x-tenant"].matches("^(gold|silver)$")`, `request.headers["user-agent"].contains("curl")`,
	`source.identity.endsWith("/sa/web")`, `source.address == "10.88.0.7"`, `destination.port == 8080`, `destination.port > 8079 && destination.port % 2 == 0`,
	`jwt.sub == "alice"`, `jwt.missing == "x"`, `has(jwt.missing)`, `has(jwt.sub)`, `has(jwt.deep.a.b)`, `has(jwt.deep.x.b)`, `jwt.deep.a.b == "c"`, `jwt["deep"]["a"]["b"] == "c"`,
	`jwt.level >= 3`, `jwt.level == 3`, `jwt.level == 3.0`, `jwt.level == "3"`, `jwt.half > 2`, `jwt.half < 2.25`, `jwt.admin`, `jwt.sub`, `jwt.nothing == null`, `jwt.sub == null`,
	`"tellers" in jwt.groups`, `"root" in jwt.groups`, `7 in jwt.groups`, `jwt.groups[0] == "tellers"`, `jwt.groups[9] == "x"`, `jwt.groups[-1] == "x"`, `size(jwt.groups) == 3`, `jwt.groups.size() > 2`,
	`jwt.groups.exists(g, g == "staff")`, `jwt.groups.exists(g, g == "none")`, `jwt.groups.all(g, g != "none")`, `jwt.groups.exists_one(g, g == "staff")`,
	`jwt.groups.exists(g, g.startsWith("st"))`, `jwt.groups.exists(g, g.startsWith("no"))`, `jwt.groups.all(g, g.startsWith("t"))`, `jwt.groups.all(g, size(g) > 1)`,
	`jwt.groups.filter(g, g == "staff").size() == 1`, `jwt.groups.map(g, g == "staff") == [false, true, false]`, `jwt.empty.exists(g, g == "x")`, `jwt.empty.all(g, g == "x")`,
	`jwt.deep.exists(k, k == "a")`, `["a", "b"].exists(x, ["b", "c"].exists(y, x == y))`, `jwt.groups.exists(g, jwt.groups.exists(h, g == h && g == 7))`,
	`jwt.missing == 1 || true`, `true || jwt.missing == 1`, `jwt.missing == 1 && false`, `false && jwt.missing == 1`, `jwt.missing == 1 || false`, `jwt.missing == 1 && true`,
	`true ? jwt.admin : jwt.missing`, `false ? jwt.admin : jwt.missing`, `jwt.missing ? true : false`, `jwt.sub ? true : false`,
	`1 + 2 * 3 - 4 / 2 == 5`, `7 % 4 == 3`, `1 / 0 == 1`, `1 % 0 == 1`, `9223372036854775807 + 1 > 0`, `-9223372036854775808 - 1 < 0`, `9223372036854775807 * 2 > 0`, `-(-9223372036854775808) > 0`,
	`-9223372036854775808 / -1 > 0`, `1.5 + 1.5 == 3.0`, `3.0 / 0.0 > 1.0`, `-1.5 < 0.0`, `"a" + "b" == "ab"`, `[1] + [2] == [1, 2]`, `"abc" < "abd"`, `false < true`,
	`jwt.level + 1.0 == 4.0`, `jwt.level + 1 == 4`, `jwt.sub + "x" == "alicex"`, `jwt.level < "x"`, `jwt.sub.startsWith("al")`, `jwt.level.startsWith("al")`,
	`{"a": 1, "b": [2]} == {"b": [2], "a": 1}`, `{"a": 1}["a"] == 1`, `{"a": 1}.b == 1`, `"a" in {"a": 1}`, `dyn({"a": 1}).a == 1.0`,
	`size("żółw") == 4`, `size(request.headers) == 2`, `string(destination.port) == "8080"`, `int("12") == 12`, `int("x") == 12`, `int(2.9) == 2`, `int(1e300) == 2`, `double("2.5") == jwt.half`,
	`double(3) == jwt.level`, `string(true) == "true"`, `string(2.5) == "2.5"`, `dyn(1) == 1.0`, `dyn("1") == 1`, `[1, 2] == [1, 2.0]`, `jwt.deep == jwt.deep`, `jwt.groups == ["tellers", "staff", 7]`,
	`rpc.method == "x"`, `rpc.method == "x" || request.method == "GET"`, `request.query.matches("^q=")`,
}

// TestConditions has what a proxy makes of a condition and what cel-go makes of
// it say the same.
func TestConditions(t *testing.T) {
	known := facts()
	decided, open := 0, 0
	for _, text := range expressions {
		e, err := compileCondition(text, true)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		ours, oursErr := evaluate(t, e, known)
		theirs, theirsErr := byCEL(t, text, known)
		if ours != theirs || (oursErr == nil) != (theirsErr == nil) {
			t.Errorf("%s: %v, %v; cel-go says %v, %v", text, ours, oursErr, theirs, theirsErr)
		}
		if oursErr == nil {
			decided++
		} else {
			open++
		}
	}
	if decided < 60 || open < 20 {
		t.Errorf("%d conditions were decided and %d were not: the table has lost its edge", decided, open)
	}
}

func evaluate(t testing.TB, e *plan.Expr, f condition.Facts) (bool, error) {
	t.Helper()
	c, err := condition.New(*e)
	if err != nil {
		t.Fatal(err)
	}
	return c.Holds(f)
}

func byCEL(t testing.TB, text string, f known) (bool, error) {
	t.Helper()
	env, err := conditionEnv(true)
	if err != nil {
		t.Fatal(err)
	}
	checked, issues := env.Compile(text)
	if issues.Err() != nil {
		t.Fatal(issues.Err())
	}
	program, err := env.Program(checked, cel.CostLimit(1_000_000))
	if err != nil {
		return false, err
	}
	v, _, err := program.Eval(map[string]any(f))
	if err != nil {
		return false, err
	}
	b, ok := v.Value().(bool)
	if !ok {
		return false, errors.New("no bool")
	}
	return b, nil
}

// TestNumberLine: numbers of both types stand on one line, as CEL's specification
// has it; cel-go rounds the integer first.
func TestNumberLine(t *testing.T) {
	for text, want := range map[string]bool{`dyn(9007199254740993) == 9007199254740992.0`: false, `dyn(9007199254740993) > 9007199254740992.0`: true,
		`dyn(9223372036854775807) < 9223372036854775808.0`: true, `dyn(-1) > -1.5`: true, `dyn(1) < 1.5`: true} {
		e, err := compileCondition(text, false)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := evaluate(t, e, known{}); ok != want || err != nil {
			t.Errorf("%s: %v, %v", text, ok, err)
		}
	}
}

// TestConditionsRefused are conditions that no proxy gets to see, and why.
func TestConditionsRefused(t *testing.T) {
	for text, want := range map[string]string{
		`request.method`:                         "is a string",
		`request.method = "GET"`:                 "Syntax error",
		`request.verb == "GET"`:                  "undeclared reference",
		`request.method == 1`:                    "no matching overload",
		`jwt.sub == "a"`:                         "in a rule that has jwt",
		`request.path.matches(request.method)`:   "stands in the condition",
		`request.path.matches("(")`:              "matches",
		`timestamp("2026-01-01T00:00:00Z") == 1`: "no matching overload",
		`duration("1s") == duration("1s")`:       "not known",
		`1u == 1u`:                               "not known",
		`b"a" == b"a"`:                           "not known",
		`type(1) == int`:                         "not known",
		`{1: 2}[1] == 2 && ` + strings.Repeat("true && ", 600) + `true`: "bytes",
		strings.Repeat("true && ", 400) + `true`:                        "parts",
		strings.Repeat("!", 70) + `true`:                                "",
	} {
		if e, err := compileCondition(text, false); err == nil {
			if _, err := condition.New(*e); err == nil && want != "" {
				t.Errorf("%.60s: taken", text)
			}
		} else if !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v; want it to speak of %q", text, err, want)
		}
	}
}

// TestConditionsEnd: what would take long is given up.
func TestConditionsEnd(t *testing.T) {
	list := `[` + strings.Repeat(`1,`, 99) + `1]`
	e, err := compileCondition(list+`.all(a, `+list+`.all(b, `+list+`.all(c, a == b && b == c)))`, false)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := evaluate(t, e, known{}); err == nil {
		t.Errorf("a million steps: %v", ok)
	}
	doubled := `[[1, 1]]` + strings.Repeat(`.map(a, [a, a])`, 30)
	long := `["` + strings.Repeat("x", 1000) + `"]` + strings.Repeat(`.map(a, a + a)`, 6)
	for name, text := range map[string]string{
		"a list that holds itself twice, and again": doubled + `.all(x, x == x)`,
		"and is looked for":                         doubled + `.all(x, x in [x])`,
		"long strings":                              long + `.all(a, ` + list + `.all(b, ` + list + `.all(c, a + "b" != a + "c")))`,
		"long strings and a pattern":                long + `.all(a, ` + list + `.all(b, a.matches("(x|xx|x?y){300}z") || b == 1))`,
	} {
		e, err := compileCondition(text, false)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if ok, err := evaluate(t, e, known{}); err == nil || !strings.Contains(err.Error(), "over 10000 steps") {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	if _, err := compileCondition(`source.identity.matches("(abcdefgh){600}")`, false); err == nil || !strings.Contains(err.Error(), "over 4096 parts") {
		t.Errorf("a pattern of 5000 parts: %v", err)
	}
	for _, text := range []string{`list || true`, `true || list`} {
		text = strings.Replace(text, "list", list+`.exists(a, `+list+`.exists(b, `+list+`.exists(c, a + b + c == 7)))`, 1)
		e, err := compileCondition(text, false)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := evaluate(t, e, known{}); (err == nil) != strings.HasPrefix(text, "true") || ok != strings.HasPrefix(text, "true") {
			t.Errorf("%.20s...: %v, %v", text, ok, err)
		}
	}
}

// FuzzCondition compares with cel-go whatever compiles.
func FuzzCondition(f *testing.F) {
	for _, text := range expressions {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := compileCondition(text, true)
		if err != nil {
			return
		}
		known := facts()
		ours, oursErr := evaluate(t, e, known)
		theirs, theirsErr := byCEL(t, text, known)
		if oursErr != nil && strings.Contains(oursErr.Error(), "over ") {
			return // given up earlier
		}
		if ours != theirs || (oursErr == nil) != (theirsErr == nil) {
			t.Errorf("%s: %v, %v; cel-go says %v, %v", text, ours, oursErr, theirs, theirsErr)
		}
	})
}

// TestAccessRules: what of a policy makes no sense is named, allows nothing and
// denies by the rest.
func TestAccessRules(t *testing.T) {
	const keys = `{"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}`
	w := bank()
	k := key{"bank", "ledger"}
	broken := spec.AccessRule{From: []string{"web"}, Sources: []string{"10.0.0.1"}, When: "request.verb == 1", JWT: &spec.AccessJWT{Issuers: []string{"https://b"}}}
	p := spec.AccessPolicy{Workload: "ledger",
		Issuers: []spec.AccessIssuer{{Issuer: "https://a", Audiences: []string{"bank"}, Keys: keys}, {Issuer: "https://b", Audiences: []string{"bank"}, Keys: "{"}},
		Allow: []spec.AccessRule{broken, {From: []string{"*"}, Headers: []spec.AccessHeader{{Name: "X-Tenant", Prefix: "g"}}, Sources: []string{"10.88.0.7/16"},
			JWT: &spec.AccessJWT{Claims: []spec.AccessClaim{{Name: "role", OneOf: []string{"teller"}}}}, When: `jwt.sub != ""`, Mode: "audit"}},
		Deny: []spec.AccessRule{broken}}
	var s plan.Service
	w.protect(&s, k, p)
	if len(s.Allow) != 1 || len(s.Deny) != 1 || len(s.Issuers) != 1 || len(s.Trials) != 0 {
		t.Fatalf("%+v", s)
	}
	a, d := s.Allow[0], s.Deny[0]
	if a.Name != "ledger/allow[1]" || !a.Audit || a.Headers[0].Name != "x-tenant" || a.Sources[0].String() != "10.88.0.0/16" || a.When == nil || len(a.Token.Issuers) != 1 || a.Token.Issuers[0] != s.Issuers[0].Name {
		t.Errorf("%+v", a)
	}
	if d.When != nil || d.Token != nil || d.Sources != nil || len(d.From) != 1 {
		t.Errorf("a rule that denies and makes no sense: %+v", d)
	}
	err := w.accessFaults(k, p)
	if err == nil {
		t.Fatal("nothing was found")
	}
	for _, want := range []string{`spec.issuers[1].keys: of "https://b"`, `spec.allow[0].sources[0]: "10.0.0.1" is no network: write it as`, `spec.allow[0].jwt.issuers[0]: "https://b"`,
		`spec.allow[0].when: "request.verb == 1"`, `spec.deny[0].when`, "the rule allows nothing", "the rule denies by the rest of it"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no word of %q in:\n%v", want, err)
		}
	}
	mapped := spec.AccessPolicy{Deny: []spec.AccessRule{{From: []string{"*"}, Sources: []string{"::ffff:10.0.0.0/104"}}}}
	if err := w.accessFaults(k, mapped); err == nil || !strings.Contains(err.Error(), "write it as 10.0.0.0/8") {
		t.Errorf("IPv4 as IPv6: %v", err)
	}
	for from, ok := range map[string]bool{"web": true, "web.shop": true, "*": true, "anonymous": true, "spiffe://a.b/x": true, "spiffe://a.b/ns/bank/sa/web": true,
		"Web": false, "web ": false, "web.": false, ".shop": false, "web.shop.svc": false, "web/x": false, "spiffe://a.b": false, "spiffe://A/x": false, "SPIFFE://a/x": false, "we*": false} {
		one := spec.AccessRule{From: []string{"ledger", from}, Sources: []string{"10.0.0.0/8"}}
		named := spec.AccessPolicy{Allow: []spec.AccessRule{one}, Deny: []spec.AccessRule{one}}
		s = plan.Service{}
		w.protect(&s, k, named)
		err := w.accessFaults(k, named)
		if ok && (err != nil || len(s.Allow) != 1 || len(s.Deny[0].From) != 2 || slices.Contains(s.Deny[0].From, "*") != (from == "*")) {
			t.Errorf("%q: %+v, %v", from, s, err)
		}
		if !ok && (err == nil || !strings.Contains(err.Error(), fmt.Sprintf("spec.deny[0].from[1]: %q is no caller: write", from)) ||
			len(s.Allow) > 0 || !slices.Equal(s.Deny[0].From, []string{"*", "anonymous"}) || len(s.Deny[0].Sources) != 1) {
			t.Errorf("%q, who cannot be: %+v, %v", from, s, err)
		}
	}
	p.Mode = modeAudit
	s = plan.Service{}
	if w.protect(&s, k, p); len(s.Trials) != 1 || len(s.Allow)+len(s.Deny) != 0 || len(s.Trials[0].Deny) != 1 || !s.Trials[0].Faulty {
		t.Errorf("in audit: %+v", s)
	}
	p.Allow = p.Allow[1:]
	s = plan.Service{}
	if w.protect(&s, k, p); s.Trials[0].Faulty {
		t.Errorf("in audit, nothing wrong with what it allows: %+v", s)
	}
}

// TestCallbackRules: who may call back is apart from who may call, in a policy in
// force and in one in audit, and what makes no sense is named.
func TestCallbackRules(t *testing.T) {
	w := bank()
	k := key{"bank", "web"}
	p := spec.AccessPolicy{Workload: "web", Callbacks: []spec.AccessCallback{{From: []string{"ledger"}, Services: []string{"org.bank.Back"}, Methods: []string{"done"}, Mode: modeAudit},
		{From: []string{"*", "anonymous"}, When: "rpc.verb == 1"}}}
	var s plan.Service
	w.protect(&s, k, p)
	if len(s.Allow)+len(s.Deny) != 0 || len(s.Callbacks) != 1 {
		t.Fatalf("%+v", s)
	}
	if c := s.Callbacks[0]; c.Name != "web/callbacks[0]" || c.From[0] != w.caller("bank", "ledger") || c.Services[0] != "org.bank.Back" || c.Methods[0] != "done" || !c.Audit {
		t.Errorf("%+v", c)
	}
	if err := w.accessFaults(k, p); err == nil || !strings.Contains(err.Error(), "spec.callbacks[1].when") || !strings.Contains(err.Error(), "the rule allows nothing") ||
		!strings.Contains(err.Error(), "spec.callbacks[1].from[1]: anonymous") {
		t.Errorf("%v", err)
	}
	p.Mode = modeAudit
	s = plan.Service{}
	if w.protect(&s, k, p); len(s.Callbacks) != 0 || len(s.Trials) != 1 || len(s.Trials[0].Callbacks) != 1 || !s.Trials[0].FaultyCallbacks || s.Trials[0].Faulty {
		t.Errorf("in audit: %+v", s)
	}
	p.Callbacks = p.Callbacks[:1]
	s = plan.Service{}
	if w.protect(&s, k, p); s.Trials[0].FaultyCallbacks {
		t.Errorf("in audit, nothing wrong with its callbacks: %+v", s)
	}
}

// TestObserveReachesPlans: what the control plane was told to have noted is in
// every node's plan.
func TestObserveReachesPlans(t *testing.T) {
	w := bank()
	w.observe = &plan.Observe{Log: "json", Traces: &plan.Traces{Collector: "127.0.0.1:4318", PerMille: 10}}
	for _, node := range []string{"n1", "n2"} {
		if got := w.mesh(node).Observe; got != w.observe {
			t.Errorf("%s: %+v", node, got)
		}
	}
}
