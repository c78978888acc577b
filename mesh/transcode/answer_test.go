package transcode_test

import (
	"bytes"
	"strings"
	"testing"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/transcode"
)

// TestBoltGoldenAnswer writes the frame that sofa-bolt-node has written, and reads its
// call.
func TestBoltGoldenAnswer(t *testing.T) {
	s := bank()
	frame := raw(t, goldenRequest)
	x, err := bolt.Size(frame)
	if err != nil {
		t.Fatal(err)
	}
	f := bolt.Parse(frame, x)
	m, text, err := s.AppendCall([]byte("x"), f.Content, 100)
	if err != nil || m.Name != "m" || string(text) != `x["x"]` {
		t.Fatalf("%+v %s, %v", m, text, err)
	}
	content, err := s.AppendReply(nil, m, []byte(`"ok"`))
	if err != nil {
		t.Fatal(err)
	}
	got, err := bolt.AppendReply(nil, &f, transcode.ResponseClass, nil, content)
	if want := raw(t, goldenHead+goldenResponse); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%x, %v\nwant\n%x", got, err, want)
	}
}

// TestBoltCall reads the arguments that the other direction has written.
func TestBoltCall(t *testing.T) {
	s := bank()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	const arguments = `[{"id":9007199254740993,"to":"ü𝄞","items":[{"name":"a","price":1.5},{"name":null,"price":0},null],"n":-3},-9,{"a":[1,5000000000,true,null,1.5,"x"],"b":{}},[],"AQI=","2026-01-02T03:04:05.500Z",true,2,{"k":-100}]`
	frame, err := s.AppendRequest(nil, s.Method("pay"), 1, 1, []byte(arguments))
	if err != nil {
		t.Fatal(err)
	}
	x, err := bolt.Size(frame)
	if err != nil {
		t.Fatal(err)
	}
	content := bolt.Parse(frame, x).Content
	if m, text, err := s.AppendCall(nil, content, 1<<10); err != nil || m.Name != "pay" || string(text) != arguments {
		t.Errorf("%s, %v", text, err)
	}
	if _, text, err := s.AppendCall(nil, content, 100); err == nil || !strings.Contains(err.Error(), "too large") {
		t.Errorf("%s, %v", text, err)
	}
}

// call is the content of a call of m of the bank's, or of another method.
func call(t *testing.T, method, types, arguments string) []byte {
	t.Helper()
	list := ""
	count := 0
	for name := range strings.FieldsSeq(types) {
		list += string(rune(len(name))) + name
		count++
	}
	return append([]byte("O\xbc"+"com.alipay.sofa.rpc.core.request.SofaRequest\x93\x0amethodName\x0dmethodArgSigs\x17targetServiceUniqueNameo\x90"+
		string(rune(len(method)))+method+"Vn"+string(rune(count))+list+"z\x15com.alipay.test.S:1.0"), raw(t, arguments)...)
}

// TestBoltCallRefuses has calls of what is not declared, with what is of another type.
func TestBoltCallRefuses(t *testing.T) {
	s := bank()
	for _, as := range []string{"int", "long", "java.lang.Byte", "double", "boolean", "java.util.Date", "byte[]", "java.util.List", "java.util.Map", "com.x.Item", "com.x.Item[]", "int[]", "java.lang.Object"} {
		s.Methods = append(s.Methods, transcode.Signature{Name: "of", Args: []string{as}})
	}
	item := `4f 9a "com.x.Item" 92 04 "name" 05 "price" 6f 91`
	for _, c := range []struct{ method, types, arguments, want string }{
		{"m", "java.lang.String", `01 "x"`, `["x"]`}, {"m", "java.lang.String", `4e`, `[null]`}, {"none", "", ``, `[]`},
		{"m", "", `01 "x"`, "! no method"}, {"other", "", ``, "! no method"}, {"m", "java.lang.String", ``, "! takes 1"}, {"m", "java.lang.String", `4e 4e`, "! takes 1"},
		{"m", "java.lang.String", `91`, "! want java.lang.String"}, {"m", "java.lang.String", `51`, "! tag 0x51"}, {"m", "java.lang.String", `02 "x"`, "! goes on after"},
		{"of", "int", `49 7fffffff`, `[2147483647]`}, {"of", "int", `4c 0000000080000000`, "! want int"}, {"of", "int", `4e`, "! want int"}, {"of", "int", `67`, "! want int"},
		{"of", "long", `4c 8000000000000000`, `[-9223372036854775808]`}, {"of", "java.lang.Byte", `4e`, `[null]`}, {"of", "java.lang.Byte", `c880`, "! want java.lang.Byte"},
		{"of", "double", `91`, `[1]`}, {"of", "double", `44 3ff8000000000000`, `[1.5]`}, {"of", "double", `01 "1"`, "! want double"}, {"of", "boolean", `54`, `[true]`}, {"of", "boolean", `91`, "! want boolean"},
		{"of", "java.util.Date", `64 0000000000000000`, `["1970-01-01T00:00:00.000Z"]`}, {"of", "java.util.Date", `91`, "! want java.util.Date"}, {"of", "[B", `22 ff00`, `["/wA="]`}, {"of", "byte[]", `56 7a`, "! want byte[]"},
		{"of", "java.util.List", `56 91 4d 7a 7a`, `[[1,{}]]`}, {"of", "java.util.Map", `56 7a`, "! want java.util.Map"}, {"of", "java.util.Map", `4d 01 "a" 91 01 "a" 92 7a`, "! is there twice"},
		{"of", "[I", `56 91 7a`, `[[1]]`}, {"of", "int[]", `56 67 7a`, "! [0]: want int"}, {"of", "java.lang.Object", `4d 7a`, `[{}]`},
		{"of", "com.x.Item", item + ` 01 "a" 67`, `[{"name":"a","price":0}]`}, {"of", "com.x.Item", item + ` 91 67`, `! "name": want java.lang.String`}, {"of", "com.x.Item", item + ` 4e 4e`, `! "price": want double`},
		{"of", "com.x.Item", `4f 9a "com.x.Item" 91 04 "nope" 6f 91 4e`, "! no such field"}, {"of", "com.x.Item", `4f 95 "x.Sub" 91 04 "name" 6f 91 4e`, "! want com.x.Item"}, {"of", "com.x.Item", `4d 7a`, "! want com.x.Item"},
		{"of", "[Lcom.x.Item;", `56 ` + item + ` 4e 67 4e 7a`, `[[{"name":null,"price":0},null]]`}, {"of", "com.x.Item[]", `56 91 7a`, "! [0]: want com.x.Item"},
		{"of", "java.lang.Object", `56 4a 02 7a`, "! inside of itself"},
	} {
		m, text, err := s.AppendCall(nil, call(t, c.method, c.types, c.arguments), 1<<10)
		if want, fails := strings.CutPrefix(c.want, "! "); fails && (err == nil || !strings.Contains(err.Error(), want)) || !fails && (err != nil || string(text) != c.want) {
			t.Errorf("%s(%s) %s: %+v %s, %v; want %s", c.method, c.types, c.arguments, m, text, err, c.want)
		}
	}
	s.Name = "com.alipay.test.S:2.0"
	if _, _, err := s.AppendCall(nil, call(t, "none", "", ""), 1<<10); err == nil || !strings.Contains(err.Error(), `"com.alipay.test.S:2.0" is served`) {
		t.Error(err)
	}
	for _, content := range []string{"", "N", "\x91", "C\x03abc\x90o\x90"} {
		if _, _, err := s.AppendCall(nil, []byte(content), 1<<10); err == nil {
			t.Errorf("%q is a call", content)
		}
	}
}

// returns are methods of the bank's by what they return.
func returns() *transcode.Service {
	s := bank()
	s.Methods = nil
	for _, as := range []string{"", "void", "int", "long", "java.lang.String", "com.x.Order", "com.x.Item[]", "java.util.Map", "byte[]", "java.util.Date", "boolean", "java.lang.Double"} {
		s.Methods = append(s.Methods, transcode.Signature{Name: "m" + as, Returns: as})
	}
	return s
}

// TestBoltReply writes what servers of JSON return.
func TestBoltReply(t *testing.T) {
	s := returns()
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ returns, text, want string }{
		{"", `{"a":[1,null,"x",5000000000,1.5,true]}`, `{"a":[1,null,"x",5000000000,1.5,true]}`}, {"", `null`, `null`}, {"", ``, "! no body"}, {"", `{} {}`, "! follows"}, {"", "\"\xff\"", "! UTF-8"},
		{"void", ``, `null`}, {"void", ` null `, `null`}, {"void", `{}`, "! returns nothing"}, {"int", `1`, `1`}, {"int", `null`, "! null"}, {"int", `2147483648`, "! 32 bits"}, {"int", ` `, "! no body"},
		{"long", `"9007199254740993"`, `9007199254740993`}, {"java.lang.String", `1`, "! want text"}, {"java.lang.String", `null`, `null`},
		{"com.x.Order", `{"items":[{"price":1}],"id":7}`, `{"id":7,"to":null,"items":[{"name":null,"price":1}],"n":0}`}, {"com.x.Order", `{"nope":1}`, "! no such field"}, {"com.x.Order", `[]`, "! want an object"},
		{"com.x.Item[]", `[{},null]`, `[{"name":null,"price":0},null]`}, {"byte[]", `"AQI="`, `"AQI="`}, {"byte[]", `"*"`, "! base64"}, {"boolean", `true`, `true`}, {"java.lang.Double", `1e400`, "! want a number"},
		{"java.util.Map", strings.Repeat(`{"a":`, 80) + "1" + strings.Repeat("}", 80), "! nested too deep"},
	} {
		content, err := s.AppendReply([]byte{}, s.Method("m"+c.returns), []byte(c.text))
		var got []byte
		if err == nil {
			got, err = transcode.AppendResponse(nil, answer(content), 1<<10)
		}
		if want, fails := strings.CutPrefix(c.want, "! "); fails && (err == nil || !strings.Contains(err.Error(), want)) || !fails && (err != nil || string(got) != c.want) {
			t.Errorf("%s %s: %s, %v; want %s", c.returns, c.text, got, err, c.want)
		}
	}
	s.Methods[0].Returns = "x.Y"
	if err := s.Check(); err == nil || !strings.Contains(err.Error(), `returns: type "x.Y" is not known`) {
		t.Error(err)
	}
}

// FuzzBoltCall has any bytes be a call: what is made of them is arguments, which the
// other direction takes for the same method and makes the same of.
func FuzzBoltCall(f *testing.F) {
	s := bank()
	for _, text := range []string{`[{"id":1,"items":[{}]},-9,{"a":[1,null]},[],"AQI=","2026-01-02T03:04:05.5Z",true,2,{"k":-100}]`, `["x"]`, `[]`} {
		for _, name := range []string{"pay", "m", "none"} {
			if frame, err := s.AppendRequest(nil, s.Method(name), 1, 1, []byte(text)); err == nil {
				x, _ := bolt.Size(frame)
				f.Add(bolt.Parse(frame, x).Content)
			}
		}
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		m, text, err := s.AppendCall(nil, content, 1<<16)
		if err != nil {
			return
		}
		if !validJSON(text) || len(text) > 1<<16 {
			t.Fatalf("%x: %.200s", content, text)
		}
		frame, err := s.AppendRequest(nil, m, 1, 1, text)
		if err != nil {
			if bytes.Contains(text, []byte("NaN")) || bytes.Contains(text, []byte("Infinity")) || bytes.Contains(text, []byte("T")) {
				return // numbers and years that JSON has not
			}
			t.Fatalf("%s: %v", text, err)
		}
		x, err := bolt.Size(frame)
		if err != nil {
			t.Fatal(err)
		}
		again, back, err := s.AppendCall(nil, bolt.Parse(frame, x).Content, 1<<20)
		if err != nil || again != m {
			t.Fatalf("%s becomes %s, %v", text, back, err)
		}
	})
}

// FuzzBoltReply has any text be an answer: the frame that is made of it can be read,
// and what it says is JSON.
func FuzzBoltReply(f *testing.F) {
	s := returns()
	for i, text := range []string{`{"a":[1,null,"x",5000000000,1.5,true]}`, ``, `1`, `"9"`, `"x"`, `{"items":[{"price":1}],"id":7}`, `[{}]`, `{}`, `"AQI="`, `"2026-01-02T03:04:05.5Z"`, `true`} {
		f.Add([]byte(text), byte(i))
	}
	f.Fuzz(func(t *testing.T, text []byte, which byte) {
		m := &s.Methods[int(which)%len(s.Methods)]
		content, err := s.AppendReply(nil, m, text)
		if err != nil {
			return
		}
		got, err := transcode.AppendResponse(nil, answer(content), 1<<24)
		if err != nil || !validJSON(got) {
			t.Fatalf("%s %q: %s, %v", m.Name, text, got, err)
		}
	})
}
