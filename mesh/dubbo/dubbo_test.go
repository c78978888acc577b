package dubbo

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"testing"

	"hauberk.dev/mesh/hessian"
)

// Frames as dubbo-remoting 2.1.4 writes them: a heartbeat with id 2, and the
// call com.test.S:1.0#m("x") of group g, answered with "ok", with id 1.
var (
	heartbeat = unhex("dabbe2000000000000000002000000014e")
	request   = append(unhex("dabbc20000000000000000010000005e"), ordinary...)
	response  = unhex("dabb021400000000000000010000000491026f6b")
)

func unhex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// str is a string of Hessian.
func str(s string) string { return string(hessian.AppendString(nil, s)) }

// body is the body of a request, without its attachments.
func body(fields ...string) string {
	b := ""
	for _, f := range fields {
		b += str(f)
	}
	return b
}

var (
	plain    = body("5.3.0", "com.test.S", "1.0", "m", "Ljava/lang/String;", "x")
	ordinary = plain + "H" + body("dubbo", "5.3.0", "group", "g", "path", "com.test.S", "version", "1.0") + "Z"
)

func frame(body string) []byte {
	b := unhex("dabbc2000000000000000001")
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

func mustParse(t testing.TB, b []byte) Frame {
	t.Helper()
	n, err := Size(b)
	if err != nil || n != len(b) {
		t.Fatalf("size %d of %d, %v", n, len(b), err)
	}
	return Parse(b, n)
}

func TestGolden(t *testing.T) {
	f := mustParse(t, request)
	target, err := new(Reader).Target(&f)
	if err != nil || string(target.Service) != "com.test.S" || string(target.Version) != "1.0" || string(target.Group) != "g" || string(target.Method) != "m" {
		t.Errorf("%q, %v", target, err)
	}
	if f.Kind != KindCall || !f.TwoWay || f.ID != 1 || f.Serialization != 2 {
		t.Errorf("%+v", f)
	}
	if f = mustParse(t, heartbeat); f.Kind != KindAlive || f.ID != 2 || string(f.Body) != "N" {
		t.Errorf("%+v", f)
	}
	if f = mustParse(t, response); f.Kind != KindOther || f.ID != 1 || f.Status != OK {
		t.Errorf("%+v", f)
	}
	for _, b := range [][]byte{heartbeat, request, response} {
		for i := range len(b) {
			if n, err := Size(b[:i]); err != nil || n != 0 && n != len(b) || n == 0 && i >= HeaderLen {
				t.Fatalf("%d bytes of %d: %d, %v", i, len(b), n, err)
			}
		}
	}
}

func TestRefusedFrames(t *testing.T) {
	for name, b := range map[string]string{
		"a command of the console": "invoke com.test.S.m(1)\r\n",
		"half a magic":             "\xda\xbc",
		"a body too long":          string(unhex("dabbc200000000000000000104000001")),
		"a negative length":        string(unhex("dabbc2000000000000000001ffffffff")),
		"a long event":             string(unhex("dabbe200000000000000000100001001")),
	} {
		var syntax *SyntaxError
		if n, err := Size([]byte(b)); !errors.As(err, &syntax) {
			t.Errorf("%s: %d, %v", name, n, err)
		}
	}
}

func TestTarget(t *testing.T) {
	attached := func(pairs ...string) string { return plain + "H" + body(pairs...) + "Z" }
	generic := func(args string) string {
		return body("5.3.0", "com.test.S", "1.0", "$invoke", "Ljava/lang/String;[Ljava/lang/String;[Ljava/lang/Object;") + args + "N"
	}
	for name, c := range map[string]struct{ in, want string }{
		"ordinary":                      {ordinary, "g/com.test.S:1.0#m"},
		"no attachments":                {plain + "N", "/com.test.S:1.0#m"},
		"no version":                    {body("2.0.2", "com.test.S") + "N" + body("m", "I") + "\x91" + "H" + body("path", "com.test.S") + "Z", "/com.test.S:#m"},
		"arguments of all kinds":        {body("2.0.2", "a.S", "", "m", "Z[BLa/B;[[Ljava/util/Map;J") + "T" + "\x23abc" + "C\x03a.B\x91\x01a\x60N" + "\x7aHZN" + "\xe0" + "N", "/a.S:#m"},
		"generic":                       {generic(str("deleteAll") + "\x78\x78"), "/com.test.S:1.0#deleteAll"},
		"typed map":                     {plain + "M" + str("java.util.HashMap") + body("group", "g") + "Z", "g/com.test.S:1.0#m"},
		"path replaced":                 {attached("path", "com.test.Secret"), ""},
		"version replaced":              {attached("version", "2.0"), ""},
		"path replaced at last":         {attached("path", "com.test.S", "a", "b", "path", "com.test.Secret"), ""},
		"two groups":                    {attached("group", "g", "group", "h"), ""},
		"an empty group, then another":  {attached("group", "", "group", "h"), ""},
		"path is null":                  {plain + "H" + str("path") + "NZ", ""},
		"path is a reference":           {plain + "H" + str("path") + "Q\x90Z", ""},
		"overlong key":                  {plain + "H" + "\x04\xc1\xb0ath" + str("com.test.Secret") + "Z", ""},
		"key is no string":              {plain + "H\x91\x91Z", ""},
		"attachments are a reference":   {body("5.3.0", "com.test.S", "1.0", "m", "Ljava/util/Map;") + "HZ" + "Q\x90", ""},
		"no attachments at all":         {plain, ""},
		"cut off":                       {ordinary[:len(ordinary)-1], ""},
		"more parameters than there":    {body("5.3.0", "com.test.S", "1.0", "m", "II") + "\x91", ""},
		"a stream":                      {body("5.3.0", "com.test.S", "1.0", "m", "Ljava/io/InputStream;") + "\x23abc" + "N", ""},
		"bad descriptor":                {body("5.3.0", "com.test.S", "1.0", "m", "Ljava/lang/String") + str("x") + "N", ""},
		"array of nothing":              {body("5.3.0", "com.test.S", "1.0", "m", "[") + "N", ""},
		"no path":                       {body("5.3.0") + "N" + body("1.0", "m", "") + "N", ""},
		"generic without a method":      {generic("N\x78\x78"), ""},
		"generic with other parameters": {body("5.3.0", "com.test.S", "1.0", "$invoke", "Ljava/lang/String;", "m") + "N", ""},
	} {
		f := mustParse(t, frame(c.in))
		target, err := new(Reader).Target(&f)
		got := string(target.Group) + "/" + string(target.Service) + ":" + string(target.Version) + "#" + string(target.Method)
		if c.want == "" && err == nil || c.want != "" && (err != nil || got != c.want) {
			t.Errorf("%s: %s, %v; want %q", name, got, err, c.want)
		}
	}
	other := bytes.Clone(request)
	other[2] = 0xc6
	f := mustParse(t, other)
	if target, err := new(Reader).Target(&f); err == nil {
		t.Errorf("another serialization: %q", target)
	}
}

func TestAnswers(t *testing.T) {
	f := mustParse(t, request)
	for _, text := range []string{"denied", strings.Repeat("x", 5000)} {
		r := mustParse(t, AppendError(nil, &f, ServiceError, text))
		var h hessian.Reader
		h.Reset(r.Body, hessian.Final)
		s, err := h.String()
		if r.Kind != KindOther || r.ID != 1 || r.Status != ServiceError || err != nil || string(s) != text[:min(len(text), maxMessage)] {
			t.Errorf("%+v: %q, %v", r, s, err)
		}
	}
	q := mustParse(t, heartbeat)
	if got, want := AppendAlive(nil, &q), unhex("dabb22140000000000000002000000014e"); !bytes.Equal(got, want) {
		t.Errorf("%x, want %x", got, want)
	}
}

func TestNoAllocation(t *testing.T) {
	var r Reader
	dst := make([]byte, 0, 1024)
	if n := testing.AllocsPerRun(1000, func() {
		n, err := Size(request)
		if err != nil {
			t.Fatal(err)
		}
		f := Parse(request, n)
		if target, err := r.Target(&f); err != nil || len(target.Group) != 1 {
			t.Fatal(err)
		}
		dst = AppendError(dst[:0], &f, Exhausted, "busy")
	}); n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}

func FuzzDubbo(f *testing.F) {
	for _, b := range [][]byte{heartbeat, request, response, frame(plain + "N"), []byte("invoke x")} {
		f.Add(b)
	}
	var r Reader
	f.Fuzz(func(t *testing.T, in []byte) {
		n, err := Size(in)
		if err != nil || n == 0 {
			return
		}
		for i := range HeaderLen {
			if part, err := Size(in[:i]); part != 0 || err != nil {
				t.Fatalf("%d bytes: %d, %v", i, part, err)
			}
		}
		frame := Parse(in, n)
		if target, err := r.Target(&frame); err == nil && (len(target.Service) == 0 || len(target.Method) == 0) {
			t.Fatalf("%q", target)
		}
		for _, b := range [][]byte{AppendError(nil, &frame, ServerError, "no"), AppendAlive(nil, &frame)} {
			if size, err := Size(b); err != nil || size != len(b) || Parse(b, size).ID != frame.ID {
				t.Fatalf("the answer %x: %d, %v", b, size, err)
			}
		}
	})
}
