package bolt

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"net"
	"reflect"
	"strings"
	"testing"
	"time"

	"example.com/bank/call"
)

// golden turns a frame written as hexadecimal with quoted ASCII into bytes.
func golden(t testing.TB, s string) []byte {
	t.Helper()
	var out []byte
	for i, part := range strings.Split(s, `"`) {
		if i%2 == 1 {
			out = append(out, part...)
			continue
		}
		b, err := hex.DecodeString(strings.Join(strings.Fields(part), ""))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	return out
}

// The frames below were written by sofa-bolt-node 2.0.1.
const (
	heartbeat = "0101000001000000020100000bb80000000000000000"
	ack       = "0100000001000000020100000000000000000000"

	request = `0101000101000000010100000bb8002c0024000000c2
 "com.alipay.sofa.rpc.core.request.SofaRequest" 00000007 "service" 00000015 "com.alipay.test.S:1.0"
 4fbc "com.alipay.sofa.rpc.core.request.SofaRequest" 95 0a "methodName" 0d "methodArgSigs" 17 "targetServiceUniqueName"
 0d "targetAppName" 0c "requestProps" 6f90 01 "m" 567400115b "java.lang.String"
 6e0110 "java.lang.String" 7a 15 "com.alipay.test.S:1.0" 4e4e 01 "x"`

	response = `010000020100000001010000002e000000000064
 "com.alipay.sofa.rpc.core.response.SofaResponse"
 4fbe "com.alipay.sofa.rpc.core.response.SofaResponse" 94 07 "isError" 08 "errorMsg" 0b "appResponse" 0d "responseProps"
 6f90 46 4e 02 "ok" 4e`
)

func TestGoldenRequest(t *testing.T) {
	want := golden(t, request)
	req := Request{Service: "com.alipay.test.S:1.0", Method: "m", Args: []any{"x"}}
	content, err := appendRequest(nil, req)
	if err != nil {
		t.Fatal(err)
	}
	f := frame{kind: typeRequest, command: commandRequest, id: 1, timeout: 3000, class: requestClass, header: []pair{{"service", req.Service}}, content: content}
	if got := f.append(nil); !bytes.Equal(got, want) {
		t.Errorf("wrote\n%x, want\n%x", got, want)
	}
	read, err := readFrame(bytes.NewReader(want))
	if err != nil || !reflect.DeepEqual(read, f) {
		t.Fatalf("read %+v, %v", read, err)
	}
	if got, err := parseRequest(read.content); err != nil || !reflect.DeepEqual(got, req) {
		t.Errorf("read %+v, %v", got, err)
	}
}

func TestGoldenResponse(t *testing.T) {
	want := golden(t, response)
	content, err := appendResponse(nil, Response{Value: "ok"})
	if err != nil {
		t.Fatal(err)
	}
	f := frame{kind: typeResponse, command: commandResponse, id: 1, class: responseClass, content: content}
	if got := f.append(nil); !bytes.Equal(got, want) {
		t.Errorf("wrote\n%x, want\n%x", got, want)
	}
	if got, err := parseResponse(content); err != nil || got.Value != "ok" || got.Error != "" {
		t.Errorf("read %+v, %v", got, err)
	}
}

func TestGoldenHeartbeat(t *testing.T) {
	f, err := readFrame(bytes.NewReader(golden(t, heartbeat)))
	if err != nil {
		t.Fatal(err)
	}
	if got := answer(t.Context(), f, nil).append(nil); !bytes.Equal(got, golden(t, ack)) {
		t.Errorf("answered %x", got)
	}
}

func TestValues(t *testing.T) {
	for _, v := range []any{"", "ok", strings.Repeat("é", 31), strings.Repeat("x", 40000), "𝄞 clef", int64(0), int64(-1 << 63), int64(1<<63 - 1), true, false, nil} {
		b, err := appendValue(nil, v)
		if err != nil {
			t.Fatal(err)
		}
		d := &decoder{b: b}
		if got := d.value(0); got != v || d.err != nil || len(d.b) != 0 {
			t.Errorf("%v reads as %v, %v", v, got, d.err)
		}
	}
	for _, n := range []int32{-16, 47, 48, -17, 2047, -2048, 2048, 1 << 30} {
		d := &decoder{b: appendInt(nil, n)}
		if got := d.value(0); got != int64(n) || d.err != nil {
			t.Errorf("%d reads as %v, %v", n, got, d.err)
		}
	}
}

func TestServe(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		done <- Serve(ctx, ln, func(_ context.Context, r Request) (any, error) {
			if r.Method == "no" {
				return nil, errors.New("refused here")
			}
			return r.Method, nil
		})
	}()
	c := NewClient(ln.Addr().String())
	defer c.Close()
	for range 3 {
		if v, err := c.Call(t.Context(), Request{Service: "s", Method: "yes", Args: []any{int64(7), "x"}}); v != "yes" || err != nil {
			t.Fatalf("got %v, %v", v, err)
		}
	}
	var refused *call.Refusal
	if _, err := c.Call(t.Context(), Request{Service: "s", Method: "no"}); !errors.As(err, &refused) || refused.Reason != "refused here" {
		t.Errorf("got %v", err)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("Serve does not end")
	}
}

func FuzzFrame(f *testing.F) {
	for _, s := range []string{heartbeat, ack, request, response} {
		f.Add(golden(f, s))
	}
	f.Add(golden(f, "0101000101000000010100000bb8002c0024ffffffff"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		fr, err := readFrame(bytes.NewReader(raw))
		if err != nil {
			return
		}
		again, err := readFrame(bytes.NewReader(fr.append(nil)))
		if err != nil || again.id != fr.id || !bytes.Equal(again.content, fr.content) {
			t.Errorf("%+v reads back as %+v, %v", fr, again, err)
		}
		if req, err := parseRequest(fr.content); err == nil {
			if _, err := appendRequest(nil, req); err != nil {
				t.Errorf("%+v cannot be written: %v", req, err)
			}
		}
		parseResponse(fr.content)
	})
}
