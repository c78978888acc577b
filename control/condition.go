package control

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/ast"
	"github.com/google/cel-go/common/operators"
	"github.com/google/cel-go/common/types"

	"hauberk.dev/api/spec"
	"hauberk.dev/internal/condition"
	"hauberk.dev/internal/token"
	"hauberk.dev/plan"
)

const maxCondition = 4096 // bytes

// compileCondition parses and checks a condition in CEL with the whole of CEL,
// and turns it into what a proxy evaluates. What a proxy does not know is
// refused here.
func compileCondition(text string, token bool) (*plan.Expr, error) {
	if len(text) > maxCondition {
		return nil, fmt.Errorf("%d bytes; at most %d", len(text), maxCondition)
	}
	env, err := conditionEnv(token)
	if err != nil {
		return nil, err
	}
	checked, issues := env.Compile(text)
	if err := issues.Err(); err != nil {
		why := strings.Join(strings.Fields(err.Error()), " ")
		if !token && strings.Contains(text, "jwt") {
			why += ": the claims of a token can be read in a rule that has jwt"
		}
		return nil, fmt.Errorf("%.80q: %s", text, why)
	}
	if checked.OutputType() != cel.BoolType && checked.OutputType() != cel.DynType {
		return nil, fmt.Errorf("%.80q: its value is a %s: write a condition, which is true or false", text, checked.OutputType())
	}
	t := translator{native: checked.NativeRep()}
	e, err := t.expr(t.native.Expr())
	if err != nil {
		return nil, fmt.Errorf("%.80q: %w", text, err)
	}
	if _, err := condition.New(*e); err != nil {
		return nil, fmt.Errorf("%.80q: %w: write it with less of CEL, see docs/access.md", text, err)
	}
	return e, nil
}

func conditionEnv(token bool) (*cel.Env, error) {
	options := []cel.EnvOption{cel.ParserRecursionLimit(64), cel.ParserExpressionSizeLimit(maxCondition)}
	for _, v := range condition.Variables {
		kind := cel.StringType
		switch v {
		case "destination.port":
			kind = cel.IntType
		case "request.headers":
			kind = cel.MapType(cel.StringType, cel.StringType)
		case "jwt":
			if !token {
				continue
			}
			kind = cel.MapType(cel.StringType, cel.DynType)
		}
		options = append(options, cel.Variable(v, kind))
	}
	return cel.NewEnv(options...)
}

// translator turns a checked expression into that of a plan.
type translator struct{ native *ast.AST }

// special are the operators that do not evaluate all their arguments.
var special = map[string]string{operators.LogicalAnd: "and", operators.LogicalOr: "or", operators.LogicalNot: "not",
	operators.Conditional: "if", operators.NotStrictlyFalse: "notFalse"}

func (t translator) expr(e ast.Expr) (*plan.Expr, error) {
	// A name with dots in it is one variable.
	if r, ok := t.native.ReferenceMap()[e.ID()]; ok && r.Name != "" && len(r.OverloadIDs) == 0 {
		if r.Value != nil {
			return nil, fmt.Errorf("%q is not known", r.Name)
		}
		return &plan.Expr{Op: "var", Name: strings.TrimPrefix(r.Name, ".")}, nil
	}
	switch e.Kind() {
	case ast.LiteralKind:
		return literal(e)
	case ast.IdentKind:
		return &plan.Expr{Op: "var", Name: e.AsIdent()}, nil
	case ast.SelectKind:
		s := e.AsSelect()
		op := "get"
		if s.IsTestOnly() {
			op = "has"
		}
		return t.with(&plan.Expr{Op: op, Name: s.FieldName()}, s.Operand())
	case ast.CallKind:
		c := e.AsCall()
		args := c.Args()
		if c.IsMemberFunction() {
			args = append([]ast.Expr{c.Target()}, args...)
		}
		if op, ok := special[c.FunctionName()]; ok {
			return t.with(&plan.Expr{Op: op}, args...)
		}
		return t.with(&plan.Expr{Op: "call", Name: c.FunctionName()}, args...)
	case ast.ListKind:
		l := e.AsList()
		if len(l.OptionalIndices()) > 0 {
			return nil, errors.New("optional elements are not known")
		}
		return t.with(&plan.Expr{Op: "list"}, l.Elements()...)
	case ast.MapKind:
		var parts []ast.Expr
		for _, entry := range e.AsMap().Entries() {
			m := entry.AsMapEntry()
			if m.IsOptional() {
				return nil, errors.New("optional entries are not known")
			}
			parts = append(parts, m.Key(), m.Value())
		}
		return t.with(&plan.Expr{Op: "map"}, parts...)
	case ast.ComprehensionKind:
		c := e.AsComprehension()
		if c.HasIterVar2() {
			return nil, errors.New("macros of two variables are not known")
		}
		return t.with(&plan.Expr{Op: "fold", Name: c.IterVar(), Accu: c.AccuVar()},
			c.IterRange(), c.AccuInit(), c.LoopCondition(), c.LoopStep(), c.Result())
	}
	return nil, errors.New("a message is built in it, which is not known")
}

func (t translator) with(e *plan.Expr, parts ...ast.Expr) (*plan.Expr, error) {
	for _, p := range parts {
		one, err := t.expr(p)
		if err != nil {
			return nil, err
		}
		e.Args = append(e.Args, *one)
	}
	return e, nil
}

func literal(e ast.Expr) (*plan.Expr, error) {
	v := e.AsLiteral()
	switch v := v.(type) {
	case types.Null:
		return &plan.Expr{Op: "null"}, nil
	case types.Bool:
		return &plan.Expr{Op: "bool", Name: fmt.Sprint(bool(v))}, nil
	case types.Int:
		return &plan.Expr{Op: "int", Name: fmt.Sprint(int64(v))}, nil
	case types.Double:
		return &plan.Expr{Op: "double", Name: fmt.Sprint(float64(v))}, nil
	case types.String:
		return &plan.Expr{Op: "string", Name: string(v)}, nil
	}
	return nil, fmt.Errorf("a literal of type %s is not known", v.Type().TypeName())
}

// checkIssuer names what is wrong with an issuer.
func checkIssuer(i spec.AccessIssuer) error {
	switch {
	case i.Keys != "" && i.KeysFile != "":
		return errors.New("keys: keysFile is given as well: keep one of them")
	case i.KeysFile != "":
		return nil
	case i.Keys == "":
		return fmt.Errorf("keys: missing for %q: paste its JSON Web Key Set, or name a file of the nodes in keysFile", i.Issuer)
	}
	if _, err := token.ParseKeys([]byte(i.Keys)); err != nil {
		return fmt.Errorf("keys: of %q: %w", i.Issuer, err)
	}
	return nil
}
