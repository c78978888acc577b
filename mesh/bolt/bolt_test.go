package bolt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"strings"
	"testing"
)

func TestGolden(t *testing.T) {
	if len(request1a) != 296 || len(request2c) != 302 || len(response1a) != 166 || len(response2c) != 172 {
		t.Fatalf("lengths %d, %d, %d, %d", len(request1a), len(request2c), len(response1a), len(response2c))
	}
	for name, b := range golden() {
		f, x := mustParse(t, b)
		if x.CRC != strings.HasSuffix(name, "c") {
			t.Errorf("%s: sum %v", name, x.CRC)
		}
		id, kind := uint32(2), KindOther
		switch {
		case strings.HasPrefix(name, "request"):
			id, kind = 1, KindCall
			if f.Timeout != 3000 || f.Codec != Hessian2 || f.Command != Call {
				t.Errorf("%s: %+v", name, f)
			}
			target, err := new(Reader).Target(&f)
			if err != nil || string(target.Service) != "com.alipay.test.S:1.0" || string(target.Method) != "m" {
				t.Errorf("%s: %q, %v", name, target, err)
			}
		case strings.HasPrefix(name, "response"):
			id = 1
			if f.Status != OK || f.Command != Reply || len(f.Content) != 100 {
				t.Errorf("%s: %+v", name, f)
			}
		case strings.HasPrefix(name, "heartbeat"):
			kind = KindAlive
			if f.Timeout != 3000 {
				t.Errorf("%s: %+v", name, f)
			}
		}
		if f.ID != id || f.Kind() != kind {
			t.Errorf("%s: id %d, kind %d", name, f.ID, f.Kind())
		}
	}
}

// Any part of a frame but the whole is waited for, and no more than the fixed
// part is needed to know how much.
func TestSplit(t *testing.T) {
	for name, b := range golden() {
		for n := range len(b) {
			x, err := Size(b[:n])
			if err != nil || x.Len != 0 && x.Len != len(b) || n >= maxFixed && x.Len == 0 {
				t.Fatalf("%s, %d bytes: %+v, %v", name, n, x, err)
			}
			if x.Head > 0 {
				if f := Parse(b[:n], x); len(f.Content) > max(n-x.Head, 0) || len(f.Class)+len(f.Header) > n {
					t.Fatalf("%s, %d bytes: content of %d", name, n, len(f.Content))
				}
			}
		}
	}
}

func TestSum(t *testing.T) {
	for name, b := range golden() {
		_, x := mustParse(t, b)
		if !x.CRC {
			continue
		}
		for split := range len(b) {
			var s Sum
			s.Begin(x)
			if err := errors.Join(s.Add(b[:split]), s.Add(b[split:])); err != nil {
				t.Fatalf("%s split at %d: %v", name, split, err)
			}
		}
		for i := range b {
			bad := bytes.Clone(b)
			bad[i] ^= 4
			var s Sum
			s.Begin(x)
			if s.Add(bad) == nil {
				t.Fatalf("%s: byte %d changed unnoticed", name, i)
			}
		}
	}
}

func TestSetID(t *testing.T) {
	for name, b := range golden() {
		b := bytes.Clone(b)
		_, x := mustParse(t, b)
		SetID(b, x, 0xdeadbeef)
		f, _ := mustParse(t, b)
		if f.ID != 0xdeadbeef {
			t.Errorf("%s: id %x", name, f.ID)
		}
		var s Sum
		s.Begin(x)
		if err := s.Add(b); x.CRC && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusedFrames(t *testing.T) {
	change := func(b []byte, at int, to ...byte) []byte {
		b = bytes.Clone(b)
		copy(b[at:], to)
		return b
	}
	for name, b := range map[string][]byte{
		"HTTP":                          []byte("GET / HTTP/1.1\r\n"),
		"protocol 0":                    {0},
		"protocol 3":                    change(heartbeat2, 0, 3),
		"version 3":                     change(heartbeat2, 1, 3),
		"version 0":                     change(heartbeat2, 1, 0),
		"type 3":                        change(heartbeat1, 1, 3),
		"sum for JavaScript, not Java":  change(heartbeat2, 11, 1),
		"sum for Java, not JavaScript":  change(heartbeat2c, 11, 3),
		"negative class":                change(request1a, 14, 0x80),
		"negative header":               change(request1a, 16, 0x80),
		"negative content":              change(request1a, 18, 0xff),
		"content too long":              change(request1a, 18, 0x04, 0, 0, 1),
		"negative class of a response":  change(response1a, 12, 0x80),
		"negative header of a response": change(response1a, 14, 0xff),
	} {
		var syntax *SyntaxError
		if x, err := Size(b); !errors.As(err, &syntax) {
			t.Errorf("%s: %+v, %v", name, x, err)
		}
	}
	// Switches without a meaning for the length pass.
	if x, err := Size(change(heartbeat2, 11, 2)); err != nil || x.CRC {
		t.Errorf("switches 2: %+v, %v", x, err)
	}
}

func TestTarget(t *testing.T) {
	const s = "com.alipay.test.S:1.0"
	header := headerOf("service", s)
	pb := func(pairs ...string) []byte { return frame(Protobuf, classRequest, headerOf(pairs...), []byte{8, 1}) }
	body5 := func(fields ...string) []byte { return frame(Hessian2, classRequest, header, body(fields...)) }
	for name, c := range map[string]struct {
		in   []byte
		want string // "" if it must be unclear
	}{
		"ordinary":                   {frame(Hessian2, classRequest, header, ordinary()), s + "#m"},
		"no header":                  {frame(Hessian2, classRequest, nil, ordinary()), s + "#m"},
		"other fields first":         {body5("requestProps", "Mt\x00\x03a.B"+str("k")+"Mz"+"z", "targetServiceUniqueName", str(s), "methodName", str("m")), s + "#m"},
		"protobuf":                   {pb("service", s, "sofa_head_method_name", "m", "sofa_head_target_service", s), s + "#m"},
		"another class":              {frame(Hessian2, "a.B", header, ordinary()), ""},
		"class with a space":         {frame(Hessian2, classRequest+" ", header, ordinary()), ""},
		"header says otherwise":      {frame(Hessian2, classRequest, headerOf("service", "com.alipay.test.T:1.0"), ordinary()), ""},
		"target says otherwise":      {frame(Hessian2, classRequest, headerOf("service", s, "sofa_head_target_service", "T"), ordinary()), ""},
		"method says otherwise":      {frame(Hessian2, classRequest, headerOf("sofa_head_method_name", "n"), ordinary()), ""},
		"two services in the header": {frame(Hessian2, classRequest, headerOf("service", s, "service", "T"), ordinary()), ""},
		"header is cut off":          {frame(Hessian2, classRequest, header[:len(header)-1], ordinary()), ""},
		"two services in the body":   {body5("methodName", str("m"), "targetServiceUniqueName", str(s), "targetServiceUniqueName", str("T")), ""},
		"two methods":                {body5("methodName", str("m"), "methodName", str("n"), "targetServiceUniqueName", str(s)), ""},
		"overlong name":              {body5("methodName", str("m"), "targetServiceUniqueName", str(s), "\xed\xb0\x80ethodName", str("n")), ""},
		"service is null":            {body5("methodName", str("m"), "targetServiceUniqueName", "N"), ""},
		"service is a reference":     {body5("methodName", str("m"), "targetServiceUniqueName", "J\x00"), ""},
		"service is a number":        {body5("methodName", str("m"), "targetServiceUniqueName", "\x91"), ""},
		"a map instead of an object": {frame(Hessian2, classRequest, nil, []byte("Mt\x00\x2c"+classRequest+str("methodName")+str("m")+"z")), ""},
		"an object of another class": {frame(Hessian2, classRequest, nil, bytes.Replace(ordinary(), []byte("SofaRequest"), []byte("SofaQequest"), 1)), ""},
		"cut off":                    {frame(Hessian2, classRequest, nil, ordinary()[:60]), ""},
		"nothing":                    {frame(Hessian2, classRequest, nil, nil), ""},
		"JSON":                       {frame(12, classRequest, header, []byte("{}")), ""},
		"protobuf without a method":  {pb("service", s, "sofa_head_target_service", s), ""},
		"protobuf with two services": {pb("service", "T", "sofa_head_method_name", "m", "sofa_head_target_service", s), ""},
		"published dialect":          {frame(Hessian2, classRequest, header, []byte("C\x30\x2c"+classRequest+"\x92"+str("methodName")+str("targetServiceUniqueName")+"\x60"+str("m")+str(s))), s + "#m"},
	} {
		f, _ := mustParse(t, c.in)
		target, err := new(Reader).Target(&f)
		got := string(target.Service) + "#" + string(target.Method)
		if c.want == "" && err == nil || c.want != "" && (err != nil || got != c.want) {
			t.Errorf("%s: %s, %v; want %q", name, got, err, c.want)
		}
	}
}

// What JavaScript takes for a call is one, whatever its command.
func TestKind(t *testing.T) {
	b := bytes.Clone(request1a)
	for command, want := range map[uint16]Kind{0: KindAlive, 1: KindCall, 2: KindCall, 7: KindCall, 100: KindCall} {
		binary.BigEndian.PutUint16(b[2:], command)
		if f, _ := mustParse(t, b); f.Kind() != want {
			t.Errorf("command %d: kind %d, want %d", command, f.Kind(), want)
		}
	}
	b = bytes.Clone(heartbeat1)
	binary.BigEndian.PutUint16(b[2:], uint16(GoAway))
	if f, _ := mustParse(t, b); f.Kind() != KindOther {
		t.Errorf("goaway: kind %d", f.Kind())
	}
}

func TestAnswers(t *testing.T) {
	for name, b := range map[string][]byte{"1": request1a, "2 with a sum": request2c, "protobuf": frame(Protobuf, classRequest, nil, nil)} {
		q, _ := mustParse(t, b)
		for _, text := range []string{"", "denied by a/b", strings.Repeat("é", 4000)} {
			r, x := mustParse(t, AppendError(nil, &q, ServerException, text))
			if r.ID != q.ID || r.Type != Response || r.Command != Reply || r.Status != ServerException || r.Codec != q.Codec || r.Protocol != q.Protocol {
				t.Errorf("%s: %+v", name, r)
			}
			if err := r.Header.Check(); err != nil {
				t.Errorf("%s: header: %v", name, err)
			}
			if len(text) < 100 && !bytes.Contains(r.Content, []byte(text)) {
				t.Errorf("%s: %q", name, r.Content)
			}
			var s Sum
			s.Begin(x)
			if err := s.Add(AppendError(nil, &q, ServerException, text)); x.CRC && err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	for q, want := range map[string][]byte{string(heartbeat1): ack1, string(heartbeat2c): ack2c} {
		f, _ := mustParse(t, []byte(q))
		if got := AppendAlive(nil, &f); !bytes.Equal(got, want) {
			t.Errorf("acknowledged by %x, want %x", got, want)
		}
	}
}

func TestNoAllocation(t *testing.T) {
	var r Reader
	b := bytes.Clone(request2c)
	dst := make([]byte, 0, 4096)
	n := testing.AllocsPerRun(1000, func() {
		x, err := Size(b)
		if err != nil {
			t.Fatal(err)
		}
		f := Parse(b, x)
		target, err := r.Target(&f)
		if err != nil || len(target.Method) != 1 || f.Kind() != KindCall {
			t.Fatal(err)
		}
		SetID(b, x, f.ID+1)
		var s Sum
		s.Begin(x)
		if err := s.Add(b); err != nil {
			t.Fatal(err)
		}
		dst = AppendError(dst[:0], &f, Busy, "busy")
	})
	if n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}

func FuzzBolt(f *testing.F) {
	for _, b := range golden() {
		f.Add(b)
	}
	f.Add(frame(Protobuf, classRequest, headerOf("sofa_head_method_name", "m", "sofa_head_target_service", "s"), nil))
	f.Add(AppendError(nil, &Frame{Protocol: 2, Version: 2, Switch: 1, Codec: Hessian2}, Busy, "busy"))
	var r Reader
	f.Fuzz(func(t *testing.T, in []byte) {
		x, err := Size(in)
		if err != nil || x.Len == 0 || len(in) < x.Head {
			return
		}
		for n := range min(len(in), maxFixed) {
			if part, err := Size(in[:n]); err != nil || part.Len != 0 && part != x {
				t.Fatalf("%d bytes: %+v, %v; all: %+v", n, part, err, x)
			}
		}
		frame := Parse(in, x)
		if target, err := r.Target(&frame); err == nil && (len(target.Service) == 0 || len(target.Method) == 0) {
			t.Fatalf("target %q", target)
		}
		answer := AppendError(nil, &frame, ServerException, "no")
		back, err := Size(answer)
		if err != nil || back.Len != len(answer) {
			t.Fatalf("the answer %x: %+v, %v", answer, back, err)
		}
		if len(in) < x.Len {
			return
		}
		in = in[:x.Len]
		SetID(in, x, 77)
		if again := Parse(in, x); again.ID != 77 {
			t.Fatalf("id %d", again.ID)
		}
		var s Sum
		s.Begin(x)
		if err := s.Add(in[:x.Len/2]); err != nil && x.CRC {
			t.Fatal(err)
		}
		if err := s.Add(in[x.Len/2:]); err != nil && x.CRC {
			t.Fatal(err)
		}
		if x.CRC && crc32.ChecksumIEEE(in[:x.Len-crcLen]) != binary.BigEndian.Uint32(in[x.Len-crcLen:]) {
			t.Fatal("the sum was not renewed")
		}
	})
}
