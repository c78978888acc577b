// Package rule compiles and checks the CEL expressions of a ReleasePolicy.
//
// It stands apart from the rest of room policy because it links a CEL
// interpreter, which nothing outside the gate needs. An expression is bounded
// in size and in what it may cost, and anything but a plain true refuses.
package rule

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/ext"

	"hauberk.dev/api/spec"
)

const (
	maxExpression = 4096
	maxRules      = 64
	// costLimit bounds one evaluation in CEL's own unit, roughly one per
	// operation: a millisecond or two.
	costLimit = 100_000
)

// Facts are what an expression sees, under these names in lower case. They
// were verified before.
type Facts struct {
	Application string
	Image       Image
	Provenance  Provenance
	Author      string
	Reviewers   []string
	Owners      []string // who approved
}

// Image is the image to release.
type Image struct {
	Repository string `cel:"repository"`
	Digest     string `cel:"digest"`
}

// Provenance is how it was built.
type Provenance struct {
	Builder   string `cel:"builder"`
	Source    string `cel:"source"`
	Revision  string `cel:"revision"`
	BuildType string `cel:"buildType"`
}

// Set is the compiled rules of one policy. It may be used at the same time.
type Set struct {
	policy string
	rules  []compiled
}

type compiled struct {
	spec.ReleaseRule
	program cel.Program
}

// Compile checks the rules of the named policy and makes them ready. The
// error names every rule that does not compile, and where.
func Compile(policy string, rules []spec.ReleaseRule) (*Set, error) {
	if len(rules) > maxRules {
		return nil, fmt.Errorf("compile release policy %q: %d rules, at most %d are allowed", policy, len(rules), maxRules)
	}
	env, err := environment()
	if err != nil {
		return nil, fmt.Errorf("compile release policy %q: %w", policy, err)
	}
	s := &Set{policy: policy}
	var errs []error
	for i, r := range rules {
		p, err := compile(env, r.Expression)
		if err != nil {
			errs = append(errs, fmt.Errorf("compile release policy %q: rule %d %q: %w", policy, i, shorten(r.Expression), err))
			continue
		}
		s.rules = append(s.rules, compiled{r, p})
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return s, nil
}

func environment() (*cel.Env, error) {
	return cel.NewEnv(
		ext.NativeTypes(reflect.TypeFor[Image](), reflect.TypeFor[Provenance](), ext.ParseStructTags(true)),
		ext.Strings(),
		cel.Variable("application", cel.StringType),
		cel.Variable("image", cel.ObjectType("rule.Image")),
		cel.Variable("provenance", cel.ObjectType("rule.Provenance")),
		cel.Variable("author", cel.StringType),
		cel.Variable("reviewers", cel.ListType(cel.StringType)),
		cel.Variable("owners", cel.ListType(cel.StringType)),
		cel.ParserRecursionLimit(64), cel.ParserExpressionSizeLimit(maxExpression),
	)
}

func compile(env *cel.Env, expression string) (cel.Program, error) {
	if expression == "" || len(expression) > maxExpression {
		return nil, fmt.Errorf("expression of %d bytes, want 1 to %d", len(expression), maxExpression)
	}
	ast, issues := env.Compile(expression)
	if issues.Err() != nil {
		return nil, issues.Err()
	}
	if ast.OutputType() != cel.BoolType {
		return nil, fmt.Errorf("its value is a %s, want bool", ast.OutputType())
	}
	return env.Program(ast, cel.CostLimit(costLimit), cel.InterruptCheckFrequency(100))
}

// Broken is a rule that is not true.
type Broken struct {
	Policy string
	Rule   spec.ReleaseRule
	// Cause is why it could not be decided, or nil if it is false.
	Cause error
}

func (b *Broken) Error() string {
	if b.Cause != nil {
		return fmt.Sprintf("release policy %q: %s (rule %q could not be decided: %v)", b.Policy, b.Rule.Message, shorten(b.Rule.Expression), b.Cause)
	}
	return fmt.Sprintf("release policy %q: %s (rule %q is false)", b.Policy, b.Rule.Message, shorten(b.Rule.Expression))
}

func (b *Broken) Unwrap() error { return b.Cause }

// Len is the number of rules.
func (s *Set) Len() int { return len(s.rules) }

// Check says whether every rule is true of the facts; its error is a *Broken.
func (s *Set) Check(ctx context.Context, f Facts) error {
	facts := map[string]any{
		"application": f.Application, "image": &f.Image, "provenance": &f.Provenance,
		"author": f.Author, "reviewers": append([]string{}, f.Reviewers...), "owners": append([]string{}, f.Owners...),
	}
	for _, r := range s.rules {
		v, _, err := r.program.ContextEval(ctx, facts)
		if err != nil {
			return &Broken{s.policy, r.ReleaseRule, err}
		}
		if yes, ok := v.Value().(bool); !ok || !yes {
			return &Broken{s.policy, r.ReleaseRule, nil}
		}
	}
	return nil
}

func shorten(s string) string {
	if len(s) > 120 {
		return s[:120] + "…"
	}
	return s
}
