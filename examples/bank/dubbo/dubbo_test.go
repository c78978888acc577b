package dubbo

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

// The frames below were written by dubbo-remoting 2.1.4.
const (
	heartbeat = "dabbe2000000000000000002000000014e"
	request   = `dabbc20000000000000000010000005e 05 "5.3.0" 0a "com.test.S" 03 "1.0"
 01 "m" 12 "Ljava/lang/String;" 01 "x" 48 05 "dubbo" 05 "5.3.0" 05 "group" 01 "g"
 04 "path" 0a "com.test.S" 07 "version" 03 "1.0" 5a`
	response = `dabb021400000000000000010000000491026f6b`
)

func TestGolden(t *testing.T) {
	req := Request{Service: "com.test.S", Version: "1.0", Method: "m", Args: []any{"x"}}
	body, err := appendRequest(req, [][2]string{{"dubbo", "5.3.0"}, {"group", "g"}, {"path", "com.test.S"}, {"version", "1.0"}})
	if err != nil {
		t.Fatal(err)
	}
	f := frame{flags: flagRequest | flagTwoWay | hessian2, id: 1, body: body}
	if got, want := f.append(nil), golden(t, request); !bytes.Equal(got, want) {
		t.Errorf("wrote\n%x, want\n%x", got, want)
	}
	read, err := readFrame(bytes.NewReader(golden(t, request)))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseRequest(read.body); err != nil || !reflect.DeepEqual(got, req) {
		t.Errorf("read %+v, %v", got, err)
	}
	ok := func(context.Context, Request) (string, error) { return "ok", nil }
	if got := answer(t.Context(), read, ok).append(nil); !bytes.Equal(got, golden(t, response)) {
		t.Errorf("answered %x", got)
	}
	read, err = readFrame(bytes.NewReader(golden(t, response)))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := parseValue(read.body); got != "ok" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	read, err = readFrame(bytes.NewReader(golden(t, heartbeat)))
	if err != nil {
		t.Fatal(err)
	}
	if got := answer(t.Context(), read, ok); got.flags != flagEvent|hessian2 || got.id != 2 || got.status != StatusOK {
		t.Errorf("heartbeat answered by %+v", got)
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
		done <- Serve(ctx, ln, func(_ context.Context, r Request) (string, error) {
			if r.Args[1] != int64(1<<40) {
				return "", errors.New("no")
			}
			return r.Args[0].(string), nil
		})
	}()
	c := NewClient(ln.Addr().String())
	defer c.Close()
	if v, err := c.Call(t.Context(), Request{Service: "s", Version: "1", Method: "m", Args: []any{"text", int64(1 << 40)}}); v != "text" || err != nil {
		t.Fatalf("got %q, %v", v, err)
	}
	var refused *call.Refusal
	if _, err := c.Call(t.Context(), Request{Args: []any{"text", int64(2)}}); !errors.As(err, &refused) {
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
	for _, s := range []string{heartbeat, request, response} {
		f.Add(golden(f, s))
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		fr, err := readFrame(bytes.NewReader(raw))
		if err != nil {
			return
		}
		if again, err := readFrame(bytes.NewReader(fr.append(nil))); err != nil || !reflect.DeepEqual(again, fr) {
			t.Errorf("%+v reads back as %+v, %v", fr, again, err)
		}
		if req, err := parseRequest(fr.body); err == nil && len(req.Args) > maxBody {
			t.Errorf("%d arguments", len(req.Args))
		}
		parseValue(fr.body)
	})
}
