package transcode_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/hessian"
	"hauberk.dev/mesh/transcode"
)

// raw is hex with text in quotes.
func raw(t testing.TB, s string) (b []byte) {
	t.Helper()
	for i, part := range strings.Split(s, `"`) {
		if i%2 == 1 {
			b = append(b, part...)
			continue
		}
		h, err := hex.DecodeString(strings.Join(strings.Fields(part), ""))
		if err != nil {
			t.Fatal(err)
		}
		b = append(b, h...)
	}
	return b
}

// Frames that sofa-bolt-node 2.0.1 has made.
const (
	goldenRequest = `0101000101000000010100000bb8002c0024000000c2 "com.alipay.sofa.rpc.core.request.SofaRequest" 00000007 "service" 00000015 "com.alipay.test.S:1.0"
 4fbc "com.alipay.sofa.rpc.core.request.SofaRequest" 95 0a "methodName" 0d "methodArgSigs" 17 "targetServiceUniqueName"
 0d "targetAppName" 0c "requestProps" 6f90 01 "m" 567400115b "java.lang.String" 6e0110 "java.lang.String" 7a 15 "com.alipay.test.S:1.0" 4e4e 01 "x"`
	goldenHead     = `0100000201000000010100 00 002e 0000 00000064 "com.alipay.sofa.rpc.core.response.SofaResponse"`
	goldenResponse = `4fbe "com.alipay.sofa.rpc.core.response.SofaResponse" 94 07 "isError" 08 "errorMsg" 0b "appResponse" 0d "responseProps" 6f90 46 4e 02 "ok" 4e`
	responseObject = `4fbe "com.alipay.sofa.rpc.core.response.SofaResponse" 94 07 "isError" 08 "errorMsg" 0b "appResponse" 0d "responseProps" 6f90 46 4e `
)

func bank() *transcode.Service {
	return &transcode.Service{Name: "com.alipay.test.S:1.0", Methods: []transcode.Signature{
		{Name: "m", Args: []string{"java.lang.String"}}, {Name: "none"},
		{Name: "pay", Args: []string{"com.x.Order", "long", "java.util.Map", "com.x.Item[]", "byte[]", "java.util.Date", "boolean", "double", "java.lang.Object"}}},
		Classes: map[string][]transcode.Member{
			"com.x.Order": {{Name: "id", Type: "long"}, {Name: "to", Type: "java.lang.String"}, {Name: "items", Type: "com.x.Item[]"}, {Name: "n", Type: "int"}},
			"com.x.Item":  {{Name: "name", Type: "java.lang.String"}, {Name: "price", Type: "double"}}}}
}

func TestBoltGolden(t *testing.T) {
	s := bank()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	got, err := s.AppendRequest(nil, s.Method("m"), 1, 3000, []byte(`["x"]`))
	if want := raw(t, goldenRequest); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%q, %v\nwant\n%q", got, err, want)
	}
	frame := raw(t, goldenHead+goldenResponse)
	x, err := bolt.Size(frame)
	if err != nil || x.Len != len(frame) {
		t.Fatalf("%+v, %v, %d bytes", x, err, len(frame))
	}
	f := bolt.Parse(frame, x)
	if got, err := transcode.AppendResponse([]byte("x"), &f, 100); err != nil || string(got) != `x"ok"` {
		t.Errorf("%s, %v", got, err)
	}
}

// answer is a good frame with this content.
func answer(content []byte) *bolt.Frame {
	return &bolt.Frame{Protocol: 1, Type: bolt.Response, Codec: 1, Class: []byte("com.alipay.sofa.rpc.core.response.SofaResponse"), Content: content}
}

// TestBoltArguments writes arguments of every type, has the reader of the mesh
// skip them, and reads them back as what a server would return.
func TestBoltArguments(t *testing.T) {
	s := bank()
	long := strings.Repeat("ü𝄞", 30000)
	for in, want := range map[string]string{
		`[{"to":"` + long + `","id":"9007199254740993","items":[{"name":"a","price":1.5},{},null]},-9,{"a":[1,5000000000,true,null,1.5,"x"],"b":{}},[],"AQI=","2026-01-02T03:04:05.5Z",true,2,{"k":-100}]`: `[{"id":9007199254740993,"to":"` +
			long + `","items":[{"name":"a","price":1.5},{"name":null,"price":0},null],"n":0},-9,{"a":[1,5000000000,true,null,1.5,"x"],"b":{}},[],"AQI=","2026-01-02T03:04:05.500Z",true,2,{"k":-100}]`,
		`[null,0,null,null,null,null,false,0,null]`: `[null,0,null,null,null,null,false,0,null]`,
	} {
		frame, err := s.AppendRequest(nil, s.Method("pay"), 7, 1000, []byte(in))
		if err != nil {
			t.Errorf("%.80s: %v", in, err)
			continue
		}
		x, err := bolt.Size(frame)
		if err != nil || x.Len != len(frame) {
			t.Fatalf("%+v, %v, %d bytes", x, err, len(frame))
		}
		f := bolt.Parse(frame, x)
		var target bolt.Reader
		if got, err := target.Target(&f); err != nil || string(got.Service) != s.Name || string(got.Method) != "pay" {
			t.Errorf("target is %s %s, %v", got.Service, got.Method, err)
		}
		var r hessian.Reader
		r.Reset(f.Content, hessian.Draft)
		for i := range 10 { // the request and its nine arguments
			if err := r.Skip(); err != nil {
				t.Errorf("value %d: %v", i, err)
			}
		}
		if r.Offset() != len(f.Content) {
			t.Errorf("skipped %d of %d bytes", r.Offset(), len(f.Content))
		}
		// The arguments as a list that is returned; classes keep their numbers.
		at := bytes.Index(f.Content, []byte("1.0NN")) + len("1.0NN")
		back := append(append(append(raw(t, responseObject), 'V'), f.Content[at:]...), "zN"...)
		if got, err := transcode.AppendResponse(nil, answer(back), 1<<20); err != nil || string(got) != want {
			t.Errorf("%.300s, %v\nwant\n%.300s", got, err, want)
		}
	}
	for in, want := range map[string]string{
		`{}`: "want a list", `[]`: "takes 9", `[{},0,{},[],"","2026-01-01T00:00:00Z",true,0,0,1]`: "takes 9 arguments",
		`[{"nope":1}`: "has no such field", `[{"id":1.5}`: "64 bits", `[{"n":"1"}`: "32 bits", `[{"n":null}`: "null: want a whole number", `[{"items":{}}`: "want a list",
		`[{},true`: "64 bits", `[{},1,[]`: "want an object", `[{},1,{"a":` + strings.Repeat("[", 100): "nested too deep",
		`[{"to":` + strings.Repeat("[", 1<<20): "nested too deep", `[{},1,{},[],"*"`: "base64", `[{},1,{},[],"","x"`: "want a time", `[{},1,{},[],"","2026-01-01T00:00:00Z",1`: "true or false",
	} {
		if _, err := s.AppendRequest(nil, s.Method("pay"), 7, 1000, []byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.80s: %v, want %s", in, err, want)
		}
	}
}

// TestBoltAnswers reads values as servers write them.
func TestBoltAnswers(t *testing.T) {
	for content, want := range map[string]string{
		`4d 01 "a" 91 01 "b" 56 6e 02 4a 01 54 7a 7a`:                                  `{"a":1,"b":[null,true]}`,
		`56 56 7a 4a 02 7a`:                                                            `[[],[]]`,
		`4f 93 "x.Y" 91 04 "self" 6f 91 4a 01`:                                         `{"self":null}`,
		`56 7400025b "x" 6c00000001 c8 ff 7a`:                                          `[255]`,
		`56 e0 f7 00 3c 01 00 77 7fffffff 4c 8000000000000000 d4 01 00 49 ffffffff 7a`: `[0,-256,256,2147483647,-9223372036854775808,256,-1]`,
		`56 67 68 69 ff 6a 0100 6b 3fc00000 44 3ff8000000000000 7a`:                    `[0,1,-1,256,1.5,1.5]`,
		`56 73 0001 "a" 01 "b" 22 ff00 64 0000000000000000 7a`:                         `["ab","/wA=","1970-01-01T00:00:00.000Z"]`,
		`02 eda0bd edb18d`:                                                             `"👍"`,
		`01 eda0bd`:                                                                    `"�"`,
		`4d 91 02 "on" 54 01 "t" 7a`:                                                   `{"1":"on","true":"t"}`,
	} {
		got, err := transcode.AppendResponse(nil, answer(append(raw(t, responseObject+content), 'N')), 1<<10)
		if err != nil || string(got) != want {
			t.Errorf("%s: %s, %v, want %s", content, got, err, want)
		}
	}
	deep := "56"
	for i := range 70 { // each list is in the next, by reference
		deep += " 56 " + map[bool]string{true: "", false: "4a " + hex.EncodeToString([]byte{byte(i + 1)})}[i == 0] + " 7a"
	}
	wide := "56"
	for i := range 40 {
		ref := "4a " + hex.EncodeToString([]byte{byte(i + 1)})
		wide += " 56 " + map[bool]string{true: "", false: ref + ref}[i == 0] + " 7a"
	}
	for want, content := range map[string]string{
		"nested too deep": deep + "7a", "too large": wide + "7a", "is there twice": `4d 01 "a" 91 01 "a" 92 7a`, "a key of a map": `4d 56 7a 91 7a`,
		"no value 5 to refer to": `4a 05`, "goes on after": `53 ffff`, "tag 0x51": `51`,
	} {
		if got, err := transcode.AppendResponse(nil, answer(append(raw(t, responseObject+content), 'N')), 1<<14); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %.100s, %v", want, got, err)
		}
	}
	var remote *transcode.RemoteError
	thrown := `4f 9d "java.lang.Err" 92 0d "detailMessage" 0a "stackTrace" 6f91 02 "no" 4e`
	if _, err := transcode.AppendResponse(nil, answer(append(raw(t, responseObject+thrown), 'N')), 99); !errors.As(err, &remote) || remote.Class != "java.lang.Err" || remote.Text != "no" {
		t.Errorf("thrown: %v", err)
	}
	said := strings.Replace(responseObject, "46 4e", "54 03 \"bad\"", 1) + "4e 4e"
	if _, err := transcode.AppendResponse(nil, answer(raw(t, said)), 99); !errors.As(err, &remote) || remote.Text != "bad" {
		t.Errorf("an error: %v", err)
	}
	if _, err := transcode.AppendResponse(nil, &bolt.Frame{Type: bolt.Response, Codec: 1, Status: 7}, 99); !errors.As(err, &remote) || remote.Status != 7 {
		t.Errorf("a status: %v", err)
	}
	if _, err := transcode.AppendResponse(nil, answer(append(raw(t, goldenResponse), 0)), 99); err == nil {
		t.Error("something that follows was passed over")
	}
}

func TestBoltCheck(t *testing.T) {
	for want, s := range map[string]*transcode.Service{
		"no name": {}, "has no methods": {Name: "s"}, "without a name": {Name: "s", Methods: []transcode.Signature{{}}},
		`type "x.Y" is not known`: {Name: "s", Methods: []transcode.Signature{{Name: "m", Args: []string{"x.Y"}}}},
		"is there twice":          {Name: "s", Methods: []transcode.Signature{{Name: "m"}}, Classes: map[string][]transcode.Member{"c": {{Name: "a", Type: "int"}, {Name: "a", Type: "int"}}}},
	} {
		if err := s.Check(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

// FuzzBoltAnswer has any bytes be an answer: what is made of them is JSON, and no
// longer than its bound.
func FuzzBoltAnswer(f *testing.F) {
	f.Add(raw(f, goldenResponse))
	f.Add(append(raw(f, responseObject+`4d 01 "a" 91 01 "b" 56 6e 02 4a 01 54 7a 7a`), 'N'))
	f.Add(append(raw(f, responseObject+`4f 93 "x.Y" 91 04 "self" 6f 91 4a 01`), 'N'))
	f.Fuzz(func(t *testing.T, content []byte) {
		got, err := transcode.AppendResponse(nil, answer(content), 1<<12)
		if err == nil && (!validJSON(got) || len(got) > 1<<13) {
			t.Errorf("%x: %d bytes: %.200s", content, len(got), got)
		}
	})
}

// FuzzBoltRequest has any text be arguments: the mesh reads in the frame what the
// call is for.
func FuzzBoltRequest(f *testing.F) {
	f.Add([]byte(`[{"id":1,"items":[{}]},-9,{"a":[1,null]},[],"AQI=","2026-01-02T03:04:05.5Z",true,2,{"k":-100}]`))
	s := bank()
	f.Fuzz(func(t *testing.T, text []byte) {
		frame, err := s.AppendRequest(nil, s.Method("pay"), 7, 1000, text)
		if err != nil {
			return
		}
		x, err := bolt.Size(frame)
		if err != nil || x.Len != len(frame) {
			t.Fatalf("%+v, %v, %d bytes", x, err, len(frame))
		}
		fr := bolt.Parse(frame, x)
		var r hessian.Reader
		r.Reset(fr.Content, hessian.Draft)
		for range 10 {
			if err := r.Skip(); err != nil {
				t.Fatalf("%s: %v", text, err)
			}
		}
		if r.Offset() != len(fr.Content) {
			t.Errorf("%s: skipped %d of %d bytes", text, r.Offset(), len(fr.Content))
		}
	})
}
