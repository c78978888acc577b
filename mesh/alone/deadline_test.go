package alone

import (
	"context"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"hauberk.dev/mesh/h2frame"
)

func TestGRPCTimeout(t *testing.T) {
	for v, want := range map[string]time.Duration{"1S": time.Second, "250m": 250 * time.Millisecond, "99999999H": maxDeadline, "10u": 10 * time.Microsecond} {
		if got, ok := grpcTimeout([]byte(v)); !ok || got != want {
			t.Errorf("%s: %v", v, got)
		}
	}
	for _, v := range []string{"", "S", "1", "1s", "-1S", "123456789S", "1 S"} {
		if got, ok := grpcTimeout([]byte(v)); ok {
			t.Errorf("%q: %v", v, got)
		}
	}
}

// A server is never told less than what the client waits.
func TestAppendTimeout(t *testing.T) {
	for left, want := range map[time.Duration]string{-1: "1u", 0: "1u", 1: "1u", time.Microsecond + 1: "2u", time.Minute: "60000000u",
		100*time.Second + 1: "100001m", maxDeadline: "86400000m"} {
		if got := string(appendTimeout(nil, left)); got != want+"\r\n" {
			t.Errorf("%v: %q, not %q", left, got, want)
		}
	}
}

// TestDeadline has clients say how long they wait: servers are told what is left of
// it, and who does not answer in time is not waited for.
func TestDeadline(t *testing.T) {
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			io.Copy(io.Discard, r.Body)
			<-r.Context().Done()
			return
		}
		io.WriteString(w, r.Header.Get("X-Wait"))
	})
	p := serve(t, one("  - {prefix: /, upstream: up, deadline: X-Wait}", upstreamOf(up)))
	wait := func(ms string) func(*http.Request) {
		return func(r *http.Request) { r.Header.Set("X-Wait", ms) }
	}
	_, told := get(t, p, "GET", "/", nil, wait("20000"))
	if n, err := strconv.Atoi(told); err != nil || n > 20000 || n < 1 {
		t.Errorf("the server is told %q", told)
	}
	if resp, body := get(t, p, "GET", "/slow", nil, wait("50")); resp.StatusCode != 504 {
		t.Errorf("%d %q", resp.StatusCode, body)
	}
	address, _ := serviceOf(t, "a")
	c := grpcTo(t, serve(t, one("  - {prefix: /, upstream: up}", upstreamTwo(address))))
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if err := c.Invoke(ctx, "/test.Echo/Hang", wrapperspb.Bytes(nil), new(wrapperspb.BytesValue)); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("%v", err)
	}
}

// TestPerTry tries again what took one server too long.
func TestPerTry(t *testing.T) {
	var asked atomic.Int64
	up := origin(t, func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			<-r.Context().Done()
			return
		}
		io.WriteString(w, "second")
	})
	p := serve(t, one("  - {prefix: /, upstream: up, retries: {attempts: 3, per_try: 200ms}}", upstreamOf(up)+"  outlier: {unreachable: 100}"))
	if resp, body := get(t, p, "GET", "/", nil, nil); resp.StatusCode != 200 || body != "second" || asked.Load() < 2 {
		t.Errorf("%d %q after %d", resp.StatusCode, body, asked.Load())
	}
	asked.Store(0)
	if resp, _ := get(t, p, "POST", "/", nil, nil); resp.StatusCode != 504 || asked.Load() != 1 {
		t.Errorf("%d after %d: what may not be sent twice", resp.StatusCode, asked.Load())
	}
}

// TestWebSocket goes through the proxy with somebody else's WebSocket.
func TestWebSocket(t *testing.T) {
	h := websocket.Handler(func(c *websocket.Conn) {
		var b []byte
		for websocket.Message.Receive(c, &b) == nil && websocket.Message.Send(c, b) == nil {
		}
	})
	up := origin(t, h.ServeHTTP)
	p := serve(t, one("  - {prefix: /, upstream: up, cache: {}}", upstreamOf(up)))
	address := p.Address("web").String()
	c, err := websocket.Dial("ws://"+address+"/chat", "", "http://"+address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(patience))
	for _, n := range []int{0, 1, 1000, 100_000} {
		sent := make([]byte, n)
		for i := range sent {
			sent[i] = byte(i)
		}
		if err := websocket.Message.Send(c, sent); err != nil {
			t.Fatal(err)
		}
		var got []byte
		if err := websocket.Message.Receive(c, &got); err != nil || string(got) != string(sent) {
			t.Fatalf("%d of %d bytes: %v", len(got), n, err)
		}
	}
}

// canceller is a server that cancels each request when its time is over by its own
// clock, which may be a little ahead.
func canceller(t *testing.T, after time.Duration) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go cancelCalls(c, after)
		}
	}()
	return ln.Addr().String()
}

func cancelCalls(c net.Conn, after time.Duration) {
	defer c.Close()
	b := make([]byte, len(h2frame.Preface))
	if _, err := io.ReadFull(c, b); err != nil {
		return
	}
	c.Write(h2frame.Append(nil, h2frame.Settings, 0, 0, nil))
	for head := make([]byte, h2frame.HeaderLen); ; {
		if _, err := io.ReadFull(c, head); err != nil {
			return
		}
		f := h2frame.Parse(head)
		if _, err := io.CopyN(io.Discard, c, int64(f.Length)); err != nil {
			return
		}
		if f.Kind == h2frame.Headers {
			time.Sleep(after)
			c.Write(h2frame.AppendWord(nil, h2frame.Reset, f.Stream, uint32(h2frame.CodeCancel)))
		}
	}
}

// TestCancelledInTime has a server go by the time that it was told a moment before
// the proxy does: nothing is wrong with it, and the client hears that time is over.
func TestCancelledInTime(t *testing.T) {
	p := serve(t, one("  - {prefix: /, upstream: up, deadline: X-Timeout-Ms}", upstreamTwo(canceller(t, 49_500*time.Microsecond))))
	for range 10 {
		resp, _ := get(t, p, "GET", "/", nil, func(r *http.Request) { r.Header.Set("X-Timeout-Ms", "50") })
		if resp.StatusCode != 504 {
			t.Fatalf("status %d", resp.StatusCode)
		}
	}
	if n := p.world.Load().upstreams["up"].endpoints[0].failures.Load(); n != 0 {
		t.Errorf("%d failures are the server's", n)
	}
}
