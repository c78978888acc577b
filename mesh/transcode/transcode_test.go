package transcode_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"hauberk.dev/mesh/transcode"
)

var good = []string{
	`{}`,
	`{"aDouble":1.5,"aFloat":-2e-3,"i64":"-9223372036854775808","u64":"18446744073709551615","i32":-1,"f64":7,"f32":"8","yes":true,"text":"a\"\u0001é"}`,
	`{"a_double":"NaN","a_float":"-Infinity","i64":1e3,"i32":"12","u32":4294967295,"sf32":-3,"sf64":"-4","s32":-5,"s64":"-6","raw":"AQI=","color":"DARK"}`,
	`{"aDouble":1e300,"aFloat":1e-30,"raw":"-_8","color":1,"colors":["RED","CRIMSON",-2,7],"maybe":0,"many":[1,"2",3.0],"words":["","x"]}`,
	`{"self":{"self":{"text":"deep"}},"items":[{},{"i32":1}],"byName":{"a":{"i32":1},"":{}},"byNumber":{"-1":"x","2":""}}`,
	`{"left":""}`, `{"right":{}}`, `{"left":null,"right":{"yes":false}}`,
	`{"at":"2026-01-02T03:04:05.67+01:00","span":"-1.000000001s","mask":"a.bC,d"}`,
	`{"at":"0001-01-01T00:00:00Z","span":"0s","mask":""}`,
	`{"tree":{"a":[1,"x",null,true,{"b":{}}]},"value":null,"list":[null,[],{}]}`,
	`{"value":{"a":1}}`, `{"value":"x"}`, `{"value":false}`, `{"value":[]}`, `{"value":2}`,
	`{"boxed":"0","boxedBool":false,"nothing":{}}`, `{"boxed":null,"text":null,"words":null,"byName":null,"self":null}`,
}

// same wants that two messages say the same; unknown fields aside.
func same(t *testing.T, what string, a, b proto.Message) {
	t.Helper()
	if !proto.Equal(a, b) {
		t.Errorf("%s:\n%v\nwant\n%v", what, a, b)
	}
}

// TestBesideProtobuf compares with what protobuf's own library makes of the same
// text, and the other way.
func TestBesideProtobuf(t *testing.T) {
	s, empty := shop(t)
	m := s.Method("/shop.v1.Shop/Echo").Input
	for _, text := range good {
		want := empty()
		if err := protojson.Unmarshal([]byte(text), want); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		raw, err := m.AppendWire(nil, []byte(text))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		got := empty()
		if err := proto.Unmarshal(raw, got); err != nil {
			t.Errorf("%s: %v", text, err)
		}
		same(t, text, got, want)
		back(t, m, empty, raw)
		plain, err := protojson.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		if again, err := m.AppendWire(nil, plain); err != nil {
			t.Errorf("%s: %v", plain, err)
		} else {
			got := empty()
			if err := proto.Unmarshal(again, got); err != nil {
				t.Error(err)
			}
			same(t, string(plain), got, want)
		}
	}
}

// back has protobuf's own library read the JSON that is made of a message.
func back(t *testing.T, m *transcode.Message, empty func() *dynamicpb.Message, raw []byte) {
	t.Helper()
	want := empty()
	if unmarshal(raw, want) != nil {
		return
	}
	text, err := m.AppendJSON([]byte("x"), raw, 1<<20)
	if err != nil {
		return
	}
	if !json.Valid(text[1:]) || text[0] != 'x' {
		t.Fatalf("%x is no JSON: %s", raw, text)
	}
	got := empty()
	if err := protojson.Unmarshal(text[1:], got); err != nil {
		t.Fatalf("%x as %s: %v", raw, text[1:], err)
	}
	clear := empty()
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, clear); err != nil {
		t.Fatal(err)
	}
	// Through JSON of its own: there every number of a null is null.
	theirs, err := protojson.Marshal(clear)
	if err != nil {
		t.Fatalf("%x: written as %s, and %v", raw, text[1:], err)
	}
	wanted := empty()
	if err := protojson.Unmarshal(theirs, wanted); err != nil {
		t.Fatal(err)
	}
	same(t, fmt.Sprintf("%x as %s", raw, text[1:]), got, wanted)
}

// unmarshal is proto.Unmarshal, which panics if the key of an entry of a map has
// another wire type than it is declared to have.
func unmarshal(raw []byte, m proto.Message) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	return proto.Unmarshal(raw, m)
}

// TestJSON compares the text that is made.
func TestJSON(t *testing.T) {
	s, _ := shop(t)
	m := s.Method("/shop.v1.Shop/Echo").Input
	for in, want := range map[string]string{
		`{"many":[1],"by_number":{"1":"x"},"at":"2026-01-02T03:04:05.120Z","span":"1.5s","mask":"aB","boxed":7}`: `{"many":["1"],"byNumber":{"1":"x"},` +
			`"at":"2026-01-02T03:04:05.120Z","span":"1.500s","mask":"aB","boxed":"7"}`,
		`{"i32":0,"text":"","maybe":0,"right":{},"colors":[0],"value":null,"nothing":{}}`: `{"maybe":0,"colors":["NONE"],"right":{},"value":null,"nothing":{}}`,
		`{"aDouble":1e21,"aFloat":0.1,"raw":"//8"}`:                                       `{"aDouble":1e+21,"aFloat":0.1,"raw":"//8="}`,
	} {
		raw, err := m.AppendWire(nil, []byte(in))
		if err != nil {
			t.Fatal(err)
		}
		if got, err := m.AppendJSON(nil, raw, 1<<20); err != nil || string(got) != want {
			t.Errorf("%s: %s, %v, want %s", in, got, err, want)
		}
	}
}

// TestRefuses lists what is no message, each with its reason.
func TestRefuses(t *testing.T) {
	s, _ := shop(t)
	m := s.Method("/shop.v1.Shop/Echo").Input
	for text, want := range map[string]string{
		``: "unexpected EOF", `{"i32":1`: "unexpected EOF", `[]`: "a list: want an object", `null`: "null: want an object", `{} {}`: "something follows",
		`{"nope":1}`: "nope: there is no such field", `{"i32":1,"i32":2}`: "is there twice", `{"aDouble":1,"a_double":1}`: "under both of its names",
		`{"i32":2147483648}`: "no whole number of 32 bits", `{"i32":1.5}`: "no whole number", `{"u32":-1}`: "from 0", `{"i64":"0x10"}`: "want a number",
		`{"i64":1e30}`: "no whole number of 64 bits", `{"i64":"-92e-808"}`: "no whole number of 64 bits", `{"i32":1e-9223372036854775808}`: "no whole number", `{"u64":1.5e0}`: "no whole number of 64 bits from 0",
		`{"i64":1e-1}`: "no whole number", `{"u32":-0.5}`: "from 0", `{"i32":1e99999999999}`: "no whole number", `{"i32":true}`: "true: want a number", `{"aFloat":1e40}`: "no number of 32 bits",
		`{"yes":"true"}`: "want true or false", `{"text":1}`: "want text", `{"raw":"*"}`: "base64", `{"color":"BLUE"}`: "no value of its enum",
		`{"left":"a","right":{}}`: "another member of its oneof", `{"words":[null]}`: "[0]: null in a list", `{"byName":{"a":null}}`: "null in a map",
		`{"byNumber":{"1":"a","01":"b"}}`: `"01"`, `{"at":"yesterday"}`: "want a time", `{"at":"10000-01-01T00:00:00Z"}`: "want a time",
		`{"span":"1"}`: "want a duration", `{"span":"1.s"}`: "want a duration", `{"mask":"a_b"}`: "want paths", `{"any":{}}`: "Any is not held",
		"{\"text\":\"\xff\"}": "not UTF-8", `{"self":` + strings.Repeat(`{"self":`, 70) + `{}` + strings.Repeat("}", 71): "nested too deep",
		`{"value":` + strings.Repeat("[", 200) + strings.Repeat("]", 200) + "}": "nested too deep",
	} {
		if got, err := m.AppendWire(nil, []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %x, %v, want %s", text, got, err, want)
		}
	}
	nest := []byte{}
	for range 100 {
		nest = protowire.AppendBytes(protowire.AppendTag(nil, 10, protowire.BytesType), nest)
	}
	for want, raw := range map[string][]byte{
		"no such message": {0x0a}, "field text": {9<<3 | 1, 0, 0, 0, 0, 0, 0, 0, 0}, "text is not UTF-8": {9<<3 | 2, 1, 0xff}, "nested too deep": nest,
		"outside the years": protowire.AppendBytes(protowire.AppendTag(nil, 27, protowire.BytesType), protowire.AppendVarint([]byte{8}, 1<<60)),
		"value of no kind":  {30<<3&0x7f | 0x80 | 2, 1, 0}, "Any is not held": {35<<3&0x7f | 0x80 | 2, 2, 0},
		"over 131072 values": protowire.AppendBytes(protowire.AppendTag(nil, 19, protowire.BytesType), make([]byte, 1<<22)),
		"too large":          protowire.AppendBytes(protowire.AppendTag(nil, 20, protowire.BytesType), bytes.Repeat([]byte("x"), 1<<21)),
	} {
		if got, err := m.AppendJSON(nil, raw, 1<<20); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %.80s, %v", want, got, err)
		}
	}
}

// TestFind binds requests of HTTP to calls.
func TestFind(t *testing.T) {
	s, empty := shop(t)
	for _, c := range []struct{ method, target, body, path, want string }{
		{"POST", "/shop.v1.Shop/Echo", `{"i32":1}`, "Echo", `{"i32":1}`},
		{"POST", "/shop.v1.Shop/Echo", ``, "Echo", `{}`},
		{"GET", "/v1/shelves/a%2Fb/items/7:read?yes=true&many=1&many=2&self.text=x+y&color=RED&at=2026-01-01T00:00:00Z&boxed=3&boxed_bool=true", "", "Get",
			`{"text":"shelves/a/b","self":{"i32":7,"text":"x y"},"yes":true,"many":[1,2],"color":"RED","at":"2026-01-01T00:00:00Z","boxed":3,"boxedBool":true}`},
		{"GET", "/v1/all?color=-2&words=a&words=b", "", "Get", `{"color":-2,"words":["a","b"]}`},
		{"PUT", "/v1/items/-5?u32=6", `{"text":"in"}`, "Put", `{"i64":-5,"u32":6,"self":{"text":"in"}}`},
		{"MERGE", "/v1/files/a/b/c", `{"i32":1}`, "Put", `{"text":"a/b/c","i32":1}`},
	} {
		path, query, _ := strings.Cut(c.target, "?")
		call, err := s.Find(c.method, path, query)
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.target, err)
			continue
		}
		if want := "/shop.v1.Shop/" + c.path; call.Method.Path != want {
			t.Errorf("%s %s: %s, want %s", c.method, c.target, call.Method.Path, want)
		}
		raw, err := call.AppendRequest(nil, []byte(c.body))
		if err != nil {
			t.Errorf("%s %s: %v", c.method, c.target, err)
			continue
		}
		got, want := empty(), empty()
		if err := errors.Join(proto.Unmarshal(raw, got), protojson.Unmarshal([]byte(c.want), want)); err != nil {
			t.Fatal(err)
		}
		same(t, c.target, got, want)
	}
	for target, want := range map[string]string{
		"GET /": "no method", "GET /shop.v1.Shop/Echo": "no method", "GET /v1/shelves/a/items/7": "no method", "GET /v1/shelves//items/7:read": "no method",
		"GET /v1/shelves/a/items/7:read?nope=1": "no such field", "GET /v1/shelves/a/items/7:read?yes=1": "want true or false",
		"GET /v1/shelves/a/items/7:read?text=b": "the path or the body says it", "GET /v1/shelves/a/items/x:read": "path: i32",
		"GET /v1/all?i32=1&i32=2": "is there twice", "GET /v1/all?self=1": "cannot be said", "GET /v1/all?by_name=1": "cannot be said", "GET /v1/all?a=%": "not well encoded", "GET /v1/all?words=%DD": "want text in UTF-8", "GET /v1/shelves/%FF/items/7:read": "path: text",
		"GET /v1/all?" + strings.Repeat("words=1&", 200): "over 128 parameters", "POST /shop.v1.Shop/Echo?i32=1": "beside a body",
	} {
		method, rest, _ := strings.Cut(target, " ")
		path, query, _ := strings.Cut(rest, "?")
		call, err := s.Find(method, path, query)
		if err == nil {
			_, err = call.AppendRequest(nil, nil)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: %v, want %s", target, err, want)
		}
	}
	call, err := s.Find("GET", "/v1/all", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := call.AppendRequest(nil, []byte("{}")); err == nil || !strings.Contains(err.Error(), "a body") {
		t.Error(err)
	}
	raw, err := s.Method("/shop.v1.Shop/Echo").Output.AppendWire(nil, []byte(`{"words":["a"],"i32":1}`))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := call.AppendResponse(nil, raw, 100); err != nil || string(got) != `["a"]` {
		t.Errorf("%s, %v", got, err)
	}
	if !s.Method("/shop.v1.Shop/Watch").ServerStreams {
		t.Error("Watch does not stream")
	}
}

// TestReadRefuses is given sets that are none.
func TestReadRefuses(t *testing.T) {
	raw, _ := descriptors(t)
	for i := range raw {
		if i%97 == 0 {
			transcode.Read(raw[:i]) // does not panic, does not hang
		}
	}
	if _, err := transcode.Read(nil); err == nil || !strings.Contains(err.Error(), "no service") {
		t.Error(err)
	}
	if _, err := transcode.Read(make([]byte, 17<<20)); err == nil {
		t.Error("17 MiB were read")
	}
}

// TestMergeIsLinear has a field that comes in very many pieces.
func TestMergeIsLinear(t *testing.T) {
	s, _ := shop(t)
	m := s.Method("/shop.v1.Shop/Echo").Input
	piece := protowire.AppendBytes(protowire.AppendTag(nil, 10, protowire.BytesType), []byte{5 << 3, 1})
	text, err := m.AppendJSON(nil, bytes.Repeat(piece, 1<<20), 1<<20)
	if err != nil || string(text) != `{"self":{"i32":1}}` {
		t.Errorf("%.80s, %v", text, err)
	}
}

// FuzzJSON wants that what is read of a text is what protobuf's own library reads.
func FuzzJSON(f *testing.F) {
	for _, text := range good {
		f.Add([]byte(text))
	}
	f.Add([]byte(`{"i32":1e-9223372036854775808}`))
	f.Add([]byte(`{"u64":"1e9223372036854775807"}`))
	s, empty := shop(f)
	m := s.Method("/shop.v1.Shop/Echo").Input
	f.Fuzz(func(t *testing.T, text []byte) {
		raw, err := m.AppendWire(nil, text)
		if err != nil {
			return
		}
		want, got := empty(), empty()
		if err := protojson.Unmarshal(text, want); err != nil {
			t.Fatalf("%s is read, and is no message: %v", text, err)
		}
		if err := proto.Unmarshal(raw, got); err != nil {
			t.Fatal(err)
		}
		same(t, fmt.Sprintf("%q", text), got, want)
		back(t, m, empty, raw)
	})
}

// FuzzWire wants that the text that is made of bytes says what they say.
func FuzzWire(f *testing.F) {
	s, empty := shop(f)
	m := s.Method("/shop.v1.Shop/Echo").Input
	for _, text := range good {
		raw, err := m.AppendWire(nil, []byte(text))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) { back(t, m, empty, raw) })
}

// FuzzFind has rules meet any request.
func FuzzFind(f *testing.F) {
	f.Add("GET", "/v1/shelves/a%2Fb/items/7:read", "yes=true&many=1", "")
	f.Add("MERGE", "/v1/files/a/b", "", "{}")
	f.Add("GET", "/v1/shelves/a%DDD/items/7:read", "yes=true&many=1", "") // not UTF-8
	s, empty := shop(f)
	f.Fuzz(func(t *testing.T, method, path, query, body string) {
		call, err := s.Find(method, path, query)
		if err != nil {
			return
		}
		raw, err := call.AppendRequest(nil, []byte(body))
		if err == nil {
			if err := proto.Unmarshal(raw, empty()); err != nil {
				t.Errorf("%s %s?%s %s: %v", method, path, query, body, err)
			}
		}
	})
}

func validJSON(b []byte) bool { return json.Valid(b) }
