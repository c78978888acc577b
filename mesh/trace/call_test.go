package trace

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hessian"
)

// boltFrame is a call whose header has the pairs.
func boltFrame(sum bool, pairs ...string) []byte {
	var header []byte
	for _, s := range pairs {
		header = append(binary.BigEndian.AppendUint32(header, uint32(len(s))), s...)
	}
	b := []byte{1, 1, 0, 1, 1, 0, 0, 0, 7, 1}
	if sum {
		b = []byte{2, 2, 1, 0, 1, 1, 0, 0, 0, 7, 1, 1}
	}
	b = append(b, 0, 0, 0x0b, 0xb8, 0, 5)
	b = binary.BigEndian.AppendUint16(b, uint16(len(header)))
	b = append(append(append(b, 0, 0, 0, 7), "class"...), header...)
	b = append(b, "content"...)
	if sum {
		b = append(b, 0, 0, 0, 0)
		x, _ := bolt.Size(b)
		bolt.SetID(b, x, 7)
	}
	return b
}

func dubboFrame(pairs ...string) []byte {
	var body []byte
	for _, s := range []string{"2.0.2", "com.S", "1.0", "m", "Ljava/lang/String;", "x"} {
		body = hessian.AppendString(body, s)
	}
	body = append(body, 'H')
	for _, s := range pairs {
		body = hessian.AppendString(body, s)
	}
	body = append(body, 'Z')
	b := []byte{0xda, 0xbb, 0xc2, 0, 0, 0, 0, 0, 0, 0, 0, 9}
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

const aParent = "00-" + aTrace + "-" + aSpan + "-01"

func boltOf(t testing.TB, b []byte, perMille int) (Call, bolt.Frame, bolt.Extent) {
	t.Helper()
	x, err := bolt.Size(b)
	if err != nil || x.Len != len(b) {
		t.Fatalf("%v, %d of %d bytes", err, x.Len, len(b))
	}
	f := bolt.Parse(b, x)
	c, err := OfBolt(f.Header, perMille)
	if err != nil {
		t.Fatal(err)
	}
	var sum bolt.Sum
	if sum.Begin(x); x.CRC && sum.Add(b) != nil {
		t.Fatal("the sum is wrong")
	}
	return c, f, x
}

func dubboOf(t testing.TB, b []byte, perMille int) Call {
	t.Helper()
	if n, err := dubbo.Size(b); err != nil || n != len(b) {
		t.Fatalf("%v, %d of %d bytes", err, n, len(b))
	}
	f := dubbo.Parse(b, len(b))
	c, err := OfDubbo(&dubbo.Reader{}, &f, perMille)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestBoltCalls carries on what a header tells, and begins what it does not.
func TestBoltCalls(t *testing.T) {
	for _, sum := range []bool{false, true} {
		b := boltFrame(sum, "service", "s", "traceparent", aParent)
		before := bytes.Clone(b)
		c, _, x := boltOf(t, b, 0)
		if !c.Known || c.ID() != aTrace || !c.Sampled || !c.Rewrite() {
			t.Fatalf("%+v", c)
		}
		bolt.SetID(b, x, 7)
		next, f, _ := boltOf(t, b, 0)
		if next.Parent != c.Span || next.ID() != aTrace || string(f.Content) != "content" || len(b) != len(before) {
			t.Errorf("%+v after %+v", next, c)
		}
		b = boltFrame(sum, "rpc_trace_context.sofaTraceId", "0a0fe93f1488349732342100153695", "rpc_trace_context.sofaRpcId", "0.1")
		if c, _, _ = boltOf(t, b, 0); !c.Known || c.SofaSpan != "0.1" || c.Rewrite() {
			t.Errorf("%+v", c)
		}
		b = boltFrame(sum, "service", "s")
		c, _, x = boltOf(t, b, 1000)
		if c.Known || !c.Sampled || c.Rewrite() {
			t.Errorf("%+v", c)
		}
		longer, err := bolt.Extend(nil, b, x, c.ForBolt())
		if err != nil {
			t.Fatal(err)
		}
		next, f, _ = boltOf(t, longer, 0)
		if next.ID() != c.ID() || next.Parent != c.Span || next.SofaTrace != c.ID() || next.SofaSpan != "0" || !next.Sampled || string(f.Content) != "content" || string(f.Class) != "class" {
			t.Errorf("%+v after %+v", next, c)
		}
		b = boltFrame(sum, "k", strings.Repeat("v", bolt.MaxHeader-20))
		if c, _, x = boltOf(t, b, 1000); c.Known {
			t.Errorf("%+v", c)
		}
		if _, err := bolt.Extend(nil, b, x, c.ForBolt()); err == nil {
			t.Error("a header over every bound")
		}
	}
	if _, err := OfBolt(bolt.Header("nonsense"), 0); err == nil {
		t.Error("nonsense was read")
	}
	if c, _, _ := boltOf(t, boltFrame(false, "traceparent", aParent, "traceparent", aParent), 0); c.Rewrite() {
		t.Error("one of two was written anew")
	}
	if c, _, _ := boltOf(t, boltFrame(false, "traceparent", "cc"+aParent[2:]+"-more"), 0); !c.Known || c.Rewrite() {
		t.Errorf("%+v", c)
	}
}

func TestDubboCalls(t *testing.T) {
	b := dubboFrame("path", "com.S", "traceparent", aParent)
	c := dubboOf(t, b, 0)
	if !c.Known || c.ID() != aTrace || !c.Rewrite() {
		t.Fatalf("%+v", c)
	}
	if next := dubboOf(t, b, 0); next.Parent != c.Span {
		t.Errorf("%+v after %+v", next, c)
	}
	if c := dubboOf(t, dubboFrame("sofaTraceId", "0a0f", "sofaRpcId", "0.2"), 0); !c.Known || c.SofaTrace != "0a0f" || c.SofaSpan != "0.2" {
		t.Errorf("%+v", c)
	}
	b = dubboFrame("path", "com.S")
	c = dubboOf(t, b, 1000)
	longer, err := dubbo.Extend(nil, b, c.Attachments(), c.ForDubbo())
	if err != nil {
		t.Fatal(err)
	}
	if next := dubboOf(t, longer, 0); next.Parent != c.Span || next.SofaTrace != c.ID() {
		t.Errorf("%+v after %+v", next, c)
	}
	f := dubbo.Parse(longer, len(longer))
	if target, err := new(dubbo.Reader).Target(&f); err != nil || string(target.Service) != "com.S" || string(target.Method) != "m" {
		t.Errorf("%v, %v", target, err)
	}
	for what, b := range map[string][]byte{
		"no attachments":       dubboFrame()[:len(dubboFrame())-2],
		"null for attachments": append(dubboFrame()[:len(dubboFrame())-2], 'N'),
		"more after them":      append(dubboFrame(), 'N'),
		"another serialization": func() []byte {
			b := dubboFrame()
			b[2] = 0xc6
			return b
		}(),
	} {
		f := dubbo.Parse(b, len(b))
		if c, err := OfDubbo(&dubbo.Reader{}, &f, 1000); err == nil {
			t.Errorf("%s: %+v", what, c)
		}
	}
}

// FuzzCall has what is written into any frame that can be read be read again, and
// nothing else be changed.
func FuzzCall(f *testing.F) {
	for _, b := range [][]byte{boltFrame(false), boltFrame(true, "service", "s"), boltFrame(true, "traceparent", aParent, "b3", "0"), dubboFrame(), dubboFrame("traceparent", aParent, "group", "g")} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if x, err := bolt.Size(b); err == nil && x.Len > 0 && x.Len == len(b) && len(b) < 1024 { // fewer pairs than are read
			p := bolt.Parse(b, x)
			if c, err := OfBolt(p.Header, 1000); err == nil {
				longer, err := bolt.Extend(nil, b, x, c.ForBolt())
				if err != nil {
					return
				}
				next, q, _ := boltOf(t, longer, 0)
				if !bytes.Equal(p.Content, q.Content) || !bytes.Equal(p.Class, q.Class) || !bytes.HasPrefix(q.Header, p.Header) || next.SofaTrace != c.ID() {
					t.Fatalf("%q became %q", b, longer)
				}
				n := len(b)
				if c.Rewrite() {
					bolt.SetID(b, x, p.ID)
					if again, _, _ := boltOf(t, b[:n], 0); again.Parent != c.Span {
						t.Fatalf("%+v after %+v", again, c)
					}
				}
			}
		}
		if n, err := dubbo.Size(b); err == nil && n > 0 && n == len(b) {
			p := dubbo.Parse(b, n)
			var r dubbo.Reader
			c, err := OfDubbo(&r, &p, 1000)
			if err != nil {
				return
			}
			before, clear := r.Target(&p)
			longer, err := dubbo.Extend(nil, b, c.Attachments(), c.ForDubbo())
			if err != nil {
				return
			}
			q := dubbo.Parse(longer, len(longer))
			after, err := new(dubbo.Reader).Target(&q)
			if (err == nil) != (clear == nil) || err == nil && (!bytes.Equal(before.Service, after.Service) || !bytes.Equal(before.Method, after.Method)) {
				t.Fatalf("%q is for %v, %q for %v, %v", b, before, longer, after, err)
			}
			if next, err := OfDubbo(&r, &q, 0); err == nil && next.SofaTrace != c.ID() {
				t.Fatalf("%+v after %+v", next, c)
			}
		}
	})
}
