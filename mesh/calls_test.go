package mesh

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/trace"
	"hauberk.dev/plan"
)

const (
	aTrace  = "0af7651916cd43dd8448eb211c80319c"
	aSpan   = "b7ad6b7169203331"
	aParent = "00-" + aTrace + "-" + aSpan + "-01"
)

// withPairs is a call whose header, or attachments, say more.
func withPairs(t testing.TB, protocol string, frame []byte, pairs ...string) []byte {
	t.Helper()
	var all [][2]string
	for i := 0; i < len(pairs); i += 2 {
		all = append(all, [2]string{pairs[i], pairs[i+1]})
	}
	var err error
	if protocol == "bolt" {
		x, _ := bolt.Size(frame)
		frame, err = bolt.Extend(nil, frame, x, all)
	} else {
		f := dubbo.Parse(frame, len(frame))
		end := 0
		if end, err = new(dubbo.Reader).Attachments(&f, func([]byte, []byte, bool) {}); err == nil {
			frame, err = dubbo.Extend(nil, frame, end, all)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return frame
}

// tracedServer answers calls by their methods, and tells where each stood in its
// trace.
type tracedServer struct {
	bolt bool
	seen chan trace.Call
	held chan func() // methods "held" are answered by it
}

func (s *tracedServer) one(c net.Conn) error {
	var raw bytes.Buffer
	from := io.TeeReader(c, &raw)
	var call trace.Call
	var method string
	var answer func(well bool) []byte
	if s.bolt {
		f, err := readBolt(from)
		if err != nil {
			return err
		}
		x, _ := bolt.Size(raw.Bytes())
		var sum bolt.Sum
		if sum.Begin(x); x.CRC && sum.Add(raw.Bytes()) != nil {
			return fmt.Errorf("the sum is wrong")
		}
		call, _ = trace.OfBolt(f.Header, 0)
		to, err := new(bolt.Reader).Target(&f)
		if err != nil {
			return err
		}
		method = string(to.Method)
		answer = func(well bool) []byte {
			if well {
				return bolt.AppendError(nil, &f, bolt.OK, "done")
			}
			return bolt.AppendError(nil, &f, bolt.ServerException, "no")
		}
	} else {
		f, err := readDubbo(from)
		if err != nil {
			return err
		}
		var r dubbo.Reader
		call, _ = trace.OfDubbo(&r, &f, 0)
		to, err := new(dubbo.Reader).Target(&f)
		if err != nil {
			return err
		}
		method = string(to.Method)
		answer = func(well bool) []byte {
			if well {
				return dubbo.AppendError(nil, &f, dubbo.OK, "done")
			}
			return dubbo.AppendError(nil, &f, dubbo.ServerError, "no")
		}
	}
	s.seen <- call
	switch method {
	case "never":
		return nil
	case "held":
		s.held <- func() { c.Write(answer(true)) }
		return nil
	}
	_, err := c.Write(answer(method != "fails"))
	return err
}

// TestTracedCalls carries the traces of calls on, in their place or in a longer
// frame, tells a collector of each with its answer, and counts each once.
func TestTracedCalls(t *testing.T) {
	for _, protocol := range []string{"bolt", "dubbo"} {
		t.Run(protocol, func(t *testing.T) { tracedCalls(t, protocol) })
	}
}

func tracedCalls(t *testing.T, protocol string) {
	log := &safeBuffer{}
	w := newWorldOf(t, Options{Requests: log})
	address, spans := collector(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 1000, Protocol: protocol}}, []plan.Rule{{Name: "open", From: []string{"*"}}}, nil)
	w.plan.Observe = &plan.Observe{Log: "json", Traces: &plan.Traces{Collector: address, PerMille: 1000}}
	w.apply()
	server := &tracedServer{bolt: protocol == "bolt", seen: make(chan trace.Call, 1), held: make(chan func(), 1)}
	go new(rpcServer).listen(b.listen(t, 1000), server.one)
	id, ok := 0, map[string]string{"bolt": "0", "dubbo": "20"}[protocol]
	call := func(method string, sum bool, argument string, pairs ...string) []byte {
		id++
		frame := boltCall(uint32(id), sofaService, method, sum, argument)
		if protocol == "dubbo" {
			frame = dubboCall(uint64(id), "com.test.S", argument, method)
		}
		if len(pairs) > 0 {
			frame = withPairs(t, protocol, frame, pairs...)
		}
		return frame
	}
	c := web.mustDial(t, "10.99.0.2:1000")
	c.SetDeadline(time.Now().Add(time.Minute))
	read := func() {
		t.Helper()
		var got uint64
		var err error
		if protocol == "bolt" {
			var f bolt.Frame
			f, err = readBolt(c)
			got = uint64(f.ID)
		} else {
			var f dubbo.Frame
			f, err = readDubbo(c)
			got = f.ID
		}
		if err != nil || got != uint64(id) {
			t.Fatalf("answer to %d: %d, %v", id, got, err)
		}
	}
	ask := func(frame []byte) trace.Call {
		t.Helper()
		c.Write(frame)
		read()
		return <-server.seen
	}
	span := func(method string) map[string]string {
		t.Helper()
		until(t, "a span of "+method, func() bool { return spans()[method] != nil })
		return spans()[method]
	}
	parent := func(k trace.Call) string { return hex.EncodeToString(k.Parent[:]) }

	for _, sum := range []bool{false, true} {
		in := fmt.Sprintf("in%v", sum)
		k := ask(call(in, sum, "", "traceparent", aParent))
		if s := span(in); k.ID() != aTrace || parent(k) != s["span"] || s["trace"] != aTrace || s["parent"] != aSpan || s["rpc.system"] != protocol ||
			s["rpc.response.status_code"] != ok || s["hauberk.rule"] != "open" || s["hauberk.peer"] != spiffe("web") || s["hauberk.why"] != "" {
			t.Errorf("%+v, told %v", k, s)
		}
		begins := fmt.Sprintf("begins%v", sum)
		k = ask(call(begins, sum, ""))
		if s := span(begins); k.ID() != s["trace"] || parent(k) != s["span"] || s["parent"] != "" || k.SofaTrace != k.ID() || k.SofaSpan != "0" {
			t.Errorf("%+v, told %v", k, s)
		}
	}
	if k := ask(call("sofa", false, "", "sofaTraceId", "0a0f", "sofaRpcId", "0.1")); k.SofaTrace != "0a0f" || k.SofaSpan != "0.1" || span("sofa")["sofa.rpc_id"] != "0.1" {
		t.Errorf("%+v, told %v", k, spans()["sofa"])
	}
	if ask(call("fails", false, "", "traceparent", aParent)); span("fails")["rpc.response.status_code"] == ok {
		t.Errorf("told %v", spans()["fails"])
	}
	if k := ask(call("unsampled", false, "", "traceparent", aParent[:53]+"00")); k.ID() != aTrace || parent(k) == aSpan || k.Sampled {
		t.Errorf("%+v", k)
	}
	// What there is no room for goes on as it came.
	long := strings.Repeat("\x90", 40_000)
	if k := ask(call("long", true, long, "traceparent", aParent)); parent(k) != aSpan {
		t.Errorf("%+v", k)
	}
	// One that waits while all is held, and is told of with its answer.
	c.Write(call("held", false, "", "traceparent", aParent))
	<-server.seen
	answer := <-server.held
	time.Sleep(2 * time.Millisecond) // a time to be told
	for range 2 {
		load, err := w.proxy.hold()
		if err == nil {
			err = w.proxy.back(load)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	answer()
	read()
	if s := span("held"); s["rpc.response.status_code"] != ok || s["parent"] != aSpan {
		t.Errorf("told %v", s)
	}
	// And one that is never answered.
	c.Write(call("never", false, "", "traceparent", aParent))
	<-server.seen
	c.Close()
	if s := span("never"); s["hauberk.why"] == "" || s["rpc.response.status_code"] != "" {
		t.Errorf("told %v", s)
	}
	if spans()["unsampled"] != nil || spans()["long"] != nil || w.proxy.observer.waiting.Load() != 0 {
		t.Errorf("told %v; %d wait", spans(), w.proxy.observer.waiting.Load())
	}
	m := w.proxy.Metrics()
	for _, line := range []string{fmt.Sprintf(`hauberk_mesh_requests_total{service="ledger.bank",protocol=%q,code="",verdict="allowed"} %d`, protocol, id), "hauberk_mesh_untraced_total 1"} {
		if !strings.Contains(m, line+"\n") {
			t.Errorf("no %s in\n%s", line, m)
		}
	}
	until(t, "all logged", func() bool { return strings.Count(log.String(), "\n") == id })
	if !strings.Contains(log.String(), `"trace":"`+aTrace) {
		t.Error(log)
	}
	if protocol == "bolt" { // a wrong sum is not made right
		bad := call("begins", true, "")
		bad[len(bad)-1] ^= 1
		c := web.mustDial(t, "10.99.0.2:1000")
		c.Write(bad)
		if _, err := io.ReadAll(c); err == nil {
			t.Error("it ended well")
		}
		w.awaitEvent(api.EventBadRequest, "the sum is")
	}
}

// carriedBy runs an exchange over in, with traces or without, and returns what the
// server sees.
func carriedBy(protocol string, in []byte, step, perMille int) []byte {
	p := New(Options{})
	a := &arrival{p: p, who: party{peerIdentity: spiffe("web")}}
	if perMille >= 0 {
		p.observer.follow(p, &plan.Observe{Traces: &plan.Traces{PerMille: perMille}})
	}
	a.sight = &sight{a: a, o: &p.observer, counts: &serviceCounts{}, protocol: protocol}
	far := &loop{in: bytes.NewReader(nil), step: step, asked: make(chan struct{})}
	x := &rpcExchange{
		entry: &entry{}, client: &loop{in: bytes.NewReader(in), step: step}, protocol: protocol, dial: func() (side, error) { return far, nil },
		deep: func() bool { return false }, maybe: func() bool { return true }, reserve: p.reserve, sight: a.sight,
		judge: func(c rpcCodec) (fault, string) {
			a.sight.judged(c, call{}, verdict{allowed: true})
			return 0, ""
		},
		malformed: func(error) {},
	}
	x.run(nil)
	return far.out.Bytes()
}

// calledWith are the whole frames of some bytes, but for their traces.
func calledWith(t *testing.T, protocol string, b []byte) (all []string) {
	for len(b) > 0 {
		if protocol == "bolt" {
			x, err := bolt.Size(b)
			if err != nil || x.Len == 0 || x.Len > len(b) {
				return all
			}
			var sum bolt.Sum
			if sum.Begin(x); x.CRC && sum.Add(b[:x.Len]) != nil {
				return all
			}
			f := bolt.Parse(b[:x.Len], x)
			all = append(all, fmt.Sprintf("%d %d %d %q %q", f.Type, f.Command, f.ID, f.Class, f.Content))
			b = b[x.Len:]
			continue
		}
		n, err := dubbo.Size(b)
		if err != nil || n == 0 || n > len(b) {
			return all
		}
		f := dubbo.Parse(b, n)
		to, err := new(dubbo.Reader).Target(&f)
		if err != nil {
			all = append(all, fmt.Sprintf("%d %v", f.ID, err != nil))
		} else {
			all = append(all, fmt.Sprintf("%d %q %q %q %q", f.ID, to.Group, to.Service, to.Version, to.Method))
		}
		b = b[n:]
	}
	return all
}

// FuzzTracedCalls: with traces the server sees the calls that it sees without.
func FuzzTracedCalls(f *testing.F) {
	f.Add(true, bytes.Join([][]byte{boltCall(1, "s", "a", true, ""), withPairs(f, "bolt", boltCall(2, "s", "b", true, ""), "traceparent", aParent), beat(3),
		withPairs(f, "bolt", boltCall(4, "s", "c", false, strings.Repeat("\x90", 20_000)), "traceparent", aParent)}, nil), uint16(7))
	f.Add(false, bytes.Join([][]byte{dubboCall(1, "s", "g", "a"), withPairs(f, "dubbo", dubboCall(2, "s", "g", "b"), "traceparent", aParent), dubboCall(3, "s", "g", "c")}, nil), uint16(9))
	bad := boltCall(2, "s", "a", true, "")
	bad[len(bad)-1] ^= 1
	f.Add(true, append(boltCall(1, "s", "a", true, ""), bad...), uint16(5000))
	f.Fuzz(func(t *testing.T, isBolt bool, in []byte, step uint16) {
		protocol := map[bool]string{true: "bolt", false: "dubbo"}[isBolt]
		plain := calledWith(t, protocol, carriedBy(protocol, in, 1<<20, -1))
		for _, perMille := range []int{0, 1000} {
			if traced := calledWith(t, protocol, carriedBy(protocol, in, int(step)+1, perMille)); strings.Join(traced, "\n") != strings.Join(plain, "\n") {
				t.Fatalf("with traces %q, without %q", traced, plain)
			}
		}
	})
}

// TestCallsThatWait: what is followed to its answer is bounded, and given up after a
// while.
func TestCallsThatWait(t *testing.T) {
	p := New(Options{})
	p.ctx = t.Context()
	s := &sight{a: &arrival{p: p, sb: p.newSandbox(plan.Sandbox{})}, o: &p.observer}
	p.observer.now.Store(&noting{exporter: trace.NewExporter("127.0.0.1:1", nil), stop: func() {}})
	at := time.Now()
	waits := func(id int, at time.Time) bool {
		return s.wait(uint64(id), &note{begin: at, trace: &trace.Context{Sampled: true}})
	}
	for i := range maxCalls {
		if !waits(i, at) {
			t.Fatalf("%d calls had no room", i)
		}
	}
	if waits(maxCalls, at.Add(2*time.Second)) || len(s.calls.all) != maxCalls {
		t.Errorf("%d calls wait", len(s.calls.all))
	}
	if !waits(maxCalls, at.Add(callTime+time.Minute)) || len(s.calls.all) != 1 {
		t.Errorf("%d calls wait", len(s.calls.all))
	}
	if !waits(maxCalls, at.Add(callTime+time.Minute)) || len(s.calls.all) != 1 || p.observer.waiting.Load() != 1 {
		t.Errorf("%d calls wait with one id, %d in all", len(s.calls.all), p.observer.waiting.Load())
	}
	p.observer.waiting.Store(maxAllCalls)
	if waits(7, at) || p.observer.waiting.Load() != maxAllCalls {
		t.Error("more wait than may")
	}
	p.observer.waiting.Store(1)
	if s.gone(); s.calls.open.Load() != 0 || p.observer.waiting.Load() != 0 || len(s.calls.all) != 0 {
		t.Errorf("%d calls wait of a connection that is gone", len(s.calls.all))
	}
}
