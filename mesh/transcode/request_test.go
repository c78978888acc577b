package transcode_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"hauberk.dev/mesh/transcode"
)

// TestAsk makes requests of calls, and reads them as the other direction does.
func TestAsk(t *testing.T) {
	s, empty := shop(t)
	for _, c := range []struct{ call, message, method, target, body string }{
		{"Echo", `{"i32":1,"byName":{"a":{}}}`, "POST", "/shop.v1.Shop/Echo", `{"i32":1,"byName":{"a":{}}}`},
		{"Echo", `{}`, "POST", "/shop.v1.Shop/Echo", `{}`},
		{"Get", `{"text":"shelves/a b","self":{"i32":-7,"text":"x&y"},"yes":true,"many":[1,2],"color":"RED","at":"2026-01-01T00:00:00Z","boxed":3,"raw":"+/8="}`, "GET",
			"/v1/shelves/a%20b/items/-7:read?yes=true&self.text=x%26y&raw=-_8%3D&color=RED&many=1&many=2&at=2026-01-01T00%3A00%3A00Z&boxed=3", ""},
		{"Get", `{"text":"other","self":{"i32":1},"color":-9}`, "GET", "/v1/all?text=other&self.i32=1&color=-9", ""}, // the first path has another form
		{"Get", `{"self":{}}`, "GET", "/v1/all", ""},
		{"Put", `{"text":"x","self":{"text":"in"},"maybe":0}`, "PUT", "/v1/items/0?text=x&maybe=0", `{"text":"in"}`},
		{"Put", `{"i64":"-5"}`, "PUT", "/v1/items/-5", `{}`},
		{"Book", `{"text":"7:praise?a=b#c%"}`, "", "", "is, or might be, Praise's"},
		{"Book", `{"text":"?a=b&c#d"}`, "GET", "/v1/books/%3Fa%3Db%26c%23d", ""},
		{"Praise", `{"text":"ü𝄞"}`, "GET", "/v1/books/%C3%BC%F0%9D%84%9E:praise", ""},
		{"Move", `{"self":{"text":"t","i32":1},"raw":"//8=","i32":2}`, "PATCH", "/v1/moves/t/__8%3D?i32=2", `{"i32":1}`},
		{"Move", `{"self":{"text":"t","i32":1},"right":{"text":"a/b/c","u32":4},"i32":2}`, "POST", "/v1/t/a/b/c", `{"i32":2,"self":{"i32":1},"right":{"u32":4}}`},
	} {
		m := s.Method("/shop.v1.Shop/" + c.call)
		raw, err := m.Input.AppendWire(nil, []byte(c.message))
		if err != nil {
			t.Fatal(err)
		}
		q, err := s.Ask(m, raw, false, 1<<20)
		if c.method == "" {
			if err == nil {
				t.Errorf("%s %s: %s, %s", c.call, c.message, q.Target, c.body)
			}
			continue
		}
		if err != nil || q.Method != c.method || q.Target != c.target || string(q.Body) != c.body {
			t.Errorf("%s %s: %+v, %v\nwant %s %s %s", c.call, c.message, q, err, c.method, c.target, c.body)
			continue
		}
		askedBack(t, s, empty, m, raw, q)
	}
}

// askedBack wants that a request says what the message says, whoever reads it.
func askedBack(t *testing.T, s *transcode.Schema, empty func() *dynamicpb.Message, m *transcode.Method, raw []byte, q *transcode.Request) {
	t.Helper()
	path, query, _ := strings.Cut(q.Target, "?")
	call, err := s.Find(q.Method, path, query)
	if err != nil || call.Method != m {
		t.Fatalf("%x of %s becomes %s %s, which is %+v, %v", raw, m.Path, q.Method, q.Target, call, err)
	}
	again, err := call.AppendRequest(nil, q.Body)
	if err != nil {
		t.Fatalf("%x of %s becomes %s %s %s: %v", raw, m.Path, q.Method, q.Target, q.Body, err)
	}
	got, want := empty(), empty()
	if err := proto.Unmarshal(again, got); err != nil {
		t.Fatal(err)
	}
	if err := unmarshal(raw, want); err != nil {
		return
	}
	through(t, want)
	through(t, got)
	same(t, q.Method+" "+q.Target+" "+string(q.Body), got, want)
}

// through leaves out what no query says: messages with nothing in them.
func through(t *testing.T, m *dynamicpb.Message) {
	t.Helper()
	text, err := protojson.Marshal(m) // where every number of a null is null
	if err == nil {
		proto.Reset(m)
		err = protojson.Unmarshal(text, m)
	}
	if err != nil {
		t.Fatal(err)
	}
	hollow(m.ProtoReflect())
}

func hollow(m protoreflect.Message) (is bool) {
	is = true
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		plain := f.Message() != nil && !f.IsList() && !f.IsMap() && !strings.HasPrefix(string(f.Message().FullName()), "google.")
		if f.Message() != nil && !f.IsList() && !f.IsMap() && (f.Message().FullName() == "google.protobuf.Empty" || plain && hollow(v.Message())) {
			m.Clear(f)
		} else {
			is = false
		}
		return true
	})
	return is
}

// TestAskRefuses has messages that no request says, or that would be another's.
func TestAskRefuses(t *testing.T) {
	s, _ := shop(t)
	for message, want := range map[string]string{
		`Book {}`: "is empty", `Book {"text":""}`: "is empty", `Book {"text":"a/b"}`: "change which path", `Book {"text":".."}`: "change which path", `Book {"text":"."}`: "change which path",
		`Book {"text":"a\\b"}`: "change which path", `Book {"text":"%2e%2e"}`: "different ways", `Book {"text":"a;b"}`: "different ways", `Book {"text":"a\u0000"}`: "different ways",
		`Book {"text":"best"}`: "a path of /shop.v1.Shop/Best", `Book {"text":"x:praise"}`: "a path of /shop.v1.Shop/Praise",
		`Book {"text":"a","byName":{"a":{}}}`: "byName", `Book {"text":"a","tree":{}}`: "tree", `Book {"text":"a","items":[{}]}`: "items", `Book {"text":"a","any":{}}`: "Any",
		`Book {"text":"a","many":[` + strings.Repeat("1,", 200) + `1]}`:    "over 128 parameters",
		`Book {"text":"` + strings.Repeat("a", 9000) + `"}`:                "over 8192 bytes",
		`Book {"text":"a","left":"` + strings.Repeat("a", 9000) + `"}`:     "too large",
		`Echo {"text":"` + strings.Repeat("a", 5000) + `"}`:                "too large",
		`Move {"self":{"text":"t"},"raw":""}`:                              "is empty",
		`Move {"raw":"AA=="}`:                                              "is not there",
		`Move {"self":{"text":"t"},"right":{"text":"a/../b"},"raw":""}`:    "is empty",
		`Get {"text":"shelves/best","self":{"i32":1},"self":{"tree":{}}}`:  "is there twice",
		`Get {"text":"shelves/..","self":{"i32":1},"many":[1],"mask":"a"}`: "",
	} {
		call, text, _ := strings.Cut(message, " ")
		m := s.Method("/shop.v1.Shop/" + call)
		raw, err := m.Input.AppendWire(nil, []byte(text))
		if err == nil {
			var q *transcode.Request
			if q, err = s.Ask(m, raw, false, 4096); err == nil && want == "" {
				if path, _, _ := strings.Cut(q.Target, "?"); path != "/v1/all" {
					t.Errorf("%s: %s", message, path)
				}
				continue
			}
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want %s", message, err, want)
		}
	}
	m := s.Method("/shop.v1.Shop/Echo")
	for want, raw := range map[string]string{"no such message": "\xff", "field 999 of .shop.v1.All": "\xb8\x3e\x01"} {
		if q, err := s.Ask(m, []byte(raw), false, 4096); err == nil {
			t.Errorf("%q: %+v, want %s", raw, q, want)
		}
	}
	loose, err := s.Method("/shop.v1.Shop/Book").Input.AppendWire(nil, []byte(`{"text":"100%;"}`))
	if err != nil {
		t.Fatal(err)
	}
	if q, err := s.Ask(s.Method("/shop.v1.Shop/Book"), loose, true, 4096); err != nil || q.Target != "/v1/books/100%25%3B" {
		t.Errorf("%+v, %v", q, err)
	}
}

func asked(t testing.TB, s *transcode.Schema, call, text string) *transcode.Request {
	t.Helper()
	m := s.Method("/shop.v1.Shop/" + call)
	raw, err := m.Input.AppendWire(nil, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	q, err := s.Ask(m, raw, false, 4096)
	if err != nil {
		t.Fatal(err)
	}
	return q
}

// TestAnswer reads what servers answer.
func TestAnswer(t *testing.T) {
	s, empty := shop(t)
	best, book, praise := asked(t, s, "Best", `{}`), asked(t, s, "Book", `{"text":"a"}`), asked(t, s, "Praise", `{"text":"a"}`)
	all := asked(t, s, "Get", `{"text":"a"}`) // answers with words
	for _, c := range []struct {
		q          *transcode.Request
		body, want string
	}{
		{book, `{"i32":1}`, `{"i32":1}`}, {praise, `{"i32":1}`, `{"self":{"i32":1}}`}, {all, `["a","b"]`, `{"words":["a","b"]}`}, {praise, `null`, `{}`},
	} {
		raw, err := c.q.AppendAnswer([]byte{}, []byte(c.body))
		got, want := empty(), empty()
		if err := errors.Join(err, proto.Unmarshal(raw, got), protojson.Unmarshal([]byte(c.want), want)); err != nil {
			t.Errorf("%s: %v", c.body, err)
			continue
		}
		same(t, c.body, got, want)
	}
	if raw, err := best.AppendAnswer(nil, []byte(" ")); err != nil || len(raw) > 0 {
		t.Errorf("%x, %v", raw, err)
	}
	for body, q := range map[string]*transcode.Request{
		``: book, `{"nope":1}`: book, `{"i32":"x"}`: book, `[]`: book, `{} {}`: book, `null`: book, `{"a":1}`: best, `{"words":1}`: praise, `{}`: all, `[1]`: all, "\xff": book,
	} {
		if raw, err := q.AppendAnswer(nil, []byte(body)); err == nil {
			t.Errorf("%s: %x", body, raw)
		}
	}
}

// TestCheckRequests finds methods that no message makes a request of.
func TestCheckRequests(t *testing.T) {
	s, _ := shop(t)
	if err := s.CheckRequests(); err != nil {
		t.Error(err)
	}
	for rule, want := range map[string]string{
		`get: "/v1/*/a"`: "without a field", `get: "/v1/**"`: "without a field", `get: "/v1/../a"`: "different ways", `get: "/v1/a%2Fb"`: "different ways", `get: "/v1/a b"`: "no path may have",
		`get: "/v1/a?b=c"`: "no path may have", `custom { kind: "*" path: "/a" }`: "no request", `custom { kind: "A B" path: "/a" }`: "none of HTTP", `custom { kind: "HEAD" path: "/a" }`: "no request",
		`get: "/v1/*" additional_bindings { get: "/v1/{text}" }`: "",
	} {
		set := &descriptorpb.FileDescriptorSet{}
		text := `file { name: "a.proto" package: "a" syntax: "proto3" message_type { name: "M" field { name: "text" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING } }
			service { name: "S" method { name: "M" input_type: ".a.M" output_type: ".a.M" options { [google.api.http] { ` + rule + ` } } } } }`
		if err := prototext.Unmarshal([]byte(text), set); err != nil {
			t.Fatal(err)
		}
		raw, err := proto.Marshal(set)
		if err != nil {
			t.Fatal(err)
		}
		s, err := transcode.Read(raw)
		if err == nil {
			err = s.CheckRequests()
		}
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), "/a.S/M: http: ") || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %s", rule, err, want)
		}
	}
}

var calls = []string{"Echo", "Get", "Put", "Book", "Best", "Praise", "Move"}

// FuzzAsk wants that a request which is made of a message says what it says: to the
// other direction, and nothing where it is refused.
func FuzzAsk(f *testing.F) {
	s, empty := shop(f)
	m := s.Method("/shop.v1.Shop/Echo").Input
	for i, text := range append(good, `{"text":"shelves/a b","self":{"i32":-7},"many":[1]}`, `{"text":"best"}`, `{"self":{"text":"t"},"right":{"text":"a/b"},"raw":"AA=="}`) {
		raw, err := m.AppendWire(nil, []byte(text))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, byte(i), i%2 == 0)
	}
	f.Fuzz(func(t *testing.T, raw []byte, which byte, loose bool) {
		m := s.Method("/shop.v1.Shop/" + calls[int(which)%len(calls)])
		q, err := s.Ask(m, raw, loose, 1<<16)
		if err != nil {
			return
		}
		if len(q.Target) > 8<<10 || len(q.Body) > 1<<16 || q.Body != nil && !json.Valid(q.Body) {
			t.Fatalf("%s %s", q.Target, q.Body)
		}
		askedBack(t, s, empty, m, raw, q)
	})
}

// FuzzPath has any text be the value of a path: the server's own routes read it as
// that, and in no other place.
func FuzzPath(f *testing.F) {
	for _, text := range []string{"a", "..", "a/b", "?x=1", "%2e%2e", "a%2fb", "best", "x:praise", "a b", "ü", "#", "a;b", ":", "+"} {
		f.Add(text, true)
		f.Add(text, false)
	}
	s, _ := shop(f)
	m := s.Method("/shop.v1.Shop/Book")
	var got string
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/books/{text}", func(_ http.ResponseWriter, r *http.Request) { got = "one " + r.PathValue("text") })
	mux.HandleFunc("GET /v1/books/best", func(http.ResponseWriter, *http.Request) { got = "best" })
	mux.HandleFunc("/", func(http.ResponseWriter, *http.Request) { got = "other" })
	f.Fuzz(func(t *testing.T, text string, loose bool) {
		quoted, err := json.Marshal(text)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := m.Input.AppendWire(nil, []byte(`{"i32":1,"text":`+string(quoted)+"}"))
		if err != nil {
			t.Fatal(err)
		}
		q, err := s.Ask(m, raw, loose, 1<<16)
		if err != nil {
			return
		}
		if err := json.Unmarshal(quoted, &text); err != nil { // what is not UTF-8 is not asked
			t.Fatal(err)
		}
		u, err := url.ParseRequestURI(q.Target)
		if err != nil || strings.Count(u.Path, "/") != 3 || u.RawQuery != "i32=1" || u.Fragment != "" {
			t.Fatalf("%q becomes %s: %+v, %v", text, q.Target, u, err)
		}
		got = ""
		mux.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(q.Method, q.Target, nil))
		if got != "one "+text {
			t.Errorf("%q becomes %s, which the server reads as %q", text, q.Target, got)
		}
	})
}

// FuzzAnswer has any text be an answer: what is made of it is the message that
// protobuf's own code reads.
func FuzzAnswer(f *testing.F) {
	for _, text := range good {
		f.Add([]byte(text), byte(0))
	}
	f.Add([]byte(`["a"]`), byte(2))
	f.Add([]byte(`null`), byte(1))
	f.Add([]byte(``), byte(3))
	s, empty := shop(f)
	all := []*transcode.Request{asked(f, s, "Book", `{"text":"a"}`), asked(f, s, "Praise", `{"text":"a"}`), asked(f, s, "Get", `{"text":"a"}`), asked(f, s, "Best", `{}`)}
	f.Fuzz(func(t *testing.T, text []byte, which byte) {
		q := int(which) % len(all)
		raw, err := all[q].AppendAnswer(nil, text)
		if err != nil || q == 3 {
			if q == 3 && len(raw) > 0 {
				t.Fatalf("%q: %x", text, raw)
			}
			return
		}
		whole := [][2]string{{"", ""}, {`{"self":`, "}"}, {`{"words":`, "}"}}[q]
		got, want := empty(), empty()
		if err := proto.Unmarshal(raw, got); err != nil {
			t.Fatal(err)
		}
		if err := protojson.Unmarshal([]byte(whole[0]+string(text)+whole[1]), want); err != nil {
			t.Fatalf("%q is read, and is no message: %v", text, err)
		}
		same(t, string(text), got, want)
	})
}

// TestAskLong has a value that no path or query has room for: it is refused before it
// is taken apart.
func TestAskLong(t *testing.T) {
	s, empty := shop(t)
	for _, call := range []string{"Book", "Move", "Get"} {
		m := empty()
		m.Set(m.Descriptor().Fields().ByName("text"), protoreflect.ValueOfString(strings.Repeat("a\x01", 2<<20)))
		raw, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = s.Ask(s.Method("/shop.v1.Shop/"+call), raw, false, 16<<20)
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; err == nil || n > 1<<20 {
			t.Errorf("%s: %v after %d bytes", call, err, n)
		}
	}
}
