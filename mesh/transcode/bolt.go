package transcode

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/hessian"
)

// Service is one that is called by SOFABolt, with what its methods take.
type Service struct {
	Name    string // as interface:version
	Methods []Signature
	// Classes of Java by name: the fields of each, in the order they are written.
	Classes map[string][]Member
}

// Signature is a method and the types of its arguments, as Java names them.
type Signature struct {
	Name    string
	Args    []string
	Returns string // void, or empty: what JSON tells
}

// Member is a field of a class.
type Member struct{ Name, Type string }

const (
	requestClass  = "com.alipay.sofa.rpc.core.request.SofaRequest"
	responseClass = "com.alipay.sofa.rpc.core.response.SofaResponse"
	boltRequest   = 22 // bytes of a head of version 1, without what has a length

	object = "java.lang.Object" // of any type
	void   = "void"
)

// Check says what is wrong with a service.
func (s *Service) Check() error {
	if s.Name == "" || len(s.Name) > 1<<10 {
		return errors.New("no name of a service")
	}
	if len(s.Methods) == 0 {
		return fmt.Errorf("service %q has no methods", s.Name)
	}
	for _, m := range s.Methods {
		if m.Name == "" {
			return fmt.Errorf("service %q has a method without a name", s.Name)
		}
		for _, t := range m.Args {
			if err := s.checkType(t); err != nil {
				return fmt.Errorf("method %s: %w", m.Name, err)
			}
		}
		if m.Returns != "" && m.Returns != void {
			if err := s.checkType(m.Returns); err != nil {
				return fmt.Errorf("method %s: returns: %w", m.Name, err)
			}
		}
	}
	for name, members := range s.Classes {
		seen := map[string]bool{}
		for _, m := range members {
			if m.Name == "" || seen[m.Name] {
				return fmt.Errorf("class %s: field %q is there twice, or has no name", name, m.Name)
			}
			seen[m.Name] = true
			if err := s.checkType(m.Type); err != nil {
				return fmt.Errorf("class %s: %s: %w", name, m.Name, err)
			}
		}
	}
	return nil
}

// plain types of Java that are one value in JSON.
var plain = strings.Fields(`int java.lang.Integer short java.lang.Short byte java.lang.Byte long java.lang.Long double java.lang.Double
	float java.lang.Float boolean java.lang.Boolean java.lang.String java.util.Date byte[]
	java.lang.Object java.util.Map java.util.List`)

func (s *Service) checkType(t string) error {
	element := strings.TrimSuffix(t, "[]")
	if _, class := s.Classes[element]; class || slices.Contains(plain, t) || slices.Contains(plain, element) {
		return nil
	}
	return fmt.Errorf("type %.128q is not known: declare the class, or use one of %s", t, strings.Join(plain, ", "))
}

// Method is the signature of that name, nil if there is none.
func (s *Service) Method(name string) *Signature {
	for i := range s.Methods {
		if s.Methods[i].Name == name {
			return &s.Methods[i]
		}
	}
	return nil
}

// AppendRequest appends the frame that calls a method with the arguments that text
// in JSON lists.
func (s *Service) AppendRequest(dst []byte, m *Signature, id uint32, millis int32, text []byte) ([]byte, error) {
	content, err := s.content(m, text)
	if err != nil {
		return nil, fmt.Errorf("read the arguments of %s from JSON: %w", m.Name, err)
	}
	header := appendPair(nil, "service", s.Name)
	dst = append(dst, 1, byte(bolt.Request), 0, 1, 1)
	dst = append(binary.BigEndian.AppendUint32(dst, id), 1) // Hessian
	dst = binary.BigEndian.AppendUint32(dst, uint32(millis))
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(requestClass)))
	dst = binary.BigEndian.AppendUint16(dst, uint16(len(header)))
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(content)))
	return append(append(append(dst, requestClass...), header...), content...), nil
}

func appendPair(b []byte, key, value string) []byte {
	b = append(binary.BigEndian.AppendUint32(b, uint32(len(key))), key...)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(value))), value...)
}

// content is the request as SOFARPC writes it, and then the arguments.
func (s *Service) content(m *Signature, text []byte) ([]byte, error) {
	r, err := newReader(text)
	if err != nil {
		return nil, err
	}
	h := &hessianWriter{s: s}
	h.Define(requestClass, "methodName", "methodArgSigs", "targetServiceUniqueName", "targetAppName", "requestProps")
	h.Text(m.Name)
	h.List("[java.lang.String", len(m.Args))
	for _, t := range m.Args {
		h.Text(t)
	}
	h.End()
	h.Text(s.Name)
	h.Null()
	h.Null()
	return r.whole(func(tok json.Token) ([]byte, error) {
		i := 0
		err := r.list(tok, func(tok json.Token) error {
			if i++; i > len(m.Args) {
				return fmt.Errorf("%s takes %d arguments", m.Name, len(m.Args))
			}
			return h.value(r, m.Args[i-1], tok, 0)
		})
		if err == nil && i < len(m.Args) {
			err = fmt.Errorf("%d arguments: %s takes %d", i, m.Name, len(m.Args))
		}
		return h.B, err
	})
}

// RemoteError is what a server of SOFABolt says of a call that failed.
type RemoteError struct {
	Status bolt.Status // of the frame, if that is not good
	Class  string      // of what was thrown
	Text   string
}

func (e *RemoteError) Error() string {
	if e.Class != "" {
		return fmt.Sprintf("the server threw %.128s: %.256q", e.Class, e.Text)
	}
	return fmt.Sprintf("the server answers status %d: %.256q", e.Status, e.Text)
}

// AppendResponse appends what the frame of an answer returns, as JSON, in at most
// limit bytes. What the server says went wrong is a *RemoteError.
func AppendResponse(dst []byte, f *bolt.Frame, limit int) ([]byte, error) {
	if f.Type != bolt.Response || f.Codec != 1 || f.Status == 0 && string(f.Class) != responseClass {
		return nil, fmt.Errorf("read the answer: type %d, codec %d, class %.128q: not one of SOFARPC in Hessian", f.Type, f.Codec, f.Class)
	}
	n, err := hessian.ReadValue(f.Content)
	if f.Status != 0 {
		e := &RemoteError{Status: f.Status}
		if err == nil {
			e.Class, e.Text = n.Class, said(n, "detailMessage")
		}
		return nil, e
	}
	if err == nil && n.Class != responseClass {
		err = errors.New("no SofaResponse")
	}
	if err != nil {
		return nil, fmt.Errorf("read the answer: %w", err)
	}
	if failed := n.Member("isError"); failed != nil && failed.Kind == hessian.KindBool && failed.Number != 0 {
		return nil, &RemoteError{Class: "an error", Text: said(n, "errorMsg")}
	}
	result := n.Member("appResponse")
	if result == nil {
		result = &hessian.Value{}
	}
	if result.Member("detailMessage") != nil && result.Member("stackTrace") != nil {
		return nil, &RemoteError{Class: result.Class, Text: said(result, "detailMessage")}
	}
	w := &writer{b: dst, limit: len(dst) + limit}
	if err := w.value(result, object); err != nil {
		return nil, fmt.Errorf("write the answer as JSON: %w", err)
	}
	return w.b, nil
}

// said is the text of a field of an object.
func said(v *hessian.Value, field string) string {
	if m := v.Member(field); m != nil {
		return m.Text
	}
	return ""
}
