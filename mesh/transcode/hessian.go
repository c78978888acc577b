package transcode

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"hauberk.dev/mesh/hessian"
)

// hessianWriter writes values in the draft of Hessian 2 that SOFA has kept.
type hessianWriter struct {
	hessian.Writer
	s *Service
}

// value writes what a token begins as a value of a type.
func (h *hessianWriter) value(r *reader, as string, tok json.Token, depth int) (err error) {
	if depth > maxDepth {
		return errors.New("nested too deep")
	}
	members, class := h.s.Classes[as]
	element, array := strings.CutSuffix(as, "[]")
	switch {
	case tok == nil && !primitive(as):
		h.Null()
	case class:
		return h.object(r, as, members, tok, depth)
	case array && as != "byte[]":
		return h.array(r, "["+element, element, tok, depth)
	case as == "java.util.List":
		return h.array(r, "", "java.lang.Object", tok, depth)
	case as == "java.util.Map":
		return h.pairs(r, tok, depth)
	case as == "java.lang.Object":
		return h.any(r, tok, depth)
	default:
		return h.scalar(as, tok)
	}
	return nil
}

// bitsOf is the length of a type of whole numbers, 0 of others.
func bitsOf(as string) int {
	return map[string]int{"int": 32, "java.lang.Integer": 32, "short": 16, "java.lang.Short": 16, "byte": 8, "java.lang.Byte": 8,
		"long": 64, "java.lang.Long": 64}[as]
}

// primitive says whether a type of Java has no null.
func primitive(as string) bool {
	return slices.Contains([]string{"int", "long", "short", "byte", "double", "float", "boolean"}, as)
}

func (h *hessianWriter) scalar(as string, tok json.Token) error {
	number, isNumber := tok.(json.Number)
	text, isText := tok.(string)
	switch bits, short := bitsOf(as), shown(tok); {
	case bits > 0:
		if isText { // of 64 bits not every reader of JSON keeps the last
			number, isNumber = json.Number(text), bits == 64
		}
		n, err := whole(string(number), bits)
		if !isNumber || err != nil {
			return fmt.Errorf("%s: want a whole number of %d bits", short, bits)
		}
		if bits == 64 {
			h.Long(n)
		} else {
			h.Int(int32(n))
		}
	case as == "java.lang.String":
		if !isText {
			return fmt.Errorf("%s: want text", short)
		}
		h.Text(text)
	case as == "byte[]":
		raw, err := decodeBytes(tok)
		if err != nil {
			return err
		}
		h.Bytes(raw)
	case as == "java.util.Date":
		at, err := time.Parse(time.RFC3339Nano, text)
		if err != nil {
			return fmt.Errorf("%s: want a time, as 2006-01-02T15:04:05Z", short)
		}
		h.Date(at.UnixMilli())
	case strings.HasSuffix(as, "oolean"):
		b, ok := tok.(bool)
		if !ok {
			return fmt.Errorf("%s: want true or false", short)
		}
		h.Bool(b)
	default:
		v, err := strconv.ParseFloat(string(number), 64)
		if !isNumber || err != nil {
			return fmt.Errorf("%s: want a number", short)
		}
		h.Double(v)
	}
	return nil
}

// object writes the fields of a class in its order. What is not said is null, or
// the zero of what cannot be.
func (h *hessianWriter) object(r *reader, class string, members []Member, tok json.Token, depth int) error {
	said := map[string][]byte{}
	outer := h.B
	err := r.object(tok, func(key string, tok json.Token) error {
		i := slices.IndexFunc(members, func(m Member) bool { return m.Name == key })
		if i < 0 {
			return fmt.Errorf("%s has no such field", class)
		}
		// Values are put in order once all are read; raw text is kept until then.
		raw, err := r.raw(tok, depth)
		said[key] = raw
		return err
	})
	if err != nil {
		return err
	}
	h.B = outer
	names := make([]string, len(members))
	for i, m := range members {
		names[i] = m.Name
	}
	h.Define(class, names...)
	for _, m := range members {
		text, there := said[m.Name]
		if !there {
			h.absent(m.Type)
			continue
		}
		inner, err := newReader(text)
		if err != nil {
			return err
		}
		if tok, err = inner.next(); err == nil {
			err = h.value(inner, m.Type, tok, depth+1)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", m.Name, err)
		}
	}
	return nil
}

func (h *hessianWriter) absent(as string) {
	switch as {
	case "int", "short", "byte":
		h.Int(0)
	case "long":
		h.Long(0)
	case "double", "float":
		h.Double(0)
	case "boolean":
		h.Bool(false)
	default:
		h.Null()
	}
}

// array writes a list, whose length stands before it.
func (h *hessianWriter) array(r *reader, name, element string, tok json.Token, depth int) error {
	begin := h.B
	h.B = nil
	n := 0
	err := r.list(tok, func(tok json.Token) error {
		n++
		return h.value(r, element, tok, depth+1)
	})
	inside := h.B
	h.B = begin
	h.List(name, n)
	h.B = append(h.B, inside...)
	h.End()
	return err
}

func (h *hessianWriter) pairs(r *reader, tok json.Token, depth int) error {
	h.Map()
	err := r.object(tok, func(key string, tok json.Token) error {
		h.Text(key)
		return h.value(r, "java.lang.Object", tok, depth+1)
	})
	h.End()
	return err
}

// any writes a value whose type only JSON tells.
func (h *hessianWriter) any(r *reader, tok json.Token, depth int) error {
	switch tok := tok.(type) {
	case json.Delim:
		if tok == '{' {
			return h.pairs(r, tok, depth)
		}
		return h.array(r, "", "java.lang.Object", tok, depth)
	case bool:
		return h.scalar("boolean", tok)
	case string:
		return h.scalar("java.lang.String", tok)
	case json.Number:
		if n, err := strconv.ParseInt(string(tok), 10, 64); err == nil {
			if n == int64(int32(n)) {
				h.Int(int32(n))
			} else {
				h.Long(n)
			}
			return nil
		}
	}
	return h.scalar("double", tok)
}

// raw is the text of a value of which the first token has been read.
func (r *reader) raw(tok json.Token, depth int) (b []byte, err error) {
	if depth > maxDepth {
		return nil, errors.New("nested too deep")
	}
	switch tok := tok.(type) {
	case json.Delim:
		if tok == '{' {
			b = append(b, '{')
			err = r.object(tok, func(key string, tok json.Token) error {
				if len(b) > 1 {
					b = append(b, ',')
				}
				inner, err := r.raw(tok, depth+1)
				b = append(append(appendText(b, key), ':'), inner...)
				return err
			})
			return append(b, '}'), err
		}
		b = append(b, '[')
		err = r.list(tok, func(tok json.Token) error {
			if len(b) > 1 {
				b = append(b, ',')
			}
			inner, err := r.raw(tok, depth+1)
			b = append(b, inner...)
			return err
		})
		return append(b, ']'), err
	case string:
		return appendText(nil, tok), nil
	case json.Number:
		return []byte(tok), nil
	case bool:
		return strconv.AppendBool(nil, tok), nil
	}
	return []byte("null"), nil
}

// value writes a value of Hessian. One inside of itself is null there, or where types
// are wanted an error.
func (w *writer) value(n *hessian.Value, as string) error {
	if len(w.b) > w.limit {
		return ErrTooLarge
	}
	if w.types != nil {
		if err := w.types.takes(n, as); err != nil {
			return err
		}
	}
	if w.depth > maxDepth { // by references, a value may be deeper than its bytes
		return errors.New("nested too deep")
	}
	switch n.Kind {
	case hessian.KindNull:
		w.b = append(w.b, "null"...)
	case hessian.KindBool:
		w.b = strconv.AppendBool(w.b, n.Number != 0)
	case hessian.KindWhole:
		w.b = strconv.AppendInt(w.b, n.Number, 10)
	case hessian.KindReal:
		w.float(n.Real, 64)
	case hessian.KindText:
		w.text(n.Text)
	case hessian.KindBytes:
		w.b = base64.StdEncoding.AppendEncode(append(w.b, '"'), []byte(n.Text))
		w.b = append(w.b, '"')
	case hessian.KindDate:
		w.text(time.UnixMilli(n.Number).UTC().Format("2006-01-02T15:04:05.000Z07:00"))
	default:
		if w.busy[n] && w.types != nil {
			return errors.New("a value inside of itself, which JSON cannot say")
		}
		if w.busy[n] {
			w.b = append(w.b, "null"...)
			return nil
		}
		if w.busy == nil {
			w.busy = map[*hessian.Value]bool{}
		}
		w.busy[n] = true
		w.depth++
		err := w.container(n, as)
		w.depth--
		delete(w.busy, n)
		return err
	}
	return nil
}

func (w *writer) container(n *hessian.Value, as string) error {
	if n.Kind == hessian.KindList {
		w.b = append(w.b, '[')
		element, array := strings.CutSuffix(as, "[]")
		if !array {
			element = object
		}
		for i, v := range n.Parts {
			if i > 0 {
				w.b = append(w.b, ',')
			}
			if err := w.value(v, element); err != nil {
				return fmt.Errorf("[%d]: %w", i, err)
			}
		}
		w.b = append(w.b, ']')
		return nil
	}
	w.b = append(w.b, '{')
	seen := map[string]bool{}
	count := len(n.Parts)
	if n.Kind == hessian.KindMap {
		count /= 2
	}
	for i := range count {
		name, v := "", n.Parts[i]
		if n.Kind == hessian.KindObject {
			name = n.Keys[i]
		} else {
			var err error
			if name, err = key(n.Parts[2*i]); err != nil {
				return err
			}
			v = n.Parts[2*i+1]
		}
		if seen[name] {
			return fmt.Errorf("%.64q: is there twice", name)
		}
		seen[name] = true
		if i > 0 {
			w.b = append(w.b, ',')
		}
		w.text(name)
		w.b = append(w.b, ':')
		if err := w.value(v, w.member(as, name)); err != nil {
			return fmt.Errorf("%.64q: %w", name, err)
		}
	}
	w.b = append(w.b, '}')
	return nil
}

// key is a value as the name of a member.
func key(n *hessian.Value) (string, error) {
	switch n.Kind {
	case hessian.KindText:
		return n.Text, nil
	case hessian.KindWhole:
		return strconv.FormatInt(n.Number, 10), nil
	case hessian.KindBool:
		return strconv.FormatBool(n.Number != 0), nil
	}
	return "", errors.New("a key of a map that is no text and no number")
}
