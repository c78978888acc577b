package alone

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"

	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hessian"
)

const sofaClass = "com.alipay.sofa.rpc.core.request.SofaRequest"

// boltCall is a request as sofa-bolt-node writes it, of version 2 with its sum if
// sum is set.
func boltCall(kind bolt.Type, id uint32, service, method string, sum bool, argument string, pairs ...string) []byte {
	body := []byte("O\xbc" + sofaClass + "\x92")
	for _, s := range []string{"methodName", "targetServiceUniqueName"} {
		body = hessian.AppendString(body, s)
	}
	body = hessian.AppendString(hessian.AppendString(append(body, "o\x90"...), method), service)
	body = append(body, argument...)
	var header []byte
	for _, s := range pairs {
		header = append(binary.BigEndian.AppendUint32(header, uint32(len(s))), s...)
	}
	b := []byte{1, byte(kind)}
	if sum {
		b = []byte{2, 2, byte(kind)}
	}
	b = binary.BigEndian.AppendUint16(b, uint16(bolt.Call))
	b = binary.BigEndian.AppendUint32(append(b, 1), id)
	if b = append(b, bolt.Hessian2); sum {
		b = append(b, 1)
	}
	b = binary.BigEndian.AppendUint32(b, 30000)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sofaClass)))
	b = binary.BigEndian.AppendUint16(b, uint16(len(header)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	b = append(append(append(b, sofaClass...), header...), body...)
	if sum {
		b = append(b, 0, 0, 0, 0)
		x, err := bolt.Size(b)
		if err != nil {
			panic(err)
		}
		bolt.SetID(b, x, id)
	}
	return b
}

// boltReply is an answer whose content is text.
func boltReply(f *bolt.Frame, text string) []byte {
	b := []byte{f.Protocol}
	if f.Protocol == 2 {
		b = append(b, f.Version)
	}
	b = append(b, byte(bolt.Response), 0, byte(bolt.Reply), 1)
	b = binary.BigEndian.AppendUint32(b, f.ID)
	b = append(b, f.Codec)
	if f.Protocol == 2 {
		b = append(b, f.Switch)
	}
	b = append(b, 0, 0, 0, 0, 0, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
	b = append(b, text...)
	if f.Protocol == 2 && f.Switch&1 != 0 {
		b = append(b, 0, 0, 0, 0)
		x, err := bolt.Size(b)
		if err != nil {
			panic(err)
		}
		bolt.SetID(b, x, f.ID)
	}
	return b
}

func dubboCall(id uint64, twoWay bool, service, group, method, argument string) []byte {
	body := hessian.AppendString(nil, "2.0.2")
	for _, s := range []string{service, "1.0", method, "Ljava/lang/String;", argument} {
		body = hessian.AppendString(body, s)
	}
	body = append(body, 'H')
	for _, s := range []string{"path", service, "group", group, "version", "1.0"} {
		body = hessian.AppendString(body, s)
	}
	body = append(body, 'Z')
	flags := byte(0x82)
	if twoWay {
		flags |= 0x40
	}
	b := binary.BigEndian.AppendUint64([]byte{0xda, 0xbb, flags, 0}, id)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

func dubboReply(id uint64, text string) []byte {
	body := hessian.AppendString([]byte{0x91}, text)
	b := binary.BigEndian.AppendUint64([]byte{0xda, 0xbb, 0x02, byte(dubbo.OK)}, id)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

// rpcOrigin is a server of bolt or Dubbo that answers calls with its name and the
// id they had there, in no order.
type rpcOrigin struct {
	name    string
	dubbo   bool
	ln      net.Listener
	calls   atomic.Int64
	oneWays atomic.Int64
	beats   atomic.Int64
	conns   atomic.Int64
	held    chan struct{} // closed when calls of "hold" are answered

	seeing func(*wire, *rpcFrame) // is told of calls

	mu   sync.Mutex
	open []net.Conn
	seen map[uint64]bool
}

func newRPCOrigin(t testing.TB, name string, isDubbo bool) *rpcOrigin {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o := &rpcOrigin{name: name, dubbo: isDubbo, ln: ln, seen: map[uint64]bool{}, held: make(chan struct{})}
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			o.conns.Add(1)
			o.mu.Lock()
			o.open = append(o.open, c)
			o.mu.Unlock()
			go o.serve(c)
		}
	}()
	t.Cleanup(o.stop)
	return o
}

func (o *rpcOrigin) stop() {
	o.ln.Close()
	o.cut()
}

func (o *rpcOrigin) cut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, c := range o.open {
		c.Close()
	}
	o.open = nil
}

func (o *rpcOrigin) serve(c net.Conn) {
	w := &wire{dubbo: o.dubbo}
	r := &frameReader{conn: c, wire: w, most: 1 << 20, patient: patience, held: &holding{most: maxRPCHeld}}
	var mu sync.Mutex
	say := func(b []byte) { mu.Lock(); c.Write(b); mu.Unlock() }
	for {
		frame, err := r.next(time.Time{})
		var f rpcFrame
		if err == nil {
			err = w.read(frame, &f)
		}
		if err != nil {
			c.Close()
			return
		}
		switch {
		case f.kind == rpcAlive:
			o.beats.Add(1)
			say(w.appendLiving(nil, &f))
		case f.kind != rpcCall:
		case f.oneWay:
			o.oneWays.Add(1)
		default:
			o.calls.Add(1)
			if o.seeing != nil {
				o.seeing(w, &f)
			}
			text := fmt.Sprintf("%s %d", o.name, f.id)
			to, err := w.target(&f)
			if err != nil {
				text = err.Error()
			}
			switch string(to.method) {
			case "hang":
				continue
			case "large":
				text = strings.Repeat("l", 40<<10)
			}
			b := dubboReply(f.id, text)
			if !o.dubbo {
				b = boltReply(&f.bolt, text)
			}
			holds := string(to.method) == "hold" // the frame is the reader's
			go func() {
				if holds {
					<-o.held
				}
				say(b)
			}()
		}
	}
}

// rpcTester is a client.
type rpcTester struct {
	t testing.TB
	c net.Conn
	w *wire
	r *frameReader
}

func newRPCTester(t testing.TB, p *Proxy, name string, isDubbo bool) *rpcTester {
	t.Helper()
	c, err := net.Dial("tcp", p.Address(name).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	w := &wire{dubbo: isDubbo}
	return &rpcTester{t, c, w, &frameReader{conn: c, wire: w, most: 1 << 20, patient: patience, held: &holding{most: maxRPCHeld}}}
}

func (x *rpcTester) send(b ...[]byte) {
	x.t.Helper()
	if _, err := x.c.Write(bytes.Join(b, nil)); err != nil {
		x.t.Fatal(err)
	}
}

func (x *rpcTester) next() (f rpcFrame) {
	x.t.Helper()
	frame, err := x.r.next(time.Now().Add(patience))
	if err == nil {
		err = x.w.read(frame, &f)
	}
	if err != nil {
		x.t.Fatal(err)
	}
	return f
}

func (f *rpcFrame) text() string {
	if f.dubbo.Body != nil {
		return string(f.dubbo.Body)
	}
	return string(f.bolt.Content)
}

func rpcConfig(protocol, calls string, upstreams ...string) string {
	s := "version: 1\nlisteners:\n- name: rpc\n  address: 127.0.0.1:0\n  protocol: " + protocol + "\n  calls:\n" + calls + "\nupstreams:\n"
	for i := 0; i < len(upstreams); i += 2 {
		s += fmt.Sprintf("- {name: %s, protocol: %s, balance: round-robin, endpoints: [%s]}\n", upstreams[i], protocol, upstreams[i+1])
	}
	return s
}

func endpointsOf(os ...*rpcOrigin) string {
	var all []string
	for _, o := range os {
		all = append(all, fmt.Sprintf("{address: %q}", o.ln.Addr()))
	}
	return strings.Join(all, ", ")
}

func callOf(isDubbo bool, id int, service, method string) []byte {
	if isDubbo {
		return dubboCall(uint64(id), true, service, "g", method, "x")
	}
	return boltCall(bolt.Request, uint32(id), service+":1.0", method, id%2 == 0, "\x01x")
}

func TestRPC(t *testing.T) {
	for protocol, isDubbo := range map[string]bool{"bolt": false, "dubbo": true} {
		t.Run(protocol, func(t *testing.T) {
			a, b, other := newRPCOrigin(t, "a", isDubbo), newRPCOrigin(t, "b", isDubbo), newRPCOrigin(t, "other", isDubbo)
			log := t.TempDir() + "/log"
			p := serve(t, "access_log: {path: "+log+"}\n"+rpcConfig(protocol, `
  - {service: com.other.*, methods: [m, n], version: "1.0", upstream: other}
  - {service: com.limited, upstream: other, rate: {requests: 1, per: 1h}}
  - {service: com.test.S, upstream: up}`, "up", endpointsOf(a, b), "other", endpointsOf(other)))
			x, y := newRPCTester(t, p, "rpc", isDubbo), newRPCTester(t, p, "rpc", isDubbo)
			// Both use the same ids, all at once.
			var want []int
			for i := range 50 {
				x.send(callOf(isDubbo, i, "com.test.S", "m"))
				y.send(callOf(isDubbo, i, "com.test.S", "m"))
				want = append(want, i)
			}
			from := map[string]int{} // of both: in step, each may have a server of its own
			for _, c := range []*rpcTester{x, y} {
				got := map[uint64]bool{}
				for range want {
					f := c.next()
					if f.kind != rpcAnswer || !f.ok || got[f.id] {
						t.Fatalf("answer %+v twice=%v", f, got[f.id])
					}
					got[f.id] = true
					from[strings.TrimFunc(strings.Fields(f.text())[0], func(r rune) bool { return r < ' ' || r == utf8.RuneError })]++ // what Hessian puts around it
				}
				if len(got) != len(want) {
					t.Errorf("%d answers", len(got))
				}
			}
			if len(from) != 2 {
				t.Errorf("answers from %v", from)
			}
			if n := a.calls.Load() + b.calls.Load(); a.calls.Load() != 50 || n != 100 || a.conns.Load() != 1 || b.conns.Load() != 1 {
				t.Errorf("%d and %d calls over %d and %d connections", a.calls.Load(), n-a.calls.Load(), a.conns.Load(), b.conns.Load())
			}
			x.send(callOf(isDubbo, 7, "com.other.T", "n"))
			if f := x.next(); !strings.Contains(f.text(), "other") || f.id != 7 {
				t.Errorf("by service and method: %+v", f)
			}
			for _, refused := range []struct {
				call  []byte
				bolt  bolt.Status
				dubbo dubbo.Status
			}{
				{callOf(isDubbo, 8, "com.other.T", "nowhere"), bolt.NoProcessor, dubbo.ServiceNotFound},
				{callOf(isDubbo, 8, "com.nobody", "m"), bolt.NoProcessor, dubbo.ServiceNotFound},
			} {
				x.send(refused.call)
				if f := x.next(); f.id != 8 || !isDubbo && f.bolt.Status != refused.bolt || isDubbo && f.dubbo.Status != refused.dubbo {
					t.Errorf("refusal %+v", f)
				}
			}
			x.send(callOf(isDubbo, 9, "com.limited", "m"))
			x.next()
			x.send(callOf(isDubbo, 9, "com.limited", "m"))
			if f := x.next(); f.id != 9 || !isDubbo && f.bolt.Status != bolt.Busy || isDubbo && f.dubbo.Status != dubbo.Exhausted {
				t.Errorf("over the rate: %+v", f)
			}
			// The proxy answers heartbeats, between calls.
			x.send(x.w.appendBeat(nil, 11))
			if f := x.next(); f.kind != rpcLiving || f.id != 11 {
				t.Errorf("heartbeat: %+v", f)
			}
			waitFor(t, "line in the log", func() bool {
				b, _ := os.ReadFile(log)
				return strings.Contains(string(b), `"com.other.T:1.0#n" 200`)
			})
		})
	}
}

// TestRPCDies has a server go away with calls under way: each is answered, none is
// sent again.
func TestRPCDies(t *testing.T) {
	for protocol, isDubbo := range map[string]bool{"bolt": false, "dubbo": true} {
		t.Run(protocol, func(t *testing.T) {
			o := newRPCOrigin(t, "o", isDubbo)
			p := serve(t, rpcConfig(protocol, "  - {upstream: up}", "up", endpointsOf(o)))
			x := newRPCTester(t, p, "rpc", isDubbo)
			for i := range 20 {
				x.send(callOf(isDubbo, i, "com.test.S", "hang"))
			}
			waitFor(t, "20 calls", func() bool { return o.calls.Load() == 20 })
			o.cut()
			got := map[uint64]bool{}
			for range 20 {
				f := x.next()
				if f.ok || got[f.id] || !isDubbo && f.bolt.Status != bolt.Closed || isDubbo && f.dubbo.Status != dubbo.ServerError {
					t.Fatalf("%+v", f)
				}
				got[f.id] = true
			}
			if n := o.calls.Load(); n != 20 {
				t.Errorf("%d calls reached the server", n)
			}
			// The next call is served over another connection, once the endpoint is back in.
			waitFor(t, "call that is served", func() bool {
				x.send(callOf(isDubbo, 99, "com.test.S", "m"))
				f := x.next()
				return f.ok && f.id == 99
			})
		})
	}
}

func TestRPCLate(t *testing.T) {
	o := newRPCOrigin(t, "o", false)
	p := serve(t, rpcConfig("bolt", "  - {upstream: up, timeout: 100ms}", "up", endpointsOf(o)))
	x := newRPCTester(t, p, "rpc", false)
	x.send(callOf(false, 5, "com.test.S", "hang"))
	if f := x.next(); f.id != 5 || f.bolt.Status != bolt.Timeout {
		t.Errorf("%+v", f)
	}
}

// TestRPCOneWay sends calls that nobody answers: each reaches a server once, and
// the ends of client and proxy do not lose them.
func TestRPCOneWay(t *testing.T) {
	o := newRPCOrigin(t, "o", false)
	p := serve(t, rpcConfig("bolt", "  - {upstream: up}", "up", endpointsOf(o)))
	x := newRPCTester(t, p, "rpc", false)
	for i := range 100 {
		x.send(boltCall(bolt.OneWay, uint32(i), "com.test.S:1.0", "m", i%3 == 0, "\x01x"))
	}
	x.send(callOf(false, 1, "com.test.S", "m"))
	if f := x.next(); !f.ok {
		t.Errorf("%+v", f)
	}
	waitFor(t, "100 calls", func() bool { return o.oneWays.Load() == 100 })
	x.c.(*net.TCPConn).CloseWrite()
	if _, err := x.c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("end: %v", err)
	}
	if n := o.oneWays.Load(); n != 100 {
		t.Errorf("%d calls", n)
	}
}

// TestRPCHalfClose has a client that says no more get the answers it waits for.
func TestRPCHalfClose(t *testing.T) {
	o := newRPCOrigin(t, "o", true)
	p := serve(t, rpcConfig("dubbo", "  - {upstream: up}", "up", endpointsOf(o)))
	x := newRPCTester(t, p, "rpc", true)
	x.send(callOf(true, 1, "com.test.S", "m"), callOf(true, 2, "com.test.S", "m"))
	x.c.(*net.TCPConn).CloseWrite()
	x.next()
	x.next()
	if _, err := x.c.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("end: %v", err)
	}
}

// TestRPCPieces sends frames in pieces of every size, and large ones.
func TestRPCPieces(t *testing.T) {
	o := newRPCOrigin(t, "o", false)
	p := serve(t, rpcConfig("bolt", "  - {service: com.*, upstream: up}", "up", endpointsOf(o)))
	x := newRPCTester(t, p, "rpc", false)
	frame := boltCall(bolt.Request, 3, "com.test.S:1.0", "m", true, "\x01x")
	for n := 1; n < len(frame); n += 7 {
		x.send(frame[:n])
		x.send(frame[n:])
		if f := x.next(); !f.ok || f.id != 3 {
			t.Fatalf("cut at %d: %+v", n, f)
		}
	}
	large := boltCall(bolt.Request, 4, "com.test.S:1.0", "m", true, strings.Repeat("\x01x", 300<<10))
	x.send(large, frame)
	for range 2 {
		if f := x.next(); !f.ok {
			t.Fatalf("large: %+v", f)
		}
	}
	waitFor(t, "end of what is held for large frames", func() bool { return p.held.n.Load() == 0 })
	bad := append([]byte(nil), frame...)
	bad[len(bad)-1] ^= 1
	x.send(bad)
	if _, err := x.r.next(time.Now().Add(patience)); err != io.EOF {
		t.Errorf("a wrong sum: %v", err)
	}
}
