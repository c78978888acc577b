package mesh

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	api "hauberk.dev/api/mesh"
	"hauberk.dev/mesh/bolt"
	"hauberk.dev/mesh/dubbo"
	"hauberk.dev/mesh/hessian"
	"hauberk.dev/plan"
)

const (
	sofaRequest = "com.alipay.sofa.rpc.core.request.SofaRequest"
	sofaService = "com.alipay.test.S:1.0"
)

// boltCall is a request as sofa-bolt-node writes it, version 2 with its sum if
// sum is set. argument is the last part of the body.
func boltCall(id uint32, service, method string, sum bool, argument string) []byte {
	body := []byte("O\xbc" + sofaRequest + "\x92")
	for _, s := range []string{"methodName", "targetServiceUniqueName"} {
		body = hessian.AppendString(body, s)
	}
	body = hessian.AppendString(hessian.AppendString(append(body, "o\x90"...), method), service)
	body = append(body, argument...)
	b := []byte{1, byte(bolt.Request)}
	if sum {
		b = []byte{2, 2, byte(bolt.Request)}
	}
	b = binary.BigEndian.AppendUint16(b, uint16(bolt.Call))
	b = binary.BigEndian.AppendUint32(append(b, 1), id)
	if b = append(b, bolt.Hessian2); sum {
		b = append(b, 1)
	}
	b = binary.BigEndian.AppendUint32(b, 3000)
	b = binary.BigEndian.AppendUint16(b, uint16(len(sofaRequest)))
	b = binary.BigEndian.AppendUint16(b, 0)
	b = binary.BigEndian.AppendUint32(b, uint32(len(body)))
	b = append(append(b, sofaRequest...), body...)
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

func beat(id uint32) []byte {
	b := binary.BigEndian.AppendUint32([]byte{1, 1, 0, 0, 1}, id)
	return append(b, 1, 0, 0, 0x0b, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0)
}

func dubboCall(id uint64, service, group, method string) []byte {
	var body []byte
	for _, s := range []string{"2.0.2", service, "1.0", method, "Ljava/lang/String;", "x"} {
		body = hessian.AppendString(body, s)
	}
	body = append(body, 'H')
	for _, s := range []string{"path", service, "group", group} {
		body = hessian.AppendString(body, s)
	}
	body = append(body, 'Z')
	b := binary.BigEndian.AppendUint64([]byte{0xda, 0xbb, 0xc2, 0}, id)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(body))), body...)
}

// readBolt reads one frame.
func readBolt(r io.Reader) (bolt.Frame, error) {
	var b []byte
	for {
		x, err := bolt.Size(b)
		if err != nil {
			return bolt.Frame{}, err
		}
		if x.Len > 0 && len(b) == x.Len {
			return bolt.Parse(b, x), nil
		}
		n := 1
		if x.Len > 0 {
			n = x.Len - len(b)
		}
		part := make([]byte, n)
		if _, err := io.ReadFull(r, part); err != nil {
			return bolt.Frame{}, err
		}
		b = append(b, part...)
	}
}

func readDubbo(r io.Reader) (dubbo.Frame, error) {
	b := make([]byte, dubbo.HeaderLen)
	if _, err := io.ReadFull(r, b); err != nil {
		return dubbo.Frame{}, err
	}
	n, err := dubbo.Size(b)
	if err != nil {
		return dubbo.Frame{}, err
	}
	b = append(b, make([]byte, n-len(b))...)
	if _, err := io.ReadFull(r, b[dubbo.HeaderLen:]); err != nil {
		return dubbo.Frame{}, err
	}
	return dubbo.Parse(b, n), nil
}

// rpcServer answers what it is asked and remembers what that was.
type rpcServer struct {
	mu   sync.Mutex
	seen []string
}

func (s *rpcServer) note(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, fmt.Sprintf(format, args...))
}

func (s *rpcServer) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.seen)
}

func (s *rpcServer) listen(ln net.Listener, one func(net.Conn) error) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			for one(c) == nil {
			}
		}()
	}
}

func (s *rpcServer) bolt(c net.Conn) error {
	f, err := readBolt(c)
	if err != nil {
		return err
	}
	if f.Kind() == bolt.KindAlive {
		s.note("heartbeat %d", f.ID)
		_, err = c.Write(bolt.AppendAlive(nil, &f))
		return err
	}
	t, err := new(bolt.Reader).Target(&f)
	s.note("%d %s#%s", f.ID, t.Service, t.Method)
	if err != nil {
		return err
	}
	_, err = c.Write(bolt.AppendError(nil, &f, bolt.OK, "done"))
	return err
}

func (s *rpcServer) dubbo(c net.Conn) error {
	f, err := readDubbo(c)
	if err != nil {
		return err
	}
	t, err := new(dubbo.Reader).Target(&f)
	s.note("%d %s/%s#%s", f.ID, t.Group, t.Service, t.Method)
	if err != nil {
		return err
	}
	_, err = c.Write(dubbo.AppendError(nil, &f, dubbo.OK, "done"))
	return err
}

func TestBolt(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	evil := w.add("evil", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 12200, Protocol: "bolt"}},
		[]plan.Rule{{Name: "ledger/read", From: []string{spiffe("web")}, Services: []string{"com.alipay.test.*"}, Methods: []string{"get", "list", "drop"}}},
		[]plan.Rule{{Name: "ledger/never", From: []string{"*"}, Methods: []string{"drop"}}})
	w.apply()
	server := &rpcServer{}
	go server.listen(b.listen(t, 12200), server.bolt)
	const to = "10.99.0.3:12200"

	c := web.mustDial(t, to)
	c.Write(slices.Concat(boltCall(1, sofaService, "get", false, ""), boltCall(2, sofaService, "drop", true, ""), beat(3),
		boltCall(4, "com.alipay.other.S:1.0", "get", false, ""), boltCall(5, sofaService, "list", true, strings.Repeat("\x90", 200_000))))
	statuses := map[uint32]bolt.Status{}
	for range 5 {
		f, err := readBolt(c)
		if err != nil {
			t.Fatal(err)
		}
		if f.Command != bolt.Heartbeat {
			statuses[f.ID] = f.Status
		}
		if f.Status != bolt.OK && !strings.Contains(string(f.Content), "access denied to "+spiffe("web")) {
			t.Errorf("%d: %q", f.ID, f.Content)
		}
	}
	for id, want := range map[uint32]bolt.Status{1: bolt.OK, 2: bolt.ServerException, 4: bolt.ServerException, 5: bolt.OK} {
		if statuses[id] != want {
			t.Errorf("request %d: status %d, want %d", id, statuses[id], want)
		}
	}
	if seen, want := server.all(), []string{"1 " + sofaService + "#get", "heartbeat 3", "5 " + sofaService + "#list"}; !slices.Equal(seen, want) {
		t.Errorf("the server has seen %q, want %q", seen, want)
	}
	w.awaitEvent(api.EventAccessDenied, "ledger/never")
	w.awaitEvent(api.EventAccessDenied, `"com.alipay.other.S" method "get"`)

	// Who may call nothing reaches the server with nothing, not even a heartbeat,
	// and is told so.
	e := evil.mustDial(t, to)
	e.Write(slices.Concat(beat(6), boltCall(7, sofaService, "get", false, "")))
	if f, err := readBolt(e); err != nil || f.ID != 6 || f.Command != bolt.Heartbeat {
		t.Errorf("%+v, %v", f, err)
	}
	if f, err := readBolt(e); err != nil || f.ID != 7 || f.Status != bolt.ServerException {
		t.Errorf("%+v, %v", f, err)
	}
	c.Close()

	// What the plan no longer allows ends, or is refused from now on.
	c = web.mustDial(t, to)
	ask := func(id uint32) (bolt.Status, error) {
		c.Write(boltCall(id, sofaService, "get", true, ""))
		f, err := readBolt(c)
		return f.Status, err
	}
	if status, err := ask(10); err != nil || status != bolt.OK {
		t.Fatal(status, err)
	}
	w.service("ledger").Deny = []plan.Rule{{Name: "ledger/noget", From: []string{"*"}, Methods: []string{"get"}}}
	w.plan.Generation++
	w.apply()
	if status, err := ask(11); err != nil || status != bolt.ServerException {
		t.Errorf("after the change of plan: %d, %v", status, err)
	}
	w.service("ledger").Deny = []plan.Rule{{Name: "ledger/stop", From: []string{"*"}}}
	w.plan.Generation++
	w.apply()
	if status, err := ask(12); err == nil {
		t.Errorf("nothing is allowed, but answered %d", status)
	}
	w.service("ledger").Deny = nil
	w.plan.Generation++
	w.apply()

	// A revoked caller is cut.
	c = web.mustDial(t, to)
	if status, err := ask(13); err != nil || status != bolt.OK {
		t.Fatal(status, err)
	}
	if _, err := w.link.Cut(context.Background(), plan.Epoch{Number: 1, Instances: []string{"web-1"}}); err != nil {
		t.Fatal(err)
	}
	if status, err := ask(14); err == nil {
		t.Errorf("revoked, but answered %d", status)
	}
	for _, s := range server.all() {
		if strings.HasPrefix(s, "11 ") || strings.HasPrefix(s, "12 ") || strings.HasPrefix(s, "14 ") {
			t.Errorf("the server has seen %q", s)
		}
	}
}

func TestBoltMalformed(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 12200, Protocol: "bolt"}, {Port: 12201, Protocol: "bolt"}}, anyone(), nil)
	w.apply()
	server := &rpcServer{}
	go server.listen(b.listen(t, 12200), server.bolt)
	bad := boltCall(9, sofaService, "get", true, "")
	bad[len(bad)-1] ^= 1
	for name, c := range map[string]struct {
		in     []byte
		reason string
	}{
		"HTTP":      {[]byte("GET / HTTP/1.1\r\n\r\n"), "protocol 71"},
		"sum":       {bad, "the sum is"},
		"ambiguous": {append([]byte{2, 1, 1, 0, 1, 1, 0, 0, 0, 9, 1, 1}, make([]byte, 12)...), "switches 0x01"},
	} {
		conn := web.mustDial(t, "10.99.0.2:12200")
		conn.Write(append(boltCall(1, sofaService, "get", false, ""), c.in...))
		// The good one before it may have been answered, or not.
		if rest, err := io.ReadAll(conn); err == nil {
			t.Errorf("%s: ended well after %x", name, rest)
		}
		w.awaitEvent(api.EventBadRequest, c.reason)
	}
	for _, s := range server.all() {
		if strings.HasPrefix(s, "9 ") {
			t.Errorf("the server has seen %s", s)
		}
	}
	// Nobody listens: every request is told so, and the connection stays.
	conn := web.mustDial(t, "10.99.0.2:12201")
	for id := range uint32(2) {
		conn.Write(boltCall(id, sofaService, "get", false, ""))
		if f, err := readBolt(conn); err != nil || f.ID != id || f.Status != bolt.NoProcessor {
			t.Errorf("%+v, %v", f, err)
		}
	}
	// There is no endpoint at all.
	w.service("ledger").Endpoints = nil
	w.plan.Generation++
	w.apply()
	conn = web.mustDial(t, "10.99.0.2:12200")
	conn.Write(boltCall(3, sofaService, "get", false, ""))
	if f, err := readBolt(conn); err != nil || f.ID != 3 || f.Status != bolt.NoProcessor || !strings.Contains(string(f.Content), "no endpoint") {
		t.Errorf("%+v, %v", f, err)
	}
}

func TestDubbo(t *testing.T) {
	w := newWorld(t)
	web := w.add("web", nil, nil, nil)
	b := w.add("ledger", []plan.Port{{Port: 20880, Protocol: "dubbo"}},
		[]plan.Rule{{Name: "ledger/read", From: []string{spiffe("web")}, Services: []string{"g/com.test.S"}, Methods: []string{"get"}}}, nil)
	w.apply()
	server := &rpcServer{}
	go server.listen(b.listen(t, 20880), server.dubbo)
	c := web.mustDial(t, "10.99.0.2:20880")
	smuggled := bytes.Replace(dubboCall(4, "com.test.S", "g", "get"), []byte("\x04path\x0acom.test.S"), []byte("\x04path\x0acom.test.T"), 1)
	c.Write(slices.Concat(dubboCall(1, "com.test.S", "g", "get"), dubboCall(2, "com.test.S", "h", "get"), dubboCall(3, "com.test.S", "g", "drop"),
		smuggled, dubboCall(5, "com.test.S", "g", "get")))
	statuses := map[uint64]dubbo.Status{}
	for range 5 {
		f, err := readDubbo(c)
		if err != nil {
			t.Fatal(err)
		}
		statuses[f.ID] = f.Status
	}
	for id, want := range map[uint64]dubbo.Status{1: dubbo.OK, 2: dubbo.ServiceError, 3: dubbo.ServiceError, 4: dubbo.ServiceError, 5: dubbo.OK} {
		if statuses[id] != want {
			t.Errorf("request %d: status %d, want %d", id, statuses[id], want)
		}
	}
	if seen, want := server.all(), []string{"1 g/com.test.S#get", "5 g/com.test.S#get"}; !slices.Equal(seen, want) {
		t.Errorf("the server has seen %q, want %q", seen, want)
	}
	w.awaitEvent(api.EventAccessDenied, "cannot be read")
	c.Write([]byte("invoke com.test.S.drop()\r\n"))
	if rest, err := io.ReadAll(c); err == nil {
		t.Errorf("the console answered %q", rest)
	}
	w.awaitEvent(api.EventBadRequest, "it begins with 696e")
}

// loop is a side in memory: what it reads is given, in pieces of step bytes. With
// asked it ends as a server does: when nobody asks any more.
type loop struct {
	in    *bytes.Reader
	step  int
	out   bytes.Buffer
	asked chan struct{}
	over  sync.Once
}

func (l *loop) Read(b []byte) (int, error) {
	if l.asked != nil {
		<-l.asked
	}
	return l.in.Read(b[:min(len(b), l.step)])
}

func (l *loop) end() {
	l.over.Do(func() {
		if l.asked != nil {
			close(l.asked)
		}
	})
}

func (l *loop) Write(b []byte) (int, error) { return l.out.Write(b) }
func (l *loop) CloseWrite() error           { l.end(); return nil }
func (l *loop) abort()                      { l.end() }
func (l *loop) finish()                     { l.end() }

// pass runs an exchange over in, in pieces of step bytes, that refuses methods
// which begin with a capital, and returns what the server and the client see.
func pass(protocol string, in []byte, step int) (server, client []byte, err error) {
	far := &loop{in: bytes.NewReader(nil), step: step, asked: make(chan struct{})}
	near := &loop{in: bytes.NewReader(in), step: step}
	x := &rpcExchange{
		entry: &entry{}, client: near, protocol: protocol, dial: func() (side, error) { return far, nil },
		deep: func() bool { return true }, maybe: func() bool { return true }, reserve: func(int) bool { return true },
		judge: func(c rpcCodec) (fault, string) {
			r, err := c.target()
			if err != nil || r.method[0] >= 'A' && r.method[0] <= 'Z' {
				return faultDenied, "no"
			}
			return 0, ""
		},
		malformed: func(e error) { err = e },
	}
	x.run(nil)
	return far.out.Bytes(), near.out.Bytes(), err
}

// However the bytes arrive, what passes passes unchanged and in order, and what
// is refused does not.
func TestExchangeSplits(t *testing.T) {
	long := strings.Repeat("\x90", 40_000)
	for protocol, frames := range map[string][][]byte{
		"bolt": {boltCall(1, "s", "a", true, ""), boltCall(2, "s", "B", true, ""), beat(3), boltCall(4, "s", "C", false, long), boltCall(5, "s", "d", true, long),
			boltCall(6, "s", "E", false, ""), boltCall(7, "s", "f", false, "")},
		"dubbo": {dubboCall(1, "s", "", "a"), dubboCall(2, "s", "", "B"), dubboCall(3, "s", "", strings.Repeat("c", 20_000)), dubboCall(4, "s", "", strings.Repeat("D", 60_000)),
			dubboCall(5, "s", "", "e")},
	} {
		var in, want []byte
		for i, f := range frames {
			in = append(in, f...)
			if refused := map[string][]int{"bolt": {1, 3, 5}, "dubbo": {1, 3}}[protocol]; !slices.Contains(refused, i) {
				want = append(want, f...)
			}
		}
		for _, step := range []int{1, 2, 3, 7, 64, 1000, 4096, 16 << 10, 1 << 20} {
			server, client, err := pass(protocol, in, step)
			if err != nil || !bytes.Equal(server, want) {
				t.Errorf("%s in pieces of %d: %d bytes of %d, %v", protocol, step, len(server), len(want), err)
			}
			var ids []uint64
			for r := bytes.NewReader(client); r.Len() > 0; {
				if protocol == "bolt" {
					f, err := readBolt(r)
					if err != nil {
						t.Fatal(err)
					}
					ids = append(ids, uint64(f.ID))
				} else {
					f, err := readDubbo(r)
					if err != nil {
						t.Fatal(err)
					}
					ids = append(ids, f.ID)
				}
			}
			if refused := map[string][]uint64{"bolt": {2, 4, 6}, "dubbo": {2, 4}}[protocol]; !slices.Equal(ids, refused) {
				t.Errorf("%s in pieces of %d: refused %d, want %d", protocol, step, ids, refused)
			}
		}
	}
}

// endless is a client that repeats itself.
type endless struct {
	frame []byte
	at    int
	left  int
}

func (e *endless) Read(b []byte) (int, error) {
	if e.left == 0 {
		return 0, io.EOF
	}
	n := copy(b, e.frame[e.at:])
	if e.at += n; e.at == len(e.frame) {
		e.at = 0
		e.left--
	}
	return n, nil
}
func (e *endless) Write(b []byte) (int, error) { return len(b), nil }
func (e *endless) CloseWrite() error           { return nil }
func (e *endless) abort()                      {}
func (e *endless) finish()                     {}

// A frame that passes costs no allocation, the rules it is judged by included.
func TestExchangeNoAllocation(t *testing.T) {
	m := plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "s", Namespace: "bank", Identity: spiffe("s"),
		Ports: []plan.Port{{Port: 1, Protocol: "bolt"}},
		Deny:  []plan.Rule{{Name: "never", From: []string{"*"}, Services: []string{"g/com.x.*"}, Methods: []string{"drop"}}},
		Allow: []plan.Rule{{Name: "open", From: []string{"*"}, Services: []string{"com.alipay.test.*", "com.test.S:1.0"}, Methods: []string{"get"}}}}}}
	d, err := newDirectory(m)
	if err != nil {
		t.Fatal(err)
	}
	a := &arrival{p: New(Options{}), port: 1, who: party{peerIdentity: spiffe("web")}}
	a.p.observer.follow(a.p, &plan.Observe{}) // and no traces
	for protocol, frame := range map[string][]byte{"bolt": boltCall(1, sofaService, "get", true, ""), "dubbo": dubboCall(1, "com.test.S", "g", "get")} {
		a.sight = &sight{a: a, o: &a.p.observer, counts: &serviceCounts{}, protocol: protocol}
		run := func(n int) func() {
			return func() {
				x := &rpcExchange{
					entry: &entry{}, client: &endless{frame: frame, left: n}, protocol: protocol, dial: func() (side, error) { return &endless{}, nil },
					deep: func() bool { return true }, maybe: func() bool { return true }, reserve: a.p.reserve,
					judge:     func(c rpcCodec) (fault, string) { return a.judgeRPC(d.services["bank/s"], c) },
					malformed: func(err error) { t.Error(err) }, sight: a.sight,
				}
				x.run(nil)
			}
		}
		few, many := testing.AllocsPerRun(10, run(10)), testing.AllocsPerRun(10, run(10_000))
		if many-few > 20 {
			t.Errorf("%s: %v allocations for 10 frames, %v for 10,000", protocol, few, many)
		}
	}
}

func TestRPCRules(t *testing.T) {
	svc := func(allow, deny []plan.Rule) *service {
		d, err := newDirectory(plan.Mesh{Generation: 1, TrustDomain: domain, Services: []plan.Service{{Name: "s", Namespace: "bank", Identity: spiffe("s"),
			Ports: []plan.Port{{Port: 1, Protocol: "dubbo"}}, Allow: allow, Deny: deny}}})
		if err != nil {
			t.Fatal(err)
		}
		return d.services["bank/s"]
	}
	rule := func(services, methods string) plan.Rule {
		r := plan.Rule{Name: "r", From: []string{"*"}}
		if services != "" {
			r.Services = strings.Split(services, " ")
		}
		if methods != "" {
			r.Methods = strings.Split(methods, " ")
		}
		return r
	}
	ask := call{caller: spiffe("web"), port: 1, rpc: true, remote: remote{service: []byte("com.test.S"), version: []byte("1.0"), group: []byte("g"), method: []byte("get")}}
	for services, want := range map[string]bool{
		"com.test.S": true, "com.test.S:1.0": true, "g/com.test.S": true, "g/com.test.S:1.0": true, "com.test.*": true, "*": true, "g/*": true, "com.test.S:*": true,
		"com.test.S:1.*": true, "com.test.S*": true, "com.test.S:2.0": false, "com.test": false, "com.test.S2": false, "h/com.test.S": false, "com.test.S:1": false,
		"com.test.S:1.0.*": false, "h/*": false, "com.test.s": false, "x com.test.S": true, "com.test.S:1.00": false,
	} {
		if got := decide(svc([]plan.Rule{rule(services, "")}, nil), ask).allowed; got != want {
			t.Errorf("allow %q: %v", services, got)
		}
		if got := decide(svc(anyone(), []plan.Rule{rule(services, "")}), ask).allowed; got == want {
			t.Errorf("deny %q: allowed is %v", services, got)
		}
	}
	unread := call{caller: spiffe("web"), port: 1}
	path := plan.Rule{Name: "p", From: []string{"*"}, Paths: []string{"/"}}
	for name, c := range map[string]struct {
		allow, deny []plan.Rule
		ask         call
		want, maybe bool
	}{
		"method":                            {[]plan.Rule{rule("com.test.S", "get")}, nil, ask, true, true},
		"another method":                    {[]plan.Rule{rule("com.test.S", "put")}, nil, ask, false, true},
		"a method's case":                   {[]plan.Rule{rule("", "GET")}, nil, ask, false, true},
		"allowed, but not read":             {[]plan.Rule{rule("com.test.S", "")}, nil, unread, false, true},
		"denied, not read":                  {anyone(), []plan.Rule{rule("", "drop")}, unread, false, true},
		"not read, nothing asks for it":     {anyone(), nil, unread, true, true},
		"a path never allows":               {[]plan.Rule{path}, nil, ask, false, true},
		"a path always denies":              {anyone(), []plan.Rule{path}, ask, false, true},
		"a path and another method":         {anyone(), []plan.Rule{{Name: "p", From: []string{"*"}, Paths: []string{"/"}, Methods: []string{"put"}}}, ask, true, true},
		"all is denied":                     {anyone(), anyone(), ask, false, false},
		"nobody is allowed":                 {nil, nil, ask, false, false},
		"somebody else is allowed":          {[]plan.Rule{{Name: "x", From: []string{spiffe("x")}}}, nil, ask, false, false},
		"services do not fit HTTP":          {[]plan.Rule{rule("com.test.S", "")}, nil, call{caller: spiffe("web"), port: 1, http: true, method: "GET", path: "/"}, false, true},
		"services deny HTTP":                {anyone(), []plan.Rule{rule("com.test.S", "")}, call{caller: spiffe("web"), port: 1, http: true, method: "GET", path: "/"}, false, true},
		"a rule's get is GET":               {[]plan.Rule{rule("", "get")}, nil, call{caller: spiffe("web"), port: 1, http: true, method: "GET", path: "/"}, true, true},
		"a request's get is not GET":        {[]plan.Rule{rule("", "GET")}, nil, call{caller: spiffe("web"), port: 1, http: true, method: "get", path: "/"}, false, true},
		"services deny HTTP of that method": {anyone(), []plan.Rule{rule("com.test.S", "PUT")}, call{caller: spiffe("web"), port: 1, http: true, method: "GET", path: "/"}, true, true},
	} {
		s := svc(c.allow, c.deny)
		if v := decide(s, c.ask); v.allowed != c.want {
			t.Errorf("%s: %+v", name, v)
		}
		if got := mayCall(s, call{caller: c.ask.caller, port: 1}); got != c.maybe {
			t.Errorf("%s: some call may be allowed: %v", name, got)
		}
	}
}

// Frames that wait to be judged have a limit over all connections; beyond it
// they are judged by what can be seen of them.
func TestHeldFramesAreBounded(t *testing.T) {
	p := New(Options{})
	n := 0
	for p.reserve(1 << 20) {
		n++
	}
	if n != maxHeld>>20 {
		t.Errorf("%d MiB are held", n)
	}
	p.reserve(-1 << 20)
	if !p.reserve(1<<20) || p.reserve(1) {
		t.Error("what was given back is not there once")
	}
	in := newFrames(bytes.NewReader(dubboCall(1, strings.Repeat("s", 60_000), "", strings.Repeat("m", 60_000))), &dubboCodec{}, p.reserve)
	defer in.free()
	if err := in.fill(); err != nil {
		t.Fatal(err)
	}
	b, size, err := in.next(true)
	if err != nil || size < frameHold {
		t.Fatal(size, err)
	}
	if _, _, err := in.codec.inspect(b, size); err != nil {
		t.Fatal(err)
	}
	if r, err := in.codec.target(); err == nil || !strings.Contains(err.Error(), "are not enough") {
		t.Errorf("%q, %v", r.service, err)
	}
}

// FuzzExchange: the server sees whole frames that were judged, or nothing.
func FuzzExchange(f *testing.F) {
	f.Add(slices.Concat(boltCall(1, "s", "a", true, ""), boltCall(2, "s", "B", true, ""), beat(3)), uint16(7), true)
	f.Add(slices.Concat(dubboCall(1, "s", "", "a"), dubboCall(2, "s", "", "B")), uint16(5), false)
	f.Add([]byte("\x00\x00\x00\x2b\xda\xbc\x00\x00\x00\x2b\x00\x1f\x01\x00\x00\x00\x0acom.test.S\x00\x00\x00\x00\x00\x00\x00\x07\x80\x01\x00\x01\x00\x00\x00\x01m\x00\x00\x00\x09\x00"), uint16(3), false)
	f.Fuzz(func(t *testing.T, in []byte, step uint16, isBolt bool) {
		protocol := "dubbo"
		if isBolt {
			protocol = "bolt"
		}
		whole, _, fault := pass(protocol, in, 1<<20)
		parts, client, again := pass(protocol, in, int(step)%1000+1)
		if !bytes.Equal(whole, parts) || (fault == nil) != (again == nil) {
			t.Fatalf("%x, %v in one piece; %x, %v in pieces", whole, fault, parts, again)
		}
		// What passed passes again, and all of it.
		if out, _, err := pass(protocol, whole, 1<<20); err != nil || !bytes.Equal(out, whole) {
			t.Fatalf("%x passed, but %x of it does: %v", whole, out, err)
		}
		// What the client is told are frames.
		if out, _, err := pass(protocol, client, 1<<20); err != nil && !errors.Is(err, io.EOF) {
			t.Fatalf("the client is told %x, of which %x can be read: %v", client, out, err)
		}
	})
}

// A client that begins a frame and waits does not hold its connection for ever,
// and one that waits between frames does.
func TestExchangeSlow(t *testing.T) {
	in := newFrames(bytes.NewReader(append(beat(1), 1, 1)), &boltCodec{}, func(int) bool { return true })
	defer in.free()
	if err := in.fill(); err != nil {
		t.Fatal(err)
	}
	_, size, err := in.next(true)
	if err != nil || size == 0 || in.pass(size) != nil {
		t.Fatal(size, err)
	}
	if _, size, err = in.next(true); size != 0 || err != nil || !in.partial() || !in.within() {
		t.Errorf("half a frame: %d, %v", size, err)
	}
	if err := in.fill(); !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}
