package balance

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"hauberk.dev/mesh/h2frame"
)

func listen(t *testing.T) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var dial Dialer = new(net.Dialer).DialContext

func TestProbeTCP(t *testing.T) {
	ln := listen(t)
	if err := ProbeTCP(soon(t), dial, ln.Addr().String()); err != nil {
		t.Error(err)
	}
	ln.Close()
	if err := ProbeTCP(soon(t), dial, ln.Addr().String()); err == nil {
		t.Error("a closed port is well")
	}
}

func TestProbeHTTP(t *testing.T) {
	ln := listen(t)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Host != "shop" {
			w.WriteHeader(400)
		}
		if r.URL.Path != "/well" {
			w.WriteHeader(503)
		}
	})}
	go srv.Serve(ln)
	defer srv.Close()
	at := ln.Addr().String()
	if err := ProbeHTTP(soon(t), dial, at, "shop", "/well"); err != nil {
		t.Error(err)
	}
	for _, c := range [][2]string{{"shop", "/ill"}, {"other", "/well"}, {"shop", "well"}, {"shop", "/we ll"}, {"a\r\nb: c", "/well"}} {
		if err := ProbeHTTP(soon(t), dial, at, c[0], c[1]); err == nil {
			t.Errorf("%q is well", c)
		}
	}
}

// answers is a dialer to a server that says one thing and waits.
func answers(said string) Dialer {
	return func(context.Context, string, string) (net.Conn, error) {
		here, there := net.Pipe()
		go func() {
			go io.Copy(io.Discard, there)
			io.WriteString(there, said)
			there.Close()
		}()
		return here, nil
	}
}

func TestProbeHTTPHostile(t *testing.T) {
	for _, said := range []string{"", "HTTP/1.1", "HTTP/1.1 2000 OK\r\n", "HTTP/2.0 200 OK\r\n", "HTTP/1.1 099 x\r\n", "SSH-2.0\r\n", strings.Repeat("x", 1<<20)} {
		if err := ProbeHTTP(soon(t), answers(said), "", "h", "/"); err == nil {
			t.Errorf("%.20q is well", said)
		}
	}
	if err := ProbeHTTP(soon(t), answers("HTTP/1.0 204\r\n\r\n"), "", "h", "/"); err != nil {
		t.Error(err)
	}
	// One that never answers is given up with the context.
	ctx, cancel := context.WithCancel(t.Context())
	here, there := net.Pipe()
	defer there.Close()
	go io.Copy(io.Discard, there)
	time.AfterFunc(10*time.Millisecond, cancel)
	err := ProbeHTTP(ctx, func(context.Context, string, string) (net.Conn, error) { return here, nil }, "", "h", "/")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// gRPC's own health server is understood.
func TestProbeGRPC(t *testing.T) {
	ln := listen(t)
	srv := grpc.NewServer()
	h := health.NewServer()
	h.SetServingStatus("ill", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	h.SetServingStatus("well", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(srv, h)
	go srv.Serve(ln)
	defer srv.Stop()
	for service, want := range map[string]string{"": "", "well": "", "ill": "serving status 2", "nobody": `grpc-status "5"`} {
		err := ProbeGRPC(soon(t), dial, ln.Addr().String(), "shop", service)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", service, err, want)
		}
	}
}

// golden is a server's whole answer that it is serving.
func golden(body string) []byte {
	var block, trailer bytes.Buffer
	e := hpack.NewEncoder(&block)
	e.WriteField(hpack.HeaderField{Name: ":status", Value: "200"})
	hpack.NewEncoder(&trailer).WriteField(hpack.HeaderField{Name: "grpc-status", Value: "0"})
	b := h2frame.Append(nil, h2frame.Settings, 0, 0, nil)
	b = h2frame.Append(b, h2frame.Ping, 0, 0, make([]byte, 8))
	b = h2frame.Append(b, h2frame.Headers, 0, 1, block.Bytes()[:1])
	b = h2frame.Append(b, h2frame.Continuation, h2frame.FlagEndHeaders, 1, block.Bytes()[1:])
	b = h2frame.Append(b, h2frame.Data, h2frame.FlagPadded, 1, []byte("\x01"+body+"\x00"))
	return h2frame.Append(b, h2frame.Headers, h2frame.FlagEndStream|h2frame.FlagEndHeaders, 1, trailer.Bytes())
}

const serving = "\x00\x00\x00\x00\x02\x08\x01"

// FuzzHealthAnswer reads what any server may send.
func FuzzHealthAnswer(f *testing.F) {
	f.Add(golden(serving))
	f.Add(golden("\x00\x00\x00\x00\x02\x08\x02"))
	f.Add(golden("\x00\x00\x00\x00\x03\x0a\x01x"))
	f.Add(h2frame.Append(nil, h2frame.GoAway, 0, 0, make([]byte, 8)))
	f.Add(h2frame.Append(nil, h2frame.Reset, 0, 1, make([]byte, 4)))
	f.Add(h2frame.Append(nil, h2frame.Headers, h2frame.FlagPadded|h2frame.FlagPriority, 1, []byte{9, 0}))
	f.Fuzz(func(t *testing.T, raw []byte) {
		a := &healthAnswer{}
		a.fields = hpack.NewDecoder(4096, a.field)
		if err := a.read(io.LimitReader(bytes.NewReader(raw), maxAnswer), io.Discard); err == nil {
			a.verdict()
		}
		if len(a.body)+len(a.block) > maxAnswer {
			t.Errorf("%d bytes are kept", len(a.body)+len(a.block))
		}
	})
}

func TestHealthAnswerGolden(t *testing.T) {
	for body, well := range map[string]bool{serving: true, "\x00\x00\x00\x00\x02\x08\x02": false, "\x00\x00\x00\x00\x00": false, "\x01\x00\x00\x00\x02\x08\x01": false, "\x00\x00\x00\x00\x02\x08": false} {
		err := ProbeGRPC(soon(t), answers(string(golden(body))), "", "a", "")
		if (err == nil) != well {
			t.Errorf("%x: %v", body, err)
		}
	}
}

// Heartbeats are answered as sofa-bolt-node and dubbo-remoting answer them, or
// not; whole, and byte by byte.
func TestProbeRPC(t *testing.T) {
	const boltAck, dubboAck = "\x01\x00\x00\x00\x01\x00\x00\x00\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", "\xda\xbb\x22\x14\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x01N"
	probes := map[string]func(context.Context, Dialer, string) error{"bolt": ProbeBolt, "dubbo": ProbeDubbo}
	for _, c := range []struct {
		protocol, said string
		well           bool
	}{
		{"bolt", boltAck, true}, {"dubbo", dubboAck, true},
		{"bolt", dubboAck, false}, {"dubbo", boltAck, false},
		{"bolt", boltAck[:19], false}, {"dubbo", dubboAck[:16], false}, {"bolt", "", false}, {"dubbo", "", false},
		{"bolt", strings.Replace(boltAck, "\x00\x00\x00\x01\x01\x00\x00", "\x00\x00\x00\x02\x01\x00\x00", 1), false}, // another's
		{"bolt", boltAck[:11] + "\x04" + boltAck[12:], false},                                                        // busy
		{"dubbo", strings.Replace(dubboAck, "\x14", "\x64", 1), false},                                               // exhausted
		{"dubbo", dubboHeartbeat, false}, {"bolt", boltHeartbeat, false},                                             // an echo
		{"dubbo", "\xda\xbb\x02\x14\x00\x00\x00\x00\x00\x00\x00\x01\x00\x7f\xff\xff", false},
	} {
		if err := probes[c.protocol](soon(t), answers(c.said), ""); (err == nil) != c.well {
			t.Errorf("%s: %x: %v", c.protocol, c.said, err)
		}
	}
	slow := func(context.Context, string, string) (net.Conn, error) {
		here, there := net.Pipe()
		go func() {
			defer there.Close()
			io.ReadFull(there, make([]byte, len(boltHeartbeat)))
			for i := range boltAck {
				io.WriteString(there, boltAck[i:i+1])
			}
		}()
		return here, nil
	}
	if err := ProbeBolt(soon(t), slow, ""); err != nil {
		t.Errorf("byte by byte: %v", err)
	}
}
