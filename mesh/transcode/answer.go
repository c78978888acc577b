package transcode

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"hauberk.dev/mesh/hessian"
)

// A call of SOFABolt becomes a request in JSON, and the answer in JSON that of the
// call: what AppendRequest and AppendResponse do, the other way round.

// ResponseClass is the class of a frame whose content AppendReply writes.
const ResponseClass = responseClass

// AppendCall appends the arguments of the call that is the content of a frame, as a
// list in JSON of at most limit bytes, and says which method it is for. What its types
// do not have is an error: a server of JSON cannot tell it from what they have.
func (s *Service) AppendCall(dst, content []byte, limit int) (m *Signature, out []byte, err error) {
	all, err := hessian.ReadValues(content)
	if err == nil && (len(all) == 0 || all[0].Class != requestClass) {
		err = errors.New("no SofaRequest")
	}
	if err == nil {
		m, err = s.called(all[0])
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the call: %w", err)
	}
	arguments := all[1:]
	if len(arguments) != len(m.Args) {
		return nil, nil, fmt.Errorf("read the call: %d arguments: %s takes %d", len(arguments), m.Name, len(m.Args))
	}
	w := &writer{b: append(dst, '['), limit: len(dst) + limit, types: s}
	for i, v := range arguments {
		if i > 0 {
			w.b = append(w.b, ',')
		}
		if err := w.value(v, m.Args[i]); err != nil {
			return nil, nil, fmt.Errorf("write argument %d of %s as JSON: %w", i, m.Name, err)
		}
	}
	if w.b = append(w.b, ']'); len(w.b) > w.limit {
		return nil, nil, fmt.Errorf("write the arguments of %s as JSON: %w", m.Name, ErrTooLarge)
	}
	return m, w.b, nil
}

// called is the method that a SofaRequest is for: of those of one name, the one that
// takes the same types.
func (s *Service) called(request *hessian.Value) (*Signature, error) {
	name := said(request, "methodName")
	if target := said(request, "targetServiceUniqueName"); target != s.Name {
		return nil, fmt.Errorf("service %.128q, where %.128q is served", target, s.Name)
	}
	var types []string
	if list := request.Member("methodArgSigs"); list != nil {
		for _, v := range list.Parts {
			types = append(types, canonical(v.Text))
		}
	}
	for i := range s.Methods {
		if m := &s.Methods[i]; m.Name == name && slices.Equal(m.Args, types) {
			return m, nil
		}
	}
	return nil, fmt.Errorf("no method %.64q that takes (%.256s)", name, strings.Join(types, ", "))
}

// canonical is the name of a type as it is declared: of arrays Java has another.
func canonical(name string) string {
	element, array := strings.CutPrefix(name, "[")
	if !array {
		return name
	}
	if class, ok := strings.CutPrefix(element, "L"); ok && strings.HasSuffix(class, ";") {
		return class[:len(class)-1] + "[]"
	}
	for word, code := range map[string]string{"int": "I", "long": "J", "short": "S", "byte": "B", "double": "D", "float": "F", "boolean": "Z"} {
		if element == code {
			return word + "[]"
		}
	}
	return name
}

// takes says why a value is not of a type. What is in it is looked at when it is
// written.
func (s *Service) takes(n *hessian.Value, as string) error {
	members, class := s.Classes[as]
	ok := false
	switch bits := bitsOf(as); {
	case as == object:
		ok = true
	case n.Kind == hessian.KindNull:
		ok = !primitive(as)
	case class:
		if ok = n.Kind == hessian.KindObject && n.Class == as; ok {
			for _, key := range n.Keys {
				if !slices.ContainsFunc(members, func(m Member) bool { return m.Name == key }) {
					return fmt.Errorf("%.64q: %s has no such field", key, as)
				}
			}
		}
	case bits > 0:
		ok = n.Kind == hessian.KindWhole && n.Number>>(bits-1) == n.Number>>63
	case as == "java.lang.String":
		ok = n.Kind == hessian.KindText
	case as == "byte[]":
		ok = n.Kind == hessian.KindBytes
	case as == "java.util.Date":
		ok = n.Kind == hessian.KindDate
	case as == "java.util.Map":
		ok = n.Kind == hessian.KindMap
	case as == "java.util.List", strings.HasSuffix(as, "[]"):
		ok = n.Kind == hessian.KindList
	case strings.HasSuffix(as, "oolean"):
		ok = n.Kind == hessian.KindBool
	default: // writers of JavaScript have no other number
		ok = n.Kind == hessian.KindReal || n.Kind == hessian.KindWhole
	}
	if !ok {
		return fmt.Errorf("want %s", as)
	}
	return nil
}

// member is the type of what is in a value of a type.
func (w *writer) member(as, name string) string {
	if w.types != nil {
		for _, m := range w.types.Classes[as] {
			if m.Name == name {
				return m.Type
			}
		}
	}
	return object
}

// AppendReply appends the content of the answer to a call of m: what text in JSON
// says is returned. A method that returns nothing has no text, or null.
func (s *Service) AppendReply(dst []byte, m *Signature, text []byte) ([]byte, error) {
	h := &hessianWriter{s: s}
	h.B = dst
	h.Define(responseClass, "isError", "errorMsg", "appResponse", "responseProps")
	h.Bool(false)
	h.Null()
	err := h.returned(m, text)
	h.Null()
	if err != nil {
		return nil, fmt.Errorf("read what %s returns from JSON: %w", m.Name, err)
	}
	return h.B, nil
}

func (h *hessianWriter) returned(m *Signature, text []byte) error {
	as := m.Returns
	if as == "" {
		as = object
	}
	switch empty := len(bytes.TrimSpace(text)) == 0; {
	case empty && as == void:
		h.Null()
		return nil
	case empty:
		return fmt.Errorf("no body, where %s is wanted", as)
	}
	r, err := newReader(text)
	if err != nil {
		return err
	}
	_, err = r.whole(func(tok json.Token) ([]byte, error) {
		if as != void {
			return nil, h.value(r, as, tok, 0)
		}
		if tok != nil {
			return nil, fmt.Errorf("%s: want null, as it returns nothing", shown(tok))
		}
		h.Null()
		return nil, nil
	})
	return err
}
