package transcode_test

import (
	"testing"

	"google.golang.org/genproto/googleapis/api/annotations"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	_ "google.golang.org/protobuf/types/known/anypb"
	_ "google.golang.org/protobuf/types/known/durationpb"
	_ "google.golang.org/protobuf/types/known/emptypb"
	_ "google.golang.org/protobuf/types/known/fieldmaskpb"
	_ "google.golang.org/protobuf/types/known/structpb"
	_ "google.golang.org/protobuf/types/known/timestamppb"
	_ "google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/mesh/transcode"
)

// file is what protoc would make of a file of services, in protobuf's text.
const file = `
name: "shop.proto" package: "shop.v1" syntax: "proto3"
dependency: "google/protobuf/timestamp.proto" dependency: "google/protobuf/duration.proto" dependency: "google/protobuf/struct.proto"
dependency: "google/protobuf/wrappers.proto" dependency: "google/protobuf/field_mask.proto" dependency: "google/protobuf/any.proto"
dependency: "google/api/annotations.proto" dependency: "google/protobuf/empty.proto"
enum_type { name: "Color" value { name: "NONE" number: 0 } value { name: "RED" number: 1 } value { name: "CRIMSON" number: 1 } value { name: "DARK" number: -2 }
  options { allow_alias: true } }
message_type { name: "All"
  field { name: "a_double" number: 1 label: LABEL_OPTIONAL type: TYPE_DOUBLE json_name: "aDouble" }
  field { name: "a_float" number: 2 label: LABEL_OPTIONAL type: TYPE_FLOAT json_name: "aFloat" }
  field { name: "i64" number: 3 label: LABEL_OPTIONAL type: TYPE_INT64 json_name: "i64" }
  field { name: "u64" number: 4 label: LABEL_OPTIONAL type: TYPE_UINT64 json_name: "u64" }
  field { name: "i32" number: 5 label: LABEL_OPTIONAL type: TYPE_INT32 json_name: "i32" }
  field { name: "f64" number: 6 label: LABEL_OPTIONAL type: TYPE_FIXED64 json_name: "f64" }
  field { name: "f32" number: 7 label: LABEL_OPTIONAL type: TYPE_FIXED32 json_name: "f32" }
  field { name: "yes" number: 8 label: LABEL_OPTIONAL type: TYPE_BOOL json_name: "yes" }
  field { name: "text" number: 9 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "text" }
  field { name: "self" number: 10 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".shop.v1.All" json_name: "self" }
  field { name: "raw" number: 11 label: LABEL_OPTIONAL type: TYPE_BYTES json_name: "raw" }
  field { name: "u32" number: 12 label: LABEL_OPTIONAL type: TYPE_UINT32 json_name: "u32" }
  field { name: "color" number: 13 label: LABEL_OPTIONAL type: TYPE_ENUM type_name: ".shop.v1.Color" json_name: "color" }
  field { name: "sf32" number: 14 label: LABEL_OPTIONAL type: TYPE_SFIXED32 json_name: "sf32" }
  field { name: "sf64" number: 15 label: LABEL_OPTIONAL type: TYPE_SFIXED64 json_name: "sf64" }
  field { name: "s32" number: 16 label: LABEL_OPTIONAL type: TYPE_SINT32 json_name: "s32" }
  field { name: "s64" number: 17 label: LABEL_OPTIONAL type: TYPE_SINT64 json_name: "s64" }
  field { name: "maybe" number: 18 label: LABEL_OPTIONAL type: TYPE_INT32 json_name: "maybe" oneof_index: 1 proto3_optional: true }
  field { name: "many" number: 19 label: LABEL_REPEATED type: TYPE_INT64 json_name: "many" }
  field { name: "words" number: 20 label: LABEL_REPEATED type: TYPE_STRING json_name: "words" }
  field { name: "colors" number: 21 label: LABEL_REPEATED type: TYPE_ENUM type_name: ".shop.v1.Color" json_name: "colors" }
  field { name: "items" number: 22 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".shop.v1.All" json_name: "items" }
  field { name: "by_name" number: 23 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".shop.v1.All.ByNameEntry" json_name: "byName" }
  field { name: "by_number" number: 24 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".shop.v1.All.ByNumberEntry" json_name: "byNumber" }
  field { name: "left" number: 25 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "left" oneof_index: 0 }
  field { name: "right" number: 26 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".shop.v1.All" json_name: "right" oneof_index: 0 }
  field { name: "at" number: 27 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Timestamp" json_name: "at" }
  field { name: "span" number: 28 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Duration" json_name: "span" }
  field { name: "tree" number: 29 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Struct" json_name: "tree" }
  field { name: "value" number: 30 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Value" json_name: "value" }
  field { name: "list" number: 31 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.ListValue" json_name: "list" }
  field { name: "mask" number: 32 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.FieldMask" json_name: "mask" }
  field { name: "boxed" number: 33 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Int64Value" json_name: "boxed" }
  field { name: "boxed_bool" number: 34 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.BoolValue" json_name: "boxedBool" }
  field { name: "any" number: 35 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Any" json_name: "any" }
  field { name: "nothing" number: 36 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".google.protobuf.Empty" json_name: "nothing" }
  oneof_decl { name: "side" } oneof_decl { name: "_maybe" }
  nested_type { name: "ByNameEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "key" }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".shop.v1.All" json_name: "value" } }
  nested_type { name: "ByNumberEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_INT32 json_name: "key" }
    field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "value" } }
}
service { name: "Shop"
  method { name: "Echo" input_type: ".shop.v1.All" output_type: ".shop.v1.All" }
  method { name: "Get" input_type: ".shop.v1.All" output_type: ".shop.v1.All"
    options { [google.api.http] { get: "/v1/{text=shelves/*}/items/{self.i32}:read" additional_bindings { get: "/v1/all" response_body: "words" } } } }
  method { name: "Put" input_type: ".shop.v1.All" output_type: ".shop.v1.All"
    options { [google.api.http] { put: "/v1/items/{i64}" body: "self" additional_bindings { custom { kind: "MERGE" path: "/v1/files/{text=**}" } body: "*" } } } }
  method { name: "Best" input_type: ".shop.v1.All" output_type: ".google.protobuf.Empty" options { [google.api.http] { get: "/v1/books/best" } } }
  method { name: "Praise" input_type: ".shop.v1.All" output_type: ".shop.v1.All"
    options { [google.api.http] { get: "/v1/books/{text}:praise" response_body: "self" } } }
  method { name: "Book" input_type: ".shop.v1.All" output_type: ".shop.v1.All" options { [google.api.http] { get: "/v1/books/{text}" } } }
  method { name: "Move" input_type: ".shop.v1.All" output_type: ".shop.v1.All"
    options { [google.api.http] { patch: "/v1/moves/{self.text}/{raw}" body: "self" additional_bindings { post: "/v1/{self.text}/{right.text=a/**}" body: "*" } } } }
  method { name: "Watch" input_type: ".shop.v1.All" output_type: ".shop.v1.All" server_streaming: true }
}
`

// descriptors is the file and all it imports, as protoc writes it, and the type of
// its message.
func descriptors(t testing.TB) ([]byte, protoreflect.MessageDescriptor) {
	t.Helper()
	fd := &descriptorpb.FileDescriptorProto{}
	if err := prototext.Unmarshal([]byte(file), fd); err != nil {
		t.Fatal(err)
	}
	_ = annotations.E_Http
	f, err := protodesc.NewFile(fd, protoregistry.GlobalFiles)
	if err != nil {
		t.Fatal(err)
	}
	set := &descriptorpb.FileDescriptorSet{}
	seen := map[string]bool{}
	var add func(f protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) {
		if seen[f.Path()] {
			return
		}
		seen[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	add(f)
	raw, err := proto.Marshal(set)
	if err != nil {
		t.Fatal(err)
	}
	return raw, f.Messages().ByName("All")
}

// shop is the schema, and protobuf's own view of its message.
func shop(t testing.TB) (*transcode.Schema, func() *dynamicpb.Message) {
	t.Helper()
	raw, all := descriptors(t)
	s, err := transcode.Read(raw)
	if err != nil {
		t.Fatal(err)
	}
	return s, func() *dynamicpb.Message { return dynamicpb.NewMessage(all) }
}
