package mesh

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/handover"
	"hauberk.dev/mesh/hbone"
	"hauberk.dev/plan"
)

// oneWay makes a call one that waits for no answer.
func oneWay(b []byte) []byte {
	switch b[0] {
	case 1:
		b[1] = byte(bolt.OneWay)
	case 0xda:
		b[2] &^= 0x40
	}
	return b
}

// callbackProtocol is what a test needs of one.
type callbackProtocol struct {
	name string
	port string
	call func(id uint32, method string) []byte
	beat func(id uint32) []byte
	// read reads a frame: its id, whether it is a request, and whether it is an
	// answer that is no error.
	read   func(io.Reader) (id uint64, asks, good bool, err error)
	answer func(id uint32) []byte
}

const backService = "org.bank.Back"

func callbackProtocols() []callbackProtocol {
	return []callbackProtocol{
		{"bolt", "12200", func(id uint32, method string) []byte {
			return boltCall(id, backService+":1.0", method, id%2 == 1, "\x90")
		}, beat,
			func(r io.Reader) (uint64, bool, bool, error) {
				f, err := readBolt(r)
				return uint64(f.ID), f.Type != bolt.Response, f.Type == bolt.Response && f.Status == bolt.OK, err
			},
			func(id uint32) []byte {
				return bolt.AppendError(nil, &bolt.Frame{Protocol: 1, ID: id, Codec: bolt.Hessian2}, bolt.OK, "done")
			}},
		{"dubbo", "20880", func(id uint32, method string) []byte { return dubboCall(uint64(id), backService, "", method) },
			func(id uint32) []byte {
				return append(binary.BigEndian.AppendUint64([]byte{0xda, 0xbb, 0xe2, 0}, uint64(id)), 0, 0, 0, 1, 'N')
			},
			func(r io.Reader) (uint64, bool, bool, error) {
				f, err := readDubbo(r)
				return f.ID, f.Kind != dubbo.KindOther, f.Kind == dubbo.KindOther && f.Status == dubbo.OK, err
			},
			func(id uint32) []byte {
				return dubbo.AppendError(nil, &dubbo.Frame{Serialization: 2, ID: uint64(id)}, dubbo.OK, "done")
			}},
	}
}

// callbackWorld is a client web and a server api, which knows both protocols, and a
// connection with a request of the client under way, of id 1.
func callbackWorld(t *testing.T) (w *world, dial func(callbackProtocol) (client, server net.Conn)) {
	w = newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("api", []plan.Port{{Port: 12200, Protocol: "bolt"}, {Port: 20880, Protocol: "dubbo"}}, anyone(), nil)
	w.apply()
	lns := map[string]net.Listener{"12200": b.listen(t, 12200), "20880": b.listen(t, 20880)}
	return w, func(p callbackProtocol) (client, server net.Conn) {
		t.Helper()
		client = web.mustDial(t, "10.99.0.2:"+p.port)
		if _, err := client.Write(p.call(1, "get")); err != nil {
			t.Fatal(err)
		}
		server, err := lns[p.port].Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		server.SetDeadline(time.Now().Add(20 * time.Second))
		expect(t, p, server, 1, true, false)
		return client, server
	}
}

func expect(t *testing.T, p callbackProtocol, c io.Reader, id uint64, asks, good bool) {
	t.Helper()
	gotID, gotAsks, gotGood, err := p.read(c)
	if err != nil || gotID != id || gotAsks != asks || gotGood != good {
		t.Fatalf("%s: id %d, asks %v, good %v, %v; want id %d, asks %v, good %v", p.name, gotID, gotAsks, gotGood, err, id, asks, good)
	}
}

// A server that asks over each of many connections what it may not scans nothing: it
// is neither found nor an offender.
func TestCallbacksAreNoScan(t *testing.T) {
	w, dial := callbackWorld(t)
	w.service("web").Inspect = &plan.Inspect{Observe: 1, Incident: 20}
	w.plan.Generation++
	w.apply()
	p := callbackProtocols()[0]
	for n := range 100 {
		_, server := dial(p)
		if _, err := server.Write(slices.Concat(p.call(1, "back"), p.call(2, fmt.Sprint("push", n)))); err != nil {
			t.Fatal(err)
		}
		expect(t, p, server, 1, false, false)
		expect(t, p, server, 2, false, false)
	}
	_, server := dial(p)
	if _, err := server.Write(p.call(1, "last")); err != nil {
		t.Fatal(err)
	}
	w.awaitEvent(api.EventAccessDenied, `"last"`) // and with it all before
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, e := range w.events {
		if e.Kind == api.EventFinding || e.Kind == api.EventIncident || e.Offender != "" {
			t.Fatalf("found: %+v", e)
		}
	}
}

// A server that asks its client is refused by default, in the protocol and by its
// own id, which may be one of the client's too; one-way requests are dropped;
// heartbeats and answers go on, and so does the connection.
func TestCallbacksAreRefused(t *testing.T) {
	w, dial := callbackWorld(t)
	for n, p := range callbackProtocols() {
		client, server := dial(p)
		if _, err := server.Write(slices.Concat(p.call(1, "back"), oneWay(p.call(2, "back")), p.beat(3), p.call(4, "back"), p.answer(1))); err != nil {
			t.Fatal(err)
		}
		expect(t, p, client, 3, true, false) // the heartbeat
		expect(t, p, client, 1, false, true) // and what it has asked for
		expect(t, p, server, 1, false, false)
		expect(t, p, server, 4, false, false)
		if _, err := client.Write(p.answer(3)); err != nil {
			t.Fatal(err)
		}
		expect(t, p, server, 3, false, true)
		for _, line := range []string{
			fmt.Sprintf(`hauberk_mesh_callbacks_total{service="api.bank"} %d`, 3*(n+1)),
			fmt.Sprintf(`hauberk_mesh_callbacks_judged_total{service="web.bank",verdict="denied"} %d`, 3*(n+1)),
		} {
			until(t, line, func() bool { return strings.Contains(w.proxy.Metrics(), line+"\n") })
		}
	}
	ev := w.awaitEvent(api.EventAccessDenied, `callback "org.bank.Back" method "back": no rule of web.bank allows callbacks of it: name it under callbacks in an AccessPolicy`)
	if ev.Instance != "web-1" || ev.Peer != spiffe("api") || ev.Service != "web.bank" {
		t.Errorf("%+v", ev)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, ev := range w.events {
		if ev.Kind == api.EventFinding {
			t.Errorf("%+v", ev)
		}
	}
}

// What the client's own policy allows passes, both ways, and nothing else does: not
// by rules of its ports, nor what a deny rule says, nor what cannot be read.
func TestCallbacksAreJudged(t *testing.T) {
	w, dial := callbackWorld(t)
	web := w.service("web")
	from := []string{spiffe("api")}
	rule := func(r plan.Rule) plan.Rule { r.From = from; return r }
	for _, c := range []struct {
		name            string
		allow, deny     []plan.Rule
		callbacks       []plan.Rule
		trials          []plan.Trial
		good, wrapped   bool // the request named, and one that cannot be read
		reason, wouldBe string
	}{
		{name: "rules of ports", allow: []plan.Rule{rule(plan.Rule{})}, reason: "no rule of web.bank allows callbacks of it"},
		{name: "anything", callbacks: []plan.Rule{rule(plan.Rule{})}, good: true, wrapped: true},
		{name: "another", callbacks: []plan.Rule{{From: []string{spiffe("evil")}}}},
		{name: "service and method", callbacks: []plan.Rule{rule(plan.Rule{Services: []string{"org.bank.*"}, Methods: []string{"back"}})}, good: true, reason: "cannot be read"},
		{name: "another method", callbacks: []plan.Rule{rule(plan.Rule{Services: []string{backService}, Methods: []string{"get"}})}},
		{name: "deny", callbacks: []plan.Rule{rule(plan.Rule{})}, deny: []plan.Rule{rule(plan.Rule{Name: "web/never", Methods: []string{"back"}})}, reason: "denied by web/never"},
		{name: "deny at a port", callbacks: []plan.Rule{rule(plan.Rule{})}, deny: []plan.Rule{rule(plan.Rule{Ports: []uint16{12200}})}, good: true, wrapped: true},
		{name: "in audit", callbacks: []plan.Rule{rule(plan.Rule{Name: "web/callbacks[0]", Audit: true})}, reason: "web/callbacks[0], which is in audit, would"},
		{name: "deny in audit", callbacks: []plan.Rule{rule(plan.Rule{Name: "web/all"})}, deny: []plan.Rule{rule(plan.Rule{Name: "web/try", Audit: true})},
			good: true, wrapped: true, wouldBe: `callback "org.bank.Back" method "back": allowed by web/all, and web/try would refuse it`},
		{name: "a policy in audit", callbacks: []plan.Rule{rule(plan.Rule{})}, trials: []plan.Trial{{Name: "strict", Callbacks: []plan.Rule{rule(plan.Rule{Methods: []string{"get"}})}}},
			good: true, wrapped: true, wouldBe: "strict/callbacks would refuse it"},
	} {
		web.Allow, web.Deny, web.Callbacks, web.Trials = c.allow, c.deny, c.callbacks, c.trials
		w.plan.Generation++
		w.apply()
		for _, p := range callbackProtocols() {
			client, server := dial(p)
			unread := p.call(3, "back")
			switch p.name { // another codec, which nobody here reads
			case "bolt":
				unread = boltCall(3, backService, "back", false, "\x90")
				unread[9] = 77
			case "dubbo":
				unread[2] = 0xc0 | 6
			}
			if _, err := server.Write(slices.Concat(p.call(2, "back"), unread, p.answer(1))); err != nil {
				t.Fatal(err)
			}
			if c.good {
				expect(t, p, client, 2, true, false)
			}
			if c.wrapped {
				expect(t, p, client, 3, true, false)
			}
			expect(t, p, client, 1, false, true)
			if !c.good {
				expect(t, p, server, 2, false, false)
			}
			if !c.wrapped {
				expect(t, p, server, 3, false, false)
			}
			if c.good {
				if _, err := client.Write(p.answer(2)); err != nil {
					t.Fatal(err)
				}
				expect(t, p, server, 2, false, true)
			}
			client.Close()
			server.Close()
		}
		if c.reason != "" {
			w.awaitEvent(api.EventAccessDenied, c.reason)
		}
		if c.wouldBe != "" {
			w.awaitEvent(api.EventWouldDeny, c.wouldBe)
		}
		if t.Failed() {
			t.Fatal(c.name)
		}
	}
}

// A plan holds for the next request of a server, on connections that are open.
func TestCallbacksFollowThePlan(t *testing.T) {
	w, dial := callbackWorld(t)
	p := callbackProtocols()[0]
	client, server := dial(p)
	for i := range uint32(4) {
		w.service("web").Callbacks = nil
		if i%2 == 1 {
			w.service("web").Callbacks = anyone()
		}
		w.plan.Generation++
		w.apply()
		if _, err := server.Write(p.call(10+i, "back")); err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			expect(t, p, client, uint64(10+i), true, false)
		} else {
			expect(t, p, server, uint64(10+i), false, false)
		}
	}
}

// What a server says that is no frame ends the connection at the client's node too.
func TestCallbacksMalformed(t *testing.T) {
	var told error
	out := &recordingSide{}
	c := newCallbacks("bolt", out, &recordingSide{}, callbackRules{malformed: func(err error) { told = err }}, callbacksState{}, false)
	if _, err := c.client.Write([]byte("hello")); err == nil || told == nil || out.Len() > 0 {
		t.Errorf("%v, %v, %q passed", err, told, out.Bytes())
	}
}

// The client of a published port is outside the mesh: nobody judges, and that is told.
func TestCallbacksToOutside(t *testing.T) {
	w := newWorld(t)
	b := w.add("api", []plan.Port{{Port: 12200, Protocol: "bolt", Publish: 1}}, []plan.Rule{{Name: "open", From: []string{anonymous}}}, nil)
	w.apply()
	ln := b.listen(t, 12200)
	outside, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	go func() {
		c, err := outside.Accept()
		if err != nil {
			return
		}
		w.proxy.ingress(c, api.PublishedPort{Namespace: "bank", Service: "api", Port: 12200})
	}()
	p := callbackProtocols()[0]
	client, err := net.Dial("tcp", outside.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	client.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := client.Write(p.call(1, "get")); err != nil {
		t.Fatal(err)
	}
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := server.Write(slices.Concat(p.call(7, "back"), p.call(8, "back"))); err != nil {
		t.Fatal(err)
	}
	expect(t, p, client, 7, true, false)
	expect(t, p, client, 8, true, false)
	w.awaitEvent(api.EventFinding, "outside the mesh; they pass and are not judged")
}

// Connections whose callbacks are under way in either direction, in the middle of
// frames, go on when the proxy is held.
func TestCallbacksHeld(t *testing.T) {
	w, dial := callbackWorld(t)
	w.service("web").Callbacks = []plan.Rule{{Name: "web/back", From: []string{"*"}, Methods: []string{"back"}}}
	w.plan.Generation++
	w.apply()
	for _, p := range callbackProtocols() {
		client, server := dial(p)
		says := slices.Concat(p.call(2, "back"), p.call(3, "never"), p.beat(4), p.call(5, "back"), p.answer(1))
		hears := slices.Concat(p.answer(2), p.answer(4), p.answer(5), p.call(9, "get"))
		for len(says)+len(hears) > 0 {
			for b, c := range map[*[]byte]net.Conn{&says: server, &hears: client} {
				n := min(len(*b), 1+rand.IntN(120))
				if _, err := c.Write((*b)[:n]); err != nil {
					t.Fatal(err)
				}
				*b = (*b)[n:]
			}
			time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
			load, err := w.proxy.hold()
			if err == nil {
				err = w.proxy.back(load)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		for _, id := range []uint64{2, 4, 5} {
			expect(t, p, client, id, true, false)
		}
		expect(t, p, client, 1, false, true)
		got := map[uint64]string{}
		for range 5 {
			id, asks, good, err := p.read(server)
			if err != nil {
				t.Fatal(err)
			}
			got[id] = fmt.Sprint(asks, good)
		}
		for id, want := range map[uint64]string{2: "false true", 3: "false false", 4: "false true", 5: "false true", 9: "true false"} {
			if got[id] != want {
				t.Errorf("%s: %d: %s, want %s", p.name, id, got[id], want)
			}
		}
		client.Close()
		server.Close()
	}
}

// A version before this judged no callbacks, and nobody knows where its connections
// stand: they go on as they were.
func TestCallbacksOfVersionBefore(t *testing.T) {
	w, dial := callbackWorld(t)
	p := callbackProtocols()[0]
	client, server := dial(p)
	load, err := w.proxy.hold()
	if err != nil {
		t.Fatal(err)
	}
	load.Version = handover.Oldest
	for i, item := range load.Items {
		var f flowState
		if item.Kind != itemFlow || json.Unmarshal(item.Body, &f) != nil || f.Kind != flowOut {
			continue
		}
		f.Protocol, f.Engine.Callbacks = "", nil
		if load.Items[i].Body, err = json.Marshal(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.proxy.back(load); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Write(p.call(2, "back")); err != nil {
		t.Fatal(err)
	}
	expect(t, p, client, 2, true, false)
}

// recordingSide keeps what is written to it.
type recordingSide struct {
	bytes.Buffer
	ended bool
}

func (s *recordingSide) WriteFramed(b []byte) (int, error) { return s.Write(b[hbone.Headroom:]) }
func (s *recordingSide) CloseWrite() error                 { s.ended = true; return nil }
func (s *recordingSide) abort()                            {}
func (s *recordingSide) finish()                           {}

// talk passes what both say through callbacks in pieces, frozen between some of
// them, and returns what each has heard. Methods that begin with n are refused.
func talk(t *testing.T, protocol string, client, server []byte, r *rand.Rand) (toClient, toServer []byte, err error) {
	guest, far := &recordingSide{}, &recordingSide{}
	held := 0
	rules := callbackRules{
		judge: func(c rpcCodec) (fault, string) {
			if to, err := c.target(); err != nil || to.method[0] == 'n' {
				return faultDenied, "no"
			}
			return 0, ""
		},
		reserve:   func(n int) bool { held += n; return held < 2<<20 },
		malformed: func(error) {},
	}
	c := newCallbacks(protocol, guest, far, rules, callbacksState{}, false)
	for err == nil && len(client)+len(server) > 0 {
		n := min(len(server), r.IntN(1+max(1, min(len(server), 1<<r.IntN(16)))))
		if _, err = c.client.Write(server[:n]); err != nil {
			break
		}
		server = server[n:]
		n = min(len(client), r.IntN(1+max(1, min(len(client), 1<<r.IntN(16)))))
		if _, err = c.server.Write(client[:n]); err != nil {
			break
		}
		if client = client[n:]; r.IntN(4) > 0 {
			continue
		}
		c.stop()
		b, jerr := json.Marshal(c.state())
		var s callbacksState
		if err := errors.Join(jerr, json.Unmarshal(b, &s), s.check()); err != nil {
			t.Fatal(err)
		}
		c = newCallbacks(protocol, guest, far, rules, s, false)
	}
	if err == nil {
		c.server.telling.Wait()
		if err = c.server.CloseWrite(); err == nil {
			err = c.client.CloseWrite()
		}
	}
	c.stop()
	if held != 0 {
		t.Fatalf("%d bytes are still reserved", held)
	}
	return guest.Bytes(), far.Bytes(), err
}

// However the bytes come, and wherever they are held, the same requests pass, and
// each refusal stands between two frames.
func TestCallbacksInPieces(t *testing.T) {
	for _, p := range callbackProtocols() {
		big := strings.Repeat("x", 300<<10)
		for seed := range uint64(60) {
			r := rand.New(rand.NewPCG(seed, 1))
			var server, client, want []byte
			var asked []uint64
			for id := uint32(1); id <= 40; id++ {
				var b []byte
				switch r.IntN(6) {
				case 0:
					b = p.call(id, "never")
					asked = append(asked, uint64(id))
					server = append(server, b...)
					continue
				case 1:
					b = oneWay(p.call(id&^1, "never"))
					server = append(server, b...)
					continue
				case 2:
					b = p.call(id, "back")
				case 3:
					b = p.beat(id)
				case 4:
					if p.name == "bolt" && id%8 == 0 {
						b = boltCall(id, backService, "back", false, big)
						break
					}
					b = oneWay(p.call(id&^1, "back"))
				default:
					b = p.answer(id)
				}
				server, want = append(server, b...), append(want, b...)
			}
			for id := uint32(100); id < 130; id++ {
				client = append(client, [][]byte{p.call(id, "get"), p.answer(id), p.beat(id)}[r.IntN(3)]...)
			}
			sent := client
			toClient, toServer, err := talk(t, p.name, client, server, r)
			if err != nil || !bytes.Equal(toClient, want) {
				t.Fatalf("%s, %d: %v; the client got %d bytes, want %d", p.name, seed, err, len(toClient), len(want))
			}
			var own []byte
			rest := bytes.NewReader(toServer)
			for rest.Len() > 0 {
				at := len(toServer) - rest.Len()
				id, asks, good, err := p.read(rest)
				if err != nil {
					t.Fatal(err)
				}
				if id < 100 && !asks && !good {
					asked = slices.DeleteFunc(asked, func(a uint64) bool { return a == id })
					continue
				}
				own = append(own, toServer[at:len(toServer)-rest.Len()]...)
			}
			if !bytes.Equal(own, sent) || len(asked) > 0 {
				t.Fatalf("%s, %d: the server got %d bytes of the client, want %d; no refusal of %d", p.name, seed, len(own), len(sent), asked)
			}
		}
	}
}

// A command that ends the connection is one only if there is nothing else in it,
// whether or not that is there yet.
func TestGoAwayWithContent(t *testing.T) {
	b := boltCall(1, sofaService, "get", false, "")
	binary.BigEndian.PutUint16(b[2:], uint16(bolt.GoAway))
	binary.BigEndian.PutUint16(b[14:], 0)
	b = append(b[:22], b[22+len(sofaRequest):]...)
	for n := 22; n <= len(b); n++ {
		c := &boltCodec{}
		size, _, err := c.measure(b[:n], false)
		if err != nil || size != len(b) {
			t.Fatal(size, err)
		}
		if kind, _, err := c.inspect(b[:n], size); err != nil || kind != rpcCall || !c.asks(b[:n]) {
			t.Fatalf("%d bytes: kind %d, %v", n, kind, err)
		}
	}
}

// Answers that pass cost nothing but a look at their heads.
func TestCallbacksAllocateNothing(t *testing.T) {
	for _, p := range callbackProtocols() {
		c := newCallbacks(p.name, deadSide{}, deadFramed{}, callbackRules{}, callbacksState{}, false)
		b := bytes.Repeat(p.answer(1), 20)
		framed := append(make([]byte, hbone.Headroom), bytes.Repeat(p.call(1, "get"), 5)...)
		if n := testing.AllocsPerRun(100, func() {
			for from := 0; from < len(b); from += 997 { // heads in pieces too
				c.client.Write(b[from:min(len(b), from+997)])
			}
			c.server.WriteFramed(framed)
		}); n > 0 {
			t.Errorf("%s: %v allocations", p.name, n)
		}
	}
}

type deadFramed struct{ deadSide }

func (deadFramed) WriteFramed(b []byte) (int, error) { return len(b) - hbone.Headroom, nil }

// BenchmarkCallbacks is what it costs to look out for callbacks: a chunk of answers,
// and one of requests.
func BenchmarkCallbacks(b *testing.B) {
	for _, p := range callbackProtocols() {
		c := newCallbacks(p.name, deadSide{}, deadFramed{}, callbackRules{}, callbacksState{}, false)
		says, asks := p.answer(1), append(make([]byte, hbone.Headroom), p.call(1, "get")...)
		b.Run(p.name+"/answer", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.client.Write(says)
			}
		})
		b.Run(p.name+"/request", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.server.WriteFramed(asks)
			}
		})
	}
}

// FuzzCallbacks gives whatever a server may say: what the client gets does not
// depend on how it comes in pieces, and holds no request but those allowed.
func FuzzCallbacks(f *testing.F) {
	for n, p := range callbackProtocols() {
		f.Add(n == 0, slices.Concat(p.call(1, "back"), p.call(2, "never"), p.answer(3)), slices.Concat(p.answer(1), p.call(1, "get")), uint64(1))
		f.Add(n == 0, slices.Concat(p.beat(1), oneWay(p.call(2, "never"))), []byte{1, 2}, uint64(2))
	}
	f.Fuzz(func(t *testing.T, isBolt bool, server, client []byte, seed uint64) {
		protocol := "dubbo"
		if isBolt {
			protocol = "bolt"
		}
		r := rand.New(rand.NewPCG(seed, 1))
		one, _, err := talk(t, protocol, nil, server, rand.New(rand.NewPCG(0, 0)))
		two, toServer, err2 := talk(t, protocol, client, server, r)
		if !bytes.Equal(one, two) || (err == nil) != (err2 == nil) {
			t.Fatalf("%q, %v; in other pieces %q, %v", one, err, two, err2)
		}
		if len(toServer) < len(client) && err2 == nil {
			t.Fatalf("%d bytes of %d reach the server", len(toServer), len(client))
		}
		codec := newCodec(protocol)
		for len(one) > 0 {
			size, _, err := codec.measure(one, true)
			if err != nil || size == 0 || size > len(one) {
				break // cut off
			}
			if kind, _, err := codec.inspect(one, size); err == nil && kind == rpcCall {
				if to, err := codec.target(); err != nil || to.method[0] == 'n' {
					t.Fatalf("%q passed", one[:size])
				}
			}
			one = one[size:]
		}
	})
}
