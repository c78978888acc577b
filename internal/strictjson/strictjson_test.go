package strictjson_test

import (
	"encoding/json"
	"strings"
	"testing"

	"hauberk.dev/internal/strictjson"
)

type thing struct {
	Key  string          `json:"key"`
	Free json.RawMessage `json:"free"`
}

func TestDecode(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"good", `{"key":"a","free":{"x":[1,{}]}}`, ""},
		{"unknown", `{"key":"a","other":1}`, "unknown field"},
		{"twice", `{"key":"a","key":"b"}`, `"key" twice`},
		{"twice by case", `{"key":"a","KEY":"b"}`, `"KEY" twice`},
		{"twice by kelvin sign", `{"key":"a","` + "\u212a" + `ey":"b"}`, "twice"},
		{"twice deep", `{"free":{"a":1,"a":2}}`, `"a" twice`},
		{"trailing", `{"key":"a"} {}`, "behind"},
		{"trailing bracket", `{"key":"a"}}`, ""},
		{"not utf-8", "{\"key\":\"\xff\"}", "UTF-8"},
		{"deep", strings.Repeat("[", 40) + strings.Repeat("]", 40), "deeper"},
		{"long", `{"key":"` + strings.Repeat("a", 200) + `"}`, "at most"},
		{"empty", ``, "EOF"},
		{"cut", `{"key":`, "EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var v thing
			err := strictjson.Decode([]byte(c.in), 128, &v)
			switch {
			case c.name == "good":
				if err != nil || v.Key != "a" {
					t.Errorf("got %+v, %v", v, err)
				}
			case err == nil || !strings.Contains(err.Error(), c.want):
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
	var v thing
	if err := strictjson.DecodeLoose([]byte(`{"key":"a","other":1}`), 128, &v); err != nil || v.Key != "a" {
		t.Errorf("loose: %+v, %v", v, err)
	}
	if err := strictjson.DecodeLoose([]byte(`{"key":"a","key":"b"}`), 128, &v); err == nil {
		t.Error("loose accepts a field twice")
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"key":"a","free":[{"b":null}]}`))
	f.Add([]byte(`{"key":"a","key":"b"}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		var v thing
		if strictjson.Decode(raw, 1<<16, &v) == nil && !json.Valid(raw) {
			t.Fatalf("accepted what is not JSON: %q", raw)
		}
	})
}
