// Package transcode writes what one protocol says in the words of another: JSON
// over HTTP as messages of gRPC, by a set of descriptors, and as calls of SOFABolt,
// by a small schema of classes; and calls of both as requests in JSON.
//
// It turns whole messages and moves none: who asks has the bytes and the
// connections. Schemas come from whoever runs the proxy; messages come from
// anywhere, so everything made of them is bounded, and what a schema does not
// hold is refused and not passed over.
package transcode

import (
	"errors"
	"fmt"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"hauberk.dev/internal/protofields"
)

// Bounds of what is read and written.
const (
	maxDepth  = 64       // of values in values
	maxSchema = 16 << 20 // bytes
)

// Kinds of fields, as descriptors number them.
const (
	kindDouble = 1 + iota
	kindFloat
	kindInt64
	kindUint64
	kindInt32
	kindFixed64
	kindFixed32
	kindBool
	kindString
	kindGroup
	kindMessage
	kindBytes
	kindUint32
	kindEnum
	kindSfixed32
	kindSfixed64
	kindSint32
	kindSint64
)

// Schema is a set of services and their messages.
type Schema struct {
	messages map[string]*Message
	enums    map[string]*enum
	methods  map[string]*Method
	rules    []rule
}

// Method is one of a service.
type Method struct {
	// Path of gRPC: /package.Service/Method.
	Path          string
	Input, Output *Message
	// Streams of several messages, from the client or from the server.
	ClientStreams, ServerStreams bool

	rules []*rule // by which it becomes a request, in their order
}

// Message is a type of message.
type Message struct {
	name     string
	fields   []*field
	byNumber map[protowire.Number]*field
	byName   map[string]*field // as declared, and as in JSON
	entry    bool              // of a map
}

type field struct {
	index    int
	name     string
	json     string
	number   protowire.Number
	kind     int
	repeated bool
	packed   bool
	explicit bool // that it is there matters, even if it is zero
	oneof    int  // -1 of none
	message  *Message
	enum     *enum
	typeName string
}

func (f *field) isMap() bool { return f.repeated && f.message != nil && f.message.entry }

type enum struct {
	byName   map[string]int32
	byNumber map[int32]string
}

// Read reads a set of descriptors, as protoc --descriptor_set_out
// --include_imports writes it.
func Read(raw []byte) (*Schema, error) {
	if len(raw) > maxSchema {
		return nil, fmt.Errorf("read descriptors: %d bytes; at most %d", len(raw), maxSchema)
	}
	s := &Schema{messages: map[string]*Message{}, enums: map[string]*enum{}, methods: map[string]*Method{}}
	var services []service
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		if n != 1 || inner == nil {
			return nil
		}
		more, err := s.file(inner)
		services = append(services, more...)
		return err
	})
	if err == nil {
		err = s.link()
	}
	for i := 0; err == nil && i < len(services); i++ {
		err = s.service(&services[i])
	}
	if err == nil && len(s.methods) == 0 {
		err = errors.New("no service in it")
	}
	if err != nil {
		return nil, fmt.Errorf("read descriptors: %w", err)
	}
	s.bind()
	return s, nil
}

// Method is the one with that path, nil if there is none.
func (s *Schema) Method(path string) *Method { return s.methods[path] }

type service struct {
	name string
	raw  []byte
}

// file reads one file: of it, what it defines.
func (s *Schema) file(raw []byte) (services []service, err error) {
	pkg, syntax := "", "proto2"
	err = protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch {
		case n == 2 && inner != nil:
			pkg = "." + string(inner)
		case n == 12 && inner != nil:
			syntax = string(inner)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if syntax != "proto2" && syntax != "proto3" {
		return nil, fmt.Errorf("package %.64q: syntax %.16q: held are proto2 and proto3", pkg, syntax)
	}
	err = protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch {
		case inner == nil:
		case n == 4:
			return s.message(pkg, inner, syntax == "proto3", 0)
		case n == 5:
			return s.enum(pkg, inner)
		case n == 6:
			services = append(services, service{pkg, inner})
		}
		return nil
	})
	return services, err
}

func (s *Schema) message(scope string, raw []byte, proto3 bool, depth int) error {
	if depth > maxDepth {
		return errors.New("messages are nested too deep")
	}
	m := &Message{byNumber: map[protowire.Number]*field{}, byName: map[string]*field{}}
	var inside [][]byte
	var enums [][]byte
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch {
		case inner == nil:
		case n == 1:
			m.name = scope + "." + string(inner)
		case n == 2:
			return m.field(inner, proto3)
		case n == 3:
			inside = append(inside, inner)
		case n == 4:
			enums = append(enums, inner)
		case n == 7: // options
			return protofields.Each(inner, func(n protowire.Number, inner []byte, v uint64) error {
				m.entry = m.entry || n == 7 && inner == nil && v != 0
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.messages[m.name] = m
	for _, raw := range inside {
		if err := s.message(m.name, raw, proto3, depth+1); err != nil {
			return err
		}
	}
	for _, raw := range enums {
		if err := s.enum(m.name, raw); err != nil {
			return err
		}
	}
	return nil
}

func (m *Message) field(raw []byte, proto3 bool) error {
	f := &field{index: len(m.fields), oneof: -1, packed: proto3, explicit: !proto3}
	synthetic := false
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		switch {
		case n == 1:
			f.name = string(inner)
		case n == 3:
			f.number = protowire.Number(v)
		case n == 4:
			f.repeated = v == 3
		case n == 5:
			f.kind = int(v)
		case n == 6:
			f.typeName = string(inner)
		case n == 9:
			f.oneof = int(v)
		case n == 10:
			f.json = string(inner)
		case n == 17:
			synthetic = v != 0
		case n == 8 && inner != nil: // options
			return protofields.Each(inner, func(n protowire.Number, inner []byte, v uint64) error {
				if n == 2 && inner == nil {
					f.packed = v != 0
				}
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return err
	}
	if f.name == "" || !f.number.IsValid() || f.kind < kindDouble || f.kind > kindSint64 {
		return fmt.Errorf("field %.64q: number %d, kind %d: no such field can be", f.name, f.number, f.kind)
	}
	f.explicit = f.explicit || f.oneof >= 0 || f.kind == kindMessage
	if synthetic { // an optional field is alone in its oneof
		f.oneof = -1
	}
	if f.json == "" {
		f.json = camel(f.name)
	}
	f.packed = f.packed && f.repeated && f.kind != kindString && f.kind != kindBytes && f.kind != kindMessage && f.kind != kindGroup
	m.fields = append(m.fields, f)
	m.byNumber[f.number], m.byName[f.name], m.byName[f.json] = f, f, f
	return nil
}

// camel is the name in JSON of a field that does not say it.
func camel(name string) string {
	var b strings.Builder
	up := false
	for _, c := range name {
		switch {
		case c == '_':
			up = true
			continue
		case up && c >= 'a' && c <= 'z':
			c -= 'a' - 'A'
		}
		up = false
		b.WriteRune(c)
	}
	return b.String()
}

func (s *Schema) enum(scope string, raw []byte) error {
	e := &enum{byName: map[string]int32{}, byNumber: map[int32]string{}}
	name := ""
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch {
		case inner == nil:
		case n == 1:
			name = scope + "." + string(inner)
		case n == 2:
			word, number := "", int32(0)
			err := protofields.Each(inner, func(n protowire.Number, inner []byte, v uint64) error {
				switch n {
				case 1:
					word = string(inner)
				case 2:
					number = int32(v)
				}
				return nil
			})
			if err != nil {
				return err
			}
			e.byName[word] = number
			if _, alias := e.byNumber[number]; !alias {
				e.byNumber[number] = word
			}
		}
		return nil
	})
	s.enums[name] = e
	return err
}

// link finds the types that fields name.
func (s *Schema) link() error {
	for _, m := range s.messages {
		for _, f := range m.fields {
			switch f.kind {
			case kindMessage:
				f.message = s.messages[f.typeName]
			case kindEnum:
				f.enum = s.enums[f.typeName]
			default:
				continue
			}
			if f.message == nil && f.enum == nil {
				return fmt.Errorf("%s.%s is of %q, which is not in the set: write it with imports", m.name, f.name, f.typeName)
			}
		}
		if m.entry && (m.byNumber[1] == nil || m.byNumber[2] == nil) {
			return fmt.Errorf("%s is no entry of a map", m.name)
		}
	}
	return nil
}

func (s *Schema) service(of *service) error {
	name := ""
	var methods [][]byte
	err := protofields.Each(of.raw, func(n protowire.Number, inner []byte, _ uint64) error {
		switch {
		case inner == nil:
		case n == 1:
			name = strings.TrimPrefix(of.name+"."+string(inner), ".")
		case n == 2:
			methods = append(methods, inner)
		}
		return nil
	})
	for i := 0; err == nil && i < len(methods); i++ {
		err = s.method(name, methods[i])
	}
	return err
}

func (s *Schema) method(service string, raw []byte) error {
	m := &Method{}
	name, input, output := "", "", ""
	var options []byte
	err := protofields.Each(raw, func(n protowire.Number, inner []byte, v uint64) error {
		switch n {
		case 1:
			name = string(inner)
		case 2:
			input = string(inner)
		case 3:
			output = string(inner)
		case 4:
			options = append(options, inner...)
		case 5:
			m.ClientStreams = v != 0
		case 6:
			m.ServerStreams = v != 0
		}
		return nil
	})
	if err != nil {
		return err
	}
	m.Path = "/" + service + "/" + name
	m.Input, m.Output = s.messages[input], s.messages[output]
	if m.Input == nil || m.Output == nil {
		return fmt.Errorf("%s takes %q and returns %q, of which one is not in the set: write it with imports", m.Path, input, output)
	}
	s.methods[m.Path] = m
	return s.annotated(m, options)
}
