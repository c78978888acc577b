package resp

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Bytes of the Redis serialization protocol specification (RESP), by section.
var golden = []struct {
	section, bytes string
	push           bool
}{
	{"simple strings", "+OK\r\n", false},
	{"simple errors", "-ERR unknown command 'asdf'\r\n", false},
	{"simple errors", "-WRONGTYPE Operation against a key holding the wrong kind of value\r\n", false},
	{"integers", ":0\r\n", false},
	{"integers", ":1000\r\n", false},
	{"bulk strings", "$5\r\nhello\r\n", false},
	{"bulk strings", "$0\r\n\r\n", false},
	{"null bulk strings", "$-1\r\n", false},
	{"arrays", "*0\r\n", false},
	{"arrays", "*2\r\n$5\r\nhello\r\n$5\r\nworld\r\n", false},
	{"arrays", "*3\r\n:1\r\n:2\r\n:3\r\n", false},
	{"arrays", "*5\r\n:1\r\n:2\r\n:3\r\n:4\r\n$5\r\nhello\r\n", false},
	{"arrays", "*2\r\n*3\r\n:1\r\n:2\r\n:3\r\n*2\r\n+Hello\r\n-World\r\n", false},
	{"null arrays", "*-1\r\n", false},
	{"null elements in arrays", "*3\r\n$5\r\nhello\r\n$-1\r\n$5\r\nworld\r\n", false},
	{"nulls", "_\r\n", false},
	{"booleans", "#t\r\n", false},
	{"doubles", ",1.23\r\n", false},
	{"doubles", ",-inf\r\n", false},
	{"big numbers", "(3492890328409238509324850943850943825024385\r\n", false},
	{"bulk errors", "!21\r\nSYNTAX invalid syntax\r\n", false},
	{"verbatim strings", "=15\r\ntxt:Some string\r\n", false},
	{"maps", "%2\r\n+first\r\n:1\r\n+second\r\n:2\r\n", false},
	{"attributes", "|1\r\n+key-popularity\r\n%2\r\n$1\r\na\r\n,0.1923\r\n$1\r\nb\r\n,0.0012\r\n*2\r\n:2039123\r\n:9543892\r\n", false},
	{"attributes", "*3\r\n:1\r\n:2\r\n|1\r\n+ttl\r\n:3600\r\n:3\r\n", false},
	{"sets", "~2\r\n+a\r\n+b\r\n", false},
	{"pushes", ">4\r\n+pubsub\r\n+message\r\n+somechannel\r\n+this is the message\r\n", true},
}

// ends feeds the bytes to a reader in pieces and returns where answers end.
func ends(b []byte, step int) (at []int, pushes []bool, err error) {
	var a Answers
	have, left, off := 0, 0, 0 // bytes that are there, of the element to come, done
	for {
		if left > 0 {
			n := min(left, have-off)
			if err := a.Add(b[off : off+n]); err != nil {
				return at, pushes, err
			}
			off, left = off+n, left-n
			if left == 0 && !a.Within() {
				at, pushes = append(at, off), append(pushes, a.Push())
			}
		}
		if left == 0 {
			size, err := a.Measure(b[off:have])
			if err != nil {
				return at, pushes, err
			}
			if size > 0 {
				a.Begin()
				left = size
				resumed := Answers{}
				resumed.Resume(a.Progress())
				if resumed.Progress() != a.Progress() {
					return at, pushes, fmt.Errorf("%v goes on as %v", a.Progress(), resumed.Progress())
				}
				a = resumed
				continue
			}
		}
		if have == len(b) {
			return at, pushes, nil
		}
		have = min(have+step, len(b))
	}
}

// TestGolden: every answer of the specification ends where it does, one after the
// other, in whatever pieces.
func TestGolden(t *testing.T) {
	var all []byte
	var want []int
	var pushes []bool
	for _, g := range golden {
		all = append(all, g.bytes...)
		want, pushes = append(want, len(all)), append(pushes, g.push)
		if at, _, err := ends([]byte(g.bytes), 1); err != nil || !slices.Equal(at, []int{len(g.bytes)}) {
			t.Errorf("%s: %q ends at %v, %v", g.section, g.bytes, at, err)
		}
	}
	for step := 1; step <= len(all); step++ {
		at, p, err := ends(all, step)
		if err != nil || !slices.Equal(at, want) || !slices.Equal(p, pushes) {
			t.Fatalf("in pieces of %d: %v, %v; want %v", step, at, err, want)
		}
	}
}

func request(args ...string) []byte {
	b := fmt.Appendf(nil, "*%d\r\n", len(args))
	for _, a := range args {
		b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
	}
	return b
}

func TestCommand(t *testing.T) {
	for _, c := range []struct {
		args   []string
		method string
		rest   int
		effect Effect
	}{
		{[]string{"LLEN", "mylist"}, "LLEN", 1, OneAnswer}, // of the specification
		{[]string{"get", "k"}, "GET", 1, OneAnswer},
		{[]string{"Config", "set", "a", "b"}, "CONFIG|SET", 2, OneAnswer},
		{[]string{"CONFIG"}, "CONFIG", 0, OneAnswer},
		{[]string{"client", "reply", "off"}, "CLIENT|REPLY", 1, Disorders},
		{[]string{"subscribe", "a"}, "SUBSCRIBE", 1, Disorders},
		{[]string{"multi"}, "MULTI", 0, Opens},
		{[]string{"exec"}, "EXEC", 0, Closes},
		{[]string{"exec", "x"}, "EXEC", 1, OneAnswer},
		{[]string{"PSYNC", "?", "-1"}, "PSYNC", 2, Foreign},
		{[]string{"config", strings.Repeat("x", MaxName+1)}, "", 0, OneAnswer},
		{[]string{strings.Repeat("x", MaxName+1), "y"}, "", 1, OneAnswer},
		{[]string{strings.Repeat("x", MaxName)}, strings.Repeat("X", MaxName), 0, OneAnswer},
		{[]string{""}, "", 0, OneAnswer},
	} {
		b := request(c.args...)
		got, err := Begin(b)
		method, ok := got.Method(nil)
		if err != nil || string(method) != c.method || ok != (c.method != "") || got.Rest != c.rest || EffectOf(method, got.Rest) != c.effect {
			t.Errorf("%.40q: %q, %+v, %v", c.args, method, got, err)
		}
		for i := range got.Look {
			if part, err := Begin(b[:i]); err != nil || part.Size != 0 && part.Size != got.Size {
				t.Errorf("%.40q, %d bytes of it: %+v, %v", c.args, i, part, err)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for _, in := range []string{"PING\r\n", "\r\n", "*0\r\n", "*-1\r\n", "*01\r\n", "*+1\r\n", "*1\n$4\r\n", "*1\r$", "*1048577\r\n", "*99999999999999999999", "*1\r\n:4\r\n",
		"*1\r\n$-1\r\n", "*1\r\n$536870913\r\n", "*1\r\n$4\r\nPINGxx", "*1\r\n$04\r\n", "*2\r\n$6\r\nCONFIG\r\n+SET\r\n", "GET / HTTP/1.1\r\n", "*1 \r\n"} {
		c, err := Begin([]byte(in))
		var e *Error
		if !errors.As(err, &e) || c.Size != 0 {
			t.Errorf("request %q: %+v, %v", in, c, err)
		}
	}
	for _, in := range []string{"x\r\n", "+OK\n", "$5\r\nhelloxx", "$5\r\nhello\rx", "*1\r\n>1\r\n", "*?\r\n", "$?\r\n", "*1073741824\r\n", "$-2\r\n", "%-1\r\n", "\n"} {
		if at, _, err := ends([]byte(in), 1); err == nil {
			t.Errorf("answer %q ends at %v", in, at)
		}
	}
}

func TestAppendError(t *testing.T) {
	if b := AppendError([]byte("x"), "NOPERM", "no\r\n+OK"); string(b) != "x-NOPERM no  +OK\r\n" {
		t.Errorf("%q", b)
	}
}

// TestNoAllocation: neither a command nor an answer costs any.
func TestNoAllocation(t *testing.T) {
	b, answer, buf := request("config", "set", "a", "b"), []byte(golden[23].bytes), make([]byte, 0, 256)
	if n := testing.AllocsPerRun(100, func() {
		c, err := Begin(b)
		m, ok := c.Method(buf)
		if err != nil || !ok || EffectOf(m, c.Rest) != OneAnswer {
			t.Fatal(err)
		}
		var a Answers
		for at := 0; at < len(answer); {
			size, err := a.Measure(answer[at:])
			if err != nil || size == 0 {
				t.Fatal(size, err)
			}
			a.Begin()
			if err := a.Add(answer[at : at+size]); err != nil {
				t.Fatal(err)
			}
			at += size
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// FuzzRESP: what is read of a request is in its bytes, and answers end in the same
// places however they arrive.
func FuzzRESP(f *testing.F) {
	for _, g := range golden {
		f.Add([]byte(g.bytes), uint8(3))
	}
	f.Add(request("config", "set", "a", "b"), uint8(1))
	f.Add(request("client", "reply", "off"), uint8(2))
	f.Add([]byte("*1\r\n$99\r\nx"), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, step uint8) {
		c, err := Begin(b)
		if err == nil && c.Size > 0 {
			if c.Look > c.Size || c.Look > len(b) || c.Rest < 0 || c.Rest > MaxArguments || len(c.Name) > MaxName || len(c.Sub) > MaxName {
				t.Fatalf("%+v of %q", c, b)
			}
			if c.Name != nil && !c.Long && !bytes.Equal(b[:len("*")], []byte("*")) {
				t.Fatalf("%q", b)
			}
		}
		whole, p1, err1 := ends(b, len(b)+1)
		parts, p2, err2 := ends(b, int(step)+1)
		if (err1 == nil) != (err2 == nil) || !slices.Equal(whole, parts) || !slices.Equal(p1, p2) {
			t.Fatalf("%v, %v in one piece; %v, %v in pieces", whole, err1, parts, err2)
		}
	})
}
