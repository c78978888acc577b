package envoy

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// TestHeldFieldsExist finds a name in the table that no message has: it would
// hold nothing, and say that it does.
func TestHeldFieldsExist(t *testing.T) {
	for name, row := range held {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for f := range strings.FieldsSeq(strings.ReplaceAll(row, "|", " ")) {
			field := d.(protoreflect.MessageDescriptor).Fields().ByName(protoreflect.Name(f))
			if field == nil {
				t.Errorf("%s has no field %s", name, f)
				continue
			}
			_, read := reads(name, field.Name())
			if m := field.Message(); read && m != nil && !field.IsMap() && !leaf(m) {
				if _, there := held[m.FullName()]; !there {
					t.Errorf("%s.%s is read, and of %s no field is listed", name, f, m.FullName())
				}
			}
		}
	}
}
