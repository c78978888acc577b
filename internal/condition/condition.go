// Package condition evaluates conditions of CEL that have been parsed and
// checked elsewhere: it is not a parser and knows no types before there are
// values. What it knows of CEL means what CEL's specification says; it knows a
// part, and refuses the rest when a condition is made ready, never later.
//
// An evaluation ends: it takes so many steps and no more. Anything but true or
// false is an error, and it is for the caller to be careful then.
package condition

import (
	"errors"
	"fmt"
	"regexp"
	"regexp/syntax"
	"strconv"
	"strings"
)

// Bounds of a condition and of one evaluation.
const (
	MaxNodes = 512
	maxDepth = 64
	maxSteps = 10_000
	maxText  = 64 << 10 // bytes of a string that is put together

	// maxPattern bounds the parts of a regular expression, its repetitions counted
	// out: what it costs to keep, and to match.
	maxPattern = 4096
	// A step is one part of a condition, or so much of a value that it looks at.
	textStep  = 256     // bytes of a string
	listStep  = 16      // elements of a list or map
	matchStep = 4 << 10 // bytes of a string times parts of the pattern
)

// Expr is an expression as it is written down: Op says what it is, and forms
// which of the others it has.
type Expr struct {
	Op   string `json:"op"`
	Name string `json:"name,omitempty"`
	Accu string `json:"accu,omitempty"`
	Args []Expr `json:"args,omitempty"`
}

// Variables are what conditions may read. Each is a string, an int64, or a map
// from strings.
var Variables = []string{
	"source.identity", "source.address", "destination.port",
	"request.method", "request.path", "request.query", "request.host", "request.headers",
	"rpc.service", "rpc.version", "rpc.group", "rpc.method", "jwt",
}

// Facts tell the value of a variable: a bool, int64, float64, string, nil, or
// []any and map[string]any of them. An error means that it cannot be told.
type Facts interface {
	Fact(variable string) (any, error)
}

// Condition is ready to be evaluated, by many at once.
type Condition struct {
	root node
	uses map[string]bool
}

type node struct {
	op      op
	name    string
	accu    string
	value   any
	pattern *regexp.Regexp
	parts   int // of the pattern
	args    []node
}

type op int

const (
	opValue op = iota
	opVariable
	opLocal
	opList
	opMap
	opGet
	opHas
	opFold
	opCall
	opAnd
	opOr
	opNot
	opIf
	opNotFalse
)

// New makes a condition ready, or says what of it is not known here.
func New(e Expr) (*Condition, error) {
	c := &Condition{uses: map[string]bool{}}
	m := maker{c: c}
	var err error
	c.root, err = m.node(&e, nil, 0)
	return c, err
}

// Uses tells whether the condition reads a variable.
func (c *Condition) Uses(variable string) bool { return c.uses[variable] }

type maker struct {
	c     *Condition
	nodes int
}

// forms are how many arguments each kind of expression has.
var forms = map[string]struct {
	op   op
	args int // -1 is any
}{
	"list": {opList, -1}, "map": {opMap, -1}, "get": {opGet, 1}, "has": {opHas, 1}, "fold": {opFold, 5},
	"and": {opAnd, 2}, "or": {opOr, 2}, "not": {opNot, 1}, "if": {opIf, 3}, "notFalse": {opNotFalse, 1},
}

func (m *maker) node(e *Expr, locals []string, depth int) (n node, err error) {
	if m.nodes++; m.nodes > MaxNodes || depth > maxDepth {
		return n, fmt.Errorf("over %d parts or %d levels", MaxNodes, maxDepth)
	}
	if n.value, err = literal(e); err == nil {
		return n, nil
	}
	n.name, n.accu = e.Name, e.Accu
	switch f, ok := forms[e.Op]; {
	case ok && (f.args < 0 || f.args == len(e.Args)) && (f.op != opMap || len(e.Args)%2 == 0):
		n.op = f.op
	case e.Op == "call" && functions[e.Name].f != nil && functions[e.Name].args == len(e.Args):
		n.op = opCall
	case e.Op == "var" && len(e.Args) == 0:
		return m.variable(n, locals)
	default:
		return n, fmt.Errorf("%s %.60q of %d parts is not known", e.Op, e.Name, len(e.Args))
	}
	n.args = make([]node, len(e.Args))
	for i := range e.Args {
		inner := locals
		switch {
		case n.op == opFold && (i == 2 || i == 3):
			inner = append(locals[:len(locals):len(locals)], e.Name, e.Accu)
		case n.op == opFold && i == 4:
			inner = append(locals[:len(locals):len(locals)], e.Accu)
		}
		if n.args[i], err = m.node(&e.Args[i], inner, depth+1); err != nil {
			return n, err
		}
	}
	if n.op == opCall && n.name == "matches" {
		text, ok := n.args[1].value.(string)
		if n.args[1].op != opValue || !ok {
			return n, errors.New("matches takes a pattern that stands in the condition, not one of the request")
		}
		if err = n.matches(text); err != nil {
			return n, fmt.Errorf("matches: %w", err)
		}
	}
	return n, nil
}

// matches makes a pattern ready, if it is not too large.
func (n *node) matches(text string) error {
	tree, err := syntax.Parse(text, syntax.Perl)
	if err != nil {
		return err
	}
	if n.parts = parts(tree); n.parts > maxPattern {
		return fmt.Errorf("%.60q has over %d parts, its repetitions counted out", text, maxPattern)
	}
	n.pattern, err = regexp.Compile(text)
	return err
}

// parts are about the instructions that a regular expression is made of.
func parts(re *syntax.Regexp) int {
	n := 1
	if re.Op == syntax.OpLiteral {
		n = len(re.Rune)
	}
	for _, sub := range re.Sub {
		n += parts(sub)
	}
	if re.Op == syntax.OpRepeat {
		n *= max(re.Min, re.Max, 1)
	}
	return min(n, maxPattern+1)
}

func (m *maker) variable(n node, locals []string) (node, error) {
	for i := len(locals) - 1; i >= 0; i-- {
		if locals[i] == n.name {
			n.op = opLocal
			return n, nil
		}
	}
	for _, v := range Variables {
		if v == n.name {
			n.op = opVariable
			m.c.uses[v] = true
			return n, nil
		}
	}
	return n, fmt.Errorf("variable %.60q is not known", n.name)
}

var errNotLiteral = errors.New("no literal")

func literal(e *Expr) (any, error) {
	if len(e.Args) > 0 {
		return nil, errNotLiteral
	}
	switch e.Op {
	case "string":
		return e.Name, nil
	case "int":
		return strconv.ParseInt(e.Name, 10, 64)
	case "double":
		return strconv.ParseFloat(e.Name, 64)
	case "bool":
		return strconv.ParseBool(e.Name)
	case "null":
		return nil, nil
	}
	return nil, errNotLiteral
}

// Holds evaluates the condition.
func (c *Condition) Holds(f Facts) (bool, error) {
	r := run{facts: f, steps: maxSteps}
	v, err := r.eval(&c.root, nil)
	if err != nil {
		return false, err
	}
	b, ok := v.(bool)
	if !ok {
		return false, errors.New("it is neither true nor false")
	}
	return b, nil
}

// scope is a variable of a macro.
type scope struct {
	name  string
	value any
	outer *scope
}

type run struct {
	facts Facts
	steps int
}

var errSteps = fmt.Errorf("it takes over %d steps", maxSteps)

// afford takes steps for what is looked at.
func (r *run) afford(steps int) error {
	if r.steps -= steps; r.steps < 0 {
		return errSteps
	}
	return nil
}

// weight is how many steps it takes to look at values, without what is in them.
func weight(values ...any) (n int) {
	for _, v := range values {
		switch v := v.(type) {
		case string:
			n += len(v) / textStep
		case []any:
			n += len(v) / listStep
		case map[string]any:
			n += len(v) / listStep
		}
	}
	return n
}

func (r *run) eval(n *node, s *scope) (any, error) {
	if err := r.afford(1); err != nil {
		return nil, err
	}
	switch n.op {
	case opValue:
		return n.value, nil
	case opVariable:
		return r.facts.Fact(n.name)
	case opLocal:
		for ; s != nil; s = s.outer {
			if s.name == n.name {
				return s.value, nil
			}
		}
		return nil, fmt.Errorf("variable %q has no value", n.name)
	case opAnd, opOr:
		return r.logic(n, s)
	case opIf:
		b, err := r.truth(&n.args[0], s)
		if err != nil {
			return nil, err
		}
		if b {
			return r.eval(&n.args[1], s)
		}
		return r.eval(&n.args[2], s)
	case opNotFalse:
		b, err := r.truth(&n.args[0], s)
		return err != nil || b, overrun(err)
	case opFold:
		return r.fold(n, s)
	case opNot:
		b, err := r.truth(&n.args[0], s)
		return !b, err
	case opMap:
		return r.table(n, s)
	}
	var few [3]any // mostly enough
	args := few[:0]
	for i := range n.args {
		v, err := r.eval(&n.args[i], s)
		if err != nil {
			return nil, err
		}
		args = append(args, v)
	}
	return r.apply(n, args)
}

// apply is for what needs the values of all its arguments.
func (r *run) apply(n *node, args []any) (any, error) {
	switch n.op {
	case opList:
		return append([]any{}, args...), nil
	case opGet, opHas:
		m, ok := args[0].(map[string]any)
		if !ok {
			return nil, fmt.Errorf("field %q of what has no fields", n.name)
		}
		v, ok := m[n.name]
		if n.op == opHas {
			return ok, nil
		}
		if !ok {
			return nil, fmt.Errorf("no such key: %q", n.name)
		}
		return v, nil
	}
	if n.pattern != nil {
		text, ok := args[0].(string)
		if !ok {
			return nil, errKind
		}
		if err := r.afford(len(text) * n.parts / matchStep); err != nil {
			return nil, err
		}
		return n.pattern.MatchString(text), nil
	}
	if err := r.afford(weight(args...)); err != nil {
		return nil, err
	}
	v, err := functions[n.name].f(r, args)
	if r.steps < 0 { // what it was looking at did not end
		return nil, errSteps
	}
	return v, err
}

// overrun lets the end of patience through where errors count as a value.
func overrun(err error) error {
	if errors.Is(err, errSteps) {
		return err
	}
	return nil
}

func (r *run) truth(n *node, s *scope) (bool, error) {
	v, err := r.eval(n, s)
	if err != nil {
		return false, err
	}
	b, ok := v.(bool)
	if !ok {
		return false, errKind
	}
	return b, nil
}

// logic is && and ||, of which one side may decide whatever is wrong with the
// other.
func (r *run) logic(n *node, s *scope) (any, error) {
	decides := n.op == opOr
	a, first := r.truth(&n.args[0], s)
	if first == nil && a == decides {
		return decides, nil
	}
	b, second := r.truth(&n.args[1], s)
	if second == nil && b == decides && overrun(first) == nil {
		return decides, nil
	}
	if first == nil {
		first = second
	}
	return !decides, first
}

func (r *run) table(n *node, s *scope) (any, error) {
	m := make(map[string]any, len(n.args)/2)
	for i := 0; i < len(n.args); i += 2 {
		k, err := r.eval(&n.args[i], s)
		if err != nil {
			return nil, err
		}
		name, ok := k.(string)
		if !ok {
			return nil, errKind
		}
		if _, twice := m[name]; twice {
			return nil, fmt.Errorf("key %q is there twice", name)
		}
		if m[name], err = r.eval(&n.args[i+1], s); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// fold is what exists, all, filter and map are made of.
func (r *run) fold(n *node, s *scope) (any, error) {
	over, err := r.eval(&n.args[0], s)
	if err != nil {
		return nil, err
	}
	var items []any
	switch o := over.(type) {
	case []any:
		items = o
	case map[string]any:
		for k := range o {
			items = append(items, k)
		}
	default:
		return nil, errKind
	}
	first, err := r.eval(&n.args[1], s)
	if err != nil {
		return nil, err
	}
	accu := &scope{n.accu, first, s}
	// The steps of a macro take errors for values, as && and || do.
	var pending error
	for _, item := range items {
		inner := &scope{n.name, item, accu}
		if pending == nil {
			goOn, err := r.eval(&n.args[2], inner)
			if err != nil {
				return nil, err
			}
			if goOn == false {
				break
			}
		}
		v, err := r.step(&n.args[3], inner, pending)
		if overrun(err) != nil {
			return nil, err
		}
		if pending = err; err == nil {
			accu = &scope{n.accu, v, s}
		}
	}
	if pending != nil {
		return nil, pending
	}
	return r.eval(&n.args[4], accu)
}

// step is one step of a macro. After an error, which stands for what was found
// so far, only a step that decides by itself goes on.
func (r *run) step(n *node, s *scope, pending error) (any, error) {
	if pending == nil {
		return r.eval(n, s)
	}
	if err := r.afford(1); err != nil {
		return nil, err
	}
	if n.op != opAnd && n.op != opOr {
		return nil, pending
	}
	decides := n.op == opOr
	for i := range n.args {
		if a := &n.args[i]; a.op == opLocal && a.name == s.outer.name {
			continue // what was found so far is an error
		}
		if b, err := r.truth(&n.args[i], s); err == nil && b == decides {
			return decides, nil
		} else if overrun(err) != nil {
			return nil, err
		}
	}
	return nil, pending
}

var errKind = errors.New("no such overload: a value is of another type")

// functions by the name that CEL's checker gives them.
var functions = map[string]struct {
	args int
	f    func(*run, []any) (any, error)
}{
	"_==_": {2, func(r *run, a []any) (any, error) { return r.equal(a[0], a[1]), nil }},
	"_!=_": {2, func(r *run, a []any) (any, error) { return !r.equal(a[0], a[1]), nil }},
	"_<_":  {2, compares(func(c int) bool { return c < 0 })},
	"_<=_": {2, compares(func(c int) bool { return c <= 0 })},
	"_>_":  {2, compares(func(c int) bool { return c > 0 })},
	"_>=_": {2, compares(func(c int) bool { return c >= 0 })},
	"@in":  {2, in}, "_[_]": {2, index}, "size": {1, size},
	"_+_": {2, plus}, "_-_": {2, arithmetic}, "_*_": {2, times}, "_/_": {2, divide}, "_%_": {2, modulo}, "-_": {1, negate},
	"startsWith": {2, texts(strings.HasPrefix)}, "endsWith": {2, texts(strings.HasSuffix)}, "contains": {2, texts(strings.Contains)},
	"matches": {2, func(*run, []any) (any, error) { return nil, errKind }}, // its pattern is ready, and stands in the node
	"string":  {1, toText}, "int": {1, toInt}, "double": {1, toDouble}, "dyn": {1, func(_ *run, a []any) (any, error) { return a[0], nil }},
}
