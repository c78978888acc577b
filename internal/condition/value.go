package condition

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// equal compares values: numbers by value whatever their type, other values of
// different types are not equal. Each element is a step: lists may hold the same
// list again and again. Without steps left it is false.
func (r *run) equal(a, b any) bool {
	if r.afford(1+weight(a)) != nil {
		return false
	}
	switch x := a.(type) {
	case nil:
		return b == nil
	case bool:
		y, ok := b.(bool)
		return ok && x == y
	case string:
		y, ok := b.(string)
		return ok && x == y
	case int64, float64:
		c, ok := order(a, b)
		return ok && c == 0
	case []any:
		y, ok := b.([]any)
		if !ok || len(x) != len(y) {
			return false
		}
		for i := range x {
			if !r.equal(x[i], y[i]) {
				return false
			}
		}
		return true
	case map[string]any:
		y, ok := b.(map[string]any)
		if !ok || len(x) != len(y) {
			return false
		}
		for k, v := range x {
			if w, ok := y[k]; !ok || !r.equal(v, w) {
				return false
			}
		}
		return true
	}
	return false
}

// order compares two of a kind, or two numbers. Nothing is in order with what is
// not a number.
func order(a, b any) (int, bool) {
	switch x := a.(type) {
	case string:
		y, ok := b.(string)
		return strings.Compare(x, y), ok
	case bool:
		y, ok := b.(bool)
		return truthOrder(x) - truthOrder(y), ok
	case int64:
		switch y := b.(type) {
		case int64:
			return cmp.Compare(x, y), true
		case float64:
			return mixed(x, y)
		}
	case float64:
		switch y := b.(type) {
		case int64:
			c, ok := mixed(y, x)
			return -c, ok
		case float64:
			if math.IsNaN(x) || math.IsNaN(y) {
				return 0, false
			}
			return cmp.Compare(x, y), true
		}
	}
	return 0, false
}

func truthOrder(b bool) int {
	if b {
		return 1
	}
	return 0
}

// mixed compares without rounding a large int64 to a neighbour.
func mixed(i int64, f float64) (int, bool) {
	switch {
	case math.IsNaN(f):
		return 0, false
	case f >= 1<<63:
		return -1, true
	case f < -1<<63:
		return 1, true
	}
	whole := math.Trunc(f)
	if c := cmp.Compare(i, int64(whole)); c != 0 {
		return c, true
	}
	return cmp.Compare(0, f-whole), true
}

func compares(holds func(int) bool) func(*run, []any) (any, error) {
	return func(_ *run, a []any) (any, error) {
		c, ok := order(a[0], a[1])
		if !ok {
			if isNaN(a[0]) && isNumber(a[1]) || isNaN(a[1]) && isNumber(a[0]) {
				return nil, errors.New("NaN values cannot be ordered")
			}
			return nil, errKind
		}
		return holds(c), nil
	}
}

func isNaN(v any) bool {
	f, ok := v.(float64)
	return ok && math.IsNaN(f)
}

func isNumber(v any) bool {
	switch v.(type) {
	case int64, float64:
		return true
	}
	return false
}

func in(r *run, a []any) (any, error) {
	switch set := a[1].(type) {
	case []any:
		for _, v := range set {
			if r.equal(a[0], v) {
				return true, nil
			}
		}
		return false, nil
	case map[string]any:
		name, ok := a[0].(string)
		if !ok {
			return false, nil
		}
		_, ok = set[name]
		return ok, nil
	}
	return nil, errKind
}

func index(_ *run, a []any) (any, error) {
	switch of := a[0].(type) {
	case map[string]any:
		name, ok := a[1].(string)
		if !ok {
			return nil, errKind
		}
		v, ok := of[name]
		if !ok {
			return nil, fmt.Errorf("no such key: %q", name)
		}
		return v, nil
	case []any:
		i, ok := a[1].(int64)
		if f, isFloat := a[1].(float64); isFloat && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
			i, ok = int64(f), true
		}
		if !ok {
			return nil, errKind
		}
		if i < 0 || i >= int64(len(of)) {
			return nil, fmt.Errorf("index out of bounds: %d", i)
		}
		return of[i], nil
	}
	return nil, errKind
}

func size(_ *run, a []any) (any, error) {
	switch v := a[0].(type) {
	case string:
		return int64(utf8.RuneCountInString(v)), nil
	case []any:
		return int64(len(v)), nil
	case map[string]any:
		return int64(len(v)), nil
	}
	return nil, errKind
}

func texts(f func(s, t string) bool) func(*run, []any) (any, error) {
	return func(_ *run, a []any) (any, error) {
		s, ok1 := a[0].(string)
		t, ok2 := a[1].(string)
		if !ok1 || !ok2 {
			return nil, errKind
		}
		return f(s, t), nil
	}
}

var errOverflow = errors.New("integer overflow")

// plus adds numbers of one type and joins strings or lists.
func plus(_ *run, a []any) (any, error) {
	switch x := a[0].(type) {
	case string:
		if y, ok := a[1].(string); ok {
			if len(x)+len(y) > maxText {
				return nil, fmt.Errorf("a string of over %d bytes", maxText)
			}
			return x + y, nil
		}
	case []any:
		if y, ok := a[1].([]any); ok {
			if len(x)+len(y) > maxSteps {
				return nil, fmt.Errorf("a list of over %d elements", maxSteps)
			}
			return append(x[:len(x):len(x)], y...), nil
		}
	case float64:
		if y, ok := a[1].(float64); ok {
			return x + y, nil
		}
	case int64:
		if y, ok := a[1].(int64); ok {
			if s := x + y; (s > x) == (y > 0) {
				return s, nil
			}
			return nil, errOverflow
		}
	}
	return nil, errKind
}

func arithmetic(_ *run, a []any) (any, error) {
	switch x := a[0].(type) {
	case float64:
		if y, ok := a[1].(float64); ok {
			return x - y, nil
		}
	case int64:
		if y, ok := a[1].(int64); ok {
			if d := x - y; (d < x) == (y > 0) {
				return d, nil
			}
			return nil, errOverflow
		}
	}
	return nil, errKind
}

func times(_ *run, a []any) (any, error) {
	switch x := a[0].(type) {
	case float64:
		if y, ok := a[1].(float64); ok {
			return x * y, nil
		}
	case int64:
		if y, ok := a[1].(int64); ok {
			p := x * y
			if x != 0 && (p/x != y || x == -1 && y == math.MinInt64) {
				return nil, errOverflow
			}
			return p, nil
		}
	}
	return nil, errKind
}

func divide(_ *run, a []any) (any, error) {
	switch x := a[0].(type) {
	case float64:
		if y, ok := a[1].(float64); ok {
			return x / y, nil
		}
	case int64:
		if y, ok := a[1].(int64); ok {
			switch {
			case y == 0:
				return nil, errors.New("division by zero")
			case x == math.MinInt64 && y == -1:
				return nil, errOverflow
			}
			return x / y, nil
		}
	}
	return nil, errKind
}

func modulo(_ *run, a []any) (any, error) {
	x, ok1 := a[0].(int64)
	y, ok2 := a[1].(int64)
	switch {
	case !ok1 || !ok2:
		return nil, errKind
	case y == 0:
		return nil, errors.New("modulus by zero")
	case x == math.MinInt64 && y == -1:
		return nil, errOverflow
	}
	return x % y, nil
}

func negate(_ *run, a []any) (any, error) {
	switch x := a[0].(type) {
	case float64:
		return -x, nil
	case int64:
		if x == math.MinInt64 {
			return nil, errOverflow
		}
		return -x, nil
	}
	return nil, errKind
}

func toText(_ *run, a []any) (any, error) {
	switch v := a[0].(type) {
	case string:
		return v, nil
	case bool:
		return strconv.FormatBool(v), nil
	case int64:
		return strconv.FormatInt(v, 10), nil
	case float64:
		return strconv.FormatFloat(v, 'g', -1, 64), nil
	}
	return nil, errKind
}

func toInt(_ *run, a []any) (any, error) {
	switch v := a[0].(type) {
	case int64:
		return v, nil
	case string:
		return strconv.ParseInt(v, 10, 64)
	case float64:
		// As CEL has it, the ends of the range are left out.
		if math.IsNaN(v) || v <= -1<<63 || v >= 1<<63 {
			return nil, errOverflow
		}
		return int64(v), nil
	}
	return nil, errKind
}

func toDouble(_ *run, a []any) (any, error) {
	switch v := a[0].(type) {
	case float64:
		return v, nil
	case int64:
		return float64(v), nil
	case string:
		return strconv.ParseFloat(v, 64)
	}
	return nil, errKind
}
