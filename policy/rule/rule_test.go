package rule_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"hauberk.dev/api/spec"
	"hauberk.dev/policy/rule"
)

func facts() rule.Facts {
	return rule.Facts{
		Application: "bank", Image: rule.Image{Repository: "bank/web", Digest: "sha256:ab"},
		Provenance: rule.Provenance{Builder: "https://ci", Source: "https://git/bank", Revision: "f00", BuildType: "go"},
		Author:     "ann", Reviewers: []string{"bob"}, Owners: []string{"olga"},
	}
}

func TestRules(t *testing.T) {
	for _, c := range []struct{ expr, want string }{
		{`true`, ""},
		{`application == "bank" && image.repository.startsWith("bank/")`, ""},
		{`provenance.source == "https://git/bank" && provenance.builder == "https://ci" && provenance.buildType == "go" && provenance.revision == "f00"`, ""},
		{`!(author in reviewers) && reviewers.exists(r, r == "bob") && size(owners) >= 1 && image.digest != ""`, ""},
		{`author == "bob"`, "must not (rule \"author == \\\"bob\\\"\" is false)"},
		{`reviewers[3] == "x"`, "could not be decided"},
		{`[1,2,3,4,5,6,7,8,9,10].all(a, [1,2,3,4,5,6,7,8,9,10].all(b, [1,2,3,4,5,6,7,8,9,10].all(c, [1,2,3,4,5,6,7,8,9,10].all(d, [1,2,3,4,5,6,7,8,9,10].all(e, a*b*c*d*e > 0)))))`, "cost limit"},
	} {
		s, err := rule.Compile("p", []spec.ReleaseRule{{Expression: c.expr, Message: "must not"}})
		if err != nil {
			t.Errorf("%s: %v", c.expr, err)
			continue
		}
		err = s.Check(t.Context(), facts())
		var broken *rule.Broken
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", c.expr, err)
		case c.want != "" && (!errors.As(err, &broken) || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", c.expr, err, c.want)
		}
	}
}

func TestCompileNamesTheRule(t *testing.T) {
	for _, c := range []struct{ expr, want string }{
		{`provenance.bulder == "x"`, "undefined field 'bulder'"},
		{`nobody == 1`, "undeclared reference"},
		{`author`, "want bool"},
		{`author ==`, "Syntax error"},
		{``, "0 bytes"},
		{strings.Repeat("(", 200) + "true" + strings.Repeat(")", 200), "recursion"},
		{strings.Repeat(" ", 5000), "5000 bytes"},
	} {
		_, err := rule.Compile("two-eyes", []spec.ReleaseRule{{Expression: "true", Message: "m"}, {Expression: c.expr, Message: "m"}})
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), `"two-eyes": rule 1`) {
			t.Errorf("%.40s: %v, want %q", c.expr, err, c.want)
		}
	}
	if _, err := rule.Compile("many", make([]spec.ReleaseRule, 65)); err == nil {
		t.Error("65 rules accepted")
	}
}

func TestCancelled(t *testing.T) {
	s, err := rule.Compile("p", []spec.ReleaseRule{{Expression: `[1,2,3,4,5,6,7,8].all(a, [1,2,3,4,5,6,7,8].all(b, [1,2,3,4,5,6,7,8].all(c, a*b*c > 0)))`, Message: "m"}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Check(ctx, facts()); err == nil {
		t.Error("a cancelled check passed")
	}
}

func FuzzExpression(f *testing.F) {
	f.Add(`provenance.builder == "x" && reviewers.exists(r, r != author)`)
	f.Add(`"a".matches("(a+)+$")`)
	f.Add("[1].map(x, [x].map(y, [y]))")
	f.Fuzz(func(t *testing.T, expr string) {
		s, err := rule.Compile("fuzz", []spec.ReleaseRule{{Expression: expr, Message: "m"}})
		if err == nil {
			s.Check(t.Context(), facts())
		}
	})
}
